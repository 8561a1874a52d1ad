"""Nothing leaks: an example's logits, gradients, scores and losses are its own, alone, padded or packed."""
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from conftest import ALL, ROOT
from helpers import trained

from benchmarks.isolation import isolation, make_recipe
from medmcqa_lora.evaluation import letters as evaluation
from medmcqa_lora.data.leakage import load_pair
from medmcqa_lora.data.tokens import encode_questions
from medmcqa_lora.evaluation.records import read_records
from medmcqa_lora.evaluation.letters import letter_logprobs, pad_right, score_questions
from medmcqa_lora.core.files import read_lines
from medmcqa_lora.evaluation.generation import generate_texts, pad_left
from medmcqa_lora.fast.packing import choose_packing, kept_apart, packing_collator, packing_errors
from medmcqa_lora.model.resolve import load_tokenizer
from medmcqa_lora.model.load import load_model
from medmcqa_lora.model.lora import attach_lora
from medmcqa_lora.fast.apply import apply_fast_parts
from medmcqa_lora.core.recipe_files import load_recipe


@pytest.mark.parametrize("fast", ["auto", "off"])
def test_alone_padded_and_packed(tmp_path, fast):
    """One token, a chunk and its neighbours, several chunks; every LoRA group, every matrix."""
    recipe, config = make_recipe("", "float32", tmp_path)
    found = isolation(replace(recipe, fast=fast), config["chunk_size"], config["vocab_size"])
    differences = found["differences"]
    assert found["matrices"] > 20
    for way in ("padded", "packed"):
        assert differences[way]["logits"] < 1e-5 and differences[way]["gradients"] < 1e-4, (way, differences)
    assert differences["leaking"]["logits"] > 0.1 and differences["leaking"]["gradients"] > 0.1  # the measure sees a leak
    assert differences["scoring, padded"]["letters"] < 1e-4 and differences["scoring, packed"]["letters"] < 1e-4


@pytest.mark.parametrize("settings", [{}, {"gradient_accumulation_steps": "3", "gradient_checkpointing": "true", "target": "letter_and_text"}], ids=["letter", "accumulated, checkpointed, text"])
def test_packing_changes_no_loss(tmp_path, settings):
    (padded, padded_eval, one), (packed, packed_eval, other) = (trained(tmp_path / str(p), p, **settings) for p in (False, True))
    assert [m["loss"] for m in packed] == pytest.approx([m["loss"] for m in padded], rel=1e-4)
    assert [m["tokens"] for m in packed] == [m["tokens"] for m in padded]  # padding was never counted
    assert packed_eval[0]["eval_loss"] == pytest.approx(padded_eval[0]["eval_loss"], rel=1e-4)
    assert max(float((one[n] - other[n]).abs().max()) for n in one) < 1e-3  # Adam divides by small numbers
    assert packed[-1]["loss"] < packed[0]["loss"]


def test_each_other_way_of_padding_is_refused():
    recipe = load_recipe("toy")
    model, tokenizer = apply_fast_parts(load_model(recipe), recipe), load_tokenizer(recipe)
    rows = [[5, 6, 7, 8], [9, 10]]
    (left, left_mask), (right, right_mask) = pad_left(rows, 0), pad_right(rows, 0)
    with pytest.raises(ValueError, match="left of 1 of 2 rows in a pass without a cache"):
        model(left, attention_mask=left_mask, use_cache=False)
    with pytest.raises(ValueError, match="right of 1 of 2 rows in a pass with a cache"):
        model.generate(input_ids=right, attention_mask=right_mask, max_new_tokens=2)
    tuned = apply_fast_parts(attach_lora(model, recipe), recipe)  # the check stays under an adapter, where PEFT calls forward directly
    with pytest.raises(ValueError, match="pad on the right"):
        tuned.train()(left, attention_mask=left_mask, use_cache=False)
    with pytest.raises(ValueError, match="model.eval"):
        generate_texts(tuned, rows, tokenizer, 2)
    assert len(generate_texts(tuned.eval(), rows, tokenizer, 2)) == 2


