"""Adversarial evaluation of dynamic, batch-dependent defences by the Mixed Surrogate Attack.

Start with `evaluate`; `HPM` and `finetune` are the reference defence.
"""

from msa_eval._version import __version__ as __version__
from msa_eval.ablation import Ablation, ablate
from msa_eval.architectures import Blueprint, Classifier
from msa_eval.checkpoint import Checkpoint, load_bare_classifier, load_checkpoint, save_checkpoint
from msa_eval.data import Samples, load_samples
from msa_eval.defense import Defense, WholeModel, as_defense
from msa_eval.finetune import FinetuneSettings, finetune
from msa_eval.hpm import HPM, Variant
from msa_eval.protocols import Results, evaluate
from msa_eval.protocols.audit import audit
from msa_eval.protocols.cluster import RayEngine
from msa_eval.protocols.sizes import batch_size_report
from msa_eval.protocols.verify import verify
from msa_eval.splitting import split
from msa_eval.targets import Target, load_target

__all__ = [
    "HPM",
    "Ablation",
    "Blueprint",
    "Checkpoint",
    "Classifier",
    "Defense",
    "FinetuneSettings",
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
    "evaluate",
    "finetune",
    "load_bare_classifier",
    "load_checkpoint",
    "load_samples",
    "load_target",
    "save_checkpoint",
    "split",
    "verify",
]
