"""Merged folders: the numbers of base + adapter in the base's own files, complete or not there."""
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import ALL, ROOT, sampled
from helpers import check_one_line, reset_signals
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, NemotronHConfig
from transformers.utils import logging

from medmcqa_lora.core.recipe import Recipe
from medmcqa_lora.model.adapter import save_adapter
from medmcqa_lora.model.checkpoint import weight_files
from medmcqa_lora.model.export import export_adapter
from medmcqa_lora.model.load import load_model
from medmcqa_lora.model.lora import attach_lora
from medmcqa_lora.model.merge import merge_adapter
from medmcqa_lora.model.resolve import TOY, resolve_model

logging.disable_progress_bar()
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:The following .*_pattern keys:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]
GROUPS = ["attention", "mamba_in", "shared_experts", "routed_experts", "mlp"]
UP, DOWN = "mixer.experts.up_proj", "mixer.experts.down_proj"
PYTHON = sys.executable


def fill(model, std=0.05):
    """Values in B, which PEFT starts at zero: a merge that did nothing would pass."""
    torch.manual_seed(1)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, std=std)
    return model.eval()


def make_adapter(folder, *targets, std=0.05, **settings):
    """An adapter by this package: (its folder, the adapted model)."""
    usual = dict(model="toy-nemotron-h", lora_r=4, lora_alpha=8, lora_dropout=0.0)
    recipe = Recipe(**usual | dict(lora_targets=list(targets)) | settings)
    tuned = fill(attach_lora(load_model(recipe), recipe), std)
    return save_adapter(tuned, folder), tuned


