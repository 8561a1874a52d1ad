"""The shipped sample: 80 original questions, 4 for each of the 20 subjects."""
from collections import Counter

from conftest import REAL

from medmcqa_lora.data import identity, load_questions, read_file
from medmcqa_lora.recipe import shipped

FIELDS = ["id", "question", "opa", "opb", "opc", "opd", "cop", "choice_type", "exp", "subject_name", "topic_name", "split"]


def test_fields_and_counts():
    records = [r for _, r in read_file(shipped("assets/sample.jsonl"))]
    assert all(list(r) == FIELDS for r in records)
    loaded = load_questions("sample")
    assert (loaded.read, len(loaded.questions), loaded.problems, loaded.base) == (80, 80, {}, "0")
    assert set(Counter(q.subject for q in loaded.questions).values()) == {4} and len({q.subject for q in loaded.questions}) == 20
    assert Counter(q.split for q in loaded.questions) == {"train": 56, "validation": 24}
    assert set(Counter(q.answer for q in loaded.questions).values()) == {20}
    assert set(Counter(q.answer for q in loaded.questions if q.split == "validation").values()) == {6}
    assert all(q.explanation for q in loaded.questions)


def test_none_is_a_real_row():
    ours = {identity(q) for q in load_questions("sample").questions}
    for file in REAL.glob("*.jsonl"):
        assert not ours & {identity(q) for q in load_questions(str(file)).questions}
