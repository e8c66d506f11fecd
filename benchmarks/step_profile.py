"""Where a demo step goes: seconds, arithmetic and share of the machine's peak, phase by phase, for stages 2 and 3.

One step on the digits, from a checkpoint of `make demo`: 16 prompts, 8 rollouts each, scored, updated. Arithmetic is what
torch's own counter sees (matrix products and attention); the peak is a 1024 x 1024 float32 product, measured in the same
run. Median of `--repeats` steps after a first one.

    python benchmarks/step_profile.py [--demo out/demo --repeats 5]
"""

import argparse
import math
import statistics
import sys
import time
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data import decode, encode_prompts, load_data, parse_response

import torch
from torch.utils.flop_counter import FlopCounterMode

import digits
from discriminator import Comparison, judge, load_discriminator
from model import generate, load_policy, optimizer_step
from rlvr import group_advantage, update_policy, verify

CPU = torch.device("cpu")
# What the counter does not know: model.packed's products, of x (..., in) and a weight (out, in).
ONEDNN = {
    torch.ops.mkldnn._linear_pointwise: lambda x, weight, *_, **__: 2 * math.prod(x) * weight[0]
}


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
    settings = digits.SETTINGS["rlvr"]
    policy, processor = load_policy("--demo", f"{args.demo}/sft")
    discriminator, _ = load_discriminator("--demo", f"{args.demo}/discriminator")
    examples = load_data(digits.build()["prompts"])
    config = SimpleNamespace(max_tokens_per_pack=16384, temperature=1.0, beta=0.0)
    optimizers = [
        torch.optim.AdamW(model.parameters(), lr=1e-6) for model in (policy, discriminator)
    ]
    n, batch = settings["num_generations"], settings["per_device_train_batch_size"]
    state = {}

    def data(step):
        state["rows"] = examples[batch * step : batch * (step + 1)]
        state["prompts"] = encode_prompts(processor, state["rows"])

    def rollout(step):
        state["groups"] = generate(
            policy, state["prompts"], n, settings["max_completion_length"], step=step
        )
        state["tokens"] = sum(len(b) for g in state["groups"] for b in g.branches)

    def reward(step):
        parsed = [
            [parse_response(decode(processor, b)) for b in g.branches] for g in state["groups"]
        ]
        right = [
            [float(p is not None and verify(p.answer, row.answer)) for p in some]
            for row, some in zip(state["rows"], parsed)
        ]
        state["advantage"] = group_advantage(torch.tensor(right)).flatten()
        state["comparisons"] = [
            Comparison(prompt, parse_response(row.response), some)
            for prompt, row, some in zip(state["prompts"], state["rows"], parsed)
        ]

    def judging(step):
        judge(discriminator, state["comparisons"], processor, CPU, config.max_tokens_per_pack)
        optimizer_step(discriminator, optimizers[1], 1e-6, 1.0)

    def update(step):
        update_policy(
            policy,
            state["groups"],
            state["advantage"],
            processor,
            CPU,
            config,
            "grpo",
            0.2,
            0.2,
            None,
            on_policy=True,
        )
        optimizer_step(policy, optimizers[0], 1e-6, 1.0)

    phases = {
        "data (in a thread)": data,
        "rollout": rollout,
        "reward (stage 3)": reward,
        "judge (stage 2)": judging,
        "update": update,
    }
    seconds, work, tokens = {name: [] for name in phases}, dict.fromkeys(phases, 0), []
    policy.train(), discriminator.train()
    for step in range(args.repeats + 1):
        for name, run in phases.items():
            if step == 0:  # the first warms up and is counted, not timed
                with FlopCounterMode(display=False, custom_mapping=ONEDNN) as counter:
                    run(step)
                work[name] = counter.get_total_flops() / 1e9
            else:
                start = time.perf_counter()
                run(step)
                seconds[name].append(time.perf_counter() - start)
        tokens.append(state["tokens"])
    speed = peak()
    print(
        f"{batch} prompts x {n} rollouts, {statistics.median(tokens):.0f} tokens sampled; {torch.get_num_threads()} threads, "
        f"peak {speed:.0f} GFLOP/s"
    )
    print("| phase | seconds | GFLOP | share of peak |\n|---|---|---|---|")
    for name, some in seconds.items():
        took = statistics.median(some)
        print(f"| {name} | {took:.3f} | {work[name]:.1f} | {work[name] / took / speed:.2f} |")


if __name__ == "__main__":
    main()
