"""The 30B model's frozen products in bfloat16 and in 8 bits, by themselves.

    python benchmarks/speed/products.py                # an H100 or H200
    python benchmarks/speed/products.py --tokens 512   # anywhere: the same code, where PyTorch computes what 8 bits stand for

Dense ones of a row of 16,384 tokens, forward and backward, and the routed experts' of its 98,304
rows, shared out among 128 experts unevenly. 8-bit rows are made beforehand: within a step, that
is done by the kernels that compute them. For the experts torch's own grouped product of 8-bit
rows, too. Prints milliseconds (median of the repetitions), TFLOP/s and the distance from
bfloat16's result; appends a line to benchmarks/results/products.jsonl (or --out FILE).
"""

import argparse
import statistics
import time
from pathlib import Path

import torch

from benchmarks.common import results_file
from medmcqa_lora.bench.profile import elapsed, synchronise, timestamp
from medmcqa_lora.core.environment import git_commit, hardware, has_float8, versions
from medmcqa_lora.core.files import append_line
from medmcqa_lora.fast.experts import expert_product
from medmcqa_lora.fast.float8 import frozen_matmul, quantise, quantise_matrix

DENSE = {
    "in_proj": (2688, 10304),
    "out_proj and o": (4096, 2688),
    "q": (2688, 4096),
    "shared up": (2688, 3712),
    "shared down": (3712, 2688),
}  # in, out
ROUTED = {"experts up": (2688, 1856), "experts down": (1856, 2688)}


def timed(run, repetitions: int) -> float:
    """Median milliseconds of a function, after three calls that don't count."""
    for _ in range(3):
        run()
    marks = [timestamp()]
    for _ in range(repetitions):
        run()
        marks.append(timestamp())
    synchronise()
    return 1e3 * statistics.median(elapsed(a, b) for a, b in zip(marks, marks[1:]))


def compare(name: str, ways: dict, operations: int, repetitions: int) -> list[dict]:
    """A line a way: milliseconds, TFLOP/s, relative distance from the first way's result."""
    plain, found = next(iter(ways.values()))().float(), []
    for way, run in ways.items():
        ms = timed(run, repetitions)
        found.append(
            dict(
                product=name,
                way=way,
                ms=round(ms, 4),
                tflops=round(operations / ms / 1e9, 1),
                apart=round(float((run().float() - plain).norm() / plain.norm()), 4),
            )
        )
        print(
            "{product:<26} {way:<28} {ms:8.3f} ms {tflops:8.1f} TFLOP/s   {apart:.4f}".format(
                **found[-1]
            ),
            flush=True,
        )
    return found


def dense(name: str, k: int, n: int, tokens: int, device, repetitions: int) -> list[dict]:
    x, w = (
        torch.randn(tokens, k, device=device, dtype=torch.bfloat16),
        torch.randn(n, k, device=device, dtype=torch.bfloat16) / k**0.5,
    )
    x8, w8 = quantise(x), quantise_matrix(w)
    return compare(
        name,
        {"bfloat16": lambda: frozen_matmul(x, w), "8 bits": lambda: frozen_matmul(x8, w8)},
        2 * tokens * k * n,
        repetitions,
    )


def routed(
    name: str, k: int, n: int, tokens: int, experts: int, device, repetitions: int
) -> list[dict]:
    share = torch.rand(experts, device=device) + 0.3
    counts = torch.bincount(
        torch.multinomial((share / share.sum()).expand(tokens, experts), 6).flatten(),
        minlength=experts,
    )
    ends, rows = counts.cumsum(0).to(torch.int32), tokens * 6
    x, w = (
        torch.randn(rows, k, device=device, dtype=torch.bfloat16),
        torch.randn(experts, n, k, device=device, dtype=torch.bfloat16) / k**0.5,
    )
    x8, w8 = quantise(x), quantise_matrix(w)
    ways = {
        "bfloat16": lambda: expert_product(x, w, ends),
        "8 bits": lambda: expert_product(x8, w8, ends),
    }
    if has_float8(device):
        ways["8 bits, _scaled_grouped_mm"] = lambda: torch._scaled_grouped_mm(
            x8.values,
            w8.rows.values.mT,
            x8.scale,
            w8.rows.scale,
            offs=ends,
            out_dtype=torch.bfloat16,
            use_fast_accum=True,
        )
    return compare(
        f"{name} (fullest {float(counts.max() / counts.float().mean()):.2f})",
        ways,
        2 * rows * k * n,
        repetitions,
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--experts", type=int, default=128)
    parser.add_argument("--repetitions", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--commit", default="", help="where the checkout's git can't tell")
    parser.add_argument("--out", default=str(results_file(__file__)))
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found = [
        line
        for name, (k, n) in DENSE.items()
        for line in dense(f"{name}, forward", k, n, args.tokens, device, args.repetitions)
        + dense(f"{name}, backward", n, k, args.tokens, device, args.repetitions)
    ]
    found += [
        line
        for name, (k, n) in ROUTED.items()
        for line in routed(name, k, n, args.tokens, args.experts, device, args.repetitions)
    ]
    append_line(
        Path(args.out),
        dict(
            benchmark="products",
            commit=args.commit or git_commit(),
            date=time.strftime("%Y-%m-%d"),
            hardware=hardware(),
            versions=versions(),
            settings={k: v for k, v in vars(args).items() if k not in ("commit", "out")},
            products=found,
        ),
    )
