"""The ablation: each variant differs in the part it names, is attacked in earnest, and is told of truly."""

from __future__ import annotations

import copy
import itertools
import json
import re
import textwrap
from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import save_file
from torch import Tensor
from toys import make_classifier, make_samples

from msa_eval import (
    HPM,
    Ablation,
    Blueprint,
    Checkpoint,
    FinetuneSettings,
    Samples,
    Variant,
    ablate,
    evaluate,
    finetune,
    load_checkpoint,
    load_target,
    save_checkpoint,
)
from msa_eval.cli import main
from msa_eval.hashing import weights_hash
from msa_eval.protocols import Protocol, load_protocol, make_protocol
from msa_eval.report import render_ablation
from msa_eval.studies import ablation as module
from msa_eval.studies.ablation import VARIANTS, settings_of
from msa_eval.surrogates import get
from msa_eval.targets.target import Target

SETTINGS = FinetuneSettings(batch_size=8, lr=1e-2, steps=2, eps=0.1, step_size=0.05)
SHAPE = (1, 8, 8)
EPS = 0.02
"""A radius at which the closed forms leave some toys robust, and some not."""
STRONG = {"threat.eps": EPS, "attack.apgd.losses": ["dlr-targeted"], "attack.apgd.steps": 20, "batches.size": 20}


def _protocol(**changes: Any) -> Protocol:
    content = {
        "schema": 1, "name": "small", "version": 1, "description": "Small.", "threat.norm": "Linf", "threat.eps": 0.01,
        "batches.size": 12, "attack.apgd.surrogates": ["fc-oracle", "soft-hybrid"], "attack.apgd.losses": ["margin"],
        "attack.apgd.steps": 4, "audit.samples": 0,
    }  # fmt: skip
    return make_protocol(content | changes)


def _data(count: int, seed: int, name: str = "random") -> Samples:
    """Noise around four levels of grey, the classes in turn."""
    noise = torch.rand(count, *SHAPE, generator=torch.Generator().manual_seed(seed))
    y = torch.arange(count) % 4
    return Samples(0.1 + 0.15 * y.view(-1, 1, 1, 1) + 0.35 * noise, y, name)


@pytest.fixture(scope="module")
def start() -> Checkpoint:
    """A random trunk under a linear head that looks for the nearest class mean."""
    blueprint = Blueprint("digits-cnn", {"width": 4}, num_classes=4)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        classifier = blueprint.build().eval().requires_grad_(False)
    train = _data(40, 0)
    z = 20 * classifier.features(train.x)
    means = _class_means(z, train.y)
    classifier.fc.weight.copy_(20 * means)
    classifier.fc.bias.copy_(-means.pow(2).sum(dim=1) / 2)
    return Checkpoint(classifier, blueprint, {"classifier": "toy"})


def _ablate(start: Checkpoint | Target, out: Path | None = None, **changes: Any) -> Ablation:
    given: dict[str, Any] = {"protocol": _protocol(), "settings": SETTINGS, "out": out}
    return ablate(start, _data(40, 0), _data(24, 1), **(given | changes))


@pytest.fixture(scope="module")
def made(start: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Ablation]:
    out = tmp_path_factory.mktemp("ablation") / "a"
    return out, _ablate(start, out, protocol=_protocol(**{"threat.contexts": ["joint", "solo"]}))


def _class_means(z: Tensor, label: Tensor) -> Tensor:
    return torch.stack([z[label == c].mean(dim=0) if (label == c).any() else torch.zeros_like(z[0]) for c in range(4)])


