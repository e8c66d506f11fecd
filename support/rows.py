"""Rows: what people's files hold -> Example, whatever its schema was.

It reads LLaMA-Factory's sharegpt-multimodal (`messages` or `conversations` with `images`), verl's
parquet (`prompt`, `reward_model`), pairs for the warm-up (`teacher_caption`, ...) and plain rows
(`question`, `image`, `response`, `answer`). A row is read and parsed when it is drawn, so memory
does not grow with the data. A row that cannot be used raises RowError: the caller leaves it out,
counts and names it. Nothing is dropped in silence, nothing is fetched from an address that a row
names, and nothing in a row is executed.
"""

import base64
import contextlib
import glob
import io
import itertools
import json
import math
import os
import re
from array import array
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from huggingface_hub import hf_hub_download, snapshot_download
from PIL import Image, ImageOps

from support.errors import RowError, UserError, counted, unreadable
from support.options import chosen, options_of, with_options
from support.verifier import verify


@dataclass
class Example:
    """One row of a data set, whatever its schema was."""

    index: int  # its place among all rows, by which eval's results name it
    where: str  # "file:line", for messages
    messages: list[dict]  # the turns before the response; an image stands as {"type": "image"}
    images: list[str | bytes]  # paths or encoded bytes, in the order of their placeholders
    response: str | None = None  # the demonstration (SFT), or the supervision response y+
    student: str | None = None  # the other side of a warm-up pair
    answer: list[str] | None = None  # the accepted answers, RLVR's ground truth
    captions: list[str] = field(default_factory=list)  # accepted captions, where there are any
    source: str = "data"


# The fields of Example that a stage may need, and how a row gives them.
FIELDS = {
    "response": "a last assistant turn, `response`, `teacher_response`, or `teacher_caption` and "
    "`teacher_cot`",
    "student": "`student_response`, or `student_caption` and `student_cot`; or pass --policy, "
    "which writes every student anew",
    "answer": "`answer`, or `reward_model` with `ground_truth`",
}


class Examples(Sequence):
    """The rows of some sources, one source after the other, as Examples.

    A row is read and parsed when it is asked for, so memory does not grow with the data.
    `need` names the fields of Example that a stage cannot do without; a row without one of them
    raises RowError. A row without a system turn is given `system_prompt`, where there is one.
    Images lie in the folder of the file that names them, or below it, or in `image_dir`."""

    def __init__(self, sources: list[str], need=(), system_prompt=None, image_dir=None):
        self.need, self.defaults = need, (system_prompt, image_dir)
        self.tables = [_open_source(source) for source in sources]
        self.ends = list(itertools.accumulate(len(table) for _, table in self.tables))
        self.for_next_stage: dict = {}  # settings that it has to share, see data.load_examples

    def __len__(self) -> int:
        return self.ends[-1]

    def __getitem__(self, i):
        if isinstance(i, slice):
            return [self[j] for j in range(*i.indices(len(self)))]
        if not 0 <= i < len(self):
            raise IndexError(i)
        _, table, at = self._place(i)
        where = self.where(i)
        try:
            row = table[at]
            example = parse_row(row, i, where, *self.defaults)
            for name in self.need:
                if not getattr(example, name):
                    raise RowError(
                        f"row without `{name}`, or with an empty one: found {_held(row)}, "
                        f"expected {FIELDS[name]}"
                    )
            return example
        except RowError as error:
            error.where = where
            raise
        except Exception as error:  # a row can be wrong in ways that raise any kind
            bad = RowError(f"cannot be understood ({type(error).__name__}: {str(error)[:200]})")
            bad.where = where
            raise bad from None

    def system_prompt(self, most: int = 32) -> str:
        """The system turn that most rows have, judged by `most` rows from all over the data; ""
        for none."""
        found = Counter()
        for i in range(0, len(self), math.ceil(len(self) / most)):
            with contextlib.suppress(RowError):
                first = self[i].messages[0]
                parts = first["content"] if first["role"] == "system" else []
                found["".join(part.get("text", "") for part in parts)] += 1
        return max(found, key=found.get, default=self.defaults[0] or "")

    def where(self, i: int) -> str:
        """What messages call row `i`, whether or not it can be read."""
        source, table, at = self._place(i)
        return f"{source}:{table.numbers[at]}" if isinstance(table, Lines) else f"{source}[{at}]"

    def _place(self, i: int) -> tuple:
        """-> (source, its table, the row's number in that table)."""
        part = bisect_right(self.ends, i)
        return *self.tables[part], i - (self.ends[part - 1] if part else 0)


