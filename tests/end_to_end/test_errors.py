"""A user's mistake: one line on stderr that says what, where and what to do; exit code 1; nothing
written.
"""
import json
import os
import shutil

import pytest
from helpers import check_one_line

ROW = {"question": "Which organ makes insulin?", "opa": "Liver", "opb": "Pancreas", "opc": "Spleen", "opd": "Kidney", "cop": 4}


def lines(*rows):
    return "\n".join(r if isinstance(r, str) else json.dumps(r) for r in rows)


def without(field):
    return {k: v for k, v in ROW.items() if k != field}


DATA = {  # file name: (content, what the message must hold)
    "empty.jsonl": ("", ["empty.jsonl", "holds no rows"]),
    "broken.jsonl": (lines(ROW, ROW, '{"question": '), ["broken.jsonl", "line 3", "not JSON"]),
    "broken.json": ("[{]", ["broken.json", "not JSON"]),
    "latin.jsonl": (b"\xff\xfe{}", ["latin.jsonl", "UTF-8"]),
    "nofield.jsonl": (lines(ROW, without("question")), ["nofield.jsonl", "line 2", "question is missing"]),
    "nooption.jsonl": (lines(ROW, ROW, without("opc")), ["nooption.jsonl", "line 3", "opc is missing"]),
    "nested.jsonl": (lines({"data": {"Question": "?", "Options": {"A": "x"}}}), ["line 1", "data.Options.B is missing"]),
    "list.jsonl": (lines("[1, 2]", ROW), ["list.jsonl", "line 1"]),
    "base.jsonl": (lines({**ROW, "cop": 2}), ["base.jsonl", "label_base"]),
    "mixed.jsonl": (lines(ROW, {**ROW, "cop": 0}), ["mixed.jsonl", "two numberings"]),
    "unusable.jsonl": (lines({**ROW, "opa": ""}), ["unusable.jsonl", "empty option: 1"]),
    "cut.parquet": (b"PAR1 not a parquet file", ["cut.parquet"]),
    "what.txt": ("x", ["what.txt", "format"]),
    "deep.json": ("[" * 100_000, ["deep.json"]),
    "inner.jsonl": (lines({"data": "[" * 100_000}), ["line 1", "data.Options is missing"]),
    "shifted.csv": ("question,opa,opb,opc,opd,cop\nPain, fever?,a,b,c,d,1\n", ["shifted.csv", "line 2", "more than the header"]),
}


@pytest.mark.parametrize("name", DATA)
def test_data_files(name, cli, tmp_path):
    content, expected = DATA[name]
    file = tmp_path / name
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    check_one_line(cli("check-data", file), *expected)
    out = tmp_path / "run"
    check_one_line(cli("train", "--recipe", "toy", "-p", "data", file, "--out", out), *expected)
    assert not out.exists()


def test_unreadable_files(cli, tmp_path):
    check_one_line(cli("check-data", tmp_path / "none.jsonl"), "none.jsonl", "check the path")
    (tmp_path / "folder.jsonl").mkdir()
    check_one_line(cli("check-data", tmp_path / "folder.jsonl"), "folder.jsonl")
    if os.geteuid() != 0:  # root reads everything
        secret = tmp_path / "secret.jsonl"
        secret.write_text(lines(ROW))
        secret.chmod(0)
        check_one_line(cli("check-data", secret), "secret.jsonl", "permissions")


