"""The probe: that each share is what separate forwards of transformers give, that what cannot see
gets exactly a half, that it is the same on any number of ranks, that nothing was learned from its
rows, and that a run's log, its page and its user are told."""

import json
import os
import zlib
from types import SimpleNamespace

import pytest
import torch

import probe as probing
from align import AlignConfig
from data import encode_prompts, encode_views, parse_response
from discriminator import judge
from probe import KINDS, TRIALS, draw_trials, probe, trials_beside_the_game
from support.huggingface import load_processor
from support.loader import epoch_rows, hold_out
from support.rows import load_data
from tests.conftest import launch, lines
from tests.test_discriminator import alone, build

LONGEST = 2048
NAMES = [f"probe_{kind}" for kind in KINDS]


def shares(found: dict) -> dict:
    return {name: float(mean.total / mean.count) for name, mean in found.items()}


@pytest.fixture(scope="module")
def rows(world):
    return load_data(world["prompts"], ("response",))[:20]


def test_what_is_changed_in_a_trial(world, rows):
    """One thing, and it is the partner's: checked against the rows, encoded apart."""
    processor = load_processor(world["init"])
    trials = draw_trials(rows, processor, LONGEST)
    assert len(trials) == TRIALS
    own = dict(zip((row.index for row in rows), encode_prompts(processor, rows)))
    assert {trial.prompt.index for trial in trials} == own.keys()  # few rows come several times
    for one, two in zip(trials[::2], trials[1::2]):
        for trial, partner in ((one, two), (two, one)):
            mine, theirs = own[trial.prompt.index], own[partner.prompt.index]
            assert trial.response == parse_response(rows[trial.prompt.index].response)
            assert torch.equal(trial.prompt.pixel_values, mine.pixel_values)
            assert torch.equal(trial.other_picture.pixel_values, theirs.pixel_values)
            assert torch.equal(trial.other_picture.input_ids, mine.input_ids)
            assert torch.equal(trial.other_question.pixel_values, mine.pixel_values)
            assert torch.equal(trial.other_question.input_ids, theirs.input_ids)
            asks_the_same = torch.equal(mine.input_ids, theirs.input_ids)
            assert trial.has("picture") and trial.has("question") != asks_the_same
            a, b = trial.response, trial.changed
            (at,) = (i for i, (x, y) in enumerate(zip(a.caption, b.caption)) if x != y)
            assert a.caption[at].isdigit() and b.caption[at].isdigit() and trial.has("digit")
            assert b.think == a.think and b.answer == partner.response.answer
            assert trial.has("answer") == (a.answer != b.answer)
    again = draw_trials(rows, processor, LONGEST)
    assert [t.changed for t in again] == [t.changed for t in trials]
    assert len({t.changed for t in trials}) > len(rows)  # and with other digits


def test_rows_without_pictures_digits_or_another_question(world, rows):
    """What cannot be changed is not counted; one row has no partner."""
    processor = load_processor(world["init"])
    plain = "<caption>Nothing.</caption><think>So none.</think><answer>0</answer>"
    texts = [(1, "What is it?", []), (2, "What is it?", []), (3, "Where?", rows[0].images)]
    made = []
    for index, question, images in texts:
        parts = [{"type": "image"}] * len(images) + [{"type": "text", "text": question}]
        chat = [{"role": "user", "content": parts}]
        made.append(probing.Example(index, str(index), chat, images, response=plain))
    trials = draw_trials(made, processor, LONGEST)
    assert len(trials) == TRIALS and not any(t.has(kind) for t in trials for kind in KINDS)
    discriminator, _ = build(world)
    found = probe(judge, discriminator, trials, processor, 4000)
    assert all(found[name].count == 0 for name in NAMES)
    line = dict.fromkeys(NAMES)
    assert probing.in_words(line).startswith("no probe: it needs two usable rows")
    line["probe_digit"] = 0.5
    assert "not measured against another picture" in probing.in_words(line)
    assert draw_trials(made[:1], processor, LONGEST) == []
    assert draw_trials(made, processor, LONGEST, learned={"2", "3"}) == []
    assert draw_trials(made, processor, limit=3) == []


