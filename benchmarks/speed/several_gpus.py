"""Training speed over several GPUs of one host: a replica of the model in each process (ddp), and
a shard in each (fsdp), beside one.

    python benchmarks/speed/several_gpus.py --recipe nemotron_nano -p weights random \\
        --gpus 1,2 --ways ddp,fsdp
    python benchmarks/speed/several_gpus.py --tokens 512 --steps 3 --warmup 2  # the toy, on CPUs

Each case is started by torch's launcher, a process a GPU, and goes through the package's own
load_model, attach_lora and make_trainer, with rows of the real questions' lengths. Every process
has rows of its own in every step, as in a run: so a step waits for the longest of them, and the
time of that is in the numbers. Timed are the steps after the warm-up, on rank 0, from the end of
one to the end of the next. Tokens are real ones, of all processes; the share of peak is of all
GPUs' together; the memory is that of the fullest rank. Efficiency is the speed over N times that
of one process in the same call. An epoch is 182,822 rows of the mean length measured here. A case
that can't be had is recorded with the reason. Appends a line a case to
benchmarks/results/several_gpus.jsonl (or --out FILE), and prints a table.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, replace
from itertools import cycle, islice
from pathlib import Path

import torch
from datasets import Dataset
from transformers import TrainerCallback

from benchmarks.common import ROOT, add_recipe_options, add_record_options, append_record
from medmcqa_lora.bench.profile import elapsed, median_and_range, synchronise, timestamp
from medmcqa_lora.bench.variants import (
    VARIANTS,
    Workload,
    count_flops,
    cut_model,
    examples_per_step,
    make_lengths,
    make_rows,
    passed_parameters,
    variant_recipe,
)
from medmcqa_lora.cli import join_params, recipe_of
from medmcqa_lora.core.environment import git_commit, hardware, peak_memory_gib, versions
from medmcqa_lora.core.files import read_lines, write_json
from medmcqa_lora.core.recipe import Recipe, check_recipe
from medmcqa_lora.core.text import markdown_table
from medmcqa_lora.data.questions import load_questions
from medmcqa_lora.data.tokens import Encoded, encode_questions
from medmcqa_lora.fast.apply import apply_fast_parts, describe_kernels
from medmcqa_lora.fast.packing import choose_packing
from medmcqa_lora.launch.worker import World, join_world
from medmcqa_lora.model.checkpoint import empty_model
from medmcqa_lora.model.load import load_model
from medmcqa_lora.model.lora import attach_lora
from medmcqa_lora.model.resolve import load_config, load_tokenizer
from medmcqa_lora.training.memory.fit import TRAINING_ROWS
from medmcqa_lora.training.step import Recording
from medmcqa_lora.training.trainer import make_trainer

Steps = list[list[list[dict]]]  # step -> rank -> examples


# In each process of a case.


class StepEnds(TrainerCallback):
    """When steps ended, in the GPU's own queue."""

    def __init__(self, warmup: int):
        self.warmup = warmup  # steps that don't count
        self.times = []  # timestamps of the ends of the last warm-up step and of those after it

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step >= self.warmup: self.times.append(timestamp())

    @property
    def seconds(self) -> list[float]:
        synchronise()
        return [elapsed(a, b) for a, b in zip(self.times, self.times[1:])]


def own_token_ids(recipe: Recipe, tokenizer) -> list[list[int]]:
    """The recipe's own training examples."""
    found = load_questions(
        recipe.data, recipe.train_split, recipe.label_base, limit=recipe.max_rows or 5000,
        training=True,
    )
    encoded = encode_questions(found.questions, tokenizer, recipe)
    return [row["input_ids"] for row in encoded.rows]


