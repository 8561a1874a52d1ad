"""The numbers in a run's card: whose they are, that they follow the format, and that writing them twice changes nothing."""
import json

import pytest
from huggingface_hub import ModelCard
from helpers import check_one_line
from test_gain import QUESTIONS, evaluation

from medmcqa_lora.data.questions import load_questions
from medmcqa_lora.core.files import append_lines, read_lines
from medmcqa_lora.evaluation.option_order import draw_orders, in_order, order_record
from medmcqa_lora.analysis.published import published
from medmcqa_lora.model.hub import check_shareable
from medmcqa_lora.training.run_folder import write_card


@pytest.fixture
def run(tmp_path):
    """A finished run, as far as its card needs one."""
    folder = tmp_path / "run"
    (folder / "adapter").mkdir(parents=True)
    (folder / "adapter/adapter_config.json").write_text("{}")
    (folder / "adapter/adapter_model.safetensors").write_bytes(b"first")
    recipe = dict(model="made-up", data="sample", target="letter", seed=7, lora_r=4, lora_alpha=8, lora_targets=["attention"], learning_rate=1e-3, lr_scheduler_type="cosine", prompt_style="plain")
    result = dict(n=160, steps=40, epochs=2.0, tokens=9000, first_loss=4.1, last_loss=1.3, seconds=60.0, peak_memory_gib=1.5)
    env = dict(hardware=dict(cores=2, gpus=[]), processes=1, commit="0" * 40, date="2026-01-31T12:00:00Z", data_sha256={})
    for name, value in dict(recipe=recipe, result=result, environment=env).items():
        (folder / f"{name}.json").write_text(json.dumps(value))
    write_card(folder)
    return folder


@pytest.fixture
def pair(tmp_path, run):
    return evaluation(tmp_path / "base", 0.5, likes_a=3), evaluation(tmp_path / "tuned", 2, adapter=str(run / "adapter"))


def header(run):
    return ModelCard.load(run / "README.md").data


def test_not_evaluated_yet(run):
    card = (run / "README.md").read_text()
    assert "Not evaluated yet" in card and "model-index" not in card and header(run).eval_results is None
    check_shareable(run)


def test_compare_writes_numbers_and_limits(run, pair, cli):
    code, out, err = cli("compare", *pair)
    assert code == 0 and f"model card  {run}/README.md" in out, err
    card, base, tuned = (run / "README.md").read_text(), *(json.loads((f / "summary.json").read_text()) for f in pair)
    for s in (base, tuned):
        assert f"| {s['accuracy']:.2%} | {s['ci95'][0]:.2%} to {s['ci95'][1]:.2%} |" in card
    told = json.loads((run / "evaluated.json").read_text())
    assert told["verdict"] in card and f"{told['gain']['difference'] * 100:+.1f} points" in card and "always one letter | 25.00%" in card
    assert "n = 200" in card and tuned["data_sha256"][:12] in card and "no published figure compares" in card and "seed 7" in card and "were not compared with these questions" in card
    (result,) = header(run).eval_results
    assert (result.task_type, result.metric_type, result.metric_value) == ("multiple-choice", "accuracy", tuned["accuracy"])
    assert "n = 200" in result.metric_name and f"base model {base['accuracy']:.2%}" in result.metric_name
    check_shareable(run)


def test_twice_is_once(run, pair, cli):
    cli("compare", *pair)
    once = (run / "README.md").read_bytes()
    cli("compare", *pair)
    write_card(run)  # as a resume of the finished run does
    assert (run / "README.md").read_bytes() == once and once.count(b"## Limits") == once.count(b"model-index") == 1


def test_later_numbers_replace_earlier_ones(run, pair, cli, tmp_path):
    cli("compare", *pair)
    fewer = [evaluation(tmp_path / "few/base", 0.5, questions=QUESTIONS[:50]), evaluation(tmp_path / "few/tuned", 2, questions=QUESTIONS[:50], adapter=str(run / "adapter"))]
    assert cli("compare", *fewer)[0] == 0
    card = (run / "README.md").read_text()
    assert "n = 50" in card and "n = 200" not in card and len(header(run).eval_results) == 1


def test_numbers_of_another_adapter_stay_out(run, pair, cli):
    cli("compare", *pair)
    (run / "adapter/adapter_model.safetensors").write_bytes(b"trained further")
    before = (run / "README.md").read_bytes()
    code, out, err = cli("compare", *pair)
    assert code == 0 and "is not the one that was scored" in out and (run / "README.md").read_bytes() == before, err
    with pytest.raises(ValueError, match="its numbers are those of another adapter"):
        check_shareable(run)
    check_one_line(cli("push", run, "me/adapter"), "its numbers are those of another adapter", "run compare again")
    write_card(run)  # what the end of the further training does
    assert "that training has replaced since" in (run / "README.md").read_text() and header(run).eval_results is None
    check_shareable(run)


def test_another_runs_evaluation_inside_this_run(run, pair, cli):
    """The adapter that it names is gone; this run is the one above it, but has other weights."""
    inside = evaluation(run / "tuned", 2, adapter="gone/adapter")
    code, out, _ = cli("compare", pair[0], inside)
    assert code == 0 and "is not the one that was scored" in out and "Not evaluated yet" in (run / "README.md").read_text()


def test_a_moved_run_keeps_its_numbers(run, pair, cli, tmp_path):
    inside = evaluation(run / "tuned", 2, adapter=str(run / "adapter"))
    moved = run.rename(tmp_path / "moved")
    code, out, err = cli("compare", pair[0], moved / inside.name)
    assert code == 0 and f"model card  {moved}/README.md" in out and header(moved).eval_results, err


