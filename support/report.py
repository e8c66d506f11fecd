"""A page to look at: what a run did, or how several runs compare. One file, no network.

    python -m support.report out/demo/align   a run's directory (metrics.jsonl or eval.json): writes
                                              DIR/report.html with settings, curves and rollouts
    python -m support.report out/demo         a directory of runs: prints a table; writes
                                              DIR/results.json with a row for each evaluated run,
                                              DIR/report.html, and a report.html in each run

Everything on a page comes from files, and none of it is trusted. The templates in `page/` escape
text, data stand in JSON, and the browser runs the page's own two scripts only. A log may name any
file of the machine, so a page shows rows and images only, and only from the run's directory, the
folders of the data that run.json or eval.json names, and --data. What is missing, broken or too
large is left out, counted, and said on the page.
"""

import argparse
import base64
import functools
import gzip
import hashlib
import io
import itertools
import json
import math
import os
import re
import shlex
import sys
from collections import Counter
from pathlib import Path
from urllib.parse import quote

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image

from support.errors import UserError, counted
from support.plots import VIEWS, curves, expert_shares, experts, figure, number, overlay, show
from support.rows import IMAGE_FORMATS

HERE = Path(__file__).resolve().parent
STARTS = ("", HERE.parent)  # of a relative path in a log: where we are, or where stages run
NAMES = {"base": "base", "sft": "SFT", "align": "PRISM"}  # in the order in which they are shown
NAMES |= {"sft_grpo": "SFT+GRPO", "align_grpo": "PRISM+GRPO"}
STAGES = dict(sft="SFT", align="alignment", rlvr="RLVR", discriminator="discriminator warm-up")
SHARES = ("accuracy", "caption_accuracy", "format_valid")
SHOWN = (*SHARES, "mean_response_tokens")
# The columns of a rollout: first what was measured, in the order in which it is shown.
MEASURED = ["reward", "accuracy", "advantage", *VIEWS, *(f"teacher_{v}" for v in VIEWS), "length"]
TYPES = dict.fromkeys(MEASURED, (int, float)) | {"step": (int, float), "valid": (int, float)}
TYPES |= {"row": (str, int), "where": object, "images": (list, str), "question": str}
TYPES |= {"answer": (list, str, int, float), "supervision": str, "response": str}
DATA_FILES = (".jsonl", ".json", ".parquet", ".arrow")
# The bytes that rollouts, wrong answers and images may take. With the plotting library's 2 MB and
# a thousand points a curve, a page stays below 20 MB.
TEXT_BYTES, WRONG_BYTES, IMAGE_BYTES = 11.5e6, 0.5e6, 3.5e6
LONGEST = 100_000  # characters of one text
LARGEST = 64e6  # pixels of an image
COLUMNS = 24  # measured values of a rollout

listed = lambda value: value if isinstance(value, list) else [value]
printable = lambda text: "".join(c if c.isprintable() else "?" for c in text)  # no terminal codes


def read_lines(path: Path, notes: list[str]):
    """Yields the objects of a JSONL file and notes how many lines are none. A killed run leaves
    half a line at the end; once the run is resumed, that half line stands in the middle."""
    if not path.exists():
        return
    good, bad, line = 0, [], ""
    with open(path, encoding="utf-8", errors="replace") as file:
        for place, line in enumerate(file, 1):
            try:
                row = json.loads(line) if line.strip() else {}
            except (ValueError, RecursionError):
                row = None
            if not isinstance(row, dict):
                bad.append(place)
            elif row:
                good += 1
                yield row
    if bad and not line.endswith("\n"):
        half = f"the last line ({bad.pop()}) is only half written and was left out; killed run?"
        notes.append(f"{path.name}: {half}")
    if bad and not good:
        raise UserError(f"{path}:{bad[0]}: not JSON; remove the file, or run the stage again")
    if bad:
        told = f"{counted(len(bad), 'broken line')} left out, the first is line {bad[0]}"
        notes.append(f"{path.name}: {told}")


