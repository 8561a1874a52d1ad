"""Killed at any moment and started again with --resume, a run ends as one that was never stopped:
the same losses, the same bytes.
"""
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ALL, processes_with

from medmcqa_lora.training.checkpoints import MANIFEST, checkpoints, flaw, seal
from medmcqa_lora.core.files import read_lines
from medmcqa_lora.launch.launcher import LaunchError, launch_train
from medmcqa_lora.core.recipe_files import load_recipe

COMMAND = [sys.executable, "-c", "from medmcqa_lora.cli import main; main()"]
SMALL = dict(max_rows=10, max_eval_rows=2, per_device_train_batch_size=2, logging_steps=3, save_steps=4, max_steps=11)  # lines and checkpoints at different steps; epochs end in between
RUNS = {"dropout": SMALL | dict(lora_dropout=0.1, gradient_accumulation_steps=2),  # random states; an epoch's last step has one batch
        "early stopping": SMALL | dict(eval_steps=2, save_steps=2, early_stopping_patience=2, learning_rate=1.0, seed=8, save_total_limit=3)}
SPEED = ("tokens_per_s", "peak_memory_gib")


def words(settings: dict, processes: int, folder: Path) -> list[str]:
    settings = settings | dict(per_device_train_batch_size=2 // processes)
    return ["train", "--recipe", "toy", *(w for k, v in settings.items() for w in ("-p", k, str(v))), "--nproc-per-node", str(processes), "--out", str(folder)]


def command(*given) -> subprocess.CompletedProcess:
    return subprocess.run([*COMMAND, *given], capture_output=True, text=True, timeout=600)


@pytest.fixture(scope="session")
def never_stopped(tmp_path_factory):
    """Runs to compare with, made once each."""
    made = {}

    def get(kind: str, processes: int) -> Path:
        if (kind, processes) not in made:
            folder = tmp_path_factory.mktemp("whole") / "run"
            done = command(*words(RUNS[kind], processes, folder))
            assert done.returncode == 0, done.stderr[-2000:]
            made[kind, processes] = folder
        return made[kind, processes]

    return get


def left(folder: Path) -> dict:
    """All of a finished run that has to be the same."""
    logs = {name: [{k: v for k, v in line.items() if k not in SPEED} for line in read_lines(folder / name)] for name in ("metrics.jsonl", "evals.jsonl")}
    result = {k: v for k, v in json.loads((folder / "result.json").read_text()).items() if k not in (*SPEED, "seconds")}
    adapter = {p.name: p.read_bytes() for p in (folder / "adapter").iterdir()}
    saved = {p.name: {f: s for f, s in json.loads((p / MANIFEST).read_text())["files"].items() if f.endswith(".safetensors") or f.startswith(("optimizer", "scheduler", "rng"))} for p in checkpoints(folder)}
    return logs | dict(result=result, adapter=adapter, checkpoints=saved)


def same(folder: Path, whole: Path) -> None:
    found, wanted = left(folder), left(whole)
    for part in wanted:
        assert found[part] == wanted[part], part
    assert not [p for p in folder.rglob(".*") if p.suffix in (".part", ".tmp")] and not [p for p in checkpoints(folder) if flaw(p)]


def pids(mark: str, what: str = "") -> list[int]:
    return [int(p.split(":")[0]) for p in processes_with(mark) if what in p]


def newest_line(folder: Path, n: int) -> bool:
    file = folder / "metrics.jsonl"
    return file.exists() and file.read_bytes().count(b"\n") >= n


MOMENTS = {  # what is waited for, and the most seconds until the kill
    "before the first step": (lambda f, n: (f / "recipe.json").exists(), 4.0),
    "in a step": (lambda f, n: newest_line(f, min(n, 2)), 0.8),  # of the early stopped run's lines the third is its last
    "while a checkpoint is written": (lambda f, n: next(f.glob("checkpoints/.checkpoint-*.part"), None) and len(list(f.glob("checkpoints/checkpoint-*"))) >= n - 1, 0.03),
    "behind a checkpoint": (lambda f, n: len(list(f.glob("checkpoints/checkpoint-*"))) >= min(n, 2), 0.4),
    "while the adapter is written": (lambda f, n: next(f.glob(".adapter-*"), None) or (f / "adapter").exists(), 0.02),
    "at the card": (lambda f, n: (f / "adapter").exists(), 0.5),
}
ORDER = ["while a checkpoint is written", "in a step", "before the first step", "while a checkpoint is written", "behind a checkpoint", "while the adapter is written", "in a step", "at the card"]


def kill(folder: Path, settings: dict, processes: int, seed: int) -> str:
    """Start a run and end it by SIGKILL; says when it was."""
    draw, mark = random.Random(seed), f"MARK{os.getpid()}-{seed}-{processes}"
    moment, victim = ORDER[seed % len(ORDER)], draw.choice(["everything", "everything", "the command", "a kernel"])
    met, most = MOMENTS[moment]
    n, delay = draw.randint(1, 3), draw.uniform(0, most)
    run = subprocess.Popen([*COMMAND, *words(settings, processes, folder)], env=os.environ | {"MARK": mark}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    while not (folder / "recipe.json").exists() and run.poll() is None:
        time.sleep(0.01)
    kernels = pids(mark, "ipykernel")
    while not (reached := met(folder, n)) and run.poll() is None:
        time.sleep(0.0005)
    assert reached, f"the run ended before the moment {moment!r} was seen, so nothing was killed"
    time.sleep(delay)
    if victim == "the command":
        os.kill(run.pid, signal.SIGKILL)
    elif victim == "a kernel":
        for pid in kernels[-1:]:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:  # at its end
                pass
    else:
        for pid in kernels + pids(mark):
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
    run.wait()
    return f"{victim}, {moment} ({n}, {1000 * delay:.0f} ms)"


CASES = [(seed, processes) for processes in (1, 2) for seed in range(20)]


@pytest.mark.parametrize("seed, processes", CASES if ALL else [(1, 1), (8, 2)], ids=lambda v: str(v))
def test_killed_at_any_moment_it_ends_the_same(seed, processes, tmp_path, never_stopped):
    kind = list(RUNS)[seed // 8 % 2] if ALL else list(RUNS)[processes - 1]
    whole, folder = never_stopped(kind, processes), tmp_path / "run"
    said = kill(folder, RUNS[kind], processes, seed)
    done = command(*words(RUNS[kind], processes, folder), "--resume")
    assert done.returncode == 0, (said, done.stderr[-2000:])
    try:
        same(folder, whole)
    except AssertionError as e:
        raise AssertionError(f"{kind}, {processes} processes, killed: {said}") from e


def test_the_runs_to_compare_with_are_worth_it(never_stopped):
    """Early stopping ends the one before its last step, after the second epoch has begun and two
    evaluations without a better loss.
    """
    whole = never_stopped("early stopping", 2)
    result, evals = json.loads((whole / "result.json").read_text()), read_lines(whole / "evals.jsonl")
    assert result["steps"] == 8 < SMALL["max_steps"] and result["epochs"] > 1 and min(evals, key=lambda e: e["eval_loss"])["step"] == 4


def test_a_broken_checkpoint_is_named_and_the_one_before_taken(tmp_path, never_stopped):
    whole = never_stopped("early stopping", 2)
    folder = shutil.copytree(whole, tmp_path / "run")
    newest, before = checkpoints(folder)[:2]
    shutil.rmtree(folder / "adapter")
    (state := newest / "optimizer.pt").write_bytes(state.read_bytes()[:-1])
    done = command(*words(RUNS["early stopping"], 2, folder), "--resume")
    assert done.returncode == 0, done.stderr[-2000:]
    assert f"{newest.name} is broken (optimizer.pt is not as it was written); going on from {before.name}" in done.stderr
    same(folder, whole)


@pytest.mark.skipif(not ALL, reason="make test-all; find_start and last_checkpoint themselves are tested in training.checkpoints")
def test_what_a_run_can_not_go_on_with(tmp_path, never_stopped):
    whole = never_stopped("dropout", 1)
    folder = shutil.copytree(whole, tmp_path / "run")
    recipe = load_recipe("toy", {k: str(v) for k, v in RUNS["dropout"].items()} | {"out": str(folder)})
    with pytest.raises(ValueError, match="was started with 1 process and this is 2"):
        launch_train(recipe, resume=True, nproc=2)
    for p in checkpoints(folder):
        seal(p, json.loads((p / MANIFEST).read_text()) | dict(rows="others"))
    with pytest.raises(LaunchError, match="the rows are not those that the run was started with"):
        launch_train(recipe, resume=True)
    for p in checkpoints(folder):
        (p / MANIFEST).unlink()
    with pytest.raises(LaunchError, match="no checkpoint is intact"):
        launch_train(recipe, resume=True)


APART = """
import sys; from pathlib import Path; from types import SimpleNamespace
from accelerate import PartialState
from medmcqa_lora.checkpoints import Keeper, flaw, share
state, own = PartialState(cpu=True), Path(sys.argv[1 + int(__import__("os").environ["RANK"])])
trainer = SimpleNamespace(keeper=Keeper(own, None), is_world_process_zero=lambda: state.process_index == 0, args=SimpleNamespace(local_process_index=0), accelerator=state)
found = share(trainer, own / "checkpoints/checkpoint-3" if state.process_index == 0 else None)
assert found == own / "checkpoints/checkpoint-3" and not flaw(found), found
"""


@pytest.mark.skipif(not ALL, reason="make test-all; hosts that share a folder have nothing to copy")
def test_hosts_without_a_common_folder_get_the_checkpoint(tmp_path):
    import socket

    (made := tmp_path / "host0/checkpoints/checkpoint-3").mkdir(parents=True)
    (tmp_path / "host1").mkdir()
    (made / "optimizer.pt").write_bytes(random.Random(0).randbytes(100_000))
    seal(made, dict(processes=2))
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = s.getsockname()[1]
    hosts = [str(tmp_path / f"host{i}") for i in (0, 1)]
    both = [subprocess.Popen([sys.executable, "-c", APART, *hosts], stderr=subprocess.PIPE, text=True, env=os.environ | dict(RANK=str(i), WORLD_SIZE="2", LOCAL_RANK="0", MASTER_ADDR="localhost", MASTER_PORT=str(port))) for i in (0, 1)]
    told = [p.communicate(timeout=120)[1] for p in both]
    assert [p.returncode for p in both] == [0, 0], told
    assert (tmp_path / "host1/checkpoints/checkpoint-3/optimizer.pt").read_bytes() == (made / "optimizer.pt").read_bytes()


@pytest.mark.skipif(not ALL, reason="make test-all; begin_demo and unfinished_demo are tested in cli")
@pytest.mark.parametrize("seen", ["base/predictions.jsonl", "recipe.json", "checkpoints/checkpoint-2", "tuned/evaluation.json"])
def test_a_demo_goes_on(seen, tmp_path):
    """Killed, and called again the same way, it takes up the folder that it had named, and does
    nothing twice.
    """
    given, mark = ["demo", "--recipe", "toy", *(w for k, v in (dict(max_steps=4, save_steps=2, max_eval_rows=8, max_rows=10)).items() for w in ("-p", k, str(v)))], f"MARK{os.getpid()}demo"
    run = subprocess.Popen([*COMMAND, *given], cwd=tmp_path, env=os.environ | {"MARK": mark}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not list(tmp_path.glob(f"_runs/demo-*/{seen}")) and run.poll() is None:
        time.sleep(0.005)
    while left_alive := pids(mark):
        for pid in left_alive:
            os.kill(pid, signal.SIGKILL)
        run.poll()
    whole = (folder := next(tmp_path.glob("_runs/demo-*"))) / "base/summary.json"
    before = whole.stat().st_mtime if whole.exists() else None
    done = subprocess.run([*COMMAND, *given], cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    assert f"going on with {folder.relative_to(tmp_path)}" in done.stdout and len(list(tmp_path.glob("_runs/*"))) == 1 and (folder / "comparison.json").exists()
    assert before in (None, whole.stat().st_mtime)