def test_each_variant_departs_from_the_full_one_in_the_part_it_names() -> None:
    """Before any fine-tuning, by definition in float64; there the average and the mixer are the same."""
    classifier = make_classifier()
    samples = make_samples(classifier, 40)
    with torch.no_grad():
        z = classifier.features(samples.x)
        anchors, batch = _class_means(z.double(), samples.y), _class_means(z.double(), classifier.fc(z).argmax(dim=1))
        unit = _class_means(torch.nn.functional.normalize(z.double()), samples.y)
    hybrid, z64 = (anchors + batch) / 2, z.double()
    expected = {
        "full": -torch.cdist(z64, hybrid),
        "no-global": -torch.cdist(z64, batch),
        "average": -torch.cdist(z64, hybrid),
        "inner": z64 @ hybrid.T,
        "plain-l2": -torch.cdist(z64, anchors),
        "plain-cosine": torch.nn.functional.normalize(z64) @ torch.nn.functional.normalize(unit).T,
    }
    assert set(expected) == set(VARIANTS)
    for name, variant in VARIANTS.items():
        hpm = HPM(classifier.trunk, classifier.fc, variant=variant).eval()
        hpm.start_prototypes(z, samples.y)
        torch.testing.assert_close(hpm.logits(z).double(), expected[name], atol=1e-4, rtol=1e-4)
    pairs = itertools.combinations([name for name in expected if name != "average"], 2)
    assert all(not torch.allclose(expected[a], expected[b], atol=1e-3) for a, b in pairs)


def test_fine_tuning_moves_what_a_variant_has() -> None:
    classifier = make_classifier()
    samples = make_samples(classifier, 40)
    untouched = HPM(classifier.trunk, classifier.fc)
    tuned = {name: finetune(classifier, samples, settings=SETTINGS, variant=v) for name, v in VARIANTS.items()}
    for name, hpm in tuned.items():
        plain = name.startswith("plain")
        assert torch.equal(hpm.fc.weight, untouched.fc.weight) == plain, name
        assert torch.equal(hpm.mixer.weight, untouched.mixer.weight) == (plain or name == "average"), name
    with torch.no_grad():
        z = classifier.features(samples.x)
    means = _class_means(z, samples.y)
    torch.testing.assert_close(tuned["plain-l2"].prototypes, means)
    normalised = _class_means(z / z.norm(dim=1, keepdim=True), samples.y)
    torch.testing.assert_close(tuned["plain-cosine"].prototypes, normalised)
    assert not torch.allclose(tuned["full"].prototypes, means)


def _exactly_robust(z: Tensor, y: Tensor, points: Tensor, offsets: Tensor, to_image: Tensor, eps: float) -> Tensor:
    """Samples no Linf change can break where class j's score is z · points[j] + offsets[j] and z is linear in x."""
    score = z @ points.T + offsets
    gap = score - score.gather(1, y[:, None])
    reach = eps * ((points[None] - points[y][:, None]) @ to_image.T).abs().sum(dim=2)
    return ((gap + reach) < 0).sum(dim=1) == len(points) - 1


@pytest.mark.parametrize("name", ["plain-l2", "plain-cosine"])
def test_plain_heads_are_attacked_by_their_own_gradient_down_to_what_is_exactly_robust(name: str) -> None:
    """On a linear trunk both heads are linear, so what an attacker can reach is known in closed form."""
    classifier = make_classifier()
    samples = make_samples(classifier, 40)
    hpm = finetune(classifier, samples, settings=SETTINGS, variant=VARIANTS[name])
    results = evaluate(hpm, samples, protocol=_protocol(**STRONG), fc=False)
    with torch.no_grad():
        z = classifier.features(samples.x).double()
    points = hpm.prototypes.double()
    points = points / points.norm(dim=1, keepdim=True) if name == "plain-cosine" else points
    offsets = torch.zeros(4).double() if name == "plain-cosine" else -points.pow(2).sum(dim=1) / 2
    weight = classifier.trunk.weight.detach().double()  # type: ignore[union-attr]
    exact = _exactly_robust(z, samples.y, points, offsets, weight, EPS)
    assert results.samples.sort_values("index")["robust"].tolist() == exact.tolist()
    assert 0.1 < exact.float().mean() < 0.9
    assert set(results.attacks["surrogate"]) == {"fc-oracle", "soft-hybrid"}
    assert results.run["targets"]["defense"]["not_applicable"] == []


