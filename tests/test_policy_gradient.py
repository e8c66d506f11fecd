"""The policy gradient against references written from the papers: plain Python over sequences and
tokens, in float64.

The references decide by cases (which side of which clip a ratio is on) and carry their own analytic
gradients; the implementation decides by max and min and leaves gradients to autograd. So one is no
copy of the other.
"""

import math
import statistics

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from policy_gradient import group_advantage, kl_k3, policy_loss

NAMES = ("grpo", "dapo", "gspo")
CLIPS = {
    "grpo": (0.2, 0.2, 3.0),
    "dapo": (0.2, 0.28, 10.0),
    "gspo": (0.0003, 0.0004, 0.0),
}  # the paper's; GSPO has no dual clip
repeatable = settings(derandomize=True, deadline=None, database=None, max_examples=50)


# --------------------------------------------------------------------------------------------------
# The references


def ratio_term(
    log_ratio: float, a: float, low: float, high: float, dual: float
) -> tuple[float, float]:
    """The loss at one importance ratio, and its derivative with respect to the log-ratio, case by
    case."""
    inside = -20 <= log_ratio <= 20
    r = math.exp(min(max(log_ratio, -20.0), 20.0))
    if a >= 0:  # encouraged: no credit for going beyond 1 + high
        return (-a * (1 + high), 0.0) if r > 1 + high else (-a * r, -a * r * inside)
    if r < 1 - low:  # discouraged: no credit for going below 1 - low
        return -a * (1 - low), 0.0
    if dual and r > dual:  # nor more than `dual` times the punishment
        return -a * dual, 0.0
    return -a * r, -a * r * inside


def reference_loss(
    logp, old, advantage, mask, algorithm, low, high, dual, num_tokens=None, num_sequences=None
):
    """(loss, gradient with respect to logp) as a float and a nested list."""
    rows = range(len(mask))
    places = [[t for t in range(len(mask[b])) if mask[b][t]] for b in rows]
    num_tokens = max(sum(map(len, places)), 1) if num_tokens is None else num_tokens
    num_sequences = len(mask) if num_sequences is None else num_sequences
    loss, gradient = 0.0, [[0.0] * len(mask[b]) for b in rows]
    for b in rows:
        a = float(advantage[b])
        if (
            algorithm == "gspo" and places[b]
        ):  # GSPO, eq. 6 and 7: one ratio, the geometric mean of the tokens' ratios
            mean = math.fsum(float(logp[b][t]) - float(old[b][t]) for t in places[b]) / len(
                places[b]
            )
            value, slope = ratio_term(mean, a, low, high, dual)
            loss += value / num_sequences
            for t in places[b]:
                gradient[b][t] = slope / len(places[b]) / num_sequences
        elif algorithm != "gspo":
            for t in places[b]:
                value, slope = ratio_term(float(logp[b][t]) - float(old[b][t]), a, low, high, dual)
                loss += value / num_tokens
                gradient[b][t] = slope / num_tokens
    return loss, gradient


def loss_and_gradient(logp, old, advantage, mask, algorithm, low, high, dual, *counts):
    logp = logp.clone().requires_grad_()
    loss = policy_loss(logp, old, advantage, mask, algorithm, low, high, dual, *counts)
    assert loss.shape == ()
    return loss.item(), torch.autograd.grad(loss, logp)[0]


def batch_of(lengths: list[int], seed: int, dtype=torch.float64):
    """logp, old_logp, advantage, mask of one batch. Each row has its own scale of drift, from what
    GSPO's clip notices to far beyond +-20, with an offset as large so that mean ratios are away
    from 1 too; advantages have both signs."""
    rng = np.random.default_rng(seed)
    longest = max(lengths, default=0)
    mask = torch.arange(longest) < torch.tensor(lengths).view(-1, 1)
    logp = -rng.exponential(2.0, mask.shape)
    scale = rng.permutation(np.resize([3e-4, 0.15, 1.5, 30.0], len(lengths)))[:, None]
    old = logp - scale * (rng.standard_normal((len(lengths), 1)) + rng.standard_normal(mask.shape))
    advantage = rng.standard_normal(len(lengths)) * 2
    return (
        torch.tensor(logp, dtype=dtype),
        torch.tensor(old, dtype=dtype),
        torch.tensor(advantage, dtype=dtype),
        mask,
    )


