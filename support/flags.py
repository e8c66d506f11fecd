"""The command line: the flags that every stage has, their ranges, and what --help prints.

A stage's flags are the fields of its dataclass. The comment beside a field is its help text, so a
flag is explained in one place.
"""

import argparse
import dataclasses
import difflib
import os
import re
import sys
import warnings
from typing import Literal

from huggingface_hub import HfApi, snapshot_download
from transformers import HfArgumentParser
from transformers.utils import logging

from support import digits, fit
from support.errors import Ended, UserError, unreadable
from support.fields import Count, Minutes, Natural, Seed, Share, check_ranges, comments_of
from support.ranks import rank, say

# The schedules of transformers that a peak, a warm-up and a length determine.
Schedule = Literal[
    "constant",
    "constant_with_warmup",
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "inverse_sqrt",
]


# The learning rate that suits adapters is about ten times that of all weights, in SFT and in RL:
# "LoRA Without Regret" (Schulman et al. 2025, thinkingmachines.ai/blog/lora), which TRL's guide of
# the same name reproduces (huggingface.co/docs/trl/lora_without_regret).
OF_ADAPTERS = 10


@dataclasses.dataclass
class RunConfig:
    """The flags that every stage has. A stage's own dataclass adds its hyperparameters."""

    output_dir: str = "out/run"  # directory of the run's files and of its result
    image_dir: str | None = None  # a folder for images, besides the data file's own folder
    system_prompt: str | None = None  # for rows without one: text or file; none: see docs/data.md
    max_pixels: Count | None = None  # pixels in the largest image; none: see docs/data.md
    max_bad_fraction: Share = 0.01  # stop when at least 3 rows and more than this share are bad
    max_tokens_per_pack: Count = 16384  # most tokens of a micro-batch; a longer row gets its own
    activation_checkpointing: bool | None = None  # recompute activations; none: on a GPU only
    freeze_vision: bool = False  # do not train the vision tower
    lora_rank: Natural = 0  # LoRA of this rank, at 10 x the default learning rate; 0: off
    hsdp: bool = False  # shard within a node, replicate across nodes
    dry_run: Natural = 0  # print memory and hours on N GPUs, for the paper's row counts, then stop
    dataloader_num_workers: Natural = 1  # worker processes per rank that encode rows ahead
    save_steps: Count = 100  # steps between checkpoints, each of 12 bytes per parameter
    save_hf_steps: Natural = 0  # steps between checkpoints with a Hugging Face directory; 0: none
    save_total_limit: Count = 2  # checkpoints to keep; the Hugging Face files of older ones go too
    timeout: Minutes = 30.0  # minutes to wait for another rank or a worker before giving up
    max_skipped: Count = 5  # stop after so many steps in a row with a NaN or infinite gradient
    report_to: Literal["none", "tensorboard", "wandb"] = "none"  # also send the metrics there
    seed: Seed = 0  # seed of all random numbers
    resume: bool = False  # go on from the newest undamaged checkpoint in --output_dir


