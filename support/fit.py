"""Will it fit, and how long will it take, before it is paid for: `--dry_run N` counts the bytes of
one of N GPUs, and the seconds of a step (`seconds`).

Only the model's config.json is read. States and weights are counted from the parameters of an empty
model: P in all, R of them outside the blocks, B in the largest block. S GPUs share them as
ranks.shard does: all N, or with --hsdp those of one node. What they cannot share equally is counted
on the GPU that holds most, see `share`.

    weights        4 P / S        float32
    optimiser      8 P / S        two moments of what is trained
    gradients      4 P / S        and, unsharded until they are summed over the GPUs, 4 B of a block
                                  or, at the end, 6 R of the root (bfloat16 and float32)
    gathered       2 R + 4 B      bfloat16: the root, a block, and the buffer of the next one; 2 P
                                  while sampling
    activations                   what backward needs of a pack of --max_tokens_per_pack tokens, all
                                  of each layer (see `layer`). With --activation_checkpointing, once
                                  half of the GPU's memory is taken, a layer keeps its input and its
                                  attention's output, and all only while it is computed again
    head           6 V (1024 + h) log-probabilities, V words, h wide: a chunk of logits in float32
                                  and bfloat16, the head's gradient likewise
    cache          4 k            for each layer and token while sampling, k values of a key; a
                                  prompt stands once, a rollout has --max_completion_length

A phase is counted at the moment that needs most. Not counted is what CUDA, NCCL and the gaps of the
allocator take. For them 5 GiB are set aside, so an 80 GB card counts as 80e9 bytes, 74.5 GiB.
"""

import math
import os
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from transformers import AutoModelForImageTextToText

from support.errors import UserError, counted
from support.huggingface import read_config
from support.ranks import KEEP, blocks, sharded_dimension, vision_tower

# What model.py and sampler.py hold at a time.
LOGIT_ROWS = 1024  # rows of logits over the vocabulary
PROMPT_TOKENS = 2**16  # tokens of the prompts that are sampled from, each as long as the longest

OTHERS = 5 * 2**30  # of a GPU's memory, what is not counted
CARD = 80e9 + OTHERS
IMAGES = 0.25  # of the tokens of a pack; assumed, as no data is read
PROMPT = 2048  # tokens of a prompt, where a stage has no limit of its own (paper: 2048)
NODE = 8  # GPUs that share with --hsdp
COLUMNS = "weights optimiser gradients gathered activations head cache".split()


@dataclass
class Model:
    """What is counted of a model."""

    whole: int  # P
    root: int  # R
    block: int  # B
    trained: int  # of P
    h: int  # width
    i: int  # width of an MLP, or of an expert
    q: int  # values of a query, all heads
    k: int  # values of a key, all heads
    layers: int
    words: int  # V
    experts: int  # of a layer, 0 for a dense MLP
    chosen: int  # of them, those that a token goes through
    vision: "Vision"


@dataclass
class Vision:
    """What is counted of a vision tower."""

    h: int  # width
    i: int  # width of an MLP
    layers: int
    mergers: int  # that bring its output to the language model
    pixels: int  # values of a patch, all colours and frames
    patches: int  # that become one image token

    @classmethod
    def of(cls, config) -> "Vision":
        """By the names that the families have for it. AttributeError where there is none."""
        own = config.vision_config
        get = lambda name, default=None: getattr(own, name, default)
        h = get("embed_dim") or own.hidden_size  # Qwen2-VL's hidden_size is the language model's
        layers = get("depth") or own.num_hidden_layers
        i = get("intermediate_size") or int(h * own.mlp_ratio)
        mergers = 1 + len(get("deepstack_visual_indexes", ()))
        sides = own.patch_size if isinstance(own.patch_size, list | tuple) else [own.patch_size] * 2
        pixels = 3 * get("temporal_patch_size", 1) * math.prod(sides)
        merge = get("spatial_merge_size") or getattr(config, "scale_factor", 1)
        merge = round(1 / getattr(config, "downsample_ratio", 1 / merge))  # InternVL's name
        return cls(h, i, layers, mergers, pixels, merge**2)


