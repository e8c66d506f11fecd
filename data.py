"""Data: rows in the wild -> prompts and branches as tensors -> packs.

Everything PRISM computes is one prompt (system + image + question) followed by several continuations, its *branches*:

    stage 1, SFT         one demonstration                                          1 branch
    stage 2, alignment   N rollouts for the policy; two views of each rollout and
                         of the supervision response for the discriminator          N and 2N + 2 branches
    stage 3, RLVR        N rollouts                                                 N branches

so one structure serves all stages, the prompt once and its branches behind it, in one row:

    [ prompt | branch 0 | branch 1 | ... ]      a branch sees the prompt and itself, never a sibling

A branch's rotary positions go on from the prompt's last one + 1 (all three mrope rows), as if it stood there alone, so
the packed forward equals separate forwards exactly, while the prompt and its image are computed once. A `Pack` is one
such row, or several one after the other, cut by a token budget; it is also what micro-batching is here.

The file knows the schemas (sharegpt-multimodal, plain, verl's parquet, warm-up pairs), images, the chat template, the
response format of the paper (`<caption>...</caption><think>...</think><answer>...</answer>`), and nothing of models.
"""

import copy
import io
import itertools
import json
import os
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

# Before torch is imported: threads that wait for each other spin for some tenths of a millisecond, then sleep. Sampling is
# many short operations between which a thread should not fall asleep: waking it costs up to half of the time. To spin for
# long, the default, makes a step thirty times slower where another process wants the same cores (give each one thread then).
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import torch
from huggingface_hub import snapshot_download
from PIL import Image
from transformers import (
    AutoProcessor,
    PreTrainedTokenizerBase,
    ProcessorMixin,
    Qwen2Tokenizer,
    Qwen3VLProcessor,
)


class UserError(Exception):
    """Something the user can mend. Its text, one line that names the thing and the remedy, is all that is printed."""


# --------------------------------------------------------------------------------------------------------------------
# The response format


@dataclass(frozen=True)
class Response:
    """A response in the paper's format. The caption is perception; think and answer are reasoning."""

    caption: str
    think: str
    answer: str


BLOCKS = ("caption", "think", "answer")
TAGS = [tag for name in BLOCKS for tag in (f"<{name}>", f"</{name}>")]
FORMAT = re.compile(
    r"\s*" + r"\s*".join(f"<{name}>(.*)</{name}>" for name in BLOCKS) + r"\s*", re.S
)


def parse_response(text: str) -> Response | None:
    """`<caption>...</caption><think>...</think><answer>...</answer>`: each block once, in order, none empty, white space
    alone between them. None for anything else. Linear in the text's length."""
    if not isinstance(text, str) or any(text.count(tag) != 1 for tag in TAGS):
        return None  # each tag once: nothing nested, and one way at most for the pattern to match
    match = FORMAT.fullmatch(text)
    blocks = [block.strip() for block in match.groups()] if match else [""]
    return Response(*blocks) if all(blocks) else None


# --------------------------------------------------------------------------------------------------------------------
# Rows


@dataclass
class Example:
    """One row of a data set, whatever its schema was."""

    index: int  # its place in the file: the row's identity in seeds, logs and metrics
    where: str  # "file:line", for messages
    messages: list[dict]  # the turns before the response; an image stands as {"type": "image"}
    images: list[
        str | bytes
    ]  # paths or encoded bytes, in the order of their placeholders; opened when needed
    response: str | None = (
        None  # the demonstration (SFT), or the supervision response y+ (alignment)
    )
    student: str | None = None  # the other side of a warm-up pair
    answer: list[str] | None = None  # the ground truth and its equivalents
    captions: list[str] = field(default_factory=list)  # accepted captions, where the data give them
    source: str = "data"


