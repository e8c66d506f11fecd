"""The probe: is the discriminator blind? A blind one scores wording alone, whatever the picture,
the question and the facts. It is probed on rows that it has not learned from.

A supervision response y+ is compared with itself, one thing changed by a rule:

    perception    picture     D(picture, question, y+)  >  D(other picture, question, y+)
                  digit       D(x, y+)  >  D(x, y+ with one digit of its caption replaced)
    reasoning     question    D(picture, question, y+)  >  D(picture, other question, y+)
                  answer      D(x, y+)  >  D(x, y+ with another answer behind its reasoning)

A probe measures the share of comparisons in which each of these holds. Ties count half, so 0.5 is
blind. The pair accuracy does not show blindness: it is 1 for a blind discriminator that has learned
in which words students differ from supervision.

Rows stand in twos, as partners, and each takes the other's picture, question and answer. A score
that likes one of two pictures better, whatever the caption says, is no proof of sight. Such a score
wins for one partner and loses for the other: exactly 0.5 over the two, where both are measured. The
same holds for questions and answers.
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
from support.rows import Example, at_hand, load_data

TRIALS = 48  # over all ranks; the standard error of a share of 48 is at most 0.07
KINDS = ("picture", "digit", "question", "answer")


@dataclass
class Trial:
    """A row and what is changed in it. What cannot be changed stays as it is and does not count."""

    prompt: Prompt
    response: Response  # y+
    changed: Response  # y+ with another digit in its caption and another answer
    other_picture: Prompt
    other_question: Prompt

    def has(self, kind: str) -> bool:
        """Whether something is changed in this way."""
        return {
            "picture": self.other_picture is not self.prompt,
            "digit": self.changed.caption != self.response.caption,
            "question": self.other_question is not self.prompt,
            "answer": self.changed.answer != self.response.answer,
        }[kind]


def probe(judge: Callable, discriminator, trials: list[Trial], processor, max_tokens: int) -> dict:
    """-> {`probe_<kind>`: Mean}, for the log. `judge` is discriminator.judge, an argument because
    discriminator.py itself imports this file. Every rank calls `probe` with its own trials."""

    def judged(prompts: list[Prompt]):
        """The scores of all responses under these prompts. Two calls differ in the prompts only. So
        a discriminator that does not read what differs gives the same scores to the last bit."""
        comparisons = []
        for prompt, trial in zip(prompts, trials):
            comparisons.append(Comparison(prompt, trial.response, [trial.changed]))
        return judge(discriminator, comparisons, processor, max_tokens, backward=False)

    training = discriminator.training
    discriminator.eval()
    own = judged([trial.prompt for trial in trials])
    other_picture = judged([trial.other_picture for trial in trials])
    other_question = judged([trial.other_question for trial in trials])
    discriminator.train(training)

    # The caption is all of the perception view, think and answer are the reasoning view.
    right_and_wrong = {
        "picture": (own.teacher_perception, other_picture.teacher_perception),
        "digit": (own.teacher_perception, own.perception),
        "question": (own.teacher_reasoning, other_question.teacher_reasoning),
        "answer": (own.teacher_reasoning, own.reasoning),
    }
    metrics = {}
    for kind, (right, wrong) in right_and_wrong.items():
        changed = torch.tensor([trial.has(kind) for trial in trials], dtype=torch.bool)
        won = (right > wrong) + 0.5 * (right == wrong)
        metrics[f"probe_{kind}"] = Mean(won[changed].sum(), changed.sum())
    return metrics


def in_words(line: dict) -> str:
    """A line of the log as a line for the user."""
    found = [line[f"probe_{kind}"] for kind in KINDS]
    if found == [None] * len(found):
        return "no probe: it needs two usable rows that the discriminator does not learn from"
    picture, digit, question, answer = ("not measured" if x is None else f"{x:.2f}" for x in found)
    return (
        f"probe, comparisons won by the unchanged supervision (0.5 is blind): "
        f"perception {picture} against another picture, "
        f"{digit} against another digit; reasoning {question} against another question, {answer} "
        f"against another answer"
    )


# --------------------------------------------------------------------------------------------------
# Trials


def draw_trials(
    rows: Sequence, processor, limit: int, max_image_size: int | None = None, learned=frozenset()
) -> list[Trial]:
    """This rank's share of TRIALS trials on `rows`, the same trials on any number of ranks. Where
    rows are few, they are shuffled and paired again until there are enough trials. A row is
    left out if it cannot be read, if its response is not of the format, or if its `where` is in
    `learned`. So are prompts that cannot be encoded or have more than `limit` tokens."""
    shuffler = random.Random(0)
    twos = []  # (row, its partner)
    usable = first_usable(rows, learned)
    while len(usable) > 1 and len(twos) < TRIALS // 2:
        shuffler.shuffle(usable)
        # Partners exchange their pictures, so they should have equally many.
        usable.sort(key=lambda row: len(row.images))
        twos += zip(usable[::2], usable[1::2])
    trials = []
    for number in range(rank(), min(len(twos), TRIALS // 2), world_size()):
        rng = random.Random(number)
        one, other = twos[number]
        for row, partner in ((one, other), (other, one)):
            trial = make_trial(row, partner, processor, rng, limit, max_image_size)
            if trial is not None:
                trials.append(trial)
    return trials


def first_usable(rows: Sequence, learned) -> list[Example]:
    """The first rows, TRIALS at most, that can be read, have a supervision response of whole format
    and have not been learned from."""
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


def make_trial(
    row: Example, partner: Example, processor, rng, limit: int, max_image_size: int | None
) -> Trial | None:
    """The trial of one row, or None where its prompt cannot be used."""
    # The row as it is, with its partner's picture, and with its partner's question.
    variants = {"prompt": row}
    if len(row.images) == len(partner.images):
        if row.images != partner.images:
            variants["other_picture"] = replace(row, images=partner.images)
        if row.messages != partner.messages:
            variants["other_question"] = replace(row, messages=partner.messages)
    # A variant that cannot be encoded, or is too long, is left out of the trial.
    prompts = {}
    encoded = encode_prompts(processor, list(variants.values()), max_image_size)
    for name, prompt in zip(variants, encoded):
        if isinstance(prompt, Prompt) and len(prompt.input_ids) <= limit:
            prompts[name] = prompt
    own = prompts.get("prompt")
    if own is None:
        return None
    # The response as it is, and with another digit in its caption and its partner's answer.
    response = parse_response(row.response)
    other_caption = change_digit(response.caption, rng)
    other_answer = parse_response(partner.response).answer
    return Trial(
        prompt=own,
        response=response,
        changed=replace(response, caption=other_caption, answer=other_answer),
        other_picture=prompts.get("other_picture", own),
        other_question=prompts.get("other_question", own),
    )


def change_digit(text: str, rng: random.Random) -> str:
    """The text with one of its digits, where it has any, replaced by another digit."""
    places = [i for i, character in enumerate(text) if character in string.digits]
    if not places:
        return text
    at = rng.choice(places)
    digit = rng.choice(string.digits.replace(text[at], ""))
    return text[:at] + digit + text[at + 1 :]


def trials_beside_the_game(config, examples, processor) -> list[Trial]:
    """Trials on rows from which the discriminator of a game does not learn. `config` is the game's
    (`align.AlignConfig`), `examples` its rows. Where `config.discriminator` is the directory of a
    warm-up, the trials are on rows that the warm-up held out. Otherwise they are on the rows of the
    game that this run will not reach; what that discriminator learned from before is not known. []
    where there are none."""
    # The game takes its rows in this order, as far as `reached`.
    count = len(examples)
    order = epoch_rows(start=0, end=count, rows=count, seed=config.seed)
    reached = min(config.max_steps * config.prompts_per_step, count)
    # The flags of the warm-up, from its directory.
    try:
        with open(os.path.join(config.discriminator, "run.json")) as file:
            record = json.load(file)
        flags = record["run"] if record["stage"] == "discriminator" else None
    except (OSError, ValueError, KeyError, TypeError):
        flags = None
    if flags is None:
        rows = torch.utils.data.Subset(examples, order[reached:])
        return draw_trials(rows, processor, config.max_prompt_length)
    # The rows that the warm-up held out, less those that the game reaches.
    try:
        if not all(map(at_hand, flags["data"])):
            return []  # nothing is fetched for a probe
        pairs = load_data(
            flags["data"],
            need=("response",),
            system_prompt=flags["system_prompt"],
            image_dir=flags["image_dir"],
        )
        _, rows = hold_out(pairs, flags["validation_share"], flags["seed"])
    except (KeyError, UserError):  # what the warm-up learned from cannot be told
        return []
    return draw_trials(
        rows,
        processor,
        limit=flags["max_length"],
        max_image_size=flags["max_image_size"],
        learned={examples.where(number) for number in order[:reached]},
    )
