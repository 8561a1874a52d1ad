"""How far the fast path is from float32, beside how far transformers' and PEFT's own bfloat16 is.

    python benchmarks/correctness/closeness.py                   # the toy, on this machine's device
    python benchmarks/correctness/closeness.py --blocks MEM*E    # blocks of full size instead (a GPU)

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
import json
import tempfile
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.common import results_file
from benchmarks.correctness.isolation import GROUPS, make_recipe
from medmcqa_lora.core.environment import KERNELS, git_commit, hardware, versions
from medmcqa_lora.fast.apply import apply_fast_parts, describe_kernels
from medmcqa_lora.fast.blocks import in_float8
from medmcqa_lora.fast.packing import packing_collator
from medmcqa_lora.model.load import load_model
from medmcqa_lora.model.lora import attach_lora


def examples(chunk: int, vocabulary: int, seed: int, ordinary: int) -> list[dict]:
    """Examples of awkward lengths, and some of the usual ones."""
    generator = torch.Generator().manual_seed(seed)
    lengths = [
        57,
        1,
        chunk - 1,
        chunk,
        chunk + 1,
        2 * chunk + 44,
        3,
        *torch.randint(20, 120, (ordinary,), generator=generator).tolist(),
    ]
    return [
        dict(
            input_ids=(r := torch.randint(3, vocabulary, (n,), generator=generator).tolist()),
            labels=r,
        )
        for n in lengths
    ]


def same_weights(model: nn.Module, other: nn.Module) -> None:
    """Copy a model's frozen weights into another of another type."""
    found = dict(other.named_parameters())
    with torch.no_grad():
        for name, p in model.named_parameters():
            found[name].copy_(p)
        for (_, a), (_, b) in zip(model.named_buffers(), other.named_buffers()):
            b.copy_(a)


def fill(model: nn.Module, seed: int) -> nn.Module:
    """The same random values in every B, whatever the model's type."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.copy_(torch.randn(p.shape, generator=generator) * 0.02)
    return model.train()


@contextmanager
def pytorch_alone():
    """transformers' Mamba blocks by its PyTorch code, each example in a row of its own, also
    where its kernels are installed.
    """
    code, mamba = (
        importlib.import_module("transformers.models.nemotron_h.modeling_nemotron_h"),
        importlib.import_module("medmcqa_lora.fast.mamba"),
    )
    plain = {name: inspect.unwrap(getattr(code, name)) for name in KERNELS}
    with (
        patch.multiple(code, **plain),
        patch.object(mamba, "missing_kernels", lambda: ("left out",)),
    ):
        yield


def loss_of(model: nn.Module, row: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (T, vocabulary) and the mean loss on every token that has one before it in its
    example.
    """
    half = next(p for p in model.parameters() if not p.requires_grad).dtype == torch.bfloat16
    with torch.autocast(row["input_ids"].device.type, torch.bfloat16, enabled=half):
        logits = (
            model(**{k: v for k, v in row.items() if k != "labels"}, use_cache=False)
            .logits[0]
            .float()
        )
    return logits, F.cross_entropy(logits[:-1], row["labels"][0, 1:], ignore_index=-100)


def eager(model: nn.Module, row: dict) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Logits and gradients, as PyTorch runs them."""
    model.zero_grad(set_to_none=True)
    logits, loss = loss_of(model, row)
    loss.backward()
    return logits.detach(), {
        n: p.grad.float().clone() for n, p in model.named_parameters() if p.grad is not None
    }


def replayed(model: nn.Module, row: dict) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The same from a CUDA graph, replayed twice."""
    wanted = [p for p in model.parameters() if p.requires_grad]
    for p in wanted:
        p.grad = torch.zeros_like(p)
    with torch.cuda.graph(graph := torch.cuda.CUDAGraph()):
        logits, loss = loss_of(model, row)
        loss.backward()
    for _ in range(2):
        for p in wanted:
            p.grad.zero_()
        graph.replay()
    return logits.detach().clone(), {
        n: p.grad.float().clone() for n, p in model.named_parameters() if p.requires_grad
    }


