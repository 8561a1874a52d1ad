"""Planted overlaps are found, near-misses are not; what a run leaves out is recorded."""
import json
import os
import random
import subprocess
import sys
import unicodedata
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import ALL, ROOT
from helpers import check_one_line

from medmcqa_lora.core.recipe import Recipe
from medmcqa_lora.data.leakage import (
    DROPS, count_overlaps, describe_overlaps, find_overlaps, load_pair, question_line,
)
from medmcqa_lora.data.questions import Question, load_questions
from medmcqa_lora.data.similarity import NEAR, normalise, overlap_key, shingles
from medmcqa_lora.data.tokens import encoding_key, sample_tokenizer

EVALUATION = load_questions("sample", "validation").questions
OPTIONS = ("Tyrosinase", "Phenylalanine hydroxylase", "Homogentisate oxidase", "Fumarase")
Q = Question("v1", "Which enzyme is deficient in classical phenylketonuria?", OPTIONS, 1,
             where="line 1")


def kind_of(row: Question, evaluation: list[Question]) -> str:
    """The kind of a training row's overlap."""
    found = find_overlaps([row], evaluation).training
    return found[0].kind if found else "none"


def respelt(q: Question, change) -> Question:
    """A copy of a question with all its texts changed."""
    return replace(q, id="t", question=change(q.question), options=tuple(map(change, q.options)))


def full_width(text: str) -> str:
    return "".join(chr(ord(c) + 0xFEE0) if "!" <= c <= "~" else c for c in text)


def with_invisible_marks(text: str) -> str:
    return "\u202e" + text.replace("e", "e\u200b")


def json_row(q: Question, **more) -> str:
    """A question as a line of a JSON-lines file."""
    options = {f"op{letter}": option for letter, option in zip("abcd", q.options)}
    return json.dumps(dict(question=q.question, **options) | more) + "\n"


PLANTED = {  # change -> kind, what it does
    "as it is": ("exact", lambda q: replace(q, id="t")),
    "another answer and subject":
        ("exact", lambda q: replace(q, id="t", answer=(q.answer + 1) % 4, subject="Surgery")),
    "white space": ("exact", lambda q: respelt(q, lambda t: f" {t} ".replace(" ", " \n\t"))),
    "no-break spaces": ("exact", lambda q: respelt(q, lambda t: t.replace(" ", "\u00a0"))),
    "upper case": ("normalised", lambda q: respelt(q, str.upper)),
    "options' order": ("normalised", lambda q: replace(q, options=q.options[::-1])),
    "punctuation":
        ("normalised", lambda q: respelt(q, lambda t: t.replace(" ", ", ", 1) + " :-")),
    "full width": ("normalised", lambda q: respelt(q, full_width)),
    "soft hyphens": ("normalised", lambda q: respelt(q, lambda t: "\u00ad".join(t))),
    "zero-width spaces and direction marks":
        ("normalised", lambda q: respelt(q, with_invisible_marks)),
    "a word of the stem": ("near", lambda q: replace(q, question=q.question + " mainly")),
    "one option":
        ("near", lambda q: replace(q, options=(*q.options[:3], "nothing of the kind"))),
    "another stem":
        ("options", lambda q: replace(q, question="Choose", options=q.options[::-1])),
    "everything":
        ("none", lambda q: replace(q, question="Choose one", options=("p", "q", "r", "s"))),
}


@pytest.mark.parametrize("change", PLANTED)
def test_planted_rows_are_found(change):
    """Of each of the sample's 80 evaluation rows a copy, all at once."""
    kind, make = PLANTED[change]
    places = range(len(EVALUATION))
    found = find_overlaps([make(q) for q in EVALUATION], EVALUATION).training
    kinds = [found[i].kind if i in found else "none" for i in places]
    if kind in ("near", "options"):
        # where stems are short, a word more is much, and equal options are most of a question
        assert set(kinds) <= {"near", "options"} and kinds.count(kind) > 60
        assert all(o.similarity >= NEAR for o in found.values() if o.kind == "near")
        assert all(o.similarity < NEAR for o in found.values() if o.kind == "options")
    else:
        assert kinds == [kind] * len(EVALUATION)
    if kind in ("exact", "normalised"):
        assert [found[i].evaluation.id for i in places] == [q.id for q in EVALUATION]


