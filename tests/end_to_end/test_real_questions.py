"""Real questions, and the real small model."""
import csv
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import ALL
from helpers import check_demo

from medmcqa_lora.core.recipe import Recipe
from medmcqa_lora.data.questions import find_problems, fingerprint, load_questions, question_hash
from medmcqa_lora.data.schemas import LETTERS
from medmcqa_lora.evaluation.letters import encode_prompts, letter_logprobs
from medmcqa_lora.evaluation.options import (
    choose_shared_prompt,
    encode_options,
    option_logprobs,
    options_prompt,
    shared_prompt_error,
)
from medmcqa_lora.evaluation.records import length_batches
from medmcqa_lora.fast.apply import apply_fast_parts
from medmcqa_lora.model.load import load_model
from medmcqa_lora.model.resolve import load_tokenizer


def test_validation_set(validation):
    loaded = load_questions(str(validation))
    assert (len(loaded.questions), loaded.base, loaded.dropped) == (4183, "1", 0)
    assert {k: len(v) for k, v in loaded.problems.items()} == {"duplicate options": 21}
    answers = [sum(q.answer == i for q in loaded.questions) for i in range(4)]
    assert answers == [1348, 1085, 925, 825]
    assert len({q.subject for q in loaded.questions}) == 21  # 20, and Unknown


def test_check_data_of_the_validation_set(validation, cli):
    code, out, _ = cli("check-data", validation)
    assert code == 0 and "duplicate options: 21" in out
    assert "4,183 of 4,183 rows usable; answers counted from 1" in out


def test_training_rows(train_rows, validation):
    loaded = load_questions(str(train_rows), training=True)
    assert (len(loaded.questions), loaded.base) == (2738, "1")
    assert all(q.id for q in loaded.questions) and len({q.id for q in loaded.questions}) == 2738
    held_out = load_questions(str(validation)).questions
    assert not {question_hash(q) for q in loaded.questions} & {question_hash(q) for q in held_out}


def nested_row(row: dict) -> dict:
    """A row in the nested schema, its answer as a letter."""
    answer = LETTERS[row["cop"] - 1]
    question = {
        "Question": row["question"],
        "Options": {letter: row[f"op{letter.lower()}"] for letter in LETTERS},
        "Correct Option": answer,
        "Correct Answer": row[f"op{answer.lower()}"],
    }
    given = {"id": row["id"], "subject_name": row["subject_name"], "explanation": row["exp"]}
    return given | {"data": question}


def test_every_schema_and_format_reads_the_same(validation, tmp_path):
    """The same 50 rows: 0-based, as letters, nested, as CSV, JSON and parquet."""
    def json_lines(rows):
        return "\n".join(map(json.dumps, rows))

    rows = [json.loads(line) for line in validation.read_text().splitlines()[:50]]
    zero = [{**r, "cop": r["cop"] - 1} for r in rows]
    nested = [nested_row(r) for r in rows]
    (tmp_path / "one.json").write_text(json.dumps(rows))
    (tmp_path / "lines.json").write_text(json_lines(rows))
    (tmp_path / "zero.jsonl").write_text(json_lines(zero))
    (tmp_path / "nested.jsonl").write_text(json_lines(nested))
    (tmp_path / "bom.jsonl").write_text("\ufeff" + json_lines(rows), encoding="utf-8")
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    pq.write_table(pa.Table.from_pylist(nested), tmp_path / "nested.parquet")
    with open(tmp_path / "rows.csv", "w", newline="") as f:
        writer = csv.DictWriter(f, rows[0])
        writer.writeheader()
        writer.writerows(rows)

    files = sorted(tmp_path.iterdir())
    prints = {p.name: fingerprint(load_questions(str(p)).questions) for p in files}
    assert len(prints) == 8 and len(set(prints.values())) == 1, prints


def test_batched_scores_equal_single_ones_on_the_real_model(validation, smollm2):
    recipe = Recipe(max_eval_rows=24)
    tokenizer, model = load_tokenizer(recipe), apply_fast_parts(load_model(recipe), recipe)
    questions = load_questions(str(validation), limit=24).questions
    rows, letters = encode_prompts(questions, tokenizer, recipe)

    def scores(batch):
        return letter_logprobs(model, batch, letters, tokenizer.pad_token_id)

    batched = torch.empty(24, 4)
    for batch in length_batches(rows, 8):
        batched[batch] = scores([rows[i] for i in batch])
    alone = torch.cat([scores([row]) for row in rows])
    assert (batched - alone).abs().max() < 1e-3
    assert (batched.argmax(1) == alone.argmax(1)).all()


def test_options_share_their_prompts_pass_on_the_real_model(validation, smollm2):
    """Continuing from the cache gives the numbers of a prompt of its own for each option, for
    questions with equal options, too.
    """
    recipe, loaded = Recipe(), load_questions(str(validation))
    duplicates = find_problems(loaded.questions)["duplicate options"]
    twins = [q for q in duplicates if len(set(q.options)) < 4]
    questions = loaded.questions[:6] + twins[:2]
    tokenizer = load_tokenizer(recipe)
    model = apply_fast_parts(load_model(recipe), recipe).eval()
    prompts, ends = encode_options(questions, tokenizer, recipe)
    for question, prompt, four in zip(questions, prompts, ends):
        assert tokenizer.decode(prompt) == options_prompt(question, "plain")[0]
        assert [tokenizer.decode(end) for end in four] == [f" {o}" for o in question.options]
    pad = tokenizer.pad_token_id
    assert shared_prompt_error(model, prompts, ends, pad) < 1e-4
    assert choose_shared_prompt(model, tokenizer, questions, recipe)[0]
    sums = option_logprobs(model, prompts[-2:], ends[-2:], pad, shared=True)()
    assert all(len(set(four)) == len(set(q.options)) for four, q in zip(sums, questions[-2:]))


@pytest.mark.skipif(not ALL, reason="make test-all; test_installed runs a smaller demo")
def test_demo(tmp_path, cli, smollm2):
    """The main job on the real small model, with fewer steps and questions than `make demo`
    takes.
    """
    small = "-p max_steps 3 -p save_steps 3 -p max_eval_rows 32".split()
    code, out, err = cli("demo", *small, "--out", tmp_path / "demo")
    assert code == 0, err
    check_demo(out, tmp_path / "demo", 32)