def check_layers(config, where: str) -> None:
    """UserError where the attention of a language layer is not that of packs.
    Takes along: support.errors.UserError."""
    text = config.get_text_config()
    kinds = set(getattr(text, "layer_types", None) or ["full_attention"])
    if kinds != {"full_attention"}:
        raise UserError(
            f"{where}: the layers of {config.model_type} have {', '.join(sorted(kinds))}; only "
            f"full_attention in every layer is supported: choose another model"
        )


@lru_cache  # both tables are of the same models
def read_model(path: str, experts: int = 0, head=True, frozen=False) -> Model:
    """The model of a Hugging Face directory or hub id, as a policy or, without its head, as a
    discriminator: a dense one is given `experts` (0: stays dense)."""
    config = read_config(path)
    check_layers(config, path)
    try:
        with torch.device("meta"):
            model = AutoModelForImageTextToText.from_config(config)
        return count(model if head else model.base_model, experts, frozen)
    except (AttributeError, ImportError, StopIteration, TypeError, ValueError) as error:
        said = (str(error).strip() or repr(error)).splitlines()[0][:150]
        raise UserError(
            f"--dry_run: cannot count the memory of {path}, a {config.model_type} ({said}); run "
            f"one step of the stage instead"
        ) from None


def count(model, experts: int = 0, frozen: bool = False) -> Model:
    text = model.config.get_text_config()
    h, heads = text.hidden_size, text.num_attention_heads
    i = getattr(text, "moe_intermediate_size", text.intermediate_size)
    dim = getattr(text, "head_dim", None) or h // heads
    # (3): a dense model's layers are given copies of their MLP, and a router.
    more = (experts - 1) * 3 * h * i + experts * h if experts else 0
    more = 0 if hasattr(text, "num_experts") else more
    experts = getattr(text, "num_experts", experts)
    size = lambda module: sum(p.numel() for p in module.parameters())
    parts = [size(block) for block in blocks(model)]
    whole = size(model) + more * text.num_hidden_layers
    trained = whole - (size(vision_tower(model)) if frozen else 0)
    sizes = whole, size(model) - sum(parts), max(parts) + more, trained
    widths = h, i, heads * dim, text.num_key_value_heads * dim
    chosen = getattr(text, "num_experts_per_tok", 2 if experts else 0)
    vision = Vision.of(model.config)
    rest = text.num_hidden_layers, text.vocab_size, experts, chosen, vision
    return Model(*sizes, *widths, *rest)


def share(m: Model, size: int, shards: int) -> float:
    """How many of `size` parameters the GPU that holds most has. S GPUs share all but experts
    equally, and experts too where S divides a dimension of theirs."""
    most = size / shards
    for shape in ((m.experts, 2 * m.i, m.h), (m.experts, m.h, m.i)) if m.experts else ():
        length = shape[sharded_dimension(shape, shards)]
        most += m.layers * math.prod(shape) * (math.ceil(length / shards) / length - 1 / shards)
    return most


def layer(m: Model, tokens: int, keys: int) -> int:
    """Bytes that backward needs of one language layer, all in bfloat16. Each of its two norms keeps
    what comes in and what goes out, those of queries and keys what comes in. Attention keeps
    queries, output, and the `keys` and values that it reads. The MLP keeps gate, silu(gate), up
    and their product, an expert also its tokens in and out."""
    mlp = m.chosen * (8 * m.i + 4 * m.h) if m.chosen else 8 * m.i
    return tokens * (8 * m.h + 6 * m.q + 2 * m.k + mlp) + keys * 4 * m.k


def activations(m: Model, tokens: int, keys: int, room: float, images=IMAGES):
    """-> (bytes at the end of forward, those that one layer's backward adds). A layer keeps all if
    what is taken when it starts, plus what the later layers must keep, is less than `room` bytes.
    Each other layer keeps what it needs to compute that again."""
    v, patches, kept = m.vision, images * tokens * m.vision.patches, 0
    if m.trained == m.whole:
        kept = patches * (v.mergers * 6 * v.h + 2 * v.pixels)
        for i in range(v.layers):
            later = (v.layers - 1 - i + m.layers) * 4 * v.h * patches
            kept += patches * (22 * v.h + 4 * v.i if kept + later < room else 4 * v.h)
    again = False
    for i in range(m.layers):
        again = kept + (m.layers - 1 - i) * 4 * m.h * tokens >= room
        kept += 2 * (m.h + m.q) * tokens if again else layer(m, tokens, keys)
    kept += 4 * m.h * tokens  # the last norm
    # Gradients on their way through an MLP, or through the experts of a token.
    work = 2 * tokens * (m.h + m.i) * max(1, m.chosen)
    return kept, work + (layer(m, tokens, keys) if again else 0)


