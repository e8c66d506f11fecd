"""The study: what is counted in a response, the statistics, and that every number shown in
the documents is what the result files say."""

import html
import json
import re
import statistics
from pathlib import Path

import numpy as np
import pytest

from benchmarks import study
from support import digits
from tests.conftest import ROOT, launch


def test_drift():
    """Perception and reasoning are counted apart, by hand, in both wordings."""
    told = [
        ("sum", "What is the sum of the digits?", "the digits are 3, 8 and 5."),
        ("count", "How many digits are greater than 4?", "the digits are 7, 2 and 9."),
        ("spread", "How far apart are they?", "the digits are 1, 1 and 6."),
        ("sum", "What is the sum of the digits?", "the digits are 4, 4 and 4."),
        ("sum", "What is the sum of the digits?", "the digits are 1, 2 and 3."),
        ("sum", "What is the sum of the digits?", "the digits are 1, 9 and 2."),
        ("sum", "What is the sum of the digits?", "the digits are 7, 7 and 7."),
    ]
    truths = [{"source": kind, "question": q, "caption": [c]} for kind, q, c in told]
    said = [
        # one digit misread, one of two steps wrong, and so the answer
        "<caption>8, 8 and 5.</caption>\n<think>8 + 8 = 16, 16 + 5 = 20. So the answer is 20."
        "</think>\n<answer>20</answer>",
        # a digit is missing, a step of two is wrong, and so the answer
        "I see 7 2. 7 yes, 2 yes. The answer is 2.",
        # all right
        "I see 1 1 6. The largest is 6, the smallest is 1. 6 minus 1 is 5. The answer is 5.",
        # a digit too many; the only step is right, but of other digits, and so is the answer
        "<caption>4, 4, 4 and 4.</caption>\n<think>4 + 5 = 9.</think>\n<answer>9</answer>",
        "",
        # of digits that the public misread: right, and wrong
        "<caption>1, 9 and 2.</caption>\n<think>1 + 9 = 10, 10 + 2 = 12.</think>\n"
        "<answer>12</answer>",
        "<caption>7, 7 and 7.</caption>\n<think>It is 20.</think>\n<answer>20</answer>",
    ]
    rows = [{"row": i, "response": text} for i, text in enumerate(said)]
    found = study.drift(rows, truths)
    assert found["misread_per_digit"] == pytest.approx((1 + 1 + 0 + 1 + 3) / 21)
    assert found["wrong_per_step"] == pytest.approx((1 + 1 + 0 + 0) / (2 + 2 + 3 + 1 + 2))
    assert found["wrong_by_caption"] == pytest.approx((1 + 1 + 0 + 1 + 1 + 0 + 1) / 7)
    assert found["caption_items"] == pytest.approx((3 + 2 + 3 + 4 + 3 + 3) / 7)
    assert found["wrong_sums_read"] == 3 / 3  # an empty caption has no such digit
    assert found["wrong_sums_misread"] == 1 / 2
    assert study.drift(rows[1:2], truths)["wrong_sums_read"] is None  # no sum
    assert found["reasoning_steps"] == pytest.approx((2 + 2 + 3 + 1 + 2) / 7)


def test_statistics(monkeypatch):
    """Student's interval from its definition; paired differences keep their seeds together."""
    values = [0.5, 0.6, 0.9, 0.4]
    half = 3.182446 * statistics.stdev(values) / 2  # the 0.975 quantile of t with 3 degrees
    assert study.shown(values) == f"{statistics.mean(values):.3f}\xa0±\xa0{half:.3f}"
    assert study.shown([0.25]) == study.shown([0.25, 0.25]) == "0.250"
    noise = np.random.default_rng(0).normal(0, 0.3, 6)
    gaps = [0.01, 0.05, -0.02, 0.1, 0.03, 0.04]
    found = {}
    for seed, (x, gap) in enumerate(zip(noise, gaps)):
        found["a", seed] = {"accuracy": 0.5 + x + gap, "sampled_accuracy": x}
        found["b", seed] = {"accuracy": 0.5 + x, "sampled_accuracy": x}
    found["b", 9] = {"accuracy": 1.0}  # a seed without its other half does not count
    half = 2.570582 * statistics.stdev(gaps) / 6**0.5  # with 5 degrees
    mean = statistics.mean(gaps)
    said = f"{100 * mean:+.1f} ({100 * (mean - half):+.1f} to {100 * (mean + half):+.1f})"
    assert study.difference("a", "b", "accuracy", found) == said
    assert study.difference("a", "c", "accuracy", found) == ""
    monkeypatch.setattr(study, "SEEDS", range(10))
    table = study.differences([("a", "b"), ("a", "c")], found)
    assert table[1:] == [["a", "b", 6, "", "", said, "+0.0 (+0.0 to +0.0)"]]


