"""The probe: is the discriminator blind? It is asked on rows that it has not learned from.

A supervision response y+ is compared with itself, one thing changed by a rule:

    perception    picture     D(picture, question, y+)  >  D(other picture, question, y+)
                  digit       D(x, y+)  >  D(x, y+ with one digit of its caption replaced)
    reasoning     question    D(picture, question, y+)  >  D(picture, other question, y+)
                  answer      D(x, y+)  >  D(x, y+ with another answer behind its reasoning)

A probe measures the share of comparisons in which each of these holds. Ties count half, so 0.5 is
blind. The pair accuracy does not tell: it is 1 for a blind discriminator that has learned in which
words students differ from supervision.

Rows stand in twos, partners, and each takes the other's picture, question and answer. A score may
prefer one of two pictures, whatever is said of it. That helps one partner and harms the other, so
such a score gets exactly 0.5. The same holds for questions and answers.
"""

import json
import os
import random
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from data import Comparison, Prompt, Response, encode_prompts, parse_response
from support.errors import RowError, UserError
from support.loader import epoch_rows, hold_out
from support.metrics import Mean
from support.ranks import rank, world_size
from support.rows import Example, load_data

TRIALS = 64  # over all ranks; a share of so many is known to about 0.06
KINDS = ("picture", "digit", "question", "answer")


@dataclass
class Trial:
    """A row and what is changed in it; None where a row cannot be changed so."""

    prompt: Prompt
    response: Response  # y+
    other_picture: Prompt | None  # the question with its partner's picture
    other_digit: Response | None
    other_question: Prompt | None  # the picture with its partner's question
    other_answer: Response | None


def probe(judge: Callable, discriminator, trials: list[Trial], processor, max_tokens: int) -> dict:
    """-> `probe_<kind>` -> Mean, for the log. `judge` is discriminator.judge, which is given since
    the warm-up, in the same file, ends with a probe. Every rank calls it with its own trials."""

    def scores(name: str):
        """All responses under the prompts of one name, or under their own where there is none.
        Only the prompts differ, so what a discriminator does not read of them moves no bit."""
        comparisons = []
        for trial in trials:
            students = [trial.response, trial.other_digit, trial.other_answer]
            prompt = getattr(trial, name) or trial.prompt
            comparisons.append(Comparison(prompt, trial.response, students))
        return judge(discriminator, comparisons, processor, max_tokens, backward=False)

    training = discriminator.training
    discriminator.eval()
    own, moved, asked = map(scores, ("prompt", "other_picture", "other_question"))
    discriminator.train(training)

    shape = len(trials), 3  # students, also where a rank has no trials
    perception, reasoning = own.perception.view(shape), own.reasoning.view(shape)
    right_wrong = {
        "picture": (perception[:, 0], moved.perception.view(shape)[:, 0]),
        "digit": (perception[:, 0], perception[:, 1]),
        "question": (reasoning[:, 0], asked.reasoning.view(shape)[:, 0]),
        "answer": (reasoning[:, 0], reasoning[:, 2]),
    }
    found = {}
    for kind, (right, wrong) in right_wrong.items():
        there = [getattr(trial, f"other_{kind}") is not None for trial in trials]
        there = torch.tensor(there, dtype=torch.bool)
        won = (right > wrong) + 0.5 * (right == wrong)
        found[f"probe_{kind}"] = Mean(won[there].sum(), there.sum())
    return found


def in_words(line: dict) -> str:
    """A line of the log as a line for the user."""
    values = (line[f"probe_{kind}"] for kind in KINDS)
    shown = ["not measured" if value is None else f"{value:.2f}" for value in values]
    picture, digit, question, answer = shown
    return (
        f"probe, 0.5 is blind: perception {picture} (another picture), {digit} (another digit); "
        f"reasoning {question} (another question), {answer} (another answer)"
    )


# --------------------------------------------------------------------------------------------------
# Trials


