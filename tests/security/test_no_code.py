"""No code from data: what could run code is never called, and hostile files of every kind are read
as data.
"""
import ast
import functools
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import zipfile
from html.parser import HTMLParser
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import ROOT

from medmcqa_lora.core.recipe_files import load_recipe
from medmcqa_lora.data.leakage import load_pair
from medmcqa_lora.data.questions import load_questions
from medmcqa_lora.data.tokens import encode_questions
from medmcqa_lora.evaluation.records import prediction_record
from medmcqa_lora.evaluation.summary import write_evaluation
from medmcqa_lora.launch.worker import World
from medmcqa_lora.model.adapter import check_adapter, load_adapter
from medmcqa_lora.model.checkpoint import model_structure
from medmcqa_lora.model.load import _load_hf, load_model
from medmcqa_lora.model.lora import attach_lora
from medmcqa_lora.model.resolve import load_tokenizer, resolve_model
from medmcqa_lora.training.run_folder import start_run
from medmcqa_lora.training.trainer import make_trainer, run_training

# What the code calls


def notebook_code(file: Path) -> str:
    cells = json.loads(file.read_text())["cells"]
    return "\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "code")


@functools.cache
def sources() -> dict[str, str]:
    """What runs: the package, and the code of the run notebooks."""
    modules = sorted((ROOT / "medmcqa_lora").rglob("*.py"))
    books = sorted((ROOT / "nbs/runs").glob("*.ipynb"))
    package = {str(p.relative_to(ROOT)): p.read_text() for p in modules}
    return package | {p.name: notebook_code(p) for p in books}


@functools.cache
def nodes() -> list[ast.AST]:
    return [n for text in sources().values() for n in ast.walk(ast.parse(text))]


class Call(NamedTuple):
    """A call in the code: of what, its keyword arguments as written, all of it as written."""

    function: str
    keywords: dict[str | None, str]
    text: str


@functools.cache
def calls() -> list[Call]:
    found = [n for n in nodes() if isinstance(n, ast.Call)]
    return [
        Call(ast.unparse(n.func), {k.arg: ast.unparse(k.value) for k in n.keywords}, ast.unparse(n))
        for n in found]


def test_something_is_searched():
    assert len(sources()) > 30 and len(calls()) > 3000


PICKLERS = {
    "pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "jsonpickle",
}
RUNS_CODE = {
    "eval", "exec", "compile", "__import__", "os.system", "os.popen", "yaml.load",
    "yaml.unsafe_load", "pd.read_pickle", "pd.eval", "runpy.run_path",
}
TORCH_LOADS = ("torch.load", "torch.hub.load", "torch.jit.load", "torch_load")
# a literal name, or the module of an object's own class
FIXED_MODULE = re.compile(r"import_module\(('[\w.]+'|type\(self\).__module__)\)")
AUTO_CLASS = re.compile(r"\bAuto\w+\.from_(pretrained|config)$")


def test_no_pickle_is_imported():
    imported = {a.name.split(".")[0] for n in nodes() if isinstance(n, ast.Import) for a in n.names}
    absolute = [n for n in nodes() if isinstance(n, ast.ImportFrom) and n.module and not n.level]
    imported |= {n.module.split(".")[0] for n in absolute}
    assert not imported & PICKLERS


def test_nothing_is_called_that_runs_code_from_data():
    assert not [c.text for c in calls() if c.function in RUNS_CODE]


def test_arrays_and_tables_are_never_pickled():
    assert not [c.text for c in calls() if "allow_pickle" in c.keywords]
    assert not [c.text for c in calls() if c.function.endswith(".to_pickle")]


def test_no_shell_is_started():
    started = [c for c in calls() if c.function.startswith("subprocess.")]
    assert not [c.text for c in started if "shell" in c.keywords]


def test_torch_loads_only_weights():
    loads = [c for c in calls() if c.function in TORCH_LOADS]
    assert not [c.text for c in loads if c.keywords.get("weights_only") != "True"]


def test_modules_are_imported_by_fixed_names():
    imports = [c.text for c in calls() if c.function.endswith("import_module")]
    assert not [text for text in imports if not FIXED_MODULE.search(text)]


