"""The discriminator: a mixture of experts that scores perception and reasoning apart (PRISM, section on the MoE
discriminator), and its warm-up on pairs, which is what running this file does.

    D_k(x, y) = w_k . h(x, view_k(y))         k = perception: the caption block; k = reasoning: think and answer blocks
    L_pair = sum_k - log sigmoid( D_k(x, y+) - D_k(x, y-) )                                Bradley-Terry, y+ against y-
    L_D    = L_pair + 0.001 * mean of the squared scores + 0.01 * L_balance
    L_balance = E * sum_e f_e P_e             f_e: share of choices that fall on expert e, P_e: its mean router probability

h is the last hidden state, read at the view's last token, of a vision-language model whose dense MLPs were turned into
experts ("sparse upcycling"): each of the 4 starts as a copy of the dense MLP plus noise of std 0.01, the router at
N(0, 0.02), and every token goes to its top 2 with weights renormalised. All else is copied.

A prompt with its 2N + 2 views is one pack (data.py): prompt and image are computed once for all views. Teacher and
student go through one function (`data.encode_views`), and equal views of a prompt are one branch, so two sides with the
same text score exactly the same. Nothing is cut: a comparison that is too long is left out whole and counted.

Where this differs from the published run, on purpose:
1. One score vector per view; the release reads both views from one. A single-headed checkpoint is loaded into both.
2. Views keep the image's rotary positions; the release drops them.
3. Prompt tokens, being computed once, enter the balance loss once a prompt and not once a view. It is taken in each pack and
   averaged by tokens: a product of two means, it is the one number here that depends on how a batch is cut.

    torchrun --nproc_per_node=8 discriminator.py --model Qwen/Qwen3-VL-2B-Instruct --data pairs.jsonl --output_dir d_out
    python discriminator.py --policy sft_out             the digits world; the policy's own responses are the students
"""

from data import (
    Example,
    Group,
    Pack,
    Prompt,
    Response,
    UserError,
    batches,
    decode,
    encode_views,
    load_data,
    make_packs,
    parse_response,
    save_processor,
    load_processor,
)

import dataclasses
import json
import math
import os
import random
import re
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from huggingface_hub import snapshot_download
from safetensors import safe_open
from tqdm import tqdm
from transformers import AutoModelForImageTextToText, Qwen3VLMoeConfig

from model import (
    adapt,
    all_sum,
    even_packs,
    full_state,
    generate,
    inputs,
    learning_rate_at,
    load_policy,
    optimizer_step,
    rank,
    read_config,
    setup,
    shard,
    world_size,
)
from run import Run, accumulate, main, parse, ratio, say

EXPERTS = ("learned", "dedicated", "dense", "text")
PERCEPTION, REASONING = 0, 1


# --------------------------------------------------------------------------------------------------------------------
# Experts


class Experts(torch.nn.Module):
    """E gated MLPs in two tensors, named and shaped as transformers' `Qwen3VLMoeTextExperts`."""

    def __init__(self, gate_up_proj: torch.Tensor, down_proj: torch.Tensor, act_fn):
        super().__init__()
        self.gate_up_proj = torch.nn.Parameter(gate_up_proj)  # (E, 2i, h)
        self.down_proj = torch.nn.Parameter(down_proj)  # (E, h, i)
        self.act_fn = act_fn


class Router(torch.nn.Module):
    def __init__(self, weight: torch.Tensor):
        super().__init__()
        self.weight = torch.nn.Parameter(weight)  # (E, h)


