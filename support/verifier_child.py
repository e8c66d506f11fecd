r"""The algebra of the verifier (stage 3, RLVR, accuracy term): do two LaTeX formulas say the same?

verifier.py starts this file as a child process; only this file imports sympy and math-verify. It
takes math-verify's LaTeX parser, but not its comparison, which rounds. This file compares values
and proves nothing. Two formulas count as equal if the ratio of their values is 1, to 40 digits, at
three fixed points, or at the first alone where the others leave the reals. Two equations or
inequalities count as equal if the ratio of their differences is constant. Every question runs in a
fork, which the kernel ends after argv[1] seconds of processor or argv[2] seconds of wall time.
"""

import json
import os
import re
import resource
import signal
import sys

import sympy
import sympy.parsing.sympy_parser
from latex2sympy2_extended.latex2sympy2 import ConversionConfig, _Latex2Sympy, latex2sympy
from math_verify.grader import should_treat_as_complex

MEMORY, DIGITS = 2 << 30, 40  # bytes that one question may take; digits that have to agree
FORBIDDEN = r"(subprocess|socket|ctypes|shutil)\.|os\.(system|exec|posix_spawn|fork|rem|ren|kill)"


def guard(event: str, args: tuple) -> None:
    """Audit hook of a fork: it may compute and read, and do nothing else."""
    writes = event == "open" and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
    if writes or re.match(FORBIDDEN, event):
        raise PermissionError(event)


# sympify and parse_expr evaluate text in one function alone, which is removed here. The parser
# would read numbers by it too; Rational reads them exactly and without it.
sympy.parsing.sympy_parser.eval_expr = None
_Latex2Sympy.parse_number = lambda self, text: sympy.Rational(text.replace(",", ""))


def parse(text: str) -> sympy.Basic:
    config, real = ConversionConfig(lowercase_symbols=False), not should_treat_as_complex(text)
    return latex2sympy(text, is_real=real, normalization_config=None, conversion_config=config)


def values(*formulas: sympy.Expr):
    """The formulas' values at three points: all positive, all negative, small with mixed signs."""
    names = sorted({symbol.name for formula in formulas for symbol in formula.free_symbols})
    sizes = [sympy.Rational(sympy.prime(11 + i), sympy.prime(5 + 2 * i)) for i in range(len(names))]
    points = [(size, -size, (-1) ** i / size) for i, size in enumerate(sizes)]
    for point in list(zip(*points)) or [()]:
        at = dict(zip(names, point))
        exact = [f.subs({s: at[s.name] for s in f.free_symbols}).doit() for f in formulas]
        yield [sympy.N(value, DIGITS + 10) for value in exact]


def equal(truth: sympy.Basic, answer: sympy.Basic) -> bool:
    relations = truth.is_Relational and answer.is_Relational
    sides = [f.lhs - f.rhs if relations else f for f in (truth, answer)]
    first, *others = values(*sides)
    # Where a root or logarithm leaves the reals, two formulas agree at the first point only.
    points = [first] + [(t, a) for t, a in others if relations or t.is_real and a.is_real]
    ratios = [sympy.N(t / a, DIGITS + 10) for t, a in points]
    scale = ratios[0] if relations and others else sympy.Integer(1)
    if not scale.is_finite or any(not abs(r / scale - 1) < 10.0**-DIGITS for r in ratios):
        return False
    return not relations or type(answer) is type(truth if scale > 0 else truth.reversed)


if __name__ == "__main__":
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    for number in (signal.SIGALRM, signal.SIGPROF):
        signal.signal(number, signal.SIG_DFL)
    # A test of the parser, which also warms up what sympy imports late.
    tests = (r"\log_{2} 3-2ix", r"\frac{\ln 3}{\ln 2}-2xi"), (r"\pi", "3.1415927")
    tests += ((r"y\le \sin(2x)", r"2\sin(x)\cos(x)\ge y"),)
    if [equal(*map(parse, pair)) for pair in tests] != [True, False, True]:
        sys.exit("math-verify's parser misreads formulas")
    print("ready", flush=True)
    for line in sys.stdin:
        if (fork := os.fork()) == 0:
            try:
                for stream in (1, 2):  # what a library prints is no reply
                    os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
                signal.setitimer(signal.ITIMER_PROF, float(sys.argv[1]))
                signal.setitimer(signal.ITIMER_REAL, float(sys.argv[2]))
                resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
                sys.addaudithook(guard)
                right = any(all(equal(*map(parse, p)) for p in pairs) for pairs in json.loads(line))
                os._exit(0 if right else 1)
            finally:
                os._exit(1)
        print("right" if os.waitpid(fork, 0)[1] == 0 else "wrong", flush=True)
