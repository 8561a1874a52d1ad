"""Peak memory of training steps, predicted by `medmcqa_lora.training.memory` and measured.

    python benchmarks/memory/peak.py --device cuda --commit $(git rev-parse HEAD)     # the 30B model, random weights made on the device
    python benchmarks/memory/peak.py                                                  # toy size on the CPU, a check of this script
    python benchmarks/memory/peak.py --list                                           # the configurations and what is predicted for the 30B model

Each configuration goes through the package's own load_model, attach_lora and make_trainer: a
trainer's steps on synthetic rows of given lengths, always the same batch; packed ones are filled
up and recorded, as in a run. The peak is torch.cuda.max_memory_allocated from the second step on,
when AdamW's moments exist and Triton has tuned its kernels (that of the first step is recorded,
too). On the CPU, where there is no such counter, torch's profiler adds up allocations above the
weights. A configuration that runs out of memory is recorded as such, and everything is freed
before the next. Appends a line a configuration to benchmarks/results/peak.jsonl (or --out FILE).
"""

import argparse
import gc
import json
import tempfile
import time
import traceback
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from datasets import Dataset
from transformers import TrainerCallback

from benchmarks.common import allocated_on_cpu, results_file
from medmcqa_lora.core.environment import git_commit, hardware, missing_kernels, versions
from medmcqa_lora.core.files import shipped_file
from medmcqa_lora.core.recipe import Recipe, check_recipe
from medmcqa_lora.data.tokens import Encoded, sample_tokenizer
from medmcqa_lora.fast.apply import apply_fast_parts
from medmcqa_lora.fast.experts import is_grouped
from medmcqa_lora.fast.layers import is_fused
from medmcqa_lora.fast.packing import ROW_MULTIPLE, can_use_varlen, row_multiple
from medmcqa_lora.model.checkpoint import empty_model
from medmcqa_lora.model.load import load_model
from medmcqa_lora.model.lora import attach_lora
from medmcqa_lora.model.resolve import TOY
from medmcqa_lora.training.memory.activations import Pass, activation_peak, find_blocks
from medmcqa_lora.training.memory.fit import memory_parts
from medmcqa_lora.training.trainer import make_trainer

THREE = ("attention", "mamba_in", "shared_experts")


@dataclass(frozen=True)
class Case:
    name: str
    rows: int  # of a micro-batch
    length: int  # tokens of the longest
    checkpointing: bool = False
    targets: tuple[str, ...] = THREE
    r: int = 16
    r_experts: int | None = None
    layers: int = 52  # the first so many blocks
    shortest: float = (
        1  # of the length: below 1, rows are spread between the two, and padded or packed
    )
    packed: bool = False
    supervised: float = 0  # share of a row's tokens with a label; 0: the last alone
    fast: str = "auto"


CASES = [
    Case("2k tokens", 8, 256),
    Case("4k, 16 rows", 16, 256),
    Case("4k, one row", 1, 4096),
    Case("8k", 2, 4096),
    Case("8k, checkpointed", 2, 4096, True),
    Case("16k", 4, 4096),
    Case("16k, checkpointed", 4, 4096, True),
    Case("32k, checkpointed", 8, 4096, True),
    Case("4k, padded", 16, 256, shortest=0.15),
    Case("4k, packed", 16, 400, shortest=0.28, packed=True),
    Case("16k, packed, checkpointed", 64, 400, True, shortest=0.28, packed=True),
    Case("4k, attention alone", 1, 4096, targets=("attention",)),
    Case("16k, r = 64, checkpointed", 4, 4096, True, r=64),
    Case("4k, routed experts too, r = 8", 1, 4096, targets=(*THREE, "routed_experts"), r_experts=8),
    Case(
        "16k, routed experts too, r = 16, checkpointed",
        4,
        4096,
        True,
        targets=(*THREE, "routed_experts"),
    ),
    Case("8k, half supervised", 2, 4096, supervised=0.5),
    Case("4k, nothing of our own", 1, 4096, fast="off"),
    Case("13 blocks, 16k", 4, 4096, layers=13),
    Case("13 blocks, 32k, checkpointed", 8, 4096, True, layers=13),
    Case(
        "13 blocks, 4k, routed experts too, r = 64",
        1,
        4096,
        targets=(*THREE, "routed_experts"),
        r=64,
        layers=13,
    ),
]


def model_config(case: Case, toy: bool) -> dict:
    """The 30B model's configuration cut to a number of blocks, or the toy's."""
    config = (
        dict(TOY, model_type="nemotron_h")
        if toy
        else json.loads(shipped_file("assets/nemotron_nano_config.json").read_text())
    )
    return config | {"hybrid_override_pattern": config["hybrid_override_pattern"][: case.layers]}


