"""Copies are found wherever they lie, and a test site is cleaned of what its training sites hold."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fedsecure.config import DatasetConfig
from fedsecure.data.dataset import Dataset
from fedsecure.data.duplicates import Place, difference_hash, find_duplicates, pairs_alike
from fedsecure.data.loading import from_arrays, open_dataset
from fedsecure.errors import DataError


def picture(seed: int) -> np.ndarray:
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 6), np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((48, 48), Image.Resampling.BICUBIC))


def save(folder: Path, *pictures: np.ndarray, suffix: str = "png") -> None:
    folder.mkdir(parents=True)
    for number, pixels in enumerate(pictures):
        Image.fromarray(pixels).save(folder / f"{number:03}.{suffix}")


@pytest.fixture
def sites(tmp_path: Path) -> dict[str, Dataset]:
    save(tmp_path / "a" / "cat", picture(0), picture(1), picture(1))
    save(tmp_path / "a" / "dog", picture(2))
    save(tmp_path / "b" / "cat", picture(3), picture(0))
    save(tmp_path / "test" / "cat", picture(0), picture(4), picture(5), picture(5))
    return {
        name: open_dataset(DatasetConfig(name=name, path=tmp_path / name), classes=("cat", "dog"))
        for name in ("a", "b", "test")
    }


def test_copies_are_found_within_and_between_sites(sites: dict[str, Dataset]) -> None:
    read: list[int] = []
    overlap = find_duplicates(sites, step=read.append)
    assert sum(read) == 10
    assert overlap.records == {"a": 4, "b": 2, "test": 4}
    assert [[place.record for place in group.places] for group in overlap.groups] == [
        ["cat/000.png", "cat/001.png", "cat/000.png"],
        ["cat/001.png", "cat/002.png"],
        ["cat/002.png", "cat/003.png"],
    ]
    assert [group.sites for group in overlap.shared()] == [("a", "b", "test")]
    assert overlap.near == ()


def test_a_clean_test_set_has_neither_repeats_nor_training_images(sites: dict[str, Dataset]) -> None:
    overlap = find_duplicates(sites)
    assert overlap.kept("test", against=("a", "b")) == (1, 2)
    assert overlap.kept("test") == (0, 1, 2)
    assert overlap.kept("a") == (0, 1, 3)
    with pytest.raises(DataError, match="FS-1135"):
        overlap.kept("c")
    with pytest.raises(DataError, match="FS-1135"):
        overlap.kept("a", against=("c",))


def test_a_re_encoded_copy_looks_alike_but_is_not_equal(tmp_path: Path, sites: dict[str, Dataset]) -> None:
    save(tmp_path / "c" / "cat", picture(3), suffix="jpg")
    sites["c"] = open_dataset(DatasetConfig(name="c", path=tmp_path / "c"), classes=("cat", "dog"))
    overlap = find_duplicates(sites, near_bits=4)
    assert [(near.first.site, near.second.site) for near in overlap.near] == [("b", "c")]
    assert overlap.near[0].bits <= 4
    assert all(place.site != "c" for group in overlap.groups for place in group.places)


def test_pictures_without_an_edge_look_like_nothing(tmp_path: Path) -> None:
    """Black slices of different size would otherwise pair with one another, every one with every other."""
    for number, site in enumerate(("one", "two")):
        save(tmp_path / site / "cat", np.zeros((40 + number, 40), np.uint8), picture(number))
    sites = {
        name: open_dataset(DatasetConfig(name=name, path=tmp_path / name), classes=("cat",)) for name in ("one", "two")
    }
    assert find_duplicates(sites, near_bits=1).near == ()


def test_many_pictures_are_paired_block_by_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a plain comparison of every two does, and pairs within one site are left out."""
    draws = np.random.default_rng(0)
    hashes = [int(h) for h in draws.integers(1, 1 << 6, 90)]
    looks = [(Place("ab"[i % 2], i, f"{i:02}"), look) for i, look in enumerate(hashes)]
    expected = {
        (i, j, (hashes[i] ^ hashes[j]).bit_count())
        for i in range(90)
        for j in range(i + 1, 90)
        if (i - j) % 2 and (hashes[i] ^ hashes[j]).bit_count() <= 1
    }
    for block in (1, 7 * 90, 1 << 19):
        monkeypatch.setattr("fedsecure.data.duplicates._PAIRS", block)
        found = [(near.first.index, near.second.index, near.bits) for near in pairs_alike(looks, 1)]
        assert set(found) == expected
        assert len(found) == len(expected) > 100
        assert [bits for *_, bits in found] == sorted(bits for *_, bits in found), "most alike first"


def test_the_hash_sees_light_and_not_size() -> None:
    image = Image.fromarray(picture(9))
    larger = image.resize((96, 96), Image.Resampling.BICUBIC)
    assert (difference_hash(image) ^ difference_hash(larger)).bit_count() <= 4
    assert (difference_hash(image) ^ difference_hash(Image.fromarray(255 - picture(9)))).bit_count() > 40
    assert difference_hash(Image.new("RGB", (1, 1))) == 0


def test_features_are_compared_by_content_only() -> None:
    rows = np.eye(4, dtype=np.float32)
    labels = np.zeros(4, np.int64)
    sites: dict[str, Dataset] = {
        name: from_arrays(part, labels[: len(part)], classes=("x", "y"), name=name)
        for name, part in (("one", rows[:3]), ("two", rows[2:]))
    }
    assert [len(group.places) for group in find_duplicates(sites).groups] == [2]
    with pytest.raises(DataError, match="FS-1136"):
        find_duplicates(sites, near_bits=2)


@pytest.mark.parametrize("bits", [-1, 17])
def test_how_alike_has_bounds(bits: int) -> None:
    with pytest.raises(DataError, match="FS-1136"):
        find_duplicates({}, near_bits=bits)


def test_every_content_is_left_once_at_its_first_training_site(sites: dict[str, Dataset]) -> None:
    overlap = find_duplicates(sites)
    assert overlap.clean(test="test") == {"a": (0, 1, 3), "b": (0,), "test": (1, 2)}
    assert overlap.clean(test="a") == {"a": (1, 3), "b": (0, 1), "test": (1, 2)}
    assert overlap.clean()["a"] == (0, 1, 3)
    with pytest.raises(DataError, match="FS-1135"):
        overlap.clean(test="c")
