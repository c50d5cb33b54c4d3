"""The paper's analysis of sensitivity: measured, expected for isotropic features, and expected for measured angles.

References:
    Sensitivity as a Double-Edged Sword (Wang, 2026), arXiv:2606.01746, sections 3.3, 3.4 and 7.
"""

from msa_eval.sensitivity.analysis import Analysis, analyse, analyse_model
from msa_eval.sensitivity.curves import accuracy_curves
from msa_eval.sensitivity.empirical import (
    RESNET50_FC,
    RESNET50_L2,
    AngleModel,
    empirical_cdf,
    empirical_probability,
    fit_angles,
)
from msa_eval.sensitivity.heads import autoattack_resnet18, features, plain_l2_head
from msa_eval.sensitivity.isotropic import isotropic_cdf, isotropic_probability
from msa_eval.sensitivity.measured import Sensitivity, sensitivity
from msa_eval.sensitivity.truncated import TruncatedGaussian, fit_truncated

__all__ = [
    "RESNET50_FC",
    "RESNET50_L2",
    "Analysis",
    "AngleModel",
    "Sensitivity",
    "TruncatedGaussian",
    "accuracy_curves",
    "analyse",
    "analyse_model",
    "autoattack_resnet18",
    "empirical_cdf",
    "empirical_probability",
    "features",
    "fit_angles",
    "fit_truncated",
    "isotropic_cdf",
    "isotropic_probability",
    "plain_l2_head",
    "sensitivity",
]
