"""What an audit runs on: generated features or a feature file, and rows chosen to break a clip (privacy.md §4 A)."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from fedsecure.learning.adapters import Float32
from fedsecure.learning.task import unit_rows
from fedsecure.learning.units import UnitFeatures

CAP = 4
CLIP = 0.1
_UNITS = 1000
_CLASSES = 10
_DIMENSION = 512


@dataclass(frozen=True, slots=True, eq=False)
class Material:
    """Units and the public constants beside them.

    Attributes:
        text: (K, d) float32.
        centre: (d,) float32, zeros where there is no public mean.
        units: at most 4 records each.
        origin: for the table.
    """

    text: Float32
    centre: Float32
    units: UnitFeatures
    origin: str


def load_material(features: Path | str | None, *, unit: Literal["patient", "record"]) -> Material:
    """The training rows of a feature file, or generated ones.

    Raises:
        PrivacyError: FS-1246 patients are wanted and the file does not know them.
        DataError, ModelError: as the readers say.
    """
    if features is None:
        return generate_material(unit=unit)
    from fedsecure.config import DatasetConfig
    from fedsecure.data.loading import open_dataset, read_feature_header
    from fedsecure.learning.features import SiteFeatures, load_units

    path = Path(features)
    header = read_feature_header(path)
    centre = np.zeros(header.dimension, np.float32) if header.mean is None else header.mean
    constants = SiteFeatures(header.text, centre, header.dimension, header.fingerprint)
    dataset = open_dataset(DatasetConfig(name="audit", path=path, split="train"), classes=header.classes)
    units = load_units(dataset, constants, cache=None, unit=unit, cap=CAP, max_units=None, key=os.urandom(32))
    units = units.limit_units(_UNITS)
    return Material(header.text, centre, units, path.name)


def generate_material(
    *, unit: Literal["patient", "record"], units: int = _UNITS, classes: int = _CLASSES, dimension: int = _DIMENSION
) -> Material:
    """Features around class directions; the text points half astray, and one label in ten is wrong.

    Wrong labels are what a head memorises, so that layer C has something to find. The generator is a public one:
    these records are nobody's.
    """
    rng = np.random.default_rng(4)
    truth = unit_rows(rng.normal(size=(classes, dimension)))
    text = unit_rows(truth + 0.8 * unit_rows(rng.normal(size=truth.shape)))
    cap = CAP if unit == "patient" else 1
    owner = rng.integers(0, classes, (units, 1))
    labels = np.repeat(np.where(rng.random((units, 1)) < 0.1, rng.integers(0, classes, (units, 1)), owner), cap, axis=1)
    features = 0.4 * truth[owner] + unit_rows(rng.normal(size=(units, cap, dimension)))
    mask = np.arange(cap)[None] < rng.integers(1, cap + 1, (units, 1))
    return Material(
        text.astype(np.float32),
        np.zeros(dimension, np.float32),
        UnitFeatures((features * mask[..., None]).astype(np.float32), np.where(mask, labels, 0).astype(np.int64), mask),
        f"generated, {units} units, {classes} classes",
    )


def adversarial_units(units: UnitFeatures, *, classes: int, patients: bool) -> UnitFeatures:
    """16 units: the first ten try to move the sum by more than C, the others are as they come.

    Scaled by 1e4, near the largest float32, twins, zeros, NaN, infinity, halved precision, a unit with nothing but
    copies of one record, one without any record, and one that holds all records of its chunk's class.
    """
    count, records, d = 16, CAP if patients else 1, units.dimension
    rows, kinds = units.features[units.mask], units.labels[units.mask]
    index = np.arange(count * records) % len(rows)
    features = rows[index].reshape(count, records, d).copy()
    # Wrong labels make gradients long, so that the clip has to work.
    labels = (kinds[index].reshape(count, records) + 1) % classes
    mask = np.ones((count, records), np.bool_)
    features[0] *= 1e4
    features[1] = np.sign(features[1]) * 3e38
    features[2] = features[3]
    features[4] = 0.0
    features[5, 0, 0] = np.nan
    features[6, -1, -1] = np.inf
    features[7] = features[7].astype(np.float16)
    features[8], labels[8] = features[8, :1], labels[8, 0]
    mask[9, :] = False
    features[9], labels[9] = 0.0, 0
    return UnitFeatures(features, labels, mask)
