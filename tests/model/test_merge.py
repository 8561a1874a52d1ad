"""Merged folders and exported adapters: the same numbers as base + adapter, the base's own files, whole or not there."""
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
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from helpers import check_one_line
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, NemotronHConfig
from transformers.utils import logging

from medmcqa_lora.model.checkpoint import weight_files
from medmcqa_lora.model.merge import merge_adapter
from medmcqa_lora.model.resolve import TOY, resolve_model
from medmcqa_lora.model.load import load_model
from medmcqa_lora.model.lora import attach_lora
from medmcqa_lora.model.adapter import save_adapter
from medmcqa_lora.core.recipe import Recipe

logging.disable_progress_bar()
pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore:The following .*_pattern keys:RuntimeWarning"), pytest.mark.filterwarnings("ignore::UserWarning")]
GROUPS = ["attention", "mamba_in", "shared_experts", "routed_experts", "mlp"]
UP, DOWN = "mixer.experts.up_proj", "mixer.experts.down_proj"


def fill(model, std=0.05):
    """Values in B, which PEFT starts at zero: a merge that did nothing would pass."""
    torch.manual_seed(1)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, std=std)
    return model.eval()


def make_adapter(folder, *targets, std=0.05, **settings):
    chosen = Recipe(**({"model": "toy-nemotron-h", "lora_targets": list(targets), "lora_r": 4, "lora_alpha": 8, "lora_dropout": 0.0} | settings))
    tuned = fill(attach_lora(load_model(chosen), chosen), std)
    return save_adapter(tuned, folder), tuned


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
            found[file.name] = {k: (f.get_slice(k).get_dtype(), tuple(f.get_slice(k).get_shape())) for k in f.keys()}
    return found


def check_merged(adapter, tuned, out, base="", **how):
    """Merge; the same logits, the base's own tables, and only the adapted tensors changed."""
    done = merge_adapter(adapter, out, base)
    found = logits(AutoModelForCausalLM.from_pretrained(out, **how))
    assert difference(found, logits(tuned)) < 1e-5
    with tuned.disable_adapter():
        assert difference(found, logits(tuned)) > 1e-3  # the adapter changes something
    source = Path(resolve_model(base or "toy-nemotron-h"))
    assert tables(out) == tables(source)
    before, after = ({k: v for f in weight_files(Path(d)) for k, v in load_file(f).items()} for d in (source, out))
    changed = {k for k in before if not torch.equal(before[k], after[k])}
    assert len(changed) == done["changed"] and len(before) == done["tensors"]
    return changed


@pytest.mark.parametrize("group", sampled([*GROUPS, "all"], 3))
def test_every_group(group, tmp_path):
    adapter, tuned = make_adapter(tmp_path / "adapter", *(GROUPS if group == "all" else [group]), lora_r_experts=3)
    changed = check_merged(adapter, tuned, tmp_path / "merged")
    patterns = {"attention": r"\.(q|k|v|o)_proj", "mamba_in": r"in_proj", "shared_experts": r"shared_experts", "routed_experts": r"experts\.\d", "mlp": r"layers\.4\..*(up|down)_proj", "all": "."}
    assert changed and all(k.startswith("backbone.layers.") and re.search(patterns[group], k) for k in changed)
    assert len(changed) == {"attention": 4, "mamba_in": 2, "shared_experts": 4, "routed_experts": 32, "mlp": 2, "all": 44}[group]
    assert AutoTokenizer.from_pretrained(tmp_path / "merged")("Which organ?").input_ids
    assert f"{len(changed)} of 71 tensors" in (tmp_path / "merged/README.md").read_text()
    assert (tmp_path / "merged").stat().st_mode & 0o777 == 0o755


@pytest.mark.parametrize("one", [UP, DOWN])
def test_one_of_the_expert_weights(one, tmp_path):
    adapter, tuned = make_adapter(tmp_path / "adapter", one, lora_r_experts=5)
    leaf = one.rsplit(".", 1)[1]
    assert all(re.search(rf"experts\.\d\.{leaf}\.weight", k) for k in check_merged(adapter, tuned, tmp_path / "merged"))


@pytest.mark.parametrize("size", ["100KB", "30KB"])
def test_many_files(size, tmp_path):
    """A block's experts lie in several files; the index goes along."""
    sharded = tmp_path / "sharded"
    AutoModelForCausalLM.from_pretrained(resolve_model("toy-nemotron-h")).save_pretrained(sharded, max_shard_size=size)
    adapter, tuned = make_adapter(tmp_path / "adapter", *GROUPS, lora_r_experts=3)
    check_merged(adapter, tuned, tmp_path / "merged", str(sharded))
    assert len(weight_files(tmp_path / "merged")) > 10
    assert (tmp_path / "merged/model.safetensors.index.json").read_bytes() == (sharded / "model.safetensors.index.json").read_bytes()


