"""Who pays is known, or refused, before anything is charged and before any record is opened."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fedsecure.config import DatasetConfig
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
    settings = SimpleNamespace(classes=("cat", "eel"), privacy=SimpleNamespace(unit=unit))
    entry = SimpleNamespace(max_units=10, evaluation_units=10)
    member: Any = SimpleNamespace(settings=settings, entry=entry)
    sources = Sources(member, ledger, PrivacyRng(), lambda _: None)
    return list(sources._hasher("train", section, None)())


@pytest.fixture
def ledger(tmp_path: Path) -> Any:
    with Ledger(tmp_path / "ledger.db") as opened:
        yield opened


def test_patients_pay_for_all_their_images(tmp_path: Path, ledger: Ledger) -> None:
    lines = ["file,label,patient", "1.png,cat,P1", "2.png,eel,P1"]
    assert hashes(tmp_path, lines, unit="patient", ledger=ledger) == ledger.hash_units(["patient/P1"])


@pytest.mark.parametrize("column", ["patient_id", "Patient", "subject"])
def test_a_unit_column_of_another_name_is_refused_before_the_charge(
    tmp_path: Path, ledger: Ledger, column: str
) -> None:
    lines = [f"file,label,{column}", "1.png,cat,P1", "2.png,eel,P2"]
    head = ledger.head()
    with pytest.raises(PrivacyError, match="FS-1246"):
        hashes(tmp_path, lines, unit="patient", ledger=ledger)
    assert ledger.head() == head
    assert len(hashes(tmp_path, lines, unit="record", ledger=ledger)) == 2


def test_a_patient_without_images_is_refused_before_the_charge(tmp_path: Path, ledger: Ledger) -> None:
    with pytest.raises(DataError, match="FS-1113"):
        hashes(tmp_path, ["file,label,patient", "1.png,cat,P1", ",eel,P2"], unit="patient", ledger=ledger)
    assert ledger.head()[0] == 0
