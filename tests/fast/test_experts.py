"""LoRA on routed experts by grouped products, and fused blocks: the numbers and files of PEFT."""
import copy
import os
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from conftest import ALL
from peft import PeftModel, get_peft_model
from torch import nn
from transformers.utils import logging

from medmcqa_lora.core.recipe import Recipe
from medmcqa_lora.core.recipe_files import load_recipe
from medmcqa_lora.fast import experts
from medmcqa_lora.fast.apply import apply_fast_parts
from medmcqa_lora.fast.experts import (
    grouped_experts,
    is_grouped,
    sort_by_expert,
    undo_grouped_experts,
    unwrap_experts,
    use_grouped_experts,
)
from medmcqa_lora.model.adapter import load_adapter, save_adapter
from medmcqa_lora.model.load import load_model
from medmcqa_lora.model.lora import attach_lora, lora_config, lora_report

UP, DOWN = "mixer.experts.up_proj", "mixer.experts.down_proj"
TARGETS = {
    "both": (UP, DOWN), "up": (UP,), "down": (DOWN,), "down_up": (DOWN, UP),
    "all": ("q_proj", "in_proj", "up_proj", "down_proj", UP, DOWN),
}
logging.disable_progress_bar()
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    # they do match: names of fused parameters
    pytest.mark.filterwarnings("ignore:The following rank_pattern keys:RuntimeWarning"),
]


def recipe(*targets, r=4, **settings):
    targets = list(targets or (UP, DOWN))
    return Recipe(
        model="toy-nemotron-h", lora_targets=targets, lora_r=4, lora_r_experts=r, **settings)


def base(chosen=None):
    """The model as transformers computes it."""
    chosen = replace(chosen or recipe(), fast="off")
    return apply_fast_parts(load_model(chosen), chosen)


def adapted(chosen):
    """The model with LoRA, as a run trains it."""
    return apply_fast_parts(attach_lora(load_model(chosen), chosen), chosen)


def fill(model, std=0.05):
    """Values in B, which PEFT starts at zero."""
    torch.manual_seed(1)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, std=std)
    return model


def both(chosen):
    """The same adapted model twice: (by PEFT's way, by ours)."""
    theirs, ours = (fill(adapted(chosen)).train() for _ in range(2))
    undo_grouped_experts(theirs)
    assert any(is_grouped(m) for m in ours.modules())
    assert not any(is_grouped(m) for m in theirs.modules())
    return theirs, ours


def mixture_of(model):
    """The mixer of the first MoE block of an adapted model."""
    return model.base_model.model.model.layers[1].mixer


def mixtures(chosen):
    """The same adapted mixture of experts twice: (by PEFT's way, by ours)."""
    return tuple(map(mixture_of, both(chosen)))


def ids(rows=2, length=40, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 1000, (rows, length), generator=generator)


def gradients(model, x):
    model.zero_grad()
    loss = model(x, labels=x, use_cache=False).loss
    loss.backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return loss.item(), found


def difference(a, b):
    """Largest difference, relative to the largest number."""
    return ((a - b).abs().max() / b.abs().max()).item()


def check_same(found, wanted):
    """A loss and gradients, within 1e-5 of their size."""
    (loss, got), (expected, want) = found, wanted
    assert loss == pytest.approx(expected, rel=1e-5)
    off = {n: difference(got[n], g) for n, g in want.items()}
    worst = max(off, key=off.get)
    assert all(d < 1e-5 for d in off.values()), (worst, off[worst])


def logits(model, x):
    with torch.no_grad():
        return model.eval()(x).logits


def with_gradients(block, x, index, w):
    """What a mixture's experts give for the routes given, and the gradients of all that trains."""
    given = [t.clone().requires_grad_() for t in (x, w)]
    y = block.experts(given[0], index, given[1])
    trained = [p for p in block.parameters() if p.requires_grad]
    return [y.detach(), *torch.autograd.grad(y.square().sum(), (*given, *trained))]


