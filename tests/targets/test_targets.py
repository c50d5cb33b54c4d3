"""Targets by name: what each word gives, what the results say of it, and what is refused in one line."""

from __future__ import annotations

import importlib.util
import json
import textwrap
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import save_file
from torch import Tensor

from msa_eval import HPM, Classifier, Samples, evaluate, load_checkpoint, load_target, save_checkpoint
from msa_eval.cli import main
from msa_eval.defense.contract import WholeModel
from msa_eval.hashing import weights_hash
from msa_eval.references import reference_path

SOURCE = """
    import torch
    from torch import nn

    def model():
        torch.manual_seed(0)
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 12), nn.Tanh(), nn.Linear(12, 10)).eval()

    class Net(nn.Sequential):
        def __init__(self):
            super().__init__(nn.Flatten(), nn.Linear(64, 10))
            self.eval()

    class Centred:
        def __init__(self):
            self.net = model()
        def features(self, x):
            return self.net[:3](x)
        def logits(self, z):
            return self.net[3](z - z.mean(0))

    ready = model()
    number = 3
    training = lambda: model().train()
    nothing = lambda: None
    broken = lambda: 1 / 0
    random = lambda: nn.Sequential(nn.Flatten(), nn.Dropout(0.5).train(), nn.Linear(64, 10))
    squared = lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 10), nn.Softplus()).eval()
    function = lambda: ready.forward
    def predict(x):
        return ready(x)
    cosine = lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 5), nn.Softmax(1)).eval()
"""
FAST = ("--limit", "16", "--set", "attack.apgd.steps=2", "--set", "attack.square.queries=2", "--set",
        "attack.spsa.queries=3", "--set", "audit.samples=0", "--quiet")  # fmt: skip


@pytest.fixture
def code(tmp_path: Path) -> str:
    (tmp_path / "mine.py").write_text(textwrap.dedent(SOURCE))
    return str(tmp_path / "mine.py")


@pytest.fixture
def x(digits: Samples) -> Tensor:
    return digits.x[:4]


def _run(*arguments: Any) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def _evaluate(word: str, out: Path, *more: Any) -> Result:
    return _run("evaluate", word, "--data", "digits", "--protocol", "quick", "--out", out, *FAST, *more)


def test_a_checkpoint(x: Tensor) -> None:
    target = load_target(reference_path("digits"), x)
    assert isinstance(target.model, HPM)
    assert target.word == "digits.safetensors"
    assert target.about["kind"] == "checkpoint"
    assert isinstance(target.classifier, Classifier)


def test_own_code_is_imported_split_and_named(code: str, x: Tensor) -> None:
    target = load_target(f"{code}:model", x)
    assert isinstance(target.model, Classifier)
    assert target.word == "mine.py:model"
    assert target.about["imported"] == "mine.py:model"
    assert target.about["cut"]["head"] == "3"
    assert target.notes[0].startswith(f"imported your own code: {code}:model")
    assert "split at layer '3', 12 features, 10 classes" in target.notes[1]

    for name in ("Net", "ready"):
        assert isinstance(load_target(f"{code}:{name}", x).model, Classifier)
    defense = load_target(f"{code}:Centred", x)
    assert type(defense.model).__name__ == "Centred"
    with pytest.raises(ValueError, match="not a classifier of a trunk and a fully connected head"):
        _ = defense.classifier
    assert isinstance(load_target(f"{code}:model", x, whole=True).model, WholeModel)


def test_what_cannot_be_split_stays_whole_and_says_why_and_what_it_costs(code: str, x: Tensor, tmp_path: Path) -> None:
    target = load_target(f"{code}:squared", x)
    assert isinstance(target.model, WholeModel)
    assert "followed by more than" in target.model.why
    assert "whole=True" not in target.model.why
    with pytest.raises(ValueError, match=r"which HPM needs \(the logits .*followed by more than"):
        _ = target.classifier
    with pytest.raises(ValueError, match=r"mine.py:squared: .*head=NAME"):
        load_target(f"{code}:squared", x, head="1")
    done = _run(
        "evaluate", f"{code}:squared", "--data", "digits", "--protocol", "quick", "--out", tmp_path / "o", *FAST[:-1]
    )
    assert done.exit_code == 0, done.output
    assert "every query costs a pass of all of it" in " ".join(done.stderr.split())


@pytest.mark.parametrize("name", ["predict", "function"])
def test_a_function_is_taken_for_the_model_or_returned_by_one(name: str, code: str, x: Tensor) -> None:
    target = load_target(f"{code}:{name}", x)
    assert isinstance(target.model, WholeModel)
    assert target.model.logits(x).shape == (4, 10)
    with pytest.raises(ValueError, match="has no head"):
        load_target(f"{code}:{name}", x, head="fc")