def read_rows(path: str) -> list[tuple[str, dict]]:
    """(where, row) for every row of a JSON, JSONL or parquet file, or of a dataset on the hub (its train split)."""
    if not os.path.exists(path) and (os.path.splitext(path)[1] or path.count("/") != 1):
        raise UserError(
            f"--data {path}: no such file; give a JSON, JSONL or parquet file, or a hub id"
        )
    if os.path.isdir(path):
        raise UserError(f"--data {path} is a directory; name the JSON, JSONL or parquet file in it")
    try:
        if path.endswith(".jsonl"):
            with open(path, encoding="utf-8") as file:
                rows = []
                for number, line in enumerate(file, 1):
                    if line.strip():
                        rows.append((f"{path}:{number}", json.loads(line)))
        elif path.endswith(".json"):
            with open(path, encoding="utf-8") as file:
                rows = [(f"{path}[{number}]", row) for number, row in enumerate(json.load(file))]
        else:
            import datasets

            local = os.path.exists(path)
            table = datasets.load_dataset(
                *(["parquet"] if local else [path]),
                split="train",
                **({"data_files": path} if local else {}),
            )
            for (
                name,
                feature,
            ) in table.features.items():  # images stay encoded until they are needed
                if "Image(" in repr(feature) and isinstance(feature, datasets.Image):
                    table = table.cast_column(name, datasets.Image(decode=False))
            rows = [(f"{path}[{number}]", row) for number, row in enumerate(table)]
    except json.JSONDecodeError as error:
        raise UserError(
            f"--data {path}: not JSON near line {error.lineno if path.endswith('.json') else len(rows) + 1}"
            f" ({error.msg}); mend or remove it"
        ) from None
    except (OSError, ValueError, UnicodeDecodeError) as error:
        raise UserError(f"--data {path}: cannot be read ({str(error).splitlines()[0]})") from None
    if not rows:
        raise UserError(f"--data {path}: holds no rows")
    return rows


ROLES = {
    "human": "user",
    "gpt": "assistant",
    "system": "system",
    "user": "user",
    "assistant": "assistant",
}


def parse_row(row: dict, index: int, where: str) -> Example:
    """One row -> Example. Recognised by its fields: `messages`/`conversations` (sharegpt), `prompt` + `reward_model`
    (verl), else plain (`question` or `prompt`, `image` or `images`, optional `system`, `response`, `answer`, ...)."""
    if not isinstance(row, dict):
        raise UserError(f"{where}: a row must be a JSON object, found {type(row).__name__}")
    images = row.get("images") or row.get("image") or []
    images = images if isinstance(images, list) else [images]
    folder = os.path.dirname(where)
    images = [_image_source(image, folder, where) for image in images]

    turns = row.get("messages") or row.get("conversations") or row.get("prompt")
    response = None
    if isinstance(turns, list):
        try:
            turns = [
                (ROLES[turn.get("role", turn.get("from"))], turn.get("content", turn.get("value")))
                for turn in turns
            ]
        except (KeyError, AttributeError):
            raise UserError(
                f"{where}: a turn needs a role among {sorted(ROLES)} and a content"
            ) from None
        if turns and turns[-1][0] == "assistant":
            response = turns.pop()[1]
    else:
        question = row.get("question", row.get("prompt"))
        if not isinstance(question, str) or not question.strip():
            raise UserError(
                f"{where}: found fields {sorted(row)}, expected `messages`, or `question` with `image(s)`"
            )
        if "<image>" not in question:
            question = "<image>" * len(images) + question
        turns = [("system", row["system"])] if row.get("system") else []
        turns.append(("user", question))
    if not any(role == "user" for role, _ in turns):
        raise UserError(f"{where}: no user turn; a row needs a question")
    messages = [{"role": role, "content": _content(content, where)} for role, content in turns]
    placeholders = sum(
        part["type"] == "image" for message in messages for part in message["content"]
    )
    if placeholders != len(images):
        raise UserError(
            f"{where}: {placeholders} <image> placeholders for {len(images)} images; make them equal"
        )

    truth = row.get("reward_model") or {}
    answer = row.get("answer", truth.get("ground_truth"))
    equivalent = row.get("equivalent_answers") or truth.get("equivalent_answers") or []
    answers = [str(a) for a in ([answer] if answer not in (None, "") else []) + list(equivalent)]
    captions = row.get("caption") or []
    return Example(
        index=index,
        where=where,
        messages=messages,
        images=images,
        response=_text(
            response or row.get("response") or _side(row, "teacher", where), "the response", where
        ),
        student=_text(_side(row, "student", where), "the student's response", where),
        answer=answers or None,
        captions=[captions] if isinstance(captions, str) else list(captions),
        source=str(row.get("source") or row.get("data_source") or "data"),
    )


