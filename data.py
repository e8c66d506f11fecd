"""Data: rows (support/rows.py) -> prompts and branches as tensors -> packs.

Everything PRISM computes is one prompt (system + image + question) followed by several
continuations, its *branches*:

    stage 1, SFT         one demonstration                                         1 branch
    stage 2, alignment   the policy: N rollouts                                    N branches
                         the discriminator: two views of each rollout, and two of
                         the supervision response                                  2N + 2 branches
    stage 3, RLVR        N rollouts                                                N branches

So one structure serves all stages. The prompt stands once, its branches behind it, in one row:

    [ prompt | branch 0 | branch 1 | ... ]      a branch sees the prompt and itself, no sibling

The rotary positions of a branch go on from the prompt's last one, as if the branch stood there
alone. The packed forward therefore equals separate forwards, and the prompt with its image is
computed once. A `Pack` is such a row, or several one after the other, cut by a token budget.
Packs are what micro-batches are elsewhere.

This file knows the response format of the paper, and how a processor turns text and images into
ids, pixels and rotary positions. It touches no weights of a model.
"""

import io
import itertools
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from PIL import Image

from support.errors import RowError, Unfit, UserError
from support.huggingface import read_shared, write_chats
from support.ranks import all_max, say, world_size
from support.rows import Example, Examples, load_data, open_image

# --------------------------------------------------------------------------------------------------
# The response format


@dataclass(frozen=True)
class Response:
    """A response in the paper's format: the caption is perception, the rest reasoning."""

    caption: str
    think: str
    answer: str


BLOCKS = ("caption", "think", "answer")
TAGS = ("<caption>", "</caption>", "<think>", "</think>", "<answer>", "</answer>")
RESPONSE = r"\s*<caption>(.*)</caption>\s*<think>(.*)</think>\s*<answer>(.*)</answer>\s*"

# The system turn of a row that has none, where neither --system_prompt nor the checkpoint has
# another (D14). It describes the format.
SYSTEM_PROMPT = (
    "Answer in three blocks, in this order and with nothing around them. First describe all that "
    "the image shows and the question needs: <caption>...</caption>. Then reason step by step: "
    "<think>...</think>. Then give the final answer alone: <answer>...</answer>."
)


def parse_response(text: str) -> Response | None:
    """Splits `<caption>...</caption><think>...</think><answer>...</answer>`.

    Each block stands once, in this order, none is empty, and only white space stands between and
    around them. Anything else gives None. Takes time linear in the length of the text.
    Takes along: Response, TAGS, RESPONSE."""
    if not isinstance(text, str) or any(text.count(tag) != 1 for tag in TAGS):
        return None  # with each tag once, the pattern can match in one way at most
    match = re.fullmatch(RESPONSE, text, re.DOTALL)
    if match is None:
        return None
    blocks = [block.strip() for block in match.groups()]
    return Response(*blocks) if all(blocks) else None


def supervision_response(example: Example) -> Response:
    """The supervision response y+ of a row. RowError where it is of broken format (D10)."""
    response = parse_response(example.response)
    if response is None:
        raise RowError(
            "the supervision response is not of the format <caption>, <think>, <answer>; rewrite it"
        )
    return response


# --------------------------------------------------------------------------------------------------
# Prompts and branches as tensors


@dataclass
class Prompt:
    """System + image + question, up to where the response begins. L tokens, I images.

    Images are what the model's processor makes of them. The Qwen-VL family has V patches of d
    values, and the grid of each image. A model with images of one size has pixels alone."""

    index: int  # place in the stream of rows; keys the sampling, so each visit of a row has its own
    input_ids: torch.Tensor  # (L,)
    position_ids: torch.Tensor  # (3, L), mrope; three equal rows where a model counts tokens only
    pixel_values: torch.Tensor | None = None  # (V, d), or (I, channels, height, width)
    image_grid_thw: torch.Tensor | None = None  # (I, 3)

    @property
    def next_position(self) -> int:
        """The position of the first token of every branch."""
        return int(self.position_ids.max()) + 1


@dataclass
class Group:
    """A prompt and its branches."""

    prompt: Prompt
    branches: list[torch.Tensor]  # (T_i,) token ids of branch i
    logprobs: list[torch.Tensor] = field(default_factory=list)  # (T_i,) each; [] if not sampled

    @property
    def num_tokens(self) -> int:
        """Tokens of the prompt and of all branches."""
        return len(self.prompt.input_ids) + sum(map(len, self.branches))


