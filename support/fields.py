"""What a dataclass says of its fields, which are flags: the range in a field's type, and the help
text in the comment beside it."""

import ast
import dataclasses
import inspect
import io
import math
import sys
import textwrap
import tokenize
from typing import Annotated, get_args, get_type_hints

from support.errors import UserError

# The types of flags, with the smallest and the largest value that each may have.
MOST = 2**31 - 1  # the largest count; products of two such numbers still fit into 64 bits
Count = Annotated[int, 1, MOST]
Natural = Annotated[int, 0, MOST]
Steps = Annotated[int, -MOST, MOST]  # the length of a run; below 1: as many as the epochs have
Positive = Annotated[float, 1e-9, 1e9]  # so that it and what is divided by it stay finite
NonNegative = Annotated[float, 0.0, sys.float_info.max]
Share = Annotated[float, 0.0, 1.0]
Minutes = Annotated[float, 1e-9, 30_000.0]  # no socket waits longer
Seed = Annotated[int, 0, 2**32 - 1]


def check_ranges(config) -> None:
    """UserError for a number outside the range that its type gives."""
    for name, hint in get_type_hints(type(config), include_extras=True).items():
        value = getattr(config, name)
        for kind in (hint, *get_args(hint)):  # Count, or Count | None
            low, high = getattr(kind, "__metadata__", (-math.inf, math.inf))
            if value is not None and hasattr(kind, "__metadata__") and not low <= value <= high:
                most = "" if high >= sys.float_info.max else f" and at most {high:.10g}"
                raise UserError(f"--{name} {value}: must be at least {low:.10g}{most}")


def comments_of(config_class) -> dict[str, str]:
    """Field -> the comment beside it, of a dataclass and of those that it extends."""
    found = {}
    for kind in reversed(config_class.__mro__):
        if not dataclasses.is_dataclass(kind):
            continue
        source = textwrap.dedent(inspect.getsource(kind))
        comments = {
            token.start[0]: token.string.lstrip("# ")
            for token in tokenize.generate_tokens(io.StringIO(source).readline)
            if token.type == tokenize.COMMENT
        }
        for node in ast.parse(source).body[0].body:
            if isinstance(node, ast.AnnAssign):
                lines = range(node.lineno, node.end_lineno + 1)
                text = " ".join(comments[line] for line in lines if line in comments)
                found[node.target.id] = text
    return found
