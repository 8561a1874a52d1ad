"""Two hosts: network namespaces on this machine, joined by a cable that can be cut. Needs root."""
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ALL, processes_with
from safetensors.torch import load_file

from medmcqa_lora.core.files import read_lines

COMMAND = [sys.executable, "-c", "from medmcqa_lora.cli import main; main()"]
LIMIT = 60  # seconds until the other host has ended


def ip(words: str):
    subprocess.run(["ip", *words.split()], check=True, capture_output=True, text=True)


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


def words(folder: Path, *more: str) -> list[str]:
    return ["train", "--recipe", "toy", "-p", "max_steps", "12", "-p", "save_steps", "3", *more, "--out", str(folder)]


class Host:
    """The command on one of two hosts; their folder is shared."""

    def __init__(self, cable: Cable, node: int, folder: Path, *more: str):
        self.mark, self.log = f"HOST{node}{os.getpid()}{time.time_ns()}", folder.parent / f"{folder.name}.host{node}.{time.time_ns()}"
        line = [*COMMAND, *words(folder, "-p", "per_device_train_batch_size", "2", "--nnodes", "2", "--node-rank", str(node), "--rdzv-endpoint", "10.77.0.1:29555", *more)]
        self.command = subprocess.Popen(["ip", "netns", "exec", cable.names[node], *line], env={**os.environ, "TEST_MARK": self.mark}, stdout=subprocess.DEVNULL, stderr=open(self.log, "w"))

    def end(self, limit: float) -> str:
        """Its last line, when it has ended and nothing is left."""
        self.command.wait(limit)
        assert not processes_with(self.mark)
        return self.told().splitlines()[-1]

    def told(self) -> str:
        return self.log.read_text().replace("\r", "\n").strip()

    def kill(self):
        for line in processes_with(self.mark):
            os.kill(int(line.split(":")[0]), signal.SIGKILL)
        self.command.wait()


def wait_for_checkpoint(folder: Path, step: int, *hosts: Host):
    deadline = time.time() + 180
    while not (folder / f"checkpoints/checkpoint-{step}/trainer_state.json").exists():
        assert time.time() < deadline and all(h.command.poll() is None for h in hosts), [h.told()[-900:] for h in hosts]
        time.sleep(0.05)