def test_generation_is_the_same_alone_and_padded():
    recipe = load_recipe("toy")
    model, tokenizer = apply_fast_parts(load_model(recipe), recipe), load_tokenizer(recipe)
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(3, 1000, (n,), generator=generator).tolist() for n in (40, 3, 17)]
    assert generate_texts(model, rows, tokenizer, 8) == [generate_texts(model, [r], tokenizer, 8)[0] for r in rows]


@pytest.mark.parametrize("seed", range(20 if ALL else 2))
def test_random_lengths(seed):
    """Any order of any lengths, in rows of one and of several examples."""
    model = apply_fast_parts(load_model(load_recipe("toy")), load_recipe("toy")).train()
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 60, (int(torch.randint(1, 9, (1,), generator=generator)),), generator=generator).tolist()
    rows = [torch.randint(3, 1000, (n,), generator=generator).tolist() for n in lengths]
    batch = packing_collator()([{"input_ids": r, "labels": r} for r in rows])
    batch.pop("labels")
    with torch.no_grad():
        packed = model(**batch, use_cache=False).logits[0].split(lengths)
        for y, row in zip(packed, rows):
            alone = model(torch.tensor([row]), use_cache=False).logits[0]
            assert (y - alone).abs().max() < 1e-5 * alone.abs().max()


def test_a_real_model_keeps_examples_apart(smollm2):
    recipe = load_recipe("demo")
    rows = encode_questions(load_pair(recipe)[0].questions[:2], load_tokenizer(recipe), recipe).rows
    errors = packing_errors(apply_fast_parts(load_model(recipe), recipe), [rows[0]["input_ids"], rows[1]["input_ids"]])
    assert kept_apart(errors, half=False) and errors["neighbour"] < 1e-6 and errors["packed"] < 1e-4, errors


def test_a_model_that_can_not_isolate_is_not_packed(monkeypatch):
    """transformers' own Mamba block on this path: auto pads, on is refused before a step is taken."""
    import medmcqa_lora.fast.apply

    monkeypatch.setattr(medmcqa_lora.fast.apply, "keep_apart", lambda model, use_varlen: model)
    model = apply_fast_parts(load_model(recipe := load_recipe("toy")), recipe)
    rows = encode_questions(load_pair(recipe)[0].questions[:2], load_tokenizer(recipe), recipe).rows
    assert choose_packing(model, rows, recipe)[0] is False
    with pytest.raises(ValueError, match="packing = on is refused"):
        choose_packing(model, rows, replace(recipe, packing="on"))
    assert choose_packing(model, rows, replace(recipe, packing="off")) == (False, "off in the recipe")


TRITON_ONLY = """
import sys
from medmcqa_lora.core.recipe_files import load_recipe
from medmcqa_lora.launch.preflight import check_recipe_here
check_recipe_here(load_recipe("toy"))
from transformers.models.nemotron_h import modeling_nemotron_h as code
from medmcqa_lora.core.environment import is_kernel
print([is_kernel(getattr(code, n)) for n in ("mamba2_split_conv1d_scan_combined", "mamba2_chunk_scan", "causal_conv1d_fn")])
"""


def test_a_triton_only_mamba_ssm_is_found_by_a_launch(tmp_path):
    """Its import fails on a CUDA extension; the launch's own look at the model's structure must not settle for PyTorch."""
    (folder := tmp_path / "mamba_ssm/ops/triton").mkdir(parents=True)
    (tmp_path / "mamba_ssm/__init__.py").write_text("import a_cuda_extension_that_was_not_built\n")
    (folder / "ssd_combined.py").write_text("def mamba_split_conv1d_scan_combined(zxbcdt): pass\ndef mamba_chunk_scan_combined(x): pass\n")
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", TRITON_ONLY], capture_output=True, text=True, env=os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"})
    assert done.stdout.strip().endswith("[True, True, False]"), done.stderr[-500:]


def scores(folder, model, tokenizer, questions, recipe, packed, rank=0, world_size=1):
    """Log-probabilities by question, in the order of the file."""
    folder.mkdir(exist_ok=True)
    score_questions(model, tokenizer, questions, recipe, folder, rank, world_size, quiet=True, packed=packed)
    return {k: list(p["logprobs"].values()) for k, p in read_records(folder).items()}


