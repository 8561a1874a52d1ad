"""The trainer's own step beside transformers' eager float32 code, one example at a time."""
import json
import math
import os
import shutil
import socket
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import ALL, ROOT
from helpers import GROUPS, adapted
from transformers import TrainerCallback
from transformers.utils import logging

from medmcqa_lora.core.environment import compute_device
from medmcqa_lora.core.files import read_lines
from medmcqa_lora.core.recipe import Recipe
from medmcqa_lora.data.leakage import load_pair
from medmcqa_lora.data.tokens import encode_questions
from medmcqa_lora.fast.apply import apply_fast_parts
from medmcqa_lora.fast.mamba import LONGEST_SCAN
from medmcqa_lora.model.load import load_model
from medmcqa_lora.model.lora import attach_lora
from medmcqa_lora.model.resolve import TOY, load_tokenizer
from medmcqa_lora.training import step as step_module
from medmcqa_lora.training.step import HeadLoss, RowCollator, Step, shape_of, use_head_loss
from medmcqa_lora.training.trainer import make_trainer, run_training

CHUNK = TOY["chunk_size"]
LENGTHS = [57, 1, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK, 2]
TARGETS = [*GROUPS, "mlp"]
DEVICE = compute_device()
# a GPU adds in another order, and Triton's exponentials are its own
LOOSE = 10 if torch.cuda.is_available() else 1
logging.disable_progress_bar()
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    # they do match: names of fused parameters
    pytest.mark.filterwarnings("ignore:The following rank_pattern keys:RuntimeWarning"),
]
needs_gpu = pytest.mark.skipif(
    not torch.cuda.is_available(),
    reason="CUDA graphs and this package's kernels at speed need a GPU")


def recipe(**settings) -> Recipe:
    return Recipe(model="toy-nemotron-h", lora_r=4, lora_alpha=8, lora_targets=TARGETS, **settings)


def encoded_questions(chosen: Recipe, count: int):
    """The first questions of a recipe's training data, and of its evaluation data."""
    tokenizer = load_tokenizer(chosen)
    return [encode_questions(p.questions[:count], tokenizer, chosen) for p in load_pair(chosen)]


def examples(lengths: list[int], seed: int = 0, fraction: float = 0.4) -> list[dict]:
    """Made-up examples; a fraction of their tokens is supervised, the last one always."""
    g = torch.Generator().manual_seed(seed)
    ids = [torch.randint(3, 1000, (n,), generator=g) for n in lengths]
    rows = []
    for x in ids:
        chosen = torch.rand(len(x), generator=g) < fraction
        chosen[-1] = True
        rows.append(dict(input_ids=x.tolist(), labels=torch.where(chosen, x, -100).tolist()))
    return rows


def supervised_in(rows: list[dict]) -> int:
    return sum(label != -100 for r in rows for label in r["labels"][1:])


