"""CIFAR-10 and CIFAR-100 from their binary archives, and ImageNet-LT's text lists.

Krizhevsky, Learning Multiple Layers of Features from Tiny Images (2009). The authors publish each set three times; the
``py`` and ``matlab`` versions hold pickled or foreign objects and are not read. ImageNet-LT's lists are those of Liu et
al. (CVPR 2019, arXiv 1904.05160): a path and a label a line.
"""

from __future__ import annotations

import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from fedsecure.data.arrays import ArrayRecords, from_arrays
from fedsecure.data.dataset import Dataset
from fedsecure.data.images import Entry
from fedsecure.errors import DataError

if TYPE_CHECKING:
    from PIL.Image import Image

_SIDE = 32
_PIXELS = 3 * _SIDE * _SIDE
# No file of the archives is larger than 154 MB (CIFAR-100's train.bin).
MAX_FILE_BYTES = 256 * 1024**2
MAX_LIST_BYTES = 512 * 1024**2


@dataclass(frozen=True, slots=True)
class _Layout:
    """Files of one set, label bytes before the pixels of a record (the last one counts), and its class names."""

    archive: str
    folder: str
    train: tuple[str, ...]
    test: str
    labels: int
    names: str
    classes: int


_LAYOUTS = (
    _Layout(
        "cifar-10-binary.tar.gz",
        "cifar-10-batches-bin",
        tuple(f"data_batch_{index}.bin" for index in range(1, 6)),
        "test_batch.bin",
        1,
        "batches.meta.txt",
        10,
    ),
    _Layout("cifar-100-binary.tar.gz", "cifar-100-binary", ("train.bin",), "test.bin", 2, "fine_label_names.txt", 100),
)


@dataclass(frozen=True, slots=True, eq=False)
class Cifar:
    """Both splits, as data sets of 32×32 RGB images with the authors' labels (of CIFAR-100 the fine ones)."""

    classes: tuple[str, ...]
    train: ArrayRecords
    test: ArrayRecords


def read_cifar(path: Path) -> Cifar:
    """Read ``cifar-10-binary.tar.gz`` or ``cifar-100-binary.tar.gz``, or the folder that one of them unpacks to.

    Nothing is unpacked to disk, and of an archive only the files of the known names are looked at.

    Raises:
        DataError: FS-1164 neither of them, or one of the versions that are not read; FS-1165 a file is missing, cut
            short or larger than it can be; FS-1108 a label out of range.
    """
    layout, files = _archived(path) if path.is_file() else _unpacked(path)
    missing = [name for name in (*layout.train, layout.test, layout.names) if name not in files]
    if missing:
        raise _damaged(path, f"has no {missing[0]}", layout)
    names = tuple(line.strip() for line in files[layout.names].decode("ascii", "replace").splitlines() if line.strip())
    if len(names) != layout.classes or len(set(names)) != layout.classes:
        raise _damaged(path, f"names {len(set(names))} classes in {layout.names}", layout)

    def split(members: Sequence[str], kind: str) -> ArrayRecords:
        size = layout.labels + _PIXELS
        for member in members:
            if not files[member] or len(files[member]) % size:
                raise _damaged(path, f"holds {len(files[member])} bytes in {member}", layout)
        rows = np.frombuffer(b"".join(files[member] for member in members), np.uint8).reshape(-1, size)
        images = rows[:, layout.labels :].reshape(-1, 3, _SIDE, _SIDE).transpose(0, 2, 3, 1)
        labels = rows[:, layout.labels - 1].astype(np.int64)
        return from_arrays(np.ascontiguousarray(images), labels, classes=names, name=f"{layout.folder}/{kind}")

    return Cifar(names, split(layout.train, "train"), split((layout.test,), "test"))


def is_cifar(path: Path) -> bool:
    """Whether a path is meant as one of the archives, of whatever version, or as an unpacked one."""
    names = {path.name, *(p.name for p in path.iterdir())} if path.is_dir() else {path.name}
    return any(name.startswith("cifar-") or name == layout.test for name in names for layout in _LAYOUTS)


def _archived(path: Path) -> tuple[_Layout, dict[str, bytes]]:
    files: dict[str, bytes] = {}
    found = None
    try:
        with tarfile.open(path, "r:*") as archive:
            for member in archive:
                place = PurePosixPath(member.name)
                layout = next((one for one in _LAYOUTS if place.parent.name == one.folder), None)
                if layout is None or not member.isfile():
                    continue
                if place.name not in (*layout.train, layout.test, layout.names):
                    continue
                found = layout
                if member.size > MAX_FILE_BYTES:
                    raise _damaged(path, f"holds {member.size} bytes in {place.name}", layout)
                stream = archive.extractfile(member)
                assert stream is not None
                files[place.name] = stream.read(MAX_FILE_BYTES)
    except (OSError, EOFError, tarfile.TarError) as error:
        raise _unknown(path, f"cannot be read as an archive ({error!s:.80})") from error
    if found is None:
        raise _unknown(path, "holds none of the binary files")
    return found, files


