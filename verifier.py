"""The rule-based verifier of RLVR: reward = 0.8 * accuracy + 0.2 * format.

RL finds every false positive, so the verifier judges the WHOLE answer as one claim and errs towards "wrong":
  - Plain rules with exact arithmetic (no tolerance: 3.14 is not pi, 0.33 is not 1/3) settle choices, numbers with
    units, fractions, lists, intervals and words. They read a string completely or not at all, so an answer that
    merely contains the truth ("12 or 13", "A B C D", a paragraph) cannot pass.
  - What is left is algebra (`2\\sqrt{3}` against `\\sqrt{12}`): math-verify proposes, in a child process, and an exact
    check disposes. Only its LaTeX parser (antlr) is used; its other parser hands text to Python's eval.
  - A number has to be written as a number: `17*23` is not 391, and no integral is solved on the policy's behalf.
Choices that a person may want to know: units are not converted ("100 cm" is not "1 m"), but one side may lack its unit;
percent is such a unit, so "50%" matches "50" and not "0.5"; bare lists are ordered, {sets} and "x = 1 or x = 2" are
not; only ASCII digits are digits; "nan" and "inf" match nothing; answers above 1024 characters are not judged.
"""

from __future__ import annotations

import atexit
import json
import os
import re
import select
import subprocess
import sys
import threading
import time
import warnings
from fractions import Fraction

from data import parse_response

ACCURACY, FORMAT = 0.8, 0.2  # what a right answer and a whole format are worth; paper: 0.8, 0.2
MAX_CHARS = 1024
LIMIT = 1.0  # seconds that algebra may take for one answer
START_LIMIT = 60.0  # seconds that the child may take to import sympy, once per process


# ------------------------------------------------------------------------------------------------ format and reward


def reward(response_text: str, ground_truth) -> float:
    """0.8 * accuracy + 0.2 * format; a broken format earns nothing, whatever it says."""
    response = parse_response(response_text)
    return 0.0 if response is None else ACCURACY * verify(response.answer, ground_truth) + FORMAT


def verify(answer: str, ground_truth) -> bool:
    """Whether `answer` states `ground_truth`, a string or a list of accepted ones. Never raises, never hangs."""
    truths = ground_truth if isinstance(ground_truth, (list, tuple)) else [ground_truth]
    unsettled = []  # one list of (truth, answer) pairs for every accepted truth that only algebra can settle
    try:
        said = _clean(answer)
        for truth in map(_clean, truths):
            verdict = _compare(said, truth)
            if verdict is True:
                return True
            if verdict:
                unsettled.append(verdict)
        return bool(unsettled) and _algebra_says(unsettled)
    except (
        Exception
    ):  # a reward function that raises ends a run of days; what we fail to understand is not right
        return False


# ------------------------------------------------------------------------------------------------ one way of writing

