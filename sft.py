"""Stage 1, supervised fine-tuning: next-token cross-entropy on demonstrations (PRISM, SFT).

    (1)  L(theta) = - 1/M * sum_i sum_t log pi_theta(y_i,t | x_i, y_i,<t)

M is the number of response tokens in the global batch, over all ranks and packs, so the loss does
not depend on how the batch was cut. The loss counts the response and its end of sequence, never
the prompt. A demonstration is a prompt with one branch (data.py); many of them stand in one pack,
without padding.

Deviations from the published run:
D6  A row that is too long is left out whole, counted and named; the published run cuts sequences
    at 8192 tokens. Nothing is ever cut in the other stages either.

    torchrun --nproc_per_node=8 sft.py --model Qwen/Qwen3-VL-4B-Instruct --output_dir sft_out
    python sft.py                                                   the embedded world of digits
"""

import math
from dataclasses import dataclass, field
from functools import partial

import torch

from checkpoint import load_policy, save_policy
from data import Group, encode_response, make_packs
from model import all_max, all_sum, even_packs, learning_rate_at, optimizer_step
from model import token_logprobs, world_size
from rows import Unfit, load_data
from run import Count, Positive, Run, RunConfig, Schedule, Weight, main


@dataclass
class SFTConfig(RunConfig):
    model: str = "Qwen/Qwen3-VL-4B-Instruct"  # a Hugging Face directory or hub id; paper: 4B, 8B
    data: list[str] = field(  # files or hub ids, one after the other; paper: 1.26M + 113K rows
        default_factory=lambda: ["prism-vlm/gemini_public_mmr1", "prism-vlm/gemini_distill"]
    )
    output_dir: str = "out/sft"
    system_prompt: str | None = None  # of rows without one; later stages have data.SYSTEM_PROMPT
    learning_rate: Weight = 1e-5  # paper: 1e-5
    lr_scheduler_type: Schedule = "cosine"  # paper: cosine
    warmup_steps: Weight = 0.1  # paper: 0.1 of the run; from 1 on, a number of steps
    weight_decay: Weight = 0.0  # not stated
    num_train_epochs: Positive = 1.0  # paper: 1
    max_steps: int = -1  # where positive, in place of the epochs
    per_device_train_batch_size: Count = 2  # paper: 2
    gradient_accumulation_steps: Count = 1  # not stated; multiplies the batch
    max_grad_norm: Positive = 1.0  # not stated
    max_length: Count = 8192  # paper: 8192; longer rows are left out, not cut (D6)
    save_steps: Count = 5000  # 17 times in the published run


def sft_loss(logp: torch.Tensor, num_tokens: float) -> torch.Tensor:
    """(1), cross-entropy. logp (K,): log-probabilities of response tokens; num_tokens: M of the
    global batch. -> scalar."""
    return -logp.sum() / num_tokens


def train() -> None:
    run = Run(SFTConfig)
    config = run.config
    examples = load_data(config.data, ("response",), config.system_prompt, config.image_dir)
    policy, processor = load_policy("--model", config.model, run.device, config)
    policy.train()
    decay = config.weight_decay
    optimizer = torch.optim.AdamW(policy.parameters(), weight_decay=decay, fused=True)

    def encode(example, prompt) -> Group:
        """A demonstration as a prompt with one branch."""
        response = encode_response(processor, example.response)
        length = len(prompt.input_ids) + len(response)
        if length > config.max_length:
            raise Unfit(f"{length} tokens are more than --max_length {config.max_length}")
        return Group(prompt, [response])

    batch_size = config.per_device_train_batch_size * config.gradient_accumulation_steps
    batch_size *= world_size()
    total = math.ceil(len(examples) * config.num_train_epochs) if config.max_steps <= 0 else None
    max_steps = config.max_steps if config.max_steps > 0 else math.ceil(total / batch_size)
    stream = run.batches(examples, processor, encode, batch_size, total)
    modules = {"policy": (policy, optimizer)}

    for step in run.steps(max_steps, modules, partial(save_policy, policy, processor)):
        # A batch of demonstrations (x, y), cut into packs: the longest first leave least room.
        with run.phase("data"):
            groups = sorted(next(stream), key=lambda group: -group.num_tokens)
            packs = even_packs(make_packs(groups, config.max_tokens_per_pack), processor)
        # M, the response tokens of all ranks.
        tokens = sum(len(group.branches[0]) for group in groups)
        num_tokens = float(all_sum([tokens])[0])
        # The loss (1) pack by pack; gradients add up.
        loss = entropy = 0.0
        with run.phase("update"):
            for pack in packs:
                logp, pack_entropy = token_logprobs(policy, pack.to(run.device))
                pack_loss = sft_loss(logp, max(num_tokens, 1))
                pack_loss.backward()
                loss += pack_loss.item()
                entropy += pack_entropy.sum().item()
            # One step of the optimiser.
            rate = learning_rate_at(step, max_steps, config)
            grad_norm = optimizer_step(policy, optimizer, rate, config.max_grad_norm)
        means = {
            "loss": (loss, 1 / world_size() if num_tokens else 0),
            "entropy": (entropy, tokens),
            "response_length": (tokens, len(groups)),
        }
        all_tokens, sizes = sum(g.num_tokens for g in groups), [p.input_ids.numel() for p in packs]
        longest = float(all_max([0, *sizes]).sum())  # ranks wait for the one with the longest pack
        blanks = sum(sizes) - all_tokens  # that even_packs has added
        means["padding_share"] = blanks, sum(sizes)
        means["idle_share"] = longest - sum(sizes), longest
        values = {"grad_norm": grad_norm, "learning_rate": rate, "packs": len(packs)}
        run.log(step, means, sums={"tokens": all_tokens}, values=values)


if __name__ == "__main__":
    main(train)
