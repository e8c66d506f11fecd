"""The discriminator as a judge: that nothing but the text of a view moves its score, that packing
does not, that its kinds are what they say, that what cannot be compared is left out in the open,
and that, trained, it keeps the two causes apart.

Formulas, and parity with transformers' own mixture of experts, are in test_align.py.
"""

import dataclasses
import itertools
import json
import os
import random
import shutil
import time
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PhiConfig,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from data import (
    Group,
    Prompt,
    Response,
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
    load_discriminator,
    upcycle,
    view_packs,
)
from model import _with_blank, load_policy, prepare_for_packs, token_logprobs
from sampler import Sampling, generate
from support import digits
from support.errors import UserError
from support.huggingface import (
    load_processor,
    processor_files,
    save_discriminator,
    save_policy,
    write_files,
)
from support.optimizer import learning_rate_at, optimizer_step
from support.rows import Example, load_data
from tests.conftest import fails, launch, lines

KINDS = ("learned", "dedicated", "dense", "text")
TEACHER = Response(
    "From left to right the digits are 1, 2 and 3.",
    "1 + 2 = 3, 3 + 3 = 6. So the answer is 6.",
    "6",
)
SHORT = Response("x", "y", "z")
LONG = Response(
    "Digits 7, 2 and 8. " * 9 + "Digits 4.", "7 + 2 = 9, 9 + 8 = 17. " * 7 + "So it is 17.", "17"
)
OTHER = Response("Digits 7, 2 and 8.", "7 + 2 = 9, 9 + 8 = 17.", "17")


def written(r: Response) -> str:
    return f"<caption>{r.caption}</caption>\n<think>{r.think}</think>\n<answer>{r.answer}</answer>"


def build(world, kind: str = "learned", dropout: float = 0.0):
    """A discriminator of random weights whose experts, routers and heads really differ from one
    another."""
    discriminator, processor = load_discriminator(world["init"], kind, dropout)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in discriminator.named_parameters():
            std = (
                0.2
                if ".mlp." in name and "language_model" in name
                else 0.2
                if name == "score.weight"
                else 0.0
            )
            parameter.add_(std * torch.randn(parameter.shape, generator=generator))
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


def sides(judged) -> tuple[torch.Tensor, torch.Tensor]:
    """(P, N, 2) twice: perception and reasoning scores of the supervision, and of the students."""
    teacher = judged.teacher_perception, judged.teacher_reasoning
    return torch.stack(teacher, -1), torch.stack([judged.perception, judged.reasoning], -1)


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
            monkeypatch.setattr("model.even_packs", even)
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


def pair_rows(world) -> tuple[list[dict], int]:
    """Pairs in both released schemas, three of them unusable, and their number."""
    folder = os.path.dirname(world["prompts"])
    rows = []
    for number, row in enumerate([json.loads(line) for line in open(world["prompts"])][:15]):
        teacher, student = row["response"], row["response"].replace("digits are", "digits may be")
        pair = {"image": os.path.join(folder, row["image"])}
        if number == 3:
            student = student.replace("</think>", "")  # breaks the format
        if number == 6:
            teacher = "What I see: " + teacher  # breaks the format
        if number == 9:
            student = student.replace("<think>", "<think>" + "1 + 1 = 2. " * 80)  # too long
        if number % 2:
            pair |= {
                "question": row["question"],
                "teacher_response": teacher,
                "student_response": student,
            }
        else:
            pair |= {"prompt": row["question"]}
            for side, text in (("teacher", teacher), ("student", student)):
                caption, cot = text.split("</caption>\n")
                pair |= {f"{side}_caption": caption + "</caption>", f"{side}_cot": cot}
        rows.append(pair)
    return rows, 3


