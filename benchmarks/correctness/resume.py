"""Is a killed and resumed run the same as one never stopped? On the machine at hand, by the public
command.

    python benchmarks/correctness/resume.py --recipe nemotron_nano -p weights random -p max_steps 12 -p save_steps 4 -p max_rows 2000
    python benchmarks/correctness/resume.py --recipe toy -p max_steps 12 -p save_steps 4        # a check of this script, on a CPU

Three runs of a recipe: two that are never stopped, and one that gets SIGKILL (the command, its
workers and kernels at once) when metrics.jsonl has --kill-at lines, and goes on by --resume. The
two whole ones say whether the machine's kernels are deterministic at all; where they are not, the
third can't be expected to be closer than those are to each other. Compared are losses and all
other numbers of metrics.jsonl but speed and memory, and the adapter, byte by byte; what differs
is told by its largest difference, and for the adapter by tensors. Appends a line to
benchmarks/results/resume.jsonl (or --out FILE).
"""

import argparse
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from safetensors.torch import load_file

from benchmarks.common import results_file
from medmcqa_lora.cli import join_params
from medmcqa_lora.core.environment import git_commit, hardware, versions
from medmcqa_lora.core.files import append_line, read_lines

HERE = Path(__file__).resolve()
COMMAND = [sys.executable, "-c", "from medmcqa_lora.cli import main; main()"]
SPEED = ("tokens_per_s", "peak_memory_gib")


def environment(**more: str) -> dict:
    return (
        os.environ
        | {"PYTHONPATH": os.pathsep.join([str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")])}
        | more
    )


def train(words: list[str], folder: Path, *more: str) -> float:
    """Run to the end; seconds."""
    began = time.perf_counter()
    with open(folder.with_suffix(".log"), "ab") as log:
        subprocess.run(
            [*COMMAND, "train", *words, "--out", str(folder), *more],
            check=True,
            stdout=log,
            stderr=log,
            env=environment(),
        )
    return round(time.perf_counter() - began, 1)


def marked(mark: bytes) -> list[int]:
    """Processes that have the mark in their environment."""
    found = []
    for p in Path("/proc").glob("[0-9]*"):
        try:
            if mark in (p / "environ").read_bytes() and int(p.name) != os.getpid():
                found.append(int(p.name))
        except OSError:
            pass
    return found


def train_and_kill(words: list[str], folder: Path, lines: int) -> int:
    """Run until so many lines are logged; the number of the last line."""
    mark = f"RESUME_BENCHMARK={time.time_ns()}"
    with open(folder.with_suffix(".log"), "ab") as log:
        run = subprocess.Popen(
            [*COMMAND, "train", *words, "--out", str(folder)],
            stdout=log,
            stderr=log,
            env=environment(**dict([mark.split("=")])),
            start_new_session=True,
        )
        while len(read_lines(folder / "metrics.jsonl")) < lines:
            if run.poll() is not None:
                sys.exit(f"the run ended before line {lines}: see {folder.with_suffix('.log')}")
            time.sleep(0.002)
        while left := marked(mark.encode()):
            for pid in left:
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    pass
            run.poll()
            time.sleep(0.05)
    return read_lines(folder / "metrics.jsonl")[-1]["step"]


def compare(a: Path, b: Path) -> dict:
    """What two runs have in common, to the bit or by the largest difference."""
    one, two = (read_lines(f / "metrics.jsonl") for f in (a, b))
    lines = all(
        {k: v for k, v in x.items() if k not in SPEED}
        == {k: v for k, v in y.items() if k not in SPEED}
        for x, y in zip(one, two)
    ) and len(one) == len(two)
    files = [f / "adapter/adapter_model.safetensors" for f in (a, b)]
    first, second = map(load_file, files)
    apart = {k: (first[k].float() - second[k].float()).abs().max().item() for k in first}
    worst = max(apart, key=apart.get)
    return dict(
        lines=len(one),
        metrics_same=lines,
        losses_same=[x["loss"] for x in one] == [y["loss"] for y in two],
        largest_loss_difference=max(abs(x["loss"] - y["loss"]) for x, y in zip(one, two)),
        first_different_step=next(
            (x["step"] for x, y in zip(one, two) if x["loss"] != y["loss"]), None
        ),
        adapter_same=files[0].read_bytes() == files[1].read_bytes(),
        config_same=(a / "adapter/adapter_config.json").read_bytes()
        == (b / "adapter/adapter_config.json").read_bytes(),
        tensors=len(apart),
        tensors_different=sum(d > 0 for d in apart.values()),
        largest_difference=apart[worst],
        of=worst,
        largest_value=max(t.abs().max().item() for t in first.values()),
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--recipe", default="toy")
    parser.add_argument(
        "-p", action="append", default=[], metavar="KEY VALUE", help="set a recipe key; repeatable"
    )
    parser.add_argument("--nproc-per-node", default="1")
    parser.add_argument("--kill-at", type=int, default=6, help="lines of metrics.jsonl")
    parser.add_argument(
        "--folder",
        type=Path,
        default=Path("_runs/resume"),
        help="for the three runs; an older one is deleted",
    )
    parser.add_argument("--commit", default="")
    parser.add_argument("--out", type=Path, default=results_file(__file__))
    args = parser.parse_args(join_params(sys.argv[1:]))
    words = [
        "--recipe",
        args.recipe,
        *(w for p in args.p for w in ("-p", p)),
        "--nproc-per-node",
        args.nproc_per_node,
    ]
    shutil.rmtree(args.folder, ignore_errors=True)
    args.folder.mkdir(parents=True)
    whole, again, cut = (args.folder / name for name in ("whole", "again", "cut"))
    seconds = dict(whole=train(words, whole), again=train(words, again))
    killed = train_and_kill(words, cut, args.kill_at)
    kept = sorted(p.name for p in (cut / "checkpoints").glob("checkpoint-*"))
    seconds["resumed"] = train(words, cut, "--resume")
    results = dict(two_whole_runs=compare(whole, again), killed_and_resumed=compare(whole, cut))
    for name, r in results.items():
        print(
            f"{name}: metrics {'identical' if r['metrics_same'] else 'differ'}, losses {'identical' if r['losses_same'] else 'differ from step {first_different_step}, at most {largest_loss_difference:.3g}'.format(**r)}; adapter "
            + (
                "identical, byte by byte"
                if r["adapter_same"]
                else "differs in {tensors_different} of {tensors} tensors, at most {largest_difference:.3g} in {of} (largest value {largest_value:.3g})".format(
                    **r
                )
            )
        )
    append_line(
        args.out,
        dict(
            commit=args.commit or git_commit(),
            date=time.strftime("%Y-%m-%d"),
            hardware=hardware(),
            versions=versions(),
            words=words,
            killed_after_step=killed,
            checkpoints_then=kept,
            seconds=seconds,
            results=results,
        ),
    )
    print(
        f"killed after step {killed} with {', '.join(kept) or 'no checkpoint'}; seconds {seconds}; line  {args.out}"
    )


if __name__ == "__main__":
    main()
