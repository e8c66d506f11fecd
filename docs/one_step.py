"""Writes docs/one-step.md and docs/one-step.png: one prompt of an alignment run, with every number
of its step.

    python -m docs.one_step out/demo/align [FOLDER]

The prompt is one that the run's rollouts.jsonl records. A run keeps no weights from between its
steps, so the command plays the run again up to that step. The policy then samples the same rollouts
once more, and the functions that train compute every number of the page.
"""

import argparse
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path
from types import SimpleNamespace

import torch
from PIL import Image
from transformers.utils import logging

from align import AlignConfig, alignment_advantage, debias, fill_invalid
from data import decode, encode_prompts, limit_pixels, parse_response, rank_packs
from discriminator import VIEWS, Comparison, discriminator_loss, judge
from discriminator import load_discriminator, pair_loss
from model import load_policy, token_logprobs
from policy_gradient import Objective, group_advantage, policy_backward
from sampler import Sampling, generate
from support.errors import UserError
from support.loader import epoch_rows
from support.rows import load_data, open_image
from support.verifier import verify

HERE = Path(__file__).resolve().parent


# --------------------------------------------------------------------------------------------------
# Which prompt


def choose(lines: list[dict]) -> tuple[list[dict], list[str]]:
    """Lines of rollouts.jsonl -> (those of one step, what they show). It is the earliest step that
    shows most of a broken format, right and wrong captions, right and wrong answers. No lines
    where no rollout keeps the format."""
    best, most = [], []
    for step in dict.fromkeys(line["step"] for line in lines):
        group = [line for line in lines if line["step"] == step]
        teacher = parse_response(group[0]["supervision"])
        responses = [parse_response(line["response"]) for line in group]
        whole = [response for response in responses if response]
        if not whole:
            continue
        captions = {response.caption == teacher.caption for response in whole}
        truth = group[0]["answer"] or teacher.answer
        answers = {verify(response.answer, truth) for response in whole}
        kinds = {
            "a broken format": len(whole) < len(group),
            "right and wrong captions": len(captions) == 2,
            "right and wrong answers": len(answers) == 2,
        }
        shown = [kind for kind, there in kinds.items() if there]
        if not best or len(shown) > len(most):
            best, most = group, shown
    return best, most


# --------------------------------------------------------------------------------------------------
# Its numbers


