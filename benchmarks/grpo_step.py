"""A whole GRPO step: rlvr.py against TRL's GRPOTrainer (without vLLM), same model, data, group and
lengths.

4 prompts of about 300 tokens, 196 of them one image's, 16 rollouts each, at most 256 tokens. The
model is a Qwen3-VL with random weights. Some of its tokens end a response, as many as make the
lengths ragged with mean about 80. A step is everything from the prompts to the changed weights:
processor (on both sides in the process itself, without workers), sampling, rewards, forward,
backward, AdamW, in float32 on both cores. Each side runs in a process of its own, and the two take
turns. A turn's seconds are the median of its steps after the first.

TRL runs as its users run it on one machine: batch of 64 rollouts, no reference model (beta 0), one
update per batch, so that it too leaves out the pass for the old log-probabilities. Its processor is
ours, which needs no torchvision. It needs `pip install -r requirements-bench.txt`.

    python benchmarks/grpo_step.py [--hidden_size 256 --layers 4 --repeats 3]
"""

import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from PIL import Image
from rollout import arguments, ratio
from transformers import GenerationConfig
from views import SIDE, WORDS

from support.huggingface import load_processor
from support.tiny import Shape, build_model, train_tokenizer

ROOT = Path(__file__).resolve().parent.parent
PROMPTS, ROLLOUTS, LIMIT, STEPS = 4, 16, 256, 4
# Of the vocabulary ends a response. With these weights that makes responses of about 80 tokens.
ENDS = 1 / 115


def build(folder: str, hidden_size: int, layers: int, ends: float = ENDS) -> tuple[str, str]:
    """(model, data): a Hugging Face directory with random weights, and rows of an image and some
    100 tokens of question."""
    rng = random.Random(0)
    folder = Path(folder)
    shape = Shape(
        hidden_size=hidden_size,
        intermediate_size=4 * hidden_size,
        layers=layers,
        heads=hidden_size // 32,
        kv_heads=hidden_size // 64,
        head_dim=32,
        vision_hidden_size=64,
        vision_intermediate_size=128,
        vision_layers=2,
        initializer_range=0.02,
    )
    texts = [" ".join(rng.choices(WORDS, k=40)) for _ in range(50)]
    tokenizer = train_tokenizer(texts, 200)
    build_model(folder / "model", tokenizer, shape)
    ends = list(range(300, 300 + round(len(tokenizer) * ends)))
    GenerationConfig(
        eos_token_id=ends or None, pad_token_id=tokenizer.pad_token_id
    ).save_pretrained(folder / "model")
    rows = []
    for i in range(64):
        Image.frombytes("RGB", (SIDE, SIDE), rng.randbytes(3 * SIDE * SIDE)).save(
            folder / f"{i}.png"
        )
        rows.append(
            {"question": " ".join(rng.choices(WORDS, k=90)), "answer": "1", "image": f"{i}.png"}
        )
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder / "model"), str(folder / "rows.jsonl")


def ours(
    model: str, data: str, output_dir: str, ranks: int = 1, steps: int = STEPS, limit: int = LIMIT
) -> list[dict]:
    """The metrics of some steps of rlvr.py, the first left out."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    start = [sys.executable, *(torchrun if ranks > 1 else [])]
    flags = dict(
        ckpt=model,
        data=data,
        output_dir=output_dir,
        max_steps=steps,
        system_prompt="",  # none, as in TRL
        prompts_per_step=PROMPTS * ranks,
        num_generations=ROLLOUTS,
        max_completion_length=limit,
        dataloader_num_workers=0,
        save_steps=1000,
    )
    subprocess.run(
        [*start, str(ROOT / "rlvr.py"), *(f"--{k}={v}" for k, v in flags.items())],
        check=True,
        stderr=subprocess.DEVNULL,
    )
    return [json.loads(line) for line in open(os.path.join(output_dir, "metrics.jsonl"))][1:]


def trl(model: str, data: str, output_dir: str) -> None:
    """In a process of its own: prints seconds and mean length of each step but the first."""
    import datasets
    from transformers import AutoModelForImageTextToText, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    rows = [json.loads(line) for line in open(data)]
    folder = os.path.dirname(data)
    table = datasets.Dataset.from_list(
        [
            {
                "prompt": [{"role": "user", "content": row["question"]}],
                "image": os.path.join(folder, row["image"]),
            }
            for row in rows
        ]
    ).cast_column("image", datasets.Image())
    config = GRPOConfig(
        output_dir=output_dir,
        use_cpu=True,
        bf16=False,
        fp16=False,
        per_device_train_batch_size=PROMPTS * ROLLOUTS,
        num_generations=ROLLOUTS,
        max_completion_length=LIMIT,
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        beta=0.0,
        learning_rate=1e-6,
        max_steps=STEPS,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        gradient_checkpointing=False,
    )
    ends = []

    class Clock(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            ends.append(time.perf_counter())

    def reward(completions, **_):
        return [0.0] * len(completions)

    trainer = GRPOTrainer(
        AutoModelForImageTextToText.from_pretrained(model),
        [reward],
        config,
        table,
        processing_class=load_processor(model),
        callbacks=[Clock()],
    )
    trainer.train()
    lengths = [
        line["completions/mean_length"]
        for line in trainer.state.log_history
        if "completions/mean_length" in line
    ]
    steps = zip(ends, ends[1:], lengths[1:])
    steps = [{"time/step": b - a, "response_length": n} for a, b, n in steps]
    print("\n" + json.dumps(steps))


def theirs(model: str, data: str, output_dir: str) -> list[dict]:
    done = subprocess.run(
        [sys.executable, __file__, "--side", model, data, output_dir],
        check=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    if "--side" in sys.argv:
        return trl(*sys.argv[-3:])
    args = arguments()
    with tempfile.TemporaryDirectory() as folder:
        model, data = build(folder, args.hidden_size, args.layers)
        seconds = {"rlvr.py": [], "TRL": []}
        for repeat in range(args.repeats):
            for name, side in (("rlvr.py", ours), ("TRL", theirs)):
                steps = side(model, data, os.path.join(folder, f"{name}{repeat}"))
                seconds[name].append(statistics.median(step["time/step"] for step in steps))
                length = statistics.mean(step["response_length"] for step in steps)
                print(
                    f"{name:8s} {seconds[name][-1]:6.2f} s a step, "
                    f"responses of {length:.0f} tokens on average",
                    flush=True,
                )
    print("ratio", ratio(*seconds.values()))


if __name__ == "__main__":
    main()
