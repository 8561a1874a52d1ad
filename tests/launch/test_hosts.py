"""Two hosts: network namespaces on this machine, joined by a cable that can be cut. Needs root."""
import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from conftest import ALL, processes_with
from helpers import COMMAND, start
from safetensors.torch import load_file

from medmcqa_lora.core.files import read_lines
from medmcqa_lora.launch.hosts import check_hosts, split_endpoint

LIMIT = 60  # seconds until the other host has ended
LONG = ["-p", "max_steps", "3000"]  # a run that is still going on when its host is lost


def ip(arguments: str):
    subprocess.run(["ip", *arguments.split()], check=True, capture_output=True, text=True)


class Cable:
    """Two namespaces with an address each, 10.77.0.1 and 10.77.0.2."""

    def __init__(self):
        self.names = [f"mlora{os.getpid()}{i}" for i in (0, 1)]
        self.ends = [f"v{os.getpid()}{i}" for i in (0, 1)]
        for name in self.names:
            ip(f"netns add {name}")
        ip(f"link add {self.ends[0]} type veth peer name {self.ends[1]}")
        for i in (0, 1):
            ip(f"link set {self.ends[i]} netns {self.names[i]}")
            ip(f"-n {self.names[i]} address add 10.77.0.{i + 1}/24 dev {self.ends[i]}")
            ip(f"-n {self.names[i]} link set {self.ends[i]} up")
            ip(f"-n {self.names[i]} link set lo up")

    def cut(self):
        ip(f"-n {self.names[0]} link set {self.ends[0]} down")

    def remove(self):
        for name in self.names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)


@pytest.fixture
def cable():
    if os.geteuid() or not shutil.which("ip"):
        pytest.skip("network namespaces need root and ip")
    try:
        made = Cable()
    except subprocess.CalledProcessError as e:
        pytest.skip(f"no network namespaces here: {e.stderr}")
    yield made
    made.remove()


def train_arguments(folder: Path, *more: str) -> list[str]:
    settings = ["-p", "max_steps", "12", "-p", "save_steps", "3"]
    return ["train", "--recipe", "toy", *settings, *more, "--out", str(folder)]


class Host:
    """The command on one of two hosts; their folder is shared."""

    def __init__(self, cable: Cable, node: int, folder: Path, *more: str):
        now = time.time_ns()
        self.mark = f"HOST{node}{os.getpid()}{now}"
        self.log = folder.parent / f"{folder.name}.host{node}.{now}"
        hosts = ["--nnodes", "2", "--node-rank", str(node), "--rdzv-endpoint", "10.77.0.1:29555"]
        settings = ["-p", "per_device_train_batch_size", "2", *hosts, *more]
        command = [*COMMAND, *train_arguments(folder, *settings)]
        self.command = start(
            ["ip", "netns", "exec", cable.names[node], *command],
            env={**os.environ, "TEST_MARK": self.mark},
            stdout=subprocess.DEVNULL, stderr=open(self.log, "w"))

    def end(self, limit: float) -> str:
        """Its last line, when it has ended and no process is left."""
        self.command.wait(limit)
        assert not processes_with(self.mark)
        return self.stderr().splitlines()[-1]

    def stderr(self) -> str:
        return self.log.read_text().replace("\r", "\n").strip()

    def process(self, text: str) -> int:
        """The id of the first process with `text` in its command line, but `ip` itself."""
        lines = [line for line in processes_with(self.mark) if text in line and "netns" not in line]
        return int(lines[0].split(":")[0])

    def kill(self):
        for line in processes_with(self.mark):
            os.kill(int(line.split(":")[0]), signal.SIGKILL)
        self.command.wait()


def start_hosts(cable: Cable, folder: Path, *more: str) -> list[Host]:
    return [Host(cable, node, folder, *more) for node in (0, 1)]


def check_both_finish(hosts: list[Host], limit: float = 240):
    codes = [h.command.wait(limit) for h in hosts]
    assert codes == [0, 0], [h.stderr()[-900:] for h in hosts]


def wait_for_checkpoint(folder: Path, step: int, hosts: list[Host]):
    deadline = time.time() + 180
    state = folder / f"checkpoints/checkpoint-{step}/trainer_state.json"
    while not state.exists():
        running = all(h.command.poll() is None for h in hosts)
        assert running and time.time() < deadline, [h.stderr()[-900:] for h in hosts]
        time.sleep(0.05)


