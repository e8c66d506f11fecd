"""The comments beside the fields of a dataclass, which are the help texts of its flags."""

import ast
import dataclasses
import inspect
import io
import textwrap
import tokenize


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
