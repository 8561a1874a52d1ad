"""How .ini files are read, and what is wrong with one."""
import pytest

from medmcqa_lora.core.recipe import RecipeError
from medmcqa_lora.core.recipe_files import find_section, read_ini


def test_a_byte_order_mark_is_allowed(tmp_path):
    file = tmp_path / "own.ini"
    file.write_bytes(b"\xef\xbb\xbf[small]\nlora_r = 4\n")
    assert read_ini(file).sections() == ["small"]


def test_a_file_without_settings(tmp_path):
    file = tmp_path / "empty.ini"
    file.write_text("# nothing\n")
    with pytest.raises(RecipeError, match="empty.ini: holds no settings; compare it"):
        read_ini(file)


def test_a_file_of_defaults_alone(tmp_path):
    file = tmp_path / "own.ini"
    file.write_text("[DEFAULT]\nlora_r = 4\n")
    assert find_section(str(file)) == (file, "DEFAULT", {"lora_r": "4"})


@pytest.mark.parametrize("name, message", [
    (" ", "--recipe: is empty; give a section of settings.ini or an .ini file"),
    ("none.ini", "--recipe none.ini: no such file; give a section"),
    ("dmo", r"settings.ini has no section \[dmo\]; did you mean demo\? \(it has demo, toy, "),
])
def test_a_recipe_that_is_not_there(name, message):
    with pytest.raises(RecipeError, match=message):
        find_section(name)
