"""Run by torchrun from test_distributed.py: the same global work on however many ranks; rank 0
writes what came out.

worker.py OUT POLICY DATA     one policy update on fixed rollouts, sampling, the discriminator's
                              judgement and its gradient; as JSON
"""

import json
import sys

import torch

from data import Group, encode_prompts, encode_response, parse_response, rank_packs
from discriminator import Comparison, judge, load_discriminator
from model import load_policy
from policy_gradient import Objective, policy_backward
from sampler import Sampling, generate
from support.loader import dealt
from support.optimizer import optimizer_step
from support.ranks import all_sum, join_ranks, rank, recompute, world_size
from support.rows import Example, load_data


def whole(tensors: dict) -> dict[str, torch.Tensor]:
    """The tensors over all ranks. Every rank calls it."""
    return {n: t.full_tensor() if hasattr(t, "full_tensor") else t for n, t in tensors.items()}


def whole_gradients(module) -> dict[str, torch.Tensor]:
    return whole({n: p.grad for n, p in module.named_parameters() if p.grad is not None})


def main(out: str, path: str, data: str) -> None:
    device = join_ranks()
    result = {}
    policy, processor = load_policy(path, device)
    policy.train()
    if rank() == 1:
        recompute(policy)  # ranks may differ in what they keep
    examples = load_data(data)[:4]
    prompts = encode_prompts(processor, examples)
    # With several ranks, one has no image: the vision tower must not hang the others.
    chat = [{"role": "user", "content": [{"type": "text", "text": "No image."}]}]
    (prompts[3],) = encode_prompts(processor, [Example(50, "text", chat, [])])

    # Fixed rollouts: other rows' demonstrations, lengths unequal, old log-probabilities off the
    # policy.
    texts = [e.response for e in load_data(data)[4:12]]
    groups = []
    for p, prompt in enumerate(prompts):
        branches = [
            encode_response(processor, text[: 20 + 9 * (p + i)])
            for i, text in enumerate(texts[2 * p : 2 * p + 2])
        ]
        groups.append(Group(prompt, branches, [torch.linspace(-2, -0.5, len(b)) for b in branches]))
    mine = list(range(4))[rank() :: world_size()]
    own = [groups[i] for i in mine]
    advantage = torch.linspace(-1, 1.5, 8).view(4, 2)[mine]

    # Dealt by length, every group is with one rank, and has all that it had.
    held = torch.zeros(4, 3, dtype=torch.float64)
    found = dealt(own, size=lambda group: group.num_tokens)
    assert found == sorted(found, key=lambda group: -group.num_tokens)
    for group in found:
        images = group.prompt.pixel_values
        parts = [0 if images is None else images.double().sum(), *map(torch.sum, group.branches)]
        held[[p.index for p in prompts].index(group.prompt.index)] = torch.stack(
            [torch.as_tensor(part, dtype=torch.float64) for part in parts]
        )
    result["dealt"] = all_sum(held.flatten()).tolist()

    packs = rank_packs(own, processor, 150)
    settings = dict(clip_low=0.2, clip_high=0.2, dual_clip=3.0, temperature=0.9)
    for algorithm in ("grpo", "gspo"):
        objective = Objective(algorithm, on_policy=False, **settings)
        metrics = policy_backward(policy, packs, own, advantage, objective)
        result[f"{algorithm}_loss"] = float(all_sum([metrics["loss"].value])[0])
        grads = whole_gradients(policy)
        result[f"{algorithm}_grads"] = {n: float(g.double().norm()) for n, g in grads.items()}
        policy.zero_grad()

    # Sampling: ranks with different numbers of steps; every row as on one process.
    sampled = generate(policy, [prompts[i] for i in mine], Sampling(3, 40, seed=3), step=1)
    rows = torch.zeros(4, 3, 40)
    for i, group in zip(mine, sampled):
        for n, branch in enumerate(group.branches):
            rows[i, n, : len(branch)] = branch.float() + 1
    result["sampled"] = all_sum(rows.flatten()).tolist()

    # Training goes on after sampling: the weights are sharded again.
    policy_backward(policy, packs, own, advantage, Objective("grpo", **settings))
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-3)
    result["grad_norm"] = optimizer_step(policy, optimizer, 1e-3, 1.0)
    state = whole(policy.state_dict())
    if rank() == 0:
        result["weights"] = {n: float(w.double().norm()) for n, w in state.items()}

    # The discriminator: scores and gradients; the last prompt's only students are invalid.
    discriminator, _ = load_discriminator(path, device=device)
    discriminator.eval()
    rows = load_data(data)
    students = [
        [parse_response(rows[4 + 3 * i + k].response) if i < 3 else None for k in range(3)]
        for i in range(4)
    ]
    comparisons = [
        Comparison(prompts[i], parse_response(examples[i].response), students[i]) for i in range(4)
    ]
    some = [comparisons[i] for i in mine]
    judged = judge(discriminator, some, processor, max_tokens=400, backward=True)
    four = torch.stack(
        [
            judged.teacher_perception,
            judged.teacher_reasoning,
            judged.perception,
            judged.reasoning,
        ],
        -1,
    ).double()
    assert four.shape == (len(mine), 3, 4) and (four[~judged.valid] == 0).all()
    scores = torch.zeros(4, 3, 4, dtype=torch.float64)
    scores[mine] = four.masked_fill(~judged.valid[..., None], -99)
    result["scores"] = all_sum(scores.flatten()).tolist()
    result["d_loss"] = float(all_sum([judged.metrics["discriminator_loss"].value])[0])
    grads = [g for n, g in whole_gradients(discriminator).items() if "gate.weight" not in n]
    result["d_grad_norm"] = float(torch.stack([g.double().norm() for g in grads]).norm())
    shares = {name: x for name, x in judged.metrics.items() if name.startswith("expert_share")}
    result["expert_shares"] = shares
    if rank() == 0:
        with open(out, "w") as file:
            json.dump(result, file)


if __name__ == "__main__":
    main(*sys.argv[1:])
