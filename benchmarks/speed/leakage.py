"""Recall, precision, seconds and peak memory of `check-data TRAIN --against VALIDATION` on a
training set of MedMCQA's size.

    python benchmarks/speed/leakage.py [REPEATS] [--rows 182822]
        [--background phrases] [--planted 200]

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
import tempfile
import time
from collections import defaultdict
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from scipy import sparse

from benchmarks.common import Laps, record
from benchmarks.speed.data import REAL, make_rows, measure_in_process, peak_resident
from medmcqa_lora.bench.profile import median_and_range
from medmcqa_lora.data.leakage import DROPS, describe_overlaps, find_overlaps
from medmcqa_lora.data.questions import load_questions
from medmcqa_lora.data.similarity import NEAR, jaccard, overlap_key, shingles
from medmcqa_lora.data.sources import read_file

FIELDS = ("question", "opa", "opb", "opc", "opd")
OPTIONS = FIELDS[1:]
VALIDATION = REAL / "medmcqa_validation.jsonl"
VALIDATION_ROWS = 4183
BLOCK = 1000  # training rows that are compared at once
Row = dict[str, object]


# The training set.


def background(path: Path, n: int, kind: str, draw: random.Random) -> list[Row]:
    """Rows that copies are planted among."""
    if kind == "words":
        make_rows(path, n, draw.randint(0, 10**6))
        return [row for _, row in read_file(path)]
    real = [row for _, row in read_file(REAL / "medmcqa_train_partial.jsonl")]
    pairs = {}
    while len(pairs) < n:
        stem, options = draw.randrange(len(real)), draw.randrange(len(real))
        texts = {f: real[options][f] for f in OPTIONS}
        pairs[stem, options] = {
            "question": real[stem]["question"], **texts, "cop": draw.randint(1, 4),
        }
    return list(pairs.values())


def row_shingles(row: Row) -> set[str]:
    options = [row[f] for f in OPTIONS]
    return shingles(overlap_key(SimpleNamespace(question=row["question"], options=options)))


def exact_copy(row: Row) -> Row:
    """The row with more white space."""
    return row | {"question": str(row["question"]).replace(" ", "  ", 1)}


def shuffle_options(row: Row, draw: random.Random) -> Row:
    """The row's options in another order, without its question; "A" is the answer."""
    options = draw.sample([row[f] for f in OPTIONS], 4)
    return dict(zip(OPTIONS, options)) | {"cop": 1}


def normalised_copy(row: Row, draw: random.Random) -> Row:
    """The row in other case, with more punctuation, an invisible character, options shuffled."""
    copy = shuffle_options(row, draw)
    change_case = draw.choice([str.upper, str.title])
    words = change_case(str(row["question"])).replace(" ", ", ", 1)
    return copy | {"question": f"\u200b{words} ?!"}


def same_options(row: Row, draw: random.Random, rows: list[Row]) -> Row:
    """The row's options under the question of another."""
    copy = shuffle_options(row, draw)
    return copy | {"question": draw.choice(rows)["question"]}


def similar_copy(
    row: Row, draw: random.Random, words: list[str], low: float, high: float
) -> Row | None:
    """The row with one word after the other of its stem replaced, as soon as its similarity is
    in [low, high).
    """
    stem, own = str(row["question"]).split(), row_shingles(row)
    for at in draw.sample(range(len(stem)), len(stem)):
        stem[at] = draw.choice(words)
        changed = row | {"question": " ".join(stem)}
        similarity = jaccard(own, row_shingles(changed))
        if similarity < low: return None
        if similarity < high: return changed
    return None


def plant(rows: list[Row], count: int, draw: random.Random) -> dict[int, str]:
    """Replace rows by copies of validation rows, `count` of each kind; place -> what was planted
    there.
    """
    words = " ".join(r["question"] for r in rows[:5000]).split()
    similar = partial(similar_copy, draw=draw, words=words)
    make = {
        "exact": exact_copy,
        "normalised": partial(normalised_copy, draw=draw),
        "near": partial(similar, low=NEAR, high=1.0),
        "near, 0.5 to 0.6": partial(similar, low=NEAR, high=0.6),
        "near-miss": partial(similar, low=0.4, high=NEAR),
        "options": partial(same_options, draw=draw, rows=rows),
    }
    sources = iter(draw.sample([row for _, row in read_file(VALIDATION)], VALIDATION_ROWS))
    places = draw.sample(range(len(rows)), count * len(make))
    planted = {}
    for kind, make_copy in make.items():
        for _ in range(count):
            copy = None
            while copy is None: copy = make_copy(next(sources))
            place = places.pop()
            rows[place] = {f: copy[f] for f in (*FIELDS, "cop")}
            planted[place] = kind
    return planted


# What should be found.


