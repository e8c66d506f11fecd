"""--dry_run: the count against what is really allocated, and against the tables of the docs.

Measured are small models with random weights, in bfloat16 as on a GPU, in one process on a CPU.
"""

import io
import json
import math
import weakref
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from PIL import Image
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForImageTextToText, Blip2Config, Gemma3Config, InternVLConfig
from transformers import Qwen2VLConfig, Qwen3VLConfig

from align import AlignConfig
from data import Group, Prompt, encode_prompts, make_packs
from discriminator import Discriminator, DiscriminatorConfig, upcycle
from eval import EvalConfig
from model import LogProbs, PackAttention, _ragged, prepare_for_packs, token_logprobs
from rlvr import RLVRConfig
from sampler import Sampling, generate
from sft import SFTConfig
from support import fit
from support.errors import UserError
from support.huggingface import load_processor
from support.ranks import blocks, recompute, shard, vision_tower
from support.rows import Example
from tests.conftest import ROOT, fails, launch


class Live(TorchDispatchMode):
    """Bytes of all tensors made inside that are still there, and the most there have been."""

    def __init__(self, *modules):
        super().__init__()
        self.now = self.peak = 0
        parts = [x for module in modules for x in (*module.parameters(), *module.buffers())]
        self.seen = {part.untyped_storage()._cdata for part in parts}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self._add(tensor.untyped_storage())
        return out

    def _add(self, storage):
        if storage._cdata not in self.seen:
            self.seen.add(storage._cdata)
            weakref.finalize(storage, self._free, storage._cdata, storage.nbytes())
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)

    def _free(self, key, size):
        self.seen.discard(key)
        self.now -= size


@pytest.fixture(scope="module")
def small(world, tmp_path_factory):
    """(path, model, processor): a Qwen3-VL whose layers dwarf all that is not counted."""
    config = json.loads(open(f"{world['init']}/config.json").read())
    config["text_config"] |= dict(hidden_size=128, intermediate_size=384, num_hidden_layers=6)
    config["text_config"] |= dict(num_attention_heads=8, num_key_value_heads=4, head_dim=16)
    config["vision_config"] |= dict(out_hidden_size=128, depth=3)
    path = tmp_path_factory.mktemp("small")
    (path / "config.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    config = Qwen3VLConfig.from_pretrained(path)
    model = prepare_for_packs(AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16))
    model.stop_ids = torch.tensor([], dtype=torch.long)  # every row gets as long as it may
    return str(path), model.train(), load_processor(world["init"])


def prompts(processor, count: int, size: int) -> list:
    """Prompts of one image, `size` pixels a side, and few words."""
    file = io.BytesIO()
    Image.new("RGB", (size, size)).save(file, "PNG")
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "So?"}]}]
    rows = [Example(i, "row", chat, [file.getvalue()]) for i in range(count)]
    return encode_prompts(processor, rows)


def packed(processor, count: int, size: int, branches: list[int]):
    """-> (pack, its tokens, its keys, the share of its tokens that are images)."""
    groups = [
        Group(prompt, [torch.arange(n) % 200 for n in branches])
        for prompt in prompts(processor, count, size)
    ]
    (pack,) = make_packs(groups)
    tokens, prompt = pack.input_ids.shape[1], len(groups[0].prompt.input_ids)
    keys = tokens + (count * prompt * len(branches) if len(branches) > 1 else 0)
    images = int((pack.input_ids == processor.image_token_id).sum())
    return pack, tokens, keys, images / tokens


def passes(module, run, room: float, monkeypatch) -> SimpleNamespace:
    """Bytes that are kept at the end of a forward, and the most in forward and backward, less
    what was there. A gradient is let go at once, as FSDP does when it has summed it."""
    recompute(module.model, room)
    hooks = [
        p.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
        for p in module.parameters()
    ]
    with Live(module) as live:
        monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: live.now)
        out = run()
        kept = live.now
        out.float().sum().backward()
    for hook in hooks:
        hook.remove()
    return SimpleNamespace(kept=kept, peak=live.peak)


