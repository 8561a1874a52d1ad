"""The trainer's own step beside transformers' eager float32 code, an example at a time: losses, gradients, logged numbers, in every situation."""
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
from transformers import TrainerCallback
from transformers.utils import logging

from benchmarks.isolation import GROUPS, adapted
from medmcqa_lora.training import step as step_module
from medmcqa_lora.data.leakage import load_pair
from medmcqa_lora.data.tokens import encode_questions
from medmcqa_lora.core.files import read_lines
from medmcqa_lora.fast.mamba import LONGEST
from medmcqa_lora.core.environment import compute_device
from medmcqa_lora.model.resolve import TOY, load_tokenizer
from medmcqa_lora.model.load import load_model
from medmcqa_lora.model.lora import attach_lora
from medmcqa_lora.fast.apply import apply_fast_parts
from medmcqa_lora.core.recipe import Recipe
from medmcqa_lora.training.step import HeadLoss, RowCollator, Step, shape_of, use_head_loss
from medmcqa_lora.training.trainer import make_trainer, run_training

CHUNK = TOY["chunk_size"]
LENGTHS = [57, 1, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK, 2]
TARGETS = [*GROUPS, "mlp"]
DEVICE, LOOSE = compute_device(), 10 if torch.cuda.is_available() else 1  # a GPU adds in another order, and Triton's exponentials are its own
logging.disable_progress_bar()
pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore:The following rank_pattern keys:RuntimeWarning")]  # they do match: names of fused parameters
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs and this package's kernels at speed need a GPU")


def recipe(**settings) -> Recipe:
    return Recipe(model="toy-nemotron-h", lora_r=4, lora_alpha=8, lora_targets=TARGETS, **settings)


def examples(lengths: list[int], seed: int = 0, share: float = 0.4) -> list[dict]:
    """Made-up examples; a share of their tokens is learned, the last one always."""
    g = torch.Generator().manual_seed(seed)
    ids = [torch.randint(3, 1000, (n,), generator=g) for n in lengths]
    labels = [torch.where((torch.rand(len(x), generator=g) < share) | (torch.arange(len(x)) == len(x) - 1), x, -100) for x in ids]
    return [dict(input_ids=x.tolist(), labels=y.tolist()) for x, y in zip(ids, labels)]


def supervised_in(rows: list[dict]) -> int:
    return sum(label != -100 for r in rows for label in r["labels"][1:])


