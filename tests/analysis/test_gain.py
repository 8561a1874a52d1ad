"""The split of a gain, the report and the leaderboard, on made-up and on real questions."""
import csv
import json
import re
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from conftest import ROOT
from helpers import check_one_line

from medmcqa_lora.analysis.gain import (
    AS_IT_IS, NO_PRIOR, RULES, GainSplit, gain_verdict, letter_logprobs_of, paired_p, read_answers,
    read_options, split_gain, subject_gains,
)
from medmcqa_lora.analysis.gain_report import gain_table, write_gain
from medmcqa_lora.analysis.leaderboard import leaderboard
from medmcqa_lora.analysis.published import published, write_report
from medmcqa_lora.core.files import append_lines, read_lines
from medmcqa_lora.data.questions import Question, fingerprint, load_questions
from medmcqa_lora.data.schemas import LETTERS
from medmcqa_lora.evaluation.records import prediction_record
from medmcqa_lora.evaluation.summary import write_evaluation

SUBJECTS = ("Anatomy", "ENT")
QUESTIONS = [Question(f"q{i}", f"Question {i}?", ("w", "x", "y", "z"), i % 4, SUBJECTS[i % 2])
             for i in range(200)]


def without_padding(text: str) -> str:
    """A text with single spaces, so that a test needs no widths of table cells."""
    return re.sub(" +", " ", text)


def evaluation(folder, knows, likes_a=0.0, questions=QUESTIONS, adapter=None, model="made-up"):
    """A model that knows the answers so well, and likes the letter A so much."""
    right = np.eye(4)[[q.answer for q in questions]]
    noise = np.random.default_rng(0).normal(size=(len(questions), 4))
    logits = noise + knows * right + likes_a * np.eye(4)[0]
    logprobs = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    records = [prediction_record(q, row) for q, row in zip(questions, logprobs.tolist())]
    folder.mkdir(parents=True)
    append_lines(folder / "predictions.jsonl", records)
    write_evaluation(folder, records, questions, model, adapter)
    return folder


def rewrite(file, lines):
    """Replace a JSON-lines file."""
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture
def pair(tmp_path):
    base = evaluation(tmp_path / "base", 1, likes_a=9)
    return base, evaluation(tmp_path / "tuned", 2, adapter="gone/adapter")


def test_compare_writes_the_split(pair, cli, tmp_path):
    folder = tmp_path / "out"
    code, out, err = cli("compare", *pair, "--out", folder)
    assert code == 0, err
    written = json.loads((folder / "comparison.json").read_text())
    keys = {"n", "base", "tuned", "gained", "lost", "p_value", "difference_ci95",
            "majority_baseline", "letter_mass", "difference", "verdict"}
    assert keys <= written.keys()
    gain = written["gain"]
    assert gain["total"] == pytest.approx(gain["format"] + gain["rest"], abs=2e-6)
    assert gain["total"] == pytest.approx(written["difference"], abs=2e-6)
    assert gain["best"] == NO_PRIOR and gain["verdict"].startswith("Both: ")
    assert gain["verdict"] in out and written["verdict"] in out
    assert (folder / "comparison.md").read_text() in out
    rows = list(csv.DictReader(open(folder / "by_subject.csv")))
    assert sum(int(r["n"]) for r in rows) == 200
    assert all(float(r["p_holm"]) >= float(r["p_value"]) for r in rows)
    assert [r["subject"] for r in rows] == [r["subject"] for r in written["by_subject"]]
    files = {str(p.relative_to(folder)) for p in folder.rglob("*.*")}
    assert files == {"by_subject.csv", "comparison.json", "comparison.md", "figures/by_subject.png",
                     "figures/gain.png", "figures/letters.png"}


def test_the_text_is_the_same_with_and_without_files(pair, tmp_path):
    text = write_gain(*pair, tmp_path / "out")
    assert write_gain(*pair) == text == (tmp_path / "out/comparison.md").read_text()
    written = json.loads((tmp_path / "out/comparison.json").read_text())
    split = split_gain(read_answers(*pair))
    assert written["gain"]["verdict"] == gain_verdict(split)
    assert f"({NO_PRIOR})" in gain_table(split) and gain_table(split).count("\n") == 9


def test_the_same_numbers_every_time(pair):
    assert split_gain(read_answers(*pair)) == split_gain(read_answers(*pair))


def test_the_order_of_lines_does_not_matter(pair):
    file = pair[1] / "predictions.jsonl"
    before = split_gain(read_answers(*pair))
    rewrite(file, reversed(read_lines(file)))
    assert split_gain(read_answers(*pair)) == before


