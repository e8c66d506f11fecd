"""A page to look at: what a run did, or how several runs compare. One file, no network.

    python report.py out/demo/align     a run's directory (metrics.jsonl or eval.json):
                                        DIR/report.html with its settings, curves, a browser of
                                        its rollouts, evaluation and wrong answers
    python report.py out/demo           a directory of such directories: a table on the terminal,
                                        DIR/results.json with a row for each evaluated run,
                                        DIR/report.html, and a report.html in each run

Everything on a page comes from files, and none of it is trusted. Markup is escaped, data stand in
JSON that the page reads as text, and the browser is told to run the page's own two scripts only.
What is missing, broken or too large for a page is left out, counted, and said on the page.
"""

import argparse
import base64
import contextlib
import functools
import gzip
import hashlib
import html
import io
import itertools
import json
import math
import os
import re
import sys
from collections import Counter
from urllib.parse import quote

from rows import UserError

NAMES = {"base": "base", "sft": "SFT", "align": "PRISM"}  # in the order in which they are shown
NAMES |= {"sft_grpo": "SFT+GRPO", "align_grpo": "PRISM+GRPO"}
STAGES = {"sft": "SFT", "align": "alignment", "rlvr": "RLVR"}
STAGES |= {"discriminator": "discriminator warm-up"}
SHOWN = ("accuracy", "caption_accuracy", "format_valid", "mean_response_tokens")
VIEWS = ("perception", "reasoning")
# title, what the vertical axis counts, metrics; what is in no group gets a plot of its own
GROUPS = [
    ("Loss", "loss", ["loss"]),
    ("Reward, accuracy, format", "share or reward", ["reward", "accuracy", "format_valid"]),
    ("Score gap by view: supervision - policy", "score", [f"score_gap_{v}" for v in VIEWS]),
    ("Pair accuracy: supervision above policy", "share", [f"pair_accuracy_{v}" for v in VIEWS]),
    ("Scores", "score", [f"score_{side}_{v}" for v in VIEWS for side in ("teacher", "student")]),
    ("Discriminator loss", "loss", ["discriminator_loss"]),
    ("Groups whose rollouts differ in accuracy", "share of groups", ["groups_with_spread"]),
    ("Response length", "tokens", ["response_length"]),
    ("Entropy", "nats per token", ["entropy"]),
    ("Gradient norm, before clipping", "norm", ["grad_norm", "d_grad_norm"]),
    ("Learning rate", "rate", ["learning_rate", "d_learning_rate"]),
    ("Importance ratio", "ratio", ["ratio_max", "ratio_min"]),
    ("Tokens clipped", "share of tokens", ["clipped_high", "clipped_low"]),
]
for view in VIEWS:
    title, names = f"Routing in the {view} view", [f"{view}: expert {e}" for e in range(16)]
    GROUPS.append((f"{title}, mean over layers", "part of choices", names))
