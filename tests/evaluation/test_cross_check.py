"""Agreement with lm-evaluation-harness: the prompt, the scores, and that a disagreement shows."""
import importlib.util
import json

import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from medmcqa_lora.core.recipe import Recipe
from medmcqa_lora.core.recipe_files import load_recipe
from medmcqa_lora.data.prompts import render_prompt, render_target
from medmcqa_lora.data.questions import Question, load_questions
from medmcqa_lora.data.schemas import FIELDS, LETTERS
from medmcqa_lora.evaluation import cross_check
from medmcqa_lora.evaluation.cross_check import (
    TOLERANCE,
    check_questions,
    classify_difference,
    harness_scores,
    local_task,
    summarise_check,
    task_rows,
)
from medmcqa_lora.evaluation.letters import encode_prompts, letter_logprobs, score_questions
from medmcqa_lora.evaluation.records import EvaluationOutput, best_letter, collect
from medmcqa_lora.fast.apply import apply_fast_parts
from medmcqa_lora.model.load import load_model
from medmcqa_lora.model.resolve import load_tokenizer

# lm_eval 0.4.13, tasks/medmcqa/utils_medmcqa.py
TEMPLATE = "Question: {question}\nChoices:\nA. {opa}\nB. {opb}\nC. {opc}\nD. {opd}\nAnswer:"
TARGETS = [" A", " B", " C", " D"]
TEXTS = (
    ("Which organ makes insulin?", ("Liver", "Pancreas", "Spleen", "Kidney")),
    ("Which is a bone?", ("femur", "heart", "aorta", "retina")),
    ("What is a normal pH?", ("7.4", "6.4", "8.4", "5.4")),
    ("Who found penicillin?", ("Fleming", "Koch", "Pasteur", "Lister")),
)
QUESTIONS = [Question(f"q{i}", stem, options, i % 4, where=f"line {i + 1}")
             for i, (stem, options) in enumerate(TEXTS)]
RECIPE = Recipe(prompt_style="lm_eval", per_device_eval_batch_size=3)


@pytest.fixture(scope="module")
def lm_eval():
    reason = "lm-evaluation-harness is not installed (extra lm_eval)"
    return pytest.importorskip("lm_eval", reason=reason)


def rows_of(questions):
    return [dict(zip(FIELDS, (q.question, *q.options))) | dict(cop=q.answer) for q in questions]


def test_the_prompt_is_the_stated_one(validation):
    questions = load_questions(str(validation)).questions
    rows = task_rows(str(validation), "", questions)
    assert len(rows) == 4183
    assert [render_prompt(q, "lm_eval") for q in questions] == [TEMPLATE.format(**r) for r in rows]
    answers = [json.loads(line)["cop"] - 1 for line in validation.read_text().splitlines()]
    assert [r["cop"] for r in rows] == answers


def test_the_prompt_is_the_tasks(lm_eval, validation, tmp_path):
    questions = load_questions(str(validation)).questions
    task = local_task(task_rows(str(validation), "", questions), tmp_path)["tasks"]["medmcqa"]
    prompts = [render_prompt(q, "lm_eval") for q in questions]
    assert [task.doc_to_text(d) for d in task.eval_docs] == prompts
    assert [task.doc_to_target(d) for d in task.eval_docs] == [q.answer for q in questions]
    choices = task.doc_to_choice(task.eval_docs[0])
    blank = [Question("", "", ("",) * 4, i) for i in range(4)]
    assert [task.config.target_delimiter + c for c in choices] == TARGETS
    assert [render_target(q, "letter", "lm_eval") for q in blank] == TARGETS
    assert {m["metric"] for m in task.config.metric_list} == {"acc", "acc_norm"}


def test_numbers_and_missing_texts_become_strings(tmp_path):
    """The first row lacks an option and is no question."""
    file = tmp_path / "q.jsonl"
    rows = [dict(question="Why? ", opa=1, opb="b", opc=None, opd="d", cop=4),
            dict(question="Who?", opa=1, opb="b", opc="c", opd="d", cop=4)]
    file.write_text("\n".join(map(json.dumps, rows)))
    questions = load_questions(str(file)).questions
    expected = dict(question="Who?", opa="1", opb="b", opc="c", opd="d", cop=3)
    assert task_rows(str(file), "", questions) == [expected]


def character_tokenizer(bos: bool) -> PreTrainedTokenizerFast:
    """Every character a token, so that " A" is two."""
    tokens = ["<pad>", "<s>", *map(chr, range(32, 127)), "\n"]
    vocab = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    if bos:
        template = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
        tokenizer.post_processor = template
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="<s>")


def small_model(context: int = 512) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=98, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=context, initializer_range=0.5)
    return LlamaForCausalLM(config).eval()


def our_predictions(model, tokenizer, folder, recipe):
    output = EvaluationOutput(folder, quiet=True)
    score_questions(model, tokenizer, QUESTIONS, recipe, output)
    return collect(folder, QUESTIONS)


