"""--lora_rank: adapters learn in a policy's place, and what is saved has none."""

import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch.distributed.checkpoint import FileSystemReader
from transformers import AutoModelForImageTextToText, Qwen3VLMoeConfig
from transformers import Qwen3VLMoeForConditionalGeneration

from align import AlignConfig
from data import Group, encode_prompts, encode_response, make_packs
from model import load_policy, token_logprobs
from sampler import Sampling, generate
from sft import SFTConfig
from support import fit
from support.flags import parse
from support.huggingface import add_adapters, processor_files, save_policy, write_files
from support.rows import load_data
from tests.chaos import differences, flags_of
from tests.conftest import fails, launch, lines
from tests.runs import stopped_at
from tests.test_saves import lost

LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.fixture(scope="module")
def run(nursery, world, trained, tmp_path_factory):
    """Runs a stage with adapters. -> its directory"""
    folder = tmp_path_factory.mktemp("lora")

    def make(name: str, script: str, *flags, ranks: int = 1) -> Path:
        base = flags_of(script, world, trained, trained)
        words = (script, *base, "--warmup_steps", 0, *flags, "--output_dir", folder / name)
        done = nursery.run(*words, ranks=ranks, log=folder / f"{name}.log")
        assert done.codes == [0] * ranks, done.said
        return folder / name

    return make


CHECKSUM = """
import sys
from types import SimpleNamespace
from model import load_policy
from support.ranks import join_ranks
from support.resuming import checksum_of

policy, _ = load_policy(sys.argv[1], join_ranks(), SimpleNamespace(lora_rank=2, seed=0))
print("checksum", checksum_of(policy), flush=True)
"""


def stated(out, name: str) -> list:
    return [line[name] for line in lines(out / "metrics.jsonl")]


def test_only_the_linear_layers_of_the_language_model_learn(run, world):
    """What is saved has the names and dtypes of the source, and W changes by a matrix of low rank;
    so do those of --save_hf_steps. On two ranks, where A has three rows to share, all is the same.
    """
    flags = ("--model", world["init"], "--lora_rank", 3, "--save_hf_steps", 5)
    flags += ("--learning_rate", 1e-2, "--max_steps", 8, "--max_tokens_per_pack", 300)
    one = run("one", "sft.py", *flags, "--per_device_train_batch_size", 8)
    more = ("--freeze_vision", True, "--activation_checkpointing", True)
    two = run("two", "sft.py", *flags, *more, "--per_device_train_batch_size", 4, ranks=2)
    losses = stated(one, "loss")
    assert losses[0] - losses[-1] > 0.2
    assert stated(two, "loss") == pytest.approx(losses, rel=1e-5)

    paths = (world["init"], one, two, one / "checkpoint-5")
    before, after, of_two, early = (load_file(f"{path}/model.safetensors") for path in paths)
    kinds = [{n: (w.shape, w.dtype) for n, w in x.items()} for x in (before, after, of_two, early)]
    assert kinds == [kinds[0]] * 4
    for name, weight in before.items():
        learns = ".language_model.layers." in name and name.split(".")[-2] in LINEAR
        for other in (after[name], of_two[name], early[name]):
            assert torch.equal(other, weight) != learns, name
            change = torch.linalg.svdvals((other - weight).double()) if learns else [0] * 4
            assert change[3] <= 1e-4 * change[0], name
        gap = (of_two[name] - after[name]).norm()
        assert gap <= 1e-3 * (after[name] - weight).norm(), name


def test_an_adapted_policy(world, trained, tmp_path):
    """At the start it says exactly what the base says; then, with any adapters, samples what it
    scores, has gradients of adapters only, and is saved as a model that says the same."""
    config = SimpleNamespace(lora_rank=4, seed=1)
    policy, processor = load_policy(trained, config=config)
    base, _ = load_policy(trained)
    examples = load_data(world["prompts"])[:2]
    prompts = encode_prompts(processor, examples)
    responses = [encode_response(processor, example.response) for example in examples]
    (pack,) = make_packs([Group(p, responses) for p in prompts])
    asked = token_logprobs(base, pack)[0]
    assert torch.equal(token_logprobs(policy, pack)[0], asked)
    again, _ = load_policy(trained, config=config)
    assert all(torch.equal(p, q) for p, q in zip(policy.parameters(), again.parameters()))

    torch.manual_seed(0)
    for name, parameter in policy.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    said = token_logprobs(policy, pack)[0]
    assert (said - asked).abs().max() > 0.1
    said.sum().backward()
    learns = {name for name, p in policy.named_parameters() if p.grad is not None}
    assert learns == {name for name, _ in policy.named_parameters() if ".lora_" in name}
    assert len(learns) == 2 * len(LINEAR) * policy.config.text_config.num_hidden_layers

    groups = generate(policy, prompts, Sampling(3, 40))
    scored = token_logprobs(policy, make_packs(groups)[0])[0]
    sampled = torch.cat([logp for group in groups for logp in group.logprobs])
    assert (scored - sampled).abs().max() < 1e-4

    save_policy(policy, str(tmp_path))
    merged, _ = load_policy(str(tmp_path))
    assert (token_logprobs(merged, pack)[0] - said).abs().max() < 1e-4
    theirs, report = AutoModelForImageTextToText.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    assert theirs.state_dict().keys() == base.state_dict().keys()


