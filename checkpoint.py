"""Hugging Face directories in and out: the weights of a model and the files of its processor. What
the method computes does not depend on this room.
"""

import os
import re
from glob import glob
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from safetensors import safe_open
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, ProcessorMixin
from transformers import Qwen3VLProcessor

from model import adapt, barrier, rank, recompute
from rows import UserError

# --------------------------------------------------------------------------------------------------
# Loading


def load_policy(flag: str, path: str, activation_checkpointing: bool = False):
    """-> (policy, processor), in float32. The policy is adapted to packs and carries `stop_ids`,
    which end a response. UserError, which names `flag`, where it cannot be loaded."""
    config = read_config(flag, path)
    if hasattr(config, "prism_experts"):
        raise UserError(f"{flag} {path}: a discriminator, without a language head; name a policy")
    policy, processor = load_pretrained(flag, path)
    adapt(policy, f"{flag} {path}")
    ends = policy.generation_config.eos_token_id
    ends = {processor.tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])}
    policy.stop_ids = torch.tensor(sorted(end for end in ends if end is not None))
    if activation_checkpointing:
        recompute(policy)
    return policy, processor


def read_config(flag: str, path: str):
    """The configuration of a Hugging Face directory or hub id, or UserError."""
    if os.path.exists(path) and not os.path.isfile(os.path.join(path, "config.json")):
        raise UserError(
            f"{flag} {path}: no config.json in it; give a Hugging Face model directory or a hub id"
        )
    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=False)
    except Exception as error:
        raise UserError(
            f"{flag} {path}: neither a Hugging Face directory nor a hub id that can be loaded "
            f"({str(error).strip().splitlines()[0][:150]})"
        ) from None


def load_pretrained(flag: str, path: str, unused: str = "$^"):
    """-> (model, processor) as transformers loads them. UserError where the weights are not the
    model's: transformers would draw what is missing at random. `unused`: a pattern of names that
    may be left over or missing."""
    try:
        flags = dict(output_loading_info=True, ignore_mismatched_sizes=True)  # refused below
        flags |= dict(dtype=torch.float32, trust_remote_code=False)
        model, found = AutoModelForImageTextToText.from_pretrained(path, **flags)
        processor = load_processor(path)
    except Exception as error:
        raise UserError(
            f"{flag} {path}: cannot be loaded as a vision-language model with its processor "
            f"({str(error).strip().splitlines()[0][:150]})"
        ) from None
    missing, unexpected = (
        sorted(k for k in found[kind] if not re.search(unused, k))
        for kind in ("missing_keys", "unexpected_keys")
    )
    missing += sorted(str(key) for key in found["mismatched_keys"])
    if missing or unexpected:
        raise UserError(
            f"{flag} {path}: weights that do not match the model, {len(missing)} missing "
            f"({', '.join(missing[:3])}), {len(unexpected)} unexpected "
            f"({', '.join(unexpected[:3])}); rename them as {type(model).__name__} does"
        )
    return model, processor


def read_tensors(path: str, pattern: str) -> dict[str, torch.Tensor]:
    """The tensors in the safetensors of a directory or hub id whose names match."""
    if not os.path.isdir(path):
        path = snapshot_download(path, allow_patterns=["*.safetensors"])
    found = {}
    for name in sorted(glob(os.path.join(path, "*.safetensors"))):
        with safe_open(name, "pt") as file:
            found |= {k: file.get_tensor(k) for k in file.keys() if re.search(pattern, k)}
    return found


# --------------------------------------------------------------------------------------------------
# Saving


def full_state(module) -> dict[str, torch.Tensor]:
    """The whole weights on the CPU of rank 0 (empty elsewhere)."""
    whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return get_model_state_dict(module, options=whole)


def save_policy(policy, processor, path: str) -> None:
    """A Hugging Face directory: weights, config, generation config, processor, chat template.
    Every rank calls it."""
    state = full_state(policy)
    if rank() == 0:
        if policy.lm_head.weight is policy.get_input_embeddings().weight:
            state.pop("lm_head.weight", None)
        policy.save_pretrained(path, state_dict=state)
        save_processor(processor, path)
    barrier()


# --------------------------------------------------------------------------------------------------
# The processor: tokenizer, image processor, chat template
#
# transformers opens a Qwen3-VL processor only where torchvision is installed, because it insists on
# a video processor. Without torchvision AutoProcessor returns a bare tokenizer and says nothing.
# PRISM needs no video, so the same processor is built here without that part.

# All that a published directory may hold of a processor.
PROCESSOR_FILES = """preprocessor_config.json video_preprocessor_config.json processor_config.json
    tokenizer.json tokenizer_config.json vocab.json merges.txt special_tokens_map.json
    added_tokens.json chat_template.json chat_template.jinja tokenizer.model""".split()


class ImageTextProcessor(Qwen3VLProcessor):
    """Qwen3VLProcessor without its video processor: transformers reads the parts that it requires
    off this signature."""

    def __init__(self, image_processor=None, tokenizer=None, chat_template=None, **kwargs):
        super().__init__(image_processor, tokenizer, None, chat_template=chat_template, **kwargs)


def load_processor(path: str | Path):
    """The processor of a directory or hub id."""
    folder = Path(path)
    if not folder.is_dir():
        wanted = [*PROCESSOR_FILES, "config.json"]
        folder = Path(snapshot_download(str(path), allow_patterns=wanted))
    try:
        processor = AutoProcessor.from_pretrained(folder, trust_remote_code=False)
    except ImportError:  # the video processor wants torchvision
        processor = None
    # Without torchvision the processor may also be passed over, and a bare tokenizer comes back.
    if not isinstance(processor, ProcessorMixin):
        processor = ImageTextProcessor.from_pretrained(folder)
    if processor.chat_template is None:  # it may stand in tokenizer_config.json only
        processor.chat_template = processor.tokenizer.chat_template
    names = [name for name in PROCESSOR_FILES if (folder / name).is_file()]
    processor.files = {name: (folder / name).read_bytes() for name in names}
    return processor


def save_processor(processor, path: str | Path) -> None:
    """Writes the files that the processor was loaded from, byte for byte."""
    Path(path).mkdir(parents=True, exist_ok=True)
    for name, content in processor.files.items():
        (Path(path) / name).write_bytes(content)
