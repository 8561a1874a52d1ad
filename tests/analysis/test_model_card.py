"""The numbers in a run's card: whose they are, their format, and that writing twice is once."""
import json

import pytest
from helpers import check_one_line
from huggingface_hub import EvalResult, ModelCard, metadata_eval_result
from test_gain import QUESTIONS, evaluation, rewrite, without_padding

from medmcqa_lora.analysis.model_card import header_results, leakage_limit
from medmcqa_lora.analysis.published import published
from medmcqa_lora.core.files import append_lines, read_lines
from medmcqa_lora.data.questions import load_questions
from medmcqa_lora.evaluation.option_order import draw_orders, reorder_options, order_record
from medmcqa_lora.evaluation.records import read_evaluation
from medmcqa_lora.model.hub import check_shareable
from medmcqa_lora.training.run_folder import write_card

RECIPE = dict(
    model="made-up", data="sample", target="letter", prompt_style="plain", seed=7, lora_r=4,
    lora_alpha=8, lora_targets=["attention"], learning_rate=1e-3, lr_scheduler_type="cosine",
)
RESULT = dict(
    n=160, steps=40, epochs=2.0, tokens=9000, first_loss=4.1, last_loss=1.3, seconds=60.0,
    peak_memory_gib=1.5,
)
ENVIRONMENT = dict(
    hardware=dict(cores=2, gpus=[]), processes=1, commit="0" * 40, date="2026-01-31T12:00:00Z",
    data_sha256={},
)
NOT_SCORED = "is not the one that was scored"


@pytest.fixture
def run(tmp_path):
    """A finished run, as far as its card needs one."""
    folder = tmp_path / "run"
    (folder / "adapter").mkdir(parents=True)
    (folder / "adapter/adapter_config.json").write_text("{}")
    weights_of(folder).write_bytes(b"first")
    for name, record in (("recipe", RECIPE), ("result", RESULT), ("environment", ENVIRONMENT)):
        (folder / f"{name}.json").write_text(json.dumps(record))
    write_card(folder)
    return folder


@pytest.fixture
def pair(tmp_path, run):
    base = evaluation(tmp_path / "base", 0.5, likes_a=3)
    return base, evaluation(tmp_path / "tuned", 2, adapter=str(run / "adapter"))


def weights_of(run):
    return run / "adapter/adapter_model.safetensors"


def header(run):
    return ModelCard.load(run / "README.md").data


def card_text(run) -> str:
    return (run / "README.md").read_text()


def test_not_evaluated_yet(run):
    assert "Not evaluated yet" in card_text(run) and "model-index" not in card_text(run)
    assert header(run).eval_results is None
    check_shareable(run)


def test_compare_writes_numbers_and_limits(run, pair, cli):
    code, out, err = cli("compare", *pair)
    assert code == 0 and f"model card  {run}/README.md" in out, err
    card = without_padding(card_text(run))
    base, tuned = (json.loads((folder / "summary.json").read_text()) for folder in pair)
    for s in (base, tuned):
        low, high = s["ci95"]
        assert f"| {s['accuracy']:.2%} | {low:.2%} to {high:.2%} |" in card
    written = json.loads((run / "evaluated.json").read_text())
    difference = f"{written['gain']['difference'] * 100:+.1f} points"
    expected = (
        written["verdict"], difference, "always one letter | 25.00%", "n = 200", "seed 7",
        tuned["data_sha256"][:12], "no published figure compares",
        "were not compared with these questions",
    )
    for text in expected:
        assert text in card, text
    check_shareable(run)


def test_header_of_an_evaluated_run(run, pair, cli):
    cli("compare", *pair)
    base, tuned = (json.loads((folder / "summary.json").read_text()) for folder in pair)
    (result,) = header(run).eval_results
    assert (result.task_type, result.metric_type) == ("multiple-choice", "accuracy")
    assert result.metric_value == tuned["accuracy"]
    assert "n = 200" in result.metric_name
    assert f"base model {base['accuracy']:.2%}" in result.metric_name
    names = (header(run).model_name, header(run).metrics, header(run).library_name)
    assert names == ("made-up on MedMCQA", ["accuracy"], "peft")


