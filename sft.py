"""Stage 1, supervised fine-tuning: next-token cross-entropy on demonstrations (PRISM, section on the SFT stage).

    L(theta) = - 1/M * sum_i sum_t log pi_theta(y_i,t | x_i, y_i,<t)          M: response tokens of the global batch

The loss counts the response and its end of sequence, never the prompt. M is counted over all ranks and packs of the
batch, so the loss does not depend on how the batch was cut. A demonstration is a prompt with one branch (data.py), many
of them stand in one pack without padding.

Where this differs from the published run, on purpose:
1. The published run filled sequences of 8192 tokens with LLaMA-Factory; rows longer than that are cut there. Here a row
   that is too long is left out whole, counted (`rows_left_out`) and named.
2. The published weight decay of this stage is not stated; 0 here.

    python sft.py                                                       the embedded world of handwritten digits
    torchrun --nproc_per_node=8 sft.py --model Qwen/Qwen3-VL-4B-Instruct --data demonstrations.jsonl --output_dir sft_out
"""

from data import Group, batches, encode_response, load_data, make_packs

import math
from dataclasses import dataclass

import torch

from model import (
    all_sum,
    even_packs,
    learning_rate_at,
    load_policy,
    optimizer_step,
    rank,
    save_policy,
    setup,
    shard,
    token_logprobs,
    world_size,
)
from run import Run, main, parse, ratio, say


@dataclass
class SFTConfig:
    model: str | None = (
        None  # a Hugging Face directory or hub id; left out: the digits world's instruct model
    )
    data: str | None = None  # JSONL, JSON, parquet or hub id; left out: the digits world
    output_dir: str = "out/sft"
    learning_rate: float = 1e-5  # paper: 1e-5
    lr_scheduler_type: str = "cosine"  # paper: cosine
    warmup_ratio: float = 0.1  # paper: 0.1
    weight_decay: float = 0.0  # not stated
    num_train_epochs: float = 1.0  # paper: 1
    max_steps: int = -1  # when positive, in place of the epochs
    per_device_train_batch_size: int = 2  # paper: 2
    gradient_accumulation_steps: int = (
        1  # multiplies the batch; how it is cut is max_tokens_per_pack's business
    )
    max_grad_norm: float = 1.0
    max_length: int = 8192  # paper: 8192, prompt and response
    max_tokens_per_pack: int = 16384
    activation_checkpointing: bool = False
    logging_steps: int = 1
    save_steps: int = 500
    save_total_limit: int = 1
    report_to: str = "none"  # none, tensorboard, wandb
    seed: int = 0
    resume: bool = False


def sft_loss(logp: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """Cross-entropy. logp (K,): log-probabilities of response tokens; num_tokens: M, the global batch's. Scalar."""
    return -logp.sum() / num_tokens


def train() -> None:
    import digits

    config = parse(SFTConfig, digits.SETTINGS["sft"])
    device = setup()
    run = Run(config, device)
    config.model, config.data = digits.fill_in(model=config.model, data=config.data, split="sft")
    examples = load_data(config.data, need=("response",))
    policy, processor = load_policy("--model", config.model, config.activation_checkpointing)
    policy = shard(policy, device).train()
    optimizer = torch.optim.AdamW(
        policy.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay
    )

    batch = config.per_device_train_batch_size * config.gradient_accumulation_steps * world_size()
    total = math.ceil(len(examples) * config.num_train_epochs) if config.max_steps <= 0 else None
    max_steps = config.max_steps if config.max_steps > 0 else math.ceil(total / batch)
    run.load({"policy": (policy, optimizer)}, {})
    save = lambda path: save_policy(policy, processor, path)  # noqa: E731

    stream = batches(
        examples, processor, batch, config.seed, run.step, total, (rank(), world_size())
    )
    for step in run.steps(max_steps, "sft"):
        # batch -> a prompt and one branch each -> packs
        groups = []
        with run.phase("data"):
            for example, prompt in next(stream):
                response = encode_response(processor, example.response)
                length = len(prompt.input_ids) + len(response)
                if length > config.max_length:
                    run.leave_out(
                        step,
                        example.where,
                        f"{length} tokens are more than --max_length {config.max_length}",
                    )
                    continue
                groups.append(Group(prompt, [response]))
            packs = even_packs(make_packs(groups, config.max_tokens_per_pack), processor)
        num_tokens, num_rows, prompt_tokens = all_sum(
            [
                sum(len(g.branches[0]) for g in groups),
                len(groups),
                sum(len(g.prompt.input_ids) for g in groups),
            ]
        ).tolist()

        # loss -> step
        loss = entropy = 0.0
        with run.phase("update"):
            for pack in packs:
                logp, pack_entropy = token_logprobs(policy, pack.to(device))
                pack_loss = sft_loss(logp, max(num_tokens, 1))
                pack_loss.backward()
                loss += pack_loss.item()
                entropy += pack_entropy.sum().item()
            rate = learning_rate_at(
                step, max_steps, config.learning_rate, config.warmup_ratio, config.lr_scheduler_type
            )
            grad_norm = optimizer_step(policy, optimizer, rate, config.max_grad_norm)

        run.log(
            step,
            {"entropy": ratio(entropy, sum(len(g.branches[0]) for g in groups))},
            {
                "loss": all_sum([loss]).tolist()[0] if num_rows else None,
                "grad_norm": grad_norm,
                "learning_rate": rate,
                "response_length": num_tokens / num_rows if num_rows else None,
                "tokens": num_tokens + prompt_tokens,
                "rows_left_out": run.rows_left_out(),
                "packs": len(packs),
            },
        )
        if step % config.save_steps == 0 and step < max_steps:
            run.save(step, save, {"policy": (policy, optimizer)}, {})
    run.finish(save)
    say(f"saved {config.output_dir}")


if __name__ == "__main__":
    main(train)
