"""A run: its directory and log, its rows, its steps and its signals.

    output_dir/run.json            every field of the stage's dataclass as it ran, the command and
                                   the commit; once the result is whole `finished`, the last step,
                                   and `rounding_loss`, what the result would lose in bfloat16
    output_dir/metrics.jsonl       one line a step, over all ranks; null where nothing was measured
    output_dir/rollouts.jsonl      the rollouts of one prompt a step, with all their scores
    output_dir/left_out.jsonl      every row that was left out, by any rank, and why
    output_dir/skipped.jsonl       every step whose gradient was not finite, and its rows
    output_dir/checkpoint-N/       what --resume needs, see resuming.py
    output_dir/                    at the end, the Hugging Face directory of the result

A killed run goes on with --resume and gives what it would have given: on a CPU to the last bit, on
a GPU as nearly as two equal runs do.
"""

import contextlib
import dataclasses
import datetime
import fcntl
import json
import math
import os
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.distributed as dist
from tqdm import tqdm

from support import verifier
from support.errors import Ended, RowError, Unfit, UserError, counted
from support.flags import parse
from support.huggingface import rounding_loss, starting_weights
from support.loader import batches, keyed
from support.metrics import Max, Sum, across_ranks, finite, writer_to
from support.ranks import all_max, barrier, join_ranks, rank, say, world_size
from support.resuming import (
    REMOVED,
    UNSUPPORTED,
    Checkpoints,
    all_or_nothing,
    check_weights,
    checksum_of,
    files_below,
    force,
    replacing,
    write_json,
)


def start_verifier() -> None:
    """A broken math-verify is an error at the start, not wrong rewards later."""
    try:
        verifier.start()
    except RuntimeError as error:
        raise UserError(f"{error}; run pip install -r requirements.txt, or try again") from None