@pytest.mark.parametrize("index, ends", [
    (torch.tensor([[3, 1]]), [0, 1, 1, 2]),  # an expert without tokens ends where the last one does
    (torch.full((5, 1), 2), [0, 0, 5, 5]),  # all tokens at the same expert
])
def test_experts_without_tokens_in_the_order(index, ends):
    assert sort_by_expert(index, 4)[2].tolist() == ends


def test_the_loop_keeps_its_operands_type_under_autocast():
    x, up = torch.randn(20, 16), torch.randn(4, 16, 24)
    ends = torch.tensor([3, 8, 8, 20], dtype=torch.int32)
    expected = experts.grouped_loop(x.double(), up.double(), ends).float()
    with torch.autocast("cpu", torch.bfloat16):
        found = experts.grouped_loop(x, up, ends)
    assert found.dtype == torch.float32 and difference(found, expected) < 1e-6


@pytest.mark.parametrize("targets, r", [
    ("both", 4), ("all", 5), ("up", 16), ("down", 1), ("down_up", 8)])
def test_twenty_steps_beside_peft(targets, r):
    """Every loss and every gradient of 20 steps, each model on its own way; only LoRA moves."""
    # a scale of 32 / r: AdamW amplifies rounding by the scale
    models = theirs, ours = both(recipe(*TARGETS[targets], r=r, lora_alpha=128 // r))
    start = {n: p.clone() for n, p in ours.named_parameters()}
    optimizers = [
        torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], lr=1e-3) for m in models]
    losses = []
    for step in range(20):
        x = ids(seed=step % 4)
        wanted, found = (gradients(m, x) for m in models)
        trained = {n for n, p in ours.named_parameters() if p.requires_grad}
        assert set(found[1]) == set(wanted[1]) == trained
        check_same(found, wanted)
        losses.append(found[0])
        for optimizer in optimizers:
            optimizer.step()
    assert losses[-1] < losses[0]
    for n, p in ours.named_parameters():
        lora = ".lora_" in n
        assert p.requires_grad == lora and torch.equal(p, start[n]) != lora, n


def test_every_rank_of_every_expert_learns():
    _, ours = both(recipe(r=6))
    _, found = gradients(ours, ids(4, 60))
    for n, g in found.items():
        a = "lora_A" in n
        each = g.view(8, 6, -1).abs().amax(-1) if a else g.view(-1, 6, 8).abs().amax(0)
        assert (each > 0).all(), n
    count = sum(g.numel() for g in found.values())
    assert lora_report(ours).trainable.sum() == count == 2 * 8 * 6 * 2 * (64 + 48)


def test_float64_to_the_last_digits():
    """With the rounding taken away, the two ways agree to 1e-12: they are the same formula."""
    theirs, ours = (mixture_of(m.double()) for m in both(recipe(r=5)))
    theirs.config._experts_implementation = "eager"  # transformers' own has no float64
    # the router itself computes in float32, so its part is given
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(60, 64, generator=generator).double()
    w = torch.rand(60, 3, generator=generator).double()
    index = torch.rand(60, 8, generator=generator).topk(3).indices
    wanted, found = (with_gradients(block, x, index, w) for block in (theirs, ours))
    assert len(wanted) == 3 + 4
    for want, got in zip(wanted, found):
        assert difference(got, want) < 1e-12


