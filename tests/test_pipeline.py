"""The scripts as a user runs them: end to end, resumed after a kill, and with bad input."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from transformers import AutoModelForImageTextToText

from data import encode_prompts, load_data, load_processor
from tests.conftest import ROOT, launch

TINY = ("--max_completion_length", 48)


def lines(path) -> list[dict]:
    return [json.loads(line) for line in open(path)]


@pytest.fixture(scope="module")
def discriminator(world, trained, tmp_path_factory):
    out = tmp_path_factory.mktemp("d") / "d"
    launch(
        "discriminator.py",
        "--model",
        trained,
        "--policy",
        trained,
        "--data",
        world["prompts"],
        "--output_dir",
        out,
        "--max_steps",
        4,
        "--per_device_train_batch_size",
        8,
        "--gradient_accumulation_steps",
        1,
        "--learning_rate",
        1e-3,
        *TINY,
    )
    return out


def test_discriminator_run(discriminator):
    files = set(os.listdir(discriminator))
    assert {
        "config.json",
        "metrics.jsonl",
        "pairs.jsonl",
        "model.safetensors",
        "tokenizer.json",
    } <= files
    last = lines(discriminator / "metrics.jsonl")[-1]
    assert last["validation_pairs"] >= 1 and "validation_pair_accuracy_perception" in last
    pair = lines(discriminator / "pairs.jsonl")[0]
    assert pair["teacher_response"] and pair["student_response"] is not None


def test_align_run(world, trained, discriminator, tmp_path):
    out = tmp_path / "align"
    launch(
        "align.py",
        "--ckpt",
        trained,
        "--data",
        world["prompts"],
        "--discriminator",
        discriminator,
        "--output_dir",
        out,
        "--max_steps",
        3,
        "--num_generations",
        4,
        "--learning_rate",
        1e-3,
        "--max_tokens_per_pack",
        600,
        *TINY,
        ranks=2,
    )
    run = json.loads((out / "config.json").read_text())
    assert run["run"]["max_steps"] == 3 and run["model_type"] == "qwen3_vl"
    steps = lines(out / "metrics.jsonl")
    assert [s["step"] for s in steps] == [1, 2, 3]
    for name in (
        "loss",
        "discriminator_loss",
        "balance_loss",
        "format_valid",
        "response_length",
        "entropy",
        "grad_norm",
        "tokens_per_second",
        "time/rollout",
        "time/judge",
        "time/update",
        "score_gap_perception",
        "score_gap_reasoning",
        "pair_accuracy_perception",
        "pair_accuracy_reasoning",
        "score_teacher_perception",
        "score_student_reasoning",
        "expert_share_perception",
        "expert_share_reasoning",
        "ranks_without_valid",
        "rows_left_out",
    ):
        assert name in steps[0], name
    assert sum(steps[0]["expert_share_perception"][0]) == pytest.approx(1, abs=1e-3)
    rollouts = lines(out / "rollouts.jsonl")
    assert len(rollouts) == 3 * 4
    assert {"response", "score_perception", "score_reasoning", "advantage", "images"} <= set(
        rollouts[0]
    )
    moved = [k for k, v in load(out).items() if not torch.equal(v, load(trained)[k])]
    assert len(moved) > 40
    assert (out / "discriminator" / "model.safetensors").exists()


def load(path):
    return AutoModelForImageTextToText.from_pretrained(path).state_dict()


def test_align_makes_its_own_discriminator(world, trained, tmp_path):
    out = tmp_path / "align"
    launch(
        "align.py",
        "--ckpt",
        trained,
        "--data",
        world["prompts"],
        "--output_dir",
        out,
        "--max_steps",
        1,
        "--warmup_steps",
        2,
        "--num_generations",
        4,
        *TINY,
    )
    steps = lines(out / "metrics.jsonl")
    assert [s["warmup"] for s in steps] == [1.0, 1.0, 0.0]
    assert "grad_norm" not in steps[0] and steps[2]["grad_norm"] > 0
    assert steps[0]["d_learning_rate"] == 1e-5 and steps[2]["d_learning_rate"] == 1e-6


@pytest.mark.parametrize("algorithm", ["grpo", "dapo", "gspo"])
def test_rlvr_run(world, trained, tmp_path, algorithm):
    out = tmp_path / algorithm
    launch(
        "rlvr.py",
        "--ckpt",
        trained,
        "--data",
        world["prompts"],
        "--output_dir",
        out,
        "--algorithm",
        algorithm,
        "--max_steps",
        2,
        "--num_generations",
        4,
        "--per_device_train_batch_size",
        8,
        "--num_minibatches",
        2,
        "--learning_rate",
        1e-3,
        "--beta",
        0.01 if algorithm == "grpo" else 0,
        "--overlong_buffer",
        8,
        "--max_gen_batches",
        100,
        "--report_to",
        "tensorboard",
        *TINY,
    )
    steps = lines(out / "metrics.jsonl")
    for name in (
        "loss",
        "reward",
        "accuracy",
        "format_valid",
        "response_length",
        "entropy",
        "grad_norm",
        "clipped_low",
        "clipped_high",
        "kl_old",
        "ratio_min",
        "ratio_max",
        "tokens_per_second",
        "time/rollout",
        "time/update",
    ):
        assert steps[1][name] is not None, name
    assert steps[1]["ratio_max"] > 1 > steps[1]["ratio_min"] and steps[1]["sampled_scored_gap"] < 10
    assert ("kl_ref" in steps[1]) == (algorithm == "grpo")
    assert any(name.startswith("events.out") for name in os.listdir(out))


def test_one_step_per_batch_is_on_policy(world, trained, tmp_path):
    launch(
        "rlvr.py",
        "--ckpt",
        trained,
        "--data",
        world["prompts"],
        "--output_dir",
        tmp_path / "g",
        "--max_steps",
        1,
        *TINY,
    )
    (step,) = lines(tmp_path / "g" / "metrics.jsonl")
    assert (
        step["ratio_min"] == step["ratio_max"] == 1
        and step["clipped_low"] == step["clipped_high"] == 0
    )
    assert 0 < step["sampled_scored_gap"] < 1e-4


def test_eval_agrees_with_transformers(world, trained, tmp_path):
    """A checkpoint opened by transformers alone, in this other process, answers as eval.py says it does; on 1 and 2 ranks."""
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


def test_checkpoints_look_like_the_original(trained):
    assert {
        "chat_template.json",
        "config.json",
        "generation_config.json",
        "merges.txt",
        "model.safetensors",
        "preprocessor_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "video_preprocessor_config.json",
        "vocab.json",
    } <= set(os.listdir(trained))


@pytest.mark.parametrize(
    "script, flags",
    [
        ("sft.py", ("--per_device_train_batch_size", 8)),
        ("align.py", ("--num_generations", 4, "--warmup_steps", 2, *TINY)),
        (
            "rlvr.py",
            (
                "--num_generations",
                4,
                "--algorithm",
                "dapo",
                "--per_device_train_batch_size",
                1,
                "--max_gen_batches",
                100,
                *TINY,
            ),
        ),
    ],
)
def test_a_killed_run_resumes(world, trained, tmp_path, script, flags):
    """Killed behind a checkpoint and resumed, a run ends where an undisturbed one does."""
    flag, data = ("--model", world["sft"]) if script == "sft.py" else ("--ckpt", world["prompts"])
    model = (flag, trained, "--data", data)
    common = (
        *model,
        *flags,
        "--max_steps",
        6,
        "--learning_rate",
        1e-3,
        "--lr_scheduler_type",
        "constant",
        "--save_steps",
        2,
    )
    launch(script, *common, "--output_dir", tmp_path / "whole")
    arguments = [
        sys.executable,
        script,
        *map(str, common),
        "--output_dir",
        str(tmp_path / "killed"),
    ]
    process = subprocess.Popen(arguments, cwd=ROOT, stderr=subprocess.DEVNULL)
    saved = tmp_path / "killed" / "checkpoint-2"
    for _ in range(6000):
        if saved.exists() or process.poll() is not None:
            break
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert saved.exists() or list((tmp_path / "killed").glob("checkpoint-*"))
    assert not (tmp_path / "killed" / "model.safetensors").exists()  # it was killed before its end
    launch(script, *common, "--output_dir", tmp_path / "killed", "--resume")
    before, after = (
        lines(tmp_path / "whole" / "metrics.jsonl"),
        lines(tmp_path / "killed" / "metrics.jsonl"),
    )
    assert [s["step"] for s in after] == [s["step"] for s in before]
    losses = [[s["loss"] for s in steps if "loss" in s] for steps in (after, before)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4, abs=1e-6)
    whole, killed = load(tmp_path / "whole"), load(tmp_path / "killed")
    for name, weight in whole.items():
        torch.testing.assert_close(killed[name], weight, atol=1e-5, rtol=1e-4)


def table(header: str) -> list[list[str]]:
    """The cells of the README's table whose first row begins with `header`."""
    rows = (
        (ROOT / "README.md").read_text().split(f"| {header} |", 1)[1].split("\n\n")[0].splitlines()
    )
    return [
        [cell.strip() for cell in row.strip("|").split("|")]
        for row in (f" {header} |" + rows[0], *rows[2:])
    ]


