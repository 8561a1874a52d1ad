"""The 30B model's frozen products in bfloat16 and in 8 bits, by themselves.

    python benchmarks/speed/products.py               # an H100 or H200
    python benchmarks/speed/products.py --tokens 512  # anywhere: PyTorch computes the 8-bit numbers

Dense ones of a row of 16,384 tokens, forward and backward, and the routed experts' of its 98,304
rows, shared out among 128 experts unevenly. 8-bit rows are made beforehand: within a step, that
is done by the kernels that compute them. For the experts torch's own grouped product of 8-bit
rows, too. Prints milliseconds (median of the repetitions), TFLOP/s and the distance from
bfloat16's result; appends a line to benchmarks/results/products.jsonl (or --out FILE).
"""

import argparse
from functools import partial

import torch

from benchmarks.common import add_record_options, append_record, circumstances
from medmcqa_lora.bench.profile import elapsed, median_and_range, synchronise, timestamp
from medmcqa_lora.core.environment import has_float8
from medmcqa_lora.fast.experts import expert_product
from medmcqa_lora.fast.float8 import frozen_matmul, quantise, quantise_matrix
from tests.helpers import relative_distance

DENSE = {  # in, out
    "in_proj": (2688, 10304),
    "out_proj and o": (4096, 2688),
    "q": (2688, 4096),
    "shared up": (2688, 3712),
    "shared down": (3712, 2688),
}
ROUTED = {"experts up": (2688, 1856), "experts down": (1856, 2688)}
TOP_K = 6  # experts of a token


def median_ms(run, repetitions: int) -> float:
    """Median milliseconds of a function, after three calls that don't count."""
    for _ in range(3): run()
    marks = [timestamp()]
    for _ in range(repetitions):
        run()
        marks.append(timestamp())
    synchronise()
    return 1e3 * median_and_range([elapsed(a, b) for a, b in zip(marks, marks[1:])])["median"]


def compare(name: str, ways: dict, operations: int, repetitions: int) -> list[dict]:
    """A line a way: milliseconds, TFLOP/s, relative distance from the first way's result."""
    first = next(iter(ways.values()))
    reference, found = first().float(), []
    for way, run in ways.items():
        ms = median_ms(run, repetitions)
        distance = relative_distance(run().float(), reference)
        tflops = operations / ms / 1e9
        speed = f"{ms:8.3f} ms {tflops:8.1f} TFLOP/s"
        print(f"{name:<26} {way:<28} {speed}   {distance:.4f}", flush=True)
        figures = dict(ms=round(ms, 4), tflops=round(tflops, 1), apart=round(distance, 4))
        found.append({"product": name, "way": way} | figures)
    return found


def random_matrix(*shape: int, device: torch.device) -> torch.Tensor:
    return torch.randn(shape, device=device, dtype=torch.bfloat16)


def compare_dense(name: str, k: int, n: int, args, device: torch.device) -> list[dict]:
    """The product of (tokens, k) rows and an (n, k) matrix."""
    x = random_matrix(args.tokens, k, device=device)
    w = random_matrix(n, k, device=device) / k**0.5
    x8, w8 = quantise(x), quantise_matrix(w)
    ways = {"bfloat16": partial(frozen_matmul, x, w), "8 bits": partial(frozen_matmul, x8, w8)}
    return compare(name, ways, 2 * args.tokens * k * n, args.repetitions)


def torch_grouped_product(x8, w8, ends: torch.Tensor) -> torch.Tensor:
    """torch's own grouped product of 8-bit rows."""
    rows = w8.rows
    how = dict(offs=ends, out_dtype=torch.bfloat16, use_fast_accum=True)
    return torch._scaled_grouped_mm(x8.values, rows.values.mT, x8.scale, rows.scale, **how)


def draw_counts(tokens: int, experts: int, device: torch.device) -> torch.Tensor:
    """(experts,) rows of each, of which some are busier than others."""
    weights = torch.rand(experts, device=device) + 0.3
    probabilities = (weights / weights.sum()).expand(tokens, experts)
    return torch.bincount(torch.multinomial(probabilities, TOP_K).flatten(), minlength=experts)


def compare_routed(name: str, k: int, n: int, args, device: torch.device) -> list[dict]:
    """The product of each expert's (rows, k) and its (n, k) matrix."""
    counts = draw_counts(args.tokens, args.experts, device)
    ends, rows = counts.cumsum(0).to(torch.int32), args.tokens * TOP_K
    x = random_matrix(rows, k, device=device)
    w = random_matrix(args.experts, n, k, device=device) / k**0.5
    x8, w8 = quantise(x), quantise_matrix(w)
    ways = {
        "bfloat16": partial(expert_product, x, w, ends),
        "8 bits": partial(expert_product, x8, w8, ends),
    }
    if has_float8(device):
        ways["8 bits, _scaled_grouped_mm"] = partial(torch_grouped_product, x8, w8, ends)
    fullest = float(counts.max() / counts.float().mean())
    return compare(f"{name} (fullest {fullest:.2f})", ways, 2 * rows * k * n, args.repetitions)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--experts", type=int, default=128)
    parser.add_argument("--repetitions", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    add_record_options(parser, __file__)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found = []
    for name, (k, n) in DENSE.items():
        found += compare_dense(f"{name}, forward", k, n, args, device)
        found += compare_dense(f"{name}, backward", n, k, args, device)
    for name, (k, n) in ROUTED.items():
        found += compare_routed(name, k, n, args, device)
    settings = {k: v for k, v in vars(args).items() if k not in ("commit", "out")}
    head = dict(benchmark="products", **circumstances(args.commit), settings=settings)
    append_record(args.out, head | dict(products=found))


if __name__ == "__main__":
    main()
