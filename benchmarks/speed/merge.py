"""Seconds and peak memory of merging: ours, a matrix at a time; PEFT's, the whole model (load,
merge_and_unload, save_pretrained).

    .venv/bin/python benchmarks/speed/merge.py [REPEATS]

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

VARIANTS = {
    "ours": "from medmcqa_lora.model.merge import merge_adapter\ndef work(): merge_adapter(adapter, out, base)",
    "PEFT": """from peft import PeftModel
def work():
    model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(out, max_shard_size="100MB")""",
}
PROCESS = """
import re, sys, time, torch, transformers, peft, safetensors.torch
from pathlib import Path
from transformers import AutoModelForCausalLM
torch.set_num_threads(2)
adapter, out, base = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
{variant}
with torch.device("meta"): AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(base))  # what is imported on first use
def status(key): return int(re.search(key + r":\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])
Path("/proc/self/clear_refs").write_text("5")
before, began = status("VmRSS"), time.perf_counter()
work()
print(time.perf_counter() - began, (status("VmHWM") - before) / 1024)
"""


def make(folder: Path) -> tuple[Path, Path]:
    """A base and an adapter on it."""
    from transformers import AutoModelForCausalLM, NemotronHConfig

    from medmcqa_lora.core.recipe import Recipe
    from medmcqa_lora.model.adapter import save_adapter
    from medmcqa_lora.model.load import load_model
    from medmcqa_lora.model.lora import attach_lora
    from medmcqa_lora.model.resolve import TOY

    torch.manual_seed(0)
    config = NemotronHConfig(
        **TOY
        | dict(
            hybrid_override_pattern="ME*EME",
            hidden_size=1024,
            n_routed_experts=32,
            moe_intermediate_size=2048,
            moe_shared_expert_intermediate_size=2048,
        )
    )
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(
        folder / "base", max_shard_size="100MB"
    )
    recipe = Recipe(
        model=str(folder / "base"),
        dtype="auto",
        lora_targets=["attention", "mamba_in", "shared_experts", "routed_experts"],
        lora_r=16,
        lora_dropout=0.0,
    )
    tuned = attach_lora(load_model(recipe), recipe)
    for name, p in tuned.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.05)
    return folder / "base", save_adapter(tuned, folder / "adapter")


def run(variant: str, base: Path, adapter: Path, peaks: list[float]) -> float:
    with tempfile.TemporaryDirectory() as work:
        command = [
            sys.executable,
            "-W",
            "ignore",
            "-c",
            PROCESS.replace("{variant}", VARIANTS[variant]),
            str(adapter),
            f"{work}/out",
            str(base),
        ]
        done = subprocess.run(
            command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
    seconds, peak = map(float, done.stdout.split())
    peaks.append(peak)
    return seconds


if __name__ == "__main__":
    repeats = int(sys.argv[1]) if len(sys.argv) > 1 else 10
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as work:
        base, adapter = make(Path(work))
        peaks = {name: [] for name in VARIANTS}
        taken = alternate(
            {name: partial(run, name, base, adapter, peaks[name]) for name in VARIANTS}, repeats
        )
        files = sorted(p.stat().st_size for p in base.glob("*.safetensors"))
        settings = dict(
            model_mib=round(sum(files) / 2**20),
            files=len(files),
            largest_file_mib=round(files[-1] / 2**20),
            adapter_mib=round((adapter / "adapter_model.safetensors").stat().st_size / 2**20),
            seed=0,
        )
        print(settings, time.strftime("%F"))
        record(
            "merge",
            settings,
            {f"{name}, s": median_and_range(t) for name, t in taken.items()}
            | {f"{name}, peak MiB": median_and_range(p[1:]) for name, p in peaks.items()},
        )
