"""Frozen 8-bit matrices: how far results move, and the GPU's products beside PyTorch's."""
import random
from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
from conftest import ALL

from medmcqa_lora.core.files import read_lines
from medmcqa_lora.core.recipe import Recipe, RecipeError, check_recipe
from medmcqa_lora.data.leakage import load_pair
from medmcqa_lora.data.tokens import encode_questions
from medmcqa_lora.fast import experts, float8
from medmcqa_lora.fast.apply import apply_fast_parts, describe_kernels
from medmcqa_lora.fast.blocks import float8_candidates, in_float8
from medmcqa_lora.fast.experts import expert_product
from medmcqa_lora.fast.float8 import (
    Weight8,
    dequantise,
    float8_weights,
    frozen_matmul,
    quantise,
    quantise_matrix,
    weight_of,
)
from medmcqa_lora.model.adapter import load_adapter, save_adapter
from medmcqa_lora.model.load import check_backend, load_model
from medmcqa_lora.model.lora import attach_lora
from medmcqa_lora.model.resolve import load_tokenizer
from medmcqa_lora.training.trainer import make_trainer, run_training

GPU = torch.cuda.is_available()
HAS_FLOAT8 = GPU and torch.cuda.get_device_capability() >= (9, 0)
pytestmark = pytest.mark.usefixtures("one_thread")
needs_hopper = pytest.mark.skipif(not HAS_FLOAT8, reason="8-bit products need a Hopper GPU")


def recipe(**settings) -> Recipe:
    chosen = dict(
        model="toy-nemotron-h", lora_r=4, lora_alpha=8,
        lora_targets=["attention", "mamba_in", "shared_experts"],
        dtype="bfloat16" if GPU else "float32", learning_rate=5e-3,
    )
    return Recipe(**chosen | settings)


def load_fast(chosen: Recipe):
    """The toy model without LoRA, with its fast parts."""
    return apply_fast_parts(load_model(chosen), chosen)


def load_tuned(chosen: Recipe):
    """The toy model with new LoRA factors, and its fast parts."""
    return apply_fast_parts(attach_lora(load_model(chosen), chosen), chosen)


def load_adapted(chosen: Recipe, adapter):
    """The toy model with a saved adapter, and its fast parts."""
    return apply_fast_parts(load_adapter(load_model(chosen), adapter), chosen)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def train_toy(folder, **settings) -> tuple:
    """A model after eight steps, its losses."""
    chosen = recipe(max_steps=8, **settings)
    tokenizer, model = load_tokenizer(chosen), load_tuned(chosen)
    encoded = encode_questions(load_pair(chosen)[0].questions, tokenizer, chosen)
    folder.mkdir()
    trainer = make_trainer(model, tokenizer, encoded, chosen, folder, packed=True)
    run_training(trainer, folder)
    return model, [m["loss"] for m in read_lines(folder / "metrics.jsonl")]


@pytest.mark.parametrize(
    "targets", [["attention", "mamba_in", "shared_experts"], ["routed_experts"]]
)
def test_losses_stay_near_those_without_8_bits(tmp_path, targets):
    folders = tmp_path / "float8", tmp_path / "plain"
    model, losses = train_toy(folders[0], quantization="fp8", lora_targets=targets)
    _, plain = train_toy(folders[1], lora_targets=targets)
    assert len(list(float8_weights(model))) > 10 and losses != plain
    assert all(abs(a - b) < 0.05 * b for a, b in zip(losses, plain)), (losses, plain)
    assert losses[-1] < losses[0] - 0.2


def test_a_saved_adapter_gives_the_same_logits(tmp_path):
    model, _ = train_toy(tmp_path / "run", quantization="fp8")
    save_adapter(model, tmp_path / "adapter")
    again = load_adapted(recipe(quantization="fp8"), tmp_path / "adapter")
    plain = load_adapted(recipe(), tmp_path / "adapter")
    device = next(model.parameters()).device
    ids = torch.randint(3, 1000, (1, 20), generator=seeded()).to(device)
    with torch.inference_mode():
        saved, loaded, exact = (
            m.eval()(input_ids=ids, use_cache=False).logits for m in (model, again, plain)
        )
    assert torch.equal(saved, loaded)
    # tokens near a border go to other experts
    assert 0.001 < (saved - exact).norm() / exact.norm() < 0.5


def test_which_matrices_become_8_bits_wide():
    chosen = recipe(quantization="fp8")
    model = load_fast(chosen)
    assert not float8_candidates(model)
    assert isinstance(weight_of(model.model.layers[1].mixer.experts, "up_proj"), Weight8)
    kept = ("embed", "lm_head", "gate.weight", "norm", "conv1d", "A_log")
    for name, p in model.named_parameters():
        if any(part in name for part in kept):
            assert not p.isnan().any(), name
    attention = (False, "asked for")
    described = describe_kernels(model, chosen, attention)
    assert f"8-bit floats in {len(list(float8_weights(model)))}" in described
    assert ("slowly" in described) != GPU
    assert "8-bit" not in describe_kernels(load_fast(recipe()), recipe(), attention)