def gradients_of(model) -> dict[str, torch.Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def favour(model, few: bool) -> None:
    """Send every token to the first experts, so that the others have none."""
    for m in model.modules():
        if few and hasattr(m, "e_score_correction_bias"):
            m.e_score_correction_bias[: m.top_k] = 10.0


def eager(rows: list[dict], few: bool = False, items: int = 0) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and LoRA gradients by transformers' and PEFT's float32 code, which sees one example at a time."""
    model = adapted(recipe(fast="off"))
    model.set_experts_implementation("eager")
    favour(model, few)
    total, items = 0.0, items or supervised_in(rows)
    for r in rows:
        logits, labels = model(torch.tensor([r["input_ids"]], device=DEVICE), use_cache=False).logits[0].float(), torch.tensor(r["labels"], device=DEVICE)
        loss = F.cross_entropy(logits[:-1], labels[1:], ignore_index=-100, reduction="sum") / items
        loss.backward()
        total += loss.item()
    return total, gradients_of(model)


def same(found: tuple, wanted: tuple, bound: float = 1e-4 * LOOSE) -> None:
    """A loss and all gradients; the norm of a matrix' difference relative to its norm, or to a thousandth of all gradients' where it has next to none."""
    (loss, got), (expected, want) = found, wanted
    least = 1e-3 * torch.stack([g.norm() for g in want.values()]).norm()
    assert loss == pytest.approx(expected, rel=bound) and got.keys() == want.keys() and len(want) > 20 and least > 0
    apart = {n: float((got[n] - g).norm() / torch.maximum(g.norm(), least)) for n, g in want.items()}
    assert max(apart.values()) < bound, (max(apart, key=apart.get), max(apart.values()))


def ours(few: bool = False):
    model = adapted(recipe())
    favour(model, few)
    use_head_loss(model.get_base_model())
    return model


def inputs(row: dict, items: int) -> dict:
    """What the step gives a model."""
    row = {k: v for k, v in row.items() if k not in ("labels", "tokens")} | dict(num_items_in_batch=torch.tensor(float(items)))
    return {k: v.to(DEVICE) if torch.is_tensor(v) else v for k, v in row.items()}


def by_step(trainer, rows: list[list[dict]], multiple: int = 1, items: int | None = None) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients of one optimizer step, whose micro-batches are given, by a trainer's training_step."""
    trainer.model.zero_grad(set_to_none=True)
    items = torch.tensor(sum(map(supervised_in, rows)) if items is None else items)
    loss = sum(trainer.training_step(trainer.model, RowCollator(multiple)(r), items).item() for r in rows)
    return loss, gradients_of(trainer.model)


@pytest.fixture
def trainer(tmp_path):
    """The package's trainer around the toy with random adapters."""
    chosen = recipe(max_steps=1)
    tokenizer = load_tokenizer(chosen)
    made = make_trainer(adapted(chosen), tokenizer, encode_questions(load_pair(chosen)[0].questions[:8], tokenizer, chosen), chosen, tmp_path, packed=True)
    assert isinstance(made.training_step, Step) and made.training_step.why == ("" if torch.cuda.is_available() else "not asked for")
    return made


SITUATIONS = {"packed": (LENGTHS, 1), "filled": (LENGTHS, 64), "a whole multiple": ([30, 34], 64), "one document": ([45], 1), "one document, filled": ([45], 64), "one token beside": ([1, 2, 1], 16)}


@pytest.mark.parametrize("few", [False, True], ids=["as routed", "all to the same experts"])
@pytest.mark.parametrize("situation", SITUATIONS)
def test_whole_model_beside_eager(situation, few):
    """Every LoRA group; also with experts that get no token."""
    lengths, multiple = SITUATIONS[situation]
    rows, model = examples(lengths), ours(few)
    row = RowCollator(multiple)(rows)
    assert row["input_ids"].shape[1] % multiple == 0 and row["tokens"] == sum(lengths)
    if multiple > 1:  # what fills up is a document of its own, which costs no more than it is long
        assert row["cu_seq_lens_q"].tolist()[-2:] == [sum(lengths), row["input_ids"].shape[1]] and not set(row["seq_idx"][0, sum(lengths) :].tolist()) & set(row["seq_idx"][0, : sum(lengths)].tolist())
    loss = model(**inputs(row, supervised_in(rows))).loss
    loss.backward()
    wanted = eager(rows, few)
    same((loss.item(), gradients_of(model)), wanted)
    if few:
        up = next(g for n, g in wanted[1].items() if "experts" in n and n.endswith("lora_A.default.weight") and g.shape[0] == TOY["n_routed_experts"] * 4)
        assert (up.view(TOY["n_routed_experts"], -1).abs().amax(1) > 0).sum() <= TOY["num_experts_per_tok"]  # the others had no token


needs_interpreter = pytest.mark.skipif(torch.cuda.is_available() or find_spec("triton") is None, reason="Triton's interpreter is for machines without a GPU, and needs Triton")
INTERPRETED = """
import sys; sys.path[:0] = {path!r}
import torch; torch.set_num_threads(1)
import test_step as t
from medmcqa_lora.fast import blocks, mamba, operations
for module in {modules}:
    module.use_triton = lambda *tensors: True
scanned, scan = [], blocks.scan_forward
blocks.scan_forward = lambda *args: (scanned.append(args), scan(*args))[1]
for lengths, multiple, few in {cases}:
    rows, model = t.examples(lengths), t.ours(few)
    scanned.clear()
    loss = model(**t.inputs(t.RowCollator(multiple)(rows), t.supervised_in(rows))).loss
    loss.backward()
    t.same((loss.item(), t.gradients_of(model)), t.eager(rows, few))
    assert len(scanned) == t.TOY["hybrid_override_pattern"].count("M"), len(scanned)
print("the same")
"""


def interpreted(modules: str, cases: list[tuple]) -> None:
    """Compare in a process in which Triton's interpreter runs the kernels: it has to be chosen before transformers is imported."""
    code = INTERPRETED.format(path=[str(ROOT / "tests/training"), str(ROOT / "tests"), str(ROOT)], modules=modules, cases=cases)
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, env=os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)})
    assert done.stdout.strip().endswith("the same"), done.stderr[-2000:]