def rows_of_steps(
    load: Workload, recipe: Recipe, processes: int, own: list[list[int]], vocabulary: int
) -> Steps:
    """Each step's rows of each process. After the first step a few rows of their own come round
    again, so that the warm-up meets every shape.
    """
    size = recipe.per_device_train_batch_size
    lengths = make_lengths(load, [len(ids) for ids in own], recipe.seed)
    different = max(load.order) + 1
    stream = [i for ids in own for i in ids]
    made = make_rows(islice(cycle(lengths), size * different * processes), stream, vocabulary)
    batches = [made[i * size : (i + 1) * size] for i in range(different * processes)]
    order = load.order[: load.warmup + load.steps]
    return [batches[i * processes : (i + 1) * processes] for i in order]


def count_parameters(model, recipe: Recipe) -> tuple[int, int]:
    """`passed_parameters`, of the folder's configuration where the recipe names a folder."""
    return passed_parameters(empty_model(recipe.model) if Path(recipe.model).is_dir() else model)


def use_ddp_hooks(trainer) -> None:
    """Let DistributedDataParallel's hooks add up gradients, which can't be recorded."""
    step = trainer.training_step
    step.has_replicas = False
    step.not_recordable = "DistributedDataParallel's hooks"


def timed_trainer(tuned, tokenizer, steps: Steps, recipe: Recipe, run: Path, packed: bool):
    """The package's trainer on these rows in their order."""
    rows = [example for step in steps for batch in step for example in batch]
    encoded = Encoded(Dataset.from_list(rows), [], 0, [])
    trainer = make_trainer(tuned, tokenizer, encoded, recipe, run, packed=packed)
    trainer.args.train_sampling_strategy = "sequential"
    trainer.args.save_strategy = "no"
    return trainer


def speed(
    steps: Steps, seconds: list[float], parameters: tuple[int, int], peak: float, world: World
) -> dict:
    """Figures of the timed steps, of all processes together; `peak` is TFLOP/s of a GPU."""
    tokens = [[sum(len(e["input_ids"]) for e in batch) for batch in step] for step in steps]
    totals = [sum(t) for t in tokens]
    size = len(steps[0][0])
    share = None
    if torch.cuda.is_available():
        flops = [count_flops(parameters, t, size * world.size, True) for t in totals]
        shares = [f / s / peak / 1e12 / world.size for f, s in zip(flops, seconds)]
        share = median_and_range(shares)
    longest = statistics.mean(max(t) / statistics.mean(t) for t in tokens)
    return dict(
        seconds=median_and_range(seconds),
        tokens=median_and_range(totals),
        tokens_per_s=median_and_range([t / s for t, s in zip(totals, seconds)]),
        share_of_peak=share,
        longest_over_mean=round(longest, 4),
        examples=size,
        mean_length=round(sum(totals) / (len(totals) * size * world.size), 2),
    )


def run_state(trainer, tuned) -> dict:
    """Memory of each rank, recorded shapes and trained parameters after a run."""
    peak = torch.tensor([peak_memory_gib()], device=trainer.args.device)
    peaks = trainer.accelerator.gather(peak).tolist()
    recorded = getattr(trainer.training_step, "recorded", {}).values()
    return dict(
        peak_gib=round(max(peaks), 3),
        peaks_gib=[round(p, 3) for p in peaks],
        recorded=sum(isinstance(r, Recording) for r in recorded),
        trainable=sum(p.numel() for p in tuned.parameters() if p.requires_grad),
    )


