"""The pages of support/report.py: what a reader finds on the page of a run and on the comparison of
runs. test_report_received.py has logs that others wrote, test_report_browser.py a real browser."""

import base64
import json
import subprocess
import sys

import pytest
from PIL import Image

from support import plots, report
from tests.conftest import ROOT
from tests.pages import (
    EVIL,
    RESPONSE,
    RESULT,
    Page,
    jsonl,
    make,
    reporter,
    rollouts,
    steps,
    stretches,
)


@pytest.fixture
def run(monkeypatch, capsys):
    return reporter(monkeypatch, capsys)


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
