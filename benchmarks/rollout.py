"""Sampling: `sampler.generate` against Hugging Face `generate` with the inputs repeated, the way
TRL samples without vLLM.

4 prompts of about 300 tokens with an image, 16 rows each. The model has random weights. A handful
of its tokens end a response, as many as make lengths ragged with mean about 92 (geometric), cut at
256. Transformers' rows are stopped where ours ended, so that both sides sample the same lengths.
The two sides alternate, three repeats. The last line is the median of the ratios.

    python benchmarks/rollout.py [--hidden_size 256 --layers 4]
"""

import argparse
import copy
import statistics
import sys
import time
from pathlib import Path

import torch
from transformers import AutoModelForImageTextToText, Qwen3VLConfig

# The other benchmarks import this file first: by this line they find the repository's modules too.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data import Prompt, mrope_positions
from model import prepare_for_packs
from sampler import Sampling, generate

IMAGE, VIDEO, START, END = 1, 2, 3, 4  # token ids of the made-up vocabulary
PATCH, MERGE = 16, 2


def build(hidden_size: int, layers: int, vocab_size: int = 2048, experts: int = 0):
    """A random Qwen3-VL, once for our sampler and once, with the same weights, as transformers has
    it."""
    text = dict(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=4 * hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=hidden_size // 32,
        num_key_value_heads=hidden_size // 64,
        head_dim=32,
        initializer_range=0.02,
        tie_word_embeddings=True,
        max_position_embeddings=8192,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": 1e4,
            "mrope_interleaved": True,
            "mrope_section": [8, 4, 4],
        },
    )
    vision = dict(
        depth=2,
        hidden_size=128,
        num_heads=4,
        intermediate_size=256,
        patch_size=PATCH,
        spatial_merge_size=MERGE,
        out_hidden_size=hidden_size,
        num_position_embeddings=256,
        deepstack_visual_indexes=[0],
    )
    config = Qwen3VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=START,
        vision_end_token_id=END,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    theirs = AutoModelForImageTextToText.from_config(config).eval()
    ours = AutoModelForImageTextToText.from_config(copy.deepcopy(config)).eval()
    ours.load_state_dict(theirs.state_dict())
    return prepare_for_packs(ours), theirs


def prompt(index: int, tokens: int, vocab_size: int = 2048, side: int = 14) -> Prompt:
    """A prompt of `tokens` tokens, side * side of them an image's."""
    generator = torch.Generator().manual_seed(index)
    words = torch.randint(10, vocab_size, (tokens - side * side - 2,), generator=generator)
    ids = torch.cat(
        [
            words[:20],
            torch.tensor([START]),
            torch.full((side * side,), IMAGE),
            torch.tensor([END]),
            words[20:],
        ]
    )
    grid = torch.tensor([[1, side * MERGE, side * MERGE]])
    pixels = torch.randn(int(grid.prod()), 3 * 2 * PATCH * PATCH, generator=generator)
    return Prompt(index, ids, mrope_positions(ids, grid, IMAGE, MERGE), pixels, grid)


def repeated(prompts: list[Prompt], times: int, image: int = IMAGE) -> dict:
    """Prompts of one length as transformers takes them, each row repeated, its image too."""
    ids = torch.stack([p.input_ids for p in prompts for _ in range(times)])
    return dict(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        mm_token_type_ids=(ids == image).int(),
        pixel_values=torch.cat([p.pixel_values for p in prompts for _ in range(times)]),
        image_grid_thw=torch.cat([p.image_grid_thw for p in prompts for _ in range(times)]),
    )


def arguments(repeats: int = 3) -> argparse.Namespace:
    """The size of the made-up model, and how often each side is timed."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--hidden_size", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=repeats)
    return parser.parse_args()


def ratio(ours: list[float], theirs: list[float]) -> str:
    """What the usual way takes over what ours takes, turn by turn: the median, and the smallest and
    largest beside it."""
    turns = [b / a for a, b in zip(ours, theirs)]
    return f"{statistics.median(turns):.2f}   (min {min(turns):.2f}, max {max(turns):.2f})"


def main() -> None:
    args = arguments()
    ours, theirs = build(args.hidden_size, args.layers)
    prompts = [prompt(i, 302) for i in range(4)]
    ends = list(range(100, 100 + 2048 // 92))  # random weights: about 1/2048 each
    ours.stop_ids = torch.tensor(ends)
    size = sum(p.numel() for p in theirs.parameters()) / 1e6
    print(f"{size:.1f}M parameters, 4 prompts of 302 tokens x 16 rollouts")

    @torch.no_grad()
    def hugging_face(seed, lengths):
        torch.manual_seed(seed)
        theirs.generate(
            **repeated(prompts, 16),
            do_sample=True,
            top_k=0,
            top_p=1.0,
            max_new_tokens=256,
            pad_token_id=0,
            stopping_criteria=[lambda ids, scores: ids.shape[1] - 302 >= lengths],
        )

    seconds = {"ours": [], "Hugging Face": []}
    for repeat in range(args.repeats + 1):  # the first warms up
        times = [time.perf_counter()]
        groups = generate(ours, prompts, Sampling(16, 256, seed=repeat))
        times.append(time.perf_counter())
        lengths = torch.tensor([len(branch) for group in groups for branch in group.branches])
        hugging_face(repeat, lengths)
        times.append(time.perf_counter())
        if repeat:
            for name, start, end in zip(seconds, times, times[1:]):
                seconds[name].append(end - start)
            print(
                f"{int(lengths.sum())} tokens:",
                ", ".join(f"{name} {some[-1]:.2f} s" for name, some in seconds.items()),
                flush=True,
            )
    print("ratio", ratio(*seconds.values()))


if __name__ == "__main__":
    main()
