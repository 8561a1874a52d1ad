"""Rubbish in: each malformed input gives one line that says what, where and what to do, exit
code 1, and nothing half-written.

A case is a function that builds the input in an empty folder (the current one) and gives the
command's words; beside it stands what the message must hold. Commands run in this process; a case
that gets as far as starting a run fails.
"""
import json
import os
import pickle
import shutil
import struct
from pathlib import Path

import pytest

ROW = {"question": "Which organ makes insulin?", "opa": "Liver", "opb": "Pancreas", "opc": "Spleen", "opd": "Kidney", "cop": 4}
CSV = "question,opa,opb,opc,opd,cop\n"
DEEP = 100_000  # levels: the C stack of a careless parser ends before
LINE = 100_000_000  # characters: built here, never committed


def lines(*rows) -> str:
    return "\n".join(r if isinstance(r, str) else json.dumps(r) for r in rows)


def put(name, content) -> Path:
    file = Path(name)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))
    return file


def parquet(name, **columns) -> Path:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table(columns), name)
    return Path(name)


def check(name, content):
    """check-data on a file of that name and content."""
    return lambda kit: ["check-data", put(name, content)]


def link(name, to):
    Path(name).symlink_to(to)
    return name


class Payload:
    """Pickled, this makes a file named `harmed` when it is loaded."""

    def __reduce__(self):
        return open, ("harmed", "w")