def draw_trials(
    rows: Sequence, processor, longest: int, max_image_size: int | None = None, learned=frozenset()
) -> list[Trial]:
    """This rank's share of TRIALS trials on `rows`, the same trials on any number of ranks. Of few
    rows each comes several times, with other partners. Left out are rows that cannot be read, rows
    named in `learned`, and prompts of more than `longest` tokens."""
    rng, twos = random.Random(0), []
    usable = first_usable(rows, learned)
    while len(usable) > 1 and len(twos) < TRIALS // 2:
        rng.shuffle(usable)
        usable.sort(key=lambda row: len(row.images))  # partners exchange their pictures
        twos += zip(usable[::2], usable[1::2])
    trials = []
    for number in range(rank(), min(len(twos), TRIALS // 2), world_size()):
        rng = random.Random(number)
        for row, partner in (twos[number], twos[number][::-1]):
            trial = make_trial(row, partner, processor, rng, longest, max_image_size)
            trials += [trial] if trial else []
    return trials


def first_usable(rows: Sequence, learned) -> list[Example]:
    found = []
    for number in range(len(rows)):
        try:
            row = rows[number]
        except RowError:
            continue
        if row.where not in learned and parse_response(row.response):
            found.append(row)
        if len(found) == TRIALS:
            break
    return found


def make_trial(row: Example, partner: Example, processor, rng, longest, size) -> Trial | None:
    """The trial of one row, or None where its prompt cannot be used."""
    chats = {"prompt": row}
    if len(row.images) == len(partner.images):
        if row.images != partner.images:
            chats["other_picture"] = replace(row, images=partner.images)
        if row.messages != partner.messages:
            chats["other_question"] = replace(row, messages=partner.messages)
    prompts = dict.fromkeys(("prompt", "other_picture", "other_question"))
    for name, prompt in zip(chats, encode_prompts(processor, list(chats.values()), size)):
        if isinstance(prompt, Prompt) and len(prompt.input_ids) <= longest:
            prompts[name] = prompt
    if prompts["prompt"] is None:
        return None
    response, answer = parse_response(row.response), parse_response(partner.response).answer
    return Trial(
        **prompts,
        response=response,
        other_digit=replace_digit(response, rng),
        other_answer=replace(response, answer=answer) if answer != response.answer else None,
    )


def replace_digit(response: Response, rng) -> Response | None:
    """The response with one digit of its caption replaced by another; None where it has none."""
    caption = response.caption
    places = [i for i, character in enumerate(caption) if character in string.digits]
    if not places:
        return None
    at = rng.choice(places)
    digit = rng.choice(string.digits.replace(caption[at], ""))
    return replace(response, caption=caption[:at] + digit + caption[at + 1 :])


def trials_beside_the_game(config, examples, processor) -> list[Trial]:
    """Trials on rows from which the discriminator of a game (`align.AlignConfig`) does not learn:
    the rows that its warm-up held out, where the warm-up's directory is at hand; otherwise the rows
    of the game's own data that this run will not reach. None, where there are no such rows."""
    count = len(examples)
    order = epoch_rows(0, count, count, config.seed)
    reached = min(config.max_steps * config.prompts_per_step, count)
    try:
        with open(os.path.join(config.discriminator, "run.json")) as file:
            record = json.load(file)
        warm_up = record["run"] if record["stage"] == "discriminator" else None
    except (OSError, ValueError, KeyError, TypeError):
        warm_up = None
    if warm_up is None:
        rows = torch.utils.data.Subset(examples, order[reached:])
        return draw_trials(rows, processor, config.max_prompt_length)
    try:
        source = warm_up["data"], ("response",), warm_up["system_prompt"], warm_up["image_dir"]
        _, rows = hold_out(load_data(*source), warm_up["validation_share"], warm_up["seed"])
    except (KeyError, UserError):  # what it learned from cannot be told
        return []
    learned = {examples.where(number) for number in order[:reached]}
    limits = warm_up["max_length"], warm_up["max_image_size"]
    return draw_trials(rows, processor, *limits, learned)
