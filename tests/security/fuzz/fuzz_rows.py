"""Coverage-guided fuzzing of the row loader: whatever bytes a file holds, it gives questions or a ValueError of one line.

    .venv/bin/python tests/security/fuzz/fuzz_rows.py -max_total_time=600 CORPUS     (needs the extra fuzz; `make fuzz` does both loaders)
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
KEYS = ["question", "opa", "opb", "opc", "opd", "cop", "id", "subject_name", "choice_type", "exp", "split", "topic_name", "data", "explanation"]
ODD = [None, True, False, "", "A", "d", "-1", "2.0", "nan", " B ", "1e400", float("inf"), 10**400]
TRICKS = ["a\0b", "\x1b[31m", "<script>", "\ud800", "\u202e", "\u2028", "$\\x$", "=1+1", "Question:", "\nAnswer: A"]
PLACE = scratch()


def value(fdp, depth=0):
    kind = fdp.ConsumeIntInRange(0, 11 if depth < 3 else 7)
    simple = {3: lambda: fdp.ConsumeIntInRange(-2, 6), 4: fdp.ConsumeFloat, 5: lambda: fdp.ConsumeInt(16), 6: lambda: fdp.PickValueInList(ODD), 7: lambda: fdp.PickValueInList(TRICKS)}
    if kind < 3:
        return fdp.ConsumeUnicode(fdp.ConsumeIntInRange(0, 24))
    if kind in simple:
        return simple[kind]()
    if kind < 10:
        return {fdp.PickValueInList(["Question", "Options", "Correct Option", "A", "B", "C", "D", "x"]): value(fdp, depth + 1) for _ in range(fdp.ConsumeIntInRange(0, 5))}
    return [value(fdp, depth + 1) for _ in range(fdp.ConsumeIntInRange(0, 3))]


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
    if suffix in (".json", ".jsonl"):
        return (json.dumps(rows) if suffix == ".json" else "\n".join(map(json.dumps, rows))).encode()
    try:
        if suffix == ".parquet":
            pq.write_table(pa.Table.from_pylist(rows), sink := io.BytesIO())
            return sink.getvalue()
        writer = csv.DictWriter(text := io.StringIO(), sorted({k for r in rows for k in r}))
        writer.writeheader()
        writer.writerows(rows)
        return text.getvalue().encode("utf-8", "surrogatepass")
    except (pa.ArrowException, UnicodeEncodeError, OverflowError, TypeError):
        return b""


def one(content: bytes):
    suffix, raw = SUFFIXES[content[0] % 4] if content else ".jsonl", content[1:]
    if content and content[0] & 4:
        fdp = atheris.FuzzedDataProvider(raw)
        raw = as_file([record(fdp) for _ in range(fdp.ConsumeIntInRange(1, 4))], suffix)
    file = PLACE / f"rows{suffix}"
    file.write_bytes(raw)
    try:
        loaded = questions.load_questions(str(file), label_base=("auto", "0", "1")[len(content) % 3])
    except ValueError as e:
        return check_message(e, file.name)
    for q in loaded.questions[:8]:
        for style in ("plain", "lm_eval"):
            assert prompts.render_prompt(q, style).encode()
        assert q.answer in (0, 1, 2, 3) and all(q.options) and questions.identity(q)
        json.dumps(q.id, ensure_ascii=False).encode()
    assert questions.describe(loaded.problems).isprintable() and len({q.id for q in loaded.questions}) == len(loaded.questions)
    questions.fingerprint(loaded.questions)
    leakage.drop_overlaps(loaded.questions[:20], loaded.questions[20:40], "near")
    explore.to_frame(loaded.questions)


if __name__ == "__main__":
    atheris.Setup(sys.argv, one)
    atheris.Fuzz()
