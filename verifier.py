r"""Is an answer right? The accuracy term of the reward of stage 3 (RLVR), and of the evaluation.

`_clean` rewrites a text into one way of writing. `_read` turns it into a Claim: a choice, a number
with its unit, a list, or a formula or words, each with an optional label. `_compare` compares two
claims. What its rules cannot settle goes to verifier_child.py, which knows algebra.

RL finds every false positive, so an answer is judged whole, and what is not understood is wrong:
 1. Arithmetic is exact: 3.14 is not pi. A number has to be written as a number: 17*23 is not 391.
 2. Units are not converted ("100 cm" is not "1 m"), but one side may lack its unit. Percent is a
    unit: "50%" matches "50", not "0.5". A single letter is a unit only after a space: 5m is 5 * m.
 3. A slash divides by the next factor alone: 1/2x is (1/2)x, never 1/(2x).
 4. The truth decides about order. Its bare lists and tuples are ordered, its {sets} and solutions
    (x = 2 or x = 3, \pm 2) are not. "2 or 3" never stands for the list 2, 3, nor for one value.
 5. A solved inequality is an interval: 2 < x < 5 is x in (2, 5), and matches (2, 5).
 6. Unicode is composed; full-width digits and letters are ASCII; digits of other scripts are not.
 7. "nan" and "inf" match nothing. An answer above MAX_CHARS characters is not judged.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import select
import subprocess
import sys
import threading
import unicodedata
from collections.abc import Callable, Iterator
from fractions import Fraction
from functools import reduce
from itertools import accumulate
from typing import NamedTuple

MAX_CHARS = 1024
MAX_DEPTH, MAX_PARTS, MAX_STEPS = 5, 64, 3000  # bounds of rules: nesting, list members, comparisons
LIMIT = 0.8  # seconds of processor time that algebra may take; with the rules, below one second
WALL_LIMIT = 10.0  # seconds of wall time behind it, long enough for a machine under load
START_LIMIT = 120.0  # seconds of wall time that the child may take to import sympy


def verify(answer: str, ground_truth) -> bool:
    """Whether `answer` states `ground_truth`: a string, a number, or a list of accepted ones.

    No input makes it raise or hang. A broken math-verify raises RuntimeError, because a run that
    counted all algebra as wrong would train on it in silence; `start` finds out before a run.
    Takes along: all of verifier.py and verifier_child.py."""
    truths = ground_truth if isinstance(ground_truth, (list, tuple)) else [ground_truth]
    try:
        said = _read(_clean(answer))
        verdicts = [_compare(said, _read(_clean(t)), iter(range(MAX_STEPS))) for t in truths]
    except Exception:  # what the rules fail to understand is not right
        return False
    return [] in verdicts or any(verdicts) and _prove([verdict for verdict in verdicts if verdict])


# Whether brackets open and close inside a text, of whatever shape: [1, 2) is an interval.
_closed = lambda t: min(d := [0, *accumulate((c in "([{") - (c in ")]}") for c in t)]) == 0 == d[-1]


def _rules(table: str) -> Callable[[str], str]:
    """A function that rewrites by a table: a pattern, an arrow, its replacement; ␣ is a space."""
    table = table.replace("DEC", _DECIMAL).replace("ARG", _ARGUMENT).replace("FACTOR", _FACTOR)
    pairs = (line.split(" ->") for line in table.replace("␣", " ").strip("\n").split("\n"))
    rules = [(re.compile(pattern, re.ASCII), by[1:]) for pattern, by in pairs]
    return lambda text: reduce(lambda done, rule: rule[0].sub(rule[1], done), rules, text)


# Every name of a table -> the first name of its entry. Entries end with a semicolon.
_names = lambda table: {name: e.split()[0] for e in table.split(";") for name in e.split()}
_DECIMAL = r"(?=\.?\d)(?:\d{1,3}(?:,\d{3})+(?![\d,])|\d*)(?:\.\d+)?"
_ARGUMENT = r"\{(?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*\}"  # of a command
_FACTOR = r"(?:[\d.]+|[A-Za-z]|\\pi|\([^()]*\))(?:\^\{[^{}]*\}|\^[a-z])?"
_ALIKE = _names(r"""
- − – ‐ ‑; / ÷ ⁄; " “ ”; ' ‘ ’ ′; ° º \degree \degrees; , 、; . 。; ~ ∼;
{} ∅ \emptyset; { \{; } \}; % \%; \cdot · ⋅ ∙; \times ×; \pi π; \sqrt √;
\frac \dfrac \tfrac \cfrac; < \lt; > \gt; e4 万; e8 亿; \ne ≠ != \neq;
\le ≤ ⩽ <= \leq \leqslant; \ge ≥ ⩾ >= \geq \geqslant; \pm ± +/- +-; \infty ∞; \in ∈;
\approx ≈; \angle ∠; \triangle △; \theta θ; \alpha α; \beta β; ␣or␣ 或 ∪ \cup;
␣and␣ 和 与""")
_ALIKE = {n: by.replace("␣", " ") + " " * (by[0] == "\\") for n, by in _ALIKE.items()}
# Signs that NFKC spells out, and in which form.
_NFKC = """[¼-¾⅐-⅞] [⁰¹²³⁴-⁹⁺⁻]+ [₀-₉]+
[！-～℃℉㎎㎏㎜-㎞𝐀-𝟿]""".split()
_NFKC = dict(zip(_NFKC, r"\frac{%s}{%s} ^{%s} _{%s} %s".split()))
_rewrite = _rules(r"""
\\\$ -> \0
^\$\$? ?([^$]*[^$ ]) ?\$\$?$ -> \1
\$\$?(?![\s,;])([^$]*[^$\s,;])\$\$? -> ␣\1␣
\$ ([^$]*[^$ ]) \$(?! ?\d) -> \1
\\(?:text|mathrm|mathbf|textbf|textit|mathit|operatorname|mbox|rm|bf) ?\{([^{}]*)\} -> ␣\1␣
\\(?:left|right|displaystyle|limits|[bB]igg?[lr]?)(?![A-Za-z])|\\! ->
(?<=\d)(?:\\,|\{,\})(?=\d{3}(?!\d)) -> ,
(?<!\\)\\[,;: ]|\\q?quad(?![A-Za-z])|~(?=\w) -> ␣
\\frac ?(\d|[A-Za-z]|\\pi) ?(?=[\dA-Za-z{\\]) -> \\frac{\1}
(\\frac ?ARG) ?(\d|[A-Za-z]|\\pi(?![A-Za-z])) -> \1{\2}
\\sqrt ?(\d+|[a-z](?![A-Za-z])|\\frac ?ARG ?ARG) -> \\sqrt{\1}
(?:\\|(?<![A-Za-z\\]))sqrt ?\(([^()]*)\) -> \\sqrt{\1}
 ?\^ ?\{? ?(?:\\circ|°) ?\}?|\\circ(?![A-Za-z]) -> °
 ?\^ ?(?:([-+]?\d+)|\(([-+]?\d+)\)|\{ ?([-+]?\d+) ?\}) -> ^{\1\2\3}
(?<![\w})\]])\+ ?(?=\\infty) ->
(?<=:\d\d) ?([aApP])\.?[mM]\b\.? -> ␣\1m
\*\*(?=\S)([^*]*)\*\* -> \1
^\{ ?[a-z] ?(?:\||:|\\mid) ?([^{}|]*(?:[<>]|\\[lgn]e )[^{}|]*)\}$ -> \1
""")
_WRAPPED = r"\\f?box(?:ed)? ?\{(.*)\}|\\\((.*)\\\)|\\\[(.*)\\\]|\"([^\"]*)\"|'([^']*)'|`([^`]*)`"
# What may stand before a value: no negation, alternative or digit, so that the value is the claim.
_LEAD = r"""\A(?:(?:[Tt]he\ )?(?:(?i:final|correct|right)\ )?(?i:answer|option|choice)\b(?:\ is\b)?
    |(?:[Tt]he|[Ii]ts?|[Tt]his|[Tt]here)\ (?:(?!(?:not?|none|n?either|n?or|but|if|wrong|incorrect
    |false|never|except|unless)\b)(?:[a-z]+|[A-Z]{2,4})\ ){0,8}?(?:is|are|equals)\b(?!\ not\b)
    |(?i:so|thus|hence|therefore|equal\ to|approximately|approx\.?|about|roughly)\b,?|\\approx|~
    |(?:故|所以|因此)?,?(?:应?选(?:项|择)?
    |(?:正确)?(?:答案|选项)(?:是|为|选)?|答))\ ?:?\ ?(?=.)"""


def _clean(text) -> str:
    """One way of writing for the many that mean the same, without wrappers and leading phrases."""
    text = str(text) if isinstance(text, (str, int, float)) and not isinstance(text, bool) else ""
    if len(text) > MAX_CHARS:
        return ""
    text = unicodedata.normalize("NFC", text)
    for signs, form in _NFKC.items():
        spell = lambda sign: form % tuple(unicodedata.normalize("NFKC", sign[0]).split("⁄"))
        text = re.sub(signs, spell, text)
    for _ in range(6):  # wrappers stand inside wrappers
        text = re.sub(
            r"\\[A-Za-z]+|\\.|[<>!]=|\+/?-|[^ -~]", lambda s: _ALIKE.get(s[0], s[0]), text
        )
        if len(text) > 2 * MAX_CHARS:  # a thousand roots are no answer
            return ""
        text = _rewrite(" ".join(text.split())).strip()
        if (match := re.fullmatch(_WRAPPED, text)) and _closed(match[match.lastindex]):
            text = match[match.lastindex]
        text = re.sub(_LEAD, "", text, flags=re.VERBOSE)
        # Outer punctuation: "5.", "Yes!", but not 0.333... and the factorial n!
        text = re.sub(r"(?<!\.)(?!\.{2,}$)[ .,;:]+$|(?<=[A-Za-z]{2})!$", "", text)
    text = " ".join(text.replace("\0", "$").split())
    return "" if text.lower().strip("+-") in ("nan", "inf") else text


# Ways of writing a number -> 5/6, 1 5/6, 1.5e3 or 5 $. Exponents are short: no number gets huge.
_number = _rules(r"""
 ?\\frac ?\{ ?(-?DEC) ?\} ?\{ ?(DEC) ?\}(?![\d.]) -> ␣\1/\2
