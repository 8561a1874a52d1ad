"""How far the fast path is from float32, beside how far transformers' and PEFT's own bfloat16 is.

    python benchmarks/correctness/closeness.py                 # the toy, on this machine's device
    python benchmarks/correctness/closeness.py --blocks MEM*E  # blocks of full size (a GPU)

The same weights three times: in float32 by transformers' PyTorch code (the reference), in
bfloat16 by transformers and PEFT, and in bfloat16 by this package, with its frozen matrices in
bfloat16 and as 8-bit floats, on a packed row of examples of one token, of a chunk and its
neighbours and of more than two chunks. On one GPU, the package's step is replayed from a CUDA
graph, too. The cases of the router: as it is; a bias that sends every token to the same experts
and leaves the others without any. Differences are norms of the difference over the reference's
norm: of the logits, and of all LoRA gradients of the loss on every token. Appends a line to
benchmarks/results/closeness.jsonl (or --out FILE).
"""

import argparse
import importlib
import inspect
import tempfile
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.common import add_record_options, append_record, circumstances, print_differences
from benchmarks.correctness.isolation import PATTERN_HELP
from medmcqa_lora.core.environment import KERNELS
from medmcqa_lora.core.recipe import Recipe
from medmcqa_lora.fast.apply import apply_fast_parts, describe_kernels
from medmcqa_lora.fast.blocks import in_float8
from medmcqa_lora.fast.packing import packing_collator
from medmcqa_lora.model.load import load_model
from medmcqa_lora.model.lora import attach_lora
from tests.helpers import GROUPS, make_recipe, relative_distance

CASES = ("as it is", "all to the first experts")  # of the router
Result = tuple[torch.Tensor, dict[str, torch.Tensor]]  # logits (T, vocabulary); name -> gradient


def examples(chunk: int, vocabulary: int, seed: int, ordinary: int) -> list[dict]:
    """Examples of awkward lengths, and some of the usual ones."""
    generator = torch.Generator().manual_seed(seed)
    awkward = [57, 1, chunk - 1, chunk, chunk + 1, 2 * chunk + 44, 3]
    usual = torch.randint(20, 120, (ordinary,), generator=generator).tolist()
    lengths = [*awkward, *usual]
    rows = [torch.randint(3, vocabulary, (n,), generator=generator).tolist() for n in lengths]
    return [dict(input_ids=row, labels=row) for row in rows]


def load(recipe: Recipe) -> nn.Module:
    """The base model as the recipe's `fast` says."""
    return apply_fast_parts(load_model(recipe), recipe)


def copy_weights(model: nn.Module, other: nn.Module) -> None:
    """Copy a model's frozen weights into another of another type."""
    found = dict(other.named_parameters())
    with torch.no_grad():
        for name, p in model.named_parameters():
            found[name].copy_(p)
        for (_, a), (_, b) in zip(model.named_buffers(), other.named_buffers()):
            b.copy_(a)


def fill_lora(model: nn.Module, seed: int) -> nn.Module:
    """The same random values in every B, whatever the model's type."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.copy_(torch.randn(p.shape, generator=generator) * 0.02)
    return model.train()


def load_models(recipe: Recipe, seed: int) -> tuple[nn.Module, nn.Module, nn.Module]:
    """One set of weights with one adapter: by this package, by transformers, and in float32."""
    recipe_plain = replace(recipe, fast="off")
    recipe_exact = replace(recipe_plain, dtype="float32")
    recipes = (recipe, recipe_plain, recipe_exact)
    base, plain, exact = (load(r) for r in recipes)
    copy_weights(base, plain)
    copy_weights(base, exact)
    exact.set_experts_implementation("eager")  # the grouped product may round to TF32
    models = []
    for model, r in zip((base, plain, exact), recipes):
        tuned = apply_fast_parts(attach_lora(model, r), r)
        models.append(fill_lora(tuned, seed))
    return tuple(models)


@contextmanager
def without_mamba_kernels():
    """transformers' Mamba blocks by its PyTorch code, each example in a row of its own, also
    where its kernels are installed.
    """
    code = importlib.import_module("transformers.models.nemotron_h.modeling_nemotron_h")
    mamba = importlib.import_module("medmcqa_lora.fast.mamba")
    plain = {name: inspect.unwrap(getattr(code, name)) for name in KERNELS}
    none_installed = patch.object(mamba, "missing_kernels", lambda: ("left out",))
    with patch.multiple(code, **plain), none_installed:
        yield


def loss_of(model: nn.Module, row: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (T, vocabulary) and the mean loss on every token that has one before it in its
    example.
    """
    half = next(p for p in model.parameters() if not p.requires_grad).dtype == torch.bfloat16
    inputs = {k: v for k, v in row.items() if k != "labels"}
    with torch.autocast(row["input_ids"].device.type, torch.bfloat16, enabled=half):
        logits = model(**inputs, use_cache=False).logits[0].float()
    return logits, F.cross_entropy(logits[:-1], row["labels"][0, 1:], ignore_index=-100)