def _side(row: dict, side: str, where: str) -> str | None:
    """A pair's response: `<side>_response`, or `<side>_caption` and `<side>_cot` put together."""
    if row.get(f"{side}_response"):
        return row[f"{side}_response"]
    caption, cot = (
        _text(row.get(f"{side}_{part}") or None, f"{side}_{part}", where)
        for part in ("caption", "cot")
    )
    if caption is None or cot is None:
        return None
    caption = caption.strip() if "<caption>" in caption else f"<caption>{caption.strip()}</caption>"
    return f"{caption}\n{cot.strip()}"


def _text(value, name: str, where: str) -> str | None:
    if value is not None and not isinstance(value, str):
        raise UserError(f"{where}: {name} must be text, found {type(value).__name__}")
    return value


def _content(content, where: str) -> list[dict]:
    """Text with <image> placeholders, or a list of parts, as the parts that a chat template takes."""
    if isinstance(content, list):
        return [
            {"type": "image"}
            if part.get("type") == "image"
            else {"type": "text", "text": part["text"]}
            for part in content
        ]
    if not isinstance(content, str):
        raise UserError(f"{where}: a turn's content must be text, found {type(content).__name__}")
    parts = []
    for piece in re.split(r"(<image>)", content):
        if piece == "<image>":
            parts.append({"type": "image"})
        elif piece:
            parts.append({"type": "text", "text": piece.lstrip("\n") if parts else piece})
    return parts


def _image_source(image, folder: str, where: str) -> str | bytes:
    if isinstance(image, dict):
        image = image.get("bytes") or image.get("path")
    if isinstance(image, bytes):
        return image
    if not isinstance(image, str):
        raise UserError(
            f"{where}: an image must be a path or encoded bytes, found {type(image).__name__}"
        )
    path = os.path.join(folder, image)
    if not os.path.isfile(path):
        raise UserError(
            f"{where}: image {path} does not exist; image paths are relative to the data file"
        )
    return path


# How a row says what a stage may need.
FIELDS = {
    "response": "a last assistant turn, `response`, `teacher_response`, or `teacher_caption` and `teacher_cot`",
    "student": "`student_response`, or `student_caption` and `student_cot`",
    "answer": "`answer`, or `reward_model` with `ground_truth`",
}


def load_data(path: str, need: tuple[str, ...] = ()) -> list[Example]:
    """All rows of a data set; `need` names the fields of Example (keys of FIELDS) that a stage cannot do without."""
    examples = []
    for index, (where, row) in enumerate(read_rows(path)):
        example = parse_row(row, index, where)
        for name in need:
            if not getattr(example, name):
                raise UserError(
                    f"{where}: row without `{name}`, which this stage needs: found {sorted(row)}, expected "
                    f"{FIELDS[name]}"
                )
        for image in example.images:
            open_image(image, where, header_only=True)  # now, not hours into a run
        examples.append(example)
    return examples


def open_image(source: str | bytes, where: str, header_only: bool = False) -> Image.Image:
    """The picture, in RGB; with `header_only` it is only found out that it is one."""
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
            return image if header_only else image.convert("RGB")
    except Exception as error:  # PIL raises many kinds; each means that the picture is not usable
        name = source if isinstance(source, str) else "(bytes)"
        raise UserError(
            f"{where}: image {name} cannot be opened ({error}); mend it or remove the row"
        ) from None


