"""Reading files, the hub and the sample: what is refused, and in which words."""
import io
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from medmcqa_lora.data.sources import (
    _csv_records,
    _json_records,
    _parquet_records,
    read_file,
    read_source,
)


def refused(read, *args, message):
    with pytest.raises(ValueError) as e:
        read(*args)
    assert message in str(e.value)


def test_a_json_array_may_follow_blank_lines():
    assert _json_records(io.StringIO('\n [{"a": 1}]'), "x.json") == [("row 1", {"a": 1})]


def test_a_broken_json_line_is_named():
    cut = io.StringIO('{"a": 1}\n{"a": ')
    refused(_json_records, cut, "x.jsonl", message="x.jsonl: line 2 is not JSON")
    repeated = io.StringIO('{"opa": "Liver", "opa": "Spleen"}')
    refused(_json_records, repeated, "x.jsonl",
            message="line 1 is not JSON (the key 'opa' stands twice")


def test_two_columns_of_one_name(tmp_path):
    file = io.StringIO("id,opa,opa\n7,a,b\n")
    refused(_csv_records, file, "x.csv", message="two columns are called opa")
    path = tmp_path / "two.parquet"  # Arrow itself refuses them
    pq.write_table(pa.Table.from_arrays([pa.array(["x"])] * 2, ["opa", "opa"]), path)
    refused(_parquet_records, path, message="Multiple matches for FieldRef.Name(opa)")


def test_a_csv_row_with_too_many_fields():
    file = io.StringIO("id,opa\n7,a,b\n")
    refused(_csv_records, file, "x.csv", message="line 2 is not CSV (1 fields more than the header")


def test_a_byte_order_mark_is_skipped(tmp_path):
    (tmp_path / "bom.csv").write_text("question,cop\nWhich?,2\n", encoding="utf-8-sig")
    assert read_file(tmp_path / "bom.csv") == [("line 2", {"question": "Which?", "cop": "2"})]


BROKEN = {
    "array.json": (b'[{"a": 1},\n {"a": ]', "array.json: line 2 is not JSON (Expecting value)"),
    "repeated.json": (b'[{"a": 1, "a": 2}]', "repeated.json: a row is not JSON (the key 'a'"),
    "deep.json": (b"[" * 200_000, "deep.json: nested too deeply; give an array of flat rows"),
    "latin.csv": ("na\xefve".encode("latin-1"), "latin.csv: byte 2 is not UTF-8; save the file as"),
    "empty.jsonl": (b"\n", "empty.jsonl: holds no rows; give a file with questions"),
    "rows.txt": (b"x", "rows.txt: can't tell its format; use .json, .jsonl, .csv, .parquet"),
    "line.jsonl": (b"{", "line 1 is not JSON"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_described_in_words(name, tmp_path):
    content, message = BROKEN[name]
    (tmp_path / name).write_bytes(content)
    refused(read_file, tmp_path / name, message=message)


def test_what_is_no_file(tmp_path):
    (tmp_path / "folder.csv").mkdir()
    refused(read_file, tmp_path / "folder.csv", message="is not a file")
    refused(read_file, Path("a\0b.csv"), message="holds a NUL, which no file's name does")
    refused(read_file, tmp_path / "none.csv", message="can't be read (No such file or directory)")
    refused(read_source, " ", message="is empty; name a file")


def test_a_file_without_splits_is_one_set(tmp_path):
    rows = [{"question": "Which?"}, {"question": "Why?"}]
    (tmp_path / "x.json").write_text(json.dumps(rows))
    assert [row for _, row in read_source(str(tmp_path / "x.json"), "validation")] == rows