OVERLAID = (
    *("accuracy", "reward", "format_valid", "loss"),
    *(f"{name}_{view}" for name in ("score_gap", "pair_accuracy") for view in VIEWS),
    *("response_length", "entropy", "grad_norm", "learning_rate", "time/step"),
)
DASHES = ("solid", "dash", "dot", "dashdot", "solid", "longdash")  # beside the colours --c0 to --c5
# A page's budgets; with the plotting library's 2 MB and a thousand points a curve, below 20 MB.
TEXT_BYTES, WRONG_BYTES, IMAGE_BYTES = 11.5e6, 0.5e6, 3.5e6  # rollouts, wrong answers, images
LONGEST = 100_000  # characters of one text
LARGEST = 64e6  # pixels of an image that is still opened
COLUMNS = 24  # measured values of a rollout
MOST_PLOTS = 40  # of metrics that are in no group
STYLE = """
:root{color-scheme:light dark;--paper:#fff;--ink:#1a1a1a;--dim:#555;--line:#d4d4d4;--fill:#f3f4f5;
--warn:#fff6dc;--bad:#b00020;--badfill:#fdecee;--c0:#0064a8;--c1:#c4500a;--c2:#00805c;--c3:#a8338a;
--c4:#7a6400;--c5:#555}
@media(prefers-color-scheme:dark){:root{--paper:#15181c;--ink:#e4e6e8;--dim:#a4abb3;--line:#3b4148;
--fill:#20252b;--warn:#3a3115;--bad:#ff8f9c;--badfill:#3c1d22;--c0:#6cb6ff;--c1:#ff9e64;
--c2:#5fd3a5;--c3:#e58fd0;--c4:#d9c25a;--c5:#b4b4b4}}*{box-sizing:border-box}
body{font:16px/1.5 system-ui,'Segoe UI','DejaVu Sans',sans-serif;color:var(--ink);
background:var(--paper);max-width:1360px;margin:0 auto;padding:0 20px 60px}
h1{margin:28px 0 4px;overflow-wrap:anywhere}
h2{margin:38px 0 10px;border-bottom:1px solid var(--line)}a{color:var(--c0)}
p,.prompt{overflow-wrap:anywhere}summary{cursor:pointer}
.note{background:var(--warn);border-left:4px solid var(--c4);padding:6px 12px;margin:8px 0}
.small{color:var(--dim);font-size:14px;overflow-wrap:anywhere}figure{margin:0;min-width:0}
figcaption{font-weight:600;overflow-wrap:anywhere}.plot{min-height:300px}
.plots{display:grid;gap:22px;grid-template-columns:repeat(auto-fill,minmax(min(520px,100%),1fr))}
.scroll{overflow-x:auto;margin:12px 0}table{border-collapse:collapse;font-size:15px}
th,td{padding:4px 12px;border-bottom:1px solid var(--line);text-align:right;
font-variant-numeric:tabular-nums}th:first-child,td:first-child{text-align:left}
th{background:var(--fill)}
.fields{columns:3 320px;font-size:14px;overflow-wrap:anywhere;margin-top:8px}
.fields b{font-weight:400;color:var(--dim)}
.controls{position:sticky;top:0;z-index:2;background:var(--paper);padding:8px 0;display:flex;
flex-wrap:wrap;gap:8px 14px;align-items:center;font-size:15px}.controls input{width:84px}
button,select,input{font:inherit;padding:3px 9px;color:inherit;background:var(--fill);
border:1px solid var(--line);border-radius:5px}button:disabled{opacity:.45}
.panes{display:grid;grid-template-columns:minmax(250px,370px) minmax(0,1fr);gap:18px;
align-items:start}
.panes>.prompt{position:sticky;top:56px;max-height:calc(100vh - 66px);overflow-y:auto}
.cards{display:grid;gap:14px;align-items:start;
grid-template-columns:repeat(auto-fill,minmax(min(300px,100%),1fr))}
.card{border:1px solid var(--line);border-radius:6px;padding:10px;min-width:0}
.card .text{max-height:720px;overflow-y:auto}.card .text span{max-height:250px;overflow-y:auto}
.text{white-space:pre-wrap;overflow-wrap:anywhere;font-size:14.5px;margin:4px 0}
.text span{display:block;border-left:4px solid var(--dim);background:var(--fill);padding:2px 8px;
margin:3px 0}.text .caption{border-color:var(--c0)}
.text .answer{border-color:var(--c2);font-weight:600}
.text .outside{border-color:var(--bad);background:var(--badfill)}
.text b,h4{display:block;font-size:12px;margin:0;text-transform:uppercase;color:var(--dim)}
h4{margin-top:12px}.card table{font-size:13.5px;margin:6px 0}.card td,.card th{padding:1px 6px}
.chip{display:inline-block;background:var(--fill);border-radius:4px;padding:1px 7px;
margin:2px 4px 0 0;font-size:13px;overflow-wrap:anywhere}
.bad{color:var(--bad);background:var(--badfill)}
.picture{border:1px solid var(--line);max-width:100%;display:block;margin:4px 0}
.tiny{image-rendering:pixelated;min-width:180px}
@media(max-width:1100px){.panes>.prompt{top:98px}}
@media(max-width:820px){th,td{padding:4px 6px;font-size:13.5px}.panes{
grid-template-columns:minmax(0,1fr)}.panes>.prompt{position:static;max-height:none}}
"""
# What runs on the page. Data reach the document by text nodes and by an image's src, never as
# markup. The plots are drawn when they come into view, since drawing them takes most of the time.
SCRIPT = r"""
"use strict";
const $ = (tag, props, ...children) => {
  const node = Object.assign(document.createElement(tag), props);
  node.append(...children.filter(child => child != null));
  return node;
};
const read = place => JSON.parse(place.querySelector(":scope > script").textContent);
const show = value => value == null ? "–" : typeof value !== "number" ? String(value)
  : Number.isInteger(value) ? String(value) : String(Number(value.toPrecision(4)));

let library;
const plotly = () => library ??= (async () => {
  const packed = document.getElementById("plotly").textContent;
  const bytes = Uint8Array.from(atob(packed), letter => letter.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  document.head.append($("script", {textContent: await new Response(stream).text()}));
})();
async function draw(figure) {
  await plotly();
  const {data, layout} = read(figure), style = getComputedStyle(document.body);
  const color = name => style.getPropertyValue("--" + name).trim();
  for (const trace of data)
    for (const part of ["line", "marker", "error_y"])
      if (trace[part]) trace[part].color = color("c" + trace.meta);
  const axis = {gridcolor: color("line"), zerolinecolor: color("dim"), automargin: true};
  const hover = {unifiedhovertitle: {text: layout.xaxis.title.text + " %{x}"}};
  const place = figure.querySelector(".plot");
  await Plotly.react(place, data, {
    ...layout, xaxis: {...axis, ...hover, ...layout.xaxis}, yaxis: {...axis, ...layout.yaxis},
    height: 300, margin: {l: 56, r: 12, t: 8, b: 56}, hovermode: "x unified",
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
    legend: {orientation: "h", yref: "container", y: 0, yanchor: "bottom"},
    font: {color: color("ink"), size: 12.5},
    hoverlabel: {bgcolor: color("paper"), font: {color: color("ink")}, namelength: 60},
  }, {responsive: true, displayModeBar: false});
  figure.dataset.drawn = "yes";
}
const sight = new IntersectionObserver(entries => {
  for (const entry of entries)
    if (entry.isIntersecting) {
      sight.unobserve(entry.target);
      draw(entry.target).catch(error => entry.target.append("not drawn: " + error));
    }
}, {rootMargin: "200px"});
for (const figure of document.querySelectorAll("figure")) sight.observe(figure);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () =>
  document.querySelectorAll("figure[data-drawn]").forEach(draw));

const pictures = read(document.body);
function picture(image) {
  if (typeof image !== "number") return $("p", {className: "small"}, "image not shown: " + image);
  const [src, source, width, height] = pictures[image];
  return $("img", {src, alt: source, title: `${source}, ${width} x ${height}`,
                   className: Math.max(width, height) <= 120 ? "picture tiny" : "picture"});
}
// A response in its blocks: [[class, text], ...]. Each pointer in `next` only moves forward, so
// that the time is linear in the length. What stands outside of the blocks breaks the format.
function blocks(text, most = 60) {
  const tags = [...text.matchAll(/<(\/?)(caption|think|answer)>/g)];
  const next = {caption: 0, think: 0, answer: 0}, found = [];
  let at = 0;
  const outside = end => {
    const piece = text.slice(at, end).trim();
    if (piece) found.push(["outside", piece]);
  };
  tags.forEach(([tag, closes, name], i) => {
    if (closes || tags[i].index < at || found.length >= most) return;
    let j = Math.max(next[name], i + 1);
    while (j < tags.length && !(tags[j][1] && tags[j][2] === name)) j++;
    next[name] = j;
    if (j === tags.length) return;
    outside(tags[i].index);
    found.push([name, text.slice(tags[i].index + tag.length, tags[j].index).trim()]);
    at = tags[j].index + tags[j][0].length;
  });
  outside(text.length);
  return found;
}
const block = ([name, piece]) => $("span", {className: name},
  $("b", {}, name === "outside" ? "outside the format" : name), piece);
const response = text => $("div", {className: "text"}, ...blocks(text).map(block),
  text.trim() ? null : "(empty)");
const prompt = group => $("div", {className: "prompt"}, ...group.images.map(picture),
  $("div", {className: "text question"}, group.question),
  "ground truth ", $("b", {}, group.answer), " ", $("span", {className: "small"}, group.row),
  ...(group.supervision == null ? [] : [$("h4", {}, "supervision"), response(group.supervision)]));
const chip = (text, bad) => $("span", {className: bad ? "chip bad" : "chip"}, text);
function card([text, valid, ...values], names, above) {
  const left = new Map(names.map((name, i) => [name, values[i]])), rows = [];
  for (const [side, before] of [["rollout", ""], ["supervision", "teacher_"]]) {
    const keys = ["perception", "reasoning"].map(view => before + view);
    if (keys.some(key => left.has(key)))
      rows.push($("tr", {}, ...[side, ...keys.map(key => show(left.get(key)))].map(cell =>
        $("td", {}, cell))));
    keys.forEach(key => left.delete(key));
  }
  const head = ["score", "perception", "reasoning"].map(cell => $("th", {}, cell));
  return $("div", {className: "card"}, above, response(text),
    rows.length ? $("table", {}, $("tr", {}, ...head), ...rows) : null,
    valid == null ? null : chip(valid ? "valid" : "invalid", !valid),
    ...[...left].map(([name, value]) => chip(name + " " + show(value))));
}
function browse(place) {
  const {names, groups} = read(place), told = $("span", {ariaLive: "polite"});
  const has = at => at > 1 && groups.some(({branches}) => branches.some(b => b[at] != null));
  const by = has(2 + names.indexOf("reward")) ? "reward" : "advantage";
  const column = names.includes(by) ? 2 + names.indexOf(by) : -1;
  const option = (text, value) => $("option", {value}, text);
  const step = $("select", {name: "step"}, option("all steps", ""),
    ...[...new Set(groups.map(group => group.step))].map(s => option("step " + s, s)));
  const valid = $("select", {name: "valid"}, option("valid or not", ""), option("valid", "1"),
    option("invalid", "0"));
  const least = $("input", {type: "number", step: "any", name: "least"});
  const most = $("input", {type: "number", step: "any", name: "most"});
  const back = $("button", {name: "back"}, "← previous"), forth = $("button", {name: "forth"},
    "next →");
  const panes = $("div", {className: "panes"});
  let found, at;
  const fits = branch => (valid.value === "" || branch[1] === Number(valid.value))
    && (least.value === "" || typeof branch[column] === "number" && branch[column] >= least.value)
    && (most.value === "" || typeof branch[column] === "number" && branch[column] <= most.value);
  function turn(to) {
    at = Math.max(0, Math.min(to, found.length - 1));
    [back.disabled, forth.disabled] = [at <= 0, at >= found.length - 1];
    const count = found.reduce((sum, [, branches]) => sum + branches.length, 0);
    told.textContent = found.length ? `prompt ${at + 1} of ${found.length}, step `
      + `${found[at][0].step}; ${count} rollouts in all` : "no rollout is like this";
    panes.replaceChildren(...(found.length ? [prompt(found[at][0]), $("div", {className: "cards"},
      ...found[at][1].map(branch => card(branch, names)))] : []));
  }
  function filter() {
    found = groups.filter(group => step.value === "" || String(group.step) === step.value)
      .map(group => [group, group.branches.filter(fits)]).filter(([, some]) => some.length);
    turn(0);
  }
  for (const control of [step, valid, least, most]) control.addEventListener("input", filter);
  back.addEventListener("click", () => turn(at - 1));
  forth.addEventListener("click", () => turn(at + 1));
  document.addEventListener("keydown", event => {
    const typing = ["INPUT", "SELECT"].includes(event.target.tagName);
    if (typing || event.ctrlKey || event.altKey || event.metaKey) return;
    if (event.key === "ArrowLeft") turn(at - 1);
    if (event.key === "ArrowRight") turn(at + 1);
  });
  place.append($("div", {className: "controls"}, back, forth, step, valid,
    $("label", {}, by + " from ", least), $("label", {}, "to ", most), told), panes);
  filter();
}
document.querySelectorAll(".browser").forEach(browse);
for (const place of document.querySelectorAll(".wrong")) {
  const {names, groups} = read(place);
  place.append($("div", {className: "cards"}, ...groups.map(group =>
    card(group.branches[0], names, prompt(group)))));
}
document.body.dataset.ready = "yes";
"""


