"""A disk that fills up, is read-only, or whose quota ends while a run saves: one line or a warning, and the last good checkpoint is intact."""
import errno
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from conftest import ALL, processes_with
from transformers import TrainerCallback

from medmcqa_lora.training.checkpoints import checkpoints, flaw
from medmcqa_lora.data.leakage import load_pair
from medmcqa_lora.data.tokens import encode_questions
from medmcqa_lora.core.files import DiskError, read_lines
from medmcqa_lora.model.resolve import load_tokenizer
from medmcqa_lora.model.load import load_model
from medmcqa_lora.model.lora import attach_lora
from medmcqa_lora.model.adapter import save_adapter
from medmcqa_lora.core.recipe_files import load_recipe
from medmcqa_lora.training.trainer import make_trainer, train
from medmcqa_lora.fast.apply import apply_fast_parts

COMMAND = [sys.executable, "-c", "from medmcqa_lora.cli import main; main()"]
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def disk(tmp_path):
    """A file system of 8 MiB in memory."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8M", "none", str(folder)], capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(folder: Path, room: int) -> Path:
    """Leave so many bytes."""
    size = max(0, shutil.disk_usage(folder).free - room)
    (file := folder / "filler").write_bytes(bytes(size))
    return file


class At(TrainerCallback):
    """Does something behind a step, before its checkpoint."""

    def __init__(self, **steps):
        self.steps = {int(k[1:]): do for k, do in steps.items()}

    def on_step_end(self, args, state, control, **kwargs):
        self.steps.pop(state.global_step, lambda: None)()


def trainer(run: Path, **settings):
    recipe = load_recipe("toy", dict(max_steps="8", save_steps="2", per_device_train_batch_size="2", max_rows="8") | settings)
    tokenizer = load_tokenizer(recipe)
    encoded = encode_questions(load_pair(recipe)[0].questions, tokenizer, recipe)
    run.mkdir(exist_ok=True)
    return make_trainer(apply_fast_parts(attach_lora(load_model(recipe), recipe), recipe), tokenizer, encoded, recipe, run, packed=True)


def end(made, run: Path) -> tuple:
    adapter = (save_adapter(made.model, run / "adapter") / "adapter_model.safetensors").read_bytes()
    return adapter, [(m["step"], m["loss"], m["tokens"]) for m in read_lines(run / "metrics.jsonl")]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    train(made := trainer(run), run)
    torch.set_num_threads(threads)
    return end(made, run)


def full(run, draw, undo):
    """No room for a part of the next checkpoint, drawn at random."""
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

    (patched := patch("os.fsync", refuse)).start()
    undo.append(patched.stop)


def too_large(run, draw, undo):
    """Files may not become larger than this."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (draw.randint(4_000, 60_000), before[1]))
    undo.append(lambda: resource.setrlimit(resource.RLIMIT_FSIZE, before))


FAULTS = [full, full, read_only, quota, too_large]


