"""The policy's computations: packed equals separate, sampled equals scored, and both equal transformers' own."""

import copy

import pytest
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForImageTextToText

from data import (
    Example,
    Group,
    Prompt,
    encode_prompts,
    encode_response,
    load_data,
    load_processor,
    make_packs,
    parse_response,
)
from discriminator import Comparison, judge, load_discriminator
from model import (
    Head,
    Linear,
    Patches,
    _LogProbs,
    generate,
    learning_rate_at,
    load_policy,
    packed,
    setup,
    shard,
    token_logprobs,
)


@pytest.fixture(scope="module")
def policy_processor(world):
    return load_policy("--model", world["init"])


def example(index: int, images: int, text: str, size=(48, 16)) -> Example:
    """A question with `images` images of noise, of different sizes."""
    content, pictures = [{"type": "text", "text": "Look. "}], []
    for i in range(images):
        noise = torch.randint(
            0,
            255,
            (size[1] * (i + 1), size[0], 3),
            generator=torch.Generator().manual_seed(index * 7 + i),
        )
        import io

        buffer = io.BytesIO()
        Image.fromarray(noise.to(torch.uint8).numpy()).save(buffer, "PNG")
        pictures.append(buffer.getvalue())
        content += [{"type": "image"}, {"type": "text", "text": f" and {i}"}]
    return Example(
        index,
        f"row {index}",
        [{"role": "user", "content": [*content, {"type": "text", "text": text}]}],
        pictures,
    )


def mixed_groups(processor) -> list[Group]:
    """Prompts without an image, with one and with two; branches of very different lengths, one of a single token."""
    prompts = encode_prompts(
        processor,
        [
            example(0, 1, "One image?"),
            example(1, 0, "No image at all, and a longer question?"),
            example(2, 2, "Two?"),
        ],
    )
    texts = [
        ["<caption>a</caption>", "seven words and then some more of them", ""],
        ["only one branch"],
        ["x", "a much longer branch " * 6, "yy", "z z z"],
    ]
    return [
        Group(p, [encode_response(processor, t) for t in some]) for p, some in zip(prompts, texts)
    ]


def reference_logprobs(policy, prompt: Prompt, branch, temperature, forbidden):
    """One sequence alone, by transformers' own forward (its attention, its positions) and full logits, in float64."""
    ids = torch.cat([prompt.input_ids, branch])[None]
    types = (ids == policy.config.image_token_id).int()
    out = policy(
        input_ids=ids,
        pixel_values=None if prompt.pixel_values is None else prompt.pixel_values.double(),
        image_grid_thw=prompt.image_grid_thw,
        mm_token_type_ids=types,
        attention_mask=torch.ones_like(ids),
    )
    logits = out.logits[0, len(prompt.input_ids) - 1 : -1].double() / temperature
    logits[:, forbidden] = -torch.inf
    logp = logits.log_softmax(-1)
    p = logp.exp()
    return logp.gather(1, branch[:, None])[:, 0], -(p * logp.masked_fill(p == 0, 0)).sum(-1)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("max_tokens", [None, 150, 40])
def test_packed_equals_separate(world, policy_processor, temperature, max_tokens):
    """Log-probabilities, entropies and gradients of packs against separate sequences, for every cut."""
    policy, processor = policy_processor
    groups = mixed_groups(processor)
    weights = {
        (g, i): torch.linspace(-1, 2, len(b))
        for g, group in enumerate(groups)
        for i, b in enumerate(group.branches)
    }

    packs = make_packs(groups, max_tokens)
    assert sorted(m for p in packs for m in p.members) == sorted(weights)
    assert len(packs) == 1 if max_tokens is None else len(packs) > 1
    policy.zero_grad()
    got = {}
    for pack in packs:
        logp, entropy = token_logprobs(policy, pack, temperature, chunk=7)
        at = 0
        for member, length in zip(pack.members, pack.lengths):
            got[member] = logp[at : at + length].detach(), entropy[at : at + length]
            at += length
        assert torch.equal(pack.rows(logp)[pack.mask], logp)
        (logp * torch.cat([weights[m] for m in pack.members])).sum().backward()

    reference = AutoModelForImageTextToText.from_pretrained(world["init"], dtype=torch.float64)
    for (g, i), weight in weights.items():
        logp, entropy = reference_logprobs(
            reference, groups[g].prompt, groups[g].branches[i], temperature, policy.forbidden
        )
        torch.testing.assert_close(got[g, i][0], logp.float(), atol=1e-5, rtol=0)
        torch.testing.assert_close(got[g, i][1], entropy.float(), atol=1e-5, rtol=1e-5)
        (logp * weight).sum().backward()
    compared = 0
    for (name, mine), theirs in zip(policy.named_parameters(), reference.parameters()):
        if theirs.grad is not None and theirs.grad.norm() > 0:
            assert (mine.grad - theirs.grad).norm() <= 1e-4 * theirs.grad.norm(), name
            compared += 1
    assert compared > 50


