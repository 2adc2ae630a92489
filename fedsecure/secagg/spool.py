"""Where an upload waits until it is complete, so that a broken one never touches the sum (secagg.md §3.3 R2).

An upload is one fixed-size buffer, in memory or in an unlinked file of the aggregator's state folder; the
server folds it into the accumulator only after its size, hash and signature are checked. Nothing is kept
across a restart: a new attempt has new keys (§3.6).
"""

from __future__ import annotations

import mmap
import tempfile
from pathlib import Path
from typing import Protocol

from fedsecure.errors import ProtocolError


class Spool(Protocol):
    """Makes buffers for uploads."""

    def create(self, size: int) -> mmap.mmap | bytearray:
        """A writable buffer of ``size`` ≥ 1 bytes, gone with its last reference."""


class MemorySpool:
    """Buffers in memory: n uploads at a time take n vectors of memory."""

    def create(self, size: int) -> mmap.mmap | bytearray:
        return bytearray(size)


class FileSpool:
    """Buffers in unlinked files under ``folder``: memory stays at one vector, whatever the number of uploads.

    ``create`` raises FS-1349 where the folder cannot be written or is full.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def create(self, size: int) -> mmap.mmap | bytearray:
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self._folder) as file:
                file.truncate(size)
                return mmap.mmap(file.fileno(), size)
        except OSError as error:
            raise ProtocolError(
                "FS-1349",
                f"{self._folder} cannot hold an upload of {size} bytes ({error.strerror})",
                expected="a writable state folder with free space",
                cure="mend the folder's permissions or free some space; the site may upload again",
            ) from error
