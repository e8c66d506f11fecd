"""What the pipeline does on one GPU, in one command of a few minutes: speed against the machine's
peak, seconds and memory of a step of each stage, parity with float32 on the CPU, and ratios. Two
tables at the end say how long the published stages take on eight GPUs: by support/fit.py's count
for an H100, and by the same count with the speeds that this GPU has reached.

    python benchmarks/gpu.py [--shapes 2B 4B]

Shapes are those of Qwen3-VL, weights are random. All runs as in the stages: FSDP2, float32
parameters with bfloat16 computations, activation checkpointing, ragged attention, CUDA graphs.
Where AdamW's moments do not fit beside the weights, plain SGD steps in its place, and the table
says so. On a CPU the same code runs at a tiny size: that finds typing errors, and its numbers mean
nothing. A part that fails is named, and the others go on.
"""

import argparse
import copy
import math
import random
import statistics
import sys
import tempfile
import time
import traceback
from pathlib import Path

import torch
from rollout import END, IMAGE, START, VIDEO, prompt, ratio, repeated
from transformers import AutoModelForImageTextToText, Qwen3VLConfig
from transformers.utils import logging
from views import WORDS

from align import AlignConfig
from data import Group, Response, make_packs, rank_packs
from discriminator import Comparison, Discriminator, DiscriminatorConfig, judge, upcycle
from model import prepare_for_packs, token_logprobs
from policy_gradient import Objective, group_advantage, policy_backward
from rlvr import RLVRConfig
from sampler import Sampling, generate
from sft import SFTConfig, sft_loss
from support import fit
from support.huggingface import load_processor
from support.optimizer import optimizer_step
from support.ranks import KEEP, join_ranks, shard
from support.tiny import Shape, build_model, train_tokenizer

VISION = dict(depth=24, hidden_size=1024, num_heads=16, intermediate_size=4096)
VISION |= dict(num_position_embeddings=2304, deepstack_visual_indexes=[5, 11, 17])
SMALL = dict(depth=2, hidden_size=64, num_heads=4, intermediate_size=128)
SMALL |= dict(num_position_embeddings=256, deepstack_visual_indexes=[0])
# hidden size, MLP, layers, heads, key-value heads, head dimension, vocabulary, vision tower
SHAPES = {
    "2B": (2048, 6144, 28, 16, 8, 128, 151_936, VISION),
    "4B": (2560, 9728, 36, 32, 8, 128, 151_936, VISION),
    "tiny": (64, 128, 2, 4, 2, 32, 2048, SMALL),
}
PROMPTS, PROMPT = 4, 302  # prompts a step, tokens of a prompt
ROLLOUTS = 16 if torch.cuda.is_available() else 4  # a prompt


def make(shape: str, device, seed: int = 0):
    """A policy of random weights, in float32, prepared for packs."""
    hidden, mlp, layers, heads, kv_heads, dim, vocab, vision = SHAPES[shape]
    rope = {"rope_type": "default", "rope_theta": 5e6, "mrope_interleaved": True}
    rope["mrope_section"] = [24, 20, 20] if dim == 128 else [8, 4, 4]
    text = dict(hidden_size=hidden, intermediate_size=mlp, num_hidden_layers=layers)
    text |= dict(num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=dim)
    text |= dict(vocab_size=vocab, tie_word_embeddings=True, rope_parameters=rope)
    ids = dict(image_token_id=IMAGE, video_token_id=VIDEO)
    ids |= dict(vision_start_token_id=START, vision_end_token_id=END)
    vision = dict(vision, out_hidden_size=hidden, patch_size=16, spatial_merge_size=2)
    config = Qwen3VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=True, **ids)
    torch.manual_seed(seed)
    with torch.device(device):
        policy = prepare_for_packs(AutoModelForImageTextToText.from_config(config))
    policy.stop_ids = torch.tensor([], dtype=torch.long)  # rows run to their limit
    return policy


def trained(module, device, beside=None):
    """As a stage has it: checkpointed, sharded, with an optimiser. `beside` is another module whose
    weights and gradients have to fit as well. -> (module, optimiser, name)"""
    flags = argparse.Namespace(activation_checkpointing=True)
    module = shard(module, device, flags).train()
    size = lambda part: sum(p.numel() for p in part.parameters()) if part else 0
    taken = 16 * size(module) + 8 * size(beside)
    if device.type == "cuda" and taken > 0.55 * torch.cuda.mem_get_info()[1]:
        return module, torch.optim.SGD(module.parameters(), lr=1e-6, foreach=True), "SGD"
    return module, torch.optim.AdamW(module.parameters(), lr=1e-6, fused=True), "AdamW"


