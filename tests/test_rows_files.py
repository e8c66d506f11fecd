"""Files of rows: JSON, JSONL and parquet give the same examples, a row is parsed when it is drawn,
and a file that cannot be read is one line."""

import io
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pyarrow
import pytest
from PIL import Image
from pyarrow import parquet

from data import encode_prompts
from support import rows
from support.errors import RowError, UserError
from support.huggingface import load_processor
from support.rows import load_data, open_image
from tests.conftest import ROOT
from tests.test_rows import PIXEL, PLAIN, VERL, write


@pytest.fixture(scope="module")
def processor(world):
    return load_processor(world["init"])


def test_opening_parses_nothing(tmp_path, monkeypatch):
    """A row is parsed when it is drawn, each time, and only that row."""
    path = write(tmp_path, *[{"question": f"{i}"} for i in range(50)], "{broken", "7")
    parsed = []
    parse = rows.parse_row
    monkeypatch.setattr(rows, "parse_row", lambda row, *a: parsed.append(row) or parse(row, *a))
    examples = load_data(path)
    assert len(examples) == 52 and parsed == []
    assert examples[7].index == 7 and parsed == [{"question": "7"}]
    assert [e.index for e in examples[10:13]] == [10, 11, 12] and len(parsed) == 4
    with pytest.raises(IndexError):
        examples[52]
    with pytest.raises(RowError, match="JSONDecodeError"):
        examples[50]


def test_memory_does_not_grow_with_the_data(tmp_path):
    """What is kept of a JSONL file is where its lines start."""
    path = write(tmp_path, *["{" + f'"question": "{"x" * 10_000}"' + "}"] * 300)
    examples = load_data(path)
    held = [x for x in vars(examples.tables[0][1]).values() if hasattr(x, "itemsize")]
    assert sum(len(x) * x.itemsize for x in held) < 20 * 301
    assert not any(isinstance(x, (list, dict, str)) for x in vars(examples.tables[0][1]).values())
    assert len(examples[299].messages[0]["content"][0]["text"]) == 10_000


def test_blank_lines_do_not_count_and_keep_the_numbers(tmp_path):
    lines = ["", json.dumps({"question": "a"}), "  \t", "", json.dumps({"question": "é"}), ""]
    path = write(tmp_path, *lines)
    with open(path, "a") as file:
        file.write(json.dumps({"question": "c"}))  # no line break at the end
    examples = load_data(path)
    assert [e.where for e in examples] == [f"{path}:{n}" for n in (2, 5, 7)]
    assert [e.messages[0]["content"][0]["text"] for e in examples] == ["a", "é", "c"]
    assert [e.index for e in examples] == [0, 1, 2]


def test_every_format_gives_the_same_examples(tmp_path):
    import datasets
    import pyarrow as pa
    import pyarrow.parquet as pq

    whole = [VERL | {"images": [{"bytes": PIXEL, "path": None}]}, VERL]
    text = [VERL, VERL | {"data_source": "t"}]
    write(tmp_path, *text)
    (tmp_path / "data.json").write_text(json.dumps(text))
    pq.write_table(pa.Table.from_pylist(whole), tmp_path / "data.parquet")
    data = datasets.Dataset.from_list(whole)
    data.save_to_disk(tmp_path / "arrow")
    arrow = next((tmp_path / "arrow").glob("*.arrow")).rename(tmp_path / "data.arrow")
    paths = [str(tmp_path / name) for name in ("data.jsonl", "data.json", "data.parquet")]
    several = load_data([*paths, str(arrow)], need=("answer", "response"))
    assert len(several) == 8 and [e.index for e in several] == list(range(8))
    places = [f"{paths[0]}:{i}" for i in (1, 2)]
    places += [f"{path}[{i}]" for path in (*paths[1:], arrow) for i in (0, 1)]
    assert [e.where for e in several] == places
    for example in several:
        assert example.answer == ["2", "two"] and example.response == "two"
    images = [e.images[0] for e in several]
    assert images == [str(tmp_path / "a.png")] * 4 + [PIXEL, str(tmp_path / "a.png")] * 2
    assert [e.source for e in several] == ["s", "t", "s", "t", "s", "s", "s", "s"]