def test_files_with_fused_experts_and_the_models_own_names(tmp_path):
    """The other layout: a 3-D tensor for all experts, `model.…` names."""
    base, fused = Path(resolve_model("toy-nemotron-h")), tmp_path / "fused"
    shutil.copytree(base, fused)
    state = AutoModelForCausalLM.from_pretrained(base).state_dict()
    save_file({k: v.contiguous() for k, v in state.items()}, fused / "model.safetensors", {"format": "pt"})
    adapter, tuned = make_adapter(tmp_path / "adapter", *GROUPS, lora_r_experts=3)
    changed = check_merged(adapter, tuned, tmp_path / "merged", str(fused))
    assert "model.layers.1.mixer.experts.up_proj" in changed
    per_expert = tmp_path / "per-expert"
    merge_adapter(adapter, per_expert)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(per_expert)), logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")))


@pytest.mark.parametrize("settings", [
    dict(use_rslora=True), dict(rank_pattern={"q_proj": 7, "layers.1.mixer.experts.up_proj": 2}, alpha_pattern={"in_proj": 3, "layers.5.mixer.experts.down_proj": 20}),
    dict(target_modules=["in_proj"]), dict(target_modules=r".*layers\.(0|3)\..*(in_proj|q_proj)", target_parameters=None),
    dict(target_parameters=[UP, DOWN]), dict(target_parameters=[DOWN]), dict(target_parameters=["q_proj.weight", UP], target_modules=["k_proj"]), dict(layers_to_transform=[3], target_parameters=None), dict(init_lora_weights=False),
], ids=lambda s: ",".join(s))
def test_what_plain_peft_can_be_told(settings, tmp_path):
    """Adapters made without this package: scales by pattern, rsLoRA, a regular expression, either order of the expert weights."""
    config = LoraConfig(**dict(r=4, lora_alpha=6, target_modules=["q_proj", "in_proj", "up_proj"], target_parameters=[DOWN, UP], task_type="CAUSAL_LM") | settings)
    tuned = fill(get_peft_model(load_model(Recipe(model="toy-nemotron-h")), config))
    tuned.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(load_model(Recipe(model="toy-nemotron-h")), tmp_path / "adapter")
    assert torch.equal(logits(loaded), logits(tuned))
    check_merged(tmp_path / "adapter", loaded, tmp_path / "merged")


def test_expert_ten_comes_after_nine(tmp_path):
    config = NemotronHConfig(**TOY | dict(hybrid_override_pattern="E", n_routed_experts=12))
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).float().save_pretrained(tmp_path / "base", max_shard_size="40KB")
    shutil.copy(Path(resolve_model("toy-nemotron-h")) / "tokenizer.json", tmp_path / "base")
    adapter, tuned = make_adapter(tmp_path / "adapter", "routed_experts", model=str(tmp_path / "base"))
    changed = check_merged(adapter, tuned, tmp_path / "merged", str(tmp_path / "base"))
    assert len(changed) == 24


@pytest.mark.parametrize("tied", [True, False])
def test_llama(tied, tmp_path):
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=1024, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=tied, initializer_range=0.2)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base", max_shard_size="100KB")
    adapter, tuned = make_adapter(tmp_path / "adapter", "attention", "mlp", model=str(tmp_path / "base"))
    assert len(check_merged(adapter, tuned, tmp_path / "merged", str(tmp_path / "base"))) == 14


