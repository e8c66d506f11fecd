"""Hugging Face directories in and out: weights, configuration and processor of a policy or of a
discriminator. What the method computes does not depend on this file.

A model is built without weights and sharded; then each rank reads its shard of the files. That
works where the names and shapes in the files are the module's own, as Qwen3-VL's are; experts may
be transposed. Models whose weights transformers renames or converts while it reads them are loaded
whole by every rank, and sharded afterwards.
"""

import copy
import itertools
import json
import os
import re
import stat
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
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
from transformers import ProcessorMixin, Qwen3VLMoeConfig, Qwen3VLProcessor

from support.errors import MAY_NOT_READ, RowError, UserError, unreadable
from support.ranks import all_sum, barrier, rank, say

CPU = torch.device("cpu")

# --------------------------------------------------------------------------------------------------
# Loading


@dataclass
class Source:
    """What a model was loaded from, besides its weights: what a save has to write again."""

    path: str  # a directory or hub id
    files: dict[str, bytes]  # configuration, processor and chat template, byte for byte
    dtype: torch.dtype  # that the configuration names, and servers compute in


def read_config(path: str):
    """The configuration of a Hugging Face directory or hub id, or UserError."""
    _check_readable(path)
    if os.path.exists(path) and not os.path.isfile(os.path.join(path, "config.json")):
        raise UserError(
            f"{path}: no config.json in it; give a Hugging Face model directory or a hub id"
        )
    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=False)
    except Exception as error:
        raise UserError(
            f"{path}: no Hugging Face directory or hub id that can be loaded "
            f"({_first_line(error)}); check the name, and for a hub id the connection"
        ) from None


def _check_readable(path: str) -> None:
    """UserError where this user may not read a model's directory or one of its files. Libraries say
    of some that they do not exist."""
    if not os.path.isdir(path):
        if said := unreadable(path):
            raise UserError(said)
        return
    names = [""]
    if os.access(path, os.R_OK | os.X_OK):
        wanted = {"config.json", "generation_config.json", *PROCESSOR_FILES}
        names = [n for n in os.listdir(path) if n in wanted or n.endswith(".safetensors")]
    for name in sorted(names):
        file = os.path.join(path, name)
        if not os.access(file, os.R_OK):
            raise UserError(MAY_NOT_READ.format(file, path))


def load_pretrained(path: str, config, unused: str = "$^", hollow: bool = False):
    """-> (model, processor), both of transformers; `model.source` is a Source.

    UserError where the weights are not the model's, since transformers would draw what is missing
    at random. `unused` is a pattern of names that may be left over or missing. With `hollow` the
    model has no weights yet wherever `fill` can read them later."""
    found = dict.fromkeys(("missing_keys", "unexpected_keys", "mismatched_keys"), ())
    dtype = config.dtype or config.get_text_config().dtype or torch.float32
    try:
        processor = load_processor(path)
        model = _hollow(config, path, unused) if hollow else None
        if model is None:
            model, found = AutoModelForImageTextToText.from_pretrained(
                path,
                dtype=torch.float32,
                trust_remote_code=False,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # refused below, by name
            )
        configs = _files(path, ["config.json", "generation_config.json"])
        model.source = Source(path, configs | processor_files(path), dtype)
    except Exception as error:
        raise UserError(
            f"{path}: cannot be loaded as a vision-language model with its processor "
            f"({_first_line(error)}); see Models in docs/data.md"
        ) from None
    if processor.tokenizer.eos_token_id is None:
        raise UserError(
            f"{path}: its tokenizer names no end of sequence, so no response would end; set "
            f"eos_token in tokenizer_config.json"
        )
    missing = sorted(key for key in found["missing_keys"] if not re.search(unused, key))
    unexpected = sorted(key for key in found["unexpected_keys"] if not re.search(unused, key))
    missing += sorted(str(key) for key in found["mismatched_keys"])
    if missing or unexpected:
        raise UserError(
            f"{path}: its weights do not match the model: {len(missing)} missing "
            f"{missing[:3]}, {len(unexpected)} unexpected {unexpected[:3]}; give a checkpoint with "
            f"the names and shapes of {type(model).__name__}"
        )
    return model, processor


