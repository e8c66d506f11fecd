"""The embedded world: what its rows say, and what no stage may see of another's."""

import errno
import math
import random
import re
from pathlib import Path

import numpy as np
import pytest

from data import parse_response
from eval import read_response
from support import digits
from support.errors import UserError
from support.verifier import verify
from tests.conftest import WORLD, launch, lines

UNTAGGED = digits.SETTINGS["eval"]["untagged"]


def drawn(kind: str, count: int = 50):
    """Digits, and what varies in a question about them."""
    rng = random.Random(kind)
    for _ in range(count):
        yield tuple(rng.randrange(10) for _ in range(4)), digits.ask(kind, rng)[1]


def truth(kind: str, shown: tuple[int, ...], details: list) -> str:
    return str(
        {
            "sum": lambda: sum(shown),
            "spread": lambda: max(shown) - min(shown),
            "count": lambda: sum(digit > details[0] for digit in shown),
        }[kind]()
    )


@pytest.mark.parametrize("kind", digits.QUESTIONS)
def test_exact_responses_are_right_in_both_wordings(kind):
    """The base's has no tag, and is read by the pattern alone."""
    for shown, details in drawn(kind):
        tagged = digits.demonstration(kind, shown, details)
        plain = digits.own_words(kind, shown, details)
        assert parse_response(plain) is None and read_response(plain, None) is None
        for text, caption in zip((tagged, plain), digits.captions(shown)):
            response = read_response(text, UNTAGGED)
            assert response.caption == caption
            assert verify(response.answer, truth(kind, shown, details))


def test_the_pattern_reads_nothing_that_has_a_tag():
    plain = digits.own_words("sum", (1, 2, 3, 4), [])
    for broken in ("<answer>" + plain, plain + "</think>", plain + " And so on.", plain[:-1]):
        assert read_response(broken, UNTAGGED) is None


def test_public_demonstrations_are_wrong_at_the_rates_and_worded_as_curated_ones():
    world, rng = digits.World(), random.Random(0)
    alike = dict(digits.CONFUSIONS[: world.misread_digits])
    misread = affected = slips = rows = 0
    for shown, details in drawn("sum", 4000):
        response = parse_response(digits.public_response("sum", shown, details, world, rng))
        read = tuple(map(int, re.findall(r"\d", response.caption)))
        assert response.caption == digits.captions(read)[0]
        assert all(a == b or b == alike.get(a) for a, b in zip(shown, read))
        affected += sum(digit in alike for digit in shown)
        misread += sum(a != b for a, b in zip(shown, read))
        off = int(response.answer) - sum(read)
        assert off in (-1, 0, 1)
        slips, rows = slips + (off != 0), rows + 1
        if off == 0:
            assert response == parse_response(digits.demonstration("sum", read, details))
    assert misread / affected == pytest.approx(world.misread_rate, abs=0.03)
    assert slips / rows == pytest.approx(world.slip_rate, abs=0.03)


def test_what_each_set_holds(world):
    """Pictures of each set are its own, those of validation and test of scans of their own."""
    rows = {name: lines(path) for name, path in world.items() if path.endswith(".jsonl")}
    alike = dict(digits.CONFUSIONS[-WORLD["base_misread_digits"] :])
    for name in ("questions", "validation", "test"):
        assert all("response" not in row for row in rows[name])
    for name, fields in (("prompts", "prompt_rows"), ("questions", "question_rows")):
        assert len(rows[name]) == WORLD[fields]
    assert len(rows["sft"]) == len(rows["public"]) + len(rows["curated"]) == WORLD["sft_rows"]
    for row in rows["prompts"]:
        assert verify(parse_response(row["response"]).answer, row["answer"])
    for row in rows["pretrain"]:
        response = read_response(row["response"], UNTAGGED)
        shown, read = (re.findall(r"\d", text) for text in (row["caption"][1], response.caption))
        assert all(a == b or alike[int(a)] == int(b) for a, b in zip(shown, read, strict=True))
        assert shown != read or verify(response.answer, row["answer"])
    plain = ("pretrain", "prompts", "questions", "validation", "test")
    images = [row["image"] for name in plain for row in rows[name]]
    images += [row["images"][0] for row in rows["sft"]]
    assert len(images) == len(set(images))


