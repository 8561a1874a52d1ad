"""Runs in processes of their own: papermill under torch's launcher."""
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import nbformat
import pytest
import torch
from conftest import ALL, sampled
from safetensors.torch import load_file
from helpers import trained

from medmcqa_lora.core.files import read_lines
from medmcqa_lora.launch.launcher import LaunchError, launch_evaluate, launch_train
from medmcqa_lora.core.recipe_files import load_recipe

COMMAND = [sys.executable, "-c", "from medmcqa_lora.cli import main; main()"]


def toy(folder: Path, **keys):
    return replace(load_recipe("toy"), out=str(folder), **keys)


def losses(folder: Path) -> list[float]:
    return [m["loss"] for m in read_lines(folder / "metrics.jsonl")]


@pytest.fixture(scope="module")
def one(tmp_path_factory) -> Path:
    """A toy run in one process, 6 steps of 8 examples."""
    folder = tmp_path_factory.mktemp("one") / "run"
    return launch_train(toy(folder, max_steps=6, save_steps=3, per_device_train_batch_size=8))


def test_a_run_leaves_the_contracts_files(one):
    there = {str(p.relative_to(one)) for p in one.rglob("*") if p.is_file()}
    assert {"train.ipynb", "recipe.json", "adapter/adapter_model.safetensors", "adapter/adapter_config.json", "metrics.jsonl", "figures/loss.png",
            "figures/data.png", "environment.json", "README.md", "checkpoints/checkpoint-6/trainer_state.json"} <= there
    assert set(read_lines(one / "metrics.jsonl")[0]) == {"step", "loss", "learning_rate", "tokens", "tokens_per_s", "peak_memory_gib"}
    executed = nbformat.read(one / "train.ipynb", 4)
    assert all(c.execution_count for c in executed.cells if c.cell_type == "code")


def test_it_packs_and_says_so(one, tmp_path):
    """Packed by default, with the losses of a padded run."""
    padded, _, _ = trained(tmp_path / "padded", False, max_rows="none", per_device_train_batch_size="8")
    assert losses(one) == pytest.approx([m["loss"] for m in padded], rel=1e-4)
    assert "packing: on (relative change" in (one / "environment.json").read_text()


@pytest.mark.skipif(not ALL, reason="make test-all; test_sharding trains in two processes as in one")
def test_two_processes_give_the_losses_of_one(one, tmp_path):
    two = launch_train(toy(tmp_path / "two", max_steps=6, save_steps=3, per_device_train_batch_size=4), nproc=2)
    torch.testing.assert_close(torch.tensor(losses(two)), torch.tensor(losses(one)), rtol=1e-5, atol=1e-5)
    a, b = (load_file(f / "adapter/adapter_model.safetensors") for f in (one, two))
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-3, atol=1e-4)
    assert (two / "rank1.ipynb").exists() and not (one / "rank1.ipynb").exists()
    assert [m["tokens"] for m in read_lines(two / "metrics.jsonl")] == [m["tokens"] for m in read_lines(one / "metrics.jsonl")]
    before = losses(two)
    shutil.rmtree(two / "checkpoints/checkpoint-6")
    launch_train(toy(two, max_steps=6, save_steps=3, per_device_train_batch_size=4), resume=True, nproc=2)
    assert losses(two) == before  # from the middle, in two processes, too


GIVEN = {"max_steps": "2", "logging_steps": "10", "learning_rate": "1e-3", "gradient_checkpointing": "true", "lora_targets": "q_proj,in_proj", "max_rows": "none",
         "max_eval_rows": "7", "tokenizer": "", "report_to": "tensorboard"}


@pytest.fixture(scope="module")
def told(tmp_path_factory) -> Path:
    """A toy run by the command, told much by -p: a short trial that reports to TensorBoard."""
    from medmcqa_lora.cli import main

    folder = tmp_path_factory.mktemp("told") / "run"
    with pytest.raises(SystemExit) as ended:
        main(["train", "--recipe", "toy", *(w for k, v in GIVEN.items() for w in ("-p", k, v)), "--out", str(folder)])
    assert not ended.value.code
    return folder


def test_p_reaches_the_kernel_with_its_type(told):
    recipe = json.loads((told / "recipe.json").read_text())  # written by the kernel
    expected = {"max_steps": 2, "logging_steps": 10, "learning_rate": 1e-3, "gradient_checkpointing": True, "lora_targets": ["q_proj", "in_proj"], "max_rows": None,
                "max_eval_rows": 7, "tokenizer": "", "report_to": ["tensorboard"]}
    assert {k: recipe[k] for k in expected} == expected
    assert {k: type(recipe[k]) for k in expected} == {k: type(v) for k, v in expected.items()}


def test_tensorboard(told):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(told / "tensorboard")).Reload()
    assert [e.value for e in events.Scalars("train/loss")] == pytest.approx(losses(told), abs=1e-6)


def test_a_short_trial_logs_its_last_step(told):
    """With fewer steps than logging_steps there would be nothing to report."""
    assert [m["step"] for m in read_lines(told / "metrics.jsonl")] == [2]