def load_data(sources, need=(), system_prompt=None, image_dir: str | None = None) -> Examples:
    """Opens one source or several: JSON, JSONL, parquet or Arrow files, hub data sets
    (OWNER/NAME), or a file in one (hf://datasets/OWNER/NAME/FILE). UserError where one cannot be
    opened or holds no rows."""
    sources = [sources] if isinstance(sources, str) else sources
    return Examples(sources, need, system_prompt, image_dir)


class Lines:
    """The lines of a JSONL file by their offsets; blank ones do not count."""

    def __init__(self, path: str):
        self.file = os.open(path, os.O_RDONLY)
        self.starts, self.numbers, at = array("q"), array("q"), 0
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    self.starts.append(at)
                    self.numbers.append(number)
                at += len(line)
        self.starts.append(at)

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, i: int) -> dict:
        # pread has no position that processes could share
        line = os.pread(self.file, self.starts[i + 1] - self.starts[i], self.starts[i])
        return json.loads(line.strip())


FORMATS = (".jsonl", ".json", ".parquet", ".arrow")


def _open_source(source: str):
    """-> (path or hub id, its rows: something with a length, indexed by row)."""
    path = source
    try:
        if source.startswith("hf://datasets/"):
            path = hub_file(source)
        if said := unreadable(path):
            raise UserError(f"--data {said}")
        if path.endswith(FORMATS) and not os.path.isfile(path):
            raise UserError(f"--data {source}: no such file; give a file, or a hub id")
        if path.endswith(".jsonl"):
            table = Lines(path)
        elif path.endswith(".json"):
            with open(path, encoding="utf-8") as file:
                table = json.load(file)
            if not isinstance(table, list):
                raise ValueError("expected a list of rows")
        else:
            table = _arrow_table(path)
    except UserError:
        raise
    except Exception as error:  # readers of parquet raise many kinds
        said = str(error).splitlines()[0] if str(error) else type(error).__name__
        remedy = "check the file"
        if not path.endswith(FORMATS):  # a hub data set, of which only the train split is read
            remedy = "check the name, or give one of its files: hf://datasets/OWNER/NAME/FILE"
        raise UserError(f"--data {source}: cannot be read ({said}); {remedy}") from None
    if not len(table):
        raise UserError(f"--data {source}: holds no rows; name another file")
    return path, table


def _arrow_table(path: str):
    """A parquet or Arrow file, or the train split of a hub data set, memory-mapped."""
    try:
        import datasets  # slow to import, and not needed for JSONL
    except ImportError:
        raise UserError(f"--data {path}: needs `datasets`; pip install datasets") from None
    if path.endswith(".parquet"):
        # A name is a pattern to `datasets`: that of x*.parquet would match other files as well.
        table = datasets.load_dataset("parquet", data_files=glob.escape(path), split="train")
    elif path.endswith(".arrow"):
        table = datasets.Dataset.from_file(path)
    elif not os.path.exists(path) and re.fullmatch(r"[\w.-]+/[\w.-]+", path):
        table = datasets.load_dataset(path, split="train")
    else:
        raise UserError(f"--data {path}: no JSON, JSONL, parquet, Arrow file or hub id; give one")

    def read(feature):  # images stay encoded until they are needed, JSON does not
        if hasattr(feature, "decode") and not isinstance(feature, datasets.Json):
            return type(feature)(decode=False)
        if isinstance(feature, dict):
            return type(feature)({name: read(part) for name, part in feature.items()})
        inner = getattr(feature, "feature", None)
        return feature if inner is None else datasets.List(read(inner))

    return ArrowRows(table.with_format("arrow"), read(table.features))


