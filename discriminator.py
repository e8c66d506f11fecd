"""The discriminator: a mixture of experts that scores perception and reasoning apart, and its
warm-up on pairs, which is what running this file does (PRISM, the MoE discriminator).

    (3)  expert_e = dense MLP + N(0, 0.01^2),  e = 1 .. 4     sparse upcycling; routers N(0, 0.02^2)
    (4)  MLP(h)  = sum over the top 2 of  p_e / (sum of both p) * expert_e(h),   p = softmax(W h)
    (5)  D_k(x, y) = clip(w_k . dropout(z(x, view_k(y))), -10, 10)
                     k = perception: the caption; reasoning: the rest
    (6)  L_pair  = sum_k - log sigmoid(D_k(x, y+) - D_k(x, y))      Bradley-Terry, y+ against y
    (7)  L_D     = L_pair + 0.001 * mean of the squared scores + 0.01 * L_balance
    (8)  L_balance = E * sum_e f_e P_e        f_e: share of tokens that chose e (they sum to top_k),
                                             P_e: mean router probability

h is a token's vector before the MLP of a layer, and W the layer's router. z is the backbone's last
hidden state, behind the final norm, at the last token of the view. w_k is the score vector of view
k. Rewards are read without dropout.

In names, teacher is the supervision response y+ and student the response y compared with it. In the
game the students are the policy's own rollouts. In the warm-up each prompt has one student, which
stands in the data or, with `--policy`, is sampled from that policy. A student of broken format has
no views, so it enters no loss.

A prompt stands in a pack once, behind it the views of its rollouts and of its supervision response.
So prompt and image are computed once for all views in the pack. Views that do not fit into one pack
go on in another, where the prompt is repeated. Supervision and student go through one function
(`data.encode_views`), and equal views of a prompt are one branch, so two sides of the same text
score exactly the same (D15). No response is truncated.

Deviations from the published run (all are in docs/deviations.md, with the reasons):
D1  Each view has a score vector of its own; the release reads both views from one.
D2  Views keep the image's rotary positions; the release drops them.
D3  Prompt tokens are computed once a pack, so they enter (8) once a pack and not once a view. (8)
    is taken in each pack, and packs are weighted by their tokens; tokens of blank images do not
    count. So (8) depends on how a batch is cut into packs. Dropout's masks do too, and so do the
    expert shares in the log.
D4  The clamp of (5), the score penalty of (7) and the balance loss (8) act in warm-up and game; the
    release clamps and penalises in the game only, and balances in the warm-up only.
D5  A step of the warm-up takes 64 pairs, each compared in both views: 128 comparisons. A step of
    the release takes 128 from a shuffle, so the two of a pair may fall into different steps.
D13 A twentieth of the pairs is held out, so the warm-up has 1,782 steps and not 1,875.

    torchrun --nproc_per_node=8 discriminator.py --model Qwen/Qwen3-VL-2B-Instruct
    python discriminator.py                without --model and --data: the built-in digits
"""

import math
from dataclasses import dataclass, field
from typing import ClassVar, Literal, get_args

import torch
import torch.nn.functional as F

from data import Comparison, Encoded, Group, Pack, Prompt, rank_packs
from data import decode, encode_views, load_examples, parse_response, supervision_response
from model import load_policy, model_inputs, prepare_for_packs
from probe import draw_trials, in_words, probe
from sampler import Sampling, generate
from support.ending import main
from support.errors import Unfit, UserError
from support.fields import Count, Natural, NonNegative, Positive, Share, Steps
from support.flags import RunConfig, Schedule
from support.huggingface import CPU, fill, open_discriminator, same_prompts, save_discriminator
from support.loader import hold_out, run_length
from support.metrics import Loss, Mean, Sum, add
from support.optimizer import adamw, learning_rate_at, optimizer_step
from support.ranks import all_sum, say, shard
from support.run import Run
from support.scores import VIEWS, PairTable, Routing

# learned (the paper): a router over all experts; dedicated: half of the experts for each view; the
# ablations: dense (no experts) and text (experts, but no image).
Kind = Literal["learned", "dedicated", "dense", "text"]


