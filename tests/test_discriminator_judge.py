"""The discriminator as a whole against transformers' own Qwen3-VL-MoE: hidden states, scores,
losses and gradients. They do not depend on packing, and broken rollouts have no part in them.

The models are tiny, with random weights everywhere (norms and biases too), so that nothing can be
right by being 0 or 1.
"""

import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import Qwen3VLMoeForConditionalGeneration
from transformers.models.qwen3_vl_moe.modeling_qwen3_vl_moe import load_balancing_loss_func

from data import Response, encode_prompts, encode_views
from discriminator import VIEWS, Comparison, judge, view_of_tokens, view_packs
from support.huggingface import save_discriminator
from support.metrics import Loss, Mean
from tests.judges import TEACHER, comparisons, example, our_hidden, randomised, sides, their_hidden
from tests.test_align import debiased_advantage, reference_advantage
from tests.test_policy_gradient import close


def opened(path):
    return Qwen3VLMoeForConditionalGeneration.from_pretrained(
        path, dtype=torch.float64, experts_implementation="eager"
    )


@pytest.fixture(scope="module")
def reference(sparse):
    """The saved directory as transformers opens it, in float64."""
    return opened(sparse[2])


def view_lengths(judged) -> torch.Tensor:
    """(2, P, N): tokens of the students' views."""
    return torch.stack([judged.perception_length, judged.reasoning_length])


def expert_shares(judged) -> dict:
    return {name: x for name, x in judged.metrics.items() if name.startswith("expert_share")}


def invalid_is_zero(judged) -> None:
    """Where there is no score stands 0, in all fields."""
    for scores in (*sides(judged), view_lengths(judged).permute(1, 2, 0)):
        assert scores.isfinite().all() and (scores[~judged.valid] == 0).all()


def told_apart(view_packs, comparisons) -> torch.Tensor:
    """(2, P, N) boolean: the two sides of a pair are not one branch."""
    most = max(len(c.students) for c in comparisons)
    out = torch.zeros(2, len(comparisons), most, dtype=torch.bool)
    for v in view_packs:
        p, n = v.numbers.T
        out[:, p, n] = (v.pairs[:, :2] != v.pairs[:, 2:]).T
    return out


def sequences(packed, groups_of_pack):
    """For every branch of a pack: (prompt, branch tokens, slice of the prompt, slice of the
    branch)."""
    for segment, prompt in zip(packed.segments, groups_of_pack):
        at = segment.start + segment.prompt_length
        for length in segment.branch_lengths:
            yield (
                prompt,
                packed.input_ids[0, at : at + length],
                slice(segment.start, segment.start + segment.prompt_length),
                slice(at, at + length),
            )
            at += length


def test_backbone_is_transformers_mixture_of_experts(sparse, reference):
    """Hidden states of a pack with images against each sequence alone."""
    discriminator, processor, _ = sparse
    pairs = comparisons(processor)
    (pack,) = (v.pack for v in view_packs(pairs, processor))
    compared = 0
    with torch.no_grad():
        ours = our_hidden(discriminator, pack)
        for prompt, branch, before, own in sequences(pack, [c.prompt for c in pairs]):
            theirs = their_hidden(reference, prompt, branch, processor).float()
            torch.testing.assert_close(
                torch.cat([ours[before], ours[own]]), theirs, atol=1e-4, rtol=1e-4
            )
            compared += 1
    assert compared == sum(map(len, (s.branch_lengths for s in pack.segments))) > 8
    used = torch.cat([m.chosen for m in discriminator.sparse_mlps]).unique()
    assert len(used) == 4 and ours.std() > 0.1  # all experts are asked