def test_the_command_builds_this_world_and_names_its_files(world, tmp_path):
    """What it shows is what it built. It trains nothing: there is no base yet."""
    out = tmp_path / "world"
    words = ("-m", "support.digits", "--out", out)
    flags = [word for name, value in WORLD.items() for word in (f"--{name}", value)]
    shown = launch(*words, *flags, real=True).stdout
    for name in ("pretrain.jsonl", "sft.jsonl", "prompts.jsonl", "test.jsonl", "init/config.json"):
        assert (out / name).read_bytes() == (Path(world["init"]).parent / name).read_bytes()
    assert f"prompts      {out}/prompts.jsonl" in shown and not (out / "base").exists()
    assert "next" not in shown  # --data digits names the world of out/digits
    other = launch(*words, *flags, "--noise", 0.5, real=True, check=False)
    said = f"error: {out} holds digits built with another noise; "
    assert other.returncode == 1 and other.stderr.startswith(said)


@pytest.mark.parametrize(
    "flags", [("--kinds", "sums"), ("--question_kinds", "x"), ("--noice", "1")]
)
def test_an_unknown_kind_or_flag_is_refused_by_name(flags, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("sys.argv", ["digits", *flags, "--out", str(tmp_path / "world")])
    with pytest.raises(SystemExit):
        digits.main()
    said = capsys.readouterr().err.splitlines()[-1]
    assert all(word in said for word in flags)
    assert not any(tmp_path.iterdir())


def test_scans_are_shared_by_no_two_splits():
    splits = digits.split_scans(digits.World())
    held = [{i for scans in split.values() for i in scans} for split in splits.values()]
    assert sum(map(len, held)) == len(set.union(*held)) == 1797
    sizes = np.array([len(part) for part in held]) / 1797
    assert sizes == pytest.approx([0.7, 0.1, 0.2], abs=0.01)


def test_defaults_have_the_papers_proportions():
    """Few curated demonstrations among the public ones, and a twentieth as many for the game."""
    world = digits.World()
    assert world.curated_share == pytest.approx(113 / 1373, abs=0.005)
    curated = world.curated_share * world.sft_rows
    assert world.prompt_rows / curated == pytest.approx(5.9 / 113, abs=0.005)


def test_a_world_is_built_where_there_are_no_locks(monkeypatch, capsys, tmp_path):
    def no_locks(*args):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", no_locks)
    paths = digits.build(tmp_path / "world", digits.World(**WORLD))
    assert all(Path(path).exists() for path in paths.values())
    assert "no locks on this disk; start one process at a time" in capsys.readouterr().err


@pytest.mark.parametrize(
    "train, validation, said",
    [
        (0.0, 0.1, "pretrain.jsonl none shows a 0; raise --train_share"),
        (1.0, 0.1, "validation.jsonl none shows a 0; raise --validation_share or lower --train"),
        (0.9, 0.1, "test.jsonl none shows a 0; lower --train_share or --validation_share"),
    ],
)
def test_scans_that_lack_a_digit_are_named_with_the_share_to_change(
    train, validation, said, tmp_path
):
    world = WORLD | {"train_share": train, "validation_share": validation}
    with pytest.raises(UserError, match=f"of the scans for {said}"):
        digits.build(tmp_path / "world", digits.World(**world))


@pytest.mark.parametrize(
    "name, value",
    [("digits", 0), ("noise", -1.0), ("train_share", 1.5), ("slip_rate", math.nan), ("heads", 0)],
)
def test_numbers_of_which_no_world_can_be_built(name, value, tmp_path):
    """One line names the flag and its range, before a file is written."""
    with pytest.raises(UserError, match=f"--{name} {value}: must be at least"):
        digits.build(tmp_path / "world", digits.World(**{name: value}))
    assert not any(tmp_path.iterdir())
