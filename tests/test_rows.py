"""Rows as people write them -> examples: their schemas, and what is said of a bad row. Files of
rows are in test_rows_files.py, images in test_rows_images.py."""

import base64
import copy
import json
import os
import random

import pytest
from PIL import Image

from data import Response, encode_prompts, parse_response
from support import rows
from support.errors import RowError, UserError
from support.huggingface import load_processor
from support.rows import Example, load_data, parse_row

PIXEL = bytes.fromhex(
    "89504e470d0a1a0a0000000d49484452000000010000000108000000003a7e9b55"
    "0000000a49444154789c6360000000020001e221bc330000000049454e44ae426082"
)
URI = "data:image/png;base64," + base64.b64encode(PIXEL).decode()


@pytest.fixture(scope="module")
def processor(world):
    return load_processor(world["init"])


def write(tmp_path, *lines, name="data.jsonl") -> str:
    (tmp_path / "a.png").write_bytes(PIXEL)
    path = tmp_path / name
    path.write_text(
        "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in lines),
        encoding="utf-8",
    )
    return str(path)


# --------------------------------------------------------------------------------------------------
# Schemas

SHAREGPT = {
    "messages": [
        {"role": "user", "content": "<image>How many?"},
        {"role": "assistant", "content": "two"},
    ],
    "images": ["a.png"],
}
OLDER = {
    "conversations": [
        {"from": "human", "value": "<image>How many?"},
        {"from": "gpt", "value": "two"},
    ],
    "images": ["a.png"],
}
PLAIN = {
    "question": "How many?",
    "image": "a.png",
    "response": "two",
    "answer": 2,
    "source": "s",
}
VERL = {
    "prompt": [{"role": "user", "content": "<image>How many?"}],
    "images": [{"bytes": None, "path": "a.png"}],
    "reward_model": {"ground_truth": "2", "style": "rule", "equivalent_answers": ["two"]},
    "data_source": "s",
    "teacher_response": "two",
}
COT = "<think>t</think><answer>1</answer>"
PAIR = {
    "question": "q",
    "image": "a.png",
    "teacher_caption": "c",
    "teacher_cot": COT,
    "student_caption": "<caption>d</caption>",
    "student_cot": COT,
}
PARTS = {
    "messages": [
        {"role": "system", "content": [{"type": "text", "text": "Be brief."}]},
        {
            "role": "user",
            "content": [{"type": "image", "image": "a.png"}, {"type": "text", "text": "How many?"}],
        },
        {"role": "assistant", "content": [{"type": "text", "text": "two"}]},
    ]
}


def test_schemas_give_the_same_example(tmp_path):
    """sharegpt in both spellings, plain, and verl's layout, of one row."""
    a, b, c, d = load_data(write(tmp_path, SHAREGPT, OLDER, PLAIN, VERL))
    assert a.messages == b.messages == c.messages == d.messages
    assert a.images == b.images == c.images == d.images == [str(tmp_path / "a.png")]
    assert a.response == b.response == c.response == d.response == "two"
    assert (
        c.answer == ["2"]
        and d.answer == ["2", "two"]
        and c.source == d.source == "s"
        and a.answer is None
    )


@pytest.mark.parametrize("empty", [None, ""])
def test_empty_columns_hide_no_other(tmp_path, empty):
    """A table of several schemas has all columns in every row."""
    names = {*SHAREGPT, *OLDER, *PLAIN, *VERL, *PAIR, "system", "equivalent_answers", "caption"}
    turns = dict.fromkeys(("role", "from", "content", "value"), empty)
    filled = []
    for row in (SHAREGPT, OLDER, PLAIN, VERL, PAIR):
        row = dict.fromkeys(names, empty) | copy.deepcopy(row)
        for name in ("messages", "conversations", "prompt"):
            if isinstance(row[name], list):
                row[name] = [turns | turn for turn in row[name]]
        filled.append(row)
    plain = load_data(write(tmp_path, SHAREGPT, OLDER, PLAIN, VERL, PAIR))[:]
    assert load_data(write(tmp_path, *filled))[:] == plain
    asked = {"question": empty, "prompt": "How many?", "answer": empty}
    example = parse_row(asked | {"reward_model": {"ground_truth": "2"}}, 0, "f:1")
    assert example.answer == ["2"] and example.messages[0]["content"][0]["text"] == "How many?"


