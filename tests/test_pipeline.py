"""The scripts as a user runs them: end to end, resumed after a kill, and with bad input."""

import hashlib
import http.server
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForImageTextToText, AutoTokenizer

from align import AlignConfig
from data import SYSTEM_PROMPT, TAGS, Response, encode_prompts
from discriminator import DiscriminatorConfig
from eval import EvalConfig, keep_other_results, read_response
from rlvr import RLVRConfig
from sft import SFTConfig
from support import digits
from support.errors import UserError
from support.flags import parse
from support.huggingface import load_processor
from support.rows import load_data
from tests.conftest import ROOT, launch


def test_the_gpu_benchmark_runs_on_a_cpu():
    """All of its parts, at a tiny size, so that the first GPU finds no typing error."""
    table = launch("benchmarks/gpu.py", real=True).stdout
    rows = [line.split(" | ")[0].strip("| ") for line in table.splitlines() if "|" in line]
    parts = ("matrix", "copy", "packs", "sampled", "scores", "SFT", "decode", "RLVR", "alignment")
    assert all(any(row.startswith(part) for row in rows) for part in (*parts, "update", "rollout"))
    assert "failed" not in table
    counted, measured = table.split("| stage | ")[1:]
    for hours in (counted, measured):  # the same rows and columns, of numbers
        names = re.findall(r"^\| (\w+).*(?:\d to \d.*){3} \|$", hours, re.MULTILINE)
        assert names == ["sft", "warm", "align", "rlvr", "rlvr"]


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
        "--max_completion_length",
        96,
    )
    return out


def test_discriminator_run(discriminator):
    files = set(os.listdir(discriminator))
    assert {
        "config.json",
        "metrics.jsonl",
        "run.json",
        "model.safetensors",
        "tokenizer.json",
    } <= files
    last = lines(discriminator / "metrics.jsonl")[-1]
    assert last["validation_pairs"] >= 1 and "validation_pair_accuracy_perception" in last
    line = json.loads((discriminator / "run.json").read_text())
    assert line["stage"] == "discriminator" and line["run"]["max_steps"] == 4


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
        "--prompts_per_step",
        2,
        "--learning_rate",
        1e-3,
        "--max_tokens_per_pack",
        600,
        *TINY,
        ranks=2,
    )
    line = json.loads((out / "run.json").read_text())
    assert line["stage"] == "align" and line["run"]["max_steps"] == 3
    config = json.loads((out / "config.json").read_text())
    assert config["model_type"] == "qwen3_vl" and "run" not in config
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
    assert set(rollouts[0]) == {
        *("step", "row", "question", "images", "answer", "supervision", "response", "perception"),
        *("reasoning", "valid", "teacher_perception", "teacher_reasoning", "advantage", "length"),
    }
    moved = [k for k, v in load(out).items() if not torch.equal(v, load(trained)[k])]
    assert len(moved) > 40
    assert (out / "discriminator" / "model.safetensors").exists()


def load(path):
    return AutoModelForImageTextToText.from_pretrained(path).state_dict()


def test_align_upcycles_a_dense_model(world, trained, tmp_path):
    """A model without a score head is given one, which is said."""
    out = tmp_path / "align"
    done = launch(
        "align.py",
        "--ckpt",
        trained,
        "--data",
        world["prompts"],
        "--discriminator",
        trained,
        "--output_dir",
        out,
        "--max_steps",
        1,
        "--prompts_per_step",
        2,
        "--num_generations",
        4,
        *TINY,
    )
    assert f"{trained}: has no score head yet" in done.stderr.splitlines()[0]
    (step,) = lines(out / "metrics.jsonl")
    assert step["grad_norm"] > 0 and step["d_grad_norm"] > 0 and "warmup" not in step
    assert step["d_learning_rate"] == 1e-6 and len(step["expert_share_perception"][0]) == 4


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
        "--prompts_per_step",
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
    assert steps[1]["ratio_max"] > 1 > steps[1]["ratio_min"]
    assert 0 < steps[1]["sampled_scored_gap"] < 1e-4  # before the first of the steps
    assert ("kl_ref" in steps[1]) == (algorithm == "grpo")
    assert any(name.startswith("events.out") for name in os.listdir(out))
    rollouts = lines(out / "rollouts.jsonl")
    assert [row["step"] for row in rollouts] == [1] * 4 + [2] * 4
    assert set(rollouts[0]) == {
        *("step", "row", "question", "images", "answer", "supervision", "response"),
        *("reward", "accuracy", "valid", "length", "advantage"),
    }


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
        "--prompts_per_step",
        4,
        *TINY,
    )
    (step,) = lines(tmp_path / "g" / "metrics.jsonl")
    assert (
        step["ratio_min"] == step["ratio_max"] == 1
        and step["clipped_low"] == step["clipped_high"] == 0
    )
    assert 0 < step["sampled_scored_gap"] < 1e-4


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


