"""Two processes that begin with the same new file at the same moment: neither is refused."""

from __future__ import annotations

import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from fedsecure.aggregator.database import Database
from fedsecure.privacy.ledger import Ledger
from fedsecure.vision.cache import FeatureCache
from fedsecure.write_ahead import write_ahead


@contextmanager
def held(file: Path, *, seconds: float) -> Iterator[None]:
    """Another connection holds the new file's lock for writing for so long."""
    file.parent.mkdir(exist_ok=True, parents=True)
    with closing(sqlite3.connect(file, isolation_level=None, check_same_thread=False)) as other:
        other.execute("BEGIN IMMEDIATE")
        timer = threading.Timer(seconds, other.rollback)
        timer.start()
        try:
            yield
        finally:
            timer.join()


def ledger(folder: Path) -> None:
    Ledger(folder / "ledger.db").close()


def cache(folder: Path) -> None:
    assert FeatureCache(folder).get("encoder", [b"image"], dimension=4) == {}


def database(folder: Path) -> None:
    Database("", folder).close()


@pytest.mark.parametrize(
    ("name", "open_"), [("ledger.db", ledger), ("features.sqlite", cache), ("aggregator.db", database)]
)
def test_a_new_file_that_another_process_also_makes_is_waited_for(
    tmp_path: Path, name: str, open_: Callable[[Path], None]
) -> None:
    folder = tmp_path / "state"
    with held(folder / name, seconds=0.3):
        open_(folder)
    with closing(sqlite3.connect(folder / name)) as reader:
        assert reader.execute("PRAGMA journal_mode").fetchone() == ("wal",)


def test_without_the_wait_sqlite_refuses_at_once(tmp_path: Path) -> None:
    with held(tmp_path / "x.db", seconds=0.3), closing(sqlite3.connect(tmp_path / "x.db", timeout=10)) as plain:
        begun = time.monotonic()
        with pytest.raises(sqlite3.OperationalError, match="locked"):
            plain.execute("PRAGMA journal_mode = WAL")
        assert time.monotonic() - begun < 10


def test_the_wait_ends(tmp_path: Path) -> None:
    with (
        held(tmp_path / "x.db", seconds=0.5),
        closing(sqlite3.connect(tmp_path / "x.db", timeout=0)) as plain,
        pytest.raises(sqlite3.OperationalError, match="locked"),
    ):
        write_ahead(plain, wait_seconds=0.05)


def test_what_is_no_lock_is_not_waited_for(tmp_path: Path) -> None:
    (tmp_path / "x.db").write_bytes(b"no database" * 100)
    plain = sqlite3.connect(tmp_path / "x.db")
    with closing(plain), pytest.raises(sqlite3.DatabaseError, match="not a database"):
        write_ahead(plain, wait_seconds=60.0)
