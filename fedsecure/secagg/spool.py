"""Where an upload waits until it is complete, so that a broken one never touches the sum (secagg.md §3.3 R2).

An upload is one fixed-size buffer, in memory or in an unlinked file of the aggregator's state folder; the
server folds it into the accumulator only after its size, hash and signature are checked. Nothing is kept
across a restart: a new attempt has new keys (§3.6). Files are allocated, never sparse: a full disk is an error
here, not a signal in the middle of a write to mapped memory.
"""

from __future__ import annotations

import errno
import mmap
import os
import shutil
import tempfile
from pathlib import Path
from typing import Protocol

from fedsecure.errors import ProtocolError

_UNSUPPORTED = (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS)
_BLOCK = bytes(1 << 20)


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

    def reserve(self, size: int, *, uploads: int) -> None:
        """Make sure, before a round begins, that ``uploads`` buffers of ``size`` bytes each find room.

        Raises:
            ProtocolError: FS-1349 they do not. Room that others take later is noticed by :meth:`create`.
        """
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(self._folder).free
        except OSError as error:
            raise self._full(size, error.strerror) from error
        if free < size * uploads:
            raise self._full(size * uploads, f"{free} bytes are free")
        self.create(size).close()  # a quota or a limit of the process shows only here

    def create(self, size: int) -> mmap.mmap:
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self._folder, buffering=0) as file:
                _allocate(file.fileno(), size)
                return mmap.mmap(file.fileno(), size)
        except OSError as error:
            raise self._full(size, error.strerror) from error

    def _full(self, size: int, reason: str | None) -> ProtocolError:
        return ProtocolError(
            "FS-1349",
            f"{self._folder} cannot hold {size} bytes of uploads ({reason})",
            expected="a writable state folder with free space",
            cure="mend the folder's permissions or free some space; the site may upload again",
        )


def _allocate(descriptor: int, size: int) -> None:
    """Give a file ``size`` bytes of disk; ``OSError`` where there are none."""
    try:
        os.posix_fallocate(descriptor, 0, size)
    except AttributeError:  # not on every system
        _write_zeros(descriptor, size)
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
        _write_zeros(descriptor, size)


def _write_zeros(descriptor: int, size: int) -> None:
    done = 0
    while done < size:
        done += os.pwrite(descriptor, _BLOCK[: size - done], done)
