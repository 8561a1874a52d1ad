"""Killed at any moment and resumed, a run ends with the bytes of one that was never stopped."""
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ALL, processes_with

from medmcqa_lora.core.files import read_lines
from medmcqa_lora.core.recipe_files import load_recipe
from medmcqa_lora.launch.launcher import LaunchError, launch_train
from medmcqa_lora.training.checkpoints import (
    MANIFEST,
    find_damage,
    list_checkpoints,
    read_manifest,
    write_manifest,
)

COMMAND = [sys.executable, "-c", "from medmcqa_lora.cli import main; main()"]
SMALL = dict(  # lines and checkpoints at different steps; epochs end in between
    max_rows=10, max_eval_rows=2, per_device_train_batch_size=2, logging_steps=3, save_steps=4,
    max_steps=11)
RUNS = {
    # random states; an epoch's last step has one batch
    "dropout": SMALL | dict(lora_dropout=0.1, gradient_accumulation_steps=2),
    "early stopping": SMALL | dict(eval_steps=2, save_steps=2, early_stopping_patience=2,
                                   learning_rate=1.0, seed=8, save_total_limit=3),
}
SPEED = ("tokens_per_s", "peak_memory_gib")


def words(settings: dict, processes: int, folder: Path) -> list[str]:
    settings = settings | dict(per_device_train_batch_size=2 // processes)
    given = [word for key, value in settings.items() for word in ("-p", key, str(value))]
    return ["train", "--recipe", "toy", *given, "--nproc-per-node", str(processes),
            "--out", str(folder)]


def command(*given) -> subprocess.CompletedProcess:
    return subprocess.run([*COMMAND, *given], capture_output=True, text=True, timeout=600)


@pytest.fixture(scope="session")
def never_stopped(tmp_path_factory):
    """Runs to compare with, made once each."""
    made = {}

    def get(kind: str, processes: int) -> Path:
        if (kind, processes) not in made:
            folder = tmp_path_factory.mktemp("undisturbed") / "run"
            done = command(*words(RUNS[kind], processes, folder))
            assert done.returncode == 0, done.stderr[-2000:]
            made[kind, processes] = folder
        return made[kind, processes]

    return get


def without(fields: tuple, record: dict) -> dict:
    return {k: v for k, v in record.items() if k not in fields}


def saved_files(checkpoint: Path) -> dict[str, str]:
    """Checksums of the files that decide how training goes on."""
    def decides(name):
        return name.endswith(".safetensors") or name.startswith(("optimizer", "scheduler", "rng"))

    files = json.loads((checkpoint / MANIFEST).read_text())["files"]
    return {name: digest for name, digest in files.items() if decides(name)}


def left(folder: Path) -> dict:
    """All of a finished run that has to be the same."""
    logs = {name: [without(SPEED, line) for line in read_lines(folder / name)]
            for name in ("metrics.jsonl", "evals.jsonl")}
    result = without((*SPEED, "seconds"), json.loads((folder / "result.json").read_text()))
    adapter = {p.name: p.read_bytes() for p in (folder / "adapter").iterdir()}
    saved = {p.name: saved_files(p) for p in list_checkpoints(folder)}
    return logs | dict(result=result, adapter=adapter, checkpoints=saved)


def same(folder: Path, undisturbed: Path) -> None:
    found, wanted = left(folder), left(undisturbed)
    for part in wanted:
        assert found[part] == wanted[part], part
    assert not [p for p in folder.rglob(".*") if p.suffix in (".part", ".tmp")]
    assert not [p for p in list_checkpoints(folder) if find_damage(p)]


def pids(mark: str, what: str = "") -> list[int]:
    return [int(p.split(":")[0]) for p in processes_with(mark) if what in p]


def has_lines(folder: Path, n: int) -> bool:
    file = folder / "metrics.jsonl"
    return file.exists() and file.read_bytes().count(b"\n") >= n


def has_checkpoints(folder: Path, n: int) -> bool:
    return len(list(folder.glob("checkpoints/checkpoint-*"))) >= n


def is_saving(folder: Path, n: int) -> bool:
    work = next(folder.glob("checkpoints/.checkpoint-*.part"), None)
    return bool(work) and has_checkpoints(folder, n - 1)


def has_adapter(folder: Path, n: int) -> bool:
    return (folder / "adapter").exists()


def begins_adapter(folder: Path, n: int) -> bool:
    return bool(next(folder.glob(".adapter-*"), None)) or has_adapter(folder, n)


MOMENTS = {  # what is waited for, and the most seconds until the kill
    "before the first step": (lambda f, n: (f / "recipe.json").exists(), 4.0),
    # of the early stopped run's lines the third is its last
    "in a step": (lambda f, n: has_lines(f, min(n, 2)), 0.8),
    "while a checkpoint is written": (is_saving, 0.03),
    "behind a checkpoint": (lambda f, n: has_checkpoints(f, min(n, 2)), 0.4),
    "while the adapter is written": (begins_adapter, 0.02),
    "at the card": (has_adapter, 0.5),
}
ORDER = ["while a checkpoint is written", "in a step", "before the first step",
         "while a checkpoint is written", "behind a checkpoint", "while the adapter is written",
         "in a step", "at the card"]


def end_all(found: list[int]) -> None:
    for pid in found:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:  # at its end
            pass


def kill(folder: Path, settings: dict, processes: int, seed: int) -> str:
    """Start a run and end it by SIGKILL; says when it was."""
    draw, mark = random.Random(seed), f"MARK{os.getpid()}-{seed}-{processes}"
    moment = ORDER[seed % len(ORDER)]
    victim = draw.choice(["everything", "everything", "the command", "a kernel"])
    met, most = MOMENTS[moment]
    n, delay = draw.randint(1, 3), draw.uniform(0, most)
    run = subprocess.Popen(
        [*COMMAND, *words(settings, processes, folder)], env=os.environ | {"MARK": mark},
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    while not (folder / "recipe.json").exists() and run.poll() is None:
        time.sleep(0.01)
    kernels = pids(mark, "ipykernel")
    reached = met(folder, n)
    while not reached and run.poll() is None:
        time.sleep(0.0005)
        reached = met(folder, n)
    assert reached, f"the run ended before the moment {moment!r} was seen, so nothing was killed"
    time.sleep(delay)
    victims = {"the command": [run.pid], "a kernel": kernels[-1:]}
    end_all(victims[victim] if victim in victims else kernels + pids(mark))
    run.wait()
    return f"{victim}, {moment} ({n}, {1000 * delay:.0f} ms)"


CASES = [(seed, processes) for processes in (1, 2) for seed in range(20)]


@pytest.mark.parametrize("seed, processes", CASES if ALL else [(1, 1), (8, 2)],
                         ids=lambda v: str(v))
def test_killed_at_any_moment_it_ends_the_same(seed, processes, tmp_path, never_stopped):
    kind = list(RUNS)[seed // 8 % 2] if ALL else list(RUNS)[processes - 1]
    undisturbed, folder = never_stopped(kind, processes), tmp_path / "run"
    said = kill(folder, RUNS[kind], processes, seed)
    done = command(*words(RUNS[kind], processes, folder), "--resume")
    assert done.returncode == 0, (said, done.stderr[-2000:])
    try:
        same(folder, undisturbed)
    except AssertionError as e:
        raise AssertionError(f"{kind}, {processes} processes, killed: {said}") from e


def test_the_runs_to_compare_with_are_worth_it(never_stopped):
    """Early stopping ends one early, in the second epoch, after two evaluations without a gain."""
    run = never_stopped("early stopping", 2)
    result, evals = json.loads((run / "result.json").read_text()), read_lines(run / "evals.jsonl")
    assert result["steps"] == 8 < SMALL["max_steps"] and result["epochs"] > 1
    assert min(evals, key=lambda e: e["eval_loss"])["step"] == 4


def test_a_broken_checkpoint_is_named_and_the_one_before_taken(tmp_path, never_stopped):
    undisturbed = never_stopped("early stopping", 2)
    folder = shutil.copytree(undisturbed, tmp_path / "run")
    newest, before = list_checkpoints(folder)[:2]
    shutil.rmtree(folder / "adapter")
    state = newest / "optimizer.pt"
    state.write_bytes(state.read_bytes()[:-1])
    done = command(*words(RUNS["early stopping"], 2, folder), "--resume")
    assert done.returncode == 0, done.stderr[-2000:]
    assert (f"{newest.name} is broken (optimizer.pt is not as it was written); "
            f"going on from {before.name}") in done.stderr
    same(folder, undisturbed)


@pytest.mark.skipif(not ALL, reason="make test-all; tested in training.checkpoints by function")
def test_what_a_run_can_not_go_on_with(tmp_path, never_stopped):
    folder = shutil.copytree(never_stopped("dropout", 1), tmp_path / "run")
    settings = {k: str(v) for k, v in RUNS["dropout"].items()}
    recipe = load_recipe("toy", settings | {"out": str(folder)})
    with pytest.raises(ValueError, match="was started with 1 process and this is 2"):
        launch_train(recipe, resume=True, nproc=2)
    for p in list_checkpoints(folder):
        write_manifest(p, read_manifest(p) | dict(rows="others"))
    said = "the rows are not those that the run was started with"
    with pytest.raises(LaunchError, match=said):
        launch_train(recipe, resume=True)
    for p in list_checkpoints(folder):
        (p / MANIFEST).unlink()
    with pytest.raises(LaunchError, match="no checkpoint is intact"):
        launch_train(recipe, resume=True)


def broadcast(runs: list[str]) -> None:
    """One of two processes, each with a run's folder of its own: rank 0's checkpoint for both."""
    from types import SimpleNamespace

    from accelerate import PartialState

    from medmcqa_lora.training.checkpoints import Checkpointer, broadcast_checkpoint

    state = PartialState(cpu=True)
    is_first = state.process_index == 0
    expected = Path(runs[state.process_index]) / "checkpoints/checkpoint-3"
    trainer = SimpleNamespace(
        checkpointer=Checkpointer(Path(runs[state.process_index]), None), accelerator=state,
        is_world_process_zero=lambda: is_first, args=SimpleNamespace(local_process_index=0))
    found = broadcast_checkpoint(trainer, expected if is_first else None)
    assert found == expected and not find_damage(found), found


BROADCAST = "import sys; sys.path[:0] = {path!r}; import test_resume; test_resume.broadcast({runs})"


@pytest.mark.skipif(not ALL, reason="make test-all; hosts that share a folder copy nothing")
def test_hosts_without_a_common_folder_get_the_checkpoint(tmp_path):
    runs = [str(tmp_path / f"host{i}") for i in (0, 1)]
    made, copy = (Path(run, "checkpoints/checkpoint-3") for run in runs)
    made.mkdir(parents=True)
    Path(runs[1]).mkdir()
    (made / "optimizer.pt").write_bytes(random.Random(0).randbytes(100_000))
    write_manifest(made, dict(processes=2))
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = s.getsockname()[1]
    here = Path(__file__).parent
    code = BROADCAST.format(path=[str(here), str(here.parent)], runs=runs)
    env = os.environ | dict(WORLD_SIZE="2", LOCAL_RANK="0", MASTER_ADDR="localhost",
                            MASTER_PORT=str(port))
    both = [subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True,
                             env=env | dict(RANK=str(i))) for i in (0, 1)]
    said = [p.communicate(timeout=120)[1] for p in both]
    assert [p.returncode for p in both] == [0, 0], said
    assert (copy / "optimizer.pt").read_bytes() == (made / "optimizer.pt").read_bytes()


DEMO = dict(max_steps=4, save_steps=2, max_eval_rows=8, max_rows=10)


@pytest.mark.skipif(not ALL, reason="make test-all; begin_demo and unfinished_demo: see cli")
@pytest.mark.parametrize("seen", ["base/predictions.jsonl", "recipe.json",
                                  "checkpoints/checkpoint-2", "tuned/evaluation.json"])
def test_a_demo_goes_on(seen, tmp_path):
    """Killed, and called again the same way, it takes its folder again and does nothing twice."""
    settings = [word for key, value in DEMO.items() for word in ("-p", key, str(value))]
    given, mark = ["demo", "--recipe", "toy", *settings], f"MARK{os.getpid()}demo"
    run = subprocess.Popen([*COMMAND, *given], cwd=tmp_path, env=os.environ | {"MARK": mark},
                           stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not list(tmp_path.glob(f"_runs/demo-*/{seen}")) and run.poll() is None:
        time.sleep(0.005)
    alive = pids(mark)
    while alive:
        end_all(alive)
        run.poll()
        alive = pids(mark)
    folder = next(tmp_path.glob("_runs/demo-*"))
    summary = folder / "base/summary.json"
    before = summary.stat().st_mtime if summary.exists() else None
    done = subprocess.run([*COMMAND, *given], cwd=tmp_path, capture_output=True, text=True,
                          timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    assert f"going on with {folder.relative_to(tmp_path)}" in done.stdout
    assert len(list(tmp_path.glob("_runs/*"))) == 1 and (folder / "comparison.json").exists()
    assert before in (None, summary.stat().st_mtime)
