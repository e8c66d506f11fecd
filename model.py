"""The policy: loading, sharding, the attention of packs, token log-probabilities, sampling, the optimiser step.

What is computed here, for a prompt x and its branches y_1 .. y_N (see data.py):

    log pi(y_t | x, y_<t) = z_t[y_t] / tau - logsumexp(z_t / tau)          token_logprobs, at the sampling temperature tau
    y_t ~ softmax(z_t / tau)                                                generate, with the same tau and vocabulary

Scores and samples share the prompt. In a forward over a pack the prompt attends to itself and the branches, as N rows,
attend to [prompt | themselves]; while sampling, N rows go on from the prompt's keys and values, which stand once in
memory, and finished rows leave at once (on a GPU when half have finished, so that steps are alike and a CUDA graph can
replay them). `transformers` computes all else: a pack, or the cache of the sampler, travels as the keyword `layout`
through the model to the attention function registered below, and answers there.

Everything is sharded with FSDP2 (`fully_shard`) when there are several processes, or a GPU: then parameters are float32
and computations bfloat16 with float32 reduction. Gradients are summed over ranks, not averaged: losses come divided by
global denominators. On one CPU process nothing is sharded and all is float32.
"""

import contextlib
import hashlib
import itertools
import math
import os
import warnings
from collections import OrderedDict
from collections.abc import Iterator

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoConfig,
    AutoModelForImageTextToText,
)

from data import (
    Group,
    Pack,
    Prompt,
    UserError,
    blank_group,
    load_processor,
    make_packs,
    save_processor,
)

try:  # on a GPU, attention by one call over ragged segments
    from flash_attn import flash_attn_varlen_func
except ImportError:
    flash_attn_varlen_func = None


# --------------------------------------------------------------------------------------------------------------------
# Attention of a pack


class PackAttention:
    """Attention of one pack, given to the model as `layout`. H heads, K of them key-value heads, T tokens, D per head.

    Every token is the query of exactly one sequence: a prompt (keys: itself), a branch (keys: its prompt and itself), or a
    prompt with its only branch (keys: itself), each with its last keys aligned to its queries. Sequences of like lengths
    are attended to together, as padded rows. Keys and values are kept when `keep` is a list (the sampler's prefill).
    """

    def __init__(self, pack: Pack, keep: list | None = None):
        self.keep = keep
        device = pack.input_ids.device
        self.ragged = _ragged(pack) if flash_attn_varlen_func and device.type == "cuda" else None
        self.cuts: list[
            int
        ] = []  # lengths of the prompts and of all their branches: 2 a segment, T in all
        self.blocks = []  # (prompt: its place among the cuts or None, rows N, length L, visible (L, prompt + L) or None)
        gather = []  # what stands in the blocks' rows, padded with -1
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
                visible = torch.ones(
                    longest, segment.prompt + longest, dtype=torch.bool, device=device
                )
                self.blocks.append(
                    (len(self.cuts) - 2, len(rows), longest, visible.tril(segment.prompt))
                )
                gather.append(_padded(rows))
        for rows in _alike(plain):
            self.blocks.append((None, len(rows), rows[0][1], None))
            gather.append(_padded(rows))
        if self.blocks:
            places = torch.cat(gather)
            self.gather = places.clamp(min=0).to(device)
            self.sizes = [len(part) for part in gather]
            self.take = torch.empty(
                sum(self.cuts), dtype=torch.long
            )  # (T,) where in the blocks each token stands
            real = places >= 0
            self.take[places[real]] = real.nonzero()[:, 0]
            self.take = self.take.to(device)

    def attend(self, layer: int, q, k, v, scale: float) -> torch.Tensor:
        """(1, H, T, D), (1, K, T, D) twice -> (1, T, H, D)."""
        if self.keep is not None:
            self.keep.append((k[0], v[0]))
        if self.ragged is not None:
            index, queries, keys, longest_query, longest_key = self.ragged
            q, k, v = (x[0].transpose(0, 1) for x in (q, k, v))
            return flash_attn_varlen_func(
                q,
                k[index],
                v[index],
                queries,
                keys,
                longest_query,
                longest_key,
                softmax_scale=scale,
                causal=True,
            )[None]
        prompts_k, prompts_v = (x.split(self.cuts, 2) for x in (k, v))
        parts = zip(*(x[0].transpose(0, 1)[self.gather].split(self.sizes) for x in (q, k, v)))
        out = []
        for (prompt, rows, length, visible), part in zip(self.blocks, parts):
            qb, kb, vb = (
                x.unflatten(0, (rows, length)).transpose(1, 2) for x in part
            )  # (N, heads, L, D)
            if prompt is not None:
                kb = torch.cat([prompts_k[prompt].expand(rows, -1, -1, -1), kb], 2)
                vb = torch.cat([prompts_v[prompt].expand(rows, -1, -1, -1), vb], 2)
            attended = _sdpa(qb, kb, vb, scale, attn_mask=visible, is_causal=visible is None)
            out.append(attended.transpose(1, 2).flatten(0, 1))
        return torch.cat(out)[self.take][None]


