"""settings.ini, the recipe dataclass and the run notebooks' parameters cells say the same."""
import ast
import json
import math
from dataclasses import FrozenInstanceError, asdict

import pytest
from conftest import ROOT

from medmcqa_lora.core.recipe import (
    Recipe,
    type_in_words,
    parse_value,
    recipe_problems,
    recipe_types,
)
from medmcqa_lora.core.recipe_files import load_recipe, read_ini

SECTIONS = read_ini(ROOT / "settings.ini").sections()
BIG_RECIPES = {"nemotron_nano", "nemotron_nano_unsloth"}
CONTRACT = """
model tokenizer dtype attn_implementation backend data eval_data train_split eval_split max_rows
max_eval_rows prompt_style target max_length packing lora_r lora_alpha lora_dropout lora_targets
lora_r_experts learning_rate lr_scheduler_type warmup_steps weight_decay num_train_epochs max_steps
per_device_train_batch_size gradient_accumulation_steps gradient_checkpointing max_grad_norm seed
save_steps save_total_limit logging_steps eval_steps early_stopping_patience report_to fast parallel
out
"""


def parameters(notebook: str) -> dict:
    """The values of a run notebook's parameters cell."""
    cells = json.loads((ROOT / "nbs/runs" / notebook).read_text())["cells"]
    [cell] = [c for c in cells if "parameters" in c["metadata"].get("tags", [])]
    assignments = ast.parse("".join(cell["source"])).body
    return {node.targets[0].id: ast.literal_eval(node.value) for node in assignments}


def test_the_contracts_keys_exist():
    assert set(CONTRACT.split()) <= set(recipe_types())


def test_the_30b_recipes_refuse_the_slow_path():
    assert {name for name in SECTIONS if load_recipe(name).fast == "require"} == BIG_RECIPES


def test_sections():
    assert SECTIONS == ["demo", "toy", "nemotron_nano", "nemotron_nano_unsloth"]


@pytest.mark.parametrize("section", SECTIONS)
def test_every_recipe_gets_as_far_as_its_plan(section, cli, smollm2):
    code, out, err = cli("plan", "--recipe", section)
    assert code == 0, err
    assert "LoRA trains" in out and "an epoch" in out


@pytest.mark.parametrize("notebook", ["train.ipynb", "evaluate.ipynb"])
def test_parameters_cell_is_the_demo_recipe(notebook):
    """papermill can only set what the cell names, and JupyterLab runs what the cell holds."""
    cell = parameters(notebook)
    others = {"resume", "quiet", "world_size", "adapter", "views", "orders"}
    assert {k: cell[k] for k in recipe_types()} == asdict(load_recipe("demo"))
    assert set(cell) - set(recipe_types()) <= others


def test_every_setting_has_a_reason():
    """In settings.ini each number that differs from the package's default says why."""
    lines = (ROOT / "settings.ini").read_text().splitlines()
    default = lines[lines.index("[DEFAULT]") + 1 : lines.index("[demo]")]
    assert all("#" in line for line in default if "=" in line)


def test_ini_file_of_ones_own(tmp_path):
    text = "[DEFAULT]\nlora_r = 4\n[a]\nseed = 1\n[b]\nseed = 2  # why\n"
    (tmp_path / "mine.ini").write_text(text)
    first = load_recipe(f"{tmp_path}/mine.ini:a", {"lora_r": "8"})
    assert load_recipe(f"{tmp_path}/mine.ini") == Recipe(lora_r=4, seed=2)
    assert first == Recipe(lora_r=8, seed=1)


# words

@pytest.mark.parametrize("kind, words", [
    (int, "a whole number"),
    (float, "a number"),
    (bool, "true or false"),
    (str, "text"),
    (list[str], "names, with commas between"),
    (int | None, "a whole number or none"),
])
def test_a_type_in_words(kind, words):
    assert type_in_words(kind) == words


@pytest.mark.parametrize("text, kind, value", [
    ("true", bool, True),
    ("Off", bool, False),
    ("NONE", int | None, None),
    ("", int | None, None),
    (" 7 ", int | None, 7),
    ("a,, none ,b", list[str], ["a", "b"]),
    ("none", str, "none"),
])
def test_a_word_and_its_value(text, kind, value):
    assert parse_value(text, kind) == value


@pytest.mark.parametrize("text, kind, words", [
    ("1.5", int, "a whole number"),
    ("1_000", int, "a whole number"),
    ("1_000", float, "a number"),
    ("٣", int, "a whole number"),
    ("none", int, "a whole number"),
    ("maybe", bool, "true or false"),
    ("fsd", recipe_types()["parallel"], "one of auto, ddp, fsdp"),
])
def test_a_word_that_does_not_fit(text, kind, words):
    with pytest.raises(ValueError, match=f"^'{text}' is not {words}$"):
        parse_value(text, kind)


# values

