"""The loss curve of the same training by this package's fast path and by transformers' and PEFT's
own, beside the noise of seeds.

    python benchmarks/correctness/curve.py                   # the toy, on the shipped sample
    python benchmarks/correctness/curve.py --data rows.jsonl # on other rows
    python benchmarks/correctness/curve.py --dtype bfloat16  # on a GPU

Random weights have little to lose, so the toy Nemotron-H first learns to write the questions of
half of the rows, all of its parameters trained. Then LoRA on every group is trained on the other
rows: with fast = auto; with fast = off in the same order of the rows, from the same adapter; and
with fast = off in other orders, which is what a seed would change anyway. Prints the differences
of the curves (nats a supervised token), the last number being the loss on rows held out. Appends a
line to benchmarks/results/curve.jsonl (or --out FILE).
"""

import argparse
import tempfile
import time
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path

import torch

from benchmarks.common import add_record_options, append_record, circumstances, print_differences
from medmcqa_lora.core.files import read_lines
from medmcqa_lora.core.recipe import Recipe
from medmcqa_lora.data.questions import load_questions, question_hash
from medmcqa_lora.data.tokens import Encoded, encode_questions
from medmcqa_lora.fast.apply import apply_fast_parts
from medmcqa_lora.fast.packing import packing_collator
from medmcqa_lora.model.load import load_model
from medmcqa_lora.model.lora import attach_lora
from medmcqa_lora.model.resolve import load_tokenizer
from medmcqa_lora.training.trainer import make_trainer, run_training
from tests.helpers import GROUPS

WINDOW = 20  # steps of the running mean, which takes out what one batch differs from another


@dataclass
class Rows:
    """What each part of the benchmark learns from, or is measured on."""

    pretraining: Encoded
    training: Encoded
    held_out: Encoded


def split_rows(args, tokenizer, recipe: Recipe) -> Rows:
    """Different questions: half for pre-training, half for LoRA, the last ones held out."""
    loaded = load_questions(args.data, "train", training=True).questions
    different = list({question_hash(q): q for q in loaded}.values())[: args.rows]
    questions, last = different[: -args.held_out], different[-args.held_out :]
    half = len(questions) // 2
    letters = replace(recipe, target="letter")
    return Rows(
        pretraining=encode_questions(questions[:half], tokenizer, letters),
        training=encode_questions(questions[half:], tokenizer, recipe),
        held_out=encode_questions(last, tokenizer, recipe),
    )


def load_for_pretraining(recipe: Recipe):
    """The model in float32 by transformers' code, all of its parameters trainable."""
    exact = replace(recipe, fast="off", dtype="float32")
    return apply_fast_parts(load_model(exact), exact).train().requires_grad_()


def draw_batch(rows: list[dict], size: int, generator: torch.Generator, device) -> dict:
    """A packed row of complete examples, every token supervised."""
    drawn = torch.randint(len(rows), (size,), generator=generator).tolist()
    examples = [dict(input_ids=rows[i]["input_ids"], labels=rows[i]["input_ids"]) for i in drawn]
    batch = packing_collator()(examples)
    return {k: v.to(device) if torch.is_tensor(v) else v for k, v in batch.items()}