def adapter_by_peft(folder, **settings):
    """An adapter by plain PEFT, of another kind than this package makes."""
    usual = dict(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    get_peft_model(toy_model(), LoraConfig(**usual | settings)).save_pretrained(folder)
    return folder


def toy_model():
    return load_model(Recipe(model="toy-nemotron-h"))


def from_folder(folder, **settings):
    return AutoModelForCausalLM.from_pretrained(folder, **settings)


def shard_toy(folder, size="200KB"):
    """The toy in several files."""
    from_folder(resolve_model("toy-nemotron-h")).save_pretrained(folder, max_shard_size=size)
    return folder


def logits(model, vocabulary=1000):
    ids = torch.randint(3, vocabulary, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model.eval()(ids, use_cache=False).logits.float()


def difference(a, b):
    """Largest difference, relative to the largest number."""
    return ((a - b).abs().max() / b.abs().max()).item()


def tables(folder):
    """What transformers will find in a folder: file -> key -> dtype and shape."""
    found = {}
    for file in weight_files(Path(folder)):
        with safe_open(file, "pt") as f:
            slices = {k: f.get_slice(k) for k in f.keys()}
            found[file.name] = {k: (s.get_dtype(), tuple(s.get_shape())) for k, s in slices.items()}
    return found


def all_tensors(folder):
    return {k: v for file in weight_files(Path(folder)) for k, v in load_file(file).items()}


def check_merged(adapter, tuned, out, base=""):
    """Merge; the same logits, the base's own tables, and only the adapted tensors changed."""
    done = merge_adapter(adapter, out, base)
    found = logits(from_folder(out))
    assert difference(found, logits(tuned)) < 1e-5
    with tuned.disable_adapter():
        assert difference(found, logits(tuned)) > 1e-3  # the adapter changes something
    source = Path(resolve_model(base or "toy-nemotron-h"))
    assert tables(out) == tables(source)
    before, after = all_tensors(source), all_tensors(out)
    changed = {k for k in before if not torch.equal(before[k], after[k])}
    assert len(changed) == done["changed"] and len(before) == done["tensors"]
    return changed


CHANGED = {  # group -> pattern of the keys that change, their number
    "attention": (r"\.(q|k|v|o)_proj", 4),
    "mamba_in": (r"in_proj", 2),
    "shared_experts": (r"shared_experts", 4),
    "routed_experts": (r"experts\.\d", 32),
    "mlp": (r"layers\.4\..*(up|down)_proj", 2),
    "all": (".", 44),
}


@pytest.mark.parametrize("group", sampled([*GROUPS, "all"], 3))
def test_every_group(group, tmp_path):
    targets = GROUPS if group == "all" else [group]
    adapter, tuned = make_adapter(tmp_path / "adapter", *targets, lora_r_experts=3)
    out = tmp_path / "merged"
    changed = check_merged(adapter, tuned, out)
    pattern, count = CHANGED[group]
    assert len(changed) == count
    assert all(k.startswith("backbone.layers.") and re.search(pattern, k) for k in changed)
    assert AutoTokenizer.from_pretrained(out)("Which organ?").input_ids
    assert f"{len(changed)} of 71 tensors" in (out / "README.md").read_text()
    assert out.stat().st_mode & 0o777 == 0o755


@pytest.mark.parametrize("target", [UP, DOWN])
def test_one_of_the_expert_weights(target, tmp_path):
    adapter, tuned = make_adapter(tmp_path / "adapter", target, lora_r_experts=5)
    leaf = target.rpartition(".")[2]
    changed = check_merged(adapter, tuned, tmp_path / "merged")
    assert all(re.search(rf"experts\.\d\.{leaf}\.weight", k) for k in changed)


@pytest.mark.parametrize("size", ["100KB", "30KB"])
def test_many_files(size, tmp_path):
    """A block's experts are in several files; the index is copied."""
    sharded, out = shard_toy(tmp_path / "sharded", size), tmp_path / "merged"
    adapter, tuned = make_adapter(tmp_path / "adapter", *GROUPS, lora_r_experts=3)
    check_merged(adapter, tuned, out, str(sharded))
    assert len(weight_files(out)) > 10
    index = "model.safetensors.index.json"
    assert (out / index).read_bytes() == (sharded / index).read_bytes()


def test_files_with_fused_experts_and_the_models_own_names(tmp_path):
    """The other layout: a 3-D tensor for all experts, `model.…` names."""
    base, fused = Path(resolve_model("toy-nemotron-h")), tmp_path / "fused"
    shutil.copytree(base, fused)
    state = {k: v.contiguous() for k, v in from_folder(base).state_dict().items()}
    save_file(state, fused / "model.safetensors", {"format": "pt"})
    adapter, tuned = make_adapter(tmp_path / "adapter", *GROUPS, lora_r_experts=3)
    changed = check_merged(adapter, tuned, tmp_path / "merged", str(fused))
    assert "model.layers.1.mixer.experts.up_proj" in changed
    merge_adapter(adapter, tmp_path / "per-expert")
    per_expert, merged = (from_folder(tmp_path / n) for n in ("per-expert", "merged"))
    assert torch.equal(logits(per_expert), logits(merged))


BY_PEFT = [
    dict(use_rslora=True),
    dict(rank_pattern={"q_proj": 7, "layers.1.mixer.experts.up_proj": 2},
         alpha_pattern={"in_proj": 3, "layers.5.mixer.experts.down_proj": 20}),
    dict(target_modules=["in_proj"]),
    dict(target_modules=r".*layers\.(0|3)\..*(in_proj|q_proj)", target_parameters=None),
    dict(target_parameters=[UP, DOWN]),
    dict(target_parameters=[DOWN]),
    dict(target_parameters=["q_proj.weight", UP], target_modules=["k_proj"]),
    dict(layers_to_transform=[3], target_parameters=None),
    dict(init_lora_weights=False),
]


@pytest.mark.parametrize("settings", BY_PEFT, ids=lambda s: ",".join(s))
def test_adapters_made_by_plain_peft(settings, tmp_path):
    """Scales by pattern, rsLoRA, a regular expression, either order of the expert weights."""
    usual = dict(r=4, lora_alpha=6, target_modules=["q_proj", "in_proj", "up_proj"],
                 target_parameters=[DOWN, UP], task_type="CAUSAL_LM")
    adapter = tmp_path / "adapter"
    tuned = fill(get_peft_model(toy_model(), LoraConfig(**usual | settings)))
    tuned.save_pretrained(adapter)
    loaded = PeftModel.from_pretrained(toy_model(), adapter)
    assert torch.equal(logits(loaded), logits(tuned))
    check_merged(adapter, loaded, tmp_path / "merged")


def test_expert_ten_comes_after_nine(tmp_path):
    base = tmp_path / "base"
    config = NemotronHConfig(**TOY | dict(hybrid_override_pattern="E", n_routed_experts=12))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).float()
    model.save_pretrained(base, max_shard_size="40KB")
    shutil.copy(Path(resolve_model("toy-nemotron-h")) / "tokenizer.json", base)
    adapter, tuned = make_adapter(tmp_path / "adapter", "routed_experts", model=str(base))
    assert len(check_merged(adapter, tuned, tmp_path / "merged", str(base))) == 24


@pytest.mark.parametrize("tied", [True, False])
def test_llama(tied, tmp_path):
    base = tmp_path / "base"
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1024, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=tied,
        initializer_range=0.2)
    AutoModelForCausalLM.from_config(config).save_pretrained(base, max_shard_size="100KB")
    adapter, tuned = make_adapter(tmp_path / "adapter", "attention", "mlp", model=str(base))
    assert len(check_merged(adapter, tuned, tmp_path / "merged", str(base))) == 14


