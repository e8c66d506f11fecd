"""The paper's claims on the embedded world, over seeds, with controls of equal time and equal data.

    make study                                     every run that is missing, then the tables
    python benchmarks/study.py --seeds 0 --only prism_grpo sft_grpo

An arm is a chain of the project's own stages, run as a user runs them. A seed draws everything
anew: images, initial weights, the order of rows, what is sampled. Runs that several arms begin
with are made once. Each finished arm of a seed is one line of `benchmarks/results/study.jsonl`.
What is there is not run again, so a study that was stopped goes on. What `docs/study.md`, its
picture and `docs/paper-map.md` show is computed from these lines.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from itertools import zip_longest
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
from scipy.stats import t as student
from tqdm import tqdm

matplotlib.use("svg")
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from support import digits, report  # noqa: E402
from support.digits import read_rows  # noqa: E402

OUT, RESULTS = ROOT / "out/study", ROOT / "benchmarks/results/study.jsonl"
SUPERVISED = 24  # responses that the alignment has
SIZES = (16, SUPERVISED, 48, 160, 480)  # of the figure
SEEDS, FEW = range(5), range(3)  # of arms and controls; of ablations and the figure
SAMPLES = 8  # a question, for the mean and pass@8
# Steps of RL in the time of the warm-up, the alignment and the 150 steps after it: their median
# step took 0.50, 0.87 and 0.61 s on a quiet machine, one core, three turns (160 to 165 more).
MATCHED = 150 + 163
# What every run has besides the world's settings and its own flags.
ALWAYS = dict(dataloader_num_workers=0, max_rollout_rows=256, save_steps=100000)
STEPS = (50, 100)  # of RL, after which an arm of SPEED is measured as well


class Stage:
    """One run: a kind of run in digits.SETTINGS, the run that it starts from, a file of the world
    (`prompts:24` are the first 24 rows of one), and flags in place of the settings. Flags that
    name other runs mean their directories."""

    def __init__(self, kind: str, parent: str, data: str, **flags):
        self.kind, self.parent, self.data, self.flags = kind, parent, data, flags
        self.parents = [parent, *(flags[n] for n in ("policy", "discriminator") if n in flags)]


def stages() -> dict[str, Stage]:
    """Every run of a seed by its name. An arm has the name of its last run."""

    def warm_up(policy="sft", **flags):
        return Stage("discriminator", "base", "curated", policy=policy, **flags)

    def align(rows=SUPERVISED, policy="sft", discriminator="warm_up", **flags):
        return Stage("align", policy, f"prompts:{rows}", discriminator=discriminator, **flags)

    runs = {
        "base": Stage("pretrain", "init", "pretrain"),
        "sft": Stage("sft", "base", "sft"),
        "warm_up": warm_up(),
        "prism": align(),
        # Controls
        "more_sft": Stage("more_sft", "sft", f"prompts:{SUPERVISED}"),
        "curated": Stage("sft", "base", "curated"),
        "frozen": align(discriminator_learning_rate=0),
        # Ablations
        "dense_warm_up": warm_up(experts="dense"),
        "text_warm_up": warm_up(experts="text"),
        "dedicated_warm_up": warm_up(experts="dedicated"),
        "dense": align(discriminator="dense_warm_up"),
        "text": align(discriminator="text_warm_up"),
        "dedicated": align(discriminator="dedicated_warm_up"),
        "alpha_0": align(alpha=0),
        "alpha_1": align(alpha=1),
        "cold": align(discriminator="base"),
        "no_sft": align(policy="base"),
    }
    for size in SIZES:
        if size != SUPERVISED:
            runs[f"prism_{size}"] = align(size)
            runs[f"more_sft_{size}"] = Stage("more_sft", "sft", f"prompts:{size}")
    for name in [name for name in runs if "warm_up" not in name and name != "base"]:
        for algorithm in ("grpo", "dapo", "gspo") if name in ("sft", "prism") else ("grpo",):
            runs[f"{name}_{algorithm}"] = Stage("rlvr", name, "questions", algorithm=algorithm)
    runs["longer_grpo"] = Stage("rlvr", "sft", "questions", algorithm="grpo", max_steps=MATCHED)
    return runs


VIEWS = ("perception", "reasoning")
CURVES = [f"{kind}_{view}" for kind in ("score_gap", "pair_accuracy") for view in VIEWS]
ARMS = "base sft sft_grpo sft_dapo sft_gspo prism prism_grpo prism_dapo prism_gspo".split()
CONTROLS = "longer_grpo more_sft more_sft_grpo curated curated_grpo frozen frozen_grpo".split()
ABLATIONS = "dense text dedicated alpha_0 alpha_1 cold no_sft".split()
ABLATIONS = [f"{name}_grpo" for name in ABLATIONS]
FIGURE = [f"{name}_{size}_grpo" for size in SIZES for name in ("prism", "more_sft")]
FIGURE = [name for name in FIGURE if f"_{SUPERVISED}_" not in name]
GAMES = ["prism", "frozen", *(name.removesuffix("_grpo") for name in ABLATIONS)]
GAMES += [f"prism_{size}" for size in SIZES if size != SUPERVISED]
SPEED = ["sft_grpo", "more_sft_grpo", "prism_grpo"]
DRIFTED = "base sft sft_grpo prism prism_grpo more_sft more_sft_grpo frozen frozen_grpo".split()
LABELS = {"sft": "SFT", "prism": "PRISM", "grpo": "GRPO", "dapo": "DAPO", "gspo": "GSPO"}
LABELS |= {"longer_grpo": "SFT + GRPO for as long as PRISM + GRPO"}
LABELS |= {"more_sft": "SFT, more SFT on the alignment's rows"}
LABELS |= {"curated": "SFT on the curated rows alone,", "frozen": "PRISM, frozen discriminator,"}
LABELS |= {"dense": "PRISM, dense discriminator,", "text": "PRISM, text-only discriminator,"}
LABELS |= {"dedicated": "PRISM, dedicated experts,", "cold": "PRISM, no warm-up,"}
LABELS |= {"alpha_0": "PRISM, alpha 0,", "alpha_1": "PRISM, alpha 1,"}
LABELS |= {"no_sft": "PRISM without SFT,"}
SHARES = [f"expert_share_{view}" for view in VIEWS]
# Columns of the tables.
MAIN = {"accuracy": "accuracy", "sampled_accuracy": "mean of 8", "pass_at_8": "pass@8"}
MAIN |= {"caption_accuracy": "captions", "format_valid": "format"}
MAIN |= {"mean_response_tokens": "tokens", "run_seconds": "seconds"}
ENDS = ("accuracy", "sampled_accuracy")
BEFORE = {"before": "before RL", "sampled_before": "before RL, mean of 8"}
SOONER = {"before": BEFORE["before"]} | {f"after_{step}": f"{step} steps" for step in STEPS}
SOONER |= {"accuracy": "after RL"}
ABLATED = BEFORE | {"captions_before": "before RL, captions"} | MAIN
DRIFT = {"misread_per_digit": "misread a digit", "wrong_per_step": "wrong a step"}
DRIFT |= {"wrong_by_caption": "answer not from its caption"}
DRIFT |= {"wrong_sums_read": "of sums, without 3, 7, 9", "wrong_sums_misread": "of sums, with"}
DRIFT |= {"kl_from_base": "KL from the base, nats"}
GAME = {f"gap_{at}_{view}": f"gap, {view}, {at}" for view in VIEWS for at in ("first", "last")}
DECIMALS = {"mean_response_tokens": 1, "kl_from_base": 1, "run_seconds": 0}  # 3 of all others


# --------------------------------------------------------------------------------------------------
# Running


def world(seed: int) -> dict[str, str]:
    return digits.build(OUT / f"seed-{seed}/world", digits.World(seed=seed, prompt_rows=max(SIZES)))


def rows_of(seed: int, data: str) -> str:
    """The path of a file of the world, or of the first rows of one, or (-100) of its last."""
    name, _, count = data.partition(":")
    path = Path(world(seed)[name])
    if not count:
        return str(path)
    some = path.with_name(f"{name}-{count}.jsonl")
    if not some.exists():
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        unfinished = some.with_suffix(".tmp")
        n = int(count)
        unfinished.write_text("".join(lines[n:] if n < 0 else lines[:n]), encoding="utf-8")
        unfinished.replace(some)
    return str(some)


def call(script: str, log: Path, **flags) -> None:
    """A stage as a user runs it. What it says goes to a file."""
    command = [sys.executable, str(ROOT / script)]
    command += [f"--{name}={value}" for name, value in flags.items()]
    env = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with open(log, "a") as file:
        done = subprocess.run(command, stdout=file, stderr=file, env=env, cwd=ROOT)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}, see {log}")


def seconds(seed: int, name: str) -> float:
    """What the steps of a run took, each as long as the middle one: a pause does not count."""
    steps = [x["time/step"] for x in read_rows(OUT / f"seed-{seed}/{name}/metrics.jsonl")]
    return statistics.median(steps) * len(steps)


def finished(folder: Path) -> bool:
    path = folder / "run.json"
    return path.exists() and bool(json.loads(path.read_text()).get("finished"))


def run(seed: int, name: str) -> Path:
    """The directory of a run, which is made, and those that it starts from before, if need be."""
    if name == "init":
        return Path(world(seed)["init"])
    stage, folder = stages()[name], OUT / f"seed-{seed}" / name
    parents = {parent: str(run(seed, parent)) for parent in stage.parents}
    if finished(folder):
        return folder
    flags = digits.SETTINGS[stage.kind] | ALWAYS | stage.flags
    flags |= {n: parents[flags[n]] for n in ("policy", "discriminator") if n in flags}
    if name in SPEED:
        flags |= dict(save_hf_steps=STEPS[0], save_total_limit=100)
    script = {"pretrain": "sft.py", "more_sft": "sft.py"}.get(stage.kind, f"{stage.kind}.py")
    if script == "sft.py":
        del flags["max_rollout_rows"]
    source = "ckpt" if script in ("align.py", "rlvr.py") else "model"
    flags |= {source: parents[stage.parent], "data": rows_of(seed, stage.data), "seed": seed}
    log = folder.with_suffix(".log")
    folder.parent.mkdir(parents=True, exist_ok=True)
    call(script, log, output_dir=folder, resume=True, **flags)
    if not finished(folder):
        raise RuntimeError(f"{folder} was stopped at a checkpoint; start again to go on")
    return folder


def measure(seed: int, name: str) -> dict:
    """One arm of one seed, in numbers."""
    folder, test = run(seed, name), rows_of(seed, "test")
    log, flags = folder.with_suffix(".log"), digits.SETTINGS["eval"] | dict(max_rollout_rows=256)
    call("eval.py", log, ckpt=folder, data=test, output_dir=folder / "eval", **flags)
    sooner = {}  # accuracy at some steps of RL
    for step in STEPS if name in SPEED else ():
        path = folder / f"checkpoint-{step}"
        call("eval.py", log, ckpt=path, data=test, output_dir=path / "eval", **flags)
        sooner[f"after_{step}"] = json.loads((path / "eval/eval.json").read_text())["accuracy"]
    some = rows_of(seed, "test:250")
    many = dict(num_samples=SAMPLES, temperature=1.0, output_dir=folder / "samples")
    call("eval.py", log, ckpt=folder, data=some, **flags, **many)
    greedy, sampled = (
        json.loads((folder / kind / "eval.json").read_text()) for kind in ("eval", "samples")
    )
    chain, at = [], name
    while at != "init":
        chain, at = [at, *chain], stages()[at].parent
    helpers = [p for n in chain for p in stages()[n].parents[1:] if p in stages()]
    kept = ("accuracy", "caption_accuracy", "format_valid", "mean_response_tokens", "by_source")
    result = {"arm": name, "seed": seed} | {key: greedy[key] for key in kept}
    result |= sooner
    result["sampled_accuracy"] = sampled["accuracy"]
    result["pass_at_8"] = sampled["pass_at_k"]
    result |= drift(read_rows(folder / "eval/generations.jsonl"), read_rows(test))
    with ONE:
        result["kl_from_base"] = kl_from_base(seed, folder, some)
    result["seconds"] = {n: seconds(seed, n) for n in dict.fromkeys([*helpers, *chain])}
    settings = json.loads((folder / "run.json").read_text())["run"]
    result["settings"] = {k: v for k, v in settings.items() if "/" not in str(v)}
    if stages()[name].kind == "align":
        result["curves"] = curves(read_rows(folder / "metrics.jsonl"))
        result |= told_apart(seed, name)
    return result


def told_apart(seed: int, name: str) -> dict:
    """Pair accuracy by view, how often the discriminator scores the supervision response above a
    rollout: of the warm-up's held-out pairs; and of new rollouts at the end of an alignment, on its
    own prompts and on others that no run has learned from. The latter two are measured as the
    warm-up measures its own, in a run at learning rate 0."""
    folder = OUT / f"seed-{seed}" / name
    stage = stages()[name]
    own, judge = stage.data, stages()[stage.flags["discriminator"]]
    before = read_rows(OUT / f"seed-{seed}/{stage.flags['discriminator']}/metrics.jsonl")[-1]
    found = {f"warm_up_{v}": before.get(f"validation_pair_accuracy_{v}") for v in VIEWS}
    flags = digits.SETTINGS["discriminator"] | ALWAYS | dict(max_steps=1, learning_rate=0)
    flags |= {k: v for k, v in judge.flags.items() if k == "experts"}
    flags |= dict(model=folder / "discriminator", policy=folder, validation_share=0.9, seed=seed)
    others = max(SIZES) - int(own.partition(":")[2])
    for of, data in {"own": own, "other": f"prompts:{-min(others, 100)}"}.items():
        out = folder / of
        if of == "own" or others:
            data = rows_of(seed, data)
            log = folder.with_suffix(".log")
            call("discriminator.py", log, data=data, output_dir=out, resume=True, **flags)
            line = read_rows(out / "metrics.jsonl")[-1]
            found |= {f"{of}_{view}": line[f"validation_pair_accuracy_{view}"] for view in VIEWS}
    return found


def drift(generations: list[dict], truths: list[dict]) -> dict:
    """Perception and reasoning apart: the shares that docs/study.md lists under "Drift", and how
    many digits a caption and how many steps a response has in the mean."""
    misread = there = wrong = steps = items = unfounded = 0
    rare = {digit for digit, _ in digits.CONFUSIONS[: digits.World.misread_digits]}
    sums = {"read": [], "misread": []}
    for row in generations:
        truth, text = truths[row["row"]], row["response"]
        caption, _, rest = text.partition("</caption>" if "</caption>" in text else ".")
        said, real = (list(map(int, re.findall(r"\d", t))) for t in (caption, truth["caption"][0]))
        items += len(said)
        there += len(real)
        misread += sum(a != b for a, b in zip_longest(said, real))
        found = []  # whether each step is right
        for a, sign, b, c in re.findall(r"(\d+) (\+|-|plus|minus) (\d+) (?:=|is) (-?\d+)", rest):
            found.append(int(a) + int(b) * (1 if sign in ("+", "plus") else -1) == int(c))
        least = [int(x) for x in re.findall(r"greater than (\d)", truth["question"])]
        for digit, word in re.findall(r"(\d) (yes|no)", rest) if least else ():
            found.append((int(digit) > least[0]) == (word == "yes"))
        for largest, smallest in re.findall(r"largest is (\d), the smallest is (\d)", rest):
            found += [int(largest) == max(said, default=""), int(smallest) == min(said, default="")]
        steps += len(found)
        wrong += len(found) - sum(found)
        answer = re.findall(r"(?:<answer>|answer is )(\w+)", rest)[-1:]
        founded = bool(said) and answer == [digits.work(truth["source"], said, least)[1]]
        unfounded += not founded
        if truth["source"] == "sum":
            sums["misread" if rare & set(said) else "read"].append(not founded)
    count = len(generations)
    return {
        "misread_per_digit": misread / there,
        "wrong_per_step": wrong / max(steps, 1),
        "wrong_by_caption": unfounded / count,
        "caption_items": items / count,
        "reasoning_steps": steps / count,
        **{f"wrong_sums_{kind}": sum(x) / len(x) if x else None for kind, x in sums.items()},
    }


ONE = threading.Lock()  # loading a model is a matter of the whole process


def kl_from_base(seed: int, folder: Path, data: str) -> float:
    """KL(policy | base) in nats a response, on samples of the policy."""
    import torch

    from data import encode_prompts, make_packs
    from model import load_policy, token_logprobs
    from sampler import Sampling, generate
    from support.rows import load_data

    torch.set_num_threads(1)
    policy, processor = load_policy(str(folder))
    base, _ = load_policy(str(run(seed, "base")))
    prompts = encode_prompts(processor, load_data(data)[:100])
    groups, total = generate(policy, prompts, Sampling(1, 96, seed=seed)), 0.0
    with torch.no_grad():
        for pack in make_packs(groups, 8192):
            ours, theirs = (token_logprobs(model, pack)[0] for model in (policy, base))
            total += float((ours - theirs).sum())
    return total / len(prompts)


def curves(metrics: list[dict]) -> dict[str, list]:
    """Score gaps, pair accuracy and routing by view over the steps of an alignment."""
    found = {name: [x.get(name) for x in metrics] for name in ("step", *CURVES)}
    for view in VIEWS:
        shares = [x.get(f"expert_share_{view}") for x in metrics]
        found[f"experts_{view}"] = [s and np.mean(s, 0).round(4).tolist() for s in shares]
        found[f"expert_share_{view}"] = shares[-1]
    return found


# --------------------------------------------------------------------------------------------------
# Tables


def results() -> dict[tuple[str, int], dict]:
    """What is in the file, by arm and seed. Runs of a stage do the same work on every seed, and
    what else the machine had to do slowed some: an arm's seconds are the least of each stage. To
    an arm with RL, the accuracy that its RL started from; to a game, its first and last steps."""
    found = [json.loads(line) for line in RESULTS.read_text(encoding="utf-8").splitlines()]
    found.sort(key=lambda result: (result["arm"], result["seed"]))
    took = [item for result in found for item in result["seconds"].items()]
    least = {name: min(x for n, x in took if n == name) for name, _ in took}
    for result in found:
        result["run_seconds"] = sum(least[name] for name in result["seconds"] if name != "base")
        for view in VIEWS if "curves" in result else ():
            gaps = [x for x in result["curves"][f"score_gap_{view}"] if x is not None]
            for at, some in (("first", gaps[:10]), ("last", gaps[-10:])):
                result[f"gap_{at}_{view}"] = statistics.mean(some) if some else None
    found = {(result["arm"], result["seed"]): result for result in found}
    for (name, seed), result in found.items():
        start = found.get((started(name), seed))
        if start and start is not result:
            result |= {"before": start["accuracy"], "sampled_before": start["sampled_accuracy"]}
            result["captions_before"] = start["caption_accuracy"]
    return found


def started(name: str) -> str:
    """The arm that the RL of an arm starts from; itself, where it has none."""
    stage = stages()[name]
    return stage.parent if stage.kind == "rlvr" else name


def few(found: dict) -> dict:
    """The results of the seeds that ablations and the figure have."""
    return {key: result for key, result in found.items() if key[1] in FEW}


def interval(values: list[float]) -> tuple[float, ...]:
    """Mean, low and high end of its 95% interval over the seeds, by Student's t; the mean alone of
    one seed, nothing of none."""
    n = len(values)
    if n < 2:
        return tuple(values)
    mean = statistics.mean(values)
    half = float(student.ppf(0.975, n - 1) * statistics.stdev(values) / n**0.5)
    return mean, mean - half, mean + half


def shown(values: list[float], decimals: int = 3) -> str:
    if not values:
        return "-"
    mean, *ends = interval(values)
    said = f"{mean:.{decimals}f}"
    if not ends or ends[1] == mean:
        return said
    return f"{said}\xa0±\xa0{ends[1] - mean:.{decimals}f}"


def label(name: str) -> str:
    for key in sorted(LABELS, key=len, reverse=True):
        if name.startswith(key):
            parts = [x for x in name[len(key) :].split("_") if x]
            sizes = [f"{x} responses," for x in parts if x.isdigit()]
            words = " ".join([LABELS[key] + "," * bool(sizes), *sizes])
            rl = [f" + {LABELS[x]}" for x in parts if not x.isdigit()]
            return words + rl[0] if rl else words.rstrip(",")
    return name


def table(names: list[str], columns: dict[str, str], found: dict) -> list[list]:
    """A head and a row for each arm that has results: label, seeds, means with intervals."""
    rows = [["arm", "seeds", *columns.values()]]
    for name in names:
        mine = [result for (arm, _), result in found.items() if arm == name]
        if mine:
            of = {c: [result[c] for result in mine if result.get(c) is not None] for c in columns}
            cells = [shown(x, DECIMALS.get(column, 3)) for column, x in of.items()]
            rows.append([label(name), len(mine), *cells])
    return rows


def difference(a: str, b: str, column: str, found: dict) -> str:
    """A column of arm a minus that of arm b, seed by seed, in points: the mean and its 95% interval
    by Student's t. (Bootstrapped over five seeds, intervals of no difference would exclude 0 in
    15%.) Empty without two seeds of both."""
    seeds = [seed for (arm, seed) in found if arm == a and (b, seed) in found]
    gaps = [(found[a, s].get(column), found[b, s].get(column)) for s in seeds]
    gaps = [100 * (x - y) for x, y in gaps if None not in (x, y)]
    return "{:+.1f} ({:+.1f} to {:+.1f})".format(*interval(gaps)) if len(gaps) > 1 else ""


def differences(pairs: list[tuple[str, str]], found: dict) -> list[list]:
    """In points, of greedy answers and of the mean of samples, before RL and at its end."""
    columns = ABLATED | {"accuracy": "after RL", "sampled_accuracy": "after RL, mean of 8"}
    columns = {x: columns[x] for x in (*BEFORE, *ENDS)}
    rows = [["arm", "minus", "seeds", *columns.values()]]
    for a, b in pairs:
        cells = [difference(a, b, column, found) for column in columns]
        if any(cells):
            seeds = sum((a, seed) in found and (b, seed) in found for seed in SEEDS)
            rows.append([label(a), label(b), seeds, *cells])
    return rows


def by_seed(names: list[str], found: dict) -> list[list]:
    """Accuracy at the end, of each seed."""
    rows = [["arm", *(f"seed {seed}" for seed in SEEDS)]]
    for name in names:
        mine = [found.get((name, seed)) for seed in SEEDS]
        rows.append([label(name), *(f"{x['accuracy']:.3f}" if x else "" for x in mine)])
    return rows


def pairs() -> list[tuple[str, str]]:
    return [(f"prism_{x}", f"sft_{x}") for x in ("grpo", "dapo", "gspo")] + [
        ("prism_grpo", name) for name in [*CONTROLS, *ABLATIONS] if name.endswith("_grpo")
    ]


def by_size() -> list[tuple[str, str]]:
    """PRISM and more SFT on as many responses, of the figure."""
    return [(of_size("prism", size), of_size("more_sft", size)) for size in SIZES]


def percent(name: str, found: dict, column="accuracy") -> str:
    values = [x[column] for (arm, _), x in found.items() if arm == name and x.get(column)]
    return f"{100 * statistics.mean(values):.1f}" if values else ""


def published(found: dict) -> list[list]:
    """The paper's averages over seven benchmarks, and this world's accuracy beside them."""
    head = ["", *("instruct" if name == "base" else label(name) for name in ARMS)]
    paper = {"4B": "59.7 56.8 61.8 63.2 61.6 57.2 66.2 66.3 65.8"}
    paper |= {"8B": "63.3 58.1 63.3 65.2 63.3 59.3 69.3 68.9 68.7"}
    rows = [[f"paper, Qwen3-VL {size}", *values.split()] for size, values in paper.items()]
    return [head, *rows, ["ours, digits", *(percent(name, found) for name in ARMS)]]


def published_ablations(found: dict) -> list[list]:
    """The paper's ablations with GRPO, and this world's: after RL, and before it."""
    rows = [("prism_grpo", "66.2"), ("dense_grpo", "62.8"), ("text_grpo", "62.3")]
    rows += [("no_sft_grpo", "49.4"), ("sft_grpo", "61.8")]
    rows += [(name, "") for name in ABLATIONS if name not in dict(rows)]
    said = [["arm", "paper, after RL", "ours, after RL", "ours, before RL"]]
    for name, paper in rows:
        said.append([label(name), paper, percent(name, found), percent(name, found, "before")])
    return said


def tables() -> dict[str, list[list]]:
    """Every table of the documents and of the page, by its name."""
    found = results()
    figure = ["sft_grpo", "more_sft_grpo", "prism_grpo", *FIGURE]
    return {
        "arms": table([*ARMS, *CONTROLS], MAIN, found),
        "seeds": by_seed([*ARMS, *CONTROLS], found),
        "ablations": table(["prism_grpo", "frozen_grpo", *ABLATIONS], ABLATED, few(found)),
        "differences": differences(pairs(), found),
        "sizes": differences(by_size(), few(found)),
        "published": published(found),
        "published_ablations": published_ablations(few(found)),
        "speed": table(SPEED, SOONER, found),
        "drift": table(DRIFTED, DRIFT, found),
        "game": table(GAMES, GAME, found),
        "figure": table(figure, BEFORE | {x: ABLATED[x] for x in ENDS}, few(found)),
    }


def write(path: Path, known: dict[str, list[list]] | None = None) -> None:
    """Puts tables, by default the study's, between their marks in a Markdown file."""
    text = path.read_text(encoding="utf-8")
    for name, (head, *rows) in (known or tables()).items():
        rows = [head, ["---"] * len(head), *rows]
        content = "\n".join(f"| {' | '.join(map(str, row))} |" for row in rows)
        marks = f"<!-- {name} -->", f"<!-- /{name} -->"
        text = re.sub(
            f"{marks[0]}.*?{marks[1]}",
            lambda _, marks=marks, content=content: f"{marks[0]}\n{content}\n{marks[1]}",
            text,
            flags=re.DOTALL,
        )
    path.write_text(text, encoding="utf-8")


