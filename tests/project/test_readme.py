"""Every command in the documents: run where it takes seconds, else parsed as far as its options."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from conftest import ROOT
from typer.main import get_command

from medmcqa_lora.cli import app, join_params


def commands(text: str) -> list[str]:
    """The lines of a document's bash blocks, without comments."""
    blocks = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [line.split("  #")[0].strip() for line in lines if line.strip()]


def notebook_text(path: Path) -> str:
    cells = json.loads(path.read_text())["cells"]
    return "\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "markdown")


PAGES = sorted((ROOT / "nbs/how_to").glob("*.ipynb")) + sorted(
    (ROOT / "nbs/explain").glob("*.ipynb")
)
TEXTS = [(ROOT / "README.md").read_text(), *map(notebook_text, PAGES)]
COMMANDS = sorted({c for text in TEXTS for c in commands(text)})
OURS = [c for c in COMMANDS if c.startswith("medmcqa-lora")]
MAKE = [c for c in COMMANDS if c.startswith("make ")]
INSTALL = [c for c in COMMANDS if c.startswith(("pip ", "uv "))]


def test_no_command_is_left_out():
    assert sorted(OURS + MAKE + INSTALL) == COMMANDS
    assert {"make demo", "make test"} <= set(MAKE)
    assert len(OURS) > 15 and len(INSTALL) > 4


@pytest.mark.parametrize("command", OURS, ids=str)
def test_our_commands(command, cli):
    """Options exist; `plan` runs; every other command's recipe can be planned."""
    name, *words = join_params(shlex.split(command)[1:])
    context = get_command(app).commands[name].make_context(name, words)
    if name == "plan":
        code, out, err = cli(name, *words)
        assert code == 0 and "in each GPU" in out, err
    elif "recipe" in context.params:
        given = [p for p in context.params["p"] if "jsonl" not in p]  # the reader's own files
        params = [w for p in given for w in ("-p", p)]
        pairs = [w for pair in zip(params[::2], params[1::2]) for w in pair]
        code, _, err = cli("plan", "--recipe", context.params["recipe"], *pairs)
        assert code == 0, err


@pytest.mark.parametrize("command", MAKE, ids=str)
def test_make_targets(command):
    words = ["make", "-n", *command.split()[1:]]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and ".venv/bin/" in done.stdout, done.stderr


@pytest.mark.parametrize("command", INSTALL, ids=str)
def test_installations(command):
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    groups = re.findall(r"\.\[([a-z_,]+)\]", command) + re.findall(r"--extra (\w+)", command)
    named = {extra for group in groups for extra in group.split(",")}
    assert named <= set(settings["project"]["optional-dependencies"])
    for file in re.findall(r"-r (\S+)", command):
        pins = (ROOT / file).read_text().splitlines()
        bad = [line for line in pins if not re.fullmatch(r"#.*|[\w.-]+==[\w.+-]+", line)]
        assert not bad, "a pin is not NAME==VERSION"


PLACES = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
UV = shutil.which("uv", path=PLACES)


@pytest.mark.skipif(not UV, reason="uv is not installed")
def test_uv_resolves(tmp_path):
    for name in ("pyproject.toml", "README.md", "LICENSE", "medmcqa_lora", "settings.ini", "nbs"):
        (tmp_path / name).symlink_to(ROOT / name)
    words = [UV, "sync", "--extra", "dev", "--dry-run", "--python", sys.executable]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
