"""Stage 2: its reward against a reference in plain Python, its discriminator against transformers'
own Qwen3-VL-MoE.

The models are tiny, with random weights everywhere (norms and biases too), so that nothing can be
right by being 0 or 1.
"""

import inspect
import io
import json
import math
import shutil
import statistics

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
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

from align import AlignConfig, alignment_advantage, debias, fill_invalid
from data import Group, Prompt, Response, encode_prompts, encode_views, make_packs
from data import mrope_positions, parse_response
from discriminator import (
    VIEWS,
    Comparison,
    Discriminator,
    DiscriminatorConfig,
    Experts,
    Router,
    SparseMLP,
    balance_loss,
    discriminator_loss,
    grouped,
    judge,
    load_discriminator,
    pair_loss,
    upcycle,
    view_of_tokens,
    view_packs,
)
from model import PackAttention
from support.errors import UserError
from support.huggingface import load_processor, processor_files, save_discriminator, write_files
from support.metrics import Loss, Mean
from support.rows import Example
from support.tiny import Shape, build_model, train_tokenizer
from tests.conftest import ROOT, fails, launch, lines

repeatable = settings(derandomize=True, deadline=None, database=None, max_examples=50)


def close(got, expected, tolerance=1e-10):
    got, expected = np.asarray(got, dtype=np.float64), np.asarray(expected, dtype=np.float64)
    assert got.shape == expected.shape
    assert np.abs(got - expected).max(initial=0.0) <= tolerance * max(
        1.0, np.abs(expected).max(initial=0.0)
    )


# --------------------------------------------------------------------------------------------------
# The reward of the game


def reference_advantage(perception, reasoning, valid, alpha, penalty):
    """PAPER, stage 2, group by group. The score of an invalid rollout is never looked at."""
    out = []
    for p, r, ok in zip(perception, reasoning, valid):
        normalised = []
        for view in (p, r):
            lowest = min((s for s, v in zip(view, ok) if v), default=0.0)
            view = [s if v else lowest - 1 for s, v in zip(view, ok)]
            mean = statistics.fmean(view) if len(view) > 1 else 0.0
            std = statistics.stdev(view) if len(view) > 1 else 1.0
            normalised.append(
                [
                    0.0 if len(view) > 1 and len(set(view)) == 1 else (s - mean) / (std + 1e-6)
                    for s in view
                ]
            )
        out.append(
            [
                alpha * a + (1 - alpha) * b - (0 if v else penalty)
                for a, b, v in zip(*normalised, ok)
            ]
        )
    return out


@st.composite
def groups(draw):
    p, n = draw(st.integers(1, 3)), draw(st.sampled_from([1, 2, 3, 5, 8, 16]))
    scores = st.lists(st.floats(-10, 10).map(lambda x: round(x, 2)), min_size=n, max_size=n)
    some = lambda strategy: draw(st.lists(strategy, min_size=p, max_size=p))
    flags = (
        st.lists(st.booleans(), min_size=n, max_size=n)
        | st.just([False] * n)
        | st.just([True] + [False] * (n - 1))
    )
    return some(scores), some(scores), some(flags)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("garbage", [math.nan, -math.inf, 77.0])
@given(case=groups(), penalty=st.sampled_from([1.5, 0.0, 4.0]))
@repeatable
def test_advantage_of_any_groups(alpha, garbage, case, penalty):
    valid = torch.tensor(case[2])
    perception, reasoning = (
        torch.tensor(x, dtype=torch.float64).masked_fill(~valid, garbage) for x in case[:2]
    )
    got = alignment_advantage(perception, reasoning, valid, alpha, penalty)
    close(got, reference_advantage(*case, alpha, penalty), 1e-8)


def test_advantage_by_hand():
    """Perception 3, 1, invalid: filled to 3, 1, 0. Reasoning -2, 4, invalid: filled to -2, 4,
    -3."""
    nan = math.nan
    got = alignment_advantage(
        torch.tensor([[3.0, 1.0, nan]]).double(),
        torch.tensor([[-2.0, 4.0, nan]]).double(),
        torch.tensor([[True, True, False]]),
    )
    p_std, r_std = math.sqrt((25 + 1 + 16) / 9 / 2), math.sqrt((25 + 169 + 64) / 9 / 2)
    close(
        got,
        [
            [
                0.5 * 5 / 3 / (p_std + 1e-6) + 0.5 * -5 / 3 / (r_std + 1e-6),
                0.5 * -1 / 3 / (p_std + 1e-6) + 0.5 * 13 / 3 / (r_std + 1e-6),
                0.5 * -4 / 3 / (p_std + 1e-6) + 0.5 * -8 / 3 / (r_std + 1e-6) - 1.5,
            ]
        ],
    )


