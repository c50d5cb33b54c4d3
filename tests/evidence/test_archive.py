"""The archive: few batches that cover all, the smallest encoding that holds, and files nobody should trust."""

from __future__ import annotations

import dataclasses
import errno
import itertools
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor
from toys import make_hpm, make_samples

from msa_eval.attacks.ball import Ball
from msa_eval.evidence.archive import Archive, Written, read, write
from msa_eval.evidence.proof import Broken, Proof, cover
from msa_eval.judging.replay import Replay

LINF, L2 = Ball("Linf", 8 / 255), Ball("L2", 0.5)
SIZE, IMAGE = 6, (3, 4, 4)


def _clean(number: int, size: int = SIZE, image: tuple[int, ...] = IMAGE) -> Tensor:
    if number > 3:
        raise IndexError(number)
    drawn = torch.randint(0, 256, (size, *image), generator=torch.Generator().manual_seed(number))
    return drawn.float() / 255


def _points(ball: Ball, clean: Tensor, seed: int = 0) -> Tensor:
    """Points that are nowhere on a grid: some on the border, some inside."""
    generator = torch.Generator().manual_seed(seed)
    far = ball.random(clean, generator)
    return ball.project(clean + (far - clean) * torch.rand(clean.shape, generator=generator) * 1.5, clean)


def _proof(kind: str, ball: Ball, *, context: str | None = None, number: int = 1) -> Proof:
    clean = _clean(number)
    positions = torch.tensor([4, 0, 3])
    x = _points(ball, clean)
    return Proof(
        target="defense",
        context=context or ("solo" if kind == "rows" else "joint"),
        batch=number,
        kind=kind,
        positions=positions,
        x=x[positions] if kind == "rows" else x,
        own=_points(ball, clean[positions], 1) if kind == "victims" else None,
        companions=torch.arange(3 * (SIZE - 1)).reshape(3, -1) if context == "composed" else None,
    )


def _always(proof: Proof) -> Tensor:
    return torch.ones(len(proof.positions), dtype=torch.bool)


def _write(path: Path, proofs: list[Proof], ball: Ball = LINF, **options: Any) -> Written:
    return write(path, proofs, _clean, ball, **{"confirm": _always, **options})


CASES = [("batch", None), ("rows", None), ("rows", "alone"), ("rows", "composed"), ("victims", None)]


@pytest.mark.parametrize("ball", [LINF, L2], ids=lambda ball: ball.norm)
@pytest.mark.parametrize(("kind", "context"), CASES)
def test_what_is_written_is_read(kind: str, context: str | None, ball: Ball, tmp_path: Path) -> None:
    proof = _proof(kind, ball, context=context)
    written = _write(tmp_path / "a", [proof], ball)
    assert (written.proofs, written.samples, written.left_out, written.unconfirmed) == (1, 3, 0, ())
    assert written.bytes == (tmp_path / "a").stat().st_size
    (found,) = read(tmp_path / "a", _clean, ball)
    assert (found.target, found.context, found.batch, found.kind) == ("defense", proof.context, 1, kind)
    assert found.positions.tolist() == [4, 0, 3]
    clean = _clean(1)
    base = clean[proof.positions] if kind == "rows" else clean
    step = ball.eps / 254 if ball.norm == "Linf" else 2**-10
    torch.testing.assert_close(found.x, proof.x, rtol=0, atol=step * 1.01)
    assert float(ball.excess(found.x, base).max()) == 0
    assert (found.own is None) == (kind != "victims")
    if found.own is not None and proof.own is not None:
        torch.testing.assert_close(found.own, proof.own, rtol=0, atol=step * 1.01)
    if proof.companions is not None and found.companions is not None:
        assert torch.equal(found.companions, proof.companions)
    expected = "I8" if ball.norm == "Linf" else "F16"
    assert _types(tmp_path / "a", "x") == [expected]


def _types(path: Path, name: str) -> list[str]:
    names = {torch.int8: "I8", torch.float16: "F16", torch.float32: "F32"}
    return [names[part.dtype] for key, part in sorted(load_file(path).items()) if key.endswith("/" + name)]