@pytest.mark.parametrize("share", [0, 0.5])
def test_pairs_in_both_schemas_and_those_that_are_left_out(world, tmp_path, share):
    rows, bad = pair_rows(world)
    data, out = tmp_path / "pairs.jsonl", tmp_path / "d"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = launch(
        "discriminator.py",
        "--model",
        world["init"],
        "--data",
        data,
        "--image_dir",
        "/",
        "--output_dir",
        out,
        "--max_length",
        400,
        "--per_device_train_batch_size",
        2,
        "--gradient_accumulation_steps",
        2,
        "--validation_share",
        share,
    )
    left = {row["row"]: row["why"] for row in lines(out / "left_out.jsonl")}
    assert set(left) == {f"{data}:4", f"{data}:7", f"{data}:10"} and all(
        where in done.stderr for where in left
    )
    assert "student" in left[f"{data}:4"] and "is not of the format" in left[f"{data}:4"]
    assert "supervision" in left[f"{data}:7"] and "is not of the format" in left[f"{data}:7"]
    assert "--max_length 400" in left[f"{data}:10"]
    steps = lines(out / "metrics.jsonl")
    assert steps[-1]["rows_left_out"] == bad
    if share:  # only pairs that were compared count as held out
        assert steps[-1]["validation_pairs"] == 8 - len(set(left) & held_out(rows, data, 8))
        assert 0 <= steps[-1]["validation_pair_accuracy_perception"] <= 1
        assert steps[-1]["validation_pair_accuracy_reasoning"] is None or not set(
            left
        )  # reasoning is the same on both sides


def held_out(rows, data, count: int, seed: int = 0) -> set[str]:
    order = [f"{data}:{number + 1}" for number in range(len(rows))]
    random.Random(seed).shuffle(order)
    return set(order[:count])


def test_pairs_with_missing_fields_are_named_and_too_many_end_the_run(world, tmp_path):
    """Each names what was found and what was expected; the third ends the run in one line."""
    rows, _ = pair_rows(world)
    del rows[6]  # the teacher that breaks the format
    bad = {number for number, row in enumerate(rows, 1) if row.pop("student_response", None)}
    assert len(bad) > 3
    data, out = tmp_path / "pairs.jsonl", tmp_path / "d"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ("--model", world["init"], "--data", data, "--image_dir", "/", "--output_dir", out)
    said = fails("discriminator.py", *flags)
    left = lines(out / "left_out.jsonl")
    assert len(left) == 3 and {row["row"] for row in left} < {f"{data}:{n}" for n in bad}
    for row in left:
        for found in ("image", "question", "teacher_response"):
            assert f"'{found}'" in row["why"]
        for expected in ("student_response", "student_caption", "student_cot"):
            assert f"`{expected}`" in row["why"]
        assert "pass --policy, which writes every student anew" in row["why"]
    assert "rows are bad, over" in said and "--max_bad_fraction 0.01" in said
    assert f"{left[-1]['row']}: {left[-1]['why']}" in said
    assert not (out / "model.safetensors").exists()


def test_a_model_without_gated_mlps_is_one_line(world, tmp_path):
    """A LLaVA on Phi, whose MLPs are fc1 and fc2."""
    text = PhiConfig(
        vocab_size=600,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
    )
    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=32,
        patch_size=8,
    )
    model = LlavaForConditionalGeneration(
        LlavaConfig(text_config=text, vision_config=vision, image_token_index=5)
    )
    model.save_pretrained(tmp_path / "phi")
    write_files(tmp_path / "phi", processor_files(world["init"]))
    rows, _ = pair_rows(world)
    data = tmp_path / "pairs.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    said = fails(
        "discriminator.py",
        "--model",
        tmp_path / "phi",
        "--data",
        data,
        "--image_dir",
        "/",
        "--output_dir",
        tmp_path / "d",
    )
    assert f"{tmp_path / 'phi'}: " in said and "PhiMLP" in said and "fc1" in said  # what was found
    assert "gate_proj" in said and "up_proj" in said and "down_proj" in said  # what was expected
    assert "or warm this one up with discriminator.py --experts dense" in said


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


def test_align_counts_prompts_without_a_valid_rollout(world, tmp_path):
    """A policy of random weights never meets the format: no discriminator loss, the rewards by the
    rule, all counted."""
    out = tmp_path / "a"
    done = launch(
        "align.py",
        "--ckpt",
        world["init"],
        "--discriminator",
        world["init"],
        "--data",
        world["prompts"],
        "--output_dir",
        out,
        "--num_generations",
        3,
        "--max_steps",
        2,
        "--max_completion_length",
        8,
        "--prompts_per_step",
        2,
    )
    assert done.stderr.count("step 2: not one response so far has the format <caption>,") == 1
    assert f"no score and no reward; read {out}/rollouts.jsonl, then start from" in done.stderr
    assert len(lines(out / "metrics.jsonl")) == 2
    for step in lines(out / "metrics.jsonl"):
        assert (
            step["prompts_without_valid"] == 2
            and step["ranks_without_valid"] == 1
            and step["format_valid"] == 0
        )
        assert step["d_grad_norm"] == 0
        for name in (
            "discriminator_loss",
            "score_gap_perception",
            "pair_accuracy_reasoning",
            "score_student_perception",
            "score_teacher_reasoning",
        ):
            assert step[name] is None, name  # nothing stands in for what was not measured
    rollouts = lines(out / "rollouts.jsonl")
    assert len(rollouts) == 2 * 3 and {row["advantage"] for row in rollouts} == {-1.5}
    assert all(row["valid"] == 0 for row in rollouts)
    for name in ("perception", "reasoning", "teacher_perception", "teacher_reasoning"):
        assert all(row[name] is None for row in rollouts), name


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
# Other vision-language models with gated MLPs


