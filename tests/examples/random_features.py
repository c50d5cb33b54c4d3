"""A stochastic defence: features are dropped at random, at test time too (Monte-Carlo dropout).

It is not said anywhere that it is stochastic: that is found out. It is then asked nine times, a sample is broken when
most answers are wrong, and gradients are averaged over four draws.
"""

from torch import Tensor, nn
from torch.nn import functional as F

from msa_eval import evaluate, load_checkpoint, load_samples
from msa_eval.references import reference_path
from msa_eval.report import render_table


class RandomFeatures:
    """A classifier whose head sees a random part of the features.

    The chance is in the decision, not in ``features``, which are kept from one question to the next. A model that
    can't be parted like this is given whole, as ``WholeModel(model)``.
    """

    def __init__(self, classifier: nn.Module, share: float = 0.3) -> None:
        self.classifier, self.share = classifier, share

    def features(self, x: Tensor) -> Tensor:
        return self.classifier.features(x)

    def logits(self, z: Tensor) -> Tensor:
        return self.classifier.fc(F.dropout(z, self.share, training=True))


def make() -> RandomFeatures:
    return RandomFeatures(load_checkpoint(reference_path("digits")).classifier)


if __name__ == "__main__":
    overrides = {"threat.eps": 0.15, "samples.limit": 64}
    results = evaluate(make(), load_samples("digits"), protocol="quick", overrides=overrides)
    print(render_table(results))
    print(f"asked {results.run['draws']['defense']} times; breaks taken back: {results.run['taken_back']}")