def test_a_group_of_invalid_rollouts_is_punished_and_no_more():
    nan = torch.full((2, 8), math.nan)
    assert (alignment_advantage(nan, nan, torch.zeros(2, 8, dtype=torch.bool)) == -1.5).all()


def test_invalid_is_always_worst_in_its_group():
    score = torch.randn(50, 8, generator=torch.Generator().manual_seed(0)) * 5
    valid = torch.rand(50, 8, generator=torch.Generator().manual_seed(1)) > 0.4
    a = alignment_advantage(score, -score, valid, alpha=0.5)
    for row, ok in zip(a, valid):
        if ok.any() and not ok.all():
            assert row[~ok].max() + 1.5 < row[ok].min()  # even before the penalty


@pytest.mark.parametrize("n", [3, 8, 16])
def test_equal_rollouts_are_worth_nothing(n):
    """Every rollout the same text, hence the same scores: float32 rounding must not make advantages
    out of that."""
    for value in (5.3, -7.77, 9.99, 0.2):
        same = torch.full((1, n), value)
        assert (alignment_advantage(same, same, torch.ones(1, n, dtype=torch.bool)) == 0).all()


@pytest.mark.filterwarnings("ignore:std")
def test_valid_may_be_numbers_and_there_may_be_no_prompts():
    score = torch.tensor([[1.0, 2.0, 3.0]])
    assert torch.equal(
        alignment_advantage(score, score, torch.tensor([[1, 0, 1]])),
        alignment_advantage(score, score, torch.tensor([[True, False, True]])),
    )
    none = torch.zeros(0, 8)
    assert alignment_advantage(none, none, none.bool()).shape == (0, 8)


def test_fill_invalid():
    nan = math.nan
    score = torch.tensor(
        [
            [2.0, nan, -3.0],
            [nan, nan, nan],
            [5.0, -math.inf, nan],
            [1.0, 2.0, 0.0],
            [100.0, -50.0, 7.0],
        ]
    )
    valid = torch.tensor([[1, 0, 1], [0, 0, 0], [1, 0, 0], [1, 1, 1], [0, 0, 1]]).bool()
    assert fill_invalid(score, valid).tolist() == [
        [2, -4, -3],
        [-1, -1, -1],
        [5, 4, 4],
        [1, 2, 0],
        [6, 6, 7],
    ]


@given(
    rows=st.lists(st.tuples(st.floats(-10, 10), st.integers(0, 6144)), min_size=1, max_size=20),
    beta=st.floats(-1, 2),
)
@repeatable
def test_debias(rows, beta):
    score, length = (torch.tensor(x, dtype=torch.float64) for x in zip(*rows))
    close(debias(score, length, beta), [s - beta * math.log(1 + n) for s, n in rows])
    assert torch.equal(debias(score, length, 0.0), score)


def debiased_advantage(scores, valid, lengths, betas, **weights) -> torch.Tensor:
    """(12), (9), (10), (11), as a step of the game puts them together. scores, lengths: (P, N) of
    each view, perception first."""
    views = [debias(*view) for view in zip(scores, lengths, betas, strict=True)]
    return alignment_advantage(*views, valid, **weights)


def test_debiased_advantage_by_hand():
    """Lengths 0, 1, 3 and 7 weigh 0, 1, 2 and 3 times log 2. Perception, beta 1 / log 2: 5, 5, 5,
    and the invalid one 4. Reasoning, beta -0.5 / log 2: 2, 1, 3, and the invalid one 0."""
    scores = torch.tensor([[[5.0, 6.0, 8.0, 0.0]], [[2.0, 0.0, 1.5, 0.0]]]).double()
    lengths = torch.tensor([[[0.0, 1.0, 7.0, 0.0]], [[0.0, 3.0, 7.0, 0.0]]]).double()
    valid = torch.tensor([[True, True, True, False]])
    betas = 1 / math.log(2), -0.5 / math.log(2)
    got = debiased_advantage(scores, valid, lengths, betas, alpha=0.25, format_penalty=2.0)
    p_std, r_std = math.sqrt((3 * 0.25**2 + 0.75**2) / 3), math.sqrt(5 / 3)
    p = [0.25 / (p_std + 1e-6)] * 3 + [-0.75 / (p_std + 1e-6)]
    r = [x / (r_std + 1e-6) for x in (0.5, -0.5, 1.5, -1.5)]
    expected = [0.25 * a + 0.75 * b - c for a, b, c in zip(p, r, (0, 0, 0, 2))]
    close(got, [expected])
    # Off by default: then lengths are not looked at.
    config = AlignConfig()
    off = config.length_beta_perception, config.length_beta_reasoning
    plain = debiased_advantage(scores, valid, lengths * 100, off)
    close(plain, alignment_advantage(*scores, valid))
    assert (got - plain).abs().max() > 0.3


