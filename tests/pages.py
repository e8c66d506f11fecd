"""Run directories to make a report of, and the report as a browser takes it."""

import base64
import gzip
import hashlib
import itertools
import json
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from support import report

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


def reporter(monkeypatch, capsys):
    """run(DIR, ...) -> what was printed to (stdout, stderr)."""

    def call(*words):
        monkeypatch.setattr(sys, "argv", ["report.py", *map(str, words)])
        report.report()
        return capsys.readouterr()

    return call


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
