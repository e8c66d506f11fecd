"""Sampling: N branches for each prompt from the policy (the rollouts of stages 2 and 3).

    y_t ~ softmax(z_t / tau)          the distribution that model.token_logprobs scores

A *row* is one branch while it is sampled. A prompt is computed once, and its N rows go on from its
keys and values, which stand once in memory. A *slot* is a place in the batch that is decoded, with
room for one row's own keys and values. Where there are fewer slots than rows, rows wait for an idle
slot, whose row has ended. A row draws its random numbers from (seed, step, prompt, row), so its
tokens depend on nothing else in the batch. In names, what a row says are the tokens sampled for it.

On a GPU a step of decoding is a thousand small kernels that take longer to launch than to run.
There, shapes are *fixed*: only every eighth step asks which rows have ended. Where no rows wait,
idle slots are given up only when more than half are idle. A step changes its tensors in place, so
it can be recorded once as a CUDA graph and replayed by one launch.
"""

import hashlib
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.nn.attention.varlen import AuxRequest, varlen_attn

from data import Group, Prompt, make_packs
from model import has_varlen, model_inputs, positions
from support.decode import decode_step
from support.errors import UserError
from support.fit import PROMPT_TOKENS
from support.ranks import gathered


class RowCache:
    """Keys and values of S slots, a row in each, and of the P prompts that the rows go on from,
    given to the model as `layout`. K key-value heads, G query heads to each, H = K * G in all, D
    values a head.

    All rows of a prompt attend to its keys together. A row's own keys stand in its slot, whose room
    grows up to `limit` tokens. The outputs of both are merged by their logsumexps.
    Takes along: attend_first, first_keys, model.has_varlen."""

    def __init__(self, collected: list, prompt_lengths, heads, n: int, slots, limit, fixed):
        """`collected` are the keys and values (K, T, D) of each layer for the T tokens of all
        prompts; the list is emptied. `prompt_lengths` (P,) are the prompts' tokens, `heads` is
        K * G, `n` the rows of a prompt, `limit` the most tokens of a row. `fixed`: shapes are
        fixed."""
        self.n, self.limit, self.fixed = n, limit, fixed
        self.kv_heads, _, dim = collected[0][0].shape
        self.group = heads // self.kv_heads  # G
        device = collected[0][0].device
        # Which of the T tokens is token i of each prompt: (P, longest), 0 beyond a prompt's end.
        lengths = torch.tensor(prompt_lengths)
        first, offset = lengths.cumsum(0) - lengths, torch.arange(int(lengths.max()))
        index = torch.where(offset < lengths[:, None], first[:, None] + offset, 0).to(device)
        self.prompts = []  # of each layer, (P * K, longest, D) twice
        while collected:  # layer by layer: never twice in memory
            kv = collected.pop(0)
            self.prompts.append([x[:, index].transpose(0, 1).flatten(0, 1) for x in kv])
        self.prompt_lengths = lengths.to(device)  # (P,)
        none = self.prompts[0][0].new_zeros(slots, self.kv_heads, 0, dim)
        self.own = [(none, none)] * len(self.prompts)  # of each layer, (slots, K, room, D) twice
        self.prompt_of = torch.zeros(slots, dtype=torch.long, device=device)  # (S,)
        self.length = torch.zeros(slots, dtype=torch.long, device=device)  # (S,) own tokens so far
        self.slots = torch.arange(slots, device=device)
        self.filled = 0  # a bound of the tokens in any slot, which a step raises by one
        self.version = 0  # of the tensors: how often they have moved or changed their shape
        self.table = self.place = self.prompt_bounds = None

    def enter(self, slots: torch.Tensor, prompt_of: torch.Tensor) -> None:
        """New rows, with no tokens of their own, take slots."""
        self.length[slots] = 0
        self.prompt_of[slots] = prompt_of
        self.filled = int(self.length.max())
        self._tabulate()

    def compact(self, idle: torch.Tensor) -> torch.Tensor:
        """Gives the idle slots up. Rows from the last slots move into them, so that S' slots are
        left. -> (S',) the slot from which the row in each slot comes."""
        alive = torch.ones(len(self.length), dtype=torch.bool, device=idle.device)
        alive[idle] = False
        count = len(alive) - len(idle)
        order = torch.arange(count, device=idle.device)
        holes, movers = idle[idle < count], count + alive[count:].nonzero()[:, 0]
        order[holes] = movers
        for kv in self.own:
            for x in kv:
                x[holes, :, : self.filled] = x[movers, :, : self.filled]
        # Leave out the slots given up, here and not in `attend`. A compiled layer that cut them off
        # itself would copy the rest before it writes, and copy it back.
        self.own = [[x[:count] for x in kv] for kv in self.own]
        self.length, self.prompt_of = self.length[order], self.prompt_of[order]
        self.slots = self.slots[:count]
        self.filled = int(self.length.max())
        self.version += 1
        self._tabulate()
        return order

    def _tabulate(self) -> None:
        """Sorts the S rows by prompt, for each key-value head, into a flat table (P, K, width).
        `place` (S * K,): where each (row, head) stands in the table. `table`: which (row, head)
        stands at each place, 0 where none does. `prompt_bounds`, of `first_keys`: attention reads
        each prompt up to its end, and not the padding behind."""
        counts = torch.bincount(self.prompt_of, minlength=len(self.prompt_lengths))
        width = self.n if self.fixed else int(counts.max())
        order = self.prompt_of.argsort(stable=True)
        among = torch.empty_like(order)  # (S,) a row's place among those of its prompt
        among[order] = self.slots - (counts.cumsum(0) - counts)[self.prompt_of[order]]
        heads = torch.arange(self.kv_heads, device=order.device)
        place = (self.prompt_of[:, None] * self.kv_heads + heads) * width + among[:, None]
        place = place.flatten()  # (S * K,)
        table = torch.zeros(len(counts) * self.kv_heads * width, dtype=torch.long).to(place)
        table[place] = torch.arange(len(place), device=place.device)
        # A prompt without rows counts as one key long. Nobody asks for the result.
        read = torch.where(counts > 0, self.prompt_lengths, 1).repeat_interleave(self.kv_heads)
        prompt_bounds = first_keys(read, width * self.group, self.prompts[0][0])
        # In place where the shape is the same, since a recorded step reads these very tensors.
        for name, new in {"table": table, "place": place, "prompt_bounds": prompt_bounds}.items():
            old = getattr(self, name)
            if old is not None and old.shape == new.shape:
                old.copy_(new)
            else:
                setattr(self, name, new)

    def reserve(self) -> None:
        """Room for one more token in every slot."""
        self.filled = min(self.filled + 1, self.limit)
        room = self.own[0][0].shape[2]
        if self.filled > room:
            longer = min(self.limit, max(256, 2 * self.filled)) - room
            for layer, kv in enumerate(self.own):  # again never twice in memory
                self.own[layer] = [F.pad(x, (0, 0, 0, longer)) for x in kv]
            self.version += 1
        # How many places of a slot are handed to attention: the filled ones, or all where shapes
        # are fixed. Ragged attention gets all too. It is told how many to read, so that the keys
        # need not be copied to leave some out.
        whole = self.fixed or has_varlen(self.slots)
        self.attended = self.own[0][0].shape[2] if whole else self.filled

    def begin_step(self) -> None:
        """Is called before each forward of the S rows, one token a row. `own_bounds`, of
        `first_keys`: attention reads the tokens that a slot holds, and not the room behind."""
        read = (self.length + 1).repeat_interleave(self.kv_heads)
        self.own_bounds = first_keys(read, self.group, self.own[0][0][0, :, : self.attended])

    def attend(self, layer: int, q, k, v, scale: float) -> torch.Tensor:
        """q (S, H, 1, D), k and v (S, K, 1, D) -> (S, 1, H, D)."""
        # Put each row's new key and value into its slot.
        for kept, new in zip(self.own[layer], (k, v)):
            kept[self.slots, :, self.length] = new[:, :, 0]
        own = (x[:, :, : self.attended].flatten(0, 1) for x in self.own[layer])
        # All rows of a prompt attend to its keys together, sorted by the table.
        prompts = self.prompts[layer]
        rows = q.view(len(q) * self.kv_heads, self.group, q.shape[3])
        asked = rows.index_select(0, self.table).view(len(prompts[0]), -1, q.shape[3])
        answers = attend_first(self.prompt_bounds, asked, *prompts, scale)
        shared, prompt_lse = (
            x.view(len(self.table), self.group, -1).index_select(0, self.place) for x in answers
        )
        # Each row attends to its own keys.
        alone, own_lse = attend_first(self.own_bounds, rows, *own, scale)
        # One softmax over both: own keys weigh exp(own_lse) / (exp(own_lse) + exp(prompt_lse)).
        merged = shared.lerp(alone, (own_lse - prompt_lse).sigmoid().to(alone.dtype))
        return merged.view(len(q), 1, q.shape[1], q.shape[3])


