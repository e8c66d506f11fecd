"""How many kernels a language layer takes in one step of decoding, as it is and compiled
(support/decode.py), for the shape of Qwen3-VL-4B. It needs no GPU, and nothing is timed.

    python benchmarks/decode_kernels.py

As it is: the operations of a forward that are no views. Compiled: the kernels
that torch's inductor would write by its scheduler for triton, which runs here on CPU tensors, and
those it calls. Both count an attention or a matrix product as one kernel, though it may be several.
"""

import contextlib

import torch
from gpu import SHAPES, SMALL, make
from torch._inductor import config
from torch._inductor.exc import InductorError
from torch._inductor.graph import GraphLowering
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import model
import sampler
from sampler import RowCache
from support import decode

PROMPTS, PROMPT, ROWS, LIMIT = 4, 302, 64, 256


class Kernels(TorchDispatchMode):
    """Counts the operations that are no views."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        view = any(x.alias_info and not x.alias_info.is_write for x in func._schema.returns)
        if isinstance(out, torch.Tensor) and view:
            view = out.dtype == args[0].dtype  # `to` is a view where it has nothing to do
        self.count += not view and any(isinstance(x, torch.Tensor) for x in tree_leaves(out))
        return out


def norm(self, x):
    """A norm as a GPU has it, one operation."""
    return torch.ops.aten._fused_rms_norm(x, x.shape[-1:], self.weight, self.variance_epsilon)[0]


class Counted(Exception):
    """Raised by the scheduler in place of writing the kernels."""

    kernels = 0


def count_scheduled(graph: GraphLowering) -> None:
    graph.init_wrapper_code()
    graph._update_scheduler()
    for node in graph.scheduler.nodes:
        kinds = {type(node).__name__, *(type(part.node).__name__ for part in node.get_nodes())}
        Counted.kernels += not kinds & {"NopKernelSchedulerNode", "MultiOutput"}
    raise Counted


def main() -> None:
    for module in (model, sampler):
        module.has_varlen = lambda tensor: True
    SHAPES["a layer of 4B"] = SHAPES["4B"][:2] + (1,) + SHAPES["4B"][3:6] + (2048, SMALL)
    policy = make("a layer of 4B", "meta").eval().bfloat16().to_empty(device="cpu")
    (layer,) = policy.model.language_model.layers
    attention = layer.self_attn
    dim, half = attention.head_dim, torch.bfloat16
    heads, kv_heads = (len(p.weight) // dim for p in (attention.q_proj, attention.k_proj))
    with torch.inference_mode():
        collected = [(torch.zeros(kv_heads, PROMPTS * PROMPT, dim, dtype=half),) * 2]
        lengths, rows = [PROMPT] * PROMPTS, ROWS // PROMPTS
        cache = RowCache(collected, lengths, heads, n=rows, slots=ROWS, limit=LIMIT, fixed=True)
        cache.enter(cache.slots, cache.slots // rows)
        cache.reserve()
        cache.begin_step()
        hidden = torch.zeros(ROWS, 1, layer.hidden_size, dtype=half)
        given = dict(layout=cache, position_embeddings=(torch.zeros(ROWS, 1, dim, dtype=half),) * 2)
        plain_norm, model.Norm.forward = model.Norm.forward, norm
        with FakeTensorMode(allow_non_fake_inputs=True), Kernels() as plain:
            layer(hidden, **given)
        model.Norm.forward = plain_norm
        GraphLowering.codegen = count_scheduled
        with config.patch(cpu_backend="triton"), decode.compiled(policy):
            with contextlib.suppress(InductorError):
                layer(hidden, **given)
    print(f"kernels of a layer of 4B, {ROWS} rows of {PROMPTS} prompts:")
    print(f"as it is {plain.count}, compiled {Counted.kernels}")


if __name__ == "__main__":
    main()
