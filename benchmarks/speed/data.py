"""Seconds and peak memory of what comes before a model on a training set of MedMCQA's size, twice:
afresh, and from the cache.

    python benchmarks/speed/data.py [REPEATS] [--rows 182822] [--target letter]

182,822 different questions are made up (seeded) from the words of real rows in ../shared/data,
each with the numbers of words of a real validation row, explanations included; they say nothing.
Then, each time in a fresh process, they are read and checked (`load_pair`), tokenised for SmolLM2
(`encode_questions`) and packed, eight examples a row, as the trainer's collator does. "again" is
the same with the first process' cache. Target: first run within 60 s and 2 GB on two cores.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from inspect import signature
from pathlib import Path

import torch
from torch.utils.data import DataLoader

from benchmarks.common import record
from medmcqa_lora.bench.profile import median_and_range
from medmcqa_lora.core.recipe import Recipe
from medmcqa_lora.data.leakage import load_pair
from medmcqa_lora.data.sources import read_file
from medmcqa_lora.data.tokens import encode_questions
from medmcqa_lora.fast.packing import packing_collator
from medmcqa_lora.model.resolve import load_tokenizer

REAL = Path(__file__).resolve().parents[2] / "shared" / "data"
TEXTS = ("question", "opa", "opb", "opc", "opd", "exp")


def make_rows(path: Path, n: int, seed: int = 0) -> None:
    """Write n made-up rows; the lengths of each follow a real validation row's."""
    draw, kept, seen = random.Random(seed), ("subject_name", "topic_name", "choice_type"), set()
    real = [r for _, r in read_file(REAL / "medmcqa_validation.jsonl")]
    words = {f: " ".join(str(r[f]) for r in real if r[f]).split() for f in TEXTS}
    with open(path, "w", encoding="utf-8") as f:
        while len(seen) < n:
            like = draw.choice(real)
            texts = {
                t: " ".join(draw.choices(words[t], k=len(str(like[t]).split())))
                if like[t]
                else like[t]
                for t in TEXTS
            }
            if (key := hash(tuple(texts[t] for t in TEXTS[:5]))) in seen:
                continue
            seen.add(key)
            row = (
                texts
                | {k: like[k] for k in kept}
                | {"cop": draw.randint(1, 4), "id": f"{draw.getrandbits(128):032x}"}
            )
            f.write(json.dumps(row, ensure_ascii=False) + "\n")


def measure(path: str, cache: str, target: str) -> dict[str, float]:
    """Seconds by step, and the most resident memory of this process; runs in a process of its
    own.
    """
    recipe = Recipe(data=path, eval_data="sample", target=target)
    tokenizer, taken, at = load_tokenizer(recipe), {}, time.perf_counter()

    def lap(name):
        nonlocal at
        taken[name], at = time.perf_counter() - at, time.perf_counter()

    libraries = peak()
    training, _ = load_pair(recipe)
    lap("read and check, s")
    encoded = encode_questions(
        training.questions,
        tokenizer,
        recipe,
        *[Path(cache)] * ("cache" in signature(encode_questions).parameters),
    )
    lap("tokenise, s")
    torch.manual_seed(0)
    tokens = sum(
        b["input_ids"].numel()
        for b in DataLoader(encoded.rows, batch_size=8, shuffle=True, collate_fn=packing_collator())
    )
    lap("pack, s")
    assert tokens == encoded.tokens
    return taken | {
        "all, s": sum(taken.values()),
        "peak, GB": peak(),
        "of which libraries, GB": libraries,
    }


def peak() -> float:
    """GB (10^9 bytes); VmHWM counts from this program's start, getrusage also what its parent
    held.
    """
    [line] = [
        x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM")
    ]
    return int(line.split()[1]) * 1024 / 1e9


def fresh_of(program: str, *words: str) -> dict:
    """What `program --measure WORDS` prints last, from a process of its own."""
    done = subprocess.run(
        [sys.executable, program, "--measure", *words],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )
    return json.loads(done.stdout.splitlines()[-1])


def fresh(*words: str) -> dict[str, float]:
    return fresh_of(__file__, *words)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("repeats", nargs="?", type=int, default=5)
    parser.add_argument("--rows", type=int, default=182_822)
    parser.add_argument("--target", default="letter")
    parser.add_argument("--measure", nargs=3)
    asked = parser.parse_args()
    if asked.measure:
        print(json.dumps(measure(*asked.measure)))
        sys.exit()
    with tempfile.TemporaryDirectory() as folder:
        make_rows(rows := Path(folder) / "rows.jsonl", asked.rows)
        found: dict[str, list[float]] = {}
        for i in range(asked.repeats):
            for name in ("first", "again"):
                for step, value in fresh(str(rows), f"{folder}/cache{i}", asked.target).items():
                    found.setdefault(f"{name}: {step}", []).append(value)
        settings = dict(
            rows=asked.rows,
            target=asked.target,
            megabytes=round(rows.stat().st_size / 1e6),
            cores=len(os.sched_getaffinity(0)),
        )
        record("data", settings, {name: median_and_range(values) for name, values in found.items()})
