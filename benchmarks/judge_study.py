"""A discriminator that can judge, in a world where that could matter (docs/judge-study.md).

    python benchmarks/judge_study.py --seeds 0 1      every arm of these seeds that is missing
    python benchmarks/judge_study.py --grid           the rates, on the validation seed
    python benchmarks/judge_study.py --table          the tables and the picture, and nothing else

The supervision of this world states the answer first in most of its responses, and RL asks one kind
of question about some digits. The discriminator comes from a base that reads cleanly, and its
warm-up compares each supervision response with two students in which one error is planted.

An arm is a chain of the project's stages, run by their command lines. Each finished arm of a seed
is one line of `benchmarks/results/judge.jsonl`, and is not run again. A seed draws all rows, orders
and samples anew. The two bases and the discriminators after their warm-ups are made once for all
seeds, as published models are.
"""

import argparse
import contextlib
import json
import statistics
import sys
import time
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import torch

matplotlib.use("svg")
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import align  # noqa: E402
from benchmarks import judging, study  # noqa: E402
from benchmarks.judging import VIEWS  # noqa: E402
from benchmarks.study import Stage, interval, shown  # noqa: E402
from discriminator import load_discriminator  # noqa: E402
from support import digits  # noqa: E402
from support.digits import read_rows  # noqa: E402
from support.ending import main as run_main  # noqa: E402
from support.resuming import replacing  # noqa: E402

OUT, RESULTS = ROOT / "out/judge", ROOT / "benchmarks/results/judge.jsonl"
SEEDS, FEW = range(8), range(3)  # of the arms; of the text-only and the dense discriminator
VALIDATION = 1000  # the seed of every choice, measured on validation scans
ALIGNED, WARM = 1280, 9600  # supervision responses: of the alignment, none twice; of the warm-up
COVERED, UNCOVERED = "spread", "count"  # the kind of question that RL asks, and the other

# --------------------------------------------------------------------------------------------------
# The world

SIZES = dict(hidden_size=96, intermediate_size=192, layers=4, head_dim=24)  # 0.65M parameters
SHARED = dict(kinds=["count", "spread"], base_misread_digits=0, scans_seed=VALIDATION) | SIZES
BASES = dict(seed=999, pretrain_rows=12000, prompt_rows=16000, sft_rows=500, curated_share=1.0)
BASES |= dict(question_rows=0, validation_rows=1000, test_rows=0)
DRAWN = dict(question_kinds=[COVERED], question_without=[3, 7, 9])
DRAWN |= dict(answer_first=judging.ANSWER_FIRST, pretrain_rows=0, prompt_rows=ALIGNED)
DRAWN |= dict(validation_rows=1000, test_rows=1000)


def world(seed: int | None) -> dict[str, str]:
    """The files of a seed; of none, those that the bases learn from: `pretrain` in own words, and
    `prompts`, clean demonstrations, for the base of the discriminator. The rows of the warm-up,
    `warm`, are the same for all seeds; `all` are these and the alignment's."""
    own = BASES if seed is None else DRAWN | dict(seed=seed)
    own |= dict(prompt_rows=ALIGNED + WARM) if seed == VALIDATION else {}
    folder = OUT / ("world" if seed is None else f"seed-{seed}/world")
    paths = digits.build(folder, digits.World(**SHARED, **own))
    if seed is None:
        return paths
    if seed != VALIDATION:
        world(VALIDATION)
    # Files beside the folders of the seeds, as the third names images of two of them.
    own, others = supervision(seed)[:ALIGNED], supervision(VALIDATION)[ALIGNED:]
    for name, rows in {"aligned": own, "warm": others, "all": own + others}.items():
        paths[name] = str(OUT / f"{name}-{seed}.jsonl")
        if not Path(paths[name]).exists():
            with replacing(paths[name]) as file:
                file.writelines(json.dumps(row) + "\n" for row in rows)
    return paths


def supervision(seed: int) -> list[dict]:
    """The rows of `prompts` of a seed, with the paths of their images below OUT."""
    folder = f"seed-{seed}/world"
    rows = read_rows(OUT / folder / "prompts.jsonl")
    return [row | {"image": f"{folder}/{row['image']}"} for row in rows]


