"""A policy's directory: what is read of its weights, its tokenizer and its end tokens, what is
refused, and that each rank reads its part."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from discriminator import load_discriminator
from model import load_policy
from support import huggingface
from support.errors import UserError
from support.huggingface import _hollow, read_config, save_policy, save_weights
from tests.conftest import launch


@pytest.fixture(scope="module")
def policy_processor(world):
    return load_policy(world["init"])


# --------------------------------------------------------------------------------------------------
# Weights that are not the model's


def changed(trained, path, weights, config=None) -> str:
    """A copy of a model directory with other weights: `weights(tensors)` -> tensors."""
    shutil.copytree(trained, path, ignore=shutil.ignore_patterns("*.jsonl", "checkpoint-*"))
    save_file(weights(load_file(path / "model.safetensors")), path / "model.safetensors")
    if config:
        content = json.loads((path / "config.json").read_text())
        config(content)
        (path / "config.json").write_text(json.dumps(content))
    return str(path)


@pytest.mark.parametrize(
    "weights, named",
    [
        (lambda t: {f"_orig_mod.{k}": v for k, v in t.items()}, "_orig_mod."),
        (lambda t: {f"module.{k}": v for k, v in t.items()}, "module."),
        (lambda t: {k: v for k, v in t.items() if "layers.1." not in k}, "layers.1."),
        (lambda t: {k: v for k, v in t.items() if "visual" not in k}, "visual"),
        (lambda t: {**t, "surplus.weight": torch.zeros(2)}, "surplus.weight"),
        (lambda t: {k: v[:-1] if "embed_tokens" in k else v for k, v in t.items()}, "embed_tokens"),
    ],
    ids=["_orig_mod", "module", "lost layer", "no vision tower", "surplus", "other shape"],
)
def test_weights_that_do_not_match_are_refused(trained, tmp_path, weights, named):
    """transformers would draw what is missing at random, and say it in a report that is muted."""
    path = changed(trained, tmp_path / "m", weights)
    for load in (load_policy, load_discriminator):
        with pytest.raises(UserError) as error:
            load(path)
        text = str(error.value)
        assert text.startswith(f"{path}: ") and named in text and "\n" not in text


def test_a_head_of_its_own_is_kept(trained, tmp_path):
    """The config says that the head is tied, but the file holds another one: it is not dropped."""

    def with_head(tensors):
        name = next(k for k in tensors if k.endswith("embed_tokens.weight"))
        return {**tensors, "lm_head.weight": tensors[name].flip(0).clone()}

    path = changed(trained, tmp_path / "m", with_head)
    expected = load_file(tmp_path / "m" / "model.safetensors")["lm_head.weight"]
    try:
        policy, processor = load_policy(path)
    except UserError as error:  # refused in one line is right too; dropped in silence is not
        assert "lm_head" in str(error)
        return
    assert torch.equal(policy.lm_head.weight, expected)
    save_policy(policy, str(tmp_path / "saved"))
    again, _ = load_policy(str(tmp_path / "saved"))
    assert torch.equal(again.lm_head.weight, expected)


def test_a_lost_tie_is_refused(trained, tmp_path):
    """Untied by a lost flag, the head has no weights of its own."""

    def untie(content):
        content["tie_word_embeddings"] = content["text_config"]["tie_word_embeddings"] = False

    with pytest.raises(UserError, match="1 missing ..lm_head.weight"):
        load_policy(changed(trained, tmp_path / "m", lambda t: t, untie))


def test_a_tokenizer_without_an_end_is_refused(trained, tmp_path):
    path = shutil.copytree(trained, tmp_path / "m", ignore=shutil.ignore_patterns("checkpoint-*"))
    config = json.loads((path / "tokenizer_config.json").read_text()) | {"eos_token": None}
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    for load in (load_policy, load_discriminator):
        with pytest.raises(UserError, match="m: its tokenizer names no end of sequence, so no"):
            load(str(path))


ENDS = [([5, None], [5, 397]), (None, [397]), ("5", [5, 397])]
NO_ENDS = ["<|im_end|>", [[5]], {"id": 5}, 10**30, 10**6, -1, [0.5], True]


@pytest.mark.parametrize("named, stops", [*ENDS, *((named, None) for named in NO_ENDS)])
def test_the_ends_that_a_checkpoint_names(world, tmp_path, named, stops):
    path = shutil.copytree(world["init"], tmp_path / "m")
    config = json.loads((path / "generation_config.json").read_text()) | {"eos_token_id": named}
    (path / "generation_config.json").write_text(json.dumps(config))
    if stops:
        assert load_policy(str(path))[0].stop_ids.tolist() == stops
    else:
        with pytest.raises(UserError, match="m/generation_config.json: eos_token_id is .*; give"):
            load_policy(str(path))


# --------------------------------------------------------------------------------------------------
# Directories in and out


def half(tensors):
    return {name: tensor.bfloat16() for name, tensor in tensors.items()}


def untied(tensors):
    name = next(k for k in tensors if k.endswith("embed_tokens.weight"))
    return half({**tensors, "lm_head.weight": tensors[name].flip(0).clone()})


def of_4_57(content):
    """The config as published: the dtype stands in its text part only."""
    content.pop("dtype")
    content["text_config"]["dtype"] = "bfloat16"


def of_4_57_untied(content):
    of_4_57(content)
    content["tie_word_embeddings"] = content["text_config"]["tie_word_embeddings"] = False


# Each rank's part of the weights equals transformers' own; what no file holds does as well.
LOADED = """
import sys
import torch
from transformers import AutoModelForImageTextToText
from model import load_policy
from support.huggingface import save_policy
from support.ranks import join_ranks, rank, world_size

