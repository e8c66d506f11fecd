"""Pieces that people take into their own projects.

Each piece is copied as its docstring says: its source, the definitions that its line "Takes along:
..." lists, theirs in turn, and the imports of their files that are not the project's own. It runs
in a fresh process that cannot import the project, and has to give what the project gives.
"""

import ast
import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from align import alignment_advantage
from data import Group, encode_prompts, encode_response, make_packs, parse_response
from discriminator import discriminator_loss, load_discriminator
from model import load_policy, token_logprobs
from policy_gradient import policy_loss
from rlvr import reward
from sampler import Sampling, generate
from support.rows import load_data
from tests.conftest import ROOT

# In the order of the imports, which is the order of the copies.
FILES = (
    "support.errors",
    "support.ranks",
    "support.decode",
    "support.fit",
    "support.scores",
    "support.verifier",
    "data",
    "model",
    "sampler",
    "policy_gradient",
    "discriminator",
    "align",
    "rlvr",
)


def source(module: str) -> Path:
    return ROOT / f"{module.replace('.', '/')}.py"


TREES = {name: ast.parse(source(name).read_text()) for name in FILES}


def definitions(file: str) -> dict[str, ast.stmt]:
    found = {}
    for node in TREES[file].body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found[node.name] = node
        elif isinstance(node, ast.Assign):
            targets = [t for target in node.targets for t in getattr(target, "elts", [target])]
            found |= {t.id: node for t in targets}
    return found


def split(path: str, file: str = "") -> tuple[str, str]:
    """A path, "support.errors.UserError", as (file, name). A name without a file is in `file`."""
    module, _, name = path.rpartition(".")
    return module or file, name


def listed(file: str, name: str) -> str:
    """What stands behind "Takes along:" in a definition's docstring."""
    node = definitions(file)[name]
    text = ast.get_docstring(node) if hasattr(node, "body") else None
    match = re.search(r"Takes along:\s*(.*?)\.\s*$", text or "", re.DOTALL)
    return re.sub(r"\s+", " ", match[1]) if match else ""


def whole_files(file: str, name: str) -> list[Path]:
    """The files that a definition takes along whole: "all of a.py and b.py", which stand beside."""
    text = listed(file, name)
    names = re.findall(r"\w+\.py", text) if text.startswith("all of ") else []
    return [source(file).with_name(name) for name in names]


def takes_along(file: str, name: str) -> list[tuple[str, str]]:
    """The single definitions that a definition takes along, as (file, name)."""
    text = listed(file, name)
    single = text and not whole_files(file, name)
    return [split(path, file) for path in text.split(", ")] if single else []


def with_all(*pieces: str) -> set[tuple[str, str]]:
    """Some pieces, "file.name", with all that they take along, as (file, name)."""
    wanted, queue = set(), [split(piece) for piece in pieces]
    while queue:
        entry = queue.pop()
        if entry not in wanted:
            wanted.add(entry)
            queue += takes_along(*entry)
    return wanted


def is_foreign(node: ast.stmt) -> bool:
    """Whether a statement imports something that is not the project's own."""
    if isinstance(node, ast.ImportFrom):
        return node.module != "support" and not source(node.module).exists()
    return isinstance(node, ast.Import)


def copied(*pieces: str) -> str:
    """The source of some pieces with all that they take along. What is in a file that is copied
    whole is imported from there."""
    wanted = with_all(*pieces)
    out = []
    for file in FILES:
        names = [name for f, name in wanted if f == file]
        apart = [name for name in names if whole_files(file, name)]
        out += [f"from {file.split('.')[-1]} import {name}" for name in apart]
        nodes = {id(definitions(file)[name]) for name in names if name not in apart}
        if nodes:
            own = [node for node in TREES[file].body if is_foreign(node) or id(node) in nodes]
            out += [ast.unparse(node) for node in own]
    return "\n\n".join(out)


