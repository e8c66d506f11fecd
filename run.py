"""A run: its flags, its directory, its log, its checkpoints. What all stages do alike around their
loops.

    output_dir/run.json            every field of the stage's dataclass as it ran; `finished`, the
                                   last step, once the result is whole
    output_dir/metrics.jsonl       one line a step, over all ranks; null where nothing was measured
    output_dir/rollouts.jsonl      the rollouts of one prompt a step, with all their scores
    output_dir/left_out.jsonl      every row that was left out, by any rank, and why
    output_dir/skipped.jsonl       every step whose gradient was not finite, and its rows
    output_dir/checkpoint-N/       in `state/` what resuming needs: weights, or adapters only, and
                                   the moments of the optimiser (torch.distributed.checkpoint,
                                   sharded as the run was); every `save_hf_steps` a Hugging Face
                                   directory as well
    output_dir/                    at the end, the Hugging Face directory of the result

A killed run goes on with --resume and gives what it would have given: on a CPU to the last bit, on
a GPU as nearly as two equal runs do. Whatever is written is written beside and renamed, so a kill
leaves the old or the new, never a half. State is written while training goes on, from a copy in the
CPU's memory.
"""

import contextlib
import dataclasses
import datetime
import fcntl
import json
import math
import os
import re
import resource
import shutil
import signal
import sys
import time
import warnings
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from typing import Annotated, Literal, get_args, get_type_hints

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from huggingface_hub import HfApi, snapshot_download
from torch.distributed.checkpoint.api import CheckpointException
from tqdm import tqdm
from transformers import HfArgumentParser
from transformers.utils import logging

import digits
import fit
import verifier
from data import Encoded, batches
from model import all_max, all_sum, barrier, join_ranks, rank, world_size
from rows import Example, RowError, Unfit, UserError

# --------------------------------------------------------------------------------------------------
# Flags

# The types of flags, with the smallest and the largest value that they may have.
Count = Annotated[int, 1, math.inf]
Natural = Annotated[int, 0, math.inf]
Positive = Annotated[float, 1e-9, 1e9]  # so that it and what is divided by it stay finite
Weight = Annotated[float, 0.0, sys.float_info.max]
Share = Annotated[float, 0.0, 1.0]
# Of the learning rate: transformers' schedules that a peak, a warm-up and a length determine.
Schedule = Literal[
    "constant",
    "constant_with_warmup",
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "inverse_sqrt",
]
Minutes = Annotated[float, 1e-9, 1e6]
Seed = Annotated[int, 0, 2**32 - 1]


@dataclasses.dataclass
class RunConfig:
    """The flags that every stage has. A stage's own dataclass adds its hyperparameters."""

    output_dir: str = "out/run"
    image_dir: str | None = None  # where images may lie besides the data's own folder
    max_pixels: Count | None = None  # of an image; None: as many as its processor allows
    max_bad_fraction: Share = 0.01  # of the rows drawn; more that cannot be used end the run
    max_tokens_per_pack: Count = 16384  # how a batch is cut; changes (8) and dropout's masks only
    activation_checkpointing: bool | None = None  # recompute to save memory; None: on a GPU
    freeze_vision: bool = False  # the vision tower of all that learns stays as it is
    lora_rank: Natural = 0  # of adapters, by peft, which learn in the policy's place; 0: none
    hsdp: bool = False  # parameters are shared by the GPUs of a node, and every node has all
    dry_run: Natural = 0  # prints the bytes a GPU of this run on so many GPUs, and ends
    dataloader_num_workers: Natural = 1  # processes that encode rows ahead
    save_steps: Count = 100  # what resuming needs: 12 bytes a parameter
    save_hf_steps: Natural = 0  # a Hugging Face directory as well; 0: only at the end
    save_total_limit: Count = 2  # checkpoints that are kept
    timeout: Minutes = 30.0  # minutes that a rank waits for another
    max_skipped: Count = 5  # steps in a row without a finite gradient that end the run
    report_to: Literal["none", "tensorboard", "wandb"] = "none"
    seed: Seed = 0
    resume: bool = False


