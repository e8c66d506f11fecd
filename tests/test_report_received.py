"""The page of a log that somebody else wrote: hostile text, wrong types, too much of it, and paths
to private files. Nothing of it breaks the page, scripts it, or shows what is not in the run's
data."""

import json
import shutil
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from support import report
from tests.pages import (
    EVIL,
    RESPONSE,
    RESULT,
    Page,
    hostile,
    jsonl,
    make,
    reporter,
    rollouts,
    steps,
)


@pytest.fixture
def run(monkeypatch, capsys):
    return reporter(monkeypatch, capsys)


def test_hostile_text_is_text(tmp_path, run):
    path = hostile(tmp_path / "a<b>&'c")
    run(path)
    page = Page(path / "report.html")  # asserts that no element and no script came of it
    assert page.text.count(EVIL) > 7
    rolled, wrong = page.shelves
    (group,) = rolled["groups"]
    assert (group["row"], group["question"], group["supervision"]) == (EVIL, EVIL, EVIL)
    assert EVIL in rolled["names"] and wrong["groups"][0]["branches"][0][0] == EVIL
    run(tmp_path)
    page = Page(tmp_path / "report.html")
    assert ("a", {"href": "a%3Cb%3E%26%27c/report.html"}) in page.elements


def test_wrong_types_are_survived_and_counted(tmp_path, run):
    shares = ["x", 3, {"a": 1}, [[0.5], [0.5, 0.5]], [["x", 0.5]], [[]], [], None]
    lines = steps(8, loss=1.0, packs=1, expert_share_perception=shares)
    lines[1] |= {"loss": [1, 2], "packs": [1], "grad_norm": 10**400, "entropy": 1e305}
    lines[2] |= {"loss": {"a": 1}, "time/step": "long", "grad_norm": True, "rows_left_out": [1]}
    lines[3]["step"] = "four"
    make(tmp_path, lines, {**RESULT, "accuracy": [1], "by_source": {"sum": 3}, "rows": 10**400})
    text = (tmp_path / "metrics.jsonl").read_text()
    (tmp_path / "metrics.jsonl").write_text(
        '\n{"step": 1, "lo{"step": 2}\n' + "[" * 100_000 + "\n" + text + "\n7\n"
    )
    good = rollouts(1, n=2)
    bad = [
        [1, 2],
        {"step": None, "response": "x"},
        {"step": 1, "response": 3},
        {**good[0], "reward": "high", "images": [3, "gone.png"], "question": ["?"], "valid": "yes"},
        {**good[0], "supervision": {}, "answer": {}, "row": [], "length": [[]], "more": {}},
    ]
    jsonl(tmp_path / "rollouts.jsonl", good + bad)
    jsonl(
        tmp_path / "generations.jsonl",
        [{"where": 3, "response": RESPONSE}, {"where": [], "response": None}, {"answer": 10**400}],
    )
    _, err = run(tmp_path)
    page = Page(tmp_path / "report.html")
    for told in (err, page.text):
        assert "metrics.jsonl: 3 broken lines left out, the first is line 2" in told
        assert "metrics.jsonl: left out 1 line without a step" in told
        assert "rollouts.jsonl: 1 broken line left out, the first is line 3" in told
        assert "rollouts.jsonl: 2 lines left out, for want of a step or a response" in told
        assert "rollouts.jsonl: 9 values of a wrong type" in told
        assert "generations.jsonl: 2 lines left out, for want of a step or a response" in told
    loss = page.figure("Loss")["lines"]["loss"]
    assert (loss["x"], loss["y"]) == ([1, 2, 3, 5, 6, 7, 8], [1, None, None, 1, 1, 1, 1])
    rolled, wrong = page.shelves
    assert [len(group["branches"]) for group in rolled["groups"]] == [2, 1, 1]
    assert len(wrong["groups"]) == 1


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.just(10**400),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)
NAMES = (
    "step row where question images answer response supervision valid reward perception length "
    "loss time/step expert_share_perception validation_pairs rows_left_out run stage model_type "
    "accuracy by_source data rows correct format_valid score_reasoning command commit where"
).split()
OBJECTS = st.dictionaries(st.sampled_from(NAMES), VALUES, max_size=len(NAMES))
STEPPED = st.builds(lambda row, step: row | {"step": step}, OBJECTS, st.integers(0, 3))
ROWS = st.lists(OBJECTS | STEPPED | STEPPED.map(lambda row: row | {"response": "x"}), max_size=5)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.tuples(ROWS, ROWS, ROWS), st.tuples(OBJECTS, OBJECTS, OBJECTS))
def test_any_values_make_a_page(tmp_path_factory, logs, objects):
    path = tmp_path_factory.mktemp("run", numbered=True)
    for name, rows in zip(("metrics", "rollouts", "generations"), logs):
        jsonl(path / f"{name}.jsonl", rows)
    for name, value in zip(("run", "config", "eval"), objects):
        (path / f"{name}.json").write_text(json.dumps(value))
    report.run_page(report.read_run(str(path)))
    Page(path / "report.html")
    shutil.rmtree(path)


