"""Feature files: precomputed encoder features in one ``.npz`` (layout in docs/datasets.md), for sites with embeddings.

Headers are read without the arrays; sizes are checked before anything is allocated; pickled objects are refused.
"""

from __future__ import annotations

import hashlib
import math
import re
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal

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
from fedsecure.data.images import unknown_class
from fedsecure.errors import DataError

if TYPE_CHECKING:
    from PIL.Image import Image

MAX_ARRAY_BYTES = 8 * 1024**3
MAX_HEADER_BYTES = 10_000
# What NumPy writes before an array of numbers or strings. NumPy itself reads it with `ast`, which in CPython 3.11 fails
# by chance before 3.11.8 while another thread is in it (gh-106905), be it to print a traceback.
_HEADER = re.compile(
    rb"\{'descr': '([<>|][A-Za-z]\w*(?:\[\w+\])?)', 'fortran_order': (True|False), 'shape': \(([\d, ]*)\), \} *\n"
)
_CHUNK = 1 << 20


@dataclass(frozen=True, slots=True)
class FeatureHeader:
    """What is public about a feature file.

    Attributes:
        classes: K class names; labels in the file are indices into it.
        text: float32 (K, d), L2-normalised text (or prior) embeddings.
        mean: float32 (d,), a public mean for centring, or ``None``.
        dimension: d.
        splits: split name → number of records.
        fingerprint: SHA-256 in hex over classes, text and mean: what sites must agree on.
    """

    classes: tuple[str, ...]
    text: Features
    mean: Features | None
    dimension: int
    splits: Mapping[str, int]
    fingerprint: str


@dataclass(frozen=True, slots=True)
class _Shape:
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    order: Literal["C", "F"]

    @property
    def bytes(self) -> int:
        return self.dtype.itemsize * math.prod(self.shape)


def read_feature_header(path: Path | str) -> FeatureHeader:
    """Read classes, text embeddings, mean, width and split sizes; no record's features or label.

    Raises:
        DataError: FS-1100 no such file, FS-1115 not an ``.npz``, FS-1116 an array is missing or does not fit,
            FS-1110 NaN in text or mean, FS-1117 an array is too large.
    """
    file = Path(path)
    shapes = _shapes(file)
    splits: dict[str, int] = {}
    for key, held in shapes.items():
        if key.endswith("_x"):
            name = key.removesuffix("_x")
            labels = shapes.get(f"{name}_y")
            if len(held.shape) != 2 or held.dtype.kind != "f" or held.shape[1] < 2:
                raise _misfit(file, key, held, "floats of shape (n, d)")
            if labels is None or labels.shape != held.shape[:1] or labels.dtype.kind not in "iu":
                raise _misfit(file, f"{name}_y", labels, f"integers of shape ({held.shape[0]},)")
            patient = shapes.get(f"{name}_patient")
            if patient is not None and patient.shape != held.shape[:1]:
                raise _misfit(file, f"{name}_patient", patient, f"shape ({held.shape[0]},)")
            splits[name] = held.shape[0]
    if not splits:
        raise _misfit(file, "train_x", None, "at least one array <split>_x")
    widths = {shapes[f"{name}_x"].shape[1] for name in splits}
    d = shapes[f"{next(iter(splits))}_x"].shape[1]
    if len(widths) != 1:
        raise DataError(
            "FS-1116",
            f"{file}: splits of widths {sorted(widths)}",
            expected="the same feature width in all splits",
            cure="encode all splits with one encoder",
        )
    held_classes = shapes.get("classes")
    if held_classes is None or held_classes.dtype.kind not in "US" or len(held_classes.shape) != 1:
        raise _misfit(file, "classes", held_classes, "a vector of class names (strings)")
    names = tuple(str(c) for c in _read(file, "classes").astype(np.str_))
    if len(names) < 2 or len(set(names)) != len(names):
        raise _misfit(file, "classes", held_classes, "at least two distinct names")
    held_text = shapes.get("text")
    if held_text is None or held_text.shape != (len(names), d) or held_text.dtype.kind != "f":
        raise _misfit(file, "text", held_text, f"floats of shape ({len(names)}, {d})")
    text = check_features(_read(file, "text"), where=f"{file} text")
    norms = np.linalg.norm(text.astype(np.float64), axis=1, keepdims=True)
    if norms.min() == 0:
        raise _misfit(file, "text", held_text, "no zero vector")
    text = (text / norms).astype(np.float32)
    mean: Features | None = None
    held_mean = shapes.get("mean")
    if held_mean is not None:
        if held_mean.shape != (d,) or held_mean.dtype.kind != "f":
            raise _misfit(file, "mean", held_mean, f"floats of shape ({d},)")
        mean = check_features(_read(file, "mean")[None], where=f"{file} mean")[0]
    sha = hashlib.sha256(b"fedsecure/features/v1\0")
    for name in names:
        raw = name.encode()
        sha.update(len(raw).to_bytes(4, "big") + raw)
    sha.update(hash_array(text) + (hash_array(mean) if mean is not None else b""))
    return FeatureHeader(classes=names, text=text, mean=mean, dimension=d, splits=splits, fingerprint=sha.hexdigest())


