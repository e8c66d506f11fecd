"""The discriminator's formulas: its losses, its experts, its upcycling and its directories, against
plain Python and transformers' own Qwen3-VL-MoE.

The models are tiny, with random weights everywhere (norms and biases too), so that nothing can be
right by being 0 or 1.
"""

import inspect
import json
import math
import shutil

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLMoeForConditionalGeneration,
    Qwen3VLMoeTextConfig,
)
from transformers.models.qwen3_vl_moe.modeling_qwen3_vl_moe import (
    Qwen3VLMoeTextSparseMoeBlock,
    load_balancing_loss_func,
)

from data import Group, Prompt, encode_prompts, encode_views, make_packs, mrope_positions
from discriminator import (
    Discriminator,
    Experts,
    Router,
    SparseMLP,
    balance_loss,
    discriminator_loss,
    grouped,
    load_discriminator,
    pair_loss,
    upcycle,
    view_packs,
)
from support.errors import UserError
from support.huggingface import load_processor, processor_files, save_discriminator, write_files
from tests.conftest import ROOT, fails
from tests.judges import TEACHER, comparisons, example, our_hidden, randomised, their_hidden
from tests.test_policy_gradient import close, repeatable

# --------------------------------------------------------------------------------------------------
# The losses


@given(
    pairs=st.lists(st.tuples(st.floats(-10, 10), st.floats(-10, 10)), min_size=1, max_size=20),
    count=st.none() | st.integers(1, 90),
)
@repeatable
def test_pair_loss(pairs, count):
    teacher, student = (
        torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in zip(*pairs)
    )
    loss = pair_loss(teacher, student, count)
    close(loss.item(), sum(math.log(1 + math.exp(s - t)) for t, s in pairs) / (count or len(pairs)))
    loss.backward()
    expected = [-1 / (1 + math.exp(t - s)) / (count or len(pairs)) for t, s in pairs]
    close(teacher.grad, expected)
    close(student.grad, [-g for g in expected])


def test_pair_loss_far_out():
    """Where exp would overflow: the loss is linear on the wrong side, nothing on the right one, its
    gradient finite."""
    teacher = torch.tensor([1000.0, -1000.0, 0.0], requires_grad=True)
    loss = pair_loss(teacher, torch.zeros(3))
    close(loss.item(), (0 + 1000 + math.log(2)) / 3, 1e-6)
    loss.backward()
    close(teacher.grad, [0, -1 / 3, -1 / 6], 1e-6)


@given(
    seed=st.integers(0, 10**6),
    u=st.integers(1, 9),
    extra=st.integers(0, 9),
    l2=st.sampled_from([0.0, 0.001, 0.5]),
    cut=st.integers(0, 9),
)
@repeatable
def test_discriminator_loss(seed, u, extra, l2, cut):
    """Both views' pair losses, summed; l2 times the mean square of a pair's four scores; over the
    global number of pairs."""
    scores = torch.tensor(np.random.default_rng(seed).uniform(-10, 10, (u, 4)))
    expected = 0.0
    for tp, tr, sp, sr in scores.tolist():
        expected += math.log(1 + math.exp(sp - tp)) + math.log(1 + math.exp(sr - tr))
        expected += l2 * (tp**2 + tr**2 + sp**2 + sr**2) / 4
    close(discriminator_loss(scores, u + extra, l2).item(), expected / (u + extra))
    parts = [
        discriminator_loss(part, u + extra, l2).item() for part in (scores[:cut], scores[cut:])
    ]
    close(sum(parts), expected / (u + extra))  # and no cut changes it, an empty part included


def test_discriminator_loss_has_the_papers_weight():
    assert inspect.signature(discriminator_loss).parameters["score_l2"].default == 0.001
    scores = torch.full((3, 4), 10.0, dtype=torch.float64)
    close(discriminator_loss(scores, 3).item(), 2 * math.log(2) + 0.001 * 100)


