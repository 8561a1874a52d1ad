"""Steps that must not train, and memory that runs out: what a run does, what it says, and what is left of it."""
import errno
import json
import math
import os
import socket
import subprocess
import sys
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from conftest import ALL, ROOT
from safetensors.torch import load_file
from transformers import TrainerCallback
from transformers.utils import logging

from medmcqa_lora.training import checkpoints, metrics
from medmcqa_lora.data.leakage import load_pair
from medmcqa_lora.data.tokens import encode_questions
from medmcqa_lora.core.files import DiskError, read_lines
from medmcqa_lora.training.memory.fit import needed
from medmcqa_lora.training.bad_steps import EXPLODED, IN_A_ROW
from medmcqa_lora.model.resolve import load_tokenizer
from medmcqa_lora.model.load import load_model
from medmcqa_lora.model.lora import attach_lora
from medmcqa_lora.training.memory.fit import RESERVE
from medmcqa_lora.core.recipe import Recipe, problems
from medmcqa_lora.core.recipe_files import load_recipe, read_values
from medmcqa_lora.training.stopping import StopOnRequest, Stopped
from medmcqa_lora.training.trainer import make_trainer, train
from medmcqa_lora.fast.apply import apply_fast_parts

logging.disable_progress_bar()
pytestmark = pytest.mark.usefixtures("one_thread")


class Spoil(TrainerCallback):
    """Spoils what a model computes, or its gradients, in some steps, by a factor that a recorded step reads as well; keeps the rows that went to the model."""

    def __init__(self, model, steps, how):
        first = next(p for p in model.parameters() if p.requires_grad)
        self.on, self.steps, self.how, self.seen, self.scale = False, set(steps), how, {}, torch.ones((), device=first.device)
        self.factor = {"loss": math.nan, "gradient": math.inf}.get(how, 1e3)
        if how == "gradient":
            first.register_hook(lambda g: g * self.scale)
        elif how != "none":
            last = [m for n, m in model.named_modules() if n.endswith("norm_f")][0]
            last.register_forward_hook(self.spoil)

    def spoil(self, module, args, out):
        if self.on and self.how == "memory":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.50 MiB. GPU 0 has a total capacity of 79.11 GiB of which 1.00 MiB is free.")
        return out * self.scale.to(out.dtype)

    def watch(self, trainer):
        """See the rows on their way to the model: a recorded step runs no hook of a module."""
        prepare = trainer._prepare_inputs

        def look(inputs):
            if trainer.model.training:
                self.seen.setdefault(self.step, []).append(inputs["input_ids"].clone())
            return prepare(inputs)

        trainer._prepare_inputs = look

    def on_step_begin(self, args, state, control, **kwargs):
        self.step = state.global_step + 1
        self.on = self.step in self.steps
        self.scale.fill_(self.factor if self.on else 1.0)


def made(folder: Path, bad=(), how="none", processes=1, labels=True, **settings):
    """A trainer whose model is spoiled in some steps, and its spoiler."""
    settings = dict(max_steps=6, save_steps=2, per_device_train_batch_size=2, learning_rate=1e-2, lr_scheduler_type="constant", target="letter_and_text", warmup_steps=0,
                    dtype="bfloat16" if torch.cuda.is_available() else "float32") | settings  # a GPU records steps
    recipe = Recipe(model="toy-nemotron-h", lora_r=4, lora_alpha=8, lora_targets=["attention", "mamba_in", "shared_experts"], **settings)
    tokenizer = load_tokenizer(recipe)
    encoded, held_out = (encode_questions(part.questions[:12], tokenizer, recipe) for part in load_pair(recipe))
    if not labels:
        encoded = type(encoded)(encoded.rows.map(lambda r: {"labels": [-100] * len(r["labels"])}), [], encoded.tokens, [], "", encoded.questions)
    folder.mkdir(exist_ok=True)
    model = apply_fast_parts(attach_lora(load_model(recipe), recipe), recipe)
    trainer = make_trainer(model, tokenizer, encoded, recipe, folder, held_out, packed=recipe.packing != "off")
    spoiler = Spoil(model, bad, how)
    trainer.add_callback(spoiler)
    spoiler.watch(trainer)
    return trainer, spoiler


