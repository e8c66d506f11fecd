"""What happens to a run: kills at random moments, and what is left of it afterwards.

    python tests/chaos.py --tries 80 --seed 0         every fault on every stage
    python tests/chaos.py --tries 100 --only kill   kills only
    python tests/chaos.py --tries 0 --fuzz 1000000    inputs that are broken in every way

A try is a short run of one stage on one or two ranks. A fault strikes it up to three times, and it
is resumed each time. Its result must equal that of an undisturbed run to the last bit: metrics
without the times, rollouts, weights. Some kills are aimed at the moment when a checkpoint is saved.
A table shows each fault, how often it was tried and survived. Then one long run of alignment is
watched: memory, time a step, open files and threads must not grow. Then come broken inputs: none
may raise an error that nobody catches, and none may take a second.

Not a test by pytest's names; `make chaos` runs it. tests/test_run*.py use parts of it.
"""

import argparse
import itertools
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


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


class Nursery:
    """A process that has imported all that a stage imports, and forks a stage when asked. The stage
    starts in a moment, and is otherwise as started by `python` or by torchrun."""

    def __init__(self):
        serve = [sys.executable, str(Path(__file__).resolve()), "--serve"]
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT)
        env = os.environ | {"TQDM_DISABLE": "1"}
        self.process = subprocess.Popen(serve, env=env, **pipes)

    def ask(self, **question):
        self.process.stdin.write(json.dumps(question) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def start(self, script: str, *args, ranks: int = 1, log, **env) -> "Started":
        """Starts a stage as processes, one a rank. Their stderr goes to files named after `log`,
        their stdout to files that end in `.out`."""
        env = {key: str(value) for key, value in env.items()}
        if ranks > 1:
            port = str(free_port())
            env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(ranks)}
        words = [*map(str, (script, *args))]
        logs, pids = [f"{log}.{rank}" for rank in range(ranks)], []
        for rank in range(ranks):
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks > 1 else {}
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
        """Sends a signal to the processes of the given ranks, or to all of them."""
        if self.codes:
            return  # all have ended, and their numbers may be those of other processes
        for rank in ranks or range(len(self.pids)):
            try:
                os.kill(self.pids[rank], number)
            except ProcessLookupError:
                pass

    def wait(self, limit: float = 600.0) -> list[int | None]:
        """The exit codes; minus the signal where one killed it, None where it had to be ended
        after `limit` seconds."""
        self.codes = self.codes or self.nursery.ask(wait=self.pids, limit=limit)
        return self.codes

    def gone(self, *ranks: int) -> bool:
        """Whether one of the processes has ended, of the given ranks or of all. Does not wait."""
        return bool(self.codes) or any(
            self.nursery.ask(gone=self.pids[r]) for r in ranks or range(len(self.pids))
        )

    @property
    def said(self) -> str:
        return "\n".join(Path(log).read_text(errors="replace") for log in self.logs)

    @property
    def printed(self) -> str:
        return "".join(Path(f"{log}.out").read_text(errors="replace") for log in self.logs)

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
                codes.pop(pid, None)  # of an earlier process of this number
                return pid
            os.setsid()
            new = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            os.dup2(os.open(question["log"] + ".out", new), 1)
            os.dup2(os.open(question["log"], new), 2)
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
            codes[pid] = None
        return [codes.pop(pid) for pid in question["wait"]]

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


def with_data(words, data) -> list:
    """The words of a run, on other data: a run is given --data once."""
    words = [*words]
    words[words.index("--data") + 1] = data
    return words


def numbers(path) -> list[dict]:
    """metrics.jsonl without what a clock says."""
    clock = ("time/", "peak_memory", "tokens_per_second")
    lines = map(json.loads, open(Path(path) / "metrics.jsonl"))
    return [{k: v for k, v in line.items() if not k.startswith(clock)} for line in lines]


def differences(one, two) -> list[str]:
    """How two runs' directories differ: in steps, rollouts, weights. Empty where they do not."""
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


def prepare(nursery: Nursery, folder: Path, world: dict) -> tuple[dict, str, str]:
    """A policy that has learned the format in a small world, and a discriminator."""
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

