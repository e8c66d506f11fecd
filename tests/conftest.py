"""Sets one thread a process and no hub, before torch is imported anywhere.

The tests' own world: a small build of the digits with random weights, a policy trained on it for a
moment, short runs of the stages, and a tiny discriminator, each made once a session. `launch` runs
a script in as many processes as asked.
"""

import atexit
import functools
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

# Two processes of tests share the cores, see pyproject.toml.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["HF_HUB_OFFLINE"] = "1"
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.chdir(ROOT)

import pytest  # noqa: E402
import torch  # noqa: E402

from tests.chaos import Nursery, flags_of  # noqa: E402
from tests.runs import stopped_at  # noqa: E402

WORLD = dict(
    digits=3,
    noise=0.0,
    misread_digits=2,
    misread_rate=0.6,
    base_misread_digits=1,
    pretrain_rows=120,
    sft_rows=120,
    prompt_rows=400,
    question_rows=16,
    validation_rows=16,
    test_rows=24,
)


@functools.cache
def nursery_of_tests():
    """One for all tests of this process, started when first asked for."""
    started = Nursery()
    atexit.register(started.close)
    return started


@pytest.fixture(scope="session")
def nursery():
    return nursery_of_tests()


@pytest.fixture(scope="session")
def world(tmp_path_factory) -> dict[str, str]:
    """Name -> path of a small digits world."""
    from support import digits

    return digits.build(tmp_path_factory.mktemp("digits") / "world", digits.World(**WORLD))


def varlen_by_mask(q, k, v, starts_q, starts_k, *_, scale, seqused_k=None, **options):
    """`varlen_attn` as torch documents it, by one mask over all queries and keys."""

    def numbered(starts, count):
        at = torch.arange(count)
        sequence = torch.searchsorted(starts.long(), at, right=True) - 1
        return sequence, at - starts.long()[sequence]

    (of_q, at_q), (of_k, at_k) = numbered(starts_q, len(q)), numbered(starts_k, len(k))
    visible = of_q[:, None] == of_k
    if options.get("window_size") == (-1, 0):  # the last query sees the last key
        longer = (starts_k.diff() - starts_q.diff()).long()
        visible = visible & (at_k <= at_q[:, None] + longer[of_q][:, None])
    if seqused_k is not None:
        visible = visible & (at_k < seqused_k.long()[of_k])
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q, k) * scale
    scores = torch.where(visible, scores, -torch.inf)
    out = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v)
    return (out, scores.logsumexp(-1).T) if options.get("return_aux") else out


def as_on_a_gpu(monkeypatch):
    """Attention as on a GPU, with `varlen_by_mask` for the kernel."""
    import model
    import sampler

    for module in (model, sampler):
        monkeypatch.setattr(module, "has_varlen", lambda *_: True)
        monkeypatch.setattr(module, "varlen_attn", varlen_by_mask)


@pytest.fixture
def ragged(monkeypatch):
    as_on_a_gpu(monkeypatch)


def same_samples(policy, ours, theirs, temperature=1.0, seed=0, step=0) -> int:
    """Asserts that two ways of computing have sampled the same branches. -> compared tokens.

    Two processors, or two ways on one of them, round in different places. So a branch may differ
    from the first token on whose random number lies within 1e-5 of the boundary between the two
    tokens, or whose two likeliest tokens are that close where sampling is greedy. Log-probabilities
    have to agree up to that token."""
    from data import Group, make_packs
    from model import model_inputs
    from sampler import uniforms

    compared = 0
    for one, two in zip(ours, theirs, strict=True):
        for row, (a, b) in enumerate(zip(one.branches, two.branches, strict=True)):
            length = min(len(a), len(b))
            differs = (a[:length] != b[:length]).nonzero()[:, 0].tolist()
            until = differs[0] if differs else length
            if one.logprobs and two.logprobs:
                x, y = one.logprobs[row][:until], two.logprobs[row][:until]
                torch.testing.assert_close(x, y, atol=1e-5, rtol=0)
            compared += until
            if not differs:
                assert len(a) == len(b)
                continue
            before = Group(one.prompt, [a[:until]] if until else [])
            (pack,) = make_packs([before])
            device = next(policy.parameters()).device
            with torch.no_grad():
                logits = policy(**model_inputs(policy, pack.to(device))).logits[0, -1].float().cpu()
            p = (logits / (temperature or 1.0)).index_fill(0, policy.forbidden, -torch.inf)
            p = p.softmax(-1).double()
            chosen = int(a[until]), int(b[until])
            if temperature == 0:
                assert abs(p[chosen[0]] - p[chosen[1]]) < 1e-5
                continue
            u = uniforms(seed, step, one.prompt.index, row, until + 1)[until]
            low, high = sorted(chosen)
            cdf = p.cumsum(0)
            assert abs(cdf[low] - u) < 1e-5 and cdf[high - 1] - cdf[low] < 1e-5, (cdf[low], u)
    return compared


