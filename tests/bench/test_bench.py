"""`medmcqa-lora bench` at toy size: a process per variant, results that add up, failures as rows;
levers that are taken away and put back.
"""

import json
import math
import random
import re
import statistics
import weakref
from dataclasses import replace
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
from conftest import ALL
from helpers import GROUPS

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


def run_bench(*words) -> None:
    """`medmcqa-lora bench` in this process; it succeeds."""
    from medmcqa_lora.cli import main

    with pytest.raises(SystemExit) as ended:
        main(["bench", *map(str, words)])
    assert ended.value.code == 0


@pytest.fixture(scope="module")
def benched(tmp_path_factory):
    """Two variants that run, and one that can't: unsloth needs bfloat16 and a GPU."""
    out = tmp_path_factory.mktemp("bench") / "out"
    targets = ("-p", "lora_targets", "attention,mamba_in,shared_experts")
    variants = ("--variants", "plain,ours,unsloth")
    run_bench(*variants, *SMALL, "--layers", 4, *targets, "--out", out)
    return out, {r["variant"]: r for r in read_lines(out / "results.jsonl")}


def check_circumstances(result: dict) -> None:
    """What a result says of its run."""
    assert result["commit"] and result["versions"]["torch"] and result["hardware"]["cores"]


def test_record(benched):
    _, found = benched
    assert list(found) == ["plain", "ours", "unsloth"]
    for result in (found["plain"], found["ours"]):
        check_circumstances(result)
        assert result["seed"] == 42 and result["load"]["steps"] == 3
        training, scoring = result["training"], result["scoring"]
        assert training["seconds"]["n"] == scoring["seconds"]["n"] == 3
        assert training["tokens_per_s"]["median"] > 0 and math.isfinite(training["loss"])


def test_profile_without_gpu(benched):
    _, found = benched
    for name in ("plain", "ours"):
        training = found[name]["training"]
        kinds = training["profile"]["kinds"]
        assert training["share_of_peak"] is None and training["profile"]["calls"] is None
        assert set(kinds) <= {*KINDS, "other"} and kinds["dense GEMM"]["ms"] > 0


def test_parts_of_memory_add_up(benched):
    _, found = benched
    for name in ("plain", "ours"):
        memory = found[name]["training"]["memory_gib"]
        peak, weights, activations = (memory[k] for k in ("peak", "weights", "activations"))
        assert abs(peak - weights - memory["adapter_gradients_optimizer"] - activations) < 1e-4
        assert activations > 0


def test_padding_and_packing(benched):
    _, found = benched
    plain, ours = (found[name]["training"] for name in ("plain", "ours"))
    assert plain["examples"] == 8 and plain["waste"] > 0.1
    assert ours["waste"] == 0 and abs(ours["tokens"]["median"] / 256 - 1) < 0.5


def test_only_plain_is_plain(benched):
    _, found = benched
    plain, ours = found["plain"], found["ours"]
    assert "grouped products in 0 of 1" in plain["kernels"][1]
    assert "grouped products in 1 of 1" in ours["kernels"][1]
    assert plain["recipe"]["gradient_checkpointing"]
    assert not ours["recipe"]["gradient_checkpointing"]
    assert plain["parameters_passed"] == ours["parameters_passed"]