FAULTS = (
    "kill -9",
    "kill -9 in a save",
    "kill -9 of one of two ranks",
    "kill -9 of ranks that differ",
    "kill -9, then a damaged checkpoint",
    "SIGTERM",
    "SIGINT",
    "SIGSTOP of one of two ranks",
    "full disk",
    "two at once",
)
ODD = ("no images", "rows left out", "one row", "nothing valid")  # how ranks come to differ


def odd_flags(base: tuple, script: str, kind: str, world: dict) -> tuple:
    """The flags of a run whose ranks differ: half of the rows have no image, half of them are bad,
    there is one row for all ranks, or the policy answers in no format."""
    if kind == "nothing valid" and script in ("align.py", "rlvr.py"):
        return (*base, "--ckpt", world["init"])
    path = Path(world["sft" if script == "sft.py" else "prompts"])
    rows = [json.loads(line) for line in open(path)]
    for row in rows[::2] if kind != "one row" else []:
        row |= {"videos": "x"} if kind == "rows left out" else {}
        for name in {"image", "images"} & row.keys():
            row[name] = []
    text = [json.dumps(row) for row in rows[: 1 if kind == "one row" else None]]
    text = [line.replace("<image>", "") if "[]" in line else line for line in text]
    data = path.with_name(f"{path.stem}-{kind.replace(' ', '-')}.jsonl")
    data.write_text("\n".join(text))
    alone = script == "discriminator.py" and kind == "one row"
    more = ("--validation_share", 0) if alone else ()
    more = ("--max_bad_fraction", 1, "--image_dir", path.parent, *more)
    return (*with_data(base, data), *more)


def in_a_save(out: Path) -> bool:
    return any(name.endswith(".incomplete") for name in os.listdir(out)) if out.is_dir() else False


def strike(started: Started, out: Path, rng: random.Random, length: float, aimed: bool) -> None:
    """Waits for the moment of a kill: anywhere in a run of `length` seconds, or `aimed` into a
    save, which is seen by its unfinished copy."""
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


def damage(out: Path, rng: random.Random) -> None:
    """Changes bytes in the middle of some file of the newest checkpoint, or cuts it off there."""
    found = [p for p in out.glob("checkpoint-*") if p.name[11:].isdigit()]
    if found:
        newest = max(found, key=lambda path: int(path.name[11:]))
        path = rng.choice(sorted(p for p in newest.rglob("*") if p.is_file()))
        content = bytearray(path.read_bytes())
        middle = len(content) // 2
        content[middle : middle + 8] = bytes(255 - byte for byte in content[middle : middle + 8])
        path.write_bytes(content[: rng.choice((None, middle))])


def one_try(
    nursery, script, ranks, base, reference, folder, rng, length, fault, struck: Counter
) -> tuple[bool, str]:
    """A run that `fault` happens to up to three times, and that is resumed each time."""
    out = folder / "out"
    shutil.rmtree(out, ignore_errors=True)
    words = [script, *base, "--save_steps", 1, "--output_dir", out]
    happened = 0
    for _ in range(rng.randint(1, 3)):
        # One that is killed before the ranks have met is waited for as long as one that is stuck.
        wait = ("--timeout", 0.1) if "one of two" in fault else ()
        started = nursery.start(*words, *wait, "--resume", ranks=ranks, log=folder / "log")
        strike(started, out, rng, length, fault == "kill -9 in a save")
        if started.gone() and started.wait() == [0] * ranks:
            break  # it had finished before
        lost = rng.randrange(ranks)
        if fault == "kill -9 of one of two ranks":
            started.signal(signal.SIGKILL, lost)
        elif fault == "SIGSTOP of one of two ranks":
            started.signal(signal.SIGSTOP, lost)
            end = time.monotonic() + 60
            while not started.gone(1 - lost) and time.monotonic() < end:
                time.sleep(0.01)
            if not started.gone(1 - lost):
                return False, "the other rank did not end"
            started.signal(signal.SIGKILL, lost)
        elif fault in ("SIGTERM", "SIGINT"):
            started.signal(getattr(signal, fault))
        else:
            started.signal(signal.SIGKILL)
        codes = started.wait(180)
        happened += 1
        struck["all"] += 1
        struck["in a save"] += in_a_save(out)
        if None in codes or "Traceback" in started.said:
            return False, f"after {fault}: {codes} {started.said[-300:]}"
        number = signal.SIGTERM if fault == "SIGTERM" else signal.SIGINT
        polite = {0, 130, -number}  # -number: before there is a run, or after it
        if "stopped by a signal; saved" in started.said:
            polite = {0 if fault == "SIGTERM" else 130}
        if fault in ("SIGTERM", "SIGINT") and not set(codes) <= polite:
            return False, f"after {fault}: {codes} {started.said[-300:]}"
        if fault.endswith("damaged checkpoint"):
            damage(out, rng)
    return resumed(nursery, words, ranks, reference, folder, out)


