"""Two heads on one trunk: the fully connected one, and a plain ℓ2 head beside it."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch
from torch import Tensor, nn

from msa_eval.data import Samples
from msa_eval.defense.architectures import Classifier
from msa_eval.hpm.model import HPM, Variant
from msa_eval.progress import Progress, silent
from msa_eval.untrusted import printable

RESNET18 = "autoattack-resnet18"
"""How AutoAttack's ResNet-18 is called where a checkpoint is expected."""


def plain_l2_head(classifier: Classifier, train: Samples, *, batch_size: int = 250, progress: Progress = silent) -> HPM:
    """Replace a classifier's head by the negative ℓ2 distance to its class means (Eq. 2; DeepNCM's head).

    The trunk stays as it was trained, with the FC head: the paper trains one with each head.

    Args:
        classifier: trunk and FC head; the latter stays on as ``fc_target``.
        train: labelled images, of every class at least one; their features' means are the prototypes.
        batch_size: images a pass.
        progress: shows how far the pass has come.

    Raises:
        ValueError: when the images don't fit the trunk, a label has no class, or a class no image.
    """
    head = HPM(classifier.trunk, classifier.fc, variant=Variant(prototypes="global")).eval().requires_grad_(False)
    k = classifier.fc.out_features
    if int(train.y.max()) >= k:
        raise ValueError(f"{train.name} has label {int(train.y.max())}, but the classifier has {k} classes")
    head.start_prototypes(features(head, train, batch_size=batch_size, progress=progress), train.y)
    return head


@torch.no_grad()
def features(
    model: HPM | Classifier, samples: Samples, *, batch_size: int = 250, progress: Progress = silent
) -> Tensor:
    """Features ``(N, d)`` of all images, in their order.

    Raises:
        ValueError: when the trunk can't take the images.
    """
    batches = torch.arange(len(samples)).split(batch_size)
    try:
        return torch.cat([model.features(samples.images(i)) for i in progress(batches, f"features of {samples.name}")])
    except RuntimeError as error:
        shape = samples.shape
        raise ValueError(
            f"the trunk can't take images of shape {shape} ({samples.name}): {printable(error)}"
        ) from error


def autoattack_resnet18() -> Classifier:
    """AutoAttack's naturally trained CIFAR-10 ResNet-18, from the installed ``pyautoattack``.

    Its wheel carries the weights as ``examples/model_test.pt`` beside the architecture. They are read with torch's
    ``weights_only``.

    Raises:
        ValueError: when the installed ``pyautoattack`` has no such files.
    """
    found = importlib.util.find_spec("pyautoattack")
    folders = list(found.submodule_search_locations or ()) if found else []
    weights = next((path for f in folders if (path := Path(f, "examples", "model_test.pt")).is_file()), None)
    if weights is None or importlib.util.find_spec("pyautoattack.examples.resnet") is None:
        raise ValueError(
            "the installed pyautoattack has no examples/model_test.pt and resnet.py; put both from AutoAttack's "
            "repository into the folder pyautoattack/examples of this Python, or install pyautoattack 0.2.0"
        )
    from pyautoattack.examples.resnet import ResNet18

    with torch.random.fork_rng(devices=[]):
        net = ResNet18()
    net.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    fc, net.linear = net.linear, nn.Identity()
    return Classifier(net, fc).eval().requires_grad_(False)


def classifier_of(model: HPM | Classifier) -> Classifier:
    """The plain classifier: the model itself, or the one that HPM was built on."""
    return model.fc_target if isinstance(model, HPM) else model


def with_dataset_prototypes(model: HPM | Classifier) -> HPM:
    """The plain ℓ2 head of an HPM's dataset prototypes, beside the FC head from before fine-tuning.

    Raises:
        ValueError: when the model has no prototypes.
    """
    if not isinstance(model, HPM):
        raise ValueError("a classifier has no prototypes; give training data, whose class means are an ℓ2 head's")
    head = HPM(model.trunk, model.fc_original, variant=Variant(prototypes="global")).eval().requires_grad_(False)
    head.prototypes.copy_(model.prototypes)
    return head