@dataclass
class DiscriminatorConfig(RunConfig):
    stage: ClassVar[str] = "discriminator"
    model: str = "Qwen/Qwen3-VL-2B-Instruct"  # dense model to upcycle (paper), or a discriminator
    data: list[str] = field(  # pairs of a supervision and a student response; paper: 120K
        default_factory=lambda: [
            "hf://datasets/prism-vlm/qwen3_vl_moe_warmup_pairwise_120k/warmup_pairwise.jsonl"
        ]
    )
    policy: str | None = None  # policy that samples the student responses; none: --data has them
    output_dir: str = "out/discriminator"  # directory of the run and of the discriminator
    experts: Kind = "learned"  # learned (paper); dedicated: 2 a view; dense: none; text: no image
    dropout: Share = 0.1  # dropout before the score head; paper: 0.1
    learning_rate: NonNegative = 1e-5  # peak learning rate; paper: 1e-5
    lr_scheduler_type: Schedule = "cosine"  # schedule of the learning rate; paper: cosine
    warmup_steps: NonNegative = 0.1  # warm-up steps; below 1: a share of the run; paper: 0.1
    weight_decay: NonNegative = 0.01  # AdamW's weight decay; paper: 0.01
    num_train_epochs: Positive = 1.0  # passes over the data; paper: 1
    max_steps: Steps = -1  # steps of the run; -1: as many as the epochs have
    per_device_train_batch_size: Count = 2  # pairs per rank; paper: 4 one-view comparisons, so 2
    gradient_accumulation_steps: Count = 4  # batches of each rank in one step; paper: 4
    max_grad_norm: Positive = 1.0  # gradients are clipped to this norm; paper: 1.0
    max_length: Count = 8192  # tokens of prompt + caption or reasoning; more: left out; paper: 8192
    max_image_size: Count = 560  # longer side of an image, at most, in pixels; paper: 560
    max_completion_length: Count = 6144  # longest response of --policy, in tokens
    max_rollout_rows: Count | None = 32  # responses that a rank samples at a time
    score_l2: NonNegative = 0.001  # weight of the squared scores (7); paper: 0.001, game only (D4)
    router_aux_loss_coef: NonNegative = 0.01  # weight of the load-balancing loss (8); paper: 0.01
    validation_share: Share = 0.05  # share of the pairs that is held out; paper: none (D13)
    save_steps: Count = 500  # steps between checkpoints for --resume
    lora_rank: Natural = 0  # only 0: a discriminator takes no adapters


# --------------------------------------------------------------------------------------------------
# Experts


class Experts(torch.nn.Module):
    """E gated MLPs in two tensors, named and shaped as in transformers' Qwen3VLMoeTextExperts. A
    token has h values outside an MLP and i values inside."""

    def __init__(self, gate_up_proj: torch.Tensor, down_proj: torch.Tensor, act_fn):
        super().__init__()
        self.gate_up_proj = torch.nn.Parameter(gate_up_proj)  # (E, 2i, h)
        self.down_proj = torch.nn.Parameter(down_proj)  # (E, h, i)
        self.act_fn = act_fn


class Router(torch.nn.Module):
    """The matrix W of (4), which gives a token one logit for each of E experts."""

    def __init__(self, weight: torch.Tensor):
        super().__init__()
        self.weight = torch.nn.Parameter(weight)  # (E, h)


