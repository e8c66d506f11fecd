"""--resume: a finished run, another run's directory, a damaged checkpoint, a broken log, another
number of ranks."""

import json
import os
import re
import shutil
import signal
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from support.resuming import Checkpoints, _is_whole
from tests.chaos import STEPS, differences, flags_of, numbers, with_data
from tests.conftest import lines
from tests.runs import checkpoints, files, refused, stopped_at, until


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
