"""A user's mistake: one line on stderr that says what, where and what to do; exit code 1; nothing
written.
"""
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from helpers import check_one_line
from safetensors.torch import load_file, save_file
from transformers import NemotronHConfig, NemotronHForCausalLM

from medmcqa_lora.cli import main
from medmcqa_lora.core.recipe_files import load_recipe
from medmcqa_lora.launch.preflight import check_processes
from medmcqa_lora.model.adapter import save_adapter
from medmcqa_lora.model.checkpoint import check_checkpoint
from medmcqa_lora.model.load import _load_hf, load_model
from medmcqa_lora.model.lora import attach_lora
from medmcqa_lora.model.resolve import TOY, load_tokenizer, resolve_model

ROW = {
    "question": "Which organ makes insulin?",
    "opa": "Liver", "opb": "Pancreas", "opc": "Spleen", "opd": "Kidney", "cop": 4,
}
TRAIN = ("train", "--recipe", "toy")
EVALUATE = ("evaluate", "--recipe", "toy")


def lines(*rows):
    return "\n".join(r if isinstance(r, str) else json.dumps(r) for r in rows)


def without(field):
    return {k: v for k, v in ROW.items() if k != field}


# Data files

TOO_FEW_OPTIONS = {"data": {"Question": "?", "Options": {"A": "x"}}}
UNQUOTED_COMMA = "question,opa,opb,opc,opd,cop\nPain, fever?,a,b,c,d,1\n"
DATA = {  # file name: (content, what the message must hold)
    "empty.jsonl": ("", ["empty.jsonl", "holds no rows"]),
    "broken.jsonl": (lines(ROW, ROW, '{"question": '), ["broken.jsonl", "line 3", "not JSON"]),
    "broken.json": ("[{]", ["broken.json", "not JSON"]),
    "latin.jsonl": (b"\xff\xfe{}", ["latin.jsonl", "UTF-8"]),
    "nofield.jsonl": (
        lines(ROW, without("question")), ["nofield.jsonl", "line 2", "question is missing"]),
    "nooption.jsonl": (
        lines(ROW, ROW, without("opc")), ["nooption.jsonl", "line 3", "opc is missing"]),
    "nested.jsonl": (lines(TOO_FEW_OPTIONS), ["line 1", "data.Options.B is missing"]),
    "list.jsonl": (lines("[1, 2]", ROW), ["list.jsonl", "line 1"]),
    "base.jsonl": (lines({**ROW, "cop": 2}), ["base.jsonl", "label_base"]),
    "mixed.jsonl": (lines(ROW, {**ROW, "cop": 0}), ["mixed.jsonl", "two numberings"]),
    "unusable.jsonl": (lines({**ROW, "opa": ""}), ["unusable.jsonl", "empty option: 1"]),
    "cut.parquet": (b"PAR1 not a parquet file", ["cut.parquet"]),
    "what.txt": ("x", ["what.txt", "format"]),
    "deep.json": ("[" * 100_000, ["deep.json"]),
    "inner.jsonl": (lines({"data": "[" * 100_000}), ["line 1", "data.Options is missing"]),
    "shifted.csv": (UNQUOTED_COMMA, ["shifted.csv", "line 2", "more than the header"]),
}


@pytest.mark.parametrize("name", DATA)
def test_data_files(name, cli, tmp_path):
    content, expected = DATA[name]
    file = tmp_path / name
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    check_one_line(cli("check-data", file), *expected)
    out = tmp_path / "run"
    check_one_line(cli(*TRAIN, "-p", "data", file, "--out", out), *expected)
    assert not out.exists()


def test_data_file_that_does_not_exist(cli, tmp_path):
    check_one_line(cli("check-data", tmp_path / "none.jsonl"), "none.jsonl", "check the path")


def test_data_file_that_is_a_folder(cli, tmp_path):
    (tmp_path / "folder.jsonl").mkdir()
    check_one_line(cli("check-data", tmp_path / "folder.jsonl"), "folder.jsonl")


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_data_file_without_permission(cli, tmp_path):
    secret = tmp_path / "secret.jsonl"
    secret.write_text(lines(ROW))
    secret.chmod(0)
    check_one_line(cli("check-data", secret), "secret.jsonl", "permissions")


def test_data_file_that_is_a_pipe(cli, tmp_path):
    os.mkfifo(tmp_path / "rows.jsonl")
    check_one_line(cli("check-data", tmp_path / "rows.jsonl"), "is not a file")


