"""Planted errors, how well a discriminator judges, and an oracle in its place: what judge_study.py
needs of the embedded world. Running this file does nothing."""

import json
import random
import re
import statistics
import time
from pathlib import Path
from types import SimpleNamespace

import torch

from data import decode, encode_prompts, parse_response
from discriminator import Comparison, Judgement, judge, load_discriminator
from model import load_policy
from sampler import Sampling, generate
from support import digits
from support.digits import demonstration, read_rows
from support.huggingface import save_discriminator
from support.optimizer import adamw, learning_rate_at, optimizer_step
from support.resuming import write_json
from support.rows import load_data

# --------------------------------------------------------------------------------------------------
# Planted errors

ANSWER_FIRST = 0.7  # share of the supervision responses that state the answer first
VIEWS = ("perception", "reasoning")
ERRORS = ("misread", "slip", "answer")


def task(row: dict) -> tuple[str, tuple[int, ...], list[int]]:
    """A row of the world -> kind of question, digits, and what varies in the question."""
    shown = tuple(map(int, re.findall(r"\d", row["caption"][0])))
    return row["source"], shown, list(map(int, re.findall(r"greater than (\d)", row["question"])))


def plant(kind, shown, details, first: bool, error: str, rng: random.Random) -> str:
    """A demonstration with one error.

    misread  one digit is read as any other, and what follows follows from it
    slip     one step is wrong, in a count any of the four, and the answer follows from it
    answer   the steps are right, and the answer is off by at most 3"""
    if error == "misread":
        at = rng.randrange(len(shown))
        wrong = rng.choice([digit for digit in range(10) if digit != shown[at]])
        return demonstration(kind, (*shown[:at], wrong, *shown[at + 1 :]), details, first=first)
    right, answer = digits.work(kind, shown, details)
    said_steps = right
    if error == "slip" and kind == "count":
        steps = right.removesuffix(".").split(", ")
        at = rng.randrange(len(steps))
        digit, word = steps[at].split()
        steps[at] = f"{digit} {'no' if word == 'yes' else 'yes'}"
        said_steps, said = ", ".join(steps) + ".", str(sum("yes" in step for step in steps))
    elif error == "slip":
        said_steps, said = digits.work(kind, shown, details, rng.choice((-1, 1)))
    else:
        near = range(max(int(answer) - 3, 0), int(answer) + 4)
        said = str(rng.choice([number for number in near if str(number) != answer]))
    text = demonstration(kind, shown, details, first=first).replace(right, said_steps)
    for form in ("he answer is {}.", "<answer>{}<"):
        text = text.replace(form.format(answer), form.format(said))
    return text


def compared(rows, examples, processor, errors, rng: random.Random) -> list[Comparison]:
    """Comparisons of each row's supervision with one planted error of each of `errors`, a name or
    names to choose from. Both sides state the answer first, or neither does."""
    out = []
    for row, prompt in zip(rows, encode_prompts(processor, examples), strict=True):
        first = "<think>The answer is" in row["response"]
        names = [error if isinstance(error, str) else rng.choice(error) for error in errors]
        students = dict.fromkeys(plant(*task(row), first, name, rng) for name in names)
        teacher = parse_response(row["response"])
        out.append(Comparison(prompt, teacher, [parse_response(student) for student in students]))
    return out


# --------------------------------------------------------------------------------------------------
# The warm-up, and how well a discriminator judges

CYCLES, PROMPTS, RATE = (1400, 1000), 24, 7e-4  # steps of the warm-up, each cycle a cosine
MIXTURE = ["misread", ("slip",) * 5 + ("answer",) * 3]  # the two students of a prompt
TOKENS = 16384


def warm_up(data: str, held: str, kind: str, base: Path, out: Path, seed: int) -> None:
    """The warm-up of discriminator.py on the rows of `data`, from a base that is upcycled, with two
    students to a prompt, which is computed once. `held` are the rows for `planted`."""
    model, processor = load_discriminator(str(base), kind=kind, seed=seed)
    lines = []
    for cycle in range(len(CYCLES)):
        lines += warm_up_cycle(model, processor, data, held, seed, cycle)
    out.mkdir(parents=True, exist_ok=True)
    save_discriminator(model, str(out))
    write_json(str(out / "run.json"), {"finished": True, "lines": lines})


def warm_up_cycle(model, processor, data: str, held: str, seed: int, cycle: int) -> list[dict]:
    """One cycle of the warm-up. -> what `planted` finds every 200 steps."""
    rows, examples = read_rows(data), load_data([data])
    steps, optimizer = CYCLES[cycle], adamw(model, weight_decay=0.01)
    config = SimpleNamespace(learning_rate=RATE, lr_scheduler_type="cosine", warmup_steps=0.1)
    rng, start = random.Random(seed + cycle), time.time()
    order, losses, lines = [], [], []
    if cycle:
        torch.manual_seed(seed + cycle)  # of dropout
    model.train()
    for step in range(1, steps + 1):
        if len(order) < PROMPTS:
            order = rng.sample(range(len(rows)), len(rows))
        some = [order.pop() for _ in range(PROMPTS)]
        given = [rows[i] for i in some], [examples[i] for i in some]
        pairs = compared(*given, processor, MIXTURE, rng)
        metrics = judge(model, pairs, processor, TOKENS, backward=True).metrics
        losses.append(metrics["discriminator_loss"].value)
        optimizer_step(model, optimizer, learning_rate_at(step, steps, config), max_grad_norm=1.0)
        if step % 200 == 0:
            line = {"step": sum(CYCLES[:cycle]) + step, "seconds": round(time.time() - start)}
            line["loss"] = round(statistics.mean(losses[-100:]), 3)
            lines.append(line | planted(model, processor, held))
            print(json.dumps(lines[-1]), flush=True)
            model.train()
    return lines


