"""HPM, the reference defence: a distance-based re-classifier with hybrid prototypes.

References:
    Sensitivity as a Double-Edged Sword (Wang, 2026), arXiv:2606.01746, section 3.6, Eqs. 14-18.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from msa_eval.defense.architectures import Classifier
from msa_eval.defense.exchange import Exchange
from msa_eval.device import in_float64

Assignment = Literal["ste", "soft", "frozen"]
"""How features are assigned to classes: the hard forward with its straight-through gradient, the softmax in
both directions, or the hard forward held constant."""

EPSILON = 1e-6
"""ε of Eq. 16."""


@dataclass(frozen=True)
class Variant:
    """Which parts of HPM are in place; the defaults are the paper's defence, the others its ablations (section 4.4).

    Attributes:
        prototypes: ``hybrid`` mixes dataset and batch prototypes. ``batch`` has no dataset prototypes (the paper's
            CEst removed); the batch prototypes take their place in the mixer, which the paper leaves open.
            ``global`` classifies by the dataset prototypes alone, without a mixer (a plain class-mean head).
        mixer: ``linear`` is Eq. 17, ``average`` the plain mean of both prototypes (PMixer removed).
        similarity: ``l2`` is Eq. 18, ``inner`` the inner product (DistDeci removed), ``cosine`` the inner product of
            normalised vectors (DNC with one centroid a class, when ``prototypes`` is ``global``: the dataset prototypes
            are then means of normalised features; DNC's layer normalisation before that is left out).
    """

    prototypes: Literal["hybrid", "batch", "global"] = "hybrid"
    mixer: Literal["linear", "average"] = "linear"
    similarity: Literal["l2", "inner", "cosine"] = "l2"

    def __post_init__(self) -> None:
        for name, choices in (
            ("prototypes", ("hybrid", "batch", "global")),
            ("mixer", ("linear", "average")),
            ("similarity", ("l2", "inner", "cosine")),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(f"expected {name} to be one of {', '.join(choices)}, but got {getattr(self, name)!r}")


def assign(fc_logits: Tensor, assignment: Assignment, *, temperature: float = 1.0) -> Tensor:
    """Assign each row to the classes (Eq. 15).

    The forward value of the straight-through form ``P_soft + stopgrad(P_hard - P_soft)`` is exactly ``P_hard``, in
    float32 too: ``p + (1 - p)`` rounds to 1.

    Args:
        fc_logits: ``(..., k)``.
        assignment: see `Assignment`.
        temperature: divides the logits of the softmax; 1 in the paper.

    Returns:
        ``(..., k)``, rows summing to 1.

    Raises:
        ValueError: when the assignment is unknown.

    >>> assign(torch.tensor([[0.0, 3.0]]), "ste")
    tensor([[0., 1.]])
    """
    if assignment not in get_args(Assignment):
        raise ValueError(f"expected assignment to be one of {', '.join(get_args(Assignment))}, but got {assignment!r}")
    if assignment == "soft":
        return torch.softmax(fc_logits / temperature, dim=-1)
    hard = torch.zeros_like(fc_logits).scatter_(-1, fc_logits.argmax(dim=-1, keepdim=True), 1.0)
    if assignment == "frozen" or not fc_logits.requires_grad:
        return hard
    soft = torch.softmax(fc_logits / temperature, dim=-1)
    return soft + (hard - soft).detach()


def similarity(z: Tensor, prototypes: Tensor, kind: str = "l2") -> Tensor:
    """Compare features with prototypes (Eq. 18).

    Args:
        z: features ``(..., B, d)``.
        prototypes: ``(..., k, d)``.
        kind: ``l2`` (the negative distance, with gradient 0 at distance 0), ``inner`` or ``cosine``.

    Returns:
        logits ``(..., B, k)``.

    >>> similarity(torch.tensor([[3.0, 4.0]]), torch.zeros(2, 2))
    tensor([[-5., -5.]])
    """
    if kind == "inner":
        return z @ prototypes.mT
    if kind == "cosine":
        return F.normalize(z, dim=-1) @ F.normalize(prototypes, dim=-1).mT
    # The matrix-product form loses half the digits where a feature lies close to its prototype.
    return -torch.cdist(z, prototypes, compute_mode="donot_use_mm_for_euclid_dist")


class HPM(nn.Module):
    """Hybrid Prototype Mixing around any trunk (paper, section 3.6).

    As a *defence* it is ``features`` followed by ``logits``, and ``logits`` looks at the whole batch.

    The paper sets "λ1 = λ2 = 0.98" but defines one λ: ``momentum`` is λ1, and λ2 is left undefined. The mixer starts
    at ``W_m = [I/2; I/2], b_m = 0``, on which the paper is silent.

    Args:
        trunk: maps images ``(B, C, H, W)`` in [0, 1] to features ``(B, d)``.
        fc: the trained head, ``d`` to ``k``. It is copied twice: one copy is fine-tuned and assigns features to
            classes, the other stays as it is and makes up the ``fc`` target.
        momentum: λ of Eq. 14, in [0, 1].
        variant: the ablation switches.

    Raises:
        ValueError: when ``momentum`` is outside [0, 1].
    """

    batch_dependent = True

    def __init__(
        self, trunk: nn.Module, fc: nn.Linear, *, momentum: float = 0.98, variant: Variant | None = None
    ) -> None:
        super().__init__()
        if not 0 <= momentum <= 1:
            raise ValueError(f"expected momentum in [0, 1], but got {momentum}")
        self.momentum = momentum
        self.variant = variant or Variant()
        self.batch_dependent = self.variant.prototypes != "global"
        self.trunk = trunk
        self.fc = copy.deepcopy(fc)
        self.fc_original = copy.deepcopy(fc).requires_grad_(False)
        dim = fc.in_features
        # skip_init, because a random start would be drawn from the global generator only to be overwritten.
        self.mixer = nn.utils.skip_init(nn.Linear, 2 * dim, dim, device=fc.weight.device)
        with torch.no_grad():
            self.mixer.weight.copy_(torch.eye(dim).repeat(1, 2) / 2)
            self.mixer.bias.zero_()
        self.prototypes: Tensor
        self.register_buffer("prototypes", torch.zeros_like(fc.weight, requires_grad=False))

    @property
    def assigns(self) -> bool:
        """Whether the FC logits assign features to classes: not in a plain head, which keeps the layer unused."""
        return self.variant.prototypes != "global"

    @property
    def fc_target(self) -> Classifier:
        """The classifier the defence was built on, as it was before fine-tuning."""
        target = Classifier(self.trunk, self.fc_original)
        target.training = self.training
        return target

    def features(self, x: Tensor) -> Tensor:
        """Map images ``(B, C, H, W)`` in [0, 1] to features ``(B, d)``."""
        z: Tensor = self.trunk(x)
        return z

    def fc_logits(self, z: Tensor) -> Tensor:
        """Map features ``(B, d)`` to the logits ``(B, k)`` of the fine-tuned FC head, which assigns the classes."""
        out: Tensor = self.fc(z)
        return out

    def batch_prototypes(self, z: Tensor, p: Tensor) -> Tensor:
        """Assigned class means of a batch (Eq. 16).

        Args:
            z: features ``(B, d)``.
            p: assignment ``(B, k)``.

        Returns:
            ``(k, d)``; the zero row for a class that nobody is assigned to.
        """
        return (p.T @ z) / (p.sum(dim=0) + EPSILON).unsqueeze(1)

    def mix(self, batch_prototypes: Tensor, classes: Tensor | None = None) -> Tensor:
        """Fuse dataset and batch prototypes into the hybrid ones (Eq. 17).

        Args:
            batch_prototypes: of all classes ``(..., k, d)``, or of one class each ``(..., d)``.
            classes: in the second case, of which ones ``(...)``.
        """
        anchor = self.prototypes if classes is None else self.prototypes[classes]
        anchor = batch_prototypes if self.variant.prototypes == "batch" else anchor.expand_as(batch_prototypes)
        if self.variant.mixer == "average":
            return (anchor + batch_prototypes) / 2
        mixed: Tensor = self.mixer(torch.cat([anchor, batch_prototypes], dim=-1))
        return mixed

    def hybrid_prototypes(self, z: Tensor, assignment: Assignment = "ste", *, temperature: float = 1.0) -> Tensor:
        """The prototypes ``(k, d)`` that a batch of features ``(B, d)`` is compared with (Eqs. 15-17)."""
        if self.variant.prototypes == "global":
            return self.prototypes
        return self.mix(self.batch_prototypes(z, assign(self.fc_logits(z), assignment, temperature=temperature)))

    def compare(self, z: Tensor, prototypes: Tensor) -> Tensor:
        """Logits ``(..., B, k)`` of features ``(..., B, d)`` against prototypes ``(..., k, d)`` (Eq. 18)."""
        return similarity(z, prototypes, self.variant.similarity)

    def logits(
        self,
        z: Tensor,
        assignment: Assignment = "ste",
        *,
        temperature: float = 1.0,
        constant_prototypes: bool = False,
    ) -> Tensor:
        """Decide a batch (Eqs. 15-18).

        Args:
            z: features ``(B, d)`` of the whole batch.
            assignment: ``ste`` and ``frozen`` have the defence's hard forward value, ``soft`` is the paper's
                Surrogate 2.
            temperature: of the softmax in the assignment.
            constant_prototypes: whether gradients stop at the hybrid prototypes.

        Returns:
            logits ``(B, k)``.
        """
        prototypes = self.hybrid_prototypes(z, assignment, temperature=temperature)
        return self.compare(z, prototypes.detach() if constant_prototypes else prototypes)

    def logits_one_at_a_time(
        self,
        z: Tensor,
        companions: Tensor | None,
        assignment: Assignment = "ste",
        *,
        temperature: float = 1.0,
        constant_prototypes: bool = False,
    ) -> Tensor:
        """Decide each row in a batch of its own, in closed form: one row out of the batch prototypes, one row in.

        Args:
            z: features ``(B, d)``.
            companions: the batch ``(B, d)`` in which row i takes the place of companion i, or each row's own
                companions ``(B, m, d)``; ``None`` for batches of one.
            assignment: as in `logits`.
            temperature: as in `logits`.
            constant_prototypes: as in `logits`.

        Returns:
            logits ``(B, k)``: row i is row i of ``logits`` on the companions with their row i replaced by ``z[i]``.
        """
        if self.variant.prototypes == "global":
            return self.compare(z, self.prototypes)
        p = assign(self.fc_logits(z), assignment, temperature=temperature)
        total, count = p.unsqueeze(2) * z.unsqueeze(1), p
        if companions is not None:
            q = assign(self.fc_logits(companions), assignment, temperature=temperature)
            if companions.ndim == 3:
                total, count = total + q.mT @ companions, count + q.sum(dim=1)
            else:
                # In float64, because a class that row i alone belongs to must come out at zero, not at a rounding
                # error over ε.
                q, others = in_float64(q), in_float64(companions)
                rest = q.T @ others - q.unsqueeze(2) * others.unsqueeze(1)
                total, count = total + rest.to(z), count + (q.sum(dim=0) - q).to(z)
        prototypes = self.mix(total / (count + EPSILON).unsqueeze(2))
        return self.compare(z.unsqueeze(1), prototypes.detach() if constant_prototypes else prototypes).squeeze(1)

    def logits_with(self, z: Tensor, staying: Tensor, offered: Tensor) -> Tensor:
        """Decide rows in batches that differ in one row, in closed form and by the hard forward.

        The offered row changes the prototype of one class, so each batch costs a distance.

        Args:
            z: the rows to decide ``(n, 1, d)``, which are among those that stay, or ``(n, w, d)``: the offered ones.
            staying: all but one of n batches' rows ``(n, B - 1, d)``.
            offered: what may take the place left in each ``(n, w, d)``.

        Returns:
            logits ``(n, w, k)``.
        """
        wide = (*offered.shape[:2], self.prototypes.shape[0])
        if self.variant.prototypes == "global":
            return self.compare(z, self.prototypes).expand(wide)
        p = assign(self.fc_logits(staying), "frozen")
        total, count = p.mT @ staying, p.sum(dim=1)
        logits = self.compare(z, self.mix(total / (count + EPSILON).unsqueeze(2))).expand(wide)
        joined = self.fc_logits(offered).argmax(dim=2)
        total = total.gather(1, joined.unsqueeze(2).expand_as(offered)) + offered
        moved = self.mix(total / (count.gather(1, joined) + 1 + EPSILON).unsqueeze(2), joined)
        changed = self.compare(z.unsqueeze(2), moved.unsqueeze(2)).squeeze(2)
        return logits.scatter(2, joined.unsqueeze(2), changed)

    def exchange(self) -> Exchange | None:
        """The decision as mixtures of points need it; ``None`` where it looks at no batch."""
        if self.variant.prototypes == "global":
            return None
        with torch.no_grad():
            zero = torch.zeros_like(self.prototypes)
            anchor = self.mix(zero).double()
            unit = torch.eye(zero.shape[1], dtype=torch.float64, device=zero.device)
            if self.variant.mixer == "average":
                matrix = unit if self.variant.prototypes == "batch" else unit / 2
            else:
                dataset, batch = self.mixer.weight.double().chunk(2, dim=1)
                matrix = dataset + batch if self.variant.prototypes == "batch" else batch
        return Exchange(anchor, matrix, self.variant.similarity, EPSILON, self.fc_logits)

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """Map a batch of images to logits ``(B, k)``; in training mode labels also move the dataset prototypes.

        Args:
            x: images ``(B, C, H, W)`` in [0, 1].
            y: labels ``(B,)``, used in training mode only.
        """
        z = self.features(x)
        if self.training and y is not None:
            self.update_prototypes(z.detach(), y)
        return self.logits(z)

    @torch.no_grad()
    def update_prototypes(self, z: Tensor, y: Tensor) -> None:
        """Move the dataset prototypes of the classes present towards the batch's labelled class means (Eq. 14).

        The paper is silent on absent classes; their prototypes stay, where a decay towards zero would be a bug.

        Args:
            z: features ``(B, d)``.
            y: labels ``(B,)``.
        """
        means, present = self._labelled_means(z, y)
        moved = self.momentum * self.prototypes + (1 - self.momentum) * means
        self.prototypes.copy_(torch.where(present.unsqueeze(1), moved, self.prototypes))

    @torch.no_grad()
    def start_prototypes(self, z: Tensor, y: Tensor) -> None:
        """Set the dataset prototypes to class means (the paper doesn't say where they start).

        Args:
            z: clean features ``(N, d)`` of the training set.
            y: labels ``(N,)``.

        Raises:
            ValueError: when a class has no sample.
        """
        means, present = self._labelled_means(z, y)
        if not bool(present.all()):
            absent = ", ".join(str(c) for c in (~present).nonzero().flatten().tolist()[:10])
            raise ValueError(f"expected training samples of every class, but there are none of class {absent}")
        self.prototypes.copy_(means)

    def _labelled_means(self, z: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Class means of what is compared with them: of normalised features in a plain cosine head."""
        plain = self.variant.prototypes == "global" and self.variant.similarity == "cosine"
        return class_means(F.normalize(z, dim=-1) if plain else z, y, self.prototypes.shape[0])


def class_means(z: Tensor, y: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """Labelled class means ``(k, d)`` of features ``(B, d)``, and which classes are present ``(k,)``.

    >>> class_means(torch.tensor([[2.0], [4.0]]), torch.tensor([1, 1]), 2)
    (tensor([[0.],
            [3.]]), tensor([False,  True]))
    """
    one_hot = F.one_hot(y, num_classes).to(z)
    count = one_hot.sum(dim=0)
    return (one_hot.T @ z) / count.clamp(min=1).unsqueeze(1), count > 0