# --------------------------------------------------------------------------------------------------
# Files


def read_lines(path: str, notes: list[str]):
    """The objects of a JSONL file. Lines that are none are counted in a note; a killed run leaves
    half a line at the end, or before the line with which it was resumed."""
    if not os.path.exists(path):
        return
    good, bad, line, name = 0, [], "", os.path.basename(path)
    with open(path, encoding="utf-8", errors="replace") as file:
        for place, line in enumerate(file, 1):
            row = None
            with contextlib.suppress(ValueError, RecursionError):
                row = json.loads(line) if line.strip() else {}
            if not isinstance(row, dict):
                bad.append(place)
            elif row:
                good += 1
                yield row
    told = []
    if bad and not line.endswith("\n"):
        told = [f"the last line ({bad.pop()}) is only half written and was left out; killed run?"]
    if bad and not good:
        raise UserError(f"{path}:{bad[0]}: not JSON; remove the file, or run the stage again")
    if bad:
        told += [f"{len(bad)} broken lines were left out, the first is line {bad[0]}"]
    notes += [f"{name}: {text}" for text in told if f"{name}: {text}" not in notes]


def read_json(path: str) -> dict:
    """A JSON object; {} where there is no such file."""
    if not os.path.exists(path):
        return {}
    try:
        with open(path, encoding="utf-8") as file:
            value = json.load(file)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON ({error}); remove it, or run the stage again") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: holds no JSON object; remove it, or run the stage again")
    return value


