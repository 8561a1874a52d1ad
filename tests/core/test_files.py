"""Files are complete or not there, and errors of a disk are recognised."""
import errno
import json
import math

import pytest

from medmcqa_lora.core.files import append_line, read_lines, trim_lines, why_refused, write_json


@pytest.mark.parametrize("error", [
    KeyError("a"),
    FileNotFoundError(errno.ENOENT, "x"),
    RuntimeError("CUDA error"),
])
def test_other_errors_are_not_taken_for_a_refusing_disk(error):
    assert why_refused(error) == ""


@pytest.mark.parametrize("value", [object(), math.nan])
def test_a_value_that_json_cannot_hold_leaves_the_old_file(value, tmp_path):
    file = write_json(tmp_path / "a.json", {"accuracy": 0.5})
    with pytest.raises((TypeError, ValueError)):
        write_json(file, {"accuracy": value})
    assert json.loads(file.read_text()) == {"accuracy": 0.5}
    assert list(tmp_path.iterdir()) == [file]


def test_a_missing_log_has_no_lines(tmp_path):
    log = tmp_path / "none.jsonl"
    assert read_lines(log) == []
    assert trim_lines(log) == []
    assert not log.exists()


@pytest.mark.parametrize("line, message", [("step 2", "is not JSON"), ("[2]", "is no JSON object")])
def test_a_broken_line_in_the_middle_is_an_error(line, message, tmp_path):
    log = tmp_path / "log.jsonl"
    log.write_text(f'{{"step": 1}}\n{line}\n{{"step": 3}}\n')
    with pytest.raises(ValueError, match=f"line 2 {message}; the file was changed"):
        read_lines(log)


def test_a_torn_line_is_dropped_before_the_next_one(tmp_path):
    log = tmp_path / "log.jsonl"
    append_line(log, {"step": 1})
    with open(log, "a") as file:
        file.write('{"step": 2, "lo')
    assert trim_lines(log) == [{"step": 1}]
    append_line(log, {"step": 2})
    assert read_lines(log) == [{"step": 1}, {"step": 2}]
