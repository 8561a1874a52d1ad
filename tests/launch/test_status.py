"""What a run shows while it runs and what its status says, from outside: at work, silent, killed, failed, finished."""
import json
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

from medmcqa_lora.launch import status
from medmcqa_lora.launch.launcher import launch_train
from medmcqa_lora.core.progress import HEARTBEAT, LINE, identity, write_beat
from medmcqa_lora.core.recipe_files import load_recipe
from medmcqa_lora.launch.status import EXIT, read_status

COMMAND = [sys.executable, "-c", "from medmcqa_lora.cli import main; main()"]
BEAT = dict(state="training", kind="training", doing="train", unit="step", step=3, steps=10)


def command(folder: Path, *words: str, **how) -> subprocess.Popen:
    """A toy run in processes of its own, marked so that all of them can be found."""
    return subprocess.Popen([*COMMAND, "train", "--recipe", "toy", "-p", "save_steps", "10", *words, "--out", str(folder)], cwd=ROOT, start_new_session=True,
                            env=os.environ | dict(MARK=str(folder), OMP_NUM_THREADS="1"), **how)


def until(holds, seconds: float = 150):
    """What `holds` gives when it is true."""
    end = time.time() + seconds
    while not (found := holds()):
        assert time.time() < end, "it didn't come"
        time.sleep(0.2)
    return found


def at_work(folder: Path) -> dict | None:
    """A run's status, if it is training and has come some way."""
    if not (folder / HEARTBEAT).exists():
        return None
    found = read_status(folder)
    return found if found["doing"] == "train" and found["step"] else None


def kill_all(mark: str) -> None:
    """Those of this test, by their numbers."""
    for line in processes_with(mark):
        os.kill(int(line.partition(":")[0]), signal.SIGKILL)


def test_from_its_start_to_its_end(tmp_path, cli):
    """Running, stalled while its process is stopped, finished; the log has plain lines of progress and no redrawn ones."""
    folder = tmp_path / "run"
    with open(tmp_path / "log", "w") as log:
        started = command(folder, "-p", "max_steps", "60", stdout=log, stderr=subprocess.STDOUT)
        try:
            assert until(lambda: (folder / HEARTBEAT).exists() and read_status(folder))["state"] == "running"  # from its first second
            found = until(lambda: at_work(folder))
            assert (found["state"], found["steps"], found["alive"], found["kind"], found["unit"]) == ("running", 60, True, "training", "step")
            assert found["heartbeat_age_s"] < 15 and found["pid"] != started.pid and found["tokens_per_s"] > 0 and found["loss"] > 0 and found["seconds_left"] > 0
            code, out, _ = cli("status", folder, "--json")
            assert code == 0 and json.loads(out)["state"] == "running"
            os.kill(found["pid"], signal.SIGSTOP)
            with patch.object(status, "SILENT", 5.0):
                stalled = until(lambda: (s := read_status(folder))["state"] == "stalled" and s)
                assert stalled["alive"] and "no heartbeat for 0:00:0" in stalled["cause"]
                code, out, _ = cli("status", folder)
                assert code == EXIT["stalled"] and "alive" in out
            os.kill(found["pid"], signal.SIGCONT)
            assert started.wait(200) == 0
        finally:
            kill_all(str(folder))
    code, out, _ = cli("status", folder)
    assert code == 0 and out.startswith(f"{folder}: finished\ntrain: step 60 of 60 (100%), loss ") and "last checkpoint: checkpoints/checkpoint-60" in out
    text = (tmp_path / "log").read_text()
    assert "\r" not in text and "\x1b" not in text and re.search(r"^train: step 60 of 60 \(100%\), loss [\d.]+, [\d,]+ tokens/s, 0:00:00 left$", text, re.M)
    kept = "".join(o.get("text", "") for c in nbformat.read(folder / "train.ipynb", 4).cells for o in c.get("outputs", []))
    assert "train: step 60 of 60" in kept and "\r" not in kept and "it/s" not in kept


