"""Stage 3 around the policy gradient: rewards, the overlong penalty, which groups are kept, and the
published numbers."""

import json
import random
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from policy_gradient import ALGORITHMS, group_advantage
from rlvr import (
    ACCURACY,
    FORMAT,
    RLVRConfig,
    Rollouts,
    column,
    has_spread,
    overlong_penalty,
    reward,
    select_groups,
    settle_algorithm,
)
from support.errors import UserError
from tests.conftest import ROOT, fails, launch, lines
from tests.test_policy_gradient import close, repeatable

RIGHT = "<caption>c</caption><think>t</think><answer>42</answer>"


def test_reward():
    """Format alone earns 0.2, a right answer in it 1, a right answer without it nothing."""
    assert (ACCURACY, FORMAT) == (0.8, 0.2)
    assert reward(RIGHT, "42") == reward(RIGHT, ["7", "42"]) == (1.0, True)
    assert reward(RIGHT, "43") == reward(RIGHT, ["41", "43"]) == (0.2, False)
    for broken in ("42", RIGHT + "42", RIGHT.replace("<think>", ""), RIGHT * 2, ""):
        assert reward(broken, "42") == (0.0, False)


def test_overlong_penalty_of_the_paper():
    """DAPO, eq. 13, at the published limit and buffer: nothing up to 4096 tokens, -1 at 8192."""
    lengths = [1, 4095, 4096, 4097, 6144, 8191, 8192]
    expected = [0, 0, 0, -1 / 4096, -0.5, -4095 / 4096, -1]
    close(overlong_penalty(torch.tensor(lengths, dtype=torch.float64), 8192, 4096), expected)
    close(overlong_penalty(torch.tensor(lengths), 8192, 4096), expected, 1e-6)  # integers, too


@given(limit=st.integers(1, 500), share=st.floats(0, 1), length=st.integers(0, 700))
@repeatable
def test_overlong_penalty(limit, share, length):
    buffer = max(1, round(share * limit))
    over = length - (limit - buffer)
    expected = 0 if over <= 0 else -1 if over >= buffer else -over / buffer
    close(
        overlong_penalty(torch.tensor([float(length)], dtype=torch.float64), limit, buffer),
        [expected],
    )


def test_overlong_penalty_without_a_buffer_is_none():
    """--overlong_buffer 0 switches the shaping off."""
    assert (overlong_penalty(torch.tensor([1.0, 99.0, 100.0]), 100, 0) == 0).all()


def test_spread():
    values = torch.tensor([[0.0, 0.0, 0.0], [1.0, 1.0, 1.0], [0.0, 1.0, 0.0], [0.3, 0.3, 0.30001]])
    assert has_spread(values).tolist() == [False, False, True, True]
    assert has_spread(torch.ones(2, 1)).tolist() == [False, False]


# --------------------------------------------------------------------------------------------------
# Which groups are kept


def drawn(ranks: int, cases: int = 300) -> list[tuple[list, list, int]]:
    """Of random batches, dealt to the ranks in turn, what is left of some rows that are left out:
    for each rank the flags and the numbers of its prompts; and how many are wanted."""
    rng = random.Random(7)  # the same batches for any ranks
    out = [([[] for _ in range(ranks)], [[] for _ in range(ranks)], 3)]
    for _ in range(cases):
        share, bad = rng.random(), rng.choice([0, 0.3])
        rows = [(n, rng.random() < share) for n in range(rng.randint(0, 12)) if rng.random() >= bad]
        of_ranks = [[row for row in rows if row[0] % ranks == r] for r in range(ranks)]
        numbers, flags = ([[row[i] for row in of] for of in of_ranks] for i in range(2))
        out.append((flags, numbers, rng.choice([0, *range(1, 9)])))
    return out


def kept_of(flags: list[list[bool]], numbers: list[list[int]], wanted: int) -> list[int]:
    """The numbers of the first `wanted` useful prompts of a batch, by a plain loop."""
    rows = sorted(pair for n, f in zip(numbers, flags) for pair in zip(n, f))
    return [number for number, useful in rows if useful][:wanted]