def test_parquet_with_encoded_images(tmp_path, processor):
    import pyarrow as pa
    import pyarrow.parquet as pq

    row = {
        "prompt": [{"role": "user", "content": "<image>q"}],
        "images": [{"bytes": PIXEL, "path": None}],
        "data_source": "s",
        "reward_model": {"ground_truth": "3", "style": "rule"},
        "teacher_response": "r",
    }
    pq.write_table(pa.Table.from_pylist([row] * 2), tmp_path / "rows.parquet")
    examples = load_data(str(tmp_path / "rows.parquet"), need=("answer", "response"))
    assert len(examples) == 2 and examples[0].answer == ["3"] and examples[0].images == [PIXEL]
    assert encode_prompts(processor, examples)[1].image_grid_thw.tolist() == [[1, 2, 2]]


def test_parquet_with_image_features(tmp_path, processor, monkeypatch):
    """As `datasets` writes it: lists of images, one image, and images inside messages, all still
    encoded when a row is drawn."""
    import datasets

    picture = Image.open(io.BytesIO(PIXEL))
    part = {"type": datasets.Value("string"), "image": datasets.Image()}
    part["text"] = datasets.Value("string")
    turn = {"role": datasets.Value("string"), "content": datasets.List(part)}
    text = {"type": "text", "image": None, "text": "q"}
    inline = {"type": "image", "image": picture, "text": None}
    word = datasets.Value("string")
    for i, (column, feature, value) in enumerate(
        [
            ("images", datasets.List(datasets.Image()), [picture, picture]),
            ("image", datasets.Image(), picture),
            ("messages", datasets.List(turn), [{"role": "user", "content": [inline, text]}]),
        ]
    ):
        row = {column: [value]} | ({} if column == "messages" else {"question": ["q"]})
        features = {column: feature} | dict.fromkeys(set(row) - {column}, word)
        path = str(tmp_path / f"{i}.parquet")
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", path[:-8] + ".cache")
        datasets.Dataset.from_dict(row, features=datasets.Features(features)).to_parquet(path)
        (example,) = load_data(path)
        assert all(isinstance(image, bytes) for image in example.images)
        assert [open_image(image).size for image in example.images] == [(1, 1)] * (1 + (i == 0))
        written = list(Path(path).with_suffix(".cache").glob("**/*.arrow"))
        assert len(written) == 1  # what datasets makes of the file; no second copy of it
        (prompt,) = encode_prompts(processor, [example])
        assert len(prompt.image_grid_thw) == len(example.images)


def test_parquet_with_json_columns(tmp_path):
    """`datasets` keeps a column of mixed types as JSON: it is read, not shown as text."""
    import datasets

    parts = [{"type": "text", "text": "How many?"}]
    rows = [
        {"messages": [{"role": "user", "content": content}], "answer": answer}
        for content, answer in ((parts, ["2", "two"]), ("Which?", "cat"))
    ]
    write(tmp_path, *rows)
    path = str(tmp_path / "data.parquet")
    datasets.load_dataset("json", data_files=str(tmp_path / "data.jsonl"))["train"].to_parquet(path)
    assert "Json" in str(datasets.Dataset.from_parquet(path).features)
    examples = [*load_data(path, need=("answer",))]
    assert [e.answer for e in examples] == [["2", "two"], ["cat"]]
    assert [e.messages[0]["content"][-1]["text"] for e in examples] == ["How many?", "Which?"]


@pytest.mark.parametrize("path", ["no/such/file.jsonl", "missing.json", "."])
def test_bad_paths(path):
    with pytest.raises(UserError, match="--data"):
        load_data(path)


@pytest.mark.parametrize("name", ["data.jsonl", "data.json", "data.parquet", "data.arrow"])
@pytest.mark.parametrize("content", [b"", b"\x00\xff broken {"])
def test_files_that_cannot_be_read_are_one_line(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content)
    if name == "data.jsonl" and content:  # a line is a row, which is read when it is drawn
        with pytest.raises(RowError):
            load_data(str(path))[0]
        return
    with pytest.raises(UserError, match="--data .*data") as error:
        load_data(str(path))
    assert "\n" not in str(error.value)


