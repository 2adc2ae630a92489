"""The ledger's tables, format by format, and what SQLite says about them (privacy.md §3.9 and §7).

Format 2 adds unit sets, limits, and a note for a clock that went back; it is written as format 1 and what is new, so
that the two cannot drift apart. The statements' text is part of a ledger: a file whose tables were made by any others
is refused.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator

SCHEMA_VERSION = 2
APPLICATION = 0x46534C47  # "FSLG"

COLUMNS = (
    "seq", "format", "utc", "reservation", "state", "dataset", "dataset_name", "population", "run", "round",
    "attempt", "events", "query_sha256", "payload_sha256", "reason", "unit_set", "limit_at", "note", "prev_hash",
)  # fmt: skip
# What a row of format 1 would have held in the columns it lacks.
BLANK = {"format": 1, "unit_set": "", "limit_at": "", "note": ""}
COLUMNS_1 = tuple(name for name in COLUMNS if name not in BLANK)

_COMMON = """
CREATE TABLE secret (id INTEGER PRIMARY KEY CHECK (id = 1), key BLOB NOT NULL, digest TEXT NOT NULL);
CREATE TABLE datasets (key INTEGER PRIMARY KEY AUTOINCREMENT, name TEXT NOT NULL UNIQUE);
"""
# One set of units is one row, however often it is charged; entries name it by its digest.
_UNIT_SETS = """
CREATE TABLE unit_sets (
    key INTEGER PRIMARY KEY AUTOINCREMENT,
    digest TEXT NOT NULL UNIQUE,
    population TEXT NOT NULL CHECK (population IN ('train', 'evaluation')),
    base INTEGER REFERENCES unit_sets (key),
    added BLOB NOT NULL,
    removed BLOB NOT NULL
);
"""
_ENTRIES = """
CREATE TABLE entries (
    seq INTEGER PRIMARY KEY AUTOINCREMENT,{format}
    utc TEXT NOT NULL,
    reservation TEXT NOT NULL,
    state TEXT NOT NULL CHECK (state IN ('RESERVED', 'COMMITTED', 'VOID'{states})),
    dataset INTEGER NOT NULL REFERENCES datasets (key),
    dataset_name TEXT NOT NULL,
    population TEXT NOT NULL CHECK (population IN ('train', 'evaluation')),
    run TEXT NOT NULL,
    round INTEGER NOT NULL,
    attempt INTEGER NOT NULL,
    events TEXT NOT NULL,
    query_sha256 TEXT NOT NULL,
    payload_sha256 TEXT NOT NULL,
    reason TEXT NOT NULL,{more}
    prev_hash TEXT NOT NULL,
    hash TEXT NOT NULL UNIQUE
);
CREATE UNIQUE INDEX one_reservation ON entries (dataset, population, run, round, attempt) WHERE state = 'RESERVED';
CREATE UNIQUE INDEX one_end ON entries (reservation) WHERE state <> 'RESERVED';
"""
_MORE = """
    unit_set TEXT NOT NULL,
    limit_at TEXT NOT NULL,
    note TEXT NOT NULL,"""
_APPEND_ONLY = """
CREATE TRIGGER {table}_stay BEFORE UPDATE ON {table} BEGIN SELECT RAISE(ABORT, 'append-only'); END;
CREATE TRIGGER {table}_remain BEFORE DELETE ON {table} BEGIN SELECT RAISE(ABORT, 'append-only'); END;
"""

SCHEMA_1 = (
    _COMMON
    + _ENTRIES.format(format="", states="", more="")
    + "".join(_APPEND_ONLY.format(table=table) for table in ("entries", "datasets"))
)
SCHEMA = (
    _COMMON
    + _UNIT_SETS
    + _ENTRIES.format(format="\n    format INTEGER NOT NULL CHECK (format IN (1, 2)),", states=", 'LIMIT'", more=_MORE)
    + "".join(_APPEND_ONLY.format(table=table) for table in ("entries", "datasets", "unit_sets"))
)


def statements(script: str) -> Iterator[str]:
    """Single statements of a script; ``executescript`` would commit on its own."""
    statement = ""
    for line in script.splitlines():
        statement += line + "\n"
        if sqlite3.complete_statement(statement):
            yield statement.strip().rstrip(";")
            statement = ""


def is_made_by(db: sqlite3.Connection, script: str) -> bool:
    """Whether a database was made by exactly these statements."""
    found = db.execute("SELECT sql FROM sqlite_master WHERE name NOT LIKE 'sqlite_%'")
    return sorted(sql for (sql,) in found) == sorted(statements(script))


def lost_at_the_end(db: sqlite3.Connection, table: str, rows: int) -> bool:
    """Whether a table once held more rows than it does now: SQLite remembers the last key it gave."""
    counted = db.execute("SELECT seq FROM sqlite_sequence WHERE name = ?", (table,)).fetchone()
    return (counted[0] if counted else 0) != rows
