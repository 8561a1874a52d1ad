"""The site in _docs/, made in a copy of the project: notebooks executed, staged by nbdev, rendered
by Quarto, or by smalldocs where there is no Quarto.

Executed notebooks are kept in _proc/, named by a hash of what they depend on, so the next build
needn't execute them.
"""

import hashlib
import html
import importlib
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nbformat
import yaml

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
KEPT = ROOT / "_proc"
LIBRARIES = [
    "torch._dynamo",
    "trl.trainer.sft_trainer",
    "peft",
    "datasets",
    "seaborn",
    "scipy.stats",
    "nbdev.test",
]  # importing them takes longer than most notebooks
TOY = [
    "--recipe",
    "toy",
    "-p",
    "max_steps",
    "12",
    "-p",
    "save_steps",
    "12",
]  # the run notebooks' pages show a run of seconds


def notebooks() -> list[str]:
    """Every notebook of the project, relative to nbs/."""
    found = (p.relative_to(ROOT / "nbs") for p in (ROOT / "nbs").rglob("*.ipynb"))
    return sorted(
        p.as_posix() for p in found if not any(part.startswith((".", "_")) for part in p.parts)
    )


def copy_project(to: Path) -> Path:
    def left(_, names):
        return [n for n in names if n.startswith((".", "_runs", "_proc", "_docs", "__pycache__"))]

    return Path(shutil.copytree(ROOT, to, symlinks=True, ignore=left))


def environment(copy: Path) -> dict[str, str]:
    """With the copy's package before any other."""
    path = [str(copy), str(copy / "tools"), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path), "HF_HUB_OFFLINE": "1"}