def resumed(nursery, words, ranks, reference, folder, out) -> tuple[bool, str]:
    """Whether the run goes on to what it would have been, undisturbed."""
    done = nursery.run(*words, "--resume", ranks=ranks, log=folder / "log")
    if done.codes != [0] * ranks:
        return False, f"resumed: {done.codes} {done.said[-400:]}"
    other = differences(reference, out)
    return not other, "; ".join(other)


def full_disk(nursery, script, ranks, base, reference, folder, rng) -> tuple[bool, str]:
    """A disk that gets full: the run must end with one line and leave nothing half-written."""
    disk = folder / "disk"
    disk.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", disk], check=True)
    try:
        out, ballast = disk / "out", disk / "ballast"
        words = [script, *base, "--save_steps", 1, "--output_dir", out]
        result = sum(p.stat().st_size for p in reference.rglob("*.safetensors"))
        with open(ballast, "wb") as file:  # a checkpoint is four times the result, two are kept
            file.write(bytes(max(0, (64 << 20) - int(rng.uniform(0, 13) * result))))
        started = nursery.start(*words, ranks=ranks, log=folder / "log")
        codes = started.wait()
        if set(codes) != {0}:
            whole = len(started.errors) == 1 and not in_a_save(out) and 2 in codes
            if not whole or "Traceback" in started.said or (out / "model.safetensors").exists():
                return False, f"{codes} {started.said[-300:]}"
        ballast.unlink()
        return resumed(nursery, words, ranks, reference, folder, out)
    finally:
        subprocess.run(["umount", "-l", disk], check=True)


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