# --------------------------------------------------------------------------------------------------
# The page


def lines(found: dict) -> list[tuple[str, str, list]]:
    """The two plots of the study, each with its title, its horizontal axis, and of each arm the
    label and the points (x, mean, low, high): accuracy over the steps of RL, PRISM's also with the
    alignment's time counted in such steps; and over the number of the alignment's supervision
    responses, at the end of RL and before it, of the seeds that all of these have. SFT + GRPO has
    no such response: its line is flat."""
    end = digits.SETTINGS["rlvr"]["max_steps"]
    over_steps, over_rows = [], []
    for name in SPEED:
        start = name.removesuffix("_grpo")
        steps = {0: (start, "accuracy")} | {step: (name, f"after_{step}") for step in STEPS}
        steps[end] = (name, "accuracy")
        if name == "sft_grpo":
            steps[MATCHED] = ("longer_grpo", "accuracy")
        over_steps.append((label(name), [(x, *of(found, *at)) for x, at in steps.items()]))
        arms = {size: name if name == "sft_grpo" else of_size(start, size) for size in SIZES}
        for said, when in (("", "accuracy"), (", before RL", "before")):
            points = [(x, *of(few(found), arm, when)) for x, arm in arms.items()]
            over_rows += [(label(name) + said, points)] if not said or start != "sft" else []
    later = [(x + MATCHED - end, *y) for x, *y in over_steps[-1][1]]
    over_steps.append((f"{over_steps[-1][0]}, the alignment's time counted", later))
    plots = [("Accuracy over RL", "steps of RL", over_steps)]
    plots += [("Accuracy over the alignment's data", "supervision responses", over_rows)]
    known = lambda points: [point for point in points if point[1:]]
    return [
        (title, axis, [(name, known(points)) for name, points in series if known(points)])
        for title, axis, series in plots
    ]


