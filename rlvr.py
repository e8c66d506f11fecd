"""Stage 3, reinforcement learning with verifiable rewards, by GRPO, DAPO or GSPO (PRISM, RLVR).

    (13)  R    = 0.8 * accuracy + 0.2 * format, 0 where the format is broken
    (10)  A    = group normalisation of R over the N rollouts of a prompt
    (14) - (16)  the clipped policy gradient of the algorithm                    policy_gradient.py
    (18)  DAPO: R - clip((length - (limit - buffer)) / buffer, 0, 1): overlong responses cost
    (19)  DAPO: groups whose accuracy has no spread are dropped, and prompts sampled until the
          batch is full

`--num_minibatches` and `--num_iterations` make several optimiser steps of one batch of rollouts;
then the ratio leaves 1 and the clips act.

    torchrun --nproc_per_node=8 rlvr.py --ckpt align_out --algorithm dapo --output_dir rl_out
    python rlvr.py                                                  the embedded world of digits
"""

import math
from dataclasses import dataclass, field
from functools import partial

import torch

from checkpoint import load_policy, save_policy
from data import SYSTEM_PROMPT, Group, decode, parse_response
from model import all_max, all_sum, learning_rate_at, optimizer_step, world_size
from policy_gradient import ALGORITHMS, group_advantage, policy_backward, rescore
from policy_gradient import policy_loss  # noqa: F401, others know it as rlvr.policy_loss
from rows import Example, RowError, UserError, load_data
from run import Count, Natural, Positive, Run, RunConfig, Schedule, Share, Weight, add, main
from run import start_verifier
from sampler import generate, sampling_flags
from verifier import verify

ACCURACY, FORMAT = 0.8, 0.2  # paper: 0.8, 0.2


@dataclass
class RLVRConfig(RunConfig):
    ckpt: str = "prism-vlm/Qwen3-VL-4B-Instruct-SFT-PRISM"  # the aligned policy, or any other
    data: list[str] = field(  # prompts with a ground truth; paper: 2K
        default_factory=lambda: [
            "hf://datasets/prism-vlm/rl_dataset/rl_training_data_filtered_2k.parquet"
        ]
    )
    output_dir: str = "out/rlvr"
    system_prompt: str = SYSTEM_PROMPT  # of rows without one, or a file that holds it
    algorithm: str = "grpo"  # grpo, dapo, gspo
    learning_rate: Weight = 1e-6  # paper: 1e-6
    lr_scheduler_type: Schedule = "constant"  # paper: constant
    warmup_steps: Weight | None = None  # paper: by algorithm, see ALGORITHMS
    weight_decay: Weight | None = None  # paper: by algorithm (its README: 0.01)
    max_steps: Count = 1500  # batches of rollouts; paper: 1500
    prompts_per_step: Count = 32  # paper: 32, over all ranks
    num_generations: Count = 16  # paper: 16 rollouts a prompt
    temperature: Positive = 1.0  # paper: 1.0
    max_prompt_length: Count = 2048  # paper: 2048
    max_completion_length: Count = 8192  # paper: 8192
    epsilon: Share | None = None  # clip low; paper: by algorithm
    epsilon_high: Weight | None = None  # clip high; None: the algorithm's, not --epsilon as in TRL
    dual_clip: Weight | None = None  # paper: by algorithm; 0: none
    beta: Weight = 0.0  # of the k3 KL to the starting policy; not stated, off here
    num_minibatches: Count = 1  # optimiser steps per pass over a batch; paper: 1
    num_iterations: Count = 1  # passes over a batch of rollouts; paper: 1
    max_gen_batches: Count = 10  # DAPO: sampled batches before giving up; paper: 10
    gen_batch_factor: Count = 3  # DAPO: prompts sampled at a time, in batches; paper: 96 / 32
    overlong_buffer: Natural = 4096  # DAPO: tokens over which the penalty grows to 1; paper: 4096
    max_grad_norm: Positive = 1.0  # not stated
    max_rollout_rows: Count | None = 32  # rows sampled at a time, others wait; None: all


def reward(response_text: str, ground_truth) -> float:
    """(13). A broken format earns nothing, whatever it says. `ground_truth` is an accepted answer
    or a list of them. Takes along: ACCURACY, FORMAT, data.parse_response, verifier.verify."""
    response = parse_response(response_text)
    return 0.0 if response is None else ACCURACY * verify(response.answer, ground_truth) + FORMAT