def read_json(path: Path) -> dict:
    """Returns the object of a JSON file, or {} if there is no such file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON ({error}); remove it, or run the stage again") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: holds no JSON object; remove it, or run the stage again")
    return value


def read_run(path: str, data: list[str] = ()) -> dict:
    """Returns what the pages need of a run's directory. `data`: more folders of its rows."""
    path, notes = Path(path), []
    settings, result = read_json(path / "run.json"), read_json(path / "eval.json")
    fields = settings["run"] if isinstance(settings.get("run"), dict) else {}
    stage = str(settings.get("stage", "a run"))
    stage = STAGES.get(stage, stage) + (f", {fields['algorithm']}" if "algorithm" in fields else "")
    lines = list(read_lines(path / "metrics.jsonl", notes))
    if lines and "model_type" not in read_json(path / "config.json"):
        notes.append("This run has not ended: it has not written its result yet.")
    for line, view in itertools.product(lines, VIEWS):  # routing, averaged over layers, is a metric
        for e, shares in enumerate(zip(*expert_shares(line, view))):
            line[f"{view}: expert {e}"] = sum(shares) / len(shares)
    held = [line for line in lines if "validation_pairs" in line]  # written after the last step
    trained = [line for line in lines if "validation_pairs" not in line]
    steps = {number(line.get("step")): line for line in trained}  # of a repeated step, the last
    if odd := sum(number(line.get("step")) is None for line in trained):
        notes.append(f"metrics.jsonl: left out {counted(odd, 'line')} without a step")
    times = [time for line in lines if (time := number(line.get("time/step"))) is not None]
    name, command = os.path.basename(os.path.abspath(path)), settings.get("command") or ""
    parts = result.get("by_source") if isinstance(result.get("by_source"), dict) else {}
    named = [*listed(fields.get("data")), fields.get("image_dir"), *listed(result.get("data"))]
    return {
        "path": path,
        "name": name,
        "link": quote(os.fsencode(name)),
        "label": NAMES.get(name, name),
        "stage": stage,
        "fields": fields,
        "command": shlex.join(map(str, command)) if isinstance(command, list) else str(command),
        "commit": str(settings.get("commit") or ""),
        "lines": [steps[step] for step in sorted(steps.keys() - {None})],
        "held": held[-1] if held else {},
        "seconds": sum(times) if any(times) else None,
        "eval": result,
        "parts": {k: part for k, part in parts.items() if isinstance(part, dict)},  # by source
        "folders": data_folders(str(path), *data) + tuple(filter(narrow, data_folders(*named))),
        "notes": notes,
    }


def data_folders(*names) -> tuple[str, ...]:
    """Returns the folders that names of data stand for: a folder for itself, a data file for the
    folder in which it lies. What does not exist, such as a hub id, stands for none."""
    places = [os.path.join(start, n) for n in names if isinstance(n, str) for start in STARTS if n]
    files = [place for place in places if place.endswith(DATA_FILES) and os.path.isfile(place)]
    folders = [*filter(os.path.isdir, places), *map(os.path.dirname, files)]
    return tuple(os.path.join(os.path.realpath(folder), "") for folder in folders)


def narrow(folder: str) -> bool:
    """Whether a folder that a run names is not above the user's home. A run that was received could
    otherwise open the whole machine."""
    above = os.path.dirname(os.path.realpath(os.path.expanduser("~")))
    return not os.path.join(above, "").startswith(folder)


def locate(name: str, folders: tuple[str, ...]) -> str:
    """Returns the path of a file that a log names, relative to the working directory or to the
    project. The file must lie in one of the folders, after links are followed."""
    places = [os.path.join(start, name) for start in STARTS]
    places = [os.path.realpath(place) for place in places if os.path.isfile(place)]
    if not places:
        raise FileNotFoundError("no such file")
    for place in places:
        if place.startswith(folders):
            return place
    raise PermissionError("outside the run's data folders; --data FOLDER adds a folder")


