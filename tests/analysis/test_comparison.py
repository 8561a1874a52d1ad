"""Comparison, overlap, calibration, published figures: corner cases of their notebooks."""
import json

import numpy as np
import pytest
from test_gain import QUESTIONS, evaluation, without_padding

from medmcqa_lora.analysis.calibration import calibration, letter_logits, nll
from medmcqa_lora.analysis.comparison import (
    Comparison, compare_evaluations, comparison_table, comparison_verdict, write_comparison,
)
from medmcqa_lora.analysis.overlap import read_overlaps, score_parts
from medmcqa_lora.analysis.published import (
    accuracy_from_counts, check_published_questions, find_evaluations, gain_rows, overall_rows,
    published_summaries, run_facts, subject_report, write_report,
)
from medmcqa_lora.data.schemas import LETTERS
from medmcqa_lora.evaluation.records import read_evaluation
from medmcqa_lora.evaluation.statistics import mcnemar, paired_interval, wilson


def made(gained, lost, n=100, base=0.4, mass=(0.9, 0.9)) -> Comparison:
    return Comparison(n, base, base + (gained - lost) / n, gained, lost, mcnemar(gained, lost),
                      paired_interval(gained, lost, n), 0.32, list(mass))


@pytest.mark.parametrize("comparison, start", [
    (made(20, 2), "The tuned model is better: +18.0 points"),
    (made(2, 20), "The tuned model is worse"),
    (made(3, 2), "No difference that 100 questions could show"),
    (made(5, 0), "No difference that 100 questions could show: +5.0 points (95% interval -"),
])
def test_better_or_worse(comparison, start):
    assert comparison_verdict(comparison).startswith(start)


@pytest.mark.parametrize("comparison, place", [
    (made(1, 20), "below that"), (made(40, 2), "above that"), (made(3, 2), "not distinguishable"),
])
def test_beside_the_best_constant_answer(comparison, place):
    assert place in comparison_verdict(comparison)


def test_where_the_format_was_learnt():
    assert "format was learnt" in comparison_verdict(made(3, 2, mass=(0.1, 0.99)))
    assert "format was learnt" not in comparison_verdict(made(3, 2))


def test_an_evaluation_beside_itself(tmp_path):
    base = evaluation(tmp_path / "base", 1)
    same = compare_evaluations(base, base)
    assert (same.gained, same.lost, same.p_value, same.difference) == (0, 0, 1.0, 0.0)
    out = tmp_path / "out"
    write_comparison(base, base, out)
    files = sorted(str(p.relative_to(out)) for p in out.rglob("*.*"))
    assert files == ["comparison.json", "comparison.md", "figures/by_subject.png",
                     "figures/letters.png"]


def test_a_table_of_all_ways_of_asking(tmp_path):
    """Letters, options twice and generation: two rows each."""
    base = evaluation(tmp_path / "base", 1)
    summary = read_evaluation(base)[1]
    options = accuracy_from_counts(50, 200) | dict(accuracy_sum=0.25, ci95_sum=[0.2, 0.3], ties=1)
    generation = dict(n=200, accuracy=0.0, ci95=wilson(0, 200), unparseable=0.975)
    both = summary | dict(options=options, generation=generation)
    c = compare_evaluations(base, base)
    table = comparison_table(c, both, both)
    assert table.count("\n") == 10 and "| prefers short options" in without_padding(table)
    assert comparison_table(c, summary, both).count("\n") == 4


def test_a_list_of_overlaps_that_is_none(tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"id": "q1", "kind": "near"}\n{"id": "q2"}\n')
    with pytest.raises(ValueError, match="line 2: is not an overlap with id and kind"):
        read_overlaps(tmp_path / "bad.jsonl")
    with pytest.raises(ValueError, match="can't be read"):
        read_overlaps(tmp_path / "none.jsonl")