@pytest.mark.parametrize("key, value, words", [
    ("lora_r", True, "a whole number"),
    ("lora_r", 4.0, "a whole number"),
    ("lora_r", "4", "a whole number"),
    ("lora_r", None, "a whole number"),
    ("max_rows", "4", "a whole number or none"),
    ("learning_rate", True, "a number"),
    ("gradient_checkpointing", 1, "true or false"),
    ("lora_targets", [1], "names, with commas between"),
    ("lora_targets", ("a",), "names, with commas between"),
    ("target", "Letter", "one of letter, letter_and_text, explanation_then_letter"),
    ("target", "\ud800", "one of letter, letter_and_text, explanation_then_letter"),
])
def test_a_value_of_another_type(key, value, words):
    assert recipe_problems(Recipe(**{key: value})) == [f"{key} = {value!r} is not {words}"]


@pytest.mark.parametrize("values", [
    dict(learning_rate=1),
    dict(max_rows=None),
    dict(target="letter"),
])
def test_a_whole_number_is_a_number_and_none_may_be_allowed(values):
    assert recipe_problems(Recipe(**values)) == []


@pytest.mark.parametrize("key, value, sentence", [
    ("model", "a\0b", "model holds a character that doesn't print"),
    ("out", "\ud800", "out holds a character that doesn't print"),
    ("report_to", ["\n", "\x1b"], "report_to holds a character that doesn't print"),
    ("learning_rate", math.nan, "learning_rate = nan is not finite"),
    ("max_rows", 10**400, "max_rows = that is beyond any use; the largest is 1,000,000"),
    ("seed", 2**32, "seed = 4294967296 is beyond any use; the largest is 4,294,967,295"),
    ("weight_decay", 1e7, "weight_decay = 10000000.0 is beyond any use; the largest is 1,000,000"),
    ("lora_r", 0, "lora_r = 0 must be above 0"),
    ("eval_steps", -3, "eval_steps = -3 must be above 0"),
    ("shots", -1, "shots = -1 must not be negative"),
    ("max_steps", 0, "max_steps is a number of steps, or -1 for num_train_epochs"),
    ("lora_dropout", 1.0, "lora_dropout is a share: at least 0, below 1"),
    ("lora_targets", [], "lora_targets names nothing; try attention, mlp"),
    ("model", " ", "model is empty; name a folder or a hub id"),
    ("data", "", "data is empty; name a file, a hub id, or sample"),
])
def test_a_value_out_of_bounds(key, value, sentence):
    assert recipe_problems(Recipe(**{key: value})) == [sentence]


UNSLOTH = dict(backend="unsloth", dtype="bfloat16")


@pytest.mark.parametrize("values, beginning", [
    (dict(max_steps=1, warmup_steps=1), "warmup_steps leaves the only step"),
    (dict(early_stopping_patience=2), "early_stopping_patience needs eval_steps"),
    (dict(early_stopping_patience=2, eval_steps=3, save_steps=4), "early_stopping_patience keeps"),
    (UNSLOTH | dict(packing="on"), "packing on is refused with backend unsloth"),
    (UNSLOTH | dict(weights="random"), "weights random needs backend hf"),
    (UNSLOTH | dict(lora_r_experts=2), "lora_r_experts is not passed on by unsloth"),
    (UNSLOTH | dict(quantization="fp8"), "quantization fp8 needs backend hf and fast auto"),
    (dict(fast="off", quantization="fp8"), "quantization fp8 needs backend hf"),
    (dict(backend="unsloth"), "dtype float32 is not what unsloth trains in"),
    (UNSLOTH | dict(parallel="fsdp"), "parallel fsdp needs backend hf"),
    (dict(quantization="fp8", parallel="fsdp"), "parallel fsdp needs quantization none"),
])
def test_keys_that_exclude_each_other(values, beginning):
    [sentence] = recipe_problems(Recipe(**values))
    assert sentence.startswith(beginning)


@pytest.mark.parametrize("values", [
    UNSLOTH,
    dict(max_steps=1, warmup_steps=1, lr_scheduler_type="constant"),
    dict(early_stopping_patience=2, eval_steps=2, save_steps=4),
    dict(quantization="fp8", fast="require"),
])
def test_keys_that_go_together(values):
    assert recipe_problems(Recipe(**values)) == []


def test_all_problems_at_once():
    recipe = Recipe(lora_r=0, seed=-1, model="a\0b", lora_dropout=1.5, early_stopping_patience=2)
    assert recipe_problems(recipe) == [
        "model holds a character that doesn't print",
        "lora_r = 0 must be above 0",
        "seed = -1 must not be negative",
        "lora_dropout is a share: at least 0, below 1",
        "early_stopping_patience needs eval_steps",
    ]


def test_types_are_reported_before_bounds():
    assert recipe_problems(Recipe(lora_r=0, seed="x")) == ["seed = 'x' is not a whole number"]


def test_a_recipe_does_not_change():
    with pytest.raises(FrozenInstanceError):
        Recipe().seed = 1
