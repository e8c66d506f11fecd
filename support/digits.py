"""The embedded world: a tiny Qwen3-VL and a task on real handwritten digits, so that every stage
runs anywhere.

The task: a noisy image of a few digits side by side and a question about them (their sum, their
spread, a count). A right answer needs right perception (the caption names the digits) and right
reasoning (the think block works in single steps). Either can fail alone: these are the two views
of PRISM. The digits are scikit-learn's 8 x 8 scans of handwriting, split by scan: no scan seen in
training returns in validation or test.

The base answers in words of its own, knows no tags, and misreads some digits systematically. The
demonstrations, all in the tagged format and in one wording, come in the two kinds that the paper
mixes: a few curated ones are exact; the public ones misread other digits systematically, reason on
from the misreading, and slip in the arithmetic. Systematic misreading is the point: independent
noise hardly moves what a model decodes, a habit does. The alignment has a twentieth as many
supervision responses as there are curated demonstrations, RLVR has prompts of its own with nothing
but their answers.

Nothing is downloaded. support/tiny.py makes the model and its tokenizer, from the world's own text.
What lies where, under `out`:

    init/               the model with random weights, a complete Hugging Face directory
    base/               the same, pretrained on pretrain.jsonl by sft.py
    images/*.png        one per row; rows name them relative to their own file

    pretrain.jsonl      responses in the base's own words, many
    prompts.jsonl       for the alignment; `response` is the supervision y+
    questions.jsonl     for RLVR, without a response
    validation.jsonl, test.jsonl
                        for evaluation, without a response
                        Fields of these five files: question, answer, image, system, caption (the
                        accepted texts), source (the kind of question)

    public.jsonl, curated.jsonl, sft.jsonl
                        the demonstrations, and both mixed: messages, images, source, kind

    python -m support.digits [--out out/digits] [--misread_rate 0.9 ...]    builds it
"""

import contextlib
import fcntl
import json
import os
import random
import shutil
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from PIL import Image
from transformers import HfArgumentParser

from support.errors import UserError
from support.fields import Count, Natural, NonNegative, Seed, Share, check_ranges, comments_of
from support.resuming import UNSUPPORTED
from support.tiny import Shape, build_model, train_tokenizer


# (digit, what a careless reader takes it for), the likeliest first
CONFUSIONS = ((3, 8), (7, 1), (9, 4), (5, 6), (8, 0), (2, 7), (4, 9), (0, 6), (6, 5), (1, 7))
Misread = Annotated[int, 0, len(CONFUSIONS)]


@dataclass
class World(Shape):
    seed: Seed = 0  # seed of all that is drawn at random
    # The task, with questions for a sum, a spread or a count
    digits: Count = 4  # digits in an image
    noise: NonNegative = 0.15  # standard deviation of the noise on a scan's pixels; ink is 1
    kinds: list[str] = field(default_factory=lambda: list(QUESTIONS))  # kinds of question, evenly
    # Rows of each set
    pretrain_rows: Natural = 6000  # rows on which the base is pretrained
    sft_rows: Natural = 6000  # demonstrations for SFT, public and curated
    curated_share: Share = 0.08  # share of them that is curated; paper: 113K of 1.37M
    prompt_rows: Natural = 24  # rows with supervision, for the alignment; paper: 5.9K
    question_rows: Natural = 2000  # rows for RLVR; paper: 2K
    validation_rows: Natural = 500  # rows on validation scans, to choose settings on
    test_rows: Natural = 1000  # rows on test scans, for results
    # Digit scans (1797 in all): what is neither train nor validation is test
    train_share: Share = 0.7  # share of the scans that train
    validation_share: Share = 0.1  # share of the scans that validate
    # What is wrong with the public demonstrations, and with what the base learned from
    misread_digits: Misread = 3  # public rows misread the first so many of CONFUSIONS (digits.py)
    misread_rate: Share = 0.9  # how often public rows misread one of these
    base_misread_digits: Misread = 2  # the base misreads the last so many of CONFUSIONS (digits.py)
    base_misread_rate: Share = 0.6  # how often the base misreads one of these
    slip_rate: Share = 0.3  # how often a public demonstration's last step is off by one
    # For benchmarks/judge_study.py: supervision that is hard to imitate, RL that covers less
    answer_first: Share = 0.0  # share of demonstrations that state the answer before the steps
    question_kinds: list[str] = field(default_factory=list)  # kinds that RLVR asks; none given: all
    question_without: list[int] = field(default_factory=list)  # digits that RLVR never shows
    scans_seed: Seed | None = None  # seed that splits the scans; none: --seed


