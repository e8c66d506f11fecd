"""docs/one-step.md: every number on the page follows from the numbers above it, by this file's own
arithmetic, and its command makes such a page from a run."""

import json
import math
import re
import shutil
import statistics
from pathlib import Path

import pytest
from PIL import Image

from data import Group, encode_prompts, encode_response, make_packs
from docs import one_step
from model import load_policy, token_logprobs
from support.errors import UserError
from support.rows import load_data
from tests.conftest import ROOT, launch, lines
from tests.test_readme import names

VIEWS = ("perception", "reasoning")
ROUNDED = 0.0005  # how far a value of three decimals may be from what it was


class Page:
    """The tables and sentences of a page, with a row for each rollout."""

    def __init__(self, path: Path):
        text = path.read_text()
        prose = [line for line in text.splitlines() if not line.startswith("|")]
        self.text = " ".join(" ".join(prose).split())
        self.tables = {}
        for block in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
            head, _, *rows = (
                [c.strip() for c in r.strip("|").split(" | ")] for r in block.split("\n") if r
            )
            self.tables[head[-1]] = [dict(zip(self.unique(head), row)) for row in rows]
        self.rollouts = self.per_rollout("remark", "rollout")
        self.count = len(self.rollouts)
        assert sorted(self.rollouts) == list(range(1, self.count + 1))

    @staticmethod
    def unique(head: list[str]) -> list[str]:
        """The columns' names; of equal ones the later have a number behind them."""
        return [name if name not in head[:i] else f"{name} {i}" for i, name in enumerate(head)]

    def per_rollout(self, table: str, column: str) -> dict[int, dict]:
        """Number of the rollout -> its row, of those tables whose rows are rollouts."""
        found = {}
        for row in self.tables[table]:
            if re.fullmatch(r"\d+(, \d+)*", row[column]):
                found |= {int(number): row for number in row[column].split(", ")}
        return found

    def row(self, table: str, name: str) -> dict:
        """The row of a table that begins so."""
        (found,) = [row for row in self.tables[table] if [*row.values()][0].startswith(name)]
        return found

    def stated(self, pattern: str) -> float:
        """The number in a sentence."""
        (found,) = re.findall(pattern, self.text)
        return float(found)

    def named(self, pattern: str) -> set[int]:
        """The rollouts in a sentence."""
        (found,) = re.findall(pattern, self.text)
        return {int(number) for number in re.findall(r"\d+", found)}


def close(value, expected: float, within: float = 2 * ROUNDED):
    assert abs(float(value) - expected) <= within, (value, expected)


