"""The options' view: tokens across the prompt's border, short prompts, interrupted files."""
from dataclasses import replace
from types import SimpleNamespace

import pytest

from medmcqa_lora.core.files import write_file
from medmcqa_lora.core.recipe_files import load_recipe
from medmcqa_lora.data.questions import load_evaluation
from medmcqa_lora.evaluation.options import (
    distinct_rows, encode_options, options_prompt, score_options, score_repeated_prompts,
    score_shared_prompts,
)
from medmcqa_lora.evaluation.records import EvaluationOutput, collect
from medmcqa_lora.fast.apply import apply_fast_parts
from medmcqa_lora.model.load import load_model
from medmcqa_lora.model.resolve import load_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def toy():
    recipe = load_recipe("toy", {"per_device_eval_batch_size": "8"})
    questions, tokenizer = load_evaluation(recipe).questions[:20], load_tokenizer(recipe)
    model = apply_fast_parts(load_model(recipe), recipe).eval()
    prompts, ends = encode_options(questions, tokenizer, recipe)
    rows, _ = distinct_rows(ends)
    pad = tokenizer.pad_token_id
    repeated = score_repeated_prompts(model, prompts, rows, pad)()
    return SimpleNamespace(recipe=recipe, questions=questions, tokenizer=tokenizer, model=model,
                           prompts=prompts, rows=rows, pad=pad, repeated=repeated)


def largest_difference(found, expected):
    assert len(found) == len(expected)
    return max(abs(a - b) for a, b in zip(found, expected))


def test_an_empty_option_is_refused(toy):
    question = replace(toy.questions[0], options=("a", "b", " ", "d"))
    with pytest.raises(ValueError, match="option C is empty"):
        encode_options([question], toy.tokenizer, toy.recipe)


class PairTokenizer:
    """Cuts a text into pairs of characters, so that a token crosses the prompt's border."""

    def __call__(self, texts, add_special_tokens=True):
        def encode(text):
            return [int.from_bytes(text[k:k + 2].encode()) for k in range(0, len(text), 2)]
        return {"input_ids": [encode(text) for text in texts]}


@pytest.mark.parametrize("stem", ["odd", "even"])
def test_a_merged_token_is_scored_in_all_four_options(toy, stem):
    """The colon belongs to the shared part, or to all four options."""
    question = replace(toy.questions[0], question=stem)
    (prompt,), (four,) = encode_options([question], PairTokenizer(), toy.recipe)
    text = options_prompt(question, "plain")[0]
    assert 2 * len(prompt) == len(text) - len(text) % 2
    characters = [len(f"{text} {option}") - 2 * len(prompt) for option in question.options]
    assert [len(end) for end in four] == [-(-n // 2) for n in characters]


def test_one_question_at_a_time_scores_the_same(toy):
    found = []
    for i, prompt in enumerate(toy.prompts):
        own = [(0, end) for owner, end in toy.rows if owner == i]
        found += score_shared_prompts(toy.model, [prompt], own, toy.pad)()
    assert largest_difference(found, toy.repeated) < 1e-4


@pytest.mark.parametrize("rows", [[(0, [7]), (1, [8])], [(0, [7, 8, 9]), (1, [8]), (1, [9, 9])]])
def test_a_prompt_shorter_than_the_convolution(toy, rows):
    """Also options of a single token, which need no second pass."""
    prompts = [[5], toy.prompts[0]]
    shared = score_shared_prompts(toy.model, prompts, rows, toy.pad)()
    repeated = score_repeated_prompts(toy.model, prompts, rows, toy.pad)()
    assert largest_difference(shared, repeated) < 1e-4


@pytest.mark.parametrize(("shared", "packed"), [(True, False), (False, False), (False, True)])
def test_an_interrupted_file_and_two_processes_give_the_same_bytes(toy, tmp_path, shared, packed):
    """On the same machine with the same number of threads."""
    def score(folder, rank=0, world_size=1):
        folder.mkdir(exist_ok=True)
        output = EvaluationOutput(folder, rank, world_size, quiet=True)
        score_options(toy.model, toy.tokenizer, toy.questions, toy.recipe, output, shared, packed)

    complete, torn, pair = tmp_path / "complete", tmp_path / "torn", tmp_path / "pair"
    score(complete)
    text = (complete / "options.jsonl").read_bytes()
    torn.mkdir()
    write_file(torn / "options.jsonl", text[:len(text) // 2])
    score(torn)
    assert (torn / "options.jsonl").read_bytes() == text

    for rank in (0, 1): score(pair, rank, 2)
    records = collect(complete, toy.questions, "options")
    collect(pair, toy.questions, "options")
    assert (pair / "options.jsonl").read_bytes() == (complete / "options.jsonl").read_bytes()
    assert [p.name for p in pair.iterdir()] == ["options.jsonl"]

    sums = {(i, tuple(end)): total for (i, end), total in zip(toy.rows, toy.repeated)}
    _, ends = encode_options(toy.questions, toy.tokenizer, toy.recipe)
    expected = [sums[i, tuple(end)] for i, four in enumerate(ends) for end in four]
    found = [x for record in records for x in record["logprobs"].values()]
    assert largest_difference(found, expected) < 1e-4