def test_what_lies_on_the_border_comes_back_exact(tmp_path: Path) -> None:
    clean = _clean(0)
    clean[0], clean[1] = 0.0, 1.0
    signs = torch.randint(-1, 2, clean.shape, generator=torch.Generator().manual_seed(0)).float()
    x = LINF.project(clean + signs * LINF.eps, clean)
    proof = Proof("fc", "joint", 0, "batch", torch.tensor([2]), x)
    write(tmp_path / "a", [proof], lambda _: clean, LINF, confirm=_always)
    (found,) = read(tmp_path / "a", lambda _: clean, LINF)
    assert torch.equal(found.x, x)


@pytest.mark.parametrize("kind", ["batch", "victims"])
def test_a_batch_that_rounding_mends_takes_the_next_encoding(kind: str, tmp_path: Path) -> None:
    proof = _proof(kind, LINF)
    errors: list[float] = []

    def holds_from(rank: int) -> Any:
        errors.clear()

        def confirm(shown: Proof) -> Tensor:
            errors.append(float((shown.x - proof.x).abs().max()))
            answer = _always(shown)
            answer[1] = len(errors) > rank
            return answer

        return confirm

    for rank, kept in enumerate(["I8", "F16", "F32"]):
        written = _write(tmp_path / "a", [proof], confirm=holds_from(rank))
        assert _types(tmp_path / "a", "x") == [kept]
        assert errors == sorted(errors, reverse=True)
        assert written.samples == 3
    assert errors[-1] == 0
    (found,) = read(tmp_path / "a", _clean, LINF)
    assert torch.equal(found.x, proof.x)

    written = _write(tmp_path / "a", [proof], confirm=holds_from(3))
    assert written.unconfirmed == (Broken("defense", "joint", 1, 0),)
    assert read(tmp_path / "a", _clean, LINF)[0].positions.tolist() == [4, 3]
    assert written.about("a")["unconfirmed"] == [["defense", "joint", 1, 0]]


def test_rows_take_encodings_of_their_own(tmp_path: Path) -> None:
    proof = _proof("rows", LINF)

    def confirm(shown: Proof) -> Tensor:
        error = (shown.x - _by_position(proof, shown.positions)).abs().flatten(1).amax(dim=1)
        bound = torch.tensor([{4: 1.0, 0: 1e-4, 3: 0.0}[p] for p in shown.positions.tolist()])
        return error <= bound

    written = _write(tmp_path / "a", [proof], confirm=confirm)
    assert written.proofs == written.samples == 3
    assert _types(tmp_path / "a", "x") == ["I8", "F16", "F32"]
    found = read(tmp_path / "a", _clean, LINF)
    assert [one.positions.tolist() for one in found] == [[4], [0], [3]]
    assert torch.equal(found[2].x[0], proof.x[2])


def _by_position(proof: Proof, positions: Tensor) -> Tensor:
    order = proof.positions.tolist()
    return proof.x[[order.index(p) for p in positions.tolist()]]


def test_a_point_that_barely_breaks_a_real_target_is_kept_exact(tmp_path: Path) -> None:
    """Between the clean image and a broken one lies a point that no rounding leaves broken."""
    hpm = make_hpm()
    samples = make_samples(hpm.fc_target, 8)
    replay = Replay(hpm, samples, [torch.arange(8)], device="cpu")
    ball = Ball("Linf", 0.3)
    clean = replay.images(0)
    for seed, sign in itertools.product(range(20), (-1.0, 1.0)):
        drawn = torch.randn(clean.shape, generator=torch.Generator().manual_seed(seed)).sign() * sign
        far = ball.project(clean + ball.eps * drawn, clean)
        proofs = [_barely(replay, clean, far, at) for at in range(8)]
        if any(proofs):
            break
    proof = next(proof for proof in proofs if proof is not None)
    assert bool(replay.breaks(proof).all())
    written = write(tmp_path / "a", [proof], replay.images, ball, confirm=replay.breaks)
    assert written.unconfirmed == ()
    (found,) = read(tmp_path / "a", replay.images, ball)
    assert bool(replay.breaks(found).all())


