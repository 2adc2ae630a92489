"""Room for uploads: allocated before it is used, and a typed error where there is none."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from fedsecure.errors import ProtocolError
from fedsecure.secagg import spool as spool_module
from fedsecure.secagg.spool import FileSpool

SIZE = (1 << 20) + 4096


def allocated(folder: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    """Bytes of disk behind one buffer, read while its file is open."""
    seen: list[int] = []
    honest = spool_module.mmap.mmap

    def looking(descriptor: int, size: int) -> object:
        seen.append(512 * os.fstat(descriptor).st_blocks)
        return honest(descriptor, size)

    monkeypatch.setattr(spool_module, "mmap", SimpleNamespace(mmap=looking))
    buffer = FileSpool(folder).create(SIZE)
    assert len(buffer) == SIZE
    assert bytes(buffer[:5]) == bytes(5)
    return seen[0]


def test_a_buffer_has_its_bytes_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert allocated(tmp_path, monkeypatch) >= SIZE
    with (tmp_path / "sparse").open("wb") as file:  # what it was: a size and no bytes
        file.truncate(SIZE)
        assert 512 * os.fstat(file.fileno()).st_blocks < SIZE


@pytest.mark.parametrize("code", [errno.EOPNOTSUPP, errno.EINVAL, None])
def test_where_allocation_is_not_supported_zeros_are_written(
    code: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuses(*_: int) -> None:
        raise OSError(code, "not here") if code else AttributeError("posix_fallocate")

    monkeypatch.setattr(os, "posix_fallocate", refuses)
    assert allocated(tmp_path, monkeypatch) >= SIZE


@pytest.mark.parametrize("call", ["create", "reserve"])
def test_a_full_disk_is_one_typed_error(call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    spool = FileSpool(tmp_path)
    with pytest.raises(ProtocolError, match="FS-1349.*No space left"):
        spool.create(SIZE) if call == "create" else spool.reserve(SIZE, uploads=1)
    assert not list(tmp_path.iterdir())


def test_room_for_all_uploads_is_asked_for_beforehand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spool_module.shutil, "disk_usage", lambda _: SimpleNamespace(free=3 * SIZE))
    spool = FileSpool(tmp_path / "new")
    spool.reserve(SIZE, uploads=3)
    with pytest.raises(ProtocolError, match="FS-1349"):
        spool.reserve(SIZE, uploads=4)


def test_a_limit_of_the_process_shows_before_the_round(tmp_path: Path) -> None:
    """In a process of its own, for the limit holds for all its files."""
    code = f"""
import resource
from pathlib import Path
from fedsecure.errors import ProtocolError
from fedsecure.secagg.spool import FileSpool
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, resource.RLIM_INFINITY))
spool = FileSpool(Path({str(tmp_path)!r}))
spool.reserve(1 << 16, uploads=1)
try:
    spool.reserve((1 << 16) + 1, uploads=1)
except ProtocolError as error:
    print(error.code)
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240, check=True)
    assert ended.stdout == "FS-1349\n"