@pytest.fixture
def half(tmp_path):
    """The toy in bfloat16, an adapter of it, and the merged folder."""
    base, out = tmp_path / "half", tmp_path / "merged"
    from_folder(resolve_model("toy-nemotron-h"), dtype=torch.bfloat16).save_pretrained(base)
    adapter, _ = make_adapter(tmp_path / "adapter", *GROUPS, lora_r_experts=3)
    merge_adapter(adapter, out, str(base))
    return base, adapter, out


def test_bfloat16_is_rounded_once(half):
    """Each weight is the float32 sum, rounded to bfloat16."""
    base, adapter, out = half
    assert tables(out) == tables(base)
    loaded = PeftModel.from_pretrained(from_folder(base, dtype=torch.float32), adapter)
    found = from_folder(out, dtype=torch.bfloat16).state_dict()
    for name, wide in loaded.merge_and_unload().state_dict().items():
        differs = (found[name] != wide.bfloat16()).float().mean()
        assert differs < 1e-3, name  # except where the order of a sum decides a tie


def test_merging_costs_no_more_than_bfloat16(half):
    """Against float32, merged weights change the logits no more than bfloat16 itself does.

    The median over positions, because a token that a rounding sends to another expert is far off
    whichever way it happens.
    """
    base, adapter, out = half

    def with_adapter(dtype):
        return logits(PeftModel.from_pretrained(from_folder(base, dtype=dtype), adapter))

    def error(found):
        return ((found - exact).norm(dim=-1) / exact.norm(dim=-1)).median().item()

    exact = with_adapter(torch.float32)
    unmerged = error(with_adapter(torch.bfloat16))
    rounded = error(logits(from_folder(out, dtype=torch.float32)))
    merged = error(logits(from_folder(out, dtype=torch.bfloat16)))
    print(f"bfloat16 against float32: merged weights in float32 arithmetic {rounded:.4f}, "
          f"merged {merged:.4f}, base + adapter {unmerged:.4f}")
    assert rounded < 0.01 and merged < 1.2 * unmerged and merged < 0.02


def test_the_base_is_found(tmp_path):
    """The run's recipe.json, the adapter's configuration, --base; a folder that has moved."""
    adapter, tuned = make_adapter(tmp_path / "adapter", "attention")
    file = adapter / "adapter_config.json"
    moved = json.loads(file.read_text()) | {"base_model_name_or_path": str(tmp_path / "gone")}
    file.write_text(json.dumps(moved))
    with pytest.raises(ValueError, match="gone"):
        merge_adapter(adapter, tmp_path / "merged")
    check_merged(adapter, tuned, tmp_path / "by-option", "toy-nemotron-h")
    (tmp_path / "recipe.json").write_text(json.dumps({"model": "toy-nemotron-h"}))
    check_merged(adapter, tuned, tmp_path / "by-recipe")
    (tmp_path / "empty").mkdir()
    merge_adapter(adapter, tmp_path / "empty")  # an empty folder is as good as none