def planted(judged, processor, data: str, count: int = 400) -> dict[str, float]:
    """How often the whole response scores above the one with an error, on the first rows of `data`,
    by error, view and kind, where the two views are not the same text. 0.5 is blind."""
    rows, examples = read_rows(data)[:count], load_data([data])
    rng, found = random.Random("held out"), {}
    for row in rows:  # in the two manners of the supervision
        row["response"] = demonstration(*task(row), first=rng.random() < ANSWER_FIRST)
    judged.eval()
    for error in ERRORS:
        for at in range(0, count, 100):
            some = range(at, min(at + 100, count))
            given = [rows[i] for i in some], [examples[i] for i in some]
            pairs = compared(*given, processor, [error], rng)
            scores = judge(judged, pairs, processor, TOKENS, backward=False)
            for i, (pair, row) in enumerate(zip(pairs, given[0])):
                (s,), t = pair.students, pair.teacher
                views = (s.caption, t.caption), ((s.think, s.answer), (t.think, t.answer))
                for view, (a, b) in zip(VIEWS, views):
                    ours, theirs = getattr(scores, f"teacher_{view}"), getattr(scores, view)
                    for name in (f"{error}_{view}", f"{error}_{view}_{row['source']}"):
                        if a != b:
                            found.setdefault(name, []).append(bool(ours[i, 0] > theirs[i, 0]))
    return {name: round(statistics.mean(x), 3) for name, x in found.items()}


def own_rollouts(policy: Path, judges: dict[str, Path], data: str, seed: int, count=200) -> dict:
    """How often a right view of a rollout scores above a wrong one of the same prompt, in 8 samples
    of the policy for each of the first rows of `data`. A caption is right by its text, reasoning
    where think and answer are those of the world in either manner."""
    rows, examples = read_rows(data)[:count], load_data([data])
    model, processor = load_policy(str(policy))
    prompts = encode_prompts(processor, [examples[i] for i in range(count)])
    sampling = Sampling(8, 96, temperature=1.0, seed=seed, max_rollout_rows=256)
    comparisons, right = [], []
    for row, group in zip(rows, generate(model, prompts, sampling)):
        texts = [decode(processor, branch, model.stop_ids) for branch in group.branches]
        students = [parse_response(text) for text in texts]
        forms = [parse_response(demonstration(*task(row), first=first)) for first in (False, True)]
        comparisons.append(Comparison(group.prompt, forms[0], students))
        thinks = [(form.think, form.answer) for form in forms]
        right.append(
            {
                "perception": [s and s.caption == forms[0].caption for s in students],
                "reasoning": [s and (s.think, s.answer) in thinks for s in students],
            }
        )
    found = {}
    for name, path in judges.items():
        judged, processor = load_discriminator(str(path))
        scores = judge(judged.eval(), comparisons, processor, TOKENS, backward=False)
        for view in VIEWS:
            pairs = []
            for values, of_prompt in zip(getattr(scores, view).tolist(), right):
                known = [(x, ok) for x, ok in zip(values, of_prompt[view]) if ok is not None]
                good, bad = ([x for x, ok in known if ok == want] for want in (True, False))
                pairs += [a > b for a in good for b in bad]
            found[f"own_{view}_{name}"] = round(statistics.mean(pairs), 3) if pairs else None
            found[f"own_{view}_pairs"] = len(pairs)
    return found


def oracle(discriminator, comparisons, processor, *_, **__) -> Judgement:
    """What discriminator.judge returns, from the truth. Perception: 1 where the caption is right.
    Reasoning: 1 where think and answer are right, 0.5 where the answer alone is. Else 0."""
    shape = len(comparisons), max(len(comparison.students) for comparison in comparisons)
    perception, reasoning = torch.zeros(shape), torch.zeros(shape)
    valid = torch.zeros(shape, dtype=torch.bool)
    for p, comparison in enumerate(comparisons):
        question = processor.tokenizer.decode(comparison.prompt.input_ids.tolist())
        source = "count" if "greater than" in question else "spread"
        row = dict(source=source, question=question, caption=[comparison.teacher.caption])
        forms = [parse_response(demonstration(*task(row), first=first)) for first in (False, True)]
        for n, student in enumerate(comparison.students):
            if student is not None:
                valid[p, n] = True
                perception[p, n] = student.caption == forms[0].caption
                whole = 1.0 if student.think in [form.think for form in forms] else 0.5
                reasoning[p, n] = whole * (student.answer == forms[0].answer)
    for parameter in discriminator.parameters():
        parameter.grad = torch.zeros_like(parameter)
    ones = torch.ones(shape)
    return Judgement(perception, reasoning, valid, ones, ones, ones, ones, metrics={})
