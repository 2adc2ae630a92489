"""Where a ledger may lie: permissions, full and read-only disks, other files, older and newer formats."""

from __future__ import annotations

import contextlib
import os
import shutil
import sqlite3
import stat
from pathlib import Path

import pytest
from ledger_world import reserve

from fedsecure.errors import LedgerError
from fedsecure.messages import Event
from fedsecure.privacy import ledger_store
from fedsecure.privacy.ledger import Ledger, Limit


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "site" / "ledger.db"


def test_files_are_private(path: Path) -> None:
    with Ledger(path) as ledger:
        reserve(ledger)
        modes = {entry.name: stat.S_IMODE(entry.stat().st_mode) for entry in path.parent.iterdir()}
        assert set(modes) == {"ledger.db", "ledger.db-wal", "ledger.db-shm", "ledger.db.head"}
        assert set(modes.values()) == {0o600}


def test_a_full_disk_charges_nothing_and_says_so(path: Path) -> None:
    with Ledger(path) as ledger:
        (pages,) = ledger._db.execute("PRAGMA page_count").fetchone()
        ledger._db.execute(f"PRAGMA max_page_count = {pages}")

        def fill() -> None:
            for number in range(200):
                reserve(ledger, number, z=500.0)

        with pytest.raises(LedgerError, match="FS-1255"):
            fill()
        count = ledger.verify()
        assert len(ledger.spent("xrays", "train")) == count
        ledger._db.execute("PRAGMA max_page_count = 100000")
        reserve(ledger, 999)


def test_places_that_cannot_hold_a_ledger(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(LedgerError, match="FS-1250"):
        Ledger(tmp_path / "file" / "ledger.db")
    with pytest.raises(LedgerError, match="FS-1250"):
        Ledger(tmp_path)
    (tmp_path / "notes.txt").write_text("these are not the bytes of a ledger, but of a text\n" * 50)
    with pytest.raises(LedgerError, match="FS-1252"):
        Ledger(tmp_path / "notes.txt")
    with contextlib.closing(sqlite3.connect(tmp_path / "other.db")) as db:
        db.execute("CREATE TABLE entries (x)")
        db.commit()
    with pytest.raises(LedgerError, match="FS-1252"):
        Ledger(tmp_path / "other.db")
    assert "these are not" in (tmp_path / "notes.txt").read_text()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_missing_permissions(path: Path) -> None:
    Ledger(path).close()
    path.chmod(0o400)
    with pytest.raises(LedgerError, match="FS-1251"):
        Ledger(path)
    path.chmod(0o600)
    path.parent.chmod(0o500)
    with pytest.raises(LedgerError, match=r"FS-125[01]"):
        Ledger(path.parent / "new.db")
    path.parent.chmod(0o700)


def test_a_read_only_file_is_named_as_such(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Ledger(path).close()
    real = os.open

    def refuse(name: object, *rest: int) -> int:
        if name == path:
            raise PermissionError(13, "Permission denied")
        return real(name, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(LedgerError, match="FS-1251"):
        Ledger(path)


def test_a_newer_format_is_refused(path: Path) -> None:
    Ledger(path).close()
    with contextlib.closing(sqlite3.connect(path)) as db:
        db.execute("PRAGMA user_version = 3")
    with pytest.raises(LedgerError, match=r"FS-1253.*format 3"):
        Ledger(path)


FROZEN = Path(__file__).parent / "frozen" / "ledger-v1.db"


FROZEN_HEAD = (7, "cd12faeb3be48c192b7a743a3dec6f33167482b542aad980d7ec010023d376cd")


def test_format_1_is_upgraded_and_keeps_its_rows_hashes_and_secret(path: Path) -> None:
    path.parent.mkdir()
    shutil.copy(FROZEN, path)
    with contextlib.closing(sqlite3.connect(FROZEN)) as db:
        (key,) = db.execute("SELECT key FROM secret").fetchone()
        hashes = [row[0] for row in db.execute("SELECT hash FROM entries ORDER BY seq")]
    with Ledger(path) as ledger:
        assert ledger.head() == FROZEN_HEAD
        assert ledger.verify(head=FROZEN_HEAD) == 7
        assert ledger.key == key
        assert [entry.hash for entry in ledger.history()] == hashes
        assert ledger.spent("xrays", "train") == tuple(Event("train", "training", z, z / 2) for z in (6.0, 7.0, 9.0))
        assert ledger.spent("scans", "evaluation") == (Event("evaluation", "counts", 4.0, 4.0),)
        reserve(ledger, 9, units=ledger.hash_units(["a"]))
        ledger.set_limit("xrays", "train", Limit(3.0, 1e-5), reason="agreed")
    with Ledger(path) as ledger:
        assert ledger.verify(head=FROZEN_HEAD) == 9
        with contextlib.closing(sqlite3.connect(path)) as db:
            assert db.execute("PRAGMA user_version").fetchone() == (2,)
            assert db.execute("PRAGMA foreign_key_check").fetchall() == []


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE entries SET round = 7 WHERE seq = 2",
        "DELETE FROM entries WHERE seq = 7",
        "UPDATE secret SET key = zeroblob(32)",
        "CREATE TABLE more (x)",
    ],
)
def test_a_damaged_file_of_format_1_is_refused_and_not_touched(path: Path, statement: str) -> None:
    path.parent.mkdir()
    shutil.copy(FROZEN, path)
    with contextlib.closing(sqlite3.connect(path)) as db:
        triggers = db.execute("SELECT name, sql FROM sqlite_master WHERE type = 'trigger'").fetchall()
        for name, _ in triggers:
            db.execute(f"DROP TRIGGER {name}")
        for each in (statement, *(sql for _, sql in triggers)):
            db.execute(each)
        db.commit()
        before = list(db.iterdump())
    with pytest.raises(LedgerError, match="FS-1256"):
        Ledger(path)
    with contextlib.closing(sqlite3.connect(path)) as db:
        assert list(db.iterdump()) == before
        assert db.execute("PRAGMA user_version").fetchone() == (1,)


def test_an_upgrade_that_is_cut_short_leaves_format_1(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path.parent.mkdir()
    shutil.copy(FROZEN, path)

    def cut(*arguments: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(ledger_store.HeadCopy, "keep", cut)
        with pytest.raises(KeyboardInterrupt):
            Ledger(path)
    with contextlib.closing(sqlite3.connect(path)) as db:
        assert db.execute("PRAGMA user_version").fetchone() == (1,)
        assert db.execute("SELECT count(*) FROM entries").fetchone() == (7,)
    with Ledger(path) as ledger:
        assert ledger.head() == FROZEN_HEAD
