"""README and documentation are as the code is: blocks run, generated parts are current, links and names exist."""

from __future__ import annotations

import ast
import contextlib
import importlib
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from documentation.blocks import MANUAL, NOTES, ROOT, Block, Session, blocks, missing, mistake
from documentation.generated import MARKED, current
from safetensors.torch import save_file

import msa_eval.protocols.loading
from msa_eval import load_checkpoint, load_samples, save_checkpoint
from msa_eval.evidence import metrics
from msa_eval.protocols.loading import load_protocol, shipped
from msa_eval.references import reference_path
from msa_eval.surrogates import registry

NOT_RUN = 12
"""So many blocks of the manual can't run in a test; each says why. Those of research notes measure for hours."""

SMALL = {
    "attack.square.queries": 4, "attack.spsa.queries": 3, "attack.apgd.steps": 2, "attack.apgd.passes": 8,
    "attack.apgd.overtime": 2, "attack.recombination.steps": 2, "attack.recombination.classes": 2,
    "attack.recombination.passes": 8, "attack.composition.trials": 8, "audit.samples": 0, "samples.limit": 8,
}  # fmt: skip
AS_THEY_ARE = {"docs/tutorial.md"}
"""Pages whose protocols are not made small, because they quote numbers."""

MODELS = """
from msa_eval import load_checkpoint
from msa_eval.references import reference_path
from msa_eval.surrogates import registry

def make():
    return load_checkpoint(reference_path("digits")).classifier.eval()

class Halves:
    def __init__(self, whole):
        self.trunk, self.head = whole.trunk, whole.fc
    def features(self, x):
        return self.trunk(x)
    def logits(self, z):
        return self.head((2 * z).round() / 2)

def make_defence():
    return Halves(make())
"""


def pages(found: list[Path]) -> list[str]:
    return [str(path.relative_to(ROOT)) for path in found]


