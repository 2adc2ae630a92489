"""Image files: class-folder trees and manifests (CSV), listed at once and read one by one when asked.

Images are decoded by Pillow to 8-bit RGB. Pixels are counted from the header before anything is decoded, so a small
file cannot fill the memory.
"""

from __future__ import annotations

import csv
import hashlib
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fedsecure.data.dataset import Features, Kind, Labels, no_records, wrong_kind
from fedsecure.errors import DataError, EnvironmentProblem

if TYPE_CHECKING:
    from PIL.Image import Image

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff"})
MAX_PIXELS = 50_000_000
MAX_MANIFEST_BYTES = 256 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Entry:
    """One listed file: where it is, its id, its class index and its patient if known."""

    path: Path
    record_id: str
    label: int
    patient: str | None = None


class ImageFiles:
    """A :class:`~fedsecure.data.dataset.Dataset` of image files.

    Raises:
        DataError: FS-1104 no entries.
    """

    kind: Kind = "image"

    def __init__(self, entries: Sequence[Entry], *, name: str, classes: tuple[str, ...], public: bool) -> None:
        if not entries:
            raise no_records(name)
        self.name = name
        self.classes = classes
        self.public = public
        self.labels: Labels = np.array([e.label for e in entries], dtype=np.int64)
        self.record_ids = tuple(e.record_id for e in entries)
        patients = [e.patient for e in entries if e.patient is not None]
        self.patient_ids = tuple(patients) if len(patients) == len(entries) else None
        self.paths = tuple(e.path for e in entries)

    def __len__(self) -> int:
        return len(self.paths)

    def index(self) -> None:
        """Nothing to read: paths and manifest hold all identifiers."""

    def image(self, i: int) -> Image:
        return read_image(self.paths[i])

    def features(self) -> Features:
        raise wrong_kind(self.name, self.kind)

    def content_key(self, i: int) -> bytes:
        return hash_file(self.paths[i])


def hash_file(path: Path) -> bytes:
    """SHA-256 of a file's bytes; DataError FS-1106 where it cannot be read."""
    try:
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").digest()
    except OSError as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> DataError:
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return DataError(
        "FS-1106",
        f"{path} cannot be read as an image ({reason})",
        expected="a whole " + ", ".join(sorted(s[1:] for s in SUFFIXES)) + " file",
        cure="replace the file or leave it out of the data set",
    )


def too_large(path: Path, width: int, height: int) -> DataError:
    """FS-1107: more pixels than are decoded."""
    return DataError(
        "FS-1107",
        f"{path} has {width}×{height} pixels",
        expected=f"at most {MAX_PIXELS} pixels",
        cure="scale it down or cut it into tiles first",
    )


def read_image(path: Path) -> Image:
    """Decode one file to 8-bit RGB.

    Grey levels deeper than 8 bits are scaled linearly from the image's own least and greatest value to 0 … 255.

    Raises:
        DataError: FS-1106 unreadable or truncated, FS-1107 more than :data:`MAX_PIXELS` pixels.
        EnvironmentProblem: FS-1810 Pillow is missing.
    """
    try:
        from PIL import Image as pillow
    except ImportError as error:
        raise EnvironmentProblem(
            "FS-1810",
            "Pillow is not installed",
            expected="the packages of a site",
            cure="pip install 'fedsecure[site]'",
        ) from error
    try:
        # No filter of warnings here: filters are the process's, and threads that read would undo those of others.
        with pillow.open(path) as stored:
            if stored.width * stored.height > MAX_PIXELS:
                raise too_large(path, stored.width, stored.height)
            stored.load()
            return _to_rgb(stored)
    except (pillow.DecompressionBombError, pillow.DecompressionBombWarning) as error:
        raise DataError(
            "FS-1107",
            f"{path}: {error}",
            expected=f"at most {MAX_PIXELS} pixels",
            cure="scale it down or cut it into tiles first",
        ) from error
    except (OSError, SyntaxError, ValueError, TypeError, IndexError, EOFError, struct.error) as error:
        raise _unreadable(path, error) from error


def _to_rgb(image: Image) -> Image:
    from PIL import Image as pillow

    if image.mode == "F" or image.mode.startswith("I"):
        return pillow.fromarray(scale_grey(np.asarray(image, dtype=np.float64))).convert("RGB")
    if "transparency" in image.info and image.mode == "P":
        image = image.convert("RGBA")
    return image.convert("RGB")


def scale_grey(
    levels: np.ndarray[tuple[int, ...], np.dtype[np.float64]],
) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    """Grey levels scaled linearly from their own minimum and maximum to 0 … 255; ``ValueError`` where not finite."""
    low, high = float(levels.min()), float(levels.max())
    if not (np.isfinite(low) and np.isfinite(high)):
        raise ValueError("grey levels are not finite")
    span = high - low if high > low else 1.0
    return np.rint((levels - low) * (255 / span)).astype(np.uint8)


def class_folders(root: Path, classes: tuple[str, ...]) -> Mapping[str, Path]:
    """The class folders that exist under ``root``, in the federation's class order.

    A class may be missing at a site; a folder of an unknown name may not be there.

    Raises:
        DataError: FS-1100 no such folder, FS-1102 a folder named like no class.
    """
    try:
        found = {p.name: p for p in root.iterdir() if p.is_dir() and not p.name.startswith((".", "__"))}
    except OSError as error:
        raise DataError(
            "FS-1100",
            f"{root} cannot be listed ({error.strerror})",
            expected="a readable folder with one folder a class",
            cure="check the path and its permissions",
        ) from error
    unknown = sorted(set(found) - set(classes))
    if unknown:
        raise unknown_class(unknown[0], classes, where=str(root))
    return {name: found[name] for name in classes if name in found}


