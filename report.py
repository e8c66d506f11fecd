"""A page to look at: what a run did, or how several runs compare. No network, no JavaScript, nothing but Pillow to install.

    python report.py out/demo/align     a run's directory (metrics.jsonl or eval.json): DIR/report.html with its settings,
                                        curves, rollouts with their images and scores, evaluation and wrong answers
    python report.py out/demo           a directory of such directories: a table on the terminal, DIR/results.json with a
                                        row for each evaluated run, DIR/report.html, and a report.html in each run

Everything on a page comes from files and is escaped; pictures stand in the page itself. What is missing or cut short (a
run killed in the middle of a line, an image that is gone) is said on the page and does not stop it.
"""

import argparse
import base64
import contextlib
import html
import io
import itertools
import json
import math
import os
import re
import sys
from urllib.parse import quote

NAMES = {
    "base": "base",
    "sft": "SFT",
    "align": "PRISM",
    "sft_grpo": "SFT+GRPO",
    "align_grpo": "PRISM+GRPO",
}
SHOWN = ("accuracy", "caption_accuracy", "format_valid", "mean_response_tokens")
COLORS = (
    "#0064a8",
    "#c4500a",
    "#00805c",
    "#a8338a",
    "#7a6400",
    "#555555",
)  # on white, each at least 4.5 : 1
DASHES = ("", "7 3", "3 2", "10 3 2 3", "", "12 4")
# title, what the vertical axis counts, metrics; what is in no group gets a plot of its own
GROUPS = [
    ("Loss", "loss", ["loss"]),
    ("Reward, accuracy, format", "share or reward", ["reward", "accuracy", "format_valid"]),
    (
        "Score gap by view: supervision - policy",
        "score",
        ["score_gap_perception", "score_gap_reasoning"],
    ),
    (
        "Pair accuracy: supervision above policy",
        "share of pairs",
        ["pair_accuracy_perception", "pair_accuracy_reasoning"],
    ),
    (
        "Scores",
        "score",
        [
            "score_teacher_perception",
            "score_student_perception",
            "score_teacher_reasoning",
            "score_student_reasoning",
        ],
    ),
    ("Discriminator loss", "loss", ["discriminator_loss"]),
    ("Groups whose rollouts differ in accuracy", "share of groups", ["groups_with_spread"]),
    ("Response length", "tokens", ["response_length"]),
    ("Entropy", "nats per token", ["entropy"]),
    ("Gradient norm, before clipping", "norm", ["grad_norm", "d_grad_norm"]),
    ("Learning rate", "rate", ["learning_rate", "d_learning_rate"]),
    ("Importance ratio", "ratio", ["ratio_max", "ratio_min"]),
    ("Tokens clipped", "share of tokens", ["clipped_high", "clipped_low"]),
    (
        "Routing in the perception view, mean over layers",
        "part of choices",
        [f"perception: expert {e}" for e in range(16)],
    ),
    (
        "Routing in the reasoning view, mean over layers",
        "part of choices",
        [f"reasoning: expert {e}" for e in range(16)],
    ),
]
OVERLAID = (
    "accuracy",
    "reward",
    "format_valid",
    "loss",
    "score_gap_perception",
    "score_gap_reasoning",
    "pair_accuracy_perception",
    "pair_accuracy_reasoning",
    "response_length",
    "entropy",
    "grad_norm",
    "learning_rate",
    "time/step",
)
STYLE = """body{font:16px/1.5 system-ui,'Segoe UI','DejaVu Sans',sans-serif;color:#1a1a1a;background:#fff;max-width:1240px;
margin:0 auto;padding:0 20px 60px}h1{margin:28px 0 4px;overflow-wrap:anywhere}h2{margin:38px 0 10px;
border-bottom:1px solid #ccc}h3{margin:26px 0 6px}.note{background:#fff6dc;border-left:4px solid #b38600;padding:6px 12px}
.small{color:#555;font-size:14px;overflow-wrap:anywhere}figure{margin:0}figcaption{font-weight:600}.plots,.cards{display:grid;
gap:22px;grid-template-columns:repeat(auto-fill,minmax(min(520px,100%),1fr))}svg text{font-size:13px;fill:#333}
.hit{fill:transparent}.hit:hover{fill:rgba(0,0,0,.08)}.legend{font-size:14px}.legend span{margin-right:16px;white-space:nowrap}
.scroll{overflow-x:auto}table{border-collapse:collapse;font-size:15px}th,td{padding:4px 12px;border-bottom:1px solid #ddd;
text-align:right;font-variant-numeric:tabular-nums}th:first-child,td:first-child{text-align:left}th{background:#f4f4f4}
.fields{columns:3 320px;font-size:14px;overflow-wrap:anywhere}.fields b{font-weight:400;color:#555}
.cards{gap:14px;margin-top:8px;grid-template-columns:repeat(auto-fill,minmax(min(285px,100%),1fr))}
.card{border:1px solid #ccc;border-radius:6px;padding:10px;min-width:0}
.text{white-space:pre-wrap;overflow-wrap:anywhere;font-size:14.5px;max-height:340px;overflow-y:auto;margin:4px 0}
.text span{display:block;border-left:4px solid #7a7a7a;background:#f5f5f5;padding:2px 8px;margin:3px 0}
.text .caption{border-color:#0064a8;background:#eef6fc}.text .answer{border-color:#00805c;background:#e9f6f1;font-weight:600}
.text .outside{border-color:#b00020;background:#fdecee}.text b{display:block;font-size:11px;text-transform:uppercase;color:#444}
.chip{display:inline-block;background:#f0f0f0;border-radius:4px;padding:1px 7px;margin:2px 3px 0 0;font-size:13px}
.picture{border:1px solid #ccc;max-width:100%;display:block;margin:4px 0}.tiny{image-rendering:pixelated;min-width:180px}"""


