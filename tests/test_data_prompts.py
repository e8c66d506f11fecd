"""What a policy is asked: what a chat template has to write, system turns, and that all stages ask
alike."""

import copy
import io
import json
from types import SimpleNamespace

import pytest
from PIL import Image
from tokenizers import processors

from data import SYSTEM_PROMPT, Encoded, encode_prompts, load_examples
from support.errors import RowError, UserError
from support.huggingface import load_processor, write_chats, write_files
from support.rows import Example

# --------------------------------------------------------------------------------------------------
# Chat templates


def test_a_prompt_begins_once(world):
    """Where the tokenizer adds a beginning of sequence, and the template writes one as well."""
    writes, silent = with_template(world, "{{ bos_token }}" + TURNS), with_template(world, TURNS)
    later = with_template(world, "{%- set a = 1 %} {{ bos_token }}" + TURNS)
    plain = encode_prompts(silent, [Example(0, "f", MORE, [])])[0].input_ids
    begin = writes.tokenizer.convert_tokens_to_ids("<|endoftext|>")
    adds = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", begin)]
    )
    for processor in (writes, silent):
        processor.tokenizer.bos_token = "<|endoftext|>"
        processor.tokenizer.backend_tokenizer.post_processor = adds
        (prompt,) = encode_prompts(processor, [Example(0, "f", MORE, [])])
        assert prompt.input_ids.tolist() == [begin, *plain.tolist()]
        chat = dict(conversation=MORE, add_generation_prompt=True, tokenize=True)
        assert processor.apply_chat_template(**chat, return_dict=False)[0] == [begin, *plain]
    later.tokenizer.bos_token = "<|endoftext|>"
    later.tokenizer.backend_tokenizer.post_processor = adds
    (prompt,) = encode_prompts(later, [Example(0, "f", MORE, [])])
    assert prompt.input_ids.tolist().count(begin) == 1


PARTS = """{%- for part in m.content %}{{ "[image]" if part.type == "image" else part.text }}
{%- endfor %}"""
TURNS = "{%- for m in messages %}<{{ m.role }}>" + PARTS + "{%- endfor %}<assistant>"
ALTERNATE = (
    """{%- for m in messages[1:] %}{%- if (m.role == "user") != (loop.index0 % 2 == 0) %}
{{- raise_exception("roles must alternate") }}{%- endif %}{%- endfor %}"""
    + TURNS
)
NO_SYSTEM = (
    """{%- if messages[0].role == "system" %}{{- raise_exception("no system role") }}
{%- endif %}"""
    + TURNS
)
DROPS_SYSTEM = TURNS.replace("<{{", "{%- if m.role != 'system' %}<{{", 1)
DROPS_SYSTEM = DROPS_SYSTEM.replace("{%- endfor %}<a", "{%- endif %}{%- endfor %}<a")
SYSTEM_AS_TEXT = TURNS.replace(
    PARTS, "{%- if m.role == 'system' %}{{ m.content }}{%- else %}" + PARTS + "{%- endif %}"
)
USER_ONLY_IN_PARTS = SYSTEM_AS_TEXT.replace("== 'system'", "!= 'user'")
TEXT_ONLY = "{%- for m in messages %}<{{ m.role }}>{{ m.content }}{%- endfor %}<assistant>"
NO_IMAGE = TURNS.replace("[image]", "")
NO_QUESTION = TURNS.replace(PARTS, "{{ m.content[0].text or '[image]' }}")
LAST_ONLY = "{%- set m = messages[-1] %}<{{ m.role }}>" + PARTS + "<assistant>"
ASKED = [
    {"role": "system", "content": [{"type": "text", "text": "Be brief."}]},
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "How many?"}]},
]
MORE = [{"role": "user", "content": [{"type": "text", "text": "And now?"}]}]


def with_template(world, template) -> object:
    processor = load_processor(world["init"])
    processor.chat_template = template
    return processor


