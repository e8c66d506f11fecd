"""The policy's computations: packed equals separate, and both equal transformers' own."""

import copy
import io
import math
from types import SimpleNamespace
from typing import get_args

import pytest
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForImageTextToText, get_scheduler
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextRMSNorm

import data
from data import Group, Prompt, encode_prompts, encode_response, make_packs, parse_response
from discriminator import Comparison, judge, load_discriminator
from model import LogProbs, Norm, Patches, _ragged, load_policy, token_logprobs
from support.errors import UserError
from support.flags import Schedule
from support.huggingface import load_processor
from support.optimizer import learning_rate_at
from support.ranks import join_ranks, recompute, shard
from support.rows import Example, load_data


@pytest.fixture(scope="module")
def policy_processor(world):
    return load_policy(world["init"])


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
    """Prompts without an image, with one and with two; branches of very different lengths, one of a
    single token."""
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
    """One sequence alone, by transformers' own forward (its attention, its positions) and full
    logits, in float64."""
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
    """Log-probabilities, entropies and gradients of packs against separate sequences, for every
    cut."""
    compare_packed(world, policy_processor, temperature, max_tokens)


@pytest.mark.parametrize("max_tokens", [None, 150])
def test_packed_equals_separate_as_on_a_gpu(world, policy_processor, ragged, max_tokens):
    compare_packed(world, policy_processor, 0.7, max_tokens)


def test_demonstrations_as_on_a_gpu(world, policy_processor, ragged):
    """A prompt and its only branch are one sequence: no key stands there twice."""
    groups = [Group(g.prompt, g.branches[:1]) for g in mixed_groups(policy_processor[1])]
    (pack,) = make_packs(groups)
    index, queries, keys, *longest = _ragged(pack)
    whole = [s.prompt_length + s.branch_lengths[0] for s in pack.segments]
    assert index is None and longest == [max(whole)] * 2
    assert queries.diff().tolist() == keys.diff().tolist() == whole
    compare_packed(world, policy_processor, 0.7, None, groups)


def compare_packed(world, policy_processor, temperature, max_tokens, groups=None):
    policy, processor = policy_processor
    groups = groups or mixed_groups(processor)
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
        assert torch.equal(pack.padded(logp)[pack.mask], logp)
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


def test_norms_are_transformers(policy_processor):
    """One operation for the RMS norm, in both precisions, with weights that are not 1."""
    torch.manual_seed(0)
    theirs = Qwen3VLTextRMSNorm(64, eps=1e-5)
    torch.nn.init.uniform_(theirs.weight, 0.5, 2)
    ours = copy.deepcopy(theirs)
    ours.__class__ = Norm
    x = 3 * torch.randn(5, 64)
    torch.testing.assert_close(ours(x), theirs(x), atol=1e-6, rtol=1e-6)
    low = x.bfloat16()
    error = (ours.bfloat16()(low).float() - theirs.float()(low.float())).abs()
    assert error.max() < 0.03 and error.mean() < 0.004  # one rounding of numbers up to 4
    policy, _ = policy_processor
    kinds = [type(m).__name__ for m in policy.model.language_model.modules()]
    assert "Norm" in kinds and "Qwen3VLTextRMSNorm" not in kinds


class Counted(TorchDispatchMode):
    """Counts the operations whose names hold a word."""

    def __init__(self, word):
        super().__init__()
        self.word, self.count = word, 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.count += self.word in str(op)
        return op(*args, **(kwargs or {}))


def test_recomputing_changes_memory_only(policy_processor):
    """Activation checkpointing: the same loss and gradients to the last bit, less is kept, products
    are computed again, attention is not. Where there is room, nothing is."""
    processor, found = policy_processor[1], []
    for room in (None, 0, math.inf):
        policy = copy.deepcopy(policy_processor[0]).train()
        if room is not None:
            recompute(policy, room)
        pack = make_packs(mixed_groups(processor))[0]
        sizes = []
        hooks = torch.autograd.graph.saved_tensors_hooks(
            lambda t: sizes.append(t.numel()) or t, lambda t: t
        )
        counts = [Counted("attention"), Counted("aten.mm")]
        with hooks, counts[0], counts[1]:
            loss = token_logprobs(policy, pack)[0].mean()
        forward = [c.count for c in counts]
        with counts[0], counts[1]:
            loss.backward()
        backward = [c.count - n for c, n in zip(counts, forward)]
        grads = [p.grad for p in policy.parameters() if p.grad is not None]
        found.append((loss, grads, sum(sizes), forward, backward))
    (loss, grads, kept, forward, backward), (_, _, few, *counts), roomy = found
    for again, their, *_ in found[1:]:
        assert torch.equal(loss, again) and all(map(torch.equal, grads, their))
    assert few < kept / 2 and roomy[2:] == (kept, forward, backward)
    assert counts[0] == forward and forward[0] > 0
    assert counts[1][0] == backward[0] and counts[1][1] > backward[1]


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
        return LogProbs.apply(h, w, predictors, targets, 0.6, forbidden, 4)[0]

    assert torch.autograd.gradcheck(logp, (hidden, weight))
    logits = (hidden[predictors] @ weight.T / 0.6).index_fill(1, forbidden, -torch.inf)
    torch.testing.assert_close(
        logp(hidden, weight), logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]
    )


