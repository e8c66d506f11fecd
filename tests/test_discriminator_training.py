"""The discriminator's training: pairs that cannot be compared are left out and named, and a trained
discriminator scores caption and reasoning each for its own errors."""

import dataclasses
import json
import os
import random
import time
from types import SimpleNamespace

import pytest
import torch
from transformers import CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration, PhiConfig

from data import Response, encode_prompts, parse_response
from discriminator import Comparison, judge, load_discriminator
from support import digits
from support.huggingface import processor_files, write_files
from support.optimizer import learning_rate_at, optimizer_step
from support.rows import load_data
from tests.conftest import fails, launch, lines
from tests.judges import sides
from tests.test_discriminator import SHORT

# --------------------------------------------------------------------------------------------------
# What cannot be compared is left out in the open


def pair_rows(world) -> tuple[list[dict], int]:
    """Pairs in both released schemas, three of them unusable, and their number."""
    folder = os.path.dirname(world["prompts"])
    rows = []
    for number, row in enumerate([json.loads(line) for line in open(world["prompts"])][:15]):
        teacher, student = row["response"], row["response"].replace("digits are", "digits may be")
        pair = {"image": os.path.join(folder, row["image"])}
        if number == 3:
            student = student.replace("</think>", "")  # breaks the format
        if number == 6:
            teacher = "What I see: " + teacher  # breaks the format
        if number == 9:
            student = student.replace("<think>", "<think>" + "1 + 1 = 2. " * 80)  # too long
        if number % 2:
            pair |= {
                "question": row["question"],
                "teacher_response": teacher,
                "student_response": student,
            }
        else:
            pair |= {"prompt": row["question"]}
            for side, text in (("teacher", teacher), ("student", student)):
                caption, cot = text.split("</caption>\n")
                pair |= {f"{side}_caption": caption + "</caption>", f"{side}_cot": cot}
        rows.append(pair)
    return rows, 3


@pytest.mark.parametrize("share", [0, 0.5])
def test_pairs_in_both_schemas_and_those_that_are_left_out(world, tmp_path, share):
    rows, bad = pair_rows(world)
    data, out = tmp_path / "pairs.jsonl", tmp_path / "d"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = launch(
        "discriminator.py",
        "--model",
        world["init"],
        "--data",
        data,
        "--image_dir",
        "/",
        "--output_dir",
        out,
        "--max_length",
        400,
        "--per_device_train_batch_size",
        2,
        "--gradient_accumulation_steps",
        2,
        "--validation_share",
        share,
    )
    left = {row["row"]: row["why"] for row in lines(out / "left_out.jsonl")}
    assert set(left) == {f"{data}:4", f"{data}:7", f"{data}:10"} and all(
        where in done.stderr for where in left
    )
    assert "student" in left[f"{data}:4"] and "is not of the format" in left[f"{data}:4"]
    assert "supervision" in left[f"{data}:7"] and "is not of the format" in left[f"{data}:7"]
    assert "--max_length 400" in left[f"{data}:10"]
    steps = lines(out / "metrics.jsonl")
    assert steps[-1]["rows_left_out"] == bad
    if share:  # only pairs that were compared count as held out
        assert steps[-1]["validation_pairs"] == 8 - len(set(left) & held_out(rows, data, 8))
        assert 0 <= steps[-1]["validation_pair_accuracy_perception"] <= 1
        assert steps[-1]["validation_pair_accuracy_reasoning"] is None or not set(
            left
        )  # reasoning is the same on both sides


def held_out(rows, data, count: int, seed: int = 0) -> set[str]:
    order = [f"{data}:{number + 1}" for number in range(len(rows))]
    random.Random(seed).shuffle(order)
    return set(order[:count])