def close(got, expected, tolerance=1e-10):
    got, expected = np.asarray(got, dtype=np.float64), np.asarray(expected, dtype=np.float64)
    assert got.shape == expected.shape
    scale = max(1.0, np.abs(expected).max(initial=0.0))
    assert np.abs(got - expected).max(initial=0.0) <= tolerance * scale


# --------------------------------------------------------------------------------------------------
# policy_loss


@pytest.mark.parametrize("algorithm", NAMES)
@pytest.mark.parametrize("dual", ["paper", 0.0, 1.5, 10.0])
@given(
    lengths=st.lists(st.sampled_from([0, 1, 1, 2, 5, 17]), min_size=1, max_size=9),
    seed=st.integers(0, 10**6),
    tokens=st.none() | st.integers(1, 500),
    sequences=st.none() | st.integers(1, 40),
)
@repeatable
def test_loss_and_gradient_of_any_batch(algorithm, dual, lengths, seed, tokens, sequences):
    low, high, c = CLIPS[algorithm]
    batch = batch_of(lengths, seed)
    given_ = (algorithm, low, high, c if dual == "paper" else dual, tokens, sequences)
    loss, gradient = loss_and_gradient(*batch, *given_)
    expected_loss, expected_gradient = reference_loss(*batch, *given_)
    close(loss, expected_loss)
    close(gradient, np.reshape(expected_gradient, gradient.shape))


# Log-ratios on each side of each border: +-20, the dual clip, both clips, between them and 1.
LOG_RATIOS = [
    -300,
    -25,
    -20.5,
    -19.5,
    -3,
    -0.3,
    -0.21,
    -0.1,
    -5e-4,
    -3.5e-4,
    -2e-4,
    2e-4,
    3.5e-4,
    4.5e-4,
    0.1,
    0.2,
    0.26,
    0.5,
    1.0,
    1.2,
    2.2,
    2.4,
    5,
    19.5,
    20.5,
    25,
    300,
]


@pytest.mark.parametrize("algorithm", NAMES)
@pytest.mark.parametrize("dual", ["paper", 0.0, 10.0])
@pytest.mark.parametrize("a", [1.7, -0.6, 0.0])
def test_every_side_of_every_clip(algorithm, dual, a):
    """One token a row, so that token and sequence ratio are one: each row alone shows where its
    gradient stops."""
    low, high, c = CLIPS[algorithm]
    c = c if dual == "paper" else dual
    logp = torch.full((len(LOG_RATIOS), 1), -1.5, dtype=torch.float64)
    old = logp - torch.tensor(LOG_RATIOS, dtype=torch.float64)[:, None]
    for count in (1, 3):  # three equal tokens a row are still one ratio
        batch = (
            logp.expand(-1, count),
            old.expand(-1, count),
            torch.full((len(logp),), a, dtype=torch.float64),
            torch.ones(len(logp), count, dtype=torch.bool),
        )
        loss, gradient = loss_and_gradient(*batch, algorithm, low, high, c)
        expected_loss, expected_gradient = reference_loss(*batch, algorithm, low, high, c)
        close(loss, expected_loss)
        close(gradient, expected_gradient, 1e-12)
    moved = {x for x, g in zip(LOG_RATIOS, gradient[:, 0]) if g != 0}
    stops = {
        1.7: lambda x: x > math.log1p(high) or x < -20,
        -0.6: lambda x: x < math.log1p(-low) or x > (min(20, math.log(c)) if c else 20),
        0.0: lambda x: True,
    }[a]
    assert moved == {x for x in LOG_RATIOS if not stops(x)}


