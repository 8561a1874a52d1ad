"""Saved adapters: the same bytes, the same logits, readable by others."""
import pytest
import torch
from torch import nn
from transformers import NemotronHConfig
from transformers.utils import logging

from medmcqa_lora.core.recipe import Recipe
from medmcqa_lora.model.adapter import adapter_shapes, check_adapter, load_adapter, save_adapter
from medmcqa_lora.model.load import load_model
from medmcqa_lora.model.lora import attach_lora, lora_report
from medmcqa_lora.model.resolve import TOY

logging.disable_progress_bar()
pytestmark = pytest.mark.usefixtures("one_thread")
RECIPE = Recipe(
    model="toy-nemotron-h", lora_r=4, lora_alpha=8,
    lora_targets=["attention", "mamba_in", "shared_experts", "mlp"])
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def tuned():
    return attach_lora(load_model(RECIPE), RECIPE)


def logits(model):
    ids = torch.randint(3, 1000, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model.eval()(ids, use_cache=False).logits


def test_others_can_read_the_files(tuned, tmp_path):
    folder = save_adapter(tuned, tmp_path / "adapter")
    assert {oct(p.stat().st_mode & 0o777) for p in folder.iterdir()} == {"0o644"}
    assert not (folder / "README.md").exists()


def test_given_tensors_make_the_same_file(tuned, tmp_path):
    own = save_adapter(tuned, tmp_path / "own")
    tensors = {n: p.detach() for n, p in tuned.named_parameters() if p.requires_grad}
    given = save_adapter(tuned, tmp_path / "given", tensors)
    assert (given / WEIGHTS).read_bytes() == (own / WEIGHTS).read_bytes()


def test_two_tensors_per_matrix(tuned, tmp_path):
    folder = save_adapter(tuned, tmp_path / "adapter")
    assert len(adapter_shapes(folder)) == 2 * lora_report(tuned).matrices.sum()


def test_a_fresh_adapter_and_a_trained_one(tuned, tmp_path):
    """Both survive the disk to the bit, and the second replaces the first."""
    with tuned.disable_adapter():
        base = logits(tuned)
    folder = save_adapter(tuned, tmp_path / "adapter")
    assert torch.equal(logits(load_adapter(load_model(RECIPE), folder)), base)
    for name, p in tuned.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, std=0.02)
    save_adapter(tuned, folder)
    found = logits(load_adapter(load_model(RECIPE), folder))
    assert torch.equal(found, logits(tuned)) and not torch.equal(found, base)


def test_a_base_that_is_half_as_wide(tuned, tmp_path):
    """No weights are read."""
    folder, narrow = save_adapter(tuned, tmp_path / "adapter"), tmp_path / "narrow"
    NemotronHConfig(**TOY | dict(hidden_size=32)).save_pretrained(narrow)
    (narrow / "model.safetensors").touch()
    check_adapter(folder, "toy-nemotron-h")
    with pytest.raises(ValueError, match=r"\(first: base_model.model.model.layers."):
        check_adapter(folder, str(narrow))
