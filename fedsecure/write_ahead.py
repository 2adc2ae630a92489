"""SQLite's write-ahead log, turned on although another process is busy with the same file."""

from __future__ import annotations

import sqlite3
import time

_PAUSE_SECONDS = 0.01


def write_ahead(connection: sqlite3.Connection, *, wait_seconds: float) -> None:
    """Turn on the write-ahead log (``PRAGMA journal_mode = WAL``), which the file then keeps.

    The connection's own ``timeout`` is not enough: SQLite says that the file is locked at once, where another process
    that also has just made it holds the lock for writing.

    Args:
        wait_seconds: For how long to try again.

    Raises:
        sqlite3.OperationalError: The file was locked for all of that time, or cannot be written.
    """
    until = time.monotonic() + wait_seconds
    while True:
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            return
        except sqlite3.OperationalError as error:
            busy = error.sqlite_errorcode & 0xFF == sqlite3.SQLITE_BUSY
            if not busy or time.monotonic() >= until:
                raise
        time.sleep(_PAUSE_SECONDS)


__all__ = ["write_ahead"]
