"""Stage 1, supervised fine-tuning: next-token cross-entropy on demonstrations (PRISM, SFT).

    (1)  L(theta) = - 1/M * sum_i sum_t log pi_theta(y_i,t | x_i, y_i,<t)

M is the number of response tokens in the global batch, over all ranks and packs, so the loss does
not depend on how the batch was cut. The loss counts the response and its end of sequence, never
the prompt. A branch is a continuation of a prompt, and a demonstration is a prompt with one branch.
A pack is one row of many demonstrations, without padding (data.py).

Deviations from the published run:
D6  A row that is too long is left out whole, counted and named; the published run cuts sequences
    at 8192 tokens. The other stages cut no row either.
D16 The softmax of pi leaves out the ids of images and videos; the published run's does not.
docs/deviations.md has all of them, with the reasons.

    torchrun --nproc_per_node=8 sft.py --model Qwen/Qwen3-VL-4B-Instruct --output_dir sft_out
    python sft.py                          without --model and --data: the built-in digits
"""

from dataclasses import dataclass, field
from typing import ClassVar

import torch

from data import Encoded, Group, encode_response, load_examples, rank_packs
from model import load_policy, token_logprobs
from support.ending import main
from support.errors import Unfit
from support.fields import Count, NonNegative, Positive, Steps
from support.flags import RunConfig, Schedule
from support.huggingface import save_policy
from support.loader import dealt, run_length
from support.metrics import Loss, Mean
from support.optimizer import adamw, learning_rate_at, optimizer_step
from support.ranks import all_max, all_sum
from support.run import Run


@dataclass
class SFTConfig(RunConfig):
    stage: ClassVar[str] = "sft"
    model: str = "Qwen/Qwen3-VL-4B-Instruct"  # a Hugging Face directory or hub id; paper: 4B, 8B
    data: list[str] = field(  # demonstrations, all sources shuffled together; paper: 1.26M + 113K
        default_factory=lambda: ["prism-vlm/gemini_public_mmr1", "prism-vlm/gemini_distill"]
    )
    output_dir: str = "out/sft"  # directory of the run's files and of the trained policy
    learning_rate: NonNegative = 1e-5  # peak learning rate; paper: 1e-5
    lr_scheduler_type: Schedule = "cosine"  # schedule of the learning rate; paper: cosine
    warmup_steps: NonNegative = 0.1  # warm-up steps; below 1: a share of the run; paper: 0.1
    weight_decay: NonNegative = 0.0  # AdamW's weight decay; paper: not stated
    num_train_epochs: Positive = 1.0  # passes over the data; paper: 1
    max_steps: Steps = -1  # steps of the run; -1: as many as the epochs have
    per_device_train_batch_size: Count = 2  # rows per rank; paper: 2
    gradient_accumulation_steps: Count = 1  # batches of a rank in one step; paper: not stated
    max_grad_norm: Positive = 1.0  # gradients are clipped to this norm; paper: not stated
    max_length: Count = 8192  # longest row in tokens; longer ones are left out (D6); paper: 8192
    save_steps: Count = 5000  # steps between checkpoints for --resume


def sft_loss(logp: torch.Tensor, num_tokens: float) -> torch.Tensor:
    """(1), cross-entropy. logp (K,): log-probabilities of response tokens; num_tokens: M of the
    global batch. -> scalar."""
    return -logp.sum() / num_tokens


def train() -> None:
    run = Run(SFTConfig)
    config = run.config
    # Every row needs a `response`. The config gets the system prompt and the pixel limit that the
    # model was trained with, where no flag has set them.
    examples = load_examples(config, ("response",), config.model)
    policy, processor = load_policy(config.model, run.device, config)
    policy.train()
    optimizer = adamw(policy, config.weight_decay)
    modules = {"policy": (policy, optimizer)}

    def encode(example, prompt) -> Group:
        """A demonstration as a prompt with one branch. One that is `Unfit` is left out, but not
        counted as bad."""
        response = encode_response(processor, example.response)
        length = len(prompt.input_ids) + len(response)
        if length > config.max_length:
            raise Unfit(f"{length} tokens are more than --max_length {config.max_length}")
        return Group(prompt, [response])

    batch_size, total_rows, max_steps = run_length(config, len(examples))
    rows = Encoded(examples, processor, encode, max_pixels=config.max_pixels)
    stream = run.batches(rows, batch_size, total_rows)

    def save(path: str) -> None:
        save_policy(policy, path, examples.for_next_stage)

    for step in run.steps(max_steps, modules, save):
        # Draw demonstrations (x, y), deal them to the ranks by length, and cut them into packs.
        # `dealt` puts the longest first, so that shorter ones fill the room that these leave.
        with run.phase("data"):
            groups = dealt(next(stream), size=lambda group: group.num_tokens)
            packs = rank_packs(groups, processor, config.max_tokens_per_pack)

        # Count M, the response tokens of all ranks.
        tokens = sum(len(group.branches[0]) for group in groups)
        num_tokens = float(all_sum([tokens])[0])

        # Add the gradient of the loss (1), pack by pack.
        loss = entropy = 0.0
        with run.phase("update"):
            for pack in packs:
                logp, pack_entropy = token_logprobs(policy, pack.to(run.device))
                pack_loss = sft_loss(logp, max(num_tokens, 1))
                pack_loss.backward()
                loss += pack_loss.item()
                entropy += pack_entropy.sum().item()

            # Make one step of the optimiser.
            rate = learning_rate_at(step, max_steps, config)
            grad_norm = optimizer_step(policy, optimizer, rate, config.max_grad_norm)

        # Log the step. At each pack all ranks wait for the longest. `paced` is the sum of these
        # longest packs' tokens, and `idle_share` the share of it for which a rank has no tokens.
        # Padding is the blank images that `rank_packs` adds to packs without an image.
        all_tokens = sum(group.num_tokens for group in groups)
        sizes = [pack.input_ids.numel() for pack in packs]
        paced = float(all_max([0, *sizes]).sum())
        metrics = {
            "loss": Loss(loss, updates=1 if num_tokens else 0),  # the sum over ranks
            "entropy": Mean(entropy, tokens),
            "response_length": Mean(tokens, len(groups)),
            "padding_share": Mean(sum(sizes) - all_tokens, sum(sizes)),
            "idle_share": Mean(paced - sum(sizes), paced),
            "packs": len(packs),
            "grad_norm": grad_norm,
            "learning_rate": rate,
        }
        run.log(step, metrics, grad_norms=[grad_norm], tokens=all_tokens)


if __name__ == "__main__":
    main(train)
