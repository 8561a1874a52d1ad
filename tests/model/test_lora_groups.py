"""LoRA targets by group: what each reaches in every architecture, and that it alone trains."""
import json
import re

import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging

from medmcqa_lora.core.files import shipped_file
from medmcqa_lora.core.recipe import Recipe
from medmcqa_lora.core.recipe_files import load_recipe
from medmcqa_lora.model.checkpoint import block_index
from medmcqa_lora.model.load import load_model
from medmcqa_lora.model.lora import (
    GROUPS,
    attach_lora,
    block_table,
    group_of,
    list_matrices,
    lora_config,
    lora_report,
    plot_blocks,
    select_matrices,
)
from medmcqa_lora.model.resolve import TOY

logging.disable_progress_bar()
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    # the patterns do match: they are names of fused parameters
    pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys:RuntimeWarning"),
]
R, EXPERTS = 4, TOY["n_routed_experts"]


def recipe_for(group):
    steps = {"max_steps": "4", "save_steps": "4"}
    return load_recipe("toy", {"lora_targets": group, "lora_r_experts": str(R), **steps})


def make_fast(model):
    """With the parts of room 3, which must not change what a group means."""
    from medmcqa_lora.fast.apply import apply_fast_parts

    return apply_fast_parts(model, recipe_for("mlp"))


def as_loaded(model):
    return model


def load_toy():
    return load_model(recipe_for("mlp"))


def base_name(name):
    """The name of a LoRA parameter's module in the model without LoRA."""
    return re.sub(r"(\.base_layer)*\.lora_[AB]\..*$", "", name).removeprefix("base_model.model.")


def groups_of(names, model):
    return {group_of(base_name(n), model.config) for n in names}


def trainable(model):
    return {n: p for n, p in model.named_parameters() if p.requires_grad}


def fill(model):
    """Values in B, which PEFT starts at zero: otherwise A has no gradient."""
    torch.manual_seed(1)
    for n, p in model.named_parameters():
        if "lora_B" in n:
            nn.init.normal_(p, std=0.05)
    return model


def token_ids(rows, length):
    return torch.randint(3, 1000, (rows, length), generator=torch.Generator().manual_seed(0))


def largest_by_rank(name, gradient):
    """Largest gradient of each row of A or column of B, in PEFT's layout.

    (ranks,), or (experts, ranks) for fused experts.
    """
    size = gradient.abs()
    if ".experts." not in name:
        return size.amax(1 if "lora_A" in name else 0)
    if "lora_A" in name:
        return size.view(EXPERTS, R, -1).amax(-1)
    return size.view(-1, R, EXPERTS).amax(0).T


def record_routing(model, length):
    """Which experts each block's router chooses while the model runs: {block: set of experts}.

    The last token of a row has no loss, so it is left out.
    """
    chosen = {}

    def hook_for(block):
        def hook(_, inputs):
            experts = inputs[1].unflatten(0, (-1, length))[:, :-1]
            chosen.setdefault(block, set()).update(experts.flatten().tolist())
        return hook

    for n, m in model.named_modules():
        if n.endswith(".mixer.experts"):
            m.register_forward_pre_hook(hook_for(block_index(n)))
    return chosen


@pytest.mark.parametrize("length", [60, 3], ids=["many tokens", "three tokens"])
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("prepare", [as_loaded, make_fast])
def test_gradients_on_all_ranks(prepare, group, length):
    """Every row of A and every column of B learns; of the experts, exactly those with tokens."""
    model = fill(prepare(attach_lora(load_toy(), recipe_for(group)))).train()
    chosen = record_routing(model, length)
    x = token_ids(4 if length > 10 else 1, length)
    model(x, labels=x, use_cache=False).loss.backward()
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert found.keys() == trainable(model).keys() and groups_of(found, model) == {group}
    matrices = select_matrices(list_matrices(prepare(load_toy())), [group])
    modules = {m.name.rsplit(".", 1)[0] if m.fused else m.name for m in matrices}
    assert len(found) == 2 * len(matrices) and {base_name(n) for n in found} == modules
    for n, gradient in found.items():
        learns = largest_by_rank(n, gradient) > 0
        if group != "routed_experts":
            assert learns.shape == (R,) and learns.all(), n
            continue
        used = chosen[block_index(n)]
        assert len(used) == EXPERTS if length > 10 else len(used) < EXPERTS
        has_tokens = torch.tensor([e in used for e in range(EXPERTS)])
        assert torch.equal(learns, has_tokens[:, None].expand(-1, R)), n


