"""Accuracy of a checkpoint on a data set, by source.

Greedy decoding with the sampler of the stages (model.generate), answers judged by the verifier of stage 3. Writes

    output_dir/eval.json          accuracy, format_valid, mean_response_tokens, caption_accuracy (where rows have accepted
                                  captions), by_source, rows, truncated
    output_dir/generations.jsonl  every response with its judgement

    python eval.py --ckpt out/demo/sft                                              the test digits
    torchrun --nproc_per_node=8 eval.py --ckpt rl_out --data mathvista.jsonl
"""

from data import UserError, batches, decode, load_data, parse_response

import json
import math
import os
import re
import time
from dataclasses import dataclass

import torch.distributed as dist
from tqdm import tqdm

from model import generate, load_policy, rank, setup, shard, world_size
from rlvr import verify
from run import main, parse, say


@dataclass
class EvalConfig:
    ckpt: str | None = None  # left out: the digits world's instruct model
    data: str | None = None  # rows with `answer`; left out: the test digits
    output_dir: str | None = None  # left out: the checkpoint's own directory
    per_device_eval_batch_size: int = 64
    max_completion_length: int = 8192
    max_rollout_rows: int | None = None


def same_caption(caption: str, accepted: list[str]) -> bool:
    """Whether a caption says what one of the accepted ones says: case, punctuation and white space do not count."""

    def words(text):
        return re.findall(r"\w+", text.casefold())

    return words(caption) in [words(one) for one in accepted]


def summarise(rows: list[dict]) -> dict:
    """Shares over the rows; null where no row had what is measured."""
    captions = [row["caption_correct"] for row in rows if row["caption_correct"] is not None]
    return {
        "accuracy": sum(row["correct"] for row in rows) / len(rows),
        "caption_accuracy": sum(captions) / len(captions) if captions else None,
        "format_valid": sum(row["format_valid"] for row in rows) / len(rows),
        "mean_response_tokens": sum(row["tokens"] for row in rows) / len(rows),
        "truncated": sum(row["truncated"] for row in rows) / len(rows),
        "rows": len(rows),
    }


def evaluate() -> None:
    import digits

    start = time.perf_counter()
    config = parse(EvalConfig, digits.SETTINGS["eval"])
    device = setup()
    if config.output_dir and os.path.isfile(config.output_dir):
        raise UserError(f"--output_dir {config.output_dir} is a file; name a directory")
    config.ckpt, config.data = digits.fill_in(model=config.ckpt, data=config.data, split="test")
    output_dir = config.output_dir or (config.ckpt if os.path.isdir(config.ckpt) else "out/eval")
    examples = load_data(config.data, need=("answer",))
    policy, processor = load_policy("--ckpt", config.ckpt)
    policy = shard(policy, device).eval()
    batch = config.per_device_eval_batch_size * world_size()
    stream = batches(examples, processor, batch, 0, 0, len(examples), (rank(), world_size()))
    rows = []
    for _ in tqdm(range(math.ceil(len(examples) / batch)), desc="eval", disable=rank() != 0):
        pairs = next(stream)
        groups = generate(
            policy,
            [p for _, p in pairs],
            1,
            config.max_completion_length,
            temperature=0.0,
            max_rollout_rows=config.max_rollout_rows,
        )
        for (example, _), group in zip(pairs, groups):
            branch = group.branches[0]
            text = decode(processor, branch)
            response = parse_response(text)
            right = response is not None and verify(response.answer, example.answer)
            reads = response is not None and same_caption(response.caption, example.captions)
            rows.append(
                {
                    "row": example.index,
                    "where": example.where,
                    "source": example.source,
                    "answer": example.answer,
                    "response": text,
                    "format_valid": response is not None,
                    "correct": right,
                    "caption_correct": reads if example.captions else None,
                    "tokens": len(branch),
                    "truncated": int(branch[-1]) not in policy.ends.tolist(),
                }
            )
    if world_size() > 1:
        parts = [None] * world_size()
        dist.all_gather_object(parts, rows)
        rows = [row for part in parts for row in part]
    if rank() == 0:
        rows.sort(key=lambda row: row["row"])
        result = {
            "ckpt": config.ckpt,
            "data": config.data,
            **summarise(rows),
            "by_source": {
                source: summarise([row for row in rows if row["source"] == source])
                for source in sorted({row["source"] for row in rows})
            },
            "seconds": time.perf_counter() - start,
        }
        os.makedirs(output_dir, exist_ok=True)
        with open(os.path.join(output_dir, "generations.jsonl"), "w") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        with open(os.path.join(output_dir, "eval.json"), "w") as file:
            json.dump(result, file, indent=1)
        names = [
            name
            for name in ("accuracy", "caption_accuracy", "format_valid")
            if result[name] is not None
        ]
        shown = ", ".join(f"{name} {result[name]:.3f}" for name in names)
        say(f"{config.ckpt}: {shown} on {len(rows)} rows; written to {output_dir}/eval.json")


if __name__ == "__main__":
    main(evaluate)