def test_every_stage_asks_as_sft_did(world, tmp_path):
    """Rows of one's own without a system turn, and a limit for images, through all stages: each
    result says what the next one takes, and transformers opens it as it is."""
    rows = [{k: v for k, v in row.items() if k != "system"} for row in lines(world["prompts"])]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:24]))
    flags = ("--data", tmp_path / "rows.jsonl", "--image_dir", Path(world["init"]).parent)
    steps = ("--max_steps", 1, "--save_steps", 1)
    roll = (*steps, "--prompts_per_step", 2, "--num_generations", 2, *TINY)
    at = {name: tmp_path / name for name in ("sft", "discriminator", "align", "rlvr")}
    more = {
        "sft": ("--model", world["init"], *steps, "--max_pixels", 512),
        "discriminator": ("--model", world["init"], "--policy", at["sft"], *steps, *TINY),
        "align": ("--ckpt", at["sft"], "--discriminator", at["discriminator"], *roll),
        "rlvr": ("--ckpt", at["align"], *roll),
    }
    note = {"system_prompt": SYSTEM_PROMPT, "max_pixels": 512}
    for stage, own in more.items():
        done = launch(f"{stage}.py", *flags, *own, "--output_dir", at[stage])
        assert "was trained with" not in done.stderr
        asked = json.loads((at[stage] / "run.json").read_text())["run"]
        assert {name: asked[name] for name in note} == note
        assert json.loads((at[stage] / "prism.json").read_text()) == note
        assert not hasattr(AutoConfig.from_pretrained(at[stage]), "system_prompt")
        AutoTokenizer.from_pretrained(at[stage])
    assert json.loads((at["align"] / "discriminator/prism.json").read_text()) == note
    AutoModelForImageTextToText.from_pretrained(at["rlvr"])
    # The template, the ids that end a response and the size of images travel as they were.
    for name in ("chat_template.json", "generation_config.json", "preprocessor_config.json"):
        assert (at["rlvr"] / name).read_bytes() == (Path(world["init"]) / name).read_bytes()
    done = launch("eval.py", *flags, "--ckpt", at["rlvr"], "--system_prompt", "Mine.", *TINY)
    said = [line for line in done.stderr.splitlines() if "trained with" in line]
    assert len(said) == 1 and "this run uses 'Mine.'" in said[0]


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
    with open(os.path.join(trained, "config.json")) as file:
        text = json.load(file)["text_config"]
    assert text["rope_theta"] == 10000 and text["rope_scaling"]["mrope_interleaved"]
    assert "rope_parameters" not in text  # which older versions of transformers do not read


@pytest.mark.parametrize(
    "script, flags",
    [
        ("sft.py", ("--per_device_train_batch_size", 8)),
        ("align.py", ("--num_generations", 4, "--prompts_per_step", 1, *TINY)),
        (
            "rlvr.py",
            (
                "--num_generations",
                4,
                "--algorithm",
                "dapo",
                "--prompts_per_step",
                1,
                "--max_gen_batches",
                100,
                "--overlong_buffer",
                8,
                *TINY,
            ),
        ),
    ],
)
def test_a_killed_run_resumes(world, trained, discriminator, tmp_path, script, flags):
    """Killed behind a checkpoint and resumed, a run ends where an undisturbed one does."""
    flag, data = ("--model", world["sft"]) if script == "sft.py" else ("--ckpt", world["prompts"])
    model = (flag, trained, "--data", data)
    model += ("--discriminator", discriminator) if script == "align.py" else ()
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


