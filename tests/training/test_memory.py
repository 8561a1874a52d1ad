"""Predicted memory against torch's allocations, the shipped table, the plan of the 30B model."""
import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, sampled
from helpers import allocated_on_cpu
from transformers import LlamaConfig, LlamaForCausalLM, NemotronHConfig, NemotronHForCausalLM

from medmcqa_lora.core.files import shipped_file
from medmcqa_lora.core.recipe import Recipe
from medmcqa_lora.core.recipe_files import load_recipe
from medmcqa_lora.fast import blocks as fast_blocks
from medmcqa_lora.fast import operations
from medmcqa_lora.fast.apply import apply_fast_parts
from medmcqa_lora.fast.experts import undo_grouped_experts, use_grouped_experts
from medmcqa_lora.fast.layers import unfuse
from medmcqa_lora.launch.plan import block_table, link_bytes, nearest_measurement, plan_time
from medmcqa_lora.launch.plan_report import describe_plan, range_in_words
from medmcqa_lora.model.checkpoint import model_structure
from medmcqa_lora.model.lora import attach_lora
from medmcqa_lora.training.memory.activations import (
    activation_peak,
    block_temporary,
    find_blocks,
)
from medmcqa_lora.training.memory.blocks import Pass
from medmcqa_lora.training.memory.fit import (
    RESERVE,
    largest_block,
    measured_pass,
    measured_rows,
    memory_parts,
    micro_batch_tokens,
    plan_memory,
    plan_pass,
    question_lengths,
)

NANO = "nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-Base-BF16"
TOTAL = 31_577_937_344  # its parameters
MIXTURE = 29_841_764_736 // 23  # those of its largest block
EIGHTH = dict(  # its widths, an eighth of them
    vocab_size=64, hidden_size=336, num_attention_heads=8, num_key_value_heads=2, head_dim=64,
    intermediate_size=320, mamba_num_heads=8, mamba_head_dim=64, ssm_state_size=64, n_groups=2,
    conv_kernel=4, chunk_size=32, n_routed_experts=16, num_experts_per_tok=6,
    moe_intermediate_size=232, moe_shared_expert_intermediate_size=464)
TARGETS = [  # pattern of blocks, targets
    ("*E*E", ["attention", "shared_experts"]),
    ("*E*E", ["routed_experts"]),
    ("M*ME", ["attention", "mamba_in", "shared_experts"]),
    ("LLL", ["attention", "mlp"]),
]


def cases():
    for pattern, targets in TARGETS:
        both = "shared_experts" in targets and "M" not in pattern
        for dtype in (torch.bfloat16, torch.float32):
            for checkpointing in (False, True):
                for grouped in (True, False) if both else (True,):
                    yield pattern, targets, dtype, checkpointing, grouped


def small_model(pattern: str):
    if "L" not in pattern:
        return NemotronHForCausalLM(NemotronHConfig(hybrid_override_pattern=pattern, **EIGHTH))
    heads = dict(num_attention_heads=9, num_key_value_heads=3)
    sizes = dict(vocab_size=64, hidden_size=288, intermediate_size=768, num_hidden_layers=3)
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads))


@pytest.mark.parametrize(
    ("pattern", "targets", "dtype", "checkpointing", "grouped"), sampled(cases(), 3))
def test_predicted_peak_is_what_is_allocated(pattern, targets, dtype, checkpointing, grouped):
    """A training step on the CPU: blocks kept, one computed again, temporaries."""
    torch.manual_seed(0)
    base = small_model(pattern).to(dtype)
    recipe = Recipe(lora_targets=targets, dtype=str(dtype).removeprefix("torch."))
    blocks = find_blocks(base, recipe)
    model = apply_fast_parts(attach_lora(base, recipe), recipe).train()
    # On the CPU the fused layers' temporaries are others than on a GPU: see the next test.
    unfuse(model)
    (use_grouped_experts if grouped else undo_grouped_experts)(model)
    if checkpointing:
        base.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    ids = torch.randint(0, 64, (2, 256))
    half = dtype == torch.bfloat16

    def step():
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            hidden = base.base_model(input_ids=ids, use_cache=False).last_hidden_state
            loss = hidden[:, -1].float().sum()
        loss.backward()

    step()  # gradients exist from now on
    p = Pass(2, 256, half=half, fused=False, grouped=grouped, wide=False)
    predicted, _ = activation_peak(
        base.config, blocks, p, checkpointing, logits=0, accumulated=True)
    assert predicted / allocated_on_cpu(step) == pytest.approx(1, abs=0.1)


