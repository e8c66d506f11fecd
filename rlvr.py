"""Stage 3, reinforcement learning with verifiable rewards: GRPO, DAPO and GSPO side by side (PRISM, section on RLVR).

    R_i  = 0.8 * accuracy_i + 0.2 * format_i, 0 where the format is broken                                 reward
    A_i  = (R_i - mean(R)) / (std(R) + 1e-6) over the N rollouts of one prompt, unbiased std               group_advantage
    r    = exp(log pi(y) - log pi_old(y))                                                                  the ratio
    l    = max(-A r, -A clip(r, 1 - clip_low, 1 + clip_high)); where A < 0 at most -A * dual_clip          policy_loss

                   GRPO (2402.03300)             DAPO (2503.14476)              GSPO (2507.18071)
    ratio          each token                    each token                     sequence: exp(mean log-ratio)
    clip           0.2 / 0.2                     0.2 / 0.28                     0.0003 / 0.0004
    loss           mean over all tokens          mean over all tokens           mean over sequences of the token mean
    besides        KL where beta > 0             groups without spread are      -
                                                 dropped and sampled on for;
                                                 overlong responses cost up to 1

Denominators are those of the whole batch, over all ranks and packs: neither the loss nor its gradient depends on how the
batch was cut. With one optimiser step per batch of rollouts the ratio is exactly 1 and no clip acts (the published setting,
in which the three differ by aggregation, filtering and shaping alone); `--num_minibatches` and `--num_epochs` change that.

Where this differs from the published run, on purpose:
1. The release takes the token mean in each micro-batch; here the denominator is global.
2. The release contradicts itself on weight decay (0.01 and 0.1); 0.01 here.

    python rlvr.py                                                                  the embedded world of digits
    torchrun --nproc_per_node=8 rlvr.py --ckpt align_out --data prompts.parquet --algorithm dapo --output_dir rl_out
"""

from data import (
    Example,
    Group,
    Prompt,
    UserError,
    batches,
    decode,
    load_data,
    make_packs,
    parse_response,
)

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist

