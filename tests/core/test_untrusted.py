"""Files and names from elsewhere: each broken or hostile one is refused in one line."""
import json
from pathlib import Path

import pytest

from medmcqa_lora.core.untrusted import (
    check_adapter_config,
    check_model_config,
    check_notebook,
    check_scaled,
    file_beside,
    path_trick,
    read_object,
    run_records,
)

FP8 = {"quantization_config": {"quant_method": "fp8"}}
CELL = dict(cell_type="code", source="", metadata=dict(tags=["parameters"]))
UNTAGGED = CELL | dict(metadata={})


@pytest.mark.parametrize("content, what", [
    (b"{", "not JSON"),
    (b"[]", "is not a JSON object"),
    (b'{"n": NaN}', "NaN is no number"),
    (b'{"a":' * 100_000, "nested too deeply"),
    (b'{"n": 1, "n": 2}', "'n' stands twice"),
    ("é".encode("latin-1"), "utf-8"),
])
def test_a_file_that_is_no_json_object(content, what, tmp_path):
    file = tmp_path / "summary.json"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=what) as error:
        read_object(file, "evaluate again")
    assert str(error.value).startswith(f"{file}: ")
    assert str(error.value).endswith("; evaluate again")


def test_a_missing_file(tmp_path):
    with pytest.raises(ValueError, match="can't be read .*; evaluate again"):
        read_object(tmp_path / "none.json", "evaluate again")


def test_a_missing_record_of_a_run(tmp_path):
    with pytest.raises(ValueError, match="recipe.json: can't be read"):
        with run_records(tmp_path):
            pass


@pytest.mark.parametrize("path", ["\x1b[2Jrun", "x" * 201, "/x" * 1001, "a/..", "../a/../b"])
def test_a_path_that_means_something_else(path):
    assert path_trick(Path(path))


def test_a_link_to_nowhere(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    assert path_trick(tmp_path / "link") == "is a link to nowhere"
    (tmp_path / "nowhere").mkdir()
    assert path_trick(tmp_path / "link") == ""


NAMES = ["../x", "/etc/passwd", "a/b", ".", "..", "", 3, None, "x\0", "~x"]


@pytest.mark.parametrize("name", NAMES)
def test_a_name_that_is_no_file_beside_the_index(name, tmp_path):
    with pytest.raises(ValueError, match="which is not a file beside it; copy it again"):
        file_beside(tmp_path / "index.json", name)


@pytest.mark.parametrize("values, what", [
    (dict(layer_types=["attention"] * 2000), r"2,000 blocks \(layer_types\)"),
    (dict(hybrid_override_pattern="M" * 1001), r"1,001 blocks \(hybrid_override_pattern\)"),
    (dict(num_hidden_layers=10**9), r"1,000,000,000 blocks \(num_hidden_layers\), beyond any"),
    (dict(_attn_implementation="someone/kernel"), "would fetch a kernel and run it"),
])
def test_a_model_configuration_that_does_harm(values, what, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match=f"model named: config.json .*{what}"):
        check_model_config(tmp_path, "named")


def test_harmless_configurations(tmp_path):
    model = dict(model_type="llama", auto_map={"AutoConfig": "evil.Config"}, num_hidden_layers=30)
    adapter = dict(r=4, megatron_core="megatron.core", auto_mapping=None)
    (tmp_path / "config.json").write_text(json.dumps(model))
    (tmp_path / "adapter_config.json").write_text(json.dumps(adapter))
    assert check_model_config(tmp_path) == model
    assert check_adapter_config(tmp_path) == adapter


def test_scales_of_another_matrix_do_not_count():
    dtypes = {"a.weight": "F8_E4M3", "b.weight_scale": "F32"}
    with pytest.raises(ValueError, match="a.weight is F8_E4M3 without scales"):
        check_scaled("m", dtypes, FP8)


@pytest.mark.parametrize("values, what", [
    (dict(nbformat=3, worksheets=[]), "is not a notebook of format 4"),
    (dict(nbformat=4, cells=[{"metadata": []}]), "is not a notebook of format 4"),
    (dict(nbformat=4, cells=[UNTAGGED]), "has 0 cells tagged parameters"),
    (dict(nbformat=4, cells=[CELL, CELL]), "has 2 cells tagged parameters"),
])
def test_a_notebook_that_a_recipe_would_not_reach(values, what, tmp_path):
    file = tmp_path / "n.ipynb"
    file.write_text(json.dumps(values))
    with pytest.raises(ValueError, match=what):
        check_notebook(file)