@pytest.fixture(scope="module")
def one_host(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("one") / "run"
    arguments = train_arguments(folder, "-p", "per_device_train_batch_size", "4")
    subprocess.run([*COMMAND, *arguments], check=True, capture_output=True)
    return folder


def check_same_run(one: Path, folder: Path):
    """Losses as near as sums in another order are; adapters likewise."""
    expected, metrics = (read_lines(f / "metrics.jsonl") for f in (one, folder))
    assert [m["step"] for m in metrics] == list(range(1, 13))
    assert [m["loss"] for m in metrics] == pytest.approx([m["loss"] for m in expected], abs=1e-4)
    assert [m["tokens"] for m in metrics] == [m["tokens"] for m in expected]
    a, b = (load_file(f / "adapter/adapter_model.safetensors") for f in (one, folder))
    assert max((a[k] - b[k]).abs().max().item() for k in a) < 2e-3


@pytest.mark.skipif(not ALL, reason="make test-all; test_launch.py has two hosts on one network")
def test_two_hosts_train_as_one(cable, one_host, tmp_path):
    check_both_finish(start_hosts(cable, tmp_path / "run"))
    check_same_run(one_host, tmp_path / "run")
    assert (tmp_path / "run/rank1.ipynb").exists()


@pytest.mark.skipif(not ALL, reason="make test-all; test_launch.py has two hosts on one network")
@pytest.mark.parametrize("lost", [1, 0])
def test_a_host_disappears_and_both_resume_later(lost, cable, tmp_path, request):
    """Every process of one host is killed; later both are started again with --resume."""
    hosts = start_hosts(cable, tmp_path / "run")
    wait_for_checkpoint(tmp_path / "run", 3, hosts)
    began = time.time()
    hosts[lost].kill()
    left = hosts[1 - lost]
    line = left.end(LIMIT)
    print(f"host {lost} killed: {time.time() - began:.1f} s; {line}")
    assert left.command.returncode == 1
    assert f"medmcqa-lora: host {lost} has not been heard of for 20 s" in line
    check_both_finish(start_hosts(cable, tmp_path / "run", "--resume"))
    check_same_run(request.getfixturevalue("one_host"), tmp_path / "run")


@pytest.mark.skipif(not ALL, reason="make test-all")
def test_the_cable_is_cut(cable, tmp_path):
    hosts = start_hosts(cable, tmp_path / "run", *LONG)
    wait_for_checkpoint(tmp_path / "run", 3, hosts)
    began = time.time()
    cable.cut()
    for i in (0, 1):
        line = hosts[i].end(LIMIT - (time.time() - began))
        print(f"cable cut, host {i}: {time.time() - began:.1f} s; {line}")
        assert hosts[i].command.returncode != 0
        assert f"medmcqa-lora: host {1 - i} has not been heard of for 20 s" in line


@pytest.mark.skipif(not ALL, reason="make test-all")
def test_both_hosts_name_the_rank_that_raises(cable, tmp_path):
    """One kernel is killed: its host says so, and so does the other."""
    hosts = start_hosts(cable, tmp_path / "run", *LONG)
    wait_for_checkpoint(tmp_path / "run", 3, hosts)
    began = time.time()
    os.kill(hosts[1].process("ipykernel_launcher"), signal.SIGKILL)
    lines = [h.end(LIMIT) for h in hosts]
    print(f"kernel of host 1 killed: {time.time() - began:.1f} s; {lines}")
    assert "medmcqa-lora: rank 1: its kernel was killed by SIGKILL" in lines[1]
    assert "medmcqa-lora: host 1: rank 1: its kernel was killed by SIGKILL" in lines[0]


@pytest.mark.skipif(not ALL, reason="make test-all")
@pytest.mark.parametrize("how", ["host", "kernel"])
def test_with_restarts_it_resumes_by_itself(how, cable, one_host, tmp_path):
    """A host is killed and its command started again, as a scheduler does; or a kernel is killed
    and nobody does anything."""
    restarts = ["--max-restarts", "3"]
    hosts = start_hosts(cable, tmp_path / "run", *restarts)
    wait_for_checkpoint(tmp_path / "run", 3, hosts)
    began = time.time()
    if how == "host":
        hosts[1].kill()
        time.sleep(3)
        hosts[1] = Host(cable, 1, tmp_path / "run", *restarts)
    else:
        os.kill(hosts[0].process("ipykernel_launcher"), signal.SIGKILL)
    check_both_finish(hosts, 300)
    print(f"{how} killed, finished after {time.time() - began:.1f} s")
    check_same_run(one_host, tmp_path / "run")
    assert (tmp_path / "run/train.1.ipynb").exists()


@pytest.mark.skipif(not ALL, reason="make test-all")
def test_ctrl_c_on_one_host_stops_both_after_one_step(cable, tmp_path):
    hosts = start_hosts(cable, tmp_path / "run", *LONG)
    wait_for_checkpoint(tmp_path / "run", 3, hosts)
    began = time.time()
    os.kill(hosts[1].process("cli import main"), signal.SIGINT)
    lines = [h.end(LIMIT) for h in hosts]
    print(f"Ctrl-C on host 1: {time.time() - began:.1f} s; {lines}")
    steps = {re.search(r"stopped after step (\d+)", line)[1] for line in lines}
    assert len(steps) == 1
    assert (tmp_path / f"run/checkpoints/checkpoint-{steps.pop()}").is_dir()


TWO = ("--nnodes", "2")
WRONG = {  # arguments of train -> what the message must hold
    (*TWO, "--node-rank", "2", "--rdzv-endpoint", "h:1"):
        "--node-rank 2: with --nnodes 2 it is one of 0 to 1",
    (*TWO, "--node-rank", "-1", "--rdzv-endpoint", "h:1"): "--node-rank -1: with --nnodes 2",
    ("--node-rank", "1"): "--node-rank 1: with --nnodes 1 it is 0",
    TWO: "several hosts need --rdzv-endpoint HOST:PORT",
    ("--nnodes", "0"): "--nnodes 0: must be at least 1",
    (*TWO, "--rdzv-endpoint", "node0"): "--rdzv-endpoint node0: is not HOST:PORT",
    (*TWO, "--rdzv-endpoint", "no-such-host.invalid:29500"):
        "--rdzv-endpoint no-such-host.invalid:29500: can't be reached from here",
    ("--max-restarts", "-1"): "--max-restarts -1: is a number of restarts",
    ("--print", "pbs"): "--print pbs: there is slurm alone",
}


@pytest.mark.parametrize("given", WRONG, ids=" ".join)
def test_wrong_arguments_about_hosts(given, cli, tmp_path):
    code, _, err = cli(*train_arguments(tmp_path / "run"), *given)
    assert code == 1 and WRONG[given] in err and err.count("\n") == 1, err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("endpoint", ["node0", "node0:", ":29500", "node0:http", "node0:99999"])
def test_what_is_no_endpoint(endpoint):
    with pytest.raises(ValueError, match="is not HOST:PORT"):
        split_endpoint(endpoint)


def test_the_only_host_has_number_0():
    with pytest.raises(ValueError, match="it is 0"):
        check_hosts(1, 1, "")


def test_the_slurm_script_is_bash_and_passes_the_arguments_on(cli):
    settings = ["-p", "data", "my 'rows'.jsonl", "--nnodes", "4", "--nproc-per-node", "8"]
    command = ["train", "--recipe", "toy", *settings, "--out", "/shared/run", "--print", "slurm"]
    code, out, _ = cli(*command)
    assert code == 0 and "#SBATCH --nodes=4\n" in out and "#SBATCH --gpus-per-node=8\n" in out
    assert subprocess.run(["bash", "-n"], input=out, text=True).returncode == 0
    stand_ins = """scontrol() { echo a; }; srun() { shift; SLURM_NODEID=3 "$@"; }
medmcqa-lora() { printf '%s\\n' "$@"; }; export -f medmcqa-lora; SLURM_JOB_ID=7
"""
    program = stand_ins + out.replace("exec ", "")
    done = subprocess.run(["bash"], input=program, text=True, capture_output=True)
    passed = done.stdout.splitlines()
    assert "my 'rows'.jsonl" in passed
    assert passed[passed.index("--node-rank") + 1] == "3"
    assert passed[passed.index("--rdzv-endpoint") + 1] == "a:20007"