class Run:
    """A stage's run. Made first, so that a directory that is in use is noticed before any work."""

    current = None  # the run of this process, for messages

    def __init__(self, config_class):
        self.config = config = parse(config_class)
        self.device = join_ranks(datetime.timedelta(minutes=config.timeout))
        if config.activation_checkpointing is None:
            config.activation_checkpointing = self.device.type == "cuda"
        Run.current = self
        self.path = config.output_dir or "."
        self.checkpoints = Checkpoints(self.path, config.save_total_limit)
        self.seconds: dict[str, float] = {}  # of this step's phases
        self.last = time.perf_counter()  # when the last step ended
        self.bar = self.writer = self.lock = self.record = None
        self.left_out, self.bad = 0, set()  # rows: how many, and where the bad ones come from
        self.rows: list[str] = []  # where the rows of this step come from
        self.rounding_loss: dict[str, float] = {}  # of each model that was saved
        self.asked = 0  # the signal that this rank got
        self.started = False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._ask_to_stop)
        self.found = self._holds()
        if os.path.isfile(self.path):
            raise UserError(f"--output_dir {self.path} is a file; name a directory")
        if self.found and not config.resume:
            raise UserError(
                f"--output_dir {self.path} is not empty; pass --resume to go on there, or name "
                f"another"
            )
        before = self._before() if config.resume else {}
        if before.get("finished"):
            self._end_again(before)
        self.step = self.checkpoints.newest() if config.resume else 0  # the last that is done
        # What a checkpoint keeps besides tensors. `position`: how many rows all ranks have drawn.
        self.progress = {"position": 0, "skipped": 0, "skipped_in_a_row": 0, "rows_used": 0}
        self.progress["any_valid"] = False  # whether any rollout has had the format
        if self.step:
            self.progress |= self.checkpoints.progress(self.step)
        elif config.resume:
            say(f"--resume: no undamaged checkpoint in {self.path}, starting from step 1")
        self.drawn = self.progress["position"]  # how many rows this rank knows to be drawn

    def _ask_to_stop(self, number: int, frame) -> None:
        """Schedulers and torchrun send SIGTERM more than once; a second Ctrl-C ends at once."""
        self.asked = number
        if number == signal.SIGINT:
            signal.signal(number, signal.SIG_DFL)
            say(
                "Finishing this step, then saving and exiting. Press Ctrl-C again to quit now "
                "without saving."
            )

    # ----------------------------------------------------------------------------------------------
    # Rows

    def batches(self, rows: Sequence, batch_size: int, total=None, held_out=False) -> Iterator:
        """This rank's share of one global batch after another, from where the run stands. `rows`
        are `data.Encoded`. Rows that cannot be used are left out, counted and named. `held_out`
        rows begin with the first one and do not count as progress."""
        before = self.progress.setdefault("batch_size", batch_size)
        if not held_out and before != batch_size:
            raise UserError(
                f"--resume: a step had {before} rows over all ranks and would now have "
                f"{batch_size}; give the flags that set this as {self.path}/run.json has them "
                f"(batch sizes, accumulation, in RLVR also --algorithm and --gen_batch_factor), "
                f"and as many ranks as before if they are per rank"
            )
        count = self.progress.setdefault("rows", len(rows))
        if not held_out and count != len(rows):
            say(
                f"--resume: the data had {count} rows and has {len(rows)}; some may come twice or "
                f"never"
            )
            self.progress["rows"] = len(rows)
        return self._batches(rows, batch_size, total, held_out)

    def _batches(self, rows, batch_size, total, held_out) -> Iterator[list]:
        start, share = 0 if held_out else self.progress["position"], (rank(), world_size())
        workers = 0 if held_out else self.config.dataloader_num_workers
        most = len(rows) + (self.drawn if held_out else 0)
        timeout = 60 * self.config.timeout
        for items in batches(
            rows,
            batch_size,
            seed=self.config.seed,
            start=start,
            total=total,
            share=share,
            workers=workers,
            timeout=timeout,
        ):
            self.progress["position"] += 0 if held_out else batch_size
            self.drawn = min(self.drawn + len(items), most)
            used = []
            for where, item in items:
                if isinstance(item, RowError):
                    self._leave_out(where, item, most)
                else:
                    self.rows.append(where)
                    used.append(item)
            yield used

    def _leave_out(self, where: str, error: RowError, rows: int) -> None:
        self.left_out += 1
        bad = not isinstance(error, Unfit)
        line = {"step": self.step, "row": where, "why": str(error), "bad": bad}
        self._append("left_out.jsonl", line)
        if self.left_out <= 3:
            more = "; further ones are named in left_out.jsonl only" if self.left_out == 3 else ""
            say(f"{where}: left out, {error}{more}")
        self.bad |= {where} if bad else set()
        most = max(min(3, rows) - 1, self.config.max_bad_fraction * self.drawn)
        if bad and len(self.bad) > most:
            raise UserError(
                f"{len(self.bad)} of {self.drawn} rows are bad, over --max_bad_fraction "
                f"{self.config.max_bad_fraction} (counted on rank {rank()}); the last is {where}: "
                f"{error}; mend the rows that {self.path}/left_out.jsonl names, or raise the flag, "
                f"then go on with --resume"
            )

    # ----------------------------------------------------------------------------------------------
    # Steps

    def steps(self, max_steps: int, modules: dict, save: Callable) -> Iterator[int]:
        """The steps that are still to do, counted from 1. Loads the checkpoint that the run goes
        on from, saves one every `save_steps` and before a signal ends the run, and the result at
        the end. `modules` are name -> (module, optimiser); `save(path)` writes the Hugging Face
        directory."""
        if "policy" in modules:
            self.check_start(modules["policy"][0])
        self._start()
        save = self._measured(save, modules)
        if self.step:
            self.checkpoints.load(self.step, modules)
        disabled, done = rank() != 0, min(self.step, max_steps)
        self.bar = tqdm(total=max_steps, initial=done, desc=self.config.stage, disable=disabled)
        for step in range(self.step + 1, max_steps + 1):
            self.step = step
            self.note()
            # Dropout draws from (seed, step, rank): other masks on every rank, and a resumed run
            # draws what it would have drawn.
            torch.manual_seed(keyed(self.config.seed, step) * 4096 + rank())
            yield step
            self.bar.update()
            self.checkpoints.check()
            stopping = self._agree_to_stop()
            if step < max_steps:
                self._save_if_due(step, modules, save, stopping)
        self.bar.close()
        self.checkpoints.wait()
        self._save_result(modules, save)

    def check_start(self, policy) -> None:
        """UserError where a run goes on with other weights than it started from. A checkpoint of
        adapters does not hold those weights, and none holds the reference policy, or the policy
        whose responses the warm-up judges."""
        mine = checksum_of(policy)
        if self.progress.setdefault("start", mine) != mine:
            raise UserError(
                f"--resume: the run in {self.path} started from other weights than "
                f"{policy.source.path} holds; give the model or --policy that run.json names, with "
                f"the weights that it had, or name another --output_dir"
            )

    def _measured(self, save: Callable, modules: dict) -> Callable:
        """`save`, which also says what the weights would lose in the type that servers compute in.
        The weights are at their start when this is called."""
        start = {name: starting_weights(module) for name, (module, _) in modules.items()}

        def save_and_measure(path: str) -> None:
            save(path)
            for name, (module, _) in modules.items():
                share, dtype = rounding_loss(module, start[name]), str(module.source.dtype)
                if share is not None:
                    self.rounding_loss[name] = share
                    say(
                        f"the {name} is saved in float32, as {dtype.removeprefix('torch.')} would "
                        f"round away {share:.0%} of this run's update (by norm); see docs/gpus.md"
                    )

        return save_and_measure

    def _agree_to_stop(self) -> int:
        """The signal that any rank got, so that all ranks stop after the same step; 0 for none."""
        return int(all_max([self.asked])[0])

    def _save_if_due(self, step: int, modules: dict, save: Callable, stopping: int) -> None:
        config = self.config
        hf = config.save_hf_steps > 0 and step % config.save_hf_steps == 0
        due = step % config.save_steps == 0 or hf
        # After a skipped step the weights may be bad: the checkpoint before is the better one.
        due = due and not self.progress["skipped_in_a_row"]
        if stopping or due:
            self.checkpoints.save(step, modules, self.progress, save if hf else None)
        if stopping:
            self.checkpoints.wait()
            self.bar.close()
            code = 0 if stopping == signal.SIGTERM else 130
            where = self.checkpoints.folder(step)
            raise Ended(f"stopped by a signal; saved {where}, go on with --resume", code)

    def _save_result(self, modules: dict, save: Callable) -> None:
        if not self.progress["rows_used"]:
            raise UserError(
                f"not one row could be used, so nothing was learned and nothing is saved "
                f"({counted(self.progress['skipped'], 'step')} skipped); mend what left_out.jsonl "
                f"and skipped.jsonl in {self.path} name, then start with another --output_dir"
            )
        check_weights(modules, self.step)
        beside = os.path.join(self.path, "result.incomplete")
        with all_or_nothing(beside):
            save(beside)
            if rank() == 0:
                force(beside, files_below(beside))
                # The weights come last: without them, what a kill has left does not open.
                for name in sorted(os.listdir(beside), key=lambda n: n.endswith(".safetensors")):
                    final = os.path.join(self.path, name)
                    shutil.rmtree(final, ignore_errors=True)  # a folder of a run that was killed
                    os.replace(os.path.join(beside, name), final)
                os.rmdir(beside)
        say(f"saved {self.path}")

    def finish(self) -> None:
        """Marks the run as finished, once all that belongs to it is written."""
        barrier()
        if rank() == 0:
            force(self.path, self._logs())
            end = {"rounding_loss": self.rounding_loss, "finished": self.step}
            write_json(os.path.join(self.path, "run.json"), self.record | end)

    @contextlib.contextmanager
    def phase(self, name: str):
        """Seconds spent inside go to the step's metrics as time/<name>. Ranks begin it together, so
        that a lost rank is named."""
        start = time.perf_counter()
        barrier()
        yield
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    # ----------------------------------------------------------------------------------------------
    # Log

    def log(self, step: int, metrics: dict, grad_norms=(), tokens: int | None = None) -> dict:
        """Writes one line of metrics and returns it. `metrics` are Mean, Sum, Max, Min, or values
        that are the same on all ranks. `grad_norms` are the norms of this step's gradients: one
        that is not finite makes the step count as skipped. `tokens` are this rank's."""
        metrics = metrics | {"rows_left_out": Sum(self.left_out), "rows": Sum(len(self.rows))}
        if tokens is not None:
            metrics |= {"tokens": Sum(tokens)}
        line = {"step": step} | across_ranks(metrics | {"peak_memory_gb": Max(self._peak())})
        self._count_skipped(step, line, grad_norms)
        now = time.perf_counter()
        line["time/step"] = now - self.last
        line |= {f"time/{name}": seconds for name, seconds in self.seconds.items()}
        if tokens is not None:
            line["tokens_per_second"] = line["tokens"] / line["time/step"]
        self.last, self.seconds, self.rows = now, {}, []
        line = finite(line)
        if rank() == 0:
            self._append("metrics.jsonl", line)
            if self.writer:
                self.writer({k: v for k, v in line.items() if isinstance(v, (int, float))}, step)
            shown = ("loss", "reward", "accuracy", "format_valid", "discriminator_loss")
            shown = {k: f"{line[k]:.3f}" for k in shown if line.get(k) is not None}
            self.bar.set_postfix(shown)
        return line

    def _peak(self) -> float:
        """The most memory that this process has had, in GiB: the GPU's where there is one."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated() / 2**30
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 2**30

    def _count_skipped(self, step: int, line: dict, grad_norms) -> None:
        """Counts a step with a gradient that is not finite as skipped, names its rows, and ends the
        run after --max_skipped in a row. A step with a zero gradient, for example one where no
        rollout is valid, neither extends nor resets the streak of skipped steps."""
        skipped, count = not all(map(math.isfinite, grad_norms)), self.progress
        count["skipped"] += skipped
        line["steps_skipped"] = count["skipped"]
        if not skipped:
            count["rows_used"] += line["rows"]
            count["skipped_in_a_row"] = count["skipped_in_a_row"] if 0.0 in grad_norms else 0
            return
        count["skipped_in_a_row"] += 1
        self._append("skipped.jsonl", {"step": step, "rank": rank(), "rows": self.rows})
        say(f"step {step}: skipped, its gradient is not finite; its rows are in skipped.jsonl")
        if count["skipped_in_a_row"] >= self.config.max_skipped:
            raise UserError(
                f"{counted(self.config.max_skipped, 'step')} in a row up to step {step} "
                f"(--max_skipped) had a gradient that is not finite: the weights or the data hold "
                f"NaN or infinity, or --learning_rate is too high; mend the cause, then go on with "
                f"--resume"
            )

    def look_at_format(self, step: int, share: float | None) -> None:
        """Tells the user after ten steps, and at the end, where no rollout has had the format: such
        a run looks like any other, and learns nothing. `share` is that of a step's rollouts that
        have it, None where the step has no rollouts."""
        if share is None:
            return
        self.progress["any_valid"] |= bool(share)
        last = self.bar.total
        if self.progress["any_valid"] or step not in (min(10, last), last):
            return
        rollouts = f"{self.path}/rollouts.jsonl"
        there = f"read {rollouts}, then " if hasattr(self.config, "num_generations") else ""
        say(
            f"step {step}: not one response so far has the format <caption>, <think>, <answer>, "
            f"without which a response earns no score and no reward; {there}start from a policy "
            f"that SFT has taught the format, or raise --max_completion_length"
        )

    def log_rollouts(self, step: int, example, texts: list[str], **columns) -> None:
        """Writes the rollouts of one prompt, with a value of each column for each of them;
        null where that is NaN, as a view that was not scored."""
        if rank() != 0:
            return
        users = (m for m in example.messages if m["role"] == "user")
        parts = (part for message in users for part in message["content"])
        images = [x if isinstance(x, str) else f"{len(x)} bytes" for x in example.images]
        shared = {
            "row": example.where,
            "question": "".join(part.get("text", "<image>") for part in parts),
            "images": images,
            "answer": example.answer,
            "supervision": example.response,
        }
        lines = []
        for i, text in enumerate(texts):
            own = {name: float(column[i]) for name, column in columns.items()}
            lines.append(finite({"step": step, **shared, "response": text, **own}))
        self._append("rollouts.jsonl", *lines)

    def _append(self, name: str, *lines: dict) -> None:
        with open(os.path.join(self.path, name), "a") as file:
            file.write("".join(json.dumps(line) + "\n" for line in lines))

    # ----------------------------------------------------------------------------------------------
    # Directory

    def _holds(self) -> set[str]:
        """What lies in the directory, except for the lock and the ranks' notes."""
        return set(os.listdir(self.path)) - {"ranks"} if os.path.isdir(self.path) else set()

    def _before(self) -> dict:
        """run.json of the run that this one goes on with; UserError where it was another's."""
        name = os.path.join(self.path, "run.json")
        if not os.path.exists(name):
            if self.found:
                raise UserError(
                    f"--resume: {self.path} has no run.json; name the --output_dir of a run"
                )
            return {}
        source = "model" if hasattr(self.config, "model") else "ckpt"
        mine = {"stage": self.config.stage, source: getattr(self.config, source)}
        mine["lora_rank"] = self.config.lora_rank
        try:
            with open(name) as file:
                before = json.load(file)
            theirs = {"stage": before["stage"], source: before["run"].get(source)}
            theirs["lora_rank"] = before["run"].get("lora_rank", 0)
        except (ValueError, TypeError, KeyError, AttributeError):
            raise UserError(f"--resume: {name} is damaged; name another directory") from None
        for name in mine:
            if mine[name] != theirs[name]:
                said = f"its {name} is {theirs[name]}, not {mine[name]}"
                raise UserError(
                    f"--resume: {self.path} is another run: {said}; run it as before, or name "
                    f"another --output_dir"
                )
        return before

    def _end_again(self, before: dict) -> None:
        """Raises Ended, as the run has finished; UserError where it is asked for further steps."""
        config, earlier, finished = self.config, before["run"], before["finished"]
        name, more = "max_steps", config.max_steps > finished
        if config.max_steps <= 0:  # the epochs count
            name = "num_train_epochs"
            more = earlier["max_steps"] > 0 or config.num_train_epochs > earlier[name]
        if not more:
            raise Ended(f"{self.path}: finished at step {finished}; nothing to do", 0)
        result = f"--{'model' if hasattr(config, 'model') else 'ckpt'} {self.path}"
        if hasattr(config, "discriminator"):
            result += f" --discriminator {self.path}/discriminator"
        raise UserError(
            f"--{name} {getattr(config, name)}: the run in {self.path} has finished at step "
            f"{finished}, and so has its learning-rate schedule; to train further, start from its "
            f"result: {result} --output_dir ANOTHER"
        )

    def _start(self) -> None:
        """Locks the directory, writes run.json and opens the logs. All that can go wrong at the
        start has gone well by then, so a wrong flag leaves nothing behind."""
        if dist.is_initialized():
            limit = datetime.timedelta(minutes=self.config.timeout)
            self.checkpoints.group = dist.new_group(backend="gloo", timeout=limit)
        barrier()  # every rank has looked into the directory before rank 0 writes
        if rank() == 0:
            self._lock()
            for name in set(os.listdir(os.path.join(self.path, "ranks"))) - {"lock"}:
                os.remove(os.path.join(self.path, "ranks", name))
            for name in self.found:
                if name.endswith((".incomplete", REMOVED)):
                    shutil.rmtree(os.path.join(self.path, name))
            for name in self._logs():
                self._cut(name)
            self.record = {
                "stage": self.config.stage,
                "command": shlex.join(sys.argv),
                "commit": _commit(),
                "run": dataclasses.asdict(self.config),
            }
            self._say_what_changed(self.record["run"])
            self.writer = writer_to(self.config.report_to, self.path, self.record["run"])
            write_json(os.path.join(self.path, "run.json"), self.record)
        barrier()  # rank 0 has cut the files
        if "left_out.jsonl" in self._logs():
            with open(os.path.join(self.path, "left_out.jsonl")) as file:
                before = [json.loads(line) for line in file]
            self.left_out = len(before) if rank() == 0 else 0
            self.bad = {line["row"] for line in before if line.get("bad")}
        barrier()  # no rank logs a row before all have read
        self.started = True

    def _lock(self) -> None:
        os.makedirs(os.path.join(self.path, "ranks"), exist_ok=True)
        # The lock goes with the process, however it ends, and is not its children's.
        self.lock = open(os.path.join(self.path, "ranks", "lock"), "w")  # noqa: SIM115
        try:
            fcntl.lockf(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in UNSUPPORTED:
                raise UserError(
                    f"--output_dir {self.path}: another run is writing there; name another, or "
                    "wait for its end (ranks may go on when their launcher was killed)"
                ) from None
            say(
                f"--output_dir {self.path}: its file system has no locks ({error.strerror}), so a "
                f"second run there would not be noticed; start one at a time"
            )
        if self._holds() != self.found:
            raise UserError(f"--output_dir {self.path}: another run just wrote there; name another")

    def _say_what_changed(self, fields: dict) -> None:
        name = os.path.join(self.path, "run.json")
        if not self.step or not os.path.exists(name):
            return
        with open(name) as file:
            before = json.load(file).get("run", {})
        other = [k for k, v in fields.items() if before.get(k) != v and k != "resume"]
        changed = [f"{k}: {before.get(k)} -> {fields[k]}" for k in other]
        if changed:
            say("resumed with other settings:", ", ".join(changed))

    def _logs(self) -> list[str]:
        names = ("metrics.jsonl", "rollouts.jsonl", "skipped.jsonl", "left_out.jsonl")
        return [name for name in names if os.path.exists(os.path.join(self.path, name))]

    def _cut(self, name: str) -> None:
        """Drops what a killed run had logged after the checkpoint that this run goes on from, and
        lines that are no JSON."""
        path = os.path.join(self.path, name)
        with open(path, errors="replace") as file, replacing(path) as new:
            for line in file:
                try:
                    done = json.loads(line)["step"] <= self.step
                except (ValueError, TypeError, KeyError, RecursionError):
                    done = False
                new.write(line.rstrip("\n") + "\n" if done else "")

    def note(self, *more) -> None:
        """Writes this rank's step and process id, for the other ranks, should this one be lost."""
        path = os.path.join(self.path, "ranks", str(rank()))
        with open(path + ".new", "w") as file:
            print(self.step, os.uname().nodename, os.getpid(), *more, file=file)
        os.replace(path + ".new", path)


def _commit() -> str | None:
    """The commit of this code, where git knows it."""
    folder = os.path.dirname(os.path.abspath(__file__))
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        words = ["git", "-C", folder, "describe", "--always", "--dirty", "--exclude=*"]
        done = subprocess.run(words, capture_output=True, text=True, timeout=10)
        return done.stdout.strip() or None
    return None
