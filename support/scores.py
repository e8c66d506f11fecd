"""The discriminator's scores of one batch as tables, and the metrics that the log gets from them:
scores and pair accuracy by view, and the experts that each view chose."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from support.metrics import Mean
from support.ranks import all_sum

VIEWS = ("perception", "reasoning")


@dataclass
class PairTable:
    """Scores of P prompts with N students each. The first dimension of all but `valid` is the view;
    0 where a student has no views."""

    teacher: torch.Tensor  # (2, P, N) scores of the supervision response
    student: torch.Tensor  # (2, P, N) scores of the students
    length: torch.Tensor  # (2, P, N) tokens of the students' views
    differs: torch.Tensor  # (2, P, N) boolean: the two sides are not the same text
    valid: torch.Tensor  # (P, N) boolean

    @classmethod
    def empty(cls, prompts: int, students: int) -> "PairTable":
        shape = prompts, students
        scores = [torch.zeros(len(VIEWS), *shape) for _ in range(3)]
        differs = torch.zeros(len(VIEWS), *shape, dtype=torch.bool)
        return cls(*scores, differs, torch.zeros(shape, dtype=torch.bool))

    def fill(self, view_pack, scores: torch.Tensor) -> None:
        """Puts the (U, 4) scores of the pairs of a `discriminator.ViewPack` where they belong."""
        p, n = view_pack.numbers.cpu().T
        pairs, scores = view_pack.pairs.cpu(), scores.cpu()
        lengths = torch.tensor(view_pack.pack.lengths)
        for view in range(len(VIEWS)):
            self.teacher[view, p, n] = scores[:, view]
            self.student[view, p, n] = scores[:, len(VIEWS) + view]
            self.length[view, p, n] = lengths[pairs[:, len(VIEWS) + view]].float()
            self.differs[view, p, n] = pairs[:, view] != pairs[:, len(VIEWS) + view]
        self.valid[p, n] = True

    def metrics(self) -> dict:
        """Mean scores, their gap (the paper's figure), and the share of pairs in which the
        supervision scores higher, of those whose sides are not the same text. Where there is no
        pair, they are null (D18)."""
        out = {}
        for view, name in enumerate(VIEWS):
            teacher, student = self.teacher[view][self.valid], self.student[view][self.valid]
            differs = self.differs[view][self.valid]
            higher = (teacher > student)[differs]
            out[f"score_teacher_{name}"] = Mean(teacher.sum(), len(teacher))
            out[f"score_student_{name}"] = Mean(student.sum(), len(student))
            out[f"score_gap_{name}"] = Mean((teacher - student).sum(), len(teacher))
            out[f"pair_accuracy_{name}"] = Mean(higher.sum(), differs.sum())
        return out


class Routing:
    """Counts the experts that the tokens of each view choose. `sparse_mlps` are the
    discriminator's, a `SparseMLP` for each layer."""

    def __init__(self, sparse_mlps: list, device):
        self.sparse_mlps = sparse_mlps
        self.num_experts = len(self.sparse_mlps[0].gate.weight) if self.sparse_mlps else 0
        shape = len(self.sparse_mlps), len(VIEWS), self.num_experts
        self.chosen = torch.zeros(shape, device=device)  # (layers, 2, E)

    def count(self, view_of_token: torch.Tensor) -> None:
        """Adds the choices of the last forward. view_of_token (T,): the view that each token
        belongs to, -1 for prompts."""
        views = torch.arange(len(VIEWS), device=view_of_token.device)
        of_view = (view_of_token == views[:, None]).float()  # (2, T)
        for layer, mlp in enumerate(self.sparse_mlps):
            choices = F.one_hot(mlp.chosen, self.num_experts).sum(1).float()  # (T, E)
            self.chosen[layer] += of_view @ choices

    def shares(self) -> dict[str, list]:
        """For each view and layer the share of the choices that each expert took, over all ranks.
        Every rank calls it."""
        counts = all_sum(self.chosen.cpu())
        shares = (counts / counts.sum(-1, keepdim=True)).mul(1e4).round().div(1e4)
        return {
            f"expert_share_{name}": shares[:, view].tolist()
            for view, name in enumerate(VIEWS)
            if counts.numel() and counts[:, view].sum() > 0
        }