def compare(m, counted, measured, tokens: int, keys: int, layers: int) -> None:
    """What a CPU keeps besides, in `layers` layers, is no part of the count. Its attention keeps
    the output in the order of its blocks, and where branches read a prompt their own keys and
    values again. Its norms keep two copies in float32 in place of what comes in."""
    more = tokens * (2 * m.q + (4 * m.k if keys > tokens else 0) + 6 * (2 * m.h + m.q + m.k))
    kept, work = counted
    kept += 6 * tokens * m.h  # the last norm
    kept, most = kept + more * layers, kept + work + more * max(1, layers)
    print(measured, kept, most)
    assert kept == pytest.approx(measured.kept, rel=0.1)
    assert most == pytest.approx(measured.peak, rel=0.1)


@pytest.mark.parametrize("kept", ["none", "some", "all"])
@pytest.mark.parametrize("branches", [[900], [150] * 8])
def test_activations(small, kept, branches, monkeypatch):
    path, policy, processor = small
    pack, tokens, keys, share = packed(processor, 2, 160, branches)
    m = fit.read_model(path)
    most, _ = fit.activations(m, tokens, keys, math.inf, share)
    # The third of six layers starts with more, and three come after it. `most` has the last norm.
    two = most - 4.02 * fit.layer(m, tokens, keys) + 2 * 4 * m.h * tokens
    room, layers = dict(none=(0, 0), some=(two, 2), all=(math.inf, 6))[kept]
    counted = fit.activations(m, tokens, keys, room, share)
    measured = passes(policy, lambda: token_logprobs(policy, pack)[0], room, monkeypatch)
    compare(m, counted, measured, tokens, keys, layers)


def test_head(small):
    """With many more rows than the hidden state is wide, a chunk of logits is what counts."""
    path, policy, _ = small
    rows, words, width = fit.LOGIT_ROWS, 20_000, 16
    hidden = torch.randn(rows, width, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(words, width, dtype=torch.bfloat16, requires_grad=True)
    asked = torch.arange(rows), torch.arange(rows), 1.0, policy.forbidden, fit.LOGIT_ROWS
    with Live():
        logp = LogProbs.apply(hidden, weight, *asked)[0].sum()
    with Live() as live:
        logp.backward()
    m = replace(fit.read_model(path), words=words, h=width)
    counted = fit.training(m, 1, 1, 1, 0, policy=True)[0]["head"]
    assert counted == pytest.approx(live.peak, rel=0.1)


@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize("branches", [[1600], [200] * 8])
def test_sharded_on_eight_gpus(checkpointing, branches):
    """All of a forward and a backward, but for images, against torch's own FSDPMemTracker, with
    fake tensors, seven fake ranks besides, and the attention of a GPU."""
    text = dict(hidden_size=512, intermediate_size=1536, num_hidden_layers=6, head_dim=64)
    text |= dict(num_attention_heads=8, num_key_value_heads=2, vocab_size=2000)
    config = Qwen3VLConfig(text_config=text, tie_word_embeddings=True)
    prompt = Prompt(0, torch.zeros(300, dtype=torch.long), torch.arange(300).expand(3, -1))
    zeros = [torch.zeros(length, dtype=torch.long) for length in branches]
    (pack,) = make_packs([Group(prompt, zeros)])
    layout = PackAttention(pack)
    layout.ragged = _ragged(pack)
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=8)
    try:
        mesh = init_device_mesh("cpu", (8,))
        half = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        with FakeTensorMode(allow_non_fake_inputs=True):
            policy = prepare_for_packs(AutoModelForImageTextToText.from_config(config)).train()
            policy.model.visual = torch.nn.Identity()  # its blocks are never gathered
            m = fit.count(policy)
            if checkpointing:
                recompute(policy)
            for part in (*blocks(policy), policy):
                fully_shard(part, mesh=mesh, mp_policy=half)
                part.set_gradient_divide_factor(1.0)
                part.set_force_sum_reduction_for_comms(True)
            asked = pack.predictors, pack.targets, 1.0, policy.forbidden, fit.LOGIT_ROWS
            policy.lm_head.asked = asked
            inputs = dict(input_ids=pack.input_ids, position_ids=pack.position_ids, layout=layout)
            for _ in range(2):  # the second time there are gradients from the start
                with FSDPMemTracker(policy) as tracker:
                    policy(**inputs, use_cache=False).logits[0].sum().backward()
    finally:
        dist.destroy_process_group()
    (peak,) = tracker.get_tracker_snapshot("peak").values()
    tokens = pack.input_ids.shape[1]
    keys = tokens + (300 * len(branches) if len(branches) > 1 else 0)
    room = 0 if checkpointing else math.inf
    moments = fit.training(m, 8, tokens, keys, room, True, images=0)
    counted = 4 * m.whole / 8 + max(sum(moment.values()) for moment in moments)
    # Norms are a CPU's here as well, see compare.
    counted += 6 * tokens * ((1 if checkpointing else 6) * (2 * m.h + m.q + m.k) + m.h)
    print(peak, counted, moments)
    assert counted == pytest.approx(peak["Total"], rel=0.1)


