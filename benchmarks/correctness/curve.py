"""The loss curve of the same training by this package's fast path and by transformers' and PEFT's
own, beside the noise of seeds.

    python benchmarks/correctness/curve.py                                   # the toy Nemotron-H on the shipped sample
    python benchmarks/correctness/curve.py --data ../shared/data/medmcqa_train_partial.jsonl
    python benchmarks/correctness/curve.py --dtype bfloat16                  # on a GPU

Random weights have little to lose, so the toy first learns to write the questions of half of the
rows, all of its parameters trained. Then LoRA on every group is trained on the other rows: with
fast = auto; with fast = off in the same order of the rows, from the same adapter; and with fast =
off in other orders, which is what a seed would change anyway. Prints the differences of the
curves (nats a supervised token), the last number being the loss on rows held out. Appends a line
to benchmarks/results/curve.jsonl (or --out FILE).
"""

import argparse
import tempfile
import time
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import torch

from benchmarks.common import results_file
from benchmarks.correctness.isolation import GROUPS
from medmcqa_lora.core.environment import git_commit, hardware, versions
from medmcqa_lora.core.files import append_line, read_lines
from medmcqa_lora.core.recipe import Recipe
from medmcqa_lora.data.questions import question_hash, load_questions
from medmcqa_lora.data.tokens import encode_questions
from medmcqa_lora.fast.apply import apply_fast_parts
from medmcqa_lora.fast.packing import packing_collator
from medmcqa_lora.model.load import load_model
from medmcqa_lora.model.lora import attach_lora
from medmcqa_lora.model.resolve import load_tokenizer
from medmcqa_lora.training.trainer import make_trainer, run_training

WINDOW = 20  # steps of the running mean, which takes out what one batch differs from another


def pretrain(
    recipe: Recipe, rows: list[dict], steps: int, size: int, rate: float, folder: Path
) -> list[float]:
    """Losses of training all parameters on whole rows, in float32; leaves model and tokenizer in
    the folder.
    """
    model, collate = (
        apply_fast_parts(
            load_model(replace(recipe, fast="off", dtype="float32")),
            replace(recipe, fast="off", dtype="float32"),
        ).train(),
        packing_collator(),
    )
    for p in model.parameters():
        p.requires_grad_()
    device, generator = next(model.parameters()).device, torch.Generator().manual_seed(recipe.seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, rate, total_steps=steps, pct_start=0.1
    )
    losses = []
    for _ in range(steps):
        chosen = [
            rows[i]["input_ids"]
            for i in torch.randint(len(rows), (size,), generator=generator).tolist()
        ]
        batch = collate([dict(input_ids=ids, labels=ids) for ids in chosen])
        loss = model(
            **{k: v.to(device) if torch.is_tensor(v) else v for k, v in batch.items()},
            use_cache=False,
        ).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    model.save_pretrained(folder)
    load_tokenizer(recipe).save_pretrained(folder)
    return [float(v) for v in losses]


def curve(recipe: Recipe, order: int, tokenizer, encoded, held_out, folder: Path) -> dict:
    """Losses of LoRA training, a number a step, and those on the rows held out; the adapter
    starts from the recipe's seed, the order of rows from its own.
    """
    folder.mkdir()
    model, began = (
        apply_fast_parts(attach_lora(load_model(recipe), recipe), recipe),
        time.perf_counter(),
    )
    run_training(
        make_trainer(
            model, tokenizer, encoded, replace(recipe, seed=order), folder, held_out, packed=True
        ),
        folder,
    )
    return dict(
        losses=[m["loss"] for m in read_lines(folder / "metrics.jsonl") if "loss" in m],
        held_out=[e["eval_loss"] for e in read_lines(folder / "evals.jsonl")],
        seconds=round(time.perf_counter() - began, 1),
    )


def apart(a: dict, b: dict) -> dict[str, float]:
    """Differences of two curves: of each step, of running means, and of the last loss on the
    rows held out.
    """
    x, y = (torch.tensor(c["losses"], dtype=torch.float64) for c in (a, b))
    smooth = (x - y).unfold(0, min(WINDOW, len(x)), 1).mean(-1).abs()
    return {
        "max": float((x - y).abs().max()),
        "mean": float((x - y).abs().mean()),
        "running mean, max": float(smooth.max()),
        "running mean, mean": float(smooth.mean()),
        "held out": abs(a["held_out"][-1] - b["held_out"][-1]),
    }


def average(found: list[dict[str, float]]) -> dict[str, float]:
    return {k: sum(f[k] for f in found) / len(found) for k in found[0]}


