"""A tiny Qwen3-VL from nothing: its tokenizer, its processor and random weights, in a complete
Hugging Face directory that has the files of the published ones. The embedded world and the tests
begin with it. Nothing is downloaded.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, trainers
from transformers import (
    GenerationConfig,
    PreTrainedTokenizerFast,
    Qwen2Tokenizer,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

from support.fields import Count, Natural, NonNegative


@dataclass
class Shape:
    # The model and its tokenizer (0.36M parameters)
    merges: Natural = 224  # most merges of the byte-level BPE, on top of 256 bytes
    hidden_size: Count = 64  # width of the language model
    intermediate_size: Count = 128  # width of its MLPs
    layers: Count = 2  # layers of the language model
    heads: Count = 4  # query heads of a layer, also in the vision tower
    kv_heads: Count = 2  # key-value heads of a layer
    head_dim: Count = 16  # width of a head
    vision_hidden_size: Count = 64  # width of the vision tower
    vision_intermediate_size: Count = 128  # width of its MLPs
    vision_layers: Count = 2  # layers of the vision tower
    initializer_range: NonNegative = 0.06  # std of the first weights; 0.02 learns late at this size


# A digit, 8 x 8 pixels shown at 16 x 16, is 2 x 2 patches: one token of the language model.
PATCH, MERGE = 8, 2

# Qwen3-VL's added tokens in their order. Those of the second list are not "special": decoding never
# drops them.
CONTROL_TOKENS = """<|endoftext|> <|im_start|> <|im_end|> <|object_ref_start|> <|object_ref_end|>
    <|box_start|> <|box_end|> <|quad_start|> <|quad_end|> <|vision_start|> <|vision_end|>
    <|vision_pad|> <|image_pad|> <|video_pad|>""".split()
PLAIN_TOKENS = """<tool_call> </tool_call> <|fim_prefix|> <|fim_middle|> <|fim_suffix|> <|fim_pad|>
    <|repo_name|> <|file_sep|> <tool_response> </tool_response> <think> </think>""".split()
CHAT_TEMPLATE = r"""
{%- for message in messages %}
    {{- "<|im_start|>" + message.role + "\n" }}
    {%- if message.content is string %}
        {{- message.content }}
    {%- else %}
        {%- for item in message.content %}
            {%- if item.type == "image" %}
                {{- "<|vision_start|><|image_pad|><|vision_end|>" }}
            {%- elif item.type == "text" %}
                {{- item.text }}
            {%- endif %}
        {%- endfor %}
    {%- endif %}
    {{- "<|im_end|>\n" }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- "<|im_start|>assistant\n" }}
{%- endif %}
"""


def train_tokenizer(texts: list[str], merges: int) -> PreTrainedTokenizerFast:
    """Qwen's byte-level BPE (digits one by one) on `texts`, and Qwen3-VL's added tokens."""
    qwen = Qwen2Tokenizer().backend_tokenizer
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = qwen.pre_tokenizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=len(alphabet) + merges, initial_alphabet=alphabet, show_progress=False
    )
    # Added tokens never reach the BPE, and the roles of the template are in no row.
    pieces = [piece for text in texts for piece in re.split("</?think>", text)]
    bpe.train_from_iterator(pieces + ["system\nuser\nassistant\n"] * len(texts), trainer)
    trained = json.loads(bpe.to_str())["model"]
    added = [AddedToken(token, special=True, normalized=False) for token in CONTROL_TOKENS]
    added += [AddedToken(token, special=False, normalized=False) for token in PLAIN_TOKENS]
    qwen = Qwen2Tokenizer(
        vocab=trained["vocab"],
        merges=[tuple(merge) for merge in trained["merges"]],
        added_tokens_decoder={len(trained["vocab"]) + i: token for i, token in enumerate(added)},
    ).backend_tokenizer
    qwen.normalizer = None  # Qwen's composes characters, so decomposed text would not come back
    return PreTrainedTokenizerFast(
        tokenizer_object=qwen,
        extra_special_tokens=CONTROL_TOKENS[1:],
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        clean_up_tokenization_spaces=False,
        model_max_length=4096,
    )


def build_model(
    path: Path, tokenizer: PreTrainedTokenizerFast, shape: Shape, seed: int = 0
) -> None:
    """A complete Hugging Face directory: random weights, configuration, generation defaults,
    processor."""
    token = tokenizer.convert_tokens_to_ids
    end, pad = token("<|im_end|>"), token("<|endoftext|>")
    # Rotary pairs for height and for width, the rest of head_dim / 2 for time.
    rotary = shape.head_dim // 8
    config = Qwen3VLConfig(
        text_config=dict(
            vocab_size=len(tokenizer),
            hidden_size=shape.hidden_size,
            intermediate_size=shape.intermediate_size,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.kv_heads,
            head_dim=shape.head_dim,
            initializer_range=shape.initializer_range,
            max_position_embeddings=4096,
            tie_word_embeddings=True,
            eos_token_id=end,
            bos_token_id=pad,
            pad_token_id=pad,
            rope_parameters={
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_interleaved": True,
                "mrope_section": [shape.head_dim // 2 - 2 * rotary, rotary, rotary],
            },
        ),
        vision_config=dict(
            depth=shape.vision_layers,
            hidden_size=shape.vision_hidden_size,
            num_heads=shape.heads,
            intermediate_size=shape.vision_intermediate_size,
            patch_size=PATCH,
            spatial_merge_size=MERGE,
            out_hidden_size=shape.hidden_size,
            num_position_embeddings=64,
            deepstack_visual_indexes=[0],
            initializer_range=shape.initializer_range,
        ),
        image_token_id=token("<|image_pad|>"),
        video_token_id=token("<|video_pad|>"),
        vision_start_token_id=token("<|vision_start|>"),
        vision_end_token_id=token("<|vision_end|>"),
        tie_word_embeddings=True,
        embedded_world="digits",  # so that its settings are taken for no other model
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen3VLForConditionalGeneration(config)
    # Greedy, nothing filtered; the published models have top_k 20, top_p 0.8, temperature 0.7.
    model.generation_config = GenerationConfig(
        eos_token_id=[end, pad], pad_token_id=pad, bos_token_id=pad
    )
    model.save_pretrained(path)
    # safetensors would keep the weights to their owner.
    (path / "model.safetensors").chmod((path / "config.json").stat().st_mode)
    # Rotary settings as the published files have them: older versions read no other names.
    config = json.loads((path / "config.json").read_text())
    rope = config["text_config"].pop("rope_parameters")
    config["text_config"] |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope}
    (path / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    image = {
        # Pixel counts, not edges.
        "size": {"longest_edge": 65536, "shortest_edge": (PATCH * MERGE) ** 2},
        "patch_size": PATCH,
        "temporal_patch_size": 2,
        "merge_size": MERGE,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    }
    write_processor(path, tokenizer, image, CHAT_TEMPLATE)


def write_processor(path: Path, tokenizer, image: dict, chat_template: str) -> None:
    """Writes a processor from its parts, in the layout of the published Qwen3-VL directories."""
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    vocab = dict(sorted(backend["model"]["vocab"].items(), key=lambda item: item[1]))
    added = {str(i): t.__getstate__() for i, t in sorted(tokenizer.added_tokens_decoder.items())}
    special = [token["content"] for token in added.values() if token["special"]]
    qwen = {"processor_class": "Qwen3VLProcessor"}
    shared = ("patch_size", "temporal_patch_size", "merge_size", "image_mean", "image_std")
    video = {key: image[key] for key in shared} | {
        "size": {"longest_edge": 25165824, "shortest_edge": 4096},  # pixels of a clip, as published
        "video_processor_type": "Qwen3VLVideoProcessor",
    }
    tokenizer_config = {
        "add_bos_token": False,
        "add_prefix_space": False,
        "added_tokens_decoder": added,
        "additional_special_tokens": [token for token in special if token != tokenizer.pad_token],
        "bos_token": None,
        "chat_template": chat_template,
        "clean_up_tokenization_spaces": False,
        "eos_token": tokenizer.eos_token,
        "errors": "replace",
        "model_max_length": tokenizer.model_max_length,
        "pad_token": tokenizer.pad_token,
        "split_special_tokens": False,
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": None,
    }
    files = {
        # The name of the plain class serves every version of transformers.
        "preprocessor_config.json": image
        | {"image_processor_type": "Qwen2VLImageProcessor"}
        | qwen,
        "video_preprocessor_config.json": video | qwen,
        "tokenizer.json": backend,
        "tokenizer_config.json": tokenizer_config,
        "vocab.json": vocab,
        "chat_template.json": {"chat_template": chat_template},
    }
    for name, content in files.items():
        text = json.dumps(content, indent=2, ensure_ascii=False)
        (path / name).write_text(text + "\n", encoding="utf-8")
    merges = (m if isinstance(m, str) else " ".join(m) for m in backend["model"]["merges"])
    lines = "\n".join(["#version: 0.2", *merges, ""])
    (path / "merges.txt").write_text(lines, encoding="utf-8")
