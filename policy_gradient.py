"""The policy gradient of stages 2 and 3: group advantage, clipped loss, the gradient of a batch.

    (10)  A_i  = (R_i - mean(R)) / (std(R) + 1e-6)            over the N rollouts of one prompt
    (14)  r    = exp(log pi(y) - log pi_old(y))               the importance ratio
    (15)  l    = max(-A r, -A clip(r, 1 - low, 1 + high)),    where A < 0 at most -A * dual_clip
    (16)  L    = the mean of l, as the algorithm takes it
    (17)  k3   = exp(d) - d - 1,  d = log pi_ref - log pi     KL(pi | pi_ref) of a token

                   GRPO (2402.03300)       DAPO (2503.14476)       GSPO (2507.18071)
    ratio (14)     each token              each token              sequence, exp(mean log-ratio)
    clip (15)      0.2 / 0.2, dual 3       0.2 / 0.28, dual 10     0.0003 / 0.0004, no dual
    mean (16)      over all tokens         over all tokens         over sequences, of token means

The clips and dual clips are the published run's; 0.28 is DAPO's Clip-Higher. The dual clip is
PPO's (1912.09729); neither 2402.03300 nor 2503.14476 has one. The token mean of GRPO is verl's and
the release's; 2402.03300 averages each sequence first.
Denominators are those of the whole batch, over all ranks and packs (D9), so neither the loss nor
its gradient depends on how the batch was cut. GSPO has no dual clip, and its KL is a mean over
sequences as its loss is (D11). With one optimiser step per batch of rollouts the ratio
is exactly 1 and no clip acts. That is the published setting.
"""

import math

import torch

from data import Group, make_packs
from model import all_sum, even_packs, token_logprobs, world_size

# What the published runs set for each algorithm; a dual clip of 0 is none. A flag of the same name
# overrides it.
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
    # (15) A negative advantage with a huge ratio is bounded by the dual clip.
    a = advantage[:, None].to(r.dtype)
    loss = torch.maximum(-a * r, -a * r.clamp(1 - clip_low, 1 + clip_high))
    if dual_clip:
        loss = torch.where(a < 0, torch.minimum(loss, -a * dual_clip), loss)
    return aggregate(loss, mask, algorithm, num_tokens, num_sequences)


def importance_ratio(logp, old_logp, mask, algorithm: str) -> torch.Tensor:
    """(14): (B, T). In GSPO all tokens of a sequence share s = exp(mean_t log r_t). The token mean
    of the loss then has the gradient of the sequence's formula, s * mean_t d logp_t. The release
    passes s straight through to the tokens, s.detach() * exp(logp - logp.detach()), which has the
    same gradient, as all tokens of a sequence have one advantage."""
    log_ratio = torch.where(mask, logp - old_logp, 0.0)
    if algorithm == "gspo":
        mean = log_ratio.sum(1, keepdim=True) / mask.sum(1).clamp(min=1)[:, None]
        log_ratio = torch.where(mask, mean, 0.0)
    return log_ratio.clamp(-20, 20).exp()  # +-20 as in the release


def aggregate(values, mask, algorithm: str, num_tokens=None, num_sequences=None) -> torch.Tensor:
    """(16): (B, T) values -> their mean as the algorithm takes it. GSPO averages each sequence
    first, GRPO and DAPO all tokens."""
    values = torch.where(mask, values, 0.0)
    if algorithm == "gspo":
        sequences = max(len(mask), 1) if num_sequences is None else num_sequences
        return (values.sum(1) / mask.sum(1).clamp(min=1)).sum() / sequences
    return values.sum() / (max(int(mask.sum()), 1) if num_tokens is None else num_tokens)


def kl_k3(logp: torch.Tensor, ref_logp: torch.Tensor) -> torch.Tensor:
    """(17): the k3 estimate of KL(pi | ref) for each token (Schulman 2020). Never negative."""
    d = (ref_logp - logp).clamp(-20, 20)
    return d.exp() - d - 1


