"""The study of a discriminator that can judge: its world, its planted errors, and its tables."""

import hashlib
import html
import json
import random
import re
import statistics
from pathlib import Path

import pytest
import torch

from benchmarks import judge_study as study
from benchmarks import judging
from benchmarks.study import write
from data import parse_response
from support import digits
from tests.conftest import ROOT, WORLD, lines
from tests.test_digits import drawn, truth
from tests.test_study import numbers_said

KINDS = (study.COVERED, study.UNCOVERED)


def test_the_default_world_is_as_it_was(world, tmp_path):
    """The rows byte for byte, and a world that knows none of the study's fields still holds."""
    root = Path(world["prompts"]).parent
    own = sorted(
        path for path in world.values() if path.endswith(".jsonl")
    )  # other tests add files
    rows = b"".join(Path(path).read_bytes() for path in own)
    assert hashlib.sha256(rows).hexdigest().startswith("1ebd7ae8cc6415cb")
    fields = json.loads((root / "world.json").read_text())
    for name in ("answer_first", "question_kinds", "question_without", "scans_seed"):
        del fields[name]
    (tmp_path / "world.json").write_text(json.dumps(fields))
    assert digits._holds(tmp_path, digits.World(**WORLD))
    with pytest.raises(digits.UserError, match="another answer_first"):
        digits._holds(tmp_path, digits.World(**WORLD, answer_first=0.5))


def test_the_studys_world(tmp_path):
    """Supervision mostly states the answer first, RL asks less, and all seeds share their scans."""
    few = dict(prompt_rows=200, sft_rows=200, question_rows=40, validation_rows=8, test_rows=8)
    own = study.SHARED | study.DRAWN | few
    paths = digits.build(tmp_path / "world", digits.World(seed=3, **own))
    prompts = lines(paths["prompts"])
    first = ["<think>The answer is" in row["response"] for row in prompts]
    assert statistics.mean(first) == pytest.approx(0.7, abs=0.1)
    for row, states_it in zip(prompts, first):
        whole = digits.demonstration(*judging.task(row), first=states_it)
        assert whole == row["response"] and parse_response(whole).answer == row["answer"]
    for row in lines(paths["questions"]):
        kind, shown, _ = judging.task(row)
        assert kind == study.COVERED and not {3, 7, 9} & {*shown}
    assert {row["source"] for row in lines(paths["test"])} == {*KINDS}
    scans = [digits.split_scans(digits.World(seed=seed, scans_seed=7)) for seed in (0, 1)]
    assert scans[0] == scans[1] == digits.split_scans(digits.World(seed=7))


