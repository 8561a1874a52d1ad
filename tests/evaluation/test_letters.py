"""Letter scoring at the edges, and interrupted in the middle of a line."""
from types import SimpleNamespace

import pytest
import torch

from medmcqa_lora.core.files import read_lines, write_file
from medmcqa_lora.core.recipe_files import load_recipe
from medmcqa_lora.data.questions import load_evaluation
from medmcqa_lora.evaluation import letters as letters_module
from medmcqa_lora.evaluation.letters import (
    encode_prompts, letter_logprobs, prompt_batch, score_questions,
)
from medmcqa_lora.evaluation.records import EvaluationOutput, collect
from medmcqa_lora.fast.apply import apply_fast_parts
from medmcqa_lora.model.load import load_model
from medmcqa_lora.model.resolve import load_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def toy():
    recipe = load_recipe("toy", {"per_device_eval_batch_size": "8"})
    questions, tokenizer = load_evaluation(recipe).questions, load_tokenizer(recipe)
    model = apply_fast_parts(load_model(recipe), recipe)
    encoded, letters = encode_prompts(questions, tokenizer, recipe)
    pad = tokenizer.pad_token_id
    alone = torch.cat([letter_logprobs(model, [ids], letters, pad) for ids in encoded])
    return SimpleNamespace(recipe=recipe, questions=questions, tokenizer=tokenizer, model=model,
                           encoded=encoded, letters=letters, pad=pad, alone=alone)


def test_the_positions_of_a_padded_batch():
    batch, _, _ = prompt_batch([[5, 6, 7], [8, 9]], 0, True, torch.device("cuda"), [1, 2])
    assert batch["logits_to_keep"].tolist() == [2, 3, 4]
    assert batch["max_length_q"] == 251
    batch, _, _ = prompt_batch([[5, 6, 7], [8], [9, 9, 9]], 0, True, torch.device("cuda"))
    assert batch["max_length_q"] == 249


@pytest.mark.parametrize("packed", [False, True])
def test_rows_filled_as_on_a_gpu_score_the_same(toy, monkeypatch, packed):
    monkeypatch.setattr(letters_module, "row_multiple", lambda device: 256)
    scores = letter_logprobs(toy.model, toy.encoded, toy.letters, toy.pad, packed)
    assert (scores - toy.alone).abs().max() < 1e-4


def test_a_prompt_of_one_token_and_a_batch_of_one_question(toy):
    def score(rows, packed): return letter_logprobs(toy.model, rows, toy.letters, toy.pad, packed)
    one = score([[5]], False)
    assert (score([[5]], True) - one).abs().max() < 1e-5
    assert (score([toy.encoded[0], [5]], True)[1] - one[0]).abs().max() < 1e-4


@pytest.mark.parametrize("packed", [False, True])
def test_a_torn_line_is_dropped_and_its_question_scored_again(toy, tmp_path, packed):
    """The file is that of an evaluation that was not interrupted."""
    def score(folder, rank=0, world_size=1):
        folder.mkdir(exist_ok=True)
        output = EvaluationOutput(folder, rank, world_size, quiet=True)
        score_questions(toy.model, toy.tokenizer, toy.questions, toy.recipe, output, packed)

    complete, torn = tmp_path / "complete", tmp_path / "torn"
    score(complete)
    text = (complete / "predictions.jsonl").read_bytes()
    torn.mkdir()
    write_file(torn / "predictions.jsonl", text[:len(text) // 2])
    score(torn)
    assert (torn / "predictions.jsonl").read_bytes() == text
    by_id = {p["id"]: p for p in read_lines(complete / "predictions.jsonl")}
    assert len(by_id) == len(toy.questions)
    found = torch.tensor([list(by_id[q.id]["logprobs"].values()) for q in toy.questions])
    assert (found - toy.alone).abs().max() < 1e-4

    for rank in (0, 1): score(tmp_path / "pair", rank, 2)
    joined = collect(tmp_path / "pair", toy.questions)
    assert [p["prediction"] for p in joined] == [by_id[q.id]["prediction"] for q in toy.questions]
