"""Real models and data that several tests share."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from msa_eval import HPM, Samples, load_checkpoint, load_samples
from msa_eval.references import reference_path


@pytest.fixture(scope="session")
def digits() -> Samples:
    return load_samples("digits")


@pytest.fixture(scope="session")
def digits_hpm() -> HPM:
    model = load_checkpoint(reference_path("digits")).model
    assert isinstance(model, HPM)
    return model


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of CIFAR-10 data and models."""
    folder = Path(os.environ.get("MSA_EVAL_SHARED", ""))
    if not os.environ.get("MSA_EVAL_SHARED") or not (folder / "data/cifar10/test.npz").is_file():
        pytest.skip("MSA_EVAL_SHARED does not name a folder with data/cifar10/test.npz")
    return folder


@pytest.fixture(scope="session")
def cifar10(shared: Path) -> Samples:
    with np.load(shared / "data/cifar10/test.npz") as archive:
        x, y = archive["x"][:200], archive["y"][:200]
    return Samples(torch.from_numpy(x).permute(0, 3, 1, 2).contiguous(), torch.from_numpy(y), "cifar10")
