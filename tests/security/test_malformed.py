"""Rubbish in: each malformed input gives one line that says what, where and what to do, exit
code 1, and nothing half-written.

A case is a function that builds the input in an empty folder (the current one) and gives the
command's words; beside it is what the message must hold. Commands run in this process; a case that
gets as far as starting a run fails.
"""
import json
import os
import pickle
import shutil
import struct
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file

import medmcqa_lora.launch.launcher as launcher
from medmcqa_lora.analysis.published import published
from medmcqa_lora.core.recipe_files import load_recipe
from medmcqa_lora.model.adapter import save_adapter
from medmcqa_lora.model.load import load_model
from medmcqa_lora.model.lora import attach_lora
from medmcqa_lora.model.resolve import resolve_model

ROW = {
    "question": "Which organ makes insulin?",
    "opa": "Liver", "opb": "Pancreas", "opc": "Spleen", "opd": "Kidney", "cop": 4,
}
CSV = "question,opa,opb,opc,opd,cop\n"
DEEP = 100_000  # levels: the C stack of a careless parser ends before
LISTS, OBJECTS = "[" * DEEP, '{"a":' * DEEP
LONG = 100_000_000  # characters: built here, never committed


# Files

def lines(*rows) -> str:
    return "\n".join(r if isinstance(r, str) else json.dumps(r) for r in rows)


def put(name, content: str | bytes) -> Path:
    """A file of that name and content."""
    file = Path(name)
    file.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, str):
        content = content.encode("utf-8", "surrogatepass")
    file.write_bytes(content)
    return file


def put_json(name, value) -> Path:
    return put(name, json.dumps(value))


def edit(file: Path, **values):
    """Change keys of a JSON file."""
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def link(name, to):
    Path(name).symlink_to(to)
    return name


def replace_by_link(file: Path, to: str):
    file.unlink()
    link(file, to)


class Payload:
    """Pickled, this makes a file named `harmed` when it is loaded."""

    def __reduce__(self):
        return open, ("harmed", "w")


# Commands

def command(*words):
    """A command that needs no file of its own."""
    return lambda kit: list(words)


def plan(*words):
    return command("plan", *words)


def toy(*words):
    """train with the toy recipe."""
    return command("train", "--recipe", "toy", *words)


def ini(content, *words):
    """train with a recipe file of that content."""
    return lambda kit: ["train", "--recipe", put("mine.ini", content), *words]


def check(name, content):
    """check-data on a file of that name; the content may be a function, called when needed."""
    def words(kit):
        return ["check-data", put(name, content() if callable(content) else content)]
    return words


def check_link(to):
    """check-data on a link called a.jsonl."""
    return lambda kit: ["check-data", link("a.jsonl", to)]


def check_parquet(**changed):
    """check-data on a parquet file with one row, some of its columns changed."""
    def words(kit):
        columns = {name: [value] for name, value in ROW.items()} | changed
        pq.write_table(pa.table(columns), "a.parquet")
        return ["check-data", Path("a.parquet")]
    return words


# Data

def long_line() -> bytes:
    return b'{"question": "' + b"x" * LONG


def long_question() -> str:
    return lines({**ROW, "question": "x" * LONG})


def long_csv_field() -> bytes:
    return CSV.encode() + b"x" * LONG


def parquet_without_rows(kit):
    pq.write_table(pa.table({"question": [""][:0]}), "a.parquet")
    return ["check-data", Path("a.parquet")]


DATA_ENCODINGS = {
    "nothing but a byte order mark": (
        check("a.jsonl", b"\xef\xbb\xbf"), ["a.jsonl", "holds no rows"]),
    "UTF-16": (
        check("a.jsonl", lines(ROW).encode("utf-16")),
        ["a.jsonl: byte 0 is not UTF-8", "save the file as UTF-8"]),
    "Latin-1 in the second row": (
        check("a.jsonl", lines(ROW).encode() + b'\n{"question": "\xe9"}'),
        ["a.jsonl: byte 136 is not UTF-8"]),
    "half a surrogate pair in UTF-8": (
        check("a.csv", CSV.encode() + b"\xed\xa0\x80,1,2,3,4,0\n"), ["a.csv", "not UTF-8"]),
    "compressed": (check("a.jsonl", b"\x1f\x8b\x08\x00\x00\x00"), ["a.jsonl", "not UTF-8"]),
    "zeros": (check("a.jsonl", bytes(5000)), ["a.jsonl: line 1 is not JSON"]),
}

