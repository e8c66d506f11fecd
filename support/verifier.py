r"""Is an answer right? The accuracy of the reward of stage 3 (RLVR) and of the evaluation (D12).

`_clean` rewrites a text into one way of writing. `_read` turns it into a Claim: a choice, a number
with its unit, a list, or a formula or words, each with an optional label. `_compare` compares two
claims. What its rules cannot settle goes to verifier_child.py, which knows algebra.

RL finds every false positive, so an answer is judged whole. What is not understood is never noise:
a unit, a counted noun, a label and a leading phrase each have to stand in a table below.
 1. Arithmetic is exact: 3.14 is not pi. A number has to be written as a number: 17*23 is not 391.
 2. Units are not converted ("100 cm" is not "1 m"), but one side may lack its unit. Percent is a
    unit: "50%" matches "50", not "0.5". A single letter is a unit only after a space: 5m is 5 * m.
 3. A slash divides by the next factor alone: 1/2x is (1/2)x, never 1/(2x).
 4. The truth decides about order. Its bare lists and tuples are ordered, its {sets} and solutions
    (x = 2 or x = 3, \pm 2) are not. "2 or 3" never stands for the list 2, 3, nor for one value.
 5. A solved inequality is an interval: 2 < x < 5 is x in (2, 5), and matches (2, 5).
 6. Unicode is composed; full-width digits and letters are ASCII. Case matters, except in words.
 7. "nan" and "inf" match nothing. An answer above MAX_CHARS characters is not judged.
"""

from __future__ import annotations