@needs_interpreter
def test_the_packages_scan_in_the_whole_model():
    border = [1, CHUNK - 1, CHUNK, CHUNK + 1, CHUNK + 1, 3 * CHUNK]  # two tokens of the fifth lie in the next block of 64; the last one of an example has no gradient
    interpreted("(mamba,)", [(border, 1, False)] + [(*SITUATIONS[s], False) for s in SITUATIONS if ALL])


@needs_interpreter
@pytest.mark.skipif(not ALL, reason="make test-all: Triton's interpreter takes its time")
@pytest.mark.parametrize("few", [False, True], ids=["as routed", "all to the same experts"])
def test_all_of_the_packages_kernels_in_the_whole_model(few):
    interpreted("(mamba, operations)", [(*SITUATIONS["filled"], few)])


ROWS = [examples([5, 40, 17], 1), examples([30], 2), examples([64, 9, 33, 3], 3), examples([40, 17, 5], 4), examples([2, 31], 5)]  # of five shapes, the last a smaller batch


@pytest.mark.parametrize("multiple", [1, 64])
def test_accumulation_over_rows_of_different_shapes(trainer, multiple):
    """Micro-batches of one, two and four examples weigh by their positions: as one row of all, and as each example alone."""
    wanted = eager([e for r in ROWS for e in r])
    same(by_step(trainer, ROWS, multiple), wanted)
    same(by_step(trainer, [[e for r in ROWS for e in r]], multiple), wanted)


def mute(rows: list[dict]) -> list[dict]:
    return [r | dict(labels=[-100] * len(r["labels"])) for r in rows]


def test_rows_without_a_supervised_position(trainer):
    """In an accumulation they add nothing; alone, the loss is 0 and nothing moves (TRL divides by their number, 0)."""
    same(by_step(trainer, [mute(ROWS[0]), ROWS[1], mute(ROWS[2])], 64), eager(ROWS[1]))
    trainer.training_step.tally.sums.zero_()
    loss, found = by_step(trainer, [mute(ROWS[0])])
    assert loss == 0 and found and not any(g.any() for g in found.values())
    assert trainer.training_step.tally.take(trainer.accelerator) | dict(num_tokens=0) == dict(num_tokens=0, entropy=0, mean_token_accuracy=0)


def test_a_row_without_a_target_is_never_right():
    """Equal logits: the first token is the best, and stands in where there is no target."""
    loss, statistics = HeadLoss.apply(torch.zeros(3, 4), torch.zeros(5, 4), torch.tensor([-100, 0, 2]))
    assert loss.item() == pytest.approx(2 * math.log(5)) and statistics.tolist() == pytest.approx([2 * math.log(5), 1, 2])


def test_positions_are_not_counted_by_a_label_that_nothing_stands_before(trainer):
    """An example's first token can't be predicted, whatever its label, and the count that divides is the trainer's own."""
    rows = [dict(input_ids=[7, 8, 9], labels=[7, -100, 9]), dict(input_ids=[11], labels=[11]), dict(input_ids=[5, 6], labels=[5, 6])]
    row = RowCollator()(rows)
    assert row["targets"][:3].tolist() == [9, 6, -100] and trainer._get_num_items_in_batch([row], torch.device("cpu")).item() == supervised_in(rows) == 2
    same(by_step(trainer, [rows]), eager(rows))


@pytest.fixture
def replaying(trainer, monkeypatch):
    """The trainer with a step that records and replays, as on a GPU, but for the graph itself; and a list of the shapes recorded."""
    made = []

    class Replay(step_module.Recording):
        """For a graph: what it was recorded with is run again, on the same inputs and for the same loss."""

        def __init__(self, run, batch, pool, stream=None):
            made.append(shape_of(batch))
            self.run, self.graph, self.loss = run, self, torch.full((), math.nan, device=DEVICE)
            self.inputs = {k: torch.zeros_like(v) if torch.is_tensor(v) else v for k, v in batch.items()}  # zeros: what is not copied in shows

        def replay(self):
            self.loss.copy_(self.run(self.inputs))

    monkeypatch.setattr(step_module, "Recording", Replay)
    trainer.training_step.why = ""
    return trainer, made


