"""The verifier: right by the table, hard to fool, impossible to hang. `python tests/test_verifier.py` prints counts."""

import logging
import os
import re
import signal
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

if __name__ == "__main__":
    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import verifier
from tests.verifier_table import TABLE
from data import Response, parse_response
from verifier import reward, verify

QUICK = settings(deadline=None, database=None, derandomize=True)

# False negatives we accept: the rule that would take them in would let wrong answers in as well.
KNOWN_FALSE_NEGATIVES = {
    ("50%", "0.5"),
    ("100 cm", "1 m"),
    ("5m", "5"),
    ("N/A", "n/a"),
    ("Yes, they are similar.", "Yes"),
}

IN_CHILD = [  # formulas that reach the parser
    "9^{9^{9^{9^9}}}x",
    r"10^{999999999}\pi",
    r"\frac{1}{" * 80 + "x" + "}" * 80,
    "9^9^9^9^9",
    r"\sqrt{" * 140 + "x" + "}" * 140,
    "x^" * 500 + "x",
    "(x+y+z)^{99999}",
    "1+" * 500 + "x",
    r"\cos(10^{10^{10}}x)",
]
HOSTILE = IN_CHILD + [
    "(" * 500 + "x" + ")" * 500,
    "{" * 500 + "x" + "}" * 500,
    "((((((9!)!)!)!)!)!)x",
    "x" + "!" * 1000,
    r"\left" * 200,
    r"\int_0^1 x^{x^{x^x}} dx",
    r"\sum_{n=1}^{10^{12}} \frac{1}{n^2}",
    r"\prod_{n=1}^{10^9} n",
    r"\binom{10^9}{10^8}",
    "\\" * 1024,
    "$" * 1023 + "x",
    "^" * 1024,
    " " * 1000 + "x" * 20,
    r"\text{" * 200 + "x",
    "x=" * 500 + "1",
    "x," * 512,
    "[" * 512 + "]" * 512,
    r"\boxed{" * 140 + "x" + "}" * 140,
    "1e999999999",
    "9" * 1024,
    "1/" * 500 + "1",
    "A or " * 200,
    "\0" * 999,
    "\ufe0f" * 1024,
    r"\{" * 99 + r"\}" * 99,
    "^ " * 512,
    "½" * 1024,
    "√" * 1024,
    "½" * 180,
    "√" * 300,
    "$a" * 512,
    "the " * 256,
    "The answer is " * 70,
    "(1) " * 256,
    "A, " * 341,
    "{1," * 300,
    r"\{1," * 200,
    "a" * 1023 + "!",
    "1," * 512,
]


def bare_math_verify(answer: str, truth: str) -> bool:
    from math_verify import parse
    from math_verify import verify as compare

    return bool(compare(parse(truth), parse(answer)))


def confusion(judge) -> tuple[dict[str, Counter], list[tuple[str, str, str]]]:
    counts, errors = {}, []
    for kind, rows in TABLE.items():
        counts[kind] = Counter()
        for answer, truth, correct in rows:
            said = judge(answer, truth)
            counts[kind][("T" if said == correct else "F") + ("P" if said else "N")] += 1
            if said != correct:
                errors.append(("FP" if said else "FN", answer, truth))
    return counts, errors


def report() -> None:
    logging.disable(logging.WARNING)
    ours, theirs = confusion(verify), confusion(bare_math_verify)
    print(
        f"{'':14}{'verify':^24}{'math-verify':^24}\n{'kind':14}"
        + f"{'TP':>6}{'FP':>6}{'FN':>6}{'TN':>6}" * 2
    )
    rows = [(kind, ours[0][kind], theirs[0][kind]) for kind in TABLE]
    for kind, a, b in rows + [
        ("all", *(sum((side[0][k] for k in TABLE), Counter()) for side in (ours, theirs)))
    ]:
        print(
            f"{kind:14}"
            + "".join(f"{side[cell]:6}" for side in (a, b) for cell in ("TP", "FP", "FN", "TN"))
        )
    for error in ours[1]:
        print("verify:", *error, sep="  ")


# ---------------------------------------------------------------------------------------------------- the table


def test_table_is_large_and_balanced():
    rows = [row for kind in TABLE.values() for row in kind]
    assert len(rows) >= 320 and 0.45 <= sum(correct for *_, correct in rows) / len(rows) <= 0.55