DATA = {
    "nothing but a byte order mark": (check("a.jsonl", b"\xef\xbb\xbf"), ["a.jsonl", "holds no rows"]),
    "UTF-16": (check("a.jsonl", lines(ROW).encode("utf-16")), ["a.jsonl: byte 0 is not UTF-8", "save the file as UTF-8"]),
    "Latin-1 in the second row": (check("a.jsonl", lines(ROW).encode() + b'\n{"question": "\xe9"}'), ["a.jsonl: byte 136 is not UTF-8"]),
    "half a surrogate pair in UTF-8": (check("a.csv", CSV.encode() + b"\xed\xa0\x80,1,2,3,4,0\n"), ["a.csv", "not UTF-8"]),
    "compressed": (check("a.jsonl", b"\x1f\x8b\x08\x00\x00\x00"), ["a.jsonl", "not UTF-8"]),
    "zeros": (check("a.jsonl", bytes(5000)), ["a.jsonl: line 1 is not JSON"]),
    "a line of 100 MB, cut off": (check("a.jsonl", b'{"question": "' + b"x" * LINE), ["a.jsonl: line 1 is not JSON", "mend or delete that line"]),
    "a question of 100 MB": (lambda kit: ["check-data", put("a.jsonl", lines({**ROW, "question": "x" * LINE}))], ["a.jsonl: line 1: field question has 100,000,000 characters"]),
    "a CSV field of 100 MB": (check("a.csv", CSV.encode() + b"x" * LINE), ["a.csv", "not CSV", "field larger than field limit"]),
    "lists nested too deeply, a line": (check("a.jsonl", lines(ROW, "[" * DEEP + "]" * DEEP)), ["a.jsonl: line 2 is not JSON", "recursion"]),
    "lists nested too deeply, a file": (check("a.json", "[" * DEEP), ["a.json: nested too deeply"]),
    "objects nested too deeply": (check("a.json", '{"a":' * DEEP), ["a.json: line 1 is not JSON", "recursion"]),
    "a bomb inside a field": (check("a.jsonl", lines({"data": '{"a":' * DEEP})), ["a.jsonl: line 1: field data.Options is missing"]),
    "a number of 5,000 digits": (check("a.json", '[{"cop": ' + "1" * 5000 + "}]"), ["a.json: a row is not JSON", "4300 digits", "mend the file"]),
    "a key twice": (check("a.jsonl", '{"question": "x", "question": "y"}'), ["a.jsonl: line 1 is not JSON", "'question' stands twice"]),
    "a key twice in an array": (check("a.json", '[{"opa": 1, "opa": 2}]'), ["a.json: a row is not JSON", "'opa' stands twice"]),
    "a column twice": (check("a.csv", "question,opa,opa,opb,opc,opd,cop\nq,1,2,3,4,5,0\n"), ["a.csv: line 1", "two columns are called opa"]),
    "a quote never closed": (check("a.csv", CSV + '"q,1,2,3,4,0\nq,1,2,3,4,1\n'), ["a.csv: line 3 is not CSV", "unexpected end of data"]),
    "a header alone": (check("a.csv", CSV), ["a.csv", "holds no rows"]),
    "rows too short": (check("a.csv", CSV + "q,1\n"), ["a.csv: none of 1 rows is usable", "empty option: 1 (line 2"]),
    "a number for a file": (check("a.jsonl", "5"), ["a.jsonl: line 1: is int, not an object"]),
    "null for a file": (check("a.json", "null"), ["a.json: line 1: is NoneType, not an object"]),
    "words for rows": (check("a.json", '["x"]'), ["a.json: row 1: is str, not an object"]),
    "a list for a question": (check("a.jsonl", lines({**ROW, "question": ["a"]})), ["a.jsonl: line 1: field question is list, not text"]),
    "an object for an option": (check("a.jsonl", lines(ROW, {**ROW, "opb": {"a": 1}})), ["a.jsonl: line 2: field opb is dict, not text"]),
    "a list for an answer": (check("a.jsonl", lines({**ROW, "cop": [1]})), ["a.jsonl: line 1: field cop is list"]),
    "NaN for an option": (check("a.jsonl", lines(ROW).replace('"Spleen"', "NaN")), ["a.jsonl: none of 1 rows is usable", "empty option: 1"]),
    "Infinity for a question": (check("a.jsonl", lines(ROW).replace('"Which organ makes insulin?"', "-Infinity")), ["empty question: 1"]),
    "Infinity for an answer": (check("a.jsonl", lines(ROW).replace("4}", "1e999}")), ["answer out of range: 1"]),
    "escapes in an id": (check("a.jsonl", lines({**ROW, "id": "\x1b]0;owned\x07q\u202e1", "opa": ""})), ["line 1 ]0;owned q 1"]),
    "escapes in a file's name": (check("a\x1b[2J.txt", ""), ["a [2J.txt", "can't tell its format"]),
    "an empty parquet file": (check("a.parquet", b""), ["a.parquet", "size is 0 bytes", "write it again"]),
    "a cut-off parquet file": (check("a.parquet", b"PAR1" + bytes(100) + b"PAR1"), ["a.parquet", "thrift"]),
    "parquet without rows": (lambda kit: ["check-data", parquet("a.parquet", question=[""][:0])], ["a.parquet", "holds no rows"]),
    "parquet with pickled objects": (lambda kit: ["check-data", parquet("a.parquet", **{k: [v] for k, v in ROW.items()} | {"question": [pickle.dumps(Payload())]})],
                                     ["a.parquet: row 1: field question is bytes, not text"]),
    "parquet with lists": (lambda kit: ["check-data", parquet("a.parquet", **{k: [v] for k, v in ROW.items()} | {"opa": [["x"]]})], ["a.parquet: row 1: field opa is list"]),
    "a link to itself": (lambda kit: ["check-data", link("a.jsonl", "a.jsonl")], ["a.jsonl", "Too many levels of symbolic links"]),
    "a link to nowhere": (lambda kit: ["check-data", link("a.jsonl", "none")], ["a.jsonl", "No such file", "check the path"]),
    "a name too long": (lambda kit: ["check-data", "x" * 5000 + ".jsonl"], ["File name too long"]),
    "a hub that is not asked": (lambda kit: ["check-data", "no/such"], ["no/such", "the hub did not give", "HF_HUB_OFFLINE"]),
    "no data": (lambda kit: ["check-data", ""], ["the source of the questions is empty"]),
}


def ini(content, *words):
    return lambda kit: ["train", "--recipe", put("mine.ini", content), *words]


def toy(*words):
    return lambda kit: ["train", "--recipe", "toy", *words]