DATA_SIZES = {
    "a line of 100 MB, cut off": (
        check("a.jsonl", long_line), ["a.jsonl: line 1 is not JSON", "mend or delete that line"]),
    "a question of 100 MB": (
        check("a.jsonl", long_question),
        ["a.jsonl: line 1: field question has 100,000,000 characters"]),
    "a CSV field of 100 MB": (
        check("a.csv", long_csv_field), ["a.csv", "not CSV", "field larger than field limit"]),
    "lists nested too deeply, a line": (
        check("a.jsonl", lines(ROW, LISTS + "]" * DEEP)),
        ["a.jsonl: line 2 is not JSON", "recursion"]),
    "lists nested too deeply, a file": (check("a.json", LISTS), ["a.json: nested too deeply"]),
    "objects nested too deeply": (
        check("a.json", OBJECTS), ["a.json: line 1 is not JSON", "recursion"]),
    "a bomb inside a field": (
        check("a.jsonl", lines({"data": OBJECTS})),
        ["a.jsonl: line 1: field data.Options is missing"]),
    "a number of 5,000 digits": (
        check("a.json", '[{"cop": ' + "1" * 5000 + "}]"),
        ["a.json: a row is not JSON", "4300 digits", "mend the file"]),
}

DATA_STRUCTURE = {
    "a key twice": (
        check("a.jsonl", '{"question": "x", "question": "y"}'),
        ["a.jsonl: line 1 is not JSON", "'question' stands twice"]),
    "a key twice in an array": (
        check("a.json", '[{"opa": 1, "opa": 2}]'),
        ["a.json: a row is not JSON", "'opa' stands twice"]),
    "a column twice": (
        check("a.csv", "question,opa,opa,opb,opc,opd,cop\nq,1,2,3,4,5,0\n"),
        ["a.csv: line 1", "two columns are called opa"]),
    "a quote never closed": (
        check("a.csv", CSV + '"q,1,2,3,4,0\nq,1,2,3,4,1\n'),
        ["a.csv: line 3 is not CSV", "unexpected end of data"]),
    "a header alone": (check("a.csv", CSV), ["a.csv", "holds no rows"]),
    "rows too short": (
        check("a.csv", CSV + "q,1\n"),
        ["a.csv: none of 1 rows is usable", "empty option: 1 (line 2"]),
    "a number for a file": (
        check("a.jsonl", "5"), ["a.jsonl: line 1: is int, not an object"]),
    "null for a file": (
        check("a.json", "null"), ["a.json: line 1: is NoneType, not an object"]),
    "words for rows": (check("a.json", '["x"]'), ["a.json: row 1: is str, not an object"]),
}

DATA_FIELDS = {
    "a list for a question": (
        check("a.jsonl", lines({**ROW, "question": ["a"]})),
        ["a.jsonl: line 1: field question is list, not text"]),
    "an object for an option": (
        check("a.jsonl", lines(ROW, {**ROW, "opb": {"a": 1}})),
        ["a.jsonl: line 2: field opb is dict, not text"]),
    "a list for an answer": (
        check("a.jsonl", lines({**ROW, "cop": [1]})), ["a.jsonl: line 1: field cop is list"]),
    "NaN for an option": (
        check("a.jsonl", lines(ROW).replace('"Spleen"', "NaN")),
        ["a.jsonl: none of 1 rows is usable", "empty option: 1"]),
    "Infinity for a question": (
        check("a.jsonl", lines(ROW).replace('"Which organ makes insulin?"', "-Infinity")),
        ["empty question: 1"]),
    "Infinity for an answer": (
        check("a.jsonl", lines(ROW).replace("4}", "1e999}")), ["answer out of range: 1"]),
    "escapes in an id": (
        check("a.jsonl", lines({**ROW, "id": "\x1b]0;owned\x07q\u202e1", "opa": ""})),
        ["line 1 ]0;owned q 1"]),
    "escapes in a file's name": (
        check("a\x1b[2J.txt", ""), ["a [2J.txt", "can't tell its format"]),
}

DATA_PARQUET = {
    "an empty parquet file": (
        check("a.parquet", b""), ["a.parquet", "size is 0 bytes", "write it again"]),
    "a cut-off parquet file": (
        check("a.parquet", b"PAR1" + bytes(100) + b"PAR1"), ["a.parquet", "thrift"]),
    "parquet without rows": (parquet_without_rows, ["a.parquet", "holds no rows"]),
    "parquet with pickled objects": (
        check_parquet(question=[pickle.dumps(Payload())]),
        ["a.parquet: row 1: field question is bytes, not text"]),
    "parquet with lists": (
        check_parquet(opa=[["x"]]), ["a.parquet: row 1: field opa is list"]),
}