def parse(config_class):
    """The command line -> the stage's dataclass.

    With neither a model nor `--data`, or with `--data digits`, the stage runs on the embedded
    world. A model without `--data` takes the published data. The settings of the embedded world
    apply to its own model on its own data only; flags that are given always count."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()  # of loading and writing weights; a stage has its own bar
    warnings.filterwarnings("ignore", "torch.distributed is disabled")  # one process saves alone
    words = sys.argv[1:]
    config, unknown = _parser(config_class).parse_args_into_dataclasses(
        words, return_remaining_strings=True, look_for_args_file=False
    )
    if unknown:
        raise UserError(f"{' '.join(unknown)}: no such flag; --help lists them")
    given = [word.split("=")[0][2:].replace("-", "_") for word in words if word[:2] == "--"]
    if given.count("data") > 1:
        raise UserError("--data is given twice; give it once, with all its values")
    given = set(given)
    check_ranges(config)
    _read_system_prompt(config)
    if config.stage == "discriminator" and config.lora_rank:
        raise UserError("--lora_rank: only policies take adapters; leave it out of the warm-up")
    check_directories(config)
    if config.dry_run:
        if rank() == 0:
            print(fit.answer(config))
        raise Ended("dry run: read only configurations, and wrote nothing", 0)
    if config.data == ["digits"] or not given & {"model", "ckpt", "data"}:
        say(digits.settle(config, given))
    if getattr(config, "lora_rank", 0) and "learning_rate" not in given:
        config.learning_rate *= OF_ADAPTERS
        rate = config.learning_rate
        say(
            f"--lora_rank: trains at --learning_rate {rate:g}, {OF_ADAPTERS} times the default; "
            f"give --learning_rate to choose another"
        )
    if rank() == 0:
        for name in (*MODELS, "data"):
            value = getattr(config, name, None) or []
            for source in [value] if isinstance(value, str) else value:
                announce(name, source)
    return config


def _parser(config_class) -> HfArgumentParser:
    """A parser that says what each flag means, and raises UserError in place of exiting."""
    about = (sys.modules["__main__"].__doc__ or "").strip().split("\n\n")[0]
    # With argparse's own formatter: that of transformers would print each default twice.
    parser = HfArgumentParser(
        config_class,
        usage="%(prog)s [--flag value ...]",
        description=about,
        allow_abbrev=False,
        formatter_class=argparse.HelpFormatter,
        epilog="--data takes files or hub data sets; docs/data.md has their fields. The command "
        "runs on the built-in digits with --data digits, or with neither --data nor a model "
        "(--model or --ckpt). The digits have models and settings of their own, which then replace "
        "the defaults above. --dry_run counts the defaults above and the flags given, never the "
        "digits. On 8 GPUs: torchrun --nproc_per_node=8 FILE.py --flag value. Numbers (1) to (19) "
        "are equations at the top of the files; D1 to D22 are in docs/deviations.md.",
    )

    def refuse(message: str) -> None:
        raise UserError(f"{message}; --help lists the flags")

    parser.error = refuse
    comments = comments_of(config_class)
    shared = {field.name for field in dataclasses.fields(RunConfig)}
    own, run = parser.add_argument_group("the method"), parser.add_argument_group("the run")
    for action in list(parser._optionals._group_actions):
        if action.dest not in comments:  # --help itself
            continue
        comment = comments[action.dest].replace("%", "%%")
        action.help = f"{comment} (default: {_shown(action.default)})"
        kind = (action.type or str).__name__.upper()
        action.metavar = None if action.choices else kind.removeprefix("STRING_TO_")
        action.option_strings = action.option_strings[:1]  # --a_b is shown, --a-b works as well
        parser._optionals._group_actions.remove(action)
        (run if action.dest in shared else own)._group_actions.append(action)
    return parser


def _shown(default) -> str:
    if isinstance(default, list):
        return " ".join(default) or "none"
    return str(default).lower() if default is None or isinstance(default, bool) else str(default)


def _read_system_prompt(config) -> None:
    """Puts the content of the file in place of its name, where --system_prompt names one."""
    name = getattr(config, "system_prompt", None) or ""
    if os.path.isfile(name):
        try:
            with open(name, encoding="utf-8") as file:
                config.system_prompt = file.read().strip()
        except UnicodeDecodeError:
            raise UserError(f"--system_prompt {name}: is not UTF-8; convert the file") from None


MODELS = ("model", "ckpt", "policy", "discriminator")
# Which command makes what a stage's flag names. Without a model it would make that of the digits.
MAKERS = {
    ("discriminator", "policy"): "sft.py --model MODEL",
    ("align", "ckpt"): "sft.py --model MODEL",
    ("align", "discriminator"): "discriminator.py --model MODEL",
    ("rlvr", "ckpt"): "align.py --ckpt CKPT --discriminator DISCRIMINATOR",
    ("eval", "ckpt"): "rlvr.py --ckpt CKPT",
}


def check_directories(config) -> None:
    """UserError for a model that is not there and that no hub id can name: such an id is
    OWNER/NAME. The hub is not asked."""
    for name in MODELS:
        source = getattr(config, name, None)
        if not source or os.path.exists(source):
            continue
        if said := unreadable(source):
            raise UserError(f"--{name} {said}")
        if re.fullmatch(r"\w[\w.-]*/[\w.-]+", source) and source not in digits.MADE_BY:
            continue
        near, maker = _nearest(source, "config.json"), MAKERS.get((config.stage, name))
        if near:
            remedy = f"did you mean {near}?"
        elif source in digits.MADE_BY or maker:
            own = f"python {maker} --output_dir {source}"
            remedy = f"make it with: {digits.MADE_BY.get(source, own)}"
        else:
            remedy = "name an existing one, or a hub id OWNER/NAME"
        raise UserError(f"--{name} {source}: there is no such directory; {remedy}")


def _nearest(source: str, inside: str = "") -> str:
    """What lies beside a path and is called much the same; "" for nothing. `inside` names what a
    directory must hold to be meant."""
    folder, name = os.path.split(source.rstrip("/"))
    there = os.listdir(folder or ".") if os.path.isdir(folder or ".") else []
    there = [
        one for one in there if not inside or os.path.exists(os.path.join(folder, one, inside))
    ]
    near = difflib.get_close_matches(name, there, n=1, cutoff=0.7)
    return os.path.join(folder, near[0]) if near else ""


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
        say(f"--{name}: reads {source} from the hub, at most {sum(sizes) / 1e9:.2f} GB")
    except Exception as error:
        try:
            snapshot_download(repo[1], repo_type=kind, local_files_only=True)
            say(f"--{name}: reads {source} from the hub's cache on this machine")
        except Exception:
            folder, near = os.path.dirname(source), _nearest(source)
            if os.path.isdir(folder):
                remedy = f"did you mean {near}?" if near else "check the name"
                raise UserError(
                    f"--{name} {source}: neither in {folder} nor to be read from the hub "
                    f"({type(error).__name__}); {remedy}"
                ) from None
            copy = "a file of the local copy: --data FILE"  # a directory of rows is no source
            copy = copy if name == "data" else f"the local copy: --{name} PATH"
            raise UserError(
                f"--{name} {source}: not on this machine, and cannot be read from the hub "
                f"({type(error).__name__}); check the name, or download it elsewhere (hf download "
                f"{repo[1]} --repo-type {kind}) and give {copy}"
            ) from None
