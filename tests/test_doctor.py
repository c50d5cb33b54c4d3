"""The doctor: every check fires on what it is for, and stays quiet where nothing is wrong."""

from __future__ import annotations

import base64
import hashlib
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from msa_eval import doctor
from msa_eval.cli import main
from msa_eval.doctor import Finding
from msa_eval.installation import imports, records
from msa_eval.references import NAMES, reference_path


def install(
    site: Path,
    name: str,
    version: str = "1.1.1",
    *,
    files: dict[str, str] | None = None,
    requires: tuple[str, ...] = (),
    extras: tuple[str, ...] = (),
    url: str = "",
) -> Path:
    """Write a distribution as pip leaves it."""
    files = {f"{name}/__init__.py": "x = 1\n", f"{name}/zoo.py": "y = 2\n"} if files is None else files
    info = site / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    rows = []
    for relative, text in files.items():
        (site / relative).parent.mkdir(parents=True, exist_ok=True)
        (site / relative).write_text(text)
        digest = base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b"=").decode()
        rows.append(f"{relative},sha256={digest},{len(text)}")
    (info / "RECORD").write_text("\n".join([*rows, f"{name}/__pycache__/zoo.pyc,,", f"{info.name}/RECORD,,"]) + "\n")
    headers = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}", "Requires-Python: >=3.11"]
    headers += [f"Provides-Extra: {extra}" for extra in extras] + [f"Requires-Dist: {text}" for text in requires]
    (info / "METADATA").write_text("\n".join(headers) + "\n")
    if url:
        (info / "direct_url.json").write_text(f'{{"url": "{url}", "dir_info": {{}}}}')
    return info


@pytest.fixture
def site(tmp_path: Path) -> Path:
    install(tmp_path, "robustbench")
    return tmp_path


def text(mends: tuple[records.Command, ...]) -> list[str]:
    return [" ".join(command).replace(sys.executable, "python") for command in mends]


REINSTALL = "python -m pip install --force-reinstall --no-deps robustbench==1.1.1"


def test_whole_files(site: Path) -> None:
    assert doctor.check_files("robustbench", [str(site)]) == Finding(
        "robustbench", "ok", "1.1.1, its 2 files are whole"
    )
    assert doctor.check_files("torchattacks", [str(site)]) == Finding("torchattacks", "note", "not installed")


def test_a_changed_byte_and_a_missing_file(site: Path) -> None:
    (site / "robustbench/__init__.py").write_text("x = 3\n")
    found = doctor.check_files("robustbench", [str(site)])
    assert (found.state, text(found.mends)) == ("fault", [REINSTALL])
    assert found.said == "1.1.1: of its 2 files 1 changed (robustbench/__init__.py)"
    (site / "robustbench/zoo.py").unlink()
    assert doctor.check_files("robustbench", [str(site)]).said == (
        "1.1.1: of its 2 files 1 changed (robustbench/__init__.py) and 1 missing (robustbench/zoo.py)"
    )


def test_files_outside_of_the_package_and_unknown_ones_are_no_fault(tmp_path: Path) -> None:
    install(tmp_path, "robustbench", files={"robustbench/__init__.py": "", "tests/test_a.py": "a\n"})
    (tmp_path / "tests/test_a.py").write_text("another's\n")
    (tmp_path / "robustbench/extra.py").write_text("")
    assert doctor.check_files("robustbench", [str(tmp_path)]).state == "ok"


def test_torchattacks_writes_over_robustbench_and_has_no_fault_of_its_own(site: Path) -> None:
    old = {"torchattacks/__init__.py": "", "robustbench/__init__.py": "old = 1\n"}
    install(site, "torchattacks", "3.5.1", files=old)
    assert doctor.check_files("robustbench", [str(site)]).state == "fault"
    (site / "robustbench/__init__.py").write_text("x = 1\n")  # mended
    assert [doctor.check_files(name, [str(site)]).state for name in ("robustbench", "torchattacks")] == ["ok", "ok"]
    # Its own files put back write over robustbench once more, so that follows.
    (site / "torchattacks/__init__.py").write_text("changed\n")
    found = doctor.check_files("torchattacks", [str(site)])
    assert text(found.mends) == [REINSTALL.replace("robustbench==1.1.1", "torchattacks==3.5.1"), REINSTALL]


