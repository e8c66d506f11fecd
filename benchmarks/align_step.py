"""A whole alignment step: ours against the straightforward way.

One prompt of 302 tokens, 196 of them an image's, and 16 rollouts. A step is: sample the rollouts, score both views of each
and of the supervision response, discriminator's step, advantages, policy's step. The straightforward way, the release's,
samples with Hugging Face `generate` and inputs repeated 16 times, scores one view of one sample per forward with the image
encoded in each, and updates the policy on padded rows with full logits, the image encoded for each row.

Policy and discriminator are a random Qwen3-VL (float32, CPU) and its upcycling to 4 experts. Some of the policy's tokens end a
response, so that lengths are ragged, about 100 on average, at most 256. What a random policy says has no format, so both sides
score the same made-up responses in its place, of about 42 (caption) and 60 tokens. The sides take turns; each part's share is
shown. That the parts compute the same is checked in views.py, policy_update.py and the tests.

    python benchmarks/align_step.py [--hidden_size 256 --layers 4 --repeats 5]
"""
import copy
import os
import sys
import tempfile
import time
from types import SimpleNamespace

os.environ.setdefault("GOMP_SPINCOUNT", "1000")
sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

from rollout import arguments, ratio
from views import ROLLOUTS, build, make_comparison, one_by_one, pairs_of

import torch
from transformers import AutoModelForImageTextToText

from align import alignment_advantage
from discriminator import discriminator_loss, judge
from model import generate, load_policy, optimizer_step
from rlvr import policy_loss, update_policy

LIMIT, MEAN = 256, 100


class Clock:
    """Seconds of each part of a step, one after the other."""

    def __init__(self):
        self.last, self.parts = time.perf_counter(), {}

    def __call__(self, part: str):
        now = time.perf_counter()
        self.parts[part], self.last = now - self.last, now


def main() -> None:
    args = arguments()
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "model")
        discriminator, processor = build(path, args)
        comparison = make_comparison(processor)
        policy, _ = load_policy("--ckpt", path)
        plain_policy = AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32)
    ends = list(range(300, 300 + round(policy.config.text_config.vocab_size / MEAN)))
    policy.ends = torch.tensor(ends)
    judges = {"ours": discriminator.train(), "straightforward": copy.deepcopy(discriminator).train()}
    judges["straightforward"].model.set_attn_implementation({"text_config": "sdpa", "vision_config": "sdpa"})
    policies = {"ours": policy.train(), "straightforward": plain_policy.train()}
    steppers = {name: [torch.optim.AdamW(m.parameters(), lr=1e-6) for m in (policies[name], judges[name])] for name in policies}
    config = SimpleNamespace(max_tokens_per_pack=16384, temperature=1.0)
    prompt, valid = comparison.prompt, torch.ones(1, ROLLOUTS, dtype=torch.bool)

    def ours(step: int, clock: Clock) -> int:
        groups = generate(policy, [prompt], ROLLOUTS, LIMIT, step=step)
        clock("rollout")
        judged = judge(judges["ours"], [comparison], processor, torch.device("cpu"), config.max_tokens_per_pack)
        optimizer_step(judges["ours"], steppers["ours"][1], 1e-6, 1.0)
        clock("judge")
        advantage = alignment_advantage(judged.student[None, :, 0], judged.student[None, :, 1], valid)
        update_policy(policy, groups, advantage.flatten(), processor, torch.device("cpu"), config, "grpo", 0.2, 0.2, None,
                      on_policy=True)
        optimizer_step(policy, steppers["ours"][0], 1e-6, 1.0)
        clock("update")
        return sum(map(len, groups[0].branches))

    def straightforward(step: int, clock: Clock) -> int:
        torch.manual_seed(step)
        ids = prompt.input_ids.expand(ROLLOUTS, -1)
        images = dict(pixel_values=prompt.pixel_values.repeat(ROLLOUTS, 1),
                      image_grid_thw=prompt.image_grid_thw.repeat(ROLLOUTS, 1))
        kinds = (ids == processor.image_token_id).int()
        plain_policy.eval()
        with torch.no_grad():
            out = plain_policy.generate(input_ids=ids, attention_mask=torch.ones_like(ids), mm_token_type_ids=kinds, **images,
                                        do_sample=True, top_k=0, top_p=1.0, max_new_tokens=LIMIT, eos_token_id=ends,
                                        pad_token_id=processor.tokenizer.pad_token_id,
                                        suppress_tokens=policy.forbidden.tolist())
        plain_policy.train()
        rows = out[:, ids.shape[1]:]
        stop = torch.isin(rows, torch.tensor(ends)).int()
        real = stop.cumsum(1) - stop == 0
        clock("rollout")

        scores = one_by_one(judges["straightforward"], comparison, processor)
        discriminator_loss(pairs_of(scores), ROLLOUTS).backward()
        optimizer_step(judges["straightforward"], steppers["straightforward"][1], 1e-6, 1.0)
        clock("judge")

        student = scores.detach()[None, 1:]
        advantage = alignment_advantage(student[..., 0], student[..., 1], valid).flatten()
        mask = torch.cat([torch.ones_like(ids), real.long()], 1)
        kinds = torch.cat([kinds, torch.zeros_like(rows, dtype=torch.int)], 1)
        logits = plain_policy(input_ids=out, attention_mask=mask, mm_token_type_ids=kinds, **images, use_cache=False,
                              logits_to_keep=rows.shape[1] + 1).logits[:, :-1]
        logp = logits.index_fill(2, policy.forbidden, -torch.inf).log_softmax(-1).gather(2, rows[..., None])[..., 0]
        logp = torch.where(real, logp, 0.0)
        policy_loss(logp, logp.detach(), advantage, real, "grpo", 0.2, 0.2, None).backward()
        optimizer_step(plain_policy, steppers["straightforward"][0], 1e-6, 1.0)
        clock("update")
        return int(real.sum())

    seconds = {"ours": [], "straightforward": []}
    for repeat in range(args.repeats + 1):  # the first warms up
        for name, run in (("ours", ours), ("straightforward", straightforward)):
            clock = Clock()
            tokens = run(repeat, clock)
            if repeat:
                seconds[name].append(sum(clock.parts.values()))
                parts = ", ".join(f"{part} {value:.2f}" for part, value in clock.parts.items())
                print(f"{name:15s} {seconds[name][-1]:6.2f} s ({parts}), {tokens} tokens sampled", flush=True)
    print("ratio", ratio(*seconds.values()))


if __name__ == "__main__":
    main()