def test_warm_up_pairs(tmp_path):
    whole = {"prompt": "q", "image": "a.png", "teacher_response": "x", "student_response": "y"}
    a, b = load_data(write(tmp_path, PAIR, whole), need=("response", "student"))
    assert (
        parse_response(a.response) == Response("c", "t", "1")
        and parse_response(a.student).caption == "d"
    )
    assert (b.response, b.student) == ("x", "y")


@pytest.mark.parametrize(
    "image, expected",
    [
        ({"type": "image"}, "from images"),
        ({"type": "image", "image": "a.png"}, "path"),
        ({"type": "image", "path": "a.png"}, "path"),
        ({"type": "image", "url": "a.png"}, "path"),
        ({"type": "image", "image": URI}, PIXEL),
        ({"type": "image", "image": {"bytes": URI.partition(",")[2]}}, PIXEL),
        ({"type": "image", "image": {"bytes": PIXEL, "path": None}}, PIXEL),
        ({"type": "image", "image": {"bytes": None, "path": "a.png"}}, "path"),
        ({"type": "image_url", "image_url": {"url": URI}}, PIXEL),
        ({"type": "image_url", "image_url": {"url": "a.png"}}, "path"),
        ({"type": "image_url", "image_url": "a.png"}, "path"),
    ],
)
@pytest.mark.parametrize("role", ["user", "human"])
def test_parts_with_images(tmp_path, image, expected, role):
    """A turn as a list of parts, its image named in the part or taken from the row's images; empty
    fields beside it, as Arrow fills them in, do not count."""
    write(tmp_path)
    path = str(tmp_path / "a.png")
    for more in ({}, {"text": None, "video": None}):
        parts = [{"type": "text", "text": "a"}, image | more, {"type": "text", "text": "b"}]
        row = {"messages": [{"role": role, "content": parts}], "answer": "1"}
        row |= {"images": ["a.png"]} if expected == "from images" else {}
        example = parse_row(row, 0, str(tmp_path / "f.jsonl:1"))
        assert example.images == [PIXEL if expected == PIXEL else path]
        content = [parts[0], {"type": "image"}, parts[2]]
        assert example.messages == [{"role": "user", "content": content}]


def test_parts_in_every_role(tmp_path):
    (example,) = load_data(write(tmp_path, PARTS))
    assert [m["role"] for m in example.messages] == ["system", "user"]
    assert example.messages[0]["content"] == [{"type": "text", "text": "Be brief."}]
    assert example.messages[1]["content"][0] == {"type": "image"} and example.response == "two"


def test_images_stand_in_the_order_of_their_places(tmp_path):
    """Those that a part brings itself and those of the row, in several turns."""
    for name in "bcd":
        (tmp_path / f"{name}.png").write_bytes(PIXEL)
    row = {
        "messages": [
            {"role": "user", "content": "<image>\nfirst, and <image>"},
            {"role": "assistant", "content": "yes"},
            {"role": "user", "content": [{"type": "image", "path": "a.png"}, {"type": "image"}]},
            {"role": "assistant", "content": "last"},
        ],
        "images": ["b.png", "c.png", "d.png"],
    }
    (example,) = load_data(write(tmp_path, row))
    assert [os.path.basename(image) for image in example.images] == [f"{n}.png" for n in "bcad"]
    assert [m["role"] for m in example.messages] == ["user", "assistant", "user"]
    first = example.messages[0]["content"]
    assert first == [{"type": "image"}, {"type": "text", "text": "first, and "}, {"type": "image"}]
    assert example.response == "last"