class Pictures:
    """The images of a page, each once, 480 pixels on the long side; when half of the budget is
    spent, 240. The first image that exceeds the budget and all that follow are dropped."""

    def __init__(self, folders: tuple[str, ...]):
        self.folders, self.size, self.dropped = folders, 0, 0
        self.places: dict[str, int | str] = {}
        self.kept: list[tuple] = []  # (data URI, source, width, height)

    def place(self, source: str) -> int | str:
        """Returns the image's place among the kept images, or why it cannot be shown."""
        if source not in self.places:
            name = source if len(source) <= 200 else source[:200] + "..."
            try:
                uri, size = self._read(source) if not self.dropped else ("", None)
                if self.dropped or self.size + len(uri) > IMAGE_BYTES:
                    self.dropped += 1
                    raise ValueError("the page's budget for images is spent")
                self.size += len(uri)
                self.kept.append((uri, name, *size))
                self.places[source] = len(self.kept) - 1
            except Exception as error:  # Pillow raises many kinds
                self.places[source] = f"{name}, {str(error)[:200]}"
        return self.places[source]

    def _read(self, source: str) -> tuple[str, tuple[int, int]]:
        if re.fullmatch(r"\d+ bytes", source):
            raise ValueError("it is part of a row, not a file")
        with Image.open(locate(source, self.folders), formats=IMAGE_FORMATS) as image:
            size, side = image.size, 480 if self.size < IMAGE_BYTES / 2 else 240
            if size[0] * size[1] > LARGEST:
                raise ValueError(f"{size[0]} x {size[1]} pixels are too many")
            image.draft("RGB", (side, side))  # decodes a JPEG at a smaller scale
            image = image.convert("RGB")
        image.thumbnail((side, side))
        kind = "png" if max(size) <= 240 else "jpeg"
        image.save(buffer := io.BytesIO(), kind)
        return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}", size


def measured(result: dict, name: str):
    """Returns a value of an evaluation. A share of rows becomes (share, low, high), its 95% Wilson
    interval over rows; for the mean of several samples a row that interval is rather too wide."""
    p, n, z = number(result.get(name)), number(result.get("rows")), 1.96
    if name not in ("accuracy", "pass_at_k") or p is None or n is None or n < 1 or not 0 <= p <= 1:
        return result.get(name)
    middle, half = p + z**2 / (2 * n), z * math.sqrt(p * (1 - p) / n + (z / (2 * n)) ** 2)
    return p, *((middle + side) / (1 + z**2 / n) for side in (-half, half))


