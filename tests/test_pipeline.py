"""The stages as a user runs them: end to end, resumed after a kill, with bad input and bad rows."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForImageTextToText, AutoTokenizer

from data import SYSTEM_PROMPT
from tests.conftest import ROOT, fails, launch, lines


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
# A policy that never has the format


def test_dapo_names_a_policy_that_never_has_the_format(world, tmp_path):
    """Other data would not help such a policy."""
    words = ("--algorithm", "dapo", "--max_gen_batches", 1, "--prompts_per_step", 1)
    words += ("--num_generations", 2, "--overlong_buffer", 2, "--max_completion_length", 8)
    where = ("--data", world["questions"], "--output_dir", tmp_path / "out")
    said = fails("rlvr.py", "--ckpt", world["init"], *where, *words)
    assert said.startswith("error: --algorithm dapo: 1 x 3 prompts gave 0 prompts")
    assert said.endswith("no rollout has the format; start from a policy that SFT has taught it")