NOT_NORMALISED = {
    "a sign": (lambda t: f"{t} > 5 cm", lambda t: f"{t} < 5 cm"),
    "a charge": (lambda t: f"{t} Ca++", lambda t: f"{t} Ca"),
    "a decimal point": (lambda t: f"{t} 1.5 mg", lambda t: f"{t} 15 mg"),
    "a Greek letter": (lambda t: f"{t} α chain", lambda t: f"{t} β chain"),
    "an accent": (lambda t: f"{t} résumé", lambda t: f"{t} resume"),
    "a word": (lambda t: f"{t} is not true", lambda t: f"{t} is true"),
}


@pytest.mark.parametrize("change", NOT_NORMALISED)
def test_what_differs_stays_different(change):
    one, other = NOT_NORMALISED[change]
    row = replace(Q, question=one(Q.question))
    assert kind_of(row, [replace(Q, question=other(Q.question))]) == "near"


def test_near_misses():
    """Another question of the same form, and one about the same thing, are no near-duplicates."""
    same_form = replace(Q, question="Which enzyme is deficient in classical galactosaemia?",
                        options=("Lactase", "GALT", "Aldolase B", "Galactokinase"))
    assert kind_of(same_form, [Q]) == "none"
    inheritance = ("Autosomal dominant", "Autosomal recessive", "X-linked", "Mitochondrial")
    same_subject = replace(Q, question="Classical phenylketonuria is inherited as",
                           options=inheritance)
    assert kind_of(same_subject, [Q]) == "none"


SCRIPTS = [
    "मधुमेह में कौन सा हार्मोन कम होता है?", "أي عضو يصنع الأنسولين؟", "哪个器官产生胰岛素？",
    "Ποιο όργανο παράγει ινσουλίνη;", "🫀 or 🫁?", "e\u0301pithe\u0301lium", "?", "…",
]


@pytest.mark.parametrize("text", SCRIPTS)
def test_scripts(text):
    row = replace(Q, question=text, options=(f"{text} 1", f"{text} 2", "+", "-"))
    decomposed = respelt(row, lambda t: unicodedata.normalize("NFD", t))
    assert kind_of(replace(row, options=row.options[::-1]), [row]) == "normalised"
    assert kind_of(decomposed, [row]) in ("exact", "normalised")
    assert kind_of(replace(Q, options=("p", "q", "r", "s")), [row]) == "none"


def test_options_of_punctuation_differ():
    row = replace(Q, options=("+", "-", "±", "?"))
    assert len(set(overlap_key(row)[1:])) == 4
    assert kind_of(replace(row, options=("+", "-", "±", "!")), [row]) == "near"


def is_invisible(text: str) -> bool:
    return all(unicodedata.category(c) == "Cf" or c.isspace() for c in text)


def test_normalising_twice_changes_nothing():
    """Every character (in make test a sample), alone and between others; and random strings."""
    draw = random.Random(0)
    points = [c for c in range(sys.maxunicode + 1) if not 0xD800 <= c < 0xE000]
    points = points if ALL else [*range(0x3000), *draw.sample(points, 20_000)]
    texts = []
    for c in map(chr, points):
        texts += [c, f"a{c}\u0301", f"{c}\u0345\u0301", f"x{c}y"]
    for _ in range(20_000):
        texts.append("".join(chr(draw.choice(points)) for _ in range(draw.randint(0, 8))))
    assert [ascii(t) for t in texts if normalise(normalise(t)) != normalise(t)] == []
    lost = [t for t in texts if t.strip() and not normalise(t) and not is_invisible(t)]
    assert [ascii(t) for t in lost] == []
    assert normalise("1.5 mg") != normalise("15 mg")


def noisy(text: str, draw: random.Random) -> str:
    """A text with its case, invisible characters and final punctuation changed at random."""
    letters = []
    for c in text:
        is_letter = c.isalpha() and c.isascii()
        letters.append(draw.choice((c.upper(), c.lower(), c + "\u200d")) if is_letter else c)
    return "".join(letters) + draw.choice(("", "?", " ...", "\u200b"))


