"""What several test files and benchmarks share.

Checks of a command's output, a demo's folder, a short run, allocations on the CPU, and what the
examples of a batch owe to each other.
"""
import json
import signal
import subprocess
import sys
from pathlib import Path

import torch
from torch import nn

from medmcqa_lora.bench.profile import allocated_peak
from medmcqa_lora.core.files import read_lines, shipped_file
from medmcqa_lora.core.recipe import Recipe
from medmcqa_lora.core.recipe_files import load_recipe
from medmcqa_lora.data.leakage import load_pair
from medmcqa_lora.data.tokens import encode_questions
from medmcqa_lora.evaluation.letters import letter_logprobs, pad_right
from medmcqa_lora.fast.apply import apply_fast_parts, describe_kernels
from medmcqa_lora.fast.packing import packing_collator
from medmcqa_lora.model.load import load_model
from medmcqa_lora.model.lora import attach_lora
from medmcqa_lora.model.resolve import TOY, load_tokenizer
from medmcqa_lora.training.trainer import make_trainer, run_training


def check_one_line(result, *expected):
    code, out, err = result
    assert code == 1, (out, err)
    assert err.count("\n") == 1 and "Traceback" not in err, err
    for part in expected:
        assert part in err, (part, err)


FIGURES = {"data.png", "loss.png", "by_subject.png", "letters.png", "gain.png"}


def check_demo(out: str, run: Path, n: int):
    """What a finished demo prints and leaves."""
    for part in ("exact McNemar p", "model card", "always one letter"):
        assert part in out, (part, out)
    card = (run / "README.md").read_text()
    comparison = json.loads((run / "comparison.json").read_text())
    assert comparison["verdict"] in card and comparison["gain"]["verdict"] in card
    assert comparison["n"] == n and "unparseable answers" in card
    assert {p.name for p in (run / "figures").iterdir()} == FIGURES
    assert len(read_lines(run / "base/predictions.jsonl")) == n
    assert len(read_lines(run / "tuned/predictions.jsonl")) == n
    assert len(read_lines(run / "base/generations.jsonl")) == n
    assert max(m["peak_memory_gib"] for m in read_lines(run / "metrics.jsonl")) < 8


SHORT_RUN = {"max_steps": "6", "save_steps": "6", "eval_steps": "6", "max_rows": "40"}


def trained(folder: Path, packed: bool, **settings):
    """A short run: the lines of its metrics, those of its evaluations, its adapter's tensors."""
    recipe = load_recipe("toy", SHORT_RUN | settings)
    tokenizer = load_tokenizer(recipe)
    rows, held_out = (encode_questions(r.questions, tokenizer, recipe) for r in load_pair(recipe))
    model = apply_fast_parts(attach_lora(load_model(recipe), recipe), recipe)
    folder.mkdir()
    trainer = make_trainer(model, tokenizer, rows, recipe, folder, held_out, packed)
    run_training(trainer, folder)
    adapter = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    return read_lines(folder / "metrics.jsonl"), read_lines(folder / "evals.jsonl"), adapter


COMMAND = [sys.executable, "-c", "from medmcqa_lora.cli import main; main()"]


def reset_signals() -> None:
    """For `preexec_fn`: under nohup or in a background job, a child inherits ignored signals."""
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)


def start(command: list[str], **popen) -> subprocess.Popen:
    """A process that ends on signals, however the tests were started."""
    first = popen.pop("preexec_fn", None)

    def prepare():
        reset_signals()
        if first:
            first()

    return subprocess.Popen(command, preexec_fn=prepare, **popen)


def allocated_on_cpu(run) -> int:
    """The most bytes that were allocated at once during `run`, by torch's own account."""
    host = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=host, profile_memory=True) as profile:
        run()
    return allocated_peak(profile)


# What an example of a batch owes to its neighbours.

GROUPS = ["attention", "mamba_in", "shared_experts", "routed_experts"]


