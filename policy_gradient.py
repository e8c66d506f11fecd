"""The policy gradient of stages 2 and 3: group advantage, clipped loss, the gradient of a batch.

    (10)  A_i  = (R_i - mean(R)) / (std(R) + 1e-6)            over the N rollouts of one prompt
    (14)  r    = exp(log pi(y) - log pi_old(y))               the importance ratio, its log clamped
                                                              to +-20
    (15)  l    = max(-A r, -A clip(r, 1 - low, 1 + high));   if A < 0, l is at most -A * dual_clip
    (16)  L    = the mean of l, as the algorithm takes it
    (17)  k3   = exp(d) - d - 1,  d = log pi_ref - log pi     KL(pi | pi_ref) of a token

                   GRPO (2402.03300)       DAPO (2503.14476)       GSPO (2507.18071)
    ratio (14)     each token              each token              sequence, exp(mean log-ratio)
    clip (15)      0.2 / 0.2, dual 3       0.2 / 0.28, dual 10     0.0003 / 0.0004, no dual
    mean (16)      over all tokens         over all tokens         over sequences, of token means

The clips and dual clips are the published run's, but for GSPO's dual clip (D11); 0.28 is DAPO's
Clip-Higher. The dual clip is that of dual-clip PPO (1912.09729); none of the three papers above has
one. The token mean of GRPO is verl's and the release's; 2402.03300 averages each sequence first.

Denominators are those of the whole batch, over all ranks and packs (D9). So neither the loss nor
its gradient depends on how the batch was cut. The KL penalty of GSPO is a mean over sequences, as
its loss is (D11).

With one optimiser step per batch of rollouts the ratio is exactly 1 and no clip acts. That is the
published setting.
"""

import math
from dataclasses import dataclass

import torch

from data import Group, Pack
from model import token_logprobs
from support.metrics import Loss, Max, Mean, Min
from support.ranks import all_sum

# What the published runs set for each algorithm (but for GSPO's dual clip, D11); a dual clip of 0
# is none. Each value is the default of the flag of its name. For the weight decay of DAPO and GSPO
# the release has two values, 0.1 and 0.01.
ALGORITHMS = {
    "grpo": dict(epsilon=0.2, epsilon_high=0.2, dual_clip=3.0, warmup_steps=0.0, weight_decay=0.01),
    "dapo": dict(
        epsilon=0.2, epsilon_high=0.28, dual_clip=10.0, warmup_steps=10.0, weight_decay=0.1
    ),
    "gspo": dict(
        epsilon=3e-4, epsilon_high=4e-4, dual_clip=0.0, warmup_steps=0.05, weight_decay=0.1
    ),
}


def group_advantage(rewards: torch.Tensor) -> torch.Tensor:
    """(10): (P, N) rewards -> (P, N) advantages, (r - mean) / (unbiased std + 1e-6) over the
    rollouts of one prompt. A group of one keeps mean 0 and std 1."""
    if rewards.shape[1] == 1:
        return rewards / (1 + 1e-6)
    r = rewards.double()  # in float32 equal rewards would differ from their mean by a rounding
    normal = (r - r.mean(1, keepdim=True)) / (r.std(1, keepdim=True) + 1e-6)
    return normal.to(rewards.dtype)


def policy_loss(
    logp: torch.Tensor,
    old_logp: torch.Tensor,
    advantage: torch.Tensor,
    mask: torch.Tensor,
    algorithm: str,
    clip_low: float,
    clip_high: float,
    dual_clip: float,
    num_tokens: float | None = None,
    num_sequences: float | None = None,
) -> torch.Tensor:
    """(14), (15), (16): the clipped policy gradient. logp, old_logp, mask (B, T), mask boolean;
    advantage (B,). -> scalar. A dual clip of 0 is none. `num_tokens` and `num_sequences` are the
    global denominators, those of this batch where None. ValueError for another algorithm.
    Takes along: ALGORITHMS, importance_ratio, aggregate."""
    if algorithm not in ALGORITHMS:
        raise ValueError(f"algorithm {algorithm!r}: one of {', '.join(ALGORITHMS)}")
    r = importance_ratio(logp, old_logp, mask, algorithm)
    a = advantage[:, None].to(r.dtype)
    # (15), the clip.
    loss = torch.maximum(-a * r, -a * r.clamp(1 - clip_low, 1 + clip_high))
    # (15), the dual clip: it bounds the loss where the advantage is negative and the ratio huge.
    if dual_clip:
        loss = torch.where(a < 0, torch.minimum(loss, -a * dual_clip), loss)
    return aggregate(loss, mask, algorithm, num_tokens, num_sequences)


