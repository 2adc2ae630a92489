"""The aggregator's database: brought up from every earlier form, refused from a later one, durable, and private."""

from __future__ import annotations

import os
import sqlite3
import stat
from pathlib import Path
from typing import Any

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import create_engine, text

from fedsecure.aggregator.database import Base, Database, RunRow, bring_up_to_date, migrations
from fedsecure.aggregator.program import only_one
from fedsecure.aggregator.store import runs_of
from fedsecure.errors import EnvironmentProblem, RunError

SCRIPTS = ScriptDirectory.from_config(migrations())
FORMS = [script.revision for script in SCRIPTS.walk_revisions()]
ROW = (
    "insert into runs (id, federation, settings, begun, changed, state, wanted, stage, round, attempt, epochs, step,"
    " facts, evaluations, model, model_hash, closed) values ('ab', 'world', '{}', 1, 2, 'waiting', 'run', 'training',"
    " 3, 1, 2, 3, '{}', '{}', '', '', 0)"
)


@pytest.mark.parametrize("form", FORMS)
def test_every_earlier_form_is_brought_up_with_its_rows(tmp_path: Path, form: str) -> None:
    engine = create_engine(f"sqlite:///{tmp_path / 'aggregator.db'}")
    with engine.begin() as connection:
        config = migrations()
        config.attributes["connection"] = connection
        command.upgrade(config, form)
        connection.execute(text(ROW))
    engine.dispose()
    database = Database("", tmp_path)
    (row,) = runs_of(database)
    assert (row.id, row.round, row.attempt, row.outcome) == ("ab", 3, 1, None)
    with database.engine.connect() as connection:
        assert MigrationContext.configure(connection).get_current_revision() == SCRIPTS.get_current_head()
    database.close()


def test_the_scripts_make_what_the_code_says(tmp_path: Path) -> None:
    database = Database("", tmp_path)
    with database.engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), Base.metadata) == []
        connection.execute(text("alter table runs drop column closed"))
        assert compare_metadata(MigrationContext.configure(connection), Base.metadata), "the comparison can fail"
    database.close()


def test_a_later_form_is_refused_and_left_alone(tmp_path: Path) -> None:
    database = Database("", tmp_path)
    with database.engine.begin() as connection:
        connection.execute(text("update alembic_version set version_num = '9999'"))
    database.close()
    before = (tmp_path / "aggregator.db").read_bytes()
    with pytest.raises(EnvironmentProblem, match="FS-1831"):
        Database("", tmp_path)
    assert (tmp_path / "aggregator.db").read_bytes() == before


def test_it_is_durable_and_its_owners_alone(tmp_path: Path) -> None:
    database = Database("", tmp_path)
    assert stat.S_IMODE(os.stat(tmp_path / "aggregator.db").st_mode) == 0o600
    with database.engine.connect() as connection:
        assert connection.execute(text("pragma journal_mode")).scalar() == "wal"
        assert connection.execute(text("pragma synchronous")).scalar() == 2, "FULL"
    database.close()


def test_a_transaction_that_raises_leaves_nothing(tmp_path: Path) -> None:
    database = Database("", tmp_path)

    def fails() -> None:
        with database.session() as session:
            session.execute(text(ROW))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fails()
    assert not runs_of(database)
    with database.session() as session:
        session.execute(text(ROW))
        assert session.get(RunRow, "ab") is not None
    assert len(runs_of(database)) == 1
    database.close()


@pytest.mark.parametrize("content", [b"no database at all" * 100, b"SQLite format 3\0" + bytes(1000)])
def test_a_damaged_file_is_one_clear_error(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "aggregator.db").write_bytes(content)
    with pytest.raises(EnvironmentProblem, match="FS-1830"):
        Database("", tmp_path)


@pytest.mark.parametrize(
    ("url", "where"),
    [
        ("postgresql+psycopg://user:geheim@127.0.0.1:1/none", "postgresql+psycopg://user:***@127.0.0.1:1/none"),
        ("postgresql+psycopg://127.0.0.1:1/none?user=u&password=geheim", "postgresql+psycopg://127.0.0.1:1/none"),
        ("nonsense://user:geheim@host/x", "nonsense://user:***@host/x"),
        ("user:geheim@host", "that `database` names"),
    ],
)
def test_a_password_is_in_no_message(tmp_path: Path, url: str, where: str) -> None:
    with pytest.raises(EnvironmentProblem) as caught:
        Database(url, tmp_path)
    assert caught.value.code == "FS-1830"
    assert f"database {where} fails" in caught.value.found
    assert "geheim" not in str(caught.value)


def test_no_wait_for_postgresql_is_without_an_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    psycopg = pytest.importorskip("psycopg")
    given: dict[str, Any] = {}

    def connect(*_: Any, **arguments: Any) -> Any:
        given.update(arguments)
        raise psycopg.OperationalError("nobody there")

    monkeypatch.setattr(psycopg, "connect", connect)
    for query, seconds in (("", 10), ("?connect_timeout=3", "3")):
        given.clear()
        with pytest.raises(EnvironmentProblem, match="FS-1830.*nobody there"):
            Database(f"postgresql+psycopg://host/name{query}", tmp_path)
        assert given["connect_timeout"] == seconds
        assert given["keepalives"] == 1
        assert given["options"] == "-c statement_timeout=30000"


def test_a_driver_that_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(EnvironmentProblem, match="FS-1832"):
        Database("mysql+mysqldb://host/name", tmp_path)


def test_one_process_for_each_state_folder(tmp_path: Path) -> None:
    with only_one(tmp_path), pytest.raises(RunError, match="FS-1735"), only_one(tmp_path):
        pass
    with only_one(tmp_path):
        pass


def test_a_locked_database_is_waited_for(tmp_path: Path) -> None:
    database = Database("", tmp_path)
    other = sqlite3.connect(tmp_path / "aggregator.db", isolation_level=None)
    try:
        other.execute("begin immediate")
        other.execute("rollback")
        with database.session() as session:
            session.execute(text(ROW))
    finally:
        other.close()
    bring_up_to_date(database.engine)
    database.close()
