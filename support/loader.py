"""The stream of rows: shuffled epochs, cut into batches, shared by the ranks, encoded ahead.

What a batch holds depends neither on the number of ranks nor on where a run was resumed. Place n of
the stream is row n of the shuffled epochs, whoever draws it.

A worker is a process that encodes rows ahead and sends them through a socket. The DataLoader of
torch puts each tensor into shared memory, under a file descriptor of its own. Where one of the two
runs out, as in a container with the usual 64 MB of /dev/shm, a run would wait for ever.
"""

import io
import itertools
import math
import os
import pickle
import random
import signal
import socket
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import BinaryIO, NoReturn

import torch
import torch.distributed as dist

from support.errors import UserError, counted
from support.ranks import rank, world_size


def run_length(config, rows: int) -> tuple[int, int | None, int]:
    """-> (rows a step over all ranks, rows of the whole run, steps), of a run over `rows` rows for
    some epochs. Where `config.max_steps` is positive it takes the epochs' place, and the rows of
    the run have no end (None)."""
    batch_size = config.per_device_train_batch_size * config.gradient_accumulation_steps
    batch_size *= world_size()
    if config.max_steps > 0:
        return batch_size, None, config.max_steps
    total = math.ceil(rows * config.num_train_epochs)
    return batch_size, total, math.ceil(total / batch_size)


def hold_out(examples: Sequence, share: float, seed: int) -> tuple[Sequence, Sequence]:
    """-> (rows to train on, rows that are held out), drawn at random. UserError where none is left
    to train on."""
    order = list(range(len(examples)))
    random.Random(seed).shuffle(order)
    count = math.ceil(share * len(examples))
    if count == len(examples):
        raise UserError(
            f"--data: of {counted(count, 'pair')} all would be held out; lower "
            f"--validation_share or add pairs"
        )
    subset = torch.utils.data.Subset
    return subset(examples, order[count:]), subset(examples, order[:count])


def keyed(seed: int, number: int) -> int:
    """The seed of step or epoch `number`. Runs with neighbouring --seed share no seed."""
    return seed * 1_000_003 + number


@lru_cache(maxsize=2)  # a batch may end one epoch and begin the next
def _epoch_order(epoch: int, rows: int, seed: int) -> torch.Tensor:
    return torch.randperm(rows, generator=torch.Generator().manual_seed(keyed(seed, epoch)))


def epoch_rows(start: int, end: int, rows: int, seed: int) -> list[int]:
    """The rows at places `start` to `end` of the endless stream of shuffled epochs."""
    places = (divmod(position, rows) for position in range(start, end))
    return [int(_epoch_order(epoch, rows, seed)[place]) for epoch, place in places]


def batches(
    rows: Sequence,
    batch_size: int,
    seed: int,
    start: int = 0,
    total: int | None = None,
    share: tuple[int, int] = (0, 1),
    workers: int = 0,
    timeout: float | None = None,
) -> Iterator[list]:
    """This rank's `share` (rank, ranks) of one global batch after another.

    `rows[draws]` encodes some draws, (place in the stream, number of the row) each; see
    `data.Encoded`. Batches are cuts of the stream from place `start` on. After place `total` they
    are empty. Rows are encoded ahead in `workers` processes, where there are any. UserError where
    one of these is gone, or sends nothing for `timeout` seconds."""

    def draws() -> Iterator[list[tuple[int, int]]]:
        for first in itertools.count(start, batch_size):
            last = first + batch_size if total is None else min(first + batch_size, total)
            numbers = epoch_rows(first, last, len(rows), seed)
            yield list(enumerate(numbers, first))[share[0] :: share[1]]

    return _ahead(rows, draws, workers, timeout) if workers else map(rows.__getitem__, draws())


# --------------------------------------------------------------------------------------------------
# Ranks


def dealt(items: list, size: Callable) -> list:
    """The items of all ranks, dealt anew so that each rank has about as much. -> this rank's, the
    largest first. Every rank calls it, with its own items; `size` measures an item.

    The size of a row is known only once it is encoded. So encoded rows travel between ranks."""
    largest_first = lambda items: sorted(items, key=lambda item: -size(item))
    if world_size() == 1:
        return largest_first(items)
    sizes: list = [None] * world_size()
    dist.all_gather_object(sizes, [size(item) for item in items])
    parts: list[list] = [[] for _ in sizes]
    for item, owner in zip(items, _owners(sizes)[rank()]):
        parts[owner].append(item)
    kept, parts[rank()] = parts[rank()], []
    return largest_first(kept + _exchanged(parts))


