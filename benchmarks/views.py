"""Scoring all 34 views of a prompt, forward and backward: packed (ours) against the two usual ways.

The work is a prompt of 302 tokens, 196 of them one image's, with its supervision response and 16
rollouts, each of two views: a caption block of about 42 tokens and think and answer blocks of about
60. All 34 are different texts, so nothing is gained from equal ones being computed once. From the
texts of the responses to the gradient of the discriminator's loss, three ways:

    (a) one by one     one sample and one view per forward, as the release does: 34 forwards, the
                       image encoded in each
    (b) padded         one batch per view: 17 rows padded on the right, with a mask, the image
                       encoded for every row
    (c) packed         `view_packs` and `Discriminator.forward`: one row, prompt and image once, no
                       padding

The weights and the experts module are the same in all three. (a) and (b) attend by transformers'
own sdpa path and are given their rotary positions ready-made. The model is a random Qwen3-VL
(float32, CPU) upcycled to 4 experts. Its vision tower is small, so that encoding the image is no
larger a share of a view than in Qwen3-VL-2B (about a fifth; it is printed). The three ways take
turns, and a ratio is the median over the turns. Before, all three are seen to give the same scores
and gradient.

    python benchmarks/views.py [--repeats 5] [--hidden_size 256] [--layers 4]
"""

import os
import random
import statistics
import tempfile
import time
from pathlib import Path

import torch
from PIL import Image
from rollout import arguments, ratio

from data import Response, encode_prompts, encode_views
from discriminator import Comparison, discriminator_loss, load_discriminator, view_packs
from model import prepare_for_packs
from support.rows import Example
from support.tiny import Shape, build_model, train_tokenizer

ROLLOUTS, PROMPT_TOKENS, CAPTION_TOKENS, REASONING_TOKENS = 16, 302, 42, 60
SIDE = 224  # pixels, 14 x 14 image tokens
WORDS = """one two three four five six seven eight nine ten red green blue left right above below
    plus minus is so the""".split()


def build(path: str, args) -> tuple:
    """(discriminator, processor) of random weights, without dropout."""
    rng = random.Random(0)
    texts = [response(rng, 30, 30) for _ in range(50)]
    texts = [
        f"<caption>{r.caption}</caption>\n<think>{r.think}</think>\n<answer>{r.answer}</answer>"
        for r in texts
    ]
    shape = Shape(
        hidden_size=args.hidden_size,
        intermediate_size=2 * args.hidden_size,
        layers=args.layers,
        heads=4,
        kv_heads=2,
        head_dim=args.hidden_size // 4,
        vision_hidden_size=64,
        vision_intermediate_size=128,
        vision_layers=2,
        initializer_range=0.04,
    )
    build_model(Path(path), train_tokenizer(texts, 200), shape)
    return load_discriminator(path, dropout=0.0)


def response(rng: random.Random, caption: int, think: int) -> Response:
    """Random words, as many as given."""
    return Response(
        " ".join(rng.choices(WORDS, k=caption)),
        " ".join(rng.choices(WORDS, k=think)),
        rng.choice(WORDS),
    )


def make_comparison(processor, seed: int = 1) -> Comparison:
    """A prompt of exactly PROMPT_TOKENS tokens and 1 + ROLLOUTS responses whose lengths lie around
    those asked for."""
    rng = random.Random(seed)
    image = Image.frombytes("RGB", (SIDE, SIDE), rng.randbytes(3 * SIDE * SIDE))
    path = os.path.join(os.path.dirname(processor.tokenizer.name_or_path) or ".", f"{seed}.png")
    image.save(path)

    def prompt(question):
        content = [{"type": "image"}, {"type": "text", "text": question}]
        example = Example(0, "benchmark", [{"role": "user", "content": content}], [path])
        return encode_prompts(processor, [example])[0]

    lengths = {n: len(prompt(" one" * n).input_ids) for n in (1, 2)}
    per_word = lengths[2] - lengths[1]
    words = 1 + (PROMPT_TOKENS - lengths[1]) // per_word
    made = prompt(" one" * words)
    assert len(made.input_ids) == PROMPT_TOKENS, len(made.input_ids)

    def near(wanted, view):
        """A response whose view has about as many tokens as wanted, a quarter more or less."""
        target = round(wanted * rng.uniform(0.75, 1.25))
        for n in range(1, 200):
            words = " ".join(rng.choices(WORDS, k=n))
            made = Response(*((words, "x", "x") if view == 0 else ("x", words, rng.choice(WORDS))))
            if len(encode_views(processor, made)[view]) >= target:
                return made

    parts = [(near(CAPTION_TOKENS, 0), near(REASONING_TOKENS, 1)) for _ in range(1 + ROLLOUTS)]
    responses = [Response(c.caption, r.think, r.answer) for c, r in parts]
    return Comparison(made, responses[0], responses[1:])


def pairs_of(scores: torch.Tensor) -> torch.Tensor:
    """(17, 2) scores, the teacher's first -> (16, 4) as `discriminator_loss` takes them."""
    return torch.cat([scores[:1].expand(ROLLOUTS, -1), scores[1:]], 1)