def read_run(path: str) -> dict:
    """A run's directory: what all pages need of it."""
    notes: list[str] = []
    lines = list(read_lines(os.path.join(path, "metrics.jsonl"), notes))
    settings = read_json(os.path.join(path, "run.json"))
    fields = settings["run"] if isinstance(settings.get("run"), dict) else {}
    stage = str(settings.get("stage", "a run"))
    stage = STAGES.get(stage, stage) + (f", {fields['algorithm']}" if "algorithm" in fields else "")
    if lines and "model_type" not in read_json(os.path.join(path, "config.json")):
        notes.append("This run has not ended: it has not written its result yet.")
    for line in lines:  # each expert's share of the choices, the mean over layers, is a metric too
        for view in VIEWS:
            for e, shares in enumerate(zip(*expert_shares(line, view))):
                line[f"{view}: expert {e}"] = sum(shares) / len(shares)
    held = [line for line in lines if "validation_pairs" in line]  # no step, but what came of them
    trained = [line for line in lines if "validation_pairs" not in line]
    steps = {step: line for line in trained if (step := number(line.get("step"))) is not None}
    odd = sum(number(line.get("step")) is None for line in trained)
    notes += [f"metrics.jsonl: {odd} lines without a step were left out"] if odd else []
    times = [number(line.get("time/step")) for line in lines]
    name = os.path.basename(os.path.abspath(path))
    return {
        "path": path,
        "name": name,
        "label": NAMES.get(name, name),
        "fields": fields,
        "stage": stage,
        "notes": notes,
        "lines": [steps[step] for step in sorted(steps)],  # of a step that was redone, the last
        "held": held[-1] if held else {},
        "seconds": sum(t for t in times if t is not None) if any(times) else None,
        "eval": read_json(os.path.join(path, "eval.json")),
    }


def expert_shares(line: dict, view: str) -> list[list[float]]:
    """(layers, experts) of a line of metrics; [] where that is not what the line holds."""
    layers = line.get(f"expert_share_{view}")
    good = isinstance(layers, list) and all(isinstance(layer, list) for layer in layers)
    good = good and len({len(layer) for layer in layers} | {0}) == 2
    return layers if good and all(number(x) is not None for row in layers for x in row) else []


def locate(path: str) -> str | None:
    """A file named in a log: relative to where we are, or to the project, where stages run."""
    beside = os.path.join(os.path.dirname(os.path.abspath(__file__)), path)
    return next((p for p in (path, beside) if os.path.isfile(p)), None)


class Pictures:
    """The images of a page, each once, as thumbnails of at most 480 pixels on the long side. When
    half of the budget is spent, they become smaller; from the first that is too large, they are
    dropped."""

    def __init__(self):
        self.places: dict[str, int | str] = {}
        self.kept: list[list] = []
        self.size = self.dropped = 0

    def place(self, source: str) -> int | str:
        """The image's place among the kept ones; or a text that says why it cannot be shown."""
        if source not in self.places:
            self.places[source] = self._add(source)
        return self.places[source]

    def _add(self, source: str) -> int | str:
        from PIL import Image

        name = source if len(source) <= 200 else source[:200] + "..."
        spent = f"{name}, the page's budget for images is spent"
        if self.dropped:  # the others are not even read
            self.dropped += 1
            return spent
        if re.fullmatch(r"\d+ bytes", source):
            return f"{name}, it stands in the data itself"
        if locate(source) is None:
            return f"{name}, no such file"
        try:
            with Image.open(locate(source)) as image:
                size = image.size
                if size[0] * size[1] > LARGEST:
                    return f"{name}, {size[0]} x {size[1]} pixels are too many"
                side = 480 if self.size < IMAGE_BYTES / 2 else 240
                image.draft("RGB", (side, side))  # decodes a JPEG at a smaller scale
                image = image.convert("RGB")
            image.thumbnail((side, side))
            kind = "png" if max(size) <= 240 else "jpeg"
            image.save(buffer := io.BytesIO(), kind)
        except Exception as error:  # Pillow raises many kinds; each means that it cannot be shown
            return f"{name}, {str(error)[:200]}"
        uri = f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
        if self.size + len(uri) > IMAGE_BYTES:
            self.dropped += 1
            return spent
        self.size += len(uri)
        self.kept.append([uri, name, *size])
        return len(self.kept) - 1


# --------------------------------------------------------------------------------------------------
# Text


def escape(value) -> str:
    return html.escape(str(value), quote=True)


def number(value) -> float | None:
    """A number that can be drawn, or None: null, NaN, a missing value, anything that is no number,
    and what is so huge that sums of it would overflow."""
    good = isinstance(value, (int, float)) and not isinstance(value, bool)
    return value if good and abs(value) < 1e300 else None


def show(value, form: str = ".4g") -> str:
    """A value for people; (value, low, high) is one with its interval. An en dash stands where
    there was nothing to measure."""
    if isinstance(value, tuple):
        return f"{show(value[0], form)} [{show(value[1], form)}, {show(value[2], form)}]"
    if value is None or isinstance(value, float) and not math.isfinite(value):
        return "–"
    if isinstance(value, float):
        return format(value, form if abs(value) < 1000 else ".1f" if abs(value) < 1e9 else ".4g")
    with contextlib.suppress(ValueError):  # an integer of thousands of digits has no text
        return str(value) if len(str(value)) <= 500 else str(value)[:500] + "..."
    return "a huge number"


def table(head: list, rows: list[list]) -> str:
    text = lambda cell: escape(show(cell, ".3f")).replace("_", "_<wbr>")  # a line may break there
    cells = lambda row, tag: "".join(f"<{tag}>{text(cell)}</{tag}>" for cell in row)
    body = "".join(f"<tr>{cells(row, 'td')}</tr>" for row in rows)
    return f'<div class="scroll"><table><tr>{cells(head, "th")}</tr>{body}</table></div>'


