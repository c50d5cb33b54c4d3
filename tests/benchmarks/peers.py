"""What peers break that our protocol calls robust: pyautoattack, torchattacks and foolbox, at equal passes.

    python tests/benchmarks/peers.py digits --samples 192 --peers foolbox torchattacks pyautoattack

evaluates a packaged reference under ``digits`` or ``msa``, runs every attack of the peers that are installed on the
same samples in the same batches, against HPM and against its FC head, and writes ``peers-<reference>.csv``. CIFAR-10
needs the data in MSA_EVAL_SHARED. Rows of peers and attacks that are not asked for stay as they are, since foolbox and
torchattacks each want a virtual environment of their own (the wheel of torchattacks 3.5.1 brings an old ``robustbench``
and wants an old ``requests``); a row's ``ours`` is the worst case it was held against.

An attack is run again, from other starts, until it has made as many passes as ours made for a sample. A peer may leave
out images that it has broken or that were wrong from the start; the model it is given answers in the whole batch all
the same, with the images left out where they were seen last. Two things are judged by the hard target, on a model that
no peer can touch: the points a peer returns, brought into the ball and the box; and every whole batch that it showed
to the model inside the ball. The second counts samples that a peer broke without noticing, as ``worst_case`` does.
"""

from __future__ import annotations

import argparse
import copy
import os
import random
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from msa_eval.protocols import Protocol
from msa_eval.protocols.spec import load_protocol
from torch import Tensor, nn

from msa_eval import HPM, Results, Samples, evaluate, load_checkpoint, load_samples
from msa_eval.attacks.ball import Ball
from msa_eval.references import reference_path

STEPS = 40
REPEATS = 50
"""At most so many runs of one attack, where a run makes next to no passes."""

Search = Callable[[nn.Module, Tensor, Tensor, int], Tensor]
"""``(model, x, y, seed) -> points``, on a whole batch."""


class Attack(NamedTuple):
    """One attack of a peer.

    Attributes:
        search: runs it once.
        starts: whether another seed gives another result; else it is run once.
    """

    search: Search
    starts: bool = True


class Seated(nn.Module):
    """A model as one batch of the plan sees it: rows shown without the others are answered among them.

    Attributes:
        images: how many images it was shown.
        broken: the samples ``(B,)`` that were wrong in a batch shown inside the ball.
    """

    def __init__(self, model: nn.Module, x: Tensor, y: Tensor, ball: Ball) -> None:
        super().__init__()
        # A copy: peers change modes, and weights need no gradients.
        self.model = copy.deepcopy(model).requires_grad_(False)
        self.clean, self.y, self.ball, self.last = x, y, ball, x
        self.images = 0
        self.broken = torch.zeros_like(y, dtype=torch.bool)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        """Logits of images ``(n, C, H, W)``."""
        self.images += len(x)
        rows = self._rows(x.detach())
        if len(rows.unique()) < len(rows):  # several points of one image: no batch of the plan
            several: Tensor = self.model(x)
            return several
        whole = self.last.index_copy(0, rows, x)
        self.last = whole.detach()
        logits: Tensor = self.model(whole)
        if not bool(self.ball.excess(self.last, self.clean).any()):
            self.broken = self.broken | (logits.detach().argmax(dim=1) != self.y)
        return logits[rows]

    def _rows(self, x: Tensor) -> Tensor:
        """Whose points these are: the places ``(n,)`` of the nearest clean images."""
        if len(x) == len(self.clean):
            return torch.arange(len(x))
        return torch.cdist(x.flatten(1), self.clean.flatten(1), p=float("inf")).argmin(dim=1)


def pyautoattack(eps: float, passes: int) -> Iterator[tuple[str, Attack]]:
    from pyautoattack import AutoAttack

    def search(name: str, model: nn.Module, x: Tensor, y: Tensor, seed: int) -> Tensor:
        attack = AutoAttack(model, eps=eps, seed=seed, version="custom", attacks=[name])
        attack.apgd.n_restarts, attack.fab.n_restarts = 1, 1
        attack.apgd.n_iter = attack.apgd_targeted.n_iter = attack.fab.n_iter = STEPS
        attack.apgd_targeted.n_target_classes = attack.fab.n_target_classes = 9
        attack.square.n_queries = passes
        points: Tensor = attack.run_standard_evaluation(x, y, batch_size=len(x))[0]
        return points

    for name in ("apgd-ce", "apgd-dlr", "apgd-t", "fab", "fab-t", "square"):
        yield name, Attack(partial(search, name))


