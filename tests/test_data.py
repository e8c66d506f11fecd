"""Examples -> prompts, branches, views, batches and packs; and the processor in and out."""

import json
import random
import time
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from hypothesis import example as h_example
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import CLIPImageProcessorPil

from data import (
    Encoded,
    Group,
    Prompt,
    Response,
    decode,
    encode_prompts,
    encode_response,
    encode_views,
    make_packs,
    parse_response,
)
from support.errors import RowError, Unfit, UserError
from support.huggingface import load_processor, processor_files, write_files
from support.loader import _owners, batches, epoch_rows, hold_out
from support.rows import Example, load_data

QUICK = settings(deadline=None, database=None, derandomize=True)


@pytest.fixture(scope="module")
def processor(world):
    return load_processor(world["init"])


# --------------------------------------------------------------------------------------------------
# The response format

GOOD = "<caption>a</caption>\n<think>b</think> <answer>c</answer>"


def test_format():
    assert parse_response(GOOD) == Response("a", "b", "c") == parse_response(f"\n {GOOD} \n")
    assert (
        parse_response(
            "<caption>\na\n</caption><think>x < 1 <b></think><answer> c\nd </answer>"
        ).answer
        == "c\nd"
    )
    for bad in (
        "",
        GOOD + ".",
        "x" + GOOD,
        GOOD + GOOD,
        GOOD.replace("\n", ","),
        GOOD.replace(">c<", "> <"),
        None,
        3,
        GOOD.replace("think", "Think"),
        GOOD.replace("b", "<think>b"),
        GOOD.replace("c<", "<answer>c<"),
        "<caption>a<think>b</think></caption><answer>c</answer>",
        "<think>b</think><caption>a</caption><answer>c</answer>",
        GOOD.replace("<caption>a</caption>", ""),
        GOOD[:-1],
        GOOD.replace("</think>", ""),
    ):
        assert parse_response(bad) is None


TAGS = ["<caption>", "</caption>", "<think>", "</think>", "<answer>", "</answer>"]


@given(
    st.lists(st.sampled_from([*TAGS, "a", " "]), max_size=12),
    st.permutations(TAGS),
    st.integers(0, 5),
)
@settings(QUICK, max_examples=300)
def test_format_of_mutated_tags(tokens, order, place):
    assert (
        parse_response("".join(tokens)) is None
        or [token for token in tokens if token in TAGS] == TAGS
    )
    assert (parse_response("a".join(order)) is None) or order == TAGS
    right = [*TAGS[:1], "a", *TAGS[1:3], "b", *TAGS[3:5], "c", *TAGS[5:]]
    assert parse_response("".join(right)) == Response("a", "b", "c")
    for mutated in (
        right[:place] + tokens[:1] + right[place + 1 :],
        right[:place] + [TAGS[place]] + right[place:],
    ):
        response = parse_response("".join(mutated))
        assert response is None or [token for token in mutated if token in TAGS] == TAGS


def test_format_is_linear():
    start = time.monotonic()
    for piece in ("<caption>", "</caption>", "<", " ", "<think></think>", "\n<answer>"):
        parse_response("<caption>" + piece * 100_000), parse_response(piece * 100_000 + GOOD)
    parse_response(
        "<caption>a"
        + " " * 10**6
        + "</caption><think>b</think><answer>c</answer>"
        + " " * 10**6
        + "x"
    )
    assert time.monotonic() - start < 2


# --------------------------------------------------------------------------------------------------
# Texts and the processor


@QUICK
@given(text=st.text())
@h_example(text="e\u0301 \u212b <|im_end|> <think>\r\n\t")
def test_any_text_round_trips(processor, text):
    text = text.encode("utf-8", "ignore").decode()  # no lone surrogates: they are not UTF-8
    assert processor.tokenizer.decode(encode_response(processor, text)[:-1]) == text
    assert processor.tokenizer.decode(processor.tokenizer(text)["input_ids"]) == text
    assert decode(processor, encode_response(processor, text)) == text


def test_decode_drops_the_token_that_ended_a_branch(processor):
    """The end of sequence, or a stop id of the policy, special or not; once, and no other."""
    ids = processor.tokenizer.convert_tokens_to_ids
    text = encode_response(processor, "a b")[:-1].tolist()
    end, pad, plain = (ids(token) for token in ("<|im_end|>", "<|endoftext|>", "</think>"))
    assert plain not in processor.tokenizer.all_special_ids  # an added token, and no special one
    for branch, stop_ids, expected in [
        (text, (), "a b"),
        ([*text, end], (), "a b"),
        ([*text, end], (pad, plain), "a b"),
        ([*text, pad], (), "a b<|endoftext|>"),
        ([*text, pad], (end, pad), "a b"),
        ([*text, plain], torch.tensor([plain, end]), "a b"),
        ([*text, plain], (), "a b</think>"),
        ([*text, pad, end], (pad,), "a b<|endoftext|>"),
        ([end, *text], (), "<|im_end|>a b"),
        ([end], (), ""),
        ([], (), ""),
    ]:
        branch = torch.tensor(branch, dtype=torch.long)
        assert decode(processor, branch, stop_ids) == expected


