"""Where a demo step goes: seconds, arithmetic and share of the machine's peak, phase by phase, for
stages 2 and 3.

One step on the digits, from a checkpoint of `make demo`: 16 prompts, 8 rollouts each, scored,
updated. Arithmetic is what torch's own counter sees (matrix products and attention). The peak is a
1024 x 1024 float32 product, measured in the same run. Median of `--repeats` steps after a first
one.

    python benchmarks/step_profile.py [--demo out/demo --repeats 5]
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data import decode, encode_prompts, parse_response, rank_packs
from discriminator import Comparison, judge, load_discriminator
from model import load_policy
from policy_gradient import Objective, group_advantage, policy_backward
from rlvr import RLVRConfig, reward, settle_algorithm
from sampler import Sampling, generate
from support import digits
from support.optimizer import optimizer_step
from support.rows import load_data


def peak() -> float:
    """The machine's float32 arithmetic in GFLOP/s."""
    a, b = torch.randn(2, 1024, 1024)
    seconds = []
    for _ in range(20):
        start = time.perf_counter()
        a @ b
        seconds.append(time.perf_counter() - start)
    return 2 * 1024**3 / statistics.median(seconds) / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--demo", default="out/demo")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    config = RLVRConfig(**digits.SETTINGS["rlvr"])
    settle_algorithm(config)
    clips = config.epsilon, config.epsilon_high, config.dual_clip
    objective = Objective(config.algorithm, *clips)
    policy, processor = load_policy(f"{args.demo}/sft")
    discriminator, _ = load_discriminator(f"{args.demo}/discriminator")
    examples = load_data(digits.build()["prompts"])
    optimizers = {
        model: torch.optim.AdamW(model.parameters(), lr=1e-6) for model in (policy, discriminator)
    }
    n, batch = config.num_generations, config.prompts_per_step
    state = {}

    def data(step):
        state["rows"] = examples[batch * step : batch * (step + 1)]
        state["prompts"] = encode_prompts(processor, state["rows"])

    def rollout(step):
        limit = config.max_completion_length
        groups = state["groups"] = generate(policy, state["prompts"], Sampling(n, limit), step=step)
        ends = policy.stop_ids
        state["texts"] = [[decode(processor, b, ends) for b in group.branches] for group in groups]
        state["tokens"] = sum(len(b) for group in groups for b in group.branches)

    def rewarding(step):
        pairs = zip(state["rows"], state["texts"])
        rewards = [[reward(text, row.answer)[0] for text in texts] for row, texts in pairs]
        state["advantage"] = group_advantage(torch.tensor(rewards))

    def judging(step):
        triples = zip(state["prompts"], state["rows"], state["texts"])
        comparisons = [
            Comparison(prompt, parse_response(row.response), [parse_response(t) for t in texts])
            for prompt, row, texts in triples
        ]
        judge(discriminator, comparisons, processor, config.max_tokens_per_pack, backward=True)
        optimizer_step(discriminator, optimizers[discriminator], 1e-6, 1.0)

    def update(step):
        packs = rank_packs(state["groups"], processor, config.max_tokens_per_pack)
        policy_backward(policy, packs, state["groups"], state["advantage"], objective)
        optimizer_step(policy, optimizers[policy], 1e-6, 1.0)

    phases = {
        "data": data,
        "rollout": rollout,
        "reward (stage 3)": rewarding,
        "judge (stage 2)": judging,
        "update": update,
    }
    seconds, work, tokens = {name: [] for name in phases}, dict.fromkeys(phases, 0), []
    policy.train(), discriminator.train()
    for step in range(args.repeats + 1):
        for name, run in phases.items():
            if step == 0:  # the first warms up and is counted, not timed
                with FlopCounterMode(display=False) as counter:
                    run(step)
                work[name] = counter.get_total_flops() / 1e9
            else:
                start = time.perf_counter()
                run(step)
                seconds[name].append(time.perf_counter() - start)
        tokens.append(state["tokens"])
    speed = peak()
    print(
        f"{batch} prompts x {n} rollouts, {statistics.median(tokens):.0f} tokens sampled; "
        f"{torch.get_num_threads()} threads, peak {speed:.0f} GFLOP/s"
    )
    print("| phase | seconds | GFLOP | share of peak |\n|---|---|---|---|")
    for name, some in seconds.items():
        took = statistics.median(some)
        print(f"| {name} | {took:.3f} | {work[name]:.1f} | {work[name] / took / speed:.2f} |")


if __name__ == "__main__":
    main()
