"""The processes of a run: joining them, small sums over all of them, and sharded models.

With several processes, or on a GPU, everything is sharded by FSDP2 (`fully_shard`). On a GPU
parameters are float32, computations bfloat16, reductions float32. Gradients are summed over the
ranks, not averaged, because losses come divided by global denominators. One process on a CPU shards
nothing and computes in float32.
"""

import contextlib
import datetime
import os
import re
import sys
from functools import partial

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts
from tqdm import tqdm
from transformers.modeling_layers import GradientCheckpointingLayer

from support.errors import UserError, counted, printable

DRIVER = "/proc/driver/nvidia/version"  # is there where Linux has an NVIDIA driver
KEEP = 0.5  # share of a GPU's memory; blocks keep their activations up to it, see `recompute`

# --------------------------------------------------------------------------------------------------
# Processes


def join_ranks(timeout=datetime.timedelta(minutes=30)) -> torch.device:
    """Joins the processes that torchrun started (gloo on a CPU, nccl on a GPU). A bare `python` is
    one process. A collective that takes longer than `timeout` fails; nccl's own limit, ten minutes,
    is short for ranks that answer rows of unlike lengths. -> the device of this rank.
    UserError where the environment has only a part of what torchrun sets, or where a node has more
    processes than GPUs."""
    if "RANK" in os.environ:
        ranks = _number("WORLD_SIZE")
        sound = {
            "RANK": _number("RANK") in range(ranks if ranks > 0 else sys.maxsize),
            "WORLD_SIZE": ranks > 0,
            "MASTER_PORT": _number("MASTER_PORT") in range(1, 2**16),
            "MASTER_ADDR": bool(os.environ.get("MASTER_ADDR")),
            "LOCAL_RANK": _number("LOCAL_RANK") >= 0,
        }
        wrong = [name for name, is_sound in sound.items() if not is_sound]
        if wrong:
            raise UserError(
                f"RANK is set, but {', '.join(wrong)} is not as torchrun sets it; start the stage "
                f"by torchrun, or unset RANK for one process"
            )
    if torch.cuda.is_available():
        gpus = torch.cuda.device_count()
        local_rank = _number("LOCAL_RANK") if "RANK" in os.environ else 0
        if local_rank >= gpus:
            raise UserError(
                f"LOCAL_RANK is {local_rank}, but this process sees {counted(gpus, 'GPU')}; give "
                f"--nproc_per_node={gpus}, or show each process all GPUs of the node"
            )
        torch.cuda.set_device(local_rank)
        # torch prefers cuDNN's attention on an H100. That makes a plan for every length that it has
        # not seen, so each new size of an image would take longer than a step.
        torch.backends.cuda.enable_cudnn_sdp(False)
        if not dist.is_initialized():
            alone = dict(store=dist.HashStore(), rank=0, world_size=1)
            alone = {} if "RANK" in os.environ else alone
            dist.init_process_group("cpu:gloo,cuda:nccl", timeout=timeout, **alone)
        return torch.device("cuda", torch.cuda.current_device())
    if "RANK" in os.environ and not dist.is_initialized():
        dist.init_process_group("gloo", timeout=timeout)
    named = os.environ.get("CUDA_VISIBLE_DEVICES", "0")  # another value than a GPU hides them all
    if os.path.exists(DRIVER) and re.match(r"\d|GPU-|MIG-", named):
        say(
            f"computing on the CPU: this machine has an NVIDIA driver, but torch "
            f"{torch.__version__} finds no GPU. Either it was given none, or it is built for "
            f"another driver (docs/gpus.md)"
        )
    return torch.device("cpu")


def rank() -> int:
    """The number of this process, from 0."""
    if dist.is_initialized():
        return dist.get_rank()
    return max(_number("RANK"), 0)


def _number(name: str) -> int:
    """A variable of the environment that is to be a number from 0; -1 where it is none."""
    value = os.environ.get(name, "")
    return int(value) if value.isdecimal() else -1


def world_size() -> int:
    """The number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def barrier(group=None) -> None:
    """Waits until every rank is here. RuntimeError where one is gone or does not come in time. It
    runs on the CPU: on a GPU, NCCL's watchdog would end this process without a message."""
    if world_size() > 1:
        dist.all_reduce(torch.zeros(1), group=group)


def say(*words) -> None:
    """Prints a line for the user, on rank 0 only, above the progress bar.
    Takes along: rank, support.errors.printable."""
    if rank() == 0:
        tqdm.write(printable(" ".join(str(word) for word in words)), file=sys.stderr)


def all_sum(values) -> torch.Tensor:
    """A small float64 vector on the CPU, summed over the ranks."""
    values = torch.as_tensor(values, dtype=torch.float64)
    if world_size() > 1:
        dist.all_reduce(values)
    return values


def all_max(values) -> torch.Tensor:
    """A small float64 vector on the CPU, of each element the largest over the ranks."""
    values = torch.as_tensor(values, dtype=torch.float64)
    if world_size() > 1:
        dist.all_reduce(values, dist.ReduceOp.MAX)
    return values


# --------------------------------------------------------------------------------------------------
# Sharded models


def blocks(module: torch.nn.Module) -> list[torch.nn.Module]:
    """The transformer blocks of a model, which transformers names in `_no_split_modules`."""
    names = {n for part in module.modules() for n in getattr(part, "_no_split_modules", 0) or ()}
    return [m for m in module.modules() if type(m).__name__ in names]