def _hollow(config, path: str, unused: str = "$^"):
    """The model without weights (on the meta device), or None where the names and shapes in the
    files are not its own, but for experts, which published files hold transposed. Names that match
    `unused` may be left over. What no file holds, as the rotary frequencies, is computed."""

    def empty(module, name, parameter):
        if not parameter.is_meta:  # else it is shared with another module, and stays so
            return torch.nn.Parameter(parameter.data.to("meta"), parameter.requires_grad)

    hook = register_module_parameter_registration_hook(empty)
    try:
        flags = dict(dtype=torch.float32, trust_remote_code=False)
        model = AutoModelForImageTextToText.from_config(config, **flags).eval()
    finally:
        hook.remove()
    own, stored = _in_files(model), _shapes(path)
    theirs = {name for name in stored if not re.search(unused, name)}
    if own.keys() != theirs or not all(_as_stored(own[n], stored[n]) is not None for n in own):
        return None
    if _files(path, ["generation_config.json"]):
        model.generation_config = GenerationConfig.from_pretrained(path)
    return model


def fill(module, path: str, device: torch.device, prefix: str = ""):
    """Reads the weights of a hollow model, sharded or not, and returns it. Each rank reads its
    part. Where `module` is a part of the model, its names in the files begin with `prefix`."""
    hollow = [name for name, tensor in _in_files(module).items() if tensor.is_meta]
    if not hollow:
        return module
    # What is not hollow stays: computed buffers, adapters, a score head, upcycled experts.
    module._apply(lambda t: torch.empty_like(t, device=device) if t.is_meta else t)
    if hasattr(module, "tie_weights"):
        module.tie_weights()  # a tied head is two tensors by now
    own, stored = _in_files(module), _shapes(path)
    wanted = {prefix + name: _as_stored(own[name], stored[prefix + name]) for name in hollow}
    reader = HuggingFaceStorageReader(_folder(path))
    dcp.load(wanted, storage_reader=reader, no_dist=not dist.is_initialized())
    return module


def _shapes(path: str) -> dict[str, torch.Size]:
    """Name -> shape of each tensor in the files of a directory or hub id. A tensor that is split
    over several files gets the empty shape, which matches none."""
    stored = HuggingFaceStorageReader(_folder(path)).read_metadata().state_dict_metadata
    return {n: t.size if len(t.chunks) == 1 else torch.Size() for n, t in stored.items()}


def _as_stored(tensor: torch.Tensor, shape: torch.Size) -> torch.Tensor | None:
    """A tensor in the shape that a file has: as it is, or experts transposed. None otherwise."""
    if tensor.ndim == 3 and tensor.shape != shape:
        tensor = tensor.mT
    return tensor if tensor.shape == shape else None


def add_adapters(policy, lora_rank: int) -> None:
    """Adds 2 B A, by peft, to every linear layer W of the language model; nothing else learns. B is
    0 at the start, so an untrained policy, such as the reference of RLVR, is as it was. The experts
    of a mixture are no linear layers, and stay as they are."""
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        raise UserError("--lora_rank: needs `peft`; pip install peft") from None
    lora = LoraConfig(r=lora_rank, lora_alpha=2 * lora_rank, target_modules="all-linear")
    policy.requires_grad_(False)
    inject_adapter_in_model(lora, policy.get_decoder())
    policy.adapters = lora
    for layer in policy.modules():
        if hasattr(layer, "reset_lora_parameters"):
            # peft puts A and B on W's device; on the meta device they would stay empty.
            layer.lora_A.to_empty(device=CPU)
            layer.lora_B.to_empty(device=CPU)
            layer.reset_lora_parameters("default", init_lora_weights=True)
    if any(p.ndim == 3 for p in policy.get_decoder().parameters()):
        say("--lora_rank: only linear layers get adapters; the experts are not trained")


def _in_files(module) -> dict[str, torch.Tensor]:
    """What files hold of a module, by name: a tied head once, adapters never."""
    every, once = (dict(module.named_parameters(remove_duplicate=d)) for d in (False, True))
    held = {n: t for n, t in module.state_dict().items() if n in once or n not in every}
    return {n.replace(".base_layer.", "."): t for n, t in held.items() if ".lora_" not in n}


@lru_cache
def _folder(path: str | Path, wanted=("*.safetensors", "*.json")) -> Path:
    """The directory of a hub id. The hub is asked once."""
    return Path(path if os.path.isdir(path) else snapshot_download(path, allow_patterns=wanted))


def _files(path: str | Path, names: list[str]) -> dict[str, bytes]:
    """The contents of those files that a directory or hub id has."""
    folder = _folder(path, (*names, "config.json"))
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


