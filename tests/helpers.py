"""What several test files share: checks of a command's output, a demo's folder, a short run."""
import json
import signal
import subprocess
import sys
from pathlib import Path

from medmcqa_lora.core.files import read_lines
from medmcqa_lora.core.recipe_files import load_recipe
from medmcqa_lora.data.leakage import load_pair
from medmcqa_lora.data.tokens import encode_questions
from medmcqa_lora.fast.apply import apply_fast_parts
from medmcqa_lora.model.load import load_model
from medmcqa_lora.model.lora import attach_lora
from medmcqa_lora.model.resolve import load_tokenizer
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
