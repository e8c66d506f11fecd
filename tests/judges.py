"""A tiny discriminator, prompts and responses for it, and its hidden states in two ways: this
project's forward of packs, and transformers' forward of one sequence."""

import io

import numpy as np
import torch
from PIL import Image
from transformers import Qwen3VLForConditionalGeneration

from data import Response, encode_prompts
from discriminator import Comparison, load_discriminator
from model import PackAttention
from support.rows import Example
from support.tiny import Shape, build_model, train_tokenizer

TEXT = (
    "<caption>From left to right: 1, 2 and 3.</caption> <think>1 + 2 = 3.</think> "
    "<answer>A</answer> What is the sum?"
)
TEACHER = Response(
    "From left to right the digits are 1, 2 and 3.",
    "1 + 2 = 3, 3 + 3 = 6. So the answer is 6.",
    "6",
)


def dense_model(path) -> str:
    """A tiny dense Qwen3-VL directory, every parameter random."""
    shape = Shape(hidden_size=48, intermediate_size=80, head_dim=16, layers=2, vision_layers=2)
    build_model(path, train_tokenizer([TEXT] * 3, 20), shape)
    model = Qwen3VLForConditionalGeneration.from_pretrained(path)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(path)
    return str(path)


def randomised(dense: str, kind: str = "learned", dropout=0.0, seed=2, mlps=0.3, head=0.1):
    """An upcycled discriminator whose experts, routers and heads are really different from one
    another. `mlps` and `head`: the std of what is added to them."""
    discriminator, processor = load_discriminator(dense, kind, dropout)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in discriminator.named_parameters():
            in_mlp = ".mlp." in name and "language_model" in name
            std = mlps if in_mlp else head if name == "score.weight" else 0.0
            parameter.add_(std * torch.randn(parameter.shape, generator=generator))
    return discriminator, processor


def example(index: int, images: int) -> Example:
    pictures, content = [], []
    for i in range(images):
        noise = np.random.default_rng(10 * index + i).integers(
            0, 255, (16 * (i + 1), 48, 3), dtype=np.uint8
        )
        buffer = io.BytesIO()
        Image.fromarray(noise).save(buffer, "PNG")
        pictures.append(buffer.getvalue())
        content += [{"type": "image"}, {"type": "text", "text": f"No {i}. "}]
    content.append({"type": "text", "text": "What is the sum?"})
    return Example(index, f"row {index}", [{"role": "user", "content": content}], pictures)


def comparisons(processor) -> list[Comparison]:
    """Prompts with one image, with none and with two; a student like the teacher in one view and in
    both; invalid ones."""
    prompts = encode_prompts(processor, [example(0, 1), example(1, 0), example(2, 2)])
    other = Response("Digits 7, 2 and 8.", "7 + 2 + 8 = 17.", "17")
    terse = Response("x", "y", "z")
    half = Response(TEACHER.caption, other.think, other.answer)
    return [
        Comparison(prompts[0], TEACHER, [other, None, half, terse]),
        Comparison(prompts[1], other, [TEACHER, other]),
        Comparison(prompts[2], TEACHER, [None, terse]),
    ]


def sides(judged) -> tuple[torch.Tensor, torch.Tensor]:
    """(P, N, 2) twice: perception and reasoning scores of the supervision, and of the students."""
    teacher = judged.teacher_perception, judged.teacher_reasoning
    return torch.stack(teacher, -1), torch.stack([judged.perception, judged.reasoning], -1)


def their_hidden(model, prompt, branch, processor):
    """(T, h) of one plain sequence by transformers: its attention, its positions, its experts."""
    ids = torch.cat([prompt.input_ids, branch])[None]
    pixels = None if prompt.pixel_values is None else prompt.pixel_values.to(model.dtype)
    return model.model(
        input_ids=ids,
        pixel_values=pixels,
        image_grid_thw=prompt.image_grid_thw,
        use_cache=False,
        mm_token_type_ids=(ids == processor.image_token_id).int(),
        attention_mask=torch.ones_like(ids),
    ).last_hidden_state[0]


def our_hidden(discriminator, pack):
    out = discriminator.model(
        input_ids=pack.input_ids,
        position_ids=pack.position_ids,
        pixel_values=pack.pixel_values,
        image_grid_thw=pack.image_grid_thw,
        use_cache=False,
        layout=PackAttention(pack),
    )
    return out.last_hidden_state[0]