def training(m: Model, shards: int, tokens: int, keys: int, room, policy, images=IMAGES):
    """Three moments of a backward: at the head of a policy, in a layer, and at the root. `room` is
    what gradients, gathered weights and activations may take before a layer recomputes; infinite
    without checkpointing."""
    shard, gathered = 4 * share(m, m.trained, shards), 2 * m.root + 4 * m.block
    kept, work = activations(m, tokens, keys, room - shard - gathered, images)
    own = 2 * m.words * m.h if policy else 0  # the head's gradient, which waits for the root's
    first = dict(gradients=shard, gathered=gathered, activations=kept)
    first["head"] = 6 * m.words * (LOGIT_ROWS + m.h) if policy else 0
    layers = dict(gathered=gathered, activations=kept + work, head=own)
    layers["gradients"] = shard + 4 * m.block
    return first, layers, dict(gathered=2 * m.root, gradients=shard + 6 * m.root)


def sampling(m: Model, prompts: int, prompt: int, rows: int, limit: int) -> dict:
    """Everything at its longest. The prompts go through the layers first; then a step holds four
    copies of its logits in float32. One layer's cache is there twice while it grows."""
    return dict(
        gathered=2 * m.whole,
        activations=layer(m, prompts * prompt, prompts * prompt),
        head=16 * rows * m.words,
        cache=4 * m.k * (m.layers + 1) * (prompts * prompt + rows * limit),
    )


def models(config) -> tuple[Model | None, Model | None]:
    """-> (policy, discriminator) of a stage, None where it has none."""
    get = lambda name, default=None: getattr(config, name, default)
    stage, frozen = config.stage, get("freeze_vision", False)
    flag = {"sft": "model", "discriminator": "policy"}.get(stage, "ckpt")
    policy = read_model(get(flag), frozen=frozen) if get(flag) else None
    if get("lora_rank"):  # seven layers a block; activations and gradients are over-counted
        sizes = 7 * policy.h + 2 * policy.q + 2 * policy.k + 3 * policy.i
        trained = config.lora_rank * policy.layers * sizes
        policy = replace(policy, trained=trained, whole=policy.whole + trained)
    judge = None
    if stage in ("discriminator", "align"):
        source = "model" if stage == "discriminator" else "discriminator"
        kind = getattr(read_config(get(source)), "prism_experts", get("experts"))
        experts = 0 if kind == "dense" else 4
        judge = read_model(get(source), experts, head=False, frozen=frozen)
    return policy, judge


def prompts_of(config, gpus: int, sampled: bool) -> int:
    """The prompts, or rows, of one GPU in a step: those that it samples from or trains on."""
    get = lambda name, default=None: getattr(config, name, default)
    rows = get("per_device_eval_batch_size") or get("per_device_train_batch_size", 0)
    rows *= get("gradient_accumulation_steps", 1)
    step = get("prompts_per_step", 0)
    step *= config.gen_batch_factor if sampled and get("algorithm") == "dapo" else 1
    return math.ceil(step / gpus) or rows