def test_a_parquet_file_whose_pages_are_damaged_is_one_line(tmp_path):
    path = tmp_path / "data.parquet"
    parquet.write_table(pyarrow.Table.from_pylist([PLAIN] * 50), path)
    content = path.read_bytes()
    path.write_bytes(content[:10] + content[12:])  # its footer is whole
    with pytest.raises(UserError, match="--data .*data.parquet: cannot be read"):
        load_data(str(path))


@pytest.mark.parametrize(
    "source, remedy",
    [
        ("hf://datasets/owner/name", "names no file; give hf://datasets/OWNER/NAME/FILE, or OWNER"),
        ("owner/name", "or give one of its files: hf://datasets/OWNER/NAME/FILE"),
    ],
)
def test_a_hub_data_set_that_cannot_be_read_is_said_by_what_can(source, remedy):
    with pytest.raises(UserError, match=f"--data {source}: ") as error:
        load_data(source)
    assert remedy in str(error.value) and "\n" not in str(error.value)


def test_the_name_of_a_parquet_file_is_no_pattern(tmp_path):
    for name in ("x*", "xy", "a[1]", "q?", "**"):
        table = pyarrow.Table.from_pylist([{"question": name, "answer": "1"}])
        parquet.write_table(table, tmp_path / f"{name}.parquet")
    for name in ("x*", "xy", "a[1]", "q?", "**"):
        (example,) = load_data(str(tmp_path / f"{name}.parquet"))
        assert example.messages[0]["content"][0]["text"] == name


AS_ANOTHER = """
import os, sys
from support.errors import RowError, UserError
from support.rows import load_data

if os.getuid() == 0:
    os.setuid(65534)  # nobody
for path in sys.argv[1:]:
    try:
        load_data(path)[0]
    except (RowError, UserError) as error:
        print(error)
"""


def test_what_a_user_may_not_read_is_named():
    """A data file or an image, by itself or within a folder that this user may not enter. They lie
    in a folder that every user reaches, unlike pytest's own."""
    with tempfile.TemporaryDirectory() as folder:
        top = Path(folder).resolve()
        closed, single, row = top / "closed", top / "single.jsonl", top / "row.jsonl"
        closed.mkdir()
        (closed / "a.png").write_bytes(PIXEL)
        row.write_text(json.dumps({"question": "q", "image": "closed/a.png"}))
        for path in (single, closed / "rows.json", top / "b.parquet"):
            path.write_text("[]")
        os.chmod(top, 0o755)
        for path in (closed, single, top / "b.parquet"):
            os.chmod(path, 0o600)
        paths = [single, closed / "rows.json", top / "b.parquet", row]
        command = [sys.executable, "-c", AS_ANOTHER, *map(str, paths)]
        env = os.environ | {"PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, capture_output=True, text=True, env=env)
        os.chmod(closed, 0o755)
    enter = f"{closed}: this user may not enter it; ask its owner for chmod a+x {closed}"
    read = "this user may not read it; ask its owner for chmod a+r"
    refused = [f"--data {path}: {read} {path}" for path in (single, top / "b.parquet")]
    lines = [refused[0], f"--data {enter}", refused[1], f"image {enter}"]
    assert done.stdout.splitlines() == lines, done.stderr


@pytest.mark.parametrize("content", ['{"question": "q"}', "3", "[]"])
def test_json_that_is_no_list_of_rows(tmp_path, content):
    (tmp_path / "data.json").write_text(content)
    with pytest.raises(UserError, match="--data .*(expected a list of rows|holds no rows)"):
        load_data(str(tmp_path / "data.json"))


@pytest.mark.parametrize(
    "name", ["owner/name", "open-r1/some.data-1.5", "prism-vlm/gemini_distill"]
)
def test_hub_ids(monkeypatch, name):
    """Names with dots, dashes and underscores are hub ids; their train split is read."""
    import datasets

    asked = []
    table = datasets.Dataset.from_list([{"question": "q", "answer": "1"}])
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: asked.append((a, k)) or table)
    (example,) = load_data(name, need=("answer",))
    assert asked == [((name,), {"split": "train"})] and example.where == f"{name}[0]"
