"""Every notebook from top to bottom: its examples are tests."""

import json
import os
import warnings
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import build_docs
import pytest
from conftest import ROOT

NOTEBOOKS = [ROOT / "nbs" / name for name in build_docs.notebooks() if not name.startswith("runs/")]


@pytest.fixture(scope="module")
def executed(request, tmp_path_factory) -> dict[Path, Future]:
    """The chosen notebooks, as many at a time as there are cores."""
    copy = build_docs.copy_project(tmp_path_factory.mktemp("notebooks") / "copy")
    chosen = [
        t.callspec.params["notebook"] for t in request.session.items if "executed" in t.fixturenames
    ]
    pool = ThreadPoolExecutor(os.cpu_count())
    yield {
        n: pool.submit(build_docs.execute, n.relative_to(ROOT / "nbs").as_posix(), copy)
        for n in chosen
    }
    pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize(
    "notebook", NOTEBOOKS, ids=lambda p: p.relative_to(ROOT / "nbs").with_suffix("").as_posix()
)
def test_notebook(notebook: Path, executed: dict[Path, Future]):
    """nbdev-test in a process of its own, from the first cell to the last; the outputs are kept
    for the site.
    """
    executed[notebook].result()
    found = json.loads(build_docs.kept(notebook.relative_to(ROOT / "nbs").as_posix()).read_text())
    assert any(o.get("data") for c in found["cells"] for o in c.get("outputs", [])), (
        "a reader is shown no value"
    )
    need = [source for c in found["cells"] if "#| gpu" in (source := "".join(c["source"]))]
    assert all(source.startswith("#| gpu\nif torch.cuda.is_available():\n") for source in need), (
        "in JupyterLab it would fail where there is no GPU"
    )
    if need:
        warnings.warn(f"{notebook.name}: {len(need)} cells need a GPU and were not run")


def test_every_folder_of_notebooks_is_found():
    found = {p.relative_to(ROOT / "nbs").parts[0] for p in NOTEBOOKS}
    rooms = {p.name for p in (ROOT / "nbs").glob("[0-9]*")}
    assert len(rooms) == 10 and rooms | {"index.ipynb", "explain"} <= found
