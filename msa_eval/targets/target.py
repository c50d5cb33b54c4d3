"""A target by name, and what is known of how it was made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from msa_eval.defense.architectures import Blueprint, Classifier
from msa_eval.defense.contract import Defense
from msa_eval.targets.rebuilding import rebuild
from msa_eval.targets.weights import misfits
from msa_eval.targets.zoos import ZOOS


@dataclass(frozen=True)
class Target:
    """A target by name.

    Attributes:
        model: the defence, or the classifier with its trunk and head.
        word: its name, without folders.
        about: how it was made, for ``run.json``: word, weights file and its hash, where it was cut, what was imported.
        blueprint: how its classifier is built again, for a checkpoint; ``None`` where it has none.
        notes: what its user should know, a sentence each.
        history: of a checkpoint, what it notes of its making.
    """

    model: Defense
    word: str
    about: Mapping[str, Any]
    blueprint: Blueprint | None = None
    notes: tuple[str, ...] = field(default=())
    history: Mapping[str, Any] = field(default_factory=dict)

    @property
    def classifier(self) -> Classifier:
        """The plain classifier: the target itself, or what its defence was built on.

        Raises:
            ValueError: when there is none.
        """
        plain = self.model if isinstance(self.model, Classifier) else getattr(self.model, "fc_target", None)
        if not isinstance(plain, Classifier) or self.blueprint is None:
            why = getattr(self.model, "why", "")
            raise ValueError(
                f"{self.word} is not a classifier of a trunk and a fully connected head, which HPM needs"
                f"{f' ({why})' if why else ''}; give a model that can be split"
            )
        return plain

    def check_rebuilt(self) -> None:
        """See that a checkpoint of the classifier could be loaded again.

        Raises:
            ValueError: when a model by name can't be built without its weights, or is another then.
        """
        if self.blueprint is None or self.blueprint.architecture.partition(":")[0] not in ZOOS:
            return
        try:
            wrong = misfits(rebuild(self.blueprint), self.classifier.state_dict())
        except ValueError as error:
            raise ValueError(f"a checkpoint of {self.word} could not be loaded again: {error}") from error
        if wrong:
            raise ValueError(f"a checkpoint of {self.word} could not be loaded again: {wrong}")