def test_no_false_positive_and_only_known_false_negatives():
    _, errors = confusion(verify)
    assert {
        (answer, truth) for kind, answer, truth in errors if kind == "FN"
    } == KNOWN_FALSE_NEGATIVES
    assert not [error for error in errors if error[0] == "FP"]


def test_fewer_errors_of_both_kinds_than_math_verify():
    logging.disable(logging.WARNING)
    counts = Counter(kind for kind, *_ in confusion(bare_math_verify)[1])
    logging.disable(logging.NOTSET)
    assert counts["FP"] > 20 and counts["FN"] > 20  # why the plain rules exist


def test_a_number_has_to_be_written_as_a_number():
    for work in (
        "17*23",
        r"17 \times 23",
        r"\int_0^1 782x dx",
        r"\sum_{n=1}^{1} 391",
        "400-9",
        r"\sqrt{152881}",
    ):
        assert not verify(work, "391")
    assert not verify(r"\int_0^{1} 2\pi dx", r"2\pi")


def test_list_of_truths_and_other_types():
    assert (
        verify("0.5", ["50%", "1/2"])
        and verify(r"\sqrt{12}", ("4", r"2\sqrt{3}"))
        and not verify("3", ["1", "2"])
    )
    assert verify("3", 3) and verify("3", 3.0) and verify("2.5", [2.5]) and verify(3, "3")
    for odd in (
        None,
        [],
        [None],
        {},
        b"3",
        float("nan"),
        float("inf"),
        True,
        object(),
        [[]],
        10**5000,
    ):
        assert not verify("3", odd) and not verify(odd, "3")
    assert not verify(str(float("nan")), float("nan")) and not verify("True", True)


def test_long_answers_are_not_judged():
    assert verify("7" * 1024, "7" * 1024) and not verify("7" * 1025, "7" * 1025)


# ---------------------------------------------------------------------------------------------------- format and reward

GOOD = "<caption>a</caption>\n<think>b</think> <answer>c</answer>"


def test_format():
    assert parse_response(GOOD) == Response("a", "b", "c") == parse_response(f"\n {GOOD} \n")
    assert (
        parse_response(
            "<caption>\na\n</caption><think>x < 1 <b></think><answer> c\nd </answer>"
        ).answer
        == "c\nd"
    )
    for bad in (
        "",
        GOOD + ".",
        "x" + GOOD,
        GOOD + GOOD,
        GOOD.replace("\n", ","),
        GOOD.replace(">c<", "> <"),
        None,
        3,
        GOOD.replace("think", "Think"),
        GOOD.replace("b", "<think>b"),
        GOOD.replace("c<", "<answer>c<"),
        "<caption>a<think>b</think></caption><answer>c</answer>",
        "<think>b</think><caption>a</caption><answer>c</answer>",
        GOOD.replace("<caption>a</caption>", ""),
        GOOD[:-1],
        GOOD.replace("</think>", ""),
    ):
        assert parse_response(bad) is None and reward(bad, "c") == 0.0


TAGS = ["<caption>", "</caption>", "<think>", "</think>", "<answer>", "</answer>"]


@given(
    st.lists(st.sampled_from([*TAGS, "a", " "]), max_size=12),
    st.permutations(TAGS),
    st.integers(0, 5),
)
@settings(QUICK, max_examples=300)
def test_format_of_mutated_tags(tokens, order, place):
    assert (
        parse_response("".join(tokens)) is None
        or [token for token in tokens if token in TAGS] == TAGS
    )
    assert (parse_response("a".join(order)) is None) or order == TAGS
    right = [*TAGS[:1], "a", *TAGS[1:3], "b", *TAGS[3:5], "c", *TAGS[5:]]
    assert parse_response("".join(right)) == Response("a", "b", "c")
    for mutated in (
        right[:place] + tokens[:1] + right[place + 1 :],
        right[:place] + [TAGS[place]] + right[place:],
    ):
        response = parse_response("".join(mutated))
        assert response is None or [token for token in mutated if token in TAGS] == TAGS


def test_format_is_linear():
    start = time.monotonic()
    for piece in ("<caption>", "</caption>", "<", " ", "<think></think>", "\n<answer>"):
        parse_response("<caption>" + piece * 100_000), parse_response(piece * 100_000 + GOOD)
    parse_response(
        "<caption>a"
        + " " * 10**6
        + "</caption><think>b</think><answer>c</answer>"
        + " " * 10**6
        + "x"
    )
    assert time.monotonic() - start < 2


