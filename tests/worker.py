"""Run by torchrun from test_distributed.py: the same global work on however many ranks; rank 0 writes what came out.

worker.py OUT POLICY DATA     one policy update on fixed rollouts, the discriminator's judgement, sampling; as JSON
"""

import json
import sys
from types import SimpleNamespace

import torch

from data import Group, encode_prompts, encode_response, load_data, parse_response
from discriminator import Comparison, judge, load_discriminator
from model import (
    all_sum,
    full_state,
    generate,
    load_policy,
    optimizer_step,
    rank,
    setup,
    shard,
    world_size,
)
from rlvr import update_policy


def main(out: str, path: str, data: str) -> None:
    device = setup()
    result = {}
    policy, processor = load_policy("--ckpt", path)
    policy = shard(policy, device).train()
    examples = load_data(data)[:4]
    prompts = encode_prompts(processor, examples)
    without_image = encode_prompts(
        processor,
        [
            SimpleNamespace(
                index=50,
                where="text",
                images=[],
                messages=[{"role": "user", "content": [{"type": "text", "text": "No image."}]}],
            )
        ],
    )
    prompts[3] = without_image[
        0
    ]  # with several ranks, one has no image: the vision tower must not hang the others

    # Fixed rollouts: other rows' demonstrations, lengths unequal, old log-probabilities off the policy.
    texts = [e.response for e in load_data(data)[4:12]]
    groups = []
    for p, prompt in enumerate(prompts):
        branches = [
            encode_response(processor, text[: 20 + 9 * (p + i)])
            for i, text in enumerate(texts[2 * p : 2 * p + 2])
        ]
        groups.append(Group(prompt, branches, [torch.linspace(-2, -0.5, len(b)) for b in branches]))
    advantage = torch.linspace(-1, 1.5, 8)
    mine = list(range(4))[rank() :: world_size()]
    config = SimpleNamespace(max_tokens_per_pack=150, temperature=0.9, beta=0.0)
    for algorithm in ("grpo", "gspo"):
        update = update_policy(
            policy,
            [groups[i] for i in mine],
            advantage.view(4, 2)[mine].flatten(),
            processor,
            device,
            config,
            algorithm,
            0.2,
            0.2,
            3.0,
            on_policy=False,
        )
        result[f"{algorithm}_loss"] = float(all_sum([update.loss])[0])
        grads = {
            n: p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad
            for n, p in policy.named_parameters()
            if p.grad is not None
        }
        result[f"{algorithm}_grads"] = {n: float(g.double().norm()) for n, g in grads.items()}
        policy.zero_grad()

    # Sampling: ranks with different numbers of steps; every row as on one process.
    sampled = generate(policy, [prompts[i] for i in mine], 3, 40, seed=3, step=1)
    rows = torch.zeros(4, 3, 40)
    for i, group in zip(mine, sampled):
        for n, branch in enumerate(group.branches):
            rows[i, n, : len(branch)] = branch.float() + 1
    result["sampled"] = all_sum(rows.flatten()).tolist()

    # Training goes on after sampling: the weights are sharded again.
    update_policy(
        policy,
        [groups[i] for i in mine],
        advantage.view(4, 2)[mine].flatten(),
        processor,
        device,
        config,
        "grpo",
        0.2,
        0.2,
        3.0,
        on_policy=True,
    )
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-3)
    result["grad_norm"] = optimizer_step(policy, optimizer, 1e-3, 1.0)
    state = full_state(policy)
    if rank() == 0:
        result["weights"] = {n: float(w.double().norm()) for n, w in state.items()}

    # The discriminator: scores and gradients; the last prompt's only student is invalid.
    discriminator, _ = load_discriminator("--model", path)
    discriminator = shard(discriminator, device).eval()
    rows = load_data(data)
    students = [
        [parse_response(rows[4 + 3 * i + k].response) if i < 3 else None for k in range(3)]
        for i in range(4)
    ]
    comparisons = [
        Comparison(prompts[i], parse_response(examples[i].response), students[i]) for i in range(4)
    ]
    judged = judge(discriminator, [comparisons[i] for i in mine], processor, device, max_tokens=400)
    scores = torch.zeros(4, 3, 4, dtype=torch.float64)
    for k, i in enumerate(mine):
        scores[i] = torch.cat(
            [judged.teacher[3 * k : 3 * k + 3], judged.student[3 * k : 3 * k + 3]], 1
        ).nan_to_num(-99)
    result["scores"] = all_sum(scores.flatten()).tolist()
    result["d_loss"] = float(all_sum([judged.sums["discriminator_loss"][0]])[0])
    grads = [
        p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad
        for n, p in discriminator.named_parameters()
        if p.grad is not None and "gate.weight" not in n
    ]
    result["d_grad_norm"] = float(torch.stack([g.double().norm() for g in grads]).norm())
    if rank() == 0:
        with open(out, "w") as file:
            json.dump(result, file)


if __name__ == "__main__":
    main(*sys.argv[1:])
