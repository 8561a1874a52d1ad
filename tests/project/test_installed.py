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
    "sample.jsonl",
    "SAMPLE.md",
    "nemotron_nano_config.json",
    "lengths.json",
    "published.json",
}


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> dict[str, Path]:
    out = tmp_path_factory.mktemp("dist")
    done = subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-d", str(out)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return {p.suffix: p for p in out.iterdir()}


def test_what_they_carry(built):
    wheel = set(zipfile.ZipFile(built[".whl"]).namelist())
    assert {f"medmcqa_lora/shipped/{n}" for n in NEEDED} | {
        f"medmcqa_lora/assets/{n}" for n in ASSETS
    } <= wheel
    with tarfile.open(built[".gz"]) as sdist:
        names = {n.partition("/")[2] for n in sdist.getnames()}
    assert NEEDED | {f"medmcqa_lora/assets/{n}" for n in ASSETS} <= names
    assert not [
        n for n in wheel | names if "__pycache__" in n or n.startswith((".venv", "_runs", "_docs"))
    ]


def test_the_wheel_works_alone(built, tmp_path, smollm2):
    """Dependencies come from this environment by path; the package itself only from the wheel."""
    env = tmp_path / "env"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(env)], check=True)
    [site] = env.glob("lib/python*/site-packages")
    (site / "dependencies.pth").write_text(
        str(next(Path(p) for p in sys.path if p.endswith("site-packages"))) + "\n"
    )
    subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "--python",
            env / "bin/python",
            "install",
            "-q",
            "--no-index",
            "--no-deps",
            str(built[".whl"]),
        ],
        check=True,
    )
    empty = tmp_path / "empty"
    empty.mkdir()
    clean = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}

    def command(*words):
        return subprocess.run(
            [env / "bin/medmcqa-lora", *words], cwd=empty, env=clean, capture_output=True, text=True
        )

    where = subprocess.run(
        [env / "bin/python", "-c", "import medmcqa_lora; print(medmcqa_lora.__file__)"],
        cwd=empty,
        env=clean,
        capture_output=True,
        text=True,
    ).stdout
    assert str(env) in where
    plan = command("plan", "--recipe", "nemotron_nano", "--gpus", "4", "--gpu-memory", "80")
    assert plan.returncode == 0 and "31.58 B parameters" in plan.stdout, plan.stderr
    demo = command(
        "demo",
        "-p",
        "max_steps",
        "2",
        "-p",
        "max_rows",
        "16",
        "-p",
        "max_eval_rows",
        "8",
        "--out",
        "demo",
    )
    assert demo.returncode == 0, demo.stderr
    check_demo(demo.stdout, empty / "demo", 8)
    assert (empty / "demo/train.ipynb").exists()