DATA_SOURCES = {
    "a link to itself": (
        check_link("a.jsonl"), ["a.jsonl", "Too many levels of symbolic links"]),
    "a link to nowhere": (
        check_link("none"), ["a.jsonl", "No such file", "check the path"]),
    "a name too long": (command("check-data", "x" * 5000 + ".jsonl"), ["File name too long"]),
    "a hub that is not asked": (
        command("check-data", "no/such"),
        ["no/such", "the hub did not give", "HF_HUB_OFFLINE"]),
    "no data": (command("check-data", ""), ["the source of the questions is empty"]),
}

DATA = (
    DATA_ENCODINGS | DATA_SIZES | DATA_STRUCTURE | DATA_FIELDS | DATA_PARQUET | DATA_SOURCES)


# Recipes and options

def folder_for_a_recipe(kit):
    Path("a.ini").mkdir()
    return ["plan", "--recipe", "a.ini"]


def link_for_a_recipe(kit):
    return ["plan", "--recipe", link("a.ini", "a.ini")]


UNKNOWN_KEYS = "".join(f"k{i} = 1\n" for i in range(3000))

RECIPE_FILES = {
    "Latin-1": (
        ini(b"[a]\nmodel = \xe9"),
        ["mine.ini", "'utf-8' codec", "compare it with settings.ini"]),
    "UTF-16": (
        ini("[a]\nlora_r = 4".encode("utf-16")), ["mine.ini", "not a readable .ini file"]),
    "an empty file": (ini(""), ["mine.ini: holds no settings"]),
    "no section": (ini("lora_r = 4"), ["mine.ini", "no section headers", "line: 1"]),
    "a section twice": (ini("[a]\n[a]\n"), ["mine.ini", "line 2", "already exists"]),
    "a key twice": (
        ini("[a]\nlora_r = 4\nlora_r = 5\n"),
        ["mine.ini", "line 3", "'lora_r'", "already exists"]),
    "a key without a value": (ini("[a]\nlora_r\n"), ["mine.ini", "line 2"]),
    "binary": (ini(bytes(range(128)) * 100), ["mine.ini", "not a readable .ini file"]),
    # found by fuzzing: the message had all of the lines
    "a thousand lines that are none": (
        ini("[a]\n" + "no value\n" * 1000),
        ["mine.ini: not a readable .ini file", "compare it with settings.ini"]),
    "3,000 unknown keys": (
        ini("[a]\n" + UNKNOWN_KEYS), ["unknown key k0", "and 2,988 more"]),
    "a folder": (folder_for_a_recipe, ["a.ini: no such file"]),
    "a link to itself": (link_for_a_recipe, ["a.ini: no such file"]),
    "a name too long": (plan("--recipe", "x" * 5000 + ".ini"), ["no such file"]),
}

RECIPE_VALUES = {
    "Infinity": (
        ini("[a]\nlearning_rate = Infinity\nnum_train_epochs = nan\n"),
        ["learning_rate = inf is not finite", "num_train_epochs = nan is not finite"]),
    "a number of 5,000 digits": (
        ini("[a]\nlora_r = " + "9" * 5000),
        ["mine.ini [a]: lora_r", "is not a whole number"]),
    "a number of 400 digits": (
        ini("[a]\nlora_r = " + "9" * 400), ["lora_r = that is beyond any use"]),
    "digits of another script": (
        ini("[a]\nlora_r = ٣"), ["lora_r = '٣' is not a whole number"]),
    "hexadecimal": (
        ini("[a]\nlora_r = 0x10"), ["lora_r = '0x10' is not a whole number"]),
    "a value of 1 MB": (
        ini("[a]\nmodel = " + "x" * 1_000_000), ["model xxx", "no such folder"]),
    "a NUL": (
        ini("[a]\ndata = a\0b.jsonl"), ["data holds a character that doesn't print"]),
    "escapes": (
        ini("[a]\nmodel = \x1b[31mred"), ["model holds a character that doesn't print"]),
    "two lines": (ini("[a]\nout = a\n  b"), ["out holds a character that doesn't print"]),
}

OPTIONS = {
    "no key": (toy("-p", "=3"), ["-p: unknown key"]),
    "a key of Python": (
        toy("-p", "__import__('os').system('touch harmed')", "1"),
        ["-p: unknown key __import__"]),
    "a value of Python": (
        toy("-p", "model", '"; open("harmed", "w"); "'),
        ['model "; open("harmed", "w"); "', "no such folder"]),
    "a path without end": (
        toy("-p", "data", "/a" * 3000 + ".jsonl"), ["can't be read (File name too long)"]),
    "flash_attention_2 without its package": (
        toy("-p", "attn_implementation", "flash_attention_2"),
        ["attn_implementation = flash_attention_2", "pip install flash-attn", "sdpa"]),
    "an attention of somebody's": (
        toy("-p", "attn_implementation", "evil/kernel"),
        ["attn_implementation = 'evil/kernel' is not one of sdpa"]),
    "max_length too small": (
        toy("-p", "max_length", "20"),
        ["max_length = 20: no example fits; the shortest has 59 tokens"]),
    "a tracker that is a module": (
        toy("-p", "report_to", "os"), ["report_to: os is unknown"]),
    "a tokenizer that goes up": (
        toy("-p", "tokenizer", "../../etc"), ["tokenizer ../../etc: can't be loaded"]),
    "plan: a model that isn't here": (
        plan("-p", "model", "no/such"),
        ["model no/such: its configuration can't be used"]),
    "plan: an endless memory": (plan("--gpu-memory", "inf"), ["--gpu-memory inf"]),
    "plan: a memory that is none": (plan("--gpu-memory", "nan"), ["--gpu-memory nan"]),
    "plan: max_length too small": (
        plan("--recipe", "toy", "-p", "max_length", "1"),
        ["max_length = 1", "no question fits"]),
}

