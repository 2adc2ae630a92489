"""Who pays is known, or refused, before anything is charged and before any record is opened."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fedsecure.config import DatasetConfig
from fedsecure.data import features
from fedsecure.data.loading import from_torch
from fedsecure.errors import DataError, PrivacyError
from fedsecure.privacy.ledger import Ledger
from fedsecure.privacy.noise import PrivacyRng
from fedsecure.site.sources import Sources


def hashes(folder: Path, lines: list[str], *, unit: str, ledger: Ledger) -> list[bytes]:
    """Keyed hashes of a manifest's units; its images are empty files, which no decoder would take."""
    for name in ("1.png", "2.png"):
        (folder / name).touch()
    (folder / "scans.csv").write_text("\n".join(lines))
    section = DatasetConfig(name="scans", path=folder / "scans.csv")
    return list(sources_of(ledger, unit)._hasher("train", section, None)().units)


def sources_of(ledger: Ledger, unit: str) -> Sources:
    settings = SimpleNamespace(classes=("cat", "eel"), privacy=SimpleNamespace(unit=unit))
    entry = SimpleNamespace(max_units=10, evaluation_units=10)
    member: Any = SimpleNamespace(settings=settings, entry=entry)
    return Sources(member, ledger, PrivacyRng(), lambda _: None)


@pytest.fixture
def ledger(tmp_path: Path) -> Any:
    with Ledger(tmp_path / "ledger.db") as opened:
        yield opened


def test_patients_pay_for_all_their_images(tmp_path: Path, ledger: Ledger) -> None:
    lines = ["file,label,patient", "1.png,cat,P1", "2.png,eel,P1"]
    found = hashes(tmp_path, lines, unit="patient", ledger=ledger)
    assert found[:1] == ledger.hash_units(["patient/P1"])
    assert len(found) == 5, "and each image by its place and its file"


@pytest.mark.parametrize("column", ["patient_id", "Patient", "subject"])
def test_a_unit_column_of_another_name_is_refused_before_the_charge(
    tmp_path: Path, ledger: Ledger, column: str
) -> None:
    lines = [f"file,label,{column}", "1.png,cat,P1", "2.png,eel,P2"]
    head = ledger.head()
    with pytest.raises(PrivacyError, match="FS-1246"):
        hashes(tmp_path, lines, unit="patient", ledger=ledger)
    assert ledger.head() == head
    assert len(hashes(tmp_path, lines, unit="record", ledger=ledger)) == 8, "two names each, and their marks"


def test_a_patient_without_images_is_refused_before_the_charge(tmp_path: Path, ledger: Ledger) -> None:
    with pytest.raises(DataError, match="FS-1113"):
        hashes(tmp_path, ["file,label,patient", "1.png,cat,P1", ",eel,P2"], unit="patient", ledger=ledger)
    assert ledger.head()[0] == 0


class Counted:
    """Images in memory that count how often one is fetched; labels are only in the items."""

    fetched = 0

    def __len__(self) -> int:
        return 3

    def __getitem__(self, i: int) -> tuple[Image.Image, int]:
        self.fetched += 1
        return Image.new("RGB", (4, 4)), i % 2


@pytest.mark.parametrize("unit", ["patient", "record"])
def test_no_item_of_a_torch_data_set_is_fetched_before_the_charge(tmp_path: Path, ledger: Ledger, unit: str) -> None:
    items = Counted()
    dataset = from_torch(items, classes=("cat", "eel"), patients=("P1", "P1", "P2"), name="scans")
    section = DatasetConfig(name="scans", path=tmp_path / "nowhere")
    found = sources_of(ledger, unit)._hasher("train", section, dataset)()
    assert list(found.units[:2]) == ledger.hash_units(["patient/P1", "patient/P2"])
    assert items.fetched == 0
    assert dataset.labels.tolist() == [0, 1, 0]
    assert items.fetched == 3


@pytest.mark.parametrize("rows", [None, (1, 2)])
def test_only_the_patients_of_a_feature_file_are_read_before_the_charge(
    tmp_path: Path, ledger: Ledger, monkeypatch: pytest.MonkeyPatch, rows: tuple[int, int] | None
) -> None:
    file = tmp_path / "scans.npz"
    labels, patients = np.zeros(4, np.int64), np.array(["P1", "P2", "P3", "P2"])
    arrays = {"train_x": np.zeros((4, 3), np.float32), "train_y": labels, "train_patient": patients}
    np.savez(file, classes=np.array(["cat", "eel"]), text=np.eye(2, 3, dtype=np.float32), **arrays)
    read: list[str] = []
    genuine = features._read

    def watched(path: Path, key: str) -> Any:
        read.append(key)
        return genuine(path, key)

    monkeypatch.setattr(features, "_read", watched)
    section = DatasetConfig(name="scans", path=file, rows=rows)
    found = sources_of(ledger, "patient")._hasher("train", section, None)()
    patients = [f"patient/{name}" for name in (["P2"] if rows else ["P1", "P2", "P3"])]
    assert list(found.units[: len(patients)]) == ledger.hash_units(patients)
    assert {key for key in read if key.startswith("train_")} == {"train_patient"}