class SparseMLP(torch.nn.Module):
    """A layer's experts and the router that chooses `top_k` of them for each token.

    After a forward, `probabilities` (T, E) and `chosen` (T, top_k) tell how the router decided. Where `allowed` (T, E) is
    set, a token chooses among its allowed experts only.
    """

    def __init__(self, gate: Router, experts: Experts, top_k: int):
        super().__init__()
        self.gate, self.experts, self.top_k = gate, experts, top_k
        self.allowed = self.probabilities = self.chosen = None

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        flat = hidden.reshape(-1, hidden.shape[-1])
        logits = F.linear(flat, self.gate.weight).float()
        if self.allowed is not None:
            logits = logits.masked_fill(~self.allowed, -torch.inf)
        self.probabilities = logits.softmax(-1)
        weights, self.chosen = self.probabilities.topk(self.top_k, -1)
        weights = (weights / weights.sum(-1, keepdim=True)).to(flat.dtype)
        out = torch.zeros_like(flat)
        for e in range(
            len(self.gate.weight)
        ):  # every expert takes part in every forward, with no token if need be
            token, slot = (self.chosen == e).nonzero(as_tuple=True)
            gate, up = F.linear(flat[token], self.experts.gate_up_proj[e]).chunk(2, -1)
            mine = F.linear(self.experts.act_fn(gate) * up, self.experts.down_proj[e])
            out = out.index_add(0, token, mine * weights[token, slot, None])
        return out.view_as(hidden)


def upcycle(
    backbone,
    num_experts: int = 4,
    top_k: int = 2,
    noise_std: float = 0.01,
    router_std: float = 0.02,
    seed: int = 0,
) -> None:
    """Turns every dense MLP of the backbone's language model into experts, in place (PRISM's sparse upcycling)."""
    generator = torch.Generator().manual_seed(seed)

    def noise(like, std):
        return (
            torch.randn(like.shape, generator=generator, dtype=torch.float32).to(like.dtype) * std
        )

    for layer in backbone.language_model.layers:
        mlp = layer.mlp
        if not all(hasattr(mlp, name) for name in ("gate_proj", "up_proj", "down_proj")):
            raise UserError(
                f"upcycling needs MLPs with gate_proj, up_proj and down_proj, found {type(mlp).__name__} with "
                f"{sorted(n for n, _ in mlp.named_children())}; choose another model, or --experts dense"
            )
        gate_up = torch.cat([mlp.gate_proj.weight.data, mlp.up_proj.weight.data])
        copies = [
            (
                gate_up + noise(gate_up, noise_std),
                mlp.down_proj.weight.data + noise(mlp.down_proj.weight, noise_std),
            )
            for _ in range(num_experts)
        ]
        gate = noise(gate_up.new_empty(num_experts, gate_up.shape[1]), router_std)
        layer.mlp = SparseMLP(
            Router(gate), Experts(*map(torch.stack, zip(*copies)), mlp.act_fn), top_k
        )


# --------------------------------------------------------------------------------------------------------------------
# The model


class Discriminator(torch.nn.Module):
    """Backbone and two score heads. `kind` is one of EXPERTS: learned (the paper: a router over all experts), dedicated
    (half of the experts for each view), and the ablations dense (no experts) and text (experts, no image)."""

    def __init__(self, backbone, kind: str, dropout: float = 0.1):
        super().__init__()
        self.model, self.kind = backbone, kind
        self.dropout = torch.nn.Dropout(dropout)
        self.score = torch.nn.Linear(
            backbone.config.get_text_config().hidden_size, 2, bias=False
        )  # a row a view
        torch.nn.init.normal_(self.score.weight, std=0.02)

    @property
    def sparse(self) -> list[SparseMLP]:
        return [m for m in self.modules() if isinstance(m, SparseMLP)]

    def forward(self, pack: Pack, views: torch.Tensor) -> torch.Tensor:
        """Scores of a pack's branches, whose views are `views` (branches,): (2, branches), row 0 with dropout in the
        head while training (for the loss), row 1 without (for rewards and metrics); one forward serves both. In [-10, 10]."""
        if self.kind == "dedicated":
            owner = view_of_tokens(pack, views)
            for mlp in self.sparse:
                half = (
                    torch.arange(len(mlp.gate.weight), device=owner.device)
                    * 2
                    // len(mlp.gate.weight)
                )
                mlp.allowed = (owner[:, None] < 0) | (owner[:, None] == half)
        hidden = self.model(**inputs(self.model, pack)).last_hidden_state[0, pack.ends]
        both = torch.stack([self.score(self.dropout(hidden)), self.score(hidden)])
        return both.gather(2, views.expand(2, -1)[..., None])[..., 0].float().clamp(-10, 10)


