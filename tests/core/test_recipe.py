"""settings.ini, the recipe dataclass and the run notebooks' parameters cells say the same."""
import ast
import json
from dataclasses import asdict

import pytest
from conftest import ROOT

from medmcqa_lora.core.recipe import Recipe, recipe_types
from medmcqa_lora.core.recipe_files import load_recipe, read_ini

SECTIONS = read_ini(ROOT / "settings.ini").sections()
CONTRACT = """model, tokenizer, dtype, attn_implementation, backend, data, eval_data, train_split, eval_split, max_rows, max_eval_rows, prompt_style, target,
max_length, packing, lora_r, lora_alpha, lora_dropout, lora_targets, lora_r_experts, learning_rate, lr_scheduler_type, warmup_steps, weight_decay,
num_train_epochs, max_steps, per_device_train_batch_size, gradient_accumulation_steps, gradient_checkpointing, max_grad_norm, seed, save_steps,
save_total_limit, logging_steps, eval_steps, early_stopping_patience, report_to, fast, parallel, out""".replace("\n", " ")


def parameters(notebook: str) -> dict:
    cells = json.loads((ROOT / "nbs/runs" / notebook).read_text())["cells"]
    [cell] = [c for c in cells if "parameters" in c["metadata"].get("tags", [])]
    return {node.targets[0].id: ast.literal_eval(node.value) for node in ast.parse("".join(cell["source"])).body}


def test_the_contracts_keys_exist():
    assert {k.strip() for k in CONTRACT.split(",")} <= set(recipe_types())


def test_the_30b_recipes_refuse_the_slow_path():
    assert {name for name in SECTIONS if load_recipe(name).fast == "require"} == {"nemotron_nano", "nemotron_nano_unsloth"}


def test_sections():
    assert SECTIONS == ["demo", "toy", "nemotron_nano", "nemotron_nano_unsloth"]


@pytest.mark.parametrize("section", SECTIONS)
def test_every_recipe_gets_as_far_as_its_plan(section, cli, smollm2):
    code, out, err = cli("plan", "--recipe", section)
    assert code == 0, err
    assert "LoRA trains" in out and "an epoch" in out


@pytest.mark.parametrize("notebook", ["train.ipynb", "evaluate.ipynb"])
def test_parameters_cell_is_the_demo_recipe(notebook):
    """papermill can only set what the cell names, and somebody in JupyterLab runs what it holds."""
    cell = parameters(notebook)
    assert {k: cell[k] for k in recipe_types()} == asdict(load_recipe("demo"))
    assert set(cell) - set(recipe_types()) <= {"resume", "quiet", "world_size", "adapter", "views", "orders"}


def test_every_setting_has_a_reason():
    """In settings.ini a number that differs from the package's default says why, where a reader would ask."""
    lines = (ROOT / "settings.ini").read_text().splitlines()
    default = lines[lines.index("[DEFAULT]") + 1 : lines.index("[demo]")]
    assert all("#" in line for line in default if "=" in line)


def test_ini_file_of_ones_own(tmp_path):
    (tmp_path / "mine.ini").write_text("[DEFAULT]\nlora_r = 4\n[a]\nseed = 1\n[b]\nseed = 2  # why\n")
    assert load_recipe(f"{tmp_path}/mine.ini") == Recipe(lora_r=4, seed=2)
    assert load_recipe(f"{tmp_path}/mine.ini:a", {"lora_r": "8"}) == Recipe(lora_r=8, seed=1)