def importance_ratio(logp, old_logp, mask, algorithm: str) -> torch.Tensor:
    """(14): logp, old_logp and the boolean mask, (B, T) each -> ratios (B, T), 1 at padding.

    In GSPO all tokens of a sequence share s = exp(mean_t log r_t), and the gradient goes through s:
    ds = s * mean_t d(logp_t). The release gives each token s.detach() * exp(logp - logp.detach()),
    straight through. Averaged over the tokens of a sequence, which have one advantage, the two have
    the same gradient."""
    log_ratio = torch.where(mask, logp - old_logp, 0.0)
    if algorithm == "gspo":
        num_tokens = mask.sum(1, keepdim=True).clamp(min=1)
        mean = log_ratio.sum(1, keepdim=True) / num_tokens
        log_ratio = torch.where(mask, mean, 0.0)
    return log_ratio.clamp(-20, 20).exp()  # +-20 as in the release


def aggregate(values, mask, algorithm: str, num_tokens=None, num_sequences=None) -> torch.Tensor:
    """(16): (B, T) values -> scalar, their mean as the algorithm takes it. GRPO and DAPO average
    over all tokens; GSPO averages within each sequence first, then over the sequences."""
    values = torch.where(mask, values, 0.0)
    if algorithm == "gspo":
        sequences = max(len(mask), 1) if num_sequences is None else num_sequences
        means = values.sum(1) / mask.sum(1).clamp(min=1)  # (B,)
        return means.sum() / sequences
    tokens = max(int(mask.sum()), 1) if num_tokens is None else num_tokens
    return values.sum() / tokens


def kl_k3(logp: torch.Tensor, ref_logp: torch.Tensor) -> torch.Tensor:
    """(17): the k3 estimate of KL(pi | pi_ref) for each token (Schulman 2020). Any shape -> the
    same. Never negative."""
    d = (ref_logp - logp).clamp(-20, 20)
    return d.exp() - d - 1


@dataclass
class Objective:
    """What `policy_backward` minimises: the loss of an algorithm, at a sampling temperature."""

    algorithm: str  # grpo, dapo or gspo
    clip_low: float
    clip_high: float
    dual_clip: float = 0.0  # 0: none
    temperature: float = 1.0  # of the rollouts
    beta: float = 0.0  # weight of the KL to a reference (17)
    # True where one optimiser step is made per batch of rollouts. Nothing has moved since sampling
    # then, so the new log-probabilities, detached, are the old ones too. False: the old ones are
    # those that the groups hold.
    on_policy: bool = True