def test_label_base_against_the_rows(cli, tmp_path):
    """Read from 0, these rows would lose a quarter and shift the rest by one."""
    file = tmp_path / "one.jsonl"
    file.write_text(lines(*({**ROW, "question": f"{i}?", "cop": i} for i in (1, 2, 3, 4))))
    result = cli("check-data", file, "--label-base", "0")
    check_one_line(result, "counts from 1", "label_base = 1")


# Recipes and options

RECIPES = {  # words after `train`: what the message must hold
    "--recipe dmo": ["[dmo]", "did you mean demo?"],
    "--recipe none.ini": ["none.ini", "no such file"],
    "-p lora_rank 4": ["-p", "lora_rank", "did you mean lora_r?"],
    "-p lora_r four": ["lora_r", "whole number"],
    "-p lora_r": ["lora_r", "-p KEY VALUE"],
    "-p lora_r 0 -p seed -1 -p lora_dropout 2": ["lora_r = 0", "seed = -1", "lora_dropout"],
    "-p lora_r 10000000000000000 -p num_train_epochs 1e308":
        ["lora_r = 10000000000000000 is beyond any use", "num_train_epochs"],
    "-p learning_rate nan": ["learning_rate", "finite"],
    "-p packing on -p backend unsloth -p dtype bfloat16": ["packing", "unsloth"],
    "-p target word": ["target", "one of letter"],
    "--recipe toy -p model smollm": ["model smollm", "built-in"],
    "--recipe toy -p lora_targets q_proj,out_proj": ["out_proj", "bypass"],
    "--recipe toy -p lora_targets attention,mamba_out": ["mamba_out is refused", "bypass"],
    "--recipe toy -p lora_targets attention,router":
        ["router is refused", "unbalance the experts"],
    "--recipe toy -p lora_targets atention":
        ["lora_targets: atention matches nothing", "did you mean attention?"],
    "--recipe toy -p lora_r -4 -p lora_r_experts 0":
        ["lora_r = -4 must be above 0", "lora_r_experts = 0 must be above 0"],
    "--recipe toy -p report_to tensorbord": ["report_to", "did you mean tensorboard?"],
    "--recipe toy -p report_to comet_ml":
        ["comet_ml is not installed", "pip install comet_ml"],
    "--recipe toy --nproc-per-node 0": ["--nproc-per-node 0", "at least 1"],
    "--recipe toy --nnodes 2": ["--rdzv-endpoint"],
    "--recipe toy -p eval_data sample -p eval_split train":
        ["every training row is also an evaluation row"],
}


@pytest.mark.parametrize("words", RECIPES)
def test_recipe(words, cli, tmp_path):
    result = cli("train", *words.split(), "--out", tmp_path / "run")
    check_one_line(result, *RECIPES[words])
    assert not (tmp_path / "run").exists()


def test_recipe_file_with_a_section_twice(cli, tmp_path):
    (tmp_path / "mine.ini").write_text("[a]\nlora_r = 4\n[a]\n")
    check_one_line(cli("plan", "--recipe", tmp_path / "mine.ini"), "mine.ini", "line")


@pytest.mark.parametrize("option, value, expected", [
    ("--gpus", "0", ["--gpus 0"]),
    ("--gpu-memory", "-5", ["--gpu-memory -5"]),
    ("--recipe", "", ["--recipe", "is empty"]),
])
def test_plan_options(option, value, expected, cli):
    check_one_line(cli("plan", option, value), *expected)


def test_plan_names_targets_that_match_nothing(cli):
    result = cli("plan", "--recipe", "toy", "-p", "lora_targets", "gate_proj")
    check_one_line(result, "gate_proj matches nothing", "in_proj")


@pytest.mark.skipif("torch.cuda.is_available()", reason="needs a machine without a GPU")
@pytest.mark.parametrize("recipe, expected", [
    ("nemotron_nano_unsloth", ["backend = unsloth", "-p backend hf"]),
    ("nemotron_nano", ["fast = require", "-p fast auto"]),
])
def test_recipes_that_need_a_gpu(recipe, expected, cli, tmp_path):
    check_one_line(cli("train", "--recipe", recipe, "--out", tmp_path / "run"), *expected)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("views, what", [
    ("letters,guess", "--views guess"),
    ("letters,", "empty name"),
    ("", "empty name"),
    ("Options", "--views Options"),
])
def test_views(views, what, cli, tmp_path):
    out = tmp_path / "score"
    result = cli(*EVALUATE, "--views", views, "--out", out)
    check_one_line(result, what, "is not one of letters, options, generation")
    assert not out.exists()


def test_more_processes_than_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match="2 GPUs; use at most 2"):
        check_processes(3)


