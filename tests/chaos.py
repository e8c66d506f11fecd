"""What happens to a run: kills at random moments, and what is left of it afterwards.

    python tests/chaos.py --tries 60 --seed 0

A try is a short run of one stage on one or two ranks, killed up to three times and resumed each
time. What it ends with must equal an undisturbed run to the last bit: metrics without the times,
rollouts, weights. A part of the kills is aimed into the saving of checkpoints. Prints a table:
fault, tried, survived. Then one long run of alignment is watched for memory, time a step, open
files and threads that grow.

Not a test by pytest's names; `make chaos` runs it. `Nursery` and `differences` are used by
tests/test_run.py as well.
"""

import argparse
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["HF_HUB_OFFLINE"] = "1"
ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]
STAGES = ("sft.py", "discriminator.py", "align.py", "rlvr.py")
STEPS = 5  # of a run


# --------------------------------------------------------------------------------------------------
# Processes that start at once


class Nursery:
    """A process that has imported all that a stage imports, and forks a stage when asked: it starts
    in a moment, and is otherwise what `python stage.py` or one of torchrun's workers is."""

    def __init__(self):
        serve = [sys.executable, str(Path(__file__).resolve()), "--serve"]
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT)
        self.process = subprocess.Popen(serve, **pipes)

    def ask(self, **question):
        self.process.stdin.write(json.dumps(question) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def start(self, script: str, *args, ranks: int = 1, log, **env) -> "Started":
        """A stage as processes, one a rank. What they say goes to files named after `log`."""
        if "--dataloader_num_workers" not in args and script in STAGES:
            args = (*args, "--dataloader_num_workers", 0)
        env = {key: str(value) for key, value in env.items()}
        if ranks > 1:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = str(free.getsockname()[1])
            env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(ranks)}
        logs, pids = [f"{log}.{rank}" for rank in range(ranks)], []
        for rank in range(ranks):
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks > 1 else {}
            words = [*map(str, (script, *args))]
            pids.append(self.ask(start=words, env=env | own, log=logs[rank]))
        return Started(self, pids, logs)

    def run(self, *args, **more) -> "Started":
        """Starts a stage and waits for its end."""
        started = self.start(*args, **more)
        started.wait()
        return started

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


class Started:
    """The processes of a run, one a rank."""

    def __init__(self, nursery: Nursery, pids: list[int], logs: list[str]):
        self.nursery, self.pids, self.logs, self.codes = nursery, pids, logs, None

    def signal(self, number: int, *ranks: int) -> None:
        """To the processes of the given ranks, of all where none is given."""
        for rank in ranks or range(len(self.pids)):
            try:
                os.kill(self.pids[rank], number)
            except ProcessLookupError:
                pass

    def wait(self, limit: float = 120.0) -> list[int | None]:
        """The exit codes; minus the signal where one killed it, None where it had to be ended
        after `limit` seconds."""
        self.codes = self.codes or self.nursery.ask(wait=self.pids, limit=limit)
        return self.codes

    def gone(self, *ranks: int) -> bool:
        """Whether one of the processes has ended, of the given ranks or of all. Does not wait."""
        return any(self.nursery.ask(gone=self.pids[r]) for r in ranks or range(len(self.pids)))

    @property
    def said(self) -> str:
        return "\n".join(Path(log).read_text(errors="replace") for log in self.logs)

    @property
    def errors(self) -> list[str]:
        return [line for line in self.said.splitlines() if line.startswith("error: ")]


def serve() -> None:
    """The nursery's own loop: a question a line, an answer a line."""
    import runpy

    import torch.distributed.checkpoint  # noqa: F401
    import torch.distributed.checkpoint.state_dict  # noqa: F401
    import transformers.models.qwen3_vl.modeling_qwen3_vl  # noqa: F401
    import transformers.models.qwen3_vl.processing_qwen3_vl  # noqa: F401

    import align  # noqa: F401
    import eval  # noqa: F401
    import rlvr  # noqa: F401
    import sft  # noqa: F401

    codes: dict[int, int] = {}

    def ended(pid: int) -> bool:
        if pid not in codes:
            found, status = os.waitpid(pid, os.WNOHANG)
            if found:
                codes[pid] = os.waitstatus_to_exitcode(status)
        return pid in codes

    def answer(question):
        if "start" in question:
            pid = os.fork()
            if pid:
                return pid
            os.setsid()
            nothing, log = os.open(os.devnull, os.O_RDONLY), question["log"]
            said = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
            for stream, number in ((nothing, 0), (said, 1), (said, 2)):
                os.dup2(stream, number)
            os.environ.update(question["env"])
            sys.argv = question["start"]
            runpy.run_path(sys.argv[0], run_name="__main__")
            sys.exit()
        if "gone" in question:
            return ended(question["gone"])
        end = time.monotonic() + question["limit"]
        while not all([ended(pid) for pid in question["wait"]]) and time.monotonic() < end:
            time.sleep(0.005)
        late = [pid for pid in question["wait"] if not ended(pid)]
        for pid in late:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            codes[pid] = 0
        return [None if pid in late else codes.pop(pid) for pid in question["wait"]]

    while line := sys.stdin.readline():
        print(json.dumps(answer(json.loads(line))), flush=True)