def compare(args, folder: Path) -> dict:
    """Curves and their differences."""
    recipe = Recipe(
        model=args.model,
        data=args.data,
        target=args.target,
        lora_r=8,
        lora_alpha=16,
        lora_targets=[*GROUPS, "mlp"],
        per_device_train_batch_size=args.batch,
        learning_rate=args.rate,
        warmup_steps=10,
        max_steps=args.steps,
        eval_steps=args.steps,
        save_steps=args.steps,
        seed=args.seed,
    )
    questions = list(
        {
            question_hash(q): q for q in load_questions(args.data, "train", training=True).questions
        }.values()
    )[: args.rows]
    questions, last = questions[: -args.held_out], questions[-args.held_out :]
    half, tokenizer = len(questions) // 2, load_tokenizer(recipe)
    before = encode_questions(questions[:half], tokenizer, replace(recipe, target="letter"))
    encoded, held_out = (
        encode_questions(rows, tokenizer, recipe) for rows in (questions[half:], last)
    )
    began = time.perf_counter()
    pretraining = pretrain(
        recipe, before.rows, args.pretrain, args.batch, args.pretrain_rate, folder / "base"
    )
    print(
        f"pre-training: loss {pretraining[0]:.3f} to {sum(pretraining[-WINDOW:]) / WINDOW:.3f} in {args.pretrain} steps, {time.perf_counter() - began:.0f} s",
        flush=True,
    )
    recipe, curves = replace(recipe, model=str(folder / "base"), dtype=args.dtype), {}
    ways = {"fast": ("auto", args.seed), "eager": ("off", args.seed)} | {
        f"eager, order {s}": ("off", s) for s in range(args.seed + 1, args.seed + 1 + args.orders)
    }
    for name, (fast, order) in ways.items():
        curves[name] = curve(
            replace(recipe, fast=fast), order, tokenizer, encoded, held_out, folder / name
        )
        print(
            f"{name}: loss {curves[name]['losses'][0]:.4f} to {sum(curves[name]['losses'][-WINDOW:]) / WINDOW:.4f}, held out {curves[name]['held_out'][-1]:.4f}, {curves[name]['seconds']} s",
            flush=True,
        )
    eager = [c for n, c in curves.items() if n != "fast"]
    differences = {
        "fast and eager": apart(curves["fast"], curves["eager"]),
        "two orders, eager (mean of pairs)": average(
            [apart(a, b) for a, b in combinations(eager, 2)]
        ),
    }
    return dict(
        differences=differences,
        curves=curves,
        pretraining=pretraining,
        rows=dict(
            pretraining=len(before.rows), training=len(encoded.rows), held_out=len(held_out.rows)
        ),
    )


def rounded(value, digits: int = 4):
    """Floats of nested lists and dictionaries, rounded."""
    if isinstance(value, dict):
        return {k: rounded(v, digits) for k, v in value.items()}
    return (
        [rounded(v, digits) for v in value]
        if isinstance(value, list)
        else round(value, digits)
        if isinstance(value, float)
        else value
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="sample", help="training rows, as a recipe names them")
    parser.add_argument("--model", default="toy-nemotron-h", help="to be pre-trained")
    parser.add_argument("--target", default="letter_and_text", help="what is learned by LoRA")
    parser.add_argument(
        "--dtype",
        default="float32",
        choices=["float32", "bfloat16"],
        help="of the frozen weights in LoRA training",
    )
    parser.add_argument("--rows", type=int, default=None, help="rows in all; none: all")
    parser.add_argument("--held-out", type=int, default=40, help="rows held out")
    parser.add_argument("--batch", type=int, default=8, help="examples a step")
    parser.add_argument("--pretrain", type=int, default=300, help="steps with all parameters")
    parser.add_argument("--pretrain-rate", type=float, default=3e-3)
    parser.add_argument("--steps", type=int, default=200, help="steps of LoRA training")
    parser.add_argument("--rate", type=float, default=5e-3, help="of LoRA training")
    parser.add_argument("--orders", type=int, default=3, help="other orders of the rows")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--commit", default="", help="where the checkout's git can't tell")
    parser.add_argument("--out", default=str(results_file(__file__)))
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = compare(args, Path(folder))
    for name, row in found["differences"].items():
        print(f"{name:<34} " + "  ".join(f"{what} {value:.2e}" for what, value in row.items()))
    settings = {k: v for k, v in vars(args).items() if k not in ("commit", "out", "data")} | dict(
        data=Path(args.data).name
    )
    append_line(
        Path(args.out),
        dict(
            benchmark="curve",
            commit=args.commit or git_commit(),
            date=time.strftime("%Y-%m-%d"),
            hardware=hardware(),
            versions=versions(),
            settings=settings,
            differences=found["differences"],
            **rounded({k: v for k, v in found.items() if k != "differences"}),
        ),
    )