def run(tmp_path, pieces: tuple[str, ...], driver: str, **inputs):
    """Runs `driver` behind the copied pieces; it finds `inputs` and leaves its result in `out`."""
    for entry in with_all(*pieces):
        for file in whole_files(*entry):
            shutil.copy(file, tmp_path)
    torch.save(inputs, tmp_path / "inputs.pt")
    code = "\n\n".join(
        [
            copied(*pieces),
            "import torch",
            "inputs = torch.load('inputs.pt', weights_only=True)",
            textwrap.dedent(driver),
            "torch.save(out, 'out.pt')",
        ]
    )
    (tmp_path / "copied.py").write_text(code)
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    command = [sys.executable, "copied.py"]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(tmp_path / "out.pt", weights_only=True)


def plain(group: Group) -> dict:
    """A group as tensors and numbers alone."""
    return {"prompt": vars(group.prompt), "branches": group.branches}


@pytest.fixture(scope="module")
def groups(world):
    policy, processor = load_policy(world["init"])
    examples = load_data(world["prompts"])[:2]
    prompts = encode_prompts(processor, examples)
    texts = ["<caption>a</caption>", "a longer branch, of more words", ""]
    branches = [encode_response(processor, text) for text in texts]
    return policy, processor, [Group(prompt, branches) for prompt in prompts]


def test_alignment_advantage(tmp_path):
    scores = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0))
    valid = torch.tensor([[1, 1, 0, 1, 1], [0] * 5, [1] * 5]).bool()
    driver = "out = alignment_advantage(*inputs['scores'], inputs['valid'], 0.3, 1.1)"
    out = run(tmp_path, ("align.alignment_advantage",), driver, scores=scores, valid=valid)
    assert torch.equal(out, alignment_advantage(*scores, valid, 0.3, 1.1)) and out.std() > 0


def test_policy_losses(tmp_path):
    generator = torch.Generator().manual_seed(0)
    logp, old = torch.randn(2, 4, 6, generator=generator)
    advantage = torch.randn(4, generator=generator)
    mask = torch.arange(6) < torch.tensor([6, 1, 3, 4])[:, None]
    driver = """
        data = [inputs[name] for name in ("logp", "old", "advantage", "mask")]
        out = [policy_loss(*data, name, 0.2, 0.28, 3.0) for name in ("grpo", "dapo", "gspo")]
    """
    inputs = dict(logp=logp, old=old, advantage=advantage, mask=mask)
    out = run(tmp_path, ("policy_gradient.policy_loss",), driver, **inputs)
    names = ("grpo", "dapo", "gspo")
    expected = [policy_loss(logp, old, advantage, mask, n, 0.2, 0.28, 3.0) for n in names]
    assert torch.equal(torch.stack(out), torch.stack(expected)) and out[0] != out[2]


