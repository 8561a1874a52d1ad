"""Is a killed and resumed run the same as one never stopped? On the machine at hand, by the public
command.

    python benchmarks/correctness/resume.py --recipe nemotron_nano \\
        -p weights random -p max_steps 12 -p save_steps 4 -p max_rows 2000
    python benchmarks/correctness/resume.py -p max_steps 12 -p save_steps 4  # the toy, on a CPU

Three runs of a recipe: two that are never stopped, and one that gets SIGKILL (the command, its
workers and kernels at once) when metrics.jsonl has --kill-at lines, and continues by --resume. The
two unstopped ones show whether the machine's kernels are deterministic at all; where they are not,
the third can't be expected to be closer than those are to each other. Compared are losses and all
other numbers of metrics.jsonl but speed and memory, and the adapter, byte by byte; what differs
is described by its largest difference, and for the adapter by tensors. Appends a line to
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

from benchmarks.common import (
    ROOT,
    add_recipe_options,
    add_record_options,
    append_record,
    circumstances,
)
from medmcqa_lora.cli import join_params
from medmcqa_lora.core.files import read_lines

COMMAND = [sys.executable, "-c", "from medmcqa_lora.cli import main; main()"]
SPEED = ("tokens_per_s", "peak_memory_gib")
MARK = "RESUME_BENCHMARK"  # an environment variable that all processes of the killed run have


def environment(**more: str) -> dict[str, str]:
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths)} | more


def train(words: list[str], folder: Path, *more: str) -> float:
    """Run to the end; seconds."""
    began = time.perf_counter()
    command = [*COMMAND, "train", *words, "--out", str(folder), *more]
    with open(folder.with_suffix(".log"), "ab") as log:
        subprocess.run(command, check=True, stdout=log, stderr=log, env=environment())
    return round(time.perf_counter() - began, 1)


def marked_processes(mark: bytes) -> list[int]:
    """Processes that have the mark in their environment."""
    found = []
    for p in Path("/proc").glob("[0-9]*"):
        try:
            if mark in (p / "environ").read_bytes() and int(p.name) != os.getpid():
                found.append(int(p.name))
        except OSError:
            pass
    return found


def kill_marked(run: subprocess.Popen, mark: bytes) -> None:
    """SIGKILL to a run and all of its processes, until none is left."""
    while True:
        left = marked_processes(mark)
        if not left: return
        for pid in left:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
        run.poll()
        time.sleep(0.05)


def train_and_kill(words: list[str], folder: Path, lines: int) -> int:
    """Run until so many lines are logged; the step of the last line."""
    value = str(time.time_ns())
    command = [*COMMAND, "train", *words, "--out", str(folder)]
    own = dict(env=environment(**{MARK: value}), start_new_session=True)
    metrics, log_file = folder / "metrics.jsonl", folder.with_suffix(".log")
    with open(log_file, "ab") as log:
        run = subprocess.Popen(command, stdout=log, stderr=log, **own)
        while len(read_lines(metrics)) < lines:
            if run.poll() is not None:
                sys.exit(f"the run ended before line {lines}: see {log_file}")
            time.sleep(0.002)
        kill_marked(run, f"{MARK}={value}".encode())
    return read_lines(metrics)[-1]["step"]


def compare_metrics(one: list[dict], two: list[dict]) -> dict:
    """What two logs have in common, to the bit or by the largest difference."""
    def without_speed(lines): return [{k: v for k, v in x.items() if k not in SPEED} for x in lines]
    pairs = [(x["step"], x["loss"], y["loss"]) for x, y in zip(one, two)]
    different = [step for step, a, b in pairs if a != b]
    return dict(
        lines=len(one),
        metrics_same=without_speed(one) == without_speed(two),
        losses_same=[x["loss"] for x in one] == [y["loss"] for y in two],
        largest_loss_difference=max(abs(a - b) for _, a, b in pairs),
        first_different_step=different[0] if different else None,
    )


def compare_adapters(a: Path, b: Path) -> dict:
    """The same of two folders with an adapter."""
    def same_bytes(name): return (a / name).read_bytes() == (b / name).read_bytes()
    name = "adapter_model.safetensors"
    first, second = load_file(a / name), load_file(b / name)
    differences = {k: (first[k].float() - second[k].float()).abs().max().item() for k in first}
    worst = max(differences, key=differences.get)
    return dict(
        adapter_same=same_bytes(name),
        config_same=same_bytes("adapter_config.json"),
        tensors=len(differences),
        tensors_different=sum(d > 0 for d in differences.values()),
        largest_difference=differences[worst],
        of=worst,
        largest_value=max(t.abs().max().item() for t in first.values()),
    )


def compare(a: Path, b: Path) -> dict:
    """What two runs have in common."""
    metrics = compare_metrics(*(read_lines(f / "metrics.jsonl") for f in (a, b)))
    return metrics | compare_adapters(a / "adapter", b / "adapter")


LOSSES = "differ from step {first_different_step}, at most {largest_loss_difference:.3g}"
ADAPTER = (
    "differs in {tensors_different} of {tensors} tensors, at most {largest_difference:.3g} "
    "in {of} (largest value {largest_value:.3g})"
)


def in_words(found: dict) -> str:
    """One comparison in a line."""
    metrics = "identical" if found["metrics_same"] else "differ"
    losses = "identical" if found["losses_same"] else LOSSES.format(**found)
    adapter = "identical, byte by byte" if found["adapter_same"] else ADAPTER.format(**found)
    return f"metrics {metrics}, losses {losses}; adapter {adapter}"


def parse_arguments() -> argparse.Namespace:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    add = parser.add_argument
    add_recipe_options(parser)
    add("--nproc-per-node", default="1")
    add("--kill-at", type=int, default=6, help="lines of metrics.jsonl")
    deleted = "for the three runs; an older one is deleted"
    add("--folder", type=Path, default=Path("_runs/resume"), help=deleted)
    add_record_options(parser, __file__)
    return parser.parse_args(join_params(sys.argv[1:]))


def main() -> None:
    args = parse_arguments()
    settings = [word for p in args.p for word in ("-p", p)]
    words = ["--recipe", args.recipe, *settings, "--nproc-per-node", args.nproc_per_node]
    shutil.rmtree(args.folder, ignore_errors=True)
    args.folder.mkdir(parents=True)
    whole, again, cut = (args.folder / name for name in ("whole", "again", "cut"))
    seconds = dict(whole=train(words, whole), again=train(words, again))
    killed = train_and_kill(words, cut, args.kill_at)
    checkpoints = sorted(p.name for p in (cut / "checkpoints").glob("checkpoint-*"))
    seconds["resumed"] = train(words, cut, "--resume")
    results = dict(two_whole_runs=compare(whole, again), killed_and_resumed=compare(whole, cut))
    for name, found in results.items(): print(f"{name}: {in_words(found)}")
    line = dict(
        words=words, killed_after_step=killed, checkpoints_then=checkpoints,
        seconds=seconds, results=results,
    )
    append_record(args.out, circumstances(args.commit) | line)
    left = ", ".join(checkpoints) or "no checkpoint"
    print(f"killed after step {killed} with {left}; seconds {seconds}; line  {args.out}")


if __name__ == "__main__":
    main()
