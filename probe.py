"""The probe: is the discriminator blind? A blind one scores wording alone, whatever the picture,
the question and the facts. It is probed on rows that it has not learned from.

A supervision response y+ is compared with itself, one thing changed by a rule:

    perception    picture     D(picture, question, y+)  >  D(other picture, question, y+)
                  digit       D(x, y+)  >  D(x, y+ with one digit of its caption replaced)
    reasoning     question    D(picture, question, y+)  >  D(picture, other question, y+)
                  answer      D(x, y+)  >  D(x, y+ with another answer behind its reasoning)

A probe measures the share of comparisons in which each of these holds. Ties count half, so 0.5 is
blind. The pair accuracy does not tell: it is 1 for a blind discriminator that has learned in which
words students differ from supervision.

Rows stand in twos, as partners, and each takes the other's picture, question and answer. A score
may prefer one of two pictures, whatever is said of it. That helps one partner and harms the other,
so where both count, such a score gets exactly 0.5. The same holds for questions and answers.
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

TRIALS = 48  # over all ranks; a share of so many is known to about 0.07
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
        """The scores of all responses under these prompts. Two calls differ in the prompts only, so
        what a discriminator does not read of a prompt moves no bit of a score."""
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
    found = {}
    for kind, (right, wrong) in right_and_wrong.items():
        changed = torch.tensor([trial.has(kind) for trial in trials], dtype=torch.bool)
        won = (right > wrong) + 0.5 * (right == wrong)
        found[f"probe_{kind}"] = Mean(won[changed].sum(), changed.sum())
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
    """This rank's share of TRIALS trials on `rows`, the same trials on any number of ranks. Where
    rows are few, they are shuffled and paired again until there are enough trials. Left out are
    rows that cannot be read, rows whose `where` is in `learned`, and prompts of more than `longest`
    tokens."""
    shuffler, twos = random.Random(0), []
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
            trial = make_trial(row, partner, processor, rng, longest, max_image_size)
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


def make_trial(row: Example, partner: Example, processor, rng, longest, size) -> Trial | None:
    """The trial of one row, or None where its prompt cannot be used."""
    chats = {"prompt": row}
    if len(row.images) == len(partner.images):
        if row.images != partner.images:
            chats["other_picture"] = replace(row, images=partner.images)
        if row.messages != partner.messages:
            chats["other_question"] = replace(row, messages=partner.messages)
    prompts = {}
    for name, prompt in zip(chats, encode_prompts(processor, list(chats.values()), size)):
        if isinstance(prompt, Prompt) and len(prompt.input_ids) <= longest:
            prompts[name] = prompt
    own = prompts.get("prompt")
    if own is None:
        return None
    response, other = parse_response(row.response), parse_response(partner.response)
    return Trial(
        prompt=own,
        response=response,
        changed=replace(response, caption=change_digit(response.caption, rng), answer=other.answer),
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
    """Trials on rows from which the discriminator of a game (`align.AlignConfig`) does not learn.
    Where `config.discriminator` is the directory of a warm-up, these are the rows that it held out;
    otherwise the rows of the game's data that this run will not reach. [] where there are none."""
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
        if not all(map(at_hand, warm_up["data"])):
            return []  # nothing is fetched for a probe
        pairs = load_data(
            warm_up["data"],
            need=("response",),
            system_prompt=warm_up["system_prompt"],
            image_dir=warm_up["image_dir"],
        )
        _, rows = hold_out(pairs, warm_up["validation_share"], warm_up["seed"])
    except (KeyError, UserError):  # what the warm-up learned from cannot be told
        return []
    return draw_trials(
        rows,
        processor,
        longest=warm_up["max_length"],
        max_image_size=warm_up["max_image_size"],
        learned={examples.where(number) for number in order[:reached]},
    )