def eager(model: nn.Module, row: dict) -> Result:
    """Logits and gradients, as PyTorch runs them."""
    model.zero_grad(set_to_none=True)
    logits, loss = loss_of(model, row)
    loss.backward()
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return logits.detach(), {n: g.float().clone() for n, g in found.items()}


def replayed(model: nn.Module, row: dict) -> Result:
    """The same from a CUDA graph, replayed twice."""
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    for p in trained.values(): p.grad = torch.zeros_like(p)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits, loss = loss_of(model, row)
        loss.backward()
    for _ in range(2):
        for p in trained.values(): p.grad.zero_()
        graph.replay()
    return logits.detach().clone(), {n: p.grad.float().clone() for n, p in trained.items()}


def distances(found: Result, reference: Result) -> dict[str, float]:
    """Relative differences of logits, of all gradients together, and of the worst matrix'
    gradient.
    """
    (y, g), (y0, g0) = found, reference
    difference = sum((g[n] - g0[n]).square().sum() for n in g0)
    total = sum(v.square().sum() for v in g0.values())
    matrices = [(g[n] - g0[n]).norm() / g0[n].norm().clamp(min=1e-12) for n in g0]
    return dict(
        logits=relative_distance(y, y0),
        gradients=float((difference / total).sqrt()),
        worst=max(map(float, matrices)),
    )


def bias_router(model: nn.Module, few: bool) -> None:
    """Send every token to the first experts, or to those that it would choose."""
    for m in model.modules():
        if not hasattr(m, "e_score_correction_bias"): continue
        m.e_score_correction_bias.zero_()
        if few: m.e_score_correction_bias[: m.top_k] = 10.0


def compare(ours: nn.Module, plain: nn.Module, exact: nn.Module, row: dict) -> dict:
    """Way of computing -> differences, from float32 if nothing else is said."""
    with without_mamba_kernels():
        reference = eager(exact, row)
        theirs = eager(plain, row)
    mine = eager(ours, row)
    with in_float8(ours):
        in_8_bits = eager(ours, row)
    found = {
        "transformers": distances(theirs, reference),
        "ours": distances(mine, reference),
        "ours, fp8": distances(in_8_bits, reference),
        "ours, fp8, from ours": distances(in_8_bits, mine),
    }
    if torch.cuda.is_available():
        found["ours, replayed, from ours"] = distances(replayed(ours, row), mine)
    return found


def closeness(blocks: str, seed: int, ordinary: int, experts: bool) -> dict:
    """Case -> way of computing -> differences."""
    with tempfile.TemporaryDirectory() as folder:
        recipe, config = make_recipe(blocks, "bfloat16", Path(folder), seed)
        recipe = replace(recipe, lora_targets=GROUPS if experts else GROUPS[:-1])
        rows = examples(config["chunk_size"], config["vocab_size"], seed, ordinary)
        models = load_models(recipe, seed)
    ours = models[0]
    device = next(ours.parameters()).device
    packed = packing_collator()(rows)
    row = {k: v.to(device) if torch.is_tensor(v) else v for k, v in packed.items()}
    found = {}
    for case in CASES:
        for model in models: bias_router(model, few=case == CASES[1])
        found[case] = compare(*models, row)
    kernels = describe_kernels(ours, recipe, (True, "asked for")).splitlines()
    return dict(differences=found, tokens=int(row["input_ids"].numel()), kernels=kernels)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--blocks", default="", help=PATTERN_HELP)
    usual = "examples of usual lengths beside the awkward ones"
    parser.add_argument("--ordinary", type=int, default=10, help=usual)
    parser.add_argument("--experts", action="store_true", help="LoRA on routed experts, too")
    parser.add_argument("--seed", type=int, default=0)
    add_record_options(parser, __file__)
    args = parser.parse_args()
    found = closeness(args.blocks, args.seed, args.ordinary, args.experts)
    print("\n".join(found["kernels"]))
    for case, ways in found["differences"].items():
        for way, row in ways.items():
            print_differences(f"{case:<26} {way:<26}", row)
    settings = {k: getattr(args, k) for k in ("blocks", "ordinary", "experts", "seed")}
    line = dict(benchmark="closeness", **circumstances(args.commit), settings=settings, **found)
    append_record(args.out, line)


if __name__ == "__main__":
    main()