def test_the_numbers_of_one_small_batch():
    """By hand. Ratios 2, 1/2, 1 | 4 ; advantages 1 and -3."""
    old = torch.zeros(2, 3, dtype=torch.float64)
    logp = torch.tensor([[2.0, 0.5, 1.0], [4.0, 9.0, 9.0]], dtype=torch.float64).log()
    mask = torch.tensor([[True, True, True], [True, False, False]])
    advantage = torch.tensor([1.0, -3.0], dtype=torch.float64)
    loss = lambda *args: policy_loss(logp, old, advantage, mask, *args).item()
    close(loss("grpo", 0.2, 0.2, 3.0), (-1.2 - 0.5 - 1.0 + 9.0) / 4)
    close(loss("grpo", 0.2, 0.2, None), (-1.2 - 0.5 - 1.0 + 12.0) / 4)
    close(loss("dapo", 0.2, 0.28, 10.0), (-1.28 - 0.5 - 1.0 + 12.0) / 4)
    close(loss("gspo", 0.0003, 0.0004, 10.0), (-1.0 + 12.0) / 2)  # (2 * 1/2 * 1) ** (1/3) = 1
    close(loss("gspo", 0.0003, 0.0004, 3.5), (-1.0 + 10.5) / 2)
    close(loss("dapo", 0.2, 0.28, 10.0, 40, 7), (-1.28 - 0.5 - 1.0 + 12.0) / 40)
    close(loss("gspo", 0.0003, 0.0004, 10.0, 40, 7), (-1.0 + 12.0) / 7)


@pytest.mark.parametrize("algorithm", NAMES)
def test_gradcheck_away_from_kinks(algorithm):
    """Finite differences of the very function, in float64; every row at least 1e-4 away from where
    a clip begins."""
    low, high, c = CLIPS[algorithm]
    targets = (
        [-19, -2, -0.5, -0.05, 0.05, 0.15, 0.5, 2, 5]
        if algorithm != "gspo"
        else [-2, -0.01, -1e-4, 1e-4, 2e-4, 0.01, 2]
    )
    rng = np.random.default_rng(3)
    rows = [(x, a) for x in targets for a in (0.8, -1.1)]
    logp = torch.tensor(-rng.exponential(1.0, (len(rows), 4)))
    wobble = rng.standard_normal((len(rows), 4)) * (0.3 if algorithm == "gspo" else 0.0)
    lengths = torch.tensor([1 + i % 4 for i in range(len(rows))])
    mask = torch.arange(4) < lengths[:, None]
    wobble = np.where(mask, wobble, 0)
    wobble -= (
        wobble.sum(1, keepdims=True) / lengths.numpy()[:, None]
    )  # the mean log-ratio stays at its target
    old = logp - torch.tensor([[x] for x, _ in rows]) - torch.tensor(wobble)
    advantage = torch.tensor([a for _, a in rows], dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda x: policy_loss(x, old, advantage, mask, algorithm, low, high, c) * 10,
        (logp.requires_grad_(),),
        eps=1e-7,
        atol=1e-5,
        rtol=1e-4,
    )


def test_gspo_gradient_is_the_sequence_formula():
    """Unclipped, through a model: grad of A_i s_i = A_i s_i (1/|y_i|) sum_t grad log pi(y_t)
    (2507.18071, eq. 10)."""
    torch.manual_seed(0)
    lengths = [1, 6, 3, 9]
    weight = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    inputs, tokens = torch.randn(4, 9, 5, dtype=torch.float64), torch.randint(0, 4, (4, 9))
    old_weight = weight.detach() + 0.1 * torch.randn(5, 4, dtype=torch.float64)
    logp_of = lambda w: (inputs @ w).log_softmax(-1).gather(2, tokens[..., None])[..., 0]
    advantage = torch.tensor([0.7, -1.3, 2.0, -0.2], dtype=torch.float64)
    mask = torch.arange(9) < torch.tensor(lengths)[:, None]
    loss = policy_loss(
        logp_of(weight), logp_of(old_weight), advantage, mask, "gspo", 0.9, 9.0, None
    )
    (got,) = torch.autograd.grad(loss, weight)

    expected = torch.zeros_like(weight)
    for i, length in enumerate(lengths):
        with torch.no_grad():
            s = math.exp(
                sum(float(logp_of(weight)[i, t] - logp_of(old_weight)[i, t]) for t in range(length))
                / length
            )
        assert abs(s - 1) > 1e-3
        for t in range(length):
            score = torch.autograd.grad(logp_of(weight)[i, t], weight)[0]
            expected -= advantage[i] * s * score / length / 4
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)


