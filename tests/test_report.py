"""report.py: what a reader finds on the pages, that nothing in the data can break or script them,
and, where Chromium is installed, that a browser shows them."""

import base64
import gzip
import hashlib
import itertools
import json
import math
import shutil
import subprocess
import sys
import tempfile
import time
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from benchmarks import study
from support import plots, report

ROOT = Path(report.__file__).parent.parent
EVIL = "<script>window.evil = 1</script>\"><img src=x onerror='window.evil = 1'>&lt;b&gt;"
RESPONSE = "<caption>Two digits.</caption>\n<think>1 + 1 = 2.</think>\n<answer>2</answer>"
RESULT = {
    "data": "test.jsonl",
    "accuracy": 0.5,
    "caption_accuracy": None,
    "format_valid": 1.0,
    "mean_response_tokens": 12.5,
    "truncated": 0.0,
    "rows": 4,
    "by_source": {"sum": {"accuracy": 0.25}, "count": {"accuracy": 0.75}},
}


class Page(HTMLParser):
    """The page as a browser takes it: elements with their attributes, text and data. Every tag is
    closed. A script is data, or one of the two whose hashes stand in the page's policy."""

    def __init__(self, path):
        super().__init__()
        self.open, self.elements, self.texts, self.scripts = [], [], [], []
        self.source = Path(path).read_text(encoding="utf-8")
        self.feed(self.source)
        assert not self.open
        assert not {"link", "iframe", "object"} & {tag for tag, _ in self.elements}
        for _, attributes in self.elements:
            assert not any(name.startswith("on") for name in attributes)
            assert attributes.get("src", "data:image/").startswith("data:image/")
            assert not attributes.get("href", "").startswith(("http", "//", "javascript"))
        (policy,) = [a["content"] for _, a in self.elements if "http-equiv" in a]
        assert policy.startswith("default-src 'none'; ")
        _, _, allowed = policy.partition("script-src ")
        assert len(allowed.split()) == 2 and all(a.startswith("'sha256-") for a in allowed.split())
        self.data = []
        for attributes, code in self.scripts:
            if attributes.get("type") == "application/json":
                self.data.append(json.loads(code, parse_constant=pytest.fail))
                assert not set("<\u2028\u2029") & set(code)
            elif attributes.get("type") == "text/plain":
                code = gzip.decompress(base64.b64decode(code)).decode()
                assert code.startswith("/**\n* plotly.js") and digest(code) in allowed
            else:
                assert digest(code) in allowed
        self.images = self.data[0]  # [data URI, source, width, height] each

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in ("meta", "img", "wbr"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] == ["script"]:
            self.scripts.append((self.elements[-1][1], data))
        else:
            self.texts.append(data)

    @property
    def text(self):
        return "".join(self.texts)

    def figure(self, title: str) -> dict:
        """One plot: a thick line for each label, plotly's `layout`, and `told`, the text below."""
        markup = self.source.split(f"<figcaption>{title}</figcaption>")[1].split("</figure>")[0]
        spec = json.loads(markup.split(">", 1)[1].split("</script>")[0])
        lines = {trace["name"]: trace for trace in spec["data"] if trace.get("showlegend", True)}
        thin = [trace for trace in spec["data"] if not trace.get("showlegend", True)]
        return {"lines": lines, "thin": thin, "layout": spec["layout"], "told": markup}

    @property
    def shelves(self) -> list[dict]:
        """The rollouts, or wrong answers: {"names", "groups"} each."""
        return [data for data in self.data[1:] if "groups" in data]


def digest(code: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()}'"


def stretches(trace: dict) -> list[int]:
    """The lengths of the measured stretches of a line between its gaps."""
    return [
        len(list(ys)) for gap, ys in itertools.groupby(trace["y"], lambda y: y is None) if not gap
    ]


