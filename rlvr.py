"""Stage 3, reinforcement learning with verifiable rewards, by GRPO, DAPO or GSPO (PRISM, RLVR).

    (13)  R    = 0.8 * accuracy + 0.2 * format, 0 where the format is broken
    (10)  A    = group normalisation of R over the N rollouts of a prompt
    (14) - (16)  the clipped policy gradient of the algorithm                    policy_gradient.py
    (18)  DAPO: R is less by clip((length - (limit - buffer)) / buffer, 0, 1), so that overlong
          responses cost; limit is --max_completion_length and buffer --overlong_buffer, in tokens
    (19)  DAPO: groups whose accuracy has no spread are dropped, and prompts sampled until the
          batch is full

`--num_minibatches` and `--num_iterations` make several optimiser steps on one batch of rollouts.
Then the ratio leaves 1 and the clips act.

Deviations from the published run: D9 and D11 (policy_gradient.py) and D12 (the verifier).
docs/deviations.md has all of them, with the reasons.

    torchrun --nproc_per_node=8 rlvr.py --ckpt align_out --algorithm dapo --output_dir rl_out
    python rlvr.py                         without --ckpt and --data: the built-in digits
"""

from dataclasses import dataclass, field, replace
from functools import reduce
from typing import ClassVar, Literal

import torch

from data import Encoded, Group, decode, load_examples, parse_response, rank_packs
from model import load_policy
from policy_gradient import ALGORITHMS, Objective, group_advantage, policy_backward, rescore
from sampler import Sampling, generate
from support.ending import main
from support.errors import UserError, counted
from support.fields import Count, Natural, NonNegative, Positive, Share
from support.flags import RunConfig, Schedule
from support.huggingface import save_policy
from support.loader import keyed
from support.metrics import Max, Mean, add
from support.optimizer import adamw, learning_rate_at, optimizer_step
from support.ranks import all_max, all_sum, world_size
from support.rows import Example, check_truth
from support.run import Run, start_verifier
from support.verifier import verify

ACCURACY, FORMAT = 0.8, 0.2  # paper: 0.8, 0.2


@dataclass
class RLVRConfig(RunConfig):
    stage: ClassVar[str] = "rlvr"
    ckpt: str = "prism-vlm/Qwen3-VL-4B-Instruct-SFT-PRISM"  # the policy to train; paper: 4B, 8B
    data: list[str] = field(  # prompts with a ground truth; paper: 2K
        default_factory=lambda: [
            "hf://datasets/prism-vlm/rl_dataset/rl_training_data_filtered_2k.parquet"
        ]
    )
    output_dir: str = "out/rlvr"  # directory of the run's files and of the trained policy
    algorithm: Literal["grpo", "dapo", "gspo"] = "grpo"  # RL algorithm; paper: all three
    learning_rate: NonNegative = 1e-6  # peak learning rate; paper: 1e-6
    lr_scheduler_type: Schedule = "constant"  # schedule of the learning rate; paper: constant
    warmup_steps: NonNegative | None = None  # share if <1; none: grpo 0, dapo 10, gspo 0.05 (paper)
    weight_decay: NonNegative | None = None  # none: grpo 0.01, dapo and gspo 0.1 (paper)
    max_steps: Count = 1500  # steps of the run; paper: 1500
    prompts_per_step: Count = 32  # prompts in a step, over all ranks; paper: 32
    num_generations: Count = 16  # rollouts per prompt; paper: 16
    temperature: Positive = 1.0  # sampling temperature; paper: 1.0
    max_prompt_length: Count = 2048  # longest prompt in tokens; paper: 2048
    max_completion_length: Count = 8192  # longest rollout in tokens; paper: 8192
    epsilon: Share | None = None  # ratio's lower clip; none: grpo, dapo 0.2, gspo 3e-4 (paper)
    epsilon_high: NonNegative | None = None  # upper; none: grpo 0.2, dapo 0.28, gspo 4e-4 (paper)
    dual_clip: NonNegative | None = None  # (15); none: grpo 3, dapo 10 (paper); gspo 0: off (D11)
    beta: NonNegative = 0.0  # weight of the KL to the starting policy (17); paper: not stated
    num_minibatches: Count = 1  # optimiser steps per pass over a batch; paper: 1
    num_iterations: Count = 1  # passes over a batch of rollouts; paper: 1
    max_gen_batches: Count = 10  # DAPO: batches sampled before giving up; paper: 10
    gen_batch_factor: Count = 3  # DAPO: prompts of a batch / --prompts_per_step; paper: 96 / 32
    overlong_buffer: Natural = 4096  # DAPO: penalty grows to 1 over the last N tokens; paper: 4096
    max_grad_norm: Positive = 1.0  # gradients are clipped to this norm; paper: not stated
    max_rollout_rows: Count | None = 32  # rollouts that a rank samples at a time