def test_two_base_evaluations_touch_no_card(run, pair, cli):
    code, out, _ = cli("compare", pair[0], pair[0])
    assert code == 0 and "model card" not in out and "Not evaluated yet" in (run / "README.md").read_text()


def test_the_public_validation_set_has_its_name(run, cli, validation, tmp_path):
    questions = load_questions(str(validation)).questions
    pair = evaluation(tmp_path / "base", 0.1, questions=questions), evaluation(tmp_path / "tuned", 0.5, questions=questions, adapter=str(run / "adapter"))
    assert json.loads((pair[0] / "summary.json").read_text())["data_sha256"] == published()["data_sha256"]
    assert cli("compare", *pair)[0] == 0
    (result,) = header(run).eval_results
    assert (result.dataset_type, result.dataset_split) == ("openlifescienceai/medmcqa", "validation") and "the whole public validation set" in (run / "README.md").read_text()


def test_leakage_is_told_where_it_is_known(run, pair, cli, tmp_path):
    (tmp_path / "overlaps.jsonl").write_text(json.dumps(dict(id="q3", kind="exact")) + "\n")
    assert cli("compare", *pair, "--without", tmp_path / "overlaps.jsonl")[0] == 0
    assert "Leakage: 1 of 200 questions overlap with the training rows" in (run / "README.md").read_text()
    env = json.loads((run / "environment.json").read_text())
    env |= dict(data_sha256=dict(evaluation=json.loads((pair[1] / "summary.json").read_text())["data_sha256"]), overlap=dict(drop_overlap="exact", near_similarity=0.5, rows=dict(exact=3)))
    (run / "environment.json").write_text(json.dumps(env))
    assert cli("compare", *pair)[0] == 0
    assert "Leakage: Training rows that overlap with the evaluation rows, left out: 3 exact" in (run / "README.md").read_text()


def test_nothing_is_written_where_a_comparison_is_refused(pair, cli, tmp_path):
    """The list and the orders are fine, the reference isn't."""
    (tmp_path / "overlaps.jsonl").write_text(json.dumps(dict(id="q3", kind="exact")) + "\n")
    for folder in pair:
        orders(folder, lambda q: 0)
    check_one_line(cli("compare", *pair, "--without", tmp_path / "overlaps.jsonl", "--format-reference", tmp_path / "none", "--out", tmp_path / "out"), "no summary.json")
    assert not (tmp_path / "out").exists()


def orders(folder, choose, k=4, questions=QUESTIONS[:40]):
    """What evaluate --orders leaves of a model that chooses so."""
    (folder / "orders.jsonl").unlink(missing_ok=True)
    turned = [in_order(q, o) for q in questions for o in draw_orders(k, 0)]
    append_lines(folder / "orders.jsonl", [order_record(q, [0.0 if i == choose(q) else -9.0 for i in range(4)]) for q in turned])


def test_compare_shows_orders_before_and_after(run, pair, cli, tmp_path):
    orders(pair[0], lambda q: 0)
    code, out, _ = cli("compare", *pair)
    assert code == 0 and "scored for the base alone" in out
    orders(pair[1], lambda q: q.answer)
    code, out, err = cli("compare", *pair, "--out", tmp_path / "out")
    assert code == 0 and "Letter bias went from 0.750 to" in out and "The tuned model is steadier" in out, err
    told = json.loads((tmp_path / "out/orders.json").read_text())
    assert (told["steadied"], told["unsettled"], told["changed_difference"]) == (40, 0, -1.0)
    assert (tmp_path / "out/orders.md").read_text().strip() in out and (tmp_path / "out/figures/orders.png").is_file() and "Letter bias went from" in (run / "README.md").read_text()


def test_other_orders_and_broken_lines(pair, cli, tmp_path):
    orders(pair[0], lambda q: 0)
    orders(pair[1], lambda q: 0, k=5)
    code, out, _ = cli("compare", *pair)
    assert code == 0 and "can't be set side by side: 40 orders of questions were scored for one model only" in out
    orders(pair[1], lambda q: 0, questions=QUESTIONS[:39])  # an interrupted one
    assert "can't be set side by side: 4 orders" in cli("compare", *pair)[1]
    lines = read_lines(pair[1] / "orders.jsonl")
    for bad in ({"choice": "E"}, {"choice": ["A"]}, {"order": "ABCD/"}, {"id": "q1"}, {"correct": 1}):
        (pair[1] / "orders.jsonl").write_text("".join(json.dumps(x) + "\n" for x in [*lines[:2], lines[2] | bad]))
        check_one_line(cli("compare", *pair, "--out", tmp_path / "out"), "orders.jsonl: line 3 is not a question in an order")
    assert not (tmp_path / "out").exists()


def test_equal_options_are_one_answer(validation):
    """On the real questions that have some: a model that takes the first of them in any order never changes its answer."""
    twins = [q for q in load_questions(str(validation)).questions if len({" ".join(o.split()).lower() for o in q.options}) < 4]
    assert len(twins) == 21
    for q in twins:
        folded = [" ".join(o.split()).lower() for o in q.options]
        twice = max(folded, key=folded.count)
        turned = [in_order(q, o) for o in draw_orders(24, 0)]
        first = [next(i for i, o in enumerate(m.options) if " ".join(o.split()).lower() == twice) for m in turned]
        assert len({order_record(m, [0.0 if i == place else -9.0 for i in range(4)])["choice"] for m, place in zip(turned, first)}) == 1