def _barely(replay: Replay, clean: Tensor, far: Tensor, at: int) -> Proof | None:
    """Bisect towards the clean image while the target is still wrong."""

    def proof_at(share: float) -> Proof:
        x = clean[at] + share * (far[at] - clean[at])
        return Proof("defense", "solo", 0, "rows", torch.tensor([at]), x.unsqueeze(0))

    low, high = 0.0, 1.0
    if bool(replay.breaks(proof_at(low))) or not bool(replay.breaks(proof_at(high))):
        return None
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (low, middle) if bool(replay.breaks(proof_at(middle))) else (middle, high)
    return proof_at(high)


def test_the_limit_leaves_out_and_counts(tmp_path: Path) -> None:
    big, small = _proof("batch", LINF), _proof("rows", LINF).only(torch.tensor([True, False, False]))
    everything = _write(tmp_path / "a", [big] * 20 + [small])
    assert (everything.proofs, everything.left_out) == (21, 0)
    for limit in (2500, 4000, everything.bytes):
        written = _write(tmp_path / "a", [big] * 20 + [small], limit_bytes=limit)
        assert written.bytes <= limit
        assert written.samples + written.left_out == 61
        assert written.left_out > 0
        assert len(read(tmp_path / "a", _clean, LINF)) == written.proofs
    assert _write(tmp_path / "a", [big] * 20 + [small], limit_bytes=1700).samples == 1


def test_the_size_of_cifar10_batches(tmp_path: Path) -> None:
    """A byte a pixel value of a batch of 64, and of single rows."""

    def clean(number: int) -> Tensor:
        return _clean(number, 64, (3, 32, 32))

    x = _points(LINF, clean(0))
    whole = Proof("defense", "joint", 0, "batch", torch.arange(9), x)
    rows = Proof("fc", "joint", 0, "rows", torch.arange(9), x[:9])
    sizes = [write(tmp_path / "a", [proof], clean, LINF, confirm=_always).bytes for proof in (whole, rows)]
    assert sizes[0] < 64 * 3072 + 1000
    assert sizes[1] < 9 * 3072 + 1000


def test_an_archive_of_nothing(tmp_path: Path) -> None:
    assert _write(tmp_path / "a", []).samples == 0
    assert read(tmp_path / "a", _clean, LINF) == []


