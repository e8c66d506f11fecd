"""Sampling beside vLLM's CPU build, which runs in an environment of its own (requirements-vllm.txt
says how it is made).

    python benchmarks/vllm_parity.py --vllm /tmp/vllm/bin/python
    python benchmarks/vllm_parity.py --vllm /tmp/vllm/bin/python --speed

The first trains a policy on the built-in digits for a moment, on two ranks, which save it;
vLLM opens what they saved. Both answer 40 questions greedily in float32, and the line
`equal N of 40` counts the answers whose tokens are the same.

The second compares tokens per second on random weights, of 5M and of 80M parameters, both sides
in float32: 4 new prompts of about 285 tokens with an image a turn, 16 rows each, images encoded
inside the time. Our rows end at random; vLLM's get the same lengths. The sides alternate, and the
first turn warms up. vLLM's engine is another process, so this needs a quiet machine, and it wants
tcmalloc and libiomp5, as its documentation says: --preload libtcmalloc_minimal.so.4:libiomp5.so.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def serve(model: str) -> None:
    """vLLM's side: a question a line, an answer a line."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what vLLM says goes with the errors
    from PIL import Image
    from vllm import LLM, SamplingParams

    engine = LLM(
        model=model,
        dtype="float32",
        max_model_len=1024,
        max_num_seqs=64,
        limit_mm_per_prompt={"image": 1, "video": 0},
    )
    for line in sys.stdin:
        job = json.loads(line)
        start = time.perf_counter()
        images = [Image.open(path).convert("RGB") for path in job["images"]]
        prompts, params = [], []
        for ids, image, lengths in zip(job["prompts"], images, job["lengths"]):
            prompt = {"prompt_token_ids": ids, "multi_modal_data": {"image": image}}
            for length in lengths:
                exact = dict(min_tokens=length, ignore_eos=True) if job["exact"] else {}
                params.append(
                    SamplingParams(temperature=job["temperature"], max_tokens=length, **exact)
                )
                prompts.append(prompt)
        out = engine.generate(prompts, params, use_tqdm=False)
        seconds = time.perf_counter() - start
        tokens = [list(answer.outputs[0].token_ids) for answer in out]
        print(json.dumps({"seconds": seconds, "tokens": tokens}), file=answers, flush=True)


class Engine:
    """vLLM in its own interpreter, with one model."""

    def __init__(self, args, model: Path):
        env = dict(os.environ, VLLM_CPU_KVCACHE_SPACE="1", VLLM_LOGGING_LEVEL="WARNING")
        env |= {"LD_PRELOAD": args.preload, "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
        words = [args.vllm, __file__, "--serve", str(model)]
        self.log = open(model / "vllm.log", "w")
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, text=True)
        self.process = subprocess.Popen(words, env=env, **pipes)

    def ask(self, processor, examples, prompts, lengths, **more) -> dict:
        image = processor.image_token_id
        ids = [p.input_ids.tolist() for p in prompts]  # vLLM wants one token an image
        ids = [[b for a, b in zip([None, *row], row) if not a == b == image] for row in ids]
        images = [example.images[0] for example in examples]
        job = dict(prompts=ids, images=images, lengths=lengths, **more)
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"vLLM ended: {Path(self.log.name).read_text()[-2000:]}")
        return json.loads(line)

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def parity(args, folder: Path) -> None:
    from data import encode_prompts
    from model import load_policy
    from sampler import Sampling, generate
    from support import digits
    from support.rows import load_data

    shape = dict(head_dim=64, hidden_size=128, intermediate_size=256)
    rows = dict(pretrain_rows=2000, sft_rows=100, prompt_rows=100, validation_rows=40, test_rows=40)
    paths = digits.build(folder / "world", digits.World(**shape, **rows))
    config, sft = Path(paths["init"], "config.json"), folder / "sft"
    config.write_text(config.read_text().replace('"float32"', '"bfloat16"'))
    words = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "sft.py"]
    words += ["--model", paths["init"], "--data", paths["pretrain"], "--output_dir"]
    words += [str(sft), "--max_steps", str(args.steps), "--learning_rate", "4e-3"]
    words += ["--per_device_train_batch_size", "16", "--dataloader_num_workers", "0"]
    if not (sft / "model.safetensors").exists():
        env = dict(os.environ, TQDM_DISABLE="1")
        subprocess.run([sys.executable, *words], cwd=ROOT, check=True, env=env)
    policy, processor = load_policy(str(sft))
    print("saved in", policy.source.dtype)
    examples = list(load_data([paths["validation"]]))
    prompts = encode_prompts(processor, examples)
    ours = [
        group.branches[0].tolist()
        for group in generate(policy, prompts, Sampling(1, 96, temperature=0))
    ]
    engine = Engine(args, sft)
    out = engine.ask(processor, examples, prompts, [[96]] * 40, temperature=0, exact=False)
    engine.close()
    equal = sum(a == b for a, b in zip(ours, out["tokens"]))
    print(f"{sum(map(len, ours))} tokens, equal {equal} of {len(ours)}")