def unknown_class(label: str, classes: tuple[str, ...], *, where: str) -> DataError:
    """FS-1102: a class that the federation does not have."""
    shown = ", ".join(classes[:12]) + (" …" if len(classes) > 12 else "")
    return DataError(
        "FS-1102",
        f"{where}: unknown class {label!r}",
        expected=f"one of the federation's {len(classes)} classes: {shown}",
        cure="rename the class, or have the federation's coordinator add it to federation.toml",
    )


def empty_class(folder: Path, kind: str) -> DataError:
    """FS-1103: a class folder without a usable file."""
    return DataError(
        "FS-1103",
        f"class folder {folder} holds no {kind}",
        expected=f"at least one {kind} file, or no folder at all where a site lacks the class",
        cure="fill the folder or remove it",
    )


def list_class_tree(root: Path, classes: tuple[str, ...]) -> list[Entry]:
    """List ``root/<class>/*.{jpg,jpeg,png,bmp,tif,tiff}`` without opening a file; sorted by path.

    Raises:
        DataError: FS-1100, FS-1102, FS-1103 an empty class folder, FS-1105 a folder inside a class folder.
    """
    entries: list[Entry] = []
    for name, folder in class_folders(root, classes).items():
        paths = sorted(p for p in folder.iterdir() if not p.name.startswith("."))
        nested = next((p for p in paths if p.is_dir()), None)
        if nested is not None:
            raise DataError(
                "FS-1105",
                f"{nested} is a folder inside a class folder",
                expected="image files only, directly in the class folder",
                cure="move its files up, or use a manifest, which also knows patients",
            )
        files = [p for p in paths if p.suffix.lower() in SUFFIXES]
        if not files:
            raise empty_class(folder, "image")
        label = classes.index(name)
        entries.extend(Entry(path=p, record_id=f"{name}/{p.name}", label=label) for p in files)
    return entries


def read_manifest(file: Path, classes: tuple[str, ...], *, split: str | None) -> list[Entry]:
    """List a manifest: CSV in UTF-8 with columns ``file``, ``label``, optional ``patient`` and ``split``.

    Files are relative to the manifest; labels are class names. Rows of other splits are left out; a manifest that
    has splits needs one to be chosen. Files are only checked to exist.

    Raises:
        DataError: FS-1100 unreadable, FS-1112 columns or encoding, FS-1113 a bad row, FS-1102 an unknown label,
            FS-1114 the split is missing or not chosen.
    """
    try:
        if file.stat().st_size > MAX_MANIFEST_BYTES:
            raise _bad_manifest(file, f"{file.stat().st_size} bytes", f"at most {MAX_MANIFEST_BYTES} bytes")
        with file.open(newline="", encoding="utf-8-sig") as stream:
            reader = csv.DictReader(stream, strict=True)
            columns = set(reader.fieldnames or ())
            missing = {"file", "label"} - columns
            if missing:
                raise _bad_manifest(file, f"no column {sorted(missing)[0]!r}", "columns file and label")
            rows = [(reader.line_num, row) for row in reader]
    except OSError as error:
        raise DataError(
            "FS-1100",
            f"{file} cannot be read ({error.strerror})",
            expected="a readable manifest",
            cure="check the path and its permissions",
        ) from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise _bad_manifest(file, str(error), "a CSV file in UTF-8") from error
    if ("split" in columns) != (split is not None):
        splits = sorted({row["split"] for _, row in rows}) if "split" in columns else []
        raise _no_split(file, split, splits)
    if split is not None:
        chosen = [(line, row) for line, row in rows if row["split"] == split]
        if rows and not chosen:
            raise _no_split(file, split, sorted({row["split"] for _, row in rows}))
        rows = chosen
    index = {name: i for i, name in enumerate(classes)}
    entries: list[Entry] = []
    seen: set[Path] = set()
    for line, row in rows:
        where = f"{file} line {line}"
        name, label = row["file"], row["label"]
        if not name or not label or None in row or ("patient" in columns and not row["patient"]):
            raise _bad_row(where, "an empty or surplus cell", "a value in every column")
        if label not in index:
            raise unknown_class(label, classes, where=where)
        path = file.parent / name
        if not path.is_file():
            raise _bad_row(where, f"no file {path}", "an existing file, relative to the manifest")
        if (real := path.resolve()) in seen:
            raise _bad_row(where, f"{name} for the second time", "every file once")
        seen.add(real)
        patient = row["patient"] if "patient" in columns else None
        entries.append(Entry(path=path, record_id=name, label=index[label], patient=patient))
    return entries


def _bad_manifest(file: Path, found: str, expected: str) -> DataError:
    return DataError("FS-1112", f"{file}: {found}", expected=expected, cure="see docs/datasets.md for the layout")


def _bad_row(where: str, found: str, expected: str) -> DataError:
    return DataError("FS-1113", f"{where}: {found}", expected=expected, cure="mend or remove the line")


def _no_split(file: Path, split: str | None, splits: list[str]) -> DataError:
    found = f"no split {split!r}" if split is not None else "a split column but no split chosen"
    return DataError(
        "FS-1114",
        f"{file}: {found}",
        expected="one of the splits " + ", ".join(splits) if splits else "a split column, or no split chosen",
        cure='set "split" of the data set in site.toml',
    )
