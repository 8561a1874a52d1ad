"""A MoE block's training step with LoRA on its routed experts: PEFT's way beside grouped products,
in alternation.

    python benchmarks/speed/experts.py                                                 # toy size, on the CPU
    python benchmarks/speed/experts.py --device cuda --size full --tokens 4096 16384   # one block of the 30B model

One set of weights serves all four variants (experts frozen or with LoRA; transformers' and PEFT's
forward, or ours). A step is the block's forward and backward, with a gradient for its input. Peak
memory is what a step needs above weights and adapter. Both ways are compared with the same block
in a wider type computed expert by expert (--no-check leaves that out). Prints medians and ranges
and appends a record a number of tokens to benchmarks/results/experts.jsonl (or --out FILE). Needs
torch, transformers and peft only; run it from the checkout with PYTHONPATH=. where the package is
not installed.
"""

import argparse
import copy
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import time
import warnings
from contextlib import nullcontext
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import NemotronHConfig
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHMoE

from benchmarks.common import allocated_on_cpu, results_file
from medmcqa_lora.fast.experts import grouped_experts

SIZES = {  # full: NVIDIA-Nemotron-3-Nano-30B-A3B
    "toy": dict(
        hidden_size=64,
        n_routed_experts=8,
        num_experts_per_tok=2,
        moe_intermediate_size=48,
        moe_shared_expert_intermediate_size=96,
    ),
    "middle": dict(
        hidden_size=256,
        n_routed_experts=32,
        num_experts_per_tok=6,
        moe_intermediate_size=192,
        moe_shared_expert_intermediate_size=384,
    ),
    "full": dict(
        hidden_size=2688,
        n_routed_experts=128,
        num_experts_per_tok=6,
        moe_intermediate_size=1856,
        moe_shared_expert_intermediate_size=3712,
    ),
}
VARIANTS = ("frozen, transformers", "frozen, ours", "LoRA, PEFT", "LoRA, ours")


class Layer(nn.Module):
    """A block's mixer under the name that PEFT looks for."""

    def __init__(self, config):
        super().__init__()
        self.mixer = NemotronHMoE(config)

    def forward(self, x):
        return self.mixer(x)


def make(size: str, rank: int, dtype: torch.dtype, device: str) -> nn.Module:
    """The block with random weights made on the device, and LoRA of that rank on both expert
    weights.
    """
    config = NemotronHConfig(
        hybrid_override_pattern="E",
        vocab_size=64,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        **SIZES[size],
    )
    config._experts_implementation = "grouped_mm"  # transformers' default
    with torch.device("meta"):
        layer = Layer(config).to(dtype)
    layer.to_empty(device=device)
    for p in layer.parameters():
        nn.init.normal_(p, std=p.shape[-1] ** -0.5)
    for b in layer.buffers():
        b.zero_()
    targets = ["mixer.experts.up_proj", "mixer.experts.down_proj"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(
            layer,
            LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=[], target_parameters=targets),
        )
    for name, p in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, std=0.2 * rank**-0.5)  # not zero, so that A has a gradient
    return model.train()


def ways(model: nn.Module, variant: str):
    """The two contexts of a variant: adapter on or off, whose forward."""
    return nullcontext() if "LoRA" in variant else model.disable_adapter(), grouped_experts(
        model
    ) if "ours" in variant else nullcontext()


def step(model: nn.Module, x: torch.Tensor, g: torch.Tensor) -> list[torch.Tensor]:
    """One forward and backward; output and gradients."""
    x = x.detach().requires_grad_()
    y = model(x)
    y.backward(g)
    found = [y.detach(), x.grad, *(p.grad for p in model.parameters() if p.grad is not None)]
    model.zero_grad()
    return found


def peak(run, device: str) -> int:
    """Bytes that `run` needs at its peak, above what was there before."""
    if device == "cpu":
        return allocated_on_cpu(run)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def seconds(run, device: str) -> float:
    if device != "cpu":
        torch.cuda.synchronize()
    began = time.perf_counter()
    run()
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def errors(model: nn.Module, x: torch.Tensor, g: torch.Tensor) -> dict:
    """Relative errors (norms) of output, input's gradient and LoRA's gradients against the wider
    type, expert by expert.
    """
    wide = copy.deepcopy(model).to(torch.float64 if x.dtype == torch.float32 else torch.float32)
    wide.base_model.model.mixer.config._experts_implementation = "eager"
    kind = next(wide.parameters()).dtype
    exact = step(wide, x.to(kind), g.to(kind))
    del wide
    found = {}
    for variant in VARIANTS[2:]:
        adapter, forward = ways(model, variant)
        with adapter, forward:
            got = step(model, x, g)
        assert len(got) == len(exact) == 2 + 4 and all(t.isfinite().all() for t in got)
        relative = [((a.to(kind) - b).norm() / b.norm()).item() for a, b in zip(got, exact)]
        found[variant] = dict(output=relative[0], input=relative[1], lora=max(relative[2:]))
    return found


