"""A disk that fills up, is read-only, or whose quota ends while a run saves.

The run prints one line or a warning, and the last good checkpoint is intact.
"""
import errno
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from conftest import ALL, processes_with
from helpers import start
from transformers import TrainerCallback

from medmcqa_lora.core.files import DiskError, read_lines
from medmcqa_lora.core.recipe_files import load_recipe
from medmcqa_lora.data.leakage import load_pair
from medmcqa_lora.data.tokens import encode_questions
from medmcqa_lora.fast.apply import apply_fast_parts
from medmcqa_lora.model.adapter import save_adapter
from medmcqa_lora.model.load import load_model
from medmcqa_lora.model.lora import attach_lora
from medmcqa_lora.model.resolve import load_tokenizer
from medmcqa_lora.training.checkpoints import find_damage, list_checkpoints
from medmcqa_lora.training.trainer import make_trainer, run_training

COMMAND = [sys.executable, "-c", "from medmcqa_lora.cli import main; main()"]
SMALL = dict(max_steps="8", save_steps="2", per_device_train_batch_size="2", max_rows="8")
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def disk(tmp_path):
    """A file system of 8 MiB in memory."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8M", "none", str(folder)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(folder: Path, left: int) -> Path:
    """Leave so many bytes free."""
    size = max(0, shutil.disk_usage(folder).free - left)
    file = folder / "filler"
    file.write_bytes(bytes(size))
    return file


def damages(run: Path) -> dict[str, str]:
    """What is wrong with each checkpoint; empty: intact."""
    return {p.name: find_damage(p) for p in list_checkpoints(run)}


class At(TrainerCallback):
    """Calls a function after a step, before its checkpoint."""

    def __init__(self, steps: dict):  # step -> function
        self.steps = steps

    def on_step_end(self, args, state, control, **kwargs):
        self.steps.pop(state.global_step, lambda: None)()


def trainer(run: Path, **settings):
    recipe = load_recipe("toy", SMALL | settings)
    tokenizer = load_tokenizer(recipe)
    encoded = encode_questions(load_pair(recipe)[0].questions, tokenizer, recipe)
    run.mkdir(exist_ok=True)
    model = apply_fast_parts(attach_lora(load_model(recipe), recipe), recipe)
    return make_trainer(model, tokenizer, encoded, recipe, run, packed=True)


def end(made, run: Path) -> tuple:
    """The adapter's bytes and the logged lines of a finished run."""
    folder = save_adapter(made.model, run / "adapter")
    lines = read_lines(run / "metrics.jsonl")
    logged = [(m["step"], m["loss"], m["tokens"]) for m in lines]
    return (folder / "adapter_model.safetensors").read_bytes(), logged


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    made = trainer(run)
    run_training(made, run)
    torch.set_num_threads(threads)
    return end(made, run)


def full(run, draw, undo):
    """No space for a part of the next checkpoint, drawn at random."""
    file = fill(run.parent, draw.randrange(0, 180_000, 4096))
    undo.append(file.unlink)


def read_only(run, draw, undo):
    def remount(how):
        subprocess.run(["mount", "-o", f"remount,{how}", str(run.parent)], check=True)

    remount("ro")
    undo.append(lambda: remount("rw"))


def quota(run, draw, undo):
    """No file system here has quotas: the system's answer, at a random call of fsync."""
    left, sync = [draw.randint(1, 12)], os.fsync

    def refuse(handle):
        left[0] -= 1
        if left[0] <= 0:
            raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))
        sync(handle)

    patched = patch("os.fsync", refuse)
    patched.start()
    undo.append(patched.stop)


def too_large(run, draw, undo):
    """Files may not become larger than this."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (draw.randint(4_000, 60_000), before[1]))
    undo.append(lambda: resource.setrlimit(resource.RLIMIT_FSIZE, before))


def undo_all(undo: list) -> None:
    while undo:
        undo.pop()()


FAULTS = [full, full, read_only, quota, too_large]


def train_and_stop(made, run: Path, capsys) -> None:
    """It ends with one line that names the file."""
    with pytest.raises(DiskError) as stopped:
        run_training(made, run)
    said = str(stopped.value)
    assert "\n" not in said and str(run) in said and "can't be written" in said, said


def train_and_warn(made, run: Path, capsys) -> None:
    """It goes on with a warning that names the file."""
    run_training(made, run)
    err = capsys.readouterr().err
    assert f"{run}" in err and "can't be written" in err and "save_errors = warn" in err


TRAIN = {"stop": train_and_stop, "warn": train_and_warn}


def resumed(run: Path, before: dict):
    """The run's trainer after a resume from the checkpoints before the fault, all intact."""
    assert before and damages(run) == before == dict.fromkeys(before, "")
    assert not [p for p in run.rglob(".*")]
    made = trainer(run)
    run_training(made, run, resume=True)
    return made


