"""The rooms of the project: which module may import which, and how large a folder and a notebook
may be.

A room is a numbered folder of notebooks and the sub-package that it exports. A room imports only
from rooms with lower numbers; inside a room no modules import each other in a circle. Imports
inside functions count, and so do imports inside strings, such as the programs that are started
with `python -c`.
"""
import ast
import json
import re
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "medmcqa_lora"
MOST_NOTEBOOKS = 8  # per folder
MOST_CELLS = 60     # per notebook
LONGEST_LINE = 100  # characters, of code


def rooms() -> dict[str, int]:
    """The rooms' names with their numbers, from the folders: `3_fast` is room 3, `fast`."""
    found = {}
    for path in (ROOT / "nbs").iterdir():
        if named := re.fullmatch(r"(\d+)_([a-z_]+)(\.ipynb)?", path.name):
            found[named[2]] = int(named[1])
    return found


def module_name(file: Path) -> str:
    """A package file's name without the package: `training.memory.fit`."""
    return ".".join(file.relative_to(ROOT / PACKAGE).with_suffix("").parts)


def modules() -> dict[str, Path]:
    """All generated modules by name."""
    files = (ROOT / PACKAGE).rglob("*.py")
    return {module_name(f): f for f in files if f.name not in ("__init__.py", "_modidx.py")}


def absolute(name: str, node: ast.ImportFrom) -> str:
    """The full name of what `from … import` reads from, in a module of the package."""
    if not node.level:
        return node.module or ""
    parents = [PACKAGE, *name.split(".")[:-1]]
    base = parents[: len(parents) - node.level + 1]
    return ".".join([*base, *([node.module] if node.module else [])])


def imports_of(name: str, tree: ast.AST) -> set[str]:
    """The full names that a module imports, wherever in it; parts of f-strings are read as text."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            source = absolute(name, node)
            found |= {source, *(f"{source}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found |= set(re.findall(rf"(?:from|import) ({PACKAGE}[\w.]*)", node.value))
    return found


def import_graph() -> dict[str, set[str]]:
    """Which module of the package imports which."""
    known = modules()
    graph = defaultdict(set)
    for name, file in known.items():
        for imported in imports_of(name, ast.parse(file.read_text(encoding="utf-8"))):
            inside = imported.removeprefix(f"{PACKAGE}.")
            if imported.startswith(f"{PACKAGE}.") and inside in known and inside != name:
                graph[name].add(inside)
    return graph


def upward_imports(graph: dict[str, set[str]], numbers: dict[str, int]) -> list[str]:
    """Imports from a room with a higher number."""
    def room(module: str) -> int: return numbers[module.split(".")[0]]

    pairs = [(a, b) for a in sorted(graph) for b in sorted(graph[a])]
    return [f"{a} imports {b}" for a, b in pairs if room(b) > room(a)]


def circles(graph: dict[str, set[str]]) -> list[str]:
    """Modules that import themselves through others."""
    def reached(start: str) -> set[str]:
        seen, waiting = set(), [start]
        while waiting:
            for following in graph.get(waiting.pop(), ()):
                if following not in seen:
                    seen.add(following)
                    waiting.append(following)
        return seen

    return [f"{name} imports itself through {', '.join(sorted(graph[name]))}"
            for name in sorted(graph) if name in reached(name)]


def import_problems() -> list[str]:
    """Everything that is wrong with the package's imports."""
    numbers, graph = rooms(), import_graph()
    homeless = [f"{name} is in no room" for name in modules() if name.split(".")[0] not in numbers]
    return homeless or upward_imports(graph, numbers) + circles(graph)


def notebooks() -> list[Path]:
    """Every notebook of the project."""
    found = sorted((ROOT / "nbs").rglob("*.ipynb"))
    def hidden(path: Path) -> bool:
        return any(part.startswith((".", "_")) for part in path.relative_to(ROOT).parts)

    return [path for path in found if not hidden(path)]


def cells(notebook: Path) -> list[tuple[str, str]]:
    """A notebook's cells as (kind, source)."""
    found = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    return [(cell["cell_type"], "".join(cell["source"])) for cell in found]


def size_problems() -> list[str]:
    """Folders with too many notebooks, notebooks with too many cells, names that are no words."""
    folders, found = defaultdict(list), []
    for notebook in notebooks():
        folders[notebook.parent].append(notebook)
        where = notebook.relative_to(ROOT)
        if len(cells(notebook)) > MOST_CELLS:
            found.append(f"{where}: {len(cells(notebook))} cells, at most {MOST_CELLS}")
        if re.match(r"\d+[a-z]", notebook.name):
            found.append(f"{where}: the name begins with a number and a letter")
    for folder, inside in folders.items():
        if len(inside) > MOST_NOTEBOOKS:
            where = folder.relative_to(ROOT)
            found.append(f"{where}: {len(inside)} notebooks, at most {MOST_NOTEBOOKS}")
    return found


def long_lines() -> list[str]:
    """Lines of code in notebooks that are longer than `LONGEST_LINE`."""
    found = []
    for notebook in notebooks():
        for number, (kind, source) in enumerate(cells(notebook)):
            longest = max(map(len, source.splitlines()), default=0)
            if kind == "code" and longest > LONGEST_LINE:
                found.append(f"{notebook.relative_to(ROOT)}, cell {number}: {longest} characters")
    return found