# --------------------------------------------------------------------------------------------------
# Runs, and what is compared


def flags_of(script: str, world: dict, trained: str, discriminator: str) -> tuple:
    """A short run of a stage, with rates at which a difference would show."""
    data = ("--data", world["sft" if script == "sft.py" else "prompts"])
    rate = ("--max_steps", STEPS, "--learning_rate", 1e-3)
    tiny = ("--num_generations", 3, "--max_completion_length", 48, "--prompts_per_step", 2)
    if script == "sft.py":
        return ("--model", trained, *data, *rate, "--per_device_train_batch_size", 4)
    if script == "discriminator.py":
        batch = ("--per_device_train_batch_size", 4, "--gradient_accumulation_steps", 1)
        answers = ("--policy", trained, "--max_completion_length", 64)
        return ("--model", discriminator, *answers, *data, *rate, *batch)
    if script == "align.py":
        game = ("--discriminator", discriminator, "--discriminator_learning_rate", 1e-3)
        return ("--ckpt", trained, *game, *data, *rate, *tiny)
    return ("--ckpt", trained, *data, *rate, *tiny)


def numbers(path) -> list[dict]:
    """metrics.jsonl without what a clock says."""
    clock = ("time/", "peak_memory", "tokens_per_second")
    lines = map(json.loads, open(Path(path) / "metrics.jsonl"))
    return [{k: v for k, v in line.items() if not k.startswith(clock)} for line in lines]


def differences(one, two) -> list[str]:
    """In what two runs' directories differ: steps, rollouts, weights. Empty where in nothing."""
    import torch
    from safetensors.torch import load_file

    found = []
    a, b = numbers(one), numbers(two)
    if [line["step"] for line in a] != [line["step"] for line in b]:
        found.append(f"steps {[line['step'] for line in b]}")
    for x, y in zip(a, b):
        names = [k for k in {*x, *y} if x.get(k) != y.get(k)]
        found += [f"step {x['step']}: {', '.join(sorted(names))}"] if names else []
    rows = [(Path(p) / "rollouts.jsonl") for p in (one, two)]
    if any(p.exists() for p in rows) and len({p.read_text() for p in rows}) > 1:
        found.append("rollouts")
    for file in sorted(Path(one).glob("**/model*.safetensors")):
        name = file.relative_to(one)
        if any(part.startswith("checkpoint") for part in name.parts):
            continue
        x, y = load_file(file), load_file(Path(two) / name)
        other = [k for k in x if k not in y or not torch.equal(x[k], y[k])]
        found += [f"{name}: {len(other)} of {len(x)} tensors"] if other or len(x) != len(y) else []
    return found


def prepare(nursery: Nursery, folder: Path) -> tuple[dict, str, str]:
    """A small world, a policy that has learned the format in it, and a discriminator."""
    import digits
    from tests.conftest import WORLD

    world = digits.build(folder / "world", digits.World(**WORLD))
    flags = ("--max_steps", 150, "--learning_rate", 4e-3, "--per_device_train_batch_size", 32)
    where = ("--data", world["prompts"], "--output_dir", folder / "trained")
    done = nursery.run("sft.py", "--model", world["init"], *where, *flags, log=folder / "trained")
    assert done.codes == [0], done.said
    trained, discriminator = str(folder / "trained"), str(folder / "discriminator")
    flags = flags_of("discriminator.py", world, trained, trained)
    where = ("--output_dir", discriminator)
    done = nursery.run("discriminator.py", *flags, *where, log=folder / "log")
    assert done.codes == [0], done.said
    return world, trained, discriminator


# --------------------------------------------------------------------------------------------------
# Faults


def in_a_save(out: Path) -> bool:
    return any(name.endswith(".incomplete") for name in os.listdir(out)) if out.is_dir() else False


