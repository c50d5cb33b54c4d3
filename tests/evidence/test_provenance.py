"""Where a result comes from: what is recorded is always text."""

from __future__ import annotations

import importlib.metadata

import pytest

from msa_eval import __version__
from msa_eval.evidence.provenance import place


def test_packages_without_metadata_have_a_version_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    packages = place("cpu")["packages"]
    assert packages["msa-eval"] == __version__
    assert packages["torch"] == "unknown"
    assert all(isinstance(version, str) for version in packages.values())