def of(found: dict, name: str, column: str) -> tuple[float, ...]:
    """The interval of a column of an arm."""
    values = [result.get(column) for (arm, _), result in found.items() if arm == name]
    return interval([x for x in values if x is not None])


def of_size(start: str, size: int) -> str:
    """The arm of the figure that begins with a stage on so many supervision responses."""
    return f"{start}_grpo" if size == SUPERVISED else f"{start}_{size}_grpo"


def picture(path: Path) -> None:
    """Both plots as a file for docs/study.md. Its numbers stand in its description."""
    plots = lines(results())
    plt.rcParams["svg.hashsalt"] = "study"
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained", sharey=True)
    colors = dict(zip(map(label, SPEED), ("#555555", "#c4500a", "#0064a8")))
    shown = {}  # of each label one line, for the legend
    for ax, (title, axis, series) in zip(axes, plots):
        for name, points in series:
            color = next(color for arm, color in colors.items() if name.startswith(arm))
            x, mean = [p[0] for p in points], [p[1] for p in points]
            dash = "o-" if name in colors else "o:"
            line = dict(color=color, label=name, ms=4, gid=f"{title}: {name}")
            (shown[name],) = ax.plot(x, mean, dash, **line)
            ends = [(p[0], *p[2:]) for p in points if p[2:]]
            if ends and name in colors and ax is axes[0]:
                ax.fill_between(*zip(*ends), color=color, alpha=0.15, linewidth=0)
        ax.set(title=title, xlabel=axis, ylim=(0, 1))
        ax.grid(alpha=0.3)
    axes[0].set_ylabel("accuracy on unseen digits")
    axes[1].set_xscale("log")
    axes[1].set_xticks(SIZES, map(str, SIZES))
    axes[1].minorticks_off()
    figure.legend(shown.values(), shown, loc="outside lower center", ncols=2)
    kept = {"Description": json.dumps(plots), "Date": None}
    figure.savefig(path, format="svg", metadata=kept)
    plt.close(figure)


