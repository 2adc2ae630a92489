"""What a data set is: one protocol for every source of records a site may hold, and the checks all of them share.

A data set is *listed* when it is opened and *read* only later: no pixel and no feature may be touched before the
site's door has reserved the budget (the rule of the privacy door). Identifiers (paths, rows, patient ids) are the
listing. Where they stand inside the files, as in DICOM headers, :meth:`Dataset.index` reads them and nothing else.
Labels that stand inside the files are read with the records.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from fedsecure.errors import DataError

if TYPE_CHECKING:
    from PIL.Image import Image

Kind = Literal["image", "features"]
Labels = npt.NDArray[np.int64]
Features = npt.NDArray[np.float32]


@runtime_checkable
class Dataset(Protocol):
    """Labelled records of one site, images or precomputed features.

    Attributes:
        name: the ledger charges under this name.
        kind: ``"image"``: :meth:`image` works; ``"features"``: :meth:`features` works.
        classes: class names in the federation's order.
        labels: int64 (n,), indices into ``classes``; asked for after the charge only, so they may be read here.
        record_ids: n distinct ids, stable over runs, made of paths or rows without reading content.
        paths: n files, where each record is one; a data set of another kind need not have it.
        patient_ids: n patient ids, or ``None`` where patients are unknown.
        public: declared public, so exact counts may leave the site.
    """

    @property
    def name(self) -> str: ...
    @property
    def kind(self) -> Kind: ...
    @property
    def classes(self) -> tuple[str, ...]: ...
    @property
    def labels(self) -> Labels: ...
    @property
    def record_ids(self) -> tuple[str, ...]: ...
    @property
    def patient_ids(self) -> tuple[str, ...] | None: ...
    @property
    def public(self) -> bool: ...

    def __len__(self) -> int:
        """Number of records n."""

    def index(self) -> None:
        """Read what :attr:`record_ids` and :attr:`patient_ids` need of the files, never labels, pixels or features."""

    def image(self, i: int) -> Image:
        """Record ``i`` as an RGB image; the file is read here. Raises DataError FS-1106, FS-1107, FS-1123."""

    def features(self) -> Features:
        """All features, float32 (n, d), finite; read here. Raises DataError FS-1110, FS-1123."""

    def content_key(self, i: int) -> bytes:
        """SHA-256 of the content of record ``i`` (file bytes, or the array); reads the record."""


class Subset:
    """Some records of another data set, in a chosen order; the choice is made when it is first needed.

    Args:
        base: the data set to choose from.
        choose: indices into ``base``, or a function that finds them from the base's identifiers.
    """

    def __init__(
        self, base: Dataset, choose: Sequence[int] | npt.NDArray[np.int64] | Callable[[Dataset], Sequence[int]]
    ) -> None:
        self._base = base
        self._choose = choose
        self.name = base.name
        self.kind: Kind = base.kind
        self.classes = base.classes
        self.public = base.public

    @cached_property
    def _rows(self) -> npt.NDArray[np.int64]:
        chosen = self._choose(self._base) if callable(self._choose) else self._choose
        rows = np.asarray(chosen, dtype=np.int64)
        if len(rows) == 0:
            raise no_records(self.name)
        if rows.min() < 0 or rows.max() >= len(self._base):
            raise DataError(
                "FS-1109",
                f"row {int(rows.max())} of {self.name!r}",
                expected=f"rows from 0 to {len(self._base) - 1}",
                cure="choose among the records there are",
            )
        if len(np.unique(rows)) != len(rows):
            raise DataError(
                "FS-1109",
                f"a record of {self.name!r} chosen twice",
                expected="every record at most once: a copy would double its weight and halve its privacy",
                cure="choose without replacement",
            )
        return rows

    @property
    def labels(self) -> Labels:
        return self._base.labels[self._rows]

    @cached_property
    def record_ids(self) -> tuple[str, ...]:
        ids = self._base.record_ids
        return tuple(ids[i] for i in self._rows)

    @cached_property
    def patient_ids(self) -> tuple[str, ...] | None:
        ids = self._base.patient_ids
        return None if ids is None else tuple(ids[i] for i in self._rows)

    @cached_property
    def paths(self) -> tuple[Path, ...] | None:
        paths = paths_of(self._base)
        return None if paths is None else tuple(paths[i] for i in self._rows)

    def __len__(self) -> int:
        return len(self._rows)

    def index(self) -> None:
        self._base.index()
        _ = self._rows

    def image(self, i: int) -> Image:
        return self._base.image(int(self._rows[i]))

    def features(self) -> Features:
        return self._base.features()[self._rows]

    def content_key(self, i: int) -> bytes:
        return self._base.content_key(int(self._rows[i]))


def paths_of(records: Dataset) -> tuple[Path, ...] | None:
    """The file of each record; None where records are no files, or the data set does not say."""
    paths: tuple[Path, ...] | None = getattr(records, "paths", None)
    return paths


def no_records(name: str) -> DataError:
    """FS-1104: a data set without a single record."""
    return DataError(
        "FS-1104",
        f"no records in data set {name!r}",
        expected="at least one record",
        cure="check the path, the split and the holdout part of the data set",
    )


def wrong_kind(name: str, kind: Kind) -> DataError:
    """FS-1123: pixels asked of features, or features of pixels."""
    other = "features" if kind == "image" else "image"
    return DataError(
        "FS-1123",
        f"data set {name!r} holds {kind} records",
        expected=f"{other} records",
        cure='use encoder model "features" with feature files, and an image encoder with images',
    )


def check_labels(labels: npt.NDArray[Any], *, records: int, classes: int, where: str) -> Labels:
    """Labels as int64 (n,).

    Raises:
        DataError: FS-1109 not one label a record, FS-1111 not integers, FS-1108 outside 0 … ``classes`` − 1.
    """
    if labels.ndim != 1 or len(labels) != records:
        raise DataError(
            "FS-1109",
            f"{where}: labels of shape {labels.shape} for {records} records",
            expected="one label a record",
            cure="give labels and records of the same length",
        )
    if labels.dtype.kind not in "iu":
        raise DataError(
            "FS-1111",
            f"{where}: labels of dtype {labels.dtype}",
            expected="integers",
            cure="give class indices as integers",
        )
    if records and (labels.min() < 0 or int(labels.max()) >= classes):
        bad = int(labels.min()) if labels.min() < 0 else int(labels.max())
        raise DataError(
            "FS-1108",
            f"{where}: label {bad}",
            expected=f"labels from 0 to {classes - 1}",
            cure="check the order and number of classes",
        )
    return labels.astype(np.int64)


def check_features(features: npt.NDArray[Any], *, where: str) -> Features:
    """Features as float32 (n, d), all finite.

    Raises:
        DataError: FS-1111 not a float matrix, FS-1110 NaN or infinity.
    """
    if features.ndim != 2 or features.dtype.kind != "f" or features.shape[1] < 2:
        raise DataError(
            "FS-1111",
            f"{where}: {features.dtype} of shape {features.shape}",
            expected="floating-point features of shape (n, d), d at least 2",
            cure="store one feature vector a row",
        )
    with np.errstate(over="ignore"):
        single = features.astype(np.float32)
    finite = np.isfinite(single).all(axis=1)
    if not finite.all():
        raise DataError(
            "FS-1110",
            f"{where}: row {int(np.argmin(finite))} holds NaN or infinity ({int((~finite).sum())} such rows)",
            expected="finite float32 features",
            cure="encode these records again or leave them out",
        )
    return single


def hash_array(array: npt.NDArray[Any]) -> bytes:
    """SHA-256 over dtype, shape and bytes of an array."""
    block = np.ascontiguousarray(array)
    head = f"{block.dtype.str} {block.shape}\0".encode()
    return hashlib.sha256(head + block.tobytes()).digest()
