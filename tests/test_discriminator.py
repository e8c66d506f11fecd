"""The discriminator as a judge: nothing but the text of a view moves its score, packing does not,
and its kinds are what they say.

Formulas are in test_discriminator_formulas.py, parity with transformers' own mixture of experts in
test_discriminator_judge.py.
"""

import dataclasses
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForImageTextToText

from data import (
    Group,
    Prompt,
    Response,
    _with_blank,
    blank_group,
    decode,
    encode_prompts,
    encode_response,
    encode_views,
    make_packs,
    parse_response,
)
from discriminator import (
    VIEWS,
    Comparison,
    Discriminator,
    SparseMLP,
    judge,
    upcycle,
    view_packs,
)
from model import load_policy, prepare_for_packs, token_logprobs
from support.rows import Example, load_data
from tests.judges import TEACHER, randomised, sides

KINDS = ("learned", "dedicated", "dense", "text")


SHORT = Response("x", "y", "z")
LONG = Response(
    "Digits 7, 2 and 8. " * 9 + "Digits 4.", "7 + 2 = 9, 9 + 8 = 17. " * 7 + "So it is 17.", "17"
)
OTHER = Response("Digits 7, 2 and 8.", "7 + 2 = 9, 9 + 8 = 17.", "17")


def written(r: Response) -> str:
    return f"<caption>{r.caption}</caption>\n<think>{r.think}</think>\n<answer>{r.answer}</answer>"


def build(world, kind: str = "learned", dropout: float = 0.0):
    """A discriminator of random weights, without dropout until it is trained."""
    discriminator, processor = randomised(world["init"], kind, dropout, seed=1, mlps=0.2, head=0.2)
    return discriminator.eval(), processor


@pytest.fixture(scope="module")
def learned(world):
    return build(world)


@pytest.fixture(scope="module")
def prompts(world, learned):
    """Two prompts with an image, and one without."""
    without = Example(
        7,
        "text",
        [{"role": "user", "content": [{"type": "text", "text": "What is 1 + 2 + 3?"}]}],
        [],
    )
    return encode_prompts(learned[1], [*load_data(world["prompts"])[:2], without])


def both_scores(discriminator, processor, comparisons, max_tokens=None):
    """(M, 4) twice, over all packs: teacher's two and student's two scores as the loss sees them
    (with dropout while training) and as rewards and metrics do. M students of all comparisons, one
    after the other."""
    first = torch.tensor([0, *itertools.accumulate(len(c.students) for c in comparisons)])
    out = torch.full((2, int(first[-1]), 4), torch.nan)
    packs = view_packs(comparisons, processor, max_tokens, discriminator.kind == "text")
    with torch.no_grad():
        for v in packs:
            comparison, student = v.numbers.T
            scores = discriminator(v.pack, v.views)
            out[:, first[comparison] + student] = scores[:, v.pairs]
    return out, len(packs)


def lengths(judged) -> torch.Tensor:
    """(P, N, 2): the tokens of the students' perception and reasoning."""
    return torch.stack([judged.perception_length, judged.reasoning_length], -1)


# --------------------------------------------------------------------------------------------------
# No shortcuts


@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("max_tokens", [None, 220, 1])
def test_identical_text_has_no_gap(world, prompts, kind, mode, max_tokens):
    """Exactly none, in both views: however it was spaced, whatever stands beside it, wherever the
    packs are cut."""
    discriminator, processor = build(world, kind, dropout=0.5)
    discriminator.train(mode == "train")
    spaced = (
        f" \n{written(TEACHER)}\n".replace("\n", "\n\n \t")
        .replace(">", ">  ")
        .replace("</", "\n</")
    )
    texts = [
        written(TEACHER),
        written(LONG),
        spaced,
        written(SHORT),
        written(TEACHER),
        None,
        written(OTHER),
        spaced,
    ]
    same = torch.tensor([text is not None and parse_response(text) == TEACHER for text in texts])
    assert same.sum() == 4 and spaced != written(TEACHER)
    students = [parse_response(text) if text else None for text in texts]
    scores, packs = both_scores(
        discriminator, processor, [Comparison(p, TEACHER, students) for p in prompts], max_tokens
    )
    assert packs > 1 or max_tokens is None
    gap = (scores[..., :2] - scores[..., 2:]).view(2, len(prompts), len(texts), 2)
    assert (gap[:, :, same] == 0).all()  # not nearly: identical
    valid = torch.tensor([s is not None for s in students])
    assert (gap[:, :, ~same & valid].abs() > 1e-4).all()  # and the others do differ
    assert gap[:, :, ~valid].isnan().all()
    if mode == "train":
        assert (scores[0] != scores[1])[:, :2].any()  # dropout was at work