def test_a_model_beside_itself(pair):
    s = split_gain(read_answers(pair[0], pair[0]))
    assert (s.total, s.total_ci95, s.total_p) == (0.0, [0.0, 0.0], 1.0)
    assert s.rest < 0 < s.format


def test_predictions_without_log_probabilities(pair):
    """The base as it is is the only reference, and nothing else was tried."""
    s = split_gain(replace(read_answers(*pair), logprobs=None))
    assert (s.format, s.format_ci95, s.format_p) == (0.0, [0.0, 0.0], 1.0)
    assert [*s.references] == [AS_IT_IS]


def test_subjects(pair):
    answers = read_answers(*pair)
    table = subject_gains(answers).set_index("subject")
    anatomy = np.array(answers.subjects) == "Anatomy"
    expected = paired_p(answers.tuned[anatomy], answers.base[anatomy])
    assert table.loc["Anatomy", "p_value"] == pytest.approx(expected, abs=1e-60)


def test_references(pair, cli, tmp_path):
    good, worse = evaluation(tmp_path / "few-shot", 1.5), evaluation(tmp_path / "worse", 0)
    other_questions = evaluation(tmp_path / "other", 1, questions=QUESTIONS[:100])
    other_model = evaluation(tmp_path / "model", 1, model="other")
    out_folder = tmp_path / "out"

    def compare(reference):
        return cli("compare", *pair, "--format-reference", reference, "--out", out_folder)

    references = ("--format-reference", good, "--format-reference", worse)
    code, out, err = cli("compare", *pair, *references)
    assert code == 0, err
    assert "(few-shot)" in out and "| worse |" in without_padding(out)
    check_one_line(compare(pair[1]), "--format-reference", "its adapter is 'gone/adapter'")
    check_one_line(compare(other_model), "--format-reference", "its model is 'other'")
    check_one_line(compare(other_questions), "--format-reference",
                   "its questions are not the base's")
    check_one_line(compare(tmp_path / "none"), "no summary.json")
    assert not out_folder.exists()
    same_name = evaluation(tmp_path / "again/few-shot", 1.4)
    references = read_answers(*pair, (good, same_name)).references
    assert [*references] == [str(good), str(same_name)]


def test_options_view(pair, cli, tmp_path):
    lines = read_lines(evaluation(tmp_path / "by_options", 1.5) / "predictions.jsonl")
    file = pair[0] / "options.jsonl"
    append_lines(file, lines)
    s = split_gain(read_answers(*pair))
    per_byte, summed = "options' likelihood, per byte", "options' likelihood, summed"
    assert [*s.references] == [AS_IT_IS, NO_PRIOR, per_byte] and s.best == per_byte
    rewrite(file, [p | {"correct_sum": p["answer"] == "A"} for p in lines])
    assert split_gain(read_answers(*pair)).references[summed] == 0.25
    broken = (
        (lines[:-1], f"1 questions are in one only of it and {per_byte}"),
        (lines[:100], "100 questions are in one only"),
        (lines + lines[:1], "1 lines have an id"),
        (lines[:-1] + [{"id": "q199"}], "line 200 is not a prediction"),
    )
    for bad, expected in broken:
        rewrite(file, bad)
        check_one_line(cli("compare", *pair, "--out", tmp_path / "out"), expected)
        assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="line 200 is not a prediction"):
        read_options(pair[0])


def test_bad_predictions(pair, cli, tmp_path):
    file = pair[0] / "predictions.jsonl"
    lines = read_lines(file)
    nan = [lines[0] | {"logprobs": dict(lines[0]["logprobs"], B=float("nan"))}, *lines[1:]]
    not_finite = "question q0 has log-probabilities that are not finite"
    with pytest.raises(ValueError, match=not_finite):
        letter_logprobs_of(nan, file)
    repeated = lines + lines[3:4]
    for bad, expected in ((nan, not_finite), (repeated, "an id that stands there already")):
        rewrite(file, bad)
        check_one_line(cli("compare", *pair, "--out", tmp_path / "out"), expected)
        assert not (tmp_path / "out").exists()
    assert letter_logprobs_of([lines[0]], file).shape == (1, len(LETTERS))


def test_one_question(tmp_path):
    one = QUESTIONS[1:2]
    base = evaluation(tmp_path / "base", 9, questions=one)
    tuned = evaluation(tmp_path / "tuned", 9, questions=one, adapter="x/adapter")
    assert "There is no gain to split." in write_gain(base, tuned, tmp_path / "out")
    written = json.loads((tmp_path / "out/comparison.json").read_text())
    assert written["smallest_difference"] is None


PARTS = {  # word -> interval and p-value of a part that is shown so
    "more": ([0.05, 0.15], 0.001), "less": ([-0.15, -0.05], 0.001), "open": ([-0.05, 0.15], 0.4),
}