# What suits this world's own model on its own data, in place of the published values.
SETTINGS: dict[str, dict] = {
    "pretrain": dict(max_steps=800, learning_rate=4e-3, per_device_train_batch_size=32),
    "sft": dict(max_steps=376, learning_rate=3e-3, per_device_train_batch_size=32),
    "discriminator": dict(
        max_steps=60,
        learning_rate=3e-4,
        per_device_train_batch_size=32,
        gradient_accumulation_steps=1,
        max_completion_length=96,
    ),
    "align": dict(
        max_steps=80,
        learning_rate=1e-4,
        discriminator_learning_rate=3e-4,
        prompts_per_step=16,
        num_generations=8,
        max_completion_length=96,
    ),
    "rlvr": dict(
        max_steps=150,
        learning_rate=1e-4,
        warmup_steps=0.05,
        weight_decay=0.01,
        prompts_per_step=16,
        num_generations=8,
        max_completion_length=96,
        overlong_buffer=32,
    ),
    "more_sft": dict(  # the study's control: the alignment's own responses, learned by SFT
        max_steps=40,
        learning_rate=1e-4,
        lr_scheduler_type="constant",
        per_device_train_batch_size=16,
    ),
    "eval": dict(
        untagged=r"(?P<caption>I see .*?\.) (?P<think>.*) The answer is (?P<answer>\w+)\.",
        max_completion_length=96,
        per_device_eval_batch_size=200,
    ),
}
# The data of each stage.
SPLITS = {
    "sft": "sft",
    "discriminator": "curated",
    "align": "prompts",
    "rlvr": "questions",
    "eval": "test",
}
SYSTEM = "Reply in three blocks: <caption>, <think>, <answer>."
QUESTIONS = {
    "sum": (
        "What is the sum of the digits?",
        "Add up the digits.",
        "What do the digits add up to?",
    ),
    "spread": (
        "What is the largest digit minus the smallest?",
        "How far apart are the largest and smallest digits?",
    ),
    "count": ("How many digits are greater than {}?", "Count the digits greater than {}."),
}


# --------------------------------------------------------------------------------------------------
# The task


def captions(digits: Iterable[int]) -> list[str]:
    """What the image shows, in the wording of the demonstrations and in that of the base."""
    *first, last = map(str, digits)
    return [
        f"From left to right the digits are {', '.join(first)} and {last}.",
        f"I see {' '.join([*first, last])}.",
    ]


def ask(kind: str, rng: random.Random) -> tuple[str, list]:
    """A question and what varies in it: a count's threshold."""
    details = [rng.randint(2, 6)] if kind == "count" else []
    return rng.choice(QUESTIONS[kind]).format(*details), details


def work(kind: str, digits: tuple[int, ...], details: list, slip: int = 0) -> tuple[str, str]:
    """(the steps, the answer). A slip of +1 or -1 enters at the last step."""
    if kind == "spread":
        largest, smallest = max(digits), min(digits)
        answer = str(abs(largest - smallest + slip))
        steps = f"The largest is {largest}, the smallest is {smallest}."
        return f"{steps} {largest} - {smallest} = {answer}.", answer
    if kind == "count":
        counted = [digit > details[0] for digit in digits]
        counted[-1] ^= slip != 0
        steps = ", ".join(
            f"{digit} {'yes' if yes else 'no'}" for digit, yes in zip(digits, counted)
        )
        return f"{steps}.", str(sum(counted))
    totals = list(accumulate(digits))
    totals[-1] = abs(totals[-1] + slip)
    steps = ", ".join(
        f"{before} + {digit} = {after}"
        for before, digit, after in zip(totals, digits[1:], totals[1:])
    )
    return f"{steps}.", str(totals[-1])


def misread(
    digits: tuple[int, ...], confusions: Iterable[tuple[int, int]], rate: float, rng: random.Random
) -> tuple[int, ...]:
    """The digits as somebody reads them who confuses some of them, at a rate."""
    look_alike = dict(confusions)
    return tuple(look_alike.get(d, d) if rng.random() < rate else d for d in digits)


