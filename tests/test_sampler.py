"""Sampling: what is sampled is what is scored, a row depends on itself alone, and recorded steps
give the same branches."""

import contextlib
import copy
import warnings
import weakref
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from transformers import AutoModelForImageTextToText

import sampler
from data import Group, encode_prompts, make_packs
from model import load_policy, token_logprobs
from sampler import RowCache, Sampling, generate, uniforms
from support.errors import UserError
from support.rows import load_data
from tests.conftest import as_on_a_gpu, same_samples, varlen_by_mask
from tests.test_other_models import llava, qwen2_5_vl
from tests.test_model import devices, example, on


@pytest.fixture(scope="module")
def policy_processor(world):
    return load_policy(world["init"])


@pytest.mark.parametrize("rollouts, max_rows", [(4, None), (4, 3), (40, None)])
def test_sampled_is_scored(world, trained, rollouts, max_rows):
    """What the sampler records is what token_logprobs says of the same tokens; ragged lengths,
    several prompts, few rows and as many as make products large."""
    policy, processor = load_policy(trained)
    prompts = encode_prompts(
        processor, load_data(world["validation"])[:3] + [example(99, 0, "And without an image?")]
    )
    sampling = Sampling(rollouts, 60, temperature=1.3, seed=5, max_rollout_rows=max_rows)
    groups = generate(policy, prompts, sampling, step=2)
    assert (4 * rollouts * policy.lm_head.weight.numel() >= 2**20) == (rollouts == 40)
    lengths = [len(b) for g in groups for b in g.branches]
    assert len(set(lengths)) > 3 and max(lengths) <= 60
    assert any(int(b[-1]) in policy.stop_ids for g in groups for b in g.branches)
    for pack in make_packs(groups):
        scored = token_logprobs(policy, pack, 1.3)[0].detach()
        recorded = torch.cat([groups[g].logprobs[i] for g, i in pack.members])
        torch.testing.assert_close(scored, recorded, atol=1e-4, rtol=0)


def test_a_row_depends_on_itself_alone(world, trained):
    """Same seed, step and row: the same tokens, whatever else is sampled beside it and however many
    rows run at once."""
    policy, processor = load_policy(trained)
    prompts = encode_prompts(processor, load_data(world["validation"])[:4])
    whole = generate(policy, prompts, Sampling(5, 50, seed=1), step=3)
    alone = generate(policy, prompts[2:3], Sampling(3, 50, seed=1), step=3)
    queued = generate(policy, prompts, Sampling(5, 50, seed=1, max_rollout_rows=4), step=3)
    other = generate(policy, prompts, Sampling(5, 50, seed=1), step=4)
    three = Group(prompts[2], whole[2].branches[:3], whole[2].logprobs[:3])
    assert same_samples(policy, [three], alone, seed=1, step=3) > 0
    assert same_samples(policy, whole, queued, seed=1, step=3) > 100
    assert any(
        not torch.equal(a, b) for x, y in zip(whole, other) for a, b in zip(x.branches, y.branches)
    )


class Recorded(TorchDispatchMode):
    """A CUDA graph as far as a CPU can have one: the operations of a step with the very tensors
    they read and wrote, run again by `replay`. Recording itself changes nothing. What a step reads
    from elsewhere than these tensors is stale; what would wait for a value, or has a shape that
    depends on one, cannot be recorded. What was made before must be there as long as it is
    replayed: a graph knows addresses, and keeps nothing alive."""

    made = replays = 0

    def __init__(self):
        super().__init__()
        self.calls, self.before = [], []
        self.read, self.made_here = [], set()  # what others hold, weakly; what the step makes
        Recorded.made += 1

    def __exit__(self, *error):
        super().__exit__(*error)
        for tensor, value in reversed(self.before):
            tensor.copy_(value)

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        masks = any(
            isinstance(a, torch.Tensor) and a.dtype == torch.bool
            for a in tree_leaves((args, kwargs))
        )
        waits = (
            torch.Tag.data_dependent_output in op.tags or torch.Tag.dynamic_output_shape in op.tags
        )
        if masks if "index" in str(op) else waits:
            raise RuntimeError(f"{op} is not permitted while a stream is recorded")
        for tensor in tree_leaves((args, kwargs)):
            if isinstance(tensor, torch.Tensor) and id(tensor) not in self.made_here:
                self.read.append((weakref.ref(tensor), str(op), tensor.shape))
        if op._schema.is_mutable:
            self.before.append((args[0], args[0].clone()))
        out = op(*args, **(kwargs or {}))
        if any(not isinstance(x, torch.Tensor) for x in tree_leaves(out)):
            raise RuntimeError(f"{op} gives a value: not permitted while a stream is recorded")
        self.made_here |= {id(x) for x in tree_leaves(out)}
        alias = lambda x: x.detach() if isinstance(x, torch.Tensor) else x
        args, kwargs = tree_map(alias, (args, kwargs or {}))
        self.calls.append((op, args, kwargs, out))
        return out

    def replay(self):
        Recorded.replays += 1
        gone = {(op, shape) for held, op, shape in self.read if held() is None}
        assert not gone, f"a step that is replayed reads what is gone: {gone}"
        for op, args, kwargs, out in self.calls:
            for old, new in zip(tree_leaves(out), tree_leaves(op(*args, **kwargs))):
                if old.data_ptr() != new.data_ptr():
                    old.copy_(new)