RECIPES = {  # words after the command: what the message must hold
    ("--recipe", "dmo"): ["[dmo]", "did you mean demo?"],
    ("--recipe", "none.ini"): ["none.ini", "no such file"],
    ("-p", "lora_rank", "4"): ["-p", "lora_rank", "did you mean lora_r?"],
    ("-p", "lora_r", "four"): ["lora_r", "whole number"],
    ("-p", "lora_r"): ["lora_r", "-p KEY VALUE"],
    ("-p", "lora_r", "0", "-p", "seed", "-1", "-p", "lora_dropout", "2"): ["lora_r = 0", "seed = -1", "lora_dropout"],
    ("-p", "lora_r", "10000000000000000", "-p", "num_train_epochs", "1e308"): ["lora_r = 10000000000000000 is beyond any use", "num_train_epochs"],
    ("-p", "learning_rate", "nan"): ["learning_rate", "finite"],
    ("-p", "packing", "on", "-p", "backend", "unsloth", "-p", "dtype", "bfloat16"): ["packing", "unsloth"],
    ("-p", "target", "word"): ["target", "one of letter"],
    ("--recipe", "toy", "-p", "model", "smollm"): ["model smollm", "built-in"],
    ("--recipe", "toy", "-p", "lora_targets", "q_proj,out_proj"): ["out_proj", "bypass"],
    ("--recipe", "toy", "-p", "lora_targets", "attention,mamba_out"): ["mamba_out is refused", "bypass"],
    ("--recipe", "toy", "-p", "lora_targets", "attention,router"): ["router is refused", "unbalance the experts"],
    ("--recipe", "toy", "-p", "lora_targets", "atention"): ["lora_targets: atention matches nothing", "did you mean attention?"],
    ("--recipe", "toy", "-p", "lora_r", "-4", "-p", "lora_r_experts", "0"): ["lora_r = -4 must be above 0", "lora_r_experts = 0 must be above 0"],
    ("--recipe", "toy", "-p", "report_to", "tensorbord"): ["report_to", "did you mean tensorboard?"],
    ("--recipe", "toy", "-p", "report_to", "comet_ml"): ["comet_ml is not installed", "pip install comet_ml"],
    ("--recipe", "toy", "--nproc-per-node", "0"): ["--nproc-per-node 0", "at least 1"],
    ("--recipe", "toy", "--nnodes", "2"): ["--rdzv-endpoint"],
    ("--recipe", "toy", "-p", "eval_data", "sample", "-p", "eval_split", "train"): ["every training row is also an evaluation row"],
}


@pytest.mark.parametrize("words", RECIPES, ids=" ".join)
def test_recipe(words, cli, tmp_path):
    check_one_line(cli("train", *words, "--out", tmp_path / "run"), *RECIPES[words])
    assert not (tmp_path / "run").exists()


def test_label_base_against_the_rows(cli, tmp_path):
    """Read from 0, these rows would lose a quarter and shift the rest by one."""
    (tmp_path / "one.jsonl").write_text(lines(*({**ROW, "question": f"{i}?", "cop": i} for i in (1, 2, 3, 4))))
    check_one_line(cli("check-data", tmp_path / "one.jsonl", "--label-base", "0"), "counts from 1", "label_base = 1")


def test_plan_options(cli):
    check_one_line(cli("plan", "--gpus", "0"), "--gpus 0")
    check_one_line(cli("plan", "--gpu-memory", "-5"), "--gpu-memory -5")
    check_one_line(cli("plan", "--recipe", ""), "--recipe", "is empty")