def test_pairs_with_missing_fields_are_named_and_too_many_end_the_run(world, tmp_path):
    """Each names what was found and what was expected; the third ends the run in one line."""
    rows, _ = pair_rows(world)
    del rows[6]  # the teacher that breaks the format
    bad = {number for number, row in enumerate(rows, 1) if row.pop("student_response", None)}
    assert len(bad) > 3
    data, out = tmp_path / "pairs.jsonl", tmp_path / "d"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ("--model", world["init"], "--data", data, "--image_dir", "/", "--output_dir", out)
    said = fails("discriminator.py", *flags)
    left = lines(out / "left_out.jsonl")
    assert len(left) == 3 and {row["row"] for row in left} < {f"{data}:{n}" for n in bad}
    for row in left:
        for found in ("image", "question", "teacher_response"):
            assert f"'{found}'" in row["why"]
        for expected in ("student_response", "student_caption", "student_cot"):
            assert f"`{expected}`" in row["why"]
        assert "pass --policy, which writes every student anew" in row["why"]
    assert "rows are bad, over" in said and "--max_bad_fraction 0.01" in said
    assert f"{left[-1]['row']}: {left[-1]['why']}" in said
    assert not (out / "model.safetensors").exists()


def test_a_model_without_gated_mlps_is_one_line(world, tmp_path):
    """A LLaVA on Phi, whose MLPs are fc1 and fc2."""
    text = PhiConfig(
        vocab_size=600,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
    )
    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=32,
        patch_size=8,
    )
    model = LlavaForConditionalGeneration(
        LlavaConfig(text_config=text, vision_config=vision, image_token_index=5)
    )
    model.save_pretrained(tmp_path / "phi")
    write_files(tmp_path / "phi", processor_files(world["init"]))
    rows, _ = pair_rows(world)
    data = tmp_path / "pairs.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    said = fails(
        "discriminator.py",
        "--model",
        tmp_path / "phi",
        "--data",
        data,
        "--image_dir",
        "/",
        "--output_dir",
        tmp_path / "d",
    )
    assert f"{tmp_path / 'phi'}: " in said and "PhiMLP" in said and "fc1" in said  # what was found
    assert "gate_proj" in said and "up_proj" in said and "down_proj" in said  # what was expected
    assert "or warm this one up with discriminator.py --experts dense" in said


# --------------------------------------------------------------------------------------------------
# Trained, it keeps the causes apart

LOOKALIKE = {a: b for pair in ("38", "71", "94", "56", "02") for a, b in (pair, pair[::-1])}


def misread(text: str, rng: random.Random) -> str:
    """One digit becomes its look-alike, and as often the other way round: which of the two it is,
    only the image tells."""
    at = rng.choice([i for i, c in enumerate(text) if c.isdigit()])
    return text[:at] + LOOKALIKE[text[at]] + text[at + 1 :]


def corrupted(exact: Response, rng: random.Random) -> list[Response]:
    """Only the caption wrong, only the reasoning (the digit that it looks at, not its answer),
    both."""
    caption, (digit, rest) = misread(exact.caption, rng), exact.think.split(" ", 1)
    think = f"{misread(digit, rng)} {rest}"
    return [
        Response(caption, exact.think, exact.answer),
        Response(exact.caption, think, exact.answer),
        Response(caption, think, exact.answer),
    ]


@pytest.fixture(scope="module")
def trained_judge(tmp_path_factory):
    """A discriminator upcycled from a policy that reads a digit, trained on corrupted responses;
    and held-out comparisons (CAPTION, REASONING, BOTH are the students of each), of scans that
    neither has seen."""
    folder = tmp_path_factory.mktemp("one")
    paths = digits.build(
        folder / "world",
        digits.World(
            digits=1,
            noise=0.0,
            kinds=["count"],
            train_share=0.9,
            validation_share=0.05,
            pretrain_rows=4,
            sft_rows=1350,
            curated_share=1,
            prompt_rows=200,
            question_rows=4,
            validation_rows=4,
            test_rows=4,
        ),
    )
    policy = folder / "policy"
    launch(
        "sft.py",
        "--model",
        paths["init"],
        "--data",
        paths["curated"],
        "--output_dir",
        policy,
        "--max_steps",
        150,
        "--learning_rate",
        4e-3,
        "--per_device_train_batch_size",
        32,
    )
    discriminator, processor = load_discriminator(str(policy))
    start = time.perf_counter()
    optimizer = torch.optim.AdamW(discriminator.parameters(), lr=1e-3, weight_decay=0.01)
    rng = random.Random(0)

    def encoded(name):
        examples = list(load_data(paths[name]))
        return list(
            zip(encode_prompts(processor, examples), (parse_response(e.response) for e in examples))
        )

    def comparisons(rows):
        return [Comparison(prompt, exact, corrupted(exact, rng)) for prompt, exact in rows]

    rows, steps = encoded("curated"), 100
    rates = SimpleNamespace(learning_rate=1e-3, lr_scheduler_type="cosine", warmup_steps=0.1)
    discriminator.train()
    for step in range(1, steps + 1):
        batch = comparisons(rng.sample(rows, 24))
        judge(discriminator, batch, processor, 16384, backward=True)
        optimizer_step(discriminator, optimizer, learning_rate_at(step, steps, rates), 1.0)
    print(f"trained in {time.perf_counter() - start:.0f} s")
    return discriminator.eval(), processor, comparisons(encoded("prompts"))