@pytest.fixture
def recorded(monkeypatch) -> type[Recorded]:
    """The recorder in the CUDA graph's place. As torch does, it leaves the stream that it records
    on where recording fails."""
    here = ["main"]

    @contextlib.contextmanager
    def stream(name):
        before, here[0] = here[0], name
        try:
            yield
        finally:
            here[0] = before

    @contextlib.contextmanager
    def graph(recorded, **options):
        before, here[0] = here[0], "side"
        try:
            with recorded:
                yield
        except RuntimeError as error:
            raise RuntimeError("failed due to a previous error during capture") from error
        here[0] = before

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Recorded)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    monkeypatch.setattr(torch.cuda, "stream", stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: here[0])
    monkeypatch.setattr(Recorded, "made", 0)
    monkeypatch.setattr(Recorded, "replays", 0)
    return Recorded


@pytest.mark.parametrize("max_rows, temperature", [(None, 1.3), (5, 1.3), (None, 0.0)])
def test_fixed_shapes_and_recorded_steps(
    world, trained, recorded, max_rows, temperature, monkeypatch
):
    """The GPU's way of sampling, idle slots, ragged attention and steps that are replayed, gives
    the same branches as the CPU's."""
    policy, processor = load_policy(trained)
    prompts = encode_prompts(
        processor, load_data(world["validation"])[:3] + [example(99, 0, "And without an image?")]
    )
    sampling = Sampling(4, 150, temperature, seed=5, max_rollout_rows=max_rows)
    plain = generate(policy, prompts, sampling, step=2)
    as_on_a_gpu(monkeypatch)
    fixed = generate(policy, prompts, replace(sampling, fixed=True), step=2)
    lengths = [len(b) for g in plain for b in g.branches]
    assert len(set(lengths)) > 2 and max(lengths) > 20
    assert 1 <= recorded.made < recorded.replays / 4
    monkeypatch.undo()
    tokens = sum(lengths)
    assert same_samples(policy, plain, fixed, temperature, seed=5, step=2) > tokens / 2


@pytest.mark.parametrize("family", [qwen2_5_vl, llava])
def test_recorded_steps_of_other_families(world, tmp_path, recorded, family, monkeypatch):
    torch.manual_seed(0)
    family(world, tmp_path / "model")
    policy, processor = load_policy(str(tmp_path / "model"))
    prompts = encode_prompts(processor, load_data(world["validation"])[:3])
    sampling = Sampling(4, 40, temperature=1.3, seed=5)
    plain = generate(policy, prompts, sampling)
    as_on_a_gpu(monkeypatch)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fixed = generate(policy, prompts, replace(sampling, fixed=True))
    assert recorded.replays > 30
    assert same_samples(policy, plain, fixed, 1.3, seed=5) > 200


def test_a_step_that_cannot_be_recorded(world, trained, recorded):
    """Sampling goes on without the graph, says so, and gives the same branches."""
    policy, processor = load_policy(trained)
    prompts = encode_prompts(processor, load_data(world["validation"])[:3])
    sampling = Sampling(4, 60, temperature=1.3, seed=5)
    plain = generate(policy, prompts, sampling)
    handle = policy.lm_head.register_forward_hook(
        lambda module, inputs, logits: logits * logits.isfinite().all().item()
    )
    with pytest.warns(UserWarning, match="without CUDA graphs: .*not permitted") as warned:
        fixed = generate(policy, prompts, replace(sampling, fixed=True))
    handle.remove()
    assert len(warned) == 1 and torch.cuda.current_stream() == "main"
    assert same_samples(policy, plain, fixed, 1.3, seed=5) > 0


