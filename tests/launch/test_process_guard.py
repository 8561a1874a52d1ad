"""No orphans, no hangs: whoever dies, the rest of the run ends within 15 s, with a reason and the notebooks so far."""
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

import nbformat
import psutil
import pytest
from conftest import ALL, processes_with

from medmcqa_lora.core.files import read_lines

COMMAND = [sys.executable, "-c", "from medmcqa_lora.cli import main; main()"]
LIMIT = 15  # seconds
JOIN = "import torch, os, sys, time, datetime; rank = os.environ['RANK']\ntorch.distributed.init_process_group('gloo', timeout=datetime.timedelta(seconds=5)); print('so far', flush=True)"
UP = "open('up' + rank, 'w').close(); "
SLEEP = UP + "time.sleep(300)"
STUBBORN = "import signal, ctypes; signal.signal(signal.SIGINT, signal.SIG_IGN); child = __import__('subprocess').Popen(['sleep', '300']); " + UP + "ctypes.PyDLL(None).sleep(300)"  # holds the interpreter, and has a child


def notebook(folder: Path, *cells: str) -> Path:
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("world_size = 1", metadata={"tags": ["parameters"]}), *map(nbformat.v4.new_code_cell, cells)])
    nb.metadata["kernelspec"] = {"name": "python3", "display_name": "python3", "language": "python"}
    nbformat.write(nb, folder / "job.ipynb")
    return folder / "job.ipynb"


class Run:
    """A notebook as a job in two processes, started by a command of its own."""

    def __init__(self, folder: Path, *cells: str, **popen):
        job, self.folder, self.mark = notebook(folder, JOIN, *cells), folder, f"TEST{os.getpid()}{time.time_ns()}"
        code = f"from pathlib import Path; from medmcqa_lora.launch.launcher import run_notebook; run_notebook({str(job)!r}, Path('run'), {{}}, nproc=2)"
        self.errors = open(folder / "stderr", "w+")
        self.command = subprocess.Popen([sys.executable, "-c", code], cwd=folder, env={**os.environ, "TEST_MARK": self.mark}, **{"stderr": self.errors, **popen})

    def wait_for(self, *names: str):
        deadline = time.time() + 90
        while not all((self.folder / n).exists() for n in names):
            assert time.time() < deadline and self.command.poll() is None, self.told()
            time.sleep(0.1)

    def processes(self) -> dict[str, psutil.Process]:
        kinds = {"launch.worker import worker": "papermill", "ipykernel_launcher": "kernel", "process_guard import sweep": "guard"}
        found = [psutil.Process(int(line.split(":")[0])) for line in processes_with(self.mark)]
        named = [(next((k for w, k in kinds.items() if w in " ".join(p.cmdline())), "command"), p) for p in found]
        return {kind + (p.environ()["RANK"] if kind in ("papermill", "kernel") else ""): p for kind, p in named}

    def seconds_left_alive(self, began: float) -> float:
        """Until nothing is left, and the command has ended."""
        while (left := processes_with(self.mark)) and time.time() < began + LIMIT:
            time.sleep(0.1)
        assert not left, left
        self.command.wait(LIMIT)
        return time.time() - began

    def told(self) -> str:
        return (self.folder / "stderr").read_text().strip()


def saved(folder: Path):
    for name in ("job", "rank1"):
        outputs = [o.get("text", "") for c in nbformat.read(folder / f"run/{name}.ipynb", 4).cells for o in c.get("outputs", ())]
        assert "so far\n" in outputs, name


