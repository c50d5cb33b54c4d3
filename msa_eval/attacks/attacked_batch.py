"""What an attack is: it searches a batch under attack, and judges nothing."""

from __future__ import annotations

from typing import Protocol as Interface

import torch
from torch import Tensor

from msa_eval.judging.trial import Trial


class Attack(Interface):
    """A search on one trial: it returns its final points ``(B, C, H, W)`` and judges nothing."""

    def __call__(self, trial: Trial, generator: torch.Generator) -> Tensor:
        """Search."""
        ...