class ArrowRows:
    """The rows of a `datasets` table as dicts, read when asked for."""

    def __init__(self, table, features):
        self.table, self.features = table, features

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, at: int) -> dict:
        return self.features.decode_example(self.table[at].to_pylist()[0])


def at_hand(source: str) -> bool:
    """Whether a source is on this machine, so that nothing would be fetched."""
    hub = re.fullmatch(r"(?:hf://datasets/)?([\w.-]+/[\w.-]+)(?:/.+)?", source)
    if os.path.exists(source) or not hub:
        return os.path.exists(source)
    try:
        return bool(snapshot_download(hub[1], repo_type="dataset", local_files_only=True))
    except Exception:  # the hub's library has many kinds
        return False


def hub_file(source: str) -> str:
    """hf://datasets/OWNER/NAME/FILE -> a local path. The rows of a JSON file name images beside
    it, so for those the whole repository is fetched; a parquet file holds its images."""
    try:
        owner, name, file = source.removeprefix("hf://datasets/").split("/", 2)
    except ValueError:
        raise UserError(
            f"--data {source}: names no file; give hf://datasets/OWNER/NAME/FILE, or OWNER/NAME "
            f"for a whole data set"
        ) from None
    hub = dict(repo_id=f"{owner}/{name}", repo_type="dataset")
    if file.endswith(".parquet"):
        return hf_hub_download(filename=file, **hub)
    return os.path.join(snapshot_download(**hub), file)


ROLES = {"human": "user", "gpt": "assistant"} | {r: r for r in ("system", "user", "assistant")}


def parse_row(row: dict, index: int, where: str, system_prompt=None, image_dir=None) -> Example:
    """One row -> Example, or RowError. The fields of the row tell its schema: `messages` or
    `conversations` (sharegpt), a list `prompt` with `reward_model` (verl), else plain
    (`question` or `prompt`, `image` or `images`, `system`, `response`, `answer`, ...)."""
    if not isinstance(row, dict):
        raise RowError(f"a row must be a JSON object, found {type(row).__name__}")
    for name, value in row.items():
        if value and re.fullmatch(r"(?i)(video|audio)s?(_(path|file|url)s?)?", name):
            raise RowError(f"holds `{name}`, which no stage can use")
    turns = row.get("messages") or row.get("conversations") or row.get("prompt")
    response, plain = None, not isinstance(turns, list)
    if plain:
        question = _first(row, "question", "prompt")
        if not isinstance(question, str) or not question.strip():
            raise RowError(
                f"no question: found {_held(row)}, expected `messages`, or text in `question`, "
                f"with `image` where there is one"
            )
        turns = [("user", question)]
    else:
        turns = [_turn(turn) for turn in turns]
        turns = [turn for turn in turns if turn[0] != "system" or not _blank(turn[1])]
        if turns and turns[-1][0] == "assistant":
            response = _written(turns.pop()[1])
    if not any(role == "user" for role, _ in turns):
        raise RowError("no user turn; a row needs a question")
    options = options_of(row, turns)
    if any(map(_is_picture, options)):
        raise RowError("its options are images; write `<image 1>` there and name it in `image_1`")
    turns = with_options(turns, options)
    turns, images = _in_order(turns, _pictures(row))
    if plain and "<image>" not in turns[0][1]:
        turns = [("user", "<image>" * len(images) + turns[0][1])]
    if not _blank(row.get("system")):
        turns.insert(0, ("system", row["system"]))
    if system_prompt and turns[0][0] != "system":
        turns.insert(0, ("system", system_prompt))
    if any(role == "system" for role, _ in turns[1:]):
        raise RowError("a system turn that is not the first; join them into one")

    pending, ordered = iter(images), []  # ordered: the images in the order of their places
    messages = [
        {"role": role, "content": list(_parts(content, pending, ordered))}
        for role, content in turns
    ]
    left = len(list(pending))
    if left:
        raise RowError(
            f"{len(images) - left} <image> placeholders for "
            f"{counted(len(images), 'image')}; make them equal"
        )
    folders = [os.path.dirname(where), image_dir]
    truth = row.get("reward_model") or {}
    equivalent = row.get("equivalent_answers") or truth.get("equivalent_answers")
    answers = _accepted(row.get("answer")) or _accepted(truth.get("ground_truth"))
    answers = chosen(answers, options) + _accepted(equivalent)
    return Example(
        index=index,
        where=where,
        messages=messages,
        images=[_image_source(image, folders) for image in ordered],
        response=_text(response or row.get("response"), "response") or _side(row, "teacher"),
        student=_side(row, "student"),
        answer=answers or None,
        captions=_accepted(row.get("caption")),
        source=_text(str(row.get("source") or row.get("data_source") or "data")),
    )


