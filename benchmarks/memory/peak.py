"""Peak memory of training steps, predicted by `medmcqa_lora.training.memory` and measured.

    python benchmarks/memory/peak.py --device cuda  # the 30B model, weights made on the device
    python benchmarks/memory/peak.py                # the toy on the CPU, a check of this script
    python benchmarks/memory/peak.py --list         # configurations, predictions for the 30B model

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

from benchmarks.common import add_record_options, append_record, circumstances
from medmcqa_lora.core.environment import missing_kernels
from medmcqa_lora.core.files import shipped_file
from medmcqa_lora.core.recipe import Recipe, check_recipe
from medmcqa_lora.core.text import one_line
from medmcqa_lora.data.tokens import Encoded, sample_tokenizer
from medmcqa_lora.fast.apply import apply_fast_parts
from medmcqa_lora.fast.experts import is_grouped
from medmcqa_lora.fast.layers import is_fused
from medmcqa_lora.fast.packing import ROW_MULTIPLE, can_use_varlen, row_multiple
from medmcqa_lora.model.checkpoint import empty_model
from medmcqa_lora.model.load import load_model
from medmcqa_lora.model.lora import attach_lora
from medmcqa_lora.model.resolve import TOY
from medmcqa_lora.training.memory.activations import activation_peak, find_blocks
from medmcqa_lora.training.memory.blocks import Pass
from medmcqa_lora.training.memory.fit import memory_parts
from medmcqa_lora.training.trainer import make_trainer
from tests.helpers import allocated_on_cpu

THREE = ("attention", "mamba_in", "shared_experts")
FOUR = (*THREE, "routed_experts")


@dataclass(frozen=True)
class Case:
    """A configuration."""

    name: str
    rows: int  # of a micro-batch
    length: int  # tokens of the longest
    checkpointing: bool = False
    targets: tuple[str, ...] = THREE  # of LoRA
    r: int = 16
    r_experts: int | None = None
    layers: int = 52  # the first so many blocks
    shortest: float = 1  # row, as a share of `length`; the others lie evenly between the two
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
    Case("4k, routed experts too, r = 8", 1, 4096, targets=FOUR, r_experts=8),
    Case("16k, routed experts too, r = 16, checkpointed", 4, 4096, True, targets=FOUR),
    Case("8k, half supervised", 2, 4096, supervised=0.5),
    Case("4k, nothing of our own", 1, 4096, fast="off"),
    Case("13 blocks, 16k", 4, 4096, layers=13),
    Case("13 blocks, 32k, checkpointed", 8, 4096, True, layers=13),
    Case("13 blocks, 4k, routed experts too, r = 64", 1, 4096, targets=FOUR, r=64, layers=13),
]


def model_config(case: Case, toy: bool) -> dict:
    """The 30B model's configuration cut to a number of blocks, or the toy's."""
    if toy: config = dict(TOY, model_type="nemotron_h")
    else: config = json.loads(shipped_file("assets/nemotron_nano_config.json").read_text())
    return config | {"hybrid_override_pattern": config["hybrid_override_pattern"][: case.layers]}


def make_recipe(case: Case, folder: Path, toy: bool, steps: int, seed: int) -> Recipe:
    """A configuration's recipe; writes the model's configuration into the folder."""
    config = model_config(case, toy) | {"architectures": ["NemotronHForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(config))
    recipe = Recipe(
        model=str(folder), weights="random", dtype="float32" if toy else "bfloat16",
        lora_r=case.r, lora_r_experts=case.r_experts, lora_targets=list(case.targets),
        fast=case.fast, per_device_train_batch_size=case.rows,
        gradient_checkpointing=case.checkpointing, max_steps=steps, save_steps=10 * steps,
        seed=seed, out=str(folder / "run"),
    )
    return check_recipe(recipe)


def row_lengths(case: Case, toy: bool) -> list[int]:
    """Tokens of each row, the longest first."""
    longest = max(8, case.length // 64) if toy else case.length
    span, gaps = 1 - case.shortest, max(1, case.rows - 1)
    return [round(longest * (1 - span * i / gaps)) for i in range(case.rows)]


def synthetic_rows(case: Case, lengths: list[int], vocabulary: int, seed: int) -> Encoded:
    """One micro-batch of random token ids."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for n in lengths:
        ids = torch.randint(3, vocabulary, (n,), generator=generator).tolist()
        start = n - max(1, round(case.supervised * n))
        rows.append({"input_ids": ids, "labels": [-100] * start + ids[start:]})
    return Encoded(Dataset.from_list(rows), [], sum(lengths), [])