def test_more_processes_than_cores(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    assert "only 2 CPU cores" in check_processes(3)
    assert check_processes(2) == ""


def test_debug_shows_the_traceback(tmp_path):
    with pytest.raises(ValueError, match="none.jsonl"):
        main(["--debug", "check-data", f"{tmp_path}/none.jsonl"])


# Output folders

@pytest.fixture
def used(tmp_path) -> Path:
    """A folder with a user's file, which must still be there, alone, afterwards."""
    folder = tmp_path / "used"
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    yield folder
    assert [p.name for p in folder.iterdir()] == ["notes.txt"]


WRITES_A_RUN = pytest.mark.parametrize("command", ["train", "evaluate", "demo"])


@WRITES_A_RUN
def test_out_that_holds_something_else(command, used, cli):
    result = cli(command, "--recipe", "toy", "--out", used)
    check_one_line(result, "used", "holds another run")


@WRITES_A_RUN
def test_out_that_is_a_file(command, used, cli):
    result = cli(command, "--recipe", "toy", "--out", used / "notes.txt")
    check_one_line(result, "notes.txt", "is a file")


@WRITES_A_RUN
def test_out_that_cannot_be_written(command, cli):
    result = cli(command, "--recipe", "toy", "--out", "/proc/run")
    check_one_line(result, "/proc", "choose another folder")


def test_resume_without_a_run(cli, tmp_path):
    check_one_line(cli(*TRAIN, "--out", tmp_path / "none", "--resume"), "nothing to resume")


# Models

@pytest.mark.parametrize(
    "text", ["[]", "{}", "{", '{"model_type": "nemotron_h", "hidden_size": "x"}'])
def test_broken_configurations(text, cli, tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    (model / "model.safetensors").write_bytes(b"")
    (model / "config.json").write_text(text)
    result = cli(*TRAIN, "-p", "model", model, "--out", tmp_path / "run")
    check_one_line(result, "model", "config.json")
    assert not (tmp_path / "run").exists()


def test_model_without_a_configuration(cli, tmp_path):
    bare = tmp_path / "bare"
    bare.mkdir()
    result = cli(*TRAIN, "-p", "model", bare, "--out", tmp_path / "run")
    check_one_line(result, "bare", "config.json")
    assert not (tmp_path / "run").exists()


def test_model_without_weights(cli, tmp_path):
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(f"{resolve_model('toy-nemotron-h')}/config.json", bare)
    result = cli(*TRAIN, "-p", "model", bare, "--out", tmp_path / "run")
    check_one_line(result, "bare", "no *.safetensors")
    assert not (tmp_path / "run").exists()


EXPERT = "backbone.layers.1.mixer.experts.{}.up_proj.weight"
ATTENTION = "backbone.layers.3.mixer.{}_proj.weight"
FIRST_NORM, NEW_NORM = "backbone.layers.0.norm.weight", "backbone.layers.6.norm.weight"


def delete_attention(tensors: dict):
    for letter in "qkvo":
        tensors.pop(ATTENTION.format(letter))


def delete_expert(tensors: dict):
    tensors.pop(EXPERT.format(3))


def shorten_head(tensors: dict):
    tensors["lm_head.weight"] = tensors["lm_head.weight"][:9].clone()


def shorten_expert(tensors: dict):
    tensors[EXPERT.format(3)] = tensors[EXPERT.format(3)][:5].clone()


def add_norm(tensors: dict):
    tensors[NEW_NORM] = tensors[FIRST_NORM].clone()


def rename_all(tensors: dict):
    for name in list(tensors):
        tensors[f"x.{name}"] = tensors.pop(name)


THREE_OF_FOUR = [f"model.layers.3.mixer.{x}_proj.weight is missing" for x in "koq"]
CHECKPOINTS = {  # fault: (how the toy's tensors are changed, what the message must hold)
    "missing": (delete_attention, ["4 in all", *THREE_OF_FOUR]),
    "of another shape": (shorten_head, ["lm_head.weight is 9 × 64 instead of 1024 × 64"]),
    "too many": (add_norm, ["model.layers.6.norm.weight has no place in the model"]),
    "an expert is missing":
        (delete_expert, ["mixer.experts.up_proj is 7 × 48 × 64 instead of 8 × 48 × 64"]),
    "an expert of another shape":
        (shorten_expert, [f"{EXPERT.format(3)} is 5 × 64 instead of 48 × 64"]),
    "of another model": (rename_all, ["86 in all", "lm_head.weight is missing"]),
}
DISAGREE = "weights and config.json disagree"


@pytest.fixture
def changed_model(change, tmp_path) -> Path:
    """The toy model's folder, with its tensors changed as the test's parameter says."""
    model = tmp_path / "model"
    shutil.copytree(resolve_model("toy-nemotron-h"), model)
    tensors = load_file(model / "model.safetensors")
    CHECKPOINTS[change][0](tensors)
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    return model


@pytest.mark.parametrize("change", CHECKPOINTS)
def test_weights_that_do_not_fit(change, changed_model, cli, tmp_path):
    """transformers would fill what is missing with random numbers, and train on."""
    out, expected = tmp_path / "run", CHECKPOINTS[change][1]
    result = cli(*TRAIN, "-p", "model", changed_model, "--out", out)
    check_one_line(result, f"model {changed_model}", DISAGREE, *expected)
    check_one_line(cli(*EVALUATE, "--model", changed_model, "--out", out), *expected)
    assert not out.exists()


@pytest.mark.parametrize("change", CHECKPOINTS)
def test_weights_that_do_not_fit_in_a_notebook(change, changed_model):
    with pytest.raises(ValueError, match=DISAGREE):
        load_model(load_recipe("toy", {"model": str(changed_model)}))


# transformers itself refuses an expert of another shape
@pytest.mark.parametrize("change", [c for c in CHECKPOINTS if c != "an expert of another shape"])
def test_weights_that_do_not_fit_from_a_hub(change, changed_model):
    """A hub's files are known only when they are loaded."""
    recipe = load_recipe("toy", {"model": str(changed_model)})
    with pytest.raises(ValueError, match=DISAGREE):
        _load_hf(str(changed_model), recipe)


@pytest.fixture(scope="module")
def intact_shards(tmp_path_factory) -> Path:
    """The toy model in several weight files; tests damage a copy."""
    recipe, model = load_recipe("toy"), tmp_path_factory.mktemp("sharded") / "model"
    load_model(recipe).save_pretrained(model, max_shard_size="200KB")
    load_tokenizer(recipe).save_pretrained(model)
    check_checkpoint(model)
    return model


@pytest.fixture
def shards(intact_shards, tmp_path) -> Path:
    return Path(shutil.copytree(intact_shards, tmp_path / "model"))


def second_shard(model: Path) -> Path:
    return sorted(model.glob("*.safetensors"))[1]


def check_training_refused(cli, model: Path, *expected: str):
    out = model.parent / "run"
    check_one_line(cli(*TRAIN, "-p", "model", model, "--out", out), *expected)
    assert not out.exists()


def test_shard_cut_off(shards, cli):
    shard = second_shard(shards)
    shard.write_bytes(shard.read_bytes()[:-9])
    check_training_refused(cli, shards, shard.name, "not a whole safetensors file")


def test_shard_missing(shards, cli):
    shard = second_shard(shards)
    shard.unlink()
    check_training_refused(cli, shards, shard.name, "missing")


@pytest.mark.parametrize(
    "text", ["{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"x": 3}}'])
def test_index_of_shards_broken(text, shards, cli):
    index = shards / "model.safetensors.index.json"
    index.write_text(text)
    check_training_refused(cli, shards, index.name, "not an index of shards")


# Adapters

def save_toy_adapter(folder: Path, **settings) -> Path:
    recipe = load_recipe("toy", settings)
    return save_adapter(attach_lora(load_model(recipe), recipe), folder)


@pytest.fixture(scope="module")
def intact_adapter(tmp_path_factory) -> Path:
    """An adapter for the toy model; tests damage a copy."""
    return save_toy_adapter(tmp_path_factory.mktemp("intact") / "adapter")


@pytest.fixture
def adapter(intact_adapter, tmp_path) -> Path:
    return Path(shutil.copytree(intact_adapter, tmp_path / "adapter"))


def check_adapter_refused(cli, adapter: Path, *expected: str, recipe: str = "toy"):
    out = adapter.parent / "scores"
    result = cli("evaluate", "--recipe", recipe, "--adapter", adapter, "--out", out)
    check_one_line(result, *expected)
    assert not out.exists()


def test_adapter_of_another_base(adapter, cli, smollm2):
    expected = ("adapter", "another base", "toy-nemotron-h", "-p model")
    check_adapter_refused(cli, adapter, *expected, recipe="demo")


def test_adapter_that_does_not_exist(cli, tmp_path):
    check_adapter_refused(cli, tmp_path / "none", "none", "adapter_config.json")


def test_adapter_that_lacks_a_tensor(adapter, cli):
    """PEFT would leave that matrix untrained, with nothing that a user sees."""
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    lost = next(iter(tensors))
    save_file({k: v for k, v in tensors.items() if k != lost}, file)
    check_adapter_refused(cli, adapter, "lacks 1 of", lost)


def test_adapter_with_other_targets_in_its_configuration(adapter, cli):
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "target_modules": ["q_proj"]}))
    check_adapter_refused(cli, adapter, "does not fit")


def test_adapter_whose_configuration_is_a_list(adapter, cli):
    (adapter / "adapter_config.json").write_text("[]")
    check_adapter_refused(cli, adapter, "configuration does not fit")


def test_adapter_cut_off(adapter, cli):
    file = adapter / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:500])
    check_adapter_refused(cli, adapter, "not a whole safetensors file")