class UserError(Exception):
    """Something the user can mend. Its text, one line that names the thing and the remedy, is all that is printed.
    (data.py has the same; this file does without it, since that one takes seconds to import torch.)"""


# --------------------------------------------------------------------------------------------------------------------
# Files


def read_lines(path: str, notes: list[str]):
    """The objects of a JSONL file. A last line that a killed run left half-written is skipped and noted."""
    if not os.path.exists(path):
        return
    with open(path, encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, 1):
            try:
                row = json.loads(line) if line.strip() else None
            except json.JSONDecodeError:
                if line.endswith("\n"):
                    raise UserError(f"{path}:{number}: not JSON; remove the line") from None
                note = f"{os.path.basename(path)}: the last line ({number}) is only half written and was left out; killed run?"
                if note not in notes:
                    notes.append(note)
                return
            if isinstance(row, dict):
                yield row


def read_json(path: str) -> dict:
    """A JSON object; {} where there is no such file."""
    if not os.path.exists(path):
        return {}
    try:
        with open(path, encoding="utf-8") as file:
            value = json.load(file)
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error}); remove it, or run the stage again") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: holds no JSON object; remove it, or run the stage again")
    return value


def read_run(path: str) -> dict:
    """A run's directory: what all pages need of it."""
    notes: list[str] = []
    lines = list(read_lines(os.path.join(path, "metrics.jsonl"), notes))
    config = read_json(os.path.join(path, "config.json"))
    fields = config["run"] if isinstance(config.get("run"), dict) else {}
    times = [line["time/step"] for line in lines if number(line.get("time/step")) is not None]
    if lines and "model_type" not in config:
        notes.append("This run has not ended: it has not written its result yet.")
    for line in lines:  # each expert's share of the routing choices, the mean over layers, as metrics beside the others
        for view in ("perception", "reasoning"):
            for e, shares in enumerate(zip(*line.get(f"expert_share_{view}") or [])):
                line[f"{view}: expert {e}"] = sum(shares) / len(shares)
    stage = (
        f"RLVR, {fields['algorithm']}"
        if "algorithm" in fields
        else "alignment"
        if "format_penalty" in fields
        else "discriminator warm-up"
        if "validation_share" in fields
        else "SFT"
        if "num_train_epochs" in fields
        else "a run"
    )
    name = os.path.basename(os.path.abspath(path))
    return {
        "path": path,
        "name": name,
        "label": NAMES.get(name, name),
        "fields": fields,
        "stage": stage,
        "notes": notes,
        "lines": [
            line
            for line in lines
            if "validation_pairs" not in line and number(line.get("step")) is not None
        ],
        "held": next(
            (line for line in reversed(lines) if "validation_pairs" in line), {}
        ),  # held-out pairs: no step
        "seconds": sum(times) if times else None,
        "eval": read_json(os.path.join(path, "eval.json")),
    }