def pack(value) -> Markup:
    """Returns JSON that may stand in a script element: without any `<` it can end or open none."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return Markup(re.sub("[<\u2028\u2029]", lambda found: f"\\u{ord(found[0]):04x}", text))


PAGES = Environment(loader=FileSystemLoader(HERE / "page"), autoescape=True, trim_blocks=True)
PAGES.undefined = StrictUndefined
PAGES.filters |= {"show": show, "pack": pack, "listed": listed}
PAGES.filters["breakable"] = lambda text: Markup.escape(text).replace("_", Markup("_<wbr>"))
# The parts of a page as markup, for a page that is put together elsewhere.
part = lambda name, *values: str(getattr(PAGES.get_template("parts.html").module, name)(*values))
table = lambda head, rows: part("table", head, rows)
plot = lambda *values, **options: part("figure", figure(*values, **options))
routing = lambda run: part("routing", experts(run))
digest = lambda code: base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()


@functools.cache
def library() -> tuple[str, str]:
    """Returns plotly.js: the hash by which the browser knows it, and the code, gzip in base64."""
    from plotly.offline import get_plotlyjs  # it takes a while, and some machines lack it

    code = get_plotlyjs()
    return digest(code), base64.b64encode(gzip.compress(code.encode(), mtime=0)).decode()


def write_page(path: str, title: str, body="", template="page.html", pictures=(), **values) -> None:
    """Writes a page from a template and its values, or around a body that is markup."""
    style, script = ((HERE / "page" / f"page.{kind}").read_text("utf-8") for kind in ("css", "js"))
    known, plotly = library()
    values |= {"title": title, "pictures": pictures, "hashes": [digest(script), known]}
    values |= {"body": body, "style": style, "script": script, "plotly": plotly}
    text = PAGES.get_template(template).render(values)
    Path(path).write_text(text, encoding="utf-8", errors="replace")  # lone surrogates have no code


def clean(row: dict, count: Counter) -> tuple[dict, list, dict]:
    """Returns a row of a log as the page takes it: its prompt, [response, valid], what was
    measured of it. Values of a wrong type are counted and become None."""
    values = {}
    for name, value in row.items():
        short = name.removeprefix("score_")
        short = short if short in VIEWS else name[:100]
        if value is not None and not isinstance(value, TYPES.get(short, (int, float, str))):
            count["values"] += 1
            value = None
        elif isinstance(value, str):
            count["texts"] += len(value) > LONGEST
            value = value[:LONGEST]
        values[short] = number(value) if type(value) in (int, float) else value
    known = {name: values.pop(name, None) for name in TYPES if name not in MEASURED}
    images, valid = listed(known["images"] or []), known["valid"]
    count["values"] += sum(not isinstance(image, str) for image in images)
    prompt = {
        "step": known["step"],
        "row": show(known["row"]) if "row" in row else "",
        "question": (known["question"] or "").replace("<image>", ""),
        "images": [image for image in images if isinstance(image, str)],
        "answer": " or ".join(map(show, listed(known["answer"])))[:LONGEST],
        "supervision": known["supervision"],
    }
    return prompt, [known["response"], None if valid is None else int(bool(valid))], values


def shelve(run: dict, name: str, rows, budget: float, pictures: Pictures) -> dict | None:
    """Returns rollouts by prompt, as the page reads them: {"names", "groups", "every"}. Where they
    exceed the budget, every second logged step is left out, repeatedly until the rest fits, and
    one step in "every" is left. Notes what was left out."""
    groups, steps, names, total, every, count = {}, {}, {}, 0, 1, Counter()
    weight = lambda *values: len(pack(values).encode(errors="replace"))
    for row in rows:
        if number(row.get("step")) is None or not isinstance(row.get("response"), str):
            count["rows"] += 1
            continue
        prompt, branch, values = clean(row, count)
        key = prompt["step"], prompt["row"], prompt["question"]
        size = weight(branch, list(values.values())) + (0 if key in groups else weight(prompt))
        steps.setdefault(prompt["step"], len(steps))
        while total + size > budget > size and every < len(steps):
            every *= 2
            for other in [other for other in groups if steps[other[0]] % every]:
                total -= groups[other]["size"]
                count["dropped"] += len(groups.pop(other)["branches"])
        if steps[prompt["step"]] % every or total + size > budget:
            count["dropped"] += 1
            continue
        group = groups.setdefault(key, {"prompt": prompt, "branches": [], "size": 0})
        group["branches"].append((branch, values))
        group["size"] += size
        total += size
        names |= dict.fromkeys(values)
    order = {name: i for i, name in enumerate(MEASURED)}
    names = sorted(names, key=lambda name: order.get(name, len(order)))
    count["values"] += len(names[COLUMNS:])
    told = {
        "rows": ("line", "left out, for want of a step or a response"),
        "values": ("value", "of a wrong type, or too many to show, left out"),
        "texts": ("text", f"cut after {LONGEST} characters"),
        "dropped": ("rollout", "not on this page, which would be too large with all"),
    }
    for kind, (noun, what) in told.items():
        if count[kind]:
            run["notes"].append(f"{name}: {counted(count[kind], noun)} {what}")
    shelf = []
    for group in sorted(groups.values(), key=lambda group: group["prompt"]["step"]):
        images = [pictures.place(image) for image in group["prompt"]["images"]]
        cells = [[*pair, *map(values.get, names[:COLUMNS])] for pair, values in group["branches"]]
        shelf.append(group["prompt"] | {"images": images, "branches": cells})
    found = shelf or count.total()
    return {"names": names[:COLUMNS], "groups": shelf, "every": every} if found else None


def data_row(where: str, run: dict) -> dict:
    """Returns question and images of "file:line", if that is a JSONL file of the run's data."""
    path, _, line = where.rpartition(":")
    try:
        if not path.endswith(".jsonl"):
            return {}
        with open(locate(path, run["folders"]), encoding="utf-8", errors="replace") as file:
            row = json.loads(next(itertools.islice(file, int(line) - 1, None), "{}"))
        images = listed(row.get("images") or row.get("image") or [])
        images = [os.path.join(os.path.dirname(path), str(image)) for image in images]
        return {"question": row.get("question") or row.get("prompt"), "images": images}
    except (ValueError, AttributeError, RecursionError):  # the file may have changed since
        return {}
    except OSError as error:
        told = "is gone" if isinstance(error, FileNotFoundError) else f"is {error}"
        note = f"wrong answers are shown without question and image: {path} {told}"
        run["notes"] += [note] if note not in run["notes"] else []
        return {}