@pytest.mark.parametrize("script, ranks", [("sft.py", 1), ("rlvr.py", 2)])
def test_a_run_with_adapters_resumes(nursery, run, world, trained, tmp_path, script, ranks):
    """To the last bit, from a checkpoint that holds adapters only. RLVR has the base for a
    reference: there is no distance in the first step, and some in later ones."""
    more = ("--lora_rank", 4, *(("--beta", 0.1) if script == "rlvr.py" else ()))
    whole = run(f"whole-{script}", script, *more, ranks=ranks)
    if script == "rlvr.py":
        assert max(stated(whole, "sampled_scored_gap")) < 1e-4
        kl = stated(whole, "kl_ref")
        assert kl[0] == 0 and max(kl) > 1e-6
    words = (script, *flags_of(script, world, trained, trained), "--warmup_steps", 0, *more)
    out, log = tmp_path / "out", tmp_path / "log"
    step = stopped_at(nursery, words, out, log=log, ranks=ranks)[-1]
    stored = FileSystemReader(out / f"checkpoint-{step}" / "state").read_metadata()
    names = [name for name in stored.state_dict_metadata if ".model." in f".{name}"]
    assert names and all(".lora_" in name for name in names)
    other = (*words, "--output_dir", out, "--resume", "--lora_rank", 2)
    done = nursery.run(*other, ranks=ranks, log=log)
    assert "its lora_rank is 4, not 2" in done.errors[0]
    done = nursery.run(*words, "--output_dir", out, "--resume", ranks=ranks, log=log)
    assert done.codes == [0] * ranks and "resumed from" in done.said, done.said
    assert differences(whole, out) == []


def adapter_on(base, adapter):
    """What peft and transformers make of a base and the directory of adapters, and its names."""
    model = AutoModelForImageTextToText.from_pretrained(base, dtype=torch.float32)
    model = PeftModel.from_pretrained(model, adapter)
    names = {name for name, _ in model.named_parameters() if ".lora_" in name}
    return model.merge_and_unload().state_dict(), names


