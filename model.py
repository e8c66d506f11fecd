"""The policy: the attention of packs, token log-probabilities, sharding, the step.

For a prompt x and its branches y_1 .. y_N (data.py), at the temperature tau of sampling:

    log pi(y_t | x, y_<t) = z_t[y_t] / tau - logsumexp(z_t / tau)          token_logprobs

In the forward of a pack the prompt attends to itself, and each branch, as a row of its own,
attends to [prompt | itself]. transformers computes all else: the description of the pack travels
through the model as the keyword `layout` to the attention function registered below.

With several processes, or on a GPU, everything is sharded by FSDP2 (`fully_shard`). On a GPU
parameters are float32, computations bfloat16, reductions float32. Gradients are summed over
ranks, not averaged, because losses come divided by global denominators. One process on a CPU
shards nothing and computes in float32.
"""

import contextlib
import datetime
import inspect
import itertools
import math
import os
from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.attention.varlen import varlen_attn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts
from transformers import AttentionInterface, AttentionMaskInterface, get_scheduler

from data import Pack, blank_group, make_packs
from rows import UserError

# --------------------------------------------------------------------------------------------------
# Attention of a pack

VARLEN = inspect.signature(varlen_attn).parameters  # torch 2.11 has fewer, and groups heads unasked
GROUPED = {"enable_gqa": True} if "enable_gqa" in VARLEN else {}


class PackAttention:
    """Attention of one pack. H query heads, K key-value heads, T tokens, D values a head.

    Every token is a query of exactly one sequence: a prompt (keys: itself), a branch (keys: its
    prompt and itself), or a prompt with its only branch (keys: itself). The last key of a sequence
    belongs to its last query, and what comes later is hidden. On a GPU all sequences go through
    one call for ragged sequences. On a CPU those of like lengths go together as padded rows.
    Takes along: VARLEN, GROUPED, has_varlen, _alike, _padded, _ragged, data.Segment, data.Pack."""

    def __init__(self, pack: Pack, collected: list | None = None):
        self.collected = collected  # where given, each layer's keys and values are appended
        device = pack.input_ids.device
        self.ragged = _ragged(pack) if has_varlen(pack.input_ids) else None
        self.cuts: list[int] = []  # lengths of each segment's prompt and of its branches, T in all
        # Of each set of padded rows: the number of its prompt among the cuts (None: no
        # prompt before the rows), N rows of L tokens, and what they see, (L, prompt + L) or None.
        self.padded = []
        gather = []  # which token stands at each place of the blocks, -1 for padding
        plain = []  # (start, length) of the sequences without a prompt before them
        for segment in pack.segments if self.ragged is None else []:
            first, own = segment.start + segment.prompt, sum(segment.branches)
            self.cuts += [segment.prompt, own]
            if len(segment.branches) < 2:
                plain.append((segment.start, segment.prompt + own))
                continue
            plain.append((segment.start, segment.prompt))
            starts = [first + at for at in itertools.accumulate([0, *segment.branches[:-1]])]
            for rows in _alike(zip(starts, segment.branches)):
                longest = rows[0][1]
                visible = torch.ones(longest, segment.prompt + longest, dtype=torch.bool)
                visible = visible.tril(segment.prompt).to(device)
                self.padded.append((len(self.cuts) - 2, len(rows), longest, visible))
                gather.append(_padded(rows))
        for rows in _alike(plain):
            self.padded.append((None, len(rows), rows[0][1], None))
            gather.append(_padded(rows))
        if self.padded:
            places = torch.cat(gather)
            self.sizes = [len(part) for part in gather]
            self.gather = places.clamp(min=0).to(device)
            real = (places >= 0).nonzero()[:, 0]
            self.scatter = torch.empty_like(real)  # (T,) the place of each token in the blocks
            self.scatter[places[real]] = real
            self.scatter = self.scatter.to(device)

    def attend(self, layer: int, q, k, v, scale: float) -> torch.Tensor:
        """(1, H, T, D), (1, K, T, D) twice -> (1, T, H, D)."""
        if self.collected is not None:
            self.collected.append((k[0], v[0]))
        tokens = [x[0].transpose(0, 1) for x in (q, k, v)]
        if self.ragged is not None:
            # A branch's keys begin with a copy of its prompt's. To attend to the two apart and
            # merge would need the gradient of a logsumexp, which varlen_attn has not. The gradient
            # of the copies is summed in float32.
            index, *lengths = self.ragged
            tokens[1:] = (x.float().index_select(0, index).to(x.dtype) for x in tokens[1:])
            causal = dict(scale=scale, window_size=(-1, 0), **GROUPED)
            return varlen_attn(*tokens, *lengths, **causal)[None]
        prompts = [x.split(self.cuts, 2) for x in (k, v)]
        blocks = zip(*(x[self.gather].split(self.sizes) for x in tokens))
        out = []
        for (prompt, rows, length, visible), block in zip(self.padded, blocks):
            qb, *kv = (x.unflatten(0, (rows, length)).transpose(1, 2) for x in block)
            if prompt is not None:
                shared = (x[prompt].expand(rows, -1, -1, -1) for x in prompts)
                kv = [torch.cat(pair, 2) for pair in zip(shared, kv)]
            hidden = dict(attn_mask=visible, is_causal=visible is None)
            gqa = q.shape[1] != k.shape[1]
            seen = F.scaled_dot_product_attention(qb, *kv, scale=scale, enable_gqa=gqa, **hidden)
            out.append(seen.transpose(1, 2).flatten(0, 1))
        return torch.cat(out)[self.scatter][None]


