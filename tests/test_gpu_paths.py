"""What runs only on a GPU, run without one: `benchmarks/gpu.py` and the code that it calls.

Tensors are fake: they have shapes, dtypes, strides and a device, `cuda`, and no values. So what is
found is an operation that mixes devices or dtypes, that a GPU's kernel or FSDP2 does not have, or
that a CUDA graph cannot record. What is computed is tested elsewhere, on the CPU.
"""

import itertools
import re
import warnings
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp._fully_shard import (
    _fsdp_collectives,
    _fsdp_init,
    _fsdp_param_group,
    _fsdp_state,
)
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

import data
import model
import sampler
from data import Prompt, make_packs, rank_packs
from discriminator import Discriminator, judge, upcycle
from model import token_logprobs
from policy_gradient import Objective, policy_backward, rescore
from sampler import Rows, Sampling, generate
from support import decode, ranks
from support.errors import UserError
from support.flags import RunConfig
from support.huggingface import load_processor
from support.optimizer import adamw, optimizer_step
from support.ranks import shard
from tests.conftest import ROOT

GPU = torch.device("cuda", 0)
# A step that cannot be recorded is no more than a warning to a run.
pytestmark = pytest.mark.filterwarnings("error:.*without CUDA graphs")


class FakeGPU(FakeTensorMode):
    """Fake tensors on a GPU, also where torch is built without CUDA. A value that is asked for is
    1, and of the elements of a mask half are true. While `recording`, nothing can be asked for."""

    recording = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, aten = dict(kwargs or {}), torch.ops.aten
        device = getattr(kwargs.get("device"), "type", None)
        values = aten._local_scalar_dense.default, aten.nonzero.default, aten.bincount.default
        if self.recording and (func in values or device == "cpu"):
            raise RuntimeError(f"{func} is not permitted while a stream is recorded")
        if func is aten._local_scalar_dense.default:
            return torch.ones((), dtype=args[0].dtype).tolist()
        if func is aten.nonzero.default:
            true = (args[0].numel() + 1) // 2
            return args[0].new_empty(true, args[0].ndim, dtype=torch.long)
        if func is aten.bincount.default:
            return args[0].new_empty(args[2])
        if device == "meta":  # what C++ makes like another tensor, see `gpu`
            kwargs["device"] = GPU
        return super().__torch_dispatch__(func, types, args, kwargs)


class Graph:
    """A CUDA graph that refuses what cannot be recorded, and replays nothing."""

    recorded = 0

    def __init__(self, mode: FakeGPU):
        self.mode, self.replays = mode, 0

    def __enter__(self):
        self.mode.recording = True
        Graph.recorded += 1

    def __exit__(self, *error):
        self.mode.recording = False

    def replay(self):
        self.replays += 1


def idle(self: Rows) -> torch.Tensor:
    """In place of `Rows.idle`: first all slots are idle, then in turns none and three of four."""
    self.asked = getattr(self, "asked", -1) + 1
    slots = len(self.row)
    count = [slots, 0, slots * 3 // 4, 0, slots * 3 // 4, slots][min(self.asked, 5)]
    return torch.arange(count, device=self.row.device)


@pytest.fixture
def gpu(monkeypatch, request):
    """`benchmarks/gpu.py` as a module, on a fake GPU, or on one of as many as a test asks for. What
    is summed over them is 1, so each has as many packs as it makes."""
    count = getattr(request, "param", 1)
    monkeypatch.setattr(data, "world_size", lambda: 1)
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import gpu

    # C++ is told that what is on the GPU is on `meta`, for which every build has autograd.
    meta = lambda args: torch.device("meta" if args[0].is_cuda else "cpu")
    monkeypatch.setitem(fake_tensor._DISPATCH_META_HANDLERS, torch.ops.prim.device.default, meta)
    monkeypatch.setattr(FakeTensor, "is_cuda", property(lambda self: self.device.type == "cuda"))
    monkeypatch.setattr(DTensor, "device", property(lambda self: self._local_tensor.device))
    monkeypatch.setattr(fake_tensor, "CONSTANT_NUMEL_LIMIT", -1)  # small ones have no values either
    # FSDP takes the CPU's streams, which do nothing.
    for part in (_fsdp_collectives, _fsdp_init, _fsdp_param_group, _fsdp_state):
        monkeypatch.setattr(part, "_get_device_handle", lambda *args: torch.cpu)
    monkeypatch.setattr(torch.cpu, "current_device", lambda: GPU.index)
    group = _fsdp_param_group.FSDPParamGroup
    monkeypatch.setattr(group, "_validate_no_meta_params", lambda self: None)
    # Images are cut by their values, which fake ones do not have.
    monkeypatch.setattr(gpu, "prompt", text_prompt)
    monkeypatch.setattr(Rows, "idle", idle)
    monkeypatch.setattr(decode, "compiles", lambda layout: False)  # fake tensors cannot be compiled
    mode = FakeGPU()
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: Graph(mode))
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, **kwargs: graph)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    properties = SimpleNamespace(total_memory=80e9)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    taken = itertools.cycle([0, 80e9])  # in turns, a block keeps all and is computed again
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: next(taken))
    monkeypatch.setattr(Graph, "recorded", 0)
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=count)
    try:
        mesh = init_device_mesh("cuda", (count,), mesh_dim_names=("ranks",))
        monkeypatch.setattr(ranks, "init_device_mesh", lambda *args, **kwargs: mesh)
        with mode:
            yield gpu
    finally:
        dist.destroy_process_group()


