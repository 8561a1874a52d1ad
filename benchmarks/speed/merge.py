"""Seconds and peak memory of merging: ours, a matrix at a time; PEFT's, the complete model (load,
merge_and_unload, save_pretrained).

    python benchmarks/speed/merge.py [REPEATS]

A Nemotron-H with random weights in bfloat16 (768 MiB of routed experts) in files of 100 MB; LoRA
r = 16 on attention, mamba_in, shared and routed experts. Each merge runs in a process of its own;
its peak is counted from where the libraries are loaded (Linux's VmHWM). Target: ours below one
file.
"""

import subprocess
import sys
import tempfile
import time
import warnings
from functools import partial
from pathlib import Path

import torch

from benchmarks.common import alternate, record
from medmcqa_lora.bench.profile import median_and_range

MERGES = {
    "ours": """
from medmcqa_lora.model.merge import merge_adapter

def merge():
    merge_adapter(adapter, out, base)
""",
    "PEFT": """
from peft import PeftModel

def merge():
    model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    merged = PeftModel.from_pretrained(model, adapter).merge_and_unload()
    merged.save_pretrained(out, max_shard_size="100MB")
""",
}
BEFORE = """
import re, sys, time, torch, transformers, peft, safetensors.torch
from pathlib import Path
from transformers import AutoModelForCausalLM
torch.set_num_threads(2)
adapter, out, base = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
"""
AFTER = """
config = transformers.AutoConfig.from_pretrained(base)
with torch.device("meta"):
    AutoModelForCausalLM.from_config(config)  # what is imported on first use

def status(key):
    return int(re.search(key + r":\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])

Path("/proc/self/clear_refs").write_text("5")
before, began = status("VmRSS"), time.perf_counter()
merge()
print(time.perf_counter() - began, (status("VmHWM") - before) / 1024)
"""


def make_base(folder: Path) -> Path:
    """A model with random weights."""
    from transformers import AutoModelForCausalLM, NemotronHConfig

    from medmcqa_lora.model.resolve import TOY

    torch.manual_seed(0)
    larger = dict(
        hybrid_override_pattern="ME*EME", hidden_size=1024, n_routed_experts=32,
        moe_intermediate_size=2048, moe_shared_expert_intermediate_size=2048,
    )
    config = NemotronHConfig(**TOY | larger)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="100MB")
    return folder


def make_adapter(base: Path, folder: Path) -> Path:
    """An adapter that changes the base."""
    from medmcqa_lora.core.recipe import Recipe
    from medmcqa_lora.model.adapter import save_adapter
    from medmcqa_lora.model.load import load_model
    from medmcqa_lora.model.lora import attach_lora
    from tests.helpers import GROUPS

    recipe = Recipe(
        model=str(base), dtype="auto", lora_targets=GROUPS, lora_r=16, lora_dropout=0.0
    )
    tuned = attach_lora(load_model(recipe), recipe)
    for name, p in tuned.named_parameters():
        if "lora_B" in name: torch.nn.init.normal_(p, std=0.05)
    return save_adapter(tuned, folder)


def seconds_of_merge(variant: str, base: Path, adapter: Path, peaks: list[float]) -> float:
    """Merge in a process of its own; appends its peak (MiB)."""
    program = BEFORE + MERGES[variant] + AFTER
    with tempfile.TemporaryDirectory() as work:
        paths = [str(adapter), f"{work}/out", str(base)]
        command = [sys.executable, "-W", "ignore", "-c", program, *paths]
        streams = dict(stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        done = subprocess.run(command, check=True, text=True, **streams)
    seconds, peak = map(float, done.stdout.split())
    peaks.append(peak)
    return seconds


def compare(repeats: int, work: Path) -> tuple[dict, dict]:
    """Settings, and results with their ranges."""
    base = make_base(work / "base")
    adapter = make_adapter(base, work / "adapter")
    peaks = {name: [] for name in MERGES}
    runs = {name: partial(seconds_of_merge, name, base, adapter, peaks[name]) for name in MERGES}
    taken = alternate(runs, repeats)
    files = sorted(p.stat().st_size for p in base.glob("*.safetensors"))
    adapter_size = (adapter / "adapter_model.safetensors").stat().st_size
    settings = dict(
        model_mib=round(sum(files) / 2**20), files=len(files),
        largest_file_mib=round(files[-1] / 2**20), adapter_mib=round(adapter_size / 2**20), seed=0,
    )
    results = {f"{name}, s": median_and_range(t) for name, t in taken.items()}
    for name, values in peaks.items():
        results[f"{name}, peak MiB"] = median_and_range(values[1:])  # without the warm-up
    return settings, results


def main() -> None:
    repeats = int(sys.argv[1]) if len(sys.argv) > 1 else 10
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as work:
        settings, results = compare(repeats, Path(work))
    print(settings, time.strftime("%F"))
    record("merge", settings, results)


if __name__ == "__main__":
    main()
