"""Sampling: N branches for each prompt from the policy (the rollouts of stages 2 and 3).

    y_t ~ softmax(z_t / tau)          at the temperature, and over the vocabulary, of the scores

A prompt is computed once, and its N rows go on from its keys and values, which stand once in
memory. Finished rows leave at once. A row draws its random numbers from (seed, step, prompt, row),
so what it says depends on nothing else in the batch.

On a GPU a step of decoding is a thousand small kernels that take longer to launch than to run.
There, places are *fixed*: a finished row keeps its place until half of the rows have finished, and
the number of keys that are read grows in steps of 128. Most steps then repeat the shapes of the
step before, and can be recorded once as a CUDA graph and replayed. None of this has run on a GPU
yet; the tests run it on a CPU with a recorder in the graph's place.
"""

import hashlib
import warnings

import torch
import torch.nn.functional as F

from data import Group, Prompt, make_packs
from model import gathered, model_inputs, positions
from rows import UserError


class RowCache:
    """Keys and values while S rows of P prompts are sampled, given to the model as `layout`.
    K key-value heads, G query heads to each, D values a head.

    The prompts' keys stand once each, and all rows of a prompt attend to them in one product.
    Each row's own keys stand at its index, in places that grow up to `limit`. The softmax over
    both is merged by their logsumexps: to a row's own scores its prompt is added as one more key,
    whose score is the logsumexp of the prompt's scores and whose value is the prompt's output.
    """

    def __init__(self, collected, lengths: list[int], limit: int, fixed: bool = False):
        self.limit, self.fixed = limit, fixed
        self.kv_heads, _, dim = collected[0][0].shape
        device = collected[0][0].device
        lengths = torch.tensor(lengths)
        first, offset = lengths.cumsum(0) - lengths, torch.arange(int(lengths.max()))
        index = torch.where(offset < lengths[:, None], first[:, None] + offset, 0).to(device)
        # Of each layer: the prompts' keys (P * K, D, longest), their values (P * K, longest, D)
        tables = [[x[:, index].transpose(0, 1).flatten(0, 1) for x in kv] for kv in collected]
        self.prompts = [(k.mT.contiguous(), v) for k, v in tables]
        self.beyond = self._bias((offset >= lengths[:, None]).to(device))
        # Of each layer, the rows' own keys (places, K, D, room) and values (places, K, room, D)
        keys, values = (self.kv_heads, dim, 0), (self.kv_heads, 0, dim)
        self.own = [(k.new_zeros(0, *keys), v.new_zeros(0, *values)) for k, v in tables]
        self.prompt_of = torch.zeros(0, dtype=torch.long, device=device)  # (S,)
        self.length = torch.zeros(0, dtype=torch.long, device=device)  # (S,) own tokens so far
        self.seen = 0  # how many own places a step reads

    def add(self, prompt_of: torch.Tensor) -> None:
        """New rows, with no tokens of their own, take places behind those that are there."""
        self.length = torch.cat([self.length, torch.zeros_like(prompt_of)])
        self._tabulate(torch.cat([self.prompt_of, prompt_of]))

    def drop(self, ended: torch.Tensor, idle: int = 0) -> torch.Tensor:
        """Drops the rows that have ended, unless they are no more than `idle`. Rows from the tail
        fill the holes. -> (S',) the old place of each row."""
        alive = ~ended
        count = int(alive.sum())
        if len(alive) - count <= idle:  # as in most steps
            return torch.arange(len(alive), device=alive.device)
        order = torch.arange(count, device=alive.device)
        holes = ended[:count].nonzero()[:, 0]
        movers = count + alive[count:].nonzero()[:, 0]
        order[holes] = movers
        there = movers < len(self.own[0][0])  # a row of one token never had a place
        for k, v in self.own:
            k[holes[there], ..., : self.seen] = k[movers[there], ..., : self.seen]
            v[holes[there], :, : self.seen] = v[movers[there], :, : self.seen]
        self.length = self.length[order]
        self._tabulate(self.prompt_of[order])
        return order

    def _tabulate(self, prompt_of: torch.Tensor) -> None:
        """The table (P, K, width) of the rows of each prompt: where each row and head stands in
        it, and which stands at each of its places (the first row where none does)."""
        self.prompt_of, device = prompt_of, prompt_of.device
        self.rows = torch.arange(len(prompt_of), device=device)
        counts = torch.bincount(prompt_of, minlength=len(self.beyond) // self.kv_heads)
        width = int(counts.max())
        width = 1 << (width - 1).bit_length() if self.fixed else width
        order = prompt_of.argsort(stable=True)
        place = torch.empty_like(order)  # (S,) a row's place among those of its prompt
        place[order] = self.rows - (counts.cumsum(0) - counts)[prompt_of[order]]
        heads = torch.arange(self.kv_heads, device=device)
        place = (prompt_of[:, None] * self.kv_heads + heads) * width + place[:, None]
        self.place = place.flatten()  # (S * K,)
        self.table = torch.zeros(len(self.beyond) * width, dtype=torch.long, device=device)
        self.table[self.place] = torch.arange(len(self.place), device=device)

    def begin_step(self) -> list[torch.Tensor]:
        """Before each forward of the S rows, one token a row: makes room. -> what `attend` reads
        from `self.inputs`."""
        need = int(self.length.max()) + 1
        self.seen = min(self.limit, -(-need // 128) * 128) if self.fixed else need
        places, room = self.own[0][1].shape[0], self.own[0][1].shape[2]
        if len(self.rows) > places or self.seen > room:
            more = max(0, len(self.rows) - places)
            longer = min(self.limit, max(256, 2 * self.seen)) - room if self.seen > room else 0
            for layer, (k, v) in enumerate(self.own):  # layer by layer: never twice in memory
                k = F.pad(k, (0, longer, 0, 0, 0, 0, 0, more))
                self.own[layer] = k, F.pad(v, (0, 0, 0, longer, 0, 0, 0, more))
        unseen = torch.arange(self.seen, device=self.length.device) > self.length[:, None]
        return [self.rows, self.length, self.table, self.place, self._bias(unseen)]

    def attend(self, layer: int, q, k, v, scale: float) -> torch.Tensor:
        """(S, H, 1, D), (S, K, 1, D) twice -> (S, 1, H, D)."""
        rows, length, table, place, unseen = self.inputs
        heads, dim = q.shape[1], q.shape[3]
        own_k, own_v = (x[: len(rows)] for x in self.own[layer])
        own_k[rows, :, :, length] = k[:, :, 0]
        own_v[rows, :, length] = v[:, :, 0]
        own_k = own_k[..., : self.seen].flatten(0, 1)
        own_v = own_v[:, :, : self.seen].flatten(0, 1)
        prompts_k, prompts_v = self.prompts[layer]
        q = q.view(len(place), -1, dim)  # (S * K, G, D)
        asked = q.index_select(0, table).view(len(prompts_k), -1, dim)
        scores = torch.baddbmm(self.beyond, asked, prompts_k, alpha=scale)
        logp = scores.log_softmax(-1, dtype=torch.float32)  # (P * K, width * G, longest)
        output = torch.bmm(logp.exp().to(v.dtype), prompts_v).view(len(table), -1, dim)
        # s - log softmax(s) is the logsumexp, for any one s
        logsumexp = (scores[..., :1] - logp[..., :1]).view(len(table), -1, 1)
        logsumexp, output = logsumexp.index_select(0, place), output.index_select(0, place)
        scores = torch.cat([logsumexp, torch.baddbmm(unseen, q, own_k, alpha=scale)], -1)
        p = scores.softmax(-1, dtype=torch.float32).to(v.dtype)
        merged = torch.baddbmm(p[..., :1] * output, p[..., 1:], own_v)
        return merged.view(len(rows), 1, heads, dim)

    def _bias(self, hidden: torch.Tensor) -> torch.Tensor:
        """(n, keys) -> (n * K, 1, keys): -inf where keys are hidden, 0 elsewhere."""
        k = self.prompts[0][0]
        bias = torch.zeros(hidden.shape, dtype=k.dtype, device=k.device)
        bias = bias.masked_fill_(hidden, -torch.inf)
        return bias.repeat_interleave(self.kv_heads, 0)[:, None]


class Decoder:
    """One step of the rows in `cache`: their tokens (S, 1) at mrope positions (3, S, 1) or
    positions (S, 1) -> logits (S, V).

    With fixed places, a step whose shapes come for the second time is recorded as a CUDA graph.
    Later steps of these shapes copy what they read into the tensors of the recorded step and
    replay it. Weights and cache must stay where they are, or show it in the shapes.
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
            said = f"this call of generate goes on without CUDA graphs: {error}"
            warnings.warn(said, stacklevel=2)
            self.graphs, self.cache.fixed = {}, False

    def _forward(self, read) -> torch.Tensor:
        token, position, *self.cache.inputs = read
        inputs = dict(input_ids=token, position_ids=position, use_cache=False, layout=self.cache)
        return self.policy(**inputs).logits[:, 0]


def uniforms(seed: int, step: int, prompt: int, row: int, count: int) -> torch.Tensor:
    """The random numbers of one row, (count,). They depend on the arguments alone."""
    key = hashlib.blake2b(f"{seed} {step} {prompt} {row}".encode(), digest_size=7).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(key, "big"))
    return torch.rand(count, generator=generator)


def sampling_flags(config) -> dict:
    """What `generate` takes of a stage's flags."""
    names = "num_generations max_completion_length temperature seed max_rollout_rows".split()
    return {name: getattr(config, name) for name in names}


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
    """Samples `num_generations` branches for each prompt (temperature 0: greedy) and records their
    log-probabilities. A branch ends with an end of sequence, or without one where it has reached
    `max_completion_length` tokens.

    There is no top-k and no top-p, so what is sampled is what `token_logprobs` scores. The ids in
    `policy.forbidden` are left out of both. `max_rollout_rows` bounds the rows alive at once, the
    others wait. `fixed` places are for a GPU, where they are the default. Every rank calls this,
    also one without prompts. UserError where the policy's logits are not finite.
    Takes along: _generate, RowCache, Decoder, uniforms, data.make_packs, model.adapt,
    model.gathered, model.model_inputs, rows.UserError.
    """
    was_training = policy.training
    policy.eval()
    # A step is many small operations: inference_mode is a tenth faster than no_grad.
    with gathered(policy), torch.inference_mode():
        limits = num_generations, max_completion_length, max_rollout_rows
        args = policy, prompts, *limits, temperature, seed, step, fixed
        groups = _generate(*args) if prompts else []
    policy.train(was_training)
    return groups


def _generate(policy, prompts, n, limit, max_rows, temperature, seed, step, fixed) -> list[Group]:
    # The prompts, once each: their keys and values, and the logits of the first tokens.
    device = next(policy.parameters()).device
    pack = make_packs([Group(prompt, []) for prompt in prompts])[0].to(device)
    lengths = [segment.prompt for segment in pack.segments]
    collected = []
    lasts = torch.tensor(lengths, device=device).cumsum(0) - 1
    first = policy(**model_inputs(policy, pack, collected), logits_to_keep=lasts).logits[0]
    if not first.isfinite().all():
        raise UserError("the policy's logits are not finite: its weights hold NaN or infinity")
    fixed = device.type == "cuda" if fixed is None else fixed
    cache = RowCache(collected, lengths, limit, fixed)
    decoder = Decoder(policy, cache)
    del collected
    following = torch.tensor([prompt.next_position for prompt in prompts], device=device)
    forbidden, ends = policy.forbidden.to(device), policy.stop_ids.to(device)
    if temperature > 0:
        keys = [(seed, step, prompt.index, row) for prompt in prompts for row in range(n)]
        u = torch.stack([uniforms(*key, limit) for key in keys]).to(device)

    waiting = torch.arange(len(prompts) * n, device=device)
    rows = waiting[:0]  # the row at each place, -1 where it has ended
    logits = first[:0]
    record = []  # (rows, tokens, probabilities) of every step
    while True:
        # Waiting rows take free places. They begin with the logits that their prompt left.
        free = (max_rows or len(prompts) * n) - len(rows)
        new, waiting = waiting[:free], waiting[free:]
        if len(new):
            rows = torch.cat([rows, new])
            cache.add(new // n)
            logits = torch.cat([logits, first[new // n]])
        if not len(rows):
            break
        # A token for each row: the inverse of the cumulated distribution at its random number.
        logits = logits.float().div_(temperature or 1.0).index_fill_(1, forbidden, -torch.inf)
        p = logits.softmax(-1)
        if temperature > 0:
            cdf = p.cumsum(-1)
            whole = cdf[:, -1:].contiguous()
            token = torch.searchsorted(cdf, u[rows, cache.length, None] * whole, right=True)
            # A number just below 1 may round up to 1: never beyond the last likely token.
            token = torch.minimum(token, torch.searchsorted(cdf, whole))
        else:
            token = logits.argmax(-1, keepdim=True)
        record.append((rows, token[:, 0], p.gather(1, token)[:, 0]))
        # Finished rows leave, at once or, where places are fixed, when half have finished.
        ended = (token == ends).any(1) | (cache.length + 1 >= limit)
        rows = rows.masked_fill(ended, -1)
        order = cache.drop(rows < 0, len(rows) // 2 if cache.fixed and not len(waiting) else 0)
        rows, token = rows[order], token[order]
        if not len(rows):
            logits = first[:0]
            continue
        position = (following[cache.prompt_of] + cache.length)[None, :, None].expand(3, -1, 1)
        logits = decoder(token, positions(policy, position))
        cache.length = cache.length + (rows >= 0)

    # The record, step after step, as one branch a row.
    row, token, p = (torch.cat(column).cpu() for column in zip(*record))
    order = row.argsort(stable=True)[int((row < 0).sum()) :]
    counts = torch.bincount(row[order], minlength=len(prompts) * n).tolist()
    tokens, logps = token[order].split(counts), p.log()[order].split(counts)
    return [
        Group(prompt, list(tokens[i * n : (i + 1) * n]), list(logps[i * n : (i + 1) * n]))
        for i, prompt in enumerate(prompts)
    ]