@pytest.mark.parametrize("experts, top_k", [(4, 2), (8, 3), (2, 1)])
def test_balance_loss_is_transformers(experts, top_k):
    generator = torch.Generator().manual_seed(experts)
    draw = lambda: 2 * torch.randn(37, experts, generator=generator) + 2 * torch.arange(experts)
    logits = [draw().requires_grad_() for _ in range(3)]
    theirs = load_balancing_loss_func(tuple(logits), experts, top_k)
    their_gradient = torch.autograd.grad(theirs, logits)
    probabilities = [x.softmax(-1) for x in logits]
    ours = balance_loss(probabilities, [p.topk(top_k).indices for p in probabilities])
    close(ours.item(), theirs.item(), 1e-6)
    for mine, other in zip(torch.autograd.grad(ours, logits), their_gradient):
        close(mine, other, 1e-6)
    assert ours > top_k * 1.1  # far from balanced


def test_balance_loss_when_balanced_is_top_k():
    chosen = torch.tensor([[0, 1], [2, 3]])
    close(balance_loss([torch.full((2, 4), 0.25)] * 2, [chosen, chosen]).item(), 2)


# --------------------------------------------------------------------------------------------------
# Experts


@pytest.mark.parametrize(
    "experts, top_k, tokens",
    [(4, 2, (3, 11)), (4, 2, (1, 1)), (6, 3, (1, 40)), (2, 1, (2, 5)), (3, 3, (1, 4))],
)
@pytest.mark.parametrize("idle", [False, True])
def test_sparse_mlp_is_transformers_block(experts, top_k, tokens, idle):
    """Values and gradients, with an expert that no token wants too: its gradient is 0 and not
    missing."""
    if idle and top_k == experts:
        return
    torch.manual_seed(0)
    config = Qwen3VLMoeTextConfig(
        hidden_size=16, moe_intermediate_size=24, num_experts=experts, num_experts_per_tok=top_k
    )
    config._experts_implementation = "eager"
    theirs = Qwen3VLMoeTextSparseMoeBlock(config)
    hidden = torch.randn(*tokens, 16)
    with torch.no_grad():
        for parameter in theirs.parameters():
            torch.nn.init.normal_(parameter, std=0.4)
        if idle:
            hidden[..., 0] = 5.0
            theirs.gate.weight[1, 0] = -20.0
    ours = SparseMLP(
        Router(theirs.gate.weight.detach().clone()),
        Experts(
            theirs.experts.gate_up_proj.detach().clone(),
            theirs.experts.down_proj.detach().clone(),
            theirs.experts.act_fn,
        ),
        top_k,
    )
    inputs = [hidden.clone().requires_grad_() for _ in range(2)]
    outs = [block(x) for block, x in zip((ours, theirs), inputs)]
    torch.testing.assert_close(outs[0], outs[1], atol=1e-5, rtol=1e-5)
    direction = torch.randn(outs[0].shape)
    for out in outs:
        (out * direction).sum().backward()
    pairs = {
        "hidden": inputs,
        "gate": (ours.gate.weight, theirs.gate.weight),
        "gate_up": (ours.experts.gate_up_proj, theirs.experts.gate_up_proj),
        "down": (ours.experts.down_proj, theirs.experts.down_proj),
    }
    for name, (mine, other) in pairs.items():
        assert (mine.grad - other.grad).norm() <= 1e-4 * other.grad.norm() + 1e-7, (
            name
        )  # top_k 1: the gate's is rounding
    if idle:
        assert not (ours.chosen == 1).any() and (ours.experts.gate_up_proj.grad[1] == 0).all()
    logits, _, their_chosen = theirs.gate(hidden)
    assert torch.equal(ours.chosen, their_chosen)
    torch.testing.assert_close(ours.probabilities, logits.softmax(-1))