@pytest.mark.parametrize("name", ["plain-l2", "plain-cosine"])
def test_the_default_protocol_follows_a_plain_heads_own_gradient_and_in_some_runs_its_fc_heads(name: str) -> None:
    classifier = make_classifier()
    hpm = finetune(classifier, make_samples(classifier, 40), settings=SETTINGS, variant=VARIANTS[name])
    few = {"samples.limit": 4, "threat.contexts": ["solo"], "attack.apgd.steps": 2, "attack.apgd.passes": 4,
           "attack.apgd.overtime": 4, "attack.square.queries": 1, "attack.spsa.queries": 4, "audit.samples": 0,
           "batches.size": 4}  # fmt: skip
    results = evaluate(hpm, make_samples(classifier, 40), protocol="msa", overrides=few, fc=False)
    runs = results.attacks[results.attacks["attack"] == "apgd"]["surrogate"].value_counts()
    assert runs["fc-oracle"] == 5
    assert runs.sum() == 20
    z = torch.randn(7, 6, generator=torch.Generator().manual_seed(0), requires_grad=True)
    own, *others = (
        torch.autograd.grad(get(each).logits(hpm, z)[:, 0].sum(), z)[0]
        for each in ("ste", *(runs.index.drop("fc-oracle")))
    )
    assert all(torch.equal(own, other) for other in others)


def test_without_dataset_prototypes_a_batch_of_one_is_as_weak_as_its_fc_head() -> None:
    """Alone, a class prototype is the image's own feature, so the FC head decides, whose robustness is known."""
    classifier = make_classifier()
    samples = make_samples(classifier, 40)
    hpm = HPM(classifier.trunk, classifier.fc, variant=VARIANTS["no-global"]).eval()
    protocol = _protocol(**STRONG, **{"threat.contexts": ["alone"]})
    results = evaluate(hpm, samples, protocol=protocol, fc=False)
    with torch.no_grad():
        z = classifier.features(samples.x).double()
    weight = classifier.trunk.weight.detach().double()  # type: ignore[union-attr]
    fc = classifier.fc
    exact = _exactly_robust(z, samples.y, fc.weight.detach().double(), fc.bias.detach().double(), weight, EPS)
    assert results.samples.sort_values("index")["robust"].tolist() == exact.tolist()
    assert 0.1 < exact.float().mean() < 0.9


def test_the_table_is_what_evaluations_of_the_checkpoints_say(made: tuple[Path, Ablation], start: Checkpoint) -> None:
    out, ablation = made
    keys = ["context", "metric"]
    table = ablation.table
    assert list(dict.fromkeys(table["variant"])) == ["fc", *VARIANTS]
    full = table[table["variant"] == "full"].set_index(keys)["value"]
    protocol = _protocol(**{"threat.contexts": ["joint", "solo"]})
    for name, variant in VARIANTS.items():
        model = load_checkpoint(out / f"{name}.safetensors").model
        assert isinstance(model, HPM)
        assert model.variant == variant
        assert weights_hash(model.fc_target) == weights_hash(start.classifier)
        assert json.loads((out / name / "run.json").read_text())["seed"] == ablation.about["seed"] == 0
        summary = evaluate(model, _data(24, 1), protocol=protocol).summary
        for target, shown in (("defense", name), ("fc", "fc")):
            rows = table[table["variant"] == shown].set_index(keys)
            expected = summary[summary["target"] == target].set_index(keys)
            numbers = ["value", "low", "high", "n"]
            pd.testing.assert_frame_equal(rows[numbers], expected[numbers])
            assert (rows["difference"] - (rows["value"] - full)).abs().max() < 1e-15
    assert table.groupby("metric")["value"].nunique().max() > 1
    loaded = Ablation.load(out)
    pd.testing.assert_frame_equal(loaded.table, table, check_dtype=False)
    assert loaded.about == json.loads(json.dumps(ablation.about))
    with pytest.raises(ValueError, match="holds no ablation"):
        Ablation.load(out / "full")