def qwen2_5_vl(world, path) -> None:
    """Another member of the family: mrope and patches with grids, its vision attending in
    windows."""
    processor = load_processor(world["init"])
    text = dict(
        vocab_size=len(processor.tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        initializer_range=0.1,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]},
    )
    vision = dict(
        depth=2,
        hidden_size=32,
        num_heads=4,
        intermediate_size=48,
        patch_size=8,
        out_hidden_size=32,
        window_size=32,
        fullatt_block_indexes=[1],
        initializer_range=0.1,
    )
    ids = {
        name: getattr(processor, name)
        for name in ("image_token_id", "vision_start_token_id", "vision_end_token_id")
    }
    config = Qwen2_5_VLConfig(
        text_config=text, vision_config=vision, tie_word_embeddings=True, **ids
    )
    model = Qwen2_5_VLForConditionalGeneration(config)
    model.generation_config = GenerationConfig(eos_token_id=processor.tokenizer.eos_token_id)
    model.save_pretrained(path)
    write_files(path, processor_files(world["init"]))


def llava(world, path) -> None:
    """Another family: one position a token, images of one size, no grid."""
    qwen = load_processor(world["init"])
    image = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    processor = LlavaProcessor(
        image,
        qwen.tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token="<|image_pad|>",
        chat_template=qwen.chat_template,
    )
    text = LlamaConfig(
        vocab_size=len(qwen.tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.1,
    )
    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=32,
        patch_size=8,
    )
    model = LlavaForConditionalGeneration(
        LlavaConfig(
            text_config=text,
            vision_config=vision,
            vision_feature_layer=-1,
            image_token_index=processor.image_token_id,
        )
    )
    model.generation_config = GenerationConfig(eos_token_id=qwen.tokenizer.eos_token_id)
    model.save_pretrained(path)
    processor.save_pretrained(path)


@pytest.fixture(scope="module", params=[qwen2_5_vl, llava])
def other_model(request, world, tmp_path_factory):
    path = tmp_path_factory.mktemp(request.param.__name__) / "model"
    torch.manual_seed(0)
    request.param(world, path)
    return str(path)


def by_itself(model, prompt, ids):
    """transformers' own call for one sequence."""
    images = {
        name: getattr(prompt, name)
        for name in ("pixel_values", "image_grid_thw")
        if getattr(prompt, name) is not None
    }
    if "image_grid_thw" in images:
        images["mm_token_type_ids"] = (ids == model.config.image_token_id).int()
    return dict(input_ids=ids, attention_mask=torch.ones_like(ids), **images)


def test_another_model_as_policy(world, other_model, tmp_path):
    """Packed scores and greedy samples are transformers' own, and a saved policy is the same."""
    policy, processor = load_policy(other_model)
    theirs = AutoModelForImageTextToText.from_pretrained(other_model).eval()
    rows = load_data(world["prompts"])[:3]
    text = Example(
        7,
        "text",
        [{"role": "user", "content": [{"type": "text", "text": "What is 1 + 2 + 3?"}]}],
        [],
    )
    prompts = encode_prompts(processor, [*rows[:2], text])
    groups = [
        Group(p, [encode_response(processor, t) for t in (written(TEACHER), written(SHORT), "x")])
        for p in prompts
    ]
    policy.eval()
    for max_tokens in (None, 60):
        for pack in make_packs(groups, max_tokens):
            ours = token_logprobs(policy, pack)[0].detach().split(pack.lengths)
            for (g, i), logp in zip(pack.members, ours):
                ids = torch.cat([prompts[g].input_ids, groups[g].branches[i]])[None]
                logits = (
                    theirs(**by_itself(theirs, prompts[g], ids))
                    .logits[0, len(prompts[g].input_ids) - 1 : -1]
                    .detach()
                )
                logits[:, policy.forbidden] = -torch.inf
                expected = logits.log_softmax(-1).gather(1, groups[g].branches[i][:, None])[:, 0]
                torch.testing.assert_close(logp, expected, atol=1e-5, rtol=0)
    sampled = generate(policy, prompts, Sampling(1, 12, temperature=0.0))
    for prompt, group in zip(prompts, sampled):
        out = theirs.generate(
            **by_itself(theirs, prompt, prompt.input_ids[None]),
            do_sample=False,
            max_new_tokens=12,
            suppress_tokens=policy.forbidden.tolist(),
        )
        assert out[0, len(prompt.input_ids) :].tolist() == group.branches[0].tolist()
    save_policy(policy, str(tmp_path / "saved"))
    again, its_processor = load_policy(str(tmp_path / "saved"))
    assert all(
        torch.equal(a, b) for a, b in zip(policy.state_dict().values(), again.state_dict().values())
    )
    assert all(
        torch.equal(a.input_ids, b.input_ids)
        for a, b in zip(prompts, encode_prompts(its_processor, [*rows[:2], text]))
    )