RECIPES = RECIPE_FILES | RECIPE_VALUES | OPTIONS


# Output folders

def train_into_a_link(kit):
    return ["train", "--recipe", "toy", "--out", link("run", "none")]


def evaluate_into_a_link_to_itself(kit):
    return ["evaluate", "--recipe", "toy", "--out", link("run", "run")]


def train_into_a_folder_in_use(kit):
    return ["train", "--recipe", "toy", "--out", put("run/notes.txt", "mine").parent]


def merge_into_a_home_of_nobody(kit):
    return ["merge", kit.adapter(), "--out", "~nobody-here/m"]


def merge_into_the_adapter(kit):
    adapter = kit.adapter()
    return ["merge", adapter, "--out", adapter]


def export_to_a_format_that_is_a_path(kit):
    return ["export", kit.adapter(), "--out", "e", "--format", "../x"]


OUT = {
    "~ of nobody": (
        toy("--out", "~nobody-here/run"), ["--out ~nobody-here/run: begins with ~"]),
    "~ of nobody in a recipe": (
        ini("[a]\nmodel = toy-nemotron-h\nout = ~nobody-here/run"),
        ["~nobody-here/run: begins with ~"]),
    "an address": (toy("--out", "s3://bucket/run"), ["is an address, not a folder"]),
    "back up after a name": (
        toy("--out", "a/../../b"), ["goes back up with .. after a name"]),
    "too long": (toy("--out", "x" * 300), ["is too long"]),
    "a link to nowhere": (train_into_a_link, ["run: is a link to nowhere"]),
    "a link to itself": (evaluate_into_a_link_to_itself, ["run: is a link to nowhere"]),
    "escapes": (
        command("evaluate", "--recipe", "toy", "--out", "a\x1b[2Jb"),
        ["--out a [2Jb: holds a character that doesn't print"]),
    "a list of overlaps with an escape": (
        command("check-data", "sample", "--against", "sample", "--out", "a\x07b"),
        ["--out a b: holds a character"]),
    "a folder that is in use": (
        train_into_a_folder_in_use, ["--out run: holds another run"]),
    "a merged model under ~ of nobody": (
        merge_into_a_home_of_nobody, ["--out ~nobody-here/m: begins with ~"]),
    "an adapter's own folder": (merge_into_the_adapter, ["is not empty"]),
    "an exported format that is a path": (
        export_to_a_format_that_is_a_path, ["--format ../x: is not known"]),
}


# Adapters

def use_adapter(command: str, adapter) -> list:
    """The words that merge an adapter, or evaluate with it."""
    if command == "evaluate":
        return ["evaluate", "--recipe", "toy", "--adapter", adapter, "--out", "o"]
    return [command, adapter, "--out", "o"]


def adapter_config(command="evaluate", **config):
    """An adapter whose configuration says this."""
    def words(kit):
        adapter = kit.adapter()
        edit(adapter / "adapter_config.json", **config)
        return use_adapter(command, adapter)
    return words


def adapter_file(name, content, command="evaluate"):
    """An adapter with one of its files replaced."""
    def words(kit):
        adapter = kit.adapter()
        put(adapter / name, content)
        return use_adapter(command, adapter)
    return words


def adapter_tensors(change):
    """An adapter with all of its tensors changed."""
    def words(kit):
        adapter = kit.adapter()
        file = adapter / "adapter_model.safetensors"
        save_file({k: change(v).contiguous() for k, v in load_file(file).items()}, file)
        return use_adapter("evaluate", adapter)
    return words


def pickled_adapter(kit):
    adapter = kit.adapter()
    (adapter / "adapter_model.safetensors").unlink()
    put(adapter / "adapter_model.bin", pickle.dumps(Payload()))
    return use_adapter("evaluate", adapter)


def adapter_that_is_a_file(kit):
    return use_adapter("merge", kit.adapter() / "adapter_config.json")


