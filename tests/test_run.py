"""Runs of the stages as processes: a run that was killed and resumed equals one that was not,
numbers that are not finite are skipped and named, and bad rows are counted. Most processes are
forks of one that has imported everything (chaos.py), so they start at once. Other test_run_*.py
test how a run resumes, how it ends, and what it does on a full disk."""

import dataclasses
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from data import Encoded
from model import load_policy
from sampler import Sampling, generate
from sft import SFTConfig
from support.errors import UserError
from support.loader import batches, epoch_rows
from support.rows import load_data
from support.run import Run
from tests.chaos import STAGES, STEPS, differences, fuzz, in_a_save, with_data
from tests.conftest import ROOT, lines
from tests.runs import checkpoints, files, refused, stopped_at, until

# --------------------------------------------------------------------------------------------------
# Exactness


@pytest.mark.parametrize(
    "script, ranks", [("align.py", 2), *((script, 1) for script in reversed(STAGES))]
)
def test_what_ended_and_went_on_equals_what_did_not(nursery, whole, tmp_path, script, ranks):
    """To the last bit, also where the run without an end has saved nothing and the other one every
    step: killed in the middle of a save and killed elsewhere; told to stop by SIGTERM."""
    base, expected = whole(script, ranks)
    words = [*base, "--save_steps", 1, "--resume", "--output_dir"]
    killed, stopped, log = tmp_path / "killed", tmp_path / "stopped", tmp_path / "log"

    for moment in (
        lambda: (killed / "checkpoint-1").exists(),
        lambda: (killed / "checkpoint-2").exists() and in_a_save(killed),
    ):
        started = nursery.start(*words, killed, ranks=ranks, log=log)
        until(lambda: moment() or started.gone())
        started.signal(signal.SIGKILL)
        assert set(started.wait()) == {-signal.SIGKILL}, started.said
        assert not (killed / "model.safetensors").exists()
    done = nursery.run(*words, killed, ranks=ranks, log=log)
    assert done.codes == [0] * ranks and "resumed from" in done.said, done.said
    assert differences(expected, killed) == []

    started = nursery.start(*words, stopped, ranks=ranks, log=log)
    until(lambda: (stopped / "checkpoint-1").exists() or started.gone())
    started.signal(signal.SIGTERM)
    assert started.wait() == [0] * ranks, started.said
    (where,) = re.findall(r"stopped by a signal; saved (\S+), go on with --resume", started.said)
    assert Path(where) == stopped / f"checkpoint-{checkpoints(stopped)[-1]}"
    assert "Traceback" not in started.said and started.errors == []
    done = nursery.run(*words, stopped, ranks=ranks, log=log)
    assert done.codes == [0] * ranks and f"resumed from {where}" in done.said, done.said
    assert differences(expected, stopped) == []


@pytest.mark.parametrize("script", ["sft.py", "align.py"])
def test_saving_changes_nothing(nursery, whole, tmp_path, script):
    base, expected = whole(script)
    words = ("--save_steps", 1, "--save_total_limit", 3, "--output_dir", tmp_path / "out")
    done = nursery.run(*base, *words, log=tmp_path / "log")
    assert done.codes == [0] and differences(expected, tmp_path / "out") == []
    assert checkpoints(tmp_path / "out") == list(range(STEPS - 3, STEPS))
    assert all(any(k.startswith("time/") for k in s) for s in lines(expected / "metrics.jsonl"))


SLOW_SAVE = '''"""Stage 1, whose checkpoints take a while to be written."""

import time

from torch.distributed.checkpoint import FileSystemWriter

import sft
from support.ending import main

plain = FileSystemWriter.write_data


def slowly(*args):
    time.sleep(5)
    return plain(*args)


FileSystemWriter.write_data = slowly
main(sft.train)
'''


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("end", ["killed in it", "killed after it", "told to stop in it"])
def test_training_goes_on_during_a_save(nursery, whole, tmp_path, ranks, end):
    """What is saved is what the weights were when the save began, whatever they became since; a
    save that is under way when the run ends is lost when it is killed, and awaited otherwise."""
    base, expected = whole("sft.py", ranks)
    script, out, log = tmp_path / "sft.py", tmp_path / "out", tmp_path / "log"
    script.write_text(SLOW_SAVE)
    words = (*base[1:], "--output_dir", out, "--save_steps", 2)
    started = nursery.start(script, *words, ranks=ranks, log=log)
    logged = lambda: (out / "metrics.jsonl").exists() and len(lines(out / "metrics.jsonl"))
    until(lambda: logged() >= 3 or started.gone())
    assert in_a_save(out) and checkpoints(out) == []
    if end == "killed after it":
        until(lambda: checkpoints(out) == [2] or started.gone())
    started.signal(signal.SIGTERM if end.startswith("told") else signal.SIGKILL)
    codes = started.wait()
    if end.startswith("told"):
        assert codes == [0] * ranks and "Traceback" not in started.said, started.said
        assert f"saved {out}/checkpoint-{checkpoints(out)[-1]}, go on" in started.said
        assert checkpoints(out)[0] == 2 and not in_a_save(out)
    else:
        assert checkpoints(out) == ([2] if end == "killed after it" else [])
    done = nursery.run(*base, "--output_dir", out, "--resume", ranks=ranks, log=log)
    assert done.codes == [0] * ranks, done.said
    assert differences(expected, out) == [] and not in_a_save(out)