def test_reward():
    assert reward(GOOD, "c") == pytest.approx(1.0) and reward(GOOD, "d") == pytest.approx(0.2)


# ---------------------------------------------------------------------------------------------------- properties


@given(st.text(max_size=60), st.text(max_size=60))
@settings(QUICK, max_examples=150)
def test_random_unicode_never_raises(answer, truth):
    assert verify(answer, truth) in (True, False)


SIGNS = r"0123456789xyAB\{}()[]^_+-*/=<>|,.;:$%° '!fracsqtpiexor"


@given(st.text(alphabet=SIGNS, max_size=24), st.sampled_from(["x+1", r"2\sqrt{3}", "12", "A"]))
@settings(QUICK, max_examples=100)
def test_random_formulas_never_raise(answer, truth):
    assert verify(answer, truth) in (True, False)


ROWS = [row for rows in TABLE.values() for row in rows]
PLAIN = [
    row for row in ROWS if not isinstance(verifier._compare(*map(verifier._clean, row[:2])), list)
]


@given(st.sampled_from(PLAIN), st.text(" \n\t", max_size=4), st.text(" \n\t", max_size=4))
@settings(QUICK, max_examples=200)
def test_outer_white_space_does_not_matter(row, before, after):
    answer, truth, _ = row
    assert (
        verify(before + answer + after, truth)
        == verify(answer, before + truth + after)
        == verify(answer, truth)
    )


SIMPLE = st.one_of(
    st.integers(-(10**6), 10**6).map(str),
    st.decimals(-1000, 1000, places=2).map(str),
    st.from_regex(r"-?[0-9]{1,3}/[1-9][0-9]{0,2}", fullmatch=True),
    st.from_regex(r"[a-z]{2,8}", fullmatch=True),
    st.sampled_from(["Yes", "no", "TRUE", "5 cm", "5 m", "5", "50%", "$5", "1e3", "1,000", "30°"]),
)


@given(SIMPLE, SIMPLE)
@settings(QUICK, max_examples=200)
def test_numbers_and_words_are_reflexive_and_symmetric(a, b):
    assert verify(a, a) == (a.lower() not in ("nan", "inf")) and verify(a, b) == verify(b, a)


NUMERIC = [
    row[:2]
    for kind, rows in TABLE.items()
    if kind != "unit"  # cm^2 and cm^3 both match a truth without unit
    for row in rows
    if row[2] and re.search("[0-9]", row[0])
]


@given(st.sampled_from(NUMERIC), st.integers(1, 9), st.data())
@settings(QUICK, max_examples=100)
def test_a_changed_digit_makes_a_right_answer_wrong(row, shift, data):
    answer, truth = row
    place = data.draw(st.sampled_from([i for i, c in enumerate(answer) if c in "0123456789"]))
    changed = answer[:place] + str((int(answer[place]) + shift) % 10) + answer[place + 1 :]
    if verifier._choice(verifier._clean(truth)):  # the letter is the answer there
        return
    assert not verify(changed, truth)


RIGHT = [row[:2] for row in ROWS if row[2] and row[:2] not in KNOWN_FALSE_NEGATIVES]


@given(
    st.sampled_from(RIGHT),
    st.sampled_from(ROWS),
    st.sampled_from([" or ", ", ", "; ", " / ", "\n", " and "]),
)
@settings(QUICK, max_examples=100)
def test_a_second_candidate_makes_a_right_answer_wrong(row, other, joint):
    answer, truth = row
    if not other[0].strip() or other[0] == answer or (answer, joint) == ("0", " / "):  # 0/12 is 0
        return
    if re.fullmatch("[A-J]{2,}", other[0]):  # a segment, perhaps
        return
    if verifier._unit(verifier._clean(other[0])):  # "12" and "C": coulombs
        return
    hedged = answer + joint + other[0]
    choice = verifier._choice(verifier._clean(hedged))
    named = verifier._choice(verifier._clean(other[0])) or re.search(r"\b[A-J]\b", other[0])
    if choice and choice[1] and not named:  # one letter, then text
        return
    assert not verify(hedged, truth), (hedged, truth)


# ---------------------------------------------------------------------------------------------------- hostile input