def has_varlen(tensor: torch.Tensor, argument: str = "scale") -> bool:
    """Whether torch's attention of ragged sequences, `varlen_attn`, runs where the tensor is, and
    knows an argument."""
    return tensor.is_cuda and argument in VARLEN


def _alike(sequences) -> Iterator[list[tuple[int, int]]]:
    """(start, length) of sequences, the longest first, in rows of like lengths: padding to the
    longest takes at most a quarter of what is real."""
    rows: list[tuple[int, int]] = []
    for start, length in sorted(sequences, key=lambda sequence: -sequence[1]):
        if rows and (len(rows) + 1) * rows[0][1] > 1.25 * (sum(n for _, n in rows) + length):
            yield rows
            rows = []
        rows.append((start, length))
    if rows:
        yield rows


def _padded(rows: list[tuple[int, int]]) -> torch.Tensor:
    """The tokens of some sequences, row after row, padded with -1 to the first one's length."""
    starts, lengths = torch.tensor(rows).T[..., None]
    step = torch.arange(rows[0][1])
    return torch.where(step < lengths, starts + step, -1).flatten()


def _ragged(pack: Pack):
    """The sequences for one ragged call: the keys of each, the cumulated lengths of queries and of
    keys, and the longest of both."""
    index, queries, keys = [], [0], [0]
    for segment in pack.segments:
        prompt = torch.arange(segment.start, segment.start + segment.prompt)
        index.append(prompt)
        queries.append(queries[-1] + segment.prompt)
        keys.append(keys[-1] + segment.prompt)
        for length in segment.branches:
            index += [prompt, queries[-1] + torch.arange(length)]
            keys.append(keys[-1] + segment.prompt + length)
            queries.append(queries[-1] + length)
    device = pack.input_ids.device
    q, k = (torch.tensor(x, dtype=torch.int32) for x in (queries, keys))
    longest = int(q.diff().max()), int(k.diff().max())
    return torch.cat(index).to(device), q.to(device), k.to(device), *longest


def _attention(module, query, key, value, attention_mask, scaling, layout=None, **kwargs):
    if layout is None:
        raise RuntimeError(
            "an adapted model attends through a layout; call token_logprobs, generate, or "
            "model(**model_inputs(model, pack))"
        )
    return layout.attend(module.layer_idx, query, key, value, scaling), None


class Patches(torch.nn.Conv3d):
    """The patch embedding of a vision tower. Its inputs are single patches, so the convolution is
    a matrix product, which is several times faster."""

    def forward(self, patches):
        if patches.shape[2:] != self.kernel_size:
            return super().forward(patches)
        return F.linear(patches.flatten(1), self.weight.flatten(1), self.bias)


class Norm(torch.nn.Module):
    """The RMS norm of a language model, x / rms(x) * weight, as one operation instead of eight."""

    def forward(self, x):
        return F.rms_norm(x, x.shape[-1:], self.weight, self.variance_epsilon)