def test_code_of_an_installed_module(x: Tensor, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "my_models_for_this_test.py").write_text(textwrap.dedent(SOURCE))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [*__import__("sys").path])
    target = load_target("my_models_for_this_test:model", x)
    assert target.word == "my_models_for_this_test:model"


@pytest.mark.parametrize("form", ["safetensors", "pt", "nested", "prefixed"])
def test_weights_of_own_code(form: str, code: str, x: Tensor, tmp_path: Path) -> None:
    model = torch.nn.Sequential(
        torch.nn.Flatten(), torch.nn.Linear(64, 12), torch.nn.Tanh(), torch.nn.Linear(12, 10)
    ).eval()
    weights, path = model.state_dict(), tmp_path / ("w.safetensors" if form == "safetensors" else "w.pt")
    if form == "safetensors":
        save_file(weights, path)
    else:
        weights = {f"module.{name}": value for name, value in weights.items()} if form == "prefixed" else weights
        torch.save({"state_dict": weights, "epoch": 3} if form == "nested" else weights, path)
    target = load_target(f"{code}:model", x, weights=path)
    assert torch.equal(target.classifier(x), model(x))
    assert target.about["weights"] == path.name
    assert len(target.about["weights_sha256"]) == 64


class _Hostile:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("pwned"),))


def test_weights_that_are_refused(code: str, x: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="no weights file"):
        load_target(f"{code}:model", x, weights=tmp_path / "none.pt")
    torch.save(_Hostile(), tmp_path / "hostile.pt")
    with pytest.raises(ValueError, match=r"not a file of plain weights that torch.load\(weights_only=True\) reads"):
        load_target(f"{code}:model", x, weights=tmp_path / "hostile.pt")
    assert not (tmp_path / "pwned").exists()
    (tmp_path / "text.pt").write_text("hello")
    with pytest.raises(ValueError, match="not a file of plain weights"):
        load_target(f"{code}:model", x, weights=tmp_path / "text.pt")
    torch.save({"epoch": 3}, tmp_path / "epoch.pt")
    with pytest.raises(ValueError, match="no state dict but epoch"):
        load_target(f"{code}:model", x, weights=tmp_path / "epoch.pt")
    torch.save({"1.weight": torch.zeros(3, 64)}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match=r"other.pt does not fit the model: 1.bias is missing; 1.weight is \(3, 64\)"):
        load_target(f"{code}:model", x, weights=tmp_path / "other.pt")


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("{}:modle", r"has no 'modle'; did you mean 'model'\?"),
        ("{}:number", "is a int, not a function"),
        ("{}:nothing", "returned a NoneType; expected a module or function"),
        ("{}:broken", "failed when it was called without arguments: ZeroDivisionError"),
        ("{}:training", r"training mode; call \.eval\(\)"),
        ("{}:random", "training mode"),
        ("{}", "names no function; give .*mine.py:FUNCTION"),
        ("{}x.py:model", "there is no file"),
        ("torchvison:resnet18", r"no module 'torchvison'.*did you mean torchvision:...\?"),
        ("no_such_module:f", "no module 'no_such_module'; expected module:callable"),
        ("resnet18", "there is no target 'resnet18'; expected a .safetensors checkpoint"),
        ("robustbnch", "did you mean robustbench:NAME"),
        ("model.pth", "does not say its architecture; give a model, as torchvision:NAME, with weights=model.pth"),
        ("none.safetensors", "there is no file none.safetensors"),
        ("torchvision:", "there is no target 'torchvision:'"),
    ],
)
def test_words_that_are_refused(word: str, message: str, code: str, x: Tensor) -> None:
    with pytest.raises(ValueError, match=message):
        load_target(word.format(code), x)


def test_options_that_do_not_go_together(code: str, x: Tensor) -> None:
    digits = str(reference_path("digits"))
    for how, message in (
        ({"weights": "w.pt"}, "can't be given weights"),
        ({"random_weights": True}, "can't be given random weights"),
        ({"head": "fc"}, "can't be given a head"),
        ({"trunk": "mine.py:model"}, "was not made from code of your own"),
    ):
        with pytest.raises(ValueError, match=message):
            load_target(digits, x, **how)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="not both"):
        load_target(f"{code}:model", x, weights="w.pt", random_weights=True)
    with pytest.raises(ValueError, match="takes neither random weights"):
        load_target(f"{code}:model", x, random_weights=True)
    with pytest.raises(ValueError, match="stays whole has no head"):
        load_target(f"{code}:model", x, whole=True, head="3")