def versions() -> dict:
    return {"python": platform.python_version()} | {
        p: importlib.metadata.version(p) for p in ("torch", "transformers", "peft")
    }


def hardware(device: str) -> dict:
    gpu = torch.cuda.get_device_properties(0) if device != "cpu" else None
    return dict(
        machine=platform.machine(),
        cores=os.cpu_count(),
        threads=torch.get_num_threads(),
        gpu=gpu and f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB",
    )


def commit() -> str:
    def git(*words):
        return subprocess.run(
            ["git", "-C", str(Path(__file__).parent), *words], capture_output=True, text=True
        ).stdout.strip()

    return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", "-uno") else "")


def measure(model: nn.Module, x: torch.Tensor, g: torch.Tensor, repeats: int, device: str) -> dict:
    """Seconds of each repetition and peak bytes, by variant."""
    taken, most = {v: [] for v in VARIANTS}, {}
    for repetition in range(-3, repeats):  # the first three warm up
        order = VARIANTS if repetition % 2 else VARIANTS[::-1]
        for variant in order:
            adapter, forward = ways(model, variant)
            with adapter, forward:
                if repetition == -1:
                    most[variant] = peak(lambda: step(model, x, g), device)
                else:
                    spent = seconds(lambda: step(model, x, g), device)
                    if repetition >= 0:
                        taken[variant].append(spent)
    return {
        v: dict(
            median_s=statistics.median(t),
            min_s=min(t),
            max_s=max(t),
            peak_gib=most[v] / 2**30,
            seconds=[round(s, 6) for s in t],
        )
        for v, t in taken.items()
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--size", choices=SIZES, default="toy")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", help="default: float32 on the CPU, bfloat16 on CUDA")
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096])
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--no-check", action="store_true")
    parser.add_argument("--commit", help="where there is no git checkout")
    parser.add_argument("--out", type=Path, default=results_file(__file__))
    asked = parser.parse_args()
    dtype = getattr(torch, asked.dtype or ("float32" if asked.device == "cpu" else "bfloat16"))
    torch.manual_seed(0)
    model = make(asked.size, asked.rank, dtype, asked.device)
    record = dict(
        benchmark="experts",
        size=asked.size,
        device=asked.device,
        dtype=str(dtype),
        rank=asked.rank,
        n=asked.repeats,
        seed=0,
        **SIZES[asked.size],
        commit=asked.commit or commit() or "unknown",
        date=time.strftime("%Y-%m-%d"),
        hardware=hardware(asked.device),
        versions=versions(),
    )
    weight = model.base_model.model.mixer.experts.get_base_layer().up_proj
    print(
        f"{asked.size}: a weight of {tuple(weight.shape)} is {weight.nbytes / 2**30:.4f} GiB in {dtype}; rank {asked.rank}; {record['hardware']}",
        flush=True,
    )

    def data(tokens):
        return [
            torch.randn(
                1, tokens, SIZES[asked.size]["hidden_size"], device=asked.device, dtype=dtype
            )
            for _ in range(2)
        ]

    for tokens in asked.tokens:
        x, g = data(tokens)
        checked = (
            {}
            if asked.no_check
            else {str(n): errors(model, *(t[:, :n] for t in (x, g))) for n in (4, tokens)}
        )  # 4 tokens: most experts get none
        for n, found in checked.items():
            for variant, e in found.items():
                print(
                    f"{n:>7} tokens  {variant:<22} error of output {e['output']:.1e}, of input's gradient {e['input']:.1e}, of LoRA's gradients {e['lora']:.1e}",
                    flush=True,
                )
        results = measure(model, x, g, asked.repeats, asked.device)
        for variant, r in results.items():
            print(
                f"{tokens:>7} tokens  {variant:<22} median {r['median_s'] * 1e3:9.2f} ms ({r['min_s'] * 1e3:.2f} to {r['max_s'] * 1e3:.2f}, n = {asked.repeats})  "
                f"peak {r['peak_gib'] * 1024:10.2f} MiB",
                flush=True,
            )
        with open(asked.out, "a") as f:
            f.write(
                json.dumps(record | dict(tokens=tokens, errors=checked, results=results)) + "\n"
            )


if __name__ == "__main__":
    main()