# field: SFT, discriminator, alignment, RLVR as published; None where a stage has no such field or
# takes it from the algorithm
PUBLISHED = {
    "learning_rate": (1e-5, 1e-5, 1e-6, 1e-6),
    "lr_scheduler_type": ("cosine", "cosine", "constant", "constant"),
    "warmup_steps": (0.1, 0.1, 0.0, None),
    "weight_decay": (0.0, 0.01, 0.01, None),
    "num_train_epochs": (1, 1, None, None),
    "max_steps": (-1, -1, 500, 1500),
    "per_device_train_batch_size": (2, 2, None, None),
    "prompts_per_step": (None, None, 4, 32),
    "gradient_accumulation_steps": (1, 4, None, None),
    "num_generations": (None, None, 16, 16),
    "temperature": (None, None, 1.0, 1.0),
    "max_prompt_length": (None, None, 2048, 2048),
    "max_completion_length": (None, 6144, 6144, 8192),
    "max_length": (8192, 8192, None, None),
    "max_grad_norm": (1.0, 1.0, 1.0, 1.0),
    "score_l2": (None, 0.001, 0.001, None),
    "router_aux_loss_coef": (None, 0.01, 0.01, None),
    "alpha": (None, None, 0.5, None),
    "format_penalty": (None, None, 1.5, None),
    "epsilon": (None, None, 0.2, None),
}


def test_the_published_values_are_the_defaults():
    configs = SFTConfig(), DiscriminatorConfig(), AlignConfig(), RLVRConfig()
    for name, values in PUBLISHED.items():
        assert tuple(getattr(config, name, None) for config in configs) == values, name


def fails(*args, ranks=1, **env) -> str:
    """The one line that a user sees."""
    done = launch(*args, ranks=ranks, check=False, **env)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, done.stderr
    return errors[0]


def test_bad_input_is_one_line(world, trained, tmp_path):
    empty, full = tmp_path / "empty.jsonl", tmp_path / "full"
    empty.write_text("")
    full.mkdir()
    (full / "mine.txt").write_text("keep")
    ok = ("--data", world["prompts"], "--output_dir", tmp_path / "o")
    said = fails("align.py", "--ckpt", "/no/such", "--discriminator", trained, *ok)
    assert said.startswith("error: --ckpt /no/such: there is no such directory; make it with: ")
    said = fails("sft.py", "--model", full, *ok)
    assert said.startswith(f"error: {full}: no config.json")
    assert "holds no rows" in fails(
        "rlvr.py", "--ckpt", trained, "--data", empty, "--output_dir", tmp_path / "o2"
    )
    assert "no such file" in fails("eval.py", "--ckpt", trained, "--data", "nothing.jsonl")
    said = fails("sft.py", "--model", trained, "--data", world["sft"], "--output_dir", full)
    assert "not empty" in said and "--resume" in said and os.listdir(full) == ["mine.txt"]
    assert not (tmp_path / "o").exists()  # what failed at the start left nothing behind
    said = fails("rlvr.py", "--ckpt", trained, "--algorithm", "ppo", *ok)
    assert "--algorithm: invalid choice: 'ppo'" in said and "dapo" in said
    assert "--experts: invalid choice: 'many'" in fails(
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
        "rlvr.py",
        "--ckpt",
        trained,
        "--data",
        broken,
        "--image_dir",
        "/",
        "--output_dir",
        tmp_path / "o4",
    )


def test_without_packages_that_a_run_may_do_without(world, trained, tmp_path):
    """A machine that has torch and transformers and little else: what needs more says so."""
    hidden = "datasets pyarrow pandas math_verify latex2sympy2_extended sklearn plotly tensorboard"
    hidden += " peft"
    (tmp_path / "sitecustomize.py").write_text(
        "from importlib.machinery import PathFinder\n"
        "real = PathFinder.find_spec\n"
        f"hidden = {hidden.split()}\n"
        "find = lambda cls, name, *args: None if name in hidden else real(name, *args)\n"
        "PathFinder.find_spec = classmethod(find)\n"
    )
    (tmp_path / "rows.parquet").write_bytes(b"")
    env = {"PYTHONPATH": f"{tmp_path}:{ROOT}"}
    ckpt, out = ("--ckpt", trained, "--data", world["prompts"]), ("--output_dir", tmp_path / "o")
    code = "import align, data, discriminator, eval, rlvr, sft, support.report, sys"
    loaded = launch("-c", f"{code}; print(*sys.modules)", **env).stdout.split()
    assert "transformers" in loaded and not set(hidden.split()) & set(loaded)
    for script in ("rlvr.py", "eval.py"):
        said = fails(script, *ckpt, *out, **env)
        assert "No module named" in said and said.endswith(
            "; run pip install -r requirements.txt, or try again"
        )
    said = fails("sft.py", "--model", trained, "--data", tmp_path / "rows.parquet", *out, **env)
    assert said.endswith("rows.parquet: needs `datasets`; pip install datasets")
    flags = ("--model", trained, "--data", world["sft"], "--max_steps", 1, *out)
    said = fails("sft.py", *flags, "--lora_rank", 4, **env)
    assert said == "error: --lora_rank: needs `peft`; pip install peft"
    launch("sft.py", *flags, **env)
    assert lines(tmp_path / "o" / "metrics.jsonl")[0]["loss"] > 0


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
        "--image_dir",
        "/",
        "--output_dir",
        tmp_path / "o",
        "--max_steps",
        2,
        "--num_generations",
        2,
        "--prompts_per_step",
        4,
        "--max_prompt_length",
        200,
        *TINY,
    )
    assert f"{data}:2" in done.stderr and "--max_prompt_length" in done.stderr
    assert lines(tmp_path / "o" / "metrics.jsonl")[-1]["rows_left_out"] == 2
    assert [row["row"] for row in lines(tmp_path / "o" / "left_out.jsonl")] == [f"{data}:2"] * 2