@pytest.fixture(scope="module")
def one_host(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("one") / "run"
    subprocess.run([*COMMAND, *words(folder, "-p", "per_device_train_batch_size", "4")], check=True, capture_output=True)
    return folder


def same_as(one: Path, folder: Path):
    """Losses as near as sums in another order are; adapters likewise."""
    metrics = [read_lines(f / "metrics.jsonl") for f in (one, folder)]
    assert [m["step"] for m in metrics[1]] == list(range(1, 13))
    assert [m["loss"] for m in metrics[1]] == pytest.approx([m["loss"] for m in metrics[0]], abs=1e-4)
    assert [m["tokens"] for m in metrics[1]] == [m["tokens"] for m in metrics[0]]
    a, b = (load_file(f / "adapter/adapter_model.safetensors") for f in (one, folder))
    assert max((a[k] - b[k]).abs().max().item() for k in a) < 2e-3


@pytest.mark.skipif(not ALL, reason="make test-all; test_launch.py has two hosts on one network")
def test_two_hosts_train_as_one(cable, one_host, tmp_path):
    hosts = [Host(cable, i, tmp_path / "run") for i in (0, 1)]
    assert [h.command.wait(240) for h in hosts] == [0, 0], [h.told()[-900:] for h in hosts]
    same_as(one_host, tmp_path / "run")
    assert (tmp_path / "run/rank1.ipynb").exists()


@pytest.mark.skipif(not ALL, reason="make test-all; test_launch.py has two hosts on one network")
@pytest.mark.parametrize("lost", [1, 0])
def test_a_host_disappears_and_both_go_on_later(lost, cable, tmp_path, request):
    """Every process of one host is killed; later both are started again with --resume."""
    hosts = [Host(cable, i, tmp_path / "run") for i in (0, 1)]
    wait_for_checkpoint(tmp_path / "run", 3, *hosts)
    began = time.time()
    hosts[lost].kill()
    line = hosts[1 - lost].end(LIMIT)
    print(f"host {lost} killed: {time.time() - began:.1f} s; {line}")
    assert hosts[1 - lost].command.returncode == 1 and f"medmcqa-lora: host {lost} has not been heard of for 20 s" in line
    hosts = [Host(cable, i, tmp_path / "run", "--resume") for i in (0, 1)]
    assert [h.command.wait(240) for h in hosts] == [0, 0], [h.told()[-900:] for h in hosts]
    same_as(request.getfixturevalue("one_host"), tmp_path / "run")


@pytest.mark.skipif(not ALL, reason="make test-all")
def test_the_cable_is_cut(cable, tmp_path):
    hosts = [Host(cable, i, tmp_path / "run", "-p", "max_steps", "3000") for i in (0, 1)]
    wait_for_checkpoint(tmp_path / "run", 3, *hosts)
    began = time.time()
    cable.cut()
    for i in (0, 1):
        line = hosts[i].end(LIMIT - (time.time() - began))
        print(f"cable cut, host {i}: {time.time() - began:.1f} s; {line}")
        assert hosts[i].command.returncode != 0 and f"medmcqa-lora: host {1 - i} has not been heard of for 20 s" in line


@pytest.mark.skipif(not ALL, reason="make test-all")
def test_both_hosts_name_the_rank_that_raises(cable, tmp_path):
    """One kernel is killed: its host says so, and so does the other."""
    hosts = [Host(cable, i, tmp_path / "run", "-p", "max_steps", "3000") for i in (0, 1)]
    wait_for_checkpoint(tmp_path / "run", 3, *hosts)
    began = time.time()
    kernel, = [line for line in processes_with(hosts[1].mark) if "ipykernel_launcher" in line]
    os.kill(int(kernel.split(":")[0]), signal.SIGKILL)
    told = [h.end(LIMIT) for h in hosts]
    print(f"kernel of host 1 killed: {time.time() - began:.1f} s; {told}")
    assert "medmcqa-lora: rank 1: its kernel was killed by SIGKILL" in told[1] and "medmcqa-lora: host 1: rank 1: its kernel was killed by SIGKILL" in told[0]


@pytest.mark.skipif(not ALL, reason="make test-all")
@pytest.mark.parametrize("how", ["host", "kernel"])
def test_with_restarts_it_goes_on_by_itself(how, cable, one_host, tmp_path):
    """A host is killed and its command started again, as a scheduler does; or a kernel is killed and nobody does anything."""
    hosts = [Host(cable, i, tmp_path / "run", "--max-restarts", "3") for i in (0, 1)]
    wait_for_checkpoint(tmp_path / "run", 3, *hosts)
    began = time.time()
    if how == "host":
        hosts[1].kill()
        time.sleep(3)
        hosts[1] = Host(cable, 1, tmp_path / "run", "--max-restarts", "3")
    else:
        os.kill(int(next(line for line in processes_with(hosts[0].mark) if "ipykernel_launcher" in line).split(":")[0]), signal.SIGKILL)
    assert [h.command.wait(300) for h in hosts] == [0, 0], [h.told()[-900:] for h in hosts]
    print(f"{how} killed, finished after {time.time() - began:.1f} s")
    same_as(one_host, tmp_path / "run")
    assert (tmp_path / "run/train.1.ipynb").exists()


@pytest.mark.skipif(not ALL, reason="make test-all")
def test_ctrl_c_on_one_host_stops_both_behind_one_step(cable, tmp_path):
    hosts = [Host(cable, i, tmp_path / "run", "-p", "max_steps", "3000") for i in (0, 1)]
    wait_for_checkpoint(tmp_path / "run", 3, *hosts)
    began = time.time()
    command = next(int(line.split(":")[0]) for line in processes_with(hosts[1].mark) if "cli import main" in line and "netns" not in line)
    os.kill(command, signal.SIGINT)
    told = [h.end(LIMIT) for h in hosts]
    print(f"Ctrl-C on host 1: {time.time() - began:.1f} s; {told}")
    steps = {re.search(r"stopped behind step (\d+)", line)[1] for line in told}
    assert len(steps) == 1 and (tmp_path / f"run/checkpoints/checkpoint-{steps.pop()}").is_dir()


WRONG = {  # words behind train, what the message must hold
    ("--nnodes", "2", "--node-rank", "2", "--rdzv-endpoint", "h:1"): "--node-rank 2: with --nnodes 2 it is one of 0 to 1",
    ("--nnodes", "2", "--node-rank", "-1", "--rdzv-endpoint", "h:1"): "--node-rank -1: with --nnodes 2",
    ("--node-rank", "1"): "--node-rank 1: with --nnodes 1 it is 0",
    ("--nnodes", "2"): "several hosts need --rdzv-endpoint HOST:PORT",
    ("--nnodes", "0"): "--nnodes 0: must be at least 1",
    ("--nnodes", "2", "--rdzv-endpoint", "node0"): "--rdzv-endpoint node0: is not HOST:PORT",
    ("--nnodes", "2", "--rdzv-endpoint", "no-such-host.invalid:29500"): "--rdzv-endpoint no-such-host.invalid:29500: can't be reached from here",
    ("--max-restarts", "-1"): "--max-restarts -1: is a number of restarts",
    ("--print", "pbs"): "--print pbs: there is slurm alone",
}


@pytest.mark.parametrize("given", WRONG, ids=" ".join)
def test_wrong_words_about_hosts(given, cli, tmp_path):
    code, _, err = cli(*words(tmp_path / "run"), *given)
    assert code == 1 and WRONG[given] in err and err.count("\n") == 1, err
    assert not (tmp_path / "run").exists()


def test_the_slurm_script_is_bash_and_passes_the_words_on(cli, tmp_path):
    code, out, _ = cli("train", "--recipe", "toy", "-p", "data", "my 'rows'.jsonl", "--nnodes", "4", "--nproc-per-node", "8", "--out", "/shared/run", "--print", "slurm")
    assert code == 0 and "#SBATCH --nodes=4\n" in out and "#SBATCH --gpus-per-node=8\n" in out
    assert subprocess.run(["bash", "-n"], input=out, text=True).returncode == 0
    mock = "scontrol() { echo a; }; srun() { shift; SLURM_NODEID=3 \"$@\"; }; medmcqa-lora() { printf '%s\\n' \"$@\"; }; export -f medmcqa-lora; SLURM_JOB_ID=7\n"
    passed = subprocess.run(["bash"], input=mock + out.replace("exec ", ""), text=True, capture_output=True).stdout.splitlines()
    assert "my 'rows'.jsonl" in passed and passed[passed.index("--node-rank") + 1] == "3" and passed[passed.index("--rdzv-endpoint") + 1] == "a:20007"
