"""What a user can mend: errors that end a run in one line, and rows that are left out."""

import os
import sys
from pathlib import Path

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


# Of a file of a model or a checkpoint, and the directory that it belongs to.
MAY_NOT_READ = "{}: this user may not read it; ask its owner for chmod -R a+rX {}"


def unreadable(path: str) -> str:
    """What to say of a file that this user may not read, or of the first directory above it that
    they may not enter, since the system says of what lies within that it does not exist. "" for a
    file that can be read, and where there is none."""
    if os.access(path, os.R_OK):
        return ""
    path = Path(os.path.realpath(path))
    for part in [*reversed(path.parents), path]:
        mode, word, flag = ("a+r", "read", os.R_OK) if part == path else ("a+x", "enter", os.X_OK)
        if os.path.exists(part) and not os.access(part, flag):
            return f"{part}: this user may not {word} it; ask its owner for chmod {mode} {part}"
    return ""


def counted(number: int, noun: str) -> str:
    """A number of things in words: "1 row", "2 rows"."""
    return f"{number} {noun}" + "s" * (number != 1)


def printable(text: str) -> str:
    """The text with control characters written out. Text from data could otherwise move the
    cursor of a terminal, or change what stands on it."""
    return "".join(c if c.isprintable() or c in "\n\t" else repr(c)[1:-1] for c in text)
