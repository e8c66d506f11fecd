"""Weak scaling of stage 3: rlvr.py with the same work per rank on 1 and on 2 gloo ranks, one core each.

Model, prompts and lengths are those of grpo_step.py: 4 prompts of about 300 tokens a rank, 16 rollouts each. The two take
turns, each in processes of their own, pinned to as many cores as there are ranks, one thread a rank; a turn's seconds are the
median of its steps after the first. The ratio is the seconds of one rank over those of two: 1 is ideal.

    python benchmarks/weak_scaling.py [--hidden_size 256 --layers 4 --repeats 3]
"""
import os
import statistics
import tempfile

from grpo_step import build, ours
from rollout import arguments, ratio


def main() -> None:
    args = arguments()
    cores = sorted(os.sched_getaffinity(0))
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory() as folder:
        model, data = build(folder, args.hidden_size, args.layers, 92)
        seconds = {1: [], 2: []}
        for repeat in range(args.repeats):
            for ranks, some in seconds.items():
                os.sched_setaffinity(0, cores[:ranks])  # the processes that are started inherit it
                steps = ours(model, data, os.path.join(folder, f"{ranks} {repeat}"), ranks)
                some.append(statistics.median(step["time/step"] for step in steps))
                phases = ", ".join(f"{name} {statistics.median(step[f'time/{name}'] for step in steps):.2f}"
                                   for name in ("rollout", "reward", "update"))
                print(f"{ranks} rank{'s' * (ranks > 1)}: {some[-1]:.2f} s a step ({phases})", flush=True)
    print("ratio", ratio(seconds[2], seconds[1]))


if __name__ == "__main__":
    main()
