"""Whose budget a charge is (privacy.md, "Evasion"): keyed hashes of every name by which a unit may be met again.

A scan whose patient is known has several: the patient's, that of its place in the data set, and that of its file. So a
manifest that leaves the patients out, or lists the same files under another name, finds what they have paid.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from fedsecure.messages import Population

# What a run by record has charged it marks, under each of its names: whose records they are may be known later only.
_BY_RECORD = "by record/"


@dataclass(frozen=True, slots=True)
class Names:
    """What the units of a data set are called.

    Attributes:
        patients: ``patient/…``, distinct; empty where patients are unknown.
        records: every other name of a record, whose place or file is real.
        rows: names of records that are known by their number alone, such as rows of an array in memory.
    """

    patients: Sequence[str] = ()
    records: Sequence[str] = ()
    rows: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class Payers:
    """The hashes of a charge, 32 bytes each.

    Attributes:
        units: who pays; a unit has paid whatever was charged under any of its names.
        elsewhere: the same units in the other population, where none of them may have been charged: training and
            evaluation have a limit each, and a unit that is in both would spend them both.
        by_record: marks that no charge may have left. The price of a run by record is that of one record; a patient
            has paid more, and how much is not known any more.
    """

    units: Sequence[bytes]
    elsewhere: Sequence[bytes] = ()
    by_record: Sequence[bytes] = ()


def hash_names(names: Iterable[str], population: Population, key: bytes) -> list[bytes]:
    """HMAC-SHA256 over population and name, 32 bytes for each name, in order."""
    start = hmac.new(key, b"fedsecure/ledger/unit/v1\0" + population.encode() + b"\0", hashlib.sha256)
    hashes = []
    for name in names:
        one = start.copy()
        one.update(name.encode("utf-8", "surrogatepass"))
        hashes.append(one.digest())
    return hashes


def other(population: Population) -> Population:
    return "evaluation" if population == "train" else "train"


def payers(names: Names, population: Population, *, unit: Literal["patient", "record"], key: bytes) -> Payers:
    """Who pays for a data set in a run by patient or by record.

    Args:
        names: of all its units, sampled or not.
        population: as what the run uses them.
        unit: of the run.
        key: the ledger's secret.
    """
    marks = [_BY_RECORD + name for name in (*names.patients, *names.records)]
    everything = [*names.patients, *names.records, *names.rows]
    by_patient = unit == "patient"
    # By record, a patient may have records in both populations.
    apart = [*(names.patients if by_patient else ()), *names.records]
    return Payers(
        units=hash_names(everything if by_patient else [*everything, *marks], population, key),
        elsewhere=hash_names(apart, other(population), key),
        by_record=hash_names(marks, population, key) if by_patient else (),
    )
