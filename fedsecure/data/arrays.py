"""Data sets that are in memory already: numpy arrays, and torch map-style data sets."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from fedsecure.data.dataset import (
    Features,
    Kind,
    Labels,
    check_features,
    check_labels,
    hash_array,
    no_records,
    wrong_kind,
)
from fedsecure.errors import DataError

if TYPE_CHECKING:
    from PIL.Image import Image


class MapStyle(Protocol):
    """A torch map-style data set: ``dataset[i]`` is (image, label)."""

    def __len__(self) -> int: ...
    def __getitem__(self, i: int) -> Any: ...


def _ids(given: Sequence[str] | None, count: int, name: str) -> tuple[str, ...] | None:
    if given is None:
        return None
    ids = tuple(str(p) for p in given)
    if len(ids) != count:
        raise DataError(
            "FS-1109",
            f"{name}: {len(ids)} patient ids for {count} records",
            expected="one patient id a record",
            cure="give patients and records of the same length",
        )
    return ids


def _pixels(array: npt.NDArray[Any], where: str) -> Image:
    """uint8, or floats in [0, 1]; (h, w), (h, w, 3) or (1 or 3, h, w)."""
    from PIL import Image as pillow

    if array.ndim == 3 and array.shape[0] in (1, 3) and array.shape[2] not in (1, 3):
        array = np.moveaxis(array, 0, 2)
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] != 3) or array.dtype.kind not in "uf":
        raise _bad_array(where, array)
    if array.dtype != np.uint8:
        if array.dtype.kind != "f" or not (array.min() >= 0 and array.max() <= 1):
            raise DataError(
                "FS-1124",
                f"{where}: pixels of {array.dtype} from {array.min()} to {array.max()}",
                expected="uint8, or floats in [0, 1]",
                cure="leave out normalisation: the encoder does its own preprocessing",
            )
        array = np.rint(array * 255).astype(np.uint8)
    return pillow.fromarray(np.ascontiguousarray(array)).convert("RGB")


def _bad_array(where: str, array: npt.NDArray[Any]) -> DataError:
    return DataError(
        "FS-1111",
        f"{where}: {array.dtype} of shape {array.shape}",
        expected="features (n, d) of floats, or images uint8 (n, h, w) or (n, h, w, 3)",
        cure="convert the array",
    )


class ArrayRecords:
    """Arrays as a :class:`~fedsecure.data.dataset.Dataset`; see :func:`from_arrays`."""

    def __init__(
        self,
        records: npt.NDArray[Any],
        labels: npt.NDArray[Any],
        *,
        classes: tuple[str, ...],
        patients: Sequence[str] | None,
        name: str,
        public: bool,
    ) -> None:
        self.kind: Kind
        if records.ndim == 2 and records.dtype.kind == "f" and records.shape[1] >= 2:
            self.kind = "features"
        elif records.dtype == np.uint8 and (records.ndim == 3 or (records.ndim == 4 and records.shape[3] == 3)):
            self.kind = "image"
        else:
            raise _bad_array(name, records)
        if len(records) == 0:
            raise no_records(name)
        self._records = records
        self.name = name
        self.classes = classes
        self.public = public
        self.labels: Labels = check_labels(labels, records=len(records), classes=len(classes), where=name)
        self.record_ids = tuple(f"row/{i}" for i in range(len(records)))
        self.patient_ids = _ids(patients, len(records), name)

    def __len__(self) -> int:
        return len(self._records)

    def index(self) -> None:
        """Nothing to read."""

    def image(self, i: int) -> Image:
        if self.kind != "image":
            raise wrong_kind(self.name, self.kind)
        return _pixels(self._records[i], f"{self.name} row {i}")

    @cached_property
    def _features(self) -> Features:
        return check_features(self._records, where=self.name)

    def features(self) -> Features:
        if self.kind != "features":
            raise wrong_kind(self.name, self.kind)
        return self._features

    def content_key(self, i: int) -> bytes:
        return hash_array(self._records[i])


def from_arrays(
    records: npt.ArrayLike,
    labels: npt.ArrayLike,
    *,
    classes: Sequence[str],
    patients: Sequence[str] | None = None,
    name: str = "arrays",
    public: bool = False,
) -> ArrayRecords:
    """A data set of arrays.

    Args:
        records: features, floats (n, d), d ≥ 2; or images, uint8 (n, h, w) or (n, h, w, 3).
        labels: integers (n,), indices into ``classes``.
        classes: the federation's class names, in order.
        patients: n patient ids, or none.
        name: the ledger charges under this name.
        public: declared public.

    Raises:
        DataError: FS-1111 shape or dtype, FS-1109 lengths differ, FS-1108 label out of range, FS-1104 no record;
            when features are read, FS-1110.
    """
    return ArrayRecords(
        np.asarray(records),
        np.asarray(labels),
        classes=tuple(classes),
        patients=patients,
        name=name,
        public=public,
    )


class TorchRecords:
    """A torch map-style data set as a :class:`~fedsecure.data.dataset.Dataset`; see :func:`from_torch`."""

    kind: Kind = "image"

    def __init__(
        self,
        dataset: MapStyle,
        *,
        classes: tuple[str, ...],
        labels: npt.ArrayLike | None,
        patients: Sequence[str] | None,
        name: str,
        public: bool,
    ) -> None:
        try:
            count = len(dataset)
        except (TypeError, NotImplementedError) as error:
            raise DataError(
                "FS-1125",
                f"{name}: {type(dataset).__name__} has no length",
                expected="a map-style torch data set of (image, label)",
                cure="iterable data sets cannot be sampled privately; write a map-style one",
            ) from error
        if count == 0:
            raise no_records(name)
        self._dataset = dataset
        self._given = labels
        self._count = count
        self.name = name
        self.classes = classes
        self.public = public
        self.record_ids = tuple(f"item/{i}" for i in range(count))
        self.patient_ids = _ids(patients, count, name)

    def _item(self, i: int) -> tuple[Any, Any]:
        try:
            image, label = self._dataset[i]
        except (TypeError, ValueError) as error:
            raise DataError(
                "FS-1125",
                f"{self.name} item {i} is no (image, label) pair ({error})",
                expected="a map-style torch data set of (image, label)",
                cure="return the two, in this order",
            ) from error
        return image, label

    @cached_property
    def labels(self) -> Labels:
        found = self._given if self._given is not None else getattr(self._dataset, "targets", None)
        if found is None:
            found = [self._item(i)[1] for i in range(self._count)]
        return check_labels(_numpy(found), records=self._count, classes=len(self.classes), where=self.name)

    def __len__(self) -> int:
        return self._count

    def index(self) -> None:
        """Nothing to read: without ``labels`` or ``dataset.targets``, labels are in the items."""

    def image(self, i: int) -> Image:
        from PIL import Image as pillow

        held = self._item(i)[0]
        if isinstance(held, pillow.Image):
            return held.convert("RGB")
        return _pixels(_numpy(held), f"{self.name} item {i}")

    def features(self) -> Features:
        raise wrong_kind(self.name, self.kind)

    def content_key(self, i: int) -> bytes:
        return hash_array(np.asarray(self.image(i)))


def _numpy(held: Any) -> npt.NDArray[Any]:
    """A tensor, a list of integers or of one-element tensors, or an array, as an array."""
    if hasattr(held, "detach"):
        return np.asarray(held.detach().cpu().numpy())
    if isinstance(held, list | tuple):
        return np.asarray([int(x) for x in held])
    return np.asarray(held)


def from_torch(
    dataset: MapStyle,
    *,
    classes: Sequence[str],
    labels: npt.ArrayLike | None = None,
    patients: Sequence[str] | None = None,
    name: str = "torch",
    public: bool = False,
) -> TorchRecords:
    """A torch map-style data set of (image, label), without augmentation or normalisation.

    Args:
        dataset: items are PIL images, uint8 or [0, 1] float tensors (c, h, w), and an integer label.
        labels: integers (n,); default is ``dataset.targets``; without either, items are fetched for their labels.
        classes, patients, name, public: as for :func:`from_arrays`.

    Raises:
        DataError: FS-1125 not map-style or no pairs, FS-1104 empty, FS-1109 lengths differ; when read, FS-1108,
            FS-1111, FS-1124 pixels outside [0, 1].
    """
    return TorchRecords(dataset, classes=tuple(classes), labels=labels, patients=patients, name=name, public=public)
