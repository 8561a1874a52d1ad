"""Agreement with lm-evaluation-harness: the prompt byte for byte, the scores, and that a disagreement shows."""
import importlib.util
import json

import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from medmcqa_lora.evaluation import cross_check
from medmcqa_lora.evaluation.cross_check import TOLERANCE, check_questions, harness_scores, local_task, summarise_check, task_rows
from medmcqa_lora.data.schemas import LETTERS
from medmcqa_lora.data.questions import Question, load_questions
from medmcqa_lora.data.prompts import render_prompt, render_target
from medmcqa_lora.evaluation.records import collect
from medmcqa_lora.evaluation.letters import encode_prompts, letter_logprobs, score_questions
from medmcqa_lora.model.resolve import load_tokenizer
from medmcqa_lora.model.load import load_model
from medmcqa_lora.core.recipe import Recipe
from medmcqa_lora.core.recipe_files import load_recipe
from medmcqa_lora.fast.apply import apply_fast_parts

TEMPLATE = "Question: {question}\nChoices:\nA. {opa}\nB. {opb}\nC. {opc}\nD. {opd}\nAnswer:"  # lm_eval 0.4.13, tasks/medmcqa/utils_medmcqa.py
QUESTIONS = [Question(f"q{i}", q, o, i % 4, where=f"line {i + 1}") for i, (q, o) in enumerate([
    ("Which organ makes insulin?", ("Liver", "Pancreas", "Spleen", "Kidney")), ("Which is a bone?", ("femur", "heart", "aorta", "retina")),
    ("What is a normal pH?", ("7.4", "6.4", "8.4", "5.4")), ("Who found penicillin?", ("Fleming", "Koch", "Pasteur", "Lister"))])]


@pytest.fixture(scope="module")
def lm_eval():
    return pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed (extra lm_eval)")


def rows_of(questions):
    return [{"question": q.question, **{f"op{c.lower()}": o for c, o in zip(LETTERS, q.options)}, "cop": q.answer} for q in questions]


def test_the_prompt_is_the_stated_one(validation):
    questions = load_questions(str(validation)).questions
    rows = task_rows(str(validation), "", questions)
    assert len(rows) == 4183
    assert [render_prompt(q, "lm_eval") for q in questions] == [TEMPLATE.format(**r) for r in rows]
    assert [r["cop"] for r in rows] == [json.loads(line)["cop"] - 1 for line in validation.read_text().splitlines()]


def test_the_prompt_is_the_tasks(lm_eval, validation, tmp_path):
    questions = load_questions(str(validation)).questions
    task = local_task(task_rows(str(validation), "", questions), tmp_path)["tasks"]["medmcqa"]
    assert [task.doc_to_text(d) for d in task.eval_docs] == [render_prompt(q, "lm_eval") for q in questions]
    assert [task.doc_to_target(d) for d in task.eval_docs] == [q.answer for q in questions]
    ends = [task.config.target_delimiter + c for c in task.doc_to_choice(task.eval_docs[0])]
    assert ends == [render_target(Question("", "", ("",) * 4, i), "letter", "lm_eval") for i in range(4)] == [" A", " B", " C", " D"]
    assert {m["metric"] for m in task.config.metric_list} == {"acc", "acc_norm"}


def characters(bos: bool) -> PreTrainedTokenizerFast:
    """Every character a token, so that " A" is two."""
    vocab = {c: i for i, c in enumerate(["<pad>", "<s>", *map(chr, range(32, 127)), "\n"])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="<s>")


def small_model(context: int = 512) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(vocab_size=98, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=context, initializer_range=0.5)).eval()


def ours(model, tokenizer, folder, recipe):
    score_questions(model, tokenizer, QUESTIONS, recipe, folder, quiet=True)
    return collect(folder, QUESTIONS)


RECIPE = Recipe(prompt_style="lm_eval", per_device_eval_batch_size=3)


@pytest.mark.parametrize("bos", [False, True])
def test_a_letter_of_two_tokens(lm_eval, tmp_path, bos):
    """The space's probability is on the harness's side alone, and in no ratio."""
    model, tokenizer = small_model(), characters(bos)
    theirs, predictions = harness_scores(model, tokenizer, rows_of(QUESTIONS)), ours(model, tokenizer, tmp_path, RECIPE)
    assert all(len(t["tokens"][0]) == len(t["context"]) + 2 for t in theirs)
    assert abs(theirs[0]["logprobs"][0] - predictions[0]["logprobs"]["A"]) > TOLERANCE
    found = summarise_check(check_questions(model, tokenizer, QUESTIONS, RECIPE, predictions, theirs))
    assert found["largest"] < 1e-4 and found["same_tokens"] == found["classes"]["agrees"] == 4


def test_a_prompt_longer_than_the_context(lm_eval, tmp_path):
    model, tokenizer = small_model(context=40), characters(False)
    theirs, predictions = harness_scores(model, tokenizer, rows_of(QUESTIONS)), ours(model, tokenizer, tmp_path, RECIPE)
    found = summarise_check(check_questions(model, tokenizer, QUESTIONS, RECIPE, predictions, theirs))
    assert found["classes"].get("cut off") and not found["unexplained"]