import ast
import contextlib
import json
import os
import re
import select
import subprocess
import sys
import threading
import unicodedata
from collections import Counter
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

    No input makes it raise or hang. A broken math-verify raises RuntimeError: a run would otherwise
    count all algebra as wrong, in silence. `start` finds out before a run.
    verify(t, t) is False for a truth t that no answer can match, such as "NaN".
    Takes along: all of verifier.py and verifier_child.py."""
    truths = ground_truth if isinstance(ground_truth, (list, tuple)) else [ground_truth]
    try:
        said = _read(_clean(_meant(answer)[0] if answer in truths else answer))
        claims = [_read(_clean(meant)) for truth in truths for meant in _meant(truth)]
        letters = [claim.value for claim in claims if claim.kind == "choice"]
        texts = [claim for claim in claims if claim.kind != "choice" or claim.parts]
        choice = said.kind == "choice"
        if letters and texts and (said.parts or not choice):
            # "A. blue" and "A is blue" are wrong for B, blue. A text may hold letters: A(1, 2).
            own = letters if choice else re.findall(r"\b[A-J]\b", " ".join(c.text for c in claims))
            named = re.findall(r"^[A-J]\b", str(said.value) if choice else said.text)
            claims = texts if {*named} <= {*own} else []
        verdicts = [_compare(said, claim, iter(range(MAX_STEPS))) for claim in claims]
    except Exception:  # what the rules fail to understand is not right
        return False
    return [] in verdicts or any(verdicts) and _prove([verdict for verdict in verdicts if verdict])


def _meant(truth) -> list:
    """The answers that a truth accepts, without what its data set writes around them."""
    if not isinstance(truth, str) or len(truth) > 9 * MAX_CHARS:
        return [truth]
    members, unit = read_list(truth := truth.strip())  # MMMU writes a list of answers as a string
    if members and all(isinstance(member, str) for member in members):
        return [meant for member in members for meant in _meant(member + unit)]
    if re.fullmatch(r"\[ ?(['\"]).*\1 ?\]", truth):  # one with quotes that nobody has escaped
        return re.findall(r"""(?<=')[^'",]+(?=')|(?<=")[^'",]+(?=")""", truth) or [""]
    if len(steps := re.split("####|(?i:</think>)", truth)) > 1:  # GSM8K writes the solution before
        return _meant(steps[-1])
    truth = re.sub(r"\\boxed +([-\w.,/]*\w)", r"\\boxed{\1}", truth)
    boxed = rf"\\boxed ?({_ARGUMENT})"
    wrapped = [m[0] for m in re.finditer(rf"(?i:<answer>[^<>]*</answer>)|{boxed}", truth)]
    if len(wrapped) == 1:
        return wrapped
    # No answer can hold what is left of the tags, since they break its format.
    truth = re.sub(r"(?i)</?(?:caption|think|answer)>", " ", truth)
    return [re.sub(boxed, lambda match: f" {match[1][1:-1]} ", truth).strip()]


def read_list(text: str) -> tuple[list, str]:
    """-> (the members of a list that Python or JSON wrote as text, what is written behind it);
    ([], "") for any other text. A lone backslash is LaTeX, and no escape, so that is other text."""
    match = re.fullmatch(r"(\[.*\])([^\[\]'\",]*)", text.strip(), re.DOTALL)
    if match and not re.search(r"""(?<!\\)(?:\\\\)*\\(?![\\'"])""", text):
        with contextlib.suppress(SyntaxError, ValueError, MemoryError, RecursionError):
            return ast.literal_eval(match[1]), match[2]
    return [], ""


# Whether brackets open and close inside a text, of whatever shape: [1, 2) is an interval.
_closed = lambda t: min(d := [0, *accumulate((c in "([{") - (c in ")]}") for c in t)]) == 0 == d[-1]
_one_of = lambda words: "(?:" + "|".join(words.split()) + ")"


def _rules(table: str) -> Callable[[str], str]:
    """A function that rewrites by a table of `pattern -> replacement ;;`, where ␣ is a space."""
    table = table.replace("DEC", _DECIMAL).replace("ARG", _ARGUMENT).replace("FACTOR", _FACTOR)
    pairs = (rule.split(" ->") for rule in re.split(" ;; |\n", table.replace("␣", " ").strip("\n")))
    rules = [(re.compile(pattern, re.ASCII), by[1:]) for pattern, by in pairs]
    return lambda text: reduce(lambda done, rule: rule[0].sub(rule[1], done), rules, text)


def _names(table: str) -> dict[str, str]:
    """Every name of a table, and its plural -> the first name of its entry. Entries end with ;"""
    entries = [entry.split() for entry in table.split(";")]
    names = {n.replace("␣", " "): e[0].replace("␣", " ") for e in entries for n in e}
    e = lambda n: re.sub("(?<=[sx])$|(?<=[cs]h)$", "e", re.sub("(?<=[^aeo])y$", "ie", n))
    return {e(n) + "s": by for n, by in names.items() if re.match("[a-z]{2}", n)} | names


_DECIMAL = r"(?=\.?\d)(?:\d{1,3}(?:,\d{3})+(?![\d,])|\d*)(?:\.\d+)?"
_ARGUMENT = r"\{(?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*\}"  # of a command
_GREEK = {chr(code): unicodedata.name(chr(code)).split()[-1] for code in range(0x3B1, 0x3CA)}
_GREEK = {sign: name.lower().replace("lamda", "lambda") for sign, name in _GREEK.items()}
_GREEK |= {sign.upper(): name.title() for sign, name in _GREEK.items()} | {"µ": "mu", "ϕ": "phi"}
_GREEK_NAME = _one_of(" ".join(_GREEK.values())) + "(?![A-Za-z])"
_FACTOR = rf"(?:[\d.]+|[A-Za-z]|\\{_GREEK_NAME}|\([^()]*\)) ?(?:\^\{{[^{{}}]*\}}|\^[a-z])?"
_ALIKE = {sign: rf"\{name}" for sign, name in _GREEK.items()} | _names(r"""
- − – ‐ ‑; / ÷ ⁄; " “ ” ″ 「 」; ' ‘ ’ ′; ° º \degree \degrees; , 、; . 。; ~ ∼; : ∶; [ 【; ] 】;
{} ∅ \emptyset \varnothing; { \{; } \}; % \%; \cdot · ⋅ ∙; \times ×; \sqrt √; \in ∈; \cap ∩;
\frac \dfrac \tfrac \cfrac; < \lt; > \gt; e8 亿; \ne ≠ != \neq; \vec \overrightarrow; \parallel ∥;
\le ≤ ⩽ <= \leq \leqslant; \ge ≥ ⩾ >= \geq \geqslant; \pm ± +/- +-; \infty ∞; \equiv ≡;
\approx ≈ ≃ \simeq; \angle ∠; \triangle △ Δ ∆ \Delta; \phi \varphi; \epsilon \varepsilon; \perp ⊥;
\to → \rightarrow ⇒ \Rightarrow ∴ \therefore; \mathbb{R} ℝ \R; ␣or␣ 或 ∪ \cup; ␣and␣ 和 与""")
_ALIKE = {n: by + " " * (by[0] == "\\") for n, by in _ALIKE.items()}
_spell = _rules(r"[⁰¹²³⁴-⁹⁺⁻]+ -> ^{\g<0>} ;; [₀-₉]+ -> _{\g<0>} ;; [¼-¾⅐-⅞] -> ␣\g<0>␣")
_rewrite = _rules(r"""
(?<![\w}])(__?)(\w[^_]*)\1(?!\w) -> \2 ;; \\\$ -> \0 ;; ^\$\$? ?([^$]*[^$ ]) ?\$\$?$ -> \1
\$\$?(?![\s,;])([^$]*[^$\s,;])\$\$? -> ␣\1␣ ;; \$ ([^$]*[^$ ]) \$(?! ?\d) -> \1
\\mathbb ([A-Z]) -> \\mathbb{\1} ;; \\(?:hat|vec|mathbf) ?\{?([ijk])\}?(?![A-Za-z]) -> \1
\\(?:(?:text|math)(?:bf|it|rm|sf)?|operatorname|mbox|underline|rm|bf) ?\{([^{}]*)\} -> ␣\1␣
\\(?:left|right|displaystyle|limits|[lL]arge|[bB]igg?[lr]?)(?![A-Za-z])|\\! ->
(?<=\d)(?:\\,|\{,\}|_)(?=\d{3}(?!\d)) -> , ;; (?<![\d.,])(\d{1,3})\.(\d{3})\.(\d{3})$ -> \1,\2,\3
(?<!\\)\\[,;: ]|\\q?quad(?![A-Za-z])|(?<=\S)~(?=\w)|(?<=[\d}]) ?~ ?(?=[A-Za-z]) -> ␣
^(DEC) to (DEC)$ -> \1:\2 ;; \\frac ?(\d|[A-Za-z]|\\pi) ?(?=[\dA-Za-z{\\]) -> \\frac{\1}
(?<=[)\]]) ?U ?(?=[(\[]) -> ␣or␣ ;; (\\frac ?ARG) ?(\d|[A-Za-z]|\\pi(?![A-Za-z])) -> \1{\2}
\\sqrt ?(\d+|[a-z](?![A-Za-z])|\\frac ?ARG ?ARG) -> \\sqrt{\1}
(?<=[\w)]) (by|x) (?=\d) -> ␣\\times␣ ;; (?:\\|(?<![A-Za-z\\]))sqrt ?\(([^()]*)\) -> \\sqrt{\1}
 ?\^ ?(?:\{ ?(?:\\circ ?|°) ?\}|\\circ ?(?![A-Za-z])|°)|\\circ(?![A-Za-z]) -> °
 ?\^ ?(?:([-+]?\d+)|\(([-+]?\d+)\)|\{ ?([-+]?\d+) ?\}) -> ^{\1\2\3}
(?<=[(\[,+-])( ?)(?:oo|inf|infinity)(?=[,)\]]) -> \1\\infty␣
(?<![\w})\]])\+ ?(?=\\infty) -> ;; (?<=\d)_(\d+)|_(\w) -> _{\1\2}
(?<!小)(\d{1,2}) ?[点时] ?([0-5]\d) ?分 -> \1:\2 ;; ^上午 ?([\d:]+) ?[点时]?$ -> \1 am
^下午 ?([\d:]+) ?[点时]?$ -> \1 pm ;; (?<=\d) ?([aApP])\.?[mM]\b\.? -> ␣\1m
\*\*(?=\S)([^*]*)\*\* -> \1 ;; ^([A-J]) ?选?项$ -> \1 ;; \\pmod ?(?:\{(\w+)\}|(\d)) -> (mod \1\2)
^\{ ?[a-z] ?(?:\||:|\\mid) ?([^{}|]*(?:[<>]|\\[lgn]e )[^{}|]*)\}$ -> \1
[(\[] ?\\begin ?\{array\} ?\{[clr ]+\}(.*)\\end ?\{array\} ?[)\]] -> \\begin{matrix}\1\\end{matrix}
^(\d+) ?[Rr] ?(?=\d+$) -> \1 R␣ ;; ^([A-Za-z]|[A-Z]{2,3}) (?:is|equals) (?!not\b) -> \1 =␣
""")
_WRAPPED = r"\\f?box(?:ed)? ?\{(.*)\}|\\\((.*)\\\)|\\\[(.*)\\\]|\"([^\"]*)\"|'([^']*)'"
_WRAPPED += r"|`{1,3}([^`]*)`{1,3}|\*{1,3}([^*]+)\*{1,3}|(?i:<answer>([^<>]*)</answer>)"
# Words of labels and of leading phrases. Another word may change the value, as in "half x = 5".
_KNOWN = _one_of(r"""the of in for this my it there final correct right best total two(?=\s\w+s\b)
average maximum minimum largest smallest longest shortest highest lowest shaded surface arc base
side answer result value sum product difference area perimeter circumference volume length width
height radius diameter distance speed velocity acceleration time(?!s) mass weight force energy power
pressure density temperature charge current voltage resistance frequency period wavelength median
probability mean mode range age number amount cost price ratio rate percentage angle measure slope
coordinate point equation color colour shape bar name line region triangle circle car""")
_KNOWN = rf"(?i:{_KNOWN})s?(?!\w)"
_NAMES = r"(?!NOT?\b)(?:[A-Z]{1,4}|[a-z](?:\(\w\))?)(?!\ [A-Za-z]\b)|\\(?:tri)?angle"
_KNOWN = rf"(?:{_KNOWN}(?:\ (?>{_KNOWN}|{_NAMES}))*)"
_LEAD = rf"""\A(?:(?i:(?:(?:the|my|final|correct|right|best)\ )*(?:answer|ans|result|solution|output
    |option|choice)\b\.?)(?:\ is\b|\ ?=|\ -(?=\ \(?[A-J]\b))?
    |{_KNOWN}\ (?:is|are|equals)\b(?!\ not\b)|\\approx|\\to\ |~(?=\ ?[-+$.\d\\])|=(?!=)>?|\#+|[✓✅]
    |(?i:so|thus|hence|therefore|then|finally|equal\ to|approximately|approx\.?|about|roughly)\b,?
    |(?i:i|we|this)\ (?:would\ )?(?:choose|pick|get|gives)\b|(?:故|所以|因此)?,?(?:应?选[项择]?
    |(?:正确)?(?:答案|选项)[是为选]?|答|大?约为?|一?共有?))\ ?:?\ ?(?=.)"""
# Phrases that say the same. The first of each entry stands for all.
_PHRASES = _names(r"""{} no␣solution empty␣set the␣empty␣set 无解; undefined dne does␣not␣exist;
(-\infty,\infty) \mathbb{r} all␣real all␣real␣number; no␣real␣solutions no␣real␣solution""")


def _clean(text) -> str:
    """One way of writing for the many that mean the same, without wrappers and leading phrases."""
    text = str(text) if isinstance(text, (str, int, float)) and not isinstance(text, bool) else ""
    if len(text) > MAX_CHARS:
        return ""
    text = _spell(re.sub(r"^\{([^{},;:|<>]+)\}$", r"\1", text))  # {5}, but not \{5\}
    # ①② is not 12.
    text = re.sub("[^①-⓿Ⅰ-ⅿℝ″´¨…]+", lambda s: unicodedata.normalize("NFKC", s[0]), text)
    alike = re.compile(r"\\[A-Za-z]+|\\.|[<>!]=|\+/?-|[^ -~]")
    for _ in range(6):  # wrappers stand inside wrappers
        text = alike.sub(lambda sign: _ALIKE.get(sign[0], sign[0]), text)
        if len(text) > 2 * MAX_CHARS:  # a thousand roots are no answer
            return ""
        text = _rewrite(" ".join(text.split())).strip()
        if (match := re.fullmatch(_WRAPPED, text)) and _closed(match[match.lastindex]):
            text = match[match.lastindex].strip()
        text = re.sub(_LEAD, "", text, flags=re.VERBOSE)
        # Outer punctuation: "5.", "Yes!", but not 0.333... and the factorial n!
        text = re.sub(r",? \(?approx(?:imately|\.)?\)?$", "", text)
        text = re.sub(r"(?<!\.)(?!\.{2,}$)[ .,;:✓✔✅]+$|(?<=[A-Za-z]{2})!$", "", text)
    text = re.sub(r"(?<=:\d\d):00$", "", " ".join(text.replace("\0", "$").split()))
    if time := re.fullmatch(r"(1?\d|2[0-3])(:[0-5]\d)?(?::00)? ([ap])m", text.lower()):
        return f"{int(time[1]) % 12 + 12 * (time[3] == 'p')}{time[2] or ':00'}"
    return "" if text.lower().strip("+-") in ("nan", "inf") else text


# Ways of writing a number -> 5/6, 1 5/6, 1.5e3 or 5 $. Exponents are short: no number gets huge.
# The first lines turn Chinese numerals into digits: 三百零五, 二〇二四, 百分之五, 三分之二, 一半.
_number = _rules(r"""
^百分之(.+)$ -> \1% ;; (?<!\d)百 -> 1百 ;; (?<=\d)十(?=\d) -> ;; (?<=\d)十 -> 0 ;; 十(?=\d) -> 1
十 -> 10 ;; ^1半$ -> 1/2 ;; ^负 -> - ;; 点(?=\d) -> . ;; ([./]\d+)(?=[百千](?![米克])) -> \1?
百(?=\d\d(?!\d)) -> ;; 百(?!\d) -> 00 ;; 千(?=0\d(?!\d)) -> 0 ;; 千(?=\d{3}(?!\d)) ->
千(?![\d克米]) -> 000 ;; ^(-?\d+)万(?=\d{4}(?!\d)) -> \1 ;; (?<=\d) ?万(?!\d) -> e4
\\frac ?\{ ?-(DEC) ?\} ?\{ ?-(DEC) ?\} -> \\frac{\1}{\2}
\\frac ?\{ ?(DEC) ?\} ?\{ ?-(DEC) ?\} -> \\frac{-\1}{\2}
 ?\\frac ?\{ ?(-?DEC) ?\} ?\{ ?(DEC) ?\}(?![\d.]) -> ␣\1/\2
^([-+]?) ?\( ?(\d+(?:\.\d+)? ?/ ?\d+)\)(?![\d.^]) -> \1\2
^([-+]?) ?(US\$|[$€£¥₹]|Rs|USD|EUR|GBP|CNY|RMB|INR)\.? ?(?=[\d.])(.*)$ -> \1\3␣\2
^(-?)(\d+)分之(\d+) -> \1\3/\2 ;; ^([-+]?)10\^\{([-+]?\d{1,3})\} -> \g<1>1e\2
(?<=\d)(?:E| ?(?:\\times|\\cdot|\*|x) ?10\^\{)([-+]?\d{1,3})(?:\}|(?!\d)) -> e\1
(?<=\d)[ -]?hundred(?![a-z]) -> e2 ;; (?<=\d)[ -]?thousand(?![a-z]) -> e3
(?<=\d)[ -]?million(?![a-z]) -> e6 ;; (?<=\d)[ -]?billion(?![a-z]) -> e9
""")
_NUMBER = r"([-+]?) ?(?:(?:(\d+)(?: and)? )?(DEC) ?/ ?(DEC)|(DEC)(?:e([-+]?\d{1,3})(?!\d))?)"
_NUMBER = re.compile(_NUMBER.replace("DEC", _DECIMAL), re.ASCII)
_WORDS = """zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen
fifteen sixteen seventeen eighteen nineteen twenty""".split()
_SI = {"": ""} | _names("""k kilo; c centi; m milli; d deci; µ micro; n nano; p pico; f femto;
h hecto; M mega; G giga; T tera; P peta""")
_BASES = _names("""m meter metre; g gram gramme; L liter litre l; W watt; s second sec; V volt;
A ampere amp; T tesla; N newton; Pa pascal; Ω ohm; eV electronvolt; mol mole; cal calorie; J
joule; C coulomb; Hz hertz; F farad; H henry; Wb weber; S siemens; B byte; b bit; Bq becquerel""")
_UNITS = {p + b: short + base for p, short in _SI.items() for b, base in _BASES.items()}
# Of nouns, those of things counted. Another noun may multiply: 5 lakhs, 5 decades, 5打.
_UNITS |= _names(r"""% percent percentage pct; ° degree deg 度; °C; °F; K kelvin; rad radian; in
inch; ft foot feet; yd yard; mi mile; lb lbs; pound; oz ounce; t ton tonne 吨; ha hectare; acre;
'; "; g 克; gal gallon; min minute 分钟 分; h hr hour 小时 时; day 天; week; month 个月; year yr
年; m 米; cm 厘米; km 千米 公里; mm 毫米; dm 分米; kg 千克 公斤; L 升; mL 毫升; s 秒; € euro EUR;
mph; £ GBP; unit; knot; $ dollar USD US$; ¥ yuan RMB CNY 元; ₹ rupee Rs INR; ¢ cent; dB decibel;
atm atmosphere; rpm; kΩ kilohm; 个; 只; 条; 张; 本; 件; 块; 棵; 朵; 辆; 支; 名; 岁; 种; people
person 人; man men; woman women; beat; child children; student; boy; girl; player; team; cat;
dog; bird; animal; apple; orange; banana; egg; flower; tree; book; pencil; page; word; letter;
ball; marble; coin; card; box; bag; cup; car; room; house; point; goal; step; way; path; side;
edge; vertex vertices; face; angle; triangle; circle; line; shape; piece; block; dot; item;
object; row; column; electron; atom; bar; mbar millibar; kbar kilobar""")
_unit_forms = _rules(r"""
\\mu ?|µ -> µ ;; \\Omega -> Ω ;; (?<=[a-z]{2})\. -> ;; \bper ?cent\b -> percent
(?<=\w) (?:long|wide|tall|high|deep|thick|old)$ -> ;; ° ?C\b|\b[Dd]egrees? (?:[Cc]elsius|C)\b -> °C
(?:\b(?:square|sq) |平方)(\w+|[^ -~]+)|(\w+) squared\b -> \1\2^{2}
(?:\b(?:cubic|cu) |立方)(\w+|[^ -~]+)|(\w+) cubed\b -> \1\2^{3}
 ?(?:\bper\b|每|/) ? -> / ;; /\(([^ ()]+?)(?: ?\\cdot ?|\*| )([^ ()]+)\) -> /\1/\2
 ?(?:\\cdot|\*) ?|(?<=[a-z])-(?=[a-z]) -> ␣ ;; \b([kM]?)Wh\b -> \1W h ;; \bNm\b -> N m
""")
_SAME = [{"pound", "lb"}, {"pound", "£"}, {"'", "ft"}, {'"', "in"}]  # short for one or the other
_PARTS = {("h", "min"): 60, ("min", "s"): 60, ("°", "'"): 60, ("'", '"'): 12, ("ft", "in"): 12}


def _unit(text: str) -> str | None:
    """One name for a unit: "square meters" and "sq m" are m^2. None where the text is no unit."""
    text, powers = _unit_forms(text.strip(" -")) if len(text) < 50 else "", Counter()
    factors = re.findall(r"(^|[/ ])([^/ ^]+)(?:\^\{(-?[1-4])\})?(?=[/ ]|$)", text)
    for mark, word, power in factors:
        name = _UNITS.get(word) or _UNITS.get(word.lower() * (word.istitle() and len(word) > 3))
        if power and name and re.match("(?!unit)[a-z]{4}|[一-鿿]", name):
            return None  # books have no square
        powers[name] += (-1) ** (mark == "/") * int(power or 1)
    if None in powers or sum(map(len, map("".join, factors))) + 3 * text.count("^") != len(text):
        return None
    return " ".join(f"{n}^{p}" for n, p in sorted(powers.items())).replace("^1", "") or None


def _quantity(text: str) -> tuple[Fraction, str] | None:
    """Exact value and unit ("" for none) of a text that is a number and nothing else."""
    digits = lambda word: str(_WORDS.index(w) if (w := word[0].lower()) in _WORDS else word[0])
    text = re.sub(r"^[A-Za-z]+(?![\w-])", digits, text)
    han = text.translate(dict(zip(map(ord, "零〇一二两三四五六七八九"), "001223456789")))
    plain = text[:1].isascii() or not re.match(r"\d*0\d*$|(?![^点]*[1-9]{2})[负十百\d]", han)
    text = _number(text if plain else han).strip()
    match = _NUMBER.match(text)
    if not match or re.match(r"[A-Za-z]$| ?/ ?[A-Za-z]\b", rest := text[match.end() :]):
        return None
    sign, whole, *ratio, plain, power = (part and part.replace(",", "") for part in match.groups())
    top, bottom = (Fraction(plain), 1) if plain else map(Fraction, ratio)
    if bottom == 0 or whole and not 0 < top < bottom:  # 2 1/3 is mixed, 2 7/3 is a slip
        return None
    value = (top / bottom + int(whole or 0)) * Fraction(10) ** int(power or 0)
    unit = _unit(rest) if rest.strip() else ""
    more = re.fullmatch(r"([^\d.,]+?)(?: and)? ?(\d[^,]{,30})", rest)
    if unit is None and more and (below := _quantity(more[2])):  # 5 ft 3 in
        unit = _unit(more[1])
        if below[0] >= (size := _PARTS.get((unit, below[1]), 0)):
            return None
        value += below[0] / size
    return None if unit is None else (-value if sign == "-" else value, unit)


class Claim(NamedTuple):  # what a text says
    text: str  # the whole of it, without idle white space
    kind: str  # number, choice, text; of lists: brackets, "," "or" ":" "matrix" "all" "pm"
    value: Fraction | str = ""  # the number, the letters, or the text without label and unit
    unit: str = ""
    name: str = ""  # the label: x in x = 5, \sin A in \sin A = 3/5, P in P(1, 2)
    parts: tuple[Claim, ...] = ()


_LETTERS = r"""(?!.*([A-J]).*\1)
    (\(?[A-J]\)?((?:\ ?[,;&/]\ ?|,?\ and\ |\ |(?<=\))(?=\())\(?[A-J]\)?)+|(?=..)A?B?C?D?E?F?)"""
# A letter, and text that neither names another option nor judges this one: "A. 4", not "A. wrong".
_CHOICE = r"""[(\[]?([A-J]|[a-j](?=[)\].:])|[a-d]$)(?:[)\].:](?=[\ \d\\]|$)|\ [-—](?=\ )|$)\ ?+
    (?![,;/&|+]|[a-j]$|.*(?:\b[B-J]\b|\bA\b(?!\ [a-z]{3,})|\b[a-j]\)|\bor\b|[,;/&]\ ?[a-j]$))
    (|(?:the|all)\ (?:the\ )?others\ are\ (?:wrong|incorrect|false)$|(?!(?:is|are|was|has|can|could
    |would|should|does|did|will|must|may|might|seems|looks|and|times|squared)\b|.*(?:(?i:n't\b|\b(?:
    not?|nope|never|n?either|but|if|except|unless|instead|rather|hardly|traps?|(?:lies?|opposite)$)\b
    |\b(?:in(?:correct|valid)|un(?:true|likely)|wrong|false|cannot|maybe|impossib|perhaps|possibl|
    probabl|reject|exclu|eliminat|ruled|refut|mistake|error|fail|discard|contradict|dismiss|doubt))
    |[✗✘❌?错误不非否]|排除|以外)).*)"""
_VARIABLE = rf"(?:(?!NOT?\b)(?:[A-Za-z]\d?|\\{_GREEK_NAME}\ ?|[A-Z]{{2,3}})'?(?:_\{{\w{{1,3}}\}})?)"
_LABEL = rf"""((?:\\(?:sin|cos|tan|cot)\ ?)?(?:(?:m\ ?)?\\angle\ ?)?{_VARIABLE}|{_KNOWN}
    |[A-Za-z]_\{{[\w\\ ]{{1,24}}\}}|[A-Za-z]\([\w,]{{1,5}}\)|[A-Z]{{2}}:[A-Z]{{2}}
    |\|(?:[A-Z]{{2}}|\\vec\ ?\{{[A-Za-z]{{1,2}}\}})\||[A-Z](?:\ or\ |\\cap\ )[A-Z](?=\ ?=\ ?\{{))
    (?:\ ?=|\ ?\\in(?![a-z])|:(?=\ (?![A-Za-z]\b)))\ ?([^=<>]+)
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
    steps = re.split(r"(?:^|(?<=[ ;,]))\(?(\d)[.)] ?", text)  # "(1) 4 (2) 5", "1. 4 2. 5"
    if len(steps) > 4 and not steps[0] and "123456789".startswith("".join(steps[1::2])):
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
    text = _PHRASES.get(text.lower(), text)
    whole = _squeeze(text)
    inner = lambda part, **fields: _read(part.strip(), depth + 1)._replace(**fields)
    if depth == 0 and re.fullmatch(_LETTERS, text, re.VERBOSE):
        return Claim(whole, "choice", "".join(sorted(re.findall("[A-J]", text))))
    if depth == 0 and (choice := re.fullmatch(_CHOICE, text, re.VERBOSE)):
        parts = (inner(choice[2]),) if choice[2] else ()
        return Claim(whole, "choice", choice[1].upper(), parts=parts)
    if number := _quantity(text):
        return Claim(f"{number[0]} {number[1]}", "number", *number)
    if label := _label(text):
        name = re.sub(r"^(?:m(?= ?\\angle)|[Tt]he\b)|\\triangle|[\s{}_|]", "", label[0])
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
    tail = re.fullmatch(r"(.*[\\^+/)}\]].*?|.*\d)(?: (?=[A-Za-z%\\].)|(?=°))(.+)", text)
    if tail and (unit := _unit(tail[2])):  # a unit after a formula
        return inner(tail[1], text=whole, unit=unit)
    return Claim(whole, "text", text)


_FORMULA = r"[\\^+*=<>]|\b[A-Za-z\d]{1,2} ?[-/] ?[A-Za-z\d]{1,2}\b"
_RELATION = r"[=<>]|\\[lgn]e(?![a-z])"
# What no parser should be made to guess at: other commands (\int would hand in the question, and
# \angle ABC is no product), words, H2O (taken for HO2), 12_8 (for 12), 1 2, and 0.33...
_REFUSED = rf"""^$|[^0-9A-Za-z\\{{}}()\[\]^_+\-/=<>|.!\ ]|(?<![\\A-Za-z])[A-Za-z]+\d|\d_|\.\.|!!
    |\d-\d+-\d|\\Gamma|(?<!\d)!|(?<!_)\d\ \d|^(?!(?!no|on)[a-z]{{2}}$)[A-Za-z]{{2}}[A-Za-z\ ]*$
    |(?<![\\A-Za-z])(?:or|and|not|[A-Za-z]{{4,}})(?![A-Za-z])
    |\\(?!(?:frac|sqrt|cdot|times|(?:arc)?(?:sin|cos|tan)|cot|sec|csc|log|ln|exp|[lgn]e|infty
    |{_GREEK_NAME})(?![A-Za-z]))"""
# Nor is f(x + 1) or x(t) a product.
_APPLIED = r"""(?:[fghFGH]|\\(?i:phi|psi))\ ?(?:\^\{[^{}]*\})?\ ?\{?[(\[]|P\ ?\([A-Z]
    |[A-Zpqsuvwy]\ ?\([xtnz]\ ?[-+]|[A-Za-z]\ ?[(\[](?:[A-Za-z]|[\d.]+)[)\]]"""
_COMMAND = rf"\\(?!{_GREEK_NAME})[A-Za-z]+ ?"
_IDLE = r"^(?:the|[Aa]n?) (?=\w)|(?<=[A-Za-z)])_\{(?=\d+\})|(?<=\d)\}"  # H_{2}O is H2O
# Words, whose case means nothing. CO and Co, vt and VT, ABCD and abcd are none.
_CASELESS = r"""\b(?:(?=\w*(?:[aeiouyAEIOU]|[^\x00-\x7f]))[^\W\d_a-z][^\W\d_A-Z]{2,}
    |(?=\w*[^\W_AEIOU][AEIOUY]|\w*[^\x00-\x7f])[^\W\d_a-z]{4,}|(?i:no|yes|red|up|[23]d))\b"""
# Idle space stands around signs, before a unit, and between the letters of a product.
_squeeze = _rules(r" ?([^\w\s.,]) ? -> \1 ;; (?<=\d) (?=[A-Za-z])|(?<=\b[^\W\d]) (?=[^\W\d]\b) ->")
_latex = _rules(r"""
(?<=\d),(?=\d{3}(?!\d)) -> ;; \*\* -> ^ ;; \* -> ␣\\cdot␣
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
        variable = true.text in "abcd" and said.text.isupper()  # B is no b, but b is option B
        return [] if said.value == true.value and not variable else None
    optional = lambda c: c.kind == "choice" and c.parts and c.text[1] != "-"  # A - 4 is not 4
    said, true = (c.parts[0] if optional(c) else c for c in (said, true))
    units = {said.unit, true.unit}
    if true.kind == "choice" or "" not in units and len(units) == 2 and units not in _SAME:
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
        small = lambda text: re.sub(rf"(?x){_CASELESS}", lambda word: word[0].lower(), text)
        idle = lambda text: re.sub(_IDLE, "", small(text.strip(' .,;:"*`')))
        if idle(pair[0]) == idle(pair[1]):
            return []
    pair = tuple(map(_latex, pair))
    refused = any(re.search(_REFUSED, text, re.VERBOSE) for text in pair)
    applied = any(re.search(_APPLIED, re.sub(_COMMAND, r"\\", text), re.VERBOSE) for text in pair)
    relations = {len(re.findall(_RELATION, text)) for text in pair}
    return None if refused or applied or len(relations) == 2 else [pair]


def _compare_lists(said: Claim, true: Claim, steps: Iterator) -> list | None:
    answers, truths, kinds = list(said.parts), list(true.parts), {said.kind, true.kind}
    loose = kinds <= {",", "or", "all", "pm", "{}"} and ("or" not in kinds or kinds & {"all", "pm"})
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
# After a fork the child is still the parent's, and a thread that held the lock is gone.
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
                word = f"no reply in {START_LIMIT:.0f} s" if word == "late" else word
                raise RuntimeError(f"math-verify, which judges formulas, does not start ({word})")


def _ask(question: bytes, seconds: float) -> str:
    """The child's answer, one line. "late" or "died: ..." where there is none; it is ended then."""
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
            if not verdict.startswith("died"):  # "late": the kernel ends slow forks sooner
                return verdict == "right"
    raise RuntimeError("math-verify was killed twice in one comparison; see whether memory ran out")