def test_failure_is_a_row(benched):
    out, found = benched
    reason = found["unsloth"]["failed"]
    assert "unsloth" in reason and "\n" not in reason
    table = (out / "table.md").read_text()
    assert re.search(r"\| unsloth +\| not run: ", table) and "| plain " in table
    assert "dense GEMM" in table
    assert (out / "kernels.png").stat().st_size > 5000
    assert "Traceback" in (out / "unsloth.log").read_text()


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
    assert (stored.weights, stored.backend) == ("pretrained", "hf")
    assert stored.tokenizer == "toy-nemotron-h"
    files = {p.name for p in (tmp_path / "random").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= files
    found, made = (apply_fast_parts(load_model(r), r).state_dict() for r in (stored, recipe))
    assert found.keys() == made.keys()
    assert all(v.float().equal(made[k].float()) for k, v in found.items())


@pytest.mark.parametrize("change, expected", [
    (dict(dtype="float32"), "float32 is not what unsloth trains in"),
    (dict(dtype="bfloat16", lora_r_experts=2), "is not passed on by unsloth"),
    (dict(dtype="bfloat16"), "backend = unsloth: needs a GPU"),
])
def test_unsloth_is_refused_before_weights_are_written(change, expected, tmp_path, monkeypatch):
    def written(*args): pytest.fail("weights were written")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("medmcqa_lora.bench.measure.random_files", written)
    cut = cut_model(load_recipe("toy"), 4, tmp_path)
    recipe = replace(cut, lora_targets=GROUPS, **change)
    with pytest.raises(ValueError, match=expected):
        measure(recipe, "unsloth", Workload(tokens=256), tmp_path)


def test_no_disk_space_for_random_weights(tmp_path):
    nano = "nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-Base-BF16"
    recipe = Recipe(model=nano, weights="random", dtype="bfloat16")
    nearly_full = patch("shutil.disk_usage", return_value=SimpleNamespace(free=2**30))
    with nearly_full, pytest.raises(ValueError) as e:
        save_random(recipe, tmp_path / "weights")
    assert str(e.value) == (
        f"random weights in files need 58.8 GiB and the disk of {tmp_path} has 1 GiB free; "
        "set TMPDIR to a folder on a larger one"
    )


@pytest.mark.parametrize("words, expected", [
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
    monkeypatch.setattr("sys.executable", "/bin/false")
    found = run_variant(load_recipe("toy"), "ours", Workload(), tmp_path / "log")
    assert found == {"failed": "the process ended with 1: it printed nothing"}


def parameters_by_hand(config: dict) -> dict[str, int]:
    """Matrix parameters that a token passes, by the kind of block."""
    size = SimpleNamespace(**config)
    hidden, inner = size.hidden_size, size.mamba_num_heads * size.mamba_head_dim
    in_proj = 2 * inner + 2 * size.n_groups * size.ssm_state_size + size.mamba_num_heads
    heads = 2 * size.num_attention_heads + 2 * size.num_key_value_heads
    routed = size.num_experts_per_tok * size.moe_intermediate_size
    experts = routed + size.moe_shared_expert_intermediate_size
    return {
        "M": hidden * in_proj + inner * hidden,
        "*": hidden * size.head_dim * heads,
        "E": 2 * hidden * experts + hidden * size.n_routed_experts,
    }


def test_parameters_of_the_30b_model():
    model = model_structure("nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-Base-BF16")
    blocks, head = passed_parameters(model)
    config = json.loads(shipped_file("assets/nemotron_nano_config.json").read_text())
    pattern = config["hybrid_override_pattern"]
    by_kind = parameters_by_hand(config)
    assert blocks == sum(pattern.count(kind) * n for kind, n in by_kind.items())
    assert round(blocks / 1e9, 3) == 2.874
    assert head == config["hidden_size"] * config["vocab_size"]


def test_cut_30b_model(tmp_path):
    recipe = load_recipe("nemotron_nano", {"tokenizer": "toy-nemotron-h"})
    cut = cut_model(recipe, 6, tmp_path)
    kinds = {m.kind for m in list_matrices(model_structure(cut.model))}
    assert kinds == {"mamba", "moe", "attention", "other"} and cut.tokenizer == "toy-nemotron-h"


def relative_deviation(lengths: list[int]) -> float:
    """The standard deviation over the mean."""
    return statistics.pstdev(lengths) / statistics.mean(lengths)


def test_lengths_are_those_of_real_questions(validation):
    """The shipped histogram's are SmolLM2's tokens; another tokenizer's have another mean, and a
    similar relative deviation.
    """
    from medmcqa_lora.data.questions import load_questions
    from medmcqa_lora.data.tokens import encode_questions, sample_tokenizer

    questions = load_questions(str(validation)).questions
    some = random.Random(0).sample(questions, 500)
    encoded = encode_questions(some, sample_tokenizer(), load_recipe("toy", {"max_length": "2048"}))
    own_lengths = [len(r["input_ids"]) for r in encoded.rows]
    own = make_lengths(Workload(lengths="data"), own_lengths, 0)
    shipped_lengths = make_lengths(Workload(), [], 0)
    assert len(shipped_lengths) == len(questions) == 4183
    examples = examples_per_step(VARIANTS["ours"], shipped_lengths, 16384)
    assert examples == round(16384 * 4183 / 238508)
    assert abs(relative_deviation(own) / relative_deviation(shipped_lengths) - 1) < 0.25


def test_figure_has_a_bar_per_variant():
    def result(name, ms):
        kinds = {"dense GEMM": dict(ms=ms, calls=1), "other": dict(ms=1.0, calls=1)}
        profile = dict(tokens=100, kinds=kinds)
        return dict(variant=name, training=dict(tokens=dict(median=100), profile=profile))

    ax = plot_kernels([result("a", 3.0), result("b", 5.0)]).axes[0]
    assert [t.get_text() for t in ax.get_yticklabels()] == ["a", "b"]
    widths = [[round(bar.get_width(), 6) for bar in bars] for bars in ax.containers]
    assert widths == [[30.0, 50.0], [10.0, 10.0]]


def test_variants_are_recipes():
    keys = set(vars(load_recipe("toy")))
    for v in VARIANTS.values():
        assert isinstance(v, Variant) and set(v.changes) <= keys and v.what


# ---- levers


@pytest.fixture(scope="module")
def ready(tmp_path_factory):
    """A toy with LoRA that does something, and with spare columns after in_proj as on a GPU."""
    load = Workload(tokens=256, steps=1, warmup=1)
    prepared = prepare(load_recipe("toy"), "ours", load, tmp_path_factory.mktemp("toy"))
    torch.manual_seed(0)
    for name, p in prepared.model.named_parameters():
        if "lora_B" in name: torch.nn.init.normal_(p, std=0.05)
    for name, module in prepared.model.named_modules():
        if name.endswith("in_proj.base_layer"): layers.pad_weight(module, 8)
    return prepared


def identities(value) -> object:
    """The identity of a value; of a dictionary, those of its values."""
    if isinstance(value, dict): return {k: id(x) for k, x in value.items()}
    return id(value)


def inside(prepared) -> dict:
    """Everything that a module holds, two levels deep; what holds it stays the same object."""
    modules = prepared.model.named_modules()
    return {name: {k: identities(v) for k, v in vars(m).items()} for name, m in modules}


def forward(prepared) -> list:
    """Logits and LoRA's gradients of a packed row."""
    model = prepared.model
    model.zero_grad()
    out = model(**packing.packing_collator()(first_rows(prepared)), use_cache=False)
    out.loss.backward()
    gradients = [p.grad.clone() for p in model.parameters() if p.requires_grad]
    return [out.logits.detach(), *gradients]


def first_rows(prepared) -> list[dict]:
    return [dict(r) for r in prepared.rows[:3]]


FUNCTIONS = (  # what levers replace outside of the model
    (trainer, "can_record"), (trainer, "can_use_head_loss"), (trainer, "row_multiple"),
    (step, "supervised_positions"), (mamba, "LONGEST_SCAN"),
    (packing, "ROW_MULTIPLE"), (packing, "can_use_varlen"), (operations, "use_triton"),
)
CUDA, CAN_USE_VARLEN = torch.device("cuda"), packing.can_use_varlen


def fused_modules(s) -> list:
    return [m for m in s.model.modules() if layers.is_fused(m)]


def has_spare_columns(s) -> bool:
    linear = [m for m in s.model.modules() if isinstance(m, torch.nn.Linear)]
    return any(layers.row_padding(m) for m in linear)


def recording_is_gone(s) -> bool:
    recordable = replace(s.recipe, gradient_checkpointing=False, lora_dropout=0.0)
    return not trainer.can_record(recordable, 1)


def blocks_are_gone(s) -> bool:
    kinds = [type(m).__name__ for m in fused_modules(s)]
    return "NemotronHBlock" not in kinds and bool(kinds)


def triton_is_gone(s) -> bool:
    return not operations.use_triton(SimpleNamespace(is_cuda=True, dtype=torch.bfloat16))


def scan_is_gone(s) -> bool:
    return not mamba.has_own_scan(s.recipe) and mamba.LONGEST_SCAN == 0


def filled_is_gone(s) -> bool:
    return packing.row_multiple(CUDA) == trainer.row_multiple(CUDA) == 1


def positions_are_gone(s) -> bool:
    """The last token of each example is supervised, and no other is computed."""
    targets = step.RowCollator()(first_rows(s))["targets"]
    none_supervised = torch.full((1, 257), -100)
    places = step.supervised_positions(none_supervised)[0]
    return int((targets >= 0).sum()) == 3 and len(places) == 256


def attention_is_gone(s) -> bool:
    replaced = packing.can_use_varlen is not CAN_USE_VARLEN
    return replaced and not packing.can_use_varlen(s.model) and recording_is_gone(s)


def nothing_is_gone(s) -> bool:
    """With all levers in place, on a machine that says it has a GPU."""
    in_model = fused_modules(s) and any(map(is_grouped, s.model.modules())) and has_spare_columns(s)
    head_loss = trainer.can_use_head_loss(s.model.get_base_model())
    in_rows = packing.row_multiple(CUDA) > 1 and mamba.LONGEST_SCAN > 0
    return bool(in_model and head_loss and in_rows)


GONE = {  # lever -> whether it is, of a prepared model and its base
    "nothing": nothing_is_gone,
    "recording": recording_is_gone,
    "blocks": blocks_are_gone,
    "fused": lambda s: not fused_modules(s),
    "triton": triton_is_gone,
    "scan": scan_is_gone,
    "room": lambda s: not has_spare_columns(s),
    "filled": filled_is_gone,
    "positions": positions_are_gone,
    "step": lambda s: not trainer.can_use_head_loss(s.model.get_base_model()),
    "experts": lambda s: not any(map(is_grouped, s.model.modules())),
    "attention": attention_is_gone,
}
NEEDS_GPU = ("triton", "scan", "attention", "filled", "recording")  # to make a difference


def test_levers_are_all_tested():
    assert set(GONE) == set(LEVERS)
    assert all(name in LEVERS for lever in LEVERS.values() for name in lever.takes)


def all_equal(a: list, b: list) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b))


def check_taken(name: str, prepared, numbers: list, monkeypatch) -> None:
    """Inside a lever's context: it is gone, and the numbers are the same but for rounding."""
    with monkeypatch.context() as m:
        if name in ("recording", "attention"): m.setattr(torch.cuda, "is_available", lambda: True)
        assert GONE[name](prepared)
    if name in NEEDS_GPU: return
    pairs = zip(forward(prepared), numbers)
    assert all(torch.allclose(a, b, rtol=1e-3, atol=1e-5) for a, b in pairs)


@pytest.mark.parametrize("name", LEVERS)
def test_lever_is_taken_and_put_back(name, ready, monkeypatch):
    with monkeypatch.context() as m:
        m.setattr(torch.cuda, "is_available", lambda: True)
        assert not GONE["recording"](ready)
    held, functions = inside(ready), [getattr(*f) for f in FUNCTIONS]
    numbers = forward(ready)
    with pytest.raises(KeyError, match="in the middle"), without_lever(ready.model, name):
        check_taken(name, ready, numbers, monkeypatch)
        raise KeyError("in the middle")
    assert inside(ready) == held
    assert all(getattr(*f) is before for f, before in zip(FUNCTIONS, functions))
    assert all_equal(forward(ready), numbers) and nothing_is_gone(ready)


def test_nothing_is_left_of_a_step_that_failed(ready, tmp_path, monkeypatch):
    """Out of memory in the second step of one measurement; the next has the model as it was, and
    no step is alive, nor what it recorded.
    """
    held, numbers = inside(ready), forward(ready)
    alive, real = [], step.Step.__call__

    def watched(self, *args, **kwargs):
        alive.append(weakref.ref(self))
        return real(self, *args, **kwargs)

    def limited(self, *args, **kwargs):
        if alive[-1]() is self:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB. And more")
        return watched(self, *args, **kwargs)

    def without_room(model): return attribute_replaced(step.Step, "__call__", limited)

    monkeypatch.setattr(step.Step, "__call__", watched)
    monkeypatch.setitem(LEVERS, "room", replace(LEVERS["room"], away=without_room))
    lines = tmp_path / "lines.jsonl"
    ablate(ready, Workload(tokens=256, steps=1, warmup=1), ["room"], lines)
    first, failed, last = read_lines(lines)
    assert failed["failed"] == "out of memory: CUDA out of memory" and "training" not in failed
    assert first["training"]["loss"] == last["training"]["loss"]
    assert first["training"]["tokens"] == last["training"]["tokens"]
    assert len(alive) == 3 + 1 + 3 and not any(ref() for ref in alive)
    assert inside(ready) == held and all_equal(forward(ready), numbers)


@pytest.fixture(scope="module")
def ablated(tmp_path_factory):
    out = tmp_path_factory.mktemp("ablation") / "out"
    run_bench("--ablation", *SMALL, "--out", out)
    return out, read_lines(out / "results.jsonl")


def test_ablation_by_the_command(ablated):
    _, found = ablated
    assert [r["ablation"] for r in found] == ["nothing", *list(LEVERS)[1:], "nothing"]
    for result in found:
        check_circumstances(result)
        assert result["variant"] == "ours" and result["recipe"]["fast"] == "auto"
        assert result["what"] == LEVERS[result["ablation"]].what


def test_ablation_measures_or_says_why_not(ablated):
    _, found = ablated
    ran = [r for r in found if "training" in r]
    absent = {r["ablation"]: r["absent"] for r in found if "absent" in r}
    assert len(ran) + len(absent) == len(found)
    if not torch.cuda.is_available():
        assert set(absent) == {"recording", "triton", "scan", "room", "filled", "attention"}
        assert "GPU" in absent["recording"]


def test_ablation_trains_the_same(ablated):
    _, found = ablated
    ran = [r["training"] for r in found if "training" in r]
    losses = [t["loss"] for t in ran]
    assert losses[0] == losses[-1]
    assert all(math.isclose(x, losses[0], rel_tol=1e-4) for x in losses)
    assert len({t["tokens"]["median"] for t in ran}) == 1
    assert all(t["seconds"]["n"] == 3 for t in ran)


def test_ablation_table_and_figure(ablated):
    out, found = ablated
    table = (out / "ablation.md").read_text()
    assert len(re.findall(r"^\| ours +\| ", table, re.MULTILINE)) == len(found)
    assert re.search(r"\| to all levers +\|", table) and "not applicable: " in table
    assert (out / "ours-ablation.png").stat().st_size > 5000
    assert "without blocks" in (out / "ours.log").read_text()


def test_ablation_of_a_killed_process(cli, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.executable", "/bin/false")
    code, _, err = cli("bench", "--ablation", "--out", tmp_path / "out")
    assert code == 1 and err.count("\n") == 1
    assert "nothing was measured: ours: the process ended with 1" in err
    assert [r["ablation"] for r in read_lines(tmp_path / "out/results.jsonl")] == ["the others"]