def _first(fields: dict, *names: str):
    """The first of some fields that holds something: a table has null, "" or [] in the columns that
    a row of another schema does not use."""
    return next((fields[name] for name in names if fields.get(name) not in (None, "", [])), None)


def _held(row: dict) -> list[str]:
    """The fields of a row that hold something."""
    return sorted(name for name in row if _first(row, name) is not None)


def _turn(turn: dict) -> tuple[str, object]:
    """A turn of a conversation -> (role, content)."""
    role = _first(turn, "role", "from")
    if role not in ROLES:
        raise RowError(f"a turn has the role {str(role)[:80]!r}, expected one of {sorted(ROLES)}")
    beside = {name: value for name, value in turn.items() if name not in ("content", "value")}
    if _is_picture(beside):
        raise RowError("a turn names an image outside of its content; move it into `images`")
    return ROLES[role], _first(turn, "content", "value")


# Fields that hold a row's images, the most trusted first; texts, which may end like a file name.
PICTURES = "decoded_image images image image_path image_paths image_file image_url img img_path"
TEXTS = "question prompt system response answer caption teacher_response student_response"
TEXTS += " messages conversations reward_model"


def _pictures(row: dict) -> dict[int, object]:
    """Number -> picture, of all that a row names, from 1: in one of PICTURES, or in `image_1`,
    `image_2` and so on. RowError where a field that no stage reads names one: a question without
    its picture is another question."""
    held = [name for name in row if row[name] not in (None, "", [])]
    names = [name for known in PICTURES.split() for name in held if name.lower() == known]
    images = row[names[0]] if names else []
    found = dict(enumerate(images if isinstance(images, list) else [images], 1))
    for name in held:
        value = row[name]
        if name.lower() in PICTURES.split() + TEXTS.split():
            continue
        if numbered := re.fullmatch(r"(?i)(?:image|img)_?(\d+)", name):
            if found.setdefault(int(numbered[1]), value) != value:
                number = numbered[1]
                raise RowError(f"`{name}` and another field both give image {number}; rename one")
            continue
        another = re.search(SPEAKS, name) and not name.lower().endswith("id")  # no image_id
        if found and _is_address(value):
            another = False  # an address beside a picture is where it came from
        if _is_picture(value, name) and (another or not found):
            raise RowError(
                f"`{name}` names an image, a video or sound, and no stage reads it; call an image "
                f"of this row `image`, or remove the field"
            )
    return found


SPEAKS = "(?i)image|img|(?<!to)pic|photo|figure|video|audio"  # what names of pictures' fields hold


def _is_address(value) -> bool:
    """Whether a value is an address of the web."""
    return isinstance(value, str) and value.startswith(("http://", "https://"))


def _is_picture(value, name: str = "") -> bool:
    """Whether a field that nobody knows holds a picture, video or sound, or the name of one. An
    address is one if the field's name says so."""
    if isinstance(value, list):
        return any(_is_picture(part, name) for part in value)
    if isinstance(value, dict):
        within = (_is_picture(part, f"{name} {key}") for key, part in value.items())
        return bool(value.get("bytes")) or any(within)
    if not isinstance(value, str):
        return isinstance(value, bytes)
    address = _is_address(value)
    encoded = "iVBORw0KGgo|/9j/|UklGR|R0lGOD"  # PNG, JPEG, WEBP and GIF in base64
    suffixes = r"\.(?i:png|jpe?g|webp|gif|bmp|tiff?|mp4|webm|mov|avi|mkv|wav|mp3|flac)"
    suffixes += r"(?:[?#]\S*)?" if address else ""
    media = rf"data:image/|(?:{encoded})\S{{40}}|\S{{1,500}}{suffixes}$"
    return bool(re.match(media, value) or address and re.search(SPEAKS, name))


