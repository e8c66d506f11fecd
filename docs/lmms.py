"""A checkpoint on the paper's benchmarks, by lmms-eval 0.7.3, asked as it was trained to be asked.

    python -m docs.lmms rl_out --limit 8                          a first try, eight rows a task
    accelerate launch --num_processes=8 -m docs.lmms rl_out       all rows, on 8 GPUs

Start it in the root of the repository. Further flags are lmms-eval's. A task whose judge is a model
of OpenAI's reads OPENAI_API_KEY. WeMath is left out: its task has a system turn of its own, and the
model would get two (D22).
"""

import sys
from functools import partialmethod

from lmms_eval.__main__ import cli_evaluate
from lmms_eval.models.simple.qwen3_vl import Qwen3_VL

from data import SYSTEM_PROMPT, read_shared

TASKS = (
    "mathvista_testmini",
    "mathvision_testmini",
    "mathverse_testmini",
    "mmmu_val",
    "mmmu_pro",
    "hallusion_bench_image",
)
# Pairs between which lmms-eval removes all text, both ends included. What stays is the answer.
AROUND_THE_ANSWER = '[["<caption>", "<answer>"], ["</", "answer>"]]'


def main() -> None:
    checkpoint, *more = sys.argv[1:]
    prompt = read_shared(checkpoint).get("system_prompt", SYSTEM_PROMPT)
    # As one of --model_args the prompt would be cut at commas, and quotes would reach the model.
    Qwen3_VL.__init__ = partialmethod(Qwen3_VL.__init__, system_prompt=prompt)
    flags = {
        "--model": "qwen3_vl",
        "--model_args": f"pretrained={checkpoint}",
        "--tasks": ",".join(TASKS),
        "--batch_size": "1",
        "--gen_kwargs": "max_new_tokens=8192",
        "--reasoning_tags": AROUND_THE_ANSWER,
    }
    sys.argv[1:] = [word for pair in flags.items() for word in pair] + more
    cli_evaluate()


if __name__ == "__main__":
    main()
