"""The stream of rows: shuffled epochs, cut into batches, shared by the ranks, encoded ahead.

What a batch holds depends neither on the number of ranks nor on where a run was resumed. Place n of
the stream is row n of the shuffled epochs, whoever draws it.
"""

import itertools
import math
import random
from collections.abc import Iterator, Sequence
from functools import lru_cache

import torch

from support.errors import UserError
from support.ranks import world_size


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
        raise UserError(f"--data: {len(examples)} pairs leave none beside {count} held out")
    subset = torch.utils.data.Subset
    return subset(examples, order[count:]), subset(examples, order[:count])


@lru_cache(maxsize=2)  # a batch may end one epoch and begin the next
def _epoch_order(epoch: int, rows: int, seed: int) -> torch.Tensor:
    return torch.randperm(rows, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))


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
) -> Iterator[list]:
    """This rank's `share` (rank, ranks) of one global batch after another.

    `rows[draws]` encodes some draws, (place in the stream, number of the row) each; see
    `data.Encoded`. Batches are cuts of the stream from place `start` on. Behind place `total` they
    are empty. Rows are encoded ahead in `workers` processes, where there are any."""

    def draws():
        for first in itertools.count(start, batch_size):
            last = first + batch_size if total is None else min(first + batch_size, total)
            numbers = epoch_rows(first, last, len(rows), seed)
            yield list(enumerate(numbers, first))[share[0] :: share[1]]

    own = torch.Generator()  # otherwise the loader would draw from the global one, as dropout does
    return iter(
        torch.utils.data.DataLoader(
            rows, None, sampler=draws(), num_workers=workers, collate_fn=list, generator=own
        )
    )