def apart(found: tuple, reference: tuple) -> dict[str, float]:
    """Relative differences of logits, of all gradients together, and of the worst matrix'
    gradient.
    """
    (y, g), (y0, g0) = found, reference
    whole = (
        sum((g[n] - g0[n]).square().sum() for n in g0) / sum(v.square().sum() for v in g0.values())
    ).sqrt()
    return dict(
        logits=float((y - y0).norm() / y0.norm()),
        gradients=float(whole),
        worst=max(float((g[n] - g0[n]).norm() / g0[n].norm().clamp(min=1e-12)) for n in g0),
    )


def favour(model: nn.Module, few: bool) -> None:
    """Send every token to the first experts, or to those that it would choose."""
    for m in model.modules():
        if hasattr(m, "e_score_correction_bias"):
            m.e_score_correction_bias.zero_()
            if few:
                m.e_score_correction_bias[: m.top_k] = 10.0


def closeness(blocks: str, seed: int, ordinary: int, experts: bool) -> dict:
    """Case -> way -> differences from float32."""
    with tempfile.TemporaryDirectory() as folder:
        recipe, config = make_recipe(blocks, "bfloat16", Path(folder), seed)
        recipe = replace(recipe, lora_targets=GROUPS if experts else GROUPS[:-1])
        rows = packing_collator()(
            examples(config["chunk_size"], config["vocab_size"], seed, ordinary)
        )
        base = apply_fast_parts(load_model(recipe), recipe)
        plain, exact = (
            apply_fast_parts(load_model(replace(recipe, fast="off")), replace(recipe, fast="off")),
            apply_fast_parts(
                load_model(replace(recipe, dtype="float32", fast="off")),
                replace(recipe, dtype="float32", fast="off"),
            ),
        )
        for other in (plain, exact):
            same_weights(base, other)
        exact.set_experts_implementation("eager")  # the grouped product may round to TF32
        ours, plain, exact = (
            fill(apply_fast_parts(attach_lora(m, r), r), seed)
            for m, r in (
                (base, recipe),
                (plain, replace(recipe, fast="off")),
                (exact, replace(recipe, dtype="float32", fast="off")),
            )
        )
    device = next(ours.parameters()).device
    row, found = {k: v.to(device) if torch.is_tensor(v) else v for k, v in rows.items()}, {}
    for case in ("as it is", "all to the first experts"):
        for m in (ours, plain, exact):
            favour(m, case != "as it is")
        with pytorch_alone():
            reference, theirs = eager(exact, row), eager(plain, row)
        mine = eager(ours, row)
        with in_float8(ours):
            eight = eager(ours, row)
        found[case] = {
            "transformers": apart(theirs, reference),
            "ours": apart(mine, reference),
            "ours, fp8": apart(eight, reference),
            "ours, fp8, from ours": apart(eight, mine),
        }
        if torch.cuda.is_available():
            found[case]["ours, replayed, from ours"] = apart(replayed(ours, row), mine)
    return dict(
        differences=found,
        tokens=int(row["input_ids"].numel()),
        kernels=describe_kernels(ours, recipe, (True, "asked for")).splitlines(),
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--blocks", default="", help="pattern of full-size blocks, such as MEM*E; none: the toy"
    )
    parser.add_argument(
        "--ordinary", type=int, default=10, help="examples of usual lengths beside the awkward ones"
    )
    parser.add_argument("--experts", action="store_true", help="LoRA on routed experts, too")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--commit", default="", help="where the checkout's git can't tell")
    parser.add_argument("--out", default=str(results_file(__file__)))
    args = parser.parse_args()
    found = closeness(args.blocks, args.seed, args.ordinary, args.experts)
    print("\n".join(found["kernels"]))
    for case, ways in found["differences"].items():
        for way, row in ways.items():
            print(
                f"{case:<26} {way:<26} "
                + "  ".join(f"{what} {value:.2e}" for what, value in row.items())
            )
    line = dict(
        benchmark="closeness",
        commit=args.commit or git_commit(),
        date=time.strftime("%Y-%m-%d"),
        hardware=hardware(),
        versions=versions(),
        settings=dict(
            blocks=args.blocks, ordinary=args.ordinary, experts=args.experts, seed=args.seed
        ),
        **found,
    )
    with open(args.out, "a") as f:
        f.write(json.dumps(line) + "\n")