def test_header_is_as_huggingface_hub_builds_it(pair):
    base, tuned = (read_evaluation(folder)[1] for folder in pair)
    result = EvalResult(**header_results(base, tuned)[0])
    theirs = metadata_eval_result(
        model_pretty_name="made-up", task_pretty_name=result.task_name, task_id=result.task_type,
        metrics_pretty_name=result.metric_name, metrics_id=result.metric_type,
        metrics_value=result.metric_value, dataset_pretty_name=result.dataset_name,
        dataset_id=result.dataset_type)
    ours = ModelCard("---\nlanguage: en\n---\n").data
    ours.model_name, ours.eval_results = "made-up", [result]
    [their_result] = theirs["model-index"][0]["results"]
    [our_result] = ours.to_dict()["model-index"][0]["results"]
    for key in ("task", "dataset"):
        assert their_result[key].items() <= (our_result[key] | {"args": None}).items()


def test_twice_is_once(run, pair, cli):
    cli("compare", *pair)
    once = (run / "README.md").read_bytes()
    cli("compare", *pair)
    write_card(run)  # as a resume of the finished run does
    assert (run / "README.md").read_bytes() == once
    assert once.count(b"## Limits") == once.count(b"model-index") == 1


def test_later_numbers_replace_earlier_ones(run, pair, cli, tmp_path):
    cli("compare", *pair)
    few = QUESTIONS[:50]
    base = evaluation(tmp_path / "few/base", 0.5, questions=few)
    tuned = evaluation(tmp_path / "few/tuned", 2, questions=few, adapter=str(run / "adapter"))
    assert cli("compare", base, tuned)[0] == 0
    card = card_text(run)
    assert "n = 50" in card and "n = 200" not in card and len(header(run).eval_results) == 1


def test_numbers_of_another_adapter_stay_out(run, pair, cli):
    cli("compare", *pair)
    weights_of(run).write_bytes(b"trained further")
    before = (run / "README.md").read_bytes()
    code, out, err = cli("compare", *pair)
    assert code == 0 and NOT_SCORED in out, err
    assert (run / "README.md").read_bytes() == before
    with pytest.raises(ValueError, match="its numbers are those of another adapter"):
        check_shareable(run)
    check_one_line(cli("push", run, "me/adapter"), "its numbers are those of another adapter",
                   "run compare again")
    write_card(run)  # what the end of the further training does
    assert "that training has replaced since" in card_text(run)
    assert header(run).eval_results is None
    check_shareable(run)


def test_another_runs_evaluation_inside_this_run(run, pair, cli):
    """The adapter that it names is gone; this run is the one above it, but has other weights."""
    inside = evaluation(run / "tuned", 2, adapter="gone/adapter")
    code, out, _ = cli("compare", pair[0], inside)
    assert code == 0 and NOT_SCORED in out and "Not evaluated yet" in card_text(run)


def test_a_moved_run_keeps_its_numbers(run, pair, cli, tmp_path):
    inside = evaluation(run / "tuned", 2, adapter=str(run / "adapter"))
    moved = run.rename(tmp_path / "moved")
    code, out, err = cli("compare", pair[0], moved / inside.name)
    assert code == 0 and f"model card  {moved}/README.md" in out, err
    assert header(moved).eval_results


def test_two_base_evaluations_touch_no_card(run, pair, cli):
    code, out, _ = cli("compare", pair[0], pair[0])
    assert code == 0 and "model card" not in out and "Not evaluated yet" in card_text(run)


def test_the_public_validation_set_has_its_name(run, cli, validation, tmp_path):
    questions = load_questions(str(validation)).questions
    base = evaluation(tmp_path / "base", 0.1, questions=questions)
    tuned = evaluation(tmp_path / "tuned", 0.5, questions=questions, adapter=str(run / "adapter"))
    summary = json.loads((base / "summary.json").read_text())
    assert summary["data_sha256"] == published()["data_sha256"]
    assert cli("compare", base, tuned)[0] == 0
    (result,) = header(run).eval_results
    assert result.dataset_type == "openlifescienceai/medmcqa"
    assert result.dataset_split == "validation"
    assert "the whole public validation set" in card_text(run)


def write_list(file):
    """A list of overlaps with one question."""
    file.write_text(json.dumps(dict(id="q3", kind="exact")) + "\n")
    return file


def test_leakage_is_reported_where_it_is_known(run, pair, cli, tmp_path):
    overlaps = write_list(tmp_path / "overlaps.jsonl")
    assert cli("compare", *pair, "--without", overlaps)[0] == 0
    sentence = "Leakage: 1 of 200 questions overlap with the training rows"
    assert sentence in card_text(run)
    questions = json.loads((pair[1] / "summary.json").read_text())["data_sha256"]
    overlap = dict(drop_overlap="exact", near_similarity=0.5, rows=dict(exact=3))
    record = ENVIRONMENT | dict(data_sha256=dict(evaluation=questions), overlap=overlap)
    (run / "environment.json").write_text(json.dumps(record))
    assert cli("compare", *pair)[0] == 0
    sentence = "Training rows that overlap with the evaluation rows, left out: 3 exact"
    assert f"Leakage: {sentence}" in card_text(run)


