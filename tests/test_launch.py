"""Every launch line of the pages, as it stands there.

The lines of a stage run in the order in which a reader meets them, on what the lines before them
wrote. Only four things differ: an id of the hub becomes a tiny model, 8 processes become 2, sizes
are small, and a line that would fetch the published data gets rows of this machine.
"""

import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from support.digits import read_rows
from tests.conftest import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES += [ROOT / "benchmarks/README.md", ROOT / "CONTRIBUTING.md"]
PROGRAMS = ("torchrun", "python", ".venv/bin/", "make", "accelerate", "vllm", "pip", ".")
# Lines that no test starts as they stand, and why.
ELSEWHERE = {
    "make demo": "test_pipeline.py runs the stages of it; a fresh clone runs all of it",
    "make test": "it is what runs this",
    "make chaos TRIES=180 SEED=0 STEPS=2000 FUZZ=1000000": "hours; test_run.py has parts of it",
    ". .venv/bin/activate": "a shell's own",
    "python -m docs.lmms rl_out --limit 8": "test_lmms_eval_asks_as_the_checkpoint_was_trained",
    "accelerate launch --num_processes=8 -m docs.lmms rl_out": "the same on eight GPUs",
    "python benchmarks/study.py --seeds 0 --only prism_grpo sft_grpo": "about an hour",
    "python benchmarks/judge_study.py --seeds 0 1": "hours",
    "python benchmarks/judge_study.py --table": "test_judge_study.py writes the same files",
    ".venv/bin/python benchmarks/rollout.py": "minutes",
    ".venv/bin/python benchmarks/vllm_parity.py --speed --vllm /tmp/vllm/bin/python": "needs vLLM",
    ".venv/bin/python -m pytest tests/test_align.py -n 0": "tests start no tests",
    ".venv/bin/ruff format .": "make test checks what it does",
}
SMALL = {"max_steps": 1, "max_completion_length": 16, "num_generations": 2}
SMALL |= {"prompts_per_step": 2, "per_device_train_batch_size": 2}


def command_lines() -> list[str]:
    """The commands of all code blocks, each once, without their comments."""
    found = []
    for page in PAGES:
        for block in page.read_text().split("```")[1::2]:
            lines = [line.split(" #")[0].strip() for line in block.splitlines()[1:]]
            found += [line for line in lines if line.split(" ")[0].startswith(PROGRAMS)]
    return list(dict.fromkeys(found))


def launch_lines() -> list[str]:
    """Those that start a stage."""
    stages = r"(?:torchrun|python) (?:-\S+ )*\w+\.py\b.*"
    return [line for line in command_lines() if re.fullmatch(stages, line)]


def script_of(line: str) -> str:
    return re.search(r"\w+\.py", line)[0]


def start(line: str, folder: Path, init: str, endpoint: str = "") -> list[subprocess.Popen]:
    """Starts a line in `folder`, once for each of its nodes."""
    script = script_of(line)
    fields = set(re.findall(r"^    (\w+):", (ROOT / script).read_text(), re.MULTILINE))
    words = shlex.split(line)
    program = [sys.executable]
    if words[0] == "torchrun":
        program += ["-m", "torch.distributed.run"]
    words = [init if word.startswith("Qwen/") else word for word in words[1:]]
    words = [str(ROOT / word) if word == script else word for word in words]
    nodes = 2 if "--nnodes=2" in words else 1
    for place, word in enumerate(words):
        if word.startswith("--nproc_per_node"):
            words[place] = f"--nproc_per_node={2 // nodes}"
        words[place] = words[place].replace("HOST:29500", endpoint)
    if program[1:] and nodes == 1:
        program.append("--standalone")  # a port of its own
    if "--data" not in words:
        words += ["--data", "pairs.jsonl" if script == "discriminator.py" else "mine.jsonl"]
    for name, value in SMALL.items():
        if name in fields:
            words += [f"--{name}", str(value)]
    env = {**os.environ, "TQDM_DISABLE": "1", "PYTHONPATH": ""}
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return [
        subprocess.Popen([*program, *words], cwd=folder, env=env, **pipes) for _ in range(nodes)
    ]


def run(line: str, folder: Path, init: str, **options) -> str:
    """Runs a line and returns what its first process printed."""
    processes = start(line, folder, init, **options)
    printed = [process.communicate(timeout=300)[0] for process in processes]
    for process, said in zip(processes, printed):
        assert process.returncode == 0, f"{line}\n{said[-4000:]}"
    return printed[0]