class RepeatedSums(TorchDispatchMode):
    """Counts the places that `index_put(accumulate=True)` adds to more than once with something
    else than 0: torch's threads do that in no fixed order on a CPU, so that two equal runs would
    differ in the last bit, and then in what they sample."""

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
            discriminator, _ = load_discriminator(world["init"], kind)
            responses = [parse_response(row.response) for row in rows]
            judge(
                discriminator,
                [
                    Comparison(prompts[0], responses[0], responses[1:4]),
                    Comparison(prompts[1], responses[1], responses[4:]),
                ],
                processor,
                4096,
                backward=True,
            )
            assert (
                max(p.grad.abs().max() for p in discriminator.parameters() if p.grad is not None)
                > 0
            )
    assert seen.calls > 10 and seen.repeated == 0


def test_patches_are_the_convolution(policy_processor):
    """The patch embedding as a product: values and gradients of transformers' Conv3d, in float64;
    volumes are left to it."""
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


def schedule(warmup_steps: float, lr_scheduler_type: str, learning_rate: float):
    names = {"warmup_steps": warmup_steps, "lr_scheduler_type": lr_scheduler_type}
    return SimpleNamespace(learning_rate=learning_rate, **names)


def test_learning_rate_schedule():
    config = schedule(0.1, "cosine", 2.0)
    rates = [learning_rate_at(s, 100, config) for s in range(1, 101)]
    assert rates[4] == pytest.approx(1.0) and max(rates) == rates[9] == rates[10] == pytest.approx(
        2.0
    )
    assert rates == sorted(rates[:10]) + sorted(rates[10:], reverse=True) and 0 < rates[-1] < 0.01
    constant = schedule(0.0, "constant", 3.0)
    assert learning_rate_at(1, 10, constant) == learning_rate_at(10, 10, constant) == 3.0


@pytest.mark.parametrize("name", ["constant", "constant_with_warmup", "linear", "cosine"])
@pytest.mark.parametrize("warmup, steps", [(0.0, 0), (0.2, 4), (0.11, 3), (4.0, 4), (40.0, 40)])
def test_every_schedule_step_by_step(name, warmup, steps):
    """Warm-up as a number of steps and as a share of 20 steps, rounded up as in transformers, then
    the shape; a warm-up that is longer than the run never ends; another rate takes the place of
    the configuration's."""
    config = schedule(warmup, name, 3.0)
    for step in range(1, 21):
        gone = (step - 1 - steps) / max(1, 20 - steps)
        shape = {"linear": 1 - gone, "cosine": (1 + math.cos(math.pi * gone)) / 2}
        expected = step / steps if step <= steps else shape.get(name, 1)
        assert learning_rate_at(step, 20, config) == pytest.approx(3 * expected, abs=1e-12)
        assert learning_rate_at(step, 20, config, 7.0) == pytest.approx(7 * expected, abs=1e-12)


@pytest.mark.parametrize("name", [name for name in get_args(Schedule) if name != "constant"])
def test_every_schedule_is_transformers_own(name):
    """Behind the warm-up its rates, step by step; in it those of the step after."""
    optimizer = torch.optim.SGD([torch.zeros(1)], 0.5)
    theirs, rates = get_scheduler(name, optimizer, 4, 20), []
    for _ in range(21):
        rates.append(theirs.get_last_lr()[0])
        optimizer.step()
        theirs.step()
    ours = [learning_rate_at(step, 20, schedule(4.0, name, 0.5)) for step in range(1, 21)]
    assert ours == [*rates[1:5], *rates[4:20]] and rates[0] == 0 < ours[0]


