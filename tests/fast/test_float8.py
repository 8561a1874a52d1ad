"""Frozen matrices of 8-bit floats: the same run, a bounded distance away; and the GPU's products beside what the 8 bits stand for."""
import random
from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
from conftest import ALL

from medmcqa_lora.fast import experts, float8
from medmcqa_lora.fast.blocks import in_float8, wide_weights
from medmcqa_lora.data.leakage import load_pair
from medmcqa_lora.data.tokens import encode_questions
from medmcqa_lora.fast.experts import expert_product
from medmcqa_lora.core.files import read_lines
from medmcqa_lora.fast.float8 import Weight8, dequantise, product, quantise, quantise_matrix, weight_of, weights8
from medmcqa_lora.fast.apply import apply_fast_parts, describe_kernels
from medmcqa_lora.model.resolve import load_tokenizer
from medmcqa_lora.model.load import check_backend, load_model
from medmcqa_lora.model.lora import attach_lora
from medmcqa_lora.model.adapter import load_adapter, save_adapter
from medmcqa_lora.core.recipe import Recipe, RecipeError, check_recipe
from medmcqa_lora.training.trainer import make_trainer, train

GPU = torch.cuda.is_available()
pytestmark = pytest.mark.usefixtures("one_thread")
needs_hopper = pytest.mark.skipif(not GPU or torch.cuda.get_device_capability() < (9, 0), reason="8-bit products need a Hopper GPU")


def recipe(**settings) -> Recipe:
    chosen = dict(model="toy-nemotron-h", lora_r=4, lora_alpha=8, lora_targets=["attention", "mamba_in", "shared_experts"], dtype="bfloat16" if GPU else "float32", learning_rate=5e-3)
    return Recipe(**chosen | settings)


def train_toy(folder, **settings) -> tuple:
    """A model after eight steps, its losses."""
    chosen = recipe(max_steps=8, **settings)
    tokenizer, model = load_tokenizer(chosen), apply_fast_parts(attach_lora(load_model(chosen), chosen), chosen)
    encoded = encode_questions(load_pair(chosen)[0].questions, tokenizer, chosen)
    folder.mkdir()
    trainer = make_trainer(model, tokenizer, encoded, chosen, folder, packed=True)
    train(trainer, folder)
    return model, [m["loss"] for m in read_lines(folder / "metrics.jsonl")]


@pytest.mark.parametrize("targets", [["attention", "mamba_in", "shared_experts"], ["routed_experts"]])
def test_training_goes_the_same_way(tmp_path, targets):
    model, narrow = train_toy(tmp_path / "narrow", quantization="fp8", lora_targets=targets)
    _, wide = train_toy(tmp_path / "wide", lora_targets=targets)
    assert len(list(weights8(model))) > 10 and narrow != wide
    assert all(abs(a - b) < 0.05 * b for a, b in zip(narrow, wide)), (narrow, wide)
    assert narrow[-1] < narrow[0] - 0.2


def test_an_adapter_comes_back(tmp_path):
    model, _ = train_toy(tmp_path / "run", quantization="fp8")
    save_adapter(model, tmp_path / "adapter")
    again = apply_fast_parts(load_adapter(load_model(recipe(quantization="fp8")), tmp_path / "adapter"), recipe(quantization="fp8"))
    ids = torch.randint(3, 1000, (1, 20), generator=torch.Generator().manual_seed(0)).to(next(model.parameters()).device)
    with torch.inference_mode():
        here, there, wide = (m.eval()(input_ids=ids, use_cache=False).logits for m in (model, again, apply_fast_parts(load_adapter(load_model(recipe()), tmp_path / "adapter"), recipe())))
    assert torch.equal(here, there)
    assert 0.001 < (here - wide).norm() / wide.norm() < 0.5  # tokens near a border go to other experts


def test_what_becomes_narrow_and_what_does_not():
    model = apply_fast_parts(load_model(recipe(quantization="fp8")), recipe(quantization="fp8"))
    assert not wide_weights(model)
    assert isinstance(weight_of(model.model.layers[1].mixer.experts, "up_proj"), Weight8)
    for name, p in model.named_parameters():
        if any(part in name for part in ("embed", "lm_head", "gate.weight", "norm", "conv1d", "A_log")):
            assert not p.isnan().any(), name
    said = describe_kernels(model, recipe(quantization="fp8"), (False, "asked for"))
    assert f"8-bit floats in {len(list(weights8(model)))}" in said and ("slowly" in said) != GPU
    assert "8-bit" not in describe_kernels(apply_fast_parts(load_model(recipe()), recipe()), recipe(), (False, "asked for"))


