"""A run: its arguments, its directory, its log, its checkpoints. What all stages do alike around their loops.

output_dir/config.json         under "run", every field of the stage's dataclass as it ran; at the end beside them the
                               configuration of the model, since this is then a Hugging Face directory too
output_dir/metrics.jsonl       one line a step, reduced over ranks; null where there was nothing to measure
output_dir/rollouts.jsonl      a sample of rollouts with all their scores
output_dir/left_out.jsonl      every row that was left out, by any rank, and why
output_dir/checkpoint-N/       a Hugging Face directory, and in `state/` what resuming needs: weights in full precision
                               and the optimiser's moments (torch.distributed.checkpoint, sharded as the run was)
output_dir/                    at the end, the Hugging Face directory of the result
"""

import contextlib
import dataclasses
import json
import math
import os
import resource
import shutil
import sys
import time

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    get_state_dict,
    set_state_dict,
)
from tqdm import tqdm
from transformers import HfArgumentParser
from transformers.utils import logging

import model
from data import UserError


def parse(config_class, world: dict):
    """Command line -> the stage's dataclass. Without `--data` the stage runs on the embedded world of handwritten digits
    with `world`, the settings that suit a model of that size; whatever is given on the command line still counts."""
    parser = HfArgumentParser(
        config_class, description=sys.modules["__main__"].__doc__.strip().splitlines()[0]
    )
    if not any(arg.split("=")[0] == "--data" for arg in sys.argv[1:]):
        parser.set_defaults(**world)
    (config,) = parser.parse_args_into_dataclasses()
    return config


