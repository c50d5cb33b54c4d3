"""The golden set: evaluations whose bytes a change of the source's shape must leave as they are.

Hashes depend on the processor, so none are kept here. Write those of one checkout, then compare another's::

    python -P -m tests.golden before.json    # in the checkout as it was
    python -P -m tests.golden before.json    # in the changed one: exits with 1 and names what differs

Four evaluations of 32 digits or fewer: the paper's protocol, `msa` in all four contexts, a stochastic target and a
whole model. Tables, archive and gallery are hashed, and of ``run.json`` the key.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from msa_eval import HPM, Samples, WholeModel, evaluate, load_checkpoint, load_samples
from msa_eval.references import reference_path

SHORT = {
    "threat.eps": 0.15, "batches.size": 16, "attack.apgd.steps": 5, "attack.apgd.passes": 40,
    "attack.apgd.overtime": 10, "attack.recombination.steps": 2, "attack.recombination.passes": 20,
    "attack.recombination.sweeps": 1, "attack.recombination.classes": 3, "attack.square.queries": 10,
    "attack.spsa.queries": 10,
}  # fmt: skip
PAPER = {"threat.eps": 0.15, "batches.size": 16, "samples.fraction": 1.0, "attack.apgd.steps": 8,
         "attack.square.queries": 20}  # fmt: skip
STOCHASTIC = SHORT | {"threat.contexts": ["joint", "solo"], "stochastic.eot": 1, "stochastic.draws": 5,
                      "attack.apgd.passes": 20, "attack.apgd.overtime": 0}  # fmt: skip


class Noisy(nn.Module):
    """The reference with noise on what it decides: it answers at random."""

    def __init__(self, model: HPM) -> None:
        super().__init__()
        self.model = model

    def features(self, x: Tensor) -> Tensor:
        return self.model.features(x)

    def logits(self, z: Tensor) -> Tensor:
        return self.model.logits(z + 0.05 * torch.randn_like(z))


class Whole(nn.Module):
    """The reference from images to logits, with no trunk to be seen."""

    def __init__(self, model: HPM) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model.logits(self.model.features(x))


def evaluations(folder: Path) -> Iterator[Path]:
    """Make each of the four; yields its folder."""
    model = load_checkpoint(reference_path("digits")).model
    assert isinstance(model, HPM)
    digits = load_samples("digits")
    samples, few = Samples(digits.x[:32], digits.y[:32], "digits"), Samples(digits.x[:16], digits.y[:16], "digits")
    cases: dict[str, tuple[Any, Samples, str, dict[str, Any]]] = {
        "paper": (model, samples, "paper-cifar10", PAPER),
        "contexts": (model, samples, "msa", SHORT | {"threat.contexts": ["joint", "solo", "alone", "composed"]}),
        "stochastic": (Noisy(model).eval(), few, "msa", STOCHASTIC),
        "whole": (WholeModel(Whole(model).eval()), few, "msa", SHORT | {"threat.contexts": ["joint", "alone"]}),
    }  # fmt: skip
    for name, (target, data, protocol, overrides) in cases.items():
        evaluate(
            target, data, protocol=protocol, overrides=overrides, out=folder / name, save_adversarial=True,
            precision="fp32", notify=lambda _: None,
        )  # fmt: skip
        yield folder / name


def hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of what each evaluation wrote, and the keys of what was evaluated."""
    found = {}
    for out in evaluations(folder):
        found[f"{out.name} key"] = json.loads((out / "run.json").read_text())["key"]
        for path in sorted([*out.glob("*.csv"), *out.glob("*.safetensors")]):
            found[f"{out.name}/{path.name}"] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def main() -> int:
    """Write the hashes where there are none yet, else compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path)
    file = parser.parse_args().file
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        found = hashes(Path(folder))
    if not file.exists():
        file.write_text(json.dumps(found, indent=2) + "\n")
        print(f"{len(found)} hashes written to {file}")
        return 0
    before = json.loads(file.read_text())
    differing = sorted(name for name in before.keys() | found.keys() if before.get(name) != found.get(name))
    print("\n".join(f"differs: {name}" for name in differing) or f"all {len(found)} hashes are the same")
    return bool(differing)


if __name__ == "__main__":
    sys.exit(main())