def _alike(sequences) -> Iterator[list[tuple[int, int]]]:
    """(start, length) of sequences, the longest first, cut where padding to the longest would be a quarter of what is real."""
    rows: list[tuple[int, int]] = []
    for start, length in sorted(sequences, key=lambda sequence: -sequence[1]):
        if rows and (len(rows) + 1) * rows[0][1] > 1.25 * (sum(n for _, n in rows) + length):
            yield rows
            rows = []
        rows.append((start, length))
    if rows:
        yield rows


def _padded(rows: list[tuple[int, int]]) -> torch.Tensor:
    """Where each element of some sequences stands in the pack, row after row, padded with -1 to the first one's length."""
    starts, lengths = torch.tensor(rows).T[..., None]
    step = torch.arange(rows[0][1])
    return torch.where(step < lengths, starts + step, -1).flatten()


def _sdpa(q, k, v, scale, **kwargs):
    return F.scaled_dot_product_attention(
        q, k, v, scale=scale, enable_gqa=q.shape[1] != k.shape[1], **kwargs
    )


def _ragged(pack: Pack):
    """The same segments for one varlen call: which keys each takes, and the cumulated lengths of queries and keys."""
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
    q, k = (torch.tensor(x, dtype=torch.int32, device=device) for x in (queries, keys))
    return torch.cat(index).to(device), q, k, int(q.diff().max()), int(k.diff().max())


def _attention(
    module, query, key, value, attention_mask, scaling, dropout=0.0, layout=None, **kwargs
):
    if layout is None:
        raise ValueError(
            "this model attends through a layout (PackAttention or RowCache); call it through model.py"
        )
    return layout.attend(module.layer_idx, query, key, value, scaling), None


AttentionInterface.register("layout", _attention)
AttentionMaskInterface.register("layout", lambda *args, **kwargs: None)


# --------------------------------------------------------------------------------------------------------------------
# Log-probabilities over a large vocabulary


class _LogProbs(torch.autograd.Function):
    """log softmax(hidden @ weight.T / tau)[target] and its entropy, the logits never held for all positions at once.

    hidden (T, h), weight (V, h), targets (K,), and predictors (K,), the rows of hidden that the targets are predicted from
    -> (2, K) float32: log-probabilities, entropies (no gradient through these). The backward pass computes each chunk's
    logits again and adds to the head's one gradient in place.

    All branches of a prompt are predicted from its last token, so rows repeat. They are picked here, and not by indexing
    outside, whose gradient torch sums up in whatever order its threads come: runs would not repeat to the last bit.
    """

    @staticmethod
    def forward(ctx, hidden, weight, predictors, targets, temperature, forbidden, chunk):
        out = hidden.new_empty(
            2, len(targets), dtype=torch.promote_types(hidden.dtype, torch.float32)
        )
        normaliser = out.new_empty(len(targets))
        for start in range(0, len(targets), chunk):
            part = slice(start, start + chunk)
            logits = _logits(hidden[predictors[part]], weight, temperature, forbidden)
            normaliser[part] = logits.logsumexp(-1)
            out[0, part] = logits.gather(1, targets[part, None])[:, 0] - normaliser[part]
            p = (logits - normaliser[part, None]).exp_()
            out[1, part] = normaliser[part] - (p * logits.masked_fill_(p == 0, 0)).sum(-1)
        ctx.save_for_backward(hidden, weight, predictors, targets, normaliser)
        ctx.rest = temperature, forbidden, chunk
        return out

    @staticmethod
    def backward(ctx, grad):
        hidden, weight, predictors, targets, normaliser = ctx.saved_tensors
        temperature, forbidden, chunk = ctx.rest
        grad_hidden, grad_weight = (
            torch.zeros_like(hidden, dtype=grad.dtype),
            torch.zeros_like(weight),
        )
        for start in range(0, len(targets), chunk):
            part = slice(start, start + chunk)
            rows = hidden[predictors[part]]
            d = (
                _logits(rows, weight, temperature, forbidden)
                .sub_(normaliser[part, None])
                .exp_()
                .neg_()
            )
            d.scatter_add_(
                1, targets[part, None], torch.ones_like(d[:, :1])
            )  # d logp / d logits = one-hot - p
            d = d.mul_(grad[0, part, None] / temperature).to(hidden.dtype)
            grad_hidden.index_add_(0, predictors[part], (d @ weight).to(grad.dtype))
            grad_weight.addmm_(d.T, rows)
        return grad_hidden.to(hidden.dtype), grad_weight, None, None, None, None, None