@pytest.mark.parametrize("error", judging.ERRORS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_planted_error_is_one_error(kind, error):
    """It is wrong, in what it is named for and in nothing else, in the manner of the response."""
    rng = random.Random(0)
    for n, (shown, details) in enumerate(drawn(kind, 300)):
        first = n % 2 == 0
        said = parse_response(judging.plant(kind, shown, details, first, error, rng))
        right = parse_response(digits.demonstration(kind, shown, details, first=first))
        assert said.think.startswith("The answer is") == first
        assert f"he answer is {said.answer}." in said.think
        if error == "misread":
            read = tuple(map(int, re.findall(r"\d", said.caption)))
            assert sum(a != b for a, b in zip(shown, read, strict=True)) == 1
            assert said == parse_response(digits.demonstration(kind, read, details, first=first))
            continue
        assert said.caption == right.caption and said.answer != truth(kind, shown, details)
        steps = digits.work(kind, shown, details)[0]
        assert (steps in said.think) == (error == "answer")
        if error == "slip" and kind == "count":  # it follows from the wrong step
            assert said.think.count("yes") == int(said.answer)


def test_the_oracle_knows(world):
    """Right captions, and reasoning in either manner, score above all others."""

    class Processor:
        class tokenizer:
            decode = staticmethod(lambda ids: "How many digits are greater than 4?")

    shown, details = (3, 7, 2, 9), [4]
    texts = [digits.demonstration("count", shown, details, first=first) for first in (False, True)]
    slip = judging.plant("count", shown, details, False, "slip", random.Random(0))
    answer = texts[0].replace("3 no", "3 yes")
    misread = digits.demonstration("count", (8, 7, 2, 9), details)
    students = [parse_response(text) for text in (*texts, slip, answer, misread)]
    prompt = type("", (), {"input_ids": torch.zeros(1)})
    comparison = judging.Comparison(prompt, students[0], [*students, None])
    judged = judging.oracle(torch.nn.Linear(1, 1), [comparison], Processor)
    assert judged.perception.tolist() == [[1, 1, 1, 1, 0, 0]]
    assert judged.reasoning.tolist() == [[1, 1, 0, 0.5, 0, 0]]
    assert judged.valid.tolist() == [[True] * 5 + [False]]


def test_tables_from_lines():
    """Differences keep their seeds together; what is said of them follows from the interval."""
    gaps, made = (0.10, 0.14, 0.12), []
    for seed, gap in enumerate(gaps):
        for arm, x in {"sft_grpo": 0.3, "prism_grpo": 0.3 + gap, "oracle_grpo": 0.9}.items():
            numbers = {name: x + seed / 100 for name in study.COLUMNS}
            made.append({"arm": arm, "seed": seed} | numbers)
    made[-1][study.UNCOVERED] = 0.2
    made.append(made[0] | {"seed": study.VALIDATION})  # a choice, which no table shows
    head, *rows = study.tables(made)["judge"]
    rows = {row[0]: dict(zip(head, row)) for row in rows}
    half = 4.302653 * statistics.stdev(gaps) / 3**0.5 * 100  # of t with 2 degrees
    mine = rows[study.LABELS["sft_grpo"]]
    assert mine["seeds"] == 3 and mine["is PRISM ahead?"] == "yes"
    said = f"+12.0 ({12 - half:+.1f} to {12 + half:+.1f})"
    assert mine["PRISM minus it, not covered"] == said
    assert mine["not covered by RL"].startswith("0.310")
    assert rows[study.LABELS["oracle_grpo"]]["is PRISM ahead?"] == "undecided"
    assert rows[study.LABELS["prism_grpo"]]["is PRISM ahead?"] == ""
    assert len(rows) <= 8
    assert study.verdict([-3.0, -2.0, -2.5]) == "no" and study.verdict([5.0]) == "undecided"


def test_every_arm_has_a_name_and_no_arm_learns_from_what_it_is_measured_on():
    runs = study.stages()
    for arm in [*study.ARMS, *study.ABLATIONS, *study.GRID]:
        stage = runs[study.LONGER.get(arm, arm)]
        assert stage.data in ("pretrain", "sft", "aligned", "all", "questions")
        assert arm in study.LABELS or arm in study.GRID
    games = [runs[name] for name in ("prism", "text", "dense", "blind")]
    assert len({str({**stage.flags, "discriminator": 0}) for stage in games}) == 1


def test_what_is_shown_is_what_was_measured(tmp_path):
    """Writing tables and picture again from the lines changes nothing."""
    known, page = lines(study.RESULTS), ROOT / "docs/judge-study.md"
    copy = tmp_path / "copy.md"
    copy.write_text(page.read_text("utf-8"), "utf-8")
    write(copy, study.tables(known))
    assert copy.read_text("utf-8") == page.read_text("utf-8")
    assert len(study.tables(known)["judge"]) <= 1 + 8
    drawing = page.with_suffix(".svg").read_text("utf-8")
    shown = json.loads(html.unescape(re.search("<dc:description>(.*?)</dc:d", drawing)[1]))
    assert shown == json.loads(json.dumps(study.points(study.results(known))))


@pytest.mark.parametrize(
    "page, section", [("docs/judge-study.md", "What was found"), ("README.md", "What was measured")]
)
def test_the_sentences_have_the_tables_numbers(page, section):
    """What is said in words of the second study."""
    numbers, missing = numbers_said(page, section, study.tables(lines(study.RESULTS)))
    assert numbers and not missing, missing