device = join_ranks()
policy, processor = load_policy(sys.argv[1], device)
theirs = AutoModelForImageTextToText.from_pretrained(sys.argv[1], dtype=torch.float32)
ours = {n: getattr(p, "full_tensor", lambda: p)() for n, p in policy.named_parameters()}
ours |= dict(policy.named_buffers())
expected = dict(theirs.named_parameters()) | dict(theirs.named_buffers())
assert ours.keys() == expected.keys(), ours.keys() ^ expected.keys()
for name in ours:
    assert ours[name].dtype == torch.float32 == expected[name].dtype
    assert torch.equal(ours[name], expected[name]), name
tied = theirs.lm_head.weight is theirs.get_input_embeddings().weight
assert tied == (policy.lm_head.weight is policy.get_input_embeddings().weight)
assert policy.training == theirs.training == False
assert all(p.requires_grad for p in policy.parameters())
assert policy.generation_config.eos_token_id == theirs.generation_config.eos_token_id
if world_size() > 1:
    held = sum(p.to_local().numel() for p in policy.parameters())
    assert held < 0.6 * sum(p.numel() for p in theirs.parameters())
save_policy(policy, sys.argv[2])
print(f"equal {rank()}", flush=True)
"""


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("source", ["ours", "published", "published, untied"])
def test_loading_by_shard(trained, tmp_path, ranks, source):
    """The same weights bit by bit as transformers loads, on any number of ranks. What is saved
    again has the source's config and its values, in float32."""
    path = trained
    if source != "ours":
        weights, config = (half, of_4_57) if source == "published" else (untied, of_4_57_untied)
        path = changed(trained, tmp_path / "m", weights, config)
    assert _hollow(read_config(path), path) is not None
    (tmp_path / "loaded.py").write_text(LOADED)
    saved = tmp_path / "saved"
    done = launch(tmp_path / "loaded.py", path, saved, ranks=ranks)
    assert all(f"equal {r}" in done.stdout for r in range(ranks))
    before, after = (load_file(f"{p}/model.safetensors") for p in (path, saved))
    assert before.keys() == after.keys()
    assert {t.dtype for t in after.values()} == {torch.float32}
    assert all(torch.equal(before[name].float(), after[name]) for name in before)
    for name in os.listdir(path):
        if name.endswith((".json", ".txt")) and name != "run.json":
            assert (saved / name).read_bytes() == Path(path, name).read_bytes(), name


def test_the_hub_is_asked_once(policy_processor, tmp_path, monkeypatch):
    """However often files of a hub id are read, as for every layer that is upcycled."""
    asked = []
    download = lambda path, allow_patterns: asked.append(path) or tmp_path
    monkeypatch.setattr(huggingface, "snapshot_download", download)
    save_policy(policy_processor[0], str(tmp_path))
    for _ in range(3):
        assert len(huggingface.read_tensors("owner/asked-once", "norm")) > 2
    assert asked == ["owner/asked-once"]


def test_weights_in_several_files(policy_processor, tmp_path):
    """With an index, as transformers reads them; a file that was left there is not read as well."""
    policy, processor = policy_processor
    save_policy(policy, str(tmp_path))
    (tmp_path / "model.safetensors").unlink()
    save_weights(policy, str(tmp_path), "300KB")
    files = sorted(tmp_path.glob("*.safetensors"))
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert len(files) > 2 and {p.name for p in files} == set(index["weight_map"].values())
    assert all(p.stat().st_size < 320_000 for p in files)
    expected = dict(policy.named_parameters())
    assert index["weight_map"].keys() == expected.keys()
    assert index["metadata"]["total_size"] == 4 * sum(p.numel() for p in expected.values())
    theirs = AutoModelForImageTextToText.from_pretrained(tmp_path)
    ours, _ = load_policy(str(tmp_path))
    for model in (theirs, ours):
        assert all(torch.equal(p, expected[n]) for n, p in model.named_parameters())
    save_file({"lm_head.weight": torch.zeros(3)}, tmp_path / "other.safetensors")
    again, _ = load_policy(str(tmp_path))
    assert all(torch.equal(p, expected[n]) for n, p in again.named_parameters())