def save_policy(policy, path: str, shared: dict | None = None) -> None:
    """Writes a Hugging Face directory: the weights, and the configuration, processor and chat
    template of the source as they were. Adapters are merged into the weights, and stand in
    `adapter/` as well. `shared` is what the next stage has to share, see `read_shared`; None: as
    the source has it. Every rank calls it."""
    if rank() == 0:
        write_files(path, policy.source.files | _shared_file(shared))
    save_weights(policy, path)
    if hasattr(policy, "adapters"):
        save_adapters(policy, f"{path}/adapter")


def save_adapters(policy, path: str) -> None:
    """Writes the adapters, in float32, as `PeftModel.from_pretrained(source, path)` reads them.
    Every rank calls it."""
    tensors, layers = {}, set()
    for name, parameter in policy.named_parameters():
        if ".lora_" in name:
            whole = _whole(parameter.detach()).cpu().contiguous()
            tensors["base_model.model." + name.replace(".default.", ".")] = whole
            layers.add(re.sub(r"\.\d+\.", ".N.", name.partition(".lora_")[0]))
    if rank() == 0:
        lora = copy.copy(policy.adapters)
        # By their whole names: layers of the vision tower may end in the same ones.
        every = "|".join(re.escape(layer) for layer in sorted(layers))
        lora.target_modules = every.replace(r"\.N\.", r"\.\d+\.")
        lora.base_model_name_or_path = policy.source.path
        lora.save_pretrained(path)
        _write_tensors(os.path.join(path, "adapter_model.safetensors"), tensors)
    barrier()


def save_weights(module, path: str, file_size: str = "5GB") -> None:
    """Writes the weights, in float32, in files of at most `file_size`, with an index where there
    are several. Rank 0 holds one file at a time. Every rank calls it.

    The configuration beside them names the type of the source, so servers still compute in that
    type. The next stage reads all that was learned: published weights lie on bfloat16's grid, and
    a save in bfloat16 would drop every change that is smaller than half of its spacing."""
    weights = _in_files(module)
    shapes = {n: torch.empty(t.shape, dtype=t.dtype, device="meta") for n, t in weights.items()}
    split = split_torch_state_dict_into_shards(shapes, max_shard_size=file_size)
    for file, names in split.filename_to_tensors.items():
        content = {}
        for name in names:
            tensor = _whole(_merged(module, name, weights[name]))
            if rank() == 0:
                content[name] = tensor.cpu().contiguous()
        if rank() == 0:
            _write_tensors(os.path.join(path, file), content)
    if rank() == 0 and split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        index = json.dumps(index, indent=2).encode()
        write_files(path, {"model.safetensors.index.json": index})
    barrier()


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor as it is, a sharded one in full. Every rank calls it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _merged(module, name: str, tensor: torch.Tensor) -> torch.Tensor:
    """A tensor of `_in_files` with the adapters of its layer, W + 2 B A, where it has any."""
    layer = module.get_submodule(name.rpartition(".")[0])
    if not name.endswith(".weight") or not hasattr(layer, "get_delta_weight"):
        return tensor
    return tensor + layer.get_delta_weight("default").detach()


def _write_tensors(path: str, tensors: dict[str, torch.Tensor]) -> None:
    """Writes a safetensors file with the mode of any new file. `save_file` alone would keep it from
    all other users."""
    with open(path, "wb") as plain:
        mode = stat.S_IMODE(os.fstat(plain.fileno()).st_mode)
    save_file(tensors, path, {"format": "pt"})
    if stat.S_IMODE(os.stat(path).st_mode) != mode:
        os.chmod(path, mode)


def write_files(path: str | Path, files: dict[str, bytes]) -> None:
    Path(path).mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (Path(path) / name).write_bytes(content)


# --------------------------------------------------------------------------------------------------
# What the type that a configuration names would lose


def starting_weights(module) -> dict[str, torch.Tensor]:
    """Name -> this rank's shard of each weight that learns, as it is now, on the CPU. It takes
    2 bytes a weight where the source's type holds the weight exactly, as it does of published
    weights, and 4 otherwise. Empty where the source's type is float32, in which nothing is lost."""
    start = {}
    learns = {name for name, p in module.named_parameters() if p.requires_grad}
    for name, tensor in _in_files(module).items():
        if name in learns and module.source.dtype != torch.float32:
            shard = _of_rank(tensor)
            narrow = shard.to(module.source.dtype)
            exact = torch.equal(narrow.to(shard.dtype), shard)
            start[name] = (narrow if exact else shard).to(CPU, copy=True)
    return start