def test_what_is_too_large_is_counted(tmp_path, run, monkeypatch):
    monkeypatch.setattr(report, "TEXT_BYTES", 20_000)
    monkeypatch.setattr(report, "IMAGE_BYTES", 100_000)
    monkeypatch.setattr(report, "LARGEST", 50_000)
    for i in range(6):
        Image.effect_noise((200, 100), 100).save(tmp_path / f"{i}.jpg")
    Image.new("L", (1000, 100)).save(tmp_path / "huge.png")
    make(tmp_path, steps(40, loss=1.0))
    rows = rollouts(40, images=[tmp_path / f"{i}.jpg" for i in range(6)], words=300)
    rows[0]["images"] = [str(tmp_path / "huge.png")]
    rows[1]["response"] = "a" * 200_000
    jsonl(tmp_path / "rollouts.jsonl", rows)
    long = {"where": "x", "response": "a" * 90_000}
    jsonl(tmp_path / "generations.jsonl", [long] * 12)
    _, err = run(tmp_path)
    page = Page(tmp_path / "report.html")
    shelf, wrong = page.shelves
    assert "generations.jsonl: 7 rollouts not on this page" in page.text
    assert sum(len(group["branches"]) for group in wrong["groups"]) == 5
    (tmp_path / "generations.jsonl").unlink()
    shown = [branch for group in shelf["groups"] for branch in group["branches"]]
    assert f"rollouts.jsonl: {len(rows) - len(shown)} rollouts not on this page" in page.text
    assert 0 < len(shown) and len(json.dumps(shelf)) < 30_000
    monkeypatch.setattr(report, "TEXT_BYTES", 200_000)
    _, err = run(tmp_path)
    page = Page(tmp_path / "report.html")
    (shelf,) = page.shelves
    places = [group["step"] for group in shelf["groups"]]
    assert places == list(range(1, 41, places[1] - 1)) and len(places) > 4  # spread evenly
    assert f"Rollouts, of one logged step in {places[1] - 1}" in page.text
    assert "rollouts.jsonl: 1 text cut after 100000 characters" in page.text
    assert "huge.png, 1000 x 100 pixels are too many" in shelf["groups"][0]["images"][0]
    dropped = {
        image
        for group in shelf["groups"]
        for image in group["images"]
        if str(image).endswith("budget for images is spent")
    }
    assert dropped and page.images and sum(len(uri) for uri, *_ in page.images) < 100_000
    assert f"of {len(page.images) + len(dropped) + 1} images {len(dropped)} not on" in page.text


def private(folder: Path) -> list[Path]:
    """A row and a picture that no page may show."""
    folder.mkdir()
    jsonl(folder / "rows.jsonl", [{"question": "private question", "image": "picture.png"}])
    Image.new("RGB", (20, 20), "red").save(folder / "picture.png")
    return [folder / "rows.jsonl", folder / "picture.png"]