def test_system_turns(tmp_path):
    """A top-level `system` stands before the messages; the given prompt only where there is
    none."""
    users = {"messages": [{"role": "user", "content": "q"}]}
    own = {"messages": [{"role": "system", "content": "own"}, *users["messages"]]}
    path = write(tmp_path, users, users | {"system": "top"}, own, PLAIN, PLAIN | {"system": "top"})
    for given, expected in ((None, [None, "top", "own", None, "top"]), ("p", ["p", "top", "own"])):
        examples = load_data(path, system_prompt=given)
        for example, text in zip(examples, expected):
            roles = [m["role"] for m in example.messages]
            assert roles == (["user"] if text is None else ["system", "user"])
            if text is not None:
                assert example.messages[0]["content"] == [{"type": "text", "text": text}]
    for blank in ("", " \n", None, []):  # none
        empty = {"messages": [{"role": "system", "content": blank}, *users["messages"]]}
        for row in (empty, empty | {"system": "p"}, users | {"system": blank}):
            example = parse_row(row, 0, "f:1", system_prompt="p")
            assert [m["role"] for m in example.messages] == ["system", "user"]
            assert example.messages[0]["content"] == [{"type": "text", "text": "p"}]
    with pytest.raises(RowError, match="a system turn that is not the first"):
        parse_row(own | {"system": "two"}, 0, "f:1")


def parsed(tmp_path, row: dict) -> Example:
    for name in "abc":
        (tmp_path / f"{name}.png").write_bytes(PIXEL)
    return parse_row(row, 0, str(tmp_path / "f.jsonl:1"))


def written(example: Example) -> str:
    """All turns before the response, each picture in its place."""
    images = iter(example.images)
    shown = lambda image: "(bytes)" if isinstance(image, bytes) else os.path.basename(image)
    parts = [part for message in example.messages for part in message["content"]]
    return "".join(part.get("text") or f"[{shown(next(images))}]" for part in parts)


NAMED = {"bytes": PIXEL, "path": "gone.png"}
BASE64 = base64.b64encode(PIXEL).decode() * 9


@pytest.mark.parametrize(
    "fields, expected",
    [
        ({"image_path": "a.png"}, "[a.png]What?"),
        ({"image_paths": ["a.png", "b.png"]}, "[a.png][b.png]What?"),
        ({"img": "a.png", "image": None}, "[a.png]What?"),
        ({"image": "a.png", "image_path": "gone.png", "image_id": "7.png"}, "[a.png]What?"),
        ({"image": "gone.png", "decoded_image": NAMED}, "[(bytes)]What?"),  # MathVista
        ({"image_1": "a.png", "image_2": "b.png", "image_3": None}, "[a.png][b.png]What?"),  # MMMU
        ({"image": "a.png", "image_2": "b.png"}, "[a.png][b.png]What?"),
        (
            {"question": "<image 2> or <image 1>?", "image_1": "a.png", "image_2": "b.png"},
            "[b.png] or [a.png]?",
        ),
        ({"question": "<image1>, <image1>?", "image": "a.png"}, "[a.png], [a.png]?"),  # MathVision
        ({"question": "Of <image_2>?", "images": ["a.png", "b.png"]}, RowError),
        ({"question": "Of <image 1>?"}, RowError),
        ({"question": "Of <image 2>?", "image_1": "a.png"}, RowError),
        ({"image": "a.png", "image_1": "b.png"}, RowError),
        ({"picture": "a.png"}, RowError),
        ({"picture": NAMED}, RowError),
        ({"id": "x/a.jpg"}, RowError),
        ({"id": "x/a.jpg", "image": "a.png"}, "[a.png]What?"),
        ({"second_image": "b.png", "image": "a.png"}, RowError),
        ({"extra": ["b.png"]}, RowError),
        ({"extra_info": {"index": 3, "image": "b.png"}}, RowError),  # verl
        ({"image_base64": BASE64}, RowError),
        ({"image": BASE64}, RowError),
        ({"Image": "a.png"}, "[a.png]What?"),
        ({"IMAGE_1": "a.png", "Img2": "b.png"}, "[a.png][b.png]What?"),
        ({"image": "a.png", "Photo": "b.png"}, RowError),
        ({"picture_url": "https://host/7"}, RowError),
        ({"image": "a.png", "picture_url": "https://host/7"}, "[a.png]What?"),
        ({"extra_info": {"image_url": "https://host/7"}}, RowError),
        ({"url": "https://host/7.png?size=3"}, RowError),
        ({"url": "https://host/7", "topic": "https://host/8"}, "What?"),
        ({"image": "a.png", "url": "https://host/a.png"}, "[a.png]What?"),
        ({"video_path": "a.mp4"}, RowError),
        ({"Video_URL": "https://host/7"}, RowError),
        ({"clip": "a.mp4"}, RowError),
        ({"video_id": "7", "audio": None, "video_path": "", "is_video": False}, "What?"),
        ({"image": "a.png", "options": ["b.png", "c.png"]}, RowError),
        ({"id": "question 7", "picture": None, "image_size": [3, 4]}, "What?"),
        ({"response": "a.png", "answer": "a.png"}, "What?"),
    ],
)
def test_a_picture_that_a_row_names_is_shown_or_the_row_is_left_out(tmp_path, fields, expected):
    row = {"question": "What?"} | fields
    if expected is RowError:
        with pytest.raises(
            RowError,
            match="an image,|are images|both give image|make them equal|not below|no stage can use",
        ) as error:
            parsed(tmp_path, row)
        assert len(str(error.value)) < 400
    else:
        assert written(parsed(tmp_path, row)) == expected


