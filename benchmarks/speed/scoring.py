"""Questions scored a second: `score_questions` beside four full-logit passes a question, as a plain
script does it.

    python benchmarks/speed/scoring.py [RECIPE] [ROWS] [PAIRS] [CHUNK]

ROWS is a data source (default: the shipped validation questions). A pair scores the same CHUNK
questions both ways; predictions must agree. Target: the median ratio at least 3.

    python benchmarks/speed/scoring.py views [RECIPE] [ROWS] [N] [REPEATS]

All views of the first N questions, in alternation: letters, options' texts with the prompt's pass
once for four and with one for each, generation. Both ways of the options must agree: the largest
difference is recorded, in nats a token. Without a GPU, seconds are those of the processor (of all
threads together; take one), since others may use it, too.
"""

import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import torch

from benchmarks.common import alternate, record
from medmcqa_lora.bench.profile import median_and_range
from medmcqa_lora.core.recipe_files import load_recipe
from medmcqa_lora.data.prompts import render_prompt
from medmcqa_lora.data.questions import load_questions
from medmcqa_lora.data.schemas import LETTERS
from medmcqa_lora.evaluation.generation import generate_answers
from medmcqa_lora.evaluation.letters import score_questions
from medmcqa_lora.evaluation.options import score_options
from medmcqa_lora.evaluation.records import EvaluationOutput, read_records
from medmcqa_lora.fast.apply import apply_fast_parts
from medmcqa_lora.model.load import load_model
from medmcqa_lora.model.resolve import load_tokenizer

VIEWS = {  # name -> function that writes records, and their kind
    "letters": (score_questions, "predictions"),
    "options, prompt shared": (partial(score_options, shared=True), "options"),
    "options, prompt repeated": (partial(score_options, shared=False), "options"),
    "generation": (generate_answers, "generations"),
}


def score_view(view: str, model, tokenizer, questions, recipe) -> dict[str, dict]:
    """A view's records, by the question's id."""
    score, kind = VIEWS[view]
    with tempfile.TemporaryDirectory() as folder:
        output = EvaluationOutput(Path(folder), quiet=True)
        score(model, tokenizer, questions, recipe, output)
        return read_records(output.folder, kind)


def batched_predictions(model, tokenizer, questions, recipe) -> dict[str, str]:
    """Ours: one pass a question."""
    records = score_view("letters", model, tokenizer, questions, recipe)
    return {name: found["prediction"] for name, found in records.items()}


@torch.no_grad()
def four_pass_predictions(model, tokenizer, questions, recipe) -> dict[str, str]:
    """One forward pass with all logits for each of the four letters."""

    def logprob(letter, prompt):
        ids = torch.tensor([tokenizer(f"{prompt} {letter}")["input_ids"]], device=model.device)
        logits = model(input_ids=ids, use_cache=False).logits[0].float()
        return logits.log_softmax(-1)[-2, ids[0, -1]].item()

    prompts = {q.id: render_prompt(q, "plain") for q in questions}
    return {i: max(LETTERS, key=partial(logprob, prompt=text)) for i, text in prompts.items()}


WAYS = {"ours": batched_predictions, "four passes": four_pass_predictions}


def load(recipe) -> tuple:
    return apply_fast_parts(load_model(recipe), recipe), load_tokenizer(recipe)


def ratios(taken: dict[str, list[float]], a: str, b: str) -> dict:
    return median_and_range([x / y for x, y in zip(taken[a], taken[b])])


def compare_options(one: dict, other: dict, questions) -> tuple[int, float]:
    """Questions with the same prediction; the largest difference, in nats a token."""
    same = sum(one[q.id]["prediction"] == other[q.id]["prediction"] for q in questions)
    differences = []
    for q in questions:
        a, b = one[q.id], other[q.id]
        differences += [abs(a["logprobs"][c] - b["logprobs"][c]) / a["tokens"][c] for c in LETTERS]
    return same, max(differences)


def compare_views(
    name: str = "demo", rows: str = "sample", n: str = "100", repeats: str = "3"
) -> None:
    recipe = load_recipe(name)
    model, tokenizer = load(recipe)
    model.eval()
    questions = load_questions(rows, "validation", limit=int(n)).questions
    for view in VIEWS: score_view(view, model, tokenizer, questions[:8], recipe)  # warms up
    # on a CPU others may have the cores
    clock = time.perf_counter if torch.cuda.is_available() else time.process_time
    records = {}

    def seconds(view):
        began = clock()
        records[view] = score_view(view, model, tokenizer, questions, recipe)
        return clock() - began

    taken = alternate({v: partial(seconds, v) for v in VIEWS}, int(repeats), warm=False)
    shared, repeated = "options, prompt shared", "options, prompt repeated"
    same, difference = compare_options(records[shared], records[repeated], questions)
    print(
        f"options, both ways: same predictions for {same} of {len(questions)}, "
        f"at most {difference:.1e} nats a token apart"
    )
    settings = dict(
        what="views", recipe=name, rows=Path(rows).name, questions=len(questions),
        threads=torch.get_num_threads(), clock=clock.__name__, same_predictions=same,
        apart=difference,
    )
    rates = {v: [len(questions) / t for t in seconds] for v, seconds in taken.items()}
    results = {f"{v}, questions/s": median_and_range(values) for v, values in rates.items()}
    ratio = ratios(taken, repeated, shared)
    record("scoring", settings, results | {"options, repeated / shared": ratio})


def compare_letters(
    name: str = "demo", rows: str = "sample", pairs: str = "20", chunk: str = "4"
) -> None:
    recipe = load_recipe(name, {"per_device_eval_batch_size": chunk})
    model, tokenizer = load(recipe)
    questions = load_questions(rows, "validation").questions
    size, rounds = int(chunk), int(pairs) + 1
    rates, agreed = {way: [] for way in WAYS}, 0
    for k in range(rounds):
        part = [questions[(k * size + i) % len(questions)] for i in range(size)]
        predictions = []
        for way, score in WAYS.items():
            began = time.perf_counter()
            predictions.append(score(model, tokenizer, part, recipe))
            rate = len(part) / (time.perf_counter() - began)
            if k: rates[way].append(rate)  # the first round warms up
        agreed += predictions[0] == predictions[1]
    print(f"chunks with the same predictions: {agreed} of {rounds}")
    settings = dict(
        recipe=name, rows=Path(rows).name, chunk=size, chunks_agreed=agreed, chunks=rounds
    )
    results = {f"{way}, questions/s": median_and_range(r) for way, r in rates.items()}
    record("scoring", settings, results | {"ratio": ratios(rates, "ours", "four passes")})


if __name__ == "__main__":
    if sys.argv[1:2] == ["views"]: compare_views(*sys.argv[2:])
    else: compare_letters(*sys.argv[1:5])