def launch(
    script: str, *args, ranks: int = 1, check: bool = True, real: bool = False, **env
) -> subprocess.CompletedProcess:
    """Runs a script as `ranks` processes and captures what they print. They are forks of a process
    that has imported everything. With `real`, with variables in `env`, or on several ranks that may
    fail (`check` False), `python` or torchrun starts them, as a user would."""
    words = [*map(str, (script, *args))]
    if real or env or (ranks > 1 and not check):
        start = [sys.executable]
        if ranks > 1:
            start += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
        env = {**os.environ, "PYTHONPATH": str(ROOT), "TQDM_DISABLE": "1", **env}
        pipes = dict(capture_output=True, text=True, cwd=ROOT, timeout=600)
        done = subprocess.run([*start, *words], env=env, **pipes)
    else:
        with tempfile.TemporaryDirectory() as folder:
            started = nursery_of_tests().run(*words, ranks=ranks, log=f"{folder}/log")
            code = next((code for code in started.codes if code != 0), 0)
            done = subprocess.CompletedProcess(words, code, started.printed, started.said)
    if check and done.returncode != 0:
        said = f"{done.stdout[-4000:]}\n{done.stderr[-20000:]}"
        raise AssertionError(f"{' '.join(words)} ended with {done.returncode}\n{said}")
    return done


def fails(*args, ranks: int = 1, **env) -> str:
    """The one line that a user sees of a script that ends with exit code 2."""
    done = launch(*args, ranks=ranks, check=False, **env)
    assert done.returncode != 0 and "Traceback" not in done.stderr, done.stderr
    assert ranks > 1 or done.returncode == 2, done.returncode
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, done.stderr
    return errors[0]


def lines(path) -> list[dict]:
    """The rows of a JSONL file."""
    with open(path) as file:
        return [json.loads(line) for line in file]


@pytest.fixture(scope="session")
def trained(world, tmp_path_factory) -> str:
    """A policy that has learned the format, by stage 1's own code."""
    out = tmp_path_factory.mktemp("trained") / "sft"
    flags = ("--max_steps", 150, "--learning_rate", 4e-3, "--per_device_train_batch_size", 32)
    launch(
        "sft.py", "--model", world["init"], "--data", world["prompts"], "--output_dir", out, *flags
    )
    return str(out)


@pytest.fixture(scope="session")
def short_discriminator(world, trained, nursery, tmp_path_factory) -> str:
    """What `short` has for a discriminator."""
    out = tmp_path_factory.mktemp("d") / "d"
    flags = flags_of("discriminator.py", world, trained, trained)
    made = nursery.run("discriminator.py", *flags, "--output_dir", out, log=f"{out}.log")
    assert made.codes == [0], made.said
    return str(out)


@pytest.fixture(scope="session")
def short(world, trained, request):
    """script -> the words of a short run of it."""

    def words(script: str) -> list:
        judge = request.getfixturevalue("short_discriminator") if script == "align.py" else trained
        return [script, *flags_of(script, world, trained, judge)]

    return words


@pytest.fixture(scope="session")
def whole(short, nursery, tmp_path_factory):
    """(script, ranks) -> the words of a short run, and the directory where it ran undisturbed,
    without a checkpoint; each made once."""
    folder, done = tmp_path_factory.mktemp("whole"), {}

    def make(script: str, ranks: int = 1) -> tuple[list, Path]:
        if (script, ranks) not in done:
            base, out = short(script), folder / f"{script}-{ranks}"
            ended = nursery.run(*base, "--output_dir", out, ranks=ranks, log=f"{out}.log")
            assert ended.codes == [0] * ranks, ended.said
            done[script, ranks] = base, out
        return done[script, ranks]

    return make


@pytest.fixture(scope="session")
def stopped(nursery, whole, tmp_path_factory):
    """A run of stage 1 that was stopped with checkpoints 2 and 3, or later ones, each with a
    Hugging Face directory."""
    out = tmp_path_factory.mktemp("stopped") / "out"
    found = stopped_at(nursery, [*whole("sft.py")[0], "--save_hf_steps", 1], out, 2)
    assert len(found) == 2
    return out


@pytest.fixture(scope="session")
def in_bfloat16(trained, tmp_path_factory) -> str:
    """The policy of `trained` as models are published: in bfloat16, which its config names."""
    from safetensors.torch import load_file, save_file

    out = tmp_path_factory.mktemp("in_bfloat16") / "policy"
    shutil.copytree(trained, out, ignore=shutil.ignore_patterns("run.json", "*.jsonl", "ranks"))
    weights = load_file(out / "model.safetensors")
    halves = {name: weight.bfloat16() for name, weight in weights.items()}
    save_file(halves, out / "model.safetensors", {"format": "pt"})
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))
    return str(out)


@pytest.fixture(scope="session")
def dense(tmp_path_factory) -> str:
    """A tiny dense Qwen3-VL directory, every parameter random."""
    from tests.judges import dense_model

    return dense_model(tmp_path_factory.mktemp("models") / "dense")


@pytest.fixture(scope="session")
def sparse(dense, tmp_path_factory):
    """(discriminator, processor, the directory that it was saved to)."""
    from support.huggingface import save_discriminator
    from tests.judges import randomised

    discriminator, processor = randomised(dense)
    path = str(tmp_path_factory.mktemp("models") / "sparse")
    save_discriminator(discriminator, path)
    return discriminator, processor, path
