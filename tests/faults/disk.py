"""The world's disks: every durable write is a boundary where a process can be killed, or find its disk full.

The real system calls are made; before and after each that makes something durable, the world is asked. A boundary has
a name, such as ``rename latch.json`` or ``commit ledger.db``: these are the named crash points, and production code
needs no hooks for them. What is killed is the process, not the machine: what was written stays written.
"""

from __future__ import annotations

import errno
import os
import re
import sqlite3
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from faults.baton import Killed, Process, Stage

When = Literal["before", "after"]
_NUMBERS = re.compile(r"(?<=model)-\d+")
_WRITING = os.O_WRONLY | os.O_RDWR


@dataclass(slots=True)
class Trap:
    """Kills a process at a boundary to come.

    Attributes:
        point: its name; empty for any.
        when: before or after the write.
        skip: how many fitting boundaries pass before.
    """

    point: str
    when: When
    skip: int = 0


@dataclass(slots=True)
class Disks:
    """What the world does to the writes of its processes.

    Attributes:
        folder: writes outside are none of the world's.
        full: processes' names whose disk has no room.
        traps: process name → where it is killed.
        seen: every boundary that was passed: process name and point, with how often.
        sprung: where processes were killed.
        doing: what the commit in progress is for; names its boundary in place of the database's file.
    """

    stage: Stage
    folder: Path
    full: set[str] = field(default_factory=set)
    traps: dict[str, Trap] = field(default_factory=dict)
    seen: dict[tuple[str, str], int] = field(default_factory=dict)
    sprung: list[tuple[str, str, When]] = field(default_factory=list)
    doing: str = ""

    def boundary(self, point: str, when: When) -> None:
        """A process is at a boundary; raises :class:`Killed` where it is killed there."""
        process = self.stage.process
        if process is None or process.dead:
            return
        if when == "before":
            self.seen[process.name, point] = self.seen.get((process.name, point), 0) + 1
        trap = self.traps.get(process.name)
        if trap is not None and trap.when == when and trap.point in ("", point):
            if trap.skip > 0:
                trap.skip -= 1
                return
            del self.traps[process.name]
            self.sprung.append((process.name, point, when))
            process.dead = True
            raise Killed

    def mine(self, path: object) -> Process | None:
        """Whose write it is, if it is the world's business."""
        process = self.stage.process
        if process is None or not isinstance(path, str | os.PathLike):
            return None
        return process if os.fspath(path).startswith(os.fspath(self.folder)) else None

    def is_full(self, process: Process | None) -> bool:
        return process is not None and process.name in self.full


def name_of(path: object) -> str:
    """A file's name without what differs from run to run."""
    return _NUMBERS.sub("", os.path.basename(os.fspath(path)))  # type: ignore[call-overload, no-any-return]


class WatchedConnection(sqlite3.Connection):
    """A connection whose commits are boundaries."""

    disks: Disks
    file: str

    def execute(self, sql: str, *arguments: Any) -> sqlite3.Cursor:
        if sql != "COMMIT":
            return super().execute(sql, *arguments)
        return self._commit(lambda: super(WatchedConnection, self).execute(sql))

    def commit(self) -> None:
        if self.in_transaction:
            self._commit(super().commit)

    def _commit(self, commit: Callable[[], Any]) -> Any:
        process = self.disks.mine(self.file)
        if process is None:
            return commit()
        if self.disks.is_full(process):
            error = sqlite3.OperationalError("database or disk is full")
            error.sqlite_errorname, error.sqlite_errorcode = "SQLITE_FULL", 13
            raise error
        point = f"commit {self.disks.doing or name_of(self.file)}"
        self.disks.boundary(point, "before")
        done = commit()
        self.disks.boundary(point, "after")
        return done


@contextmanager
def watched(disks: Disks) -> Iterator[None]:
    """Every write below goes by ``disks``."""
    real_open, real_fsync, real_replace = os.open, os.fsync, os.replace
    real_allocate, real_connect = os.posix_fallocate, sqlite3.connect

    def no_room() -> OSError:
        return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def open_(path: Any, flags: int, *arguments: Any, **named: Any) -> int:
        # A file that is there can be opened; that there is no room for its bytes shows when they are synced.
        if flags & _WRITING and disks.is_full(disks.mine(path)) and not os.path.isfile(path):
            raise no_room()
        return real_open(path, flags, *arguments, **named)

    def fsync(descriptor: int) -> None:
        # What counts for a killed process is the write, and for its readers the renaming; a log is not renamed.
        # A folder has its room.
        full = disks.full and disks.is_full(disks.stage.process)
        if full and stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise no_room()
        if disks.stage.process is None:
            real_fsync(descriptor)
        elif os.readlink(f"/proc/self/fd/{descriptor}").endswith("/audit.log"):
            disks.boundary("append audit.log", "before")
            disks.boundary("append audit.log", "after")

    def replace(source: Any, target: Any, **named: Any) -> None:
        process = disks.mine(target)
        if process is None:
            return real_replace(source, target, **named)
        if disks.is_full(process):
            raise no_room()
        point = f"rename {name_of(target)}"
        disks.boundary(point, "before")
        real_replace(source, target, **named)
        disks.boundary(point, "after")

    def allocate(descriptor: int, offset: int, size: int) -> None:
        if disks.full and disks.is_full(disks.stage.process):
            raise no_room()
        real_allocate(descriptor, offset, size)

    def connect(database: Any, *arguments: Any, **named: Any) -> sqlite3.Connection:
        if disks.mine(database) is None:
            return real_connect(database, *arguments, **named)
        connection = real_connect(database, *arguments, **{**named, "factory": WatchedConnection})
        assert isinstance(connection, WatchedConnection)
        connection.disks, connection.file = disks, os.fspath(database)
        return connection

    os.open, os.fsync, os.replace = open_, fsync, replace  # type: ignore[assignment]
    os.posix_fallocate = allocate
    sqlite3.connect = sqlite3.dbapi2.connect = connect  # type: ignore[assignment, attr-defined]
    try:
        yield
    finally:
        os.open, os.fsync, os.replace = real_open, real_fsync, real_replace
        os.posix_fallocate = real_allocate
        sqlite3.connect = sqlite3.dbapi2.connect = real_connect  # type: ignore[attr-defined]