_ALIKE = str.maketrans(
    {
        **dict.fromkeys("−–‐‑", "-"),
        **dict.fromkeys("\u00a0\u2009\u202f\u3000", " "),
        **dict.fromkeys("·⋅∙", r"\cdot "),
        **dict.fromkeys("“”", '"'),
        **dict.fromkeys("‘’′", "'"),
        "×": r"\times ",
        "÷": "/",
        "π": r"\pi ",
        "√": r"\sqrt ",
        "≤": r"\le ",
        "≥": r"\ge ",
        "∞": r"\infty ",
        "≈": r"\approx ",
        "∠": r"\angle ",
        "∪": r"\cup ",
        "∈": r"\in ",
        "θ": r"\theta ",
        "º": "°",
        "℃": "°C",
        "²": "^2",
        "³": "^3",
        "½": r"\frac{1}{2}",
        "¼": r"\frac{1}{4}",
        "¾": r"\frac{3}{4}",
        "⅓": r"\frac{1}{3}",
        "⅔": r"\frac{2}{3}",
        "，": ",",
        "、": ",",
        "：": ":",
        "；": ";",
        "（": "(",
        "）": ")",
        "。": ".",
    }
)
_REWRITES = [
    (re.compile(pattern, re.ASCII), by)
    for pattern, by in (
        (r"\\\$", "\0"),  # a dollar of money; a bare one may be a math delimiter
        (
            r"\$\$?(?![\s,;])([^$]*[^$\s,;])\$\$?",
            r"\1",
        ),  # inline math; "$5, $10" is money and stays
        (
            r"\\(?:text|mathrm|mathbf|textbf|textit|mathit|operatorname|mbox|rm|bf)\s*\{([^{}]*)\}",
            r" \1 ",
        ),
        (r"\\(?:left|right|displaystyle|limits)(?![A-Za-z])|\\!", ""),
        (r"(?<=\d)(?:\\,|\{,\})(?=\d{3}(?!\d))", ","),  # 1{,}234 and 1\,234
        (r"\\[,;: ]|\\q?quad(?![A-Za-z])|~(?=\w)", " "),
        (r"\\[dtc]frac", r"\\frac"),
        (r"\s+\^", "^"),
        (r"\^\s*\{?\s*\\circ\s*\}?|\\circ(?![A-Za-z])|\\degree(?:s)?(?![A-Za-z])", "°"),
        (r"\\%", "%"),
        (r"\\leq?(?![A-Za-z])|<=|⩽", r"\\le "),
        (r"\\geq?(?![A-Za-z])|>=|⩾", r"\\ge "),
        (r"\\[{](.*)\\[}]", r"{\1}"),
        (r"\*\*(?=\S)([^*]*)\*\*", r"\1"),
        (
            r"(?:\\sqrt|(?<![A-Za-z\\])sqrt)\s*(?:\(([^()]*)\)|(\d+|[a-z](?![A-Za-z])))",
            r"\\sqrt{\1\2}",
        ),
    )
]
_BOXED = re.compile(r"\\f?box(?:ed)?\s*\{(.*)\}", re.DOTALL)
_QUOTED = re.compile(r"\\\((.*)\\\)|\\\[(.*)\\\]|\"([^\"]*)\"|'([^']*)'|`([^`]*)`", re.DOTALL)
# Phrases in front of a value. None may hold a negation, an alternative or a digit: the value stays the only claim.
_NAMES = r"(?:(?!(?:not|or|either|neither|but|if|wrong|incorrect|false|never|except|unless)\b)(?:[a-z]+|[A-Z]{2,4})\s+)"
_LEAD = re.compile(
    r"(?:(?:[Ss]o|[Tt]hus|[Hh]ence|[Tt]herefore),?\s+)?(?:"
    r"(?:[Tt]he\s+)?(?:(?:[Ff]inal|[Cc]orrect|[Rr]ight)\s+)?(?:[Aa]nswer|[Oo]ption|[Cc]hoice)\b(?:\s+is\b)?\s*:?"
    r"(?:\s*(?:option|choice)\b)?"
    rf"|(?:[Tt]he|[Ii]ts?|[Tt]his|[Tt]here)\s+{_NAMES}{{0,8}}?(?:is|are|equals)\b(?!\s+not\b))\s*",
    re.ASCII,
)
_ABOUT = re.compile(
    r"(?:equal to|approximately|approx\.?|about|roughly|\\approx|~)\s*", re.IGNORECASE
)


def _clean(text) -> str:
    """One way of writing for the many that mean the same: no LaTeX wrappers, no phrase around the value."""
    if (
        isinstance(text, bool)
        or not isinstance(text, (str, int, float))
        or len(str(text)) > MAX_CHARS
    ):
        return ""
    text = str(text).translate(_ALIKE)
    if len(text) > 2 * MAX_CHARS:  # a thousand times "½" is no answer either
        return ""
    for _ in range(6):  # wrappers stand inside wrappers: $\boxed{\text{(B)}}$
        before, text = text, " ".join(text.split())
        for pattern, by in _REWRITES:
            text = pattern.sub(by, text)
        text = text.strip()
        match = _BOXED.fullmatch(text) or _QUOTED.fullmatch(text)
        if match and _closed(inner := next(group for group in match.groups() if group is not None)):
            text = inner
        for phrase in (_LEAD, _ABOUT):
            match = phrase.match(text)
            text = text[match.end() :] if match and match.end() < len(text) else text
        text = text if text.endswith("..") else text.rstrip(" .,;:")  # 0.333... goes on
        text = re.sub(r"(?<=[A-Za-z]{2})!$", "", text)  # "Yes!", but not the factorial "n!"
        if text == before:
            break
    return " ".join(text.replace("\0", "$").split())


