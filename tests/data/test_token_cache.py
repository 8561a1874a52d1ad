"""Encoded rows come from the cache only where they are the rows that would be made, and a bad cache stops nothing."""
import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
from conftest import ALL, ROOT

from medmcqa_lora.data.questions import load_questions
from medmcqa_lora.data.tokens import encode_questions, encoding_key, sample_tokenizer
from medmcqa_lora.core.recipe import Recipe

QUESTIONS = load_questions("sample", "train").questions[:30]
RECIPE = Recipe(target="explanation_then_letter", max_length=110)  # some explanations are shortened


def encoded(cache, questions=QUESTIONS, tokenizer=None, recipe=RECIPE):
    return encode_questions(questions, tokenizer or sample_tokenizer(), recipe, cache)


def whole(e):
    return e.rows.to_list(), e.too_long, e.tokens, e.shortened


def test_reuse_gives_the_same(tmp_path):
    plain, first, again = encoded(None), encoded(tmp_path), encoded(tmp_path)
    assert first.note.startswith("encoded rows kept in ") and again.note.startswith("encoded rows re-used from ") and not plain.note
    assert whole(plain) == whole(first) == whole(again)
    assert plain.shortened and len(list(tmp_path.iterdir())) == 1


def test_reuse_does_not_tokenise(tmp_path, monkeypatch):
    encoded(tmp_path)
    monkeypatch.setattr("medmcqa_lora.data.tokens.encoded_stream", lambda *_: pytest.fail("made again"))
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
    "an answer": dict(questions=[*QUESTIONS[:-1], replace(QUESTIONS[-1], answer=(QUESTIONS[-1].answer + 1) % 4)]),
    "white space": dict(questions=[*QUESTIONS[:-1], replace(QUESTIONS[-1], question=QUESTIONS[-1].question.replace(" ", "  ", 1))]),
    "an option": dict(questions=[*QUESTIONS[:-1], replace(QUESTIONS[-1], options=(*QUESTIONS[-1].options[:3], "another"))]),
    "an explanation": dict(questions=[*QUESTIONS[:-1], replace(QUESTIONS[-1], explanation="Because.")]),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_decides_rows_makes_others(tmp_path, change):
    encoded(tmp_path)
    changed = encoded(tmp_path, **CHANGES[change])
    assert changed.note.startswith("encoded rows kept in ")
    assert whole(changed) == whole(encoded(None, **CHANGES[change]))


def test_what_decides_no_row_changes_no_key():
    keys = {encoding_key(QUESTIONS, sample_tokenizer(), replace(RECIPE, **other)) for other in ({}, {"seed": 7}, {"learning_rate": 1e-3}, {"packing": "off"})}
    assert len(keys) == 1


@pytest.mark.parametrize("damage", ["half", "empty", "no checksum", "a bit", "text", "a batch less"])
def test_a_damaged_file_is_made_again(tmp_path, damage):
    good = encoded(tmp_path)
    [file] = tmp_path.iterdir()
    content = file.read_bytes()
    flipped = bytearray(content)
    flipped[len(content) // 2] ^= 1
    file.unlink()  # good's rows are not mapped from it, but the next ones would be
    file.write_bytes({"half": content[: len(content) // 2], "empty": b"", "no checksum": content[:-64], "a bit": bytes(flipped), "text": b"rows", "a batch less": content[:-64 - 8]}[damage])
    mended = encoded(tmp_path)
    assert mended.note.startswith("encoded rows kept in ") and whole(mended) == whole(good)
    assert file.read_bytes() == content and encoded(tmp_path).note.startswith("encoded rows re-used from ")


def test_an_unwritable_folder_stops_nothing(tmp_path):
    (tmp_path / "file").write_text("")  # root may write into any folder, but not below a file
    found = encoded(tmp_path / "file" / "rows")
    assert "encoded rows are not kept" in found.note and "can't be written" in found.note and "\n" not in found.note
    assert whole(found) == whole(encoded(None))


def test_several_processes_at_once(tmp_path):
    """All write the same file; each has whole rows, and nothing else stays behind."""
    code = ("import sys; from pathlib import Path; from tests.data.test_token_cache import encoded\n"
            "print(encoded(Path(sys.argv[1])).rows[:]['labels'] == encoded(None).rows[:]['labels'])")
    env = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    started = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True, env=env) for _ in range(3)]
    assert [p.communicate()[0].strip() for p in started] == ["True"] * 3
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.skipif(not ALL, reason="make test-all")
def test_a_run_says_so(cli, tmp_path, monkeypatch):
    """Through the command line: kept, then re-used, with the same losses; and a cache that can't be written is one line."""
    from medmcqa_lora.model.resolve import resolve_model

    toy = resolve_model("toy-nemotron-h")
    words = ("train", "--recipe", "toy", "-p", "model", toy, "-p", "max_steps", "2", "-p", "save_steps", "2", "-p", "max_rows", "12", "--out")
    losses = []
    (tmp_path / "file").write_text("")
    for name, cache, said in (("one", "cache", "encoded rows kept in "), ("two", "cache", "encoded rows re-used from "), ("three", "file", "encoded rows are not kept: ")):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / cache))
        code, _, err = cli(*words, tmp_path / name)
        assert code == 0, err
        printed = [line for cell in json.loads((tmp_path / name / "train.ipynb").read_text())["cells"] for o in cell.get("outputs", []) for line in "".join(o.get("text", "")).splitlines()]
        assert len([line for line in printed if line.startswith(said)]) == 1, printed
        losses.append([json.loads(line)["loss"] for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()])
    assert all(x == losses[0] for x in losses)