def adapter_that_is_a_link(kit):
    return use_adapter("evaluate", link("a", "none"))


def adapter_of_a_base_that_is_not_here(kit):
    return [*use_adapter("merge", kit.adapter()), "--base", "no/such"]


def safetensors_file(table: dict | bytes, data=b"") -> bytes:
    """A safetensors file, or something like it: length of the table, table, data."""
    if isinstance(table, dict):
        table = json.dumps(table).encode()
    return struct.pack("<Q", len(table)) + table + data


def overlapping_tensors() -> bytes:
    """Two tensors of eight bytes each, which share four."""
    first = dict(dtype="F32", shape=[2], data_offsets=[0, 8])
    second = dict(dtype="F32", shape=[2], data_offsets=[4, 12])
    return safetensors_file(dict(a=first, b=second), bytes(12))


LACKS_FILES = "needs adapter_config.json and adapter_model.safetensors"

ADAPTER_CONFIGS = {
    "another rank than its tensors'": (
        adapter_config(r=8), ["in 24 of 24 tensors", "give the base it was made for"]),
    "another rank for one matrix": (
        adapter_config(rank_pattern={"q_proj": 99}),
        ["in 2 of 24 tensors", "q_proj.lora_A.weight (4, 64)"]),
    "a rank of 10⁹": (adapter_config(r=10**9), ["in 24 of 24 tensors"]),
    "a rank of 0": (
        adapter_config(r=0),
        ["configuration does not fit", "should be a positive integer"]),
    "a rank that is text": (adapter_config(r="x"), ["configuration does not fit"]),
    "a scale of NaN": (
        adapter_config(lora_alpha=float("nan")), ["adapter_config.json: not JSON (NaN"]),
    "targets that are a number": (
        adapter_config(target_modules=5), ["configuration does not fit"]),
    "targets that are no pattern": (
        adapter_config(target_modules="("),
        ["configuration does not fit", "unterminated subpattern"]),
    "an unknown kind": (
        adapter_config(peft_type="EVIL"), ["configuration does not fit", "EVIL"]),
    "a module to import": (
        adapter_config(megatron_config={"a": 1}, megatron_core="evil"),
        ["would import a module (megatron_config)"]),
    "a library to import": (
        adapter_config(auto_mapping={"parent_library": "evil", "base_model_class": "x"}),
        ["would import a module (auto_mapping)"]),
    "layers repeated a million times": (
        adapter_config("merge", layer_replication=[[0, 10**6]]),
        ["is not plain LoRA (layer_replication"]),
    "a configuration that is a list": (
        adapter_file("adapter_config.json", "[]"),
        ["adapter_config.json: is not a JSON object"]),
    "a configuration nested too deeply": (
        adapter_file("adapter_config.json", OBJECTS),
        ["adapter_config.json: nested too deeply"]),
}

ADAPTER_TENSORS = {
    "tensors of other shapes": (
        adapter_tensors(lambda t: t[:, :3]), ["in 24 of 24 tensors", "lora_A.weight (4, 3)"]),
    "tensors of NaN": (
        adapter_tensors(lambda t: t * float("nan")),
        ["is not finite: its training diverged"]),
    "tensors of whole numbers": (
        adapter_tensors(lambda t: t.char()), ["is I8, not a float"]),
    "an empty file": (
        adapter_file("adapter_model.safetensors", b""),
        ["not a whole safetensors file", "header too small"]),
    "a table of 2⁶⁴ bytes": (
        adapter_file("adapter_model.safetensors", b"\xff" * 8 + b"{}"),
        ["not a whole safetensors file", "header too large"]),
    "a table nested too deeply": (
        adapter_file("adapter_model.safetensors", safetensors_file(OBJECTS.encode())),
        ["not a whole safetensors file", "recursion limit"]),
    "tensors over one another": (
        adapter_file("adapter_model.safetensors", overlapping_tensors(), "merge"),
        ["not a whole safetensors file", "invalid offset"]),
    "a pickle instead": (pickled_adapter, [LACKS_FILES]),
}

ADAPTER_SURROUNDINGS = {
    "a broken recipe beside it": (
        adapter_file("../recipe.json", "{"), ["recipe.json: not JSON", "copy it again"]),
    "a recipe of other types beside it": (
        adapter_file("../recipe.json", '{"weights": 5}', "merge"),
        ["recipe.json: weights is not text"]),
    "a file for a folder": (adapter_that_is_a_file, [LACKS_FILES]),
    "a link to nowhere": (
        adapter_that_is_a_link, ["adapter a: needs adapter_config.json"]),
    "a base that isn't here": (
        adapter_of_a_base_that_is_not_here, ["model no/such: can't be fetched"]),
}