def test_select_groups_on_one_process():
    for (flags,), (numbers,), wanted in drawn(1):
        useful = torch.tensor(flags, dtype=torch.bool)
        chosen, kept = select_groups(useful, numbers, wanted)
        assert [numbers[i] for i in chosen] == kept_of([flags], [numbers], wanted)
        assert kept == len(chosen)


SELECT = """
import json, sys
import torch
from support.ranks import join_ranks, rank
from rlvr import select_groups
from support.ending import main

def stage():
    join_ranks()
    with open(sys.argv[1]) as file:
        cases = json.load(file)
    flags = [torch.tensor(u[rank()], dtype=torch.bool) for u, _, _ in cases]
    cases = [(f, n[rank()], wanted) for f, (_, n, wanted) in zip(flags, cases)]
    with open(sys.argv[2] + str(rank()), "w") as file:
        json.dump([select_groups(*case) for case in cases], file)

main(stage)
"""


def test_select_groups_on_two_ranks(tmp_path):
    """What is kept is what one process keeps, also where rows were left out, so that ranks have
    fewer prompts than others or none."""
    cases = drawn(2)
    (tmp_path / "choose.py").write_text(SELECT)
    (tmp_path / "cases.json").write_text(json.dumps(cases))
    launch(tmp_path / "choose.py", tmp_path / "cases.json", tmp_path / "out", ranks=2)
    of_ranks = [json.loads((tmp_path / f"out{r}").read_text()) for r in range(2)]
    uneven = 0
    for (flags, numbers, wanted), alone, *both in zip(cases, drawn(1), *of_ranks):
        kept = sorted(n[i] for n, (chosen, _) in zip(numbers, both) for i in chosen)
        assert kept == kept_of(flags, numbers, wanted) == kept_of(*alone)
        assert {count for _, count in both} == {len(kept)}
        uneven += len(flags[0]) != len(flags[1]) and 0 < len(kept) < sum(map(sum, flags))
    assert uneven > 20


def test_columns_of_rollouts():
    def rolled(number: float) -> Rollouts:
        measures = (torch.tensor([number, -number]) * i for i in range(1, 5))
        return Rollouts("example", "group", ["a", "b"], *measures)

    some = [rolled(3.0), rolled(5.0)]
    for i, name in enumerate(("reward", "accuracy", "valid", "length"), 1):
        assert column(some, name).tolist() == [[3.0 * i, -3.0 * i], [5.0 * i, -5.0 * i]]
    nothing = column([], "reward")  # a rank without prompts
    assert nothing.numel() == 0 and group_advantage(nothing).numel() == 0
    useful = has_spread(nothing)
    assert useful.tolist() == [] and select_groups(useful, [], 3) == ([], 0)


# --------------------------------------------------------------------------------------------------
# The published numbers


def test_defaults_are_the_papers():
    assert ALGORITHMS == {
        "grpo": {"epsilon": 0.2, "epsilon_high": 0.2, "dual_clip": 3.0}
        | {"warmup_steps": 0.0, "weight_decay": 0.01},
        "dapo": {"epsilon": 0.2, "epsilon_high": 0.28, "dual_clip": 10.0}
        | {"warmup_steps": 10.0, "weight_decay": 0.1},
        "gspo": {"epsilon": 0.0003, "epsilon_high": 0.0004, "dual_clip": 0.0}
        | {"warmup_steps": 0.05, "weight_decay": 0.1},
    }
    config = RLVRConfig()
    assert (config.learning_rate, config.lr_scheduler_type) == (1e-6, "constant")
    assert (config.max_steps, config.num_generations, config.temperature) == (1500, 16, 1.0)
    assert (config.max_prompt_length, config.max_completion_length) == (2048, 8192)
    assert config.prompts_per_step == 32  # over all ranks
    assert config.num_minibatches * config.num_iterations == 1  # one optimiser step a batch
    assert (config.beta, config.algorithm) == (0.0, "grpo")
    assert (
        32 * config.gen_batch_factor == 96
        and config.max_gen_batches == 10
        and config.overlong_buffer == 4096
    )
    by_algorithm = ("epsilon", "epsilon_high", "dual_clip", "warmup_steps", "weight_decay")
    assert all(getattr(config, name) is None for name in by_algorithm)