def locate(path: str) -> str | None:
    """A file named in a log: relative to where we are, or to the project, where the stages usually run."""
    return next(
        (
            p
            for p in (path, os.path.join(os.path.dirname(os.path.abspath(__file__)), path))
            if os.path.isfile(p)
        ),
        None,
    )


def picture(source: str) -> str:
    """An image file as <img> with its bytes inside, at most 480 pixels on the long side; or a line that says why not."""
    from PIL import Image

    try:
        with Image.open(locate(source) or source) as image:
            size, image = image.size, image.convert("RGB")
        image.thumbnail((480, 480))
        kind = "png" if max(size) <= 240 else "jpeg"
        image.save(buffer := io.BytesIO(), kind)
    except (
        Exception
    ) as error:  # Pillow raises many kinds; each means that the picture cannot be shown
        why = (
            "it stands in the data itself"
            if re.fullmatch(r"\d+ bytes", source)
            else ("no such file" if isinstance(error, FileNotFoundError) else error)
        )
        return f'<p class="small">image not shown: {escape(source)}, {escape(why)}</p>'
    data = base64.b64encode(buffer.getvalue()).decode()
    return (
        f'<img class="picture{" tiny" if max(size) <= 120 else ""}" src="data:image/{kind};base64,{data}" '
        f'alt="{escape(source)}" title="{escape(source)}, {size[0]} x {size[1]}">'
    )


# --------------------------------------------------------------------------------------------------------------------
# Text


def escape(value) -> str:
    return html.escape(str(value), quote=True)


def number(value) -> float | None:
    """A finite number, or None: null, NaN, a missing value and anything that is no number alike."""
    return (
        value
        if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        else None
    )


def show(value, form: str = ".4g") -> str:
    """A value for people; an en dash where there was nothing to measure."""
    if value is None or isinstance(value, float) and not math.isfinite(value):
        return "–"
    return (
        format(value, form if abs(value) < 1000 else ".1f")
        if isinstance(value, float)
        else str(value)
    )


