"""The discriminator: a mixture of experts that scores perception and reasoning apart, and its
warm-up on pairs, which is what running this file does (PRISM, the MoE discriminator).

    (3)  expert_e = dense MLP + N(0, 0.01^2),  e = 1 .. 4     sparse upcycling; routers N(0, 0.02^2)
    (4)  MLP(h)  = sum over the top 2 of  p_e / (their sum) * expert_e(h),   p = softmax(W h)
    (5)  D_k(x, y) = clip(w_k . dropout(h(x, view_k(y))), -10, 10)
                     k = perception: the caption; reasoning: the rest
    (6)  L_pair  = sum_k - log sigmoid(D_k(x, y+) - D_k(x, y))      Bradley-Terry, y+ against y
    (7)  L_D     = L_pair + 0.001 * mean of the squared scores + 0.01 * L_balance
    (8)  L_balance = E * sum_e f_e P_e        f_e: share of tokens that chose e (they sum to top_k),
                                             P_e: mean router probability

h is the last hidden state at the last token of the view. Rewards are read without dropout. In
names, teacher is the supervision response y+ and student the response y compared with it. In the
game students are the policy's own rollouts. In the warm-up they stand in the data, or with
`--policy` that policy samples one a prompt. A student of broken format has no views, so it enters
no loss.

A prompt with the views of its rollouts and of its supervision response is one pack, so prompt and
image are computed once for all views. Both sides go through one function (`data.encode_views`), and
equal views of a prompt are one branch, so two sides of the same text score exactly the same (D15).
Nothing is cut.

Deviations from the published run (all are in the README, with the reasons):
D1  Each view has a score vector of its own; the release reads both views from one.
D2  Views keep the image's rotary positions; the release drops them.
D3  Prompt tokens are computed once, so they enter (8) once and not once a view. (8) is taken in
    each pack and averaged by tokens, so it depends on how a batch is cut, as do dropout's masks
    and the shares of the experts in the log.
D4  The clamp of (5) and the score penalty of (7) also act in the warm-up, the balance loss also in
    the game; the release has the first two in the game only, the last in the warm-up only.
D5  A step of the warm-up takes both views of 64 pairs; the release shuffles the 128 single-view
    comparisons apart from each other.
D13 A twentieth of the pairs is held out, so the warm-up has 1,782 steps and not 1,875.

    torchrun --nproc_per_node=8 discriminator.py --model Qwen/Qwen3-VL-2B-Instruct
    python discriminator.py                                     the embedded world of digits
"""

import math
import random
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.nn.functional as F
from transformers import Qwen3VLMoeConfig

from checkpoint import load_policy, load_pretrained, read_config, read_tensors
from checkpoint import save_processor, save_weights
from data import SYSTEM_PROMPT, Group, Pack, Prompt, Response, decode, encode_views
from data import make_packs, parse_response
from model import adapt, all_sum, even_packs, learning_rate_at
from model import model_inputs, optimizer_step, rank, shard, world_size
from rows import RowError, Unfit, UserError, load_data
from run import Count, Positive, Run, RunConfig, Schedule, Share, Weight, add, main, say
from sampler import generate

EXPERTS = ("learned", "dedicated", "dense", "text")
VIEWS = ("perception", "reasoning")


