"""What Python code holds samples in: pairs, loaders, data sets, and a stand-in for Hugging Face's ``datasets``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, TensorDataset

from msa_eval import Samples

X = torch.rand(7, 3, 4, 4, generator=torch.Generator().manual_seed(0))
Y = torch.tensor([0, 2, 1, 1, 0, 2, 2])
BYTES = (X * 255).round().byte()
PAIRS = TensorDataset(X, Y)


def _picture(number: int) -> Image.Image:
    return Image.fromarray(BYTES[number].permute(1, 2, 0).numpy())


class _Stream(IterableDataset[tuple[Tensor, Tensor]]):
    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter(zip(X, Y, strict=True))


class _Pictures(Dataset[tuple[Image.Image, int]]):
    """As torchvision's data sets: labels beside the images, which are decoded one by one."""

    classes = ("cat", "dog", "eel")

    def __init__(self, targets: Any = None) -> None:
        self.targets = Y.tolist() if targets is None else targets
        self.decoded: list[int] = []

    def __len__(self) -> int:
        return len(Y)

    def __getitem__(self, number: int) -> tuple[Image.Image, int]:
        self.decoded.append(number)
        return _picture(number), int(Y[number])


class ClassLabel:
    """Named as in ``datasets``."""

    names = ("cat", "dog", "eel")


class _Table:
    """The methods of a split of ``datasets`` that are used."""

    column_names = ("id", "img", "fine_label")
    features: Mapping[str, Any] = {"fine_label": ClassLabel()}
    dataset_name, split = "toy", "test"

    def __init__(self) -> None:
        self.decoded: list[int] = []

    def __len__(self) -> int:
        return len(Y)

    def __getitem__(self, key: Any) -> Any:
        if key == "fine_label":
            return Y.tolist()
        assert isinstance(key, int)
        self.decoded.append(key)
        return {"img": _picture(key), "fine_label": int(Y[key])}


@pytest.mark.parametrize(
    "given",
    [
        (X, Y),
        [X.numpy(), Y.numpy()],
        {"images": X, "labels": Y},
        [(x, y) for x, y in zip(X, Y, strict=True)],
        [(x.numpy(), int(y)) for x, y in zip(X, Y, strict=True)],
        [{"image": x, "label": y} for x, y in zip(X, Y, strict=True)],
        zip(X, Y, strict=True),
        PAIRS,
        Subset(PAIRS, range(7)),
        _Stream(),
        DataLoader(PAIRS, 3),
        DataLoader(PAIRS, None),
        DataLoader(_Stream(), 2),
        iter(DataLoader(PAIRS, 1)),
        Samples(X, Y),
    ],
)
def test_the_same_samples_from_other_holders(given: Any) -> None:
    found = Samples.of(given)
    assert torch.equal(found.x, X)
    assert torch.equal(found.y, Y)


def test_a_name_is_loaded() -> None:
    assert len(Samples.of("digits")) == 600


def test_a_shuffling_loader_is_refused_and_a_dropped_batch_told() -> None:
    with pytest.raises(ValueError, match=r"shuffles.*shuffle=False"):
        Samples.of(DataLoader(PAIRS, 3, shuffle=True))
    found = Samples.of(DataLoader(PAIRS, 3, drop_last=True))
    assert len(found) == 6
    assert found.notes == ("the DataLoader leaves out 1 of 7 samples",)


def test_only_what_is_asked_for_is_decoded() -> None:
    for given in (_Table(), _Pictures()):
        found = Samples.of(given)
        assert found.y.tolist() == Y.tolist()
        assert found.classes == ("cat", "dog", "eel")
        given.decoded.clear()
        held = found.decoded(torch.tensor([1, 4]))
        assert given.decoded == [1, 4]
        assert torch.equal(held.images(torch.tensor([4, 1])), BYTES[[4, 1]].float() / 255)
        assert given.decoded == [1, 4]
        with pytest.raises(LookupError, match="image 2 was not decoded"):
            held.images(torch.tensor([2]))
        assert found.digest() == Samples(BYTES, Y).digest()
        assert held.digest() != found.digest()


def test_the_name_of_a_split_and_the_columns_it_lacks() -> None:
    assert Samples.of(_Table()).name == "toy/test"
    table = _Table()
    table.column_names = ("id", "img", "bbox")  # type: ignore[assignment]
    with pytest.raises(ValueError, match=r"no column of labels among id, img, bbox; name it label"):
        Samples.of(table)

    class Splits(dict[str, Any]):
        column_names: Mapping[str, Any] = {}

    with pytest.raises(ValueError, match=r"one split, but got train, test; give one, as ds\['test'\]"):
        Samples.of(Splits(train=_Table(), test=_Table()))


def test_grey_pictures_among_coloured_ones_get_three_channels() -> None:
    class Mixed(_Table):
        def __getitem__(self, key: Any) -> Any:
            row = super().__getitem__(key)
            return row if key in ("fine_label", 5) else {"img": row["img"].convert("L")}

    assert Samples.of(Mixed()).x.shape == (7, 3, 4, 4)


def test_labels_that_a_data_set_contradicts() -> None:
    found = Samples.of(_Pictures(targets=(Y + 1).tolist()))
    with pytest.raises(ValueError, match=r"sample 0 has label 0, but targets say 1"):
        found.digest()


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        (X, None, r"expected images x and labels y.*but got Tensor without labels"),
        (DataLoader(PAIRS), Y, "a DataLoader|DataLoader holds its labels itself; leave y out"),
        (PAIRS, Y, "TensorDataset holds its labels itself"),
        (TensorDataset(X), None, r"expected pairs \(image, label\), but an entry is tuple"),
        ([{"image": X[0], "box": 3}], None, "but an entry is a dict of image, box"),
        ([(X[0], 1), (X[0][:, :2], 1)], None, "not all of one shape"),
        (iter([]), None, "no images"),
        ([(X[0], "cat")], None, "texts"),
    ],
)
def test_what_holds_no_samples(x: Any, y: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Samples.of(x, y)


def test_images_of_any_number_of_channels_are_evaluated() -> None:
    from msa_eval import evaluate

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4 * 9, 3)).eval()
    x = np.random.default_rng(0).random((9, 3, 3, 4))
    small = {"attack.apgd.steps": 1, "attack.square.queries": 1, "audit.samples": 0}
    results = evaluate(model, x, np.arange(9) % 3, protocol="quick", overrides=small)
    assert results.run["data"]["n"] == 9