@pytest.mark.parametrize("multiple", [1, 256], ids=["as on a CPU", "filled as on a GPU"])
@pytest.mark.parametrize("name", ["toy", "demo"])
def test_scores_are_the_same_packed_padded_and_alone(name, multiple, smollm2, monkeypatch):
    """A prompt of one token and prompts of real lengths, in batches of several and of one."""
    monkeypatch.setattr(evaluation, "row_multiple", lambda device: multiple)
    recipe = load_recipe(name)
    tokenizer, model = load_tokenizer(recipe), apply_fast_parts(load_model(recipe), recipe)
    rows, letters = evaluation.encode_prompts(load_pair(recipe)[1].questions[: 12 if name == "toy" else 4], tokenizer, recipe)
    rows.insert(1, rows[0][:1])
    alone = torch.cat([model(torch.tensor([r]), use_cache=False).logits[:, -1].detach().log_softmax(-1)[:, list(letters)] for r in rows])
    for packed in (False, True):
        together = letter_logprobs(model, rows, letters, tokenizer.pad_token_id, packed)
        single = torch.cat([letter_logprobs(model, [r], letters, tokenizer.pad_token_id, packed) for r in rows[:3]])
        assert (together - alone).abs().max() < 1e-4 and (single - alone[:3]).abs().max() < 1e-4, (packed, together, alone)


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_scoring_killed_with_batches_under_way(tmp_path, monkeypatch, packed):
    """What is on disk are whole batches in order; going on gives the file of an evaluation that ran through, to the last digit."""
    recipe = load_recipe("toy", {"per_device_eval_batch_size": "8"})
    tokenizer, model, questions = load_tokenizer(recipe), apply_fast_parts(load_model(recipe), recipe), load_pair(recipe)[1].questions[:37]
    whole = scores(tmp_path / "whole", model, tokenizer, questions, recipe, packed)
    assert set(whole) == {q.id for q in questions}
    began, ahead = [], evaluation.letters_ahead

    def killed(*args):
        began.append(args)
        if len(began) == 4:
            raise KeyboardInterrupt
        return ahead(*args)

    monkeypatch.setattr(evaluation, "letters_ahead", killed)
    with pytest.raises(KeyboardInterrupt):
        scores(tmp_path / "cut", model, tokenizer, questions, recipe, packed)
    batches = evaluation.scoring_batches(evaluation.encode_prompts(questions, tokenizer, recipe)[0], 8, packed)
    there = read_lines(tmp_path / "cut/predictions.jsonl")
    assert [p["id"] for p in there] == [questions[i].id for b in batches[:2] for i in b]  # the third was under way, the fourth was being begun
    monkeypatch.undo()
    file = tmp_path / "cut/predictions.jsonl"
    file.write_bytes(file.read_bytes()[:-30])  # and the write itself was torn
    assert scores(tmp_path / "cut", model, tokenizer, questions, recipe, packed) == whole
    assert file.read_bytes() == (tmp_path / "whole/predictions.jsonl").read_bytes()


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_scoring_in_two_processes_is_scoring_in_one(tmp_path, packed):
    recipe = load_recipe("toy", {"per_device_eval_batch_size": "8"})
    tokenizer, model, questions = load_tokenizer(recipe), apply_fast_parts(load_model(recipe), recipe), load_pair(recipe)[1].questions[:37]
    one = scores(tmp_path / "one", model, tokenizer, questions, recipe, packed)
    scores(tmp_path / "two", model, tokenizer, questions, recipe, packed, 1, 2)
    assert scores(tmp_path / "two", model, tokenizer, questions, recipe, packed, 0, 2) == one


@pytest.mark.parametrize("size", [1, 7, 288])
def test_batches_hold_every_question_once(size):
    generator = torch.Generator().manual_seed(size)
    rows = [[0] * int(n) for n in torch.randint(1, 226, (4183,), generator=generator)]
    for packed in (False, True):
        batches = evaluation.scoring_batches(rows, size, packed)
        assert sorted(i for b in batches for i in b) == list(range(len(rows))) and max(map(len, batches)) <= size
    tokens = [sum(len(rows[i]) for i in b) for b in batches]
    assert tokens[0] == max(tokens) and max(tokens) - min(tokens) <= 2 * 225
