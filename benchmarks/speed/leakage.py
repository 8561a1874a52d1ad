"""Recall, precision, seconds and peak memory of `check-data TRAIN --against VALIDATION` on a
training set of MedMCQA's size.

    python benchmarks/speed/leakage.py [REPEATS] [--rows 182822] [--background phrases] [--planted 200]

The training set is made up (seeded) against all 4,183 real validation rows in ../shared/data.
Background `phrases`: the stem of one real training row with the options of another, so that real
turns of phrase collide as often as in real data; `words`: benchmarks/speed/data.py's rows of
random real words. Into it are planted, of different validation rows, copies of each kind: exact
ones (white space changed), normalised ones (case, punctuation, invisible characters, options'
order), near ones (words of the stem replaced, the real similarity from 0.5 up), near-misses
(likewise, from 0.4 up to 0.5), and rows with the same options under another stem. What should be
found as near is not taken from the method: the similarity of all 765 million pairs is computed by
a sparse matrix product. Each measurement runs in a process of its own, on one core. Target: 2
minutes and 4 GB on two cores.
"""

import argparse
import json
import os
import random
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from scipy import sparse

from benchmarks.common import record
from benchmarks.speed.data import REAL, fresh_of, make_rows, peak
from medmcqa_lora.bench.profile import median_and_range
from medmcqa_lora.data.leakage import DROPS, describe_overlaps, find_overlaps
from medmcqa_lora.data.questions import load_questions
from medmcqa_lora.data.similarity import NEAR, jaccard, overlap_key, shingles
from medmcqa_lora.data.sources import read_file

FIELDS = ("question", "opa", "opb", "opc", "opd")
OPTIONS = FIELDS[1:]
VALIDATION = REAL / "medmcqa_validation.jsonl"


def background(path: Path, n: int, kind: str, draw: random.Random) -> list[dict]:
    if kind == "words":
        make_rows(path, n, draw.randint(0, 10**6))
        return [r for _, r in read_file(path)]
    real, pairs = [r for _, r in read_file(REAL / "medmcqa_train_partial.jsonl")], {}
    while len(pairs) < n:
        stem, options = draw.randrange(len(real)), draw.randrange(len(real))
        pairs[stem, options] = {
            "question": real[stem]["question"],
            **{f: real[options][f] for f in OPTIONS},
            "cop": draw.randint(1, 4),
        }
    return list(pairs.values())


def shuffled(row: dict, draw: random.Random) -> dict:
    return dict(zip(OPTIONS, draw.sample([row[f] for f in OPTIONS], 4)))


def like(row: dict) -> set[str]:
    """A row's shingles."""
    from types import SimpleNamespace

    return shingles(
        overlap_key(SimpleNamespace(question=row["question"], options=[row[f] for f in OPTIONS]))
    )


def with_words_changed(
    row: dict, low: float, high: float, words: list[str], draw: random.Random
) -> dict | None:
    """The row with one word after the other of its stem replaced, as soon as its similarity is
    in [low, high).
    """
    stem, own = str(row["question"]).split(), like(row)
    for at in draw.sample(range(len(stem)), len(stem)):
        stem[at] = draw.choice(words)
        changed = row | {"question": " ".join(stem)}
        if (similarity := jaccard(own, like(changed))) < low:
            return None
        if similarity < high:
            return changed
    return None


def plant(rows: list[dict], count: int, draw: random.Random) -> dict[int, str]:
    """Replace rows by copies of validation rows, `count` of each kind; place -> what was planted
    there.
    """
    words = " ".join(r["question"] for r in rows[:5000]).split()
    make = {
        "exact": lambda r: r | {"question": str(r["question"]).replace(" ", "  ", 1)},
        "normalised": lambda r: (
            shuffled(r, draw)
            | {
                "question": "\u200b"
                + draw.choice([str.upper, str.title])(str(r["question"])).replace(" ", ", ", 1)
                + " ?!",
                "cop": 1,
            }
        ),
        "near": lambda r: with_words_changed(r, NEAR, 1.0, words, draw),
        "near, 0.5 to 0.6": lambda r: with_words_changed(r, NEAR, 0.6, words, draw),
        "near-miss": lambda r: with_words_changed(r, 0.4, NEAR, words, draw),
        "options": lambda r: (
            shuffled(r, draw) | {"question": draw.choice(rows)["question"], "cop": 1}
        ),
    }
    sources, places, planted = (
        iter(draw.sample([r for _, r in read_file(VALIDATION)], 4183)),
        draw.sample(range(len(rows)), count * len(make)),
        {},
    )
    for kind, one in make.items():
        done = 0
        while done < count:
            if copy := one(next(sources)):
                at = places.pop()
                rows[at], planted[at], done = {f: copy[f] for f in (*FIELDS, "cop")}, kind, done + 1
    return planted