@pytest.mark.parametrize(
    "template, written",
    [
        (TURNS, "<system>Be brief.<user>[image]How many?<assistant>"),
        (USER_ONLY_IN_PARTS, "<system>Be brief.<user>[image]How many?<assistant>"),
        (SYSTEM_AS_TEXT, "<system>Be brief.<user>[image]How many?<assistant>"),
        (NO_SYSTEM, "<user>Be brief.\n\n[image]How many?<assistant>"),
        (DROPS_SYSTEM, "<user>Be brief.\n\n[image]How many?<assistant>"),
    ],
)
def test_a_prompt_comes_through_every_chat_template(world, template, written):
    """One that takes no system turn has the prompt in the user's turn."""
    chats = copy.deepcopy([ASKED, ASKED[1:]])
    assert write_chats(with_template(world, template), chats) == [
        written,
        "<user>[image]How many?<assistant>",
    ]
    assert chats == [ASKED, ASKED[1:]]
    said = {"role": "assistant", "content": [{"type": "text", "text": "Two."}]}
    (text,) = write_chats(with_template(world, template), [[*ASKED, said, *MORE]])
    assert text == written.replace("<assistant>", "<assistant>Two.<user>And now?<assistant>")


@pytest.mark.parametrize(
    "template, why",
    [
        (None, "does not have a chat template"),
        ("{% for", "xpected"),
        ("{{ messages.nothing.at_all }}", "has no attribute"),
        (TEXT_ONLY, "drops one of them"),
        (TEXT_ONLY.replace("{{ m.content }}", "{{ 'x' + m.content }}"), "concatenate"),
        (NO_IMAGE, "drops one of them"),
        (NO_QUESTION, "drops one of them"),
    ],
)
def test_a_chat_template_that_is_of_no_use_is_one_line_at_the_start(world, template, why):
    processor = with_template(world, template)
    with pytest.raises(UserError, match=why) as error:
        Encoded([], processor, None)
    assert f"{world['init']}: its chat template cannot" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_chat_template_that_writes_one_question_only(world):
    processor = with_template(world, LAST_ONLY)
    assert write_chats(processor, [ASKED]) == ["<user>Be brief.\n\n[image]How many?<assistant>"]
    said = {"role": "assistant", "content": [{"type": "text", "text": "Two."}]}
    with pytest.raises(RowError, match="drops 'Be brief.' from the row"):
        write_chats(processor, [[*ASKED, said, *MORE]])


def test_a_row_that_the_chat_template_refuses_is_a_bad_row(world):
    """The others of its batch are encoded."""
    template = ALTERNATE.replace("[image]", "<|vision_start|><|image_pad|><|vision_end|>")
    encoded = Encoded([], with_template(world, template), None)
    picture = PNG(32, 16)
    chats = [ASKED, ASKED + MORE, ASKED]
    rows = [Example(i, f"f:{i}", chat, [picture]) for i, chat in enumerate(chats)]
    prompts = encode_prompts(encoded.processor, rows)
    assert [isinstance(prompt, RowError) for prompt in prompts] == [False, True, False]
    assert "chat template refuses the row (roles must alternate)" in str(prompts[1])
    assert prompts[1].where == "f:1"


def PNG(*size) -> bytes:  # noqa: N802
    file = io.BytesIO()
    Image.new("RGB", size).save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize("error", [MemoryError(), ZeroDivisionError("division by zero"), TypeError])
def test_whatever_a_processor_raises_of_a_row_makes_it_a_bad_row(world, error):
    """And of a blank image, one line before the first row."""
    processor = load_processor(world["init"])
    plain = processor.image_processor.preprocess

    def preprocess(images, **options):
        if any(image.size == (48, 16) for row in images for image in row) or error is TypeError:
            raise error
        return plain(images, **options)

    processor.image_processor.preprocess = preprocess
    if error is TypeError:
        with pytest.raises(UserError, match="cannot encode a blank image .*TypeError"):
            Encoded([], processor, None)
        return
    rows = [Example(i, "f", ASKED, [PNG(w, 16)]) for i, w in enumerate((32, 48, 32))]
    prompts = encode_prompts(processor, rows)
    assert [isinstance(prompt, RowError) for prompt in prompts] == [False, True, False]
    assert f"refuses the row ({type(error).__name__}" in str(prompts[1])


# --------------------------------------------------------------------------------------------------
# What stages share


def checkpoint(tmp_path, name: str, **shared) -> str:
    write_files(tmp_path / name, {"prism.json": json.dumps(shared).encode()})
    return str(tmp_path / name)


