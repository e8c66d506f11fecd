"""Stage 2, alignment: an adversarial game between the policy G and the discriminator D (PRISM,
pre-alignment by black-box on-policy distillation).

    (2)   min over D, max over G:  E[ sum_k - log sigmoid( D_k(x, y+) - D_k(x, y) ) ],   y ~ G(x)
    (9)   s_k of a rollout of broken format = (lowest valid s_k of its group, or 0) - 1
    (11)  A = alpha * GN(s_perception) + (1 - alpha) * GN(s_reasoning) - 1.5 * [broken format]
    (12)  s_k = D_k(x, y) - beta_k * log(1 + length of view k)      length debiasing, off by default

k is a view, perception or reasoning, and D_k(x, y) its score, (5) in discriminator.py. The reward
reads s_k: (12) computes it, and (9) replaces it where the format is broken. GN is the group
normalisation, (10) in policy_gradient.py. y+ is the one supervision response of a prompt; no logits
of a teacher are used. In names, teacher is y+, and student is a rollout y that is compared with it.

A step samples N rollouts of each prompt and scores their two views. One forward gives the
discriminator's loss (7) and the rewards. The policy then takes one step of the clipped policy
gradient (14) to (16) with A, strictly on policy. There is no KL to a reference, which would pull
towards the drifted SFT policy, and no entropy bonus.

Deviations from the published run:
D7  The supervision response is not cut; the release cuts its two parts to 512 tokens each.
D8  Length debiasing acts on the rewards only; in the release also on the discriminator's loss,
    whose scores it clamps again afterwards.
D10 A supervision response of broken format is a bad row, left out, counted and named; the release
    does not check the format.
docs/deviations.md has all of them, with the reasons.

    torchrun --nproc_per_node=8 align.py --ckpt sft_out --output_dir align_out
    python align.py                        without --ckpt and --data: the built-in digits
"""

from dataclasses import dataclass, field
from typing import ClassVar

import torch

from data import Encoded, decode, load_examples, parse_response, rank_packs, supervision_response
from discriminator import Comparison, judge, load_discriminator
from model import load_policy
from policy_gradient import Objective, group_advantage, policy_backward
from probe import in_words, probe, trials_beside_the_game
from sampler import Sampling, generate
from support.ending import main
from support.fields import Count, Natural, NonNegative, Positive, Share
from support.flags import RunConfig, Schedule
from support.huggingface import save_discriminator, save_policy
from support.metrics import Mean, Sum
from support.optimizer import adamw, learning_rate_at, optimizer_step
from support.ranks import all_sum, say
from support.run import Run


@dataclass
class AlignConfig(RunConfig):
    stage: ClassVar[str] = "align"
    ckpt: str = "prism-vlm/Qwen3-VL-4B-Instruct-SFT"  # the SFT policy; paper: 4B, 8B
    data: list[str] = field(  # prompts with a supervision response; paper: 5.9K
        default_factory=lambda: ["hf://datasets/prism-vlm/rl_dataset/rl_training_data_5.9k.parquet"]
    )
    discriminator: str = "prism-vlm/Qwen3-VL-2B-4X-Moe-warmup-120k"  # after warm-up; paper: 2B x 4
    output_dir: str = "out/align"  # directory of the run and of the aligned policy
    learning_rate: NonNegative = 1e-6  # the policy's; paper: 1e-6
    discriminator_learning_rate: NonNegative = 1e-6  # the discriminator's; paper: 1e-6
    lr_scheduler_type: Schedule = "constant"  # schedule of both learning rates; paper: constant
    warmup_steps: NonNegative = 0.0  # warm-up steps; below 1: a share of the run; paper: none
    weight_decay: NonNegative = 0.01  # AdamW's weight decay, both models; paper: 0.01
    max_steps: Count = 500  # steps of the run; paper: 500 (its released code also has 1500)
    prompts_per_step: Count = 4  # prompts a step, over all ranks; ranks without one idle; paper: 4
    num_generations: Count = 16  # rollouts per prompt; paper: 16
    temperature: Positive = 1.0  # sampling temperature; paper: 1.0
    max_prompt_length: Count = 2048  # longest prompt in tokens; paper: 2048
    max_completion_length: Count = 6144  # longest rollout in tokens; paper: 6144
    alpha: Share = 0.5  # weight of perception in the reward (11); paper: 0.5
    format_penalty: NonNegative = 1.5  # subtracted for a broken format (11); paper: 1.5
    epsilon: Share = 0.2  # clip range; without effect, as the ratio is 1; paper: 0.2
    score_l2: NonNegative = 0.001  # weight of the squared scores (7); paper: 0.001
    router_aux_loss_coef: NonNegative = 0.01  # weight of load balance (8); paper: warm-up only (D4)
    length_beta_perception: NonNegative = 0.0  # length debiasing (12), captions; paper: off
    length_beta_reasoning: NonNegative = 0.0  # length debiasing (12), reasoning; paper: off
    max_grad_norm: Positive = 1.0  # gradients are clipped to this norm; paper: not stated
    max_rollout_rows: Count | None = 32  # rollouts that a rank samples at a time
    probe_steps: Natural = 50  # steps between probes of the discriminator; 0: none, see probe.py