def test_a_table():
    numbers = {"sft": (0.5, 0.7), "prism": (0.25,)}
    found = {
        (arm, seed): {"accuracy": x, "run_seconds": 61.4}
        for arm, values in numbers.items()
        for seed, x in enumerate(values)
    }
    columns = {"accuracy": "right", "run_seconds": "s"}
    half = 12.706205 * statistics.stdev(numbers["sft"]) / 2**0.5
    assert study.table(["base", "prism", "sft"], columns, found) == [
        ["arm", "seeds", "right", "s"],
        ["PRISM", 1, "0.250", "61"],
        ["SFT", 2, f"0.600\xa0±\xa0{half:.3f}", "61"],
    ]
    found["sft", 0]["accuracy"] = None  # what an arm does not have is left out
    assert study.table(["sft"], columns, found)[1] == ["SFT", 2, "0.700", "61"]
    assert study.table(["sft"], {"after_50": "sooner"}, found)[1] == ["SFT", 2, "-"]


def test_seeds_of_an_arm():
    found = {("sft", seed): {"accuracy": x} for seed, x in enumerate((0.2, 0.4, 0.3))}
    assert study.by_seed(["sft"], found)[1] == ["SFT", "0.200", "0.400", "0.300", "", ""]


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
            assert runs[at].data.split(":")[0] in DATA[runs[at].kind]
            at = runs[at].parent
    every = {*arms, *map(study.started, arms), *study.GAMES}
    assert len({study.label(name) for name in every}) == len(every)
    assert study.label("prism_16") == "PRISM, 16 responses"
    assert study.label("prism_16_grpo") == "PRISM, 16 responses, + GRPO"


DATA = {  # what a kind of run may learn from; nothing learns from rows that it is measured on
    "pretrain": ("pretrain",),
    "sft": ("sft", "curated"),
    "discriminator": ("curated",),
    "align": ("prompts",),
    "more_sft": ("prompts",),
    "rlvr": ("questions",),
}


def test_the_controls_are_matched():
    """They differ from what they are compared with in what they are named for, and in no more."""
    runs = study.stages()
    rl, longer = runs["sft_grpo"], runs["longer_grpo"]
    assert (longer.parent, longer.data) == (rl.parent, rl.data) == ("sft", "questions")
    assert longer.flags == rl.flags | {"max_steps": study.MATCHED}
    assert study.MATCHED > digits.SETTINGS["rlvr"]["max_steps"]
    for size in study.SIZES:
        arms = [study.of_size(start, size) for start in ("prism", "more_sft")]
        game, more = (runs[runs[arm].parent] for arm in arms)
        assert game.data == more.data == f"prompts:{size}" and game.parent == more.parent == "sft"
        assert len({str(runs[arm].flags) for arm in (*arms, "sft_grpo")}) == 1
    frozen, game = runs["frozen"], runs["prism"]
    assert frozen.flags == game.flags | {"discriminator_learning_rate": 0}


def test_the_results_are_of_these_settings():
    """Of each committed result, the settings of its last run are those that it would have now."""
    for (name, seed), result in study.results().items():
        stage = study.stages()[name]
        wanted = digits.SETTINGS[stage.kind] | stage.flags | {"seed": seed}
        wanted = {k: v for k, v in wanted.items() if k not in ("policy", "discriminator")}
        assert {k: result["settings"].get(k) for k in wanted} == wanted, (name, seed)
        assert result["run_seconds"] > 0 or name == "base"


