"""What an example's logits and LoRA gradients owe to its neighbours: alone, padded in a batch,
packed in a row.

    python benchmarks/correctness/isolation.py                     # the toy, float32, on this machine's device
    python benchmarks/correctness/isolation.py --blocks MEM*E      # blocks of full size instead (a GPU)
    python benchmarks/correctness/isolation.py --dtype bfloat16

Every LoRA target group is attached and given random values. The model is in training mode, so on
a GPU with the kernels the fused path runs; scoring, in evaluation mode, is in the last two lines.
Differences are the norm of the difference over the norm of what the example gives alone;
"leaking" is the same without anything that keeps examples apart, to show that the measure would
see it. Appends a line to benchmarks/results/isolation.jsonl (or --out FILE).
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import torch
from torch import nn

from benchmarks.common import results_file
from medmcqa_lora.core.environment import git_commit, hardware, versions
from medmcqa_lora.core.files import shipped_file
from medmcqa_lora.core.recipe import Recipe
from medmcqa_lora.evaluation.letters import letter_logprobs, pad_right
from medmcqa_lora.fast.apply import apply_fast_parts, describe_kernels
from medmcqa_lora.fast.packing import packing_collator
from medmcqa_lora.model.load import load_model
from medmcqa_lora.model.lora import attach_lora
from medmcqa_lora.model.resolve import TOY

GROUPS = ["attention", "mamba_in", "shared_experts", "routed_experts"]


def adapted(recipe: Recipe):
    """The recipe's model in training mode, with random values in B and in the convolutions'
    biases.
    """
    model = apply_fast_parts(attach_lora(load_model(recipe), recipe), recipe).train()
    torch.manual_seed(1)
    for name, p in model.named_parameters():
        if "lora_B" in name or name.endswith("conv1d.bias"):
            nn.init.normal_(p.data, std=0.05 if "lora_B" in name else 0.5)
    return model


def lengths(chunk: int) -> list[int]:
    """Of examples: one token, a chunk and its neighbours, more than two chunks."""
    return [chunk + 5, 1, chunk - 1, chunk, chunk + 1, 2 * chunk + 9, 3]


def batches(rows: list[list[int]], device) -> dict[str, list[dict]]:
    """The same examples alone, padded and packed."""
    ids, mask = pad_right(rows, 0)
    packed = packing_collator()([{"input_ids": r, "labels": r} for r in rows])
    ways = {
        "alone": [{"input_ids": torch.tensor([r])} for r in rows],
        "padded": [{"input_ids": ids, "attention_mask": mask}],
        "packed": [{k: v for k, v in packed.items() if k != "labels"}],
        "leaking": [{"input_ids": packed["input_ids"]}],
    }
    return {
        name: [{k: v.to(device) if torch.is_tensor(v) else v for k, v in b.items()} for b in found]
        for name, found in ways.items()
    }


def run(model, found: list[dict]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Logits of all tokens in order (T, vocabulary), and the LoRA gradients of one loss on all
    of them.
    """
    model.zero_grad(set_to_none=True)
    logits = []
    for batch in found:
        y = model(**batch, use_cache=False).logits.float()
        logits.append(y[batch["attention_mask"].bool()] if "attention_mask" in batch else y[0])
        logits[-1].sin().sum().backward()  # any function of each token by itself
    return torch.cat([y.detach() for y in logits]), {
        n: p.grad.float().clone() for n, p in model.named_parameters() if p.grad is not None
    }


def apart(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


def isolation(recipe: Recipe, chunk: int, vocabulary: int) -> dict[str, dict[str, float]]:
    """Way -> relative difference to the example alone: of logits, of the worst matrix' gradient,
    of scores.
    """
    model = adapted(recipe)
    device, generator = next(model.parameters()).device, torch.Generator().manual_seed(recipe.seed)
    rows = [
        torch.randint(3, vocabulary, (n,), generator=generator).tolist() for n in lengths(chunk)
    ]
    found = {name: run(model, b) for name, b in batches(rows, device).items()}
    logits, gradients = found.pop("alone")
    result = {
        name: dict(
            logits=apart(y, logits), gradients=max(apart(g[n], gradients[n]) for n in gradients)
        )
        for name, (y, g) in found.items()
    }
    model.eval()
    together, single = (
        letter_logprobs(model, rows, (3, 4, 5, 6), 0),
        torch.cat([letter_logprobs(model, [r], (3, 4, 5, 6), 0) for r in rows]),
    )
    result["scoring, padded"] = dict(letters=float((together - single).abs().max()))  # nats
    result["scoring, packed"] = dict(
        letters=float(
            (letter_logprobs(model, rows, (3, 4, 5, 6), 0, packed=True) - single).abs().max()
        )
    )
    kernels = describe_kernels(model, recipe, (True, "asked for")).splitlines()
    return dict(differences=result, kernels=kernels, matrices=len(gradients))


def make_recipe(blocks: str, dtype: str, folder: Path, seed: int = 0) -> tuple[Recipe, dict]:
    """A recipe for blocks of full size, or for the toy, and its configuration."""
    config = (
        json.loads(shipped_file("assets/nemotron_nano_config.json").read_text())
        | {"hybrid_override_pattern": blocks}
        if blocks
        else dict(TOY, model_type="nemotron_h")
    )
    (folder / "config.json").write_text(json.dumps(config))
    model = dict(model=str(folder), weights="random") if blocks else dict(model="toy-nemotron-h")
    return Recipe(
        **model,
        dtype=dtype,
        seed=seed,
        lora_r=8,
        lora_targets=GROUPS if blocks else [*GROUPS, "mlp"],
    ), config


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--blocks", default="", help="pattern of full-size blocks, such as MEM*E; none: the toy"
    )
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--commit", default="", help="where the checkout's git can't tell")
    parser.add_argument("--out", default=str(results_file(__file__)))
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        recipe, config = make_recipe(args.blocks, args.dtype, Path(folder))
        found = isolation(recipe, config["chunk_size"], config["vocab_size"])
    print("\n".join(found["kernels"]))
    for name, row in found["differences"].items():
        print(f"{name:<16} " + "  ".join(f"{what} {value:.1e}" for what, value in row.items()))
    line = dict(
        benchmark="isolation",
        commit=args.commit or git_commit(),
        date=time.strftime("%Y-%m-%d"),
        hardware=hardware(),
        versions=versions(),
        settings=dict(blocks=args.blocks, dtype=args.dtype, seed=0),
        **found,
    )
    with open(args.out, "a") as f:
        f.write(json.dumps(line) + "\n")