@pytest.fixture(scope="module")
def supplies(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files that the blocks of the manual name: 8 digits, and the packaged reference under several names."""
    folder = tmp_path_factory.mktemp("supplies")
    digits, loaded = load_samples("digits"), load_checkpoint(reference_path("digits"))
    for name, count in (("test", 8), ("train", 40)):
        np.savez(folder / f"{name}.npz", x=digits.x[:count].numpy(), y=digits.y[:count].numpy())
    save_checkpoint(folder / "classifier.safetensors", loaded.classifier, loaded.blueprint)
    weights = loaded.classifier.state_dict()
    torch.save(weights, folder / "net.pt")
    save_file({name.removeprefix("trunk."): value for name, value in weights.items()}, folder / "bare.safetensors")
    (folder / "hpm.safetensors").write_bytes(Path(reference_path("digits")).read_bytes())
    (folder / "models.py").write_text(MODELS)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def _small(folder: Path) -> dict[str, Path]:
    """The shipped protocols with budgets of a few passes, under their own names."""
    made = {}
    for name, path in shipped().items():
        values = load_protocol(path).values
        few = load_protocol(path, overrides={key: value for key, value in SMALL.items() if key in values})
        few = load_protocol(path, overrides={**few.overrides, "audit.samples": 0})
        made[name] = folder / f"{name}.toml"
        made[name].write_text(few.text(), encoding="utf-8")
    return made


@pytest.mark.parametrize("page", pages(MANUAL))
def test_every_block_of_the_manual_runs(
    page: str, supplies: dict[str, bytes], kept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = [block for block in blocks(ROOT / page) if not block.why]
    if not any(block.language in ("bash", "python") for block in found):
        return
    for name, content in supplies.items():
        (tmp_path / name).write_bytes(content)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(metrics.METRICS, "every_final", metrics.CLEAN)  # so that it is taken away in the end
    del metrics.METRICS["every_final"]
    monkeypatch.setattr(registry, "_REGISTRY", dict(registry._REGISTRY))
    if page not in AS_THEY_ARE:
        (tmp_path / "protocols").mkdir()
        small = _small(tmp_path / "protocols")
        monkeypatch.setattr(msa_eval.protocols.loading, "shipped", lambda: small)
        monkeypatch.setattr("msa_eval.report.page.KINDS", ())  # drawing figures takes as long as these evaluations
    session = Session(tmp_path)
    _provide(session, found, kept)
    assert [line for block in found for line in session.run(block)] == [], session.printed


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the first page that reads results leaves them for the others."""
    return tmp_path_factory.mktemp("kept") / "mine"


def _provide(session: Session, found: list[Block], kept: Path) -> None:
    """Give results/mine and results/theirs to a page that reads them and does not make them."""
    text = "".join(block.source for block in found)
    wanted = [name for name in ("mine", "theirs") if f"results/{name}" in text]
    if wanted and not kept.exists():
        command = "msa-eval evaluate hpm.safetensors --data test.npz --out results/made --quiet"
        session.command(command.split(), found[0])
        shutil.move(session.folder / "results" / "made", kept)
    for name in wanted:
        shutil.copytree(kept, session.folder / "results" / name)


def test_blocks_that_do_not_run_are_counted_and_say_why() -> None:
    skipped = [block for page in MANUAL for block in blocks(page) if block.why]
    assert len(skipped) == NOT_RUN, [block.place for block in skipped]


@pytest.mark.parametrize("page", pages([*MANUAL, *NOTES, ROOT / "results/README.md"]))
def test_every_command_has_the_options_that_are_given(page: str) -> None:
    commands = [words for block in blocks(ROOT / page) if block.language == "bash" for words in block.commands]
    ours = [words for words in commands if "msa-eval" in words and not {"install", "pip"} & set(words)]
    assert [found for found in map(mistake, ours) if found] == []


def test_a_quotation_that_was_not_printed_is_noticed() -> None:
    assert missing("a 1.0 b\n...\nc", "x\na  3.5 b\ny\nc") == []
    for wrong, line in (("a 12.0 b", "a 12.0 b"), ("c\na 1.0 b", "a 1.0 b"), ("d", "d")):
        assert missing(wrong, "x\na 1.0 b\nc") == [line]


def test_a_mistyped_command_is_noticed() -> None:
    assert mistake(["msa-eval", "evaluate", "models.py:make", "--data", "digits", "--out", "r"]) == ""
    assert "no such option" in mistake(["msa-eval", "report", "r", "--output", "x"]).lower()
    assert "there is no command reprot" in mistake(["msa-eval", "reprot", "r"])


@pytest.mark.parametrize("page", pages([path for path in MANUAL if MARKED.search(path.read_text(encoding="utf-8"))]))
def test_generated_parts_are_current(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    assert current(text) == text, "run python -m tests.documentation.generated"


def test_every_sign_is_explained() -> None:
    text = (ROOT / "docs/believing-a-number.md").read_text(encoding="utf-8")
    explained = set(re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE))
    made = set()
    for path in (ROOT / "msa_eval" / "auditing").glob("*.py"):
        for call in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(call, ast.Call) and getattr(call.func, "id", "") == "Sign" and call.args:
                assert isinstance(call.args[0], ast.Constant), ast.unparse(call)
                made.add(call.args[0].value)
    assert len(made) > 15
    assert explained - {"sound", "suspect", "unreliable", "incomplete"} == made


@pytest.mark.parametrize("page", pages([*MANUAL, *NOTES]))
def test_links_lead_somewhere(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    for link in re.findall(r"\]\(([^)\s]+)\)|<img src=\"([^\"]+)\"", text):
        path = "".join(link).partition("#")[0]
        if path and not path.startswith(("http:", "https:")):
            assert (ROOT / page).parent.joinpath(path).exists(), path


@pytest.mark.parametrize("page", pages(MANUAL))
def test_names_of_the_package_exist(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    for name in set(re.findall(r"(?<![/\w])(msa_eval(?:\.\w+)+)", text)):
        found, path = importlib.import_module("msa_eval"), "msa_eval"
        for part in name.split(".")[1:]:
            path = f"{path}.{part}"
            with contextlib.suppress(ImportError):
                importlib.import_module(path)
            assert hasattr(found, part), path
            found = getattr(found, part)


@pytest.mark.parametrize("page", pages([*MANUAL, *NOTES]))
def test_pages_are_short(page: str) -> None:
    lines = len((ROOT / page).read_text(encoding="utf-8").splitlines())
    assert lines <= (150 if page == "README.md" else 200)