@pytest.mark.parametrize("block, view", [("caption", 0), ("think", 1), ("answer", 1)])
def test_one_character_makes_a_gap_in_its_view_alone(learned, prompts, block, view):
    discriminator, processor = learned
    text = getattr(TEACHER, block)
    at = next(i for i, c in enumerate(text) if c.isdigit())
    student = dataclasses.replace(TEACHER, **{block: text[:at] + "9" + text[at + 1 :]})
    comparisons = [Comparison(p, TEACHER, [SHORT, student]) for p in prompts]
    for max_tokens in (None, 1):
        (_, scores), _ = both_scores(discriminator, processor, comparisons, max_tokens)
        gap = (scores[1::2, :2] - scores[1::2, 2:]).abs()
        assert (gap[:, view] > 1e-3).all() and (gap[:, 1 - view] == 0).all()


def test_no_shortcut_by_the_end_of_sequence(learned, prompts):
    """A rollout that ended, one that was stopped at its last token, one that ended otherwise, the
    supervision as text."""
    discriminator, processor = learned
    eos, pad = processor.tokenizer.eos_token_id, processor.tokenizer.pad_token_id
    ended = encode_response(processor, written(TEACHER))
    assert ended[-1] == eos
    other_end = torch.cat([ended[:-1], torch.tensor([pad])])
    rollouts = [ended, ended[:-1], other_end]
    students = [parse_response(decode(processor, rollout, [eos, pad])) for rollout in rollouts]
    assert pad != eos and students == [TEACHER] * 3
    # Sampling leaves no padding behind, so more than one end is text, and no response.
    for more in ([pad], [pad] * 5, [eos]):
        padded = torch.cat([ended, torch.tensor(more)])
        assert parse_response(decode(processor, padded, [eos, pad])) is None
    scores, _ = both_scores(discriminator, processor, [Comparison(prompts[0], TEACHER, students)])
    assert torch.equal(scores[..., :2], scores[..., 2:])
    (v,) = view_packs([Comparison(prompts[0], TEACHER, [OTHER, LONG])], processor)
    assert (v.pack.input_ids[0, v.pack.last_tokens] == eos).all()  # every view ends alike, and once
    assert int((v.pack.targets == eos).sum()) == len(v.views) == 6


def test_no_shortcut_by_padding(learned, prompts):
    """Siblings that are much longer or shorter change nothing."""
    discriminator, processor = learned
    _, alone = both_scores(discriminator, processor, [Comparison(prompts[0], TEACHER, [OTHER])])[0]
    beside = both_scores(
        discriminator, processor, [Comparison(prompts[0], TEACHER, [LONG, OTHER, SHORT])]
    )[0][1]
    torch.testing.assert_close(beside[1], alone[0], atol=1e-5, rtol=0)


def test_no_shortcut_by_truncation(learned, prompts):
    """Long responses (the release cuts the supervision to 512 tokens): all their tokens are there,
    and the last word counts."""
    discriminator, processor = learned
    long = Response(
        "Digits 7, 2, 8. " * 100 + "End 1.", "7 + 2 = 9, 9 + 8 = 17. " * 60 + "So it is 17.", "17"
    )
    views = encode_views(processor, long)
    assert min(map(len, views)) > 600
    assert processor.tokenizer.decode(torch.cat([views[0][:-1], views[1][:-1]])) == written(long)
    changed = dataclasses.replace(long, caption=long.caption[:-2] + "2.", answer="18")
    for max_tokens in (None, 50):  # a budget cuts packs, not texts
        for teacher, same, other in ((long, 0, 1), (changed, 1, 0)):
            comparison = Comparison(prompts[0], teacher, [long, changed])
            (_, scores), _ = both_scores(discriminator, processor, [comparison], max_tokens)
            gap = scores[:, :2] - scores[:, 2:]
            assert (gap[same] == 0).all() and (gap[other].abs() > 1e-4).all()