# --------------------------------------------------------------------------------------------------
# Rows that cannot be used


def with_bad_rows(world, path, good: int, bad: int, name: str = "prompts") -> list[str]:
    """A file of `good` rows and, behind them, `bad` ones that are bad in different ways. -> the
    places of the bad ones."""
    folder = os.path.dirname(world[name])
    whole = [json.loads(line) for line in open(world[name])][: good + bad]
    whole = [row | {"image": os.path.join(folder, row["image"])} for row in whole]
    picture = path.parent / "bad.png"
    picture.write_bytes(b"no picture")
    broken = [{"image": str(picture)}, {"image": "none.png"}, {"question": None}]
    whole = whole[:good] + [row | broken[i % 3] for i, row in enumerate(whole[good:])]
    path.write_text("".join(json.dumps(row) + "\n" for row in whole))
    return [f"{path}:{good + 1 + i}" for i in range(bad)]


def test_bad_rows_are_left_out_counted_and_named(world, trained, tmp_path):
    """Two of six: the run goes on without them. On two ranks the count is of both."""
    data, out = tmp_path / "rows.jsonl", tmp_path / "o"
    places = with_bad_rows(world, data, 4, 2)
    flags = (
        "--data",
        data,
        "--image_dir",
        "/",
        "--output_dir",
        out,
        "--max_steps",
        3,
        "--learning_rate",
        1e-3,
    )
    batch = ("--per_device_train_batch_size", 3)
    done = launch("sft.py", "--model", trained, *flags, *batch, ranks=2)
    steps, left_out = lines(out / "metrics.jsonl"), lines(out / "left_out.jsonl")
    assert [step["rows_left_out"] for step in steps] == [2, 4, 6]
    assert sorted(row["row"] for row in left_out) == sorted(places * 3)
    assert {row["row"]: row["why"] for row in left_out}.keys() == set(places)
    assert all("cannot be opened" in r["why"] for r in left_out if r["row"] == places[0])
    assert all("none.png is not below" in r["why"] for r in left_out if r["row"] == places[1])
    assert all(step["loss"] is not None for step in steps)
    assert f"saved {out}" in done.stderr and "left out" in done.stderr


def test_too_many_bad_rows_end_the_run(world, trained, tmp_path):
    data, out = tmp_path / "rows.jsonl", tmp_path / "o"
    places = with_bad_rows(world, data, 4, 3)
    flags = (
        "--ckpt",
        trained,
        "--data",
        data,
        "--image_dir",
        "/",
        "--max_steps",
        3,
        "--num_generations",
        2,
    )
    said = fails("rlvr.py", *flags, "--output_dir", out, "--prompts_per_step", 7, *TINY)
    assert "3 of 7 rows are bad, over --max_bad_fraction 0.01" in said
    assert any(place in said for place in places)
    assert sorted(row["row"] for row in lines(out / "left_out.jsonl")) == places


