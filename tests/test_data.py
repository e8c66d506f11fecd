"""Rows in the wild -> examples -> prompts, branches, views and packs; and what bad rows are told."""

import json
import random

import pytest
import torch
from PIL import Image
from hypothesis import example as h_example
from hypothesis import given, settings
from hypothesis import strategies as st

from data import (
    Group,
    Prompt,
    Response,
    UserError,
    batch_indices,
    batches,
    decode,
    encode_prompts,
    encode_response,
    encode_text,
    encode_views,
    load_data,
    load_processor,
    make_packs,
    parse_response,
    save_processor,
)

PIXEL = bytes.fromhex(
    "89504e470d0a1a0a0000000d49484452000000010000000108000000003a7e9b550000000a49444154789c63600000000200"
    "01e221bc330000000049454e44ae426082"
)
QUICK = settings(deadline=None, database=None, derandomize=True)


@pytest.fixture(scope="module")
def processor(world):
    return load_processor(world["init"])


def write(tmp_path, *rows, name="data.jsonl") -> str:
    (tmp_path / "a.png").write_bytes(PIXEL)
    path = tmp_path / name
    path.write_text(
        "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows),
        encoding="utf-8",
    )
    return str(path)


def test_schemas_give_the_same_example(tmp_path):
    """sharegpt in both spellings, plain, and verl's layout, of one row."""
    sharegpt = {
        "messages": [
            {"role": "user", "content": "<image>How many?"},
            {"role": "assistant", "content": "two"},
        ],
        "images": ["a.png"],
    }
    older = {
        "conversations": [
            {"from": "human", "value": "<image>How many?"},
            {"from": "gpt", "value": "two"},
        ],
        "images": ["a.png"],
    }
    plain = {
        "question": "How many?",
        "image": "a.png",
        "response": "two",
        "answer": 2,
        "source": "s",
    }
    verl = {
        "prompt": [{"role": "user", "content": "<image>How many?"}],
        "images": [{"bytes": None, "path": "a.png"}],
        "reward_model": {"ground_truth": "2", "style": "rule", "equivalent_answers": ["two"]},
        "data_source": "s",
        "teacher_response": "two",
    }
    a, b, c, d = load_data(write(tmp_path, sharegpt, older, plain, verl))
    assert a.messages == b.messages == c.messages == d.messages
    assert a.images == b.images == c.images == d.images == [str(tmp_path / "a.png")]
    assert a.response == b.response == c.response == d.response == "two"
    assert (
        c.answer == ["2"]
        and d.answer == ["2", "two"]
        and c.source == d.source == "s"
        and a.answer is None
    )


def test_warm_up_pairs(tmp_path):
    cot = "<think>t</think><answer>1</answer>"
    parts = {
        "question": "q",
        "image": "a.png",
        "teacher_caption": "c",
        "teacher_cot": cot,
        "student_caption": "<caption>d</caption>",
        "student_cot": cot,
    }
    whole = {"prompt": "q", "image": "a.png", "teacher_response": "x", "student_response": "y"}
    a, b = load_data(write(tmp_path, parts, whole), need=("response", "student"))
    assert (
        parse_response(a.response) == Response("c", "t", "1")
        and parse_response(a.student).caption == "d"
    )
    assert (b.response, b.student) == ("x", "y")


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


ROW = {"question": "q", "image": "a.png", "answer": "1", "response": "r"}


@pytest.mark.parametrize(
    "rows, says",
    [
        ([{**ROW, "image": "b.png"}], ["data.jsonl:1", "b.png", "does not exist"]),
        ([ROW, {"question": "q"}], ["data.jsonl:2", "without `answer`"]),
        ([{"image": "a.png", "answer": "1"}], ["data.jsonl:1", "question"]),
        (
            [{"messages": [{"role": "user", "content": "q"}], "images": ["a.png"], "answer": "1"}],
            ["0 <image> placeholders for 1 images"],
        ),
        (
            [{"messages": [{"role": "dog", "content": "q"}], "answer": "1"}],
            ["data.jsonl:1", "role"],
        ),
        ([{"messages": [{"role": "user", "content": 3}], "answer": "1"}], ["must be text", "int"]),
        (["[1, 2]"], ["data.jsonl:1", "JSON object"]),
        ([ROW, "{broken"], ["line 2", "not JSON"]),
        ([], ["holds no rows"]),
    ],
)
def test_bad_rows_are_named_in_one_line(tmp_path, rows, says):
    with pytest.raises(UserError) as error:
        load_data(write(tmp_path, *rows), need=("answer",))
    assert "\n" not in str(error.value)
    for part in says:
        assert part in str(error.value)


@pytest.mark.parametrize("path", ["no/such/file.jsonl", "missing.json", "."])
def test_bad_paths(path):
    with pytest.raises(UserError, match="--data"):
        load_data(path)


def test_image_that_cannot_be_opened(tmp_path, processor):
    path = write(tmp_path, ROW)
    (tmp_path / "a.png").write_bytes(b"not a picture")
    with pytest.raises(UserError, match=r"data.jsonl:1: image .*a.png cannot be opened"):
        load_data(path)
    Image.effect_noise((64, 64), 50).save(tmp_path / "a.png")
    (tmp_path / "a.png").write_bytes(
        (tmp_path / "a.png").read_bytes()[:500]
    )  # its header is whole, the rest is missing
    with pytest.raises(UserError, match=r"data.jsonl:1: image .*a.png cannot be opened"):
        encode_prompts(processor, load_data(path))


