"""Several processes as the command line starts them, beside one at the same global batch: a copy of the model each, and a share each."""
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import ALL, ROOT, processes_with
from safetensors.torch import load_file

from medmcqa_lora.core.files import read_lines
from medmcqa_lora.launch.preflight import resolve_parallel
from medmcqa_lora.launch.worker import World
from medmcqa_lora.launch.launcher import launch_train
from medmcqa_lora.model.resolve import TOY
from medmcqa_lora.model.load import load_model
from medmcqa_lora.model.adapter import adapter_shapes, check_adapter, load_adapter
from medmcqa_lora.fast.apply import apply_fast_parts
from medmcqa_lora.core.recipe_files import load_recipe
from medmcqa_lora.training.run_folder import start_run

WAYS = ("ddp", "fsdp")
TARGETS = ["attention", "mamba_in", "shared_experts", "routed_experts", "mlp"]
BATCH = 8


def toy(folder: Path, processes: int = 1, **keys):
    settings = dict(lora_targets=TARGETS, max_steps=6, save_steps=3, per_device_train_batch_size=BATCH // processes)
    return replace(load_recipe("toy"), out=str(folder), **settings | keys)


def losses(folder: Path) -> list[float]:
    return [m["loss"] for m in read_lines(folder / "metrics.jsonl")]


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter/adapter_model.safetensors")


def same_run(found: Path, wanted: Path, processes: int) -> None:
    """Losses within 1e-5 of their size, tokens the same, an adapter of the same layout and numbers."""
    assert len(losses(found)) == len(losses(wanted)) and losses(found) == pytest.approx(losses(wanted), rel=1e-5)
    assert [m["tokens"] for m in read_lines(found / "metrics.jsonl")] == [m["tokens"] for m in read_lines(wanted / "metrics.jsonl")]
    a, b = adapter(found), adapter(wanted)
    assert a.keys() == b.keys() and {k: (v.shape, v.dtype) for k, v in a.items()} == {k: (v.shape, v.dtype) for k, v in b.items()}
    for name in b:
        torch.testing.assert_close(a[name], b[name], rtol=1e-3, atol=1e-4)
    for rank in range(1, processes):
        assert (found / f"rank{rank}.ipynb").exists()


@pytest.fixture(scope="module")
def one(tmp_path_factory) -> Path:
    return launch_train(toy(tmp_path_factory.mktemp("one") / "run"))


@pytest.fixture(scope="module", params=WAYS if ALL else ["fsdp"])  # test_launcher trains and resumes with a copy each
def two(request, tmp_path_factory) -> tuple[str, Path]:
    """A run of two processes, in each way."""
    return request.param, launch_train(toy(tmp_path_factory.mktemp(request.param) / "run", 2, parallel=request.param), nproc=2)


def test_two_processes_train_as_one(one, two):
    way, folder = two
    same_run(folder, one, 2)
    kernels = (folder / "environment.json").read_text()
    assert ("a share in each process (FSDP2)" in kernels) == (way == "fsdp")
    assert f"each one function where it is of the known form, {len(TOY['hybrid_override_pattern'])} of" in kernels  # the fast way, in shares too


def test_two_processes_resume(two):
    """From the middle, to the same losses and adapter as without an interruption."""
    way, folder = two
    before, trained = losses(folder), adapter(folder)
    shutil.rmtree(folder / "checkpoints/checkpoint-6")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        (folder / "adapter" / name).unlink()
    launch_train(toy(folder, 2, parallel=way), resume=True, nproc=2)
    assert losses(folder) == pytest.approx(before, rel=1e-6)
    for name, t in adapter(folder).items():
        torch.testing.assert_close(t, trained[name], rtol=1e-5, atol=1e-6)


def test_an_adapter_from_shares_is_an_ordinary_one(one, two):
    """One process loads it by PEFT, and nothing of the whole model lies in a checkpoint."""
    way, folder = two
    check_adapter(folder / "adapter", "toy-nemotron-h")
    assert adapter_shapes(folder / "adapter") == adapter_shapes(one / "adapter")
    recipe, ids = load_recipe("toy"), torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        mine, theirs = (apply_fast_parts(load_adapter(load_model(recipe), f / "adapter"), recipe)(ids, use_cache=False).logits for f in (folder, one))
        base = apply_fast_parts(load_model(recipe), recipe)(ids, use_cache=False).logits
    torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-3)
    assert (mine - base).abs().max() > 0.1
    saved = [p for p in (folder / "checkpoints").rglob("pytorch_model_fsdp.bin")]
    assert bool(saved) == (way == "fsdp")
    for p in saved:
        assert all("lora_" in k for k in torch.load(p, weights_only=True) if "e_score_correction_bias" not in k)


