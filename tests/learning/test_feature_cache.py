"""The feature cache: encoded once ever, private, bounded, and damage is a miss."""

from __future__ import annotations

import sqlite3
import stat
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fedsecure.data.dataset import Dataset, Subset
from fedsecure.data.loading import from_arrays
from fedsecure.data.phantoms import CLASSES, SITES, generate
from fedsecure.errors import DataError, EnvironmentProblem
from fedsecure.learning.encoding import Encoded, encode_dataset, pace
from fedsecure.vision.cache import FeatureCache
from fedsecure.vision.encoder import Encoder, load_encoder


@pytest.fixture(scope="module")
def tiny() -> Encoder:
    return load_encoder("fedsecure-tiny", "bundled", device="cpu")


@pytest.fixture(scope="module")
def scans() -> Dataset:
    images, labels = generate(2, seed=4, acquisition=SITES["site_a"])
    return from_arrays(images, labels, classes=CLASSES)


@pytest.fixture
def encoded(tiny: Encoder, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many images each call of the encoder got."""
    calls: list[int] = []
    genuine = tiny.encode_images

    def counting(images: Any, **options: Any) -> Any:
        calls.append(len(images))
        return genuine(images, **options)

    monkeypatch.setattr(tiny, "encode_images", counting)
    return calls


def test_each_image_once_ever(tiny: Encoder, scans: Dataset, tmp_path: Path, encoded: list[int]) -> None:
    first = encode_dataset(scans, tiny, FeatureCache(tmp_path / "c"))
    again = encode_dataset(scans, tiny, FeatureCache(tmp_path / "c"))
    assert encoded == [8]
    assert first.tobytes() == again.tobytes()
    assert first.tobytes() == encode_dataset(scans, tiny, None).tobytes()
    assert first.shape == (8, 64)
    assert first.dtype == np.float32


def test_only_what_is_new(tiny: Encoder, scans: Dataset, tmp_path: Path, encoded: list[int]) -> None:
    cache = FeatureCache(tmp_path)
    part = encode_dataset(Subset(scans, [6, 1]), tiny, cache)
    seen: list[tuple[int, int]] = []
    whole = encode_dataset(scans, tiny, cache, progress=lambda *x: seen.append(x))
    assert encoded == [2, 6]
    assert seen == [(2, 8), (8, 8)]
    np.testing.assert_array_equal(whole[[6, 1]], part)


def test_equal_images_are_encoded_once(tiny: Encoder, tmp_path: Path, encoded: list[int]) -> None:
    images, _ = generate(1, seed=4, acquisition=SITES["site_a"])
    double = from_arrays(np.concatenate([images, images]), np.zeros(8, int), classes=CLASSES)
    features = encode_dataset(double, tiny, FeatureCache(tmp_path))
    assert encoded == [4]
    np.testing.assert_array_equal(features[:4], features[4:])


def test_another_encoder_shares_nothing(
    tiny: Encoder, scans: Dataset, tmp_path: Path, encoded: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = FeatureCache(tmp_path)
    encode_dataset(scans, tiny, cache)
    monkeypatch.setattr(tiny, "fingerprint", "0" * 64)
    encode_dataset(scans, tiny, cache)
    assert encoded == [8, 8]
    assert len(cache) == 16


@pytest.mark.parametrize("column", ["vector", "checksum"])
def test_damaged_row_is_a_miss_and_is_mended(
    tiny: Encoder, scans: Dataset, tmp_path: Path, encoded: list[int], column: str
) -> None:
    cache = FeatureCache(tmp_path)
    good = encode_dataset(scans, tiny, cache)
    with closing(sqlite3.connect(tmp_path / "features.sqlite")) as db:
        db.execute(
            f"UPDATE features SET {column} = zeroblob(length({column})) WHERE content = ?", (scans.content_key(3),)
        )
        db.commit()
    np.testing.assert_allclose(encode_dataset(scans, tiny, cache), good, atol=1e-4)
    encode_dataset(scans, tiny, cache)
    assert encoded == [8, 1]


@pytest.mark.parametrize("content", [b"garbage" * 1000, b"SQLite format 3\0" + b"\xff" * 5000])
def test_damaged_file_is_begun_again(
    tiny: Encoder, scans: Dataset, tmp_path: Path, encoded: list[int], content: bytes
) -> None:
    cache = FeatureCache(tmp_path)
    good = encode_dataset(scans, tiny, cache)
    (tmp_path / "features.sqlite").write_bytes(content)
    assert encode_dataset(scans, tiny, cache).tobytes() == good.tobytes()
    assert encode_dataset(scans, tiny, cache).tobytes() == good.tobytes()
    assert encoded == [8, 8]


def test_private(tiny: Encoder, scans: Dataset, tmp_path: Path) -> None:
    folder = tmp_path / "c"
    folder.mkdir(mode=0o755)
    encode_dataset(scans, tiny, FeatureCache(folder))
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert stat.S_IMODE((folder / "features.sqlite").stat().st_mode) == 0o600


def test_bounded(tmp_path: Path) -> None:
    cache = FeatureCache(tmp_path, max_bytes=200_000)
    for batch in range(20):
        keys = [bytes([batch, i]) for i in range(50)]
        cache.put("f", {k: np.full(64, batch, np.float32) for k in keys})
    assert (tmp_path / "features.sqlite").stat().st_size < 500_000
    assert 50 < len(cache) < 1000
    assert cache.get("f", [bytes([0, 0])], dimension=64) == {}
    newest = cache.get("f", [bytes([19, 49])], dimension=64)
    np.testing.assert_array_equal(newest[bytes([19, 49])], np.full(64, 19, np.float32))


def test_other_width_is_a_miss(tmp_path: Path) -> None:
    cache = FeatureCache(tmp_path)
    cache.put("f", {b"k": np.ones(8, np.float32)})
    assert cache.get("f", [b"k"], dimension=4) == {}


def test_stopped_run_keeps_what_it_has(
    tiny: Encoder, scans: Dataset, tmp_path: Path, encoded: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedsecure.learning.encoding._CHUNK", 4)
    cache = FeatureCache(tmp_path)

    def stop(done: int, total: int) -> None:
        if done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        encode_dataset(scans, tiny, cache, progress=stop)
    encode_dataset(scans, tiny, cache)
    assert encoded == [4, 4]


def test_feature_data_sets_are_refused(tiny: Encoder, tmp_path: Path) -> None:
    vectors = from_arrays(np.eye(4), [0, 1, 2, 3], classes=CLASSES)
    with pytest.raises(DataError, match="FS-1123"):
        encode_dataset(vectors, tiny, FeatureCache(tmp_path))


def test_unusable_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(EnvironmentProblem, match="FS-1813"):
        FeatureCache(tmp_path / "file" / "cache")
    cache = FeatureCache(tmp_path / "c")
    (tmp_path / "c" / "features.sqlite").mkdir()
    with pytest.raises(EnvironmentProblem, match="FS-1813"):
        len(cache)


def test_the_pace_is_told_now_and_then_and_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 1.0, 3.0, 3.5, 4.0])
    monkeypatch.setattr("fedsecure.learning.encoding.time.monotonic", lambda: next(clock))
    told: list[Encoded] = []
    watch = pace(told.append, "scans")
    for done in (100, 150, 250, 260, 500):
        watch(done, 500)
    assert list(map(str, told)) == [
        "encoding scans: 250/500 images, 50/s",
        "encoding scans: 500/500 images, 100/s",
    ]


def test_every_pass_over_images_has_a_pace_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a second view of the same scans, or another set with the same name, some of it known before."""
    clock = iter([0.0, 1.0, 10.0, 12.0, 20.0, 21.0])
    monkeypatch.setattr("fedsecure.learning.encoding.time.monotonic", lambda: next(clock))
    told: list[Encoded] = []
    watch = pace(told.append, "scans", every=0)
    for done, count in ((0, 50), (50, 50), (0, 50), (50, 50), (80, 100), (100, 100)):
        watch(done, count)
    assert [(far.done, far.rate) for far in told] == [(50, 50), (50, 25), (100, 20)]


@pytest.mark.parametrize("rate", [0.25, 7.5, 87.654, 2345.6])
def test_a_line_of_the_pace_can_be_read_again(rate: float) -> None:
    far = Encoded("scans: new, 2", 1_500, 20_000, rate)
    again = Encoded.read(f"{far}\n")
    assert again is not None
    assert (again.name, again.done, again.count) == (far.name, far.done, far.count)
    assert again.rate == pytest.approx(rate, rel=0.005)
    assert Encoded.read("joined brain-tumour") is None


def test_nothing_is_said_where_everything_is_known() -> None:
    said: list[Encoded] = []
    pace(said.append, "scans")(7, 7)
    assert not said


def test_batches_are_prepared_ahead_and_come_out_in_order(tiny: Encoder) -> None:
    """One image at a time, in batches, and with a size that does not divide: the same features at their own places."""
    shown = [Image.fromarray(np.full((20, 20, 3), 12 * i, np.uint8)) for i in range(11)]
    alone = np.concatenate([tiny.encode_images([image]) for image in shown])
    seen: list[tuple[int, int]] = []
    for size in (1, 4, 11, 64):
        found = tiny.encode_images(shown, batch_size=size, progress=lambda *x: seen.append(x))
        np.testing.assert_allclose(found, alone, atol=1e-4)
    assert seen[-5:] == [(4, 11), (8, 11), (11, 11), (11, 11), (11, 11)]
    assert tiny.encode_images([]).shape == (0, tiny.dimension)


def test_an_image_that_cannot_be_read_ends_the_encoding_with_its_own_error(tiny: Encoder) -> None:
    class Broken(list):  # type: ignore[type-arg]
        def __getitem__(self, i: int) -> Image.Image:  # type: ignore[override]
            if i == 5:
                raise OSError("image 5")
            return Image.new("RGB", (9, 9))

    with pytest.raises(OSError, match="image 5"):
        tiny.encode_images(Broken([None] * 8), batch_size=4)
