"""A transductive head: labels are propagated over a graph of the test batch's features.

Each image's answer is mixed with those of the images most like it, so that a cluster decides together (Zhou et al.,
Learning with local and global consistency, 2004). It helps where features cluster, and lets companions vote.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from msa_eval import evaluate, load_checkpoint, load_samples
from msa_eval.references import reference_path
from msa_eval.report import render_table


class LabelPropagation(nn.Module):
    """A classifier whose answers to a batch are smoothed over the batch, in closed form; taken whole."""

    def __init__(self, classifier: nn.Module, share: float = 0.7, sharpness: float = 20) -> None:
        super().__init__()
        self.classifier, self.share, self.sharpness = classifier, share, sharpness

    def forward(self, x: Tensor) -> Tensor:
        z = self.classifier.features(x)
        unit, one = F.normalize(z, dim=1), torch.eye(len(z), device=z.device)
        weights = (self.sharpness * (unit @ unit.T - 1)).exp() * (1 - one)
        degree = (weights.sum(1) + 1e-6).rsqrt()
        graph = degree[:, None] * weights * degree
        start = self.classifier.fc(z).softmax(1)
        return torch.linalg.solve(one - self.share * graph, (1 - self.share) * start)


def make() -> LabelPropagation:
    return LabelPropagation(load_checkpoint(reference_path("digits")).classifier).eval()


if __name__ == "__main__":
    overrides = {
        "threat.eps": 0.1,
        "threat.contexts": ["joint"],
        "samples.limit": 32,
        "attack.recombination.passes": 150,  # move the whole batch against one sample at a time; `msa` takes 450
    }
    print(render_table(evaluate(make(), load_samples("digits"), protocol="quick", overrides=overrides)))
