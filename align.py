"""Stage 2, alignment: an adversarial game between the policy G and the discriminator D (PRISM,
pre-alignment by black-box on-policy distillation).

    (2)   min over D, max over G:  E[ sum_k - log sigmoid( D_k(x, y+) - D_k(x, y) ) ],   y ~ G(x)
    (9)   s_k of a rollout of broken format = (lowest valid s_k of its group, or 0) - 1
    (11)  A = alpha * GN(s_perception) + (1 - alpha) * GN(s_reasoning) - 1.5 * [broken format]
    (12)  s_k - beta_k * log(1 + length of view k)         length debiasing, off by default

y+ is the one supervision response of a prompt; no logits of a teacher are used. GN is the group
normalisation (10). A step samples N rollouts of each prompt and scores their two views. The same
forward gives the discriminator's loss (7) and the rewards, before either model steps. The policy
then takes one step of the clipped policy gradient (14) to (16) with A, strictly on policy. There
is no KL to a reference and no entropy bonus: both would pull towards the drifted SFT policy.

Deviations from the published run:
D7  The supervision response is not cut; the release cuts its two parts to 512 tokens each.
D8  Length debiasing acts on the rewards only; in the release also on the discriminator's loss.
D10 A supervision response of broken format is a bad row.
D1 to D5 and D13 are in discriminator.py, D9 and D11 in policy_gradient.py.

    torchrun --nproc_per_node=8 align.py --ckpt sft_out --output_dir align_out
    python align.py                                                 the embedded world of digits
"""

from dataclasses import dataclass, field

import torch

from checkpoint import load_policy, save_policy
from data import SYSTEM_PROMPT, decode, parse_response
from discriminator import Comparison, judge, load_discriminator, save_discriminator
from model import learning_rate_at, optimizer_step, shard
from policy_gradient import group_advantage, policy_backward
from rows import RowError, load_data
from run import Count, Positive, Run, RunConfig, Schedule, Share, Weight, main
from sampler import generate, sampling_flags


@dataclass
class AlignConfig(RunConfig):
    ckpt: str = "prism-vlm/Qwen3-VL-4B-Instruct-SFT"  # the SFT policy
    data: list[str] = field(  # prompts with a supervision response; paper: 5.9K
        default_factory=lambda: ["hf://datasets/prism-vlm/rl_dataset/rl_training_data_5.9k.parquet"]
    )
    discriminator: str = "prism-vlm/Qwen3-VL-2B-4X-Moe-warmup-120k"  # or a model to be upcycled
    output_dir: str = "out/align"
    system_prompt: str = SYSTEM_PROMPT  # of rows without one, or a file that holds it
    learning_rate: Weight = 1e-6  # paper: 1e-6
    discriminator_learning_rate: Weight = 1e-6  # paper: 1e-6
    lr_scheduler_type: Schedule = "constant"  # paper: constant
    warmup_steps: Weight = 0.0  # paper: none
    weight_decay: Weight = 0.01  # paper: 0.01, both models
    max_steps: Count = 500  # paper: 500 (one of its files: 1500)
    prompts_per_step: Count = 4  # paper: 4, over all ranks
    num_generations: Count = 16  # paper: 16 rollouts a prompt
    temperature: Positive = 1.0  # paper: 1.0
    max_prompt_length: Count = 2048  # paper: 2048
    max_completion_length: Count = 6144  # paper: 6144
    alpha: Share = 0.5  # paper: 0.5
    format_penalty: Weight = 1.5  # paper: 1.5
    epsilon: Share = 0.2  # paper: 0.2, both sides; never acts, as the ratio is 1
    score_l2: Weight = 0.001  # paper: 0.001
    router_aux_loss_coef: Weight = 0.01  # paper: 0.01; the release: 0 in the game (D4)
    length_beta_perception: Weight = 0.0  # paper: off
    length_beta_reasoning: Weight = 0.0  # paper: off
    max_grad_norm: Positive = 1.0  # not stated
    max_rollout_rows: Count | None = 32  # rows sampled at a time, others wait; None: all


def alignment_advantage(
    perception: torch.Tensor,
    reasoning: torch.Tensor,
    valid: torch.Tensor,
    alpha: float = 0.5,
    format_penalty: float = 1.5,
) -> torch.Tensor:
    """(11), the reward of the game. perception, reasoning (P, N): scores; valid (P, N): boolean;
    what stands at invalid rollouts is replaced first. -> (P, N)
    Takes along: fill_invalid, policy_gradient.group_advantage."""
    valid = valid.bool()
    filled = (fill_invalid(score, valid) for score in (perception, reasoning))
    perception, reasoning = (group_advantage(score) for score in filled)
    advantage = alpha * perception + (1 - alpha) * reasoning
    return advantage - format_penalty * (~valid).to(advantage.dtype)


