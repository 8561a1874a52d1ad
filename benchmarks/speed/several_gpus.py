"""Training speed over several GPUs of one host: a copy of the model in each process (ddp), and a
share in each (fsdp), beside one.

    python benchmarks/speed/several_gpus.py --recipe nemotron_nano -p weights random --gpus 1,2 --ways ddp,fsdp --commit $(git rev-parse HEAD)
    python benchmarks/speed/several_gpus.py --gpus 1,2 --tokens 512 --steps 3 --warmup 2          # toy size on CPUs, a check of this script

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

from benchmarks.common import results_file
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
from medmcqa_lora.core.files import append_line, read_lines, write_json
from medmcqa_lora.core.recipe import Recipe, check_recipe
from medmcqa_lora.data.questions import load_questions
from medmcqa_lora.data.tokens import Encoded, encode_questions
from medmcqa_lora.fast.apply import apply_fast_parts, describe_kernels
from medmcqa_lora.fast.packing import choose_packing
from medmcqa_lora.launch.worker import join_world
from medmcqa_lora.model.checkpoint import empty_model
from medmcqa_lora.model.load import load_model
from medmcqa_lora.model.lora import attach_lora
from medmcqa_lora.model.resolve import load_config, load_tokenizer
from medmcqa_lora.training.memory.fit import TRAINING_ROWS
from medmcqa_lora.training.step import Recording
from medmcqa_lora.training.trainer import make_trainer

HERE = Path(__file__).resolve()


class Ends(TrainerCallback):
    """When steps ended, on the GPU's own line of work."""

    def __init__(self, warmup: int):
        self.warmup, self.ends = warmup, []

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step < self.warmup:
            return
        self.ends.append(timestamp())

    @property
    def seconds(self) -> list[float]:
        synchronise()
        return [elapsed(a, b) for a, b in zip(self.ends, self.ends[1:])]


def rows_of_steps(
    load: Workload,
    size: int,
    processes: int,
    lengths: list[int],
    stream: list[int],
    vocabulary: int,
) -> list[list[list[dict]]]:
    """Each step's rows of each process. After the first step a few rows of their own come round
    again, so that the warm-up meets every shape.
    """
    different = max(load.order) + 1
    made = make_rows(list(islice(cycle(lengths), size * different * processes)), stream, vocabulary)
    batches = [made[i * size : (i + 1) * size] for i in range(different * processes)]
    return [
        [batches[i * processes + r] for r in range(processes)]
        for i in load.order[: load.warmup + load.steps]
    ]