def torchattacks(eps: float, passes: int) -> Iterator[tuple[str, Attack]]:
    import torchattacks as peer

    def search(kind: Callable[..., Callable[..., Tensor]], options: Mapping[str, object], model: nn.Module, x: Tensor,
               y: Tensor, seed: int) -> Tensor:  # fmt: skip
        seeded = {"seed": seed} if options.get("seed") == 0 else {}
        return kind(model, **{**options, **seeded})(x, y)

    def attack(name: str, *, starts: bool = True, **options: object) -> Attack:
        return Attack(partial(search, getattr(peer, name), {"eps": eps, **options}), starts)

    walk = {"alpha": 2.5 * eps / STEPS, "steps": STEPS}
    yield "FGSM", attack("FGSM", starts=False)
    yield "BIM", attack("BIM", starts=False, **walk)
    yield "PGD", attack("PGD", **walk)
    yield "EOTPGD", attack("EOTPGD", **walk)
    yield "TPGD", attack("TPGD", **walk)
    yield "Jitter", attack("Jitter", **walk)
    yield "MIFGSM", attack("MIFGSM", starts=False, **walk)
    yield "NIFGSM", attack("NIFGSM", starts=False, **walk)
    yield "VMIFGSM", attack("VMIFGSM", **walk)
    yield "DIFGSM", attack("DIFGSM", random_start=True, **walk)
    yield "APGD-ce", attack("APGD", steps=STEPS, seed=0, loss="ce")
    yield "APGD-dlr", attack("APGD", steps=STEPS, seed=0, loss="dlr")
    yield "APGDT", attack("APGDT", steps=STEPS, seed=0)
    yield "FAB", attack("FAB", steps=STEPS, seed=0)
    yield "FAB-T", attack("FAB", steps=STEPS, seed=0, multi_targeted=True)
    yield "Square", attack("Square", n_queries=passes, seed=0)


def foolbox(eps: float, passes: int) -> Iterator[tuple[str, Attack]]:
    import foolbox as peer

    def search(kind: Callable[..., Callable[..., tuple[Tensor, Tensor, Tensor]]], options: Mapping[str, object],
               targeted: bool, model: nn.Module, x: Tensor, y: Tensor, seed: int) -> Tensor:  # fmt: skip
        shown = peer.PyTorchModel(model, bounds=(0, 1), device="cpu")
        criterion = peer.Misclassification(y)
        if targeted:
            with torch.no_grad():
                others = model(x).scatter(1, y.unsqueeze(1), -torch.inf).argsort(dim=1, descending=True)
            criterion = peer.TargetedMisclassification(others[:, seed % (others.shape[1] - 1)])
        return kind(**options)(shown, x, criterion, epsilons=eps)[1]

    def attack(name: str, *, starts: bool = True, targeted: bool = False, **options: object) -> Attack:
        return Attack(partial(search, getattr(peer.attacks, name), options, targeted), starts)

    walk = {"rel_stepsize": 2.5 / STEPS, "steps": STEPS}
    yield "LinfFastGradient", attack("LinfFastGradientAttack", random_start=True)
    yield "LinfBasicIterative", attack("LinfBasicIterativeAttack", starts=False, **walk)
    yield "LinfPGD", attack("LinfPGD", **walk)
    yield "LinfPGD, targeted", attack("LinfPGD", targeted=True, **walk)
    yield "LinfAdamPGD", attack("LinfAdamPGD", **walk)
    yield "LinfMomentum", attack("LinfMomentumIterativeFastGradientMethod", random_start=True, **walk)
    yield "LinfDeepFool", attack("LinfDeepFoolAttack", starts=False, steps=STEPS)
    yield "LinfFMN", attack("LInfFMNAttack", starts=False, steps=STEPS)
    yield "LinfNoise", attack("LinfRepeatedAdditiveUniformNoiseAttack", repeats=passes)


PEERS = {"pyautoattack": pyautoattack, "torchattacks": torchattacks, "foolbox": foolbox}


class Batch(NamedTuple):
    """One batch of the plan: which samples, and what they are."""

    index: list[int]
    x: Tensor
    y: Tensor


class Met(NamedTuple):
    """What one attack did to all batches; the masks are over the data set.

    Attributes:
        passes: images shown, a sample.
        returned: the samples broken by points that were returned.
        shown: those, and the ones wrong in a batch shown to the model.
    """

    passes: float
    returned: Tensor
    shown: Tensor


def meet(attack: Attack, model: nn.Module, batches: Iterable[Batch], ball: Ball, passes: float, size: int) -> Met:
    """Run an attack on every batch until it has made so many passes a sample."""
    returned, shown = torch.zeros(size, dtype=torch.bool), torch.zeros(size, dtype=torch.bool)
    images = samples = 0
    for index, x, y in batches:
        seated = Seated(model, x, y, ball)
        for seed in range(REPEATS if attack.starts else 1):
            if seated.images >= passes * len(y):
                break
            torch.manual_seed(seed)
            np.random.seed(seed)
            random.seed(seed)
            points = ball.project(attack.search(seated, x.clone(), y.clone(), seed).detach(), x)
            with torch.no_grad():
                returned[index] |= model(points).argmax(dim=1) != y
        shown[index] |= seated.broken
        images, samples = images + seated.images, samples + len(y)
    return Met(images / samples, returned, shown | returned)