def view_of_tokens(pack: Pack, views: torch.Tensor) -> torch.Tensor:
    """(T,): the view each token of the pack belongs to, -1 for prompts."""
    out = []
    views = iter(views.tolist())
    for segment in pack.segments:
        out.append(torch.full((segment.prompt,), -1))
        out += [torch.full((length,), next(views)) for length in segment.branches]
    return torch.cat(out).to(pack.input_ids.device)


def balance_loss(probabilities: list[torch.Tensor], chosen: list[torch.Tensor]) -> torch.Tensor:
    """E * sum_e f_e P_e over the tokens of all layers; about top_k when balanced (as in transformers and in the paper)."""
    p, c = torch.cat(probabilities), torch.cat(chosen)
    share = F.one_hot(c, p.shape[1]).float().sum(1).mean(0)
    return p.shape[1] * (share * p.mean(0)).sum()


def pair_loss(
    teacher: torch.Tensor, student: torch.Tensor, num_pairs: int | None = None
) -> torch.Tensor:
    """Bradley-Terry: mean over pairs of -log sigmoid(D(x, y+) - D(x, y-)). Two tensors of one shape; scalar.
    `num_pairs`, the global number of pairs, replaces this batch's as denominator."""
    return -F.logsigmoid(teacher - student).sum() / (
        teacher.numel() if num_pairs is None else num_pairs
    )


def discriminator_loss(
    scores: torch.Tensor, num_pairs: int, score_l2: float = 0.001
) -> torch.Tensor:
    """scores (U, 4): teacher perception, teacher reasoning, student perception, student reasoning of U pairs.
    The pair losses of both views, summed, + score_l2 * mean square of the four scores. Denominator: `num_pairs`."""
    teacher, student = scores[:, :2], scores[:, 2:]
    return (
        pair_loss(teacher, student, num_pairs)
        + score_l2 * scores.square().mean(1).sum() / num_pairs
    )


# --------------------------------------------------------------------------------------------------------------------
# Comparisons -> packs of views -> scores


@dataclass
class Comparison:
    """A prompt, the supervision response, and what is compared with it; a student without valid format is None."""

    prompt: Prompt
    teacher: Response
    students: list[Response | None]


@dataclass
class ViewPack:
    """A pack whose branches are views; `pairs` (U, 4) are branch numbers (teacher perception, teacher reasoning, student
    perception, student reasoning), `students` (U,) number the students over all comparisons."""

    pack: Pack
    views: torch.Tensor
    pairs: torch.Tensor
    students: torch.Tensor

    def to(self, device) -> "ViewPack":
        return ViewPack(
            self.pack.to(device), self.views.to(device), self.pairs.to(device), self.students
        )


def view_packs(
    comparisons: list[Comparison], processor, max_tokens: int | None = None, text_only: bool = False
) -> list[ViewPack]:
    """All views of all comparisons in packs of at most `max_tokens` tokens. A comparison that goes on in another pack
    takes its prompt and the teacher's views along, so that every pair stands in one pack."""
    bins, used, number = [], 0, 0
    for comparison in comparisons:
        prompt = without_images(processor, comparison.prompt) if text_only else comparison.prompt
        teacher = encode_views(processor, comparison.teacher)
        part = None  # the comparison's part of the current bin: branch -> its number, and the pairs
        for student in comparison.students:
            if student is not None:
                views = encode_views(processor, student)
                keys = [(k, tuple(view.tolist())) for k, view in enumerate((*teacher, *views))]
                keys = [(k % 2, tokens) for k, tokens in keys]
                fresh = {key for key in keys if part is None or key not in part[1]}
                cost = sum(len(tokens) for _, tokens in fresh) + (
                    len(prompt.input_ids) if part is None else 0
                )
                if not bins or (max_tokens is not None and used > 0 and used + cost > max_tokens):
                    bins.append([])
                    used, part = 0, None
                    cost = len(prompt.input_ids) + sum(len(tokens) for _, tokens in set(keys))
                if part is None:
                    part = (prompt, {}, [], [])
                    bins[-1].append(part)
                for key in keys:
                    part[1].setdefault(key, len(part[1]))
                part[2].append([part[1][key] for key in keys])
                part[3].append(number)
                used += cost
            number += 1
    out = []
    for parts in bins:
        groups = [
            Group(prompt, [torch.tensor(tokens) for _, tokens in numbers])
            for prompt, numbers, _, _ in parts
        ]
        views = [view for _, numbers, _, _ in parts for view, _ in numbers]
        offset, pairs, students = 0, [], []
        for _, numbers, some, which in parts:
            pairs += [[offset + i for i in pair] for pair in some]
            students += which
            offset += len(numbers)
        out.append(
            ViewPack(
                make_packs(groups)[0],
                torch.tensor(views),
                torch.tensor(pairs),
                torch.tensor(students),
            )
        )
    return out