def measure(job: dict) -> dict:
    """One case, in this process and those beside it; a result on rank 0."""
    world = join_world(int(os.environ.get("WORLD_SIZE", 1)))
    load, recipe = Workload(**job["load"]), Recipe(**job["recipe"])
    began = time.perf_counter()
    tokenizer = load_tokenizer(recipe)
    own = encode_questions(
        load_questions(
            recipe.data,
            recipe.train_split,
            recipe.label_base,
            limit=recipe.max_rows or 5000,
            training=True,
        ).questions,
        tokenizer,
        recipe,
    ).rows
    lengths = make_lengths(load, [len(r["input_ids"]) for r in own], recipe.seed)
    size = recipe.per_device_train_batch_size
    model = apply_fast_parts(load_model(recipe), recipe)
    parameters = passed_parameters(
        empty_model(recipe.model) if Path(recipe.model).is_dir() else model
    )
    steps = rows_of_steps(
        load,
        size,
        world.size,
        lengths,
        [i for r in own for i in r["input_ids"]],
        model.config.vocab_size,
    )
    rows = [example for step in steps for batch in step for example in batch]
    packing = choose_packing(model, rows, recipe)
    tuned, ends = apply_fast_parts(attach_lora(model, recipe), recipe), Ends(load.warmup)
    kernels = describe_kernels(tuned, recipe, packing)
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(
            tuned,
            tokenizer,
            Encoded(Dataset.from_list(rows), [], 0, []),
            recipe,
            Path(folder),
            packed=packing[0],
        )
        trainer.args.train_sampling_strategy, trainer.args.save_strategy = "sequential", "no"
        trainer.add_callback(ends)
        if job["way"] == "ddp-hooks":
            trainer.training_step.apart, trainer.training_step.why = (
                False,
                "DistributedDataParallel's hooks",
            )
        loaded = time.perf_counter() - began
        loss = trainer.train().training_loss
    seconds, peak = ends.seconds, torch.tensor([peak_memory_gib()], device=trainer.args.device)
    peaks = trainer.accelerator.gather(peak).tolist()
    timed = steps[load.warmup :]
    tokens = [[sum(len(e["input_ids"]) for e in batch) for batch in step] for step in timed]
    total = [sum(t) for t in tokens]
    flops = [count_flops(parameters, t, size * world.size, True) for t in total]
    share = (
        median_and_range([f / s / load.peak / 1e12 / world.size for f, s in zip(flops, seconds)])
        if torch.cuda.is_available()
        else None
    )
    step = trainer.training_step
    return dict(
        gpus=world.size,
        way=job["way"],
        seconds=median_and_range(seconds),
        tokens=median_and_range(total),
        tokens_per_s=median_and_range([t / s for t, s in zip(total, seconds)]),
        share_of_peak=share,
        longest_over_mean=round(statistics.mean(max(t) / statistics.mean(t) for t in tokens), 4),
        examples=size,
        mean_length=round(sum(total) / (len(total) * size * world.size), 2),
        peak_gib=round(max(peaks), 3),
        peaks_gib=[round(p, 3) for p in peaks],
        recorded=sum(isinstance(r, Recording) for r in getattr(step, "recorded", {}).values()),
        loss=loss,
        load_s=round(loaded, 1),
        kernels=kernels.splitlines(),
        trainable=sum(p.numel() for p in tuned.parameters() if p.requires_grad),
    )


def worker(file: str) -> None:
    job = json.loads(Path(file).read_text())
    found = measure(job) | dict(
        hardware=hardware(), versions=versions(), recipe=job["recipe"], load=job["load"]
    )
    if int(os.environ.get("RANK", 0)) == 0:
        write_json(Path(job["result"]), found)
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
    sys.stdout.flush()
    os._exit(0)  # taking DDP apart, torch 2.13 may wait for gloo's thread, which waits for the GIL