def parse(config_class):
    """The command line -> the stage's dataclass.

    With neither a model nor `--data`, or with `--data digits`, the stage runs on the embedded
    world. A model without `--data` takes the published data. The settings of the embedded world
    are taken for its own model on its own data only; flags that are given always count."""
    logging.set_verbosity_error()
    warnings.filterwarnings("ignore", "torch.distributed is disabled")  # one process saves alone
    logging.disable_progress_bar()  # loading and writing weights; a stage has its own bar
    about = " ".join((sys.modules["__main__"].__doc__ or "").strip().split("\n\n")[0].split())
    parser = HfArgumentParser(config_class, description=about, allow_abbrev=False)
    parser.error = _refuse
    config, unknown = parser.parse_args_into_dataclasses(return_remaining_strings=True)
    if unknown:
        raise UserError(f"{' '.join(unknown)}: no such flag; --help lists them")
    check_ranges(config)
    if os.path.isfile(getattr(config, "system_prompt", None) or ""):
        try:
            with open(config.system_prompt, encoding="utf-8") as file:
                config.system_prompt = file.read().strip()
        except UnicodeDecodeError:
            raise UserError(f"--system_prompt {config.system_prompt}: no text in UTF-8") from None
    given = {arg.split("=")[0][2:].replace("-", "_") for arg in sys.argv[1:] if arg[:2] == "--"}
    stage = config_class.__name__.removesuffix("Config").lower()
    if stage == "discriminator" and config.lora_rank:
        raise UserError("--lora_rank: a discriminator learns as a whole; only policies have it")
    if config.dry_run:
        if rank() == 0:
            print(fit.table(config, stage))
        raise Ended("a dry run: nothing was read but configurations, and nothing written", 0)
    if config.data == ["digits"] or not given & {"model", "ckpt", "data"}:
        say(digits.settle(config, stage, given))
    if rank() == 0:
        for name in ("model", "ckpt", "policy", "discriminator", "data"):
            value = getattr(config, name, None) or []
            for source in [value] if isinstance(value, str) else value:
                announce(name, source)
    return config


def _refuse(message: str) -> None:
    raise UserError(f"{message}; --help lists the flags")


def check_ranges(config) -> None:
    """UserError for a number outside the range that its type gives."""
    for name, hint in get_type_hints(type(config), include_extras=True).items():
        value = getattr(config, name)
        for kind in (hint, *get_args(hint)):  # Count, or Count | None
            low, high = getattr(kind, "__metadata__", (-math.inf, math.inf))
            if value is not None and hasattr(kind, "__metadata__") and not low <= value <= high:
                most = "" if high >= sys.float_info.max else f" and at most {high:.10g}"
                raise UserError(f"--{name} {value}: must be at least {low:g}{most}")


def announce(name: str, source: str) -> None:
    """Says what will be read from the hub and how large it is, before anything is downloaded.
    UserError where it is neither on this machine nor within reach."""
    repo = re.match(r"(?:hf://datasets/)?([\w.-]+/[\w.-]+)(?:/(.+))?$", source)
    local = os.path.exists(source) or source.endswith((".jsonl", ".json", ".parquet", ".arrow"))
    if not repo or (local and not source.startswith("hf://")):
        return
    kind = "dataset" if name == "data" else "model"
    try:
        info = HfApi().repo_info(repo[1], repo_type=kind, files_metadata=True)
        alone = repo[2] if (repo[2] or "").endswith(".parquet") else None
        sizes = [f.size or 0 for f in info.siblings if alone in (None, f.rfilename)]
        say(f"--{name}: reads {source} from the hub, {sum(sizes) / 1e9:.2f} GB")
    except Exception as error:
        try:
            snapshot_download(repo[1], repo_type=kind, local_files_only=True)
            say(f"--{name}: reads {source} from the hub's cache on this machine")
        except Exception:
            raise UserError(
                f"--{name} {source}: not on this machine, and the hub does not give it "
                f"({type(error).__name__}); fetch it elsewhere (hf download {repo[1]} --repo-type "
                f"{kind}) and give the local copy: --{name} PATH"
            ) from None


class Ended(Exception):
    """The run ends here, by a signal or because it had finished before. (words, exit code)."""


def main(stage: Callable) -> None:
    """Runs `stage()`. What the user can mend, a full disk and a rank that is gone end in one line
    (exit code 2; 1 for the rank), and the other ranks are not waited for."""
    code = 0
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until there is a run, Ctrl-C ends at once
    try:
        stage()
        if Run.current:
            Run.current.finish()
    except Ended as end:
        say(end.args[0])
        code = end.args[1]
    except UserError as error:
        _die(str(error), 2)
    except OSError as error:
        # A file of the run; or: no space, quota, read-only, permission, a broken disk, no folder, a
        # name too long.
        own = Run.current and str(error.filename).startswith(Run.current.path)
        if not own and error.errno not in (28, 122, 30, 13, 5, 20, 36):
            _crash()
        where = error.filename or (Run.current.path if Run.current else "")
        again = "go on with --resume" if Run.current else "start again"
        _die(f"{where}: {error.strerror}; {again} once that is mended", 2)
    except RuntimeError as error:
        if not _of_another_rank(error):
            _crash()
        lost = Run.current.lagging() if Run.current else "a rank is gone"
        _die(f"{lost} ({str(error).splitlines()[0][:120]}); go on with --resume", 1)
    except Exception:
        _crash()
    if not dist.is_initialized():
        sys.exit(code)
    with contextlib.suppress(RuntimeError):  # where a rank is gone, that one has said why
        dist.barrier()  # a thread of the last collective may still hold tensors
        dist.destroy_process_group()
    if "wandb" in sys.modules:
        sys.modules["wandb"].finish()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # the interpreter's own end may abort on threads that collectives have left