def without_images(processor, prompt: Prompt) -> Prompt:
    """The text-only ablation: the image's tokens and their brackets leave, the rest closes up."""
    names = ("image_token_id", "vision_start_token_id", "vision_end_token_id")
    gone = torch.tensor([getattr(processor, name) for name in names if hasattr(processor, name)])
    ids = prompt.input_ids[~torch.isin(prompt.input_ids, gone)]
    return Prompt(prompt.index, ids, torch.arange(len(ids)).expand(3, -1))


@dataclass
class Judgement:
    """What the discriminator said of M students of a batch, and what its loss was. NaN where a student had no valid format."""

    teacher: torch.Tensor  # (M, 2): perception and reasoning score of the supervision response
    student: torch.Tensor  # (M, 2)
    differs: torch.Tensor  # (M, 2): the two sides' texts are not the same
    sums: dict[str, tuple[float, float]]  # metrics, (sum, count)
    expert_tokens: (
        torch.Tensor
    )  # (layers, 2, E): choices of each expert among the tokens of each view


def judge(
    discriminator,
    comparisons: list[Comparison],
    processor,
    device,
    max_tokens: int,
    score_l2: float = 0.001,
    balance: float = 0.01,
    learn: bool = True,
) -> Judgement:
    """Scores all students against their teachers and, with `learn`, adds the gradient of L_D: one forward for both."""
    packs = view_packs(comparisons, processor, max_tokens, discriminator.kind == "text")
    members = sum(len(c.students) for c in comparisons)
    evened = even_packs([v.pack for v in packs], processor)
    none = torch.zeros(0, dtype=torch.long)
    packs = [dataclasses.replace(v, pack=p) for v, p in zip(packs, evened)]
    packs += [ViewPack(p, none, none.view(0, 4), none) for p in evened[len(packs) :]]
    num_pairs, num_tokens = all_sum(
        [sum(len(v.pairs) for v in packs), sum(v.pack.input_ids.shape[1] for v in packs)]
    ).tolist()
    teacher, student = torch.full((members, 2), torch.nan), torch.full((members, 2), torch.nan)
    differs = torch.zeros(members, 2, dtype=torch.bool)
    sparse = discriminator.sparse
    experts = torch.zeros(len(sparse), 2, len(sparse[0].gate.weight) if sparse else 0)
    loss = balance_sum = 0.0
    with torch.set_grad_enabled(learn):
        for v in packs:
            v = v.to(device)
            scores = discriminator(v.pack, v.views)
            # (2, U, 4). Not scores[:, v.pairs]: a teacher is in many pairs, and its gradient would be summed in no fixed order.
            pairs = scores.index_select(1, v.pairs.flatten()).view(2, -1, 4)
            pack_loss = discriminator_loss(pairs[0], max(num_pairs, 1), score_l2)
            if sparse:
                balanced = balance_loss(
                    [m.probabilities for m in sparse], [m.chosen for m in sparse]
                )
                share = v.pack.input_ids.shape[1] / num_tokens
                pack_loss = pack_loss + balance * share * balanced * bool(num_pairs)
                balance_sum += share * balanced.item()
                owner = view_of_tokens(v.pack, v.views)
                for layer, m in enumerate(sparse):
                    for view in (PERCEPTION, REASONING):
                        experts[layer, view] += torch.bincount(
                            m.chosen[owner == view].flatten(), minlength=experts.shape[2]
                        ).cpu()
            if learn:
                pack_loss.backward()
            loss += pack_loss.item()
            clean, pairs_cpu = pairs[1].detach().cpu(), v.pairs.cpu()
            teacher[v.students], student[v.students] = clean[:, :2], clean[:, 2:]
            differs[v.students] = pairs_cpu[:, :2] != pairs_cpu[:, 2:]
    for m in sparse:
        m.allowed = m.probabilities = m.chosen = None
    valid = ~student[:, 0].isnan()
    sums = {}
    for view, name in enumerate(("perception", "reasoning")):
        t, s, d = teacher[valid, view], student[valid, view], differs[valid, view]
        sums[f"score_teacher_{name}"] = ratio(t.sum(), len(t))
        sums[f"score_student_{name}"] = ratio(s.sum(), len(s))
        sums[f"score_gap_{name}"] = ratio((t - s).sum(), len(t))
        sums[f"pair_accuracy_{name}"] = ratio(
            (t > s)[d].sum(), d.sum()
        )  # pairs that can be told apart
    sums["discriminator_loss"] = ratio(loss, 1 / world_size() if num_pairs else 0)
    if sparse:
        sums["balance_loss"] = ratio(balance_sum, 1 / world_size())
    return Judgement(teacher, student, differs, sums, experts)


