"""Finding a recipe's model: a folder, a built-in name, a hub id; nothing asks a hub unasked."""
import shutil
from pathlib import Path

import pytest
import torch
from transformers.utils import logging

from medmcqa_lora.core.recipe import Recipe
from medmcqa_lora.model.checkpoint import model_structure
from medmcqa_lora.model.resolve import find_model, load_tokenizer, resolve_model

logging.disable_progress_bar()
TOY = "toy-nemotron-h"
NANO = "nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-Base-BF16"


@pytest.fixture
def without_weights(tmp_path):
    """The toy's folder with its configuration and tokenizer alone."""
    folder = tmp_path / "bare"
    ignore = shutil.ignore_patterns("*.safetensors")
    return Path(shutil.copytree(resolve_model(TOY), folder, ignore=ignore))


def shapes(model):
    return {n: (tuple(t.shape), t.device.type) for n, t in model.state_dict().items()}


def test_a_built_in_model():
    recipe = Recipe(model=TOY)
    found = find_model(recipe)
    assert (found.name, found.path, found.is_local) == (TOY, resolve_model(TOY), True)
    assert found.config is found.structure.config
    assert shapes(found.structure) == shapes(model_structure(TOY))
    assert found.tokenizer("a word").input_ids == load_tokenizer(recipe)("a word").input_ids


def test_the_large_model_needs_no_hub():
    found = find_model(Recipe(model=NANO))
    assert (found.path, found.is_local, found.tokenizer) == (NANO, False, None)
    assert shapes(found.structure) == shapes(model_structure(NANO))


def test_another_hub_id_is_not_asked_for():
    found = find_model(Recipe(model="nobody/none"))
    assert (found.path, found.is_local) == ("nobody/none", False)
    assert (found.config, found.tokenizer, found.structure) == (None, None, None)


def test_a_plan_may_ask_the_hub():
    with pytest.raises(ValueError, match="model nobody/none: its configuration can't be used"):
        find_model(Recipe(model="nobody/none"), structure_only=True)


def test_a_tokenizer_of_its_own():
    assert len(find_model(Recipe(model="nobody/none", tokenizer=TOY)).tokenizer) == 1024


def test_a_folder_without_weights(without_weights):
    recipe = Recipe(model=str(without_weights))
    with pytest.raises(ValueError, match=r"has no \*.safetensors weights"):
        find_model(recipe)
    planned = find_model(recipe, structure_only=True)
    assert planned.is_local and planned.tokenizer is None
    assert shapes(planned.structure) == shapes(model_structure(TOY))
    random = find_model(Recipe(model=str(without_weights), weights="random"))
    assert random.tokenizer is not None


def test_a_folder_without_a_configuration(tmp_path):
    with pytest.raises(ValueError, match="has no config.json"):
        resolve_model(str(tmp_path))


def test_the_structure_takes_no_memory():
    structure = find_model(Recipe(model=NANO)).structure
    assert sum(p.numel() for p in structure.parameters()) == 31_577_937_344
    assert {p.device for p in structure.parameters()} == {torch.device("meta")}
