"""A site's public constants and units from feature files, and what is refused before and after reading."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from fedsecure.config import DatasetConfig, EncoderConfig
from fedsecure.data.loading import open_dataset, read_feature_header
from fedsecure.errors import ModelError, PrivacyError
from fedsecure.learning.features import SiteFeatures, load_site_features, load_units
from fedsecure.vision.encoder import load_encoder

CLASSES = ("a", "b", "c")


def feature_file(path: Path, *, mean: bool = False, patients: bool = False) -> Path:
    rng = np.random.default_rng(0)
    arrays: dict[str, Any] = {
        "classes": np.array(CLASSES),
        "text": rng.normal(size=(3, 6)).astype(np.float32),
        "train_x": rng.normal(size=(12, 6)).astype(np.float16),
        "train_y": np.arange(12) % 3,
    }
    if mean:
        arrays["mean"] = rng.normal(size=6).astype(np.float32) * 0.1
    if patients:
        arrays["train_patient"] = np.array([f"p{i // 4}" for i in range(12)])
    np.savez(path, **arrays)
    return path


def config(file: Path, **changes: Any) -> EncoderConfig:
    usual = {
        "model": "features",
        "pretrained": "file",
        "dimension": 6,
        "fingerprint": read_feature_header(file).fingerprint,
    }
    return EncoderConfig(**{**usual, **changes})


@pytest.mark.parametrize("mean", [False, True])
def test_constants_come_in_the_federations_order(tmp_path: Path, mean: bool) -> None:
    file = feature_file(tmp_path / "f.npz", mean=mean)
    header = read_feature_header(file)
    found = load_site_features(config(file), ("c", "a", "b"), file=file)
    assert np.array_equal(found.text, header.text[[2, 0, 1]])
    assert found.centre.any() == mean
    assert found.dimension == 6
    assert found.encoder is None
    assert found.fingerprint == header.fingerprint


def test_an_encoders_preprocessing_is_among_the_constants() -> None:
    encoder = load_encoder("fedsecure-tiny", "bundled", device="cpu")
    pinned = EncoderConfig(dimension=encoder.dimension, fingerprint=encoder.fingerprint)
    found = load_site_features(pinned, CLASSES, device="cpu").preprocessing
    assert found == {"by": "open_clip", "for": "fedsecure-tiny", **encoder.preprocessing}
    assert found["size"] == [64, 64]


def test_constants_that_are_not_the_runs_are_refused(tmp_path: Path) -> None:
    file = feature_file(tmp_path / "f.npz")
    other = feature_file(tmp_path / "g.npz", mean=True)
    with pytest.raises(ModelError, match="FS-1630"):
        load_site_features(config(file), CLASSES, file=other)
    with pytest.raises(ModelError, match="FS-1638"):
        load_site_features(config(file, dimension=7), CLASSES, file=file)
    with pytest.raises(ModelError, match=r"FS-1640.*names none"):
        load_site_features(config(file), CLASSES)
    with pytest.raises(ModelError, match=r"FS-1640.*'d'"):
        load_site_features(config(file), (*CLASSES, "d"), file=file)


def test_units_by_patient_and_by_record(tmp_path: Path) -> None:
    file = feature_file(tmp_path / "f.npz", patients=True)
    features = load_site_features(config(file), CLASSES, file=file)
    dataset = open_dataset(DatasetConfig(name="t", path=file), classes=CLASSES)
    usual: dict[str, Any] = {"cache": None, "cap": 3, "key": b"k"}
    patients = load_units(dataset, features, unit="patient", max_units=10, **usual)
    assert patients.features.shape == (3, 3, 6)
    assert patients.mask.all()
    records = load_units(dataset, features, unit="record", max_units=12, **usual)
    assert records.features.shape == (12, 1, 6)
    again = load_units(dataset, features, unit="record", max_units=12, **usual)
    assert np.array_equal(records.features, again.features)


def test_patients_are_not_made_up(tmp_path: Path) -> None:
    file = feature_file(tmp_path / "f.npz")
    features = load_site_features(config(file), CLASSES, file=file)
    dataset = open_dataset(DatasetConfig(name="t", path=file), classes=CLASSES)
    with pytest.raises(PrivacyError, match="FS-1246"):
        load_units(dataset, features, cache=None, unit="patient", cap=3, max_units=10, key=b"k")


def test_data_of_another_kind_or_width_is_refused(tmp_path: Path) -> None:
    file = feature_file(tmp_path / "f.npz")
    dataset = open_dataset(DatasetConfig(name="t", path=file), classes=CLASSES)
    usual: dict[str, Any] = {"cache": None, "unit": "record", "cap": 1, "max_units": 10, "key": b"k"}
    wide = SiteFeatures(np.zeros((3, 9), np.float32), np.zeros(9, np.float32), 9, "00" * 32)
    with pytest.raises(ModelError, match="FS-1638"):
        load_units(dataset, wide, **usual)
    images: Any = SimpleNamespace(index=lambda: None, name="scans", kind="image", patient_ids=None)
    with pytest.raises(ModelError, match="FS-1641"):
        load_units(images, wide, **usual)