class Clock:
    """Seconds and peak memory of what runs on a device."""

    def __init__(self, device):
        self.gpu = device.type == "cuda"

    def __call__(self, run, *args, **kwargs):
        if self.gpu:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        self.result = run(*args, **kwargs)
        if self.gpu:
            torch.cuda.synchronize()
        self.memory = torch.cuda.max_memory_allocated() / 2**30 if self.gpu else float("nan")
        return time.perf_counter() - start

    def median(self, run, repeats: int = 3) -> float:
        """Of some turns, after a first one that warms up."""
        return statistics.median([self(run) for _ in range(repeats + 1)][1:])


def say(*row) -> None:
    print("| " + " | ".join(f"{x:.3g}" if isinstance(x, float) else str(x) for x in row) + " |")
    sys.stdout.flush()


def machine(clock, device) -> tuple[float, float]:
    """Measured bf16 (on a CPU float32) arithmetic in FLOP/s, and copied bytes/s, read and
    written."""
    n, dtype = (8192, torch.bfloat16) if clock.gpu else (512, torch.float32)
    a, b = torch.randn(2, n, n, device=device).to(dtype)
    source = torch.zeros(2**30 if clock.gpu else 2**22, device=device)
    target = torch.empty_like(source)
    a @ b, target.copy_(source)
    flops = 2 * n**3 / clock.median(lambda: a @ b, 10)
    copied = 2 * source.nbytes / clock.median(lambda: target.copy_(source), 10)
    say("matrix product", f"{flops / 1e12:.0f} TFLOP/s")
    say("copy", f"{copied / 1e9:.0f} GB/s")
    return flops, copied


def demonstrations(tokens: int, vocab: int) -> list[Group]:
    """Prompts with an image and one response each, `tokens` tokens in all."""
    generator, groups = torch.Generator().manual_seed(0), []
    while tokens > PROMPT:
        length = min(tokens - PROMPT, int(torch.randint(200, 1500, (1,), generator=generator)))
        response = torch.randint(10, vocab, (length,), generator=generator)
        groups.append(Group(prompt(len(groups), PROMPT, vocab), [response]))
        tokens -= PROMPT + length
    return groups


def sft_step(shape, clock, device, peak) -> dict:
    """-> the arithmetic that a step reaches, for fit.Speed."""
    vocab = SHAPES[shape][6]
    policy = make(shape, device)
    size = fit.count(policy)
    policy, optimizer, name = trained(policy, device)
    (pack,) = make_packs(demonstrations(512 if shape == "tiny" else 16384, vocab))
    tokens, targets = pack.input_ids.numel(), len(pack.targets)
    pack = pack.to(device)

    def step():
        logp, _ = token_logprobs(policy, pack)
        sft_loss(logp, targets).backward()
        optimizer_step(policy, optimizer, 1e-6, 1.0)

    seconds = clock.median(step)
    squares = sum((s.prompt_length + sum(s.branch_lengths)) ** 2 for s in pack.segments)
    work = fit.operations(size, tokens, squares / 2, targets)
    share = f"{work / seconds / peak:.2f} of the peak"
    images = len(pack.segments) * 196 / tokens
    held = size.whole * (12 if name == "AdamW" else 4)
    total = torch.cuda.get_device_properties(device).total_memory if clock.gpu else 0
    moments = fit.training(size, 1, tokens, tokens, KEEP * total - held, True, images)
    count = held + max(sum(moment.values()) for moment in moments)
    memory = f"{clock.memory:.1f} GiB, {count / 2**30:.1f} by --dry_run"
    say(f"SFT step {shape}, {tokens} tokens, {name}", f"{seconds:.2f} s", share, memory)
    return {"flops": work / seconds}


