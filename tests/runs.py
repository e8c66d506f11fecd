"""What tests of runs do to a process and to its directory: wait, stop it, compare files."""

import contextlib
import hashlib
import os
import signal
import time
from pathlib import Path


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