SITUATIONS = {"checkpointing, an evaluation, and the best": dict(gradient_checkpointing=True, eval_steps=1, save_steps=1, early_stopping_patience=2), "random weights, accumulation": dict(weights="random", gradient_accumulation_steps=2, per_device_train_batch_size=2),
              "fast off": dict(fast="off"), "padded": dict(packing="off"), "bfloat16": dict(dtype="bfloat16")}


def test_situations_in_shares(tmp_path):
    """Weights are sharded over the processes, and the package's block functions compute with what is gathered; what else a recipe may ask for gives the losses of a copy each."""
    launched(tmp_path, 2, """
made = trained(chosen(parallel="fsdp"))
shares = [p for p in made.model.parameters()]
assert all(isinstance(p, DTensor) for p in shares) and {p.dtype for p in shares if p.requires_grad} == {torch.float32}
mine, whole = (sum(n(p) for p in shares) for n in (lambda p: p.to_local().numel(), lambda p: p.numel()))
assert mine < 0.55 * whole, (mine, whole)
assert calls["mixture"] >= 2 * STEPS and calls["head"] >= STEPS, calls
recorded = chosen(gradient_accumulation_steps=2, per_device_train_batch_size=2)
mine, theirs = (trained(recorded, f"hooks{hooks}", hooks) for hooks in (False, True))
assert mine.training_step.apart and mine.training_step.gradients.buffer.any() and theirs.training_step.gradients is None
assert mine.logged and all(abs(x - y) <= 1e-6 * abs(y) for x, y in zip(mine.logged, theirs.logged))
mine, theirs = (torch.cat([p.detach().flatten() for p in made.model.parameters() if p.requires_grad]) for made in (mine, theirs))
torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)
first = mine.clone()
torch.distributed.broadcast(first, 0)
assert torch.equal(first, mine)  # the processes' copies are still the same
for name, settings in list(SITUATIONS.items())[: None if ALL else 2]:
    found, wanted = (trained(chosen(parallel=way, **settings), name + way).logged for way in ("fsdp", "ddp"))
    assert len(found) == len(wanted) > 0 and all(abs(x - y) <= 1e-4 * abs(y) for x, y in zip(found, wanted)), (name, found, wanted)
""")


PROCESS = """
import os, sys; sys.path[:0] = {path!r}
from collections import Counter
from dataclasses import replace
from pathlib import Path
import torch; torch.set_num_threads(1)
from torch.distributed.tensor import DTensor
from accelerate.state import AcceleratorState, PartialState
from medmcqa_lora.core.files import read_lines
from medmcqa_lora.data.leakage import load_pair
from medmcqa_lora.data.tokens import encode_questions
from medmcqa_lora.model.resolve import load_tokenizer
from medmcqa_lora.model.load import load_model
from medmcqa_lora.model.lora import attach_lora
from medmcqa_lora.fast.apply import apply_fast_parts
from medmcqa_lora.fast import blocks
from medmcqa_lora.fast.packing import choose_packing
from medmcqa_lora.training import step
from medmcqa_lora.training.trainer import make_trainer, run_training
from test_sharding import ALL, SITUATIONS, toy
STEPS, calls = 2, Counter()
def counted(function, name):
    old = function.forward
    def forward(*args):
        calls[name] += 1
        return old(*args)
    function.forward = staticmethod(forward)
counted(blocks.MixtureFunction, "mixture"); counted(step.HeadLoss, "head")
def chosen(**settings): return toy(Path({folder!r}), 2, **dict(max_steps=STEPS, save_steps=STEPS) | settings)
def trained(recipe, name="run", hooks=False):
    for state in (AcceleratorState, PartialState): state._shared_state.clear()  # the next trainer is of another way
    run = Path({folder!r}) / name
    run.mkdir(exist_ok=True)
    tokenizer = load_tokenizer(recipe)
    rows, held_out = (encode_questions(part.questions[:20], tokenizer, recipe) for part in load_pair(recipe))
    base = apply_fast_parts(load_model(recipe), recipe)
    packed = choose_packing(base, rows.rows, recipe)[0]
    made = make_trainer(apply_fast_parts(attach_lora(base, recipe), recipe), tokenizer, rows, recipe, run, held_out, packed)
    if hooks: made.training_step.apart = False  # DistributedDataParallel adds gradients up by itself
    run_training(made, run)
    torch.distributed.barrier()
    made.logged = [m[k] for f, k in (("metrics.jsonl", "loss"), ("evals.jsonl", "eval_loss")) for m in read_lines(run / f)]
    return made
{code}
torch.distributed.barrier()
print("done", flush=True)
os._exit(0)  # taking DDP apart, torch 2.13 may wait for gloo's thread, which waits for the GIL
"""