def page(path: Path) -> None:
    """The study to look at: tables, differences, the figure, and over the steps of the alignment
    score gaps, pair accuracy and routing."""
    found, known = results(), tables()
    section = lambda title, name: (
        f"<h2>{title}</h2>" + report.table(known[name][0], known[name][1:])
    )
    body = "<h1>PRISM on the embedded world</h1><p>Means with 95% intervals over seeds.</p>"
    body += section("Arms and controls", "arms") + section("Ablations", "ablations")
    body += section("Differences, seed by seed, in points of accuracy", "differences")
    body += section("Accuracy at the end, of each seed", "seeds")
    body += section("Accuracy over the steps of RL", "speed") + '<div class="plots">'
    (title, axis, series), (last, responses, sizes) = lines(found)
    body += report.plot(title, "share of rows", series, axis)
    names = [(name, [(str(x), *y) for x, *y in points]) for name, points in sizes]
    body += report.plot(last, "share of rows", names, responses) + "</div>"
    body += section("How many supervision responses", "figure")
    body += section("Drift by stage", "drift")
    games = [result["curves"] for (arm, _), result in found.items() if arm == "prism"]
    if games:
        body += '<h2>The game</h2><div class="plots">'
        steps = games[0]["step"]
        for kind, unit in (("score_gap", "score"), ("pair_accuracy", "share")):
            series = []
            for view in VIEWS:
                columns = zip(*(game[f"{kind}_{view}"] for game in games))
                means = [[x for x in column if x is not None] for column in columns]
                means = [statistics.mean(x) if x else None for x in means]
                series.append((view, list(zip(steps, means))))
            body += report.plot(kind.replace("_", " "), unit, series)
        for view in VIEWS:
            shares = np.mean([game[f"experts_{view}"] for game in games], 0).T.tolist()
            series = [(f"expert {e}", list(zip(steps, share))) for e, share in enumerate(shares)]
            body += report.plot(f"Routing in the {view} view", "share of choices", series)
        body += "</div>"
        last = {"step": steps[-1]}
        last |= {k: np.mean([g[k] for g in games], 0).tolist() for k in SHARES}
        body += report.routing({"lines": [last]})
    body += section("Score gaps, first and last ten steps", "game")
    report.write_page(str(path), "PRISM on the embedded world", body)