def reward(response_text: str, ground_truth) -> tuple[float, bool]:
    """(13) -> (what a response earns, whether its answer is right). A broken format earns nothing
    and is not right, whatever it says. `ground_truth` is an accepted answer or a list of them.

    To train on a reward of your own, replace this function. Accuracy, spread, dynamic sampling and
    the check of ground truths follow the second value. That check calls it too, in the process that
    encodes rows.
    Takes along: ACCURACY, FORMAT, data.parse_response, support.verifier.verify."""
    response = parse_response(response_text)
    if response is None:
        return 0.0, False
    correct = verify(response.answer, ground_truth)
    return ACCURACY * correct + FORMAT, correct


def is_right(answer: str, ground_truth) -> bool:
    """Whether `reward` calls an answer right, in a response whose caption and thought are "-"."""
    text = f"<caption>-</caption><think>-</think><answer>{answer}</answer>"
    _, correct = reward(text, ground_truth)
    return correct


def overlong_penalty(length: torch.Tensor, limit: int, buffer: int) -> torch.Tensor:
    """(18), DAPO's soft punishment of overlong responses: 0 up to limit - buffer tokens, then
    linear to -1 at the limit; none where buffer is 0. Any shape -> the same."""
    return -((length - (limit - buffer)) / max(buffer, 1)).clamp(0, 1)


def has_spread(values: torch.Tensor) -> torch.Tensor:
    """(P, N) -> (P,) boolean: whether the values of a group differ."""
    return (values != values[:, :1]).any(1)


def select_groups(useful: torch.Tensor, places: list[int], wanted: int) -> tuple[list[int], int]:
    """(19): which of this rank's prompts to keep, and how many are kept on all ranks.

    `useful` (P,) tells which of this rank's P prompts have spread in accuracy; as in the release,
    format and length do not count. `places` (P,) tells where each stands in the batch of all ranks.
    The first `wanted` useful prompts of the whole batch are kept, so what is kept does not depend
    on the number of ranks. Every rank calls it."""
    last_place = int(all_max([max(places, default=0)])[0])
    is_useful = torch.zeros(last_place + 1)  # by place in the batch of all ranks: 1 or 0
    is_useful[places] = useful.float()
    useful_so_far = all_sum(is_useful).cumsum(0)
    kept = useful & (useful_so_far[places] <= wanted)
    return kept.nonzero()[:, 0].tolist(), min(wanted, int(useful_so_far[-1]))


@dataclass
class Rollouts:
    """The N rollouts of one prompt, and what they earned."""

    example: Example
    group: Group
    texts: list[str]
    reward: torch.Tensor  # (N,) (13), in DAPO with (18)
    accuracy: torch.Tensor  # (N,) 1 where the answer is right
    valid: torch.Tensor  # (N,) 1 where the format is whole
    length: torch.Tensor  # (N,) tokens


def column(rollouts: list[Rollouts], name: str) -> torch.Tensor:
    """One measure of P prompts' rollouts as (P, N). A rank may have no prompts: (0, 1)."""
    if not rollouts:
        return torch.zeros(0, 1)
    return torch.stack([getattr(rolled, name) for rolled in rollouts])