def test_remote_code_is_never_trusted():
    """And no user is asked about it: without the argument, transformers asks on the terminal."""
    given = {c.keywords["trust_remote_code"] for c in calls() if "trust_remote_code" in c.keywords}
    assert given == {"False"}
    auto = [c for c in calls() if AUTO_CLASS.search(c.function)]
    assert len(auto) >= 6
    without = [c.text for c in auto if "trust_remote_code" not in c.keywords]
    assert [text for text in without if "**where" not in text] == []
    resolve = sources()["medmcqa_lora/model/resolve.py"]  # where **where is made
    assert "gguf_file=gguf.name, trust_remote_code=False" in resolve


def test_the_trainers_arguments_are_never_read():
    """transformers pickles them beside every checkpoint, as training_args.bin; neither it nor
    this package loads them.
    """
    from transformers import trainer

    assert not any("training_args" in c.text and "load" in c.text for c in calls())
    lines = Path(trainer.__file__).read_text().splitlines()
    assert all("TRAINING_ARGS_NAME" not in line for line in lines if "load(" in line)


def test_advisories_are_asked_for_in_the_hosted_workflow_alone():
    workflow = (ROOT / ".github/workflows/audit.yml").read_text()
    assert "pip-audit --requirement requirements.txt" in workflow
    local = ("Makefile", ".ci/run", "tools/gates.py", "pyproject.toml")
    assert not any("pip-audit" in (ROOT / name).read_text() for name in local)
    assert "@" not in (ROOT / "SECURITY.md").read_text()  # nobody's address


# Files that would run code


class Payload:
    """Pickled, this makes a file when it is loaded."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return open, (str(self.file), "w")


@pytest.fixture
def harmed(tmp_path, monkeypatch):
    """The file that a payload makes; a question on the terminal is a failure, too."""
    monkeypatch.setattr("builtins.input", lambda *a: pytest.fail(f"asked on the terminal: {a}"))
    file = tmp_path / "harmed"
    yield file
    assert not file.exists()


def test_the_payload_works(tmp_path):
    pickle.loads(pickle.dumps(Payload(tmp_path / "harmed"))).close()
    assert (tmp_path / "harmed").exists()


@pytest.fixture
def model(tmp_path):
    return Path(shutil.copytree(resolve_model("toy-nemotron-h"), tmp_path / "model"))


def edit(file: Path, **values):
    """Change keys of a JSON file."""
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def add_code(model: Path, harmed: Path, **config):
    """Give a model's folder Python files of its own."""
    for name in ("evil", "modeling_nemotron_h", "configuration_nemotron_h"):
        (model / f"{name}.py").write_text(f"open({str(harmed)!r}, 'w')\nclass Evil: pass\n")
    auto = ("AutoConfig", "AutoModelForCausalLM", "AutoTokenizer")
    edit(model / "config.json", auto_map={k: "evil.Evil" for k in auto}, **config)


