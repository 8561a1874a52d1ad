"""Which letter a written answer means."""
import pytest

from medmcqa_lora.evaluation.generation import parse_letter

ORGANS = ("Liver", "Pancreas", "Spleen", "Kidney")
MEAN_B = (
    " B", "B. Pancreas", "(B) because", "**B**", "B\nQuestion:",
    "Its beta cells make it.\nAnswer: B",
    "The correct answer is (B).", "It is the pancreas", "answer: b", "b. pancreas", "B is correct",
    "I would take option B", "B B B B B",
    "The correct answer is B. Option A is wrong; option D is rare.",
    "The answer is B, not option C", "Hormones.\nAnswer: B\nQuestion: And?\nAnswer: C",
)
UNPARSEABLE = (
    "", "A patient with diabetes", "The liver or the pancreas", "E", "Before", "I don't know",
    "answer: because", "the answer is a tumour", "Answer: A tumour of the head",
    "The answer is A 45-year habit", "an option for many",
    "I don't know.\nQuestion: And?\nAnswer: C",
)


@pytest.mark.parametrize("text", MEAN_B)
def test_answers_that_mean_b(text):
    assert parse_letter(text, ORGANS) == "B"


@pytest.mark.parametrize("text", UNPARSEABLE)
def test_answers_that_mean_no_letter(text):
    assert parse_letter(text, ORGANS) is None


def test_the_last_stated_answer_counts():
    assert parse_letter("Answer: A. No, the answer is C") == "C"


def test_an_options_text_comes_before_a_leading_letter():
    options = ("E. coli", "C. difficile", "B. fragilis", "A. baumannii")
    assert parse_letter("C. difficile", options) == "B"


def test_an_option_inside_a_word_is_not_named():
    assert parse_letter("The environment", ("Iron", "Zinc", "Copper", "Lead")) is None
