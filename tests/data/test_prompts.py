"""Worked examples, plots and single examples: corner cases."""
from dataclasses import replace

import pytest

from medmcqa_lora.core.recipe import Recipe
from medmcqa_lora.data.explore import MOST_DRAWN, Example, plot_questions, show_styles
from medmcqa_lora.data.prompts import with_examples
from medmcqa_lora.data.questions import Question, question_hash, load_evaluation
from medmcqa_lora.data.tokens import sample_tokenizer

Q = Question("q1", "Which organ makes insulin?", ("Liver", "Pancreas", "Spleen", "Kidney"), 1)


def test_worked_examples():
    recipe = Recipe(shots=2)
    questions = load_evaluation(recipe).questions[:3]
    asked = with_examples(questions, recipe)
    assert [question_hash(q) for q in asked] == [question_hash(q) for q in questions]  # still themselves
    assert with_examples(asked, Recipe()) == asked
    with pytest.raises(ValueError, match="training rows that are not asked"):
        with_examples(asked, Recipe(shots=5000))


def test_a_figure_of_many_subjects():
    many = [replace(Q, subject=f"$\\x{i}$", choice_type=f"<{i}>") for i in range(500)]
    assert len(plot_questions(many).axes[0].get_yticks()) == MOST_DRAWN


def test_an_example_without_control_characters():
    assert repr(Example("\x1b[2JWhich?\n", " A")) == " [2JWhich?\n« A»"


def test_a_chat_target_ends_with_the_end_of_text():
    gallery = show_styles(Q, sample_tokenizer())
    shown = gallery.examples["prompt_style = chat, target = letter_and_text"]
    assert shown.target == "B. Pancreas</s>" and len(gallery.examples) == 9
