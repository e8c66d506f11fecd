"""A run survives what happens to it, and says what happened: kills, signals, damage, full disks,
numbers that are none, ranks that are gone, flags out of range. By real processes on a small world;
most of them are forked from one that has imported everything (chaos.py), so they start at once."""

import contextlib
import dataclasses
import datetime
import hashlib
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import get_args, get_type_hints

import pytest
import torch
from safetensors.torch import load_file, save_file

from align import AlignConfig
from data import Encoded
from discriminator import DiscriminatorConfig
from eval import EvalConfig
from model import load_policy
from rlvr import RLVRConfig
from sampler import Sampling, generate
from sft import SFTConfig
from support.errors import UserError
from support.flags import check_ranges
from support.loader import batches, epoch_rows
from support.resuming import Checkpoints, _is_whole
from support.rows import load_data
from support.run import Run
from tests.chaos import STAGES, STEPS, differences, flags_of, free_port, fuzz, in_a_save, numbers
from tests.chaos import with_data
from tests.conftest import ROOT, launch, lines


@pytest.fixture(scope="module")
def discriminator(world, trained, nursery, tmp_path_factory) -> str:
    out = tmp_path_factory.mktemp("d") / "d"
    flags = flags_of("discriminator.py", world, trained, trained)
    made = nursery.run("discriminator.py", *flags, "--output_dir", out, log=f"{out}.log")
    assert made.codes == [0], made.said
    return str(out)


@pytest.fixture(scope="module")
def short(world, trained, request):
    """script -> the words of a short run of it."""

    def words(script: str) -> list:
        judge = request.getfixturevalue("discriminator") if script == "align.py" else trained
        return [script, *flags_of(script, world, trained, judge)]

    return words


@pytest.fixture(scope="module")
def whole(short, nursery, tmp_path_factory):
    """(script, ranks) -> the words of a short run, and the directory where it ran undisturbed,
    without a checkpoint; each made once."""
    folder, done = tmp_path_factory.mktemp("whole"), {}

    def make(script: str, ranks: int = 1) -> tuple[list, Path]:
        if (script, ranks) not in done:
            base, out = short(script), folder / f"{script}-{ranks}"
            ended = nursery.run(*base, "--output_dir", out, ranks=ranks, log=f"{out}.log")
            assert ended.codes == [0] * ranks, ended.said
            done[script, ranks] = base, out
        return done[script, ranks]

    return make


def until(condition, limit: float = 60.0) -> None:
    """Waits for a condition; the test fails where it does not come."""
    end = time.monotonic() + limit
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.002)


def left(started) -> bool:
    """Whether a process of the run is there, also one that encodes rows."""
    for pid in started.pids:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, 0)
            return True
    return False


def files(path) -> dict[str, str]:
    """Every file below a directory and the hash of its bytes; not the lock and the ranks' notes."""
    names = [p for p in sorted(Path(path).rglob("*")) if p.is_file() and p.parent.name != "ranks"]
    return {str(p.relative_to(path)): hashlib.sha1(p.read_bytes()).hexdigest() for p in names}


def refused(started, *words: str) -> str:
    """The one line of a run of one rank that ends with exit code 2."""
    assert started.wait() == [2] and "Traceback" not in started.said, started.said
    (line,) = started.errors
    assert all(word in line for word in words), line
    return line


def stopped_at(nursery, base, out, step: int = 2, log=None, **more) -> list[int]:
    """A run that gets SIGTERM once it has saved checkpoint-`step`. -> its checkpoints."""
    words = (*base, "--save_steps", 1, "--output_dir", out)
    started = nursery.start(*words, log=log or f"{out}.log", **more)
    until(lambda: (out / f"checkpoint-{step}").exists() or started.gone())
    started.signal(signal.SIGTERM)
    assert set(started.wait()) == {0}, started.said
    return checkpoints(out)


def checkpoints(out) -> list[int]:
    return sorted(int(p.name[11:]) for p in Path(out).glob("checkpoint-*") if p.name[11:].isdigit())


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
# Signals


def test_ctrl_c_ends_after_the_step_and_a_second_one_at_once(nursery, short, tmp_path):
    base = short("sft.py")
    words = [*base, "--max_steps", 100_000, "--save_steps", 100_000, "--output_dir"]
    once = nursery.start(*words, tmp_path / "once", log=tmp_path / "once.log")
    twice = nursery.start(*words, tmp_path / "twice", log=tmp_path / "twice.log")
    for started, out in ((once, tmp_path / "once"), (twice, tmp_path / "twice")):
        until(lambda: (out / "metrics.jsonl").exists() or started.gone())
    once.signal(signal.SIGINT)
    assert once.wait() == [130] and "Traceback" not in once.said, once.said
    assert "stopped by a signal; saved" in once.said and once.errors == []
    told = "Finishing this step, then saving and exiting. Press Ctrl-C again to quit now without"
    assert once.said.count(f"{told} saving.") == 1
    (step,) = checkpoints(tmp_path / "once")
    assert lines(tmp_path / "once" / "metrics.jsonl")[-1]["step"] == step
    twice.signal(signal.SIGSTOP)  # so that both come in one step
    twice.signal(signal.SIGINT)
    twice.signal(signal.SIGCONT)
    twice.signal(signal.SIGINT)
    assert twice.wait()[0] in (-signal.SIGINT, 130)


def test_a_signal_to_one_rank_or_twice_stops_all(nursery, short, tmp_path):
    """A scheduler signals one rank, or each, and torchrun passes it on once more."""
    base = short("align.py")
    words = [*base, "--max_steps", 100_000, "--save_steps", 100_000, "--output_dir"]
    for name, ranks in (("one", [1]), ("all", [0, 1, 0, 1])):
        out = tmp_path / name
        started = nursery.start(*words, out, ranks=2, log=tmp_path / f"{name}.log")
        until(lambda: (out / "metrics.jsonl").exists() or started.gone())
        for rank in ranks:
            started.signal(signal.SIGTERM, rank)
            time.sleep(0.01)
        assert started.wait() == [0, 0], started.said
        assert started.said.count("stopped by a signal; saved") == 1
        assert len(checkpoints(out)) == 1