def near_by_hand(training: list, evaluation: list) -> set[int]:
    """Training rows with a similarity of at least NEAR to any evaluation row, from all pairs."""
    known: dict[str, int] = {}
    held = [shingles(overlap_key(q)) for q in evaluation]
    for s in held:
        for x in s:
            known.setdefault(x, len(known))

    def matrix(sets):
        places = [[known[x] for x in s if x in known] for s in sets]
        ends = np.cumsum([0, *map(len, places)])
        return sparse.csr_matrix(
            (
                np.ones(ends[-1], np.int32),
                np.concatenate([np.array(p, np.int32) for p in places]),
                ends,
            ),
            shape=(len(sets), len(known)),
        )

    columns, sizes, found = matrix(held).T.tocsr(), np.array([*map(len, held)]), set()
    for at in range(0, len(training), 1000):
        sets = [shingles(overlap_key(q)) for q in training[at : at + 1000]]
        both = (matrix(sets) @ columns).tocoo()
        similarity = both.data / (
            np.array([*map(len, sets)])[both.row] + sizes[both.col] - both.data
        )
        found |= {at + int(i) for i in both.row[similarity >= NEAR]}
    return found


def measure(path: str) -> dict:
    """Seconds, peak memory and what was found, in this process."""
    taken, at, cpu, libraries = {}, time.perf_counter(), time.process_time(), peak()

    def lap(name):
        nonlocal at
        taken[name], at = time.perf_counter() - at, time.perf_counter()

    training, evaluation = load_questions(path).questions, load_questions(str(VALIDATION)).questions
    lap("read and check, s")
    found = find_overlaps(training, evaluation)
    describe_overlaps(found, "validation")
    lap("find overlaps, s")
    return {
        "taken": taken
        | {
            "all, s": sum(taken.values()),
            "of which on the processor, s": time.process_time() - cpu,
            "peak, GB": peak(),
            "of which libraries, GB": libraries,
        },
        "found": {i: o.kind for i, o in found.training.items()},
    }


def quality(path: str, planted: dict[int, str], found: dict[int, str]) -> dict[str, float]:
    """Recall of what was planted, by kind; recall and precision of near against all pairs."""
    results = {}
    for kind in dict.fromkeys(planted.values()):
        places = [i for i, k in planted.items() if k == kind]
        if kind == "near-miss":
            results["planted near-misses taken for near or closer, share"] = sum(
                found.get(i) in DROPS["near"] for i in places
            ) / len(places)
        else:
            results[f"planted {kind}, found, share"] = sum(
                found.get(i) in (kind.split(",")[0], *(["near"] * (kind == "options")))
                for i in places
            ) / len(places)
    truth = near_by_hand(load_questions(path).questions, load_questions(str(VALIDATION)).questions)
    near = {i for i, kind in found.items() if kind in DROPS["near"]}
    return results | {
        "rows with similarity of 0.5 or more, all pairs": len(truth),
        "of these found (recall)": len(near & truth) / len(truth),
        "of found, these (precision)": len(near & truth) / len(near),
        "rows that share their options alone": sum(kind == "options" for kind in found.values()),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("repeats", nargs="?", type=int, default=3)
    parser.add_argument("--rows", type=int, default=182_822)
    parser.add_argument("--background", choices=("phrases", "words"), default="phrases")
    parser.add_argument("--planted", type=int, default=200)
    parser.add_argument("--measure")
    asked = parser.parse_args()
    if asked.measure:
        print(json.dumps(measure(asked.measure)))
        sys.exit()
    with tempfile.TemporaryDirectory() as folder:
        draw, path, times = random.Random(0), Path(folder) / "rows.jsonl", {}
        rows = background(path, asked.rows, asked.background, draw)
        planted = plant(rows, asked.planted, draw)
        path.write_text(
            "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), encoding="utf-8"
        )
        load = os.getloadavg()[0]
        for _ in range(asked.repeats):
            one = fresh_of(__file__, str(path))
            for name, value in one["taken"].items():
                times.setdefault(name, []).append(value)
        found = {int(i): kind for i, kind in one["found"].items()}
        results = {name: median_and_range(values) for name, values in times.items()} | {
            name: median_and_range([value])
            for name, value in quality(str(path), planted, found).items()
        }
        settings = dict(
            rows=asked.rows,
            evaluation_rows=4183,
            background=asked.background,
            planted_of_each_kind=asked.planted,
            cores=len(os.sched_getaffinity(0)),
            load_before=round(load, 1),
            note="one process on one core; the two cores were shared with other jobs",
        )
        record("leakage", settings, results)