def test_a_folder_that_is_imported_in_front_of_the_real_one(site: Path, tmp_path: Path) -> None:
    """As in an environment on top of another: pip writes torchattacks into the upper, robustbench is in the lower."""
    upper = tmp_path / "upper"
    install(upper, "torchattacks", "3.5.1", files={"torchattacks/__init__.py": "", "robustbench/__init__.py": ""})
    found = doctor.check_files("robustbench", [str(upper), str(site)])
    assert (found.state, text(found.mends)) == ("fault", [REINSTALL])
    assert f"imported in its place: {upper / 'robustbench'}" in found.said
    assert doctor.check_files("robustbench", [str(site), str(upper)]).state == "ok"


def test_torchattacks_alone_brings_a_robustbench_that_is_not_the_real_one(tmp_path: Path) -> None:
    install(tmp_path, "torchattacks", files={"torchattacks/__init__.py": "", "robustbench/__init__.py": ""})
    found = doctor.check_files("robustbench", [str(tmp_path)])
    assert found.state == "note"
    assert "an old copy in torchattacks" in found.said


def test_the_same_version_comes_back_from_where_it_came_if_that_is_still_there(tmp_path: Path) -> None:
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    install(tmp_path, "robustbench", url=wheels.as_uri())
    (tmp_path / "robustbench/zoo.py").unlink()
    (command,) = doctor.check_files("robustbench", [str(tmp_path)]).mends
    assert command[-1] == wheels.as_uri()
    wheels.rmdir()
    (command,) = doctor.check_files("robustbench", [str(tmp_path)]).mends
    assert command[-1] == "robustbench==1.1.1"


def test_another_version_than_ours_is_replaced_by_ours(tmp_path: Path) -> None:
    install(tmp_path, "robustbench", "1.0")
    install(
        tmp_path, "msa-eval", "0.1.0", requires=('robustbench==1.1.1; extra == "robustbench"',), extras=("robustbench",)
    )
    (tmp_path / "robustbench/zoo.py").unlink()
    assert text(doctor.check_files("robustbench", [str(tmp_path)]).mends) == [REINSTALL]
    (found,) = doctor.check_requirements("msa-eval", [str(tmp_path)])
    assert found.said == "msa-eval needs robustbench==1.1.1, but 1.0 is installed"
    assert text(found.mends) == ["python -m pip install robustbench==1.1.1"]


def test_requirements_are_followed_through_others(tmp_path: Path) -> None:
    path = [str(tmp_path)]
    ours = (
        "torch<=2.13.0,>=2.6",
        "click>=8",
        'robustbench==1.1.1; extra == "robustbench"',
        'pytest>=8; extra == "test"',
    )
    install(tmp_path, "msa-eval", "0.1.0", requires=ours, extras=("robustbench", "test"))
    install(tmp_path, "torch", "2.13.0+cpu", requires=('nothing>=1; sys_platform == "nowhere"',))
    install(tmp_path, "click", "8.5")
    (found,) = doctor.check_requirements("msa-eval", path)  # neither extra is wanted
    assert (found.state, found.said) == ("ok", "2 that msa-eval needs go together, among them torch 2.13.0+cpu")
    install(tmp_path, "robustbench", requires=("requests[fast]>=2.25", "timm==1.0.9"))
    install(tmp_path, "requests", "2.25.1", requires=("idna<3", 'quick>=1; extra == "fast"'), extras=("fast",))
    idna = install(tmp_path, "idna", "3.20")
    faults = doctor.check_requirements("msa-eval", path)
    assert {fault.said for fault in faults} == {
        "robustbench 1.1.1 needs timm==1.0.9, which is not installed",
        "requests 2.25.1 needs quick>=1, which is not installed",
        "requests 2.25.1 needs idna<3, but 3.20 is installed",
    }
    # One command for all, with what caps torch.
    assert {mend for fault in faults for mend in text(fault.mends)} == {
        "python -m pip install robustbench==1.1.1 torch<=2.13.0,>=2.6"
    }
    (idna / "METADATA").write_text((idna / "METADATA").read_text().replace("3.20", "2.10"))
    install(tmp_path, "timm", "1.0.9")
    install(tmp_path, "quick", "1.0")
    assert [finding.state for finding in doctor.check_requirements("msa-eval", path)] == ["ok"]