from model import (
    all_sum,
    even_packs,
    generate,
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
from run import Run, accumulate, main, parse, ratio, say
from verifier import ACCURACY, FORMAT, reward, verify  # noqa: F401, `rlvr.reward` is a name that others use

# The published constants of each algorithm; a flag overrides its own.
ALGORITHMS = {
    "grpo": dict(epsilon=0.2, epsilon_high=0.2, dual_clip=3.0),
    "dapo": dict(epsilon=0.2, epsilon_high=0.28, dual_clip=10.0),
    "gspo": dict(epsilon=0.0003, epsilon_high=0.0004, dual_clip=10.0),
}


@dataclass
class RLVRConfig:
    ckpt: str | None = (
        None  # the aligned policy (or any other); left out: the digits world's instruct model
    )
    data: str | None = None  # prompts with a ground truth; left out: the digits world
    output_dir: str = "out/rlvr"
    algorithm: str = "grpo"  # grpo, dapo, gspo
    learning_rate: float = 1e-6  # paper: 1e-6
    lr_scheduler_type: str = "constant"  # paper: constant
    warmup_ratio: float = 0.05  # paper: 0.05
    weight_decay: float = 0.01  # paper: 0.01 (one of its files: 0.1)
    max_steps: int = 1500  # paper: 1500
    per_device_train_batch_size: int = 4  # prompts; paper: 32 in all, 4 on each of 8 GPUs
    gradient_accumulation_steps: int = 1
    num_generations: int = 16  # paper: 16 rollouts a prompt
    temperature: float = 1.0  # paper: 1.0
    max_prompt_length: int = 2048  # paper: 2048
    max_completion_length: int = 8192  # paper: 8192
    epsilon: float | None = None  # clip low; paper: see ALGORITHMS
    epsilon_high: float | None = None  # clip high; paper: see ALGORITHMS
    dual_clip: float | None = None  # paper: 10, GRPO 3
    beta: float = 0.0  # of the k3 KL to the starting policy; 0: no reference model is loaded
    num_minibatches: int = 1  # optimiser steps per batch and epoch; paper: 1
    num_epochs: int = 1  # passes over a batch of rollouts; paper: 1
    max_gen_batches: int = 10  # DAPO: sampled batches before giving up; paper: 10
    gen_batch_factor: int = 3  # DAPO: prompts sampled at a time, in batches; paper: 96 for 32
    overlong_buffer: int = (
        4096  # DAPO: the tokens before the limit over which the penalty grows to 1; paper: 4096
    )
    max_grad_norm: float = 1.0
    max_tokens_per_pack: int = 16384
    max_rollout_rows: int | None = None  # rows sampled at a time; None: all
    activation_checkpointing: bool = False
    logging_steps: int = 1
    save_steps: int = 100
    save_total_limit: int = 1
    report_to: str = "none"
    seed: int = 0
    resume: bool = False


# --------------------------------------------------------------------------------------------------------------------
# The algorithms


def group_advantage(rewards: torch.Tensor) -> torch.Tensor:
    """(P, N) -> (P, N): (r - mean) / (unbiased std + 1e-6) over the rollouts of one prompt. A group of one keeps mean 0
    and std 1."""
    if rewards.shape[1] == 1:
        return rewards / (1 + 1e-6)
    r = rewards.double()  # in float32 the mean of equal rewards is off by a rounding, which the small eps would blow up
    return ((r - r.mean(1, keepdim=True)) / (r.std(1, keepdim=True) + 1e-6)).to(rewards.dtype)


def policy_loss(
    logp: torch.Tensor,
    old_logp: torch.Tensor,
    advantage: torch.Tensor,
    mask: torch.Tensor,
    algorithm: str,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None,
    num_tokens: float | None = None,
    num_sequences: float | None = None,
) -> torch.Tensor:
    """The clipped policy gradient. logp, old_logp, mask (B, T), mask boolean; advantage (B,). Scalar.

    `num_tokens` and `num_sequences` are the global denominators; None takes this batch's.
    """
    log_ratio = torch.where(mask, logp - old_logp, 0.0)
    length = mask.sum(1)
    if algorithm == "gspo":
        # One ratio a sequence, s = exp(1/|y| sum_t log r_t), the same for each of its tokens. The token mean below then has the
        # sequence formula's gradient, s * mean_t d logp_t.
        log_ratio = torch.where(
            mask, log_ratio.sum(1, keepdim=True) / length.clamp(min=1)[:, None], 0.0
        )
    r = log_ratio.clamp(-20, 20).exp()

    a = advantage[:, None].to(r.dtype)
    loss = torch.maximum(-a * r, -a * r.clamp(1 - clip_low, 1 + clip_high))
    if dual_clip is not None:  # a negative advantage with a huge ratio: bounded from above
        loss = torch.where(a < 0, torch.minimum(loss, -a * dual_clip), loss)
    loss = torch.where(mask, loss, 0.0)

    if algorithm == "gspo":  # mean over sequences of the mean over tokens
        return (loss.sum(1) / length.clamp(min=1)).sum() / (
            max(len(mask), 1) if num_sequences is None else num_sequences
        )
    if algorithm in ("grpo", "dapo"):  # mean over all tokens
        return loss.sum() / (max(int(length.sum()), 1) if num_tokens is None else num_tokens)
    raise ValueError(f"algorithm {algorithm!r}: one of {', '.join(ALGORITHMS)}")


def kl_k3(logp: torch.Tensor, ref_logp: torch.Tensor) -> torch.Tensor:
    """The k3 estimate of KL(pi | ref) per token, exp(d) - d - 1 with d = ref_logp - logp (Schulman 2020): never negative."""
    d = (ref_logp - logp).clamp(-20, 20)
    return d.exp() - d - 1


def overlong_penalty(length: torch.Tensor, limit: int, buffer: int) -> torch.Tensor:
    """DAPO's soft overlong punishment: 0 up to limit - buffer tokens, then linear to -1 at the limit; none where buffer is 0.
    (M,) -> (M,)."""
    return -((length - (limit - buffer)) / max(buffer, 1)).clamp(0, 1)


# --------------------------------------------------------------------------------------------------------------------
# The policy's update, shared with stage 2


@dataclass
class Update:
    """Sums over this rank's branch tokens of one pass, for the metrics."""

    loss: float = 0.0
    entropy: float = 0.0
    tokens: float = 0.0
    clipped_low: float = 0.0
    clipped_high: float = 0.0
    kl_old: float = 0.0
    kl_ref: float = 0.0
    gap: float = 0.0
    ratio_min: float = math.inf
    ratio_max: float = -math.inf

    def metrics(self) -> dict[str, tuple[float, float]]:
        names = ("entropy", "clipped_low", "clipped_high", "kl_old", "kl_ref")
        return {name: ratio(getattr(self, name), self.tokens) for name in names}


def update_policy(
    policy,
    groups: list[Group],
    advantage: torch.Tensor,
    processor,
    device,
    config,
    algorithm: str,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None,
    on_policy: bool,
    reference=None,
) -> Update:
    """Adds the gradient of the policy loss over `groups` (B branches in all, advantage (B,)). With `on_policy` the new
    log-probabilities, detached, are the old ones too: there is one step per batch, so nothing has moved yet."""
    number = {}
    for g, group in enumerate(groups):
        for i in range(len(group.branches)):
            number[g, i] = len(number)
    recorded = [logp for group in groups for logp in group.logprobs]
    num_tokens, num_sequences = all_sum([sum(map(len, recorded)), len(recorded)]).tolist()
    update = Update()
    for pack in even_packs(make_packs(groups, config.max_tokens_per_pack), processor):
        pack = pack.to(device)
        members = [number[member] for member in pack.members]
        logp, entropy = token_logprobs(policy, pack, config.temperature)
        sampled = torch.cat([torch.zeros(0), *(recorded[i] for i in members)]).to(device)
        old = logp.detach() if on_policy else sampled
        a = advantage[members].to(device)
        loss = policy_loss(
            pack.rows(logp),
            pack.rows(old),
            a,
            pack.mask,
            algorithm,
            clip_low,
            clip_high,
            dual_clip,
            max(num_tokens, 1),
            max(num_sequences, 1),
        )
        if reference is not None:
            with torch.no_grad():
                ref_logp, _ = token_logprobs(reference, pack, config.temperature)
            kl = kl_k3(logp, ref_logp)
            loss = loss + config.beta * kl.sum() / max(num_tokens, 1)
            update.kl_ref += kl.sum().item()
        loss.backward()
        update.loss += loss.item()
        update.entropy += entropy.sum().item()
        update.tokens += len(logp)
        if len(logp):
            log_ratio = logp.detach() - old
            r = pack.rows(log_ratio)
            if algorithm == "gspo":
                r = (r.sum(1) / pack.mask.sum(1))[:, None].expand_as(r)
            r, sign = r.exp()[pack.mask], a[:, None].expand_as(r)[pack.mask]
            update.clipped_low += ((r < 1 - clip_low) & (sign < 0)).sum().item()
            update.clipped_high += ((r > 1 + clip_high) & (sign > 0)).sum().item()
            update.ratio_min, update.ratio_max = (
                min(update.ratio_min, r.min().item()),
                max(update.ratio_max, r.max().item()),
            )
            update.kl_old += kl_k3(logp.detach(), old).sum().item()
            update.gap = max(update.gap, (logp.detach() - sampled).abs().max().item())
    return update


# --------------------------------------------------------------------------------------------------------------------
# The loop


def fits(
    run: Run, step: int, batch: list[tuple[Example, Prompt]], max_prompt_length: int
) -> list[tuple[Example, Prompt]]:
    """The prompts that are not too long; the others are counted and named. None is ever cut."""
    for example, prompt in batch:
        if len(prompt.input_ids) > max_prompt_length:
            run.leave_out(
                step,
                example.where,
                f"{len(prompt.input_ids)} tokens are more than --max_prompt_length {max_prompt_length}",
            )
    return [
        (example, prompt) for example, prompt in batch if len(prompt.input_ids) <= max_prompt_length
    ]


def spread(values: torch.Tensor) -> torch.Tensor:
    """(P, N) -> (P,): which groups have any spread. Without one there is nothing to learn from a group."""
    return (values != values[:, :1]).any(1)


def train() -> None:
    import digits

    config = parse(RLVRConfig, digits.SETTINGS["rlvr"])
    if config.algorithm not in ALGORITHMS:
        raise UserError(f"--algorithm {config.algorithm}: choose one of {', '.join(ALGORITHMS)}")
    for name, value in ALGORITHMS[config.algorithm].items():
        if getattr(config, name) is None:
            setattr(config, name, value)
    device = setup()
    run = Run(config, device)
    config.ckpt, config.data = digits.fill_in(model=config.ckpt, data=config.data, split="prompts")
    examples = load_data(config.data, need=("answer",))
    policy, processor = load_policy("--ckpt", config.ckpt, config.activation_checkpointing)
    policy = shard(policy, device).train()
    reference = shard(load_policy("--ckpt", config.ckpt)[0], device).eval() if config.beta else None
    optimizer = torch.optim.AdamW(
        policy.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay
    )
    progress = run.load({"policy": (policy, optimizer)}, {"batches": 0})

    n, dapo = config.num_generations, config.algorithm == "dapo"
    batch = config.per_device_train_batch_size * config.gradient_accumulation_steps * world_size()
    sampled_at_once = batch * config.gen_batch_factor if dapo else batch
    stream = batches(
        examples,
        processor,
        sampled_at_once,
        config.seed,
        progress["batches"],
        part=(rank(), world_size()),
    )
    save = lambda path: save_policy(policy, processor, path)  # noqa: E731

    for step in run.steps(config.max_steps, config.algorithm):
        # prompts -> rollouts -> rewards; DAPO drops groups whose accuracy has no spread, and samples on
        rows, groups, accuracy, rewards, texts = [], [], torch.zeros(0, n), torch.zeros(0, n), []
        sums: dict[str, tuple[float, float]] = {}
        gen_batches, kept = 0, 0
        while True:
            with run.phase("data"):
                new = fits(run, step, next(stream), config.max_prompt_length)
                progress["batches"] += 1
            with run.phase("rollout"):
                new_groups = generate(
                    policy,
                    [prompt for _, prompt in new],
                    n,
                    config.max_completion_length,
                    config.temperature,
                    config.seed,
                    step * 1000 + gen_batches,
                    config.max_rollout_rows,
                )
            with run.phase("reward"):
                new_texts = [
                    [decode(processor, branch) for branch in group.branches] for group in new_groups
                ]
                parsed = [[parse_response(text) for text in some] for some in new_texts]
                right = torch.tensor(
                    [
                        [float(p is not None and verify(p.answer, example.answer)) for p in some]
                        for (example, _), some in zip(new, parsed)
                    ]
                ).view(-1, n)
                valid = torch.tensor(
                    [[float(p is not None) for p in some] for some in parsed]
                ).view(-1, n)
                length = torch.tensor(
                    [[float(len(b)) for b in g.branches] for g in new_groups]
                ).view(-1, n)
                score = (ACCURACY * right + FORMAT) * valid
                if dapo:
                    score = score + overlong_penalty(
                        length, config.max_completion_length, config.overlong_buffer
                    )
            measured = {
                "accuracy": right,
                "format_valid": valid,
                "response_length": length,
                "reward": score,
                "groups_with_spread": spread(right),
            }
            accumulate(
                sums, {name: ratio(value.sum(), value.numel()) for name, value in measured.items()}
            )
            gen_batches += 1
            chosen = list(range(len(new)))
            if dapo:  # the first that are still wanted, in the order of the global batch
                chosen = spread(right).nonzero()[:, 0].tolist()
                flags = torch.zeros(sampled_at_once)
                flags[[i * world_size() + rank() for i in chosen]] = 1
                order = all_sum(flags).cumsum(0)
                chosen = [i for i in chosen if kept + order[i * world_size() + rank()] <= batch]
                kept = min(batch, kept + int(order[-1]))
            rows += [new[i] for i in chosen]
            groups += [new_groups[i] for i in chosen]
            texts += [new_texts[i] for i in chosen]
            accuracy, rewards = (
                torch.cat([accuracy, right[chosen]]),
                torch.cat([rewards, score[chosen]]),
            )
            if not dapo or kept >= batch:
                break
            if gen_batches >= config.max_gen_batches:
                raise UserError(
                    f"--algorithm dapo: {gen_batches} batches of {sampled_at_once} prompts gave {kept} groups with "
                    f"any spread in accuracy, {batch} are needed; easier or harder data, or more --max_gen_batches"
                )

        # rewards -> advantages -> loss -> step
        advantage = group_advantage(rewards) if len(rewards) else rewards
        updates = []
        with run.phase("update"):
            generator = torch.Generator().manual_seed(config.seed * 1_000_003 + step)
            rate = learning_rate_at(
                step,
                config.max_steps,
                config.learning_rate,
                config.warmup_ratio,
                config.lr_scheduler_type,
            )
            for _ in range(config.num_epochs):
                for part in torch.randperm(len(groups), generator=generator).tensor_split(
                    config.num_minibatches
                ):
                    updates.append(
                        update_policy(
                            policy,
                            [groups[i] for i in part],
                            advantage[part].flatten(),
                            processor,
                            device,
                            config,
                            config.algorithm,
                            config.epsilon,
                            config.epsilon_high,
                            config.dual_clip,
                            on_policy=config.num_minibatches * config.num_epochs == 1,
                            reference=reference,
                        )
                    )
                    grad_norm = optimizer_step(policy, optimizer, rate, config.max_grad_norm)

        for update in updates:
            accumulate(sums, update.metrics())
        if reference is None:
            sums.pop("kl_ref")
        worst = all_sum(
            [
                max(u.ratio_max for u in updates),
                -min(u.ratio_min for u in updates),
                max(u.gap for u in updates),
            ],
            dist.ReduceOp.MAX,
        ).tolist()
        tokens = sums["response_length"][0] + sum(len(g.prompt.input_ids) for g in groups)
        run.log(
            step,
            sums,
            {
                "loss": float(all_sum([sum(u.loss for u in updates)])[0]) / len(updates),
                "grad_norm": grad_norm,
                "learning_rate": rate,
                "ratio_max": worst[0],
                "ratio_min": -worst[1],
                "sampled_scored_gap": worst[2],
                "gen_batches": gen_batches,
                "tokens": float(all_sum([tokens])[0]),
                "rows_left_out": run.rows_left_out(),
            },
        )
        if step % config.logging_steps == 0 and groups:
            run.log_rollouts(
                step,
                rollout_rows(
                    rows[0][0],
                    texts[0],
                    reward=rewards[0],
                    accuracy=accuracy[0],
                    advantage=advantage[0],
                    length=[len(b) for b in groups[0].branches],
                ),
            )
        if step % config.save_steps == 0 and step < config.max_steps:
            run.save(step, save, {"policy": (policy, optimizer)}, progress)
    run.finish(save)
    say(f"saved {config.output_dir}")


def rollout_rows(example: Example, texts: list[str], **scores) -> list[dict]:
    """A group's rollouts with all their scores, for rollouts.jsonl."""
    question = "".join(
        part.get("text", "<image>")
        for message in example.messages
        for part in message["content"]
        if message["role"] == "user"
    )
    images = [
        image if isinstance(image, str) else f"{len(image)} bytes" for image in example.images
    ]
    return [
        {
            "row": example.where,
            "question": question,
            "images": images,
            "answer": example.answer,
            "response": text,
            **{name: float(values[i]) for name, values in scores.items()},
        }
        for i, text in enumerate(texts)
    ]


if __name__ == "__main__":
    main(train)