@dataclass
class Comparison:
    """A prompt, its supervision response, and the students that are compared with it; a student
    whose format is broken is None."""

    prompt: Prompt
    teacher: Response
    students: list[Response | None]


def limit_pixels(processor, max_pixels: int) -> None:
    """Sets the largest image to `max_pixels` pixels, by the processor's own resizing. Sides are
    rounded to whole patches and an image has at least one, so a small limit may be exceeded.
    UserError where the processor does not count pixels."""
    images = processor.image_processor
    if not hasattr(images, "merge_size"):
        raise UserError(f"--max_pixels: {type(images).__name__} resizes to one size; leave it out")
    least = min(images.size["shortest_edge"], max_pixels)  # pixel counts, whatever their names say
    images.size = type(images.size)(shortest_edge=least, longest_edge=max_pixels)


def encode_prompts(processor, examples, max_image_size: int | None = None) -> list:
    """Examples -> Prompts through the processor, in one call, since calls cost more than rows.
    A row that cannot be encoded gives a RowError in its place. Images whose long side has more
    than `max_image_size` pixels are scaled down to it."""
    if not examples:
        return []
    try:
        return _encode_prompts(processor, examples, max_image_size)
    except RowError as error:
        if len(examples) == 1:
            error.where = examples[0].where
            return [error]
    # One of several rows is bad. Each is encoded by itself, so that only the bad one is lost.
    prompts = []
    for example in examples:
        prompts += encode_prompts(processor, [example], max_image_size)
    return prompts


def _encode_prompts(processor, examples, max_image_size) -> list[Prompt]:
    """The prompts of all examples, from one call of the processor. RowError where any of them is
    bad, or where they must be encoded one by one."""
    # Refuse a text with a control token, which the tokenizer would read as one.
    chats = [example.messages for example in examples]
    special = processor.tokenizer.all_special_tokens
    for message in itertools.chain.from_iterable(chats):
        for part in message["content"]:
            for token in special:
                if token in part.get("text", ""):
                    raise RowError(f"the text contains {token}, a control token; remove it")
    # Write the chats by the model's template, and open and scale the images.
    texts = write_chats(processor, chats)
    images = []  # of each row
    for example in examples:
        images.append([open_image(image) for image in example.images])
    try:
        if max_image_size is not None:
            for image in itertools.chain.from_iterable(images):
                image.thumbnail((max_image_size, max_image_size))
        # The tokenizer adds its begin-of-sequence token, unless the template has written it.
        begin = processor.tokenizer.bos_token
        adding = not (begin and begin in texts[0])
        pictures = images if any(images) else None
        inputs = processor(text=texts, images=pictures, add_special_tokens=adding)
    except Exception as error:  # processors raise many kinds, MemoryError among them
        why = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise RowError(f"the processor refuses the row ({why})") from None
    known = {"input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids"}
    unknown = set(inputs) - known - {"pixel_values", "image_grid_thw"}
    if unknown:
        raise UserError(
            f"{type(processor).__name__} gives {', '.join(sorted(unknown))} with an image; choose "
            f"a model that takes pixel_values only, with or without image_grid_thw"
        )
    # Without grids nothing says which pixels are whose, so `encode_prompts` goes row by row.
    if any(images) and "image_grid_thw" not in inputs and len(examples) > 1:
        raise RowError("the images of several rows have no grids; encode one row at a time")
    # Give each row its own images. The patches of all images stand one after the other.
    grids = torch.as_tensor(inputs.get("image_grid_thw", torch.zeros(0, 3, dtype=torch.long)))
    # A list of arrays goes through numpy, which joins them 30 times as fast as torch.
    pixels = torch.as_tensor(np.asarray(inputs["pixel_values"])) if any(images) else None
    prompts = []
    next_image = next_patch = 0
    for example, ids in zip(examples, inputs["input_ids"]):
        ids = torch.tensor(ids)
        grid = grids[next_image : next_image + len(example.images)]
        own_pixels = own_grid = None
        if len(grid):
            merge = processor.image_processor.merge_size
            positions = mrope_positions(ids, grid, processor.image_token_id, merge)
            patches = int(grid.prod(1).sum())
            own_pixels, own_grid = pixels[next_patch : next_patch + patches], grid
            next_image += len(grid)
            next_patch += patches
        else:
            positions = torch.arange(len(ids)).expand(3, -1)
            if example.images:
                own_pixels = pixels
        # The index is the row's number until `Encoded` puts the place in the stream there.
        prompts.append(Prompt(example.index, ids, positions, own_pixels, own_grid))
    return prompts