def test_too_old_a_torch(tmp_path: Path) -> None:
    install(tmp_path, "msa-eval", "0.1.0", requires=("torch>=2.6,<=2.13.0",))
    install(tmp_path, "torch", "2.5.1")
    (found,) = doctor.check_requirements("msa-eval", [str(tmp_path)])
    assert found.said == "msa-eval needs torch<=2.13.0,>=2.6, but 2.5.1 is installed"
    assert text(found.mends) == ["python -m pip install torch<=2.13.0,>=2.6"]


def test_a_package_that_no_extra_of_ours_asks_for(tmp_path: Path) -> None:
    install(tmp_path, "msa-eval", "0.1.0", requires=("torch<=2.13.0",))
    install(tmp_path, "torch", "2.13.0")
    install(tmp_path, "torchvision", "0.29.1", requires=("torch>=2.14",))
    (found,) = doctor.check_requirements("msa-eval", [str(tmp_path)])
    assert found.said == "torchvision 0.29.1 needs torch>=2.14, but 2.13.0 is installed"
    assert text(found.mends) == ["python -m pip install torchvision torch<=2.13.0"]


def test_what_torchattacks_says_it_needs_for_its_old_robustbench_is_excused_and_no_other(tmp_path: Path) -> None:
    path = [str(tmp_path)]
    install(tmp_path, "msa-eval", requires=('torchattacks; extra == "torchattacks"',), extras=("torchattacks",))
    install(tmp_path, "torchattacks", "3.5.1", requires=("requests~=2.25.1", "torchvision>=0.8", "scipy>=0.14"))
    install(tmp_path, "requests", "2.34.2")
    (found,) = doctor.check_requirements("msa-eval", path)
    assert found.said == "torchattacks 3.5.1 needs scipy>=0.14, which is not installed"
    install(tmp_path, "scipy", "1.17")
    assert doctor.check_requirements("msa-eval", path)[0].state == "ok"


def test_python() -> None:
    found = doctor.check_python("3.10.4")
    assert (found.state, found.said) == ("fault", "3.10.4, but msa-eval needs >=3.11")
    assert found.by_hand
    assert doctor.check_python("3.13.0").state == "ok"


def test_own_files(tmp_path: Path) -> None:
    url = tmp_path.as_uri()
    install(tmp_path, "msa-eval", "0.1.0", files={"msa_eval/a.safetensors": "weights"}, url=url)
    assert doctor.check_own_files([str(tmp_path)]).state == "ok"
    (tmp_path / "msa_eval/a.safetensors").write_text("weighty")
    found = doctor.check_own_files([str(tmp_path)])
    assert text(found.mends) == [f"python -m pip install --force-reinstall --no-deps {url}"]


def test_an_environment_without_pip_gets_one_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert text(records.pip("install", "x")) == ["python -m ensurepip", "python -m pip install x"]


def test_a_cache_that_is_there_or_can_be_made(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "to" / "be" / "made"):
        assert doctor.check_cache("TORCH_HOME", folder) == Finding("TORCH_HOME", "ok", str(folder))
    assert list(tmp_path.iterdir()) == []


def test_a_cache_below_a_file_can_not_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    found = doctor.check_cache("TORCH_HOME", tmp_path / "file" / "torch")
    assert (found.state, found.by_hand) == ("fault", True)
    assert found.mends == (("export", f"TORCH_HOME={Path.cwd() / '.cache' / 'torch'}"),)


@pytest.mark.skipif(getattr(os, "geteuid", lambda: 0)() == 0, reason="root writes everywhere")
def test_a_cache_without_permission(tmp_path: Path) -> None:
    tmp_path.chmod(0)
    assert doctor.check_cache("TORCH_HOME", tmp_path / "below").state == "fault"
    tmp_path.chmod(stat.S_IRUSR | stat.S_IXUSR)
    found = doctor.check_cache("TORCH_HOME", tmp_path)
    assert found.mends == (("chmod", "u+rwx", str(tmp_path)),)
    subprocess.run(found.mends[0], check=True)
    assert doctor.check_cache("TORCH_HOME", tmp_path).state == "ok"