def strike(started: Started, out: Path, rng: random.Random, length: float, aimed: bool) -> float:
    """Waits for the moment of a kill: anywhere in a run of `length` seconds, or `aimed` into a
    save, which is seen by its unfinished copy. -> the moment, in seconds from the start."""
    start, moment = time.monotonic(), rng.uniform(0, length)
    if aimed:  # the copy of some checkpoint, and some time into it
        passed = rng.randrange(STEPS - 1)
        before = False
        while time.monotonic() - start < length and not started.gone():
            now = in_a_save(out)
            passed -= now and not before
            before = now
            if passed < 0:
                break
            time.sleep(0.0005)
        moment = time.monotonic() - start + rng.uniform(0, 0.06)
    while time.monotonic() - start < moment and not started.gone():
        time.sleep(0.001)
    return time.monotonic() - start


def one_try(
    nursery, script, ranks, base, reference, folder, rng, length, fault, struck: Counter
) -> tuple[bool, str]:
    """A run that `fault` happens to up to three times, and that is resumed each time."""
    out = folder / "out"
    shutil.rmtree(out, ignore_errors=True)
    words = [script, *base, "--save_steps", 1, "--output_dir", out]
    happened = 0
    for _ in range(rng.randint(1, 3)):
        started = nursery.start(*words, "--resume", ranks=ranks, log=folder / "log")
        strike(started, out, rng, length, fault == "kill -9 in a save")
        if started.gone() and started.wait() == [0] * ranks:
            break  # it had finished before
        if fault == "kill -9 of one of two ranks":
            started.signal(signal.SIGKILL, rng.randrange(ranks))
        elif fault in ("SIGTERM", "SIGINT"):
            started.signal(getattr(signal, fault))
        else:
            started.signal(signal.SIGKILL)
        codes = started.wait(60)
        happened += 1
        struck["all"] += 1
        struck["in a save"] += in_a_save(out)
        if None in codes or "Traceback" in started.said:
            return False, f"after {fault}: {codes} {started.said[-300:]}"
        number = signal.SIGTERM if fault == "SIGTERM" else signal.SIGINT
        polite = {0, 130, -number}  # the last before there is a run, or after it
        if "stopped by a signal; saved" in started.said:
            polite = {0 if fault == "SIGTERM" else 130}
        if fault in ("SIGTERM", "SIGINT") and not set(codes) <= polite:
            return False, f"after {fault}: {codes} {started.said[-300:]}"
    done = nursery.run(*words, "--resume", ranks=ranks, log=folder / "log")
    if done.codes != [0] * ranks:
        return False, f"resumed after {happened}: {done.codes} {done.said[-400:]}"
    other = differences(reference, out)
    return not other, "; ".join(other)


def two_at_once(nursery, script, base, reference, folder, rng) -> tuple[bool, str]:
    """Two runs in one directory, almost at once: one is refused, the other is as if alone."""
    out = folder / "out"
    shutil.rmtree(out, ignore_errors=True)
    words = [script, *base, "--save_steps", 2, "--output_dir", out]
    one = nursery.start(*words, log=folder / "one")
    time.sleep(rng.choice((0, 0, rng.uniform(0, 0.3))))
    two = nursery.start(*words, log=folder / "two")
    codes = sorted(one.wait() + two.wait())
    if codes != [0, 2]:
        return False, f"{codes} {one.said[-200:]} {two.said[-200:]}"
    other = differences(reference, out)
    return not other, "; ".join(other)


