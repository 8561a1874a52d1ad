"""Runs in processes of their own: papermill under torch's launcher."""
import json
import os
import shutil
import signal
import socket
import subprocess
from dataclasses import replace
from pathlib import Path

import nbformat
import pytest
import torch
from conftest import ALL, sampled
from helpers import COMMAND, start, trained
from safetensors.torch import load_file

from medmcqa_lora.core.files import read_lines
from medmcqa_lora.core.recipe_files import load_recipe
from medmcqa_lora.launch.launcher import (
    LaunchError,
    Scoring,
    launch_evaluate,
    launch_train,
    restore_signal_handlers,
)


def toy(folder: Path, **settings):
    return replace(load_recipe("toy"), out=str(folder), **settings)


def six_steps(folder: Path, batch: int = 8, **settings):
    """A toy recipe of 6 steps, with a checkpoint after 3."""
    batches = dict(per_device_train_batch_size=batch)
    return toy(folder, max_steps=6, save_steps=3, **batches, **settings)


def losses(folder: Path) -> list[float]:
    return [m["loss"] for m in read_lines(folder / "metrics.jsonl")]


def tokens(folder: Path) -> list[int]:
    return [m["tokens"] for m in read_lines(folder / "metrics.jsonl")]


def adapter_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter/adapter_model.safetensors")


@pytest.fixture(scope="module")
def one(tmp_path_factory) -> Path:
    """A toy run in one process, 6 steps of 8 examples."""
    return launch_train(six_steps(tmp_path_factory.mktemp("one") / "run"))


def test_a_run_leaves_the_contracts_files(one):
    there = {str(p.relative_to(one)) for p in one.rglob("*") if p.is_file()}
    assert {
        "train.ipynb", "recipe.json", "metrics.jsonl", "environment.json", "README.md",
        "adapter/adapter_model.safetensors", "adapter/adapter_config.json",
        "figures/loss.png", "figures/data.png", "checkpoints/checkpoint-6/trainer_state.json",
    } <= there
    fields = {"step", "loss", "learning_rate", "tokens", "tokens_per_s", "peak_memory_gib"}
    assert set(read_lines(one / "metrics.jsonl")[0]) == fields
    executed = nbformat.read(one / "train.ipynb", 4)
    assert all(c.execution_count for c in executed.cells if c.cell_type == "code")


def test_it_packs_and_says_so(one, tmp_path):
    """Packed by default, with the losses of a padded run."""
    settings = dict(max_rows="none", per_device_train_batch_size="8")
    padded, _, _ = trained(tmp_path / "padded", False, **settings)
    assert losses(one) == pytest.approx([m["loss"] for m in padded], rel=1e-4)
    assert "packing: on (relative change" in (one / "environment.json").read_text()


@pytest.mark.skipif(not ALL, reason="make test-all; test_sharding trains in two processes, too")
def test_two_processes_give_the_losses_of_one(one, tmp_path):
    recipe = six_steps(tmp_path / "two", batch=4)
    two = launch_train(recipe, nproc=2)
    expected, found = torch.tensor(losses(one)), torch.tensor(losses(two))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    a, b = adapter_of(one), adapter_of(two)
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-3, atol=1e-4)
    assert (two / "rank1.ipynb").exists() and not (one / "rank1.ipynb").exists()
    assert tokens(two) == tokens(one)
    before = losses(two)
    shutil.rmtree(two / "checkpoints/checkpoint-6")
    launch_train(recipe, resume=True, nproc=2)
    assert losses(two) == before  # from the middle, in two processes, too


GIVEN = {
    "max_steps": "2", "logging_steps": "10", "learning_rate": "1e-3",
    "gradient_checkpointing": "true", "lora_targets": "q_proj,in_proj", "max_rows": "none",
    "max_eval_rows": "7", "tokenizer": "", "report_to": "tensorboard",
}