def test_a_base_in_the_hubs_cache(tmp_path, monkeypatch):
    adapter, _ = make_adapter(tmp_path / "adapter", "attention")
    hub = tmp_path / "hub/models--nobody--toy"  # as huggingface_hub lays it out
    shutil.copytree(resolve_model("toy-nemotron-h"), hub / "snapshots/abc")
    (hub / "refs").mkdir()
    (hub / "refs/main").write_text("abc")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    assert merge_adapter(adapter, tmp_path / "from-hub", "nobody/toy")["base"] == "nobody/toy"
    assert "base_model: nobody/toy\n" in (tmp_path / "from-hub/README.md").read_text()


KILL = """
import os, signal, sys
from pathlib import Path
from medmcqa_lora.model import merge
adapter, out, base, name, count, how = sys.argv[1:]
function, calls = getattr(merge, name), []

def dying(*args, **more):
    result = function(*args, **more)
    calls.append(1)
    if len(calls) == int(count): os.kill(os.getpid(), getattr(signal, how))
    return result

setattr(merge, name, dying)
merge.merge_adapter(Path(adapter), Path(out), base)
"""
KILLS = [
    ("overwrite_matrix", 7, "SIGKILL"),
    ("merge_file", 3, "SIGKILL"),
    ("write_file", 1, "SIGKILL"),
    ("merge_file", 2, "SIGINT"),
]


@pytest.mark.parametrize("function, count, how", sampled(KILLS, 2))
def test_interrupted(function, count, how, tmp_path):
    """Killed in a matrix, between two files, before the configuration: nothing that loads.

    What is left doesn't disturb the next run.
    """
    sharded, out = shard_toy(tmp_path / "sharded"), tmp_path / "out/merged"
    adapter, tuned = make_adapter(tmp_path / "adapter", *GROUPS)
    words = [str(adapter), str(out), str(sharded), function, str(count), how]
    done = subprocess.run(
        [PYTHON, "-c", KILL, *words], capture_output=True, text=True, preexec_fn=reset_signals)
    assert done.returncode in (-signal.SIGKILL, -signal.SIGINT, 1), done.stderr
    assert ("KeyboardInterrupt" in done.stderr) == (how == "SIGINT"), done.stderr
    left = list(out.parent.iterdir())
    assert not out.exists() and len(left) == (how == "SIGKILL")
    for folder in left:
        assert folder.name.startswith(".merged-") and folder.name.endswith(".part")
        assert not (folder / "config.json").exists()
        with pytest.raises((OSError, ValueError)):
            from_folder(folder)
    check_merged(adapter, tuned, out, str(sharded))


MEASURE = """
import re, sys
from pathlib import Path
import torch
from medmcqa_lora.model.merge import merge_adapter
torch.set_num_threads(1)
small, small_base, small_out, adapter, base, out = sys.argv[1:]

def status(key):
    text = Path("/proc/self/status").read_text()
    return int(re.search(key + r":\\s+(\\d+) kB", text)[1])

merge_adapter(Path(small), Path(small_out), small_base)  # loads libraries and the structure
Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
before = status("VmRSS")
done = merge_adapter(Path(adapter), Path(out), base)
print(before, status("VmHWM"), done["bytes"] // 1024, done["files"])
"""


def make_large_base(folder):
    """A model of 135 MiB in bfloat16, in five files."""
    torch.manual_seed(0)
    sizes = dict(hybrid_override_pattern="ME*E", hidden_size=512, n_routed_experts=32,
                 moe_intermediate_size=1024, moe_shared_expert_intermediate_size=1024)
    model = AutoModelForCausalLM.from_config(NemotronHConfig(**TOY | sizes), dtype=torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="25MB")
    return folder


