"""The study: what is counted in a response, the statistics, and that every number shown in
STUDY.md and in the README is what the result files say."""

import html
import json
import re
import statistics

import numpy as np
import pytest

from benchmarks import study
from tests.conftest import ROOT


def test_drift():
    """Perception and reasoning are counted apart, by hand, in both wordings."""
    truths = [
        {"caption": ["the digits are 3, 8 and 5."], "question": "What is the sum of the digits?"},
        {"caption": ["the digits are 7, 2 and 9."], "question": "Count the digits greater than 4."},
        {"caption": ["the digits are 1, 1 and 6."], "question": "How far apart are they?"},
    ]
    said = [
        "<caption>8, 8 and 5.</caption>\n<think>8 + 8 = 16, 16 + 5 = 20.</think>"
        "\n<answer>20</answer>",
        "I see 7 2. 7 yes, 2 yes. The answer is 2.",
        "I see 1 1 6. The largest is 6, the smallest is 1. 6 minus 1 is 5. The answer is 5.",
    ]
    rows = [{"row": i, "response": text} for i, text in enumerate(said)]
    found = study.drift(rows, truths)
    assert found["misread_per_digit"] == pytest.approx((1 + 1 + 0) / 9)
    assert found["wrong_per_step"] == pytest.approx((1 + 1 + 0) / (2 + 2 + 3))
    assert found["caption_items"] == pytest.approx((3 + 2 + 3) / 3)
    assert found["reasoning_steps"] == pytest.approx(7 / 3)


def test_statistics():
    """Student's interval from its definition; paired differences keep their seeds together."""
    values = [0.5, 0.6, 0.9, 0.4]
    half = 3.182446 * statistics.stdev(values) / 2  # the 0.975 quantile of t with 3 degrees
    assert study.shown(values) == f"{statistics.mean(values):.3f}\xa0±\xa0{half:.3f}"
    assert study.shown([0.25]) == "0.250"
    noise = np.random.default_rng(0).normal(0, 0.3, 6)
    found = {}
    for seed, x in enumerate(noise):
        found["a", seed], found["b", seed] = {"accuracy": 0.55 + x}, {"accuracy": 0.5 + x}
    found["b", 9] = {"accuracy": 1.0}  # a seed without its other half does not count
    n, mean, low, high = study.difference("a", "b", found)
    assert n == 6 and all(abs(x - 0.05) < 1e-9 for x in (mean, low, high))
    assert study.difference("a", "c", found) is None


def test_every_arm_is_a_chain_of_runs():
    runs = study.stages()
    arms = [*study.ARMS, *study.CONTROLS, *study.ABLATIONS, *study.FIGURE]
    assert set(arms) <= set(runs) and len(arms) == len(set(arms))
    for name in arms:
        at, seen = name, []
        while at != "init":
            assert at not in seen
            seen.append(at)
            assert all(parent in runs or parent == "init" for parent in runs[at].parents)
            at = runs[at].parent
    assert len({study.label(name) for name in arms}) == len(arms)


@pytest.mark.parametrize("path", ["benchmarks/STUDY.md", "README.md"])
def test_what_is_shown_is_what_was_measured(path, tmp_path):
    """Writing every table again from the result files changes nothing."""
    text = (ROOT / path).read_text(encoding="utf-8")
    copy = tmp_path / "copy.md"
    copy.write_text(text, encoding="utf-8")
    study.write(copy)
    assert copy.read_text(encoding="utf-8") == text
    marks = {name for name in study.tables() if f"<!-- {name} -->" in text}
    assert marks >= ({"short", "differences"} if path == "README.md" else {"arms", "drift"})


def test_the_picture_is_of_the_results(tmp_path):
    """The README's picture holds the numbers that it shows, and drawn again it holds the same."""

    def numbers(path):
        found = re.search("<dc:description>(.*?)</dc:description>", path.read_text("utf-8"))
        return json.loads(html.unescape(found[1]))

    shown = numbers(ROOT / "docs/study.svg")
    assert shown == json.loads(json.dumps(study.lines(study.results())))
    study.picture(tmp_path / "study.svg")
    assert numbers(tmp_path / "study.svg") == shown
    assert [title for title, *_ in shown] == ["Accuracy over RL", "Accuracy after RL"]
