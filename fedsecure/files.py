"""Files that are written whole or not at all, and private folders."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from fedsecure.errors import EnvironmentProblem


def write_whole(path: Path, data: bytes, *, mode: int = 0o600) -> None:
    """Write ``data`` so that a reader, or a crash, sees all of it or the file before.

    Raises:
        EnvironmentProblem: FS-1802, no permission or no space.
    """
    draft = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode)
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    except OSError as error:
        raise _unwritable(path, error) from error


def appending(path: Path) -> Callable[[bytes | memoryview], None]:
    """What appends to a file that begins empty: each time all of it, or nothing.

    What it returns raises EnvironmentProblem FS-1802, no permission or no space; the same bytes may be tried again.
    """
    end = 0

    def append(data: bytes | memoryview) -> None:
        nonlocal end
        try:
            with path.open("r+b" if end else "wb") as file:
                # A write that failed may have left a part.
                file.truncate(end)
                file.seek(end)
                file.write(data)
        except OSError as error:
            raise _unwritable(path, error) from error
        end += len(data)

    return append


def make_folder(path: Path) -> Path:
    """Create a folder that only its owner can read, and make sure that it can be written to.

    Raises:
        EnvironmentProblem: FS-1802, no permission or no space.
    """
    probe = path / f".probe.{os.getpid()}"
    try:
        path.mkdir(parents=True, exist_ok=True, mode=0o700)
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise _unwritable(path, error) from error
    return path


def _unwritable(path: Path, error: OSError) -> EnvironmentProblem:
    return EnvironmentProblem(
        "FS-1802",
        f"cannot write {path} ({error.strerror})",
        expected="a place this user may write to, with space left",
        cure="mend the permissions, free space, or name another folder in the configuration",
    )