def batch_indices(
    step: int, batch_size: int, rows: int, seed: int, total: int | None = None
) -> list[int]:
    """Rows of global batch number `step`: a cut of the endless stream of shuffled epochs, so that a batch depends on
    neither the number of ranks nor on where a run was resumed. `total` ends the stream (the last batch may be short)."""
    end = (step + 1) * batch_size if total is None else min((step + 1) * batch_size, total)
    orders = {}
    out = []
    for position in range(step * batch_size, end):
        epoch, place = divmod(position, rows)
        if epoch not in orders:
            orders[epoch] = torch.randperm(
                rows, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch)
            )
        out.append(int(orders[epoch][place]))
    return out


# --------------------------------------------------------------------------------------------------------------------
# Tensors


@dataclass
class Prompt:
    """System + image + question, up to where the response begins. L tokens, I images.

    Images are what the model's processor makes of them: in the Qwen-VL family V patches of d values and each image's grid, in
    models with images of one size (LLaVA, InternVL) pixels alone, one entry an image or tile.
    """

    index: int  # the row's identity
    input_ids: torch.Tensor  # (L,)
    position_ids: (
        torch.Tensor
    )  # (3, L), mrope; three times the same where a model counts tokens only
    pixel_values: torch.Tensor | None = None  # (V, d), or (I, channels, height, width)
    image_grid_thw: torch.Tensor | None = None  # (I, 3)

    @property
    def next_position(self) -> int:
        return int(self.position_ids.max()) + 1


@dataclass
class Group:
    """A prompt and its branches, each a (T_i,) tensor of token ids; with the log-probabilities they were sampled at."""

    prompt: Prompt
    branches: list[torch.Tensor]
    logprobs: list[torch.Tensor] = field(default_factory=list)


def encode_prompts(
    processor, examples: list[Example], max_image_size: int | None = None
) -> list[Prompt]:
    """Examples -> Prompts, through the processor in one call (a call costs more than a row). Images whose long side is
    more than `max_image_size` pixels are scaled down to it."""
    texts = processor.apply_chat_template(
        [e.messages for e in examples], add_generation_prompt=True, tokenize=False
    )
    images = [[open_image(image, e.where) for image in e.images] for e in examples]
    if max_image_size is not None:
        for image in (image for some in images for image in some):
            image.thumbnail((max_image_size, max_image_size))
    for example, text in zip(examples, texts):
        if text.count(processor.image_token) != len(
            example.images
        ):  # the model would look for an image that is not there
            raise UserError(
                f"{example.where}: the text contains {processor.image_token}, which stands for images; remove it"
            )
    try:
        inputs = processor(text=texts, images=images if any(images) else None)
    except (ValueError, IndexError, StopIteration) as error:
        if len(examples) > 1:  # which row is it?
            return [
                prompt
                for e in examples
                for prompt in encode_prompts(processor, [e], max_image_size)
            ]
        raise UserError(
            f"{examples[0].where}: the processor refuses the row ({error}); mend or remove it"
        ) from None
    known = {
        "input_ids",
        "attention_mask",
        "mm_token_type_ids",
        "token_type_ids",
        "pixel_values",
        "image_grid_thw",
    }
    unknown = set(inputs) - known
    if unknown:
        raise UserError(
            f"{type(processor).__name__} gives {', '.join(sorted(unknown))} with an image; only models that take "
            f"pixel_values, with or without image_grid_thw, can be trained here"
        )
    if (
        any(images) and "image_grid_thw" not in inputs and len(examples) > 1
    ):  # nothing says which pixels are whose
        return [
            prompt for e in examples for prompt in encode_prompts(processor, [e], max_image_size)
        ]
    grids = torch.as_tensor(inputs.get("image_grid_thw", torch.zeros(0, 3, dtype=torch.long)))
    pixels = torch.as_tensor(inputs["pixel_values"]) if any(images) else None
    prompts, image, patch = [], 0, 0
    for example, ids in zip(examples, inputs["input_ids"]):
        ids, grid = torch.tensor(ids), grids[image : image + len(example.images)]
        if len(grid):
            positions = mrope_positions(
                ids, grid, processor.image_token_id, processor.image_processor.merge_size
            )
            patches = int(grid.prod(1).sum())
            own = pixels[patch : patch + patches], grid
            image, patch = image + len(grid), patch + patches
        else:
            positions = torch.arange(len(ids)).expand(3, -1)
            own = (pixels, None) if example.images else (None, None)
        prompts.append(Prompt(example.index, ids, positions, *own))
    return prompts