def test_judge_gives_the_papers_scores_loss_and_gradient(sparse, reference):
    """Everything at once against transformers in float64: scores read at each view's last token by
    its view's head, the pair losses, the square term, the balance loss (each token of the pack
    once), and the gradient of all parameters."""
    discriminator, processor, path = sparse
    pairs = comparisons(processor)
    head = load_file(f"{path}/model.safetensors")["score.weight"].double().requires_grad_()
    discriminator.train().zero_grad()
    judged = judge(
        discriminator, pairs, processor, 100_000, score_l2=0.05, balance_coef=0.1, backward=True
    )
    assert not discriminator.sparse_mlps[0].allowed and discriminator.sparse_mlps[0].chosen is None

    routed: list[list[torch.Tensor]] = [[], []]
    hooks = [
        layer.mlp.gate.register_forward_hook(lambda m, a, out, i=i: routed[i].append(out[0]))
        for i, layer in enumerate(reference.model.language_model.layers)
    ]
    reference.zero_grad()
    loss, rows, logits = 0.0, {}, [[], []]
    chosen = torch.zeros(2, 2, 4)  # layer, view, expert
    for p, comparison in enumerate(pairs):
        seen = {}

        def score(view, tokens, prompt=comparison.prompt, seen=seen):
            key = view, tuple(tokens.tolist())
            if key not in seen:
                for some in routed:
                    some.clear()
                hidden = their_hidden(reference, prompt, tokens, processor)[-1]
                for i, some in enumerate(routed):
                    logits[i].append(some[0][len(prompt.input_ids) if seen else 0 :])
                    own = some[0][len(prompt.input_ids) :].topk(2).indices.flatten()
                    chosen[i, view] += torch.bincount(own, minlength=4)
                seen[key] = hidden @ head[view]
            return seen[key]

        for n, student in enumerate(comparison.students):
            if student is None:
                continue
            teacher = [
                score(k, v) for k, v in enumerate(encode_views(processor, comparison.teacher))
            ]
            mine = [score(k, v) for k, v in enumerate(encode_views(processor, student))]
            rows[p, n] = teacher, mine
            for t, s in zip(teacher, mine):
                loss = loss + torch.log1p(torch.exp(s - t)) + 0.05 * (t**2 + s**2) / 4
    for hook in hooks:
        hook.remove()
    loss = loss / len(rows)
    loss = loss + 0.1 * load_balancing_loss_func(tuple(torch.cat(some) for some in logits), 4, 2)
    loss.backward()

    # The most students of a prompt are four: (3, 4), and what there is none of is invalid.
    assert judged.valid.tolist() == [[(p, n) in rows for n in range(4)] for p in range(3)]
    invalid_is_zero(judged)
    packs = view_packs(pairs, processor, 100_000)
    teachers, students = sides(judged)
    for (p, n), (teacher, mine) in rows.items():
        close(teachers[p, n], [float(x.detach()) for x in teacher], 1e-4)
        close(students[p, n], [float(x.detach()) for x in mine], 1e-4)
        differs = [bool(t != s) for t, s in zip(teacher, mine)]
        assert told_apart(packs, pairs)[:, p, n].tolist() == differs
        views = encode_views(processor, pairs[p].students[n])
        assert view_lengths(judged)[:, p, n].tolist() == [len(view) for view in views]
    for view, name in enumerate(VIEWS):
        of_view = [[float(side[view].detach()) for side in row] for row in rows.values()]
        sums = {
            "score_teacher": sum(t for t, _ in of_view),
            "score_student": sum(s for _, s in of_view),
            "score_gap": sum(t - s for t, s in of_view),
        }
        for mean, expected in sums.items():
            measured = judged.metrics[f"{mean}_{name}"]
            close(float(measured.total), expected, 1e-4)
            assert isinstance(measured, Mean) and measured.count == len(rows)
        apart = [t > s for t, s in of_view if t != s]
        accuracy = judged.metrics[f"pair_accuracy_{name}"]
        assert 0 < len(apart) < len(rows) and accuracy == Mean(sum(apart), len(apart))
    close(judged.metrics["discriminator_loss"].value, loss.item(), 1e-4)
    theirs = {name: p.grad for name, p in reference.named_parameters()} | {
        "score.weight": head.grad
    }
    compared = 0
    for name, parameter in discriminator.named_parameters():
        expected = theirs[name]
        if expected is not None and expected.norm() > 1e-6:
            assert (parameter.grad - expected).norm() <= 2e-3 * expected.norm(), name
            compared += 1
    assert compared > 60
    # Each token of a view chooses two experts in both layers, once however often it is compared.
    tokens = [(view, len(ids)) for view, ids in unique_views(pairs, processor)]
    for view, name in enumerate(VIEWS):
        count = sum(n for v, n in tokens if v == view)
        assert (chosen[:, view].sum(-1) == 2 * count).all()
        close(judged.metrics[f"expert_share_{name}"], chosen[:, view] / (2 * count), 5.1e-5)
    discriminator.zero_grad()


