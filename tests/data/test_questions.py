"""Schemas and questions: fields, answers, names, and the problems of a set."""
from dataclasses import replace

import pytest

from medmcqa_lora.data.questions import Question, describe_problems, to_question
from medmcqa_lora.data.schemas import _nested, check_fields, flatten_record, detect_label_base

ROW = dict(question="?", opa=1, opb=2.5, opc=None, opd="x", cop=1, other=["not read"])
Q = Question("q1", "Which organ makes insulin?", ("Liver", "Pancreas", "Spleen", "Kidney"), 1)


@pytest.mark.parametrize("value, kind", [
    (["a"], "list"), ({"a": 1}, "dict"), (b"\x80\x04", "bytes"), (("a",), "tuple"),
])
def test_a_field_that_is_no_text(value, kind):
    with pytest.raises(ValueError, match=f"line 7: field opb is {kind}, not text"):
        check_fields(ROW | {"opb": value}, "line 7")


def test_a_field_that_is_too_long():
    with pytest.raises(ValueError, match="line 8: field question has 200,000 characters"):
        check_fields(ROW | {"question": "x" * 200_000}, "line 8")


def test_rows_of_neither_schema():
    with pytest.raises(ValueError, match="line 2: field data.Options is missing"):
        _nested({"data": "not JSON"}, "line 2")
    with pytest.raises(ValueError, match="data.Options"):
        flatten_record({"data": {"Question": "?"}}, "line 2")
    with pytest.raises(ValueError, match="field data.Options.D is missing"):
        flatten_record({"data": {"Options": dict(A="1", B="2", C="3")}}, "line 2")
    with pytest.raises(ValueError, match="field data.Question is missing"):
        flatten_record({"data": {"Options": dict(A="1", B="2", C="3", D="4")}}, "line 2")
    with pytest.raises(ValueError, match="line 3: is list, not an object"):
        flatten_record(["?"], "line 3")


def test_numberings_that_contradict():
    with pytest.raises(ValueError, match="mixed"):
        detect_label_base([0, 4])
    with pytest.raises(ValueError, match="it counts from 1; set label_base = 1 or auto"):
        detect_label_base([1, 2, 3, 4], label_base="0")
    with pytest.raises(ValueError, match="it counts from 0; set label_base = 0 or auto"):
        detect_label_base([0, 1, 2, 3], label_base="1")
    assert detect_label_base([0, 4], label_base="1") == "1" and detect_label_base([None, -1]) == "0"


def test_names_without_control_characters():
    """The model sees the stem as it is; ids and subjects are only shown."""
    row = ROW | dict(subject_name="\x1b]0;owned\x07ENT", id="q\u202e1", question="\x1b[2JWhich?")
    q = to_question(row, "line 1", "1")
    assert (q.subject, q.id, q.question) == ("]0;owned ENT", "q 1", "\x1b[2JWhich?")


def test_description_of_problems():
    assert describe_problems({"empty option": [Q] * 4}).count("q1") == 3
    escape = replace(Q, id="q\x1b[2J")
    assert describe_problems({"empty option": [escape]}) == "empty option: 1 ( q [2J)"