def mrope_positions(
    ids: torch.Tensor, grid: torch.Tensor, image_token_id: int, merge: int
) -> torch.Tensor:
    """(3, L): temporal, height and width position of each token. Text counts on in all three; an image of h x w tokens
    spans its rows and columns from where the text was, and the text goes on max(h, w) later (Qwen2-VL, 2409.12191)."""
    columns, at, next_position = [], 0, 0
    grids = iter(grid.tolist())
    marks = (ids == image_token_id).tolist()
    while at < len(ids):
        if marks[at]:
            t, h, w = next(grids)
            h, w = h // merge, w // merge
            columns.append(
                torch.cartesian_prod(torch.arange(t), torch.arange(h), torch.arange(w)).T
                + next_position
            )
            at, next_position = at + t * h * w, next_position + max(h, w)
        else:
            end = marks.index(True, at) if True in marks[at:] else len(ids)
            columns.append((next_position + torch.arange(end - at)).expand(3, -1))
            at, next_position = end, next_position + end - at
    return torch.cat(columns, 1)


def batches(
    examples: list[Example],
    processor,
    batch_size: int,
    seed: int,
    start: int = 0,
    total: int | None = None,
    part: tuple[int, int] = (0, 1),
    max_image_size: int | None = None,
) -> Iterator[list[tuple[Example, Prompt]]]:
    """This rank's share (`part` = rank, ranks) of global batches number `start`, `start` + 1, ...; the next one is
    encoded in a thread, with its own copy of the processor, while the current one is used."""
    copied = copy.deepcopy(processor)

    def encode(number: int) -> list[tuple[Example, Prompt]]:
        chosen = [
            examples[i]
            for i in batch_indices(number, batch_size, len(examples), seed, total)[
                part[0] :: part[1]
            ]
        ]
        return list(zip(chosen, encode_prompts(copied, chosen, max_image_size))) if chosen else []

    with ThreadPoolExecutor(1) as pool:
        following = pool.submit(encode, start)
        for number in itertools.count(start + 1):
            batch = following.result()
            following = pool.submit(encode, number)
            yield batch


def encode_text(processor, text: str) -> torch.Tensor:
    """Text -> (T,) token ids. Special tokens written out in the text are encoded as the text that they are."""
    ids = processor.tokenizer(text, add_special_tokens=False, split_special_tokens=True)[
        "input_ids"
    ]
    return torch.tensor(ids, dtype=torch.long)


def encode_response(processor, text: str) -> torch.Tensor:
    """A response as a branch: its tokens and the end of sequence."""
    return torch.cat(
        [encode_text(processor, text), torch.tensor([processor.tokenizer.eos_token_id])]
    )


def decode(processor, branch: torch.Tensor) -> str:
    """A branch as text, without its end of sequence; other special tokens stay visible (they break the format)."""
    ids = branch.tolist()
    while ids and ids[-1] in (processor.tokenizer.eos_token_id, processor.tokenizer.pad_token_id):
        ids.pop()
    return processor.tokenizer.decode(ids, skip_special_tokens=False)