def make_recipe(case: Case, folder: Path, toy: bool, steps: int, seed: int) -> Recipe:
    (folder / "config.json").write_text(
        json.dumps(model_config(case, toy) | {"architectures": ["NemotronHForCausalLM"]})
    )
    return check_recipe(
        Recipe(
            model=str(folder),
            weights="random",
            dtype="float32" if toy else "bfloat16",
            lora_r=case.r,
            lora_r_experts=case.r_experts,
            lora_targets=list(case.targets),
            fast=case.fast,
            per_device_train_batch_size=case.rows,
            gradient_checkpointing=case.checkpointing,
            max_steps=steps,
            save_steps=10 * steps,
            seed=seed,
            out=str(folder / "run"),
        )
    )


def row_lengths(case: Case, toy: bool) -> list[int]:
    longest = max(8, case.length // 64) if toy else case.length
    return [
        round(longest * (1 - (1 - case.shortest) * i / max(1, case.rows - 1)))
        for i in range(case.rows)
    ]


def synthetic(case: Case, lengths: list[int], vocabulary: int, seed: int) -> Encoded:
    """One micro-batch of random token ids."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for n in lengths:
        ids = torch.randint(3, vocabulary, (n,), generator=generator).tolist()
        start = n - max(1, round(case.supervised * n))
        rows.append({"input_ids": ids, "labels": [-100] * start + ids[start:]})
    return Encoded(Dataset.from_list(rows), [], sum(lengths), [])


def make_pass(case: Case, lengths: list[int], model, recipe: Recipe) -> Pass:
    """What really computes this configuration, for the formula."""
    experts = [m for n, m in model.named_modules() if n.endswith(".experts")]
    half = recipe.dtype != "float32"
    whole = any(is_fused(m) for m in model.modules() if type(m).__name__ == "NemotronHBlock")
    how = dict(
        half=half,
        fused=not missing_kernels(),
        grouped=all(map(is_grouped, experts)),
        whole=whole,
        wide=torch.cuda.is_available(),
    )
    if case.packed:
        multiple = row_multiple(next(model.parameters()).device) if recipe.fast != "off" else 1
        return Pass(
            1,
            sum(lengths) + -sum(lengths) % multiple,
            step=recipe.fast != "off",
            masked=not (recipe.fast != "off" and can_use_varlen(model, recipe.attn_implementation)),
            examples=len(lengths),
            longest=max(lengths),
            **how,
        )
    return Pass(case.rows, max(lengths), masked=len(set(lengths)) > 1, **how)


class Watch(TrainerCallback):
    """The time of each step, and the first step's peak apart from the others'."""

    def __init__(self):
        self.ends, self.first = [], None

    def on_step_end(self, args, state, control, **kwargs):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.ends.append(time.perf_counter())
        if self.first is None and torch.cuda.is_available():
            self.first = torch.cuda.max_memory_allocated()
            torch.cuda.reset_peak_memory_stats()


def measure(case: Case, folder: Path, toy: bool, steps: int, seed: int) -> dict:
    """Predicted and measured GiB of one configuration."""
    recipe, lengths, cuda = (
        make_recipe(case, folder, toy, steps, seed),
        row_lengths(case, toy),
        torch.cuda.is_available(),
    )
    model = apply_fast_parts(load_model(recipe), recipe)
    total, blocks = sum(p.numel() for p in model.parameters()), find_blocks(model, recipe)
    tuned = apply_fast_parts(attach_lora(model, recipe), recipe)
    trainable = sum(p.numel() for p in tuned.parameters() if p.requires_grad)
    p = make_pass(case, lengths, tuned, recipe)
    fixed = sum(memory_parts(total, trainable, recipe).values()) * 2**30
    predicted = fixed + sum(activation_peak(model.config, blocks, p, case.checkpointing))
    run = folder / "run"
    run.mkdir(exist_ok=True)
    found = dict(
        parameters=total,
        trainable=trainable,
        way=asdict(p),
        tokens=p.tokens,
        predicted_gib=predicted / 2**30,
        fixed_gib=fixed / 2**30,
        loaded_gib=torch.cuda.memory_allocated() / 2**30 if cuda else None,
    )
    try:
        trainer = make_trainer(
            tuned,
            sample_tokenizer(),
            synthetic(case, lengths, model.config.vocab_size, seed),
            recipe,
            run,
            packed=case.packed,
        )
        trainer.add_callback(watch := Watch())
        if cuda:
            torch.cuda.reset_peak_memory_stats()
            trainer.train()
            peak = torch.cuda.max_memory_allocated()
        else:
            peak = allocated_on_cpu(trainer.train) + total * 4 + trainable * 4
    except torch.OutOfMemoryError as e:
        return found | dict(out_of_memory=str(e).split(". ")[0], peak_gib=None)
    spent = [b - a for a, b in zip(watch.ends, watch.ends[1:])]
    return found | dict(
        peak_gib=peak / 2**30,
        first_step_peak_gib=watch.first and watch.first / 2**30,
        ratio=predicted / peak,
        ratio_above_weights=(predicted - fixed) / (peak - fixed),
        step_s=min(spent) if spent else None,
        tokens_per_s=p.tokens / min(spent) if spent else None,
        loss=trainer.state.log_history[-1].get("train_loss"),
    )


def predict(case: Case) -> str:
    """What is predicted for the 30B model with fused kernels; nothing is run."""
    with tempfile.TemporaryDirectory() as folder:
        recipe = make_recipe(case, Path(folder), False, 1, 0)
        model, lengths = empty_model(folder), row_lengths(case, False)
    fast = case.fast != "off"
    packed = dict(
        rows=1,
        length=sum(lengths) + -sum(lengths) % (ROW_MULTIPLE if fast else 1),
        examples=len(lengths),
        longest=max(lengths),
        masked=not fast,
        step=fast,
    )
    blocks, padded = (
        find_blocks(model, recipe),
        dict(rows=case.rows, length=max(lengths), masked=len(set(lengths)) > 1),
    )
    p = Pass(**(packed if case.packed else padded), grouped=fast, whole=fast)
    fixed = sum(
        memory_parts(
            sum(q.numel() for q in model.parameters()), sum(b.trainable for b in blocks), recipe
        ).values()
    )
    return f"{case.name:<46} {p.tokens:>7,} tokens  {fixed + sum(activation_peak(model.config, blocks, p, case.checkpointing)) / 2**30:8.2f} GiB, {fixed:.2f} of them fixed"


def free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def attempt(case: Case, toy: bool, steps: int, seed: int) -> dict:
    """One configuration; whatever goes wrong with it is recorded, and the next is tried."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            return measure(case, Path(folder), toy, steps, seed)
        except torch.OutOfMemoryError as e:
            return dict(out_of_memory=f"while loading: {str(e).split('. ')[0]}", peak_gib=None)
        except Exception as e:
            traceback.print_exc()
            return dict(
                error=f"{type(e).__name__}: {' '.join(str(e).split())[:300]}", peak_gib=None
            )


def line(case: Case, found: dict) -> str:
    if found.get("error"):
        return f"{case.name:<46} {found['error']}"
    if found.get("out_of_memory"):
        return f"{case.name:<46} predicted {found.get('predicted_gib', float('nan')):8.2f} GiB   out of memory"
    return (
        f"{case.name:<46} predicted {found['predicted_gib']:8.3f} GiB   measured {found['peak_gib']:8.3f}   ratio {found['ratio']:.3f}   above weights {found['ratio_above_weights']:.3f}   "
        f"{found['tokens_per_s'] or float('nan'):9,.0f} tokens/s"
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cpu", help="cpu: the toy; cuda: the 30B model"
    )
    parser.add_argument(
        "--only", nargs="+", metavar="NAME", help="configurations by name or number"
    )
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--commit", help="where there is no git checkout")
    parser.add_argument("--out", type=Path, default=results_file(__file__))
    parser.add_argument("--list", action="store_true")
    asked = parser.parse_args()
    chosen = [
        c
        for i, c in enumerate(CASES, 1)
        if not asked.only or c.name in asked.only or str(i) in asked.only
    ]
    if asked.list or not chosen:
        print("\n".join(f"{i:>2}  {predict(c)}" for i, c in enumerate(CASES, 1)))
        return
    if asked.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: no GPU is visible")
    toy = asked.device == "cpu"
    common = dict(
        benchmark="memory",
        model="toy" if toy else "Nemotron-3-Nano-30B-A3B, random weights",
        commit=asked.commit or git_commit(),
        date=time.strftime("%Y-%m-%d"),
        hardware=hardware(),
        versions=versions(),
        seed=asked.seed,
        steps=asked.steps,
    )
    print(
        f"{common['model']}; {common['hardware']}"
        + ("; CPU: allocations above the weights, by the profiler" if toy else ""),
        flush=True,
    )
    ratios = []
    for case in chosen:
        free()
        found = attempt(case, toy, asked.steps, asked.seed)
        print(line(case, found), flush=True)
        ratios += [found["ratio"]] if "ratio" in found else []
        with open(asked.out, "a") as f:
            f.write(json.dumps(common | dict(case=asdict(case)) | found) + "\n")
    if ratios:
        print(
            f"{len(ratios)} of {len(chosen)} measured; predicted / measured from {min(ratios):.3f} to {max(ratios):.3f}; within 10%: {sum(abs(r - 1) <= 0.1 for r in ratios)}"
        )


if __name__ == "__main__":
    main()
