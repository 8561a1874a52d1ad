"""Coverage-guided fuzzing of the recipe loader.

Whatever an .ini file and -p hold, the loader gives a checked recipe that papermill carries
unchanged, or a RecipeError of one line.

    .venv/bin/python tests/security/fuzz/fuzz_recipes.py -max_total_time=600 CORPUS

It needs the extra fuzz; `make fuzz` runs both loaders.
"""
import ast
import sys
from dataclasses import asdict

import atheris
from common import check_message, scratch

with atheris.instrument_imports(include=["medmcqa_lora", "configparser"]):
    from medmcqa_lora.core import recipe, recipe_files
from papermill.translators import PythonTranslator

FILE = scratch() / "mine.ini"
TYPES = recipe.recipe_types()


def one(content: bytes):
    """Load a file, with overrides after the first NUL and between further ones."""
    ini, _, after = content.partition(b"\0")
    FILE.write_bytes(ini)
    words = after.decode("utf-8", "surrogateescape").split("\0") if b"\0" in content else []
    overrides = dict(word.partition("=")[::2] for word in words)
    try:
        found = recipe_files.load_recipe(str(FILE), overrides)
    except recipe.RecipeError as e:
        return check_message(e, FILE.name, "-p", *TYPES)
    values = asdict(found)
    assert recipe_files.recipe_from(values) == found and recipe_files.show_recipe(found)
    cell = ast.parse(PythonTranslator.codify(values, "Parameters"))
    assert {n.targets[0].id: ast.literal_eval(n.value) for n in cell.body} == values


if __name__ == "__main__":
    atheris.Setup(sys.argv, one)
    atheris.Fuzz()