def phases(config, gpus: int, total: float = CARD) -> list[tuple[str, dict]]:
    """-> (name, bytes of each column) of each phase of a stage, on GPUs of `total` bytes."""
    get = lambda name, default=None: getattr(config, name, default)
    stage = config.stage
    node = int(os.environ.get("LOCAL_WORLD_SIZE", NODE))
    shards = min(gpus, node) if get("hsdp") else gpus
    policy, judge = models(config)
    learns = policy if stage in ("sft", "align", "rlvr") else None
    reference = policy if get("beta") else None
    held = [m for m in (policy, judge, reference) if m]
    states = dict(weights=sum(4 * share(m, m.whole, shards) for m in held))
    states["optimiser"] = sum(8 * share(m, m.trained, shards) for m in (learns, judge) if m)

    prompt, limit = get("max_prompt_length", PROMPT), get("max_completion_length", 0)
    n = get("num_generations") or get("num_samples", 1)
    out = []
    if policy and stage != "sft":
        prompts = prompts_of(config, gpus, sampled=True)
        prompts = min(prompts, max(PROMPT_TOKENS // prompt, 1))  # the others come after these
        rows = min(prompts * n, get("max_rollout_rows") or math.inf)
        out.append(("rollout", states | sampling(policy, prompts, prompt, rows, limit)))
    for name, m, branches, sides in (("judge", judge, 2 * n + 2, 2), ("update", learns, n, 1)):
        longest = get("max_length") or prompt + sides * limit
        tokens = max(get("max_tokens_per_pack", 0), longest)
        keys = tokens + (branches * prompt if branches > 1 else 0)  # a branch reads its prompt
        room = KEEP * total - sum(states.values())
        rooms = {name: room, f"{name}, without checkpointing": math.inf}
        for title, room in rooms.items() if m else ():
            moments = training(m, shards, tokens, keys, room, m is learns)
            most = max(moments, key=lambda moment: sum(moment.values()))
            if m is reference:
                most["gathered"] += 2 * m.root
            out.append((title, states | most))
    return out


def table(config) -> str:
    """The bytes of each phase of a stage, and whether they fit."""
    gpus, total = config.dry_run, CARD
    if torch.cuda.is_available():
        total = torch.cuda.get_device_properties(0).total_memory
    size = total - OTHERS
    gib = lambda amount: f"{amount / 2**30:.1f}"
    lines = [f"| GiB a GPU | {' | '.join(COLUMNS)} | in all | fits {gib(size)} |"]
    lines.append("|---" * (len(COLUMNS) + 3) + "|")
    for name, parts in phases(config, gpus, total):
        whole = sum(parts.values())
        cells = [gib(parts.get(column, 0)) for column in COLUMNS]
        fits = "yes" if whole <= size else "no"
        lines.append(f"| {config.stage}, {name} | {' | '.join(cells)} | {gib(whole)} | {fits} |")
    return "\n".join(lines)


# --------------------------------------------------------------------------------------------------
# How long will it take

ROWS = dict(sft=1_373_000, discriminator=120_000)  # paper: 1.26M + 113K demonstrations, 120K pairs
MEAN_PROMPT = 600  # tokens with an image; assumed, as no data is read
MEAN_RESPONSES = 1000, 2000  # tokens; assumed, the two ends of what is printed
# Rows of a rank in a step: the share of time that ranks wait for the one with the longest rows.
# Counted in docs/performance.md, the last columns of "Cutting batches into packs".
IDLE = {2: 0.42, 8: 0.26, 16: 0.20, 64: 0.11}
DEALT = {2: 0.17, 8: 0.03, 16: 0.02, 64: 0.01}  # by length, as in SFT


@dataclass
class Speed:
    """What one GPU reaches. Assumed here, for an H100; benchmarks/gpu.py measures it."""

    flops: float = 0.3 * 989e12  # operations/s in training; those that are recomputed do not count
    bytes: float = 0.85 * 3.35e12  # bytes/s that decoding reads
    kernel: float = 2.5e-6  # seconds of a kernel of a decoding step, beside what it reads
    kernels: int = 36  # of a layer in a decoding step, by count
    outside: int = 48  # kernels of a decoding step outside the layers, by count


def matrices(m: Model, mlps: int) -> int:
    """Weights of a layer's matrices, with some of its experts."""
    return m.h * (2 * m.q + 2 * m.k + 3 * m.i * max(1, mlps))


def operations(m: Model, tokens: float, pairs: float, targets: float) -> float:
    """Floating-point operations of a forward and a backward, which has twice those of a forward.
    Nothing is counted for what is recomputed, nor for the vision tower. `pairs`: of a query and a
    key that it sees; `targets`: tokens that the head scores."""
    weights = m.layers * matrices(m, m.chosen) * tokens + m.words * m.h * targets
    return 6 * weights + 12 * m.layers * m.q * pairs


def reading(m: Model, tokens: float) -> float:
    """Bytes that a decoding step reads: all weights of the language model, and the keys and values
    of `tokens`."""
    weights = m.layers * matrices(m, m.experts) + m.words * m.h
    return 2 * weights + 4 * m.k * m.layers * tokens


def decoding(m: Model, tokens: float, speed: Speed) -> float:
    """Seconds of a decoding step."""
    kernels = m.layers * speed.kernels + speed.outside
    return reading(m, tokens) / speed.bytes + kernels * speed.kernel


def seconds(config, policy, judge, gpus: int, response: int, speed: Speed) -> dict[str, float]:
    """Phase -> its seconds in a step, on the GPU that takes longest. `response`: tokens of a
    response in the mean. The standard deviation of lengths is taken as large as their mean, so the
    mean of their squares is twice the square of their mean.

    On this GPU one row runs to --max_completion_length, and where rows wait it is among the last to
    start. Not counted are traffic between GPUs, reading data, verifying and saving."""
    get = lambda name, default=None: getattr(config, name, default)
    n, stage, parts = get("num_generations", 1), config.stage, {}
    response = min(response, get("max_completion_length", response))
    if policy and stage != "sft":
        prompts = prompts_of(config, gpus, sampled=True)
        rows = prompts * n
        slots = min(rows, get("max_rollout_rows") or rows)
        steps = config.max_completion_length + response * (rows - slots) / slots
        own = 4 * policy.k * policy.layers * rows * response**2  # a row reads half its square
        parts["rollout"] = steps * decoding(policy, prompts * MEAN_PROMPT, speed)
        parts["rollout"] += own / speed.bytes
    prompts = prompts_of(config, gpus, sampled=False)
    learns = policy if stage in ("sft", "align", "rlvr") else None
    judged = {"discriminator": 2, "align": n + 1}.get(stage, 0)  # responses to a prompt
    for name, m, responses in (("judge", judge, prompts * judged), ("update", learns, prompts * n)):
        if not m:
            continue
        tokens = prompts * MEAN_PROMPT + responses * response
        pairs = prompts * MEAN_PROMPT**2 / 2 + responses * (MEAN_PROMPT * response + response**2)
        work = operations(m, tokens, pairs, responses * response if m is learns else 0)
        shares = DEALT if stage == "sft" else IDLE
        idle = shares[max((rows for rows in shares if rows <= responses), default=2)]
        idle = idle if gpus > 1 else 0  # a GPU alone waits for none
        parts[name] = work * get("num_iterations", 1) / speed.flops / (1 - idle)
    return parts


def hours(configs: dict, gpus: int, speed: Speed) -> str:
    """A table of the stages that `configs` names: what each takes, from the smaller to the larger
    of MEAN_RESPONSES. A stage of epochs is as long as on the published data."""
    lines = [f"| stage | steps | seconds a step | hours on {counted(gpus, 'GPU')} | GPU-hours |"]
    lines.append("|---" * 5 + "|")
    for name, config in configs.items():
        steps, (policy, judge) = config.max_steps, models(config)
        if steps <= 0:
            rows = ROWS[config.stage] * (1 - getattr(config, "validation_share", 0))
            batch = prompts_of(config, gpus, sampled=False) * gpus
            steps = math.ceil(rows * config.num_train_epochs / batch)
        parts = [seconds(config, policy, judge, gpus, mean, speed) for mean in MEAN_RESPONSES]
        step = [sum(part.values()) for part in parts]
        cells = []
        for factor in (1, steps / 3600, steps / 3600 * gpus):
            ends = [each * factor for each in step]
            digits = 0 if ends[0] >= 10 else 1 if ends[0] >= 1 else 2
            cells.append(f"{ends[0]:,.{digits}f} to {ends[1]:,.{digits}f}")
        lines.append(f"| {name} | {steps:,} | {' | '.join(cells)} |")
    return "\n".join(lines)


def answer(config) -> str:
    """What --dry_run prints."""
    said = table(config)
    if hasattr(config, "max_steps"):
        said += "\n\nEstimated for H100s; each range is for mean responses of {} to {} tokens"
        said = said.format(*MEAN_RESPONSES) + "; epochs are over the paper's rows:\n"
        said += hours({config.stage: config}, config.dry_run, Speed())
    return said