def test_a_file_that_fails_and_one_that_imports_its_neighbour(x: Tensor, tmp_path: Path) -> None:
    (tmp_path / "bad.py").write_text("import no_such_package_at_all\n")
    with pytest.raises(ValueError, match="can't be imported: ModuleNotFoundError: No module named 'no_such_package"):
        load_target(f"{tmp_path}/bad.py:model", x)
    (tmp_path / "neighbour_of_this_test.py").write_text(textwrap.dedent(SOURCE))
    (tmp_path / "torch.py").write_text("from neighbour_of_this_test import model\n")
    assert isinstance(load_target(f"{tmp_path}/torch.py:model", x).model, Classifier)
    assert __import__("torch") is torch


def test_run_json_names_the_word_and_the_weights(code: str, tmp_path: Path) -> None:
    result = _evaluate(f"{code}:model", tmp_path / "r")
    assert result.exit_code == 0, result.stderr
    run = json.loads((tmp_path / "r" / "run.json").read_text())
    assert run["target"]["word"] == "mine.py:model"
    assert run["target"]["imported"] == "mine.py:model"
    assert len(run["targets"]["defense"]["sha256"]) == 64
    checked = _run("verify", tmp_path / "r", f"{code}:model", "--data", "digits", "--quiet")
    assert "ok      weights" in checked.stdout, checked.stdout


def test_notes_go_to_stderr(code: str, digits: Samples, capsys: pytest.CaptureFixture[str]) -> None:
    from msa_eval.cli.options import Chosen

    Chosen(f"{code}:model", {}).load(digits)
    assert capsys.readouterr().err.startswith(f"note: imported your own code: {code}:model")


def test_errors_are_one_line(code: str, tmp_path: Path) -> None:
    for word in (f"{code}:modle", "resnet18", f"{code}:cosine"):
        result = _evaluate(word, tmp_path / "r")
        assert result.exit_code == 2, result.stderr
        assert len(result.stderr.strip().splitlines()) == 1
    assert "has label 9, but the model has 5 classes" in result.stderr


def test_the_api_takes_words_too(code: str, digits: Samples) -> None:
    results = evaluate(f"{code}:model", digits, protocol="quick", overrides={
        "samples.limit": 8, "attack.apgd.steps": 2, "audit.samples": 0})  # fmt: skip
    assert results.run["target"]["word"] == "mine.py:model"


def test_hpm_on_own_code_is_loaded_again_with_consent(code: str, digits: Samples, tmp_path: Path) -> None:
    out = tmp_path / "hpm.safetensors"
    result = _run(
        "finetune", f"{code}:model", "--data", "digits", "--limit", "300", "--steps", "1", "--out", out, "--quiet"
    )
    assert result.exit_code == 0, result.stderr
    with pytest.raises(
        ValueError, match=r"its trunk is code of your own, mine.py:model; .*trunk=path/to/mine.py:model"
    ):
        load_checkpoint(out)
    loaded = load_checkpoint(out, trunk=f"{code}:model")
    assert isinstance(loaded.model, HPM)
    assert loaded.history["target"]["word"] == "mine.py:model"
    again = load_target(out, digits, trunk=f"{code}:model")
    assert again.about["imported"] == "mine.py:model"
    assert weights_hash(again.model) == weights_hash(loaded.model)  # type: ignore[arg-type]
    x = digits.x[:4]
    assert torch.equal(loaded.classifier(x), load_target(f"{code}:model", x).classifier(x))
    with pytest.raises(ValueError, match="the model has no layer '3'"):
        load_checkpoint(out, trunk=f"{code}:Net")
    assert _evaluate(str(out), tmp_path / "r", "--trunk", f"{code}:model").exit_code == 0


CUT = {"head": "3", "features": 12, "classes": 10, "bias": True, "pool": None, "post": None}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cut": None}, "does not fit its own description"),
        ({"cut": {"depth": 3}}, "does not fit its own description: .*unexpected keyword"),
        ({"cut": {"head": "3"}}, "does not fit its own description: .*missing 2 required"),
        ({"cut": {**CUT, "head": 3}}, "a cut needs a head's name"),
        ({"cut": {**CUT, "bias": "yes"}}, "a cut needs a head's name and whether it has a bias"),
        ({"cut": {**CUT, "features": -1}}, "a cut's features must be a whole number from 1"),
        ({"cut": {**CUT, "features": 12.0}}, "a cut's features must be a whole number"),
        ({"cut": {**CUT, "classes": 10**12}}, "a cut's classes must be a whole number"),
        ({"cut": {**CUT, "features": 2**24}}, "cut at a head of 10x16777216, but holds 10x12"),
        ({"cut": {**CUT, "classes": 5}}, "cut at 5 classes, but says 10"),
        (
            {"cut": {**CUT, "pool": "max"}},
            "a cut's pool must be one of mean, first, rest, last, or none, but got 'max'",
        ),
        ({"cut": {**CUT, "post": ["softmax"]}}, "a cut's post must be one of softmax"),
    ],
)
def test_a_bad_cut_in_a_checkpoint(change: dict[str, Any], message: str, code: str, x: Tensor, tmp_path: Path) -> None:
    target = load_target(f"{code}:model", x)
    assert target.blueprint is not None
    assert target.blueprint.arguments["cut"] == CUT
    save_checkpoint(tmp_path / "a.safetensors", target.classifier, replace(target.blueprint, arguments=change))
    with pytest.raises(ValueError, match=message):
        load_checkpoint(tmp_path / "a.safetensors", trunk=f"{code}:model")