def decode(shape, clock, device, copied) -> dict:
    """Milliseconds a token for all rows, by the difference of two lengths. -> the seconds that a
    kernel takes beside what must be read, of the most rows, for fit.Speed."""
    vocab = SHAPES[shape][6]
    policy = make(shape, device)
    size = fit.count(policy)
    policy = shard(policy, device)
    prompts = [prompt(i, PROMPT, vocab) for i in range(PROMPTS)]
    short, long = (4, 20) if shape == "tiny" else (64, 224)
    for rows in (8, 16) if shape == "tiny" else (16, 64):

        def run(limit, rows=rows):
            generate(policy, prompts, Sampling(rows // PROMPTS, limit, max_rollout_rows=rows))

        run(short)
        turns = [clock(run, long) - clock(run, short) for _ in range(3)]
        seconds = statistics.median(turns) / (long - short)
        # Beside the weights, the prompts' keys are read once, and the rows' own.
        read = fit.reading(size, PROMPTS * PROMPT + rows * (short + long) / 2)
        parts = fit.sampling(size, PROMPTS, PROMPT, rows, long)
        count = 4 * size.whole + sum(parts.values())
        say(
            f"decode {shape}, {rows} rows",
            f"{seconds * 1e3:.1f} ms a token",
            f"{read / seconds / copied:.2f} of the copy bandwidth",
            f"{clock.memory:.1f} GiB, {count / 2**30:.1f} by --dry_run",
        )
    # A step that only starts its kernels and reads nothing, at one second each, is their number.
    kernels = fit.decoding(size, 0, fit.Speed(bytes=math.inf, kernel=1))
    return {"kernel": max(0.0, seconds - read / copied) / kernels}


def words(rng: random.Random, count: int) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(count))


def comparisons(vocab: int, views: int = 60) -> list[Comparison]:
    """Prompts with a supervision response and rollouts of random words."""
    rng = random.Random(0)

    def response():
        return Response(words(rng, views), words(rng, 2 * views), words(rng, 2))

    return [
        Comparison(prompt(i, PROMPT, vocab), response(), [response() for _ in range(ROLLOUTS)])
        for i in range(PROMPTS)
    ]


def rl_step(shape, clock, device, processor, judged_by=None) -> None:
    """A step of stage 3 or, with the shape of a discriminator, of stage 2."""
    vocab, limit = SHAPES[shape][6], 8 if shape == "tiny" else 256
    parts, peaks, judging = {}, [], None
    if judged_by:
        backbone = make(judged_by, device, seed=1).base_model
        upcycle(backbone.language_model.layers, torch.Generator())
        with torch.device(device):
            judging = Discriminator(backbone, "learned")
    policy, optimizer, name = trained(make(shape, device), device, beside=judging)
    if judged_by:
        found = trained(judging, device, beside=policy)
        discriminator, d_optimizer, name = *found[:2], f"{name}, {found[2]}"
    batch = comparisons(vocab)
    for repeat in range(2):  # the first warms up
        prompts = [c.prompt for c in batch]
        sampling = Sampling(ROLLOUTS, limit)
        parts["rollout"] = clock(generate, policy, prompts, sampling, step=repeat)
        groups, memory = clock.result, [clock.memory]
        if judged_by:

            def play():
                judge(discriminator, batch, processor, 16384, backward=True)
                optimizer_step(discriminator, d_optimizer, 1e-6, 1.0)

            parts["judge"] = clock(play)
            memory.append(clock.memory)
        rewards = torch.rand(PROMPTS, ROLLOUTS, generator=torch.Generator().manual_seed(0))
        advantage = group_advantage(rewards)

        def update(groups=groups, advantage=advantage):
            packs = rank_packs(groups, processor, 16384)
            policy_backward(policy, packs, groups, advantage, Objective("grpo", 0.2, 0.2))
            optimizer_step(policy, optimizer, 1e-6, 1.0)

        parts["update"] = clock(update)
        peaks = [*memory, clock.memory]
    stage = f"alignment step, {shape} and {judged_by} x 4" if judged_by else f"RLVR step, {shape}"
    shown = ", ".join(f"{k} {v:.2f} s" for k, v in parts.items())
    say(f"{stage}, {PROMPTS} x {ROLLOUTS} rows of {limit}, {name}", shown, f"{max(peaks):.1f} GiB")


def parity(clock, device, processor) -> None:
    """The same weights on the device and, in float32, on the CPU: the mean difference."""
    on_cpu = make("tiny", "cpu").eval()
    policy = shard(copy.deepcopy(on_cpu).to(device), device)
    prompts = [prompt(i, PROMPT) for i in range(2)]
    groups = generate(policy, prompts, Sampling(4, 40))
    (pack,) = make_packs(groups)
    sampled = torch.cat([groups[g].logprobs[i] for g, i in pack.members])
    with torch.no_grad():
        there = token_logprobs(policy, pack.to(device))[0].cpu()
        here = token_logprobs(on_cpu, pack)[0]
    say("packs against float32 on the CPU", (there - here).abs().mean().item())
    say("sampled against float32 on the CPU", (sampled - here).abs().mean().item())
    backbone = on_cpu.base_model
    upcycle(backbone.language_model.layers, torch.Generator())
    judges = [Discriminator(backbone, "learned", 0.0)]
    judges.append(shard(copy.deepcopy(judges[0]).to(device), device))
    some = comparisons(2048, 8)[:1]
    here, there = (judge(d, some, processor, 16384, backward=False) for d in judges)
    gaps = [
        (getattr(here, n) - getattr(there, n)).abs().mean() for n in ("perception", "reasoning")
    ]
    say("scores against float32 on the CPU", max(gaps).item())


def ratios(shape, clock, device, processor) -> None:
    """Packs against the prompt repeated for every branch, and `generate` against transformers'."""
    vocab, limit = SHAPES[shape][6], 6 if shape == "tiny" else 128
    policy = make(shape, device)
    plain = copy.deepcopy(policy)
    plain.set_attn_implementation("sdpa")
    if clock.gpu:
        policy, plain = policy.bfloat16(), plain.bfloat16()
    some = [prompt(i, PROMPT, vocab) for i in range(PROMPTS)]
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(10, vocab, (92,), generator=generator) for _ in range(ROLLOUTS)]

    def update(groups):
        for pack in make_packs(groups, 16384):
            pack = pack.to(device)
            if clock.gpu:
                pack.pixel_values = pack.pixel_values.bfloat16()
            token_logprobs(policy, pack)[0].mean().backward()
        policy.zero_grad()

    def theirs():
        inputs = {k: v.to(device) for k, v in repeated(some, ROLLOUTS).items()}
        inputs["pixel_values"] = inputs["pixel_values"].to(plain.dtype)
        limits = dict(max_new_tokens=limit, min_new_tokens=limit, top_k=0, top_p=1.0)
        plain.generate(**inputs, do_sample=True, pad_token_id=0, **limits)

    def ours():
        generate(policy, some, Sampling(ROLLOUTS, limit))

    sides = {
        "update, packs over repeated prompts, 302 + 92 tokens a row": (
            lambda: update([Group(some[0], rows)]),
            lambda: update([Group(some[0], [row]) for row in rows]),
        ),
        f"rollout, ours over generate of transformers, {limit} tokens a row": (ours, theirs),
    }
    for name, pair in sides.items():
        for side in pair:
            side()
        seconds = [[clock(side) for side in pair] for _ in range(3)]
        say(name, "ratio " + ratio(*zip(*seconds)))