def test_replayed_steps_are_eager_ones(replaying):
    """The first batch, known shapes with other numbers, a new shape in the middle of a step, and a step after a step."""
    trainer, made = replaying
    steps = [[ROWS[0]], [ROWS[0]], ROWS[:3], [ROWS[3], ROWS[0], ROWS[4]], [ROWS[1]], [ROWS[0]], [mute(ROWS[0]), ROWS[3]]]
    for rows in steps:
        same(by_step(trainer, rows, 64), eager([e for r in rows for e in r], items=sum(map(supervised_in, rows))))
    assert len(made) == len(set(made)) == 4  # the row that warms up is recorded with the second step
    assert trainer.training_step.tally.take(trainer.accelerator)["num_tokens"] == sum(len(e["input_ids"]) for rows in steps for r in rows for e in r)


def test_a_step_s_loss_outlives_the_next_replay(replaying):
    """The trainer adds losses up later than it computes them."""
    trainer, _ = replaying
    items = torch.tensor(10)
    losses = [trainer.training_step(trainer.model, RowCollator(64)(r), items) for r in (ROWS[0], ROWS[0], ROWS[3])]
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
    longer = [dict(input_ids=r["input_ids"] * 3, labels=[-100] * 2 * len(r["labels"]) + r["labels"]) for r in rows]
    changed = {"documents": examples([20, 15, 15]), "longest": examples([33, 17]), "positions": examples([40, 60], share=1.0), "length": longer}[change]
    assert shape_of(RowCollator(64)(changed)) != shape_of(row)


def test_out_of_memory_is_not_taken_for_a_step_that_cannot_be_recorded(replaying, monkeypatch, capsys):
    trainer, _ = replaying

    def fails(error):
        def record(*args):
            raise error
        return record

    by_step(trainer, [ROWS[0]])  # warms up
    monkeypatch.setattr(step_module, "Recording", fails(torch.OutOfMemoryError("CUDA out of memory")))
    with pytest.raises(torch.OutOfMemoryError):
        by_step(trainer, [ROWS[0]])
    monkeypatch.setattr(step_module, "Recording", fails(RuntimeError("operation not permitted when\nstream is capturing")))
    same(by_step(trainer, [ROWS[0]]), eager(ROWS[0]))
    assert capsys.readouterr().out == "step: can't be recorded: operation not permitted when stream is capturing\n" and trainer.training_step.why


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


def run(folder: Path, resume: bool = False, spoil: int | None = None, rank: int = 0, processes: int = 1, **settings) -> list[dict]:
    """What is logged in training by the package's trainer, rows packed."""
    settings = dict(max_steps=6, save_steps=6, per_device_train_batch_size=4, learning_rate=1e-2, lr_scheduler_type="constant", target="letter_and_text") | settings
    chosen, logged = recipe(**settings), Logged(spoil)
    tokenizer = load_tokenizer(chosen)
    encoded, held_out = (encode_questions(part.questions[:22], tokenizer, chosen) for part in load_pair(chosen))  # the last batch of an epoch is smaller
    folder.mkdir(exist_ok=True)
    made = make_trainer(apply_fast_parts(attach_lora(load_model(chosen), chosen), chosen), tokenizer, encoded, chosen, folder, held_out, packed=True)
    assert isinstance(made.training_step, Step) == (chosen.fast != "off") and made.accelerator.num_processes == processes
    made.add_callback(logged)
    run_training(made, folder, resume)
    return logged.lines


NUMBERS = ("loss", "grad_norm", "entropy", "mean_token_accuracy", "num_tokens", "learning_rate", "epoch")


def same_numbers(found: list[dict], wanted: list[dict], rel: float = 1e-3 * LOOSE) -> None:
    assert len(found) == len(wanted) and all(x.keys() == y.keys() for x, y in zip(found, wanted))
    for key in NUMBERS:
        assert [x[key] for x in found] == pytest.approx([x[key] for x in wanted], rel=rel), key


def test_logged_numbers_are_trls(tmp_path):
    """Over the border of an epoch, whose last batch is smaller."""
    (wanted, found) = (run(tmp_path / fast, fast=fast, max_steps=8) for fast in ("off", "auto"))
    same_numbers(found, wanted)
    assert found[-1]["loss"] < found[0]["loss"] and {x["epoch"] for x in found} > {1.0} and 0 < max(x["mean_token_accuracy"] for x in found) < 1