def measure(path: Path, folder: str) -> SimpleNamespace:
    """All that the page shows of a run's step. The run is played again in `folder`."""
    if not (path / "rollouts.jsonl").exists() or not (path / "run.json").exists():
        raise UserError(f"{path}: found no run.json and rollouts.jsonl; name an alignment's run")
    run = json.loads((path / "run.json").read_text())
    if run["stage"] != "align" or run["run"]["lr_scheduler_type"] != "constant":
        raise UserError(f"{path}: no alignment of constant learning rates; name one")
    config = AlignConfig(**run["run"])
    logging.set_verbosity_error()
    lines = [json.loads(line) for line in (path / "rollouts.jsonl").read_text().splitlines()]
    lines, shown = choose(lines)
    if not lines:
        raise UserError(f"{path}: no recorded rollout keeps the format; name another run")
    step = lines[0]["step"]

    # The weights before and after the step.
    script, *words = shlex.split(run["command"])
    words += ["--output_dir", folder, "--max_steps", str(step), "--save_hf_steps", "1"]
    words = [sys.executable, str(HERE.parent / Path(script).name), *words]
    played = subprocess.run(words, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""})
    if played.returncode:
        raise UserError(f"{run['command']}: does not run again; the line above says why")
    earlier = config.ckpt, config.discriminator
    if step > 1:
        earlier = f"{folder}/checkpoint-{step - 1}", f"{folder}/checkpoint-{step - 1}/discriminator"
    policy, processor = load_policy(earlier[0])
    policy_after, _ = load_policy(folder)
    discriminator, _ = load_discriminator(earlier[1], seed=config.seed)
    discriminator_after, _ = load_discriminator(f"{folder}/discriminator")

    # The prompt. Its place in the stream of rows seeds its rollouts.
    examples = load_data(config.data, ("response",), config.system_prompt, config.image_dir)
    first = (step - 1) * config.prompts_per_step
    numbers = epoch_rows(first, first + config.prompts_per_step, len(examples), config.seed)
    wheres = [examples[number].where for number in numbers]
    if lines[0]["row"] not in wheres:
        raise UserError(f"{lines[0]['row']}: not a row of step {step}; the data have changed")
    place = wheres.index(lines[0]["row"])
    example = examples[numbers[place]]
    if config.max_pixels:
        limit_pixels(processor, config.max_pixels)
    (prompt,) = encode_prompts(processor, [example])
    prompt.index = first + place

    # The rollouts. Equal ones share a row of the page: the first one's number -> all their numbers.
    groups = generate(policy, [prompt], Sampling.of(config), step=step)
    texts = [decode(processor, branch, policy.stop_ids) for branch in groups[0].branches]
    if texts != [line["response"] for line in lines]:
        raise UserError(
            f"{path}: step {step} gave other rollouts when it was played again; another processor "
            f"or other models than the run's: run the alignment again"
        )

    # The scores and the discriminator's loss, without dropout.
    students = [parse_response(text) for text in texts]
    comparison = Comparison(prompt, parse_response(example.response), students)
    options = dict(
        max_tokens=config.max_tokens_per_pack,
        score_l2=config.score_l2,
        balance_coef=config.router_aux_loss_coef,
        backward=False,
    )
    judged = judge(discriminator.eval(), [comparison], processor, **options)
    judged_after = judge(discriminator_after.eval(), [comparison], processor, **options)

    # The advantages.
    replaced = {}
    for view in VIEWS:
        beta = getattr(config, f"length_beta_{view}")
        score = debias(getattr(judged, view), getattr(judged, f"{view}_length"), beta)
        replaced[view] = fill_invalid(score, judged.valid)
    advantage = alignment_advantage(
        replaced["perception"],
        replaced["reasoning"],
        judged.valid,
        alpha=config.alpha,
        format_penalty=config.format_penalty,
    )

    # The policy's loss, and the log-probabilities of the rollouts before and after the step.
    packs = rank_packs(groups, processor, config.max_tokens_per_pack)
    objective = Objective("grpo", config.epsilon, config.epsilon, temperature=config.temperature)
    loss = policy_backward(policy, packs, groups, advantage, objective)["loss"]
    same = {}
    for i, branch in enumerate(groups[0].branches):
        same.setdefault(tuple(branch.tolist()), []).append(i)
    rows = {members[0]: members for members in same.values()}
    valid = judged.valid[0].tolist()
    teacher = comparison.teacher
    high = max(rows, key=lambda i: advantage[0, i].item())
    low = min(rows, key=lambda i: advantage[0, i].item())
    return SimpleNamespace(
        path=path,
        config=config,
        step=step,
        shown=shown,
        example=example,
        question=lines[0]["question"].replace("<image>", "").strip(),
        teacher=teacher,
        truth=example.answer or teacher.answer,
        lengths=[len(branch) for branch in groups[0].branches],
        texts=texts,
        students=students,
        rows=rows,
        whole=[i for i in rows if valid[i]],
        broken=[i for i in rows if not valid[i]],
        pairs=sum(valid),
        scores={view: getattr(judged, view)[0].tolist() for view in VIEWS},
        teacher_scores={view: teacher_score(judged, view) for view in VIEWS},
        judged=judged,
        judged_after=judged_after,
        replaced={view: score[0] for view, score in replaced.items()},
        normalised={view: group_advantage(score)[0] for view, score in replaced.items()},
        advantage=advantage[0].tolist(),
        high=high,
        low=low,
        policy_loss=loss.value,
        logp=summed_logprobs(policy, packs, config.temperature),
        logp_after=summed_logprobs(policy_after, packs, config.temperature),
    )


def teacher_score(judged, view: str) -> float:
    """The score of the supervision response, which is the same in every pair."""
    return getattr(judged, f"teacher_{view}")[judged.valid][0].item()


def mean_gap(judged, view: str) -> float:
    """How far the supervision response scores above the rollouts, on average over the pairs."""
    gap = getattr(judged, f"teacher_{view}") - getattr(judged, view)
    return gap[judged.valid].mean().item()


@torch.no_grad()
def summed_logprobs(policy, packs, temperature: float) -> list[float]:
    """The log-probability of each branch, which is the sum over its tokens."""
    sums = []
    for pack in packs:
        logp, _ = token_logprobs(policy, pack, temperature)
        sums += [part.sum().item() for part in logp.split(pack.lengths)]
    return sums


# --------------------------------------------------------------------------------------------------
# The page


def number(value, decimals: int = 3) -> str:
    """A number as the page shows it."""
    text = f"{float(value):.{decimals}f}"
    return text.lstrip("-") if float(text) == 0 else text