# What a router can do. (T, k) experts of 8.
ROUTES = {
    "experts without tokens": torch.tensor([[0, 7], [7, 3], [3, 0], [0, 3]]),
    "all tokens to the same": torch.tensor([[5, 2]] * 6),
    "one expert, k = 1": torch.full((6, 1), 4),
    "a single token": torch.tensor([[6, 1]]),
    "a single slot": torch.tensor([[2]]),
    "an expert twice": torch.tensor([[1, 1], [1, 2], [2, 2]]),
    "all experts": torch.arange(8).repeat(3, 1),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("r", [3, 8])
@pytest.mark.parametrize("route", ROUTES)
def test_routes(route, r, dtype):
    """The experts alone, with the routes given; in bfloat16 the reference is float32."""
    index = ROUTES[route]
    theirs, ours = mixtures(recipe(r=r))
    theirs.config._experts_implementation = "eager"
    for p in ours.experts.get_base_layer().parameters():
        p.data = p.data.to(dtype)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(len(index), 64, generator=generator)
    w = torch.rand(*index.shape, generator=generator)
    results = []
    for block in (theirs, ours):
        given = [t.clone().requires_grad_() for t in (x, w)]
        y = block.experts(given[0], index, given[1])
        y.square().mean().backward()
        trained = [p for p in block.experts.parameters() if p.requires_grad]
        results.append([y.detach(), *(t.grad for t in (*given, *trained))])
    wanted, found = results
    assert len(wanted) == 3 + 4
    bound = 1e-5 if dtype == torch.float32 else 3e-2
    for want, got in zip(wanted, found):
        assert got is not None and got.isfinite().all() and got.dtype == torch.float32
        assert difference(got, want) < bound
    a = [p.grad for n, p in ours.experts.named_parameters() if "lora_A" in n]
    absent = [e for e in range(8) if e not in index]
    assert all(not g.view(8, r, -1)[absent].any() for g in a)  # a gradient, and it is zero


@pytest.mark.parametrize("targets, index", [
    ("both", [[2, 0], [1, 3], [0, 1]]), ("up", [[2, 0], [1, 3], [0, 1]]),
    ("down", [[2, 0], [1, 3], [0, 1]]), ("none", [[2, 0], [1, 3], [0, 1]]),
    ("both", [[0, 3], [3, 0], [1, 0]]),  # an expert without a token
    ("both", [[2], [2], [2]]), ("both", [[1, 2]])], ids=str)
def test_gradients_beside_numerical_differences(targets, index):
    """LoRA on both matrices, on one, on none; some routes."""
    index = torch.tensor(index)
    generator = torch.Generator().manual_seed(0)

    def make(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64) / shape[-1] ** 0.5

    up, down = make(4, 24, 16), make(4, 16, 24)
    factors = [make(4, 8, n).requires_grad_() for n in (16, 24, 24, 16)]
    for name, at in (("up", slice(2)), ("down", slice(2, 4))):
        if targets not in ("both", name):
            factors[at] = [None, None]
    slots = sort_by_expert(index, 4)

    def run(x, w, *factors):
        return experts.GroupedExperts.apply(x, w, up, down, *factors, *slots)

    x, w = make(len(index), 16), torch.rand(index.shape, generator=generator, dtype=torch.float64)
    assert torch.autograd.gradcheck(run, (x.requires_grad_(), w.requires_grad_(), *factors))


def test_ties_in_the_router():
    """Equal scores for all experts: top-k takes what it takes, and both ways get the same."""
    theirs, ours = both(recipe())
    for m in (theirs, ours):
        for n, p in m.named_parameters():
            if n.endswith("gate.weight"):
                p.data.zero_()
    (want, wanted), (got, gotten) = (gradients(m, ids()) for m in (theirs, ours))
    assert got == pytest.approx(want, rel=1e-5)
    for n, g in wanted.items():
        if g.abs().max() > 0:
            assert difference(gotten[n], g) < 1e-5
        else:
            assert not gotten[n].any()


def test_a_single_token():
    theirs, ours = both(recipe())
    x = ids(1, 2)
    check_same(gradients(ours, x), gradients(theirs, x))
    assert difference(logits(ours, x[:, :1]), logits(theirs, x[:, :1])) < 1e-5


def test_activation_checkpointing():
    """The same gradients to the bit with use_reentrant=False; the pre-activations are not kept."""
    _, ours = both(recipe())
    plain_loss, plain = gradients(ours, ids())
    kept = []

    def keep(t):
        kept.append(tuple(t.shape))
        return t

    ours.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert gradients(ours, ids())[0] == plain_loss
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        ours.zero_grad()
        loss = ours(ids(), labels=ids(), use_cache=False).loss
    assert (2 * 40 * 2, 48) not in kept and kept
    loss.backward()
    for n, p in ours.named_parameters():
        if p.requires_grad:
            assert torch.equal(p.grad, plain[n]), n


@pytest.mark.parametrize("targets", [(UP, DOWN), (DOWN,)], ids=["both", "down"])
def test_only_the_pre_activation_is_kept(targets):
    """Besides parameters: (slots, width) once, thin products of the rank, the routing weights, the
    order; the input for LoRA on up."""
    _, block = mixtures(recipe(*targets, r=8))
    x, w = torch.randn(20, 64, requires_grad=True), torch.rand(20, 2, requires_grad=True)
    index = torch.rand(20, 8).topk(2).indices
    own, kept = {p.data_ptr() for p in block.parameters()}, []

    def keep(t):
        kept.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        block.experts(x, index, w)
    kept = [t for t in kept if t.data_ptr() not in own and t.is_floating_point()]
    sizes = sorted(tuple(t.shape) for t in kept if t.shape[0] != 8)
    expected = [(40, 48), (40, 8), (40, 1)]
    if UP in targets:
        expected += [(40, 8), (20, 64)]
    assert sizes == sorted(expected), sizes


def test_products_are_few_and_laid_out_for_the_gpu():
    """Three products forward and five backward per matrix, two fewer where the input needs no
    gradient. On a GPU, rows × rows has to come as (column-major, row-major), or an expert without
    rows stops the kernel."""
    seen, real = [], torch.nn.functional.grouped_mm

    def watch(a, b, offs):
        seen.append((b.ndim, a.stride(), b.stride()))
        return real(a, b, offs=offs)

    _, block = mixtures(recipe(r=3))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.functional, "grouped_mm", watch)
        block(torch.randn(1, 20, 64, requires_grad=True)).sum().backward()
        assert len(seen) == 3 + 3 + 5 + 5
        block(torch.randn(1, 20, 64)).sum().backward()
        assert len(seen) == 16 + 3 + 3 + 5 + 3
    rows = [(a, b) for ndim, a, b in seen if ndim == 2]
    assert len(rows) == 8
    for a, b in rows:
        assert a[0] == 1 and a[1] % 8 == 0 and b[1] == 1 and b[0] % 8 == 0, rows


