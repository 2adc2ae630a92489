"""Real images and real CLIP features open; skipped where the research data is not beside the repository."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from fedsecure.config import DatasetConfig
from fedsecure.data.features import read_feature_header
from fedsecure.data.loading import open_dataset

SHARED = Path(os.environ.get("FEDSECURE_SHARED", Path(__file__).resolve().parents[3] / "shared")) / "data"
pytestmark = [
    pytest.mark.shared_data,
    pytest.mark.skipif(not SHARED.is_dir(), reason="no research data folder beside the repository"),
]
TUMOURS = ("glioma_tumor", "meningioma_tumor", "no_tumor", "pituitary_tumor")


@pytest.mark.parametrize(
    ("site", "count"), [("client_0", 1474), ("client_1", 423), ("client_2", 949), ("client_3", 394)]
)
def test_brain_tumour_sites_open(site: str, count: int) -> None:
    ds = open_dataset(DatasetConfig(name=site, path=SHARED / "brain-tumor" / site), classes=TUMOURS)
    assert len(ds) == count
    assert set(ds.labels.tolist()) == {0, 1, 2, 3}
    assert ds.image(0).size == (160, 160)


@pytest.mark.parametrize(
    ("name", "classes", "sizes"),
    [
        ("caltech", 56, {"train": 896, "val": 1096, "test": 1641}),
        ("ucf101", 101, {"train": 1515, "val": 1898, "test": 3783}),
    ],
)
def test_real_features_open(name: str, classes: int, sizes: dict[str, int]) -> None:
    file = SHARED / f"{name}_clip_vitb32.npz"
    header = read_feature_header(file)
    assert (len(header.classes), header.dimension, dict(header.splits)) == (classes, 512, sizes)
    ds = open_dataset(DatasetConfig(name=name, path=file, split="test"), classes=header.classes)
    np.testing.assert_allclose(np.linalg.norm(ds.features(), axis=1), 1, atol=2e-3)
    start = ((ds.features() @ header.text.T).argmax(1) == ds.labels).mean()
    assert start == pytest.approx({"caltech": 0.9598, "ucf101": 0.4956}[name], abs=2e-3)
