"""``msa-eval export``: points on the packaged reference, from the evaluation to pictures."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
from click.testing import CliRunner, Result
from PIL import Image

from msa_eval.cli import main
from msa_eval.cli.messages import as_options
from msa_eval.references import reference_path

DIGITS = str(reference_path("digits"))
SHORT = {
    "attack.square.queries": 4, "attack.spsa.queries": 3, "attack.apgd.steps": 2, "attack.apgd.passes": 10,
    "attack.apgd.overtime": 2, "attack.recombination.steps": 2, "attack.recombination.classes": 2,
    "attack.recombination.passes": 12, "audit.samples": 0, "threat.levels": 256, "threat.eps": 0.05,
}  # fmt: skip
FAST = ("--limit", "12", *(word for key, value in SHORT.items() for word in ("--set", f"{key}={value}")))


def _run(*arguments: str) -> Result:
    return CliRunner().invoke(main, list(arguments))


def _evaluate(out: Path, *more: str) -> Result:
    given = ("--data", "digits", "--protocol", "digits", "--quiet", "--out", str(out), *FAST, *more)
    return _run("evaluate", *more[:1], DIGITS, *given)


def test_from_an_evaluation_to_pictures(tmp_path: Path) -> None:
    result = _evaluate(tmp_path / "r", "--save-adversarial=all")
    assert result.exit_code == 0, result.stderr
    exported = _run("export", str(tmp_path / "r"), "--format", "png")
    assert exported.exit_code == 0, exported.stderr
    assert "undo" not in exported.stderr
    assert "lives in its adversarial batch" in exported.stderr
    place = tmp_path / "r" / "export" / "defense-joint"
    assert str(place) in exported.stdout
    manifest = pd.read_csv(place / "manifest.csv")
    samples = pd.read_csv(tmp_path / "r" / "samples.csv").query("target == 'defense'").reset_index(drop=True)
    assert (manifest["index"] == samples["index"]).all()
    assert (manifest["broken"] == ~samples["robust"]).all()
    for file, label in zip(manifest["file"], manifest["label"], strict=True):
        assert file.startswith(f"images/{label}/")
        with Image.open(place / file) as image:
            assert image.size == (8, 8)
    assert _run("export", str(tmp_path / "r"), "--target", "fc", "--out", str(tmp_path / "npz")).exit_code == 0
    with np.load(tmp_path / "npz" / "fc-joint" / "adversarial.npz") as arrays:
        assert arrays["x"].shape == (12, 1, 8, 8)
        assert arrays["x"].dtype == np.uint8


def test_the_option_without_a_value_means_what_it_meant(tmp_path: Path) -> None:
    """It is a flag, so that what follows it is the target."""
    assert _evaluate(tmp_path / "r", "--save-adversarial").exit_code == 0
    assert (tmp_path / "r" / "adversarial.safetensors").is_file()
    assert not (tmp_path / "r" / "points.safetensors").exists()
    refused = _run("export", str(tmp_path / "r"))
    assert refused.exit_code == 2
    assert refused.stderr.strip().endswith("make the evaluation again with --save-adversarial=all")


def test_advice_is_in_options() -> None:
    assert as_options('use save_adversarial="all" and format=npz') == "use --save-adversarial=all and --format npz"
    assert as_options("made without save_adversarial=True") == "made without --save-adversarial"