@pytest.mark.parametrize("flags", [{}, dict(alpha=0.3, format_penalty=2.5, betas=(1.3, 0.5))])
def test_a_run_rewards_as_its_flags_say(world, trained, tmp_path, flags):
    """The advantages that a run writes down, against plain Python on the scores and texts beside
    them: (12), (9), (10), (11), with the default flags and with others."""
    alpha, penalty = flags.get("alpha", 0.5), flags.get("format_penalty", 1.5)
    betas = flags.get("betas", (0.0, 0.0))
    given_ = ["--alpha", alpha, "--format_penalty", penalty]
    given_ += ["--length_beta_perception", betas[0], "--length_beta_reasoning", betas[1]]
    models = ["--ckpt", trained, "--discriminator", world["init"], "--data", world["prompts"]]
    size = ["--max_steps", 3, "--prompts_per_step", 1, "--num_generations", 6]
    size += ["--max_completion_length", 60, "--output_dir", tmp_path / "out"]
    launch("align.py", *models, *size, *(given_ if flags else ()))
    processor = load_processor(world["init"])
    rollouts = lines(tmp_path / "out" / "rollouts.jsonl")
    seen = set()
    for step in (1, 2, 3):
        group = [row for row in rollouts if row["step"] == step]
        responses = [parse_response(row["response"]) for row in group]
        valid = [response is not None for response in responses]
        assert len(group) == 6 and [row["valid"] for row in group] == valid
        assert [row["perception"] is not None for row in group] == valid
        seen |= set(valid)
        sizes = [encode_views(processor, r) if r else ([], []) for r in responses]
        views = [
            [
                # A rollout of broken format has no score.
                row[name] - beta * math.log(1 + len(size[view])) if ok else 0.0
                for row, size, ok in zip(group, sizes, valid, strict=True)
            ]
            for view, (name, beta) in enumerate(zip(VIEWS, betas))
        ]
        expected = reference_advantage(*([view] for view in views), [valid], alpha, penalty)
        close([[row["advantage"] for row in group]], expected, 1e-4)
    assert seen == {True, False}


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
# Whole models


TEXT = (
    "<caption>From left to right: 1, 2 and 3.</caption> <think>1 + 2 = 3.</think> "
    "<answer>A</answer> What is the sum?"
)
TEACHER = Response(
    "From left to right the digits are 1, 2 and 3.",
    "1 + 2 = 3, 3 + 3 = 6. So the answer is 6.",
    "6",
)


@pytest.fixture(scope="module")
def dense(tmp_path_factory) -> str:
    """A tiny dense Qwen3-VL directory, every parameter random."""
    path = tmp_path_factory.mktemp("models") / "dense"
    shape = Shape(hidden_size=48, intermediate_size=80, head_dim=16, layers=2, vision_layers=2)
    build_model(path, train_tokenizer([TEXT] * 3, 20), shape)
    model = Qwen3VLForConditionalGeneration.from_pretrained(path)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(path)
    return str(path)


def randomised(dense: str, kind: str = "learned"):
    """An upcycled discriminator whose experts, routers and heads are really different from one
    another."""
    discriminator, processor = load_discriminator(dense, kind, dropout=0.0)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in discriminator.named_parameters():
            std = (
                0.3
                if ".mlp." in name and "language_model" in name
                else 0.1
                if name == "score.weight"
                else 0.0
            )
            parameter.add_(std * torch.randn(parameter.shape, generator=generator))
    return discriminator, processor


@pytest.fixture(scope="module")
def sparse(dense, tmp_path_factory):
    """(discriminator, processor, the directory that it was saved to)."""
    discriminator, processor = randomised(dense)
    path = str(tmp_path_factory.mktemp("models") / "sparse")
    save_discriminator(discriminator, path)
    return discriminator, processor, path


def opened(path):
    return Qwen3VLMoeForConditionalGeneration.from_pretrained(
        path, dtype=torch.float64, experts_implementation="eager"
    )


@pytest.fixture(scope="module")
def reference(sparse):
    """The saved directory as transformers opens it, in float64."""
    return opened(sparse[2])


def example(index: int, images: int) -> Example:
    pictures, content = [], []
    for i in range(images):
        noise = np.random.default_rng(10 * index + i).integers(
            0, 255, (16 * (i + 1), 48, 3), dtype=np.uint8
        )
        buffer = io.BytesIO()
        Image.fromarray(noise).save(buffer, "PNG")
        pictures.append(buffer.getvalue())
        content += [{"type": "image"}, {"type": "text", "text": f"No {i}. "}]
    content.append({"type": "text", "text": "What is the sum?"})
    return Example(index, f"row {index}", [{"role": "user", "content": content}], pictures)