def test_another_prompt_shows(tmp_path):
    """One line fewer in the prompt: what the tolerance is for."""
    recipe = load_recipe("toy", {"prompt_style": "lm_eval"})
    model, tokenizer = apply_fast_parts(load_model(recipe), recipe), load_tokenizer(recipe)
    rows, letters = encode_prompts(QUESTIONS, tokenizer, load_recipe("toy", {"prompt_style": "plain"}))
    scores = letter_logprobs(model, rows, letters, tokenizer.pad_token_id).tolist()
    theirs = [dict(prompt=render_prompt(q, "plain"), ends=[f" {c}" for c in LETTERS], tokens=[[*ids, i] for i in letters], context=ids, cut=False, logprobs=lp,
                   acc=float(lp.index(max(lp)) == q.answer), acc_norm=0.0) for q, ids, lp in zip(QUESTIONS, rows, scores)]
    found = check_questions(model, tokenizer, QUESTIONS, recipe, ours(model, tokenizer, tmp_path, recipe), theirs)
    assert {f["class"] for f in found} == {"prompt"}


def fake_harness(change):
    """A harness's side made from the model's own numbers."""
    def scores(model, tokenizer, rows):
        questions = [Question("", r["question"], tuple(r[f"op{c}"] for c in "abcd"), r["cop"]) for r in rows]
        ids, letters = encode_prompts(questions, tokenizer, load_recipe("toy", {"prompt_style": "lm_eval"}))
        found = []
        for q, row, lp in zip(questions, ids, letter_logprobs(model, ids, letters, tokenizer.pad_token_id).tolist()):
            side = dict(prompt=render_prompt(q, "lm_eval"), ends=[f" {c}" for c in LETTERS], tokens=[[*row, i] for i in letters], context=row, cut=False, logprobs=lp)
            found.append(change(side | dict(acc=float(lp.index(max(lp)) == q.answer), acc_norm=0.0)))
        return found
    return scores


@pytest.mark.parametrize(("change", "word"), [(lambda s: s, None), (lambda s: s | dict(logprobs=[s["logprobs"][0] + 0.02, *s["logprobs"][1:]]), "unexplained"),
                                              (lambda s: s | dict(acc=1 - s["acc"]), "metric")])
def test_exit_code(cli, monkeypatch, tmp_path, change, word):
    monkeypatch.setattr(cross_check, "find_harness", lambda: "made up")
    monkeypatch.setattr(cross_check, "harness_scores", fake_harness(change))
    code, out, err = cli("cross-check", "--recipe", "toy", "--limit", "6", "--out", tmp_path / "out")
    written = json.loads((tmp_path / "out/cross_check.json").read_text())
    assert code == (1 if word else 0), err
    assert written["n"] == 6 and "accuracy (n = 6)" in out and (tmp_path / "out/cross_check.md").is_file()
    assert written["classes"] == {word or "agrees": 6}
    if word:
        assert err.splitlines()[-1].startswith("medmcqa-lora: ") and "6 of 6 questions differ" in err


def test_the_harness_itself(lm_eval, cli, tmp_path):
    code, out, err = cli("cross-check", "--recipe", "toy", "--limit", "10", "--out", tmp_path / "out")
    assert code == 0, err
    written = json.loads((tmp_path / "out/cross_check.json").read_text())
    assert written["largest"] < 1e-4 and written["same_prompt"] == written["same_tokens"] == 10 and written["harness_acc"] == written["harness_acc_norm"] == written["accuracy"]
    code, _, err = cli("cross-check", "--recipe", "toy", "--limit", "10", "--out", tmp_path / "out")
    assert code == 1 and "holds another run" in err


def test_an_interrupted_one_goes_on(cli, monkeypatch, tmp_path):
    monkeypatch.setattr(cross_check, "find_harness", lambda: "made up")
    monkeypatch.setattr(cross_check, "HARNESS_CHUNK", 4)
    whole, calls = fake_harness(lambda s: s), []

    def stops(model, tokenizer, rows):
        calls.append(len(rows))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return whole(model, tokenizer, rows)

    monkeypatch.setattr(cross_check, "harness_scores", stops)
    words = ("cross-check", "--recipe", "toy", "--limit", "10", "--out", tmp_path / "out")
    assert cli(*words)[0] == 130 and not (tmp_path / "out/cross_check.json").exists()
    code, _, err = cli(*words, "--resume", "-p", "dtype", "bfloat16")
    assert code == 1 and "holds another evaluation (dtype was 'float32'" in err
    code, _, err = cli(*words, "--resume")
    assert code == 0, err
    assert calls == [4, 4, 4, 2] and json.loads((tmp_path / "out/cross_check.json").read_text())["classes"] == {"agrees": 10}


def test_a_number_that_is_none(lm_eval):
    model = small_model()
    torch.nn.init.constant_(model.lm_head.weight, float("nan"))
    with pytest.raises(ValueError, match="log-likelihoods .* are not finite"):
        harness_scores(model, characters(False), rows_of(QUESTIONS))


def test_bfloat16_is_called_rounding(lm_eval, cli, tmp_path):
    """Another shape of the last product rounds otherwise; float32 gives no such excuse."""
    code, _, err = cli("cross-check", "--recipe", "toy", "-p", "dtype", "bfloat16", "--out", tmp_path / "out")
    assert code == 0, err
    assert set(json.loads((tmp_path / "out/cross_check.json").read_text())["classes"]) <= {"agrees", "tie", "rounding"}


def test_without_the_harness(cli, monkeypatch, tmp_path):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == "lm_eval" else find(name, *more))
    code, _, err = cli("cross-check", "--recipe", "toy", "--out", tmp_path / "out")
    assert code == 1 and err.count("\n") == 1 and "pip install '.[lm_eval]'" in err and not (tmp_path / "out").exists()