def run(*words, cwd: Path) -> str:
    """Run a command on the copy's package and return what it prints; that is shown if it fails."""
    done = subprocess.run(
        [str(w) for w in words],
        cwd=cwd,
        env=environment(cwd),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if done.returncode:
        raise SystemExit(
            f"{done.stdout[-3000:]}\n"
            f"build_docs: {' '.join(map(str, words))[:200]}: failed, see above"
        )
    return done.stdout


def call(where: str, args: tuple, more: dict, copy: Path, log: str) -> None:
    """In a forked process: call a function on the copy's package, with its output in a file."""
    with open(log, "w") as f:
        os.dup2(f.fileno(), 1)
        os.dup2(f.fileno(), 2)
    os.chdir(copy)
    sys.path[:0] = [str(copy), str(copy / "tools")]
    os.environ |= environment(copy)
    module, _, name = where.partition(":")
    getattr(importlib.import_module(module), name)(*args, **more)


def run_forked(where: str, *args, cwd: Path, **more) -> str:
    """What `run` does with a command, with a function (module:name): in a process that need not
    import the libraries, as it is forked from one that has.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(LIBRARIES)
    with tempfile.NamedTemporaryFile("r", suffix=".log") as log:
        process = context.Process(target=call, args=(where, args, more, cwd, log.name))
        process.start()
        process.join()
        told = log.read()
    if process.exitcode:
        raise SystemExit(f"{told[-3000:]}\nbuild_docs: {where} {args}: failed, see above")
    return told


def kept(name: str) -> Path:
    """Where a notebook's executed copy is, or will be, kept: named by a hash of all that the
    execution depends on.
    """
    files = [
        p
        for folder in ("medmcqa_lora", "benchmarks", "nbs/explain", "nbs/runs")
        for p in (ROOT / folder).rglob("*")
        if p.is_file() and p.suffix != ".pyc" and (p.suffix != ".ipynb" or p.parent.name == "runs")
    ]
    files += [ROOT / "settings.ini", ROOT / "requirements.txt", Path(__file__), ROOT / "nbs" / name]
    digest = hashlib.sha256(
        b"".join(hashlib.sha256(p.read_bytes()).digest() for p in sorted(files))
    )
    return KEPT / f"{name.removesuffix('.ipynb').replace('/', '-')}-{digest.hexdigest()[:16]}.ipynb"


def execute(name: str, copy: Path) -> None:
    """Execute a notebook of the copy and keep it: run notebooks through the package's launcher,
    others by nbdev-test.
    """
    started, notebook, target = time.time(), copy / "nbs" / name, kept(name)
    if name.startswith("runs/"):
        out = f"_runs/{notebook.stem}"
        run_forked("medmcqa_lora.cli:main", [notebook.stem, *TOY, "--out", out], cwd=copy)
        notebook = copy / out / notebook.name
    else:
        alone = (
            "TRITON_INTERPRET" in notebook.read_text()
        )  # chooses Triton's interpreter, which only works before the libraries are imported
        told = (
            run(BIN / "nbdev-test", notebook, "--save", cwd=copy)
            if alone
            else run_forked("nbdev.test:nbdev_test", str(notebook), save=True, cwd=copy)
        )
        assert "Success" in told, told  # it exits with 0 where it finds nothing to test
    nb = nbformat.read(notebook, 4)
    for cell in nb.cells:  # progress bars and warnings with paths of this machine
        if cell.cell_type == "code":
            cell.outputs = [o for o in cell.outputs if o.get("name") != "stderr"]
    KEPT.mkdir(exist_ok=True)
    part = target.with_suffix(f".{os.getpid()}")
    nbformat.write(nb, part)
    for old in KEPT.glob(f"{target.stem[:-16]}{'?' * 16}.ipynb"):
        old.unlink()
    part.replace(target)
    print(f"{name}: executed in {time.time() - started:.0f} s", flush=True)


def bring_in_linked_files(copy: Path) -> None:
    """Files of the project that pages link to, such as ../settings.ini, become part of the site."""
    nbs = copy / "nbs"
    for notebook in nbs.rglob("*.ipynb"):
        up = "../" * (len(notebook.relative_to(nbs).parts) - 1)
        nb = nbformat.read(notebook, 4)
        for cell in nb.cells:
            if cell.cell_type != "markdown":
                continue
            for target in re.findall(rf"\]\({re.escape(up)}\.\./([^./][^)#]*)", cell.source):
                if (copy / target).is_file():
                    (nbs / target).parent.mkdir(parents=True, exist_ok=True)
                    shutil.copy(copy / target, nbs / target)
            cell.source = re.sub(rf"\]\({re.escape(up)}\.\./(?=[^./])", f"]({up}", cell.source)
        nbformat.write(nb, notebook)
    for page in ("AGENTS.md", "CONTRIBUTING.md"):
        if (nbs / "CONTRIBUTING.md").exists():
            shutil.copy(copy / page, nbs / page)  # they name each other


def true_size(staged: Path) -> None:
    """smalldocs ignores the width that a figure of double resolution carries, and would show it
    twice as large; nor does it know Quarto's fig-alt.
    """
    for notebook in staged.rglob("*.ipynb"):
        nb = nbformat.read(notebook, 4)
        for cell in (c for c in nb.cells if c.cell_type == "code"):
            described = re.search(r"^#\|\s*fig-alt:\s*(.+)$", cell.source, re.M)
            for output in cell.outputs:
                width = output.get("metadata", {}).get("image/png", {}).get("width")
                if width:
                    alt = html.escape(described[1]) if described else "figure"
                    png = output.data["image/png"].strip()
                    source = f"data:image/png;base64,{png}"
                    output.data = {
                        "text/html": f'<img alt="{alt}" width="{width}" src="{source}">'
                    }
        nbformat.write(nb, notebook)


def llms_txt(site: Path) -> str:
    """llms.txt (llmstxt.org) from the notebooks' titles and `>` lines, in the order of the
    sidebar.
    """

    def head(name):
        text = "\n".join(
            c.source
            for c in nbformat.read(ROOT / "nbs" / name, 4).cells
            if c.cell_type == "markdown"
        )
        return re.search(r"^# (.+)", text, re.M)[1], re.search(r"^> (.+)", text, re.M)[1]

    def line(name):
        page = name.removesuffix(".ipynb") + ".html"
        if (site / f"{page}.md").exists():
            page = f"{page}.md"
        return f"- [{head(name)[0]}]({page}): {head(name)[1]}"

    title, summary = head("index.ipynb")
    text = f"# {title}\n\n> {summary}\n"
    for entry in yaml.safe_load((ROOT / "_quarto.yml").read_text())["website"]["sidebar"][
        "contents"
    ]:
        names = [n for n in entry.get("contents", [entry.get("href")]) if n in notebooks()]
        if names:
            text += f"\n## {entry.get('section', entry.get('text'))}\n\n" + "".join(
                line(n) + "\n" for n in names
            )
    return text


def build(out: Path = ROOT / "_docs", leave_out: frozenset = frozenset()) -> Path:
    """Build the site; notebooks in `leave_out` are executed only if that is kept from before,
    and else shown without outputs.
    """
    with tempfile.TemporaryDirectory(prefix="medmcqa_lora-docs-") as work:
        copy = copy_project(Path(work) / "copy")
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(
                pool.map(
                    lambda n: execute(n, copy),
                    [n for n in notebooks() if not kept(n).exists() and n not in leave_out],
                )
            )
        for name in notebooks():
            if kept(name).exists():
                shutil.copy(kept(name), copy / "nbs" / name)
        bring_in_linked_files(copy)
        settings = copy / "pyproject.toml"
        settings.write_text(
            settings.read_text().replace(
                "[tool.nbdev]\n", '[tool.nbdev]\nrenderer = "doc_table.DocTable"\n'
            )
        )
        if shutil.which("quarto"):
            run(BIN / "nbdev-docs", cwd=copy)
            made = copy / "_docs"
        else:
            print("Quarto is not installed: building a preview with smalldocs")
            run_forked(
                "nbdev.serve:proc_nbs", n_workers=0, cwd=copy
            )  # nbdev-proc-nbs would try to install Quarto
            true_size(copy / "_proc")
            run(BIN / "smalldocs", "render", "_proc", "--quiet", cwd=copy)
            made = copy / "_proc/_docs"
        (made / "llms.txt").write_text(llms_txt(made))
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(made, out)
    return out


if __name__ == "__main__":
    print(f"the site: {build()}/index.html")
