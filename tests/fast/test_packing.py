"""Nothing leaks: an example's logits, gradients and scores are its own, alone, padded or packed."""
import copy
import os
import subprocess
import sys
from dataclasses import replace
from unittest.mock import Mock, patch

import pytest
import torch
import torch.nn.functional as F
from conftest import ALL, ROOT
from helpers import isolation, make_recipe, trained
from transformers import NemotronHConfig, masking_utils

from medmcqa_lora.core.files import read_lines
from medmcqa_lora.core.recipe import Recipe
from medmcqa_lora.core.recipe_files import load_recipe
from medmcqa_lora.data.leakage import load_pair
from medmcqa_lora.data.tokens import encode_questions
from medmcqa_lora.evaluation import letters as evaluation
from medmcqa_lora.evaluation.generation import generate_texts, pad_left
from medmcqa_lora.evaluation.letters import letter_logprobs, pad_right, score_questions
from medmcqa_lora.evaluation.records import EvaluationOutput, read_records
from medmcqa_lora.fast import apply, packing
from medmcqa_lora.fast.apply import apply_fast_parts, check_kernels
from medmcqa_lora.fast.packing import (
    choose_packing,
    fill_row,
    is_isolated,
    isolate_examples,
    packing_collator,
    packing_errors,
    row_multiple,
    varlen_attention,
)
from medmcqa_lora.model.load import load_model
from medmcqa_lora.model.lora import attach_lora
from medmcqa_lora.model.resolve import load_tokenizer


def toy():
    """The toy model as a run has it, without LoRA."""
    recipe = load_recipe("toy")
    return apply_fast_parts(load_model(recipe), recipe)


def random_rows(*lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 1000, (n,), generator=generator).tolist() for n in lengths]


def as_examples(rows):
    return [{"input_ids": r, "labels": r} for r in rows]


def pack(rows):
    """Rows in one, as a model takes it."""
    batch = packing_collator()(as_examples(rows))
    batch.pop("labels")
    return batch


def largest(t):
    return t.abs().max().item()


@pytest.mark.parametrize("fast", ["auto", "off"])
def test_alone_padded_and_packed(tmp_path, fast):
    """One token, a chunk and its neighbours, several chunks; every LoRA group, every matrix."""
    recipe, config = make_recipe("", "float32", tmp_path)
    found = isolation(replace(recipe, fast=fast), config["chunk_size"], config["vocab_size"])
    differences = found["differences"]
    assert found["matrices"] > 20
    for way in ("padded", "packed"):
        assert differences[way]["logits"] < 1e-5, (way, differences)
        assert differences[way]["gradients"] < 1e-4, (way, differences)
        assert differences[f"scoring, {way}"]["letters"] < 1e-4, (way, differences)
    leaking = differences["leaking"]  # the measure sees a leak
    assert leaking["logits"] > 0.1 and leaking["gradients"] > 0.1, leaking


ACCUMULATED = {
    "gradient_accumulation_steps": "3", "gradient_checkpointing": "true",
    "target": "letter_and_text"}


@pytest.mark.parametrize(
    "settings", [{}, ACCUMULATED], ids=["letter", "accumulated, checkpointed, text"])
def test_packing_changes_no_loss(tmp_path, settings):
    padded, padded_eval, one = trained(tmp_path / "padded", False, **settings)
    packed, packed_eval, other = trained(tmp_path / "packed", True, **settings)
    losses, padded_losses = ([m["loss"] for m in lines] for lines in (packed, padded))
    assert losses == pytest.approx(padded_losses, rel=1e-4)
    # padding was never counted
    assert [m["tokens"] for m in packed] == [m["tokens"] for m in padded]
    expected = padded_eval[0]["eval_loss"]
    assert packed_eval[0]["eval_loss"] == pytest.approx(expected, rel=1e-4)
    assert max(largest(one[n] - other[n]) for n in one) < 1e-3  # Adam divides by small numbers
    assert losses[-1] < losses[0]


