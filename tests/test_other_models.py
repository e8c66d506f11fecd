"""Other vision-language models with gated MLPs, Qwen2.5-VL and LLaVA, as policy and as
discriminator."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from data import Group, encode_prompts, encode_response, make_packs
from discriminator import Comparison, judge, load_discriminator
from model import load_policy, token_logprobs
from sampler import Sampling, generate
from support.errors import UserError
from support.huggingface import (
    load_processor,
    processor_files,
    save_discriminator,
    save_policy,
    write_files,
)
from support.rows import Example, load_data
from tests.conftest import fails
from tests.judges import TEACHER, sides
from tests.test_discriminator import KINDS, OTHER, SHORT, written


def qwen2_5_vl(world, path) -> None:
    """Another member of the family: mrope and patches with grids, its vision attending in
    windows."""
    processor = load_processor(world["init"])
    text = dict(
        vocab_size=len(processor.tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        initializer_range=0.1,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]},
    )
    vision = dict(
        depth=2,
        hidden_size=32,
        num_heads=4,
        intermediate_size=48,
        patch_size=8,
        out_hidden_size=32,
        window_size=32,
        fullatt_block_indexes=[1],
        initializer_range=0.1,
    )
    ids = {
        name: getattr(processor, name)
        for name in ("image_token_id", "vision_start_token_id", "vision_end_token_id")
    }
    config = Qwen2_5_VLConfig(
        text_config=text, vision_config=vision, tie_word_embeddings=True, **ids
    )
    model = Qwen2_5_VLForConditionalGeneration(config)
    model.generation_config = GenerationConfig(eos_token_id=processor.tokenizer.eos_token_id)
    model.save_pretrained(path)
    write_files(path, processor_files(world["init"]))


def llava(world, path) -> None:
    """Another family: one position a token, images of one size, no grid."""
    qwen = load_processor(world["init"])
    image = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    processor = LlavaProcessor(
        image,
        qwen.tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token="<|image_pad|>",
        chat_template=qwen.chat_template,
    )
    text = LlamaConfig(
        vocab_size=len(qwen.tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.1,
    )
    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=32,
        patch_size=8,
    )
    model = LlavaForConditionalGeneration(
        LlavaConfig(
            text_config=text,
            vision_config=vision,
            vision_feature_layer=-1,
            image_token_index=processor.image_token_id,
        )
    )
    model.generation_config = GenerationConfig(eos_token_id=qwen.tokenizer.eos_token_id)
    model.save_pretrained(path)
    processor.save_pretrained(path)


@pytest.fixture(scope="module", params=[qwen2_5_vl, llava])
def other_model(request, world, tmp_path_factory):
    path = tmp_path_factory.mktemp(request.param.__name__) / "model"
    torch.manual_seed(0)
    request.param(world, path)
    return str(path)


def by_itself(model, prompt, ids):
    """transformers' own call for one sequence."""
    images = {
        name: getattr(prompt, name)
        for name in ("pixel_values", "image_grid_thw")
        if getattr(prompt, name) is not None
    }
    if "image_grid_thw" in images:
        images["mm_token_type_ids"] = (ids == model.config.image_token_id).int()
    return dict(input_ids=ids, attention_mask=torch.ones_like(ids), **images)


def test_another_model_as_policy(world, other_model, tmp_path):
    """Packed scores and greedy samples are transformers' own, and a saved policy is the same."""
    policy, processor = load_policy(other_model)
    theirs = AutoModelForImageTextToText.from_pretrained(other_model).eval()
    rows = load_data(world["prompts"])[:3]
    text = Example(
        7,
        "text",
        [{"role": "user", "content": [{"type": "text", "text": "What is 1 + 2 + 3?"}]}],
        [],
    )
    prompts = encode_prompts(processor, [*rows[:2], text])
    groups = [
        Group(p, [encode_response(processor, t) for t in (written(TEACHER), written(SHORT), "x")])
        for p in prompts
    ]
    policy.eval()
    for max_tokens in (None, 60):
        for pack in make_packs(groups, max_tokens):
            ours = token_logprobs(policy, pack)[0].detach().split(pack.lengths)
            for (g, i), logp in zip(pack.members, ours):
                ids = torch.cat([prompts[g].input_ids, groups[g].branches[i]])[None]
                logits = (
                    theirs(**by_itself(theirs, prompts[g], ids))
                    .logits[0, len(prompts[g].input_ids) - 1 : -1]
                    .detach()
                )
                logits[:, policy.forbidden] = -torch.inf
                expected = logits.log_softmax(-1).gather(1, groups[g].branches[i][:, None])[:, 0]
                torch.testing.assert_close(logp, expected, atol=1e-5, rtol=0)
    sampled = generate(policy, prompts, Sampling(1, 12, temperature=0.0))
    for prompt, group in zip(prompts, sampled):
        out = theirs.generate(
            **by_itself(theirs, prompt, prompt.input_ids[None]),
            do_sample=False,
            max_new_tokens=12,
            suppress_tokens=policy.forbidden.tolist(),
        )
        assert out[0, len(prompt.input_ids) :].tolist() == group.branches[0].tolist()
    save_policy(policy, str(tmp_path / "saved"))
    again, its_processor = load_policy(str(tmp_path / "saved"))
    assert all(
        torch.equal(a, b) for a, b in zip(policy.state_dict().values(), again.state_dict().values())
    )
    assert all(
        torch.equal(a.input_ids, b.input_ids)
        for a, b in zip(prompts, encode_prompts(its_processor, [*rows[:2], text]))
    )