def chaos(nursery: Nursery, folder: Path, prepared: tuple, tries: int, seed: int) -> bool:
    """The table. -> whether all was survived."""
    rng = random.Random(seed)
    faults = ("kill -9", "kill -9 in a save", "kill -9 in a save")
    faults += ("kill -9 of one of two ranks", "SIGTERM", "SIGINT", "two at once")
    reference, length = {}, {}
    tried, survived, struck, failed = Counter(), Counter(), Counter(), []
    kinds = [(script, ranks) for ranks in (1, 2) for script in STAGES]
    for number in range(tries):
        script, ranks = kinds[number % len(kinds)]
        fault = faults[number // len(kinds) % len(faults)]
        fault = "kill -9" if fault == "kill -9 of one of two ranks" and ranks == 1 else fault
        fault = "kill -9" if fault == "two at once" and ranks == 2 else fault
        base = flags_of(script, *prepared)
        if (script, ranks) not in reference:
            reference[script, ranks] = whole = folder / f"{script}-{ranks}"
            done = nursery.run(
                *(script, *base, "--output_dir", whole), ranks=ranks, log=folder / "log"
            )
            assert done.codes == [0] * ranks, done.said
            start = time.monotonic()
            often = ("--save_steps", 1, "--output_dir", folder / "often")
            done = nursery.run(script, *base, *often, ranks=ranks, log=folder / "log")
            length[script, ranks] = time.monotonic() - start
            other = differences(whole, folder / "often")
            assert done.codes == [0] * ranks and not other, (other, done.said)
            shutil.rmtree(folder / "often")
        whole = reference[script, ranks]
        if fault == "two at once":
            good, why = two_at_once(nursery, script, base, whole, folder, rng)
        else:
            span = length[script, ranks]
            good, why = one_try(
                nursery, script, ranks, base, whole, folder, rng, span, fault, struck
            )
        key = (fault, script.removesuffix(".py"), ranks)
        tried[key] += 1
        survived[key] += good
        if number % 8 == 7:
            print(f"{number + 1} tries, {len(failed)} failed", file=sys.stderr, flush=True)
        if not good:
            failed.append(f"try {number}, {key}: {why}")
            print(failed[-1], flush=True)
    print(f"seed {seed}, {tries} tries")
    print(f"{'fault':30} {'stage':14} {'ranks':>5} {'tried':>6} {'survived':>9}")
    for key in sorted(tried):
        print(f"{key[0]:30} {key[1]:14} {key[2]:5} {tried[key]:6} {survived[key]:9}")
    print(f"{'all':51} {sum(tried.values()):6} {sum(survived.values()):9}")
    print(f"{struck['all']} kills and signals, {struck['in a save']} of them during a save")
    return not failed


# --------------------------------------------------------------------------------------------------
# Memory, time, files, threads


def watch(nursery: Nursery, folder: Path, prepared: tuple, steps: int) -> bool:
    """One run of alignment of so many steps: its last quarter against its second."""
    base = flags_of("align.py", *prepared)
    words = ("--max_steps", steps, "--save_steps", max(1, steps // 10), "--learning_rate", 1e-5)
    words += ("--discriminator_learning_rate", 1e-5, "--output_dir", folder / "long")
    started = nursery.start("align.py", *base, *words, log=folder / "long.log")
    (pid,), seen, step = started.pids, [], 0
    while not started.gone():
        try:
            step = int(Path(folder / "long" / "ranks" / "0").read_text().split()[0])
            status = Path(f"/proc/{pid}/status").read_text().splitlines()
            held = {line.split(":")[0]: line.split()[1] for line in status if len(line.split()) > 1}
            files = len(os.listdir(f"/proc/{pid}/fd"))
            seen.append((step, int(held["VmRSS"]), files, int(held["Threads"])))
        except (OSError, IndexError, ValueError, KeyError):
            pass
        time.sleep(0.05)
    if started.wait() != [0]:
        print(started.said[-1000:])
        return False
    took = [json.loads(line)["time/step"] for line in open(folder / "long" / "metrics.jsonl")]

    def quarter(values, n):
        part = values[len(values) * n // 4 : len(values) * (n + 1) // 4]
        return sorted(part)[len(part) // 2]

    parts = [[s for s in seen if (s[0] - 1) * 4 // steps == n] for n in (1, 3)]

    def middle(part, i):
        return sorted(s[i] for s in part)[len(part) // 2]

    rows = [("memory, MB", *(middle(p, 1) / 1024 for p in parts), 0.02)]
    rows += [("time a step, s", quarter(took, 1), quarter(took, 3), 0.10)]
    rows += [("open files", *(middle(p, 2) for p in parts), 0)]
    rows += [("threads", *(middle(p, 3) for p in parts), 0)]
    print(f"{steps} steps of alignment, medians of the second and the last quarter")
    good = True
    for name, before, after, limit in rows:
        change = after / before - 1
        good &= change <= limit
        flat = "flat" if change <= limit else "GROWS"
        print(f"{name:20} {before:10.3f} {after:10.3f} {change:+8.2%} {flat}")
    return good


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tries", type=int, default=56, help="56: every fault on every stage")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--steps", type=int, default=300, help="of the run that is watched; 0: none"
    )
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        return serve()
    nursery = Nursery()
    with tempfile.TemporaryDirectory() as folder:
        prepared = prepare(nursery, Path(folder))
        good = chaos(nursery, Path(folder), prepared, args.tries, args.seed)
        if args.steps:
            good &= watch(nursery, Path(folder), prepared, args.steps)
    nursery.close()
    sys.exit(not good)


if __name__ == "__main__":
    main()
