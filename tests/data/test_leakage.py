"""Planted overlaps of each kind are found, near-misses are not; what a run leaves out is counted, recorded and resumed."""
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

from medmcqa_lora.data.questions import Question, load_questions
from medmcqa_lora.data.leakage import load_pair
from medmcqa_lora.data.tokens import encoding_key, sample_tokenizer
from medmcqa_lora.data.similarity import NEAR, normalise, overlap_key, shingles
from medmcqa_lora.data.leakage import DROPS, count_overlaps, describe_overlaps, find_overlaps
from medmcqa_lora.core.recipe import Recipe

HELD = load_questions("sample", "validation").questions
Q = Question("v1", "Which enzyme is deficient in classical phenylketonuria?", ("Tyrosinase", "Phenylalanine hydroxylase", "Homogentisate oxidase", "Fumarase"), 1, where="line 1")


def kind_of(row: Question, held: list[Question] = HELD) -> str:
    return {i: o.kind for i, o in find_overlaps([row], held).training.items()}.get(0, "none")


def respelt(q: Question, f) -> Question:
    return replace(q, id="t", question=f(q.question), options=tuple(map(f, q.options)))


PLANTED = {
    "as it is": ("exact", lambda q: replace(q, id="t")),
    "another answer and subject": ("exact", lambda q: replace(q, id="t", answer=(q.answer + 1) % 4, subject="Surgery")),
    "white space": ("exact", lambda q: respelt(q, lambda t: f" {t} ".replace(" ", " \n\t"))),
    "upper case": ("normalised", lambda q: respelt(q, str.upper)),
    "options' order": ("normalised", lambda q: replace(q, options=q.options[::-1])),
    "punctuation": ("normalised", lambda q: respelt(q, lambda t: t.replace(" ", ", ", 1) + " :-")),
    "full width": ("normalised", lambda q: respelt(q, lambda t: "".join(chr(ord(c) + 0xFEE0) if "!" <= c <= "~" else c for c in t))),
    "soft hyphens": ("normalised", lambda q: respelt(q, lambda t: "\u00ad".join(t))),
    "zero-width spaces and direction marks": ("normalised", lambda q: respelt(q, lambda t: "\u202e" + t.replace("e", "e\u200b"))),
    "no-break spaces": ("exact", lambda q: respelt(q, lambda t: t.replace(" ", "\u00a0"))),
    "a word of the stem": ("near", lambda q: replace(q, question=q.question + " mainly")),
    "one option": ("near", lambda q: replace(q, options=(*q.options[:3], "nothing of the kind"))),
    "another stem": ("options", lambda q: replace(q, question="Choose", options=q.options[::-1])),
    "everything": ("none", lambda q: replace(q, question="Choose one", options=("p", "q", "r", "s"))),
}


@pytest.mark.parametrize("change", PLANTED)
def test_planted_rows_are_found(change):
    """Of each of the sample's 80 evaluation rows a copy, all at once."""
    kind, make = PLANTED[change]
    found = find_overlaps([make(q) for q in HELD], HELD)
    kinds = [found.training[i].kind if i in found.training else "none" for i in range(len(HELD))]
    if kind in ("near", "options"):  # where stems are short, a word more is much, and equal options are most of a question
        assert set(kinds) <= {"near", "options"} and kinds.count(kind) > 60
        assert all(o.similarity >= NEAR for o in found.training.values() if o.kind == "near")
        assert all(o.similarity < NEAR for o in found.training.values() if o.kind == "options")
    else:
        assert kinds == [kind] * len(HELD)
    if kind in ("exact", "normalised"):
        assert [found.training[i].evaluation.id for i in range(len(HELD))] == [q.id for q in HELD]


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
    assert kind_of(replace(Q, question=one(Q.question)), [replace(Q, question=other(Q.question))]) == "near"


def test_near_misses():
    """Another question of the same form, and one about the same thing, are no near-duplicates."""
    assert kind_of(replace(Q, question="Which enzyme is deficient in classical galactosaemia?", options=("Lactase", "GALT", "Aldolase B", "Galactokinase")), [Q]) == "none"
    assert kind_of(replace(Q, question="Classical phenylketonuria is inherited as", options=("Autosomal dominant", "Autosomal recessive", "X-linked", "Mitochondrial")), [Q]) == "none"


SCRIPTS = ["मधुमेह में कौन सा हार्मोन कम होता है?", "أي عضو يصنع الأنسولين؟", "哪个器官产生胰岛素？", "Ποιο όργανο παράγει ινσουλίνη;", "🫀 or 🫁?", "e\u0301pithe\u0301lium", "?", "…"]


