"""Phantoms and partitions: seeded, distinct, complete."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsecure.config import DatasetConfig
from fedsecure.data.loading import open_dataset
from fedsecure.data.partition import dirichlet, iid, quantity
from fedsecure.data.phantoms import CLASSES, SITES, Acquisition, generate, write_federation
from fedsecure.errors import DataError


def test_same_seed_same_bytes() -> None:
    a, b, c = (generate(3, seed=s, acquisition=SITES["site_a"]) for s in (5, 5, 6))
    assert a[0].tobytes() == b[0].tobytes()
    assert a[0].tobytes() != c[0].tobytes()
    assert a[0].shape == (12, 64, 64)
    assert a[0].dtype == np.uint8
    assert np.bincount(a[1]).tolist() == [3, 3, 3, 3]


def test_sites_differ_in_acquisition() -> None:
    seen = {name: generate(4, seed=1, acquisition=a)[0] for name, a in SITES.items()}
    means = [round(float(x.mean()), 3) for x in seen.values()]
    assert len(set(means)) == len(SITES) == 8


def test_properties_of_the_scanner_show() -> None:
    def scans(**changes: float) -> np.ndarray:
        plain = {"noise": 0.0, "rotation_spread": 0.0, "shift_spread": 0.0} | changes
        return generate(4, seed=2, acquisition=Acquisition(**plain))[0].astype(float)

    def roughness(x: np.ndarray) -> float:
        return float(np.abs(np.diff(x, axis=2)).mean())

    assert roughness(scans(noise=0.1)) > roughness(scans()) > roughness(scans(blur=1.5))
    assert scans(field_of_view=1.4).mean() < scans().mean()
    assert scans(contrast=0.5).std() < scans().std()
    np.testing.assert_allclose(scans(inverted=1).mean() + scans().mean(), 255, atol=1)


def test_federation_on_disk_opens(tmp_path: Path) -> None:
    assert write_federation(tmp_path, sites=3, per_class=2, test_per_class=1, seed=3) == ("site_a", "site_b", "site_c")
    config = DatasetConfig(name="p", path=tmp_path / "site_b", split="train")
    ds = open_dataset(config, classes=CLASSES)
    assert np.bincount(ds.labels).tolist() == [2, 2, 2, 2]
    assert ds.image(0).size == (64, 64)
    test = open_dataset(config.model_copy(update={"split": "test"}), classes=CLASSES)
    keys = [{d.content_key(i) for i in range(len(d))} for d in (ds, test)]
    assert not keys[0] & keys[1]
    with pytest.raises(DataError, match="FS-1142"):
        write_federation(tmp_path, sites=["site_c"], per_class=1, test_per_class=1, seed=3)


def test_bad_requests(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="FS-1140"):
        generate(0, seed=1, acquisition=Acquisition())
    for sites in (0, 9, ["nowhere"]):
        with pytest.raises(DataError, match="FS-1141"):
            write_federation(tmp_path, sites=sites, per_class=1, test_per_class=1, seed=1)


@settings(max_examples=30, deadline=None)
@given(st.integers(20, 200), st.integers(1, 6), st.integers(0, 1000), st.sampled_from(["iid", "dirichlet", "quantity"]))
def test_partitions_share_out_every_record_once(records: int, sites: int, seed: int, kind: str) -> None:
    labels = np.arange(records, dtype=np.int64) % 4
    draw = {
        "iid": lambda: iid(records, sites, seed=seed),
        "dirichlet": lambda: dirichlet(labels, sites, alpha=1.0, seed=seed),
        "quantity": lambda: quantity(records, sites, alpha=1.0, seed=seed),
    }[kind]
    parts = draw()
    assert len(parts) == sites
    assert sorted(np.concatenate(parts).tolist()) == list(range(records))
    assert all(len(p) >= 1 for p in parts)
    assert all((a == b).all() for a, b in zip(parts, draw(), strict=True))


def test_skew_follows_alpha() -> None:
    labels = np.repeat(np.arange(4), 250)

    def skew(alpha: float) -> float:
        parts = dirichlet(labels, 4, alpha=alpha, seed=1)
        return float(np.mean([np.bincount(labels[p], minlength=4).max() / len(p) for p in parts]))

    assert skew(0.1) > skew(100.0) + 0.2
    sizes = [len(p) for p in quantity(1000, 4, alpha=0.3, seed=1)]
    assert max(sizes) > 2 * min(sizes)


def test_partition_refuses() -> None:
    labels = np.zeros(10, dtype=np.int64)
    for act in (
        lambda: iid(3, 4, seed=0),
        lambda: dirichlet(labels, 2, alpha=0, seed=0),
        lambda: quantity(10, 2, alpha=float("nan"), seed=0),
        lambda: dirichlet(labels, 2, alpha=1, seed=0, minimum=6),
    ):
        with pytest.raises(DataError, match="FS-1130"):
            act()
    with pytest.raises(DataError, match="FS-1131"):
        quantity(10, 5, alpha=1e-3, seed=0, minimum=2)