@pytest.fixture(scope="module", autouse=True)
def warm():
    assert verify(r"\sqrt{12}", r"2\sqrt{3}")


def slowest(pairs) -> tuple[float, list[bool]]:
    times, verdicts = [], []
    for answer, truth in pairs:
        start = time.monotonic()
        verdicts.append(verify(answer, truth))
        times.append(time.monotonic() - start)
    return max(times), verdicts


def test_hostile_answers_are_wrong_within_the_limit():
    worst, verdicts = slowest([(text, "x+1") for text in HOSTILE])
    assert worst < 1.2 and not any(verdicts)
    worst, _ = slowest([("x+1", text) for text in IN_CHILD[:1]])
    assert worst < 1.2
    worst, verdicts = slowest(
        [(r"\sqrt{12}", [r"3^{3^{3^{33}}}x", r"2\sqrt{3}"])]
    )  # all truths share one limit
    assert worst < 1.2
    assert slowest([(r"\sqrt{12}", r"2\sqrt{3}")])[0] < 1.2


def test_threads_share_the_child():
    with ThreadPoolExecutor(4) as pool:
        assert all(
            pool.map(lambda n: verify(rf"\sqrt{{{4 * n}}}", rf"2\sqrt{{{n}}}"), range(2, 14))
        )
    found = []
    pairs = [("9^{9^{9^9}}x", "x+1"), (r"\sqrt{12}", r"2\sqrt{3}")]
    thread = threading.Thread(target=lambda: found.append(slowest(pairs)))
    thread.start(), thread.join()
    assert found[0][0] < 1.2 and found[0][1] == [False, True]


class Pairs:
    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int):
        assert verifier._server is None or index  # a fork never talks to its parent's child
        verify(r"\sqrt{12}", r"2\sqrt{3}")
        return slowest([("9^{9^{9^9}}x", "x+1"), (r"\sqrt{12}", r"2\sqrt{3}")])


def test_dataloader_worker():
    from torch.utils.data import DataLoader

    for worst, verdicts in DataLoader(
        Pairs(), batch_size=None, num_workers=1, multiprocessing_context="fork"
    ):
        assert worst < 1.2 and verdicts == [False, True]
    assert verify(r"\sqrt{12}", r"2\sqrt{3}")


def test_child_survives_kills():
    for number in (signal.SIGKILL, signal.SIGSTOP):
        assert verify(r"\sqrt{12}", r"2\sqrt{3}")
        server = verifier._server
        os.kill(server.pid, number)
        time.sleep(0.05)
        first = verify(r"\sqrt{12}", r"2\sqrt{3}")
        assert (
            first or number == signal.SIGSTOP
        )  # one that hangs costs the answer in hand its verdict, no more
        assert (
            verify(r"\sqrt{12}", r"2\sqrt{3}")
            and verifier._server is not server
            and server.returncode is not None
        )


def test_child_ends_with_its_parent():
    import subprocess

    code = (
        "import os, verifier as v; v.verify(r'\\sqrt{12}', r'2\\sqrt{3}');"
        "print(v._server.pid, flush=True); os._exit(0)"
    )
    pid = int(
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout
    )
    for _ in range(50):
        try:
            with open(f"/proc/{pid}/stat") as stat:
                if (
                    stat.read().rpartition(")")[2].split()[0] == "Z"
                ):  # dead; reaping it is init's part
                    return
        except OSError:
            return
        time.sleep(0.1)
    raise AssertionError("the child outlived its parent")


def test_nothing_is_evaluated_as_python(tmp_path):
    trace = tmp_path / "trace"
    code = f"__import__('os').system('touch {trace}')"
    answers = [
        code,
        f"${code}$",
        rf"\boxed{{{code}}}",
        rf"\text{{{code}}}",
        rf"x + \operatorname{{{code}}}",
        rf"\frac{{{code}}}{{2}}",
    ]
    for answer in answers + [f"lambda: {code}", f"x_{{{code}}}", f"[{code} for x in (1,)]"]:
        assert not verify(answer, "x+1") and verify(answer, answer) in (True, False)
    # Past the plain rules, straight to the child, where the lock is.
    for answer in answers:
        verifier._algebra_says([[("x+1", answer)]]), verifier._algebra_says([[(answer, answer)]])
    assert not trace.exists()


if __name__ == "__main__":
    report()