@pytest.mark.parametrize(
    "parts",
    [
        [{"type": "text", "text": "two"}, {"type": "image", "image": "b.png"}],
        "two <image>",
        [{"type": "text", "text": "two", "image": "b.png"}],
    ],
)
def test_a_picture_in_the_response_is_a_bad_row(tmp_path, parts):
    turns = [{"role": "user", "content": "<image>q"}, {"role": "assistant", "content": parts}]
    with pytest.raises(RowError, match="the response holds an image|neither text nor"):
        parsed(tmp_path, {"messages": turns, "images": ["a.png"]})


def test_a_picture_beside_the_content_of_a_turn_is_a_bad_row(tmp_path):
    for more in ({"image": "a.png"}, {"images": [NAMED]}, {"image_url": "https://host/7"}):
        with pytest.raises(RowError, match="a turn names an image outside of its content"):
            parsed(tmp_path, {"messages": [{"role": "user", "content": "q", **more}]})
    for part in ({"type": "text", "image": "a.png"}, {"type": "image", "image": "a.png"}):
        with pytest.raises(RowError, match="neither text nor an image"):
            parsed(tmp_path, asked([part | {"text": "both"}]))


ABC = "What?\nA. red\nB. blue"


@pytest.mark.parametrize(
    "fields, question, answer",
    [
        ({"options": ["red", "blue"], "answer": "B"}, ABC, ["B", "blue"]),
        ({"options": "['red', 'blue']", "answer": "B"}, ABC, ["B", "blue"]),  # MMMU
        ({"choices": ["red", "blue"], "answer": "blue"}, ABC, ["blue", "B"]),
        ({"choices": {"A": "red", "B": "blue"}, "answer": "A"}, ABC, ["A", "red"]),
        ({"A": "red", "B": "blue", "C": None, "answer": "A"}, ABC, ["A", "red"]),  # MMBench
        ({"option": "A. red; B. blue", "answer": "A"}, ABC, ["A", "red"]),  # We-Math
        ({"options": ["A. red", "(B) blue"], "answer": "A"}, ABC, ["A", "red"]),
        ({"question": ABC, "options": ["red", "blue"], "answer": "A"}, ABC, ["A", "red"]),
        ({"options": [1, 2.5], "answer": "2.5"}, "What?\nA. 1\nB. 2.5", ["2.5", "B"]),
        ({"options": ["A", "B"], "answer": "B"}, "What?\nA. A\nB. B", ["B"]),
        ({"options": ["red", "blue"], "answer": "B. blue"}, ABC, ["B. blue"]),
        ({"A": "red", "B": "blue", "C": "", "answer": "A"}, ABC, ["A", "red"]),
        ({"option_a": "red", "option_b": "blue", "answer": "b"}, ABC, ["b", "B", "blue"]),
        ({"options": ["red", "blue"], "answer": "(B)"}, ABC, ["(B)", "B", "blue"]),
        ({"options": ["B", "C"], "answer": "A"}, "What?\nA. B\nB. C", ["A"]),
        ({"options": [], "choices": ["red", "blue"], "answer": "A"}, ABC, ["A", "red"]),
        ({"options": [], "answer": "B"}, "What?", ["B"]),
        ({"answer_choices": ["red", "blue"], "answer": "A"}, RowError, None),
        ({"options": "[]", "answer": "7"}, "What?", ["7"]),
        ({"options": None, "choices": "", "answer": "7"}, "What?", ["7"]),
        ({"options": ["red", "blue"], "answer": "C"}, RowError, None),
        ({"options": ["red", "blue"], "answer": 1}, RowError, None),  # from 0 or from 1
        ({"options": ["B", "A"], "answer": "A"}, RowError, None),
        ({"options": ["red"], "answer": "A"}, RowError, None),
        ({"options": [NAMED, NAMED], "answer": "A"}, RowError, None),
        ({"options": 3, "answer": "A"}, RowError, None),
        ({"Options": {"b": "blue", "a": "red"}, "answer": "B"}, ABC, ["B", "blue"]),
        ({"options": {"(A)": "red", "(B)": "blue"}, "answer": "A"}, ABC, ["A", "red"]),
        ({"choices": {"label": ["A", "B"], "text": ["red", "blue"]}}, ABC, None),  # ARC
        ({"choices": {"label": ["A", "C"], "text": ["red", "blue"]}}, RowError, None),
        ({"options": {"A": "red", "B": "blue", "C": None}, "answer": "B"}, ABC, ["B", "blue"]),
        ({"options": ["red", "blue", None, ""], "answer": "B"}, ABC, ["B", "blue"]),
        ({"options": ["red", None, "blue"], "answer": "B"}, RowError, None),
        ({"options": {"A": "red", "C": "green"}, "answer": "C"}, RowError, None),
        ({"options": {"A": "red", "a": "blue"}}, RowError, None),
        ({"options": {"0": "red", "1": "blue"}, "answer": "1"}, RowError, None),
        ({"options": {"labels": ["A", "B"], "texts": ["red", "blue"]}}, RowError, None),
        ({"choiceA": "red", "choiceB": "blue", "choiceC": float("nan")}, ABC, None),
        ({"option1": "red", "option2": "blue", "answer": "blue"}, ABC, ["blue", "B"]),
        ({"opt0": "red", "opt1": "blue", "answer": "opt1"}, RowError, None),
        ({"option1": "2", "option2": "1", "answer": "1"}, RowError, None),
        ({"A": "red", "B": "", "C": "blue", "answer": "A"}, RowError, None),
        ({"option_b": "red", "option_c": "blue", "answer": "B"}, RowError, None),
        ({"options": ["red", "blue"], "choices": ["red", "green"]}, RowError, None),
        ({"answer_options": "red;blue"}, RowError, None),
        ({"choice_list": {"A": "red", "B": "blue"}}, RowError, None),
        ({"mc_options": "A. red\nB. blue"}, RowError, None),
        ({"mc_options": "A. red\nB. blue", "question": ABC}, ABC, None),
        ({"extra_info": {"choices": ["red", "blue"]}}, RowError, None),
        ({"extra_info": {"option_a": "red", "option_b": "blue"}}, RowError, None),
        ({"extra_info": {"choices": ["red", "blue"]}, "choices": ["red", "blue"]}, ABC, None),
        ({"choice_type": "single", "num_choices": 4, "correct_option": "B"}, "What?", None),
        ({"answer_options": None, "opts": {"A": None}, "a": 3}, "What?", None),
        ({"question": "A. 10\nB. 20", "options": [1, 2]}, "A. 10\nB. 20\nA. 1\nB. 2", None),
        ({"question": "A. -1\nB. .2", "options": [1, 2]}, "A. -1\nB. .2\nA. 1\nB. 2", None),
    ],
)
def test_options_are_shown_or_the_row_is_left_out(tmp_path, fields, question, answer):
    row = {"question": "What?"} | fields
    if question is RowError:
        few = "not a list of 2 to 26 texts" if row.get("options") in (3, ["red"]) else "options"
        with pytest.raises(RowError, match=few):
            parsed(tmp_path, row)
        return
    example = parsed(tmp_path, row)
    assert written(example) == question and example.answer == answer
    turns = [{"role": "user", "content": row["question"]}]
    assert written(parsed(tmp_path, row | {"messages": turns})) == question