ADAPTERS = ADAPTER_CONFIGS | ADAPTER_TENSORS | ADAPTER_SURROUNDINGS


# Models

def model(change, *words):
    """train on the toy's folder, changed."""
    def made(kit):
        folder = kit.model()
        change(folder)
        return ["train", "--recipe", "toy", "-p", "model", folder, "--out", "o", *words]
    return made


def model_config(**values):
    return model(lambda folder: edit(folder / "config.json", **values))


def model_file(name, content, *words):
    return model(lambda folder: put(folder / name, content), *words)


def model_link(name, to):
    """train on the toy's folder with a link in place of a file."""
    return model(lambda folder: replace_by_link(folder / name, to))


def model_tensors(change, **values):
    """train on the toy's folder with all of its tensors in another type."""
    def made(folder):
        file = folder / "model.safetensors"
        changed = {k: change(v).contiguous() for k, v in load_file(file).items()}
        save_file(changed, file, {"format": "pt"})
        edit(folder / "config.json", **values)
    return model(made)


def to_int8(tensor):
    return tensor.char()


def to_float8(tensor):
    return tensor.to(torch.float8_e4m3fn) if tensor.ndim > 1 else tensor


def bring_code(folder: Path):
    auto_map = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    edit(folder / "config.json", model_type="evil", auto_map=auto_map)
    put(folder / "evil.py", 'open("harmed", "w")')


def bring_tokenizer_code(folder: Path):
    auto_map = {"AutoTokenizer": ["evil.Tokenizer", None]}
    config = {"auto_map": auto_map, "tokenizer_class": "EvilTokenizer"}
    put_json(folder / "tokenizer_config.json", config)
    put(folder / "evil.py", 'open("harmed", "w")')


def pickle_weights(folder: Path):
    (folder / "model.safetensors").unlink()
    put(folder / "pytorch_model.bin", pickle.dumps(Payload()))


def cut_weights(folder: Path):
    put(folder / "model.safetensors", (folder / "model.safetensors").read_bytes()[:9999])


def index_that_goes_up(folder: Path):
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    index = {"weight_map": {"a": "../../secret.safetensors"}}
    put_json(folder / "model.safetensors.index.json", index)


ESCAPING_TEMPLATE = "{{ ''.__class__.__mro__[1].__subclasses__() }}"
PROMISED_SCALES = {"quant_method": "fp8"}

MODEL_CODE = {
    "code of its own": (
        model(bring_code), ["its configuration can't be used", "custom code"]),
    "a tokenizer with code of its own": (
        model(bring_tokenizer_code), ["tokenizer", "can't be loaded", "custom code"]),
    "a kernel to fetch": (
        model_config(_attn_implementation="evil/kernel"),
        ["would fetch a kernel and run it (_attn_implementation = evil/kernel)"]),
    "a chat template that looks for a way out": (
        model_file("chat_template.jinja", ESCAPING_TEMPLATE, "-p", "prompt_style", "chat"),
        ["the tokenizer's chat template fails (SecurityError"]),
    "pickled weights alone": (model(pickle_weights), ["has no *.safetensors weights"]),
}

MODEL_CONFIGS = {
    "ten million blocks": (
        model_config(num_hidden_layers=10**7), ["config.json describes 10,000,000 blocks"]),
    "a list of 100,000 blocks": (
        model_config(layers_block_type=["mamba"] * 100_000),
        ["config.json describes 100,000 blocks (layers_block_type)"]),
    "a width of 10¹²": (
        model_config(hidden_size=10**12), ["weights and config.json disagree"]),
    "a negative width": (
        model_config(hidden_size=-1), ["its configuration can't be used"]),
    "NaN": (
        model_config(initializer_range=float("nan")), ["config.json: not JSON (NaN"]),
    "a configuration nested too deeply": (
        model_file("config.json", OBJECTS), ["config.json: nested too deeply"]),
    "a configuration in Latin-1": (
        model_file("config.json", b'{"a": "\xe9"}'), ["config.json: not JSON", "utf-8"]),
    "a key twice": (
        model_file("config.json", '{"a": 1, "a": 2}'),
        ["config.json: not JSON (the key 'a' stands twice"]),
    "a configuration that is a link to itself": (
        model_link("config.json", "config.json"), ["has no config.json"]),
}