@pytest.mark.parametrize("kind", KINDS)
def test_another_model_as_discriminator(world, other_model, tmp_path, kind):
    """Upcycled, packed and one by one the same, its image seen, saved and loaded the same, and
    refused as a policy."""
    discriminator, processor = load_discriminator(other_model, kind)
    discriminator.eval()
    assert len(discriminator.sparse_mlps) == (0 if kind == "dense" else 2)
    prompts = encode_prompts(processor, load_data(world["prompts"])[:2])
    whole = [Comparison(p, TEACHER, [OTHER, SHORT, None, TEACHER]) for p in prompts]
    judged = judge(discriminator, whole, processor, 4096, backward=True)
    assert max(p.grad.abs().max() for p in discriminator.parameters() if p.grad is not None) > 0
    assert judged.valid.tolist() == [[True, True, False, True]] * 2
    split = judge(discriminator, whole, processor, 1, backward=False)
    (teacher, student), (_, student_split) = sides(judged), sides(split)
    torch.testing.assert_close(student_split, student, atol=1e-5, rtol=0)
    assert torch.equal(split.valid, judged.valid)
    assert torch.equal(student[:, 3], teacher[:, 3])
    assert torch.equal(teacher[0, 0], teacher[1, 0]) == (
        kind == "text" and rows_ask_the_same(prompts)
    )
    save_discriminator(discriminator, str(tmp_path / "d"))
    again, its_processor = load_discriminator(str(tmp_path / "d"))
    assert again.kind == kind
    repeated = judge(again.eval(), whole, its_processor, 4096, backward=False)
    assert torch.equal(sides(repeated)[1], student) and torch.equal(repeated.valid, judged.valid)
    with pytest.raises(UserError, match="a discriminator, without"):
        load_policy(str(tmp_path / "d"))
    with pytest.raises(UserError, match=f"--experts {kind}"):
        load_discriminator(str(tmp_path / "d"), "learned" if kind != "learned" else "dedicated")


def test_a_damaged_discriminator_of_another_model(other_model, tmp_path):
    """A missing tensor, a head that is gone or of another shape, and an unknown kind of experts are
    named."""
    path, name = tmp_path / "d", "model.language_model.layers.1.mlp.experts.down_proj"
    discriminator, _ = load_discriminator(other_model)
    save_discriminator(discriminator, str(path))
    tensors = load_file(path / "model.safetensors")
    head = tensors.pop("score.weight")
    heads = {"no tensor score.weight": {}, "shape .3, ": {"score.weight": head[[0, 0, 1]].clone()}}
    for said, other in heads.items():
        save_file(tensors | other, path / "model.safetensors", {"format": "pt"})
        with pytest.raises(UserError, match=said):
            load_discriminator(str(path))
    del tensors[name]
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=f"no tensor {name}"):
        load_discriminator(str(path))
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"prism_experts": "newer"}))
    with pytest.raises(UserError, match="prism_experts 'newer', expected one of learned"):
        load_discriminator(str(path))