def first_keys(read: torch.Tensor, queries: int, keys: torch.Tensor) -> torch.Tensor:
    """The bounds by which `attend_first` reads only the first `read` (n,) of L keys (.., L, D), for
    `queries` queries each. With ragged attention (3, n + 1): where the queries of each begin, where
    its keys do, and `read`. Else a bias (n, 1, L) that is -inf at the keys that are not read."""
    if has_varlen(keys):
        number = torch.arange(len(read) + 1, device=read.device)
        return torch.stack([number * queries, number * keys.shape[-2], F.pad(read, (0, 1))]).int()
    hidden = torch.arange(keys.shape[-2], device=keys.device) >= read[:, None]
    bias = torch.zeros(hidden.shape, dtype=keys.dtype, device=keys.device)
    return bias.masked_fill_(hidden, -torch.inf)[:, None]


def attend_first(bounds, q, k, v, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of queries (n, m, D) to the first of the keys and values (n, L, D). `bounds` come
    from `first_keys`. -> output (n, m, D), logsumexp of the scores (n, m, 1) in float32."""
    if bounds.ndim == 2:  # `has_varlen`, which torch.compile cannot look into without a warning
        *starts, read = bounds
        tokens = (x.flatten(0, 1)[:, None] for x in (q, k, v))
        options = dict(scale=scale, seqused_k=read[:-1], return_aux=AuxRequest(lse=True))
        output, logsumexp = varlen_attn(*tokens, *starts, q.shape[1], k.shape[1], **options)
        return output.view_as(q), logsumexp.view(*q.shape[:2], 1)
    scores = torch.baddbmm(bounds, q, k.mT, alpha=scale)
    logp = scores.log_softmax(-1, dtype=torch.float32)
    # The logsumexp is score - log softmax(score) at any key, here at the first.
    return torch.bmm(logp.exp().to(v.dtype), v), scores[..., :1] - logp[..., :1]


class Rows:
    """R rows, n of each prompt, and what they have said. S of them at a time are in slots.

    With fixed shapes, the second step after a tensor has moved is recorded as a CUDA graph, which
    is replayed until a tensor moves again. The weights must stay where they are."""

    def __init__(self, policy, cache: RowCache, first, following, random, temperature: float):
        """`first` (P, V): the logits of each prompt's first response token; `following` (P,): that
        token's position; `random` (R + 1, limit): the random numbers of each row."""
        self.policy, self.cache, self.first, self.following = policy, cache, first, following
        self.random, self.limit, self.temperature = random, cache.limit, temperature
        device, count, limit = first.device, len(first) * cache.n, cache.limit
        self.forbidden, self.ends = policy.forbidden.to(device), policy.stop_ids.to(device)
        # Of each row; line R is for what idle slots say.
        self.tokens = torch.zeros(count + 1, limit, dtype=torch.long, device=device)
        self.logps = torch.zeros(count + 1, limit, device=device)
        self.said = torch.zeros(count + 1, dtype=torch.long, device=device)
        self.nobody = count
        # Of each slot: its row, or R, and the last token.
        self.row = torch.full_like(cache.length, self.nobody)
        self.token = torch.zeros_like(self.row)
        # The graph; the cache's version in the last step; its version in the graph.
        self.graph, self.last_version, self.graph_version = None, -1, -1
        self.may_record = cache.fixed

    def idle(self) -> torch.Tensor:
        """The slots whose rows have ended. This waits for the device."""
        return (self.row == self.nobody).nonzero()[:, 0]

    def enter(self, slots: torch.Tensor, rows: torch.Tensor) -> None:
        """Rows take slots. Their first token comes from the logits that their prompt left."""
        prompts = rows // self.cache.n
        self.cache.enter(slots, prompts)
        said = self._say(self.first[prompts], rows, torch.zeros_like(rows))
        self.row[slots], self.token[slots] = said

    def compact(self, idle: torch.Tensor) -> None:
        order = self.cache.compact(idle)
        self.row, self.token = self.row[order], self.token[order]

    def step(self) -> None:
        """One more token for the row in every slot."""
        self.cache.reserve()
        now = self.cache.version
        # The step before ran on these tensors, and no graph of them is recorded yet.
        if self.may_record and self.last_version == now and self.graph_version != now:
            self._record()
        if self.graph_version == now:
            self.graph.replay()
        else:
            self.graph = None
            self._step()
        self.last_version = now

    def _record(self) -> None:
        try:
            self.graph = torch.cuda.CUDAGraph()
            # Where recording fails, torch leaves its own stream as the current one.
            with torch.cuda.stream(torch.cuda.current_stream()):
                with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
                    self._step()
            self.graph_version = self.cache.version
        except RuntimeError as error:
            # torch says only that an error ended the capture; its context is that error.
            why = error.__context__ or error
            said = f"this call of generate goes on without CUDA graphs: {why}"
            warnings.warn(said, stacklevel=2)
            self.graph, self.may_record = None, False

    def _step(self) -> None:
        cache = self.cache
        cache.begin_step()
        mrope = (self.following[cache.prompt_of] + cache.length)[None, :, None].expand(3, -1, 1)
        inputs = dict(input_ids=self.token[:, None], position_ids=positions(self.policy, mrope))
        logits = decode_step(self.policy, cache, **inputs, use_cache=False).logits[:, 0]
        cache.length += self.row != self.nobody
        row, token = self._say(logits, self.row, cache.length)
        self.row.copy_(row)
        self.token.copy_(token)

    def _say(self, logits, row, number) -> tuple[torch.Tensor, torch.Tensor]:
        """Chooses and notes token `number` (S,) of each row (S,) by its logits (S, V). A random
        number picks it from the cumulated distribution; at temperature 0 it is the likeliest. ->
        the rows, with R in place of those that have ended, and the tokens, (S,) each."""
        logits = logits.float().div_(self.temperature or 1.0)
        p = logits.index_fill_(1, self.forbidden, -torch.inf).softmax(-1)
        if self.temperature > 0:
            cdf = p.cumsum(-1)
            whole = cdf[:, -1:].contiguous()
            u = self.random[row, number][:, None]
            token = torch.searchsorted(cdf, u * whole, right=True)
            # u * whole may round up to whole, beyond all tokens: then the last with p above 0.
            token = torch.minimum(token, torch.searchsorted(cdf, whole))
        else:
            token = logits.argmax(-1, keepdim=True)
        self.logps[row, number] = p.gather(1, token)[:, 0].log()
        self.tokens[row, number] = token[:, 0]
        self.said[row] = number + 1
        ended = (token == self.ends).any(1) | (number + 1 >= self.limit)
        return row.masked_fill(ended, self.nobody), token[:, 0]


def uniforms(seed: int, step: int, prompt: int, row: int, count: int) -> torch.Tensor:
    """The random numbers of one row, (count,). They depend on the arguments alone."""
    key = hashlib.blake2b(f"{seed} {step} {prompt} {row}".encode(), digest_size=7).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(key, "big"))
    return torch.rand(count, generator=generator)