def rounding_loss(module, start: dict[str, torch.Tensor]) -> float | None:
    """What rounding the weights w to the source's type would change, as a share of what the run
    has changed: |w - rounded w| / |w - start|, over all weights that learn. None where nothing
    would be lost or nothing has changed. Every rank calls it.

    It is at most 1 where `start` lies on the grid of the source's type, and may be more elsewhere.
    """
    dtype = module.source.dtype
    sums = torch.zeros(2, dtype=torch.float64)  # squares of what is lost, and of the update
    for name, tensor in _in_files(module).items() if dtype != torch.float32 else ():
        after = _merged(module, name, tensor)
        if name not in start and after is tensor:
            continue  # it does not learn
        after, before = _of_rank(after), start.get(name, _of_rank(tensor))
        for i, other in enumerate((after.to(dtype), before.to(after.device))):
            gap = torch.linalg.vector_norm(after - other, dtype=torch.float64)
            sums[i] += gap.cpu().square()
    lost, changed = all_sum(sums).sqrt().tolist()
    return lost / changed if changed else None


def _of_rank(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


# --------------------------------------------------------------------------------------------------
# The discriminator's directories


@dataclass
class SavedDiscriminator:
    """What the directory of a discriminator, or of a model that is to become one, holds."""

    model: torch.nn.Module  # of transformers, with `source`; without weights where `fill` can read
    processor: object
    kind: str | None  # the kind of discriminator that was saved, None for another model
    experts: list[dict] | None  # of each layer gate (E, h), gate_up_proj, down_proj; None: dense
    top_k: int  # experts that a token goes through
    head: torch.Tensor | None  # the score head: (2, h), or (1, h) for both views; None: no head


HEAD = r"score|^v_head|^value_head"  # the names of a score head, ours and the release's


def open_discriminator(path: str, kinds: tuple[str, ...]) -> SavedDiscriminator:
    """Reads a discriminator, ours or the released one, or a dense vision-language model. `kinds`
    are those that a discriminator may have been saved as.

    Experts of a Qwen3-VL are part of a model of transformers. For other models transformers has no
    class with experts: theirs are read from the files by name."""
    config = read_config(path)
    kind, moe = getattr(config, "prism_experts", None), isinstance(config, Qwen3VLMoeConfig)
    if kind not in (None, *kinds):
        raise UserError(
            f"{path}: config.json has prism_experts {kind!r}, expected one of {', '.join(kinds)}; "
            f"write the one that it was trained with"
        )
    in_files = kind not in (None, "dense") and not moe
    unused = rf"{HEAD}|language_model.*\.mlp\." if in_files else HEAD
    model, processor = load_pretrained(path, config, unused, hollow=not in_files)
    layers = getattr(getattr(model.base_model, "language_model", None), "layers", None)
    if layers is None:
        raise UserError(f"{path}: {type(model).__name__} has no language_model; choose another")
    experts, top_k = None, 2
    if moe:
        top_k = config.text_config.num_experts_per_tok
        if not all(hasattr(layer.mlp, "experts") for layer in layers):
            raise UserError(f"{path}: has a layer without experts; choose another model")
        experts = [
            {
                "gate": layer.mlp.gate.weight.data,
                "gate_up_proj": layer.mlp.experts.gate_up_proj.data,
                "down_proj": layer.mlp.experts.down_proj.data,
            }
            for layer in layers
        ]
    elif in_files:
        stored, experts = read_tensors(path, r"\.mlp\.(gate|experts)\."), []
        names = {"gate": "gate.weight", "gate_up_proj": "experts.gate_up_proj"}
        names |= {"down_proj": "experts.down_proj"}
        for number in range(len(layers)):
            experts.append({})
            for part, name in names.items():
                name = f"model.language_model.layers.{number}.mlp.{name}"
                if name not in stored:
                    raise UserError(
                        f"{path}: has no tensor {name}; copy the directory again, or train the "
                        f"discriminator again"
                    )
                experts[number][part] = stored[name].float()
    heads = [head for head in read_tensors(path, HEAD).values() if head.ndim == 2]
    head = heads[0].float() if heads else None
    return SavedDiscriminator(model, processor, kind, experts, top_k, head)


def same_prompts(ours, theirs) -> bool:
    """Whether ids and pixels of one processor mean the same to a model of the other. How large an
    image may be does not count where a model takes images of any size: prompts are encoded once,
    by the policy's processor."""
    names = ["patch_size", "temporal_patch_size", "merge_size", "do_rescale", "rescale_factor"]
    names += ["do_normalize", "image_mean", "image_std"]
    if getattr(ours.image_processor, "merge_size", None) is None:
        names += ["size", "crop_size"]
    a = [getattr(ours.image_processor, name, None) for name in names]
    b = [getattr(theirs.image_processor, name, None) for name in names]
    return a == b and ours.tokenizer.get_vocab() == theirs.tokenizer.get_vocab()


def save_discriminator(discriminator, path: str, shared: dict | None = None) -> None:
    """Writes a Hugging Face directory, with `score.weight` (2, h) beside the backbone's weights.
    `shared` is as in `save_policy`.

    Experts of a Qwen3-VL are written as Qwen3VLMoeForConditionalGeneration opens them. For other
    models transformers has no class with experts. Theirs have the same names, and only
    `open_discriminator` finds them. Every rank calls it."""
    source = discriminator.source
    if rank() == 0:
        config = discriminator.model.config.to_dict()
        sparse = discriminator.sparse_mlps
        if sparse and config["model_type"] == "qwen3_vl":
            text = {k: v for k, v in config["text_config"].items() if k != "model_type"} | dict(
                num_experts=len(sparse[0].gate.weight),
                num_experts_per_tok=sparse[0].top_k,
                moe_intermediate_size=sparse[0].experts.down_proj.shape[2],
                decoder_sparse_step=1,
                mlp_only_layers=[],
                router_aux_loss_coef=0.01,
            )
            vision = {k: v for k, v in config["vision_config"].items() if k != "model_type"}
            ids = {k: v for k, v in config.items() if k.endswith("_token_id")}
            config = Qwen3VLMoeConfig(text_config=text, vision_config=vision, **ids)
            config.architectures = ["Qwen3VLMoeForConditionalGeneration"]
        else:
            config = type(discriminator.model.config).from_dict(config)
        # It has no language head; tied embeddings keep transformers from asking for one.
        config.tie_word_embeddings = config.get_text_config().tie_word_embeddings = True
        config.prism_experts, config.dtype = discriminator.kind, source.dtype
        config.save_pretrained(path)
        processor = {k: v for k, v in source.files.items() if k in PROCESSOR_FILES}
        write_files(path, processor | _shared_file(shared))
    save_weights(discriminator, path)


# --------------------------------------------------------------------------------------------------
# The processor: tokenizer, image processor, chat template
#
# transformers opens a Qwen3-VL processor only where torchvision is installed, because it insists on
# a video processor. Without torchvision AutoProcessor returns a bare tokenizer and says nothing.
# PRISM needs no video, so the same processor is built here without that part.

SHARED = "prism.json"  # beside the processor; transformers overlooks it
# All that a published directory, or one of ours, may hold of a processor.
PROCESSOR_FILES = (
    """preprocessor_config.json video_preprocessor_config.json processor_config.json
    tokenizer.json tokenizer_config.json vocab.json merges.txt special_tokens_map.json
    added_tokens.json chat_template.json chat_template.jinja tokenizer.model""".split()
    + [SHARED]
)


class ImageTextProcessor(Qwen3VLProcessor):
    """Qwen3VLProcessor without its video processor. The signature of __init__ tells transformers
    which parts a processor needs."""

    def __init__(self, image_processor=None, tokenizer=None, chat_template=None, **kwargs):
        super().__init__(image_processor, tokenizer, None, chat_template=chat_template, **kwargs)


def load_processor(path: str | Path):
    """The processor of a directory or hub id."""
    folder = _folder(path, (*PROCESSOR_FILES, "config.json"))
    try:
        processor = AutoProcessor.from_pretrained(folder, trust_remote_code=False)
    except ImportError:  # the video processor wants torchvision
        processor = None
    # Without torchvision the processor may also be passed over, and a bare tokenizer comes back.
    if not isinstance(processor, ProcessorMixin):
        processor = ImageTextProcessor.from_pretrained(folder)
    if processor.chat_template is None:  # it may stand in tokenizer_config.json only
        processor.chat_template = processor.tokenizer.chat_template
    return processor


def write_chats(processor, chats: list[list[dict]]) -> list[str]:
    """Chats, their turns in parts, as the model's chat template writes them, up to where the
    response begins. RowError where it refuses one of them or drops what a user says, UserError
    where it cannot write any."""
    form = _chat_form(processor)
    formed = [form(chat) for chat in chats]
    try:
        written = processor.apply_chat_template(formed, add_generation_prompt=True, tokenize=False)
    except Exception as error:  # a template raises whatever its author chose
        raise RowError(f"the chat template refuses the row ({_first_line(error)})") from None
    for chat, text in zip(chats, written):
        said = (turn["content"] for turn in chat if turn["role"] != "assistant")  # may lose <think>
        for part in itertools.chain.from_iterable(said):
            if part.get("text", "").strip() not in text:
                raise RowError(f"the chat template drops {part['text'][:80]!r} from the row")
    return written


@lru_cache(maxsize=4)
def _chat_form(processor) -> Callable:
    """How to give a chat to the chat template: the first of all forms with which nothing of a chat
    is lost. A system turn is taken in parts, as text, or as the beginning of the user's turn; a
    reply in parts or as text."""
    prompt, question, reply = "Answer as a probe does.", "What does the probe show?", "A line."
    text = lambda words: {"type": "text", "text": words}
    system = {"role": "system", "content": [text(prompt)]}
    picture = {"role": "user", "content": [{"type": "image"}, text(question)]}
    no_picture = {"role": "user", "content": [text(question)]}
    more = [
        {"role": "assistant", "content": [text(reply)]},
        {"role": "user", "content": [text("And elsewhere?")]},
    ]

    def write(form, *turns) -> str:
        chat = form(list(turns))
        return processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)

    why = "it drops one of them, or shows it as a Python list"
    forms = [
        partial(_formed, system=system_as, assistant=reply_as)
        for system_as in ("parts", "text", "user")
        for reply_as in ("parts", "text")
    ]
    for rest, form in itertools.product((more, []), forms):  # some take a single question only
        try:
            written, other = (write(form, system, turn, *rest) for turn in (picture, no_picture))
        except Exception as error:
            why = _first_line(error)
            continue
        whole = prompt in written and question in written and written != other
        whole = whole and (reply in written or not rest)
        if whole and "'type'" not in written:  # a list of parts, written as Python shows it
            return form
    name = processor.tokenizer.name_or_path
    raise UserError(
        f"{name}: its chat template cannot write a system prompt, image and question ({why}); put "
        f"another one into the directory, as chat_template.jinja"
    )