class SparseMLP(torch.nn.Module):
    """(4): a layer's experts and the router that chooses `top_k` of them for each token.

    After a forward, `probabilities` (T, E) and `chosen` (T, top_k) hold what the router decided for
    T tokens, until `forget`. Where the boolean `allowed` (T, E) is set, a token chooses among the
    experts that it allows.
    Takes along: Experts, Router, grouped."""

    def __init__(self, gate: Router, experts: Experts, top_k: int):
        super().__init__()
        self.gate, self.experts, self.top_k = gate, experts, top_k
        self.forget()

    def forget(self) -> None:
        """Drops `allowed`, `probabilities` and `chosen`."""
        self.allowed = self.probabilities = self.chosen = None

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        flat = hidden.reshape(-1, hidden.shape[-1])
        logits = F.linear(flat, self.gate.weight).float()
        if self.allowed is not None:
            logits = logits.masked_fill(~self.allowed, -torch.inf)
        probabilities = logits.softmax(-1)
        weights, chosen = probabilities.topk(self.top_k, -1)
        # Activation checkpointing runs this forward again in backward. What is kept is from the
        # first run, from which the balance loss was computed.
        if self.chosen is None:
            self.probabilities, self.chosen = probabilities, chosen
        weights = (weights / weights.sum(-1, keepdim=True)).to(flat.dtype)
        # One row for each choice, (T * top_k, h), sorted by expert, so that each expert has a block
        # of rows. The ends of the blocks, (E,), stay on the device: the CPU need not wait for them.
        order = chosen.flatten().argsort(stable=True)
        ends = F.one_hot(chosen, len(self.gate.weight)).sum((0, 1)).cumsum(0).int()
        rows = flat.repeat_interleave(self.top_k, 0).index_select(0, order)
        gate, up = grouped(rows, self.experts.gate_up_proj, ends).chunk(2, -1)
        out = grouped(self.experts.act_fn(gate) * up, self.experts.down_proj, ends)
        # Back to the order of the tokens: (T, top_k, h).
        out = out.index_select(0, order.argsort()).view(*chosen.shape, -1)
        return (out * weights[..., None]).sum(1).view_as(hidden)