@dataclass
class Sampling:
    """How rollouts are sampled."""

    num_generations: int  # N branches of each prompt
    max_completion_length: int  # tokens after which a branch is cut off
    temperature: float = 1.0  # 0: greedy
    seed: int = 0
    max_rollout_rows: int | None = None  # rows sampled at a time, others wait; None: all
    fixed: bool | None = None  # fixed shapes, for CUDA graphs; None: on a GPU

    @classmethod
    def of(cls, config) -> "Sampling":
        """From the flags of a stage."""
        return cls(
            num_generations=config.num_generations,
            max_completion_length=config.max_completion_length,
            temperature=config.temperature,
            seed=config.seed,
            max_rollout_rows=config.max_rollout_rows,
        )


def generate(policy, prompts: list[Prompt], sampling: Sampling, step: int = 0) -> list[Group]:
    """Samples `num_generations` branches for each prompt and records their log-probabilities. A
    branch ends with an end of sequence, or without one where it has reached
    `max_completion_length` tokens. `step` keys the random numbers, as `sampling.seed` does.

    There is no top-k and no top-p, so what is sampled is what `token_logprobs` scores. The ids in
    `policy.forbidden` are left out of both; those in `policy.stop_ids` end a branch. Every rank
    calls this, also one without prompts. UserError where the policy's logits are not finite,
    RuntimeError where it has no `stop_ids`.
    Takes along: Sampling, _parts, _generate, RowCache, Rows, uniforms, data.make_packs,
    model.prepare_for_packs, model.has_varlen, model.model_inputs, support.decode.decode_step,
    support.ranks.gathered, support.errors.UserError, support.fit.PROMPT_TOKENS."""
    if not hasattr(policy, "stop_ids"):
        raise RuntimeError("set policy.stop_ids first: a tensor of the ids that end a response")
    was_training = policy.training
    policy.eval()
    groups = []
    # A step is many small operations: inference_mode is a tenth faster than no_grad.
    with gathered(policy), torch.inference_mode():
        for part in _parts(prompts):
            groups += _generate(policy, part, sampling, step)
    policy.train(was_training)
    return groups


