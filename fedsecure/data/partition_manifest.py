"""Federated partitions that are published as hashes, never as images: a CSV row a file with its site, class and hash.

Whoever has the images lays them out as the partition says. The hash is git's: SHA-1 over ``blob <size>\\0`` and the
file's bytes, as a repository that holds the file lists it. It tells files apart; it is no protection.
"""

from __future__ import annotations

import csv
import hashlib
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from fedsecure.data.images import SUFFIXES
from fedsecure.errors import DataError
from fedsecure.files import make_folder

COLUMNS = ("site", "label", "git_sha1")


@dataclass(frozen=True, slots=True)
class Placement:
    """One file of the partition: where it goes, and the 40 hexadecimal digits it is known by."""

    site: str
    label: str
    git_sha1: str


def read_partition(file: Path) -> tuple[Placement, ...]:
    """The rows of a partition manifest, in order; an image may stand there more than once.

    Raises:
        DataError: FS-1139 unreadable, other columns, an empty cell or no hash.
    """
    try:
        with file.open(newline="", encoding="utf-8") as stream:
            reader = csv.DictReader(stream, strict=True)
            if tuple(reader.fieldnames or ()) != COLUMNS:
                raise _unusable(file, f"columns {reader.fieldnames}")
            rows = [Placement(**row) for row in reader]
    except (OSError, UnicodeDecodeError, csv.Error, TypeError) as error:
        raise _unusable(file, f"cannot be read ({error!s:.80})") from error
    for number, row in enumerate(rows, start=2):
        parts = (row.site, row.label)
        sound = len(row.git_sha1 or "") == 40 and not set(row.git_sha1) - set("0123456789abcdef")
        if not sound or any(not part or Path(part).name != part or part.startswith(".") for part in parts):
            raise _unusable(file, f"line {number}: {row.site!r}, {row.label!r}, {row.git_sha1!r}")
    if not rows:
        raise _unusable(file, "no rows")
    return tuple(rows)


def git_sha1(file: Path) -> str:
    """The hash by which git knows a file's content: 40 hexadecimal digits."""
    content = file.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


def arrange(
    rows: tuple[Placement, ...], source: Path, destination: Path, *, step: Callable[[int], None] = lambda _: None
) -> int:
    """Copy images into DESTINATION/<site>/<class>/NNNN.<suffix> as a partition says.

    Args:
        rows: of the partition.
        source: folder that holds the images anywhere below it, under any names.
        destination: new folder.
        step: called with the number of images of ``source`` read since the last call.

    Returns:
        the number of files written.

    Raises:
        DataError: FS-1139 the destination exists, or an image of the partition is not found; then nothing is written.
        EnvironmentProblem: FS-1802 the destination cannot be written.
    """
    if destination.exists():
        raise _unusable(destination, "is there already")
    found: dict[str, Path] = {}
    for file in sorted(source.rglob("*")):
        if file.suffix.lower() in SUFFIXES and file.is_file():
            found.setdefault(git_sha1(file), file)
            step(1)
    missing = [row for row in rows if row.git_sha1 not in found]
    if missing:
        raise _unusable(
            source, f"lacks {len(missing)} of {len(rows)} files; the first is {missing[0].label} {missing[0].git_sha1}"
        )
    draft = destination.with_name(f".{destination.name}.part")
    shutil.rmtree(draft, ignore_errors=True)
    numbers: dict[tuple[str, str], int] = {}
    for row in rows:
        number = numbers.get((row.site, row.label), 0)
        numbers[row.site, row.label] = number + 1
        folder = draft / row.site / row.label
        if number == 0:
            make_folder(folder)
        shutil.copyfile(found[row.git_sha1], folder / f"{number:04}{found[row.git_sha1].suffix.lower()}")
    draft.rename(destination)
    return len(rows)


def _unusable(path: Path, found: str) -> DataError:
    return DataError(
        "FS-1139",
        f"{path}: {found}",
        expected="a partition manifest (site,label,git_sha1), the whole set of its images, and a new folder",
        cure="see docs/datasets.md, partitions as hashes",
    )