def unique_views(pairs, processor):
    for comparison in pairs:
        valid = [s for s in comparison.students if s is not None]
        yield from {
            (k, tuple(v.tolist()))
            for r in [comparison.teacher] * bool(valid) + valid
            for k, v in enumerate(encode_views(processor, r))
        }


def test_judge_does_not_depend_on_how_views_are_packed(sparse):
    discriminator, processor, _ = sparse
    pairs = comparisons(processor)
    results = []
    for max_tokens in (100_000, 250, 10):
        discriminator.zero_grad()
        judged = judge(discriminator, pairs, processor, max_tokens, balance_coef=0.0, backward=True)
        named = discriminator.named_parameters()
        gradient = {n: p.grad.clone() for n, p in named if p.grad is not None}
        results.append((judged, gradient))
    assert (
        len(view_packs(pairs, processor, 10)) == 6
        and 1 < len(view_packs(pairs, processor, 250)) < 6
    )
    same = [told_apart(view_packs(pairs, processor, n), pairs) for n in (None, 250, 10)]
    assert torch.equal(same[0], same[1]) and torch.equal(same[0], same[2])
    (first, gradient), *others = results
    for judged, other in others:
        for mine, theirs in zip(sides(judged), sides(first)):
            torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-4)
        invalid_is_zero(judged)
        assert torch.equal(judged.valid, first.valid)
        assert torch.equal(view_lengths(judged), view_lengths(first))
        for name in VIEWS:  # as many pairs that can be told apart
            counts = [j.metrics[f"pair_accuracy_{name}"].count for j in (judged, first)]
            assert counts[0] == counts[1] > 0
        close(
            judged.metrics["discriminator_loss"].value,
            first.metrics["discriminator_loss"].value,
            1e-5,
        )
        for name in gradient:
            assert (gradient[name] - other[name]).norm() <= 1e-3 * gradient[name].norm() + 1e-7, (
                name
            )
    discriminator.zero_grad()


def test_balance_of_several_packs_is_their_mean_over_tokens(sparse):
    discriminator, processor, _ = sparse
    pairs = comparisons(processor)
    totals, tokens = [], []
    for v in view_packs(pairs, processor, 250):
        logits = []
        hooks = [
            m.register_forward_hook(
                lambda m, a, out, logits=logits: logits.append(a[0][0] @ m.gate.weight.T)
            )
            for m in discriminator.sparse_mlps
        ]
        with torch.no_grad():
            discriminator(v.pack, v.views)
        for hook in hooks:
            hook.remove()
        totals.append(float(load_balancing_loss_func(tuple(logits), 4, 2)))
        tokens.append(len(logits[0]))
    expected = np.average(totals, weights=tokens)
    assert len(tokens) > 1 and np.ptp(totals) > 0.01
    judgements = [
        judge(discriminator, pairs, processor, 250, balance_coef=b, backward=False)
        for b in (0.0, 0.7)
    ]
    close(judgements[0].metrics["balance_loss"].value, expected, 1e-5)
    losses = [judged.metrics["discriminator_loss"].value for judged in judgements]
    close(losses[1] - losses[0], 0.7 * expected, 1e-5)


def test_dropout_enters_the_loss_and_not_the_rewards(sparse):
    discriminator, processor, _ = sparse
    given_ = comparisons(processor), processor, 100_000
    clean = judge(discriminator, *given_, backward=False)
    discriminator.dropout.p = 0.5
    dropped = judge(discriminator.train(), *given_, backward=False)
    discriminator.dropout.p = 0.0
    for a, b in zip(sides(clean), sides(dropped)):
        assert torch.equal(a, b) and (a[clean.valid] != 0).all()
    assert (
        abs(clean.metrics["discriminator_loss"].value - dropped.metrics["discriminator_loss"].value)
        > 1e-3
    )