def test_fixed_shapes_without_a_gpu(world, trained):
    """They are sampled without graphs, which torch does not have there."""
    policy, processor = load_policy(trained)
    prompts = encode_prompts(processor, load_data(world["validation"])[:2])
    sampling = Sampling(4, 40, temperature=1.3, seed=5)
    plain = generate(policy, prompts, sampling)
    with pytest.warns(UserWarning, match="without CUDA graphs"):
        fixed = generate(policy, prompts, replace(sampling, fixed=True))
    assert same_samples(policy, plain, fixed, 1.3, seed=5) > 0


@pytest.mark.parametrize("fixed", [False, True])
def test_rows_that_wait_read_no_more_keys_than_there_are(
    world, trained, recorded, monkeypatch, fixed
):
    """Many short rows on few slots: what a step reads, and the cache's room, follow the longest row
    in a slot and not the number of steps."""
    policy, processor = load_policy(trained)
    prompts = encode_prompts(processor, load_data(world["validation"])[:2])
    steps, reserve = [], RowCache.reserve

    def spy(cache):
        longest = int(cache.length.max())
        reserve(cache)
        steps.append((cache.filled, longest + 1, cache.own[0][0].shape[2]))

    monkeypatch.setattr(RowCache, "reserve", spy)
    sampling = Sampling(16, 600, temperature=1.3, seed=5, max_rollout_rows=4, fixed=fixed)
    groups = generate(policy, prompts, sampling)
    filled, longest, room = torch.tensor(steps).T
    most = max(len(branch) for group in groups for branch in group.branches)
    assert len(steps) > 300 > most and room.max() == 256
    assert (filled >= longest).all()
    # Fixed shapes keep slots that have ended, and count on from the longest of those.
    assert filled.max() <= 2 * most + 8 if fixed else (filled == longest).all()


def test_sampling_follows_the_distribution(world, policy_processor):
    """First tokens of many rows against the policy's own probabilities (chi-square over the
    likelier tokens)."""
    policy, processor = policy_processor
    prompt = encode_prompts(processor, [example(0, 1, "One?")])[0]
    rows = 4000
    groups = generate(policy, [prompt], Sampling(rows, 1, temperature=0.8, seed=3))
    tokens = torch.cat(groups[0].branches)
    every = torch.arange(policy.config.text_config.vocab_size)
    allowed = every[~torch.isin(every, policy.forbidden)]
    pack = make_packs([Group(prompt, list(allowed[:, None]))])[0]
    p = token_logprobs(policy, pack, 0.8)[0].exp().detach()
    assert abs(float(p.sum()) - 1) < 1e-4
    assert not torch.isin(tokens, policy.forbidden).any()
    expected = p * rows
    seen = torch.bincount(tokens, minlength=len(every))[allowed].float()
    often = expected > 5
    chi2 = ((seen - expected) ** 2 / expected)[often].sum()
    freedom = int(often.sum())
    assert chi2 < freedom + 5 * (2 * freedom) ** 0.5


def test_greedy_equals_transformers_generate(world, trained):
    policy, processor = load_policy(trained)
    theirs = AutoModelForImageTextToText.from_pretrained(trained).eval()
    examples = load_data(world["validation"])[:6]
    prompts = encode_prompts(processor, examples)
    ours = generate(policy, prompts, Sampling(1, 48, temperature=0.0))
    for prompt, group in zip(prompts, ours):
        ids = prompt.input_ids[None]
        out = theirs.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            pixel_values=prompt.pixel_values,
            image_grid_thw=prompt.image_grid_thw,
            do_sample=False,
            max_new_tokens=48,
            mm_token_type_ids=(ids == processor.image_token_id).int(),
        )
        branch = out[0, ids.shape[1] :]
        assert same_samples(policy, [group], [Group(prompt, [branch])], temperature=0) > 0


def test_forbidden_tokens_have_no_probability(policy_processor):
    """A policy that wants nothing but image tokens still samples none."""
    policy, processor = copy.deepcopy(policy_processor[0]), policy_processor[1]
    with torch.no_grad():
        policy.lm_head.weight[policy.config.image_token_id] *= 100
    prompts = encode_prompts(processor, [example(0, 1, "One?")])
    groups = generate(policy, prompts, Sampling(8, 12))
    assert not torch.isin(torch.cat(groups[0].branches), policy.forbidden).any()
    assert torch.isfinite(torch.cat(groups[0].logprobs)).all()