def asked(trainer, step: int):
    """The trainer, told to stop while it makes a step, as by Ctrl-C."""

    class Ask(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step + 1 == step:
                next(c for c in trainer.callback_handler.callbacks if isinstance(c, StopOnRequest)).ask()

    trainer.add_callback(Ask())
    return trainer


def kept_lines(folder: Path) -> list[dict]:
    """What a run's lines say about losses and skipped steps."""
    return [{k: m[k] for k in ("step", "loss", "skipped", "examples", "tokens") if k in m} for m in read_lines(folder / "metrics.jsonl")]


def adapter(model) -> dict:
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def named(trainer, rows: list[torch.Tensor], padded: bool) -> list[str]:
    """The ids of the questions in batches that the model saw, by their tokens."""
    whole = {tuple(r["input_ids"]): trainer.guard.encoded.questions[r["question"]].id for r in trainer.guard.encoded.rows}
    found = []
    for row in rows:
        if padded:
            found += [next(i for ids, i in whole.items() if tuple(r[: len(ids)].tolist()) == ids) for r in row]
        else:
            rest = tuple(row[0].tolist())
            while len(set(rest)) > 1:  # behind the last, a GPU's rows are filled up with one token
                ids = next(ids for ids in whole if rest[: len(ids)] == ids)
                found.append(whole[ids])
                rest = rest[len(ids) :]
    return found


@pytest.mark.parametrize("packing", ["auto", "off"])
@pytest.mark.parametrize("how", ["loss", "gradient"])
def test_a_bad_step_stops_the_run_and_touches_nothing(tmp_path, how, packing):
    """Found two steps later, when a line is due: no update has happened since, and the message names the examples."""
    if not ALL and (how, packing) not in (("loss", "auto"), ("gradient", "off")):
        pytest.skip("make test-all: the other two ways")
    settings = dict(packing=packing, logging_steps=5, save_steps=2, gradient_accumulation_steps=2)
    trainer, spoiler = made(tmp_path / "run", {3}, how, **settings)
    with pytest.raises(ValueError) as stopped:
        train(trainer, tmp_path / "run")
    ids = named(trainer, spoiler.seen[3], packing == "off")
    said = str(stopped.value)
    assert len(ids) == 4 and f"examples {', '.join(ids)}; the last checkpoint is checkpoint-2; --resume and -p on_bad_step skip" in said and "\n" not in said
    assert said.startswith("step 3: the loss is nan; lower learning_rate" if how == "loss" else "step 3: the gradients' norm is ")
    assert trainer.state.global_step == 4  # a checkpoint was due
    assert json.loads((tmp_path / "run/bad_step.json").read_text())["examples"] == ids
    assert [p.name for p in (tmp_path / "run/checkpoints").iterdir()] == ["checkpoint-2"]
    good, _ = made(tmp_path / "good", max_steps=2, **settings | dict(logging_steps=1))
    train(good, tmp_path / "good")
    assert same(adapter(trainer.model), adapter(good.model))
    saved, other = (load_file(tmp_path / f / "checkpoints/checkpoint-2/adapter_model.safetensors") for f in ("run", "good"))
    assert same(saved, other)


@pytest.mark.parametrize("packing", ["auto", "off"])
def test_skipped_steps_are_recorded_and_the_rest_goes_on(tmp_path, packing):
    """An update that did not happen leaves moments and count of steps alone, too; the schedule goes on."""
    trainer, spoiler = made(tmp_path / "run", {3, 4}, "loss", packing=packing, logging_steps=2, on_bad_step="skip")
    result = train(trainer, tmp_path / "run")
    lines = read_lines(tmp_path / "run/metrics.jsonl")
    assert [(m["step"], m.get("skipped")) for m in lines] == [(2, None), (3, "the loss is nan"), (4, "the loss is nan"), (6, None)]
    assert [m["examples"] for m in lines[1:3]] == [named(trainer, spoiler.seen[n], packing == "off") for n in (3, 4)]
    assert lines[1]["step_loss"] == "nan" and all(math.isfinite(m["loss"]) for m in (lines[0], lines[3]))
    assert all(p.isfinite().all() for p in adapter(trainer.model).values()) and result["steps"] == 6
    steps = {float(s["step"]) for s in trainer.optimizer.optimizer.state.values()}
    assert steps == {4.0}
    assert "NaN" not in (tmp_path / "run/checkpoints/checkpoint-6/trainer_state.json").read_text().replace('"entropy": NaN', "")


def test_a_line_holds_the_good_steps_alone(tmp_path):
    trainer, _ = made(tmp_path / "run", {2}, "loss", logging_steps=3, max_steps=3, save_steps=3, on_bad_step="skip")
    train(trainer, tmp_path / "run")
    single, _ = made(tmp_path / "single", {2}, "loss", max_steps=3, save_steps=3, on_bad_step="skip")
    train(single, tmp_path / "single")
    lines, each = (read_lines(tmp_path / f / "metrics.jsonl") for f in ("run", "single"))
    assert [m["step"] for m in lines] == [2, 3] and [m["step"] for m in each] == [1, 2, 3]
    assert lines[1]["loss"] == pytest.approx((each[0]["loss"] + each[2]["loss"]) / 2, rel=1e-6)


def test_lines_of_skipped_steps_wait_for_room_too(tmp_path, capsys):
    """save_errors = warn, and a disk that is full while steps 3 to 5 are made: nothing stops, and the lines come in their order."""
    trainer, _ = made(tmp_path / "run", {3}, "loss", logging_steps=2, on_bad_step="skip", save_errors="warn")
    append = metrics.append_lines

    def append_lines(path, lines):
        if 3 <= trainer.state.global_step <= 5:
            raise DiskError(f"{path}: can't be written (No space left on device)")
        append(path, lines)

    with patch.object(metrics, "append_lines", append_lines):
        train(trainer, tmp_path / "run")
    assert [(m["step"], "skipped" in m) for m in read_lines(tmp_path / "run/metrics.jsonl")] == [(2, False), (3, True), (4, False), (6, False)]
    assert capsys.readouterr().err.count("its lines wait (save_errors = warn)") == 2


def test_too_many_skipped_steps_stop_the_run(tmp_path):
    trainer, _ = made(tmp_path / "run", range(2, 40), "loss", max_steps=20, save_steps=20, logging_steps=4, on_bad_step="skip")
    with pytest.raises(ValueError, match=f"step {IN_A_ROW + 1}: the loss is nan.*{IN_A_ROW} steps in a row were skipped"):
        train(trainer, tmp_path / "run")
    assert [m["step"] for m in read_lines(tmp_path / "run/metrics.jsonl") if "skipped" in m] == [*range(2, IN_A_ROW + 1)]


def test_going_on_past_a_bad_step(tmp_path):
    """As the message says: --resume with on_bad_step skip; ends as if the step had been skipped from the start."""
    trainer, _ = made(tmp_path / "run", {3}, "loss")
    with pytest.raises(ValueError, match="step 3"):
        train(trainer, tmp_path / "run")
    again, _ = made(tmp_path / "run", {3}, "loss", on_bad_step="skip")
    train(again, tmp_path / "run", resume=True)
    whole, _ = made(tmp_path / "whole", {3}, "loss", on_bad_step="skip")
    train(whole, tmp_path / "whole")
    assert same(adapter(again.model), adapter(whole.model))
    found, wanted = ([{k: m[k] for k in ("step", "loss", "examples", "tokens") if k in m} for m in read_lines(tmp_path / f / "metrics.jsonl")] for f in ("run", "whole"))
    assert found == wanted
    memory = [next(e for e in t.state.log_history if "guard" in e) for t in (again, whole)]
    assert memory[0] == memory[1] and memory[0]["guard"][0] == 5.0  # it judges by the same reference


@pytest.mark.parametrize("how", ["loss", "explode"])
def test_going_on_between_a_bad_step_and_its_line(tmp_path, how):
    """A checkpoint before the line that a skipped step belongs to: the sum of losses may be no number, and the line of a resumed run has the good steps' mean all the same."""
    settings = dict(logging_steps=10, save_steps=5, max_steps=10, on_bad_step="skip", seed=3)

    def spoiled(folder):
        trainer, spoiler = made(folder, {3}, how, **settings)
        spoiler.factor = math.nan if how == "loss" else 1e6
        return trainer

    class Lost(RuntimeError):
        pass

    class Kill(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 7:
                raise Lost

    (trainer := spoiled(tmp_path / "run")).add_callback(Kill())
    with pytest.raises(Lost):
        train(trainer, tmp_path / "run")
    own = json.loads((tmp_path / "run/checkpoints/checkpoint-5/loop.json").read_text())["processes"][0]
    assert (own["loss"] is None) == (how == "loss") and own["logged"] == 0
    train(again := spoiled(tmp_path / "run"), tmp_path / "run", resume=True)
    train(whole := spoiled(tmp_path / "whole"), tmp_path / "whole")
    assert same(adapter(again.model), adapter(whole.model)) and kept_lines(tmp_path / "run") == kept_lines(tmp_path / "whole")
    assert [m["step"] for m in kept_lines(tmp_path / "run")] == [3, 10] and kept_lines(tmp_path / "run")[1]["loss"] < 15


def test_the_checkpoint_at_a_request_is_looked_at(tmp_path):
    """Ctrl-C between two looks: what was bad since the last one is found before the checkpoint is written, and what was skipped is in the log."""
    settings = dict(logging_steps=10, save_steps=10, max_steps=10)
    trainer, _ = made(tmp_path / "stop", {3}, "loss", **settings)
    with pytest.raises(ValueError, match="step 3: the loss is nan.*there is no checkpoint yet"):
        train(asked(trainer, 4), tmp_path / "stop")
    assert not list((tmp_path / "stop").glob("checkpoints/*"))
    trainer, _ = made(tmp_path / "skip", {3}, "loss", on_bad_step="skip", **settings)
    with pytest.raises(Stopped, match="behind step 4 as asked, with checkpoint-4"):
        train(asked(trainer, 4), tmp_path / "skip")
    assert [(m["step"], m["skipped"]) for m in read_lines(tmp_path / "skip/metrics.jsonl")] == [(3, "the loss is nan")]
    memory, = (e for e in trainer.state.log_history if "guard" in e)
    assert (memory["step"], memory["guard"][0]) == (4, 3.0)
    again, _ = made(tmp_path / "skip", {3}, "loss", on_bad_step="skip", **settings)
    train(again, tmp_path / "skip", resume=True)
    whole, _ = made(tmp_path / "whole", {3}, "loss", on_bad_step="skip", **settings)
    train(whole, tmp_path / "whole")
    assert same(adapter(again.model), adapter(whole.model)) and kept_lines(tmp_path / "skip") == kept_lines(tmp_path / "whole")


def test_a_request_waits_for_a_checkpoint_worth_it(tmp_path):
    """The loss of the step is suspiciously high: the guard puts the checkpoint off, and training ends behind the next step."""
    trainer, spoiler = made(tmp_path / "run", {7}, "explode", max_steps=12, save_steps=12)
    spoiler.factor = 20.0
    with pytest.raises(Stopped, match="behind step 8 as asked, with checkpoint-8"):
        train(asked(trainer, 7), tmp_path / "run")
    assert [p.name for p in (tmp_path / "run/checkpoints").iterdir()] == ["checkpoint-8"]


@pytest.mark.parametrize("saved", [2, 0])
def test_a_request_on_a_full_disk_names_what_is_there(tmp_path, saved):
    """save_errors = warn: transformers takes a checkpoint for saved that isn't; neither the message nor the heartbeat does."""
    trainer, _ = made(tmp_path / "run", save_errors="warn", save_steps=2)
    write, noted = checkpoints.write_parts, []

    def write_parts(trainer, work):
        if trainer.state.global_step > saved:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(trainer, work)

    said = f"stopped behind step 4 as asked, but checkpoint-4 could not be saved \\({'the last one is checkpoint-2' if saved else 'there is none before it'}\\); go on"
    with patch.object(checkpoints, "write_parts", write_parts), patch.object(metrics, "note", lambda **facts: noted.append(facts)), pytest.raises(Stopped, match=said):
        train(asked(trainer, 4), tmp_path / "run")
    assert noted == [dict(checkpoint="checkpoints/checkpoint-2")] * (saved == 2)


def test_a_loss_that_explodes_stops_the_run(tmp_path):
    """Above the limit no checkpoint is written, though the running mean is not there yet."""
    trainer, _ = made(tmp_path / "run", range(7, 40), "explode", max_steps=20, save_steps=1, save_total_limit=2, per_device_train_batch_size=4)
    with pytest.raises(ValueError, match=rf"step \d+: the loss exploded: [\d.e+]+, {EXPLODED:g} times what it began with.*the last checkpoint is checkpoint-6"):
        train(trainer, tmp_path / "run")
    assert sorted(p.name for p in (tmp_path / "run/checkpoints").iterdir()) == ["checkpoint-5", "checkpoint-6"]


def test_a_checkpoint_is_put_off_while_a_loss_is_high(tmp_path):
    """One such step is no explosion yet, but nothing to go on from: the checkpoint of the step before stays the newest until things look better."""
    trainer, spoiler = made(tmp_path / "run", {7}, "explode", max_steps=8, save_steps=1, save_total_limit=8)
    spoiler.factor = 20.0
    train(trainer, tmp_path / "run")
    losses = [m["loss"] for m in read_lines(tmp_path / "run/metrics.jsonl")]
    reference = sum(losses[:5]) / 5
    assert len(losses) == 8 and losses[6] > EXPLODED * reference > losses[7]
    assert sorted(p.name for p in (tmp_path / "run/checkpoints").iterdir()) == [f"checkpoint-{n}" for n in (1, 2, 3, 4, 5, 6, 8)]


@pytest.mark.parametrize("packing", ["auto", "off"])
def test_masked_targets_stop_the_run(tmp_path, packing):
    trainer, spoiler = made(tmp_path / "run", labels=False, packing=packing)
    with pytest.raises(ValueError, match="step 1: no token of it is to be learned: all labels are masked; .*there is no checkpoint yet") as stopped:
        train(trainer, tmp_path / "run")
    assert ", ".join(named(trainer, spoiler.seen[1], packing == "off")) in str(stopped.value)


def test_a_learning_rate_of_0(tmp_path):
    """The first step of a warm-up has it by design; a run that has nothing else is stopped, or refused where the recipe says so already."""
    assert problems(load_recipe("toy", {"max_steps": "2", "warmup_steps": "1"})) == []
    with pytest.raises(ValueError, match="warmup_steps leaves the only step of max_steps = 1 a learning rate of 0"):
        load_recipe("toy", {"max_steps": "1", "warmup_steps": "2", "lr_scheduler_type": "linear"})
    settings = dict(warmup_steps=2, lr_scheduler_type="linear", per_device_train_batch_size=12, num_train_epochs=1.0)
    trainer, _ = made(tmp_path / "one", max_steps=-1, **settings)  # an epoch of a step
    with pytest.raises(ValueError, match="step 1: the learning rate is 0, so nothing would be learned"):
        train(trainer, tmp_path / "one")
    two, _ = made(tmp_path / "two", max_steps=2, **settings)
    assert train(two, tmp_path / "two")["steps"] == 2


@pytest.mark.parametrize("logging_steps, steps", [(10, [3]), (2, [2, 3]), (3, [3])])
def test_the_last_steps_have_a_line(tmp_path, logging_steps, steps):
    """Three steps, by epochs: a line at the end, once, whether it is due there or not."""
    trainer, _ = made(tmp_path / "run", max_steps=-1, num_train_epochs=1.0, per_device_train_batch_size=4, logging_steps=logging_steps)
    result = train(trainer, tmp_path / "run")
    lines = read_lines(tmp_path / "run/metrics.jsonl")
    assert [m["step"] for m in lines] == steps and result["steps"] == 3 and result["last_loss"] == lines[-1]["loss"]


def test_a_run_of_skipped_steps_alone_is_an_error(tmp_path):
    trainer, _ = made(tmp_path / "run", range(1, 4), "loss", max_steps=3, on_bad_step="skip")
    with pytest.raises(ValueError, match="metrics.jsonl: holds no loss, so there is nothing to report: all steps were skipped"):
        train(trainer, tmp_path / "run")
    assert [m["step"] for m in read_lines(tmp_path / "run/metrics.jsonl") if "skipped" in m] == [1, 2, 3]


def test_evaluation_rows_without_a_loss(tmp_path):
    trainer, _ = made(tmp_path / "run", eval_steps=2)
    last = [m for n, m in trainer.model.named_modules() if n.endswith("norm_f")][0]
    last.register_forward_hook(lambda m, a, out: out if m.training else out * math.nan)
    with pytest.raises(ValueError, match="step 2: the loss on the evaluation rows is nan; .*there is no checkpoint yet"):
        train(trainer, tmp_path / "run")
    assert not (tmp_path / "run/evals.jsonl").exists()


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    """Whatever the losses say: here one is spoiled behind the optimizer's back, where no loss sees it."""
    trainer, _ = made(tmp_path / "run", save_steps=2)

    class Break(TrainerCallback):
        def on_optimizer_step(self, args, state, control, model=None, **kwargs):
            with torch.no_grad():
                next(p for p in model.parameters() if p.requires_grad).view(-1)[0] = math.inf if state.global_step == 3 else 0.0

    trainer.add_callback(Break())
    with pytest.raises(ValueError, match="step 4: weights of the adapter are not finite; lower learning_rate; the last checkpoint is checkpoint-2"):
        train(trainer, tmp_path / "run")
    assert [p.name for p in (tmp_path / "run/checkpoints").iterdir()] == ["checkpoint-2"]


def test_a_step_asks_the_device_for_nothing(tmp_path):
    """Between two looks no number of the guard's goes to the host; on a GPU each would be a wait."""
    trainer, _ = made(tmp_path / "run", max_steps=3, save_steps=3, logging_steps=3)
    judged = trainer.guard.judged

    def refuse(self, *args):
        raise AssertionError("a synchronisation")

    def watched(norm):
        with patch.multiple(torch.Tensor, item=refuse, tolist=refuse, __bool__=refuse, __float__=refuse, __int__=refuse, numpy=refuse, cpu=refuse):
            judged(norm)

    trainer.guard.judged = watched
    assert train(trainer, tmp_path / "run")["steps"] == 3


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
def test_recorded_steps_are_judged_without_waiting(tmp_path):
    """The same where it counts: torch refuses every wait within the judgement, and a bad recorded step is left out."""
    trainer, _ = made(tmp_path / "run", {4}, "gradient", max_steps=8, save_steps=8, logging_steps=8, on_bad_step="skip", dtype="bfloat16")
    judged = trainer.guard.judged

    def watched(norm):
        torch.cuda.set_sync_debug_mode("error")
        try:
            judged(norm)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    trainer.guard.judged = watched
    train(trainer, tmp_path / "run")
    assert not trainer.training_step.why and trainer.training_step.recorded
    assert [m["step"] for m in read_lines(tmp_path / "run/metrics.jsonl") if "skipped" in m] == [4]
    assert all(p.isfinite().all() for p in adapter(trainer.model).values()) and {float(s["step"]) for s in trainer.optimizer.optimizer.state.values()} == {7.0}


def test_memory_that_runs_out_is_one_line(tmp_path):
    """What was asked, the largest parts, and two changes, each of which the plan says would fit."""
    trainer, _ = made(tmp_path / "run", {3}, "memory", per_device_train_batch_size=4)
    with pytest.raises(ValueError, match=r"^out of memory: 1.50 MiB more were asked for, and this GPU has 79.1 GiB in all; the plan's largest parts are \w+ .*would fit") as stopped:
        train(trainer, tmp_path / "run")
    said, recipe = str(stopped.value), trainer.guard.recipe
    assert "\n" not in said
    room = min(79.11 / RESERVE, needed(recipe, 1).sum() - 1.5 / 1024)
    ways = said.partition("by the plan ")[2].partition(" would fit")[0].split(", or ")
    assert len(ways) == 2
    for way in ways:
        changed = {k: v for k, _, v in (w.partition(" ") for w in way.removeprefix("-p ").split(" -p "))}
        values, bad = read_values(changed, "-p")
        assert not bad and needed(Recipe(**vars(recipe) | values), 1).sum() <= room
    assert [p.name for p in (tmp_path / "run/checkpoints").iterdir()] == ["checkpoint-2"]


MEMORY = """
import sys
if any("ipykernel" in word for word in sys.orig_argv):
    from importlib import import_module
    import torch
    def gone(*args, **kwargs): raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.50 GiB. GPU 0 has a total capacity of 79.11 GiB of which 1.00 MiB is free.")
    module, name = {where!r}
    setattr(import_module(module), name, gone)
"""


@pytest.mark.skipif(not ALL, reason="make test-all; training.bad_steps has the words, evaluation.letters has scoring in its own process")
@pytest.mark.parametrize("where, command, said", [
    (("medmcqa_lora.model.load", "_load_hf"), "train", "loading toy-nemotron-h, whose weights take 1.30 MiB in float32; see who else uses the memory"),
    (("medmcqa_lora.evaluation.letters", "letters_ahead"), "evaluate", "scoring 32 questions at once; lower per_device_eval_batch_size and go on with --resume"),
], ids=["loading", "scoring"])
def test_memory_that_runs_out_elsewhere(tmp_path, where, command, said):
    """By the public command, in whose kernel the allocator gives up in one place."""
    (tmp_path / "sitecustomize.py").write_text(MEMORY.format(where=where))
    done = subprocess.run([sys.executable, "-c", "from medmcqa_lora.cli import main; main()", command, "--recipe", "toy", "--out", str(tmp_path / "run")],
                          capture_output=True, text=True, timeout=300, env=os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])})
    assert done.returncode == 1 and done.stderr.strip().splitlines()[-1].startswith(f"medmcqa-lora: rank 0: out of memory: 1.5 GiB more were asked for, and this GPU has 79.1 GiB in all, {said}"), done.stderr[-3000:]