def test_sparse_mlp_with_allowed_experts():
    """Token by token in float64: softmax over the allowed experts alone, top 2 of them, weights
    summing to 1."""
    rng = np.random.default_rng(0)
    h, i, e = 6, 5, 4
    gate, gate_up, down = (rng.standard_normal(s) for s in ((e, h), (e, 2 * i, h), (e, h, i)))
    hidden = rng.standard_normal((9, h))
    allowed = np.array([[True] * 4, [True, True, False, False], [False, False, True, True]] * 3)
    expected = np.zeros_like(hidden)
    for t, x in enumerate(hidden):
        logits = {k: gate[k] @ x for k in range(e) if allowed[t, k]}
        best = sorted(logits, key=logits.get)[-2:]
        total = sum(math.exp(logits[k]) for k in best)
        for k in best:
            a, b = gate_up[k][:i] @ x, gate_up[k][i:] @ x
            expected[t] += math.exp(logits[k]) / total * (down[k] @ (a / (1 + np.exp(-a)) * b))
    block = SparseMLP(
        Router(torch.tensor(gate)),
        Experts(torch.tensor(gate_up), torch.tensor(down), torch.nn.SiLU()),
        2,
    )
    block.allowed = torch.tensor(allowed)
    x = torch.tensor(hidden[None], requires_grad=True)
    out = block(x)
    close(out.detach()[0], expected, 1e-6)
    assert all(allowed[t, k] for t, chosen in enumerate(block.chosen.tolist()) for k in chosen)
    out.sum().backward()
    assert x.grad.isfinite().all() and all(p.grad.isfinite().all() for p in block.parameters())


@pytest.mark.parametrize("ends", [[3, 3, 7, 10], [0, 0, 10, 10], [2, 5, 9, 10]])
def test_blocks_of_experts_as_on_a_gpu(ends):
    """`grouped_mm`, which a GPU takes, and the products one by one: values and gradients, also of
    experts that nobody has chosen."""
    torch.manual_seed(0)
    rows, weight, seen = torch.randn(10, 8), torch.randn(4, 12, 8), torch.randn(10, 12)
    ends, found = torch.tensor(ends, dtype=torch.int32), []
    for product in (grouped, lambda x, w, e: torch.nn.functional.grouped_mm(x, w.mT, offs=e)):
        leaves = [t.clone().requires_grad_() for t in (rows, weight)]
        out = product(*leaves, ends)
        (out * seen).sum().backward()
        found.append([out, *(leaf.grad for leaf in leaves)])
    for ours, theirs in zip(*found):
        torch.testing.assert_close(ours, theirs)
    assert not found[0][2][ends.diff(prepend=ends.new_zeros(1)) == 0].any()


# --------------------------------------------------------------------------------------------------
# Upcycling


def test_upcycling_copies_with_the_papers_noise(dense):
    defaults = {
        k: p.default
        for k, p in inspect.signature(upcycle).parameters.items()
        if p.default is not p.empty
    }
    assert (
        defaults["num_experts"],
        defaults["top_k"],
        defaults["noise_std"],
        defaults["router_std"],
    ) == (4, 2, 0.01, 0.02)
    before = Qwen3VLForConditionalGeneration.from_pretrained(dense).model
    model = Qwen3VLForConditionalGeneration.from_pretrained(dense).model
    upcycle(model.language_model.layers, torch.Generator().manual_seed(3))
    noises, routers = [], []
    for layer, old in zip(model.language_model.layers, before.language_model.layers):
        experts = layer.mlp.experts
        copy = torch.cat([old.mlp.gate_proj.weight, old.mlp.up_proj.weight])
        assert (
            experts.gate_up_proj.shape == (4, 160, 48)
            and experts.down_proj.shape == (4, 48, 80)
            and layer.mlp.top_k == 2
        )
        for noise in (experts.gate_up_proj - copy, experts.down_proj - old.mlp.down_proj.weight):
            assert abs(noise.std() / 0.01 - 1) < 0.03 and abs(noise.mean()) < 3e-4
            flat = noise.flatten(1)
            assert (torch.corrcoef(flat) - torch.eye(4)).abs().max() < 0.06  # each expert its own
            noises.append(flat[:, :2000])
        routers.append(layer.mlp.gate.weight)
    assert (
        torch.corrcoef(torch.cat(noises)).sub(torch.eye(16)).abs().max() < 0.12
    )  # each layer its own
    routers = torch.cat(routers)
    assert (
        routers.shape == (8, 48)
        and abs(routers.std() / 0.02 - 1) < 0.15
        and abs(routers.mean()) < 0.004
    )
    rest, old = (
        {n: p for n, p in m.state_dict().items() if ".mlp." not in n or "visual" in n}
        for m in (model, before)
    )
    assert (
        rest.keys() == old.keys()
        and all(torch.equal(rest[n], old[n]) for n in rest)
        and len(rest) > 50
    )