def test_discriminator(small, monkeypatch):
    path, policy, processor = small
    judge = AutoModelForImageTextToText.from_config(policy.config, dtype=torch.bfloat16)
    judge = prepare_for_packs(judge).base_model
    upcycle(judge.language_model.layers, torch.Generator())
    judge = Discriminator(judge, "learned").bfloat16().train()
    m = fit.read_model(path, experts=4, head=False)
    assert m.whole == pytest.approx(sum(p.numel() for p in judge.parameters()), rel=0.001)
    pack, tokens, keys, share = packed(processor, 2, 160, [150] * 8)
    views = torch.zeros(len(pack.members), dtype=torch.long)
    for room, layers in ((0, 0), (math.inf, 6)):
        counted = fit.activations(m, tokens, keys, room, share)
        measured = passes(judge, lambda: judge(pack, views), room, monkeypatch)
        compare(m, counted, measured, tokens, keys, layers)


@pytest.mark.parametrize("ranks", [4, 7, 8, 16])
def test_experts_are_shared_by_all_ranks(small, ranks):
    """Experts are most of a discriminator. Every rank holds what is counted, unless the ranks
    divide neither dimension of an expert, as 7 do; then none holds more."""
    path, policy, _ = small
    m = fit.read_model(path, experts=4, head=False)
    held = []
    for rank in range(ranks):
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=ranks)
        try:
            with torch.device("meta"):
                judge = AutoModelForImageTextToText.from_config(policy.config).base_model
                upcycle(judge.language_model.layers, torch.Generator())
                judge = shard(Discriminator(judge, "learned"), torch.device("cpu"))
            held.append(sum(p.to_local().numel() for p in judge.parameters()))
        finally:
            dist.destroy_process_group()
    counted = fit.share(m, m.whole, ranks)
    print(held, counted)
    assert max(held) == pytest.approx(counted, rel=0.02)
    assert ranks == 7 or min(held) == pytest.approx(counted, rel=0.02)


def test_cache(small):
    """The most that sampling holds: keys and values at their longest, and one step's logits."""
    path, policy, processor = small
    asked = prompts(processor, 2, 16)  # pixels are not counted
    length = len(asked[0].input_ids)
    m = fit.read_model(path)
    counted = fit.sampling(m, 2, length, 8, 200)
    with Live(policy) as live:
        groups = generate(policy, asked, Sampling(8, 200, max_rollout_rows=8))
    assert [len(branch) for group in groups for branch in group.branches] == [200] * 16
    print(live.peak, counted)
    assert counted["cache"] + counted["head"] == pytest.approx(live.peak, rel=0.1)


def test_states(small):
    """Weights, gradients and moments of a step in float32, on one GPU that shares with none."""
    path, policy, _ = small
    whole = AutoModelForImageTextToText.from_config(policy.config, dtype=torch.float32)
    for frozen in (False, True):
        vision_tower(whole).requires_grad_(not frozen)
        optimizer = torch.optim.AdamW(whole.parameters(), fused=True)
        for p in whole.parameters():
            p.grad = torch.zeros_like(p) if p.requires_grad else None
        optimizer.step()
        moments = [x for state in optimizer.state.values() for x in state.values()]
        config = SFTConfig(model=path, freeze_vision=frozen)
        ((_, parts), *_) = fit.phases(config, 1)
        size = lambda tensors: sum(t.numel() * t.element_size() for t in tensors)
        assert parts["weights"] == pytest.approx(size(whole.parameters()), rel=0.1)
        assert parts["optimiser"] == pytest.approx(size(moments), rel=0.1)
        ((_, four), *_) = fit.phases(config, 4)
        assert parts["optimiser"] == 4 * four["optimiser"]