@pytest.fixture(scope="module")
def own_rows(world, tmp_path_factory) -> Path:
    """A folder with rows of one's own: files as README.md and docs/data.md name them."""
    import datasets

    folder = tmp_path_factory.mktemp("own")
    rows = read_rows(world["prompts"])[:12]
    pictures = Path(world["prompts"]).parent
    for number, row in enumerate(rows):
        shutil.copy(pictures / row["image"], folder / f"{number}.png")
        row["image"] = f"{number}.png"
    plain = [{key: row[key] for key in ("question", "image", "response", "answer")} for row in rows]
    turned = rows[1:] + rows[:1]
    pairs = [{**row, "student_response": other["response"]} for row, other in zip(plain, turned)]
    for name, some in (("mine", plain), ("pairs", pairs), ("benchmark", plain)):
        text = "".join(json.dumps(row) + "\n" for row in some)
        (folder / f"{name}.jsonl").write_text(text)
    datasets.Dataset.from_list(plain).to_parquet(folder / "more.parquet")
    return folder


def chosen(script: str) -> list[str]:
    """Lines of a stage that write a result; dry runs and resumed runs stand apart."""
    apart = ("--dry_run", "--resume", "--nnodes")
    lines = [line for line in launch_lines() if script_of(line) == script]
    return [line for line in lines if not any(flag in line for flag in apart)]


def test_the_launch_lines(world, own_rows):
    """The published pipeline, one's own rows, another alpha, another family and the ablations; then
    a killed run that goes on, a second node, and dry runs."""
    init = world["init"]
    for script in ("sft.py", "discriminator.py", "align.py", "rlvr.py", "eval.py"):
        lines = chosen(script)
        assert lines
        for line in lines:
            run(line, own_rows, init)
    assert json.loads((own_rows / "rl_out/eval.json").read_text())["rows"] == 12

    (resumed,) = [line for line in launch_lines() if "--resume" in line]
    lost = own_rows / "sft_out"
    settings = json.loads((lost / "run.json").read_text())
    del settings["finished"]
    (lost / "run.json").write_text(json.dumps(settings))
    (lost / "model.safetensors").unlink()
    run(resumed, own_rows, init)
    assert (lost / "model.safetensors").exists()

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        endpoint = f"127.0.0.1:{free.getsockname()[1]}"
    (nodes,) = [line for line in launch_lines() if "--nnodes" in line]
    shutil.rmtree(own_rows / "align_out")
    run(nodes, own_rows, init, endpoint=endpoint)
    assert (own_rows / "align_out/model.safetensors").exists()

    counted = [line for line in launch_lines() if "--dry_run" in line]
    assert len(counted) >= 2
    for line in counted:
        assert "GiB a GPU" in run(line, own_rows, init)


def test_every_command_is_run_or_named():
    """A page that gains a command gets a test of it here, or says above why there is none."""
    assert set(command_lines()) - set(launch_lines()) == set(ELSEWHERE)


def test_the_example_of_a_piece(world, own_rows):
    """The README's program for another project, with this repository on Python's path."""
    blocks = re.findall(r"```python\n(.*?)```", PAGES[0].read_text(), re.DOTALL)
    (program,) = [block for block in blocks if "load_discriminator" in block]
    assert len(program.splitlines()) <= 10
    program = program.replace("Qwen/Qwen3-VL-2B-Instruct", str(world["init"]))
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    options = dict(cwd=own_rows, env=env, capture_output=True, text=True, timeout=300)
    done = subprocess.run([sys.executable, "-c", program], **options)
    assert done.returncode == 0, done.stderr
    scores = [float(number) for number in re.findall(r"-?\d\.\d+", done.stdout)]
    assert len(scores) == 2


def test_lmms_eval_asks_as_the_checkpoint_was_trained(tmp_path):
    """lmms-eval is not installed. What stands in for it prints what it is given."""
    prompt = "Don't guess, look: a=b, 'c'."
    (tmp_path / "ckpt").mkdir()
    (tmp_path / "ckpt/prism.json").write_text(json.dumps({"system_prompt": prompt}))
    package = tmp_path / "path/lmms_eval"
    (package / "models/simple").mkdir(parents=True)
    (package / "models/simple/qwen3_vl.py").write_text(
        "class Qwen3_VL:\n"
        "    def __init__(self, pretrained, batch_size=1, system_prompt='You are helpful.'):\n"
        "        self.system_prompt = system_prompt\n"
    )
    (package / "__main__.py").write_text(
        "import json, sys\n"
        "from lmms_eval.models.simple.qwen3_vl import Qwen3_VL\n"
        "class Chat(Qwen3_VL): pass\n"
        "def cli_evaluate():\n"
        "    print(json.dumps([sys.argv[1:], Chat(pretrained='x', batch_size=2).system_prompt]))\n"
    )
    command = [sys.executable, "-m", "docs.lmms", str(tmp_path / "ckpt"), "--limit", "8"]
    env = {**os.environ, "PYTHONPATH": str(tmp_path / "path")}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    words, asked = json.loads(done.stdout)
    assert asked == prompt
    assert dict(zip(words[::2], words[1::2]))["--model_args"] == f"pretrained={tmp_path}/ckpt"
    assert words[-2:] == ["--limit", "8"]