def plain(discriminator, prompt, views: list[torch.Tensor]) -> torch.Tensor:
    """Last hidden state of the last token of each [prompt | view], as a batch padded on the right,
    by transformers."""
    ends = torch.tensor([len(prompt.input_ids) + len(view) - 1 for view in views])
    rows, longest = torch.arange(len(views)), int(ends.max()) + 1
    ids = torch.zeros(len(views), longest, dtype=torch.long)
    for row, view in zip(ids, views):
        row[: len(prompt.input_ids) + len(view)] = torch.cat([prompt.input_ids, view])
    mask = (torch.arange(longest) <= ends[:, None]).long()
    after = (prompt.next_position + torch.arange(longest - len(prompt.input_ids))).expand(3, -1)
    positions = torch.cat([prompt.position_ids, after], 1)[:, None].expand(-1, len(views), -1)
    hidden = discriminator.model(
        input_ids=ids,
        attention_mask=mask,
        position_ids=positions,
        use_cache=False,
        pixel_values=prompt.pixel_values.repeat(len(views), 1),
        image_grid_thw=prompt.image_grid_thw.repeat(len(views), 1),
    ).last_hidden_state
    return hidden[rows, ends]


def views_of(processor, comparison) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Both views of the supervision response and of each student."""
    return [encode_views(processor, r) for r in (comparison.teacher, *comparison.students)]


# The three ways -> (17, 2) scores, the supervision's first.


def one_by_one(discriminator, comparison, processor) -> torch.Tensor:
    heads = discriminator.score.weight
    scores = [
        plain(discriminator, comparison.prompt, [view])[0] @ heads[k]
        for both in views_of(processor, comparison)
        for k, view in enumerate(both)
    ]
    return torch.stack(scores).view(-1, 2)


def padded(discriminator, comparison, processor) -> torch.Tensor:
    scores = [
        plain(discriminator, comparison.prompt, list(some)) @ discriminator.score.weight[k]
        for k, some in enumerate(zip(*views_of(processor, comparison)))
    ]
    return torch.stack(scores, 1)


def packed(discriminator, comparison, processor) -> torch.Tensor:
    (v,) = view_packs([comparison], processor)
    assert len(v.views) == 2 * ROLLOUTS + 2  # all different
    scores = discriminator(v.pack, v.views)[0][v.pairs]  # (16, 4)
    return torch.cat([scores[:1, :2], scores[:, 2:]])


WAYS = {
    "(a) one by one": (False, one_by_one),
    "(b) padded": (False, padded),
    "(c) packed": (True, packed),
}


def set_up(model, ours: bool) -> None:
    """The model as the stages use it, or as transformers has it."""
    if ours:
        prepare_for_packs(model)
    else:
        model.set_attn_implementation({"text_config": "sdpa", "vision_config": "sdpa"})
        model.visual.patch_embed.proj.__class__ = torch.nn.Conv3d


def run(way: str, discriminator, comparison, processor) -> tuple[float, torch.Tensor]:
    """Seconds for the scores of all views and the gradient of the loss; and the scores."""
    ours, function = WAYS[way]
    set_up(discriminator.model, ours)
    discriminator.zero_grad(set_to_none=True)
    start = time.perf_counter()
    scores = function(discriminator, comparison, processor)
    discriminator_loss(pairs_of(scores), ROLLOUTS).backward()
    return time.perf_counter() - start, scores.detach()


def timed(function, repeats: int = 9) -> float:
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def main() -> None:
    args = arguments(repeats=5)
    with tempfile.TemporaryDirectory() as folder:
        discriminator, processor = build(os.path.join(folder, "model"), args)
        comparison = make_comparison(processor)
    discriminator.train()
    lengths = [[len(view) for view in both] for both in views_of(processor, comparison)]
    means = [statistics.mean(column) for column in zip(*lengths)]
    image = int((comparison.prompt.input_ids == processor.image_token_id).sum())
    size = sum(p.numel() for p in discriminator.parameters()) / 1e6
    print(
        f"{size:.1f}M parameters, {torch.get_num_threads()} threads; "
        f"prompt {len(comparison.prompt.input_ids)} tokens ({image} of an image), "
        f"{2 * len(lengths)} views of {means[0]:.0f} (perception) and {means[1]:.0f} (reasoning) "
        f"tokens on average"
    )

    # The same scores and the same gradient; this is also the first, unmeasured turn of each.
    results = {}
    for way in WAYS:
        _, scores = run(way, discriminator, comparison, processor)
        grads = [p.grad.flatten() for p in discriminator.parameters() if p.grad is not None]
        results[way] = scores, torch.cat(grads)
    first, gradient = results["(a) one by one"]
    for way, (scores, other) in list(results.items())[1:]:
        apart = float((scores - first).abs().max())
        turned = float((other - gradient).norm() / gradient.norm())
        span = float(first.max() - first.min())
        print(
            f"{way} against (a): scores apart by at most {apart:.1e} (they span {span:.2f}), "
            f"gradient by {turned:.1e} of its norm"
        )
        assert apart < 1e-4 and turned < 1e-3

    prompt, views = comparison.prompt, encode_views(processor, comparison.teacher)
    set_up(discriminator.model, ours=False)
    with torch.no_grad():
        tower = timed(
            lambda: discriminator.model.visual(prompt.pixel_values, grid_thw=prompt.image_grid_thw)
        )
        whole = timed(lambda: plain(discriminator, prompt, [views[0]]))
        print(f"the image's share of a view's forward in (a): {tower / whole:.2f}")

    seconds = {way: [] for way in WAYS}
    for _ in range(args.repeats):
        for way in WAYS:
            seconds[way].append(run(way, discriminator, comparison, processor)[0])
    medians = {way: statistics.median(some) for way, some in seconds.items()}
    for way, some in seconds.items():
        low, high = min(some) * 1000, max(some) * 1000
        print(f"{way:15} {medians[way] * 1000:7.0f} ms   ({low:.0f} to {high:.0f})")
    print("ratio against (b)", ratio(seconds["(c) packed"], seconds["(b) padded"]))
    print("ratio", ratio(seconds["(c) packed"], seconds["(a) one by one"]))


if __name__ == "__main__":
    main()