def test_hugging_face_directories_come_when_they_are_asked_for(nursery, whole, tmp_path):
    base, expected = whole("sft.py")
    words = ("--save_steps", 3, "--save_hf_steps", 2, "--save_total_limit", 9)
    done = nursery.run(*base, *words, "--output_dir", tmp_path / "out", log=tmp_path / "log")
    assert done.codes == [0] and differences(expected, tmp_path / "out") == []
    assert checkpoints(tmp_path / "out") == [2, 3, 4]
    for step in (2, 3, 4):
        names = set(os.listdir(tmp_path / "out" / f"checkpoint-{step}"))
        whole_model = {"model.safetensors", "config.json", "tokenizer.json"}
        assert "state" in names and (whole_model <= names) == (step != 3)
        assert step != 3 or names == {"state", "checksums.json"}


def test_the_comparison_sees_a_difference(whole, tmp_path):
    """One bit of one weight, one digit of one metric, one step too few."""
    _, expected = whole("sft.py")
    out = shutil.copytree(expected, tmp_path / "out")
    assert differences(expected, out) == []
    weights = load_file(out / "model.safetensors")
    name = max(weights)
    weights[name].view(torch.int32).flatten()[0] ^= 1
    save_file(weights, out / "model.safetensors", {"format": "pt"})
    steps = lines(out / "metrics.jsonl")
    steps[1]["loss"] += 1e-9
    (out / "metrics.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
    one, two = differences(expected, out)
    assert one == "step 2: loss" and two.startswith("model.safetensors: 1 of")


@pytest.mark.parametrize("images", [False, True])
def test_weights_that_have_no_gradient_resume_as_well(nursery, world, tmp_path, images):
    """Rows without images: what sees images has no moments yet when the run is stopped, and none
    or some afterwards."""
    rows = [json.loads(line) for line in open(world["sft"])]
    data, folder = tmp_path / "rows.jsonl", os.path.dirname(world["sft"])
    shown = [
        [os.path.join(folder, r["images"][0])] if images and i % 3 == 0 else []
        for i, r in enumerate(rows)
    ]
    text = [
        json.loads(json.dumps(r).replace("<image>", "" if not s else "<image>"))
        for r, s in zip(rows, shown)
    ]
    data.write_text("".join(json.dumps(r | {"images": s}) + "\n" for r, s in zip(text, shown)))
    base = ["sft.py", "--model", world["init"], "--data", data, "--image_dir", folder]
    base += ["--max_steps", STEPS, "--learning_rate", 1e-3, "--per_device_train_batch_size", 1]
    base += ["--seed", 3]
    done = nursery.run(*base, "--output_dir", tmp_path / "whole", log=tmp_path / "log")
    assert done.codes == [0], done.said
    stopped_at(nursery, base, tmp_path / "out", 1)
    done = nursery.run(*base, "--output_dir", tmp_path / "out", "--resume", log=tmp_path / "log")
    assert done.codes == [0], done.said
    assert differences(tmp_path / "whole", tmp_path / "out") == []


def test_held_out_numbers_belong_to_the_run(nursery, whole, tmp_path):
    """A run is finished only with them: killed while it measures, it measures again."""
    base, expected = whole("discriminator.py")
    out, words = tmp_path / "out", ("--output_dir", tmp_path / "out", "--resume")
    started = nursery.start(*base, "--save_steps", 1, *words, log=tmp_path / "log")
    finished = lambda: "finished" in json.loads((out / "run.json").read_text())
    until(lambda: (out / "model.safetensors").exists() or started.gone())
    started.signal(signal.SIGSTOP)
    measured = any("validation_pairs" in line for line in lines(out / "metrics.jsonl"))
    assert measured or not finished()
    started.signal(signal.SIGKILL)
    started.wait()
    nursery.run(*base, *words, log=tmp_path / "log")
    assert differences(expected, out) == []


def test_run_json_says_how_the_run_was_made(nursery, whole, tmp_path):
    """The stage, the command as a shell takes it, the commit, every flag; and, once all of it is
    written, the last step."""
    base, _ = whole("sft.py")
    out = tmp_path / "a folder's"  # a shell takes it in quotes only
    stopped_at(nursery, base, out, 2)
    assert list(json.loads((out / "run.json").read_text())) == ["stage", "command", "commit", "run"]
    more = ("--output_dir", out, "--seed", 5, "--resume")
    done = nursery.run(*base, *more, log=tmp_path / "log")
    assert done.codes == [0], done.said
    record = json.loads((out / "run.json").read_text())
    assert list(record) == ["stage", "command", "commit", "run", "rounding_loss", "finished"]
    assert (record["stage"], record["finished"]) == ("sft", STEPS)
    assert shlex.split(record["command"]) == [*map(str, (*base, *more))]
    git = ["git", "rev-parse", "HEAD"]
    commit = subprocess.run(git, cwd=ROOT, capture_output=True, text=True).stdout.strip()
    if commit:  # else this is a bare copy of the files
        short = record["commit"].removesuffix("-dirty")
        assert len(short) >= 7 and commit.startswith(short)
    fields = record["run"]
    assert fields.keys() == {field.name for field in dataclasses.fields(SFTConfig)}
    assert (fields["seed"], fields["output_dir"], fields["resume"]) == (5, str(out), True)
    assert (fields["learning_rate"], fields["max_steps"]) == (1e-3, STEPS)


# --------------------------------------------------------------------------------------------------
# Numbers that are none


def broken(path: str, out: Path, *names: str) -> Path:
    """A copy of a model with one NaN in a weight."""
    shutil.copytree(path, out, ignore=shutil.ignore_patterns("checkpoint-*"))
    weights = load_file(out / "model.safetensors")
    name = next(k for k in weights if k.endswith(names))
    weights[name].view(-1)[0] = math.nan
    save_file(weights, out / "model.safetensors", {"format": "pt"})
    return out


@pytest.mark.parametrize("script", ["sft.py", "discriminator.py", "align.py", "align.py policy"])
def test_nan_in_the_weights_ends_the_run(nursery, short, trained, tmp_path, script):
    """Also where the run has fewer steps than may be skipped in a row; nothing is saved."""
    script, of_policy = script.split()[0], script.endswith("policy")
    base = short(script)
    flag = {"align.py": "--ckpt" if of_policy else "--discriminator"}.get(script, "--model")
    path = str(base[base.index(flag) + 1])
    model = broken(path, tmp_path / "nan", "language_model.norm.weight")
    for number, flags in enumerate((("--max_skipped", 3), ("--max_steps", 2))):
        out = tmp_path / f"out{number}"
        words = (*base, flag, model, "--output_dir", out, *flags, "--save_steps", 1)
        line = refused(nursery.start(*words, log=tmp_path / "log"))
        assert checkpoints(out) == [] and not (out / "model.safetensors").exists()
        if script != "align.py":  # there a step without a valid rollout has no gradient at all
            assert ("3 steps in a row up to step" in line) == (number == 0), line
            named = lines(out / "skipped.jsonl")
            assert [line["step"] for line in named] == ([1, 2] if number else [1, 2, 3])


def test_a_good_checkpoint_outlives_a_run_that_breaks(nursery, whole, stopped, tmp_path):
    """The weights overflow after a resumption: what is saved then must not push out what was."""
    base, expected = whole("sft.py")
    out = shutil.copytree(stopped, tmp_path / "out")
    newest = checkpoints(out)[-1]
    before = files(out / f"checkpoint-{newest}")
    more = ("--save_steps", 1, "--max_steps", 100, "--learning_rate", 1e30, "--resume")
    words = (*base, *more, "--output_dir", out, "--lr_scheduler_type", "constant")
    refused(nursery.start(*words, log=tmp_path / "log"), "5 steps in a row up to step")
    assert files(out / f"checkpoint-{newest}") == before


def test_the_row_of_skipped_steps_ends_with_a_good_one():
    """A step without a gradient, of either model, neither counts nor ends it."""
    one = object.__new__(Run)
    one.config, one.rows = SimpleNamespace(max_skipped=3), []
    one.progress = {"skipped": 0, "skipped_in_a_row": 0, "rows_used": 0}
    one._append = lambda name, line: None

    def counted(policy, discriminator):
        line = {"rows": 1}
        one._count_skipped(1, line, [policy, discriminator])
        return line["steps_skipped"], one.progress["skipped_in_a_row"]

    assert counted(1.0, math.nan) == (1, 1) == counted(1.0, 0.0) == counted(0.0, 1.0)
    assert counted(math.inf, 1.0) == (2, 2) and counted(2.0, 1.0) == (2, 0)
    assert counted(math.nan, 0.0) == (3, 1) and counted(0.0, math.nan) == (4, 2)
    assert one.progress["rows_used"] == 3
    with pytest.raises(UserError, match="3 steps in a row up to step"):
        counted(1.0, math.nan)


BAD_STEP = '''"""Stage 1, whose second loss is no number on the last rank."""

import torch

import sft
from support.ranks import rank, world_size
from support.ending import main

plain, calls = sft.sft_loss, 0


def loss(*args):
    global calls
    calls += 1
    bad = calls == 2 and rank() == world_size() - 1
    return plain(*args) * (float("nan") if bad else 1.0)


sft.sft_loss = loss
main(sft.train)
'''


@pytest.mark.parametrize("ranks", [1, 2])
def test_one_bad_step_is_skipped_counted_and_named(nursery, whole, tmp_path, ranks):
    """On every rank alike, and the run goes on; so does the count when it is resumed."""
    base, expected = whole("sft.py", ranks)
    script = tmp_path / "sft.py"
    script.write_text(BAD_STEP)
    out, log = tmp_path / "out", tmp_path / "log"
    words = (script, *base[1:], "--output_dir", out)
    started = nursery.start(*words, "--save_steps", 3, ranks=ranks, log=log)
    until(lambda: (out / "checkpoint-3").exists() or started.gone())
    started.signal(signal.SIGTERM)
    assert started.wait() == [0] * ranks, started.said
    assert "step 2: skipped, its gradient is not finite" in started.said
    done = nursery.run(*base, "--output_dir", out, "--resume", ranks=ranks, log=log)
    assert done.codes == [0] * ranks, done.said
    steps, good = lines(out / "metrics.jsonl"), lines(expected / "metrics.jsonl")
    assert [s["step"] for s in steps] == [s["step"] for s in good]
    assert [s["steps_skipped"] for s in steps] == [0, 1, 1, 1, 1]
    assert steps[1]["grad_norm"] is None and steps[2]["loss"] is not None
    named = lines(out / "skipped.jsonl")
    assert [line["step"] for line in named] == [2] * ranks
    rows = [row for line in named for row in line["rows"]]
    assert len(rows) == steps[1]["rows"] == 4 * ranks
    assert all(re.search(r"\.jsonl:\d+$", row) for row in rows)
    weights = load_file(out / "model.safetensors")
    assert all(w.isfinite().all() for w in weights.values())


# --------------------------------------------------------------------------------------------------
# Rows


def test_a_row_drawn_twice_in_a_batch_has_other_rollouts(world, trained):
    """A data set smaller than the batch: each draw of a row has random numbers of its own."""
    policy, processor = load_policy(trained)
    rows = torch.utils.data.Subset(load_data(world["prompts"], ("answer",)), [0])
    encoded = Encoded(rows, processor, lambda example, prompt: prompt)
    stream = batches(encoded, 3, seed=0)
    prompts = [prompt for _, prompt in next(stream)]
    assert len({prompt.index for prompt in prompts}) == 3
    assert len({tuple(prompt.input_ids.tolist()) for prompt in prompts}) == 1
    groups = generate(policy, prompts, Sampling(4, 32, temperature=1.0, seed=0), step=1)
    sampled = {tuple(branch.tolist()) for group in groups for branch in group.branches}
    assert len(sampled) == 12


def test_bad_rows_count_on_when_a_run_is_resumed(nursery, world, short, tmp_path):
    """Three bad rows are too many. Two are drawn before the run is resumed, one behind."""
    rows = Path(world["sft"]).read_text().splitlines()[:40]
    for place in (9, 21, 30):
        rows[epoch_rows(place, place + 1, 40, 0)[0]] = "{}"
    data, log = tmp_path / "rows.jsonl", tmp_path / "log"
    data.write_text("\n".join(rows))
    folder = ("--image_dir", os.path.dirname(world["sft"]))
    base = (*with_data(short("sft.py"), data), *folder, "--max_steps", 100, "--save_steps", 1)
    words = (*base, "--output_dir", tmp_path / "out")
    first = refused(nursery.start(*words, log=log), "3 of 32 rows are bad, over")
    drawn = Path(f"{log}.0").read_bytes()  # a bar, which begins anew at each \r
    assert b"\r" in drawn and drawn.endswith(f"\n{first}\n".encode())  # the line is no part of it
    assert checkpoints(tmp_path / "out") == [6, 7]
    again = nursery.start(*words, "--resume", log=log)
    assert refused(again) == first and "resumed from" in again.said
    assert lines(tmp_path / "out" / "metrics.jsonl")[-1]["rows_left_out"] == 2


def test_inputs_that_are_broken_in_every_way(world, tmp_path):
    """Answers, ground truths, files of rows and packs; `make chaos` tries more of them."""
    assert fuzz(tmp_path, world, 2000, 0)