def expert_shares(judgement: Judgement) -> dict[str, list]:
    """expert_share_<view>: for each layer the share of the view's token choices that each expert took, over all ranks."""
    counts = all_sum(judgement.expert_tokens)
    shares = counts / counts.sum(-1, keepdim=True)
    return {
        f"expert_share_{name}": [[round(x, 4) for x in layer] for layer in shares[:, view].tolist()]
        for view, name in enumerate(("perception", "reasoning"))
        if counts.numel() and counts[:, view].sum() > 0
    }


# --------------------------------------------------------------------------------------------------------------------
# Hugging Face directories in and out


def load_discriminator(
    flag: str, path: str, kind: str | None = None, dropout: float = 0.1, seed: int = 0
):
    """-> (discriminator, processor). A dense vision-language model is upcycled; a discriminator, ours or the released one, is
    loaded as it is, with its score head or heads. `kind` None: what a discriminator says it is, else learned."""
    if kind not in (None, *EXPERTS):
        raise UserError(f"--experts {kind}: choose one of {', '.join(EXPERTS)}")
    config = read_config(flag, path)
    saved = getattr(config, "prism_experts", None)
    if saved and kind and saved != kind:
        raise UserError(
            f"{flag} {path}: a discriminator of --experts {saved}, not {kind}; pass that, or another directory"
        )
    kind = saved or kind or "learned"
    try:
        whole = AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32)
        processor = load_processor(path)
    except Exception as error:
        raise UserError(
            f"{flag} {path}: neither a dense vision-language model nor {Qwen3VLMoeConfig.model_type}, but "
            f"{config.model_type} ({str(error).strip().splitlines()[0][:120]})"
        ) from None
    backbone = whole.base_model
    layers = getattr(getattr(backbone, "language_model", None), "layers", None)
    if layers is None:
        raise UserError(
            f"{flag} {path}: {type(whole).__name__} has no language_model with layers to upcycle"
        )
    ready = isinstance(config, Qwen3VLMoeConfig)
    if ready and kind == "dense":
        raise UserError(
            f"{flag} {path}: holds experts already, which --experts dense has not; give a dense model"
        )
    if ready:
        for layer in layers:
            block = layer.mlp
            if not hasattr(block, "experts"):
                raise UserError(
                    f"{flag} {path}: found a dense MLP among the layers, expected experts in every one"
                )
            layer.mlp = SparseMLP(
                Router(block.gate.weight.data),
                Experts(
                    block.experts.gate_up_proj.data,
                    block.experts.down_proj.data,
                    block.experts.act_fn,
                ),
                config.text_config.num_experts_per_tok,
            )
    elif kind != "dense":
        try:
            upcycle(backbone, seed=seed)
        except UserError as error:
            raise UserError(f"{flag} {path}: {error}") from None
        if saved:  # their own: the dense class had no place for them
            for name, tensor in read_tensors(path, r"layers\.\d+\.mlp\.(gate|experts)\.").items():
                layer, _, parameter = name.rpartition("layers.")[2].partition(".")
                layers[int(layer)].get_parameter(parameter).data.copy_(tensor)
    adapt(backbone, f"{flag} {path}")
    torch.manual_seed(seed)
    discriminator = Discriminator(backbone, kind, dropout)
    heads = [
        head for head in read_tensors(path, r"score|^v_head|^value_head").values() if head.ndim == 2
    ]
    if heads:
        discriminator.score.weight.data.copy_(
            heads[0].float()
        )  # (1, h), one row for both views, or (2, h)
    else:
        say(f"{flag} {path}: has no score head yet; it starts from random numbers")
    return discriminator, processor


