"""Steps of the policy gradient: the gradient of a whole model, and whether a policy learns by it.
The formulas and their references are in test_policy_gradient.py."""

import math
import statistics

import numpy as np
import pytest
import torch

from data import Group, encode_prompts, encode_response, rank_packs
from model import load_policy
from policy_gradient import Objective, group_advantage, policy_backward, policy_loss, rescore
from support.metrics import Mean
from support.rows import Example
from support.tiny import Shape, build_model, train_tokenizer
from tests.test_policy_gradient import CLIPS, NAMES, close, reference_loss

# --------------------------------------------------------------------------------------------------
# The update of a whole model


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """(policy, processor, another policy as the reference model), random weights."""
    path = tmp_path_factory.mktemp("models")
    text = "<caption>1, 2 and 3.</caption> <think>1 + 2 = 3.</think> <answer>A</answer>"
    tokenizer = train_tokenizer([text], 10)
    build_model(path / "policy", tokenizer, Shape(hidden_size=32))
    build_model(path / "other", tokenizer, Shape(hidden_size=32), seed=1)
    policy, processor = load_policy(str(path / "policy"))
    return policy, processor, load_policy(str(path / "other"))[0]


def rollouts(policy, processor, temperature: float):
    """Groups with log-probabilities that another policy recorded, and for each branch the current
    ones, computed from one plain forward and full logits."""
    chats = [
        [{"role": "user", "content": [{"type": "text", "text": t}]}]
        for t in ("What is the sum?", "A or B, which one?")
    ]
    prompts = encode_prompts(
        processor, [Example(i, f"row {i}", chat, []) for i, chat in enumerate(chats)]
    )
    texts = [
        ["<caption>1</caption>", "", "a good deal longer than the others are"],
        ["x", "yes, it is", "no", "2 + 2"],
    ]
    drift = np.random.default_rng(0).permutation([2e-4, 0.2, 0.2, 3e-4, 1.0, 2.0, 0.5]).tolist()
    groups, current = [], []
    for prompt, some in zip(prompts, texts):
        branches, recorded = [encode_response(processor, t) for t in some], []
        for branch in branches:
            logits = policy(
                input_ids=torch.cat([prompt.input_ids, branch])[None],
                use_cache=False,
                layout=Causal(),
            ).logits[0]
            logits = logits[len(prompt.input_ids) - 1 : -1].double() / temperature
            logits[:, policy.forbidden] = -torch.inf
            current.append(logits.log_softmax(-1).gather(1, branch[:, None])[:, 0])
            scale = drift.pop()
            noise = torch.randn(len(branch), generator=torch.Generator().manual_seed(len(current)))
            recorded.append(
                current[-1].detach().float()
                + scale * (noise + (1 if len(current) // 2 % 2 else -1))
            )
        groups.append(Group(prompt, branches, recorded))
    return groups, current


class Causal:
    """Plain causal attention of one sequence."""

    def attend(self, layer, q, k, v, scale):
        attend = torch.nn.functional.scaled_dot_product_attention
        return attend(q, k, v, scale=scale, is_causal=True, enable_gqa=True).transpose(1, 2)


@pytest.mark.parametrize("algorithm", NAMES)
@pytest.mark.parametrize("on_policy", [False, True])
@pytest.mark.parametrize("max_tokens, beta", [(10_000, 0.0), (70, 0.3), (1, 0.0)])
def test_update_policy(tiny, algorithm, on_policy, max_tokens, beta):
    """The parameters' gradient is the reference's slope at every token times the gradient of its
    log-probability, however the batch is cut into packs; the metrics are those of a loop over the
    tokens."""
    policy, processor, other = tiny
    low, high, dual = CLIPS[algorithm]
    groups, current = rollouts(policy, processor, 0.7)
    recorded = [row for group in groups for row in group.logprobs]
    advantage = [0.5, -1.0, 0.9, -0.7, 1.3, -2.0, 0.4]
    total = sum(map(len, current))
    now = [row.detach().tolist() for row in current]
    old = now if on_policy else [row.tolist() for row in recorded]
    loss, slopes = reference_loss(
        now, old, advantage, [[True] * len(row) for row in now], algorithm, low, high, dual
    )
    objective = sum(
        slope * logp for row, some in zip(slopes, current) for slope, logp in zip(row, some)
    )
    kl = 0.0
    mean_kl = 0.0  # as the algorithm takes means: over all tokens, or over sequences
    if beta:
        with torch.no_grad():
            _, of_reference = rollouts(other, processor, 0.7)
        for mine, theirs in zip(current, of_reference):
            for p, r in zip(mine, theirs):
                of_token = torch.exp(r - p) - 1 - (r - p)
                kl = kl + of_token
                share = len(mine) * len(current) if algorithm == "gspo" else total
                mean_kl = mean_kl + of_token / share
        objective = objective + beta * mean_kl
        kl = kl.item()
        loss += beta * mean_kl.item()
    policy.zero_grad()
    objective.backward()
    expected = {name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None}

    policy.zero_grad()
    objective = Objective(algorithm, low, high, dual, 0.7, beta, on_policy)
    packs = rank_packs(groups, processor, max_tokens)
    rows = torch.tensor([[*advantage[:3], 0.0], advantage[3:]])  # the first prompt has three
    measured = policy_backward(
        policy, packs, groups, rows, objective, reference=other if beta else None
    )
    assert measured["loss"].updates == 1
    close(measured["loss"].value, loss, 1e-5)
    for name, gradient in expected.items():
        got = dict(policy.named_parameters())[name].grad
        assert (got - gradient).norm() <= 1e-3 * gradient.norm() + 1e-7, name
    assert len(expected) > 20
    policy.zero_grad()

    ratios = []  # (ratio, advantage) of every token; GSPO's is its sequence's
    for mine, before, a in zip(now, old, advantage):
        differences = [p - q for p, q in zip(mine, before)]
        if algorithm == "gspo":
            differences = [statistics.fmean(differences)] * len(differences)
        ratios += [(math.exp(d), a) for d in differences]
    means = {name: value for name, value in measured.items() if isinstance(value, Mean)}
    assert {mean.count for mean in means.values()} == {total}
    clipped_low, clipped_high = means["clipped_low"].total, means["clipped_high"].total
    assert clipped_low == sum(r < 1 - low and a < 0 for r, a in ratios)
    assert clipped_high == sum(r > 1 + high and a > 0 for r, a in ratios)
    assert on_policy == (clipped_low + clipped_high == 0)
    extremes = [measured["ratio_min"].value, measured["ratio_max"].value]
    close(extremes, [min(ratios)[0], max(ratios)[0]], 1e-5)
    largest = max(abs(p - q) for a, b in zip(now, recorded) for p, q in zip(a, b.tolist()))
    assert ("sampled_scored_gap" in measured) == on_policy
    if on_policy:
        close(measured["sampled_scored_gap"].value, largest, 1e-4)
    # Rescored, the old log-probabilities are the policy's own, and no ratio is left.
    close(rescore(policy, packs, groups, 0.7), largest, 1e-4)
    scored = [row.tolist() for group in groups for row in group.logprobs]
    for mine, own in zip(now, scored, strict=True):
        close(own, mine, 1e-4)
    moved = [p - q for mine, before in zip(now, old) for p, q in zip(mine, before)]
    close(means["kl_old"].total, sum(math.exp(-d) - 1 + d for d in moved), 1e-4)
    assert ("kl_ref" in means) == bool(beta)
    if beta:
        close(means["kl_ref"].total, kl, 1e-4)


# --------------------------------------------------------------------------------------------------
# Does it learn


def optimise(
    algorithm: str,
    steps: int,
    minibatches: int,
    epochs: int,
    rate: float,
    reward,
    length: int,
    arms: int,
    seed: int,
) -> torch.Tensor:
    """A tabular policy of `length` steps (logits (length, arms)); 4 groups of 16 a batch, several
    updates on each batch. Returns the probabilities that it ends with."""
    torch.manual_seed(seed)
    logits = torch.zeros(length, arms, requires_grad=True)
    optimizer = torch.optim.Adam([logits], rate)
    logp_of = lambda actions: logits.log_softmax(-1)[torch.arange(length), actions]
    for _ in range(steps):
        with torch.no_grad():
            actions = torch.multinomial(logits.softmax(-1), 64, replacement=True).T  # (64, length)
            old = logp_of(actions)
        advantage = group_advantage(reward(actions).view(4, 16)).flatten()
        for _ in range(epochs):
            for part in torch.randperm(64).chunk(minibatches):
                mask = torch.ones(len(part), length, dtype=torch.bool)
                optimizer.zero_grad()
                policy_loss(
                    logp_of(actions[part]),
                    old[part],
                    advantage[part],
                    mask,
                    algorithm,
                    *CLIPS[algorithm],
                ).backward()
                optimizer.step()
    return logits.detach().softmax(-1)


@pytest.mark.parametrize("algorithm", NAMES)
def test_bandit_reaches_the_best_arm(algorithm):
    """Ten arms of noisy reward k / 10: after 80 batches of four minibatches the best has
    probability above 0.9 (it starts at 0.1; the runner-up is 0.1 behind in reward, half the
    noise)."""
    reward = lambda actions: actions[:, 0] / 10 + 0.2 * torch.randn(len(actions))
    probabilities = optimise(algorithm, 80, 4, 1, 0.15, reward, 1, 10, seed=1)
    assert probabilities[0, 9] > 0.9


@pytest.mark.parametrize("algorithm", NAMES)
def test_three_steps_reach_the_only_right_sequence(algorithm):
    """Reward 1 for one sequence of 125, 0.2 for a right first and last step: after 120 batches,
    each used twice in two minibatches, the right sequence has probability above 0.9."""
    best = torch.tensor([3, 0, 4])

    def reward(actions):
        hit = actions == best
        return (
            0.2 * (hit[:, 0] & hit[:, 2]).float()
            + 0.8 * hit.all(1).float()
            + 0.05 * hit.float().sum(1)
        )

    probabilities = optimise(algorithm, 120, 2, 2, 0.05, reward, 3, 5, seed=2)
    assert probabilities[torch.arange(3), best].prod() > 0.9


@pytest.mark.parametrize("algorithm", NAMES)
def test_clips_hold_the_policy_near_the_one_that_sampled(algorithm):
    """Fifty small steps on one batch: with its clips the ratios stay about where those end, without
    they run away."""
    torch.manual_seed(0)
    start = torch.randn(6)
    actions = torch.multinomial(start.softmax(-1), 32, replacement=True)
    advantage = group_advantage((actions == actions[0]).float().view(2, 16)).flatten()
    assert advantage.view(2, 16).std(1).min() > 0.9  # both groups have something to say
    old = start.log_softmax(-1)[actions][:, None]
    ends = {}
    for clips in (CLIPS[algorithm], (1.0, 1e9, None)):
        logits = start.clone().requires_grad_()
        optimizer = torch.optim.SGD([logits], 0.2 * CLIPS[algorithm][1])
        for _ in range(50):
            optimizer.zero_grad()
            logp = logits.log_softmax(-1)[actions][:, None]
            policy_loss(
                logp, old, advantage, torch.ones(32, 1, dtype=torch.bool), algorithm, *clips
            ).backward()
            optimizer.step()
        ratios = (logits.detach().log_softmax(-1)[actions] - old[:, 0]).exp()
        ends[clips] = (ratios[advantage > 0] - 1).max().item()
    held, free = ends.values()
    high = CLIPS[algorithm][1]
    assert high < held < 1.1 * high and free > 1.2 * high