@pytest.mark.parametrize(
    "pattern, said",
    [
        ("(?P<caption>.*", "is no regular expression (missing ) at position 14); write one with"),
        ("", "has the groups none; name them caption, think, answer, as in (?P<answer>.*)"),
        ("(?P<answer>.*)", "has the groups answer; name them caption, think, answer"),
        ("(?P<caption>.)(?P<think>.)(?P<answer>.)(?P<more>.)", "has the groups caption, think,"),
        ("(?P<caption>.)(?P<think>.)(?P<answer>(.){1,9999999})", "repeats something 1000 times"),
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
    assert "the verifier accepts no answer for the ground truth ['NaN']" in done.stderr
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
    # So does all else on which a number depends.
    stored = json.loads((tmp_path / "out/eval.json").read_text())
    flags = {name: stored[name] for name in EvalConfig.__dataclass_fields__ if name in stored}
    same = EvalConfig(**flags, per_device_eval_batch_size=3, max_rollout_rows=2)
    keep_other_results(same, str(tmp_path / "out"))
    for name, value in dict(max_completion_length=9, system_prompt="?", max_pixels=99).items():
        with pytest.raises(UserError, match=f"(?s)holds a result of --{name} .*, not of"):
            keep_other_results(replace(same, **{name: value}), str(tmp_path / "out"))


@pytest.mark.parametrize("script", ["align.py", "rlvr.py"])
def test_a_rank_without_prompts_hangs_nobody(world, trained, discriminator, tmp_path, script):
    """One of two prompts is too long, so in every step one of two ranks has none."""
    with_bad_rows(world, tmp_path / "rows.jsonl", 2, 0)
    rows = lines(tmp_path / "rows.jsonl")
    rows[1]["question"] = "why? " * 400
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ("--ckpt", trained, "--data", tmp_path / "rows.jsonl", "--output_dir", tmp_path / "o")
    flags += ("--image_dir", "/")
    flags += ("--discriminator", discriminator) if script == "align.py" else ()
    flags += ("--max_prompt_length", 200, "--prompts_per_step", 2, "--num_generations", 4)
    launch(script, *flags, "--max_steps", 2, "--learning_rate", 1e-3, *TINY, ranks=2)
    steps = lines(tmp_path / "o" / "metrics.jsonl")
    assert [step["rows_left_out"] for step in steps] == [1, 2]
    assert all(step["loss"] is not None and step["response_length"] > 0 for step in steps)
    assert {r["row"] for r in lines(tmp_path / "o" / "left_out.jsonl")} == {
        f"{tmp_path}/rows.jsonl:2"
    }


# --------------------------------------------------------------------------------------------------
# The command line


# What a stage starts from where nothing is given, and the command that makes each of these.
STARTS = {
    SFTConfig: {"model": "out/digits/base"},
    DiscriminatorConfig: {"model": "out/digits/base", "policy": "out/sft"},
    AlignConfig: {"ckpt": "out/sft", "discriminator": "out/discriminator"},
    RLVRConfig: {"ckpt": "out/align"},
    EvalConfig: {"ckpt": "out/rlvr"},
}
BASE = "python sft.py --model out/digits/init --data digits --output_dir out/digits/base"
MADE_BY = {
    "out/digits/base": BASE,
    "out/sft": "python sft.py",
    "out/discriminator": "python discriminator.py",
    "out/align": "python align.py",
    "out/rlvr": "python rlvr.py",
}
STAGES = list(STARTS)
each_stage = pytest.mark.parametrize("stage", STAGES)


def made(world, path: str) -> None:
    """What a stage of the embedded world would have left there, as far as a command line looks."""
    os.makedirs(path)
    shutil.copy(f"{world['init']}/config.json", path)


@pytest.fixture
def command_line(world, tmp_path, monkeypatch, capsys):
    """(stage's dataclass, *words) -> (what flags.parse makes of them, the lines that it says). The
    embedded world is the tests' own, and in this directory every stage has run."""
    monkeypatch.setattr(digits, "build", lambda *args: world)
    monkeypatch.setattr(sys.modules["__main__"], "__doc__", "A stage.")
    monkeypatch.chdir(tmp_path)
    for path in ("out/digits/init", *MADE_BY):
        made(world, path)

    def read(config_class, *words):
        monkeypatch.setattr(sys, "argv", ["stage.py", *map(str, words)])
        config = parse(config_class)
        return config, capsys.readouterr().err.splitlines()

    return read


def settings_of(config, stage) -> dict:
    """The fields that the embedded world has settings for."""
    return {name: getattr(config, name) for name in digits.SETTINGS[stage.stage]}


def model_flag(stage) -> str:
    return "--model" if hasattr(stage(), "model") else "--ckpt"


def split_of(stage) -> str:
    return digits.SPLITS[stage.stage]


@each_stage
@pytest.mark.parametrize("words", [(), ("--data", "digits")])
def test_with_nothing_given_a_stage_runs_on_the_embedded_world(command_line, world, stage, words):
    config, said = command_line(stage, *words)
    (line,) = said
    assert "built-in digits" in line and config.data[0] in line and "own settings" in line
    assert config.data == [world[split_of(stage)]]
    assert {name: getattr(config, name) for name in STARTS[stage]} == STARTS[stage]
    assert settings_of(config, stage) == digits.SETTINGS[stage.stage]
    assert settings_of(config, stage) != settings_of(stage(), stage)


@each_stage
def test_what_a_stage_lacks_is_said_with_the_command_that_makes_it(command_line, world, stage):
    """No stage starts another one. What is named on the command line is not asked for."""
    for name, path in STARTS[stage].items():
        shutil.rmtree(path)
        with pytest.raises(UserError) as error:
            command_line(stage)
        assert str(error.value) == f"{path} is not there yet; make it with: {MADE_BY[path]}"
        config, _ = command_line(stage, f"--{name}", world["init"], "--data", "digits")
        assert getattr(config, name) == world["init"]
        made(world, path)
    command_line(stage)


def test_who_does_what_is_said_comes_through_the_whole_chain(command_line, world):
    """From nothing to an evaluation. Each command writes where the next one looks."""
    for path in MADE_BY:
        shutil.rmtree(path)
    scripts = {f"{stage.stage}.py": stage for stage in STAGES}
    wanted, done = ["python eval.py"], []
    while wanted:
        _, script, *words = shlex.split(wanted[-1])
        try:
            config, _ = command_line(scripts[script], *words)
        except UserError as error:
            command = str(error).split("; make it with: ")[1]
            assert command not in wanted + done
            wanted.append(command)
            continue
        if script != "eval.py":
            made(world, config.output_dir)
        done.append(wanted.pop())
    assert done == [*MADE_BY.values(), "python eval.py"]


def test_alignment_without_an_sft_policy_is_one_line(world, tmp_path):
    """As a user sees it. Nothing is started, and nothing written."""
    built = shutil.copytree(Path(world["init"]).parent, tmp_path / "out" / "digits")
    # Taken for the world of full size, it is not built anew.
    (built / "world.json").write_text(json.dumps(asdict(digits.World())))
    command, pipes = [sys.executable, ROOT / "align.py"], dict(capture_output=True, text=True)
    done = subprocess.run(command, cwd=tmp_path, timeout=300, **pipes)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == "error: out/sft is not there yet; make it with: python sft.py\n"
    assert os.listdir(tmp_path / "out") == ["digits"]


@each_stage
def test_its_own_model_on_its_data_has_its_settings(command_line, world, trained, stage):
    """A policy that was trained from its base is its own, too. Flags that are given count. SFT of
    the model with random weights is the pretraining."""
    for model in (world["init"], trained):
        given = ("--max_completion_length", 7) if stage is not SFTConfig else ("--max_steps", 7)
        config, (line,) = command_line(stage, model_flag(stage), model, "--data", "digits", *given)
        pretrain = stage is SFTConfig and model == world["init"]
        assert config.data == [world["pretrain" if pretrain else split_of(stage)]]
        assert "own settings" in line and model in line
        assert getattr(config, model_flag(stage)[2:]) == model
        own = digits.SETTINGS["pretrain" if pretrain else stage.stage] | {given[0][2:]: given[1]}
        assert {name: getattr(config, name) for name in own} == own


@each_stage
def test_another_model_on_its_data_has_the_published_settings(command_line, world, tmp_path, stage):
    other = shutil.copytree(world["init"], tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    assert config.pop("embedded_world") == "digits"
    (other / "config.json").write_text(json.dumps(config))
    flags = (model_flag(stage), other, "--data", "digits")
    more = ("--discriminator", other) if stage is AlignConfig else ()
    config, (line,) = command_line(stage, *flags, *more)
    assert config.data == [world[split_of(stage)]] and "the published settings" in line
    assert settings_of(config, stage) == settings_of(stage(), stage)


@each_stage
def test_a_model_on_other_data_has_the_published_settings(command_line, world, stage):
    more = ("--discriminator", world["init"]) if stage is AlignConfig else ()
    data = [world["sft"], world["prompts"]]
    config, said = command_line(stage, model_flag(stage), world["init"], "--data", *data, *more)
    assert said == [] and config.data == data
    assert settings_of(config, stage) == settings_of(stage(), stage)


@each_stage
def test_a_model_without_data_takes_the_published_data(command_line, world, stage):
    """Which cannot be had offline: the line names the data set and the remedy."""
    more = ("--discriminator", world["init"]) if stage is AlignConfig else ()
    if stage is EvalConfig:  # a checkpoint is measured on what the user names
        config, said = command_line(stage, "--ckpt", world["init"])
        assert config.data == [] and said == []
        return
    with pytest.raises(UserError) as error:
        command_line(stage, model_flag(stage), world["init"], *more)
    published = stage().data[0]
    assert str(error.value).startswith(f"--data {published}: not on this machine")
    repo = "/".join(published.removeprefix("hf://datasets/").split("/")[:2])
    assert f"hf download {repo} --repo-type dataset" in str(error.value)
    assert str(error.value).endswith("give a file of the local copy: --data FILE")


@each_stage
@pytest.mark.parametrize(
    "words",
    [("--max_step", 3), ("--learning-ratee", 1), ("--dat", "digits"), ("--seed_ 3",), ("rows",)],
)
def test_flags_that_do_not_exist_are_refused(command_line, stage, words):
    """Abbreviations and typos alike, before anything is built or read."""
    with pytest.raises(UserError, match=f"{words[0]}.*no such flag") as error:
        command_line(stage, *words)
    assert "\n" not in str(error.value)


@each_stage
@pytest.mark.parametrize("second", [("--data", "b.jsonl"), ("--data=b.jsonl",)])
def test_data_given_twice_are_refused(command_line, stage, second):
    """The second would silently replace the first."""
    with pytest.raises(UserError, match="^--data is given twice; give it once, with all its"):
        command_line(stage, "--data", "a.jsonl", *second)


# --------------------------------------------------------------------------------------------------
# The hub


class Hub(http.server.BaseHTTPRequestHandler):
    """The routes of the hub that are needed for the data set owner/name: what it holds, and its
    files."""

    commit = "0123456789abcdef" * 2 + "01234567"
    files: dict[str, bytes] = {}
    asked: list[str] = []

    def do_HEAD(self):
        self.asked.append(f"{self.command} {self.path}")
        path, _, query = self.path.partition("?")
        info = [f"/api/datasets/owner/name{end}" for end in ("", "/revision/main")]
        prefix, _, name = path.partition("/resolve/")
        name = name.partition("/")[2]
        if path in info:
            siblings = [{"rfilename": n, "size": len(c)} for n, c in self.files.items()]
            about = {"_id": "1", "id": "owner/name", "sha": self.commit, "siblings": siblings}
            body, kind = json.dumps(about | {"private": False, "tags": []}).encode(), "json"
        elif path.startswith(f"/api/datasets/owner/name/tree/{self.commit}"):
            tree = [
                {"type": "file", "path": n, "size": len(c), "oid": hashlib.sha1(c).hexdigest()}
                for n, c in self.files.items()
            ]
            body, kind = json.dumps(tree).encode(), "json"
        elif prefix == "/datasets/owner/name" and name in self.files:
            body, kind = self.files[name], "octet-stream"
        else:
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Type", f"application/{kind}")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", f'"{hashlib.sha1(body).hexdigest()}"')
        self.send_header("X-Repo-Commit", self.commit)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    do_GET = do_HEAD

    def log_message(self, *args):
        pass


@pytest.fixture
def hub(monkeypatch):
    """A local server in the hub's place -> (the handler, the variables that point to it)."""
    monkeypatch.setattr(Hub, "asked", [])
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield Hub, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


def test_data_from_the_hub(world, trained, hub, tmp_path, monkeypatch):
    """A parquet file that holds its images, and a JSONL file with the images beside it: how much
    is read is said before, both are trained on, and only what is needed is fetched. A second run
    finds them on this machine, without the hub."""
    import datasets

    handler, address = hub
    folder = os.path.dirname(world["sft"])
    rows = [json.loads(line) for line in open(world["sft"])][:4]
    pictures = {
        row["images"][0]: open(os.path.join(folder, row["images"][0]), "rb").read() for row in rows
    }
    inline = [
        row | {"images": [{"bytes": pictures[row["images"][0]], "path": None}]} for row in rows[:2]
    ]
    datasets.Dataset.from_list(inline).to_parquet(tmp_path / "rows.parquet")
    jsonl = "".join(json.dumps(row) + "\n" for row in rows[2:]).encode()
    parquet = (tmp_path / "rows.parquet").read_bytes()
    files = {"data/rows.parquet": parquet, "rows.jsonl": jsonl, **pictures}
    files["other.parquet"] = bytes(30_000_000)
    monkeypatch.setattr(Hub, "files", files)
    sources = [f"hf://datasets/owner/name/{name}" for name in ("data/rows.parquet", "rows.jsonl")]
    env = {"HF_ENDPOINT": address, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "home")}
    env |= {"HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_XET": "1"}

    def train(name: str, *data, **more):
        flags = ("--data", *data, "--output_dir", tmp_path / name, "--max_steps", 1)
        batch = ("--per_device_train_batch_size", 2 * len(data))
        return launch("sft.py", "--model", trained, *flags, *batch, **env | more).stderr

    said = train("a", sources[0])
    assert f"--data: reads {sources[0]} from the hub, at most 0.00 GB" in said
    fetched = [line for line in handler.asked if line.startswith("GET") and "/resolve/" in line]
    assert len(fetched) == 1 and fetched[0].endswith("/data/rows.parquet")
    first = next(i for i, line in enumerate(handler.asked) if "/resolve/" in line)
    assert any("/api/datasets/owner/name" in line for line in handler.asked[:first])
    said = train("b", *sources)
    assert f"--data: reads {sources[1]} from the hub, at most 0.03 GB" in said
    for name in "ab":
        (step,) = lines(tmp_path / name / "metrics.jsonl")
        assert step["loss"] > 0 and step["rows_left_out"] == 0
    before = len(handler.asked)
    said = train("c", *sources, HF_HUB_OFFLINE="1")
    assert len(handler.asked) == before and "from the hub's cache on this machine" in said
    b, c = (lines(tmp_path / name / "metrics.jsonl")[0]["loss"] for name in "bc")
    assert b == c


def test_published_data_offline_is_one_line(trained, tmp_path):
    said = fails("rlvr.py", "--ckpt", trained, "--output_dir", tmp_path / "o")
    assert "rl_training_data_filtered_2k.parquet: not on this machine" in said
    assert "hf download prism-vlm/rl_dataset" in said and "--data FILE" in said
    assert not (tmp_path / "o").exists()


def test_a_model_that_is_not_there_is_named_at_once(command_line, world, monkeypatch, tmp_path):
    """Before the hub or the data is looked at: the command that makes it, or what it may mean."""
    made(world, tmp_path / "here/out/demo/base")
    monkeypatch.chdir(tmp_path / "here")
    os.makedirs("rows")
    shutil.copy(world["test"], "rows/mine.jsonl")
    with pytest.raises(UserError, match=r"neither in rows nor .* did you mean rows/mine.jsonl\?"):
        command_line(EvalConfig, "--ckpt", world["init"], "--data", "rows/mine.jsnl")
    monkeypatch.setattr("support.flags.HfApi", None)
    told = {
        (RLVRConfig, "--ckpt", "align_out"): "make it with: python align.py --ckpt CKPT "
        "--discriminator DISCRIMINATOR --output_dir align_out",
        (AlignConfig, "--discriminator", "d_out"): "make it with: python discriminator.py "
        "--model MODEL --output_dir d_out",
        (DiscriminatorConfig, "--policy", "./sft_out"): "make it with: python sft.py --model MODEL "
        "--output_dir ./sft_out",
        (EvalConfig, "--ckpt", "out/sft"): "make it with: python sft.py",
        (SFTConfig, "--model", "out/demo/bsae"): "did you mean out/demo/base?",
        (SFTConfig, "--model", "gpt2"): "name an existing one, or a hub id OWNER/NAME",
    }
    for (stage, flag, source), remedy in told.items():
        for more in ("--dry_run", 8), ("--data", "nothing.jsonl"):
            with pytest.raises(UserError) as error:
                command_line(stage, flag, source, *more)
            said = str(error.value)
            assert said.startswith(f"{flag} {source}: there is no such directory; ")
            assert said.endswith(remedy)


def test_dapo_names_a_policy_that_never_has_the_format(world, tmp_path):
    """Other data would not help such a policy."""
    words = ("--algorithm", "dapo", "--max_gen_batches", 1, "--prompts_per_step", 1)
    words += ("--num_generations", 2, "--overlong_buffer", 2, "--max_completion_length", 8)
    where = ("--data", world["questions"], "--output_dir", tmp_path / "out")
    said = fails("rlvr.py", "--ckpt", world["init"], *where, *words)
    assert said.startswith("error: --algorithm dapo: 1 x 3 prompts gave 0 prompts")
    assert said.endswith("no rollout has the format; start from a policy that SFT has taught it")
