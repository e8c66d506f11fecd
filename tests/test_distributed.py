"""The same global batch on 1, 2 and 4 gloo ranks gives the same numbers."""

import json
import os
import shutil
import subprocess
import sys
from subprocess import PIPE
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from data import SYSTEM_PROMPT, encode_prompts
from discriminator import load_discriminator
from support.huggingface import load_processor, processor_files, write_files
from support.ranks import shard
from support.rows import load_data
from tests.chaos import free_port
from tests.conftest import ROOT, launch
from tests.test_other_models import llava, qwen2_5_vl


def metrics(path, name="loss"):
    return [json.loads(line)[name] for line in open(path / "metrics.jsonl")]


def test_sft_loss_is_the_same_on_any_number_of_ranks(world, tmp_path):
    losses = {}
    for ranks in (1, 2, 4):
        launch(
            "sft.py",
            "--model",
            world["init"],
            "--data",
            world["sft"],
            "--output_dir",
            tmp_path / str(ranks),
            "--max_steps",
            5,
            "--learning_rate",
            1e-3,
            "--warmup_steps",
            0,
            "--per_device_train_batch_size",
            8 // ranks,
            "--max_tokens_per_pack",
            300,
            ranks=ranks,
        )
        losses[ranks] = metrics(tmp_path / str(ranks))
        padding, idle = (metrics(tmp_path / str(ranks), f"{n}_share") for n in ("padding", "idle"))
        assert max(padding) < 0.2 and max(idle) < 0.7  # of very few rows a rank
        assert (ranks == 1) == (set(padding) == set(idle) == {0})
    assert len(losses[1]) == 5 and losses[1][0] - losses[1][-1] > 0.1  # it moves
    assert losses[2] == pytest.approx(losses[1], rel=1e-5)
    assert losses[4] == pytest.approx(losses[1], rel=1e-5)