def test_a_branch_sees_no_sibling(policy_processor):
    policy, processor = policy_processor
    groups = mixed_groups(processor)
    pack = make_packs(groups)[0]
    before = token_logprobs(policy, pack)[0]
    groups[2].branches[1] = torch.roll(groups[2].branches[1], 3)
    after = token_logprobs(policy, make_packs(groups)[0])[0]
    changed, at = [], 0
    for member, length in zip(pack.members, pack.lengths):
        if not torch.allclose(before[at : at + length], after[at : at + length], atol=1e-6):
            changed.append(member)
        at += length
    assert changed == [(2, 1)]


def test_positions_are_those_of_transformers(policy_processor):
    policy, processor = policy_processor
    for prompt in [g.prompt for g in mixed_groups(processor)]:
        types = (prompt.input_ids == processor.image_token_id).int()[None]
        theirs, _ = policy.model.get_rope_index(
            prompt.input_ids[None], types, prompt.image_grid_thw
        )
        assert torch.equal(prompt.position_ids, theirs[:, 0])


def test_logprobs_function_by_gradcheck():
    torch.manual_seed(0)
    hidden = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    predictors = torch.tensor(
        [0, 1, 2, 2, 0, 4, 5, 2, 2]
    )  # rows that repeat, within a chunk and across, and one unused
    weight = torch.randn(11, 5, dtype=torch.float64, requires_grad=True)
    targets = torch.tensor([0, 1, 2, 4, 5, 7, 8, 9, 10])
    forbidden = torch.tensor([3, 6])

    def logp(h, w):
        return _LogProbs.apply(h, w, predictors, targets, 0.6, forbidden, 4)[0]

    assert torch.autograd.gradcheck(logp, (hidden, weight))
    logits = (hidden[predictors] @ weight.T / 0.6).index_fill(1, forbidden, -torch.inf)
    torch.testing.assert_close(
        logp(hidden, weight), logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]
    )


class RepeatedSums(TorchDispatchMode):
    """Counts the places that `index_put(accumulate=True)` adds to more than once with something else than 0: torch's threads do
    that in no fixed order on a CPU, so that two equal runs would differ in the last bit, and then in what they sample."""

    def __init__(self):
        super().__init__()
        self.calls = self.repeated = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if "index_put" in str(function) and len(args) > 3 and args[3]:
            self.calls += 1
            count = torch.zeros(args[0].shape, dtype=args[2].dtype, device=args[0].device)
            count = function(count, args[1], (args[2] != 0).to(args[2].dtype), True)
            self.repeated += int((count > 1).sum())
        return function(*args, **(kwargs or {}))


def test_gradients_are_summed_in_a_fixed_order(world, policy_processor):
    policy, processor = policy_processor
    with RepeatedSums() as control:
        x = torch.ones(3, 2, requires_grad=True)
        x[torch.tensor([0, 0, 1])].sum().backward()
    assert control.repeated == 2
    rows = load_data(world["prompts"])[:6]
    prompts = encode_prompts(processor, rows)
    with RepeatedSums() as seen:
        (pack,) = make_packs(mixed_groups(processor))
        token_logprobs(policy, pack, 0.9)[0].sum().backward()
        policy.zero_grad()
        for kind in ("learned", "dedicated"):
            discriminator, _ = load_discriminator("--model", world["init"], kind)
            responses = [parse_response(row.response) for row in rows]
            judge(
                discriminator,
                [
                    Comparison(prompts[0], responses[0], responses[1:4]),
                    Comparison(prompts[1], responses[1], responses[4:]),
                ],
                processor,
                torch.device("cpu"),
                4096,
            )
            assert (
                max(p.grad.abs().max() for p in discriminator.parameters() if p.grad is not None)
                > 0
            )
    assert seen.calls > 10 and seen.repeated == 0