@pytest.mark.parametrize("seed", range(20) if ALL else (0, 8))
def test_a_checkpoint_that_can_not_be_written(seed, disk, undisturbed, capsys):
    """It stops in one line that names the file, or goes on with a warning; without the fault it ends as if nothing had been."""
    draw, run, undo = random.Random(seed), disk / "run", []
    fault, answer, step = FAULTS[seed % len(FAULTS)], ("stop", "warn")[seed // len(FAULTS) % 2], draw.choice([4, 6])
    before = {}

    def begin():
        before.update({p.name: flaw(p) for p in checkpoints(run)})
        fault(run, draw, undo)

    def stop():
        while undo:
            undo.pop()()

    made = trainer(run, save_errors=answer)
    made.add_callback(At(**{f"s{step}": begin, f"s{step + 1}": stop if answer == "warn" else lambda: None}))
    try:
        if answer == "stop":
            with pytest.raises(DiskError) as said:
                train(made, run)
            assert "\n" not in str(said.value) and str(run) in str(said.value) and "can't be written" in str(said.value), said.value
        else:
            train(made, run)
            err = capsys.readouterr().err
            assert f"{run}" in err and "can't be written" in err and "save_errors = warn" in err
    finally:
        stop()
    if answer == "stop":
        assert before and {p.name: flaw(p) for p in checkpoints(run)} == before == dict.fromkeys(before, "")
        assert not [p for p in run.rglob(".*")]
        train(made := trainer(run), run, resume=True)
    assert end(made, run) == undisturbed
    assert not [p for p in checkpoints(run) if flaw(p)]


@pytest.mark.skipif(not ALL, reason="make test-all; the other tests train in this process")
@pytest.mark.parametrize("processes", [1, 2])
def test_a_full_disk_by_the_command(processes, disk, undisturbed):
    """Exit 1 and one line, of rank 0, that names the checkpoint; then --resume."""
    words = ["train", "--recipe", "toy", "-p", "max_steps", "8", "-p", "save_steps", "2", "-p", "max_rows", "8", "-p", "per_device_train_batch_size", str(2 // processes), "--nproc-per-node", str(processes), "--out", str(disk / "run")]
    command = subprocess.Popen([*COMMAND, *words], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    while not checkpoints(disk / "run") and command.poll() is None:
        time.sleep(0.002)
    filler = fill(disk, 100_000)
    told = command.communicate(timeout=300)[1].strip().splitlines()[-1]
    assert command.returncode == 1 and told.startswith("medmcqa-lora: rank ") and str(disk / "run") in told and "No space left on device" in told and "cell" not in told, told
    assert checkpoints(disk / "run") and not [p for p in checkpoints(disk / "run") if flaw(p)]
    filler.unlink()
    done = subprocess.run([*COMMAND, *words, "--resume"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    if processes == 1:
        assert (disk / "run/adapter/adapter_model.safetensors").read_bytes() == undisturbed[0]


def test_no_room_is_found_before_the_start(disk, cli):
    fill(disk, 1_000_000)
    code, _, err = cli("train", "--recipe", "toy", "--out", disk / "run")
    assert code == 1 and err.count("\n") == 1 and f"--out {disk / 'run'}: needs" in err and "make room or choose another disk" in err
    assert [p.name for p in disk.iterdir()] == ["filler"]


@pytest.fixture(scope="module")
def adapter(tmp_path_factory) -> Path:
    recipe = load_recipe("toy")
    return save_adapter(apply_fast_parts(attach_lora(load_model(recipe), recipe), recipe), tmp_path_factory.mktemp("adapter") / "adapter")


@pytest.mark.parametrize("words", [["merge"], ["export", "--format", "peft"]], ids=lambda w: w[0])
def test_a_disk_that_fills_up_while_a_folder_is_written(words, disk, adapter, cli):
    """One line that names the new folder, and nothing is left of it."""
    fill(disk, 40_960)
    with patch("medmcqa_lora.model.merge.check_room"), patch("medmcqa_lora.model.export.check_room"):  # it fills up later
        code, _, err = cli(words[0], adapter, "--out", disk / "new", *words[1:])
    assert code == 1 and err.count("\n") == 1 and f"{disk / 'new'}: can't be written (No space left on device); make room" in err, err
    assert [p.name for p in disk.iterdir()] == ["filler"]


@pytest.mark.parametrize("how", ["SIGTERM", "SIGHUP"])
def test_a_merge_that_is_told_to_end_leaves_nothing(how, tmp_path, adapter):
    """Held up in the middle, with half of the folder written."""
    code = "import time; from medmcqa_lora.model import merge; merge.merge_card = lambda *a: time.sleep(60); from medmcqa_lora.cli import main; main()"
    mark = f"MARK{os.getpid()}{how}"
    command = subprocess.Popen([sys.executable, "-c", code, "merge", str(adapter), "--out", str(tmp_path / "new")], env=os.environ | {"MARK": mark}, stderr=subprocess.PIPE, text=True)
    while not list(tmp_path.glob(".new-*.part/*.safetensors")):
        assert command.poll() is None
        time.sleep(0.05)
    command.send_signal(signal.Signals[how])
    told = command.communicate(timeout=60)[1]
    assert command.returncode == 130 and "Traceback" not in told
    assert not [p for p in tmp_path.iterdir() if "new" in p.name] and not processes_with(mark)
