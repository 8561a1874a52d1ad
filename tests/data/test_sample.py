"""The shipped sample: 240 original questions, 12 for each of the 20 subjects."""
import json
from collections import Counter

from conftest import REAL

from medmcqa_lora.data.sources import read_file
from medmcqa_lora.data.questions import identity, load_questions
from medmcqa_lora.core.files import shipped

FIELDS = ["id", "question", "opa", "opb", "opc", "opd", "cop", "choice_type", "exp", "subject_name", "topic_name", "split"]


def test_fields_and_counts():
    records = [r for _, r in read_file(shipped("assets/sample.jsonl"))]
    assert all(list(r) == FIELDS for r in records)
    loaded = load_questions("sample")
    assert (loaded.read, len(loaded.questions), loaded.problems, loaded.base) == (240, 240, {}, "0")
    subjects = Counter(q.subject for q in loaded.questions)
    assert set(subjects) == set(json.loads((REAL.parent / "seed_results.json").read_text())["by_subject_percent"]) if REAL.exists() else len(subjects) == 20
    assert Counter((q.subject, q.split) for q in loaded.questions) == {(s, split): n for s in subjects for split, n in (("train", 8), ("validation", 4))}
    assert Counter((q.split, q.answer) for q in loaded.questions) == {(split, i): n for i in range(4) for split, n in (("train", 40), ("validation", 20))}
    assert all(q.explanation for q in loaded.questions)


def test_none_is_a_real_row():
    ours = {identity(q) for q in load_questions("sample").questions}
    for file in REAL.glob("*.jsonl"):
        assert not ours & {identity(q) for q in load_questions(str(file)).questions}


def test_the_right_answer_does_not_stand_out():
    """Always taking the longest option must not beat chance by much, or a model could learn that."""
    questions = load_questions("sample").questions
    longest = sum(max(range(4), key=lambda i: len(q.options[i])) == q.answer for q in questions)
    assert longest / len(questions) < 0.35
