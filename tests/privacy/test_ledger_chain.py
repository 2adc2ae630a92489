"""No row, unit set or copy of the head can change unnoticed, and no older ledger passes for the newest."""

from __future__ import annotations

import contextlib
import os
import shutil
import sqlite3
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ledger_world import PAYLOAD, copy_to, reserve

from fedsecure.errors import LedgerError
from fedsecure.privacy.ledger import Ledger, Limit


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "site" / "ledger.db"


def sets_of(ledger: Ledger) -> list[Any]:
    return ledger._db.execute("SELECT * FROM unit_sets ORDER BY key").fetchall()


def filled(folder: str) -> Path:
    """Five charges, the last two by units and the second of them against the first, one commit, one void, a limit."""
    file = Path(folder) / "ledger.db"
    with Ledger(file) as ledger:
        ledger.set_limit("xrays", "train", Limit(7.0, 1e-5), reason="agreed in March")
        units = ledger.hash_units(f"patient/{k}" for k in range(30))
        for number in range(5):
            paying = None if number < 3 else units[number:]
            made = reserve(ledger, number, z=6.0 + number, units=paying)
            if number == 1:
                ledger.commit(made, PAYLOAD)
            if number == 2:
                ledger.void(made, "nothing left")
    return file


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, bytes]:
    """A ledger's file and the copy of its head."""
    file = filled(str(tmp_path_factory.mktemp("whole")))
    return file.read_bytes(), file.with_name("ledger.db.head").read_bytes()


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 10**9), st.integers(1, 255))
def test_an_edited_byte_is_detected_or_changes_nothing(whole: tuple[bytes, bytes], position: int, flip: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "ledger.db"

        def put(raw: bytes) -> None:
            file.write_bytes(raw)
            file.with_name("ledger.db.head").write_bytes(whole[1])

        put(whole[0])
        with Ledger(file) as ledger:
            truth, key, units = ledger.history(), ledger.key, sets_of(ledger)
            limits = ledger.limits()
        raw = bytearray(whole[0])
        raw[position % len(raw)] ^= flip
        put(raw)
        try:
            with Ledger(file) as ledger:
                assert ledger.history() == truth
                assert ledger.key == key
                assert sets_of(ledger) == units
                assert ledger.limits() == limits
        except LedgerError as error:
            assert error.code in ("FS-1252", "FS-1253", "FS-1256")  # noqa: PT017


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**9), st.integers(1, 255))
def test_an_edited_byte_of_the_copy_is_refused(whole: tuple[bytes, bytes], position: int, flip: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "ledger.db"
        file.write_bytes(whole[0])
        raw = bytearray(whole[1])
        raw[position % len(raw)] ^= flip
        file.with_name("ledger.db.head").write_bytes(raw)
        with pytest.raises(LedgerError) as caught:
            Ledger(file)
        assert caught.value.code in ("FS-1262", "FS-1264")


COLUMNS = [
    "seq", "format", "utc", "reservation", "state", "dataset", "dataset_name", "population", "run", "round",
    "attempt", "events", "query_sha256", "payload_sha256", "reason", "unit_set", "limit_at", "note", "prev_hash",
    "hash",
]  # fmt: skip


TRIGGERS = [f"{table}_{what}" for table in ("entries", "datasets", "unit_sets") for what in ("stay", "remain")]


def tamper(file: Path, *statements: str) -> None:
    with contextlib.closing(sqlite3.connect(file)) as db:
        kept = [db.execute("SELECT sql FROM sqlite_master WHERE name = ?", (name,)).fetchone()[0] for name in TRIGGERS]
        for trigger in TRIGGERS:
            db.execute(f"DROP TRIGGER {trigger}")
        db.execute("PRAGMA ignore_check_constraints = ON")
        for statement in (*statements, *kept):
            db.execute(statement)
        db.commit()


def test_tampering_that_changes_nothing_is_not_noticed(tmp_path: Path) -> None:
    """The positive control: what the tests below do, without the edit, opens."""
    file = filled(str(tmp_path))
    tamper(file)
    with Ledger(file) as ledger:
        assert ledger.verify() == 8


@pytest.mark.parametrize("row", [2, 7])
@pytest.mark.parametrize("column", COLUMNS)
def test_every_column_is_chained(tmp_path: Path, column: str, row: int) -> None:
    value = (
        "seq + 100"
        if column == "seq"
        else f"CASE typeof({column}) WHEN 'integer' THEN {column} + 50 ELSE {column} || 'x' END"
    )
    file = filled(str(tmp_path))
    tamper(file, f"UPDATE entries SET {column} = {value} WHERE seq = {row}")
    with pytest.raises(LedgerError, match="FS-1256"):
        Ledger(file)


@pytest.mark.parametrize(
    "statement",
    [
        "DELETE FROM entries WHERE seq = 1",
        "DELETE FROM entries WHERE seq = 3",
        "DELETE FROM entries WHERE seq = (SELECT max(seq) FROM entries)",
        "UPDATE datasets SET name = 'other'",
        "INSERT INTO datasets (name) VALUES ('other')",
        "UPDATE unit_sets SET population = 'evaluation'",
        "UPDATE unit_sets SET added = substr(added, 33) WHERE key = 1",
        "UPDATE unit_sets SET removed = zeroblob(0) WHERE key = 2",
        "UPDATE unit_sets SET base = NULL WHERE key = 2",
        "UPDATE unit_sets SET digest = 'x' || digest WHERE key = 2",
        "DELETE FROM unit_sets WHERE key = 2",
        "DELETE FROM unit_sets",
        "INSERT INTO unit_sets (digest, population, added, removed) VALUES ('x', 'train', zeroblob(0), zeroblob(0))",
        "DELETE FROM secret",
        "UPDATE secret SET key = zeroblob(32)",
    ],
)
def test_removed_and_replaced_rows_are_noticed(tmp_path: Path, statement: str) -> None:
    file = filled(str(tmp_path))
    tamper(file, statement)
    with pytest.raises(LedgerError, match="FS-1256"):
        Ledger(file)


def test_a_ledger_set_back_with_its_copy_is_noticed_by_whoever_kept_its_head(path: Path, tmp_path: Path) -> None:
    with Ledger(path) as ledger:
        reserve(ledger, 0)
        backup = copy_to(path, tmp_path / "backup")
        reserve(ledger, 1)
        head = ledger.head()
        assert ledger.verify(head=head) == 2
    with Ledger(backup) as restored:
        assert restored.verify() == 1
        with pytest.raises(LedgerError, match=r"FS-1262.*put back the newest ledger"):
            restored.verify(head=head)


def test_a_restored_older_ledger_is_refused_at_once(path: Path, tmp_path: Path) -> None:
    with Ledger(path) as ledger:
        reserve(ledger, 0)
    backup = copy_to(path, tmp_path / "backup")
    with Ledger(path) as ledger:
        reserve(ledger, 1)
    shutil.copy(backup, path)
    with pytest.raises(LedgerError, match=r"FS-1262.*1 rows.*row 2 seen before"):
        Ledger(path)
    path.unlink()
    with pytest.raises(LedgerError, match="FS-1262"):
        Ledger(path)


def test_a_ledger_set_back_under_an_open_handle_takes_no_charge(path: Path, tmp_path: Path) -> None:
    with Ledger(path) as ledger:
        reserve(ledger, 0)
        path.with_name("ledger.db.head").write_text(f"9:{'a' * 64}\n")
        with pytest.raises(LedgerError, match="FS-1262"):
            reserve(ledger, 1)
        path.with_name("ledger.db.head").unlink()
        with pytest.raises(LedgerError, match="FS-1264"):
            reserve(ledger, 1)
        assert ledger.verify() == 1


def test_another_ledger_s_copy_is_refused(path: Path, tmp_path: Path) -> None:
    with Ledger(path) as ledger, Ledger(tmp_path / "ledger.db") as other:
        reserve(ledger)
        reserve(other)
    shutil.copy(tmp_path / "ledger.db.head", path.parent)
    with pytest.raises(LedgerError, match="FS-1262"):
        Ledger(path)


def test_a_copy_behind_the_ledger_is_brought_up_and_a_lost_one_is_refused(path: Path) -> None:
    with Ledger(path) as ledger:
        reserve(ledger, 0)
        behind = path.with_name("ledger.db.head").read_bytes()
        reserve(ledger, 1)
        head = ledger.head()
    copy = path.with_name("ledger.db.head")
    copy.write_bytes(behind)
    with Ledger(path):
        assert copy.read_text() == f"{head[0]}:{head[1]}\n"
    for lost in (b"", b"2:abc\n", copy.read_bytes()[:-1], copy.read_bytes() + b"x"):
        copy.write_bytes(lost)
        with pytest.raises(LedgerError, match=r"FS-1264.*--renew"):
            Ledger(path)
    copy.unlink()
    with pytest.raises(LedgerError, match="FS-1264"):
        Ledger(path)
    with pytest.raises(LedgerError, match="FS-1262"):
        Ledger(path, renew_head=(2, "a" * 64))
    assert not copy.exists()
    Ledger(path, renew_head=head).close()
    assert copy.read_text() == f"{head[0]}:{head[1]}\n"
    # A copy that can be read is believed, whatever head is given.
    copy.write_text(f"3:{'b' * 64}\n")
    with pytest.raises(LedgerError, match="FS-1262"):
        Ledger(path, renew_head=head)


def test_a_copy_that_cannot_be_written_leaves_the_charge(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Ledger(path) as ledger:
        reserve(ledger, 0)

        def full(*arguments: object) -> None:
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", full)
            with pytest.raises(LedgerError, match=r"FS-1263.*No space left.*stays charged"):
                reserve(ledger, 1)
        assert len(ledger.spent("xrays", "train")) == 2
    with Ledger(path) as ledger:
        assert ledger.verify() == 2


def test_rows_cannot_be_changed_by_plain_sql(tmp_path: Path) -> None:
    file = filled(str(tmp_path))
    with contextlib.closing(sqlite3.connect(file)) as db:
        for statement in (
            "DELETE FROM entries",
            "UPDATE entries SET reason = 'x'",
            "DELETE FROM datasets",
            "DELETE FROM unit_sets",
        ):
            with pytest.raises(sqlite3.IntegrityError, match="append-only"):
                db.execute(statement)