def test_broken_configurations(cli, tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    (model / "model.safetensors").write_bytes(b"")
    for text in ("[]", "{}", "{", '{"model_type": "nemotron_h", "hidden_size": "x"}'):
        (model / "config.json").write_text(text)
        check_one_line(cli("train", "--recipe", "toy", "-p", "model", model, "--out", tmp_path / "run"), "model", "config.json")
        assert not (tmp_path / "run").exists()


def test_fifo(cli, tmp_path):
    os.mkfifo(tmp_path / "rows.jsonl")
    check_one_line(cli("check-data", tmp_path / "rows.jsonl"), "is not a file")


def test_broken_ini(cli, tmp_path):
    (tmp_path / "mine.ini").write_text("[a]\nlora_r = 4\n[a]\n")
    check_one_line(cli("plan", "--recipe", tmp_path / "mine.ini"), "mine.ini", "line")


def test_plan_names_targets_that_match_nothing(cli):
    check_one_line(cli("plan", "--recipe", "toy", "-p", "lora_targets", "gate_proj"), "gate_proj matches nothing", "in_proj")


@pytest.mark.skipif("__import__('torch').cuda.is_available()", reason="needs a machine without a GPU")
def test_unsloth_without_gpu(cli, tmp_path):
    check_one_line(cli("train", "--recipe", "nemotron_nano_unsloth", "--out", tmp_path / "run"), "backend = unsloth", "-p backend hf")
    check_one_line(cli("train", "--recipe", "nemotron_nano", "--out", tmp_path / "run"), "fast = require", "-p fast auto")
    assert not (tmp_path / "run").exists()


def test_output_folders(cli, tmp_path):
    used = tmp_path / "used"
    used.mkdir()
    (used / "notes.txt").write_text("mine")
    for command in (["train", "--recipe", "toy"], ["evaluate", "--recipe", "toy"], ["demo", "--recipe", "toy"]):
        check_one_line(cli(*command, "--out", used), "used", "holds another run")
        check_one_line(cli(*command, "--out", used / "notes.txt"), "notes.txt", "is a file")
        check_one_line(cli(*command, "--out", "/proc/run"), "/proc", "choose another folder")
    check_one_line(cli("train", "--recipe", "toy", "--out", tmp_path / "none", "--resume"), "nothing to resume")
    assert [p.name for p in used.iterdir()] == ["notes.txt"]


def test_models(cli, tmp_path):
    from medmcqa_lora.model.resolve import resolve_model

    bare = tmp_path / "bare"
    bare.mkdir()
    check_one_line(cli("train", "--recipe", "toy", "-p", "model", bare, "--out", tmp_path / "run"), "bare", "config.json")
    shutil.copy(f"{resolve_model('toy-nemotron-h')}/config.json", bare)
    check_one_line(cli("train", "--recipe", "toy", "-p", "model", bare, "--out", tmp_path / "run"), "bare", "no *.safetensors")
    assert not (tmp_path / "run").exists()


def test_adapters(cli, tmp_path, smollm2):
    from safetensors.torch import load_file, save_file

    from medmcqa_lora.model.load import load_model
    from medmcqa_lora.model.lora import attach_lora
    from medmcqa_lora.model.adapter import save_adapter
    from medmcqa_lora.core.recipe_files import load_recipe

    recipe = load_recipe("toy")
    adapter = save_adapter(attach_lora(load_model(recipe), recipe), tmp_path / "adapter")
    out = tmp_path / "scores"
    check_one_line(cli("evaluate", "--recipe", "demo", "--adapter", adapter, "--out", out), "adapter", "another base", "toy-nemotron-h", "-p model")
    check_one_line(cli("evaluate", "--recipe", "toy", "--adapter", tmp_path / "none", "--out", out), "none", "adapter_config.json")
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    lost = next(iter(tensors))
    save_file({k: v for k, v in tensors.items() if k != lost}, file)  # PEFT would leave that matrix untrained, and say nothing that is seen
    check_one_line(cli("evaluate", "--recipe", "toy", "--adapter", adapter, "--out", out), "lacks 1 of", lost)
    config = adapter / "adapter_config.json"
    whole = config.read_text()
    config.write_text(json.dumps({**json.loads(whole), "target_modules": ["q_proj"]}))
    check_one_line(cli("evaluate", "--recipe", "toy", "--adapter", adapter, "--out", out), "does not fit")
    config.write_text("[]")
    check_one_line(cli("evaluate", "--recipe", "toy", "--adapter", adapter, "--out", out), "configuration does not fit")
    config.write_text(whole)
    file.write_bytes(file.read_bytes()[:500])
    check_one_line(cli("evaluate", "--recipe", "toy", "--adapter", adapter, "--out", out), "not a whole safetensors file")
    assert not out.exists()


def dense(folder):
    """A Nemotron-H without experts, random weights, and the toy's tokenizer."""
    import torch
    from transformers import NemotronHConfig, NemotronHForCausalLM

    from medmcqa_lora.model.resolve import TOY, load_tokenizer
    from medmcqa_lora.core.recipe_files import load_recipe

    with torch.random.fork_rng():
        NemotronHForCausalLM(NemotronHConfig(**TOY | {"hybrid_override_pattern": "M-M*-"})).save_pretrained(folder)
    load_tokenizer(load_recipe("toy")).save_pretrained(folder)
    return folder


def test_a_group_that_the_model_lacks(cli, tmp_path, smollm2):
    out = tmp_path / "run"
    check_one_line(cli("train", "--recipe", "toy", "-p", "model", dense(tmp_path / "dense"), "-p", "lora_targets", "attention,routed_experts", "--out", out),
                   "lora_targets: routed_experts matches nothing in this model", "attention, mamba_in, mlp")
    check_one_line(cli("train", "--recipe", "demo", "-p", "lora_targets", "mamba_in", "--out", out), "mamba_in matches nothing in this model", "attention, mlp")
    check_one_line(cli("plan", "--recipe", "demo", "-p", "lora_targets", "shared_experts"), "shared_experts matches nothing in this model")
    assert not out.exists()


@pytest.mark.parametrize("targets", ["routed_experts", "shared_experts", "attention,shared_experts"])
def test_an_adapter_made_for_other_targets(targets, cli, tmp_path, recwarn):
    """PEFT itself says nothing when some of an adapter's targets are there and others are not."""
    from medmcqa_lora.model.load import load_model
    from medmcqa_lora.model.lora import attach_lora
    from medmcqa_lora.model.adapter import save_adapter
    from medmcqa_lora.core.recipe_files import load_recipe

    recipe = load_recipe("toy", {"lora_targets": targets})
    adapter = save_adapter(attach_lora(load_model(recipe), recipe), tmp_path / "adapter")
    model = dense(tmp_path / "dense")
    recwarn.clear()
    check_one_line(cli("evaluate", "--recipe", "toy", "--model", model, "--adapter", adapter, "--out", tmp_path / "scores"), f"adapter {adapter}", "give the base it was made for")
    assert not recwarn.list  # a warning would be another line on stderr
    assert not (tmp_path / "scores").exists()


EXPERT = "backbone.layers.1.mixer.experts.{}.up_proj.weight"
CHECKPOINTS = {  # what is done to the toy's tensors: what the message must hold
    "missing": (lambda t: [t.pop(f"backbone.layers.3.mixer.{x}_proj.weight") for x in "qkvo"], ["4 in all", *(f"model.layers.3.mixer.{x}_proj.weight is missing" for x in "koq")]),
    "of another shape": (lambda t: t.update({"lm_head.weight": t["lm_head.weight"][:9].clone()}), ["lm_head.weight is 9 × 64 instead of 1024 × 64"]),
    "too many": (lambda t: t.update({"backbone.layers.6.norm.weight": t["backbone.layers.0.norm.weight"].clone()}), ["model.layers.6.norm.weight has no place in the model"]),
    "an expert is missing": (lambda t: t.pop(EXPERT.format(3)), ["mixer.experts.up_proj is 7 × 48 × 64 instead of 8 × 48 × 64"]),
    "an expert of another shape": (lambda t: t.update({EXPERT.format(3): t[EXPERT.format(3)][:5].clone()}), [f"{EXPERT.format(3)} is 5 × 64 instead of 48 × 64"]),
    "of another model": (lambda t: [t.update({f"x.{k}": t.pop(k)}) for k in list(t)], ["86 in all", "lm_head.weight is missing"]),
}


@pytest.mark.parametrize("change", CHECKPOINTS)
def test_checkpoints(change, cli, tmp_path):
    """transformers would fill what is missing with random numbers, and train on."""
    from safetensors.torch import load_file, save_file

    from medmcqa_lora.model.resolve import resolve_model
    from medmcqa_lora.model.load import _load_hf, load_model
    from medmcqa_lora.core.recipe_files import load_recipe

    (spoil, expected), model, out = CHECKPOINTS[change], tmp_path / "model", tmp_path / "run"
    shutil.copytree(resolve_model("toy-nemotron-h"), model)
    spoil(tensors := load_file(model / "model.safetensors"))
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    check_one_line(cli("train", "--recipe", "toy", "-p", "model", model, "--out", out), f"model {model}", "weights and config.json disagree", *expected)
    check_one_line(cli("evaluate", "--recipe", "toy", "--model", model, "--out", out), *expected)
    with pytest.raises(ValueError, match="weights and config.json disagree"):  # in a notebook, too
        load_model(recipe := load_recipe("toy", {"model": str(model)}))
    if change != "an expert of another shape":  # which transformers itself refuses
        with pytest.raises(ValueError, match="weights and config.json disagree"):  # from a hub, whose files are known only when they are loaded
            _load_hf(str(model), recipe)
    assert not out.exists()


def test_checkpoints_in_shards(cli, tmp_path):
    from medmcqa_lora.model.resolve import load_tokenizer
    from medmcqa_lora.model.checkpoint import check_checkpoint
    from medmcqa_lora.model.load import load_model
    from medmcqa_lora.core.recipe_files import load_recipe

    recipe, model, out = load_recipe("toy"), tmp_path / "model", tmp_path / "run"
    load_model(recipe).save_pretrained(model, max_shard_size="200KB")
    load_tokenizer(recipe).save_pretrained(model)
    check_checkpoint(model)
    shard, index = sorted(model.glob("*.safetensors"))[1], model / "model.safetensors.index.json"
    whole = shard.read_bytes()
    train = ("train", "--recipe", "toy", "-p", "model", model, "--out", out)
    shard.write_bytes(whole[:-9])
    check_one_line(cli(*train), shard.name, "not a whole safetensors file")
    shard.unlink()
    check_one_line(cli(*train), shard.name, "missing")
    shard.write_bytes(whole)
    for text in ("{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"x": 3}}'):
        index.write_text(text)
        check_one_line(cli(*train), index.name, "not an index of shards")
    assert not out.exists()


def test_compare_needs_two_evaluations(cli, tmp_path):
    check_one_line(cli("compare", tmp_path, tmp_path), "summary.json")
    line = {"id": "q", "subject": "ENT", "answer": "A", "prediction": "B", "correct": False}
    summary = dict(n=1, accuracy=0.0, ci95=[0.0, 0.8], majority_baseline=1.0, letter_mass=0.5, by_subject={}, data_sha256="x")
    for said, lines, expected in ((summary, [5], "line 1 is no JSON object"), (summary, [{**line, "id": 1}], "line 1"), (summary, [{**line, "correct": "yes"}], "line 1"),
                                  (summary, [], "holds no predictions"), ({}, [line], "n is missing"), ([], [line], "is not a JSON object"), ({**summary, "accuracy": None}, [line], "accuracy")):
        (tmp_path / "summary.json").write_text(json.dumps(said))
        (tmp_path / "predictions.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
        check_one_line(cli("compare", tmp_path, tmp_path, "--out", tmp_path / "out"), expected)
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("views, what", [("letters,guess", "--views guess"), ("letters,", "empty name"), ("", "empty name"), ("Options", "--views Options")])
def test_views(views, what, cli, tmp_path):
    out = tmp_path / "score"
    check_one_line(cli("evaluate", "--recipe", "toy", "--views", views, "--out", out), what, "is not one of letters, options, generation")
    assert not out.exists()


def test_processes(cli, monkeypatch, capsys):
    import torch

    from medmcqa_lora.launch.preflight import check_processes

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match="2 GPUs; use at most 2"):
        check_processes(3)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    assert "only 2 CPU cores" in check_processes(3)
    assert check_processes(2) == ""


def test_debug_shows_the_traceback(tmp_path):
    from medmcqa_lora.cli import main

    with pytest.raises(ValueError, match="none.jsonl"):
        main(["--debug", "check-data", f"{tmp_path}/none.jsonl"])