def mrope_positions(ids, grid, image_token_id: int, merge: int) -> torch.Tensor:
    """The temporal, height and width position of each token (Qwen2-VL, 2409.12191). ids (L,), grid
    (I, 3): the patches of each image in time, height and width. A token stands for merge x merge
    patches. -> (3, L).

    Text counts on in all three rows. An image of h x w tokens spans its rows and columns from
    where the text was, and the text goes on max(h, w) later."""
    pieces = []  # (3, length) of each stretch of text and each image
    at = next_position = 0
    grids = iter(grid.tolist())
    is_image = (ids == image_token_id).tolist()
    while at < len(ids):
        if is_image[at]:
            t, h, w = next(grids)
            h, w = h // merge, w // merge
            place = torch.cartesian_prod(torch.arange(t), torch.arange(h), torch.arange(w)).T
            pieces.append(place + next_position)
            at += t * h * w
            next_position += max(h, w)
        else:
            end = is_image.index(True, at) if True in is_image[at:] else len(ids)
            pieces.append((next_position + torch.arange(end - at)).expand(3, -1))
            next_position += end - at
            at = end
    return torch.cat(pieces, 1)


def encode_response(processor, text: str) -> torch.Tensor:
    """A response as a branch: its tokens and the end of sequence, (T,). Special tokens that are
    written out in the text are encoded as the text that they are."""
    ids = processor.tokenizer(text, add_special_tokens=False, split_special_tokens=True)
    return torch.tensor([*ids["input_ids"], processor.tokenizer.eos_token_id])


def decode(processor, branch: torch.Tensor, stop_ids=()) -> str:
    """A branch as text, without the token that ended it: the end of sequence, or one of the
    policy's `stop_ids`. Other special tokens stay visible, and so break the format."""
    ids = branch.tolist()
    if ids and ids[-1] in {processor.tokenizer.eos_token_id, *map(int, stop_ids)}:
        ids.pop()
    return processor.tokenizer.decode(ids, skip_special_tokens=False)


def encode_views(processor, response: Response) -> tuple[torch.Tensor, torch.Tensor]:
    """The two views of a response as branches, (T,) token ids each: perception (the caption block)
    and reasoning (the think and answer blocks).

    Supervision and rollout both come through here. The blocks are laid out in one way and tokenised
    once. The reasoning view begins with the first token that starts at `<think>` or later, and both
    views end in the same end of sequence. So white space, sampled token boundaries or a missing end
    cannot tell the two sides apart."""
    caption = f"<caption>{response.caption}</caption>\n"
    text = f"{caption}<think>{response.think}</think>\n<answer>{response.answer}</answer>"
    encoded = processor.tokenizer(
        text, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True
    )
    boundary = sum(start < len(caption) for start, _ in encoded["offset_mapping"])
    ids, eos = encoded["input_ids"], processor.tokenizer.eos_token_id
    return torch.tensor([*ids[:boundary], eos]), torch.tensor([*ids[boundary:], eos])


def blank_group(processor, image: bool = True) -> Group:
    """A prompt of one blank image, or of a word, without branches. Sharded ranks put the image into
    packs that have none, so that every rank calls the collectives of the vision tower. No branch
    attends to it.
    UserError where the processor cannot encode even that."""
    picture = io.BytesIO()
    Image.new("RGB", (1, 1)).save(picture, "PNG")  # the processor makes it as large as it must be
    part = {"type": "image"} if image else {"type": "text", "text": "Blank."}
    chat, images = [{"role": "user", "content": [part]}], [picture.getvalue()] if image else []
    (prompt,) = encode_prompts(processor, [Example(-1, "blank", chat, images)])
    if isinstance(prompt, RowError):
        name = processor.tokenizer.name_or_path
        raise UserError(
            f"{name}: its processor cannot encode a blank image ({prompt}); choose another model"
        )
    return Group(prompt, [])


# --------------------------------------------------------------------------------------------------
# Rows that are encoded when they are drawn