def pretrain(recipe: Recipe, rows: list[dict], args, folder: Path) -> list[float]:
    """Losses of training all parameters; leaves model and tokenizer in the folder."""
    model = load_for_pretraining(recipe)
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(recipe.seed)
    rate, steps = args.pretrain_rate, args.pretrain
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.01)
    one_cycle = torch.optim.lr_scheduler.OneCycleLR
    schedule = one_cycle(optimizer, rate, total_steps=steps, pct_start=0.1)
    losses = []
    for _ in range(steps):
        batch = draw_batch(rows, args.batch, generator, device)
        loss = model(**batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    model.save_pretrained(folder)
    load_tokenizer(recipe).save_pretrained(folder)
    return [float(v) for v in losses]


def lora_curve(recipe: Recipe, order: int, tokenizer, rows: Rows, folder: Path) -> dict:
    """Losses of LoRA training, a number a step, and those on the rows held out; the adapter
    starts from the recipe's seed, the order of rows from its own.
    """
    folder.mkdir()
    model = apply_fast_parts(attach_lora(load_model(recipe), recipe), recipe)
    began = time.perf_counter()
    ordered = replace(recipe, seed=order)
    trainer = make_trainer(
        model, tokenizer, rows.training, ordered, folder, rows.held_out, packed=True
    )
    run_training(trainer, folder)
    return dict(
        losses=[m["loss"] for m in read_lines(folder / "metrics.jsonl") if "loss" in m],
        held_out=[e["eval_loss"] for e in read_lines(folder / "evals.jsonl")],
        seconds=round(time.perf_counter() - began, 1),
    )


def curve_differences(a: dict, b: dict) -> dict[str, float]:
    """Differences of two curves: of each step, of running means, and of the last loss on the
    rows held out.
    """
    x, y = (torch.tensor(c["losses"], dtype=torch.float64) for c in (a, b))
    steps = (x - y).abs()
    smooth = (x - y).unfold(0, min(WINDOW, len(x)), 1).mean(-1).abs()
    return {
        "max": float(steps.max()),
        "mean": float(steps.mean()),
        "running mean, max": float(smooth.max()),
        "running mean, mean": float(smooth.mean()),
        "held out": abs(a["held_out"][-1] - b["held_out"][-1]),
    }


def average(found: list[dict[str, float]]) -> dict[str, float]:
    return {k: sum(f[k] for f in found) / len(found) for k in found[0]}


def last_mean(losses: list[float]) -> float:
    return sum(losses[-WINDOW:]) / WINDOW


def lora_recipe(args) -> Recipe:
    return Recipe(
        model=args.model, data=args.data, target=args.target, seed=args.seed,
        lora_r=8, lora_alpha=16, lora_targets=[*GROUPS, "mlp"],
        per_device_train_batch_size=args.batch, learning_rate=args.rate, warmup_steps=10,
        max_steps=args.steps, eval_steps=args.steps, save_steps=args.steps,
    )


def lora_curves(args, recipe: Recipe, tokenizer, rows: Rows, folder: Path) -> dict[str, dict]:
    """Name -> curve: the fast path, the eager one, and the eager one in other orders."""
    runs = {"fast": ("auto", args.seed), "eager": ("off", args.seed)}
    for order in range(args.seed + 1, args.seed + 1 + args.orders):
        runs[f"eager, order {order}"] = ("off", order)
    curves = {}
    for name, (fast, order) in runs.items():
        how = replace(recipe, fast=fast)
        found = curves[name] = lora_curve(how, order, tokenizer, rows, folder / name)
        print(
            f"{name}: loss {found['losses'][0]:.4f} to {last_mean(found['losses']):.4f}, "
            f"held out {found['held_out'][-1]:.4f}, {found['seconds']} s", flush=True,
        )
    return curves


def compare(args, folder: Path) -> dict:
    """Curves and their differences."""
    recipe = lora_recipe(args)
    tokenizer = load_tokenizer(recipe)
    rows = split_rows(args, tokenizer, recipe)
    began = time.perf_counter()
    losses = pretrain(recipe, rows.pretraining.rows, args, folder / "base")
    print(
        f"pre-training: loss {losses[0]:.3f} to {last_mean(losses):.3f} "
        f"in {args.pretrain} steps, {time.perf_counter() - began:.0f} s", flush=True,
    )
    recipe = replace(recipe, model=str(folder / "base"), dtype=args.dtype)
    curves = lora_curves(args, recipe, tokenizer, rows, folder)
    eager = [c for name, c in curves.items() if name != "fast"]
    orders = [curve_differences(a, b) for a, b in combinations(eager, 2)]
    differences = {
        "fast and eager": curve_differences(curves["fast"], curves["eager"]),
        "two orders, eager (mean of pairs)": average(orders),
    }
    counts = {name: len(encoded.rows) for name, encoded in vars(rows).items()}
    return dict(differences=differences, curves=curves, pretraining=losses, rows=counts)


def rounded(value, digits: int = 4):
    """Floats of nested lists and dictionaries, rounded."""
    if isinstance(value, dict): return {k: rounded(v, digits) for k, v in value.items()}
    if isinstance(value, list): return [rounded(v, digits) for v in value]
    if isinstance(value, float): return round(value, digits)
    return value


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--data", default="sample", help="training rows, as a recipe names them")
    add("--model", default="toy-nemotron-h", help="to be pre-trained")
    add("--target", default="letter_and_text", help="what is learned by LoRA")
    of_weights = "of the frozen weights in LoRA training"
    add("--dtype", default="float32", choices=["float32", "bfloat16"], help=of_weights)
    add("--rows", type=int, default=None, help="rows in all; none: all")
    add("--held-out", type=int, default=40, help="rows held out")
    add("--batch", type=int, default=8, help="examples a step")
    add("--pretrain", type=int, default=300, help="steps with all parameters")
    add("--pretrain-rate", type=float, default=3e-3)
    add("--steps", type=int, default=200, help="steps of LoRA training")
    add("--rate", type=float, default=5e-3, help="of LoRA training")
    add("--orders", type=int, default=3, help="other orders of the rows")
    add("--seed", type=int, default=42)
    add_record_options(parser, __file__)
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    with tempfile.TemporaryDirectory() as folder:
        found = compare(args, Path(folder))
    differences = found.pop("differences")
    for name, row in differences.items():
        print_differences(f"{name:<34}", row)
    settings = {k: v for k, v in vars(args).items() if k not in ("commit", "out", "data")}
    settings["data"] = Path(args.data).name
    head = dict(benchmark="curve", **circumstances(args.commit), settings=settings)
    append_record(args.out, head | dict(differences=differences) | rounded(found))


if __name__ == "__main__":
    main()