def save_dense_model(folder: Path) -> Path:
    """A Nemotron-H without experts, random weights, and the toy's tokenizer."""
    config = NemotronHConfig(**TOY | {"hybrid_override_pattern": "M-M*-"})
    with torch.random.fork_rng():
        NemotronHForCausalLM(config).save_pretrained(folder)
    load_tokenizer(load_recipe("toy")).save_pretrained(folder)
    return folder


def test_lora_group_that_a_model_lacks(cli, tmp_path):
    dense, out = save_dense_model(tmp_path / "dense"), tmp_path / "run"
    targets = ("-p", "lora_targets", "attention,routed_experts")
    result = cli(*TRAIN, "-p", "model", dense, *targets, "--out", out)
    missing = "lora_targets: routed_experts matches nothing in this model"
    check_one_line(result, missing, "attention, mamba_in, mlp")
    assert not out.exists()


def test_lora_group_that_the_small_model_lacks(cli, tmp_path, smollm2):
    out = tmp_path / "run"
    result = cli("train", "--recipe", "demo", "-p", "lora_targets", "mamba_in", "--out", out)
    check_one_line(result, "mamba_in matches nothing in this model", "attention, mlp")
    result = cli("plan", "--recipe", "demo", "-p", "lora_targets", "shared_experts")
    check_one_line(result, "shared_experts matches nothing in this model")
    assert not out.exists()