def overlong_penalty(length: torch.Tensor, limit: int, buffer: int) -> torch.Tensor:
    """(18), DAPO's soft punishment of overlong responses: 0 up to limit - buffer tokens, then
    linear to -1 at the limit; none where buffer is 0. Any shape -> the same."""
    return -((length - (limit - buffer)) / max(buffer, 1)).clamp(0, 1)


def spread(values: torch.Tensor) -> torch.Tensor:
    """(P, N) -> (P,): which groups have any spread."""
    return (values != values[:, :1]).any(1)


def select_groups(useful: torch.Tensor, number: list[int], wanted: int) -> tuple[list[int], int]:
    """(19): which of this rank's prompts to keep, and how many are kept on all ranks. Spread is
    that of accuracy, as in the release, whatever format and length earn.

    `useful` (P,) are this rank's prompts with spread, `number` their P places in the batch of all
    ranks. The first `wanted` useful ones of that are kept, so what is kept does not depend on the
    number of ranks. Every rank calls it."""
    flags = torch.zeros(int(all_max([max(number, default=0)])[0]) + 1)
    flags[number] = useful.float()
    order = all_sum(flags).cumsum(0)
    kept = useful & (order[number] <= wanted)
    return kept.nonzero()[:, 0].tolist(), min(wanted, int(order[-1]))


@dataclass
class Rollouts:
    """The N rollouts of one prompt, and what they earned."""

    example: Example
    group: Group
    texts: list[str]
    accuracy: torch.Tensor  # (N,) 1 where the answer is right
    valid: torch.Tensor  # (N,) 1 where the format is whole
    length: torch.Tensor  # (N,) tokens
    reward: torch.Tensor  # (N,) (13), in DAPO with (18)


def column(rollouts: list[Rollouts], name: str) -> torch.Tensor:
    """One measure of P prompts' rollouts as (P, N)."""
    return torch.stack([getattr(r, name) for r in rollouts]) if rollouts else torch.zeros(0, 1)


def train() -> None:
    run = Run(RLVRConfig)
    config = run.config
    settle_algorithm(config)
    start_verifier()
    examples = load_data(config.data, ("answer",), config.system_prompt, config.image_dir)
    policy, processor = load_policy("--ckpt", config.ckpt, run.device, config)
    policy.train()
    reference = load_policy("--ckpt", config.ckpt, run.device, config)[0] if config.beta else None
    decay = config.weight_decay
    optimizer = torch.optim.AdamW(policy.parameters(), weight_decay=decay, fused=True)

    dapo, wanted = config.algorithm == "dapo", config.prompts_per_step
    batch_size = wanted * (config.gen_batch_factor if dapo else 1)
    sampling = sampling_flags(config)

    def encode(example, prompt):
        if not any(verify(answer, answer) for answer in example.answer):
            raise RowError(f"the ground truth {example.answer} is one that no answer can match")
        return example, prompt

    def sample(batch: list, draw: int) -> list[Rollouts]:
        """Rollouts y ~ pi(x) of one batch of prompts, and their rewards (13), (18). `draw` keys the
        random numbers: 1000 of them belong to a step, one to each batch sampled in it."""
        with run.phase("rollout"):
            groups = generate(policy, [prompt for _, prompt in batch], step=draw, **sampling)
        out = []
        with run.phase("reward"):
            for (example, _), group in zip(batch, groups):
                texts = [decode(processor, branch) for branch in group.branches]
                earned = torch.tensor([reward(text, example.answer) for text in texts])
                accuracy = (earned > FORMAT).float()  # more than the format alone earns
                valid = torch.tensor([float(parse_response(text) is not None) for text in texts])
                length = torch.tensor([float(len(branch)) for branch in group.branches])
                if dapo:
                    limit, buffer = config.max_completion_length, config.overlong_buffer
                    earned = earned + overlong_penalty(length, limit, buffer)
                out.append(Rollouts(example, group, texts, accuracy, valid, length, earned))
        return out

    def dynamic_sampling(step: int) -> tuple[list[Rollouts], list[Rollouts], int]:
        """(19) -> (prompts kept, all prompts sampled, number of batches)."""
        kept, sampled, count = [], [], 0
        for number in range(config.max_gen_batches):
            new = sample(next(stream), step * 1000 + number)
            # The stream is cut into batches, so a place in it tells the place in its batch.
            places = [rolled.group.prompt.index % batch_size for rolled in new]
            useful = spread(column(new, "accuracy"))
            chosen, more = select_groups(useful, places, wanted - count)
            kept, sampled, count = kept + [new[i] for i in chosen], sampled + new, count + more
            if count == wanted:
                return kept, sampled, number + 1
        raise UserError(
            f"--algorithm dapo: {config.max_gen_batches} batches of {batch_size} prompts gave "
            f"{count} groups with any spread in accuracy, {wanted} are needed; take easier or "
            f"harder data, or more --max_gen_batches"
        )

    stream = run.batches(examples, processor, encode, batch_size)
    objective = dict(
        algorithm=config.algorithm,
        clips=(config.epsilon, config.epsilon_high, config.dual_clip),
        on_policy=config.num_minibatches * config.num_iterations == 1,
        reference=reference,
    )
    modules = {"policy": (policy, optimizer)}

    for step in run.steps(config.max_steps, modules, partial(save_policy, policy, processor)):
        # Prompts x, N rollouts y ~ pi(x) each, and their rewards.
        if dapo:
            rollouts, sampled, gen_batches = dynamic_sampling(step)
        else:
            rollouts = sampled = sample(next(stream), step * 1000)
            gen_batches = 1
        # Advantages (10).
        advantage = group_advantage(column(rollouts, "reward"))
        # The policy gradient (14) to (16), and a step of the optimiser, for each minibatch.
        updates, norms, rate = [], [], learning_rate_at(step, config.max_steps, config)
        generator = torch.Generator().manual_seed(config.seed * 1_000_003 + step)
        batches = []  # one after the other, those of each pass over the batch
        for _ in range(config.num_iterations):
            shuffled = torch.randperm(len(rollouts), generator=generator)
            for part in shuffled.tensor_split(config.num_minibatches):
                batches.append(([rollouts[i].group for i in part], advantage[part].flatten()))
        with run.phase("update"):
            for groups, _ in [] if objective["on_policy"] else batches[: config.num_minibatches]:
                gap = rescore(policy, groups, processor, config)
                updates.append(({}, {"sampled_scored_gap": gap}))
            for groups, a in batches:
                updates.append(policy_backward(policy, groups, a, processor, config, **objective))
                norms.append(optimizer_step(policy, optimizer, rate, config.max_grad_norm))

        # Where rows were left out, the last minibatches may be of nothing, and their norms 0.
        last = next((norm for norm in reversed(norms) if norm), 0.0)
        grad_norm = next((norm for norm in norms if not math.isfinite(norm)), last)
        values = {"grad_norm": grad_norm, "learning_rate": rate, "gen_batches": gen_batches}
        log_step(run, step, rollouts, sampled, advantage, updates, values)