@pytest.mark.parametrize("algorithm", ["grpo", "dapo", "gspo"])
def test_flags_go_before_what_the_algorithm_sets(algorithm):
    config = RLVRConfig(algorithm=algorithm, epsilon_high=0.5, weight_decay=0.0)
    settle_algorithm(config)
    expected = {**ALGORITHMS[algorithm], "epsilon_high": 0.5, "weight_decay": 0.0}
    assert {name: getattr(config, name) for name in expected} == expected


def test_more_minibatches_than_prompts_are_refused():
    """Some would hold nothing, and each would be a step of the optimiser all the same."""
    settle_algorithm(RLVRConfig(algorithm="gspo", prompts_per_step=4, num_minibatches=4))
    with pytest.raises(UserError, match="--num_minibatches 5: a rank has 4 prompts"):
        settle_algorithm(RLVRConfig(algorithm="gspo", prompts_per_step=4, num_minibatches=5))


def test_an_unknown_algorithm_is_one_line():
    assert "invalid choice: 'ppo' (choose from" in fails("rlvr.py", "--algorithm", "ppo")


def test_a_reward_of_ones_own_changes_neither_accuracy_nor_spread(world, trained, tmp_path):
    """In a copy of the stage the reward is halved, and what is measured of accuracy stays. The
    rollouts of the first step are the same. So they are with the reward that the README prints,
    whose right answers are those that equal an accepted one."""
    text = (ROOT / "rlvr.py").read_text()
    halved = text.replace(
        "return ACCURACY * correct + FORMAT, correct",
        """\
return 0.5 * (ACCURACY * correct + FORMAT), correct""",
    )
    assert halved != text
    blocks = (ROOT / "README.md").read_text().split("```python\n")[1:]
    (printed,) = [block.split("```")[0] for block in blocks if "def reward" in block]
    rows = lines(world["prompts"])[:4]
    printed = re.sub(r"^def reward.*?(?=\n\n\n)", lambda _: printed, text, flags=re.M | re.S)
    measured = []
    for name, content in (("plain", text), ("halved", halved), ("printed", printed)):
        (tmp_path / f"{name}.py").write_text(content)
        flags = ("--ckpt", trained, "--data", world["prompts"], "--max_steps", 1)
        flags += ("--prompts_per_step", 8, "--num_generations", 4, "--max_completion_length", 64)
        out = tmp_path / name
        launch(str(tmp_path / f"{name}.py"), *flags, "--output_dir", out, real=True)
        measured.append(lines(out / "metrics.jsonl")[0])
    # The check of truths asks the reward of the stage too: the verifier takes no answer for NaN.
    unlike = tmp_path / "nan.jsonl"
    unlike.write_text("".join(json.dumps({**row, "answer": "NaN"}) + "\n" for row in rows))
    flags = ("--ckpt", trained, "--data", unlike, "--image_dir", Path(world["prompts"]).parent)
    flags += ("--max_steps", 1, "--prompts_per_step", 2, "--num_generations", 2)
    launch(str(tmp_path / "printed.py"), *flags, "--output_dir", tmp_path / "nan", real=True)
    refused = tmp_path / "refused"
    ended = launch("rlvr.py", *flags, "--output_dir", refused, check=False)
    assert ended.returncode == 2 and "error: not one row could be used" in ended.stderr
    assert "not one response" not in ended.stderr  # there was none that could have the format
    (why,) = {row["why"] for row in lines(refused / "left_out.jsonl")}
    assert why.startswith("no answer is right for the ground truth ['NaN'], not even itself; rewr")

    plain, halved, printed = measured
    for name in ("accuracy", "groups_with_spread", "format_valid", "response_length"):
        assert plain[name] == halved[name], name
    assert plain["reward"] > 0 and halved["reward"] == pytest.approx(plain["reward"] / 2)
    assert printed["response_length"] == plain["response_length"]
    assert 0 < printed["reward"] < printed["accuracy"] <= plain["accuracy"]
