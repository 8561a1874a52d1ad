"""Properties of three parsers on texts that hypothesis makes: rows, recipes, written answers."""
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
from pydantic import TypeAdapter  # noqa: E402

from medmcqa_lora.cli import error_line  # noqa: E402
from medmcqa_lora.core.recipe import (  # noqa: E402
    Recipe,
    RecipeError,
    parse_value,
    recipe_problems,
    recipe_types,
)
from medmcqa_lora.core.recipe_files import load_recipe, recipe_from  # noqa: E402
from medmcqa_lora.core.text import (  # noqa: E402
    csv_text,
    in_markdown,
    is_text,
    label,
    escape_braces,
    nearest_hint,
    shorten,
)
from medmcqa_lora.data.prompts import render_prompt  # noqa: E402
from medmcqa_lora.data.questions import describe_problems, question_hash, load_questions  # noqa: E402
from medmcqa_lora.data.schemas import LETTERS, detect_label_base  # noqa: E402
from medmcqa_lora.evaluation.generation import parse_letter  # noqa: E402

settings.register_profile(
    "here", max_examples=2000 if ALL else 100, deadline=None, derandomize=not ALL, database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
settings.load_profile("here")

# texts

ANY = st.text(st.characters(), max_size=40)  # surrogates and control characters, too
PRINTABLE = st.characters(
    exclude_categories=["Cs", "Cc", "Cf", "Zl", "Zp"], exclude_characters="\0")
PLAIN = st.text(PRINTABLE, min_size=1, max_size=40).map(str.strip).filter(bool)

# values

SIMPLE = st.none() | st.booleans() | st.integers() | st.floats() | ANY


def nested(inner):
    """Lists and objects of such values."""
    return st.lists(inner, max_size=3) | st.dictionaries(ANY, inner, max_size=3)


JSON = st.recursive(SIMPLE, nested, max_leaves=8)

# rows

KEYS = [
    "question", "opa", "opb", "opc", "opd", "cop", "id", "subject_name", "topic_name",
    "choice_type", "exp", "split", "data",
]
ROW = st.dictionaries(st.sampled_from(KEYS), JSON, max_size=13)
FAIR = st.fixed_dictionaries(
    dict(question=PLAIN, opa=PLAIN, opb=PLAIN, opc=PLAIN, opd=PLAIN, cop=st.integers(1, 4)),
    optional=dict(id=PLAIN, subject_name=PLAIN, exp=PLAIN))
FAIR_ROWS = st.lists(
    FAIR, min_size=1, max_size=5, unique_by=lambda row: (row["question"], row["opa"]))
FORMATS = ("json", "jsonl", "csv", "parquet")


@given(rows=st.lists(ROW | JSON, max_size=4), suffix=st.sampled_from([".json", ".jsonl"]))
def test_any_json_gives_questions_or_one_line(rows, suffix, tmp_path):
    file = tmp_path / f"rows{suffix}"
    text = json.dumps(rows) if suffix == ".json" else "\n".join(map(json.dumps, rows))
    file.write_text(text)
    check_questions_or_one_line(file)


@given(content=st.binary(max_size=400), suffix=st.sampled_from([f".{kind}" for kind in FORMATS]))
def test_any_bytes_give_questions_or_one_line(content, suffix, tmp_path):
    file = tmp_path / f"rows{suffix}"
    file.write_bytes(content)
    check_questions_or_one_line(file)


def check_questions_or_one_line(file):
    """A file gives usable questions, or an error of one line that names the file."""
    try:
        loaded = load_questions(str(file))
    except ValueError as e:
        text = error_line(e)
        assert file.name in text and text.isprintable() and len(text) <= 1300
        return
    assert len(loaded.questions) + loaded.dropped == loaded.read
    assert describe_problems(loaded.problems).isprintable()
    assert len({q.id for q in loaded.questions}) == len(loaded.questions)
    for q in loaded.questions:
        names = (q.id, q.subject, q.topic, q.choice_type, q.split)
        assert q.question and all(q.options) and q.answer in (0, 1, 2, 3)
        assert all(name.isprintable() for name in names)
        render_prompt(q, "plain").encode()


@given(rows=FAIR_ROWS)
def test_the_four_formats_say_the_same(rows, tmp_path):
    """What is in a row comes out, whichever file carried it."""
    rows = [dict.fromkeys(("id", "subject_name", "exp"), "") | row for row in rows]
    write_in_all_formats(rows, tmp_path)
    base = "1" if only_the_user_knows_the_base(rows) else "auto"
    found = [load_without_places(tmp_path / f"r.{kind}", base) for kind in FORMATS]
    assert found[0] == found[1] == found[2] == found[3]
    texts = ("question", "opa", "opb", "opc", "opd")
    read = [(q.question, *q.options, q.answer + 1) for q in found[0]]
    assert read == [(*(row[k] for k in texts), row["cop"]) for row in rows]


def write_in_all_formats(rows, folder):
    """The same rows as r.json, r.jsonl, r.csv and r.parquet."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    lines = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    table = io.StringIO()
    writer = csv.DictWriter(table, rows[0])
    writer.writeheader()
    writer.writerows(rows)
    (folder / "r.json").write_text(json.dumps(rows), encoding="utf-8")
    (folder / "r.jsonl").write_text(lines, encoding="utf-8")
    (folder / "r.csv").write_text(table.getvalue(), encoding="utf-8-sig")
    pq.write_table(pa.Table.from_pylist(rows), folder / "r.parquet")


def load_without_places(file, base):
    """A file's questions, without the place in it where each is."""
    return [replace(q, where="") for q in load_questions(str(file), label_base=base).questions]


def only_the_user_knows_the_base(rows) -> bool:
    """Whether no row shows how answers are counted."""
    return all(row["cop"] != 4 for row in rows)


COPS = st.sampled_from([None, "", "2", "2.0", 3.0, "A", "d", "nan", True, 1.5])


@given(
    st.lists(st.integers(-2, 6) | COPS | st.floats() | ANY, max_size=8),
    st.sampled_from(["auto", "0", "1"]),
)
def test_a_numbering_is_found_or_refused(cops, base):
    try:
        assert detect_label_base(cops, base) in ("0", "1", "letters")
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
        TypeAdapter(kind).validate_python(value, strict=True)


VALUES = {k: PLAIN if t is str else st.from_type(t) for k, t in recipe_types().items()}
ODD_VALUES = {k: JSON for k in ("seed", "lora_targets", "model")}


@given(st.fixed_dictionaries({}, optional=VALUES | ODD_VALUES))
def test_any_values_give_a_recipe_or_problems(values):
    recipe = Recipe(**values)
    found = recipe_problems(recipe)
    assert all(isinstance(p, str) and len(p) < 6000 for p in found)
    if found:
        return
    numbers = [v for v in asdict(recipe).values() if isinstance(v, float)]
    assert recipe_from(asdict(recipe)) == recipe
    assert all(math.isfinite(v) for v in numbers)


@given(
    content=ANY,
    overrides=st.dictionaries(st.sampled_from(list(recipe_types())) | ANY, ANY, max_size=4),
)
def test_any_ini_file_gives_a_recipe_or_one_line(content, overrides, tmp_path):
    file = tmp_path / "mine.ini"
    file.write_bytes(f"[a]\n{content}".encode("utf-8", "surrogatepass"))
    try:
        recipe = load_recipe(str(file), overrides)
    except RecipeError as e:
        assert error_line(e).isprintable() and len(error_line(e)) <= 1300
    else:
        assert recipe_problems(recipe) == []


TEXT_KEYS = st.sampled_from(["model", "data", "out", "lora_targets", "tokenizer"])


@given(
    st.dictionaries(TEXT_KEYS, ANY, min_size=1),
    st.floats(allow_nan=False, allow_infinity=False),
    st.integers(),
)
def test_papermill_carries_values_as_data(texts, number, integer):
    """papermill pastes values into a cell as Python: assignments of what was sent, no more."""
    from papermill.translators import PythonTranslator

    others = {"learning_rate": number, "seed": integer, "max_rows": None, "resume": True}
    values = texts | others | {"report_to": list(texts.values())}
    cell = ast.parse(PythonTranslator.codify(values, "Parameters"))
    assert all(isinstance(n, ast.Assign) for n in cell.body)
    assert {n.targets[0].id: ast.literal_eval(n.value) for n in cell.body} == values


@given(PLAIN)
def test_papermill_leaves_a_path_as_it_is(name):
    from papermill.parameterize import parameterize_path

    assert parameterize_path(escape_braces(name), dict(seed=1)) == name


@given(ANY, st.lists(ANY, max_size=4))
def test_a_hint_is_a_known_name(word, known):
    assert nearest_hint(word, known) in {"", *(f"; did you mean {k}?" for k in known)}


# answers that a model wrote

def distinct_options(unique_by):
    """Four option texts that differ."""
    return st.lists(PLAIN, min_size=4, max_size=4, unique_by=unique_by)


def without_extra_spaces(text: str) -> str:
    return " ".join(text.lower().split())


FORMS = [
    "{}", " {}", "{}.", "({})", "**{}**", "{}. {o}", "Answer: {}", "The correct answer is {}.",
    "Option {}", "{}\n\nQuestion: next?\nAnswer: A",
]
PIECES = ["A", "answer ", "(((", "answer is answer is ", "\"'*[(", " \n", "option (", "A B "]


@given(ANY, st.lists(ANY, min_size=4, max_size=4))
def test_a_written_answer_is_a_letter_or_none(text, options):
    assert parse_letter(text, tuple(options)) in (None, *LETTERS)


@given(st.sampled_from(LETTERS), st.sampled_from(FORMS), distinct_options(str.lower))
def test_forms_of_an_answer_are_read(letter, form, options):
    options = [f"option text {i} {o}" for i, o in enumerate(options)]
    answer = form.format(letter, o=options[LETTERS.index(letter)])
    assert parse_letter(answer, tuple(options)) == letter


@given(distinct_options(without_extra_spaces), st.integers(0, 3))
def test_an_option_written_out_is_its_letter(options, i):
    known = [o.strip().lower() for o in options]
    letter = LETTERS[known.index(options[i].strip().lower())]
    assert parse_letter(options[i], tuple(options)) == letter


@given(st.integers(1000, 20_000 if ALL else 3000), st.sampled_from(PIECES))
def test_a_long_answer_is_read_in_time(n, piece):
    """No pattern may take quadratic time or more to see that a text says nothing."""
    import time

    began = time.process_time()
    parse_letter(piece * n, ("a", "b", "c", "d"))
    assert time.process_time() - began < 2


# what is shown

@given(ANY)
def test_nothing_shown_is_obeyed(text):
    assert len(shorten(text * 50)) <= 1200 and label(text).isprintable()
    shown = in_markdown(text)
    assert shown.isprintable()
    assert all(shown[i - 1] == "\\" for i, c in enumerate(shown) if c in "<[]|`")


@given(st.lists(ANY.filter(lambda s: s and is_text(s)), min_size=1, max_size=3))
def test_no_cell_of_a_csv_file_is_a_formula(texts):
    import pandas as pd

    table = csv_text(pd.DataFrame({"a": texts, "b": -1.5}))
    rows = list(csv.reader(io.StringIO(table, newline="")))[1:]
    assert all(not row[0].startswith(("=", "+", "-", "@")) for row in rows)
    assert rows[0][1] == "-1.5"


@given(PLAIN.map(lambda s: s + "?"), st.lists(PLAIN, min_size=4, max_size=4))
def test_identity_ignores_white_space_alone(stem, options):
    from medmcqa_lora.data.questions import Question

    q = Question("", stem, tuple(options), 0)
    with_spaces = replace(q, question=f"  {stem}\n")
    with_a_letter = replace(q, question=f"x{stem}")
    assert question_hash(q) == question_hash(with_spaces) != question_hash(with_a_letter)