@pytest.mark.parametrize("rollouts, max_rows", [(4, None), (4, 3), (40, None)])
def test_sampled_is_scored(world, trained, rollouts, max_rows):
    """What the sampler records is what token_logprobs says of the same tokens; ragged lengths, several prompts, few rows and as
    many as make products large (see model.packed)."""
    policy, processor = load_policy("--ckpt", trained)
    prompts = encode_prompts(
        processor, load_data(world["validation"])[:3] + [example(99, 0, "And without an image?")]
    )
    groups = generate(
        policy, prompts, rollouts, 60, temperature=1.3, seed=5, step=2, max_rollout_rows=max_rows
    )
    assert (4 * rollouts * policy.lm_head.weight.numel() >= 2**20) == (rollouts == 40)
    lengths = [len(b) for g in groups for b in g.branches]
    assert len(set(lengths)) > 3 and max(lengths) <= 60
    assert any(int(b[-1]) in policy.ends for g in groups for b in g.branches)
    for pack in make_packs(groups):
        scored = token_logprobs(policy, pack, 1.3)[0].detach()
        recorded = torch.cat([groups[g].logprobs[i] for g, i in pack.members])
        torch.testing.assert_close(scored, recorded, atol=1e-4, rtol=0)


def test_a_row_depends_on_itself_alone(world, trained):
    """Same seed, step and row: the same tokens, whatever else is sampled beside it and however many rows run at once."""
    policy, processor = load_policy("--ckpt", trained)
    prompts = encode_prompts(processor, load_data(world["validation"])[:4])
    whole = generate(policy, prompts, 5, 50, seed=1, step=3)
    alone = generate(policy, prompts[2:3], 3, 50, seed=1, step=3)
    queued = generate(policy, prompts, 5, 50, seed=1, step=3, max_rollout_rows=4)
    other = generate(policy, prompts, 5, 50, seed=1, step=4)
    assert all(torch.equal(a, b) for a, b in zip(whole[2].branches, alone[0].branches))
    assert all(
        torch.equal(a, b) for x, y in zip(whole, queued) for a, b in zip(x.branches, y.branches)
    )
    assert any(
        not torch.equal(a, b) for x, y in zip(whole, other) for a, b in zip(x.branches, y.branches)
    )


class Recorded(TorchDispatchMode):
    """A CUDA graph as far as a CPU can have one: the operations of a step with the very tensors they read and wrote, run again
    by `replay`. Whatever a step reads that was not copied into those tensors is stale; what would wait for a value, or has a
    shape that depends on one, cannot be recorded."""

    made = replays = 0

    def __init__(self):
        super().__init__()
        self.calls = []
        Recorded.made += 1

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
        out = op(*args, **(kwargs or {}))
        self.calls.append((op, args, kwargs or {}, out))
        return out

    def replay(self):
        Recorded.replays += 1
        for op, args, kwargs, out in self.calls:
            for old, new in zip(tree_leaves(out), tree_leaves(op(*args, **kwargs))):
                if old.data_ptr() != new.data_ptr():
                    old.copy_(new)


@pytest.fixture
def recorded(monkeypatch) -> type[Recorded]:
    """The recorder in the CUDA graph's place."""
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Recorded)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, **kwargs: graph)
    monkeypatch.setattr(Recorded, "made", 0)
    monkeypatch.setattr(Recorded, "replays", 0)
    return Recorded


@pytest.mark.parametrize("max_rows, temperature", [(None, 1.3), (5, 1.3), (None, 0.0)])
def test_fixed_places_and_recorded_steps(world, trained, recorded, max_rows, temperature):
    """The GPU's way of sampling, idle places and steps that are replayed, gives the same branches as the CPU's."""
    policy, processor = load_policy("--ckpt", trained)
    prompts = encode_prompts(
        processor, load_data(world["validation"])[:3] + [example(99, 0, "And without an image?")]
    )
    args = policy, prompts, 4, 150, temperature, 5, 2, max_rows
    plain, fixed = generate(*args), generate(*args, fixed=True)
    lengths = [len(b) for g in plain for b in g.branches]
    assert len(set(lengths)) > 3 and max(lengths) > 20
    assert 1 < recorded.made < recorded.replays / 4
    for a, b in zip(plain, fixed):
        assert [x.tolist() for x in a.branches] == [x.tolist() for x in b.branches]
        for x, y in zip(a.logprobs, b.logprobs):
            torch.testing.assert_close(x, y, atol=1e-5, rtol=0)


def test_a_step_that_cannot_be_recorded(world, trained, recorded):
    """Sampling goes on without the graph, says so, and gives the same branches."""
    policy, processor = load_policy("--ckpt", trained)
    args = policy, encode_prompts(processor, load_data(world["validation"])[:3]), 4, 60, 1.3, 5
    plain = generate(*args)
    handle = policy.lm_head.register_forward_hook(
        lambda module, inputs, logits: logits * logits.isfinite().all().item()
    )
    with pytest.warns(UserWarning, match="without CUDA graphs: .*not permitted"):
        fixed = generate(*args, fixed=True)
    handle.remove()
    for a, b in zip(plain, fixed):
        assert [x.tolist() for x in a.branches] == [x.tolist() for x in b.branches]