def membership(sets: list[set[str]], columns: dict[str, int]) -> sparse.csr_matrix:
    """(sets, columns): 1 where a set has a column's shingle."""
    places = [[columns[x] for x in s if x in columns] for s in sets]
    ends = np.cumsum([0, *map(len, places)])
    indices = np.concatenate([np.array(p, np.int32) for p in places])
    ones = np.ones(ends[-1], np.int32)
    return sparse.csr_matrix((ones, indices, ends), shape=(len(sets), len(columns)))


def compare_all_pairs(training: list, evaluation: list) -> set[int]:
    """Training rows with a similarity of at least NEAR to any evaluation row, from all pairs."""
    held = [shingles(overlap_key(q)) for q in evaluation]
    columns = {x: i for i, x in enumerate(dict.fromkeys(x for s in held for x in s))}
    evaluation_matrix = membership(held, columns).T.tocsr()
    evaluation_sizes = np.array([len(s) for s in held])
    found = set()
    for start in range(0, len(training), BLOCK):
        sets = [shingles(overlap_key(q)) for q in training[start : start + BLOCK]]
        sizes = np.array([len(s) for s in sets])
        both = (membership(sets, columns) @ evaluation_matrix).tocoo()
        union = sizes[both.row] + evaluation_sizes[both.col] - both.data
        near = both.row[both.data / union >= NEAR]
        found |= {start + int(i) for i in near}
    return found


def share_found(kind: str, planted: dict[int, str], found: dict[int, str]) -> tuple[str, float]:
    """Of the copies of a kind: what is counted, and the share of them."""
    if kind == "near-miss":
        what, accepted = "planted near-misses taken for near or closer, share", DROPS["near"]
    else:
        what, accepted = f"planted {kind}, found, share", [kind.split(",")[0]]
        if kind == "options": accepted.append("near")
    places = [i for i, k in planted.items() if k == kind]
    return what, sum(found.get(i) in accepted for i in places) / len(places)


def quality(path: str, planted: dict[int, str], found: dict[int, str]) -> dict[str, float]:
    """Recall of what was planted, by kind; recall and precision of near against all pairs."""
    shares = dict(share_found(kind, planted, found) for kind in dict.fromkeys(planted.values()))
    training, evaluation = load_questions(path), load_questions(str(VALIDATION))
    truth = compare_all_pairs(training.questions, evaluation.questions)
    near = {i for i, kind in found.items() if kind in DROPS["near"]}
    return shares | {
        "rows with similarity of 0.5 or more, all pairs": len(truth),
        "of these found (recall)": len(near & truth) / len(truth),
        "of found, these (precision)": len(near & truth) / len(near),
        "rows that share their options alone": sum(kind == "options" for kind in found.values()),
    }


# What is measured.


def measure(path: str) -> dict:
    """Seconds, peak memory and what was found, in this process."""
    laps, libraries = Laps(), peak_resident()
    processor = time.process_time()
    training, evaluation = load_questions(path).questions, load_questions(str(VALIDATION)).questions
    laps.end("read and check, s")
    found = find_overlaps(training, evaluation)
    describe_overlaps(found, "validation")
    laps.end("find overlaps, s")
    taken = laps.seconds | {
        "all, s": sum(laps.seconds.values()),
        "of which on the processor, s": time.process_time() - processor,
        "peak, GB": peak_resident(),
        "of which libraries, GB": libraries,
    }
    return dict(taken=taken, found={i: o.kind for i, o in found.training.items()})


def compare(args, folder: Path) -> tuple[dict, dict]:
    """Settings, and results with their ranges."""
    draw, path = random.Random(0), folder / "rows.jsonl"
    rows = background(path, args.rows, args.background, draw)
    planted = plant(rows, args.planted, draw)
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    path.write_text("".join(lines), encoding="utf-8")
    settings = dict(
        rows=args.rows, evaluation_rows=VALIDATION_ROWS, background=args.background,
        planted_of_each_kind=args.planted, cores=len(os.sched_getaffinity(0)),
        load_before=round(os.getloadavg()[0], 1),
        note="one process on one core; the two cores were shared with other jobs",
    )
    figures = defaultdict(list)
    for _ in range(args.repeats):
        one = measure_in_process(__file__, str(path))
        for name, value in one["taken"].items(): figures[name].append(value)
    found = {int(i): kind for i, kind in one["found"].items()}
    for name, value in quality(str(path), planted, found).items(): figures[name].append(value)
    return settings, {name: median_and_range(values) for name, values in figures.items()}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("repeats", nargs="?", type=int, default=3)
    parser.add_argument("--rows", type=int, default=182_822)
    parser.add_argument("--background", choices=("phrases", "words"), default="phrases")
    parser.add_argument("--planted", type=int, default=200)
    parser.add_argument("--measure")
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(args.measure)))
        return
    with tempfile.TemporaryDirectory() as folder:
        settings, results = compare(args, Path(folder))
    record("leakage", settings, results)


if __name__ == "__main__":
    main()
