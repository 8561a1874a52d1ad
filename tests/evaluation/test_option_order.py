"""Worked examples, orders of the options, calibration: what they must hold whatever the model."""
import json
import random
from dataclasses import replace
from itertools import permutations

import numpy as np
import pytest
from conftest import ALL

from medmcqa_lora.analysis.calibration import (
    brier, calibration, expected_error, letter_logits, letter_probabilities, reliability,
)
from medmcqa_lora.core.files import append_lines
from medmcqa_lora.core.recipe import Recipe
from medmcqa_lora.data.leakage import load_pair
from medmcqa_lora.data.prompts import render_prompt, with_examples
from medmcqa_lora.data.questions import fingerprint, question_hash, load_evaluation, load_questions
from medmcqa_lora.data.schemas import LETTERS
from medmcqa_lora.evaluation.letters import choose_prompt_packing, encode_prompts
from medmcqa_lora.evaluation.option_order import (
    draw_orders, reorder_options, letter_bias, order_record, score_orders, summarise_orders,
    write_orders_comparison,
)
from medmcqa_lora.evaluation.records import EvaluationOutput, begin_evaluation, collect
from medmcqa_lora.fast.apply import apply_fast_parts
from medmcqa_lora.model.load import load_model
from medmcqa_lora.model.resolve import load_tokenizer

TOY = Recipe(model="toy-nemotron-h")
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("shots", range(6) if ALL else (1, 5))
@pytest.mark.parametrize("style", ["plain", "lm_eval"])
def test_worked_examples_stand_before_and_change_nothing_else(shots, style):
    recipe = Recipe(shots=shots, prompt_style=style, seed=3)
    plain = load_evaluation(recipe).questions[:7]
    with_shots = with_examples(plain, recipe)
    assert fingerprint(with_shots) == fingerprint(plain)
    for shown, alone in zip(with_shots, plain):
        prompt = render_prompt(shown, style)
        assert prompt.endswith(render_prompt(alone, style))
        assert prompt.count("Question:") == shots + 1
    examples = with_shots[0].shown if shots else ()
    letters = {question_hash(q): LETTERS[q.answer] for q in load_pair(recipe)[0].questions}
    texts = render_prompt(with_shots[0], style).split("\n\n")[:shots]
    assert [text[-1] for text in texts] == [letters[question_hash(e)] for e in examples]
    shown = {question_hash(e) for q in with_shots for e in q.shown}
    assert not shown & {question_hash(q) for q in plain}


def test_worked_examples_are_drawn_by_the_seed():
    question = load_evaluation(Recipe()).questions[:1]

    def drawn(seed):
        return [e.id for e in with_examples(question, Recipe(shots=3, seed=seed))[0].shown]

    assert drawn(1) == drawn(1) != drawn(2)


def test_an_evaluation_with_other_examples_is_another_one(tmp_path):
    def questions(recipe):
        return with_examples(load_evaluation(recipe).questions[:4], recipe)

    folder, recipe = tmp_path / "e", Recipe(shots=2)
    begin_evaluation(folder, recipe, None, questions(recipe), False)
    shown = [e.id for e in questions(recipe)[0].shown]
    assert json.loads((folder / "evaluation.json").read_text())["shown"] == shown
    begin_evaluation(folder, recipe, None, questions(recipe), True)
    for other in (Recipe(shots=1), Recipe(shots=2, seed=7)):
        with pytest.raises(ValueError, match="holds another evaluation"):
            begin_evaluation(folder, other, None, questions(other), True)


def test_examples_from_the_questions_that_are_asked_are_refused(tmp_path):
    options = dict(opa="a", opb="b", opc="c", opd="d", cop=1)
    rows = [json.dumps(dict(id=str(i), question=f"Q{i}?", **options)) for i in range(4)]
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(rows))
    recipe = Recipe(data=str(file), eval_data=str(file), label_base="0", shots=1)
    with pytest.raises(ValueError):
        with_examples(load_evaluation(recipe).questions, recipe)


def test_orders_are_drawn_by_the_seed():
    assert draw_orders(5, 1) == draw_orders(5, 1) != draw_orders(5, 2)
    with pytest.raises(ValueError, match="give 2 to 24"):
        draw_orders(25, 0)


