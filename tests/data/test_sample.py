"""The shipped sample: 240 original questions, 12 for each of the 20 subjects."""
import json
from collections import Counter

from conftest import REAL

from medmcqa_lora.core.files import shipped_file
from medmcqa_lora.data.questions import question_hash, load_questions
from medmcqa_lora.data.sources import read_file

FIELDS = ["id", "question", "opa", "opb", "opc", "opd", "cop", "choice_type", "exp",
          "subject_name", "topic_name", "split"]


def test_fields_and_counts():
    records = [r for _, r in read_file(shipped_file("assets/sample.jsonl"))]
    assert all(list(r) == FIELDS for r in records)
    loaded = load_questions("sample")
    assert (loaded.read, len(loaded.questions)) == (240, 240)
    assert (loaded.problems, loaded.base) == ({}, "0")
    assert all(q.explanation for q in loaded.questions)


def test_subjects():
    questions = load_questions("sample").questions
    subjects = {q.subject for q in questions}
    if REAL.exists():
        published = json.loads((REAL.parent / "seed_results.json").read_text())
        assert subjects == set(published["by_subject_percent"])
    assert len(subjects) == 20
    sizes = {"train": 8, "validation": 4}
    expected = {(subject, split): n for subject in subjects for split, n in sizes.items()}
    assert Counter((q.subject, q.split) for q in questions) == expected


def test_correct_letters_are_balanced():
    questions = load_questions("sample").questions
    sizes = {"train": 40, "validation": 20}
    expected = {(split, i): n for split, n in sizes.items() for i in range(4)}
    assert Counter((q.split, q.answer) for q in questions) == expected


def test_none_is_a_real_row():
    ours = {question_hash(q) for q in load_questions("sample").questions}
    for file in REAL.glob("*.jsonl"):
        assert not ours & {question_hash(q) for q in load_questions(str(file)).questions}


def longest_option(q) -> int:
    return max(range(4), key=lambda i: len(q.options[i]))


def test_the_right_answer_does_not_stand_out():
    """Always taking the longest option must not beat chance by much: a model could learn that."""
    questions = load_questions("sample").questions
    hits = sum(longest_option(q) == q.answer for q in questions)
    assert hits / len(questions) < 0.35