def test_random_weights_stay_flagged_after_fine_tuning(digits: Samples, tmp_path: Path) -> None:
    """However often: the flag of the first start is followed."""
    loaded = load_checkpoint(reference_path("digits"))
    start = {"classifier": "timm:x", "target": {"word": "timm:x", "random_weights": True}}
    save_checkpoint(tmp_path / "once.safetensors", loaded.model, loaded.blueprint, history=start)
    once = load_target(tmp_path / "once.safetensors", digits)
    again = {"classifier": once.word, "target": dict(once.about) | {"random_weights": None}}
    save_checkpoint(tmp_path / "twice.safetensors", loaded.model, loaded.blueprint, history=again)
    for name in ("once", "twice"):
        target = load_target(tmp_path / f"{name}.safetensors", digits)
        assert target.about["random_weights"] is True
        assert f"{name}.safetensors was made of random weights: these numbers say nothing" in target.notes[0]
    assert _evaluate(str(tmp_path / "twice.safetensors"), tmp_path / "r").exit_code == 0
    refused = _run("entry", tmp_path / "r")
    assert refused.exit_code == 2
    assert "these results are of random weights, so they can't become an entry" in refused.stderr
    assert "random_weights" not in load_target(reference_path("digits"), digits).about


def test_other_code_of_the_same_shapes_is_told(code: str, digits: Samples, tmp_path: Path) -> None:
    target = load_target(f"{code}:model", digits)
    assert target.blueprint is not None
    out, note = tmp_path / "a.safetensors", "is not the file that a.safetensors was made from: its SHA-256 differs"
    save_checkpoint(out, target.classifier, target.blueprint, history={"target": dict(target.about)})
    assert not any(note in message for message in load_target(out, digits, trunk=f"{code}:model").notes)
    (tmp_path / "other.py").write_text(textwrap.dedent(SOURCE).replace("nn.Tanh()", "nn.ReLU()"))
    other = load_target(out, digits, trunk=f"{tmp_path}/other.py:model")
    assert any(note in message for message in other.notes)
    # And what is made of that in turn names the code that it came from.
    save_checkpoint(out, other.classifier, target.blueprint, history={"target": dict(other.about)})  # type: ignore[arg-type]
    assert any(note in message for message in load_target(out, digits, trunk=f"{tmp_path}/other.py:model").notes)


def test_a_checkpoint_that_could_not_be_loaded_again_is_not_begun(
    digits: Samples, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fine-tuning builds the model without its weights first."""
    if importlib.util.find_spec("timm") is None:
        pytest.skip("the extra [robustbench] is not installed")
    from msa_eval.targets import building, zoos

    def made(*, random: bool) -> torch.nn.Module:
        if random:
            raise ValueError("lone:net can't be built without its pretrained weights")
        return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 10)).eval()

    samples = Samples(digits.x[:64].expand(-1, 3, -1, -1).contiguous(), digits.y[:64], "grey")
    np.savez(tmp_path / "d.npz", x=samples.x.numpy(), y=samples.y.numpy())
    monkeypatch.setitem(zoos.ZOOS, "timm", lambda name, wanted: building.Built(made(random=wanted.random)))  # type: ignore[arg-type]
    arguments = ("finetune", "timm:net", "--data", tmp_path / "d.npz", "--out", tmp_path / "h.safetensors", "--quiet")
    refused = _run(*arguments)
    assert refused.exit_code == 2, refused.output
    assert "a checkpoint of timm:net could not be loaded again: lone:net can't be built" in refused.stderr
    assert not (tmp_path / "h.safetensors").exists()
    wider = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 10), torch.nn.BatchNorm1d(10)).eval()
    monkeypatch.setitem(  # type: ignore[arg-type]
        zoos.ZOOS, "timm", lambda name, wanted: building.Built(wider if wanted.random else made(random=False))
    )
    assert "could not be loaded again: trunk.body.2.bias is missing" in _run(*arguments).stderr
