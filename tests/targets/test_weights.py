"""Weights as training scripts, wrappers and profilers leave them, and files that hold more than weights."""

from __future__ import annotations

import argparse
import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from msa_eval import load_checkpoint, load_target, save_checkpoint
from msa_eval.targets import building, zoos
from msa_eval.targets.building import Built, Wanted
from msa_eval.targets.weights import load_weights, read_weights


def _net(seed: int = 0) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 2)).eval()


NET = _net()
STATE = NET.state_dict()


def _put(prefix: str, state: dict[str, Any] = STATE) -> dict[str, Tensor]:
    return {prefix + name: value for name, value in state.items()}


def _loaded(held: object, folder: Path, key: str = "") -> tuple[nn.Module, list[str]]:
    torch.save(held, folder / "w.pt")
    model = _net(1)
    weights = read_weights(str(folder / "w.pt") + key)
    return model, [*weights.notes, *load_weights(model, weights.tensors, source="w.pt")]


def _same(model: nn.Module, state: dict[str, Any] = STATE) -> bool:
    return all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


PREFIXES = ("", "module.", "net.", "backbone.", "model.", "_orig_mod.module.", "module._orig_mod.", "a.b.c.")


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("holder", ["", "state_dict", "model", "weights", "model_state", "ema.module"])
def test_any_prefix_within_any_holder(prefix: str, holder: str, tmp_path: Path) -> None:
    held: dict[str, Any] = _put(prefix)
    for name in reversed(holder.split(".") if holder else []):
        held = {name: held, "epoch": 3, "optimizer": {"state": {0: {"exp_avg": torch.zeros(2)}}}}
    model, notes = _loaded(held, tmp_path)
    assert _same(model)
    assert notes == []


def test_what_belongs_to_no_layer_is_passed_over_and_said(tmp_path: Path) -> None:
    model, notes = _loaded(
        _put("module.") | {"n_averaged": torch.tensor(3), "module.0.total_ops": torch.zeros(1)}, tmp_path
    )
    assert _same(model)
    assert notes == [f"{n} in w.pt belongs to no layer and is ignored" for n in ("n_averaged", "module.0.total_ops")]
    mean = {"normalize.mean": torch.tensor([0.5]).view(1, 1, 1), "normalize.std": torch.tensor([0.25])}
    model, notes = _loaded(_put("model.") | mean, tmp_path)
    assert _same(model)
    assert [note.partition(",")[0] for note in notes] == [
        "w.pt holds normalize.mean = [0.5]", "w.pt holds normalize.std = [0.25]",
    ]  # fmt: skip


def test_one_of_several_sets_is_taken_and_the_choice_said(tmp_path: Path) -> None:
    other = _net(2).state_dict()
    held = {"state_dict_ema": other, "state_dict": STATE, "ema": {"module": other}}
    model, notes = _loaded(held, tmp_path)
    assert _same(model)
    assert len(notes) == 1
    assert notes[0].startswith("w.pt holds 3 sets of weights (state_dict_ema, state_dict, ema.module), of which state_")
    assert notes[0].endswith("w.pt:state_dict_ema takes another")
    assert read_weights(tmp_path / "w.pt").about["weights_key"] == "state_dict"
    for key in (":state_dict_ema", ":ema.module"):
        model, _ = _loaded(held, tmp_path, key)
        assert _same(model, other)
    with pytest.raises(ValueError, match=r"no weights called 'em'; it holds state_dict_ema, state_dict, ema.module"):
        _loaded(held, tmp_path, ":em")
    save_file(dict(STATE), tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match="holds one set of weights; leave :ema out"):
        read_weights(f"{tmp_path / 'w.safetensors'}:ema")