def comparisons(processor) -> list[Comparison]:
    """Prompts with one image, with none and with two; a student like the teacher in one view and in
    both; invalid ones."""
    prompts = encode_prompts(processor, [example(0, 1), example(1, 0), example(2, 2)])
    other = Response("Digits 7, 2 and 8.", "7 + 2 + 8 = 17.", "17")
    terse = Response("x", "y", "z")
    half = Response(TEACHER.caption, other.think, other.answer)
    return [
        Comparison(prompts[0], TEACHER, [other, None, half, terse]),
        Comparison(prompts[1], other, [TEACHER, other]),
        Comparison(prompts[2], TEACHER, [None, terse]),
    ]


def sides(judged) -> tuple[torch.Tensor, torch.Tensor]:
    """(P, N, 2) twice: perception and reasoning scores of the supervision, and of the students."""
    teacher = judged.teacher_perception, judged.teacher_reasoning
    return torch.stack(teacher, -1), torch.stack([judged.perception, judged.reasoning], -1)


def view_lengths(judged) -> torch.Tensor:
    """(2, P, N): tokens of the students' views."""
    return torch.stack([judged.perception_length, judged.reasoning_length])


def expert_shares(judged) -> dict:
    return {name: x for name, x in judged.metrics.items() if name.startswith("expert_share")}


def invalid_is_zero(judged) -> None:
    """Where there is no score stands 0, in all fields."""
    for scores in (*sides(judged), view_lengths(judged).permute(1, 2, 0)):
        assert scores.isfinite().all() and (scores[~judged.valid] == 0).all()


def told_apart(view_packs, comparisons) -> torch.Tensor:
    """(2, P, N) boolean: the two sides of a pair are not one branch."""
    most = max(len(c.students) for c in comparisons)
    out = torch.zeros(2, len(comparisons), most, dtype=torch.bool)
    for v in view_packs:
        p, n = v.numbers.T
        out[:, p, n] = (v.pairs[:, :2] != v.pairs[:, 2:]).T
    return out


def their_hidden(model, prompt, branch, processor):
    """(T, h) of one plain sequence by transformers: its attention, its positions, its experts."""
    ids = torch.cat([prompt.input_ids, branch])[None]
    pixels = None if prompt.pixel_values is None else prompt.pixel_values.to(model.dtype)
    return model.model(
        input_ids=ids,
        pixel_values=pixels,
        image_grid_thw=prompt.image_grid_thw,
        use_cache=False,
        mm_token_type_ids=(ids == processor.image_token_id).int(),
        attention_mask=torch.ones_like(ids),
    ).last_hidden_state[0]


def our_hidden(discriminator, pack):
    out = discriminator.model(
        input_ids=pack.input_ids,
        position_ids=pack.position_ids,
        pixel_values=pack.pixel_values,
        image_grid_thw=pack.image_grid_thw,
        use_cache=False,
        layout=PackAttention(pack),
    )
    return out.last_hidden_state[0]


def sequences(packed, groups_of_pack):
    """For every branch of a pack: (prompt, branch tokens, slice of the prompt, slice of the
    branch)."""
    for segment, prompt in zip(packed.segments, groups_of_pack):
        at = segment.start + segment.prompt_length
        for length in segment.branch_lengths:
            yield (
                prompt,
                packed.input_ids[0, at : at + length],
                slice(segment.start, segment.start + segment.prompt_length),
                slice(at, at + length),
            )
            at += length


def test_backbone_is_transformers_mixture_of_experts(sparse, reference):
    """Hidden states of a pack with images against each sequence alone."""
    discriminator, processor, _ = sparse
    pairs = comparisons(processor)
    (pack,) = (v.pack for v in view_packs(pairs, processor))
    compared = 0
    with torch.no_grad():
        ours = our_hidden(discriminator, pack)
        for prompt, branch, before, own in sequences(pack, [c.prompt for c in pairs]):
            theirs = their_hidden(reference, prompt, branch, processor).float()
            torch.testing.assert_close(
                torch.cat([ours[before], ours[own]]), theirs, atol=1e-4, rtol=1e-4
            )
            compared += 1
    assert compared == sum(map(len, (s.branch_lengths for s in pack.segments))) > 8
    used = torch.cat([m.chosen for m in discriminator.sparse_mlps]).unique()
    assert len(used) == 4 and ours.std() > 0.1  # all experts are asked