def test_where_torch_has_no_grouped_product(monkeypatch):
    """The loop over experts gives the same as torch's grouped product, in the complete model."""
    _, ours = both(recipe(r=3))
    wanted = gradients(ours, ids())
    monkeypatch.setattr(experts, "can_group", lambda a, b: False)
    check_same(gradients(ours, ids()), wanted)


@pytest.mark.parametrize("loop", [False, True], ids=["grouped", "loop"])
def test_bfloat16_is_no_further_from_float32_than_pefts(loop, monkeypatch):
    """Weights in bfloat16, adapter in float32, autocast: as the 30B model trains. Errors against
    float32, of logits and all gradients."""
    if loop:
        monkeypatch.setattr(experts, "can_group", lambda a, b: False)
    exact, _ = both(recipe(r=8))
    pair = both(recipe(r=8))
    for m in pair:
        for p in m.parameters():
            if not p.requires_grad:
                p.data = p.data.bfloat16()
    errors = torch.zeros(2, 2)  # by PEFT and by us, of logits and gradients
    for seed in range(5):  # a token whose experts change with the rounding can outweigh all else
        x = ids(seed=seed)
        expected, (_, wanted) = logits(exact, x), gradients(exact.train(), x)
        for row, m in zip(errors, pair):
            with torch.autocast("cpu", torch.bfloat16):
                _, found = gradients(m.train(), x)
                out = logits(m, x).float()
            assert all(g.dtype == torch.float32 for g in found.values())
            squares = sum((found[n] - g).square().sum() for n, g in wanted.items())
            row += torch.stack([(out - expected).norm(), squares.sqrt()])
    peft, ours = errors
    print(f"bfloat16 against float32, five inputs: logits and gradients {peft.tolist()} by PEFT, "
          f"{ours.tolist()} by us")
    assert (ours < 1.1 * peft).all(), errors


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_compiled(dtype):
    """torch.compile takes the block in one graph in bfloat16, and in pieces in float32, which its
    grouped product doesn't know."""
    torch._dynamo.reset()
    block = mixtures(recipe(r=8))[1].to(dtype)
    compiled = torch.compile(block, backend="aot_eager", fullgraph=dtype == torch.bfloat16)
    x, found = torch.randn(1, 20, 64, dtype=dtype), []
    for run in (block, compiled):
        block.zero_grad()
        y = run(x)
        y.square().mean().backward()
        found.append([y.detach(), *(p.grad for p in block.parameters() if p.requires_grad)])
    wanted, got = found
    assert len(wanted) == 1 + 4
    assert all(difference(b, a) < 1e-5 for a, b in zip(wanted, got))