def batch_shape(case: Case, lengths: list[int], multiple: int) -> dict:
    """Fields of `Pass`: one row, filled to a multiple of so many tokens, or padded rows."""
    if not case.packed:
        return dict(rows=case.rows, length=max(lengths), masked=len(set(lengths)) > 1)
    total = sum(lengths)
    filled = total + -total % multiple
    return dict(rows=1, length=filled, examples=len(lengths), longest=max(lengths))


def measured_pass(case: Case, lengths: list[int], model, recipe: Recipe) -> Pass:
    """What really computes this configuration, for the formula."""
    fast = recipe.fast != "off"
    multiple = row_multiple(next(model.parameters()).device) if fast else 1
    shape = batch_shape(case, lengths, multiple)
    if case.packed:
        varlen = fast and can_use_varlen(model, recipe.attn_implementation)
        shape |= dict(step=fast, masked=not varlen)
    experts = [m for n, m in model.named_modules() if n.endswith(".experts")]
    blocks = [m for m in model.modules() if type(m).__name__ == "NemotronHBlock"]
    return Pass(
        **shape,
        half=recipe.dtype != "float32",
        fused=not missing_kernels(),
        grouped=all(map(is_grouped, experts)),
        whole=any(map(is_fused, blocks)),
        wide=torch.cuda.is_available(),
    )


def predicted_pass(case: Case, lengths: list[int]) -> Pass:
    """What would compute it on a GPU with all kernels."""
    fast = case.fast != "off"
    shape = batch_shape(case, lengths, ROW_MULTIPLE if fast else 1)
    if case.packed: shape |= dict(step=fast, masked=not fast)
    return Pass(**shape, grouped=fast, whole=fast)


class Watch(TrainerCallback):
    """The time of each step, and the first step's peak separately from the others'."""

    def __init__(self):
        self.ends = []  # seconds on the clock
        self.first = None  # bytes; None without a GPU

    def on_step_end(self, args, state, control, **kwargs):
        on_gpu = torch.cuda.is_available()
        if on_gpu: torch.cuda.synchronize()
        self.ends.append(time.perf_counter())
        if on_gpu and self.first is None:
            self.first = torch.cuda.max_memory_allocated()
            torch.cuda.reset_peak_memory_stats()


def train(trainer, weights: int) -> int:
    """Run the steps; the peak in bytes, of which `weights` are allocated before."""
    if not torch.cuda.is_available(): return allocated_on_cpu(trainer.train) + weights
    torch.cuda.reset_peak_memory_stats()
    trainer.train()
    return torch.cuda.max_memory_allocated()


def speed(ends: list[float], tokens: int) -> dict:
    """The fastest step after the first."""
    spent = [b - a for a, b in zip(ends, ends[1:])]
    if not spent: return dict(step_s=None, tokens_per_s=None)
    return dict(step_s=min(spent), tokens_per_s=tokens / min(spent))


def run_steps(case: Case, tuned, rows: Encoded, recipe: Recipe, predicted: dict) -> dict:
    """What is measured, beside what was predicted."""
    run = Path(recipe.out)
    run.mkdir(exist_ok=True)
    watch = Watch()
    weights = 4 * (predicted["parameters"] + predicted["trainable"])  # float32 on the CPU
    try:
        trainer = make_trainer(tuned, sample_tokenizer(), rows, recipe, run, packed=case.packed)
        trainer.add_callback(watch)
        peak = train(trainer, weights) / 2**30
    except torch.OutOfMemoryError as e:
        return dict(out_of_memory=str(e).split(". ")[0], peak_gib=None)
    expected, fixed = predicted["predicted_gib"], predicted["fixed_gib"]
    return dict(
        peak_gib=peak,
        first_step_peak_gib=watch.first and watch.first / 2**30,
        ratio=expected / peak,
        ratio_above_weights=(expected - fixed) / (peak - fixed),
        **speed(watch.ends, predicted["tokens"]),
        loss=trainer.state.log_history[-1].get("train_loss"),
    )