@pytest.mark.parametrize("kind", ["learned", "text"])
def test_each_share_is_that_of_separate_forwards(world, rows, kind, monkeypatch):
    monkeypatch.setattr(probing, "TRIALS", 12)
    discriminator, processor = build(world, kind)
    trials = draw_trials(rows, processor, LONGEST)

    def score(view, prompt, response):
        views = encode_views(processor, response)
        return alone(discriminator, prompt, views[view], view, processor)

    expected, ties = {}, set()
    with torch.no_grad():
        for name, view in zip(KINDS, (0, 0, 1, 1)):
            points = []
            for trial in (trial for trial in trials if trial.has(name)):
                right = score(view, trial.prompt, trial.response)
                if name in ("picture", "question"):
                    wrong = score(view, getattr(trial, f"other_{name}"), trial.response)
                else:
                    wrong = score(view, trial.prompt, trial.changed)
                points.append(0.5 if abs(right - wrong) < 1e-5 else float(right > wrong))
            expected[f"probe_{name}"] = sum(points) / len(points)
            ties |= {name} if 0.5 in points else set()
    discriminator.train()
    for max_tokens in (4000, 1):
        found = probe(judge, discriminator, trials, processor, max_tokens)
        assert shares(found) == pytest.approx(expected)
    assert discriminator.training and ties == ({"picture"} if kind == "text" else set())


@pytest.mark.parametrize("max_tokens", [100_000, 700, 1])
def test_the_text_only_discriminator_is_blind_in_perception(world, rows, max_tokens):
    """To the last bit, however packs are cut."""
    discriminator, processor = build(world, "text")
    found = probe(
        judge, discriminator, draw_trials(rows, processor, LONGEST), processor, max_tokens
    )
    assert shares(found)["probe_picture"] == 0.5 and found["probe_picture"].count == TRIALS


def test_a_score_that_holds_nothing_against_anything_gets_half(world, rows):
    """It likes some pictures, some questions, some answers; never this answer to this question."""
    processor = load_processor(world["init"])
    trials = draw_trials(rows, processor, LONGEST)

    def likes(thing) -> float:
        return zlib.crc32(str(thing).encode()) / 2**32

    def score(prompt, response) -> float:
        prefers = likes(prompt.pixel_values.sum()) + likes(prompt.input_ids)
        return prefers + likes(response.think) + likes(response.answer)

    def fond(_, comparisons, *args, **kwargs):
        """What probe asks of a judge, the same for both views."""
        teacher = torch.tensor([[score(c.prompt, c.teacher)] for c in comparisons])
        student = torch.tensor([[score(c.prompt, c.students[0])] for c in comparisons])
        supervision = dict(teacher_perception=teacher, teacher_reasoning=teacher)
        return SimpleNamespace(**supervision, perception=student, reasoning=student)

    found = shares(probe(fond, torch.nn.Identity(), trials, processor, 4000))
    assert found["probe_picture"] == found["probe_question"] == found["probe_answer"] == 0.5


# --------------------------------------------------------------------------------------------------
# Runs


@pytest.fixture(scope="module")
def warm_up(world, trained, tmp_path_factory):
    """A warm-up of two steps: its directory and what it said."""
    return warmed_up(world, trained, tmp_path_factory.mktemp("probe") / "d")


def warmed_up(world, trained, out, *flags, ranks=1) -> tuple:
    flags += ("--model", world["init"], "--policy", trained, "--data", world["curated"])
    flags += ("--max_steps", 2, "--max_completion_length", 60, "--validation_share", 0.2)
    return out, launch("discriminator.py", *flags, "--output_dir", out, ranks=ranks).stderr


def test_the_warm_up_ends_with_a_probe(warm_up):
    out, said = warm_up
    last = lines(out / "metrics.jsonl")[-1]
    assert "validation_pairs" in last and all(0 <= last[name] <= 1 for name in NAMES)
    (told,) = (line for line in said.splitlines() if line.startswith("probe, comparisons won"))
    assert told == probing.in_words(last)
    assert f"perception {last['probe_picture']:.2f} against another picture" in told
    assert f"{last['probe_answer']:.2f} against another answer" in told


def test_the_text_only_discriminator_is_blind_on_two_ranks(world, trained, tmp_path):
    out, _ = warmed_up(world, trained, tmp_path / "d", "--experts", "text", ranks=2)
    assert lines(out / "metrics.jsonl")[-1]["probe_picture"] == 0.5