def test_a_rows_length_and_its_filling():
    """Types and keys stay; a row that is long enough gets an example of no tokens."""
    assert [row_multiple(torch.device(d)) for d in ("cuda", "cpu")] == [256, 1]
    batch = packing_collator()(as_examples([[5, 6, 7], [8, 9]]))
    filled = fill_row(batch, 8, pad=1)
    lengths = ("max_length_q", "max_length_k")
    types = [{k: v.dtype for k, v in b.items() if k not in lengths} for b in (filled, batch)]
    assert types[0] == types[1]
    full = fill_row({k: v for k, v in filled.items() if k != "labels"}, 8, pad=1)
    assert torch.equal(full["input_ids"], filled["input_ids"]) and "labels" not in full
    assert full["cu_seq_lens_k"].tolist() == [0, 3, 5, 8, 8]


# Stand-ins for torch's variable-length attention, one for each signature that it has had.


def by_hand(q, k, v, borders, shared):
    """Causal attention within each example; shared: fewer heads of keys than of queries."""
    def attend(a, b):
        qkv = [t[a:b].transpose(0, 1)[None] for t in (q, k, v)]
        y = F.scaled_dot_product_attention(*qkv, is_causal=True, enable_gqa=shared)
        return y[0].transpose(0, 1)

    ends = borders.tolist()
    return torch.cat([attend(a, b) for a, b in zip(ends, ends[1:])])


def with_window(q, k, v, ends, *rest, scale=None, window_size=(-1, -1), enable_gqa=False):
    assert (window_size, enable_gqa, *rest[1:]) == ((-1, 0), True, 4, 4)
    return by_hand(q, k, v, ends, True)


def with_equal_heads(q, k, v, ends, *rest, is_causal=False, scale=None):
    if k.shape != q.shape:
        raise RuntimeError("as many heads of keys as of queries, please")
    return by_hand(q, k, v, ends, False)


def with_shared_keys(q, k, v, ends, *rest, is_causal=False, scale=None):
    assert k.shape != q.shape or len(q) == 4  # repeated by the small row alone
    return by_hand(q, k, v, ends, True)


@pytest.mark.parametrize("signature", [with_window, with_equal_heads, with_shared_keys])
def test_variable_length_attention_of_several_versions(signature):
    torch.manual_seed(0)
    q = torch.randn(1, 4, 6, 8)
    k, v = torch.randn(2, 1, 2, 6, 8)
    mask = torch.block_diag(torch.ones(2, 2), torch.ones(4, 4)).bool().tril()
    wanted = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
    borders = torch.tensor([0, 2, 6], dtype=torch.int32)
    with patch("torch.nn.attention.varlen.varlen_attn", signature):
        found, _ = varlen_attention(None, q, k, v, None, cu_seq_lens_q=borders, max_length_q=4)
    torch.testing.assert_close(found, wanted.transpose(1, 2))


@pytest.mark.parametrize("multiple, examples", [(64, 4), (58, 4)], ids=["padding", "no tokens"])
def test_a_filled_row_by_mask_and_by_variable_length_attention(monkeypatch, multiple, examples):
    """Its last example is padding, or has no tokens."""
    model, rows = isolate_examples(load_model(load_recipe("toy"))), random_rows(40, 1, 17)
    batch, counts = fill_row(pack(rows), multiple, pad=0), []

    def attend(q, k, v, ends, *rest, scale=None, window_size=(-1, -1), enable_gqa=False):
        counts.append(len(ends) - 1)
        return by_hand(q, k, v, ends, True)

    with torch.no_grad(), patch("torch.nn.attention.varlen.varlen_attn", attend):
        wanted = model(**pack(rows), use_cache=False).logits[0]
        by_mask = model(**batch, use_cache=False).logits[0, :58]
        assert counts == []
        monkeypatch.setattr(packing, "can_use_varlen", lambda *args: True)
        by_borders = model(**batch, use_cache=False).logits[0, :58]
    assert counts == [examples]
    assert largest(by_mask - wanted) < 1e-4 and largest(by_borders - wanted) < 1e-4


