"""The command line: what a stage takes where a flag is not given, the published defaults, the range
of every number, and the one line that says what is wrong with a flag or a variable."""

import dataclasses
import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import get_args, get_type_hints

import pytest

from align import AlignConfig
from discriminator import DiscriminatorConfig
from eval import EvalConfig
from rlvr import RLVRConfig
from sft import SFTConfig
from support import digits
from support.errors import UserError
from support.flags import check_ranges, parse
from tests.conftest import ROOT
from tests.runs import refused

# field: SFT, discriminator, alignment, RLVR as published; None where a stage has no such field or
# takes it from the algorithm
PUBLISHED = {
    "learning_rate": (1e-5, 1e-5, 1e-6, 1e-6),
    "lr_scheduler_type": ("cosine", "cosine", "constant", "constant"),
    "warmup_steps": (0.1, 0.1, 0.0, None),
    "weight_decay": (0.0, 0.01, 0.01, None),
    "num_train_epochs": (1, 1, None, None),
    "max_steps": (-1, -1, 500, 1500),
    "per_device_train_batch_size": (2, 2, None, None),
    "prompts_per_step": (None, None, 4, 32),
    "gradient_accumulation_steps": (1, 4, None, None),
    "num_generations": (None, None, 16, 16),
    "temperature": (None, None, 1.0, 1.0),
    "max_prompt_length": (None, None, 2048, 2048),
    "max_completion_length": (None, 6144, 6144, 8192),
    "max_length": (8192, 8192, None, None),
    "max_grad_norm": (1.0, 1.0, 1.0, 1.0),
    "score_l2": (None, 0.001, 0.001, None),
    "router_aux_loss_coef": (None, 0.01, 0.01, None),
    "alpha": (None, None, 0.5, None),
    "format_penalty": (None, None, 1.5, None),
    "epsilon": (None, None, 0.2, None),
}


def test_the_published_values_are_the_defaults():
    configs = SFTConfig(), DiscriminatorConfig(), AlignConfig(), RLVRConfig()
    for name, values in PUBLISHED.items():
        assert tuple(getattr(config, name, None) for config in configs) == values, name


# --------------------------------------------------------------------------------------------------
# The command line

# What a stage starts from where nothing is given, and the command that makes each of these.
STARTS = {
    SFTConfig: {"model": "out/digits/base"},
    DiscriminatorConfig: {"model": "out/digits/base", "policy": "out/sft"},
    AlignConfig: {"ckpt": "out/sft", "discriminator": "out/discriminator"},
    RLVRConfig: {"ckpt": "out/align"},
    EvalConfig: {"ckpt": "out/rlvr"},
}
BASE = "python sft.py --model out/digits/init --data digits --output_dir out/digits/base"
MADE_BY = {
    "out/digits/base": BASE,
    "out/sft": "python sft.py",
    "out/discriminator": "python discriminator.py",
    "out/align": "python align.py",
    "out/rlvr": "python rlvr.py",
}
STAGES = list(STARTS)
each_stage = pytest.mark.parametrize("stage", STAGES)


def made(world, path: str) -> None:
    """What a stage of the embedded world would have left there, as far as a command line looks."""
    os.makedirs(path)
    shutil.copy(f"{world['init']}/config.json", path)


@pytest.fixture
def command_line(world, tmp_path, monkeypatch, capsys):
    """(stage's dataclass, *words) -> (what flags.parse makes of them, the lines that it says). The
    embedded world is the tests' own, and in this directory every stage has run."""
    monkeypatch.setattr(digits, "build", lambda *args: world)
    monkeypatch.setattr(sys.modules["__main__"], "__doc__", "A stage.")
    monkeypatch.chdir(tmp_path)
    for path in ("out/digits/init", *MADE_BY):
        made(world, path)

    def read(config_class, *words):
        monkeypatch.setattr(sys, "argv", ["stage.py", *map(str, words)])
        config = parse(config_class)
        return config, capsys.readouterr().err.splitlines()

    return read