@pytest.mark.parametrize("script", ["sft.py", "rlvr.py"])
def test_a_signal_to_every_process_of_a_job(nursery, short, tmp_path, script):
    """As Slurm does: also to those that encode rows ahead, and to the verifier's."""
    base = short(script)
    words = [*base, "--max_steps", 100_000, "--dataloader_num_workers", 2, "--output_dir"]
    out = tmp_path / "out"
    started = nursery.start(*words, out, log=tmp_path / "log")
    until(lambda: (out / "metrics.jsonl").exists() or started.gone())
    os.killpg(started.pids[0], signal.SIGTERM)
    assert started.wait() == [0] and "Traceback" not in started.said, started.said
    assert "stopped by a signal; saved" in started.said


def test_torchrun_passes_a_signal_on(short, tmp_path):
    """Under torchrun itself: its workers save and end without an error of their own."""
    base = short("sft.py")
    out = tmp_path / "out"
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    words = [*base, "--max_steps", 100_000, "--output_dir", out]
    with open(tmp_path / "log", "w") as log:
        launched = subprocess.Popen(
            [*start, *map(str, words)], cwd=ROOT, stdout=log, stderr=subprocess.STDOUT
        )
    until(lambda: (out / "metrics.jsonl").exists() or launched.poll() is not None)
    launched.send_signal(signal.SIGTERM)
    launched.wait(60)
    said = (tmp_path / "log").read_text()
    assert said.count("stopped by a signal; saved") == 1 and "error: " not in said, said
    assert len(checkpoints(out)) == 1


# --------------------------------------------------------------------------------------------------
# --resume


def test_a_finished_run_is_left_as_it_is(nursery, whole, tmp_path):
    base, expected = whole("sft.py")
    out = shutil.copytree(expected, tmp_path / "out")
    for ranks in (1, 2):
        before = files(out)
        done = nursery.run(
            *base, "--output_dir", out, "--resume", ranks=ranks, log=tmp_path / "log"
        )
        assert done.codes == [0] * ranks and "\n" not in done.said.strip(), done.said
        assert done.said.strip() == f"{out}: finished at step {STEPS}; nothing to do"
        assert files(out) == before


def test_more_steps_of_a_finished_run(nursery, whole, tmp_path):
    """Are not to be had from it; the line says how to get them, and its own command does that."""
    for script, start in (
        ("sft.py", "--model {0}"),
        ("align.py", "--ckpt {0} --discriminator {0}/discriminator"),
    ):
        base, expected = whole(script)
        out = shutil.copytree(expected, tmp_path / script)
        before, words = files(out), (*base, "--output_dir", out, "--resume")
        line = refused(nursery.start(*words, "--max_steps", STEPS + 4, log=tmp_path / "log"))
        assert f"--max_steps {STEPS + 4}: the run in {out} has finished at step {STEPS}" in line
        assert f"start from its result: {start.format(out)}" in line
        assert files(out) == before
        fewer = nursery.run(*words, "--max_steps", STEPS - 1, log=tmp_path / "log")
        assert fewer.codes == [0] and "nothing to do" in fewer.said
    more = re.search(r"--ckpt .* --discriminator \S+", line)[0].split()
    once = (*base, *more, "--max_steps", 1, "--output_dir", tmp_path / "more")
    done = nursery.run(*once, log=tmp_path / "log")
    assert done.codes == [0] and f"saved {tmp_path}/more" in done.said, done.said


@pytest.mark.parametrize("before, now", [(("--max_steps", 1), 0.01), (("--max_steps", -1), 0.1)])
def test_more_epochs_of_a_finished_run(nursery, short, tmp_path, before, now):
    base, log = (*short("sft.py"), "--output_dir", tmp_path / "out"), tmp_path / "log"
    done = nursery.run(*base, *before, "--num_train_epochs", 0.01, log=log)
    assert done.codes == [0], done.said
    more = ("--max_steps", -1, "--num_train_epochs", now, "--resume")
    refused(nursery.start(*base, *more, log=log), f"--num_train_epochs {now}: the run in")
    again = nursery.run(*base, *before, "--num_train_epochs", 0.01, "--resume", log=log)
    assert again.codes == [0] and "nothing to do" in again.said


def test_resuming_where_nothing_is(nursery, whole, tmp_path):
    """No directory, an empty one, and one whose run was killed before its first step."""
    base, expected = whole("sft.py")
    (tmp_path / "empty").mkdir()
    (tmp_path / "early" / "ranks").mkdir(parents=True)
    (tmp_path / "early" / "ranks" / "lock").touch()
    for name in ("none", "empty", "early"):
        out = tmp_path / name
        done = nursery.run(*base, "--output_dir", out, "--resume", log=tmp_path / "log")
        assert done.codes == [0], done.said
        assert f"--resume: no undamaged checkpoint in {out}, starting from step 1" in done.said
        assert differences(expected, out) == []


def test_another_runs_directory_is_refused(nursery, world, trained, whole, tmp_path):
    base, expected = whole("sft.py")
    out = shutil.copytree(expected, tmp_path / "out")
    before, log = files(out), tmp_path / "log"
    resume = ("--resume", "--output_dir", out)
    data = ("--data", world["prompts"])
    other = nursery.start("rlvr.py", "--ckpt", trained, *data, *resume, log=log)
    refused(other, "is another run: ", "its stage is sft, not rlvr")
    model = ("--model", world["init"], "--data", world["sft"])
    other = nursery.start("sft.py", *model, *resume, log=log)
    refused(other, "is another run: ", f"its model is {trained}, not {world['init']}")
    refused(nursery.start(*base, *resume[1:], log=log), "is not empty; pass --resume")
    assert files(out) == before
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("keep")
    refused(nursery.start(*base, "--resume", "--output_dir", mine, log=log), "has no run.json")
    assert os.listdir(mine) == ["thesis.txt"]
    for text in ('{"stage": "sft", "ru', "[]", '{"stage": "sft", "run": 1}', "{}", "null"):
        (out / "run.json").write_text(text)
        line = refused(nursery.start(*base, *resume, log=log), "run.json", "damaged")
        assert "\n" not in line and (out / "model.safetensors").exists()