# --------------------------------------------------------------------------------------------------
# The published models

VISION = dict(hidden_size=1024, depth=24, intermediate_size=4096, num_heads=16)
VISION |= dict(deepstack_visual_indexes=[5, 11, 17], patch_size=16)
LARGE = dict(hidden_size=1152, depth=27, intermediate_size=4304, num_heads=16)
LARGE |= dict(deepstack_visual_indexes=[8, 16, 24], patch_size=16)
SHAPES = {  # hidden, MLP, layers, heads, tied, vision tower
    "2B": (2048, 6144, 28, 16, True, VISION),
    "4B": (2560, 9728, 36, 32, True, VISION),
    "8B": (4096, 12288, 36, 32, False, LARGE),
}


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> dict[str, str]:
    """Size -> a directory with the config.json of Qwen3-VL-<size>-Instruct, and no weights."""
    paths = {}
    for name, (hidden, mlp, layers, heads, tied, vision) in SHAPES.items():
        text = dict(hidden_size=hidden, intermediate_size=mlp, num_hidden_layers=layers)
        text |= dict(num_attention_heads=heads, num_key_value_heads=8, head_dim=128)
        text |= dict(vocab_size=151936, tie_word_embeddings=tied)
        vision = vision | dict(out_hidden_size=hidden)
        paths[name] = str(tmp_path_factory.mktemp(name))
        config = Qwen3VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=tied)
        config.save_pretrained(paths[name])
    return paths


def test_parameters_of_the_published_models(published):
    sizes = {name: fit.read_model(path).whole for name, path in published.items()}
    # What the hub says of Qwen/Qwen3-VL-2B, 4B and 8B-Instruct.
    assert sizes == {"2B": 2_127_532_032, "4B": 4_437_815_808, "8B": 8_767_123_696}


def between(page: str, mark: str) -> str:
    """The table of a page between two comments."""
    return (ROOT / page).read_text().split(f"<!-- {mark} -->\n")[1].split(f"\n<!-- /{mark}")[0]


def test_the_table_of_the_docs(published):
    """With the published lengths, which are the defaults."""
    lines = []
    for size in ("4B", "8B"):
        ours = dict(dry_run=8, max_rollout_rows=32)
        of_policy = dict(ckpt=published[size], **ours)
        runs = [SFTConfig(model=published[size], dry_run=8)]
        runs += [AlignConfig(discriminator=published["2B"], **of_policy), RLVRConfig(**of_policy)]
        runs.append(EvalConfig(ckpt=published[size], dry_run=8))
        if size == "4B":
            warm_up = dict(model=published["2B"], dry_run=8)
            runs.insert(1, DiscriminatorConfig(policy=published["4B"], **warm_up))
        for config in runs:
            stage = config.stage
            head, rule, *rows = fit.table(config).splitlines()
            name = {"discriminator": "warm-up 2B x 4"}.get(stage, f"{stage} {size}")
            rows = [row for row in rows if "without" not in row or (stage, size) == ("sft", "4B")]
            lines += [row.replace(f"| {stage}, ", f"| {name}, ") for row in rows]
    expected = "\n".join([head, rule, *lines])
    print(expected)
    assert between("docs/gpus.md", "fit") == expected


def test_one_gpu_in_words(published):
    """What README.md and docs/gpus.md say of SFT of 4B: on one GPU, on eight, with adapters."""

    def gib(**flags) -> int:
        row = fit.table(SFTConfig(model=published["4B"], **flags)).splitlines()[2]
        return round(float(row.split(" | ")[-2]))

    one, eight, adapters = gib(dry_run=1), gib(dry_run=8), gib(dry_run=1, lora_rank=16)
    pages = [" ".join((ROOT / name).read_text().split()) for name in ("README.md", "docs/gpus.md")]
    readme, page = pages
    assert f"{one} GiB on one GPU and {eight} GiB on each of eight" in readme
    assert f"brings one GPU down to {adapters} GiB" in readme
    assert f"SFT of 4B needs {one} GiB, and {adapters} GiB with `--lora_rank 16`" in page