def encode_views(processor, response: Response) -> tuple[torch.Tensor, torch.Tensor]:
    """The two views of a response as branches: perception (caption block), reasoning (think and answer blocks).

    Teacher and student both come through here: the blocks are laid out in one canonical way and tokenised once, the
    boundary is the first token whose character offset lies at or behind the think block, and both views end in the
    same end of sequence. So white space, sampled token boundaries or a missing end cannot tell the two sides apart.
    """
    caption = f"<caption>{response.caption}</caption>\n"
    text = f"{caption}<think>{response.think}</think>\n<answer>{response.answer}</answer>"
    encoded = processor.tokenizer(
        text, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True
    )
    ids = torch.tensor(encoded["input_ids"], dtype=torch.long)
    boundary = sum(start < len(caption) for start, _ in encoded["offset_mapping"])
    eos = torch.tensor([processor.tokenizer.eos_token_id])
    return torch.cat([ids[:boundary], eos]), torch.cat([ids[boundary:], eos])


def blank_group(processor) -> Group:
    """A blank image that nobody reads. Sharded ranks put it into packs without images, so that every rank calls the
    vision tower's collectives; no branch attends to it, so values and gradients stay exactly what they were."""
    picture = io.BytesIO()
    Image.new("RGB", (1, 1)).save(picture, "PNG")  # the processor makes it as large as it must be
    blank = Example(
        -1,
        "the blank image",
        [{"role": "user", "content": [{"type": "image"}]}],
        [picture.getvalue()],
    )
    return Group(encode_prompts(processor, [blank])[0], [])


# --------------------------------------------------------------------------------------------------------------------
# Packs


@dataclass
class Segment:
    """A prompt and its branches inside a pack: where the prompt starts, its length, the branches' lengths."""

    start: int
    prompt: int
    branches: list[int]


@dataclass
class Pack:
    """One row of T tokens: prompts, each with its branches behind it. K is the number of branch tokens in the pack."""

    input_ids: torch.Tensor  # (1, T)
    position_ids: torch.Tensor  # (3, 1, T)
    pixel_values: torch.Tensor | None
    image_grid_thw: torch.Tensor | None
    segments: list[Segment]
    members: list[tuple[int, int]]  # (group, branch) of each branch, in the order of the row
    predictors: (
        torch.Tensor
    )  # (K,) where in the row each branch token is predicted: one token earlier
    targets: torch.Tensor  # (K,) the branch tokens
    ends: torch.Tensor  # (branches,) where in the row each branch's last token stands

    @property
    def lengths(self) -> list[int]:
        return [length for segment in self.segments for length in segment.branches]

    @property
    def mask(self) -> torch.Tensor:
        """(B, T) boolean: the real tokens of the pack's branches as padded rows."""
        lengths = torch.tensor(self.lengths, device=self.targets.device)
        return torch.arange(max(self.lengths, default=0), device=lengths.device) < lengths[:, None]

    def rows(self, flat: torch.Tensor) -> torch.Tensor:
        """(K,) values, one a branch token, as (B, T) padded rows (padding 0)."""
        mask = self.mask
        return torch.zeros(mask.shape, dtype=flat.dtype, device=flat.device).masked_scatter(
            mask, flat
        )

    def to(self, device) -> "Pack":
        for name in (
            "input_ids",
            "position_ids",
            "pixel_values",
            "image_grid_thw",
            "predictors",
            "targets",
            "ends",
        ):
            value = getattr(self, name)
            setattr(self, name, value if value is None else value.to(device, non_blocking=True))
        return self


def make_packs(
    groups: list[Group], max_tokens: int | None = None, unit: int = 1, shared: int = 0
) -> list[Pack]:
    """Groups -> packs of at most `max_tokens` tokens (None: all in one); a group too long for what is left goes on in
    the next pack, its prompt repeated there. `unit` neighbouring branches stay together, and a group's first `shared`
    branches are repeated with the prompt (the discriminator compares every rollout with the supervision response)."""
    bins: list[list[tuple[int, list[int]]]] = []
    used = 0
    for g, group in enumerate(groups):
        lengths = [len(branch) for branch in group.branches]
        head = list(range(shared))
        base = len(group.prompt.input_ids) + sum(lengths[:shared])
        units = [list(range(i, i + unit)) for i in range(shared, len(lengths), unit)] or [[]]
        fresh = True  # the group has no part in the current pack yet
        for members in units:
            cost = sum(lengths[i] for i in members) + (base if fresh else 0)
            if not bins or (max_tokens is not None and used + cost > max_tokens and used > 0):
                bins.append([])
                used, fresh = 0, True
                cost = sum(lengths[i] for i in members) + base
            if fresh:
                bins[-1].append((g, head.copy()))
                fresh = False
            bins[-1][-1][1].extend(members)
            used += cost
    return [_pack(groups, parts) for parts in bins]