def text_prompt(index: int, tokens: int, vocab: int = 0) -> Prompt:
    return Prompt(index, torch.zeros(tokens, dtype=torch.long), torch.arange(tokens).expand(3, -1))


class Clock:
    """In place of the benchmark's: the n-th call takes n seconds and no memory."""

    gpu, memory, calls = True, 0.0, 0

    def __call__(self, run, *args, **kwargs):
        self.result = run(*args, **kwargs)
        self.calls += 1
        return self.calls

    def median(self, run, repeats=1):
        return self(run)


@pytest.mark.parametrize("optimizer", ["AdamW", "SGD"])
def test_a_step_of_sft(gpu, monkeypatch, capsys, optimizer):
    room = dict(AdamW=10**12, SGD=1)[optimizer]
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (room, room))
    gpu.sft_step("tiny", Clock(), GPU, peak=1.0)
    assert optimizer in capsys.readouterr().out


def test_two_models_on_one_gpu(gpu, monkeypatch):
    """Each alone has room for AdamW's moments, and both have not."""
    policy, judge = (torch.nn.Linear(100, 100, bias=False, device=GPU) for _ in range(2))
    room = 1.1 * 16 * 100 * 100 / 0.55
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (room, room))
    named = [gpu.trained(policy, GPU)[2], gpu.trained(judge, GPU, beside=policy)[2]]
    assert named == ["AdamW", "SGD"]


@pytest.mark.parametrize("varlen", [True, False])
def test_decoding(gpu, monkeypatch, varlen):
    """Also as on a GPU that has no ragged attention."""
    monkeypatch.setattr(sampler, "has_varlen", lambda tensor: varlen)
    gpu.decode("tiny", Clock(), GPU, copied=1.0)
    assert Graph.recorded > 0


@pytest.mark.parametrize("judged_by", [None, "tiny"])
def test_a_step_of_reinforcement(gpu, monkeypatch, world, judged_by):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (10**12, 10**12))
    processor = load_processor(world["init"])
    gpu.rl_step("tiny", Clock(), GPU, processor, judged_by)
    assert Graph.recorded > 0


@pytest.mark.parametrize("algorithm", ["dapo", "gspo"])
def test_steps_off_the_policy_with_a_reference(gpu, algorithm):
    policy, reference = (shard(gpu.make("tiny", GPU), GPU) for _ in range(2))
    prompts = [text_prompt(i, 30) for i in range(2)]
    groups = generate(policy, prompts, Sampling(4, 8, max_rollout_rows=6))
    packs = rank_packs(groups, None)
    rescore(policy, packs, groups, temperature=0.9)
    objective = Objective(algorithm, 0.2, 0.2, 3.0, temperature=0.9, beta=0.1, on_policy=False)
    policy_backward(policy, packs, groups, torch.ones(2, 4), objective, reference)


@pytest.mark.parametrize("gpu", [1, 8, 16], indirect=True)
def test_experts(gpu, world):
    """Those that each rank holds a part of are whole again in a forward, as `grouped_mm` takes
    them, and so is their gradient."""
    backbone = gpu.make("tiny", GPU).base_model
    upcycle(backbone.language_model.layers, torch.Generator())
    with GPU:
        discriminator = shard(Discriminator(backbone, "dedicated"), GPU)
    comparisons = gpu.comparisons(2048)[:2]
    judge(discriminator, comparisons, load_processor(world["init"]), 16384, backward=True)
    optimizer_step(discriminator, adamw(discriminator, 0.0), 1e-6, 1.0)