def settings_of(config, stage) -> dict:
    """The fields that the embedded world has settings for."""
    return {name: getattr(config, name) for name in digits.SETTINGS[stage.stage]}


def model_flag(stage) -> str:
    return "--model" if hasattr(stage(), "model") else "--ckpt"


def split_of(stage) -> str:
    return digits.SPLITS[stage.stage]


@each_stage
@pytest.mark.parametrize("words", [(), ("--data", "digits")])
def test_with_nothing_given_a_stage_runs_on_the_embedded_world(command_line, world, stage, words):
    config, said = command_line(stage, *words)
    (line,) = said
    assert "built-in digits" in line and config.data[0] in line and "own settings" in line
    assert config.data == [world[split_of(stage)]]
    assert {name: getattr(config, name) for name in STARTS[stage]} == STARTS[stage]
    assert settings_of(config, stage) == digits.SETTINGS[stage.stage]
    assert settings_of(config, stage) != settings_of(stage(), stage)


@each_stage
def test_what_a_stage_lacks_is_said_with_the_command_that_makes_it(command_line, world, stage):
    """No stage starts another one. What is named on the command line is not asked for."""
    for name, path in STARTS[stage].items():
        shutil.rmtree(path)
        with pytest.raises(UserError) as error:
            command_line(stage)
        assert str(error.value) == f"{path} is not there yet; make it with: {MADE_BY[path]}"
        config, _ = command_line(stage, f"--{name}", world["init"], "--data", "digits")
        assert getattr(config, name) == world["init"]
        made(world, path)
    command_line(stage)


def test_who_does_what_is_said_comes_through_the_whole_chain(command_line, world):
    """From nothing to an evaluation. Each command writes where the next one looks."""
    for path in MADE_BY:
        shutil.rmtree(path)
    scripts = {f"{stage.stage}.py": stage for stage in STAGES}
    wanted, done = ["python eval.py"], []
    while wanted:
        _, script, *words = shlex.split(wanted[-1])
        try:
            config, _ = command_line(scripts[script], *words)
        except UserError as error:
            command = str(error).split("; make it with: ")[1]
            assert command not in wanted + done
            wanted.append(command)
            continue
        if script != "eval.py":
            made(world, config.output_dir)
        done.append(wanted.pop())
    assert done == [*MADE_BY.values(), "python eval.py"]


def test_alignment_without_an_sft_policy_is_one_line(world, tmp_path):
    """As a user sees it. Nothing is started, and nothing written."""
    built = shutil.copytree(Path(world["init"]).parent, tmp_path / "out" / "digits")
    # Taken for the world of full size, it is not built anew.
    (built / "world.json").write_text(json.dumps(asdict(digits.World())))
    command, pipes = [sys.executable, ROOT / "align.py"], dict(capture_output=True, text=True)
    done = subprocess.run(command, cwd=tmp_path, timeout=300, **pipes)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == "error: out/sft is not there yet; make it with: python sft.py\n"
    assert os.listdir(tmp_path / "out") == ["digits"]


@each_stage
def test_its_own_model_on_its_data_has_its_settings(command_line, world, trained, stage):
    """A policy that was trained from its base is its own, too. Flags that are given count. SFT of
    the model with random weights is the pretraining."""
    for model in (world["init"], trained):
        given = ("--max_completion_length", 7) if stage is not SFTConfig else ("--max_steps", 7)
        config, (line,) = command_line(stage, model_flag(stage), model, "--data", "digits", *given)
        pretrain = stage is SFTConfig and model == world["init"]
        assert config.data == [world["pretrain" if pretrain else split_of(stage)]]
        assert "own settings" in line and model in line
        assert getattr(config, model_flag(stage)[2:]) == model
        own = digits.SETTINGS["pretrain" if pretrain else stage.stage] | {given[0][2:]: given[1]}
        assert {name: getattr(config, name) for name in own} == own