def test_memory_is_that_of_a_matrix(tmp_path):
    """Peak resident memory: less than a file of the model and the adapter more than before."""
    if not os.access("/proc/self/clear_refs", os.W_OK):
        pytest.skip("peak memory is read from Linux's /proc")
    base = str(make_large_base(tmp_path / "base"))
    small, _ = make_adapter(tmp_path / "small-adapter", *GROUPS)
    targets = [g for g in GROUPS if g != "mlp"]
    adapter, _ = make_adapter(tmp_path / "adapter", *targets, model=base)
    words = [small, "toy-nemotron-h", tmp_path / "small-out", adapter, base, tmp_path / "out"]
    command = [PYTHON, "-c", MEASURE, *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    before, peak, total, files = map(int, done.stdout.split())
    factors = (adapter / "adapter_model.safetensors").stat().st_size / 1024
    print(f"model {total / 1024:.0f} MiB in {files} files, adapter {factors / 1024:.0f} MiB; "
          f"peak while merging {(peak - before) / 1024:.1f} MiB")
    assert files > 4 and peak - before < total / files + 1.5 * factors < total / 3


# ---- bad input: one line each, by the real command, and nothing written


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """An adapter of the toy on every group; tests change copies of it."""
    return make_adapter(tmp_path_factory.mktemp("toy") / "adapter", *GROUPS)[0]


@pytest.fixture
def refused(cli, tmp_path, adapter):
    """Run a command that must end in one line with these parts, and write nothing."""
    out = tmp_path / "new/merged"

    def check(*expected, adapter=adapter, base=None, command=("merge",)):
        options = ["--base", base] if base else []
        check_one_line(cli(command[0], adapter, "--out", out, *command[1:], *options), *expected)
        assert not out.parent.exists()

    return check


@pytest.fixture
def changed_base(tmp_path):
    """Make a copy of the toy whose tensors a function has changed."""
    def make(change, name="base"):
        folder = tmp_path / name
        shutil.copytree(resolve_model("toy-nemotron-h"), folder)
        rewrite(folder / "model.safetensors", change)
        return folder

    return make


@pytest.fixture
def changed_adapter(tmp_path, adapter):
    """Make a copy of the adapter with other tensors, or another configuration."""
    def make(change=dict, name="changed", **config):
        folder = Path(shutil.copytree(adapter, tmp_path / name))
        rewrite(folder / "adapter_model.safetensors", change)
        file = folder / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | config))
        return folder

    return make


def rewrite(file, change):
    """Replace the tensors of a file by what a function makes of them."""
    save_file(change(load_file(file)), file, {"format": "pt"})


def in_proj(block):
    return f"backbone.layers.{block}.mixer.in_proj.weight"


@pytest.mark.parametrize("command", [("merge",), ("export", "--format", "peft")])
def test_an_adapter_of_random_weights(command, refused, adapter, tmp_path):
    """A run that measured speed."""
    run = tmp_path / "timing"
    shutil.copytree(adapter, run / "adapter")
    values = {"model": "toy-nemotron-h", "weights": "random"}
    (run / "recipe.json").write_text(json.dumps(values))
    refused("was trained on random weights", "--base", adapter=run / "adapter", command=command)


def test_what_is_not_there(refused, tmp_path):
    refused("adapter_config.json", "give the adapter/ folder", adapter=tmp_path / "none")
    refused("nobody/none", "can't be fetched", base="nobody/none")
    refused("no such folder", "toy-nemotron", base="toy-nemotron")


def test_a_base_that_lacks_tensors(refused, changed_base):
    gone = {in_proj(0), in_proj(2), "backbone.norm_f.weight", "backbone.embeddings.weight"}
    lost = changed_base(lambda t: {k: v for k, v in t.items() if k not in gone})
    named = ["embeddings.weight", "layers.0.mixer.in_proj.weight", "layers.2.mixer.in_proj.weight"]
    refused(str(lost), "weights and config.json disagree (4 in all)",
            *(f"model.{n}" for n in named), base=lost)


