"""Unsloth alone on the first blocks of Nemotron-3-Nano, with random weights: how long a training
step takes, or where it is when time is up.

    python benchmarks/speed/unsloth_repro.py [--layers 13] [--rows 16] [--tokens 256]
        [--steps 3] [--seconds 240]

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
    vocab_size=131072, hidden_size=2688, tie_word_embeddings=False,
    num_attention_heads=32, num_key_value_heads=2, head_dim=128, max_position_embeddings=262144,
    intermediate_size=1856, mlp_hidden_act="relu2",
    mamba_num_heads=64, mamba_head_dim=64, ssm_state_size=128, n_groups=8, conv_kernel=4,
    chunk_size=128,
    n_routed_experts=128, num_experts_per_tok=6, n_shared_experts=1, moe_intermediate_size=1856,
    moe_shared_expert_intermediate_size=3712, routed_scaling_factor=2.5, n_group=1, topk_group=1,
    norm_topk_prob=True,
)
TINY = dict(  # tries the script itself
    vocab_size=512, hidden_size=64,
    num_attention_heads=4, num_key_value_heads=2, head_dim=16, max_position_embeddings=512,
    intermediate_size=96,
    mamba_num_heads=4, mamba_head_dim=32, ssm_state_size=16, n_groups=2, chunk_size=16,
    n_routed_experts=8, num_experts_per_tok=2, moe_intermediate_size=48,
    moe_shared_expert_intermediate_size=64,
)
PACKAGES = (
    "torch", "triton", "transformers", "peft", "unsloth", "unsloth_zoo", "mamba_ssm",
    "causal_conv1d", "bitsandbytes",
)
LORA_TARGETS = r".*\.(q_proj|k_proj|v_proj|o_proj|in_proj|shared_experts\.(up|down)_proj)"
BEGAN = time.perf_counter()


def say(what: str) -> None:
    print(f"{time.perf_counter() - BEGAN:7.1f} s  {what}", flush=True)


def print_versions() -> None:
    for package in PACKAGES:
        try:
            print(package, version(package))
        except PackageNotFoundError:
            print(package, "not installed")


def write(folder: str, layers: int, tiny: bool) -> None:
    """Random weights and a tokenizer of two words; in a process of its own, since Unsloth wants
    to be imported first.
    """
    import torch
    from tokenizers import Tokenizer, models
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    config = NANO | TINY if tiny else dict(NANO)
    config["hybrid_override_pattern"] = config["hybrid_override_pattern"][:layers]
    config = AutoConfig.for_model(**config)
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="4GB")
    vocabulary = {"<unk>": 0, "</s>": 1, "<pad>": 2}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    special = dict(unk_token="<unk>", eos_token="</s>", pad_token="<pad>")
    PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(folder)


def write_in_process(folder: str, args) -> None:
    command = [sys.executable, __file__, "--write", folder, "--layers", str(args.layers)]
    if args.tiny: command.append("--tiny")
    subprocess.run(command, check=True)


def load_with_lora(folder: str):
    """The model as Unsloth loads and adapts it."""
    import unsloth  # noqa: I001 - Unsloth has to be imported first

    say("imported unsloth")
    import torch

    model, _ = unsloth.FastLanguageModel.from_pretrained(
        folder, dtype=torch.bfloat16, load_in_4bit=False, max_seq_length=512,
        trust_remote_code=False,
    )
    say(f"loaded {sum(p.numel() for p in model.parameters()):,} parameters")
    model = unsloth.FastLanguageModel.get_peft_model(
        model, r=16, lora_alpha=32, target_modules=LORA_TARGETS, target_parameters=[],
        use_gradient_checkpointing="unsloth",
    )
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    say(f"attached LoRA: {trainable:,} parameters train")
    return model.train()


def train_step(model, optimizer, number: int, args) -> None:
    """One step on random tokens, reported in its parts."""
    import torch

    device = next(model.parameters()).device
    on_gpu = device.type == "cuda"

    def wait():
        if on_gpu: torch.cuda.synchronize()

    shape = (args.rows, args.tokens)
    ids = torch.randint(3, model.config.vocab_size, shape, device=device)
    start = time.perf_counter()
    with torch.autocast(device.type, dtype=torch.bfloat16):
        loss = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids).loss
    wait()
    say(f"step {number}: forward done, loss {loss.item():.3f}")
    loss.backward()
    wait()
    say(f"step {number}: backward done")
    optimizer.step()
    optimizer.zero_grad()
    wait()
    rate = ids.numel() / (time.perf_counter() - start)
    peak = torch.cuda.max_memory_allocated() / 2**30 if on_gpu else 0
    say(f"step {number}: {rate:,.0f} tokens/s, peak {peak:.1f} GiB")


def train(folder: str, args) -> None:
    model = load_with_lora(folder)
    import torch

    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=1e-4)
    for number in range(args.steps): train_step(model, optimizer, number, args)


def parse_arguments() -> argparse.Namespace:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    for name, default in dict(layers=13, rows=16, tokens=256, steps=3, seconds=240).items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--tiny", action="store_true", help="small matrices: tries the script")
    parser.add_argument("--write", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    if args.write: return write(args.write, args.layers, args.tiny)
    faulthandler.dump_traceback_later(args.seconds, exit=True)
    print_versions()
    with tempfile.TemporaryDirectory() as folder:
        write_in_process(folder, args)
        say("wrote random weights")
        train(folder, args)


if __name__ == "__main__":
    main()