def test_sampling_follows_the_distribution(world, policy_processor):
    """First tokens of many rows against the policy's own probabilities (chi-square over the likelier tokens)."""
    policy, processor = policy_processor
    prompt = encode_prompts(processor, [example(0, 1, "One?")])[0]
    rows = 4000
    groups = generate(policy, [prompt], rows, 1, temperature=0.8, seed=3)
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
    policy, processor = load_policy("--ckpt", trained)
    theirs = AutoModelForImageTextToText.from_pretrained(trained).eval()
    examples = load_data(world["validation"])[:6]
    prompts = encode_prompts(processor, examples)
    ours = generate(policy, prompts, 1, 48, temperature=0.0)
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
        assert out[0, ids.shape[1] :].tolist() == group.branches[0].tolist()


def test_forbidden_tokens_have_no_probability(policy_processor):
    """A policy that wants nothing but image tokens still samples none."""
    policy, processor = copy.deepcopy(policy_processor[0]), policy_processor[1]
    with torch.no_grad():
        policy.lm_head.weight[policy.config.image_token_id] *= 100
    prompts = encode_prompts(processor, [example(0, 1, "One?")])
    groups = generate(policy, prompts, 8, 12)
    assert not torch.isin(torch.cat(groups[0].branches), policy.forbidden).any()
    assert torch.isfinite(torch.cat(groups[0].logprobs)).all()


def test_patches_are_the_convolution(policy_processor):
    """The patch embedding as a product: values and gradients of transformers' Conv3d, in float64; volumes are left to it."""
    policy, _ = policy_processor
    embedding = policy.model.visual.patch_embed.proj
    assert type(embedding) is Patches
    product = copy.deepcopy(embedding).double()
    convolution = copy.deepcopy(product)
    convolution.__class__ = torch.nn.Conv3d
    size = (product.in_channels, *product.kernel_size)
    for shape in ((7, *size), (2, size[0], *(2 * n for n in size[1:]))):
        results = []
        for module in (product, convolution):
            x = torch.randn(
                shape,
                generator=torch.Generator().manual_seed(0),
                dtype=torch.float64,
                requires_grad=True,
            )
            module.zero_grad()
            out = module(x)
            out.square().sum().backward()
            results.append((out.flatten(), x.grad, module.weight.grad, module.bias.grad))
        for a, b in zip(*results):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    "rows, out, bias", [(3, 40, True), (200, 400, True), (200, 400, False), (1, 70000, True)]
)
def test_packed_weights(policy_processor, rows, out, bias):
    """Small and large products, of rows that do not lie one after the other, are those of float64; afterwards, and in float64,
    nothing is packed, and there is a gradient."""
    policy, _ = policy_processor
    assert {type(m) for m in policy.modules() if isinstance(m, torch.nn.Linear)} == {Linear, Head}
    torch.manual_seed(0)
    layer = torch.nn.Linear(96, out, bias=bias)
    layer.__class__ = Linear
    x = torch.randn(1, 2 * rows, 96)[:, ::2]
    want = x.double() @ layer.weight.double().T + (layer.bias.double() if bias else 0)
    with torch.no_grad(), packed(layer):
        assert layer.blocks is not None
        torch.testing.assert_close(layer(x).double(), want, atol=1e-5, rtol=1e-5)
    assert layer.blocks is None
    with torch.no_grad(), packed(layer.double()):
        torch.testing.assert_close(layer(x.double()), want)
    layer(x.double()).sum().backward()
    torch.testing.assert_close(layer.weight.grad, x.double().sum((0, 1)).expand(out, -1))


def test_the_largest_random_number(policy_processor, monkeypatch):
    """Where rounding puts a row at the end of the cumulated distribution, it takes a token of some probability."""
    policy, processor = copy.deepcopy(policy_processor[0]), policy_processor[1]
    last = policy.config.text_config.vocab_size - 1
    policy.forbidden = torch.cat([policy.forbidden, torch.tensor([last - 1, last])])
    monkeypatch.setattr("model.uniforms", lambda seed, step, prompt, row, count: torch.ones(count))
    (group,) = generate(policy, encode_prompts(processor, [example(0, 1, "One?")]), 2, 5)
    assert not torch.isin(torch.cat(group.branches), policy.forbidden).any()
    assert torch.isfinite(torch.cat(group.logprobs)).all()


