"""A purifier in front of a classifier, taken whole, with a surrogate of its own.

It rounds each pixel to one of a few grey levels, so its gradient is zero everywhere, and a gradient attack alone finds
nothing. The surrogate leaves the rounding out on the way back (BPDA; Athalye, Carlini and Wagner, Obfuscated gradients
give a false sense of security, 2018, arXiv:1802.00420).
"""

from torch import Tensor, nn

from msa_eval import evaluate, load_checkpoint, load_samples
from msa_eval.references import reference_path
from msa_eval.report import render_table


class Purifier(nn.Module):
    """A module from images to logits; everything about it may be anything."""

    def __init__(self, classifier: nn.Module, levels: int = 4) -> None:
        super().__init__()
        self.classifier, self.steps = classifier, levels - 1

    def purify(self, x: Tensor) -> Tensor:
        return (x * self.steps).round() / self.steps

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.purify(x))

    def bpda(self, x: Tensor) -> Tensor:
        return self.classifier(x + (self.purify(x) - x).detach())

    surrogates = {"bpda": bpda}  # attacked beside the model's own gradient, which is the run `ste`


def make() -> Purifier:
    return Purifier(load_checkpoint(reference_path("digits")).classifier).eval()


if __name__ == "__main__":
    overrides = {"threat.eps": 0.15, "samples.limit": 64}
    print(render_table(evaluate(make(), load_samples("digits"), protocol="quick", overrides=overrides)))
