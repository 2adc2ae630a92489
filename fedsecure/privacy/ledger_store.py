"""The ledger's storage: an SQLite file in WAL mode, synced, whose rows are only ever appended and chained by hash.

Every change is one ``IMMEDIATE`` transaction that first looks whether the file still holds the head seen last. After
its commit the head is copied beside the file (``ledger_head``), so that a restored older file is refused.
"""

from __future__ import annotations

import logging
import os
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Self

from fedsecure.errors import LedgerError
from fedsecure.messages import Population
from fedsecure.privacy.ledger_file import (
    GENESIS,
    altered,
    check_chain,
    clock_went_back,
    create_private,
    no_ledger,
    row_hash,
    secret_digest,
    sqlite_error,
)
from fedsecure.privacy.ledger_head import Head, HeadCopy
from fedsecure.privacy.ledger_schema import (
    APPLICATION,
    COLUMNS,
    SCHEMA,
    SCHEMA_VERSION,
    is_made_by,
    lost_at_the_end,
    statements,
)
from fedsecure.privacy.ledger_upgrade import upgrade
from fedsecure.privacy.unit_sets import check_sets
from fedsecure.write_ahead import write_ahead

log = logging.getLogger("fedsecure.privacy.ledger")
# What machines correct by themselves is noted; more than that somebody has to look at.
CLOCK_SLACK = timedelta(hours=1)


def utc_now() -> datetime:
    """The machine's clock; no budget depends on it, but the order of the rows' times does."""
    return datetime.now(UTC)