RECIPES = {
    "Latin-1": (ini(b"[a]\nmodel = \xe9"), ["mine.ini", "'utf-8' codec", "compare it with settings.ini"]),
    "UTF-16": (ini("[a]\nlora_r = 4".encode("utf-16")), ["mine.ini", "not a readable .ini file"]),
    "an empty file": (ini(""), ["mine.ini: holds no settings"]),
    "no section": (ini("lora_r = 4"), ["mine.ini", "no section headers", "line: 1"]),
    "a section twice": (ini("[a]\n[a]\n"), ["mine.ini", "line 2", "already exists"]),
    "a key twice": (ini("[a]\nlora_r = 4\nlora_r = 5\n"), ["mine.ini", "line 3", "'lora_r'", "already exists"]),
    "a key without a value": (ini("[a]\nlora_r\n"), ["mine.ini", "line 2"]),
    "binary": (ini(bytes(range(128)) * 100), ["mine.ini", "not a readable .ini file"]),
    "a thousand lines that are none": (ini("[a]\n" + "no value\n" * 1000), ["mine.ini: not a readable .ini file", "compare it with settings.ini"]),  # found by fuzzing: the message had all of them
    "3,000 unknown keys": (ini("[a]\n" + "".join(f"k{i} = 1\n" for i in range(3000))), ["unknown key k0", "and 2,988 more"]),
    "Infinity": (ini("[a]\nlearning_rate = Infinity\nnum_train_epochs = nan\n"), ["learning_rate = inf is not finite", "num_train_epochs = nan is not finite"]),
    "a number of 5,000 digits": (ini("[a]\nlora_r = " + "9" * 5000), ["mine.ini [a]: lora_r", "is not a whole number"]),
    "a number of 400 digits": (ini("[a]\nlora_r = " + "9" * 400), ["lora_r = that is beyond any use"]),
    "digits of another script": (ini("[a]\nlora_r = ٣"), ["lora_r = '٣' is not a whole number"]),
    "hexadecimal": (ini("[a]\nlora_r = 0x10"), ["lora_r = '0x10' is not a whole number"]),
    "a value of 1 MB": (ini("[a]\nmodel = " + "x" * 1_000_000), ["model xxx", "no such folder"]),
    "a NUL": (ini("[a]\ndata = a\0b.jsonl"), ["data holds a character that doesn't print"]),
    "escapes": (ini("[a]\nmodel = \x1b[31mred"), ["model holds a character that doesn't print"]),
    "two lines": (ini("[a]\nout = a\n  b"), ["out holds a character that doesn't print"]),
    "a folder": (lambda kit: ["plan", "--recipe", [Path("a.ini").mkdir(), "a.ini"][1]], ["a.ini: no such file"]),
    "a link to itself": (lambda kit: ["plan", "--recipe", link("a.ini", "a.ini")], ["a.ini: no such file"]),
    "a name too long": (lambda kit: ["plan", "--recipe", "x" * 5000 + ".ini"], ["no such file"]),
    "no key": (toy("-p", "=3"), ["-p: unknown key"]),
    "a key of Python": (toy("-p", "__import__('os').system('touch harmed')", "1"), ["-p: unknown key __import__"]),
    "a value of Python": (toy("-p", "model", '"; open("harmed", "w"); "'), ['model "; open("harmed", "w"); "', "no such folder"]),
    "a path without end": (toy("-p", "data", "/a" * 3000 + ".jsonl"), ["can't be read (File name too long)"]),
    "flash_attention_2 without its package": (toy("-p", "attn_implementation", "flash_attention_2"), ["attn_implementation = flash_attention_2", "pip install flash-attn", "sdpa"]),
    "an attention of somebody's": (toy("-p", "attn_implementation", "evil/kernel"), ["attn_implementation = 'evil/kernel' is not one of sdpa"]),
    "max_length too small": (toy("-p", "max_length", "20"), ["max_length = 20: no example fits; the shortest has 59 tokens"]),
    "a tracker that is a module": (toy("-p", "report_to", "os"), ["report_to: os is unknown"]),
    "a tokenizer that goes up": (toy("-p", "tokenizer", "../../etc"), ["tokenizer ../../etc: can't be loaded"]),
    "plan: a model that isn't here": (lambda kit: ["plan", "-p", "model", "no/such"], ["model no/such: its configuration can't be used"]),
    "plan: an endless memory": (lambda kit: ["plan", "--gpu-memory", "inf"], ["--gpu-memory inf"]),
    "plan: a memory that is none": (lambda kit: ["plan", "--gpu-memory", "nan"], ["--gpu-memory nan"]),
    "plan: max_length too small": (lambda kit: ["plan", "--recipe", "toy", "-p", "max_length", "1"], ["max_length = 1", "no question fits"]),
}