def _unpacked(path: Path) -> tuple[_Layout, dict[str, bytes]]:
    folders = (path, *(path / layout.folder for layout in _LAYOUTS))
    for folder in folders:
        for layout in _LAYOUTS:
            if (folder / layout.test).is_file():
                held = [name for name in (*layout.train, layout.test, layout.names) if (folder / name).is_file()]
                large = next((name for name in held if (folder / name).stat().st_size > MAX_FILE_BYTES), None)
                if large is not None:
                    raise _damaged(folder, f"holds too large a {large}", layout)
                return layout, {name: (folder / name).read_bytes() for name in held}
    archive = next((path / layout.archive for layout in _LAYOUTS if (path / layout.archive).is_file()), None)
    if archive is not None:
        return _archived(archive)
    raise _unknown(path, "holds none of the binary files" if path.is_dir() else "does not exist")


def _unknown(path: Path, found: str) -> DataError:
    return DataError(
        "FS-1164",
        f"{path} {found}",
        expected="cifar-10-binary.tar.gz or cifar-100-binary.tar.gz, or the folder it unpacks to",
        cure="get the version called binary from the authors' page (www.cs.toronto.edu/~kriz/cifar.html); those for "
        "Python and MATLAB hold objects that are never unpickled here",
    )


def _damaged(path: Path, found: str, layout: _Layout) -> DataError:
    return DataError(
        "FS-1165",
        f"{path} {found}",
        expected=f"{', '.join((*layout.train, layout.test))} of whole records of {layout.labels + _PIXELS} bytes, and "
        f"{layout.names} with {layout.classes} names",
        cure=f"fetch {layout.archive} again",
    )


def read_image_list(file: Path, *, root: Path, classes: int) -> list[Entry]:
    """Entries of a list such as ImageNet-LT's ``ImageNet_LT_train.txt``: ``path label`` a line, paths below ``root``.

    Files are only checked to exist.

    Args:
        file: UTF-8 text; empty lines are passed over.
        root: folder the paths are relative to.
        classes: C; labels are 0 … C−1.

    Raises:
        DataError: FS-1166 the list cannot be read, or has a line that is not a path and a label in range, a path that
            leaves ``root`` or stands there twice, or no file.
    """
    try:
        if file.stat().st_size > MAX_LIST_BYTES:
            raise _bad_line(str(file), f"{file.stat().st_size} bytes")
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise _bad_line(str(file), f"it cannot be read ({error!s:.80})") from error
    entries: list[Entry] = []
    seen: set[str] = set()
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{file} line {number}"
        name, _, label = line.strip().rpartition(" ")
        place = PurePosixPath(name)
        if not name or not label.isdecimal() or place.is_absolute() or ".." in place.parts:
            raise _bad_line(where, repr(line[:80]))
        if int(label) >= classes:
            raise _bad_line(where, f"label {label} of {classes} classes")
        if name in seen:
            raise _bad_line(where, f"{name} for the second time")
        if not (root / name).is_file():
            raise _bad_line(where, f"no file {root / name}")
        seen.add(name)
        entries.append(Entry(path=root / name, record_id=name, label=int(label)))
    return entries


def _bad_line(where: str, found: str) -> DataError:
    return DataError(
        "FS-1166",
        f"{where}: {found}",
        expected="UTF-8 text, a line being a path below the images' folder, a blank and a label; each file once",
        cure="mend or remove the line, and give the folder that the paths are relative to",
    )


def read_pixels(records: Dataset, *, side: int = _SIDE) -> npt.NDArray[np.uint8]:
    """All images as uint8 (n, 3, side, side); those of another size are scaled (bicubic). Reads every record.

    Raises:
        DataError: FS-1123 a data set of features, or the reader's for an image that cannot be read.
    """
    pixels = np.empty((len(records), 3, side, side), np.uint8)
    for index in range(len(records)):
        pixels[index] = thumbnail(records.image(index), side=side)
    return pixels


def thumbnail(image: Image, *, side: int = _SIDE) -> npt.NDArray[np.uint8]:
    """One colour image as uint8 (3, side, side); scaled (bicubic) where it has another size."""
    if image.size != (side, side):
        image = image.resize((side, side), resample=3)  # bicubic
    return np.asarray(image, np.uint8).transpose(2, 0, 1)