def test_no_shortcut_by_position_or_side(learned, prompts):
    """A text's scores are its own: as teacher or as student, as the first branch or the last, in
    this pack or in another."""
    discriminator, processor = learned
    texts = [TEACHER, LONG, OTHER, SHORT]
    orders = [
        [texts[i] for i in order]
        for order in ((0, 1, 2, 3), (3, 2, 1, 0), (1, 3, 0, 2), (2, 0, 3, 1))
    ]
    for prompt in prompts:
        for max_tokens in (None, 250):
            comparisons = [Comparison(prompt, first, rest) for first, *rest in orders]
            (_, scores), _ = both_scores(discriminator, processor, comparisons, max_tokens)
            found = {text: [] for text in texts}
            for row, (teacher, student) in zip(
                scores, [(c.teacher, s) for c in comparisons for s in c.students]
            ):
                found[teacher].append(row[:2])
                found[student].append(row[2:])
            for some in found.values():
                some = torch.stack(some)
                assert len(some) == 6 and (some - some[0]).abs().max() < 1e-5
        (v,) = view_packs(comparisons[:1], processor)
        starts = v.pack.last_tokens - torch.tensor(v.pack.lengths) + 1
        assert (v.pack.position_ids[:, 0, starts] == prompt.next_position).all()


# --------------------------------------------------------------------------------------------------
# Packed views are separate forwards


def alone(discriminator, prompt, view: torch.Tensor, which: int, processor) -> float:
    """The score of [prompt | view] by transformers' own forward of these weights: its attention,
    its mask, its positions."""
    ids = prompt.input_ids
    image = {}
    if discriminator.kind == "text":
        special = {
            processor.image_token_id,
            processor.vision_start_token_id,
            processor.vision_end_token_id,
        }
        ids = torch.tensor([i for i in ids.tolist() if i not in special])
    elif prompt.pixel_values is not None:
        image = {"pixel_values": prompt.pixel_values, "image_grid_thw": prompt.image_grid_thw}
    both = torch.cat([ids, view])[None]
    for block in discriminator.sparse_mlps if discriminator.kind == "dedicated" else []:
        block.allowed = torch.ones(both.shape[1], 4, dtype=torch.bool)
        block.allowed[len(ids) :] = torch.tensor([which == 0, which == 0, which == 1, which == 1])
    discriminator.model.set_attn_implementation({"text_config": "sdpa", "vision_config": "sdpa"})
    try:
        hidden = discriminator.model(
            input_ids=both,
            attention_mask=torch.ones_like(both),
            use_cache=False,
            **image,
            mm_token_type_ids=(both == processor.image_token_id).int(),
        ).last_hidden_state[0, -1]
    finally:
        discriminator.model.set_attn_implementation(
            {"text_config": "layout", "vision_config": "sdpa"}
        )
        for block in discriminator.sparse_mlps:
            block.allowed = None
    return float(hidden @ discriminator.score.weight[which])


@pytest.mark.parametrize("kind", KINDS)
def test_packed_views_are_separate_forwards(world, prompts, kind):
    discriminator, processor = build(world, kind)
    comparisons = [
        Comparison(
            prompts[0],
            TEACHER,
            [OTHER, LONG, None, dataclasses.replace(OTHER, caption=TEACHER.caption)],
        ),
        Comparison(prompts[2], OTHER, [TEACHER, SHORT]),
        Comparison(prompts[1], LONG, [SHORT]),
    ]
    with torch.no_grad():
        expected = torch.tensor(
            [
                [
                    alone(discriminator, c.prompt, view, k, processor)
                    for side in (c.teacher, student)
                    for k, view in enumerate(encode_views(processor, side))
                ]
                for c in comparisons
                for student in c.students
                if student is not None
            ]
        )
    assert expected.std(0).min() > 0.1 and expected.abs().max() < 10  # real scores, unclamped
    counts = []
    for max_tokens in (None, 500, 200, 1):
        (_, scores), count = both_scores(discriminator, processor, comparisons, max_tokens)
        counts.append(count)
        assert (scores[[0, 1, 3, 4, 5, 6]] - expected).abs().max() < 1e-5
    assert counts[0] == 1 and counts[-1] == 6 and counts == sorted(set(counts))


@pytest.mark.parametrize("kind", KINDS)
def test_the_image_counts_unless_the_kind_is_text(world, prompts, kind):
    discriminator, processor = build(world, kind)
    mine, other = prompts[:2]
    assert torch.equal(mine.image_grid_thw, other.image_grid_thw) and not torch.equal(
        mine.pixel_values, other.pixel_values
    )
    swapped = dataclasses.replace(mine, pixel_values=other.pixel_values)
    a, b = (
        both_scores(discriminator, processor, [Comparison(p, TEACHER, [OTHER])])[0][1]
        for p in (mine, swapped)
    )
    if kind == "text":
        assert torch.equal(a, b)
        (v,) = view_packs([Comparison(mine, TEACHER, [OTHER])], processor, text_only=True)
        assert (
            v.pack.pixel_values is None and not (v.pack.input_ids == processor.image_token_id).any()
        )
    else:
        assert ((a - b).abs() > 1e-3).all()


