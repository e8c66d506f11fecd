"""What a user can mend: errors that end a run in one line, and rows that are left out."""

import sys

# A stage imports torch first, and models of transformers after this. The report imports neither.
if sys.flags.optimize > 1 and "torch" in sys.modules:
    print(
        "error: python -OO (PYTHONOPTIMIZE=2) leaves out the docstrings, which transformers reads; "
        "start without it",
        file=sys.stderr,
    )
    sys.exit(2)


class UserError(Exception):
    """Something the user can mend. Its text is one line that names the thing and the remedy."""


class RowError(Exception):
    """A row that cannot be used, and why. The row is left out, counted and named."""

    where = ""  # "file:line"


class Unfit(RowError):
    """A row that is sound, but that this run cannot take: it is too long, or its student broke the
    format. It does not count as a bad row."""


class Ended(Exception):
    """Ends the run, by a signal or because it had finished before: (message, exit code)."""


def counted(number: int, noun: str) -> str:
    """A number of things in words: "1 row", "2 rows"."""
    return f"{number} {noun}" + "s" * (number != 1)


def printable(text: str) -> str:
    """The text with control characters written out. Text from data could otherwise move the
    cursor of a terminal, or change what stands on it."""
    return "".join(c if c.isprintable() or c in "\n\t" else repr(c)[1:-1] for c in text)
