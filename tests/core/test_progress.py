"""The heartbeat, the log's lines and the bar."""
import io
import time
from contextlib import redirect_stderr
from types import SimpleNamespace
from unittest import mock

import pytest

from medmcqa_lora.core.progress import (
    HEARTBEAT,
    Display,
    Heartbeat,
    Progress,
    begin_heartbeat,
    cell_ended,
    read_heartbeat,
    report_run,
    write_heartbeat,
)


@pytest.fixture(autouse=True)
def own_display():
    """What a test shows, the next one doesn't."""
    with mock.patch.multiple(Display, mode="bar", heart=None):
        yield


@pytest.mark.parametrize("content", ['{"state": "trai', "[1]", "\xff", "[" * 100_000])
def test_a_torn_heartbeat(content, tmp_path):
    (tmp_path / HEARTBEAT).write_bytes(content.encode("latin1"))
    with pytest.raises(ValueError, match="is torn, or not JSON"):
        read_heartbeat(tmp_path)


def test_a_heartbeat_that_cannot_be_written_is_no_error(tmp_path):
    write_heartbeat(tmp_path / "missing", {})
    assert list(tmp_path.iterdir()) == []


def test_nothing_temporary_is_left(tmp_path):
    heart = Heartbeat(tmp_path, "training", every=0.02)
    heart.begin()
    time.sleep(0.1)
    heart.end("finished")
    time.sleep(0.1)
    assert [p.name for p in tmp_path.iterdir()] == [HEARTBEAT]
    assert read_heartbeat(tmp_path)["state"] == "finished"


def test_the_last_state_that_another_process_wrote_stays(tmp_path):
    heart = Heartbeat(tmp_path, "training", every=0.05)
    heart.begin()
    write_heartbeat(tmp_path, dict(state="failed", pid=0, cause="rank 1: broken"))
    time.sleep(0.3)
    assert read_heartbeat(tmp_path)["cause"] == "rank 1: broken"
    heart.stopped.set()


@pytest.mark.parametrize("error, state, cause", [
    (ValueError("a:\n b"), "failed", "a: b"),
    (RuntimeError("a"), "failed", "RuntimeError: a"),
    (KeyboardInterrupt(), "interrupted", "KeyboardInterrupt: "),
])
def test_a_cell_that_raises_ends_the_heartbeat(error, state, cause, tmp_path):
    begin_heartbeat(tmp_path, "training", SimpleNamespace(first=True, launched=True))
    cell_ended(SimpleNamespace(error_in_exec=error))
    facts = read_heartbeat(tmp_path)
    assert (facts["state"], facts["cause"].strip()) == (state, cause.strip())


@pytest.mark.parametrize("first, launched, quiet, mode", [
    (True, True, False, "lines"),
    (True, False, False, "bar"),
    (True, True, True, "none"),
    (False, True, False, "none"),
])
def test_what_a_process_shows(first, launched, quiet, mode, tmp_path):
    world = SimpleNamespace(first=first, launched=launched)
    begin_heartbeat(tmp_path, "training", world, quiet)
    assert Display.mode == mode
    assert (Display.heart is not None) == first
    if Display.heart:
        Display.heart.end("finished")


def test_quiet_work_shows_nothing():
    with redirect_stderr(io.StringIO()) as log:
        work = Progress("train", 4, "step", quiet=True)
        work.update(4)
        work.close()
    assert log.getvalue() == ""


@pytest.mark.parametrize("error, state, cause", [
    (None, "finished", ""),
    (RuntimeError("rank 1: out of\nmemory"), "failed", "rank 1: out of memory"),
    (RuntimeError(), "failed", "RuntimeError"),
    (InterruptedError("told to stop"), "interrupted", "told to stop"),
])
def test_what_the_launching_process_reports(error, state, cause, tmp_path):
    try:
        with report_run(tmp_path / "run", "training", InterruptedError):
            assert read_heartbeat(tmp_path / "run")["state"] == "starting"
            if error:
                raise error
    except (RuntimeError, InterruptedError) as e:
        assert e is error
    facts = read_heartbeat(tmp_path / "run")
    assert (facts["state"], facts["cause"]) == (state, cause)


def test_only_the_first_host_reports(tmp_path):
    with report_run(tmp_path / "run", "training", InterruptedError, first=False):
        pass
    assert not (tmp_path / "run").exists()