def test_whose_prompts_it_can_take(world, tmp_path):
    """A policy's prompts serve a discriminator whose processor differs in how large an image may
    be, as that of the released one does. Other patches, pixels or ids are refused."""
    ours = load_discriminator(world["init"])[1]
    for name, change in {
        "size": {"max_pixels": 313600, "do_resize": False},
        "mean": {"image_mean": [0.4, 0.4, 0.4]},
        "patch": {"patch_size": 4},
        "normal": {"do_normalize": False},
        "ids": {},
    }.items():
        path = tmp_path / name
        shutil.copytree(world["init"], path)
        file = path / "preprocessor_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | change))
        if name == "ids":
            file = path / "tokenizer.json"
            tokenizer = json.loads(file.read_text())
            vocab = tokenizer["model"]["vocab"]
            vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
            file.write_text(json.dumps(tokenizer))
        if name == "size":
            theirs = load_discriminator(str(path), policy_processor=ours)[1]
            assert str(theirs.image_processor) != str(ours.image_processor)
        else:
            with pytest.raises(UserError, match=f"{path}: .* differs from the policy's; choose a"):
                load_discriminator(str(path), policy_processor=ours)


def test_a_discriminator_for_images_of_another_size_is_refused(world, tmp_path):
    """Where a model takes images of one size only; in the warm-up as well."""
    for size in (32, 48):
        llava(world, tmp_path / str(size))
    file = tmp_path / "48/preprocessor_config.json"
    if not file.exists():
        file = tmp_path / "48/processor_config.json"
    file.write_text(file.read_text().replace("32", "48"))
    ours = load_discriminator(str(tmp_path / "32"))[1]
    with pytest.raises(UserError, match="48: .* differs from the policy's; choose a"):
        load_discriminator(str(tmp_path / "48"), policy_processor=ours)
    flags = ["--model", world["init"], "--policy", tmp_path / "32", "--data", world["curated"]]
    said = fails("discriminator.py", *flags, "--output_dir", tmp_path / "out")
    assert "differs from the policy's" in said


def test_scores_are_float32_in_bfloat16(world, prompts):
    """Rewards are differences of scores: the head's product is not rounded to bfloat16."""
    discriminator, processor = build(world)
    discriminator = discriminator.bfloat16()
    compared = [Comparison(prompts[0], TEACHER, [OTHER, SHORT, LONG])]
    judged = judge(discriminator, compared, processor, 4096, backward=True)
    scores = torch.cat([judged.perception, judged.reasoning])
    assert (scores != scores.bfloat16().float()).all()
    assert discriminator.score.weight.grad.abs().max() > 0


def rows_ask_the_same(prompts) -> bool:
    return torch.equal(prompts[0].input_ids, prompts[1].input_ids)


