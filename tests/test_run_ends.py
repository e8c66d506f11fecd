"""How a run ends that cannot go on: a signal, a rank or a worker that is gone or stuck, a full GPU,
a bug. A user sees one line, but for the bug, whose traceback is shown."""

import datetime
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import torch

from tests.chaos import differences, free_port
from tests.conftest import ROOT, launch, lines
from tests.runs import checkpoints, left, until

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
# Ranks and workers that are gone, and a bug


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
    env = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    env |= {"RANK": "0", "LOCAL_RANK": "0"}
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
        ("raise ConnectionResetError('a judge is down')", "ended with exit code 1"),
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
    bug = re.search("Lost|KeyboardInterrupt|ConnectionResetError", fault)
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
# A GPU without room

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