def _owners(sizes: list[list[int]]) -> list[list[int]]:
    """Sizes of each rank's items -> the ranks that they go to. The largest comes first, and each
    goes to the rank that has least so far. Among equals its own rank comes first."""
    places = [(of, i) for of, own in enumerate(sizes) for i in range(len(own))]
    held, owners = [0] * len(sizes), [[0] * len(own) for own in sizes]
    for of, i in sorted(places, key=lambda place: -sizes[place[0]][place[1]]):
        owner = min(range(len(held)), key=lambda r: (held[r], r != of))
        owners[of][i] = owner
        held[owner] += sizes[of][i]
    return owners


def _exchanged(parts: list[list]) -> list:
    """This rank's items for each rank -> the items that all ranks have for this one."""
    sent = []
    for part in parts:
        file = io.BytesIO()
        _Pickler(file, protocol=5).dump(part)
        sent.append(torch.frombuffer(file.getbuffer(), dtype=torch.uint8))
    lengths = torch.tensor([len(part) for part in sent])
    theirs = torch.empty_like(lengths)
    dist.all_to_all_single(theirs, lengths)
    received = torch.empty(int(theirs.sum()), dtype=torch.uint8)
    dist.all_to_all_single(received, torch.cat(sent), theirs.tolist(), lengths.tolist())
    found = (pickle.loads(part.numpy()) for part in received.split(theirs.tolist()))
    return [item for part in found for item in part]


# --------------------------------------------------------------------------------------------------
# Workers


def _ahead(rows, draws: Callable, workers: int, timeout: float | None) -> Iterator[list]:
    """The batches, which the workers encode in turns. Each has one ready and waits until that is
    taken, so one worker is a batch ahead of the run."""
    started = [
        _start_worker(rows, itertools.islice(draws(), worker, None, workers), timeout)
        for worker in range(workers)
    ]
    for batch, (pid, sent) in zip(draws(), itertools.cycle(started)):
        try:
            items = pickle.load(sent)
        except TimeoutError:
            how = f"sent nothing for {timeout / 60:g} minutes"  # as --timeout counts
            remedy = "see whether their files can be read, or raise --timeout"
            raise _lost(pid, how, rows, batch, remedy) from None
        except (EOFError, ConnectionError, pickle.UnpicklingError):
            remedy = "see whether memory ran out; --dataloader_num_workers 0 starts no worker"
            raise _lost(pid, None, rows, batch, remedy) from None
        if isinstance(items, UserError):
            raise items
        yield items


def _start_worker(rows, draws: Iterator, timeout: float | None) -> tuple[int, BinaryIO]:
    """Forks a process that encodes `draws`, batch after batch. -> its process id, and the file
    that it writes batches to. It ends when it writes and nobody is left to read."""
    stops = {signal.SIGTERM, signal.SIGINT}  # sent to the whole job, they are meant for the run
    try:
        here, there = socket.socketpair()
        here.settimeout(timeout)
        held = signal.pthread_sigmask(signal.SIG_BLOCK, stops)
        pid = os.fork()
    except OSError as error:
        raise UserError(
            f"a worker cannot be started ({error.strerror}); free some memory or processes, or "
            f"pass --dataloader_num_workers 0"
        ) from None
    if pid == 0:
        here.close()
        _work(rows, draws, there.makefile("wb"))
    signal.pthread_sigmask(signal.SIG_SETMASK, held)
    there.close()
    return pid, here.makefile("rb")


def _work(rows, draws: Iterator, file: BinaryIO) -> NoReturn:
    """What a worker does, from its first batch to its end."""
    try:
        torch.set_num_threads(1)  # a fork has none of its parent's other threads
        for batch in draws:
            try:
                items = rows[batch]
            except UserError as error:
                items = error
            try:
                _Pickler(file, protocol=5).dump(items)
                file.flush()
            except ConnectionError:
                break  # the run has ended
    except BaseException:  # whatever it is, it may not be possible to send it
        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(1)


class _Pickler(pickle.Pickler):
    """Pickles of a tensor only the values that it shows. A row's pixels are a view of its batch's,
    and torch would pickle the whole batch with each row."""

    def reducer_override(self, value):
        if isinstance(value, torch.Tensor):
            return torch.from_numpy, (value.numpy(),)
        return NotImplemented


def _lost(pid: int, how: str | None, rows, batch: list, remedy: str) -> UserError:
    """The error of a run whose worker is gone, or is too late and is ended here."""
    os.kill(pid, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    how = how or (f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}")
    if code == 1:  # an exception, whose traceback `_work` has printed
        remedy = "mend what the traceback above says"
    wheres = ", ".join(rows.where(number) for _, number in batch[:4]) + ", ..." * (len(batch) > 4)
    return UserError(
        f"a worker of rank {rank()} {how} while it encoded the rows {wheres}; {remedy}; then go on "
        f"with --resume"
    )