def grouped(rows: torch.Tensor, weight: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """rows (R, in) in E blocks, which end at `ends` (E,); weight (E, out, in) -> (R, out): the rows
    of block e times weight[e], transposed."""
    if rows.is_cuda:
        return F.grouped_mm(rows, weight.mT, offs=ends)
    blocks = rows.tensor_split(ends[:-1].long())
    return torch.cat([F.linear(block, own) for block, own in zip(blocks, weight)])


def upcycle(
    layers,
    generator: torch.Generator,
    num_experts: int = 4,
    top_k: int = 2,
    noise_std: float = 0.01,
    router_std: float = 0.02,
) -> None:
    """(3): turns the dense MLP of each of these layers of a language model into experts, in place.
    Each expert is a copy of the dense MLP plus noise. UserError where an MLP is not gated or has
    biases.
    Takes along: SparseMLP, support.errors.UserError."""

    def noise(like, std):
        drawn = torch.randn(like.shape, generator=generator, dtype=torch.float32)
        return drawn.to(like) * std

    for layer in layers:
        mlp = layer.mlp
        parts = [getattr(mlp, name, None) for name in ("gate_proj", "up_proj", "down_proj")]
        if not all(part is not None and part.bias is None for part in parts):
            raise UserError(
                f"upcycling needs MLPs with gate_proj, up_proj, down_proj and no biases, found "
                f"{type(mlp).__name__} with {sorted(n for n, _ in mlp.named_children())}; choose "
                f"another model, or warm this one up with discriminator.py --experts dense"
            )
        gate_up = torch.cat([mlp.gate_proj.weight.data, mlp.up_proj.weight.data])
        down = mlp.down_proj.weight.data
        gate_ups, downs = [], []
        for _ in range(num_experts):
            gate_ups.append(gate_up + noise(gate_up, noise_std))
            downs.append(down + noise(down, noise_std))
        router = noise(gate_up.new_empty(num_experts, gate_up.shape[1]), router_std)
        experts = Experts(torch.stack(gate_ups), torch.stack(downs), mlp.act_fn)
        layer.mlp = SparseMLP(Router(router), experts, top_k)


def balance_loss(probabilities, chosen) -> torch.Tensor:
    """(8). probabilities, chosen: lists with, for each layer, the router's probabilities (T, E) and
    the experts it chose (T, top_k). -> scalar, about top_k when balanced. The shares and the means
    are over the tokens of all layers together, as in transformers."""
    probabilities, chosen = torch.cat(probabilities), torch.cat(chosen)
    num_experts = probabilities.shape[1]
    share = F.one_hot(chosen, num_experts).float().sum(1).mean(0)  # f_e
    return num_experts * (share * probabilities.mean(0)).sum()


# --------------------------------------------------------------------------------------------------
# The model and its loss


class Discriminator(torch.nn.Module):
    """(5): a backbone, which is a model without its language head, and a score head, whose row k is
    the score vector of view k. `kind` is one of Kind.
    Takes along: SparseMLP, view_of_tokens, support.scores.VIEWS, model.prepare_for_packs,
    model.model_inputs."""

    def __init__(self, backbone, kind: str, dropout: float = 0.1):
        super().__init__()
        self.model, self.kind = backbone, kind
        self.dropout = torch.nn.Dropout(dropout)
        width = backbone.config.get_text_config().hidden_size
        self.score = torch.nn.Linear(width, len(VIEWS), bias=False)
        torch.nn.init.normal_(self.score.weight, std=0.02)

    @property
    def sparse_mlps(self) -> list[SparseMLP]:
        """The layers' SparseMLPs, in order; a dense discriminator has none."""
        return [m for m in self.modules() if isinstance(m, SparseMLP)]

    def forward(self, pack: Pack, views: torch.Tensor) -> torch.Tensor:
        """The scores (5) of the pack's B branches, each in [-10, 10]. `views` (B,) says which view
        each branch is, 0 for perception and 1 for reasoning. -> (2, B). Row 0 is for the loss, with
        dropout while training; row 1 is for rewards, without dropout."""
        inputs = model_inputs(self.model, pack)
        for mlp in self.sparse_mlps:
            mlp.forget()
            if self.kind == "dedicated":
                mlp.allowed = self._own_experts(pack, views, len(mlp.gate.weight))
        hidden = self.model(**inputs).last_hidden_state[0, pack.last_tokens]
        # The product in float32: rewards are differences of scores, which bfloat16 rounds away.
        wide = torch.promote_types(hidden.dtype, torch.float32)
        hidden, weight = hidden.to(wide), self.score.weight.to(wide)
        with_dropout, without = F.linear(self.dropout(hidden), weight), F.linear(hidden, weight)
        scores = torch.stack([with_dropout, without])  # (2, B, number of views)
        # For each branch, take the score of the view that it is: (2, B).
        own = scores.gather(2, views.expand(2, -1)[..., None])[..., 0]
        return own.float().clamp(-10, 10)

    @staticmethod
    def _own_experts(pack: Pack, views: torch.Tensor, num_experts: int) -> torch.Tensor:
        """(T, E) boolean: the tokens of a view may choose among the view's own half of the experts,
        and the tokens of a prompt among all experts."""
        view_of_token = view_of_tokens(pack, views)[:, None]
        experts = torch.arange(num_experts, device=view_of_token.device)
        view_of_expert = experts * len(VIEWS) // num_experts
        is_prompt = view_of_token < 0
        return is_prompt | (view_of_token == view_of_expert)


def view_of_tokens(pack: Pack, views: torch.Tensor) -> torch.Tensor:
    """(T,): the view that each token of the pack belongs to, -1 for prompts."""
    out = []
    views = iter(views.tolist())
    for segment in pack.segments:
        out.append(torch.full((segment.prompt_length,), -1))
        out += [torch.full((length,), next(views)) for length in segment.branch_lengths]
    return torch.cat(out).to(pack.input_ids.device)


def pair_loss(teacher: torch.Tensor, student: torch.Tensor, num_pairs: int | None = None):
    """(6), Bradley-Terry: the sum of -log sigmoid(teacher - student) over two tensors of one shape,
    divided by the number of elements or, where given, by `num_pairs`. -> scalar. For the mean of
    (6) over pairs pass scores (U, 2), a column for each view, and as `num_pairs` the number of
    pairs in all packs of all ranks."""
    count = teacher.numel() if num_pairs is None else num_pairs
    return -F.logsigmoid(teacher - student).sum() / count


def discriminator_loss(scores: torch.Tensor, num_pairs: int, score_l2: float = 0.001):
    """(7) without the balance loss: both pair losses, summed, + score_l2 * the mean square of the
    four scores. scores (U, 4) has a row for each of U pairs. It holds the perception and the
    reasoning score of the supervision response, then those of the student. The sum over pairs is
    divided by `num_pairs`. -> scalar. Takes along: pair_loss."""
    teacher, student = scores[:, :2], scores[:, 2:]
    loss = pair_loss(teacher, student, num_pairs)
    return loss + score_l2 * scores.square().mean(1).sum() / num_pairs


# --------------------------------------------------------------------------------------------------
# Comparisons -> packs of views -> scores


@dataclass
class ViewPack:
    """A pack whose B branches are views, and the U pairs that stand in it."""

    pack: Pack
    views: torch.Tensor  # (B,) the view that each branch is
    pairs: torch.Tensor  # (U, 4) branches: teacher perception, teacher reasoning, student's two
    numbers: torch.Tensor  # (U, 2) of each pair, which comparison, and which student of it

    def to(self, device) -> "ViewPack":
        """A view pack with its tensors on `device`."""
        return ViewPack(**{name: value.to(device) for name, value in vars(self).items()})


def view_packs(comparisons, processor, max_tokens=None, text_only=False) -> list[ViewPack]:
    """All views of all comparisons in packs of at most `max_tokens` tokens. All ranks get the same
    number of packs. The four views of a pair stand in one pack. Every rank calls it."""
    groups: list[Group] = []  # a prompt with all its views
    pairs_of, numbers_of = [], []  # of each group, in the order of its pairs
    views_of = []  # of each group, in the order of its branches
    for number, comparison in enumerate(comparisons):
        teacher = encode_views(processor, comparison.teacher)
        branches: dict[tuple, int] = {}  # (view, its tokens) -> the branch's number in the group
        pairs, numbers = [], []
        for n, student in enumerate(comparison.students):
            if student is None:
                continue
            pair = []
            for side in (teacher, encode_views(processor, student)):
                for view, tokens in enumerate(side):
                    # Equal views of a prompt are one branch.
                    key = view, tuple(tokens.tolist())
                    pair.append(branches.setdefault(key, len(branches)))
            pairs.append(pair)
            numbers.append((number, n))
        if pairs:
            prompt = comparison.prompt
            prompt = without_images(processor, prompt) if text_only else prompt
            groups.append(Group(prompt, [torch.tensor(tokens) for _, tokens in branches]))
            pairs_of.append(pairs)
            numbers_of.append(numbers)
            views_of.append([view for view, _ in branches])

    out = []
    for pack in rank_packs(groups, processor, max_tokens, units=pairs_of):
        # From (group, branch) to the branch's number in the pack.
        place = {member: i for i, member in enumerate(pack.members)}
        views = [views_of[g][branch] for g, branch in pack.members]
        pairs, numbers = [], []
        # The units of a pack are its pairs: u is the number of a pair in group g.
        for g, u in pack.units:
            pairs.append([place[g, branch] for branch in pairs_of[g][u]])
            numbers.append(numbers_of[g][u])
        out.append(
            ViewPack(
                pack=pack,
                views=torch.tensor(views, dtype=torch.long),
                pairs=torch.tensor(pairs, dtype=torch.long).view(-1, 4),
                numbers=torch.tensor(numbers, dtype=torch.long).view(-1, 2),
            )
        )
    return out


def without_images(processor, prompt: Prompt) -> Prompt:
    """The prompt of the text-only ablation: without the image's tokens and their brackets, with
    positions counted anew."""
    names = ("image_token_id", "vision_start_token_id", "vision_end_token_id")
    gone = torch.tensor([getattr(processor, name) for name in names if hasattr(processor, name)])
    ids = prompt.input_ids[~torch.isin(prompt.input_ids, gone)]
    return Prompt(prompt.index, ids, torch.arange(len(ids)).expand(3, -1))


@dataclass
class Judgement:
    """The discriminator's scores for P prompts with N students each. Where a student is None, its
    scores and lengths are 0."""

    perception: torch.Tensor  # (P, N) scores of the students
    reasoning: torch.Tensor  # (P, N)
    valid: torch.Tensor  # (P, N) boolean: the format of the student is whole
    teacher_perception: torch.Tensor  # (P, N) scores of the supervision response, in each pair
    teacher_reasoning: torch.Tensor  # (P, N)
    perception_length: torch.Tensor  # (P, N) tokens of the students' views
    reasoning_length: torch.Tensor  # (P, N)
    metrics: dict  # for the log


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
    """Scores all students against their supervision and, with `backward`, adds the gradient of the
    discriminator's loss (7). One forward serves both. Every rank calls it."""
    device = next(discriminator.parameters()).device
    text_only = discriminator.kind == "text"
    packs = view_packs(comparisons, processor, max_tokens, text_only=text_only)
    # The denominators over all ranks: the pairs for (7), the real tokens for (8). Tokens of a blank
    # image are not real. `rank_packs` adds such images, so that sharded ranks stay in step.
    pairs = sum(len(view_pack.pairs) for view_pack in packs)
    tokens = sum(len(view_pack.pack.real_tokens) for view_pack in packs)
    num_pairs, num_tokens = all_sum([pairs, tokens]).tolist()

    # The tables that the scores (P, N) and the choices of experts go into.
    most = max((len(comparison.students) for comparison in comparisons), default=1)
    table = PairTable.empty(len(comparisons), most)
    routing = Routing(discriminator.sparse_mlps, device)
    loss_total = balance_total = torch.zeros((), device=device)
    with torch.set_grad_enabled(backward):
        for view_pack in packs:
            view_pack = view_pack.to(device)
            # Scores (5) of every branch, then of every pair: (U, 4).
            with_dropout, without = discriminator(view_pack.pack, view_pack.views)
            scores = of_pairs(with_dropout, view_pack.pairs)
            # The loss (7), this pack's share of it.
            loss = discriminator_loss(scores, max(num_pairs, 1), score_l2)
            # The balance loss (8) of the real tokens, weighted by this pack's share of them.
            real = view_pack.pack.real_tokens
            if discriminator.sparse_mlps and len(real):
                balance = balance_loss(
                    [mlp.probabilities.index_select(0, real) for mlp in discriminator.sparse_mlps],
                    [mlp.chosen.index_select(0, real) for mlp in discriminator.sparse_mlps],
                )
                share = len(real) / num_tokens
                loss = loss + balance_coef * share * balance
                balance_total = balance_total + share * balance.detach()
                routing.count(view_of_tokens(view_pack.pack, view_pack.views))
            if backward:
                loss.backward()
            loss_total = loss_total + loss.detach()
            # Rewards are read without dropout.
            table.fill(view_pack, of_pairs(without.detach(), view_pack.pairs))
    for mlp in discriminator.sparse_mlps:
        mlp.forget()

    metrics = table.metrics()
    metrics["discriminator_loss"] = Loss(loss_total.item(), updates=1 if num_pairs else 0)
    if discriminator.sparse_mlps:
        metrics["balance_loss"] = Loss(balance_total.item())
    return Judgement(
        perception=table.student[0],
        reasoning=table.student[1],
        valid=table.valid,
        teacher_perception=table.teacher[0],
        teacher_reasoning=table.teacher[1],
        perception_length=table.length[0],
        reasoning_length=table.length[1],
        metrics=metrics | routing.shares(),
    )


def of_pairs(scores: torch.Tensor, pairs: torch.Tensor) -> torch.Tensor:
    """(B,) scores of branches -> (U, 4) scores of pairs.

    By index_select: a supervision view is in many pairs, and on a CPU torch sums the gradient of
    `scores[pairs]` in no fixed order."""
    return scores.index_select(0, pairs.flatten()).view(-1, 4)


# --------------------------------------------------------------------------------------------------
# From a directory


def load_discriminator(
    path: str, kind=None, dropout=0.1, seed=0, policy_processor=None, device=CPU, config=None
):
    """-> (discriminator, processor) from a Hugging Face directory or hub id, sharded as the flags
    in `config` say (`ranks.shard`).

    A dense vision-language model is upcycled, unless `kind` is dense. A discriminator, ours or the
    released one, is loaded as it is, with its score head or heads. Where `kind` is None, it is the
    kind that was saved with the model, or learned where none was saved.
    UserError where it cannot be loaded, or where prompts that `policy_processor` encodes would mean
    something else to it."""
    saved = open_discriminator(path, get_args(Kind))
    if saved.kind and kind and saved.kind != kind:
        raise UserError(f"{path}: was trained with --experts {saved.kind}; pass that, not {kind}")
    kind = saved.kind or kind or "learned"
    if saved.experts and kind == "dense":
        raise UserError(f"{path}: has experts; pass --experts learned, not dense")
    if policy_processor and not same_prompts(policy_processor, saved.processor):
        raise UserError(
            f"{path}: its tokenizer or image processor differs from the policy's; choose a "
            f"discriminator and a policy of one model family"
        )
    backbone = prepare_for_packs(saved.model, path).base_model
    layers = list(backbone.language_model.layers)
    if saved.experts:
        for layer, parts in zip(layers, saved.experts):
            act_fn = getattr(layer.mlp, "experts", layer.mlp).act_fn
            experts = Experts(parts["gate_up_proj"], parts["down_proj"], act_fn)
            layer.mlp = SparseMLP(Router(parts["gate"]), experts, saved.top_k)
    torch.manual_seed(seed)  # of a new score head
    discriminator = Discriminator(backbone, kind, dropout)
    discriminator.source = saved.model.source  # what a save copies besides the weights
    drawn = discriminator.score.weight
    if saved.head is None and saved.kind:
        raise UserError(
            f"{path}: has no tensor score.weight; copy the directory again, or train the "
            f"discriminator again"
        )
    if saved.head is None:
        say(f"{path}: has no score head yet; it is drawn at random")
    elif saved.head.shape not in (drawn.shape, drawn[:1].shape):
        raise UserError(
            f"{path}: its score head has shape {tuple(saved.head.shape)}, expected "
            f"{tuple(drawn.shape)}; choose another discriminator"
        )
    else:
        drawn.data.copy_(saved.head)  # (2, h); a (1, h) fills both rows
    generator = torch.Generator().manual_seed(seed)

    def prepare(block) -> None:
        """Reads and upcycles a dense layer right before it is sharded, so that no more than one
        layer is whole at a time. A model is loaded hollow: its weights are still to be read."""
        if block in layers and kind != "dense" and not saved.experts:
            prefix = f"model.language_model.layers.{layers.index(block)}.mlp."
            fill(block.mlp, path, device, prefix)
            try:
                upcycle([block], generator)
            except UserError as error:
                raise UserError(f"{path}: {error}") from None

    discriminator = shard(discriminator, device, config, prepare)
    # Read all that is still hollow. Upcycled experts and the score head stay as they are.
    return fill(discriminator, path, device), saved.processor


# --------------------------------------------------------------------------------------------------
# Warm-up


def warm_up() -> None:
    run = Run(DiscriminatorConfig)
    config = run.config
    need = ("response",) if config.policy else ("response", "student")
    starts = [config.policy, config.model] if config.policy else [config.model]
    examples = load_examples(config, need, *starts)
    training, validation = hold_out(examples, config.validation_share, config.seed)
    policy = policy_processor = None
    if config.policy:
        policy, policy_processor = load_policy(config.policy, run.device, config)
    discriminator, processor = load_discriminator(
        config.model,
        kind=config.experts,
        dropout=config.dropout,
        seed=config.seed,
        policy_processor=policy_processor,
        device=run.device,
        config=config,
    )
    discriminator.train()
    optimizer = adamw(discriminator, config.weight_decay)

    def encode(example, prompt) -> Comparison:
        """A row as one comparison; its student comes later where a policy answers. A row that is
        `Unfit` is left out, but not counted as bad."""
        teacher = supervision_response(example)
        students = [] if policy else [parse_response(example.student)]
        if None in students:
            raise Unfit("the student's response is not of the format <caption>, <think>, <answer>")
        views = [view for side in (teacher, *students) for view in encode_views(processor, side)]
        length = len(prompt.input_ids) + max(map(len, views))
        if length > config.max_length:
            raise Unfit(f"{length} tokens are more than --max_length {config.max_length}")
        return Comparison(prompt, teacher, students)

    def encoded(rows) -> Encoded:
        limits = dict(max_image_size=config.max_image_size, max_pixels=config.max_pixels)
        return Encoded(rows, processor, encode, **limits)

    sampling = Sampling(
        num_generations=1,
        max_completion_length=config.max_completion_length,
        temperature=1.0,
        seed=config.seed,
        max_rollout_rows=config.max_rollout_rows,
    )

    def answer(batch: list[Comparison], step: int) -> None:
        """The policy, where there is one, gives each comparison its student."""
        if policy is None:
            return
        groups = generate(policy, [c.prompt for c in batch], sampling, step=step)
        for comparison, group in zip(batch, groups):
            text = decode(processor, group.branches[0], policy.stop_ids)
            comparison.students = [parse_response(text)]

    scoring = dict(
        max_tokens=config.max_tokens_per_pack,
        score_l2=config.score_l2,
        balance_coef=config.router_aux_loss_coef,
    )
    batch_size, total_rows, max_steps = run_length(config, len(training))
    stream = run.batches(encoded(training), batch_size, total_rows)
    modules = {"discriminator": (discriminator, optimizer)}

    def save(path: str) -> None:
        save_discriminator(discriminator, path, examples.for_next_stage)

    # A resumed run must sample from the same policy, which its checkpoints do not hold.
    if policy:
        run.check_start(policy)
    for step in run.steps(max_steps, modules, save):
        # Draw pairs of a supervision response y+ and a student's response y.
        batch = next(stream)
        with run.phase("update"):  # the sampling by --policy is part of its time
            answer(batch, step)
            # Score both views (5), and add the gradient of the loss (7).
            judged = judge(discriminator, batch, processor, **scoring, backward=True)
            # Make one step of the optimiser.
            rate = learning_rate_at(step, max_steps, config)
            grad_norm = optimizer_step(discriminator, optimizer, rate, config.max_grad_norm)
        # Log the step, and tell the user where no student has had the format.
        metrics = {
            **judged.metrics,
            "format_valid": Mean(judged.valid.sum(), judged.valid.numel()),
            "grad_norm": grad_norm,
            "learning_rate": rate,
        }
        line = run.log(step, metrics, grad_norms=[grad_norm])
        run.look_at_format(step, line["format_valid"])

    # Judge the held-out pairs, which the discriminator has not learned from.
    if not validation:
        return
    discriminator.eval()
    stream = run.batches(encoded(validation), batch_size, len(validation), held_out=True)
    shown = [f"{kind}_{view}" for view in VIEWS for kind in ("score_gap", "pair_accuracy")]
    metrics, pairs = {}, 0
    for _ in range(math.ceil(len(validation) / batch_size)):
        batch = next(stream)
        with run.phase("validation"):
            answer(batch, max_steps)
            judged = judge(discriminator, batch, processor, **scoring, backward=False)
        metrics = add(metrics, {name: judged.metrics[name] for name in shown})
        pairs += int(judged.valid.sum())

    # Does the discriminator heed the prompt, or has it only learned the students' words?
    trials = draw_trials(
        validation, processor, limit=config.max_length, max_image_size=config.max_image_size
    )
    with run.phase("probe"):
        max_tokens = config.max_tokens_per_pack
        probed = probe(judge, discriminator, trials, processor, max_tokens=max_tokens)
    held_out = {
        **{f"validation_{name}": metrics[name] for name in shown},
        "validation_pairs": Sum(pairs),
        **probed,
    }
    line = run.log(max_steps, held_out)
    values = [(name, line[f"validation_{name}"]) for name in shown]
    values = [f"{name} {value:.3f}" for name, value in values if value is not None]
    none = "nothing measured, as none has a student's response of the right format"
    say(f"on {line['validation_pairs']} held-out pairs:", ", ".join(values) or none)
    say(in_words(line))


if __name__ == "__main__":
    main(warm_up)