@pytest.mark.parametrize("text", SCRIPTS)
def test_scripts(text):
    held = replace(Q, question=text, options=(f"{text} 1", f"{text} 2", "+", "-"))
    assert kind_of(replace(held, options=held.options[::-1]), [held]) == "normalised"
    assert kind_of(respelt(held, lambda t: unicodedata.normalize("NFD", t)), [held]) in ("exact", "normalised")
    assert kind_of(replace(Q, options=("p", "q", "r", "s")), [held]) == "none"


def test_options_of_punctuation_differ():
    held = replace(Q, options=("+", "-", "±", "?"))
    assert len(set(overlap_key(held)[1:])) == 4
    assert kind_of(replace(held, options=("+", "-", "±", "!")), [held]) == "near"


def test_normalising_twice_changes_nothing():
    """Every character there is (a part of them, sampled), alone, between letters and before accents; and random strings."""
    draw = random.Random(0)
    points = [c for c in range(sys.maxunicode + 1) if not 0xD800 <= c < 0xE000]
    points = points if ALL else [*range(0x3000), *draw.sample(points, 20_000)]
    texts = [t for c in map(chr, points) for t in (c, f"a{c}\u0301", f"{c}\u0345\u0301", f"x{c}y")]
    texts += ["".join(chr(draw.choice(points)) for _ in range(draw.randint(0, 8))) for _ in range(20_000)]
    assert [ascii(t) for t in texts if normalise(normalise(t)) != normalise(t)] == []
    assert [ascii(t) for t in texts if t.strip() and not normalise(t) and not all(unicodedata.category(c) == "Cf" or c.isspace() for c in t)] == []


def test_shuffled_and_respelt_texts_have_one_key():
    draw = random.Random(1)
    for q in HELD:
        def noise(t):
            return "".join(draw.choice((c.upper(), c.lower(), c + "\u200d")) if c.isalpha() and c.isascii() else c for c in t) + draw.choice(("", "?", " ...", "\u200b"))
        assert overlap_key(respelt(replace(q, options=tuple(draw.sample(q.options, 4))), noise)) == overlap_key(q)


def test_empty_sets():
    for training, evaluation in (([], []), ([], [Q]), ([Q], [])):
        found = find_overlaps(training, evaluation)
        assert not found.training and not found.evaluation
        assert "0 of 0" in describe_overlaps(found, "x")


def test_a_row_counts_once_under_its_closest_kind():
    other = replace(Q, id="v2", question=Q.question + " Name it.", where="line 2")
    found = find_overlaps([replace(Q, id="t1"), replace(Q, id="t2", options=Q.options[::-1])], [Q, other])
    assert {i: (o.kind, o.evaluation.id) for i, o in found.training.items()} == {0: ("exact", "v1"), 1: ("normalised", "v1")}
    assert {j: (o.kind, o.training.id) for j, o in found.evaluation.items()} == {0: ("exact", "t1"), 1: ("near", "t1")}
    assert count_overlaps(found).sum().tolist() == [2, 2]


def test_many_equal_options_cost_little():
    """20,000 rows that offer the same four letters against 2,000 more would be 40 million pairs."""
    rows = [replace(Q, id=str(i), question=f"stem{i}", options=("ab", "bc", "cd", "da")) for i in range(22_000)]
    found = find_overlaps(rows[2000:], rows[:2000], ("exact", "normalised", "options"))
    assert count_overlaps(found).loc["options"].tolist() == [20_000, 2000]