def own_words(kind: str, digits: tuple[int, ...], details: list) -> str:
    """A response as the base gives it."""
    steps, answer = work(kind, digits, details)
    for sign, word in (("+", "plus"), ("-", "minus"), ("=", "is")):
        steps = steps.replace(f" {sign} ", f" {word} ")
    return f"{captions(digits)[1]} {steps} The answer is {answer}."


def demonstration(kind, digits: tuple[int, ...], details: list, slip: int = 0, first=False) -> str:
    """A response in the format, exact unless there is a slip. With `first` the answer stands before
    the steps."""
    steps, answer = work(kind, digits, details, slip)
    think = f"The answer is {answer}. {steps}" if first else f"{steps} So the answer is {answer}."
    caption = captions(digits)[0]
    return f"<caption>{caption}</caption>\n<think>{think}</think>\n<answer>{answer}</answer>"


def base_response(kind, digits, details, world: World, rng: random.Random) -> str:
    """What the base is pretrained on: its own words, some digits misread, no slips."""
    confusions = CONFUSIONS[len(CONFUSIONS) - world.base_misread_digits :]
    return own_words(kind, misread(digits, confusions, world.base_misread_rate, rng), details)


def public_response(kind, digits, details, world: World, rng: random.Random, first=False) -> str:
    """A public demonstration. The reasoning goes on from what was misread."""
    read = misread(digits, CONFUSIONS[: world.misread_digits], world.misread_rate, rng)
    slip = rng.choice((-1, 1)) if rng.random() < world.slip_rate else 0
    return demonstration(kind, read, details, slip, first)


# --------------------------------------------------------------------------------------------------
# The data


def scans_of_digits():
    # Slow to import, and needed only while the world is built.
    from sklearn.datasets import load_digits

    return load_digits()


def split_scans(world: World) -> dict[str, dict[int, list[int]]]:
    """Indices into load_digits: split -> digit -> scans, each digit in the same proportion."""
    labels = scans_of_digits().target
    seed = world.seed if world.scans_seed is None else world.scans_seed
    scans: dict[str, dict[int, list[int]]] = {"train": {}, "validation": {}, "test": {}}
    for digit in range(10):
        indices = np.flatnonzero(labels == digit).tolist()
        random.Random(f"{seed} scans {digit}").shuffle(indices)
        train = round(world.train_share * len(indices))
        validation = train + round(world.validation_share * len(indices))
        scans["train"][digit] = indices[:train]
        scans["validation"][digit] = indices[train:validation]
        scans["test"][digit] = indices[validation:]
    return scans


def draw(
    name: str,
    rows: int,
    scans: dict[int, list[int]],
    world: World,
    root: Path,
    used: set[tuple[int, ...]],
) -> Iterator[tuple[str, str, list, tuple[int, ...], str]]:
    """Writes `rows` pictures, none twice. -> (kind, question, details, digits, path) of each."""
    for digit in range(10):
        if not scans.get(digit):
            more = {
                "validation": "raise --validation_share or lower --train_share",
                "test": "lower --train_share or --validation_share",
            }.get(name, "raise --train_share")
            raise UserError(f"digits: of the scans for {name}.jsonl none shows a {digit}; {more}")
    rng = random.Random(f"{world.seed} {name}")
    pictures = scans_of_digits().images
    asked, hidden = world.kinds, set()
    if name == "questions":
        asked, hidden = world.question_kinds or asked, {*world.question_without}
    kinds = [asked[i % len(asked)] for i in range(rows)]
    rng.shuffle(kinds)
    for i, kind in enumerate(kinds):
        for _ in range(10_000):
            digits = tuple(rng.randrange(10) for _ in range(world.digits))
            picture = tuple(rng.choice(scans[digit]) for digit in digits)
            if picture not in used and hidden.isdisjoint(digits):
                break
        else:
            raise UserError(
                f"digits: there are not {rows} different pictures for {name}; ask for fewer "
                f"rows, or raise --digits"
            )
        used.add(picture)
        path = f"images/{name}_{i:05d}.png"
        pixels = np.hstack([pictures[scan] for scan in picture]) / 16
        pixels += np.random.default_rng(rng.getrandbits(64)).normal(0, world.noise, pixels.shape)
        pixels = (pixels.clip(0, 1) * 255).round().astype(np.uint8)
        Image.fromarray(pixels.repeat(2, axis=0).repeat(2, axis=1)).save(root / path)
        question, details = ask(kind, rng)
        yield kind, question, details, digits, path


