"""`medmcqa-lora bench` at toy size: a process a variant, results that can be added up, failures as rows."""
import json
import math
import random
from dataclasses import replace
from types import SimpleNamespace
from unittest.mock import patch

import pytest
from conftest import ALL

from medmcqa_lora.bench import (
    KINDS,
    VARIANTS,
    Load,
    Variant,
    cut_model,
    examples_a_step,
    make_lengths,
    measure,
    passed_parameters,
    plot_kernels,
    random_files,
    run_variant,
    save_random,
)
from medmcqa_lora.files import read_lines
from medmcqa_lora.model import list_matrices, load_model, planned_model
from medmcqa_lora.recipe import Recipe, load_recipe, shipped

SMALL = ("--tokens", 256, "--steps", 3, "--warmup", 1)


@pytest.fixture(scope="module")
def benched(tmp_path_factory):
    """Two variants that run, and one that can't: unsloth needs bfloat16 and a GPU."""
    from medmcqa_lora.cli import main

    out = tmp_path_factory.mktemp("bench") / "out"
    with pytest.raises(SystemExit) as ended:
        main([str(w) for w in ("bench", "--variants", "plain,ours,unsloth", *SMALL, "--layers", 4, "-p", "lora_targets", "attention,mamba_in,shared_experts", "--out", out)])
    assert ended.value.code == 0
    return out, {r["variant"]: r for r in read_lines(out / "results.jsonl")}


def test_record(benched):
    out, found = benched
    assert list(found) == ["plain", "ours", "unsloth"]
    for r in (found["plain"], found["ours"]):
        assert r["seed"] == 42 and r["commit"] and r["versions"]["torch"] and r["hardware"]["cores"] and r["load"]["steps"] == 3
        t, s, m = r["training"], r["scoring"], r["training"]["memory_gib"]
        assert t["seconds"]["n"] == s["seconds"]["n"] == 3 and t["tokens_per_s"]["median"] > 0 and math.isfinite(t["loss"])
        assert t["share_of_peak"] is None and t["profile"]["calls"] is None  # no GPU
        assert abs(m["peak"] - m["weights"] - m["adapter_gradients_optimizer"] - m["activations"]) < 1e-4 and m["activations"] > 0
        assert set(t["profile"]["kinds"]) <= {*KINDS, "other"} and t["profile"]["kinds"]["dense GEMM"]["ms"] > 0
    assert found["plain"]["training"]["examples"] == 8 and found["plain"]["training"]["waste"] > 0.1
    assert found["ours"]["training"]["waste"] == 0 and abs(found["ours"]["training"]["tokens"]["median"] / 256 - 1) < 0.5


def test_only_plain_is_plain(benched):
    _, found = benched
    assert "grouped products in 0 of 1" in found["plain"]["kernels"][1] and "grouped products in 1 of 1" in found["ours"]["kernels"][1]
    assert found["plain"]["recipe"]["gradient_checkpointing"] and not found["ours"]["recipe"]["gradient_checkpointing"]
    assert found["plain"]["parameters_passed"] == found["ours"]["parameters_passed"]


def test_failure_is_a_row(benched):
    out, found = benched
    assert "unsloth" in found["unsloth"]["failed"] and "\n" not in found["unsloth"]["failed"]
    table = (out / "table.md").read_text()
    assert "| unsloth | not run: " in table and "| plain | " in table and "dense GEMM" in table
    assert (out / "kernels.png").stat().st_size > 5000 and "Traceback" in (out / "unsloth.log").read_text()


@pytest.mark.skipif(not ALL, reason="make test-all")
def test_no_variant_runs(cli, tmp_path):
    code, out, err = cli("bench", "--variants", "unsloth", *SMALL, "--out", tmp_path / "out")
    assert code == 1 and err.count("\n") == 1 and "no variant ran: unsloth: " in err
    assert "failed" in read_lines(tmp_path / "out/results.jsonl")[0]


def test_unsloth_gets_the_random_weights(tmp_path):
    """The folder that Unsloth reads holds what the other variants make, in bfloat16 shards, with a tokenizer; the process that writes it ends."""
    recipe = replace(cut_model(load_recipe("toy"), 4, tmp_path), dtype="bfloat16")
    stored = random_files(recipe, tmp_path)
    assert (stored.weights, stored.backend, stored.tokenizer) == ("pretrained", "hf", "toy-nemotron-h")
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {p.name for p in (tmp_path / "random").iterdir()}
    found, made = load_model(stored).state_dict(), load_model(recipe).state_dict()
    assert found.keys() == made.keys() and all(v.float().equal(made[k].float()) for k, v in found.items())