def measure(case: Case, folder: Path, toy: bool, steps: int, seed: int) -> dict:
    """Predicted and measured GiB of one configuration."""
    recipe, lengths = make_recipe(case, folder, toy, steps, seed), row_lengths(case, toy)
    model = apply_fast_parts(load_model(recipe), recipe)
    total, blocks = sum(p.numel() for p in model.parameters()), find_blocks(model, recipe)
    tuned = apply_fast_parts(attach_lora(model, recipe), recipe)
    trainable = sum(p.numel() for p in tuned.parameters() if p.requires_grad)
    p = measured_pass(case, lengths, tuned, recipe)
    fixed = sum(memory_parts(total, trainable, recipe).values())
    activations = sum(activation_peak(model.config, blocks, p, case.checkpointing)) / 2**30
    loaded = torch.cuda.memory_allocated() / 2**30 if torch.cuda.is_available() else None
    predicted = dict(
        parameters=total, trainable=trainable, way=asdict(p), tokens=p.tokens,
        predicted_gib=fixed + activations, fixed_gib=fixed, loaded_gib=loaded,
    )
    rows = synthetic_rows(case, lengths, model.config.vocab_size, seed)
    return predicted | run_steps(case, tuned, rows, recipe, predicted)


def predict(case: Case) -> str:
    """What is predicted for the 30B model with fused kernels; nothing is run."""
    with tempfile.TemporaryDirectory() as folder:
        recipe = make_recipe(case, Path(folder), False, 1, 0)
        model = empty_model(folder)
    blocks = find_blocks(model, recipe)
    p = predicted_pass(case, row_lengths(case, False))
    total, trainable = sum(q.numel() for q in model.parameters()), sum(b.trainable for b in blocks)
    fixed = sum(memory_parts(total, trainable, recipe).values())
    activations = sum(activation_peak(model.config, blocks, p, case.checkpointing)) / 2**30
    expected = f"{fixed + activations:8.2f} GiB, {fixed:.2f} of them fixed"
    return f"{case.name:<46} {p.tokens:>7,} tokens  {expected}"


def free_memory() -> None:
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
            return dict(error=f"{type(e).__name__}: {one_line(e, 300)}", peak_gib=None)


def describe(case: Case, found: dict) -> str:
    """A configuration's result in a line."""
    name, nan = f"{case.name:<46}", float("nan")
    if found.get("error"): return f"{name} {found['error']}"
    if found.get("out_of_memory"):
        return f"{name} predicted {found.get('predicted_gib', nan):8.2f} GiB   out of memory"
    memory = f"predicted {found['predicted_gib']:8.3f} GiB   measured {found['peak_gib']:8.3f}"
    ratios = f"ratio {found['ratio']:.3f}   above weights {found['ratio_above_weights']:.3f}"
    return f"{name} {memory}   {ratios}   {found['tokens_per_s'] or nan:9,.0f} tokens/s"


def summarise(ratios: list[float], tried: int) -> str:
    near = sum(abs(r - 1) <= 0.1 for r in ratios)
    return (
        f"{len(ratios)} of {tried} measured; predicted / measured from {min(ratios):.3f} "
        f"to {max(ratios):.3f}; within 10%: {near}"
    )


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    models = "cpu: the toy; cuda: the 30B model"
    add("--device", choices=("cpu", "cuda"), default="cpu", help=models)
    add("--only", nargs="+", metavar="NAME", help="configurations by name or number")
    add("--steps", type=int, default=3)
    add("--seed", type=int, default=0)
    add("--list", action="store_true")
    add_record_options(parser, __file__)
    args = parser.parse_args()
    if args.device == "cuda" and not args.list and not torch.cuda.is_available():
        parser.error("--device cuda: no GPU is visible")
    return args


def choose_cases(only: list[str] | None) -> list[Case]:
    """Those with these names or numbers; all if none is given."""
    if not only: return CASES
    return [case for i, case in enumerate(CASES, 1) if case.name in only or str(i) in only]


def main() -> None:
    args = parse_arguments()
    chosen = choose_cases(args.only)
    if args.list or not chosen:
        for i, case in enumerate(CASES, 1): print(f"{i:>2}  {predict(case)}")
        return
    toy = args.device == "cpu"
    head = dict(
        benchmark="memory", model="toy" if toy else "Nemotron-3-Nano-30B-A3B, random weights",
        **circumstances(args.commit), seed=args.seed, steps=args.steps,
    )
    note = "; CPU: allocations above the weights, by the profiler" if toy else ""
    print(f"{head['model']}; {head['hardware']}{note}", flush=True)
    ratios = []
    for case in chosen:
        free_memory()
        found = attempt(case, toy, args.steps, args.seed)
        print(describe(case, found), flush=True)
        if "ratio" in found: ratios.append(found["ratio"])
        append_record(args.out, head | dict(case=asdict(case)) | found)
    if ratios: print(summarise(ratios, len(chosen)))


if __name__ == "__main__":
    main()
