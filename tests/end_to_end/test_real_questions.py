"""Real questions, and the real small model."""
import csv
import json

import pytest
from conftest import ALL
from helpers import check_demo

from medmcqa_lora.data.schemas import LETTERS
from medmcqa_lora.data.questions import question_hash, load_questions
from medmcqa_lora.fast.apply import apply_fast_parts


def test_validation_set(validation, cli):
    loaded = load_questions(str(validation))
    assert (len(loaded.questions), loaded.base, loaded.dropped) == (4183, "1", 0)
    assert {k: len(v) for k, v in loaded.problems.items()} == {"duplicate options": 21}
    assert [sum(q.answer == i for q in loaded.questions) for i in range(4)] == [1348, 1085, 925, 825]
    assert len({q.subject for q in loaded.questions}) == 21  # 20, and Unknown
    code, out, _ = cli("check-data", validation)
    assert code == 0 and "4,183 of 4,183 rows usable; answers counted from 1" in out and "duplicate options: 21" in out


def test_training_rows(train_rows, validation):
    loaded = load_questions(str(train_rows), training=True)
    assert (len(loaded.questions), loaded.base) == (2738, "1")
    assert all(q.id for q in loaded.questions) and len({q.id for q in loaded.questions}) == 2738
    assert not {question_hash(q) for q in loaded.questions} & {question_hash(q) for q in load_questions(str(validation)).questions}


def test_every_schema_and_format_reads_the_same(validation, tmp_path):
    """The same 50 rows: 0-based, as letters, nested, as CSV, JSON and parquet."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [json.loads(line) for line in validation.read_text().splitlines()[:50]]
    zero = [{**r, "cop": r["cop"] - 1} for r in rows]
    nested = [{"id": r["id"], "subject_name": r["subject_name"], "explanation": r["exp"], "data": {"Question": r["question"],
               "Options": {c: r[f"op{c.lower()}"] for c in LETTERS}, "Correct Option": LETTERS[r["cop"] - 1], "Correct Answer": r[f"op{'abcd'[r['cop'] - 1]}"]}} for r in rows]
    (tmp_path / "one.json").write_text(json.dumps(rows))
    (tmp_path / "lines.json").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "zero.jsonl").write_text("\n".join(map(json.dumps, zero)))
    (tmp_path / "nested.jsonl").write_text("\n".join(map(json.dumps, nested)))
    (tmp_path / "bom.jsonl").write_text("\ufeff" + "\n".join(map(json.dumps, rows)), encoding="utf-8")
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    pq.write_table(pa.Table.from_pylist(nested), tmp_path / "nested.parquet")
    with open(tmp_path / "rows.csv", "w", newline="") as f:
        writer = csv.DictWriter(f, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    from medmcqa_lora.data.questions import fingerprint

    prints = {p.name: fingerprint(load_questions(str(p)).questions) for p in sorted(tmp_path.iterdir())}
    assert len(prints) == 8 and len(set(prints.values())) == 1, prints


def test_batched_scores_equal_single_ones_on_the_real_model(validation, smollm2):
    import torch

    from medmcqa_lora.evaluation.records import length_batches
    from medmcqa_lora.evaluation.letters import encode_prompts, letter_logprobs
    from medmcqa_lora.model.resolve import load_tokenizer
    from medmcqa_lora.model.load import load_model
    from medmcqa_lora.core.recipe import Recipe

    recipe = Recipe(max_eval_rows=24)
    tokenizer, model = load_tokenizer(recipe), apply_fast_parts(load_model(recipe), recipe)
    rows, letters = encode_prompts(load_questions(str(validation), limit=24).questions, tokenizer, recipe)
    batched = torch.empty(24, 4)
    for batch in length_batches(rows, 8):
        batched[batch] = letter_logprobs(model, [rows[i] for i in batch], letters, tokenizer.pad_token_id)
    alone = torch.cat([letter_logprobs(model, [r], letters, tokenizer.pad_token_id) for r in rows])
    assert (batched - alone).abs().max() < 1e-3
    assert (batched.argmax(1) == alone.argmax(1)).all()


def test_options_share_their_prompts_pass_on_the_real_model(validation, smollm2):
    """Going on from the cache gives the numbers of a prompt of its own for each option, for
    questions with equal options, too.
    """
    from medmcqa_lora.data.questions import find_problems
    from medmcqa_lora.model.resolve import load_tokenizer
    from medmcqa_lora.model.load import load_model
    from medmcqa_lora.evaluation.options import choose_shared_prompt, encode_options, option_logprobs, options_prompt, shared_prompt_error
    from medmcqa_lora.core.recipe import Recipe

    recipe, loaded = Recipe(), load_questions(str(validation))
    twins = [q for q in find_problems(loaded.questions)["duplicate options"] if len(set(q.options)) < 4]
    questions = loaded.questions[:6] + twins[:2]
    tokenizer, model = load_tokenizer(recipe), apply_fast_parts(load_model(recipe), recipe).eval()
    prompts, ends = encode_options(questions, tokenizer, recipe)
    for q, p, four in zip(questions, prompts, ends):
        assert tokenizer.decode(p) == options_prompt(q, "plain")[0] and [tokenizer.decode(e) for e in four] == [f" {o}" for o in q.options]
    assert shared_prompt_error(model, prompts, ends, tokenizer.pad_token_id) < 1e-4
    assert choose_shared_prompt(model, tokenizer, questions, recipe)[0]
    sums = option_logprobs(model, prompts[-2:], ends[-2:], tokenizer.pad_token_id, shared=True)()
    assert all(len(set(four)) == len(set(q.options)) for four, q in zip(sums, questions[-2:]))


@pytest.mark.skipif(not ALL, reason="make test-all; test_installed runs a smaller demo")
def test_demo(tmp_path, cli, smollm2):
    """The main job on the real small model, with fewer steps and questions than `make demo`
    takes.
    """
    code, out, err = cli("demo", "-p", "max_steps", "3", "-p", "save_steps", "3", "-p", "max_eval_rows", "32", "--out", tmp_path / "demo")
    assert code == 0, err
    check_demo(out, tmp_path / "demo", 32)
