"""A defence that adapts at test time and is set back before each batch (episodic TENT), taken whole.

A scale and a shift of the features are moved down the entropy of the batch's answers, then the batch is answered (Wang
et al., Tent: fully test-time adaptation by entropy minimization, 2021, arXiv:2006.10726).
"""

import torch
from torch import Tensor, nn

from msa_eval import evaluate, load_checkpoint, load_samples
from msa_eval.references import reference_path
from msa_eval.report import render_table


class Tent(nn.Module):
    """It takes gradients of its own weights, which is its own business: nothing is to be said of it."""

    def __init__(self, classifier: nn.Module, z: Tensor, steps: int = 3, rate: float = 0.05) -> None:
        super().__init__()
        self.classifier, self.steps, self.rate = classifier, steps, rate
        self.mean, self.std = z.mean(0), z.std(0) + 1e-3
        self.scale, self.shift = nn.Parameter(torch.ones_like(self.std)), nn.Parameter(torch.zeros_like(self.mean))

    def answer(self, z: Tensor) -> Tensor:
        z = (z - z.mean(0)) / (z.std(0, correction=0) + 1e-3)  # batch normalisation by the test batch
        return self.classifier.fc((z * self.scale + self.shift) * self.std + self.mean)

    @torch.enable_grad()
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():  # set back, so that no batch leaves a trace
            self.scale.fill_(1)
            self.shift.fill_(0)
        optimizer = torch.optim.SGD([self.scale, self.shift], self.rate)
        z = self.classifier.features(x)
        for _ in range(self.steps):
            logits = self.answer(z.detach())
            optimizer.zero_grad()
            entropy = -(logits.softmax(1) * logits.log_softmax(1)).sum(1).mean()
            entropy.backward()
            optimizer.step()
        return self.answer(z)


def make() -> Tent:
    classifier = load_checkpoint(reference_path("digits")).classifier
    with torch.no_grad():
        return Tent(classifier, classifier.features(load_samples("digits", split="train").x)).eval()


if __name__ == "__main__":
    overrides = {
        "threat.eps": 0.1,
        "threat.contexts": ["joint"],
        "samples.limit": 32,
        "attack.recombination.passes": 150,  # move the whole batch against one sample at a time; `msa` takes 450
    }
    print(render_table(evaluate(make(), load_samples("digits"), protocol="quick", overrides=overrides)))