OUT = {
    "~ of nobody": (toy("--out", "~nobody-here/run"), ["--out ~nobody-here/run: begins with ~"]),
    "~ of nobody in a recipe": (ini("[a]\nmodel = toy-nemotron-h\nout = ~nobody-here/run"), ["~nobody-here/run: begins with ~"]),
    "an address": (toy("--out", "s3://bucket/run"), ["is an address, not a folder"]),
    "back up behind a name": (toy("--out", "a/../../b"), ["goes back up with .. behind a name"]),
    "too long": (toy("--out", "x" * 300), ["is too long"]),
    "a link to nowhere": (lambda kit: ["train", "--recipe", "toy", "--out", link("run", "none")], ["run: is a link to nowhere"]),
    "a link to itself": (lambda kit: ["evaluate", "--recipe", "toy", "--out", link("run", "run")], ["run: is a link to nowhere"]),
    "escapes": (lambda kit: ["evaluate", "--recipe", "toy", "--out", "a\x1b[2Jb"], ["--out a [2Jb: holds a character that doesn't print"]),
    "a list of overlaps with an escape": (lambda kit: ["check-data", "sample", "--against", "sample", "--out", "a\x07b"], ["--out a b: holds a character"]),
    "a folder that is in use": (lambda kit: ["train", "--recipe", "toy", "--out", put("run/notes.txt", "mine").parent], ["--out run: holds another run"]),
    "a merged model under ~ of nobody": (lambda kit: ["merge", kit.adapter(), "--out", "~nobody-here/m"], ["--out ~nobody-here/m: begins with ~"]),
    "an adapter's own folder": (lambda kit: ["merge", (a := kit.adapter()), "--out", a], ["is not empty"]),
    "an exported format that is a path": (lambda kit: ["export", kit.adapter(), "--out", "e", "--format", "../x"], ["--format ../x: is not known"]),
}


def header(content, data=b"") -> bytes:
    """A safetensors file."""
    table = content if isinstance(content, bytes) else json.dumps(content).encode()
    return struct.pack("<Q", len(table)) + table + data


def edited(file: Path, **values):
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def scored(**config):
    """evaluate with an adapter whose configuration says this."""
    def words(kit):
        edited((a := kit.adapter()) / "adapter_config.json", **config)
        return ["evaluate", "--recipe", "toy", "--adapter", a, "--out", "o"]
    return words


def written(name, content, command="evaluate"):
    """The same with one of its files replaced."""
    def words(kit):
        put((a := kit.adapter()) / name, content)
        return [command, *(["--recipe", "toy", "--adapter"] if command == "evaluate" else []), a, "--out", "o"]
    return words


def tensors(change, command="evaluate"):
    """The same with all tensors changed."""
    def words(kit):
        from safetensors.torch import load_file, save_file

        file = (a := kit.adapter()) / "adapter_model.safetensors"
        save_file({k: change(v).contiguous() for k, v in load_file(file).items()}, file)
        return [command, *(["--recipe", "toy", "--adapter"] if command == "evaluate" else []), a, "--out", "o"]
    return words


def pickled_adapter(kit):
    (a := kit.adapter()).joinpath("adapter_model.safetensors").unlink()
    put(a / "adapter_model.bin", pickle.dumps(Payload()))
    return ["evaluate", "--recipe", "toy", "--adapter", a, "--out", "o"]