MODEL_FILES = {
    "a tokenizer cut off": (
        model_file("tokenizer.json", "{"), ["tokenizer", "can't be loaded"]),
    "a tokenizer of other types": (
        model_file("tokenizer.json", '{"model": 5}'), ["tokenizer", "can't be loaded"]),
    "weights cut off": (
        model(cut_weights), ["not a whole safetensors file", "copy it again"]),
    "an index that goes up": (
        model(index_that_goes_up),
        ["'../../secret.safetensors', which is not a file beside it"]),
    "weights that are a link to nowhere": (
        model_link("model.safetensors", "none"), ["model.safetensors: missing"]),
    "int8 without scales": (
        model_tensors(to_int8),
        ["is I8 without scales (61 such weights)", "take the model in bfloat16"]),
    "fp8 without scales": (model_tensors(to_float8), ["is F8_E4M3 without scales"]),
    "fp8 that promises scales": (
        model_tensors(to_float8, quantization_config=PROMISED_SCALES),
        ["is F8_E4M3 without scales"]),
}

MODELS = MODEL_CODE | MODEL_CONFIGS | MODEL_FILES


# Evaluations and runs

SUBJECT = dict(n=2, accuracy=0.5, ci95=[0.1, 0.9])
SUMMARY = SUBJECT | dict(
    majority_baseline=0.5, letter_mass=0.5, by_subject={"ENT": SUBJECT}, data_sha256="x",
    model="m", adapter=None)
PREDICTION = dict(id="q0", subject="ENT", answer="A", prediction="B", correct=False)
SECOND = PREDICTION | dict(id="q1", prediction="A", correct=True)


def evaluation(folder, summary=SUMMARY, predictions=(PREDICTION, SECOND)) -> Path:
    """What evaluate leaves; a file's content may be given as text or bytes."""
    if not isinstance(summary, (str, bytes)):
        summary = json.dumps(summary)
    if not isinstance(predictions, (str, bytes)):
        predictions = "".join(json.dumps(p) + "\n" for p in predictions)
    put(f"{folder}/summary.json", summary)
    put(f"{folder}/predictions.jsonl", predictions)
    return Path(folder)


def compare(*words, **tuned):
    """compare, with a tuned model's evaluation that is broken."""
    def made(kit):
        folders = evaluation("base"), evaluation("tuned", **tuned)
        return ["compare", *folders, "--out", "o", *words]
    return made


def compare_summary(**changed):
    return compare(summary=SUMMARY | changed)


def compare_without_a_list(kit):
    words = compare()(kit)
    return [*words, "--without", put("list.jsonl", LISTS)]


def compare_with_an_empty_run(kit):
    for name in ("recipe", "environment", "result"):
        put(f"run/{name}.json", "{}")
    tuned = SUMMARY | dict(adapter="run/adapter")
    return ["compare", evaluation("base"), evaluation("tuned", summary=tuned)]


def report(**records):
    """report on a run whose record is broken; its evaluation is of the published rows."""
    def words(kit):
        given = published()
        subjects = {s: SUBJECT | dict(n=v["n"]) for s, v in given["by_subject"].items()}
        summary = SUMMARY | dict(
            n=given["n"], data_sha256=given["data_sha256"], adapter="run/adapter",
            by_subject=subjects)
        evaluation("run/tuned", summary)
        for name in ("recipe", "environment", "result"):
            put(f"run/{name}.json", records.get(name, "{}"))
        return ["report", "run", "--out", "o"]
    return words


NOT_A_RUN = "run: recipe.json, environment.json or result.json is not as train leaves it"

SUMMARIES = {
    "a summary nested too deeply": (
        compare(summary=OBJECTS), ["summary.json: nested too deeply", "evaluate again"]),
    "a summary with NaN": (
        compare_summary(accuracy=float("nan")), ["summary.json: not JSON (NaN"]),
    "a summary in UTF-16": (
        compare(summary=json.dumps(SUMMARY).encode("utf-16")), ["summary.json: not JSON"]),
    "an accuracy of 7": (
        compare_summary(accuracy=7.0),
        ["summary.json: accuracy is missing or of another kind"]),
    "an interval of words": (
        compare_summary(ci95=["a", "b"]), ["summary.json: accuracy"]),
    "subjects of another kind": (
        compare_summary(by_subject={"ENT": 5}), ["summary.json: by_subject of ENT"]),
    "a view of another kind": (
        compare_summary(generation=5), ["summary.json: generation"]),
    "half a surrogate pair in a summary": (
        compare_summary(by_subject={"\ud800": SUBJECT}), ["summary.json: by_subject of"]),
}

PREDICTIONS = {
    "a line nested too deeply": (
        compare(predictions=json.dumps(PREDICTION) + "\n" + LISTS + "\n"),
        ["predictions.jsonl: line 2 is not JSON"]),
    "predictions in Latin-1": (
        compare(predictions=b'{"id": "\xe9"}\n'), ["predictions.jsonl: line 1 is not JSON"]),
    # found by a property test
    "half a surrogate pair": (
        compare(predictions=[PREDICTION, PREDICTION | dict(id="q1", subject="\ud800")]),
        ["predictions.jsonl: line 2 is not a prediction"]),
    "an id twice": (
        compare(predictions=[PREDICTION] * 2),
        ["different questions (1 in one only, first q1)"]),
    "a letter that is none": (
        compare(predictions=[PREDICTION | dict(prediction="E")]),
        ["predictions.jsonl: line 1 is not a prediction"]),
    "a list of overlaps that is none": (
        compare_without_a_list, ["--without list.jsonl: line 1"]),
}