def test_verifier(tmp_path):
    """The verifier is two files, copied whole."""
    for name in ("verifier.py", "verifier_child.py"):
        shutil.copy(ROOT / "support" / name, tmp_path)
    (tmp_path / "main.py").write_text(
        "from verifier import verify\n"
        "said = [(r'\\frac{1}{2}', '0.5'), ('x+1', '1+x'), ('3.14', r'\\pi')]\n"
        "print([verify(*pair) for pair in said])\n"
    )
    command = [sys.executable, "main.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.stdout.strip() == "[True, True, False]", done.stderr


def test_reward_and_format(tmp_path):
    """The reward takes the format along, and the files of the verifier."""
    text = "<caption>c</caption> <think>t</think>\n<answer>x+1</answer>"
    out = run(tmp_path, ("data.parse_response",), f"out = vars(parse_response({text!r}))")
    assert out == vars(parse_response(text)) == {"caption": "c", "think": "t", "answer": "x+1"}
    said = [(text, "1+x"), (text, "2+x"), (text, ["2+x", "1+x"]), (text[1:], "1+x")]
    driver = "out = [reward(*pair) for pair in inputs['said']]"
    out = run(tmp_path, ("rlvr.reward",), driver, said=said)
    assert out == [reward(*pair) for pair in said]
    assert out == [(1.0, True), (0.2, False), (1.0, True), (0.0, False)]


PACKS = """
    from transformers import AutoModelForImageTextToText
    policy = AutoModelForImageTextToText.from_pretrained(inputs["path"], dtype=torch.float32)
    groups = [Group(Prompt(**g["prompt"]), g["branches"]) for g in inputs["groups"]]
    {body}
"""


def test_packs_with_their_attention_and_token_logprobs(world, groups, tmp_path):
    policy, _, given = groups
    body = "prepare_for_packs(policy)"
    body += "; out = [token_logprobs(policy, p, 0.8)[0] for p in make_packs(groups, 90)]"
    pieces = ("model.token_logprobs", "data.make_packs")
    inputs = dict(path=world["init"], groups=[plain(group) for group in given])
    out = run(tmp_path, pieces, PACKS.format(body=body), **inputs)
    expected = [token_logprobs(policy, pack, 0.8)[0] for pack in make_packs(given, 90)]
    assert len(out) > 1 and torch.equal(torch.cat(out), torch.cat(expected))


def test_an_unprepared_model_in_a_copy_fails(world, groups, tmp_path):
    """Unprepared, branches would see their siblings: every door says what to call."""
    body = """
    out = []
    for call in (lambda: token_logprobs(policy, make_packs(groups)[0]),
                 lambda: Discriminator(policy.base_model, "dense")(make_packs(groups)[0], None)):
        try:
            call()
        except RuntimeError as error:
            out.append("prepare_for_packs(model)" in str(error))
    """
    pieces = ("model.token_logprobs", "discriminator.Discriminator", "data.make_packs")
    inputs = dict(path=world["init"], groups=[plain(group) for group in groups[2]])
    out = run(
        tmp_path, pieces, PACKS.format(body=textwrap.dedent(body).replace("\n", "\n    ")), **inputs
    )
    assert out == [True, True]


def test_generate(world, groups, tmp_path):
    policy, _, given = groups
    body = """
    try:
        generate(prepare_for_packs(policy), [], Sampling(3, 12))
    except RuntimeError as error:
        assert "set policy.stop_ids" in str(error)
    policy.stop_ids = inputs["ends"]
    sampling = Sampling(3, 12, temperature=1.1, seed=4)
    sampled = generate(policy, [group.prompt for group in groups], sampling, step=7)
    out = [branch for group in sampled for branch in group.branches + group.logprobs]
    """
    inputs = dict(path=world["init"], groups=[plain(g) for g in given], ends=policy.stop_ids)
    body = textwrap.dedent(body).replace("\n", "\n    ")
    out = run(tmp_path, ("sampler.generate",), PACKS.format(body=body), **inputs)
    sampling = Sampling(3, 12, temperature=1.1, seed=4)
    sampled = generate(policy, [group.prompt for group in given], sampling, step=7)
    expected = [x for group in sampled for x in group.branches + group.logprobs]
    assert len(out) == 12 and all(torch.equal(a, b) for a, b in zip(out, expected))


def test_discriminator_with_its_losses(world, groups, tmp_path):
    """Experts and upcycling, the two scores, the pair loss and the balance loss."""
    discriminator, _ = load_discriminator(world["init"], seed=3)
    discriminator.eval()
    body = """
    backbone = prepare_for_packs(policy).base_model
    upcycle(backbone.language_model.layers, torch.Generator().manual_seed(3))
    torch.manual_seed(3)
    judge = Discriminator(backbone, "learned").eval()
    (pack,) = make_packs(groups)
    scores = judge(pack, inputs["views"])
    loss = discriminator_loss(scores[1, inputs["pairs"]], 2)
    sparse = judge.sparse_mlps
    balance = balance_loss([m.probabilities for m in sparse], [m.chosen for m in sparse])
    out = [scores, loss, balance]
    """
    names = ("upcycle", "Discriminator", "discriminator_loss", "balance_loss")
    pieces = (*(f"discriminator.{name}" for name in names), "data.make_packs")
    views, pairs = torch.tensor([0, 1, 0, 0, 1, 0]), torch.tensor([[0, 1, 2, 1], [3, 4, 5, 4]])
    inputs = dict(
        path=world["init"], groups=[plain(g) for g in groups[2]], views=views, pairs=pairs
    )
    body = textwrap.dedent(body).replace("\n", "\n    ")
    scores, loss, balance = run(tmp_path, pieces, PACKS.format(body=body), **inputs)
    (pack,) = make_packs(groups[2])
    expected = discriminator(pack, views)
    assert torch.equal(scores, expected) and expected.std() > 0
    assert torch.equal(loss, discriminator_loss(expected[1, pairs], 2)) and 1.9 < balance < 4