@dataclass
class DiscriminatorConfig(RunConfig):
    model: str = "Qwen/Qwen3-VL-2B-Instruct"  # what is upcycled (paper), or a discriminator
    data: list[str] = field(  # pairs of a supervision and a student response
        default_factory=lambda: [
            "hf://datasets/prism-vlm/qwen3_vl_moe_warmup_pairwise_120k/warmup_pairwise.jsonl"
        ]
    )
    policy: str | None = None  # where given, it samples the students, at temperature 1
    output_dir: str = "out/discriminator"
    system_prompt: str = SYSTEM_PROMPT  # of rows without one; or a file that holds it
    experts: str = "learned"  # learned (paper), dedicated, dense, text
    dropout: Share = 0.1  # paper: 0.1, before the score head
    learning_rate: Weight = 1e-5  # paper: 1e-5
    lr_scheduler_type: Schedule = "cosine"  # paper: cosine
    warmup_steps: Weight = 0.1  # paper: 0.1 of the run
    weight_decay: Weight = 0.01  # paper: 0.01
    num_train_epochs: Positive = 1.0  # paper: 1
    max_steps: int = -1  # where positive, in place of the epochs
    per_device_train_batch_size: Count = 2  # pairs of two comparisons; paper: 4 comparisons
    gradient_accumulation_steps: Count = 4  # paper: 4; on 8 GPUs 128 comparisons a step
    max_grad_norm: Positive = 1.0  # paper: 1.0
    max_length: Count = 8192  # paper: 8192, prompt and view
    max_image_size: Count = 560  # paper: 560 px on the long side; larger ones are scaled down
    max_completion_length: Count = 6144  # of the policy's samples
    max_rollout_rows: Count | None = 32  # rows sampled at a time, others wait; None: all
    score_l2: Weight = 0.001  # paper: 0.001, in the game (D4)
    router_aux_loss_coef: Weight = 0.01  # paper: 0.01
    validation_share: Share = 0.05  # of the pairs, held out; paper: none (D13)
    save_steps: Count = 500


# --------------------------------------------------------------------------------------------------
# Experts


class Experts(torch.nn.Module):
    """E gated MLPs in two tensors, named and shaped as in transformers' Qwen3VLMoeTextExperts."""

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
    """(4): a layer's experts and the router that chooses `top_k` of them for each token.

    After a forward, `probabilities` (T, E) and `chosen` (T, top_k) tell how the router decided, if
    they were None before. Where `allowed` (T, E) is set, a token chooses among its allowed experts.
    Takes along: Experts, Router, grouped."""

    def __init__(self, gate: Router, experts: Experts, top_k: int):
        super().__init__()
        self.gate, self.experts, self.top_k = gate, experts, top_k
        self.allowed = self.probabilities = self.chosen = None

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        flat = hidden.reshape(-1, hidden.shape[-1])
        logits = F.linear(flat, self.gate.weight).float()
        if self.allowed is not None:
            logits = logits.masked_fill(~self.allowed, -torch.inf)
        probabilities = logits.softmax(-1)
        weights, chosen = probabilities.topk(self.top_k, -1)
        if self.chosen is None:  # what is computed again for backward must not be held
            self.probabilities, self.chosen = probabilities, chosen
        weights = (weights / weights.sum(-1, keepdim=True)).to(flat.dtype)
        # The choices sorted by expert, so that each expert has a block of rows of its own. Where
        # the blocks end stays on the device, and is no reason to wait for it.
        order = chosen.flatten().argsort(stable=True)
        ends = F.one_hot(chosen, len(self.gate.weight)).sum((0, 1)).cumsum(0).int()
        mine = flat.repeat_interleave(self.top_k, 0).index_select(0, order)
        gate, up = grouped(mine, self.experts.gate_up_proj, ends).chunk(2, -1)
        mine = grouped(self.experts.act_fn(gate) * up, self.experts.down_proj, ends)
        mine = mine.index_select(0, order.argsort()).view(*chosen.shape, -1)
        return (mine * weights[..., None]).sum(1).view_as(hidden)


