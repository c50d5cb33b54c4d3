"""Adversarial evaluation of dynamic, batch-dependent defences by the Mixed Surrogate Attack.

Start with `evaluate`; `HPM` and `finetune` are the reference defence.

What stands here is imported from its file when it is first asked for, so that the command line answers at once.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from msa_eval._version import __version__ as __version__

if not (Path(__file__).parent / "protocols").is_dir():
    # A checkout, whose folder is found before the installed package: two folders of the package stand beside it.
    __path__.append(str(Path(__file__).parents[1]))

if TYPE_CHECKING:
    from msa_eval.auditing.audit import audit
    from msa_eval.data import Samples, load_samples
    from msa_eval.defense import Defense, WholeModel, as_defense
    from msa_eval.defense.architectures import Blueprint, Classifier
    from msa_eval.engine.evaluate import evaluate
    from msa_eval.engine.ray_executor import RayEngine
    from msa_eval.errors import AttackError
    from msa_eval.evidence.results import Results
    from msa_eval.hpm import HPM, Variant
    from msa_eval.hpm.finetune import FinetuneSettings, finetune
    from msa_eval.protocols import Protocol, load_protocol
    from msa_eval.studies.ablation import Ablation, ablate
    from msa_eval.studies.batch_sizes import batch_size_report
    from msa_eval.studies.curve import Curve, curve
    from msa_eval.targets import Target, load_target
    from msa_eval.targets.checkpoint import Checkpoint, load_bare_classifier, load_checkpoint, save_checkpoint
    from msa_eval.targets.splitting import split
    from msa_eval.verification.verify import verify

__all__ = [
    "HPM",
    "Ablation",
    "AttackError",
    "Blueprint",
    "Checkpoint",
    "Classifier",
    "Curve",
    "Defense",
    "FinetuneSettings",
    "Protocol",
    "RayEngine",
    "Results",
    "Samples",
    "Target",
    "Variant",
    "WholeModel",
    "ablate",
    "as_defense",
    "audit",
    "batch_size_report",
    "curve",
    "evaluate",
    "finetune",
    "load_bare_classifier",
    "load_checkpoint",
    "load_protocol",
    "load_samples",
    "load_target",
    "save_checkpoint",
    "split",
    "verify",
]

_FILES = {
    "msa_eval.studies.ablation": ("Ablation", "ablate"),
    "msa_eval.defense.architectures": ("Blueprint", "Classifier"),
    "msa_eval.targets.checkpoint": ("Checkpoint", "load_bare_classifier", "load_checkpoint", "save_checkpoint"),
    "msa_eval.data": ("Samples", "load_samples"),
    "msa_eval.defense": ("Defense", "WholeModel", "as_defense"),
    "msa_eval.errors": ("AttackError",),
    "msa_eval.hpm.finetune": ("FinetuneSettings", "finetune"),
    "msa_eval.hpm": ("HPM", "Variant"),
    "msa_eval.protocols": ("Protocol", "load_protocol"),
    "msa_eval.auditing.audit": ("audit",),
    "msa_eval.engine.ray_executor": ("RayEngine",),
    "msa_eval.engine.evaluate": ("evaluate",),
    "msa_eval.evidence.results": ("Results",),
    "msa_eval.studies.batch_sizes": ("batch_size_report",),
    "msa_eval.studies.curve": ("Curve", "curve"),
    "msa_eval.verification.verify": ("verify",),
    "msa_eval.targets.splitting": ("split",),
    "msa_eval.targets": ("Target", "load_target"),
}
"""Where each is: the imports above, which only type checkers make."""

_HOMES = {name: file for file, names in _FILES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = globals()[name] = getattr(importlib.import_module(_HOMES[name]), name)
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