@pytest.mark.parametrize("kind", KINDS)
def test_another_model_as_discriminator(world, other_model, tmp_path, kind):
    """Upcycled, packed and one by one the same, its image seen, saved and loaded the same, and
    refused as a policy."""
    discriminator, processor = load_discriminator(other_model, kind)
    discriminator.eval()
    assert len(discriminator.sparse_mlps) == (0 if kind == "dense" else 2)
    prompts = encode_prompts(processor, load_data(world["prompts"])[:2])
    whole = [Comparison(p, TEACHER, [OTHER, SHORT, None, TEACHER]) for p in prompts]
    judged = judge(discriminator, whole, processor, 4096, backward=True)
    assert max(p.grad.abs().max() for p in discriminator.parameters() if p.grad is not None) > 0
    assert judged.valid.tolist() == [[True, True, False, True]] * 2
    split = judge(discriminator, whole, processor, 1, backward=False)
    (teacher, student), (_, student_split) = sides(judged), sides(split)
    torch.testing.assert_close(student_split, student, atol=1e-5, rtol=0)
    assert torch.equal(split.valid, judged.valid)
    assert torch.equal(student[:, 3], teacher[:, 3])
    assert torch.equal(teacher[0, 0], teacher[1, 0]) == (
        kind == "text" and rows_ask_the_same(prompts)
    )
    save_discriminator(discriminator, str(tmp_path / "d"))
    again, its_processor = load_discriminator(str(tmp_path / "d"))
    assert again.kind == kind
    repeated = judge(again.eval(), whole, its_processor, 4096, backward=False)
    assert torch.equal(sides(repeated)[1], student) and torch.equal(repeated.valid, judged.valid)
    with pytest.raises(UserError, match="a discriminator, without"):
        load_policy(str(tmp_path / "d"))
    with pytest.raises(UserError, match=f"--experts {kind}"):
        load_discriminator(str(tmp_path / "d"), "learned" if kind != "learned" else "dedicated")


def test_a_damaged_discriminator_of_another_model(other_model, tmp_path):
    """A missing tensor, a head that is gone or of another shape, and an unknown kind of experts are
    named."""
    path, name = tmp_path / "d", "model.language_model.layers.1.mlp.experts.down_proj"
    discriminator, _ = load_discriminator(other_model)
    save_discriminator(discriminator, str(path))
    tensors = load_file(path / "model.safetensors")
    head = tensors.pop("score.weight")
    heads = {"no tensor score.weight": {}, "shape .3, ": {"score.weight": head[[0, 0, 1]].clone()}}
    for said, other in heads.items():
        save_file(tensors | other, path / "model.safetensors", {"format": "pt"})
        with pytest.raises(UserError, match=said):
            load_discriminator(str(path))
    del tensors[name]
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=f"no tensor {name}"):
        load_discriminator(str(path))
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"prism_experts": "newer"}))
    with pytest.raises(UserError, match="prism_experts 'newer', expected one of learned"):
        load_discriminator(str(path))


def test_whose_prompts_it_can_take(world, tmp_path):
    """A policy's prompts serve a discriminator whose processor differs in how large an image may
    be, as that of the released one does. Other patches, pixels or ids are refused."""
    ours = load_discriminator(world["init"])[1]
    for name, change in {
        "size": {"max_pixels": 313600, "do_resize": False},
        "mean": {"image_mean": [0.4, 0.4, 0.4]},
        "patch": {"patch_size": 4},
        "normal": {"do_normalize": False},
        "ids": {},
    }.items():
        path = tmp_path / name
        shutil.copytree(world["init"], path)
        file = path / "preprocessor_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | change))
        if name == "ids":
            file = path / "tokenizer.json"
            tokenizer = json.loads(file.read_text())
            vocab = tokenizer["model"]["vocab"]
            vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
            file.write_text(json.dumps(tokenizer))
        if name == "size":
            theirs = load_discriminator(str(path), policy_processor=ours)[1]
            assert str(theirs.image_processor) != str(ours.image_processor)
        else:
            with pytest.raises(UserError, match=f"{path}: .* differs from the policy's; choose a"):
                load_discriminator(str(path), policy_processor=ours)


def test_a_discriminator_for_images_of_another_size_is_refused(world, tmp_path):
    """Where a model takes images of one size only; in the warm-up as well."""
    for size in (32, 48):
        llava(world, tmp_path / str(size))
    file = tmp_path / "48/preprocessor_config.json"
    if not file.exists():
        file = tmp_path / "48/processor_config.json"
    file.write_text(file.read_text().replace("32", "48"))
    ours = load_discriminator(str(tmp_path / "32"))[1]
    with pytest.raises(UserError, match="48: .* differs from the policy's; choose a"):
        load_discriminator(str(tmp_path / "48"), policy_processor=ours)
    flags = ["--model", world["init"], "--policy", tmp_path / "32", "--data", world["curated"]]
    said = fails("discriminator.py", *flags, "--output_dir", tmp_path / "out")
    assert "differs from the policy's" in said


def rows_ask_the_same(prompts) -> bool:
    return torch.equal(prompts[0].input_ids, prompts[1].input_ids)


def test_windows_are_refused(world, tmp_path):
    qwen2_5_vl(world, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["text_config"] |= {
        "use_sliding_window": True,
        "sliding_window": 8,
        "layer_types": ["full_attention", "sliding_attention"],
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="sliding_attention"):
        load_policy(str(tmp_path))