def test_judge_gives_the_papers_scores_loss_and_gradient(sparse, reference):
    """Everything at once against transformers in float64: scores read at each view's last token by
    its view's head, the pair losses, the square term, the balance loss (each token of the pack
    once), and the gradient of all parameters."""
    discriminator, processor, path = sparse
    pairs = comparisons(processor)
    head = load_file(f"{path}/model.safetensors")["score.weight"].double().requires_grad_()
    discriminator.train().zero_grad()
    judged = judge(
        discriminator, pairs, processor, 100_000, score_l2=0.05, balance_coef=0.1, backward=True
    )
    assert not discriminator.sparse_mlps[0].allowed and discriminator.sparse_mlps[0].chosen is None

    routed: list[list[torch.Tensor]] = [[], []]
    hooks = [
        layer.mlp.gate.register_forward_hook(lambda m, a, out, i=i: routed[i].append(out[0]))
        for i, layer in enumerate(reference.model.language_model.layers)
    ]
    reference.zero_grad()
    loss, rows, logits = 0.0, {}, [[], []]
    chosen = torch.zeros(2, 2, 4)  # layer, view, expert
    for p, comparison in enumerate(pairs):
        seen = {}

        def score(view, tokens, prompt=comparison.prompt, seen=seen):
            key = view, tuple(tokens.tolist())
            if key not in seen:
                for some in routed:
                    some.clear()
                hidden = their_hidden(reference, prompt, tokens, processor)[-1]
                for i, some in enumerate(routed):
                    logits[i].append(some[0][len(prompt.input_ids) if seen else 0 :])
                    own = some[0][len(prompt.input_ids) :].topk(2).indices.flatten()
                    chosen[i, view] += torch.bincount(own, minlength=4)
                seen[key] = hidden @ head[view]
            return seen[key]

        for n, student in enumerate(comparison.students):
            if student is None:
                continue
            teacher = [
                score(k, v) for k, v in enumerate(encode_views(processor, comparison.teacher))
            ]
            mine = [score(k, v) for k, v in enumerate(encode_views(processor, student))]
            rows[p, n] = teacher, mine
            for t, s in zip(teacher, mine):
                loss = loss + torch.log1p(torch.exp(s - t)) + 0.05 * (t**2 + s**2) / 4
    for hook in hooks:
        hook.remove()
    loss = loss / len(rows)
    loss = loss + 0.1 * load_balancing_loss_func(tuple(torch.cat(some) for some in logits), 4, 2)
    loss.backward()

    # The most students of a prompt are four: (3, 4), and what there is none of is invalid.
    assert judged.valid.tolist() == [[(p, n) in rows for n in range(4)] for p in range(3)]
    invalid_is_zero(judged)
    packs = view_packs(pairs, processor, 100_000)
    teachers, students = sides(judged)
    for (p, n), (teacher, mine) in rows.items():
        close(teachers[p, n], [float(x.detach()) for x in teacher], 1e-4)
        close(students[p, n], [float(x.detach()) for x in mine], 1e-4)
        differs = [bool(t != s) for t, s in zip(teacher, mine)]
        assert told_apart(packs, pairs)[:, p, n].tolist() == differs
        views = encode_views(processor, pairs[p].students[n])
        assert view_lengths(judged)[:, p, n].tolist() == [len(view) for view in views]
    for view, name in enumerate(VIEWS):
        of_view = [[float(side[view].detach()) for side in row] for row in rows.values()]
        sums = {
            "score_teacher": sum(t for t, _ in of_view),
            "score_student": sum(s for _, s in of_view),
            "score_gap": sum(t - s for t, s in of_view),
        }
        for mean, expected in sums.items():
            measured = judged.metrics[f"{mean}_{name}"]
            close(float(measured.total), expected, 1e-4)
            assert isinstance(measured, Mean) and measured.count == len(rows)
        apart = [t > s for t, s in of_view if t != s]
        accuracy = judged.metrics[f"pair_accuracy_{name}"]
        assert 0 < len(apart) < len(rows) and accuracy == Mean(sum(apart), len(apart))
    close(judged.metrics["discriminator_loss"].value, loss.item(), 1e-4)
    theirs = {name: p.grad for name, p in reference.named_parameters()} | {
        "score.weight": head.grad
    }
    compared = 0
    for name, parameter in discriminator.named_parameters():
        expected = theirs[name]
        if expected is not None and expected.norm() > 1e-6:
            assert (parameter.grad - expected).norm() <= 2e-3 * expected.norm(), name
            compared += 1
    assert compared > 60
    # Each token of a view chooses two experts in both layers, once however often it is compared.
    tokens = [(view, len(ids)) for view, ids in unique_views(pairs, processor)]
    for view, name in enumerate(VIEWS):
        count = sum(n for v, n in tokens if v == view)
        assert (chosen[:, view].sum(-1) == 2 * count).all()
        close(judged.metrics[f"expert_share_{name}"], chosen[:, view] / (2 * count), 5.1e-5)
    discriminator.zero_grad()


