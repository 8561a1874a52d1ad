"""The gate on the layout: it finds what it looks for, and finds nothing here."""

import ast

import pytest
import rooms
from conftest import ROOT

NUMBERS = {"core": 0, "data": 1, "model": 2}


def test_the_project_holds_it():
    assert rooms.import_problems() == []
    assert len(rooms.import_graph()) > 60  # it did read the imports


def test_rooms_are_numbered_in_reading_order():
    names = sorted(rooms.rooms(), key=rooms.rooms().get)
    assert names == [
        "core",
        "data",
        "model",
        "fast",
        "training",
        "evaluation",
        "analysis",
        "launch",
        "bench",
        "cli",
    ]


@pytest.mark.parametrize(
    "source",
    [
        "from ..data.sources import read_file",
        "from medmcqa_lora.data.sources import read_file",
        "import medmcqa_lora.data.sources",
        "from ..data import sources",
        "def late():\n    from ..data.sources import read_file",
        "CODE = 'import sys; from medmcqa_lora.data.sources import read_file'",
        "CODE = f'{1}; from medmcqa_lora.data.sources import read_file'",
    ],
)
def test_every_form_of_import_is_seen(source):
    found = rooms.imports_of("core.files", ast.parse(source))
    assert any(name.startswith("medmcqa_lora.data.sources") for name in found)


def test_an_upward_import_is_named():
    graph = {"core.files": {"data.sources"}, "data.sources": {"core.text"}}
    assert rooms.upward_imports(graph, NUMBERS) == ["core.files imports data.sources"]


def test_a_circle_is_named():
    graph = {"data.a": {"data.b"}, "data.b": {"data.c"}, "data.c": {"data.a"}, "data.d": {"data.a"}}
    found = rooms.circles(graph)
    assert [line.split()[0] for line in found] == ["data.a", "data.b", "data.c"]


def test_sizes_are_measured(monkeypatch):
    monkeypatch.setattr(rooms, "MOST_CELLS", 5)
    monkeypatch.setattr(rooms, "MOST_NOTEBOOKS", 2)
    found = rooms.size_problems()
    assert any("notebooks, at most 2" in line for line in found)
    assert any("cells, at most 5" in line for line in found)
    monkeypatch.setattr(rooms, "LONGEST_LINE", 20)
    assert rooms.long_lines()


def test_every_room_has_tests():
    folders = {p.name for p in (ROOT / "tests").iterdir() if p.is_dir()}
    assert set(rooms.rooms()) - {"cli"} <= folders