def test_files_both_ways(tmp_path: Path):
    theirs, ours = both(recipe("q_proj", "in_proj", "up_proj", "down_proj", UP, DOWN, r=5))
    saved = {n: save_adapter(m, tmp_path / n) for n, m in (("theirs", theirs), ("ours", ours))}
    files = [(folder / "adapter_model.safetensors").read_bytes() for folder in saved.values()]
    assert files[0] == files[1]
    want = logits(theirs, ids())
    by_peft = PeftModel.from_pretrained(base(), str(saved["ours"]))
    by_us = apply_fast_parts(load_adapter(load_model(recipe()), saved["theirs"]), recipe())
    assert any(is_grouped(m) for m in by_us.modules())
    assert not any(is_grouped(m) for m in by_peft.modules())
    assert torch.equal(logits(by_peft, ids()), want)
    assert difference(logits(by_us, ids()), want) < 1e-5
    config = lora_config(base(), recipe(r=5))
    assert set(config.rank_pattern.values()) == {5}  # the experts' own rank


def test_merge_unmerge_and_switching_off():
    plain, (_, ours) = logits(base(), ids()), both(recipe())
    adapted_logits = logits(ours, ids())

    def is_adapted():
        return difference(logits(ours, ids()), adapted_logits) < 1e-5

    def is_plain():
        return difference(logits(ours, ids()), plain) < 1e-5

    assert difference(adapted_logits, plain) > 1e-3
    with ours.disable_adapter():
        assert is_plain()
    ours.merge_adapter()
    assert is_adapted()
    ours.unmerge_adapter()
    assert is_adapted()
    ours.merge_adapter()
    with ours.disable_adapter(), warnings.catch_warnings():  # PEFT unmerges first
        warnings.simplefilter("ignore")
        assert is_plain()
    if any(w.merged for w in unwrap_experts(mixture_of(ours).experts)[0]):
        ours.unmerge_adapter()
    merged = ours.merge_and_unload()
    assert not any(is_grouped(m) for m in merged.modules())
    assert difference(logits(merged, ids()), adapted_logits) < 1e-5


def test_several_adapters():
    theirs, ours = both(recipe(r=3))
    config = lora_config(base(), recipe(r=6))
    for m in (theirs, ours):
        torch.manual_seed(2)
        m.add_adapter("second", config)
        fill(m)
        m.base_model.set_adapter(["default", "second"])
    wanted, found = (gradients(m, ids()) for m in (theirs, ours))
    assert any("second" in n for n in wanted[1])
    check_same(found, wanted)
    for m in (theirs, ours):
        m.set_adapter("second")
    assert difference(logits(ours, ids()), logits(theirs, ids())) < 1e-5


def test_frozen_experts():
    """No LoRA on the experts: the same logits and the same gradients of what lies before them."""
    model = adapted(recipe("q_proj", "in_proj", fast="off"))
    assert not any(is_grouped(m) for m in model.modules())
    fill(model).train()
    wanted = gradients(model, ids())
    with grouped_experts(model) as names:
        assert len(names) == 2
        found = gradients(model, ids())
    check_same(found, wanted)
    assert not any(is_grouped(m) for m in model.modules())


