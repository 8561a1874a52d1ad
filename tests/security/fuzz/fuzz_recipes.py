"""Coverage-guided fuzzing of the recipe loader: whatever an .ini file and -p hold, it gives a checked recipe that papermill carries unchanged, or a RecipeError of one line.

    .venv/bin/python tests/security/fuzz/fuzz_recipes.py -max_total_time=600 CORPUS     (needs the extra fuzz; `make fuzz` does both loaders)
"""
import ast
import sys
from dataclasses import asdict

import atheris
from common import check_message, scratch

with atheris.instrument_imports(include=["medmcqa_lora", "configparser"]):
    from medmcqa_lora.core import recipe, recipe_files
from papermill.translators import PythonTranslator

FILE, TYPES = scratch() / "mine.ini", recipe.recipe_types()


def one(content: bytes):
    cut = content.find(b"\0")  # what follows a NUL stands behind -p, with NULs between
    FILE.write_bytes(content if cut < 0 else content[:cut])
    words = content[cut + 1:].decode("utf-8", "surrogateescape").split("\0") if cut >= 0 else []
    try:
        found = recipe_files.load_recipe(str(FILE), dict(w.partition("=")[::2] for w in words))
    except recipe.RecipeError as e:
        return check_message(e, FILE.name, "-p", *TYPES)
    values = asdict(found)
    assert recipe_files.recipe_from(values) == found and recipe_files.show_recipe(found)
    cell = ast.parse(PythonTranslator.codify(values, "Parameters"))
    assert {n.targets[0].id: ast.literal_eval(n.value) for n in cell.body} == values


if __name__ == "__main__":
    atheris.Setup(sys.argv, one)
    atheris.Fuzz()