def quoted(text: str) -> str:
    """A text as it is, in one line."""
    return "`" + " ".join(text.replace("`", "'").replace("|", "\\|").split()) + "`"


def table(head: list[str], lines: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def label(m, i: int) -> str:
    """The numbers of the rollouts that share a row, from 1."""
    return ", ".join(str(member + 1) for member in m.rows[i])


def named(m, *rows: int) -> str:
    """The rollouts of some rows, in a sentence."""
    members = sorted(member + 1 for i in rows for member in m.rows[i])
    *more, last = map(str, members)
    return f"rollouts {', '.join(more)} and {last}" if more else f"rollout {last}"


def remark(m, i: int, views=VIEWS) -> str:
    """What the views of a rollout say, against the supervision's words and the true answer."""
    student = m.students[i]
    if student is None:
        return "format broken"
    said = {"reasoning": "answer right" if verify(student.answer, m.truth) else "answer wrong"}
    words, true_words = (re.findall(r"\w+", r.caption) for r in (student, m.teacher))
    differing = [f"{word} for {true}" for word, true in zip(words, true_words) if word != true]
    if len(words) != len(true_words):
        said["perception"] = "caption of other words"
    elif differing:
        said["perception"] = f"caption says {', '.join(differing)}"
    else:
        said["perception"] = "caption right"
    return ", ".join(said[view] for view in views)


def the_prompt(m) -> str:
    blocks = [("caption", "perception"), ("think", "reasoning"), ("answer", "reasoning")]
    lines = [[block, quoted(getattr(m.teacher, block)), view] for block, view in blocks]
    return f"""
# A step of the game with numbers

Stage 2 is a game of two models. The **policy** is the model to be trained. It sees a picture with
a question and writes a response. The **discriminator** scores responses. It learns to score good
ones above the policy's. The policy learns to write what scores higher.

A number in parentheses is an [equation](paper-map.md#map). Beside it stand the file and the
function that computes it. The game is (2), `align.py`: `train`.

This page follows one prompt through one step. Step {m.step} of `{m.path}` has the earliest
recorded prompt whose rollouts show {", ".join(m.shown) or "a whole format"}.
`python -m docs.one_step {m.path}` plays that run again up to the step, and overwrites this page.
Values are rounded when they are shown, not before.

## The prompt

{"![The picture of the prompt](one-step.png)" if m.example.images else "It has no picture."}

Question: {quoted(m.question)}

The **supervision response** is a good response to this prompt. It stands in the data; in the paper
a stronger model wrote it.

{table(["block", "supervision response", "view"], lines)}

A **view** is the part of a response that one score judges. Each response has two views.
"""


def the_rollouts(m) -> str:
    lines = []
    for i in m.rows:
        student = m.students[i]
        blocks = [quoted(m.texts[i]), "", ""]
        if student is not None:
            blocks = [quoted(block) for block in (student.caption, student.think, student.answer)]
        lines.append([label(m, i), *blocks, remark(m, i)])
    broken = ""
    if m.broken:
        broken = (
            f"The format of {named(m, *m.broken)} is **broken**: `data.py`: `parse_response` finds "
            f"no three whole blocks."
        )
    return f"""
## The rollouts

A **rollout** is a response that the policy samples: `sampler.py`: `generate`. The {len(m.texts)}
rollouts of one prompt are its **group**. Equal rollouts share a row here. Every mean counts each
of them.

{table(["rollout", "caption", "think", "answer", "remark"], lines)}

{broken}
"""


def the_scores(m) -> str:
    lines = [["supervision response", *(number(m.teacher_scores[view]) for view in VIEWS)]]
    for i in m.rows:
        own = [number(m.scores[view][i]) if i in m.whole else "none" for view in VIEWS]
        lines.append([label(m, i), *own])
    told = []
    for view in VIEWS:
        scores = m.scores[view]
        top, bottom = max(scores[i] for i in m.whole), min(scores[i] for i in m.whole)
        high = [i for i in m.whole if scores[i] == top]
        low = [i for i in m.whole if scores[i] == bottom]
        best, worst = remark(m, high[0], [view]), remark(m, low[0], [view])
        told.append(
            f"- {view.capitalize()}: {named(m, *high)} came highest ({best}), and "
            f"{named(m, *low)} came lowest ({worst})."
        )
    return f"""
## The scores

The discriminator gives each view a score from -10 to 10: (5), `discriminator.py`:
`Discriminator`. Each of its layers has several **experts**, small networks that began as copies of
one: (3), `discriminator.py`: `upcycle`. A router sends each token to two of them: (4),
`discriminator.py`: `SparseMLP`. A broken rollout has no views, so no scores.

{table(["response", *VIEWS], lines)}

{told[0]}

{told[1]}

A view with the supervision response's own text has exactly its score. The discriminator is never
told which answer is right.
"""


def the_reward(m) -> str:
    lines = []
    for i in m.rows:
        values = [m.replaced[view][i] for view in VIEWS]
        values += [m.normalised[view][i] for view in VIEWS]
        lines.append([label(m, i), *map(number, [*values, m.advantage[i]])])
    means = [number(m.replaced[view].mean()) for view in VIEWS]
    stds = [number(m.replaced[view].std()) for view in VIEWS]
    lines += [["mean", *means, "", "", ""], ["standard deviation", *stds, "", "", ""]]
    head = [f"{view} ({equation})" for equation in (9, 10) for view in VIEWS]
    alpha, penalty = f"{m.config.alpha:g}", f"{m.config.format_penalty:g}"

    def extreme(i: int) -> str:
        """The rollouts that share the advantage of one, and its sum (11)."""
        equal = [other for other in m.rows if m.advantage[other] == m.advantage[i]]
        a, b = (number(m.normalised[view][i]) for view in VIEWS)
        rest = f"{1 - m.config.alpha:g} * {b}" + (f" - {penalty}" if i in m.broken else "")
        sum_ = f"`{alpha} * {a} + {rest} = {number(m.advantage[i])}`"
        return f"{named(m, *equal)} ({remark(m, i)}): {sum_}"

    told = ""
    if m.broken:
        lowest = min(m.scores["perception"][i] for i in m.whole)
        filled = number(m.replaced["perception"][m.broken[0]])
        told = f"For {named(m, *m.broken)} and perception: `{number(lowest)} - 1 = {filled}`."
    betas = [f"{getattr(m.config, f'length_beta_{view}'):g} for {view}" for view in VIEWS]
    return f"""
## The policy's reward

Scores become advantages in three moves:

- (9), `align.py`: `fill_invalid`: a broken rollout gets the lowest score of its group, less 1.
{told}

- (10), `policy_gradient.py`: `group_advantage`: each score, less the group's mean, is divided by
the group's standard deviation. So only its distance from the group's mean
counts.

- (11), `align.py`: `alignment_advantage`: perception times alpha = {alpha}, plus reasoning times
1 - alpha, less {penalty} where the format is broken.

{table(["rollout", *head, "advantage (11)"], lines)}

- Highest advantage, {extreme(m.high)}

- Lowest advantage, {extreme(m.low)}

Before (9), `align.py`: `debias` can take a cost of length from the scores (12). The weight of
that cost is {" and ".join(betas)} here.
"""


def the_policys_loss(m) -> str:
    lines = []
    for i in m.rows:
        values = [number(m.advantage[i]), str(m.lengths[i])]
        lines.append([label(m, i), *values, number(m.logp[i]), number(m.logp_after[i])])
    moved = [
        f"{named(m, i)} from {number(m.logp[i])} to {number(m.logp_after[i])}"
        for i in (m.high, m.low)
    ]
    against = [i for i in m.rows if (m.logp_after[i] - m.logp[i]) * m.advantage[i] < 0]
    told = ""
    if against:
        largest = number(max(abs(m.advantage[i]) for i in against))
        told = (
            f"{named(m, *against).capitalize()} moved against the sign of A, which for them is at "
            f"most {largest} in size. "
        )
    return f"""
## The policy's loss

The ratio (14), `policy_gradient.py`: `importance_ratio`, tells how much likelier a token has become
since it was sampled. It is 1, as nothing has been learned since. So the clip (15),
`policy_gradient.py`: `policy_loss`, does not act, and every token of a rollout has the loss -A,
where A is its advantage. (16), `policy_gradient.py`: `aggregate`, averages over all tokens of the
batch. Over this prompt's rollouts alone, with T tokens in each, the average is:

`loss = -sum(A * T) / sum(T) = {number(m.policy_loss, 4)}`

What counts is the gradient. Let log pi be the sum of a rollout's token log-probabilities
(`model.py`: `token_logprobs`). The gradient raises it where A is positive, and lowers it where A is
negative.

{table(["rollout", "A", "T", "log pi before the step", "log pi after it"], lines)}

The step moved log pi of {" and ".join(moved)}. {told}A step learns from
{m.config.prompts_per_step} prompts at once, and all of them change the same weights.
"""


def the_discriminators_loss(m) -> str:
    lines, means = [], dict.fromkeys(VIEWS, 0.0)
    for i in m.whole:
        line = [label(m, i)]
        for view in VIEWS:
            teacher, student = m.teacher_scores[view], m.scores[view][i]
            loss = pair_loss(torch.tensor(teacher), torch.tensor(student)).item()
            means[view] += loss * len(m.rows[i]) / m.pairs
            line += [number(teacher - student), number(loss)]
        lines.append(line)
    last = ["mean"]
    for view in VIEWS:
        last += [number(mean_gap(m.judged, view)), number(means[view])]
    lines.append(last)
    # The terms of (7), from the scores of all pairs (U, 4).
    sides = [getattr(m.judged, side + view)[0] for side in ("teacher_", "") for view in VIEWS]
    scores = torch.stack(sides, 1)[m.judged.valid[0]]
    pair = pair_loss(scores[:, :2], scores[:, 2:], m.pairs).item()
    penalty = discriminator_loss(scores, m.pairs, m.config.score_l2).item() - pair
    terms = [
        ["pair loss (6): the sum of the two means", number(pair, 4)],
        [f"{m.config.score_l2:g} * the mean of the squared scores", number(penalty, 4)],
    ]
    told, balance = "", m.judged.metrics.get("balance_loss")
    if balance:
        weight = m.config.router_aux_loss_coef
        terms.append([f"{weight:g} * balance loss (8)", number(weight * balance.value, 4)])
        told = (
            f"The balance loss (8), `discriminator.py`: `balance_loss`, keeps the router from "
            f"sending all tokens to the same experts. It is {number(balance.value)} here. It "
            f"would be 2 if every expert got as many tokens as the others. "
        )
    terms.append(["loss (7)", number(m.judged.metrics["discriminator_loss"].value, 4)])
    gaps = [[number(mean_gap(judged, v)) for judged in (m.judged, m.judged_after)] for v in VIEWS]
    moved = [f"in {view} from {a} to {b}" for view, (a, b) in zip(VIEWS, gaps)]
    return f"""
## The discriminator's loss

The supervision response and a rollout whose format is not broken are a pair. The pair loss (6),
`discriminator.py`: `pair_loss`, of the gap between their scores is `-log sigmoid(gap)`. A gap of 0
costs log 2 = 0.693, a wide gap next to nothing. Equal texts have a gap of 0 whatever the
discriminator learns.

{table(["rollout", "perception gap", "its loss", "reasoning gap", "its loss"], lines)}

The loss (7), `discriminator.py`: `discriminator_loss`, adds two small terms:

{table(["term", "value"], terms)}

{told}In training a dropout stands before the scores of this loss. This page computes the scores
without it.

The step moved the mean gap of these pairs {" and ".join(moved)}.
"""


def page(m) -> str:
    """The page in Markdown, paragraphs wrapped."""
    sections = the_prompt, the_rollouts, the_scores, the_reward, the_policys_loss
    text = "".join(section(m) for section in (*sections, the_discriminators_loss))
    out = []
    for part in filter(None, (part.strip() for part in text.split("\n\n"))):
        indent = "  " if part.startswith("- ") else ""
        if part[0] not in "|#":
            part = textwrap.fill(
                part, 120, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
            )
        out.append(part)
    return "\n\n".join(out) + "\n"


def picture(example, path: Path) -> None:
    """The row's first image as a PNG of about 400 pixels."""
    image = open_image(example.images[0])
    scale = 400 / max(image.size)
    if scale > 1:
        scale = int(scale)  # whole pixels stay sharp
    size = [max(1, round(side * scale)) for side in image.size]
    image.resize(size, Image.NEAREST if scale >= 1 else Image.LANCZOS).save(path, optimize=True)


def main(run: str, folder: str) -> None:
    """Writes the page of a run, and its picture, into a folder."""
    with tempfile.TemporaryDirectory() as played:
        measured = measure(Path(run), played)
    Path(folder).mkdir(parents=True, exist_ok=True)
    if measured.example.images:
        picture(measured.example, Path(folder) / "one-step.png")
    (Path(folder) / "one-step.md").write_text(page(measured))
    print(f"written to {folder}/one-step.md")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="One prompt of an alignment, with all numbers.")
    parser.add_argument("run", help="the directory of an alignment, such as out/demo/align")
    parser.add_argument("folder", nargs="?", default=str(HERE), help="where the page is written")
    try:
        main(**vars(parser.parse_args()))
    except (UserError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