def test_every_process_has_the_same_sketches():
    """Ranks and resumed runs must leave out the same rows, whatever Python's own hashes are."""
    code = ("from medmcqa_lora.data.questions import load_questions; from medmcqa_lora.data.similarity import overlap_key, shingles, sketches\n"
            "print([s.digest().tolist() for s in sketches(shingles(overlap_key(q)) for q in load_questions('sample').questions[:20])])")
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    printed = {subprocess.run([sys.executable, "-c", code], env=env | {"PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True, cwd=ROOT).stdout for seed in ("1", "2")}
    assert len(printed) == 1 and len(json.loads(printed.pop())) == 20


def all_near_pairs(training: list, evaluation: list) -> set[tuple[int, int]]:
    """By comparing all pairs."""
    own, held = ([shingles(overlap_key(q)) for q in side] for side in (training, evaluation))
    rows, sizes, pairs = defaultdict(list), np.array([*map(len, held)]), set()
    for j, s in enumerate(held):
        for x in s:
            rows[x].append(j)
    for i, s in enumerate(own):
        both = np.bincount(np.concatenate([np.array(rows.get(x, []), int) for x in s]), minlength=len(held))
        pairs |= {(i, int(j)) for j in np.flatnonzero(both / (len(s) + sizes - both) >= NEAR)}
    return pairs


def test_real_rows(train_rows, validation, cli, tmp_path):
    """No copies in these training rows, and 12 questions that are nearly evaluation rows: the same as by comparing all pairs."""
    training, evaluation = load_questions(str(train_rows)).questions, load_questions(str(validation)).questions
    truth = all_near_pairs(training, evaluation)
    code, out, err = cli("check-data", train_rows, "--against", validation, "--out", tmp_path / "list.jsonl")
    assert code == 0, err
    listed = [json.loads(line) for line in (tmp_path / "list.jsonl").read_text().splitlines()]
    assert {r["id"] for r in listed if r["kind"] == "near"} == {evaluation[j].id for _, j in truth} and len(truth) == 12
    assert {r["kind"] for r in listed} == {"near", "options"} and "12 of 2,738 (0.44%)" in out and "12 of 4,183 (0.29%)" in out


def leaky(folder: Path) -> Recipe:
    """Of the sample's 80 evaluation rows five copies, four respelt and three changed ones, among 40 training rows."""
    rows = [PLANTED[change][1](q) for change, part in (("as it is", HELD[:5]), ("upper case", HELD[5:9]), ("one option", HELD[10:13])) for q in part]
    rows = [replace(q, id=f"t{i}") for i, q in enumerate([*rows, *load_questions("sample", "train").questions[:40]])]
    def line(q):
        return json.dumps(dict(id=q.id, question=q.question, **{f"op{c}": o for c, o in zip("abcd", q.options)}, cop="ABCD"[q.answer]))
    (folder / "leaky.jsonl").write_text("".join(f"{line(q)}\n" for q in rows))
    return Recipe(data=str(folder / "leaky.jsonl"), train_split="", eval_data="sample")


def test_dropping(tmp_path):
    recipe = leaky(tmp_path)
    sets = {drop: load_pair(replace(recipe, drop_overlap=drop)) for drop in DROPS}
    kept = {drop: len(training.questions) for drop, (training, _) in sets.items()}
    near = kept["normalised"] - kept["near"]
    assert 2 <= near <= 3 and kept == {"none": 52, "exact": 47, "normalised": 43, "near": 43 - near}
    assert {drop: training.dropped for drop, (training, _) in sets.items()} == {drop: 52 - n for drop, n in kept.items()}
    assert {len(evaluation.questions) for _, evaluation in sets.values()} == {80}
    assert list(sets["none"][0].problems) == ["in the evaluation rows, kept"]
    keys = {encoding_key(training.questions, sample_tokenizer(), recipe) for training, _ in sets.values()}
    assert len(keys) == 4  # of the cache


def test_max_rows_come_after_dropping_and_max_eval_rows_hide_nothing(tmp_path):
    training, evaluation = load_pair(replace(leaky(tmp_path), drop_overlap="normalised", max_rows=20, max_eval_rows=2))
    assert (len(training.questions), len(evaluation.questions), training.dropped) == (20, 2, 9)


def test_a_run_records_what_it_left_out(cli, tmp_path):
    """In its notebook, its record and its card; and it resumes with the same rows only."""
    words = ("train", "--recipe", "toy", "-p", "data", leaky(tmp_path).data, "-p", "train_split", "", "-p", "eval_data", "sample", "-p", "max_steps", "1", "-p", "save_steps", "1", "--out", tmp_path / "run")
    code, _, err = cli(*words, "-p", "drop_overlap", "normalised")
    assert code == 0, err
    assert json.loads((tmp_path / "run/environment.json").read_text())["overlap"] == {"drop_overlap": "normalised", "near_similarity": NEAR, "rows": {"exact": 5, "normalised": 4}}
    sentence = "Training rows that overlap with the evaluation rows, left out: 5 exact, 4 normalised (near ones were not looked for)."
    assert sentence in (tmp_path / "run/README.md").read_text() and sentence in (tmp_path / "run/train.ipynb").read_text()
    code, _, err = cli(*words, "--resume")
    assert code == 1 and "drop_overlap was 'normalised', is 'exact'" in err
    if ALL:
        code, _, err = cli(*words, "-p", "drop_overlap", "normalised", "--resume")
        assert code == 0, err


def test_nothing_left_is_an_error(cli, tmp_path):
    (tmp_path / "copies.jsonl").write_text("".join(json.dumps(dict(question=q.question.upper(), **{f"op{c}": o for c, o in zip("abcd", q.options)}, cop="A")) + "\n" for q in HELD))
    recipe = Recipe(data=str(tmp_path / "copies.jsonl"), train_split="", eval_data="sample")
    assert len(load_pair(recipe)[0].questions) == 80
    with pytest.raises(ValueError, match="every training row is also an evaluation row"):
        load_pair(replace(recipe, drop_overlap="normalised"))


def one_line(result, *parts):
    code, _, err = result
    assert code == 1 and err.count("\n") == 1 and all(p in err for p in parts), result


def test_options_of_check_data(cli, tmp_path):
    one_line(cli("check-data", "sample", "--out", tmp_path / "x"), "--out", "goes with --against")
    one_line(cli("check-data", "sample", "--against-split", "train"), "--against-split", "goes with --against")
    one_line(cli("check-data", "sample", "--against", "sample", "--against-split", "test"), "has no split 'test'")
    one_line(cli("check-data", "sample", "--against", "sample", "--out", tmp_path), "exists already")
    one_line(cli("check-data", "sample", "--against", "sample", "--out", tmp_path / "no/x"), "there is no folder")
    one_line(cli("train", "--recipe", "toy", "-p", "drop_overlap", "all"), "drop_overlap", "one of none, exact, normalised, near")
    assert list(tmp_path.iterdir()) == []


def test_control_characters_are_not_shown(cli, tmp_path):
    """Ids, texts and file names come from anywhere."""
    evil = "\x1b[2J\u202e\x07\u2028"
    file = tmp_path / "e\x1b[31mvil.jsonl"
    row = dict(question=f"Which {evil} organ?", opa=f"Liver{evil}", opb="Spleen", opc="Spleen", opd="Kidney", cop=4, id=f"id{evil}")
    file.write_text(json.dumps(row) + "\n")
    code, out, _ = cli("check-data", file, "--against", file)
    assert code == 0 and "duplicate options: 1" in out and "exact, similarity 1.00" in out
    assert all(c.isprintable() or c == "\n" for c in out), ascii(out)


def test_compare_without(cli, tmp_path):
    """Scores in parts through the command line; a list of other rows is refused before anything is written."""
    from medmcqa_lora.data.schemas import LETTERS
    from medmcqa_lora.evaluation.records import prediction
    from medmcqa_lora.evaluation.summary import write_evaluation

    for name, right in (("base", lambda i: i % 4 == 0), ("tuned", lambda i: i % 4 == 0 or i < 20)):
        (tmp_path / name).mkdir()
        predictions = [prediction(q, [-float(i != (q.answer + (not right(n))) % 4) for i in range(4)]) for n, q in enumerate(HELD)]
        (tmp_path / name / "predictions.jsonl").write_text("".join(json.dumps(p) + "\n" for p in predictions))
        write_evaluation(tmp_path / name, predictions, HELD, "toy", None)
    assert LETTERS == "ABCD"
    (tmp_path / "seen.jsonl").write_text("".join(json.dumps({"id": q.id, "kind": "near"}) + "\n" for q in HELD[:20]) + json.dumps({"id": HELD[20].id, "kind": "options"}) + "\n")
    (tmp_path / "others.jsonl").write_text('{"id": "another", "kind": "near"}\n')
    both = (tmp_path / "base", tmp_path / "tuned")
    one_line(cli("compare", *both, "--without", tmp_path / "others.jsonl", "--out", tmp_path / "out"), "none of its 1 questions was scored")
    one_line(cli("compare", *both, "--without", tmp_path / "none.jsonl", "--out", tmp_path / "out"), "can't be read")
    assert not (tmp_path / "out").exists()
    code, out, err = cli("compare", *both, "--without", tmp_path / "seen.jsonl", "--out", tmp_path / "out")
    assert code == 0, err
    assert "20 of 80 questions overlap" in out and "without them the difference is +0.00 points instead of +18.75" in out
    parts = json.loads((tmp_path / "out/overlap.json").read_text())["parts"]
    assert parts["rest"]["n"] == 60 and parts["rest"]["base"] == parts["rest"]["tuned"] and parts["rest"]["base"]["accuracy"] == 0.25
    assert parts["options alone, in the rest"]["n"] == 1 and parts["overlapping"]["difference"] == 0.75 and 0 < parts["overlapping"]["difference_ci95"][0] <= 0.75
    assert parts["overlapping"]["tuned"]["ci95"] == [0.838875, 1.0]  # Wilson for 20 of 20: 1 / (1 + 1.96**2 / 20)