def train_toy(model, recipe, folder):
    """Four steps by the package's trainer; returns the trainer."""
    from medmcqa_lora.data.leakage import load_pair
    from medmcqa_lora.data.tokens import encode_questions
    from medmcqa_lora.model.resolve import load_tokenizer
    from medmcqa_lora.training.trainer import make_trainer, run_training

    tokenizer = load_tokenizer(recipe)
    encoded = encode_questions(load_pair(recipe)[0].questions, tokenizer, recipe)
    trainer = make_trainer(model, tokenizer, encoded, recipe, folder)
    run_training(trainer, folder)
    return trainer


def logits(model):
    with torch.no_grad():
        return model.eval()(token_ids(2, 50)).logits


@pytest.mark.parametrize("group", GROUPS)
def test_nothing_else_moves_and_merging_keeps_it(group, tmp_path):
    """Every tensor of the group moves, and no other; merged, the model says the same."""
    base = make_fast(load_toy())
    plain = logits(base)
    model = make_fast(attach_lora(base, recipe_for(group)))

    def tensors():
        return dict((*model.named_parameters(), *model.named_buffers()))

    before = {n: t.clone() for n, t in tensors().items()}
    trainer = train_toy(model, recipe_for(group), tmp_path)
    optimized = {id(p) for g in trainer.optimizer.param_groups for p in g["params"]}
    assert optimized == {id(p) for p in trainable(model).values()}
    after = tensors()
    assert after.keys() == before.keys() and len(before) > 40
    moved = {n for n in before if not torch.equal(before[n], after[n])}
    assert moved == trainable(model).keys() and groups_of(moved, model) == {group}

    adapted = logits(model)
    merged = logits(model.merge_and_unload())
    assert (adapted - plain).abs().max() > 1e-2 * plain.abs().max()  # there is something to lose
    assert (merged - adapted).abs().max() < 1e-5 * adapted.abs().max()


# Published sizes, from the model cards' config.json files.
NANO_30B = json.loads(shipped_file("assets/nemotron_nano_config.json").read_text())
NANO_9B = dict(
    hybrid_override_pattern="M-M-M-MM-M-M-M*-M-M-M*-M-M-M-M*-M-M-M-M*-M-MM-M-M-M-M-M-",
    vocab_size=131072, hidden_size=4480, intermediate_size=15680, num_attention_heads=40,
    num_key_value_heads=8, head_dim=128, mamba_num_heads=128, mamba_head_dim=80,
    ssm_state_size=128, n_groups=8, conv_kernel=4)
LLAMA_8B = dict(
    hidden_size=4096, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8,
    intermediate_size=14336, vocab_size=128256)
QWEN_05B = dict(
    hidden_size=896, num_hidden_layers=24, num_attention_heads=14, num_key_value_heads=2,
    intermediate_size=4864, vocab_size=151936, tie_word_embeddings=True)
SMOLLM2 = dict(
    hidden_size=576, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3,
    intermediate_size=1536, vocab_size=49152, tie_word_embeddings=True)
SIZES = {  # model type and settings; parameters in billions; blocks by kind; matrices by group
    "Nano 30B": (
        "nemotron_h", NANO_30B, 31.58, {"mamba": 23, "moe": 23, "attention": 6},
        {"attention": 24, "mamba_in": 23, "shared_experts": 46, "routed_experts": 46}),
    "Nano 9B v2": (
        "nemotron_h", NANO_9B, 8.89, {"mamba": 27, "mlp": 25, "attention": 4},
        {"attention": 16, "mamba_in": 27, "mlp": 50}),
    "toy": (
        "nemotron_h", TOY, 0.00034, {"mamba": 2, "moe": 2, "attention": 1, "mlp": 1},
        {"attention": 4, "mamba_in": 2, "shared_experts": 4, "routed_experts": 4, "mlp": 2}),
    "Llama 3.1 8B": (
        "llama", LLAMA_8B, 8.03, {"attention + mlp": 32}, {"attention": 128, "mlp": 96}),
    "Qwen2.5 0.5B": (
        "qwen2", QWEN_05B, 0.494, {"attention + mlp": 24}, {"attention": 96, "mlp": 72}),
    "SmolLM2 135M": (
        "llama", SMOLLM2, 0.134515008, {"attention + mlp": 30}, {"attention": 120, "mlp": 90}),
}


def structure(name):
    """A published model without its weights."""
    kind, settings = SIZES[name][:2]
    config = AutoConfig.for_model(**{"model_type": kind, **settings})
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def parameters_of_lora(matrix):
    """By the formula, for rank 8, and 2 for experts."""
    rank, experts = (2, matrix.shape[0]) if matrix.fused else (8, 1)
    return rank * (matrix.shape[-1] + matrix.shape[-2]) * experts


