"""What every benchmark does: alternate, time, print, append a record of the circumstances."""

import argparse
import json
import time
from pathlib import Path

from medmcqa_lora.core.environment import git_commit, hardware, versions

ROOT = Path(__file__).resolve().parents[1]


def results_file(script: str) -> Path:
    """Where a script's records go: results/NAME.jsonl."""
    return ROOT / "benchmarks/results" / f"{Path(script).stem}.jsonl"


def circumstances(commit: str | None = None) -> dict:
    """What a record says of its run; the commit is given where git can't tell it."""
    return dict(
        commit=commit or git_commit(), date=time.strftime("%Y-%m-%d"),
        hardware=hardware(), versions=versions(),
    )


def append_record(file: Path, line: dict) -> None:
    """Append a record as a line of JSON; unlike the package's own logs, it may hold NaN."""
    with open(file, "a") as f:
        f.write(json.dumps(line) + "\n")


def add_recipe_options(parser: argparse.ArgumentParser) -> None:
    """--recipe and -p, as the package's commands have them."""
    parser.add_argument("--recipe", default="toy")
    repeatable = "set a recipe key; repeatable"
    parser.add_argument("-p", action="append", default=[], metavar="KEY VALUE", help=repeatable)


def add_record_options(parser: argparse.ArgumentParser, script: str) -> None:
    """--commit and --out."""
    parser.add_argument("--commit", default="", help="where the checkout's git can't tell")
    parser.add_argument("--out", type=Path, default=results_file(script))


def alternate(variants: dict, repeats: int, warm: bool = True) -> dict[str, list[float]]:
    """Seconds of each variant (a function that returns them), in alternation.

    If `warm`, all variants run once before.
    """
    if warm:
        for run in variants.values(): run()
    seconds = {name: [] for name in variants}
    for _ in range(repeats):
        for name, run in variants.items(): seconds[name].append(run())
    return seconds


def timed(run) -> float:
    """Seconds of a call."""
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


class Laps:
    """Seconds of one piece of work after the other."""

    def __init__(self):
        self.seconds = {}  # of each lap, by its name
        self.began = time.perf_counter()  # the lap that runs

    def end(self, name: str) -> None:
        now = time.perf_counter()
        self.seconds[name] = now - self.began
        self.began = now


def print_differences(case: str, differences: dict[str, float], digits: int = 2) -> None:
    """A line of what differs by how much."""
    print(f"{case} " + "  ".join(f"{what} {x:.{digits}e}" for what, x in differences.items()))


def record(benchmark: str, settings: dict, results: dict[str, dict]) -> None:
    """Print medians with their ranges and append them to results/BENCHMARK.jsonl."""
    for name, row in results.items():
        low, high, n = row["min"], row["max"], row["n"]
        print(f"{name:<32} median {row['median']:.4g}  ({low:.4g} to {high:.4g}, n = {n})")
    line = dict(benchmark=benchmark, **circumstances(), settings=settings, results=results)
    append_record(results_file(benchmark), line)
