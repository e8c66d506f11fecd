#!/usr/bin/env bash
# A checkpoint on the paper's benchmarks, by lmms-eval: bash docs/lmms.sh CHECKPOINT
# Run it from the root of the repository. WeMath is left out: its task has a system turn of its own (D22).
set -euo pipefail

# The prompt with which the checkpoint was trained.
prompt=$(python - "$1" <<'END'
import sys
import data
print(data.read_shared(sys.argv[1]).get("system_prompt", data.SYSTEM_PROMPT))
END
)
tasks=mathvista_testmini,mathvision_testmini,mathverse_testmini,mmmu_val,mmmu_pro,hallusion_bench_image

# lmms-eval splits its model arguments at commas; the single quotes keep the prompt's together.
python -m lmms_eval --model qwen3_vl --tasks "$tasks" --batch_size 1 \
    --model_args "pretrained=$1,system_prompt='$prompt'" \
    --gen_kwargs max_new_tokens=8192 \
    --reasoning_tags '[["<caption>", "<answer>"], ["</", "answer>"]]'