def _formed(chat: list[dict], system: str, assistant: str) -> list[dict]:
    """A chat with its turns in parts -> the same with those of a role in parts or as text; where
    `system` is "user", the system turn begins the first turn of the user."""
    if system == "user" and chat[0]["role"] == "system":
        prompt = [*chat[0]["content"], {"type": "text", "text": "\n\n"}]
        first = next(i for i, turn in enumerate(chat) if turn["role"] == "user")
        asked = chat[first] | {"content": prompt + chat[first]["content"]}
        chat = [*chat[1:first], asked, *chat[first + 1 :]]
    form = {"system": system, "assistant": assistant, "user": "parts"}
    joined = lambda parts: "".join(part.get("text", "") for part in parts)
    return [
        turn | {"content": joined(turn["content"])} if form[turn["role"]] == "text" else turn
        for turn in chat
    ]


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:150]


def processor_files(path: str | Path) -> dict[str, bytes]:
    """The files of a processor, byte for byte, as a save writes them again."""
    return _files(path, PROCESSOR_FILES)


def read_shared(path: str | Path) -> dict:
    """What a stage fixed and the next one has to share. `system_prompt` is the system turn of the
    rows, "" for none. `max_pixels` is the largest image, None for the processor's own limit. {}
    where no stage of this project has written the directory."""
    try:
        content = _files(path, [SHARED]).get(SHARED, b"{}")
    except Exception:  # there is no such checkpoint; what loads it says so
        return {}
    kinds = {"system_prompt": str, "max_pixels": int | None}
    try:
        shared = {k: v for k, v in json.loads(content).items() if k in kinds}
        if all(isinstance(value, kinds[name]) for name, value in shared.items()):
            return shared
    except (ValueError, AttributeError):
        pass
    raise UserError(f"{path}/{SHARED}: damaged; copy the checkpoint again, or remove this file")


def _shared_file(shared: dict | None) -> dict[str, bytes]:
    return {} if shared is None else {SHARED: json.dumps(shared, indent=2).encode() + b"\n"}