def settle_algorithm(config: RLVRConfig) -> None:
    """Fills in what the algorithm sets and no flag has set. UserError for what is unknown."""
    if config.algorithm not in ALGORITHMS:
        raise UserError(f"--algorithm {config.algorithm}: choose one of {', '.join(ALGORITHMS)}")
    for name, value in ALGORITHMS[config.algorithm].items():
        if getattr(config, name) is None:
            setattr(config, name, value)
    of_rank = max(config.prompts_per_step // world_size(), 1)
    if config.num_minibatches > of_rank:
        raise UserError(
            f"--num_minibatches {config.num_minibatches}: more than a rank's {of_rank} prompts of "
            f"a step (--prompts_per_step)"
        )
    if config.algorithm == "dapo" and config.overlong_buffer >= config.max_completion_length:
        raise UserError(
            f"--overlong_buffer {config.overlong_buffer}: must be less than "
            f"--max_completion_length {config.max_completion_length}, or every length costs"
        )


def log_step(run, step, rollouts, sampled, advantage, updates, values) -> None:
    """The step's line in metrics.jsonl, and the first prompt's rollouts in rollouts.jsonl."""
    measures = {name: column(sampled, name) for name in ("accuracy", "reward")}
    measures |= {"format_valid": column(sampled, "valid")}
    measures |= {"response_length": column(sampled, "length")}
    measures |= {"groups_with_spread": spread(column(sampled, "accuracy"))}
    means = {name: (float(x.sum()), x.numel()) for name, x in measures.items()}
    peaks = {}
    for more, extremes in updates:
        means = add(means, more)
        for name, value in extremes.items():
            best = min if name.endswith("_min") else max
            peaks[name] = best(value, peaks.get(name, value))
    prompts = sum(len(rolled.group.prompt.input_ids) for rolled in rollouts)
    sums = {"tokens": means["response_length"][0] + prompts}
    run.log(step, means, sums, peaks, values)
    if rollouts:
        first = rollouts[0]
        columns = {n: getattr(first, n) for n in ("reward", "accuracy", "valid", "length")}
        run.log_rollouts(step, first.example, first.texts, advantage=advantage[0], **columns)


if __name__ == "__main__":
    main(train)