def _logits(hidden, weight, temperature, forbidden):
    logits = (
        (hidden @ weight.T).to(torch.promote_types(hidden.dtype, torch.float32)).div_(temperature)
    )
    return logits.index_fill_(1, forbidden, -torch.inf)


class Linear(torch.nn.Linear):
    """Its large products go to oneDNN while the weights are `packed`."""

    blocks = None  # the weight as oneDNN multiplies it

    def forward(self, x):
        if (
            self.blocks is not None and x.numel() * self.out_features >= 2**20
        ):  # smaller ones are quicker called in MKL
            return torch.ops.mkldnn._linear_pointwise(x, self.blocks, self.bias, "none", [], "")
        return super().forward(x)


@contextlib.contextmanager
def packed(module: torch.nn.Module):
    """For forwards without a gradient on a CPU: a copy of each weight in blocks, as oneDNN multiplies it.

    Torch has MKL multiply float32 matrices. With 8 to 64 rows, as in a step of the sampler, oneDNN takes half to a third of
    MKL's time on an AMD processor when it need not sort the weight into blocks first, which takes a few steps' time.
    """
    layers = [
        m
        for m in module.modules()
        if isinstance(m, Linear) and m.weight.is_cpu and m.weight.dtype == torch.float32
    ]
    layers = layers if torch.backends.mkldnn.is_available() else []
    for layer in layers:
        layer.blocks = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach(), 32)
    try:
        yield
    finally:
        for layer in layers:
            del layer.blocks


class Head(Linear):
    """The language model's head. Told which tokens are asked for, it answers with their log-probabilities (and the
    entropies) instead of logits, so that the weight is used inside the model's own forward, where FSDP has gathered it."""

    asked = None  # (predictors (K,), targets (K,), temperature, forbidden ids, chunk)

    def forward(self, hidden):
        if self.asked is None:
            return super().forward(hidden)
        return _LogProbs.apply(hidden[0], self.weight, *self.asked)


def inputs(model, pack: Pack, keep: list | None = None) -> dict:
    """What the forward of a model, or of its backbone, takes for a pack. `keep` collects keys and values."""
    images = {"pixel_values": pack.pixel_values, "image_grid_thw": pack.image_grid_thw}
    return dict(
        input_ids=pack.input_ids,
        position_ids=positions(model, pack.position_ids),
        use_cache=False,
        layout=PackAttention(pack, keep),
        **{name: value for name, value in images.items() if value is not None},
    )


def positions(model, mrope: torch.Tensor) -> torch.Tensor:
    """(3, rows, T) mrope positions as the model takes them: models without mrope have one position a token."""
    return mrope if hasattr(model.base_model, "get_rope_index") else mrope[0]


