"""eval.py: its answers are those of transformers, its numbers are of all answers, and a result is
not replaced by one of another benchmark."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText

from data import TAGS, Response, encode_prompts
from eval import EvalConfig, keep_other_results, read_response
from support.errors import UserError
from support.huggingface import load_processor
from support.rows import load_data
from tests.conftest import ROOT, fails, launch, lines
from tests.test_pipeline import TINY, with_bad_rows


def test_eval_agrees_with_transformers(world, trained, tmp_path):
    """A checkpoint opened by transformers alone, in this other process, answers as eval.py says it
    does; on 1 and 2 ranks."""
    for ranks in (1, 2):
        launch(
            "eval.py",
            "--ckpt",
            trained,
            "--data",
            world["test"],
            "--output_dir",
            tmp_path / str(ranks),
            *TINY,
            ranks=ranks,
        )
    results = [json.loads((tmp_path / r / "eval.json").read_text()) for r in "12"]
    for name in (
        "accuracy",
        "caption_accuracy",
        "format_valid",
        "mean_response_tokens",
        "by_source",
        "rows",
    ):
        assert results[0][name] == results[1][name]
    assert (
        sum(part["rows"] for part in results[0]["by_source"].values()) == results[0]["rows"] == 24
    )

    policy = AutoModelForImageTextToText.from_pretrained(trained).eval()
    processor = load_processor(trained)
    examples = load_data(world["test"])[:4]
    for row, prompt in zip(
        lines(tmp_path / "1" / "generations.jsonl"), encode_prompts(processor, examples)
    ):
        ids = prompt.input_ids[None]
        out = policy.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            pixel_values=prompt.pixel_values,
            image_grid_thw=prompt.image_grid_thw,
            do_sample=False,
            max_new_tokens=48,
            mm_token_type_ids=(ids == processor.image_token_id).int(),
        )
        assert (
            processor.tokenizer.decode(out[0, ids.shape[1] :]).removesuffix("<|im_end|>")
            == row["response"]
        )


def test_eval_writes_length_and_verdict_of_each_answer(world, trained, tmp_path):
    """What a figure of response length against accuracy needs."""
    flags = ("--ckpt", trained, "--data", world["test"], *TINY)
    launch("eval.py", *flags, "--output_dir", tmp_path)
    result = json.loads((tmp_path / "eval.json").read_text())
    answers = lines(tmp_path / "generations.jsonl")
    tokens, right = ([answer[name] for answer in answers] for name in ("tokens", "correct"))
    assert len(answers) == 24 and all(1 <= count <= 48 for count in tokens)
    assert sum(tokens) / 24 == pytest.approx(result["mean_response_tokens"])
    assert sum(right) / 24 == pytest.approx(result["accuracy"])


def test_eval_of_several_samples(world, trained, tmp_path):
    """Means over all answers, and pass@k over the rows; on 1 and 2 ranks."""
    flags = ("--ckpt", trained, "--data", world["test"], "--num_samples", 4, *TINY)
    assert "error: --num_samples 4: needs a --temperature above 0" == fails("eval.py", *flags)
    said = []
    for ranks in (1, 2):
        out = tmp_path / str(ranks)
        launch("eval.py", *flags, "--temperature", 1.2, "--output_dir", out, ranks=ranks)
        result = json.loads((out / "eval.json").read_text())
        answers = lines(out / "generations.jsonl")
        assert [answer["row"] for answer in answers] == [i // 4 for i in range(96)]
        said.append([answer["response"] for answer in answers])
        parts = [(result, answers)]
        for source, part in result["by_source"].items():
            parts.append((part, [answer for answer in answers if answer["source"] == source]))
        for part, own in parts:
            right = {answer["row"] for answer in own if answer["correct"]}
            assert part["rows"] == len({answer["row"] for answer in own}) == len(own) / 4
            assert part["accuracy"] == sum(answer["correct"] for answer in own) / len(own)
            assert part["pass_at_k"] == len(right) / part["rows"]
        assert 0 < result["accuracy"] < result["pass_at_k"]
    assert len(set(said[0])) > 24
    assert sum(a == b for a, b in zip(*said)) >= 88  # rounding may move a boundary


@pytest.mark.parametrize(
    "pattern, said",
    [
        ("(?P<caption>.*", "is no regular expression (missing ) at position 14); write one with"),
        ("", "has the groups none; name them caption, think, answer, as in (?P<answer>.*)"),
        ("(?P<answer>.*)", "has the groups answer; name them caption, think, answer"),
        ("(?P<caption>.)(?P<think>.)(?P<answer>.)(?P<more>.)", "has the groups caption, think,"),
        ("(?P<caption>.)(?P<think>.)(?P<answer>(.){9999999})", "its counts multiply to 9999999, "),
        (r"(?:(?:(?:a{999}){999}){999,}){9}", "its counts multiply to 8973026991, which takes"),
    ],
)
def test_eval_refuses_a_pattern_before_it_answers(world, tmp_path, pattern, said):
    """And before it opens the rows and the checkpoint."""
    flags = ("--ckpt", tmp_path, "--data", world["test"], "--untagged", pattern)
    assert fails("eval.py", *flags).startswith(f"error: --untagged {pattern}: {said}")


@pytest.mark.parametrize("ranks", [1, 2])
def test_eval_does_not_match_for_ever(world, tmp_path, ranks):
    """A pattern that would try all ways to cut a response costs a second, and is named."""
    data, out = tmp_path / "rows.jsonl", tmp_path / "out"
    rows = open(world["test"]).read().splitlines()[:3]
    data.write_text("\n".join(rows))
    flags = ("--ckpt", world["init"], "--data", data, "--image_dir", Path(world["test"]).parent)
    pattern = r"(?P<caption>(.|..|...)*)(?P<think>[\x00\x01])(?P<answer>.)"
    flags += ("--untagged", pattern, "--output_dir", out, "--max_completion_length", 200)
    done = launch("eval.py", *flags, ranks=ranks)
    result = json.loads((out / "eval.json").read_text())
    answers = [row["response"] for row in lines(out / "generations.jsonl")]
    late = [a for a in answers if len(a) > 40 and not any(tag in a for tag in TAGS)]
    assert late and result["responses_unread"] == len(late)
    assert (result["rows"], result["accuracy"]) == (3, 0)
    told = f"{len(late)} responses would take over 1 s each to match, and so count as wrong"
    assert told in done.stderr


def test_a_pattern_that_calls_itself_is_bounded():
    with pytest.raises(TimeoutError):
        read_response("abc", "(?P<caption>a?)(?P<think>b?)(?P<answer>(?R))")


def test_a_group_that_takes_no_part_is_an_empty_block():
    pattern = r"(?P<caption>I see .*\.)?(?P<think>.*)It is (?P<answer>\w+)"
    assert read_response("So. It is 5", pattern) == Response("", "So. ", "5")
    assert read_response("I see 5. It is 5", pattern) == Response("I see 5.", " ", "5")


def test_eval_leaves_bad_rows_out(world, trained, tmp_path):
    """Also where one of two ranks has no row in its last batch."""
    data = tmp_path / "rows.jsonl"
    (place,) = with_bad_rows(world, data, 2, 1, "test")
    with open(data, "a") as file:  # and one that no answer could match
        file.write(json.dumps(lines(data)[0] | {"answer": "NaN"}) + "\n")
    flags = ("--ckpt", trained, "--data", data, "--image_dir", "/", "--output_dir", tmp_path / "o")
    done = launch("eval.py", *flags, "--per_device_eval_batch_size", 1, *TINY, ranks=2)
    result = json.loads((tmp_path / "o" / "eval.json").read_text())
    assert (result["rows"], result["rows_left_out"]) == (2, 2)
    assert f"left out: {place}: image" in done.stderr
    assert "no answer is right for the ground truth ['NaN']" in done.stderr
    rows = lines(tmp_path / "o" / "generations.jsonl")
    assert [row["where"] for row in rows] == [f"{data}:1", f"{data}:2"]
    # The same again takes its place; another benchmark does not.
    launch("eval.py", *flags, *TINY)
    other = tmp_path / "other.jsonl"
    shutil.copy(data, other)
    said = fails("eval.py", *[other if flag == data else flag for flag in flags], *TINY)
    assert f"{tmp_path}/o/eval.json: holds a result of --data {data}, not of {other}" in said
    assert fails("eval.py", *flags, *TINY, "--temperature", 1).count("0.0, not of 1.0")
    assert json.loads((tmp_path / "o" / "eval.json").read_text())["data"] == [str(data)]


def test_the_same_name_in_another_folder_is_another_benchmark(world, tmp_path):
    """As of two `test.jsonl`, each evaluated from its own folder."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        line = open(world["test"]).readline()
        (tmp_path / name / "test.jsonl").write_text(line)
    words = ("--ckpt", world["init"], "--data", "test.jsonl", "--output_dir", tmp_path / "out")
    words += ("--image_dir", Path(world["test"]).parent, "--max_completion_length", 8)
    start = [sys.executable, str(ROOT / "eval.py"), *map(str, words)]
    pipes = dict(capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    for folder, code in (("a", 0), ("a", 0), ("b", 2)):
        done = subprocess.run(start, cwd=tmp_path / folder, **pipes)
        assert done.returncode == code, done.stderr
    paths = [f"{tmp_path}/{name}/test.jsonl" for name in ("a", "b")]
    assert f"eval.json: holds a result of --data {paths[0]}, not of {paths[1]}" in done.stderr
    # A pattern changes what counts as right. Without one, a policy that knows no format is named.
    pattern = "(?P<caption>.*)(?P<think>.*)(?P<answer>.*)"
    done = subprocess.run([*start, "--untagged", pattern], cwd=tmp_path / "a", **pipes)
    assert done.returncode == 2 and "holds a result of --untagged None" in done.stderr
    done = subprocess.run(start, cwd=tmp_path / "a", **pipes)
    assert "no response has the format" in done.stderr and "--untagged" in done.stderr
    # A pattern must match all of a response; one that matches none is named too.
    pattern, other = "(?P<caption>!)(?P<think>!)(?P<answer>!)", ("--output_dir", tmp_path / "other")
    words = map(str, (*start, *other, "--untagged", pattern))
    done = subprocess.run(words, cwd=tmp_path / "a", **pipes)
    assert f"--untagged {pattern}: it matches no response from end to end" in done.stderr
    # So does all else on which a number depends.
    stored = json.loads((tmp_path / "out/eval.json").read_text())
    flags = {name: stored[name] for name in EvalConfig.__dataclass_fields__ if name in stored}
    same = EvalConfig(**flags, per_device_eval_batch_size=3, max_rollout_rows=2)
    keep_other_results(same, str(tmp_path / "out"))
    for name, value in dict(max_completion_length=9, system_prompt="?", max_pixels=99).items():
        with pytest.raises(UserError, match=f"(?s)holds a result of --{name} .*, not of"):
            keep_other_results(replace(same, **{name: value}), str(tmp_path / "out"))
