"""README.md from nbs/index.ipynb: the same text, with links that work from the project's top."""
import json
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def readme() -> str:
    from nbconvert import MarkdownExporter
    from nbformat import from_dict

    nb = json.loads((ROOT / "nbs/index.ipynb").read_text())
    nb["cells"] = [c for c in nb["cells"] if not re.search(r"^#\|\s*(hide|default_exp)", "".join(c["source"]), re.M)]
    body, _ = MarkdownExporter().from_notebook_node(from_dict(nb))
    note = "<!-- Made from nbs/index.ipynb by `make prepare`; edit that notebook. -->\n\n"
    return note + re.sub(r"\]\((?!https?:|#|\.\./)", "](nbs/", body).replace("](../", "](").strip() + "\n"


if __name__ == "__main__":
    (ROOT / "README.md").write_text(readme())