def test_pictures_in_options(tmp_path):
    """MMMU names them there."""
    row = {"question": "Which of <image 1>?", "options": "['<image 2>', 'none']", "answer": "A"}
    example = parsed(tmp_path, row | {"image_1": "a.png", "image_2": "b.png"})
    assert written(example) == "Which of [a.png]?\nA. [b.png]\nB. none"


@pytest.mark.parametrize(
    "fields, expected",
    [
        ({"answer": "4"}, ["4"]),
        ({"answer": 4}, ["4"]),
        ({"answer": 0}, ["0"]),
        ({"answer": 0.5}, ["0.5"]),
        ({"answer": True}, ["True"]),
        ({"answer": ["4", 5]}, ["4", "5"]),
        ({"answer": '["4", "four"]'}, ["4", "four"]),
        ({"answer": '["4", 5]'}, ['["4", 5]']),
        ({"answer": '["broken'}, ['["broken']),
        ({"answer": "[1, 2]"}, ["[1, 2]"]),
        ({"answer": ["__EMPTY__", "4", None, ""]}, ["4"]),
        ({"answer": " ", "reward_model": {"ground_truth": "4"}}, ["4"]),
        ({"answer": "__EMPTY__"}, None),
        ({"answer": ""}, None),
        ({"answer": None}, None),
        ({"answer": [], "equivalent_answers": []}, None),
        ({"answer": "4", "equivalent_answers": "four"}, ["4", "four"]),
        ({"answer": "4", "equivalent_answers": 4.0}, ["4", "4.0"]),
        ({"answer": "4", "equivalent_answers": ["four", "__EMPTY__"]}, ["4", "four"]),
        ({"answer": "4", "equivalent_answers": '["four", "IV"]'}, ["4", "four", "IV"]),
        ({"answer": "4", "equivalent_answers": "__EMPTY__"}, ["4"]),
        ({"reward_model": {"ground_truth": 7, "equivalent_answers": "VII"}}, ["7", "VII"]),
        ({"reward_model": {"ground_truth": "__EMPTY__"}}, None),
        ({"reward_model": None}, None),
    ],
)
def test_accepted_answers(fields, expected):
    assert parse_row({"question": "q", **fields}, 0, "f:1").answer == expected