def measure(job: dict) -> dict:
    """One case, in this process and those beside it; a result on rank 0."""
    world = join_world(int(os.environ.get("WORLD_SIZE", 1)))
    load, recipe = Workload(**job["load"]), Recipe(**job["recipe"])
    began = time.perf_counter()
    tokenizer = load_tokenizer(recipe)
    own = own_token_ids(recipe, tokenizer)
    model = apply_fast_parts(load_model(recipe), recipe)
    parameters = count_parameters(model, recipe)
    steps = rows_of_steps(load, recipe, world.size, own, model.config.vocab_size)
    packing = choose_packing(model, [e for step in steps for b in step for e in b], recipe)
    tuned = apply_fast_parts(attach_lora(model, recipe), recipe)
    kernels = describe_kernels(tuned, recipe, packing)
    ends = StepEnds(load.warmup)
    with tempfile.TemporaryDirectory() as folder:
        trainer = timed_trainer(tuned, tokenizer, steps, recipe, Path(folder), packing[0])
        trainer.add_callback(ends)
        if job["way"] == "ddp-hooks": use_ddp_hooks(trainer)
        loaded = time.perf_counter() - began
        loss = trainer.train().training_loss
    figures = speed(steps[load.warmup :], ends.seconds, parameters, load.peak, world)
    head = dict(gpus=world.size, way=job["way"])
    tail = dict(loss=loss, load_s=round(loaded, 1), kernels=kernels.splitlines())
    return head | figures | run_state(trainer, tuned) | tail


def worker(file: str) -> None:
    """Measure the case of a job's file; rank 0 writes the result."""
    job = json.loads(Path(file).read_text())
    found = measure(job) | dict(hardware=hardware(), versions=versions())
    found |= dict(recipe=job["recipe"], load=job["load"])
    if int(os.environ.get("RANK", 0)) == 0: write_json(Path(job["result"]), found)
    if torch.distributed.is_initialized(): torch.distributed.barrier()
    sys.stdout.flush()
    os._exit(0)  # destroying DDP, torch 2.13 may wait for gloo's thread, which waits for the GIL


# In the process that was started.


def case_recipe(recipe: Recipe, gpus: int, way: str, load: Workload) -> Recipe:
    """What each process of a case trains."""
    lengths = make_lengths(replace(load, lengths="medmcqa"), [], recipe.seed)
    size = examples_per_step(VARIANTS["ours"], lengths, load.tokens)
    name = "ours-checkpointing" if recipe.gradient_checkpointing else "ours"
    steps = load.warmup + load.steps
    changes = dict(
        parallel="auto" if gpus == 1 else way.partition("-")[0],  # ddp-hooks is ddp
        max_steps=steps, logging_steps=steps,
    )
    return check_recipe(replace(variant_recipe(recipe, name, size, load), **changes))


def case_environment(gpus: int) -> dict[str, str]:
    threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, (os.cpu_count() or 1) // gpus))
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    return os.environ | {"OMP_NUM_THREADS": threads, "PYTHONPATH": os.pathsep.join(paths)}


def run_processes(job: Path, gpus: int, log: Path, limit: int) -> str:
    """Run a job; how it ended."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(gpus)]
    program = [str(Path(__file__).resolve()), "--worker", str(job)]
    how = dict(stderr=subprocess.STDOUT, timeout=limit, env=case_environment(gpus))
    with open(log, "w") as printed:
        try:
            done = subprocess.run([sys.executable, *launcher, *program], stdout=printed, **how)
        except subprocess.TimeoutExpired:
            return f"nothing after {limit} s"
    return str(done.returncode)


def last_error(log: Path) -> str:
    """The last line of a log that names an error."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines()]
    errors = [line for line in lines if "Error" in line and "ChildFailed" not in line]
    return errors[-1][:300] if errors else "no error was printed"


