"""What is refused before anything is sent to the hub, and how its errors are told."""
import json

import pytest

from medmcqa_lora.model.adapter import adapter_digest
from medmcqa_lora.model.hub import check_shareable, upload_run

INDEX = """model-index:
- name: a
  results:
  - task:
      type: multiple-choice
    dataset:
      name: q
      type: custom
    metrics:
    - type: accuracy
      value: 0.5
"""


@pytest.fixture
def run(tmp_path):
    """The files of a finished run."""
    folder = tmp_path / "run"
    (folder / "adapter").mkdir(parents=True)
    (folder / "adapter/adapter_model.safetensors").write_text("weights")
    (folder / "adapter/adapter_config.json").write_text("{}")
    write_card(folder, "language: en\nlibrary_name: peft\n")
    check_shareable(folder)
    return folder


def write_card(run, metadata):
    (run / "README.md").write_text(f"---\n{metadata}---\n\n# A model\n")


@pytest.mark.parametrize("metadata, expected", [
    ("language: [en\n", "its metadata can't be read"),
    ("language: en\n", "is not the card of a run"),
    ("library_name: peft\n" + INDEX.replace("type: custom", "kind: custom"),
     "its metadata can't be read"),
])
def test_a_card_that_can_not_be_sent(metadata, expected, run):
    write_card(run, metadata)
    with pytest.raises(ValueError, match=expected):
        check_shareable(run)


def test_numbers_of_another_adapter(run):
    write_card(run, "library_name: peft\n" + INDEX)
    digest = adapter_digest(run / "adapter")
    (run / "evaluated.json").write_text(json.dumps({"adapter_sha256": digest}))
    check_shareable(run)
    (run / "evaluated.json").write_text(json.dumps({"adapter_sha256": "of another"}))
    with pytest.raises(ValueError, match="its numbers are those of another adapter"):
        check_shareable(run)


def test_without_a_network(run, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="log in with"):
        upload_run(run, "me/adapter")