VICTIMS = [  # who, by which signal, what is said
    ("command", "SIGKILL", None),
    ("kernel1", "SIGKILL", r"LaunchError: rank 1: its kernel was killed by SIGKILL; often the machine has run out of memory; its last output was: so far"),
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
def test_whoever_is_killed_nobody_is_left(who, how, says, tmp_path, record_property):
    run = Run(tmp_path, SLEEP)
    run.wait_for("up0", "up1")
    there = run.processes()
    assert len(there) == 6
    began = time.time()
    for name in who.split():
        there[name].send_signal(signal.Signals[how])
    record_property("seconds", seconds := run.seconds_left_alive(began))
    print(f"{who} {how}: {seconds:.1f} s")
    assert run.command.returncode != 0
    if says:
        assert re.search(says, run.told().splitlines()[-1]), run.told()
    saved(tmp_path)


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
    saved(tmp_path)


def test_one_rank_raises(tmp_path):
    run = Run(tmp_path, f"if rank == '1': {UP}raise RuntimeError('broken on purpose')\ntorch.distributed.barrier()")
    run.wait_for("up1")
    print(f"raises: {run.seconds_left_alive((tmp_path / 'up1').stat().st_mtime):.1f} s")
    assert run.command.returncode != 0
    assert re.search(r"LaunchError: rank 1: cell \d+: RuntimeError: broken on purpose \(traceback in .*rank1.ipynb\)", run.told().splitlines()[-1]), run.told()
    saved(tmp_path)


def test_a_rank_that_hangs_is_named(tmp_path):
    """The other one waits for it as long as the limit allows: 5 s."""
    run = Run(tmp_path, f"{UP}\nif rank == '1': time.sleep(300)\ntorch.distributed.barrier()")
    run.wait_for("up0", "up1")
    print(f"hangs: {run.seconds_left_alive((tmp_path / 'up0').stat().st_mtime + 5):.1f} s after the limit")
    assert run.command.returncode != 0
    assert "rank 1 hangs: others waited for it in vain; rank 0: cell " in run.told().splitlines()[-1], run.told()
    saved(tmp_path)


@pytest.mark.skipif(not ALL, reason="make test-all")
def test_the_terminal_closes(tmp_path):
    ours, theirs = os.openpty()

    def own_terminal():
        os.setsid()
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)

    run = Run(tmp_path, "print('x' * 99)\n" + SLEEP, stdin=theirs, stdout=theirs, stderr=theirs, preexec_fn=own_terminal)
    os.close(theirs)
    run.wait_for("up0", "up1")
    began = time.time()
    os.close(ours)
    print(f"terminal: {run.seconds_left_alive(began):.1f} s")
    assert run.command.returncode != 0
    saved(tmp_path)


