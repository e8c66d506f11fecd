"""Hugging Face directories in and out: the weights of a model and the files of its processor. What
the method computes does not depend on this room.

A policy is built without weights and sharded, then each rank reads its shard of the files. That
goes where their names and shapes are the module's own, as Qwen3-VL's are. Other models, which
transformers renames or turns while it reads them, are loaded whole by every rank, and then sharded.
"""

import json
import os
import re
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from huggingface_hub import snapshot_download, split_torch_state_dict_into_shards
from safetensors import safe_open
from safetensors.torch import save_file
from torch.distributed.checkpoint import HuggingFaceStorageReader
from torch.distributed.tensor import DTensor
from torch.nn.modules.module import register_module_parameter_registration_hook
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, GenerationConfig
from transformers import ProcessorMixin, Qwen3VLProcessor

from model import adapt, barrier, rank, shard
from rows import UserError

CPU = torch.device("cpu")

# --------------------------------------------------------------------------------------------------
# Loading


def load_policy(flag: str, path: str, device=CPU, config=None):
    """-> (policy, processor), in float32, sharded as the flags in `config` say (`model.shard`). The
    policy is adapted to packs and carries `stop_ids`, which end a response. UserError, which names
    `flag`, where it cannot be loaded."""
    its_config = read_config(flag, path)
    if hasattr(its_config, "prism_experts"):
        raise UserError(f"{flag} {path}: a discriminator, without a language head; name a policy")
    policy, processor = load_pretrained(flag, path, its_config, hollow=True)
    adapt(policy, f"{flag} {path}")
    ends = policy.generation_config.eos_token_id
    ends = {processor.tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])}
    policy.stop_ids = torch.tensor(sorted(end for end in ends if end is not None))
    if getattr(config, "lora_rank", 0):
        torch.manual_seed(config.seed)  # the adapters of every rank are the same
        add_adapters(policy, config.lora_rank)
    return _fill(shard(policy, device, config), path, device), processor


def add_adapters(policy, lora_rank: int) -> None:
    """To every linear layer W of the language model, B A is added by peft, times 2; nothing else
    learns. B is 0 at the start, so an untrained policy, as the reference of RLVR, is as it was."""
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        raise UserError("--lora_rank: needs `peft`; pip install peft") from None
    lora = LoraConfig(r=lora_rank, lora_alpha=2 * lora_rank, target_modules="all-linear")
    policy.requires_grad_(False)
    inject_adapter_in_model(lora, policy.get_decoder())
    for layer in policy.modules():
        if hasattr(layer, "reset_lora_parameters"):  # peft puts A and B where W is
            layer.lora_A.to_empty(device=CPU), layer.lora_B.to_empty(device=CPU)  # not hollow
            layer.reset_lora_parameters("default", init_lora_weights=True)


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


def load_pretrained(flag: str, path: str, config, unused: str = "$^", hollow: bool = False):
    """-> (model, processor). UserError where the weights are not the model's: transformers would
    draw what is missing at random. `unused`: a pattern of names that may be left over or missing.
    `hollow`: without weights, where `_fill` can read them later."""
    found = dict.fromkeys(("missing_keys", "unexpected_keys", "mismatched_keys"), ())
    saved_as = config.dtype or config.get_text_config().dtype or torch.float32
    try:
        processor = load_processor(path)
        model = _hollow(config, path) if hollow else None
        if model is None:
            flags = dict(output_loading_info=True, ignore_mismatched_sizes=True)  # refused below
            flags |= dict(dtype=torch.float32, trust_remote_code=False)
            model, found = AutoModelForImageTextToText.from_pretrained(path, **flags)
        model.files = _files(path, ["config.json", "generation_config.json"])
        model.saved_as = saved_as
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


def _hollow(config, path: str):
    """The model without weights (on the meta device), or None where the names and shapes in the
    files are not its own. What no file holds, as the rotary frequencies, is computed."""

    def empty(module, name, parameter):
        if not parameter.is_meta:  # else it is shared with another module, and stays so
            return torch.nn.Parameter(parameter.data.to("meta"), parameter.requires_grad)

    stored = HuggingFaceStorageReader(_folder(path)).read_metadata().state_dict_metadata
    hook = register_module_parameter_registration_hook(empty)
    try:
        flags = dict(dtype=torch.float32, trust_remote_code=False)
        model = AutoModelForImageTextToText.from_config(config, **flags).eval()
    finally:
        hook.remove()
    own = {name: tensor.shape for name, tensor in _in_files(model).items()}
    theirs = {name: tensor.size for name, tensor in stored.items() if len(tensor.chunks) == 1}
    if own != theirs or len(theirs) < len(stored):
        return None
    if _files(path, ["generation_config.json"]):
        model.generation_config = GenerationConfig.from_pretrained(path)
    return model