def unique_views(pairs, processor):
    for comparison in pairs:
        valid = [s for s in comparison.students if s is not None]
        yield from {
            (k, tuple(v.tolist()))
            for r in [comparison.teacher] * bool(valid) + valid
            for k, v in enumerate(encode_views(processor, r))
        }


def test_judge_does_not_depend_on_how_views_are_packed(sparse):
    discriminator, processor, _ = sparse
    pairs = comparisons(processor)
    results = []
    for max_tokens in (100_000, 250, 10):
        discriminator.zero_grad()
        judged = judge(discriminator, pairs, processor, max_tokens, balance_coef=0.0, backward=True)
        named = discriminator.named_parameters()
        gradient = {n: p.grad.clone() for n, p in named if p.grad is not None}
        results.append((judged, gradient))
    assert (
        len(view_packs(pairs, processor, 10)) == 6
        and 1 < len(view_packs(pairs, processor, 250)) < 6
    )
    same = [told_apart(view_packs(pairs, processor, n), pairs) for n in (None, 250, 10)]
    assert torch.equal(same[0], same[1]) and torch.equal(same[0], same[2])
    (first, gradient), *others = results
    for judged, other in others:
        for mine, theirs in zip(sides(judged), sides(first)):
            torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-4)
        invalid_is_zero(judged)
        assert torch.equal(judged.valid, first.valid)
        assert torch.equal(view_lengths(judged), view_lengths(first))
        for name in VIEWS:  # as many pairs that can be told apart
            counts = [j.metrics[f"pair_accuracy_{name}"].count for j in (judged, first)]
            assert counts[0] == counts[1] > 0
        close(
            judged.metrics["discriminator_loss"].value,
            first.metrics["discriminator_loss"].value,
            1e-5,
        )
        for name in gradient:
            assert (gradient[name] - other[name]).norm() <= 1e-3 * gradient[name].norm() + 1e-7, (
                name
            )
    discriminator.zero_grad()


def test_balance_of_several_packs_is_their_mean_over_tokens(sparse):
    discriminator, processor, _ = sparse
    pairs = comparisons(processor)
    totals, tokens = [], []
    for v in view_packs(pairs, processor, 250):
        logits = []
        hooks = [
            m.register_forward_hook(
                lambda m, a, out, logits=logits: logits.append(a[0][0] @ m.gate.weight.T)
            )
            for m in discriminator.sparse_mlps
        ]
        with torch.no_grad():
            discriminator(v.pack, v.views)
        for hook in hooks:
            hook.remove()
        totals.append(float(load_balancing_loss_func(tuple(logits), 4, 2)))
        tokens.append(len(logits[0]))
    expected = np.average(totals, weights=tokens)
    assert len(tokens) > 1 and np.ptp(totals) > 0.01
    judgements = [
        judge(discriminator, pairs, processor, 250, balance_coef=b, backward=False)
        for b in (0.0, 0.7)
    ]
    close(judgements[0].metrics["balance_loss"].value, expected, 1e-5)
    losses = [judged.metrics["discriminator_loss"].value for judged in judgements]
    close(losses[1] - losses[0], 0.7 * expected, 1e-5)


def test_dropout_enters_the_loss_and_not_the_rewards(sparse):
    discriminator, processor, _ = sparse
    given_ = comparisons(processor), processor, 100_000
    clean = judge(discriminator, *given_, backward=False)
    discriminator.dropout.p = 0.5
    dropped = judge(discriminator.train(), *given_, backward=False)
    discriminator.dropout.p = 0.0
    for a, b in zip(sides(clean), sides(dropped)):
        assert torch.equal(a, b) and (a[clean.valid] != 0).all()
    assert (
        abs(clean.metrics["discriminator_loss"].value - dropped.metrics["discriminator_loss"].value)
        > 1e-3
    )


def test_judge_without_backward_leaves_no_gradient(sparse):
    discriminator, processor, _ = sparse
    discriminator.zero_grad()
    judge(discriminator, comparisons(processor), processor, 1000, backward=False)
    assert all(p.grad is None for p in discriminator.parameters())


def test_judge_without_a_valid_student(sparse):
    discriminator, processor, _ = sparse
    discriminator.zero_grad()
    only = [Comparison(encode_prompts(processor, [example(0, 1)])[0], TEACHER, [None, None])]
    judged = judge(discriminator, only, processor, 1000, backward=True)
    assert judged.valid.tolist() == [[False, False]]
    invalid_is_zero(judged)
    assert (
        judged.metrics["pair_accuracy_perception"] == Mean(0, 0)
        and judged.metrics["discriminator_loss"].updates == 0
    )
    assert all(p.grad is None or (p.grad == 0).all() for p in discriminator.parameters())


