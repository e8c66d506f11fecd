"""A whole alignment step: ours against the straightforward way.

4 prompts, the paper's batch, of 302 tokens, 196 of them an image's, and 16 rollouts each. A step
is: sample the rollouts, score both views of each and of the supervision response, discriminator's
step, advantages, policy's step. The straightforward way, the release's, samples with Hugging Face
`generate` and inputs repeated 16 times, scores one view of one sample per forward with the image
encoded in each, and updates the policy on padded rows with full logits, the image encoded for each
row.

Policy and discriminator are a random Qwen3-VL (float32, CPU) and its upcycling to 4 experts. Some
of the policy's tokens end a response, so that lengths are ragged, about 90 on average, at most 256.
Transformers' rows are stopped where ours ended. What a random policy says has no format, so both
sides score the same made-up responses in its place, of about 42 (caption) and 60 tokens. The sides
take turns. Each part's share is shown. That the parts compute the same is checked in views.py,
policy_update.py and the tests.

    python benchmarks/align_step.py [--hidden_size 256 --layers 4 --repeats 3]
"""

import copy
import os
import tempfile
import time

import torch
import torch.nn.functional as F
from rollout import arguments, ratio, repeated
from transformers import AutoModelForImageTextToText
from views import ROLLOUTS, build, make_comparison, one_by_one, pairs_of, set_up

from align import AlignConfig, alignment_advantage
from data import rank_packs
from discriminator import discriminator_loss, judge
from model import load_policy
from policy_gradient import Objective, policy_backward, policy_loss
from sampler import Sampling, generate
from support.optimizer import optimizer_step

PROMPTS, LIMIT = 4, 256
# Of the vocabulary ends a response. With these weights that makes responses of about 92 tokens.
ENDS = 1 / 75


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
        comparisons = [make_comparison(processor, seed) for seed in range(PROMPTS)]
        policy, _ = load_policy(path)
        plain_policy = AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32)
    ends = list(range(300, 300 + round(policy.config.text_config.vocab_size * ENDS)))
    policy.stop_ids = torch.tensor(ends)
    judges = {
        "ours": discriminator.train(),
        "straightforward": copy.deepcopy(discriminator).train(),
    }
    set_up(judges["straightforward"].model, ours=False)
    policies = {"ours": policy.train(), "straightforward": plain_policy.train()}
    steppers = {
        name: [torch.optim.AdamW(m.parameters(), lr=1e-6) for m in (policies[name], judges[name])]
        for name in policies
    }
    config = AlignConfig()
    clips = config.epsilon, config.epsilon, 0.0
    objective = Objective("grpo", *clips)
    prompts = [comparison.prompt for comparison in comparisons]
    valid = torch.ones(PROMPTS, ROLLOUTS, dtype=torch.bool)

    def ours(step: int, clock: Clock) -> torch.Tensor:
        """The lengths of what was sampled."""
        groups = generate(policy, prompts, Sampling(ROLLOUTS, LIMIT), step=step)
        clock("rollout")
        budget = config.max_tokens_per_pack
        judged = judge(judges["ours"], comparisons, processor, budget, backward=True)
        optimizer_step(judges["ours"], steppers["ours"][1], 1e-6, 1.0)
        clock("judge")
        scores = judged.perception, judged.reasoning
        advantage = alignment_advantage(*scores, judged.valid)
        packs = rank_packs(groups, processor, budget)
        policy_backward(policy, packs, groups, advantage, objective)
        optimizer_step(policy, steppers["ours"][0], 1e-6, 1.0)
        clock("update")
        return torch.tensor([len(branch) for group in groups for branch in group.branches])

    def straightforward(step: int, clock: Clock, lengths: torch.Tensor) -> None:
        torch.manual_seed(step)
        inputs = repeated(prompts, ROLLOUTS, processor.image_token_id)
        start = inputs["input_ids"].shape[1]
        plain_policy.eval()
        with torch.no_grad():
            out = plain_policy.generate(
                **inputs,
                do_sample=True,
                top_k=0,
                top_p=1.0,
                max_new_tokens=LIMIT,
                eos_token_id=None,
                pad_token_id=processor.tokenizer.pad_token_id,
                suppress_tokens=policy.forbidden.tolist(),
                stopping_criteria=[lambda out, scores: out.shape[1] - start >= lengths],
            )
        plain_policy.train()
        rows = out[:, start:]
        real = torch.arange(rows.shape[1]) < lengths[:, None]
        clock("rollout")

        students = []
        for comparison in comparisons:
            scores = one_by_one(judges["straightforward"], comparison, processor)
            discriminator_loss(pairs_of(scores), PROMPTS * ROLLOUTS).backward()
            students.append(scores.detach()[1:])
        optimizer_step(judges["straightforward"], steppers["straightforward"][1], 1e-6, 1.0)
        clock("judge")

        advantage = alignment_advantage(*torch.stack(students).permute(2, 0, 1), valid).flatten()
        inputs = inputs | dict(
            input_ids=out,
            attention_mask=torch.cat([inputs["attention_mask"], real.long()], 1),
            mm_token_type_ids=F.pad(inputs["mm_token_type_ids"], (0, rows.shape[1])),
        )
        logits = plain_policy(**inputs, use_cache=False, logits_to_keep=rows.shape[1] + 1).logits
        logits = logits[:, :-1].index_fill(2, policy.forbidden, -torch.inf)
        logp = logits.log_softmax(-1).gather(2, rows[..., None])[..., 0]
        logp = torch.where(real, logp, 0.0)
        policy_loss(logp, logp.detach(), advantage, real, "grpo", *clips).backward()
        optimizer_step(plain_policy, steppers["straightforward"][0], 1e-6, 1.0)
        clock("update")

    seconds = {"ours": [], "straightforward": []}
    for repeat in range(args.repeats + 1):  # the first warms up
        lengths = ours(repeat, mine := Clock())
        straightforward(repeat, theirs := Clock(), lengths)
        for name, clock in zip(seconds, (mine, theirs)) if repeat else ():
            seconds[name].append(sum(clock.parts.values()))
            parts = ", ".join(f"{part} {value:.2f}" for part, value in clock.parts.items())
            took, tokens = seconds[name][-1], int(lengths.sum())
            print(f"{name:15s} {took:6.2f} s ({parts}), {tokens} tokens sampled", flush=True)
    print("ratio", ratio(*seconds.values()))


if __name__ == "__main__":
    main()