def launched(folder: Path, processes: int, code: str) -> None:
    """Run code in several processes, by torch's launcher."""
    script = folder / "process.py"
    script.write_text(PROCESS.format(path=[str(ROOT / "tests/training"), str(ROOT / "tests"), str(ROOT)], folder=str(folder), code=code))
    environment = os.environ | dict(PYTHONPATH=str(ROOT), CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1")
    done = subprocess.run([sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes), str(script)], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and done.stdout.count("done") == processes, done.stderr[-4000:]


@pytest.mark.skipif(not ALL, reason="make test-all: four processes on two cores take their time")
@pytest.mark.parametrize("way", WAYS)
def test_four_processes_train_and_resume_as_one(one, tmp_path, way):
    folder = launch_train(toy(tmp_path / "run", 4, parallel=way), nproc=4)
    same_run(folder, one, 4)
    shutil.rmtree(folder / "checkpoints/checkpoint-6")
    launch_train(toy(folder, 4, parallel=way), resume=True, nproc=4)
    same_run(folder, one, 4)


@pytest.mark.skipif(not ALL, reason="make test-all; test_launcher kills a run of one process and resumes it")
@pytest.mark.parametrize("way", WAYS)
def test_one_process_is_killed_and_the_run_goes_on(one, tmp_path, way):
    """By the command that users type: the others end with it, and --resume ends where an uninterrupted run does."""
    folder, mark = tmp_path / "run", f"MARK{os.getpid()}{way}"
    words = ["train", "--recipe", "toy", *(w for k, v in dict(lora_targets=",".join(TARGETS), max_steps=6, save_steps=3, per_device_train_batch_size=4, parallel=way).items() for w in ("-p", k, str(v))), "--nproc-per-node", "2", "--out", str(folder)]
    command = subprocess.Popen([sys.executable, "-c", "from medmcqa_lora.cli import main; main()", *words], env=os.environ | {"MARK": mark}, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    deadline, second = time.time() + 120, []
    while len(second) < 1 or not (folder / "checkpoints/checkpoint-3/trainer_state.json").exists():
        assert time.time() < deadline and command.poll() is None
        time.sleep(0.01)
        second = second or [p for p in Path("/proc").glob("[0-9]*") if "ipykernel" in read(p / "cmdline") and mark in read(p / "environ") and "\0RANK=1\0" in read(p / "environ")]
    os.kill(int(second[0].name), signal.SIGKILL)
    told = command.communicate(timeout=60)[1]
    assert command.returncode == 1 and "medmcqa-lora: rank " in told  # a kernel that noticed may speak after it
    deadline = time.time() + 15
    while processes_with(mark) and time.time() < deadline:
        time.sleep(0.2)
    assert not processes_with(mark) and len(losses(folder)) < 6
    subprocess.run([*command.args, "--resume"], check=True, capture_output=True, timeout=120)
    same_run(folder, one, 2)


def read(file: Path) -> str:
    """A file of /proc, or nothing where the process has gone."""
    try:
        return file.read_bytes().decode(errors="replace")
    except OSError:
        return ""


def test_a_run_resumes_in_as_many_processes(two):
    """Position and random states are each process' own."""
    way, folder = two
    with pytest.raises(ValueError, match="was started with 2 processes and this is 4: .* use --nproc-per-node 2"):
        launch_train(toy(folder, 4, parallel=way, per_device_train_batch_size=4), resume=True, nproc=4)


def test_shares_need_somebody_to_share_with(tmp_path, cli):
    code, _, err = cli("train", "--recipe", "toy", "-p", "parallel", "fsdp", "--out", tmp_path / "run")
    assert code == 1 and "parallel = fsdp: shares a model among processes, and there is only one; start more with --nproc-per-node" in err and not (tmp_path / "run").exists()
    code, _, err = cli("train", "--recipe", "toy", "-p", "parallel", "fsdp", "-p", "backend", "unsloth", "-p", "dtype", "bfloat16", "--nproc-per-node", "2", "--out", tmp_path / "run")
    assert code == 1 and "fsdp needs backend hf" in err
    code, _, err = cli("train", "--recipe", "toy", "-p", "parallel", "experts", "--out", tmp_path / "run")
    assert code == 1 and "is not one of auto, ddp, fsdp" in err


def test_a_run_is_not_resumed_in_another_way(two):
    """Their checkpoints differ."""
    way, folder = two
    with pytest.raises(ValueError, match=f"parallel was '{way}', is 'auto'"):
        start_run(toy(folder, 2, parallel="auto"), World(0, 2), resume=True)


def test_auto_takes_shares_where_a_copy_does_not_fit(monkeypatch):
    """By the plan, for GPUs of 40 and 80 GiB; without a GPU nothing changes."""
    nano = load_recipe("nemotron_nano", {"weights": "random"})
    assert resolve_parallel(nano, 4) == nano
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for gib, processes, way in ((80, 4, "auto"), (40, 4, "fsdp"), (40, 1, "auto")):
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i, gib=gib: type("GPU", (), dict(total_memory=gib * 2**30)))
        assert resolve_parallel(nano, processes).parallel == way
    assert resolve_parallel(replace(nano, parallel="ddp"), 4).parallel == "ddp"