RUNS = {
    "a tuned model's run that is none": (compare_with_an_empty_run, [NOT_A_RUN]),
    "a run's recipe cut off": (report(recipe="{"), ["run/recipe.json: not JSON"]),
    "a run's record of other types": (report(environment='{"hardware": 5}'), [NOT_A_RUN]),
}


# Notebooks

def notebook(content):
    """train, with a run notebook that is broken."""
    def words(kit):
        text = content if isinstance(content, str) else json.dumps(content)
        kit.use_notebook(put("train.ipynb", text))
        return ["train", "--recipe", "toy", "--out", "o"]
    return words


CELL = dict(cell_type="code", source="", metadata={})
TAGGED = CELL | dict(metadata=dict(tags=["parameters"]))

NOTEBOOKS = {
    "cut off": (notebook('{"cells": ['), ["train.ipynb: not JSON"]),
    "nested too deeply": (
        notebook('{"cells": ' + LISTS), ["train.ipynb: nested too deeply"]),
    "of format 3": (
        notebook(dict(nbformat=3, worksheets=[])),
        ["train.ipynb: is not a notebook of format 4"]),
    "without the parameters tag": (
        notebook(dict(nbformat=4, cells=[CELL])), ["has 0 cells tagged parameters"]),
    "with the tag twice": (
        notebook(dict(nbformat=4, cells=[TAGGED] * 2)), ["has 2 cells tagged parameters"]),
    "with cells that are numbers": (
        notebook(dict(nbformat=4, cells=[5])), ["is not a notebook of format 4"]),
}


# The test

KINDS = dict(
    data=DATA, recipe=RECIPES, out=OUT, adapter=ADAPTERS, model=MODELS,
    predictions=SUMMARIES | PREDICTIONS | RUNS, notebook=NOTEBOOKS)
CASES = {f"{kind}: {name}": case for kind, cases in KINDS.items() for name, case in cases.items()}


@pytest.fixture(scope="session")
def intact_adapter(tmp_path_factory) -> Path:
    recipe = load_recipe("toy")
    folder = tmp_path_factory.mktemp("intact") / "adapter"
    return save_adapter(attach_lora(load_model(recipe), recipe), folder)


class Kit:
    """Copies of intact inputs in the current folder, to be broken."""

    def __init__(self, intact_adapter: Path, monkeypatch):
        self.intact_adapter, self.monkeypatch = intact_adapter, monkeypatch
        self.run_notebook = launcher.run_notebook  # the fixture forbids it

    def adapter(self) -> Path:
        return Path(shutil.copytree(self.intact_adapter, "run/adapter"))

    def model(self) -> Path:
        return Path(shutil.copytree(resolve_model("toy-nemotron-h"), "model"))

    def use_notebook(self, file: Path):
        """Make train use this notebook, and let it try."""
        self.monkeypatch.setattr(launcher, "shipped_file", lambda name: file)
        self.monkeypatch.setattr(launcher, "run_notebook", self.run_notebook)


@pytest.fixture
def kit(intact_adapter, monkeypatch, tmp_path) -> Kit:
    """An empty current folder; a run that would start is a failure."""
    made = Kit(intact_adapter, monkeypatch)
    monkeypatch.setattr(
        launcher, "run_notebook", lambda *args, **kwargs: pytest.fail("a run was started"))
    monkeypatch.setattr(
        "torch.distributed.launcher.api.elastic_launch",
        lambda *args: pytest.fail("processes were started"))
    monkeypatch.chdir(tmp_path)
    return made


def tree() -> set[str]:
    """All files and folders below the current one."""
    return {
        os.path.join(folder, name)
        for folder, folders, files in os.walk(".") for name in (*folders, *files)}


@pytest.mark.parametrize("name", CASES)
def test_malformed(name, kit, cli):
    make, expected = CASES[name]
    words = make(kit)
    before = tree()
    code, out, err = cli(*words)
    assert code == 1, (out, err)
    assert err.startswith("medmcqa-lora: ") and len(err) < 1300, err
    assert err.count("\n") == 1 and err[:-1].isprintable(), err
    for part in expected:
        assert part in err, (part, err)
    assert tree() == before and not Path("harmed").exists()


def test_there_are_enough():
    assert len(CASES) >= 60