def adapt(model, where: str = "the model"):
    """Wires a model of transformers to packs, in place, and returns it.

    Its language layers attend through a layout, its head gives log-probabilities where they are
    asked for, patches are embedded by a product, norms are one operation. `forbidden` are the ids
    that are never sampled: an image's tokens without an image would break the next forward.
    Takes along: _attention, Patches, Norm, Head, LogProbs, _logits, rows.UserError."""
    text = model.config.get_text_config()
    kinds = set(getattr(text, "layer_types", None) or ["full_attention"])
    if kinds != {"full_attention"}:
        raise UserError(
            f"{where}: found {', '.join(sorted(kinds))} among the layers of "
            f"{model.config.model_type}, expected full_attention in all; packs have no other"
        )
    AttentionInterface.register("layout", _attention)
    AttentionMaskInterface.register("layout", lambda *args, **kwargs: None)
    model.set_attn_implementation({"text_config": "layout", "vision_config": "sdpa"})
    for module in model.modules():
        if type(module) is torch.nn.Conv3d:
            module.__class__ = Patches
        elif type(module).__name__.endswith("RMSNorm") and hasattr(module, "variance_epsilon"):
            module.__class__ = Norm
    if hasattr(model, "lm_head"):
        model.lm_head.__class__ = Head
    names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    ids = [getattr(model.config, name, None) for name in names]
    model.forbidden = torch.tensor([i for i in ids if i in range(text.vocab_size)])
    return model


def model_inputs(model, pack: Pack, collected: list | None = None) -> dict:
    """What the forward of a model, or of its backbone, takes for a pack. `collected` is given each
    layer's keys and values. RuntimeError where the model is not adapted.
    Takes along: PackAttention, positions."""
    if model.config.get_text_config()._attn_implementation != "layout":
        raise RuntimeError("call adapt(model) first: the branches of a pack would see each other")
    images = {"pixel_values": pack.pixel_values, "image_grid_thw": pack.image_grid_thw}
    return dict(
        input_ids=pack.input_ids,
        position_ids=positions(model, pack.position_ids),
        use_cache=False,
        layout=PackAttention(pack, collected),
        **{name: value for name, value in images.items() if value is not None},
    )


def positions(model, mrope: torch.Tensor) -> torch.Tensor:
    """(3, rows, T) mrope positions as the model takes them: without mrope, one position a token."""
    return mrope if hasattr(model.base_model, "get_rope_index") else mrope[0]


# --------------------------------------------------------------------------------------------------
# Log-probabilities over a large vocabulary

CHUNK = 1024  # rows of logits that are in memory at a time


class LogProbs(torch.autograd.Function):
    """log softmax(hidden @ weight.T / tau)[target] and the entropy of the distribution, without
    ever holding the logits of all positions.

    hidden (T, h), weight (V, h), predictors (K,): the rows of hidden that predict, targets (K,)
    -> (2, K) float32: log-probabilities, entropies (without gradient). The backward pass computes
    the logits of each chunk again and adds to the head's one gradient, in float32.

    All branches of a prompt are predicted from its last token, so rows repeat. They are picked
    here because on a CPU torch sums the gradient of an index in whatever order its threads come,
    and then two equal runs would differ in the last bit (on a GPU they may all the same)."""

    @staticmethod
    def forward(ctx, hidden, weight, predictors, targets, temperature, forbidden, chunk):
        wide = torch.promote_types(hidden.dtype, torch.float32)
        out = hidden.new_empty(2, len(targets), dtype=wide)
        normaliser = out.new_empty(len(targets))
        for start in range(0, len(targets), chunk):
            span = slice(start, start + chunk)
            logits = _logits(hidden[predictors[span]], weight, temperature, forbidden)
            normaliser[span] = logits.logsumexp(-1)
            out[0, span] = logits.gather(1, targets[span, None])[:, 0] - normaliser[span]
            p = (logits - normaliser[span, None]).exp_()
            out[1, span] = normaliser[span] - (p * logits.masked_fill_(p == 0, 0)).sum(-1)
        ctx.save_for_backward(hidden, weight, predictors, targets, normaliser)
        ctx.rest = temperature, forbidden, chunk
        return out

    @staticmethod
    def backward(ctx, grad):
        hidden, weight, predictors, targets, normaliser = ctx.saved_tensors
        temperature, forbidden, chunk = ctx.rest
        grad_hidden = torch.zeros_like(hidden, dtype=grad.dtype)
        learns = ctx.needs_input_grad[1]
        grad_weight = torch.zeros_like(weight, dtype=grad.dtype) if learns else None
        for start in range(0, len(targets), chunk):
            span = slice(start, start + chunk)
            rows = hidden[predictors[span]]
            d = _logits(rows, weight, temperature, forbidden)
            d.sub_(normaliser[span, None]).exp_().neg_()
            d.scatter_add_(1, targets[span, None], torch.ones_like(d[:, :1]))  # one-hot - p
            d = d.mul_(grad[0, span, None] / temperature).to(hidden.dtype)
            grad_hidden.index_add_(0, predictors[span], (d @ weight).to(grad.dtype))
            if learns:
                grad_weight += d.T @ rows
        grads = (x if x is None else x.to(hidden.dtype) for x in (grad_hidden, grad_weight))
        return *grads, None, None, None, None, None