def load_examples(config, need: tuple, *checkpoints: str) -> Examples:
    """The rows of a stage. `need` names what each row must have: response, student or answer.

    Every stage should show the model what the stage before showed it. So where --system_prompt or
    --max_pixels is not given, `config` gets the value with which the first checkpoint was trained;
    where none is known, SYSTEM_PROMPT and the processor's own limit. A line is printed for each
    value that differs from a checkpoint's.

    The rows' `.for_next_stage` holds both values, for a save to pass on. Its `system_prompt` is the
    system turn that most rows have."""
    before = read_shared(checkpoints[0])
    for name, default in {"system_prompt": SYSTEM_PROMPT, "max_pixels": None}.items():
        if getattr(config, name) is None:
            setattr(config, name, before.get(name, default))
    examples = load_data(config.data, need, config.system_prompt, config.image_dir)
    shared = {"system_prompt": examples.system_prompt(), "max_pixels": config.max_pixels}
    for path in checkpoints:
        for name, value in read_shared(path).items():
            if value != shared[name]:
                ours, theirs = _in_message(shared[name]), _in_message(value)
                remedy = f"set --{name}"
                if name == "system_prompt":
                    remedy += " or change the rows' own system turns"
                elif value is None and before.get(name) is None:
                    remedy = f"leave --{name} out"
                elif value is None:  # the first checkpoint has a limit, and the flag takes no none
                    remedy += " to that limit, which the model's preprocessor_config.json has"
                said = f"{path} was trained with {name} {theirs}; this run uses {ours}"
                say(f"{said}. To make them agree, {remedy}")
    examples.for_next_stage = shared
    return examples


def _in_message(value: str | int | None) -> str:
    """A shared setting as its flag takes it: a system prompt in quotes, or a number. None, which no
    flag takes, is said in words."""
    if value is None:
        return "none (the processor's own limit)"
    if not isinstance(value, str):
        return str(value)
    rest = f" ... ({len(value)} characters; prism.json has all)" if len(value) > 300 else ""
    return repr(value[:300]) + rest


class Encoded:
    """Rows that are encoded when they are drawn. `encode(example, prompt)` makes of a row what the
    stage trains on, or raises RowError. `limits` may hold max_prompt_length in tokens,
    max_image_size (see `encode_prompts`) and max_pixels (see `limit_pixels`)."""

    def __init__(self, examples, processor, encode: Callable, **limits):
        self.examples, self.processor = examples, processor
        self.encode, self.limits = encode, limits
        if limits.get("max_pixels"):
            limit_pixels(processor, limits["max_pixels"])
        blank_group(processor)  # a processor that can encode no row at all is refused here

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, draws: list[tuple[int, int]]) -> list[tuple[str, object]]:
        """Draws (place in the stream, number of the row) -> for each (where it comes from, what
        `encode` made of it or a RowError)."""
        # Read the rows. A row that cannot be read is a RowError, here and in what follows.
        items = [_attempt(self.examples.__getitem__, number) for _, number in draws]
        wheres = [item.where for item in items]
        readable = [i for i, item in enumerate(items) if not isinstance(item, RowError)]
        # Encode the prompts of the others, then what the stage makes of each.
        examples = [items[i] for i in readable]
        size = self.limits.get("max_image_size")
        prompts = encode_prompts(self.processor, examples, size)
        for i, example, prompt in zip(readable, examples, prompts):
            place, _ = draws[i]
            items[i] = self._finish(place, example, prompt)
            if isinstance(items[i], RowError):
                items[i].where = example.where
        return list(zip(wheres, items))

    def where(self, number: int) -> str:
        """What messages call row `number`, whether or not it can be read."""
        rows = self.examples
        if isinstance(rows, torch.utils.data.Subset):  # where some rows are held out
            rows, number = rows.dataset, rows.indices[number]
        return rows.where(number)

    def _finish(self, place: int, example: Example, prompt):
        """The item of a row whose prompt is encoded, or is a RowError."""
        if isinstance(prompt, RowError):
            return prompt
        longest = self.limits.get("max_prompt_length") or torch.inf
        length = len(prompt.input_ids)
        if length > longest:
            return Unfit(f"{length} tokens are more than --max_prompt_length {longest}")
        prompt.index = place
        return _attempt(self.encode, example, prompt)