def rescore(policy, groups: list[Group], processor, config) -> float:
    """Before the first of several steps of a batch: puts the log-probabilities of the training's
    own forward in place of those recorded while sampling. In bfloat16 the two differ by more than
    GSPO's range, and a ratio should tell only what the steps have moved. Every rank calls it.
    -> the largest difference."""
    device, gap = next(policy.parameters()).device, 0.0
    for pack in even_packs(make_packs(groups, config.max_tokens_per_pack), processor):
        with torch.no_grad():
            logp, _ = token_logprobs(policy, pack.to(device), config.temperature)
        for (g, i), scored in zip(pack.members, logp.cpu().split(pack.lengths)):
            gap = max(gap, (scored - groups[g].logprobs[i]).abs().max().item())
            groups[g].logprobs[i] = scored
    return gap


def policy_backward(
    policy,
    groups: list[Group],
    advantage: torch.Tensor,
    processor,
    config,
    algorithm: str,
    clips: tuple[float, float, float],
    on_policy: bool,
    reference=None,
) -> tuple[dict, dict]:
    """Adds the gradient of the policy loss over `groups`, B branches in all, advantage (B,).

    `clips` are clip_low, clip_high and dual_clip; `config` has temperature, max_tokens_per_pack
    and, with a `reference` policy, beta. With `on_policy` the new log-probabilities, detached, are
    the old ones too: one step is made per batch, so nothing has moved since sampling. Else those
    that `groups` hold are, see `rescore`.
    -> (means, peaks) for the log: name -> (sum, count), name -> extreme, of this rank."""
    device = next(policy.parameters()).device
    place = {}  # (group, branch) -> its place in `advantage`
    for g, group in enumerate(groups):
        place |= {(g, i): len(place) + i for i in range(len(group.branches))}
    recorded = [logp for group in groups for logp in group.logprobs]
    # The denominators of (16), over all ranks.
    num_tokens, num_sequences = all_sum([sum(map(len, recorded)), len(recorded)]).tolist()
    counts = max(num_tokens, 1), max(num_sequences, 1)
    names = ["entropy", "clipped_low", "clipped_high", "kl_old", *(["kl_ref"] if reference else [])]
    sums = dict.fromkeys(names, 0.0)
    peaks = {"ratio_max": -math.inf, "ratio_min": math.inf}
    peaks |= {"sampled_scored_gap": 0.0} if on_policy else {}
    total, tokens = 0.0, 0

    for pack in even_packs(make_packs(groups, config.max_tokens_per_pack), processor):
        pack = pack.to(device)
        members = [place[member] for member in pack.members]
        logp, entropy = token_logprobs(policy, pack, config.temperature)
        known = torch.cat([torch.zeros(0), *(recorded[i] for i in members)]).to(device)
        old_logp = logp.detach() if on_policy else known
        new, old = pack.padded(logp), pack.padded(old_logp)
        a, mask = advantage[members].to(device), pack.mask
        loss = policy_loss(new, old, a, mask, algorithm, *clips, *counts)
        if reference is not None:
            with torch.no_grad():
                ref_logp, _ = token_logprobs(reference, pack, config.temperature)
            kl = kl_k3(logp, ref_logp)
            loss = loss + config.beta * aggregate(pack.padded(kl), mask, algorithm, *counts)
            sums["kl_ref"] += kl.sum().item()
        loss.backward()

        total += loss.item()
        sums["entropy"] += entropy.sum().item()
        tokens += len(logp)
        if len(logp):
            with torch.no_grad():
                r = importance_ratio(new, old, mask, algorithm)[mask]
            sign = a[:, None].expand_as(mask)[mask]
            sums["clipped_low"] += ((r < 1 - clips[0]) & (sign < 0)).sum().item()
            sums["clipped_high"] += ((r > 1 + clips[1]) & (sign > 0)).sum().item()
            sums["kl_old"] += kl_k3(logp.detach(), old_logp).sum().item()
            peaks["ratio_max"] = max(peaks["ratio_max"], r.max().item())
            peaks["ratio_min"] = min(peaks["ratio_min"], r.min().item())
            if on_policy:
                gap = (logp.detach() - known).abs().max().item()
                peaks["sampled_scored_gap"] = max(peaks["sampled_scored_gap"], gap)
    means = {name: (value, tokens) for name, value in sums.items()}
    return means | {"loss": (total, 1 / world_size() if num_sequences else 0)}, peaks
