"""A MoE block's training step with LoRA on its routed experts: PEFT's way beside grouped products,
in alternation.

    python benchmarks/speed/experts.py                 # toy size, on the CPU
    python benchmarks/speed/experts.py --device cuda \\
        --size full --tokens 4096 16384                # one block of the 30B model

One set of weights serves all four variants (experts frozen or with LoRA; transformers' and PEFT's
forward, or ours). A step is the block's forward and backward, with a gradient for its input. Peak
memory is what a step needs above weights and adapter. Both ways are compared with the same block
in a wider type computed expert by expert (--no-check leaves that out). Prints medians and ranges
and appends a record a number of tokens to benchmarks/results/experts.jsonl (or --out FILE).
"""

import argparse
import copy
import time
import warnings
from contextlib import nullcontext
from functools import partial

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import NemotronHConfig
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHMoE

from benchmarks.common import add_record_options, append_record, circumstances
from medmcqa_lora.bench.profile import median_and_range
from medmcqa_lora.fast.experts import grouped_experts
from tests.helpers import allocated_on_cpu, relative_distance


def block_size(hidden: int, experts: int, top: int, width: int) -> dict[str, int]:
    return dict(
        hidden_size=hidden, n_routed_experts=experts, num_experts_per_tok=top,
        moe_intermediate_size=width, moe_shared_expert_intermediate_size=2 * width,
    )


SIZES = {
    "toy": block_size(hidden=64, experts=8, top=2, width=48),
    "middle": block_size(hidden=256, experts=32, top=6, width=192),
    "full": block_size(hidden=2688, experts=128, top=6, width=1856),  # Nemotron-3-Nano-30B-A3B
}
VARIANTS = ("frozen, transformers", "frozen, ours", "LoRA, PEFT", "LoRA, ours")
WARMUP = 3  # repetitions that are not timed


class Layer(nn.Module):
    """A block's mixer under the name that PEFT looks for."""

    def __init__(self, config):
        super().__init__()
        self.mixer = NemotronHMoE(config)

    def forward(self, x):
        return self.mixer(x)


def random_layer(size: str, dtype: torch.dtype, device: str) -> Layer:
    """The block with random weights, made on the device."""
    attention = dict(num_attention_heads=4, num_key_value_heads=2, head_dim=16)
    config = NemotronHConfig(
        hybrid_override_pattern="E", vocab_size=64, **attention, **SIZES[size]
    )
    config._experts_implementation = "grouped_mm"  # transformers' default
    with torch.device("meta"):
        layer = Layer(config).to(dtype)
    layer.to_empty(device=device)
    for p in layer.parameters(): nn.init.normal_(p, std=p.shape[-1] ** -0.5)
    for b in layer.buffers(): b.zero_()
    return layer


def make_model(size: str, rank: int, dtype: torch.dtype, device: str) -> nn.Module:
    """The block with LoRA of that rank on both expert weights."""
    layer = random_layer(size, dtype, device)
    targets = ["mixer.experts.up_proj", "mixer.experts.down_proj"]
    lora = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=[], target_parameters=targets)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(layer, lora)
    for name, p in model.named_parameters():
        # not zero, so that A has a gradient
        if "lora_B" in name: nn.init.normal_(p, std=0.2 * rank**-0.5)
    return model.train()


def contexts(model: nn.Module, variant: str) -> tuple:
    """The two contexts of a variant: adapter on or off, whose forward."""
    adapter = nullcontext() if "LoRA" in variant else model.disable_adapter()
    forward = grouped_experts(model) if "ours" in variant else nullcontext()
    return adapter, forward


def step(model: nn.Module, x: torch.Tensor, g: torch.Tensor) -> list[torch.Tensor]:
    """One forward and backward; output and gradients."""
    x = x.detach().requires_grad_()
    y = model(x)
    y.backward(g)
    found = [y.detach(), x.grad, *(p.grad for p in model.parameters() if p.grad is not None)]
    model.zero_grad()
    return found


def peak_bytes(run, device: str) -> int:
    """Bytes that `run` needs at its peak, above what was there before."""
    if device == "cpu": return allocated_on_cpu(run)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def seconds_of(run, device: str) -> float:
    """Seconds of a call, its kernels included."""
    if device != "cpu": torch.cuda.synchronize()
    began = time.perf_counter()
    run()
    if device != "cpu": torch.cuda.synchronize()
    return time.perf_counter() - began