def game(world, trained, discriminator, out, *flags, ranks=1):
    models = ("--ckpt", trained, "--discriminator", discriminator, "--data", world["prompts"])
    size = ("--num_generations", 2, "--max_completion_length", 40, "--prompts_per_step", 2)
    flags = (*models, *size, "--max_steps", 4, "--output_dir", out, *flags)
    return launch("align.py", *flags, ranks=ranks).stderr


def test_the_game_is_probed_on_any_number_of_ranks_and_left_as_it_is(
    world, trained, warm_up, tmp_path
):
    """At the first step and at every third. One prompt a step and rank; the warm-up's held-out
    rows. Probes change nothing else in the log."""
    found = {}
    for name, steps, ranks in (("none", 0, 1), ("one", 3, 1), ("two", 3, 2)):
        out = tmp_path / name
        flags = ("--probe_steps", steps, "--discriminator_learning_rate", 0)
        said = game(world, trained, warm_up[0], out, *flags, ranks=ranks)
        told = [line for line in said.splitlines() if "probe, comparisons won" in line]
        log = lines(out / "metrics.jsonl")
        measured = [line for line in log if "probe_picture" in line]
        assert [line["step"] for line in measured] == ([1, 3] if steps else [])
        assert told == [f"step {x['step']}: {probing.in_words(x)}" for x in measured]
        found[name] = [{k: line[k] for k in NAMES} for line in measured]
        volatile = ("time", "probe", "peak", "tokens_per")
        rest = [{k: v for k, v in x.items() if not k.startswith(volatile)} for x in log]
        if name == "none":
            expected = rest
        elif name == "one":
            assert rest == expected
    assert found["one"] == found["two"] and not found["none"]
    # The discriminator has not moved, so it is as blind as the warm-up's last line said.
    last = lines(warm_up[0] / "metrics.jsonl")[-1]
    assert found["one"] == [{name: last[name] for name in NAMES}] * 2


def test_nothing_was_learned_from_the_rows_of_a_probe(world, warm_up, tmp_path):
    processor = load_processor(world["init"])

    def drawn(discriminator, data, **flags):
        config = AlignConfig(discriminator=str(discriminator), **flags)
        examples = load_data(data, ("response",))
        trials = trials_beside_the_game(config, examples, processor)
        return examples, {trial.prompt.index for trial in trials}

    prompts, curated = world["prompts"], world["curated"]
    # Where nothing tells what the discriminator has learned from: what this run will not reach.
    examples, rows = drawn(world["init"], prompts, max_steps=90, prompts_per_step=4)
    assert rows and rows.isdisjoint(epoch_rows(0, 360, len(examples), 0)) and len(examples) == 400
    assert drawn(world["init"], prompts, max_steps=100, prompts_per_step=4)[1] == set()
    # The rows that the warm-up has held out, unless the game learns from these.
    held = set(hold_out(load_data(curated), 0.2, 0)[1].indices)
    assert drawn(warm_up[0], prompts)[1] == held and len(held) == 2
    assert drawn(warm_up[0], curated)[1] == set()
    # A warm-up that held out nothing, and those whose data are gone, or elsewhere.
    changes = {"none": {"validation_share": 0.0}, "gone": {"data": ["gone.jsonl"]}}
    changes["hub"] = {"data": ["hf://datasets/nobody/nothing/pairs.jsonl"]}
    for name, change in changes.items():
        record = json.loads((warm_up[0] / "run.json").read_text())
        os.makedirs(tmp_path / name)
        record["run"] |= change
        (tmp_path / name / "run.json").write_text(json.dumps(record))
        assert drawn(tmp_path / name, prompts, max_steps=1)[1] == set()


def test_a_game_without_rows_for_a_probe_says_so(world, trained, tmp_path):
    few = tmp_path / "few.jsonl"
    folder = os.path.dirname(world["prompts"])
    few.write_text("".join(open(world["prompts"]).readlines()[:3]))
    flags = ("--data", few, "--image_dir", folder, "--ckpt", trained, "--prompts_per_step", 1)
    flags += ("--num_generations", 2, "--max_completion_length", 20, "--max_steps", 3)
    flags += ("--discriminator", world["init"], "--output_dir", tmp_path / "out")
    said = launch("align.py", *flags).stderr
    assert said.count("no probes:") == 1 and "0.5 is blind" not in said
    assert "probe_picture" not in lines(tmp_path / "out/metrics.jsonl")[0]