def stages(folders: dict, size: str, backbone: str) -> dict:
    """Name -> the published settings of each stage, for a policy of this size and a discriminator
    with this backbone. `folders`: size -> a directory with the model's config.json."""
    policy = folders[size]
    return {
        f"sft {size}": SFTConfig(model=policy),
        f"warm-up {backbone} x 4": DiscriminatorConfig(model=folders[backbone]),
        f"align {size}": AlignConfig(ckpt=policy, discriminator=folders[backbone]),
        f"rlvr {size}, grpo": RLVRConfig(ckpt=policy),
        f"rlvr {size}, dapo": RLVRConfig(ckpt=policy, algorithm="dapo"),
    }


def main() -> None:
    logging.disable_progress_bar()
    parser = argparse.ArgumentParser()
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=None)
    args = parser.parse_args()
    device = join_ranks()
    clock = Clock(device)
    name = torch.cuda.get_device_name() if clock.gpu else "CPU, a tiny size: numbers mean nothing"
    print(f"{name}, torch {torch.__version__}\n")
    say("what", "measured", "", "")
    say("---", "---", "---", "---")
    shapes = args.shapes or (["2B", "4B"] if clock.gpu else ["tiny"])
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = train_tokenizer([words(random.Random(i), 40) for i in range(50)], 200)
        build_model(Path(folder), tokenizer, Shape())
        processor = load_processor(folder)
    peak, copied = machine(clock, device)
    small, large = shapes[0], shapes[-1]
    parts = [lambda: parity(clock, device, processor)]
    for shape in dict.fromkeys((small, large)):
        parts.append(lambda shape=shape: sft_step(shape, clock, device, peak))
        parts.append(lambda shape=shape: decode(shape, clock, device, copied))
        parts.append(lambda shape=shape: rl_step(shape, clock, device, processor))
    parts.append(lambda: rl_step(small, clock, device, processor, judged_by=small))
    parts.append(lambda: ratios(small, clock, device, processor))
    failed, reached = 0, dict(flops=math.nan, bytes=copied, kernel=math.nan)
    for part in parts:
        try:
            reached |= part() or {}
        except Exception:
            failed += 1
            say("failed", traceback.format_exc().strip().replace("\n", " / ")[-700:])
        if clock.gpu:
            torch.cuda.empty_cache()
    with tempfile.TemporaryDirectory() as folder:
        folders = {shape: f"{folder}/{shape}" for shape in (small, large)}
        for shape, path in folders.items():
            make(shape, "meta").config.save_pretrained(path)
        configs = stages(folders, large, small)
        print("\nPublished stages by count, for H100s:\n" + fit.hours(configs, 8, fit.Speed()))
        print("\nThe same, measured: with the speeds of the parts above:")
        print(fit.hours(configs, 8, fit.Speed(**reached)))
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