@pytest.mark.parametrize("ranks", [1, 2])
def test_adapters_stand_beside_the_merged_weights(run, in_bfloat16, ranks):
    """As peft reads them, whole; merged in float32 they lose nothing, and the line says what
    bfloat16 would lose of them."""
    flags = (
        "--model",
        in_bfloat16,
        "--lora_rank",
        3,
        "--learning_rate",
        1e-5,
        "--save_hf_steps",
        3,
    )
    out = run(f"beside-{ranks}", "sft.py", *flags, ranks=ranks)
    before, after = (load_file(f"{path}/model.safetensors") for path in (in_bfloat16, out))
    for folder in (out, out / "checkpoint-3"):
        stored = load_file(folder / "adapter" / "adapter_model.safetensors")
        assert {tensor.dtype for tensor in stored.values()} == {torch.float32}
        state, names = adapter_on(in_bfloat16, folder / "adapter")
        assert len(names) == len(stored) == 2 * len(LINEAR) * 2  # of two layers, and no others
        for name, weight in load_file(folder / "model.safetensors").items():
            torch.testing.assert_close(state[name], weight, rtol=0, atol=1e-7)
    config = json.loads((out / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == in_bfloat16 and config["r"] == 3
    record = json.loads((out / "run.json").read_text())
    share = lost(before, after)
    assert share > 0.2
    assert record["rounding_loss"] == {"policy": pytest.approx(share, rel=1e-4)}


def test_a_checksum_is_the_same_on_any_number_of_ranks(trained, tmp_path):
    (tmp_path / "sum.py").write_text(CHECKSUM)
    sums = set()
    for ranks in (1, 2, 3):
        done = launch(tmp_path / "sum.py", trained, ranks=ranks)
        sums |= set(re.findall(r"checksum (\d+)", done.stdout))
    assert len(sums) == 1


def test_adapters_learn_at_ten_times_the_rate(world, monkeypatch, capsys):
    """Unless another is given; in the embedded world of its own settings."""

    def read(config_class, *words):
        monkeypatch.setattr("sys.argv", ["stage.py", *map(str, words)])
        monkeypatch.setattr(sys.modules["__main__"], "__doc__", "A stage.")
        return parse(config_class)

    data = ("--data", world["prompts"])
    own = ("--discriminator", world["init"])
    config = read(AlignConfig, "--ckpt", world["init"], *data, *own, "--lora_rank", 8)
    assert config.learning_rate == pytest.approx(10 * AlignConfig.learning_rate)
    assert config.discriminator_learning_rate == AlignConfig.discriminator_learning_rate
    assert "--lora_rank: trains at --learning_rate 1e-05, 10 times" in capsys.readouterr().err
    sft = ("--model", world["init"], *data)
    assert read(SFTConfig, *sft, "--lora_rank", 8).learning_rate == pytest.approx(1e-4)
    given = ("--lora_rank", 8, "--learning_rate", 3e-4)
    assert read(SFTConfig, *sft, *given).learning_rate == 3e-4
    assert read(SFTConfig, *sft).learning_rate == SFTConfig.learning_rate


def test_the_experts_of_a_policy_stay_as_they_are(world, tmp_path, capsys):
    """And a line says so. Its attention has adapters, merged and beside."""
    config = json.loads(Path(world["init"], "config.json").read_text())
    text, vision = config["text_config"], config["vision_config"]
    text |= dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32)
    text |= dict(decoder_sparse_step=1, mlp_only_layers=[])
    for part in (text, vision):
        part.pop("model_type")
    ids = {name: value for name, value in config.items() if name.endswith("_token_id")}
    torch.manual_seed(0)
    mixture = Qwen3VLMoeConfig(text_config=text, vision_config=vision, **ids)
    model = Qwen3VLMoeForConditionalGeneration(mixture)
    model.save_pretrained(tmp_path / "mixture")
    write_files(tmp_path / "mixture", processor_files(world["init"]))
    lora = SimpleNamespace(lora_rank=2, seed=0)
    policy, _ = load_policy(str(tmp_path / "mixture"), config=lora)
    assert "the experts are not trained" in capsys.readouterr().err
    learns = {name for name, p in policy.named_parameters() if p.requires_grad}
    assert learns and all(".self_attn." in name for name in learns)
    for name, parameter in policy.named_parameters():
        if name in learns:
            torch.nn.init.normal_(parameter, std=0.05)
    save_policy(policy, str(tmp_path / "out"))
    state, names = adapter_on(tmp_path / "mixture", tmp_path / "out" / "adapter")
    assert len(names) == len(learns)
    # It is said once, though RLVR with a KL loads the checkpoint twice.
    flags = ("--lora_rank", 2, "--beta", 0.1, "--max_steps", 1, "--prompts_per_step", 2)
    flags += ("--num_generations", 2, "--max_completion_length", 8, "--output_dir", tmp_path / "rl")
    rl = ("rlvr.py", "--ckpt", tmp_path / "mixture", "--data", world["prompts"], *flags)
    assert launch(*rl).stderr.count("the experts are not trained") == 1
    theirs = AutoModelForImageTextToText.from_pretrained(tmp_path / "out", dtype=torch.float32)
    for name, weight in theirs.state_dict().items():
        torch.testing.assert_close(state[name], weight, rtol=0, atol=1e-6)


def test_a_discriminator_has_none(world, trained, tmp_path):
    flags = ("--data", world["sft"], "--output_dir", tmp_path / "out", "--lora_rank", 4)
    said = fails("discriminator.py", "--model", trained, *flags)
    assert said.startswith("error: --lora_rank: only policies take adapters")
    assert not (tmp_path / "out").exists()


def test_adapters_are_counted(world):
    """What --dry_run takes for learning is what learns."""
    policy, _ = load_policy(world["init"])
    before = sum(p.numel() for p in policy.parameters())
    add_adapters(policy, 5)
    learns = sum(p.numel() for p in policy.parameters() if p.requires_grad)
    config = SFTConfig(model=world["init"], lora_rank=5)
    ((_, parts), *_) = fit.phases(config, 1)
    assert parts["optimiser"] == 8 * learns
    assert parts["weights"] == 4 * (before + learns)
