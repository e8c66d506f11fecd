"""Stage 2, alignment: an adversarial game between the policy and the discriminator (PRISM, section on pre-alignment).

    min over D, max over G   E[ log sigmoid( D_k(x, y+) - D_k(x, y) ) ],  y ~ G(x), k in {perception, reasoning}

y+ is the one supervision response a prompt has; no teacher logits are used. A step: N rollouts of each prompt are sampled,
split into their two views and scored. The same forward gives the discriminator's loss (discriminator.py) and the rewards:

    s_k   = score of view k; a rollout of invalid format gets (lowest valid score of its group, or 0) - 1 in both views
    GN    = (s - mean) / (std + 1e-6) over the N rollouts of a prompt, unbiased std
    A     = alpha * GN(s_perception) + (1 - alpha) * GN(s_reasoning) - 1.5 * [format invalid],   alpha = 0.5
    L_G   = clipped policy gradient with A (clip 0.2), one optimiser step per batch of rollouts: strictly on policy

No KL to a reference and no entropy bonus: pulling towards the drifted SFT policy is what is to be avoided. Without
`--discriminator` one is made from `--discriminator_base` (or the policy itself) and warmed up on the policy's rollouts for
the first `--warmup_steps` steps, in which the policy stands still.

Where this differs from the published run, on purpose:
1. Nothing of the supervision response is cut (the release cuts its two parts to 512 tokens), and a prompt that is too long
   is left out, counted and named.
2. The discriminator's update and the rewards come from one forward with the same weights, before either model steps.
3. A non-finite or missing score is an error or is counted; none becomes 0.

    python align.py                                                                 the embedded world of digits
    torchrun --nproc_per_node=8 align.py --ckpt sft_out --data prompts.parquet --discriminator d_out --output_dir align_out
"""

from data import UserError, batches, decode, encode_views, load_data, parse_response

import os
from dataclasses import dataclass

import torch

from discriminator import Comparison, expert_shares, judge, load_discriminator, save_discriminator
from model import (
    all_sum,
    generate,
    learning_rate_at,
    load_policy,
    optimizer_step,
    rank,
    save_policy,
    setup,
    shard,
    world_size,
)
from rlvr import fits, group_advantage, rollout_rows, update_policy
from run import Run, main, parse, ratio, say


@dataclass
class AlignConfig:
    ckpt: str | None = None  # the SFT policy; left out: the digits world's instruct model
    data: str | None = None  # prompts with a supervision response; left out: the digits world
    discriminator: str | None = (
        None  # a warmed-up discriminator (discriminator.py); left out: made here
    )
    discriminator_base: str | None = (
        None  # what it is made from; left out: --ckpt (paper: Qwen3-VL-2B-Instruct)
    )
    experts: str = "learned"  # of a discriminator made here
    output_dir: str = "out/align"
    learning_rate: float = 1e-6  # paper: 1e-6
    discriminator_learning_rate: float = 1e-6  # paper: 1e-6
    lr_scheduler_type: str = "constant"  # paper: constant
    warmup_ratio: float = 0.0  # of the learning rates; paper: none
    weight_decay: float = 0.01  # paper: 0.01, both models
    max_steps: int = 500  # paper: 500 (one of its files: 1500)
    per_device_train_batch_size: int = 1  # prompts; paper: 4 in all, which is 1 on each of 4 GPUs
    gradient_accumulation_steps: int = 1
    num_generations: int = 16  # paper: 16 rollouts a prompt
    temperature: float = 1.0  # paper: 1.0
    max_prompt_length: int = 2048  # paper: 2048
    max_completion_length: int = 6144  # paper: 6144
    alpha: float = 0.5  # paper: 0.5
    format_penalty: float = 1.5  # paper: 1.5
    epsilon: float = 0.2  # paper: 0.2, both sides
    score_l2: float = 0.001  # paper: 0.001
    router_aux_loss_coef: float = 0.01  # paper: 0.01
    length_beta_perception: float = 0.0  # paper: off
    length_beta_reasoning: float = 0.0  # paper: off
    warmup_steps: int = 938  # of a discriminator made here; paper: 120K pairs at 128 a step
    warmup_learning_rate: float = 1e-5  # paper: 1e-5
    max_grad_norm: float = 1.0
    max_tokens_per_pack: int = 16384
    max_rollout_rows: int | None = None
    activation_checkpointing: bool = False
    logging_steps: int = 1
    save_steps: int = 100
    save_total_limit: int = 1
    report_to: str = "none"
    seed: int = 0
    resume: bool = False