def test_what_the_disk_and_the_host_must_hold(published):
    """A checkpoint has 12 bytes a parameter, a result 4."""
    policy = fit.read_model(published["4B"]).whole
    two = fit.read_model(published["2B"], experts=4, head=False)
    judge = two.whole
    both = policy + judge
    gb, gib = (lambda size: f"{size / 1e9:.0f} GB"), (lambda size: f"{size / 2**30:.0f} GiB")
    # One layer: its dense MLP, the half of it that is joined, and the four experts twice.
    layer = (3 + 2 + 2 * 4 * 3) * 4 * two.h * two.i
    counted = [gib(layer), gb(12 * policy), gb(12 * both), gb(4 * policy)]
    counted += [gb(4 * both), gb(36 * policy), gb(36 * both), gb(2 * policy), gb(4 * both)]
    rows = between("docs/gpus.md", "disk").splitlines()[2:]
    assert [row.split(" | ")[1].removesuffix(" |") for row in rows] == counted


def test_operations(small):
    """Those of a forward and a backward over packed text. Attention here computes all pairs, also
    those that it masks."""
    path, policy, _ = small
    prompt = Prompt(0, torch.arange(40) % 200, torch.arange(40).expand(3, -1))
    (pack,) = make_packs([Group(prompt, [torch.arange(60) % 200] * 4)])
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        token_logprobs(policy, pack)[0].sum().backward()
    m = fit.read_model(path)
    pairs = 40 * 40 + 4 * 60 * 100
    counted = fit.operations(m, 280, pairs, 240)
    counted += 2 * 240 * m.words * m.h  # logits, which the head's backward computes again
    assert counted == pytest.approx(counter.get_total_flops(), rel=0.02)


def test_decoding(published):
    """A step reads all parameters of the language model, and what the cache of each token holds.
    So counted, vLLM on a RTX 4090 is where it was measured: 10.4 ms for Qwen3-4B and one row."""
    m = fit.read_model(published["4B"])
    config = Qwen3VLConfig.from_pretrained(published["4B"])
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    size = sum(p.numel() for p in model.model.language_model.parameters())
    assert fit.reading(m, 0) == pytest.approx(2 * size, rel=0.001)
    assert fit.reading(m, 1) - fit.reading(m, 0) == 36 * 2 * 8 * 128 * 2
    vllm = fit.Speed(bytes=0.85 * 1.008e12, kernels=12)
    assert fit.decoding(m, 640, vllm) == pytest.approx(0.0104, rel=0.05)


def test_a_gpu_alone_waits_for_none(published):
    """Its rows are as many as those of each of two GPUs, which wait for each other."""
    config = SFTConfig(model=published["4B"])
    policy, _ = fit.models(config)
    one, two = (fit.seconds(config, policy, None, n, 1000, fit.Speed())["update"] for n in (1, 2))
    assert one == pytest.approx((1 - fit.DEALT[2]) * two)


