"""The report in Chromium, where it is installed: filters, keys, plots, telephones, long runs."""

import math
import shutil
import tempfile
import time
from pathlib import Path

import pytest
from PIL import Image

from benchmarks import study
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