BASES = {  # what is done to the toy's tensors: what the message must hold
    "narrower": (
        lambda t: t | {in_proj(0): t[in_proj(0)][:, :32].contiguous()},
        ["(1 in all)", "layers.0.mixer.in_proj.weight", "328 × 32", "328 × 64"]),
    "a tensor more": (
        lambda t: t | {"backbone.layers.9.more": torch.zeros(2)},
        ["(1 in all)", "layers.9.more"]),
    "an expert less": (
        lambda t: {k: v for k, v in t.items() if "layers.1.mixer.experts.7.up_proj" not in k},
        ["7 × 48 × 64", "8 × 48 × 64"]),
    "8 bits": (
        lambda t: t | {in_proj(0): t[in_proj(0)].to(torch.float8_e4m3fn)},
        [f"{in_proj(0)} is F8_E4M3 without scales"]),
}


@pytest.mark.parametrize("case", BASES)
def test_a_base_that_differs_from_its_configuration(case, refused, changed_base):
    change, expected = BASES[case]
    refused(*expected, base=changed_base(change))


def test_a_base_with_broken_files(refused, changed_base, tmp_path):
    cut = changed_base(dict, "cut")
    file = cut / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-5])
    refused("not a whole safetensors file", base=cut)
    sharded = shard_toy(tmp_path / "sharded")
    weight_files(sharded)[1].unlink()
    refused("model-00002-of-", "missing", base=sharded)
    (sharded / "model.safetensors.index.json").write_text("[]")
    refused("not an index of shards", base=sharded)


def test_an_adapter_that_does_not_fit(refused, changed_adapter):
    other_targets = changed_adapter(target_modules=["q_proj"])
    first = "base_model.model.model.layers.0.mixer.in_proj.lora_A.weight (4, 64), "
    refused("other targets", "does not fit", first, "--base", adapter=other_targets)
    lost = changed_adapter(lambda t: dict(list(t.items())[3:]), "lost")
    refused("lacks 3 of", adapter=lost)
    head = {"base_model.model.lm_head.modules_to_save.weight": torch.zeros(2)}
    refused("not fit", adapter=changed_adapter(lambda t: t | head, "head"))
    nameless = changed_adapter(name="nameless", base_model_name_or_path=None)
    refused("doesn't say which model", "--base", adapter=nameless)


def test_an_adapter_that_diverged(refused, changed_adapter):
    def diverge(tensors):
        first = next(iter(tensors))
        return tensors | {first: tensors[first] * float("nan")}

    refused("is not finite", "diverged", adapter=changed_adapter(diverge))


NOT_PLAIN = {  # PEFT's settings: what the message must hold
    "dora": (dict(use_dora=True), ["DoRA", "merge_and_unload"]),
    "bias": (dict(bias="all"), ["bias"]),
    "saved": (dict(modules_to_save=["lm_head"]), ["replaces whole modules"]),
    "embedding": (dict(target_modules=["q_proj", "embeddings"]), ["not of plain LoRA"]),
}


@pytest.mark.parametrize("case", NOT_PLAIN)
def test_an_adapter_that_is_not_plain_lora(case, refused, tmp_path):
    settings, expected = NOT_PLAIN[case]
    refused(*expected, adapter=adapter_by_peft(tmp_path / case, **settings))


def test_a_tied_head(tmp_path, refused):
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    config = LlamaConfig(vocab_size=1024, hidden_size=64, intermediate_size=96, num_hidden_layers=1,
                         num_attention_heads=4, tie_word_embeddings=True)
    AutoModelForCausalLM.from_config(config).save_pretrained(base)
    on_head = LoraConfig(target_modules=["lm_head"], task_type="CAUSAL_LM")
    tuned = get_peft_model(from_folder(base), on_head)
    tuned.save_pretrained(adapter, save_embedding_layers=False)
    refused("lm_head.weight", "embeddings", adapter=adapter)


def test_where_nothing_can_be_written(cli, refused, adapter, tmp_path, monkeypatch):
    full = tmp_path / "full"
    full.mkdir()
    (full / "x").touch()
    check_one_line(cli("merge", adapter, "--out", full), "is not empty")
    check_one_line(cli("merge", adapter, "--out", full / "x"), "is a file")
    check_one_line(cli("export", adapter, "--format", "vllm", "--out", full), "is not empty")
    assert [p.name for p in full.iterdir()] == ["x"]
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    refused("GiB free", "make room")