def case(recipe: Recipe, gpus: int, way: str, load: Workload, log: Path, limit: int) -> dict:
    """Measure in processes of their own; what they print goes to a file."""
    with tempfile.TemporaryDirectory() as folder, open(log, "w") as printed:
        if load.layers:
            recipe = cut_model(recipe, load.layers, Path(folder))
        size = examples_per_step(
            VARIANTS["ours"],
            make_lengths(replace(load, lengths="medmcqa"), [], recipe.seed),
            load.tokens,
        )
        recipe = replace(
            variant_recipe(
                recipe,
                "ours-checkpointing" if recipe.gradient_checkpointing else "ours",
                size,
                load,
            ),
            parallel="auto" if gpus == 1 else way.partition("-")[0],
            max_steps=load.warmup + load.steps,
            logging_steps=load.warmup + load.steps,
        )
        job, result = Path(folder) / "job.json", Path(folder) / "result.json"
        write_json(
            job,
            dict(
                recipe=asdict(check_recipe(recipe)), load=asdict(load), way=way, result=str(result)
            ),
        )
        threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, (os.cpu_count() or 1) // gpus))
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc_per_node",
            str(gpus),
            str(HERE),
            "--worker",
            str(job),
        ]
        try:
            done = subprocess.run(
                command,
                stdout=printed,
                stderr=subprocess.STDOUT,
                timeout=limit,
                env=os.environ
                | {
                    "OMP_NUM_THREADS": threads,
                    "PYTHONPATH": os.pathsep.join(
                        [str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")]
                    ),
                },
            ).returncode
        except subprocess.TimeoutExpired:
            done = f"nothing after {limit} s"
        if result.is_file():
            return json.loads(result.read_text())
    told = [
        line.strip()
        for line in log.read_text(errors="replace").splitlines()
        if "Error" in line and "ChildFailed" not in line
    ] or ["no error was printed"]
    return dict(gpus=gpus, way=way, failed=f"ended with {done}: {told[-1][:300]}")


def table(found: list[dict]) -> str:
    """The cases as Markdown."""
    alone = next(
        (f["tokens_per_s"]["median"] for f in found if f["gpus"] == 1 and "tokens_per_s" in f), None
    )
    lines = [
        "| GPUs | way | tokens/s | a GPU | share of peak | efficiency | s a step | peak GiB, fullest | an epoch | longest row / mean |",
        "|---" * 10 + "|",
    ]
    for f in found:
        if "failed" in f:
            lines.append(
                f"| {f['gpus']} | {f['way']} | not run: {f['failed'].replace('|', '/')} |"
                + " |" * 7
            )
            continue
        speed = f["tokens_per_s"]["median"]
        efficiency = f"{speed / f['gpus'] / alone:.1%}" if alone else ""
        share = f"{f['share_of_peak']['median']:.1%}" if f["share_of_peak"] else ""
        hours = TRAINING_ROWS["openlifescienceai/medmcqa"] * f["mean_length"] / speed / 3600
        lines.append(
            f"| {f['gpus']} | {'' if f['gpus'] == 1 else f['way']} | {speed:,.0f} ({f['tokens_per_s']['min']:,.0f} to {f['tokens_per_s']['max']:,.0f}) | {speed / f['gpus']:,.0f} | {share} | {efficiency} | {f['seconds']['median']:.4g} | {f['peak_gib']:.4g} | {60 * hours:.1f} min | {f['longest_over_mean']:.3f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--recipe", default="toy")
    parser.add_argument(
        "-p", action="append", default=[], metavar="KEY VALUE", help="set a recipe key; repeatable"
    )
    parser.add_argument("--gpus", default="1,2", help="numbers of processes, with commas between")
    parser.add_argument(
        "--ways",
        default="ddp,fsdp",
        help="for more than one process: ddp, fsdp, or ddp-hooks: gradients added up by DistributedDataParallel's own hooks, and so no recorded steps",
    )
    parser.add_argument(
        "--tokens", type=int, default=16384, help="real tokens a step and process, about"
    )
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--warmup", type=int, default=6)
    parser.add_argument("--layers", type=int)
    parser.add_argument("--peak", type=float, default=790.0, help="TFLOP/s of a GPU")
    parser.add_argument("--commit", default="")
    parser.add_argument("--limit", type=int, default=540, help="seconds a case")
    parser.add_argument("--out", type=Path, default=results_file(__file__))
    parser.add_argument("--logs", type=Path, default=Path("_runs/spread"))
    parser.add_argument("--worker")
    args = parser.parse_args(join_params(sys.argv[1:]))
    if args.worker:
        return worker(args.worker)
    recipe, load = (
        recipe_of(args.recipe, args.p),
        Workload(args.tokens, args.steps, args.warmup, layers=args.layers, peak=args.peak),
    )
    load_config(recipe.model)
    args.logs.mkdir(parents=True, exist_ok=True)
    cases, found = (
        [
            (n, way)
            for n in map(int, args.gpus.split(","))
            for way in (args.ways.split(",") if n > 1 else ["ddp"])
        ],
        [],
    )
    for gpus, way in cases:
        began = time.perf_counter()
        one = case(recipe, gpus, way, load, args.logs / f"{gpus}-{way}.log", args.limit)
        found.append(
            dict(
                model=recipe.model,
                commit=args.commit or git_commit(),
                date=time.strftime("%Y-%m-%d"),
                wall_s=round(time.perf_counter() - began, 1),
            )
            | one
        )
        append_line(args.out, found[-1])
        print(
            f"{gpus} {way}: {one.get('failed') or format(one['tokens_per_s']['median'], ',.0f') + ' tokens/s'} ({found[-1]['wall_s']} s)",
            flush=True,
        )
    print(
        f"\n{table(found)}\n\nlines  {args.out} ({len(read_lines(args.out))})\nlogs   {args.logs}"
    )


if __name__ == "__main__":
    main()