def read_tensors(path: str, pattern: str) -> dict[str, torch.Tensor]:
    """The tensors in the safetensors of a directory or hub id whose names match."""
    if not os.path.isdir(path):
        path = snapshot_download(path, allow_patterns=["*.safetensors"])
    found = {}
    for name in sorted(os.listdir(path)):
        if name.endswith(".safetensors"):
            with safe_open(os.path.join(path, name), "pt") as file:
                found |= {
                    key: file.get_tensor(key) for key in file.keys() if re.search(pattern, key)
                }
    return found


def save_discriminator(discriminator, processor, path: str) -> None:
    """A Hugging Face directory, with `score.weight` (2, h) beside the backbone's weights. Experts of a Qwen3-VL are written as
    `Qwen3VLMoeForConditionalGeneration` opens them. transformers has no class for other models with experts: theirs stand
    under the same names beside the rest of the dense model, and only `load_discriminator` finds them. Called by every rank."""
    state = full_state(discriminator)
    if rank() == 0:
        config = discriminator.model.config.to_dict()
        sparse = discriminator.sparse
        if sparse and config["model_type"] == "qwen3_vl":
            text = {k: v for k, v in config["text_config"].items() if k != "model_type"}
            text |= {
                "num_experts": len(sparse[0].gate.weight),
                "num_experts_per_tok": sparse[0].top_k,
                "moe_intermediate_size": sparse[0].experts.down_proj.shape[2],
                "decoder_sparse_step": 1,
                "mlp_only_layers": [],
                "router_aux_loss_coef": 0.01,
            }
            vision = {k: v for k, v in config["vision_config"].items() if k != "model_type"}
            keep = {
                k: config[k]
                for k in (
                    "image_token_id",
                    "video_token_id",
                    "vision_start_token_id",
                    "vision_end_token_id",
                )
            }
            config = Qwen3VLMoeConfig(text_config=text, vision_config=vision, **keep)
        else:
            config = type(discriminator.model.config).from_dict(config)
        config.tie_word_embeddings = config.get_text_config().tie_word_embeddings = (
            True  # it has no language head of its own
        )
        config.prism_experts = discriminator.kind
        with torch.device("meta"):
            shell = AutoModelForImageTextToText.from_config(config)
        shell.save_pretrained(path, state_dict=state)
        save_processor(processor, path)
    if world_size() > 1:
        dist.barrier()


# --------------------------------------------------------------------------------------------------------------------
# Warm-up