def _logits(hidden, weight, temperature, forbidden):
    logits = (hidden @ weight.T).to(torch.promote_types(hidden.dtype, torch.float32))
    return logits.div_(temperature).index_fill_(1, forbidden, -torch.inf)


class Head(torch.nn.Linear):
    """The language head. Told which tokens are asked for, it answers with their log-probabilities
    and entropies instead of logits. So the weight is used inside the model's own forward, where
    FSDP has gathered it."""

    asked = None  # (predictors (K,), targets (K,), temperature, forbidden ids, chunk)

    def forward(self, hidden):
        if self.asked is None:
            return super().forward(hidden)
        return LogProbs.apply(hidden[0], self.weight, *self.asked)


def token_logprobs(policy, pack: Pack, temperature: float = 1.0, chunk: int = CHUNK):
    """-> (log-probability of each branch token, entropy of the distribution that it came from):
    two (K,) float32 tensors in the order of `pack.targets`. `pack.padded` pads them.
    Entropy has no gradient. RuntimeError where the policy is not adapted.
    Takes along: adapt, model_inputs, CHUNK."""
    inputs = model_inputs(policy, pack)
    forbidden = policy.forbidden.to(pack.targets.device)
    policy.lm_head.asked = (pack.predictors, pack.targets, temperature, forbidden, chunk)
    try:
        out = policy(**inputs).logits
    finally:
        policy.lm_head.asked = None
    return out[0], out[1].detach()


# --------------------------------------------------------------------------------------------------
# Memory, processes, sharding


def recompute(model) -> None:
    """Activation checkpointing: of each block its input and what its attention gave are kept, the
    rest is computed again in the backward pass."""
    attentions = [
        torch.ops.torch_attn._varlen_attn.default,
        torch.ops.aten._scaled_dot_product_flash_attention.default,
        torch.ops.aten._scaled_dot_product_efficient_attention.default,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    ]
    contexts = partial(create_selective_checkpoint_contexts, attentions)
    kept = partial(checkpoint, use_reentrant=False, context_fn=contexts)
    for block in model.modules():
        if hasattr(block, "gradient_checkpointing"):
            block.gradient_checkpointing, block._gradient_checkpointing_func = True, kept


def join_ranks(timeout: datetime.timedelta | None = None) -> torch.device:
    """Joins the processes that torchrun started (gloo on CPU, nccl on GPU). A bare `python` is one
    process. A collective that takes longer than `timeout` fails. -> the device of this rank."""
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        if not dist.is_initialized():
            alone = dict(store=dist.HashStore(), rank=0, world_size=1)
            alone = {} if "RANK" in os.environ else alone
            dist.init_process_group("cpu:gloo,cuda:nccl", timeout=timeout, **alone)
        return torch.device("cuda", torch.cuda.current_device())
    if "RANK" in os.environ and not dist.is_initialized():
        dist.init_process_group("gloo", timeout=timeout)
    return torch.device("cpu")


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", 0))


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def barrier(group=None) -> None:
    if world_size() > 1:
        dist.barrier(group)


def all_sum(values) -> torch.Tensor:
    """A small float64 vector on the CPU, summed over the ranks."""
    values = torch.as_tensor(values, dtype=torch.float64)
    if world_size() > 1:
        dist.all_reduce(values)
    return values


def all_max(values) -> torch.Tensor:
    """A small float64 vector on the CPU, the largest over the ranks of each element."""
    values = torch.as_tensor(values, dtype=torch.float64)
    if world_size() > 1:
        dist.all_reduce(values, dist.ReduceOp.MAX)
    return values


def blocks(module: torch.nn.Module) -> list[torch.nn.Module]:
    """The transformer blocks of a model, by what transformers says not to split."""
    names = {n for part in module.modules() for n in getattr(part, "_no_split_modules", 0) or ()}
    return [m for m in module.modules() if type(m).__name__ in names]


def vision_tower(module: torch.nn.Module) -> torch.nn.Module:
    """What sees images, up to the language model's width."""
    return next(m for m in module.modules() if hasattr(m, "get_encoder")).get_encoder("image")


