"""The gates: export in sync, notebooks clean, README current, lint, sizes, words that must not be in a commit."""
import json
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
sys.path.insert(0, str(ROOT / "tools"))
failed = []


def gate(name, problem):
    print(f"{'FAILED' if problem else 'ok':<8}{name}" + (f"\n{problem}" if problem else ""), flush=True)
    failed.extend([name] if problem else [])


def run(*words, cwd=ROOT):
    done = subprocess.run([str(w) for w in words], cwd=cwd, capture_output=True, text=True)
    return "" if done.returncode == 0 else (done.stdout + done.stderr)[-2000:]


def in_a_copy(*commands):
    """Run commands in a copy of the tree; what they changed there, by name."""
    with tempfile.TemporaryDirectory() as work:
        copy = Path(work) / "copy"
        shutil.copytree(ROOT, copy, symlinks=True, ignore=shutil.ignore_patterns(".venv", "_runs", "_proc", "_docs", "__pycache__"))
        for c in commands:
            if problem := run(*c, cwd=copy):
                return problem
        return run("git", "diff", "--no-index", "--stat", ROOT / "nbs", copy / "nbs") + run("git", "diff", "--no-index", "--stat", ROOT / "medmcqa_lora", copy / "medmcqa_lora")


def sizes():
    """Exported cells with definitions: median ≤ 8 lines, p90 ≤ 18, none above 40; markdown ≥ 35% of cells; hidden code ≤ 3%."""
    lengths, kinds, hidden = [], {"markdown": 0, "code": 0}, 0
    for file in sorted((ROOT / "nbs").glob("*.ipynb")):
        for cell in json.loads(file.read_text())["cells"]:
            source = "".join(cell["source"])
            kinds[cell["cell_type"]] += 1
            hidden += bool(re.search(r"^#\|\s*hide", source, re.MULTILINE))
            lines = [line for line in source.splitlines() if line.strip() and not line.startswith("#|")]
            if re.search(r"^#\|\s*export", source, re.MULTILINE) and re.search(r"^(def |class |@)", source, re.MULTILINE):
                lengths.append((len(lines), f"{file.name}: {lines[0][:60]}"))
    numbers = sorted(n for n, _ in lengths)
    median, p90, share = statistics.median(numbers), numbers[int(0.9 * (len(numbers) - 1))], kinds["markdown"] / sum(kinds.values())
    print(f"        {len(numbers)} exported cells: median {median:g} lines, p90 {p90}, longest {max(lengths)}; markdown {share:.0%}, hidden {hidden}")
    bad = [name for n, name in lengths if n > 40] + ["median"] * (median > 8) + ["p90"] * (p90 > 18)
    return ", ".join(bad + ["markdown"] * (share < 0.35) + ["hidden"] * (hidden > 0.03 * kinds["code"]))


def parameters_kept():
    tags = [c["metadata"].get("tags") for f in ("train", "evaluate") for c in json.loads((ROOT / f"nbs/runs/{f}.ipynb").read_text())["cells"]]
    return "" if tags.count(["parameters"]) == 2 else "a run notebook has lost papermill's parameters tag"


def readme_current():
    from make_readme import readme

    return "" if (ROOT / "README.md").read_text() == readme() else "README.md is not what nbs/index.ipynb gives; run make prepare"


def forbidden_words():
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    pattern = re.compile(r"(?<![\w.])/(?:work|farm)/|(?:pypi|pythonhosted|npmjs)\.(?:org|com)")
    hits = [f"{f}:{n}" for f in files for n, line in enumerate((ROOT / f).read_text(errors="replace").splitlines(), 1)
            if pattern.search(line) and not f.startswith("tools/gates")] if files else []
    return ", ".join(hits[:8])


if __name__ == "__main__":
    gate("export in sync, notebooks clean", in_a_copy([BIN / "nbdev-clean"], [BIN / "nbdev-export"]))
    gate("papermill's tag kept", parameters_kept())
    gate("README current", readme_current())
    gate("ruff", run(BIN / "ruff", "check", "."))
    gate("sizes of exported definitions", sizes())
    gate("no machine's paths or package hosts", forbidden_words())
    sys.exit(f"gates failed: {', '.join(failed)}" if failed else 0)