def test_padding_moves_no_weight(world, tmp_path):
    """Four rows without images, a pack each. One rank has the long one, the other the three short
    ones. So the first adds blank packs, and the vision tower stays as it is, also under weight
    decay."""
    rows = [{"question": "Count.", "response": "one " * n} for n in (1, 1, 1, 200)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ("--model", world["init"], "--data", tmp_path / "rows.jsonl", "--max_steps", 2)
    flags += ("--learning_rate", 1e-2, "--weight_decay", 0.5, "--output_dir", tmp_path / "out")
    flags += ("--per_device_train_batch_size", 2, "--max_tokens_per_pack", 1)
    flags += ("--system_prompt", "Count.")
    launch("sft.py", *flags, ranks=2)
    assert max(metrics(tmp_path / "out", "padding_share")) > 0
    before, after = (load_file(f"{p}/model.safetensors") for p in (world["init"], tmp_path / "out"))
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved and not any(".visual." in name for name in moved)


def test_max_pixels_is_the_same_on_any_number_of_ranks(world, tmp_path):
    """Photos of 256 tokens, which are to be 16; one row has none."""
    rows = []
    for i in range(7):
        Image.effect_noise((256, 256), 50).save(tmp_path / f"{i}.jpg")
        rows.append({"question": "What is it?", "image": f"{i}.jpg", "response": f"Photo {i}."})
    rows.append({"question": "What is it?", "response": "Nothing."})
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ("--model", world["init"], "--data", tmp_path / "rows.jsonl", "--max_steps", 2)
    flags += ("--learning_rate", 1e-3, "--max_pixels", 4096)
    for ranks in (1, 2):
        size = ("--per_device_train_batch_size", 8 // ranks)
        launch("sft.py", *flags, "--output_dir", tmp_path / str(ranks), *size, ranks=ranks)
    assert metrics(tmp_path / "2") == pytest.approx(metrics(tmp_path / "1"), rel=1e-5)
    prompts = encode_prompts(
        load_processor(world["init"]),
        load_data(str(tmp_path / "rows.jsonl"), system_prompt=SYSTEM_PROMPT),
    )
    whole = sum(len(prompt.input_ids) for prompt in prompts)
    responses = 8 * metrics(tmp_path / "2", "response_length")[0]
    assert metrics(tmp_path / "2", "tokens")[0] == whole + responses - 7 * 240


def test_policy_and_discriminator_are_the_same_on_any_number_of_ranks(world, trained, tmp_path):
    results = {}
    for ranks in (1, 2, 4):
        out = tmp_path / f"{ranks}.json"
        launch("tests/worker.py", out, trained, world["prompts"], ranks=ranks)
        results[ranks] = json.loads(out.read_text())
    one = results[1]
    assert abs(one["grpo_loss"] - one["gspo_loss"]) > 1e-3 and one["d_grad_norm"] > 0
    # The invalid students have no score; their teacher neither.
    assert one["scores"].count(-99.0) == 3 * 4
    assert set(one["expert_shares"]) == {"expert_share_perception", "expert_share_reasoning"}
    for ranks in (2, 4):
        other = results[ranks]
        for name in ("grpo_loss", "gspo_loss", "grad_norm", "d_grad_norm"):
            assert other[name] == pytest.approx(one[name], rel=1e-5, abs=1e-7), name
        assert other["dealt"] == one["dealt"]
        # A row's tokens are the same too, unless rounding moves a boundary across its random
        # number: one row in twelve may.
        rows = [torch.tensor(x["sampled"]).view(12, 40) for x in (one, other)]
        assert (rows[0] == rows[1]).all(1).sum() >= 11
        torch.testing.assert_close(
            torch.tensor(other["scores"]), torch.tensor(one["scores"]), atol=1e-5, rtol=0
        )
        # Shares are over all ranks; where packs are cut moves them a little.
        for name, shares in one["expert_shares"].items():
            a, b = (torch.tensor(x) for x in (shares, other["expert_shares"][name]))
            assert a.shape == (2, 4) and (b.sum(-1) - 1).abs().max() < 3e-4
            assert (a - b).abs().max() < 0.05
        for part in ("grpo_grads", "gspo_grads", "weights"):
            assert other[part].keys() == one[part].keys()
            for name, norm in one[part].items():
                assert other[part][name] == pytest.approx(norm, rel=1e-4, abs=1e-7), (part, name)


def test_a_rank_without_prompts_plays_the_game_along(world, trained, tmp_path):
    """One prompt a step on two ranks: the second one scores, rewards and learns from nothing."""
    steps = []
    for ranks in (1, 2):
        out = tmp_path / str(ranks)
        models = ("--ckpt", trained, "--discriminator", world["init"], "--data", world["prompts"])
        flags = ("--num_generations", 3, "--max_completion_length", 60, "--prompts_per_step", 1)
        launch(
            "align.py",
            *models,
            *flags,
            "--max_steps",
            1,
            "--output_dir",
            out,
            ranks=ranks,
            check=True,
        )
        steps.append(json.loads((out / "metrics.jsonl").read_text()))
        rows = (out / "rollouts.jsonl").read_text().splitlines()
        assert len(rows) == 3
    one, two = steps
    assert one["format_valid"] > 0 and one["grad_norm"] > 0 and one["d_grad_norm"] > 0
    same = ("loss", "entropy", "grad_norm", "score_gap_perception", "score_gap_reasoning")
    for name in (*same, "discriminator_loss", "d_grad_norm", "balance_loss"):
        assert two[name] == pytest.approx(one[name], rel=1e-4, abs=1e-6), name
    for name in ("prompts_without_valid", "ranks_without_valid", "tokens", "rows_left_out"):
        assert two[name] == one[name], name


def test_two_nodes_that_share_nothing_but_gradients(world, tmp_path):
    """--hsdp on two nodes of two ranks, each node under its own torchrun, is one process."""
    flags = ["--model", world["init"], "--data", world["sft"], "--max_steps", 3]
    flags += ["--learning_rate", 1e-3, "--warmup_steps", 0]
    one = ["--output_dir", tmp_path / "1", "--per_device_train_batch_size", 8]
    launch("sft.py", *flags, *one)
    four = ["--output_dir", tmp_path / "4", "--per_device_train_batch_size", 2, "--hsdp", True]
    port = free_port()
    nodes = ["--nnodes=2", "--nproc_per_node=2", "--master_addr=127.0.0.1", f"--master_port={port}"]
    start = [sys.executable, "-m", "torch.distributed.run", *nodes]
    command = [*map(str, ["sft.py", *flags, *four])]
    quiet = {**os.environ, "TQDM_DISABLE": "1"}
    both = [
        subprocess.Popen([*start, f"--node_rank={i}", *command], cwd=ROOT, env=quiet, stderr=PIPE)
        for i in range(2)
    ]
    said = [process.communicate(timeout=600)[1].decode()[-3000:] for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    for name in ("loss", "grad_norm"):  # Adam would not show a gradient of another scale
        assert metrics(tmp_path / "4", name) == pytest.approx(
            metrics(tmp_path / "1", name), rel=1e-5
        )
    ours, theirs = (load_file(tmp_path / n / "model.safetensors") for n in ("4", "1"))
    assert ours.keys() == theirs.keys()
    gap = sum((ours[name] - w).double().square().sum() for name, w in theirs.items()).sqrt()
    assert gap < 1e-5 * sum(w.double().square().sum() for w in theirs.values()).sqrt()


def test_a_frozen_vision_tower_stays_as_it_is(world, tmp_path):
    """On two ranks, with checkpointing; and the discriminator's by the same call."""
    flags = ["--model", world["init"], "--data", world["sft"], "--max_steps", 2]
    flags += ["--freeze_vision", True, "--activation_checkpointing", True]
    launch("sft.py", *flags, "--output_dir", tmp_path / "out", ranks=2)
    before, after = (load_file(f"{x}/model.safetensors") for x in (world["init"], tmp_path / "out"))
    moved = {name for name, weight in before.items() if not torch.equal(weight, after[name])}
    assert moved == {name for name in before if ".visual." not in name}
    discriminator, _ = load_discriminator(world["init"])
    shard(discriminator, torch.device("cpu"), SimpleNamespace(freeze_vision=True))
    frozen = {name for name, p in discriminator.named_parameters() if not p.requires_grad}
    assert frozen == {name for name, _ in discriminator.named_parameters() if ".visual." in name}


AGAIN = """
import sys
import torch
from model import load_policy
from data import encode_prompts, make_packs
from support.ranks import join_ranks, rank
from model import token_logprobs
from support.rows import load_data
from support.ending import main
from sampler import Sampling, generate

def stage():
    policy, processor = load_policy(sys.argv[1], join_ranks())
    prompts = [encode_prompts(processor, [row])[0] for row in load_data(sys.argv[2])[:2]]
    for seed in (1, 2):
        groups = generate(policy, [prompts[rank()]], Sampling(3, 20, seed=seed))
        logp, _ = token_logprobs(policy, make_packs(groups)[0])
        logp.sum().backward()
        torch.testing.assert_close(logp.detach(), torch.cat(groups[0].logprobs), atol=1e-4, rtol=0)

main(stage)
"""


@pytest.mark.parametrize("family", [qwen2_5_vl, llava])
def test_sampled_and_scored_in_turns(world, tmp_path, family):
    """Sharded models of other families: sampling leaves the hooks alone that transformers adds at a
    first forward, and without which it does not find what it wants of a vision tower."""
    torch.manual_seed(0)
    family(world, tmp_path / "model")
    (tmp_path / "again.py").write_text(AGAIN)
    launch(tmp_path / "again.py", tmp_path / "model", world["prompts"], ranks=2)


# Three experts on two ranks, which share another dimension than their number, against experts that
# every rank has whole: gradients, a step, and what is saved.
EXPERTS = """
import copy
import sys
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from data import encode_prompts, parse_response
from discriminator import Comparison, Discriminator, judge, upcycle
from model import prepare_for_packs
from support import huggingface
from support.huggingface import open_discriminator, save_discriminator
from support.optimizer import optimizer_step
from support.ranks import join_ranks, rank, shard
from support.rows import load_data

device = join_ranks()
huggingface._hollow = lambda *args: None  # the model with its weights
saved = open_discriminator(sys.argv[1], ("learned",))
backbone = prepare_for_packs(saved.model).base_model
upcycle(backbone.language_model.layers, torch.Generator(), num_experts=3)
torch.manual_seed(0)
whole = Discriminator(backbone, "learned", dropout=0.0)
parts = shard(copy.deepcopy(whole), device)
parts.source = saved.model.source
placements = {p.ndim: p.placements[0].dim for p in parts.parameters()}
assert placements[3] == 1 and placements[2] == 0
rows = load_data(sys.argv[2])[4 * rank() : 4 * rank() + 4]
answers = [parse_response(row.response) for row in rows]
prompt = encode_prompts(saved.processor, rows[:1])[0]
for one in (whole, parts):
    judge(one, [Comparison(prompt, answers[0], answers[1:])], saved.processor, 400, backward=True)
for p in whole.parameters():
    p.grad = torch.zeros_like(p) if p.grad is None else p.grad
    dist.all_reduce(p.grad)
for (name, p), q in zip(whole.named_parameters(), parts.parameters()):
    if q.grad is not None:
        torch.testing.assert_close(q.grad.full_tensor(), p.grad, atol=1e-6, rtol=1e-4, msg=name)
sgd = [torch.optim.SGD(m.parameters(), lr=1.0) for m in (whole, parts)]
one, two = (optimizer_step(m, steps, 1.0, 1.0) for m, steps in zip((whole, parts), sgd))
assert abs(one / two - 1) < 1e-5, (one, two)
save_discriminator(parts, sys.argv[3])
dist.barrier()
for name, tensor in load_file(f"{sys.argv[3]}/model.safetensors").items():
    torch.testing.assert_close(tensor, whole.state_dict()[name], atol=1e-5, rtol=1e-4, msg=name)
print(f"equal {rank()}", flush=True)
"""


def test_experts_that_are_shared_in_another_dimension(world, trained, tmp_path):
    (tmp_path / "experts.py").write_text(EXPERTS)
    out = tmp_path / "out"
    out.mkdir()
    words = trained, world["prompts"], out
    done = launch(tmp_path / "experts.py", *words, ranks=2)
    assert "equal 0" in done.stdout and "equal 1" in done.stdout


GROUPS = """
import copy
import datetime
import os
from types import SimpleNamespace
import torch
from support.ranks import join_ranks, rank, shard
from support.resuming import checksum_of

os.environ["LOCAL_WORLD_SIZE"] = "1"  # two nodes of one rank
device = join_ranks(datetime.timedelta(minutes=7))
torch.manual_seed(0)
linear = torch.nn.Linear(4, 4)
everywhere = shard(copy.deepcopy(linear), device)
module = shard(linear, device, SimpleNamespace(hsdp=True, timeout=7.0))
assert checksum_of(module) == checksum_of(everywhere)
mesh = module.weight.device_mesh
assert mesh.shape == (2, 1) and mesh.mesh_dim_names == ("nodes", "ranks")
limits = {g._get_backend(device).options._timeout for g in mesh.get_all_groups()}
assert limits == {datetime.timedelta(minutes=7)}, limits
module(torch.ones(1, 4)).sum().backward()
assert torch.equal(module.weight.grad.full_tensor(), torch.full((4, 4), 2.0))
print(f"equal {rank()}", flush=True)
"""


def test_groups_of_nodes_wait_as_long_as_others(tmp_path):
    """And a checksum counts a weight once that two nodes have."""
    (tmp_path / "groups.py").write_text(GROUPS)
    done = launch(tmp_path / "groups.py", ranks=2)
    assert "equal 0" in done.stdout and "equal 1" in done.stdout


# Each rank's part of a discriminator equals that of one which every rank loads whole.
JUDGES = """
import gc
import sys
import discriminator
import torch
from discriminator import Experts, load_discriminator, upcycle
from support import huggingface
from support.huggingface import save_discriminator
from support.ranks import join_ranks, rank, world_size
from torch.distributed.tensor import DTensor

def loaded(path):
    ours, _ = load_discriminator(path, seed=3, device=device)
    parameters = dict(ours.named_parameters())
    whole = {n: getattr(p, "full_tensor", lambda: p)().detach() for n, p in parameters.items()}
    return ours, whole | dict(ours.named_buffers())

def watched(layers, generator):
    upcycle(layers, generator)
    experts = [m for m in gc.get_objects() if type(m) is Experts]
    whole = [m for m in experts if not isinstance(m.down_proj, DTensor)]
    assert world_size() == 1 or len(whole) == 1, len(whole)

device, hollow, found = join_ranks(), huggingface._hollow, []

def counted(*args):
    found.append(hollow(*args) is not None)
    return hollow(*args)

discriminator.upcycle = watched
path, released, saved = sys.argv[1:]
for source in (path, saved, released):
    huggingface._hollow = counted
    ours, mine = loaded(source)
    huggingface._hollow = lambda *args: None
    _, expected = loaded(source)
    assert mine.keys() == expected.keys()
    for name in mine:
        assert mine[name].dtype == torch.float32 == expected[name].dtype
        assert torch.equal(mine[name], expected[name]), name
    assert all(p.requires_grad for p in ours.parameters())
    if world_size() > 1:
        held = sum(p.to_local().numel() for p in ours.parameters())
        assert held < 0.6 * sum(p.numel() for p in ours.parameters())
    if source == path:
        save_discriminator(ours, saved)
assert found == [True] * 3
print(f"equal {rank()}", flush=True)
"""


@pytest.mark.parametrize("ranks", [1, 2])
def test_loading_a_discriminator_by_shard(trained, tmp_path, ranks):
    """A dense model that is upcycled, one of ours, and one as released, whose experts lie
    transposed: the same weights bit by bit, on any number of ranks. While a dense model is
    upcycled, one layer is whole."""
    (tmp_path / "judges.py").write_text(JUDGES)
    released = tmp_path / "released"
    write_files(released, processor_files(trained))
    for name in ("config.json", "model.safetensors"):
        shutil.copy(ROOT / "tests/released" / name, released)
    words = trained, released, tmp_path / "saved"
    done = launch(tmp_path / "judges.py", *words, ranks=ranks)
    assert all(f"equal {r}" in done.stdout for r in range(ranks))