@dataclass
class DiscriminatorConfig:
    model: str | None = (
        None  # what is upcycled (paper: Qwen3-VL-2B-Instruct), or a discriminator; left out: the digits' base
    )
    data: str | None = None  # pairs; left out: the digits world's prompts
    policy: str | None = None  # samples the student's side (temperature 1) where the data have none
    output_dir: str = "out/discriminator"
    experts: str = "learned"  # learned (paper), dedicated, dense, text
    dropout: float = 0.1  # paper: 0.1, before the score head
    learning_rate: float = 1e-5  # paper: 1e-5
    lr_scheduler_type: str = "cosine"  # paper: cosine
    warmup_ratio: float = 0.1  # paper: 0.1
    weight_decay: float = 0.01  # paper: 0.01
    num_train_epochs: float = 1.0  # paper: 1
    max_steps: int = -1
    per_device_train_batch_size: int = 4  # paper: 4
    gradient_accumulation_steps: int = 4  # paper: 4
    max_grad_norm: float = 1.0  # paper: 1.0
    max_length: int = 8192  # paper: 8192, prompt and view
    max_image_size: int = 560  # paper: 560 px on the long side; larger ones are scaled down
    max_tokens_per_pack: int = 16384
    max_completion_length: int = 6144  # of the policy's samples
    per_device_eval_batch_size: int = 64  # prompts that the policy answers at a time
    score_l2: float = 0.001  # paper: 0.001
    router_aux_loss_coef: float = 0.01  # paper: 0.01
    validation_share: float = 0.05  # of the pairs, held out
    activation_checkpointing: bool = False
    logging_steps: int = 1
    save_steps: int = 500
    save_total_limit: int = 1
    report_to: str = "none"
    seed: int = 0
    resume: bool = False


def sample_students(
    examples: list[Example], config: DiscriminatorConfig, device, path: str
) -> None:
    """One response of the policy to each prompt without one, as the student of its pair; all pairs also go to `path`."""
    every, examples = examples, [example for example in examples if not example.student]
    policy, processor = load_policy("--policy", config.policy)
    policy = shard(policy, device)
    batch = config.per_device_eval_batch_size * world_size()
    stream = batches(
        examples, processor, batch, config.seed, 0, len(examples), (rank(), world_size())
    )
    for _ in tqdm(
        range(math.ceil(len(examples) / batch)), desc="sampling the policy", disable=rank() != 0
    ):
        rows = next(stream)
        groups = generate(
            policy, [p for _, p in rows], 1, config.max_completion_length, seed=config.seed
        )
        for (example, _), group in zip(rows, groups):
            example.student = decode(processor, group.branches[0])
    if world_size() > 1:
        parts = [None] * world_size()
        dist.all_gather_object(
            parts, [(e.index, e.student) for e in examples if e.student is not None]
        )
        for index, student in (pair for part in parts for pair in part):
            every[index].student = student
    if rank() == 0:
        with open(path, "w", encoding="utf-8") as file:
            for e in every:
                pair = {
                    "row": e.where,
                    "teacher_response": e.response,
                    "student_response": e.student,
                }
                file.write(json.dumps(pair, ensure_ascii=False) + "\n")


def compare(
    example: Example, prompt: Prompt, processor, max_length: int
) -> tuple[Comparison | None, str]:
    """A pair as a comparison, or why it cannot be one."""
    teacher, student = parse_response(example.response), parse_response(example.student)
    if teacher is None or student is None:
        return (
            None,
            f"the {'teacher' if teacher is None else 'student'}'s response breaks the format",
        )
    longest = max(
        len(view) for side in (teacher, student) for view in encode_views(processor, side)
    )
    if len(prompt.input_ids) + longest > max_length:
        return (
            None,
            f"{len(prompt.input_ids) + longest} tokens are more than --max_length {max_length}",
        )
    return Comparison(prompt, teacher, [student]), ""


