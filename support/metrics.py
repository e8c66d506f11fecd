"""Metrics: how the values of the ranks become one number, and where a line of them goes.

A stage says of each value how it is measured: `Mean(total, count)`, `Loss(value)`, `Sum(value)`,
`Max(value)` or `Min(value)`. A plain value is the same on all ranks.
"""

import dataclasses
import math
from collections.abc import Callable

from support.errors import UserError
from support.ranks import all_max, all_sum


@dataclasses.dataclass(frozen=True)
class Mean:
    """`total / count`, both summed over the ranks; null where the count is 0, since nothing stands
    in for a measurement that was not made."""

    total: float
    count: float

    def __add__(self, other: "Mean") -> "Mean":
        return Mean(float(self.total + other.total), float(self.count + other.count))


@dataclasses.dataclass(frozen=True)
class Loss:
    """A loss that is divided by a global denominator, so the values of the ranks add up. Several
    updates give their mean, no update gives null."""

    value: float
    updates: int = 1

    def __add__(self, other: "Loss") -> "Loss":
        return Loss(self.value + other.value, self.updates + other.updates)


@dataclasses.dataclass(frozen=True)
class Sum:
    """The sum over the ranks."""

    value: float

    def __add__(self, other: "Sum") -> "Sum":
        return Sum(self.value + other.value)


@dataclasses.dataclass(frozen=True)
class Max:
    """The largest value of any rank."""

    value: float

    def __add__(self, other: "Max") -> "Max":
        return Max(max(self.value, other.value))


@dataclasses.dataclass(frozen=True)
class Min:
    """The smallest value of any rank."""

    value: float

    def __add__(self, other: "Min") -> "Min":
        return Min(min(self.value, other.value))


def add(metrics: dict, more: dict) -> dict:
    """The metrics of two parts of a step as one, name by name."""
    names = dict.fromkeys([*metrics, *more])
    return {
        name: metrics[name] + more[name]
        if name in metrics and name in more
        else metrics.get(name, more.get(name))
        for name in names
    }


def across_ranks(metrics: dict) -> dict:
    """Name -> number, over all ranks. A plain value is the same on all ranks
    and stays. Every rank calls it with the same names in the same order."""
    summed, extremes = [], []
    for metric in metrics.values():
        if isinstance(metric, Mean):
            summed += [float(metric.total), float(metric.count)]
        elif isinstance(metric, (Loss, Sum)):
            summed.append(float(metric.value))
        elif isinstance(metric, Max):
            extremes.append(float(metric.value))
        elif isinstance(metric, Min):
            extremes.append(-float(metric.value))
    summed, extremes = iter(all_sum(summed).tolist()), iter(all_max(extremes).tolist())
    line = {}
    for name, metric in metrics.items():
        if isinstance(metric, Mean):
            total, count = next(summed), next(summed)
            line[name] = total / count if count else None
        elif isinstance(metric, Loss):
            total = next(summed)
            line[name] = total / metric.updates if metric.updates else None
        elif isinstance(metric, Sum):
            total = next(summed)
            line[name] = total if isinstance(metric.value, float) else int(total)
        elif isinstance(metric, Max):
            line[name] = next(extremes)
        elif isinstance(metric, Min):
            line[name] = -next(extremes)
        else:
            line[name] = metric
    return line


def finite(line: dict) -> dict:
    """The line with null in place of NaN and infinity, which JSON does not have."""
    none = [k for k, v in line.items() if isinstance(v, float) and not math.isfinite(v)]
    return line | dict.fromkeys(none)


def writer_to(report_to: str, path: str, fields: dict) -> Callable | None:
    """A function of (line, step) that sends metrics to --report_to as well; None for none."""
    if report_to == "none":
        return None
    if report_to == "tensorboard":
        from torch.utils.tensorboard import SummaryWriter

        board = SummaryWriter(path)

        def write(line, step):
            for name, value in line.items():
                board.add_scalar(name, value, step)
            board.flush()

        return write
    try:
        import wandb
    except ImportError:
        raise UserError(
            "--report_to wandb: it is not installed; pip install wandb, or use tensorboard"
        ) from None
    try:
        wandb.init(project="prism", dir=path, config=fields)
    except Exception as error:
        said = (str(error).strip() or repr(error)).splitlines()[0][:150]
        raise UserError(
            f"--report_to wandb: it does not start ({said}); run `wandb login`, or set "
            f"WANDB_MODE=offline"
        ) from None
    return lambda line, step: wandb.log(line, step=step)
