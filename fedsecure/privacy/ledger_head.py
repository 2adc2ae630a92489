"""The copy of the ledger's head beside it: a restored older database does not contain it (privacy.md §3.9).

One line ``rows:hash`` outside SQLite, written after each commit, never backwards, and synced. It may be behind after
a crash; it is never ahead of an honest ledger. A missing or unreadable copy is refused like a restored ledger: whoever
sets a ledger back could as well delete a file.
"""

from __future__ import annotations

import fcntl
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fedsecure.errors import LedgerError
from fedsecure.privacy.ledger_file import held

Head = tuple[int, str]
_LINE = re.compile(rb"(0|[1-9]\d{0,17}):([0-9a-f]{64})\n")


def parse_head(text: str) -> Head:
    """``rows:hash``, as printed by ``fedsecure budget verify`` and in every report.

    Raises:
        LedgerError: FS-1266 it is something else.
    """
    match = _LINE.fullmatch(text.strip().encode() + b"\n")
    if match is None:
        raise LedgerError(
            "FS-1266", f"{text[:80]!r} is no head of a ledger", expected="rows:hash, as in 42:0f1e… (64 digits)",
            cure="copy it from an earlier report or from `fedsecure budget verify`",
        )  # fmt: skip
    return int(match[1]), match[2].decode()


class HeadCopy:
    """``ledger.db.head`` of the ledger at a path."""

    def __init__(self, ledger: Path, *, wait_seconds: float) -> None:
        self.ledger = ledger
        self.path = ledger.with_name(ledger.name + ".head")
        self._wait = wait_seconds

    def read(self) -> Head | None:
        """The head that is kept, or ``None`` where there is none.

        Raises:
            LedgerError: FS-1264 it cannot be read.
        """
        try:
            with self.path.open("rb") as file:
                raw = file.read(128)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise self.missing(f"cannot be read ({error.strerror})") from error
        match = _LINE.fullmatch(raw)
        if match is None:
            raise self.missing("is not one line rows:hash")
        return int(match[1]), match[2].decode()

    def keep(self, head: Head, *, renew: bool = False) -> None:
        """Write a head unless a later one is there already; on disk when this returns.

        Args:
            head: rows and hash, of what is committed.
            renew: replace an unreadable copy too.

        Raises:
            LedgerError: FS-1263 it cannot be written, FS-1254 another process holds it, FS-1264 as for :meth:`read`.
        """
        draft = self.path.with_name(self.path.name + ".part")
        try:
            with self._locked() as folder:
                before = None if renew else self.read()
                if before is not None and before[0] >= head[0]:
                    return
                descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
                try:
                    os.write(descriptor, b"%d:%s\n" % (head[0], head[1].encode()))
                    os.fsync(descriptor)
                finally:
                    os.close(descriptor)
                os.replace(draft, self.path)
                os.fsync(folder)
        except OSError as error:
            raise LedgerError(
                "FS-1263", f"{self.path} cannot be written ({error.strerror})", expected="space on a writable disk",
                cure="free space or mend the permissions; what the ledger recorded before this stays charged",
            ) from error  # fmt: skip

    @contextmanager
    def _locked(self) -> Iterator[int]:
        folder = os.open(self.path.parent, os.O_RDONLY)
        try:
            deadline = time.monotonic() + self._wait
            while True:
                try:
                    fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() > deadline:
                        raise held(self.path, self._wait) from None
                    time.sleep(0.002)
            yield folder
        finally:
            os.close(folder)

    def missing(self, what: str) -> LedgerError:
        return LedgerError(
            "FS-1264", f"{self.path} {what}", expected="the copy of the head that the ledger writes after each row",
            cure="put it back; if it is lost, compare the ledger with the head in the last report and run "
            "`fedsecure budget verify --head rows:hash --renew`",
        )  # fmt: skip

    def set_back(self, head: Head, rows: int) -> LedgerError:
        return LedgerError(
            "FS-1262", f"{self.ledger} has {rows} rows and none of them is the row {head[0]} seen before "
            f"({head[1][:12]}…)", expected="a ledger that holds every row it ever held",
            cure="put back the newest ledger with its .head, -wal and -shm files; where it is lost, tell the data "
            "protection officer: the budget spent since cannot be guessed",
        )  # fmt: skip