class Products(TorchDispatchMode):
    """The dtypes of the matrix products that are `width` wide."""

    def __init__(self, width: int):
        super().__init__()
        self.width, self.dtypes = width, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if re.search(r"aten\.(mm|bmm|addmm|linear|matmul)\.", str(func)) and len(out.shape) > 1:
            self.dtypes += [out.dtype] if out.shape[-1] == self.width else []
        return out


def test_logits_are_not_rounded(gpu):
    """Those of scores, of their gradient, of prompts and of samples, of a policy in bfloat16."""
    policy = shard(gpu.make("tiny", GPU), GPU)
    prompts, vocab = [text_prompt(i, 30) for i in range(2)], policy.lm_head.weight.shape[0]
    with Products(vocab) as sampled:
        groups = generate(policy, prompts, Sampling(4, 8))
    (pack,) = make_packs(groups)
    with Products(vocab) as scored:
        logp, _ = token_logprobs(policy, pack.to(GPU))
        logp.sum().backward()
    assert len(sampled.dtypes) > 2 and len(scored.dtypes) == 2
    assert {*sampled.dtypes, *scored.dtypes} == {torch.float32}


def test_the_machine(gpu):
    gpu.machine(Clock(), GPU)


def test_a_new_size_of_an_image_makes_no_plan(gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda number: None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: GPU.index)
    before = torch.backends.cuda.cudnn_sdp_enabled()
    try:
        assert ranks.join_ranks() == GPU and not torch.backends.cuda.cudnn_sdp_enabled()
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


def test_ranks_wait_for_each_other_as_long_on_a_gpu(monkeypatch):
    """Also in eval.py, which has no --timeout."""
    given = {}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda number: None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.backends.cuda, "enable_cudnn_sdp", lambda enabled: None)
    monkeypatch.setattr(dist, "init_process_group", lambda *args, **more: given.update(more))
    ranks.join_ranks()
    assert given["timeout"].total_seconds() == 60 * RunConfig.timeout


def test_more_processes_than_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    torchrun = dict(RANK=4, WORLD_SIZE=8, MASTER_ADDR="127.0.0.1", MASTER_PORT=29500)
    for name, value in torchrun.items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(UserError, match="but LOCAL_RANK is not as torchrun sets it"):
        ranks.join_ranks()
    monkeypatch.setenv("LOCAL_RANK", "4")
    with pytest.raises(UserError, match="this process sees 4 GPUs; give --nproc_per_node=4, or"):
        ranks.join_ranks()


@pytest.mark.parametrize(
    "visible, said",
    [
        (None, True),
        ("0", True),
        ("GPU-8932f937", True),
        ("", False),
        ("-1", False),
        ("NoDevFiles", False),
    ],
)
def test_a_gpu_that_torch_cannot_use_is_no_secret(monkeypatch, capsys, visible, said):
    """A torch for the CPU, or for a newer driver, would take hours before anybody noticed."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(ranks, "DRIVER", str(ROOT))
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert ranks.join_ranks() == torch.device("cpu")
    line = "computing on the CPU: this machine has an NVIDIA driver, but torch"
    assert (line in capsys.readouterr().err) == said


def test_ratios_in_bfloat16(monkeypatch):
    """With values, on the CPU: transformers' side reads those of the images."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import gpu

    gpu.ratios("tiny", Clock(), torch.device("cpu"), None)


@pytest.mark.parametrize("capability, has", [((7, 5), False), ((8, 0), True), ((9, 0), True)])
def test_ragged_attention_where_a_gpu_has_it(monkeypatch, capability, has):
    """From Ampere on. An older GPU attends as a CPU does, and this is said once."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    model._is_ampere.cache_clear()
    tensor = SimpleNamespace(is_cuda=True, device=GPU)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert [model.has_varlen(tensor) for _ in range(3)] == [has] * 3
    found = [str(w.message)[:33] for w in said]
    assert found == ([] if has else ["cuda:0 has compute capability 7.5"])
    model._is_ampere.cache_clear()