def test_judge_of_no_prompts(sparse):
    """A rank whose rows were all left out takes part with nothing, its advantages included."""
    discriminator, processor, _ = sparse
    judged = judge(discriminator, [], processor, 1000, backward=True)
    lengths = view_lengths(judged)
    assert judged.valid.shape[0] == judged.perception.shape[0] == lengths.shape[1] == 0
    assert judged.metrics["discriminator_loss"] == Loss(0, updates=0)
    assert expert_shares(judged) == {}
    scores = judged.perception, judged.reasoning
    advantage = debiased_advantage(scores, judged.valid, lengths, (0.0, 0.0))
    assert advantage.flatten().shape == (0,)


def test_lengths_debias_the_advantages_of_judged_rollouts(sparse):
    """Scores, valid rollouts and lengths as judge gives them -> (12), (9), (10), (11), against
    plain Python; away from beta = 0 the lengths of the views move the advantages."""
    discriminator, processor, _ = sparse
    pairs = comparisons(processor)
    pairs[1].students += [None, Response("Digits 7, 2. " * 8, "7 + 2 = 9. " * 15, "9")]
    pairs[2].students += [TEACHER, None]
    judged = judge(discriminator, pairs, processor, 300, backward=False)
    valid = [[student is not None for student in c.students] for c in pairs]
    assert judged.valid.tolist() == valid and view_lengths(judged).shape == (2, 3, 4)
    lengths = [
        [[float(len(view)) for view in encode_views(processor, s)] if s else [0.0, 0.0] for s in c]
        for c in (comparison.students for comparison in pairs)
    ]
    close(view_lengths(judged), torch.tensor(lengths).permute(2, 0, 1))
    given_ = (judged.perception, judged.reasoning), judged.valid, view_lengths(judged)
    plain = debiased_advantage(*given_, (0.0, 0.0))
    for betas in ((0.0, 0.0), (0.7, 0.0), (0.0, -0.4), (1.3, 0.5)):
        weights = dict(alpha=0.4, format_penalty=2.5)
        views = [
            [
                [s - beta * math.log(1 + n[view]) for s, n in zip(*row)]
                for row in zip(scores.tolist(), lengths)
            ]
            for view, (scores, beta) in enumerate(zip((judged.perception, judged.reasoning), betas))
        ]
        got = debiased_advantage(*given_, betas, **weights)
        close(got, reference_advantage(*views, valid, 0.4, 2.5), 1e-5)
        if any(betas):
            unweighted = debiased_advantage(*given_, (0.0, 0.0), **weights)
            assert (got - unweighted).abs().max() > 0.05
    close(
        plain,
        reference_advantage(
            judged.perception.tolist(), judged.reasoning.tolist(), valid, alpha=0.5, penalty=1.5
        ),
        1e-5,
    )


def test_equal_texts_score_exactly_alike(sparse):
    """The same response on both sides: the very same number, so neither side wins and nothing can
    be learned from it."""
    discriminator, processor, _ = sparse
    same = [
        Comparison(
            encode_prompts(processor, [example(0, 1)])[0],
            TEACHER,
            [TEACHER, Response("x", "y", "z")],
        )
    ]
    judged = judge(discriminator, same, processor, 1000, backward=False)
    teacher, student = sides(judged)
    assert torch.equal(teacher[0, 0], student[0, 0])
    assert told_apart(view_packs(same, processor, 1000), same)[:, 0].tolist() == [[False, True]] * 2
    for name in VIEWS:  # of the two pairs one can be told apart
        assert judged.metrics[f"pair_accuracy_{name}"].count == 1


def test_scores_are_clamped_and_dropout_is_for_the_loss_alone(sparse):
    discriminator, processor, _ = sparse
    (v,) = view_packs(comparisons(processor), processor)
    weight = discriminator.score.weight.data.clone()
    try:
        with torch.no_grad():
            plain = discriminator(v.pack, v.views)
            discriminator.dropout.p = 0.1
            trained = discriminator.train()(v.pack, v.views)
            evaluated = discriminator.eval()(v.pack, v.views)
        assert torch.equal(trained[1], plain[1]) and torch.equal(evaluated[0], evaluated[1])
        assert (trained[0] - trained[1]).abs().max() > 1e-3
        discriminator.dropout.p = 0.0
        assert plain.abs().max() < 10
        discriminator.score.weight.data *= 8 / plain.abs().max() * 4  # the largest would be 32
        scores = discriminator.train()(v.pack, v.views)
        close(
            scores[1].detach(),
            [min(max(float(x) * 32 / float(plain.abs().max()), -10), 10) for x in plain[1]],
            1e-4,
        )
        outside = scores[0].abs() == 10
        assert outside.any() and not outside.all()
        for chosen, still in (
            (outside, True),
            (~outside, False),
        ):  # beyond the clamp nothing pulls a score further
            (gradient,) = torch.autograd.grad(
                scores[0][chosen].sum(), discriminator.score.weight, retain_graph=True
            )
            assert (gradient == 0).all() == still
    finally:
        discriminator.score.weight.data.copy_(weight)
        discriminator.dropout.p = 0.0
        discriminator.train()


