"""LoRA targets by meaning: what each group reaches in every architecture, and that it alone trains, on all of its ranks."""
import json
import re

import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging

from medmcqa_lora.model.resolve import TOY
from medmcqa_lora.model.load import load_model
from medmcqa_lora.model.lora import GROUPS, attach_lora, block_table, group_of, list_matrices, lora_config, lora_report, plot_blocks, select
from medmcqa_lora.core.files import shipped
from medmcqa_lora.core.recipe import Recipe
from medmcqa_lora.core.recipe_files import load_recipe
from medmcqa_lora.fast.apply import apply_fast_parts

logging.disable_progress_bar()
pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys:RuntimeWarning")]  # they do match: names of fused parameters
R, EXPERTS = 4, TOY["n_routed_experts"]


def recipe(*groups, **settings):
    return load_recipe("toy", {"lora_targets": ", ".join(groups), "max_steps": "4", "save_steps": "4", "lora_r_experts": str(R), **settings})


def base_name(name):
    """The name that a LoRA parameter's matrix has in the model without LoRA."""
    return re.sub(r"(\.base_layer)*\.lora_[AB]\..*$", "", name).removeprefix("base_model.model.")


def trainable(model):
    return {n: p for n, p in model.named_parameters() if p.requires_grad}


def fill(model):
    """Values in B, which PEFT starts at zero: otherwise A has no gradient."""
    torch.manual_seed(1)
    for n, p in model.named_parameters():
        if "lora_B" in n:
            nn.init.normal_(p, std=0.05)
    return model


def ids(rows, length):
    return torch.randint(3, 1000, (rows, length), generator=torch.Generator().manual_seed(0))


def by_rank(name, g):
    """Largest gradient of each row of A or column of B: (ranks,), or (experts, ranks) of fused experts, in PEFT's layout."""
    if ".experts." not in name:
        return g.abs().amax(1 if "lora_A" in name else 0)
    return g.view(EXPERTS, R, -1).abs().amax(-1) if "lora_A" in name else g.view(-1, R, EXPERTS).abs().amax(0).T


def routed_to(model, length):
    """Which experts each block's router chooses while the model runs, {block: set of experts}; the last token of a row has no loss and no say."""
    chosen = {}
    for n, m in model.named_modules():
        if n.endswith(".mixer.experts"):
            block = int(re.search(r"layers\.(\d+)", n)[1])
            m.register_forward_pre_hook(lambda _, args, block=block: chosen.setdefault(block, set()).update(args[1].unflatten(0, (-1, length))[:, :-1].flatten().tolist()))
    return chosen


@pytest.mark.parametrize("length", [60, 3], ids=["many tokens", "three tokens"])
@pytest.mark.parametrize("group", GROUPS)
def test_gradients_on_all_ranks(group, length):
    """Every row of A and every column of B learns; of the experts, exactly those that got tokens."""
    model = fill(apply_fast_parts(attach_lora(load_model(recipe(group)), recipe(group)), recipe(group))).train()
    chosen = routed_to(model, length)
    x = ids(4 if length > 10 else 1, length)
    model(x, labels=x, use_cache=False).loss.backward()
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert found.keys() == trainable(model).keys() and {group_of(base_name(n), model.config) for n in found} == {group}
    meant = select(list_matrices(apply_fast_parts(load_model(recipe(group)), recipe(group))), [group])
    assert len(found) == 2 * len(meant) and {base_name(n) for n in found} == {m.name.rsplit(".", 1)[0] if m.fused else m.name for m in meant}
    for n, g in found.items():
        learns = by_rank(n, g) > 0
        if group == "routed_experts":
            got = chosen[int(re.search(r"layers\.(\d+)", n)[1])]
            assert len(got) == EXPERTS if length > 10 else len(got) < EXPERTS
            assert torch.equal(learns, torch.tensor([e in got for e in range(EXPERTS)])[:, None].expand(-1, R)), n
        else:
            assert learns.shape == (R,) and learns.all(), n


@pytest.mark.parametrize("group", GROUPS)
def test_nothing_else_moves_and_merging_keeps_it(group, tmp_path):
    """Four steps by the package's trainer: every tensor of the group moves, of all others not a bit; merged, the model says the same."""
    from medmcqa_lora.data.leakage import load_pair
    from medmcqa_lora.data.tokens import encode_questions
    from medmcqa_lora.model.resolve import load_tokenizer
    from medmcqa_lora.training.trainer import make_trainer, train

    chosen = recipe(group)
    tokenizer, base = load_tokenizer(chosen), apply_fast_parts(load_model(chosen), chosen)
    with torch.no_grad():
        plain = base(ids(2, 50)).logits
    model = apply_fast_parts(attach_lora(base, chosen), chosen)
    before = {n: t.clone() for n, t in (*model.named_parameters(), *model.named_buffers())}
    trainer = make_trainer(model, tokenizer, encode_questions(load_pair(chosen)[0].questions, tokenizer, chosen), chosen, tmp_path)
    train(trainer, tmp_path)
    assert {id(p) for g in trainer.optimizer.param_groups for p in g["params"]} == {id(p) for p in trainable(model).values()}
    after = dict((*model.named_parameters(), *model.named_buffers()))
    assert after.keys() == before.keys() and len(before) > 40
    moved = {n for n in before if not torch.equal(before[n], after[n])}
    assert moved == trainable(model).keys() and {group_of(base_name(n), model.config) for n in moved} == {group}

    with torch.no_grad():
        adapted = model.eval()(ids(2, 50)).logits
        merged = model.merge_and_unload()(ids(2, 50)).logits
    assert (adapted - plain).abs().max() > 1e-2 * plain.abs().max()  # there is something to lose
    assert (merged - adapted).abs().max() < 1e-5 * adapted.abs().max()