def test_the_text_shows_the_table(made: tuple[Path, Ablation]) -> None:
    ablation = made[1]
    text = render_ablation(ablation)
    blocks = text.split("\n\n")[1:]
    assert [block.split(":")[0] for block in blocks] == ["joint", "solo"]
    for row in ablation.table.to_dict(orient="records"):
        block = blocks[["joint", "solo"].index(row["context"])]
        (line,) = [line for line in block.splitlines() if line.startswith(row["variant"] + " ")]
        difference = "" if row["variant"] == "full" else f" ({100 * row['difference']:+.1f})"
        assert f"{100 * row['value']:.1f}" in line
        assert difference in line
    assert "batch, linear, l2" in text
    assert "global, cosine" in text


def test_without_a_folder_nothing_is_written_and_the_numbers_are_the_same(
    made: tuple[Path, Ablation], start: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    variants = {"average": VARIANTS["average"]}
    protocol = _protocol(**{"threat.contexts": ["joint", "solo"]})
    found = ablate(
        start.classifier, _data(40, 0), _data(24, 1), protocol=protocol, settings=SETTINGS,
        variants=variants,
    )  # fmt: skip
    assert list(tmp_path.iterdir()) == []
    whole = made[1].table
    expected = whole[whole["variant"].isin(["fc", "full", "average"])].reset_index(drop=True)
    pd.testing.assert_frame_equal(found.table, expected)


class _Stopping:
    """Progress that is interrupted when a loop begins."""

    def __init__(self, at: str) -> None:
        self.at, self.seen = at, list[str]()

    def __call__(self, iterable: Iterable[Any], description: str) -> Iterable[Any]:
        self.seen.append(description)
        if description.startswith(self.at):
            raise KeyboardInterrupt
        return iterable


@pytest.mark.parametrize("stop", ["no-global: epoch", "average: defense joint"])
def test_one_that_was_stopped_goes_on(
    stop: str, made: tuple[Path, Ablation], start: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "a"
    protocol = _protocol(**{"threat.contexts": ["joint", "solo"]})
    with pytest.raises(KeyboardInterrupt):
        _ablate(start, out, protocol=protocol, progress=_Stopping(stop))
    assert json.loads((out / "full" / "run.json").read_text())["data"]["n"] == 24
    assert set(pd.read_csv(out / "ablation.csv")["variant"]) >= {"fc", "full"}
    tuned: list[Variant] = []

    def counted(*given: Any, **options: Any) -> HPM:
        tuned.append(options["variant"])
        return finetune(*given, **options)

    monkeypatch.setattr(module, "finetune", counted)
    progress = _Stopping("nowhere")
    found = _ablate(start, out, protocol=protocol, progress=progress)
    left = list(VARIANTS)[1 if "no-global" in stop else 3 :]
    assert tuned == [VARIANTS[name] for name in left]
    assert not any(text.startswith("full") for text in progress.seen)
    pd.testing.assert_frame_equal(found.table, made[1].table)
    assert (out / "ablation.csv").read_bytes() == (made[0] / "ablation.csv").read_bytes()
    tuned.clear()
    monkeypatch.setattr(module, "environment", None)
    record = (out / "ablation.json").read_bytes()
    assert _ablate(start, out, protocol=protocol).about == json.loads(record)
    assert tuned == []
    assert (out / "ablation.json").read_bytes() == record


def test_other_settings_are_refused_by_name_or_replace_all(start: Checkpoint, tmp_path: Path) -> None:
    out, few = tmp_path / "a", {"average": VARIANTS["average"]}
    first = _ablate(start, out, variants=few)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    others: dict[str, dict[str, Any]] = {
        r"seed 0, now 1": {"seed": 1},
        r"protocol": {"protocol": _protocol(**{"threat.eps": 0.2})},
        r"finetune": {"settings": replace(SETTINGS, lr=2e-2)},
        r"variant average": {"variants": {"average": VARIANTS["inner"]}},
    }
    for words, changes in others.items():
        with pytest.raises(ValueError, match=rf"other settings \({words}\); choose another folder"):
            _ablate(start, out, **({"variants": few} | changes))
    for words, train, test in (("train", 48, 24), ("test", 40, 20)):
        with pytest.raises(ValueError, match=rf"other settings \({words}\)"):
            ablate(start, _data(train, 0), _data(test, 1), protocol=_protocol(), settings=SETTINGS, out=out)
    with pytest.raises(ValueError, match=r"other settings \(classifier\)"):
        ablate(_moved(start), _data(40, 0), _data(24, 1), protocol=_protocol(), settings=SETTINGS, out=out)
    assert before == {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    with pytest.warns(UserWarning, match="held is kept in"):
        forced = _ablate(start, out, variants=few, settings=replace(SETTINGS, lr=0.1, epochs=3), force=True)
    again = _ablate(start, None, variants=few, settings=replace(SETTINGS, lr=0.1, epochs=3))
    pd.testing.assert_frame_equal(forced.table, again.table)
    assert forced.about["variants"]["full"]["sha256"] != first.about["variants"]["full"]["sha256"]


def _moved(start: Checkpoint) -> Checkpoint:
    """The same classifier with another bias."""
    other = copy.deepcopy(start.classifier)
    other.fc.bias.add_(0.01)
    return Checkpoint(other, start.blueprint, {})


def test_evidence_or_weights_that_are_not_what_was_noted_are_not_reused(start: Checkpoint, tmp_path: Path) -> None:
    out, few = tmp_path / "a", {"average": VARIANTS["average"]}
    first = _ablate(start, out, variants=few)
    summary = out / "average" / "summary.csv"
    text = summary.read_text()
    changed = re.sub(r"worst_case,[\d.]+", "worst_case,0.0123", text)
    assert changed != text
    summary.write_text(changed)
    with pytest.raises(ValueError, match=r"does not hold the results that ablation.json notes; remove it"):
        _ablate(start, out, variants=few)
    summary.write_text(text)
    (out / "average" / "run.json").unlink()
    other = HPM(start.classifier.trunk, start.classifier.fc, variant=VARIANTS["average"])
    save_checkpoint(out / "average.safetensors", other, start.blueprint)
    for path in (out / "average").iterdir():
        path.unlink()
    pd.testing.assert_frame_equal(_ablate(start, out, variants=few).table, first.table)
    model = load_checkpoint(out / "average.safetensors").model
    assert weights_hash(model) == first.about["variants"]["average"]["sha256"]


def test_an_hpm_stands_for_the_classifier_it_was_built_on(start: Checkpoint) -> None:
    hpm = finetune(start.classifier, _data(40, 0), settings=SETTINGS)
    notes = {"finetune": {"epochs": 3, "lr": 0.01}}
    few = {"average": VARIANTS["average"]}
    one, other = (_ablate(begin, variants=few) for begin in (start, Checkpoint(hpm, start.blueprint, notes)))
    pd.testing.assert_frame_equal(one.table, other.table)
    assert settings_of(Checkpoint(hpm, start.blueprint, notes)) == FinetuneSettings(epochs=3, lr=0.01)
    assert settings_of(hpm) == settings_of(start) == FinetuneSettings()
    with pytest.raises(ValueError, match="notes on its fine-tuning"):
        settings_of(Checkpoint(hpm, start.blueprint, {"finetune": {"momentums": 1}}))


def test_wrong_input_is_noticed_before_any_work(start: Checkpoint, tmp_path: Path) -> None:
    train, test = _data(40, 0), _data(24, 1)
    (tmp_path / "file").write_text("")

    def refused(words: str, *data: Samples, **options: Any) -> None:
        progress = _Stopping("")
        with pytest.raises(ValueError, match=words):
            ablate(start, *data, **({"protocol": _protocol(), "progress": progress} | options))
        assert progress.seen == []

    refused("label 4", train, Samples(test.x, test.y.clamp(max=2) + 2, "t"))
    refused(
        r"one shape, but random has \(1, 8, 8\) and t has \(1, 4, 4\)", train, Samples(test.x[..., :4, :4], test.y, "t")
    )
    refused("'full' is the paper's defence", train, test, variants={"full": Variant(mixer="average")})
    refused("'fc' can't be the name", train, test, variants={"fc": Variant()})
    refused("'../up' can't be the name", train, test, variants={"../up": Variant()})
    refused("can't be the name", train, test, variants={"": Variant()})
    refused("not with a Protocol", train, test, overrides={"threat.eps": 0.1})
    refused("no protocol 'nothing'", train, test, protocol="nothing")
    refused("can't be written", train, test, out=tmp_path / "file")
    (tmp_path / "ablation.json").write_text("[1]")
    refused("not the record of an ablation", train, test, out=tmp_path)
    (tmp_path / "ablation.json").write_text("{")
    refused("not readable", train, test, out=tmp_path)


# The command line.


def _run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.fixture
def files(start: Checkpoint, tmp_path: Path) -> Path:
    """A bare state dict, a checkpoint and data, as a user has them."""
    state = start.classifier.state_dict()
    save_file({name.removeprefix("trunk."): value for name, value in state.items()}, tmp_path / "bare.safetensors")
    save_checkpoint(tmp_path / "classifier.safetensors", start.classifier, start.blueprint)
    for name, count, seed in (("train", 40, 0), ("test", 24, 1)):
        samples = _data(count, seed)
        np.savez(tmp_path / f"{name}.npz", x=samples.x.numpy(), y=samples.y.numpy())
    (tmp_path / "small.toml").write_text(_protocol().text())
    return tmp_path


def _command(files: Path, classifier: str = "classifier.safetensors", *more: object) -> Result:
    return _run("ablate", files / classifier, "--train", files / "train.npz", "--data", files / "test.npz",
                "--protocol", files / "small.toml", "--out", files / "out", "--quiet", *more)  # fmt: skip


TUNE = ("--finetune", "batch_size=8", "--finetune", "lr=1e-2", "--finetune", "steps=2", "--finetune", "eps=1/10",
        "--finetune", "step_size=0.05")  # fmt: skip


@pytest.mark.parametrize(
    "classifier",
    [
        ("classifier.safetensors",),
        ("bare.safetensors", "--architecture", "digits-cnn", "--argument", "width=4"),
    ],
)
def test_the_command_prints_the_table_of_the_api(files: Path, start: Checkpoint, classifier: tuple[str, ...]) -> None:
    result = _command(files, *classifier, *TUNE, "--variant", "inner", "--limit", 6, "--context", "alone")
    assert result.exit_code == 0, result.output
    protocol = load_protocol(files / "small.toml", overrides={"samples.limit": 6, "threat.contexts": ["alone"]})
    data = [_data(*given, name) for given, name in (((40, 0), "train.npz"), ((24, 1), "test.npz"))]
    expected = ablate(start, *data, protocol=protocol, settings=SETTINGS, variants={"inner": VARIANTS["inner"]})
    assert result.stdout.startswith(render_ablation(expected) + "\n")
    assert "alone: accuracy" in result.stdout
    assert result.stderr == ""
    assert {path.name for path in (files / "out").iterdir()} == {
        "ablation.csv", "ablation.json", "full", "inner", "full.safetensors", "inner.safetensors",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("--finetune", "lr=fast"), "--finetune lr: expected a number or a fraction such as 8/255, but got 'fast'"),
        (("--finetune", "epochs=1.5"), "--finetune epochs: expected a whole number, but got 1.5"),
        (("--finetune", "epochs=0"), "unusable settings: epochs = 0"),
        (("--finetune", "seed=3"), "there is no setting 'seed'; available: epochs, batch_size, lr"),
        (("--set", "threat.epsilon=1"), "unknown key threat.epsilon"),
        (("--argument", "width=4"), "give --architecture with it"),
    ],
)
def test_bad_options_are_one_line(files: Path, more: tuple[str, ...], words: str) -> None:
    result = _command(files, "classifier.safetensors", *more)
    assert result.exit_code == 2
    assert words in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert not (files / "out").exists()


def test_ctrl_c_says_what_is_left(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(*given: Any, **options: Any) -> HPM:
        if options["variant"] == VARIANTS["inner"]:
            raise KeyboardInterrupt
        return finetune(*given, **options)

    monkeypatch.setattr(module, "finetune", stopped)
    result = _command(files, "classifier.safetensors", *TUNE, "--variant", "inner")
    assert result.exit_code == 130
    assert "what is finished is in" in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    monkeypatch.undo()
    assert _command(files, "classifier.safetensors", *TUNE, "--variant", "inner").exit_code == 0


OWN = """
    from torch import nn

    def model():
        import torch
        torch.manual_seed(0)
        return nn.Sequential(nn.Flatten(), Scaled(), nn.Linear(64, 6), nn.Linear(6, 4)).eval()

    class Scaled(nn.Module):
        def forward(self, x):
            return 1.0 * x
"""


def _own(folder: Path, scale: str = "1.0") -> Target:
    folder.mkdir()
    text = textwrap.dedent(OWN).replace("1.0", scale)
    (folder / "mine.py").write_text(text)
    return load_target(f"{folder / 'mine.py'}:model", _data(24, 1))


def test_a_target_of_own_code_goes_on_after_a_stop_and_is_named(tmp_path: Path) -> None:
    out, few = tmp_path / "out", {"average": VARIANTS["average"]}
    target = _own(tmp_path / "code")
    with pytest.raises(KeyboardInterrupt):
        _ablate(target, out, variants=few, progress=_Stopping("average: defense"))
    assert (out / "average.safetensors").is_file()
    progress = _Stopping("average: epoch")  # fine-tuned before, so this never comes
    found = _ablate(target, out, variants=few, progress=progress)
    pd.testing.assert_frame_equal(found.table, _ablate(target, variants=few).table)
    assert found.about["target"] == json.loads(json.dumps(target.about))
    assert found.about["target"]["word"] == "mine.py:model"
    run = json.loads((out / "average" / "run.json").read_text())
    assert run["target"]["target"]["code_sha256"] == target.about["code_sha256"]
    trunk = f"{tmp_path / 'code' / 'mine.py'}:model"
    history = load_checkpoint(out / "average.safetensors", trunk=trunk).history
    assert history["target"]["word"] == "mine.py:model"


def test_the_same_weights_behind_other_preprocessing_are_refused(tmp_path: Path) -> None:
    one, other = _own(tmp_path / "one"), _own(tmp_path / "other", "0.5")
    assert weights_hash(one.classifier) == weights_hash(other.classifier)
    few = {"average": VARIANTS["average"]}
    _ablate(one, tmp_path / "out", variants=few)
    with pytest.raises(ValueError, match=r"other settings \(classifier\)"):
        _ablate(other, tmp_path / "out", variants=few)


def test_random_weights_are_marked_in_the_evidence(start: Checkpoint, tmp_path: Path) -> None:
    target = Target(start.classifier, "toy", {"word": "toy", "random_weights": True}, start.blueprint)
    _ablate(target, tmp_path / "out", variants={})
    assert json.loads((tmp_path / "out" / "full" / "run.json").read_text())["target"]["random_weights"] is True


@pytest.mark.parametrize(("more", "seed"), [((), 7), (("--seed", "0"), 0)])
def test_the_stored_seed_of_the_fine_tuning_holds_unless_one_is_given(
    files: Path, start: Checkpoint, more: tuple[str, ...], seed: int
) -> None:
    tuned = finetune(start.classifier, _data(40, 0), settings=SETTINGS)
    notes = {"finetune": asdict(replace(SETTINGS, seed=7))}
    save_checkpoint(files / "hpm.safetensors", tuned, start.blueprint, history=notes)
    result = _command(files, "hpm.safetensors", "--variant", "plain-l2", "--limit", 4, *more)
    assert result.exit_code == 0, result.output
    about = json.loads((files / "out" / "ablation.json").read_text())
    assert about["finetune"]["seed"] == seed
    assert about["seed"] == 0