def test_a_written_processor_has_the_published_files(world, processor):
    """Every file of the published layout, and they agree with each other."""
    names = {"preprocessor_config.json", "video_preprocessor_config.json", "tokenizer.json"}
    names |= {"tokenizer_config.json", "vocab.json", "chat_template.json", "merges.txt"}
    files = processor_files(world["init"])
    assert set(files) == names
    read = {k: json.loads(v) for k, v in files.items() if k.endswith(".json")}
    model = read["tokenizer.json"]["model"]
    assert read["vocab.json"] == model["vocab"]
    assert list(read["vocab.json"].values()) == list(range(len(model["vocab"])))
    first, *merges, last = files["merges.txt"].decode().split("\n")
    assert (first, last) == ("#version: 0.2", "")
    assert [m.split(" ") for m in merges] == [list(m) for m in model["merges"]]
    config = read["tokenizer_config.json"]
    added = {token["id"]: token["content"] for token in read["tokenizer.json"]["added_tokens"]}
    assert {int(i): t["content"] for i, t in config["added_tokens_decoder"].items()} == added
    assert config["eos_token"] == processor.tokenizer.eos_token == "<|im_end|>"
    assert config["pad_token"] == processor.tokenizer.pad_token
    assert config["pad_token"] not in config["additional_special_tokens"]
    template = read["chat_template.json"]["chat_template"]
    assert config["chat_template"] == template == processor.chat_template
    image, video = read["preprocessor_config.json"], read["video_preprocessor_config.json"]
    assert image["processor_class"] == video["processor_class"] == "Qwen3VLProcessor"
    for name in ("patch_size", "temporal_patch_size", "merge_size", "image_mean", "image_std"):
        assert image[name] == video[name]
        of_processor = getattr(processor.image_processor, name)
        assert image[name] == (list(of_processor) if name[:5] == "image" else of_processor)


def test_processor_saved_and_loaded_is_the_same(world, processor, tmp_path):
    files = processor_files(world["init"])
    write_files(tmp_path / "p", files)
    again = load_processor(tmp_path / "p")
    rows = load_data(world["validation"])[:3]
    for a, b in zip(encode_prompts(processor, rows), encode_prompts(again, rows)):
        for name in ("input_ids", "position_ids", "pixel_values", "image_grid_thw"):
            assert torch.equal(getattr(a, name), getattr(b, name))
    assert again.chat_template == processor.chat_template
    assert processor_files(tmp_path / "p") == files  # byte for byte


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


# --------------------------------------------------------------------------------------------------
# Batches


@QUICK
@given(rows=st.integers(1, 40), size=st.integers(1, 16), epochs=st.integers(1, 3))
def test_batches_cover_every_epoch(rows, size, epochs):
    total = rows * epochs
    starts = range(0, total, size)
    stream = [i for at in starts for i in epoch_rows(at, min(at + size, total), rows, 7)]
    assert len(stream) == total
    for e in range(epochs):
        assert sorted(stream[e * rows : (e + 1) * rows]) == list(range(rows))


def test_batches_do_not_depend_on_ranks_or_on_where_one_resumes(world, processor):
    examples = load_data(world["prompts"])
    encoded = Encoded(examples, processor, lambda *row: row)
    whole = batches(encoded, 8, seed=1)
    first, second = ([e.index for _, (e, _) in next(whole)] for _ in range(2))
    shares = [next(batches(encoded, 8, 1, share=(r, 2))) for r in range(2)]
    shares = [[e.index for _, (e, _) in share] for share in shares]
    assert sorted(first) == sorted(shares[0] + shares[1]) and first[0::2] == shares[0]
    resumed = next(batches(encoded, 8, seed=1, start=8))
    assert [e.index for _, (e, _) in resumed] == second
    # A prompt's number is its place in the stream: a row that is drawn twice has two.
    assert [p.index for _, (_, p) in resumed] == list(range(8, 16))
    assert all(where == e.where for where, (e, _) in resumed)


def test_the_stream_ends_at_total(world, processor):
    """Behind it batches are empty, and a rank may be left without rows before."""
    encoded = Encoded(load_data(world["prompts"]), processor, lambda example, _: example.index)
    lengths = lambda steps, *args, **share: [  # noqa: E731
        len(batch) for _, batch in zip(range(steps), batches(encoded, *args, **share))
    ]
    assert lengths(5, 8, 3, 0, 20) == [8, 8, 4, 0, 0]
    assert lengths(3, 8, 3, 8, 20) == [8, 4, 0]
    shares = [lengths(3, 8, 3, 0, 20, share=(r, 3)) for r in range(3)]
    assert shares == [[3, 3, 2], [3, 3, 1], [2, 2, 1]]
    assert lengths(2, 2, 3, 0, 3, share=(1, 2)) == [1, 0]


