"""Questions scored a second: `score_questions` beside four full-logit passes a question, as a plain script does it.

    .venv/bin/python benchmarks/scoring.py [RECIPE] [ROWS] [PAIRS] [CHUNK]

ROWS is a data source (default: the shipped validation questions). A pair scores the same CHUNK questions both ways;
predictions must agree. Target: the median ratio at least 3.
"""
import sys
import tempfile
import time
from pathlib import Path

import torch
from common import record, spread

from medmcqa_lora.data import LETTERS, load_questions, render_prompt
from medmcqa_lora.evaluation import read_records, score_questions
from medmcqa_lora.model import load_model, load_tokenizer
from medmcqa_lora.recipe import load_recipe


def ours(model, tokenizer, questions, recipe) -> dict[str, str]:
    with tempfile.TemporaryDirectory() as folder:
        score_questions(model, tokenizer, questions, recipe, Path(folder), quiet=True)
        return {k: p["prediction"] for k, p in read_records(Path(folder)).items()}


@torch.no_grad()
def plain(model, tokenizer, questions, recipe) -> dict[str, str]:
    """One forward pass with all logits for each of the four letters."""
    def logprob(prompt, letter):
        ids = torch.tensor([tokenizer(f"{prompt} {letter}")["input_ids"]], device=model.device)
        return model(input_ids=ids, use_cache=False).logits[0].float().log_softmax(-1)[-2, ids[0, -1]].item()
    return {q.id: max(LETTERS, key=lambda c: logprob(render_prompt(q, "plain"), c)) for q in questions}


if __name__ == "__main__":
    name, rows, pairs, chunk = [*sys.argv[1:5], *["demo", "sample", "20", "4"][len(sys.argv) - 1:]]
    recipe = load_recipe(name, {"per_device_eval_batch_size": chunk})
    tokenizer, model = load_tokenizer(recipe), load_model(recipe)
    questions = load_questions(rows, "validation").questions
    rates, agreed = {"ours": [], "four passes": []}, 0
    for k in range(int(pairs) + 1):
        part = [questions[(k * int(chunk) + i) % len(questions)] for i in range(int(chunk))]
        said = {}
        for way, score in (("ours", ours), ("four passes", plain)):
            began = time.perf_counter()
            said[way] = score(model, tokenizer, part, recipe)
            rates[way] += [len(part) / (time.perf_counter() - began)] if k else []  # the first round warms up
        agreed += said["ours"] == said["four passes"]
    ratios = [a / b for a, b in zip(rates["ours"], rates["four passes"])]
    print(f"chunks with the same predictions: {agreed} of {int(pairs) + 1}")
    record("scoring", dict(recipe=name, rows=Path(rows).name, chunk=int(chunk), chunks_agreed=agreed, chunks=int(pairs) + 1),
           {**{f"{k}, questions/s": spread(t) for k, t in rates.items()}, "ratio": spread(ratios)})