ADAPTERS = {
    "another rank than its tensors'": (scored(r=8), ["in 24 of 24 tensors", "give the base it was made for"]),
    "another rank for one matrix": (scored(rank_pattern={"q_proj": 99}), ["in 2 of 24 tensors", "q_proj.lora_A.weight (4, 64)"]),
    "a rank of 10⁹": (scored(r=10**9), ["in 24 of 24 tensors"]),
    "a rank of 0": (scored(r=0), ["configuration does not fit", "should be a positive integer"]),
    "a rank that is text": (scored(r="x"), ["configuration does not fit"]),
    "a scale of NaN": (scored(lora_alpha=float("nan")), ["adapter_config.json: not JSON (NaN"]),
    "targets that are a number": (scored(target_modules=5), ["configuration does not fit"]),
    "targets that are no pattern": (scored(target_modules="("), ["configuration does not fit", "unterminated subpattern"]),
    "an unknown kind": (scored(peft_type="EVIL"), ["configuration does not fit", "EVIL"]),
    "a module to import": (scored(megatron_config={"a": 1}, megatron_core="evil"), ["would import a module (megatron_config)"]),
    "a library to import": (scored(auto_mapping={"parent_library": "evil", "base_model_class": "x"}), ["would import a module (auto_mapping)"]),
    "layers repeated a million times": (lambda kit: ["merge", *scored(layer_replication=[[0, 10**6]])(kit)[4:]], ["is not plain LoRA (layer_replication"]),
    "a configuration that is a list": (written("adapter_config.json", "[]"), ["adapter_config.json: is not a JSON object"]),
    "a configuration nested too deeply": (written("adapter_config.json", '{"a":' * DEEP), ["adapter_config.json: nested too deeply"]),
    "tensors of other shapes": (tensors(lambda t: t[:, :3]), ["in 24 of 24 tensors", "lora_A.weight (4, 3)"]),
    "tensors of NaN": (tensors(lambda t: t * float("nan")), ["is not finite: its training diverged"]),
    "tensors of whole numbers": (tensors(lambda t: t.char()), ["is I8, not a float"]),
    "an empty file": (written("adapter_model.safetensors", b""), ["not a whole safetensors file", "header too small"]),
    "a table of 2⁶⁴ bytes": (written("adapter_model.safetensors", b"\xff" * 8 + b"{}"), ["not a whole safetensors file", "header too large"]),
    "a table nested too deeply": (written("adapter_model.safetensors", header(b'{"a":' * DEEP)), ["not a whole safetensors file", "recursion limit"]),
    "tensors over one another": (written("adapter_model.safetensors", header({k: dict(dtype="F32", shape=[2], data_offsets=[i, i + 8]) for k, i in (("a", 0), ("b", 4))}, bytes(12)), "merge"),
                                 ["not a whole safetensors file", "invalid offset"]),
    "a pickle instead": (pickled_adapter, ["needs adapter_config.json and adapter_model.safetensors"]),
    "a broken recipe beside it": (written("../recipe.json", "{"), ["recipe.json: not JSON", "copy it again"]),
    "a recipe of other types beside it": (written("../recipe.json", '{"weights": 5}', "merge"), ["recipe.json: weights is not text"]),
    "a file for a folder": (lambda kit: ["merge", kit.adapter() / "adapter_config.json", "--out", "o"], ["needs adapter_config.json and adapter_model.safetensors"]),
    "a link to nowhere": (lambda kit: ["evaluate", "--recipe", "toy", "--adapter", link("a", "none"), "--out", "o"], ["adapter a: needs adapter_config.json"]),
    "a base that isn't here": (lambda kit: ["merge", kit.adapter(), "--out", "o", "--base", "no/such"], ["model no/such: can't be fetched"]),
}


def model(change, *words):
    """train on the toy's folder, changed."""
    def made(kit):
        change(m := kit.model())
        return ["train", "--recipe", "toy", "-p", "model", m, "--out", "o", *words]
    return made


def config(**values):
    return model(lambda m: edited(m / "config.json", **values))


def replaced(name, content):
    return model(lambda m: put(m / name, content))


