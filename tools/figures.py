"""Figures of the code's form: lines and characters per definition, long lines, folders, words of
prose.

    python tools/figures.py [CHECKOUT]    # this one, or another, such as an older commit's
"""
import ast
import json
import re
import statistics
import sys
from collections import Counter
from pathlib import Path


def package_files(root: Path) -> list[Path]:
    return [f for f in sorted((root / "medmcqa_lora").rglob("*.py")) if f.name != "_modidx.py"]


def definitions(source: str) -> list[str]:
    """Functions and methods with their decorators, nested ones not counted apart."""
    found, waiting, lines = [], list(ast.parse(source).body), source.splitlines()
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.ClassDef):
            waiting.extend(node.body)
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
            inside = lines[first - 1:node.end_lineno]
            found.append("\n".join(line for line in inside if line.strip()))
    return found


def quantiles(numbers: list[int]) -> str:
    """Median, nine in ten, largest."""
    ordered = sorted(numbers)
    nine_in_ten = ordered[int(0.9 * (len(ordered) - 1))]
    return f"{statistics.median(ordered):g} / {nine_in_ten} / {ordered[-1]}"


def shared_lines(source: str) -> int:
    """Lines on which more than one statement begins."""
    nodes = ast.walk(ast.parse(source))
    starts = Counter(node.lineno for node in nodes if isinstance(node, ast.stmt))
    return sum(n > 1 for n in starts.values())


def code_figures(root: Path) -> list[str]:
    sources = [f.read_text(encoding="utf-8") for f in package_files(root)]
    lines = [line for s in sources for line in s.splitlines() if line.strip()]
    found = [d for s in sources for d in definitions(s)]
    long = sum(len(line) > 100 for line in lines) / len(lines)
    several = sum(map(shared_lines, sources)) / len(lines)
    plain = [line.split("#")[0] for line in lines if '"' not in line]
    semicolons = sum(bool(re.search(r";\s*\S", line)) for line in plain)
    sizes = quantiles([d.count("\n") + 1 for d in found])
    return [
        f"lines: {len(lines):,} in {len(sources)} modules; {long:.1%} over 100 characters",
        f"lines with several statements: {several:.1%}; with a semicolon: {semicolons}",
        f"{len(found):,} definitions, lines each (median / 90% / most): {sizes}",
        f"characters each: {quantiles([len(d) for d in found])}",
    ]


def folder_figures(root: Path) -> list[str]:
    folders = Counter(f.parent for f in package_files(root) if f.name != "__init__.py")
    return [f"folders: {len(folders)}, most modules in one: {max(folders.values())}"]


def prose_figures(root: Path) -> list[str]:
    counts, sentences, address, words = [], [], 0, 0
    most = 0
    for notebook in sorted((root / "nbs").rglob("*.ipynb")):
        if any(part.startswith((".", "_")) for part in notebook.relative_to(root).parts):
            continue
        found = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
        most = max(most, len(found))
        for cell in found:
            if cell["cell_type"] != "markdown":
                continue
            text = re.sub(r"(?m)^\s*[|#>].*$", "", "".join(cell["source"]))
            counts.append(len(text.split()))
            words += len(text.split())
            address += len(re.findall(r"\b(?:we|you|our|your|us)\b", text, re.I))
            lengths = [len(s.split()) for s in re.split(r"(?<=[.:!?])\s", text)]
            sentences += [n for n in lengths if n > 2]
    return [
        f"prose: {words:,} words; words per markdown cell: {quantiles(counts)}; "
        f"per sentence: {quantiles(sentences)}",
        f"'we' and 'you' per 1,000 words: {1000 * address / words:.1f}; "
        f"most cells in a notebook: {most}",
        f"README: {(root / 'README.md').stat().st_size / 1024:.1f} KB",
    ]


def all_figures(root: Path) -> list[str]:
    return code_figures(root) + folder_figures(root) + prose_figures(root)


if __name__ == "__main__":
    print("\n".join(all_figures(Path(sys.argv[1] if len(sys.argv) > 1 else ".").resolve())))