def test_the_largest_random_number(policy_processor, monkeypatch):
    """Where rounding puts a row at the end of the cumulated distribution, it takes a token of some
    probability."""
    policy, processor = copy.deepcopy(policy_processor[0]), policy_processor[1]
    last = policy.config.text_config.vocab_size - 1
    policy.forbidden = torch.cat([policy.forbidden, torch.tensor([last - 1, last])])
    monkeypatch.setattr(
        "sampler.uniforms", lambda seed, step, prompt, row, count: torch.ones(count)
    )
    prompts = encode_prompts(processor, [example(0, 1, "One?")])
    (group,) = generate(policy, prompts, Sampling(2, 5))
    assert not torch.isin(torch.cat(group.branches), policy.forbidden).any()
    assert torch.isfinite(torch.cat(group.logprobs)).all()


def test_uniforms_depend_on_the_row_alone():
    """One stream for each (seed, step, prompt, row), the same for any length, all between 0 and 1;
    numbers that run together as text are still different rows."""
    whole = uniforms(1, 2, 3, 4, 50)
    assert torch.equal(uniforms(1, 2, 3, 4, 20), whole[:20])
    keys = [
        (a, b, c, d) for a in (0, 1, 11) for b in (0, 1) for c in (-1, 1, 10**12) for d in (0, 1)
    ]
    streams = torch.stack([uniforms(*key, 1000) for key in keys])
    assert len({tuple(row.tolist()) for row in streams}) == len(keys)
    assert streams.min() >= 0 and streams.max() < 1
    assert abs(float(streams.mean()) - 0.5) < 0.01 and abs(float(streams.var()) - 1 / 12) < 0.01


def test_no_prompts(policy_processor):
    """A rank without prompts samples nothing, and the policy is left as it was."""
    policy, _ = policy_processor
    for mode in (True, False):
        assert generate(policy.train(mode), [], Sampling(4, 20)) == [] and policy.training == mode


def test_prompts_in_parts(policy_processor, monkeypatch):
    """So many at a time as have room when each is as long as the longest; one that has no room
    beside others is alone. What is sampled does not depend on it."""
    policy, processor = policy_processor
    texts = ["One?", "Two?", "Three? " * 30, "Four?", "Five?", "Six?"]
    prompts = encode_prompts(processor, [example(i, 0, text) for i, text in enumerate(texts)])
    lengths = [len(prompt.input_ids) for prompt in prompts]
    assert lengths[2] > 3 * max(lengths[:2] + lengths[3:])
    whole = generate(policy, prompts, Sampling(3, 20, seed=1))
    monkeypatch.setattr(sampler, "PROMPT_TOKENS", lengths[2])
    parts = [[prompt.index for prompt in part] for part in sampler._parts(prompts)]
    assert [2] in parts and len(parts) < len(prompts) and sum(parts, []) == [*range(6)]
    assert (
        same_samples(policy, whole, generate(policy, prompts, Sampling(3, 20, seed=1)), seed=1)
        > 100
    )


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_weights_that_are_not_finite_are_one_line(policy_processor, value):
    policy, processor = copy.deepcopy(policy_processor[0]), policy_processor[1]
    prompts = encode_prompts(processor, [example(0, 1, "One?")])
    with torch.no_grad():
        policy.model.language_model.layers[0].mlp.up_proj.weight[0, 0] = value
    with pytest.raises(UserError, match="not finite: its weights hold NaN or infinity"):
        generate(policy, prompts, Sampling(2, 5))