def gradients_of(model) -> dict[str, torch.Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def favour(model, few: bool) -> None:
    """Send every token to the first experts, so that the others have none."""
    for m in model.modules():
        if few and hasattr(m, "e_score_correction_bias"):
            m.e_score_correction_bias[: m.top_k] = 10.0


def eager(rows: list[dict], few: bool = False, items: int = 0) -> tuple[float, dict]:
    """Loss and LoRA gradients by transformers' and PEFT's float32 code, an example at a time."""
    model = adapted(recipe(fast="off"))
    model.set_experts_implementation("eager")
    favour(model, few)
    total, items = 0.0, items or supervised_in(rows)
    for r in rows:
        ids, labels = (torch.tensor(r[k], device=DEVICE) for k in ("input_ids", "labels"))
        logits = model(ids[None], use_cache=False).logits[0].float()
        total_loss = F.cross_entropy(logits[:-1], labels[1:], ignore_index=-100, reduction="sum")
        loss = total_loss / items
        loss.backward()
        total += loss.item()
    return total, gradients_of(model)


def same(found: tuple, wanted: tuple, bound: float = 1e-4 * LOOSE) -> None:
    """A loss and all gradients; the norm of a matrix' difference relative to its norm, or to a
    thousandth of all gradients' where it has next to none."""
    (loss, got), (expected, want) = found, wanted
    least = 1e-3 * torch.stack([g.norm() for g in want.values()]).norm()
    assert loss == pytest.approx(expected, rel=bound)
    assert got.keys() == want.keys() and len(want) > 20 and least > 0
    scale = {n: torch.maximum(g.norm(), least) for n, g in want.items()}
    off = {n: float((got[n] - g).norm() / scale[n]) for n, g in want.items()}
    worst = max(off, key=off.get)
    assert off[worst] < bound, (worst, off[worst])


def ours(few: bool = False):
    model = adapted(recipe())
    favour(model, few)
    use_head_loss(model.get_base_model())
    return model


def inputs(row: dict, items: int) -> dict:
    """What the step gives a model."""
    row = {k: v for k, v in row.items() if k not in ("labels", "tokens")}
    row["num_items_in_batch"] = torch.tensor(float(items))
    return {k: v.to(DEVICE) if torch.is_tensor(v) else v for k, v in row.items()}


def by_step(trainer, rows: list[list[dict]], multiple: int = 1) -> tuple[float, dict]:
    """Loss and gradients of one optimizer step, whose micro-batches are given, by a trainer's
    training_step."""
    trainer.model.zero_grad(set_to_none=True)
    items, collate = torch.tensor(sum(map(supervised_in, rows))), RowCollator(multiple)
    loss = sum(trainer.training_step(trainer.model, collate(r), items).item() for r in rows)
    return loss, gradients_of(trainer.model)


def trainer_around(chosen: Recipe, folder: Path):
    """The package's trainer around the toy with random adapters, rows packed."""
    rows, _ = encoded_questions(chosen, 8)
    return make_trainer(adapted(chosen), load_tokenizer(chosen), rows, chosen, folder, packed=True)


@pytest.fixture
def trainer(tmp_path):
    made = trainer_around(recipe(max_steps=1), tmp_path)
    assert isinstance(made.training_step, Step)
    reason = "" if torch.cuda.is_available() else "not asked for"
    assert made.training_step.not_recordable == reason
    return made


SITUATIONS = {
    "packed": (LENGTHS, 1), "filled": (LENGTHS, 64), "nothing to fill": ([30, 34], 64),
    "one document": ([45], 1), "one document, filled": ([45], 64),
    "one token beside": ([1, 2, 1], 16),
}


@pytest.mark.parametrize("few", [False, True], ids=["as routed", "all to the same experts"])
@pytest.mark.parametrize("situation", SITUATIONS)
def test_complete_model_beside_eager(situation, few):
    """Every LoRA group; also with experts that get no token."""
    lengths, multiple = SITUATIONS[situation]
    rows, model = examples(lengths), ours(few)
    row = RowCollator(multiple)(rows)
    tokens, length = sum(lengths), row["input_ids"].shape[1]
    assert length % multiple == 0 and row["tokens"] == tokens
    if multiple > 1:  # the padding is a document of its own, which costs no more than its length
        assert row["cu_seq_lens_q"].tolist()[-2:] == [tokens, length]
        seq_idx = row["seq_idx"][0].tolist()
        assert not set(seq_idx[tokens:]) & set(seq_idx[:tokens])
    loss = model(**inputs(row, supervised_in(rows))).loss
    loss.backward()
    wanted = eager(rows, few)
    same((loss.item(), gradients_of(model)), wanted)
    if few:
        experts, suffix = TOY["n_routed_experts"], "lora_A.default.weight"
        routed = [g for n, g in wanted[1].items() if "experts" in n and n.endswith(suffix)]
        up = next(g for g in routed if g.shape[0] == experts * 4)
        chosen = (up.view(experts, -1).abs().amax(1) > 0).sum()
        assert chosen <= TOY["num_experts_per_tok"]  # the others had no token


def test_generation_under_the_head_loss():
    """Its batches name no positions, so they go to the original forward."""
    model = ours().eval()
    ids, mask = torch.tensor([[5, 6]], device=DEVICE), torch.ones(1, 2, dtype=torch.long)
    found = model.generate(input_ids=ids, attention_mask=mask.to(DEVICE), max_new_tokens=1)
    assert found.shape == (1, 3)


needs_interpreter = pytest.mark.skipif(
    torch.cuda.is_available() or find_spec("triton") is None,
    reason="Triton's interpreter is for machines without a GPU, and needs Triton")


def compare_interpreted(modules: list[str], cases: list[tuple]) -> None:
    """In a process of its own, with Triton's interpreter: the package's kernels beside eager."""
    from medmcqa_lora.fast import blocks, mamba, operations

    torch.set_num_threads(1)
    known = dict(mamba=mamba, operations=operations)
    for name in modules:
        known[name].use_triton = lambda *tensors: True
    scanned, scan = [], blocks.scan_forward

    def counted(*args):
        scanned.append(args)
        return scan(*args)

    blocks.scan_forward = counted
    for lengths, multiple, few in cases:
        rows, model = examples(lengths), ours(few)
        scanned.clear()
        loss = model(**inputs(RowCollator(multiple)(rows), supervised_in(rows))).loss
        loss.backward()
        same((loss.item(), gradients_of(model)), eager(rows, few))
        assert len(scanned) == TOY["hybrid_override_pattern"].count("M"), len(scanned)
    print("the same")


PATHS = [str(ROOT / "tests/training"), str(ROOT / "tests"), str(ROOT)]


def interpreted(modules: list[str], cases: list[tuple]) -> None:
    """`compare_interpreted` in a process: Triton's interpreter has to be chosen before
    transformers is imported."""
    code = f"import sys; sys.path[:0] = {PATHS}; import test_step\n"
    code += f"test_step.compare_interpreted({modules}, {cases})"
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-W", "ignore", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.stdout.strip().endswith("the same"), done.stderr[-2000:]


@needs_interpreter
def test_the_packages_scan_in_the_complete_model():
    # two tokens of the fifth lie in the next block of 64; an example's last one has no gradient
    border = [1, CHUNK - 1, CHUNK, CHUNK + 1, CHUNK + 1, 3 * CHUNK]
    more = [(*situation, False) for situation in SITUATIONS.values()] if ALL else []
    interpreted(["mamba"], [(border, 1, False), *more])


@needs_interpreter
@pytest.mark.skipif(not ALL, reason="make test-all: Triton's interpreter takes its time")
@pytest.mark.parametrize("few", [False, True], ids=["as routed", "all to the same experts"])
def test_all_of_the_packages_kernels_in_the_complete_model(few):
    interpreted(["mamba", "operations"], [(*SITUATIONS["filled"], few)])


# of five shapes, the last a smaller batch
ROWS_LENGTHS = [5, 40, 17], [30], [64, 9, 33, 3], [40, 17, 5], [2, 31]
ROWS = [examples(lengths, seed) for seed, lengths in enumerate(ROWS_LENGTHS, 1)]


@pytest.mark.parametrize("multiple", [1, 64])
def test_accumulation_over_rows_of_different_shapes(trainer, multiple):
    """Micro-batches of one, two and four examples weigh by their positions: as one row of all, and
    as each example alone."""
    wanted = eager([e for r in ROWS for e in r])
    same(by_step(trainer, ROWS, multiple), wanted)
    same(by_step(trainer, [[e for r in ROWS for e in r]], multiple), wanted)


def mute(rows: list[dict]) -> list[dict]:
    return [r | dict(labels=[-100] * len(r["labels"])) for r in rows]


def test_rows_without_a_supervised_position(trainer):
    """In an accumulation they add nothing; alone, the loss is 0 and nothing moves (TRL divides by
    their number, 0)."""
    same(by_step(trainer, [mute(ROWS[0]), ROWS[1], mute(ROWS[2])], 64), eager(ROWS[1]))
    trainer.training_step.tally.sums.zero_()
    loss, found = by_step(trainer, [mute(ROWS[0])])
    assert loss == 0 and found and not any(g.any() for g in found.values())
    counts = trainer.training_step.tally.take(trainer.accelerator)
    assert (counts["entropy"], counts["mean_token_accuracy"]) == (0, 0)
    assert counts.keys() == {"num_tokens", "entropy", "mean_token_accuracy"}


def test_a_row_without_a_target_is_never_right():
    """Equal logits: the first token is the best, and stands in where there is no target."""
    targets = torch.tensor([-100, 0, 2])
    loss, statistics = HeadLoss.apply(torch.zeros(3, 4), torch.zeros(5, 4), targets)
    assert loss.item() == pytest.approx(2 * math.log(5))
    assert statistics.tolist() == pytest.approx([2 * math.log(5), 1, 2])


def test_an_examples_first_token_is_not_counted(trainer):
    """It can't be predicted, whatever its label; the count that divides is the trainer's own."""
    rows = [dict(input_ids=[7, 8, 9], labels=[7, -100, 9]), dict(input_ids=[11], labels=[11]),
            dict(input_ids=[5, 6], labels=[5, 6])]
    row = RowCollator()(rows)
    assert row["targets"][:3].tolist() == [9, 6, -100]
    items = trainer._get_num_items_in_batch([row], torch.device("cpu"))
    assert items.item() == supervised_in(rows) == 2
    same(by_step(trainer, [rows]), eager(rows))


@pytest.fixture
def replaying(trainer, monkeypatch):
    """The trainer with a step that records and replays, as on a GPU, but for the graph itself; and
    a list of the shapes recorded."""
    made = []

    class Replay(step_module.Recording):
        """In place of a graph: the function runs again, on the same inputs, into the same loss."""

        def __init__(self, run, batch, pool, stream=None):
            made.append(shape_of(batch))
            self.run, self.graph = run, self
            self.loss = torch.full((), math.nan, device=DEVICE)
            self.inputs = dict(batch)
            for k, v in batch.items():
                if torch.is_tensor(v):
                    self.inputs[k] = torch.zeros_like(v)  # what is not copied in shows

        def replay(self):
            self.loss.copy_(self.run(self.inputs))

    monkeypatch.setattr(step_module, "Recording", Replay)
    trainer.training_step.not_recordable = ""
    return trainer, made


def test_replayed_steps_are_eager_ones(replaying):
    """The first batch, known shapes with other numbers, a new shape in the middle of a step, and a
    step after a step."""
    trainer, made = replaying
    a, b, c, d, e = ROWS
    steps = [[a], [a], [a, b, c], [d, a, e], [b], [a], [mute(a), d]]
    tokens = 0
    for rows in steps:
        together = [example for row in rows for example in row]
        wanted = eager(together, items=sum(map(supervised_in, rows)))
        same(by_step(trainer, rows, 64), wanted)
        tokens += sum(len(example["input_ids"]) for example in together)
    assert len(made) == len(set(made)) == 4  # the first row's shape is recorded at the second step
    assert trainer.training_step.tally.take(trainer.accelerator)["num_tokens"] == tokens


def test_a_step_s_loss_outlives_the_next_replay(replaying):
    """The trainer adds losses up later than it computes them."""
    trainer, _ = replaying
    items, collate = torch.tensor(10), RowCollator(64)
    rows = ROWS[0], ROWS[0], ROWS[3]
    losses = [trainer.training_step(trainer.model, collate(r), items) for r in rows]
    assert losses[0].item() == losses[1].item() != losses[2].item()


def test_the_oldest_graph_goes_first(replaying, monkeypatch):
    trainer, made = replaying
    monkeypatch.setattr(step_module, "GRAPHS", 2)
    for rows in (ROWS[1], ROWS[0], ROWS[1], ROWS[2], ROWS[0]):
        same(by_step(trainer, [rows], 64), eager(rows))
        assert len(trainer.training_step.recorded) <= 2
    assert len(made) == 4 and made[0] == made[3]


@pytest.mark.parametrize("change", ["documents", "longest", "positions", "length"])
def test_a_graph_is_used_for_its_shape_alone(change):
    """Whatever decides a grid or a buffer is part of the shape; numbers within are not."""
    rows = examples([20, 30])
    row, other = RowCollator(64)(rows), RowCollator(64)(examples([20, 30], 9))
    assert shape_of(row) == shape_of(other)
    longer = []
    for r in rows:
        ids, labels = r["input_ids"], r["labels"]
        longer.append(dict(input_ids=ids * 3, labels=[-100] * 2 * len(labels) + labels))
    changed = {
        "documents": examples([20, 15, 15]), "longest": examples([33, 17]),
        "positions": examples([40, 60], fraction=1.0), "length": longer,
    }
    assert shape_of(RowCollator(64)(changed[change])) != shape_of(row)


def test_a_step_that_cannot_be_recorded_runs_eagerly(replaying, monkeypatch, capsys):
    """Running out of memory is no such case."""
    trainer, _ = replaying

    def fails(error):
        def record(*args):
            raise error
        return record

    by_step(trainer, [ROWS[0]])  # warms up
    full = torch.OutOfMemoryError("CUDA out of memory")
    monkeypatch.setattr(step_module, "Recording", fails(full))
    with pytest.raises(torch.OutOfMemoryError):
        by_step(trainer, [ROWS[0]])
    refused = RuntimeError("operation not permitted when\nstream is capturing")
    monkeypatch.setattr(step_module, "Recording", fails(refused))
    same(by_step(trainer, [ROWS[0]]), eager(ROWS[0]))
    said = "step: can't be recorded: operation not permitted when stream is capturing\n"
    assert capsys.readouterr().out == said and trainer.training_step.not_recordable


class Logged(TrainerCallback):
    """Keeps what a trainer logs, and can spoil the adapter at a step."""

    def __init__(self, spoil: int | None = None):
        self.lines, self.spoil = [], spoil

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if self.spoil == state.global_step + 1:
            with torch.no_grad():
                next(p for p in model.parameters() if p.requires_grad).fill_(math.nan)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs:
            self.lines.append({"step": state.global_step} | logs)


RUN = dict(
    max_steps=6, save_steps=6, per_device_train_batch_size=4, learning_rate=1e-2,
    lr_scheduler_type="constant", target="letter_and_text")


def run(
        folder: Path, resume: bool = False, spoil: int | None = None, processes: int = 1,
        **settings) -> list[dict]:
    """What is logged in training by the package's trainer, rows packed."""
    chosen, logged = recipe(**RUN | settings), Logged(spoil)
    rows, held_out = encoded_questions(chosen, 22)  # the last batch of an epoch is smaller
    model = apply_fast_parts(attach_lora(load_model(chosen), chosen), chosen)
    folder.mkdir(exist_ok=True)
    made = make_trainer(
        model, load_tokenizer(chosen), rows, chosen, folder, held_out, packed=True)
    assert isinstance(made.training_step, Step) == (chosen.fast != "off")
    assert made.accelerator.num_processes == processes
    made.add_callback(logged)
    run_training(made, folder, resume)
    return logged.lines


NUMBERS = (
    "loss", "grad_norm", "entropy", "mean_token_accuracy", "num_tokens", "learning_rate", "epoch")


def same_numbers(found: list[dict], wanted: list[dict], rel: float = 1e-3 * LOOSE) -> None:
    assert [x.keys() for x in found] == [x.keys() for x in wanted]
    for key in NUMBERS:
        assert [x[key] for x in found] == pytest.approx([x[key] for x in wanted], rel=rel), key


def test_logged_numbers_are_trls(tmp_path):
    """Over the border of an epoch, whose last batch is smaller."""
    (wanted, found) = (run(tmp_path / fast, fast=fast, max_steps=8) for fast in ("off", "auto"))
    same_numbers(found, wanted)
    assert found[-1]["loss"] < found[0]["loss"]
    assert {x["epoch"] for x in found} > {1.0}
    assert 0 < max(x["mean_token_accuracy"] for x in found) < 1


def test_accumulated_numbers_are_trls(tmp_path):
    """Where all batches have equally many positions: TRL takes the mean of batches' means, the step
    that of positions. Evaluations in between are not among them."""
    settings = dict(
        gradient_accumulation_steps=2, logging_steps=2, eval_steps=1, max_steps=4, save_steps=4,
        target="letter", per_device_train_batch_size=2)
    wanted, found = (run(tmp_path / fast, fast=fast, **settings) for fast in ("off", "auto"))
    same_numbers(found, wanted)


def test_a_resumed_run_logs_what_an_uninterrupted_one_does(tmp_path):
    complete = run(tmp_path / "complete", save_steps=3)
    cut = shutil.copytree(tmp_path / "complete", tmp_path / "cut")
    shutil.rmtree(cut / "checkpoints/checkpoint-6")  # as if it had been interrupted
    rest = run(cut, save_steps=3, resume=True)
    assert [x["step"] for x in rest] == [4, 5, 6]
    tokens = complete[2]["num_tokens"]  # TRL counts from 0 again
    counted = [x | dict(num_tokens=x["num_tokens"] + tokens) for x in rest]
    same_numbers(counted, complete[3:], 1e-6)
    lines = read_lines(cut / "metrics.jsonl")
    assert [m["loss"] for m in lines] == [x["loss"] for x in complete]
    assert [m["tokens"] for m in lines] == [x["num_tokens"] for x in complete]


@pytest.mark.parametrize("fast", ["auto", "off"])
def test_a_loss_that_is_not_a_number_stops_the_run(tmp_path, fast):
    with pytest.raises(ValueError, match="step 3: the loss is nan; lower learning_rate"):
        run(tmp_path / "run", fast=fast, spoil=3)
    assert [m["step"] for m in read_lines(tmp_path / "run/metrics.jsonl")] == [1, 2]


def run_in_one_of_two_processes(folder: str) -> None:
    """TRL's step and ours, in a process of its own; the first process writes what was logged."""
    torch.set_num_threads(1)
    settings = dict(max_steps=4, processes=2)
    found = [run(Path(folder, fast), fast=fast, **settings) for fast in ("off", "auto")]
    if os.environ["RANK"] == "0":
        Path(folder, "found.json").write_text(json.dumps(found))
    torch.distributed.barrier()
    # when DDP is destroyed, torch 2.13 may wait for gloo's thread, which waits for the GIL
    os._exit(0)


@pytest.mark.skipif(not ALL, reason="make test-all; test_launcher trains in two processes, too")
def test_logged_numbers_are_trls_with_two_processes(tmp_path):
    """Rows of different numbers of positions on each process; and as one process logs with rows
    twice as long."""
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = s.getsockname()[1]
    environment = os.environ | dict(
        MASTER_ADDR="localhost", MASTER_PORT=str(port), WORLD_SIZE="2", PYTHONPATH=str(ROOT),
        CUDA_VISIBLE_DEVICES="")
    code = f"import sys; sys.path[:0] = {PATHS}; import test_step\n"
    code += f"test_step.run_in_one_of_two_processes({str(tmp_path)!r})"
    command, started = [sys.executable, "-W", "ignore", "-c", code], []
    for rank in ("0", "1"):
        env = environment | dict(RANK=rank, LOCAL_RANK=rank)
        started.append(subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True))
    errors = [p.communicate(timeout=200)[1] for p in started]
    assert [p.returncode for p in started] == [0, 0], errors
    wanted, found = json.loads((tmp_path / "found.json").read_text())
    same_numbers(found, wanted)
    one = run(tmp_path / "one", max_steps=2, save_steps=2, per_device_train_batch_size=8)
    same_numbers(found[:2], one)