def _closed(text: str) -> bool:
    """Whether brackets open and close inside `text` itself, of whatever shape: [1, 2) is an interval."""
    depth = 0
    for char in text:
        depth += (char in "([{") - (char in ")]}")
        if depth < 0:
            return False
    return depth == 0


# ------------------------------------------------------------------------------------------------ numbers and units

_DECIMAL = r"(?=\.?\d)(?:\d{1,3}(?:,\d{3})+(?![\d,])|\d*)(?:\.\d+)?"
_INDEX = r"[-+]?\d{1,3}"  # an exponent; three digits, so that no text makes us build a number of a billion digits
_NUMBER = re.compile(
    r"(?P<sign>[-+]?) ?(?P<money>[$€£¥₹]?) ?(?:(?P<whole>\d+)(?: | ?(?=\\)))?(?:"
    rf"(?P<top>{_DECIMAL}) ?/ ?(?P<bottom>{_DECIMAL})"
    rf"|\\frac ?(?:\{{ ?(?P<top2>-?{_DECIMAL}) ?\}}|(?P<top3>\d))"
    rf" ?(?:\{{ ?(?P<bottom2>{_DECIMAL}) ?\}}|(?P<bottom3>\d))"
    rf"|(?P<plain>{_DECIMAL})(?:[eE](?P<e>{_INDEX})(?!\d)"
    rf"| ?(?:\\times|\\cdot|\*|x) ?10 ?\^ ?(?:\{{ ?(?P<e2>{_INDEX}) ?\}}|\(?(?P<e3>{_INDEX})\)?)(?!\d))?)",
    re.ASCII,
)
_WORDS = {
    word: str(n)
    for n, word in enumerate(
        "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
        "eighteen nineteen twenty".split()
    )
}
_SCALES = {"thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}


def _units() -> dict[str, str]:
    table = {
        name: line.split()[0]
        for line in (
            "% percent percentage pct",
            "° degree degrees deg",
            "°C",
            "°F",
            "K kelvin kelvins",
            "rad radian radians",
            "in inch inches",
            "ft foot feet",
            "yd yard yards",
            "mi mile miles",
            "lb lbs pound pounds",
            "oz ounce ounces",
            "t ton tons tonne tonnes",
            "ha hectare hectares",
            "acre acres",
            "gal gallon gallons",
            "mph",
            "min mins minute minutes",
            "h hr hrs hour hours",
            "day days",
            "week weeks",
            "month months",
            "year years yr yrs",
            "$ dollar dollars USD",
            "€ euro euros EUR",
            "£ GBP",
            "¥ yuan RMB CNY",
            "₹ rupee rupees Rs INR",
            "¢ cent cents",
            "unit units",
            "people",
            "children",
            "men",
            "women",
        )
        for name in line.split()
    }
    bases = (
        ("m", "meter metre"),
        ("g", "gram gramme"),
        ("L", "liter litre"),
        ("s", "second sec"),
        ("W", "watt"),
        ("V", "volt"),
        ("A", "ampere amp"),
        ("Hz", "hertz"),
        ("J", "joule"),
        ("N", "newton"),
        ("Pa", "pascal"),
        ("Ω", "ohm"),
        ("eV", "electronvolt"),
        ("mol", "mole"),
        ("cal", "calorie"),
        ("T", "tesla"),
        ("C", "coulomb"),
    )
    for short, long in (
        ("", ""),
        ("k", "kilo"),
        ("c", "centi"),
        ("m", "milli"),
        ("d", "deci"),
        ("µ", "micro"),
        ("μ", "micro"),
        ("n", "nano"),
        ("M", "mega"),
        ("G", "giga"),
    ):
        for symbol, names in bases:
            unit = short.replace("μ", "µ") + symbol
            table[short + symbol] = unit
            table.update({long + name + s: unit for name in names.split() for s in ("", "s")})
    return table | {"ml": "mL", "l": "L", r"\Omega": "Ω", r"k\Omega": "kΩ"}


_UNITS = _units()
# "5 apples" counts apples, so the noun may be absent; "5 tens" and "5 quarters" are other numbers than 5.
_NOT_NOUNS = re.compile(
    r".*(?:ths|lves|thirds|quarters|tens|dozens|hundreds|ands|llions|times|plus|minus|pairs|scores|less)$"
)


def _unit(text: str) -> str | None:
    """One name for a unit: "square centimeters", "cm^2" and "sq cm" are the same; None where it is not a unit."""
    text = re.sub(
        r"\b[Dd]egrees? (?:[Cc]elsius|C)\b|° ?C\b", "°C", text.replace("per cent", "%")
    ).strip(" -")
    text = re.sub(r"(\w+) squared\b", r"\1^2", re.sub(r"(\w+) cubed\b", r"\1^3", text))
    text = re.sub(
        r"\b(?:square|sq\.?) (\w+)", r"\1^2", re.sub(r"\b(?:cubic|cu\.?) (\w+)", r"\1^3", text)
    )
    powers: dict[str, int] = {}
    for side, part in zip((1, -1), re.sub(r" ?(?:\bper\b|/) ?", "/", text).split("/", 1)):
        for factor in re.split(r" ?(?:\\cdot|\*| ) ?", part):
            match = re.fullmatch(r"(\\?[^\W\d_]+|[%°$€£¥¢₹]|°[CF])(?:\^?\{?(-?[1-4])\}?)?", factor)
            name = match and (
                _UNITS.get(match[1]) or len(match[1]) > 3 and _UNITS.get(match[1].lower())
            )
            if not name and re.fullmatch(r"[a-z]{3,}s", text) and not _NOT_NOUNS.match(text):
                return "#" + text
            if not name:
                return None
            powers[name] = powers.get(name, 0) + side * int(match[2] or 1)
    return " ".join(f"{name}^{power}" for name, power in sorted(powers.items()))


def _quantity(text: str) -> tuple[Fraction, str | None] | None:
    """Exact value and unit of a text that is a number and nothing else; None otherwise."""
    text = re.sub(r"^([-+]?)10 ?\^", r"\g<1>1*10^", _WORDS.get(text.lower(), text))
    match = _NUMBER.match(text)
    if not match or match["whole"] and match["plain"]:  # "1 2" is no number
        return None
    part = {name: (group or "").replace(",", "") for name, group in match.groupdict().items()}
    if part["plain"]:
        value = Fraction(part["plain"]) * Fraction(10) ** int(
            part["e"] or part["e2"] or part["e3"] or 0
        )
    else:
        top = Fraction(part["top"] or part["top2"] or part["top3"])
        bottom = Fraction(part["bottom"] or part["bottom2"] or part["bottom3"])
        if (
            bottom == 0 or part["whole"] and not 0 < top < bottom
        ):  # 2 1/3 is mixed, 2 7/3 is a slip of the pen
            return None
        value = int(part["whole"] or 0) + top / bottom
    rest = text[match.end() :]
    # "5m" may be five metres or five times m: with a single letter, only a space says that it is a unit.
    if re.fullmatch(r"[A-Za-z]", rest):
        return None
    scale, _, after = rest.strip(" -").partition(" ")
    if scale in _SCALES:
        value, rest = value * _SCALES[scale], after
    unit = _unit(rest) if rest.strip() else None
    if rest.strip() and (unit is None or part["money"]):
        return None
    return (-value if part["sign"] == "-" else value), _unit(part["money"]) if part[
        "money"
    ] else unit


# ------------------------------------------------------------------------------------------------ structure

_CHOICE = re.compile(
    r"(?:\(([A-Ja-j])\)|\[([A-J])\]|([A-Ja-j])(?:\)|[.:](?= )|$))\s*(.*)", re.DOTALL
)
_OTHER_CHOICE = re.compile(
    r"\b[B-J]\b|\bA\b(?! [a-z]{3,})|\b[a-j]\)|\bor\b|^[,;/&|+]|(?:^|[,;/&] ?)[a-j]$"
)
_LETTERS = re.compile(r"\(?[A-J]\)?(?:(?:\s*[,;&/]\s*|\s*,?\s+and\s+)\(?[A-J]\)?)+")
_LABEL = re.compile(
    r"((?:[A-Za-z]|\\[a-z]+)(?:_?\{?\w{1,3}\}?)?|[a-z]+\([a-z]\)|(?:m ?)?\\angle ?\w{1,3}|[a-z]{3,12}(?: [a-z]+)?)"
    r"\s*(?:=|\\in(?![a-z]))\s*([^=<>]+)",
    re.ASCII,
)
_STEP = re.compile(r"\((\d)\)\s*")
Pairs = list[tuple[str, str]]


def _choice(text: str) -> tuple[str, str] | None:
    """Letter(s) and the text after: "(B) 12 cm" -> ("B", "12 cm"), "A and C" -> ("AC", "").

    Text that names a further option makes it no choice at all: "(A) 4 (B) 5" must not count as A.
    """
    if re.fullmatch(r"[A-H]{2,6}", text) and "".join(sorted(set(text))) == text:
        return text, ""
    if _LETTERS.fullmatch(text):
        letters = re.findall(r"\b[A-J]\b", text)
        return ("".join(sorted(letters)), "") if len(set(letters)) == len(letters) else None
    match = _CHOICE.fullmatch(text)
    if not match or _OTHER_CHOICE.search(match[4]):
        return None
    return (match[1] or match[2] or match[3]).upper(), match[4]


def _parts(text: str) -> tuple[str, list[str]] | None:
    """Kind and members of a list: bracket pair for tuples, intervals and sets, "," or "or" or ":" for a bare list."""
    steps = _STEP.split(text)  # "(1) 4 (2) 5"
    if (
        len(steps) > 3
        and not steps[0]
        and steps[1::2] == [str(n + 1) for n in range(len(steps) // 2)]
    ):
        return ",", [step.strip(" ,;") for step in steps[2::2]]
    kind = ""
    if len(text) > 2 and text[0] in "([{" and text[-1] in ")]}" and _closed(text[1:-1]):
        kind, text = text[0] + text[-1], text[1:-1]
    members, separators, depth, start = [], set(), 0, 0
    for match in re.finditer(r"[(\[{]|[)\]}]|[,;:]|,?\s+(?:and|or)\s+", text):
        token = match[0].strip(" ,") or ","
        if token in "([{)]}":
            depth += 1 if token in "([{" else -1
        elif depth == 0:
            members.append(text[start : match.start()].strip())
            separators.add({"or": "or", ":": ":"}.get(token, ","))
            start = match.end()
    members.append(text[start:].strip())
    members = [member for member in members if member] if not kind else members  # "2, 3, and 4"
    if kind and (len(members) > 1 or kind != "()"):
        return kind, members
    if kind:  # brackets around one thing mean nothing
        return "()", members
    return ("/".join(sorted(separators)), members) if separators else None


def _label(text: str) -> tuple[str, str]:
    match = _LABEL.fullmatch(text)
    return (re.sub(r"[\s{}_]", "", match[1]), match[2].strip()) if match else ("", text)


def _match(answers: list[str], truths: list[str], ordered: bool, depth: int) -> bool | Pairs:
    if len(answers) != len(truths):
        return False
    if (
        not ordered
    ):  # take what plain rules can match; what remains is for algebra, in the order given
        answers, unmatched = list(answers), []
        for truth in truths:
            same = next(
                (answer for answer in answers if _compare(answer, truth, depth) is True), None
            )
            answers.remove(same) if same is not None else unmatched.append(truth)
        truths = unmatched
    verdicts = [_compare(a, t, depth) for a, t in zip(answers, truths)]
    if not all(verdicts):
        return False
    return [pair for verdict in verdicts if verdict is not True for pair in verdict] or True


def _squeeze(text: str) -> str:
    """White space that carries no meaning taken out; "1 2" keeps its own."""
    return re.sub(r"(?<=\d) (?=[A-Za-z\\])", "", re.sub(r" ?([^\w\s.,]) ?", r"\1", text))


def _phrase(text: str) -> str:
    return re.sub(r"^(?:the|an?) (?=\w{2})", "", text.casefold().strip(" .,;:\"'*`"))


def _compare(answer: str, truth: str, depth: int = 0) -> bool | Pairs:
    """True or False where a plain rule settles it; else the (truth, answer) pairs that algebra has to prove."""
    if (
        not answer
        or not truth
        or depth > 6
        or {answer.lower().strip("+-"), truth.lower().strip("+-")} & {"nan", "inf"}
    ):
        return False
    if _squeeze(answer) == _squeeze(truth):
        return True

    # Choices. The letter decides where the truth is a letter; text after it must not contradict the truth's text.
    said, true = _choice(answer), _choice(truth)
    if true:
        if said:
            return said[0] == true[0] and (
                not said[1] or not true[1] or _compare(said[1], true[1], depth + 1)
            )
        return bool(true[1]) and _compare(answer, true[1], depth + 1)
    if said and said[1]:
        return _compare(said[1], truth, depth + 1)

    # Numbers with units. A number has to be written as a number, so nothing else can equal one (but see labels).
    said, true = _quantity(answer), _quantity(truth)
    if said and true:
        return said[0] == true[0] and (said[1] == true[1] or not said[1] or not true[1])

    # Labels: "x = 5" says "5", but another label says something else.
    (name, bare), (true_name, true_bare) = _label(answer), _label(truth)
    one_label = not name and "=" not in bare or not true_name and "=" not in true_bare
    if (name or true_name) and (name == true_name or one_label):
        return _compare(bare, true_bare, depth + 1)

    # Lists. Same brackets and same length; order is free in {sets} and where every member says what it is (x = 2).
    said, true = (
        None if number else _parts(text) for number, text in ((said, answer), (true, truth))
    )  # 1,234 is one
    for one, kind, other in ((said, "answer", truth), (true, "truth", answer)):
        if one and one[0] == "()" and len(one[1]) == 1:
            return (
                _compare(one[1][0], other, depth + 1)
                if kind == "answer"
                else _compare(other, one[1][0], depth + 1)
            )
    if said and true:
        labelled = all(_label(part)[0] for part in said[1] + true[1])
        if said[0] != true[0] and not (labelled and {said[0], true[0]} == {",", "or"}):
            return False
        verdict = _match(said[1], true[1], not labelled and true[0] not in ("{}", "or"), depth + 1)
        return verdict if true[0] != ":" else verdict is True  # no algebra about 12:00 AM
    if said or true:
        return False

    if (name or true_name) and (_quantity(bare) or _quantity(true_bare)) or _quantity(truth):
        return False  # 2x = 10 is not the solution x = 5, and y = 5 is not x = 5

    # Words, case and outer punctuation ignored. Case matters in formulas: R - r is not r - R.
    if _phrase(answer) == _phrase(truth) and not _FORMULA.search(truth):
        return True

    # Algebra, with a unit at the end as for numbers. Single letters (h, m) stay: they may be variables.
    said_unit, true_unit = _tail_unit(answer), _tail_unit(truth)
    if said_unit and true_unit and said_unit[1] != true_unit[1]:
        return False
    said, true = (said_unit or (answer,))[0], (true_unit or (truth,))[0]
    if (said, true) != (answer, truth):
        return _compare(said, true, depth + 1)
    said, true = _algebra(answer), _algebra(truth)
    if said is None or true is None or len(_RELATION.findall(said)) != len(_RELATION.findall(true)):
        return False
    return [(true, said)]


def _tail_unit(text: str) -> tuple[str, str] | None:
    for match in re.finditer(r"(?<=[\w})]) (?=[A-Za-z%°])|(?=°)", text):
        head, tail = text[: match.start()], text[match.start() :].strip()
        if (
            head
            and (len(tail) > 1 or tail == "°")
            and (unit := _unit(tail))
            and not unit.startswith("#")
        ):
            return head, unit
    return None


_FORMULA = re.compile(r"[\\^+*=<>]|\b[A-Za-z\d]{1,2} ?[-/] ?[A-Za-z\d]{1,2}\b")
_RELATION = re.compile(r"[=<>]|\\[lg]e(?![a-z])")
# Other commands are refused: \int and \sum would let the policy hand in the question as its answer, and the parser
# reads \angle ABC and \vec{AB} as products, which commute. So it does with H2O and HO2; and it drops the base in 12_8.
_COMMANDS = set(
    "frac sqrt cdot times pi sin cos tan cot sec csc arcsin arccos arctan log ln exp le ge infty cup theta "
    "alpha beta gamma delta lambda mu rho sigma phi omega".split()
)
_REFUSED = re.compile(r"(?<![\\A-Za-z])[A-Za-z]+\d|\d_|\.\.|(?<!_)\d \d")
_FUNCTIONS = re.compile(
    r"(?<![A-Za-z\\])(sin|cos|tan|cot|sec|csc|log|ln|exp|pi|theta|alpha|beta)(?![A-Za-z])"
)


def _algebra(text: str) -> str | None:
    """LaTeX of a formula for the parser; None where it holds prose, which no parser should be made to guess at."""
    text = _FUNCTIONS.sub(r"\\\1 ", text.replace("**", "^").replace("*", r" \cdot "))
    words = re.findall(r"[A-Za-z]+", re.sub(r"\\[A-Za-z]+", " ", text))
    if not re.fullmatch(r"[0-9A-Za-z\\{}()\[\]^_+\-/=<>|,.' ]+", text) or re.fullmatch(
        r"[A-Za-z]{2}[A-Za-z ]*", text
    ):
        return None
    if _REFUSED.search(text) or set(re.findall(r"\\([A-Za-z]*)", text)) - _COMMANDS:
        return None
    return (
        None
        if any(len(word) > 3 or word.lower() in ("or", "and", "not") for word in words)
        else text
    )


# ------------------------------------------------------------------------------------------------ algebra in a child

# The child imports sympy once, then forks for every question; the kernel's alarm ends a fork that takes too long. So
# a hostile expression costs its own second and nothing after it: there is nothing to restart, no cache to poison and,
# if we are killed, nothing left behind (the server ends at end of file, a fork at its alarm).
_CHILD = r'''
import gc, json, os, resource, signal, sys
signal.pthread_sigmask(signal.SIG_SETMASK, [])
signal.signal(signal.SIGALRM, signal.SIG_DFL)
signal.signal(signal.SIGINT, signal.SIG_IGN)
replies = os.fdopen(os.dup(1), "w", buffering=1)
os.dup2(2, 1)  # nothing a library prints may pass for a reply
import sympy, sympy.parsing.sympy_parser, sympy.physics.units  # units: simplify imports them, and they evaluate text
from latex2sympy2_extended.latex2sympy2 import ConversionConfig, _Latex2Sympy, latex2sympy
from latex2sympy2_extended.logic import And
from math_verify.grader import should_treat_as_complex, verify

def refuse(*args, **kwargs):
    raise RuntimeError("text is not evaluated as Python")

sympy.parsing.sympy_parser.eval_expr = refuse  # the one place where sympy (sympify, parse_expr) evaluates text

def guard(event, args):  # a second lock on the same door
    if event.partition(".")[0] in ("subprocess", "socket", "ctypes", "shutil") or event in (
            "os.system", "os.exec", "os.posix_spawn", "os.fork", "os.remove", "os.rename", "os.kill"):
        refuse()
    if event == "open" and (args[1] or "r") not in ("r", "rb"):
        refuse()

# latex2sympy reads a number by sympy.Number(text), which ends in that eval. Rational reads it itself, and exactly.
_Latex2Sympy.parse_number = lambda self, text: sympy.Rational(text.replace(",", ""))

def parse(text):
    return latex2sympy(text, is_real=not should_treat_as_complex(text), normalization_config=None,
                       conversion_config=ConversionConfig(lowercase_symbols=False))

def values(x, y):  # both at the same arbitrary point, to 50 digits
    symbols = sorted(x.free_symbols | y.free_symbols, key=str)
    point = {s: sympy.Rational(sympy.prime(11 + i), sympy.prime(5 + 2 * i)) for i, s in enumerate(symbols)}
    return [sympy.N(e.subs(point).doit(), 50) for e in (x, y)]

def exact(truth, answer):
    """math-verify rounds and chops; a formula also has to agree to 40 digits, relative to its own size."""
    if isinstance(truth, And) and isinstance(answer, And):
        return all(exact(t, a) for t, a in zip(truth._unsorted_args, answer._unsorted_args))
    if isinstance(truth, sympy.core.relational.Relational):  # the same up to a constant factor; inequalities up to > 0
        if not isinstance(answer, sympy.core.relational.Relational):
            return False
        ratio = sympy.simplify((truth.lhs - truth.rhs) / (answer.lhs - answer.rhs))
        if not ratio.is_number or not ratio.is_finite or ratio == 0:
            return False
        return type(answer) is type(truth if isinstance(truth, (sympy.Eq, sympy.Ne)) or ratio > 0 else truth.reversed)
    if isinstance(truth, sympy.Expr) != isinstance(answer, sympy.Expr):
        return False
    if not isinstance(truth, sympy.Expr):
        return True
    x, y = values(truth, answer)
    return bool(x.is_number and y.is_number and abs(x - y) <= abs(x) * sympy.Float("1e-40"))

def equal(truth, answer):
    truth, answer = parse(truth), parse(answer)
    return bool(verify(truth, answer, timeout_seconds=None)) and exact(truth, answer)

for pair in ((r"2\sqrt{3}", r"\sqrt{12}"), (r"x^2+\frac{1}{2}x", r"\frac{2x^2+x}{2}"),
             (r"\sin(2x)", r"2\sin(x)\cos(x)"),
             (r"y=2x+1", r"2x-y+1=0"), (r"1<x\le 2", r"1<x\le 2"), (r"(1,2)\cup[3,4)", r"(1,2)\cup[3,4)")):
    try:
        equal(*pair)  # warms what is imported and learned lazily, before the first fork
    except Exception:
        pass
gc.freeze()
print("true", file=replies)
limit = float(sys.argv[1])
for line in sys.stdin:
    fork = os.fork()
    if fork == 0:
        status = 1
        try:
            signal.setitimer(signal.ITIMER_REAL, limit)
            resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30))
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            sys.addaudithook(guard)
            status = 0 if any(all(equal(*pair) for pair in pairs) for pairs in json.loads(line)) else 1
        finally:
            os._exit(status)
    print(json.dumps(os.waitpid(fork, 0)[1] == 0), file=replies)
'''

_server: subprocess.Popen | None = None
_ready = False
_lock = threading.Lock()


def _start() -> None:
    """Start the child; subprocess, because the daemonic workers of a DataLoader may not have multiprocessing's."""
    global _server, _ready
    _server = subprocess.Popen(
        [sys.executable, "-P", "-c", _CHILD, str(0.8 * LIMIT)],
        bufsize=0,
        start_new_session=True,  # no Ctrl-C for it
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "PYTHONHASHSEED": "0"},
    )  # the order of sympy's sets, hence the verdict, must not vary
    _ready = False


def _stop() -> None:
    global _server
    server, _server = _server, None
    if server:
        try:
            os.killpg(server.pid, 9)
        except ProcessLookupError:
            pass
        server.wait()
        server.stdin.close()
        server.stdout.close()


def _forget() -> None:
    """After a fork the child is the parent's: drop our copies of its pipes, and a lock that a lost thread may hold."""
    global _server, _lock
    if _server:
        _server.stdin.close()
        _server.stdout.close()
        _server.returncode = 0
    _server, _lock = None, threading.Lock()


atexit.register(_stop)
os.register_at_fork(after_in_child=_forget)


def _reply(seconds: float) -> bool | None:
    """The child's next line; None at its end of file. TimeoutError after `seconds`."""
    end, line = time.monotonic() + seconds, b""
    poll = select.poll()
    poll.register(_server.stdout, select.POLLIN)
    while not line.endswith(b"\n"):
        if not poll.poll(max(0.0, end - time.monotonic()) * 1000):
            raise TimeoutError
        if not (data := os.read(_server.stdout.fileno(), 4096)):
            return None
        line += data
    return json.loads(line)


def _algebra_says(alternatives: list[Pairs]) -> bool:
    """Whether, for any alternative, every (truth, answer) pair is equal.

    All alternatives share one LIMIT, which runs from when the child is free and ready. Starting the child has a limit
    of its own, so that the first answers on a busy machine are not called wrong for it.
    """
    global _ready
    with _lock:
        for _ in range(2):  # a child that was killed from outside gets one successor
            try:
                if _server is None:
                    _start()
                if not _ready:
                    _ready = _reply(START_LIMIT) is True
                    if not _ready:
                        warnings.warn(
                            "the algebra child does not start; answers that need it count as wrong",
                            stacklevel=2,
                        )
                        _stop()
                        return False
                _server.stdin.write(json.dumps(alternatives).encode() + b"\n")
                verdict = _reply(LIMIT)
                if verdict is not None:
                    return verdict is True
                _stop()
            except TimeoutError:  # not the alarm of a fork but a child that does not answer
                _stop()
                _start()
                return False
            except OSError:
                _stop()
    return False