def test_windows_are_refused(world, tmp_path):
    qwen2_5_vl(world, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["text_config"] |= {
        "use_sliding_window": True,
        "sliding_window": 8,
        "layer_types": ["full_attention", "sliding_attention"],
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="sliding_attention"):
        load_policy(str(tmp_path))


# --------------------------------------------------------------------------------------------------
# Trained, it keeps the causes apart


LOOKALIKE = {a: b for pair in ("38", "71", "94", "56", "02") for a, b in (pair, pair[::-1])}


def misread(text: str, rng: random.Random) -> str:
    """One digit becomes its look-alike, and as often the other way round: which of the two it is,
    only the image tells."""
    at = rng.choice([i for i, c in enumerate(text) if c.isdigit()])
    return text[:at] + LOOKALIKE[text[at]] + text[at + 1 :]


def corrupted(exact: Response, rng: random.Random) -> list[Response]:
    """Only the caption wrong, only the reasoning (the digit that it looks at, not its answer),
    both."""
    caption, (digit, rest) = misread(exact.caption, rng), exact.think.split(" ", 1)
    think = f"{misread(digit, rng)} {rest}"
    return [
        Response(caption, exact.think, exact.answer),
        Response(exact.caption, think, exact.answer),
        Response(caption, think, exact.answer),
    ]


@pytest.fixture(scope="module")
def trained_judge(tmp_path_factory):
    """A discriminator upcycled from a policy that reads a digit, trained on corrupted responses;
    and held-out comparisons (CAPTION, REASONING, BOTH are the students of each), of scans that
    neither has seen."""
    folder = tmp_path_factory.mktemp("one")
    paths = digits.build(
        folder / "world",
        digits.World(
            digits=1,
            noise=0.0,
            kinds=["count"],
            train_share=0.9,
            validation_share=0.05,
            pretrain_rows=4,
            sft_rows=1350,
            curated_share=1,
            prompt_rows=200,
            question_rows=4,
            validation_rows=4,
            test_rows=4,
        ),
    )
    policy = folder / "policy"
    launch(
        "sft.py",
        "--model",
        paths["init"],
        "--data",
        paths["curated"],
        "--output_dir",
        policy,
        "--max_steps",
        150,
        "--learning_rate",
        4e-3,
        "--per_device_train_batch_size",
        32,
    )
    discriminator, processor = load_discriminator(str(policy))
    start = time.perf_counter()
    optimizer = torch.optim.AdamW(discriminator.parameters(), lr=1e-3, weight_decay=0.01)
    rng = random.Random(0)

    def encoded(name):
        examples = list(load_data(paths[name]))
        return list(
            zip(encode_prompts(processor, examples), (parse_response(e.response) for e in examples))
        )

    def comparisons(rows):
        return [Comparison(prompt, exact, corrupted(exact, rng)) for prompt, exact in rows]

    rows, steps = encoded("curated"), 100
    rates = SimpleNamespace(learning_rate=1e-3, lr_scheduler_type="cosine", warmup_steps=0.1)
    discriminator.train()
    for step in range(1, steps + 1):
        batch = comparisons(rng.sample(rows, 24))
        judge(discriminator, batch, processor, 16384, backward=True)
        optimizer_step(discriminator, optimizer, learning_rate_at(step, steps, rates), 1.0)
    print(f"trained in {time.perf_counter() - start:.0f} s")
    return discriminator.eval(), processor, comparisons(encoded("prompts"))


CAPTION, REASONING, BOTH = range(3)


def effect(higher: torch.Tensor, lower: torch.Tensor) -> float:
    """Cohen's d: the difference of the means in pooled standard deviations."""
    return float((higher.mean() - lower.mean()) / ((higher.var() + lower.var()) / 2).sqrt())


def test_a_trained_discriminator_keeps_causes_apart(trained_judge):
    discriminator, processor, held = trained_judge
    judged = judge(discriminator, held, processor, 4000, backward=False)
    exact, wrong = sides(judged)
    assert judged.valid.shape == (len(held), 3) and judged.valid.all()
    for view, spoiled, spared in ((0, CAPTION, REASONING), (1, REASONING, CAPTION)):
        for student in (spoiled, BOTH):
            accuracy = (exact[:, student, view] > wrong[:, student, view]).float().mean()
            d = effect(exact[:, student, view], wrong[:, student, view])
            print(f"view {view}, student {student}: pair accuracy {accuracy:.3f}, d = {d:.2f}")
            assert accuracy > 0.9 and d > 1
        # The other view does not contain what was spoiled: not a small effect but none.
        assert torch.equal(exact[:, spared, view], wrong[:, spared, view])
    for name in ("perception", "reasoning"):
        right = judged.metrics[f"pair_accuracy_{name}"]
        assert right.count == 2 * len(held) and right.total / right.count > 0.9

    # Nor by being computed once: beside other texts, in another pack, on the other side, the spared
    # view scores the same.
    spoiled = [
        Comparison(c.prompt, c.students[CAPTION], [SHORT, c.students[REASONING]]) for c in held
    ]
    teacher, student = sides(judge(discriminator, spoiled, processor, 700, backward=False))
    torch.testing.assert_close(teacher[:, 0, 1], exact[:, 0, 1], atol=1e-4, rtol=0)
    torch.testing.assert_close(student[:, 1, 0], exact[:, 0, 0], atol=1e-4, rtol=0)


def test_a_trained_discriminator_judges_texts_and_not_sides(trained_judge):
    """Sides swapped, the exact response still wins: what was learned is not "teacher"."""
    discriminator, processor, held = trained_judge
    swapped = [Comparison(c.prompt, c.students[BOTH], [c.teacher, c.students[BOTH]]) for c in held]
    teacher, student = sides(judge(discriminator, swapped, processor, 4000, backward=False))
    assert ((student > teacher)[:, 0].float().mean(0) > 0.9).all()
    assert torch.equal(student[:, 1], teacher[:, 1])


def test_a_trained_discriminator_looks_at_the_image(trained_judge):
    """With the images of other prompts the caption's score says nothing any more."""
    discriminator, processor, held = trained_judge
    moved = [
        dataclasses.replace(
            c, prompt=dataclasses.replace(c.prompt, pixel_values=d.prompt.pixel_values)
        )
        for c, d in zip(held, held[1:] + held[:1])
    ]
    judged = judge(discriminator, moved, processor, 4000, backward=False)
    right = judged.metrics["pair_accuracy_perception"]
    print(f"with other images: pair accuracy {right.total / right.count:.3f}")
    assert right.total / right.count < 0.7