def test_dedicated_experts_serve_their_view_alone(dense):
    discriminator, processor = randomised(dense, "dedicated")
    pairs = comparisons(processor)
    (v,) = view_packs(pairs, processor)
    owner = []
    views = iter(v.views.tolist())
    for segment in v.pack.segments:
        owner += [-1] * segment.prompt_length
        for length in segment.branch_lengths:
            owner += [next(views)] * length
    assert view_of_tokens(v.pack, v.views).tolist() == owner
    with torch.no_grad():
        discriminator(v.pack, v.views)
    for block in discriminator.sparse_mlps:
        taken = {
            view: {
                e for o, chosen in zip(owner, block.chosen.tolist()) if o == view for e in chosen
            }
            for view in (-1, 0, 1)
        }
        assert taken == {-1: {0, 1, 2, 3}, 0: {0, 1}, 1: {2, 3}}
    shares = expert_shares(judge(discriminator, pairs, processor, 100_000, backward=False))
    perception, reasoning = (torch.tensor(shares[f"expert_share_{name}"]) for name in VIEWS)
    assert perception.shape == reasoning.shape == (2, 4)
    assert (perception[:, 2:] == 0).all() and (reasoning[:, :2] == 0).all()
    assert (perception.sum(-1) > 0).all() and (reasoning.sum(-1) > 0).all()


def test_text_only_discriminator_never_sees_the_image(dense, tmp_path):
    discriminator, processor = randomised(dense, "text")
    save_discriminator(discriminator, str(tmp_path / "text"))
    theirs = opened(tmp_path / "text")
    pairs = comparisons(processor)[:1]
    teacher, _ = sides(judge(discriminator, pairs, processor, 1000, backward=False))
    special = {
        processor.image_token_id,
        processor.vision_start_token_id,
        processor.vision_end_token_id,
    }
    ids = torch.tensor([i for i in pairs[0].prompt.input_ids.tolist() if i not in special])
    with torch.no_grad():
        for k, view in enumerate(encode_views(processor, TEACHER)):
            hidden = theirs.model(
                input_ids=torch.cat([ids, view])[None], use_cache=False
            ).last_hidden_state[0, -1]
            close(
                teacher[0, 0, k],
                float(hidden @ discriminator.score.weight[k].double()),
                1e-4,
            )


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


# --------------------------------------------------------------------------------------------------
# The published numbers


def test_defaults_are_the_papers():
    config = AlignConfig()
    assert (config.learning_rate, config.discriminator_learning_rate, config.lr_scheduler_type) == (
        1e-6,
        1e-6,
        "constant",
    )
    assert config.warmup_steps == 0 and config.prompts_per_step == 4
    assert (config.weight_decay, config.max_steps, config.num_generations, config.temperature) == (
        0.01,
        500,
        16,
        1.0,
    )
    assert (config.max_prompt_length, config.max_completion_length) == (2048, 6144)
    assert (config.alpha, config.format_penalty, config.epsilon, config.score_l2) == (
        0.5,
        1.5,
        0.2,
        0.001,
    )
    assert (
        config.router_aux_loss_coef,
        config.length_beta_perception,
        config.length_beta_reasoning,
    ) == (0.01, 0, 0)
    signature = inspect.signature(alignment_advantage).parameters
    assert (signature["alpha"].default, signature["format_penalty"].default) == (0.5, 1.5)

    config = DiscriminatorConfig()
    assert (config.learning_rate, config.lr_scheduler_type, config.warmup_steps) == (
        1e-5,
        "cosine",
        0.1,
    )
    assert config.weight_decay == 0.01
    pairs = 8 * config.per_device_train_batch_size * config.gradient_accumulation_steps
    assert pairs == 64 and pairs * len(VIEWS) == 128  # a pair is a comparison in each view
    assert (config.num_train_epochs, config.max_grad_norm, config.max_length, config.dropout) == (
        1,
        1.0,
        8192,
        0.1,
    )
    assert (config.score_l2, config.router_aux_loss_coef, config.experts) == (
        0.001,
        0.01,
        "learned",
    )