def shard(module, device: torch.device, config=None):
    """-> the module under FSDP2 over all ranks: every transformer block is a unit, the rest is the
    root's. Of the flags in `config`, `freeze_vision` leaves the vision tower as it is, and
    `activation_checkpointing` is `recompute`. With `hsdp` the ranks of a node share the parameters,
    and each node has all of them: then only gradients go from node to node."""
    if getattr(config, "freeze_vision", False):
        vision_tower(module).requires_grad_(False)
    if getattr(config, "activation_checkpointing", False):
        recompute(module)
    if world_size() == 1 and device.type == "cpu":
        return module
    shape, names = (world_size(),), ("ranks",)
    if getattr(config, "hsdp", False):
        node = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        shape, names = (world_size() // node, node), ("nodes", "ranks")
    mesh = init_device_mesh(device.type, shape, mesh_dim_names=names)
    # Inputs stay as the model made them, as they do where the hooks are put aside (`gathered`).
    half = dict(param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)
    precision = MixedPrecisionPolicy(**(half if device.type == "cuda" else {}))
    for block in blocks(module):
        fully_shard(block, mesh=mesh, mp_policy=precision)
    fully_shard(module, mesh=mesh, mp_policy=precision)
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.set_gradient_divide_factor(1.0)
            part.set_force_sum_reduction_for_comms(True)  # gloo knows no other, nccl needs none
    return module


@contextlib.contextmanager
def gathered(module: torch.nn.Module):
    """The whole weights on every rank for a while, so that forwards need no other rank.

    The hooks of FSDP are put aside as well. On gathered weights they have nothing to do, but on a
    GPU they make other streams wait for one that is being recorded as a CUDA graph."""
    parts = [m for m in module.modules() if isinstance(m, FSDPModule)]
    hooks = [  # transformers has some of its own, and adds them at a first forward: they stay
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


def even_packs(packs: list[Pack], processor) -> list[Pack]:
    """As many packs on every rank, each with an image where any has one. A forward of a sharded
    model is a collective: a rank with fewer packs, or without images, would hang the others."""
    if world_size() == 1:
        return packs
    images = [pack.pixel_values is not None for pack in packs]
    most, any_images, least = all_max([len(packs), any(images), -len(packs)]).tolist()
    any_images = any_images or most > -least  # the blanks that a rank adds have one
    if len(packs) == most and (all(images) or not any_images):
        return packs
    (blank,) = make_packs([blank_group(processor)])
    packs = packs + [blank] * int(most - len(packs))
    return [_with_blank(p, blank) if any_images and p.pixel_values is None else p for p in packs]


def _with_blank(pack: Pack, blank: Pack) -> Pack:
    behind = replace(blank.segments[0], start=pack.input_ids.shape[1])
    return replace(
        pack,
        segments=[*pack.segments, behind],
        input_ids=torch.cat([pack.input_ids, blank.input_ids], 1),
        position_ids=torch.cat([pack.position_ids, blank.position_ids], 2),
        pixel_values=blank.pixel_values,
        image_grid_thw=blank.image_grid_thw,
    )


# --------------------------------------------------------------------------------------------------
# The optimiser's step


def learning_rate_at(step: int, max_steps: int, config, peak: float | None = None) -> float:
    """The rate of step 1 .. max_steps: transformers' schedule of this name, a function of the
    step. Its warm-up begins at a rate of 0, which teaches nothing; here it is a step ahead.
    `config.warmup_steps` counts steps, or is a share of the run where it is below 1."""
    peak = config.learning_rate if peak is None else peak
    warmup = math.ceil(config.warmup_steps * (max_steps if config.warmup_steps < 1 else 1))
    name = config.lr_scheduler_type
    named = "constant_with_warmup" if name == "constant" else name  # theirs has no warm-up
    try:  # an optimiser that holds the peak and nothing else
        schedule = get_scheduler(named, torch.optim.SGD([torch.zeros(1)], peak), warmup, max_steps)
    except ValueError as error:
        raise UserError(f"--lr_scheduler_type {name}: {error}") from None
    return peak * schedule.lr_lambdas[0](step - (step > warmup))


def optimizer_step(module, optimizer, learning_rate: float, max_grad_norm: float) -> float:
    """Clips the global gradient norm, steps, clears. Returns the norm before clipping. Where that
    is not finite the step is left out, and the weights stay as they were."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    norm = torch.nn.utils.clip_grad_norm_(module.parameters(), max_grad_norm)
    norm = float(norm.full_tensor() if isinstance(norm, DTensor) else norm)
    if math.isfinite(norm):
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm


def __getattr__(name: str):
    """Kept for callers outside, who know `model.generate`; the function is in sampler.py."""
    if name == "generate":
        from sampler import generate

        return generate
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
