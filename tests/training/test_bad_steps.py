"""Steps that must not train, and memory that runs out: what a run does, says and leaves."""
import errno
import json
import math
import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
from conftest import ALL, ROOT
from safetensors.torch import load_file
from transformers import TrainerCallback
from transformers.utils import logging

from medmcqa_lora.core.files import DiskError, read_lines
from medmcqa_lora.core.recipe import Recipe, recipe_problems
from medmcqa_lora.core.recipe_files import load_recipe, read_values
from medmcqa_lora.data.leakage import load_pair
from medmcqa_lora.data.tokens import encode_questions
from medmcqa_lora.fast.apply import apply_fast_parts
from medmcqa_lora.model.load import load_model
from medmcqa_lora.model.lora import attach_lora
from medmcqa_lora.model.resolve import load_tokenizer
from medmcqa_lora.training import checkpoints, metrics
from medmcqa_lora.training.bad_steps import EXPLOSION_FACTOR, MAX_BAD_IN_A_ROW, BadStepCallback
from medmcqa_lora.training.memory.fit import RESERVE, memory_needed
from medmcqa_lora.training.stopping import StopOnRequest, Stopped
from medmcqa_lora.training.trainer import make_trainer, run_training

logging.disable_progress_bar()
pytestmark = pytest.mark.usefixtures("one_thread")


def output_norm(model):
    """The model's last norm, whose output the head reads."""
    return next(m for n, m in model.named_modules() if n.endswith("norm_f"))


class Spoil(TrainerCallback):
    """Spoils what a model computes, or its gradients, in some steps; keeps the rows it saw.

    It multiplies by a factor on the device, which a captured step reads as well.
    """

    def __init__(self, model, steps, how):
        first = next(p for p in model.parameters() if p.requires_grad)
        self.on = False  # in this step
        self.steps = set(steps)
        self.how = how
        self.seen = {}  # step -> rows
        self.scale = torch.ones((), device=first.device)
        self.factor = {"loss": math.nan, "gradient": math.inf}.get(how, 1e3)
        if how == "gradient":
            first.register_hook(lambda g: g * self.scale)
        elif how != "none":
            output_norm(model).register_forward_hook(self.spoil)

    def spoil(self, module, args, out):
        if self.on and self.how == "memory":
            raise torch.OutOfMemoryError(
                "CUDA out of memory. Tried to allocate 1.50 MiB. "
                "GPU 0 has a total capacity of 79.11 GiB of which 1.00 MiB is free.")
        return out * self.scale.to(out.dtype)

    def watch(self, trainer):
        """See the rows on their way to the model: a captured step runs no hook of a module."""
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


DEFAULTS = dict(
    max_steps=6, save_steps=2, per_device_train_batch_size=2, learning_rate=1e-2, warmup_steps=0,
    lr_scheduler_type="constant", target="letter_and_text",
    dtype="bfloat16" if torch.cuda.is_available() else "float32",  # a GPU captures steps
)


def mask_labels(encoded):
    """The same examples, with nothing to learn."""
    masked = encoded.rows.map(lambda r: {"labels": [-100] * len(r["labels"])})
    return type(encoded)(masked, [], encoded.tokens, [], "", encoded.questions)


def made(folder: Path, bad=(), how="none", labels=True, **settings):
    """A trainer whose model is spoiled in some steps, and its spoiler."""
    targets = ["attention", "mamba_in", "shared_experts"]
    recipe = Recipe(model="toy-nemotron-h", lora_r=4, lora_alpha=8, lora_targets=targets,
                    **DEFAULTS | settings)
    tokenizer = load_tokenizer(recipe)
    pair = load_pair(recipe)
    parts = [encode_questions(part.questions[:12], tokenizer, recipe) for part in pair]
    encoded, held_out = parts
    if not labels:
        encoded = mask_labels(encoded)
    folder.mkdir(exist_ok=True)
    model = apply_fast_parts(attach_lora(load_model(recipe), recipe), recipe)
    packed = recipe.packing != "off"
    trainer = make_trainer(model, tokenizer, encoded, recipe, folder, held_out, packed=packed)
    spoiler = Spoil(model, bad, how)
    trainer.add_callback(spoiler)
    spoiler.watch(trainer)
    return trainer, spoiler