def grouped(rows: torch.Tensor, weight: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """rows (T, i) in E blocks, which end at `ends` (E,), each times its own weight (E, o, i)."""
    if rows.is_cuda:
        return F.grouped_mm(rows, weight.mT, offs=ends)
    blocks = rows.tensor_split(ends[:-1].long())
    return torch.cat([F.linear(block, own) for block, own in zip(blocks, weight)])


def upcycle(
    backbone,
    num_experts: int = 4,
    top_k: int = 2,
    noise_std: float = 0.01,
    router_std: float = 0.02,
    seed: int = 0,
) -> None:
    """(3): turns every dense MLP of the backbone's language model into experts, in place. Each
    expert is a copy of the dense MLP plus noise. UserError where an MLP is not gated.
    Takes along: SparseMLP, rows.UserError."""
    generator = torch.Generator().manual_seed(seed)

    def noise(like, std):
        drawn = torch.randn(like.shape, generator=generator, dtype=torch.float32)
        return drawn.to(like.dtype) * std

    for layer in backbone.language_model.layers:
        mlp = layer.mlp
        parts = [getattr(mlp, name, None) for name in ("gate_proj", "up_proj", "down_proj")]
        if not all(part is not None and part.bias is None for part in parts):
            raise UserError(
                f"upcycling needs MLPs with gate_proj, up_proj, down_proj and no biases, found "
                f"{type(mlp).__name__} with {sorted(n for n, _ in mlp.named_children())}; choose "
                f"another model, or --experts dense"
            )
        gate_up = torch.cat([mlp.gate_proj.weight.data, mlp.up_proj.weight.data])
        down = mlp.down_proj.weight.data
        copies = [
            (gate_up + noise(gate_up, noise_std), down + noise(down, noise_std))
            for _ in range(num_experts)
        ]
        gate = noise(gate_up.new_empty(num_experts, gate_up.shape[1]), router_std)
        experts = Experts(*map(torch.stack, zip(*copies)), mlp.act_fn)
        layer.mlp = SparseMLP(Router(gate), experts, top_k)


def balance_loss(probabilities, chosen) -> torch.Tensor:
    """(8) over the tokens of all layers. Of each layer (T, E) router probabilities and (T, top_k)
    chosen experts -> scalar, about top_k when balanced, as in transformers."""
    p, c = torch.cat(probabilities), torch.cat(chosen)
    share = F.one_hot(c, p.shape[1]).float().sum(1).mean(0)
    return p.shape[1] * (share * p.mean(0)).sum()


# --------------------------------------------------------------------------------------------------
# The model and its loss


class Discriminator(torch.nn.Module):
    """(5): a backbone and a score head for each view. `kind` is one of EXPERTS: learned (the
    paper: a router over all experts), dedicated (half of the experts for each view), and the
    ablations dense (no experts) and text (experts, no image).
    Takes along: SparseMLP, view_of_tokens, VIEWS, model.adapt, model.model_inputs."""

    def __init__(self, backbone, kind: str, dropout: float = 0.1):
        super().__init__()
        self.model, self.kind = backbone, kind
        self.dropout = torch.nn.Dropout(dropout)
        self.score = torch.nn.Linear(
            backbone.config.get_text_config().hidden_size, len(VIEWS), bias=False
        )
        torch.nn.init.normal_(self.score.weight, std=0.02)

    @property
    def sparse(self) -> list[SparseMLP]:
        return [m for m in self.modules() if isinstance(m, SparseMLP)]

    def forward(self, pack: Pack, views: torch.Tensor) -> torch.Tensor:
        """-> (2, B) scores in [-10, 10] of the pack's B branches, whose views are `views` (B,).
        Row 0 is for the loss, with dropout while training; row 1, without, for rewards."""
        inputs = model_inputs(self.model, pack)
        for mlp in self.sparse:
            mlp.allowed = mlp.probabilities = mlp.chosen = None
        if self.kind == "dedicated":
            owner = view_of_tokens(pack, views)
            for mlp in self.sparse:
                count = len(mlp.gate.weight)
                half = torch.arange(count, device=owner.device) * len(VIEWS) // count
                mlp.allowed = (owner[:, None] < 0) | (owner[:, None] == half)
        hidden = self.model(**inputs).last_hidden_state[0, pack.last_tokens]
        # The product in float32: rewards are differences of scores, which bfloat16 rounds away.
        wide = lambda x: x.to(torch.promote_types(x.dtype, torch.float32))
        hidden, weight = wide(hidden), wide(self.score.weight)
        both = torch.stack([F.linear(x, weight) for x in (self.dropout(hidden), hidden)])
        return both.gather(2, views.expand(2, -1)[..., None])[..., 0].float().clamp(-10, 10)


def view_of_tokens(pack: Pack, views: torch.Tensor) -> torch.Tensor:
    """(T,): the view that each token of the pack belongs to, -1 for prompts."""
    out = []
    views = iter(views.tolist())
    for segment in pack.segments:
        out.append(torch.full((segment.prompt,), -1))
        out += [torch.full((length,), next(views)) for length in segment.branches]
    return torch.cat(out).to(pack.input_ids.device)


def pair_loss(teacher: torch.Tensor, student: torch.Tensor, num_pairs: int | None = None):
    """(6), Bradley-Terry: -log sigmoid(D(x, y+) - D(x, y)). Two tensors of scores of one shape ->
    scalar, the mean over them. With `num_pairs`, the global number, their sum divided by it: of
    (U, 2) scores, both views of U pairs, that is (6)."""
    count = teacher.numel() if num_pairs is None else num_pairs
    return -F.logsigmoid(teacher - student).sum() / count


def discriminator_loss(scores: torch.Tensor, num_pairs: int, score_l2: float = 0.001):
    """(7) without the balance loss. scores (U, 4): of U pairs the supervision's perception and
    reasoning, then the student's. Both pair losses, summed, + score_l2 * the mean square of the
    four scores. Denominator: `num_pairs`. -> scalar. Takes along: pair_loss."""
    teacher, student = scores[:, :2], scores[:, 2:]
    loss = pair_loss(teacher, student, num_pairs)
    return loss + score_l2 * scores.square().mean(1).sum() / num_pairs


# --------------------------------------------------------------------------------------------------
# Comparisons -> packs of views -> scores


@dataclass
class Comparison:
    """A prompt, its supervision response, and the students that are compared with it; a student
    whose format is broken is None."""

    prompt: Prompt
    teacher: Response
    students: list[Response | None]


@dataclass
class ViewPack:
    """A pack whose B branches are views, and the U pairs that stand in it."""

    pack: Pack
    views: torch.Tensor  # (B,) the view that each branch is
    pairs: torch.Tensor  # (U, 4) branches: teacher perception, teacher reasoning, student's two
    students: torch.Tensor  # (2, U) number of the comparison, number of the student in it

    def to(self, device) -> "ViewPack":
        """A view pack with its tensors on `device`."""
        return ViewPack(**{name: value.to(device) for name, value in vars(self).items()})


def view_packs(comparisons, processor, max_tokens=None, text_only=False) -> list[ViewPack]:
    """All views of all comparisons in packs of at most `max_tokens` tokens, as many packs on every
    rank. The four views of a pair stand in one pack."""
    groups, units, numbers, kinds = [], [], [], []
    for p, comparison in enumerate(comparisons):
        teacher = encode_views(processor, comparison.teacher)
        branches, pairs, valid = {}, [], []  # branches: (view, tokens) -> its number in the group
        for n, student in enumerate(comparison.students):
            if student is not None:
                views = [tuple(v.tolist()) for v in (*teacher, *encode_views(processor, student))]
                keys = list(zip((0, 1, 0, 1), views))
                pairs.append([branches.setdefault(key, len(branches)) for key in keys])
                valid.append((p, n))
        if pairs:
            prompt = comparison.prompt
            prompt = without_images(processor, prompt) if text_only else prompt
            groups.append(Group(prompt, [torch.tensor(tokens) for _, tokens in branches]))
            units.append(pairs)
            numbers.append(valid)
            kinds.append([view for view, _ in branches])
    out = []
    for pack in even_packs(make_packs(groups, max_tokens, units), processor):
        place = {member: i for i, member in enumerate(pack.members)}
        pairs = [[place[g, i] for i in units[g][u]] for g, u in pack.units]
        views = [kinds[g][i] for g, i in pack.members]
        students = [numbers[g][u] for g, u in pack.units]
        lists = views, pairs, students
        views, pairs, students = (torch.tensor(x, dtype=torch.long) for x in lists)
        out.append(ViewPack(pack, views, pairs.view(-1, 4), students.view(-1, 2).T))
    return out


def without_images(processor, prompt: Prompt) -> Prompt:
    """The text-only ablation: the image's tokens and their brackets leave, the rest closes up."""
    names = ("image_token_id", "vision_start_token_id", "vision_end_token_id")
    gone = torch.tensor([getattr(processor, name) for name in names if hasattr(processor, name)])
    ids = prompt.input_ids[~torch.isin(prompt.input_ids, gone)]
    return Prompt(prompt.index, ids, torch.arange(len(ids)).expand(3, -1))


@dataclass
class Judgement:
    """What the discriminator said of N students each of P prompts. 0 where there is no score."""

    perception: torch.Tensor  # (P, N) scores of the students
    reasoning: torch.Tensor  # (P, N)
    valid: torch.Tensor  # (P, N) boolean: the format of the student is whole
    teacher_perception: torch.Tensor  # (P, N) scores of the supervision response, in each pair
    teacher_reasoning: torch.Tensor  # (P, N)
    length: torch.Tensor  # (2, P, N) tokens of the students' views
    means: dict[str, tuple[float, float]]  # for the log, (sum, count) of this rank
    expert_shares: dict[str, list]  # for the log, of all ranks, see expert_shares


def judge(
    discriminator,
    comparisons: list[Comparison],
    processor,
    max_tokens: int,
    score_l2: float = 0.001,
    balance_coef: float = 0.01,
    *,
    backward: bool,
) -> Judgement:
    """Scores all students against their supervision and, with `backward`, adds the gradient of
    (7). One forward serves both. Every rank calls it."""
    device = next(discriminator.parameters()).device
    packs = view_packs(comparisons, processor, max_tokens, discriminator.kind == "text")
    pairs = sum(v.pairs.shape[0] for v in packs)
    tokens = sum(v.pack.input_ids.numel() for v in packs)
    num_pairs, num_tokens = all_sum([pairs, tokens]).tolist()
    shape = len(comparisons), max((len(c.students) for c in comparisons), default=1)
    scores = torch.zeros(4, *shape)  # of each pair: the supervision's two scores, the student's
    length, valid = torch.zeros(2, *shape), torch.zeros(shape, dtype=torch.bool)
    differs = torch.zeros(2, *shape, dtype=torch.bool)  # the two sides are not the same text
    sparse = discriminator.sparse
    num_experts = len(sparse[0].gate.weight) if sparse else 0
    expert_tokens = torch.zeros(len(sparse), 2, num_experts, device=device)
    total = balance_total = torch.zeros((), device=device)
    with torch.set_grad_enabled(backward):
        for v in packs:
            v = v.to(device)
            of_branches = discriminator(v.pack, v.views)  # (2, B)
            # (U, 4) each. By index_select: a supervision view is in many pairs, and on a CPU torch
            # sums the gradient of of_branches[:, v.pairs] in no fixed order.
            four = of_branches.index_select(1, v.pairs.flatten()).view(2, -1, 4)
            with_dropout, without = four
            loss = discriminator_loss(with_dropout, max(num_pairs, 1), score_l2)
            if sparse:
                balance = balance_loss(*zip(*((m.probabilities, m.chosen) for m in sparse)))
                share = v.pack.input_ids.numel() / num_tokens
                share = share if num_pairs else 0.0  # a batch without pairs moves nothing
                loss = loss + balance_coef * share * balance
                balance_total = balance_total + share * balance.detach()
                owner = view_of_tokens(v.pack, v.views)
                of_view = torch.stack([owner == view for view in range(len(VIEWS))]).float()
                for layer, mlp in enumerate(sparse):
                    choices = F.one_hot(mlp.chosen, num_experts).sum(1)
                    expert_tokens[layer] += of_view @ choices.float()
            if backward:
                loss.backward()
            total = total + loss.detach()
            at = (slice(None), *v.students.cpu())
            scores[at] = without.detach().cpu().T
            branches = v.pairs.cpu()
            length[at] = torch.tensor(v.pack.lengths)[branches[:, 2:]].T.float()
            differs[at] = (branches[:, :2] != branches[:, 2:]).T
            valid[at[1:]] = True
    for mlp in sparse:
        mlp.allowed = mlp.probabilities = mlp.chosen = None
    means = {}
    for view, name in enumerate(VIEWS):
        t, s, d = scores[view][valid], scores[2 + view][valid], differs[view][valid]
        means[f"score_teacher_{name}"] = t.sum(), len(t)
        means[f"score_student_{name}"] = s.sum(), len(s)
        means[f"score_gap_{name}"] = (t - s).sum(), len(t)
        means[f"pair_accuracy_{name}"] = (t > s)[d].sum(), d.sum()  # pairs that can be told apart
    means["discriminator_loss"] = total.item(), 1 / world_size() if num_pairs else 0
    if sparse:
        means["balance_loss"] = balance_total.item(), 1 / world_size()
    shares = expert_shares(expert_tokens.cpu())
    return Judgement(scores[2], scores[3], valid, scores[0], scores[1], length, means, shares)


def expert_shares(chosen: torch.Tensor) -> dict[str, list]:
    """(layers, 2, E) choices of each expert among the tokens of each view, of this rank -> for each
    view and layer the share of the choices that each expert took, over all ranks."""
    counts = all_sum(chosen)
    shares = (counts / counts.sum(-1, keepdim=True)).mul(1e4).round().div(1e4)
    return {
        f"expert_share_{name}": shares[:, view].tolist()
        for view, name in enumerate(VIEWS)
        if counts.numel() and counts[:, view].sum() > 0
    }


# --------------------------------------------------------------------------------------------------
# Hugging Face directories in and out


def load_discriminator(
    flag: str, path: str, kind=None, dropout: float = 0.1, seed: int = 0, policy_processor=None
):
    """-> (discriminator, processor). A dense vision-language model is upcycled. A discriminator,
    ours or the released one, is loaded as it is, with its score head or heads. `kind` None: the
    kind that was saved with a discriminator, else learned. UserError where it cannot be loaded, or
    where prompts that `policy_processor` encodes would mean something else to it."""
    if kind not in (None, *EXPERTS):
        raise UserError(f"--experts {kind}: choose one of {', '.join(EXPERTS)}")
    config = read_config(flag, path)
    saved, ready = getattr(config, "prism_experts", None), isinstance(config, Qwen3VLMoeConfig)
    if saved and kind and saved != kind:
        raise UserError(f"{flag} {path}: a discriminator of --experts {saved}, not {kind}")
    kind = saved or kind or "learned"
    if ready and kind == "dense":
        raise UserError(f"{flag} {path}: holds experts, which --experts dense has not")
    # Where transformers has no experts for the model, they are read further down.
    no_class = saved and not ready and kind != "dense"
    head_names = r"score|^v_head|^value_head"
    unused = rf"{head_names}|language_model.*\.mlp\." if no_class else head_names
    whole, processor = load_pretrained(flag, path, config, unused)
    if policy_processor and not same_prompts(policy_processor, processor):
        raise UserError(
            f"{flag} {path}: its tokenizer or image processor is not the policy's; prompts are "
            f"encoded once for both"
        )
    backbone = adapt(whole, f"{flag} {path}").base_model
    layers = getattr(getattr(backbone, "language_model", None), "layers", None)
    if layers is None:
        raise UserError(f"{flag} {path}: {type(whole).__name__} has no language_model with layers")
    if ready:
        for layer in layers:
            if not hasattr(layer.mlp, "experts"):
                raise UserError(
                    f"{flag} {path}: found a dense MLP, expected experts in every layer"
                )
            theirs = layer.mlp.experts
            experts = Experts(theirs.gate_up_proj.data, theirs.down_proj.data, theirs.act_fn)
            top_k = config.text_config.num_experts_per_tok
            layer.mlp = SparseMLP(Router(layer.mlp.gate.weight.data), experts, top_k)
    elif kind != "dense":
        try:
            upcycle(backbone, seed=seed)
        except UserError as error:
            raise UserError(f"{flag} {path}: {error}") from None
    if no_class:
        for name, tensor in read_tensors(path, r"layers\.\d+\.mlp\.(gate|experts)\.").items():
            layer, _, parameter = name.rpartition("layers.")[2].partition(".")
            layers[int(layer)].get_parameter(parameter).data.copy_(tensor)
    torch.manual_seed(seed)
    discriminator = Discriminator(backbone, kind, dropout)
    discriminator.saved_as = whole.saved_as
    heads = [head for head in read_tensors(path, head_names).values() if head.ndim == 2]
    if heads:  # (1, h), one row for both views, or (2, h)
        discriminator.score.weight.data.copy_(heads[0].float())
    else:
        say(f"{flag} {path}: has no score head yet; it starts from random numbers")
    return discriminator, processor


def same_prompts(ours, theirs) -> bool:
    """Whether ids and pixels of one processor mean the same to a model of the other. How large an
    image may be is no part of it, where a model takes images of any size: prompts are encoded once,
    by the policy's."""
    names = ["patch_size", "temporal_patch_size", "merge_size", "do_rescale", "rescale_factor"]
    names += ["do_normalize", "image_mean", "image_std"]
    names += [] if getattr(ours.image_processor, "merge_size", None) else ["size", "crop_size"]
    a, b = ([getattr(x.image_processor, n, None) for n in names] for x in (ours, theirs))
    return a == b and ours.tokenizer.get_vocab() == theirs.tokenizer.get_vocab()


def save_discriminator(discriminator, processor, path: str) -> None:
    """A Hugging Face directory, with `score.weight` (2, h) beside the backbone's weights. Experts
    of a Qwen3-VL are written as Qwen3VLMoeForConditionalGeneration opens them. For other models
    transformers has no class with experts: theirs stand under the same names, and only
    `load_discriminator` finds them. Every rank calls it."""
    if rank() == 0:
        config = discriminator.model.config.to_dict()
        sparse = discriminator.sparse
        if sparse and config["model_type"] == "qwen3_vl":
            text = {k: v for k, v in config["text_config"].items() if k != "model_type"} | dict(
                num_experts=len(sparse[0].gate.weight),
                num_experts_per_tok=sparse[0].top_k,
                moe_intermediate_size=sparse[0].experts.down_proj.shape[2],
                decoder_sparse_step=1,
                mlp_only_layers=[],
                router_aux_loss_coef=0.01,
            )
            vision = {k: v for k, v in config["vision_config"].items() if k != "model_type"}
            ids = {k: v for k, v in config.items() if k.endswith("_token_id")}
            config = Qwen3VLMoeConfig(text_config=text, vision_config=vision, **ids)
            config.architectures = ["Qwen3VLMoeForConditionalGeneration"]
        else:
            config = type(discriminator.model.config).from_dict(config)
        # It has no language head; tied embeddings keep transformers from asking for one.
        config.tie_word_embeddings = config.get_text_config().tie_word_embeddings = True
        config.prism_experts, config.dtype = discriminator.kind, discriminator.saved_as
        config.save_pretrained(path)
        save_processor(processor, path)
    save_weights(discriminator, path, discriminator.saved_as)


# --------------------------------------------------------------------------------------------------
# Warm-up


def warm_up() -> None:
    run = Run(DiscriminatorConfig)
    config = run.config
    need = ("response",) if config.policy else ("response", "student")
    examples = load_data(config.data, need, config.system_prompt, config.image_dir)
    order = list(range(len(examples)))
    random.Random(config.seed).shuffle(order)
    held_out = math.ceil(config.validation_share * len(examples))
    validation, training = order[:held_out], order[held_out:]
    if not training:
        raise UserError(f"--data: {len(examples)} pairs leave none beside {held_out} held out")
    given = config.policy
    policy, ours = load_policy("--policy", given, run.device, config) if given else (None, None)
    discriminator, processor = load_discriminator(
        "--model", config.model, config.experts, config.dropout, config.seed, ours
    )
    discriminator = shard(discriminator, run.device, config).train()
    decay = config.weight_decay
    optimizer = torch.optim.AdamW(discriminator.parameters(), weight_decay=decay, fused=True)

    def encode(example, prompt) -> Comparison:
        teacher = parse_response(example.response)
        students = [] if policy else [parse_response(example.student)]
        if teacher is None:
            raise RowError("the supervision response breaks the format")
        if None in students:
            raise Unfit("the student's response breaks the format")
        views = [view for side in (teacher, *students) for view in encode_views(processor, side)]
        length = len(prompt.input_ids) + max(map(len, views))
        if length > config.max_length:
            raise Unfit(f"{length} tokens are more than --max_length {config.max_length}")
        return Comparison(prompt, teacher, students)

    def compare(batch: list[Comparison], step: int, backward: bool) -> Judgement:
        """One batch through the discriminator; the policy, where there is one, answers first."""
        if policy:
            prompts = [comparison.prompt for comparison in batch]
            limits = 1, config.max_completion_length, 1.0, config.seed, step
            groups = generate(policy, prompts, *limits, config.max_rollout_rows)
            for comparison, group in zip(batch, groups):
                comparison.students = [parse_response(decode(processor, group.branches[0]))]
        scoring = config.max_tokens_per_pack, config.score_l2, config.router_aux_loss_coef
        return judge(discriminator, batch, processor, *scoring, backward=backward)

    batch_size = config.per_device_train_batch_size * config.gradient_accumulation_steps
    batch_size *= world_size()
    total = math.ceil(len(training) * config.num_train_epochs) if config.max_steps <= 0 else None
    max_steps = config.max_steps if config.max_steps > 0 else math.ceil(total / batch_size)
    rows = torch.utils.data.Subset(examples, training)
    stream = run.batches(rows, processor, encode, batch_size, total)
    modules = {"discriminator": (discriminator, optimizer)}

    save = partial(save_discriminator, discriminator, processor)
    for step in run.steps(max_steps, modules, save):
        # Pairs of a supervision response y+ and a student's y: scores (5) and the loss (7), a step.
        batch = next(stream)
        with run.phase("update"):
            judged = compare(batch, step, backward=True)
            rate = learning_rate_at(step, max_steps, config)
            grad_norm = optimizer_step(discriminator, optimizer, rate, config.max_grad_norm)
        means = judged.means | {"format_valid": (judged.valid.sum(), judged.valid.numel())}
        values = {"grad_norm": grad_norm, "learning_rate": rate, **judged.expert_shares}
        run.log(step, means, values=values)

    # Held-out pairs, which the discriminator has not learned from.
    if not held_out:
        return
    discriminator.eval()
    rows = torch.utils.data.Subset(examples, validation)
    stream = run.batches(rows, processor, encode, batch_size, len(validation), held_out=True)
    means = {}
    for _ in range(math.ceil(held_out / batch_size)):
        means = add(means, compare(next(stream), max_steps, backward=False).means)
    pairs = means["score_gap_perception"][1]
    kept = {f"validation_{k}": v for k, v in means.items() if k.startswith(("pair", "score_gap"))}
    line = run.log(max_steps, kept, sums={"validation_pairs": pairs})
    shown = [f"{k[11:]} {line[k]:.3f}" for k in kept if line[k] is not None]
    say(f"held out, {line['validation_pairs']:.0f} pairs:", ", ".join(shown))


if __name__ == "__main__":
    main(warm_up)
