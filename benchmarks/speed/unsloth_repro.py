"""Unsloth alone on the first blocks of Nemotron-3-Nano, with random weights: how long a training
step takes, or where it is when time is up.

    python benchmarks/speed/unsloth_repro.py [--layers 13] [--rows 16] [--tokens 256] [--steps 3] [--seconds 240]

Nothing of this package is used. Needs unsloth, transformers, a GPU, and a disk with 2 bytes a
parameter in TMPDIR (13 blocks: 14 GiB). Every stage is a line with its seconds. After
`--seconds`, all threads' stacks are printed and the script ends with 1. `MAMBA_DETERMINISTIC=1
TRITON_CACHE_AUTOTUNING=0` gives each of mamba_ssm's kernels one configuration; without it Triton
compiles and tries all of them, some 140, in the first step.
"""

import argparse
import faulthandler
import subprocess
import sys
import tempfile
import time
from importlib.metadata import PackageNotFoundError, version

NANO = dict(
    model_type="nemotron_h",
    hybrid_override_pattern="MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME",
    vocab_size=131072,
    hidden_size=2688,
    tie_word_embeddings=False,
    num_attention_heads=32,
    num_key_value_heads=2,
    head_dim=128,
    intermediate_size=1856,
    mamba_num_heads=64,
    mamba_head_dim=64,
    ssm_state_size=128,
    n_groups=8,
    conv_kernel=4,
    chunk_size=128,
    n_routed_experts=128,
    num_experts_per_tok=6,
    n_shared_experts=1,
    moe_intermediate_size=1856,
    moe_shared_expert_intermediate_size=3712,
    routed_scaling_factor=2.5,
    n_group=1,
    topk_group=1,
    norm_topk_prob=True,
    mlp_hidden_act="relu2",
    max_position_embeddings=262144,
)
TINY = dict(
    vocab_size=512,
    hidden_size=64,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    intermediate_size=96,
    mamba_num_heads=4,
    mamba_head_dim=32,
    ssm_state_size=16,
    n_groups=2,
    chunk_size=16,
    n_routed_experts=8,
    num_experts_per_tok=2,
    moe_intermediate_size=48,
    moe_shared_expert_intermediate_size=64,
    max_position_embeddings=512,
)  # tries the script itself
began = time.perf_counter()


def say(what):
    print(f"{time.perf_counter() - began:7.1f} s  {what}", flush=True)


def write(folder, layers, tiny):
    """Random weights and a tokenizer of two words; in a process of its own, since Unsloth wants
    to be imported first.
    """
    import torch
    from tokenizers import Tokenizer, models
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    config = dict(NANO | (TINY if tiny else {}))
    config["hybrid_override_pattern"] = config["hybrid_override_pattern"][:layers]
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(**config), dtype=torch.bfloat16
        )
    model.save_pretrained(folder, max_shard_size="4GB")
    words = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1, "<pad>": 2}, unk_token="<unk>"))
    PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="<unk>", eos_token="</s>", pad_token="<pad>"
    ).save_pretrained(folder)


def train(folder, arguments):
    import unsloth  # noqa: I001 - first, as it asks

    say("imported unsloth")
    import torch

    model, _ = unsloth.FastLanguageModel.from_pretrained(
        folder,
        dtype=torch.bfloat16,
        load_in_4bit=False,
        max_seq_length=512,
        trust_remote_code=False,
    )
    say(f"loaded {sum(p.numel() for p in model.parameters()):,} parameters")
    model = unsloth.FastLanguageModel.get_peft_model(
        model,
        r=16,
        lora_alpha=32,
        target_modules=r".*\.(q_proj|k_proj|v_proj|o_proj|in_proj|shared_experts\.(up|down)_proj)",
        target_parameters=[],
        use_gradient_checkpointing="unsloth",
    )
    say(
        f"attached LoRA: {sum(p.numel() for p in model.parameters() if p.requires_grad):,} parameters train"
    )
    model.train()
    device = next(model.parameters()).device
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)

    def wait():
        if device.type == "cuda":
            torch.cuda.synchronize()

    for step in range(arguments.steps):
        ids = torch.randint(
            3, model.config.vocab_size, (arguments.rows, arguments.tokens), device=device
        )
        start = time.perf_counter()
        with torch.autocast(device.type, dtype=torch.bfloat16):
            loss = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids).loss
        wait()
        say(f"step {step}: forward done, loss {loss.item():.3f}")
        loss.backward()
        wait()
        say(f"step {step}: backward done")
        optimizer.step()
        optimizer.zero_grad()
        wait()
        say(
            f"step {step}: {ids.numel() / (time.perf_counter() - start):,.0f} tokens/s, peak {torch.cuda.max_memory_allocated() / 2**30 if device.type == 'cuda' else 0:.1f} GiB"
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, default in dict(layers=13, rows=16, tokens=256, steps=3, seconds=240).items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--tiny", action="store_true", help="small matrices: tries the script")
    parser.add_argument("--write", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.write:
        write(arguments.write, arguments.layers, arguments.tiny)
        sys.exit()
    faulthandler.dump_traceback_later(arguments.seconds, exit=True)
    for package in (
        "torch",
        "triton",
        "transformers",
        "peft",
        "unsloth",
        "unsloth_zoo",
        "mamba_ssm",
        "causal_conv1d",
        "bitsandbytes",
    ):
        try:
            print(package, version(package))
        except PackageNotFoundError:
            print(package, "not installed")
    with tempfile.TemporaryDirectory() as place:
        subprocess.run(
            [
                sys.executable,
                __file__,
                "--write",
                place,
                "--layers",
                str(arguments.layers),
                *["--tiny"] * arguments.tiny,
            ],
            check=True,
        )
        say("wrote random weights")
        train(place, arguments)