def token_logprobs(
    policy, pack: Pack, temperature: float = 1.0, chunk: int = 256
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability of each branch token of the pack, and the entropy of the distribution it came from: two (K,)
    float32 tensors in the order of `pack.targets` (`pack.rows` makes padded rows of them). Entropy has no gradient."""
    policy.lm_head.asked = (
        pack.predictors,
        pack.targets,
        temperature,
        policy.forbidden.to(pack.targets.device),
        chunk,
    )
    try:
        out = policy(**inputs(policy, pack)).logits
    finally:
        policy.lm_head.asked = None
    return out[0], out[1].detach()


# --------------------------------------------------------------------------------------------------------------------
# Sampling


class RowCache:
    """Keys and values while rows are sampled, given to the model as `layout`. K key-value heads, G query heads to each.

    The prompts' stand once each, and all rows of a prompt attend to them together, in a table of P prompts by as many
    places as any of them has rows. A row's own are written into preallocated places at its own index. To a row's softmax
    its prompt is one more key: the key's score is the logsumexp of the prompt's scores, its value the prompt's own answer.

    S rows are alive, or, with `fixed`, were alive when the shapes last changed: then S, the table's width and the number of
    own places that are read (`seen`) change in large steps only, so that most steps repeat the shapes of the one before.
    """

    def __init__(
        self,
        kept: list[tuple[torch.Tensor, torch.Tensor]],
        packs_lengths: list[int],
        fixed: bool = False,
    ):
        lengths = torch.tensor(packs_lengths)
        longest = int(lengths.max())
        self.fixed = fixed
        self.kv_heads, _, dim = kept[0][0].shape
        device = kept[0][0].device
        step = torch.arange(longest)
        first = lengths.cumsum(0) - lengths
        gather = torch.where(step < lengths[:, None], first[:, None] + step, 0).to(device)
        # keys as columns (P * K, D, longest), values as rows (P * K, longest, D), for each layer
        kept = [tuple(x[:, gather].transpose(0, 1).flatten(0, 1) for x in kv) for kv in kept]
        self.prompts = [(k.mT.contiguous(), v) for k, v in kept]
        self.beyond = self._bias((step >= lengths[:, None]).to(device))
        # (places, K, D, room) and (places, K, room, D)
        self.own = [
            (k.new_zeros(0, self.kv_heads, dim, 0), v.new_zeros(0, self.kv_heads, 0, dim))
            for k, v in kept
        ]
        self.prompt_of = torch.zeros(0, dtype=torch.long, device=device)  # (S,)
        self.length = torch.zeros(
            0, dtype=torch.long, device=device
        )  # (S,) own tokens that are cached
        self.seen = 0

    def add(self, prompt_of: torch.Tensor) -> None:
        """New rows, with nothing of their own yet, take places behind the ones that are there."""
        self.length = torch.cat([self.length, torch.zeros_like(prompt_of)])
        self._group(torch.cat([self.prompt_of, prompt_of]))

    def keep(self, alive: torch.Tensor, idle: int = 0) -> torch.Tensor:
        """Drops the rows that are not alive, unless they are no more than `idle`; those behind fill the holes. Returns
        (S',): the old place of each row."""
        count = int(alive.sum())
        if len(alive) - count <= idle:  # as in most steps
            return torch.arange(len(alive), device=alive.device)
        order = torch.arange(count, device=alive.device)
        holes = (~alive[:count]).nonzero()[:, 0]
        movers = count + alive[count:].nonzero()[:, 0]
        order[holes] = movers
        there = movers < len(
            self.own[0][0]
        )  # a row that ended at its first token never had a place
        for own_k, own_v in self.own:
            own_k[holes[there], ..., : self.seen] = own_k[movers[there], ..., : self.seen]
            own_v[holes[there], :, : self.seen] = own_v[movers[there], :, : self.seen]
        self.length = self.length[order]
        self._group(self.prompt_of[order])
        return order

    def _group(self, prompt_of: torch.Tensor) -> None:
        """The table: where in it, (P, K, width), each row and head stands, and the other way (the first row's where empty)."""
        self.prompt_of, device = prompt_of, prompt_of.device
        self.rows = torch.arange(len(prompt_of), device=device)
        counts = torch.bincount(prompt_of, minlength=len(self.beyond) // self.kv_heads)
        width = int(counts.max())
        width = 1 << (width - 1).bit_length() if self.fixed else width
        order = prompt_of.argsort(stable=True)
        place = torch.empty_like(order)  # (S,) a row's place among those of its prompt
        place[order] = self.rows - (counts.cumsum(0) - counts)[prompt_of[order]]
        heads = torch.arange(self.kv_heads, device=device)
        self.place = (
            prompt_of[:, None] * self.kv_heads * width + heads * width + place[:, None]
        ).flatten()  # (S * K,)
        self.table = torch.zeros(
            len(self.beyond) * width, dtype=torch.long, device=device
        )  # (P * K * width,)
        self.table[self.place] = torch.arange(len(self.place), device=device)

    def begin_step(self) -> list[torch.Tensor]:
        """Before each forward of the S rows, one token a row: makes room. Returns what `attend` expects in `self.step`."""
        need = int(self.length.max()) + 1
        self.seen = -(-need // 128) * 128 if self.fixed else need
        places, room = self.own[0][1].shape[0], self.own[0][1].shape[2]
        if len(self.rows) > places or self.seen > room:  # grows by doubling
            more = max(0, len(self.rows) - places)
            longer = max(256, 2 * self.seen) - room if self.seen > room else 0
            for layer, (k, v) in enumerate(self.own):  # one after the other: never twice in memory
                self.own[layer] = (
                    F.pad(k, (0, longer, 0, 0, 0, 0, 0, more)),
                    F.pad(v, (0, 0, 0, longer, 0, 0, 0, more)),
                )
        unseen = torch.arange(self.seen, device=self.length.device) > self.length[:, None]
        return [self.rows, self.length, self.table, self.place, self._bias(unseen)]

    def attend(self, layer: int, q, k, v, scale: float) -> torch.Tensor:
        """(S, H, 1, D), (S, K, 1, D) twice -> (S, 1, H, D)."""
        rows, length, table, place, unseen = self.step
        own_k, own_v = (x[: len(rows)] for x in self.own[layer])
        own_k[rows, :, :, length] = k[:, :, 0]
        own_v[rows, :, length] = v[:, :, 0]
        own_k, own_v = own_k[..., : self.seen].flatten(0, 1), own_v[:, :, : self.seen].flatten(0, 1)
        prompts_k, prompts_v = self.prompts[layer]
        heads, dim = q.shape[1], q.shape[3]
        q = q.view(len(place), -1, dim)  # (S * K, G, D)
        scores = torch.baddbmm(
            self.beyond,
            q.index_select(0, table).view(len(prompts_k), -1, dim),
            prompts_k,
            alpha=scale,
        )
        logp = scores.log_softmax(-1, dtype=torch.float32)  # (P * K, width * G, longest)
        score = (scores[..., :1] - logp[..., :1]).view(
            len(table), -1, 1
        )  # s - log softmax(s) = logsumexp
        answer = torch.bmm(logp.exp().to(v.dtype), prompts_v).view(len(table), -1, dim)
        score, answer = (
            score.index_select(0, place),
            answer.index_select(0, place),
        )  # (S * K, G, 1), (S * K, G, D)
        scores = torch.cat([score, torch.baddbmm(unseen, q, own_k, alpha=scale)], -1)
        weights = scores.softmax(-1, dtype=torch.float32).to(v.dtype)
        return torch.baddbmm(weights[..., :1] * answer, weights[..., 1:], own_v).view(
            len(rows), 1, heads, dim
        )

    def _bias(self, hidden: torch.Tensor) -> torch.Tensor:
        """(n, keys) -> (n * K, 1, keys): -inf where keys are hidden, 0 elsewhere."""
        k = self.prompts[0][0]
        bias = torch.zeros(hidden.shape, dtype=k.dtype, device=k.device).masked_fill_(
            hidden, -torch.inf
        )
        return bias.repeat_interleave(self.kv_heads, 0)[:, None]


class Decoder:
    """A step of the rows in `cache`: their tokens (S, 1) at positions (3, S, 1) or (S, 1) -> logits (S, V).

    On a GPU it takes longer to launch the thousand small kernels of a step than to run them. With `fixed` places, a step
    whose shapes come for the second time is recorded as a CUDA graph; later ones of these shapes copy what they read into the
    recorded step's tensors and replay it. Weights and cache must stay where they are, or be seen in the shapes.
    """

    def __init__(self, policy, cache: RowCache):
        self.policy, self.cache = policy, cache
        self.shapes = set()
        self.graphs = {}  # shapes -> (graph, the tensors that it reads, its logits)

    def __call__(self, token: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        read = [token, position, *self.cache.begin_step()]
        if self.cache.fixed:
            shapes = (*(x.shape for x in read), self.cache.own[0][0].shape)
            if shapes in self.shapes and shapes not in self.graphs:
                self._record(shapes, read)
            self.shapes.add(shapes)
            if shapes in self.graphs:
                graph, static, logits = self.graphs[shapes]
                for old, new in zip(static, read):
                    old.copy_(new)
                graph.replay()
                return logits
        return self._forward(read)

    def _record(self, shapes, read) -> None:
        static, graph = [x.clone() for x in read], torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self.graphs[shapes] = graph, static, self._forward(static)
        except RuntimeError as error:
            warnings.warn(
                f"this call of generate goes on without CUDA graphs: {error}", stacklevel=2
            )
            self.graphs, self.cache.fixed = {}, False

    def _forward(self, read) -> torch.Tensor:
        token, position, *self.cache.step = read
        return self.policy(
            input_ids=token, position_ids=position, use_cache=False, layout=self.cache
        ).logits[:, 0]


def uniforms(seed: int, step: int, prompt: int, row: int, count: int) -> torch.Tensor:
    """The random numbers of one row: they depend on seed, step, prompt and row alone, whatever else is in the batch."""
    key = hashlib.blake2b(f"{seed} {step} {prompt} {row}".encode(), digest_size=7).digest()
    return torch.rand(count, generator=torch.Generator().manual_seed(int.from_bytes(key, "big")))


def generate(
    policy,
    prompts: list[Prompt],
    num_generations: int,
    max_completion_length: int,
    temperature: float = 1.0,
    seed: int = 0,
    step: int = 0,
    max_rollout_rows: int | None = None,
    fixed: bool | None = None,
) -> list[Group]:
    """Samples `num_generations` branches for each prompt (temperature 0: greedy), with their log-probabilities at that
    temperature. A branch ends with its end of sequence, or without one where it reached `max_completion_length`.

    Temperature only: no top-k, no top-p, so that what is sampled is what `token_logprobs` scores. The special tokens of
    images and videos are forbidden to both. `max_rollout_rows` bounds the rows alive at once; the others wait.
    `fixed` places, and a CUDA graph over them (see RowCache and Decoder), are for a GPU, where they are the default.
    """
    if not prompts:
        return []
    device = next(policy.parameters()).device
    rows_in_all = len(prompts) * num_generations
    was_training = policy.training
    policy.eval()
    # Steps are many small operations: inference_mode is a tenth faster than no_grad.
    with gathered(policy), torch.inference_mode(), packed(policy):
        # The prompts, once each: their keys and values, and the logits of the first token.
        pack = make_packs([Group(prompt, []) for prompt in prompts])[0].to(device)
        lengths = [segment.prompt for segment in pack.segments]
        kept = []
        lasts = torch.tensor(lengths, device=device).cumsum(0) - 1
        first = policy(**inputs(policy, pack, kept), logits_to_keep=lasts).logits[0]
        cache = RowCache(kept, lengths, device.type == "cuda" if fixed is None else fixed)
        decoder = Decoder(policy, cache)
        del kept
        following = torch.tensor([prompt.next_position for prompt in prompts], device=device)
        forbidden, ends = policy.forbidden.to(device), policy.ends.to(device)
        if temperature > 0:
            u = torch.stack(
                [
                    uniforms(seed, step, prompt.index, n, max_completion_length)
                    for prompt in prompts
                    for n in range(num_generations)
                ]
            ).to(device)
        waiting = torch.arange(rows_in_all, device=device)
        rows = waiting[:0]  # which row stands at each place, -1 where it has ended
        logits = first[:0]
        record = []  # (rows, tokens, probabilities) of every step
        while True:
            free = (max_rollout_rows or rows_in_all) - len(rows)
            new, waiting = waiting[:free], waiting[free:]
            if len(new):  # they begin with the logits that their prompt left
                rows = torch.cat([rows, new])
                cache.add(new // num_generations)
                logits = torch.cat([logits, first[new // num_generations]])
            if not len(rows):
                break
            logits = logits.float().div_(temperature or 1.0).index_fill_(1, forbidden, -torch.inf)
            p = logits.softmax(-1)
            if (
                temperature > 0
            ):  # inverse of the cumulated distribution at the row's own uniform number
                cdf = p.cumsum(-1)
                whole = (
                    cdf[:, -1:].contiguous()
                )  # a number just below 1 may round up to it: never beyond the last likely token
                token = torch.minimum(
                    torch.searchsorted(cdf, u[rows, cache.length, None] * whole, right=True),
                    torch.searchsorted(cdf, whole),
                )
            else:
                token = logits.argmax(-1, keepdim=True)
            record.append((rows, token[:, 0], p.gather(1, token)[:, 0]))
            ended = (token == ends).any(1) | (cache.length + 1 >= max_completion_length)
            rows = rows.masked_fill(ended, -1)
            order = cache.keep(rows >= 0, len(rows) // 2 if cache.fixed and not len(waiting) else 0)
            rows, token = rows[order], token[order]
            if not len(rows):
                logits = first[:0]
                continue
            position = positions(
                policy, (following[cache.prompt_of] + cache.length)[None, :, None].expand(3, -1, 1)
            )
            logits = decoder(token, position)
            cache.length = cache.length + (rows >= 0)
    policy.train(was_training)

    # The record, step after step, as one branch a row.
    row, token, p = (torch.cat(column).cpu() for column in zip(*record))
    order = row.argsort(stable=True)[int((row < 0).sum()) :]
    counts = torch.bincount(row[order], minlength=rows_in_all).tolist()
    tokens, logps = token[order].split(counts), p.log()[order].split(counts)
    n = num_generations
    return [
        Group(prompt, list(tokens[i * n : (i + 1) * n]), list(logps[i * n : (i + 1) * n]))
        for i, prompt in enumerate(prompts)
    ]


# --------------------------------------------------------------------------------------------------------------------
# Processes and sharding


def setup() -> torch.device:
    """Joins the processes that torchrun started (gloo on CPU, nccl on GPU); a bare `python` is one process."""
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        if not dist.is_initialized():
            alone = (
                {}
                if "RANK" in os.environ
                else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
            )
            dist.init_process_group("cpu:gloo,cuda:nccl", **alone)
        return torch.device("cuda", torch.cuda.current_device())
    if "RANK" in os.environ and not dist.is_initialized():
        dist.init_process_group("gloo")
    return torch.device("cpu")


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def all_sum(values, op=dist.ReduceOp.SUM if dist.is_available() else None) -> torch.Tensor:
    """A small float64 vector, summed (or `op`) over the ranks."""
    values = torch.as_tensor(values, dtype=torch.float64)
    if world_size() > 1:
        dist.all_reduce(values, op)
    return values


def shard(module: torch.nn.Module, device: torch.device) -> torch.nn.Module:
    """FSDP2 over all ranks: every transformer block a unit, the rest the root's. Gradients are summed over ranks."""
    if world_size() == 1 and device.type == "cpu":
        return module
    mesh = init_device_mesh(device.type, (world_size(),))
    precision = (
        MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        if device.type == "cuda"
        else MixedPrecisionPolicy()
    )
    blocks = {
        name for part in module.modules() for name in getattr(part, "_no_split_modules", None) or ()
    }
    for block in [m for m in module.modules() if type(m).__name__ in blocks]:
        fully_shard(block, mesh=mesh, mp_policy=precision)
    fully_shard(module, mesh=mesh, mp_policy=precision)
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.set_gradient_divide_factor(1.0)
            if device.type == "cpu":
                part.set_force_sum_reduction_for_comms(True)
    return module


@contextlib.contextmanager
def gathered(module: torch.nn.Module):
    """The whole weights on every rank for a while, so that forwards need no other rank; sharded again afterwards.

    FSDP's hooks are away as well. Where weights are there already they have nothing to do, but they take a fifth of a small
    model's step, and on a GPU they make other streams wait for one that is being recorded.
    """
    parts = [m for m in module.modules() if isinstance(m, FSDPModule)]
    hooks = [(part._forward_pre_hooks, part._forward_hooks) for part in parts]
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
        part._forward_pre_hooks, part._forward_hooks = OrderedDict(), OrderedDict()
    try:
        yield
    finally:
        for part, (before, after) in zip(parts, hooks):
            part._forward_pre_hooks, part._forward_hooks = before, after
            part.set_reshard_after_forward(part is not module, recurse=False)
            part.reshard()


def even_packs(packs: list[Pack], processor) -> list[Pack]:
    """As many packs on every rank, each with an image where any has one: a forward is a collective when sharded."""
    if world_size() == 1:
        return packs
    count, images = all_sum(
        [len(packs), any(p.pixel_values is not None for p in packs)], dist.ReduceOp.MAX
    ).tolist()
    missing = int(count) - len(packs)
    if not missing and (not images or all(p.pixel_values is not None for p in packs)):
        return packs
    blank = blank_group(processor)
    packs = packs + [make_packs([blank])[0] for _ in range(missing)]
    return [
        _with_blank(pack, blank) if images and pack.pixel_values is None else pack for pack in packs
    ]


def _with_blank(pack: Pack, blank: Group) -> Pack:
    tail = make_packs([blank])[0]
    tail.segments[0].start = pack.input_ids.shape[1]
    pack.segments = pack.segments + tail.segments
    pack.input_ids = torch.cat([pack.input_ids, tail.input_ids], 1)
    pack.position_ids = torch.cat([pack.position_ids, tail.position_ids], 2)
    pack.pixel_values, pack.image_grid_thw = tail.pixel_values, tail.image_grid_thw
    return pack


def learning_rate_at(
    step: int, max_steps: int, learning_rate: float, warmup_ratio: float, schedule: str
) -> float:
    """The rate of step 1 .. max_steps: linear warm-up over the first share, then `constant`, or `cosine` to zero."""
    warmup = warmup_ratio * max_steps
    if step <= warmup:
        return learning_rate * step / max(1.0, warmup)
    if schedule == "constant":
        return learning_rate
    return (
        learning_rate
        * 0.5
        * (1 + math.cos(math.pi * (step - 1 - warmup) / max(1.0, max_steps - warmup)))
    )


def optimizer_step(module, optimizer, learning_rate: float, max_grad_norm: float) -> float:
    """Clips the global gradient norm, steps, clears. Returns the norm before clipping; when it is not finite the step
    is left out (the weights stay as they were), which the caller sees in what is returned."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    norm = torch.nn.utils.clip_grad_norm_(module.parameters(), max_grad_norm)
    norm = float(norm.full_tensor() if isinstance(norm, DTensor) else norm)
    if math.isfinite(norm):
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm


# --------------------------------------------------------------------------------------------------------------------
# Hugging Face directories in and out


def read_config(flag: str, path: str):
    """The configuration of a Hugging Face directory or hub id, or one line that says what is wrong with it."""
    if os.path.exists(path) and not os.path.isfile(os.path.join(path, "config.json")):
        raise UserError(
            f"{flag} {path}: no config.json in it; give a Hugging Face model directory or a hub id"
        )
    try:
        return AutoConfig.from_pretrained(path)
    except Exception as error:
        raise UserError(
            f"{flag} {path}: neither a Hugging Face directory nor a hub id that can be loaded "
            f"({str(error).strip().splitlines()[0][:150]})"
        ) from None


class Patches(torch.nn.Conv3d):
    """The patch embedding of a vision tower. Its input are single patches, so the convolution is a matrix product, which
    takes a seventh of its time on a CPU (forward and backward)."""

    def forward(self, patches):
        if patches.shape[2:] != self.kernel_size:
            return super().forward(patches)
        return F.linear(patches.flatten(1), self.weight.flatten(1), self.bias)


def adapt(model, where: str) -> None:
    """The language model attends by PackAttention or RowCache from now on, and patches are embedded by a product. Every
    layer must see all that came before."""
    kinds = set(getattr(model.config.get_text_config(), "layer_types", None) or ["full_attention"])
    if kinds != {"full_attention"}:
        raise UserError(
            f"{where}: found {', '.join(sorted(kinds))} among the layers of {model.config.model_type}, expected "
            f"full_attention in all; packs have no other"
        )
    model.set_attn_implementation({"text_config": "layout", "vision_config": "sdpa"})
    own = {torch.nn.Conv3d: Patches, torch.nn.Linear: Linear}
    for module in model.modules():
        module.__class__ = own.get(type(module), type(module))


def load_policy(flag: str, path: str, activation_checkpointing: bool = False):
    """-> (policy, processor) in float32. The policy carries `forbidden` and `ends`: the ids that are never sampled (an
    image's tokens, without an image, would break the next forward), and those that end a response."""
    config = read_config(flag, path)
    if hasattr(config, "prism_experts"):
        raise UserError(
            f"{flag} {path}: a discriminator, which has no language head; name a policy"
        )
    try:
        policy = AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32)
        processor = load_processor(path)
    except Exception as error:
        raise UserError(
            f"{flag} {path}: a {config.model_type} directory that cannot be loaded as a vision-language "
            f"model with its processor ({str(error).strip().splitlines()[0][:150]})"
        ) from None
    adapt(policy, f"{flag} {path}")
    policy.lm_head.__class__ = Head
    names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    there = range(config.get_text_config().vocab_size)
    policy.forbidden = torch.tensor(
        [i for i in (getattr(config, name, None) for name in names) if i in there]
    )
    ends = policy.generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    policy.ends = torch.tensor(
        sorted({processor.tokenizer.eos_token_id, *(e for e in ends if e is not None)})
    )
    if activation_checkpointing:
        policy.activation_checkpointing_enable()
    return policy, processor


def full_state(module) -> dict[str, torch.Tensor]:
    """The whole weights on the CPU of rank 0 (empty elsewhere)."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    return get_model_state_dict(
        module, options=StateDictOptions(full_state_dict=True, cpu_offload=True)
    )


def save_policy(policy, processor, path: str) -> None:
    """A Hugging Face directory: weights, config, generation config, processor, chat template. Called by every rank."""
    state = full_state(policy)
    if rank() == 0:
        if policy.config.tie_word_embeddings:
            state.pop("lm_head.weight", None)
        policy.set_attn_implementation("sdpa")
        policy.save_pretrained(path, state_dict=state)
        adapt(policy, path)
        save_processor(processor, path)
    if world_size() > 1:
        dist.barrier()