def logits(recipe, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return load_model(recipe).eval()(input_ids=ids).logits


def test_a_model_that_transformers_knows_brings_its_own_code(model, harmed):
    """As the 30B model on the hub does: transformers' code is used, auto_map means nothing."""
    add_code(model, harmed)
    recipe, plain = load_recipe("toy", {"model": str(model)}), load_recipe("toy")
    ids = torch.tensor([load_tokenizer(recipe)("Which organ?").input_ids])
    assert torch.equal(logits(recipe, ids), logits(plain, ids))


def test_a_model_that_needs_its_own_code_is_refused(model, harmed):
    add_code(model, harmed, model_type="evil", architectures=["Evil"])
    recipe = load_recipe("toy", {"model": str(model)})
    with pytest.raises(ValueError, match="custom code"):
        model_structure(str(model))
    with pytest.raises(ValueError, match="custom code"):
        load_model(recipe)


def test_a_tokenizer_that_needs_its_own_code_is_refused(model, harmed):
    add_code(model, harmed, model_type="evil", architectures=["Evil"])
    auto_map = {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}
    config = {"auto_map": auto_map, "tokenizer_class": "Evil"}
    (model / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="can't be loaded"):
        load_tokenizer(load_recipe("toy", {"model": str(model)}))


@pytest.mark.parametrize("container", ["zip", "pickle"])
def test_pickled_weights_are_not_read(container, model, harmed):
    """Neither in a folder, nor where only the hub knows what there is."""
    (model / "model.safetensors").unlink()
    hostile(model / "pytorch_model.bin", harmed, container)
    recipe = load_recipe("toy", {"model": str(model)})
    with pytest.raises(ValueError, match="no \\*.safetensors weights"):
        load_model(recipe)
    with pytest.raises(OSError, match="safetensors"):
        _load_hf(str(model), recipe)


def hostile(file: Path, harmed: Path, container: str = "zip"):
    """A checkpoint in torch's format, zipped or plain, whose pickle holds the payload."""
    data = pickle.dumps({"a": Payload(harmed)})
    if container == "pickle":
        return file.write_bytes(data)
    with zipfile.ZipFile(file, "w") as z:
        z.writestr("archive/data.pkl", data)
        z.writestr("archive/version", "3\n")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of two steps with a checkpoint after the first, and what makes its trainer again."""
    out = tmp_path_factory.mktemp("run") / "run"
    settings = dict(max_steps="2", save_steps="1", max_rows="8", save_total_limit="5")
    recipe = load_recipe("toy", settings | {"out": str(out)})
    tokenizer = load_tokenizer(recipe)
    encoded = encode_questions(load_pair(recipe)[0].questions, tokenizer, recipe)

    def trainer(run: Path):
        model = attach_lora(load_model(recipe), recipe)
        return make_trainer(model, tokenizer, encoded, recipe, run)

    run = start_run(recipe, World(0, 1))
    run_training(trainer(run), run)
    shutil.rmtree(run / "checkpoints/checkpoint-2")
    return run, trainer


FILES = ["training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth"]


@pytest.mark.parametrize("name", FILES)
def test_a_hostile_checkpoint(name, trained, harmed, tmp_path):
    finished, trainer = trained
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    file = run / "checkpoints/checkpoint-1" / name
    assert file.exists() == (name != "training_args.bin")  # which is not saved
    hostile(file, harmed)
    try:
        assert run_training(trainer(run), run, resume=True)["steps"] == 2
    except Exception as e:  # refused: a file was changed, or added, says the run
        assert re.search("weights.only|checksum|checkpoint", str(e), re.I), e


def test_a_hostile_adapter(trained, harmed, tmp_path):
    """PEFT falls back on a pickle where there are no safetensors; evaluate never gets that far,
    and a notebook gets an error.
    """
    run, _ = trained
    adapter = Path(shutil.copytree(run / "checkpoints/checkpoint-1", tmp_path / "adapter"))
    (adapter / "adapter_model.safetensors").unlink()
    hostile(adapter / "adapter_model.bin", harmed)
    with pytest.raises(ValueError, match="adapter_model.safetensors"):
        check_adapter(adapter, "toy-nemotron-h")
    with pytest.raises(Exception, match="safetensors|weights.only"):
        load_adapter(load_model(load_recipe("toy")), adapter)


def test_an_adapter_that_names_a_module(trained, harmed, tmp_path, monkeypatch):
    # the one name that PEFT allows
    (tmp_path / "megatron.py").write_text(f"open({str(harmed)!r}, 'w')")
    monkeypatch.syspath_prepend(tmp_path)
    run, _ = trained
    adapter = Path(shutil.copytree(run / "checkpoints/checkpoint-1", tmp_path / "adapter"))
    config = dict(megatron_config={"tensor_model_parallel_size": 1}, megatron_core="megatron")
    edit(adapter / "adapter_config.json", **config)
    with pytest.raises(ValueError, match="would import a module"):
        check_adapter(adapter, "toy-nemotron-h")
    base = load_model(load_recipe("toy"))
    with pytest.raises(ValueError, match="would import a module"):
        load_adapter(base, adapter)


ARROW_ROW = dict(question="?", opa="a", opb="b", opc="c", opd="d", cop=4)


def test_pickles_in_parquet(harmed, tmp_path, cli):
    """A column of pickled objects is bytes."""
    file = tmp_path / "objects.parquet"
    row = ARROW_ROW | dict(question=pickle.dumps(Payload(harmed)))
    pq.write_table(pa.Table.from_pylist([row]), file)
    code, _, err = cli("check-data", file)
    assert code == 1 and "row 1: field question is bytes, not text" in err


def test_pickled_types_in_parquet(harmed, tmp_path, cli):
    """Arrow's old Python extension type, which unpickled its own description, is not known any
    more.
    """
    file = tmp_path / "extension.parquet"
    extension = {
        b"ARROW:extension:name": b"arrow.py_extension_type",
        b"ARROW:extension:metadata": pickle.dumps(Payload(harmed)),
    }
    types = {k: pa.string() if isinstance(v, str) else pa.int64() for k, v in ARROW_ROW.items()}
    schema = pa.schema([pa.field(k, t, metadata=extension) for k, t in types.items()])
    pq.write_table(pa.Table.from_pylist([ARROW_ROW], schema), file)
    assert cli("check-data", file)[0] == 0


# Rows that would run code where they are shown

HTML = '<script>window.harmed = "mcq"</script><img src=x onerror="window.harmed = \'mcq\'">'
TOKEN_NAMES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY")
TOKENS = {k: f"hf_{k.title().replace('_', '')}mcqFakeToken" for k in TOKEN_NAMES}
PYTHON_NAME = 'rows"; open("harmed", "w"); x = ".jsonl'
SUBJECTS = ["$\\x$", f"{HTML} | mcq", '=HYPERLINK("http://mcq")', "\x1b[2Jmcq"]


def hostile_row(i: int) -> dict:
    """HTML, a terminal's escapes and a broken formula in every field that is shown."""
    options = {f"op{c}": f"{c} [link](javascript:mcq) {HTML}" for c in "abcd"}
    return {
        "id": f"q{i}{HTML}",
        "question": f"{HTML}\x1b]0;mcq\x07 Which organ is number {i}? $\\x$",
        **options,
        "cop": i % 4 + 1,
        "subject_name": SUBJECTS[i % 4],
        "choice_type": "$\\mcq{$",
        "split": "train" if i < 24 else "validation",
    }


def hostile_rows(folder: Path) -> Path:
    """Such rows, in a file whose name is Python."""
    file = folder / PYTHON_NAME
    file.write_text("\n".join(json.dumps(hostile_row(i)) for i in range(36)))
    return file


def can_run(attribute: str, value: str | None) -> bool:
    """Whether an attribute holds a mark where a browser could obey it."""
    if not value or "mcq" not in value or attribute in ("title", "alt", "id"): return False
    return value != "http://mcq"  # a bare address becomes a link in some readers


class Shown(HTMLParser):
    """Where a page's marks are: elements, attributes, or text."""

    def __init__(self, page: str):
        super().__init__()
        self.text = ""    # what a reader sees
        self.bad = []     # scripts and attributes with a mark
        self.inside = ""  # the script or style that is being read
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.inside = tag if tag in ("script", "style") else ""
        self.bad += [(tag, k, v) for k, v in attrs if can_run(k, v)]

    def handle_endtag(self, tag):
        self.inside = ""

    def handle_data(self, data):
        if self.inside == "script" and "mcq" in data:
            self.bad.append(data)
        if not self.inside:
            self.text += data


HOSTILE_OUT = "run{seed}{HF_TOKEN}"  # papermill would fill this in


@pytest.fixture(scope="module")
def hostile_run(tmp_path_factory):
    """train, through papermill, on hostile rows, with tokens in the environment."""
    place = tmp_path_factory.mktemp("hostile")
    (place / "tmp").mkdir()
    env = os.environ | TOKENS | dict(
        XDG_CACHE_HOME=str(place / "cache"), TMPDIR=str(place / "tmp"), PYTHONPATH=str(ROOT),
        HF_HUB_OFFLINE="1", COLUMNS="80")
    settings = ("data", hostile_rows(place).name), ("max_steps", "2"), ("prompt_style", "chat")
    words = ["train", "--recipe", "toy", "--out", HOSTILE_OUT]
    words += [word for key, value in settings for word in ("-p", key, value)]
    done = subprocess.run(
        [sys.executable, "-c", "import sys; from medmcqa_lora.cli import main; main(sys.argv[1:])",
         *words],
        cwd=place, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return place, place / HOSTILE_OUT, done


def test_values_reach_the_notebook_as_data(hostile_run):
    place, run, done = hostile_run
    left = sorted(p.name for p in place.iterdir())
    assert left == ["cache", PYTHON_NAME, HOSTILE_OUT, "tmp"]
    assert json.loads((run / "recipe.json").read_text())["data"] == PYTHON_NAME
    assert (run / "adapter/adapter_model.safetensors").exists()


def test_tokens_are_nowhere(hostile_run):
    place, run, done = hostile_run
    assert not any(t in done.stdout + done.stderr for t in TOKENS.values())
    files = [p for p in place.rglob("*") if p.is_file()]
    assert len(files) > 15
    assert [p for p in files for t in TOKENS.values() if t.encode() in p.read_bytes()] == []


def test_a_terminal_obeys_nothing(hostile_run):
    *_, done = hostile_run
    # colours and movements of the cursor are the progress bar's own
    err = re.sub(r"\x1b\[[A-Z0-9;]*[A-Zm]", "", done.stderr)
    assert all(c.isprintable() or c in "\n\r" for c in done.stdout + err)


def output_texts(notebook: Path) -> list[str]:
    """The text of each output of a notebook's cells."""
    cells = json.loads(notebook.read_text())["cells"]
    outputs = [output for cell in cells for output in cell.get("outputs", ())]
    return [
        "".join(o.get("text", "")) + "".join(o.get("data", {}).get("text/plain", ""))
        for o in outputs]


def test_a_notebook_holds_no_escapes(hostile_run):
    texts = output_texts(hostile_run[1] / "train.ipynb")
    assert len(texts) > 8
    assert not any(escape in text for text in texts for escape in ("\x1b]", "\x07", "\x1b[2J"))


def test_a_notebook_shows_html_as_text(hostile_run):
    from nbconvert import HTMLExporter

    page, _ = HTMLExporter().from_filename(str(hostile_run[1] / "train.ipynb"))
    shown = Shown(page)
    assert not shown.bad and "<script>window.harmed" in shown.text


def test_the_site_shows_html_as_text(hostile_run, tmp_path):
    pytest.importorskip("smalldocs", reason="smalldocs is not installed (extra docs)")
    settings = "project: {type: website}\nwebsite: {title: t}\nformat: html\n"
    (tmp_path / "_quarto.yml").write_text(settings)
    shutil.copy(hostile_run[1] / "train.ipynb", tmp_path / "index.ipynb")
    shutil.copy(hostile_run[1] / "README.md", tmp_path / "card.md")
    command = [Path(sys.executable).parent / "smalldocs", "render", ".", "--quiet"]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    pages = {p.name: Shown(p.read_text()) for p in tmp_path.rglob("*.html")}
    assert {"index.html", "card.html"} <= pages.keys()
    assert not any(p.bad for p in pages.values())
    assert "<script>window.harmed" in pages["index.html"].text


def letter_scores(likeliest: int) -> list[float]:
    """Log-probabilities of the four letters, one of them ahead."""
    return [-1.0 if letter == likeliest else -4.0 for letter in range(4)]


def write_hostile_evaluation(folder: Path, questions: list, shift: int):
    """An evaluation whose every second answer is `shift` letters after the right one."""
    answers = [(q.answer + shift * (i % 2)) % 4 for i, q in enumerate(questions)]
    made = [prediction_record(q, letter_scores(answer)) for q, answer in zip(questions, answers)]
    folder.mkdir()
    (folder / "predictions.jsonl").write_text("".join(json.dumps(p) + "\n" for p in made))
    write_evaluation(folder, made, questions, f"{HTML}/m", None)


def test_reports_show_html_as_text(tmp_path, cli):
    """compare's Markdown, as the hub and the site turn it into HTML; its figures and its CSV."""
    from nbconvert.filters.markdown import markdown2html

    questions = load_questions(str(hostile_rows(tmp_path)), "train").questions
    base, tuned, out = (tmp_path / name for name in ("base", "tuned", "o"))
    write_hostile_evaluation(base, questions, shift=1)
    write_hostile_evaluation(tuned, questions, shift=0)
    code, printed, err = cli("compare", base, tuned, "--out", out)
    assert code == 0, err
    assert all(c.isprintable() or c == "\n" for c in printed)
    text = (out / "comparison.md").read_text()
    shown = Shown(markdown2html(text))
    assert not shown.bad and "<script>window.harmed" in shown.text and "| mcq" in shown.text
    assert "'=HYPERLINK" in (out / "by_subject.csv").read_text() and "\x1b" not in text