def vision_tower(module: torch.nn.Module) -> torch.nn.Module:
    """The vision encoder, and whatever brings its output to the language model's width where that
    is part of the encoder, as in Qwen3-VL. A projector beside it, as LLaVA has, is not included."""
    return next(m for m in module.modules() if hasattr(m, "get_encoder")).get_encoder("image")


def shard(module, device: torch.device, config=None, prepare=lambda block: None):
    """Shards a module by FSDP2 over all ranks and returns it. Every transformer block is a unit;
    the rest belongs to the root. `prepare` is called with each block right before it is sharded, so
    no more than one block is unsharded at a time.

    Of the flags in `config`, `freeze_vision` keeps the vision tower as it is, and
    `activation_checkpointing` calls `recompute` with the share KEEP of a GPU's memory as its room.
    With `hsdp` the ranks of a node share the parameters and each node has all of them, so that only
    gradients go from node to node."""
    if getattr(config, "freeze_vision", False):
        vision_tower(module).requires_grad_(False)
    if getattr(config, "activation_checkpointing", False):
        gpu = device.type == "cuda"
        total = torch.cuda.get_device_properties(device).total_memory if gpu else 0
        recompute(module, KEEP * total)
    if world_size() == 1 and device.type == "cpu":
        for block in blocks(module):
            prepare(block)
        return module
    if getattr(config, "hsdp", False):
        mesh = nodes_mesh(device, datetime.timedelta(minutes=config.timeout))
    else:
        mesh = init_device_mesh(device.type, (world_size(),))
    # Inputs keep their dtype, as they do in `gathered`, where these hooks do not run.
    half = dict(param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)
    precision = MixedPrecisionPolicy(**(half if device.type == "cuda" else {}))
    sharding = dict(mesh=mesh, mp_policy=precision)
    sharding["shard_placement_fn"] = lambda p: Shard(sharded_dimension(p.shape, mesh.shape[-1]))
    for block in blocks(module):
        prepare(block)
        fully_shard(block, **sharding)
    fully_shard(module, **sharding)
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.set_gradient_divide_factor(1.0)
            part.set_force_sum_reduction_for_comms(True)  # gloo cannot average
    return module


def nodes_mesh(device: torch.device, timeout: datetime.timedelta) -> DeviceMesh:
    """The ranks as nodes x ranks of a node. `init_device_mesh` would give its groups a timeout of
    its own."""
    grid = torch.arange(world_size()).view(-1, int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    groups = [
        dist.new_subgroups_by_enumeration(ranks.tolist(), timeout=timeout)[0]
        for ranks in (grid.T, grid)
    ]
    names = ("nodes", "ranks")
    return DeviceMesh.from_group(groups, device.type, mesh=grid, mesh_dim_names=names)


def sharded_dimension(shape, count: int) -> int:
    """The dimension along which `count` ranks shard a parameter: the first. In a tensor of experts
    that is their number, and 8 ranks cannot share 4 experts equally. Then it is a later dimension
    that `count` divides, if there is one."""
    if len(shape) == 3 and shape[0] % count:
        return next((d for d in (1, 2) if shape[d] % count == 0), 0)
    return 0


def recompute(model, room: float = 0) -> None:
    """Activation checkpointing: a block keeps its input and the output of its attention. The rest
    is computed again in the backward pass. A block keeps all that it computes if the memory taken
    when it starts, plus what the later blocks must keep, is less than `room` bytes.

    Ranks may differ in that: the hooks of FSDP stand outside of what is computed again."""
    attentions = [
        torch.ops.torch_attn._varlen_attn.default,
        torch.ops.aten._scaled_dot_product_flash_attention.default,
        torch.ops.aten._scaled_dot_product_efficient_attention.default,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    ]
    contexts = partial(create_selective_checkpoint_contexts, attentions)
    again = partial(checkpoint, use_reentrant=False, context_fn=contexts)

    def run(later, forward, *args):
        kept_later = later * 2 * args[0].nbytes  # about an input and an output of each block
        if torch.cuda.memory_allocated() + kept_later < room:
            return forward(*args)
        return again(forward, *args)

    layers = [layer for layer in model.modules() if isinstance(layer, GradientCheckpointingLayer)]
    for later, layer in enumerate(reversed(layers)):
        layer.gradient_checkpointing = True
        layer._gradient_checkpointing_func = partial(run, later)


@contextlib.contextmanager
def gathered(module: torch.nn.Module):
    """Keeps the whole weights on every rank for a while, so that forwards need no other rank.

    The hooks of FSDP are put aside as well. On gathered weights they have nothing to do, but on a
    GPU they make other streams wait for one that is being recorded as a CUDA graph."""
    parts = [m for m in module.modules() if isinstance(m, FSDPModule)]
    hooks = [  # transformers adds hooks of its own at a first forward: those stay
        (of_part, key, hook)
        for part in parts
        for of_part in (part._forward_pre_hooks, part._forward_hooks)
        for key, hook in of_part.items()
        if hook.__module__.startswith("torch.distributed")
    ]
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    for of_part, key, _ in hooks:
        del of_part[key]
    try:
        yield
    finally:
        for of_part, key, hook in reversed(hooks):
            of_part[key] = hook
            of_part.move_to_end(key, last=False)
        for part in parts:
            part.set_reshard_after_forward(part is not module, recurse=False)
            part.reshard()
