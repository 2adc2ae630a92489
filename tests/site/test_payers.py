"""A unit is found again by any of its names, and is charged for one use and by one unit of privacy only."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from PIL import Image

from fedsecure.config import DatasetConfig
from fedsecure.data.loading import from_arrays
from fedsecure.errors import LedgerError
from fedsecure.messages import Event, Population
from fedsecure.privacy.ledger import Ledger
from fedsecure.privacy.payers import Names, Payers, payers
from fedsecure.site.sources import _names, _place
from tests.site.test_sources import sources_of

Unit = Literal["patient", "record"]
ALL = "cat/1.png cat/2.png eel/3.png eel/4.png"
NAMES = Names(patients=["patient/P1"], records=["record/a/1", "file/1.png"])


@pytest.fixture
def ledger(tmp_path: Path) -> Any:
    with Ledger(tmp_path / "ledger.db") as opened:
        yield opened


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    for name in ALL.split():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4)).save(folder / name)
    return folder


def charge(ledger: Ledger, who: Payers, number: int, *, population: Population = "train", name: str = "scans") -> float:
    return ledger.reserve(
        dataset=name,
        population=population,
        events=(Event(population, "training", 2.0, 2.0),),
        run=f"{number:032x}",
        round=0,
        attempt=0,
        query_digest=bytes(32),
        limit_epsilon=50.0,
        delta=1e-5,
        units=who,
    ).epsilon


def who(ledger: Ledger, path: Path, unit: Unit, population: Population = "train") -> Payers:
    """As the site that is given this path works it out."""
    return sources_of(ledger, unit)._hasher(population, DatasetConfig(name="scans", path=path), None)()


def manifest(
    folder: Path, name: str, *, patients: bool, files: str = "cat/1.png cat/2.png eel/3.png eel/4.png"
) -> Path:
    lines = ["file,label" + (",patient" if patients else "")]
    lines += [f"{file},{file[:3]}" + (f",P{n}" if patients else "") for n, file in enumerate(files.split())]
    (folder / name).write_text("\n".join(lines))
    return folder / name


def test_other_descriptions_of_the_same_images_inherit_what_they_have_paid(
    images: Path, tmp_path: Path, ledger: Ledger
) -> None:
    """With patients, without, as a folder of classes, by way of a link, in part: one and the same history."""
    (tmp_path / "link").symlink_to(images)
    (images / "eel" / "alias.png").symlink_to(images / "eel" / "3.png")
    seen = [
        (manifest(images, "a.csv", patients=True), "patient"),
        (manifest(images, "b.csv", patients=False), "record"),
        (images, "record"),
        (tmp_path / "link" / manifest(images, "c.csv", patients=False, files="cat/2.png eel/3.png").name, "record"),
        (manifest(images, "d.csv", patients=False, files="eel/alias.png"), "record"),
    ]
    spent = [
        charge(ledger, who(ledger, path, unit), number, name=f"name {number}")  # type: ignore[arg-type]
        for number, (path, unit) in enumerate(seen)
    ]
    assert spent == sorted(set(spent)), "each run is dearer than the one before"
    (images / "cat" / "new.png").write_bytes((images / "cat" / "1.png").read_bytes())
    fresh = who(ledger, manifest(images, "e.csv", patients=False, files="cat/new.png"), "record")
    assert charge(ledger, fresh, 9, name="another") == spent[0], "a copy is another record, as the manual says"


@pytest.mark.parametrize("unit", ["patient", "record"])
@pytest.mark.parametrize("first", ["train", "evaluation"])
def test_a_unit_is_trained_on_or_evaluated_in_one_run_or_another(
    images: Path, ledger: Ledger, unit: Unit, first: Population
) -> None:
    second: Population = "evaluation" if first == "train" else "train"
    whole, half = manifest(images, "a.csv", patients=True), "cat/1.png eel/3.png"
    charge(ledger, who(ledger, manifest(images, "b.csv", patients=True, files=half), unit, first), 1, population=first)
    head = ledger.head()
    with pytest.raises(LedgerError, match="FS-1272"):
        charge(ledger, who(ledger, whole, unit, second), 2, population=second, name="others")
    assert ledger.head() == head
    for number, path in enumerate((whole, images / "a.csv")):
        charge(ledger, who(ledger, path, unit, first), 3 + number, population=first)


def test_the_other_half_may_be_evaluated(images: Path, ledger: Ledger) -> None:
    train = manifest(images, "a.csv", patients=False, files="cat/1.png eel/3.png")
    test = manifest(images, "b.csv", patients=False, files="cat/2.png eel/4.png")
    charge(ledger, who(ledger, train, "record"), 1)
    charge(ledger, who(ledger, test, "record", "evaluation"), 2, population="evaluation")


def test_a_void_charge_is_none(ledger: Ledger) -> None:
    made = ledger.reserve(
        dataset="scans",
        population="train",
        events=(Event("train", "training", 2.0, 2.0),),
        run="0" * 32,
        round=0,
        attempt=0,
        query_digest=bytes(32),
        limit_epsilon=8.0,
        delta=1e-5,
        units=payers(NAMES, "train", unit="record", key=ledger.key),
    )
    ledger.void(made, "the line was down")
    charge(ledger, payers(NAMES, "evaluation", unit="patient", key=ledger.key), 1, population="evaluation")
    charge(ledger, payers(Names(patients=["patient/P2"]), "train", unit="patient", key=ledger.key), 2)


def test_by_patient_after_by_record_is_refused_and_not_the_other_way_round(ledger: Ledger) -> None:
    by_patient, by_record = (payers(NAMES, "train", unit=unit, key=ledger.key) for unit in ("patient", "record"))
    first = charge(ledger, by_patient, 1)
    assert charge(ledger, by_record, 2) > first, "a record has paid what its patient has"
    head = ledger.head()
    for number in (3, 4):
        with pytest.raises(LedgerError, match="FS-1271"):
            charge(ledger, by_patient, number)
    assert ledger.head() == head
    charge(ledger, by_record, 5)
    with pytest.raises(LedgerError, match="FS-1271"):
        ledger.afford(dataset="x", population="train", events=(), limit_epsilon=8.0, delta=1e-5, units=by_patient)


def test_patients_that_are_known_later_have_been_charged_by_record(images: Path, ledger: Ledger) -> None:
    """The first manifest had no patients; the second names them for some of the same files."""
    charge(ledger, who(ledger, manifest(images, "a.csv", patients=False), "record"), 1)
    head = ledger.head()
    later = manifest(images, "b.csv", patients=True, files="cat/2.png eel/4.png")
    with pytest.raises(LedgerError, match="FS-1271"):
        charge(ledger, who(ledger, later, "patient"), 2, name="others")
    assert ledger.head() == head


def test_rows_of_arrays_are_nobody_elses(tmp_path: Path, ledger: Ledger) -> None:
    """Two arrays of one section have rows of the same numbers, which may be of other records."""
    section = DatasetConfig(name="scans", path=tmp_path / "nowhere")
    values = np.zeros((3, 5), np.float32)
    records = from_arrays(values, [0, 1, 1], classes=("cat", "eel"), name="scans")
    names = _names(records, place=_place(section), given=True)
    assert not names.records
    assert len(names.rows) == 3
    charge(ledger, payers(names, "train", unit="record", key=ledger.key), 1)
    charge(ledger, payers(names, "evaluation", unit="record", key=ledger.key), 2, population="evaluation")