def test_the_published_values_in_the_readme_are_the_defaults():
    from align import AlignConfig
    from discriminator import DiscriminatorConfig
    from rlvr import ALGORITHMS, RLVRConfig
    from sft import SFTConfig

    head, *rows = table("field")
    assert head == ["field", "SFT", "discriminator", "alignment", "RLVR"] and len(rows) >= 18
    for name, *values in rows:
        for config, value in zip(
            (SFTConfig(), DiscriminatorConfig(), AlignConfig(), RLVRConfig()), values
        ):
            if value == "-":
                assert getattr(config, name, -1) in (-1, None), (config, name)
            elif value == "by algorithm":
                assert getattr(config, name) is None
            else:
                default = getattr(config, name)
                assert default == (value if isinstance(default, str) else float(value)), (
                    type(config).__name__,
                    name,
                )
    head, *rows = table("algorithm")
    assert {name: dict(zip(head[1:], map(float, values))) for name, *values in rows} == ALGORITHMS


def fails(*args, ranks=1) -> str:
    """The one line that a user sees."""
    done = launch(*args, ranks=ranks, check=False)
    assert done.returncode != 0 and "Traceback" not in done.stderr, done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, done.stderr
    return errors[0]


def test_bad_input_is_one_line(world, trained, tmp_path):
    empty, full = tmp_path / "empty.jsonl", tmp_path / "full"
    empty.write_text("")
    full.mkdir()
    (full / "mine.txt").write_text("keep")
    ok = ("--data", world["prompts"], "--output_dir", tmp_path / "o")
    assert "--ckpt /no/such" in fails("align.py", "--ckpt", "/no/such", *ok)
    assert f"--model {full}: no config.json" in fails("sft.py", "--model", full, *ok)
    assert "holds no rows" in fails(
        "rlvr.py", "--ckpt", trained, "--data", empty, "--output_dir", tmp_path / "o2"
    )
    assert "no such file" in fails("eval.py", "--ckpt", trained, "--data", "nothing.jsonl")
    said = fails("sft.py", "--model", trained, "--data", world["sft"], "--output_dir", full)
    assert "not empty" in said and "--resume" in said and os.listdir(full) == ["mine.txt"]
    assert not (tmp_path / "o").exists()  # what failed at the start left nothing behind
    assert "--algorithm ppo" in fails("rlvr.py", "--ckpt", trained, "--algorithm", "ppo", *ok)
    assert "--experts many" in fails(
        "discriminator.py",
        "--model",
        trained,
        "--experts",
        "many",
        "--policy",
        trained,
        "--data",
        world["prompts"],
        "--output_dir",
        tmp_path / "o3",
        "--max_steps",
        1,
        *TINY,
    )
    row = json.loads(open(world["prompts"]).readline())
    picture = tmp_path / "bad.png"
    picture.write_bytes(b"no picture")
    broken = tmp_path / "broken.jsonl"
    broken.write_text(json.dumps({**row, "image": "bad.png"}) + "\n")
    assert "broken.jsonl:1" in fails(
        "rlvr.py", "--ckpt", trained, "--data", broken, "--output_dir", tmp_path / "o4"
    )


def test_over_long_rows_are_counted_and_named(world, trained, tmp_path):
    rows = [json.loads(line) for line in open(world["prompts"])][:4]
    rows[1]["question"] = "why? " * 400
    data = tmp_path / "rows.jsonl"
    images = os.path.dirname(world["prompts"])
    data.write_text(
        "".join(
            json.dumps({**row, "image": os.path.join(images, row["image"])}) + "\n" for row in rows
        )
    )
    done = launch(
        "rlvr.py",
        "--ckpt",
        trained,
        "--data",
        data,
        "--output_dir",
        tmp_path / "o",
        "--max_steps",
        2,
        "--num_generations",
        2,
        "--max_prompt_length",
        200,
        *TINY,
    )
    assert f"{data}:2" in done.stderr and "--max_prompt_length" in done.stderr
    assert lines(tmp_path / "o" / "metrics.jsonl")[-1]["rows_left_out"] == 2
    assert [row["row"] for row in lines(tmp_path / "o" / "left_out.jsonl")] == [f"{data}:2"] * 2