def test_the_context_manager_restores_matrices_after_an_error():
    model = load_fast(recipe()).requires_grad_(False)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    with pytest.raises(KeyError), in_float8(model):
        assert any(p.isnan().all() for p in model.parameters())
        raise KeyError
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert not list(float8_weights(model))


@pytest.mark.parametrize("settings, message", [
    (dict(fast="off"), "quantization fp8 needs backend hf and fast auto or require"),
    (dict(backend="unsloth", dtype="bfloat16"), "quantization fp8 needs backend hf"),
])
def test_recipes_that_cannot_use_8_bits(settings, message):
    with pytest.raises(RecipeError, match=message):
        check_recipe(recipe(quantization="fp8", **settings))


def test_hardware_and_types_that_cannot_use_8_bits(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("medmcqa_lora.model.load.compute_device", lambda: torch.device("cpu"))
    monkeypatch.setattr("medmcqa_lora.model.load.has_float8", lambda device: False)
    with pytest.raises(ValueError, match="capability 9.0 or newer"):
        check_backend(recipe(quantization="fp8"))
    monkeypatch.setattr("medmcqa_lora.model.load.has_float8", lambda device: True)
    with pytest.raises(ValueError, match="use -p dtype bfloat16"):
        check_backend(recipe(quantization="fp8", dtype="float32"))


def test_processes_send_each_other_no_frozen_matrix():
    tuned = load_tuned(recipe(quantization="fp8"))
    ignored = set(tuned._ddp_params_and_buffers_to_ignore)
    assert {n for n, p in tuned.named_parameters() if not p.requires_grad} == ignored


@pytest.mark.parametrize("seed", range(20 if ALL else 4))
def test_a_row_loses_no_more_than_its_bits(seed):
    draw = random.Random(seed)
    sizes = draw.randint(1, 9), draw.randint(1, 70)
    x = torch.randn(sizes, generator=seeded(seed)) * 10 ** draw.uniform(-12, 12)
    x[draw.randrange(len(x))] = 0
    x8 = quantise(x)
    error = (dequantise(x8, torch.float32) - x).abs()
    assert (error <= x.abs() / 16 + x8.scale[:, None] * 2**-10).all()


def no_float8():
    """PyTorch's formulas instead of the GPU's 8-bit products."""
    return patch.object(float8, "has_float8", lambda device: False)


@needs_hopper
@pytest.mark.parametrize("sizes", [(300, 2688, 10304), (256, 1856, 2688), (1, 64, 48)])
def test_products_on_a_gpu(sizes):
    n, k, m = sizes
    x = torch.randn(n, k, device="cuda", dtype=torch.bfloat16)
    w = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
    w8, x8 = quantise_matrix(w), quantise(x)
    plain = dequantise(x8, torch.float32) @ dequantise(w8.rows, torch.float32).T
    assert (frozen_matmul(x, w8) - plain).norm() / plain.norm() < 5e-3
    with no_float8():
        by_pytorch = quantise(x)
    assert torch.equal(by_pytorch.values.float(), x8.values.float())
    assert torch.allclose(by_pytorch.scale, x8.scale, rtol=1e-6)


@needs_hopper
@pytest.mark.parametrize("counts", [[700, 0, 1, 128, 129], [0, 0, 0, 0, 5], [64] * 5])
def test_grouped_products_on_a_gpu(counts):
    ends = torch.tensor(counts, device="cuda").cumsum(0).to(torch.int32)
    x = torch.randn(sum(counts), 1856, device="cuda", dtype=torch.bfloat16)
    w = torch.randn(len(counts), 2688, 1856, device="cuda", dtype=torch.bfloat16)
    w8 = quantise_matrix(w)
    fast = expert_product(x, w8, ends)
    with patch.object(experts, "has_float8_product", lambda w: False):
        slow = expert_product(x, w8, ends)
    assert fast.shape == slow.shape and (fast - slow).norm() / slow.norm() < 1e-2


@needs_hopper
def test_gradients_on_a_gpu_beside_pytorchs_formulas():
    targets = ["attention", "mamba_in", "shared_experts", "routed_experts"]
    model = load_tuned(replace(recipe(), lora_targets=targets)).train()
    for m in model.modules():
        if hasattr(m, "e_score_correction_bias"):
            # which experts a token goes to must not depend on the last bit
            m.e_score_correction_bias[: m.top_k] = 10.0
    ids = torch.randint(3, 1000, (1, 96), generator=seeded()).cuda()

    def gradients():
        model.zero_grad()
        with torch.autocast("cuda", torch.bfloat16):
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    plain = gradients()
    with in_float8(model):
        fast = gradients()
        with no_float8():
            slow = gradients()
    # no further from 16 bits than PyTorch's formulas are
    assert (fast - plain).norm() < 1.1 * (slow - plain).norm()
    # and in the same direction: two independent roundings would differ by 1.4 times that
    assert (fast - slow).norm() < (slow - plain).norm()