# --------------------------------------------------------------------------------------------------
# Bad rows

ROW = {"question": "q", "image": "a.png", "answer": "1", "response": "r"}
TURN = {"messages": [{"role": "user", "content": "q"}]}


def asked(content) -> dict:
    return {"messages": [{"role": "user", "content": content}], "answer": "1"}


@pytest.mark.parametrize(
    "lines, says",
    [
        ([{**ROW, "image": "b.png"}], ["data.jsonl:1", "b.png", "is not below the data file"]),
        ([ROW, {"question": "q"}], ["data.jsonl:2", "without `answer`"]),
        ([{"image": "a.png", "answer": "1"}], ["data.jsonl:1", "question"]),
        (
            [{"messages": [{"role": "user", "content": "q"}], "images": ["a.png"], "answer": "1"}],
            ["0 <image> placeholders for 1 image;"],
        ),
        (
            [{"messages": [{"role": "dog", "content": "q"}], "answer": "1"}],
            ["data.jsonl:1", "role"],
        ),
        ([asked(3)], ["must be text", "int"]),
        (["[1, 2]"], ["data.jsonl:1", "JSON object"]),
        ([ROW, "{broken"], ["data.jsonl:2", "JSON"]),
        ([asked("<image><image>") | {"images": ["a.png"]}], ["more <image> placeholders"]),
        ([ROW | {"videos": ["a.mp4"]}], ["holds `videos`", "no stage can use"]),
        ([ROW | {"video": "a.mp4"}], ["holds `video`", "no stage can use"]),
        ([ROW | {"audios": ["a.wav"]}], ["holds `audios`", "no stage can use"]),
        ([ROW | {"audio": {"path": "a.wav"}}], ["holds `audio`", "no stage can use"]),
        ([asked([{"type": "video", "video": "a.mp4"}])], ["neither text nor an image", "a.mp4"]),
        ([asked([{"type": "text", "text": None}])], ["neither text nor an image"]),
        ([asked(None)], ["must be text or parts", "NoneType"]),
        ([ROW | {"question": None}], ["expected `messages`, or text in `question`"]),
        ([ROW | {"image": "https://host/a.png"}], ["addresses are not fetched"]),
        ([ROW | {"image": "a.png\0b"}], ["a.png", "a path has no NUL"]),
        ([ROW | {"image": 3}], ["must be a path or encoded bytes", "int"]),
        ([ROW | {"image": {"bytes": None, "path": None}}], ["path or encoded bytes", "NoneType"]),
        ([ROW | {"image": "data:image/png;base64,abcde"}], ["data.jsonl:1", "cannot be"]),
        ([ROW | {"response": 3}], ["expected text in `response`", "int"]),
        ([ROW | {"system": 3}], ["must be text", "int"]),
        ([ROW | {"answer": {"a": 1}}], ["an answer must be text or a number", "dict"]),
        ([ROW | {"answer": ["a", {}]}], ["an answer must be text or a number", "dict"]),
        ([ROW | {"answer": "__EMPTY__"}], ["without `answer`"]),
        ([asked("a") | {"messages": "not a list"}], ["data.jsonl:1", "found"]),
        ([{"messages": [], "answer": "1"}], ["data.jsonl:1", "found"]),
        ([{"messages": [{"role": "assistant", "content": "a"}], "answer": "1"}], ["no user turn"]),
        ([{"messages": ["a"], "answer": "1"}], ["data.jsonl:1", "cannot be understood"]),
        ([asked(["a"])], ["data.jsonl:1", "cannot be understood"]),
        ([ROW | {"reward_model": "x"} | {"answer": None}], ["data.jsonl:1"]),
        ([ROW | {"question": "half \\ud800 of one"}], None),
        (['{"question": "half \\ud800 of one", "answer": "1"}'], ["half of a surrogate pair"]),
        (['{"question": "q", "answer": "\\udfff"}'], ["half of a surrogate pair"]),
        (['{"question": "q", "answer": "1", "source": "\\udc00"}'], ["half of a surrogate pair"]),
        (['{"question": "q", "answer": "1", "response": "\\udc00"}'], ["half of a surrogate pair"]),
        (["null"], ["JSON object", "NoneType"]),
    ],
)
def test_bad_rows_are_named_in_one_line(tmp_path, lines, says):
    """Opening succeeds; the last row is the bad one. `where` and the reason make one line, and the
    rows before it are read."""
    examples = load_data(write(tmp_path, *lines), need=("answer",))
    for i in range(len(lines) - 1):
        assert examples[i].answer == ["1"]
    if says is None:  # a backslash that is text
        assert examples[0].messages[0]["content"][1]["text"] == "half \\ud800 of one"
        return
    for _ in range(2):  # as often as it is drawn
        with pytest.raises(RowError) as error:
            examples[len(lines) - 1]
        line = f"{error.value.where}: {error.value}"
        assert error.value.where == f"{tmp_path}/data.jsonl:{len(lines)}" and "\n" not in line
        assert error.value.where not in str(error.value)
        for part in says:
            assert part in line


