"""Properties of the three parsers, on texts that hypothesis makes: rows, recipes, and answers
that a model wrote.
"""
import ast
import csv
import io
import json
import math
from dataclasses import asdict, replace

import pytest
from conftest import ALL

hypothesis = pytest.importorskip("hypothesis", reason="hypothesis is not installed (extra dev)")
from hypothesis import HealthCheck, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from medmcqa_lora.cli import one_line  # noqa: E402
from medmcqa_lora.data.schemas import LETTERS, settle_base
from medmcqa_lora.data.questions import describe, identity, load_questions
from medmcqa_lora.data.prompts import render_prompt  # noqa: E402
from medmcqa_lora.evaluation.generation import parse_letter  # noqa: E402
from medmcqa_lora.core.text import nearest
from medmcqa_lora.core.recipe import Recipe, RecipeError, fits, parse_value, problems, recipe_types
from medmcqa_lora.core.recipe_files import load_recipe, recipe_from  # noqa: E402
from medmcqa_lora.core.text import csv_text, in_markdown, is_text, label, literal, short  # noqa: E402

settings.register_profile("here", max_examples=2000 if ALL else 100, deadline=None, derandomize=not ALL, database=None,
                          suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
settings.load_profile("here")
ANY = st.text(st.characters(), max_size=40)  # surrogates and control characters, too
PLAIN = st.text(st.characters(exclude_categories=["Cs", "Cc", "Cf", "Zl", "Zp"], exclude_characters="\0"), min_size=1, max_size=40).map(str.strip).filter(bool)
JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | ANY, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(ANY, inner, max_size=3), max_leaves=8)
KEYS = ["question", "opa", "opb", "opc", "opd", "cop", "id", "subject_name", "topic_name", "choice_type", "exp", "split", "data"]
FAIR = st.fixed_dictionaries(dict(question=PLAIN, opa=PLAIN, opb=PLAIN, opc=PLAIN, opd=PLAIN, cop=st.integers(1, 4)), optional=dict(id=PLAIN, subject_name=PLAIN, exp=PLAIN))


# rows

@given(rows=st.lists(st.dictionaries(st.sampled_from(KEYS), JSON, max_size=13) | JSON, max_size=4), suffix=st.sampled_from([".json", ".jsonl"]))
def test_any_json_gives_questions_or_one_line(rows, suffix, tmp_path):
    file = tmp_path / f"rows{suffix}"
    file.write_text(json.dumps(rows) if suffix == ".json" else "\n".join(map(json.dumps, rows)))
    questions_or_one_line(file)


@given(content=st.binary(max_size=400), suffix=st.sampled_from([".json", ".jsonl", ".csv", ".parquet"]))
def test_any_bytes_give_questions_or_one_line(content, suffix, tmp_path):
    file = tmp_path / f"rows{suffix}"
    file.write_bytes(content)
    questions_or_one_line(file)


def questions_or_one_line(file):
    try:
        loaded = load_questions(str(file))
    except ValueError as e:
        assert file.name in (text := one_line(e)) and text.isprintable() and len(text) <= 1300
        return
    assert len(loaded.questions) + loaded.dropped == loaded.read and describe(loaded.problems).isprintable()
    assert len({q.id for q in loaded.questions}) == len(loaded.questions)
    for q in loaded.questions:
        assert q.question and all(q.options) and q.answer in (0, 1, 2, 3)
        assert all(name.isprintable() for name in (q.id, q.subject, q.topic, q.choice_type, q.split))
        render_prompt(q, "plain").encode()


