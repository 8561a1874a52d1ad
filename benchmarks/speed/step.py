"""Seconds of a training step: ours (metrics, progress, checkpoints' bookkeeping) beside TRL's own
SFTTrainer.

    python benchmarks/speed/step.py [RECIPE] [PAIRS] [STEPS]

Same model, rows, order and batch; a pair is STEPS steps of each, timed from the end of the first
to the end of the last. Target: the median of the pairs' ratios at most 1.05.
"""

import sys
import tempfile
import time
from functools import partial
from pathlib import Path

from transformers import PrinterCallback, TrainerCallback
from trl import SFTConfig, SFTTrainer

from benchmarks.common import alternate, record
from medmcqa_lora.bench.profile import median_and_range
from medmcqa_lora.core.recipe_files import load_recipe
from medmcqa_lora.data.questions import load_questions
from medmcqa_lora.data.tokens import encode_questions
from medmcqa_lora.fast.apply import apply_fast_parts
from medmcqa_lora.model.load import load_model
from medmcqa_lora.model.lora import attach_lora
from medmcqa_lora.model.resolve import load_tokenizer
from medmcqa_lora.training.trainer import make_trainer


class StepEnds(TrainerCallback):
    """When steps ended."""

    def __init__(self):
        self.times = []

    def on_step_end(self, args, state, control, **kwargs):
        self.times.append(time.perf_counter())


def plain_trainer(model, tokenizer, encoded, recipe, run: Path) -> SFTTrainer:
    """What a script would write: TRL's trainer on the same tokens, with the same optimisation
    and no progress bar.
    """
    args = SFTConfig(
        output_dir=str(run), max_steps=recipe.max_steps, seed=recipe.seed, data_seed=recipe.seed,
        per_device_train_batch_size=recipe.per_device_train_batch_size,
        learning_rate=recipe.learning_rate, lr_scheduler_type=recipe.lr_scheduler_type,
        bf16=False, use_cpu=True, gradient_checkpointing=False,
        max_length=None, dataset_kwargs={"skip_prepare_dataset": True},
        logging_steps=1, save_strategy="no", report_to="none", disable_tqdm=True,
    )
    data = dict(train_dataset=encoded.rows, processing_class=tokenizer)
    trainer = SFTTrainer(model=model, args=args, **data)
    trainer.remove_callback(PrinterCallback)
    return trainer


def seconds_per_step(make, model, tokenizer, encoded, recipe) -> float:
    """Of a trainer's run, from the end of its first step."""
    ends = StepEnds()
    with tempfile.TemporaryDirectory() as run:
        trainer = make(model, tokenizer, encoded, recipe, Path(run))
        trainer.add_callback(ends)
        trainer.train()
    return (ends.times[-1] - ends.times[0]) / (len(ends.times) - 1)


def main() -> None:
    defaults = ["toy", "20", "11"]
    given = sys.argv[1:4]
    name, pairs, steps = [*given, *defaults[len(given) :]]
    recipe = load_recipe(name, {"max_steps": steps, "save_steps": "1000"})
    tokenizer = load_tokenizer(recipe)
    encoded = encode_questions(load_questions("sample", "train").questions, tokenizer, recipe)
    model = apply_fast_parts(attach_lora(load_model(recipe), recipe), recipe)
    trainers = {"ours": make_trainer, "bare TRL": plain_trainer}
    shared = (model, tokenizer, encoded, recipe)
    runs = {way: partial(seconds_per_step, make, *shared) for way, make in trainers.items()}
    taken = alternate(runs, int(pairs))
    ratios = [a / b for a, b in zip(taken["ours"], taken["bare TRL"])]
    settings = dict(recipe=name, steps=int(steps), seed=recipe.seed)
    results = {f"{way}, s a step": median_and_range(t) for way, t in taken.items()}
    record("step", settings, results | {"ratio ours / bare TRL": median_and_range(ratios)})


if __name__ == "__main__":
    main()