def stored(change, **values):
    """All its tensors in another type."""
    def made(m):
        from safetensors.torch import load_file, save_file

        save_file({k: change(v).contiguous() for k, v in load_file(m / "model.safetensors").items()}, m / "model.safetensors", {"format": "pt"})
        edited(m / "config.json", **values)
    return model(made)


def fp8(t):
    import torch

    return t.to(torch.float8_e4m3fn) if t.ndim > 1 else t


def evil_code(m):
    edited(m / "config.json", model_type="evil", auto_map={"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"})
    put(m / "evil.py", 'open("harmed", "w")')


def evil_tokenizer(m):
    put(m / "tokenizer_config.json", json.dumps({"auto_map": {"AutoTokenizer": ["evil.Tokenizer", None]}, "tokenizer_class": "EvilTokenizer"}))
    put(m / "evil.py", 'open("harmed", "w")')


def only_pickled(m):
    (m / "model.safetensors").unlink()
    put(m / "pytorch_model.bin", pickle.dumps(Payload()))


def index_that_goes_up(m):
    (m / "model.safetensors").rename(m / "a.safetensors")
    put(m / "model.safetensors.index.json", json.dumps({"weight_map": {"a": "../../secret.safetensors"}}))


MODELS = {
    "code of its own": (model(evil_code), ["its configuration can't be used", "custom code"]),
    "a tokenizer with code of its own": (model(evil_tokenizer), ["tokenizer", "can't be loaded", "custom code"]),
    "a kernel to fetch": (config(_attn_implementation="evil/kernel"), ["would fetch a kernel and run it (_attn_implementation = evil/kernel)"]),
    "a chat template that looks for a way out": (model(lambda m: put(m / "chat_template.jinja", "{{ ''.__class__.__mro__[1].__subclasses__() }}"), "-p", "prompt_style", "chat"),
                                                 ["the tokenizer's chat template fails (SecurityError"]),
    "ten million blocks": (config(num_hidden_layers=10**7), ["config.json describes 10,000,000 blocks"]),
    "a list of 100,000 blocks": (config(layers_block_type=["mamba"] * 100_000), ["config.json describes 100,000 blocks (layers_block_type)"]),
    "a width of 10¹²": (config(hidden_size=10**12), ["weights and config.json disagree"]),
    "a negative width": (config(hidden_size=-1), ["its configuration can't be used"]),
    "NaN": (config(initializer_range=float("nan")), ["config.json: not JSON (NaN"]),
    "a configuration nested too deeply": (replaced("config.json", '{"a":' * DEEP), ["config.json: nested too deeply"]),
    "a configuration in Latin-1": (replaced("config.json", b'{"a": "\xe9"}'), ["config.json: not JSON", "utf-8"]),
    "a key twice": (replaced("config.json", '{"a": 1, "a": 2}'), ["config.json: not JSON (the key 'a' stands twice"]),
    "a tokenizer cut off": (replaced("tokenizer.json", "{"), ["tokenizer", "can't be loaded"]),
    "a tokenizer of other types": (replaced("tokenizer.json", '{"model": 5}'), ["tokenizer", "can't be loaded"]),
    "weights cut off": (model(lambda m: put(m / "model.safetensors", (m / "model.safetensors").read_bytes()[:9999])), ["not a whole safetensors file", "copy it again"]),
    "pickled weights alone": (model(only_pickled), ["has no *.safetensors weights"]),
    "an index that goes up": (model(index_that_goes_up), ["'../../secret.safetensors', which is not a file beside it"]),
    "weights that are a link to nowhere": (model(lambda m: ((m / "model.safetensors").unlink(), link(m / "model.safetensors", "none"))), ["model.safetensors: missing"]),
    "a configuration that is a link to itself": (model(lambda m: ((m / "config.json").unlink(), link(m / "config.json", "config.json"))), ["has no config.json"]),
    "int8 without scales": (stored(lambda t: t.char()), ["is I8 without scales (61 such weights)", "take the model in bfloat16"]),
    "fp8 without scales": (stored(fp8), ["is F8_E4M3 without scales"]),
    "fp8 that promises scales": (stored(fp8, quantization_config={"quant_method": "fp8"}), ["is F8_E4M3 without scales"]),
}