def stop_in(trainer, step: int):
    """The trainer, asked to stop while it makes a step, as by Ctrl-C."""

    class Ask(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step + 1 != step:
                return
            callbacks = trainer.callback_handler.callbacks
            next(c for c in callbacks if isinstance(c, StopOnRequest)).request_stop()

    trainer.add_callback(Ask())
    return trainer


def lines_of(folder: Path, fields=("step", "loss", "skipped", "examples", "tokens")) -> list[dict]:
    """What a run's lines say about losses and skipped steps."""
    lines = read_lines(folder / "metrics.jsonl")
    return [{k: m[k] for k in fields if k in m} for m in lines]


def skipped_steps(folder: Path) -> list[int]:
    return [m["step"] for m in read_lines(folder / "metrics.jsonl") if "skipped" in m]


def saved_names(folder: Path) -> list[str]:
    return sorted(p.name for p in (folder / "checkpoints").iterdir())


def saved_state(trainer) -> dict:
    """What a resumed run would get of the bad steps' callback."""
    state, = (e for e in trainer.state.log_history if "guard" in e)
    return state


def adapter(model) -> dict:
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


def all_finite(model) -> bool:
    return all(bool(p.isfinite().all()) for p in adapter(model).values())


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def updates(trainer) -> set[float]:
    """How many updates the optimizer has counted, for all parameters."""
    return {float(s["step"]) for s in trainer.optimizer.optimizer.state.values()}


def named(trainer, rows: list[torch.Tensor], padded: bool) -> list[str]:
    """The ids of the questions in batches that the model saw, by their tokens."""
    encoded = trainer.bad_steps.encoded
    known = {tuple(r["input_ids"]): encoded.questions[r["question"]].id for r in encoded.rows}
    found = []
    for row in rows:
        if padded:
            for tokens in row.tolist():
                found.append(next(i for ids, i in known.items() if tuple(tokens[:len(ids)]) == ids))
            continue
        rest = tuple(row[0].tolist())
        while len(set(rest)) > 1:  # after the last, a GPU's rows are filled up with one token
            ids = next(ids for ids in known if rest[:len(ids)] == ids)
            found.append(known[ids])
            rest = rest[len(ids):]
    return found


@pytest.mark.parametrize("packing", ["auto", "off"])
@pytest.mark.parametrize("how", ["loss", "gradient"])
def test_a_bad_step_stops_the_run_and_touches_nothing(tmp_path, how, packing):
    """Found two steps later, when a line is due: no update has happened since."""
    if not ALL and (how, packing) not in (("loss", "auto"), ("gradient", "off")):
        pytest.skip("make test-all: the other two ways")
    settings = dict(packing=packing, logging_steps=5, save_steps=2, gradient_accumulation_steps=2)
    run = tmp_path / "run"
    trainer, spoiler = made(run, {3}, how, **settings)
    with pytest.raises(ValueError) as stopped:
        run_training(trainer, run)
    ids = named(trainer, spoiler.seen[3], packing == "off")
    said = str(stopped.value)
    assert len(ids) == 4
    assert (f"examples {', '.join(ids)}; the last checkpoint is checkpoint-2; "
            "--resume and -p on_bad_step skip") in said
    assert "\n" not in said
    first = {"loss": "step 3: the loss is nan; lower learning_rate",
             "gradient": "step 3: the gradients' norm is "}
    assert said.startswith(first[how])
    assert trainer.state.global_step == 4  # a checkpoint was due
    assert json.loads((run / "bad_step.json").read_text())["examples"] == ids
    assert saved_names(run) == ["checkpoint-2"]
    good, _ = made(tmp_path / "good", max_steps=2, **settings | dict(logging_steps=1))
    run_training(good, tmp_path / "good")
    assert same(adapter(trainer.model), adapter(good.model))
    file = "checkpoints/checkpoint-2/adapter_model.safetensors"
    assert same(load_file(run / file), load_file(tmp_path / "good" / file))


@pytest.mark.parametrize("packing", ["auto", "off"])
def test_skipped_steps_are_recorded_and_the_rest_goes_on(tmp_path, packing):
    """A skipped update leaves moments and count of steps alone, too; the schedule continues."""
    run = tmp_path / "run"
    settings = dict(packing=packing, logging_steps=2, on_bad_step="skip")
    trainer, spoiler = made(run, {3, 4}, "loss", **settings)
    result = run_training(trainer, run)
    lines = read_lines(run / "metrics.jsonl")
    said = "the loss is nan"
    assert [(m["step"], m.get("skipped")) for m in lines] == [(2, None), (3, said), (4, said),
                                                              (6, None)]
    ids = [named(trainer, spoiler.seen[n], packing == "off") for n in (3, 4)]
    assert [m["examples"] for m in lines[1:3]] == ids
    assert lines[1]["step_loss"] == "nan"
    assert all(math.isfinite(m["loss"]) for m in (lines[0], lines[3]))
    assert all_finite(trainer.model) and result["steps"] == 6
    assert updates(trainer) == {4.0}
    state = (run / "checkpoints/checkpoint-6/trainer_state.json").read_text()
    assert "NaN" not in state.replace('"entropy": NaN', "")


def test_a_line_holds_the_good_steps_alone(tmp_path):
    settings = dict(max_steps=3, save_steps=3, on_bad_step="skip")
    trainer, _ = made(tmp_path / "run", {2}, "loss", logging_steps=3, **settings)
    run_training(trainer, tmp_path / "run")
    single, _ = made(tmp_path / "single", {2}, "loss", **settings)
    run_training(single, tmp_path / "single")
    lines, each = lines_of(tmp_path / "run"), lines_of(tmp_path / "single")
    assert [m["step"] for m in lines] == [2, 3]
    assert [m["step"] for m in each] == [1, 2, 3]
    mean = (each[0]["loss"] + each[2]["loss"]) / 2
    assert lines[1]["loss"] == pytest.approx(mean, rel=1e-6)


def test_a_line_is_due_at_the_last_step():
    """Also where logging_steps doesn't say so."""
    callback = BadStepCallback(Recipe(), None, Path("nowhere"))
    callback.detector = SimpleNamespace(fetch=lambda: [])
    callback.policy = SimpleNamespace(apply=lambda steps: None)
    due = []
    for step in (5, 6):
        control = SimpleNamespace(should_log=False, should_save=False, should_evaluate=False,
                                  should_training_stop=False)
        state = SimpleNamespace(global_step=step, max_steps=6)
        callback.on_step_end(None, state, control)
        due.append(control.should_log)
    assert due == [False, True]


def test_lines_of_skipped_steps_wait_for_room_too(tmp_path, capsys):
    """save_errors = warn, and a disk that is full in steps 3 to 5: the lines come in order."""
    run = tmp_path / "run"
    settings = dict(logging_steps=2, on_bad_step="skip", save_errors="warn")
    trainer, _ = made(run, {3}, "loss", **settings)
    append = metrics.append_lines

    def append_lines(path, lines):
        if 3 <= trainer.state.global_step <= 5:
            raise DiskError(f"{path}: can't be written (No space left on device)")
        append(path, lines)

    with patch.object(metrics, "append_lines", append_lines):
        run_training(trainer, run)
    lines = [(m["step"], "skipped" in m) for m in read_lines(run / "metrics.jsonl")]
    assert lines == [(2, False), (3, True), (4, False), (6, False)]
    assert capsys.readouterr().err.count("its lines wait (save_errors = warn)") == 2


def test_too_many_skipped_steps_stop_the_run(tmp_path):
    run = tmp_path / "run"
    settings = dict(max_steps=20, save_steps=20, logging_steps=4, on_bad_step="skip")
    trainer, _ = made(run, range(2, 40), "loss", **settings)
    said = (f"step {MAX_BAD_IN_A_ROW + 1}: the loss is nan.*"
            f"{MAX_BAD_IN_A_ROW} steps in a row were skipped")
    with pytest.raises(ValueError, match=said):
        run_training(trainer, run)
    assert skipped_steps(run) == [*range(2, MAX_BAD_IN_A_ROW + 1)]


def test_going_on_past_a_bad_step(tmp_path):
    """--resume with on_bad_step skip ends as if the step had been skipped from the start."""
    run, other = tmp_path / "run", tmp_path / "undisturbed"
    trainer, _ = made(run, {3}, "loss")
    with pytest.raises(ValueError, match="step 3"):
        run_training(trainer, run)
    again, _ = made(run, {3}, "loss", on_bad_step="skip")
    run_training(again, run, resume=True)
    undisturbed, _ = made(other, {3}, "loss", on_bad_step="skip")
    run_training(undisturbed, other)
    assert same(adapter(again.model), adapter(undisturbed.model))
    fields = ("step", "loss", "examples", "tokens")
    assert lines_of(run, fields) == lines_of(other, fields)
    assert saved_state(again) == saved_state(undisturbed)
    assert saved_state(again)["guard"][0] == 5.0  # it checks by the same reference


@pytest.mark.parametrize("how", ["loss", "explode"])
def test_going_on_between_a_bad_step_and_its_line(tmp_path, how):
    """Resumed before the line that a skipped step belongs to, which has the good steps' mean.

    The sum of losses in the checkpoint may not be finite.
    """
    settings = dict(logging_steps=10, save_steps=5, max_steps=10, on_bad_step="skip", seed=3)
    run, other = tmp_path / "run", tmp_path / "undisturbed"

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

    trainer = spoiled(run)
    trainer.add_callback(Kill())
    with pytest.raises(Lost):
        run_training(trainer, run)
    loop = json.loads((run / "checkpoints/checkpoint-5/loop.json").read_text())
    own = loop["processes"][0]
    assert (own["loss"] is None) == (how == "loss") and own["logged"] == 0
    again, undisturbed = spoiled(run), spoiled(other)
    run_training(again, run, resume=True)
    run_training(undisturbed, other)
    assert same(adapter(again.model), adapter(undisturbed.model))
    assert lines_of(run) == lines_of(other)
    assert [m["step"] for m in lines_of(run)] == [3, 10] and lines_of(run)[1]["loss"] < 15


def test_the_checkpoint_at_a_request_is_looked_at(tmp_path):
    """Ctrl-C between two looks: a bad step is found before the checkpoint is written."""
    settings = dict(logging_steps=10, save_steps=10, max_steps=10)
    stop, skip, other = (tmp_path / name for name in ("stop", "skip", "undisturbed"))
    trainer, _ = made(stop, {3}, "loss", **settings)
    with pytest.raises(ValueError, match="step 3: the loss is nan.*there is no checkpoint yet"):
        run_training(stop_in(trainer, 4), stop)
    assert not list(stop.glob("checkpoints/*"))
    settings |= dict(on_bad_step="skip")
    trainer, _ = made(skip, {3}, "loss", **settings)
    with pytest.raises(Stopped, match="after step 4 as asked, with checkpoint-4"):
        run_training(stop_in(trainer, 4), skip)
    lines = [(m["step"], m["skipped"]) for m in read_lines(skip / "metrics.jsonl")]
    assert lines == [(3, "the loss is nan")]
    state = saved_state(trainer)
    assert (state["step"], state["guard"][0]) == (4, 3.0)
    again, _ = made(skip, {3}, "loss", **settings)
    run_training(again, skip, resume=True)
    undisturbed, _ = made(other, {3}, "loss", **settings)
    run_training(undisturbed, other)
    assert same(adapter(again.model), adapter(undisturbed.model))
    assert lines_of(skip) == lines_of(other)


def test_a_request_waits_for_a_checkpoint_worth_it(tmp_path):
    """The step's loss is suspiciously high: the checkpoint waits, training ends one step later."""
    run = tmp_path / "run"
    trainer, spoiler = made(run, {7}, "explode", max_steps=12, save_steps=12)
    spoiler.factor = 20.0
    with pytest.raises(Stopped, match="after step 8 as asked, with checkpoint-8"):
        run_training(stop_in(trainer, 7), run)
    assert saved_names(run) == ["checkpoint-8"]


@pytest.mark.parametrize("saved", [2, 0])
def test_a_request_on_a_full_disk_names_what_is_there(tmp_path, saved):
    """save_errors = warn: transformers takes a missing checkpoint for saved; we don't."""
    run = tmp_path / "run"
    trainer, _ = made(run, save_errors="warn", save_steps=2)
    write, noted = checkpoints.write_parts, []

    def write_parts(trainer, work):
        if trainer.state.global_step > saved:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(trainer, work)

    last = "the last one is checkpoint-2" if saved else "there is none before it"
    said = (f"stopped after step 4 as asked, but checkpoint-4 could not be saved \\({last}\\); "
            "continue")
    with (patch.object(checkpoints, "write_parts", write_parts),
          patch.object(metrics, "note_progress", lambda **facts: noted.append(facts)),
          pytest.raises(Stopped, match=said)):
        run_training(stop_in(trainer, 4), run)
    assert noted == [dict(checkpoint="checkpoints/checkpoint-2")] * (saved == 2)


def test_a_loss_that_explodes_stops_the_run(tmp_path):
    """Above the limit no checkpoint is written, though the running mean is not there yet."""
    run = tmp_path / "run"
    settings = dict(max_steps=20, save_steps=1, save_total_limit=2, per_device_train_batch_size=4)
    trainer, _ = made(run, range(7, 40), "explode", **settings)
    said = (rf"step \d+: the loss exploded: [\d.e+]+, {EXPLOSION_FACTOR:g} times what it began "
            "with.*the last checkpoint is checkpoint-6")
    with pytest.raises(ValueError, match=said):
        run_training(trainer, run)
    assert saved_names(run) == ["checkpoint-5", "checkpoint-6"]


def test_a_checkpoint_is_put_off_while_a_loss_is_high(tmp_path):
    """One such step is no explosion yet, but nothing to resume from."""
    run = tmp_path / "run"
    settings = dict(max_steps=8, save_steps=1, save_total_limit=8)
    trainer, spoiler = made(run, {7}, "explode", **settings)
    spoiler.factor = 20.0
    run_training(trainer, run)
    losses = [m["loss"] for m in read_lines(run / "metrics.jsonl")]
    reference = sum(losses[:5]) / 5
    assert len(losses) == 8 and losses[6] > EXPLOSION_FACTOR * reference > losses[7]
    assert saved_names(run) == [f"checkpoint-{n}" for n in (1, 2, 3, 4, 5, 6, 8)]


@pytest.mark.parametrize("packing", ["auto", "off"])
def test_masked_targets_stop_the_run(tmp_path, packing):
    run = tmp_path / "run"
    trainer, spoiler = made(run, labels=False, packing=packing)
    said = ("step 1: no token of it is to be learned: all labels are masked; "
            ".*there is no checkpoint yet")
    with pytest.raises(ValueError, match=said) as stopped:
        run_training(trainer, run)
    ids = named(trainer, spoiler.seen[1], packing == "off")
    assert ", ".join(ids) in str(stopped.value)


def test_a_learning_rate_of_0(tmp_path):
    """The first step of a warm-up has it by design; a run of nothing else is stopped or refused."""
    assert recipe_problems(load_recipe("toy", {"max_steps": "2", "warmup_steps": "1"})) == []
    said = "warmup_steps leaves the only step of max_steps = 1 a learning rate of 0"
    one_step = {"max_steps": "1", "warmup_steps": "2", "lr_scheduler_type": "linear"}
    with pytest.raises(ValueError, match=said):
        load_recipe("toy", one_step)
    settings = dict(warmup_steps=2, lr_scheduler_type="linear", per_device_train_batch_size=12,
                    num_train_epochs=1.0)
    trainer, _ = made(tmp_path / "one", max_steps=-1, **settings)  # an epoch of one step
    said = "step 1: the learning rate is 0, so nothing would be learned"
    with pytest.raises(ValueError, match=said):
        run_training(trainer, tmp_path / "one")
    two, _ = made(tmp_path / "two", max_steps=2, **settings)
    assert run_training(two, tmp_path / "two")["steps"] == 2


@pytest.mark.parametrize("logging_steps, steps", [(10, [3]), (2, [2, 3]), (3, [3])])
def test_the_last_steps_have_a_line(tmp_path, logging_steps, steps):
    """Three steps, by epochs: a line at the end, once, whether it is due there or not."""
    run = tmp_path / "run"
    settings = dict(max_steps=-1, num_train_epochs=1.0, per_device_train_batch_size=4)
    trainer, _ = made(run, logging_steps=logging_steps, **settings)
    result = run_training(trainer, run)
    lines = read_lines(run / "metrics.jsonl")
    assert [m["step"] for m in lines] == steps and result["steps"] == 3
    assert result["last_loss"] == lines[-1]["loss"]


def test_a_run_of_skipped_steps_alone_is_an_error(tmp_path):
    run = tmp_path / "run"
    trainer, _ = made(run, range(1, 4), "loss", max_steps=3, on_bad_step="skip")
    said = ("metrics.jsonl: holds no loss, so there is nothing to report: "
            "all steps were skipped")
    with pytest.raises(ValueError, match=said):
        run_training(trainer, run)
    assert skipped_steps(run) == [1, 2, 3]


def test_evaluation_rows_without_a_loss(tmp_path):
    run = tmp_path / "run"
    trainer, _ = made(run, eval_steps=2)
    norm = output_norm(trainer.model)
    norm.register_forward_hook(lambda m, a, out: out if m.training else out * math.nan)
    said = "step 2: the loss on the evaluation rows is nan; .*there is no checkpoint yet"
    with pytest.raises(ValueError, match=said):
        run_training(trainer, run)
    assert not (run / "evals.jsonl").exists()


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    """Whatever the losses say: here a weight is spoiled where no loss sees it."""
    run = tmp_path / "run"
    trainer, _ = made(run, save_steps=2)

    class Break(TrainerCallback):
        def on_optimizer_step(self, args, state, control, model=None, **kwargs):
            weight = next(p for p in model.parameters() if p.requires_grad)
            with torch.no_grad():
                weight.view(-1)[0] = math.inf if state.global_step == 3 else 0.0

    trainer.add_callback(Break())
    said = ("step 4: weights of the adapter are not finite; lower learning_rate; "
            "the last checkpoint is checkpoint-2")
    with pytest.raises(ValueError, match=said):
        run_training(trainer, run)
    assert saved_names(run) == ["checkpoint-2"]


def test_a_step_asks_the_device_for_nothing(tmp_path):
    """Between two fetches no number goes to the host; on a GPU each would be a wait."""
    trainer, _ = made(tmp_path / "run", max_steps=3, save_steps=3, logging_steps=3)
    detector = trainer.bad_steps.detector
    check_step = detector.check_step
    reads = ("item", "tolist", "__bool__", "__float__", "__int__", "numpy", "cpu")
    checked = []

    def refuse(self, *args):
        raise AssertionError("a synchronisation")

    def watched(norm):
        with patch.multiple(torch.Tensor, **dict.fromkeys(reads, refuse)):
            check_step(norm)
        checked.append(norm)

    detector.check_step = watched
    assert run_training(trainer, tmp_path / "run")["steps"] == 3
    assert len(checked) == 3


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
def test_recorded_steps_are_judged_without_waiting(tmp_path):
    """torch refuses every wait within the check, and a bad captured step is left out."""
    run = tmp_path / "run"
    settings = dict(max_steps=8, save_steps=8, logging_steps=8, on_bad_step="skip")
    trainer, _ = made(run, {4}, "gradient", dtype="bfloat16", **settings)
    detector = trainer.bad_steps.detector
    check_step = detector.check_step

    def watched(norm):
        torch.cuda.set_sync_debug_mode("error")
        try:
            check_step(norm)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    detector.check_step = watched
    run_training(trainer, run)
    assert not trainer.training_step.not_recordable and trainer.training_step.recorded
    assert skipped_steps(run) == [4]
    assert all_finite(trainer.model) and updates(trainer) == {7.0}


def test_memory_that_runs_out_is_one_line(tmp_path):
    """What is missing, the largest parts, and two changes that the plan says would fit."""
    run = tmp_path / "run"
    trainer, _ = made(run, {3}, "memory", per_device_train_batch_size=4)
    expected = (r"^out of memory: 1.50 MiB more were asked for, and this GPU has 79.1 GiB in all; "
                r"the plan's largest parts are \w+ .*would fit")
    with pytest.raises(ValueError, match=expected) as stopped:
        run_training(trainer, run)
    said, recipe = str(stopped.value), trainer.bad_steps.recipe
    assert "\n" not in said
    limit = min(79.11 / RESERVE, memory_needed(recipe, 1).sum() - 1.5 / 1024)
    changes = said.partition("by the plan ")[2].partition(" would fit")[0].split(", or ")
    assert len(changes) == 2
    for change in changes:
        words = [w.partition(" ") for w in change.removeprefix("-p ").split(" -p ")]
        values, bad = read_values({key: value for key, _, value in words}, "-p")
        assert not bad and memory_needed(Recipe(**vars(recipe) | values), 1).sum() <= limit
    assert saved_names(run) == ["checkpoint-2"]


MEMORY = """
import sys
if any("ipykernel" in word for word in sys.orig_argv):
    from importlib import import_module
    import torch
    said = ("CUDA out of memory. Tried to allocate 1.50 GiB. "
            "GPU 0 has a total capacity of 79.11 GiB of which 1.00 MiB is free.")
    def gone(*args, **kwargs): raise torch.OutOfMemoryError(said)
    module, name = {where!r}
    setattr(import_module(module), name, gone)
"""


@pytest.mark.skipif(not ALL, reason="make test-all; the messages are tested in their notebooks")
@pytest.mark.parametrize("where, command, said", [
    (("medmcqa_lora.model.load", "_load_hf"), "train",
     "loading toy-nemotron-h, whose weights take 1.30 MiB in float32; "
     "see who else uses the memory"),
    (("medmcqa_lora.evaluation.letters", "begin_letter_logprobs"), "evaluate",
     "scoring 32 questions at once; lower per_device_eval_batch_size and continue with --resume"),
], ids=["loading", "scoring"])
def test_memory_that_runs_out_elsewhere(tmp_path, where, command, said):
    """By the public command, in whose kernel the allocator gives up in one place."""
    (tmp_path / "sitecustomize.py").write_text(MEMORY.format(where=where))
    words = [command, "--recipe", "toy", "--out", str(tmp_path / "run")]
    python = [sys.executable, "-c", "from medmcqa_lora.cli import main; main()"]
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    done = subprocess.run([*python, *words], capture_output=True, text=True, timeout=300,
                          env=os.environ | {"PYTHONPATH": path})
    last = done.stderr.strip().splitlines()[-1]
    expected = ("medmcqa-lora: rank 0: out of memory: 1.5 GiB more were asked for, "
                f"and this GPU has 79.1 GiB in all, {said}")
    assert done.returncode == 1 and last.startswith(expected), done.stderr[-3000:]


def run_case(folder: Path, rank: int, how: str, bad: list[int], settings: dict) -> dict:
    """What a process finds when rank 1's steps are spoiled."""
    trainer, spoiler = made(folder, bad if rank == 1 else (), how, **settings)
    said = ""
    try:
        run_training(trainer, folder)
    except ValueError as e:
        said = str(e)
    parts = [p.full_tensor() if hasattr(p, "full_tensor") else p
             for p in adapter(trainer.model).values()]
    ids = named(trainer, spoiler.seen[3], settings.get("packing") == "off")
    return dict(said=said, sum=float(sum(p.double().sum() for p in parts)), rows=ids,
                finite=all(bool(p.isfinite().all()) for p in parts),
                step=trainer.state.global_step)


def run_process(folder: Path, cases: list) -> None:
    """Run all cases as one of two processes, and write what was found."""
    from accelerate.state import AcceleratorState

    torch.set_num_threads(1)
    rank, found = int(os.environ["RANK"]), {}
    for name, how, bad, settings in cases:
        found[name] = run_case(folder / name, rank, how, bad, settings)
        AcceleratorState._reset_state(True)
    (folder / f"{rank}.json").write_text(json.dumps(found))
    torch.distributed.barrier()
    os._exit(0)  # taking DDP apart, torch 2.13 may wait for gloo's thread, which waits for the GIL


PROCESS = """
import sys; sys.path[:0] = {path!r}
from pathlib import Path
import test_bad_steps
test_bad_steps.run_process(Path({folder!r}), {cases!r})
"""


def in_two(folder: Path, cases: list) -> list[dict]:
    """What two processes found, each."""
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = s.getsockname()[1]
    path = [str(ROOT / "tests/training"), str(ROOT / "tests"), str(ROOT)]
    code = PROCESS.format(path=path, folder=str(folder), cases=cases)
    env = os.environ | dict(WORLD_SIZE="2", MASTER_ADDR="localhost", MASTER_PORT=str(port),
                            OMP_NUM_THREADS="1")
    started = [subprocess.Popen([sys.executable, "-c", code], cwd=ROOT,
                                env=env | dict(RANK=str(r), LOCAL_RANK=str(r))) for r in range(2)]
    try:
        assert [p.wait(300) for p in started] == [0, 0]
    finally:
        for p in started:
            p.kill()
    return [json.loads((folder / f"{r}.json").read_text()) for r in range(2)]


def test_all_processes_decide_the_same(tmp_path):
    """Rank 1's loss alone is NaN: both stop at the same step, or both leave the step out."""
    settings = dict(logging_steps=3, save_steps=6)
    skip = settings | dict(on_bad_step="skip")
    cases = [("stop", "loss", [3], settings), ("skip", "loss", [3], skip)]
    if ALL:
        cases += [("gradient", "gradient", [3], settings),
                  ("off", "loss", [3], settings | dict(packing="off")),
                  ("fast_off", "loss", [3], skip | dict(fast="off")),
                  ("shares", "loss", [3], skip | dict(parallel="fsdp")),
                  ("shares_stop", "loss", [3], settings | dict(parallel="fsdp"))]
    first, second = in_two(tmp_path, cases)
    for name, how, _, chosen in cases:
        a, b = first[name], second[name]
        said = a["said"]
        assert said == b["said"] and a["sum"] == b["sum"], name
        assert a["finite"] and a["step"] == b["step"], name
        if chosen.get("on_bad_step") == "skip":
            lines = read_lines(tmp_path / name / "metrics.jsonl")
            line = next(m for m in lines if "skipped" in m)
            found = (said, a["step"], line["step"], line["examples"])
            assert found == ("", 6, 3, b["rows"]), name
        elif how == "loss":
            assert said.startswith("step 3: the loss is nan"), name
            assert ", ".join(b["rows"]) in said and not any(i in said for i in a["rows"]), name
        else:  # the gradients are everybody's
            assert said.startswith("step 3: the gradients' norm is"), name
            assert ", ".join(a["rows"] + b["rows"]) in said, name