# On a GPU: what is recorded. None of these runs without one.


@pytest.fixture
def recording(tmp_path):
    """The package's trainer around the toy in bfloat16, whose step records."""
    made = trainer_around(recipe(max_steps=1, dtype="bfloat16"), tmp_path)
    assert made.training_step.not_recordable == ""
    made.model = made.accelerator.prepare(made.model)  # autocast, as train does it
    return made


def eagerly(trainer, rows: list[list[dict]]) -> tuple[float, dict]:
    """The same step, not recorded."""
    trainer.training_step.not_recordable = "not now"
    try:
        return by_step(trainer, rows, 256)
    finally:
        trainer.training_step.not_recordable = ""


SHAPES_LENGTHS = [40, 17, 90], [300], [5, 9, 33, 250]
SHAPES = [  # three shapes, three times
    [examples(lengths, seed, fraction=0.1) for lengths in SHAPES_LENGTHS] for seed in range(3)]


@needs_gpu
def test_a_recorded_step_is_the_eager_one(recording):
    """Bit for bit, for several shapes, each recorded once and replayed with other numbers, alone
    and accumulated."""
    eagerly(recording, SHAPES[0])
    by_step(recording, [SHAPES[0][0]], 256)  # warms up
    first, second, third = SHAPES
    for rows in ([first[0]], [first[1]], [second[0]], [second[1], second[2]], third):
        (found, got), (wanted, want) = by_step(recording, rows, 256), eagerly(recording, rows)
        assert recording.training_step.not_recordable == ""
        assert found == wanted and got.keys() == want.keys()
        assert [n for n in want if not torch.equal(got[n], want[n])] == []
    assert len(recording.training_step.recorded) == 3