def wrong_answers(run: dict, pictures: Pictures, most: int = 12) -> dict | None:
    """Returns some wrong answers, spread evenly over generations.jsonl, as `shelve` does."""
    logged = read_lines(run["path"] / "generations.jsonl", run["notes"])
    wrong = [row for row in logged if not row.get("correct")]
    some = [wrong[i * len(wrong) // most] for i in range(most)] if len(wrong) > most else wrong
    rows = []
    for row in some:
        where = str(row.get("where", ""))
        row = {"valid" if k == "format_valid" else k: v for k, v in row.items() if k != "correct"}
        rows.append(row | data_row(where, run) | {"step": 0, "row": show(where)})
    shelf = shelve(run, "generations.jsonl", rows, WRONG_BYTES, pictures)
    return shelf and shelf | {"shown": len(some), "wrong": len(wrong)}


def run_page(run: dict, compared: bool = False) -> None:
    """Writes report.html of one run. `compared`: a page of several runs is in the folder above."""
    path, notes, result = run["path"], run["notes"], run["eval"]
    names = [*SHOWN, "truncated", "rows"]
    names[1:1] = ["pass_at_k"] if "pass_at_k" in result else []
    parts = {"all": result, **run["parts"]}
    rows = [[source, *(measured(part, name) for name in names)] for source, part in parts.items()]
    pictures, (figures, constant) = Pictures(run["folders"]), curves(run)
    logged = read_lines(path / "rollouts.jsonl", notes)
    rollouts = shelve(run, "rollouts.jsonl", logged, TEXT_BYTES, pictures)
    told = lambda name: name.startswith(("validation_", "probe_"))
    wrong = wrong_answers(run, pictures)
    if pictures.dropped:
        missing = f"of {counted(len(pictures.places), 'image')} {pictures.dropped} not on this page"
        notes.append(f"{missing}, which would be too large with all")
    write_page(
        path / "report.html",
        f"{run['name']}: {run['stage']}",
        template="run.html",
        pictures=pictures.kept,
        compared=compared or (path / ".." / "results.json").exists(),
        run=run,
        last=run["lines"][-1] if run["lines"] else {},
        held=[[k.removeprefix("validation_"), v] for k, v in run["held"].items() if told(k)],
        figures=figures,
        constant=constant,
        experts=experts(run),
        warm=number(result.get("temperature")),
        evaluation=[["source", *names], rows],
        rollouts=rollouts,
        wrong=wrong,
    )
    for note in notes:
        print(printable(f"note: {path}: {note}"), file=sys.stderr)


def compare(path: Path, children: list[str], data: list[str]) -> None:
    """Prints a table of runs; writes results.json, report.html, and the page of each run."""
    runs, notes = [], []
    for child in [*(n for n in NAMES if n in children), *(c for c in children if c not in NAMES)]:
        try:
            run_page(run := read_run(path / child, data), compared=True)
            runs.append(run)
        except Exception as error:  # whatever is wrong with one run, the others have their page
            kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
            notes.append(f"{child} is left out: {kind}{' '.join(str(error).split())}")
    judged = [run for run in runs if run["eval"]]
    for run in runs:
        if not run["eval"] and run["stage"] != STAGES["discriminator"]:
            makes = f"make it with: python eval.py --ckpt {run['path']} --data DATA"
            notes.append(f"{run['label']} is not in the table: it has no eval.json; {makes}")
    for note in notes:
        print(printable(f"note: {note}"), file=sys.stderr)
    head, score = ["name", *SHOWN, "seconds"], lambda run, name: number(run["eval"].get(name))
    rows = [[run["label"], *(score(run, n) for n in SHOWN), run["seconds"]] for run in judged]
    results = json.dumps([dict(zip(head, row)) for row in rows], indent=1, ensure_ascii=False)
    (path / "results.json").write_text(results + "\n", encoding="utf-8", errors="replace")
    lines = [[show(cell, ".3f") for cell in line] for line in ([head, *rows] if rows else [])]
    wide = [max(map(len, column)) for column in zip(*lines)]
    for first, *others in lines:
        print(printable("  ".join([first.ljust(wide[0]), *map(str.rjust, others, wide[1:])])))
    bars = []
    for name in SHARES:
        values = [(run["label"], measured(run["eval"], name)) for run in judged]
        points = [(x, *(y if isinstance(y, tuple) else [number(y)])) for x, y in values]
        bars += [(name, points)] if any(y is not None for _, y, *_ in points) else []
    sources = sorted({source for run in judged for source in run["parts"]})
    part = lambda run, source: measured(run["parts"].get(source, {}), "accuracy")
    write_page(
        path / "report.html",
        f"{os.path.basename(os.path.abspath(path))}: runs compared",
        template="compare.html",
        notes=notes,
        head=head,
        rows=[[r[0], measured(run["eval"], "accuracy"), *r[2:]] for run, r in zip(judged, rows)],
        bars=figure("Accuracy and format", "share of rows", bars, "", kind="bar") if bars else None,
        sources=sources,
        by_source=[[run["label"], *(part(run, source) for source in sources)] for run in judged],
        runs=runs,
        overlaid=overlay(runs),
    )


def report() -> None:
    told = "Writes report.html, the page of a run, or of several runs, into each directory."
    parser = argparse.ArgumentParser("python -m support.report", description=told)
    parser.add_argument("dir", nargs="+", help="the directory of a run, or a directory of runs")
    told = "one more folder from which the page may show rows and images; may be repeated"
    parser.add_argument("--data", action="append", default=[], metavar="FOLDER", help=told)
    args, logs = parser.parse_args(), ("metrics.jsonl", "eval.json")
    for path in map(Path, args.dir):
        if not path.is_dir():
            told = "no such directory; name the --output_dir of a run, or a directory of runs"
            raise UserError(f"{path}: {told}")
        has = lambda folder: [log for log in logs if os.path.isfile(path / folder / log)]
        children = [child for child in sorted(os.listdir(path)) if has(child)]
        if "metrics.jsonl" in has(".") or has(".") and not children:
            run_page(read_run(path, args.data))
        elif children:
            compare(path, children, args.data)
        else:
            told = "neither a run (metrics.jsonl or eval.json) nor a directory of runs"
            raise UserError(f"{path}: {told}; name an --output_dir")
        print(printable(f"written to {path / 'report.html'}"))


if __name__ == "__main__":
    try:
        report()
    except (UserError, OSError, ImportError) as error:
        print(printable(f"error: {' '.join(str(error).split())}"), file=sys.stderr)
        sys.exit(2)