# --------------------------------------------------------------------------------------------------
# Runs and arms

ALWAYS = dict(dataloader_num_workers=0, save_steps=100000, save_total_limit=100)
SAMPLES = dict(max_completion_length=96, max_rollout_rows=256)
GAME = dict(max_steps=ALIGNED // 16, prompts_per_step=16, num_generations=8) | SAMPLES
RL = dict(algorithm="grpo", prompts_per_step=16, num_generations=8, max_steps=100) | SAMPLES
RL |= dict(learning_rate=3e-5, warmup_steps=5, weight_decay=0.01)
SFT = dict(learning_rate=3e-3, per_device_train_batch_size=32)
MORE = dict(lr_scheduler_type="constant", per_device_train_batch_size=16)
BLIND = dict(max_steps=60, learning_rate=3e-4, per_device_train_batch_size=32)
BLIND |= dict(gradient_accumulation_steps=1) | SAMPLES
# From the grid. Steps of RL that take as long as the alignment, or as it and not more SFT.
RATE, ORACLE, MORE_RATE, ALL_RATE, DISCRIMINATOR = 3e-4, 1e-4, 1e-3, 3e-4, 3e-5
EQUAL, EQUAL_MORE = 110, 100
# Made once for all seeds, as published models are.
ONCE = "reader base warm_up text_warm_up dense_warm_up".split()


def stages() -> dict[str, Stage]:
    """Every run of a seed, as in study.py: its kind, the run that it starts from, its data."""

    def game(rate=RATE, own=DISCRIMINATOR, judged="warm_up", kind="align"):
        flags = dict(learning_rate=rate, discriminator_learning_rate=own, discriminator=judged)
        return Stage(kind, "sft", "aligned", **GAME, **flags)

    def more(data: str, rate: float):
        rows = ALIGNED if data == "aligned" else ALIGNED + WARM
        return Stage("sft", "sft", data, max_steps=rows // 16, learning_rate=rate, **MORE)

    runs = {
        "reader": Stage("sft", "init", "prompts", max_steps=1500, **SFT),
        "base": Stage("sft", "init", "pretrain", max_steps=1000, **SFT),
        "sft": Stage("sft", "base", "sft", max_steps=376, **SFT),
        "warm_up": Stage("learned", "reader", "warm"),
        "text_warm_up": Stage("text", "reader", "warm"),
        "dense_warm_up": Stage("dense", "reader", "warm"),
        "blind_warm_up": Stage("discriminator", "base", "curated", policy="sft", **BLIND),
        "prism": game(),
        "frozen": game(own=0),
        "text": game(judged="text_warm_up"),
        "dense": game(judged="dense_warm_up"),
        "blind": game(judged="blind_warm_up"),
        "oracle": game(ORACLE, 0, "reader", "oracle"),
        "more_sft": more("aligned", MORE_RATE),
        "more_all": more("all", ALL_RATE),
    }
    ends = [name for name in runs if name not in (*ONCE, "blind_warm_up")]
    # The grid, of seed VALIDATION alone, before RL
    runs |= {f"prism_{rate}": game(rate) for rate in (1e-4, 3e-4)}
    runs |= {f"more_sft_{rate}": more("aligned", rate) for rate in (1e-4, 3e-4, 1e-3, 3e-3)}
    runs |= {f"oracle_{rate}": game(rate, 0, "reader", "oracle") for rate in (1e-4, 3e-4)}
    runs |= {f"more_all_{rate}": more("all", rate) for rate in (1e-4, 3e-4, 1e-3)}
    for name in ends:
        longer = {"sft": EQUAL, "more_sft": EQUAL_MORE}.get(name, 0)
        flags = RL | dict(max_steps=RL["max_steps"] + longer, save_hf_steps=RL["max_steps"])
        runs[f"{name}_grpo"] = Stage("rlvr", name, "questions", **(flags if longer else RL))
    return runs


# An arm is measured at the end of the run of its name. These two go on where another arm ends.
LONGER = {"sft_grpo_longer": "sft_grpo", "more_sft_grpo_longer": "more_sft_grpo"}
ARMS = "base sft sft_grpo prism prism_grpo more_sft more_sft_grpo sft_grpo_longer".split()
ARMS += "more_sft_grpo_longer more_all more_all_grpo frozen frozen_grpo".split()
ARMS += "blind blind_grpo oracle oracle_grpo".split()
ABLATIONS = "text text_grpo dense dense_grpo".split()
GRID = ["sft", *(name for name in stages() if "_0.0" in name)]  # a rate


def run(seed: int, name: str) -> Path:
    """The directory of a run, which is made, and those that it starts from before, if need be."""
    if name == "init":
        return Path(world(None)["init"])
    once = name in ONCE
    seed, folder = (VALIDATION, OUT / name) if once else (seed, OUT / f"seed-{seed}" / name)
    with digits._alone(OUT / f".{name}.lock") if once else contextlib.nullcontext():
        if not study.finished(folder):
            make(seed, name, folder)
    return folder


def make(seed: int, name: str, folder: Path) -> None:
    """Makes a run. What a stage says goes to a file beside it."""
    stage = stages()[name]
    parents = {parent: run(seed, parent) for parent in stage.parents}
    if stage.kind in ("learned", "text", "dense"):
        files = world(seed)
        rows = files[stage.data], files["validation"]
        judging.warm_up(*rows, stage.kind, parents[stage.parent], folder, seed)
        return
    flags = ALWAYS | stage.flags
    flags |= {n: parents[flags[n]] for n in ("policy", "discriminator") if n in flags}
    script = {"oracle": "benchmarks/judge_study.py"}.get(stage.kind, f"{stage.kind}.py")
    flags |= {"oracle": 1} if stage.kind == "oracle" else {}
    source = "model" if stage.kind in ("sft", "discriminator") else "ckpt"
    data = world(None if stage.parent == "init" else seed)[stage.data]
    flags |= {source: parents[stage.parent], "data": data}
    flags |= dict(seed=0 if stage.parent == "init" else seed, output_dir=folder, resume=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    study.call(script, folder.with_name(f"{name}.log"), **flags)


def measure(seed: int, arm: str) -> dict:
    """One arm of one seed, in numbers."""
    name = LONGER.get(arm, arm)
    folder, stage = run(seed, name), stages()[name]
    if f"{arm}_longer" in LONGER:
        folder = folder / f"checkpoint-{RL['max_steps']}"
    split = "validation" if seed == VALIDATION else "test"
    out = OUT / f"seed-{seed}" / f"{arm}-{split}"
    flags = digits.SETTINGS["eval"] | dict(max_rollout_rows=256, output_dir=out)
    log = OUT / f"seed-{seed}/eval.log"
    study.call("eval.py", log, ckpt=folder, data=world(seed)[split], **flags)
    found = json.loads((out / "eval.json").read_text())
    kept = ("accuracy", "caption_accuracy", "format_valid", "mean_response_tokens", "rows")
    result = {"arm": arm, "seed": seed, "split": split} | {key: found[key] for key in kept}
    rows = read_rows(out / "generations.jsonl")
    for kind, numbers in found["by_source"].items():
        mine = [row["response"] for row in rows if row["source"] == kind]
        result[kind] = numbers["accuracy"]
        result[f"{kind}_answer_first"] = statistics.mean("k>The answer" in text for text in mine)
    if stage.kind == "align":
        warm, after = run(seed, stage.flags["discriminator"]), folder / "discriminator"
        held = world(seed)["validation"]
        for when, path in {"before": warm, "after": after}.items():
            judged, processor = load_discriminator(str(path))
            result[f"planted_{when}"] = judging.planted(judged, processor, held)
        result |= judging.own_rollouts(folder, {"before": warm, "after": after}, held, seed)
    result["seconds"] = round(seconds(OUT / f"seed-{seed}" / name), 1)
    result["settings"] = {k: v for k, v in stage.flags.items() if "/" not in str(v)}
    return {k: round(v, 4) if isinstance(v, float) else v for k, v in result.items()}


def seconds(folder: Path) -> float:
    """What the steps of a run took, each as long as the middle one: a pause does not count."""
    path = folder / "metrics.jsonl"
    steps = [row["time/step"] for row in read_rows(path)] if path.exists() else [0.0]
    return statistics.median(steps) * len(steps)


# --------------------------------------------------------------------------------------------------
# Tables and the picture

LABELS = {"base": "base", "sft": "SFT", "sft_grpo": "SFT + GRPO"}
LABELS |= {"sft_grpo_longer": "SFT + GRPO, for the alignment's time"}
LABELS |= {"more_sft": "more SFT", "more_sft_grpo": "more SFT + GRPO"}
LABELS |= {"more_sft_grpo_longer": "more SFT + GRPO, for the equal time"}
LABELS |= {"more_all": "more SFT, the warm-up's rows too"}
LABELS |= {"more_all_grpo": "more SFT, the warm-up's rows too, + GRPO"}
LABELS |= {"prism": "PRISM", "prism_grpo": "PRISM + GRPO"}
VARIANTS = {"frozen": "frozen", "text": "text-only", "dense": "dense", "blind": "blind"}
LABELS |= {name: f"PRISM, {said} discriminator" for name, said in VARIANTS.items()}
LABELS |= {f"{name}_grpo": f"{LABELS[name]}, + GRPO" for name in VARIANTS}
LABELS |= {"oracle": "an oracle in its place", "oracle_grpo": "an oracle in its place, + GRPO"}
FIRST = "prism_grpo sft_grpo sft_grpo_longer more_sft_grpo more_all_grpo".split()
FIRST += "frozen_grpo blind_grpo oracle_grpo".split()
COLUMNS = {UNCOVERED: "not covered by RL", COVERED: "covered", "accuracy": "all"}
COLUMNS |= {"caption_accuracy": "captions"}
MORE_COLUMNS = {f"{kind}_answer_first": f"{kind}, answer first" for kind in (UNCOVERED, COVERED)}
PLANTED = {"misread_perception": "misread, perception", "misread_reasoning": "misread, reasoning"}
PLANTED |= {"slip_reasoning": "slip", "answer_reasoning": "contradicting answer"}
Results = dict[tuple[str, int], dict]


def results(lines: list[dict]) -> Results:
    """Lines of the file by arm and seed, the reported seeds alone."""
    return {(line["arm"], line["seed"]): line for line in lines if line["seed"] in SEEDS}


def column(found: Results, arm: str, name: str) -> list[float]:
    """The values of an arm, seed by seed. `planted_before.slip_reasoning` is one of a part."""
    values = []
    for (of_arm, _), line in sorted(found.items()):
        value = line if of_arm == arm else {}
        for key in name.split("."):
            value = (value or {}).get(key)
        values += [] if value is None else [value]
    return values


def difference(found: Results, a: str, b: str, name: str = UNCOVERED) -> list[float]:
    """Arm a minus arm b on each seed that has both, in points."""
    both = [seed for arm, seed in sorted(found) if arm == a and (b, seed) in found]
    return [100 * (found[a, seed][name] - found[b, seed][name]) for seed in both]


def said(values: list[float]) -> str:
    """The mean, and its 95% interval by Student's t where there are two seeds or more."""
    ends = [f"{x:+.1f}" for x in interval(values)]
    return f"{ends[0]} ({ends[1]} to {ends[2]})" if ends[1:] else "".join(ends)


def verdict(values: list[float]) -> str:
    """yes: the whole interval is above zero; no: it is below; else undecided."""
    _, low, high = (*interval(values), 0.0, 0.0)[:3] if len(values) > 1 else (0.0, 0.0, 0.0)
    return "yes" if low > 0 else "no" if high < 0 else "undecided"


def arms_table(found: Results, arms: list[str], columns: dict[str, str]) -> list[list]:
    """A row for each arm that has results, with what PRISM + GRPO has more where RL asks nothing;
    of arms without RL, what PRISM has more."""
    rows = [["arm", "seeds", *columns.values(), "PRISM minus it, not covered", "is PRISM ahead?"]]
    for arm in arms:
        count = len(column(found, arm, "accuracy"))
        twin = "prism_grpo" if "_grpo" in arm else "prism"
        gaps = difference(found, twin, arm) if arm not in (twin, "base") else []
        cells = [shown(column(found, arm, name)) for name in columns]
        row = [LABELS[arm], count, *cells, said(gaps), verdict(gaps) if gaps else ""]
        rows += [row] if count else []
    return rows


def judges_table(found: Results) -> list[list]:
    """How often each discriminator is right, before the game and after it. 0.5 is blind."""
    own = {f"own_{view}": f"own rollouts, {view}" for view in VIEWS}
    rows = [["discriminator", "when", "seeds", *PLANTED.values(), *own.values()]]
    for arm in ("prism", *VARIANTS):
        for when in ("before", "after"):
            names = [f"planted_{when}.{name}" for name in PLANTED] + [f"{x}_{when}" for x in own]
            values = [column(found, arm, name) for name in names]
            rows += [[LABELS[arm], when, len(values[0]), *map(shown, values)]] if values[0] else []
    return rows


def tables(lines: list[dict]) -> dict[str, list[list]]:
    """Every table of docs/judge-study.md by its name. The first has at most eight rows."""
    found = results(lines)
    every = [*ARMS, *ABLATIONS]
    grid = [["arm", "rate", *COLUMNS.values()]]
    for line in [line for line in lines if line["seed"] == VALIDATION]:
        name, _, rate = line["arm"].partition("_0")
        values = [f"{line[column]:.3f}" for column in COLUMNS]
        grid.append([LABELS[name], f"0{rate}" if rate else "", *values])
    return {
        "judge": arms_table(found, FIRST, COLUMNS),
        "judge_arms": arms_table(found, every, COLUMNS | MORE_COLUMNS),
        "judges": judges_table(found),
        "judge_grid": grid,
    }


def points(found: Results) -> list[tuple]:
    """What the picture shows: arm, mean, low and high end, of the question that RL does not ask."""
    known = [arm for arm in ARMS + ABLATIONS if "_grpo" in arm and column(found, arm, UNCOVERED)]
    return [(LABELS[arm], *interval(column(found, arm, UNCOVERED))) for arm in known]


def picture(path: Path, found: Results) -> None:
    """Accuracy where RL asks nothing, of each arm at its end. The numbers stand in the file."""
    plt.rcParams["svg.hashsalt"] = "judge"
    figure, ax = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for at, (name, mean, *ends) in enumerate(reversed(points(found))):
        color = "#0064a8" if name == LABELS["prism_grpo"] else "#555555"
        ax.plot([mean], [at], "o", color=color, gid=name)
        ax.plot(ends, [at] * len(ends), "-", color=color)
    names = [name for name, *_ in reversed(points(found))]
    ax.set(yticks=range(len(names)), yticklabels=names, xlim=(0, 1))
    ax.set(xlabel=f"accuracy on {UNCOVERED} questions, which RL does not ask")
    ax.grid(alpha=0.3)
    kept = {"Description": json.dumps(points(found)), "Date": None}
    figure.savefig(path, format="svg", metadata=kept)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--seeds", type=int, nargs="+", default=[*SEEDS], choices=SEEDS)
    parser.add_argument("--grid", action="store_true")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--oracle", help="align.py with an oracle in the discriminator's place")
    args, rest = parser.parse_known_args()
    if args.oracle:
        align.judge = judging.oracle
        sys.argv = ["align.py", *rest]
        return run_main(align.train)
    torch.set_num_threads(1)
    jobs = [(seed, ARMS) for seed in args.seeds]
    jobs += [(seed, ABLATIONS) for seed in args.seeds if seed in FEW]
    jobs = [(VALIDATION, GRID)] if args.grid else [] if args.table else jobs
    for seed, arms in jobs:
        for arm in arms:
            known = read_rows(RESULTS) if RESULTS.exists() else []
            if not any((line["arm"], line["seed"]) == (arm, seed) for line in known):
                line = measure(seed, arm)
                with open(RESULTS, "a") as file:  # in one piece, so two processes may do it
                    file.write(json.dumps(line) + "\n")
                shares = {name: line[name] for name in COLUMNS}
                print(time.strftime("%H:%M:%S"), seed, arm, shares, flush=True)
    known = tables(read_rows(RESULTS))
    page = ROOT / "docs/judge-study.md"
    study.write(page, known)
    picture(page.with_suffix(".svg"), results(read_rows(RESULTS)))
    for row in known["judge_grid" if args.grid else "judge"]:
        print(" | ".join(map(str, row)))


if __name__ == "__main__":
    main()