def policy_backward(
    policy,
    packs: list[Pack],
    groups: list[Group],
    advantage: torch.Tensor,
    objective: Objective,
    reference=None,
) -> dict:
    """Adds the gradient of the policy loss (14) to (17) over `groups`, and returns metrics for the
    log. `packs` are the groups in packs, by `data.rank_packs`. advantage (P, N) belongs to the N
    branches of the P groups. `reference` is the policy of the KL penalty, or None for no penalty.
    Every rank calls it."""
    device = next(policy.parameters()).device
    lengths = [len(branch) for group in groups for branch in group.branches]
    # The denominators of (16), over all ranks. Gradients are summed over ranks (support/ranks.py).
    num_tokens, num_sequences = all_sum([sum(lengths), len(lengths)]).tolist()
    counts = dict(num_tokens=max(num_tokens, 1), num_sequences=max(num_sequences, 1))
    loss_total = 0.0
    tokens = 0
    measured = Measured()

    for pack in packs:
        pack = pack.to(device)
        mask = pack.mask
        # Look up the advantage of each of the pack's B branches, and the log-probabilities of their
        # K tokens that the groups hold: from sampling, or from `rescore`. A pack may have no
        # branch, so zeros(0) stands before them.
        members = torch.tensor(pack.members, dtype=torch.long).view(-1, 2)
        branch_advantage = advantage[members[:, 0], members[:, 1]].to(device)
        held = [groups[g].logprobs[i] for g, i in pack.members]
        held = torch.cat([torch.zeros(0), *held]).to(device)
        # Compute the new log-probabilities, and choose the old ones.
        logp, entropy = token_logprobs(policy, pack, objective.temperature)
        old_logp = logp.detach() if objective.on_policy else held
        new, old = pack.padded(logp), pack.padded(old_logp)
        # Compute this pack's part of the loss (14) to (16).
        loss = policy_loss(
            logp=new,
            old_logp=old,
            advantage=branch_advantage,
            mask=mask,
            algorithm=objective.algorithm,
            clip_low=objective.clip_low,
            clip_high=objective.clip_high,
            dual_clip=objective.dual_clip,
            **counts,
        )
        # Add the KL penalty (17), where there is a reference.
        if reference is not None:
            with torch.no_grad():
                ref_logp, _ = token_logprobs(reference, pack, objective.temperature)
            kl = kl_k3(logp, ref_logp)
            penalty = aggregate(pack.padded(kl), mask, objective.algorithm, **counts)
            loss = loss + objective.beta * penalty
            measured.kl_ref += kl.sum().item()
        # Add its gradient.
        loss.backward()

        # Measure for the log.
        loss_total += loss.item()
        tokens += len(logp)
        measured.entropy += entropy.sum().item()
        if len(logp):
            measured.add_ratios(new.detach(), old, branch_advantage, mask, objective)
            measured.kl_old += kl_k3(logp.detach(), old_logp).sum().item()
        if len(logp) and objective.on_policy:
            gap = (logp.detach() - held).abs().max().item()
            measured.sampled_scored_gap = max(measured.sampled_scored_gap, gap)

    metrics = {
        "loss": Loss(loss_total, updates=1 if num_sequences else 0),
        "entropy": Mean(measured.entropy, tokens),
        "clipped_low": Mean(measured.clipped_low, tokens),
        "clipped_high": Mean(measured.clipped_high, tokens),
        "kl_old": Mean(measured.kl_old, tokens),
        "ratio_max": Max(measured.ratio_max),
        "ratio_min": Min(measured.ratio_min),
    }
    if reference is not None:
        metrics["kl_ref"] = Mean(measured.kl_ref, tokens)  # over tokens, in GSPO too
    if objective.on_policy:
        metrics["sampled_scored_gap"] = Max(measured.sampled_scored_gap)
    return metrics


@dataclass
class Measured:
    """What is measured of an update beside its loss, over all tokens of this rank."""

    entropy: float = 0.0  # the sum over tokens, as are the next four
    clipped_low: float = 0.0
    clipped_high: float = 0.0
    kl_old: float = 0.0
    kl_ref: float = 0.0
    ratio_max: float = -math.inf
    ratio_min: float = math.inf
    # The largest difference between a token's log-probability from sampling and the one from the
    # training's own forward.
    sampled_scored_gap: float = 0.0

    def add_ratios(self, logp, old_logp, advantage, mask, objective: Objective) -> None:
        """Counts the tokens that the clip acts on: those whose ratio is out of range and whose
        advantage pushes it further out. Notes the largest and the smallest ratio."""
        r = importance_ratio(logp, old_logp, mask, objective.algorithm)[mask]
        a = advantage[:, None].expand_as(mask)[mask]
        self.clipped_low += ((r < 1 - objective.clip_low) & (a < 0)).sum().item()
        self.clipped_high += ((r > 1 + objective.clip_high) & (a > 0)).sum().item()
        self.ratio_max = max(self.ratio_max, r.max().item())
        self.ratio_min = min(self.ratio_min, r.min().item())


@torch.no_grad()
def rescore(policy, packs: list[Pack], groups: list[Group], temperature: float) -> float:
    """Replaces the log-probabilities that `groups` recorded while sampling by those of the
    training's own forward, and returns the largest difference. It is called before the first of
    several steps on a batch. In bfloat16 the two differ by more than GSPO's clip range, and a ratio
    should leave 1 only by what the steps have changed. Every rank calls it."""
    device, gap = next(policy.parameters()).device, 0.0
    for pack in packs:
        logp, _ = token_logprobs(policy, pack.to(device), temperature)
        for (g, i), scored in zip(pack.members, logp.cpu().split(pack.lengths)):
            gap = max(gap, (scored - groups[g].logprobs[i]).abs().max().item())
            groups[g].logprobs[i] = scored
    return gap