def run_case(recipe: Recipe, gpus: int, way: str, load: Workload, log: Path, limit: int) -> dict:
    """Measure in processes of their own; what they print goes to a file."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if load.layers: recipe = cut_model(recipe, load.layers, folder)
        recipe = case_recipe(recipe, gpus, way, load)
        job, result = folder / "job.json", folder / "result.json"
        task = dict(recipe=asdict(recipe), load=asdict(load), way=way, result=str(result))
        write_json(job, task)
        ended = run_processes(job, gpus, log, limit)
        if result.is_file(): return json.loads(result.read_text())
    return dict(gpus=gpus, way=way, failed=f"ended with {ended}: {last_error(log)}")


def table_row(found: dict, alone: float | None) -> dict:
    """A case's row; `alone` is the speed of one process, in tokens/s."""
    if "failed" in found:
        reason = found["failed"].replace("|", "/")
        return {"GPUs": found["gpus"], "way": found["way"], "tokens/s": f"not run: {reason}"}
    rates, share = found["tokens_per_s"], found["share_of_peak"]
    speed, low, high = (rates[key] for key in ("median", "min", "max"))
    one_gpu = speed / found["gpus"]
    minutes = TRAINING_ROWS["openlifescienceai/medmcqa"] * found["mean_length"] / speed / 60
    return {
        "GPUs": found["gpus"],
        "way": "" if found["gpus"] == 1 else found["way"],
        "tokens/s": f"{speed:,.0f} ({low:,.0f} to {high:,.0f})",
        "a GPU": f"{one_gpu:,.0f}",
        "share of peak": f"{share['median']:.1%}" if share else "",
        "efficiency": f"{one_gpu / alone:.1%}" if alone else "",
        "s a step": f"{found['seconds']['median']:.4g}",
        "peak GiB, fullest": f"{found['peak_gib']:.4g}",
        "an epoch": f"{minutes:.1f} min",
        "longest row / mean": f"{found['longest_over_mean']:.3f}",
    }


def table(found: list[dict]) -> str:
    """The cases as Markdown."""
    measured = [f for f in found if "tokens_per_s" in f]
    single = [f["tokens_per_s"]["median"] for f in measured if f["gpus"] == 1]
    rows = [table_row(f, single[0] if single else None) for f in found]
    return markdown_table(rows, empty_columns=True)


def parse_arguments() -> argparse.Namespace:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    add = parser.add_argument
    add_recipe_options(parser)
    add("--gpus", default="1,2", help="numbers of processes, with commas between")
    ways = (
        "for more than one process: ddp, fsdp, or ddp-hooks: gradients added up by "
        "DistributedDataParallel's own hooks, and so no recorded steps"
    )
    add("--ways", default="ddp,fsdp", help=ways)
    add("--tokens", type=int, default=16384, help="real tokens a step and process, about")
    add("--steps", type=int, default=20)
    add("--warmup", type=int, default=6)
    add("--layers", type=int)
    add("--peak", type=float, default=790.0, help="TFLOP/s of a GPU")
    add("--limit", type=int, default=540, help="seconds a case")
    add("--logs", type=Path, default=Path("_runs/spread"))
    add("--worker")
    add_record_options(parser, __file__)
    return parser.parse_args(join_params(sys.argv[1:]))


def list_cases(args) -> list[tuple[int, str]]:
    """Numbers of processes and ways to use them."""
    cases = []
    for gpus in map(int, args.gpus.split(",")):
        ways = args.ways.split(",") if gpus > 1 else ["ddp"]
        cases += [(gpus, way) for way in ways]
    return cases


def main() -> None:
    args = parse_arguments()
    if args.worker: return worker(args.worker)
    recipe = recipe_of(args.recipe, args.p)
    load = Workload(args.tokens, args.steps, args.warmup, layers=args.layers, peak=args.peak)
    load_config(recipe.model)
    args.logs.mkdir(parents=True, exist_ok=True)
    commit, found = args.commit or git_commit(), []
    for gpus, way in list_cases(args):
        began = time.perf_counter()
        case = run_case(recipe, gpus, way, load, args.logs / f"{gpus}-{way}.log", args.limit)
        seconds = round(time.perf_counter() - began, 1)
        head = dict(model=recipe.model, commit=commit, date=time.strftime("%Y-%m-%d"))
        found.append(head | dict(wall_s=seconds) | case)
        append_record(args.out, found[-1])
        said = case.get("failed")
        if not said: said = f"{case['tokens_per_s']['median']:,.0f} tokens/s"
        print(f"{gpus} {way}: {said} ({seconds} s)", flush=True)
    print(f"\n{table(found)}\n")
    print(f"lines  {args.out} ({len(read_lines(args.out))})\nlogs   {args.logs}")


if __name__ == "__main__":
    main()