^([-+]?) ?\( ?(\d+(?:\.\d+)? ?/ ?\d+)\)(?![\d.^]) -> \1\2
^([-+]?) ?([$€£¥₹]) ?(.*)$ -> \1\3␣\2
^([-+]?)10\^\{([-+]?\d{1,3})\} -> \g<1>1e\2
(?<=\d)(?:E| ?(?:\\times|\\cdot|\*|x) ?10\^\{)([-+]?\d{1,3})(?:\}|(?!\d)) -> e\1
(?<=\d)[ -]?thousand(?![a-z]) -> e3
(?<=\d)[ -]?million(?![a-z]) -> e6
(?<=\d)[ -]?billion(?![a-z]) -> e9
""")
_NUMBER = r"([-+]?) ?(?:(?:(\d+) )?(DEC) ?/ ?(DEC)|(DEC)(?:e([-+]?\d{1,3})(?!\d))?)"
_NUMBER = re.compile(_NUMBER.replace("DEC", _DECIMAL), re.ASCII)
_WORDS = """zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen
fifteen sixteen seventeen eighteen nineteen twenty""".split()
_BASES = _names("""m meter meters metre metres; g gram grams gramme grammes; L liter liters litre
litres l; W watt watts; s second seconds sec secs; V volt volts; A ampere amperes amp amps; T tesla;
J joule joules; N newton newtons; Pa pascal pascals; Ω ohm ohms; eV electronvolt electronvolts;
mol mole moles; cal calorie calories; C coulomb coulombs; Hz hertz""")
_SI = {"": ""} | _names("k kilo; c centi; m milli; d deci; µ μ micro; n nano; M mega; G giga")
_UNITS = {p + b: short + base for p, short in _SI.items() for b, base in _BASES.items()}
_UNITS |= _names(r"""% percent percentage pct; ° degree degrees deg 度; °C; °F;
K kelvin kelvins; rad radian radians; in inch inches; ft foot feet; yd yard yards; mi mile miles;
lb lbs pound pounds; oz ounce ounces; t ton tons tonne tonnes 吨; ha hectare hectares; acre acres;
gal gallon gallons; min mins minute minutes 分钟 分; h hr hrs hour hours 小时 时;
day days 天; week weeks; people; men; month months 个月; year years yr yrs 年; women; children;
$ dollar dollars USD; € euro euros EUR; mph; £ GBP; ¥ yuan RMB CNY 元; ₹ rupee rupees Rs INR;
¢ cent cents; m 米; km 千米 公里; cm 厘米; mm 毫米; dm 分米; g 克; kg 千克 公斤;
L 升; mL 毫升; s 秒; Ω \Omega; kΩ k\Omega; unit units""")
_unit_forms = _rules(r"""
\b[Dd]egrees? (?:[Cc]elsius|C)\b|° ?C\b -> °C
(?:\b(?:square|sq\.?)|平方) ?(\w+|[^ -~]+)|(\w+) squared\b -> \1\2^{2}
(?:\b(?:cubic|cu\.?)|立方) ?(\w+|[^ -~]+)|(\w+) cubed\b -> \1\2^{3}
 ?(?:\bper\b|每|/) ? -> /
 ?(?:\\cdot|\*) ? -> ␣
