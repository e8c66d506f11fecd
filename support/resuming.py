"""Checkpoints: the state from which a killed run goes on.

    output_dir/checkpoint-N/state/           weights, or adapters only, and the optimiser's moments
                                             (torch.distributed.checkpoint, sharded as the run was)
    output_dir/checkpoint-N/state/progress.json      what the run had counted
    output_dir/checkpoint-N/checksums.json           of all its other files
    output_dir/checkpoint-N/                 every `save_hf_steps` a Hugging Face directory as well

A checkpoint is written beside its place, checked, forced to the disk and renamed, so a kill leaves
the old or the new, never a half; an old one is renamed before it is removed. Training goes on
meanwhile: what is written is a copy in the CPU's memory. Rates and schedules are functions of the
step and need no state.
"""

import contextlib
import errno
import json
import os
import re
import shutil
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from support.errors import MAY_NOT_READ, UserError
from support.ranks import all_max, all_sum, barrier, rank, world_size, say


CHECKSUMS = "checksums.json"
REMOVED = ".removed"  # the ending of a checkpoint that is being removed


class Checkpoints:
    """The checkpoints of a run's directory. `modules` are name -> (module, optimiser)."""

    def __init__(self, path: str, keep: int):
        """`keep`: how many are kept."""
        self.path, self.keep = path, keep
        self.group = None  # saves have collectives of their own, beside those of training
        self.saver, self.saving = ThreadPoolExecutor(1), None  # one save at a time, and its future

    def folder(self, step: int) -> str:
        return os.path.join(self.path, f"checkpoint-{step}")

    def steps(self) -> list[int]:
        """The steps of all checkpoints, in order."""
        names = os.listdir(self.path) if os.path.isdir(self.path) else []
        found = (name.removeprefix("checkpoint-") for name in names)
        return sorted(int(number) for number in found if number.isdigit())

    def newest(self) -> int:
        """The step of the newest checkpoint that is whole, by its checksums; 0 for none. UserError
        where this user may not read one: it may be whole."""
        for step in reversed(self.steps()):
            folder, whole, closed = self.folder(step), False, ""
            try:
                whole = _is_whole(folder)
            except PermissionError as error:
                closed = error.filename
            damaged, refused = all_max([not whole, bool(closed)])
            if refused:
                raise UserError(MAY_NOT_READ.format(closed or folder, folder))
            if not damaged:
                return step
            say(f"{folder} is damaged; trying the checkpoint before it")
        return 0

    def progress(self, step: int) -> dict:
        """What the run had counted at a checkpoint."""
        with open(os.path.join(self.folder(step), "state", "progress.json")) as file:
            return json.load(file)

    def load(self, step: int, modules: dict) -> None:
        """Puts the weights and moments of a checkpoint in place. Every rank calls it."""
        stepped = self.progress(step)["stepped"]
        for name, (module, optimizer) in modules.items():  # Adam's moments, to be filled
            parameters = dict(module.named_parameters())
            for key in stepped[name]:
                p = parameters[key]
                zeros = {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
                optimizer.state[p] = {"step": torch.zeros((), device=p.device), **zeros}
        where = os.path.join(self.folder(step), "state")
        dcp.load(_state(modules, stepped), checkpoint_id=where, no_dist=not dist.is_initialized())
        say(f"resumed from {self.folder(step)}")

    def save(self, step: int, modules: dict, progress: dict, save_hf: Callable | None) -> None:
        """Begins checkpoint-<step>: copies the state, then writes it while training goes on.
        `save_hf(path)` adds a Hugging Face directory. Every rank calls it."""
        self.wait()
        check_weights(modules, step)
        beside = f"{self.folder(step)}.incomplete"
        if rank() == 0:
            shutil.rmtree(beside, ignore_errors=True)
        barrier()
        stepped = _stepped(modules)
        with all_or_nothing(beside):
            if save_hf:
                save_hf(beside)
            written = dcp.async_save(
                _state(modules, stepped),
                checkpoint_id=os.path.join(beside, "state"),
                process_group=self.group,
                no_dist=not dist.is_initialized(),
            )
        progress = progress | {"stepped": stepped}  # a copy, as it is now
        self.saving = self.saver.submit(self._write, step, beside, progress, written)

    def _write(self, step: int, beside: str, progress: dict, written: Future) -> None:
        """Finishes a checkpoint; only then the older ones go."""
        with all_or_nothing(beside):
            written.result()
            if rank() == 0:
                logs = [name for name in os.listdir(self.path) if name.endswith(".jsonl")]
                force(self.path, logs)
                write_json(os.path.join(beside, "state", "progress.json"), progress)
            barrier(self.group)
            mine = files_below(beside)[rank() :: world_size()]
            force(beside, mine)
            sums = {name: _checksum(os.path.join(beside, name)) for name in mine}
            of_ranks = [sums] * world_size()
            if world_size() > 1:
                dist.all_gather_object(of_ranks, sums, group=self.group)
            if rank() == 0:
                every = {name: total for sums in of_ranks for name, total in sums.items()}
                write_json(os.path.join(beside, CHECKSUMS), every)
        if rank() == 0:
            _remove(self.folder(step))
            os.rename(beside, self.folder(step))
            folder = os.open(self.path, os.O_RDONLY)
            to_disk(folder)
            os.close(folder)
            # Later ones are damaged: this run went on from one before them.
            kept = [number for number in self.steps() if number <= step][-self.keep :]
            for number in set(self.steps()) - set(kept):
                _remove(self.folder(number))
        barrier(self.group)

    def wait(self) -> None:
        """Waits for the save that is under way, and raises what went wrong in it."""
        saving, self.saving = self.saving, None
        if saving:
            saving.result()

    def check(self) -> None:
        """Raises what went wrong in a save that has ended. Does not wait."""
        if self.saving and self.saving.done():
            self.wait()

    def settle(self) -> None:
        """Waits for the save that is under way, whatever comes of it."""
        if self.saving:
            wait_for([self.saving])


def check_weights(modules: dict, step: int) -> None:
    """UserError where a weight of any rank is NaN or infinite, so that none is saved."""
    for name, (module, _) in modules.items():
        parts = (getattr(p, "to_local", p.detach)() for p in module.parameters())
        bad = [not all(bool(part.isfinite().all()) for part in parts)]
        if all_max(bad)[0]:
            raise UserError(
                f"the weights of the {name} hold NaN or infinity at step {step}; lower the "
                f"learning rate, then go on from the last checkpoint with --resume"
            )


@torch.no_grad()
def checksum_of(module) -> int:
    """A checksum of a module's weights but for adapters, the same however they are sharded. Every
    rank calls it."""
    total, limit = 0, 2**40  # float64 adds the ranks' totals exactly below it
    weights = (p for name, p in module.named_parameters() if ".lora_" not in name)
    for number, weight in enumerate(weights, 1):
        mesh = getattr(weight, "device_mesh", None)
        if mesh is not None and mesh.ndim > 1 and mesh.get_local_rank(0) > 0:
            continue  # another node has counted this shard
        bits = getattr(weight, "to_local", weight.detach)().view(torch.int32)
        total += number * int(bits.sum(dtype=torch.int64))
    return int(all_sum([total % limit])[0]) % limit


def _stepped(modules: dict) -> dict[str, list[str]]:
    """The parameters that have moments. A parameter that no row has used has none, such as those
    of the vision tower where there are no images."""
    return {
        name: [key for key, parameter in module.named_parameters() if parameter in optimizer.state]
        for name, (module, optimizer) in modules.items()
    }


def _state(modules: dict, stepped: dict[str, list[str]]) -> dict:
    """The very tensors of weights and moments, to be saved, or to be loaded in place.

    `get_state_dict` of torch would have an optimiser that has not stepped take an empty step,
    which changes what Adam does later."""
    state = {}
    for name, (module, optimizer) in modules.items():
        parameters = dict(module.named_parameters())
        moments = {key: optimizer.state[parameters[key]] for key in stepped[name]}
        adapters = {key: p for key, p in parameters.items() if ".lora_" in key}  # all that learns
        weights = {key: p.detach() for key, p in (adapters or parameters).items()}
        state[name] = {"model": weights, "moments": moments}
    return state


def _checksum(path: str) -> int:
    total = 0
    with open(path, "rb") as file:
        while block := file.read(1 << 24):
            total = zlib.crc32(block, total)
    return total


def _is_whole(path: str) -> bool:
    """Whether this rank's share of a checkpoint's files has the checksums of the save, and every
    shard has one."""
    try:
        with open(os.path.join(path, CHECKSUMS)) as file:
            expected = json.load(file)
        mine = sorted(expected)[rank() :: world_size()]
        shards = {name for name in files_below(path) if name.endswith(".distcp")}
        return (
            bool(expected)
            and shards <= set(expected)
            and all(_checksum(os.path.join(path, name)) == expected[name] for name in mine)
        )
    except PermissionError:
        raise
    except (OSError, ValueError, TypeError):
        return False


def _remove(path: str) -> None:
    """Removes a checkpoint, if it is there. A kill in between leaves no part under its name."""
    shutil.rmtree(path + REMOVED, ignore_errors=True)
    if os.path.isdir(path):
        os.rename(path, path + REMOVED)
        shutil.rmtree(path + REMOVED)


# --------------------------------------------------------------------------------------------------
# Files


@contextlib.contextmanager
def all_or_nothing(path: str) -> Iterator[None]:
    """Turns a write that fails, as on a full disk, into a UserError, and removes the unfinished."""
    try:
        yield
    except (Exception, CheckpointException) as error:
        if of_another_rank(error):
            raise RuntimeError(str(error)) from error
        free = shutil.disk_usage(os.path.dirname(os.path.abspath(path))).free / 1e9
        if path.endswith(".incomplete"):
            shutil.rmtree(path, ignore_errors=True)
        said = (str(error).strip() or repr(error)).splitlines()[-1][:150]
        raise UserError(
            f"{path} could not be written ({said}; {free:.1f} GB are free there); mend the cause, "
            f"then go on from the last checkpoint with --resume"
        ) from error


def of_another_rank(error: BaseException) -> bool:
    """Whether ranks could not meet, or a collective has failed, because one is gone or stuck."""
    said = r"gloo|NCCL|[Tt]imed out|wait timeout|peer"
    return "RANK" in os.environ and bool(re.search(said, str(error)))


@contextlib.contextmanager
def replacing(path: str):
    """A new file for `path`: written beside, forced to the disk, renamed; removed where it cannot
    be finished."""
    try:
        with open(path + ".new", "w") as file:
            yield file
            file.flush()
            to_disk(file.fileno())
        os.replace(path + ".new", path)
    except OSError as error:
        with contextlib.suppress(OSError):
            os.remove(path + ".new")
        raise OSError(error.errno, error.strerror, path) from None


def write_json(path: str, content) -> None:
    with replacing(path) as file:
        json.dump(content, file, indent=1)


def files_below(path: str) -> list[str]:
    """The files below a directory, relative to it."""
    found = (os.path.join(top, name) for top, _, names in os.walk(path) for name in names)
    return sorted(os.path.relpath(file, path) for file in found)


def force(path: str, names: list[str]) -> None:
    """Forces files of a directory to the disk."""
    for name in names:
        with open(os.path.join(path, name), "rb") as file:
            to_disk(file.fileno())


# What a file system says that has no locks, or that cannot force a folder to the disk.
UNSUPPORTED = {errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.ENOLCK, errno.EINVAL}


def to_disk(descriptor: int) -> None:
    """Forces an open file or folder to the disk, where its file system can do that."""
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
