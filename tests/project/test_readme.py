"""Every command in the documents: run where it takes seconds, else parsed as far as its options and its recipe's plan."""
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
    blocks = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [line.split("  #")[0].strip() for line in lines if line.strip()]


def notebook_text(name: str) -> str:
    return "\n".join("".join(c["source"]) for c in json.loads((ROOT / name).read_text())["cells"] if c["cell_type"] == "markdown")


DOCUMENTS = {"README.md": (ROOT / "README.md").read_text(), "results": notebook_text("nbs/explain/results.ipynb"), "full_size": notebook_text("nbs/explain/full_size.ipynb")}
COMMANDS = sorted({c for text in DOCUMENTS.values() for c in commands(text)})
OURS = [c for c in COMMANDS if c.startswith("medmcqa-lora")]
MAKE = [c for c in COMMANDS if c.startswith("make ")]
INSTALL = [c for c in COMMANDS if c.startswith(("pip ", "uv "))]


def test_no_command_is_left_out():
    assert sorted(OURS + MAKE + INSTALL) == COMMANDS
    assert {"make demo", "make test"} <= set(MAKE)


@pytest.mark.parametrize("command", OURS, ids=str)
def test_our_commands(command, cli):
    name, *words = join_params(shlex.split(command)[1:])
    context = get_command(app).commands[name].make_context(name, words)  # raises for an option that doesn't exist
    if name == "plan":
        code, out, err = cli(name, *words)
        assert code == 0 and "in each GPU" in out, err
    elif "recipe" in context.params:
        params = [w for p in context.params["p"] for w in ("-p", p) if "jsonl" not in p]  # the reader's own files
        code, _, err = cli("plan", "--recipe", context.params["recipe"], *[w for pair in zip(params[::2], params[1::2]) for w in pair])
        assert code == 0, err


@pytest.mark.parametrize("command", MAKE, ids=str)
def test_make_targets(command):
    done = subprocess.run(["make", "-n", *command.split()[1:]], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and ".venv/bin/" in done.stdout, done.stderr


@pytest.mark.parametrize("command", INSTALL, ids=str)
def test_installations(command):
    extras = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"])
    named = {e for group in re.findall(r"\.\[([a-z_,]+)\]", command) + re.findall(r"--extra (\w+)", command) for e in group.split(",")}
    assert named <= extras
    for file in re.findall(r"-r (\S+)", command):
        pins = (ROOT / file).read_text().splitlines()
        assert all(re.fullmatch(r"#.*|[\w.-]+==[\w.+-]+", line) for line in pins), "a pin is not NAME==VERSION"


UV = shutil.which("uv", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")


@pytest.mark.skipif(not UV, reason="uv is not installed")
def test_uv_resolves(tmp_path):
    for name in ("pyproject.toml", "README.md", "LICENSE", "medmcqa_lora", "settings.ini", "nbs"):
        (tmp_path / name).symlink_to(ROOT / name)
    done = subprocess.run([UV, "sync", "--extra", "dev", "--dry-run", "--python", sys.executable], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
