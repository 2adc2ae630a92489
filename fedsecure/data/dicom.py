"""DICOM folders (extra ``[dicom]``): single grey-scale frames, label from the class folder, PatientID as the unit.

Grey levels follow DICOM PS3.3 C.7.6 and C.11: modality transform, the file's own window where it has one, MONOCHROME1
inverted. Listing reads no file; :meth:`DicomFolder.index` reads PatientID and stops before the pixels.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fedsecure.data.dataset import Features, Kind, Labels, no_records, wrong_kind
from fedsecure.data.images import MAX_PIXELS, class_folders, empty_class, hash_file, scale_grey, too_large
from fedsecure.errors import DataError, EnvironmentProblem

if TYPE_CHECKING:
    from PIL.Image import Image

SUFFIXES = frozenset({".dcm", ".dicom"})


class DicomFolder:
    """``root/<class>/**/*.dcm`` as a :class:`~fedsecure.data.dataset.Dataset`.

    Raises:
        DataError: FS-1100, FS-1102, FS-1103 as for image folders, FS-1104 no files.
        EnvironmentProblem: FS-1812 pydicom is missing.
    """

    kind: Kind = "image"

    def __init__(self, root: Path, *, name: str, classes: tuple[str, ...], public: bool) -> None:
        _pydicom()
        paths: list[Path] = []
        labels: list[int] = []
        for class_name, folder in class_folders(root, classes).items():
            files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
            if not files:
                raise empty_class(folder, "DICOM")
            paths += files
            labels += [classes.index(class_name)] * len(files)
        if not paths:
            raise no_records(name)
        self.name = name
        self.classes = classes
        self.public = public
        self.labels: Labels = np.array(labels, dtype=np.int64)
        self.record_ids = tuple(p.relative_to(root).as_posix() for p in paths)
        self.paths = tuple(paths)

    def __len__(self) -> int:
        return len(self.paths)

    @cached_property
    def patient_ids(self) -> tuple[str, ...]:
        """PatientID of every file; FS-1120 unreadable, FS-1121 without one."""
        ids: list[str] = []
        for path in self.paths:
            header = _open(path, stop_before_pixels=True, specific_tags=["PatientID"])
            patient = str(header.get("PatientID") or "").strip()
            if not patient:
                raise DataError(
                    "FS-1121",
                    f"{path} has no PatientID",
                    expected="a PatientID (a pseudonym will do) in every file: it is the unit of privacy",
                    cure="pseudonymise instead of emptying the field, or use a manifest",
                )
            ids.append(patient)
        return tuple(ids)

    def index(self) -> None:
        """Read PatientID from every header; stops before the pixels."""
        _ = self.patient_ids

    def image(self, i: int) -> Image:
        return read_dicom(self.paths[i])

    def features(self) -> Features:
        raise wrong_kind(self.name, self.kind)

    def content_key(self, i: int) -> bytes:
        return hash_file(self.paths[i])


def _pydicom() -> Any:
    try:
        import pydicom
    except ImportError as error:
        raise EnvironmentProblem(
            "FS-1812",
            "pydicom is not installed",
            expected="the extra [dicom]",
            cure="pip install 'fedsecure[site,dicom]'",
        ) from error
    return pydicom


def _unreadable(path: Path, error: Exception) -> DataError:
    return DataError(
        "FS-1120",
        f"{path} cannot be read as DICOM ({type(error).__name__}: {error})",
        expected="a whole DICOM file in a transfer syntax that pydicom can decode here",
        cure="replace the file, or install the decoder pydicom names (pylibjpeg, gdcm)",
    )


def _guard(path: Path, read: Callable[[], Any]) -> Any:
    """pydicom raises whatever its parsers raise; any of it means the file is not usable."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return read()
    except DataError:
        raise
    except Exception as error:
        raise _unreadable(path, error) from error


def _open(path: Path, **options: Any) -> Any:
    pydicom = _pydicom()
    return _guard(path, lambda: pydicom.dcmread(path, **options))


def read_dicom(path: Path) -> Image:
    """Decode one file to an 8-bit image.

    Raises:
        DataError: FS-1120 unreadable, FS-1107 too large, FS-1122 colour or several frames.
    """
    from PIL import Image as pillow

    stored = _open(path)

    def decode() -> Any:
        from pydicom.pixels import apply_modality_lut, apply_voi_lut

        levels = apply_modality_lut(stored.pixel_array, stored)
        if "WindowWidth" in stored or "VOILUTSequence" in stored:
            levels = apply_voi_lut(levels, stored)
        grey = scale_grey(np.asarray(levels, dtype=np.float64))
        return 255 - grey if stored.PhotometricInterpretation == "MONOCHROME1" else grey

    rows, columns = int(stored.get("Rows") or 0), int(stored.get("Columns") or 0)
    if rows * columns > MAX_PIXELS:
        raise too_large(path, columns, rows)
    frames, samples = int(stored.get("NumberOfFrames") or 1), int(stored.get("SamplesPerPixel") or 1)
    if frames != 1 or samples != 1:
        raise DataError(
            "FS-1122",
            f"{path} has {frames} frame(s) of {samples} sample(s) a pixel",
            expected="one grey-scale frame",
            cure="export single slices",
        )
    return pillow.fromarray(_guard(path, decode)).convert("RGB")