@pytest.mark.parametrize("bos", [False, True])
def test_a_letter_of_two_tokens(lm_eval, tmp_path, bos):
    """The space's probability is on the harness's side alone, and in no ratio."""
    model, tokenizer = small_model(), character_tokenizer(bos)
    theirs = harness_scores(model, tokenizer, rows_of(QUESTIONS))
    predictions = our_predictions(model, tokenizer, tmp_path, RECIPE)
    assert all(len(t["tokens"][0]) == len(t["context"]) + 2 for t in theirs)
    assert abs(theirs[0]["logprobs"][0] - predictions[0]["logprobs"]["A"]) > TOLERANCE
    found = check_questions(model, tokenizer, QUESTIONS, RECIPE, predictions, theirs)
    summary = summarise_check(found)
    assert summary["largest"] < 1e-4
    assert summary["same_tokens"] == summary["classes"]["agrees"] == 4


def test_a_prompt_longer_than_the_context(lm_eval, tmp_path):
    model, tokenizer = small_model(context=40), character_tokenizer(False)
    theirs = harness_scores(model, tokenizer, rows_of(QUESTIONS))
    predictions = our_predictions(model, tokenizer, tmp_path, RECIPE)
    found = check_questions(model, tokenizer, QUESTIONS, RECIPE, predictions, theirs)
    summary = summarise_check(found)
    assert summary["classes"].get("cut off") and not summary["unexplained"]


def harness_side(question, ids, letters, logprobs, style="lm_eval"):
    """The harness's record of a question, made from the model's own numbers."""
    correct = logprobs.index(max(logprobs)) == question.answer
    return dict(
        prompt=render_prompt(question, style), ends=TARGETS, context=ids, cut=False,
        tokens=[[*ids, letter] for letter in letters], logprobs=logprobs,
        acc=float(correct), acc_norm=0.0)


def toy_model_and_tokenizer(recipe):
    return apply_fast_parts(load_model(recipe), recipe), load_tokenizer(recipe)


def toy_recipe(style="lm_eval"):
    return load_recipe("toy", {"prompt_style": style})


def own_scores(model, tokenizer, questions, recipe):
    rows, letters = encode_prompts(questions, tokenizer, recipe)
    scores = letter_logprobs(model, rows, letters, tokenizer.pad_token_id).tolist()
    return rows, letters, scores


def test_another_prompt_shows(tmp_path):
    """One line fewer in the prompt: what the tolerance is for."""
    recipe = toy_recipe()
    model, tokenizer = toy_model_and_tokenizer(recipe)
    rows, letters, scores = own_scores(model, tokenizer, QUESTIONS, toy_recipe("plain"))
    theirs = [harness_side(q, ids, letters, logprobs, "plain")
              for q, ids, logprobs in zip(QUESTIONS, rows, scores)]
    predictions = our_predictions(model, tokenizer, tmp_path, recipe)
    found = check_questions(model, tokenizer, QUESTIONS, recipe, predictions, theirs)
    assert {f["class"] for f in found} == {"prompt"}


def test_a_near_tie_and_a_missing_question(tmp_path):
    """Two answers within 0.01 of each other on both sides, in another order."""
    recipe = toy_recipe()
    model, tokenizer = toy_model_and_tokenizer(recipe)
    predictions = our_predictions(model, tokenizer, tmp_path, recipe)
    rows, letters = encode_prompts(QUESTIONS, tokenizer, recipe)
    theirs = [harness_side(q, ids, letters, list(p["logprobs"].values()))
              for q, ids, p in zip(QUESTIONS, rows, predictions)]

    scores = theirs[0]["logprobs"]
    best, second = sorted(range(4), key=lambda i: -scores[i])[:2]
    ours = dict(zip(LETTERS, scores)) | {LETTERS[second]: scores[best] - 0.001}
    predictions[0] |= dict(logprobs=ours)
    turned = [ours[c] + 0.002 * (i == second) for i, c in enumerate(LETTERS)]
    theirs[0] |= dict(logprobs=turned, acc=float(second == QUESTIONS[0].answer))
    found = check_questions(model, tokenizer, QUESTIONS, recipe, predictions, theirs)
    summary = summarise_check(found)
    assert [f["class"] for f in summary["other_answer"]] == ["tie"]
    assert summary["above"] == summary["unexplained"] == 0

    with pytest.raises(ValueError):
        check_questions(model, tokenizer, QUESTIONS, recipe, predictions, theirs[:2])


MADE = dict(
    prompt="P", ends=TARGETS, tokens=[[5, i] for i in (1, 2, 3, 4)], context=[5], cut=False,
    logprobs=[-1.0, -2.0, -3.0, -4.0], acc=1.0, acc_norm=1.0)


