"""Several processes as the command line starts them, beside one at the same global batch: with a
replica of the model in each process, and with a shard."""
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import ALL, ROOT, processes_with
from safetensors.torch import load_file

from medmcqa_lora.core.files import read_lines
from medmcqa_lora.core.recipe_files import load_recipe
from medmcqa_lora.fast.apply import apply_fast_parts
from medmcqa_lora.launch.launcher import launch_train
from medmcqa_lora.launch.preflight import resolve_parallel
from medmcqa_lora.launch.worker import World
from medmcqa_lora.model.adapter import adapter_shapes, check_adapter, load_adapter
from medmcqa_lora.model.load import load_model
from medmcqa_lora.model.resolve import TOY, find_model
from medmcqa_lora.training.run_folder import start_run

WAYS = ("ddp", "fsdp")
TARGETS = ["attention", "mamba_in", "shared_experts", "routed_experts", "mlp"]
BATCH = 8


def toy(folder: Path, processes: int = 1, **keys):
    settings = dict(
        lora_targets=TARGETS, max_steps=6, save_steps=3,
        per_device_train_batch_size=BATCH // processes)
    return replace(load_recipe("toy"), out=str(folder), **settings | keys)


def losses(folder: Path) -> list[float]:
    return [m["loss"] for m in read_lines(folder / "metrics.jsonl")]


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter/adapter_model.safetensors")


def same_run(found: Path, wanted: Path, processes: int) -> None:
    """Losses within 1e-5 of their size, equal tokens, an adapter of equal layout and numbers."""
    assert losses(found) == pytest.approx(losses(wanted), rel=1e-5)
    lines = [read_lines(folder / "metrics.jsonl") for folder in (found, wanted)]
    tokens, expected = ([m["tokens"] for m in each] for each in lines)
    assert tokens == expected
    a, b = adapter(found), adapter(wanted)
    layout, layout_wanted = ({k: (v.shape, v.dtype) for k, v in x.items()} for x in (a, b))
    assert layout == layout_wanted
    for name in b:
        torch.testing.assert_close(a[name], b[name], rtol=1e-3, atol=1e-4)
    for rank in range(1, processes):
        assert (found / f"rank{rank}.ipynb").exists()


@pytest.fixture(scope="module")
def one(tmp_path_factory) -> Path:
    return launch_train(toy(tmp_path_factory.mktemp("one") / "run"))


# test_launcher trains and resumes with replicas
@pytest.fixture(scope="module", params=WAYS if ALL else ["fsdp"])
def two(request, tmp_path_factory) -> tuple[str, Path]:
    """A run of two processes, in each way."""
    way = request.param
    folder = tmp_path_factory.mktemp(way) / "run"
    return way, launch_train(toy(folder, 2, parallel=way), nproc=2)


def test_two_processes_train_as_one(one, two):
    way, folder = two
    same_run(folder, one, 2)
    kernels, blocks = (folder / "environment.json").read_text(), len(TOY["hybrid_override_pattern"])
    assert ("a share in each process (FSDP2)" in kernels) == (way == "fsdp")
    # blocks are fused, when sharded too
    assert f"each one function where it is of the known form, {blocks} of" in kernels


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


def test_an_adapter_from_shards_is_an_ordinary_one(one, two):
    """One process loads it by PEFT, and no checkpoint holds anything of the base model."""
    way, folder = two
    check_adapter(folder / "adapter", "toy-nemotron-h")
    assert adapter_shapes(folder / "adapter") == adapter_shapes(one / "adapter")
    recipe, ids = load_recipe("toy"), torch.tensor([[5, 6, 7, 8]])

    def logits(run=None):
        model = load_model(recipe)
        if run is not None:
            model = load_adapter(model, run / "adapter")
        with torch.no_grad():
            return apply_fast_parts(model, recipe)(ids, use_cache=False).logits

    mine, theirs, base = logits(folder), logits(one), logits()
    torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-3)
    assert (mine - base).abs().max() > 0.1
    saved = list((folder / "checkpoints").rglob("pytorch_model_fsdp.bin"))
    assert bool(saved) == (way == "fsdp")
    for p in saved:
        names = torch.load(p, weights_only=True)
        assert all("lora_" in k for k in names if "e_score_correction_bias" not in k)


SITUATIONS = {
    "checkpointing, an evaluation, and the best": dict(
        gradient_checkpointing=True, eval_steps=1, save_steps=1, early_stopping_patience=2),
    "random weights, accumulation": dict(
        weights="random", gradient_accumulation_steps=2, per_device_train_batch_size=2),
    "fast off": dict(fast="off"), "padded": dict(packing="off"), "bfloat16": dict(dtype="bfloat16"),
}
STEPS = 2


# What follows runs in each of several processes, started by `launched`.


def short(folder: Path, **settings):
    """A recipe of two steps in two processes."""
    return toy(folder, 2, **dict(max_steps=STEPS, save_steps=STEPS) | settings)