def pack(value) -> str:
    """JSON that may stand in a script element: without any `<`, it can end or open nothing."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for letter in "<\u2028\u2029":
        text = text.replace(letter, f"\\u{ord(letter):04x}")
    return text


def embed(value) -> str:
    return f'<script type="application/json">{pack(value)}</script>'


@functools.cache
def library() -> tuple[str, str]:
    """plotly.js: the hash by which the browser knows it, and the code, gzip in base64."""
    try:
        from plotly.offline import get_plotlyjs
    except ImportError:
        raise UserError("plotly, which draws the plots, is missing; pip install plotly") from None
    code = get_plotlyjs().encode()
    return digest(code), base64.b64encode(gzip.compress(code, mtime=0)).decode()


def digest(code: bytes) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(code).digest()).decode()}'"


def write_page(path: str, title: str, body: str, pictures: Pictures | None = None) -> None:
    """The page runs the two scripts with these hashes and nothing else, and fetches nothing."""
    known, plots = library()
    policy = (
        f"default-src 'none'; img-src data: blob:; style-src 'unsafe-inline'; "
        f"script-src {digest(SCRIPT.encode())} {known}"
    )
    text = (
        f'<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>"
        f"<body>{embed(pictures.kept if pictures else [])}{body}"
        f"<noscript><p>The plots and rollouts on this page need JavaScript.</p></noscript>"
        f'<script type="text/plain" id="plotly">{plots}</script>'
        f"<script>{SCRIPT}</script></body></html>\n"
    )
    with open(path, "w", encoding="utf-8", errors="replace") as file:  # "replace": lone surrogates
        file.write(text)


# --------------------------------------------------------------------------------------------------
# Plots


def running_mean(points: list[tuple], width: int) -> list[tuple]:
    """The mean of the measured values at most width / 2 places away; a gap stays a gap."""
    totals = list(itertools.accumulate((y or 0.0 for _, y in points), initial=0.0))
    counts = list(itertools.accumulate((y is not None for _, y in points), initial=0))
    ends = lambda i: (max(0, i - width // 2), min(len(points), i + width // 2 + 1))
    mean = lambda a, b: (totals[b] - totals[a]) / (counts[b] - counts[a])
    return [(x, None if y is None else mean(*ends(i))) for i, (x, y) in enumerate(points)]


def plain(text: str) -> str:
    """A text for plotly, which reads a little markup in names and titles."""
    return html.escape(text, quote=False)


def trace(label: str, points: list[tuple], color: int, kind: str) -> dict:
    """One series for plotly. A measurement between two gaps, where no line can go, is a dot; a
    point may be (x, y, low, high), where an error bar reaches from low to high."""
    x, y = [p[0] for p in points], [number(p[1]) for p in points]
    y = [None if value is None else float(f"{value:.6g}") for value in y]
    out = {
        "name": plain(label),
        "x": x,
        "y": y,
        "meta": color % len(DASHES),
        "type": kind,
        "marker": {},
    }
    if kind == "bar":
        out["x"] = list(map(plain, x))
        return out | {"text": [show(value, ".3f") for value in y], "textposition": "outside"}
    around = [None, *y, None]
    alone = [a is None and c is None for a, c in zip(around, around[2:])]
    dots = [6 if dot or len(p) == 4 else 0 for dot, p in zip(alone, points)]
    out |= {"type": "scatter", "mode": "lines+markers" if any(dots) else "lines"}
    out |= {"line": {"width": 2.2, "dash": DASHES[color % len(DASHES)]}, "marker": {"size": dots}}
    if any(len(p) == 4 for p in points):
        ends = [(p[3] - p[1], p[1] - p[2]) if len(p) == 4 else (0, 0) for p in points]
        out["error_y"] = {"type": "data", "symmetric": False, "thickness": 1.2}
        out["error_y"] |= dict(zip(("array", "arrayminus"), map(list, zip(*ends))))
    return out | {"hovertemplate": "%{y:.4g}"}


def plot(
    title: str,
    ylabel: str,
    series: list[tuple[str, list[tuple]]],
    xlabel: str = "step",
    colors: list[int] | None = None,
    top: float | None = None,
    kind: str = "line",
) -> str:
    """series: (label, [(x, y or None) or (x, y, low, high), ...]) each -> a figure, of lines or of
    bars. Shares are drawn from 0 to 1, so that runs compare; what is above `top` runs out of the
    picture. Long series get a running mean, and of very long ones not every step."""
    measured = [y for _, points in series for _, y, *_ in points if number(y) is not None]
    count = len({x for _, points in series for x, *_ in points})
    noisy = kind == "line" and ylabel != "rate" and not any(p[2:] for _, ps in series for p in ps)
    span, skip = count // 25 | 1 if noisy else 1, math.ceil(count / 1000)
    data = []
    for (label, points), color in zip(series, colors or itertools.count()):
        mean = running_mean(points, span) if span > 1 else points
        thick = trace(label, mean[::skip], color, kind)
        if span > 1:
            thin = trace(label, points[::skip], color, kind)
            thin |= {"opacity": 0.4, "line": {"width": 1.2}, "showlegend": False}
            data.append(thin | {"legendgroup": thick["name"]})
            thick |= {"hoverinfo": "skip", "hovertemplate": None, "legendgroup": thick["name"]}
        data.append(thick)
    name = lambda text: {"title": {"text": plain(text), "standoff": 6}}
    layout = {"xaxis": name(xlabel), "yaxis": name(ylabel)}
    layout["showlegend"] = len(series) > 1 or series[0][0] != title.lower()
    if any(isinstance(x, str) for _, points in series for x, *_ in points):
        layout["xaxis"]["type"] = "category"
    low, high = min(measured), max(measured)
    if ylabel.startswith("share") and 0 <= low and high <= 1:
        layout["yaxis"]["range"] = [-0.02, 1.12 if kind == "bar" else 1.02]
    elif top is not None:
        layout["yaxis"]["range"] = [0, top]
    elif high - low <= 1e-9 * max(abs(high), abs(low)):
        layout["yaxis"]["range"] = [0, high * 1.2] if high > 0 else [low - 1, high + 1]
    each = "each step" if skip == 1 else f"one step in {skip}"
    told = [f"thin: {each}, thick: mean over {span} steps"] if span > 1 else []
    above = sum(y > top for y in measured) if top is not None else 0
    told += [f"out of the picture: {above} values, up to {high:.4g}"] if above else []
    return (
        f"<figure><figcaption>{escape(title)}</figcaption>{embed({'data': data, 'layout': layout})}"
        f'<div class="plot" role="img" aria-label="{escape(title)}"></div>'
        f'<div class="small">{"; ".join(told)}</div></figure>'
    )


def column(run: dict, name: str) -> list[tuple]:
    """(step, value or None) for one metric."""
    return [(line["step"], number(line.get(name))) for line in run["lines"]]


def curves(run: dict) -> str:
    """All metrics of one run: in the groups that belong together, each of the others alone; those
    that never change as text."""
    names = dict.fromkeys(name for line in run["lines"] for name in line if name != "step")
    columns = {name: column(run, name) for name in names}
    columns = {k: points for k, points in columns.items() if any(y is not None for _, y in points)}
    times = ("Seconds, by phase", "seconds", [name for name in columns if name.startswith("time/")])
    grouped = [*GROUPS, times]
    rest = [name for name in columns if not any(name in group for _, _, group in grouped)]
    if len(rest) > MOST_PLOTS:
        run["notes"].append(f"{len(rest) - MOST_PLOTS} further metrics have no plot")
        del rest[MOST_PLOTS:]
    flat = [
        name
        for name, points in columns.items()
        if len(points) > 1
        and len({y for _, y in points}) == 1
        and (name in rest or name.startswith(("ratio", "clipped")))
    ]
    out = ""
    for title, ylabel, group in grouped + [(name, "", [name]) for name in rest]:
        series = [(name, columns[name]) for name in group if name in columns and name not in flat]
        if not series:
            continue
        top = None
        if ylabel == "seconds":  # a first step of minutes must not flatten the others
            spent = sorted(y for _, y in columns.get("time/step", []) if y is not None)
            high = 3 * spent[len(spent) // 2] if spent else 0
            top = high if spent and 0 < high < spent[-1] else None
        out += plot(title, ylabel, series, top=top)
    told = ", ".join(f"{name} {show(columns[name][0][1])}" for name in flat)
    told = f'<p class="small">The same in every step: {escape(told)}</p>' if told else ""
    return f'<div class="plots">{out or "Nothing was measured."}</div>{told}'


def routing(run: dict) -> str:
    """Expert shares of the last step, a row per view and layer: the darker, the more."""
    last = next((line for line in reversed(run["lines"]) if expert_shares(line, VIEWS[0])), None)
    if last is None:
        return ""
    layers = [(f"{v}, layer {i}", x) for v in VIEWS for i, x in enumerate(expert_shares(last, v))]
    experts = len(layers[0][1])
    head = "".join(f"<th>expert {e}</th>" for e in range(experts))
    shade = lambda x: f'<td style="background:rgba(0,100,168,{x * 0.6:.2f})">{x:.3f}</td>'
    rows = (f"<td>{label}</td>{''.join(map(shade, shares))}" for label, shares in layers)
    body = "".join(f"<tr>{row}</tr>" for row in rows)
    return (
        f"<h2>Experts at step {last['step']}</h2>"
        f'<p class="small">Each expert\'s share of the routing choices in a view; even would be '
        f"{1 / experts:.3f}.</p>"
        f'<div class="scroll"><table><tr><th></th>{head}</tr>{body}</table></div>'
    )


# --------------------------------------------------------------------------------------------------
# Rollouts


MEASURED = ("reward", "accuracy", "advantage", *VIEWS, *(f"teacher_{v}" for v in VIEWS), "length")
HEAD = ("step", "row", "where", "question", "images", "answer", "supervision", "response", "valid")


def clean(row: dict, count: Counter) -> tuple[dict, list, dict] | None:
    """A row of a log as the page takes it: its prompt, [response, valid], what was measured of it.
    Values of a wrong type are counted and left out; None is a row without a step or response."""
    step, response = number(row.get("step")), row.get("response")
    if step is None or not isinstance(response, str):
        count["rows"] += 1
        return None

    def typed(name, *kinds):
        value = row.get(name)
        if value is not None and not isinstance(value, kinds):
            count["values"] += 1
        elif isinstance(value, str):
            count["texts"] += len(value) > LONGEST
            return value[:LONGEST]
        else:
            return number(value) if type(value) in (int, float) else value

    answer, images = typed("answer", list, str, int, float), typed("images", list, str) or []
    images = [images] if isinstance(images, str) else images
    count["values"] += sum(not isinstance(image, str) for image in images)
    answer = " or ".join(map(show, answer)) if isinstance(answer, list) else show(answer)
    prompt = {
        "step": step,
        "row": show(typed("row", str, int)) if "row" in row else "",
        "question": (typed("question", str) or "").replace("<image>", ""),
        "images": [image for image in images if isinstance(image, str)],
        "answer": answer[:LONGEST],
        "supervision": typed("supervision", str),
    }
    valid, values = typed("valid", int, float), {}
    for name in (name for name in row if name not in HEAD):
        short = name.removeprefix("score_")
        short = short if short in VIEWS else name[:100]
        values[short] = typed(name, int, float, *(() if short in MEASURED else (str,)))
    return prompt, [typed("response", str), None if valid is None else int(bool(valid))], values


def weighed(rows, count: Counter):
    """(bytes on the page, prompt, branch, values) for each rollout; a prompt counts once."""
    weight = lambda *values: len(pack(values).encode(errors="replace"))
    seen = set()
    for prompt, branch, values in filter(None, (clean(row, count) for row in rows)):
        size = weight(branch, list(values.values()))
        size += 0 if key(prompt) in seen else weight(prompt)
        seen.add(key(prompt))
        yield size, prompt, branch, values


def key(prompt: dict) -> tuple:
    return prompt["step"], prompt["row"], prompt["question"]


def shelve(
    name: str, rows, budget: float, count: Counter, pictures: Pictures, notes: list[str]
) -> str:
    """Rollouts, put together by prompt, as the page reads them: {"names", "groups"}. What was left
    out before, or is left out here since it goes beyond the budget, is noted."""
    groups, names, size = {}, {}, 0
    for added, prompt, branch, values in rows:
        size += added
        if size > budget:
            count["dropped"] += 1
            continue
        if key(prompt) not in groups:
            images = [pictures.place(image) for image in prompt["images"]]
            groups[key(prompt)] = prompt | {"images": images, "branches": []}
        groups[key(prompt)]["branches"].append((branch, values))
        names |= dict.fromkeys(values)
    count["values"] += max(0, len(names) - COLUMNS)
    known = {name: i for i, name in enumerate(MEASURED)}
    names = sorted(names, key=lambda name: known.get(name, len(known)))[:COLUMNS]
    for group in groups.values():
        branches = group["branches"]
        group["branches"] = [[*pair, *(values.get(k) for k in names)] for pair, values in branches]
    told = {
        "rows": "rows without a step or a response were left out",
        "values": "values of a wrong type, or too many to show, were left out",
        "texts": f"texts were cut after {LONGEST} characters",
        "dropped": "rollouts are not on this page, which would be too large with them",
    }
    notes += [f"{name}: {count[kind]} {text}" for kind, text in told.items() if count[kind]]
    return embed({"names": names, "groups": list(groups.values())})


def rollouts_html(run: dict, pictures: Pictures) -> str:
    """The browser of rollouts. The file is read twice, since a long run's need not fit in memory:
    first for the sizes; then the rollouts of every step, or of one logged step in 2, 3, ..."""
    path = os.path.join(run["path"], "rollouts.jsonl")
    sizes, numbers, count = Counter(), Counter(), Counter()
    for size, prompt, *_ in weighed(read_lines(path, run["notes"]), count):
        sizes[prompt["step"]] += size
        numbers[prompt["step"]] += 1
    if not sizes and not count:
        return ""
    steps = sorted(sizes)
    fits = lambda every: sum(sizes[step] for step in steps[::every]) <= TEXT_BYTES
    every = next((e for e in range(1, len(steps)) if fits(e)), max(len(steps), 1))
    chosen, count = set(steps[::every]), Counter()
    rows = weighed(read_lines(path, run["notes"]), count)
    rows = sorted((r for r in rows if r[1]["step"] in chosen), key=lambda r: r[1]["step"])
    count["dropped"] += sum(numbers[step] for step in steps if step not in chosen)
    shelf = shelve("rollouts.jsonl", rows, TEXT_BYTES, count, pictures, run["notes"])
    told = f", of one logged step in {every}" if every > 1 else ""
    return (
        f'<h2 id="rollouts">Rollouts{told}</h2><p class="small">The arrow keys turn the pages.</p>'
        f'<section class="browser">{shelf}</section>'
    )


def wrong_html(run: dict, pictures: Pictures, most: int = 12) -> str:
    """Wrong answers, spread evenly over the file, with question and image where the data file is
    still there."""
    path = os.path.join(run["path"], "generations.jsonl")
    wrong = [row for row in read_lines(path, run["notes"]) if not row.get("correct")]
    if not wrong:
        return ""
    some = [wrong[i * len(wrong) // most] for i in range(most)] if len(wrong) > most else wrong
    places = [str(row.get("where", "")).rpartition(":")[::2] for row in some]  # "file:line"
    data: dict[tuple, dict] = {}
    for path in {path for path, line in places if path.endswith(".jsonl") and line.isdigit()}:
        if locate(path) is None:
            run["notes"].append(f"{path} is gone: wrong answers have no question and image")
            continue
        with open(locate(path), encoding="utf-8", errors="replace") as file:
            numbered = (((path, str(i)), line) for i, line in enumerate(file, 1))
            lines = {place: line for place, line in numbered if place in places}
        for place, line in lines.items():
            with contextlib.suppress(ValueError, AttributeError):  # it may have changed since
                row = json.loads(line)
                images = row.get("images") or row.get("image") or []
                images = images if isinstance(images, list) else [images]
                data[place] = {
                    "question": row.get("question") or row.get("prompt"),
                    "images": [os.path.join(os.path.dirname(path), str(i)) for i in images],
                }
    rows = []
    for i, (row, place) in enumerate(zip(some, places)):
        row = {"valid" if k == "format_valid" else k: v for k, v in row.items() if k != "correct"}
        where = {"step": i, "row": show(row.get("where", ""))}
        rows.append(row | data.get(place, {}) | where)
    count = Counter()
    rows = weighed(rows, count)
    shelf = shelve("generations.jsonl", rows, WRONG_BYTES, count, pictures, run["notes"])
    return (
        f'<h2 id="wrong">Wrong answers, {len(some)} of {len(wrong)}</h2>'
        f'<section class="wrong">{shelf}</section>'
    )


# --------------------------------------------------------------------------------------------------
# The page of a run


def parts_of(result: dict) -> dict[str, dict]:
    """An evaluation by source."""
    parts = result.get("by_source")
    parts = parts if isinstance(parts, dict) else {}
    return {source: part for source, part in parts.items() if isinstance(part, dict)}


def run_page(run: dict) -> None:
    """Writes report.html of one run."""
    last, fields, result = run["lines"][-1] if run["lines"] else {}, run["fields"], run["eval"]
    told = [run["stage"], f"{last['step']} steps" if last else "no training steps"]
    if run["seconds"] is not None:
        told.append(f"{show(round(run['seconds']))} s of training")
    if last.get("rows_left_out"):
        told.append(f"{show(last['rows_left_out'])} rows left out (left_out.jsonl)")
    pictures, body = Pictures(), ""
    if fields:
        each = "".join(
            f"<div><b>{escape(name)}</b> {escape(show(value, 'g'))}</div>"
            for name, value in fields.items()
        )
        body += f'<details><summary>Settings</summary><div class="fields">{each}</div></details>'
    if run["held"]:
        held = [[k[11:], v] for k, v in run["held"].items() if k.startswith("validation_")]
        body += "<h2>Held-out pairs, after training</h2>" + table(["", "value"], held)
    if last:
        body += '<h2 id="curves">Curves</h2>' + curves(run) + routing(run)
    if result:
        names = [*SHOWN, "truncated", "rows"]
        names[1:1] = ["pass_at_k"] if "pass_at_k" in result else []
        parts = {"all": result, **parts_of(result)}
        rows = [[source, *(part.get(k) for k in names)] for source, part in parts.items()]
        data, warm = escape(show(result.get("data", ""))), number(result.get("temperature"))
        how = f"{escape(show(result.get('num_samples')))} samples a row at temperature {show(warm)}"
        how = how if warm else "greedy decoding"
        body += f'<h2 id="evaluation">Evaluation</h2><p class="small">{data}, {how}</p>'
        body += table(["source", *names], rows)
    body += rollouts_html(run, pictures) + wrong_html(run, pictures)
    if pictures.dropped:
        run["notes"].append(
            f"{pictures.dropped} of {len(pictures.places)} images are not on this page, which "
            "would be too large with them"
        )
    notes = "".join(f'<p class="note">{escape(note)}</p>' for note in run["notes"])
    parts = re.findall(r'<h2 id="(\w+)">([^<]*)', body)
    links = " · ".join(f'<a href="#{place}">{title}</a>' for place, title in parts)
    head = (
        f"<h1>{escape(run['name'])}</h1><p>{escape(', '.join(told))}</p><nav>{links}</nav>{notes}"
    )
    title = f"{run['name']}: {run['stage']}"
    write_page(os.path.join(run["path"], "report.html"), title, head + body, pictures)
    for note in run["notes"]:
        print(f"note: {run['path']}: {note}", file=sys.stderr)


# --------------------------------------------------------------------------------------------------
# The page that compares runs


def overlay(runs: list[dict]) -> str:
    """The metrics that several runs have, a plot each. Losses of different stages are different
    things and stay apart."""
    out = ""
    for name in OVERLAID:
        ylabel = next((ylabel for _, ylabel, group in GROUPS if name in group), "seconds")
        have = [run for run in runs if any(y is not None for _, y in column(run, name))]
        for stage in dict.fromkeys(run["stage"] if name == "loss" else "" for run in have):
            some = [run for run in have if stage in ("", run["stage"])]
            if len(some) < 2:
                continue
            ends = [max(x for x, _ in column(run, name)) or 1 for run in some]
            scaled = max(ends) > 4 * min(ends)  # of very different length: each from 0 to 100 %
            series = [
                (
                    run["label"] + (f" ({end} steps)" if scaled else ""),
                    [(100 * x / end if scaled else x, y) for x, y in column(run, name)],
                )
                for run, end in zip(some, ends)
            ]
            title = name + (f" ({stage})" if stage else "")
            xlabel = "% of the run" if scaled else "step"
            out += plot(title, ylabel, series, xlabel, [runs.index(run) for run in some])
    return f'<h2>Training curves</h2><div class="plots">{out}</div>' if out else ""


def compare(path: str, children: list[str]) -> None:
    """The table of runs on the terminal, results.json, report.html, and the page of each run."""
    order = [*NAMES, *sorted(set(children) - set(NAMES))]
    runs, notes = [], []
    for child in order:
        if child in children:
            try:
                run_page(run := read_run(os.path.join(path, child)))
                runs.append(run)
            except Exception as error:  # whatever is wrong with one run, the others have their page
                kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
                notes.append(f"{child} is left out: {kind}{' '.join(str(error).split())}")
    judged = [run for run in runs if run["eval"]]
    for child in NAMES:
        if child not in [run["name"] for run in judged]:
            where = os.path.join(path, child)
            notes.append(
                f"{NAMES[child]} is left out: no eval.json; python eval.py --ckpt {where} makes it"
            )
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    rows = [
        {
            "name": run["label"],
            **{name: number(run["eval"].get(name)) for name in SHOWN},
            "seconds": run["seconds"],
        }
        for run in judged
    ]
    with open(os.path.join(path, "results.json"), "w", encoding="utf-8", errors="replace") as file:
        file.write(json.dumps(rows, indent=1, ensure_ascii=False) + "\n")
    title = f"{os.path.basename(os.path.abspath(path))}: runs compared"
    body = f"<h1>{escape(title)}</h1>"
    body += "".join(f'<p class="note">{escape(note)}</p>' for note in notes)
    if rows:
        cells = [list(rows[0]), *(row.values() for row in rows)]
        lines = [[show(cell, ".3f") for cell in line] for line in cells]
        wide = [max(map(len, column)) for column in zip(*lines)]
        for first, *others in lines:
            others = [cell.rjust(w) for cell, w in zip(others, wide[1:])]
            print("  ".join([first.ljust(wide[0]), *others]))
        body += table(lines[0], lines[1:])
        body += '<p class="small">seconds: training of that stage alone</p>'
        shares = [name for name in SHOWN if name != "mean_response_tokens"]
        bars = [(name, [(row["name"], row[name]) for row in rows]) for name in shares]
        bars = [(name, points) for name, points in bars if any(y is not None for _, y in points)]
        if bars:
            body += plot("Accuracy and format", "share of rows", bars, "", kind="bar")
        parts = [parts_of(run["eval"]) for run in judged]
        sources = sorted({source for part in parts for source in part})
        if sources:
            by_source = [
                [run["label"], *(part.get(source, {}).get("accuracy") for source in sources)]
                for run, part in zip(judged, parts)
            ]
            body += "<h2>Accuracy by source</h2>" + table(["name", *sources], by_source)
    links = "".join(
        f'<li><a href="{escape(quote(run["name"]))}/report.html">{escape(run["name"])}</a>, '
        f"{escape(run['stage'])}</li>"
        for run in runs
    )
    body += f"<h2>Each run</h2><ul>{links}</ul>" + overlay(runs)
    write_page(os.path.join(path, "report.html"), title, body)


def report() -> None:
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("dir", help="a run's directory, or a directory of them")
    path = parser.parse_args().dir
    if not os.path.isdir(path):
        raise UserError(
            f"{path}: no such directory; name the --output_dir of a run, or a directory of runs"
        )
    has = lambda folder, *names: any(os.path.isfile(os.path.join(folder, name)) for name in names)
    logs = ("metrics.jsonl", "eval.json")
    children = [name for name in sorted(os.listdir(path)) if has(os.path.join(path, name), *logs)]
    if has(path, "metrics.jsonl") or has(path, "eval.json") and not children:
        run_page(read_run(path))
    elif children:
        compare(path, children)
    else:
        raise UserError(
            f"{path}: neither a run (metrics.jsonl or eval.json) nor a directory of runs; "
            "name an --output_dir"
        )
    print(f"written to {os.path.join(path, 'report.html')}")


if __name__ == "__main__":
    try:
        report()
    except (UserError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