def test_gspo_tokens_of_a_sequence_share_one_ratio_exactly():
    """In float32 as well: a ratio carried to the tokens must not pick up their rounding, clips at
    3e-4 would see it."""
    logp, old, _, mask = batch_of([200] * 4, 5, torch.float32)
    logp = logp * 8  # improbable tokens, down to log-probabilities of -100
    old = logp - 1e-4 * torch.randn(logp.shape, generator=torch.Generator().manual_seed(0))
    _, gradient = loss_and_gradient(
        logp, old, torch.tensor([1.0, -1.0, 0.5, 2.0]), mask, "gspo", 0.0003, 0.0004, 10.0
    )
    for row in gradient:
        assert len(row.unique()) == 1 and row[0] != 0


@pytest.mark.parametrize("algorithm", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_on_policy_is_the_plain_policy_gradient(algorithm, dtype):
    """old = logp: the gradient is -A / (number of tokens), or -A / |y| / (number of sequences),
    whatever the clips."""
    lengths = [4, 1, 0, 7]
    logp, _, advantage, mask = batch_of(lengths, 11, dtype)
    loss, gradient = loss_and_gradient(
        logp, logp.clone(), advantage, mask, algorithm, *CLIPS[algorithm]
    )
    for b, length in enumerate(lengths):
        share = 1 / 12 if algorithm != "gspo" else 1 / max(length, 1) / 4
        expected = [-float(advantage[b]) * share] * length + [0.0] * (7 - length)
        close(gradient[b], expected, 1e-14 if dtype == torch.float64 else 1e-7)
    weights = [length / 12 if algorithm != "gspo" else (length > 0) / 4 for length in lengths]
    close(loss, -sum(float(a) * w for a, w in zip(advantage, weights)), 1e-6)


@pytest.mark.parametrize("algorithm", NAMES)
@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf, 1e30, -1e30])
def test_padding_never_leaks(algorithm, garbage):
    logp, old, advantage, mask = batch_of([5, 0, 1, 9, 3], 2)
    mask[3, 4] = False  # a hole inside a response is as good as padding behind it
    clips = CLIPS[algorithm]
    expected, expected_gradient = loss_and_gradient(logp, old, advantage, mask, algorithm, *clips)
    for dirty_logp, dirty_old in (
        (garbage, 0.0),
        (0.0, garbage),
        (garbage, garbage),
        (garbage, -garbage),
    ):
        loss, gradient = loss_and_gradient(
            logp.masked_fill(~mask, dirty_logp),
            old.masked_fill(~mask, dirty_old),
            advantage,
            mask,
            algorithm,
            *clips,
        )
        assert loss == expected and torch.equal(gradient, expected_gradient)
        assert (gradient[~mask] == 0).all()
    # nor does the advantage of a response without a token
    loss, gradient = loss_and_gradient(
        logp, old, advantage.index_fill(0, torch.tensor([1]), garbage), mask, algorithm, *clips
    )
    assert loss == expected and torch.equal(gradient, expected_gradient)


@pytest.mark.parametrize("algorithm", NAMES)
def test_nothing_to_learn_from_is_zero(algorithm):
    """No token at all, no sequence at all: 0 and a zero gradient, not 0 / 0."""
    for shape in ((3, 4), (3, 0), (0, 0)):
        logp = torch.randn(shape, dtype=torch.float64)
        loss, gradient = loss_and_gradient(
            logp,
            logp - 1,
            torch.ones(shape[0], dtype=torch.float64),
            torch.zeros(shape, dtype=torch.bool),
            algorithm,
            *CLIPS[algorithm],
        )
        assert loss == 0 and (gradient == 0).all()


