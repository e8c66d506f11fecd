"""The figures of a page: the metrics of a run, or of several, as plotly draws them.

A run is what `report.read_run` returns. Nothing here reads a file.
"""

import html
import itertools
import math

from support.errors import counted

VIEWS = ("perception", "reasoning")
PROBES = ("picture", "digit", "question", "answer")
# Title, unit of the vertical axis, metrics. A metric that is in no group has a plot of its own.
GROUPS = [
    ("Loss", "loss", ["loss"]),
    ("Reward, accuracy, format", "share or reward", ["reward", "accuracy", "format_valid"]),
    ("Score gap by view: supervision - policy", "score", [f"score_gap_{v}" for v in VIEWS]),
    ("Pair accuracy: supervision above policy", "share", [f"pair_accuracy_{v}" for v in VIEWS]),
    ("Probe of the discriminator: 0.5 is blind", "share", [f"probe_{k}" for k in PROBES]),
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
    title, names = f"Routing in the {view} view, mean over layers", f"{view}: expert "
    GROUPS.append((title, "part of choices", [names + str(e) for e in range(16)]))
OVERLAID = ["accuracy", "reward", "format_valid", "loss"]
OVERLAID += [f"{name}_{view}" for name in ("score_gap", "pair_accuracy") for view in VIEWS]
OVERLAID += ["response_length", "entropy", "grad_norm", "learning_rate", "time/step"]
MOST_PLOTS = 40  # of metrics that are in no group

plain = lambda text: html.escape(text, quote=False)  # plotly reads a little markup in names


def number(value) -> float | None:
    """Returns a number that can be drawn, or None for null, NaN, anything that is no number, and
    numbers so huge that their sums would overflow."""
    good = isinstance(value, (int, float)) and not isinstance(value, bool)
    return value if good and abs(value) < 1e300 else None


def show(value, form: str = ".4g") -> str:
    """Returns a value as text, (value, low, high) as a value with its interval. An en dash stands
    where nothing was measured."""
    if isinstance(value, tuple):
        return f"{show(value[0], form)} [{show(value[1], form)}, {show(value[2], form)}]"
    if value is None or isinstance(value, float) and not math.isfinite(value):
        return "–"
    if isinstance(value, float):
        return format(value, form if abs(value) < 1000 else ".1f" if abs(value) < 1e9 else ".4g")
    return str(value) if len(str(value)) <= 500 else str(value)[:500] + "..."


def expert_shares(line: dict, view: str) -> list[list[float]]:
    """Returns the shares (layers, experts) of a line of metrics, or [] if it holds none."""
    layers = line.get(f"expert_share_{view}")
    good = isinstance(layers, list) and all(isinstance(layer, list) for layer in layers)
    good = good and len({len(layer) for layer in layers} | {0}) == 2
    return layers if good and all(number(x) is not None for row in layers for x in row) else []


def running_mean(points: list[tuple], width: int) -> list[tuple]:
    """Returns for each point the mean of the values measured at most width / 2 places away; a gap
    stays a gap."""
    totals = list(itertools.accumulate((y or 0.0 for _, y in points), initial=0.0))
    counts = list(itertools.accumulate((y is not None for _, y in points), initial=0))
    ends = lambda i: (max(0, i - width // 2), min(len(points), i + width // 2 + 1))
    mean = lambda a, b: (totals[b] - totals[a]) / (counts[b] - counts[a])
    return [(x, None if y is None else mean(*ends(i))) for i, (x, y) in enumerate(points)]


def trace(label: str, points: list[tuple], color: int, kind: str) -> dict:
    """Returns one series for plotly. A measurement between two gaps, where no line can go, is a
    dot. A point (x, y, low, high) has an error bar from low to high."""
    y = [number(p[1]) for p in points]
    out = {"name": plain(label), "x": [p[0] for p in points], "meta": color, "marker": {}}
    out["y"] = [None if value is None else float(f"{value:.6g}") for value in y]
    if any(len(p) == 4 for p in points):
        ends = [(p[3] - p[1], p[1] - p[2]) if len(p) == 4 else (0, 0) for p in points]
        out["error_y"] = {"type": "data", "symmetric": False}
        out["error_y"] |= dict(zip(("array", "arrayminus"), map(list, zip(*ends))))
    if kind == "bar":
        return out | {"type": "bar", "x": list(map(plain, out["x"]))}
    around = [None, *y, None]
    alone = [a is None and c is None for a, c in zip(around, around[2:])]
    dots = [6 if dot or len(p) == 4 else 0 for dot, p in zip(alone, points)]
    mode = "lines+markers" if any(dots) else "lines"
    return out | {"type": "scatter", "mode": mode, "marker": {"size": dots}}


def figure(title, ylabel, series, xlabel="step", colors=None, top=None, kind="line") -> dict:
    """Returns a figure of lines or of bars. `series`: (label, [(x, y or None) or (x, y, low, high),
    ...]) each. Shares are drawn from 0 to 1, so that runs compare. Values above `top` are not
    drawn. Long series get a running mean, and of very long ones not every step is drawn."""
    ys = [y for _, points in series for _, y, *_ in points if number(y) is not None]
    count = len({x for _, points in series for x, *_ in points})
    noisy = kind == "line" and ylabel != "rate" and not any(p[2:] for _, ps in series for p in ps)
    span, skip = count // 25 | 1 if noisy else 1, math.ceil(count / 1000)
    data = []
    for (label, points), color in zip(series, colors or itertools.count()):
        mean = running_mean(points, span) if span > 1 else points
        thick = trace(label, mean[::skip], color, kind)
        if span > 1:
            thin = trace(label, points[::skip], color, kind) | {"showlegend": False}
            data.append(thin | {"legendgroup": thick["name"]})
            thick |= {"legendgroup": thick["name"], "hoverinfo": "skip"}
        data.append(thick)
    axis = lambda text: {"title": {"text": plain(text), "standoff": 6}}
    layout = {"xaxis": axis(xlabel), "yaxis": axis(ylabel)}
    layout["showlegend"] = len(series) > 1 or series[0][0] != title.lower()
    if any(isinstance(x, str) for _, points in series for x, *_ in points):
        layout["xaxis"]["type"] = "category"
    low, high = min(ys), max(ys)
    if ylabel.startswith("share") and 0 <= low and high <= 1:
        layout["yaxis"]["range"] = [-0.02, 1.02]
    elif top is not None:
        layout["yaxis"]["range"] = [0, top]
    elif high - low <= 1e-9 * max(abs(high), abs(low)):
        layout["yaxis"]["range"] = [0, high * 1.2] if high > 0 else [low - 1, high + 1]
    each = "each step" if skip == 1 else f"one step in {skip}"
    told = [f"thin: {each}, thick: mean over {span} steps"] if span > 1 else []
    if above := sum(y > top for y in ys) if top is not None else 0:
        told.append(f"above the plot: {above} values, up to {high:.4g}")
    return {"title": title, "data": data, "layout": layout, "told": "; ".join(told)}


def column(run: dict, name: str) -> list[tuple]:
    """Returns (step, value or None) for one metric, of the steps whose line has it; [] where it was
    never measured."""
    points = [(line["step"], number(line[name])) for line in run["lines"] if name in line]
    return points if any(y is not None for _, y in points) else []


def curves(run: dict) -> tuple[list[dict], str]:
    """Returns the figures of all metrics of a run, and a text of those that never change."""
    names = dict.fromkeys(name for line in run["lines"] for name in line if name != "step")
    columns = {name: points for name in names if (points := column(run, name))}
    times = [name for name in columns if name.startswith("time/")]
    grouped = [*GROUPS, ("Seconds, by phase", "seconds", times)]
    rest = [name for name in columns if not any(name in group for _, _, group in grouped)]
    if more := len(rest[MOST_PLOTS:]):
        run["notes"].append(f"{counted(more, 'further metric')} without a plot")
        del rest[MOST_PLOTS:]
    still = [k for k in columns if k in rest or k.startswith(("ratio", "clipped"))]
    still = [k for k in still if len(columns[k]) > 1 and len({y for _, y in columns[k]}) == 1]
    seconds = sorted(y for _, y in columns.get("time/step", []) if y is not None)
    limit = 3 * seconds[len(seconds) // 2] if seconds else 0  # a slow first step is cut off
    figures = []
    for title, ylabel, group in grouped + [(name, "", [name]) for name in rest]:
        series = [(name, columns[name]) for name in group if name in columns and name not in still]
        cut = ylabel == "seconds" and seconds and 0 < limit < seconds[-1]
        if series:
            figures.append(figure(title, ylabel, series, top=limit if cut else None))
    return figures, ", ".join(f"{name} {show(columns[name][0][1])}" for name in still)


def experts(run: dict) -> dict | None:
    """Returns the expert shares of the last step that has any: a row per view and layer."""
    for line in reversed(run["lines"]):
        if expert_shares(line, VIEWS[0]):
            rows = [(view, i, x) for view in VIEWS for i, x in enumerate(expert_shares(line, view))]
            return {"step": line["step"], "rows": rows, "count": len(rows[0][2])}


def overlay(runs: list[dict]) -> list[dict]:
    """Returns a figure for each metric that several runs have. Losses of different stages are
    different quantities and stay apart."""
    figures = []
    for name in OVERLAID:
        ylabel = next((ylabel for _, ylabel, group in GROUPS if name in group), "seconds")
        have = [(run, points) for run in runs if (points := column(run, name))]
        for stage in dict.fromkeys(run["stage"] if name == "loss" else "" for run, _ in have):
            some = [(run, points) for run, points in have if stage in ("", run["stage"])]
            ends = [points[-1][0] or 1 for _, points in some]
            scaled = max(ends) > 4 * min(ends)  # lengths differ much: draw each from 0 to 100 %
            series = []
            for (run, points), end in zip(some, ends):
                points = [(100 * x / end, y) for x, y in points] if scaled else points
                series.append((run["label"] + (f" ({end} steps)" if scaled else ""), points))
            if len(some) > 1:
                title, xlabel = f"{name} ({stage})", "% of the run" if scaled else "step"
                colors = [runs.index(run) for run, _ in some]
                figures.append(figure(title if stage else name, ylabel, series, xlabel, colors))
    return figures