def test_judge_without_backward_leaves_no_gradient(sparse):
    discriminator, processor, _ = sparse
    discriminator.zero_grad()
    judge(discriminator, comparisons(processor), processor, 1000, backward=False)
    assert all(p.grad is None for p in discriminator.parameters())


def test_judge_without_a_valid_student(sparse):
    discriminator, processor, _ = sparse
    discriminator.zero_grad()
    only = [Comparison(encode_prompts(processor, [example(0, 1)])[0], TEACHER, [None, None])]
    judged = judge(discriminator, only, processor, 1000, backward=True)
    assert judged.valid.tolist() == [[False, False]]
    invalid_is_zero(judged)
    assert (
        judged.metrics["pair_accuracy_perception"] == Mean(0, 0)
        and judged.metrics["discriminator_loss"].updates == 0
    )
    assert all(p.grad is None or (p.grad == 0).all() for p in discriminator.parameters())


def test_judge_of_no_prompts(sparse):
    """A rank whose rows were all left out takes part with nothing, its advantages included."""
    discriminator, processor, _ = sparse
    judged = judge(discriminator, [], processor, 1000, backward=True)
    lengths = view_lengths(judged)
    assert judged.valid.shape[0] == judged.perception.shape[0] == lengths.shape[1] == 0
    assert judged.metrics["discriminator_loss"] == Loss(0, updates=0)
    assert expert_shares(judged) == {}
    scores = judged.perception, judged.reasoning
    advantage = debiased_advantage(scores, judged.valid, lengths, (0.0, 0.0))
    assert advantage.flatten().shape == (0,)


def test_lengths_debias_the_advantages_of_judged_rollouts(sparse):
    """Scores, valid rollouts and lengths as judge gives them -> (12), (9), (10), (11), against
    plain Python; away from beta = 0 the lengths of the views move the advantages."""
    discriminator, processor, _ = sparse
    pairs = comparisons(processor)
    pairs[1].students += [None, Response("Digits 7, 2. " * 8, "7 + 2 = 9. " * 15, "9")]
    pairs[2].students += [TEACHER, None]
    judged = judge(discriminator, pairs, processor, 300, backward=False)
    valid = [[student is not None for student in c.students] for c in pairs]
    assert judged.valid.tolist() == valid and view_lengths(judged).shape == (2, 3, 4)
    lengths = [
        [[float(len(view)) for view in encode_views(processor, s)] if s else [0.0, 0.0] for s in c]
        for c in (comparison.students for comparison in pairs)
    ]
    close(view_lengths(judged), torch.tensor(lengths).permute(2, 0, 1))
    given_ = (judged.perception, judged.reasoning), judged.valid, view_lengths(judged)
    plain = debiased_advantage(*given_, (0.0, 0.0))
    for betas in ((0.0, 0.0), (0.7, 0.0), (0.0, -0.4), (1.3, 0.5)):
        weights = dict(alpha=0.4, format_penalty=2.5)
        views = [
            [
                [s - beta * math.log(1 + n[view]) for s, n in zip(*row)]
                for row in zip(scores.tolist(), lengths)
            ]
            for view, (scores, beta) in enumerate(zip((judged.perception, judged.reasoning), betas))
        ]
        got = debiased_advantage(*given_, betas, **weights)
        close(got, reference_advantage(*views, valid, 0.4, 2.5), 1e-5)
        if any(betas):
            unweighted = debiased_advantage(*given_, (0.0, 0.0), **weights)
            assert (got - unweighted).abs().max() > 0.05
    close(
        plain,
        reference_advantage(
            judged.perception.tolist(), judged.reasoning.tolist(), valid, alpha=0.5, penalty=1.5
        ),
        1e-5,
    )


def test_equal_texts_score_exactly_alike(sparse):
    """The same response on both sides: the very same number, so neither side wins and nothing can
    be learned from it."""
    discriminator, processor, _ = sparse
    same = [
        Comparison(
            encode_prompts(processor, [example(0, 1)])[0],
            TEACHER,
            [TEACHER, Response("x", "y", "z")],
        )
    ]
    judged = judge(discriminator, same, processor, 1000, backward=False)
    teacher, student = sides(judged)
    assert torch.equal(teacher[0, 0], student[0, 0])
    assert told_apart(view_packs(same, processor, 1000), same)[:, 0].tolist() == [[False, True]] * 2
    for name in VIEWS:  # of the two pairs one can be told apart
        assert judged.metrics[f"pair_accuracy_{name}"].count == 1