def exact_step(model: nn.Module, x: torch.Tensor, g: torch.Tensor) -> list[torch.Tensor]:
    """A step in the wider type, expert by expert."""
    kind = torch.float64 if x.dtype == torch.float32 else torch.float32
    wide = copy.deepcopy(model).to(kind)
    wide.base_model.model.mixer.config._experts_implementation = "eager"
    return step(wide, x.to(kind), g.to(kind))


def errors(model: nn.Module, x: torch.Tensor, g: torch.Tensor) -> dict[str, dict[str, float]]:
    """Relative errors of output, input's gradient and LoRA's gradients, of both ways with LoRA."""
    exact = exact_step(model, x, g)
    found = {}
    for variant in VARIANTS[2:]:
        adapter, forward = contexts(model, variant)
        with adapter, forward:
            got = step(model, x, g)
        assert len(got) == len(exact) == 2 + 4 and all(t.isfinite().all() for t in got)
        relative = [relative_distance(a.to(b.dtype), b) for a, b in zip(got, exact)]
        found[variant] = dict(output=relative[0], input=relative[1], lora=max(relative[2:]))
    return found


def variant_result(seconds: list[float], peak: int) -> dict:
    found = median_and_range(seconds)
    return dict(
        median_s=found["median"], min_s=found["min"], max_s=found["max"],
        peak_gib=peak / 2**30, seconds=[round(s, 6) for s in seconds],
    )


def measure(model: nn.Module, x: torch.Tensor, g: torch.Tensor, repeats: int, device: str) -> dict:
    """Seconds of each repetition and peak memory, by variant."""
    run = partial(step, model, x, g)
    seconds, peaks = {v: [] for v in VARIANTS}, {}
    for repetition in range(-WARMUP, repeats):
        for variant in VARIANTS if repetition % 2 else VARIANTS[::-1]:
            adapter, forward = contexts(model, variant)
            with adapter, forward:
                if repetition == -1: peaks[variant] = peak_bytes(run, device)
                else: spent = seconds_of(run, device)
            if repetition >= 0: seconds[variant].append(spent)
    return {v: variant_result(seconds[v], peaks[v]) for v in VARIANTS}


def print_errors(tokens: str, found: dict[str, dict[str, float]]) -> None:
    for variant, e in found.items():
        print(
            f"{tokens:>7} tokens  {variant:<22} error of output {e['output']:.1e}, "
            f"of input's gradient {e['input']:.1e}, of LoRA's gradients {e['lora']:.1e}",
            flush=True,
        )


def print_results(tokens: int, results: dict[str, dict], repeats: int) -> None:
    for variant, r in results.items():
        median, low, high = (1e3 * r[key] for key in ("median_s", "min_s", "max_s"))
        print(
            f"{tokens:>7} tokens  {variant:<22} "
            f"median {median:9.2f} ms ({low:.2f} to {high:.2f}, n = {repeats})  "
            f"peak {r['peak_gib'] * 1024:10.2f} MiB", flush=True,
        )


def check(model: nn.Module, x: torch.Tensor, g: torch.Tensor) -> dict[str, dict]:
    """Number of tokens -> errors; of 4 tokens most experts get none."""
    found = {}
    for n in (4, x.shape[1]):
        found[str(n)] = errors(model, x[:, :n], g[:, :n])
        print_errors(str(n), found[str(n)])
    return found


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--size", choices=SIZES, default="toy")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", help="default: float32 on the CPU, bfloat16 on CUDA")
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096])
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--no-check", action="store_true")
    add_record_options(parser, __file__)
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    size, device = SIZES[args.size], args.device
    dtype = getattr(torch, args.dtype or ("float32" if device == "cpu" else "bfloat16"))
    torch.manual_seed(0)
    model = make_model(args.size, args.rank, dtype, device)
    settings = dict(
        size=args.size, device=device, dtype=str(dtype), rank=args.rank, n=args.repeats, seed=0,
        threads=torch.get_num_threads(), **size,
    )
    line = dict(benchmark="experts", **settings, **circumstances(args.commit))
    weight = model.base_model.model.mixer.experts.get_base_layer().up_proj
    print(
        f"{args.size}: a weight of {tuple(weight.shape)} is {weight.nbytes / 2**30:.4f} GiB "
        f"in {dtype}; rank {args.rank}; {line['hardware']}", flush=True,
    )
    for tokens in args.tokens:
        shape = (1, tokens, size["hidden_size"])
        x, g = (torch.randn(shape, device=device, dtype=dtype) for _ in range(2))
        checked = {} if args.no_check else check(model, x, g)
        results = measure(model, x, g, args.repeats, device)
        print_results(tokens, results, args.repeats)
        append_record(args.out, line | dict(tokens=tokens, errors=checked, results=results))


if __name__ == "__main__":
    main()
