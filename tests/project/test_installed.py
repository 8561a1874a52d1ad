"""The wheel and the sdist carry what a run needs: installed into an empty environment, used from an
empty folder.
"""
import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from conftest import ROOT
from helpers import check_demo

NEEDED = {"settings.ini", "nbs/runs/train.ipynb", "nbs/runs/evaluate.ipynb"}
ASSETS = {
    f"medmcqa_lora/assets/{name}" for name in (
        "sample.jsonl", "SAMPLE.md", "nemotron_nano_config.json", "lengths.json", "published.json")}
NOT_SHIPPED = (".venv", "_runs", "_docs")


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> dict[str, Path]:
    """The wheel and the sdist, by their suffix."""
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "hatchling", "build", "-d", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return {p.suffix: p for p in out.iterdir()}


@pytest.fixture
def wheel_names(built) -> set[str]:
    return set(zipfile.ZipFile(built[".whl"]).namelist())


@pytest.fixture
def sdist_names(built) -> set[str]:
    """Without the folder that holds them all."""
    with tarfile.open(built[".gz"]) as sdist:
        return {name.partition("/")[2] for name in sdist.getnames()}


def test_the_wheel_carries_what_a_run_needs(wheel_names):
    assert {f"medmcqa_lora/shipped/{name}" for name in NEEDED} | ASSETS <= wheel_names


def test_the_sdist_carries_what_a_run_needs(sdist_names):
    assert NEEDED | ASSETS <= sdist_names


def test_they_carry_no_leftovers(wheel_names, sdist_names):
    names = wheel_names | sdist_names
    assert not [n for n in names if "__pycache__" in n or n.startswith(NOT_SHIPPED)]


@pytest.fixture
def installed(built, tmp_path) -> Path:
    """An environment with the wheel; its dependencies come from this environment, by path."""
    env = tmp_path / "env"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(env)], check=True)
    [site] = env.glob("lib/python*/site-packages")
    dependencies = next(path for path in sys.path if path.endswith("site-packages"))
    (site / "dependencies.pth").write_text(f"{Path(dependencies)}\n")
    pip = [sys.executable, "-m", "pip", "--python", env / "bin/python"]
    install = ["install", "-q", "--no-index", "--no-deps", str(built[".whl"])]
    subprocess.run([*pip, *install], check=True)
    return env


def test_the_wheel_works_alone(installed, tmp_path, smollm2):
    """The package itself comes only from the wheel, and the run starts in an empty folder."""
    empty = tmp_path / "empty"
    empty.mkdir()
    clean = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}

    def run(program: str, *words: str) -> subprocess.CompletedProcess:
        command = [installed / "bin" / program, *words]
        return subprocess.run(command, cwd=empty, env=clean, capture_output=True, text=True)

    where = run("python", "-c", "import medmcqa_lora; print(medmcqa_lora.__file__)")
    assert str(installed) in where.stdout

    machine = ("--gpus", "4", "--gpu-memory", "80")
    plan = run("medmcqa-lora", "plan", "--recipe", "nemotron_nano", *machine)
    assert plan.returncode == 0 and "31.58 B parameters" in plan.stdout, plan.stderr

    small = "-p max_steps 2 -p max_rows 16 -p max_eval_rows 8".split()
    demo = run("medmcqa-lora", "demo", *small, "--out", "demo")
    assert demo.returncode == 0, demo.stderr
    check_demo(demo.stdout, empty / "demo", 8)
    assert (empty / "demo/train.ipynb").exists()