def _of_another_rank(error: BaseException) -> bool:
    """Whether ranks could not meet, or a collective has failed, because one is gone or stuck."""
    said = r"gloo|NCCL|[Tt]imed out|wait timeout|peer"
    return "RANK" in os.environ and bool(re.search(said, str(error)))


def _die(message: str, code: int) -> None:
    if _speaks_first():
        tqdm.write(f"error: {' '.join(message.split())}", file=sys.stderr)
    sys.stderr.flush()
    if code == 2 and Run.current and Run.current.saving:
        wait_for([Run.current.saving])  # a checkpoint from before the error
    os._exit(code) if dist.is_initialized() else sys.exit(code)  # others wait in a collective


def _crash() -> None:
    """A traceback and the end, at once: the interpreter's own end would wait for the loader's
    workers, which no signal ends, and other ranks would wait for this one."""
    sys.excepthook(*sys.exc_info())
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)


def start_verifier() -> None:
    """A broken math-verify is an error at the start, not wrong rewards later."""
    try:
        verifier.start()
    except RuntimeError as error:
        raise UserError(f"{error}; pip install math-verify") from None


def _speaks_first() -> bool:
    """Whether no other rank has said why the run ends. It is said once."""
    run = Run.current
    if run and run.started and world_size() > 1:
        try:
            os.close(os.open(os.path.join(run.path, "ranks", "ended"), os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return False
        except OSError:
            pass
    elif os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":  # torchrun's, on node 0
        try:
            at = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
            store = dist.TCPStore(*at, timeout=datetime.timedelta(seconds=10))
            return store.add(f"ended/{os.environ['TORCHELASTIC_RESTART_COUNT']}", 1) == 1
        except RuntimeError:
            pass
    return True


@contextlib.contextmanager
def replacing(path: str):
    """A new file for `path`: written beside, forced to the disk, renamed; removed where it cannot
    be finished."""
    try:
        with open(path + ".new", "w") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(path + ".new", path)
    except OSError as error:
        with contextlib.suppress(OSError):
            os.remove(path + ".new")
        raise OSError(error.errno, error.strerror, path) from None


def write_json(path: str, content) -> None:
    with replacing(path) as file:
        json.dump(content, file, indent=1)


def say(*words) -> None:
    """A line for the user, from rank 0, above the progress bar."""
    if rank() == 0:
        tqdm.write(" ".join(str(word) for word in words), file=sys.stderr)


# --------------------------------------------------------------------------------------------------
# Metrics


def add(means: dict, more: dict) -> dict:
    """Sums metrics (sum, count) of two parts of a step, name by name."""
    names = [*means, *(name for name in more if name not in means)]
    both = {n: (means.get(n, (0.0, 0.0)), more.get(n, (0.0, 0.0))) for n in names}
    return {n: (float(a[0] + b[0]), float(a[1] + b[1])) for n, (a, b) in both.items()}


def finite(line: dict) -> dict:
    """null where a number is none, as JSON has it."""
    none = [k for k, v in line.items() if isinstance(v, float) and not math.isfinite(v)]
    return line | dict.fromkeys(none)


class Run:
    """A stage's run. Made first, so that a directory that is in use is noticed before any work."""

    current = None  # the run of this process, for messages

    def __init__(self, config_class):
        self.config = config = parse(config_class)
        self.device = join_ranks(datetime.timedelta(minutes=config.timeout))
        if config.activation_checkpointing is None:
            config.activation_checkpointing = self.device.type == "cuda"
        Run.current = self
        self.stage = config_class.__name__.removesuffix("Config").lower()
        self.path = config.output_dir or "."
        self.seconds: dict[str, float] = {}
        self.last = time.perf_counter()
        self.bar = self.writer = self.lock = self.group = None
        self.saver, self.saving = ThreadPoolExecutor(1), None  # one save at a time, and its future
        self.left_out, self.bad = 0, set()
        self.rows: list[str] = []  # where the rows of this step come from
        self.asked = self.stopping = 0  # the signal that this rank got, and that all know of
        self.started = False
        self.found = self._holds()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._ask_to_stop)
        if os.path.isfile(self.path):
            raise UserError(f"--output_dir {self.path} is a file; name a directory")
        if self.found and not config.resume:
            raise UserError(
                f"--output_dir {self.path} is not empty; pass --resume to go on there, or name "
                f"another"
            )
        before = self._before() if config.resume else {}
        if before.get("finished"):
            raise Ended(f"{self.path}: finished at step {before['finished']}; nothing to do", 0)
        self.step = self._newest() if config.resume else 0  # the last that is done
        self.checkpoint = os.path.join(self.path, f"checkpoint-{self.step}") if self.step else None
        # What a checkpoint keeps besides tensors. `position`: how many rows all ranks have drawn.
        self.progress = {"position": 0, "skipped": 0, "skipped_in_a_row": 0, "rows_used": 0}
        if self.checkpoint:
            with open(os.path.join(self.checkpoint, "state", "progress.json")) as file:
                self.progress |= json.load(file)
        elif config.resume:
            say(f"--resume: no checkpoint in {self.path}, starting from step 1")
        self.drawn = self.progress["position"]  # that this rank knows of, none of them twice

    def _ask_to_stop(self, number: int, frame) -> None:
        """Schedulers and torchrun send SIGTERM more than once; a second Ctrl-C is meant at once."""
        self.asked = number
        if number == signal.SIGINT:
            signal.signal(number, signal.SIG_DFL)
            say("stopping behind this step, which is saved; once more stops at once, unsaved")

    def _holds(self) -> set[str]:
        """What lies in the directory, but for the lock and the ranks' notes."""
        return set(os.listdir(self.path)) - {"ranks"} if os.path.isdir(self.path) else set()

    def _before(self) -> dict:
        """run.json of the run that this one goes on with; UserError where it was another's."""
        name = os.path.join(self.path, "run.json")
        if not os.path.exists(name):
            if self.found:
                raise UserError(f"--resume: {self.path} is no run's directory, no run.json in it")
            return {}
        source = "model" if hasattr(self.config, "model") else "ckpt"
        mine = {"stage": self.stage, source: getattr(self.config, source)}
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
                raise UserError(f"--resume: {self.path} belongs to another run: {said}")
        return before

    def _checkpoints(self) -> list[int]:
        names = os.listdir(self.path) if os.path.isdir(self.path) else []
        return [int(n[11:]) for n in names if n.startswith("checkpoint-") and n[11:].isdigit()]

    def _newest(self) -> int:
        """The step of the newest checkpoint that is whole, by its checksums; 0 for none."""
        for step in sorted(self._checkpoints(), reverse=True):
            path = os.path.join(self.path, f"checkpoint-{step}")
            if not all_max([not _is_whole(path)])[0]:
                return step
            say(f"{path} is damaged; taking the one before")
        return 0

    def _note(self, *more) -> None:
        """Leaves a word for the other ranks, should this one be lost: its step and process."""
        path = os.path.join(self.path, "ranks", str(rank()))
        with open(path + ".new", "w") as file:
            print(self.step, os.uname().nodename, os.getpid(), *more, file=file)
        os.replace(path + ".new", path)

    def lagging(self) -> str:
        """The rank that the others wait for, by the notes: none that waits itself; rather one
        whose process is gone or stopped; among those, the one with the fewest steps."""
        if not self.started:
            return "a rank is gone"
        self._note("waits")
        time.sleep(3)  # the others notice at about the same time
        notes = {}
        for number in range(world_size()):
            try:
                with open(os.path.join(self.path, "ranks", str(number))) as file:
                    step, node, pid, *waits = file.read().split()
            except FileNotFoundError:
                step, node, pid, waits = 0, "", 0, []
            gone = node == os.uname().nodename and not _runs(pid)
            notes[number] = bool(waits), not gone, int(step)
        slow = min(notes, key=notes.get)
        return f"rank {slow} is gone or stuck, last heard of at step {notes[slow][2]}"

    # ----------------------------------------------------------------------------------------------
    # Rows

    def batches(self, examples, processor, encode, batch_size: int, total=None, held_out=False):
        """This rank's share of one global batch after another: `encode(example, prompt)` of each
        row, from where the run stands (`held_out`: from the first row, and not counted). Rows
        that cannot be used are left out, counted and named."""
        before = self.progress.setdefault("batch_size", batch_size)
        if not held_out and before != batch_size:
            raise UserError(
                f"--resume: a step had {before} rows over all ranks and would now have "
                f"{batch_size}; set the batch size or the number of ranks so that they agree"
            )
        rows = self.progress.setdefault("rows", len(examples))
        if not held_out and rows != len(examples):
            say(f"--resume: the data had {rows} rows and has {len(examples)}; some may come twice")
            self.progress["rows"] = len(examples)
        return self._batches(examples, processor, encode, batch_size, total, held_out)

    def _batches(self, examples, processor, encode, batch_size, total, held_out) -> Iterator[list]:
        limits = ("max_prompt_length", "max_image_size", "max_pixels")
        limits = {name: getattr(self.config, name, None) for name in limits}
        encoded = Encoded(examples, processor, encode, **limits)
        start, share = 0 if held_out else self.progress["position"], (rank(), world_size())
        workers = 0 if held_out else self.config.dataloader_num_workers
        rows = len(examples) + (self.drawn if held_out else 0)
        # What encodes rows ahead ends with this process, not by signals to the whole job.
        held = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
        stream = batches(encoded, batch_size, self.config.seed, start, total, share, workers)
        signal.pthread_sigmask(signal.SIG_SETMASK, held)
        for items in stream:
            self.progress["position"] += 0 if held_out else batch_size
            self.drawn = min(self.drawn + len(items), rows)
            for where, error in items:
                if isinstance(error, RowError):
                    self._leave_out(where, error, rows)
            used = [(where, item) for where, item in items if not isinstance(item, RowError)]
            self.rows += [where for where, _ in used]
            yield [item for _, item in used]

    def _leave_out(self, where: str, error: RowError, rows: int) -> None:
        self.left_out += 1
        bad = not isinstance(error, Unfit)
        line = {"step": self.step, "row": where, "why": str(error), "bad": bad}
        self._append("left_out.jsonl", line)
        if self.left_out <= 3:
            more = "; more of them go to left_out.jsonl only" if self.left_out == 3 else ""
            say(f"{where}: left out, {error}{more}")
        self.bad |= {where} if bad else set()
        most = max(min(3, rows) - 1, self.config.max_bad_fraction * self.drawn)
        if bad and len(self.bad) > most:
            raise UserError(
                f"{len(self.bad)} bad rows among the first {self.drawn} are more than "
                f"--max_bad_fraction {self.config.max_bad_fraction}; {where}: {error}"
            )

    def _append(self, name: str, *lines: dict) -> None:
        with open(os.path.join(self.path, name), "a") as file:
            file.write("".join(json.dumps(line) + "\n" for line in lines))

    # ----------------------------------------------------------------------------------------------
    # Steps, log

    def steps(self, max_steps: int, modules: dict, save: Callable) -> Iterator[int]:
        """The steps that are still to do, counted from 1. Loads the checkpoint that the run goes
        on from, saves one every `save_steps` and before a signal ends the run, and the result at
        the end. `modules` are name -> (module, optimiser); `save(path)` writes the Hugging Face
        directory."""
        save_hf_steps = self.config.save_hf_steps or math.inf
        self._start()
        self._load(modules)
        show = dict(desc=self.stage, disable=rank() != 0)
        self.bar = tqdm(total=max_steps, initial=min(self.step, max_steps), **show)
        for step in range(self.step + 1, max_steps + 1):
            self.step = step
            self._note()
            # Dropout draws from (seed, step, rank): other masks on every rank, and a resumed run
            # draws what it would have drawn.
            torch.manual_seed((self.config.seed * 1_000_003 + step) * 4096 + rank())
            yield step
            self.bar.update()
            if self.saving and self.saving.done():
                self._end_save()  # raises what went wrong
            hf = step % save_hf_steps == 0
            due = step % self.config.save_steps == 0 or hf
            due = due and not self.progress["skipped_in_a_row"]
            if step < max_steps and (self.stopping or due):
                self._save(step, modules, save if hf else None)
            if step < max_steps and self.stopping:
                self._end_save()
                self.bar.close()
                code = 0 if self.stopping == signal.SIGTERM else 130
                where = os.path.join(self.path, f"checkpoint-{step}")
                raise Ended(f"stopped by a signal; saved {where}, go on with --resume", code)
        self.bar.close()
        self._end_save()
        if not self.progress["rows_used"]:
            raise UserError(
                f"not one row could be used ({self.left_out} were left out, see {self.path}/"
                f"left_out.jsonl, and {self.progress['skipped']} steps skipped); nothing was "
                f"learned and nothing is saved"
            )
        self._check_weights(modules)
        beside = os.path.join(self.path, "result.incomplete")
        with _all_or_nothing(beside):
            save(beside)
            if rank() == 0:
                _force(beside, _files(beside))
                for name in os.listdir(beside):
                    final = os.path.join(self.path, name)
                    shutil.rmtree(final, ignore_errors=True)  # a folder of a run that was killed
                    os.replace(os.path.join(beside, name), final)
                os.rmdir(beside)
        say(f"saved {self.path}")

    def finish(self) -> None:
        """Marks the run as finished, once all that belongs to it is written."""
        barrier()
        if rank() == 0:
            _force(self.path, self._logs())
            record = {"stage": self.stage, "run": dataclasses.asdict(self.config)}
            write_json(os.path.join(self.path, "run.json"), record | {"finished": self.step})

    @contextlib.contextmanager
    def phase(self, name: str):
        """Seconds spent inside go to the step's metrics as time/<name>."""
        start = time.perf_counter()
        yield
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    def log(self, step: int, means=None, sums=None, peaks=None, values=None) -> dict:
        """One line of metrics. `means` are (sum, count) and `sums` numbers of this rank, summed
        over ranks; `peaks` are extremes of this rank (the smallest where the name ends in _min);
        `values` are the same on all ranks. A mean of nothing is null: nothing stands in for a
        measurement that was not made. A loss that is already divided by a global denominator has
        the count 1 / world_size: then its sum over ranks is the loss."""
        means, sums, peaks = means or {}, sums or {}, peaks or {}
        sums = sums | {"rows_left_out": self.left_out, "rows": len(self.rows)}
        flat = [float(x) for pair in means.values() for x in pair] + list(map(float, sums.values()))
        flat = all_sum(flat).tolist()
        pairs = zip(flat[: 2 * len(means) : 2], flat[1 : 2 * len(means) : 2])
        line = {"step": step}
        line |= {name: a / b if b else None for name, (a, b) in zip(means, pairs)}
        line |= dict(zip(sums, map(int, flat[2 * len(means) :])))
        sign = [-1 if name.endswith("_min") else 1 for name in peaks]
        peak = torch.cuda.max_memory_allocated() if self.device.type == "cuda" else 0
        peak = peak or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        extremes = [s * x for s, x in zip(sign, peaks.values())]
        *most, self.stopping, peak = all_max([*extremes, self.asked, peak / 2**30]).tolist()
        line |= {name: s * x for name, s, x in zip(peaks, sign, most)}
        line |= values or {}
        self._count_skipped(step, line)
        now = time.perf_counter()
        line["time/step"] = now - self.last
        line |= {f"time/{name}": seconds for name, seconds in self.seconds.items()}
        line["peak_memory_gb"] = peak
        if "tokens" in line:
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

    def _count_skipped(self, step: int, line: dict) -> None:
        """A step for which the gradient of any model is not finite counts as skipped, on every
        rank alike: names its rows, and ends the run after --max_skipped in a row. A step without
        a gradient, as where no rollout is valid, proves nothing: it neither counts nor ends a
        row of them."""
        norms, count = [v for k, v in line.items() if k.endswith("grad_norm")], self.progress
        skipped = not all(map(math.isfinite, norms))
        count["skipped"] += skipped
        line["steps_skipped"] = count["skipped"]
        if not skipped:
            count["rows_used"] += line["rows"]
            count["skipped_in_a_row"] = count["skipped_in_a_row"] if 0.0 in norms else 0
            return
        count["skipped_in_a_row"] += 1
        self._append("skipped.jsonl", {"step": step, "rank": rank(), "rows": self.rows})
        say(f"step {step}: skipped, its gradient is not finite; its rows are in skipped.jsonl")
        if count["skipped_in_a_row"] >= self.config.max_skipped:
            raise UserError(
                f"--max_skipped {self.config.max_skipped} steps in a row, the last {step}, had a "
                f"gradient that is not finite: the weights or the data hold NaN or infinity, or "
                f"--learning_rate is too high; nothing was saved over the last checkpoint"
            )

    def log_rollouts(self, step: int, example: Example, texts: list[str], **columns) -> None:
        """The rollouts of one prompt, with a value of each column for each of them."""
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

    # ----------------------------------------------------------------------------------------------
    # Directory

    def _start(self) -> None:
        """Locks the directory, writes run.json and opens the logs. All that can go wrong at the
        start has gone well by then, so a wrong flag leaves nothing behind."""
        if dist.is_initialized():  # saves have collectives of their own, beside those of training
            limit = datetime.timedelta(minutes=self.config.timeout)
            self.group = dist.new_group(backend="gloo", timeout=limit)
        barrier()  # every rank has looked into the directory before rank 0 writes
        if rank() == 0:
            os.makedirs(os.path.join(self.path, "ranks"), exist_ok=True)
            # The lock goes with the process, however it ends, and is not its children's.
            self.lock = open(os.path.join(self.path, "ranks", "lock"), "w")  # noqa: SIM115
            try:
                fcntl.lockf(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise UserError(f"--output_dir {self.path}: another run is writing there") from None
            if self._holds() != self.found:
                raise UserError(f"--output_dir {self.path}: another run has just written there")
            for name in set(os.listdir(os.path.join(self.path, "ranks"))) - {"lock"}:
                os.remove(os.path.join(self.path, "ranks", name))
            for name in self.found:
                if name.endswith(".incomplete"):
                    shutil.rmtree(os.path.join(self.path, name))
            for name in self._logs():
                self._cut(name)
            fields = dataclasses.asdict(self.config)
            name = os.path.join(self.path, "run.json")
            if self.checkpoint and os.path.exists(name):
                with open(name) as file:
                    before = json.load(file).get("run", {})
                other = [k for k, v in fields.items() if before.get(k) != v and k != "resume"]
                changed = [f"{k}: {before.get(k)} -> {fields[k]}" for k in other]
                if changed:
                    say("resumed with other settings:", ", ".join(changed))
            write_json(name, {"stage": self.stage, "run": fields})
            self.writer = _writer(self.config.report_to, self.path, fields)
        barrier()  # rank 0 has cut the files
        if "left_out.jsonl" in self._logs():
            with open(os.path.join(self.path, "left_out.jsonl")) as file:
                before = [json.loads(line) for line in file]
            self.left_out = len(before) if rank() == 0 else 0
            self.bad = {line["row"] for line in before if line.get("bad")}
        barrier()  # no rank logs a row before all have read
        self.started = True

    def _logs(self) -> list[str]:
        names = ("metrics.jsonl", "rollouts.jsonl", "skipped.jsonl", "left_out.jsonl")
        return [name for name in names if os.path.exists(os.path.join(self.path, name))]

    def _cut(self, name: str) -> None:
        """Drops what a killed run had logged behind the checkpoint that this run goes on from, and
        lines that are no JSON."""
        path = os.path.join(self.path, name)
        with open(path, errors="replace") as file, replacing(path) as new:
            for line in file:
                try:
                    done = json.loads(line)["step"] <= self.step
                except (ValueError, TypeError, KeyError, RecursionError):
                    done = False
                new.write(line.rstrip("\n") + "\n" if done else "")

    def _save(self, step: int, modules: dict, save: Callable | None) -> None:
        """Begins checkpoint-<step>: copies the state, then `_write` goes on beside the training."""
        self._end_save()
        self._check_weights(modules)
        beside = os.path.join(self.path, f"checkpoint-{step}.incomplete")
        if rank() == 0:
            shutil.rmtree(beside, ignore_errors=True)
        barrier()
        self.progress["stepped"] = stepped = _stepped(modules)
        with _all_or_nothing(beside):
            if save:
                save(beside)
            where = dict(checkpoint_id=os.path.join(beside, "state"), process_group=self.group)
            state, alone = _state(modules, stepped), not dist.is_initialized()
            written = dcp.async_save(state, **where, no_dist=alone)
        progress = dict(self.progress)  # as it is now
        self.saving = self.saver.submit(self._write, step, beside, progress, written)

    def _write(self, step: int, beside: str, progress: dict, written: Future) -> None:
        """checkpoint-<step>, written beside, checked, forced to the disk and renamed; only then the
        older ones go. A killed save leaves no half of one."""
        with _all_or_nothing(beside):
            written.result()
            if rank() == 0:
                _force(self.path, self._logs())
                write_json(os.path.join(beside, "state", "progress.json"), progress)
            barrier(self.group)
            mine = _files(beside)[rank() :: world_size()]
            _force(beside, mine)
            sums = {name: _checksum(os.path.join(beside, name)) for name in mine}
            barrier(self.group)
            write_json(os.path.join(beside, f"checksums-{rank()}.json"), sums)
            barrier(self.group)
        if rank() == 0:
            final = beside.removesuffix(".incomplete")
            shutil.rmtree(final, ignore_errors=True)
            os.rename(beside, final)
            folder = os.open(self.path, os.O_RDONLY)
            os.fsync(folder)
            os.close(folder)
            # A later one is damaged: this run has passed it over.
            kept = sorted(n for n in self._checkpoints() if n <= step)
            kept = kept[-self.config.save_total_limit :]
            for number in set(self._checkpoints()) - set(kept):
                shutil.rmtree(os.path.join(self.path, f"checkpoint-{number}"))
        barrier(self.group)

    def _end_save(self) -> None:
        """Waits for the save that is under way, and raises what went wrong in it."""
        saving, self.saving = self.saving, None
        if saving:
            saving.result()

    def _load(self, modules: dict) -> None:
        if not self.checkpoint:
            return
        stepped = self.progress["stepped"]
        for name, (module, optimizer) in modules.items():  # Adam's moments, to be filled
            parameters = dict(module.named_parameters())
            for p in map(parameters.get, stepped[name]):
                zeros = {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
                optimizer.state[p] = {"step": torch.zeros((), device=p.device), **zeros}
        state, alone = _state(modules, stepped), not dist.is_initialized()
        dcp.load(state, checkpoint_id=os.path.join(self.checkpoint, "state"), no_dist=alone)
        say(f"resumed from {self.checkpoint}")

    def _check_weights(self, modules: dict) -> None:
        """UserError where a weight of any rank is no number: that is not to be saved."""
        for name, (module, _) in modules.items():
            parts = (getattr(p, "to_local", p.detach)() for p in module.parameters())
            bad = [not all(bool(part.isfinite().all()) for part in parts)]
            if all_max(bad)[0]:
                raise UserError(
                    f"the weights of the {name} hold NaN or infinity at step {self.step}; nothing "
                    f"was saved over the last checkpoint"
                )


@contextlib.contextmanager
def _all_or_nothing(path: str) -> Iterator[None]:
    """A full disk is one line, and what could not be finished is removed."""
    try:
        yield
    except (Exception, CheckpointException) as error:
        if _of_another_rank(error):
            raise RuntimeError(str(error)) from error
        free = shutil.disk_usage(os.path.dirname(os.path.abspath(path))).free / 1e9
        if path.endswith(".incomplete"):
            shutil.rmtree(path, ignore_errors=True)
        said = (str(error).strip() or repr(error)).splitlines()[-1][:150]
        raise UserError(
            f"{path} could not be written ({said}; {free:.1f} GB are free there); the last "
            f"checkpoint is as it was, go on with --resume"
        ) from error


def _runs(pid) -> bool:
    """Whether a process of this machine is there and not stopped."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] not in "TtZX"
    except OSError:
        return not os.path.isdir("/proc/self")  # elsewhere it cannot be seen


def _stepped(modules: dict) -> dict[str, list[str]]:
    """The parameters that have moments. One that no row has used, as what sees images where there
    are none, has not."""
    return {
        name: [key for key, parameter in module.named_parameters() if parameter in optimizer.state]
        for name, (module, optimizer) in modules.items()
    }


def _state(modules: dict, stepped: dict[str, list[str]]) -> dict:
    """The very tensors of weights and moments, to be saved, or to be loaded in place. Rates and
    schedules are functions of the step. `get_state_dict` of torch would make an empty step of an
    optimiser that has made none, which changes what Adam does later."""
    state = {}
    for name, (module, optimizer) in modules.items():
        parameters = dict(module.named_parameters())
        moments = {key: optimizer.state[parameters[key]] for key in stepped[name]}
        adapters = {key: p for key, p in parameters.items() if ".lora_" in key}  # all that learns
        weights = {key: p.detach() for key, p in (adapters or parameters).items()}
        state[name] = {"model": weights, "moments": moments}
    return state


def _files(path: str) -> list[str]:
    """The files below a directory, relative to it."""
    found = (os.path.join(top, name) for top, _, names in os.walk(path) for name in names)
    return sorted(os.path.relpath(file, path) for file in found)


def _force(path: str, names: list[str]) -> None:
    """Files of a directory to the disk."""
    for name in names:
        with open(os.path.join(path, name), "rb") as file:
            os.fsync(file.fileno())


def _checksum(path: str) -> int:
    total = 0
    with open(path, "rb") as file:
        while block := file.read(1 << 24):
            total = zlib.crc32(block, total)
    return total


def _is_whole(path: str) -> bool:
    """Whether this rank's share of a checkpoint's files has the checksums of the save."""
    expected = {}
    try:
        for name in os.listdir(path):
            if name.startswith("checksums-"):
                with open(os.path.join(path, name)) as file:
                    expected |= json.load(file)
        mine = sorted(expected)[rank() :: world_size()]
        return bool(expected) and all(
            _checksum(os.path.join(path, name)) == expected[name] for name in mine
        )
    except (OSError, ValueError, TypeError):
        return False


def _writer(report_to: str, path: str, fields: dict) -> Callable | None:
    if report_to == "none":
        return None
    if report_to == "tensorboard":
        from torch.utils.tensorboard import SummaryWriter

        board = SummaryWriter(path)

        def write(line, step):
            for name, value in line.items():
                board.add_scalar(name, value, step)
            board.flush()

        return write
    try:
        import wandb
    except ImportError:
        raise UserError(
            "--report_to wandb: it is not installed; pip install wandb, or use tensorboard"
        ) from None
    wandb.init(project="prism", dir=path, config=fields)
    return lambda line, step: wandb.log(line, step=step)