@pytest.fixture(scope="module")
def short_trial(tmp_path_factory) -> Path:
    """A toy run by the command, with many settings by -p: it reports to TensorBoard."""
    from medmcqa_lora.cli import main

    folder = tmp_path_factory.mktemp("trial") / "run"
    settings = [word for key, value in GIVEN.items() for word in ("-p", key, value)]
    with pytest.raises(SystemExit) as ended:
        main(["train", "--recipe", "toy", *settings, "--out", str(folder)])
    assert not ended.value.code
    return folder


def test_p_reaches_the_kernel_with_its_type(short_trial):
    recipe = json.loads((short_trial / "recipe.json").read_text())  # written by the kernel
    expected = {
        "max_steps": 2, "logging_steps": 10, "learning_rate": 1e-3,
        "gradient_checkpointing": True, "lora_targets": ["q_proj", "in_proj"], "max_rows": None,
        "max_eval_rows": 7, "tokenizer": "", "report_to": ["tensorboard"],
    }
    found = {key: recipe[key] for key in expected}
    assert found == expected
    assert {k: type(v) for k, v in found.items()} == {k: type(v) for k, v in expected.items()}


def test_tensorboard(short_trial):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(short_trial / "tensorboard")).Reload()
    found = [e.value for e in events.Scalars("train/loss")]
    assert found == pytest.approx(losses(short_trial), abs=1e-6)


def test_a_short_trial_logs_its_last_step(short_trial):
    """With fewer steps than logging_steps there would be nothing to report."""
    assert [m["step"] for m in read_lines(short_trial / "metrics.jsonl")] == [2]


FAILS_IN_KERNELS = """
import medmcqa_lora.training.trainer as t
def fails(*args, **kwargs): raise ValueError('this fails in kernels')
t.make_trainer = fails
"""


def test_failure_on_the_command_line_is_one_line(tmp_path):
    """The only line after the run's own output is ours. The fault is one that only kernels meet."""
    startup = tmp_path / "ipython/profile_default/startup"
    startup.mkdir(parents=True)
    (startup / "00.py").write_text(FAILS_IN_KERNELS)
    settings = ["--nproc-per-node", "2", "--out", str(tmp_path / "run")]
    done = subprocess.run(
        [*COMMAND, "train", "--recipe", "toy", *settings], capture_output=True, text=True,
        timeout=120, env=os.environ | {"IPYTHONDIR": str(tmp_path / "ipython")})
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("medmcqa-lora: rank ") and "this fails in kernels" in last
    assert "Traceback" not in done.stderr and "ChildFailedError" not in done.stderr


@pytest.mark.skipif(not ALL, reason="make test-all; start_run itself is tested in training.trainer")
def test_resume_refuses_other_settings(one):
    with pytest.raises(LaunchError, match="learning_rate was 0.01, is 0.5"):
        launch_train(six_steps(one, learning_rate=0.5), resume=True)


def answers(predictions: list[dict]) -> list[tuple]:
    return [(p["id"], p["prediction"]) for p in predictions]


def cut_off(evaluation: Path, folder: Path) -> Path:
    """The begin of an evaluation: five marked predictions and half a line."""
    folder.mkdir()
    (folder / "evaluation.json").write_text((evaluation / "evaluation.json").read_text())
    five = read_lines(evaluation / "predictions.jsonl")[:5]
    lines = [json.dumps({**p, "mark": "kept"}) + "\n" for p in five]
    (folder / "predictions.jsonl").write_text("".join(lines) + '{"id": "torn')
    return folder


