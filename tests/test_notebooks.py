"""Every notebook from top to bottom: its examples are tests."""
import json
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from conftest import ROOT

NOTEBOOKS = sorted(p for p in (ROOT / "nbs").rglob("*.ipynb") if not {".ipynb_checkpoints", "runs"} & set(p.parts))


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook(notebook: Path):
    done = subprocess.run([str(Path(sys.executable).parent / "nbdev-test"), str(notebook)], cwd=notebook.parent, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0 and "Success" in done.stdout + done.stderr, (done.stdout + done.stderr)[-3000:]
    skipped = sum("#| gpu" in "".join(c["source"]) for c in json.loads(notebook.read_text())["cells"])
    if skipped:
        warnings.warn(f"{notebook.name}: {skipped} cells need a GPU and were not run")


def test_all_numbered_notebooks_are_found():
    assert [p.stem for p in NOTEBOOKS if p.parent.name == "nbs"] == ["00_recipe", "00a_files", "01_data", "02_model", "02a_experts", "03_training", "04_evaluation", "05_launch", "06_cli", "index"]
