"""Protocol files: what is shipped, and that all mistakes are found at once."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from msa_eval.protocols import load_protocol, make_protocol, shipped

GOOD: dict[str, Any] = {
    "schema": 1,
    "name": "mine",
    "version": 1,
    "description": "A test.",
    "threat": {"norm": "L2", "eps": 0.5},
    "attack": {"square": {"queries": 10}},
}


@pytest.mark.parametrize(
    ("name", "eps", "share"),
    [("paper-cifar10", 8 / 255, 0.25), ("paper-cifar100", 8 / 255, 0.25), ("paper-imagenet", 4 / 255, None)],
)
def test_the_papers_protocols_are_section_6_3(name: str, eps: float, share: float | None) -> None:
    protocol = load_protocol(name)
    assert protocol.name == name
    assert (protocol.ball.norm, protocol.ball.eps) == ("Linf", eps)
    assert (protocol.fraction, protocol.per_class) == (share, None if share else 5)
    assert protocol.apgd is not None
    assert protocol.square is not None
    assert (protocol.apgd.surrogates, protocol.apgd.losses) == (("fc-oracle", "soft-hybrid"), ("ce", "dlr"))
    assert (protocol.apgd.steps, protocol.apgd.restarts, protocol.square.queries) == (40, 1, 5000)
    assert protocol.contexts == ("joint",)
    assert not protocol.modified


def test_all_shipped_protocols_are_named_as_their_files() -> None:
    assert {name: load_protocol(name).name for name in shipped()} == {name: name for name in shipped()}


def test_all_mistakes_are_reported_together() -> None:
    content = {
        "schema": 1,
        "name": "",
        "version": 1.5,
        "threat": {"norm": "L0", "eps": "8/0", "contexts": ["joint", "joint"]},
        "samples": {"fraction": 0, "per_class": 3, "limmit": 3},
        "attack": {"apgd": {"steps": True, "losses": ["ce", "cw"], "surrogates": []}, "squere": {"queries": 3}},
    }
    with pytest.raises(ValueError, match="description is missing") as caught:
        make_protocol(content, source="bad.toml")
    message = str(caught.value)
    for part in (
        "bad.toml: ",
        "name: expected a text",
        "version: expected a whole number, at least 1 and below 2^63, but got 1.5",
        "threat.norm: expected one of Linf, L2, L1, but got 'L0'",
        "threat.eps: expected a number",
        "threat.contexts: expected a list of different names",
        "samples.fraction: expected a number",
        "unknown key samples.limmit (did you mean samples.limit?)",
        "samples.fraction and samples.per_class exclude each other",
        "attack.apgd.steps: expected a whole number",
        "attack.apgd.losses: expected a list of different names among ce, margin, probability-margin, dlr, ",
        "attack.apgd.surrogates: expected a list of different names",
        "unknown key attack.squere.queries (did you mean attack.square.queries?)",
    ):
        assert part in message


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": 2}, "reads schema 1"),
        ({"attack": {}}, r"the table \[attack\] is empty"),
        ({"attack": {"apgd": {}, "square": {"queries": 3}}}, r"the table \[attack\.apgd\] is empty"),
        ({"threat": {"norm": "Linf", "eps": "1e400"}}, "threat.eps"),
        ({"samples": {"seed": 10**23}}, "samples.seed"),
        ({"threat": {"norm": "Linf", "eps": -1}}, "threat.eps"),
        ({"threat": {"norm": "Linf", "eps": 0.1, "contexts": ["duo"]}}, "among joint, solo, alone"),
        ({"samples": {"limit": 0}}, "samples.limit"),
        ({"extra": {"deep": {"key": 1}}}, "unknown key extra.deep.key"),
        ({"attack": {"apgd": {"steps": 1, "overtime": 9}}}, "attack.apgd.overtime ends a cascade"),
        ({"attack": {"apgd": {"steps": 1}, "recombination": {"steps": 5}}}, "give attack.recombination.runs"),
        ({"attack": {"square": {"queries": 1}, "recombination": {"runs": ["ste:ce"]}}}, "give attack.apgd too"),
    ],
)
def test_single_mistakes(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_protocol(GOOD | change)


def test_numbers_and_characters_that_json_writes_otherwise_come_back() -> None:
    options = {"a": float("inf"), "b": -1e-7, "c": 'x\x7f"y\n', "d": True, "e": 1e16}
    protocol = make_protocol({**GOOD, "attack.peers": [{"name": "autoattack:apgd-t", **options}]})
    assert tomllib.loads(protocol.text())["attack"]["peers"][0] == {"name": "autoattack:apgd-t", **options}


@pytest.mark.parametrize(
    ("given", "eps"),
    [
        ("8/255", 8 / 255), ("0.5/255", 0.5 / 255), ("8 / 255", 8 / 255), (".03", 0.03), (8 / 255, 8 / 255),
        (np.float32(0.25), 0.25), (np.float64(0.1), 0.1), (np.array(0.1), 0.1), (torch.tensor(0.25), 0.25),
        (np.int64(1), 1), (1, 1),
    ],
)  # fmt: skip
def test_a_radius_as_people_write_it(given: Any, eps: float) -> None:
    protocol = make_protocol(GOOD, overrides={"threat.eps": given})
    assert protocol.ball.eps == eps
    assert make_protocol(tomllib.loads(protocol.text())).digest() == protocol.digest()


@pytest.mark.parametrize("given", ["0,03", "nan", "8/0", [0.1, 0.2], torch.full((3,), 0.1), np.ones(2), None, True, ""])
def test_what_is_no_radius(given: Any) -> None:
    with pytest.raises(ValueError, match=r"threat\.eps: expected a number \(or a fraction such as '8/255'\)"):
        make_protocol(GOOD, overrides={"threat.eps": given})


@pytest.mark.parametrize(
    ("given", "norm"),
    [
        ("linf", "Linf"), ("LINF", "Linf"), ("inf", "Linf"), (float("inf"), "Linf"), (np.inf, "Linf"), ("L∞", "Linf"),
        ("L-inf", "Linf"), ("l_2", "L2"), ("ℓ2", "L2"), ("ℓ∞", "Linf"),
        ("l2", "L2"), (2, "L2"), ("2", "L2"), (2.0, "L2"),
    ],
)  # fmt: skip
def test_a_norm_as_people_write_it(given: Any, norm: str) -> None:
    protocol = make_protocol(GOOD, overrides={"threat.norm": given})
    assert protocol.ball.norm == protocol.values["threat.norm"] == norm
    assert protocol.modified == (norm != "L2")


@pytest.mark.parametrize(
    ("key", "hint"),
    [
        ("eps", "threat.eps"), ("norm", "threat.norm"), ("size", "batches.size"),
        ("steps", "attack.apgd.steps or attack.recombination.steps"), ("limit", "samples.limit"),
        ("epsilon", "threat.eps"),
        ("restart", "attack.apgd.restarts or attack.square.restarts or attack.spsa.restarts"),
    ],
)  # fmt: skip
def test_a_bare_key_leads_to_where_it_stands(key: str, hint: str) -> None:
    with pytest.raises(ValueError, match=rf"unknown key {key} \(did you mean {re.escape(hint)}\?\)"):
        make_protocol(GOOD, overrides={key: 1})


def test_overrides_are_recorded_and_change_the_hash() -> None:
    plain = load_protocol("digits")
    changed = load_protocol("digits", overrides={"attack.square.queries": 7, "threat.eps": 0.15})
    assert changed.square is not None
    assert changed.square.queries == 7
    assert changed.overrides == {"attack.square.queries": 7}
    assert changed.modified
    assert changed.digest() != plain.digest()
    assert load_protocol("digits", overrides={"attack": {"square": {"queries": 7}}}).digest() == changed.digest()
    with pytest.raises(ValueError, match=r"unknown key attack\.square\.quaries \(did you mean attack\.square\.queries"):
        load_protocol("digits", overrides={"attack.square.quaries": 7})


@pytest.mark.parametrize("name", ["digits", "quick", "paper-imagenet"])
def test_the_text_is_toml_that_reads_back_the_same(name: str) -> None:
    protocol = load_protocol(name, overrides={"samples.limit": 12})
    again = make_protocol(tomllib.loads(protocol.text()))
    assert again.digest() == protocol.digest()
    assert (again.ball, again.apgd, again.square, again.limit) == (protocol.ball, protocol.apgd, protocol.square, 12)


def test_files_that_are_no_protocol(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="did you mean 'quick'"):
        load_protocol("quik")
    bad = tmp_path / "bad.toml"
    bad.write_text("a = = 1")
    with pytest.raises(ValueError, match="not a readable TOML file"):
        load_protocol(bad)
    bad.write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="not a readable TOML file"):
        load_protocol(bad)


@pytest.mark.parametrize(
    ("apgd", "message"),
    [
        ({"runs": ["ste"]}, "attack.apgd.runs: expected a list of 'surrogate:loss' or 'surrogate:loss:moves'"),
        ({"runs": ["ste:cw"]}, "with a loss among ce, margin, probability-margin, dlr, dlr-targeted, dlr-malt"),
        ({"runs": ["ste:ce:rows"]}, "moves among batch, companions"),
        ({"runs": ["ste:ce:batch:1"]}, "attack.apgd.runs: expected"),
        ({"runs": "ste:ce"}, "attack.apgd.runs: expected a list"),
        ({"runs": ["ste:ce"], "losses": ["ce"]}, "attack.apgd.losses has no meaning beside it"),
        ({"runs": ["ste:ce"], "combine": "mean"}, "can't be combined by mean"),
        ({"combine": "mean", "moves": ["companions"]}, "leave attack.apgd.moves out"),
        ({"moves": ["standing"]}, "only a cascade knows which samples are unbroken"),
        ({"runs": ["ste:ce:standing"]}, "only a cascade knows which samples are unbroken"),
        ({"combine": "mixed"}, "attack.apgd.combine: expected one of separate, mean, cascade"),
        ({"victim": 3}, "no run moves companions"),
        ({"victim": 3, "moves": ["rows"]}, "attack.apgd.moves: expected"),
    ],
)
def test_mistakes_in_a_list_of_runs_are_named(apgd: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        make_protocol({**GOOD, "attack": {"apgd": apgd}})


def test_a_list_of_runs_survives_the_way_through_a_file(tmp_path: Path) -> None:
    apgd = {"runs": ["ste:margin:companions", "soft-hybrid@0.3:dlr"], "combine": "cascade", "victim": 3}
    protocol = make_protocol({**GOOD, "attack": {"apgd": apgd, "spsa": {"queries": 9}}})
    (tmp_path / "mine.toml").write_text(protocol.text(), encoding="utf-8")
    again = load_protocol(tmp_path / "mine.toml")
    assert again.digest() == protocol.digest()
    assert again.apgd == protocol.apgd
    assert again.apgd is not None
    assert again.apgd.runs == (("ste", "margin", "companions"), ("soft-hybrid@0.3", "dlr", "batch"))
    assert again.spsa is not None
    assert (again.spsa.queries, again.apgd.victim, again.square) == (9, 3, None)


def test_the_digits_protocol_is_msa_at_another_radius() -> None:
    msa, digits = (load_protocol(name).values for name in ("msa", "digits"))
    own = ("name", "version", "description", "threat.eps", "threat.contexts")
    assert {k: v for k, v in msa.items() if k not in own} == {k: v for k, v in digits.items() if k not in own}