def test_accumulated_numbers_are_trls(tmp_path):
    """Where every batch has as many positions as the others, that is: TRL takes the mean of batches' means, the step that of positions. Evaluations in between are not among them."""
    settings = dict(gradient_accumulation_steps=2, logging_steps=2, eval_steps=1, max_steps=4, save_steps=4, target="letter", per_device_train_batch_size=2)
    wanted, found = (run(tmp_path / fast, fast=fast, **settings) for fast in ("off", "auto"))
    same_numbers(found, wanted)


def test_a_resumed_run_logs_what_the_whole_run_did(tmp_path):
    whole = run(tmp_path / "whole", save_steps=3)
    shutil.rmtree(shutil.copytree(tmp_path / "whole", tmp_path / "cut") / "checkpoints/checkpoint-6")  # as if it had been cut off
    rest = run(tmp_path / "cut", save_steps=3, resume=True)
    assert [x["step"] for x in rest] == [4, 5, 6]
    tokens = whole[2]["num_tokens"]  # TRL counts from 0 again
    same_numbers([x | dict(num_tokens=x["num_tokens"] + tokens) for x in rest], whole[3:], 1e-6)
    assert [m["loss"] for m in read_lines(tmp_path / "cut/metrics.jsonl")] == [x["loss"] for x in whole]
    assert [m["tokens"] for m in read_lines(tmp_path / "cut/metrics.jsonl")] == [x["num_tokens"] for x in whole]


@pytest.mark.parametrize("fast", ["auto", "off"])
def test_a_loss_that_is_not_a_number_stops_the_run(tmp_path, fast):
    with pytest.raises(ValueError, match="step 3: the loss is nan; lower learning_rate"):
        run(tmp_path / "run", fast=fast, spoil=3)
    assert [m["step"] for m in read_lines(tmp_path / "run/metrics.jsonl")] == [1, 2]


PROCESS = """
import json, os, sys; sys.path[:0] = {path!r}
from pathlib import Path
import torch; torch.set_num_threads(1)
import test_step as t
found = [t.run(Path({folder!r}) / fast, fast=fast, max_steps=4, processes=2) for fast in ("off", "auto")]
if os.environ["RANK"] == "0": Path({folder!r}, "found.json").write_text(json.dumps(found))
torch.distributed.barrier()
os._exit(0)  # taking DDP apart, torch 2.13 may wait for gloo's thread, which waits for the GIL
"""


@pytest.mark.skipif(not ALL, reason="make test-all; test_launcher trains in two processes, too")
def test_logged_numbers_are_trls_with_two_processes(tmp_path):
    """Rows of different numbers of positions on each process; and as one process logs with rows twice as long."""
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = s.getsockname()[1]
    shared = os.environ | dict(MASTER_ADDR="localhost", MASTER_PORT=str(port), WORLD_SIZE="2", PYTHONPATH=str(ROOT), CUDA_VISIBLE_DEVICES="")
    code = PROCESS.format(path=[str(ROOT / "tests/training"), str(ROOT / "tests"), str(ROOT)], folder=str(tmp_path))
    started = [subprocess.Popen([sys.executable, "-W", "ignore", "-c", code], env=shared | dict(RANK=str(i), LOCAL_RANK=str(i)), stderr=subprocess.PIPE, text=True) for i in (0, 1)]
    told = [p.communicate(timeout=200)[1] for p in started]
    assert [p.returncode for p in started] == [0, 0], told
    wanted, found = json.loads((tmp_path / "found.json").read_text())
    same_numbers(found, wanted)
    one = run(tmp_path / "one", max_steps=2, save_steps=2, per_device_train_batch_size=8)
    same_numbers(found[:2], one)


# On a GPU: what is recorded. None of these runs without one.


@pytest.fixture
def recording(tmp_path):
    """The package's trainer around the toy in bfloat16, whose step records."""
    chosen = recipe(max_steps=1, dtype="bfloat16")
    tokenizer = load_tokenizer(chosen)
    made = make_trainer(adapted(chosen), tokenizer, encode_questions(load_pair(chosen)[0].questions[:8], tokenizer, chosen), chosen, tmp_path, packed=True)
    assert made.training_step.why == ""
    made.model = made.accelerator.prepare(made.model)  # autocast, as train does it
    return made