def test_failure_on_the_command_line_is_one_line(tmp_path):
    """Not a wall of launcher text: the only line behind the run's own output is ours. The fault is one that kernels alone meet."""
    (startup := tmp_path / "ipython/profile_default/startup").mkdir(parents=True)
    (startup / "00.py").write_text("import medmcqa_lora.training.trainer as t\ndef fails(*args, **kwargs): raise ValueError('this fails in kernels')\nt.make_trainer = fails\n")
    done = subprocess.run([*COMMAND, "train", "--recipe", "toy", "--nproc-per-node", "2", "--out", str(tmp_path / "run")],
                          capture_output=True, text=True, timeout=120, env=os.environ | {"IPYTHONDIR": str(tmp_path / "ipython")})
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("medmcqa-lora: rank ") and "this fails in kernels" in last
    assert "Traceback" not in done.stderr and "ChildFailedError" not in done.stderr


@pytest.mark.skipif(not ALL, reason="make test-all; start_run itself is tested in training.trainer")
def test_resume_refuses_other_settings(one):
    with pytest.raises(LaunchError, match="learning_rate was 0.01, is 0.5"):
        launch_train(toy(one, max_steps=6, save_steps=3, per_device_train_batch_size=8, learning_rate=0.5), resume=True)


def test_evaluation_in_two_processes_and_resumed(one, tmp_path):
    recipe = load_recipe("toy", {"per_device_eval_batch_size": "4", "packing": "on"})
    whole = launch_evaluate(recipe, tmp_path / "whole", adapter=one / "adapter")
    there = {p.name for p in whole.iterdir()}
    assert {"predictions.jsonl", "summary.json", "by_subject.csv", "by_subject.png", "evaluate.ipynb"} <= there
    summary = json.loads((whole / "summary.json").read_text())
    assert {"n", "accuracy", "ci95", "by_subject", "majority_baseline", "data_sha256", "model", "adapter"} <= set(summary)
    predictions = read_lines(whole / "predictions.jsonl")
    cut = tmp_path / "cut"
    cut.mkdir()
    (cut / "evaluation.json").write_text((whole / "evaluation.json").read_text())
    with open(cut / "predictions.jsonl", "w") as f:
        f.write("".join(json.dumps({**p, "mark": "kept"}) + "\n" for p in predictions[:5]) + '{"id": "torn')
    launch_evaluate(recipe, cut, adapter=one / "adapter", resume=True, nproc=2)
    again = read_lines(cut / "predictions.jsonl")
    assert sum(p.get("mark") == "kept" for p in again) == 5  # not scored again
    assert [(p["id"], p["prediction"]) for p in again] == [(p["id"], p["prediction"]) for p in predictions]
    assert json.loads((cut / "summary.json").read_text()) == summary
    if ALL:  # begin_evaluation itself is tested in evaluation.letters
        with pytest.raises(LaunchError, match="holds another evaluation"):
            launch_evaluate(recipe, cut, resume=True)
    with pytest.raises(LaunchError, match="prompts were packed, are padded"):  # they differ in the last digits
        launch_evaluate(replace(recipe, packing="off"), cut, adapter=one / "adapter", resume=True)


@pytest.mark.parametrize("packing", sampled(["auto", "on"], 1))
def test_all_views_in_two_processes_are_those_of_one(packing, tmp_path):
    """Byte for byte, with the options' prompts shared (auto, on a CPU) or packed; the two go on with what one had begun."""
    recipe = load_recipe("toy", {"per_device_eval_batch_size": "4", "packing": packing, "max_eval_rows": "20"})
    views = ["generation", "options", "letters"]
    whole, pair = launch_evaluate(recipe, tmp_path / "whole", views=views), tmp_path / "pair"
    pair.mkdir()
    (pair / "evaluation.json").write_bytes((whole / "evaluation.json").read_bytes())
    (pair / "options.jsonl").write_bytes((text := (whole / "options.jsonl").read_bytes())[:len(text) // 3])  # cut off in the middle of a line
    launch_evaluate(recipe, pair, views=views, nproc=2, resume=True)
    kept = ("predictions.jsonl", "options.jsonl", "generations.jsonl", "summary.json", "views.md")
    assert {name: (pair / name).read_bytes() for name in kept} == {name: (whole / name).read_bytes() for name in kept}
    assert not list(pair.glob("*.rank*.jsonl")) and (pair / "views.png").stat().st_size > 1000
    assert json.loads((whole / "evaluation.json").read_text())["shared_prompt"] == (packing == "auto")
    summary = json.loads((whole / "summary.json").read_text())
    assert set(summary["options"]) == {"n", "accuracy", "ci95", "accuracy_sum", "ci95_sum", "ties"} and set(summary["generation"]) == {"n", "accuracy", "ci95", "unparseable"}
    assert "options, per byte" in (executed := (whole / "evaluate.ipynb").read_text()) and "options, summed" in executed


def test_two_nodes(one, tmp_path):
    """Two launchers with one process each, as on two machines."""
    import socket

    with socket.socket() as s:
        s.bind(("localhost", 0))
        endpoint = f"localhost:{s.getsockname()[1]}"
    words = ["train", "--recipe", "toy", "-p", "max_steps", "6", "-p", "save_steps", "3", "-p", "per_device_train_batch_size", "4", "--nnodes", "2", "--rdzv-endpoint", endpoint]
    nodes = [subprocess.Popen([*COMMAND, *words, "--node-rank", str(i), "--out", str(tmp_path / f"node{i}")], stderr=subprocess.PIPE, text=True) for i in (0, 1)]
    told = [n.communicate(timeout=180)[1] for n in nodes]
    assert [n.returncode for n in nodes] == [0, 0], told
    assert losses(tmp_path / "node0") == pytest.approx(losses(one), abs=1e-5)
    assert (tmp_path / "node1/rank1.ipynb").exists()