@each_stage
def test_another_model_on_its_data_has_the_published_settings(command_line, world, tmp_path, stage):
    other = shutil.copytree(world["init"], tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    assert config.pop("embedded_world") == "digits"
    (other / "config.json").write_text(json.dumps(config))
    flags = (model_flag(stage), other, "--data", "digits")
    more = ("--discriminator", other) if stage is AlignConfig else ()
    config, (line,) = command_line(stage, *flags, *more)
    assert config.data == [world[split_of(stage)]] and "the published settings" in line
    assert settings_of(config, stage) == settings_of(stage(), stage)


@each_stage
def test_a_model_on_other_data_has_the_published_settings(command_line, world, stage):
    more = ("--discriminator", world["init"]) if stage is AlignConfig else ()
    data = [world["sft"], world["prompts"]]
    config, said = command_line(stage, model_flag(stage), world["init"], "--data", *data, *more)
    assert said == [] and config.data == data
    assert settings_of(config, stage) == settings_of(stage(), stage)


@each_stage
def test_a_model_without_data_takes_the_published_data(command_line, world, stage):
    """Which cannot be had offline: the line names the data set and the remedy."""
    more = ("--discriminator", world["init"]) if stage is AlignConfig else ()
    if stage is EvalConfig:  # a checkpoint is measured on what the user names
        config, said = command_line(stage, "--ckpt", world["init"])
        assert config.data == [] and said == []
        return
    with pytest.raises(UserError) as error:
        command_line(stage, model_flag(stage), world["init"], *more)
    published = stage().data[0]
    assert str(error.value).startswith(f"--data {published}: not on this machine")
    repo = "/".join(published.removeprefix("hf://datasets/").split("/")[:2])
    assert f"hf download {repo} --repo-type dataset" in str(error.value)
    assert str(error.value).endswith("give a file of the local copy: --data FILE")


@each_stage
@pytest.mark.parametrize(
    "words",
    [("--max_step", 3), ("--learning-ratee", 1), ("--dat", "digits"), ("--seed_ 3",), ("rows",)],
)
def test_flags_that_do_not_exist_are_refused(command_line, stage, words):
    """Abbreviations and typos alike, before anything is built or read."""
    with pytest.raises(UserError, match=f"{words[0]}.*no such flag") as error:
        command_line(stage, *words)
    assert "\n" not in str(error.value)


@each_stage
@pytest.mark.parametrize("second", [("--data", "b.jsonl"), ("--data=b.jsonl",)])
def test_data_given_twice_are_refused(command_line, stage, second):
    """The second would silently replace the first."""
    with pytest.raises(UserError, match="^--data is given twice; give it once, with all its"):
        command_line(stage, "--data", "a.jsonl", *second)


def test_a_model_that_is_not_there_is_named_at_once(command_line, world, monkeypatch, tmp_path):
    """Before the hub or the data is looked at: the command that makes it, or what it may mean."""
    made(world, tmp_path / "here/out/demo/base")
    monkeypatch.chdir(tmp_path / "here")
    os.makedirs("rows")
    shutil.copy(world["test"], "rows/mine.jsonl")
    with pytest.raises(UserError, match=r"neither in rows nor .* did you mean rows/mine.jsonl\?"):
        command_line(EvalConfig, "--ckpt", world["init"], "--data", "rows/mine.jsnl")
    monkeypatch.setattr("support.flags.HfApi", None)
    told = {
        (RLVRConfig, "--ckpt", "align_out"): "make it with: python align.py --ckpt CKPT "
        "--discriminator DISCRIMINATOR --output_dir align_out",
        (AlignConfig, "--discriminator", "d_out"): "make it with: python discriminator.py "
        "--model MODEL --output_dir d_out",
        (DiscriminatorConfig, "--policy", "./sft_out"): "make it with: python sft.py --model MODEL "
        "--output_dir ./sft_out",
        (EvalConfig, "--ckpt", "out/sft"): "make it with: python sft.py",
        (SFTConfig, "--model", "out/demo/bsae"): "did you mean out/demo/base?",
        (SFTConfig, "--model", "gpt2"): "name an existing one, or a hub id OWNER/NAME",
    }
    for (stage, flag, source), remedy in told.items():
        for more in ("--dry_run", 8), ("--data", "nothing.jsonl"):
            with pytest.raises(UserError) as error:
                command_line(stage, flag, source, *more)
            said = str(error.value)
            assert said.startswith(f"{flag} {source}: there is no such directory; ")
            assert said.endswith(remedy)


# --------------------------------------------------------------------------------------------------
# Ranges, and what torchrun sets

CONFIGS = {c.__name__: c for c in (SFTConfig, DiscriminatorConfig, AlignConfig, RLVRConfig)}
CONFIGS["EvalConfig"] = EvalConfig


def numeric_fields() -> list[tuple[str, str, type, tuple]]:
    """(stage, field, int or float, its range) of every number among the flags."""
    found = []
    for stage, config in CONFIGS.items():
        for name, hint in get_type_hints(config, include_extras=True).items():
            kinds = [k for k in (hint, *get_args(hint)) if hasattr(k, "__metadata__")]
            assert kinds or not {hint, *get_args(hint)} & {int, float}, (stage, name)
            if kinds:
                found.append((stage, name, get_args(kinds[0])[0], kinds[0].__metadata__))
    return found


@pytest.mark.parametrize("stage, name, kind, limits", numeric_fields())
def test_every_number_has_a_range(stage, name, kind, limits):
    """What is below or above is one line that names the flag and the range; the ends are fine."""
    low, high = limits
    outside = [low - 1, -math.inf if kind is float else -(10**30)]
    outside += [math.nan, math.inf] if kind is float else [10**20]
    outside += [high + 1] if high < 1e300 else []
    for value in outside:
        with pytest.raises(UserError, match=f"^--{name} {re.escape(str(value))}: must be") as said:
            check_ranges(dataclasses.replace(CONFIGS[stage](), **{name: value}))
        assert "\n" not in str(said.value)
    for value in (low, high if high < 1e300 else low + 10):
        check_ranges(dataclasses.replace(CONFIGS[stage](), **{name: value}))


@pytest.mark.parametrize("stage", CONFIGS)
def test_the_defaults_are_inside_their_ranges(stage):
    check_ranges(CONFIGS[stage]())


@pytest.mark.parametrize(
    "flags, said",
    [
        (("--save_total_limit", -1), "--save_total_limit -1: must be at least 1"),
        (("--save_steps", 0), "--save_steps 0: must be at least 1"),
        (("--per_device_train_batch_size", 0), "must be at least 1"),
        (("--max_grad_norm", 0), "--max_grad_norm 0.0: must be at least 1e-09 and at most"),
        (("--learning_rate", "inf"), "--learning_rate inf: must be"),
        (("--num_train_epochs", -2), "--num_train_epochs -2.0: must be at least"),
        (("--seed", 10**12), f"--seed {10**12}: must be"),
        (("--save_steps", "often"), "invalid"),
        (("--report_to", "paper"), "invalid choice: 'paper' (choose from"),
        (("--max_steps", 10**20), f"--max_steps {10**20}: must be at least"),
        (("--per_device_train_batch_size", 10**20), "and at most 2147483647"),
        (("--output_dir", "README.md/out"), "README.md/out: Not a directory"),
        (("--output_dir", ""), "--output_dir . is not empty"),
        (("--lr_scheduler_type", "linaer"), "invalid choice: 'linaer' (choose from"),
    ],
)
def test_a_flag_outside_its_range_is_one_line(nursery, short, tmp_path, flags, said):
    base = short("sft.py")
    words = (*base, "--output_dir", tmp_path / "out", *flags)
    refused(nursery.start(*words, log=tmp_path / "log"), said)
    assert not (tmp_path / "out" / "metrics.jsonl").exists()


@pytest.mark.parametrize(
    "env", [dict(RANK=0), dict(RANK=1, WORLD_SIZE=2), dict(RANK="x"), dict(RANK="")]
)
def test_a_part_of_what_torchrun_sets(nursery, short, tmp_path, env):
    """As a scheduler may leave it behind."""
    words = (*short("sft.py"), "--output_dir", tmp_path / "out")
    line = refused(nursery.start(*words, log=tmp_path / "log", **env), "RANK is set", "torchrun")
    assert "MASTER_ADDR" in line and ("WORLD_SIZE" in line) == ("WORLD_SIZE" not in env)
    assert not (tmp_path / "out").exists()


def test_no_text_moves_the_cursor(nursery, trained, tmp_path):
    """What a run says of its data and flags shows escape codes, and does not send them."""
    code = "\x1b[31m"
    rows = tmp_path / "rows.jsonl"
    row = {"question": "What?", "image": f"{code}.png", "response": "x"}
    rows.write_text((json.dumps(row) + "\n") * 4)
    for number, data in enumerate([rows, f"{code}.jsonl"]):
        words = ("--model", trained, "--data", data, "--output_dir", tmp_path / str(number))
        started = nursery.start("sft.py", *words, log=tmp_path / "log")
        assert "\\x1b[31m" in refused(started) and "\x1b" not in started.said


NO_LOGIN = '''"""Stage 1, with a wandb that nobody has logged in to."""

import sys
import types

import sft
from support.ending import main


def init(**settings):
    raise RuntimeError("api_key not configured (no-tty). call wandb.login()")


sys.modules["wandb"] = types.SimpleNamespace(init=init, finish=lambda: None)
main(sft.train)
'''


@pytest.mark.parametrize(
    "name, value",
    [
        ("RANK", 2),
        ("MASTER_PORT", 65536),
        ("MASTER_PORT", 0),
        ("WORLD_SIZE", 0),
        ("LOCAL_RANK", -1),
    ],
)
def test_what_torchrun_would_never_set(nursery, short, tmp_path, name, value):
    """Torch waits for a rank beyond the last one, and at port 0 listens where no other rank asks.
    At a port that is too large it ends with a traceback."""
    env = dict(RANK=0, WORLD_SIZE=2, LOCAL_RANK=0, MASTER_ADDR="127.0.0.1", MASTER_PORT=29500)
    words = (*short("sft.py"), "--output_dir", tmp_path / "out")
    started = nursery.start(*words, log=tmp_path / "log", **env | {name: value})
    refused(started, f"RANK is set, but {name} is not as torchrun sets it")


@pytest.mark.parametrize("script", ["sft", "discriminator", "eval"])
def test_without_docstrings_transformers_cannot_be_imported(script):
    words = [sys.executable, "-OO", "-c", f"import {script}"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and not done.stdout
    assert done.stderr == (
        "error: python -OO (PYTHONOPTIMIZE=2) leaves out the docstrings, which transformers "
        "reads; start without it\n"
    )


def test_wandb_without_a_login_leaves_nothing_behind(nursery, short, tmp_path):
    """So the same command works once there is one, or without it."""
    script, out = tmp_path / "stage.py", tmp_path / "out"
    script.write_text(NO_LOGIN)
    words = (*short("sft.py")[1:], "--max_steps", 1, "--output_dir", out)
    report = ("--report_to", "wandb")
    line = refused(nursery.start(script, *words, *report, log=tmp_path / "log"))
    assert "--report_to wandb: it does not start (api_key not configured" in line
    assert "run `wandb login`, or set WANDB_MODE=offline" in line
    done = nursery.run(script, *words, log=tmp_path / "log")
    assert done.codes == [0], done.said


def test_the_largest_seed_works(nursery, short, tmp_path):
    base = short("sft.py")
    words = (*base, "--seed", 2**32 - 1, "--max_steps", 1, "--output_dir", tmp_path / "out")
    done = nursery.run(*words, log=tmp_path / "log")
    assert done.codes == [0], done.said