def test_variable_length_attention_asks_the_gpu_nothing():
    """transformers makes no mask for it, and doesn't look at the positions on the GPU."""
    isolate_examples(load_model(load_recipe("toy")))  # registers it
    config, x = NemotronHConfig(), torch.zeros(1, 5, 8)
    positions = torch.tensor([[0, 1, 0, 1, 2]])

    def make_mask(attention):
        config._attn_implementation = attention
        return masking_utils.create_causal_mask(
            config, x, attention_mask=None, past_key_values=None, position_ids=positions)

    asked = Mock(side_effect=ValueError("the GPU was asked"))
    with patch.object(masking_utils, "find_packed_sequence_indices", asked):
        assert make_mask("varlen") is None
        with pytest.raises(ValueError, match="was asked"):
            make_mask("sdpa")


def test_what_a_packed_row_has_to_say():
    """Positions alone are enough; borders alone are not, nor is a row in a pass with a cache."""
    model, batch = isolate_examples(load_model(load_recipe("toy"))), pack(random_rows(40, 1, 17))
    positions = {k: batch[k] for k in ("input_ids", "position_ids")}
    borders = {k: batch[k] for k in ("input_ids", "cu_seq_lens_q")}
    with torch.no_grad():
        wanted = model(**batch, use_cache=False).logits
        assert torch.equal(model(**positions, use_cache=False).logits, wanted)
    with pytest.raises(ValueError, match="packed rows in a pass with a cache"):
        model(**positions)  # use_cache is on unless said otherwise
    with pytest.raises(ValueError, match="packed rows without position_ids"):
        model(**borders, use_cache=False)


def test_each_other_way_of_padding_is_refused():
    recipe = load_recipe("toy")
    model, tokenizer = toy(), load_tokenizer(recipe)
    rows = [[5, 6, 7, 8], [9, 10]]
    (left, left_mask), (right, right_mask) = pad_left(rows, 0), pad_right(rows, 0)
    with pytest.raises(ValueError, match="left of 1 of 2 rows in a pass without a cache"):
        model(left, attention_mask=left_mask, use_cache=False)
    with pytest.raises(ValueError, match="right of 1 of 2 rows in a pass with a cache"):
        model.generate(input_ids=right, attention_mask=right_mask, max_new_tokens=2)
    # the check stays under an adapter, where PEFT calls forward directly
    tuned = apply_fast_parts(attach_lora(model, recipe), recipe)
    with pytest.raises(ValueError, match="pad on the right"):
        tuned.train()(left, attention_mask=left_mask, use_cache=False)
    with pytest.raises(ValueError, match="model.eval"):
        generate_texts(tuned, rows, tokenizer, 2)
    assert len(generate_texts(tuned.eval(), rows, tokenizer, 2)) == 2


def test_generation_is_the_same_alone_and_padded():
    model, tokenizer = toy(), load_tokenizer(load_recipe("toy"))
    rows = random_rows(40, 3, 17)
    alone = [generate_texts(model, [r], tokenizer, 8)[0] for r in rows]
    assert generate_texts(model, rows, tokenizer, 8) == alone


@pytest.mark.parametrize("seed", range(20 if ALL else 2))
def test_random_lengths(seed):
    """Any order of any lengths, in rows of one and of several examples."""
    model = toy().train()
    generator = torch.Generator().manual_seed(seed)
    count = int(torch.randint(1, 9, (1,), generator=generator))
    lengths = torch.randint(1, 60, (count,), generator=generator).tolist()
    rows = [torch.randint(3, 1000, (n,), generator=generator).tolist() for n in lengths]
    with torch.no_grad():
        packed = model(**pack(rows), use_cache=False).logits[0].split(lengths)
        for y, row in zip(packed, rows):
            alone = model(torch.tensor([row]), use_cache=False).logits[0]
            assert largest(y - alone) < 1e-5 * largest(alone)


def test_a_real_model_keeps_examples_apart(smollm2):
    recipe = load_recipe("demo")
    questions = load_pair(recipe)[0].questions[:2]
    rows = encode_questions(questions, load_tokenizer(recipe), recipe).rows
    model = apply_fast_parts(load_model(recipe), recipe)
    errors = packing_errors(model, [rows[i]["input_ids"] for i in (0, 1)])
    assert is_isolated(errors, half=False), errors
    assert errors["neighbour"] < 1e-6 and errors["packed"] < 1e-4, errors