def speed(args, folder: Path) -> None:
    import numpy as np
    import torch
    from PIL import Image

    from data import encode_prompts
    from model import load_policy
    from sampler import Sampling, generate
    from support.rows import Example
    from support.tiny import Shape, build_model, train_tokenizer

    words = "the image shows some digits side by side and a question about them".split()
    tokenizer = train_tokenizer([" ".join(words)] * 3, 200)
    for hidden, layers in ((256, 4), (768, 8)):
        wide = dict(hidden_size=hidden, intermediate_size=4 * hidden, layers=layers, head_dim=64)
        heads = dict(heads=hidden // 64, kv_heads=hidden // 128, vision_hidden_size=hidden // 2)
        path = folder / f"{hidden}"
        shape = Shape(**wide, **heads, initializer_range=0.02)
        build_model(path, tokenizer, shape)
        policy, processor = load_policy(str(path))
        policy.stop_ids = torch.arange(100, 106)  # about 1 of 92 tokens
        size = sum(p.numel() for p in policy.parameters()) / 1e6
        engine = Engine(args, path)
        rates = {"ours": [], "vLLM": []}
        for turn in range(args.repeats + 1):
            examples, rng = [], random.Random(turn)
            for i in range(4):
                image = folder / f"{turn}-{i}.png"
                noise = np.random.default_rng(10 * turn + i).integers(0, 255, (224, 224, 3))
                Image.fromarray(noise.astype(np.uint8)).save(image)
                text = " ".join(rng.choices(words, k=70))
                content = [{"type": "image"}, {"type": "text", "text": text}]
                chat = [{"role": "user", "content": content}]
                examples.append(Example(4 * turn + i, f"row {i}", chat, [str(image)]))
            start = time.perf_counter()
            prompts = encode_prompts(processor, examples)
            groups = generate(policy, prompts, Sampling(16, 256), step=turn)
            seconds = time.perf_counter() - start
            lengths = [[len(branch) for branch in group.branches] for group in groups]
            answers = engine.ask(processor, examples, prompts, lengths, temperature=1.0, exact=True)
            assert [len(row) for row in answers["tokens"]] == sum(lengths, [])
            if turn:
                rates["ours"].append(sum(map(sum, lengths)) / seconds)
                rates["vLLM"].append(sum(map(sum, lengths)) / answers["seconds"])
        engine.close()
        middle = {name: statistics.median(some) for name, some in rates.items()}
        told = ", ".join(f"{name} {rate:.0f} tokens/s" for name, rate in middle.items())
        long = [len(prompt.input_ids) for prompt in prompts]
        turns = [a / b for a, b in zip(*rates.values())]
        print(f"{size:.1f}M parameters, prompts of {min(long)} to {max(long)} tokens: {told}")
        least, most = min(turns), max(turns)
        print(f"ratio {statistics.median(turns):.2f}   (min {least:.2f}, max {most:.2f})")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--vllm", help="the interpreter of vLLM's environment")
    parser.add_argument("--speed", action="store_true")
    parser.add_argument("--preload", default="", help="libraries for vLLM, as LD_PRELOAD has them")
    parser.add_argument("--repeats", type=int, default=4)
    parser.add_argument("--steps", type=int, default=150, help="training steps before it compares")
    parser.add_argument("--folder", help="where all is kept; what was trained there is used again")
    parser.add_argument("--serve", metavar="MODEL", help="used by this file itself")
    args = parser.parse_args()
    if args.serve:
        return serve(args.serve)
    sys.path.insert(0, str(ROOT))
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(args.folder or folder).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        (speed if args.speed else parity)(args, folder)


if __name__ == "__main__":
    main()
