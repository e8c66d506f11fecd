"""The policy's forward and backward over a group: one pack (a prompt and its branches) against
padded rows.

16 branches of a prompt with an image. Padded rows are the usual way: prompt and branch in each row,
the image encoded for each, right padding, transformers' own sdpa attention and full logits.
Log-probabilities and gradients of both sides are compared in float64 before anything is timed, in
float32. They alternate. The last line is the smallest of ratio over goal.

    python benchmarks/policy_update.py [--hidden_size 256 --layers 4]
"""

import statistics
import time

import torch
from rollout import IMAGE, arguments, build, prompt, ratio, repeated

from data import Group, make_packs
from model import token_logprobs

# Prompt tokens, mean branch tokens, the ratio to be reached.
CASES = [(302, 92, 4.0), (1070, 101, 8.0), (302, 423, 2.0)]


def main() -> None:
    args = arguments()
    ours, theirs = build(args.hidden_size, args.layers)
    results = []
    for prompt_tokens, mean, goal in CASES:
        one = prompt(0, prompt_tokens, side=14 if prompt_tokens < 1000 else 30)
        generator = torch.Generator().manual_seed(1)
        lengths = (mean * torch.linspace(0.6, 1.4, 16)).long()
        branches = [torch.randint(10, 2048, (int(n),), generator=generator) for n in lengths]
        longest = int(lengths.max())

        def packed():
            pack = make_packs([Group(one, branches)])[0]
            logp, _ = token_logprobs(ours, pack)
            logp.mean().backward()
            return pack.padded(logp.detach())

        def padded():
            inputs = repeated([one], 16)
            rows = torch.zeros(16, longest, dtype=torch.long)
            real = torch.arange(longest) < lengths[:, None]
            rows[real] = torch.cat(branches)
            ids = torch.cat([inputs["input_ids"], rows], 1)
            inputs |= dict(
                input_ids=ids,
                mm_token_type_ids=(ids == IMAGE).int(),
                attention_mask=torch.cat([inputs["attention_mask"], real.long()], 1),
            )
            logits = theirs(**inputs, use_cache=False, logits_to_keep=longest + 1).logits[:, :-1]
            logits = logits.index_fill(2, ours.forbidden, -torch.inf)
            logp = logits.log_softmax(-1).gather(2, rows[..., None])[..., 0]
            logp = torch.where(real, logp, 0)
            (logp.sum() / real.sum()).backward()
            return logp.detach()

        # The same values and gradients, in float64: in float32 the sums over 16 images differ in
        # the fourth digit. Norms and rotations stay in float32 inside, and round there. This is
        # also each side's first, unmeasured turn.
        for model in (ours, theirs):
            model.zero_grad()
            model.double()
        one.pixel_values = one.pixel_values.double()
        torch.testing.assert_close(packed(), padded(), atol=1e-6, rtol=0)
        for (name, p), q in zip(ours.named_parameters(), theirs.parameters()):
            if q.grad is not None:
                assert (p.grad - q.grad).norm() <= 1e-5 * q.grad.norm(), name
        for model in (ours, theirs):
            model.zero_grad()
            model.float()
        one.pixel_values = one.pixel_values.float()
        seconds = {"packed": [], "padded": []}
        for _ in range(args.repeats):
            for name, run in (("packed", packed), ("padded", padded)):
                ours.zero_grad()
                theirs.zero_grad()
                start = time.perf_counter()
                run()
                seconds[name].append(time.perf_counter() - start)
        median = {name: statistics.median(values) for name, values in seconds.items()}
        results.append((statistics.median(q / p for p, q in zip(*seconds.values())), goal))
        print(
            f"{prompt_tokens} + {mean} tokens: packed {median['packed']:.2f} s, "
            f"padded {median['padded']:.2f} s, to be reached {goal}, "
            f"ratio {ratio(*seconds.values())}",
            flush=True,
        )
    print(f"ratio {min(r / goal for r, goal in results):.2f}   (smallest of ratio / goal)")


if __name__ == "__main__":
    main()