def test_grouped_experts_leaves_a_model_as_it_was():
    model = adapted(recipe("q_proj"))
    undo_grouped_experts(model)
    with grouped_experts(model, adapted=True) as names:
        assert names == []  # no adapter on the experts, nothing to do
    with grouped_experts(model) as names:
        assert use_grouped_experts(model) == names  # again: the same
        with grouped_experts(model):
            pass  # the inner block leaves them on
        assert sum(map(is_grouped, model.modules())) == len(names) == 2
    assert not any(is_grouped(m) for m in model.modules())


def test_base_before_adapter():
    """Switched over while bare, then adapted: the bare module within still gives PEFT's way what
    it needs."""
    bare = apply_fast_parts(load_model(recipe()), recipe())
    assert sum(map(is_grouped, bare.modules())) == 2
    torch.manual_seed(recipe().seed)
    wrapped = fill(get_peft_model(bare, lora_config(bare, recipe()))).train()
    wanted = gradients(both(recipe())[0], ids())
    for _ in range(2):  # PEFT's wrapper around a switched module, then the wrapper switched too
        check_same(gradients(wrapped, ids()), wanted)
        use_grouped_experts(wrapped)
    undo_grouped_experts(wrapped)
    assert not any(is_grouped(m) for m in wrapped.modules())


def test_experts_that_train_themselves_keep_their_gradient():
    model = base().train().requires_grad_()
    x, weight = ids(), model.model.layers[1].mixer.experts.up_proj
    model(x, labels=x).loss.backward()
    want, weight.grad = weight.grad, None
    with grouped_experts(model):
        model(x, labels=x).loss.backward()
    assert torch.equal(weight.grad, want)


def test_other_forms_are_left_alone():
    model = base()
    layer = model.model.layers[1].mixer.experts
    layer.has_bias = True
    assert use_grouped_experts(model) == ["model.layers.5.mixer.experts"]
    undo_grouped_experts(model)
    layer.has_bias, layer.forward = False, lambda *args: None  # somebody else's
    assert use_grouped_experts(model) == ["model.layers.5.mixer.experts"]
    undo_grouped_experts(model)
    assert "forward" in vars(layer)


def test_copies_and_inference_mode():
    _, ours = both(recipe())
    want = logits(ours, ids())
    other = copy.deepcopy(ours)
    fill(ours, std=0.5)
    assert torch.equal(logits(other, ids()), want)  # its own parameters, not the first one's
    with torch.inference_mode():
        assert torch.equal(other.eval()(ids()).logits, want)
    x, index, w = torch.randn(2, 64), torch.zeros(2, 1, dtype=torch.long), torch.ones(2, 1)
    with pytest.raises(ValueError, match="mixed"):
        mixture_of(other).experts(x, index, w, adapter_names=["a", "b"])


def test_a_block_that_is_not_of_the_known_form_runs_its_own_forward():
    """A hook inside a block, a forward that somebody else replaced there, or a trained norm."""
    chosen = load_recipe("toy")
    model = apply_fast_parts(load_model(chosen), chosen)
    blocks = [m for m in model.modules() if type(m).__name__ == "NemotronHBlock"]
    block = next(b for b in blocks if b.block_type == "moe")
    gate, calls = block.mixer.gate, []
    h = torch.randn(1, 5, 64, requires_grad=True)
    expected = block(h)

    def is_fused():
        return "MixtureFunction" in str(block(h).grad_fn.next_functions)

    assert is_fused()
    for inside in (block.mixer.experts, block.norm):
        hook = inside.register_forward_hook(lambda *args: calls.append(1))
        assert (block(h) - expected).norm() < 1e-5 * expected.norm()
        assert not is_fused()
        hook.remove()
    assert len(calls) == 4
    gate.forward = lambda *args: type(gate).forward(gate, *args)
    assert not is_fused()
    del gate.forward
    assert is_fused()
    block.norm.weight.requires_grad_()
    assert not is_fused()
    block(h).sum().backward()
    assert block.norm.weight.grad is not None


