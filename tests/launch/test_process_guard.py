"""Whoever dies, the rest of the run ends within 15 s, with a reason and the notebooks so far."""
import errno
import fcntl
import json
import os
import re
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path
from unittest.mock import patch

import nbformat
import psutil
import pytest
from conftest import ALL, processes_with
from helpers import COMMAND, start

from medmcqa_lora.core.files import read_lines
from medmcqa_lora.launch.process_guard import write_notebooks_atomically

LIMIT = 15  # seconds
JOIN = """
import torch, os, sys, time, datetime
rank = os.environ['RANK']
torch.distributed.init_process_group('gloo', timeout=datetime.timedelta(seconds=5))
print('so far', flush=True)
"""
UP = "open('up' + rank, 'w').close(); "
SLEEP = UP + "time.sleep(300)"
# Ignores interrupts, holds the interpreter, and has a child.
STUBBORN = f"""
import signal, ctypes, subprocess
signal.signal(signal.SIGINT, signal.SIG_IGN)
child = subprocess.Popen(['sleep', '300'])
{UP}ctypes.PyDLL(None).sleep(300)
"""
RUN_JOB = """
from pathlib import Path
from medmcqa_lora.launch.launcher import run_notebook
run_notebook({job!r}, Path('run'), {{}}, nproc=2)
"""
KINDS = {  # in a command line -> the process
    "launch.worker import run_worker": "papermill",
    "ipykernel_launcher": "kernel",
    "process_guard import end_processes": "guard",
}


def notebook(folder: Path, *cells: str) -> Path:
    parameters = nbformat.v4.new_code_cell("world_size = 1", metadata={"tags": ["parameters"]})
    nb = nbformat.v4.new_notebook(cells=[parameters, *map(nbformat.v4.new_code_cell, cells)])
    nb.metadata["kernelspec"] = dict(name="python3", display_name="python3", language="python")
    nbformat.write(nb, folder / "job.ipynb")
    return folder / "job.ipynb"


def new_mark() -> str:
    return f"TEST{os.getpid()}{time.time_ns()}"


def kind_of(p: psutil.Process) -> str:
    """Such as kernel1; a rank follows where there is one of each."""
    command = " ".join(p.cmdline())
    kinds = [kind for text, kind in KINDS.items() if text in command]
    if not kinds:
        return "command"
    return "guard" if kinds[0] == "guard" else kinds[0] + p.environ()["RANK"]


class Run:
    """A notebook as a job in two processes, started by a command of its own."""

    def __init__(self, folder: Path, *cells: str, **popen):
        job = notebook(folder, JOIN, *cells)
        self.folder, self.mark = folder, new_mark()
        self.errors = open(folder / "stderr", "w+")
        self.command = start(
            [sys.executable, "-c", RUN_JOB.format(job=str(job))], cwd=folder,
            env={**os.environ, "TEST_MARK": self.mark}, **{"stderr": self.errors, **popen})

    def wait_for(self, *names: str):
        deadline = time.time() + 90
        while not all((self.folder / n).exists() for n in names):
            assert time.time() < deadline and self.command.poll() is None, self.stderr()
            time.sleep(0.1)

    def processes(self) -> dict[str, psutil.Process]:
        found = [psutil.Process(int(line.split(":")[0])) for line in processes_with(self.mark)]
        return {kind_of(p): p for p in found}

    def seconds_left_alive(self, began: float) -> float:
        """Until no process is left, and the command has ended."""
        while (left := processes_with(self.mark)) and time.time() < began + LIMIT:
            time.sleep(0.1)
        assert not left, left
        self.command.wait(LIMIT)
        return time.time() - began

    def stderr(self) -> str:
        return (self.folder / "stderr").read_text().strip()


def check_saved(folder: Path):
    for name in ("job", "rank1"):
        cells = nbformat.read(folder / f"run/{name}.ipynb", 4).cells
        outputs = [o.get("text", "") for c in cells for o in c.get("outputs", ())]
        assert "so far\n" in outputs, name


