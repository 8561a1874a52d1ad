"""What a run shows while it runs and what its status says, from outside: at work, silent, killed,
failed, finished."""
import json
import math
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import nbformat
import pytest
from conftest import ALL, ROOT, processes_with
from helpers import COMMAND, start

from medmcqa_lora.core.files import append_line, write_json
from medmcqa_lora.core.progress import (
    HEARTBEAT,
    PROGRESS_LINE,
    end_elsewhere,
    process_identity,
    write_heartbeat,
)
from medmcqa_lora.core.recipe_files import load_recipe
from medmcqa_lora.launch import status
from medmcqa_lora.launch.launcher import launch_train
from medmcqa_lora.launch.status import EXIT_CODES, is_alive, read_status, read_valid_beat, state_of

BEAT = dict(state="training", kind="training", doing="train", unit="step", step=3, steps=10)


def start_toy(folder: Path, *settings: str, **popen) -> subprocess.Popen:
    """A toy run in processes of its own, marked so that all of them can be found."""
    train = ["train", "--recipe", "toy", "-p", "save_steps", "10", *settings, "--out", str(folder)]
    environment = os.environ | dict(MARK=str(folder), OMP_NUM_THREADS="1")
    return start([*COMMAND, *train], cwd=ROOT, start_new_session=True, env=environment, **popen)


def wait_until(holds, seconds: float = 150):
    """What `holds` gives when it is true."""
    end = time.time() + seconds
    while not (found := holds()):
        assert time.time() < end, "it didn't come"
        time.sleep(0.2)
    return found


def at_work(folder: Path) -> dict | None:
    """A run's status, if it is training and has made a step."""
    if not (folder / HEARTBEAT).exists():
        return None
    found = read_status(folder)
    return found if found["doing"] == "train" and found["step"] else None


def in_state(folder: Path, state: str) -> dict | None:
    """A run's status, if it is in a state."""
    found = read_status(folder)
    return found if found["state"] == state else None


def kill_all(mark: str) -> None:
    """The processes of this test, by their ids."""
    for line in processes_with(mark):
        os.kill(int(line.partition(":")[0]), signal.SIGKILL)


def check_running(folder: Path, started: subprocess.Popen, cli) -> int:
    """The status of a run that trains; the id of its process."""
    wait_until(lambda: (folder / HEARTBEAT).exists())
    assert read_status(folder)["state"] == "running"  # from its first second
    found = wait_until(lambda: at_work(folder))
    expected = dict(state="running", steps=60, alive=True, kind="training", unit="step")
    assert {k: found[k] for k in expected} == expected
    assert found["heartbeat_age_s"] < 15 and found["pid"] != started.pid
    assert found["tokens_per_s"] > 0 and found["loss"] > 0 and found["seconds_left"] > 0
    code, out, _ = cli("status", folder, "--json")
    assert code == 0 and json.loads(out)["state"] == "running"
    return found["pid"]


def check_stalled(folder: Path, pid: int, cli) -> None:
    """The status of a run whose process is stopped for a while."""
    os.kill(pid, signal.SIGSTOP)
    with patch.object(status, "SILENCE_LIMIT", 5.0):
        stalled = wait_until(lambda: in_state(folder, "stalled"))
        assert stalled["alive"] and "no heartbeat for 0:00:0" in stalled["cause"]
        code, out, _ = cli("status", folder)
        assert code == EXIT_CODES["stalled"] and "alive" in out
    os.kill(pid, signal.SIGCONT)


def test_from_its_start_to_its_end(tmp_path, cli):
    """Running, stalled while its process is stopped, finished; the log has plain lines of progress
    and no redrawn ones."""
    folder = tmp_path / "run"
    with open(tmp_path / "log", "w") as log:
        started = start_toy(folder, "-p", "max_steps", "60", stdout=log, stderr=subprocess.STDOUT)
        try:
            check_stalled(folder, check_running(folder, started, cli), cli)
            assert started.wait(200) == 0
        finally:
            kill_all(str(folder))
    code, out, _ = cli("status", folder)
    assert code == 0 and "last checkpoint: checkpoints/checkpoint-60" in out
    assert out.startswith(f"{folder}: finished\ntrain: step 60 of 60 (100%), loss ")
    text = (tmp_path / "log").read_text()
    assert "\r" not in text and "\x1b" not in text
    last = r"^train: step 60 of 60 \(100%\), loss [\d.]+, [\d,]+ tokens/s, 0:00:00 left$"
    assert re.search(last, text, re.M)
    cells = nbformat.read(folder / "train.ipynb", 4).cells
    shown = "".join(o.get("text", "") for c in cells for o in c.get("outputs", []))
    assert "train: step 60 of 60" in shown and "\r" not in shown and "it/s" not in shown