@pytest.mark.parametrize(("ours", "changed", "expected"), [
    ([-1.0, -2.0, -3.0, -4.0], {}, "agrees"),
    ([-1.0, -2.0, -3.0, -4.0], dict(acc=0.0), "metric"),
    ([-1.0, -2.5, -3.0, -4.0], dict(ends=["A", "B", "C", "D"]), "prompt"),
    ([-1.0, -2.5, -3.0, -4.0], {}, "unexplained"),
])
def test_classes_of_made_results(ours, changed, expected):
    best = best_letter(ours)
    p = dict(prediction=best, correct=best == "A", logprobs=dict(zip(LETTERS, ours)))
    found = classify_difference(p, "P", [5], (1, 2, 3, 4), MADE | changed, lambda: 0.0)
    assert found == expected


def fake_harness(change):
    """A harness's side made from the model's own numbers."""
    def scores(model, tokenizer, rows):
        questions = [Question("", r["question"], tuple(r[f"op{c}"] for c in "abcd"), r["cop"])
                     for r in rows]
        encoded, letters, found = own_scores(model, tokenizer, questions, toy_recipe())
        return [change(harness_side(q, ids, letters, logprobs))
                for q, ids, logprobs in zip(questions, encoded, found)]
    return scores


def unchanged(side): return side


def another_first_score(side):
    first, *others = side["logprobs"]
    return side | dict(logprobs=[first + 0.02, *others])


def another_verdict(side): return side | dict(acc=1 - side["acc"])


@pytest.mark.parametrize(("change", "word"), [
    (unchanged, None), (another_first_score, "unexplained"), (another_verdict, "metric")])
def test_exit_code(cli, monkeypatch, tmp_path, change, word):
    monkeypatch.setattr(cross_check, "find_harness", lambda: "made up")
    monkeypatch.setattr(cross_check, "harness_scores", fake_harness(change))
    out = tmp_path / "out"
    code, text, err = cli("cross-check", "--recipe", "toy", "--limit", "6", "--out", out)
    written = json.loads((out / "cross_check.json").read_text())
    assert code == (1 if word else 0), err
    assert written["n"] == 6 and "accuracy (n = 6)" in text
    assert (out / "cross_check.md").is_file()
    assert written["classes"] == {word or "agrees": 6}
    if word:
        assert err.splitlines()[-1].startswith("medmcqa-lora: ")
        assert "6 of 6 questions differ" in err


def test_the_harness_itself(lm_eval, cli, tmp_path):
    words = ("cross-check", "--recipe", "toy", "--limit", "10", "--out", tmp_path / "out")
    code, _, err = cli(*words)
    assert code == 0, err
    written = json.loads((tmp_path / "out/cross_check.json").read_text())
    assert written["largest"] < 1e-4
    assert written["same_prompt"] == written["same_tokens"] == 10
    assert written["harness_acc"] == written["harness_acc_norm"] == written["accuracy"]
    code, _, err = cli(*words)
    assert code == 1 and "holds another run" in err


def test_an_interrupted_one_resumes(cli, monkeypatch, tmp_path):
    monkeypatch.setattr(cross_check, "find_harness", lambda: "made up")
    monkeypatch.setattr(cross_check, "HARNESS_CHUNK", 4)
    complete, calls = fake_harness(unchanged), []

    def interrupted(model, tokenizer, rows):
        calls.append(len(rows))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return complete(model, tokenizer, rows)

    monkeypatch.setattr(cross_check, "harness_scores", interrupted)
    file = tmp_path / "out/cross_check.json"
    words = ("cross-check", "--recipe", "toy", "--limit", "10", "--out", tmp_path / "out")
    assert cli(*words)[0] == 130 and not file.exists()
    code, _, err = cli(*words, "--resume", "-p", "dtype", "bfloat16")
    assert code == 1 and "holds another evaluation (dtype was 'float32'" in err
    code, _, err = cli(*words, "--resume")
    assert code == 0, err
    assert calls == [4, 4, 4, 2]
    assert json.loads(file.read_text())["classes"] == {"agrees": 10}


def test_a_log_likelihood_that_is_not_finite(lm_eval):
    model = small_model()
    torch.nn.init.constant_(model.lm_head.weight, float("nan"))
    with pytest.raises(ValueError, match="log-likelihoods .* are not finite"):
        harness_scores(model, character_tokenizer(False), rows_of(QUESTIONS))


def test_bfloat16_is_called_rounding(lm_eval, cli, tmp_path):
    """Another shape of the last product rounds otherwise; float32 gives no such excuse."""
    out = tmp_path / "out"
    code, _, err = cli("cross-check", "--recipe", "toy", "-p", "dtype", "bfloat16", "--out", out)
    assert code == 0, err
    classes = json.loads((out / "cross_check.json").read_text())["classes"]
    assert set(classes) <= {"agrees", "tie", "rounding"}


def test_without_the_harness(cli, monkeypatch, tmp_path):
    find = importlib.util.find_spec

    def find_others(name, *more):
        return None if name == "lm_eval" else find(name, *more)

    monkeypatch.setattr(importlib.util, "find_spec", find_others)
    code, _, err = cli("cross-check", "--recipe", "toy", "--out", tmp_path / "out")
    assert code == 1 and err.count("\n") == 1 and "pip install '.[lm_eval]'" in err
    assert not (tmp_path / "out").exists()