def test_the_hours_of_the_docs(published, monkeypatch):
    """What benchmarks/gpu.py prints by count, of two sizes."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import gpu

    four, eight = (gpu.stages(published, size, "2B") for size in ("4B", "8B"))
    expected = fit.hours(four | eight, 8, fit.Speed())
    print(expected)
    assert between("docs/gpus.md", "hours") == expected
    rows = [row.strip("| ").split(" | ") for row in expected.splitlines()[2:]]
    for size, name in (("4B", "sft 4B"), ("8B", "sft 8B")):
        parts = (name, "warm-up 2B x 4", f"align {size}", f"rlvr {size}, grpo")
        ends = [row[4].replace(",", "").split(" to ") for row in rows if row[0] in parts]
        low, high = (sum(map(float, end)) for end in zip(*ends))
        said = f"{size} takes {low:.0f} to {high:.0f} GPU-hours"
        assert said in " ".join((ROOT / "docs/gpus.md").read_text().split()), said
    align = {"align 4B": four["align 4B"]}
    assert "| hours on 1 GPU |" in fit.hours(align, 1, fit.Speed())
    half, whole = (fit.hours(align, gpus, fit.Speed()).splitlines()[2] for gpus in (4, 8))
    assert half.split(" | ")[:4] == whole.split(" | ")[:4]


def test_the_engines_of_the_docs(published):
    """A step of GRPO with this sampler, and with the kernels of vLLM and all rows at once."""
    lines = between("docs/performance.md", "engines").splitlines()[:2]
    for size in ("4B", "8B"):
        config = RLVRConfig(ckpt=published[size])
        for name, kernels, rows in (("this sampler", fit.Speed.kernels, 32), ("vLLM", 12, 64)):
            config.max_rollout_rows, speed = rows, fit.Speed(kernels=kernels)
            models = fit.models(config)
            ends = [fit.seconds(config, *models, 8, r, speed) for r in fit.MEAN_RESPONSES]
            cells = [name, size, kernels, rows]
            cells += [" to ".join(f"{end['rollout']:.0f}" for end in ends)]
            cells += [" to ".join(f"{sum(end.values()):.0f}" for end in ends)]
            lines.append("| " + " | ".join(map(str, cells)) + " |")
    expected = "\n".join(lines)
    print(expected)
    assert between("docs/performance.md", "engines") == expected


def test_other_families(tmp_path):
    """Whose configurations name the sizes of their vision towers otherwise."""
    text = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, vocab_size=300)
    text |= dict(num_attention_heads=4, num_key_value_heads=2)
    qwen2 = dict(embed_dim=32, depth=3, num_heads=2, hidden_size=64, patch_size=14, mlp_ratio=2)
    intern = dict(hidden_size=32, num_hidden_layers=3, num_attention_heads=2, patch_size=[14, 14])
    intern |= dict(intermediate_size=64, image_size=[28, 28])
    for kind, vision, pixels in ((Qwen2VLConfig, qwen2, 1176), (InternVLConfig, intern, 588)):
        path = tmp_path / kind.model_type
        kind(text_config=text, vision_config=vision).save_pretrained(path)
        m = fit.read_model(str(path))
        assert m.vision == fit.Vision(h=32, i=64, layers=3, mergers=1, pixels=pixels, patches=4)
        for config in (SFTConfig(model=str(path), dry_run=8), AlignConfig(ckpt=str(path))):
            config.dry_run, config.discriminator = 8, str(path)
            assert "| yes |" in fit.table(config)


def test_a_model_is_built_once_for_both_tables(small, monkeypatch):
    path, *_ = small
    built, build = [], AutoModelForImageTextToText.from_config
    monkeypatch.setattr(
        AutoModelForImageTextToText, "from_config", lambda c: built.append(c) or build(c)
    )
    fit.read_model.cache_clear()
    fit.answer(AlignConfig(ckpt=str(path), discriminator=str(path), dry_run=2, lora_rank=4))
    assert len(built) == 2


def test_what_a_stage_refuses_has_no_count(tmp_path):
    """The line is that of the stage. What cannot be counted is one line as well."""
    Gemma3Config().save_pretrained(tmp_path / "gemma")
    Blip2Config().save_pretrained(tmp_path / "blip")
    said = fails("sft.py", "--model", tmp_path / "gemma", "--dry_run", 8)
    expected = f"{tmp_path / 'gemma'}: the layers of gemma3 have full_attention, sliding_attention;"
    assert said.startswith(f"error: {expected} only full_attention")
    with torch.device("meta"), pytest.raises(UserError, match="have full_attention, sliding"):
        prepare_for_packs(AutoModelForImageTextToText.from_config(Gemma3Config()))
    said = fails("sft.py", "--model", tmp_path / "blip", "--dry_run", 8)
    assert said.startswith(f"error: --dry_run: cannot count the memory of {tmp_path / 'blip'}, a b")


@pytest.mark.parametrize("script", ["align.py", "eval.py"])
def test_a_dry_run_reads_a_configuration_and_writes_nothing(small, script, tmp_path):
    path, *_ = small
    flag = "--model" if script == "sft.py" else "--ckpt"
    more = ("--discriminator", path) if script == "align.py" else ()
    out = tmp_path / "out"
    done = launch(script, flag, path, *more, "--dry_run", 2, "--output_dir", out)
    assert done.stdout.startswith("| GiB a GPU | weights |") and "yes" in done.stdout
    assert ("| align | 500 |" in done.stdout) == ("GPU-hours" in done.stdout) == (script[0] == "a")
    assert not out.exists()