@QUICK
@given(st.lists(st.lists(st.integers(1, 99), max_size=9), min_size=1, max_size=6))
def test_rows_are_dealt_by_length(sizes):
    """The fullest rank has no more than a mean share and the smallest row that it was given."""
    owners = _owners(sizes)
    dealt = [(owner, n) for pair in zip(owners, sizes) for owner, n in zip(*pair, strict=True)]
    held = [[n for owner, n in dealt if owner == rank] for rank in range(len(sizes))]
    fullest = max(held, key=sum)
    assert sum(map(len, held)) == sum(map(len, sizes))
    assert sum(fullest) <= sum(map(sum, sizes)) / len(sizes) + min(fullest, default=0)


def test_the_longest_row_is_dealt_first_and_stays_where_it_can():
    assert _owners([[9, 8], [2, 1]]) == [[0, 1], [1, 0]]
    assert _owners([[1, 9], [2, 8]]) == [[0, 0], [1, 1]]


def test_batches_do_not_touch_the_random_numbers_of_a_run(world, processor):
    encoded = Encoded(load_data(world["prompts"]), processor, lambda example, _: example.index)
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    next(batches(encoded, 8, seed=3))
    assert torch.equal(torch.rand(1), expected)


def only_even(example, prompt):
    if example.index % 2:
        raise RowError("odd")
    return example.index, prompt.input_ids


def test_rows_encoded_ahead_are_the_same(world, processor):
    """In other processes, with errors that keep their place, their reason and their row."""
    encoded = Encoded(load_data(world["prompts"]), processor, only_even)
    streams = [batches(encoded, 8, 1, total=24, workers=w) for w in (0, 2)]
    here, ahead = ([next(stream) for _ in range(3)] for stream in streams)
    assert len(here) == len(ahead) == 3
    for (where, a), (where_ahead, b) in zip(sum(here, []), sum(ahead, [])):
        assert where == where_ahead
        if isinstance(a, RowError):
            assert (str(a), a.where) == (str(b), b.where) and str(a) == "odd"
            assert int(a.where.rsplit(":", 1)[1]) % 2 == 0  # lines count from 1
        else:
            assert a[0] == b[0] and torch.equal(a[1], b[1])


@pytest.mark.parametrize("held_out", [False, True])
def test_a_row_has_one_name_before_and_after_it_is_read(world, processor, held_out):
    """Also where some rows are held out, so that the numbers are not those of the file."""
    rows = load_data(world["prompts"])
    rows = hold_out(rows, 0.2, seed=0)[0] if held_out else rows
    encoded = Encoded(rows, processor, only_even)
    read = encoded[[(number, number) for number in range(8)]]
    assert [where for where, _ in read] == [encoded.where(number) for number in range(8)]


def test_encoded_keeps_errors_in_their_places(world, processor):
    """Rows that cannot be read, encoded, or taken stand beside those that can."""
    good = load_data(world["prompts"])[:3]
    chat = [{"role": "user", "content": [{"type": "image"}]}]
    rows = [good[0], Example(1, "f:1", chat, [b"none"]), good[1], good[2]]

    class Rows(list):
        def __getitem__(self, i):
            if i == 3:
                raise RowError("cannot be read")
            return super().__getitem__(i)

    def encode(example, prompt):
        if example is good[1]:
            raise RowError("not this one")
        return example.where, len(prompt.input_ids)

    draws = list(enumerate([3, 0, 1, 2]))
    wheres, items = zip(*Encoded(Rows(rows), processor, encode)[draws])
    assert wheres[1:] == (good[0].where, "f:1", good[1].where)
    assert [type(item) for item in items] == [RowError, tuple, RowError, RowError]
    assert [str(item)[:14] for item in items[::3]] == ["cannot be read", "not this one"]
    assert "cannot be opened" in str(items[2]) and items[2].where == "f:1"
    assert items[1][0] == good[0].where and items[3].where == good[1].where
    longest = items[1][1]
    for limit, kind in ((longest, tuple), (longest - 1, Unfit)):
        ((_, item),) = Encoded(good, processor, encode, max_prompt_length=limit)[[(0, 0)]]
        assert type(item) is kind
    assert str(item) == f"{longest} tokens are more than --max_prompt_length {longest - 1}"
    assert item.where == good[0].where