@pytest.mark.parametrize("name", [name for name in get_args(Schedule) if name != "constant"])
@pytest.mark.parametrize("warmup, steps", [(1.0, 1), (20.0, 20), (0.999, 20), (50.0, 50)])
def test_a_warm_up_may_be_the_whole_run(name, warmup, steps):
    """Or be longer. Its rate grows evenly to the peak."""
    config = schedule(warmup, name, 0.5)
    length = min(steps, 20)
    rates = [learning_rate_at(step, length, config) for step in range(1, length + 1)]
    assert rates == [0.5 * step / steps for step in range(1, length + 1)]


def test_a_schedule_that_cannot_be_is_one_line():
    with pytest.raises(UserError, match="--lr_scheduler_type linaer: .*select one of .*'linear'"):
        learning_rate_at(1, 10, schedule(0.0, "linaer", 1.0))
    with pytest.raises(UserError, match="--lr_scheduler_type polynomial: lr_end .* smaller"):
        learning_rate_at(1, 10, schedule(0.0, "polynomial", 1e-8))


def test_special_tokens_in_text_stay_text(world):
    processor = load_processor(world["init"])
    ids = encode_response(processor, "a<|im_end|>b<|image_pad|>")
    assert (
        ids == processor.tokenizer.eos_token_id
    ).sum() == 1 and processor.image_token_id not in ids


# --------------------------------------------------------------------------------------------------
# The GPU's path, bfloat16 under FSDP2, against float32 on one CPU process. The same checks with the
# CPU in the GPU's place show that they can pass; a machine without a GPU skips the rest.

GPU = pytest.param(
    "cuda", 0.05, marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
)
devices = pytest.mark.parametrize("device, tolerance", [("cpu", 1e-5), GPU])


def on(device: str, model):
    """The model as the stages put it there."""
    return shard(model.to(device), join_ranks() if device == "cuda" else torch.device("cpu"))


def gradient(model) -> dict[str, torch.Tensor]:
    whole = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {name: getattr(g, "full_tensor", lambda g=g: g)().cpu() for name, g in whole.items()}


def assert_close_gradients(ours: dict, theirs: dict, tolerance: float) -> None:
    """Relative error of the gradient as a whole: single small ones are lost in bfloat16's
    rounding."""
    assert ours.keys() == theirs.keys() and len(ours) > 20
    error = sum((ours[n] - theirs[n]).double().square().sum() for n in theirs) ** 0.5
    size = sum(g.double().square().sum() for g in theirs.values()) ** 0.5
    assert size > 0 and error <= tolerance * size, float(error / size)


@devices
def test_packs_on(world, device, tolerance):
    sides = []
    for where in ("cpu", device):
        policy, processor = load_policy(world["init"])
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
@pytest.mark.parametrize("kind", ["learned", "dedicated"])
def test_judge_on(world, device, tolerance, kind):
    rows = load_data(world["prompts"])[:4]
    responses = [parse_response(row.response) for row in rows]
    sides = []
    for where in ("cpu", device):
        torch.manual_seed(0)
        discriminator, processor = load_discriminator(world["init"], kind)
        discriminator = on(where, discriminator).eval()  # no noise in the router
        prompts = encode_prompts(processor, rows)
        comparison = Comparison(prompts[0], responses[0], responses[1:])
        judged = judge(discriminator, [comparison], processor, 4096, backward=True)
        sides.append((judged, gradient(discriminator)))
    (judged, grad), (there, grad_there) = sides
    assert judged.valid.all() and there.valid.all()
    for name in ("perception", "reasoning", "teacher_perception", "teacher_reasoning"):
        scores = getattr(there, name), getattr(judged, name)
        torch.testing.assert_close(*scores, atol=4 * tolerance, rtol=0)
    assert_close_gradients(grad_there, grad, 4 * tolerance)


# --------------------------------------------------------------------------------------------------
# Blank images


@pytest.mark.parametrize("theirs, blank", [([], False), ([False], False), ([True, True], True)])
def test_blanks_have_images_where_a_rank_has_one(policy_processor, monkeypatch, theirs, blank):
    """`theirs`: whether each pack of the other rank has an image. Where it has none, the vision
    tower of no rank is called."""
    _, processor = policy_processor
    (pack,) = make_packs([mixed_groups(processor)[1]])
    other = [len(theirs), any(theirs), -len(theirs)]
    monkeypatch.setattr(data, "world_size", lambda: 2)
    monkeypatch.setattr(data, "all_max", lambda mine: torch.tensor([mine, other]).amax(0))
    packs = data.even_packs([pack], processor)
    assert pack.pixel_values is None and len(packs) == max(1, len(theirs))
    assert all((mine.pixel_values is not None) == blank for mine in packs)