def test_shuffled_and_respelt_texts_have_one_key():
    draw = random.Random(1)
    for q in EVALUATION:
        shuffled = replace(q, options=tuple(draw.sample(q.options, 4)))
        assert overlap_key(respelt(shuffled, lambda t: noisy(t, draw))) == overlap_key(q)


def test_a_line_without_control_characters():
    red = replace(Q, question="a \x1b[31mred\x1b[0m word, and more " * 5)
    assert question_line(red).isprintable() and len(question_line(red)) <= 170
    row = replace(Q, question="Which?", options=("Liver", "Pancreas", "Spleen", "Kidney"))
    assert question_line(row) == "Which? | Liver | Pancreas | Spleen | Kidney"


def test_empty_sets():
    for training, evaluation in (([], []), ([], [Q]), ([Q], [])):
        found = find_overlaps(training, evaluation)
        assert not found.training and not found.evaluation
        assert "0 of 0" in describe_overlaps(found, "x")


def test_a_row_counts_once_under_its_closest_kind():
    other = replace(Q, id="v2", question=Q.question + " Name it.", where="line 2")
    rows = [replace(Q, id="t1"), replace(Q, id="t2", options=Q.options[::-1])]
    found = find_overlaps(rows, [Q, other])
    training = {i: (o.kind, o.evaluation.id) for i, o in found.training.items()}
    evaluation = {j: (o.kind, o.training.id) for j, o in found.evaluation.items()}
    assert training == {0: ("exact", "v1"), 1: ("normalised", "v1")}
    assert evaluation == {0: ("exact", "t1"), 1: ("near", "t1")}
    assert count_overlaps(found).sum().tolist() == [2, 2]


def test_many_equal_options_cost_little():
    """20,000 rows that offer the same four letters against 2,000 more would be 40 million pairs."""
    letters = replace(Q, options=("ab", "bc", "cd", "da"))
    rows = [replace(letters, id=str(i), question=f"stem{i}") for i in range(22_000)]
    found = find_overlaps(rows[2000:], rows[:2000], ("exact", "normalised", "options"))
    assert count_overlaps(found).loc["options"].tolist() == [20_000, 2000]


PRINT_SKETCHES = """
from medmcqa_lora.data.questions import load_questions
from medmcqa_lora.data.similarity import overlap_key, shingles, sketches
questions = load_questions("sample").questions[:20]
sets = (shingles(overlap_key(q)) for q in questions)
print([sketch.digest().tolist() for sketch in sketches(sets)])
"""


def test_every_process_has_the_same_sketches():
    """Ranks and resumed runs must leave out the same rows, whatever Python's own hashes are."""
    printed = set()
    for seed in ("1", "2"):
        path = os.pathsep.join([str(ROOT), *sys.path])
        done = subprocess.run(
            [sys.executable, "-c", PRINT_SKETCHES], capture_output=True, text=True, check=True,
            env=os.environ | {"PYTHONPATH": path, "PYTHONHASHSEED": seed}, cwd=ROOT)
        printed.add(done.stdout)
    assert len(printed) == 1 and len(json.loads(printed.pop())) == 20


def all_near_pairs(training: list, evaluation: list) -> set[tuple[int, int]]:
    """By comparing all pairs."""
    own, indexed = ([shingles(overlap_key(q)) for q in side] for side in (training, evaluation))
    rows = defaultdict(list)  # shingle -> places of the evaluation rows that have it
    for j, s in enumerate(indexed):
        for x in s:
            rows[x].append(j)
    sizes = np.array([*map(len, indexed)])
    pairs = set()
    for i, s in enumerate(own):
        places = np.concatenate([np.array(rows.get(x, []), int) for x in s])
        both = np.bincount(places, minlength=len(indexed))
        pairs |= {(i, int(j)) for j in np.flatnonzero(both / (len(s) + sizes - both) >= NEAR)}
    return pairs


def test_real_rows(train_rows, validation, cli, tmp_path):
    """No copies, and 12 questions that are nearly evaluation rows, as by comparing all pairs."""
    training = load_questions(str(train_rows)).questions
    evaluation = load_questions(str(validation)).questions
    truth = all_near_pairs(training, evaluation)
    near = {evaluation[j].id for _, j in truth}
    file = tmp_path / "list.jsonl"
    code, out, err = cli("check-data", train_rows, "--against", validation, "--out", file)
    assert code == 0, err
    listed = [json.loads(line) for line in file.read_text().splitlines()]
    assert {r["id"] for r in listed if r["kind"] == "near"} == near and len(truth) == 12
    assert {r["kind"] for r in listed} == {"near", "options"}
    assert "12 of 2,738 (0.44%)" in out and "12 of 4,183 (0.29%)" in out