def make_recipe(blocks: str, dtype: str, folder: Path, seed: int = 0) -> tuple[Recipe, dict]:
    """A recipe for blocks of full size, or for the toy, and the model's configuration."""
    if blocks:
        full_size = json.loads(shipped_file("assets/nemotron_nano_config.json").read_text())
        config = full_size | {"hybrid_override_pattern": blocks}
        model, targets = dict(model=str(folder), weights="random"), GROUPS
    else:
        config = dict(TOY, model_type="nemotron_h")
        model, targets = dict(model="toy-nemotron-h"), [*GROUPS, "mlp"]
    (folder / "config.json").write_text(json.dumps(config))
    return Recipe(**model, dtype=dtype, seed=seed, lora_r=8, lora_targets=targets), config


def adapted(recipe: Recipe) -> nn.Module:
    """The recipe's model in training mode; B and the convolutions' biases are random."""
    model = apply_fast_parts(attach_lora(load_model(recipe), recipe), recipe).train()
    torch.manual_seed(1)
    for name, p in model.named_parameters():
        if "lora_B" in name: nn.init.normal_(p.data, std=0.05)
        elif name.endswith("conv1d.bias"): nn.init.normal_(p.data, std=0.5)
    return model


def example_lengths(chunk: int) -> list[int]:
    """One token, a chunk of Mamba's scan and its neighbours, more than two chunks."""
    return [chunk + 5, 1, chunk - 1, chunk, chunk + 1, 2 * chunk + 9, 3]


def arrange(rows: list[list[int]], device: torch.device) -> dict[str, list[dict]]:
    """Batches of the same examples: alone, padded, packed, and packed without boundaries."""
    ids, mask = pad_right(rows, 0)
    packed = packing_collator()([{"input_ids": r, "labels": r} for r in rows])
    del packed["labels"]
    batches = {
        "alone": [{"input_ids": torch.tensor([r])} for r in rows],
        "padded": [{"input_ids": ids, "attention_mask": mask}],
        "packed": [packed],
        "leaking": [{"input_ids": packed["input_ids"]}],
    }
    def moved(value): return value.to(device) if torch.is_tensor(value) else value
    return {
        name: [{k: moved(v) for k, v in batch.items()} for batch in found]
        for name, found in batches.items()
    }


def logits_and_gradients(model: nn.Module, batches: list[dict]):
    """Logits of all tokens in order (T, vocabulary); LoRA's gradients, by name, of one loss."""
    model.zero_grad(set_to_none=True)
    logits = []
    for batch in batches:
        y = model(**batch, use_cache=False).logits.float()
        logits.append(y[batch["attention_mask"].bool()] if "attention_mask" in batch else y[0])
        logits[-1].sin().sum().backward()  # any function of each token by itself
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    gradients = {n: g.float().clone() for n, g in found.items()}
    return torch.cat([y.detach() for y in logits]), gradients


def relative_distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """The norm of the difference over the norm of b."""
    return float((a - b).norm() / b.norm())


def scoring_distances(model: nn.Module, rows: list[list[int]]) -> dict[str, dict[str, float]]:
    """Largest differences (nats) of letters' log-probabilities from those of an example alone."""
    model.eval()
    def score(rows, **how): return letter_logprobs(model, rows, (3, 4, 5, 6), 0, **how)
    alone = torch.cat([score([r]) for r in rows])
    together = {"scoring, padded": score(rows), "scoring, packed": score(rows, packed=True)}
    return {name: dict(letters=float((x - alone).abs().max())) for name, x in together.items()}


def isolation(recipe: Recipe, chunk: int, vocabulary: int) -> dict:
    """How far examples of a batch are from the same examples alone.

    `differences`: of logits, of the worst matrix' gradient, of scores; `kernels`: which ran;
    `matrices`: how many have a gradient.
    """
    model = adapted(recipe)
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(recipe.seed)
    lengths = example_lengths(chunk)
    rows = [torch.randint(3, vocabulary, (n,), generator=generator).tolist() for n in lengths]
    found = {name: logits_and_gradients(model, b) for name, b in arrange(rows, device).items()}
    logits, gradients = found.pop("alone")
    differences = {}
    for name, (y, g) in found.items():
        worst = max(relative_distance(g[n], gradients[n]) for n in gradients)
        differences[name] = dict(logits=relative_distance(y, logits), gradients=worst)
    differences |= scoring_distances(model, rows)
    kernels = describe_kernels(model, recipe, (True, "asked for")).splitlines()
    return dict(differences=differences, kernels=kernels, matrices=len(gradients))