# Published sizes, from the model cards' config.json files.
NANO_9B = dict(hybrid_override_pattern="M-M-M-MM-M-M-M*-M-M-M*-M-M-M-M*-M-M-M-M*-M-MM-M-M-M-M-M-", vocab_size=131072, hidden_size=4480, intermediate_size=15680,
               num_attention_heads=40, num_key_value_heads=8, head_dim=128, mamba_num_heads=128, mamba_head_dim=80, ssm_state_size=128, n_groups=8, conv_kernel=4)
LLAMA_8B = dict(hidden_size=4096, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8, intermediate_size=14336, vocab_size=128256)
QWEN_05B = dict(hidden_size=896, num_hidden_layers=24, num_attention_heads=14, num_key_value_heads=2, intermediate_size=4864, vocab_size=151936, tie_word_embeddings=True)
SIZES = {  # model type and settings; billions of parameters; blocks by kind; matrices of each group
    "Nano 30B": ("nemotron_h", json.loads(shipped("assets/nemotron_nano_config.json").read_text()), 31.58, {"mamba": 23, "moe": 23, "attention": 6},
                 {"attention": 24, "mamba_in": 23, "shared_experts": 46, "routed_experts": 46}),
    "Nano 9B v2": ("nemotron_h", NANO_9B, 8.89, {"mamba": 27, "mlp": 25, "attention": 4}, {"attention": 16, "mamba_in": 27, "mlp": 50}),
    "toy": ("nemotron_h", TOY, 0.00034, {"mamba": 2, "moe": 2, "attention": 1, "mlp": 1}, {"attention": 4, "mamba_in": 2, "shared_experts": 4, "routed_experts": 4, "mlp": 2}),
    "Llama 3.1 8B": ("llama", LLAMA_8B, 8.03, {"attention + mlp": 32}, {"attention": 128, "mlp": 96}),
    "Qwen2.5 0.5B": ("qwen2", QWEN_05B, 0.494, {"attention + mlp": 24}, {"attention": 96, "mlp": 72}),
}


@pytest.mark.parametrize("name", SIZES)
def test_any_architecture(name):
    """Without weights: blocks by kind, each group alone, all together; counted from shapes, by PEFT, and by the formula."""
    kind, settings, billions, kinds, groups = SIZES[name]
    config = AutoConfig.for_model(**{"model_type": kind, **settings})

    def model():
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config)

    assert sum(p.numel() for p in model().parameters()) / 1e9 == pytest.approx(billions, rel=2e-3)
    matrices = list_matrices(model())
    for targets in (*([g] for g in groups), list(groups)):
        asked = Recipe(lora_targets=targets, lora_r=8, lora_r_experts=2)
        report = lora_report(get_peft_model(base := model(), lora_config(base, asked))).set_index("group")
        assert report.matrices.to_dict() == {g: groups[g] for g in targets}
        assert report.share.sum() == pytest.approx(1, abs=1e-3)
        for g in targets:
            of_group = [m for m in matrices if m.group == g]
            assert report.trainable[g] == sum((2 if m.fused else 8) * (m.shape[-1] + m.shape[-2]) * (m.shape[0] if m.fused else 1) for m in of_group)
        blocks = block_table(model(), asked)
        assert blocks.kind.value_counts().to_dict() == kinds and blocks.trainable.sum() == report.trainable.sum()
        assert report.blocks.to_dict() == {g: len({re.search(r"layers\.(\d+)", m.name)[1] for m in matrices if m.group == g}) for g in targets}
    strip = plot_blocks(blocks)
    assert sum(len(c.patches) for c in strip.axes[0].containers) == len(blocks) == sum(kinds.values())
    for g in ("mamba_out", "router"):
        with pytest.raises(ValueError, match=f"{g} is refused: "):
            select(matrices, [g])
    for g in (*(set(GROUPS) - set(groups)), "atention", "gate"):
        with pytest.raises(ValueError, match=f"{g} matches nothing in this model"):
            select(matrices, ["attention", g])


def test_groups_beside_names_of_matrices():
    """A group and a name that is in it are no more than the group; a name reaches every group that has it."""
    matrices = list_matrices(apply_fast_parts(load_model(recipe("mlp")), recipe("mlp")))
    assert select(matrices, ["attention", "q_proj"]) == select(matrices, ["attention"])
    assert {m.group for m in select(matrices, ["up_proj"])} == {"shared_experts", "mlp"}
    assert select(matrices, ["mixer.experts.up_proj", "mixer.experts.down_proj"]) == select(matrices, ["routed_experts"])


def test_the_plan_prints_a_row_a_group(cli):
    code, out, _ = cli("plan", "--recipe", "toy", "-p", "lora_targets", ", ".join(GROUPS), "-p", "lora_r_experts", "2")
    assert code == 0 and re.search(r"group +block +blocks +matrices +trainable +share", out)
    table = out.replace(",", "").partition("LoRA trains")[2]
    rows = {line.split()[0]: line.split()[1:] for line in table.splitlines() if line.split() and line.split()[0] in GROUPS}
    assert rows.keys() == set(GROUPS)
    assert rows["routed_experts"][:4] == ["moe", "2", "4", str(2 * 2 * EXPERTS * 2 * (64 + 48))]
    assert rows["attention"][:4] == ["attention", "1", "4", str(4 * (2 * (64 + 64) + 2 * (64 + 32)))]
    assert sum(float(r[4].rstrip("%")) for r in rows.values()) == pytest.approx(100, abs=0.3)