def leaky(folder: Path) -> Recipe:
    """Five copies of evaluation rows, four respelt and three changed ones, and 40 other rows."""
    parts = (("as it is", EVALUATION[:5]), ("upper case", EVALUATION[5:9]),
             ("one option", EVALUATION[10:13]))
    rows = [PLANTED[change][1](q) for change, part in parts for q in part]
    rows += load_questions("sample", "train").questions[:40]
    lines = [json_row(q, id=f"t{i}", cop="ABCD"[q.answer]) for i, q in enumerate(rows)]
    (folder / "leaky.jsonl").write_text("".join(lines))
    return Recipe(data=str(folder / "leaky.jsonl"), train_split="", eval_data="sample")


def test_dropping(tmp_path):
    recipe = leaky(tmp_path)
    sets = {drop: load_pair(replace(recipe, drop_overlap=drop)) for drop in DROPS}
    kept = {drop: len(training.questions) for drop, (training, _) in sets.items()}
    near = kept["normalised"] - kept["near"]
    assert 2 <= near <= 3
    assert kept == {"none": 52, "exact": 47, "normalised": 43, "near": 43 - near}
    dropped = {drop: training.dropped for drop, (training, _) in sets.items()}
    assert dropped == {drop: 52 - n for drop, n in kept.items()}
    assert {len(evaluation.questions) for _, evaluation in sets.values()} == {80}
    assert list(sets["none"][0].problems) == ["in the evaluation rows, kept"]
    tokenizer = sample_tokenizer()
    keys = {encoding_key(training.questions, tokenizer, recipe) for training, _ in sets.values()}
    assert len(keys) == 4  # of the cache


def test_max_rows_come_after_dropping_and_max_eval_rows_hide_nothing(tmp_path):
    recipe = replace(leaky(tmp_path), drop_overlap="normalised", max_rows=20, max_eval_rows=2)
    training, evaluation = load_pair(recipe)
    assert (len(training.questions), len(evaluation.questions)) == (20, 2)
    assert training.dropped == 9


def test_a_run_records_what_it_left_out(cli, tmp_path):
    """In its notebook, its record and its card; and it resumes with the same rows only."""
    run = tmp_path / "run"
    settings = dict(data=leaky(tmp_path).data, train_split="", eval_data="sample", max_steps="1",
                    save_steps="1")
    options = [word for key, value in settings.items() for word in ("-p", key, value)]
    words = ("train", "--recipe", "toy", *options, "--out", run)
    drop = ("-p", "drop_overlap", "normalised")
    code, _, err = cli(*words, *drop)
    assert code == 0, err
    recorded = json.loads((run / "environment.json").read_text())["overlap"]
    assert recorded == {"drop_overlap": "normalised", "near_similarity": NEAR,
                        "rows": {"exact": 5, "normalised": 4}}
    sentence = ("Training rows that overlap with the evaluation rows, left out: "
                "5 exact, 4 normalised (near ones were not looked for).")
    assert sentence in (run / "README.md").read_text()
    assert sentence in (run / "train.ipynb").read_text()
    code, _, err = cli(*words, "--resume")
    assert code == 1 and "drop_overlap was 'normalised', is 'exact'" in err
    if ALL:
        code, _, err = cli(*words, *drop, "--resume")
        assert code == 0, err


def test_nothing_left_is_an_error(tmp_path):
    copies = [json_row(respelt(q, str.upper), cop="A") for q in EVALUATION]
    (tmp_path / "copies.jsonl").write_text("".join(copies))
    recipe = Recipe(data=str(tmp_path / "copies.jsonl"), train_split="", eval_data="sample")
    assert len(load_pair(recipe)[0].questions) == 80
    with pytest.raises(ValueError, match="every training row is also an evaluation row"):
        load_pair(replace(recipe, drop_overlap="normalised"))