def test_scores_are_clamped_and_dropout_is_for_the_loss_alone(sparse):
    discriminator, processor, _ = sparse
    (v,) = view_packs(comparisons(processor), processor)
    weight = discriminator.score.weight.data.clone()
    try:
        with torch.no_grad():
            plain = discriminator(v.pack, v.views)
            discriminator.dropout.p = 0.1
            trained = discriminator.train()(v.pack, v.views)
            evaluated = discriminator.eval()(v.pack, v.views)
        assert torch.equal(trained[1], plain[1]) and torch.equal(evaluated[0], evaluated[1])
        assert (trained[0] - trained[1]).abs().max() > 1e-3
        discriminator.dropout.p = 0.0
        assert plain.abs().max() < 10
        discriminator.score.weight.data *= 8 / plain.abs().max() * 4  # the largest would be 32
        scores = discriminator.train()(v.pack, v.views)
        close(
            scores[1].detach(),
            [min(max(float(x) * 32 / float(plain.abs().max()), -10), 10) for x in plain[1]],
            1e-4,
        )
        outside = scores[0].abs() == 10
        assert outside.any() and not outside.all()
        for chosen, still in (
            (outside, True),
            (~outside, False),
        ):  # beyond the clamp nothing pulls a score further
            (gradient,) = torch.autograd.grad(
                scores[0][chosen].sum(), discriminator.score.weight, retain_graph=True
            )
            assert (gradient == 0).all() == still
    finally:
        discriminator.score.weight.data.copy_(weight)
        discriminator.dropout.p = 0.0
        discriminator.train()


def test_dedicated_experts_serve_their_view_alone(dense):
    discriminator, processor = randomised(dense, "dedicated")
    pairs = comparisons(processor)
    (v,) = view_packs(pairs, processor)
    owner = []
    views = iter(v.views.tolist())
    for segment in v.pack.segments:
        owner += [-1] * segment.prompt_length
        for length in segment.branch_lengths:
            owner += [next(views)] * length
    assert view_of_tokens(v.pack, v.views).tolist() == owner
    with torch.no_grad():
        discriminator(v.pack, v.views)
    for block in discriminator.sparse_mlps:
        taken = {
            view: {
                e for o, chosen in zip(owner, block.chosen.tolist()) if o == view for e in chosen
            }
            for view in (-1, 0, 1)
        }
        assert taken == {-1: {0, 1, 2, 3}, 0: {0, 1}, 1: {2, 3}}
    shares = expert_shares(judge(discriminator, pairs, processor, 100_000, backward=False))
    perception, reasoning = (torch.tensor(shares[f"expert_share_{name}"]) for name in VIEWS)
    assert perception.shape == reasoning.shape == (2, 4)
    assert (perception[:, 2:] == 0).all() and (reasoning[:, :2] == 0).all()
    assert (perception.sum(-1) > 0).all() and (reasoning.sum(-1) > 0).all()


def test_text_only_discriminator_never_sees_the_image(dense, tmp_path):
    discriminator, processor = randomised(dense, "text")
    save_discriminator(discriminator, str(tmp_path / "text"))
    theirs = opened(tmp_path / "text")
    pairs = comparisons(processor)[:1]
    teacher, _ = sides(judge(discriminator, pairs, processor, 1000, backward=False))
    special = {
        processor.image_token_id,
        processor.vision_start_token_id,
        processor.vision_end_token_id,
    }
    ids = torch.tensor([i for i in pairs[0].prompt.input_ids.tolist() if i not in special])
    with torch.no_grad():
        for k, view in enumerate(encode_views(processor, TEACHER)):
            hidden = theirs.model(
                input_ids=torch.cat([ids, view])[None], use_cache=False
            ).last_hidden_state[0, -1]
            close(
                teacher[0, 0, k],
                float(hidden @ discriminator.score.weight[k].double()),
                1e-4,
            )
