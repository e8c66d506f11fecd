"""The reward of the game: advantages, length debiasing and filling against references in plain
Python, a run's rewards, and the published values."""

import inspect
import math
import statistics

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from align import AlignConfig, alignment_advantage, debias, fill_invalid
from data import encode_views, parse_response
from discriminator import VIEWS, DiscriminatorConfig
from support.huggingface import load_processor
from tests.conftest import launch, lines
from tests.test_policy_gradient import close, repeatable

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


# --------------------------------------------------------------------------------------------------
# A policy that never has the format


def test_align_counts_prompts_without_a_valid_rollout(world, tmp_path):
    """A policy of random weights never meets the format: no discriminator loss, the rewards by the
    rule, all counted."""
    out = tmp_path / "a"
    done = launch(
        "align.py",
        "--ckpt",
        world["init"],
        "--discriminator",
        world["init"],
        "--data",
        world["prompts"],
        "--output_dir",
        out,
        "--num_generations",
        3,
        "--max_steps",
        2,
        "--max_completion_length",
        8,
        "--prompts_per_step",
        2,
    )
    assert done.stderr.count("step 2: not one response so far has the format <caption>,") == 1
    assert f"no score and no reward; read {out}/rollouts.jsonl, then start from" in done.stderr
    assert len(lines(out / "metrics.jsonl")) == 2
    for step in lines(out / "metrics.jsonl"):
        assert (
            step["prompts_without_valid"] == 2
            and step["ranks_without_valid"] == 1
            and step["format_valid"] == 0
        )
        assert step["d_grad_norm"] == 0
        for name in (
            "discriminator_loss",
            "score_gap_perception",
            "pair_accuracy_reasoning",
            "score_student_perception",
            "score_teacher_reasoning",
        ):
            assert step[name] is None, name  # nothing stands in for what was not measured
    rollouts = lines(out / "rollouts.jsonl")
    assert len(rollouts) == 2 * 3 and {row["advantage"] for row in rollouts} == {-1.5}
    assert all(row["valid"] == 0 for row in rollouts)
    for name in ("perception", "reasoning", "teacher_perception", "teacher_reasoning"):
        assert all(row[name] is None for row in rollouts), name