def test_leakage_in_words():
    overlap = dict(drop_overlap="exact", near_similarity=0.5, rows=dict(exact=3))
    env = dict(data_sha256=dict(evaluation="ours"), overlap=overlap)
    tuned = dict(data_sha256="ours")
    sentence = ("Training rows that overlap with the evaluation rows, left out: "
                "3 exact (normalised and near ones were not looked for).")
    assert leakage_limit(env, tuned) == sentence
    others = env | dict(data_sha256=dict(evaluation="others"))
    assert "were not compared" in leakage_limit(others, tuned)
    given = "7 of 400 questions overlap."
    assert leakage_limit(env, tuned, given) == given


def test_nothing_is_written_where_a_comparison_is_refused(pair, cli, tmp_path):
    """The list and the orders are fine, the reference isn't."""
    overlaps = write_list(tmp_path / "overlaps.jsonl")
    for folder in pair:
        write_orders(folder, lambda q: 0)
    result = cli("compare", *pair, "--without", overlaps, "--format-reference", tmp_path / "none",
                 "--out", tmp_path / "out")
    check_one_line(result, "no summary.json")
    assert not (tmp_path / "out").exists()


def write_orders(folder, choose, k=4, questions=QUESTIONS[:40]):
    """What evaluate --orders leaves of a model that chooses so."""
    (folder / "orders.jsonl").unlink(missing_ok=True)
    records = []
    for q in questions:
        for order in draw_orders(k, 0):
            reordered = reorder_options(q, order)
            chosen = choose(reordered)
            logprobs = [0.0 if i == chosen else -9.0 for i in range(4)]
            records.append(order_record(reordered, logprobs))
    append_lines(folder / "orders.jsonl", records)


def test_compare_shows_orders_before_and_after(run, pair, cli, tmp_path):
    write_orders(pair[0], lambda q: 0)
    code, out, _ = cli("compare", *pair)
    assert code == 0 and "scored for the base alone" in out
    write_orders(pair[1], lambda q: q.answer)
    folder = tmp_path / "out"
    code, out, err = cli("compare", *pair, "--out", folder)
    assert code == 0, err
    assert "Letter bias went from 0.750 to" in out and "The tuned model is steadier" in out
    written = json.loads((folder / "orders.json").read_text())
    assert (written["steadied"], written["unsettled"]) == (40, 0)
    assert written["changed_difference"] == -1.0
    assert (folder / "orders.md").read_text().strip() in out
    assert (folder / "figures/orders.png").is_file()
    assert "Letter bias went from" in card_text(run)


def test_orders_that_differ(pair, cli):
    write_orders(pair[0], lambda q: 0)
    write_orders(pair[1], lambda q: 0, k=5)
    code, out, _ = cli("compare", *pair)
    refusal = "can't be set side by side: "
    assert code == 0
    assert f"{refusal}40 orders of questions were scored for one model only" in out
    write_orders(pair[1], lambda q: 0, questions=QUESTIONS[:39])  # an interrupted one
    assert f"{refusal}4 orders" in cli("compare", *pair)[1]


def test_broken_lines_of_orders(pair, cli, tmp_path):
    for folder in pair:
        write_orders(folder, lambda q: 0)
    file = pair[1] / "orders.jsonl"
    lines = read_lines(file)
    broken = ({"choice": "E"}, {"choice": ["A"]}, {"order": "ABCD/"}, {"id": "q1"}, {"correct": 1})
    for bad in broken:
        rewrite(file, [*lines[:2], lines[2] | bad])
        check_one_line(cli("compare", *pair, "--out", tmp_path / "out"),
                       "orders.jsonl: line 3 is not a question in an order")
    assert not (tmp_path / "out").exists()


def folded(q) -> list[str]:
    return [" ".join(option.split()).lower() for option in q.options]


def test_equal_options_are_one_answer(validation):
    """A model that takes the first of two equal options, in any order, never changes its answer."""
    questions = load_questions(str(validation)).questions
    twins = [q for q in questions if len(set(folded(q))) < 4]
    assert len(twins) == 21
    for q in twins:
        repeated = max(folded(q), key=folded(q).count)
        choices = set()
        for order in draw_orders(24, 0):
            reordered = reorder_options(q, order)
            place = folded(reordered).index(repeated)
            logprobs = [0.0 if i == place else -9.0 for i in range(4)]
            choices.add(order_record(reordered, logprobs)["choice"])
        assert len(choices) == 1
