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

import pytest
from conftest import ROOT


@functools.cache
def sources() -> dict[str, str]:
    """What runs: the package, and the code of the run notebooks."""
    books = {p.name: json.loads(p.read_text())["cells"] for p in sorted((ROOT / "nbs/runs").glob("*.ipynb"))}
    code = {name: "\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "code") for name, cells in books.items()}
    return {str(p.relative_to(ROOT)): p.read_text() for p in sorted((ROOT / "medmcqa_lora").rglob("*.py"))} | code


@functools.cache
def nodes() -> list[ast.AST]:
    return [n for text in sources().values() for n in ast.walk(ast.parse(text))]


@functools.cache
def calls() -> list[tuple[str, dict, str]]:
    """Each call in it: of what, keywords, as written."""
    return [(ast.unparse(n.func), {k.arg: k.value for k in n.keywords}, ast.unparse(n)) for n in nodes() if isinstance(n, ast.Call)]


def test_something_is_searched():
    assert len(sources()) > 30 and len(calls()) > 3000


def test_no_pickle_is_imported():
    imported = {a.name.split(".")[0] for n in nodes() if isinstance(n, ast.Import) for a in n.names}
    imported |= {n.module.split(".")[0] for n in nodes() if isinstance(n, ast.ImportFrom) and n.module and not n.level}
    assert not imported & {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "jsonpickle"}


def test_nothing_is_called_that_runs_code_from_data():
    """torch.load only with weights_only=True; no pickled arrays or tables; no eval, exec or
    shell.
    """
    names = {"eval", "exec", "compile", "__import__", "os.system", "os.popen", "yaml.load", "yaml.unsafe_load", "pd.read_pickle", "pd.eval", "runpy.run_path"}
    found = [call for func, kw, call in calls() if func in names or "allow_pickle" in kw or func.endswith(".to_pickle")
             or (func.startswith("subprocess.") and "shell" in kw)
             or (func in ("torch.load", "torch.hub.load", "torch.jit.load", "torch_load") and ast.unparse(kw.get("weights_only", ast.Constant(None))) != "True")
             or (func.endswith("import_module") and not re.search(r"import_module\(('[\w.]+'|type\(self\).__module__)\)", call))]
    assert not found


def test_remote_code_is_never_trusted():
    """And never asked about: without the argument, transformers asks on the terminal."""
    assert {ast.unparse(kw["trust_remote_code"]) for _, kw, _ in calls() if "trust_remote_code" in kw} == {"False"}
    auto = [(call, kw) for func, kw, call in calls() if re.search(r"\bAuto\w+\.from_(pretrained|config)$", func)]
    assert len(auto) >= 6
    assert [call for call, kw in auto if "trust_remote_code" not in kw and "**where" not in call] == []
    assert "gguf_file=gguf.name, trust_remote_code=False" in sources()["medmcqa_lora/model/resolve.py"]  # **where


def test_the_trainers_arguments_are_never_read():
    """transformers pickles them beside every checkpoint, as training_args.bin; neither it nor
    this package loads them.
    """
    from transformers import trainer

    assert not any("training_args" in call and "load" in call for *_, call in calls())
    assert all("TRAINING_ARGS_NAME" not in line for line in Path(trainer.__file__).read_text().splitlines() if "load(" in line)


def test_advisories_are_asked_for_in_the_hosted_workflow_alone():
    assert "pip-audit --requirement requirements.txt" in (ROOT / ".github/workflows/audit.yml").read_text()
    assert not any("pip-audit" in (ROOT / f).read_text() for f in ("Makefile", ".ci/run", "tools/gates.py", "pyproject.toml"))
    assert "@" not in (ROOT / "SECURITY.md").read_text()  # nobody's address


class Payload:
    """Pickled, this makes a file when it is loaded."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return open, (str(self.file), "w")


@pytest.fixture
def harmed(tmp_path, monkeypatch):
    """The file that a payload makes; nobody is asked anything."""
    monkeypatch.setattr("builtins.input", lambda *a: pytest.fail(f"asked on the terminal: {a}"))
    file = tmp_path / "harmed"
    yield file
    assert not file.exists()


def test_the_payload_works(tmp_path):
    pickle.loads(pickle.dumps(Payload(tmp_path / "harmed"))).close()
    assert (tmp_path / "harmed").exists()


@pytest.fixture
def model(tmp_path):
    from medmcqa_lora.model.resolve import resolve_model

    return Path(shutil.copytree(resolve_model("toy-nemotron-h"), tmp_path / "model"))


def spoil(model: Path, harmed: Path, **config):
    """Give a model's folder Python files of its own."""
    for name in ("evil", "modeling_nemotron_h", "configuration_nemotron_h"):
        (model / f"{name}.py").write_text(f"open({str(harmed)!r}, 'w')\nclass Evil: pass\n")
    file = model / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | dict(auto_map={k: "evil.Evil" for k in ("AutoConfig", "AutoModelForCausalLM", "AutoTokenizer")}) | config))