KERNEL1 = (r"LaunchError: rank 1: its kernel was killed by SIGKILL; often the machine has run out"
           r" of memory; its last output was: so far")
VICTIMS = [  # who, by which signal, what is said
    ("command", "SIGKILL", None),
    ("kernel1", "SIGKILL", KERNEL1),
    ("papermill1", "SIGKILL", r"LaunchError: rank 1: Signal 9 \(SIGKILL\) received"),
    ("command", "SIGTERM", r"Interrupted: interrupted \(SIGTERM\).*--resume"),
    ("command", "SIGINT", r"Interrupted: interrupted \(SIGINT\)"),
    ("command", "SIGHUP", r"Interrupted: interrupted \(SIGHUP\)"),
    ("kernel0", "SIGKILL", "rank 0: its kernel was killed by SIGKILL"),
    ("papermill0", "SIGKILL", "rank 0: Signal 9"),
    ("command guard", "SIGKILL", None),
    ("command guard papermill0 papermill1", "SIGKILL", None),
    ("guard command", "SIGTERM", "Interrupted"),
]


@pytest.mark.parametrize(("who", "how", "says"), VICTIMS if ALL else VICTIMS[:2])
def test_whoever_is_killed_no_process_is_left(who, how, says, tmp_path, record_property):
    run = Run(tmp_path, SLEEP)
    run.wait_for("up0", "up1")
    there = run.processes()
    assert len(there) == 6
    began = time.time()
    for name in who.split():
        there[name].send_signal(signal.Signals[how])
    seconds = run.seconds_left_alive(began)
    record_property("seconds", seconds)
    print(f"{who} {how}: {seconds:.1f} s")
    assert run.command.returncode != 0
    if says:
        assert re.search(says, run.stderr().splitlines()[-1]), run.stderr()
    check_saved(tmp_path)


@pytest.mark.skipif(not ALL, reason="make test-all")
@pytest.mark.parametrize("how", ["SIGKILL", "SIGTERM"])
def test_a_kernel_that_answers_nothing_and_its_child(how, tmp_path):
    """Its interpreter is held, interrupts are ignored, and a child of its own sleeps."""
    run = Run(tmp_path, STUBBORN)
    run.wait_for("up0", "up1")
    began = time.time()
    run.command.send_signal(signal.Signals[how])
    print(f"stubborn, {how}: {run.seconds_left_alive(began):.1f} s")
    assert run.command.returncode != 0
    check_saved(tmp_path)


def test_one_rank_raises(tmp_path):
    raises = f"if rank == '1': {UP}raise RuntimeError('broken on purpose')"
    run = Run(tmp_path, f"{raises}\ntorch.distributed.barrier()")
    run.wait_for("up1")
    began = (tmp_path / "up1").stat().st_mtime
    print(f"raises: {run.seconds_left_alive(began):.1f} s")
    assert run.command.returncode != 0
    expected = (r"LaunchError: rank 1: cell \d+: RuntimeError: broken on purpose "
                r"\(traceback in .*rank1.ipynb\)")
    assert re.search(expected, run.stderr().splitlines()[-1]), run.stderr()
    check_saved(tmp_path)


def test_a_rank_that_hangs_is_named(tmp_path):
    """The other one waits for it as long as the limit allows: 5 s."""
    run = Run(tmp_path, f"{UP}\nif rank == '1': time.sleep(300)\ntorch.distributed.barrier()")
    run.wait_for("up0", "up1")
    began = (tmp_path / "up0").stat().st_mtime + 5
    print(f"hangs: {run.seconds_left_alive(began):.1f} s after the limit")
    assert run.command.returncode != 0
    expected = "rank 1 hangs: others waited for it in vain; rank 0: cell "
    assert expected in run.stderr().splitlines()[-1], run.stderr()
    check_saved(tmp_path)


