"""What every benchmark does: alternate, take medians, print, append a record of the circumstances."""

import json
import time
from pathlib import Path

import torch

from medmcqa_lora.bench.profile import allocated_peak
from medmcqa_lora.core.environment import git_commit, hardware, versions

RESULTS = Path(__file__).resolve().parent / "results"


def results_file(script: str) -> Path:
    """Where a script's records go: results/NAME.jsonl."""
    return RESULTS / f"{Path(script).stem}.jsonl"


def alternate(variants: dict, repeats: int, warm: bool = True) -> dict[str, list[float]]:
    """Seconds of each variant (a function that returns them), in alternation.

    If `warm`, all variants run once before.
    """
    for run in variants.values() if warm else ():
        run()
    seconds = {name: [] for name in variants}
    for _ in range(repeats):
        for name, run in variants.items():
            seconds[name].append(run())
    return seconds


def timed(run) -> float:
    """Seconds of a call."""
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def allocated_on_cpu(run) -> int:
    """The most bytes that were allocated at once during `run`, by torch's own account."""
    host = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=host, profile_memory=True) as profile:
        run()
    return allocated_peak(profile)


def record(benchmark: str, settings: dict, results: dict) -> None:
    """Print the results and append them to results/BENCHMARK.jsonl."""
    for name, row in results.items():
        low, high, n = row["min"], row["max"], row["n"]
        print(f"{name:<32} median {row['median']:.4g}  ({low:.4g} to {high:.4g}, n = {n})")
    line = dict(
        benchmark=benchmark,
        commit=git_commit(),
        date=time.strftime("%Y-%m-%d"),
        hardware=hardware(),
        versions=versions(),
        settings=settings,
        results=results,
    )
    with open(results_file(benchmark), "a") as f:
        f.write(json.dumps(line) + "\n")