def test_a_model_that_transformers_knows_brings_its_own_code(model, harmed):
    """As the 30B model on the hub does: transformers' code is used, auto_map means nothing."""
    import torch

    from medmcqa_lora.model.resolve import load_tokenizer
    from medmcqa_lora.model.load import load_model
    from medmcqa_lora.core.recipe_files import load_recipe

    spoil(model, harmed)
    recipe, plain = load_recipe("toy", {"model": str(model)}), load_recipe("toy")
    ids = torch.tensor([load_tokenizer(recipe)("Which organ?").input_ids])
    with torch.no_grad():
        assert torch.equal(load_model(recipe).eval()(input_ids=ids).logits, load_model(plain).eval()(input_ids=ids).logits)


def test_a_model_that_needs_its_own_code_is_refused(model, harmed):
    from medmcqa_lora.model.resolve import load_tokenizer
    from medmcqa_lora.model.checkpoint import model_structure
    from medmcqa_lora.model.load import load_model
    from medmcqa_lora.core.recipe_files import load_recipe

    spoil(model, harmed, model_type="evil", architectures=["Evil"])
    recipe = load_recipe("toy", {"model": str(model)})
    for ask in (lambda: model_structure(str(model)), lambda: load_model(recipe)):
        with pytest.raises(ValueError, match="custom code"):
            ask()
    (model / "tokenizer_config.json").write_text(json.dumps({"auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}, "tokenizer_class": "Evil"}))
    with pytest.raises(ValueError, match="can't be loaded"):
        load_tokenizer(recipe)


@pytest.mark.parametrize("container", ["zip", "pickle"])
def test_pickled_weights_are_not_read(container, model, harmed, tmp_path):
    """Neither in a folder, nor where only the hub knows what there is."""
    from medmcqa_lora.model.load import _load_hf, load_model
    from medmcqa_lora.core.recipe_files import load_recipe

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
    """A run of two steps with a checkpoint behind the first, and what makes its trainer again."""
    from medmcqa_lora.data.leakage import load_pair
    from medmcqa_lora.data.tokens import encode_questions
    from medmcqa_lora.launch.worker import World
    from medmcqa_lora.model.resolve import load_tokenizer
    from medmcqa_lora.model.load import load_model
    from medmcqa_lora.model.lora import attach_lora
    from medmcqa_lora.core.recipe_files import load_recipe
    from medmcqa_lora.training.trainer import make_trainer, run_training
    from medmcqa_lora.training.run_folder import start_run

    recipe = load_recipe("toy", dict(max_steps="2", save_steps="1", max_rows="8", save_total_limit="5", out=str(tmp_path_factory.mktemp("run") / "run")))
    tokenizer = load_tokenizer(recipe)
    encoded = encode_questions(load_pair(recipe)[0].questions, tokenizer, recipe)

    def again(run: Path):
        return make_trainer(attach_lora(load_model(recipe), recipe), tokenizer, encoded, recipe, run)

    run = start_run(recipe, World(0, 1))
    run_training(again(run), run)
    shutil.rmtree(run / "checkpoints/checkpoint-2")
    return run, again


FILES = ["training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth"]


@pytest.mark.parametrize("name", FILES)
def test_a_hostile_checkpoint(name, trained, harmed, tmp_path):
    from medmcqa_lora.training.trainer import run_training

    whole, again = trained
    run = Path(shutil.copytree(whole, tmp_path / "run"))
    assert (run / "checkpoints/checkpoint-1" / name).exists() == (name != "training_args.bin")  # which is not kept
    hostile(run / "checkpoints/checkpoint-1" / name, harmed)
    try:
        assert run_training(again(run), run, resume=True)["steps"] == 2
    except Exception as e:  # refused: a file was changed, or added, says the run
        assert re.search("weights.only|checksum|checkpoint", str(e), re.I), e


def test_a_hostile_adapter(trained, harmed, tmp_path):
    """PEFT falls back on a pickle where there are no safetensors; evaluate never gets that far,
    and a notebook gets an error.
    """
    from medmcqa_lora.model.load import load_model
    from medmcqa_lora.model.adapter import check_adapter, load_adapter
    from medmcqa_lora.core.recipe_files import load_recipe

    run, _ = trained
    adapter = Path(shutil.copytree(run / "checkpoints/checkpoint-1", tmp_path / "adapter"))
    (adapter / "adapter_model.safetensors").unlink()
    hostile(adapter / "adapter_model.bin", harmed)
    with pytest.raises(ValueError, match="adapter_model.safetensors"):
        check_adapter(adapter, "toy-nemotron-h")
    with pytest.raises(Exception, match="safetensors|weights.only"):
        load_adapter(load_model(load_recipe("toy")), adapter)


def test_an_adapter_that_names_a_module(trained, harmed, tmp_path, monkeypatch):
    from medmcqa_lora.model.load import load_model
    from medmcqa_lora.model.adapter import check_adapter, load_adapter
    from medmcqa_lora.core.recipe_files import load_recipe

    (tmp_path / "megatron.py").write_text(f"open({str(harmed)!r}, 'w')")  # the one name that PEFT allows
    monkeypatch.syspath_prepend(tmp_path)
    adapter = Path(shutil.copytree(trained[0] / "checkpoints/checkpoint-1", tmp_path / "adapter"))
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | dict(megatron_config={"tensor_model_parallel_size": 1}, megatron_core="megatron")))
    for ask in (lambda: check_adapter(adapter, "toy-nemotron-h"), lambda: load_adapter(load_model(load_recipe("toy")), adapter)):
        with pytest.raises(ValueError, match="would import a module"):
            ask()


def test_pickles_in_parquet(harmed, tmp_path, cli):
    """A column of pickled objects is bytes; Arrow's old Python extension type, which unpickled
    its own description, is not known any more.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    row = dict(question="?", opa="a", opb="b", opc="c", opd="d", cop=4)
    pq.write_table(pa.Table.from_pylist([row | dict(question=pickle.dumps(Payload(harmed)))]), tmp_path / "objects.parquet")
    code, _, err = cli("check-data", tmp_path / "objects.parquet")
    assert code == 1 and "row 1: field question is bytes, not text" in err
    extension = {b"ARROW:extension:name": b"arrow.py_extension_type", b"ARROW:extension:metadata": pickle.dumps(Payload(harmed))}
    schema = pa.schema([pa.field(k, pa.string() if isinstance(v, str) else pa.int64(), metadata=extension) for k, v in row.items()])
    pq.write_table(pa.Table.from_pylist([row], schema), tmp_path / "extension.parquet")
    assert cli("check-data", tmp_path / "extension.parquet")[0] == 0


HTML = '<script>window.harmed = "mcq"</script><img src=x onerror="window.harmed = \'mcq\'">'
TOKENS = {k: f"hf_{k.title().replace('_', '')}mcqFakeToken" for k in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY")}


def hostile_rows(folder: Path) -> Path:
    """Rows with HTML, a terminal's escapes and a broken formula in every field that is shown, in
    a file whose name is Python.
    """
    def row(i):
        return {"id": f"q{i}{HTML}", "question": f"{HTML}\x1b]0;mcq\x07 Which organ is number {i}? $\\x$", **{f"op{c}": f"{c} [link](javascript:mcq) {HTML}" for c in "abcd"}, "cop": i % 4 + 1,
                "subject_name": ["$\\x$", f"{HTML} | mcq", '=HYPERLINK("http://mcq")', "\x1b[2Jmcq"][i % 4], "choice_type": "$\\mcq{$", "split": "train" if i < 24 else "validation"}
    file = folder / 'rows"; open("harmed", "w"); x = ".jsonl'
    file.write_text("\n".join(json.dumps(row(i)) for i in range(36)))
    return file


class Shown(HTMLParser):
    """Where a page's marks stand: elements, attributes, or text."""

    def __init__(self, page: str):
        super().__init__()
        self.text, self.bad, self.inside = "", [], ""
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.inside = tag if tag in ("script", "style") else ""
        self.bad += [(tag, k, v) for k, v in attrs if v and "mcq" in v and k not in ("title", "alt", "id") and v != "http://mcq"]  # a bare address becomes a link in some readers

    def handle_endtag(self, tag):
        self.inside = ""

    def handle_data(self, data):
        if self.inside == "script" and "mcq" in data:
            self.bad.append(data)
        if not self.inside:
            self.text += data


@pytest.fixture(scope="module")
def hostile_run(tmp_path_factory):
    """train, through papermill, on hostile rows, into a folder whose name papermill would fill
    in, with tokens in the environment.
    """
    place = tmp_path_factory.mktemp("hostile")
    env = os.environ | TOKENS | dict(XDG_CACHE_HOME=str(place / "cache"), TMPDIR=str(place / "tmp"), PYTHONPATH=str(ROOT), HF_HUB_OFFLINE="1", COLUMNS="80")
    (place / "tmp").mkdir()
    words = ["train", "--recipe", "toy", "--out", "run{seed}{HF_TOKEN}", "-p", "data", hostile_rows(place).name, "-p", "max_steps", "2", "-p", "prompt_style", "chat"]
    done = subprocess.run([sys.executable, "-c", "import sys; from medmcqa_lora.cli import main; main(sys.argv[1:])", *words], cwd=place, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return place, place / "run{seed}{HF_TOKEN}", done


def test_values_reach_the_notebook_as_data(hostile_run):
    place, run, done = hostile_run
    assert sorted(p.name for p in place.iterdir()) == ["cache", 'rows"; open("harmed", "w"); x = ".jsonl', "run{seed}{HF_TOKEN}", "tmp"]
    assert json.loads((run / "recipe.json").read_text())["data"] == 'rows"; open("harmed", "w"); x = ".jsonl'
    assert (run / "adapter/adapter_model.safetensors").exists()


def test_tokens_are_nowhere(hostile_run):
    place, run, done = hostile_run
    assert not any(t in done.stdout + done.stderr for t in TOKENS.values())
    files = [p for p in place.rglob("*") if p.is_file()]
    assert len(files) > 15
    assert [p for p in files for t in TOKENS.values() if t.encode() in p.read_bytes()] == []


def test_a_terminal_obeys_nothing(hostile_run):
    _, run, done = hostile_run
    assert all(c.isprintable() or c in "\n\r" for c in done.stdout + re.sub(r"\x1b\[[A-Z0-9;]*[A-Zm]", "", done.stderr))
    texts = ["".join(o.get("text", "")) + "".join(o.get("data", {}).get("text/plain", "")) for c in json.loads((run / "train.ipynb").read_text())["cells"] for o in c.get("outputs", ())]
    assert len(texts) > 8 and not any("\x1b]" in t or "\x07" in t or "\x1b[2J" in t for t in texts)


def test_a_notebook_shows_html_as_text(hostile_run):
    from nbconvert import HTMLExporter

    page, _ = HTMLExporter().from_filename(str(hostile_run[1] / "train.ipynb"))
    shown = Shown(page)
    assert not shown.bad and "<script>window.harmed" in shown.text


def test_the_site_shows_html_as_text(hostile_run, tmp_path):
    pytest.importorskip("smalldocs", reason="smalldocs is not installed (extra docs)")
    (tmp_path / "_quarto.yml").write_text("project: {type: website}\nwebsite: {title: t}\nformat: html\n")
    shutil.copy(hostile_run[1] / "train.ipynb", tmp_path / "index.ipynb")
    shutil.copy(hostile_run[1] / "README.md", tmp_path / "card.md")
    subprocess.run([Path(sys.executable).parent / "smalldocs", "render", ".", "--quiet"], cwd=tmp_path, check=True, capture_output=True)
    pages = {p.name: Shown(p.read_text()) for p in tmp_path.rglob("*.html")}
    assert {"index.html", "card.html"} <= pages.keys()
    assert not any(p.bad for p in pages.values()) and "<script>window.harmed" in pages["index.html"].text


def test_reports_show_html_as_text(tmp_path, cli):
    """compare's Markdown, as the hub and the site turn it into HTML; its figures and its CSV."""
    from nbconvert.filters.markdown import markdown2html

    from medmcqa_lora.data.questions import load_questions
    from medmcqa_lora.evaluation.records import prediction_record
    from medmcqa_lora.evaluation.summary import write_evaluation

    questions = load_questions(str(hostile_rows(tmp_path)), "train").questions
    for name, shift in (("base", 1), ("tuned", 0)):
        (tmp_path / name).mkdir()
        made = [prediction_record(q, [-1.0 - 3.0 * (j != (q.answer + shift * (i % 2)) % 4) for j in range(4)]) for i, q in enumerate(questions)]
        (tmp_path / name / "predictions.jsonl").write_text("".join(json.dumps(p) + "\n" for p in made))
        write_evaluation(tmp_path / name, made, questions, f"{HTML}/m", None)
    code, out, err = cli("compare", tmp_path / "base", tmp_path / "tuned", "--out", tmp_path / "o")
    assert code == 0, err
    assert all(c.isprintable() or c == "\n" for c in out)
    text = (tmp_path / "o/comparison.md").read_text()
    shown = Shown(markdown2html(text))
    assert not shown.bad and "<script>window.harmed" in shown.text and "| mcq" in shown.text
    assert "'=HYPERLINK" in (tmp_path / "o/by_subject.csv").read_text() and "\x1b" not in text