def table(head: list, rows: list[list]) -> str:
    cells = lambda row, tag: "".join(f"<{tag}>{escape(show(cell, '.3f'))}</{tag}>" for cell in row)
    body = "".join(f"<tr>{cells(row, 'td')}</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{cells(head, "th")}</tr></thead><tbody>{body}</tbody></table></div>'


def page(title: str, body: str) -> str:
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    return (
        f'<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}"><title>{escape(title)}</title>'
        f"<style>{STYLE}</style></head><body>{body}</body></html>\n"
    )


def write(path: str, text: str) -> None:
    with open(
        path, "w", encoding="utf-8", errors="replace"
    ) as file:  # a lone surrogate in a response is no reason to fail
        file.write(text)


def response_html(text: str) -> str:
    """A response with its blocks set apart; whatever stands outside of them breaks the format and is marked."""
    pieces = re.split(
        r"<(caption|think|answer)>(.*?)</\1>", text, flags=re.S
    )  # outside, name, block, outside, name, ...
    out = ""
    for name, piece in zip(
        ["outside", *itertools.chain(*((name, "outside") for name in pieces[1::3]))],
        [pieces[0], *itertools.chain(*zip(pieces[2::3], pieces[3::3]))],
    ):
        if piece.strip() or name != "outside":
            out += f'<span class="{name}"><b>{name.replace("outside", "outside the format")}</b>{escape(piece.strip())}</span>'
    return f'<div class="text">{out or "(empty)"}</div>'


# --------------------------------------------------------------------------------------------------------------------
# Pictures drawn by hand


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers between low and high."""
    raw = (high - low) / about
    base = 10 ** math.floor(math.log10(raw))
    step = base * next(m for m in (1, 2, 5, 10) if raw <= m * base * 1.0001)
    return [
        round(i * step, 12)
        for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)
    ]


def running_mean(points: list[tuple], width: int) -> list[tuple]:
    """The mean of the measured values at most width / 2 places away; a gap stays a gap."""
    totals = list(itertools.accumulate((y or 0.0 for _, y in points), initial=0.0))
    counts = list(itertools.accumulate((y is not None for _, y in points), initial=0))
    ends = lambda i: (max(0, i - width // 2), min(len(points), i + width // 2 + 1))
    mean = lambda a, b: (totals[b] - totals[a]) / (counts[b] - counts[a])
    return [(x, None if y is None else mean(*ends(i))) for i, (x, y) in enumerate(points)]


def trace(points: list[tuple], px, py, style: str) -> str:
    """The measured stretches as lines, a single measurement between gaps as a dot."""
    drawn = ""
    for measured, stretch in itertools.groupby(points, lambda point: point[1] is not None):
        places = [(round(px(x), 1), round(py(y), 1)) for x, y in stretch] if measured else []
        if len(places) == 1:
            drawn += f'<circle cx="{places[0][0]}" cy="{places[0][1]}" r="2" fill="none" {style}/>'
        elif places:
            drawn += f'<polyline points="{" ".join(f"{x},{y}" for x, y in places)}" fill="none" {style}/>'
    return drawn


def plot(
    title: str,
    ylabel: str,
    series: list[tuple[str, list[tuple]]],
    xlabel: str = "step",
    colors: list[int] | None = None,
    top: float | None = None,
) -> str:
    """series: (label, [(x, y or None), ...]) each -> a figure. Shares are drawn from 0 to 1, so that runs compare; what is
    above `top` runs out of the picture. Long series get a running mean in front, and of very long ones not every step."""
    measured = [y for _, points in series for _, y in points if y is not None]
    xs = sorted({x for _, points in series for x, _ in points})
    x0, x1 = (xs[0], xs[-1]) if xs[-1] > xs[0] else (xs[0] - 1, xs[0] + 1)
    low, high = min(measured), max(measured)
    if ylabel.startswith("share") and 0 <= low and high <= 1:
        low, high = 0, 1
    elif top is not None:
        low, high = 0, top
    elif high - low <= 1e-9 * max(abs(high), abs(low)):
        low, high = (0, high * 1.2) if high > 0 else (low - 1, high + 1)
    else:
        low, high = low - (high - low) * 0.04, high + (high - low) * 0.04
    px = lambda x: 66 + (x - x0) / (x1 - x0) * 520
    py = lambda y: 246 - (min(max(y, low), high) - low) / (high - low) * 234
    svg = ""
    for y in ticks(low, high):
        svg += (
            f'<line x1="66" x2="586" y1="{py(y):.1f}" y2="{py(y):.1f}" stroke="{"#888" if y == 0 else "#e2e2e2"}"/>'
            f'<text x="60" y="{py(y) + 4:.1f}" text-anchor="end">{y:g}</text>'
        )
    for x in ticks(x0, x1, 8):
        svg += (
            f'<text x="{px(x):.1f}" y="264" text-anchor="middle">{x:.0f}</text>'
            if x == int(x)
            else ""
        )
    svg += (
        f'<path d="M66 12V246H586" fill="none" stroke="#555"/><text x="326" y="284" text-anchor="middle">{escape(xlabel)}'
        f'</text><text transform="translate(13 129) rotate(-90)" text-anchor="middle">{escape(ylabel)}</text>'
    )
    span, skip = len(xs) // 25 | 1 if ylabel != "rate" else 1, math.ceil(len(xs) / 2000)
    legend = ""
    for (label, points), i in zip(series, colors or itertools.count()):
        ink = f'stroke="{COLORS[i % len(COLORS)]}" stroke-dasharray="{DASHES[i % len(DASHES)]}" stroke-width="2.2"'
        if span > 1:
            svg += trace(
                points[::skip], px, py, f'stroke="{COLORS[i % len(COLORS)]}" stroke-opacity=".3"'
            )
        svg += trace((running_mean(points, span) if span > 1 else points)[::skip], px, py, ink)
        legend += f'<span><svg width="28" height="10" aria-hidden="true"><path d="M0 5H28" {ink}/></svg> {escape(label)}</span>'
    known, some = (
        [(label, dict(points)) for label, points in series],
        xs[:: math.ceil(len(xs) / 150)],
    )
    wide = 520 / len(some)
    area = f'class="hit" y="12" height="234" width="{wide:.1f}"'
    for x in some:  # invisible strips that carry the tooltips
        tip = "\n".join(
            [
                f"{xlabel} {show(x)}",
                *(f"{label}: {show(values[x])}" for label, values in known if x in values),
            ]
        )
        svg += f'<rect {area} x="{min(max(px(x) - wide / 2, 66), 586 - wide):.1f}"><title>{escape(tip)}</title></rect>'
    above = sum(y > high for y in measured)
    told = (
        [
            f"thin: {'each step' if skip == 1 else f'one step in {skip}'}, thick: mean over {span} steps"
        ]
        if span > 1
        else []
    )
    told += [f"out of the picture: {above} values, up to {max(measured):.4g}"] if above else []
    return (
        f'<figure><figcaption>{escape(title)}</figcaption><svg viewBox="0 0 600 290" role="img" '
        f'aria-label="{escape(title)}">{svg}</svg><div class="legend">{legend}</div>'
        f'<div class="small">{"; ".join(told)}</div></figure>'
    )


def column(run: dict, name: str) -> list[tuple]:
    """(step, value or None) for one metric."""
    return [(line["step"], number(line.get(name))) for line in run["lines"]]


def curves(run: dict) -> str:
    """All metrics of one run: in the groups that belong together, each of the others alone; those that never change as text."""
    names = list(
        dict.fromkeys(
            k
            for line in run["lines"]
            for k, v in line.items()
            if k != "step" and number(v) is not None
        )
    )
    grouped = [
        *GROUPS,
        ("Seconds, by phase", "seconds", [name for name in names if name.startswith("time/")]),
    ]
    rest = [name for name in names if not any(name in group for _, _, group in grouped)]
    flat = [
        name
        for name in names
        if len(run["lines"]) > 1
        and len({line.get(name) for line in run["lines"]}) == 1
        and (name in rest or name.startswith(("ratio", "clipped")))
    ]
    out = ""
    for title, ylabel, group in grouped + [(name, name, [name]) for name in rest]:
        series = [(name, column(run, name)) for name in group if name in names and name not in flat]
        if series:  # a first step of minutes must not flatten the seconds of the others
            spent = (
                sorted(y for _, y in column(run, "time/step") if y is not None)
                if ylabel == "seconds"
                else []
            )
            high = 3 * spent[len(spent) // 2] if spent else None
            out += plot(title, ylabel, series, top=high if spent and high < spent[-1] else None)
    told = ", ".join(f"{name} {show(run['lines'][0][name])}" for name in flat)
    return f'<div class="plots">{out}</div>' + (
        f'<p class="small">The same in every step: {escape(told)}</p>' if told else ""
    )


def routing(run: dict) -> str:
    """Expert shares of the last step, a row per view and layer: the darker, the more."""
    last = next(
        (line for line in reversed(run["lines"]) if line.get("expert_share_perception")), None
    )
    if last is None:
        return ""
    rows = [
        (f"{view}, layer {i}", layer)
        for view in ("perception", "reasoning")
        for i, layer in enumerate(last.get(f"expert_share_{view}") or [])
    ]
    head = "".join(f"<th>expert {e}</th>" for e in range(len(rows[0][1])))
    cell = lambda share: (
        f'<td style="background:rgba(0,100,168,{share * 0.6:.2f})">{share:.3f}</td>'
    )
    body = "".join(f"<tr><td>{label}</td>{''.join(map(cell, layer))}</tr>" for label, layer in rows)
    return (
        f"<h2>Experts at step {last['step']}</h2><p class=\"small\">Each expert's share of a view's routing choices; even "
        f'would be {1 / len(rows[0][1]):.3f}.</p><div class="scroll"><table><tr><th></th>{head}</tr>{body}</table></div>'
    )


def bars(rows: list[dict], names: list[str]) -> str:
    """Shares as bars, a group for each run."""
    py = lambda y: 280 - min(max(y, 0), 1) * 260
    svg = "".join(
        f'<path d="M60 {py(y)}H1100" stroke="#e2e2e2"/><text x="52" y="{py(y) + 4}" text-anchor="end">{y}</text>'
        for y in (0, 0.25, 0.5, 0.75, 1)
    )
    slot = 1040 / len(rows)
    wide = min(52, slot * 0.8 / len(names))
    for i, row in enumerate(rows):
        middle = 60 + slot * (i + 0.5)
        svg += f'<text x="{middle:.1f}" y="302" text-anchor="middle">{escape(row["name"])}</text>'
        for j, name in enumerate(names):
            x, y, value = (
                middle + (j - len(names) / 2) * wide,
                py(row[name] or 0),
                show(row[name], ".3f"),
            )
            svg += (
                f'<rect x="{x + 1:.1f}" y="{y:.1f}" width="{wide - 2:.1f}" height="{280 - y:.1f}" fill="{COLORS[j]}">'
                f"<title>{escape(row['name'])}, {name}: {value}</title></rect>"
                f'<text x="{x + wide / 2:.1f}" y="{y - 4:.1f}" text-anchor="middle">{value}</text>'
            )
    mark = lambda color: (
        f'<svg width="14" height="12" aria-hidden="true"><rect width="14" height="12" fill="{color}"/></svg>'
    )
    return (
        f'<figure><svg viewBox="0 0 1110 310" role="img" aria-label="shares of rows, by run"><text text-anchor="middle" '
        f'transform="translate(14 150) rotate(-90)">share of rows</text>{svg}</svg><div class="legend">'
        + "".join(f"<span>{mark(color)} {name}</span>" for color, name in zip(COLORS, names))
        + "</div></figure>"
    )


# --------------------------------------------------------------------------------------------------------------------
# The page of a run


def question_html(row: dict) -> str:
    """Image, question and ground truth."""
    answer = row.get("answer")
    answer = " or ".join(map(str, answer)) if isinstance(answer, list) else show(answer)
    return (
        "".join(picture(str(image)) for image in row.get("images") or [])
        + f'<div class="text">{escape(str(row.get("question") or "").replace("<image>", ""))}</div><div>ground truth '
        f'<b>{escape(answer)}</b> <span class="small">{escape(row.get("row", ""))}</span></div>'
    )


def card(row: dict, above: str = "") -> str:
    """A response with everything that was measured of it."""
    chips = "".join(
        f'<span class="chip">{escape(name)} {escape(show(value))}</span>'
        for name, value in row.items()
        if name not in ("step", "row", "where", "question", "images", "answer", "response")
    )
    return f'<div class="card">{above}{response_html(str(row.get("response", "")))}{chips}</div>'


def rollouts_html(run: dict) -> str:
    """Rollouts of the first, the middle and the last step: of each the two best and the two worst by advantage."""
    path = os.path.join(run["path"], "rollouts.jsonl")
    steps = list(dict.fromkeys(row.get("step") for row in read_lines(path, run["notes"])))
    groups = {step: [] for step in (steps[0], steps[len(steps) // 2], steps[-1])} if steps else {}
    for row in (
        read_lines(path, run["notes"]) if steps else []
    ):  # read twice: a long run's rollouts need not fit in memory
        if row.get("step") in groups:
            groups[row["step"]].append(row)
    out = "<h2>Rollouts</h2>" if steps else ""
    for step, rows in groups.items():
        ranked = sorted(rows, key=lambda row: -(number(row.get("advantage")) or 0))
        some = ranked if len(ranked) <= 4 else ranked[:2] + ranked[-2:]
        told = (
            ""
            if some == ranked
            else f"; of {len(rows)} rollouts the two of highest and the two of lowest advantage"
        )
        out += (
            f"<h3>Step {escape(step)}{told}</h3>"
            + question_html(rows[0])
            + f'<div class="cards">{"".join(map(card, some))}</div>'
        )
    return out


def wrong_html(run: dict, most: int = 12) -> str:
    """Wrong answers, spread evenly over the file, with question and image where the data file is still there."""
    wrong = [
        row
        for row in read_lines(os.path.join(run["path"], "generations.jsonl"), run["notes"])
        if not row.get("correct")
    ]
    some = [wrong[i * len(wrong) // most] for i in range(most)] if len(wrong) > most else wrong
    places = [
        str(row.get("where", "")).rpartition(":")[::2] for row in some
    ]  # "file:line", of JSONL files
    data: dict[tuple, dict] = {}
    for path in {path for path, line in places if path.endswith(".jsonl") and line.isdigit()}:
        if locate(path) is None:
            run["notes"].append(
                f"{path} is gone: wrong answers are shown without question and image"
            )
            continue
        with open(locate(path), encoding="utf-8", errors="replace") as file:
            lines = {
                place: line for i, line in enumerate(file, 1) if (place := (path, str(i))) in places
            }
        for place, line in lines.items():
            with contextlib.suppress(ValueError, AttributeError):  # the file may have changed since
                row = json.loads(line)
                images = row.get("images") or row.get("image") or []
                data[place] = {
                    "question": row.get("question") or row.get("prompt"),
                    "images": [
                        os.path.join(os.path.dirname(path), str(i))
                        for i in (images if isinstance(images, list) else [images])
                    ],
                }
    cards = "".join(
        card(row, question_html({**row, **data.get(place, {}), "row": row.get("where", "")}))
        for row, place in zip(some, places)
    )
    return (
        f'<h2>Wrong answers, {len(some)} of {len(wrong)}</h2><div class="cards">{cards}</div>'
        if wrong
        else ""
    )


def run_page(run: dict) -> None:
    """Writes report.html of one run."""
    last, fields, result = run["lines"][-1] if run["lines"] else {}, run["fields"], run["eval"]
    told = [run["stage"], f"{last['step']} steps" if last else "no training steps"]
    told += [f"{run['seconds']:.0f} s of training"] if run["seconds"] is not None else []
    told += (
        [f"{last['rows_left_out']} rows left out (left_out.jsonl)"]
        if last.get("rows_left_out")
        else []
    )
    body = ""
    if fields:
        body += (
            '<h2>Settings</h2><div class="fields">'
            + "".join(
                f"<div><b>{escape(name)}</b> {escape(show(value, 'g'))}</div>"
                for name, value in fields.items()
            )
            + "</div>"
        )
    if run["held"]:
        held = [
            [name[11:], value]
            for name, value in run["held"].items()
            if name.startswith("validation_")
        ]
        body += "<h2>Held-out pairs, after training</h2>" + table(["", "value"], held)
    if last:
        body += "<h2>Curves</h2>" + curves(run) + routing(run)
    if result:
        names = [*SHOWN, "truncated", "rows"]
        parts = {"all": result, **(result.get("by_source") or {})}
        body += (
            f'<h2>Evaluation</h2><p class="small">{escape(result.get("data", ""))}, greedy decoding</p>'
            + table(
                ["source", *names],
                [[source, *(part.get(name) for name in names)] for source, part in parts.items()],
            )
        )
    body += rollouts_html(run) + wrong_html(run)
    notes = "".join(f'<p class="note">{escape(note)}</p>' for note in run["notes"])
    head = f"<h1>{escape(run['name'])}</h1><p>{escape(', '.join(told))}</p>{notes}"
    write(
        os.path.join(run["path"], "report.html"),
        page(f"{run['name']}: {run['stage']}", head + body),
    )
    for note in run["notes"]:
        print(f"note: {run['path']}: {note}", file=sys.stderr)


# --------------------------------------------------------------------------------------------------------------------
# The page that compares runs


def overlay(runs: list[dict]) -> str:
    """The metrics that several runs have, a plot each. Losses of different stages are different things and stay apart."""
    out = ""
    for name in OVERLAID:
        ylabel = next((ylabel for _, ylabel, group in GROUPS if name in group), "seconds")
        have = [run for run in runs if any(y is not None for _, y in column(run, name))]
        for stage in dict.fromkeys(run["stage"] if name == "loss" else "" for run in have):
            some = [run for run in have if stage in ("", run["stage"])]
            if len(some) < 2:
                continue
            last = [max(x for x, _ in column(run, name)) for run in some]
            scaled = max(last) > 4 * min(
                last
            )  # runs of very different length: each from 0 to 100 %
            series = [
                (
                    run["label"] + (f" ({end} steps)" if scaled else ""),
                    [(100 * x / end if scaled else x, y) for x, y in column(run, name)],
                )
                for run, end in zip(some, last)
            ]
            out += plot(
                name + (f" ({stage})" if stage else ""),
                ylabel,
                series,
                "% of the run" if scaled else "step",
                [runs.index(run) for run in some],
            )
    return f'<h2>Training curves</h2><div class="plots">{out}</div>' if out else ""


def compare(path: str, children: list[str]) -> None:
    """The table of runs on the terminal, results.json, report.html, and the page of each run."""
    order = [*NAMES, *sorted(set(children) - set(NAMES))]
    runs = [read_run(os.path.join(path, child)) for child in order if child in children]
    for run in runs:
        run_page(run)
    judged = [run for run in runs if run["eval"]]
    for child in NAMES:
        if child not in [run["name"] for run in judged]:
            where = os.path.join(path, child)
            print(
                f"note: {NAMES[child]} is left out: no eval.json; python eval.py --ckpt {where} makes it",
                file=sys.stderr,
            )
    rows = [
        {
            "name": run["label"],
            **{name: number(run["eval"].get(name)) for name in SHOWN},
            "seconds": run["seconds"],
        }
        for run in judged
    ]
    write(os.path.join(path, "results.json"), json.dumps(rows, indent=1, ensure_ascii=False) + "\n")
    title = f"{os.path.basename(os.path.abspath(path))}: runs compared"
    body = f"<h1>{escape(title)}</h1>"
    if rows:
        lines = [
            [show(cell, ".3f") for cell in line]
            for line in [list(rows[0]), *(row.values() for row in rows)]
        ]
        wide = [max(map(len, cells)) for cells in zip(*lines)]
        for line in lines:
            print(
                "  ".join(
                    [
                        line[0].ljust(wide[0]),
                        *(cell.rjust(w) for cell, w in zip(line[1:], wide[1:])),
                    ]
                )
            )
        by_source = [run["eval"].get("by_source") or {} for run in judged]
        sources = sorted({source for parts in by_source for source in parts})
        body += (
            table(lines[0], lines[1:])
            + '<p class="small">seconds: training of that stage alone</p>'
        )
        body += "<h2>Accuracy and format</h2>" + bars(
            rows, [name for name in SHOWN if name != "mean_response_tokens"]
        )
        body += (
            "<h2>Accuracy by source</h2>"
            + table(
                ["name", *sources],
                [
                    [run["label"], *(parts.get(source, {}).get("accuracy") for source in sources)]
                    for run, parts in zip(judged, by_source)
                ],
            )
            if sources
            else ""
        )
    link = lambda run: (
        f'<a href="{escape(quote(run["name"]))}/report.html">{escape(run["name"])}</a>, {escape(run["stage"])}'
    )
    body += (
        f"<h2>Each run</h2><ul>{''.join(f'<li>{link(run)}</li>' for run in runs)}</ul>"
        + overlay(runs)
    )
    write(os.path.join(path, "report.html"), page(title, body))


def report() -> None:
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("dir", help="a run's directory, or a directory of them")
    path = parser.parse_args().dir
    if not os.path.isdir(path):
        raise UserError(
            f"{path}: no such directory; name the --output_dir of a run, or a directory of runs"
        )
    has = lambda folder, *names: any(os.path.isfile(os.path.join(folder, name)) for name in names)
    children = [
        name
        for name in sorted(os.listdir(path))
        if has(os.path.join(path, name), "metrics.jsonl", "eval.json")
    ]
    if has(path, "metrics.jsonl") or has(path, "eval.json") and not children:
        run_page(read_run(path))
    elif children:
        compare(path, children)
    else:
        raise UserError(
            f"{path}: neither a run (metrics.jsonl or eval.json) nor a directory of runs; name an --output_dir"
        )
    print(f"written to {os.path.join(path, 'report.html')}")


if __name__ == "__main__":
    try:
        report()
    except (UserError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
