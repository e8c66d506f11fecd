"""The options of a row: read from its fields, shown under its question, and accepted as answers.

Options are used whole, or their row is left out by a RowError: without its options a question is
another question, and with other letters its answer is another answer.
"""

import re
import string
from collections.abc import Iterator

from support.errors import RowError
from support.verifier import read_list

LETTERS = string.ascii_uppercase
COUNTS = [[*LETTERS], *([str(i + first) for i in range(26)] for first in (0, 1))]
OPTIONS = ("options", "choices", "option")  # fields of a row's options, the most trusted first
WORD = r"(?i:option|choice|opt)[ _-]?"
# The name of one option: option_a, choiceB, opt1, or A and (A).
ONE_OPTION = rf"(?!(?i:opts)$)(?:{WORD}([a-zA-Z]|\d\d?)|\(?([a-zA-Z])[).]?)"


def _empty(value) -> bool:
    """Whether a field holds nothing: null, NaN, blank text, or a list or dict of these alone."""
    if isinstance(value, (list, dict)):
        return all(map(_empty, value.values() if isinstance(value, dict) else value))
    return value is None or value != value or isinstance(value, str) and value.strip() in ("", "[]")


def _option_columns(fields: dict) -> dict:
    """The fields that hold one option each. Letters alone may mean anything else: they count from
    two on, and with an A."""
    found = {n: x for n, x in fields.items() if re.fullmatch(ONE_OPTION, n) and not _empty(x)}
    found = {n: x for n, x in found.items() if n.lower() not in OPTIONS}
    letters = len(found) > 1 and "A" in map(str.upper, fields)
    return found if letters or any(re.match(WORD, n) for n in found) else {}


def _named_options(fields: dict, depth: int = 0) -> Iterator[tuple]:
    """(name, value) of all fields, at any depth, whose names speak of options and that hold some.
    A number or a word holds none, as the kind of a question, nor does the name of what is right."""
    columns = _option_columns(fields)
    if any(depth == 0 or re.match(WORD, n) for n in columns):
        yield next(iter(columns)), columns
    about = r"(?i)(?!correct|gold)(.*(option(?!al)|choice)|opts$)(?!.*(answer|type|id|idx|index)$)"
    for name, value in fields.items():
        if name not in columns and re.match(about, name) and not _empty(value):
            if isinstance(value, (list, dict)) or re.search(r"[;,|/\n]", str(value)):
                yield name, value
        for part in value if isinstance(value, list) else [value]:
            if isinstance(part, dict):
                yield from _named_options(part, depth + 1)


def _choices(name: str, value) -> list[str]:
    """The options that a field holds, without letters: a list, also as text, or a dict by letters.
    Behind the last one may stand empty ones, as a table has them."""
    if _empty(value):
        return []
    if isinstance(value, str):
        lines = not value.strip().startswith("[")
        value = re.split(r"\s*[;\n]\s*", value.strip()) if lines else read_list(value)[0]
    if isinstance(value, dict) and {"text"} <= value.keys() <= {"text", "label"}:
        letters = [*LETTERS][: len(value["text"])]
        if (value.get("label") or letters) == letters:
            value = value["text"]
    if isinstance(value, dict):
        held = {key: text for key, text in value.items() if not _empty(text)}
        keys = [re.fullmatch(ONE_OPTION, key) for key in held]
        keys = [(key[1] or key[2]).upper() if key else "" for key in keys]
        of_key = dict(zip(keys, held.values()))
        orders = [count[: len(held)] for count in COUNTS if {*count[: len(held)]} == {*keys}]
        order = orders[0] if orders else []
        if order[:1] != ["A"] and any(str(text) in keys for text in held.values()):
            order = []  # an answer could be the number or the text
        value = [of_key[key] for key in order]
    value = [*value] if isinstance(value, list) else []
    while value and _empty(value[-1]):
        value.pop()
    texts = all(isinstance(x, (str, int, float)) and not _empty(x) for x in value)
    if not texts or not 2 <= len(value) <= len(LETTERS):
        raise RowError(
            f"its options in `{name}` are not a list of 2 to {len(LETTERS)} texts, or texts by "
            f"A, B and so on; make them one, or write them into the question and remove the field"
        )
    pairs = zip(LETTERS, map(str, value))
    return [re.sub(rf"^\(?{letter}[.):] *", "", text.strip()) for letter, text in pairs]


def options_of(row: dict, turns: list) -> list[str]:
    """The options that a row offers, without letters. RowError where it names others as well, which
    its turns do not show."""
    fields = [(name, row[name]) for known in OPTIONS for name in row if name.lower() == known]
    columns = _option_columns(row)
    fields.append((next(iter(columns), ""), columns))
    options = next(filter(None, (_choices(*field) for field in fields)), [])
    for name, value in _named_options(row):
        others = _choices(name, value)
        if others != options and not _shown(others, turns):
            raise RowError(f"`{name}` names options, and no stage reads it; call it `options`")
    return options


def _shown(options: list[str], turns: list) -> bool:
    """Whether the turns show all of the options, each behind its letter."""
    parts = [part for _, said in turns for part in (said if isinstance(said, list) else [said])]
    said = "\n".join(str(part.get("text") if isinstance(part, dict) else part) for part in parts)
    shown = r"\b{}\W{{1,3}}(?<!\s[-.]){}(?!\w|[.,]\d)"  # "A. 10" does not show 1, nor "A. -1"
    pairs = zip(LETTERS, map(re.escape, options))
    return all(re.search(shown.format(*pair), said) for pair in pairs)


def with_options(turns: list, options: list[str]) -> list:
    """The turns. Where none shows the options, the user's last turn gets them, with letters."""
    if _shown(options, turns):
        return turns
    last = max(i for i, (role, _) in enumerate(turns) if role == "user")
    role, content = turns[last]
    if not isinstance(content, str):
        raise RowError(
            "its question is in parts, which is not read together with options; write the options "
            "into the question and remove the field"
        )
    content = "\n".join([content, *(f"{x}. {text}" for x, text in zip(LETTERS, options))])
    return [*turns[:last], (role, content), *turns[last + 1 :]]


def chosen(answers: list[str], options: list[str]) -> list[str]:
    """The answers, with an option's text for its letter, and its letter for its text. RowError
    where it is not clear which one is meant: a number may count them from 0 or from 1. A text that
    is the letter of another option is not accepted."""
    found, letters = list(answers), LETTERS[: len(options)]
    for answer in answers if options else ():
        named = [x for x, text in zip(letters, options) if text == answer or x == answer]
        key = re.fullmatch(ONE_OPTION, answer.strip(" ."))  # b, (B), option B
        named = named or [x for x in letters if key and x == (key[1] or key[2]).upper()]
        if len(named) > 1 or not named and re.fullmatch(rf"\d+|[A-Z]|{WORD}\w", answer):
            raise RowError(
                f"it is not clear which of the row's {len(options)} options the answer {answer} "
                f"means; give the option's text or its letter"
            )
        for letter in named:
            text = options[letters.index(letter)]
            found += [letter] if text in letters else [letter, text]
    return list(dict.fromkeys(found))
