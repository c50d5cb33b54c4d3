"""The command line as a user meets it: real processes, exit statuses, streams, and bad input."""

from __future__ import annotations

import io
import os
import re
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner, Result
from safetensors.torch import save_file

from msa_eval import HPM, Blueprint, Samples, load_checkpoint, save_checkpoint
from msa_eval.cli import main, messages
from msa_eval.cli.messages import as_options, warnings_as_notes
from msa_eval.references import reference_path

DIGITS = str(reference_path("digits"))
BUDGETS = {
    "attack.square.queries": 4, "attack.spsa.queries": 3, "attack.apgd.steps": 2, "attack.apgd.passes": 20,
    "attack.apgd.overtime": 2, "attack.recombination.steps": 2, "attack.recombination.classes": 2,
    "attack.recombination.passes": 20, "audit.samples": 0,
}  # fmt: skip
FAST = ("--limit", "24", *(word for key, value in BUDGETS.items() for word in ("--set", f"{key}={value}")))


@pytest.fixture(autouse=True)
def no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages have tests of their own, and drawing one takes as long as an evaluation here."""
    monkeypatch.setattr("msa_eval.report.page.KINDS", ())


def _run(*arguments: str) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def _evaluate(out: Path, *more: str) -> Result:
    return _run("evaluate", DIGITS, "--data", "digits", "--protocol", "digits", "--out", str(out), *FAST, *more)


def _check_refused(result: Result, message: str) -> None:
    """One clear line on stderr and exit status 2."""
    assert result.exit_code == 2
    assert isinstance(result.exception, SystemExit)
    assert re.search(message, result.stderr), result.stderr
    said = [line for line in re.split(r"[\r\n]+", result.stderr) if line.strip() and "it/s]" not in line]  # no bars
    assert len(said) == 1
    assert result.stdout == ""


def test_evaluate_shows_a_table_and_writes_the_evidence(tmp_path: Path) -> None:
    result = _evaluate(tmp_path / "r")
    assert result.exit_code == 0
    lines = {line.split()[0]: line for line in result.stdout.splitlines() if line.strip()}
    assert lines["protocol"].startswith("protocol digits v10 (modified: ")
    summary = pd.read_csv(tmp_path / "r" / "summary.csv").set_index(["target", "metric"])
    for metric in ("clean", "paper", "realised", "worst_case"):
        shown = re.findall(r"(\d+\.\d) \[", lines[metric])
        expected = [summary.loc[(target, metric), "value"] for target in ("fc", "defense")]
        assert shown == [f"{100 * value:.1f}" for value in expected]
    assert lines["soft-hybrid@0.3:apgd-margin:0"].split()[1] == "-"
    assert lines["verdict:"] == "verdict: not audited"
    assert "defense joint" in result.stderr
    assert "fc joint" in result.stderr


def test_a_folder_in_the_models_own_order_prepared(tmp_path: Path) -> None:
    from PIL import Image

    for name in ("8", "3"):
        (tmp_path / "data" / name).mkdir(parents=True)
        for i in range(2):
            Image.new("L", (12, 10), 90 * i).save(tmp_path / "data" / name / f"{i}.png")
    (tmp_path / "classes.txt").write_text("".join(f"{label}\n" for label in range(10)))
    given = ["--data", str(tmp_path / "data"), "--classes", str(tmp_path / "classes.txt"), "--resize", "9", "--crop",
             "8"]  # fmt: skip
    result = _run("evaluate", DIGITS, *given, "--protocol", "digits", "--out", str(tmp_path / "r"), *FAST)
    assert result.exit_code == 0, result.stderr
    assert "note: labels by class folder: 3 = 3, 8 = 8" in result.stderr
    assert "data, shorter side resized to 9 (bilinear), center crop of 8: 4 samples in 1 batch" in " ".join(
        result.stdout.split()
    )
    samples = pd.read_csv(tmp_path / "r" / "samples.csv")
    assert sorted(samples[samples["target"] == "fc"]["label"]) == [3, 3, 8, 8]
    assert _run("verify", str(tmp_path / "r"), DIGITS, *given[:2], "--quiet").exit_code == 1
    checked = _run("verify", str(tmp_path / "r"), DIGITS, *given, "--quiet")
    assert "ok      data" in checked.stdout


def test_quiet_means_nothing_on_stderr(tmp_path: Path) -> None:
    result = _evaluate(tmp_path / "r", "--quiet")
    assert result.exit_code == 0
    assert result.stderr == ""


def test_options_reach_the_protocol(tmp_path: Path) -> None:
    result = _evaluate(tmp_path / "r", "--quiet", "--batch-size", "5", "--seed", "3", "--set", "threat.eps=2/255")
    assert result.exit_code == 0
    import json

    run = json.loads((tmp_path / "r" / "run.json").read_text())
    assert run["seed"] == 3
    assert run["protocol"]["overrides"] == {
        "samples.limit": 24,
        "batches.size": 5,
        **BUDGETS,
        "threat.eps": "2/255",
    }
    assert pd.read_csv(tmp_path / "r" / "batches.csv")["batch"].nunique() == 5
    assert pd.read_csv(tmp_path / "r" / "outcomes.csv")["perturbation"].max() <= 2 / 255 + 1e-6


def test_no_command_shows_where_to_start() -> None:
    result = _run()
    assert result.exit_code == 0
    commands = [line.split()[1] for line in result.stdout.splitlines() if line.startswith("  msa-eval")]
    assert commands == ["demo", "evaluate", "doctor"]
    assert "msa-eval --help" in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= 100


def test_a_bar_on_a_terminal_moves_while_a_step_takes_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    shown = Terminal()
    monkeypatch.setattr(sys, "stderr", shown)
    monkeypatch.setattr(messages, "REFRESH", 0.01)
    for _ in messages.bars(False)(range(1), "runs"):
        before = shown.getvalue().count("runs")
        time.sleep(0.2)
        assert shown.getvalue().count("runs") >= before + 3
    after = shown.getvalue()
    time.sleep(0.05)
    assert shown.getvalue() == after


def test_the_threat_has_options_of_its_own(tmp_path: Path) -> None:
    result = _evaluate(tmp_path / "r", "--eps", "0.5/255", "--norm", "l2")
    assert result.exit_code == 0, result.stderr
    assert "(modified: " in result.stdout
    assert "threat.eps=0.5/255, threat.norm=L2" in result.stdout
    _check_refused(_evaluate(tmp_path / "s", "--eps", "much"), "threat.eps: expected a number")
    _check_refused(_evaluate(tmp_path / "s", "--set", "eps=0.1"), r"unknown key eps \(did you mean threat.eps\?\)")


def test_advice_is_in_options_where_the_call_was_a_command() -> None:
    for said, shown in {
        "start anew with force=True, which keeps it": "start anew with --force, which keeps it",
        "weights=a/b.pt and head=NAME; save_adversarial=True": "--weights a/b.pt and --head NAME; --save-adversarial",
        'use overrides={"attack.apgd.losses": ["ce"]}': "use --set 'attack.apgd.losses=[\"ce\"]'",
        "engine=ray, cpus=2": "--engine ray, --cpus-per-worker 2",
        "a file forehead=3, overhead=True": "a file forehead=3, overhead=True",
    }.items():
        assert as_options(said) == shown


def test_contexts_and_a_victim_reach_the_engine(tmp_path: Path) -> None:
    result = _evaluate(tmp_path / "r", "--quiet", "--context", "alone", "--context", "composed", "--limit", "6")
    assert result.exit_code == 0, result.stderr
    assert list(pd.read_csv(tmp_path / "r" / "summary.csv")["context"].unique()) == ["alone", "composed"]

    index = int(pd.read_csv(tmp_path / "r" / "samples.csv")["index"].iloc[5])
    few = ("--quiet", "--batch-size", "8")
    result = _evaluate(tmp_path / "v", *few, "--victim", str(index))
    assert result.exit_code == 0, result.stderr
    batch_plan = pd.read_csv(tmp_path / "v" / "batches.csv")
    assert len(batch_plan) == 8
    assert index in batch_plan["index"].tolist()
    row = pd.read_csv(tmp_path / "v" / "samples.csv").set_index(["target", "index"]).loc[("defense", index)]
    fate = (
        "wrong on" if not row["clean_correct"] else "not broken" if row["robust"] else f"broken by {row['broken_by']}"
    )
    assert f"sample {index}, defense, joint: {fate}" in result.stdout
    _check_refused(
        _evaluate(tmp_path / "w", *few, "--victim", "99999"), "the victim, sample 99999, is not among the 24"
    )
    _check_refused(
        _run(
            "evaluate", DIGITS, "--data", "digits", "--protocol", "quick", "--out", str(tmp_path / "q"), "--victim", "3"
        ),
        "no run moves companions",
    )


def test_strict_exits_with_3_unless_the_verdict_is_sound(tmp_path: Path) -> None:
    """Not audited is not sound; nor is a defence whose audit fires. The table and the results are the same."""
    result = _evaluate(tmp_path / "r", "--quiet", "--strict")
    assert result.exit_code == 3
    assert (tmp_path / "r" / "summary.csv").is_file()
    assert "verdict: not audited" in result.stdout


def test_what_is_saved_is_verified_and_a_changed_bit_is_found(tmp_path: Path) -> None:
    two = ("--context", "joint", "--context", "composed")
    result = _evaluate(tmp_path / "r", "--quiet", "--save-adversarial", *two, "--limit", "8", "--batch-size", "4")
    assert result.exit_code == 0, result.stderr
    checked = _run("verify", str(tmp_path / "r"), DIGITS, "--data", "digits", "--quiet")
    assert checked.exit_code == 0, checked.stdout + checked.stderr
    broken = pd.read_csv(tmp_path / "r" / "samples.csv").query("clean_correct and not robust")
    assert f"verified: {len(broken)} of {len(broken)} broken samples" in checked.stdout

    path = tmp_path / "r" / "adversarial.safetensors"
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(bytes(content))
    assert _run("verify", str(tmp_path / "r"), DIGITS, "--data", "digits", "--quiet").exit_code == 1


def test_batch_sizes(tmp_path: Path) -> None:
    result = _run(
        "batch-sizes", DIGITS, "--data", "digits", "--protocol", "digits", "--out", str(tmp_path / "r"), *FAST,
        "--sizes", "1,8,24", "--quiet",
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    table = pd.read_csv(tmp_path / "r" / "batch_sizes.csv")
    assert table["batch_size"].unique().tolist() == [1, 8, 24]
    clean = table.query("metric == 'clean' and context == 'joint'").set_index("batch_size")["value"]
    for size, value in clean.items():
        assert re.search(rf"\b{size} +{100 * value:.1f} \[", result.stdout)
    checked = _run("verify", str(tmp_path / "r" / "batch-8"), DIGITS, "--data", "digits", "--quiet")
    *checks, replay, _ = checked.stdout.splitlines()
    assert all(line.startswith("ok ") for line in checks)
    assert replay.endswith("the run was made without --save-adversarial")
    refused = _run("batch-sizes", DIGITS, "--data", "digits", "--out", str(tmp_path / "s"), "--sizes", "8,x")
    assert refused.exit_code == 2
    assert "is not a list of whole numbers" in refused.stderr


def test_demo_in_a_new_folder(demo: Any) -> None:
    assert demo.ended.returncode == 0, demo.ended.stderr
    assert demo.ended.stderr == ""
    summary = pd.read_csv(demo.out / "summary.csv").set_index(["target", "metric"])
    assert (summary["n"] == 120).all()
    assert 0.4 < summary.loc[("fc", "worst_case"), "value"] < 0.8
    assert summary.loc[("defense", "worst_case"), "value"] < summary.loc[("defense", "paper"), "value"]
    assert "worst_case" in demo.ended.stdout


def test_finetune_then_evaluate(tmp_path: Path) -> None:
    """The two commands of the README, on a classifier checkpoint and on a bare state dict."""
    loaded = load_checkpoint(DIGITS)
    assert isinstance(loaded.model, HPM)
    classifier = loaded.model.fc_target
    save_checkpoint(tmp_path / "classifier.safetensors", classifier, loaded.blueprint)
    bare = {name.removeprefix("trunk."): value for name, value in classifier.state_dict().items()}
    save_file(bare, tmp_path / "bare.safetensors")
    common = ("--data", "digits", "--eps", "0.15", "--steps", "2", "--limit", "200", "--quiet")
    described = ("--architecture", "digits-cnn", "--argument", "width=16")
    for name, extra in (("classifier", ()), ("bare", described)):
        out = tmp_path / f"{name}-hpm.safetensors"
        result = _run("finetune", str(tmp_path / f"{name}.safetensors"), "--out", str(out), *common, *extra)
        assert result.exit_code == 0, result.output
        assert "HPM checkpoint in" in result.stdout
    first, second = (load_checkpoint(tmp_path / f"{name}-hpm.safetensors") for name in ("classifier", "bare"))
    for (key, one), two in zip(first.model.state_dict().items(), second.model.state_dict().values(), strict=True):
        assert np.array_equal(one.numpy(), two.numpy()), key
    assert first.history["finetune"]["steps"] == 2
    (tmp_path / "file").write_text("")
    for arguments, message in {
        (DIGITS, "--out", str(tmp_path / "file" / "x")): "can't be written: ",
        (DIGITS, "--out", str(tmp_path / "x"), "--argument", "width=7"): "give --architecture with it",
        (DIGITS, "--out", str(tmp_path / "x"), *described, "--weights", "w.pt"): "--weights does not go with --arch",
        (DIGITS, "--out", str(tmp_path / "x"), *described, "--random-weights"): "--random-weights does not go with",
        (DIGITS, "--out", str(tmp_path / "x"), *described, "--whole"): "--whole does not go with --architecture",
        (DIGITS, "--out", str(tmp_path / "x"), *described, "--trunk", "a:b"): "--trunk does not go with --architecture",
        (DIGITS, "--out", str(tmp_path / "x"), "--device", "warp"): "device 'warp' can't be used",
    }.items():
        _check_refused(_run("finetune", *arguments, *common), message)
    result = _run(
        "evaluate", str(tmp_path / "bare-hpm.safetensors"), "--data", "digits", "--protocol", "digits",
        "--out", str(tmp_path / "r"), *FAST,
    )  # fmt: skip
    assert result.exit_code == 0
    _check_refused(
        _run("finetune", str(tmp_path / "bare.safetensors"), "--out", str(tmp_path / "x"), *common), "no msa-eval check"
    )
    _check_refused(
        _run("finetune", DIGITS, "--out", str(tmp_path / "bare-hpm.safetensors"), *common), "exists; choose another"
    )


def test_protocols_are_listed_and_shown() -> None:
    listed = _run("protocols")
    assert listed.exit_code == 0
    assert listed.stdout == _run("protocols", "list").stdout
    names = [line.split()[0] for line in listed.stdout.splitlines()]
    assert names == ["black-box", "digits", "msa", "paper-cifar10", "paper-cifar100", "paper-imagenet", "quick"]
    assert 'eps = "4/255"' in _run("protocols", "show", "paper-imagenet").stdout
    _check_refused(_run("protocols", "show", "digit"), "did you mean 'digits'")


def _npz(folder: Path, name: str, x: Any, y: Any) -> str:
    np.savez(folder / name, x=x, y=y)
    return str(folder / name)


def test_bad_input_gets_one_line_and_status_2(tmp_path: Path, digits: Samples) -> None:
    x, y = digits.x[:8].numpy(), digits.y[:8].numpy()
    two = Blueprint("digits-cnn", {"width": 2}, 2)
    save_checkpoint(tmp_path / "two.safetensors", two.build().eval(), two)
    (tmp_path / "text.safetensors").write_text("hello")
    good = _npz(tmp_path, "good.npz", x, y)
    zeros = _npz(tmp_path, "zeros.npz", x, 0 * y)

    def evaluate(checkpoint: str = DIGITS, data: str = good, *more: str) -> Result:
        return _run(
            "evaluate", checkpoint, "--data", data, "--protocol", "digits", "--out", str(tmp_path / "r"), *FAST, *more
        )

    cases = {
        "there is no file .*none": evaluate(str(tmp_path / "none")),
        "not a readable safetensors file": evaluate(str(tmp_path / "text.safetensors")),
        "there is no file .*none.npz": evaluate(DIGITS, str(tmp_path / "none.npz")),
        r"images in \[0, 1\]": evaluate(DIGITS, _npz(tmp_path, "bright.npz", 16 * x, y)),
        "NaN or infinite": evaluate(DIGITS, _npz(tmp_path, "nan.npz", x + np.nan, y)),
        r"shape \(N, C, H, W\), \(N, H, W, C\) or": evaluate(DIGITS, _npz(tmp_path, "flat.npz", x.reshape(8, 64), y)),
        "can't take a float32 batch of images of shape": evaluate(
            DIGITS, _npz(tmp_path, "rgb.npz", np.repeat(x, 3, axis=1), y)
        ),
        "label 11, but the model has 10": evaluate(DIGITS, _npz(tmp_path, "label.npz", x, 0 * y + 11)),
        "lowest is -1": evaluate(DIGITS, _npz(tmp_path, "negative.npz", x, 0 * y - 1)),
        "dlr loss needs at least 3 classes": _run(
            "evaluate",
            str(tmp_path / "two.safetensors"),
            "--data",
            zeros,
            "--protocol",
            "quick",
            "--out",
            str(tmp_path / "r"),
        ),
        r"unknown key attack\.quers \(did you": evaluate(DIGITS, good, "--set", "attack.quers=3"),
        r"attack\.apgd\.steps: expected a whole": evaluate(DIGITS, good, "--set", "attack.apgd.steps=x"),
    }
    for message, result in cases.items():
        _check_refused(result, message)
    assert not (tmp_path / "r").exists()


def test_an_output_folder_with_other_results_is_kept(tmp_path: Path) -> None:
    assert _evaluate(tmp_path / "r", "--quiet").exit_code == 0
    assert _evaluate(tmp_path / "r", "--quiet").exit_code == 0
    before = {path.name: path.read_bytes() for path in (tmp_path / "r").iterdir()}
    _check_refused(_evaluate(tmp_path / "r", "--seed", "1"), "results of another evaluation")
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "r").iterdir()}
    assert _evaluate(tmp_path / "r", "--quiet", "--seed", "1", "--force").exit_code == 0


def test_usage_errors_of_click_itself(tmp_path: Path) -> None:
    result = _run("evaluate", DIGITS, "--data", "digits", "--protocol", "quick", "--out", str(tmp_path), "--set", "x")
    assert result.exit_code == 2
    assert "not of the form key=value" in result.stderr


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_ctrl_c_stops_cleanly_and_leaves_earlier_results(tmp_path: Path) -> None:
    assert _evaluate(tmp_path / "r", "--quiet").exit_code == 0
    before = {path.name: path.read_bytes() for path in (tmp_path / "r").iterdir()}
    # A shell may start the tests with SIGINT ignored, which children inherit.
    program = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); from msa_eval.cli import main; main()"
    )
    command = [
        sys.executable, "-c", program, "evaluate", DIGITS, "--data", "digits", "--protocol", "digits",
        "--out", str(tmp_path / "r"), "--force", "--limit", "120", "--set", "audit.samples=0",
    ]  # fmt: skip
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=tmp_path)
    assert process.stderr is not None
    seen = ""
    while not re.search(r"defense joint: +[1-9]\d*%", seen):
        read = process.stderr.read(1)
        assert read, f"it ended early: {seen}"
        seen += read
    time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    out, rest = process.communicate(timeout=60)
    assert process.returncode == 130
    assert out == ""
    assert rest.strip().splitlines()[-1].endswith("without --force goes on from there; no earlier results were changed")
    assert "Traceback" not in rest
    (kept,) = tmp_path.glob("r-*")
    assert before == {path.name: path.read_bytes() for path in kept.iterdir()}


def test_sigterm_is_told_apart_where_a_library_makes_a_bare_interrupt_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def waiting(*_: Any, **__: Any) -> None:
        try:
            signal.raise_signal(signal.SIGTERM)
        except KeyboardInterrupt:
            raise KeyboardInterrupt("told") from None

    monkeypatch.setattr("msa_eval.cli.protocols.protocols.callback", waiting)
    result = _run("protocols")
    assert result.exit_code == 143
    assert result.stderr == "Error: told\n"


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    result = _run("--debug", "evaluate", "none", "--data", "digits", "--protocol", "quick", "--out", str(tmp_path))
    assert isinstance(result.exception, ValueError)


def test_warnings_are_notes(capfd: pytest.CaptureFixture[str]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        with warnings_as_notes():
            sys.stderr.write(warnings.formatwarning("it is whole (whole=True)", UserWarning, "a.py", 3, "x = 1"))
            sys.stderr.write(warnings.formatwarning("old", DeprecationWarning, "a.py", 3, "x = 1"))
        sys.stderr.write(warnings.formatwarning("after", UserWarning, "a.py", 3, "x = 1"))
    said = capfd.readouterr().err
    assert said.startswith("note: it is whole (--whole)\n")
    assert "a.py:3: DeprecationWarning: old" in said
    assert "a.py:3: UserWarning: after" in said


def test_a_command_that_is_not_there_is_told_what_it_is_like() -> None:
    assert "No such command 'evaluat'; did you mean 'evaluate'?" in CliRunner().invoke(main, ["evaluat"]).stderr
    assert "No such command 'zzz'." in CliRunner().invoke(main, ["zzz"]).stderr