def test_a_file_appears_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _write(tmp_path / "a", [_proof("batch", LINF)])
    before = (tmp_path / "a").read_bytes()

    def full(number: int) -> None:
        del number
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left on device; free some space"):
            _write(tmp_path / "a", [_proof("rows", LINF)])
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a").read_bytes() == before
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="could not write"):
        _write(tmp_path / "file" / "a", [])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"positions": torch.tensor([0, 0, 1])}, "different positions"),
        ({"positions": torch.tensor([0, 1, 6])}, "different positions in a batch of 6"),
        ({"positions": torch.tensor([0, 1])}, r"expected x of shape \(2, 3, 4, 4\)"),
        ({"positions": torch.tensor([], dtype=torch.long), "x": torch.zeros(0, *IMAGE)}, "different positions"),
        ({"batch": 4}, "no batch 4 in the plan"),
        ({"kind": "row"}, "unknown kind 'row'"),
        ({"kind": "victims"}, "expected positions, x, own, but got positions, x"),
        ({"context": "composed"}, "expected positions, x, companions"),
        ({"context": "duo"}, "unknown context 'duo'"),
    ],
)
def test_malformed_proofs_are_not_written(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        _write(tmp_path / "a", [dataclasses.replace(_proof("rows", LINF), **change)])
    assert list(tmp_path.iterdir()) == []


ENTRY = {"target": "defense", "context": "solo", "batch": 1, "kind": "rows"}
GOOD = {"0/positions": torch.tensor([4, 0], dtype=torch.int32), "0/x": torch.zeros(2, *IMAGE, dtype=torch.int8)}
HEADER = {"format": "msa-eval-adversarial", "format_version": "1"}


def _hostile(path: Path, proofs: Any = (ENTRY,), tensors: dict[str, Any] | None = None, **header: str) -> Path:
    text = proofs if isinstance(proofs, str) else json.dumps(list(proofs))
    parts = {name: part for name, part in {**GOOD, **(tensors or {})}.items() if part is not None}
    save_file(parts, path, metadata={**HEADER, "proofs": text, **header})
    return path


def test_the_file_that_hostile_ones_are_made_from_is_good(tmp_path: Path) -> None:
    (proof,) = read(_hostile(tmp_path / "a"), _clean, LINF)
    assert torch.equal(proof.x, _clean(1)[[4, 0]])


NAN = torch.full((2, *IMAGE), torch.nan)


@pytest.mark.parametrize(
    ("proofs", "tensors", "header", "message"),
    [
        ((ENTRY,), {}, {"format": "pt"}, "no archive of adversarial batches"),
        ((ENTRY,), {}, {"format_version": "2"}, "archive format version 2, but this release reads 1"),
        ("{", {}, {}, "list of proofs is not readable"),
        ("[" * 100_000, {}, {}, "list of proofs is not readable"),
        ('{"0": 1}', {}, {}, "is not a list"),
        ("7", {}, {}, "is not a list"),
        (("x",), {}, {}, "proof 0: expected target, context, batch and kind"),
        (({**ENTRY, "more": 1},), {}, {}, "expected target, context, batch and kind"),
        (({**ENTRY, "target": 1},), {}, {}, "expected the name of a target"),
        (({**ENTRY, "kind": ["rows"]},), {}, {}, "unknown kind"),
        (({**ENTRY, "kind": None},), {}, {}, "unknown kind"),
        (({**ENTRY, "context": {}},), {}, {}, "unknown context"),
        (({**ENTRY, "batch": -1},), {}, {}, "expected the number of a batch, but got -1"),
        (({**ENTRY, "batch": True},), {}, {}, "expected the number of a batch"),
        (({**ENTRY, "batch": 1.0},), {}, {}, "expected the number of a batch"),
        (({**ENTRY, "batch": 99},), {}, {}, "no batch 99 in the plan"),
        (({**ENTRY, "batch": 10**60},), {}, {}, "no batch 10000"),
        ((ENTRY, ENTRY), {}, {}, "tensor 1/positions is missing"),
        ((), {}, {}, "tensor '0/positions' belongs to no proof"),
        ((ENTRY,), {"0/x": None}, {}, "tensor 0/x is missing"),
        ((ENTRY,), {"1/x": torch.zeros(3)}, {}, "tensor '1/x' belongs to no proof"),
        (({**ENTRY, "kind": "victims"},), {}, {}, "tensor 0/own is missing"),
        ((ENTRY,), {"0/positions": torch.tensor([0.0, 1.0])}, {}, "to be of type I32, but got F32"),
        ((ENTRY,), {"0/x": torch.zeros(2, *IMAGE, dtype=torch.float64)}, {}, "I8 or U8 or F16 or F32, but got F64"),
        ((ENTRY,), {"0/x": torch.zeros(2, *IMAGE, dtype=torch.bool)}, {}, "but got BOOL"),
        ((ENTRY,), {"0/x": NAN}, {}, "NaN or infinite"),
        ((ENTRY,), {"0/x": torch.full((2, *IMAGE), torch.inf).half()}, {}, "NaN or infinite"),
        ((ENTRY,), {"0/x": torch.zeros(3, *IMAGE)}, {}, r"expected x of shape \(2, 3, 4, 4\), but got \(3, 3, 4, 4\)"),
        ((ENTRY,), {"0/x": torch.zeros(2)}, {}, "expected x of shape"),
        ((ENTRY,), {"0/x": torch.zeros(())}, {}, "expected x of shape"),
        ((ENTRY,), {"0/positions": torch.tensor(3, dtype=torch.int32)}, {}, "expected positions of one dimension"),
        ((ENTRY,), {"0/positions": torch.tensor([[4, 0]], dtype=torch.int32)}, {}, "expected positions of one dim"),
        ((ENTRY,), {"0/positions": torch.tensor([4, 4], dtype=torch.int32)}, {}, "expected different positions"),
        ((ENTRY,), {"0/positions": torch.tensor([-1, 4], dtype=torch.int32)}, {}, "expected different positions"),
        ((ENTRY,), {"0/positions": torch.tensor([4, 6], dtype=torch.int32)}, {}, "positions in a batch of 6"),
    ],
)  # fmt: skip
def test_hostile_archives(proofs: Any, tensors: Any, header: Any, message: str, tmp_path: Path) -> None:
    path = _hostile(tmp_path / "a", proofs, tensors, **header)
    with pytest.raises(ValueError, match=message) as caught:
        read(path, _clean, LINF)
    assert len(str(caught.value)) < 500


def test_eight_bits_are_no_encoding_of_l2(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="8-bit perturbations are for Linf, but the protocol's norm is L2"):
        read(_hostile(tmp_path / "a"), _clean, L2)


@pytest.mark.parametrize("raw", [b"", b"\0" * 8, b"\xff" * 8 + b"{", b"\2" + b"\0" * 7 + b"{}", b"PK\3\4" * 9])
def test_files_of_other_kinds(raw: bytes, tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(raw)
    with pytest.raises(ValueError, match=r"not a readable safetensors file|no archive of"):
        read(tmp_path / "a", _clean, LINF)
    with pytest.raises(ValueError, match="there is no file"):
        read(tmp_path / "b", _clean, LINF)
    with pytest.raises(ValueError, match="there is no file"):
        read(tmp_path, _clean, LINF)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_a_damaged_file_is_refused_or_holds_points_of_the_ball(data: st.DataObject, tmp_path_factory: Any) -> None:
    folder = tmp_path_factory.mktemp("damaged")
    proofs = [_proof("victims", LINF), _proof("rows", LINF, context="composed"), _proof("batch", LINF, number=2)]
    _write(folder / "a", proofs)
    raw = bytearray((folder / "a").read_bytes())
    for at, value in data.draw(st.lists(st.tuples(st.integers(0, 2500), st.integers(0, 255)), min_size=1, max_size=5)):
        raw[at % len(raw)] = value
    (folder / "a").write_bytes(raw[: data.draw(st.sampled_from([len(raw), len(raw), len(raw) // 2, 9]))])
    try:
        found = read(folder / "a", _clean, LINF)
    except ValueError:
        return
    for proof in found:
        clean = _clean(proof.batch)
        base = clean[proof.positions] if proof.kind == "rows" else clean
        assert proof.x.dtype == torch.float32
        assert bool(torch.isfinite(proof.x).all())
        assert proof.x.shape == base.shape


def test_an_archive_says_how_many_proofs_it_has_and_can_be_read_twice(tmp_path: Path) -> None:
    _write(tmp_path / "a", [_proof("batch", LINF), _proof("rows", LINF)])
    archive = Archive(tmp_path / "a", _clean, LINF)
    assert len(archive) == 2
    assert [proof.kind for proof in archive] == [proof.kind for proof in archive] == ["batch", "rows"]


MASKS = st.integers(1, 7).flatmap(
    lambda size: st.lists(st.lists(st.booleans(), min_size=size, max_size=size), min_size=1, max_size=7)
)


@settings(max_examples=200, deadline=None)
@given(MASKS)
def test_the_cover_covers_all_with_few(masks: list[list[bool]]) -> None:
    candidates = [(torch.tensor(mask), i) for i, mask in enumerate(masks)]
    union = torch.tensor(masks).any(dim=0)
    picked = cover(candidates)
    found = torch.stack([mask for mask, _ in picked]) if picked else torch.zeros(1, len(union), dtype=torch.bool)
    assert torch.equal(found.any(dim=0), union)
    assert int(found.sum(dim=0).max()) <= 1
    assert all(bool((mask & ~torch.tensor(masks[i])).logical_not().all()) and bool(mask.any()) for mask, i in picked)
    assert len(picked) <= int(union.sum())
    best = next(
        count
        for count in range(len(masks) + 1)
        for chosen in itertools.combinations(masks, count)
        if torch.equal(
            torch.tensor([any(column) for column in zip(*chosen, strict=True)] or [False] * len(union)), union
        )
    )
    assert best <= len(picked) <= best * sum(1 / i for i in range(1, len(union) + 1)) + 1e-9


def test_the_cover_of_nothing() -> None:
    assert cover([]) == []
    assert cover([(torch.zeros(3, dtype=torch.bool), "a")]) == []