def test_bfloat16(tmp_path):
    """Each weight is the float32 sum, rounded once. Against float32 arithmetic, merged weights cost the logits no more than bfloat16 itself does: the
    median over positions, because a token that a rounding sends to another expert is far off whichever way it happens."""
    half = tmp_path / "half"
    AutoModelForCausalLM.from_pretrained(resolve_model("toy-nemotron-h"), dtype=torch.bfloat16).save_pretrained(half)
    adapter, _ = make_adapter(tmp_path / "adapter", *GROUPS, lora_r_experts=3)
    merge_adapter(adapter, tmp_path / "merged", str(half))
    assert tables(tmp_path / "merged") == tables(half)
    wide = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(half, dtype=torch.float32), adapter).merge_and_unload().state_dict()
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.bfloat16).state_dict()
    for name, w in wide.items():
        assert (found[name] != w.bfloat16()).float().mean() < 1e-3, name  # but where the order of a sum tips a tie

    def with_adapter(dtype):
        return logits(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(half, dtype=dtype), adapter))

    exact = with_adapter(torch.float32)

    def error(found):
        return ((found - exact).norm(dim=-1) / exact.norm(dim=-1)).median().item()

    rounded = error(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)))
    merged, unmerged = error(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.bfloat16))), error(with_adapter(torch.bfloat16))
    print(f"bfloat16 against float32: merged weights in float32 arithmetic {rounded:.4f}, merged {merged:.4f}, base + adapter {unmerged:.4f}")
    assert rounded < 0.01 and merged < 1.2 * unmerged and merged < 0.02


def test_the_base_is_found(tmp_path, monkeypatch):
    """The run's recipe.json, the adapter's configuration, --base; a folder that has moved."""
    adapter, tuned = make_adapter(tmp_path / "adapter", "attention")
    config = json.loads((adapter / "adapter_config.json").read_text())
    moved = config | {"base_model_name_or_path": str(tmp_path / "gone")}
    (adapter / "adapter_config.json").write_text(json.dumps(moved))
    with pytest.raises(ValueError, match="gone"):
        merge_adapter(adapter, tmp_path / "merged")
    check_merged(adapter, tuned, tmp_path / "by-option", "toy-nemotron-h")
    (tmp_path / "recipe.json").write_text(json.dumps({"model": "toy-nemotron-h"}))
    check_merged(adapter, tuned, tmp_path / "by-recipe")
    (tmp_path / "empty").mkdir()
    merge_adapter(adapter, tmp_path / "empty")  # an empty folder is as good as none
    hub = tmp_path / "hub/models--nobody--toy"  # a hub's cache, as huggingface_hub lays it out
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
real, seen = getattr(merge, sys.argv[4]), []
def dying(*args, **more):
    result = real(*args, **more)
    seen.append(1)
    if len(seen) == int(sys.argv[5]): os.kill(os.getpid(), getattr(signal, sys.argv[6]))
    return result