@pytest.mark.skipif(not ALL, reason="make test-all")
def test_the_terminal_closes(tmp_path):
    ours, theirs = os.openpty()

    def own_terminal():
        os.setsid()
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)

    streams = dict(stdin=theirs, stdout=theirs, stderr=theirs)
    run = Run(tmp_path, "print('x' * 99)\n" + SLEEP, preexec_fn=own_terminal, **streams)
    os.close(theirs)
    run.wait_for("up0", "up1")
    began = time.time()
    os.close(ours)
    print(f"terminal: {run.seconds_left_alive(began):.1f} s")
    assert run.command.returncode != 0
    check_saved(tmp_path)


def start_server(folder: Path, mark: str) -> subprocess.Popen:
    """A Jupyter server whose files are all in `folder`."""
    own = {f"JUPYTER_{name}_DIR": str(folder / name) for name in ("RUNTIME", "CONFIG")}
    environment = {**os.environ, "TEST_MARK": mark, "JUPYTER_TOKEN": "t", **own}
    options = ["--no-browser", "--allow-root", "--ServerApp.ip=127.0.0.1", "--ServerApp.port=0",
               f"--ServerApp.root_dir={folder}"]
    return start([sys.executable, "-m", "jupyter_server", *options], env=environment,
                 stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def start_kernel(server: subprocess.Popen, folder: Path):
    """A client of a kernel that the server has started."""
    from urllib.request import Request, urlopen

    from jupyter_client import BlockingKernelClient

    deadline = time.time() + 60
    while not (files := list((folder / "RUNTIME").glob("jpserver-*.json"))):
        assert time.time() < deadline and server.poll() is None
        time.sleep(0.2)
    url = json.loads(files[0].read_text())["url"] + "api/kernels"
    request = Request(url, data=b"{}", headers={"Authorization": "token t"})
    kernel = json.load(urlopen(request))["id"]
    client = BlockingKernelClient(connection_file=str(folder / f"RUNTIME/kernel-{kernel}.json"))
    client.load_connection_file()
    client.start_channels()
    return client


@pytest.mark.skipif(not ALL, reason="make test-all")
def test_the_notebook_server_dies(tmp_path):
    """A run that a notebook launched: server, kernel, guard, two papermills, two kernels."""
    job, mark = notebook(tmp_path, JOIN, SLEEP), new_mark()
    server = start_server(tmp_path, mark)
    client = start_kernel(server, tmp_path)
    client.execute(f"import os; os.chdir({str(tmp_path)!r})\n{RUN_JOB.format(job=str(job))}")
    deadline = time.time() + 120
    while not all((tmp_path / f"up{i}").exists() for i in (0, 1)):
        assert time.time() < deadline
        time.sleep(0.2)
    assert len(processes_with(mark)) == 7
    began = time.time()
    server.kill()
    server.wait()
    while (left := processes_with(mark)) and time.time() < began + LIMIT:
        time.sleep(0.1)
    client.stop_channels()
    assert not left, left
    print(f"server: {time.time() - began:.1f} s")
    check_saved(tmp_path)


def train(folder: Path, *more, **popen) -> subprocess.Popen:
    settings = ["-p", "max_steps", "12", "-p", "save_steps", "12", *more]
    command = [*COMMAND, "train", "--recipe", "toy", *settings, "--out", str(folder)]
    return start(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, **popen)


def wait_for_steps(run: subprocess.Popen, folder: Path, n: int):
    deadline = time.time() + 90
    metrics = folder / "metrics.jsonl"
    while not (metrics.exists() and len(read_lines(metrics)) >= n):
        assert time.time() < deadline and run.poll() is None
        time.sleep(0.05)


def steps_of(folder: Path) -> list[tuple]:
    keys = ("step", "loss", "learning_rate", "tokens")
    return [tuple(m[k] for k in keys) for m in read_lines(folder / "metrics.jsonl")]


def adapter_of(folder: Path) -> bytes:
    return (folder / "adapter/adapter_model.safetensors").read_bytes()


IN_PROCESS = "make test-all; test_bad_steps and training.stopping ask for a stop in this process"
STOPPED = (r"interrupted \(SIGINT\): .*/run: stopped after step (\d+) as asked, with checkpoint-\1"
           r"; continue with the same command and --resume --out ")


@pytest.mark.skipif(not ALL, reason=IN_PROCESS)
@pytest.mark.parametrize("processes", ["1", "2"])
def test_ctrl_c_saves_a_checkpoint_from_which_the_run_resumes(processes, tmp_path):
    """With the losses of a run that was never stopped, and only one line on the terminal."""
    number = ["--nproc-per-node", processes]
    assert train(tmp_path / "unstopped", *number).wait(300) == 0
    run = train(tmp_path / "run", *number)
    wait_for_steps(run, tmp_path / "run", 3)
    began = time.time()
    run.send_signal(signal.SIGINT)
    stderr = run.communicate(timeout=60)[1]
    print(f"Ctrl-C: {time.time() - began:.1f} s")
    line = stderr.replace("\r", "\n").strip().splitlines()[-1]
    step = int(re.search(STOPPED, line)[1])
    assert run.returncode == 130 and step < 12
    assert not re.search("IPKernelApp|Traceback|ZMQError", stderr), stderr
    assert (tmp_path / f"run/checkpoints/checkpoint-{step}").is_dir()
    assert not (tmp_path / "run/adapter").exists()
    assert "Stopped" in (tmp_path / "run/train.ipynb").read_text()
    assert train(tmp_path / "run", *number, "--resume").wait(300) == 0
    assert steps_of(tmp_path / "run") == steps_of(tmp_path / "unstopped")
    assert adapter_of(tmp_path / "run") == adapter_of(tmp_path / "unstopped")


@pytest.mark.skipif(not ALL, reason="make test-all")
def test_training_that_hangs_is_reported(tmp_path):
    """One rank's kernel stands still in the middle of training."""
    mark = new_mark()
    settings = ["-p", "max_steps", "3000", "-p", "ddp_timeout", "6", "--nproc-per-node", "2"]
    run = train(tmp_path / "run", *settings, env={**os.environ, "TEST_MARK": mark})
    wait_for_steps(run, tmp_path / "run", 3)
    lines = [line for line in processes_with(mark) if "ipykernel" in line]
    kernels = [psutil.Process(int(line.split(":")[0])) for line in lines]
    next(p for p in kernels if p.environ()["RANK"] == "1").suspend()
    began = time.time()
    stderr = run.communicate(timeout=60)[1]
    print(f"training hangs: {time.time() - began - 6:.1f} s after the limit of 6 s")
    assert time.time() - began < 6 + LIMIT and not processes_with(mark)
    expected = "rank 1 hangs: others waited for it in vain; rank 0: "
    assert run.returncode == 1 and expected in stderr.strip().splitlines()[-1], stderr


def test_a_full_disk_leaves_the_notebook_as_it_was(tmp_path):
    """The handler says why, so that a run can report it at its end."""
    from papermill.iorw import papermill_io

    handlers = list(papermill_io._handlers)
    file = tmp_path / "x.ipynb"
    try:
        handler = write_notebooks_atomically()
        papermill_io.write("{}", str(file))
        with patch("os.fsync", side_effect=OSError(errno.ENOSPC, "")):
            papermill_io.write("{1}", str(file))
        assert handler.error.endswith("x.ipynb: can't be written (No space left on device); "
                                      "make room, or choose another folder")
        assert file.read_text() == "{}"
        papermill_io.write("{2}", str(file))
        assert handler.error == "" and file.read_text() == "{2}"
    finally:
        papermill_io._handlers[:] = handlers
