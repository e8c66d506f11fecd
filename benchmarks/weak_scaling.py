"""Weak scaling of stage 3: rlvr.py with the same work per rank on 1 and on 2 gloo ranks, one core
each.

Model and prompts are those of grpo_step.py: 4 prompts of about 300 tokens a rank, 16 rollouts each.
One thread a rank, and as many cores as ranks. So that every rank has the same work, next to no
token ends a response: they run to a limit of 80. Compared are tokens per second and rank, the
median of a turn's steps after the first. Between the two stands a control, two runs of one rank
that know nothing of each other: what they lose is what two cores of this machine take from each
other (caches, memory, clock), and what two ranks lose beyond that is what FSDP costs. The last line
is what a rank of two does over what one alone does. 1 is ideal.

    python benchmarks/weak_scaling.py [--hidden_size 256 --layers 4 --repeats 3]
"""

import os
import statistics
import tempfile
from concurrent.futures import ThreadPoolExecutor

from grpo_step import build, ours
from rollout import arguments, ratio


def main() -> None:
    args = arguments()
    cores = sorted(os.sched_getaffinity(0))
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory() as folder:
        model, data = build(folder, args.hidden_size, args.layers, ends=0)

        def run(name: str, ranks: int, cores: list[int]) -> list[dict]:
            # Of this thread; the processes that it starts inherit it.
            os.sched_setaffinity(0, cores)
            return ours(model, data, os.path.join(folder, name), ranks, steps=8, limit=80)

        def turn(name: str, ranks: int, places: list[list[int]]) -> float:
            """Tokens per second and rank."""
            with ThreadPoolExecutor(len(places)) as pool:
                steps = sum(
                    pool.map(lambda some: run(f"{name} {some[0]}", ranks, some), places), []
                )
            phases = ", ".join(
                f"{key} {statistics.median(step[f'time/{key}'] for step in steps):.2f} s"
                for key in ("step", "rollout", "update")
            )
            speed = statistics.median(step["tokens_per_second"] for step in steps) / ranks
            print(f"{name}: {speed:.0f} tokens per second and rank ({phases})", flush=True)
            return speed

        alone, beside, two = [], [], []
        for repeat in range(args.repeats):
            alone.append(turn(f"{repeat} one rank", 1, [cores[:1]]))
            beside.append(turn(f"{repeat} two runs of one rank", 1, [cores[:1], cores[1:2]]))
            two.append(turn(f"{repeat} two ranks", 2, [cores[:2]]))
    print("two ranks over two separate runs", ratio(beside, two))
    print("ratio", ratio(alone, two))


if __name__ == "__main__":
    main()