@pytest.mark.parametrize(
    "targets", ["routed_experts", "shared_experts", "attention,shared_experts"])
def test_adapter_made_for_other_targets(targets, cli, tmp_path, recwarn):
    """PEFT itself says nothing when some of an adapter's targets are there and others are not."""
    adapter = save_toy_adapter(tmp_path / "adapter", lora_targets=targets)
    model, out = save_dense_model(tmp_path / "dense"), tmp_path / "scores"
    recwarn.clear()
    result = cli(*EVALUATE, "--model", model, "--adapter", adapter, "--out", out)
    check_one_line(result, f"adapter {adapter}", "give the base it was made for")
    assert not recwarn.list  # a warning would be another line on stderr
    assert not out.exists()


# Evaluations to compare

PREDICTION = {"id": "q", "subject": "ENT", "answer": "A", "prediction": "B", "correct": False}
SUMMARY = dict(
    n=1, accuracy=0.0, ci95=[0.0, 0.8], majority_baseline=1.0, letter_mass=0.5, by_subject={},
    data_sha256="x")
EVALUATIONS = {  # fault: (summary, predictions, what the message must hold)
    "a number for a prediction": (SUMMARY, [5], "line 1 is no JSON object"),
    "a number for an id": (SUMMARY, [{**PREDICTION, "id": 1}], "line 1"),
    "a word for a truth value": (SUMMARY, [{**PREDICTION, "correct": "yes"}], "line 1"),
    "no predictions": (SUMMARY, [], "holds no predictions"),
    "an empty summary": ({}, [PREDICTION], "n is missing"),
    "a list for a summary": ([], [PREDICTION], "is not a JSON object"),
    "no accuracy": ({**SUMMARY, "accuracy": None}, [PREDICTION], "accuracy"),
}


def test_compare_without_evaluations(cli, tmp_path):
    check_one_line(cli("compare", tmp_path, tmp_path), "summary.json")


@pytest.mark.parametrize("fault", EVALUATIONS)
def test_compare_with_broken_evaluations(fault, cli, tmp_path):
    summary, predictions, expected = EVALUATIONS[fault]
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    written = "".join(json.dumps(p) + "\n" for p in predictions)
    (tmp_path / "predictions.jsonl").write_text(written)
    check_one_line(cli("compare", tmp_path, tmp_path, "--out", tmp_path / "out"), expected)
    assert not (tmp_path / "out").exists()
