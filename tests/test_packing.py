"""Nothing leaks: an example's logits, gradients, scores and losses are its own, alone, padded or packed."""
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from benchmarks.isolation import apart, isolation, make_recipe
from conftest import run_cli  # noqa: F401

from medmcqa_lora.data import encode_questions, load_pair
from medmcqa_lora.files import read_lines
from medmcqa_lora.kernels import packing_error
from medmcqa_lora.model import attach_lora, load_model, load_tokenizer
from medmcqa_lora.recipe import load_recipe
from medmcqa_lora.training import make_trainer, train


@pytest.mark.parametrize("fast", ["auto", "off"])
def test_alone_padded_and_packed(tmp_path, fast):
    """One token, a chunk and its neighbours, several chunks; every LoRA group, every matrix."""
    recipe, config = make_recipe("", "float32", tmp_path)
    found = isolation(replace(recipe, fast=fast), config["chunk_size"], config["vocab_size"])
    differences = found["differences"]
    assert found["matrices"] > 20
    for way in ("padded", "packed"):
        assert differences[way]["logits"] < 1e-5 and differences[way]["gradients"] < 1e-4, (way, differences)
    assert differences["leaking"]["logits"] > 0.1 and differences["leaking"]["gradients"] > 0.1  # the measure sees a leak
    assert differences["scoring, padded"]["letters"] < 1e-4