def test_a_file_without_rows(tmp_path):
    for lines in ([], ["", "  "]):
        with pytest.raises(UserError, match="holds no rows"):
            load_data(write(tmp_path, *lines), need=("answer",))


def test_image_that_cannot_be_opened(tmp_path, processor):
    """A row is read without its images; the row that cannot be encoded stands beside the others."""
    path = write(tmp_path, {**ROW, "image": "good.png"}, ROW, {**ROW, "image": "good.png"})
    (tmp_path / "good.png").write_bytes(PIXEL)
    (tmp_path / "a.png").write_bytes(b"not a picture")
    for _ in range(2):
        prompts = encode_prompts(processor, load_data(path)[:])
        assert [isinstance(prompt, RowError) for prompt in prompts] == [False, True, False]
        assert prompts[1].where == f"{path}:2"
        assert "a.png cannot be opened" in str(prompts[1]) and [prompts[0].index, prompts[2].index]
        Image.effect_noise((64, 64), 50).save(tmp_path / "a.png")
        (tmp_path / "a.png").write_bytes(
            (tmp_path / "a.png").read_bytes()[:500]
        )  # its header is whole, the rest is missing


def test_image_token_in_the_text(tmp_path, processor):
    good, bad = ROW, {**ROW, "question": "what is <|image_pad|>?"}
    path = write(tmp_path, good, bad)
    prompts = encode_prompts(processor, load_data(path)[:])
    assert prompts[0].index == 0 and isinstance(prompts[1], RowError)
    assert prompts[1].where == f"{path}:2" and "<|image_pad|>, a control token" in str(prompts[1])