def test_a_link_can_not_become_the_folder(adapter, tmp_path, cli):
    """Else the finished folder could not be moved there, after all the work."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    result = cli("merge", adapter, "--out", tmp_path / "link")
    check_one_line(result, "--out", "is a link", "inside it")
    assert not any((tmp_path / "elsewhere").iterdir())


def test_exports_that_can_not_be_had(refused, tmp_path):
    refused("--format gguf", "vllm, peft", command=("export", "--format", "gguf"))
    up = adapter_by_peft(tmp_path / "up", target_parameters=[UP])
    refused("--format vllm", "model.layers.1.mixer.experts", "medmcqa-lora merge",
            adapter=up, command=("export", "--format", "vllm"))


def test_the_command_merges(cli, adapter, tmp_path):
    code, _, err = cli("merge", adapter, "--out", tmp_path / "new/merged")
    assert code == 0, err
    assert from_folder(tmp_path / "new/merged")


def test_the_installed_command_writes_one_line(adapter, tmp_path):
    """In a process of its own, with the warnings that libraries print."""
    lost = Path(shutil.copytree(adapter, tmp_path / "adapter"))
    rewrite(lost / "adapter_model.safetensors", lambda t: dict(list(t.items())[1:]))
    command = [PYTHON, "-c", "from medmcqa_lora.cli import main; main()", "merge", str(lost),
               "--out", str(tmp_path / "out")]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 1 and done.stderr.count("\n") == 1, done.stderr
    assert "lacks 1 of" in done.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter"]


# ---- exports


def test_export_for_vllm(cli, tmp_path):
    """Every product, as a reader of vLLM's layout forms it, is PEFT's."""
    adapter, tuned = make_adapter(tmp_path / "adapter", *GROUPS, lora_r_experts=3)
    out, name = tmp_path / "vllm", "toy-nemotron-h"
    code, text, err = cli("export", adapter, "--format", "vllm", "--out", out, "--base", name)
    assert code == 0 and "of rank 4 at most" in text, err
    files = ["README.md", "adapter_config.json", "adapter_model.safetensors"]
    assert sorted(p.name for p in out.iterdir()) == files
    config = json.loads((out / "adapter_config.json").read_text())
    keys = ("r", "lora_alpha", "rank_pattern", "target_parameters")
    assert [config[k] for k in keys] == [4, 4, {}, None]
    tensors = load_file(out / "adapter_model.safetensors")
    check_expert_names({k for k in tensors if ".experts." in k})
    assert {min(t.shape) for t in tensors.values()} == {4}
    for layer_name, layer in tuned.named_modules():
        if hasattr(layer, "lora_A"):
            by_peft = layer.get_delta_weight("default").detach()
            products = vllm_products(layer_name, layer, tensors)
            assert difference(products.view_as(by_peft), by_peft) < 1e-5


def check_expert_names(found):
    """Two blocks, up and down, A and B, eight experts."""
    module = r"base_model\.model\.model\.layers\.[15]\.mixer\.experts\.[0-7]\.(up|down)_proj"
    assert len(found) == 2 * 2 * 2 * 8
    assert all(re.fullmatch(rf"{module}\.lora_[AB]\.weight", k) for k in found)


def vllm_products(name, layer, tensors):
    """B·A of each module that vLLM has for one of PEFT's layers."""
    module = name.replace(".base_layer", "")
    modules = [module]
    if hasattr(layer, "parameter_name"):
        modules = [f"{module}.{expert}.{layer.parameter_name}" for expert in range(8)]
    pairs = [(tensors[f"{m}.lora_B.weight"], tensors[f"{m}.lora_A.weight"]) for m in modules]
    return torch.stack([b @ a for b, a in pairs])