def test_the_context_manager_gives_back():
    model = apply_fast_parts(load_model(recipe()), recipe())
    before = {n: p.detach().clone() for n, p in model.requires_grad_(False).named_parameters()}
    with pytest.raises(KeyError), in_float8(model):
        assert any(p.isnan().all() for p in model.parameters())
        raise KeyError
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters()) and not list(weights8(model))


def test_refused():
    for settings, said in ((dict(fast="off"), "quantization fp8 needs backend hf and fast auto or require"), (dict(backend="unsloth", dtype="bfloat16"), "quantization fp8 needs backend hf")):
        with pytest.raises(RecipeError, match=said):
            check_recipe(recipe(quantization="fp8", **settings))
    with patch("torch.cuda.is_available", lambda: True), patch("medmcqa_lora.model.load.has_float8", lambda device: False), patch("medmcqa_lora.model.load.device", lambda: torch.device("cpu")):
        with pytest.raises(ValueError, match="capability 9.0 or newer"):
            check_backend(recipe(quantization="fp8"))
        with patch("medmcqa_lora.model.load.has_float8", lambda device: True), pytest.raises(ValueError, match="use -p dtype bfloat16"):
            check_backend(recipe(quantization="fp8", dtype="float32"))


def test_processes_send_each_other_no_frozen_matrix():
    tuned = apply_fast_parts(attach_lora(load_model(recipe(quantization="fp8")), recipe(quantization="fp8")), recipe(quantization="fp8"))
    left_out = set(tuned._ddp_params_and_buffers_to_ignore)
    assert {n for n, p in tuned.named_parameters() if not p.requires_grad} == left_out


@pytest.mark.parametrize("seed", range(20 if ALL else 4))
def test_a_row_never_loses_more_than_its_bits(seed):
    draw = random.Random(seed)
    x = torch.randn(draw.randint(1, 9), draw.randint(1, 70), generator=torch.Generator().manual_seed(seed)) * 10 ** draw.uniform(-12, 12)
    x[draw.randrange(len(x))] = 0
    x8 = quantise(x)
    apart = (dequantise(x8, torch.float32) - x).abs()
    assert (apart <= x.abs() / 16 + x8.scale[:, None] * 2**-10).all()


@needs_hopper
@pytest.mark.parametrize("sizes", [(300, 2688, 10304), (256, 1856, 2688), (1, 64, 48)])
def test_products_on_a_gpu(sizes):
    n, k, m = sizes
    x, w = torch.randn(n, k, device="cuda", dtype=torch.bfloat16), torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
    w8, x8 = quantise_matrix(w), quantise(x)
    plain = dequantise(x8, torch.float32) @ dequantise(w8.rows, torch.float32).T
    assert (product(x, w8) - plain).norm() / plain.norm() < 5e-3
    with patch.object(float8, "has_float8", lambda device: False):
        assert torch.equal(quantise(x).values.float(), x8.values.float()) and torch.allclose(quantise(x).scale, x8.scale, rtol=1e-6)


@needs_hopper
@pytest.mark.parametrize("counts", [[700, 0, 1, 128, 129], [0, 0, 0, 0, 5], [64] * 5])
def test_grouped_products_on_a_gpu(counts):
    ends = torch.tensor(counts, device="cuda").cumsum(0).to(torch.int32)
    x, w = torch.randn(sum(counts), 1856, device="cuda", dtype=torch.bfloat16), torch.randn(len(counts), 2688, 1856, device="cuda", dtype=torch.bfloat16)
    w8 = quantise_matrix(w)
    fast = expert_product(x, w8, ends)
    with patch.object(experts, "multiplies8", lambda w: False):
        slow = expert_product(x, w8, ends)
    assert fast.shape == slow.shape and (fast - slow).norm() / slow.norm() < 1e-2


@needs_hopper
def test_a_block_on_a_gpu_beside_pytorchs_formulas():
    chosen = replace(recipe(), lora_targets=["attention", "mamba_in", "shared_experts", "routed_experts"])
    model = apply_fast_parts(attach_lora(load_model(chosen), chosen), chosen).train()
    for m in model.modules():
        if hasattr(m, "e_score_correction_bias"):
            m.e_score_correction_bias[: m.top_k] = 10.0  # which experts a token goes to must not depend on the last bit
    ids = torch.randint(3, 1000, (1, 96), generator=torch.Generator().manual_seed(0)).cuda()

    def gradients():
        model.zero_grad()
        with torch.autocast("cuda", torch.bfloat16):
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    wide = gradients()
    with in_float8(model):
        fast = gradients()
        with patch.object(float8, "has_float8", lambda device: False):
            slow = gradients()
    assert (fast - wide).norm() < 1.1 * (slow - wide).norm()  # no further from 16 bits than PyTorch's formulas are
    assert (fast - slow).norm() < (slow - wide).norm()  # and in the same direction: two roundings of their own would be 1.4 times that apart
