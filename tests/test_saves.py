"""What a save holds: all that was learned, in a directory that servers open as they open its
source."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

from discriminator import load_discriminator
from model import load_policy
from support import digits
from support.huggingface import rounding_loss, save_discriminator, save_policy, starting_weights
from tests.chaos import flags_of
from tests.conftest import ROOT, WORLD
from tests.runs import stopped_at


def lost(before: dict, after: dict) -> float:
    """By the files alone: the share of the update's norm that rounding takes away."""
    gone = sum((w.double() - w.bfloat16().double()).square().sum() for w in after.values())
    moved = sum((w.double() - before[n].double()).square().sum() for n, w in after.items())
    return float((gone / moved).sqrt())


def weights_of(path) -> dict:
    return load_file(Path(path) / "model.safetensors")


@pytest.fixture(scope="module")
def run(nursery, world, tmp_path_factory):
    """Runs SFT at the alignment's rate -> its directory, what it printed, its run.json."""
    folder = tmp_path_factory.mktemp("runs")

    def make(name: str, source, *flags, ranks: int = 1):
        base = flags_of("sft.py", world, str(source), str(source))
        words = (*base, "--learning_rate", 1e-6, "--warmup_steps", 0, *flags)
        out = folder / name
        done = nursery.run("sft.py", *words, "--output_dir", out, ranks=ranks, log=folder / "log")
        assert done.codes == [0] * ranks, done.said
        return out, done.said, json.loads((out / "run.json").read_text())

    return make


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_stage_hands_on_all_that_it_has_learned(run, in_bfloat16, ranks):
    """Also what bfloat16 rounds away; how much that is, it says, and run.json has it. The next
    stage begins with the very weights, and its own update is measured from them."""
    out, said, record = run(f"first-{ranks}", in_bfloat16, "--save_hf_steps", 3, ranks=ranks)
    before, after = weights_of(in_bfloat16), weights_of(out)
    assert {w.dtype for w in after.values()} == {torch.float32}
    share = lost(before, after)
    assert 0.2 < share <= 1
    assert record["rounding_loss"] == {"policy": pytest.approx(share, rel=1e-5)}
    line = (
        "the policy is saved in float32, as bfloat16 would round away {:.0%} of this run's update"
    )
    assert line.format(share) in said
    assert line.format(lost(before, weights_of(out / "checkpoint-3"))) in said
    assert (out / "config.json").read_bytes() == Path(in_bfloat16, "config.json").read_bytes()

    served = AutoModelForImageTextToText.from_pretrained(out)
    assert {p.dtype for p in served.parameters()} == {torch.bfloat16}
    begun, _ = load_policy(str(out))
    assert all(torch.equal(p, after[name]) for name, p in begun.named_parameters())

    second, _, record = run(f"second-{ranks}", out, ranks=ranks)
    share = lost(after, weights_of(second))
    assert record["rounding_loss"] == {"policy": pytest.approx(share, rel=1e-5)}


def test_a_resumed_run_measures_from_its_start(nursery, world, in_bfloat16, run, tmp_path):
    _, _, record = run("whole", in_bfloat16)
    base = ("sft.py", *flags_of("sft.py", world, in_bfloat16, in_bfloat16))
    base += ("--learning_rate", 1e-6, "--warmup_steps", 0)
    stopped_at(nursery, base, tmp_path / "out")
    again = (*base, "--output_dir", tmp_path / "out", "--resume")
    assert nursery.run(*again, log=tmp_path / "log").codes == [0]
    resumed = json.loads((tmp_path / "out" / "run.json").read_text())
    assert resumed["rounding_loss"] == record["rounding_loss"]


def test_in_float32_nothing_is_lost_and_nothing_said(run, trained):
    _, said, record = run("float32", trained)
    assert record["rounding_loss"] == {} and "would round away" not in said


def test_frozen_weights_do_not_count(run, in_bfloat16):
    """Neither do they lose anything, nor are they held twice."""
    out, _, record = run("frozen", in_bfloat16, "--freeze_vision", True)
    before, after = weights_of(in_bfloat16), weights_of(out)
    assert record["rounding_loss"]["policy"] == pytest.approx(lost(before, after), rel=1e-5)
    policy, _ = load_policy(in_bfloat16)
    whole = starting_weights(policy)
    assert whole.keys() == before.keys() and {w.dtype for w in whole.values()} == {torch.bfloat16}
    policy.model.visual.requires_grad_(False)
    assert starting_weights(policy).keys() == {n for n in before if ".visual." not in n}