PROCESS = """
import json, os, sys; sys.path[:0] = {path!r}
from pathlib import Path
import torch; torch.set_num_threads(1)
import test_bad_steps as t
rank, found = int(os.environ["RANK"]), {{}}
for name, how, bad, settings in {cases!r}:
    folder = Path({folder!r}) / name
    trainer, spoiler = t.made(folder, bad if rank == 1 else (), how, processes=2, **settings)
    try: t.train(trainer, folder)
    except ValueError as e: found[name] = dict(said=str(e))
    else: found[name] = dict(said="")
    weights = {{n: p.full_tensor() if hasattr(p, "full_tensor") else p for n, p in t.adapter(trainer.model).items()}}
    found[name] |= dict(sum=float(sum(p.double().sum() for p in weights.values())), finite=all(bool(p.isfinite().all()) for p in weights.values()),
                        rows=t.named(trainer, spoiler.seen[3], settings.get("packing") == "off"), step=trainer.state.global_step)
    from accelerate.state import AcceleratorState
    AcceleratorState._reset_state(True)
Path({folder!r}, f"{{rank}}.json").write_text(json.dumps(found))
torch.distributed.barrier()
os._exit(0)  # taking DDP apart, torch 2.13 may wait for gloo's thread, which waits for the GIL
"""