def train() -> None:
    run = Run(RLVRConfig)
    config = run.config
    settle_algorithm(config)
    start_verifier()
    examples = load_examples(config, ("answer",), config.ckpt)
    policy, processor = load_policy(config.ckpt, run.device, config)
    policy.train()
    reference = None
    if config.beta:
        reference, _ = load_policy(config.ckpt, run.device, replace(config, lora_rank=0))
    optimizer = adamw(policy, config.weight_decay)
    modules = {"policy": (policy, optimizer)}

    def encode(example, prompt):
        """A row as (row, prompt x). RowError where `reward` calls none of its answers right."""
        check_truth(example.answer, is_right)
        return example, prompt

    # A step trains on `wanted` prompts. DAPO will drop groups (19), so it draws more at a time.
    dapo = config.algorithm == "dapo"
    wanted = config.prompts_per_step
    batch_size = wanted * config.gen_batch_factor if dapo else wanted
    limits = dict(max_prompt_length=config.max_prompt_length, max_pixels=config.max_pixels)
    stream = run.batches(Encoded(examples, processor, encode, **limits), batch_size)
    sampling = Sampling.of(config)
    objective = Objective(
        algorithm=config.algorithm,
        clip_low=config.epsilon,
        clip_high=config.epsilon_high,
        dual_clip=config.dual_clip,
        temperature=config.temperature,
        beta=config.beta,
        on_policy=config.num_minibatches * config.num_iterations == 1,
    )

    def sample(batch: list, key: int) -> list[Rollouts]:
        """Rollouts y ~ pi(x) of one batch of prompts, and their rewards. `key` keys the random
        numbers: step * 1000 + the number of the batch in the step, so each batch has its own."""
        with run.phase("rollout"):
            groups = generate(policy, [prompt for _, prompt in batch], sampling, step=key)
        rollouts = []
        with run.phase("reward"):
            for (example, _), group in zip(batch, groups):
                texts = [decode(processor, branch, policy.stop_ids) for branch in group.branches]
                # The reward (13), and in DAPO the penalty for overlong responses (18).
                earned = [reward(text, example.answer) for text in texts]
                rewards = torch.tensor([value for value, _ in earned])
                length = torch.tensor([float(len(branch)) for branch in group.branches])
                if dapo:
                    limit, buffer = config.max_completion_length, config.overlong_buffer
                    rewards = rewards + overlong_penalty(length, limit, buffer)
                rollouts.append(
                    Rollouts(
                        example=example,
                        group=group,
                        texts=texts,
                        reward=rewards,
                        accuracy=torch.tensor([float(correct) for _, correct in earned]),
                        valid=torch.tensor([float(parse_response(t) is not None) for t in texts]),
                        length=length,
                    )
                )
        return rollouts

    def dynamic_sampling(step: int) -> tuple[list[Rollouts], list[Rollouts], int]:
        """(19) -> (prompts kept, all prompts sampled, number of batches)."""
        kept, sampled = [], []  # of this rank
        count = 0  # prompts kept on all ranks
        for number in range(config.max_gen_batches):
            batch = sample(next(stream), step * 1000 + number)
            # Batches are cut from the stream in order, so a prompt's place in the stream, modulo
            # the batch size, is its place in the batch.
            places = [rolled.group.prompt.index % batch_size for rolled in batch]
            useful = has_spread(column(batch, "accuracy"))
            chosen, kept_of_batch = select_groups(useful, places, wanted - count)
            kept += [batch[i] for i in chosen]
            sampled += batch
            count += kept_of_batch
            if count == wanted:
                return kept, sampled, number + 1
        remedy = "take easier or harder data, or raise --max_gen_batches"
        valid, rollouts = all_sum([float(column(sampled, "valid").sum()), float(len(sampled))])
        if rollouts and not valid:
            remedy = "no rollout has the format; start from a policy that SFT has taught it"
        raise UserError(
            f"--algorithm dapo: {config.max_gen_batches} x {batch_size} prompts gave "
            f"{count} prompts whose rollouts differ in accuracy, {wanted} are needed; {remedy}"
        )

    def save(path: str) -> None:
        save_policy(policy, path, examples.for_next_stage)

    for step in run.steps(config.max_steps, modules, save):
        # Draw prompts x, sample N rollouts y ~ pi(x) of each, and reward them (13). DAPO adds the
        # overlong penalty (18), and samples until enough groups have spread (19).
        if dapo:
            rollouts, sampled, gen_batches = dynamic_sampling(step)
        else:
            rollouts = sampled = sample(next(stream), step * 1000)
            gen_batches = 1

        # Normalise the rewards of each prompt's rollouts to advantages (10).
        advantage = group_advantage(column(rollouts, "reward"))

        # Cut the batch into minibatches, drawn anew in each pass over it.
        generator = torch.Generator().manual_seed(keyed(config.seed, step))
        minibatches = []  # (groups, their packs, their advantages)
        for _ in range(config.num_iterations):
            shuffled = torch.randperm(len(rollouts), generator=generator)
            for part in shuffled.tensor_split(config.num_minibatches):
                groups = [rollouts[i].group for i in part]
                packs = rank_packs(groups, processor, config.max_tokens_per_pack)
                minibatches.append((groups, packs, advantage[part]))

        # Step once for each minibatch.
        rate = learning_rate_at(step, config.max_steps, config)
        updates, grad_norms = [], []
        with run.phase("update"):
            # Before several steps on one batch, take the old log-probabilities from the training's
            # own forward. The minibatches of the first pass hold every group once. Later passes
            # train on the same Group objects, so they need no forward of their own.
            if not objective.on_policy:
                for groups, packs, _ in minibatches[: config.num_minibatches]:
                    gap = rescore(policy, packs, groups, config.temperature)
                    updates.append({"sampled_scored_gap": Max(gap)})
            # Add the clipped policy gradient (14) to (17) of each minibatch, and step.
            for groups, packs, a in minibatches:
                updates.append(policy_backward(policy, packs, groups, a, objective, reference))
                grad_norms.append(optimizer_step(policy, optimizer, rate, config.max_grad_norm))

        # Log the step, and the rollouts of the first prompt. Rewards and lengths are those of all
        # rollouts that were sampled, also where DAPO has dropped their group.
        grad_norm = float(torch.tensor(grad_norms).max())  # the largest; NaN where any is NaN
        length = column(sampled, "length")
        # `add` joins what the updates measured: of the losses it gives the mean.
        metrics = {
            **reduce(add, updates),
            "accuracy": mean_of(column(sampled, "accuracy")),
            "reward": mean_of(column(sampled, "reward")),
            "format_valid": mean_of(column(sampled, "valid")),
            "response_length": mean_of(length),
            "groups_with_spread": mean_of(has_spread(column(sampled, "accuracy"))),
            "grad_norm": grad_norm,
            "learning_rate": rate,
            "gen_batches": gen_batches,
        }
        prompt_tokens = sum(len(rolled.group.prompt.input_ids) for rolled in sampled)
        tokens = float(length.sum()) + prompt_tokens
        line = run.log(step, metrics, grad_norms=[grad_norm], tokens=int(tokens))
        run.look_at_format(step, line["format_valid"])
        if rollouts:
            first = rollouts[0]
            run.log_rollouts(
                step,
                first.example,
                first.texts,
                reward=first.reward,
                accuracy=first.accuracy,
                valid=first.valid,
                length=first.length,
                advantage=advantage[0],
            )


def mean_of(values: torch.Tensor) -> Mean:
    """The mean of all values, over the ranks."""
    return Mean(float(values.sum()), values.numel())


def settle_algorithm(config: RLVRConfig) -> None:
    """Fills in what the algorithm sets and no flag has set. UserError for flags that contradict
    each other."""
    for name, value in ALGORITHMS[config.algorithm].items():
        if getattr(config, name) is None:
            setattr(config, name, value)
    prompts = max(config.prompts_per_step // world_size(), 1)  # of a rank in a step
    if config.num_minibatches > prompts:
        raise UserError(
            f"--num_minibatches {config.num_minibatches}: a rank has "
            f"{counted(prompts, 'prompt')} in a step; give at most {prompts}, or raise "
            f"--prompts_per_step"
        )
    if config.algorithm == "dapo" and config.overlong_buffer >= config.max_completion_length:
        raise UserError(
            f"--overlong_buffer {config.overlong_buffer}: must be less than "
            f"--max_completion_length {config.max_completion_length}, or each response is penalised"
        )


if __name__ == "__main__":
    main(train)