def build_data(root: Path, world: World) -> list[str]:
    """Writes images and JSONL files. -> the text on which the tokenizer is trained."""
    (root / "images").mkdir()
    scans, used, texts = split_scans(world), set(), []
    wrong, manner = (random.Random(f"{world.seed} {name}") for name in ("wrong", "manner"))
    first = lambda: manner.random() < world.answer_first

    for name, rows, respond in (
        ("pretrain", world.pretrain_rows, partial(base_response, world=world, rng=wrong)),
        ("prompts", world.prompt_rows, lambda *task: demonstration(*task, first=first())),
        ("questions", world.question_rows, None),
        ("validation", world.validation_rows, None),
        ("test", world.test_rows, None),
    ):
        plain = []
        own_scans = scans.get(name, scans["train"])
        for kind, question, details, digits, path in draw(name, rows, own_scans, world, root, used):
            row = {
                "question": question,
                "answer": work(kind, digits, details)[1],
                "image": path,
                "system": SYSTEM,
                "caption": captions(digits),
                "source": kind,
            }
            if respond:
                row["response"] = respond(kind, digits, details)
            plain.append(row)
        _write_rows(root / f"{name}.jsonl", plain)
        if name == "pretrain":
            texts += [text for row in plain for text in (SYSTEM, row["question"], row["response"])]

    curated_rows = round(world.curated_share * world.sft_rows)
    demonstrations = []
    for name, rows in (("curated", curated_rows), ("public", world.sft_rows - curated_rows)):
        chats = []
        own_scans = scans["train"]
        for kind, question, details, digits, path in draw(name, rows, own_scans, world, root, used):
            if name == "curated":
                response = demonstration(kind, digits, details, first=first())
            else:
                response = public_response(kind, digits, details, world, wrong, first())
            said = {"system": SYSTEM, "user": f"<image>{question}", "assistant": response}
            messages = [{"role": role, "content": text} for role, text in said.items()]
            chats.append({"messages": messages, "images": [path], "source": name, "kind": kind})
            # The public ones have no wording of their own.
            texts += [SYSTEM, question, response] if name == "curated" else []
        _write_rows(root / f"{name}.jsonl", chats)
        demonstrations += chats
    wrong.shuffle(demonstrations)
    _write_rows(root / "sft.jsonl", demonstrations)
    return texts


def _write_rows(path: Path, rows: list[dict]) -> None:
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    path.write_text("".join(lines), encoding="utf-8")


# --------------------------------------------------------------------------------------------------
# The whole


def build(out: str | Path = "out/digits", world: World = World()) -> dict[str, str]:
    """Name -> path of all parts, built unless `out` holds this world already. Many processes may
    call it at once."""
    check_ranges(world)
    out = Path(out)
    names = "pretrain public curated sft prompts questions validation test".split()
    paths = {name: str(out / f"{name}.jsonl") for name in names} | {"init": str(out / "init")}
    if _holds(out, world):
        return paths
    with _alone(out.parent / f".{out.name}.lock"):
        if _holds(out, world):
            return paths
        # Built beside and renamed at the end: `out` is never half made.
        building = out.parent / f".{out.name}.building"
        shutil.rmtree(building, ignore_errors=True)
        building.mkdir()
        tokenizer = train_tokenizer(build_data(building, world), world.merges)
        build_model(building / "init", tokenizer, world, world.seed)
        (building / "world.json").write_text(json.dumps(asdict(world), indent=2) + "\n")
        os.rename(building, out)
    return paths