class FeatureFile:
    """One split of a feature file as a :class:`~fedsecure.data.dataset.Dataset`; records are rows.

    Raises:
        DataError: as :func:`read_feature_header`; FS-1114 no such split, FS-1102 a class the federation lacks,
            FS-1104 the split is empty; later, when labels are read, FS-1108.
    """

    kind: Kind = "features"

    def __init__(
        self, path: Path | str, *, split: str, name: str, classes: tuple[str, ...], public: bool = False
    ) -> None:
        self._file = Path(path)
        self._header = read_feature_header(self._file)
        if split not in self._header.splits:
            raise DataError(
                "FS-1114",
                f"{self._file}: no split {split!r}",
                expected="one of the splits " + ", ".join(sorted(self._header.splits)),
                cure='set "split" of the data set in site.toml',
            )
        for held in self._header.classes:
            if held not in classes:
                raise unknown_class(held, classes, where=str(self._file))
        self._split = split
        self._count = self._header.splits[split]
        if self._count == 0:
            raise no_records(name)
        self.name = name
        self.classes = classes
        self.public = public
        self.record_ids = tuple(f"{split}/{i}" for i in range(self._count))

    def __len__(self) -> int:
        return self._count

    @cached_property
    def labels(self) -> Labels:
        raw = check_labels(
            _read(self._file, f"{self._split}_y"),
            records=self._count,
            classes=len(self._header.classes),
            where=f"{self._file} {self._split}_y",
        )
        order = np.array([self.classes.index(c) for c in self._header.classes], dtype=np.int64)
        return order[raw]

    @cached_property
    def patient_ids(self) -> tuple[str, ...] | None:
        key = f"{self._split}_patient"
        if key not in _shapes(self._file):
            return None
        return tuple(str(p) for p in _read(self._file, key).astype(np.str_))

    def index(self) -> None:
        """Read patient ids."""
        _ = self.patient_ids

    def image(self, i: int) -> Image:
        raise wrong_kind(self.name, self.kind)

    @cached_property
    def _features(self) -> Features:
        return check_features(_read(self._file, f"{self._split}_x"), where=f"{self._file} {self._split}_x")

    def features(self) -> Features:
        return self._features

    def content_key(self, i: int) -> bytes:
        return hash_array(self._features[i])


def _misfit(file: Path, key: str, held: _Shape | None, expected: str) -> DataError:
    found = "is missing" if held is None else f"is {held.dtype} of shape {held.shape}"
    return DataError(
        "FS-1116",
        f"{file}: array {key!r} {found}",
        expected=expected,
        cure="see docs/datasets.md for the layout of feature files",
    )


def _broken(file: Path, error: Exception) -> DataError:
    if isinstance(error, FileNotFoundError | PermissionError | IsADirectoryError):
        return DataError(
            "FS-1100",
            f"{file} cannot be read ({error.strerror})",
            expected="a readable feature file",
            cure="check the path and its permissions",
        )
    return DataError(
        "FS-1115",
        f"{file} is no feature file ({error})",
        expected="a whole .npz written by numpy, without pickled objects",
        cure="write the file again, as docs/datasets.md says",
    )


_FAULTS = (OSError, zipfile.BadZipFile, zlib.error, ValueError, EOFError, KeyError, NotImplementedError)


def _header(stream: IO[bytes]) -> _Shape:
    """The header of one array (NumPy's NEP 1, versions 1.0 and 2.0); the stream stands at the array's bytes then."""
    version = np.lib.format.read_magic(stream)
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f"npy version {version}")
    length = int.from_bytes(stream.read(2 if version == (1, 0) else 4), "little")
    found = _HEADER.fullmatch(stream.read(length)) if length <= MAX_HEADER_BYTES else None
    if found is None:
        raise ValueError("a header that is not as NumPy writes it for numbers or strings")
    descr, fortran, extents = (part.decode() for part in found.groups())
    try:
        dtype = np.dtype(descr)
    except TypeError as error:
        raise ValueError(f"an array is of type {descr!r}") from error
    if dtype.hasobject:
        raise ValueError("it holds pickled objects")
    shape = tuple(int(extent) for extent in extents.split(",") if extent.strip())
    if dtype.itemsize == 0 and 0 not in shape:
        raise ValueError(f"entries of no size, {descr!r}")
    return _Shape(shape=shape, dtype=dtype, order="F" if fortran == "True" else "C")


def _shapes(file: Path) -> dict[str, _Shape]:
    """Shape and dtype of every array, from the headers; sizes checked against what the archive declares."""
    found: dict[str, _Shape] = {}
    try:
        with zipfile.ZipFile(file) as archive:
            for info in archive.infolist():
                with archive.open(info) as stream:
                    held = _header(stream)
                if held.bytes > MAX_ARRAY_BYTES:
                    raise DataError(
                        "FS-1117",
                        f"{file}: array {info.filename!r} declares {held.bytes} bytes",
                        expected=f"at most {MAX_ARRAY_BYTES} bytes an array",
                        cure="split the file by site",
                    )
                if held.bytes > info.file_size:
                    raise ValueError(f"{info.filename} is shorter than its header says")
                found[info.filename.removesuffix(".npy")] = held
    except _FAULTS as error:
        raise _broken(file, error) from error
    return found


def _read(file: Path, key: str) -> npt.NDArray[Any]:
    """One array whose header :func:`_shapes` has let pass."""
    try:
        with zipfile.ZipFile(file) as archive, archive.open(f"{key}.npy") as stream:
            held = _header(stream)
            content = bytearray()
            while len(content) < held.bytes:
                part = stream.read(min(_CHUNK, held.bytes - len(content)))
                if not part:
                    raise EOFError(f"array {key!r} is shorter than its header says")
                content += part
            return np.ndarray(held.shape, held.dtype, buffer=content, order=held.order)
    except _FAULTS as error:
        raise _broken(file, error) from error
