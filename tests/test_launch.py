"""The launch lines of the README, as they stand there, on two ranks and small."""

import json
import re
import shlex

from tests.conftest import ROOT, launch

TEXT = (ROOT / "README.md").read_text()
LINES = re.findall(r"^torchrun --nproc_per_node=8 (.+)$", TEXT, re.MULTILINE)
SMALL = ("--max_steps", 1, "--max_completion_length", 16, "--num_generations", 2)
SMALL += ("--prompts_per_step", 2, "--per_device_train_batch_size", 2)


def pairs(world) -> str:
    """Warm-up pairs: both sides of each are demonstrations."""
    from support.digits import read_rows

    rows = read_rows(world["prompts"])
    path = world["prompts"].replace("prompts.jsonl", "pairs.jsonl")
    with open(path, "w") as file:
        for row, other in zip(rows[:12], rows[12:]):
            row = {name: row[name] for name in ("question", "image")}
            row |= {"teacher_response": other["response"], "student_response": other["response"]}
            file.write(json.dumps(row) + "\n")
    return path


def test_the_launch_lines(world, tmp_path):
    """Each line runs, on what the lines before it wrote; only ids of the hub and sizes differ."""
    data = {"sft.py": world["sft"], "discriminator.py": pairs(world), "eval.py": world["test"]}
    stages = []
    for line in LINES:
        script, *words = shlex.split(line)
        known = set(re.findall(r"^    (\w+):", (ROOT / script).read_text(), re.MULTILINE))
        words = [world["init"] if word.startswith("Qwen/") else word for word in words]
        words = [str(tmp_path / w) if re.fullmatch(r"\w+_out", w) else w for w in words]
        if "--data" in words:
            words[words.index("--data") + 1] = data[script]
        else:
            words += ["--data", data.get(script, world["prompts"])]
        flags = zip(SMALL[::2], SMALL[1::2])
        words += [x for flag, value in flags if flag[2:] in known for x in (flag, value)]
        launch(script, *words, ranks=2, real=True)
        stages.append(script)
    assert stages == ["sft.py", "discriminator.py", "align.py", "rlvr.py", "eval.py"]
    assert json.loads((tmp_path / "rl_out" / "eval.json").read_text())["rows"] > 0
