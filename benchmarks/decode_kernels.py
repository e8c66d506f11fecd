"""How many kernels a language layer takes in one step of decoding, as it is and compiled
(support/decode.py), for the shape of Qwen3-VL-4B. It needs no GPU, and nothing is timed.

    python benchmarks/decode_kernels.py

As it is: the operations of a forward that are no views. Compiled: the kernels
that torch's inductor would write by its scheduler for triton, which runs here on CPU tensors, and
those it calls. Both count an attention or a matrix product as one kernel, though it may be several.
"""

import contextlib
from unittest.mock import patch

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
    """Raised by the scheduler in place of writing the kernels; its argument is their number."""


def count_scheduled(graph: GraphLowering) -> None:
    graph.init_wrapper_code()
    graph._update_scheduler()
    kernels = 0
    for node in graph.scheduler.nodes:
        kinds = {type(node).__name__, *(type(part.node).__name__ for part in node.get_nodes())}
        kernels += not kinds & {"NopKernelSchedulerNode", "MultiOutput"}
    raise Counted(kernels)


def count(ended: int = 0) -> tuple[int, int]:
    """-> kernels of a layer of 4B as it is, and compiled, in a step of ROWS rows without those that
    have `ended` and left."""
    shape = SHAPES["4B"][:2] + (1,) + SHAPES["4B"][3:6] + (2048, SMALL)
    with patch.dict(SHAPES, {"a layer of 4B": shape}):
        policy = make("a layer of 4B", "meta").eval().bfloat16().to_empty(device="cpu")
    (layer,) = policy.model.language_model.layers
    attention = layer.self_attn
    dim, half = attention.head_dim, torch.bfloat16
    heads, kv_heads = (len(p.weight) // dim for p in (attention.q_proj, attention.k_proj))
    with contextlib.ExitStack() as stack:
        for module in (model, sampler):
            stack.enter_context(patch.object(module, "has_varlen", lambda tensor: True))
        stack.enter_context(torch.inference_mode())
        collected = [(torch.zeros(kv_heads, PROMPTS * PROMPT, dim, dtype=half),) * 2]
        lengths, rows = [PROMPT] * PROMPTS, ROWS // PROMPTS
        cache = RowCache(collected, lengths, heads, n=rows, slots=ROWS, limit=LIMIT, fixed=True)
        cache.enter(cache.slots, cache.slots // rows)
        cache.reserve()
        cache.compact(torch.arange(ended))
        cache.begin_step()
        hidden = torch.zeros(ROWS - ended, 1, layer.hidden_size, dtype=half)
        turns = (torch.zeros(ROWS - ended, 1, dim, dtype=half),) * 2
        given = dict(layout=cache, position_embeddings=turns)
        fake = FakeTensorMode(allow_non_fake_inputs=True)
        with patch.object(model.Norm, "forward", norm), fake, Kernels() as plain:
            layer(hidden, **given)
        stack.enter_context(patch.object(GraphLowering, "codegen", count_scheduled))
        stack.enter_context(config.patch(cpu_backend="triton"))
        stack.enter_context(decode.compiled(policy))
        torch._dynamo.reset()  # each count is of fixed sizes
        try:
            layer(hidden, **given)
        except InductorError as error:
            return plain.count, error.inner_exception.args[0]


def main() -> None:
    print(f"kernels of a layer of 4B, {ROWS} rows of {PROMPTS} prompts:")
    for ended in (0, 40):
        print("as it is {}, compiled {}".format(*count(ended)), f"({ended} rows have ended)")


if __name__ == "__main__":
    main()