@pytest.mark.skipif(not ALL, reason="make test-all")
def test_the_notebook_server_dies(tmp_path):
    """A run that was launched from a notebook: server, kernel, guard, two papermills, two kernels."""
    from urllib.request import Request, urlopen

    from jupyter_client import BlockingKernelClient

    job, mark = notebook(tmp_path, JOIN, SLEEP), f"TEST{os.getpid()}{time.time_ns()}"
    env = {**os.environ, "TEST_MARK": mark, "JUPYTER_TOKEN": "t", **{f"JUPYTER_{k}_DIR": str(tmp_path / k) for k in ("RUNTIME", "CONFIG")}}
    server = subprocess.Popen([sys.executable, "-m", "jupyter_server", "--no-browser", "--allow-root", "--ServerApp.ip=127.0.0.1", "--ServerApp.port=0", f"--ServerApp.root_dir={tmp_path}"],
                              env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.time() + 60
    while not (told := list((tmp_path / "RUNTIME").glob("jpserver-*.json"))):
        assert time.time() < deadline and server.poll() is None
        time.sleep(0.2)
    url = json.loads(told[0].read_text())["url"]
    kernel = json.load(urlopen(Request(f"{url}api/kernels", data=b"{}", headers={"Authorization": "token t"})))["id"]
    client = BlockingKernelClient(connection_file=str(tmp_path / f"RUNTIME/kernel-{kernel}.json"))
    client.load_connection_file()
    client.start_channels()
    client.execute(f"import os; os.chdir({str(tmp_path)!r})\nfrom pathlib import Path; from medmcqa_lora.launch.launcher import run_notebook; run_notebook({str(job)!r}, Path('run'), {{}}, nproc=2)")
    while not all((tmp_path / f"up{i}").exists() for i in (0, 1)):
        assert time.time() < deadline + 60
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
    saved(tmp_path)


def train(folder: Path, *more, **popen) -> subprocess.Popen:
    words = ["train", "--recipe", "toy", "-p", "max_steps", "12", "-p", "save_steps", "12", *more, "--out", str(folder)]
    return subprocess.Popen([*COMMAND, *words], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, **popen)


def wait_for_steps(run: subprocess.Popen, folder: Path, n: int):
    deadline = time.time() + 90
    while not ((folder / "metrics.jsonl").exists() and len(read_lines(folder / "metrics.jsonl")) >= n):
        assert time.time() < deadline and run.poll() is None
        time.sleep(0.05)


@pytest.mark.skipif(not ALL, reason="make test-all; test_bad_steps and training.stopping ask for a stop in this process")
@pytest.mark.parametrize("processes", ["1", "2"])
def test_ctrl_c_saves_a_checkpoint_from_which_the_run_goes_on(processes, tmp_path):
    """With the losses of a run that was never stopped, and nothing but one line on the terminal."""
    spread = ["--nproc-per-node", processes]
    whole = train(tmp_path / "whole", *spread)
    assert whole.wait(300) == 0
    run = train(tmp_path / "run", *spread)
    wait_for_steps(run, tmp_path / "run", 3)
    began = time.time()
    run.send_signal(signal.SIGINT)
    told = run.communicate(timeout=60)[1]
    print(f"Ctrl-C: {time.time() - began:.1f} s")
    line = told.replace("\r", "\n").strip().splitlines()[-1]
    step = int(re.search(r"interrupted \(SIGINT\): .*/run: stopped behind step (\d+) as asked, with checkpoint-\1; go on with the same command and --resume --out ", line)[1])
    assert run.returncode == 130 and step < 12 and not re.search("IPKernelApp|Traceback|ZMQError", told), told
    assert (tmp_path / f"run/checkpoints/checkpoint-{step}").is_dir() and not (tmp_path / "run/adapter").exists()
    assert "Stopped" in (tmp_path / "run/train.ipynb").read_text()
    assert train(tmp_path / "run", *spread, "--resume").wait(300) == 0
    metrics = [[(m["step"], m["loss"], m["learning_rate"], m["tokens"]) for m in read_lines(tmp_path / name / "metrics.jsonl")] for name in ("whole", "run")]
    assert metrics[0] == metrics[1]
    assert (tmp_path / "whole/adapter/adapter_model.safetensors").read_bytes() == (tmp_path / "run/adapter/adapter_model.safetensors").read_bytes()


@pytest.mark.skipif(not ALL, reason="make test-all")
def test_training_that_hangs_is_reported(tmp_path):
    """One rank's kernel stands still in the middle of training."""
    mark = f"TEST{os.getpid()}{time.time_ns()}"
    run = train(tmp_path / "run", "-p", "max_steps", "3000", "-p", "ddp_timeout", "6", "--nproc-per-node", "2", env={**os.environ, "TEST_MARK": mark})
    wait_for_steps(run, tmp_path / "run", 3)
    kernels = [psutil.Process(int(line.split(":")[0])) for line in processes_with(mark) if "ipykernel" in line]
    next(p for p in kernels if p.environ()["RANK"] == "1").suspend()
    began = time.time()
    told = run.communicate(timeout=60)[1]
    print(f"training hangs: {time.time() - began - 6:.1f} s after the limit of 6 s")
    assert time.time() - began < 6 + LIMIT and not processes_with(mark)
    assert run.returncode == 1 and "rank 1 hangs: others waited for it in vain; rank 0: " in told.strip().splitlines()[-1], told