def warm_up() -> None:
    import digits

    config = parse(DiscriminatorConfig, digits.SETTINGS["discriminator"])
    device = setup()
    run = Run(config, device)
    config.model, config.data = digits.fill_in(
        model=config.model, data=config.data, split="prompts"
    )
    examples = load_data(
        config.data, need=("response",) if config.policy else ("response", "student")
    )
    random.Random(config.seed).shuffle(examples)
    batch = config.per_device_train_batch_size * config.gradient_accumulation_steps * world_size()
    if config.max_steps > 0:  # no more pairs than are used
        examples = examples[: math.ceil(config.max_steps * batch / (1 - config.validation_share))]
    for index, example in enumerate(examples):
        example.index = index
    if config.policy and not all(example.student for example in examples):
        run.start()
        with run.phase("sample"):
            sample_students(
                examples, config, device, os.path.join(config.output_dir, "pairs.jsonl")
            )
    held_out = (
        max(1, round(config.validation_share * len(examples))) if config.validation_share > 0 else 0
    )
    validation, training = examples[:held_out], examples[held_out:]
    if not training:
        raise UserError(
            f"--data {config.data}: {len(examples)} pairs leave none to train on beside {held_out} held out"
        )

    discriminator, processor = load_discriminator(
        "--model", config.model, config.experts, config.dropout, config.seed
    )
    if config.activation_checkpointing:
        discriminator.model.activation_checkpointing_enable()
    discriminator = shard(discriminator, device)
    optimizer = torch.optim.AdamW(
        discriminator.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay
    )
    total = math.ceil(len(training) * config.num_train_epochs) if config.max_steps <= 0 else None
    max_steps = config.max_steps if config.max_steps > 0 else math.ceil(total / batch)
    run.load({"discriminator": (discriminator, optimizer)}, {})
    save = lambda path: save_discriminator(discriminator, processor, path)  # noqa: E731

    def comparisons(step, batch_rows):
        for example, prompt in batch_rows:
            comparison, why = compare(example, prompt, processor, config.max_length)
            if comparison is None:
                run.leave_out(step, example.where, why)
            else:
                yield comparison

    stream = batches(
        training,
        processor,
        batch,
        config.seed,
        run.step,
        total,
        (rank(), world_size()),
        config.max_image_size,
    )
    discriminator.train()
    for step in run.steps(max_steps, "discriminator"):
        with run.phase("data"):
            pairs = list(comparisons(step, next(stream)))
        with run.phase("update"):
            judgement = judge(
                discriminator,
                pairs,
                processor,
                device,
                config.max_tokens_per_pack,
                config.score_l2,
                config.router_aux_loss_coef,
            )
            rate = learning_rate_at(
                step, max_steps, config.learning_rate, config.warmup_ratio, config.lr_scheduler_type
            )
            grad_norm = optimizer_step(discriminator, optimizer, rate, config.max_grad_norm)
        run.log(
            step,
            judgement.sums,
            {
                "grad_norm": grad_norm,
                "learning_rate": rate,
                "rows_left_out": run.rows_left_out(),
                **expert_shares(judgement),
            },
        )
        if step % config.save_steps == 0 and step < max_steps:
            run.save(step, save, {"discriminator": (discriminator, optimizer)}, {})

    # Held-out pairs, which the discriminator has not learned from.
    discriminator.eval()
    totals: dict[str, tuple[float, float]] = {}
    stream = batches(
        validation,
        processor,
        batch,
        config.seed,
        0,
        len(validation),
        (rank(), world_size()),
        config.max_image_size,
    )
    for _ in range(math.ceil(len(validation) / batch)):
        judgement = judge(
            discriminator,
            list(comparisons(max_steps, next(stream))),
            processor,
            device,
            config.max_tokens_per_pack,
            learn=False,
        )
        accumulate(totals, judgement.sums)
    if totals:
        held = {
            f"validation_{name}": value
            for name, value in totals.items()
            if name.startswith(("pair", "score_gap"))
        }
        compared = int(all_sum([totals["score_gap_perception"][1]])[0])
        line = run.log(
            max_steps, held, {"validation_pairs": compared, "rows_left_out": run.rows_left_out()}
        )
        say(
            "held out:",
            ", ".join(f"{name[11:]} {line[name]:.3f}" for name in held if line[name] is not None),
        )
    run.finish(save)
    say(f"saved {config.output_dir}")


if __name__ == "__main__":
    main(warm_up)