def jsonl(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def make(path: Path, rows: list[dict], result: dict | None = None, stage="sft", **fields) -> Path:
    """A run's directory: its settings, its log, the model's configuration, its evaluation."""
    path.mkdir(parents=True, exist_ok=True)
    if rows:
        jsonl(path / "metrics.jsonl", rows)
        (path / "run.json").write_text(json.dumps({"stage": stage, "run": fields}))
        (path / "config.json").write_text(json.dumps({"model_type": "qwen3_vl"}))
    if result:
        (path / "eval.json").write_text(json.dumps(result))
    return path


def steps(count: int, **metrics) -> list[dict]:
    """Lines of metrics; a list gives a value per step."""
    return [
        {
            "step": i + 1,
            "time/step": 2.0,
            **{k: v[i] if isinstance(v, list) else v for k, v in metrics.items()},
        }
        for i in range(count)
    ]


def rollouts(steps=3, prompts=1, n=4, stage="align", images=(), words=12) -> list[dict]:
    """Lines of rollouts.jsonl as a stage writes them. Branch b of N has the advantage b - 1.5, the
    reward b / N, and where b is 0 no valid format."""
    rows = []
    for step, p, b in itertools.product(range(1, steps + 1), range(prompts), range(n)):
        row = {
            "step": step,
            "row": f"p.jsonl:{p}",
            "question": f"<image>question {step}.{p}?",
            "images": [str(images[(step * prompts + p) % len(images)])] if images else [],
            "answer": ["2", "two"],
            "response": f"<caption>Branch {b}.</caption>\n<think>{'word ' * words}</think>\n"
            f"<answer>{b}</answer>"
            if b
            else "no format at all",
            "valid": b > 0,
            "advantage": b - 1.5,
            "length": 10 + b,
        }
        if stage == "align":
            scores = {"perception": b / 4, "reasoning": -b / 4 if b else float("nan")}
            teacher = {"teacher_perception": 1.25, "teacher_reasoning": 0.75}
            rows.append(row | {"supervision": RESPONSE} | scores | teacher)
        else:
            rows.append(row | {"supervision": None, "reward": b / n, "accuracy": float(b == 2)})
    return rows


@pytest.fixture
def run(monkeypatch, capsys):
    """run(DIR, ...) -> what was printed to (stdout, stderr)."""

    def call(*words):
        monkeypatch.setattr(sys, "argv", ["report.py", *map(str, words)])
        report.report()
        return capsys.readouterr()

    return call


def test_curves_have_gaps_where_nothing_was_measured(tmp_path, run):
    loss = [3.0, 2.0, None, 1.5, float("nan"), 1.0, 0.5]
    make(tmp_path, steps(7, loss=loss, entropy=[None] * 7, packs=1), model="some/model")
    run(tmp_path)
    page = Page(tmp_path / "report.html")
    line = page.figure("Loss")["lines"]["loss"]
    assert line["x"] == [1, 2, 3, 4, 5, 6, 7] and line["y"] == [3, 2, None, 1.5, None, 1, 0.5]
    assert not line.get("connectgaps") and line["mode"] == "lines+markers"
    assert [size > 0 for size in line["marker"]["size"]] == [x == 4 for x in line["x"]]  # alone
    assert "Entropy" not in page.text  # never measured
    assert "The same in every step: packs 1" in page.text
    assert "SFT, 7 steps, 14 s of training" in page.text and "some/model" in page.text


def test_running_mean_keeps_gaps_and_leaves_them_out(tmp_path, run):
    make(tmp_path, steps(60, loss=[2.0] * 30 + [None] + [4.0] * 29))
    run(tmp_path)
    figure = Page(tmp_path / "report.html").figure("Loss")
    (thin,), thick = figure["thin"], figure["lines"]["loss"]
    assert stretches(thin) == stretches(thick) == [30, 29]
    assert thin["y"][28:32] == thick["y"][28:32] == [2, 2, None, 4]
    points = [(1, 2.0), (2, None), (3, 4.0), (4, 9.0), (5, 2.0)]
    assert plots.running_mean(points, 3) == [(1, 2.0), (2, None), (3, 6.5), (4, 5.0), (5, 5.5)]


def test_plots_with_intervals():
    """What a page over several seeds needs: a curve with error bars, a table with intervals."""
    series = [("PRISM", [(16, 0.5, 0.4, 0.75), (48, 0.75, 0.5, 1.0)]), ("SFT", [(16, 0.25)])]
    markup = report.plot("Accuracy", "share of rows", series, "curated rows")
    first, second = json.loads(markup.split(">", 4)[4].split("</script>")[0])["data"]
    assert first["error_y"]["array"] == [0.25, 0.25] and first["error_y"]["symmetric"] is False
    assert first["error_y"]["arrayminus"] == pytest.approx([0.1, 0.25]) and "error_y" not in second
    assert "<td>0.500 [0.400, 0.600]</td>" in report.table(["a"], [[(0.5, 0.4, 0.6)]])


def test_alignment_page(tmp_path, run):
    shares = [[0.1, 0.2, 0.3, 0.4], [0.3, 0.2, 0.1, 0.4]]
    lines = steps(
        50,
        score_gap_perception=[i / 10 for i in range(50)],
        score_gap_reasoning=1.0,
        pair_accuracy_perception=0.75,
        pair_accuracy_reasoning=None,
        expert_share_perception=[shares] * 50,
        grad_norm=1.0,
        learning_rate=1e-6,
    )
    lines[0]["time/step"] = 500.0
    lines[0] |= {"probe_picture": 0.5, "probe_digit": None}  # a probe comes now and then
    lines[49] |= {"probe_picture": 0.75, "probe_digit": None}
    make(tmp_path, lines, stage="align", format_penalty=1.5)
    run(tmp_path)
    page = Page(tmp_path / "report.html")
    gaps = page.figure("Score gap by view: supervision - policy")
    assert set(gaps["lines"]) == {"score_gap_perception", "score_gap_reasoning"}
    assert len(gaps["thin"]) == 2 and "thick: mean over 3 steps" in gaps["told"]
    assert all(stretches(line) == [50] for line in [*gaps["thin"], *gaps["lines"].values()])
    assert page.figure("Pair accuracy: supervision above policy")["layout"]["yaxis"]["range"] == [
        -0.02,
        1.02,
    ]
    probe = page.figure("Probe of the discriminator: 0.5 is blind")
    line = probe["lines"].pop("probe_picture")
    assert (line["x"], line["y"]) == ([1, 50], [0.5, 0.75]) and not probe["lines"]
    assert line["mode"] == "lines" and probe["layout"]["yaxis"]["range"] == [-0.02, 1.02]
    assert "Experts at step 50" in page.text and "perception, layer 1" in page.text
    assert "even routing would be 0.250" in page.text and "alignment, 50 steps" in page.text
    routing = page.figure("Routing in the perception view, mean over layers")["lines"]
    assert routing["perception: expert 0"]["y"][7] == pytest.approx(0.2)
    seconds = page.figure("Seconds, by phase")
    assert "above the plot: 1 values, up to 500" in seconds["told"]
    assert seconds["layout"]["yaxis"]["range"] == [0, 6]
    rate = page.figure("Learning rate")
    assert rate["layout"]["yaxis"]["range"] == [0, 1.2e-6] and not rate["thin"]


def hostile(path: Path) -> Path:
    """A run each text of which is an attack."""
    row = {
        "step": 1,
        "row": EVIL,
        "question": "<image>" + EVIL,
        "images": [EVIL, "\0"],
        "answer": [EVIL],
        "advantage": 1.0,
        "response": f"{EVIL}<caption>{EVIL}</caption><think>\ud800\u2028</think><answer>2</answer>",
        "supervision": EVIL,
        EVIL: 1.0,
        "__proto__": EVIL,
    }
    make(
        path,
        steps(2, **{EVIL: [1.0, 2.0], "loss": [1.0, 2.0]}),
        {**RESULT, "data": EVIL, "by_source": {EVIL: {"accuracy": 0.5}}},
        stage=EVIL,
        **{EVIL: EVIL, "algorithm": EVIL},
    )
    jsonl(path / "rollouts.jsonl", [row])
    wrong = {"where": EVIL, "source": EVIL, "answer": [EVIL], "response": EVIL, "correct": False}
    jsonl(path / "generations.jsonl", [wrong])
    return path


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


def test_rollouts(tmp_path, run):
    Image.new("RGB", (1600, 400), "red").save(tmp_path / "big.png")
    rows = rollouts(5, n=6, images=[tmp_path / "big.png"])
    for row in rows:
        row["images"].append("gone.png")
    make(tmp_path, steps(5, reward=0.5), stage="rlvr", algorithm="grpo")
    jsonl(tmp_path / "rollouts.jsonl", rows)
    run(tmp_path)
    page = Page(tmp_path / "report.html")
    (shelf,) = page.shelves
    assert [group["question"] for group in shelf["groups"]] == [
        f"question {step}.0?" for step in (1, 2, 3, 4, 5)
    ]
    assert "RLVR, grpo" in page.text
    for group in shelf["groups"]:
        assert group["answer"] == "2 or two" and group["supervision"] == RESPONSE
        assert [branch[:2] for branch in group["branches"]] == [
            [row["response"], int(row["valid"])] for row in rows[:6]
        ]
        assert group["images"] == [0, "gone.png, no such file"]  # each image is there once
    values = [dict(zip(shelf["names"], branch[2:])) for branch in shelf["groups"][0]["branches"]]
    assert values[0]["reasoning"] is None and values[2]["reasoning"] == -0.5
    assert values[2]["teacher_perception"] == 1.25 and values[5]["length"] == 15
    ((uri, source, width, height),) = page.images
    assert (source, width, height) == (str(tmp_path / "big.png"), 1600, 400)
    (tmp_path / "inside.jpeg").write_bytes(base64.b64decode(uri.partition(",")[2]))
    assert Image.open(tmp_path / "inside.jpeg").size == (480, 120)


def test_rollouts_with_older_names_or_few_values(tmp_path, run):
    make(tmp_path, steps(1, loss=1.0))
    old = {"step": 1, "response": "a", "score_perception": 0.5, "score_reasoning": float("nan")}
    jsonl(tmp_path / "rollouts.jsonl", [old, {"step": 1, "response": "b"}])
    _, err = run(tmp_path)
    (shelf,) = Page(tmp_path / "report.html").shelves
    assert shelf["names"] == ["perception", "reasoning"] and err == ""
    (group,) = shelf["groups"]
    assert group["branches"] == [["a", None, 0.5, None], ["b", None, None, None]]
    assert group["images"] == [] and group["supervision"] is None and group["answer"] == "–"


def test_an_evaluation_of_several_samples_says_so(tmp_path, run):
    several = RESULT | {"num_samples": 8, "temperature": 0.7, "pass_at_k": 0.875}
    ways = ((RESULT, "greedy decoding"), (several, "8 samples a row at temperature 0.7"))
    for result, how in ways:
        make(tmp_path, [], result)
        run(tmp_path)
        text = Page(tmp_path / "report.html").text
        assert how in text and ("0.875" in text) == ("pass_at_k" in text) == (result is several)


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


def test_wrong_answers_with_question_and_image(tmp_path, run):
    Image.new("L", (48, 16)).save(tmp_path / "digits.png")
    data = tmp_path / "test.jsonl"
    jsonl(data, [{"question": f"question {i}?", "image": "digits.png"} for i in range(2, 42)])
    data.write_text("\n" + data.read_text())  # an empty line counts in "file:line"
    make(tmp_path / "run", [], RESULT)
    jsonl(
        tmp_path / "run" / "generations.jsonl",
        [
            {"where": f"{data}:{i}", "answer": ["2"], "response": RESPONSE, "correct": i % 2 == 0}
            for i in range(2, 42)
        ],
    )
    run(tmp_path / "run", "--data", data)
    page = Page(tmp_path / "run" / "report.html")
    assert "Wrong answers, 12 of 20" in page.text
    (shelf,) = page.shelves
    assert [group["images"] for group in shelf["groups"]] == [[0]] * 12 and len(page.images) == 1
    assert page.images[0][0].startswith("data:image/png")
    questions = [group["question"] for group in shelf["groups"]]
    assert "question 3?" in questions and "question 4?" not in questions
    assert [group["answer"] for group in shelf["groups"]] == ["2"] * 12
    assert "count" in page.text and "0.750" in page.text  # by source
    data.unlink()
    _, err = run(tmp_path / "run")
    assert "test.jsonl is gone" in err
    assert "test.jsonl is gone" in Page(tmp_path / "run" / "report.html").text


def private(folder: Path) -> list[Path]:
    """A row and a picture that no page may show."""
    folder.mkdir()
    jsonl(folder / "rows.jsonl", [{"question": "private question", "image": "picture.png"}])
    Image.new("RGB", (20, 20), "red").save(folder / "picture.png")
    return [folder / "rows.jsonl", folder / "picture.png"]


def test_a_received_log_shows_no_private_file(tmp_path, run, monkeypatch):
    """A log names files outside the run's data, by their paths, by `..` and by links."""
    rows, picture = private(tmp_path / "private")
    received, data = tmp_path / "received", tmp_path / "data"
    make(received, steps(1, loss=1.0), RESULT, data=[str(data / "rows.jsonl"), "gone/rows.jsonl"])
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


def test_without_docstrings(tmp_path):
    """`python -OO` leaves out docstrings and asserts."""
    make(tmp_path, steps(3, loss=1.0), RESULT)
    words = [sys.executable, "-OO", "-m", "support.report", tmp_path]
    done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stderr) == (0, "")
    assert Page(tmp_path / "report.html").figure("Loss")
    done = subprocess.run([*words[:-1], "--help"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0 and "page of a run" in done.stdout


def test_command_commit_and_the_way_back(tmp_path, run):
    make(tmp_path / "sft", steps(2, loss=1.0), RESULT)
    make(tmp_path / "align", steps(2, loss=1.0), RESULT, stage="align")
    settings = json.loads((tmp_path / "sft" / "run.json").read_text())
    told = {"command": f"sft.py --data '{EVIL}'", "commit": "0123abc"}
    (tmp_path / "sft" / "run.json").write_text(json.dumps(settings | told))
    run(tmp_path / "sft")
    page = Page(tmp_path / "sft" / "report.html")
    assert told["command"] in page.text and "0123abc" in page.text
    assert ("a", {"href": "../report.html"}) not in page.elements  # nothing is there yet
    for path in (tmp_path, tmp_path / "sft"):
        run(path)
        assert ("a", {"href": "../report.html"}) in Page(tmp_path / "sft" / "report.html").elements
    text = Page(tmp_path / "align" / "report.html").text
    assert "Command" not in text and "Commit" not in text
    (tmp_path / "sft" / "run.json").write_text(json.dumps(settings | {"command": ["a", "b c"]}))
    run(tmp_path / "sft", tmp_path / "align")
    assert "a 'b c'" in Page(tmp_path / "sft" / "report.html").text


def test_accuracy_has_an_interval(tmp_path, run):
    """Wilson's, on both pages, but not on the terminal and in results.json."""
    assert report.measured({"accuracy": 0.5, "rows": 100}, "accuracy") == pytest.approx(
        (0.5, 0.4038, 0.5962), abs=1e-4
    )
    assert report.measured({"accuracy": 1.0, "rows": 10}, "accuracy") == pytest.approx(
        (1.0, 0.7225, 1.0), abs=1e-4
    )
    for result in ({"accuracy": 0.5}, {"accuracy": 0.5, "rows": 0}, {"accuracy": 7.0, "rows": 4}):
        assert report.measured(result, "accuracy") == result["accuracy"]
    make(tmp_path / "sft", [], RESULT)
    out, _ = run(tmp_path)
    assert "[" not in out
    assert json.loads((tmp_path / "results.json").read_text())[0]["accuracy"] == 0.5
    for path in (tmp_path, tmp_path / "sft"):
        assert "0.500 [0.150, 0.850]" in Page(path / "report.html").text
    bars = Page(tmp_path / "report.html").figure("Accuracy and format")["lines"]
    assert bars["accuracy"]["error_y"]["array"] == [pytest.approx(0.35, abs=1e-2)]
    assert "error_y" not in bars["format_valid"]


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


def test_comparison(tmp_path, run):
    make(
        tmp_path / "align_grpo",
        steps(50, accuracy=[i / 50 for i in range(50)], loss=0.1),
        {**RESULT, "accuracy": 0.75},
        stage="rlvr",
        algorithm="grpo",
    )
    sft_grpo = steps(50, accuracy=0.5, loss=0.2)
    make(tmp_path / "sft_grpo", sft_grpo, RESULT, stage="rlvr", algorithm="grpo")
    make(
        tmp_path / "sft",
        steps(10, loss=[10.0 - i for i in range(10)], entropy=1.0),
        {"accuracy": float("nan"), "rows": 1},
    )
    make(tmp_path / "base", [], RESULT)
    held = {"validation_pairs": 7, "validation_pair_accuracy_reasoning": 0.875}
    held |= {"probe_picture": 0.625}
    make(
        tmp_path / "discriminator",
        [*steps(3, loss=1.0), {"step": 3, "time/step": 1.0, **held}],
        stage="discriminator",
    )
    make(tmp_path / "zz_other", [], RESULT)
    make(tmp_path / "zz_unjudged", steps(3, loss=1.0), stage="align")
    (tmp_path / "not_a_run").mkdir()
    out, err = run(tmp_path)
    same = {
        "accuracy": 0.5,
        "caption_accuracy": None,
        "format_valid": 1.0,
        "mean_response_tokens": 12.5,
    }
    assert json.loads((tmp_path / "results.json").read_text(), parse_constant=pytest.fail) == [
        {"name": "base", **same, "seconds": None},
        {"name": "SFT", **dict.fromkeys(same), "seconds": 20.0},
        {"name": "SFT+GRPO", **same, "seconds": 100.0},
        {"name": "PRISM+GRPO", **same, "accuracy": 0.75, "seconds": 100.0},
        {"name": "zz_other", **same, "seconds": None},
    ]
    first = "name base SFT SFT+GRPO PRISM+GRPO zz_other written".split()
    assert [line.split()[0] for line in out.splitlines()] == first
    assert out.splitlines()[2].split() == ["SFT", "–", "–", "–", "–", "20.000"]
    told = f"make it with: python eval.py --ckpt {tmp_path / 'zz_unjudged'} --data DATA"
    assert f"note: zz_unjudged is not in the table: it has no eval.json; {told}" in err
    assert "SFT is not" not in err and "discriminator is not" not in err
    page = Page(tmp_path / "report.html")
    arms = page.figure("accuracy")
    assert arms["lines"]["SFT+GRPO"]["y"][12] == 0.5
    assert arms["thin"][1]["name"] == "PRISM+GRPO" and arms["thin"][1]["y"][12] == 0.24
    assert len(arms["lines"]) == len(arms["thin"]) == 2
    assert page.figure("loss (RLVR, grpo)")["lines"]["SFT+GRPO"]["y"][0] == pytest.approx(0.2)
    assert "loss (SFT)" not in page.text  # which only one run has
    assert page.figure("time/step")["layout"]["xaxis"]["title"]["text"] == "% of the run"  # 10, 50
    bars = page.figure("Accuracy and format")["lines"]
    assert bars["accuracy"]["x"] == ["base", "SFT", "SFT+GRPO", "PRISM+GRPO", "zz_other"]
    assert bars["accuracy"]["y"] == [0.5, None, 0.5, 0.75, 0.5] and "caption_accuracy" not in bars
    links = [attributes["href"] for tag, attributes in page.elements if tag == "a"]
    names = ("base", "sft", "sft_grpo", "align_grpo", "discriminator", "zz_other", "zz_unjudged")
    assert links == [f"{name}/report.html" for name in names]
    assert all((tmp_path / link).exists() for link in links)
    held = Page(tmp_path / "discriminator" / "report.html")
    assert "Held-out pairs" in held.text and "0.875" in held.text
    assert "0.625" in held.text and "0.5 is blind" in held.text
    assert "discriminator warm-up, 3 steps, 7 s" in held.text


def test_one_bad_run_among_many(tmp_path, run):
    make(tmp_path / "sft", steps(3, loss=1.0), RESULT)
    make(tmp_path / "align", steps(3, loss=1.0), RESULT, stage="align")
    (tmp_path / "align" / "eval.json").write_text('{"accuracy": 0.')
    make(tmp_path / "broken", steps(3, loss=1.0))
    (tmp_path / "broken" / "report.html").mkdir()
    _, err = run(tmp_path)
    page = Page(tmp_path / "report.html")
    for told in (err, page.text):
        assert "align is left out: " in told and "eval.json: not JSON" in told
        assert "broken is left out: IsADirectoryError" in told
    assert [row["name"] for row in json.loads((tmp_path / "results.json").read_text())] == ["SFT"]
    assert Page(tmp_path / "sft" / "report.html").figure("Loss")


def test_killed_run(tmp_path, run):
    make(tmp_path, steps(3, loss=[3.0, 2.0, 1.0]))
    (tmp_path / "config.json").unlink()
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "lo')
    _, err = run(tmp_path)
    page = Page(tmp_path / "report.html")
    for told in (err, page.text):
        assert "metrics.jsonl: the last line (4) is only half written" in told
        assert "has not ended" in told
    assert "SFT, 3 steps" in page.text
    assert stretches(page.figure("Loss")["lines"]["loss"]) == [3]
    with open(tmp_path / "metrics.jsonl", "a") as file:  # resumed behind half a line
        file.write('\n\n{"step": 3, "loss": 1.5}\n{"step": 4, "loss": 0.5}\n')
    _, err = run(tmp_path)
    assert "metrics.jsonl: 1 broken line left out, the first is line 4" in err
    loss = Page(tmp_path / "report.html").figure("Loss")["lines"]["loss"]
    assert (loss["x"], loss["y"]) == ([1, 2, 3, 4], [3, 2, 1.5, 0.5])
    for text in ("", '{"step": 1, "lo'):  # killed before the first step, or while it was written
        (tmp_path / "metrics.jsonl").write_text(text)
        run(tmp_path)
        assert "no training steps" in Page(tmp_path / "report.html").text


@pytest.mark.parametrize(
    "prepare, told",
    [
        (lambda path: path / "missing", "no such directory"),
        (lambda path: path, "neither a run"),
        (
            lambda path: (path / "metrics.jsonl").write_text('\n"step": 1}\n{"st\n{}\n') and path,
            "metrics.jsonl:2: not JSON",
        ),
        (
            lambda path: (path / "eval.json").write_text('{"accuracy": 0.') and path,
            "eval.json: not JSON",
        ),
        (
            lambda path: (path / "eval.json").write_text("[" * 100_000) and path,
            "eval.json: not JSON",
        ),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(tmp_path, prepare, told):
    path = prepare(tmp_path)
    done = subprocess.run(
        [sys.executable, "-m", "support.report", path], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 2 and done.stdout == ""
    assert (
        done.stderr.startswith("error: ") and told in done.stderr and done.stderr.count("\n") == 1
    )


def test_starts_without_torch(tmp_path):
    heavy = "'torch' in sys.modules or 'transformers' in sys.modules"
    code = f"import support.report, sys; sys.exit({heavy})"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


# --------------------------------------------------------------------------------------------------
# In a browser


class Browser:
    """Chromium without a window. `open` waits until the page says that it is ready."""

    def __init__(self, folder: str):
        from selenium import webdriver

        options = webdriver.ChromeOptions()
        options.binary_location = shutil.which("chromium")
        for flag in (
            *("headless=new", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run"),
            *("disable-background-networking", "disable-component-update", "disable-sync"),
            *(f"user-data-dir={folder}", "window-size=1400,1000"),
        ):
            options.add_argument(f"--{flag}")
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        service = webdriver.ChromeService(shutil.which("chromedriver"))
        self.driver = webdriver.Chrome(options=options, service=service)
        self.run = self.driver.execute_script

    def wait(self, condition: str, seconds: float = 20) -> None:
        end = time.monotonic() + seconds
        while not self.run(f"return {condition}"):
            assert time.monotonic() < end, f"{condition}; {self.driver.get_log('browser')}"
            time.sleep(0.01)

    def open(self, path: Path, dark: bool = False) -> None:
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
        self.driver.get(path.as_uri())
        self.wait("document.body.dataset.ready === 'yes'")

    def draw_all(self) -> None:
        """Scrolls through the page, so that each plot comes into view and is drawn."""
        for i in range(self.run("return document.querySelectorAll('figure').length")):
            self.run("document.querySelectorAll('figure')[arguments[0]].scrollIntoView()", i)
            self.wait(f"document.querySelectorAll('figure')[{i}].dataset.drawn === 'yes'")

    def text(self, selector: str) -> list[str]:
        text = "[...document.querySelectorAll(arguments[0])].map(e => e.innerText ?? e.textContent)"
        return self.run(f"return {text}", selector)

    def set(self, name: str, value: str) -> None:
        """Puts a value into a control of the rollouts, as typing does."""
        self.run(
            "const e = document.querySelector(`[name=${arguments[0]}]`); e.value = arguments[1];"
            "e.dispatchEvent(new Event('input', {bubbles: true}))",
            name,
            value,
        )

    def press(self, key: str, selector: str = "body") -> None:
        from selenium.webdriver.common.by import By
        from selenium.webdriver.common.keys import Keys

        self.driver.find_element(By.CSS_SELECTOR, selector).send_keys(getattr(Keys, key))

    def complaints(self) -> list[str]:
        """What stands on the console since the last call."""
        return [entry["message"] for entry in self.driver.get_log("browser")]


@pytest.fixture(scope="module")
def browser():
    if not shutil.which("chromium") or not shutil.which("chromedriver"):
        pytest.skip("chromium and chromedriver are not installed")
    pytest.importorskip("selenium")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        chromium = Browser(folder)
        yield chromium
        chromium.driver.quit()


def shown(browser) -> tuple[str, list[str]]:
    """The prompt that is on the page and the answers of its branches."""
    (question,) = browser.text(".browser .question")
    return question, browser.text(".browser .card .answer")


def test_browser_filters_and_keys(tmp_path, run, browser):
    make(tmp_path, steps(4, loss=1.0), stage="rlvr", algorithm="grpo")
    jsonl(tmp_path / "rollouts.jsonl", rollouts(4, prompts=2, stage="rlvr"))
    run(tmp_path)
    browser.open(tmp_path / "report.html")
    answers = [f"ANSWER\n{b}" for b in (1, 2, 3)]
    assert shown(browser) == ("question 1.0?", answers)
    assert browser.text(".browser .outside") == ["OUTSIDE THE FORMAT\nno format at all"]
    assert "prompt 1 of 8, step 1; 32 rollouts in all" in browser.text(".controls")[0]
    browser.press("ARROW_LEFT")  # there is none before the first
    assert shown(browser)[0] == "question 1.0?"
    for question in ("1.1", "2.0", "2.1"):
        browser.press("ARROW_RIGHT")
        assert shown(browser) == (f"question {question}?", answers)
    browser.press("ARROW_LEFT")
    assert shown(browser)[0] == "question 2.0?"
    browser.press("ENTER", "[name=forth]")
    browser.press("ENTER", "[name=forth]")
    assert shown(browser)[0] == "question 3.0?"
    browser.press("ENTER", "[name=back]")
    assert shown(browser)[0] == "question 2.1?"
    browser.set("step", "4")
    assert "prompt 1 of 2, step 4; 8 rollouts in all" in browser.text(".controls")[0]
    browser.set("valid", "0")
    assert shown(browser) == ("question 4.0?", []) and len(browser.text(".browser .card")) == 1
    browser.set("valid", "1")
    browser.set("least", "0.4")
    assert shown(browser) == ("question 4.0?", answers[1:])
    browser.set("most", "0.5")
    assert shown(browser) == ("question 4.0?", answers[1:2])
    (card,) = browser.text(".browser .card")
    assert "valid" in card and "reward 0.5" in card and "accuracy 1" in card
    assert "advantage 0.5" in card and "length 12" in card
    browser.press("ARROW_RIGHT", "[name=most]")  # who types a number does not turn the page
    assert shown(browser)[0] == "question 4.0?"
    browser.set("most", "0.1")
    assert browser.text(".browser .card") == [] and browser.text(".browser .prompt") == []
    assert "no rollout is like this" in browser.text(".controls")[0]
    for name in ("step", "valid", "least", "most"):
        browser.set(name, "")
    assert shown(browser) == ("question 1.0?", answers)
    assert browser.complaints() == []


def test_browser_orders_searches_and_judges(tmp_path, run, browser):
    make(tmp_path, steps(4, loss=1.0), stage="rlvr", algorithm="grpo")
    jsonl(tmp_path / "rollouts.jsonl", rollouts(4, prompts=2, stage="rlvr"))
    run(tmp_path)
    browser.open(tmp_path / "report.html")
    answers = [f"ANSWER\n{b}" for b in (1, 2, 3)]
    browser.set("order", "1")
    assert shown(browser) == ("question 1.0?", answers[::-1])
    browser.set("order", "-1")
    assert shown(browser) == ("question 1.0?", answers)
    judged = browser.text(".browser .card > :nth-child(2)")
    assert judged == ["wrong", "wrong", "right", "wrong"]
    browser.set("words", "BRANCH 3")
    assert shown(browser) == ("question 1.0?", answers[2:])
    assert "prompt 1 of 8, step 1; 8 rollouts in all" in browser.text(".controls")[0]
    browser.set("words", "question 3.1")  # of the prompt: all its rollouts
    assert shown(browser) == ("question 3.1?", answers)
    assert "prompt 1 of 1, step 3; 4 rollouts in all" in browser.text(".controls")[0]
    browser.press("ARROW_RIGHT", "[name=words]")
    assert browser.complaints() == []


def test_on_a_telephone(tmp_path, run, browser):
    """390 pixels wide: labels of bars are horizontal and inside, legends take no plot its room."""
    for name in ("base", "sft", "align", "sft_grpo", "align_grpo"):
        lines = steps(9 if name == "sft" else 90, loss=1.0, entropy=[float(i) for i in range(90)])
        make(tmp_path / name, lines, RESULT, stage="rlvr")
    run(tmp_path)
    size = {"width": 390, "height": 800, "deviceScaleFactor": 1, "mobile": True}
    browser.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    try:
        browser.open(tmp_path / "report.html")
        browser.draw_all()
        assert browser.run("return document.documentElement.scrollWidth") == 390
        height = "e => e.getBoundingClientRect().height"
        find = "return [...document.querySelectorAll(arguments[0])].map"
        labels = browser.run(f"{find}({height})", ".bartext")
        assert len(labels) == 10 and all(10 < label < 20 for label in labels)
        plots = browser.run(f"{find}({height})", "figure .cartesianlayer .plotbg, .bglayer .bg")
        assert len(plots) >= 4 and min(plots) > 150
    finally:
        browser.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    assert browser.complaints() == []


def test_browser_shows_images_scores_and_supervision(tmp_path, run, browser):
    for name in ("a", "b"):
        Image.new("RGB", (64, 32), "red").save(tmp_path / f"{name}.png")
    make(tmp_path, steps(2, loss=1.0), RESULT, stage="align")
    rows = rollouts(2, images=[tmp_path / "a.png", tmp_path / "b.png"])
    for row in rows:
        row["images"].append("gone.png")
    jsonl(tmp_path / "rollouts.jsonl", rows)
    jsonl(tmp_path / "test.jsonl", [{"question": "wrong one?", "image": "a.png"}])
    where = {"where": f"{tmp_path}/test.jsonl:1", "answer": "3"}
    jsonl(tmp_path / "generations.jsonl", [{**where, "response": RESPONSE, "correct": False}])
    run(tmp_path)
    browser.open(tmp_path / "report.html")
    widths = "return [...document.querySelectorAll('img')].map(e => e.complete && e.naturalWidth)"
    browser.wait("[...document.querySelectorAll('img')].every(e => e.complete)")
    assert browser.run(widths) == [64, 64]  # of the prompt and of the wrong answer
    (prompt,) = browser.text(".browser .prompt")
    assert "image not shown: gone.png, no such file" in prompt and "2 or two p.jsonl:0" in prompt
    blocks = ["CAPTION\nTwo digits.", "THINK\n1 + 1 = 2.", "ANSWER\n2"]
    assert browser.text(".browser .prompt span[class]:not(.small)") == blocks
    assert browser.text(".browser .card table")[1].split() == (
        "score perception reasoning rollout 0.25 -0.25 supervision 1.25 0.75".split()
    )
    assert browser.text(".browser .card table")[0].split()[3:6] == ["rollout", "0", "–"]
    assert "advantage from" in browser.text(".controls")[0]  # where no rollout has a reward
    browser.set("least", "0.5")
    assert browser.text(".browser .card .answer") == ["ANSWER\n2", "ANSWER\n3"]
    (card,) = browser.text(".wrong .card")
    assert "wrong one?" in card and "ground truth 3" in card and "1 + 1 = 2." in card
    assert browser.complaints() == []


def test_plots_are_drawn_in_light_and_dark(tmp_path, run, browser):
    make(tmp_path / "sft", steps(60, loss=[1 / (i + 1) for i in range(60)], entropy=0.5), RESULT)
    make(tmp_path / "align", steps(60, loss=1.0, entropy=0.25), RESULT, stage="align")
    run(tmp_path)
    for path in (tmp_path, tmp_path / "sft"):
        seen = []
        for dark in (False, True):
            browser.open(path / "report.html", dark)
            browser.draw_all()
            seen.append(
                browser.run(
                    "return ['.trace path.js-line, .trace .point path', '.gtitle, .xtitle']"
                    ".map(s => getComputedStyle(document.querySelector(s)))"
                    ".map(style => style.stroke + style.fill)"
                    ".concat(getComputedStyle(document.body).backgroundColor)"
                )
            )
        assert all(light != dark for light, dark in zip(*seen))
    wide = "return document.documentElement.scrollWidth <= innerWidth"
    assert browser.run(wide)
    assert browser.text("figure .legendtext, figure .xtitle")
    assert browser.complaints() == []


def test_the_study_as_a_page(tmp_path, browser):
    """Of the committed results: each arm with its interval, the two plots, the game, the routing
    of every layer, all drawn, wide and narrow."""
    study.page(tmp_path / "report.html")
    for dark, width in ((False, 1400), (True, 700)):
        browser.driver.set_window_size(width, 900)
        browser.open(tmp_path / "report.html", dark)
        browser.draw_all()
        assert browser.run("return document.documentElement.scrollWidth <= innerWidth")
    browser.driver.set_window_size(1400, 1000)
    titles = browser.text("h2")
    assert {"Arms and controls", "Drift by stage", "The game"} <= set(titles)
    found = study.results()
    cells = browser.text("table")[0]
    for arm in {arm for arm, _ in found} & {*study.ARMS, *study.CONTROLS}:
        mean, *ends = study.of(found, arm, "accuracy")
        half = f"\xa0±\xa0{ends[1] - mean:.3f}" if ends else ""
        assert study.label(arm) in cells and f"{mean:.3f}{half}" in cells
    plots = browser.text("figcaption")
    assert plots[:2] == ["Accuracy over RL", "Accuracy over the alignment's data"]
    assert "Routing in the perception view" in plots
    game = next(result["curves"] for (arm, _), result in found.items() if arm == "prism")
    layers = len(game["expert_share_perception"])
    assert len(browser.text("tr td[style]")) == 2 * layers * 4
    assert browser.complaints() == []


def test_hostile_page_runs_nothing(tmp_path, run, browser):
    path = hostile(tmp_path / "<b>&amp;<i onclick=evil()>")
    run(path)
    run(tmp_path)
    for page in (path, tmp_path):
        browser.open(page / "report.html")
        browser.draw_all()
        assert browser.run("return window.evil") is None
        assert browser.run("return document.querySelectorAll('img').length") == 0
        assert browser.complaints() == []
    assert path.name in browser.text("figure .xtick")  # plotly reads a little markup in names
    browser.open(path / "report.html")
    assert EVIL in browser.text("figcaption")  # a metric's name
    assert EVIL in browser.text(".browser .prompt")[0]
    assert any(EVIL in text for text in browser.text(".browser .card .outside"))


def test_strange_responses_take_no_time(tmp_path, run, browser):
    make(tmp_path, [{"step": 1, "loss": 1e299}, {"step": 10**18, "loss": -1e299}])
    strange = ["<caption>" * 8192, "<caption>x</caption>" * 4000, "", "a" * 50_000]
    strange += ["<caption>1</think></caption><think>2", "<answer></answer>"]
    long = {"question": "q" * 400, "row": "w" * 300, "answer": ["z" * 300], "n" * 90: "v" * 300}
    rows = [{"step": 1, "response": text, "reward": 10**400, **long} for text in strange]
    jsonl(tmp_path / "rollouts.jsonl", rows)
    start = time.monotonic()
    run(tmp_path)
    browser.open(tmp_path / "report.html")
    browser.draw_all()
    assert time.monotonic() - start < 15  # where the time is quadratic, it is minutes
    texts = browser.text(".browser .card .text")
    assert texts[0] == "OUTSIDE THE FORMAT\n" + "<caption>" * 8192
    assert texts[1].startswith("CAPTION\nx\nCAPTION\nx\n") and texts[2] == "(empty)"
    assert texts[4:] == ["CAPTION\n1</think>\nOUTSIDE THE FORMAT\n<think>2", "ANSWER"]
    for wide in (700, 1400):  # nothing sticks out to the right
        browser.driver.set_window_size(wide, 1000)
        assert browser.run("return document.documentElement.scrollWidth <= innerWidth")
    assert browser.complaints() == []


def test_a_long_run_opens_in_two_seconds(tmp_path, run, browser):
    """200 steps with 64 rollouts each: below 20 MB, and open with its first plots in 2 s."""
    for i in range(200):
        Image.effect_noise((640, 480), 60).save(tmp_path / f"{i}.jpg")
    names = ("loss", "reward", "accuracy", "entropy", "grad_norm", "response_length", "ratio_max")
    metrics = {name: [(i * 37 % 101) / 101 for i in range(200)] for name in names}
    make(tmp_path, steps(200, **metrics), RESULT, stage="align")
    rows = rollouts(200, prompts=4, n=16, images=list(tmp_path.glob("*.jpg")), words=120)
    jsonl(tmp_path / "rollouts.jsonl", rows)
    run(tmp_path)
    path = tmp_path / "report.html"
    (shelf,) = Page(path).shelves
    assert sum(len(group["branches"]) for group in shelf["groups"]) == len(rows) == 12_800
    assert 10e6 < path.stat().st_size < 20e6
    seconds = [math.inf]
    while min(seconds) >= 2 and len(seconds) <= 5:  # other tests may hold the cores for a while
        browser.driver.get("about:blank")
        start = time.monotonic()
        browser.open(path)
        browser.wait("document.querySelector('figure').dataset.drawn === 'yes'")
        seconds.append(time.monotonic() - start)
    assert min(seconds) < 2, seconds
    browser.wait("[...document.querySelectorAll('img')].every(e => e.naturalWidth > 0)")
    start = time.monotonic()
    browser.press("ARROW_RIGHT")
    assert shown(browser)[0] == "question 1.1?" and time.monotonic() - start < 2
    assert browser.complaints() == []
    print(f"{path.stat().st_size / 1e6:.1f} MB, open in {min(seconds):.2f} s")