CAPTION, REASONING, BOTH = range(3)


def effect(higher: torch.Tensor, lower: torch.Tensor) -> float:
    """Cohen's d: the difference of the means in pooled standard deviations."""
    return float((higher.mean() - lower.mean()) / ((higher.var() + lower.var()) / 2).sqrt())


def test_a_trained_discriminator_keeps_causes_apart(trained_judge):
    discriminator, processor, held = trained_judge
    judged = judge(discriminator, held, processor, 4000, backward=False)
    exact, wrong = sides(judged)
    assert judged.valid.shape == (len(held), 3) and judged.valid.all()
    for view, spoiled, spared in ((0, CAPTION, REASONING), (1, REASONING, CAPTION)):
        for student in (spoiled, BOTH):
            accuracy = (exact[:, student, view] > wrong[:, student, view]).float().mean()
            d = effect(exact[:, student, view], wrong[:, student, view])
            print(f"view {view}, student {student}: pair accuracy {accuracy:.3f}, d = {d:.2f}")
            assert accuracy > 0.9 and d > 1
        # The other view does not contain what was spoiled: not a small effect but none.
        assert torch.equal(exact[:, spared, view], wrong[:, spared, view])
    for name in ("perception", "reasoning"):
        right = judged.metrics[f"pair_accuracy_{name}"]
        assert right.count == 2 * len(held) and right.total / right.count > 0.9

    # Nor by being computed once: beside other texts, in another pack, on the other side, the spared
    # view scores the same.
    spoiled = [
        Comparison(c.prompt, c.students[CAPTION], [SHORT, c.students[REASONING]]) for c in held
    ]
    teacher, student = sides(judge(discriminator, spoiled, processor, 700, backward=False))
    torch.testing.assert_close(teacher[:, 0, 1], exact[:, 0, 1], atol=1e-4, rtol=0)
    torch.testing.assert_close(student[:, 1, 0], exact[:, 0, 0], atol=1e-4, rtol=0)


def test_a_trained_discriminator_judges_texts_and_not_sides(trained_judge):
    """Sides swapped, the exact response still wins: what was learned is not "teacher"."""
    discriminator, processor, held = trained_judge
    swapped = [Comparison(c.prompt, c.students[BOTH], [c.teacher, c.students[BOTH]]) for c in held]
    teacher, student = sides(judge(discriminator, swapped, processor, 4000, backward=False))
    assert ((student > teacher)[:, 0].float().mean(0) > 0.9).all()
    assert torch.equal(student[:, 1], teacher[:, 1])


def test_a_trained_discriminator_looks_at_the_image(trained_judge):
    """With the images of other prompts the caption's score says nothing any more."""
    discriminator, processor, held = trained_judge
    moved = [
        dataclasses.replace(
            c, prompt=dataclasses.replace(c.prompt, pixel_values=d.prompt.pixel_values)
        )
        for c, d in zip(held, held[1:] + held[:1])
    ]
    judged = judge(discriminator, moved, processor, 4000, backward=False)
    right = judged.metrics["pair_accuracy_perception"]
    print(f"with other images: pair accuracy {right.total / right.count:.3f}")
    assert right.total / right.count < 0.7