def _pack(groups: list[Group], parts: list[tuple[int, list[int]]]) -> Pack:
    ids, positions, pixels, grids, segments, members, predictors, targets, ends = (
        [],
        [],
        [],
        [],
        [],
        [],
        [],
        [],
        [],
    )
    at = 0
    for g, chosen in parts:
        prompt = groups[g].prompt
        segments.append(
            Segment(at, len(prompt.input_ids), [len(groups[g].branches[i]) for i in chosen])
        )
        ids.append(prompt.input_ids)
        positions.append(prompt.position_ids)
        if prompt.pixel_values is not None:
            pixels.append(prompt.pixel_values)
        if prompt.image_grid_thw is not None:
            grids.append(prompt.image_grid_thw)
        at += len(prompt.input_ids)
        last, following = at - 1, prompt.next_position
        for i in chosen:
            branch = groups[g].branches[i]
            ids.append(branch)
            positions.append((following + torch.arange(len(branch))).expand(3, -1))
            where = at + torch.arange(len(branch))
            predictors.append(torch.cat([torch.tensor([last]), where[:-1]])[: len(branch)])
            targets.append(branch)
            members.append((g, i))
            at += len(branch)
            ends.append(at - 1)
    empty = torch.zeros(0, dtype=torch.long)
    return Pack(
        input_ids=torch.cat(ids)[None],
        position_ids=torch.cat(positions, 1)[:, None],
        pixel_values=torch.cat(pixels) if pixels else None,
        image_grid_thw=torch.cat(grids) if grids else None,
        segments=segments,
        members=members,
        predictors=torch.cat([empty, *predictors]),
        targets=torch.cat([empty, *targets]),
        ends=torch.tensor(ends, dtype=torch.long),
    )


# --------------------------------------------------------------------------------------------------------------------
# The processor: tokenizer, image processor, chat template, loaded and saved with or without torchvision
#
# transformers opens a Qwen3-VL processor only where torchvision is installed, because it insists on a video processor, and
# without it AutoProcessor quietly returns a bare tokenizer. PRISM needs no video, so the same processor is built here without
# that part. What is written is the layout of the published Qwen3-VL directories, one JSON file a part, all class names
# transformers' own: AutoProcessor opens it wherever torchvision is installed.

# All that a published directory, or transformers 5, may hold besides weights, config.json and generation_config.json.
PROCESSOR_FILES = (
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "processor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.json",
    "chat_template.jinja",
)


class ImageTextProcessor(Qwen3VLProcessor):
    """Qwen3VLProcessor without its video processor: transformers reads the parts it requires off this signature."""

    def __init__(self, image_processor=None, tokenizer=None, chat_template=None, **kwargs):
        super().__init__(image_processor, tokenizer, None, chat_template=chat_template, **kwargs)

    def save_pretrained(self, save_directory, **kwargs):
        save_processor(
            self, save_directory
        )  # transformers' own would write this class's name, which nobody else knows


