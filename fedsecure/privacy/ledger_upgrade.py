"""From ledger format 1 to 2, in one transaction: rows keep their bytes and hashes, so heads printed before still hold.

Format 1 (no unit sets, no limits) is frozen here; a file that is not exactly that is refused before anything changes.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedsecure.privacy.ledger_file import COLUMNS, COLUMNS_1, SCHEMA, altered, check_chain, statements

_SCHEMA_1 = """
CREATE TABLE secret (id INTEGER PRIMARY KEY CHECK (id = 1), key BLOB NOT NULL, digest TEXT NOT NULL);
CREATE TABLE datasets (key INTEGER PRIMARY KEY AUTOINCREMENT, name TEXT NOT NULL UNIQUE);
CREATE TABLE entries (
    seq INTEGER PRIMARY KEY AUTOINCREMENT,
    utc TEXT NOT NULL,
    reservation TEXT NOT NULL,
    state TEXT NOT NULL CHECK (state IN ('RESERVED', 'COMMITTED', 'VOID')),
    dataset INTEGER NOT NULL REFERENCES datasets (key),
    dataset_name TEXT NOT NULL,
    population TEXT NOT NULL CHECK (population IN ('train', 'evaluation')),
    run TEXT NOT NULL,
    round INTEGER NOT NULL,
    attempt INTEGER NOT NULL,
    events TEXT NOT NULL,
    query_sha256 TEXT NOT NULL,
    payload_sha256 TEXT NOT NULL,
    reason TEXT NOT NULL,
    prev_hash TEXT NOT NULL,
    hash TEXT NOT NULL UNIQUE
);
CREATE UNIQUE INDEX one_reservation ON entries (dataset, population, run, round, attempt) WHERE state = 'RESERVED';
CREATE UNIQUE INDEX one_end ON entries (reservation) WHERE state <> 'RESERVED';
CREATE TRIGGER entries_stay BEFORE UPDATE ON entries BEGIN SELECT RAISE(ABORT, 'append-only'); END;
CREATE TRIGGER entries_remain BEFORE DELETE ON entries BEGIN SELECT RAISE(ABORT, 'append-only'); END;
CREATE TRIGGER datasets_stay BEFORE UPDATE ON datasets BEGIN SELECT RAISE(ABORT, 'append-only'); END;
CREATE TRIGGER datasets_remain BEFORE DELETE ON datasets BEGIN SELECT RAISE(ABORT, 'append-only'); END;
"""
_NEW = {"format": "1", "unit_set": "''", "limit_at": "''", "note": "''"}


def schema_of(db: sqlite3.Connection) -> list[str]:
    """The statements that made a database, sorted."""
    return sorted(sql for (sql,) in db.execute("SELECT sql FROM sqlite_master WHERE name NOT LIKE 'sqlite_%'"))


def upgrade(db: sqlite3.Connection, path: Path) -> list[dict[str, Any]]:
    """Rewrite format 1 as format 2, inside the caller's transaction; the caller sets the version.

    Returns:
        The rows, as they are now.

    Raises:
        LedgerError: FS-1256 the file is not a sound ledger of format 1; nothing was changed.
    """
    if schema_of(db) != sorted(statements(_SCHEMA_1)):
        raise altered("its tables are not those of format 1", path)
    names = (*COLUMNS_1, "hash")
    found: Sequence[Sequence[Any]] = db.execute(f"SELECT {', '.join(names)} FROM entries ORDER BY seq").fetchall()  # noqa: S608
    blank = {"format": 1, "unit_set": "", "limit_at": "", "note": ""}
    rows = [dict(zip(names, row, strict=True)) | blank for row in found]
    check_chain(rows, dict(db.execute("SELECT key, name FROM datasets").fetchall()), {}, path)
    counted = db.execute("SELECT seq FROM sqlite_sequence WHERE name = 'entries'").fetchone()
    if (counted[0] if counted else 0) != len(rows):
        raise altered("rows are missing at the end", path)
    for kind, name in db.execute(
        "SELECT type, name FROM sqlite_master WHERE type IN ('trigger', 'index') AND sql IS NOT NULL"
    ).fetchall():
        db.execute(f"DROP {kind} {name}")
    db.execute("ALTER TABLE entries RENAME TO entries_1")
    fresh = [s for s in statements(SCHEMA) if not s.startswith(("CREATE TABLE secret", "CREATE TABLE datasets"))]
    tables = [s for s in fresh if s.startswith("CREATE TABLE")]
    for statement in tables:
        db.execute(statement)
    values = ", ".join(_NEW.get(name, name) for name in (*COLUMNS, "hash"))
    db.execute(
        f"INSERT INTO entries ({', '.join((*COLUMNS, 'hash'))}) SELECT {values} FROM entries_1 ORDER BY seq"  # noqa: S608
    )
    db.execute("DROP TABLE entries_1")
    for statement in fresh:
        if statement not in tables:
            db.execute(statement)
    return rows