def test_image_token_in_the_text(tmp_path, processor):
    good, bad = ROW, {**ROW, "question": "what is <|image_pad|>?"}
    with pytest.raises(UserError, match=r"data.jsonl:2: "):
        encode_prompts(processor, load_data(write(tmp_path, good, bad)))


@QUICK
@given(text=st.text())
@h_example(text="e\u0301 \u212b <|im_end|> <think>\r\n\t")
def test_any_text_round_trips(processor, text):
    text = text.encode("utf-8", "ignore").decode()  # no lone surrogates: they are not UTF-8
    assert processor.tokenizer.decode(encode_text(processor, text)) == text
    assert processor.tokenizer.decode(processor.tokenizer(text)["input_ids"]) == text
    assert decode(processor, encode_response(processor, text)) == text


def test_processor_saved_and_loaded_is_the_same(world, processor, tmp_path):
    save_processor(processor, tmp_path / "p")
    again = load_processor(tmp_path / "p")
    rows = load_data(world["validation"])[:3]
    for a, b in zip(encode_prompts(processor, rows), encode_prompts(again, rows)):
        for name in ("input_ids", "position_ids", "pixel_values", "image_grid_thw"):
            assert torch.equal(getattr(a, name), getattr(b, name))
    assert again.chat_template == processor.chat_template


def test_encoding_in_batches_equals_one_by_one(world, processor):
    rows = load_data(world["validation"])[:5]
    for together, row in zip(encode_prompts(processor, rows), rows):
        (alone,) = encode_prompts(processor, [row])
        assert torch.equal(together.input_ids, alone.input_ids) and torch.equal(
            together.pixel_values, alone.pixel_values
        )
        assert (
            together.index == row.index
            and int((alone.input_ids == processor.image_token_id).sum()) == 3
        )


# ---------------------------------------------------------------------------------------------------------- batches


@QUICK
@given(rows=st.integers(1, 40), size=st.integers(1, 16), epochs=st.integers(1, 3))
def test_batches_cover_every_epoch(rows, size, epochs):
    total = rows * epochs
    stream = [
        i for step in range(-(-total // size)) for i in batch_indices(step, size, rows, 7, total)
    ]
    assert len(stream) == total
    for e in range(epochs):
        assert sorted(stream[e * rows : (e + 1) * rows]) == list(range(rows))


def test_batches_do_not_depend_on_ranks_or_on_where_one_resumes(world, processor):
    examples = load_data(world["prompts"])
    whole = batches(examples, processor, 8, seed=1)
    first, second = ([e.index for e, _ in next(whole)] for _ in range(2))
    parts = [
        [e.index for e, _ in next(batches(examples, processor, 8, seed=1, part=(r, 2)))]
        for r in range(2)
    ]
    assert sorted(first) == sorted(parts[0] + parts[1]) and first[0::2] == parts[0]
    resumed = next(batches(examples, processor, 8, seed=1, start=1))
    assert [e.index for e, _ in resumed] == second
    assert all(e.index == p.index for e, p in resumed)


# ---------------------------------------------------------------------------------------------------------- views and packs


def test_views_hold_what_they_should(processor):
    response = Response("a caption", "some thoughts", "42")
    perception, reasoning = encode_views(processor, response)
    eos = processor.tokenizer.eos_token_id
    assert perception[-1] == reasoning[-1] == eos
    assert decode(processor, perception).strip() == "<caption>a caption</caption>"
    assert decode(processor, reasoning) == "<think>some thoughts</think>\n<answer>42</answer>"


def test_views_are_blind_to_layout(processor):
    """White space around the blocks, and how the tokens were sampled, do not reach the discriminator."""
    tight = "<caption>a b</caption><think>c</think><answer>1</answer>"
    loose = " <caption>\na b </caption>\n\n<think> c\n</think>  <answer>1</answer>\n"
    for a, b in zip(
        encode_views(processor, parse_response(tight)),
        encode_views(processor, parse_response(loose)),
    ):
        assert torch.equal(a, b)


@QUICK
@given(seed=st.integers(0, 10**6), budget=st.one_of(st.none(), st.integers(1, 120)))
def test_packs_hold_every_branch_once_within_the_budget(seed, budget):
    rng = random.Random(seed)
    groups = []
    for g in range(rng.randint(1, 4)):
        length = rng.randint(1, 9)
        prompt = Prompt(g, torch.full((length,), 100 + g), torch.arange(length).expand(3, -1))
        groups.append(
            Group(prompt, [torch.arange(rng.randint(1, 30)) for _ in range(rng.randint(0, 6))])
        )
    packs = make_packs(groups, budget)
    members = [m for pack in packs for m in pack.members]
    assert members == [(g, i) for g, group in enumerate(groups) for i in range(len(group.branches))]
    for pack in packs:
        cost = pack.input_ids.shape[1]
        assert (
            budget is None
            or cost <= budget
            or len(pack.members) == 1
            or len(pack.segments) == 1
            and not pack.members
        )
        assert torch.equal(
            pack.targets,
            torch.cat([groups[g].branches[i] for g, i in pack.members] or [pack.targets[:0]]),
        )
        for segment in (
            pack.segments
        ):  # a branch's first token is predicted by the prompt's last, and it goes on from there
            following = (
                int(pack.position_ids[:, 0, segment.start : segment.start + segment.prompt].max())
                + 1
            )
            at = segment.start + segment.prompt
            for length in segment.branches:
                assert pack.position_ids[0, 0, at : at + length].tolist() == list(
                    range(following, following + length)
                )
                at += length
        at = 0
        for segment in pack.segments:
            for length in segment.branches:
                assert int(pack.predictors[at]) == segment.start + segment.prompt - 1
                at += length
