"""Questions scored a second: `score_questions` beside four full-logit passes a question, as a plain
script does it.

    .venv/bin/python benchmarks/speed/scoring.py [RECIPE] [ROWS] [PAIRS] [CHUNK]

ROWS is a data source (default: the shipped validation questions). A pair scores the same CHUNK
questions both ways; predictions must agree. Target: the median ratio at least 3.

    .venv/bin/python benchmarks/speed/scoring.py views [RECIPE] [ROWS] [N] [REPEATS]

All views of the first N questions, in alternation: letters, options' texts with the prompt's pass
once for four and with one for each, generation. Both ways of the options must agree: the largest
difference is recorded, in nats a token. Without a GPU, seconds are those of the processor (of all
threads together; take one), since others may use it, too.
"""

import sys
import tempfile
import time
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
from medmcqa_lora.evaluation.records import read_records
from medmcqa_lora.fast.apply import apply_fast_parts
from medmcqa_lora.model.load import load_model
from medmcqa_lora.model.resolve import load_tokenizer


def ours(model, tokenizer, questions, recipe) -> dict[str, str]:
    with tempfile.TemporaryDirectory() as folder:
        score_questions(model, tokenizer, questions, recipe, EvaluationOutput(Path(folder), quiet=True))
        return {k: p["prediction"] for k, p in read_records(Path(folder)).items()}


@torch.no_grad()
def plain(model, tokenizer, questions, recipe) -> dict[str, str]:
    """One forward pass with all logits for each of the four letters."""

    def logprob(prompt, letter):
        ids = torch.tensor([tokenizer(f"{prompt} {letter}")["input_ids"]], device=model.device)
        return (
            model(input_ids=ids, use_cache=False)
            .logits[0]
            .float()
            .log_softmax(-1)[-2, ids[0, -1]]
            .item()
        )

    return {
        q.id: max(LETTERS, key=lambda c: logprob(render_prompt(q, "plain"), c)) for q in questions
    }


def views(name: str = "demo", rows: str = "sample", n: str = "100", repeats: str = "3") -> None:
    recipe = load_recipe(name)
    tokenizer, model = load_tokenizer(recipe), apply_fast_parts(load_model(recipe), recipe).eval()
    questions, said = load_questions(rows, "validation", limit=int(n)).questions, {}

    def run(view, score, questions, **how):
        with tempfile.TemporaryDirectory() as folder:
            score(model, tokenizer, questions, recipe, Path(folder), quiet=True, **how)
            said[view] = read_records(
                Path(folder),
                {score_questions: "predictions", score_options: "options"}.get(
                    score, "generations"
                ),
            )

    ways = {
        "letters": (score_questions, {}),
        "options, prompt shared": (score_options, {"shared": True}),
        "options, prompt repeated": (score_options, {"shared": False}),
        "generation": (generate_answers, {}),
    }
    for view, (score, how) in ways.items():
        run(view, score, questions[:8], **how)  # warms up
    clock = (
        time.perf_counter if torch.cuda.is_available() else time.process_time
    )  # on a CPU others may have the cores

    def seconds(view, score, how):
        began = clock()
        run(view, score, questions, **how)
        return clock() - began

    taken = alternate(
        {v: lambda v=v, s=s, h=h: seconds(v, s, h) for v, (s, h) in ways.items()},
        int(repeats),
        warm=False,
    )
    one, other = said["options, prompt shared"], said["options, prompt repeated"]
    apart = max(
        abs(one[q.id]["logprobs"][c] - other[q.id]["logprobs"][c]) / one[q.id]["tokens"][c]
        for q in questions
        for c in LETTERS
    )
    same = sum(one[q.id]["prediction"] == other[q.id]["prediction"] for q in questions)
    print(
        f"options, both ways: same predictions for {same} of {len(questions)}, at most {apart:.1e} nats a token apart"
    )
    rates = {
        f"{v}, questions/s": median_and_range([len(questions) / t for t in ts])
        for v, ts in taken.items()
    }
    ratio = median_and_range(
        [a / b for a, b in zip(taken["options, prompt repeated"], taken["options, prompt shared"])]
    )
    record(
        "scoring",
        dict(
            what="views",
            recipe=name,
            rows=Path(rows).name,
            questions=len(questions),
            threads=torch.get_num_threads(),
            clock=clock.__name__,
            same_predictions=same,
            apart=apart,
        ),
        rates | {"options, repeated / shared": ratio},
    )


if __name__ == "__main__":
    if sys.argv[1:2] == ["views"]:
        views(*sys.argv[2:])
        sys.exit()
    name, rows, pairs, chunk = [*sys.argv[1:5], *["demo", "sample", "20", "4"][len(sys.argv) - 1 :]]
    recipe = load_recipe(name, {"per_device_eval_batch_size": chunk})
    tokenizer, model = load_tokenizer(recipe), apply_fast_parts(load_model(recipe), recipe)
    questions = load_questions(rows, "validation").questions
    rates, agreed = {"ours": [], "four passes": []}, 0
    for k in range(int(pairs) + 1):
        part = [questions[(k * int(chunk) + i) % len(questions)] for i in range(int(chunk))]
        said = {}
        for way, score in (("ours", ours), ("four passes", plain)):
            began = time.perf_counter()
            said[way] = score(model, tokenizer, part, recipe)
            rates[way] += (
                [len(part) / (time.perf_counter() - began)] if k else []
            )  # the first round warms up
        agreed += said["ours"] == said["four passes"]
    ratios = [a / b for a, b in zip(rates["ours"], rates["four passes"])]
    print(f"chunks with the same predictions: {agreed} of {int(pairs) + 1}")
    record(
        "scoring",
        dict(
            recipe=name,
            rows=Path(rows).name,
            chunk=int(chunk),
            chunks_agreed=agreed,
            chunks=int(pairs) + 1,
        ),
        {
            **{f"{k}, questions/s": median_and_range(t) for k, t in rates.items()},
            "ratio": median_and_range(ratios),
        },
    )