def in_two(folder: Path, cases: list) -> list[dict]:
    """What two processes found, each."""
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = s.getsockname()[1]
    code = PROCESS.format(path=[str(ROOT / "tests/training"), str(ROOT / "tests"), str(ROOT)], folder=str(folder), cases=cases)
    env = os.environ | dict(WORLD_SIZE="2", MASTER_ADDR="localhost", MASTER_PORT=str(port), OMP_NUM_THREADS="1")
    started = [subprocess.Popen([sys.executable, "-c", code], env=env | dict(RANK=str(r), LOCAL_RANK=str(r)), cwd=ROOT) for r in range(2)]
    try:
        assert [p.wait(300) for p in started] == [0, 0]
    finally:
        for p in started:
            p.kill()
    return [json.loads((folder / f"{r}.json").read_text()) for r in range(2)]


def test_all_processes_decide_the_same(tmp_path):
    """The second process' loss alone is no number: both stop at the same step, and name its examples; or both leave the step out."""
    settings = dict(logging_steps=3, save_steps=6)
    cases = [("stop", "loss", [3], settings), ("skip", "loss", [3], settings | dict(on_bad_step="skip"))]
    if ALL:
        cases += [("gradient", "gradient", [3], settings), ("off", "loss", [3], settings | dict(packing="off")), ("fast_off", "loss", [3], settings | dict(fast="off", on_bad_step="skip")),
                  ("shares", "loss", [3], settings | dict(parallel="fsdp", on_bad_step="skip")), ("shares_stop", "loss", [3], settings | dict(parallel="fsdp"))]
    first, second = in_two(tmp_path, cases)
    for name, how, _, chosen in cases:
        a, b = first[name], second[name]
        assert a["said"] == b["said"] and a["sum"] == b["sum"] and a["finite"] and a["step"] == b["step"], name
        if chosen.get("on_bad_step") == "skip":
            line = next(m for m in read_lines(tmp_path / name / "metrics.jsonl") if "skipped" in m)
            assert (a["said"], a["step"], line["step"], line["examples"]) == ("", 6, 3, b["rows"]), name
        elif how == "loss":
            assert a["said"].startswith("step 3: the loss is nan") and ", ".join(b["rows"]) in a["said"] and not any(i in a["said"] for i in a["rows"]), name
        else:  # the gradients are everybody's
            assert a["said"].startswith("step 3: the gradients' norm is") and ", ".join(a["rows"] + b["rows"]) in a["said"], name
