"""Loading a base model: frozen at once, the same for the same seed, on the right device."""
import re
from unittest.mock import patch

import pytest
import torch
from transformers.utils import logging

from medmcqa_lora.core.recipe import Recipe
from medmcqa_lora.model.load import draw_random_weights, load_model, resolve_dtype
from medmcqa_lora.model.resolve import empty_model, load_config, resolve_model

logging.disable_progress_bar()
pytestmark = pytest.mark.usefixtures("one_thread")
TOY = "toy-nemotron-h"


def tensors(model):
    return [*model.parameters(), *model.buffers()]


@pytest.mark.parametrize("weights", ["pretrained", "random"])
def test_a_loaded_model_is_frozen(weights):
    """Before anything else works on it, whatever loader it comes from."""
    model = load_model(Recipe(model=TOY, weights=weights))
    assert [n for n, p in model.named_parameters() if p.requires_grad] == []
    assert not model.training


def test_a_model_of_another_loader_is_frozen():
    """Unsloth's, say, which returns a model that trains."""
    other = torch.nn.Linear(2, 2)
    with patch("medmcqa_lora.model.load.load_base", lambda where, recipe: other):
        assert load_model(Recipe(model=TOY)) is other
    assert not other.weight.requires_grad and not other.training


def test_the_kinds_of_the_toys_blocks():
    kinds = load_model(Recipe(model=TOY)).config.layers_block_type
    first = ["linear_attention", "moe", "linear_attention", "full_attention", "mlp", "moe"]
    assert kinds == first


def load_random(seed, drawn_before=5):
    torch.manual_seed(drawn_before)
    return load_model(Recipe(model=TOY, weights="random", seed=seed))


def test_random_weights_depend_on_the_seed_alone():
    model, again, other = load_random(1, 5), load_random(1, 6), load_random(2, 5)
    pairs = list(zip(model.parameters(), again.parameters()))
    assert all(torch.equal(a, b) for a, b in pairs)
    assert not all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters()))

    def dt_bias(m):  # drawn by transformers
        return m.model.layers[0].mixer.dt_bias

    assert torch.equal(dt_bias(model), dt_bias(again))
    assert not torch.equal(dt_bias(model), dt_bias(other))


def test_random_weights_leave_the_callers_numbers():
    torch.manual_seed(5)
    expected = torch.rand(3)
    load_random(1, 5)
    assert torch.equal(torch.rand(3), expected)


def test_random_weights_are_complete_and_finite():
    model = load_random(1)
    assert not any(t.is_meta for t in tensors(model))
    assert all(torch.isfinite(t).all() for t in model.state_dict().values())


@pytest.mark.parametrize("name, std", [
    ("model.embeddings.weight", 1),
    ("model.layers.0.mixer.in_proj.weight", 50 ** -0.5),
    ("model.layers.0.mixer.out_proj.weight", (50 * 52) ** -0.5),
    ("model.layers.1.mixer.experts.down_proj", (50 * 52) ** -0.5),
    ("model.layers.0.mixer.conv1d.bias", 0.1),
])
def test_the_size_of_random_weights(name, std):
    config = load_config("nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-Base-BF16")
    weight = torch.empty(2000) if name.endswith("bias") else torch.empty(200, 50)
    draw_random_weights(name, weight, config, torch.Generator().manual_seed(0))
    assert weight.std().item() == pytest.approx(std, rel=0.05)


def test_other_vectors_stay_as_they_are():
    config = load_config(TOY)
    weight = torch.full((5,), 3.0)
    draw_random_weights("model.layers.0.norm.weight", weight, config, torch.Generator())
    assert weight.tolist() == [3.0] * 5


def test_auto_is_the_stored_type():
    model = empty_model(resolve_model(TOY))
    assert resolve_dtype(Recipe(dtype="auto"), model).dtype == "float32"
    assert resolve_dtype(Recipe(dtype="bfloat16"), model).dtype == "bfloat16"


def test_out_of_memory_is_one_line():
    def give_up(*args):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.50 GiB.")

    with patch("medmcqa_lora.model.load._load_hf", give_up), pytest.raises(ValueError) as caught:
        load_model(Recipe(model=TOY))
    expected = "loading toy-nemotron-h, whose weights take 1.30 MiB in float32"
    assert expected in str(caught.value) and "\n" not in str(caught.value)


def test_other_errors_are_one_line():
    def fail(*args):
        raise OSError("first\nsecond")

    message = f"model {TOY}: can't be loaded (first second); check the name"
    with patch("medmcqa_lora.model.load._load_hf", fail):
        with pytest.raises(ValueError, match=re.escape(message)):
            load_model(Recipe(model=TOY))
