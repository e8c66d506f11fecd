"""The directory of a run: two runs in one directory, file systems that lack something, full
disks."""

import contextlib
import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

from model import load_policy
from support.errors import UserError
from tests.chaos import differences, in_a_save
from tests.conftest import launch
from tests.runs import checkpoints, files, left, refused, stopped_at, until


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