@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize("attention", ["padded", "ragged"])
def test_row_cache_is_plain_attention(request, attention, fixed):
    """Rows of two prompts come and go; each step attends to [prompt | the row's own]."""
    if attention == "ragged":
        request.getfixturevalue("ragged")
    torch.manual_seed(0)
    kv_heads, heads, dim, lengths = 2, 4, 8, [3, 5]
    prompts = [torch.randn(2, kv_heads, length, dim) for length in lengths]
    collected = [tuple(torch.cat([kv[i] for kv in prompts], 1) for i in range(2))]
    cache = RowCache(collected, lengths, heads, n=3, slots=4, limit=300, fixed=fixed)
    rows = {}  # slot -> (prompt, keys and values so far)
    for step in range(140):
        if step in (0, 2, 7):
            slots, new = {0: ([0, 1, 2, 3], [0, 1, 1, 0]), 2: ([1], [1]), 7: ([0, 2], [0, 0])}[step]
            cache.enter(torch.tensor(slots), torch.tensor(new))
            rows |= {s: (p, torch.zeros(2, kv_heads, 0, dim)) for s, p in zip(slots, new)}
        if step in (5, 9):
            order = cache.compact(torch.tensor([1] if step == 5 else [0]))
            rows = {i: rows[old] for i, old in enumerate(order.tolist())}
        count = len(cache.length)
        q, k, v = (torch.randn(count, n, 1, dim) for n in (heads, kv_heads, kv_heads))
        cache.reserve()
        cache.begin_step()
        out = cache.attend(0, q, k, v, 0.3)
        for i, (prompt, own) in rows.items():
            own = torch.cat([own, torch.stack([k[i], v[i]])], 2)
            rows[i] = prompt, own
            keys, values = torch.cat([prompts[prompt], own], 2)
            attend = torch.nn.functional.scaled_dot_product_attention
            plain = attend(q[i], keys, values, scale=0.3, enable_gqa=True)
            torch.testing.assert_close(out[i, 0], plain[:, 0], atol=1e-5, rtol=1e-5)
        cache.length += 1
    assert len(rows) == 2 and cache.own[0][0].shape[2] < 300


@pytest.mark.parametrize("fixed", [False, True])
def test_ragged_attention_reads_the_cache_in_place(ragged, monkeypatch, fixed):
    """Its room is larger than what is filled, and a slice of it would be copied for each layer and
    step."""
    collected = [(torch.randn(2, 4, 8), torch.randn(2, 4, 8))]
    cache = RowCache(collected, [4], 2, n=3, slots=3, limit=300, fixed=fixed)
    cache.enter(torch.arange(3), torch.zeros(3, dtype=torch.long))
    read = []

    def spy(q, k, v, *args, **kwargs):
        read.append((k.data_ptr(), v.data_ptr()))
        return varlen_by_mask(q, k, v, *args, **kwargs)

    monkeypatch.setattr(sampler, "varlen_attn", spy)
    for _ in range(3):
        read.clear()
        cache.reserve()
        cache.begin_step()
        cache.attend(0, *(torch.randn(3, 2, 1, 8) for _ in range(3)), 0.3)
        assert tuple(x.data_ptr() for x in cache.own[0]) in read
        cache.length += 1


def test_the_cache_is_as_large_as_it_must_be():
    """Slots that are given up take no memory once the others need more room, and no room is larger
    than the limit."""
    collected = [(torch.randn(2, 4, 8), torch.randn(2, 4, 8))]
    cache = RowCache(collected, [4], 2, n=8, slots=8, limit=700, fixed=True)
    assert collected == []  # each prompt's keys stand once
    cache.enter(torch.arange(8), torch.zeros(8, dtype=torch.long))
    shapes = []
    for step in range(700):
        if step == 200:
            cache.compact(torch.tensor([0, 1, 2, 4, 5, 6, 7]))
        cache.reserve()
        shapes.append(tuple(cache.own[0][0].shape))
        cache.length += 1
    sizes = [(8, 2, 256, 8), (1, 2, 256, 8), (1, 2, 514, 8), (1, 2, 700, 8)]
    assert list(dict.fromkeys(shapes)) == sizes and cache.own[0][0].is_contiguous()


@devices
@pytest.mark.parametrize("max_rows", [None, 3])
def test_sampled_is_scored_on(world, trained, device, tolerance, max_rows):
    policy, processor = load_policy(trained)
    policy = on(device, policy)
    prompts = encode_prompts(processor, load_data(world["validation"])[:3])
    groups = generate(policy, prompts, Sampling(4, 60, 1.3, seed=5, max_rollout_rows=max_rows))
    assert len({len(b) for g in groups for b in g.branches}) > 3
    (pack,) = make_packs(groups)
    recorded = torch.cat([groups[g].logprobs[i] for g, i in pack.members])
    with torch.no_grad():
        error = (token_logprobs(policy, pack.to(device), 1.3)[0].cpu() - recorded).abs()
    assert error.mean() <= tolerance and error.max() <= 10 * tolerance