@given(rows=st.lists(FAIR, min_size=1, max_size=5, unique_by=lambda r: (r["question"], r["opa"])))
def test_the_four_formats_say_the_same(rows, tmp_path):
    """What is in a row comes out, whichever file carried it."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [dict.fromkeys(("id", "subject_name", "exp"), "") | r for r in rows]
    (tmp_path / "r.json").write_text(json.dumps(rows), encoding="utf-8")
    (tmp_path / "r.jsonl").write_text("\n".join(json.dumps(r, ensure_ascii=False) for r in rows), encoding="utf-8")
    writer = csv.DictWriter(text := io.StringIO(), rows[0])
    writer.writeheader()
    writer.writerows(rows)
    (tmp_path / "r.csv").write_text(text.getvalue(), encoding="utf-8-sig")
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "r.parquet")
    found = [[replace(q, where="") for q in load_questions(str(tmp_path / f"r.{kind}"), label_base="1" if settled(rows) else "auto").questions] for kind in ("json", "jsonl", "csv", "parquet")]
    assert found[0] == found[1] == found[2] == found[3]
    assert [(q.question, *q.options, q.answer + 1) for q in found[0]] == [(*(r[k] for k in ("question", "opa", "opb", "opc", "opd")), r["cop"]) for r in rows]


def settled(rows) -> bool:
    """Whether only the user can say how answers are counted."""
    return all(r["cop"] != 4 for r in rows)


@given(st.lists(st.integers(-2, 6) | st.sampled_from([None, "", "2", "2.0", 3.0, "A", "d", "nan", True, 1.5]) | st.floats() | ANY, max_size=8), st.sampled_from(["auto", "0", "1"]))
def test_a_numbering_is_told_or_refused(cops, base):
    try:
        assert settle_base(cops, base) in ("0", "1", "letters")
    except ValueError as e:
        assert "label_base" in str(e)


# recipes

@given(st.sampled_from(list(recipe_types().values())), ANY)
def test_a_word_is_a_value_of_its_type_or_refused(kind, text):
    try:
        value = parse_value(text, kind)
    except ValueError as e:
        assert "is not" in str(e) and len(str(e)) < 500
    else:
        assert fits(value, kind)


VALUES = {k: st.from_type(t) if t is not str else PLAIN for k, t in recipe_types().items()}


@given(st.fixed_dictionaries({}, optional=VALUES | {k: JSON for k in ("seed", "lora_targets", "model")}))
def test_any_values_give_a_recipe_or_problems(values):
    found = problems(recipe := Recipe(**values))
    assert all(isinstance(p, str) and len(p) < 6000 for p in found)
    if not found:
        assert recipe_from(asdict(recipe)) == recipe
        assert all(not isinstance(v, float) or math.isfinite(v) for v in asdict(recipe).values())


@given(content=ANY, overrides=st.dictionaries(st.sampled_from(list(recipe_types())) | ANY, ANY, max_size=4))
def test_any_ini_file_gives_a_recipe_or_one_line(content, overrides, tmp_path):
    (tmp_path / "mine.ini").write_bytes(f"[a]\n{content}".encode("utf-8", "surrogatepass"))
    try:
        recipe = load_recipe(str(tmp_path / "mine.ini"), overrides)
    except RecipeError as e:
        assert one_line(e).isprintable() and len(one_line(e)) <= 1300
    else:
        assert problems(recipe) == []


@given(st.dictionaries(st.sampled_from(["model", "data", "out", "lora_targets", "tokenizer"]), ANY, min_size=1), st.floats(allow_nan=False, allow_infinity=False), st.integers())
def test_papermill_carries_values_as_data(texts, number, whole):
    """papermill pastes values into a cell as Python: what arrives is what was sent, and nothing
    but assignments.
    """
    from papermill.translators import PythonTranslator

    values = texts | {"learning_rate": number, "seed": whole, "report_to": list(texts.values()), "max_rows": None, "resume": True}
    cell = ast.parse(PythonTranslator.codify(values, "Parameters"))
    assert all(isinstance(n, ast.Assign) for n in cell.body)
    assert {n.targets[0].id: ast.literal_eval(n.value) for n in cell.body} == values


@given(PLAIN)
def test_papermill_leaves_a_path_as_it_is(name):
    from papermill.parameterize import parameterize_path

    assert parameterize_path(literal(name), dict(seed=1)) == name


@given(ANY, st.lists(ANY, max_size=4))
def test_a_hint_is_a_known_name(word, known):
    assert nearest(word, known) in {"", *(f"; did you mean {k}?" for k in known)}


# answers that a model wrote

@given(ANY, st.lists(ANY, min_size=4, max_size=4))
def test_a_written_answer_is_a_letter_or_none(text, options):
    assert parse_letter(text, tuple(options)) in (None, *LETTERS)


@given(st.sampled_from(LETTERS), st.sampled_from(["{}", " {}", "{}.", "({})", "**{}**", "{}. {o}", "Answer: {}", "The correct answer is {}.", "Option {}", "{}\n\nQuestion: next?\nAnswer: A"]), st.lists(PLAIN, min_size=4, max_size=4, unique_by=str.lower))
def test_forms_of_an_answer_are_read(letter, form, options):
    options = [f"option text {i} {o}" for i, o in enumerate(options)]
    assert parse_letter(form.format(letter, o=options[LETTERS.index(letter)]), tuple(options)) == letter


@given(st.lists(PLAIN, min_size=4, max_size=4, unique_by=lambda s: " ".join(s.lower().split())), st.integers(0, 3))
def test_an_option_written_out_is_its_letter(options, i):
    assert parse_letter(options[i], tuple(options)) == LETTERS[[o.strip().lower() for o in options].index(options[i].strip().lower())]


@given(st.integers(1000, 20_000 if ALL else 3000), st.sampled_from(["A", "answer ", "(((", "answer is answer is ", "\"'*[(", " \n", "option (", "A B "]))
def test_a_long_answer_is_read_in_time(n, piece):
    """No pattern may take quadratic time or more to see that a text says nothing."""
    import time

    began = time.process_time()
    parse_letter(piece * n, ("a", "b", "c", "d"))
    assert time.process_time() - began < 2


# what is shown

@given(ANY)
def test_nothing_shown_is_obeyed(text):
    assert len(short(text * 50)) <= 1200 and label(text).isprintable()
    shown = in_markdown(text)
    assert shown.isprintable() and all(c not in "<[]|`" or shown[i - 1] == "\\" for i, c in enumerate(shown))


@given(st.lists(ANY.filter(lambda s: s and is_text(s)), min_size=1, max_size=3))
def test_no_cell_of_a_csv_file_is_a_formula(texts):
    import pandas as pd

    rows = list(csv.reader(io.StringIO(csv_text(pd.DataFrame({"a": texts, "b": -1.5})), newline="")))
    assert all(not r[0].startswith(("=", "+", "-", "@")) for r in rows[1:]) and rows[1][1] == "-1.5"


@given(PLAIN.map(lambda s: s + "?"), st.lists(PLAIN, min_size=4, max_size=4))
def test_identity_ignores_white_space_alone(stem, options):
    from medmcqa_lora.data.questions import Question

    q = Question("", stem, tuple(options), 0)
    assert identity(q) == identity(replace(q, question=f"  {stem}\n")) != identity(replace(q, question=f"x{stem}"))