def test_scores_of_questions_learnt_by_heart():
    before = [dict(id=str(i), correct=i % 2 == 1) for i in range(80)]
    after = [dict(id=str(i), correct=i % 2 == 1 or i < 16) for i in range(80)]
    kinds = {str(i): "near" for i in range(16)} | {str(i): "options" for i in range(16, 20)}
    sizes = {part: s["n"] for part, s in score_parts(before, after, kinds).items()}
    assert sizes == {"all": 80, "overlapping": 16, "rest": 64, "options alone, in the rest": 4}
    # McNemar's interval: all eight changes are gains
    assert 0 < score_parts(before, after, kinds)["overlapping"]["difference_ci95"][0] < 0.5


def test_calibration_of_a_sure_model():
    sure, right = np.eye(4)[[0, 1, 2]], np.array([0, 1, 2])
    assert nll(sure, right) == 0.0
    rows = [dict(id=str(i), answer="A", logprobs=dict.fromkeys(LETTERS, -1.0)) for i in range(5)]
    found = calibration(rows)
    assert (found["n"], found["n_fit"]) == (2, 3)
    assert letter_logits([])[0].shape == (0, 4)


def test_the_published_counts():
    assert accuracy_from_counts(15, 50) == dict(n=50, accuracy=0.3, ci95=wilson(15, 50))
    theirs = published_summaries()
    assert overall_rows({"base": theirs["published base"]}).count("\n") == 5
    report = without_padding(subject_report({}))
    assert "| Psychiatry | 16 | 31.2% (14 to 56) | 87.5% (64 to 97) |" in report
    assert "| published | +27.09 |" in without_padding(gain_rows(made(3, 2)))


def test_other_questions_are_named():
    shipped = dict(n=80, data_sha256="0", by_subject={"Dental": {"n": 4}})
    with pytest.raises(ValueError) as e:
        check_published_questions(shipped, "_runs/base")
    expected = ("_runs/base: not the 4,183 published questions "
                "(80 questions; Dental has 4 instead of 1,318)")
    assert expected in str(e.value)


def test_report_writes_nothing_for_other_questions(tmp_path):
    other = evaluation(tmp_path / "other", 1, questions=QUESTIONS[:8])
    with pytest.raises(ValueError, match=r"published questions \(8 questions; Dental has 0"):
        write_report([other], tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_report_of_a_base_model_alone(validation, tmp_path):
    from medmcqa_lora.data.questions import load_questions

    base = evaluation(tmp_path / "base", 1, questions=load_questions(str(validation)).questions)
    assert without_padding(write_report([base])).count("\n| base |") == 1


def test_labels_of_evaluations(tmp_path):
    base = evaluation(tmp_path / "run/base", 1)
    tuned = evaluation(tmp_path / "run/tuned", 2, adapter="x/adapter")
    assert find_evaluations([base, tuned]) == {"base": base, "tuned": tuned}
    assert [*find_evaluations([base, tmp_path / "run"])] == [f"base, {base}", "tuned"]


def test_records_of_something_else(tmp_path):
    for name, text in (("recipe", "{}"), ("environment", "{}"), ("result", "[]")):
        (tmp_path / f"{name}.json").write_text(text)
    with pytest.raises(ValueError, match="not as train leaves it"):
        run_facts(tmp_path)


def test_facts_of_a_run_on_a_cpu(tmp_path):
    """An older record doesn't say how many processes there were."""
    recipe = dict(lora_r=4, lora_targets=["attention"], learning_rate=1e-3, seed=7)
    env = dict(hardware=dict(cores=2, gpus=[]), commit="0" * 40, date="2026-01-31T12:00:00Z")
    result = dict(steps=40, epochs=2.0, tokens=9000, seconds=60.0)
    for name, record in (("recipe", recipe), ("environment", env), ("result", result)):
        (tmp_path / f"{name}.json").write_text(json.dumps(record))
    facts = run_facts(tmp_path)
    assert (facts["gpu_hours"], facts["hardware"]) == (None, "2 CPU cores")