def _in_order(turns: list, pictures: dict[int, object]) -> tuple[list, list]:
    """-> (the turns, <image> in place of <image 1>, <image 2> and so on; the pictures in the order
    of these places, or of their numbers where there are none)."""
    found: list[int] = []

    def place(match) -> str:
        found.append(int(match[1]))
        return "<image>"

    turns = [
        (
            role,
            re.sub(r"<image[ _]?(\d+)>", place, content) if isinstance(content, str) else content,
        )
        for role, content in turns
    ]
    if not found:
        return turns, [pictures[number] for number in sorted(pictures)]
    if set(found) != pictures.keys():
        shown, held = sorted(set(found)), sorted(pictures)
        raise RowError(
            f"the text has places for images {shown}, but the row holds {held}; make them equal"
        )
    return turns, [pictures[number] for number in found]


def _blank(content) -> bool:
    """Whether a turn says nothing. A blank system turn is none."""
    if isinstance(content, list):
        return all(part.get("type") == "text" and _blank(part.get("text")) for part in content)
    return content is None or isinstance(content, str) and not content.strip()


def _parts(content, images: Iterator, ordered: list) -> Iterator[dict]:
    """A turn's content, text with <image> placeholders or a list of parts, as the parts that a
    chat template takes. Appends each image, from its part or the next of `images`, to `ordered`."""
    if isinstance(content, str):
        pieces, content, said = re.split(r"(<image>)", _text(content)), [], ""
        for piece in pieces:
            if content and not said:  # the line break behind images that begin a turn says nothing
                piece = piece.lstrip("\n")
            if piece == "<image>":
                content.append({"type": "image"})
            elif piece:
                content.append({"type": "text", "text": piece})
                said += piece
    if not isinstance(content, list):
        raise RowError(f"a turn's content must be text or parts, found {type(content).__name__}")
    for part in content:
        own = _first(part, "image", "image_url", "path", "url")
        kind, text = part.get("type"), part.get("text")
        if kind == "text" and isinstance(text, str) and not _first(part, "image", "image_url"):
            yield {"type": "text", "text": _text(text)}
        elif kind in ("image", "image_url") and not text:
            own = next(images, None) if own is None else own
            if own is None:
                raise RowError("more <image> placeholders than images; make them equal")
            ordered.append(own)
            yield {"type": "image"}
        else:
            raise RowError(f"a part that is neither text nor an image: {str(part)[:80]}")


def _written(content) -> str:
    """The last turn of an assistant as text."""
    parts = [] if content is None else list(_parts(content, itertools.repeat(""), []))
    if any(part["type"] == "image" for part in parts):
        raise RowError("the response holds an image, and no stage trains on one")
    return "".join(part["text"] for part in parts)


def _accepted(value) -> list[str]:
    """A ground truth -> the answers that it accepts. A list of several may also stand as JSON in a
    string, if all its members are strings. The release writes __EMPTY__ for no answer."""
    if isinstance(value, str) and value.startswith('["'):
        try:
            members = json.loads(value)
            value = members if all(isinstance(m, str) for m in members) else value
        except ValueError:
            pass
    if isinstance(value, (list, tuple)):
        return [answer for member in value for answer in _accepted(member)]
    if value is not None and not isinstance(value, (str, int, float)):
        raise RowError(f"an answer must be text or a number, found {type(value).__name__}")
    said = "" if value is None else _text(str(value))
    return [] if said.strip() in ("", "__EMPTY__") else [said]


def check_truth(answers: list[str], is_right: Callable = verify) -> None:
    """RowError where `is_right(answer, answers)` says of each of these accepted answers that it is
    wrong. No response of the row could be right then."""
    if not any(is_right(answer, answers) for answer in answers):
        raise RowError(
            f"no answer is right for the ground truth {answers}, not even itself; rewrite it, or "
            f"change what judges it (README.md, My own reward)"
        )


