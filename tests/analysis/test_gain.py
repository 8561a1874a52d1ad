"""The split of a gain, the report and the leaderboard: what one notebook can't show, on made-up and on real questions."""
import csv
import json

import numpy as np
import pytest
from conftest import ROOT
from helpers import check_one_line

from medmcqa_lora.data.questions import Question, load_questions
from medmcqa_lora.evaluation.records import prediction
from medmcqa_lora.evaluation.summary import write_evaluation
from medmcqa_lora.core.files import append_lines, read_lines
from medmcqa_lora.analysis.gain import AS_IT_IS, NO_PRIOR, read_answers, split_gain
from medmcqa_lora.analysis.gain_report import write_gain
from medmcqa_lora.analysis.published import published, write_report
from medmcqa_lora.analysis.leaderboard import leaderboard

QUESTIONS = [Question(f"q{i}", f"Question {i}?", ("w", "x", "y", "z"), i % 4, ("Anatomy", "ENT")[i % 2]) for i in range(200)]


def evaluation(folder, knows, likes_a=0.0, questions=QUESTIONS, adapter=None, model="made-up", seed=0):
    """A model that knows the answers so well, and likes the letter A so much."""
    logits = np.random.default_rng(seed).normal(size=(len(questions), 4)) + knows * np.eye(4)[[q.answer for q in questions]] + likes_a * np.eye(4)[0]
    records = [prediction(q, lp) for q, lp in zip(questions, (logits - np.log(np.exp(logits).sum(1, keepdims=True))).tolist())]
    folder.mkdir(parents=True)
    append_lines(folder / "predictions.jsonl", records)
    write_evaluation(folder, records, questions, model, adapter)
    return folder


@pytest.fixture
def pair(tmp_path):
    return evaluation(tmp_path / "base", 1, likes_a=9), evaluation(tmp_path / "tuned", 2, adapter="gone/adapter")


def test_compare_writes_the_split(pair, cli, tmp_path):
    code, out, err = cli("compare", *pair, "--out", tmp_path / "out")
    assert code == 0, err
    told = json.loads((tmp_path / "out/comparison.json").read_text())
    assert {"n", "base", "tuned", "gained", "lost", "p_value", "difference_ci95", "majority_baseline", "letter_mass", "difference", "verdict"} <= told.keys()
    gain = told["gain"]
    assert gain["total"] == pytest.approx(gain["format"] + gain["rest"], abs=2e-6) and gain["total"] == pytest.approx(told["difference"], abs=2e-6)
    assert gain["best"] == NO_PRIOR and gain["verdict"].startswith("Both: ") and gain["verdict"] in out and told["verdict"] in out
    assert (tmp_path / "out/comparison.md").read_text() in out
    rows = list(csv.DictReader(open(tmp_path / "out/by_subject.csv")))
    assert sum(int(r["n"]) for r in rows) == 200 and all(float(r["p_holm"]) >= float(r["p_value"]) for r in rows)
    assert [r["subject"] for r in rows] == [r["subject"] for r in told["by_subject"]]


def test_the_same_numbers_every_time(pair):
    assert split_gain(read_answers(*pair)) == split_gain(read_answers(*pair))


def test_the_order_of_lines_does_not_matter(pair):
    lines = read_lines(pair[1] / "predictions.jsonl")
    before = split_gain(read_answers(*pair))
    (pair[1] / "predictions.jsonl").write_text("".join(json.dumps(x) + "\n" for x in reversed(lines)))
    assert split_gain(read_answers(*pair)) == before


def test_a_model_beside_itself(pair):
    s = split_gain(read_answers(pair[0], pair[0]))
    assert (s.total, s.total_ci95, s.total_p) == (0.0, [0.0, 0.0], 1.0) and s.rest < 0 < s.format


def test_references(pair, cli, tmp_path):
    good, other_questions = evaluation(tmp_path / "few-shot", 1.5), evaluation(tmp_path / "other", 1, questions=QUESTIONS[:100])
    code, out, err = cli("compare", *pair, "--format-reference", good, "--format-reference", evaluation(tmp_path / "worse", 0))
    assert code == 0 and "(few-shot)" in out and "| worse |" in out, err
    check_one_line(cli("compare", *pair, "--format-reference", pair[1], "--out", tmp_path / "out"), "--format-reference", "its adapter is")
    check_one_line(cli("compare", *pair, "--format-reference", other_questions, "--out", tmp_path / "out"), "--format-reference", "its questions are not the base's")
    check_one_line(cli("compare", *pair, "--format-reference", tmp_path / "none", "--out", tmp_path / "out"), "no summary.json")
    assert not (tmp_path / "out").exists()
    same_name = evaluation(tmp_path / "again/few-shot", 1.4)
    assert [*read_answers(*pair, (good, same_name)).references] == [str(good), str(same_name)]


