"""Encoded rows come from the cache only where they are right, and a bad cache stops nothing."""
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import ALL, ROOT

from medmcqa_lora.core.recipe import Recipe
from medmcqa_lora.data.questions import load_questions
from medmcqa_lora.data.tokens import (
    CACHED,
    _valid_stream,
    check_fits,
    encode_questions,
    encoding_key,
    forget_oldest,
    sample_tokenizer,
)

TRAINING = load_questions("sample", "train").questions
QUESTIONS = TRAINING[:30]
RECIPE = Recipe(target="explanation_then_letter", max_length=110)  # some explanations are shortened
WRITTEN, READ = "encoded rows kept in ", "encoded rows re-used from "  # how notes begin


def encoded(cache, questions=QUESTIONS, tokenizer=None, recipe=RECIPE):
    return encode_questions(questions, tokenizer or sample_tokenizer(), recipe, cache)


def content(e):
    """All that an encoding holds but its note."""
    return e.rows.to_list(), e.too_long, e.tokens, e.shortened


def test_reuse_gives_the_same(tmp_path):
    plain, first, again = encoded(None), encoded(tmp_path), encoded(tmp_path)
    assert first.note.startswith(WRITTEN) and again.note.startswith(READ) and not plain.note
    assert content(plain) == content(first) == content(again)
    assert plain.shortened and len(list(tmp_path.iterdir())) == 1


def test_all_rows_fit():
    recipe = Recipe(max_length=120, target="explanation_then_letter")
    found = encoded(None, TRAINING, recipe=recipe)
    assert max(len(row["input_ids"]) for row in found.rows) <= 120 and len(found.shortened) > 0
    check_fits(TRAINING, sample_tokenizer(), Recipe())


def test_the_oldest_files_are_removed(tmp_path):
    for n in range(CACHED + 3):
        (tmp_path / f"{n}.arrow").touch()
        os.utime(tmp_path / f"{n}.arrow", (n, n))
    forget_oldest(tmp_path)
    kept = sorted(int(p.stem) for p in tmp_path.glob("*.arrow"))
    assert kept == list(range(3, CACHED + 3))


def test_a_missing_file_is_no_stream(tmp_path):
    assert _valid_stream(tmp_path / "missing.arrow") is None


def test_reuse_does_not_tokenise(tmp_path, monkeypatch):
    encoded(tmp_path)
    again = "medmcqa_lora.data.tokens.encoded_stream"
    monkeypatch.setattr(again, lambda *_: pytest.fail("made again"))
    assert len(encoded(tmp_path).rows) > 0


def other_template():
    tokenizer = sample_tokenizer()
    tokenizer.chat_template = "{{ bos_token }}" + tokenizer.chat_template
    return tokenizer


def with_token():
    tokenizer = sample_tokenizer()
    tokenizer.add_tokens(["insulin"])
    return tokenizer


def other_end():
    tokenizer = sample_tokenizer()
    tokenizer.eos_token = "<pad>"
    return tokenizer


LAST = QUESTIONS[-1]


def changed_last(**fields):
    """The questions with the last one changed."""
    return dict(questions=[*QUESTIONS[:-1], replace(LAST, **fields)])