def _attempt(function: Callable, *args):
    """What a function returns, or the RowError that it raises."""
    try:
        return function(*args)
    except RowError as error:
        return error


# --------------------------------------------------------------------------------------------------
# Packs


@dataclass
class Segment:
    """A prompt and its branches inside a pack."""

    start: int  # where the prompt starts
    prompt_length: int  # tokens
    branch_lengths: list[int]


@dataclass
class Pack:
    """One row of T tokens: prompts, each with its branches behind it. It has B branches, and the
    branches have K tokens together."""

    input_ids: torch.Tensor  # (1, T)
    position_ids: torch.Tensor  # (3, 1, T)
    pixel_values: torch.Tensor | None
    image_grid_thw: torch.Tensor | None
    segments: list[Segment]
    members: list[tuple[int, int]]  # (B,) group and branch, in the order of the row
    units: list[tuple[int, int]]  # (group, unit) of each unit that stands here; see make_packs
    predictors: torch.Tensor  # (K,) where in the row each branch token is predicted
    targets: torch.Tensor  # (K,) the branch tokens
    last_tokens: torch.Tensor  # (B,) where in the row each branch's last token stands

    @property
    def lengths(self) -> list[int]:
        """(B,) tokens of each branch."""
        return [length for segment in self.segments for length in segment.branch_lengths]

    @property
    def real_tokens(self) -> torch.Tensor:
        """(R,) the places of all prompts that have branches, and of their branches. Left out is a
        blank image: it keeps ranks in step and must reach no loss."""
        out = [torch.zeros(0, dtype=torch.long)]
        for segment in self.segments:
            if segment.branch_lengths:
                end = segment.start + segment.prompt_length + sum(segment.branch_lengths)
                out.append(torch.arange(segment.start, end))
        return torch.cat(out).to(self.input_ids.device)

    @property
    def mask(self) -> torch.Tensor:
        """(B, longest) boolean: where branches, as padded rows, have tokens."""
        lengths = torch.tensor(self.lengths, dtype=torch.long, device=self.targets.device)
        steps = torch.arange(max(self.lengths, default=0), device=lengths.device)
        return steps < lengths[:, None]

    def padded(self, flat: torch.Tensor) -> torch.Tensor:
        """(K,) values of the branch tokens -> (B, longest), a row for each branch, 0 as padding."""
        mask = self.mask
        out = torch.zeros(mask.shape, dtype=flat.dtype, device=flat.device)
        return out.masked_scatter(mask, flat)

    def to(self, device) -> "Pack":
        """A pack with its tensors on `device`."""
        tensors = {k: v for k, v in vars(self).items() if isinstance(v, torch.Tensor)}
        return replace(self, **{k: v.to(device, non_blocking=True) for k, v in tensors.items()})


def make_packs(groups: list[Group], max_tokens: int | None = None, units=None) -> list[Pack]:
    """Groups -> packs of at most `max_tokens` tokens (None: all in one); only a prompt with a
    single unit may have more.

    A group stands in the first pack that has room for all of it. Where none has, it begins in the
    last one and goes on in new ones, its prompt repeated there. `units` lists for each group the
    sets of branches that must stand in one pack, such as the four views of a pair (default: each
    branch by itself). A branch of several units stands once in every pack that needs it.
    Takes along: Prompt, Group, Segment, Pack, _pack."""
    parts_of: list[list[tuple[int, list[int], list[int]]]] = []  # of each pack, as `_pack` takes
    used: list[int] = []  # tokens of each pack
    limit = torch.inf if max_tokens is None else max_tokens
    for g, group in enumerate(groups):
        # Find the first pack that has room for the whole group, or else the last pack.
        at = len(used) - 1
        for i, tokens in enumerate(used):
            if tokens + group.num_tokens <= limit:
                at = i
                break
        group_units = [(i,) for i in range(len(group.branches))] if units is None else units[g]
        placed = placed_units = None  # in pack `at`; None while the prompt does not stand there
        for u, unit in enumerate(group_units or [()]):  # () stands for a prompt without branches
            unit_branches = list(dict.fromkeys(unit))
            added = [i for i in unit_branches if placed is None or i not in placed]
            cost = sum(len(group.branches[i]) for i in added)
            if placed is None:
                cost += len(group.prompt.input_ids)
            # Where the unit does not fit, begin a pack, with the prompt and the whole unit.
            if not used or used[at] + cost > limit:
                parts_of.append([])
                used.append(0)
                at = len(used) - 1
                placed, added = None, unit_branches
                cost = sum(len(group.branches[i]) for i in added) + len(group.prompt.input_ids)
            if placed is None:
                placed, placed_units = [], []  # the pack's own lists, which grow below
                parts_of[at].append((g, placed, placed_units))
            placed += added
            if unit:
                placed_units.append(u)
            used[at] += cost
    return [_pack(groups, parts) for parts in parts_of]


