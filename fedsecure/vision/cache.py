"""The feature cache: each image is encoded once, ever. Keyed by the encoder's fingerprint and the image's content.

One SQLite file (WAL, a transaction a batch), safe for several processes. Every row carries a checksum, so a damaged
row or file is a miss and is written again. Features are as sensitive as images: the folder is private (0700).
"""

from __future__ import annotations

import hashlib
import os
import sqlite3
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from fedsecure.errors import EnvironmentProblem
from fedsecure.write_ahead import write_ahead

FloatFeatures = npt.NDArray[np.float32]
MAX_BYTES = 4 * 1024**3
_WAIT_SECONDS = 60
_SCHEMA = """
CREATE TABLE IF NOT EXISTS features (
    encoder TEXT NOT NULL, content BLOB NOT NULL, vector BLOB NOT NULL, checksum BLOB NOT NULL,
    PRIMARY KEY (encoder, content)
)
"""
_Result = TypeVar("_Result")


class FeatureCache:
    """Features on disk, bounded; the oldest go first.

    Args:
        folder: created where missing, made private.
        max_bytes: above it the oldest tenth of the rows is dropped.

    Raises:
        EnvironmentProblem: FS-1813 the folder cannot be used.
    """

    def __init__(self, folder: Path | str, *, max_bytes: int = MAX_BYTES) -> None:
        self._folder = Path(folder)
        self._file = self._folder / "features.sqlite"
        self._max_bytes = max_bytes
        try:
            self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._folder.chmod(0o700)
        except OSError as error:
            raise self._unusable(error) from error

    def _unusable(self, error: Exception) -> EnvironmentProblem:
        return EnvironmentProblem(
            "FS-1813",
            f"feature cache {self._folder} cannot be used ({error})",
            expected="a folder of this user with room to write",
            cure="check owner, permissions and free space of the site's state folder",
        )

    @contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        with closing(sqlite3.connect(self._file, timeout=_WAIT_SECONDS, isolation_level=None)) as connection:
            self._file.chmod(0o600)
            write_ahead(connection, wait_seconds=_WAIT_SECONDS)
            connection.execute("PRAGMA synchronous=NORMAL")
            connection.execute(_SCHEMA)
            yield connection

    def _run(self, work: Callable[[sqlite3.Connection], _Result]) -> _Result:
        """Run on a connection; a damaged file is removed and begun again, since a cache can always be refilled."""
        for last in (False, True):
            try:
                with self._open() as connection:
                    return work(connection)
            except (sqlite3.OperationalError, OSError) as error:
                raise self._unusable(error) from error
            except sqlite3.DatabaseError as error:
                if last:
                    raise self._unusable(error) from error
                for suffix in ("", "-wal", "-shm"):
                    with suppress(FileNotFoundError):
                        os.unlink(f"{self._file}{suffix}")
        raise AssertionError("unreachable")

    def get(self, fingerprint: str, keys: Sequence[bytes], *, dimension: int) -> dict[bytes, FloatFeatures]:
        """The features that are there and whole: content key → float32 (d,)."""

        def read(connection: sqlite3.Connection) -> dict[bytes, FloatFeatures]:
            found: dict[bytes, FloatFeatures] = {}
            for key in keys:
                row = connection.execute(
                    "SELECT vector, checksum FROM features WHERE encoder = ? AND content = ?", (fingerprint, key)
                ).fetchone()
                if row is None or not isinstance(row[0], bytes) or len(row[0]) != 4 * dimension:
                    continue
                if _checksum(fingerprint, key, row[0]) == row[1]:
                    found[key] = np.frombuffer(row[0], dtype="<f4").astype(np.float32)
            return found

        return self._run(read)

    def put(self, fingerprint: str, features: Mapping[bytes, FloatFeatures]) -> None:
        """Store content key → float32 (d,) in one transaction; replaces what is there."""
        rows = []
        for key, vector in features.items():
            raw = vector.astype("<f4").tobytes()
            rows.append((fingerprint, key, raw, _checksum(fingerprint, key, raw)))

        def write(connection: sqlite3.Connection) -> None:
            connection.execute("BEGIN IMMEDIATE")
            connection.executemany("INSERT OR REPLACE INTO features VALUES (?, ?, ?, ?)", rows)
            if self._size(connection) > self._max_bytes:
                count = connection.execute("SELECT COUNT(*) FROM features").fetchone()[0]
                connection.execute(
                    "DELETE FROM features WHERE rowid IN (SELECT rowid FROM features ORDER BY rowid LIMIT ?)",
                    (max(len(rows), count // 10),),
                )
            connection.execute("COMMIT")

        self._run(write)

    def __len__(self) -> int:
        """Number of features kept, of all encoders."""
        return self._run(lambda c: int(c.execute("SELECT COUNT(*) FROM features").fetchone()[0]))

    @staticmethod
    def _size(connection: sqlite3.Connection) -> int:
        pages, free, size = (
            int(connection.execute(f"PRAGMA {name}").fetchone()[0])
            for name in ("page_count", "freelist_count", "page_size")
        )
        return (pages - free) * size


def _checksum(fingerprint: str, key: bytes, vector: bytes) -> bytes:
    return hashlib.sha256(fingerprint.encode() + b"\0" + key + vector).digest()