def test_one_set_for_both_is_an_error(tmp_path):
    (tmp_path / "one.jsonl").write_text(json_row(Q, cop="A"))
    with pytest.raises(ValueError, match="every training row is also an evaluation row"):
        load_pair(Recipe(data=str(tmp_path / "one.jsonl")))


def test_options_of_check_data(cli, tmp_path):
    check = ("check-data", "sample")
    both = (*check, "--against", "sample")
    check_one_line(cli(*check, "--out", tmp_path / "x"), "--out", "goes with --against")
    check_one_line(cli(*check, "--against-split", "train"), "--against-split",
                   "goes with --against")
    check_one_line(cli(*both, "--against-split", "test"), "has no split 'test'")
    check_one_line(cli(*both, "--out", tmp_path), "exists already")
    check_one_line(cli(*both, "--out", tmp_path / "no/x"), "there is no folder")
    check_one_line(cli("train", "--recipe", "toy", "-p", "drop_overlap", "all"), "drop_overlap",
                   "one of none, exact, normalised, near")
    assert list(tmp_path.iterdir()) == []


def test_control_characters_are_not_shown(cli, tmp_path):
    """Ids, texts and file names come from anywhere."""
    evil = "\x1b[2J\u202e\x07\u2028"
    file = tmp_path / "e\x1b[31mvil.jsonl"
    row = dict(question=f"Which {evil} organ?", opa=f"Liver{evil}", opb="Spleen", opc="Spleen",
               opd="Kidney", cop=4, id=f"id{evil}")
    file.write_text(json.dumps(row) + "\n")
    code, out, _ = cli("check-data", file, "--against", file)
    assert code == 0
    assert "duplicate options: 1" in out and "exact, similarity 1.00" in out
    assert all(c.isprintable() or c == "\n" for c in out), ascii(out)


def write_scores(folder: Path, is_right) -> Path:
    """An evaluation of the sample by a model that knows the answer to question n if `is_right`."""
    from medmcqa_lora.evaluation.records import prediction_record
    from medmcqa_lora.evaluation.summary import write_evaluation

    predictions = []
    for n, q in enumerate(EVALUATION):
        chosen = (q.answer + (not is_right(n))) % 4
        predictions.append(prediction_record(q, [-float(i != chosen) for i in range(4)]))
    folder.mkdir()
    lines = "".join(json.dumps(p) + "\n" for p in predictions)
    (folder / "predictions.jsonl").write_text(lines)
    write_evaluation(folder, predictions, EVALUATION, "toy", None)
    return folder


def write_list(file: Path, kinds: dict[str, str]) -> Path:
    file.write_text("".join(json.dumps(dict(id=i, kind=k)) + "\n" for i, k in kinds.items()))
    return file


def test_compare_without(cli, tmp_path):
    """Scores in parts; a list of other rows is refused before anything is written."""
    base = write_scores(tmp_path / "base", lambda n: n % 4 == 0)
    tuned = write_scores(tmp_path / "tuned", lambda n: n % 4 == 0 or n < 20)
    seen = {q.id: "near" for q in EVALUATION[:20]} | {EVALUATION[20].id: "options"}
    seen_file = write_list(tmp_path / "seen.jsonl", seen)
    others = write_list(tmp_path / "others.jsonl", {"another": "near"})
    out_folder = tmp_path / "out"

    def compare(file):
        return cli("compare", base, tuned, "--without", file, "--out", out_folder)

    check_one_line(compare(others), "none of its 1 questions was scored")
    check_one_line(compare(tmp_path / "none.jsonl"), "can't be read")
    assert not out_folder.exists()
    code, out, err = compare(seen_file)
    assert code == 0, err
    assert "20 of 80 questions overlap" in out
    assert "without them the difference is +0.00 points instead of +18.75" in out
    parts = json.loads((out_folder / "overlap.json").read_text())["parts"]
    rest, overlapping = parts["rest"], parts["overlapping"]
    assert rest["n"] == 60 and rest["base"] == rest["tuned"] and rest["base"]["accuracy"] == 0.25
    assert parts["options alone, in the rest"]["n"] == 1
    assert overlapping["difference"] == 0.75 and 0 < overlapping["difference_ci95"][0] <= 0.75
    # Wilson for 20 of 20: 1 / (1 + 1.96**2 / 20)
    assert overlapping["tuned"]["ci95"] == [0.838875, 1.0]
