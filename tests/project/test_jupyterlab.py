"""A real JupyterLab, driven by a browser: what a person does who opens the notebooks and runs them.
"""

import json
import os
import secrets
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import build_docs
import nbformat
import pytest
from conftest import ALL, ROOT

from medmcqa_lora.core.recipe_files import load_recipe

NOTEBOOKS = build_docs.notebooks() if ALL else ["1_data/explore.ipynb", "runs/train.ipynb"]
SHOTS = ROOT / "_runs/jupyterlab"  # to be looked at; not committed
READY = """() => {
  const session = window.jupyterapp?.shell?.currentWidget?.sessionContext?.session;
  return session?.kernel?.status === 'idle';
}"""
CELLS = (
    "jupyterapp.shell.currentWidget.content.model.sharedModel.toJSON().cells"
    ".filter(c => c.cell_type === 'code' && `${c.source}`.trim())"
)
FINISHED = f"""() => {CELLS}.some(c => c.outputs.some(o => o.output_type === 'error'))
    || ({READY})() && {CELLS}.every(c => c.execution_count)"""


@pytest.fixture(scope="module")
def lab(tmp_path_factory, browser):
    """JupyterLab's address and token, on a copy of the project, on this machine's own network
    alone.
    """
    work = tmp_path_factory.mktemp("lab")
    copy = build_docs.copy_project(work / "copy")
    for name in ("train", "evaluate"):
        notebook = copy / f"nbs/runs/{name}.ipynb"
        nb = nbformat.read(notebook, 4)
        keys = asdict(load_recipe("toy", {"max_steps": "12", "save_steps": "12"})) | {
            "out": str(work / name)
        }
        parameters = next(c for c in nb.cells if "parameters" in c.metadata.get("tags", []))
        parameters.source += "".join(f"\n{k} = {v!r}" for k, v in keys.items())
        nbformat.write(nb, notebook)
    token = secrets.token_hex(16)
    places = {
        f"JUPYTER_{kind}_DIR": str(work / kind.lower()) for kind in ("CONFIG", "DATA", "RUNTIME")
    }
    env = {
        **os.environ,
        **places,
        "JUPYTER_TOKEN": token,
        "PYTHONWARNINGS": "ignore:IProgress not found",  # as make lab
        "PYTHONPATH": os.pathsep.join([str(copy), os.environ.get("PYTHONPATH", "")]),
    }
    words = [
        "--no-browser",
        "--allow-root",
        "--ServerApp.ip=127.0.0.1",
        "--ServerApp.port=0",
        f"--ServerApp.root_dir={copy / 'nbs'}",
        "--LabApp.expose_app_in_browser=True",
        "--LabApp.extension_manager=readonly",
    ]
    quiet = (
        work / "config/labconfig/default_setting_overrides.json"
    )  # no question whether news may be fetched
    quiet.parent.mkdir(parents=True)
    quiet.write_text(
        json.dumps(
            {
                "@jupyterlab/apputils-extension:notification": {
                    "fetchNews": "false",
                    "checkForUpdates": False,
                }
            }
        )
    )
    with open(work / "log", "w") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", "jupyterlab", *words], env=env, stdout=log, stderr=log
        )
    deadline = time.time() + 60
    while not (told := list((work / "runtime").glob("jpserver-*.json"))):
        assert time.time() < deadline and server.poll() is None, (work / "log").read_text()[-2000:]
        time.sleep(0.2)
    yield json.loads(told[0].read_text())["url"], token
    server.terminate()
    server.wait(30)


@pytest.mark.parametrize("notebook", NOTEBOOKS)
def test_run_all_cells(notebook, lab, browser):
    address, token = lab
    page = browser.new_page(viewport={"width": 1300, "height": 900})
    page.goto(f"{address}lab/tree/{notebook}?token={token}&reset")
    page.wait_for_function(READY, timeout=60_000)
    page.locator(".lm-MenuBar-itemLabel", has_text="Run").click()
    page.get_by_text("Run All Cells", exact=True).click()
    page.wait_for_function(FINISHED, timeout=300_000, polling=500)
    cells = page.evaluate(f"() => {CELLS}")
    page.set_viewport_size({"width": 1300, "height": 12_000})  # cells out of sight are not drawn
    page.evaluate("document.querySelector('.jp-WindowedPanel-outer').scrollTop = 0")
    page.wait_for_timeout(1000)
    bottom = page.evaluate(
        "[...document.querySelectorAll('.jp-Notebook .jp-Cell')].at(-1)"
        ".getBoundingClientRect().bottom"
    )
    page.set_viewport_size({"width": 1300, "height": min(12_000, int(bottom) + 60)})
    SHOTS.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=SHOTS / f"{Path(notebook).stem}.png")
    page.evaluate("() => jupyterapp.shell.currentWidget.sessionContext.shutdown()")
    page.close()
    assert not [
        (c["source"], o["ename"], o["evalue"])
        for c in cells
        for o in c["outputs"]
        if o["output_type"] == "error"
    ]
    assert cells and all(c["execution_count"] for c in cells)
    shown = [kind for c in cells for o in c["outputs"] for kind in o.get("data", {})]
    assert (
        "image/png" in shown
        if notebook in ("1_data/explore.ipynb", "runs/train.ipynb")
        else shown
    )