def test_large_images_are_scaled_down(tmp_path, processor):
    """To the long side that is asked for, their shape kept; smaller ones are left alone."""
    Image.new("RGB", (128, 64)).save(tmp_path / "wide.png")
    chat = [{"role": "user", "content": [{"type": "image"}]}]
    grid = partial(encode_prompts, processor, [Example(0, "r", chat, [str(tmp_path / "wide.png")])])
    grids = [grid(size)[0].image_grid_thw.tolist()[0] for size in (None, 64, 128, 4096)]
    assert grids == [[1, 8, 16], [1, 4, 8], [1, 8, 16], [1, 8, 16]]


def test_max_pixels_is_the_processors_own_resizing(world, tmp_path):
    """Photos become as few tokens as with a processor whose files say so; small ones stay."""
    chat = [{"role": "user", "content": [{"type": "image"}]}]
    sizes, rows = [(256, 256), (500, 90), (1, 3), (32, 16)], []
    for i, size in enumerate(sizes):
        Image.effect_noise(size, 50).save(tmp_path / f"{i}.jpg")
        rows.append(Example(i, "r", chat, [str(tmp_path / f"{i}.jpg")]))
    limited, without = (load_processor(world["init"]) for _ in range(2))
    files = processor_files(world["init"])
    image = json.loads(files["preprocessor_config.json"])
    image["size"] = {"shortest_edge": 256, "longest_edge": 4096}
    files["preprocessor_config.json"] = json.dumps(image).encode()
    write_files(tmp_path / "p", files)
    encoded = Encoded(rows, limited, lambda example, prompt: prompt, max_pixels=4096)
    for (_, prompt), expected, more in zip(
        encoded[list(enumerate(range(4)))],
        encode_prompts(load_processor(tmp_path / "p"), rows),
        encode_prompts(without, rows),
    ):
        assert torch.equal(prompt.pixel_values, expected.pixel_values)
        assert torch.equal(prompt.input_ids, expected.input_ids)
        tokens = [int((p.input_ids == limited.image_token_id).sum()) for p in (prompt, more)]
        assert tokens == [[16, 256], [9, 186], [2, 2], [2, 2]][prompt.index]
    few = Encoded(rows, limited, lambda example, prompt: prompt, max_pixels=1)
    assert [len(p.pixel_values) for _, p in few[list(enumerate(range(4)))]] == [4, 4, 4, 4]
    other = SimpleNamespace(image_processor=CLIPImageProcessorPil())
    with pytest.raises(UserError, match="--max_pixels: CLIPImageProcessorPil resizes to one size"):
        Encoded(rows, other, None, max_pixels=4096)


# --------------------------------------------------------------------------------------------------
# Views and packs


def test_views_hold_what_they_should(processor):
    response = Response("a caption", "some thoughts", "42")
    perception, reasoning = encode_views(processor, response)
    eos = processor.tokenizer.eos_token_id
    assert perception[-1] == reasoning[-1] == eos
    assert decode(processor, perception).strip() == "<caption>a caption</caption>"
    assert decode(processor, reasoning) == "<think>some thoughts</think>\n<answer>42</answer>"


def test_views_are_blind_to_layout(processor):
    """White space around the blocks, and how the tokens were sampled, do not reach the
    discriminator."""
    tight = "<caption>a b</caption><think>c</think><answer>1</answer>"
    loose = " <caption>\na b </caption>\n\n<think> c\n</think>  <answer>1</answer>\n"
    for a, b in zip(
        encode_views(processor, parse_response(tight)),
        encode_views(processor, parse_response(loose)),
    ):
        assert torch.equal(a, b)


@QUICK
@given(lengths=st.lists(st.integers(2, 90), min_size=1, max_size=30), budget=st.integers(90, 200))
def test_rows_stand_in_the_first_pack_with_room(lengths, budget):
    """So no two packs would fit into one."""
    prompt = Prompt(0, torch.zeros(1, dtype=torch.long), torch.zeros(3, 1, dtype=torch.long))
    groups = [Group(prompt, [torch.ones(length - 1)]) for length in lengths]
    for order in (groups, sorted(groups, key=lambda group: -group.num_tokens)):
        sizes = [pack.input_ids.numel() for pack in make_packs(order, budget)]
        assert sum(sizes) == sum(lengths) and max(sizes) <= budget
        assert all(a + b > budget for i, a in enumerate(sizes) for b in sizes[:i])


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
    for g, group in enumerate(groups):
        assert [i for of, i in members if of == g] == list(range(len(group.branches)))
    assert len(members) == sum(len(group.branches) for group in groups)
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
            at = segment.start + segment.prompt_length
            following = int(pack.position_ids[:, 0, segment.start : at].max()) + 1
            for length in segment.branch_lengths:
                assert pack.position_ids[0, 0, at : at + length].tolist() == list(
                    range(following, following + length)
                )
                at += length
        at = 0
        for segment in pack.segments:
            for length in segment.branch_lengths:
                assert int(pack.predictors[at]) == segment.start + segment.prompt_length - 1
                at += length