CHANGES = {
    "prompt_style": dict(recipe=replace(RECIPE, prompt_style="lm_eval")),
    "target": dict(recipe=replace(RECIPE, target="letter")),
    "max_length": dict(recipe=replace(RECIPE, max_length=109)),
    "vocabulary": dict(tokenizer=sample_tokenizer(900)),
    "an added token": dict(tokenizer=with_token()),
    "the end token": dict(tokenizer=other_end()),
    "chat template": dict(tokenizer=other_template(), recipe=replace(RECIPE, prompt_style="chat")),
    "order": dict(questions=QUESTIONS[::-1]),
    "one fewer": dict(questions=QUESTIONS[:-1]),
    "an answer": changed_last(answer=(LAST.answer + 1) % 4),
    "white space": changed_last(question=LAST.question.replace(" ", "  ", 1)),
    "an option": changed_last(options=(*LAST.options[:3], "another")),
    "an explanation": changed_last(explanation="Because."),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_decides_rows_makes_others(tmp_path, change):
    encoded(tmp_path)
    changed = encoded(tmp_path, **CHANGES[change])
    assert changed.note.startswith(WRITTEN)
    assert content(changed) == content(encoded(None, **CHANGES[change]))


def test_what_decides_no_row_changes_no_key():
    others = ({}, {"seed": 7}, {"learning_rate": 1e-3}, {"packing": "off"})
    tokenizer = sample_tokenizer()
    keys = {encoding_key(QUESTIONS, tokenizer, replace(RECIPE, **other)) for other in others}
    assert len(keys) == 1


def flip_a_bit(data: bytes) -> bytes:
    flipped = bytearray(data)
    flipped[len(data) // 2] ^= 1
    return bytes(flipped)


DAMAGE = {
    "half": lambda data: data[:len(data) // 2],
    "empty": lambda data: b"",
    "no checksum": lambda data: data[:-64],
    "a bit": flip_a_bit,
    "text": lambda data: b"rows",
    "a batch less": lambda data: data[:-64 - 8],
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_made_again(tmp_path, damage):
    good = encoded(tmp_path)
    [file] = tmp_path.iterdir()
    data = file.read_bytes()
    file.unlink()  # good's rows are not mapped from it, but the next ones would be
    file.write_bytes(DAMAGE[damage](data))
    mended = encoded(tmp_path)
    assert mended.note.startswith(WRITTEN) and content(mended) == content(good)
    assert file.read_bytes() == data and encoded(tmp_path).note.startswith(READ)


@pytest.mark.parametrize("folder", ["{tmp}/file/rows", "/dev/null/cache"])
def test_an_unwritable_folder_stops_nothing(tmp_path, folder):
    (tmp_path / "file").write_text("")  # root may write into any folder, but not below a file
    found = encoded(Path(folder.format(tmp=tmp_path)))
    assert "encoded rows are not kept" in found.note and "can't be written" in found.note
    assert "\n" not in found.note
    assert content(found) == content(encoded(None))


COMPARE_LABELS = """
import sys
from pathlib import Path
from tests.data.test_token_cache import encoded
cached = encoded(Path(sys.argv[1])).rows[:]["labels"]
print(cached == encoded(None).rows[:]["labels"])
"""


def test_several_processes_at_once(tmp_path):
    """All write the same file; each has complete rows, and nothing else is left over."""
    env = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    command = [sys.executable, "-c", COMPARE_LABELS, str(tmp_path)]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env)
                 for _ in range(3)]
    assert [p.communicate()[0].strip() for p in processes] == ["True"] * 3
    assert len(list(tmp_path.iterdir())) == 1


def printed_lines(notebook) -> list[str]:
    """What a notebook's cells printed."""
    lines = []
    for cell in json.loads(notebook.read_text())["cells"]:
        for output in cell.get("outputs", []):
            lines += "".join(output.get("text", "")).splitlines()
    return lines


@pytest.mark.skipif(not ALL, reason="make test-all")
def test_a_run_says_so(cli, tmp_path, monkeypatch):
    """Written, then read, with the same losses; a cache that can't be written is one line."""
    from medmcqa_lora.model.resolve import resolve_model

    settings = dict(model=resolve_model("toy-nemotron-h"), max_steps="2", save_steps="2",
                    max_rows="12")
    options = [word for key, value in settings.items() for word in ("-p", key, value)]
    runs = (("one", "cache", WRITTEN), ("two", "cache", READ),
            ("three", "file", "encoded rows are not kept: "))
    losses = []
    (tmp_path / "file").write_text("")
    for name, cache, note in runs:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / cache))
        run = tmp_path / name
        code, _, err = cli("train", "--recipe", "toy", *options, "--out", run)
        assert code == 0, err
        printed = printed_lines(run / "train.ipynb")
        assert len([line for line in printed if line.startswith(note)]) == 1, printed
        metrics = (run / "metrics.jsonl").read_text().splitlines()
        losses.append([json.loads(line)["loss"] for line in metrics])
    assert all(x == losses[0] for x in losses)