def main() -> None:
    parser = argparse.ArgumentParser()
    some = [x for name in [*ABLATIONS, *FIGURE] for x in (started(name), name)]
    arms = [*ARMS, *CONTROLS, *some]
    parser.add_argument("--seeds", type=int, nargs="+", default=[*SEEDS], choices=SEEDS)
    parser.add_argument("--only", nargs="+", default=arms, choices=arms, metavar="ARM")
    parser.add_argument("--processes", type=int, default=2)
    args = parser.parse_args()
    OUT.mkdir(parents=True, exist_ok=True)
    RESULTS.touch()

    jobs = [(seed, [*ARMS, *CONTROLS]) for seed in SEEDS]
    jobs += [(seed, some) for seed in FEW]
    measured = results()
    wanted = lambda seed, name: name in args.only and (name, seed) not in measured
    jobs = [(seed, [n for n in names if wanted(seed, n)]) for seed, names in jobs]
    jobs = [job for job in jobs if job[0] in args.seeds]
    for seed in {seed for seed, names in jobs if names}:
        world(seed)  # here, since its weights are drawn from the process's random numbers
    bar = tqdm(total=sum(len(names) for _, names in jobs), unit="arm")
    failed = []
    locks = {seed: threading.Lock() for seed in SEEDS}  # what its arms begin with is made once
    writing = threading.Lock()

    def work(job: tuple[int, list[str]]) -> None:
        seed, names = job
        with locks[seed]:
            for name in names:
                try:
                    result = measure(seed, name)
                except Exception as error:  # the other arms go on
                    failed.append(f"seed {seed}, {label(name)}: {error!r}")
                    bar.write(failed[-1])
                else:
                    with writing, RESULTS.open("a", encoding="utf-8") as file:
                        file.write(json.dumps(result) + "\n")
                    bar.write(f"seed {seed}, {label(name)}: {result['accuracy']:.3f}")
                bar.update()

    with ThreadPoolExecutor(args.processes) as pool:
        list(pool.map(work, jobs))
    bar.close()
    documents = ["docs/study.md", "docs/paper-map.md"]
    for document in documents:
        write(ROOT / document)
    written = [*documents, "docs/study.svg", "out/study/report.html"]
    picture(ROOT / written[-2])
    page(ROOT / written[-1])
    print("written:", ", ".join(written))
    if failed:
        raise SystemExit("\n".join(["error: not measured:", *failed]))


if __name__ == "__main__":
    main()