def _fill(model, path: str, device: torch.device):
    """Reads the weights of a hollow model, sharded or not, each rank its part."""
    if not next(model.parameters()).is_meta:
        return model
    # What is not hollow stays: computed buffers, adapters.
    model._apply(lambda t: torch.empty_like(t, device=device) if t.is_meta else t)
    model.tie_weights()  # a tied head is two tensors by now
    reader = HuggingFaceStorageReader(_folder(path))
    dcp.load(_in_files(model), storage_reader=reader, no_dist=not dist.is_initialized())
    return model


def _in_files(module) -> dict[str, torch.Tensor]:
    """What files hold of a module, by name: a tied head once, adapters never."""
    every, once = (dict(module.named_parameters(remove_duplicate=d)) for d in (False, True))
    held = {n: t for n, t in module.state_dict().items() if n in once or n not in every}
    return {n.replace(".base_layer.", "."): t for n, t in held.items() if ".lora_" not in n}


def _folder(path: str | Path, wanted=("*.safetensors", "*.json")) -> Path:
    """The directory of a hub id."""
    return Path(path if os.path.isdir(path) else snapshot_download(path, allow_patterns=wanted))


def _files(path: str | Path, names: list[str]) -> dict[str, bytes]:
    """The contents of those files that a directory or hub id has."""
    folder = _folder(path, [*names, "config.json"])
    return {name: (folder / name).read_bytes() for name in names if (folder / name).is_file()}


def read_tensors(path: str, pattern: str) -> dict[str, torch.Tensor]:
    """The tensors in the safetensors of a directory or hub id whose names match."""
    found = {}
    for name in sorted(_folder(path).glob("*.safetensors")):
        with safe_open(name, "pt") as file:
            found |= {k: file.get_tensor(k) for k in file.keys() if re.search(pattern, k)}
    return found


# --------------------------------------------------------------------------------------------------
# Saving


def save_policy(policy, processor, path: str) -> None:
    """A Hugging Face directory: weights, and the source's config, generation config, processor and
    chat template as they were. Every rank calls it."""
    if rank() == 0:
        save_processor(processor, path)
        write_files(path, policy.files)
    save_weights(policy, path, policy.saved_as)


def save_weights(module, path: str, dtype: torch.dtype, file_size: str = "5GB") -> None:
    """The weights in files of at most that size, with an index where there are several. Rank 0
    holds one file at a time. Every rank calls it."""
    weights = _in_files(module)
    shapes = {n: torch.empty(t.shape, dtype=dtype, device="meta") for n, t in weights.items()}
    split = split_torch_state_dict_into_shards(shapes, max_shard_size=file_size)
    for file, names in split.filename_to_tensors.items():
        content = {}
        for name in names:
            tensor, layer = weights[name], module.get_submodule(name.rpartition(".")[0])
            if name.endswith(".weight") and hasattr(layer, "get_delta_weight"):  # W + 2 B A
                tensor = tensor + layer.get_delta_weight("default").detach()
            tensor = tensor.to(dtype) if tensor.is_floating_point() else tensor
            tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            if rank() == 0:
                content[name] = tensor.cpu().contiguous()
        if rank() == 0:
            save_file(content, os.path.join(path, file), {"format": "pt"})
    if rank() == 0 and split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        index = json.dumps(index, indent=2).encode()
        write_files(path, {"model.safetensors.index.json": index})
    barrier()


def write_files(path: str | Path, files: dict[str, bytes]) -> None:
    Path(path).mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (Path(path) / name).write_bytes(content)


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
    folder = _folder(path, [*PROCESSOR_FILES, "config.json"])
    try:
        processor = AutoProcessor.from_pretrained(folder, trust_remote_code=False)
    except ImportError:  # the video processor wants torchvision
        processor = None
    # Without torchvision the processor may also be passed over, and a bare tokenizer comes back.
    if not isinstance(processor, ProcessorMixin):
        processor = ImageTextProcessor.from_pretrained(folder)
    if processor.chat_template is None:  # it may stand in tokenizer_config.json only
        processor.chat_template = processor.tokenizer.chat_template
    processor.files = _files(path, PROCESSOR_FILES)
    return processor


def save_processor(processor, path: str | Path) -> None:
    """Writes the files that the processor was loaded from, byte for byte."""
    write_files(path, processor.files)