""")
# "5 apples" and "5个" count things, so one side may lack the noun; "5 tens" is not 5.
_NOUN = r"""(?!.*(?:ths|lves|thirds|quarters|tens|dozens|hundreds|ands|llions|times|plus|minus|pairs
|scores|less)$)[a-z]{3,}s
|(?!.*[一二三四五六七八九十百千万亿半倍分之或和与及至到余多每])
[一-鿿]{1,4}"""


def _unit(text: str) -> str | None:
    """One name for a unit: "square meters" and "sq m" are m^2. None where the text is no unit."""
    text = _unit_forms(text.strip(" -")) if len(text) < 50 else ""
    factors = re.findall(r"([^/ ^]+)((?:\^\{-?[1-4]\})?)([/ ](?=.)|$)", text)
    names = [_UNITS.get(word) or _UNITS.get(word.lower() * (len(word) > 3)) for word, *_ in factors]
    if factors and all(names) and "".join(map("".join, factors)) == text:
        return "".join(name + power + mark for name, (_, power, mark) in zip(names, factors))
    return "#" + text if re.fullmatch(_NOUN, text, re.VERBOSE) else None


def _quantity(text: str) -> tuple[Fraction, str] | None:
    """Exact value and unit ("" for none) of a text that is a number and nothing else."""
    text = str(_WORDS.index(text.lower())) if text.lower() in _WORDS else _number(text).strip()
    match = _NUMBER.match(text)
    if not match or re.fullmatch("[A-Za-z]", rest := text[match.end() :]):
        return None
    sign, whole, *ratio, plain, power = (part and part.replace(",", "") for part in match.groups())
    top, bottom = (Fraction(plain), 1) if plain else map(Fraction, ratio)
    if bottom == 0 or whole and not 0 < top < bottom:  # 2 1/3 is mixed, 2 7/3 is a slip
        return None
    value = (top / bottom + int(whole or 0)) * Fraction(10) ** int(power or 0)
    unit = _unit(rest) if rest.strip() else ""
    return None if unit is None else (-value if sign == "-" else value, unit)


class Claim(NamedTuple):  # what a text says
    text: str  # the whole of it, without idle white space
    kind: str  # number, choice, text; of lists: brackets, "," "or" ":" "matrix" "all" "pm"
    value: Fraction | str = ""  # the number, the letters, or the text without label and unit
    unit: str = ""
    name: str = ""  # the label: x in x = 5, \sin A in \sin A = 3/5, P in P(1, 2)
    parts: tuple[Claim, ...] = ()


_LETTERS = r"(?!.*([A-J]).*\1)(\(?[A-J]\)?((?: ?[,;&/] ?|,? and )\(?[A-J]\)?)+|(?=..)A?B?C?D?E?F?)"
# A letter, and text that names no other option: "A. 4", but not "A. 4 B. 5".
_CHOICE = r"""[(\[]?([A-Ja-j])(?:[)\]]|[.:](?=\ )|$)\ ?((?![,;/&|+]|[a-j]$|.*(?:\b[B-J]\b
|\bA\b(?!\ [a-z]{3,})|\b[a-j]\)|\bor\b|[,;/&]\ ?[a-j]$)).*)"""
_VARIABLE = r"(?:[A-Za-z]\w{0,2}'?(?:_\{\w{1,3}\})?|\\(?:theta|alpha|beta|lambda|mu|phi|omega))"
_LABEL = rf"""((?:\\(?:sin|cos|tan|cot)\ ?)?(?:(?:m\ ?)?\\angle\ ?)?{_VARIABLE}
    |[A-Za-z]_\{{[\w\\ ]{{1,24}}\}}|[A-Za-z]\([\w,]{{1,5}}\)|(?!not?\b)[A-Za-z][a-z]+(?:\ [a-z]+)?
    |\|(?:[A-Z]{{2}}|\\(?:vec|overrightarrow)\ ?\{{[A-Za-z]{{1,2}}\}})\|)
    \ ?(?:=|\\in(?![a-z]))\ ?([^=<>]+)
    |(?:[Pp]oint\ )?([A-Z]'?)\ ?(\((?=[^,]*,)(?:[^()]|\([^()]*\))*\))"""
_FLIP = {">": "<", r"\ge": r"\le", "<": ">", r"\le": r"\ge"}


def _label(text: str) -> tuple[str, str] | None:
    r"""Label and value: "x = 5" -> ("x", "5"), or interval: "x > 1" -> ("x", "(1,\infty)")."""
    if match := re.fullmatch(_LABEL, text, re.ASCII | re.VERBOSE):
        return match[1] or match[3], match[2] or match[4]
    pieces = re.split(r" ?(<|>|\\[lg]e(?![a-z])) ?", text)
    if len(pieces) > 2 and pieces[1] in (">", r"\ge"):
        pieces = [_FLIP.get(piece, piece) for piece in reversed(pieces)]
    if len(pieces) == 3:
        left = re.fullmatch(_VARIABLE, pieces[0])
        pieces = [r"-\infty", "<", *pieces] if left else [*pieces, "<", r"\infty"]
    shape = rf"([^,;=]+);(<|\\le);({_VARIABLE});(<|\\le);([^,;=]+)"
    match = re.fullmatch(shape, ";".join(pieces))
    if not match or re.search(r"(?<![\\A-Za-z])[A-Za-z]", f"{match[1]} {match[5]}"):
        return None
    return match[3], f"{'(['[match[2] != '<']}{match[1]},{match[5]}{')]'[match[4] != '<']}"


def _list(text: str) -> tuple[str, list[str]]:
    """Kind and members of a list; its kind is its brackets, or of a bare one its separators."""
    steps = re.split(r"\((\d)\) ?", text)  # "(1) 4 (2) 5"
    if len(steps) > 3 and not steps[0] and "123456789".startswith("".join(steps[1::2])):
        return ",", [step.strip(" ,;") for step in steps[2::2]]
    if matrix := re.fullmatch(r"\\begin ?\{([pb]?)matrix\}(.*)\\end ?\{\1matrix\}", text):
        return "matrix", [f"({row.replace('&', ',')})" for row in matrix[2].split(r"\\")]
    bare = not re.fullmatch(r"[(\[{].+[)\]}]", text) or not _closed(text[1:-1])
    members, separators, depth = [""], set(), 0
    tokens = re.split(r"([(\[{]|[)\]}]|[,;:]|,? (?:and|or) )", text if bare else text[1:-1])
    for i, token in enumerate(tokens):  # separators and brackets at odd places
        depth += i % 2 * ((token in "([{") - (token in ")]}"))
        if i % 2 and depth == 0 and token not in ")]}":
            separators.add("or" if "or" in token else ":" if token == ":" else ",")
            members.append("")
        else:
            members[-1] += token
    kind = "/".join(sorted(separators)) if bare else text[0] + text[-1]
    if not kind and len(pieces := re.split(r"\\pm(?![a-z]) ?", text)) == 2:
        return "pm", [sign.join(pieces).lstrip("+") for sign in "+-"]
    return kind, list(filter(str.strip, members)) if bare else members  # 2, 3, and 4 are three


def _read(text: str, depth: int = 0) -> Claim:
    """The claim that a clean text makes. Each level of nesting reads the text once."""
    whole = re.sub(r" ?([^\w\s.,]) ?|(?<=\d) (?=[A-Za-z])", r"\1", text)  # without idle space
    inner = lambda part, **fields: _read(part.strip(), depth + 1)._replace(**fields)
    if depth == 0 and re.fullmatch(_LETTERS, text):
        return Claim(whole, "choice", "".join(sorted(re.findall("[A-J]", text))))
    if depth == 0 and (choice := re.fullmatch(_CHOICE, text, re.VERBOSE)):
        return Claim(
            whole, "choice", choice[1].upper(), parts=(inner(choice[2]),) * bool(choice[2])
        )
    if number := _quantity(text):
        return Claim(whole, "number", *number)
    if label := _label(text):
        name = re.sub(r"^m(?= ?\\angle)|\\triangle|[\s{}_|]", "", label[0])
        return inner(label[1], text=whole, name=name)
    kind, members = _list(text)
    if kind and len(members) <= MAX_PARTS and depth < MAX_DEPTH:
        parts = tuple(map(inner, members))
        if kind == "()" and len(parts) == 1:  # brackets around one thing mean nothing
            return parts[0]
        name = parts[0].name if kind in (",", "or") and len({p.name for p in parts}) == 1 else ""
        if name and not any(part.parts for part in parts):
            kind = "all"  # the solutions x = 2 or x = 3
        return Claim(whole, kind, name=name if kind != "," else "", parts=parts)
    # A unit after a formula.
    tail = re.fullmatch(r"(.*?[\w})])(?: (?=[A-Za-z%].)|(?=°))(.+)", text)
    if tail and (unit := _unit(tail[2])) and unit[0] != "#":
        return inner(tail[1], text=whole, unit=unit)
    return Claim(whole, "text", text)


_LOOSE = {",", "or", "all", "pm", "{}"}  # lists that may match a list of another kind
_FORMULA = r"[\\^+*=<>]|\b[A-Za-z\d]{1,2} ?[-/] ?[A-Za-z\d]{1,2}\b"
_RELATION = r"[=<>]|\\[lgn]e(?![a-z])"
# What no parser should be made to guess at: other commands (\int would hand in the question, and
# \angle ABC is no product), words, H2O (taken for HO2), 12_8 (for 12), 1 2, and 0.33...
_REFUSED = r"""^$|[^0-9A-Za-z\\{}()\[\]^_+\-/=<>|.\ ]|(?<![\\A-Za-z])[A-Za-z]+\d|\d_|\.\.
    |(?<!_)\d\ \d|^[A-Za-z]{2}[A-Za-z\ ]*$|(?<![\\A-Za-z])(?:or|and|not|[A-Za-z]{4,})(?![A-Za-z])
    |\\(?!(?:frac|sqrt|cdot|times|pi|(?:arc)?(?:sin|cos|tan)|cot|sec|csc|log|ln|exp|[lgn]e|infty
    |theta|alpha|beta|gamma|delta|lambda|mu|rho|sigma|phi|omega)(?![A-Za-z]))"""
_IDLE = r"^(?:the|an?) (?=\w{2})|(?<=[a-z)])_\{?(?=\d+\}?)|(?<=\d)\}(?=[a-z(]|$)"  # H_{2}O is H2O
_latex = _rules(r"""
(?<=\d),(?=\d{3}(?!\d)) ->
\*\* -> ^
\* -> ␣\\cdot␣
(?<![A-Za-z\\])(sin|cos|tan|cot|sec|csc|log|ln|exp|pi|theta|alpha|beta)(?![A-Za-z]) -> \\\1␣
/ ?(FACTOR) ?(?=[A-Za-z(]|\\(?!cdot|times|[lgn]e)) -> /\1␣\\cdot␣
""")


def _compare(said: Claim, true: Claim, steps: Iterator) -> list | None:
    """None if wrong, else the pairs (truth, answer) that algebra has to prove; [] is right."""
    next(steps)  # raises after MAX_STEPS
    if said.text == true.text:
        return [] if said.text else None
    # A letter decides where both have one; text after it must not contradict the truth's text.
    both = said.kind == true.kind == "choice"
    if both and not (said.value == true.value and said.parts and true.parts):
        return [] if said.value == true.value else None
    said, true = (c.parts[0] if c.kind == "choice" and c.parts else c for c in (said, true))
    if true.kind == "choice" or said.unit and true.unit and said.unit != true.unit:
        return None
    pair = (str(true.value), str(said.value))
    other = true if said.name else said  # "x = 5" says "5"; another label or an equation does not
    equation = other.kind == "text" and re.search(_RELATION, other.value)
    if said.name != true.name and (said.name and true.name or equation):
        if not said.kind == true.kind == "text":
            return None
        pair = (true.text, said.text)
    elif "number" in (true.kind, said.kind) and true.kind != "text":  # only a number can equal one
        return [] if (said.kind, said.value) == (true.kind, true.value) else None
    elif said.parts or true.parts:
        return _compare_lists(said, true, steps) if said.parts and true.parts else None
    elif not re.search(_FORMULA, true.value):  # case matters in formulas: R - r is not r - R
        idle = lambda text: re.sub(_IDLE, "", text.casefold().strip(' .,;:"*`'))
        if idle(pair[0]) == idle(pair[1]):
            return []
    pair = tuple(map(_latex, pair))
    relations = {len(re.findall(_RELATION, text)) for text in pair}
    refused = any(re.search(_REFUSED, text, re.VERBOSE) for text in pair)
    return None if refused or len(relations) == 2 else [pair]


def _compare_lists(said: Claim, true: Claim, steps: Iterator) -> list | None:
    answers, truths, kinds = list(said.parts), list(true.parts), {said.kind, true.kind}
    loose = kinds <= _LOOSE and ("or" not in kinds or kinds & {"all", "pm"})
    if len(answers) != len(truths) or len(kinds) == 2 and not loose:
        return None
    labelled = all(part.name for part in answers + truths)  # x = 2, y = 3
    if labelled or true.kind in ("{}", "or", "all", "pm") or said.kind == "pm":
        # Order is free. Rules match what they can; the rest is for algebra, in the order given.
        for truth in true.parts:
            if same := [answer for answer in answers if _compare(answer, truth, steps) == []]:
                answers.remove(same[0])
                truths.remove(truth)
    verdicts = [_compare(answer, truth, steps) for answer, truth in zip(answers, truths)]
    if None in verdicts or any(verdicts) and true.kind == ":":  # no algebra about 12:00 AM
        return None
    return sum(verdicts, [])


_server: subprocess.Popen | None = None
_lock = threading.RLock()
# In a fork of ours the child is not ours, and a thread that held the lock is gone.
os.register_at_fork(after_in_child=lambda: globals().update(_server=None, _lock=threading.RLock()))


def start() -> None:
    """Start the algebra child unless it runs. RuntimeError where math-verify does not work."""
    global _server
    with _lock:
        if _server is None:
            child = os.path.join(os.path.dirname(os.path.abspath(__file__)), "verifier_child.py")
            command = [sys.executable, "-P", child, str(LIMIT), str(WALL_LIMIT)]
            pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
            _server = subprocess.Popen(command, bufsize=0, start_new_session=True, **pipes)
            if (word := _ask(b"", START_LIMIT)) != "ready":
                raise RuntimeError(f"math-verify does not work, so no algebra: {word}")


def _ask(question: bytes, seconds: float) -> str:
    """The child's line, which it writes at once. If it died or is late, that and it is ended."""
    global _server
    server, _server = _server, None  # an interrupt below leaves no answer for the next question
    poll = select.poll()
    poll.register(server.stdout, select.POLLIN)
    with contextlib.suppress(OSError):
        server.stdin.write(question)
    late = not poll.poll(seconds * 1000)
    if answer := "" if late else server.stdout.readline().decode().strip():
        _server = server
        return answer
    server.kill()
    errors = server.communicate()[1].decode(errors="replace").strip()
    return "late" if late else "died: " + errors.rpartition("\n")[2]


def _prove(alternatives: list[list[tuple[str, str]]]) -> bool:
    """Whether all pairs of one alternative are equal. All alternatives share one LIMIT."""
    with _lock:
        for _ in range(2):  # a child that was killed from outside gets one successor
            start()
            verdict = _ask(json.dumps(alternatives).encode() + b"\n", WALL_LIMIT + 2)
            if not verdict.startswith("died"):  # "late" is wrong: the kernel ends slow forks before
                return verdict == "right"
    raise RuntimeError("the verifier's algebra child was killed twice during one question")