SUBJECT = dict(n=2, accuracy=0.5, ci95=[0.1, 0.9])
SUMMARY = SUBJECT | dict(majority_baseline=0.5, letter_mass=0.5, by_subject={"ENT": SUBJECT}, data_sha256="x", model="m", adapter=None)
PREDICTION = dict(id="q0", subject="ENT", answer="A", prediction="B", correct=False)


def evaluation(folder, summary=SUMMARY, predictions=(PREDICTION, PREDICTION | dict(id="q1", prediction="A", correct=True))) -> Path:
    put(f"{folder}/summary.json", summary if isinstance(summary, (str, bytes)) else json.dumps(summary))
    put(f"{folder}/predictions.jsonl", predictions if isinstance(predictions, (str, bytes)) else "".join(json.dumps(p) + "\n" for p in predictions))
    return Path(folder)


def compared(**tuned):
    return lambda kit: ["compare", evaluation("base"), evaluation("tuned", **tuned), "--out", "o"]


def reported(**records):
    """report on a run whose record is broken."""
    def words(kit):
        from medmcqa_lora.analysis.published import published

        p = published()
        whole = dict(n=p["n"], data_sha256=p["data_sha256"], adapter="run/adapter", by_subject={s: SUBJECT | dict(n=v["n"]) for s, v in p["by_subject"].items()})
        evaluation("run/tuned", SUMMARY | whole)
        for name in ("recipe", "environment", "result"):
            put(f"run/{name}.json", records.get(name, "{}"))
        return ["report", "run", "--out", "o"]
    return words


PREDICTIONS = {
    "a summary nested too deeply": (compared(summary='{"a":' * DEEP), ["summary.json: nested too deeply", "evaluate again"]),
    "a summary with NaN": (compared(summary=SUMMARY | dict(accuracy=float("nan"))), ["summary.json: not JSON (NaN"]),
    "a summary in UTF-16": (compared(summary=json.dumps(SUMMARY).encode("utf-16")), ["summary.json: not JSON"]),
    "an accuracy of 7": (compared(summary=SUMMARY | dict(accuracy=7.0)), ["summary.json: accuracy is missing or of another kind"]),
    "an interval of words": (compared(summary=SUMMARY | dict(ci95=["a", "b"])), ["summary.json: accuracy"]),
    "subjects of another kind": (compared(summary=SUMMARY | dict(by_subject={"ENT": 5})), ["summary.json: by_subject of ENT"]),
    "a view of another kind": (compared(summary=SUMMARY | dict(generation=5)), ["summary.json: generation"]),
    "a line nested too deeply": (compared(predictions=json.dumps(PREDICTION) + "\n" + "[" * DEEP + "\n"), ["predictions.jsonl: line 2 is not JSON"]),
    "predictions in Latin-1": (compared(predictions=b'{"id": "\xe9"}\n'), ["predictions.jsonl: line 1 is not JSON"]),
    "half a surrogate pair": (compared(predictions=[PREDICTION, PREDICTION | dict(id="q1", subject="\ud800")]), ["predictions.jsonl: line 2 is not a prediction"]),  # found by a property test
    "half a surrogate pair in a summary": (compared(summary=SUMMARY | dict(by_subject={"\ud800": SUBJECT})), ["summary.json: by_subject of"]),
    "an id twice": (compared(predictions=[PREDICTION] * 2), ["different questions (1 in one only, first q1)"]),
    "a letter that is none": (compared(predictions=[PREDICTION | dict(prediction="E")]), ["predictions.jsonl: line 1 is not a prediction"]),
    "a list of overlaps that is none": (lambda kit: [*compared()(kit), "--without", put("list.jsonl", "[" * DEEP)], ["--without list.jsonl: line 1"]),
    "a tuned model's run that is none": (lambda kit: [put(f"run/{n}.json", "{}") for n in ("recipe", "environment", "result")] and ["compare", evaluation("base"), evaluation("tuned", summary=SUMMARY | dict(adapter="run/adapter"))],
                                         ["run: recipe.json, environment.json or result.json is not as train leaves it"]),
    "a run's recipe cut off": (reported(recipe="{"), ["run/recipe.json: not JSON"]),
    "a run's record of other types": (reported(environment='{"hardware": 5}'), ["run: recipe.json, environment.json or result.json is not as train leaves it"]),
}