def _parts(prompts: list[Prompt]) -> Iterator[list[Prompt]]:
    """Prompts in parts of at most PROMPT_TOKENS tokens, each prompt counted as long as the longest.
    The keys of a part are laid out as long as that, so one large image among small ones would cost
    as if all were large."""
    part, longest = [], 0
    for prompt in prompts:
        longest = max(longest, len(prompt.input_ids))
        if part and (len(part) + 1) * longest > PROMPT_TOKENS:
            yield part
            part, longest = [], len(prompt.input_ids)
        part.append(prompt)
    if part:
        yield part


def _generate(policy, prompts: list[Prompt], sampling: Sampling, step: int) -> list[Group]:
    """`generate` for the prompts of one part."""
    n, limit = sampling.num_generations, sampling.max_completion_length
    device = next(policy.parameters()).device
    fixed = device.type == "cuda" if sampling.fixed is None else sampling.fixed
    # Compute the prompts, once each: their keys and values, and the logits of the first tokens.
    pack = make_packs([Group(prompt, []) for prompt in prompts])[0].to(device)
    lengths = [segment.prompt_length for segment in pack.segments]
    collected = []
    lasts = torch.tensor(lengths, device=device).cumsum(0) - 1
    first = policy(**model_inputs(policy, pack, collected), logits_to_keep=lasts).logits[0]
    if not first.isfinite().all():
        raise UserError(
            "the policy's logits are not finite: its weights hold NaN or infinity; name another "
            "policy, or, if this run trains it, go on with --resume at a lower --learning_rate"
        )
    following = torch.tensor([prompt.next_position for prompt in prompts], device=device)
    # Draw the random numbers of each row, one for each token.
    count = len(prompts) * n  # rows
    random = torch.zeros(count + 1, limit)
    if sampling.temperature > 0:
        for i, prompt in enumerate(prompts):
            for row in range(n):
                random[i * n + row] = uniforms(sampling.seed, step, prompt.index, row, limit)

    slots = min(count, sampling.max_rollout_rows or count)
    heads = policy.config.get_text_config().num_attention_heads
    cache = RowCache(collected, lengths, heads, n=n, slots=slots, limit=limit, fixed=fixed)
    random = random.to(device)
    rows = Rows(policy, cache, first, following, random, temperature=sampling.temperature)
    # Sample until all rows have ended.
    waiting = torch.arange(count, device=device)
    while True:
        idle = rows.idle()
        if len(idle) and len(waiting):
            # Waiting rows take idle slots. A row may end with its first token.
            new, waiting = waiting[: len(idle)], waiting[len(idle) :]
            rows.enter(idle[: len(new)], new)
            continue
        if len(idle) == len(rows.row):
            break
        # Ended rows leave, at once or, where shapes are fixed, when more than half have ended.
        if len(idle) > (len(rows.row) // 2 if fixed else 0):
            rows.compact(idle)
        for _ in range(8 if fixed else 1):
            rows.step()

    tokens, logps, said = rows.tokens.cpu(), rows.logps.cpu(), rows.said.tolist()
    return [
        Group(
            prompt,
            [tokens[row, : said[row]] for row in range(i * n, i * n + n)],
            [logps[row, : said[row]] for row in range(i * n, i * n + n)],
        )
        for i, prompt in enumerate(prompts)
    ]