@pytest.mark.parametrize("algorithm", NAMES)
def test_long_responses_in_float32(algorithm):
    batch = batch_of([5000, 1, 0, 4999, 37, 2500, 5000, 800], 8, torch.float32)
    loss, gradient = loss_and_gradient(*batch, algorithm, *CLIPS[algorithm])
    expected_loss, expected_gradient = reference_loss(*batch, algorithm, *CLIPS[algorithm])
    close(loss, expected_loss, 1e-5)
    expected_gradient, gradient = np.array(expected_gradient), gradient.double().numpy()
    assert np.abs(gradient - expected_gradient).max() <= 1e-4 * np.abs(expected_gradient).max()
    assert ((gradient != 0) == (expected_gradient != 0)).mean() > 0.9999  # the same tokens clipped


@pytest.mark.parametrize("algorithm", NAMES)
@given(
    lengths=st.lists(st.sampled_from([0, 1, 3, 8, 40]), min_size=2, max_size=12),
    seed=st.integers(0, 10**6),
    data=st.data(),
)
@repeatable
def test_no_cut_of_a_batch_changes_loss_or_gradient(algorithm, lengths, seed, data):
    """Any assignment of the rows to parts, each padded to its own longest, with the global
    denominators."""
    logp, old, advantage, mask = batch_of(lengths, seed)
    whole, whole_gradient = loss_and_gradient(
        logp, old, advantage, mask, algorithm, *CLIPS[algorithm]
    )
    part_of = torch.tensor(
        data.draw(st.lists(st.integers(0, 4), min_size=len(lengths), max_size=len(lengths)))
    )
    counts = (max(sum(lengths), 1), len(lengths))
    total, gradient = 0.0, torch.zeros_like(logp)
    for part in part_of.unique():
        rows = (part_of == part).nonzero()[:, 0]
        width = max(lengths[i] for i in rows)
        loss, of_part = loss_and_gradient(
            logp[rows, :width],
            old[rows, :width],
            advantage[rows],
            mask[rows, :width],
            algorithm,
            *CLIPS[algorithm],
            *counts,
        )
        total += loss
        gradient[rows, :width] = of_part
    close(total, whole, 1e-12)
    close(gradient, whole_gradient, 1e-12)


def test_the_three_aggregate_differently():
    """One step a batch (ratio 1): a token mean weighs long responses by their length, a sequence
    mean does not."""
    logp = torch.zeros(2, 10, dtype=torch.float64)
    mask = torch.arange(10) < torch.tensor([[10], [2]])
    advantage = torch.tensor([1.0, -1.0], dtype=torch.float64)
    close(policy_loss(logp, logp, advantage, mask, "grpo", 0.2, 0.2, None), -8 / 12)
    close(policy_loss(logp, logp, advantage, mask, "dapo", 0.2, 0.28, None), -8 / 12)
    close(policy_loss(logp, logp, advantage, mask, "gspo", 3e-4, 4e-4, None), 0)


def test_an_unknown_algorithm_is_refused():
    one = torch.zeros(1, 1)
    with pytest.raises(ValueError, match="grpo, dapo, gspo"):
        policy_loss(
            one, one, torch.ones(1), torch.ones(1, 1, dtype=torch.bool), "ppo", 0.2, 0.2, None
        )


# --------------------------------------------------------------------------------------------------
# group_advantage


@given(
    groups=st.integers(2, 16).flatmap(
        lambda n: st.lists(
            st.lists(st.floats(-10, 10).map(lambda x: round(x, 2)), min_size=n, max_size=n),
            min_size=1,
            max_size=4,
        )
    )
)
@repeatable
def test_advantage_of_any_group(groups):
    got = group_advantage(torch.tensor(groups, dtype=torch.float64))
    for row, group in zip(got.tolist(), groups):
        mean, std = statistics.fmean(group), statistics.stdev(group)  # the unbiased one
        close(row, [(r - mean) / (std + 1e-6) if len(set(group)) > 1 else 0.0 for r in group], 1e-8)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_advantage_of_small_and_full_groups(dtype, tolerance):
    close(
        group_advantage(torch.tensor([[0.0, 1.0], [1.0, 0.2]], dtype=dtype)),
        [
            [-0.5 / (math.sqrt(0.5) + 1e-6), 0.5 / (math.sqrt(0.5) + 1e-6)],
            [0.4 / (math.sqrt(0.32) + 1e-6), -0.4 / (math.sqrt(0.32) + 1e-6)],
        ],
        tolerance,
    )
    one_right = [1.0] + [0.2] * 15
    std = 0.8 * math.sqrt(15 / 16 * 1 / 15)  # sum of squares 0.8^2 * 15/16, over 15
    close(
        group_advantage(torch.tensor([one_right], dtype=dtype))[0],
        [0.75 / (std + 1e-6)] + [-0.05 / (std + 1e-6)] * 15,
        tolerance,
    )