def test_options_view(pair, cli, tmp_path):
    lines = read_lines(evaluation(tmp_path / "by_options", 1.5) / "predictions.jsonl")
    append_lines(pair[0] / "options.jsonl", lines)
    summed = [p | {"correct_sum": p["answer"] == "A"} for p in lines]
    s = split_gain(read_answers(*pair))
    assert [*s.references] == [AS_IT_IS, NO_PRIOR, "options' likelihood, per byte"] and s.best == "options' likelihood, per byte"
    (pair[0] / "options.jsonl").write_text("".join(json.dumps(x) + "\n" for x in summed))
    assert split_gain(read_answers(*pair)).references["options' likelihood, summed"] == 0.25
    for bad, expected in ((lines[:-1], "1 questions are in one only"), (lines + lines[:1], "1 lines have an id"), (lines[:-1] + [{"id": "q199"}], "line 200 is not a prediction")):
        (pair[0] / "options.jsonl").write_text("".join(json.dumps(x) + "\n" for x in bad))
        check_one_line(cli("compare", *pair, "--out", tmp_path / "out"), expected)
        assert not (tmp_path / "out").exists()


def test_bad_predictions(pair, cli, tmp_path):
    lines = read_lines(pair[0] / "predictions.jsonl")
    nan = [lines[0] | {"logprobs": dict(lines[0]["logprobs"], B=float("nan"))}, *lines[1:]]
    for bad, expected in ((nan, "question q0 has log-probabilities that are not finite"), (lines + lines[3:4], "an id that stands there already")):
        (pair[0] / "predictions.jsonl").write_text("".join(json.dumps(x) + "\n" for x in bad))
        check_one_line(cli("compare", *pair, "--out", tmp_path / "out"), expected)
        assert not (tmp_path / "out").exists()


def test_one_question(tmp_path):
    base, tuned = evaluation(tmp_path / "base", 9, questions=QUESTIONS[1:2]), evaluation(tmp_path / "tuned", 9, questions=QUESTIONS[1:2], adapter="x/adapter")
    assert "There is no gain to split." in write_gain(base, tuned, tmp_path / "out")
    assert json.loads((tmp_path / "out/comparison.json").read_text())["smallest_difference"] is None


def test_published_counts_are_those_of_the_public_set(validation):
    from collections import Counter

    from medmcqa_lora.data.questions import fingerprint

    questions, p = load_questions(str(validation)).questions, published()
    assert fingerprint(questions) == p["data_sha256"]
    assert Counter(q.subject for q in questions) == {s: v["n"] for s, v in p["by_subject"].items()}
    assert sum(q.answer == 0 for q in questions) == p["most_frequent_answer"]
    printed = ROOT.parent / "shared/seed_results.json"
    if printed.exists():
        theirs = json.loads(printed.read_text())
        assert {s: v["percent"] for s, v in p["by_subject"].items() if v["percent"]} == theirs["by_subject_percent"]
        assert p["percent"] == [theirs["accuracy_percent"][k] for k in ("base", "lora")]


def test_report_on_the_published_questions(validation, cli, tmp_path):
    questions = load_questions(str(validation)).questions
    base, tuned = evaluation(tmp_path / "run/base", 0, questions=questions), evaluation(tmp_path / "run/tuned", 1, questions=questions, adapter=str(tmp_path / "run/adapter"))
    code, out, err = cli("report", base, tuned, "--out", tmp_path / "out")
    assert code == 0, err
    assert "| published | +27.09 |" in out and "- base: below the published base model" in out and "| Psychiatry | 16 |" in out
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"report.md", "report.json", "by_subject.csv", "figures"}
    assert cli("report", tmp_path / "run")[1] == (tmp_path / "out/report.md").read_text() + "\n"
    table, left_out = leaderboard(tmp_path)
    assert [*table.name] == ["published tuned", "run/tuned", "published base", "run/base"] and not left_out


def test_report_refuses_other_questions(pair, cli, tmp_path):
    check_one_line(cli("report", *pair, "--out", tmp_path / "out"), "not the 4,183 published questions", "Dental has 0 instead of 1,318")
    check_one_line(cli("report", tmp_path / "none", "--out", tmp_path / "out"), "run evaluate first")
    assert not (tmp_path / "out").exists()


def test_report_refuses_another_answer(validation, tmp_path):
    from dataclasses import replace

    questions = load_questions(str(validation)).questions
    questions = [replace(questions[0], answer=(questions[0].answer + 1) % 4), *questions[1:]]
    with pytest.raises(ValueError, match="as many by subject, but other texts or answers"):
        write_report([evaluation(tmp_path / "base", 0, questions=questions)])


def test_leaderboard_of_what_is_there(pair, tmp_path):
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn/summary.json").write_text("{")
    table, left_out = leaderboard(tmp_path, with_published=False)
    assert [*table.name] == ["tuned", "base"] and len(left_out) == 1 and "torn" in left_out[0]
    assert table.recipe.isna().all()  # the run is gone
