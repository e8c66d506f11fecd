"""The end of a run, whatever it is: the result, an error in one line, a lost rank, a crash.

Exit codes: 0 at the end and after SIGTERM, 130 after Ctrl-C, 2 for an error that the user can mend,
1 for a lost rank and for a crash.
"""

import contextlib
import datetime
import errno
import os
import signal
import sys
import time
from collections.abc import Callable

import torch
import torch.distributed as dist

from support.errors import Ended, UserError, printable
from support.ranks import barrier, rank, say, world_size
from support.resuming import of_another_rank
from support.run import Run

# What a user can mend: no space, quota, read-only, permission, broken disk, no folder, long name,
# a limit on the size of files.
MENDABLE = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EIO, errno.ENOTDIR}
MENDABLE |= {errno.ENAMETOOLONG, errno.EFBIG}


def main(stage: Callable) -> None:
    """Runs `stage()`. An error that the user can mend, such as a full disk, ends the run in one
    line, and so does a lost rank. After an error no rank waits for the others."""
    code = 0
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until there is a run, Ctrl-C ends at once
    try:
        stage()
        if Run.current:
            Run.current.finish()
    except Ended as end:
        say(end.args[0])
        code = end.args[1]
    except UserError as error:
        _die(str(error), 2)
    except OSError as error:
        own = Run.current and str(error.filename).startswith(Run.current.path)
        if not own and error.errno not in MENDABLE:
            _crash()
        where = error.filename or (Run.current.path if Run.current else "")
        again = "go on with --resume" if Run.current else "start again"
        _die(f"{where or 'a file'}: {error.strerror}; mend the cause, then {again}", 2)
    except torch.OutOfMemoryError as error:
        why = str(error).splitlines()[0][:120]
        less = " or ".join(_flags_of_memory())
        _die(f"out of GPU memory ({why}); lower {less}; --dry_run N counts what fits", 2)
    except RuntimeError as error:
        if not of_another_rank(error):
            _crash()
        lost = _lost_rank(Run.current) if Run.current else "a rank is gone"
        again = "go on with --resume" if Run.current else "start again"
        _die(f"{lost} ({str(error).splitlines()[0][:120]}); {again}", 1)
    except Exception:
        _crash()
    if not dist.is_initialized():
        sys.exit(code)
    with contextlib.suppress(RuntimeError):  # where a rank is gone, that one has said why
        barrier()  # a thread of the last collective may still hold tensors
        dist.destroy_process_group()
    if "wandb" in sys.modules:
        sys.modules["wandb"].finish()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # the interpreter's own end may abort on threads that collectives have left


def _flags_of_memory() -> list[str]:
    """The flags of this stage that lower the memory it needs."""
    if not Run.current:  # eval.py
        return ["--max_rollout_rows"]
    names = ("max_tokens_per_pack", "max_rollout_rows")
    return [f"--{name}" for name in names if hasattr(Run.current.config, name)]


def _die(message: str, code: int) -> None:
    """Says why the run ends, in one line of its own, and ends this process."""
    run = Run.current
    if _speaks_first():
        if run and run.bar:
            run.bar.close()
        behind = "\n" if rank() else ""  # the progress bar of rank 0 may stand on this line
        print(f"{behind}error: {' '.join(printable(message).split())}", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    if code == 2 and run:
        run.checkpoints.settle()  # lets a checkpoint from before the error be finished
    os._exit(code)  # as in `_crash`


def _crash() -> None:
    """A traceback and the end, at once. The interpreter's own end waits for threads and processes
    that are left, and meanwhile other ranks wait for this one."""
    sys.excepthook(*sys.exc_info())
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)


def _speaks_first() -> bool:
    """Whether no other rank has said why the run ends. It is said once."""
    run = Run.current
    if run and run.started and world_size() > 1:
        try:
            os.close(os.open(os.path.join(run.path, "ranks", "ended"), os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return False
        except OSError:
            pass
    elif os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":  # torchrun's, on node 0
        try:
            at = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
            store = dist.TCPStore(*at, timeout=datetime.timedelta(seconds=10))
            return store.add(f"ended/{os.environ['TORCHELASTIC_RESTART_COUNT']}", 1) == 1
        except RuntimeError:
            pass
    return True


def _lost_rank(run: Run) -> str:
    """Names the rank most likely at fault, by what each has noted of itself (`Run.note`). Ranks
    that do not wait come before those that do, then those that are gone or stopped, then those with
    fewer steps."""
    if not run.started:
        return "a rank is gone"
    run.note("waits")
    time.sleep(3)  # the others notice at about the same time
    notes = {}
    for number in range(world_size()):
        try:
            with open(os.path.join(run.path, "ranks", str(number))) as file:
                step, node, pid, *waits = file.read().split()
        except FileNotFoundError:
            step, node, pid, waits = 0, "", 0, []
        gone = node == os.uname().nodename and not _runs(pid)
        notes[number] = bool(waits), not gone, int(step)
    slow = min(notes, key=notes.get)
    return f"rank {slow} is gone or stuck, last heard of at step {notes[slow][2]}"


def _runs(pid) -> bool:
    """Whether a process of this machine is there and not stopped."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] not in "TtZX"
    except OSError:
        return not os.path.isdir("/proc/self")  # elsewhere it cannot be seen