def fill_invalid(score: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """(9): (P, N) scores of one view -> the same, with (lowest valid score of the group, or 0
    where none is valid) - 1 in place of the rollouts of broken format."""
    lowest = score.masked_fill(~valid, torch.inf).amin(1, keepdim=True)
    lowest = torch.where(valid.any(1, keepdim=True), lowest, torch.zeros_like(lowest))
    return torch.where(valid, score, lowest - 1)


def debias(score: torch.Tensor, length: torch.Tensor, beta: float) -> torch.Tensor:
    """(12): the scores of one view less beta * log(1 + length), length in tokens of the view."""
    return score - beta * torch.log1p(length)


def game_advantage(judged, config: AlignConfig) -> torch.Tensor:
    """A Judgement (discriminator.py) -> the advantages (P, N), by (12), (9), (10), (11)."""
    perception = debias(judged.perception, judged.length[0], config.length_beta_perception)
    reasoning = debias(judged.reasoning, judged.length[1], config.length_beta_reasoning)
    alpha, penalty = config.alpha, config.format_penalty
    return alignment_advantage(perception, reasoning, judged.valid, alpha, penalty)


def train() -> None:
    run = Run(AlignConfig)
    config = run.config
    examples = load_data(config.data, ("response",), config.system_prompt, config.image_dir)
    policy, processor = load_policy("--ckpt", config.ckpt, run.device, config)
    discriminator, d_processor = load_discriminator(
        "--discriminator", config.discriminator, seed=config.seed, policy_processor=processor
    )
    discriminator = shard(discriminator, run.device, config)
    policy.train(), discriminator.train()
    adamw = dict(weight_decay=config.weight_decay, fused=True)
    optimizer = torch.optim.AdamW(policy.parameters(), **adamw)
    d_optimizer = torch.optim.AdamW(discriminator.parameters(), **adamw)
    modules = {"policy": (policy, optimizer), "discriminator": (discriminator, d_optimizer)}

    def encode(example, prompt):
        teacher = parse_response(example.response)
        if teacher is None:
            raise RowError("the supervision response breaks the format")
        return example, prompt, teacher

    def save(path):
        save_policy(policy, processor, path)
        save_discriminator(discriminator, d_processor, f"{path}/discriminator")

    stream = run.batches(examples, processor, encode, config.prompts_per_step)
    sampling = sampling_flags(config)
    scoring = config.max_tokens_per_pack, config.score_l2, config.router_aux_loss_coef
    # "grpo": ratio and mean by token. Strictly on policy, the clips never act; no dual clip.
    clips = config.epsilon, config.epsilon, 0.0
    objective = dict(algorithm="grpo", clips=clips, on_policy=True)
    d_peak = config.discriminator_learning_rate

    # A step of the game (2).
    for step in run.steps(config.max_steps, modules, save):
        rate = learning_rate_at(step, config.max_steps, config)
        d_rate = learning_rate_at(step, config.max_steps, config, d_peak)
        # Prompts x, each with its supervision response y+.
        with run.phase("data"):
            batch = next(stream)
            prompts = [prompt for _, prompt, _ in batch]
        # Rollouts y ~ G(x), N a prompt.
        with run.phase("rollout"):
            groups = generate(policy, prompts, step=step, **sampling)
            texts = [[decode(processor, branch) for branch in g.branches] for g in groups]
        # Scores D_k(x, y+) and D_k(x, y), and in the same forward the gradient of (7); D steps.
        with run.phase("judge"):
            students = [[parse_response(text) for text in of_prompt] for of_prompt in texts]
            compared = [Comparison(x, teacher, s) for (_, x, teacher), s in zip(batch, students)]
            judged = judge(discriminator, compared, processor, *scoring, backward=True)
            d_grad_norm = optimizer_step(discriminator, d_optimizer, d_rate, config.max_grad_norm)
        # Advantages (11).
        advantage = game_advantage(judged, config)
        # The clipped policy gradient (14) to (16); G steps.
        with run.phase("update"):
            flat = advantage.flatten()
            means, peaks = policy_backward(policy, groups, flat, processor, config, **objective)
            grad_norm = optimizer_step(policy, optimizer, rate, config.max_grad_norm)

        values = {"learning_rate": rate, "d_learning_rate": d_rate}
        values |= {"grad_norm": grad_norm, "d_grad_norm": d_grad_norm}
        log_step(run, step, batch, groups, texts, judged, advantage, means, peaks, values)


def log_step(run, step, batch, groups, texts, judged, advantage, means, peaks, values) -> None:
    """The step's line in metrics.jsonl, and the first prompt's rollouts in rollouts.jsonl."""
    lengths = [len(branch) for group in groups for branch in group.branches]
    without = int((~judged.valid.any(1)).sum())
    measures = {name: means[name] for name in ("loss", "entropy")}
    measures["format_valid"] = judged.valid.sum(), judged.valid.numel()
    measures["response_length"] = sum(lengths), len(lengths)
    sums = {
        "prompts_without_valid": without,
        "ranks_without_valid": len(groups) > 0 and without == len(groups),
        "tokens": sum(lengths) + sum(len(prompt.input_ids) for _, prompt, _ in batch),
    }
    gap = {"sampled_scored_gap": peaks["sampled_scored_gap"]}
    run.log(step, judged.means | measures, sums, gap, values | judged.expert_shares)
    if batch:
        names = ("perception", "reasoning", "valid", "teacher_perception", "teacher_reasoning")
        columns = {name: getattr(judged, name)[0] for name in names}
        columns |= {"advantage": advantage[0], "length": lengths}
        run.log_rollouts(step, batch[0][0], texts[0], **columns)


if __name__ == "__main__":
    main(train)
