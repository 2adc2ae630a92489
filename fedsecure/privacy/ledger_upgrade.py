"""From ledger format 1 to 2, in one transaction: rows keep their bytes and hashes, so heads printed before still hold.

A file that is not exactly of format 1 is refused before anything changes.
"""

from __future__ import annotations

import sqlite3
from pathlib import Path
from typing import Any

from fedsecure.privacy.ledger_file import altered, check_chain
from fedsecure.privacy.ledger_schema import (
    BLANK,
    COLUMNS,
    COLUMNS_1,
    SCHEMA,
    SCHEMA_1,
    is_made_by,
    lost_at_the_end,
    statements,
)


def upgrade(db: sqlite3.Connection, path: Path) -> list[dict[str, Any]]:
    """Rewrite format 1 as format 2, inside the caller's transaction; the caller sets the version.

    Returns:
        The rows, as they are now.

    Raises:
        LedgerError: FS-1256 the file is not a sound ledger of format 1; nothing was changed.
    """
    if not is_made_by(db, SCHEMA_1):
        raise altered("its tables are not those of format 1", path)
    old, new = (*COLUMNS_1, "hash"), (*COLUMNS, "hash")
    found = db.execute(f"SELECT {', '.join(old)} FROM entries ORDER BY seq").fetchall()  # noqa: S608
    rows: list[dict[str, Any]] = [dict(zip(old, row, strict=True)) | BLANK for row in found]
    check_chain(rows, dict(db.execute("SELECT key, name FROM datasets").fetchall()), {}, path)
    if lost_at_the_end(db, "entries", len(rows)):
        raise altered("rows are missing at the end", path)
    for kind, name in db.execute(
        "SELECT type, name FROM sqlite_master WHERE type IN ('trigger', 'index') AND sql IS NOT NULL"
    ).fetchall():
        db.execute(f"DROP {kind} {name}")
    db.execute("ALTER TABLE entries RENAME TO entries_1")
    kept = [sql for (sql,) in db.execute("SELECT sql FROM sqlite_master WHERE name IN ('secret', 'datasets')")]
    fresh = [statement for statement in statements(SCHEMA) if statement not in kept]
    tables = [statement for statement in fresh if statement.startswith("CREATE TABLE")]
    for statement in tables:
        db.execute(statement)
    db.executemany(
        f"INSERT INTO entries ({', '.join(new)}) VALUES ({', '.join('?' * len(new))})",  # noqa: S608
        [[row[name] for name in new] for row in rows],
    )
    db.execute("DROP TABLE entries_1")
    for statement in fresh:
        if statement not in tables:
            db.execute(statement)
    return rows
