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

import pytest
import torch

from align import alignment_advantage
from checkpoint import load_policy
from data import Group, encode_prompts, encode_response, make_packs, parse_response
from discriminator import discriminator_loss, load_discriminator
from model import token_logprobs
from policy_gradient import policy_loss
from rows import load_data
from sampler import generate
from tests.conftest import ROOT

# In the order of the imports, which is the order of the copies.
FILES = ("rows", "data", "model", "sampler", "policy_gradient", "discriminator", "align", "rlvr")
TREES = {name: ast.parse((ROOT / f"{name}.py").read_text()) for name in FILES}


def definitions(file: str) -> dict[str, ast.stmt]:
    found = {}
    for node in TREES[file].body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found[node.name] = node
        elif isinstance(node, ast.Assign):
            targets = [t for target in node.targets for t in getattr(target, "elts", [target])]
            found |= {t.id: node for t in targets}
    return found


def takes_along(file: str, name: str) -> list[tuple[str, str]]:
    """What a definition's docstring lists, as (file, name)."""
    node = definitions(file)[name]
    text = ast.get_docstring(node) if hasattr(node, "body") else None
    match = re.search(r"Takes along:\s*(.*?)\.\s*$", text or "", re.DOTALL)
    listed = re.sub(r"\s+", " ", match[1]).split(", ") if match else []
    return [tuple(entry.split(".")) if "." in entry else (file, entry) for entry in listed]


def copied(*pieces: str) -> str:
    """The source of some pieces, "file.name", with all that they take along."""
    wanted, queue = set(), [tuple(piece.split(".")) for piece in pieces]
    while queue:
        entry = queue.pop()
        if entry not in wanted:
            wanted.add(entry)
            queue += takes_along(*entry)
    out = []
    for file in FILES:
        nodes = {
            id(definitions(file)[name]): definitions(file)[name] for f, name in wanted if f == file
        }
        if nodes:
            for node in TREES[file].body:
                foreign = isinstance(node, ast.Import) or (
                    isinstance(node, ast.ImportFrom) and not (ROOT / f"{node.module}.py").exists()
                )
                if foreign or id(node) in nodes:
                    out.append(ast.unparse(node))
    return "\n\n".join(out)


def run(tmp_path, pieces: tuple[str, ...], driver: str, **inputs):
    """Runs `driver` behind the copied pieces; it finds `inputs` and leaves its result in `out`."""
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
    (tmp_path / "copy.py").write_text(code)
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    command = [sys.executable, "-P", "copy.py"]
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
    policy, processor = load_policy("--model", world["init"])
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


def test_reward_and_format(tmp_path):
    """The verifier is two files, copied whole; the reward takes the format along."""
    for name in ("verifier.py", "verifier_child.py"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "main.py").write_text(
        "from verifier import verify\n"
        "said = [(r'\\frac{1}{2}', '0.5'), ('x+1', '1+x'), ('3.14', r'\\pi')]\n"
        "print([verify(*pair) for pair in said])\n"
    )
    command = [sys.executable, "main.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.stdout.strip() == "[True, True, False]", done.stderr
    text = "<caption>c</caption> <think>t</think>\n<answer>a</answer>"
    out = run(tmp_path, ("data.parse_response",), f"out = vars(parse_response({text!r}))")
    assert out == vars(parse_response(text)) == {"caption": "c", "think": "t", "answer": "a"}


PACKS = """
    from transformers import AutoModelForImageTextToText
    policy = AutoModelForImageTextToText.from_pretrained(inputs["path"], dtype=torch.float32)
    groups = [Group(Prompt(**g["prompt"]), g["branches"]) for g in inputs["groups"]]
    {body}
"""


def test_packs_with_their_attention_and_token_logprobs(world, groups, tmp_path):
    policy, _, given = groups
    body = "out = [token_logprobs(adapt(policy), p, 0.8)[0] for p in make_packs(groups, 90)]"
    pieces = ("model.token_logprobs", "data.make_packs")
    inputs = dict(path=world["init"], groups=[plain(group) for group in given])
    out = run(tmp_path, pieces, PACKS.format(body=body), **inputs)
    expected = [token_logprobs(policy, pack, 0.8)[0] for pack in make_packs(given, 90)]
    assert len(out) > 1 and torch.equal(torch.cat(out), torch.cat(expected))


def test_without_adapt_a_copy_fails(world, groups, tmp_path):
    """Unadapted, branches would see their siblings: every door says what to call."""
    body = """
    out = []
    for call in (lambda: token_logprobs(policy, make_packs(groups)[0]),
                 lambda: Discriminator(policy.base_model, "dense")(make_packs(groups)[0], None)):
        try:
            call()
        except RuntimeError as error:
            out.append("adapt(model)" in str(error))
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
        generate(adapt(policy), [], 3, 12)
    except RuntimeError as error:
        assert "set policy.stop_ids" in str(error)
    policy.stop_ids = inputs["ends"]
    sampled = generate(policy, [group.prompt for group in groups], 3, 12, 1.1, 4, 7)
    out = [branch for group in sampled for branch in group.branches + group.logprobs]
    """
    inputs = dict(path=world["init"], groups=[plain(g) for g in given], ends=policy.stop_ids)
    body = textwrap.dedent(body).replace("\n", "\n    ")
    out = run(tmp_path, ("sampler.generate",), PACKS.format(body=body), **inputs)
    sampled = generate(policy, [group.prompt for group in given], 3, 12, 1.1, 4, 7)
    expected = [x for group in sampled for x in group.branches + group.logprobs]
    assert len(out) == 12 and all(torch.equal(a, b) for a, b in zip(out, expected))


def test_discriminator_with_its_losses(world, groups, tmp_path):
    """Experts and upcycling, the two scores, the pair loss and the balance loss."""
    discriminator, _ = load_discriminator("--model", world["init"], seed=3)
    discriminator.eval()
    body = """
    backbone = adapt(policy).base_model
    upcycle(backbone, seed=3)
    torch.manual_seed(3)
    judge = Discriminator(backbone, "learned").eval()
    (pack,) = make_packs(groups)
    scores = judge(pack, inputs["views"])
    loss = discriminator_loss(scores[1, inputs["pairs"]], 2)
    sparse = judge.sparse
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
