"""What an example's logits and LoRA gradients owe to its neighbours: alone, padded in a batch,
packed in a row.

    python benchmarks/correctness/isolation.py                 # the toy, float32
    python benchmarks/correctness/isolation.py --blocks MEM*E  # blocks of full size (a GPU)
    python benchmarks/correctness/isolation.py --dtype bfloat16

It runs on this machine's device. Every LoRA target group is attached and given random values. The
model is in training mode, so on a GPU with the kernels the fused path runs; scoring, in evaluation
mode, is in the last two lines. Differences are the norm of the difference over the norm of what
the example gives alone; "leaking" is the same without anything that keeps examples apart, to show
that the measure would see it. Appends a line to benchmarks/results/isolation.jsonl (or --out
FILE). The measurement itself is in tests/helpers.py, since the tests bound it.
"""

import argparse
import tempfile
from pathlib import Path

from benchmarks.common import add_record_options, append_record, circumstances, print_differences
from tests.helpers import isolation, make_recipe

PATTERN_HELP = "pattern of full-size blocks, such as MEM*E; none: the toy"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--blocks", default="", help=PATTERN_HELP)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    add_record_options(parser, __file__)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        recipe, config = make_recipe(args.blocks, args.dtype, Path(folder))
        found = isolation(recipe, config["chunk_size"], config["vocab_size"])
    print("\n".join(found["kernels"]))
    for case, differences in found["differences"].items():
        print_differences(f"{case:<16}", differences, digits=1)
    settings = dict(blocks=args.blocks, dtype=args.dtype, seed=0)
    line = dict(benchmark="isolation", **circumstances(args.commit), settings=settings, **found)
    append_record(args.out, line)


if __name__ == "__main__":
    main()