def asked(tmp_path, *checkpoints, own=(None,), **flags):
    """-> (the system turn of each row, what a save tells the next stage). `own` are the rows' own
    system turns."""
    rows = [{"question": "q", "answer": "1"} | ({"system": text} if text else {}) for text in own]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = {"system_prompt": None, "max_pixels": None, "image_dir": None} | flags
    config = SimpleNamespace(data=[str(tmp_path / "rows.jsonl")], **given)
    examples = load_examples(config, ("answer",), *checkpoints)
    firsts = [example.messages[0] for example in examples]
    turns = [m["content"][0]["text"] if m["role"] == "system" else "" for m in firsts]
    assert config.max_pixels == examples.for_next_stage["max_pixels"]
    return turns, examples.for_next_stage


def test_all_stages_ask_alike(tmp_path, capsys):
    """A row's own system turn, the flag, the checkpoint's, the project's: in this order."""
    foreign = checkpoint(tmp_path, "foreign")
    assert asked(tmp_path, foreign) == (
        [SYSTEM_PROMPT],
        {"system_prompt": SYSTEM_PROMPT, "max_pixels": None},
    )
    ours = checkpoint(tmp_path, "ours", system_prompt="Ours.", max_pixels=4096)
    shared = {"system_prompt": "Ours.", "max_pixels": 4096}
    assert asked(tmp_path, ours) == (["Ours."], shared)
    assert asked(tmp_path, ours, own=["Ours.", "Ours."]) == (["Ours."] * 2, shared)
    assert asked(tmp_path, ours, foreign, own=["Ours."]) == (["Ours."], shared)
    silent = checkpoint(tmp_path, "silent", system_prompt="", max_pixels=None)
    assert asked(tmp_path, silent) == ([""], {"system_prompt": "", "max_pixels": None})
    assert asked(tmp_path, str(tmp_path / "none"))[0] == [SYSTEM_PROMPT]
    assert capsys.readouterr().err == ""


def test_what_differs_from_a_checkpoint_is_said_in_one_line(tmp_path, capsys):
    ours = checkpoint(tmp_path, "ours", system_prompt="Ours.", max_pixels=4096)
    said = f"{ours} was trained with system_prompt 'Ours.'; this run uses "
    mend = ". To make them agree, set --system_prompt or change the rows' own system turns"
    assert asked(tmp_path, ours, system_prompt="Mine.") == (
        ["Mine."],
        {"system_prompt": "Mine.", "max_pixels": 4096},
    )
    assert capsys.readouterr().err == said + "'Mine.'" + mend + "\n"
    assert asked(tmp_path, ours, system_prompt="")[0] == [""]
    assert capsys.readouterr().err == said + "''" + mend + "\n"
    # Most of the rows have a turn of their own, and the next stage is told of that one.
    turns, shared = asked(tmp_path, ours, own=["A.", "A.", None], max_pixels=1024)
    assert turns == ["A.", "A.", "Ours."]
    assert shared == {"system_prompt": "A.", "max_pixels": 1024}
    first, second = capsys.readouterr().err.splitlines()
    assert first == said + "'A.'" + mend and "max_pixels 4096; this run uses 1024" in second
    foreign = checkpoint(tmp_path, "silent", system_prompt="Ours.", max_pixels=None)
    asked(tmp_path, foreign, own=["Ours."], max_pixels=1024)
    said = f"{foreign} was trained with max_pixels none (the processor's own limit); this run uses "
    assert capsys.readouterr().err == said + "1024. To make them agree, leave --max_pixels out\n"
    # Left out, the flag has the first checkpoint's limit, which is not the second one's.
    asked(tmp_path, ours, foreign, own=["Ours."])
    mend = "set --max_pixels to that limit, which the model's preprocessor_config.json has"
    assert capsys.readouterr().err == said + f"4096. To make them agree, {mend}\n"
    # A flag that no row needs changes nothing.
    asked(tmp_path, ours, own=["Ours."], system_prompt="Mine.")
    assert capsys.readouterr().err == ""
    # The discriminator of a game was warmed up with another prompt than the policy's.
    judge = checkpoint(tmp_path, "judge", system_prompt="Theirs.", max_pixels=4096)
    assert asked(tmp_path, ours, judge)[0] == ["Ours."]
    assert f"{judge} was trained with system_prompt 'Theirs.'" in capsys.readouterr().err


@pytest.mark.parametrize("content", ["{", "[]", '{"system_prompt": 3}', '{"max_pixels": "many"}'])
def test_a_damaged_note_of_a_checkpoint_is_one_line(tmp_path, content):
    (tmp_path / "prism.json").write_text(content)
    with pytest.raises(UserError, match="prism.json: damaged; copy .* remove this file"):
        asked(tmp_path, str(tmp_path))
