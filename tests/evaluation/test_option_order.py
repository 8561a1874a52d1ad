"""Worked examples, orders of the options, calibration: what they must hold whatever the model."""
import json
import random
from dataclasses import replace
from itertools import permutations

import numpy as np
import pytest
from conftest import ALL

from medmcqa_lora.analysis.calibration import brier, calibration, expected_error, letter_logits, letter_probabilities, reliability
from medmcqa_lora.data.schemas import LETTERS
from medmcqa_lora.data.questions import fingerprint, identity, load_evaluation, load_questions
from medmcqa_lora.data.leakage import load_pair
from medmcqa_lora.data.prompts import render_prompt, with_examples
from medmcqa_lora.evaluation.records import begin_evaluation, collect
from medmcqa_lora.evaluation.letters import choose_scoring, encode_prompts
from medmcqa_lora.model.resolve import load_tokenizer
from medmcqa_lora.model.load import load_model
from medmcqa_lora.evaluation.option_order import draw_orders, in_order, score_orders, summarise_orders
from medmcqa_lora.core.recipe import Recipe
from medmcqa_lora.fast.apply import apply_fast_parts

TOY = Recipe(model="toy-nemotron-h")
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("shots", range(6) if ALL else (1, 5))
@pytest.mark.parametrize("style", ["plain", "lm_eval"])
def test_worked_examples_stand_before_and_change_nothing_else(shots, style):
    recipe = Recipe(shots=shots, prompt_style=style, seed=3)
    plain = load_evaluation(recipe).questions[:7]
    asked = with_examples(plain, recipe)
    assert fingerprint(asked) == fingerprint(plain)
    for a, b in zip(asked, plain):
        assert render_prompt(a, style).endswith(render_prompt(b, style)) and render_prompt(a, style).count("Question:") == shots + 1
    training = {identity(q): LETTERS[q.answer] for q in load_pair(recipe)[0].questions}
    shown = render_prompt(asked[0], style).split("\n\n")[:shots]
    assert [t[-1] for t in shown] == [training[identity(e)] for e in (asked[0].shown if shots else ())]
    assert not {identity(e) for q in asked for e in q.shown} & {identity(q) for q in plain}


def test_worked_examples_are_drawn_by_the_seed():
    drawn = [tuple(e.id for e in with_examples(load_evaluation(Recipe()).questions[:1], Recipe(shots=3, seed=s))[0].shown) for s in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_an_evaluation_with_other_examples_is_another_one(tmp_path):
    recipe = Recipe(shots=2)
    questions = with_examples(load_evaluation(recipe).questions[:4], recipe)
    begin_evaluation(tmp_path / "e", recipe, None, questions, False)
    assert json.loads((tmp_path / "e/evaluation.json").read_text())["shown"] == [e.id for e in questions[0].shown]
    begin_evaluation(tmp_path / "e", recipe, None, questions, True)
    for other in (Recipe(shots=1), Recipe(shots=2, seed=7)):
        with pytest.raises(ValueError, match="holds another evaluation"):
            begin_evaluation(tmp_path / "e", other, None, with_examples(load_evaluation(other).questions[:4], other), True)


def test_examples_from_the_questions_that_are_asked_are_refused(tmp_path):
    rows = [json.dumps(dict(id=str(i), question=f"Q{i}?", opa="a", opb="b", opc="c", opd="d", cop=1)) for i in range(4)]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    recipe = Recipe(data=str(tmp_path / "rows.jsonl"), eval_data=str(tmp_path / "rows.jsonl"), label_base="0", shots=1)
    with pytest.raises(ValueError):
        with_examples(load_evaluation(recipe).questions, recipe)


@pytest.mark.parametrize("order", ["".join(p) for p in permutations(LETTERS)] if ALL else ["DCBA", "BCDA"])
def test_an_order_moves_options_and_answer_together(order):
    for q in load_questions("sample", "validation").questions[:20]:
        moved = in_order(q, order)
        assert moved.options[moved.answer] == q.options[q.answer] and sorted(moved.options) == sorted(q.options)
        assert [q.options[LETTERS.index(c)] for c in order] == list(moved.options)


def test_orders_on_a_model(tmp_path):
    questions, model, tokenizer = load_questions("sample", "validation", limit=8).questions, apply_fast_parts(load_model(TOY), TOY), load_tokenizer(TOY)
    orders = draw_orders(4, 0)
    packed, _ = choose_scoring(model, tokenizer, questions, TOY)
    every = score_orders(model, tokenizer, questions, orders, TOY, tmp_path, quiet=True, packed=packed)
    first = collect(tmp_path, every, "orders")
    (tmp_path / "orders.jsonl").write_text("".join(json.dumps(r) + "\n" for r in first[:13]))  # cut off, and taken up again
    again = collect(tmp_path, score_orders(model, tokenizer, questions, orders, replace(TOY, per_device_eval_batch_size=3), tmp_path, quiet=True, packed=packed) and every, "orders")
    assert [(r["id"], r["choice"]) for r in first] == [(r["id"], r["choice"]) for r in again]
    for r in first:
        assert r["choice"] == r["order"][LETTERS.index(r["prediction"])] and r["correct"] == (r["prediction"] == r["answer"])
    s = summarise_orders(first)
    assert s["n"] == 8 and s["orders"] == 4 and abs(sum(s["letters"].values()) - 1) < 1e-5 and s["lowest"] <= s["accuracy"] <= s["highest"]
    assert len(encode_prompts(every, tokenizer, TOY)[0]) == 32


def made(n: int, seed: int, scale: float) -> list[dict]:
    """Predictions of a model that is as often right as it says at scale 1."""
    draw = np.random.default_rng(seed)
    logits = draw.normal(size=(n, 4)) * 2
    right = [draw.choice(4, p=row) for row in letter_probabilities(logits)]
    return [dict(id=str(i), answer=LETTERS[r], logprobs=dict(zip(LETTERS, scale * row))) for i, (r, row) in enumerate(zip(right, logits))]


@pytest.mark.parametrize("scale", [0.5, 1.0, 4.0])
def test_the_temperature_is_found(scale):
    found = calibration(made(4000, 1, scale))
    assert abs(found["temperature"] / scale - 1) < 0.15
    assert found["after"]["nll"] <= found["before"]["nll"] + 0.01 and found["after"]["ece"] < 0.05


@pytest.mark.parametrize("seed", range(10 if ALL else 3))
def test_bounds_and_order(seed):
    predictions = made(random.Random(seed).randint(2, 60), seed, 3.0)
    p, right = letter_logits(predictions)
    p = letter_probabilities(p)
    bins = reliability(p, right)
    assert sum(b["n"] for b in bins) == len(predictions) and 0 <= expected_error(bins) <= 1 and 0 <= brier(p, right) <= 2
    assert calibration(random.Random(seed).sample(predictions, len(predictions))) == calibration(predictions)