def main(stage) -> None:
    """Runs `stage()`; what the user can mend ends in one line and exit code 2."""
    logging.disable_progress_bar()  # loading and writing weights; the stage has its own bar
    logging.set_verbosity_error()  # reports on keys that are added or left out on purpose (score heads, language heads)
    try:
        stage()
    except UserError as error:
        tqdm.write(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.stderr.flush()
        os._exit(2) if dist.is_initialized() else sys.exit(
            2
        )  # the other ranks wait in a collective: leave at once
    if dist.is_initialized():
        dist.barrier()  # a thread of the last collective that still holds tensors would abort a process that is ending
        dist.destroy_process_group()


def say(*words) -> None:
    """A line for the user, from rank 0, above the progress bar."""
    if model.rank() == 0:
        tqdm.write(" ".join(str(word) for word in words), file=sys.stderr)


def ratio(numerator, denominator) -> tuple[float, float]:
    """A metric as (sum, count), to be summed over ranks before it is divided."""
    return float(numerator), float(denominator)


def accumulate(
    totals: dict[str, tuple[float, float]], part: dict[str, tuple[float, float]]
) -> None:
    """Adds metrics (sum, count) to those of earlier parts of the same step, in place."""
    for name, (total, count) in part.items():
        before = totals.get(name, (0.0, 0.0))
        totals[name] = (before[0] + total, before[1] + count)


def finite(line: dict) -> dict:
    """null where a number is none, as JSON has it."""
    return {
        k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in line.items()
    }


class Run:
    """The directory of a run and its log. Made first, so that a directory that is in use is noticed before work is done."""

    def __init__(self, config, device: torch.device):
        self.config, self.device = config, device
        self.path = config.output_dir
        self.seconds: dict[str, float] = {}
        self.last = time.perf_counter()
        self.bar = self.writer = None
        old = os.listdir(self.path) if os.path.isdir(self.path) else []
        if os.path.isfile(self.path):
            raise UserError(f"--output_dir {self.path} is a file; name a directory")
        if old and not config.resume:
            raise UserError(
                f"--output_dir {self.path} is not empty; pass --resume to go on there, or name another"
            )
        self.step = (
            max(self._checkpoints(), default=0) if config.resume else 0
        )  # the last step that is done
        self.checkpoint = os.path.join(self.path, f"checkpoint-{self.step}") if self.step else None
        self.left_out = self.left_out_before = 0
        self.started = False

    def start(self) -> None:
        """Writes config.json and opens the logs. Called when all that can go wrong at the start has gone well, so that a
        wrong flag leaves nothing behind; `load` calls it."""
        if self.started:
            return
        self.started = True
        if model.world_size() > 1:
            dist.barrier()  # every rank has looked into the directory before rank 0 writes
        if model.rank() == 0:
            os.makedirs(self.path, exist_ok=True)
            self._cut("metrics.jsonl")
            self._cut("rollouts.jsonl")
            self.left_out_before = self._cut("left_out.jsonl")
            fields = dataclasses.asdict(self.config)
            name = os.path.join(self.path, "config.json")
            if self.checkpoint and os.path.exists(name):
                with open(name) as file:
                    before = json.load(file).get("run", {})
                changed = [
                    f"{k}: {before.get(k)} -> {v}"
                    for k, v in fields.items()
                    if before.get(k) != v and k != "resume"
                ]
                if changed:
                    say("resumed with other settings:", ", ".join(changed))
            with open(name, "w") as file:
                json.dump({"run": fields}, file, indent=1)
            self.writer = _writer(self.config.report_to, self.path, fields)
        if model.world_size() > 1:
            dist.barrier()  # no rank logs a row before rank 0 has cut the files

    def _checkpoints(self) -> list[int]:
        names = os.listdir(self.path) if os.path.isdir(self.path) else []
        return [
            int(name[11:])
            for name in names
            if name.startswith("checkpoint-") and name[11:].isdigit()
        ]

    def _cut(self, name: str) -> int:
        """Drops what a killed run had logged behind the checkpoint that this run goes on from; returns what is left."""
        path = os.path.join(self.path, name)
        if not os.path.exists(path):
            return 0
        with open(path) as file:
            lines = [
                line
                for line in file
                if line.endswith("\n") and json.loads(line)["step"] <= self.step
            ]
        with open(path, "w") as file:
            file.writelines(lines)
        return len(lines)

    @contextlib.contextmanager
    def phase(self, name: str):
        """Seconds spent inside go to the step's metrics as time/<name>."""
        start = time.perf_counter()
        yield
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    def steps(self, max_steps: int, label: str):
        """The step numbers that are still to do, counted from 1, with a progress bar on rank 0."""
        self.bar = tqdm(
            total=max_steps,
            initial=min(self.step, max_steps),
            desc=label,
            disable=model.rank() != 0,
        )
        for step in range(self.step + 1, max_steps + 1):
            yield step
            self.bar.update()
        self.bar.close()

    def log(
        self,
        step: int,
        sums: dict[str, tuple[float, float]],
        values: dict[str, float] | None = None,
    ) -> dict:
        """One line of metrics. `sums` are (sum, count) of this rank, reduced over all ranks; `values` are already global.
        A count of zero gives null: nothing stands in for a measurement that was not made."""
        names = sorted(sums)
        totals = model.all_sum([sums[name] for name in names]) if names else torch.zeros(0, 2)
        line = {"step": step}
        line.update(
            {name: (float(a) / float(b) if b else None) for name, (a, b) in zip(names, totals)}
        )
        line.update(values or {})
        now = time.perf_counter()
        line["time/step"] = now - self.last
        self.last = now
        line.update({f"time/{name}": seconds for name, seconds in self.seconds.items()})
        peak = (
            torch.cuda.max_memory_allocated()
            if self.device.type == "cuda"
            else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        )
        line["peak_memory_gb"] = float(model.all_sum([peak / 2**30], dist.ReduceOp.MAX)[0])
        if "tokens" in line:
            line["tokens_per_second"] = line["tokens"] / line["time/step"]
        self.seconds = {}
        line = finite(line)
        if model.rank() == 0:
            with open(os.path.join(self.path, "metrics.jsonl"), "a") as file:
                file.write(json.dumps(line) + "\n")
            if self.writer:
                self.writer({k: v for k, v in line.items() if v is not None}, step)
            if step % self.config.logging_steps == 0 and self.bar is not None:
                shown = (
                    "loss",
                    "reward",
                    "accuracy",
                    "format_valid",
                    "pair_accuracy_perception",
                    "pair_accuracy_reasoning",
                )
                self.bar.set_postfix(
                    {k: f"{line[k]:.3f}" for k in shown if line.get(k) is not None}
                )
        return line

    def leave_out(self, step: int, where: str, why: str) -> None:
        """A row that cannot be used: counted, written to left_out.jsonl, and the first few of them shown."""
        self.left_out += 1
        with open(os.path.join(self.path, "left_out.jsonl"), "a") as file:
            file.write(
                json.dumps({"step": step, "row": where, "why": why}, ensure_ascii=False) + "\n"
            )
        if self.left_out <= 3:
            say(
                f"{where}: left out, {why}"
                + ("; more of them go to left_out.jsonl only" if self.left_out == 3 else "")
            )

    def rows_left_out(self) -> int:
        """How many rows were left out so far, on all ranks, also before a resumption. Called by every rank."""
        return int(
            model.all_sum([self.left_out + (self.left_out_before if model.rank() == 0 else 0)])[0]
        )

    def log_rollouts(self, step: int, rows: list[dict]) -> None:
        if model.rank() == 0:
            with open(os.path.join(self.path, "rollouts.jsonl"), "a") as file:
                file.writelines(
                    json.dumps(finite({"step": step, **row}), ensure_ascii=False) + "\n"
                    for row in rows
                )

    def save(self, step: int, save, modules: dict, progress: dict) -> None:
        """checkpoint-<step>: `save(path)` writes the Hugging Face directory; `modules` are name -> (module, optimiser),
        `progress` a flat dict of numbers. Written beside, then renamed: a killed save leaves no half of one."""
        final = os.path.join(self.path, f"checkpoint-{step}")
        beside = final + ".incomplete"
        if model.rank() == 0:
            shutil.rmtree(beside, ignore_errors=True)
        save(beside)
        dcp.save(
            _state(modules),
            checkpoint_id=os.path.join(beside, "state"),
            no_dist=not dist.is_initialized(),
        )
        if model.rank() == 0:
            with open(os.path.join(beside, "state", "progress.json"), "w") as file:
                json.dump(progress, file)
            shutil.rmtree(final, ignore_errors=True)
            os.rename(beside, final)
            kept = sorted(self._checkpoints())[-self.config.save_total_limit :]
            for number in set(self._checkpoints()) - set(kept):
                shutil.rmtree(os.path.join(self.path, f"checkpoint-{number}"))
        if model.world_size() > 1:
            dist.barrier()

    def load(self, modules: dict, progress: dict) -> dict:
        """Starts the run: puts the latest checkpoint's state, if there is one, into the modules and optimisers, and returns
        its progress (or `progress`)."""
        self.start()
        if not self.checkpoint:
            return progress
        path = os.path.join(self.checkpoint, "state")
        state = _state(modules)
        dcp.load(state, checkpoint_id=path, no_dist=not dist.is_initialized())
        for name, (module, optimizer) in modules.items():
            groups = get_optimizer_state_dict(module, optimizer)["param_groups"]
            set_state_dict(
                module,
                optimizer,
                model_state_dict=state[name]["model"],
                optim_state_dict={"state": state[name]["moments"], "param_groups": groups},
            )
        say(f"resumed from {self.checkpoint}")
        with open(os.path.join(path, "progress.json")) as file:
            return json.load(file)

    def finish(self, save) -> None:
        """The result: `save(path)` writes the Hugging Face directory; config.json keeps the run's fields beside it."""
        save(self.path)
        if model.rank() == 0:
            name = os.path.join(self.path, "config.json")
            with open(name) as file:
                config = json.load(file)
            with open(name, "w") as file:
                json.dump({**config, "run": dataclasses.asdict(self.config)}, file, indent=2)


def _state(modules: dict) -> dict:
    """Tensors only: weights and moments. Rates and schedules are functions of the step and need no saving."""
    state = {}
    for name, (module, optimizer) in modules.items():
        weights, moments = get_state_dict(module, optimizer)
        state[name] = {"model": weights, "moments": moments["state"]}
    return state


def _writer(report_to: str, path: str, fields: dict):
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