def check(page: Page) -> None:
    """Everything that a page states, from the numbers above it, in double precision."""
    scores = page.per_rollout("reasoning", "response")
    teacher = page.row("reasoning", "supervision response")
    whole = [n for n in scores if scores[n]["perception"] != "none"]
    broken = set(scores) - set(whole)
    assert broken == {n for n, row in page.rollouts.items() if row["remark"] == "format broken"}
    own = {view: {n: float(scores[n][view]) for n in whole} for view in VIEWS}
    good = {view: float(teacher[view]) for view in VIEWS}
    for view in VIEWS:
        for end, value in (
            ("highest", max(own[view].values())),
            ("lowest", min(own[view].values())),
        ):
            told = page.named(rf"{view.capitalize()}:[^.]*?(rollouts?[ \d,and]+) came {end}")
            assert {own[view][n] for n in told} == {value}

    # (9), (10), (11)
    rewards = page.per_rollout("advantage (11)", "rollout")
    means, stds = (page.row("advantage (11)", name) for name in ("mean", "standard deviation"))
    alpha = page.stated(r"alpha = ([\d.]+)")
    penalty = page.stated(r"1 - alpha, less ([\d.]+)")
    for view in VIEWS:
        replaced = {n: float(row[f"{view} (9)"]) for n, row in rewards.items()}
        for n in rewards:
            close(replaced[n], own[view][n] if n in whole else min(own[view].values()) - 1)
        mean, std = statistics.mean(replaced.values()), statistics.stdev(replaced.values())
        close(means[f"{view} (9)"], mean)
        close(stds[f"{view} (9)"], std)
        for n, row in rewards.items():
            z = (replaced[n] - mean) / (std + 1e-6)
            if std > 10 * ROUNDED:  # otherwise the roundings are as large as what is divided
                close(row[f"{view} (10)"], z, ROUNDED + ROUNDED * (2 + abs(z)) / std)
    advantage = {}
    for n, row in rewards.items():
        parts = [float(row[f"{view} (10)"]) for view in VIEWS]
        advantage[n] = float(row["advantage (11)"])
        close(advantage[n], alpha * parts[0] + (1 - alpha) * parts[1] - penalty * (n in broken))
    for end, value in (("Highest", max(advantage.values())), ("Lowest", min(advantage.values()))):
        told = page.named(rf"{end} advantage, (rollouts?[ \d,and]+)")
        assert {advantage[n] for n in told} == {value}
    sums = re.findall(r"`([-\d.]+(?: [*+-] [-\d.]+)+) = ([-\d.]+)`", page.text)
    assert len(sums) == 2 + bool(broken)
    for left, right in sums:
        assert set(left) <= set("0123456789.*+- ")
        close(right, eval(left))

    # (14) to (16)
    policy = page.per_rollout("log pi after it", "rollout")
    assert {n: float(row["A"]) for n, row in policy.items()} == advantage
    tokens = {n: int(row["T"]) for n, row in policy.items()}
    loss = -sum(advantage[n] * tokens[n] for n in policy) / sum(tokens.values())
    close(page.stated(r"sum\(T\) = (-?[\d.]+)"), loss, ROUNDED + 5e-5)
    moved = {
        n: float(row["log pi after it"]) - float(row["log pi before the step"])
        for n, row in policy.items()
    }
    told = re.findall(r"rollouts?[^.]*? (\d+) from (-?[\d.]+) to (-?[\d.]*\d)", page.text)
    for n, before, after in told:
        row = policy[int(n)]
        assert (before, after) == (row["log pi before the step"], row["log pi after it"])
    assert len(told) == 2
    against = {n for n in moved if moved[n] * advantage[n] < 0}
    if "against the sign of A" in page.text:
        told = page.named(r"(Rollouts?[ \d,and]+) moved against")
        assert against <= told  # a move that rounds to nothing has no sign here
        assert all(abs(moved[n]) <= 2 * ROUNDED for n in told - against)
        close(page.stated(r"at most ([\d.]+) in size"), max(abs(advantage[n]) for n in told))
    else:
        assert not against

    # (6), (7), (8)
    pairs = page.per_rollout("its loss", "rollout")
    assert set(pairs) == set(whole)
    mean = page.row("its loss", "mean")
    total = 0.0
    for view, column in (("perception", "its loss"), ("reasoning", "its loss 4")):
        gaps = {n: good[view] - own[view][n] for n in whole}
        losses = {n: math.log1p(math.exp(-gap)) for n, gap in gaps.items()}
        for n, row in pairs.items():
            close(row[f"{view} gap"], gaps[n], 3 * ROUNDED)
            close(row[column], losses[n])
        close(mean[f"{view} gap"], statistics.mean(gaps.values()), 3 * ROUNDED)
        close(mean[column], statistics.mean(losses.values()))
        total += statistics.mean(losses.values())
    terms = [(row["term"], float(row["value"])) for row in page.tables["value"]]
    squares = [
        statistics.mean(
            [*(good[view] ** 2 for view in VIEWS), *(own[view][n] ** 2 for view in VIEWS)]
        )
        for n in whole
    ]
    weight = float(terms[1][0].split(" * ")[0])
    weighed = float(terms[2][0].split(" * ")[0]) * page.stated(r"It is ([\d.]+) here")
    close(terms[0][1], total, 4 * ROUNDED)
    close(terms[1][1], weight * statistics.mean(squares), 1e-4)
    close(terms[2][1], weighed, 1e-4)
    close(terms[3][1], sum(value for _, value in terms[:3]), 2e-4)
    for view in VIEWS:
        close(page.stated(rf"in {view} from (-?[\d.]+) to"), float(mean[f"{view} gap"]))


def test_the_page():
    """It shows all that can go right and wrong, and every number follows."""
    page = Page(ROOT / "docs/one-step.md")
    check(page)
    remarks = [row["remark"] for row in page.rollouts.values()]
    for part in ("format broken", "caption right", "caption says", "answer right", "answer wrong"):
        assert any(part in remark for remark in remarks), part
    assert len(page.text.split()) <= 900
    with Image.open(ROOT / "docs/one-step.png") as image:
        assert image.format == "PNG" and max(image.size) <= 400


