"""Several views of a record: made once, from its own content, and bounded as one record is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fedsecure.config import DatasetConfig
from fedsecure.data.loading import open_dataset
from fedsecure.errors import ModelError
from fedsecure.learning.adapters import AdapterSpec
from fedsecure.learning.engines import clipped_sum
from fedsecure.learning.features import SiteFeatures, load_units
from fedsecure.learning.task import HeadTask
from fedsecure.learning.units import UnitFeatures
from fedsecure.learning.views import Viewed, view

CLASSES = ("a", "b")


class Eye:
    """Stands in for an encoder: four numbers of an image; counts what it is shown."""

    fingerprint, name, dimension = "ab" * 32, "eye", 4

    def __init__(self) -> None:
        self.shown = 0

    def encode_images(self, images: Any, *, batch_size: int = 64, progress: Any = None) -> Any:
        self.shown += len(images)
        rows = [np.asarray(image.convert("L").resize((2, 2)), np.float32).ravel() + 1 for image in images]
        return np.stack(rows)


def folder(path: Path, *, each: int = 3) -> Path:
    rng = np.random.default_rng(0)
    for name in CLASSES:
        (path / name).mkdir(parents=True)
        for index in range(each):
            Image.fromarray(rng.integers(0, 256, (12, 9, 3), dtype=np.uint8)).save(path / name / f"{index}.png")
    return path


def units_of(path: Path, eye: Eye, **changes: Any) -> UnitFeatures:
    data = open_dataset(DatasetConfig(name="scans", path=path), classes=CLASSES)
    constants: Any = SiteFeatures(np.eye(2, 4, dtype=np.float32), np.zeros(4, np.float32), 4, "ab" * 32, encoder=eye)  # type: ignore[arg-type]
    usual: dict[str, Any] = {"cache": None, "unit": "record", "cap": 1, "max_units": 6, "key": b"k"}
    return load_units(data, constants, **{**usual, **changes})


def test_views_are_rows_of_their_record_and_the_first_is_the_image(tmp_path: Path) -> None:
    path = folder(tmp_path / "scans")
    one, four = (units_of(path, Eye(), views=views) for views in (1, 4))
    assert four.features.shape == (6, 4, 4)
    assert four.mask.all()
    assert np.array_equal(four.features[:, 0], one.features[:, 0])
    assert np.array_equal(four.labels, np.repeat(one.labels, 4, axis=1))
    for row in four.features:
        assert len({tuple(seen) for seen in row}) == 4, "every view is another"
    assert np.array_equal(four.features, units_of(path, Eye(), views=4).features), "the same ones in every run"


def test_a_view_depends_on_its_number_and_its_image_alone(tmp_path: Path) -> None:
    path = folder(tmp_path / "scans")
    before = units_of(path, Eye(), views=3)
    (path / "a" / "0.png").unlink()
    after = units_of(path, Eye(), views=3)
    kept = {tuple(unit.ravel()) for unit in after.features}
    assert kept < {tuple(unit.ravel()) for unit in before.features}


def test_each_view_is_encoded_once_ever(tmp_path: Path) -> None:
    path, cache = folder(tmp_path / "scans"), tmp_path / "cache"
    first, again, more = Eye(), Eye(), Eye()
    units_of(path, first, views=3, cache=cache)
    units_of(path, again, views=3, cache=cache)
    units_of(path, more, views=4, cache=cache)
    assert (first.shown, again.shown, more.shown) == (18, 0, 6)


def test_a_patient_keeps_whole_records_with_all_their_views() -> None:
    rng = np.random.default_rng(1)
    wide = UnitFeatures(
        rng.normal(size=(2, 3, 10)).astype(np.float32),
        np.array([[0, 1, 0], [1, 0, 0]]),
        np.array([[True, True, True], [True, False, False]]),
    )
    seen = wide.spread(2)
    assert seen.features.shape == (2, 6, 5)
    assert np.array_equal(seen.features[0, 2:4].ravel(), wide.features[0, 1])
    assert seen.labels[0].tolist() == [0, 0, 1, 1, 0, 0]
    assert seen.mask[1].tolist() == [True, True, False, False, False, False]
    assert seen.weights.sum(axis=1) == pytest.approx([1, 1])


@pytest.mark.parametrize("kind", ["linear", "facmic"])
def test_a_records_gradient_is_the_mean_over_its_views_clipped_once(kind: Any) -> None:
    rng = np.random.default_rng(2)
    spec = AdapterSpec(kind, 6, 3)
    task = HeadTask(spec, rng.normal(size=(3, 6)).astype(np.float32), np.zeros(6, np.float32), 5.0)
    tensors = {name: value + 0.1 * rng.normal(size=value.shape) for name, value in spec.initial(b"").items()}
    labels = np.repeat(rng.integers(0, 3, (5, 1)), 4, axis=1)
    units = UnitFeatures(rng.normal(size=(5, 4, 6)).astype(np.float32), labels, np.ones((5, 4), np.bool_))

    def summed(part: UnitFeatures, clip: float) -> Any:
        return clipped_sum(task, tensors, part, max_grad_norm=clip, device="cpu")

    whole, clip = summed(units, 0.1), 0.1
    for row in range(5):
        alone = [summed(UnitFeatures(units.features[row : row + 1, k : k + 1], labels[:1, :1] * 0 + labels[row, 0],
                                     np.ones((1, 1), np.bool_)), 1e6) for k in range(4)]  # fmt: skip
        mean = np.mean(alone, axis=0)
        expected = mean * min(1.0, clip / float(np.linalg.norm(mean)))
        own = summed(units.select(slice(row, row + 1)), clip)
        np.testing.assert_allclose(own, expected, rtol=1e-4, atol=1e-7)
        # However many views it has, a record moves the sum by at most C.
        rest = summed(units.select(np.arange(5) != row), clip)
        assert np.linalg.norm(whole - rest) <= clip * (1 + 1e-9)


def test_features_have_one_view(tmp_path: Path) -> None:
    file = tmp_path / "f.npz"
    np.savez(
        file,
        classes=np.array(CLASSES),
        text=np.eye(2, 4, dtype=np.float32),
        train_x=np.ones((4, 4), np.float32),
        train_y=np.arange(4) % 2,
    )
    data = open_dataset(DatasetConfig(name="t", path=file, split="train"), classes=CLASSES)
    constants = SiteFeatures(np.eye(2, 4, dtype=np.float32), np.zeros(4, np.float32), 4, "ab" * 32)
    with pytest.raises(ModelError, match="FS-1677"):
        load_units(data, constants, cache=None, unit="record", cap=1, max_units=4, key=b"k", views=2)


@pytest.mark.parametrize("size", [(1, 1), (1, 40), (7, 3)])
@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1"])
def test_any_image_can_be_seen(size: tuple[int, int], mode: str) -> None:
    image = Image.new(mode, size)
    for number in range(6):
        seen = view(image, number, key=b"any")
        assert min(seen.size) >= 1
    assert view(image, 0, key=b"any") is image


def test_views_of_one_image_are_other_contents(tmp_path: Path) -> None:
    data = open_dataset(DatasetConfig(name="s", path=folder(tmp_path / "s")), classes=CLASSES)
    keys = {Viewed(data, number).content_key(0) for number in range(5)}
    assert len(keys) == 5
    assert data.content_key(0) in keys