setattr(merge, sys.argv[4], dying)
merge.merge_adapter(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
"""


KILLS = [("overwrite_matrix", 7, "SIGKILL"), ("merge_file", 3, "SIGKILL"), ("write_whole", 1, "SIGKILL"), ("merge_file", 2, "SIGINT")]


@pytest.mark.parametrize("where, count, how", sampled(KILLS, 2))
def test_interrupted(where, count, how, tmp_path):
    """Killed in a matrix, between two files and before the configuration: nothing that loads, and the next run is not in its way."""
    sharded, out = tmp_path / "sharded", tmp_path / "out/merged"
    AutoModelForCausalLM.from_pretrained(resolve_model("toy-nemotron-h")).save_pretrained(sharded, max_shard_size="200KB")
    adapter, tuned = make_adapter(tmp_path / "adapter", *GROUPS)
    done = subprocess.run([sys.executable, "-c", KILL, str(adapter), str(out), str(sharded), where, str(count), how], capture_output=True, text=True)
    assert done.returncode in (-signal.SIGKILL, -signal.SIGINT, 1) and ("KeyboardInterrupt" in done.stderr) == (how == "SIGINT"), done.stderr
    left = list(out.parent.iterdir())
    assert not out.exists() and len(left) == (how == "SIGKILL")
    for folder in left:
        assert folder.name.startswith(".merged-") and folder.name.endswith(".part") and not (folder / "config.json").exists()
        with pytest.raises((OSError, ValueError)):
            AutoModelForCausalLM.from_pretrained(folder)
    check_merged(adapter, tuned, out, str(sharded))


MEASURE = """
import re, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from medmcqa_lora.model.merge import merge_adapter
merge_adapter(Path(sys.argv[1]), Path(sys.argv[3]), sys.argv[2])  # a first one: what libraries and the model's structure take
def status(key): return int(re.search(key + r":\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])
Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
before = status("VmRSS")
done = merge_adapter(Path(sys.argv[4]), Path(sys.argv[6]), sys.argv[5])
print(before, status("VmHWM"), done["bytes"] // 1024, done["files"])
"""


def test_memory_is_that_of_a_matrix(tmp_path):
    """Peak resident memory while merging: less than one of the model's files and the adapter more than before, far less than the model."""
    if not os.access("/proc/self/clear_refs", os.W_OK):
        pytest.skip("peak memory is read from Linux's /proc")
    torch.manual_seed(0)
    config = NemotronHConfig(**TOY | dict(hybrid_override_pattern="ME*E", hidden_size=512, n_routed_experts=32, moe_intermediate_size=1024, moe_shared_expert_intermediate_size=1024))
    big = tmp_path / "big"
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(big, max_shard_size="25MB")
    small, _ = make_adapter(tmp_path / "small-adapter", *GROUPS)
    adapter, _ = make_adapter(tmp_path / "adapter", "attention", "mamba_in", "shared_experts", "routed_experts", model=str(big))
    words = [str(small), "toy-nemotron-h", str(tmp_path / "small-out"), str(adapter), str(big), str(tmp_path / "out")]
    done = subprocess.run([sys.executable, "-c", MEASURE, *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    before, peak, total, files = map(int, done.stdout.split())
    factors = (adapter / "adapter_model.safetensors").stat().st_size / 1024
    print(f"model {total / 1024:.0f} MiB in {files} files, adapter {factors / 1024:.0f} MiB; peak while merging {(peak - before) / 1024:.1f} MiB")
    assert files > 4 and peak - before < total / files + 1.5 * factors < total / 3


def rewrite(folder, change, name="model.safetensors"):
    tensors = load_file(folder / name)
    save_file(change(dict(tensors)), folder / name, {"format": "pt"})


def test_bad_input(cli, tmp_path):
    """One line each, by the real command, and nothing written."""
    adapter, _ = make_adapter(tmp_path / "adapter", *GROUPS)
    base, out, new = Path(resolve_model("toy-nemotron-h")), tmp_path / "new/merged", iter(range(100))

    def refused(*expected, adapter=adapter, base=None, command=("merge",)):
        check_one_line(cli(command[0], adapter, "--out", out, *command[1:], *(["--base", base] if base else [])), *expected)
        assert not out.parent.exists()

    def broken_base(change=None):
        folder = tmp_path / f"base{next(new)}"
        shutil.copytree(base, folder)
        if change:
            rewrite(folder, change)
        return folder

    def broken_adapter(change=None, **config):
        folder = tmp_path / f"adapter{next(new)}"
        shutil.copytree(adapter, folder)
        if change:
            rewrite(folder, change, "adapter_model.safetensors")
        (folder / "adapter_config.json").write_text(json.dumps(json.loads((folder / "adapter_config.json").read_text()) | config))
        return folder

    (tmp_path / "timing").mkdir()  # a run that measured speed
    shutil.copytree(adapter, tmp_path / "timing/adapter")
    (tmp_path / "timing/recipe.json").write_text(json.dumps({"model": "toy-nemotron-h", "weights": "random"}))
    for command in (("merge",), ("export", "--format", "peft")):
        refused("was trained on random weights", "--base", adapter=tmp_path / "timing/adapter", command=command)
    key = "backbone.layers.{}.mixer.in_proj.weight".format
    refused("adapter_config.json", "give the adapter/ folder", adapter=tmp_path / "none")
    refused("nobody/none", "can't be fetched", base="nobody/none")
    refused("no such folder", "toy-nemotron", base="toy-nemotron")
    # the base's files against its configuration
    lost = broken_base(lambda t: {k: v for k, v in t.items() if k not in (key(0), key(2), "backbone.norm_f.weight", "backbone.embeddings.weight")})
    refused(str(lost), "weights and config.json disagree (4 in all)", "model.embeddings.weight", "model.layers.0.mixer.in_proj.weight", "model.layers.2.mixer.in_proj.weight", base=lost)
    refused("(1 in all)", "layers.0.mixer.in_proj.weight", "328 × 32", "328 × 64", base=broken_base(lambda t: t | {key(0): t[key(0)][:, :32].contiguous()}))
    refused("(1 in all)", "layers.9.more", base=broken_base(lambda t: t | {"backbone.layers.9.more": torch.zeros(2)}))
    refused("7 × 48 × 64", "8 × 48 × 64", base=broken_base(lambda t: {k: v for k, v in t.items() if "layers.1.mixer.experts.7.up_proj" not in k}))
    refused(f"{key(0)} is F8_E4M3 without scales", base=broken_base(lambda t: t | {key(0): t[key(0)].to(torch.float8_e4m3fn)}))
    cut = broken_base()
    (cut / "model.safetensors").write_bytes((cut / "model.safetensors").read_bytes()[:-5])
    refused("not a whole safetensors file", base=cut)
    sharded = tmp_path / "sharded"
    AutoModelForCausalLM.from_pretrained(base).save_pretrained(sharded, max_shard_size="200KB")
    weight_files(sharded)[1].unlink()
    refused("model-00002-of-", "missing", base=sharded)
    (sharded / "model.safetensors.index.json").write_text("[]")
    refused("not an index of shards", base=sharded)
    # the adapter against the base
    refused("other targets", "does not fit", "base_model.model.model.layers.0.mixer.in_proj.lora_A.weight (4, 64), ", "--base", adapter=broken_adapter(target_modules=["q_proj"]))
    refused("lacks 3 of", adapter=broken_adapter(lambda t: dict(list(t.items())[3:])))
    refused("is not finite", "diverged", adapter=broken_adapter(lambda t: t | {(k := next(iter(t))): t[k] * float("nan")}))
    refused("not fit", adapter=broken_adapter(lambda t: t | {"base_model.model.lm_head.modules_to_save.weight": torch.zeros(2)}))
    refused("DoRA", "merge_and_unload", adapter=_odd(tmp_path, "dora", use_dora=True))
    refused("bias", adapter=_odd(tmp_path, "bias", bias="all"))
    refused("replaces whole modules", adapter=_odd(tmp_path, "saved", modules_to_save=["lm_head"]))
    refused("not of plain LoRA", adapter=_odd(tmp_path, "embedding", target_modules=["q_proj", "embeddings"]))
    refused("doesn't say which model", "--base", adapter=broken_adapter(base_model_name_or_path=None))
    # where to
    (tmp_path / "full").mkdir()
    (tmp_path / "full/x").touch()
    check_one_line(cli("merge", adapter, "--out", tmp_path / "full"), "is not empty")
    check_one_line(cli("merge", adapter, "--out", tmp_path / "full/x"), "is a file")
    check_one_line(cli("export", adapter, "--format", "vllm", "--out", tmp_path / "full"), "is not empty")
    assert [p.name for p in (tmp_path / "full").iterdir()] == ["x"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000})())
        refused("GiB free", "make room")
    # exports
    refused("--format gguf", "vllm, peft", command=("export", "--format", "gguf"))
    up = _odd(tmp_path, "up", target_parameters=[UP])
    refused("--format vllm", "model.layers.1.mixer.experts", "medmcqa-lora merge", adapter=up, command=("export", "--format", "vllm"))
    assert cli("merge", adapter, "--out", out)[0] == 0 and AutoModelForCausalLM.from_pretrained(out)


def _odd(tmp_path, name, **settings):
    """An adapter by plain PEFT, of another kind than this package makes."""
    config = LoraConfig(**dict(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM") | settings)
    get_peft_model(load_model(Recipe(model="toy-nemotron-h")), config).save_pretrained(tmp_path / name)
    return tmp_path / name


def test_tied_head_is_refused(tmp_path, cli):
    config = LlamaConfig(vocab_size=1024, hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4, tie_word_embeddings=True)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), LoraConfig(target_modules=["lm_head"], task_type="CAUSAL_LM")).save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    check_one_line(cli("merge", tmp_path / "adapter", "--out", tmp_path / "out"), "lm_head.weight", "embeddings")
    assert not (tmp_path / "out").exists()


def test_the_installed_command_writes_one_line(tmp_path):
    """In a process of its own, with the warnings that libraries print."""
    adapter, _ = make_adapter(tmp_path / "adapter", *GROUPS, lora_r_experts=3)
    run = [sys.executable, "-c", "from medmcqa_lora.cli import main; main()"]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    rewrite(adapter, lambda t: dict(list(t.items())[1:]), "adapter_model.safetensors")
    done = subprocess.run([*run, "merge", str(adapter), "--out", str(tmp_path / "out")], capture_output=True, text=True, env=env)
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and "lacks 1 of" in done.stderr, done.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter"]


def test_export(cli, tmp_path):
    adapter, tuned = make_adapter(tmp_path / "adapter", *GROUPS, lora_r_experts=3)
    code, out, err = cli("export", adapter, "--format", "vllm", "--out", tmp_path / "vllm", "--base", "toy-nemotron-h")
    assert code == 0 and "of rank 4 at most" in out, err
    assert sorted(p.name for p in (tmp_path / "vllm").iterdir()) == ["README.md", "adapter_config.json", "adapter_model.safetensors"]
    tensors, config = load_file(tmp_path / "vllm/adapter_model.safetensors"), json.loads((tmp_path / "vllm/adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["rank_pattern"], config["target_parameters"]) == (4, 4, {}, None)
    assert {min(t.shape) for t in tensors.values()} == {4}
    experts = {k for k in tensors if ".experts." in k}
    assert len(experts) == 2 * 2 * 2 * 8 and all(re.fullmatch(r"base_model\.model\.model\.layers\.[15]\.mixer\.experts\.[0-7]\.(up|down)_proj\.lora_[AB]\.weight", k) for k in experts)
    weights = {n.removeprefix("base_model.model."): m for n, m in tuned.named_modules() if hasattr(m, "lora_A")}
    for name, layer in weights.items():  # every product, as a reader of this layout forms it
        by_peft = layer.get_delta_weight("default").detach()
        name = name.replace(".base_layer", "")
        names = [f"{name}.{e}.{layer.parameter_name}" for e in range(8)] if hasattr(layer, "parameter_name") else [name]
        ours = torch.stack([tensors[f"base_model.model.{n}.lora_B.weight"] @ tensors[f"base_model.model.{n}.lora_A.weight"] for n in names])
        assert difference(ours.view_as(by_peft), by_peft) < 1e-5
    assert cli("export", adapter, "--format", "peft", "--out", tmp_path / "peft", "--base", "toy-nemotron-h")[0] == 0
    assert (tmp_path / "peft/adapter_model.safetensors").read_bytes() == (adapter / "adapter_model.safetensors").read_bytes()


def scores(model, tokenizer, questions, recipe):
    from medmcqa_lora.evaluation.records import length_batches
    from medmcqa_lora.evaluation.letters import encode_prompts, letter_logprobs

    rows, letters = encode_prompts(questions, tokenizer, recipe)
    found = torch.empty(len(rows), 4)
    for batch in length_batches(rows, 16):
        found[batch] = letter_logprobs(model, [rows[i] for i in batch], letters, tokenizer.pad_token_id)
    return found


def check_served(questions, recipe, adapter, out):
    """A merged folder, as a server loads it, answers as the adapted model does: (largest difference of a log-probability, of the first 20 answers, those that the adapter changed)."""
    from medmcqa_lora.model.resolve import load_tokenizer
    from medmcqa_lora.model.adapter import load_adapter

    merge_adapter(adapter, out)
    merged = replace(recipe, model=str(out))
    want = scores(load_adapter(load_model(recipe), adapter), load_tokenizer(recipe), questions, recipe)
    got = scores(load_model(merged), load_tokenizer(merged), questions, merged)
    base = scores(load_model(recipe), load_tokenizer(recipe), questions[:20], recipe)
    assert (got - want).abs().max() < 1e-3 < 0.1 < (base - want[:20]).abs().mean()
    assert torch.equal(got.argmax(1), want.argmax(1))
    ours, theirs = ((x - x.mean(0)).argmax(1) for x in (got, want))  # a small model says A throughout: the same without its liking for a letter
    assert torch.equal(ours, theirs) and len(ours.unique()) == 4
    return (got - want).abs().max().item(), int((base.argmax(1) != want[:20].argmax(1)).sum())


def test_served_toy(tmp_path):
    from medmcqa_lora.data.questions import load_questions

    adapter, _ = make_adapter(tmp_path / "adapter", *GROUPS)
    worst, changed = check_served(load_questions("sample", "validation").questions, Recipe(model="toy-nemotron-h"), adapter, tmp_path / "merged")
    print(f"toy: log-probabilities differ by {worst:.1e} at most; the adapter changes {changed} of 20 answers")


def test_served_smollm2_on_real_questions(validation, smollm2, tmp_path):
    from medmcqa_lora.data.questions import load_questions

    recipe = Recipe(model="smollm2-135m-instruct")
    adapter, _ = make_adapter(tmp_path / "adapter", "attention", "mlp", std=0.05, model=recipe.model, lora_r=8, lora_alpha=16)
    worst, changed = check_served(load_questions(str(validation), limit=100 if ALL else 20).questions, recipe, adapter, tmp_path / "merged")
    print(f"SmolLM2: log-probabilities of real questions differ by {worst:.1e} at most; the adapter changes {changed} of 20 answers")


def test_a_link_can_not_become_the_folder(tmp_path, cli):
    """Else the finished folder could not be moved there, after all the work."""
    adapter, _ = make_adapter(tmp_path / "adapter", "attention")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    check_one_line(cli("merge", adapter, "--out", tmp_path / "link"), "--out", "is a link", "inside it")
    assert not any((tmp_path / "elsewhere").iterdir())