def test_upcycling_is_reproducible_and_depends_on_the_seed(dense):
    weights = []
    for seed in (0, 0, 1):
        model = Qwen3VLForConditionalGeneration.from_pretrained(dense).model
        upcycle(model.language_model.layers, torch.Generator().manual_seed(seed))
        weights.append(model.language_model.layers[1].mlp.experts.down_proj)
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


def test_upcycled_without_noise_is_the_dense_model(dense):
    """Whatever the routers say: the weights of a token's experts sum to 1."""
    model = Qwen3VLForConditionalGeneration.from_pretrained(dense)
    processor = load_processor(dense)
    prompt = encode_prompts(processor, [example(0, 2)])[0]
    branch = encode_views(processor, TEACHER)[1]
    with torch.no_grad():
        expected = their_hidden(model, prompt, branch, processor)
        upcycle(model.model.language_model.layers, torch.Generator(), noise_std=0.0, router_std=1.0)
        torch.testing.assert_close(
            their_hidden(model, prompt, branch, processor), expected, atol=2e-5, rtol=1e-4
        )
        upcycle_changes = max(
            float(m.probabilities.max()) for m in Discriminator(model.model, "learned").sparse_mlps
        )
    assert upcycle_changes > 0.9  # the routers did have opinions


def test_upcycling_names_what_it_cannot_turn():
    layer = torch.nn.Module()
    layer.mlp = torch.nn.Sequential(torch.nn.Linear(2, 2))
    with pytest.raises(UserError, match="gate_proj.*Sequential"):
        upcycle([layer], torch.Generator())


# --------------------------------------------------------------------------------------------------
# Directories


def test_transformers_opens_what_is_saved(sparse):
    discriminator, processor, path = sparse
    model, info = Qwen3VLMoeForConditionalGeneration.from_pretrained(
        path, output_loading_info=True, dtype=torch.float32
    )
    assert set(info["unexpected_keys"]) == {"score.weight"}
    assert not info["missing_keys"] and not info["mismatched_keys"] and not info.get("error_msgs")
    ours, theirs = discriminator.model.state_dict(), model.model.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n]) for n in ours)
    config = model.config.text_config
    assert (config.num_experts, config.num_experts_per_tok, config.moe_intermediate_size) == (
        4,
        2,
        80,
    )
    assert (config.decoder_sparse_step, list(config.mlp_only_layers)) == (1, [])
    again = load_processor(path)
    a, b = (encode_prompts(p, [example(0, 1)])[0] for p in (processor, again))
    assert torch.equal(a.input_ids, b.input_ids) and torch.equal(a.pixel_values, b.pixel_values)


@pytest.mark.parametrize("kind", ["learned", "dedicated", "dense", "text"])
def test_round_trip_is_exact(dense, tmp_path, kind):
    discriminator, processor = randomised(dense, kind)
    save_discriminator(discriminator, str(tmp_path / "one"))
    again, _ = load_discriminator(str(tmp_path / "one"), seed=9)  # the directory knows what it is
    save_discriminator(again, str(tmp_path / "two"))
    twice, _ = load_discriminator(str(tmp_path / "two"), seed=10)
    expected = discriminator.state_dict()
    assert len(discriminator.sparse_mlps) == (0 if kind == "dense" else 2)
    for other in (again, twice):
        state = other.state_dict()
        assert other.kind == kind and state.keys() == expected.keys()
        assert all(torch.equal(state[n], expected[n]) for n in expected)
    with torch.no_grad():
        (v,) = view_packs(comparisons(processor), processor, text_only=kind == "text")
        assert torch.equal(discriminator.eval()(v.pack, v.views), again.eval()(v.pack, v.views))