def test_quiet(tmp_path, cli):
    """Nothing on the terminal; the notebook has it all, and the heartbeat tells the rest. An evaluation has a status as well."""
    done = subprocess.run([*COMMAND, "evaluate", "--recipe", "toy", "--limit", "8", "--quiet", "--out", str(tmp_path / "base")], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert "predictions: question 8 of 8 (100%), " not in done.stderr
    code, out, _ = cli("status", tmp_path / "base", "--json")
    found = json.loads(out)
    assert (code, found["state"], found["kind"], found["step"], found["unit"], found["checkpoint"]) == (0, "finished", "evaluation", 8, "question", None)
    (tmp_path / "base" / HEARTBEAT).unlink()
    assert read_status(tmp_path / "base")["state"] == "finished"  # by its summary


@pytest.mark.skipif(not ALL, reason="make test-all; launch.status has the rule")
def test_killed_outright(tmp_path, cli):
    folder = tmp_path / "run"
    command(folder, "-p", "max_steps", "2000", stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        until(lambda: at_work(folder))
    finally:
        kill_all(str(folder))
    found = until(lambda: (s := read_status(folder))["state"] == "interrupted" and s)
    assert not found["alive"] and "is gone and said nothing" in found["cause"] and found["step"]
    code, out, _ = cli("status", folder)
    assert code == 4 and "it goes on with the same command and --resume" in out


@pytest.mark.skipif(not ALL, reason="make test-all; core.progress has the rule")
@pytest.mark.parametrize("nproc", ["1", "2"])
def test_failed_with_its_cause(tmp_path, cli, nproc):
    folder = tmp_path / "run"
    diverges = dict(learning_rate=1e5, warmup_steps=0, lr_scheduler_type="constant", logging_steps=1)
    code, _, err = cli("train", "--recipe", "toy", *(w for k, v in diverges.items() for w in ("-p", k, v)), "--nproc-per-node", nproc, "--out", folder)
    assert code == 1
    time.sleep(3)  # no process of the run, should one still be there, writes over it
    code, out, _ = cli("status", folder)
    assert code == 3 and re.match(rf"{folder}: failed: rank \d: step \d+: the loss", out)


@pytest.mark.skipif(not ALL, reason="make test-all; core.progress has the parts")
@pytest.mark.parametrize("quiet", [(), ("--quiet",)])
def test_a_terminal_has_a_bar(tmp_path, quiet):
    """One line that moves, and none of the plain ones; nothing at all if it is told to be quiet."""
    ours, theirs = pty.openpty()
    folder = tmp_path / "run"
    started, seen = command(folder, "-p", "max_steps", "100", *quiet, stdin=theirs, stdout=theirs, stderr=theirs), b""
    try:
        while started.poll() is None or select.select([ours], [], [], 0.5)[0]:
            if select.select([ours], [], [], 0.2)[0]:
                seen += os.read(ours, 65536)
    finally:
        kill_all(str(folder))
        os.close(theirs)
    text = seen.decode().replace("\r\n", "\n")
    if quiet:
        assert text == ""
        return
    assert re.search(r"\rtrain: +\d+%\|.*\| \d+/100, loss [\d.]+, [\d,]+ tokens/s, 0:00:\d\d left\x1b\[K\r", text)
    assert not LINE.search(text.replace("\r\x1b[K", "")) and "run folder: " in text and f"adapter   {folder}/adapter" in text
    assert len(re.findall(r"train: 100%", text)) >= 1 and "Loading weights" not in text


@pytest.mark.parametrize("made, said", [
    (lambda f: None, "is empty; no run has begun there"),
    (lambda f: (f / "notes.txt").write_text("x"), "holds no run (no heartbeat.json, recipe.json or evaluation.json)"),
    (lambda f: (f / HEARTBEAT).write_text('{"state": "trai'), "heartbeat.json: is torn, or not JSON"),
    (lambda f: (f / HEARTBEAT).write_text(""), "heartbeat.json: is torn, or not JSON"),
    (lambda f: (f / HEARTBEAT).write_bytes(b"\xff\xfe{}"), "heartbeat.json: is torn, or not JSON"),
    (lambda f: (f / HEARTBEAT).write_text("[" * 10**5), "heartbeat.json: is torn, or not JSON"),
    (lambda f: (f / HEARTBEAT).mkdir(), "holds no run"),
    (lambda f: (f / HEARTBEAT).write_text('{"state": "training"}'), "is no heartbeat of a run (state, time, pid or host missing)"),
    (lambda f: write_beat(f, BEAT | identity() | dict(pid="1; rm")), "is no heartbeat of a run (pid)"),
    (lambda f: write_beat(f, BEAT | identity() | dict(pid=10**12)), None),
    (lambda f: write_beat(f, BEAT | identity() | dict(pid=-1)), None),
    (lambda f: (f / HEARTBEAT).write_text('{"state": "training", "time": NaN, "pid": 1, "host": "a"}'), "is no heartbeat of a run (time)"),
    (lambda f: (write_beat(f, BEAT | identity()), (f / "metrics.jsonl").write_text("step 1\n")), "metrics.jsonl: line 1 is not JSON"),
], ids=range(13))
def test_what_is_no_run_is_said_in_a_line(tmp_path, cli, made, said):
    made(tmp_path)
    code, out, err = cli("status", tmp_path)
    if said is None:  # nobody has such a number
        assert code == 4 and "is gone" in out
    else:
        assert code == 1 and out == "" and said in err and err.count("\n") == 1


def test_a_cause_can_do_nothing_to_a_terminal(tmp_path, cli):
    write_beat(tmp_path, BEAT | identity() | dict(state="failed", cause="question \x1b[2J\x07 <b>x</b>\nline", step=1.5, steps=0))
    code, out, _ = cli("status", tmp_path)
    assert code == 3 and "\x1b" not in out and "\x07" not in out
    code, out, _ = cli("status", tmp_path, "--json")
    assert "\x1b" not in out and json.loads(out)["state"] == "failed"
    write_beat(tmp_path, BEAT | identity() | dict(state="\x1b[2J"))
    code, out, err = cli("status", tmp_path)
    assert code == 1 and "is no heartbeat of a run (state)" in err


def test_a_full_disk_does_not_stop_the_work(tmp_path):
    """The heartbeat is the one file whose loss costs nothing."""
    with patch("medmcqa_lora.core.progress.write_json", side_effect=OSError(28, "No space left on device")):
        write_beat(tmp_path, BEAT)
    assert not list(tmp_path.iterdir())


def test_a_second_run_in_the_folder_leaves_the_heartbeat_of_the_first(tmp_path):
    """It is refused before anything is written: a notebook trains there, whose processes only a lock tells of."""
    (beat := tmp_path / HEARTBEAT).write_text(json.dumps(BEAT))
    hold = f"from pathlib import Path; from medmcqa_lora.core.folders import hold; hold(Path({str(tmp_path)!r})); print('held', flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", hold], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(ValueError, match="another process writes there"):
            launch_train(replace(load_recipe("toy"), out=str(tmp_path)), resume=True)
        other.stdin.close()
    assert json.loads(beat.read_text()) == BEAT and [p.name for p in tmp_path.iterdir()] == [HEARTBEAT]