class LedgerStore:
    """An open ledger file; see :class:`fedsecure.privacy.ledger.Ledger`."""

    def __init__(self, path: Path | str, *, wait_seconds: float = 10.0, renew_head: Head | None = None) -> None:
        self.path = Path(path)
        self._wait = wait_seconds
        self._lock = threading.RLock()
        self._open = True
        self._copy = HeadCopy(self.path, wait_seconds=wait_seconds)
        create_private(self.path)
        with self._errors():
            self._db = sqlite3.connect(self.path, timeout=wait_seconds, isolation_level=None, check_same_thread=False)
        try:
            self._prepare()
            self._check_open(renew_head)
        except BaseException:
            self.close()
            raise

    @classmethod
    def open_existing(cls, path: Path | str, *, renew_head: Head | None = None) -> Self:
        """Like the constructor, but a file that is not there is an error and is not created.

        Raises:
            LedgerError: FS-1261 there is no file; others as for the constructor.
        """
        if not Path(path).is_file():
            raise LedgerError(
                "FS-1261",
                f"there is no ledger at {path}",
                expected="the file named under `ledger` in the site's configuration",
                cure="check the path; a site's ledger appears with its first run",
            )
        return cls(path, renew_head=renew_head)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Release the file. Calling it again does nothing."""
        if self._open:
            self._open = False
            with suppress(AttributeError):
                self._db.close()

    @property
    def key(self) -> bytes:
        """32 secret bytes of this site, for keyed hashes of unit and image ids; they never leave it."""
        with self._lock, self._errors():
            return bytes(self._db.execute("SELECT key FROM secret").fetchone()[0])

    def head(self) -> Head:
        """Number and hash of the last row; whoever keeps it elsewhere will notice a ledger set back."""
        with self._lock, self._errors():
            row = self._db.execute("SELECT seq, hash FROM entries ORDER BY seq DESC LIMIT 1").fetchone()
        return (int(row[0]), str(row[1])) if row else (0, GENESIS)

    def verify(self, *, head: Head | None = None) -> int:
        """Check every row and every unit set against the chain; returns how many rows there are.

        Args:
            head: an earlier :meth:`head`, kept elsewhere, that the chain must still contain.

        Raises:
            LedgerError: FS-1256 a row was altered, removed or put in; FS-1262 the ledger is older than the head.
        """
        # One snapshot, whatever other processes append meanwhile.
        with self._snapshot():
            (sound,) = self._db.execute("PRAGMA integrity_check(1)").fetchone()
            if sound != "ok":
                raise altered(f"SQLite says: {sound}", self.path)
            if not is_made_by(self._db, SCHEMA):
                raise altered("its tables are not this release's", self.path)
            self._check_secret()
            rows = self._rows()
            datasets = dict(self._db.execute("SELECT key, name FROM datasets").fetchall())
            check_chain(rows, datasets, check_sets(self._db, self.path), self.path)
            if lost_at_the_end(self._db, "entries", len(rows)):
                raise altered("rows are missing at the end", self.path)
            if head is not None:
                self._check_holds(head)
        return len(rows)

    # --- inside --------------------------------------------------------------------------------------------------

    def _rows(self) -> list[dict[str, Any]]:
        found = self._db.execute(f"SELECT {', '.join(COLUMNS)}, hash FROM entries ORDER BY seq").fetchall()  # noqa: S608
        return [dict(zip((*COLUMNS, "hash"), row, strict=True)) for row in found]

    def _check_secret(self) -> None:
        secret = self._db.execute("SELECT key, digest FROM secret").fetchall()
        if len(secret) != 1 or not isinstance(secret[0][0], bytes) or secret[0][1] != secret_digest(secret[0][0]):
            raise altered("the site's secret", self.path)

    def _check_holds(self, head: Head) -> None:
        """Refuse a file that lost a row it once had."""
        row = self._db.execute("SELECT hash FROM entries WHERE seq = ?", (head[0],)).fetchone()
        if (row[0] if row else GENESIS if head[0] == 0 else None) != head[1]:
            raise self._copy.set_back(head, self.head()[0])

    def _check_open(self, renew: Head | None) -> None:
        """The chain, and the copy of its head; read the copy first, since it never runs ahead of the file."""
        kept = self._kept(renewing=renew is not None)
        rows = self.verify(head=kept)
        if renew is not None:
            self._check_holds(renew)
        elif kept is None and rows:
            # Another process may have made the first row, after its copy, since the copy was looked for.
            kept = self._copy.read()
            if kept is None:
                raise self._copy.missing("is missing")
            self._check_holds(kept)
        self._copy.keep(self.head(), renew=renew is not None and kept is None)

    def _kept(self, *, renewing: bool) -> Head | None:
        try:
            return self._copy.read()
        except LedgerError:
            # Only an unreadable copy may be renewed; a readable one is believed.
            if renewing:
                return None
            raise

    def _prepare(self) -> None:
        version = self._version()
        if version is not None and version > SCHEMA_VERSION:
            raise LedgerError(
                "FS-1253", f"{self.path} has ledger format {version}", expected=f"at most {SCHEMA_VERSION}",
                cure="install the fedsecure release that wrote it, or a newer one",
            )  # fmt: skip
        with self._errors():
            write_ahead(self._db, wait_seconds=self._wait)
            self._db.execute("PRAGMA synchronous = FULL")
            self._db.execute("PRAGMA foreign_keys = ON")
        if version == SCHEMA_VERSION:
            return
        with self._writing():
            # Another process may have been first.
            version = self._version()
            if version is None:
                for statement in statements(SCHEMA):
                    self._db.execute(statement)
                key = os.urandom(32)
                self._db.execute("INSERT INTO secret VALUES (1, ?, ?)", (key, secret_digest(key)))
                self._db.execute(f"PRAGMA application_id = {APPLICATION}")
            elif version == 1:
                self._check_secret()
                rows = upgrade(self._db, self.path)
                # Before the commit: a crash in between must not look like a lost copy.
                kept = self._copy.read()
                if kept is None:
                    self._copy.keep((len(rows), rows[-1]["hash"]) if rows else (0, GENESIS))
            else:
                return
            self._db.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")

    def _version(self) -> int | None:
        """Format of the file; ``None`` where it is empty."""
        # Of one moment: another process may be making the file.
        with self._snapshot():
            (application,) = self._db.execute("PRAGMA application_id").fetchone()
            (version,) = self._db.execute("PRAGMA user_version").fetchone()
            (tables,) = self._db.execute("SELECT count(*) FROM sqlite_master").fetchone()
        if application != APPLICATION:
            if application or tables:
                raise no_ledger(self.path)
            return None
        if version < 1:
            raise altered(f"format {version}", self.path)
        return int(version)

    def _check_clock(self) -> None:
        """Refuse a clock that reads long before the last charge, or the last word of an officer, by the clock of then.

        Commits and voids do not count: what was charged before the clock went back is ended after it.
        """
        last = self._db.execute(
            "SELECT utc, note FROM entries WHERE state IN ('RESERVED', 'LIMIT') ORDER BY seq DESC LIMIT 1"
        ).fetchone()
        if last is not None:
            utc, note = last
            then = datetime.fromisoformat(note.rpartition(" ")[2] if note else utc)
            if (now := utc_now()) < then - CLOCK_SLACK:
                raise clock_went_back(self.path, now, then)

    def _append(self, *, dataset_name: str, population: Population, **values: Any) -> None:
        """One row, inside a transaction; the data set is entered where it is new."""
        self._db.execute("INSERT OR IGNORE INTO datasets (name) VALUES (?)", (dataset_name,))
        (dataset,) = self._db.execute("SELECT key FROM datasets WHERE name = ?", (dataset_name,)).fetchone()
        last, previous = self.head()
        row: dict[str, Any] = {
            "seq": last + 1, "format": 2, "dataset": dataset, "dataset_name": dataset_name, "population": population,
            "run": "", "round": 0, "attempt": 0, "events": "[]", "query_sha256": "", "payload_sha256": "",
            "reason": "", "unit_set": "", "limit_at": "", "note": "", "prev_hash": previous,
        } | values  # fmt: skip
        (latest,) = self._db.execute("SELECT coalesce(max(utc), '') FROM entries").fetchone()
        now = utc_now().isoformat(timespec="seconds")
        row["utc"] = max(now, latest)
        if now < latest:
            # No budget renews with time, so a clock that was corrected can spend nothing twice: say so, and go on.
            row["note"] = f"the clock had gone back: it read {now}"
            log.warning("the clock has gone back: it reads %s, and the ledger's last row is of %s", now, latest)
        self._db.execute(
            f"INSERT INTO entries ({', '.join(COLUMNS)}, hash) VALUES ({', '.join('?' * (len(COLUMNS) + 1))})",  # noqa: S608
            [*(row[column] for column in COLUMNS), row_hash(row)],
        )

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        """A change of the rows; when this returns, it and the copy of the head are on disk."""
        with self._lock:
            with self._writing():
                kept = self._copy.read()
                if kept is None:
                    raise self._copy.missing("is missing")
                self._check_holds(kept)
                yield
            self._copy.keep(self.head())

    @contextmanager
    def _writing(self) -> Iterator[None]:
        with self._lock, self._errors():
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise

    @contextmanager
    def _snapshot(self) -> Iterator[None]:
        """Several readings of one state; inside a transaction, of that."""
        with self._lock, self._errors():
            if self._db.in_transaction:
                yield
                return
            self._db.execute("BEGIN")
            try:
                yield
            finally:
                self._db.execute("ROLLBACK")

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """SQLite's failures as the project's, each with its cure."""
        if not self._open:
            raise LedgerError(
                "FS-1260", f"{self.path} is closed", expected="an open ledger",
                cure="use it inside `with Ledger(path) as ledger:`",
            )  # fmt: skip
        try:
            yield
        except (sqlite3.Error, UnicodeDecodeError) as error:
            raise sqlite_error(error, self.path, self._wait) from error