def trained(recipe, run: Path, hooks: bool = False):
    """A trainer after its steps, with what it logged; hooks: DDP itself averages gradients."""
    from accelerate.state import AcceleratorState, PartialState

    from medmcqa_lora.data.leakage import load_pair
    from medmcqa_lora.data.tokens import encode_questions
    from medmcqa_lora.fast.packing import choose_packing
    from medmcqa_lora.model.lora import attach_lora
    from medmcqa_lora.model.resolve import load_tokenizer
    from medmcqa_lora.training.trainer import make_trainer, run_training

    for state in (AcceleratorState, PartialState):  # the last trainer may have sharded
        state._shared_state.clear()
    run.mkdir(exist_ok=True)
    tokenizer = load_tokenizer(recipe)
    pair = load_pair(recipe)
    rows, held_out = (encode_questions(part.questions[:20], tokenizer, recipe) for part in pair)
    base = apply_fast_parts(load_model(recipe), recipe)
    packed = choose_packing(base, rows.rows, recipe)[0]
    model = apply_fast_parts(attach_lora(base, recipe), recipe)
    made = make_trainer(model, tokenizer, rows, recipe, run, held_out, packed)
    if hooks:
        made.training_step.has_replicas = False
    run_training(made, run)
    torch.distributed.barrier()
    made.logged = [m["loss"] for m in read_lines(run / "metrics.jsonl")]
    made.logged += [m["eval_loss"] for m in read_lines(run / "evals.jsonl")]
    return made


def count_calls(function, calls: Counter) -> None:
    """Count the forward passes of an autograd function."""
    original = function.forward

    def forward(*args):
        calls[function.__name__] += 1
        return original(*args)

    function.forward = staticmethod(forward)


def check_shards(folder: Path) -> None:
    """Weights are sharded over the processes, and our functions compute with what is gathered."""
    from torch.distributed.tensor import DTensor

    from medmcqa_lora.fast.blocks import MixtureFunction
    from medmcqa_lora.training.step import HeadLoss

    calls = Counter()
    for function in (MixtureFunction, HeadLoss):
        count_calls(function, calls)
    parameters = list(trained(short(folder, parallel="fsdp"), folder / "run").model.parameters())
    assert all(isinstance(p, DTensor) for p in parameters)
    assert {p.dtype for p in parameters if p.requires_grad} == {torch.float32}
    local = sum(p.to_local().numel() for p in parameters)
    total = sum(p.numel() for p in parameters)
    assert local < 0.55 * total, (local, total)
    assert calls["MixtureFunction"] >= 2 * STEPS and calls["HeadLoss"] >= STEPS, calls


def check_replicas(folder: Path) -> None:
    """Our averaged gradient buffer gives what DDP's hooks give, and replicas stay the same."""
    recipe = short(folder, gradient_accumulation_steps=2, per_device_train_batch_size=2)
    by_buffer, by_hooks = (trained(recipe, folder / f"hooks{h}", h) for h in (False, True))
    assert by_buffer.training_step.has_replicas and by_buffer.training_step.gradients.buffer.any()
    assert by_hooks.training_step.gradients is None
    assert by_buffer.logged == pytest.approx(by_hooks.logged, rel=1e-6) and by_buffer.logged

    def adapter_of(trainer):
        factors = [p for p in trainer.model.parameters() if p.requires_grad]
        return torch.cat([p.detach().flatten() for p in factors])

    mine = adapter_of(by_buffer)
    torch.testing.assert_close(mine, adapter_of(by_hooks), rtol=1e-4, atol=1e-6)
    first = mine.clone()
    torch.distributed.broadcast(first, 0)
    assert torch.equal(first, mine)


def check_situations(folder: Path) -> None:
    """What else a recipe may ask for gives the same losses with shards and with replicas."""
    for name, settings in list(SITUATIONS.items())[: None if ALL else 2]:
        found, wanted = (
            trained(short(folder, parallel=way, **settings), folder / (name + way)).logged
            for way in ("fsdp", "ddp"))
        assert wanted and found == pytest.approx(wanted, rel=1e-4), name


def run_checks(folder: Path) -> None:
    torch.set_num_threads(1)
    for check in (check_shards, check_replicas, check_situations):
        check(folder)
    torch.distributed.barrier()
    print("done", flush=True)
    # when DDP is destroyed, torch 2.13 may wait for gloo's thread, which waits for the GIL
    os._exit(0)


PROCESS = """
import sys
from pathlib import Path
sys.path[:0] = {path!r}
import test_sharding
test_sharding.run_checks(Path({folder!r}))
"""