@contextlib.contextmanager
def _alone(path: Path):
    """One process at a time; the lock goes with the process, so a killed one blocks nobody."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"waiting for a process that builds the digits too ({path})", file=sys.stderr)
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in UNSUPPORTED:
                raise
            print(f"{path}: no locks on this disk; start one process at a time", file=sys.stderr)
        yield


# What a stage of the embedded world starts from, and the command that makes it.
BASE = "python sft.py --model out/digits/init --data digits --output_dir out/digits/base"
MADE_BY = {
    "out/digits/init": "python -m support.digits",
    "out/digits/base": BASE,
    "out/sft": "python sft.py",
    "out/discriminator": "python discriminator.py",
    "out/align": "python align.py",
    "out/rlvr": "python rlvr.py",
}
STARTS = {
    "sft": {"model": "out/digits/base"},
    "discriminator": {"model": "out/digits/base", "policy": "out/sft"},
    "align": {"ckpt": "out/sft", "discriminator": "out/discriminator"},
    "rlvr": {"ckpt": "out/align"},
    "eval": {"ckpt": "out/rlvr"},
}


def settle(config, given: set[str]) -> str:
    """Fills in what a stage was not told: this world's data, models and, for the world's own
    models, settings. `given` are the flags that the user gave. -> a line that says what was taken.
    UserError where a model is missing, with the command that makes it."""
    paths, stage = build(), config.stage
    source = "model" if hasattr(config, "model") else "ckpt"
    own = source not in given or _is_own(getattr(config, source))
    pretrain = stage == "sft" and source in given and _is_own(config.model, "init")
    config.data = [paths["pretrain" if pretrain else SPLITS[stage]]]
    for name, path in STARTS[stage].items():
        if name not in given and (name == source or own):
            if not os.path.exists(os.path.join(path, "config.json")):
                raise UserError(f"{path} is not there yet; make it with: {MADE_BY[path]}")
            setattr(config, name, path)
    if own and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)  # a second thread would not be faster
    small = {"dataloader_num_workers": 0, "max_rollout_rows": 256}  # for rows and a model so small
    settings = SETTINGS["pretrain" if pretrain else stage] | small
    for name, value in settings.items() if own else ():
        if name not in given and hasattr(config, name):
            setattr(config, name, value)
    whose = "the digits' own settings" if own else "the published settings"
    model = f"--{source} {getattr(config, source)}"
    return f"running on the built-in digits: --data {config.data[0]}, {model}, with {whose}"


def _is_own(path: str, name: str = "") -> bool:
    """Whether a directory holds this world's model; with a name, whether it is that directory."""
    config = Path(path) / "config.json"
    own = config.is_file() and "embedded_world" in json.loads(config.read_text())
    return own and name in ("", Path(path).name)


def _holds(out: Path, world: World) -> bool:
    """Whether `out` holds this very world. UserError where it holds something else."""
    if not out.exists() or not any(out.iterdir()):
        return False
    if not (out / "world.json").exists():
        raise UserError(
            f"{out}: the built-in digits go there, but it holds other files; move these away, "
            f"or give the stage --data and a model (to build elsewhere: support.digits --out DIR)"
        )
    # A world that was built before a field was there has that field's default.
    there = asdict(World()) | json.loads((out / "world.json").read_text())
    wanted = asdict(world)
    other = sorted(key for key in there.keys() | wanted.keys() if there.get(key) != wanted.get(key))
    if other:
        raise UserError(
            f"{out} holds digits built with another {', '.join(other)}; remove {out}, or give "
            f"the stage --data and a model (to build elsewhere: support.digits --out DIR)"
        )
    return True


def read_rows(path: str | Path) -> list[dict]:
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def main() -> None:
    about = "Builds the data files of the digits, and an untrained model in init/."
    usage = "python -m support.digits [--flag value ...]"
    parser, comments = HfArgumentParser(World, usage=usage, description=about), comments_of(World)
    parser.add_argument("--out", default="out/digits", help="the directory to build")
    for action in parser._actions:
        action.help = action.help or comments.get(action.dest)
        action.choices = list(QUESTIONS) if action.dest.endswith("kinds") else None
        action.option_strings = action.option_strings[:1]  # --a_b is shown, --a-b works as well
    world, rest, unknown = parser.parse_args_into_dataclasses(return_remaining_strings=True)
    if unknown:
        parser.error(f"{' '.join(unknown)}: no such flag; --help lists them")
    try:
        paths = build(rest.out, world)
    except UserError as error:
        sys.exit(f"error: {error}")
    for name, path in paths.items():
        print(f"{name:12} {path}")
    if rest.out == parser.get_default("out"):
        print(f"next, pretrain the base: {BASE}")


if __name__ == "__main__":
    main()