@pytest.mark.parametrize("name", SIZES)
def test_any_architecture(name):
    """Each group alone, all together; counted from shapes, by PEFT, and by the formula."""
    kinds, groups = SIZES[name][3:]
    matrices = list_matrices(structure(name))
    for targets in (*([g] for g in groups), list(groups)):
        recipe = Recipe(lora_targets=targets, lora_r=8, lora_r_experts=2)
        model = structure(name)
        report = lora_report(get_peft_model(model, lora_config(model, recipe))).set_index("group")
        assert report.matrices.to_dict() == {g: groups[g] for g in targets}
        assert report.share.sum() == pytest.approx(1, abs=1e-3)
        of_group = {g: [m for m in matrices if m.group == g] for g in targets}
        by_formula = {g: sum(map(parameters_of_lora, of_group[g])) for g in targets}
        assert report.trainable.to_dict() == by_formula
        with_group = {g: {block_index(m.name) for m in of_group[g]} for g in targets}
        assert report.blocks.to_dict() == {g: len(with_group[g]) for g in targets}
        blocks = block_table(structure(name), recipe)
        assert blocks.kind.value_counts().to_dict() == kinds
        assert blocks.trainable.sum() == report.trainable.sum()
    strip = plot_blocks(blocks)
    bars = sum(len(c.patches) for c in strip.axes[0].containers)
    assert bars == len(blocks) == sum(kinds.values())


@pytest.mark.parametrize("name", SIZES)
def test_published_sizes(name):
    billions = sum(p.numel() for p in structure(name).parameters()) / 1e9
    assert billions == pytest.approx(SIZES[name][2], rel=2e-3)


def test_the_size_of_smollm2():
    assert sum(p.numel() for p in structure("SmolLM2 135M").parameters()) == 134_515_008


@pytest.mark.parametrize("name", SIZES)
def test_targets_that_can_not_be_had(name):
    groups, matrices = SIZES[name][4], list_matrices(structure(name))
    for target in ("mamba_out", "router"):
        with pytest.raises(ValueError, match=f"{target} is refused: "):
            select_matrices(matrices, [target])
    for target in (*(set(GROUPS) - set(groups)), "atention", "gate"):
        with pytest.raises(ValueError, match=f"{target} matches nothing in this model"):
            select_matrices(matrices, ["attention", target])


def test_why_a_target_is_refused():
    matrices = list_matrices(load_toy())
    with pytest.raises(ValueError, match="unbalance the experts"):
        select_matrices(matrices, ["router"])
    with pytest.raises(ValueError, match="bypass the adapter"):
        select_matrices(matrices, ["out_proj"])


@pytest.mark.parametrize("prepare", [as_loaded, make_fast])
def test_groups_beside_names_of_matrices(prepare):
    """A group and a name that is in it are no more than the group; a name reaches every group."""
    matrices = list_matrices(prepare(load_toy()))
    attention = select_matrices(matrices, ["attention"])
    assert select_matrices(matrices, ["attention", "q_proj"]) == attention
    by_name = select_matrices(matrices, ["up_proj"])
    assert {m.group for m in by_name} == {"shared_experts", "mlp"}
    names = ["mixer.experts.up_proj", "mixer.experts.down_proj"]
    assert select_matrices(matrices, names) == select_matrices(matrices, ["routed_experts"])
    in_mlp = [f"model.layers.4.mixer.{x}_proj" for x in ("up", "down")]
    assert [m.name for m in select_matrices(matrices, ["mlp"])] == in_mlp


def test_the_groups_of_the_toy():
    groups = {m.group for m in list_matrices(load_toy())}
    assert groups == {*GROUPS, "mamba_out", "other"}


def test_the_plan_prints_a_row_a_group(cli):
    options = ("-p", "lora_targets", ", ".join(GROUPS), "-p", "lora_r_experts", "2")
    code, out, _ = cli("plan", "--recipe", "toy", *options)
    assert code == 0
    assert re.search(r"group +block +blocks +matrices +trainable +share", out)
    table = out.replace(",", "").partition("LoRA trains")[2]
    lines = [line.split() for line in table.splitlines() if line.split()]
    rows = {words[0]: words[1:] for words in lines if words[0] in GROUPS}
    assert rows.keys() == set(GROUPS)
    experts, attention = 2 * 2 * EXPERTS * 2 * (64 + 48), 4 * (2 * (64 + 64) + 2 * (64 + 32))
    assert rows["routed_experts"][:4] == ["moe", "2", "4", str(experts)]
    assert rows["attention"][:4] == ["attention", "1", "4", str(attention)]
    assert sum(float(r[4].rstrip("%")) for r in rows.values()) == pytest.approx(100, abs=0.3)