def alignment_advantage(
    perception: torch.Tensor,
    reasoning: torch.Tensor,
    valid: torch.Tensor,
    alpha: float = 0.5,
    format_penalty: float = 1.5,
) -> torch.Tensor:
    """(11), the reward of the game. perception, reasoning (P, N): scores; valid (P, N): boolean;
    scores of invalid rollouts are replaced first (9). -> (P, N)
    Takes along: fill_invalid, policy_gradient.group_advantage."""
    valid = valid.bool()
    perception = group_advantage(fill_invalid(perception, valid))
    reasoning = group_advantage(fill_invalid(reasoning, valid))
    advantage = alpha * perception + (1 - alpha) * reasoning
    return advantage - format_penalty * (~valid).to(advantage.dtype)


def fill_invalid(score: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """(9): scores of one view and which of them are valid, (P, N) each -> (P, N), the scores with
    those of broken format replaced. They become the lowest valid score of their group, or 0 where
    none is valid, minus 1."""
    lowest = score.masked_fill(~valid, torch.inf).amin(1, keepdim=True)
    lowest = torch.where(valid.any(1, keepdim=True), lowest, torch.zeros_like(lowest))
    return torch.where(valid, score, lowest - 1)


def debias(score: torch.Tensor, length: torch.Tensor, beta: float) -> torch.Tensor:
    """(12): the scores of one view less beta * log(1 + length), length in tokens of the view."""
    return score - beta * torch.log1p(length)


def train() -> None:
    run = Run(AlignConfig)
    config = run.config
    # Every row needs a `response`, its supervision response y+.
    examples = load_examples(config, ("response",), config.ckpt, config.discriminator)
    policy, processor = load_policy(config.ckpt, run.device, config)
    discriminator, _ = load_discriminator(
        config.discriminator,
        seed=config.seed,
        policy_processor=processor,
        device=run.device,
        config=config,
    )
    policy.train()
    discriminator.train()
    optimizer = adamw(policy, config.weight_decay)
    d_optimizer = adamw(discriminator, config.weight_decay)
    modules = {"policy": (policy, optimizer), "discriminator": (discriminator, d_optimizer)}

    def encode(example, prompt):
        """A row as (row, prompt x, supervision response y+)."""
        teacher = supervision_response(example)
        return example, prompt, teacher

    limits = dict(max_prompt_length=config.max_prompt_length, max_pixels=config.max_pixels)
    rows = Encoded(examples, processor, encode, **limits)
    stream = run.batches(rows, config.prompts_per_step)
    # A trial compares a row with copies of it, whose picture, question or part of y+ is another
    # (probe.py).
    trials = trials_beside_the_game(config, examples, processor) if config.probe_steps else []
    num_trials = int(all_sum([len(trials)])[0])
    if config.probe_steps and not num_trials:
        say(
            "no probes: they need two usable rows that the discriminator does not learn from. "
            "Point --discriminator at the directory of a warm-up that held out pairs "
            "(--validation_share), with that run's --data on this machine, or pass --probe_steps 0"
        )
    sampling = Sampling.of(config)
    # The ratio and the mean of (14) to (16) are by token, as in GRPO, without a dual clip.
    objective = Objective(
        algorithm="grpo",
        clip_low=config.epsilon,
        clip_high=config.epsilon,
        temperature=config.temperature,
    )

    def save(path: str) -> None:
        save_policy(policy, path, examples.for_next_stage)
        save_discriminator(discriminator, f"{path}/discriminator", examples.for_next_stage)

    # Each step is one move of both players in the game (2).
    for step in run.steps(config.max_steps, modules, save):
        # Draw prompts x, each with its one supervision response y+.
        with run.phase("data"):
            batch = next(stream)
            prompts = [prompt for _, prompt, _ in batch]

        # Sample N rollouts y ~ G(x) of each prompt from the policy.
        with run.phase("rollout"):
            groups = generate(policy, prompts, sampling, step=step)
            texts = []  # of each prompt, its N rollouts
            for group in groups:
                texts.append([decode(processor, y, policy.stop_ids) for y in group.branches])

        # Put the rollouts of each prompt beside its y+, all split into caption, think and answer. A
        # rollout of broken format is None and gets no scores.
        comparisons = []
        for (_, prompt, teacher), rollouts in zip(batch, texts):
            students = [parse_response(text) for text in rollouts]
            comparisons.append(Comparison(prompt, teacher, students))

        # Score both views, D_k(x, y+) and D_k(x, y), and add the gradient of the loss (7) in the
        # same forward. So the rewards are the scores from before the discriminator's step.
        with run.phase("judge"):
            judged = judge(
                discriminator,
                comparisons,
                processor,
                max_tokens=config.max_tokens_per_pack,
                score_l2=config.score_l2,
                balance_coef=config.router_aux_loss_coef,
                backward=True,
            )
            # The discriminator steps.
            d_peak = config.discriminator_learning_rate
            d_rate = learning_rate_at(step, config.max_steps, config, peak=d_peak)
            d_grad_norm = optimizer_step(discriminator, d_optimizer, d_rate, config.max_grad_norm)

        # Turn scores into advantages: length debiasing (12), replacing (9), group normalisation
        # (10), the weighted sum and the format penalty (11).
        perception = debias(
            judged.perception, judged.perception_length, config.length_beta_perception
        )
        reasoning = debias(judged.reasoning, judged.reasoning_length, config.length_beta_reasoning)
        advantage = alignment_advantage(
            perception,
            reasoning,
            judged.valid,
            alpha=config.alpha,
            format_penalty=config.format_penalty,
        )

        # Add the clipped policy gradient (14) to (16), strictly on policy; the policy steps.
        with run.phase("update"):
            packs = rank_packs(groups, processor, config.max_tokens_per_pack)
            update_metrics = policy_backward(policy, packs, groups, advantage, objective)
            rate = learning_rate_at(step, config.max_steps, config)
            grad_norm = optimizer_step(policy, optimizer, rate, config.max_grad_norm)

        # At step 1 and every `probe_steps` steps, let `judge` score the trials, to see whether the
        # discriminator is blind. It does not learn from their rows.
        due = num_trials and (step == 1 or step % config.probe_steps == 0)
        probed = {}
        if due:
            with run.phase("probe"):
                max_tokens = config.max_tokens_per_pack
                probed = probe(judge, discriminator, trials, processor, max_tokens=max_tokens)

        # Log the step, and the rollouts of the first prompt. The clip never acts, so its metrics
        # are left out.
        lengths = [len(branch) for group in groups for branch in group.branches]
        prompts_without_valid = int((~judged.valid.any(1)).sum())
        no_valid_at_all = len(groups) > 0 and prompts_without_valid == len(groups)
        metrics = {
            **judged.metrics,
            "loss": update_metrics["loss"],
            "entropy": update_metrics["entropy"],
            "sampled_scored_gap": update_metrics["sampled_scored_gap"],
            "format_valid": Mean(judged.valid.sum(), judged.valid.numel()),
            "response_length": Mean(sum(lengths), len(lengths)),
            "prompts_without_valid": Sum(prompts_without_valid),
            "ranks_without_valid": Sum(int(no_valid_at_all)),
            "grad_norm": grad_norm,
            "d_grad_norm": d_grad_norm,
            "learning_rate": rate,
            "d_learning_rate": d_rate,
            **probed,
        }
        # Tokens of prompts and rollouts, each counted once, for the log's tokens per second.
        tokens = sum(lengths) + sum(len(prompt.input_ids) for prompt in prompts)
        line = run.log(step, metrics, grad_norms=[grad_norm, d_grad_norm], tokens=tokens)
        run.look_at_format(step, line["format_valid"])
        if due:
            say(f"step {step}:", in_words(line))
        if batch:
            example, _, _ = batch[0]
            broken = ~judged.valid[0]  # such a rollout has no scores; the log says null for NaN
            run.log_rollouts(
                step,
                example,
                texts[0],
                perception=judged.perception[0].masked_fill(broken, torch.nan),
                reasoning=judged.reasoning[0].masked_fill(broken, torch.nan),
                valid=judged.valid[0],
                teacher_perception=judged.teacher_perception[0].masked_fill(broken, torch.nan),
                teacher_reasoning=judged.teacher_reasoning[0].masked_fill(broken, torch.nan),
                advantage=advantage[0],
                length=lengths[: len(texts[0])],
            )


if __name__ == "__main__":
    main(train)