def test_a_model_that_can_not_isolate_is_not_packed(monkeypatch):
    """transformers' own Mamba block on this path: auto pads, on is refused before a step."""
    monkeypatch.setattr(apply, "isolate_examples", lambda model, fast: model)
    recipe, model = load_recipe("toy"), toy()
    questions = load_pair(recipe)[0].questions[:2]
    rows = encode_questions(questions, load_tokenizer(recipe), recipe).rows
    assert choose_packing(model, rows, recipe)[0] is False
    with pytest.raises(ValueError, match="packing = on is refused"):
        choose_packing(model, rows, replace(recipe, packing="on"))
    off = choose_packing(model, rows, replace(recipe, packing="off"))
    assert off == (False, "off in the recipe")


def test_packing_in_half_precision_for_scoring_and_with_blocks_elsewhere():
    """A mask over a long row costs more than padding, so on a CPU auto doesn't pack to score."""
    model, rows = isolate_examples(load_model(load_recipe("toy"))), as_examples(random_rows(40, 17))
    assert choose_packing(copy.deepcopy(model).bfloat16(), rows, Recipe())[0]
    recipes = [Recipe(packing=p) for p in ("auto", "on")]
    scoring = [choose_packing(model, rows, r, training=False) for r in recipes]
    assert [packed for packed, _ in scoring] == [False, True]
    model.model.layers[2].to("meta")  # in place of a block in another memory: it can't be asked
    assert choose_packing(model, rows, Recipe())[0]


def test_required_kernels_are_there_for_a_freshly_loaded_base(monkeypatch):
    """On a GPU without mamba_ssm the package's own scan is enough, since `load_model` freezes the
    base; it is not for a model that trains completely, nor for long examples."""
    pytest.importorskip("triton")
    recipe = load_recipe("toy", {"fast": "require"})
    model, tuned = load_model(recipe), attach_lora(load_model(recipe), recipe)
    assert not any(p.requires_grad for p in model.parameters())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *args: (9, 0))
    monkeypatch.setattr(apply, "missing_kernels", lambda: ("mamba_ssm", "causal_conv1d"))
    check_kernels("nemotron_h", recipe)  # before it is loaded
    check_kernels("nemotron_h", recipe, model)
    check_kernels("nemotron_h", recipe, tuned)  # whose factors are trained
    with pytest.raises(ValueError, match="mamba_ssm and causal_conv1d missing"):
        check_kernels("nemotron_h", replace(recipe, max_length=2048), model)
    model.requires_grad_()
    with pytest.raises(ValueError, match="mamba_ssm and causal_conv1d missing"):
        check_kernels("nemotron_h", recipe, model)


TRITON_ONLY = """
import sys
from medmcqa_lora.core.recipe_files import load_recipe
from medmcqa_lora.launch.preflight import check_recipe_here
check_recipe_here(load_recipe("toy"))
from transformers.models.nemotron_h import modeling_nemotron_h as code
from medmcqa_lora.core.environment import is_kernel
names = ("mamba2_split_conv1d_scan_combined", "mamba2_chunk_scan", "causal_conv1d_fn")
print([is_kernel(getattr(code, n)) for n in names])
"""
SSD_COMBINED = """
def mamba_split_conv1d_scan_combined(zxbcdt): pass
def mamba_chunk_scan_combined(x): pass
"""


def test_a_triton_only_mamba_ssm_is_found_by_a_launch(tmp_path):
    """Its import fails on a CUDA extension; the launch's own look at the model's structure must not
    settle for PyTorch."""
    package = tmp_path / "mamba_ssm"
    (package / "ops/triton").mkdir(parents=True)
    (package / "__init__.py").write_text("import a_cuda_extension_that_was_not_built\n")
    (package / "ops/triton/ssd_combined.py").write_text(SSD_COMBINED)
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    command = [sys.executable, "-W", "ignore", "-c", TRITON_ONLY]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.stdout.strip().endswith("[True, True, False]"), done.stderr[-500:]


def scores(folder, model, tokenizer, questions, recipe, packed, place=(0, 1)):
    """Log-probabilities by question, in the order of the file; place: rank and world size."""
    folder.mkdir(exist_ok=True)
    output = EvaluationOutput(folder, *place, quiet=True)
    score_questions(model, tokenizer, questions, recipe, output, packed=packed)
    return {k: list(p["logprobs"].values()) for k, p in read_records(folder).items()}


