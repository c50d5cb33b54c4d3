"""The analysis of a checkpoint on data: sensitivities a sample, their summary, and the models of the angles."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from typing import Literal

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from torch import Tensor

from msa_eval.attacks.apgd import apgd
from msa_eval.attacks.ball import Ball
from msa_eval.attacks.losses import ce
from msa_eval.data import Samples
from msa_eval.defense.architectures import Classifier
from msa_eval.evidence.metrics import rate
from msa_eval.hpm.model import HPM
from msa_eval.judging.batch_plan import plan_batches
from msa_eval.progress import Progress, silent
from msa_eval.sensitivity.empirical import AngleModel, empirical_cdf, fit_angles
from msa_eval.sensitivity.heads import classifier_of, features, plain_l2_head
from msa_eval.sensitivity.isotropic import isotropic_cdf
from msa_eval.sensitivity.measured import Sensitivity, sensitivity

Prototypes = Literal["hybrid", "global"]


@dataclasses.dataclass(frozen=True)
class Analysis:
    """What an analysis found.

    Attributes:
        sensitivity: of every sample to every class ``(N, k)``.
        labels: ``(N,)``.
        index: of the samples in their data set ``(N,)``.
        batch: in which each sample met its prototypes ``(N,)``.
        gamma: angle between change and FC class vectors, in radians; NaN for measured changes.
        d: dimensions of the features.
        fc: the fitted model of θ_c, or ``None`` where the angles fit none.
        l2: that of θ_d.
        misfits: why there is none.
    """

    sensitivity: Sensitivity
    labels: Tensor
    index: Tensor
    batch: Tensor
    gamma: float
    d: int
    fc: AngleModel | None
    l2: AngleModel | None
    misfits: tuple[str, ...] = ()

    @property
    def own(self) -> Tensor:
        """Which pairs ``(N, k)`` are of a sample and its own class."""
        return self.labels.unsqueeze(1) == torch.arange(self.sensitivity.s_c.shape[1])

    def samples(self) -> pd.DataFrame:
        """One row per sample: angles in degrees and sensitivities to its own class, and how the other classes compare.

        ``condition_others`` and ``more_sensitive_others`` are shares of the other classes with defined angles,
        ``s_c_others`` and ``s_d_others`` medians over them; NaN where there are none.
        """
        found, rows = self.sensitivity, torch.arange(len(self.labels))
        at = (rows, self.labels)
        known = found.known[at].numpy()
        others = found.known & ~self.own
        return pd.DataFrame({
            "index": self.index.numpy(),
            "label": self.labels.numpy(),
            "batch": self.batch.numpy(),
            "theta_c": np.degrees(found.theta_c[at].numpy()),
            "theta_d": np.degrees(found.theta_d[at].numpy()),
            "cos_gamma": found.cos_gamma[at].numpy(),
            "ratio": found.ratio[at].numpy(),
            "s_c": found.s_c[at].numpy(),
            "s_d": found.s_d[at].numpy(),
            "condition": _where_known(found.condition[at].numpy(), known),
            "more_sensitive": _where_known(found.more_sensitive[at].numpy(), known),
            "s_c_others": _median(found.s_c, others),
            "s_d_others": _median(found.s_d, others),
            "condition_others": _share(found.condition, others),
            "more_sensitive_others": _share(found.more_sensitive, others),
            "undefined": (~found.known).sum(dim=1).numpy(),
        })  # fmt: skip

    def summary(self) -> pd.DataFrame:
        """A row for pairs of samples and their ``own`` class, pairs with ``other`` classes, and ``all`` pairs.

        ``condition`` is the share of defined pairs that fulfil Eq. 8, ``more_sensitive`` the share with
        S_c >= sup S_d; own pairs, one a sample, have the Wilson 95 % interval of ``condition``. Sensitivities and
        |cos γ| are medians, angles means and standard deviations in degrees; ``mu`` and ``sigma`` are those of the fit
        before truncation. ``condition_empirical`` (Eq. 13) and ``condition_isotropic`` (Eq. 29) are what the models
        expect of all pairs.
        """
        found = self.sensitivity
        rows = []
        parts = {"own": self.own, "other": ~self.own, "all": torch.ones_like(self.own)}
        for name, chosen in parts.items():
            pairs = chosen & found.known
            n, holds = int(pairs.sum()), int(found.condition[pairs].sum())
            share = rate(holds, n)
            row: dict[str, object] = {
                "pairs": name, "n": n, "undefined": int(chosen.sum()) - n, "condition": share.value,
                "low": share.low if name == "own" else np.nan, "high": share.high if name == "own" else np.nan,
                "more_sensitive": rate(int(found.more_sensitive[pairs].sum()), n).value,
            }  # fmt: skip
            row |= {column: _middle(getattr(found, column)[pairs]) for column in ("cos_gamma", "s_c", "s_d")}
            for head, angles, model in (("c", found.theta_c, self.fc), ("d", found.theta_d, self.l2)):
                at = np.degrees(angles[pairs].numpy())
                part = None if model is None or name == "all" else getattr(model, name)
                row |= {
                    f"theta_{head}_mean": at.mean() if n else np.nan,
                    f"theta_{head}_sd": at.std() if n else np.nan,
                    f"mu_{head}": np.nan if part is None else np.degrees(part.mean),
                    f"sigma_{head}": np.nan if part is None else np.degrees(part.sd),
                }
            rows.append(row)
        expected = self.expected()
        return pd.DataFrame(rows).assign(
            condition_empirical=[np.nan, np.nan, expected["empirical"]],
            condition_isotropic=[np.nan, np.nan, expected["isotropic"]],
        )

    def expected(self) -> dict[str, float]:
        """What both models expect of Eq. 8 at this γ; NaN for measured changes, and where no model was fitted."""
        x = abs(np.cos(self.gamma))
        empirical = np.nan if self.fc is None or self.l2 is None else float(empirical_cdf(x, self.fc, self.l2))
        return {"empirical": empirical, "isotropic": float(isotropic_cdf(x, self.d)) if self.d > 1 else np.nan}

    def cdf(self, x: npt.ArrayLike | None = None) -> pd.DataFrame:
        """CDFs of 𝒳 = |cos θ_c|/|sin θ_d|: ``measured`` over all pairs, ``empirical`` (Eq. 13), ``isotropic`` (Eq. 29).

        Args:
            x: where; 201 places in [0, 1] by default, because |cos γ| lies there.
        """
        at = np.linspace(0, 1, 201) if x is None else np.asarray(x, dtype=np.float64)
        ratios = np.sort(self.sensitivity.ratio[self.sensitivity.known].numpy())
        measured = np.searchsorted(ratios, at, side="right") / len(ratios) if len(ratios) else np.full_like(at, np.nan)
        modelled = self.fc is not None and self.l2 is not None
        return pd.DataFrame({
            "x": at,
            "measured": measured,
            "empirical": empirical_cdf(at, self.fc, self.l2) if self.fc and self.l2 and modelled else np.nan,
            "isotropic": isotropic_cdf(at, self.d) if self.d > 1 else np.nan,
        })  # fmt: skip


def analyse(
    z: Tensor,
    labels: Tensor,
    fc_vectors: Tensor,
    prototypes: Tensor,
    *,
    gamma: float = 0.0,
    step: float = 1.0,
    change: Tensor | None = None,
    index: Tensor | None = None,
) -> Analysis:
    """Analyse any two heads on one trunk, from features and class vectors alone.

    Args:
        z: features ``(N, d)``, of any defence with a linear FC head.
        labels: ``(N,)``, below k.
        fc_vectors: rows of the FC layer's weight ``(k, d)``.
        prototypes: of the ℓ2 head, ``(k, d)`` or ``(N, k, d)``.
        gamma: see `msa_eval.sensitivity.measured.sensitivity`.
        step: see there.
        change: see there.
        index: of the samples in their data set.

    Raises:
        ValueError: when shapes or values don't fit.

    >>> z = torch.tensor([[1.0, 0.2], [0.9, 0.1], [0.1, 0.8], [0.2, 1.0]])
    >>> found = analyse(z, torch.tensor([0, 0, 1, 1]), torch.eye(2), torch.eye(2))
    >>> float(found.summary().loc[0, "condition"])  # of pairs with the own class
    0.0
    """
    found = sensitivity(z, fc_vectors, prototypes, gamma=gamma, step=step, change=change)
    order = torch.arange(len(z)) if index is None else index
    gamma = gamma if change is None else math.nan
    return _finish(found, labels, order, torch.zeros(len(z), dtype=torch.long), gamma, z.shape[1])


@torch.no_grad()
def analyse_model(
    model: HPM | Classifier,
    samples: Samples,
    *,
    train: Samples | None = None,
    prototypes: Prototypes | None = None,
    limit: int | None = None,
    batch_size: int = 64,
    gamma: float = 0.0,
    step: float = 1.0,
    eps: float | None = None,
    steps: int = 20,
    seed: int = 0,
    progress: Progress = silent,
) -> Analysis:
    """Analyse the FC head and the distance head of a checkpoint.

    The FC vectors of an HPM are those before fine-tuning, of the classifier it is compared with (the target ``fc``).

    Args:
        model: an `HPM` that decides by ℓ2 distance, or a classifier.
        samples: images and labels.
        train: labelled training images whose class means are the prototypes, in place of the model's own; a classifier
            has none of its own.
        prototypes: ``hybrid``, the ones each batch is compared with (Eq. 17), or ``global``, the dataset's. By default
            those that the model decides by.
        limit: at most this many samples, drawn uniformly.
        batch_size: the largest batch, on which hybrid prototypes depend; batches are seated as in an evaluation.
        gamma: see `msa_eval.sensitivity.measured.sensitivity`.
        step: see there.
        eps: in place of ``gamma`` and ``step``, measure the changes of the features that APGD makes on the FC head's
            cross-entropy in an Linf ball of this radius, in [0, 1] pixel units.
        steps: of APGD.
        seed: draws samples, batches and starting points.
        progress: shows how far the pass has come.

    Raises:
        ValueError: when the model has no ℓ2 head, or images, labels and model don't fit together.
    """
    head = _l2_head(model, train, progress)
    kind = prototypes or ("global" if head.variant.prototypes == "global" else "hybrid")
    if kind == "hybrid" and head.variant.prototypes == "global":
        raise ValueError("this head has no hybrid prototypes; leave prototypes out, or ask for the global ones")
    w = head.fc_original.weight
    if int(samples.y.max()) >= len(w):
        raise ValueError(f"{samples.name} has label {int(samples.y.max())}, but the model has {len(w)} classes")
    chosen = torch.randperm(len(samples), generator=torch.Generator().manual_seed(seed))[: limit or len(samples)]
    chosen = chosen.sort().values
    batch_plan = plan_batches(len(chosen), size=batch_size, seed=seed)
    batch = torch.empty(len(chosen), dtype=torch.long)
    generator = torch.Generator().manual_seed(seed)
    parts = []
    for number, indices in enumerate(progress(batch_plan, "sensitivity")):
        seated = samples.only(chosen[indices])
        z = features(head, seated)
        change = None if eps is None else _attacked(head.fc_target, seated, eps, steps, generator) - z
        vectors = head.prototypes if kind == "global" else head.hybrid_prototypes(z)
        parts.append(sensitivity(z, w, vectors, gamma=gamma, step=step, change=change))
        batch[indices] = number
    found = _in_order(parts, torch.cat(batch_plan))
    return _finish(found, samples.y[chosen], chosen, batch, gamma if eps is None else math.nan, w.shape[1])


def _attacked(classifier: Classifier, samples: Samples, eps: float, steps: int, generator: torch.Generator) -> Tensor:
    """Features of the points that APGD finds against the FC head."""
    x, ball = samples.images(torch.arange(len(samples))), Ball("Linf", eps)
    found = apgd(classifier, x, samples.y, loss=ce, ball=ball, steps=steps, generator=generator)
    return classifier.features(found.x)


def _l2_head(model: HPM | Classifier, train: Samples | None, progress: Progress) -> HPM:
    if train is not None:
        return plain_l2_head(classifier_of(model), train, progress=progress)
    if not isinstance(model, HPM):
        raise ValueError("a classifier has no prototypes; give training data, whose class means are an ℓ2 head's")
    if model.variant.similarity != "l2":
        raise ValueError(
            f"this head compares by {model.variant.similarity!r}, but S_d is of an ℓ2 distance; give training data, "
            f"whose class means are an ℓ2 head's"
        )
    return model


def _in_order(parts: Iterable[Sensitivity], places: Tensor) -> Sensitivity:
    """Join what batches gave, sample by sample in the order of the data."""
    found = list(parts)
    back = places.argsort()
    return Sensitivity(
        **{f.name: torch.cat([getattr(p, f.name) for p in found])[back] for f in dataclasses.fields(Sensitivity)}
    )


def _finish(found: Sensitivity, labels: Tensor, index: Tensor, batch: Tensor, gamma: float, d: int) -> Analysis:
    models: list[AngleModel | None] = []
    misfits = []
    for name, angles in (("θ_c", found.theta_c), ("θ_d", found.theta_d)):
        _check_labels(labels, angles)
        try:
            models.append(fit_angles(angles.numpy(), labels.numpy()))
        except ValueError as error:
            models.append(None)
            misfits.append(f"{name}, {error}")
    return Analysis(found, labels, index, batch, gamma, d, models[0], models[1], tuple(misfits))


def _check_labels(labels: Tensor, angles: Tensor) -> None:
    if (
        labels.shape != angles.shape[:1]
        or not len(labels)
        or int(labels.max()) >= angles.shape[1]
        or int(labels.min()) < 0
    ):
        raise ValueError(f"expected {len(angles)} labels in 0..{angles.shape[1] - 1}, but got {labels.tolist()[:10]}")


def _where_known(values: npt.NDArray[np.bool_], known: npt.NDArray[np.bool_]) -> pd.Series[bool]:
    return pd.Series(values).astype("boolean").where(known)


def _share(fulfilled: Tensor, among: Tensor) -> npt.NDArray[np.float64]:
    """The share of each row's pairs, NaN where there are none."""
    found: npt.NDArray[np.float64] = ((fulfilled & among).sum(dim=1) / among.sum(dim=1).double()).numpy()
    return found


def _median(values: Tensor, among: Tensor) -> npt.NDArray[np.float64]:
    """The (lower) median of each row's pairs, NaN where there are none."""
    found: npt.NDArray[np.float64] = values.masked_fill(~among, torch.nan).nanmedian(dim=1).values.numpy()
    return found


def _middle(values: Tensor) -> float:
    return float(np.median(values.numpy())) if len(values) else float("nan")
