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
from collections import defaultdict
from pathlib import Path

import torch
from torch.utils.data import DataLoader

from benchmarks.common import ROOT, Laps, record
from medmcqa_lora.bench.profile import median_and_range
from medmcqa_lora.core.recipe import Recipe
from medmcqa_lora.data.leakage import load_pair
from medmcqa_lora.data.sources import read_file
from medmcqa_lora.data.tokens import Encoded, encode_questions
from medmcqa_lora.fast.packing import packing_collator
from medmcqa_lora.model.resolve import load_tokenizer

REAL = ROOT.parent / "shared" / "data"
TEXTS = ("question", "opa", "opb", "opc", "opd", "exp")
COPIED = ("subject_name", "topic_name", "choice_type")


def random_texts(like: dict, words: dict[str, list[str]], draw: random.Random) -> dict:
    """Random words in each field, as many as in a real row; an empty field stays as it is."""
    texts = {}
    for field in TEXTS:
        count = len(str(like[field]).split())
        texts[field] = like[field]
        if like[field]: texts[field] = " ".join(draw.choices(words[field], k=count))
    return texts


def make_rows(path: Path, n: int, seed: int = 0) -> None:
    """Write n made-up rows; the lengths of each follow a real validation row's."""
    draw, seen = random.Random(seed), set()
    real = [row for _, row in read_file(REAL / "medmcqa_validation.jsonl")]
    words = {f: " ".join(str(row[f]) for row in real if row[f]).split() for f in TEXTS}
    with open(path, "w", encoding="utf-8") as f:
        while len(seen) < n:
            like = draw.choice(real)
            texts = random_texts(like, words, draw)
            question = hash(tuple(texts[field] for field in TEXTS if field != "exp"))
            if question in seen: continue
            seen.add(question)
            labels = {"cop": draw.randint(1, 4), "id": f"{draw.getrandbits(128):032x}"}
            row = texts | {field: like[field] for field in COPIED} | labels
            f.write(json.dumps(row, ensure_ascii=False) + "\n")


def pack(encoded: Encoded) -> int:
    """Pack all examples, eight a row; tokens."""
    torch.manual_seed(0)
    collate = packing_collator()
    loader = DataLoader(encoded.rows, batch_size=8, shuffle=True, collate_fn=collate)
    return sum(batch["input_ids"].numel() for batch in loader)


def measure(path: str, cache: str, target: str) -> dict[str, float]:
    """Seconds by step, and the most resident memory of this process, which does nothing else."""
    recipe = Recipe(data=path, eval_data="sample", target=target)
    tokenizer = load_tokenizer(recipe)
    laps, libraries = Laps(), peak_resident()
    training, _ = load_pair(recipe)
    laps.end("read and check, s")
    encoded = encode_questions(training.questions, tokenizer, recipe, Path(cache))
    laps.end("tokenise, s")
    tokens = pack(encoded)
    laps.end("pack, s")
    assert tokens == encoded.tokens
    return laps.seconds | {
        "all, s": sum(laps.seconds.values()),
        "peak, GB": peak_resident(),
        "of which libraries, GB": libraries,
    }


def peak_resident() -> float:
    """GB (10^9 bytes) of this process, from its program's start.

    Read from VmHWM: getrusage also counts what the parent held.
    """
    lines = Path("/proc/self/status").read_text().splitlines()
    [line] = [x for x in lines if x.startswith("VmHWM")]
    return int(line.split()[1]) * 1024 / 1e9


def measure_in_process(program: str, *words: str) -> dict:
    """What `program --measure WORDS` prints last, from a process of its own."""
    command = [sys.executable, program, "--measure", *words]
    offline = os.environ | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=offline)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("repeats", nargs="?", type=int, default=5)
    parser.add_argument("--rows", type=int, default=182_822)
    parser.add_argument("--target", default="letter")
    parser.add_argument("--measure", nargs=3)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(*args.measure)))
        return
    found = defaultdict(list)
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "rows.jsonl"
        make_rows(rows, args.rows)
        megabytes = round(rows.stat().st_size / 1e6)
        for i in range(args.repeats):
            for name in ("first", "again"):
                one = measure_in_process(__file__, str(rows), f"{folder}/cache{i}", args.target)
                for step, value in one.items(): found[f"{name}: {step}"].append(value)
    cores = len(os.sched_getaffinity(0))
    settings = dict(rows=args.rows, target=args.target, megabytes=megabytes, cores=cores)
    record("data", settings, {name: median_and_range(values) for name, values in found.items()})


if __name__ == "__main__":
    main()