def chaos(nursery: Nursery, folder: Path, prepared: tuple, tries: int, seed: int, only: str):
    """Tries the faults and prints the table. -> whether every try was survived."""
    rng = random.Random(seed)
    faults = [fault for fault in FAULTS if only in fault]
    reference, length = {}, {}
    tried, survived, struck, failed = Counter(), Counter(), Counter(), []
    kinds = [(script, ranks) for ranks in (1, 2) for script in STAGES]
    for number in range(tries):
        script, ranks = kinds[number % len(kinds)]
        fault = faults[number // len(kinds) % len(faults)]
        many = fault.endswith(("ranks", "differ"))
        fault = "kill -9" if many and ranks == 1 or fault == "two at once" and ranks == 2 else fault
        base, odd = flags_of(script, *prepared), None
        if fault.endswith("differ"):
            odd = rng.choice(ODD)
            base = odd_flags(base, script, odd, prepared[0])
        if (script, ranks, odd) not in reference:
            whole = folder / f"{script}-{ranks}-{odd}"
            reference[script, ranks, odd] = whole
            done = nursery.run(
                *(script, *base, "--output_dir", whole), ranks=ranks, log=folder / "log"
            )
            assert done.codes == [0] * ranks, done.said
            start = time.monotonic()
            often = ("--save_steps", 1, "--output_dir", folder / "often")
            done = nursery.run(script, *base, *often, ranks=ranks, log=folder / "log")
            length[script, ranks, odd] = time.monotonic() - start
            other = differences(whole, folder / "often")
            assert done.codes == [0] * ranks and not other, (other, done.said)
            shutil.rmtree(folder / "often")
        whole, span = reference[script, ranks, odd], length[script, ranks, odd]
        if fault == "two at once":
            good, why = two_at_once(nursery, script, base, whole, folder, rng)
        elif fault == "full disk":
            good, why = full_disk(nursery, script, ranks, base, whole, folder, rng)
        else:
            good, why = one_try(
                nursery, script, ranks, base, whole, folder, rng, span, fault, struck
            )
        key = (fault, script.removesuffix(".py"), ranks)
        tried[key] += 1
        survived[key] += good
        if number % 8 == 7:
            print(f"{number + 1} tries, {len(failed)} failed", file=sys.stderr, flush=True)
        if not good:
            failed.append(f"try {number}, {key}, {odd}: {why}")
            print(failed[-1], flush=True)
    print(f"seed {seed}, {tries} tries")
    print(f"{'fault':36} {'stage':14} {'ranks':>5} {'tried':>6} {'survived':>9}")
    for key in sorted(tried):
        print(f"{key[0]:36} {key[1]:14} {key[2]:5} {tried[key]:6} {survived[key]:9}")
    print(f"{'all':57} {sum(tried.values()):6} {sum(survived.values()):9}")
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
            ticks = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]
            used = sum(map(int, ticks)) / os.sysconf("SC_CLK_TCK")
            seen.append((step, int(held["VmRSS"]), files, int(held["Threads"]), used))
        except (OSError, IndexError, ValueError, KeyError):
            pass
        time.sleep(0.05)
    if started.wait() != [0]:
        print(started.said[-1000:])
        return False
    parts = [[s for s in seen if (s[0] - 1) * 4 // steps == n] for n in (1, 3)]

    def middle(part, i):
        return sorted(s[i] for s in part)[len(part) // 2]

    def pace(part):
        return (part[-1][4] - part[0][4]) / (part[-1][0] - part[0][0])

    rows = [("memory, MB", *(middle(p, 1) / 1024 for p in parts), 0.02)]
    rows += [("processor, s a step", *map(pace, parts), 0.10)]  # others may use the machine
    rows += [("open files", *(middle(p, 2) for p in parts), 0)]
    rows += [("threads", *(middle(p, 3) for p in parts), 0)]
    print(f"{steps} steps of alignment, the second quarter and the last")
    good = True
    for name, before, after, limit in rows:
        change = after / before - 1
        good &= change <= limit
        flat = "flat" if change <= limit else "GROWS"
        print(f"{name:20} {before:10.3f} {after:10.3f} {change:+8.2%} {flat}")
    return good


# --------------------------------------------------------------------------------------------------
# Inputs. Each generator gives (how many inputs, what they are, what tries them).


def answers(rng: random.Random):
    """Texts for parse_response. The blocks of those that it accepts must be whole."""
    from data import TAGS, parse_response

    odd = ["<", ">", "</", "caption", "<image>", "\ud800", "\0", "é", "  ", "\n", "a", "x = 5"]
    while True:
        text = "".join(rng.choice((tag, "", tag + rng.choice(odd))) for tag in TAGS)
        text = (
            "<caption>a</caption>\n<think>b</think> <answer>c</answer>"
            if rng.random() < 0.3
            else text
        )
        for _ in range(rng.randrange(5)):
            at, piece = rng.randrange(len(text) + 1), rng.choice([*TAGS, *odd])
            piece *= rng.choice((0, 1, 1, 1, 2, 3000 if rng.random() < 0.02 else 1))
            text = text[:at] + piece + text[at + rng.choice((0, 0, 1, 3, 9)) :]
        text = rng.choice((None, 7, text.encode(errors="replace"))) if rng.random() < 0.01 else text

        def attempt(text=text):
            response = parse_response(text)
            if response is not None:
                blocks = [response.caption, response.think, response.answer]
                assert all(b and b == b.strip() for b in blocks)
                assert not any(tag in block for tag in TAGS for block in blocks)

        yield 1, text, attempt


def judgements(rng: random.Random):
    """Pairs of an answer and a ground truth for verify."""
    from support.verifier import verify
    from tests.test_verifier import mutated

    while True:
        pair = mutated(rng), mutated(rng)
        pair = (
            (pair[0], rng.choice(([pair[1], mutated(rng)], None, 3.5, [], [[]], {})))
            if rng.random() < 0.05
            else pair
        )

        def attempt(pair=pair):
            assert verify(*pair) in (True, False)

        yield 1, pair, attempt


def tables(rng: random.Random, folder: Path, processor):
    """Files of rows in every layout and format, drawn and encoded as a stage does."""
    import pyarrow
    import pyarrow.parquet

    from data import Encoded
    from support.errors import RowError, UserError
    from support.rows import load_data
    from tests import test_rows as wild

    layouts = [wild.SHAREGPT, wild.OLDER, wild.PLAIN, wild.VERL, wild.PAIR, wild.PARTS]
    (folder / "a.png").write_bytes(wild.PIXEL)
    texts = [value for value in wild.ODD if isinstance(value, str) and value.isprintable()]

    def text():
        return rng.choice((None, "q <image>", *texts))

    def verl():
        turns = [{"role": rng.choice(("user", "assistant", "x", None)), "content": text()}]
        picture = {"bytes": rng.choice((None, b"", b"x", wild.PIXEL)), "path": text()}
        truth = {"ground_truth": text(), "equivalent_answers": rng.choice((None, [], [text()]))}
        return {
            "prompt": turns * rng.randrange(3),
            "images": [picture] * rng.randrange(3),
            "reward_model": truth,
            "teacher_response": text(),
        }

    def damaged(line: bytes) -> bytes:
        at, content = rng.randrange(len(line) + 1), bytes([rng.choice(b'\xff{}[]",:\0 9')])
        return line[:at] + content * rng.randrange(3) + line[at + rng.randrange(4) :]

    for number in itertools.count():
        kind = ("jsonl", "json", "jsonl", "parquet")[number % 4]
        path, size = folder / f"rows.{kind}", 2000
        if kind == "parquet":
            pyarrow.parquet.write_table(
                pyarrow.Table.from_pylist([verl() for _ in range(size)]), path
            )
        else:
            rows = [wild.mutated(rng.choice(layouts), rng) for _ in range(size)]
            lines = [json.dumps(row, default=str).encode() for row in rows]
            if kind == "json":
                path.write_bytes(b"[" + b",".join(lines) + b"]")
            else:
                path.write_bytes(b"\n".join(damaged(x) if rng.random() < 0.3 else x for x in lines))
        encoded = Encoded(load_data(str(path)), processor, lambda *row: row)
        for at in range(0, len(encoded.examples), 8):
            draws = [(i, i) for i in range(at, min(at + 8, len(encoded.examples)))]

            def attempt(draws=draws, encoded=encoded):
                for where, item in encoded[draws]:
                    assert where and (isinstance(item, RowError) or len(item[1].input_ids))

            yield len(draws), (str(path), draws), attempt
        content = damaged(path.read_bytes()[: rng.choice((None, 50, 4000))])

        def opened(content=content, path=path.with_name(f"broken.{kind}")):
            path.write_bytes(content)
            try:
                rows = load_data(str(path))
            except UserError:
                return
            try:
                rows[len(rows) - 1]
            except RowError:
                pass

        yield 1, content[:100], opened


def packs(rng: random.Random, path: str, data: str):
    """Groups of any shape under any budget: the log-probabilities of each branch are those of
    transformers' own forward of prompt and branch alone, in float64."""
    import torch
    from transformers import AutoModelForImageTextToText

    from data import Group, encode_prompts, make_packs
    from model import load_policy, token_logprobs
    from support.rows import Example, load_data
    from tests.test_model import reference_logprobs

    policy, processor = load_policy(path)
    reference = AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float64)
    asked = [[{"role": "user", "content": [{"type": "text", "text": "a" * n}]}] for n in (1, 9, 60)]
    examples = [*load_data(data)[:30], *(Example(0, "text", chat, []) for chat in asked)]
    prompts = encode_prompts(processor, examples)
    words = torch.tensor([i for i in range(300) if i not in policy.forbidden])
    while True:
        chosen = rng.choices(prompts, k=rng.randint(1, 3))
        branches = [
            [words[torch.randint(len(words), (rng.choice((1, 2, 5, 17, 40)),))] for _ in range(n)]
            for n in (rng.choice((0, 1, 2, 3)) for _ in chosen)
        ]
        groups = [Group(prompt, some) for prompt, some in zip(chosen, branches)]
        budget, temperature = rng.choice((None, rng.randint(1, 300))), rng.uniform(0.3, 2)

        def attempt(groups=groups, budget=budget, temperature=temperature):
            seen = []
            with torch.no_grad():
                for pack in make_packs(groups, budget):
                    logp = token_logprobs(policy, pack, temperature)[0].split(pack.lengths)
                    for (g, i), mine in zip(pack.members, logp):
                        given = groups[g].prompt, groups[g].branches[i], temperature
                        own = reference_logprobs(reference, *given, policy.forbidden)[0]
                        assert torch.allclose(mine.double(), own, atol=1e-4), (
                            (mine - own).abs().max()
                        )
                        seen.append((g, i))
            assert sorted(seen) == [
                (g, i) for g, group in enumerate(groups) for i in range(len(group.branches))
            ]

        shape = [(len(group.prompt.input_ids), [*map(len, group.branches)]) for group in groups]
        yield 1, (shape, budget, temperature), attempt


def fuzz(folder: Path, world: dict, count: int, seed: int, only: str = "") -> bool:
    """`count` inputs in all. -> whether none raised and none took a second of processor time."""
    import datasets
    import torch

    from support.huggingface import load_processor
    from tests.test_verifier import processor_time

    datasets.config.HF_DATASETS_CACHE = str(folder / "cache")
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(60)  # that a file is broken is no news here
    torch.manual_seed(seed)
    rng, good = random.Random(seed), True
    kinds = {"parse_response": (0.4, answers(rng)), "verify": (0.4, judgements(rng))}
    kinds["rows"] = 0.19, tables(rng, folder, load_processor(world["init"]))
    kinds["packs"] = 0.01, packs(rng, world["init"], world["prompts"])
    print(f"{'inputs':16} {'tried':>9} {'raised':>7} {'slowest, s':>11}", flush=True)
    for name, (share, inputs) in kinds.items():
        tried = raised = slowest = 0
        if only not in name:
            continue
        while tried < share * count:
            number, given, attempt = next(inputs)
            start = processor_time()
            try:
                attempt()
            except Exception as error:
                print(f"{name}: {type(error).__name__}: {error}, {ascii(given)[:500]}", flush=True)
                raised += 1
            took = processor_time() - start
            tried, slowest = tried + number, max(slowest, took)
            if took >= 1:
                print(f"{name}: {took:.2f} s, {ascii(given)[:500]}", flush=True)
        print(f"{name:16} {tried:9} {raised:7} {slowest:11.3f}", flush=True)
        good &= not raised and slowest < 1
    return good


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tries", type=int, default=80, help="80: each fault on each stage")
    parser.add_argument("--only", default="", help="only faults and inputs with this in their name")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=300, help="steps of the run that is watched")
    parser.add_argument("--fuzz", type=int, default=20_000, help="how many inputs to try")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        return serve()
    from support import digits
    from tests.conftest import WORLD

    nursery, good = Nursery(), True
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        world = digits.build(folder / "world", digits.World(**WORLD))
        if args.tries or args.steps:
            prepared = prepare(nursery, folder, world)
        if args.tries:
            good &= chaos(nursery, folder, prepared, args.tries, args.seed, args.only)
        if args.steps:
            good &= watch(nursery, folder, prepared, args.steps)
        if args.fuzz:
            good &= fuzz(folder, world, args.fuzz, args.seed, args.only)
    nursery.close()
    sys.exit(not good)


if __name__ == "__main__":
    main()