def test_through_the_trainer(tmp_path: Path):
    """TRL's loop, 20 steps, by both ways: the same losses."""
    from medmcqa_lora.core.files import read_lines
    from medmcqa_lora.data.leakage import load_pair
    from medmcqa_lora.data.tokens import encode_questions
    from medmcqa_lora.model.resolve import load_tokenizer
    from medmcqa_lora.training.trainer import make_trainer, run_training

    settings = {
        "max_steps": "20", "save_steps": "20", "lora_targets": f"q_proj, in_proj, {UP}, {DOWN}",
        "lora_r_experts": "3", "learning_rate": "1e-3", "gradient_checkpointing": "true",
    }
    chosen = load_recipe("toy", settings)
    tokenizer = load_tokenizer(chosen)
    encoded = encode_questions(load_pair(chosen)[0].questions, tokenizer, chosen)
    losses = []
    for name in ("theirs", "ours"):
        model, folder = adapted(chosen), tmp_path / name
        if name == "theirs":
            undo_grouped_experts(model)
        folder.mkdir()
        run_training(make_trainer(model, tokenizer, encoded, chosen, folder), folder)
        losses.append([m["loss"] for m in read_lines(folder / "metrics.jsonl")])
    theirs, ours = losses
    assert len(ours) == 20 and ours[-1] < ours[0]
    assert ours == pytest.approx(theirs, rel=1e-4)  # the trainer rounds what it logs


def _rank(rank, folder):
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    rendezvous = f"file://{folder}/rendezvous"
    torch.distributed.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=2)
    model = fill(adapted(recipe())).train()
    parallel = nn.parallel.DistributedDataParallel(model, find_unused_parameters=False)
    for _ in range(2):  # the second pass fails if a parameter had no gradient in the first
        model.zero_grad()
        x = ids(1, 2 if rank else 40, seed=rank)  # most experts get no token of rank 1
        parallel(x, labels=x).loss.backward()
    found = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    torch.save(found, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()
    # when DDP is destroyed, torch 2.13 may wait for gloo's thread, which waits for the GIL
    os._exit(0)


def test_two_processes(tmp_path: Path):
    mp.spawn(_rank, (str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    model = fill(adapted(recipe())).train()
    alone = [gradients(model, ids(1, n, seed=rank))[1] for rank, n in ((0, 40), (1, 2))]
    for n, g in first.items():
        mean = (alone[0][n] + alone[1][n]) / 2
        assert torch.equal(g, second[n]) and difference(g, mean) < 1e-5


@pytest.mark.skipif(not ALL, reason="make test-all")
@pytest.mark.parametrize("seed", range(20))
def test_random_shapes(seed):
    """Random numbers of experts, tokens, slots, widths and ranks against W + BA by autograd, in
    float64."""
    generator = torch.Generator().manual_seed(seed)

    def pick(low, high):
        return int(torch.randint(low, high + 1, (1,), generator=generator))

    def make(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    e, t, hidden, width, r = pick(1, 12), pick(1, 40), pick(1, 33), pick(1, 33), pick(1, 9)
    k = pick(1, e)
    x, w = make(t, hidden).requires_grad_(), make(t, k).requires_grad_()
    index = torch.rand(t, e, generator=generator).topk(k).indices
    up, down = make(e, width, hidden), make(e, hidden, width)
    shapes = (e, r, hidden), (e, r, width), (e, r, width), (e, r, hidden)
    lora = a_up, b_up, a_down, b_down = [make(*s).requires_grad_() for s in shapes]
    ours = experts.GroupedExperts.apply(x, w, up, down, *lora, *sort_by_expert(index, e))
    built_up, built_down = up + b_up.mT @ a_up, down + b_down.mT @ a_down
    chosen = index.reshape(-1)
    h = torch.einsum("th,twh->tw", x.repeat_interleave(k, 0), built_up[chosen])
    y = torch.einsum("tw,thw->th", h.relu() ** 2, built_down[chosen])
    plain = (y.view(t, k, hidden) * w[..., None]).sum(1)
    g = make(t, hidden)
    torch.testing.assert_close(ours, plain, rtol=1e-10, atol=1e-9)
    found, wanted = (torch.autograd.grad(result, (x, w, *lora), g) for result in (ours, plain))
    for got, want in zip(found, wanted):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-8)
