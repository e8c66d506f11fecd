"""Compiled layers: what is sampled with them, and what happens where they cannot be compiled."""

import os
import shutil

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard

from data import encode_prompts
from model import load_policy
from sampler import Sampling, generate
from support import decode
from support.rows import load_data
from tests.conftest import ROOT, same_samples

pytestmark = pytest.mark.filterwarnings("ignore:.*without CUDA graphs")
here = os.environ.get("CXX", "g++")
needs_compiler = pytest.mark.skipif(not shutil.which(here), reason=f"no C++ compiler {here}")


@pytest.fixture
def compiling(monkeypatch):
    """Turns compiling on, which a CPU does not do by itself, and counts the compilations."""
    torch._dynamo.reset()
    decode.compiled_layer.cache_clear()
    monkeypatch.setattr(decode, "failed", False)

    def start(**options):
        layer = decode.compiled_layer(**options)
        monkeypatch.setattr(decode, "compiled_layer", lambda: layer)
        monkeypatch.setattr(decode, "compiles", lambda layout: True)
        torch._dynamo.utils.counters.clear()
        return lambda: torch._dynamo.utils.counters["stats"]["unique_graphs"]

    yield start
    torch._dynamo.reset()


@pytest.fixture
def policy_and_prompts(world):
    policy, processor = load_policy(world["init"])
    return policy, encode_prompts(processor, load_data(world["validation"])[:2])


@needs_compiler
def test_compiled_layers_sample_the_same(policy_and_prompts, compiling):
    """By the kernels that torch writes; log-probabilities to 1e-5."""
    policy, prompts = policy_and_prompts
    policy.stop_ids = policy.stop_ids[:0]  # shapes stay, which is one compilation
    sampling = Sampling(3, 12, temperature=1.3, fixed=True)
    plain = generate(policy, prompts, sampling)
    compilations = compiling()
    compiled = generate(policy, prompts, sampling)
    assert compilations() == 1 and not decode.failed
    assert same_samples(policy, plain, compiled, 1.3) > 60


def test_all_layers_and_sizes_share_few_compilations(policy_and_prompts, compiling):
    """Sharded, while rows end, and after an update of the weights, without a further one."""
    policy, prompts = policy_and_prompts
    policy.stop_ids = torch.arange(5, 50)
    sampling = Sampling(8, 60, temperature=1.3, fixed=True)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        for layer in policy.model.language_model.layers:
            fully_shard(layer)
        fully_shard(policy)
        for updates in range(2):
            with torch.no_grad():
                for parameter in policy.parameters():
                    parameter.mul_(1.01**updates)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(decode, "compiles", lambda layout: False)
                plain = generate(policy, prompts, sampling)
            if not updates:
                compilations = compiling(backend="aot_eager")
            compiled = generate(policy, prompts, sampling)
            assert same_samples(policy, plain, compiled, 1.3) > 60
            assert 1 < compilations() <= 3 and not decode.failed
    finally:
        dist.destroy_process_group()


def test_layers_are_compiled_for_more_sizes_than_torch_would(
    policy_and_prompts, compiling, monkeypatch
):
    """By itself torch gives up after eight compilations, here after one; the prompts of a step, a
    size of 1 and the room for a row's keys alone are more in a long run."""
    monkeypatch.setattr(torch._dynamo.config, "recompile_limit", 1)
    policy, prompts = policy_and_prompts
    compilations = compiling(backend="aot_eager")
    for some in (prompts, prompts[:1], prompts):
        generate(policy, some, Sampling(3, 12, temperature=1.3, fixed=True))
    assert compilations() > 1 and not decode.failed


def test_kernels_of_a_layer(monkeypatch):
    """As the page says, also where rows have left: nothing of the cache is copied."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import decode_kernels

    plain, compiled = decode_kernels.count(ended=40)
    torch._dynamo.reset()
    said = (ROOT / "docs" / "performance.md").read_text()
    assert f"{plain} kernels as it is" in said and f"and {compiled} compiled" in said


def test_sampling_goes_on_where_layers_cannot_be_compiled(policy_and_prompts, compiling, capsys):
    """It is said once in a process."""
    policy, prompts = policy_and_prompts
    sampling = Sampling(3, 20, temperature=1.3, fixed=True)
    plain = generate(policy, prompts, sampling)
    for layer in policy.model.language_model.layers:
        layer.mlp.register_forward_hook(lambda *_: torch._dynamo.graph_break())
    compiling(backend="aot_eager")
    for _ in range(2):
        compiled = generate(policy, prompts, sampling)
        assert same_samples(policy, plain, compiled, 1.3) > 0
    (said,) = [line for line in capsys.readouterr().err.splitlines() if "compiled" in line]
    assert decode.failed and said.startswith("sampling goes on without compiled layers")


def test_a_gpu_that_is_full_is_no_failure_to_compile(policy_and_prompts, compiling, capsys):
    """The run ends, with the line that says which flags need less memory."""
    policy, prompts = policy_and_prompts
    first = policy.model.language_model.layers[0]

    def full(head, given):
        if "forward" in vars(first):  # while layers are compiled
            raise torch.OutOfMemoryError("CUDA out of memory")

    policy.lm_head.register_forward_pre_hook(full)
    compiling(backend="aot_eager")
    with pytest.raises(torch.OutOfMemoryError):
        generate(policy, prompts, Sampling(3, 20, temperature=1.3, fixed=True))
    assert "compiled" not in capsys.readouterr().err and not decode.failed