def test_an_arm_from_its_first_run_to_its_numbers(world, trained, monkeypatch, tmp_path):
    """All of it at a tiny size, by the real stages; what is there is not made again."""
    calls = []

    def call(script, log, **flags):
        calls.append((script, Path(flags["output_dir"]).name))
        launch(script, *(f"--{name}={value}" for name, value in flags.items()))

    tiny = {k: v | dict(max_steps=2) if k != "eval" else v for k, v in digits.SETTINGS.items()}
    for kind in ("align", "rlvr"):
        tiny[kind] |= dict(prompts_per_step=2, num_generations=3, max_completion_length=48)
    for kind in ("pretrain", "sft"):
        tiny[kind] |= dict(learning_rate=1e-5, per_device_train_batch_size=4)
    tiny["discriminator"] |= dict(per_device_train_batch_size=4)
    taught = world | {"init": trained, "pretrain": world["prompts"]}  # it knows the format
    monkeypatch.setattr(digits, "SETTINGS", tiny)
    monkeypatch.setattr(study, "world", lambda seed: taught)
    monkeypatch.setattr(study, "OUT", tmp_path)
    monkeypatch.setattr(study, "STEPS", (1,))
    monkeypatch.setattr(study, "call", call)
    result = study.measure(0, "prism_grpo")
    made = [name for script, name in calls if script != "eval.py"]
    assert made == ["base", "sft", "warm_up", "prism", "prism_grpo"]
    for name, source in (("sft", "base"), ("prism", "sft"), ("prism_grpo", "prism")):
        settings = json.loads((tmp_path / f"seed-0/{name}/run.json").read_text())["run"]
        assert str(tmp_path / f"seed-0/{source}") in (settings.get("model"), settings.get("ckpt"))
    rows = [json.loads(line) for line in open(tmp_path / "seed-0/prism/rollouts.jsonl")]
    known = [json.loads(line)["response"] for line in open(taught["prompts"])][:24]
    assert {row["supervision"] for row in rows} <= set(known)
    columns = {*study.MAIN, *study.DRIFT, "after_1"} - {"run_seconds"}
    assert columns <= set(result)
    assert set(result["seconds"]) == {"base", "sft", "warm_up", "prism", "prism_grpo"}
    assert all(0 <= result[name] <= 1 for name in ("accuracy", "pass_at_8", "after_1"))
    more = study.measure(0, "prism")
    calls = [(script, name) for script, name in calls if script != "eval.py"]
    judged = [("discriminator.py", "own"), ("discriminator.py", "other")]
    assert [name for _, name in calls[:-2]] == made and calls[-2:] == judged
    ofs = ("warm_up", "own", "other")
    assert all(0 <= more[f"{of}_{view}"] <= 1 for of in ofs for view in study.VIEWS)
    own, other = (
        json.loads((tmp_path / f"seed-0/prism/{of}/run.json").read_text())["run"]["data"]
        for _, of in judged
    )
    responses = [{row["response"] for row in study.read_rows(data[0])} for data in (own, other)]
    assert len(responses[0]) > 1 and not responses[0] & responses[1]
    assert len(more["curves"]["step"]) == 2 and more["curves"]["experts_reasoning"][0]
    assert result["kl_from_base"] > 0
    base = study.kl_from_base(0, tmp_path / "seed-0/base", taught["test"])
    assert abs(base) < 1e-3  # of itself


@pytest.mark.parametrize("path", ["docs/study.md", "docs/paper-map.md"])
def test_what_is_shown_is_what_was_measured(path, tmp_path):
    """Writing every table again from the result files changes nothing."""
    text = (ROOT / path).read_text(encoding="utf-8")
    copy = tmp_path / "copy.md"
    copy.write_text(text, encoding="utf-8")
    study.write(copy)
    assert copy.read_text(encoding="utf-8") == text


def test_no_table_is_shown_twice():
    text = "".join(path.read_text() for path in (ROOT / "docs").glob("*.md"))
    marks = re.findall(r"<!-- (\w+) -->", text)
    assert len(marks) == len(set(marks)) and {"arms", "differences", "drift"} <= {*marks}


def numbers_said(page: str, section: str, tables: dict[str, list[list]]) -> tuple[set, set]:
    """The numbers in the sentences of a page's section, and those of them that no table holds."""
    text = (ROOT / page).read_text(encoding="utf-8")
    words = re.sub(r"<!--.*?-->.*?<!-- /.*?-->", "", text, flags=re.DOTALL)
    words = " ".join(words.split(f"## {section}")[1].split("\n## ")[0].split())
    number = r"[01]\.\d{3}|[+-]\d+\.\d(?: to [+-]\d+\.\d)?"
    numbers = set(re.findall(number, words))
    cells = [str(cell) for rows in tables.values() for row in rows for cell in row]
    return numbers, numbers - {x for cell in cells for x in re.findall(number, cell)}


def test_the_sentences_have_the_tables_numbers():
    """What docs/study.md says in words under "What it shows"."""
    numbers, missing = numbers_said("docs/study.md", "What it shows", study.tables())
    assert len(numbers) > 5 and not missing, missing


def test_the_picture_is_of_the_results(tmp_path):
    """The picture holds the numbers that it shows, and drawn again it holds the same."""

    def numbers(path):
        found = re.search("<dc:description>(.*?)</dc:description>", path.read_text("utf-8"))
        return json.loads(html.unescape(found[1]))

    drawing = (ROOT / "docs/study.svg").read_text("utf-8")
    shown = numbers(ROOT / "docs/study.svg")
    assert shown == json.loads(json.dumps(study.lines(study.results())))
    study.picture(tmp_path / "study.svg")
    assert numbers(tmp_path / "study.svg") == shown
    assert [title for title, *_ in shown] == [
        "Accuracy over RL",
        "Accuracy over the alignment's data",
    ]
    for title, _, series in shown:  # and each line is drawn at its means
        for name, points in series:
            if len({point[1] for point in points}) > 2:
                _, line = drawing.split(f'<g id="{title}: {name}">')
                where = re.search(r'<path d="(M [^"]+)"', line)[1]
                xy = np.array(re.findall(r"[ML] (\S+) (\S+)", where), float)
                means = np.array([point[1] for point in points])
                up, at = np.polyfit(means, xy[:, 1], 1)
                assert up < 0 and np.allclose(xy[:, 1], at + up * means, atol=0.01)