ODD = [None, True, False, 0, -1, 3.5, float("nan"), "", " ", "<image>", "<image><image>", "a.png"]
ODD += ["\ud800", "é\x00", [], [None], [[]], ["a.png"], {}, {"type": "image"}, {"bytes": b""}]
ODD += [b"", b"x", [{"role": "user"}], [{"type": "text", "text": 1}], {"url": 1}, "__EMPTY__"]
ODD += ["data:,", "data:image/png;base64,@@@@", "[" * 50, '["a", 1]', 10**400, ("t",), {"a": 1}]
ODD += [{"A": "x", "B": "y", "C": None}, {"text": 3}, {"choices": ["x", "y"]}]
KEYS = [
    *SHAREGPT,
    *OLDER,
    *PLAIN,
    *VERL,
    *PAIR,
    "system",
    "videos",
    "equivalent_answers",
    "caption",
    "image_path",
    "image_2",
    "options",
    "A",
    "B",
    "option_b",
    "extra_info",
    "Photo",
]


def places(value, at=()):
    """The path to every value inside a row."""
    yield at
    inner = list(enumerate(value)) if isinstance(value, list) else ()
    for key, part in value.items() if isinstance(value, dict) else inner:
        yield from places(part, (*at, key))


def mutated(row: dict, rng: random.Random):
    """A row of which a part is replaced, left out, doubled, or put where another stood."""
    row = copy.deepcopy(row)
    for _ in range(rng.randint(1, 3)):
        *outer, last = rng.choice([at for at in places(row) if at] or [("question",)])
        parent = row
        for key in outer:
            parent = parent[key]
        match rng.randrange(5):
            case 0:
                parent[last] = copy.deepcopy(rng.choice(ODD))
            case 1:
                parent.pop(last, None) if isinstance(parent, dict) else parent.pop(last)
            case 2:
                row[rng.choice(KEYS)] = copy.deepcopy(rng.choice(ODD))
            case 3:
                row[rng.choice(KEYS)] = copy.deepcopy(parent.get(last) if outer == [] else parent)
            case 4 if isinstance(parent, list):
                parent.append(parent[last])
    return row


def test_any_row_is_an_example_or_a_row_error(tmp_path, monkeypatch, processor):
    """Some thousands of rows of every layout, mutated at random. What comes through is sound: its
    chat has as many images as places, and texts that can be encoded."""
    write(tmp_path)
    rng = random.Random(0)
    layouts = [SHAREGPT, OLDER, PLAIN, VERL, PAIR, PARTS, ROW]
    table = [mutated(rng.choice(layouts), rng) for _ in range(4000)]
    monkeypatch.setattr(rows, "_open_source", lambda source: (source, table))
    examples = load_data(str(tmp_path / "f"))
    good, bad = [], set()
    for i, row in enumerate(table):
        try:
            example = examples[i]
        except RowError as error:
            assert error.where == f"{tmp_path}/f[{i}]" and str(error), row
            bad.add(str(error)[:12])
            continue
        good.append(example)
        assert isinstance(example, Example) and example.index == i
        parts = [part for message in example.messages for part in message["content"]]
        assert sum(part["type"] == "image" for part in parts) == len(example.images), row
        texts = [part["text"] for part in parts if part["type"] == "text"]
        texts += [example.response, example.student, example.source]
        texts += [*(example.answer or []), *example.captions]
        for text in texts:
            assert text is None or isinstance(text, str), row
            (text or "").encode()
        for image in example.images:
            assert isinstance(image, bytes) or os.path.isfile(image), row
    assert len(good) > 1000 and len(bad) > 12
    for example in good[::10]:
        (prompt,) = encode_prompts(processor, [example])
        assert isinstance(prompt, RowError) or prompt.index == example.index