@pytest.mark.parametrize("multiple", [1, 256], ids=["as on a CPU", "filled as on a GPU"])
@pytest.mark.parametrize("name", ["toy", "demo"])
def test_scores_are_the_same_packed_padded_and_alone(name, multiple, smollm2, monkeypatch):
    """A prompt of one token and prompts of real lengths, in batches of several and of one."""
    monkeypatch.setattr(evaluation, "row_multiple", lambda device: multiple)
    recipe = load_recipe(name)
    tokenizer, model = load_tokenizer(recipe), apply_fast_parts(load_model(recipe), recipe)
    questions = load_pair(recipe)[1].questions[: 12 if name == "toy" else 4]
    rows, letters = evaluation.encode_prompts(questions, tokenizer, recipe)
    rows.insert(1, rows[0][:1])

    def last_logprobs(row):
        last = model(torch.tensor([row]), use_cache=False).logits[:, -1].detach()
        return last.log_softmax(-1)[:, list(letters)]

    def found(rows, packed):
        return letter_logprobs(model, rows, letters, tokenizer.pad_token_id, packed)

    alone = torch.cat([last_logprobs(row) for row in rows])
    for packed in (False, True):
        together = found(rows, packed)
        single = torch.cat([found([row], packed) for row in rows[:3]])
        assert largest(together - alone) < 1e-4, (packed, together, alone)
        assert largest(single - alone[:3]) < 1e-4, (packed, single, alone)


def toy_scoring():
    """A recipe, a model, a tokenizer and 37 questions."""
    recipe = load_recipe("toy", {"per_device_eval_batch_size": "8"})
    questions = load_pair(recipe)[1].questions[:37]
    model = apply_fast_parts(load_model(recipe), recipe)
    return recipe, model, load_tokenizer(recipe), questions


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_scoring_killed_with_batches_under_way(tmp_path, monkeypatch, packed):
    """On disk are complete batches in order; resumed, it gives the file of an evaluation that ran
    through, to the last digit."""
    recipe, model, tokenizer, questions = toy_scoring()

    def score(name):
        return scores(tmp_path / name, model, tokenizer, questions, recipe, packed)

    complete = score("complete")
    assert set(complete) == {q.id for q in questions}
    began, ahead = [], evaluation.begin_letter_logprobs

    def killed(*args):
        began.append(args)
        if len(began) == 4:
            raise KeyboardInterrupt
        return ahead(*args)

    monkeypatch.setattr(evaluation, "begin_letter_logprobs", killed)
    with pytest.raises(KeyboardInterrupt):
        score("cut")
    rows, _ = evaluation.encode_prompts(questions, tokenizer, recipe)
    batches = evaluation.scoring_batches(rows, 8, packed)
    file = tmp_path / "cut/predictions.jsonl"
    # the third was under way, the fourth was being begun
    expected = [questions[i].id for batch in batches[:2] for i in batch]
    assert [p["id"] for p in read_lines(file)] == expected
    monkeypatch.undo()
    file.write_bytes(file.read_bytes()[:-30])  # and the write itself was torn
    assert score("cut") == complete
    assert file.read_bytes() == (tmp_path / "complete/predictions.jsonl").read_bytes()


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_scoring_in_two_processes_is_scoring_in_one(tmp_path, packed):
    recipe, model, tokenizer, questions = toy_scoring()

    def score(name, place=(0, 1)):
        return scores(tmp_path / name, model, tokenizer, questions, recipe, packed, place)

    one = score("one")
    score("two", (1, 2))
    assert score("two", (0, 2)) == one


@pytest.mark.parametrize("size", [1, 7, 288])
def test_batches_hold_every_question_once(size):
    generator = torch.Generator().manual_seed(size)
    rows = [[0] * int(n) for n in torch.randint(1, 226, (4183,), generator=generator)]
    for packed in (False, True):
        batches = evaluation.scoring_batches(rows, size, packed)
        assert sorted(i for batch in batches for i in batch) == list(range(len(rows)))
        assert max(map(len, batches)) <= size
    tokens = [sum(len(rows[i]) for i in batch) for batch in batches]
    assert tokens[0] == max(tokens) and max(tokens) - min(tokens) <= 2 * 225
