"""Images and labels, from the places people keep them."""

from __future__ import annotations

from msa_eval.data.loading import load_samples
from msa_eval.data.samples import Samples, Split

__all__ = ["Samples", "Split", "load_samples"]