def made_split(total: str, format: str, rest: str) -> GainSplit:
    """A split whose parts are shown as these words say."""
    (total_ci, total_p), (format_ci, format_p), (rest_ci, rest_p) = (
        PARTS[word] for word in (total, format, rest))
    return GainSplit(
        n=1000, references={AS_IT_IS: 0.3, NO_PRIOR: 0.4}, best=NO_PRIOR, tuned=0.5,
        total=0.2, format=0.1, rest=sum(rest_ci) / 2,
        total_ci95=total_ci, format_ci95=format_ci, rest_ci95=rest_ci,
        total_p=total_p, format_p=format_p, rest_p=rest_p,
    )


@pytest.mark.parametrize("total", PARTS)
@pytest.mark.parametrize("format", PARTS)
@pytest.mark.parametrize("rest", PARTS)
def test_the_first_rule_that_fits_is_the_verdict(total, format, rest):
    found = (total, format, rest)
    fits = (rule for rule in RULES
            if all(wanted in ("any", word) for wanted, word in zip(rule, found)))
    sentence = next(fits)[3]
    numbers = dict(total="20.0", format="10.0", rest="", below="10.0", best=NO_PRIOR, tried="",
                   n="1,000")
    assert gain_verdict(made_split(*found))[:12] == sentence.format(**numbers)[:12]


def test_every_rule_is_used():
    words = [*PARTS]
    cases = [(t, f, r) for t in words for f in words for r in words]
    used = set()
    for case in cases:
        used.add(next(k for k, rule in enumerate(RULES)
                      if all(w in ("any", word) for w, word in zip(rule, case))))
    assert used == set(range(len(RULES)))


def test_published_counts_are_those_of_the_public_set(validation):
    questions, p = load_questions(str(validation)).questions, published()
    assert fingerprint(questions) == p["data_sha256"]
    sizes = {subject: v["n"] for subject, v in p["by_subject"].items()}
    assert Counter(q.subject for q in questions) == sizes and sum(sizes.values()) == p["n"]
    assert sum(q.answer == 0 for q in questions) == p["most_frequent_answer"]
    printed = ROOT.parent / "shared/seed_results.json"
    if printed.exists():
        theirs = json.loads(printed.read_text())
        percents = {s: v["percent"] for s, v in p["by_subject"].items() if v["percent"]}
        assert percents == theirs["by_subject_percent"]
        assert p["percent"] == [theirs["accuracy_percent"][k] for k in ("base", "lora")]


def test_report_on_the_published_questions(validation, cli, tmp_path):
    questions = load_questions(str(validation)).questions
    base = evaluation(tmp_path / "run/base", 0, questions=questions)
    tuned = evaluation(tmp_path / "run/tuned", 1, questions=questions,
                       adapter=str(tmp_path / "run/adapter"))
    code, out, err = cli("report", base, tuned, "--out", tmp_path / "out")
    assert code == 0, err
    shown = without_padding(out)
    assert "| published | +27.09 |" in shown and "| Psychiatry | 16 |" in shown
    assert "- base: below the published base model" in out
    files = {p.name for p in (tmp_path / "out").iterdir()}
    assert files == {"report.md", "report.json", "by_subject.csv", "figures"}
    report = (tmp_path / "out/report.md").read_text()
    assert cli("report", tmp_path / "run")[1] == report + "\n"
    table, left_out = leaderboard(tmp_path)
    assert [*table.name] == ["published tuned", "run/tuned", "published base", "run/base"]
    assert not left_out


def test_report_refuses_other_questions(pair, cli, tmp_path):
    out = tmp_path / "out"
    check_one_line(cli("report", *pair, "--out", out), "not the 4,183 published questions",
                   "Dental has 0 instead of 1,318")
    check_one_line(cli("report", tmp_path / "none", "--out", out), "run evaluate first")
    assert not out.exists()


def test_report_refuses_another_answer(validation, tmp_path):
    questions = load_questions(str(validation)).questions
    first = replace(questions[0], answer=(questions[0].answer + 1) % 4)
    base = evaluation(tmp_path / "base", 0, questions=[first, *questions[1:]])
    with pytest.raises(ValueError, match="as many by subject, but other texts or answers"):
        write_report([base])


def test_leaderboard_of_what_is_there(pair, tmp_path):
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn/summary.json").write_text("{")
    table, left_out = leaderboard(tmp_path, with_published=False)
    assert [*table.name] == ["tuned", "base"]
    assert len(left_out) == 1 and "torn" in left_out[0]
    assert table.recipe.isna().all()  # the run is gone


def test_leaderboard_of_an_empty_folder(tmp_path):
    assert [len(leaderboard(tmp_path, wanted)[0]) for wanted in (True, False)] == [2, 0]