@pytest.mark.parametrize(
    "script, more", [("sft.py", ("--lora_rank", 4)), ("sft.py", ()), ("discriminator.py", ())]
)
def test_a_base_that_has_changed_is_refused(nursery, world, trained, tmp_path, script, more):
    """A checkpoint of adapters holds no base, and no checkpoint what an update is measured from, or
    the policy that answers in the warm-up.
    The name is the same, the files are not; nothing is touched."""
    base, out, log = tmp_path / "base", tmp_path / "out", tmp_path / "log"
    shutil.copytree(trained, base, ignore=shutil.ignore_patterns("checkpoint-*"))
    words = (script, *flags_of(script, world, str(base), trained), *more)
    stopped_at(nursery, words, out, log=log)
    before = files(out)
    weights = load_file(base / "model.safetensors")
    name = sorted(weights)[len(weights) // 2]
    weights[name].view(-1)[3] += 1e-6
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    again = (*words, "--output_dir", out, "--resume")
    line = refused(nursery.start(*again, log=log), "--resume", "another --output_dir")
    assert f"the run in {out} started from other weights than {base} holds" in line
    assert files(out) == before
    shutil.copy(f"{trained}/model.safetensors", base / "model.safetensors")
    done = nursery.run(*again, log=log)
    assert done.codes == [0], done.said


@pytest.fixture(scope="module")
def stopped(nursery, whole, tmp_path_factory):
    """A run of stage 1 that was stopped with checkpoints 2 and 3, or later ones, each with a
    Hugging Face directory."""
    out = tmp_path_factory.mktemp("stopped") / "out"
    found = stopped_at(nursery, [*whole("sft.py")[0], "--save_hf_steps", 1], out, 2)
    assert len(found) == 2
    return out


def flip(path: Path) -> None:
    """Other bytes in the middle of a file, of the same length."""
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 8] = bytes(255 - b for b in content[middle : middle + 8])
    path.write_bytes(content)