@pytest.mark.parametrize("seed", range(20) if ALL else (0, 8))
def test_a_checkpoint_that_can_not_be_written(seed, disk, undisturbed, capsys):
    """It stops or warns; without the fault it ends as if nothing had been."""
    draw, run = random.Random(seed), disk / "run"
    fault = FAULTS[seed % len(FAULTS)]
    answer = ("stop", "warn")[seed // len(FAULTS) % 2]
    step = draw.choice([4, 6])
    before, undo = {}, []

    def begin():
        before.update(damages(run))
        fault(run, draw, undo)

    made = trainer(run, save_errors=answer)
    steps = {step: begin}
    if answer == "warn":
        steps[step + 1] = partial(undo_all, undo)
    made.add_callback(At(steps))
    try:
        TRAIN[answer](made, run, capsys)
    finally:
        undo_all(undo)
    if answer == "stop":
        made = resumed(run, before)
    assert end(made, run) == undisturbed
    assert not any(damages(run).values())


@pytest.mark.skipif(not ALL, reason="make test-all; the other tests train in this process")
@pytest.mark.parametrize("processes", [1, 2])
def test_a_full_disk_by_the_command(processes, disk, undisturbed):
    """Exit 1 and one line, of rank 0, that names the checkpoint; then --resume."""
    run = disk / "run"
    settings = SMALL | dict(per_device_train_batch_size=str(2 // processes))
    words = ["train", "--recipe", "toy", "--nproc-per-node", str(processes), "--out", str(run)]
    words += [word for key, value in settings.items() for word in ("-p", key, value)]
    command = subprocess.Popen([*COMMAND, *words], stdout=subprocess.DEVNULL,
                               stderr=subprocess.PIPE, text=True)
    while not list_checkpoints(run) and command.poll() is None:
        time.sleep(0.002)
    filler = fill(disk, 100_000)
    said = command.communicate(timeout=300)[1].strip().splitlines()[-1]
    assert command.returncode == 1 and said.startswith("medmcqa-lora: rank "), said
    assert str(run) in said and "No space left on device" in said and "cell" not in said, said
    assert damages(run) and not any(damages(run).values())
    filler.unlink()
    resume = [*COMMAND, *words, "--resume"]
    done = subprocess.run(resume, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    if processes == 1:
        assert (run / "adapter/adapter_model.safetensors").read_bytes() == undisturbed[0]


def test_no_room_is_found_before_the_start(disk, cli):
    fill(disk, 1_000_000)
    code, _, err = cli("train", "--recipe", "toy", "--out", disk / "run")
    assert code == 1 and err.count("\n") == 1
    assert f"--out {disk / 'run'}: needs" in err and "make room or choose another disk" in err
    assert [p.name for p in disk.iterdir()] == ["filler"]


@pytest.fixture(scope="module")
def adapter(tmp_path_factory) -> Path:
    recipe = load_recipe("toy")
    model = apply_fast_parts(attach_lora(load_model(recipe), recipe), recipe)
    return save_adapter(model, tmp_path_factory.mktemp("adapter") / "adapter")


@pytest.mark.parametrize("words", [["merge"], ["export", "--format", "peft"]],
                         ids=lambda w: w[0])
def test_a_disk_that_fills_up_while_a_folder_is_written(words, disk, adapter, cli):
    """One line that names the new folder, and nothing is left of it."""
    fill(disk, 40_960)
    new = disk / "new"
    with (patch("medmcqa_lora.model.merge.check_room"),  # it fills up later
          patch("medmcqa_lora.model.export.check_room")):
        code, _, err = cli(words[0], adapter, "--out", new, *words[1:])
    assert code == 1 and err.count("\n") == 1, err
    assert f"{new}: can't be written (No space left on device); make room" in err, err
    assert [p.name for p in disk.iterdir()] == ["filler"]


MERGE = """
import time
from medmcqa_lora.model import merge
merge.merge_card = lambda *a: time.sleep(60)
from medmcqa_lora.cli import main
main()
"""


@pytest.mark.parametrize("how", ["SIGTERM", "SIGHUP"])
def test_a_merge_that_is_told_to_end_leaves_nothing(how, tmp_path, adapter):
    """Held up in the middle, with half of the folder written."""
    mark = f"MARK{os.getpid()}{how}"
    words = [sys.executable, "-c", MERGE, "merge", str(adapter), "--out", str(tmp_path / "new")]
    env = os.environ | {"MARK": mark}
    command = start(words, env=env, stderr=subprocess.PIPE, text=True)
    while not list(tmp_path.glob(".new-*.part/*.safetensors")):
        assert command.poll() is None
        time.sleep(0.05)
    command.send_signal(signal.Signals[how])
    said = command.communicate(timeout=60)[1]
    assert command.returncode == 130 and "Traceback" not in said
    assert not [p for p in tmp_path.iterdir() if "new" in p.name] and not processes_with(mark)