@needs_gpu
def test_more_shapes_than_graphs(recording, monkeypatch):
    """The oldest graph is dropped, memory doesn't grow with the number of shapes, and what is
    recorded again is right."""
    monkeypatch.setattr(step_module, "GRAPHS", 3)
    shapes = [examples([20 * n + 7] * (n + 1), n) for n in range(6)]
    by_step(recording, [shapes[0]], 256)  # warms up
    held = []
    for _ in range(3):
        for rows in shapes:
            found, got = by_step(recording, [rows], 256)
            wanted, want = eagerly(recording, [rows])
            assert found == wanted and all(torch.equal(got[n], g) for n, g in want.items())
            assert len(recording.training_step.recorded) <= 3
        held.append(torch.cuda.memory_reserved())
    assert held[2] <= held[1] * 1.25, held


@needs_gpu
def test_a_recorded_step_waits_for_nothing(recording):
    """One graph is launched and nothing asks the GPU: an operation that synchronises raises under
    this mode."""
    from torch.profiler import ProfilerActivity, profile

    step, collate = recording.training_step, RowCollator(256)
    items = torch.tensor(supervised_in(SHAPES[0][0]), device="cuda")
    for rows in (SHAPES[0][0], SHAPES[1][0]):
        step(recording.model, collate(rows), items)
    row = collate(SHAPES[2][0])  # which the trainer's loader brings to the GPU
    row = {k: v.cuda() if torch.is_tensor(v) else v for k, v in row.items()}
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as events:
            step(recording.model, row, items)
            torch.cuda.set_sync_debug_mode("default")  # the profiler synchronises when it ends
    finally:
        torch.cuda.set_sync_debug_mode("default")
    names = [e.name for e in events.events()]
    assert names.count("cudaGraphLaunch") == 1, sorted(set(names))
    assert "cudaStreamSynchronize" not in names, sorted(set(names))
    assert names.count("cudaLaunchKernel") < 30, sorted(set(names))


@needs_gpu
def test_long_documents_go_to_mamba_ssm(monkeypatch):
    """This package scans a document of up to LONGEST_SCAN tokens, mamba_ssm one token more.
    The loss is eager float32's."""
    from medmcqa_lora.core.environment import missing_kernels
    from medmcqa_lora.fast import blocks, mamba

    if missing_kernels():
        pytest.skip(f"missing here: {', '.join(missing_kernels())}")
    calls = []

    def counted(name, function):
        def call(*args):
            calls.append(name)
            return function(*args)
        return call

    monkeypatch.setattr(blocks, "scan_forward", counted("own", blocks.scan_forward))
    monkeypatch.setattr(
        mamba, "mamba_ssm_forward", counted("mamba_ssm", mamba.mamba_ssm_forward))
    model = ours()
    for length, expected in ((LONGEST_SCAN, ["own"] * 2), (LONGEST_SCAN + 1, ["mamba_ssm"] * 2)):
        rows = examples([30, length, 1])
        calls.clear()
        loss = model(**inputs(RowCollator(256)(rows), supervised_in(rows))).loss.item()
        assert calls == expected
        assert loss == pytest.approx(eager(rows)[0], rel=1e-2)  # mamba_ssm's products are in TF32
