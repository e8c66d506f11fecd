"""A run: its flags, its directory, its log, its checkpoints. What all stages do alike around their
loops.

    output_dir/run.json            every field of the stage's dataclass as it ran
    output_dir/metrics.jsonl       one line a step, over all ranks; null where nothing was measured
    output_dir/rollouts.jsonl      the rollouts of one prompt a step, with all their scores
    output_dir/left_out.jsonl      every row that was left out, by any rank, and why
    output_dir/checkpoint-N/       a Hugging Face directory, and in `state/` what resuming needs:
                                   weights in full precision and the moments of the optimiser
                                   (torch.distributed.checkpoint, sharded as the run was)
    output_dir/                    at the end, the Hugging Face directory of the result
"""

import contextlib
import dataclasses
import json
import math
import os
import re
import resource
import shutil
import sys
import time
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from huggingface_hub import HfApi, snapshot_download
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    get_state_dict,
    set_state_dict,
)
from tqdm import tqdm
from transformers import HfArgumentParser
from transformers.utils import logging

import digits
from data import Encoded, batches
from model import all_max, all_sum, barrier, join_ranks, rank, world_size
from rows import Example, RowError, Unfit, UserError

# --------------------------------------------------------------------------------------------------
# Flags


def parse(config_class):
    """The command line -> the stage's dataclass.

    With neither a model nor `--data`, or with `--data digits`, the stage runs on the embedded
    world. A model without `--data` takes the published data. The settings of the embedded world
    are taken for its own model on its own data only; flags that are given always count.
    """
    logging.set_verbosity_error()
    logging.disable_progress_bar()  # loading and writing weights; a stage has its own bar
    about = sys.modules["__main__"].__doc__.strip().splitlines()[0]
    parser = HfArgumentParser(config_class, description=about, allow_abbrev=False)
    config, unknown = parser.parse_args_into_dataclasses(return_remaining_strings=True)
    if unknown:
        raise UserError(f"{' '.join(unknown)}: no such flag; --help lists them")
    given = {arg.split("=")[0][2:].replace("-", "_") for arg in sys.argv[1:] if arg[:2] == "--"}
    stage = config_class.__name__.removesuffix("Config").lower()
    if config.data == ["digits"] or not given & {"model", "ckpt", "data"}:
        say(digits.settle(config, stage, given))
    if rank() == 0:
        for name in ("model", "ckpt", "policy", "discriminator", "data"):
            value = getattr(config, name, None) or []
            for source in [value] if isinstance(value, str) else value:
                announce(name, source)
    return config


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


