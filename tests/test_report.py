"""report.py: what a reader finds on the pages, and that nothing in the data can break or script them."""

import base64
import json
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

import report

ROOT = Path(report.__file__).parent
EVIL = "<script>alert('x')</script>\"><img src=x onerror=alert(1)>"
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
    """The page as a browser takes it: elements with their attributes, text, and whether every tag is closed."""

    def __init__(self, path):
        super().__init__()
        self.open, self.elements, self.texts = [], [], []
        self.source = Path(path).read_text(encoding="utf-8")
        self.feed(self.source)
        assert not self.open
        assert not {"script", "link", "iframe", "object"} & {tag for tag, _ in self.elements}
        for _, attributes in self.elements:
            assert not any(name.startswith("on") for name in attributes)
            assert attributes.get("src", "data:image/").startswith("data:image/")
            assert not attributes.get("href", "").startswith(("http", "//", "javascript"))

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)

    @property
    def text(self):
        return "".join(self.texts)

    def figure(self, title: str) -> str:
        """The markup of one plot."""
        return self.source.split(f"<figcaption>{title}</figcaption>")[1].split("</figure>")[0]


def jsonl(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def make(path: Path, rows: list[dict], result: dict | None = None, **fields) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    if rows:
        jsonl(path / "metrics.jsonl", rows)
        (path / "config.json").write_text(json.dumps({"model_type": "qwen3_vl", "run": fields}))
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


@pytest.fixture
def run(monkeypatch, capsys):
    """run(DIR) -> what was printed to (stdout, stderr)."""

    def call(path):
        monkeypatch.setattr(sys, "argv", ["report.py", str(path)])
        report.report()
        return capsys.readouterr()

    return call


def test_curves_have_gaps_where_nothing_was_measured(tmp_path, run):
    loss = [3.0, 2.0, None, 1.5, float("nan"), 1.0, 0.5]
    make(
        tmp_path,
        steps(7, loss=loss, entropy=[None] * 7, packs=1),
        num_train_epochs=1.0,
        model="some/model",
    )
    run(tmp_path)
    page = Page(tmp_path / "report.html")
    assert page.figure("Loss").count("<polyline") == 2 and page.figure("Loss").count("<circle") == 1
    assert "step 3\nloss: –" in page.text and "step 1\nloss: 3" in page.text  # tooltips
    assert "Entropy" not in page.text  # never measured
    assert "The same in every step: packs 1" in page.text
    assert "SFT, 7 steps, 14 s of training" in page.text and "some/model" in page.text


def test_running_mean_keeps_gaps_and_leaves_them_out(tmp_path, run):
    make(tmp_path, steps(60, loss=[2.0] * 30 + [None] + [4.0] * 29), num_train_epochs=1.0)
    run(tmp_path)
    assert Page(tmp_path / "report.html").figure("Loss").count("<polyline") == 2 + 2  # thin, thick
    points = [(1, 2.0), (2, None), (3, 4.0), (4, 9.0), (5, 2.0)]
    assert report.running_mean(points, 3) == [(1, 2.0), (2, None), (3, 6.5), (4, 5.0), (5, 5.5)]


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
    make(tmp_path, lines, format_penalty=1.5)
    run(tmp_path)
    page = Page(tmp_path / "report.html")
    gaps = page.figure("Score gap by view: supervision - policy")
    assert (
        gaps.count("<polyline") == 4 and gaps.count("<circle") == 0
    )  # each: thin, and thick for the mean
    assert (
        "score_gap_perception" in gaps
        and "score_gap_reasoning" in gaps
        and "thick: mean over 3 steps" in gaps
    )
    assert (
        "Experts at step 50" in page.text
        and "perception, layer 1" in page.text
        and "even would be 0.250" in page.text
    )
    assert "perception: expert 0: 0.2" in page.figure(
        "Routing in the perception view, mean over layers"
    )
    assert "out of the picture: 1 values, up to 500" in page.figure("Seconds, by phase")


def test_hostile_text_is_text(tmp_path, run):
    row = {
        "step": 1,
        "row": EVIL,
        "question": "<image>" + EVIL,
        "images": [EVIL],
        "answer": [EVIL],
        "advantage": 1.0,
        "response": f"{EVIL}<caption>{EVIL}</caption><think>\ud800</think><answer>{EVIL}</answer>",
        EVIL: 1.0,
    }
    run_dir = tmp_path / "a<b>&'c"
    make(
        run_dir,
        steps(2, **{EVIL: [1.0, 2.0]}),
        {**RESULT, "data": EVIL, "by_source": {EVIL: {"accuracy": 0.5}}},
        **{EVIL: EVIL, "algorithm": EVIL},
    )
    jsonl(run_dir / "rollouts.jsonl", [row])
    wrong = {"where": EVIL, "source": EVIL, "answer": [EVIL], "response": EVIL, "correct": False}
    jsonl(run_dir / "generations.jsonl", [wrong])
    run(run_dir)
    page = Page(run_dir / "report.html")  # asserts that no element came of it
    assert page.text.count(EVIL) > 10
    run(tmp_path)
    page = Page(tmp_path / "report.html")
    assert ("a", {"href": "a%3Cb%3E%26%27c/report.html"}) in page.elements


def test_rollouts(tmp_path, run):
    Image.new("RGB", (1600, 400), "red").save(tmp_path / "big.png")
    rows = [
        {
            "step": step,
            "row": "p.jsonl:1",
            "question": f"question {step}?",
            "answer": ["2", "two"],
            "images": [str(tmp_path / "big.png"), "gone.png"],
            "response": RESPONSE if i else "no format at all",
            "advantage": i - 2.0,
            "length": 10.0 + i,
            "score_perception": 0.5 if i else float("nan"),
        }
        for step in (1, 2, 3, 4, 5)
        for i in range(6)
    ]
    make(tmp_path, steps(5, reward=0.5), algorithm="grpo")
    jsonl(tmp_path / "rollouts.jsonl", rows)
    run(tmp_path)
    page = Page(tmp_path / "report.html")
    assert [f"question {step}?" in page.text for step in (1, 2, 3, 4, 5)] == [
        True,
        False,
        True,
        False,
        True,
    ]
    assert "RLVR, grpo" in page.text and "ground truth 2 or two" in page.text
    kinds = [attributes.get("class") for tag, attributes in page.elements if tag == "span"]
    assert (
        kinds.count("caption"),
        kinds.count("think"),
        kinds.count("answer"),
        kinds.count("outside"),
    ) == (9, 9, 9, 3)
    for length in (10, 11, 14, 15):  # two of lowest, two of highest advantage
        assert page.text.count(f"length {length}") == 3
    assert "length 12" not in page.text and "score_perception –" in page.text
    assert page.text.count("image not shown: gone.png, no such file") == 3
    images = [attributes["src"] for tag, attributes in page.elements if tag == "img"]
    (tmp_path / "inside.jpeg").write_bytes(base64.b64decode(images[0].partition(",")[2]))
    assert len(images) == 3 and Image.open(tmp_path / "inside.jpeg").size == (480, 120)


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
    run(tmp_path / "run")
    page = Page(tmp_path / "run" / "report.html")
    assert "Wrong answers, 12 of 20" in page.text and page.source.count("data:image/png") == 12
    assert "question 3?" in page.text and "question 4?" not in page.text
    assert "count" in page.text and "0.750" in page.text  # by source
    data.unlink()
    _, err = run(tmp_path / "run")
    assert (
        "test.jsonl is gone" in err
        and "is gone: wrong answers" in Page(tmp_path / "run" / "report.html").text
    )


def test_comparison(tmp_path, run):
    make(
        tmp_path / "align_grpo",
        steps(50, accuracy=[i / 50 for i in range(50)], loss=0.1),
        {**RESULT, "accuracy": 0.75},
        algorithm="grpo",
    )
    make(tmp_path / "sft_grpo", steps(50, accuracy=0.5, loss=0.2), RESULT, algorithm="grpo")
    make(
        tmp_path / "sft",
        steps(10, loss=[10.0 - i for i in range(10)], entropy=1.0),
        {"accuracy": float("nan"), "rows": 1},
        num_train_epochs=1.0,
    )
    make(tmp_path / "base", [], RESULT)
    make(
        tmp_path / "discriminator",
        [
            *steps(3, loss=1.0),
            {
                "step": 3,
                "time/step": 1.0,
                "validation_pairs": 7,
                "validation_pair_accuracy_reasoning": 0.875,
            },
        ],
        validation_share=0.1,
    )
    make(tmp_path / "zz_other", [], RESULT)
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
    assert [line.split()[0] for line in out.splitlines()] == [
        "name",
        "base",
        "SFT",
        "SFT+GRPO",
        "PRISM+GRPO",
        "zz_other",
        "written",
    ]
    assert out.splitlines()[2].split() == ["SFT", "–", "–", "–", "–", "20.000"]
    assert (
        err.strip()
        == f"note: PRISM is left out: no eval.json; python eval.py --ckpt {tmp_path / 'align'} makes it"
    )
    page = Page(tmp_path / "report.html")
    arms = page.figure("accuracy")
    assert (
        "SFT+GRPO: 0.5" in arms and "PRISM+GRPO: 0.24" in arms and arms.count("<polyline") == 2 + 2
    )
    assert (
        "SFT+GRPO: 0.2" in page.figure("loss (RLVR, grpo)") and "loss (SFT)" not in page.text
    )  # which only one run has
    assert "% of the run" in page.figure("time/step")  # 10 steps beside 50
    links = [attributes["href"] for tag, attributes in page.elements if tag == "a"]
    assert links == [
        f"{name}/report.html"
        for name in ("base", "sft", "sft_grpo", "align_grpo", "discriminator", "zz_other")
    ]
    assert all((tmp_path / link).exists() for link in links)
    held = Page(tmp_path / "discriminator" / "report.html")
    assert (
        "Held-out pairs" in held.text
        and "0.875" in held.text
        and "discriminator warm-up, 3 steps, 7 s" in held.text
    )


def test_killed_run(tmp_path, run):
    make(tmp_path, steps(3, loss=[3.0, 2.0, 1.0]), num_train_epochs=1.0)
    (tmp_path / "config.json").write_text(json.dumps({"run": {"num_train_epochs": 1.0}}))
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "lo')
    _, err = run(tmp_path)
    page = Page(tmp_path / "report.html")
    for told in (err, page.text):
        assert (
            "metrics.jsonl: the last line (4) is only half written" in told
            and "has not ended" in told
        )
    assert "SFT, 3 steps" in page.text and page.figure("Loss").count("<polyline") == 1
    (tmp_path / "metrics.jsonl").write_text("")  # killed before the first step
    run(tmp_path)
    assert "no training steps" in Page(tmp_path / "report.html").text


@pytest.mark.parametrize(
    "prepare, told",
    [
        (lambda path: path / "missing", "no such directory"),
        (lambda path: path, "neither a run"),
        (
            lambda path: (path / "metrics.jsonl").write_text('{"step": 1}\n{"st\n{}\n') and path,
            "metrics.jsonl:2: not JSON",
        ),
        (
            lambda path: (path / "eval.json").write_text('{"accuracy": 0.') and path,
            "eval.json: not JSON",
        ),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(tmp_path, prepare, told):
    path = prepare(tmp_path)
    done = subprocess.run(
        [sys.executable, ROOT / "report.py", path], capture_output=True, text=True
    )
    assert done.returncode == 2 and done.stdout == ""
    assert (
        done.stderr.startswith("error: ") and told in done.stderr and done.stderr.count("\n") == 1
    )


def test_starts_without_torch(tmp_path):
    code = "import report, sys; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