def test_the_caches_are_where_their_libraries_put_them(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for variable in doctor.caches():
        monkeypatch.setenv(variable, str(tmp_path / variable))
    assert doctor.caches() == {variable: tmp_path / variable for variable in doctor.caches()}
    assert Path(torch.hub.get_dir()).is_relative_to(tmp_path / "TORCH_HOME")


@pytest.mark.parametrize("name", NAMES)
def test_references(name: str, tmp_path: Path) -> None:
    assert doctor.check_reference(name, reference_path(name)).state == "ok"
    whole = reference_path(name).read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[: len(whole) // 2])
    found = doctor.check_reference(name, tmp_path / "cut.safetensors")
    assert (found.state, bool(found.mends)) == ("fault", True)
    assert "is not a readable safetensors file" in found.said


def test_a_reference_that_answers_wrongly(tmp_path: Path) -> None:
    """Every weight moved by one place: it loads, and knows no digit."""
    whole = bytearray(reference_path("digits").read_bytes())
    start = 8 + int.from_bytes(whole[:8], "little")
    whole[start:] = whole[start + 4 :] + whole[start : start + 4]
    (tmp_path / "moved.safetensors").write_bytes(whole)
    found = doctor.check_reference("digits", tmp_path / "moved.safetensors")
    assert found.state == "fault"
    assert "of 64 digits are right, expected at least 80%" in found.said


def test_imports() -> None:
    def fail() -> None:
        raise RuntimeError("no\nluck")

    assert doctor.check_import("click", lambda: None) == Finding("import click", "ok", "works")
    found = doctor.check_import("click", fail)
    assert (found.state, found.said) == ("fault", "RuntimeError: no luck")


def test_processor_and_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ATEN_CPU_CAPABILITY", raising=False)
    assert (doctor.check_cpu("AVX2").state, doctor.check_cpu("AVX512").state) == ("note", "ok")
    assert doctor.check_cpu("AVX2").mends == ()
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", "default")
    found = doctor.check_cpu("DEFAULT")
    assert (found.state, found.mends) == ("note", (("unset", "ATEN_CPU_CAPABILITY"),))
    assert doctor.check_device().state in ("note", "ok")
    assert doctor.miscomputes("cpu") == ""
    assert doctor.miscomputes("meta")  # a device that holds no numbers


def test_an_overwritten_robustbench_is_not_imported(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would import without a word, and be another model zoo."""
    monkeypatch.syspath_prepend(str(site))
    (site / "robustbench/zoo.py").write_text("old = 1\n")
    with pytest.raises(ValueError, match=r"robustbench is not whole \(of its 2 files 1 changed .*doctor --fix"):
        imports.import_robustbench()


def run(monkeypatch: pytest.MonkeyPatch, findings: list[Finding], *arguments: str) -> tuple[int, str]:
    monkeypatch.setattr(doctor, "examine", lambda: iter(findings))
    done = CliRunner().invoke(main, ["doctor", *arguments])
    return done.exit_code, done.output


def test_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    mend = (sys.executable, "-c", "print('mended')")
    fault = Finding("thing", "fault", "is broken", (mend,))
    assert run(monkeypatch, [Finding("thing", "note", "is as it is")])[0] == 0
    status, said = run(monkeypatch, [fault, fault])
    assert status == 1
    assert said.count("mended") == 1  # shown once, not run
    assert "FAULT  thing" in said
    status, said = run(monkeypatch, [Finding("thing", "fault", "x", (("export", "A=b"),), by_hand=True)], "--fix")
    assert status == 1
    assert "export A=b    (in your own shell)" in said


def test_fix_runs_the_commands_and_looks_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A new process looks again, at this very environment."""
    standing = any(finding.state == "fault" for finding in doctor.examine())
    mend = (sys.executable, "-c", f"open({str(tmp_path / 'mended')!r}, 'w')")
    missing = ("no-such-program",)
    status, said = run(monkeypatch, [Finding("thing", "fault", "is broken", (mend, missing))], "--fix")
    assert status == standing
    assert (tmp_path / "mended").exists()
    assert "it can't be run" in said
