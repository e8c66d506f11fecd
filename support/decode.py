"""The layers of a policy compiled, for the steps of decoding on a GPU (sampler.py).

In such a step a layer is about forty kernels, which take longer to launch than to run.
`torch.compile` fuses the small ones: norms, rotary positions, the merge of two attentions. Nothing
else changes, and where it fails, sampling goes on with the layers as they are.
TORCH_COMPILE_DISABLE=1 in the environment switches it off.
"""

import contextlib
from functools import lru_cache

import torch

from support.ranks import say

failed = False  # whether compiling has failed in this process


def decode_step(policy, layout, **inputs):
    """The policy's forward for one token of each row, with compiled layers on a GPU. `layout` is a
    `sampler.RowCache`. A forward that fails midway has only written keys, which the next one writes
    again, so it can be repeated.
    Takes along: failed, compiles, compiled, compiled_layer, OneLayer, support.ranks.say."""
    global failed
    if compiles(layout) and not failed:
        try:
            with compiled(policy):
                return policy(layout=layout, **inputs)
        except torch.OutOfMemoryError:  # the layers as they are need as much
            raise
        except Exception as error:
            failed = True
            why = " ".join(f"{type(error).__name__}: {error}".split())[:200]  # in one line
            say(f"sampling goes on without compiled layers, which are faster: {why}")
    return policy(layout=layout, **inputs)


def compiles(layout) -> bool:
    return layout.slots.is_cuda


@contextlib.contextmanager
def compiled(policy):
    """For a while, the language layers are compiled."""
    layers = [module for module in policy.modules() if hasattr(module, "self_attn")]
    for layer in layers:

        def forward(*given, layout, layer=layer, **named):
            one = OneLayer(layout, layer.self_attn.layer_idx)
            return compiled_layer()(layer, *given, layout=one, **named)

        layer.forward = forward
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


@lru_cache
def compiled_layer(**options):
    """One function for all layers. It is compiled at its first call, for the shapes of that, and
    again where those change, then for any size of what has changed."""
    import torch._dynamo.config  # only where they are used: this takes seconds
    import torch._inductor.config

    torch._inductor.config.compile_threads = 1  # otherwise processes are started that stay
    # Each size that changes is one more compilation, and so is each size of 1. torch would give up
    # after eight.
    torch._dynamo.config.recompile_limit = 64
    # Rounded where the layer itself rounds, since what is sampled is scored by that.
    options = options or dict(options=dict(emulate_precision_casts=True, force_pointwise_cat=True))

    def run(layer, *given, **named):
        return type(layer).forward(layer, *given, **named)

    return torch.compile(run, fullgraph=True, **options)


class OneLayer:
    """What a `RowCache` holds for one layer, which is number 0 here. If each layer came with
    its own number, torch would compile each one anew."""

    def __init__(self, cache, number: int):
        self.__dict__.update(vars(cache))
        self.own, self.prompts = [cache.own[number]], [cache.prompts[number]]
        self.kind = type(cache)

    def attend(self, number, *given):
        return self.kind.attend(self, 0, *given)