def test_a_discriminators_update_begins_behind_its_upcycling(in_bfloat16, tmp_path):
    """Experts are copies with noise, so their start lies on no grid and is kept in float32."""
    discriminator, _ = load_discriminator(in_bfloat16)
    start = {n: p.detach().clone() for n, p in discriminator.named_parameters()}
    kept = starting_weights(discriminator)
    experts = [kept[name] for name in kept if ".experts." in name]
    assert {w.dtype for w in experts} == {torch.float32}
    assert rounding_loss(discriminator, kept) is None  # nothing has changed
    torch.manual_seed(0)
    for parameter in discriminator.parameters():
        parameter.data += 1e-5 * torch.randn_like(parameter)
    share = rounding_loss(discriminator, kept)
    save_discriminator(discriminator, str(tmp_path))
    after = weights_of(tmp_path)
    assert {w.dtype for w in after.values()} == {torch.float32}
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"
    assert share == pytest.approx(lost(start, after), rel=1e-5)


# --------------------------------------------------------------------------------------------------
# Who may read it


@pytest.mark.parametrize("mask, mode", [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)])
def test_files_have_the_mode_that_the_umask_gives(trained, tmp_path, mask, mode):
    policy, _ = load_policy(trained)
    before = os.umask(mask)
    try:
        save_policy(policy, str(tmp_path / "out"))
        digits.build(tmp_path / "world", digits.World(**WORLD))
    finally:
        os.umask(before)
    for path in (tmp_path / "out", tmp_path / "world" / "init"):
        modes = {file.name: file.stat().st_mode & 0o777 for file in path.iterdir()}
        assert len(modes) > 5 and set(modes.values()) == {mode}, modes


AS_ANOTHER = """
import os, sys
from types import SimpleNamespace
from discriminator import load_discriminator
from model import load_policy
import transformers.models.qwen3_vl.modeling_qwen3_vl
from support.errors import UserError
from support.flags import check_directories
from support.resuming import Checkpoints

if os.getuid() == 0:
    os.setuid(65534)  # nobody
for path in sys.argv[1:]:
    named = lambda path: check_directories(SimpleNamespace(stage="sft", model=path))
    checkpoint = lambda path: Checkpoints(path, keep=1).newest()
    loads = [load_policy, load_discriminator, named]
    for load in [checkpoint] if path.endswith("run") else loads:
        try:
            load(path)
        except UserError as error:
            print(error)
"""


def test_what_a_user_may_not_read_is_named(trained):
    """A file or the whole directory. They lie in a folder that every user reaches, unlike
    pytest's own."""
    with tempfile.TemporaryDirectory() as folder:
        folder = os.path.realpath(folder)
        os.chmod(folder, 0o755)
        paths, lines = [], []
        for name in ("model.safetensors", "tokenizer.json", "config.json", ""):
            paths.append(shutil.copytree(trained, os.path.join(folder, f"of-{name}")))
            refused = os.path.join(paths[-1], name)
            os.chmod(refused, 0)
            remedy = f"this user may not read it; ask its owner for chmod -R a+rX {paths[-1]}"
            lines += 2 * [f"{refused}: {remedy}"]
        paths.append(os.path.join(paths[-1], "model"))  # in a folder that may not be entered
        remedy = f"this user may not enter it; ask its owner for chmod a+x {refused[:-1]}"
        lines += [f"{flag}{refused[:-1]}: {remedy}" for flag in ("", "", "--model ")]
        for number in (1, 2):  # a checkpoint whose files another user may not read
            paths.append(os.path.join(folder, f"{number}run"))
            checkpoint = os.path.join(paths[-1], "checkpoint-8")
            os.makedirs(checkpoint)
            refused = os.path.join(checkpoint, "checksums.json")
            Path(refused).write_text("{}")
            os.chmod(checkpoint if number == 1 else refused, 0o600)
            remedy = f"this user may not read it; ask its owner for chmod -R a+rX {checkpoint}"
            lines.append(f"{refused}: {remedy}")
        env = os.environ | {"PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-c", AS_ANOTHER, *paths]
        done = subprocess.run(command, capture_output=True, text=True, env=env)
        os.chmod(paths[-4], 0o755)
    assert done.stdout.splitlines() == lines, done.stderr