def test_epsilon_stands_beside_the_standard_deviation():
    """Where the spread is as small as eps itself: 1e-6 is added to the std, not to the variance and
    not under the root."""
    d = 1e-6
    close(
        group_advantage(torch.tensor([[0.0, d]], dtype=torch.float64)),
        [[-0.5 * d / (d * math.sqrt(0.5) + 1e-6), 0.5 * d / (d * math.sqrt(0.5) + 1e-6)]],
        1e-12,
    )


@pytest.mark.parametrize("dtype, most", [(torch.float32, 0.0), (torch.float64, 1e-8)])
@pytest.mark.parametrize("size", range(2, 18))
def test_a_group_without_spread_has_no_advantage(dtype, most, size):
    """Exactly none in float32: its mean may miss the common value by a last digit, which a std of 0
    would blow up."""
    values = torch.tensor([0.0, 0.2, 1.0, -0.3, 0.1, 3.3333, -7.77, 9.99], dtype=dtype)[:, None]
    assert group_advantage(values.repeat(1, size)).abs().max() <= most
    for value in values:  # a sum's order depends on the shape
        assert group_advantage(value[None].repeat(1, size)).abs().max() <= most


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_group_of_one_has_mean_0_and_std_1(dtype):
    got = group_advantage(torch.tensor([[0.7], [-2.0], [0.0]], dtype=dtype))
    close(
        got,
        [[0.7 / (1 + 1e-6)], [-2 / (1 + 1e-6)], [0.0]],
        1e-6 if dtype == torch.float32 else 1e-12,
    )


@pytest.mark.filterwarnings("ignore:std")
def test_no_groups():
    assert group_advantage(torch.zeros(0, 16)).shape == (0, 16)


# --------------------------------------------------------------------------------------------------
# KL, overlong penalty, spread


@given(
    logp=st.lists(st.floats(-19, 0), min_size=1, max_size=20),
    seed=st.integers(0, 1000),
    scale=st.sampled_from([1e-3, 0.3, 3.0]),
)
@repeatable
def test_kl_k3(logp, seed, scale):
    logp = torch.tensor(logp, dtype=torch.float64, requires_grad=True)
    ref = (
        logp
        + scale
        * torch.randn(
            logp.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
        )
    ).detach()
    kl = kl_k3(logp, ref)
    ratio = [math.exp(r - p) for p, r in zip(logp.tolist(), ref.tolist())]  # ref / pi
    close(kl.detach(), [x - 1 - math.log(x) for x in ratio], 1e-9)
    assert (kl >= 0).all()
    (gradient,) = torch.autograd.grad(kl.sum(), logp)
    close(gradient, [1 - x for x in ratio], 1e-9)


def test_kl_k3_is_the_kl_on_average():
    """Over samples of pi its mean is KL(pi | ref), not KL(ref | pi): the direction counts."""
    pi, ref = (
        torch.tensor([0.7, 0.2, 0.1], dtype=torch.float64),
        torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64),
    )
    close(
        (pi * kl_k3(pi.log(), ref.log())).sum(),
        sum(p * math.log(p / q) for p, q in zip(pi.tolist(), ref.tolist())),
    )


def test_kl_k3_stays_finite():
    kl = kl_k3(torch.tensor([-1000.0, 0.0, -5.0]), torch.tensor([0.0, -1000.0, -5.0]))
    close(kl, [math.exp(20) - 21, math.exp(-20) + 19, 0], 1e-6)