@pytest.mark.parametrize("name", ["score.weight", "v_head.weight", "score_head.weight"])
def test_a_single_headed_checkpoint_fills_both_heads(sparse, tmp_path, name):
    """As the released ones are: one row, read by both views."""
    discriminator, processor, _ = sparse
    save_discriminator(discriminator, str(tmp_path))
    weights = load_file(tmp_path / "model.safetensors")
    row = weights.pop("score.weight")[1:2].clone()
    save_file(weights | {name: row}, tmp_path / "model.safetensors", {"format": "pt"})
    again, _ = load_discriminator(str(tmp_path))
    assert torch.equal(again.score.weight, row.expand(2, -1))
    assert torch.equal(
        again.model.language_model.layers[1].mlp.experts.down_proj,
        discriminator.model.language_model.layers[1].mlp.experts.down_proj,
    )


def test_the_released_layout(world, tmp_path):
    """A checkpoint as transformers 4.57 writes it, experts transposed and `v_head.1.weight`: the
    hidden states of that version's own forward, and its scores from both heads. How it was made:
    tests/released/make.py."""
    released = ROOT / "tests" / "released"
    shutil.copytree(released, tmp_path / "d")
    write_files(tmp_path / "d", processor_files(world["init"]))
    (tmp_path / "d" / "expected.safetensors").unlink()
    stored, expected = (load_file(released / f"{n}.safetensors") for n in ("model", "expected"))
    experts = "model.language_model.layers.0.mlp.experts."
    assert stored[experts + "gate_up_proj"].shape == (4, 8, 12)  # (E, h, 2i)
    assert stored[experts + "down_proj"].shape == (4, 6, 8)  # (E, i, h)
    discriminator, processor = load_discriminator(str(tmp_path / "d"))
    discriminator.eval()
    prompt, grid = expected["prompt"], expected["image_grid_thw"]
    positions = mrope_positions(prompt, grid, 40, 2)
    prompt = Prompt(0, prompt, positions, expected["pixel_values"], grid)
    (pack,) = make_packs([Group(prompt, [expected["branch_0"], expected["branch_1"]])])
    with torch.no_grad():
        hidden = our_hidden(discriminator, pack)[pack.last_tokens]
        scores = [discriminator(pack, torch.tensor(views))[1] for views in ([0, 1], [1, 0])]
    torch.testing.assert_close(hidden, expected["hidden"], atol=1e-5, rtol=1e-5)
    assert expected["scores"].abs().max() < 10 and hidden.std() > 0.1
    for some in scores:
        torch.testing.assert_close(some, expected["scores"], atol=1e-4, rtol=1e-5)
    save_discriminator(discriminator, str(tmp_path / "again"))
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert {tensor.dtype for tensor in again.values()} == {torch.float32}
    assert json.loads((tmp_path / "again" / "config.json").read_text())["dtype"] == "bfloat16"


def test_a_fresh_head_is_drawn_as_in_the_paper(dense):
    heads = torch.cat([load_discriminator(dense, seed=seed)[0].score.weight for seed in range(3)])
    assert heads.shape == (6, 48) and abs(heads.std() / 0.02 - 1) < 0.2
    assert len({tuple(row.tolist()) for row in heads}) == 6  # a head a view, and a seed a pair
    assert Discriminator(load_discriminator(dense)[0].model, "learned").dropout.p == 0.1


def test_a_wrong_kind_is_refused(dense, sparse, tmp_path):
    said = fails("discriminator.py", "--model", dense, "--experts", "both")
    assert "--experts: invalid choice: 'both'" in said
    assert all(f"'{kind}'" in said for kind in ("learned", "dedicated", "dense", "text"))
    # experts that are there cannot be had as "dense": what would run is not what was asked for
    discriminator, processor, _ = sparse
    save_discriminator(discriminator, str(tmp_path))
    weights = load_file(tmp_path / "model.safetensors")
    weights.pop("score.weight")
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    assert AutoConfig.from_pretrained(tmp_path).model_type == "qwen3_vl_moe"
    with pytest.raises(UserError, match="dense"):
        load_discriminator(str(tmp_path), "dense")