def _side(row: dict, side: str) -> str | None:
    """A pair's response: `<side>_response`, or `<side>_caption` and `<side>_cot` put together."""
    if row.get(f"{side}_response"):
        return _text(row[f"{side}_response"], f"{side}_response")
    names = (f"{side}_caption", f"{side}_cot")
    caption, cot = (_text(row.get(name), name) for name in names)
    if not caption or not cot:
        return None
    caption = caption.strip() if "<caption>" in caption else f"<caption>{caption.strip()}</caption>"
    return f"{caption}\n{cot.strip()}"


def _text(value, name: str = "") -> str | None:
    """A value that has to be text. `name` is the row's field, where it may hold something else."""
    if value is not None and not isinstance(value, str):
        found = f"{type(value).__name__}: {str(value)[:80]}"
        raise RowError(f"expected text in `{name}`, found {found}; write text there")
    if value is not None and not value.isascii() and re.search("[\ud800-\udfff]", value):
        raise RowError("a text holds half of a surrogate pair, which no tokenizer can encode")
    return value


def _image_source(image, folders: list[str | None]) -> str | bytes:
    """A path, encoded bytes, a data URI, or a dict of these -> bytes or an existing path in one of
    the folders."""
    if isinstance(image, dict):
        encoded = image.get("bytes")
        if isinstance(encoded, str) and not encoded.startswith("data:"):
            encoded = base64.b64decode(encoded)  # as JSON has bytes
        image = encoded or image.get("path") or image.get("url")
    if isinstance(image, str) and image.startswith("data:"):
        image = base64.b64decode(image.partition(",")[2])
    if isinstance(image, bytes):
        return image
    if not isinstance(image, str):
        raise RowError(f"an image must be a path or encoded bytes, found {type(image).__name__}")
    if "\0" in image:
        raise RowError(f"image {image[:80]!r}: a path has no NUL; name the file")
    if _is_address(image):
        raise RowError(
            f"image {image[:80]}: addresses are not fetched; download it beside the data"
        )
    for folder in (os.path.abspath(folder) for folder in folders if folder is not None):
        path = os.path.normpath(os.path.join(folder, image.removeprefix("file://")))
        if path.startswith(os.path.join(folder, "")):
            if said := unreadable(path):
                raise RowError(f"image {said}")
            if os.path.isfile(path):
                return path
    raise RowError(
        f"image {image[:200]} is not below the data file's folder or --image_dir; set --image_dir"
    )


IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")  # EPS would start Ghostscript
MAX_RATIO = 200  # of an image's sides, as the processors of the Qwen-VL family have it


def open_image(source: str | bytes) -> Image.Image:
    """The picture in RGB, upright, on white where it is transparent. RowError if it is none (D20),
    or if one side is more than MAX_RATIO times the other: processors that give the shorter side a
    fixed length would make the longer one huge. Grey of more than 8 bits is scaled from its full
    range, which for floats is 1, 255 or 65535."""
    try:
        file = io.BytesIO(source) if isinstance(source, bytes) else source
        image = Image.open(file, formats=IMAGE_FORMATS)
        size = f"{image.width} x {image.height} pixels"
        if image.width * image.height > Image.MAX_IMAGE_PIXELS:
            raise ValueError(f"{size} are too many")
        if max(image.size) > MAX_RATIO * min(image.size):
            raise ValueError(f"{size}; one side may be at most {MAX_RATIO} times the other")
        image = ImageOps.exif_transpose(image)
        if image.mode[0] in "IF":
            floats = image.convert("F")
            white = next((w for w in (1, 255) if floats.getextrema()[1] <= w), 65535)
            white = 65535 if image.mode.startswith("I") else white
            grey = floats.point(lambda x: x * (255 / white) + 0.5).convert("L")
            if isinstance(clear := image.info.get("transparency"), int):
                grey.paste(255, mask=Image.fromarray(np.asarray(floats) == clear))
            return grey.convert("RGB")
        if image.has_transparency_data:
            image = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
            return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert(
                "RGB"
            )
        return image.convert("RGB")
    except Exception as error:  # PIL raises many kinds; each means that the picture is not usable
        name = source if isinstance(source, str) else "(bytes)"
        raise RowError(f"image {name} cannot be opened ({error})") from None
