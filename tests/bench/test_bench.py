"""`medmcqa-lora bench` at toy size: a process a variant, results that can be added up, failures as
rows; levers without_lever away and put back.
"""

import json
import math
import random
import re
import weakref
from dataclasses import replace
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
from conftest import ALL

from medmcqa_lora.bench.ablation import LEVERS, ablate, attribute_replaced, without_lever
from medmcqa_lora.bench.measure import measure, prepare
from medmcqa_lora.bench.profile import KINDS
from medmcqa_lora.bench.run import run_variant
from medmcqa_lora.bench.tables import plot_kernels
from medmcqa_lora.bench.variants import (
    VARIANTS,
    Variant,
    Workload,
    cut_model,
    examples_per_step,
    make_lengths,
    passed_parameters,
    random_files,
    save_random,
)
from medmcqa_lora.core.files import read_lines, shipped_file
from medmcqa_lora.core.recipe import Recipe
from medmcqa_lora.core.recipe_files import load_recipe
from medmcqa_lora.fast import layers, mamba, operations, packing
from medmcqa_lora.fast.apply import apply_fast_parts
from medmcqa_lora.fast.experts import is_grouped
from medmcqa_lora.model.checkpoint import model_structure
from medmcqa_lora.model.load import load_model
from medmcqa_lora.model.lora import list_matrices
from medmcqa_lora.training import step, trainer

SMALL = ("--tokens", 256, "--steps", 3, "--warmup", 1)


@pytest.fixture(scope="module")
def benched(tmp_path_factory):
    """Two variants that run, and one that can't: unsloth needs bfloat16 and a GPU."""
    from medmcqa_lora.cli import main

    out = tmp_path_factory.mktemp("bench") / "out"
    with pytest.raises(SystemExit) as ended:
        main(
            [
                str(w)
                for w in (
                    "bench",
                    "--variants",
                    "plain,ours,unsloth",
                    *SMALL,
                    "--layers",
                    4,
                    "-p",
                    "lora_targets",
                    "attention,mamba_in,shared_experts",
                    "--out",
                    out,
                )
            ]
        )
    assert ended.value.code == 0
    return out, {r["variant"]: r for r in read_lines(out / "results.jsonl")}


def test_record(benched):
    out, found = benched
    assert list(found) == ["plain", "ours", "unsloth"]
    for r in (found["plain"], found["ours"]):
        assert (
            r["seed"] == 42
            and r["commit"]
            and r["versions"]["torch"]
            and r["hardware"]["cores"]
            and r["load"]["steps"] == 3
        )
        t, s, m = r["training"], r["scoring"], r["training"]["memory_gib"]
        assert (
            t["seconds"]["n"] == s["seconds"]["n"] == 3
            and t["tokens_per_s"]["median"] > 0
            and math.isfinite(t["loss"])
        )
        assert t["share_of_peak"] is None and t["profile"]["calls"] is None  # no GPU
        assert (
            abs(m["peak"] - m["weights"] - m["adapter_gradients_optimizer"] - m["activations"])
            < 1e-4
            and m["activations"] > 0
        )
        assert (
            set(t["profile"]["kinds"]) <= {*KINDS, "other"}
            and t["profile"]["kinds"]["dense GEMM"]["ms"] > 0
        )
    assert found["plain"]["training"]["examples"] == 8 and found["plain"]["training"]["waste"] > 0.1
    assert (
        found["ours"]["training"]["waste"] == 0
        and abs(found["ours"]["training"]["tokens"]["median"] / 256 - 1) < 0.5
    )


def test_only_plain_is_plain(benched):
    _, found = benched
    assert (
        "grouped products in 0 of 1" in found["plain"]["kernels"][1]
        and "grouped products in 1 of 1" in found["ours"]["kernels"][1]
    )
    assert (
        found["plain"]["recipe"]["gradient_checkpointing"]
        and not found["ours"]["recipe"]["gradient_checkpointing"]
    )
    assert found["plain"]["parameters_passed"] == found["ours"]["parameters_passed"]


def test_failure_is_a_row(benched):
    out, found = benched
    assert "unsloth" in found["unsloth"]["failed"] and "\n" not in found["unsloth"]["failed"]
    table = (out / "table.md").read_text()
    assert re.search(r"\| unsloth +\| not run: ", table) and "| plain " in table
    assert "dense GEMM" in table
    assert (out / "kernels.png").stat().st_size > 5000 and "Traceback" in (
        out / "unsloth.log"
    ).read_text()