def test_evaluation_in_two_processes_and_resumed(one, tmp_path):
    recipe = load_recipe("toy", {"per_device_eval_batch_size": "4", "packing": "on"})
    complete = launch_evaluate(recipe, tmp_path / "complete", adapter=one / "adapter")
    there = {p.name for p in complete.iterdir()}
    figures = {"by_subject.csv", "by_subject.png"}
    assert {"predictions.jsonl", "summary.json", "evaluate.ipynb", *figures} <= there
    summary = json.loads((complete / "summary.json").read_text())
    assert {
        "n", "accuracy", "ci95", "by_subject", "majority_baseline", "data_sha256", "model",
        "adapter",
    } <= set(summary)
    predictions = read_lines(complete / "predictions.jsonl")
    cut = cut_off(complete, tmp_path / "cut")
    launch_evaluate(recipe, cut, adapter=one / "adapter", resume=True, nproc=2)
    again = read_lines(cut / "predictions.jsonl")
    assert sum(p.get("mark") == "kept" for p in again) == 5  # not scored again
    assert answers(again) == answers(predictions)
    assert json.loads((cut / "summary.json").read_text()) == summary
    if ALL:  # begin_evaluation itself is tested in evaluation.letters
        with pytest.raises(LaunchError, match="holds another evaluation"):
            launch_evaluate(recipe, cut, resume=True)
    padded = replace(recipe, packing="off")
    with pytest.raises(LaunchError, match="prompts were packed, are padded"):  # other last digits
        launch_evaluate(padded, cut, adapter=one / "adapter", resume=True)


VIEW_FILES = ("predictions.jsonl", "options.jsonl", "generations.jsonl", "summary.json", "views.md")


@pytest.mark.parametrize("packing", sampled(["auto", "on"], 1))
def test_all_views_in_two_processes_are_those_of_one(packing, tmp_path):
    """Byte for byte, with the options' prompts shared (auto, on a CPU) or packed; the two resume
    what one had begun."""
    settings = dict(per_device_eval_batch_size="4", packing=packing, max_eval_rows="20")
    recipe = load_recipe("toy", settings)
    scoring = Scoring(views=("generation", "options", "letters"))
    alone = launch_evaluate(recipe, tmp_path / "alone", scoring=scoring)
    pair = tmp_path / "pair"
    pair.mkdir()
    (pair / "evaluation.json").write_bytes((alone / "evaluation.json").read_bytes())
    options = (alone / "options.jsonl").read_bytes()
    (pair / "options.jsonl").write_bytes(options[:len(options) // 3])  # cut off within a line
    launch_evaluate(recipe, pair, scoring=scoring, nproc=2, resume=True)
    expected = {name: (alone / name).read_bytes() for name in VIEW_FILES}
    assert {name: (pair / name).read_bytes() for name in VIEW_FILES} == expected
    assert not list(pair.glob("*.rank*.jsonl")) and (pair / "views.png").stat().st_size > 1000
    evaluation = json.loads((alone / "evaluation.json").read_text())
    assert evaluation["shared_prompt"] == (packing == "auto")
    summary = json.loads((alone / "summary.json").read_text())
    sums = {"accuracy_sum", "ci95_sum", "ties"}
    assert set(summary["options"]) == {"n", "accuracy", "ci95", *sums}
    assert set(summary["generation"]) == {"n", "accuracy", "ci95", "unparseable"}
    executed = (alone / "evaluate.ipynb").read_text()
    assert "options, per byte" in executed and "options, summed" in executed


def test_two_nodes(one, tmp_path):
    """Two launchers with one process each, as on two machines."""
    with socket.socket() as s:
        s.bind(("localhost", 0))
        endpoint = f"localhost:{s.getsockname()[1]}"
    settings = dict(max_steps=6, save_steps=3, per_device_train_batch_size=4)
    words = [word for key, value in settings.items() for word in ("-p", key, str(value))]
    hosts = ["--nnodes", "2", "--rdzv-endpoint", endpoint]
    command = [*COMMAND, "train", "--recipe", "toy", *words, *hosts]
    nodes = []
    for i in (0, 1):
        own = ["--node-rank", str(i), "--out", str(tmp_path / f"node{i}")]
        nodes.append(start([*command, *own], stderr=subprocess.PIPE, text=True))
    stderr = [n.communicate(timeout=180)[1] for n in nodes]
    assert [n.returncode for n in nodes] == [0, 0], stderr
    assert losses(tmp_path / "node0") == pytest.approx(losses(one), abs=1e-5)
    assert (tmp_path / "node1/rank1.ipynb").exists()


def test_signals_get_their_earlier_handlers_back():
    before = signal.getsignal(signal.SIGTERM)
    with restore_signal_handlers():
        signal.signal(signal.SIGTERM, lambda *_: None)
    assert signal.getsignal(signal.SIGTERM) == before