DAMAGE = {
    "moments": lambda path: flip(next((path / "state").glob("*.distcp"))),
    "weights": lambda path: flip(path / "model.safetensors"),
    "cut": lambda path: os.truncate(path / "model.safetensors", 1000),
    "empty": lambda path: os.truncate(next((path / "state").glob("*.distcp")), 0),
    "index": lambda path: flip(path / "state" / ".metadata"),
    "gone": lambda path: (path / "state" / "progress.json").unlink(),
    "checksums": lambda path: (path / "checksums.json").write_text("{"),
    "no checksums": lambda path: (path / "checksums.json").write_text("[1]"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_checkpoint_is_passed_over(nursery, whole, stopped, tmp_path, name):
    base, expected = whole("sft.py")
    out = shutil.copytree(stopped, tmp_path / "out")
    older, newest = checkpoints(out)
    DAMAGE[name](out / f"checkpoint-{newest}")
    words = (*base, "--output_dir", out, "--resume")
    done = nursery.run(*words, log=tmp_path / "log")
    assert done.codes == [0] and "Traceback" not in done.said, done.said
    assert f"{out}/checkpoint-{newest} is damaged; trying the checkpoint before it" in done.said
    assert f"resumed from {out}/checkpoint-{older}" in done.said
    assert differences(expected, out) == []


def test_a_checkpoint_is_whole_with_every_file_of_its_own(nursery, short, tmp_path):
    """Of two ranks: without any one of its files, or with that of another checkpoint in its place,
    it is damaged. A file may be the same in both."""
    out = tmp_path / "out"
    older, newest = stopped_at(nursery, short("sft.py"), out, 2, ranks=2)
    theirs, mine = (out / f"checkpoint-{step}" for step in (older, newest))
    every = [path for path in mine.rglob("*") if path.is_file()]
    assert len(every) > 4 and Checkpoints(str(out), keep=2).newest() == newest
    for path in every:
        before, other = path.read_bytes(), (theirs / path.relative_to(mine)).read_bytes()
        path.unlink()
        assert Checkpoints(str(out), keep=2).newest() == older, path
        path.write_bytes(other)
        assert Checkpoints(str(out), keep=2).newest() == older or before == other, path
        path.write_bytes(before)
    assert Checkpoints(str(out), keep=2).newest() == newest
    sums = json.loads((mine / "checksums.json").read_text())
    lacking = {name: total for name, total in sums.items() if "__1_0" not in name}
    assert len(lacking) < len(sums)
    (mine / "checksums.json").write_text(json.dumps(lacking))
    assert Checkpoints(str(out), keep=2).newest() == older  # without those of the second rank


KILLED_IN_A_REMOVAL = '''"""Stage 1, killed when it has removed one file of an old checkpoint."""

import os
import shutil
import signal

import sft
from support.ending import main


def remove(path, *args, **more):
    files = [os.path.join(top, name) for top, _, names in os.walk(path) for name in names]
    if "checkpoint" in path and files:
        os.remove(files[0])
        os.kill(os.getpid(), signal.SIGKILL)


shutil.rmtree = remove
main(sft.train)
'''


def test_what_has_the_name_of_a_checkpoint_is_whole(nursery, whole, tmp_path):
    """Also where the run is killed while it removes an old one; what is left goes on --resume."""
    base, expected = whole("sft.py")
    script, out = tmp_path / "sft.py", tmp_path / "out"
    script.write_text(KILLED_IN_A_REMOVAL)
    words = (*base[1:], "--save_steps", 1, "--save_total_limit", 1, "--output_dir", out)
    killed = nursery.run(script, *words, log=tmp_path / "log")
    assert killed.codes == [-signal.SIGKILL], killed.said
    left = checkpoints(out)
    assert left and all(_is_whole(str(out / f"checkpoint-{step}")) for step in left)
    done = nursery.run("sft.py", *words, "--resume", log=tmp_path / "log")
    assert done.codes == [0] and f"resumed from {out}/checkpoint-{left[-1]}" in done.said
    assert differences(expected, out) == []
    assert [name for name in os.listdir(out) if "checkpoint" in name] == [f"checkpoint-{STEPS - 1}"]


def test_with_no_checkpoint_left_a_run_starts_from_step_1(nursery, whole, stopped, tmp_path):
    """And does not mistake the damaged ones for newer than what it then saves."""
    base, expected = whole("sft.py")
    out = shutil.copytree(stopped, tmp_path / "out")
    damaged = checkpoints(out)
    for step in damaged:
        DAMAGE["moments"](out / f"checkpoint-{step}")
    words = (*base, "--output_dir", out, "--resume", "--save_steps", 1, "--save_total_limit", 1)
    started = nursery.start(*words, log=tmp_path / "log")
    until(lambda: (out / "checkpoint-1").exists() or started.gone())
    time.sleep(0.01)
    started.signal(signal.SIGTERM)
    assert started.wait() == [0]
    assert f"no undamaged checkpoint in {out}, starting from step 1" in started.said
    left = checkpoints(out)
    assert len(left) == 1 and Checkpoints(str(out), keep=1).newest() == left[0]
    assert lines(out / "metrics.jsonl")[-1]["step"] == left[0]
    done = nursery.run(*words, log=tmp_path / "log")
    assert done.codes == [0] and "damaged" not in done.said, done.said
    assert differences(expected, out) == []


def test_broken_lines_in_logs_are_dropped(nursery, whole, stopped, tmp_path):
    base, expected = whole("sft.py")
    out = shutil.copytree(stopped, tmp_path / "out")
    path = out / "metrics.jsonl"
    first, *others = path.read_bytes().splitlines(keepends=True)
    rubbish = [
        b"\n",
        b"no json\n",
        b"[" * 100_000 + b"\n",
        b"[1]\n",
        b"null\n",
        b"\xff\x00\xfe\n",
        b'{"step": "x"}\n',
    ]
    path.write_bytes(b"".join([first, *rubbish, *others]) + b'{"step": 7, "lo')
    (out / "left_out.jsonl").write_bytes(b'{"step": 1')
    done = nursery.run(*base, "--output_dir", out, "--resume", log=tmp_path / "log")
    assert done.codes == [0] and "Traceback" not in done.said, done.said
    assert differences(expected, out) == [] and (out / "left_out.jsonl").read_bytes() == b""


def test_a_last_line_without_its_end_is_kept_whole(nursery, whole, stopped, tmp_path):
    """The line break is what a kill cut off: the next line must not stand behind it."""
    base, expected = whole("sft.py")
    out = shutil.copytree(stopped, tmp_path / "out")
    path, newest = out / "metrics.jsonl", checkpoints(stopped)[-1]
    whole_lines = path.read_bytes().splitlines(keepends=True)[:newest]
    path.write_bytes(b"".join(whole_lines)[:-1])
    done = nursery.run(*base, "--output_dir", out, "--resume", log=tmp_path / "log")
    assert done.codes == [0] and differences(expected, out) == [], done.said


def test_the_batch_over_all_ranks_is_kept(nursery, short, tmp_path):
    """With another batch a run is not resumed, and nothing is touched; of other data it says so."""
    base = short("sft.py")
    out, log = tmp_path / "out", tmp_path / "log"
    stopped_at(nursery, base, out, 2, ranks=2)
    before, resume = files(out), ("--output_dir", out, "--resume")
    line = refused(nursery.start(*base, *resume, log=log))
    assert "a step had 8 rows over all ranks and would now have 4" in line
    assert files(out) == before
    data = Path(base[base.index("--data") + 1])
    fewer = data.with_name("fewer.jsonl")
    fewer.write_text("".join(data.read_text().splitlines(keepends=True)[:-1]))
    done = nursery.run(*with_data(base, fewer), *resume, ranks=2, log=log)
    fewer.unlink()
    assert done.codes == [0, 0] and "the data had 120 rows and has 119" in done.said, done.said


@pytest.mark.parametrize("ranks", [(2,), (4,), (1, 2, 4), (4, 2, 1)])
def test_a_loss_is_the_same_on_any_ranks(nursery, short, tmp_path, ranks):
    """As on one, to 1e-5, and with the same rows; also where each step is made by other ranks than
    the step before, from a checkpoint of theirs."""
    base = [*short("sft.py"), "--max_steps", 4, "--learning_rate", 1e-3, "--warmup_steps", 0]
    base += ["--save_steps", 1, "--save_total_limit", 4]

    def go(out, ranks, *more):
        batch = ("--per_device_train_batch_size", 8 // ranks)
        words = (*base, *batch, "--output_dir", out, *more)
        done = nursery.run(*words, ranks=ranks, log=tmp_path / "log")
        assert done.codes == [0] * ranks, done.said
        return done.said

    one, out = tmp_path / "one", tmp_path / "out"
    go(one, 1)
    go(out, ranks[0])
    for step, number in enumerate(ranks[1:], 1):  # back to where it stood after this step
        for later in range(step + 1, 4):
            shutil.rmtree(out / f"checkpoint-{later}")
        record = json.loads((out / "run.json").read_text())
        del record["finished"]
        (out / "run.json").write_text(json.dumps(record))
        assert f"resumed from {out}/checkpoint-{step}" in go(out, number, "--resume")
    a, b = numbers(one), numbers(out)
    assert [s["step"] for s in b] == [1, 2, 3, 4] and abs(a[0]["loss"] - a[3]["loss"]) > 0.01
    for x, y in zip(a, b):
        assert (x["tokens"], x["rows"]) == (y["tokens"], y["rows"])
        assert y["loss"] == pytest.approx(x["loss"], rel=1e-5)


# --------------------------------------------------------------------------------------------------
# Two runs, full disks, ranks that are gone


@pytest.mark.parametrize("resume", [(), ("--resume",)])
def test_of_two_runs_in_one_directory_one_is_refused(nursery, whole, stopped, tmp_path, resume):
    """However close, and also when both go on with the same run; the other is as if alone."""
    base, expected = whole("sft.py")
    out = tmp_path / "out"
    if resume:
        shutil.copytree(stopped, out)
    words = (*base, "--output_dir", out, "--save_steps", 1, *resume)
    both = [nursery.start(*words, log=tmp_path / f"{i}.log") for i in range(2)]
    codes = [started.wait()[0] for started in both]
    assert sorted(codes) == [0, 2], [started.said for started in both]
    loser = both[codes.index(2)]
    refused(loser, f"--output_dir {out}")
    assert differences(expected, out) == []


def test_the_lock_goes_with_its_process(nursery, whole, tmp_path):
    """Killed, with processes that encode rows still there, and resumed in the same moment."""
    base, expected = whole("sft.py")
    out = tmp_path / "out"
    words = (*base, "--output_dir", out, "--save_steps", 1, "--resume")
    started = nursery.start(*words, "--dataloader_num_workers", 2, log=tmp_path / "log")
    until(lambda: (out / "checkpoint-2").exists() or started.gone())
    started.signal(signal.SIGKILL)
    done = nursery.run(*words, log=tmp_path / "log")
    assert done.codes == [0], done.said
    assert differences(expected, out) == []
    started.wait()
    until(lambda: not left(started))


WITHOUT = '''"""Stage 1, on a file system without locks that cannot force a folder to the disk."""

import errno
import fcntl
import os
import stat

import sft
from support.ending import main

plain = os.fsync


def no_locks(*args):
    raise OSError(errno.ENOLCK, "No locks available")


def fsync(descriptor):
    if stat.S_ISDIR(os.fstat(descriptor).st_mode):
        raise OSError(errno.EINVAL, "Invalid argument")
    plain(descriptor)


fcntl.lockf, os.fsync = no_locks, fsync
main(sft.train)
'''


def test_a_file_system_that_lacks_something(nursery, whole, tmp_path):
    """A line says what is not noticed there; the run saves and goes on as elsewhere."""
    base, expected = whole("sft.py")
    script, out = tmp_path / "stage.py", tmp_path / "out"
    script.write_text(WITHOUT)
    stopped_at(nursery, (script, *base[1:]), out)
    words = (script, *base[1:], "--output_dir", out, "--resume")
    done = nursery.run(*words, log=tmp_path / "log")
    assert done.codes == [0] and "resumed from" in done.said, done.said
    line = f"--output_dir {out}: its file system has no locks (No locks available), so a second run"
    assert line in done.said and "Traceback" not in done.said
    assert differences(expected, out) == []


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 24 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small disk is not permitted here")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def fill(disk: Path, left: int) -> None:
    """Leaves so many bytes free, or fewer where a run that writes meanwhile is quicker."""
    free = shutil.disk_usage(disk).free
    with contextlib.suppress(OSError), open(disk / "ballast", "wb") as file:
        file.write(bytes(max(0, free - left)))


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_full_disk_is_one_line(nursery, whole, small_disk, tmp_path, ranks):
    """The line names the path; the unfinished copy is gone, the checkpoint before is whole, and
    the run goes on once there is space."""
    base, expected = whole("sft.py", ranks)
    out = small_disk / "out"
    words = (*base, "--output_dir", out, "--save_steps", 1, "--resume")
    stopped_at(nursery, base, out, 1, tmp_path / "log", ranks=ranks)
    kept = checkpoints(out)[-1]
    size = sum(p.stat().st_size for p in (out / f"checkpoint-{kept}").rglob("*") if p.is_file())
    before = files(out / f"checkpoint-{kept}")
    fill(small_disk, size // 2)
    started = nursery.start(*words, ranks=ranks, log=tmp_path / "log")
    codes = started.wait(60)
    assert 2 in codes and set(codes) <= {1, 2} and "Traceback" not in started.said, started.said
    (line,) = started.errors
    assert f"{out}/checkpoint-{kept + 1}" in line and "could not be written" in line, line
    assert not in_a_save(out) and files(out / f"checkpoint-{kept}") == before
    (small_disk / "ballast").unlink()
    done = nursery.run(*words, ranks=ranks, log=tmp_path / "log")
    assert done.codes == [0] * ranks, done.said
    assert differences(expected, out) == []


SMALL_FILES = '''"""Stage 1 where no file may have more than 6,000 bytes."""

import resource

import sft
from support.ending import main

resource.setrlimit(resource.RLIMIT_FSIZE, (6000, 6000))
main(sft.train)
'''


def test_a_log_that_cannot_grow_is_one_line(short, tmp_path):
    script, out = tmp_path / "stage.py", tmp_path / "out"
    script.write_text(SMALL_FILES)
    done = launch(script, *short("sft.py")[1:], "--max_steps", 40, "--output_dir", out, check=False)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    (line,) = (line for line in done.stderr.splitlines() if line.startswith("error: "))
    assert str(out) in line and "File too large" in line and "--resume" in line, line


KILLED_BEFORE_THE_WEIGHTS = '''"""Stage 1, killed before its result has weights."""

import os
import signal

import sft
from support.ending import main

plain = os.replace


def replace(old, new):
    if new.endswith(".safetensors") and "incomplete" not in new:
        os.kill(os.getpid(), signal.SIGKILL)
    plain(old, new)


os.replace = replace
main(sft.train)
'''


def test_half_a_result_does_not_open(nursery, whole, tmp_path):
    """A kill while the result's files are put in place leaves no weights there before all else is,
    such as the system prompt that the next stage should use."""
    base, expected = whole("sft.py")
    script, out = tmp_path / "sft.py", tmp_path / "out"
    script.write_text(KILLED_BEFORE_THE_WEIGHTS)
    words = (*base[1:], "--output_dir", out, "--save_steps", 1)
    killed = nursery.run(script, *words, log=tmp_path / "log")
    assert killed.codes == [-signal.SIGKILL], killed.said
    assert {p.name for p in expected.iterdir()} - {*os.listdir(out)} == {"model.safetensors"}
    with pytest.raises(UserError, match="cannot be loaded"):
        load_policy(str(out))
    done = nursery.run("sft.py", *words, "--resume", log=tmp_path / "log")
    assert done.codes == [0] and differences(expected, out) == [], done.said


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_disk_that_is_full_at_the_end(nursery, whole, small_disk, tmp_path, ranks):
    """No part of the result is left in the directory, where it would look like one."""
    base, expected = whole("sft.py", ranks)
    out = small_disk / "out"
    fill(small_disk, (expected / "model.safetensors").stat().st_size // 2)
    started = nursery.start(*base, "--output_dir", out, ranks=ranks, log=tmp_path / "log")
    codes = started.wait()
    assert 2 in codes and set(codes) <= {1, 2} and "Traceback" not in started.said, started.said
    (line,) = started.errors
    assert f"{out}/result.incomplete could not be written" in line, line
    logs = {"ranks", "run.json", "metrics.jsonl"}
    assert set(os.listdir(out)) == logs, os.listdir(out)
    (small_disk / "ballast").unlink()
    words = (*base, "--output_dir", out, "--resume")
    done = nursery.run(*words, ranks=ranks, log=tmp_path / "log")
    assert done.codes == [0] * ranks and differences(expected, out) == [], done.said
    assert not in_a_save(out) and files(out).keys() == files(expected).keys()


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_disk_that_is_full_for_an_evaluation(
    nursery, world, trained, small_disk, tmp_path, ranks
):
    out = small_disk / "out"
    fill(small_disk, 4096)
    words = ("--ckpt", trained, "--data", world["test"], "--output_dir", out)
    limit = ("--max_completion_length", 8)
    started = nursery.run("eval.py", *words, *limit, ranks=ranks, log=tmp_path / "log")
    assert started.codes[0] == 2 and "Traceback" not in started.said, started.said
    (line,) = started.errors
    assert f"{out}/generations.jsonl: No space left" in line and "start again" in line
    assert os.listdir(out) == []


def test_a_disk_that_is_full_for_the_log(nursery, whole, small_disk, tmp_path):
    base, expected = whole("sft.py")
    out = small_disk / "out"
    words = (*base, "--output_dir", out, "--resume")
    started = nursery.start(*words, "--max_steps", 100_000, log=tmp_path / "log")
    until(lambda: (out / "metrics.jsonl").exists() or started.gone())
    fill(small_disk, 0)
    refused(started, str(out), "No space left")
    (small_disk / "ballast").unlink()
    done = nursery.run(*words, log=tmp_path / "log")
    assert done.codes == [0] and differences(expected, out) == []


@pytest.mark.parametrize("fault, lost", [(signal.SIGSTOP, 1), (signal.SIGKILL, 0)])
def test_a_rank_that_is_gone_or_stuck_is_named(nursery, short, tmp_path, fault, lost):
    """The other one ends by itself, within the limit, with one line."""
    base = short("align.py")
    words = (*base, "--max_steps", 100_000, "--output_dir", tmp_path / "out", "--timeout", 0.08)
    started = nursery.start(*words, ranks=2, log=tmp_path / "log")
    until(lambda: (tmp_path / "out" / "metrics.jsonl").exists() or started.gone())
    started.signal(fault, lost)
    start = time.monotonic()
    until(lambda: started.gone(1 - lost), 60)
    assert time.monotonic() - start < 0.08 * 60 + 12
    started.signal(signal.SIGKILL)
    codes = started.wait()
    assert codes[1 - lost] == 1 and "Traceback" not in started.said, started.said
    (line,) = started.errors
    assert f"rank {lost} is gone or stuck" in line and "--resume" in line, line


ON_A_GPU = """
import os, signal
import align
from support.ranks import rank
from support.ending import main
from support.run import Run

batches, generate = Run.batches, align.generate

def second_is_stuck(run, *args, **kwargs):
    for number, batch in enumerate(batches(run, *args, **kwargs)):
        if number == 1 and rank() == 1:
            os.kill(os.getpid(), signal.SIGSTOP)
        yield batch

def collective(*args, step, **kwargs):
    if step == 2:
        os.abort()
    return generate(*args, step=step, **kwargs)

Run.batches, align.generate = second_is_stuck, collective
main(align.train)
"""


def test_a_rank_that_is_stuck_on_a_gpu_is_named(nursery, short, tmp_path):
    """There a collective ends the process without a word where a rank does not come: here sampling
    does, which begins with one."""
    (tmp_path / "align.py").write_text(ON_A_GPU)
    _, *words = short("align.py")
    words = (tmp_path / "align.py", *words, "--output_dir", tmp_path / "out", "--timeout", 0.08)
    started = nursery.start(*words, ranks=2, log=tmp_path / "log")
    until(lambda: started.gone(0), 90)
    started.signal(signal.SIGKILL)
    assert started.wait()[0] == 1, started.said
    (line,) = started.errors
    assert "rank 1 is gone or stuck" in line and "--resume" in line, line


def test_a_rank_that_is_gone_before_the_ranks_have_met(short, tmp_path):
    """It has come to the store and no further."""
    port = free_port()
    env = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "RANK": "0"}
    words = map(str, (*short("sft.py"), "--output_dir", tmp_path / "out", "--timeout", 0.08))
    command = [sys.executable, *words]
    run = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ | env)
    other = torch.distributed.TCPStore("127.0.0.1", port, 2, False, datetime.timedelta(minutes=1))
    del other
    said = run.communicate(timeout=120)[1]
    assert run.returncode == 1 and "Traceback" not in said, said
    (line,) = (line for line in said.splitlines() if line.startswith("error: "))
    assert "a rank is gone" in line and "start again" in line, line


ONE_FAILS = '''"""Stage 1, where what only the last rank has is missing."""

import sft
from support.ranks import rank
from support.errors import UserError
from support.ending import main

plain = sft.load_examples


def load_examples(*args):
    if rank() == 1:
        raise UserError("--data: this node has no such file")
    return plain(*args)


sft.load_examples = load_examples
main(sft.train)
'''


@pytest.mark.parametrize("fault", ["typo", "model", "one rank", "behind the bar"])
def test_what_fails_on_all_ranks_is_said_once(short, tmp_path, fault):
    """Before there is a directory, under torchrun; and what fails on one alone is said as well, on
    a line of its own."""
    script, *base = short("sft.py")
    more = {"typo": ("--lr_scheduler_type", "linaer"), "model": ("--model", tmp_path)}
    if fault in ("one rank", "behind the bar"):
        script, where = tmp_path / "stage.py", "load_examples"
        where = where if fault == "one rank" else "sft_loss"
        script.write_text(ONE_FAILS.replace("load_examples", where))
    words = (script, *base, "--output_dir", tmp_path / "out", *more.get(fault, ()))
    done = launch(*words, ranks=2, check=False)
    said = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    wanted = {"typo": "linaer", "model": "no config.json", "one rank": "this node has no such file"}
    wanted["behind the bar"] = wanted["one rank"]
    assert done.returncode and len(said) == 1 and wanted[fault] in said[0], done.stderr


WORKER = '''"""Stage 1, whose worker on the last rank fails at its sixth row."""

import os
import signal

import sft
from support.errors import UserError
from support.ranks import rank, world_size
from support.ending import main

plain, calls, run = sft.encode_response, 0, os.getpid()


class Lost(BaseException):
    def __reduce__(self):
        raise TypeError("cannot be pickled")


def encode_response(*args):
    global calls
    calls += 1
    if calls == 6 and rank() == world_size() - 1 and os.getpid() != run:
        FAULT
    return plain(*args)


sft.encode_response = encode_response
main(sft.train)
'''


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize(
    "fault, said",
    [
        ("os.kill(os.getpid(), signal.SIGKILL)", "was killed by signal 9"),  # for lack of memory
        ("os._exit(3)", "ended with exit code 3"),
        ("raise Lost('a bug')", "ended with exit code 1"),
        ("raise KeyboardInterrupt", "ended with exit code 1"),
        ("os.kill(os.getpid(), signal.SIGSTOP)", "sent nothing for 0.1 minutes"),
        ("raise UserError('the folder is gone; mount it')", "the folder is gone; mount it"),
    ],
)
def test_a_lost_worker_is_one_line(nursery, whole, tmp_path, ranks, fault, said):
    """It names the rank and the rows, and the run goes on from its last checkpoint."""
    base, expected = whole("sft.py", ranks)
    script, out = tmp_path / "stage.py", tmp_path / "out"
    script.write_text(WORKER.replace("FAULT", fault))
    words = (*base[1:], "--output_dir", out, "--save_steps", 1, "--resume")
    limit = ("--timeout", 0.1) if "SIGSTOP" in fault else ()
    started = nursery.start(script, *words, *limit, ranks=ranks, log=tmp_path / "log")
    codes = started.wait(60)
    assert codes[-1] == 2 and {*codes} <= {1, 2}, (codes, started.said)
    (line,) = started.errors
    assert said in line and ("UserError" in fault or f"a worker of rank {ranks - 1} " in line)
    assert "UserError" in fault or re.search(r"rows (\S+:\d+, ){3}\S+:\d+; ", line), line
    bug = re.search("Lost|KeyboardInterrupt", fault)
    assert started.said.count("Traceback") == bool(bug), started.said
    assert not bug or bug[0] in started.said
    until(lambda: not left(started))
    done = nursery.run("sft.py", *words, ranks=ranks, log=tmp_path / "log")
    assert done.codes == [0] * ranks, done.said
    assert differences(expected, out) == []


LITTLE = '''"""Stage 1 with hardly any shared memory, and few files that may be open."""

import ctypes
import resource
import subprocess

import sft
from support.ending import main

resource.setrlimit(resource.RLIMIT_NOFILE, (96, 96))
if ctypes.CDLL(None).unshare(0x20000) == 0:  # root alone may have mounts of its own
    subprocess.run(["mount", "--make-rprivate", "/"], check=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4k", "tmpfs", "/dev/shm"], check=True)
main(sft.train)
'''


@pytest.mark.parametrize("ranks", [1, 2])
def test_workers_need_no_shared_memory_and_few_files(nursery, short, tmp_path, ranks):
    """As in a container with the usual /dev/shm and large images, or with many rows a step."""
    script = tmp_path / "stage.py"
    script.write_text(LITTLE)
    more = ("--per_device_train_batch_size", 64, "--save_steps", 1, "--max_steps", 2)
    words = (script, *short("sft.py")[1:], *more, "--output_dir", tmp_path / "out")
    started = nursery.start(*words, ranks=ranks, log=tmp_path / "log")
    assert started.wait(60) == [0] * ranks, started.said


CRASH = """
import sft
from support.ending import main

def loss(*args):
    raise ValueError("a bug")

sft.sft_loss = loss
main(sft.train)
"""


def test_a_bug_is_a_traceback_and_the_end(short, tmp_path):
    """At once, with a worker that reads ahead, and of all ranks where it was on one."""
    _, *base = short("sft.py")
    (tmp_path / "stage.py").write_text(CRASH)
    for ranks in (1, 2):
        out = tmp_path / str(ranks)
        start = time.monotonic()
        words = (tmp_path / "stage.py", *base, "--output_dir", out)
        done = launch(*words, ranks=ranks, check=False, real=True)
        assert done.returncode == 1 and "ValueError: a bug" in done.stderr
        assert time.monotonic() - start < 100


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
# Flags

CONFIGS = {c.__name__: c for c in (SFTConfig, DiscriminatorConfig, AlignConfig, RLVRConfig)}
CONFIGS["EvalConfig"] = EvalConfig


def numeric_fields() -> list[tuple[str, str, type, tuple]]:
    """(stage, field, int or float, its range) of every number among the flags."""
    found = []
    for stage, config in CONFIGS.items():
        for name, hint in get_type_hints(config, include_extras=True).items():
            kinds = [k for k in (hint, *get_args(hint)) if hasattr(k, "__metadata__")]
            assert kinds or not {hint, *get_args(hint)} & {int, float}, (stage, name)
            if kinds:
                found.append((stage, name, get_args(kinds[0])[0], kinds[0].__metadata__))
    return found


@pytest.mark.parametrize("stage, name, kind, limits", numeric_fields())
def test_every_number_has_a_range(stage, name, kind, limits):
    """What is below or above is one line that names the flag and the range; the ends are fine."""
    low, high = limits
    outside = [low - 1, -math.inf if kind is float else -(10**30)]
    outside += [math.nan, math.inf] if kind is float else [10**20]
    outside += [high + 1] if high < 1e300 else []
    for value in outside:
        with pytest.raises(UserError, match=f"^--{name} {re.escape(str(value))}: must be") as said:
            check_ranges(dataclasses.replace(CONFIGS[stage](), **{name: value}))
        assert "\n" not in str(said.value)
    for value in (low, high if high < 1e300 else low + 10):
        check_ranges(dataclasses.replace(CONFIGS[stage](), **{name: value}))


@pytest.mark.parametrize("stage", CONFIGS)
def test_the_defaults_are_inside_their_ranges(stage):
    check_ranges(CONFIGS[stage]())


@pytest.mark.parametrize(
    "flags, said",
    [
        (("--save_total_limit", -1), "--save_total_limit -1: must be at least 1"),
        (("--save_steps", 0), "--save_steps 0: must be at least 1"),
        (("--per_device_train_batch_size", 0), "must be at least 1"),
        (("--max_grad_norm", 0), "--max_grad_norm 0.0: must be at least 1e-09 and at most"),
        (("--learning_rate", "inf"), "--learning_rate inf: must be"),
        (("--num_train_epochs", -2), "--num_train_epochs -2.0: must be at least"),
        (("--seed", 10**12), f"--seed {10**12}: must be"),
        (("--save_steps", "often"), "invalid"),
        (("--report_to", "paper"), "invalid choice: 'paper' (choose from"),
        (("--max_steps", 10**20), f"--max_steps {10**20}: must be at least"),
        (("--per_device_train_batch_size", 10**20), "and at most 2147483647"),
        (("--output_dir", "README.md/out"), "README.md/out: Not a directory"),
        (("--output_dir", ""), "--output_dir . is not empty"),
        (("--lr_scheduler_type", "linaer"), "invalid choice: 'linaer' (choose from"),
    ],
)
def test_a_flag_outside_its_range_is_one_line(nursery, short, tmp_path, flags, said):
    base = short("sft.py")
    words = (*base, "--output_dir", tmp_path / "out", *flags)
    refused(nursery.start(*words, log=tmp_path / "log"), said)
    assert not (tmp_path / "out" / "metrics.jsonl").exists()


@pytest.mark.parametrize(
    "env", [dict(RANK=0), dict(RANK=1, WORLD_SIZE=2), dict(RANK="x"), dict(RANK="")]
)
def test_a_part_of_what_torchrun_sets(nursery, short, tmp_path, env):
    """As a scheduler may leave it behind."""
    words = (*short("sft.py"), "--output_dir", tmp_path / "out")
    line = refused(nursery.start(*words, log=tmp_path / "log", **env), "RANK is set", "torchrun")
    assert "MASTER_ADDR" in line and ("WORLD_SIZE" in line) == ("WORLD_SIZE" not in env)
    assert not (tmp_path / "out").exists()


NO_LOGIN = '''"""Stage 1, with a wandb that nobody has logged in to."""

import sys
import types

import sft
from support.ending import main


def init(**settings):
    raise RuntimeError("api_key not configured (no-tty). call wandb.login()")


sys.modules["wandb"] = types.SimpleNamespace(init=init, finish=lambda: None)
main(sft.train)
'''


@pytest.mark.parametrize(
    "name, value", [("RANK", 2), ("MASTER_PORT", 65536), ("MASTER_PORT", 0), ("WORLD_SIZE", 0)]
)
def test_what_torchrun_would_never_set(nursery, short, tmp_path, name, value):
    """Torch waits for a rank beyond the last one, and at port 0 listens where no other rank asks.
    At a port that is too large it ends with a traceback."""
    env = dict(RANK=0, WORLD_SIZE=2, MASTER_ADDR="127.0.0.1", MASTER_PORT=29500)
    words = (*short("sft.py"), "--output_dir", tmp_path / "out")
    started = nursery.start(*words, log=tmp_path / "log", **env | {name: value})
    refused(started, f"RANK is set, but {name} is not as torchrun sets it")


@pytest.mark.parametrize("script", ["sft", "discriminator", "eval"])
def test_without_docstrings_transformers_cannot_be_imported(script):
    words = [sys.executable, "-OO", "-c", f"import {script}"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and not done.stdout
    assert done.stderr == (
        "error: python -OO (PYTHONOPTIMIZE=2) leaves out the docstrings, which transformers "
        "reads; start without it\n"
    )


def test_wandb_without_a_login_leaves_nothing_behind(nursery, short, tmp_path):
    """So the same command works once there is one, or without it."""
    script, out = tmp_path / "stage.py", tmp_path / "out"
    script.write_text(NO_LOGIN)
    words = (*short("sft.py")[1:], "--max_steps", 1, "--output_dir", out)
    report = ("--report_to", "wandb")
    line = refused(nursery.start(script, *words, *report, log=tmp_path / "log"))
    assert "--report_to wandb: it does not start (api_key not configured" in line
    assert "run `wandb login`, or set WANDB_MODE=offline" in line
    done = nursery.run(script, *words, log=tmp_path / "log")
    assert done.codes == [0], done.said


def test_the_largest_seed_works(nursery, short, tmp_path):
    base = short("sft.py")
    words = (*base, "--seed", 2**32 - 1, "--max_steps", 1, "--output_dir", tmp_path / "out")
    done = nursery.run(*words, log=tmp_path / "log")
    assert done.codes == [0], done.said


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


NO_ROOM = """
import torch
from rlvr import RLVRConfig
from sft import SFTConfig
from support.ending import main
from support.run import Run


def stage():
    {starts}
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\\nMore of it")


main(stage)
"""


@pytest.mark.parametrize(
    "starts, flags",
    [
        ("Run(SFTConfig)", "--max_tokens_per_pack"),
        ("Run(RLVRConfig)", "--max_tokens_per_pack or --max_rollout_rows"),
        ("pass  # as eval.py, which has no Run", "--max_rollout_rows"),
    ],
)
def test_a_full_gpu_is_one_line(nursery, tmp_path, starts, flags):
    """It says how much was asked for, and which flags of the stage lower it."""
    (tmp_path / "stage.py").write_text(NO_ROOM.format(starts=starts))
    model = "--model" if "SFT" in starts else "--ckpt"
    words = (model, tmp_path, "--data", tmp_path / "none.jsonl", "--output_dir", tmp_path / "out")
    started = nursery.start(tmp_path / "stage.py", *words, log=tmp_path / "log")
    assert started.wait(60) == [2]
    (line,) = started.errors
    assert line.startswith("error: out of GPU memory (CUDA out of memory. Tried to allocate 20.00")
    assert f"; lower {flags}; --dry_run" in line and "Traceback" not in started.said
