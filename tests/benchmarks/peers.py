"""What peers break that our protocol calls robust: pyautoattack, torchattacks and foolbox, at equal passes.

    python -m tests.benchmarks peers digits --samples 192 --peers foolbox torchattacks pyautoattack

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
import time
from collections.abc import Collection, Iterable, Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import torch
from torch import Tensor, nn

from msa_eval import HPM, Results, Samples, evaluate, load_checkpoint, load_samples
from msa_eval.attacks.ball import Ball
from msa_eval.attacks.external import BatchModel, find, run_guarded
from msa_eval.protocols import Protocol
from msa_eval.protocols.loading import load_protocol
from msa_eval.references import reference_path

from .subjects import cifar10

STEPS = 40
REPEATS = 50
"""At most so many runs of one attack, where a run makes next to no passes."""


class Attack(NamedTuple):
    """One attack of a peer: its name in the CSV and in the package, and its options."""

    label: str
    name: str
    options: Mapping[str, Any]


def pyautoattack(passes: int) -> Iterator[Attack]:
    steps = {"steps": STEPS}
    for name in ("apgd-ce", "apgd-dlr", "apgd-t", "fab", "fab-t"):
        yield Attack(name, f"autoattack:{name}", steps)
    yield Attack("square", "autoattack:square", {"queries": passes})


def torchattacks(passes: int) -> Iterator[Attack]:
    def attack(name: str, label: str = "", **options: object) -> Attack:
        return Attack(label or name, f"torchattacks:{name}", options)

    yield attack("FGSM")
    for name in ("BIM", "PGD", "EOTPGD", "TPGD", "Jitter", "MIFGSM", "NIFGSM", "VMIFGSM"):
        yield attack(name, steps=STEPS)
    yield attack("DIFGSM", random_start=True, steps=STEPS)
    yield attack("APGD", "APGD-ce", steps=STEPS, loss="ce")
    yield attack("APGD", "APGD-dlr", steps=STEPS, loss="dlr")
    yield attack("APGDT", steps=STEPS)
    yield attack("FAB", steps=STEPS)
    yield attack("FAB", "FAB-T", steps=STEPS, multi_targeted=True)
    yield attack("Square", n_queries=passes)


def foolbox(passes: int) -> Iterator[Attack]:
    def attack(label: str, name: str, **options: object) -> Attack:
        return Attack(label, f"foolbox:{name}", options)

    walk = {"rel_stepsize": 2.5 / STEPS, "steps": STEPS}
    yield attack("LinfFastGradient", "LinfFastGradientAttack", random_start=True)
    yield attack("LinfBasicIterative", "LinfBasicIterativeAttack", **walk)
    yield attack("LinfPGD", "LinfPGD", **walk)
    yield attack("LinfPGD, targeted", "LinfPGD", targeted=True, **walk)
    yield attack("LinfAdamPGD", "LinfAdamPGD", **walk)
    yield attack("LinfMomentum", "LinfMomentumIterativeFastGradientMethod", random_start=True, **walk)
    yield attack("LinfDeepFool", "LinfDeepFoolAttack", steps=STEPS)
    yield attack("LinfFMN", "LInfFMNAttack", steps=STEPS)
    yield attack("LinfNoise", "LinfRepeatedAdditiveUniformNoiseAttack", repeats=passes)


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


def face(attack: Attack, model: nn.Module, batches: Iterable[Batch], ball: Ball, passes: float, size: int) -> Met:
    """Run an attack on every batch until it has made so many passes a sample."""
    peer = find(attack.name, ball, attack.options)
    model = copy.deepcopy(model).requires_grad_(False)
    returned, shown = torch.zeros(size, dtype=torch.bool), torch.zeros(size, dtype=torch.bool)
    images = samples = 0
    for index, x, y in batches:
        wrong = torch.zeros_like(y, dtype=torch.bool)

        def ask(whole: Tensor, rows: Tensor, x: Tensor = x, y: Tensor = y, wrong: Tensor = wrong) -> Tensor:
            logits: Tensor = model(whole)
            if not bool(ball.excess(whole.detach(), x).any()):
                wrong |= logits.detach().argmax(dim=1) != y
            return logits

        classes = model(x[:1]).shape[1]
        batch_model = BatchModel(ask, x, y, ball, classes=classes)
        for seed in range(REPEATS if peer.starts else 1):
            if batch_model.images >= passes * len(y):
                break
            found = run_guarded(peer, batch_model, seed=seed, turn=seed)
            with torch.no_grad():
                returned[index] |= model(found.x).argmax(dim=1) != y
        shown[index] |= wrong
        images, samples = images + batch_model.images, samples + len(y)
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
            for attack in PEERS[peer](round(passes)):
                if attacks is not None and attack.label not in attacks:
                    continue
                started = time.perf_counter()
                met = face(attack, model, batches, protocol.ball, passes, len(data.y))
                only = robust[met.shown[robust]].tolist()
                yield {
                    "peer": peer,
                    "attack": attack.label,
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
    data = load_samples("digits") if digits else cifar10()
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
