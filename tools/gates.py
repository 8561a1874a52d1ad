"""The gates: what a change must hold besides the tests. `make gates` and `.ci/run` call this."""
import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import figures
import rooms
from make_readme import readme

ROOT = rooms.ROOT
BIN = Path(sys.executable).parent
README_BYTES = 6 * 1024
GENERATED = (".venv", "_runs", "_proc", "_docs", "__pycache__")
# paths of one machine, and package hosts: neither belongs into a commit
FORBIDDEN = re.compile(r"(?<![\w.])/(?:work|farm)/|(?:pypi|pythonhosted|npmjs)\.(?:org|com)")


def run(*words, cwd=ROOT) -> str:
    """What a command prints if it fails, else nothing."""
    done = subprocess.run([str(w) for w in words], cwd=cwd, capture_output=True, text=True)
    return "" if done.returncode == 0 else (done.stdout + done.stderr)[-2000:]


def export_in_sync() -> str:
    """Clean and export in a copy; what changes there was not in sync here."""
    with tempfile.TemporaryDirectory() as work:
        copy = Path(work) / "copy"
        shutil.copytree(ROOT, copy, symlinks=True, ignore=shutil.ignore_patterns(*GENERATED))
        problem = run(BIN / "nbdev-clean", cwd=copy) or run(BIN / "nbdev-export", cwd=copy)
        if problem:
            return problem
        return "".join(
            run("git", "diff", "--no-index", "--stat", ROOT / folder, copy / folder)
            for folder in ("nbs", "medmcqa_lora"))


def parameters_kept() -> str:
    """papermill finds its parameters by a cell's tag; without the tag `-p` is ignored."""
    for name in ("train", "evaluate"):
        found = json.loads((ROOT / f"nbs/runs/{name}.ipynb").read_text())["cells"]
        if [c["metadata"].get("tags") for c in found].count(["parameters"]) != 1:
            return f"nbs/runs/{name}.ipynb has lost papermill's parameters tag"
    return ""


def readme_current() -> str:
    made = readme()
    if (ROOT / "README.md").read_text() != made:
        return "README.md is not what nbs/index.ipynb gives; run make prepare"
    size = len(made.encode())
    return f"README.md has {size:,} bytes, at most {README_BYTES:,}" if size > README_BYTES else ""


def forbidden_words() -> str:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout
    hits = []
    for name in listed.split():
        if name == "tools/gates.py":
            continue
        lines = (ROOT / name).read_text(errors="replace").splitlines()
        hits += [f"{name}:{n}" for n, line in enumerate(lines, 1) if FORBIDDEN.search(line)]
    return ", ".join(hits[:8])


def first(problems: list[str]) -> str:
    """Ten problems, a line each, and how many more there are."""
    more = [f"and {len(problems) - 10} more"] if len(problems) > 10 else []
    return "\n".join(problems[:10] + more)


GATES = {
    "export in sync, notebooks clean": export_in_sync,
    "papermill's tag kept": parameters_kept,
    "README current and short": readme_current,
    "ruff": lambda: run(BIN / "ruff", "check", "."),
    "rooms import downwards only": lambda: first(rooms.import_problems()),
    "folders and notebooks not too large": lambda: first(rooms.size_problems()),
    f"notebooks' code within {rooms.LONGEST_LINE} characters": lambda: first(rooms.long_lines()),
    "no machine's paths or package hosts": forbidden_words,
}


def main() -> None:
    failed = []
    for name, gate in GATES.items():
        problem = gate()
        print(f"{'FAILED' if problem else 'ok':<8}{name}", flush=True)
        if problem:
            print(problem, flush=True)
            failed.append(name)
    print("\n".join(figures.all_figures(ROOT)))
    sys.exit(f"gates failed: {', '.join(failed)}" if failed else 0)


if __name__ == "__main__":
    main()