def by_rows(function, out):
    """Compute a function a few rows at a time: PyTorch's operations then need no more memory than
    a kernel."""
    for start in range(0, len(out), 8):
        function(slice(start, start + 8), out)
    return out


def combine(rows, inverse, k, dtype, *more):
    def some(s, y):
        slots = rows[inverse[s.start * k : s.stop * k]].view(-1, k, rows.shape[1])
        y[s] = slots.sum(1) + sum(m[s] for m in more)

    return by_rows(some, rows.new_empty(len(inverse) // k, rows.shape[1]))


def relu2_grad(h, w, g):
    dw = None if w is None else w.new_empty(len(h))

    def some(s, g):
        _, d = operations.relu2_grad(h[s], None if w is None else w[s], g[s])
        if dw is not None:
            dw[s] = d

    return by_rows(some, g), dw


def norm_grad(g, more, x, w, rstd):
    def some(s, y):
        y[s] = operations.norm_grad(g[s], more[s], x[s], w, rstd[s])

    return by_rows(some, torch.empty_like(x))


MIXTURES = [["attention"], ["shared_experts"], ["shared_experts", "routed_experts"]]


@pytest.mark.parametrize("targets", MIXTURES)
def test_predicted_temporaries_of_a_fused_mixture(monkeypatch, targets):
    """The block's own order of operations, with its kernels' need for memory; the notebook of
    training.memory.activations compares the Mamba block's."""
    for f in (combine, relu2_grad, norm_grad):
        monkeypatch.setattr(fast_blocks, f.__name__, f)
    model = small_model("*E")
    recipe = Recipe(lora_targets=targets, dtype="float32")
    block = find_blocks(model, recipe)[1]
    tuned = apply_fast_parts(attach_lora(model, recipe), recipe).train()
    module = [m for m in tuned.modules() if type(m).__name__ == "NemotronHBlock"][1]
    p = Pass(1, 1024, half=False, whole=True)
    x = torch.randn(1, 1024, 336, requires_grad=True)
    y = fast_blocks.block_forward(module, x)
    g = torch.randn_like(y)
    stream = 4 * 336
    allocated = allocated_on_cpu(lambda: y.backward(g)) / p.tokens
    predicted = block_temporary(model.config, block, p)
    assert (predicted + 2 * stream) / (allocated + stream) == pytest.approx(1, abs=0.04)


@pytest.fixture(scope="module")
def nano():
    return model_structure(NANO)


def parameters(model) -> int:
    return sum(p.numel() for p in model.parameters())


def trainable(blocks) -> int:
    return sum(b.trainable for b in blocks)


def predicted_above(nano, blocks, p: Pass, checkpointing: bool, logits=None) -> float:
    """GiB above weights, adapter and optimizer."""
    return sum(activation_peak(nano.config, blocks, p, checkpointing, logits)) / 2**30


def test_the_30b_models_blocks(nano):
    kinds = block_table(nano).set_index("block")
    assert kinds.blocks.to_dict() == {"moe": 23, "mamba": 23, "attention": 6, "outside": 0}
    assert round(kinds.parameters.sum() / 1e9, 2) == 31.58


def test_measured_peaks_of_the_30b_model(nano):
    """Within 5% each, and what is above the weights within 17%, the package's own rows within 5%;
    the first loops have logits in bfloat16 and float32 and their softmax."""
    rows = measured_rows().dropna(subset="peak_gib")
    assert len(rows) >= 10
    for _, row in rows.iterrows():
        recipe = Recipe(lora_r=row.lora_r, lora_targets=row.lora_targets, dtype=row.dtype)
        blocks, p = find_blocks(nano, recipe), measured_pass(row)
        fixed = sum(memory_parts(parameters(nano), trainable(blocks), recipe).values())
        all_logits = 10 * p.tokens * row.logits * nano.config.vocab_size
        logits = None if row.way == "whole" else all_logits
        above = predicted_above(nano, blocks, p, row.gradient_checkpointing, logits)
        tolerance = 0.05 if isinstance(row.commit, str) else 0.17
        assert (fixed + above) / row.peak_gib == pytest.approx(1, abs=0.05), row.to_dict()
        ratio = above / (row.peak_gib - fixed)
        assert ratio == pytest.approx(1, abs=tolerance), row.to_dict()


PEAKS = ROOT / "benchmarks/results/peak.jsonl"
RECORDS = [json.loads(line) for line in PEAKS.read_text().splitlines()]
LARGE = [r for r in RECORDS if r["peak_gib"] and r["parameters"] > 1e9]


@pytest.mark.parametrize("record", LARGE, ids=lambda r: r["case"]["name"])
def test_recorded_peaks_of_the_packages_own_training(nano, record):
    """Today's formula against every recorded GPU run: the sum within 2%, what is above weights,
    adapter and optimizer within 10%."""
    case, p = record["case"], Pass(**record["way"])
    recipe = Recipe(lora_r=case["r"], lora_r_experts=case["r_experts"],
                    lora_targets=case["targets"], dtype="bfloat16")
    blocks = find_blocks(nano, recipe)[: case["layers"]]
    assert trainable(blocks) == record["trainable"]
    fixed = sum(memory_parts(record["parameters"], record["trainable"], recipe).values())
    above = predicted_above(nano, blocks, p, case["checkpointing"])
    assert (fixed + above) / record["peak_gib"] == pytest.approx(1, abs=0.02)
    assert above / (record["peak_gib"] - fixed) == pytest.approx(1, abs=0.1)


def test_all_recorded_cases_are_compared():
    assert len(RECORDS) >= 20 and all(r["peak_gib"] for r in RECORDS)


PACKED_ROW = dict(
    way="whole", rows=289, length=56, tokens=16_316, computed=16_640, gradient_checkpointing=False,
    logits=0.02, tokens_per_s=34_000, peak_gib=84.7, packed=True, commit="0000000")


def replace_table(monkeypatch, table: dict):
    """Have `measured_rows` read another table."""
    measured = SimpleNamespace(read_text=lambda: json.dumps(table))

    def other(name):
        return measured if name == "assets/measured.json" else shipped_file(name)

    monkeypatch.setattr("medmcqa_lora.training.memory.fit.shipped_file", other)


def test_a_packed_row_of_todays_code(nano, monkeypatch):
    """One H200: 289 examples, 16,316 tokens in the mean, the largest row filled up to 16,640, peak
    at 25.71 GiB above weights, adapter and optimizer; the table takes such a row."""
    recipe = replace(load_recipe("nemotron_nano"), per_device_train_batch_size=289)
    p = Pass(1, 16_640, examples=289, longest=225, whole=True, step=True)
    above = predicted_above(nano, find_blocks(nano, recipe), p, False)
    assert above == pytest.approx(25.71, rel=0.05)
    table = json.loads(shipped_file("assets/measured.json").read_text())
    others = [r for r in table["own_rows"] if r["way"] != "whole"]
    replace_table(monkeypatch, table | {"own_rows": [*others, PACKED_ROW]})
    assert measured_pass(measured_rows().iloc[-1]) == replace(p, longest=56)
    found, same = nearest_measurement(TOTAL, recipe, 16_640)
    assert same and found.way == "whole"
    assert nearest_measurement(TOTAL, replace(recipe, fast="off"), 16_640)[0].way == "kernels"
    said = plan_time(TOTAL, recipe, 182_822, 1)
    assert "measured 0.4" in said and "34,000 tokens/s" in said
    assert "289 examples in a row, 16,316 tokens" in said and "whole blocks" in said


def test_the_nearest_measurement():
    """Packed as the recipe, in its number format, and the same case only for today's code."""
    recipe = replace(load_recipe("nemotron_nano"), per_device_train_batch_size=16,
                     gradient_checkpointing=False)
    row, same = nearest_measurement(TOTAL, recipe, 16_384)
    assert same == (row.way == "whole") and row.quantization == "none"
    assert nearest_measurement(TOTAL, recipe, 4_096)[0].packed


def test_rows_are_as_a_run_makes_them(nano):
    """Filled up on a GPU; dropout and fast = off go through transformers' blocks and the latter
    through a mask."""
    recipe = replace(load_recipe("nemotron_nano"), lora_dropout=0.0)
    p = plan_pass(nano.config, recipe, packed=True)
    assert p.whole and p.step and not p.masked and p.length % 256 == 0
    assert not plan_pass(nano.config, replace(recipe, lora_dropout=0.1), packed=True).whole
    off = plan_pass(nano.config, replace(recipe, fast="off"), packed=True)
    assert off.masked and not off.whole and not off.step and off.length <= p.length


def test_the_30b_recipe_fits_into_80_gb_as_it_is(nano):
    """79.6 GiB with the reserve, at the largest packed micro-batch; without checkpointing."""
    recipe = load_recipe("nemotron_nano")
    blocks = find_blocks(nano, recipe)
    parts = memory_parts(parameters(nano), trainable(blocks), recipe)
    assert not recipe.gradient_checkpointing
    assert 60 < plan_memory(nano.config, blocks, recipe, parts)[False].sum() * RESERVE < 79.6


WAYS = ("plain", "kernels", "experts", "prototype", "whole")


def test_the_table_of_measurements_is_complete(nano):
    table = json.loads(shipped_file("assets/measured.json").read_text())
    assert table["common"]["parameters"] == parameters(nano)
    for row in measured_rows().to_dict("records"):
        assert row["way"] in WAYS and row["tokens_per_s"] > 0 and 0 < row["logits"] <= 1
        # More than the weights, and it ran on that card; NaN where only speed was measured.
        assert not row["peak_gib"] <= 59 and not row["peak_gib"] >= 141
        assert row["tokens"] <= row["computed"]
        assert row["gpu"] and row["date"] and row["source"]
        assert row["torch"] and row["transformers"]


def test_more_needs_more(nano):
    recipe = load_recipe("nemotron_nano")
    blocks = find_blocks(nano, recipe)

    def peak(p, checkpointing=False):
        return sum(activation_peak(nano.config, blocks, p, checkpointing))

    p = Pass(4, 4096)
    assert peak(p, True) < peak(p) < peak(replace(p, grouped=False)) < peak(replace(p, fused=False))
    assert peak(p) < peak(replace(p, rows=8)) and peak(p) < peak(replace(p, masked=True))
    row = Pass(1, 16_384, examples=289, longest=225)
    fused = replace(row, whole=True)
    long = replace(fused, longest=2000)  # beyond 1,024 tokens mamba_ssm's scan keeps more
    assert peak(fused) < peak(long) < peak(row)
    targets = [*recipe.lora_targets, "routed_experts"]
    routed = find_blocks(nano, replace(recipe, lora_targets=targets))
    assert trainable(routed) - trainable(blocks) == 23 * 2 * 128 * 16 * (2688 + 1856)


def test_tokens_of_a_micro_batch():
    one, many = (Recipe(per_device_train_batch_size=n) for n in (1, 64))
    lengths = question_lengths(one)
    mean = sum(k * v for k, v in lengths.items())
    assert micro_batch_tokens(one, packed=False) == (round(mean), max(lengths))
    usual, largest = micro_batch_tokens(many, packed=True)
    _, padded = micro_batch_tokens(many, packed=False)
    assert usual == round(64 * mean) and usual < largest < padded == 64 * max(lengths)


SAID = ("31.58 B parameters", "8 complete copies", "SmolLM2-135M-Instruct's tokenizer",
        "does NOT fit", "kept*", "Time: measured", "NVIDIA H200")


def test_plans_text(cli):
    """What fits and what would, in one screen, and whether the time was measured."""
    machines = ["--gpus", "8", "--gpu-memory", "62"]
    code, out, err = cli("plan", "--recipe", "nemotron_nano", *machines)
    assert code == 0 and not err
    for said in SAID:
        assert said in out
    assert len(out.splitlines()) <= 40 and max(map(len, out.splitlines())) <= 160
    code, out, _ = cli("plan", "--recipe", "nemotron_nano", "--gpu-memory", "40")
    assert code == 0 and "none" in out, "a plan is information, whatever it says"


def test_what_passes_between_gpus_by_hand(nano):
    """For 4 GPUs: copies send gradients, shards send weights, and each holds its part."""
    recipe = load_recipe("nemotron_nano")
    outside, adapter = 704_645_760, 11_359_232
    assert trainable(find_blocks(nano, recipe)) == adapter and largest_block(nano) == MIXTURE
    copies, shards = (replace(recipe, dtype="bfloat16", parallel=p) for p in ("ddp", "fsdp"))
    assert link_bytes(TOTAL, outside, adapter, copies, 4) == 68_155_392  # 3/4 of 45 MB, twice
    weights = 4 * (TOTAL - outside) + 2 * outside
    sent = 0.75 * (weights + 8 * adapter + 4 * adapter)
    assert link_bytes(TOTAL, outside, adapter, shards, 4) == sent
    parts = memory_parts(TOTAL, adapter, shards, 4, largest_block(nano))
    held = 2 * TOTAL / 4 + 4 * adapter + 2 * 2 * 29_841_764_736 / 23
    assert sum(parts.values()) == pytest.approx(held / 2**30)


def test_several_gpus_of_the_30b_model(cli):
    """The table's words for what each way needs and costs on 4 GPUs."""
    recipe = load_recipe("nemotron_nano")
    plan = ["plan", "--recipe", "nemotron_nano"]
    out = cli(*plan, "--gpus", "4", "--gpu-memory", "40")[1]
    lines = out.splitlines()[-6:]
    shards = {line[:50].strip(): line[50:].split("  ")[-1].strip() for line in lines}
    assert "does NOT fit" in lines[2] and shards["into 40 GiB, with 5% to spare"] == "fits"
    assert "65.00 MiB, 0.15 ms" in out
    assert shards["reaches each GPU in a step, at 450 and 180 GB/s"].startswith("87.")
    tokens, _ = micro_batch_tokens(recipe, True)
    row, _ = nearest_measurement(TOTAL, recipe, tokens)
    seconds = max(tokens, row.tokens) / row.tokens_per_s
    sharded = replace(recipe, dtype="bfloat16", parallel="fsdp")
    transfer = link_bytes(TOTAL, 704_645_760, 11_359_232, sharded, 4) / 180e9
    words = shards["tokens/s, from those of one GPU"].split(" to ")
    low, high = (int(n.replace(",", "")) for n in words)
    assert low == pytest.approx(4 * tokens / (seconds + transfer), rel=1e-3)
    assert high == pytest.approx(4 * tokens / max(seconds, transfer), rel=1e-3)
    assert "a process each" not in cli(*plan)[1]
    assert "4 shares" in cli(*plan, "--gpus", "4", "-p", "parallel", "fsdp")[1]


def test_a_model_never_measured_gets_no_time(cli):
    code, out, _ = cli("plan", "--recipe", "toy")
    assert code == 0 and "never measured" in out and "tokens/s" not in out


@pytest.mark.parametrize("targets", [
    ["attention"], ["routed_experts"],
    ["attention", "mamba_in", "shared_experts", "routed_experts"],
])
def test_every_target_group_has_a_plan(targets):
    recipe = Recipe(model=NANO, data="openlifescienceai/medmcqa", dtype="bfloat16",
                    lora_targets=targets, lora_r_experts=8)
    text = describe_plan(recipe)
    assert all(t in text for t in targets) and "not known" not in text


def test_shards_gather_blocks_and_unsloth_is_not_known():
    recipe = load_recipe("nemotron_nano")
    assert "gathered blocks" in describe_plan(replace(recipe, parallel="fsdp"), gpus=4)
    text = describe_plan(replace(recipe, backend="unsloth", fast="auto"), gpu_memory=40)
    assert "not known" in text and "does NOT fit" in text


def test_ranges_in_words():
    assert range_in_words(1.25, 3.5, ".1f") == "1.2 to 3.5"
    assert range_in_words(99.5, 100.0) == "100"