def notebook(content):
    """train, with a run notebook that was spoilt."""
    def words(kit):
        file = put("train.ipynb", content if isinstance(content, str) else json.dumps(content))
        kit.notebook(file)
        return ["train", "--recipe", "toy", "--out", "o"]
    return words


CELL = dict(cell_type="code", source="", metadata={})
NOTEBOOKS = {
    "cut off": (notebook('{"cells": ['), ["train.ipynb: not JSON"]),
    "nested too deeply": (notebook('{"cells": ' + "[" * DEEP), ["train.ipynb: nested too deeply"]),
    "of format 3": (notebook(dict(nbformat=3, worksheets=[])), ["train.ipynb: is not a notebook of format 4"]),
    "without the parameters tag": (notebook(dict(nbformat=4, cells=[CELL])), ["has 0 cells tagged parameters"]),
    "with the tag twice": (notebook(dict(nbformat=4, cells=[CELL | dict(metadata=dict(tags=["parameters"]))] * 2)), ["has 2 cells tagged parameters"]),
    "with cells that are numbers": (notebook(dict(nbformat=4, cells=[5])), ["is not a notebook of format 4"]),
}

CASES = {f"{kind}: {name}": case for kind, cases in dict(data=DATA, recipe=RECIPES, out=OUT, adapter=ADAPTERS, model=MODELS, predictions=PREDICTIONS, notebook=NOTEBOOKS).items()
         for name, case in cases.items()}


@pytest.fixture(scope="session")
def whole_adapter(tmp_path_factory):
    from medmcqa_lora.model.load import load_model
    from medmcqa_lora.model.lora import attach_lora
    from medmcqa_lora.model.adapter import save_adapter
    from medmcqa_lora.core.recipe_files import load_recipe

    recipe = load_recipe("toy")
    return save_adapter(attach_lora(load_model(recipe), recipe), tmp_path_factory.mktemp("whole") / "adapter")


@pytest.fixture
def kit(whole_adapter, monkeypatch, tmp_path):
    """Copies to be spoilt, in an empty current folder; a run that would start is a failure."""
    import medmcqa_lora.launch.launcher as launch
    from medmcqa_lora.model.resolve import resolve_model

    class Kit:
        def adapter(self):
            return Path(shutil.copytree(whole_adapter, "run/adapter"))

        def model(self):
            return Path(shutil.copytree(resolve_model("toy-nemotron-h"), "model"))

        def notebook(self, file):
            monkeypatch.setattr(launch, "shipped", lambda name: file)
            monkeypatch.setattr(launch, "run_notebook", run_notebook)

    run_notebook = launch.run_notebook
    monkeypatch.setattr(launch, "run_notebook", lambda *args, **kwargs: pytest.fail("a run was started"))
    monkeypatch.setattr("torch.distributed.launcher.api.elastic_launch", lambda *args: pytest.fail("processes were started"))
    monkeypatch.chdir(tmp_path)
    return Kit()


def tree() -> set[str]:
    return {os.path.join(folder, name) for folder, folders, files in os.walk(".") for name in (*folders, *files)}


@pytest.mark.parametrize("name", CASES)
def test_malformed(name, kit, cli):
    make, expected = CASES[name]
    words = make(kit)
    before = tree()
    code, out, err = cli(*words)
    assert code == 1, (out, err)
    assert err.startswith("medmcqa-lora: ") and err.count("\n") == 1 and err[:-1].isprintable() and len(err) < 1300, err
    for part in expected:
        assert part in err, (part, err)
    assert tree() == before and not Path("harmed").exists()


def test_there_are_enough():
    assert len(CASES) >= 60
