"""Features grouped by privacy unit: one row of records per patient, or one record per unit (privacy.md §3.4).

The cap on a unit's records and the choice of which to keep use a keyed hash, so neither depends on the order of the
files nor on their quality, and two loads of the same data agree.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fedsecure.errors import DataError
from fedsecure.learning.adapters import Float32


@dataclass(frozen=True, slots=True, eq=False)
class UnitFeatures:
    """U privacy units of at most m records each; padded records are masked. U = 0 is allowed.

    Attributes:
        features: (U, m, d) float32.
        labels: (U, m) int64; 0 where padded.
        mask: (U, m) bool; True for a record.
    """

    features: Float32
    labels: npt.NDArray[np.int64]
    mask: npt.NDArray[np.bool_]

    def __post_init__(self) -> None:
        if self.features.ndim != 3 or not (self.labels.shape == self.mask.shape == self.features.shape[:2]):
            raise DataError(
                "FS-1144",
                f"features {self.features.shape}, labels {self.labels.shape}, mask {self.mask.shape}",
                expected="(U, m, d), (U, m) and (U, m)",
                cure="build the units with group_units",
            )

    def __len__(self) -> int:
        """Number of units U."""
        return int(self.features.shape[0])

    @property
    def dimension(self) -> int:
        """Feature width d."""
        return int(self.features.shape[2])

    @property
    def weights(self) -> npt.NDArray[np.float64]:
        """(U, m): 1 over the unit's number of records, 0 where padded; rows sum to 1 (0 for a unit without records)."""
        return np.asarray(self.mask / np.maximum(self.mask.sum(axis=1, keepdims=True), 1), np.float64)

    def limit_units(self, max_units: int) -> UnitFeatures:
        """At most ``max_units`` units: :func:`group_units` orders units by keyed hash, and the first ones stay."""
        return self.select(slice(0, max_units))

    def spread(self, views: int) -> UnitFeatures:
        """Rows of ``views`` features end to end, (U, m, views·d), as so many records of one label: (U, m·views, d)."""
        units, records, width = self.features.shape
        return UnitFeatures(
            self.features.reshape(units, records * views, width // views),
            np.repeat(self.labels, views, axis=1),
            np.repeat(self.mask, views, axis=1),
        )

    def select(self, rows: slice | npt.NDArray[Any]) -> UnitFeatures:
        """The units of a slice, index array or boolean mask of length U."""
        return UnitFeatures(self.features[rows], self.labels[rows], self.mask[rows])


def group_units(
    features: npt.NDArray[Any],
    labels: npt.NDArray[Any],
    unit_ids: Sequence[str],
    *,
    cap: int,
    key: bytes,
    classes: int | None = None,
    record_ids: Sequence[str] | None = None,
) -> UnitFeatures:
    """Group records by unit, keep at most ``cap`` of each, order units by keyed hash of their id.

    Args:
        features: (n, d) real values.
        labels: (n,) integers in [0, K).
        unit_ids: n names; records of one name form one unit.
        cap: public cap m ≥ 1.
        key: the site's own secret for the keyed hash.
        classes: K, to check the labels against; unchecked when None.
        record_ids: n names that decide which records stay; a record's own bytes decide when None.

    Raises:
        DataError: FS-1143 for features that are not finite; FS-1144 for shapes or labels that do not fit.
    """
    n = len(unit_ids)
    if features.ndim != 2 or features.shape[0] != n or labels.shape != (n,) or cap < 1:
        raise DataError(
            "FS-1144",
            f"features {features.shape}, labels {labels.shape}, {n} unit ids, cap {cap}",
            expected="(n, d) features, (n,) labels, n unit ids and a cap of at least 1",
            cure="check that the table of labels and the features come from the same records",
        )
    if classes is not None and n and not (int(labels.min()) >= 0 and int(labels.max()) < classes):
        raise DataError(
            "FS-1144",
            f"labels from {int(labels.min())} to {int(labels.max())}",
            expected=f"integers from 0 to {classes - 1}",
            cure="use the federation's class list",
        )
    with np.errstate(over="ignore"):
        rows = np.ascontiguousarray(features, dtype=np.float32)
    finite = np.isfinite(rows).all(axis=1)
    if not finite.all():
        raise DataError(
            "FS-1143",
            f"{int((~finite).sum())} records without finite features (first: record {int(np.argmin(finite))})",
            expected="finite float32 features",
            cure="mend or remove these records; a half-precision encoder may have overflowed",
        )

    def rank(kind: bytes, value: bytes) -> bytes:
        return hmac.digest(key, b"fedsecure/units/v1\0" + kind + value, hashlib.sha256)

    def record_rank(index: int) -> bytes:
        own = record_ids[index].encode() if record_ids is not None else rows[index].tobytes()
        return rank(b"record\0", own + b"\0" + str(int(labels[index])).encode())

    groups: dict[str, list[int]] = {}
    for index, unit in enumerate(unit_ids):
        groups.setdefault(unit, []).append(index)
    names = sorted(groups, key=lambda name: rank(b"unit\0", name.encode()))
    stacked = np.zeros((len(names), cap, rows.shape[1]), np.float32)
    targets = np.zeros((len(names), cap), np.int64)
    mask = np.zeros((len(names), cap), np.bool_)
    for row, name in enumerate(names):
        kept = groups[name]
        if len(kept) > 1:
            kept = sorted(kept, key=record_rank)[:cap]
        stacked[row, : len(kept)] = rows[kept]
        targets[row, : len(kept)] = labels[kept]
        mask[row, : len(kept)] = True
    return UnitFeatures(stacked, targets, mask)