@pytest.mark.skipif(not ALL, reason="make test-all")
def test_no_variant_runs(cli, tmp_path):
    code, out, err = cli("bench", "--variants", "unsloth", *SMALL, "--out", tmp_path / "out")
    assert code == 1 and err.count("\n") == 1 and "no variant ran: unsloth: " in err
    assert "failed" in read_lines(tmp_path / "out/results.jsonl")[0]


def test_unsloth_gets_the_random_weights(tmp_path):
    """The folder that Unsloth reads holds what the other variants make, in bfloat16 shards, with
    a tokenizer; the process that writes it ends.
    """
    recipe = replace(cut_model(load_recipe("toy"), 4, tmp_path), dtype="bfloat16")
    stored = random_files(recipe, tmp_path)
    assert (stored.weights, stored.backend, stored.tokenizer) == (
        "pretrained",
        "hf",
        "toy-nemotron-h",
    )
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {
        p.name for p in (tmp_path / "random").iterdir()
    }
    found, made = (
        apply_fast_parts(load_model(stored), stored).state_dict(),
        apply_fast_parts(load_model(recipe), recipe).state_dict(),
    )
    assert found.keys() == made.keys() and all(
        v.float().equal(made[k].float()) for k, v in found.items()
    )


@pytest.mark.parametrize(
    "change, expected",
    [
        (dict(dtype="float32"), "float32 is not what unsloth trains in"),
        (dict(dtype="bfloat16", lora_r_experts=2), "is not passed on by unsloth"),
        (dict(dtype="bfloat16"), "backend = unsloth: needs a GPU"),
    ],
)
def test_unsloth_is_refused_before_weights_are_written(change, expected, tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(
        "medmcqa_lora.bench.measure.random_files", lambda *a: pytest.fail("weights were written")
    )
    recipe = replace(
        cut_model(load_recipe("toy"), 4, tmp_path),
        lora_targets=["attention", "mamba_in", "shared_experts", "routed_experts"],
        **change,
    )
    with pytest.raises(ValueError, match=expected):
        measure(recipe, "unsloth", Workload(tokens=256), tmp_path)


def test_no_room_for_random_weights(tmp_path):
    with (
        patch("shutil.disk_usage", return_value=SimpleNamespace(free=2**30)),
        pytest.raises(ValueError) as e,
    ):
        save_random(
            Recipe(
                model="nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-Base-BF16",
                weights="random",
                dtype="bfloat16",
            ),
            tmp_path / "weights",
        )
    assert (
        str(e.value)
        == f"random weights in files need 58.8 GiB and the disk of {tmp_path} has 1 GiB free; "
        "set TMPDIR to a folder on a larger one"
    )


@pytest.mark.parametrize(
    "words, expected",
    [
        (("--variants", "ours,kernel"), "did you mean kernels?"),
        (("--recipe", "tiy"), "did you mean toy?"),
        (("--steps", 0), "--steps 0"),
        (("--lengths", "short"), "--lengths short"),
        (("--layers", 99), "--layers 99"),
        (("--layers", 2), "--layers 2: too small for lora_targets attention, mlp; give 5 or more"),
        (("--variants", ", ,"), "--variants ', ,': names nothing"),
        (("--ablation", "--variants", "plain"), "plain has none of the levers"),
        (("--ablation", "--levers", "graphs"), "--levers graphs: there is no such lever"),
        (("--ablation", "--levers", ","), "--levers ',': names nothing"),
        (("--levers", "step"), "goes with --ablation"),
        (("-p", "data", "none.jsonl"), "none.jsonl"),
        (("-p", "lora_targets", "gate_proj"), "gate_proj"),
        (("--layers", 3, "-p", "lora_targets", "gate_proj"), "gate_proj matches nothing"),
    ],
)
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
    monkeypatch.setattr("medmcqa_lora.bench.run.sys.executable", "/bin/false")
    found = run_variant(load_recipe("toy"), "ours", Workload(), tmp_path / "log")
    assert found == {"failed": "the process ended with 1: it printed nothing"}


def test_parameters_of_the_30b_model():
    model = model_structure("nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-Base-BF16")
    blocks, head = passed_parameters(model)
    c = json.loads(shipped_file("assets/nemotron_nano_config.json").read_text())
    h, pattern = c["hidden_size"], c["hybrid_override_pattern"]
    inner = c["mamba_num_heads"] * c["mamba_head_dim"]
    mamba = (
        h * (2 * inner + 2 * c["n_groups"] * c["ssm_state_size"] + c["mamba_num_heads"]) + inner * h
    )
    attention = h * c["head_dim"] * (2 * c["num_attention_heads"] + 2 * c["num_key_value_heads"])
    moe = (
        2
        * h
        * (
            c["num_experts_per_tok"] * c["moe_intermediate_size"]
            + c["moe_shared_expert_intermediate_size"]
        )
        + h * c["n_routed_experts"]
    )
    assert (
        blocks
        == pattern.count("M") * mamba + pattern.count("*") * attention + pattern.count("E") * moe
    )
    assert round(blocks / 1e9, 3) == 2.874 and head == h * c["vocab_size"]


def test_cut_30b_model(tmp_path):
    recipe = load_recipe("nemotron_nano", {"tokenizer": "toy-nemotron-h"})
    cut = cut_model(recipe, 6, tmp_path)
    kinds = {m.kind for m in list_matrices(model_structure(cut.model))}
    assert kinds == {"mamba", "moe", "attention", "other"} and cut.tokenizer == "toy-nemotron-h"


def test_lengths_are_those_of_real_questions(validation):
    """The shipped histogram's are SmolLM2's tokens; another tokenizer's have another mean, and a
    similar spread.
    """
    from medmcqa_lora.data.questions import load_questions
    from medmcqa_lora.data.tokens import encode_questions, sample_tokenizer

    questions = load_questions(str(validation)).questions
    some = random.Random(0).sample(questions, 500)
    encoded = encode_questions(some, sample_tokenizer(), load_recipe("toy", {"max_length": "2048"}))
    own = make_lengths(Workload(lengths="data"), [len(r["input_ids"]) for r in encoded.rows], 0)
    shipped_lengths = make_lengths(Workload(), [], 0)
    assert len(shipped_lengths) == len(questions) == 4183
    assert examples_per_step(VARIANTS["ours"], shipped_lengths, 16384) == round(
        16384 * 4183 / 238508
    )

    def relative_spread(lengths):
        mean = sum(lengths) / len(lengths)
        return (sum((n - mean) ** 2 for n in lengths) / len(lengths)) ** 0.5 / mean

    assert abs(relative_spread(own) / relative_spread(shipped_lengths) - 1) < 0.25


def test_figure_has_a_bar_a_variant():
    def result(name, ms):
        return dict(
            variant=name,
            training=dict(
                tokens=dict(median=100),
                profile=dict(
                    tokens=100,
                    kinds={"dense GEMM": dict(ms=ms, calls=1), "other": dict(ms=1.0, calls=1)},
                ),
            ),
        )

    ax = plot_kernels([result("a", 3.0), result("b", 5.0)]).axes[0]
    assert [t.get_text() for t in ax.get_yticklabels()] == ["a", "b"]
    assert [[round(p.get_width(), 6) for p in c] for c in ax.containers] == [
        [30.0, 50.0],
        [10.0, 10.0],
    ]


def test_variants_are_recipes():
    keys = set(vars(load_recipe("toy")))
    for v in VARIANTS.values():
        assert isinstance(v, Variant) and set(v.changes) <= keys and v.what


# Levers.


@pytest.fixture(scope="module")
def ready(tmp_path_factory):
    """A toy with LoRA that does something, and with room behind in_proj as on a GPU."""
    s = prepare(
        load_recipe("toy"),
        "ours",
        Workload(tokens=256, steps=1, warmup=1),
        tmp_path_factory.mktemp("toy"),
    )
    torch.manual_seed(0)
    for n, p in s.model.named_parameters():
        if "lora_B" in n:
            torch.nn.init.normal_(p, std=0.05)
    for n, m in s.model.named_modules():
        if n.endswith("in_proj.base_layer"):
            layers.pad_weight(m, 8)
    return s


def inside(s) -> dict:
    """Everything that a module holds, two levels deep; what holds it stays the same object."""
    return {
        n: {
            k: {i: id(x) for i, x in v.items()} if isinstance(v, dict) else id(v)
            for k, v in vars(m).items()
        }
        for n, m in s.model.named_modules()
    }


def forward(s) -> tuple:
    """Logits and LoRA's gradients of a packed row."""
    row = packing.packing_collator()([dict(r) for r in s.rows[:3]])
    s.model.zero_grad()
    out = s.model(**row, use_cache=False)
    out.loss.backward()
    return [out.logits.detach(), *(p.grad.clone() for p in s.model.parameters() if p.requires_grad)]


FUNCTIONS = (
    (trainer, "can_record"),
    (trainer, "can_use_head_loss"),
    (trainer, "row_multiple"),
    (step, "supervised"),
    (mamba, "LONGEST"),
    (packing, "ROW_MULTIPLE"),
    (packing, "can_use_varlen"),
    (operations, "use_triton"),
)
CUDA, CAN_USE_VARLEN = torch.device("cuda"), packing.can_use_varlen
GONE = {  # lever -> whether it is, of a prepared model and its base
    "nothing": lambda s: not_gone(s),
    "recording": lambda s: (
        not trainer.can_record(replace(s.recipe, gradient_checkpointing=False, lora_dropout=0.0), 1)
    ),
    "blocks": lambda s: (
        not any(
            layers.is_fused(m) for m in s.model.modules() if type(m).__name__ == "NemotronHBlock"
        )
        and any(map(layers.is_fused, s.model.modules()))
    ),
    "fused": lambda s: not any(map(layers.is_fused, s.model.modules())),
    "triton": lambda s: (
        not operations.use_triton(SimpleNamespace(is_cuda=True, dtype=torch.bfloat16))
    ),
    "scan": lambda s: not mamba.has_own_scan(s.recipe) and mamba.LONGEST == 0,
    "room": lambda s: (
        not any(layers.row_padding(m) for m in s.model.modules() if isinstance(m, torch.nn.Linear))
    ),
    "filled": lambda s: packing.row_multiple(CUDA) == trainer.row_multiple(CUDA) == 1,
    "positions": lambda s: (
        int((step.RowCollator()([dict(r) for r in s.rows[:3]])["targets"] >= 0).sum()) == 3
        and len(step.supervised(torch.full((1, 257), -100))[0]) == 256
    ),
    "step": lambda s: not trainer.can_use_head_loss(s.model.get_base_model()),
    "experts": lambda s: not any(map(is_grouped, s.model.modules())),
    "attention": lambda s: (
        packing.can_use_varlen is not CAN_USE_VARLEN
        and not packing.can_use_varlen(s.model)
        and GONE["recording"](s)
    ),
}


def not_gone(s) -> bool:
    """With all levers in place, on a machine that says it has a GPU."""
    return (
        any(map(layers.is_fused, s.model.modules()))
        and any(map(is_grouped, s.model.modules()))
        and any(layers.row_padding(m) for m in s.model.modules() if isinstance(m, torch.nn.Linear))
        and trainer.can_use_head_loss(s.model.get_base_model())
        and packing.row_multiple(CUDA) > 1
        and mamba.LONGEST > 0
    )


def test_levers_are_all_tested():
    assert set(GONE) == set(LEVERS) and all(
        n in LEVERS for lever in LEVERS.values() for n in lever.takes
    )


@pytest.mark.parametrize("name", LEVERS)
def test_lever_is_taken_and_put_back(name, ready, monkeypatch):
    with monkeypatch.context() as m:
        m.setattr(torch.cuda, "is_available", lambda: True)
        assert not GONE["recording"](ready)
    held, functions, numbers = inside(ready), [getattr(*f) for f in FUNCTIONS], forward(ready)
    with pytest.raises(KeyError, match="in the middle"):
        with without_lever(ready.model, name):
            with monkeypatch.context() as m:
                if name in ("recording", "attention"):
                    m.setattr(torch.cuda, "is_available", lambda: True)
                assert GONE[name](ready)
            if name not in (
                "triton",
                "scan",
                "attention",
                "filled",
                "recording",
            ):  # these need a GPU to make a difference
                assert all(
                    torch.allclose(a, b, rtol=1e-3, atol=1e-5)
                    for a, b in zip(forward(ready), numbers)
                )
            raise KeyError("in the middle")
    assert inside(ready) == held and all(
        a is b for a, b in zip([getattr(*f) for f in FUNCTIONS], functions)
    )
    assert all(torch.equal(a, b) for a, b in zip(forward(ready), numbers)) and not_gone(ready)


def test_nothing_is_left_of_a_step_that_failed(ready, tmp_path, monkeypatch):
    """Out of memory in the second step of one measurement; the next has the model as it was, and
    no step is alive, nor what it recorded.
    """
    alive, held, numbers, real = [], inside(ready), forward(ready), step.Step.__call__

    def watched(self, *args, **kwargs):
        alive.append(weakref.ref(self))
        return real(self, *args, **kwargs)

    def limited(self, *args, **kwargs):
        if alive[-1]() is self:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB. And more")
        return watched(self, *args, **kwargs)

    monkeypatch.setattr(step.Step, "__call__", watched)
    monkeypatch.setitem(
        LEVERS,
        "room",
        replace(
            LEVERS["room"], away=lambda model: attribute_replaced(step.Step, "__call__", limited)
        ),
    )
    ablate(ready, Workload(tokens=256, steps=1, warmup=1), ["room"], tmp_path / "lines.jsonl")
    first, failed, last = read_lines(tmp_path / "lines.jsonl")
    assert failed["failed"] == "out of memory: CUDA out of memory" and "training" not in failed
    assert (
        first["training"]["loss"] == last["training"]["loss"]
        and first["training"]["tokens"] == last["training"]["tokens"]
    )
    assert len(alive) == 3 + 1 + 3 and not any(ref() for ref in alive)
    assert inside(ready) == held and all(torch.equal(a, b) for a, b in zip(forward(ready), numbers))


@pytest.fixture(scope="module")
def ablated(tmp_path_factory):
    from medmcqa_lora.cli import main

    out = tmp_path_factory.mktemp("ablation") / "out"
    with pytest.raises(SystemExit) as ended:
        main([str(w) for w in ("bench", "--ablation", *SMALL, "--out", out)])
    assert ended.value.code == 0
    return out, read_lines(out / "results.jsonl")


def test_ablation_by_the_command(ablated):
    out, found = ablated
    assert [r["ablation"] for r in found] == ["nothing", *list(LEVERS)[1:], "nothing"]
    assert all(
        r["variant"] == "ours"
        and r["commit"]
        and r["versions"]["torch"]
        and r["hardware"]["cores"]
        and r["recipe"]["fast"] == "auto"
        for r in found
    )
    ran, absent = (
        [r for r in found if "training" in r],
        {r["ablation"]: r["absent"] for r in found if "absent" in r},
    )
    assert len(ran) + len(absent) == len(found) and all(
        r["what"] == LEVERS[r["ablation"]].what for r in found
    )
    if not torch.cuda.is_available():
        assert (
            set(absent) == {"recording", "triton", "scan", "room", "filled", "attention"}
            and "GPU" in absent["recording"]
        )
    losses = [r["training"]["loss"] for r in ran]
    assert losses[0] == losses[-1] and all(math.isclose(x, losses[0], rel_tol=1e-4) for x in losses)
    assert len({r["training"]["tokens"]["median"] for r in ran}) == 1 and all(
        r["training"]["seconds"]["n"] == 3 for r in ran
    )


def test_ablation_table_and_figure(ablated):
    out, found = ablated
    table = (out / "ablation.md").read_text()
    assert (
        table.count("\n| ours | ") == len(found)
        and "| to all levers |" in table
        and "not applicable: " in table
    )
    assert (out / "ours-ablation.png").stat().st_size > 5000 and "without blocks" in (
        out / "ours.log"
    ).read_text()


def test_ablation_of_a_killed_process(cli, tmp_path, monkeypatch):
    monkeypatch.setattr("medmcqa_lora.bench.run.sys.executable", "/bin/false")
    code, _, err = cli("bench", "--ablation", "--out", tmp_path / "out")
    assert (
        code == 1
        and err.count("\n") == 1
        and "nothing was measured: ours: the process ended with 1" in err
    )
    assert [r["ablation"] for r in read_lines(tmp_path / "out/results.jsonl")] == ["the others"]