@pytest.mark.parametrize(
    ("held", "message"),
    [
        (
            {f"layer{name}": value for name, value in STATE.items()},
            r"0.bias is missing; .* and \d+ more; the file has layer\S+, layer\S+, layer\S+ and \d more",
        ),
        (STATE | {"3.weight": torch.zeros(1)}, "3.weight is not part of the model$"),
        ({k: v for k, v in STATE.items() if k != "2.bias"}, "2.bias is missing$"),
        (STATE | {"2.bias": torch.full((2,), torch.nan)}, "2.bias holds values that are not finite"),
        ({"epoch": 3, "optimizer": {"a": torch.zeros(1)}}, "holds no state dict but epoch, optimizer"),
        (torch.zeros(2), "holds no state dict but Tensor"),
        ({}, "holds no state dict but nothing"),
    ],
)
def test_what_does_not_fit_is_named_on_both_sides(held: object, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        _loaded(held, tmp_path)


@pytest.mark.parametrize(
    ("held", "named"),
    [
        (NET, r"an object of the class torch.nn.modules.container.Sequential"),
        ({"state_dict": STATE, "args": argparse.Namespace(lr=1)}, r"holds an object of the class argparse.Namespace"),
        ({"model": STATE, "args": argparse.Namespace(lr=1)}, r"holds an object of the class argparse.Namespace"),
        ({"model": NET, "epoch": 3}, r"holds an object of the class torch.nn.modules.container.Sequential"),
        ({"model": NET, "state_dict": STATE}, r"holds an object of the class torch.nn.modules.container.Sequential"),
    ],
)
def test_the_line_that_is_advised_makes_a_clean_file(held: object, named: str, tmp_path: Path) -> None:
    torch.save(held, tmp_path / "w.pt")
    with pytest.raises(ValueError, match=named) as caught:
        read_weights(tmp_path / "w.pt")
    line = str(caught.value).partition("make a clean one: ")[2]
    subprocess.run([sys.executable, "-c", f"import torch; {line}"], cwd=tmp_path, check=True)
    model = _net(1)
    load_weights(model, read_weights(tmp_path / "clean.pt").tensors, source="clean.pt")
    assert _same(model)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is empty; fetch it again"),
        (b"version https://git-lfs.github.com/spec/v1\n", "is a Git LFS pointer, not the weights; run git lfs pull"),
        (b"\n<!DOCTYPE html>", "is a web page, not the weights; fetch what it links to"),
        (b"weights", r"\(it is of another kind\); save model.state_dict\(\)"),
    ],
)
def test_what_came_in_place_of_the_weights_is_named(content: bytes, said: str, tmp_path: Path) -> None:
    (tmp_path / "w.pt").write_bytes(content)
    with pytest.raises(ValueError, match=said):
        read_weights(tmp_path / "w.pt")


def test_a_torchscript_archive_is_named(tmp_path: Path) -> None:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.script(NET).save(str(tmp_path / "w.pt"))
    with pytest.raises(ValueError, match=r"is a TorchScript archive.*torch.jit.load\(\"w.pt\".*state_dict\(\)"):
        read_weights(tmp_path / "w.pt")


with torch.random.fork_rng():
    torch.manual_seed(0)
    ZOO_NET = nn.Sequential(nn.Flatten(), nn.Linear(12, 4)).eval()


def _zoo(name: str, wanted: Wanted) -> Built:
    return building.normalised(
        Built(copy.deepcopy(ZOO_NET)), {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.25, 0.5)}, 2, wanted
    )


def test_a_normalisation_is_told_changed_left_out_and_kept_in_a_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(zoos.ZOOS, "toy", _zoo)
    monkeypatch.setattr("importlib.metadata.version", lambda name: "1")
    x = torch.rand(2, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    mean, std = [0.1, 0.2, 0.3], [1.0, 2.0, 3.0]
    for given, expected, said in (
        (
            {},
            (x - 0.5) / torch.tensor([0.5, 0.25, 0.5]).view(3, 1, 1),
            "by mean 0.5, 0.5, 0.5 and std 0.5, 0.25, 0.5 in",
        ),
        ({"mean": mean, "std": std}, (x - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1), "asked"),
        ({"mean": "none"}, x, "by mean 0, 0, 0 and std 1, 1, 1 inside the model, as was asked for"),
    ):
        made = load_target("toy:net", x, **given)  # type: ignore[arg-type]
        assert any(said in note for note in made.notes)
        torch.testing.assert_close(made.classifier(x), ZOO_NET(expected))
        assert made.blueprint is not None
        save_checkpoint(tmp_path / "c.safetensors", made.classifier, made.blueprint)
        torch.testing.assert_close(load_checkpoint(tmp_path / "c.safetensors").classifier(x), made.classifier(x))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"mean": [0.5] * 3}, "expected mean and std of 3 channels"),
        ({"mean": [0.5], "std": [1.0]}, "expected mean and std of 3 channels"),
        ({"mean": [0.5] * 3, "std": [0.0] * 3}, "std above 0"),
        ({"mean": "none", "std": [1.0] * 3}, "give no std with it"),
    ],
)
def test_what_is_no_normalisation(given: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(zoos.ZOOS, "toy", _zoo)
    with pytest.raises(ValueError, match=message):
        load_target("toy:net", torch.zeros(2, 3, 2, 2), **given)
