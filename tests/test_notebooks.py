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
    chosen = [t.callspec.params["notebook"] for t in request.session.items if "executed" in t.fixturenames]
    pool = ThreadPoolExecutor(os.cpu_count())
    yield {n: pool.submit(build_docs.execute, n.relative_to(ROOT / "nbs").as_posix(), copy) for n in chosen}
    pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook(notebook: Path, executed: dict[Path, Future]):
    """nbdev-test in a process of its own, from the first cell to the last; the outputs are kept for the site."""
    executed[notebook].result()
    found = json.loads(build_docs.kept(notebook.relative_to(ROOT / "nbs").as_posix()).read_text())
    assert any(o.get("data") for c in found["cells"] for o in c.get("outputs", [])), "a reader is shown no value"
    need = [source for c in found["cells"] if "#| gpu" in (source := "".join(c["source"]))]
    assert all(source.startswith("#| gpu\nif torch.cuda.is_available():\n") for source in need), "in JupyterLab it would fail where there is no GPU"
    if need:
        warnings.warn(f"{notebook.name}: {len(need)} cells need a GPU and were not run")


def test_all_numbered_notebooks_are_found():
    named = ["00_recipe", "00a_files", "00b_folders", "00b_untrusted", "01_data", "01a_triton_kernels", "01aa_float8_kernels", "01ab_float8", "01b_fused", "01c_ssd_kernels", "01d_mamba", "01e_leakage", "02_model", "02a_experts", "02b_kernels", "02c_merge", "02d_plan", "02e_blocks", "02f_step", "02g_shards", "02h_checkpoints", "02i_health", "02j_progress", "03_training", "03a_stopping", "04_evaluation", "04a_generation", "04b_options", "04b_overlap", "04c_uncertainty", "04d_gain", "04e_calibration", "04f_orders", "04g_cross_check", "04g_report", "04h_card", "04h_guard", "05_launch", "05a_bench", "05b_share", "05c_hosts", "05d_status", "06_cli", "index"]
    assert [p.stem for p in NOTEBOOKS if p.parent.name == "nbs"] == named
    assert [p.stem for p in NOTEBOOKS if p.parent.name == "explain"] == ["full_size", "honest_evaluation", "leaderboard", "nemotron_lora", "performance", "reliability", "results"]