@pytest.mark.parametrize(
    "order", ["".join(p) for p in permutations(LETTERS)] if ALL else ["DCBA", "BCDA"])
def test_an_order_moves_options_and_answer_together(order):
    for q in load_questions("sample", "validation").questions[:20]:
        moved = reorder_options(q, order)
        assert moved.options[moved.answer] == q.options[q.answer]
        assert sorted(moved.options) == sorted(q.options)
        assert [q.options[LETTERS.index(c)] for c in order] == list(moved.options)


def test_orders_on_a_model(tmp_path):
    """Interrupted, and resumed with another batch size, the choices are the same."""
    questions = load_questions("sample", "validation", limit=8).questions
    model, tokenizer = apply_fast_parts(load_model(TOY), TOY), load_tokenizer(TOY)
    orders = draw_orders(4, 0)
    packed, _ = choose_prompt_packing(model, tokenizer, questions, TOY)

    def score(recipe):
        output = EvaluationOutput(tmp_path, quiet=True)
        ordered = score_orders(model, tokenizer, questions, orders, recipe, output, packed)
        assert len(encode_prompts(ordered, tokenizer, TOY)[0]) == 32
        return collect(tmp_path, ordered, "orders")

    first = score(TOY)
    interrupted = "".join(json.dumps(r) + "\n" for r in first[:13])
    (tmp_path / "orders.jsonl").write_text(interrupted)
    again = score(replace(TOY, per_device_eval_batch_size=3))
    assert [(r["id"], r["choice"]) for r in first] == [(r["id"], r["choice"]) for r in again]
    for r in first:
        assert r["choice"] == r["order"][LETTERS.index(r["prediction"])]
        assert r["correct"] == (r["prediction"] == r["answer"])
    s = summarise_orders(first)
    assert s["n"] == 8 and s["orders"] == 4
    assert abs(sum(s["letters"].values()) - 1) < 1e-5
    assert s["lowest"] <= s["accuracy"] <= s["highest"]


def test_orders_of_one_model_alone_or_other_orders_are_not_compared(tmp_path):
    questions = load_questions("sample", "validation", limit=3).questions

    def write(name, orders):
        ordered = [reorder_options(q, order) for q in questions for order in orders]
        folder = tmp_path / name
        folder.mkdir()
        append_lines(folder / "orders.jsonl", [order_record(q, [0.0] * 4) for q in ordered])
        return folder

    some, others = write("some", ["ABCD", "BADC"]), write("others", ["ABCD", "DCBA"])
    assert "for the base alone" in write_orders_comparison(some, tmp_path / "none")
    assert "for the tuned model alone" in write_orders_comparison(tmp_path / "none", some)
    assert "can't be set side by side" in write_orders_comparison(some, others)


def test_the_letter_bias_of_two_letters():
    assert letter_bias(dict(A=0.5, B=0.5, C=0, D=0)) == 0.5


def calibrated(n: int, seed: int, scale: float) -> list[dict]:
    """Predictions of a model that is as often right as it says at scale 1."""
    draw = np.random.default_rng(seed)
    logits = draw.normal(size=(n, 4)) * 2
    answers = [draw.choice(4, p=row) for row in letter_probabilities(logits)]
    return [dict(id=str(i), answer=LETTERS[answer], logprobs=dict(zip(LETTERS, scale * row)))
            for i, (answer, row) in enumerate(zip(answers, logits))]


@pytest.mark.parametrize("scale", [0.5, 1.0, 4.0])
def test_the_temperature_is_found(scale):
    found = calibration(calibrated(4000, 1, scale))
    assert abs(found["temperature"] / scale - 1) < 0.15
    assert found["after"]["nll"] <= found["before"]["nll"] + 0.01
    assert found["after"]["ece"] < 0.05


@pytest.mark.parametrize("seed", range(10 if ALL else 3))
def test_bounds_and_order(seed):
    predictions = calibrated(random.Random(seed).randint(2, 60), seed, 3.0)
    logits, right = letter_logits(predictions)
    p = letter_probabilities(logits)
    bins = reliability(p, right)
    assert sum(b["n"] for b in bins) == len(predictions)
    assert 0 <= expected_error(bins) <= 1 and 0 <= brier(p, right) <= 2
    shuffled = random.Random(seed).sample(predictions, len(predictions))
    assert calibration(shuffled) == calibration(predictions)