def test_the_functions_of_the_page():
    """Each is in the file that stands beside it. Its own text has the equation's number."""
    text = Page(ROOT / "docs/one-step.md").text
    named = re.findall(r"`([\w/]+\.py)`: `(\w+)`", text)
    assert all(name in names(file) for file, name in named) and len(named) >= 15
    assert {int(n) for n in re.findall(r"\((\d+)\)", text)} == {*range(2, 13), *range(14, 17)}


@pytest.fixture(scope="module")
def run(world, trained, tmp_path_factory):
    """A short alignment."""
    out = tmp_path_factory.mktemp("one_step") / "align"
    flags = dict(max_steps=2, num_generations=6, prompts_per_step=2, max_completion_length=96)
    models = ("--ckpt", trained, "--discriminator", trained, "--data", world["prompts"])
    rest = [word for name, value in flags.items() for word in (f"--{name}", value)]
    launch("align.py", *models, "--output_dir", out, "--learning_rate", 1e-4, *rest)
    return out


def recorded(run: Path, rows: list[dict], folder: Path) -> str:
    """The run with other recorded rollouts, in a folder of its own."""
    folder.mkdir()
    shutil.copy(run / "run.json", folder)
    (folder / "rollouts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder)


@pytest.mark.parametrize("step", [1, 2])
def test_the_command(run, world, trained, tmp_path, step):
    """The page of a run has the run's own rollouts, scores and advantages. Before the first step
    the models are those that the run was given, before the second those of its first."""
    rows = [row for row in lines(run / "rollouts.jsonl") if row["step"] == step]
    one_step.main(recorded(run, rows, tmp_path / "run"), str(tmp_path))
    page = Page(tmp_path / "one-step.md")
    check(page)
    assert page.stated(r"Step (\d+) of") == step and len(rows) == page.count == 6
    scores = page.per_rollout("reasoning", "response")
    rewards = page.per_rollout("advantage (11)", "rollout")
    for n, row in enumerate(rows, 1):
        for view in VIEWS:
            if row["valid"]:
                close(scores[n][view], row[view])
            else:
                assert scores[n][view] == "none"
        close(rewards[n]["advantage (11)"], row["advantage"])
    assert (tmp_path / "one-step.png").exists()

    # T and log pi, from the texts alone: each is encoded anew and scored in a forward of its own.
    # Before the first step the policy is the one that the run was given.
    told = page.per_rollout("log pi after it", "rollout")
    assert [int(told[n]["T"]) for n in told] == [int(rows[n - 1]["length"]) for n in told]
    if step == 1:
        policy, processor = load_policy(trained)
        (example,) = [e for e in load_data(world["prompts"]) if e.where == rows[0]["row"]]
        (prompt,) = encode_prompts(processor, [example])
        whole = [n for n in told if rows[n - 1]["valid"]]
        assert whole
        for n in whole:
            branch = encode_response(processor, rows[n - 1]["response"])
            (pack,) = make_packs([Group(prompt, [branch])])
            logp, _ = token_logprobs(policy, pack)
            close(told[n]["log pi before the step"], logp.sum().item())


def test_the_step_that_shows_most_is_chosen():
    """The earliest of those; a step in which no rollout keeps the format is none."""
    good = "<caption>1 and 2</caption>\n<think>t</think>\n<answer>3</answer>"
    misread, slip = good.replace("1 and", "4 and"), good.replace("3", "5")
    groups = [
        ["broken"],
        [good, good],
        [good, "broken"],
        [good, misread, slip],
        [good, misread, slip],
    ]
    rows = [
        {"step": step, "supervision": good, "answer": ["3"], "response": response}
        for step, responses in enumerate(groups, 1)
        for response in responses
    ]
    chosen, shown = one_step.choose(rows)
    assert [row["step"] for row in chosen] == [4] * 3
    assert shown == ["right and wrong captions", "right and wrong answers"]
    assert one_step.choose(rows[:1]) == ([], [])


def test_what_is_no_alignment(run, tmp_path):
    """One line says so. So it does where the models are not those of the run."""
    with pytest.raises(UserError, match="found no run.json and rollouts.jsonl"):
        one_step.main(str(tmp_path), str(tmp_path))
    rows = [row for row in lines(run / "rollouts.jsonl") if row["step"] == 1]
    rows[0]["response"] += " "
    other = recorded(run, rows, tmp_path / "other")
    with pytest.raises(UserError, match="gave other rollouts when it was played again"):
        one_step.main(other, str(tmp_path))
    assert not (tmp_path / "one-step.md").exists()
