"""README.md from nbs/index.ipynb: the same text, with links that work from the project's top."""

import re
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter

ROOT = Path(__file__).resolve().parent.parent


def readme() -> str:
    nb = nbformat.read(ROOT / "nbs/index.ipynb", as_version=4)
    nb.cells = [
        c for c in nb.cells if not re.search(r"^#\|\s*(hide|default_exp)", c.source, re.MULTILINE)
    ]
    body, _ = MarkdownExporter().from_notebook_node(nb)
    note = "<!-- Made from nbs/index.ipynb by `make prepare`; edit that notebook. -->\n\n"
    return (
        note
        + re.sub(r"\]\((?!https?:|#|\.\./)", "](nbs/", body).replace("](../", "](").strip()
        + "\n"
    )


if __name__ == "__main__":
    (ROOT / "README.md").write_text(readme())