def test_a_received_log_shows_no_private_file(tmp_path, run, monkeypatch):
    """A log names files outside the run's data, by their paths, by `..` and by links. It even says
    that its images lie anywhere on the machine."""
    rows, picture = private(tmp_path / "private")
    received, data = tmp_path / "received", tmp_path / "data"
    own = [str(data / "rows.jsonl"), "gone/rows.jsonl"]
    make(received, steps(1, loss=1.0), RESULT, data=own, image_dir="/")
    data.mkdir()
    jsonl(data / "rows.jsonl", [{"question": "own question", "image": str(picture)}])
    (received / "linked.jsonl").symlink_to(rows)
    (received / "linked.png").symlink_to(picture)
    (tmp_path / "data_beside").mkdir()  # begins with the name of the data's folder
    shutil.copy(picture, tmp_path / "data_beside" / "picture.png")
    pictures = [picture, data / ".." / "private" / "picture.png", received / "linked.png"]
    pictures += [tmp_path / "data_beside" / "picture.png", "private/picture.png"]
    rolled = rollouts(1, n=1)[0] | {"images": list(map(str, pictures))}
    jsonl(received / "rollouts.jsonl", [rolled])
    places = [rows, data / ".." / "private" / "rows.jsonl", received / "linked.jsonl"]
    places += ["private/rows.jsonl", data / "rows.jsonl"]
    answer = {"response": RESPONSE, "correct": False}
    jsonl(received / "generations.jsonl", [answer | {"where": f"{path}:1"} for path in places])
    monkeypatch.chdir(tmp_path)
    for allowed in (False, True):
        _, err = run(received, *(["--data", tmp_path / "private"] if allowed else []))
        page = Page(received / "report.html")
        rolled, wrong = page.shelves
        shown = [group["question"] for group in wrong["groups"]]
        assert shown.count("own question") == 1
        assert shown.count("private question") == (4 if allowed else 0)
        told = f"{rows} is outside the run's data folders; --data FOLDER adds a folder"
        assert (told in err) == (told in page.text) == (not allowed)
        inside = [isinstance(image, int) for image in rolled["groups"][0]["images"]]
        assert inside == ([True, True, True, False, True] if allowed else [False] * 5)
        assert bool(page.images) == allowed


def test_only_rows_and_pictures_are_shown(tmp_path, run, monkeypatch):
    """Beside the data there are other files, and a picture may have any content."""
    make(tmp_path, steps(1, loss=1.0))
    (tmp_path / "secret.jsonl").write_text('"a secret"\n["a secret"]\na secret\n')
    (tmp_path / "secret.txt").write_text("a secret\n" * 3)
    Image.new("RGB", (20, 20), "red").save(tmp_path / "eps.png", "EPS")
    formats = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
    for name in formats:
        Image.new("RGB", (20, 20), "red").save(tmp_path / f"{name}.data", name)
    started = []
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", lambda *_, **__: started.append("gs"))
    images = [str(tmp_path / f"{name}.data") for name in formats] + [str(tmp_path / "eps.png")]
    jsonl(tmp_path / "rollouts.jsonl", [rollouts(1, n=1)[0] | {"images": images}])
    places = [f"{tmp_path}/secret.{ending}:{i}" for ending in ("jsonl", "txt") for i in range(5)]
    answers = [{"response": RESPONSE, "correct": False, "where": place} for place in places]
    jsonl(tmp_path / "generations.jsonl", answers)
    run(tmp_path)
    page = Page(tmp_path / "report.html")
    assert "a secret" not in page.source and len(page.images) == len(formats)
    assert "cannot identify image" in page.shelves[0]["groups"][0]["images"][-1]
    assert not started


def test_terminal_codes_of_a_log_are_not_printed(tmp_path, run):
    make(tmp_path, [], RESULT)
    wrong = {"where": "\x1b[31m/x.jsonl:1", "response": RESPONSE, "correct": False}
    jsonl(tmp_path / "generations.jsonl", [wrong])
    _, err = run(tmp_path)
    assert "?[31m/x.jsonl is gone" in err and "\x1b" not in err


def test_terminal_codes_of_a_folder_are_not_printed(tmp_path, run):
    make(tmp_path / "\x1b[31mred", [], RESULT)
    out, err = run(tmp_path)
    assert "?[31mred" in out and "\x1b" not in out + err