def test_learning_rate_schedule():
    rates = [learning_rate_at(s, 100, 2.0, 0.1, "cosine") for s in range(1, 101)]
    assert rates[4] == pytest.approx(1.0) and max(rates) == rates[9] == rates[10] == pytest.approx(
        2.0
    )
    assert rates == sorted(rates[:10]) + sorted(rates[10:], reverse=True) and 0 < rates[-1] < 0.01
    assert (
        learning_rate_at(1, 10, 3.0, 0.0, "constant")
        == learning_rate_at(10, 10, 3.0, 0.0, "constant")
        == 3.0
    )


def test_special_tokens_in_text_stay_text(world):
    processor = load_processor(world["init"])
    ids = encode_response(processor, "a<|im_end|>b<|image_pad|>")
    assert (
        ids == processor.tokenizer.eos_token_id
    ).sum() == 1 and processor.image_token_id not in ids


# --------------------------------------------------------------------------------------------------------------------
# The GPU's path, bfloat16 under FSDP2 with flash-attn where it is installed, against float32 on one CPU process. The same
# checks with the CPU in the GPU's place show that they can pass; a machine without a GPU skips the rest.


GPU = pytest.param(
    "cuda", 0.05, marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
)
devices = pytest.mark.parametrize("device, tolerance", [("cpu", 1e-5), GPU])


def on(device: str, model):
    """The model as the stages put it there."""
    return shard(model.to(device), setup() if device == "cuda" else torch.device("cpu"))


def gradient(model) -> dict[str, torch.Tensor]:
    whole = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {name: getattr(g, "full_tensor", lambda g=g: g)().cpu() for name, g in whole.items()}


def assert_close_gradients(ours: dict, theirs: dict, tolerance: float) -> None:
    """Relative error of the gradient as a whole: single small ones are lost in bfloat16's rounding."""
    assert ours.keys() == theirs.keys() and len(ours) > 20
    error = sum((ours[n] - theirs[n]).double().square().sum() for n in theirs) ** 0.5
    size = sum(g.double().square().sum() for g in theirs.values()) ** 0.5
    assert size > 0 and error <= tolerance * size, float(error / size)


@devices
def test_packs_on(world, device, tolerance):
    sides = []
    for where in ("cpu", device):
        policy, processor = load_policy("--model", world["init"])
        policy = on(where, policy)
        (pack,) = make_packs(mixed_groups(processor))
        logp, entropy = token_logprobs(policy, pack.to(where), 0.9)
        logp.mean().backward()
        sides.append((logp.detach().cpu(), entropy.cpu(), gradient(policy)))
    (logp, entropy, grad), (logp_there, entropy_there, grad_there) = sides
    torch.testing.assert_close(logp_there, logp, atol=2 * tolerance, rtol=0)
    torch.testing.assert_close(entropy_there, entropy, atol=2 * tolerance, rtol=0)
    assert_close_gradients(grad_there, grad, tolerance)


@devices
@pytest.mark.parametrize("max_rows", [None, 3])
def test_sampled_is_scored_on(world, trained, device, tolerance, max_rows):
    policy, processor = load_policy("--ckpt", trained)
    policy = on(device, policy)
    prompts = encode_prompts(processor, load_data(world["validation"])[:3])
    groups = generate(policy, prompts, 4, 60, temperature=1.3, seed=5, max_rollout_rows=max_rows)
    assert len({len(b) for g in groups for b in g.branches}) > 3
    (pack,) = make_packs(groups)
    recorded = torch.cat([groups[g].logprobs[i] for g, i in pack.members])
    with torch.no_grad():
        error = (token_logprobs(policy, pack.to(device), 1.3)[0].cpu() - recorded).abs()
    assert error.mean() <= tolerance and error.max() <= 10 * tolerance


@devices
@pytest.mark.parametrize("kind", ["learned", "dedicated"])
def test_judge_on(world, device, tolerance, kind):
    rows = load_data(world["prompts"])[:4]
    responses = [parse_response(row.response) for row in rows]
    sides = []
    for where in ("cpu", device):
        torch.manual_seed(0)
        discriminator, processor = load_discriminator("--model", world["init"], kind)
        discriminator = on(where, discriminator).eval()  # no noise in the router
        prompts = encode_prompts(processor, rows)
        comparison = Comparison(prompts[0], responses[0], responses[1:])
        judged = judge(discriminator, [comparison], processor, torch.device(where), 4096)
        sides.append((judged, gradient(discriminator)))
    (judged, grad), (there, grad_there) = sides
    torch.testing.assert_close(there.student, judged.student, atol=4 * tolerance, rtol=0)
    torch.testing.assert_close(there.teacher, judged.teacher, atol=4 * tolerance, rtol=0)
    assert_close_gradients(grad_there, grad, 4 * tolerance)