def debias(score: torch.Tensor, length: torch.Tensor, beta: float) -> torch.Tensor:
    """Length debiasing of one view: score - beta * log(1 + length), length in tokens of the view. Off at beta = 0."""
    return score - beta * torch.log1p(length)


def fill_invalid(score: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """(P, N) scores of one view -> the same with (lowest valid score of the group, or 0 where none is valid) - 1 in place
    of the rollouts of invalid format."""
    lowest = score.masked_fill(~valid, torch.inf).amin(1, keepdim=True)
    lowest = torch.where(valid.any(1, keepdim=True), lowest, torch.zeros_like(lowest))
    return torch.where(valid, score, lowest - 1)


def alignment_advantage(
    perception: torch.Tensor,
    reasoning: torch.Tensor,
    valid: torch.Tensor,
    alpha: float = 0.5,
    format_penalty: float = 1.5,
) -> torch.Tensor:
    """The reward of the game: alpha * GN(perception) + (1 - alpha) * GN(reasoning), minus the penalty of invalid rollouts.

    perception, reasoning (P, N): scores, whatever stands at invalid rollouts is replaced first; valid (P, N): boolean.
    GN normalises each view over the N rollouts of a prompt (mean, unbiased std, eps 1e-6). -> (P, N)
    """
    valid = valid.bool()
    views = [group_advantage(fill_invalid(score, valid)) for score in (perception, reasoning)]
    return alpha * views[0] + (1 - alpha) * views[1] - format_penalty * (~valid).to(views[0].dtype)


def train() -> None:
    import digits

    config = parse(AlignConfig, digits.SETTINGS["align"])
    device = setup()
    run = Run(config, device)
    config.ckpt, config.data = digits.fill_in(model=config.ckpt, data=config.data, split="prompts")
    examples = load_data(config.data, need=("response",))
    teachers = {}
    for example in examples:
        teachers[example.index] = parse_response(example.response)
        if teachers[example.index] is None:
            raise UserError(
                f"{example.where}: the supervision response breaks the format <caption>..</caption><think>.."
                f"</think><answer>..</answer>; mend it or remove the row"
            )
    policy, processor = load_policy("--ckpt", config.ckpt, config.activation_checkpointing)
    policy = shard(policy, device).train()
    optimizer = torch.optim.AdamW(
        policy.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay
    )

    flag = "--discriminator" if config.discriminator else "--discriminator_base"
    discriminator, d_processor = load_discriminator(
        flag,
        config.discriminator or config.discriminator_base or config.ckpt,
        None if config.discriminator else config.experts,
        seed=config.seed,
    )
    same_tokens = processor.tokenizer.get_vocab() == d_processor.tokenizer.get_vocab()
    if not same_tokens or str(processor.image_processor) != str(d_processor.image_processor):
        raise UserError(
            f"{flag}: its tokenizer or image processor is not the policy's; prompts are encoded once for both"
        )
    if config.activation_checkpointing:
        discriminator.model.activation_checkpointing_enable()
    discriminator = shard(discriminator, device).train()
    d_optimizer = torch.optim.AdamW(
        discriminator.parameters(),
        lr=config.discriminator_learning_rate,
        weight_decay=config.weight_decay,
    )
    modules = {"policy": (policy, optimizer), "discriminator": (discriminator, d_optimizer)}
    run.load(modules, {})

    n = config.num_generations
    batch = config.per_device_train_batch_size * config.gradient_accumulation_steps * world_size()
    warmup = 0 if config.discriminator else config.warmup_steps
    stream = batches(examples, processor, batch, config.seed, run.step, part=(rank(), world_size()))

    def save(path):
        save_policy(policy, processor, path)
        save_discriminator(discriminator, d_processor, os.path.join(path, "discriminator"))

    for step in run.steps(warmup + config.max_steps, "align"):
        # prompts -> rollouts
        with run.phase("data"):
            rows = fits(run, step, next(stream), config.max_prompt_length)
        with run.phase("rollout"):
            groups = generate(
                policy,
                [prompt for _, prompt in rows],
                n,
                config.max_completion_length,
                config.temperature,
                config.seed,
                step,
                config.max_rollout_rows,
            )
        texts = [[decode(processor, branch) for branch in group.branches] for group in groups]
        parsed = [[parse_response(text) for text in some] for some in texts]

        # rollouts -> views -> scores, and in the same forward the discriminator's gradient
        with run.phase("judge"):
            comparisons = [
                Comparison(prompt, teachers[example.index], some)
                for (example, prompt), some in zip(rows, parsed)
            ]
            judged = judge(
                discriminator,
                comparisons,
                processor,
                device,
                config.max_tokens_per_pack,
                config.score_l2,
                config.router_aux_loss_coef,
            )
            d_rate = (
                config.warmup_learning_rate
                if step <= warmup
                else config.discriminator_learning_rate
            )
            d_grad_norm = optimizer_step(discriminator, d_optimizer, d_rate, config.max_grad_norm)

        # scores -> advantages -> loss -> step
        valid = torch.tensor(
            [[p is not None for p in some] for some in parsed], dtype=torch.bool
        ).view(-1, n)
        scores = judged.student.view(-1, n, 2)
        if config.length_beta_perception or config.length_beta_reasoning:
            lengths = torch.tensor(
                [
                    [
                        [float(len(v)) for v in encode_views(processor, p)] if p else [0.0, 0.0]
                        for p in some
                    ]
                    for some in parsed
                ]
            ).view(-1, n, 2)
            scores = torch.stack(
                [
                    debias(scores[..., 0], lengths[..., 0], config.length_beta_perception),
                    debias(scores[..., 1], lengths[..., 1], config.length_beta_reasoning),
                ],
                -1,
            )
        advantage = alignment_advantage(
            scores[..., 0], scores[..., 1], valid, config.alpha, config.format_penalty
        )
        values = {
            "d_grad_norm": d_grad_norm,
            "d_learning_rate": d_rate,
            "warmup": float(step <= warmup),
        }
        sums = judged.sums
        if step > warmup:
            with run.phase("update"):
                update = update_policy(
                    policy,
                    groups,
                    advantage.flatten(),
                    processor,
                    device,
                    config,
                    "grpo",
                    config.epsilon,
                    config.epsilon,
                    None,
                    on_policy=True,
                )
                rate = learning_rate_at(
                    step - warmup,
                    config.max_steps,
                    config.learning_rate,
                    config.warmup_ratio,
                    config.lr_scheduler_type,
                )
                grad_norm = optimizer_step(policy, optimizer, rate, config.max_grad_norm)
            sums["entropy"] = ratio(update.entropy, update.tokens)
            values |= {
                "loss": float(all_sum([update.loss])[0]),
                "grad_norm": grad_norm,
                "learning_rate": rate,
            }

        lengths = [len(branch) for group in groups for branch in group.branches]
        no_valid = int((~valid.any(1)).sum())
        sums |= {
            "format_valid": ratio(valid.sum(), valid.numel()),
            "response_length": ratio(sum(lengths), len(lengths)),
        }
        counts = all_sum(
            [
                no_valid,
                len(groups) > 0 and no_valid == len(groups),
                sum(lengths) + sum(len(p.input_ids) for _, p in rows),
            ]
        ).tolist()
        run.log(
            step,
            sums,
            values
            | expert_shares(judged)
            | {
                "prompts_without_valid": counts[0],
                "ranks_without_valid": counts[1],
                "tokens": counts[2],
                "rows_left_out": run.rows_left_out(),
            },
        )
        if step % config.logging_steps == 0 and groups:
            run.log_rollouts(
                step,
                rollout_rows(
                    rows[0][0],
                    texts[0],
                    valid=valid[0],
                    advantage=advantage[0],
                    score_perception=scores[0, :, 0],
                    score_reasoning=scores[0, :, 1],
                    teacher_perception=judged.teacher[:n, 0],
                    teacher_reasoning=judged.teacher[:n, 1],
                    length=lengths[:n],
                ),
            )
        if step % config.save_steps == 0 and step < warmup + config.max_steps:
            run.save(step, save, modules, {})
    run.finish(save)
    say(f"saved {config.output_dir}")


if __name__ == "__main__":
    main(train)