def test_situations_with_shards(tmp_path):
    """`run_checks` in two processes, started by torch's launcher: one start for all checks."""
    script = tmp_path / "process.py"
    path = [str(ROOT / "tests/training"), str(ROOT / "tests"), str(ROOT)]
    script.write_text(PROCESS.format(path=path, folder=str(tmp_path)))
    command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone",
               "--nproc_per_node", "2", str(script)]
    environment = os.environ | dict(
        PYTHONPATH=str(ROOT), CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1")
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and done.stdout.count("done") == 2, done.stderr[-4000:]


@pytest.mark.skipif(not ALL, reason="make test-all: four processes on two cores take their time")
@pytest.mark.parametrize("way", WAYS)
def test_four_processes_train_and_resume_as_one(one, tmp_path, way):
    folder = launch_train(toy(tmp_path / "run", 4, parallel=way), nproc=4)
    same_run(folder, one, 4)
    shutil.rmtree(folder / "checkpoints/checkpoint-6")
    launch_train(toy(folder, 4, parallel=way), resume=True, nproc=4)
    same_run(folder, one, 4)


def is_second_process(process: Path, mark: str) -> bool:
    """Whether a process of /proc is the notebook kernel of rank 1 of a command with that mark."""
    environment = read(process / "environ")
    return ("ipykernel" in read(process / "cmdline") and mark in environment
            and "\0RANK=1\0" in environment)


@pytest.mark.skipif(
    not ALL, reason="make test-all; test_launcher kills a run of one process and resumes it")
@pytest.mark.parametrize("way", WAYS)
def test_one_process_is_killed_and_the_run_goes_on(one, tmp_path, way):
    """By the command that users type: the others end with it, and --resume ends where an
    uninterrupted run does."""
    folder, mark = tmp_path / "run", f"MARK{os.getpid()}{way}"
    settings = dict(
        lora_targets=",".join(TARGETS), max_steps=6, save_steps=3, per_device_train_batch_size=4,
        parallel=way)
    words = ["train", "--recipe", "toy"]
    for k, v in settings.items():
        words += ["-p", k, str(v)]
    words += ["--nproc-per-node", "2", "--out", str(folder)]
    command = subprocess.Popen(
        [sys.executable, "-c", "from medmcqa_lora.cli import main; main()", *words],
        env=os.environ | {"MARK": mark}, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        text=True)
    deadline, second = time.time() + 120, []
    checkpoint = folder / "checkpoints/checkpoint-3/trainer_state.json"
    while not second or not checkpoint.exists():
        assert time.time() < deadline and command.poll() is None
        time.sleep(0.01)
        if not second:
            processes = Path("/proc").glob("[0-9]*")
            second = [p for p in processes if is_second_process(p, mark)]
    os.kill(int(second[0].name), signal.SIGKILL)
    error = command.communicate(timeout=60)[1]
    # a kernel that noticed may speak after it
    assert command.returncode == 1 and "medmcqa-lora: rank " in error
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
    recipe = toy(folder, 4, parallel=way, per_device_train_batch_size=4)
    said = "was started with 2 processes and this is 4: .* use --nproc-per-node 2"
    with pytest.raises(ValueError, match=said):
        launch_train(recipe, resume=True, nproc=4)


def test_sharding_needs_several_processes_and_backend_hf(tmp_path, cli):
    def train(*words):
        code, _, error = cli("train", "--recipe", "toy", *words, "--out", tmp_path / "run")
        assert code == 1
        return error

    fsdp = ("-p", "parallel", "fsdp")
    expected = ("parallel = fsdp: shares a model among processes, and there is only one; "
                "start more with --nproc-per-node")
    assert expected in train(*fsdp)
    assert not (tmp_path / "run").exists()
    unsloth = ("-p", "backend", "unsloth", "-p", "dtype", "bfloat16", "--nproc-per-node", "2")
    assert "fsdp needs backend hf" in train(*fsdp, *unsloth)
    assert "is not one of auto, ddp, fsdp" in train("-p", "parallel", "experts")


def test_a_run_is_not_resumed_in_another_way(two):
    """Their checkpoints differ."""
    way, folder = two
    with pytest.raises(ValueError, match=f"parallel was '{way}', is 'auto'"):
        start_run(toy(folder, 2, parallel="auto"), World(0, 2), resume=True)


def test_auto_shards_where_a_replica_does_not_fit(monkeypatch):
    """By the plan, for GPUs of 40 and 80 GiB; without a GPU nothing changes."""
    nano = load_recipe("nemotron_nano", {"weights": "random"})
    model = find_model(nano, structure_only=True)
    assert resolve_parallel(nano, model, 4) == nano
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for gib, processes, way in ((80, 4, "auto"), (40, 4, "fsdp"), (40, 1, "auto")):
        gpu = type("GPU", (), dict(total_memory=gib * 2**30))
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i, gpu=gpu: gpu)
        assert resolve_parallel(nano, model, processes).parallel == way
    assert resolve_parallel(replace(nano, parallel="ddp"), model, 4).parallel == "ddp"
