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


def check_demo(out: str, run: Path, n: int):
    """What a finished demo prints and leaves."""
    assert "exact McNemar p" in out and "model card" in out and "always one letter" in out
    card = (run / "README.md").read_text()
    comparison = json.loads((run / "comparison.json").read_text())
    assert comparison["verdict"] in card and comparison["gain"]["verdict"] in card and comparison["n"] == n
    assert {p.name for p in (run / "figures").iterdir()} == {"data.png", "loss.png", "by_subject.png", "letters.png", "gain.png"}
    assert len(read_lines(run / "base/predictions.jsonl")) == len(read_lines(run / "tuned/predictions.jsonl")) == n
    assert len(read_lines(run / "base/generations.jsonl")) == n and "unparseable answers" in card
    assert max(m["peak_memory_gib"] for m in read_lines(run / "metrics.jsonl")) < 8


def trained(folder, packed: bool, **settings):
    """Losses and gradient-free adapter of a short run, and the token counts it logged."""
    recipe = load_recipe("toy", {"max_steps": "6", "save_steps": "6", "eval_steps": "6", "max_rows": "40", **settings})
    tokenizer, (rows, held_out) = load_tokenizer(recipe), load_pair(recipe)
    encoded, evaluation = (encode_questions(r.questions, tokenizer, recipe) for r in (rows, held_out))
    model = apply_fast_parts(attach_lora(load_model(recipe), recipe), recipe)
    folder.mkdir()
    run_training(make_trainer(model, tokenizer, encoded, recipe, folder, evaluation, packed), folder)
    return read_lines(folder / "metrics.jsonl"), read_lines(folder / "evals.jsonl"), {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}


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