def test_quiet(tmp_path, cli):
    """Nothing on the terminal; the notebook has it all, and the heartbeat has the rest. An
    evaluation has a status as well."""
    folder = tmp_path / "base"
    limits = ["--limit", "8", "--quiet"]
    command = [*COMMAND, "evaluate", "--recipe", "toy", *limits, "--out", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert "predictions: question 8 of 8 (100%), " not in done.stderr
    code, out, _ = cli("status", folder, "--json")
    found = json.loads(out)
    expected = dict(state="finished", kind="evaluation", step=8, unit="question", checkpoint=None)
    assert code == 0 and {k: found[k] for k in expected} == expected
    (folder / HEARTBEAT).unlink()
    assert read_status(folder)["state"] == "finished"  # by its summary


@pytest.mark.skipif(not ALL, reason="make test-all; launch.status has the rule")
def test_killed_outright(tmp_path, cli):
    folder = tmp_path / "run"
    quiet = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    start_toy(folder, "-p", "max_steps", "2000", **quiet)
    try:
        wait_until(lambda: at_work(folder))
    finally:
        kill_all(str(folder))
    found = wait_until(lambda: in_state(folder, "interrupted"))
    assert not found["alive"] and "is gone and said nothing" in found["cause"] and found["step"]
    code, out, _ = cli("status", folder)
    assert code == 4 and "it continues with the same command and --resume" in out


@pytest.mark.skipif(not ALL, reason="make test-all; core.progress has the rule")
@pytest.mark.parametrize("nproc", ["1", "2"])
def test_failed_with_its_cause(tmp_path, cli, nproc):
    folder = tmp_path / "run"
    diverges = dict(learning_rate=1e5, warmup_steps=0, lr_scheduler_type="constant",
                    logging_steps=1)
    settings = [word for k, v in diverges.items() for word in ("-p", k, v)]
    processes = ["--nproc-per-node", nproc]
    code, _, _ = cli("train", "--recipe", "toy", *settings, *processes, "--out", folder)
    assert code == 1
    time.sleep(3)  # no process of the run, should one still be there, writes over it
    code, out, _ = cli("status", folder)
    assert code == 3 and re.match(rf"{folder}: failed: rank \d: step \d+: the loss", out)


def read_terminal(process: subprocess.Popen, terminal: int) -> str:
    """All that a process shows on a terminal until it ends."""
    seen = b""
    while process.poll() is None or select.select([terminal], [], [], 0.5)[0]:
        if select.select([terminal], [], [], 0.2)[0]:
            seen += os.read(terminal, 65536)
    return seen.decode().replace("\r\n", "\n")


@pytest.mark.skipif(not ALL, reason="make test-all; core.progress has the parts")
@pytest.mark.parametrize("quiet", [(), ("--quiet",)])
def test_a_terminal_has_a_bar(tmp_path, quiet):
    """One line that is redrawn, and none of the plain ones; nothing at all with --quiet."""
    ours, theirs = pty.openpty()
    folder = tmp_path / "run"
    streams = dict(stdin=theirs, stdout=theirs, stderr=theirs)
    started = start_toy(folder, "-p", "max_steps", "100", *quiet, **streams)
    try:
        text = read_terminal(started, ours)
    finally:
        kill_all(str(folder))
        os.close(theirs)
    if quiet:
        assert text == ""
        return
    bar = (r"\rtrain: +\d+%\|.*\| \d+/100, loss [\d.]+, [\d,]+ tokens/s, 0:00:\d\d left"
           r"\x1b\[K\r")
    assert re.search(bar, text)
    assert not PROGRESS_LINE.search(text.replace("\r\x1b[K", ""))
    assert "run folder: " in text and f"adapter   {folder}/adapter" in text
    assert len(re.findall(r"train: 100%", text)) >= 1 and "Loading weights" not in text


def write(text: str | bytes, name: str = HEARTBEAT):
    """Writes a file into a folder."""
    content = text if isinstance(text, bytes) else text.encode()
    return lambda folder: (folder / name).write_bytes(content)


def write_beat_with(**facts):
    """Writes a heartbeat of this process, with some facts of its own."""
    return lambda folder: write_heartbeat(folder, BEAT | process_identity() | facts)


def write_bad_metrics(folder: Path):
    write_heartbeat(folder, BEAT | process_identity())
    (folder / "metrics.jsonl").write_text("step 1\n")


TORN = "heartbeat.json: is torn, or not JSON"
NO_NUMBER = '{"state": "training", "time": NaN, "pid": 1, "host": "a"}'
INCOMPLETE = "is no heartbeat of a run (state, time, pid or host missing)"


@pytest.mark.parametrize("made, said", [
    (lambda folder: None, "is empty; no run has begun there"),
    (write("x", "notes.txt"),
     "holds no run (no heartbeat.json, recipe.json or evaluation.json)"),
    (write('{"state": "trai'), TORN),
    (write(""), TORN),
    (write(b"\xff\xfe{}"), TORN),
    (write("[" * 10**5), TORN),
    (lambda folder: (folder / HEARTBEAT).mkdir(), "holds no run"),
    (write('{"state": "training"}'), INCOMPLETE),
    (write_beat_with(pid="1; rm"), "is no heartbeat of a run (pid)"),
    (write_beat_with(pid=10**12), None),
    (write_beat_with(pid=-1), None),
    (write(NO_NUMBER), "is no heartbeat of a run (time)"),
    (write_bad_metrics, "metrics.jsonl: line 1 is not JSON"),
], ids=range(13))
def test_what_is_no_run_is_said_in_a_line(tmp_path, cli, made, said):
    made(tmp_path)
    code, out, err = cli("status", tmp_path)
    if said is None:  # no process has such an id
        assert code == 4 and "is gone" in out
    else:
        assert code == 1 and out == "" and said in err and err.count("\n") == 1


@pytest.mark.parametrize("facts", [
    dict(state="training", step="3"), dict(state=3), dict(state="asleep"), dict(state="training"),
    dict(state="training", pid=True, host="a", time=1.0),
], ids=str)
def test_values_that_no_run_writes(tmp_path, facts):
    write_json(tmp_path / HEARTBEAT, dict(time=0.0) | facts)
    with pytest.raises(ValueError, match="is no heartbeat of a run"):
        read_valid_beat(tmp_path)


def test_a_loss_that_is_no_number_is_no_fault(tmp_path):
    write_heartbeat(tmp_path, dict(state="training", step=3, loss=math.nan) | process_identity())
    assert read_valid_beat(tmp_path)["loss"] is None


def test_alive_without_progress_is_stalled():
    now = time.time()
    beat = BEAT | process_identity() | dict(time=now, moved=now)
    assert is_alive(beat)
    state, cause = state_of(beat | dict(time=now + 1000), now + 1000)
    assert state == "stalled"
    assert cause == f"it has not got on for 0:16:40, though process {os.getpid()} lives"
    failed = beat | dict(state="failed", cause="rank 1: broken")
    assert state_of(failed, now + 1e6) == ("failed", "rank 1: broken")


def test_numbers_come_from_the_heartbeat_or_the_log(tmp_path):
    run, earlier = tmp_path / "run", tmp_path / "earlier"
    run.mkdir()
    write_heartbeat(run, BEAT | process_identity())
    end_elsewhere(run, "failed", "rank 1: broken")
    found = read_status(run)
    assert (found["state"], found["step"], found["checkpoint"]) == ("failed", 3, None)
    checkpoint = earlier / "checkpoints/checkpoint-10"
    checkpoint.mkdir(parents=True)
    (checkpoint / "trainer_state.json").touch()
    for name in ("recipe", "environment", "result"):
        write_json(earlier / f"{name}.json", {})
    append_line(earlier / "metrics.jsonl", dict(step=7, loss=0.5, tokens_per_s=10.0))
    found = read_status(earlier)
    assert (found["state"], found["step"], found["loss"]) == ("finished", 7, 0.5)
    assert found["checkpoint"] == "checkpoints/checkpoint-10"


def test_exit_codes():
    assert list(EXIT_CODES.values()) == [0, 0, 3, 4, 5]


def test_a_cause_can_do_nothing_to_a_terminal(tmp_path, cli):
    cause = "question \x1b[2J\x07 <b>x</b>\nline"
    write_beat_with(state="failed", cause=cause, step=1.5, steps=0)(tmp_path)
    code, out, _ = cli("status", tmp_path)
    assert code == 3 and "\x1b" not in out and "\x07" not in out
    code, out, _ = cli("status", tmp_path, "--json")
    assert "\x1b" not in out and json.loads(out)["state"] == "failed"
    write_beat_with(state="\x1b[2J")(tmp_path)
    code, out, err = cli("status", tmp_path)
    assert code == 1 and "is no heartbeat of a run (state)" in err


def test_a_full_disk_does_not_stop_the_work(tmp_path):
    """The heartbeat is the one file whose loss costs nothing."""
    full = OSError(28, "No space left on device")
    with patch("medmcqa_lora.core.progress.write_json", side_effect=full):
        write_heartbeat(tmp_path, BEAT)
    assert not list(tmp_path.iterdir())


HOLD = """
from pathlib import Path
from medmcqa_lora.core.folders import lock_folder
lock_folder(Path({folder!r}))
print('held', flush=True)
input()
"""


def test_a_second_run_in_the_folder_leaves_the_heartbeat_of_the_first(tmp_path):
    """It is refused before anything is written: a notebook trains there, and only a lock shows its
    processes."""
    beat = tmp_path / HEARTBEAT
    beat.write_text(json.dumps(BEAT))
    program = HOLD.format(folder=str(tmp_path))
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    with subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, **pipes) as other:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(ValueError, match="another process writes there"):
            launch_train(replace(load_recipe("toy"), out=str(tmp_path)), resume=True)
        other.stdin.close()
    assert json.loads(beat.read_text()) == BEAT
    assert [p.name for p in tmp_path.iterdir()] == [HEARTBEAT]