def ours(results: Results, target: str) -> tuple[Tensor, Tensor, float]:
    """The samples right at first and those called robust, as indices, and the passes made for a sample."""
    rows = results.samples[results.samples["target"] == target]
    made = results.attacks[results.attacks["target"] == target]["forwards"].sum() / len(rows)
    right, robust = (torch.tensor(rows.loc[rows[name], "index"].to_numpy()) for name in ("clean_correct", "robust"))
    return right, robust, float(made)


def contest(
    hpm: HPM,
    data: Samples,
    protocol: Protocol,
    peers: Iterable[str],
    targets: Iterable[str],
    attacks: Collection[str] | None = None,
) -> Iterator[dict[str, object]]:
    """Evaluate, and let every attack of the peers, or some, try the same samples: a row a target and attack."""
    started = time.perf_counter()
    results = evaluate(hpm, data, protocol=protocol)
    seconds = time.perf_counter() - started
    seats = [group["index"].tolist() for _, group in results.batches.groupby("batch")]
    batches = [Batch(index, data.images(torch.tensor(index)), data.y[index]) for index in seats]
    for target in targets:
        model = hpm if target == "defense" else hpm.fc_target
        right, robust, passes = ours(results, target)
        count = sum(map(len, seats))
        yield {
            "peer": "msa-eval",
            "attack": protocol.name,
            "target": target,
            "passes": passes,
            "worst_case": len(robust) / count,
            "samples": count,
            "seconds": seconds,
        }
        for peer in peers:
            for name, attack in PEERS[peer](protocol.ball.eps, round(passes)):
                if attacks is not None and name not in attacks:
                    continue
                started = time.perf_counter()
                met = meet(attack, model, batches, protocol.ball, passes, len(data.y))
                only = robust[met.shown[robust]].tolist()
                yield {
                    "peer": peer,
                    "attack": name,
                    "target": target,
                    "passes": met.passes,
                    "accuracy": float((~met.returned[right]).sum()) / count,
                    "worst_case": float((~met.shown[right]).sum()) / count,
                    "only_peer": len(only),
                    "only_returned": int(met.returned[robust].sum()),
                    "which": " ".join(map(str, only)),
                    "ours": len(robust) / count,
                    "samples": count,
                    "seconds": time.perf_counter() - started,
                }


def installed(peers: Iterable[str]) -> list[str]:
    found = []
    for peer in peers:
        try:
            print(f"{peer} {version(peer)}")
            found.append(peer)
        except PackageNotFoundError:
            print(f"{peer} is not installed here and is left out")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reference", choices=("digits", "cifar10-wrn10-2"))
    parser.add_argument("--peers", nargs="+", choices=tuple(PEERS), default=list(PEERS))
    parser.add_argument("--attacks", nargs="+", help="names of attacks, as in the CSV; all by default")
    parser.add_argument("--targets", nargs="+", choices=("defense", "fc"), default=["defense", "fc"])
    parser.add_argument("--samples", type=int, default=192)
    parser.add_argument("--out", type=Path, default=Path("results/benchmarks"))
    options = parser.parse_args()
    hpm = load_checkpoint(reference_path(options.reference)).model
    assert isinstance(hpm, HPM)
    digits = options.reference == "digits"
    data = load_samples("digits" if digits else str(Path(os.environ["MSA_EVAL_SHARED"], "data/cifar10/test.npz")))
    overrides = {"threat.contexts": ["joint"], "samples.limit": options.samples, "audit.samples": 0}
    protocol = load_protocol("digits" if digits else "msa", overrides=overrides)
    peers = installed(options.peers)
    path = options.out / f"peers-{options.reference}.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, object]] = pd.read_csv(path).to_dict(orient="records") if path.exists() else []
    for row in contest(hpm, data, protocol, peers, options.targets, options.attacks):
        rows.append(row)
        table = pd.DataFrame(rows).drop_duplicates(["target", "peer", "attack"], keep="last")
        table = table.sort_values("target", kind="stable")
        table.to_csv(path, index=False, float_format="%.6g")
        told = f" only it broke {row['only_peer']}" if "only_peer" in row else ""
        print(f"{row['target']:8} {row['peer']:12} {row['attack']:20} {row['passes']:6.0f} passes, "
              f"worst case {100 * row['worst_case']:5.1f} %{told}, {row['seconds']:.0f} s", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