def _pack(groups: list[Group], parts: list[tuple[int, list[int], list[int]]]) -> Pack:
    """The pack of some parts of groups, one after the other: (group, its branches, its units)."""
    ids, positions, pixels, grids, segments, members = [], [], [], [], [], []
    predictors, targets, ends = [], [], []
    at = 0
    for g, chosen, _ in parts:
        prompt = groups[g].prompt
        branches = [groups[g].branches[i] for i in chosen]
        length = len(prompt.input_ids)
        segments.append(Segment(at, length, [len(branch) for branch in branches]))
        members += [(g, i) for i in chosen]
        ids += [prompt.input_ids, *branches]
        positions.append(prompt.position_ids)
        pixels.append(prompt.pixel_values)
        grids.append(prompt.image_grid_thw)
        at += length
        last = torch.tensor([at - 1])
        for branch in branches:
            steps = torch.arange(len(branch))
            positions.append((prompt.next_position + steps).expand(3, -1))
            # A branch's first token is predicted at the prompt's last, each other one at the token
            # before. The slice serves an empty branch, which has no token to predict.
            predictors.append(torch.cat([last, at + steps[:-1]])[: len(branch)])
            targets.append(branch)
            at += len(branch)
            ends.append(at - 1)
    pixels = [x for x in pixels if x is not None]
    grids = [x for x in grids if x is not None]
    none = torch.zeros(0, dtype=torch.long)
    return Pack(
        input_ids=torch.cat(ids)[None],
        position_ids=torch.cat(positions, 1)[:, None],
        pixel_values=torch.cat(pixels) if pixels else None,
        image_grid_thw=torch.cat(grids) if grids else None,
        segments=segments,
        members=members,
        units=[(g, u) for g, _, units in parts for u in units],
        predictors=torch.cat([none, *predictors]),
        targets=torch.cat([none, *targets]),
        last_tokens=torch.tensor(ends, dtype=torch.long),
    )


# --------------------------------------------------------------------------------------------------
# Packs on several ranks


def rank_packs(groups, processor, max_tokens: int | None = None, units=None) -> list[Pack]:
    """The packs of this rank's groups, by `make_packs` and `even_packs`: the same number on
    all ranks. Every rank calls it."""
    return even_packs(make_packs(groups, max_tokens, units), processor)


def even_packs(packs: list[Pack], processor) -> list[Pack]:
    """The packs of this rank, with blank ones added until all ranks have the same number. Where any
    pack of any rank has an image, every pack gets one. A forward of a sharded model is a
    collective: a rank with fewer packs, or without images, would hang the others. Where no rank has
    an image, blank packs have none either: a gradient of zero is still a step of AdamW, which would
    move the vision tower."""
    if world_size() == 1:
        return packs
    # One collective gives the most packs of a rank, whether any has an image, and the fewest packs.
    images = [pack.pixel_values is not None for pack in packs]
    most, any_images, minus_fewest = all_max([len(packs), any(images), -len(packs)]).tolist()
    if most == -minus_fewest and (all(images) or not any_images):
        return packs
    (blank,) = make_packs([blank_group(processor, image=bool(any_images))])
    packs = packs + [blank] * int(most - len(packs))
    return [_with_blank(p, blank) if any_images and p.pixel_values is None else p for p in packs]


def _with_blank(pack: Pack, blank: Pack) -> Pack:
    """A pack with the blank image behind it, to which no branch attends."""
    behind = replace(blank.segments[0], start=pack.input_ids.shape[1])
    return replace(
        pack,
        segments=[*pack.segments, behind],
        input_ids=torch.cat([pack.input_ids, blank.input_ids], 1),
        position_ids=torch.cat([pack.position_ids, blank.position_ids], 2),
        pixel_values=blank.pixel_values,
        image_grid_thw=blank.image_grid_thw,
    )