@pytest.mark.parametrize("change, expected", [
    (dict(dtype="float32"), "float32 is not what unsloth trains in"),
    (dict(dtype="bfloat16", lora_r_experts=2), "is not passed on by unsloth"),
    (dict(dtype="bfloat16"), "backend = unsloth: needs a GPU"),
])
def test_unsloth_is_refused_before_weights_are_written(change, expected, tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("medmcqa_lora.bench.random_files", lambda *a: pytest.fail("weights were written"))
    recipe = replace(cut_model(load_recipe("toy"), 4, tmp_path), lora_targets=["attention", "mamba_in", "shared_experts", "routed_experts"], **change)
    with pytest.raises(ValueError, match=expected):
        measure(recipe, "unsloth", Load(tokens=256), tmp_path)


def test_no_room_for_random_weights(tmp_path):
    with patch("shutil.disk_usage", return_value=SimpleNamespace(free=2**30)), pytest.raises(ValueError) as e:
        save_random(Recipe(model="nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-Base-BF16", weights="random", dtype="bfloat16"), tmp_path / "weights")
    assert str(e.value) == f"random weights in files need 58.8 GiB and the disk of {tmp_path} has 1 GiB free; set TMPDIR to a folder on a larger one"


@pytest.mark.parametrize("words, expected", [
    (("--variants", "ours,kernel"), "did you mean kernels?"),
    (("--recipe", "tiy"), "did you mean toy?"),
    (("--steps", 0), "--steps 0"),
    (("--lengths", "short"), "--lengths short"),
    (("--layers", 99), "--layers 99"),
    (("--layers", 2), "attention matches nothing"),
    (("-p", "data", "none.jsonl"), "none.jsonl"),
    (("-p", "lora_targets", "gate_proj"), "gate_proj"),
])
def test_mistakes(words, expected, cli, tmp_path):
    code, _, err = cli("bench", *words, "--out", tmp_path / "out")
    assert code == 1 and err.count("\n") == 1 and expected in err, err
    assert not (tmp_path / "out").exists()


def test_out_is_a_file(cli, tmp_path):
    (tmp_path / "out").touch()
    code, _, err = cli("bench", "--out", tmp_path / "out")
    assert code == 1 and "is a file" in err


def test_killed_process_leaves_a_reason(tmp_path, monkeypatch):
    """Out of the host's memory, a process is killed and can't say so."""
    monkeypatch.setattr("medmcqa_lora.bench.sys.executable", "/bin/false")
    found = run_variant(load_recipe("toy"), "ours", Load(), tmp_path / "log")
    assert found == {"failed": "the process ended with 1: it printed nothing"}


def test_parameters_of_the_30b_model():
    model = planned_model("nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-Base-BF16")
    blocks, head = passed_parameters(model)
    c = json.loads(shipped("assets/nemotron_nano_config.json").read_text())
    h, pattern = c["hidden_size"], c["hybrid_override_pattern"]
    inner = c["mamba_num_heads"] * c["mamba_head_dim"]
    mamba = h * (2 * inner + 2 * c["n_groups"] * c["ssm_state_size"] + c["mamba_num_heads"]) + inner * h
    attention = h * c["head_dim"] * (2 * c["num_attention_heads"] + 2 * c["num_key_value_heads"])
    moe = 2 * h * (c["num_experts_per_tok"] * c["moe_intermediate_size"] + c["moe_shared_expert_intermediate_size"]) + h * c["n_routed_experts"]
    assert blocks == pattern.count("M") * mamba + pattern.count("*") * attention + pattern.count("E") * moe
    assert round(blocks / 1e9, 3) == 2.874 and head == h * c["vocab_size"]


def test_cut_30b_model(tmp_path):
    recipe = load_recipe("nemotron_nano", {"tokenizer": "toy-nemotron-h"})
    cut = cut_model(recipe, 6, tmp_path)
    kinds = {m.kind for m in list_matrices(planned_model(cut.model))}
    assert kinds == {"mamba", "moe", "attention", "other"} and cut.tokenizer == "toy-nemotron-h"


def test_lengths_are_those_of_real_questions(validation):
    """The shipped histogram's are SmolLM2's tokens; another tokenizer's have another mean, and a similar spread."""
    from medmcqa_lora.data import encode_questions, load_questions, sample_tokenizer

    questions = load_questions(str(validation)).questions
    some = random.Random(0).sample(questions, 500)
    encoded = encode_questions(some, sample_tokenizer(), load_recipe("toy", {"max_length": "2048"}))
    own = make_lengths(Load(lengths="data"), [len(r["input_ids"]) for r in encoded.rows], 0)
    shipped_lengths = make_lengths(Load(), [], 0)
    assert len(shipped_lengths) == len(questions) == 4183
    assert examples_a_step(VARIANTS["ours"], shipped_lengths, 16384) == round(16384 * 4183 / 238508)

    def relative_spread(lengths):
        mean = sum(lengths) / len(lengths)
        return (sum((n - mean) ** 2 for n in lengths) / len(lengths)) ** 0.5 / mean

    assert abs(relative_spread(own) / relative_spread(shipped_lengths) - 1) < 0.25


def test_figure_has_a_bar_a_variant():
    def result(name, ms):
        return dict(variant=name, training=dict(tokens=dict(median=100), profile=dict(tokens=100, kinds={"dense GEMM": dict(ms=ms, calls=1), "other": dict(ms=1.0, calls=1)})))

    ax = plot_kernels([result("a", 3.0), result("b", 5.0)]).axes[0]
    assert [t.get_text() for t in ax.get_yticklabels()] == ["a", "b"]
    assert [[round(p.get_width(), 6) for p in c] for c in ax.containers] == [[30.0, 50.0], [10.0, 10.0]]


def test_variants_are_recipes():
    keys = set(vars(load_recipe("toy")))
    for v in VARIANTS.values():
        assert isinstance(v, Variant) and set(v.changes) <= keys and v.what
