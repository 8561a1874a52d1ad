"""A folder appears complete or not at all, and has one writer at a time."""
import errno
import os
import signal
import subprocess
import sys
from unittest.mock import patch

import pytest
from conftest import ROOT

from medmcqa_lora.core import folders
from medmcqa_lora.core.folders import lock_folder, is_locked, unlock_folder, atomic_folder

HOLD = """
import sys
from pathlib import Path
from medmcqa_lora.core.folders import lock_folder
lock_folder(Path(sys.argv[1]))
print("held", flush=True)
input()
"""


@pytest.fixture
def other_process():
    """Starts a process that locks a path, and returns when it has the lock."""
    started = []

    def start(path):
        process = subprocess.Popen([sys.executable, "-c", HOLD, str(path)], cwd=ROOT, text=True,
                                   stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        started.append(process)
        assert process.stdout.readline() == "held\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_the_lock_ends_with_its_process(number, other_process, tmp_path):
    other = other_process(tmp_path)
    assert is_locked(tmp_path)
    with pytest.raises(ValueError, match="another process still writes there; wait for it"):
        lock_folder(tmp_path, patience=0)
    other.send_signal(number)
    other.wait()
    assert not is_locked(tmp_path)
    lock_folder(tmp_path, patience=0)
    unlock_folder(tmp_path)


def test_who_waits_gets_the_lock(other_process, tmp_path):
    other = other_process(tmp_path)
    other.stdin.write("\n")
    other.stdin.flush()
    lock_folder(tmp_path)
    assert not is_locked(tmp_path)  # by another process
    unlock_folder(tmp_path)


def test_a_lock_leaves_no_file_and_changes_none(other_process, tmp_path):
    file = tmp_path / "demo.json"
    file.write_text("{}")
    other_process(tmp_path)
    other_process(file)
    assert is_locked(file)
    assert list(tmp_path.iterdir()) == [file]
    assert file.read_text() == "{}"


def test_where_there_are_no_locks_nothing_is_locked(tmp_path):
    with patch.object(folders, "lock_descriptor", side_effect=OSError(errno.ENOLCK, "no locks")):
        lock_folder(tmp_path, patience=0)
        unlock_folder(tmp_path)
        assert not is_locked(tmp_path)


def test_release_of_what_is_not_locked(tmp_path):
    unlock_folder(tmp_path)
    assert not is_locked(tmp_path)


def test_a_refused_lock_leaves_no_open_file(other_process, tmp_path):
    other_process(tmp_path)
    before = len(os.listdir("/dev/fd"))
    assert is_locked(tmp_path)
    assert len(os.listdir("/dev/fd")) == before


@pytest.mark.parametrize("error", [KeyError("other"), KeyboardInterrupt("SIGTERM")])
def test_an_error_leaves_no_folder(error, tmp_path):
    with pytest.raises(type(error)):
        with atomic_folder(tmp_path / "c") as new:
            (new / "x").touch()
            raise error
    assert list(tmp_path.iterdir()) == []