def main(stage: Callable) -> None:
    """Runs `stage()`. What the user can mend ends in one line and exit code 2."""
    try:
        stage()
    except UserError as error:
        tqdm.write(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.stderr.flush()
        os._exit(2) if dist.is_initialized() else sys.exit(2)  # other ranks wait in a collective
    if dist.is_initialized():
        dist.barrier()  # a thread of the last collective may still hold tensors
        dist.destroy_process_group()


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

    def __init__(self, config_class):
        self.device = join_ranks()
        self.config = config = parse(config_class)
        self.stage = config_class.__name__.removesuffix("Config").lower()
        self.path = config.output_dir
        self.seconds: dict[str, float] = {}
        self.last = time.perf_counter()
        self.bar = self.writer = None
        if os.path.isfile(self.path):
            raise UserError(f"--output_dir {self.path} is a file; name a directory")
        if os.path.isdir(self.path) and os.listdir(self.path) and not config.resume:
            raise UserError(
                f"--output_dir {self.path} is not empty; pass --resume to go on there, or name "
                f"another"
            )
        self.step = max(self._checkpoints(), default=0) if config.resume else 0  # the last done
        self.checkpoint = os.path.join(self.path, f"checkpoint-{self.step}") if self.step else None
        self.position = 0  # rows drawn so far, over all ranks
        if self.checkpoint:
            with open(os.path.join(self.checkpoint, "state", "progress.json")) as file:
                self.position = json.load(file)["position"]
        self.left_out, self.left_out_before, self.bad = 0, 0, set()

    def _checkpoints(self) -> list[int]:
        names = os.listdir(self.path) if os.path.isdir(self.path) else []
        return [int(n[11:]) for n in names if n.startswith("checkpoint-") and n[11:].isdigit()]

    # ----------------------------------------------------------------------------------------------
    # Rows

    def batches(self, examples, processor, encode, batch_size: int, total=None, own=False):
        """This rank's share of one global batch after another: `encode(example, prompt)` of each
        row, from where the run stands (`own`: from the first row, outside the run's count). Rows
        that cannot be used are left out, counted and named."""
        limits = ("max_prompt_length", "max_image_size")
        limits = {name: getattr(self.config, name, None) for name in limits}
        encoded = Encoded(examples, processor, encode, **limits)
        start, part = 0 if own else self.position, (rank(), world_size())
        workers = 0 if own else self.config.dataloader_num_workers
        drawn = 0
        for items in batches(encoded, batch_size, self.config.seed, start, total, part, workers):
            self.position += 0 if own else batch_size
            drawn += len(items)
            for error in (item for item in items if isinstance(item, RowError)):
                self._leave_out(error, drawn, len(examples))
            yield [item for item in items if not isinstance(item, RowError)]

    def _leave_out(self, error: RowError, drawn: int, rows: int) -> None:
        self.left_out += 1
        line = {"step": self.step, "row": error.where, "why": str(error)}
        with open(os.path.join(self.path, "left_out.jsonl"), "a") as file:
            file.write(json.dumps(line) + "\n")
        if self.left_out <= 3:
            more = "; more of them go to left_out.jsonl only" if self.left_out == 3 else ""
            say(f"{error.where}: left out, {error}{more}")
        if not isinstance(error, Unfit):
            self.bad.add(error.where)
        drawn = min(drawn, rows)
        if len(self.bad) >= min(3, rows) and len(self.bad) > self.config.max_bad_fraction * drawn:
            raise UserError(
                f"{len(self.bad)} bad rows among the first {drawn} are more than "
                f"--max_bad_fraction {self.config.max_bad_fraction}; {error.where}: {error}"
            )

    # ----------------------------------------------------------------------------------------------
    # Steps, log

    def steps(self, max_steps: int, modules: dict, save: Callable) -> Iterator[int]:
        """The steps that are still to do, counted from 1. Loads the checkpoint that the run goes
        on from, saves one every `save_steps`, and the result at the end. `modules` are name ->
        (module, optimiser); `save(path)` writes the Hugging Face directory."""
        self._start()
        self._load(modules)
        show = dict(desc=self.stage, disable=rank() != 0)
        self.bar = tqdm(total=max_steps, initial=min(self.step, max_steps), **show)
        for step in range(self.step + 1, max_steps + 1):
            self.step = step
            yield step
            self.bar.update()
            if step % self.config.save_steps == 0 and step < max_steps:
                self._save(step, modules, save)
        self.bar.close()
        save(self.path)
        say(f"saved {self.path}")

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
        measurement that was not made."""
        means, sums, peaks = means or {}, sums or {}, peaks or {}
        left_out = self.left_out + (self.left_out_before if rank() == 0 else 0)
        sums = sums | {"rows_left_out": left_out}
        flat = [float(x) for pair in means.values() for x in pair] + list(map(float, sums.values()))
        flat = all_sum(flat).tolist()
        pairs = zip(flat[: 2 * len(means) : 2], flat[1 : 2 * len(means) : 2])
        line = {"step": step}
        line |= {name: a / b if b else None for name, (a, b) in zip(means, pairs)}
        line |= dict(zip(sums, map(int, flat[2 * len(means) :])))
        sign = [-1 if name.endswith("_min") else 1 for name in peaks]
        peak = torch.cuda.max_memory_allocated() if self.device.type == "cuda" else 0
        peak = peak or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        most = all_max([s * x for s, x in zip(sign, peaks.values())] + [peak / 2**30]).tolist()
        line |= {name: s * x for name, s, x in zip(peaks, sign, most)}
        line |= values or {}
        now = time.perf_counter()
        line["time/step"] = now - self.last
        line |= {f"time/{name}": seconds for name, seconds in self.seconds.items()}
        line["peak_memory_gb"] = most[-1]
        if "tokens" in line:
            line["tokens_per_second"] = line["tokens"] / line["time/step"]
        self.last, self.seconds = now, {}
        line = finite(line)
        if rank() == 0:
            with open(os.path.join(self.path, "metrics.jsonl"), "a") as file:
                file.write(json.dumps(line) + "\n")
            if self.writer:
                self.writer({k: v for k, v in line.items() if isinstance(v, (int, float))}, step)
            shown = ("loss", "reward", "accuracy", "format_valid", "discriminator_loss")
            shown = {k: f"{line[k]:.3f}" for k in shown if line.get(k) is not None}
            self.bar.set_postfix(shown)
        return line

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
        with open(os.path.join(self.path, "rollouts.jsonl"), "a") as file:
            for i, text in enumerate(texts):
                own = {name: float(column[i]) for name, column in columns.items()}
                line = finite({"step": step, **shared, "response": text, **own})
                file.write(json.dumps(line, ensure_ascii=False) + "\n")

    # ----------------------------------------------------------------------------------------------
    # Directory

    def _start(self) -> None:
        """Writes run.json and opens the logs. All that can go wrong at the start has gone well by
        then, so a wrong flag leaves nothing behind."""
        barrier()  # every rank has looked into the directory before rank 0 writes
        if rank() == 0:
            os.makedirs(self.path, exist_ok=True)
            self._cut("metrics.jsonl")
            self._cut("rollouts.jsonl")
            self.left_out_before = self._cut("left_out.jsonl")
            fields = dataclasses.asdict(self.config)
            name = os.path.join(self.path, "run.json")
            if self.checkpoint and os.path.exists(name):
                with open(name) as file:
                    before = json.load(file).get("run", {})
                other = [k for k, v in fields.items() if before.get(k) != v and k != "resume"]
                changed = [f"{k}: {before.get(k)} -> {fields[k]}" for k in other]
                if changed:
                    say("resumed with other settings:", ", ".join(changed))
            with open(name, "w") as file:
                json.dump({"stage": self.stage, "run": fields}, file, indent=1)
            self.writer = _writer(self.config.report_to, self.path, fields)
        barrier()  # no rank logs a row before rank 0 has cut the files

    def _cut(self, name: str) -> int:
        """Drops what a killed run had logged behind the checkpoint that this run goes on from.
        -> the number of lines that are left."""
        path = os.path.join(self.path, name)
        if not os.path.exists(path):
            return 0
        with open(path) as file:
            whole = [line for line in file if line.endswith("\n")]
        lines = [line for line in whole if json.loads(line)["step"] <= self.step]
        with open(path, "w") as file:
            file.writelines(lines)
        return len(lines)

    def _save(self, step: int, modules: dict, save: Callable) -> None:
        """checkpoint-<step>, written beside and renamed: a killed save leaves no half of one."""
        final = os.path.join(self.path, f"checkpoint-{step}")
        beside = final + ".incomplete"
        if rank() == 0:
            shutil.rmtree(beside, ignore_errors=True)
        save(beside)
        state, alone = os.path.join(beside, "state"), not dist.is_initialized()
        dcp.save(_state(modules), checkpoint_id=state, no_dist=alone)
        if rank() == 0:
            with open(os.path.join(state, "progress.json"), "w") as file:
                json.dump({"position": self.position}, file)
            shutil.rmtree(final, ignore_errors=True)
            os.rename(beside, final)
            kept = sorted(self._checkpoints())[-self.config.save_total_limit :]
            for number in set(self._checkpoints()) - set(kept):
                shutil.rmtree(os.path.join(self.path, f"checkpoint-{number}"))
        barrier()

    def _load(self, modules: dict) -> None:
        if not self.checkpoint:
            return
        state, alone = _state(modules), not dist.is_initialized()
        dcp.load(state, checkpoint_id=os.path.join(self.checkpoint, "state"), no_dist=alone)
        for name, (module, optimizer) in modules.items():
            groups = get_optimizer_state_dict(module, optimizer)["param_groups"]
            moments = {"state": state[name]["moments"], "param_groups": groups}
            weights = state[name]["model"]
            set_state_dict(module, optimizer, model_state_dict=weights, optim_state_dict=moments)
        say(f"resumed from {self.checkpoint}")


def _state(modules: dict) -> dict:
    """Tensors only: weights and moments. Rates and schedules are functions of the step."""
    state = {}
    for name, (module, optimizer) in modules.items():
        weights, moments = get_state_dict(module, optimizer)
        state[name] = {"model": weights, "moments": moments["state"]}
    return state


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
    if report_to == "wandb":
        try:
            import wandb
        except ImportError:
            raise UserError(
                "--report_to wandb: it is not installed; pip install wandb, or use tensorboard"
            ) from None
        wandb.init(project="prism", dir=path, config=fields)
        return lambda line, step: wandb.log(line, step=step)
    raise UserError(f"--report_to {report_to}: choose none, tensorboard or wandb")