def test_export_for_peft(cli, adapter, tmp_path):
    """The same bytes, the base's name, and the same logits."""
    out, name = tmp_path / "peft", "toy-nemotron-h"
    assert cli("export", adapter, "--format", "peft", "--out", out, "--base", name)[0] == 0
    weights = "adapter_model.safetensors"
    assert (out / weights).read_bytes() == (adapter / weights).read_bytes()
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == name
    exported, original = (PeftModel.from_pretrained(toy_model(), f) for f in (out, adapter))
    assert torch.equal(logits(exported), logits(original))


def test_an_export_says_what_it_wrote(tmp_path):
    adapter, _ = make_adapter(tmp_path / "adapter", "routed_experts", lora_r_experts=3)
    peft = export_adapter(adapter, tmp_path / "peft", "peft", "toy-nemotron-h")
    vllm = export_adapter(adapter, tmp_path / "vllm", "vllm", "toy-nemotron-h")
    assert peft == dict(base="toy-nemotron-h", tensors=2 * 4, rank=3)
    assert vllm == dict(base="toy-nemotron-h", tensors=2 * 4 * 8, rank=3)


# ---- a merged folder answers as the adapted model does


def scores(model, tokenizer, questions, recipe):
    """Log-probabilities of the four letters: (questions, 4)."""
    from medmcqa_lora.evaluation.letters import encode_prompts, letter_logprobs
    from medmcqa_lora.evaluation.records import length_batches

    rows, letters = encode_prompts(questions, tokenizer, recipe)
    found = torch.empty(len(rows), 4)
    for batch in length_batches(rows, 16):
        prompts = [rows[i] for i in batch]
        found[batch] = letter_logprobs(model, prompts, letters, tokenizer.pad_token_id)
    return found


def check_served(questions, recipe, adapter, out):
    """Compare a merged folder, as a server loads it, with the adapted model.

    Returns the largest difference of a log-probability, and how many of the first 20 answers the
    adapter changed.
    """
    from medmcqa_lora.model.adapter import load_adapter
    from medmcqa_lora.model.resolve import load_tokenizer

    merge_adapter(adapter, out)
    served = replace(recipe, model=str(out))
    tokenizer = load_tokenizer(recipe)
    wanted = scores(load_adapter(load_model(recipe), adapter), tokenizer, questions, recipe)
    found = scores(load_model(served), load_tokenizer(served), questions, served)
    base = scores(load_model(recipe), tokenizer, questions[:20], recipe)
    largest = (found - wanted).abs().max().item()
    assert largest < 1e-3 < 0.1 < (base - wanted[:20]).abs().mean()
    assert torch.equal(found.argmax(1), wanted.argmax(1))
    # a small model says A throughout, so compare without its preference for a letter, too
    ours, theirs = ((x - x.mean(0)).argmax(1) for x in (found, wanted))
    assert torch.equal(ours, theirs) and len(ours.unique()) == 4
    return largest, int((base.argmax(1) != wanted[:20].argmax(1)).sum())


def test_served_toy(tmp_path):
    from medmcqa_lora.data.questions import load_questions

    adapter, _ = make_adapter(tmp_path / "adapter", *GROUPS)
    questions = load_questions("sample", "validation").questions
    recipe = Recipe(model="toy-nemotron-h")
    largest, changed = check_served(questions, recipe, adapter, tmp_path / "merged")
    print(f"toy: log-probabilities differ by {largest:.1e} at most; "
          f"the adapter changes {changed} of 20 answers")


def test_served_smollm2_on_real_questions(validation, smollm2, tmp_path):
    from medmcqa_lora.data.questions import load_questions

    recipe = Recipe(model="smollm2-135m-instruct")
    adapter, _ = make_adapter(
        tmp_path / "adapter", "attention", "mlp", model=recipe.model, lora_r=8, lora_alpha=16)
    questions = load_questions(str(validation), limit=100 if ALL else 20).questions
    largest, changed = check_served(questions, recipe, adapter, tmp_path / "merged")
    print(f"SmolLM2: log-probabilities of real questions differ by {largest:.1e} at most; "
          f"the adapter changes {changed} of 20 answers")
