"""Coverage-guided fuzzing of the row loader.

Whatever bytes a file holds, the loader gives questions or a ValueError of one line.

    .venv/bin/python tests/security/fuzz/fuzz_rows.py -max_total_time=600 CORPUS

It needs the extra fuzz; `make fuzz` runs both loaders.
"""
import csv
import io
import json
import sys

import atheris
from common import check_message, scratch

with atheris.instrument_imports(include=["medmcqa_lora", "csv"]):
    from medmcqa_lora.data import explore, leakage, prompts, questions
import pyarrow as pa
import pyarrow.parquet as pq

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
KEYS = [
    "question", "opa", "opb", "opc", "opd", "cop", "id", "subject_name", "choice_type", "exp",
    "split", "topic_name", "data", "explanation",
]
INNER_KEYS = ["Question", "Options", "Correct Option", "A", "B", "C", "D", "x"]
ODD = [
    None, True, False, "", "A", "d", "-1", "2.0", "nan", " B ", "1e400", float("inf"), 10**400,
]
TRICKS = [
    "a\0b", "\x1b[31m", "<script>", "\ud800", "\u202e", "\u2028", "$\\x$", "=1+1", "Question:",
    "\nAnswer: A",
]
PLACE = scratch()


def value(fdp, depth=0):
    """A value as JSON has it: a text, a number, something odd, an object or a list."""
    kind = fdp.ConsumeIntInRange(0, 11 if depth < 3 else 7)
    if kind < 3:
        return fdp.ConsumeUnicode(fdp.ConsumeIntInRange(0, 24))
    if kind < 8:
        return simple_value(fdp, kind)
    if kind < 10:
        size = fdp.ConsumeIntInRange(0, 5)
        return {fdp.PickValueInList(INNER_KEYS): value(fdp, depth + 1) for _ in range(size)}
    return [value(fdp, depth + 1) for _ in range(fdp.ConsumeIntInRange(0, 3))]


def simple_value(fdp, kind: int):
    """A number, or one of the texts and values that broke something once."""
    if kind == 3:
        return fdp.ConsumeIntInRange(-2, 6)
    if kind == 4:
        return fdp.ConsumeFloat()
    if kind == 5:
        return fdp.ConsumeInt(16)
    return fdp.PickValueInList(ODD if kind == 6 else TRICKS)


def record(fdp) -> dict:
    """A row as MedMCQA has them, with some fields spoilt, lost or added."""
    row = dict(question="q?", opa="1", opb="2", opc="3", opd="4", cop=fdp.ConsumeIntInRange(0, 4))
    if fdp.ConsumeProbability() < 0.2:
        row = dict(data=dict(Question="q?", Options=dict(A="1", B="2", C="3", D="4")))
    for _ in range(fdp.ConsumeIntInRange(0, 4)):
        row[fdp.PickValueInList(KEYS)] = value(fdp)
    for _ in range(fdp.ConsumeIntInRange(0, 1)):
        row.pop(fdp.PickValueInList(KEYS), None)
    return row


def as_file(rows: list[dict], suffix: str) -> bytes:
    """Such rows as a file of that kind; b"" where it can't hold them."""
    if suffix == ".json":
        return json.dumps(rows).encode()
    if suffix == ".jsonl":
        return "\n".join(map(json.dumps, rows)).encode()
    try:
        return as_parquet(rows) if suffix == ".parquet" else as_csv(rows)
    except (pa.ArrowException, UnicodeEncodeError, OverflowError, TypeError):
        return b""


def as_parquet(rows: list[dict]) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), sink)
    return sink.getvalue()


def as_csv(rows: list[dict]) -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(text, sorted({key for row in rows for key in row}))
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode("utf-8", "surrogatepass")


def one(content: bytes):
    """Load a file; the first byte chooses its format, and with 4 added the rest becomes rows."""
    suffix = SUFFIXES[content[0] % 4] if content else ".jsonl"
    raw = content[1:]
    if content and content[0] & 4:
        fdp = atheris.FuzzedDataProvider(raw)
        raw = as_file([record(fdp) for _ in range(fdp.ConsumeIntInRange(1, 4))], suffix)
    file = PLACE / f"rows{suffix}"
    file.write_bytes(raw)
    base = ("auto", "0", "1")[len(content) % 3]
    try:
        loaded = questions.load_questions(str(file), label_base=base)
    except ValueError as e:
        return check_message(e, file.name)
    check_usable(loaded)


def check_usable(loaded):
    """Questions can be rendered, written, counted and compared."""
    for q in loaded.questions[:8]:
        for style in ("plain", "lm_eval"):
            assert prompts.render_prompt(q, style).encode()
        assert q.answer in (0, 1, 2, 3) and all(q.options) and questions.question_hash(q)
        json.dumps(q.id, ensure_ascii=False).encode()
    assert questions.describe_problems(loaded.problems).isprintable()
    assert len({q.id for q in loaded.questions}) == len(loaded.questions)
    questions.fingerprint(loaded.questions)
    leakage.drop_overlaps(loaded.questions[:20], loaded.questions[20:40], "near")
    explore.to_frame(loaded.questions)


if __name__ == "__main__":
    atheris.Setup(sys.argv, one)
    atheris.Fuzz()