def eagerly(trainer, rows: list[list[dict]]) -> tuple[float, dict[str, torch.Tensor]]:
    """The same step, not recorded."""
    trainer.training_step.why = "not now"
    try:
        return by_step(trainer, rows, 256)
    finally:
        trainer.training_step.why = ""


SHAPES = [[examples(lengths, seed, share=0.1) for lengths in ([40, 17, 90], [300], [5, 9, 33, 250])] for seed in range(3)]  # three shapes, three times


@needs_gpu
def test_a_recorded_step_is_the_eager_one(recording):
    """Bit for bit, for several shapes, each recorded once and replayed with other numbers, alone and accumulated."""
    eagerly(recording, SHAPES[0])
    by_step(recording, [SHAPES[0][0]], 256)  # warms up
    for rows in ([SHAPES[0][0]], [SHAPES[0][1]], [SHAPES[1][0]], [SHAPES[1][1], SHAPES[1][2]], SHAPES[2]):
        (found, got), (wanted, want) = by_step(recording, rows, 256), eagerly(recording, rows)
        assert recording.training_step.why == "" and found == wanted and got.keys() == want.keys()
        assert [n for n in want if not torch.equal(got[n], want[n])] == []
    assert len(recording.training_step.recorded) == 3


@needs_gpu
def test_more_shapes_than_graphs(recording, monkeypatch):
    """The oldest graph is dropped, memory doesn't grow with the number of shapes, and what is recorded again is right."""
    monkeypatch.setattr(step_module, "GRAPHS", 3)
    shapes = [examples([20 * n + 7] * (n + 1), n) for n in range(6)]
    by_step(recording, [shapes[0]], 256)  # warms up
    held = []
    for _ in range(3):
        for rows in shapes:
            found, wanted = by_step(recording, [rows], 256), eagerly(recording, [rows])
            assert found[0] == wanted[0] and all(torch.equal(found[1][n], g) for n, g in wanted[1].items())
            assert len(recording.training_step.recorded) <= 3
        held.append(torch.cuda.memory_reserved())
    assert held[2] <= held[1] * 1.25, held


@needs_gpu
def test_a_recorded_step_waits_for_nothing(recording):
    """One graph is launched and nothing asks the GPU: an operation that synchronises raises under this mode."""
    step, items = recording.training_step, torch.tensor(supervised_in(SHAPES[0][0]), device="cuda")
    for rows in (SHAPES[0][0], SHAPES[1][0]):
        step(recording.model, RowCollator(256)(rows), items)
    row = {k: v.cuda() if torch.is_tensor(v) else v for k, v in RowCollator(256)(SHAPES[2][0]).items()}  # the trainer's loader brings it there
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]) as profile:
            step(recording.model, row, items)
            torch.cuda.set_sync_debug_mode("default")  # the profiler synchronises when it ends
    finally:
        torch.cuda.set_sync_debug_mode("default")
    names = [e.name for e in profile.events()]
    assert names.count("cudaGraphLaunch") == 1 and "cudaStreamSynchronize" not in names and names.count("cudaLaunchKernel") < 30, sorted(set(names))


@needs_gpu
def test_long_documents_go_to_mamba_ssm(monkeypatch):
    """A document of up to LONGEST tokens is scanned by this package, one token more by mamba_ssm; the loss is eager float32's."""
    from medmcqa_lora.core.environment import missing_kernels
    from medmcqa_lora.fast import blocks, mamba

    if missing_kernels():
        pytest.skip(f"missing here: {', '.join(missing_kernels())}")
    scanned, lean = [], []
    scan, other = blocks.scan_forward, mamba.lean_forward
    monkeypatch.setattr(blocks, "scan_forward", lambda *args: (scanned.append(1), scan(*args))[1])
    monkeypatch.setattr(mamba, "lean_forward", lambda *args: (lean.append(1), other(*args))[1])
    model = ours()
    for length, counts in ((LONGEST, (2, 0)), (LONGEST + 1, (0, 2))):
        rows = examples([30, length, 1])
        scanned.clear(), lean.clear()
        loss = model(**inputs(RowCollator(256)(rows), supervised_in(rows))).loss.item()
        assert (len(scanned), len(lean)) == counts and loss == pytest.approx(eager(rows)[0], rel=1e-2)  # mamba_ssm's products are in TF32
