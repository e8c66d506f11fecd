"""Log-probabilities over a large vocabulary, forward and backward: `model.LogProbs` against full
logits.

8,192 positions, 151,936 tokens, bfloat16, as many values of hidden state as asked for. Each side
runs in a process of its own. It reports its seconds, and by how much its memory rose above weights
and inputs at the highest, the gradients of both (which either side must hold) included. Full
logits: one matrix product, float32, log_softmax, gather, and torch's own backward. Before, both
are compared on fewer positions in float32. The sides alternate. The last line is the ratio of the
peaks.

A CPU without bfloat16 arithmetic takes more than ten minutes a pass (with it, a minute and a half).
--dtype float32 is for such a CPU.

    python benchmarks/logprob_memory.py [--hidden_size 1024 --positions 8192 --vocabulary 151936]
                                        [--dtype bfloat16 --repeats 3]
"""

import argparse
import json
import subprocess
import sys
import time

import torch
from rollout import ratio

from model import LogProbs
from support.fit import LOGIT_ROWS

NONE = torch.zeros(0, dtype=torch.long)


def chunked(hidden, weight, targets):
    return LogProbs.apply(
        hidden, weight, torch.arange(len(targets)), targets, 1.0, NONE, LOGIT_ROWS
    )[0]


def full(hidden, weight, targets):
    return (hidden @ weight.T).float().log_softmax(-1).gather(1, targets[:, None])[:, 0]


SIDES = {"chunked": chunked, "full logits": full}


def inputs(args, positions: int, dtype):
    generator = torch.Generator().manual_seed(0)
    hidden = (
        torch.randn(positions, args.hidden_size, generator=generator).to(dtype).requires_grad_()
    )
    weight = torch.empty(args.vocabulary, args.hidden_size, dtype=dtype)
    weight.normal_(0, args.hidden_size**-0.5, generator=generator)
    return (
        hidden,
        weight.requires_grad_(),
        torch.randint(args.vocabulary, (positions,), generator=generator),
    )


def memory(name: str) -> float:
    """VmRSS or VmHWM (its highest value so far) of this process, in MB."""
    lines = (line.split() for line in open("/proc/self/status"))
    return next(int(words[1]) for words in lines if words[0] == name + ":") / 1024


def one_side(name: str, args) -> None:
    """In a process of its own: the seconds and the memory of one pass."""
    hidden, weight, targets = inputs(args, args.positions, getattr(torch, args.dtype))
    before = memory("VmRSS")
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the highest value starts again from here
    start = time.perf_counter()
    SIDES[name](hidden, weight, targets).mean().backward()
    seconds = time.perf_counter() - start
    print(json.dumps({"seconds": seconds, "megabytes": memory("VmHWM") - before}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hidden_size", type=int, default=1024)
    parser.add_argument("--positions", type=int, default=8192)
    parser.add_argument("--vocabulary", type=int, default=151936)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--side", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        return one_side(args.side, args)

    values = {}
    for name, side in SIDES.items():
        hidden, weight, targets = inputs(args, 300, torch.float32)
        out = side(hidden, weight, targets)
        out.mean().backward()
        values[name] = out.detach(), hidden.grad, weight.grad
    for a, b in zip(*values.values()):
        torch.testing.assert_close(a, b, atol=1e-5 * float(b.abs().max()), rtol=1e-5)
    del values, hidden, weight, out

    sides = {name: [] for name in SIDES}
    for _ in range(args.repeats):
        for name, results in sides.items():
            done = subprocess.run(
                [sys.executable, *sys.argv, "--side", name],
                check=True,
                stdout=subprocess.PIPE,
                text=True,
            )
            results.append(json.loads(done.stdout))
            print(
                f"{name:12s} {results[-1]['megabytes']:7.0f} MB, {results[-1]['seconds']:6.1f} s",
                flush=True,
            )
    ours, theirs = (
        {key: [r[key] for r in some] for key in ("seconds", "megabytes")} for some in sides.values()
    )
    print("time, chunked over full:", ratio(theirs["seconds"], ours["seconds"]))
    print("ratio", ratio(ours["megabytes"], theirs["megabytes"]), "  memory, full over chunked")


if __name__ == "__main__":
    main()