def load_processor(path: str | Path) -> Qwen3VLProcessor:
    """The processor of a directory or hub id, in the published layout or the one that transformers 5 writes."""
    directory = Path(path)
    if not directory.is_dir():
        directory = Path(
            snapshot_download(str(path), allow_patterns=[*PROCESSOR_FILES, "config.json"])
        )
    try:
        processor = AutoProcessor.from_pretrained(directory)
    except ImportError:  # the video processor wants torchvision
        processor = None
    if not isinstance(
        processor, ProcessorMixin
    ):  # or the same is passed over, and a bare tokenizer comes back
        processor = ImageTextProcessor.from_pretrained(directory)
    if processor.chat_template is None:  # it may stand in tokenizer_config.json only
        processor.chat_template = processor.tokenizer.chat_template
    processor.original_files = _read_files(directory)
    return processor


def save_processor(processor: Qwen3VLProcessor, path: str | Path) -> None:
    """Write the processor beside a checkpoint. Files it was loaded from come back byte for byte, so nothing is lost."""
    if not isinstance(
        processor, Qwen3VLProcessor
    ):  # another model's layout, of which only its own files are known here
        for name, content in processor.original_files.items():
            (Path(path) / name).write_bytes(content)
        return
    image = json.loads(processor.image_processor.to_json_string())
    write_processor(
        path,
        processor.tokenizer,
        image,
        processor.chat_template,
        getattr(processor, "original_files", {}),
    )


def write_processor(
    path: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    image: dict,
    chat_template: str,
    original_files: dict[str, bytes] | None = None,
) -> None:
    """Write the published layout from its parts. `original_files` replace what would be written in their place."""
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    vocab = sorted(backend["model"]["vocab"].items(), key=lambda item: item[1])
    merges = [
        merge if isinstance(merge, str) else " ".join(merge) for merge in backend["model"]["merges"]
    ]
    added = {
        str(i): token.__getstate__() for i, token in sorted(tokenizer.added_tokens_decoder.items())
    }
    special = [token["content"] for token in added.values() if token["special"]]
    # The "Pil" and "Fast" variants are picked when opened: the name of the plain class serves every version.
    image = image | {
        "processor_class": "Qwen3VLProcessor",
        "image_processor_type": "Qwen2VLImageProcessor",
    }
    shared = ("patch_size", "temporal_patch_size", "merge_size", "image_mean", "image_std")
    video = {key: image[key] for key in shared} | {
        "size": {
            "longest_edge": 25165824,
            "shortest_edge": 4096,
        },  # pixels of a whole clip, as published
        "processor_class": "Qwen3VLProcessor",
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
        "tokenizer_class": "Qwen2Tokenizer"
        if type(tokenizer) is Qwen2Tokenizer
        else "PreTrainedTokenizerFast",
        "unk_token": None,
    }
    files = {
        "preprocessor_config.json": _json(image),
        "video_preprocessor_config.json": _json(video),
        "tokenizer.json": _json(backend),
        "tokenizer_config.json": _json(tokenizer_config),
        "vocab.json": json.dumps(dict(vocab), ensure_ascii=False).encode(),
        "merges.txt": "\n".join(["#version: 0.2", *merges, ""]).encode(),
        "chat_template.json": _json({"chat_template": chat_template}),
    }
    if "chat_template.jinja" in (original_files or {}):
        del files["chat_template.json"]  # one source for the template: two could drift apart
    Path(path).mkdir(parents=True, exist_ok=True)
    for name, content in (files | (original_files or {})).items():
        (Path(path) / name).write_bytes(content)


def _read_files(directory: Path) -> dict[str, bytes]:
    """The processor's files as they are; Qwen's nested file of transformers 5 taken apart into the two published ones."""
    files = {
        name: (directory / name).read_bytes()
        for name in PROCESSOR_FILES
        if (directory / name).is_file()
    }
    nested = json.loads(files.get("processor_config.json", b"{}"))
    if "Qwen" not in nested.get("processor_class", "Qwen"):
        return files
    files.pop("processor_config.json", None)
    for part, name in (
        ("image_processor", "preprocessor_config.json"),
        ("video_processor", "video_preprocessor_config.json"),
    ):
        if part in nested:
            files[name] = _json(nested[part] | {"processor_class": "Qwen3VLProcessor"})
    return files


def _json(content: dict) -> bytes:
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()