@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_does_not_depend_on_the_cut(world, prompts, kind):
    discriminator, processor = build(world, kind)
    comparisons = [
        Comparison(prompts[0], TEACHER, [OTHER, LONG, None, TEACHER]),
        Comparison(prompts[2], OTHER, [TEACHER, SHORT]),
        Comparison(prompts[1], LONG, [SHORT, OTHER]),
    ]
    gradients, losses = [], []
    for max_tokens in (100_000, 300, 1):
        discriminator.zero_grad(set_to_none=True)
        judged = judge(
            discriminator, comparisons, processor, max_tokens, balance_coef=0.0, backward=True
        )
        gradients.append(
            torch.cat([p.grad.flatten() for p in discriminator.parameters() if p.grad is not None])
        )
        losses.append(judged.metrics["discriminator_loss"].value)
    assert gradients[0].norm() > 0.1
    for gradient, loss in zip(gradients[1:], losses[1:]):
        assert (gradient - gradients[0]).norm() < 1e-5 * gradients[0].norm()
        assert loss == pytest.approx(losses[0], rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_what_keeps_ranks_in_step_reaches_no_loss(world, monkeypatch, kind):
    """Blank images behind packs without one, and packs of nothing else: every gradient, score and
    number is as without them. The vision tower, which only they reach, learns nothing."""
    discriminator, processor = build(world, kind)
    chat = lambda text: [{"role": "user", "content": [{"type": "text", "text": text}]}]
    rows = [Example(i, "row", chat(text), []) for i, text in enumerate(("No image.", "Neither."))]
    some = [Comparison(p, TEACHER, [OTHER, LONG]) for p in encode_prompts(processor, rows)]
    (blank,) = make_packs([blank_group(processor)])

    def with_blanks(packs, _):
        return [*(_with_blank(pack, blank) for pack in packs), blank, blank]

    judgements, gradients = [], []
    for even in (None, with_blanks):
        if even:
            monkeypatch.setattr("data.even_packs", even)
        discriminator.zero_grad(set_to_none=True)
        judged = judge(discriminator, some, processor, 400, balance_coef=10.0, backward=True)
        judgements.append(judged)
        gradients.append({n: p.grad for n, p in discriminator.named_parameters()})
    plain, padded = gradients
    seen = {name for name, gradient in plain.items() if gradient is None}
    assert seen and seen == {name for name in plain if ".visual." in name}
    assert not any(padded[name].any() for name in seen)
    for name in plain.keys() - seen:
        torch.testing.assert_close(padded[name], plain[name], rtol=1e-5, atol=1e-6, msg=name)
    one, two = (
        {name: getattr(value, "value", value) for name, value in judged.metrics.items()}
        for judged in judgements
    )
    assert one.keys() == two.keys()
    for name in ("discriminator_loss", *(("balance_loss",) if discriminator.sparse_mlps else ())):
        assert two[name] == pytest.approx(one[name], rel=1e-5)


# --------------------------------------------------------------------------------------------------
# Kinds


def test_dedicated_experts(world, prompts):
    """Perception tokens reach the first half of the experts, reasoning tokens the other half,
    prompt tokens any."""
    discriminator, processor = build(world, "dedicated")
    reached = {0: set(), 1: set(), -1: set()}
    for v in view_packs([Comparison(p, TEACHER, [OTHER, LONG]) for p in prompts], processor, 400):
        discriminator(v.pack, v.views)
        at, views = 0, iter(v.views.tolist())
        for segment in v.pack.segments:
            for length, view in [
                (segment.prompt_length, -1),
                *((n, next(views)) for n in segment.branch_lengths),
            ]:
                for block in discriminator.sparse_mlps:
                    reached[view] |= set(block.chosen[at : at + length].flatten().tolist())
                at += length
        assert at == v.pack.input_ids.shape[1]
    assert reached == {0: {0, 1}, 1: {2, 3}, -1: {0, 1, 2, 3}}


def test_dense_has_no_experts_and_upcycling_without_noise_is_dense(world, prompts):
    dense, processor = build(world, "dense")
    assert dense.sparse_mlps == [] and not any(isinstance(m, SparseMLP) for m in dense.modules())
    comparisons = [Comparison(p, TEACHER, [OTHER, LONG]) for p in prompts]
    (_, expected), _ = both_scores(dense, processor, comparisons)
    upcycle(dense.model.language_model.layers, torch.Generator(), noise_std=0.0, router_std=1.0)
    assert len(dense.sparse_mlps) == 2
    (_, scores), _ = both_scores(dense, processor, comparisons)
    assert all(len(block.chosen.unique()) == 4 for block in dense.sparse_mlps)
    torch.testing.assert_close(scores, expected, atol=1e-5, rtol=0)
    judged = judge(dense, comparisons, processor, 1000, backward=False)
    assert "balance_loss" in judged.metrics
    shares_of = {k: v for k, v in judged.metrics.items() if k.startswith("expert_share")}
    assert set(shares_of) == {f"expert_share_{name}" for name in VIEWS}
    for shares in shares_of.values():
        assert torch.tensor(shares).shape == (2, 4)
        assert (torch.tensor(shares).sum(-1) - 1).abs().max() < 3e-4


# --------------------------------------------------------------------------------------------------
# What cannot be compared is left out in the open


def test_a_prompt_without_a_valid_rollout_adds_nothing(learned, prompts):
    discriminator, processor = learned
    some = [Comparison(prompts[0], TEACHER, [OTHER, None])]
    none = Comparison(prompts[1], OTHER, [None, None])
    results = []
    for comparisons in (some, [none, *some, none]):
        discriminator.zero_grad(set_to_none=True)
        judged = judge(
            discriminator, comparisons, processor, 1000, balance_coef=0.01, backward=True
        )
        results.append((judged, [p.grad.clone() for p in discriminator.parameters()]))
    (one, g1), (two, g2) = results
    assert all(torch.equal(a, b) for a, b in zip(g1, g2))
    assert one.metrics == two.metrics and "expert_share_perception" in one.metrics
    assert one.valid.tolist() == [[True, False]]
    assert two.valid.tolist() == [[False, False], [True, False], [False, False]]
    for a, b in zip((*sides(one), lengths(one)), (*sides(two), lengths(two))):
        assert torch.equal(b[1], a[0]) and (a[0, 0] != 0).all()
        assert (b[~two.valid] == 0).all()


# --------------------------------------------------------------------------------------------------
# Packs of units

repeatable = settings(derandomize=True, deadline=None, database=None, max_examples=200)


@st.composite
def unit_groups(draw):
    """Groups of distinct tokens, and for each group units that name all of its branches."""
    groups, units, token = [], [], itertools.count()
    for g in range(draw(st.integers(1, 4))):
        drawn = draw(st.lists(st.integers(1, 12), max_size=6))
        length = draw(st.integers(1, 9))
        prompt = torch.tensor([next(token) for _ in range(length)])
        branches = [torch.tensor([next(token) for _ in range(n)]) for n in drawn]
        groups.append(Group(Prompt(g, prompt, torch.arange(length).expand(3, -1)), branches))
        places = st.integers(0, max(len(drawn) - 1, 0))
        some = draw(st.lists(st.lists(places, min_size=1, max_size=4).map(tuple), max_size=6))
        missing = set(range(len(drawn))) - {i for unit in some for i in unit}
        units.append([*some, *((i,) for i in sorted(missing))] if drawn else [])
    return groups, units


@given(case=unit_groups(), max_tokens=st.none() | st.integers(1, 60))
@repeatable
def test_units_stand_whole_in_one_pack(case, max_tokens):
    groups, units = case
    packs = make_packs(groups, max_tokens, units)
    in_order = [(g, u) for g, some in enumerate(units) for u in range(len(some))]
    assert sorted(unit for pack in packs for unit in pack.units) == in_order  # each once
    prompts_left, last_groups = set(range(len(groups))), set()
    for number, pack in enumerate(packs):
        # What its units need stands there, each branch once however many units share it.
        needed = {(g, i) for g, u in pack.units for i in units[g][u]}
        assert set(pack.members) == needed and len(pack.members) == len(needed)
        # The tokens are those of the group: the prompt once for all branches, then the branches.
        row, members = pack.input_ids[0].tolist(), iter(pack.members)
        at, here = 0, []
        for segment in pack.segments:
            assert segment.start == at
            (g,) = (
                i for i, group in enumerate(groups) if row[at] == int(group.prompt.input_ids[0])
            )
            here.append(g)
            expected = groups[g].prompt.input_ids.tolist()
            for length in segment.branch_lengths:
                owner, i = next(members)
                assert owner == g and length == len(groups[g].branches[i])
                expected += groups[g].branches[i].tolist()
            assert row[at : at + len(expected)] == expected
            at += len(expected)
        assert at == len(row) and next(members, None) is None
        assert here == sorted(set(here)) and {g for g, _ in pack.units} <= set(here)
        prompts_left -= set(here)
        # The budget holds, unless one unit alone is larger; and no pack was closed too early.
        alone = len(pack.units) + sum(not units[g] for g in here) == 1
        assert max_tokens is None or len(row) <= max_tokens or alone
        if number:
            g, u = pack.units[0] if units[here[0]] else (here[0], None)
            last = packs[number - 1]
            there = {i for h, i in last.members if h == g}
            prompt = 0 if g in last_groups else len(groups[g].prompt.input_ids)
            fresh = {i for i in (units[g][u] if u is not None else ())} - there
            cost = prompt + sum(len(groups[g].branches[i]) for i in fresh)
            assert last.input_ids.numel() + cost > max_tokens
        last_groups = set(here)
    assert not prompts_left  # a group without branches stands there too
    assert len(packs) == 1 or max_tokens is not None


def test_units_by_hand():
    """Two teachers' views (branches 0, 1) that three students share; the third does not fit."""
    prompt = Prompt(0, torch.arange(5), torch.arange(5).expand(3, -1))
    lengths = (3, 4, 2, 2, 1, 1, 6, 2)
    group = Group(prompt, [torch.full((n,), 10 + i) for i, n in enumerate(lengths)])
    units = [[(0, 1, 2, 3), (0, 1, 4, 5), (0, 1, 6, 7), (0, 1, 0, 1)]]
    first, second = make_packs([group], 20, units)
    assert first.input_ids.numel() == 5 + 3 + 4 + 2 + 2 + 1 + 1
    assert second.input_ids.numel() == 5 + 3 + 4 + 6 + 2
    assert first.units == [(0, 0), (0, 1)] and second.units == [(0, 2), (0, 3)]
    assert first.members == [(0, i) for i in (0, 1, 2, 3, 4, 5)]
    assert second.members == [(0, i) for i in (0, 1, 6, 7)]
    (whole,) = make_packs([group], None, units)
    assert whole.members == [(0, i) for i in range(8)] and whole.input_ids.numel() == 26
    default = make_packs([group], 20)
    assert [unit for pack in default for unit in pack.units] == [(0, i) for i in range(8)]
    assert [member for pack in default for member in pack.members] == [(0, i) for i in range(8)]


# --------------------------------------------------------------------------------------------------
# Copied into another project


def test_an_unprepared_model_is_an_error_that_names_the_remedy(world, prompts, learned):
    """Without it the branches of a pack would see each other, and the numbers would be wrong."""
    theirs = AutoModelForImageTextToText.from_pretrained(world["init"]).eval()
    comparisons = [Comparison(prompt, TEACHER, [OTHER, LONG]) for prompt in prompts]
    (v,) = view_packs(comparisons, learned[1])
    discriminator = Discriminator(theirs.base_model, "dense").eval()
    for implementation in ("sdpa", "eager"):
        theirs.set_attn_implementation(implementation)
        with pytest.raises(RuntimeError, match=r"prepare_for_packs\(model\)"):
            discriminator(v.pack, v.views)
        with pytest.raises(RuntimeError, match=r"prepare_for_packs\(model\)"):
            token_logprobs(theirs, v.pack)
    assert prepare_for_packs(theirs) is theirs
    ours, _ = load_policy(world["init"])
    with torch.no_grad():
        assert discriminator(v.pack, v.views).isfinite().all()
        for a, b in zip(token_logprobs(theirs, v.pack), token_logprobs(ours.eval(), v.pack)):
            assert torch.equal(a, b)


# --------------------------------------------------------------------------------------------------
# Precision


def test_scores_are_float32_in_bfloat16(world, prompts):
    """Rewards are differences of scores: the head's product is not rounded to bfloat16."""
    discriminator, processor = build(world)
    discriminator = discriminator.bfloat16()
    compared = [Comparison(prompts[0], TEACHER, [OTHER, SHORT, LONG])]
    judged = judge(discriminator, compared, processor, 4096, backward=True)
    scores = torch.cat([judged.perception, judged.reasoning])
    assert (scores != scores.bfloat16().float()).all()
    assert discriminator.score.weight.grad.abs().max() > 0
