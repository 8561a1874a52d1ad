"""What every benchmark does: alternate, take medians, print, and append a record with its circumstances."""

import json
import statistics
import time
from pathlib import Path

import torch

from medmcqa_lora.core.environment import git_commit, hardware, versions


def alternate(variants: dict, repeats: int, warm: bool = True) -> dict[str, list[float]]:
    """Seconds of each variant (a function that returns them), in alternation, after one warm-up round if `warm`."""
    for run in variants.values() if warm else ():
        run()
    taken = {name: [] for name in variants}
    for _ in range(repeats):
        for name, run in variants.items():
            taken[name].append(run())
    return taken


def timed(run) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def allocated_on_cpu(run) -> int:
    """The most bytes that were allocated at once during `run`, by torch's own account."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        run()
    now = top = 0
    for event in sorted(
        (e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"),
        key=lambda e: e.start_ns(),
    ):
        now += event.nbytes()
        top = max(top, now)
    return top


def spread(values: list[float]) -> dict:
    return dict(
        median=round(statistics.median(values), 4),
        min=round(min(values), 4),
        max=round(max(values), 4),
        n=len(values),
    )


def record(benchmark: str, settings: dict, results: dict) -> None:
    """Print the results and append them to benchmarks/BENCHMARK.jsonl."""
    for name, row in results.items():
        print(
            f"{name:<32} median {row['median']:.4g}  ({row['min']:.4g} to {row['max']:.4g}, n = {row['n']})"
        )
    line = dict(
        benchmark=benchmark,
        commit=git_commit(),
        date=time.strftime("%Y-%m-%d"),
        hardware=hardware(),
        versions=versions(),
        settings=settings,
        results=results,
    )
    with open(Path(__file__).parent / f"{benchmark}.jsonl", "a") as f:
        f.write(json.dumps(line) + "\n")
