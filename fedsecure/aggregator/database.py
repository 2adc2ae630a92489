"""The aggregator's database: its tables, how it is opened, and how older ones are brought up to date.

SQLite in the state folder unless ``database`` names another (PostgreSQL with ``fedsecure[postgres]``). It holds what is
public in a run, or released by it: settings, who took part in which attempt, evaluations. Never a masked vector, a key
or a session. Alembic's scripts beside this file bring a database of an earlier release up to date when it is opened.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from alembic import command
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import (
    JSON,
    URL,
    Double,
    Engine,
    ForeignKey,
    String,
    Text,
    UniqueConstraint,
    create_engine,
    event,
    make_url,
)
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from fedsecure.config import FederationConfig
from fedsecure.errors import EnvironmentProblem
from fedsecure.write_ahead import write_ahead

# How long a writer waits for another, in seconds: `fedsecure runs` beside a running aggregator.
_BUSY_SECONDS = 20
_URL = "FEDSECURE_DATABASE"
# Of PostgreSQL: a server that is not there, one that vanished, and a statement that takes too long.
_BOUNDED = {
    "connect_timeout": 10,
    "keepalives": 1,
    "keepalives_idle": 30,
    "keepalives_interval": 10,
    "keepalives_count": 3,
    "tcp_user_timeout": 30_000,
    "options": "-c statement_timeout=30000",
}


class Base(DeclarativeBase):
    type_annotation_map = {dict[str, Any]: JSON, list[str]: JSON, float: Double}  # noqa: RUF012 -- as SQLAlchemy declares it


class RunRow(Base):
    """One run, and where it stands.

    ``wanted`` is what the operator asks for: run, pause or stop. ``model`` names the file with the tensors after the
    last sum, ``model_hash`` its SHA-256. ``closed``: its sites have heard the end, or have had the time to.
    """

    __tablename__ = "runs"
    id: Mapped[str] = mapped_column(String(32), primary_key=True)
    federation: Mapped[str] = mapped_column(Text, index=True)
    settings: Mapped[str] = mapped_column(Text)
    begun: Mapped[float]
    changed: Mapped[float]
    state: Mapped[str] = mapped_column(String(16))
    wanted: Mapped[str] = mapped_column(String(16))
    stage: Mapped[str] = mapped_column(String(16))
    round: Mapped[int]
    attempt: Mapped[int]
    epochs: Mapped[int]
    step: Mapped[int]
    facts: Mapped[dict[str, Any]]
    evaluations: Mapped[dict[str, Any]]
    model: Mapped[str] = mapped_column(Text)
    model_hash: Mapped[str] = mapped_column(String(64))
    outcome: Mapped[dict[str, Any] | None]
    closed: Mapped[bool]


class AttemptRow(Base):
    """One attempt of one round, from the moment before it is asked; ``outcome`` is empty while it goes on."""

    __tablename__ = "attempts"
    __table_args__ = (UniqueConstraint("run", "round", "attempt"),)
    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=True)
    run: Mapped[str] = mapped_column(ForeignKey("runs.id"))
    round: Mapped[int]
    attempt: Mapped[int]
    stage: Mapped[str] = mapped_column(String(16))
    method: Mapped[str] = mapped_column(Text)
    cohort: Mapped[list[str]]
    context: Mapped[str] = mapped_column(String(64))
    opened: Mapped[float]
    seconds: Mapped[float | None]
    outcome: Mapped[dict[str, Any]]
    suspects: Mapped[dict[str, Any]]


class TransitionRow(Base):
    """One change of a run's state, in order of ``id``."""

    __tablename__ = "transitions"
    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=True)
    run: Mapped[str] = mapped_column(ForeignKey("runs.id"), index=True)
    at: Mapped[float]
    state: Mapped[str] = mapped_column(String(16))
    round: Mapped[int]
    attempt: Mapped[int]


class Database:
    """An open database, of this release's form.

    Args:
        url: SQLAlchemy's, such as ``postgresql+psycopg://user@host/name``; empty for SQLite in ``state``.
        state: the aggregator's folder.

    Raises:
        EnvironmentProblem: FS-1830 it cannot be reached, read or written; FS-1831 it is of a newer release; FS-1832 the
            driver is not installed.
    """

    def __init__(self, url: str, state: Path) -> None:
        self._where = _public(url) if url else str(state / "aggregator.db")
        if not url:
            # SQLite would create it readable for others.
            _touch(state / "aggregator.db")
            url = f"sqlite:///{state / 'aggregator.db'}"
        try:
            self.engine = create_engine(url, connect_args=_connect_args(make_url(url)))
        except ImportError as error:
            raise EnvironmentProblem(
                "FS-1832",
                f"the database's driver is missing ({error.name})",
                expected="the driver that `database` names",
                cure="pip install 'fedsecure[postgres]'",
            ) from error
        except SQLAlchemyError as error:
            raise self._failed(error) from error
        if self.engine.dialect.name == "sqlite":
            event.listen(self.engine, "connect", _durable)
        with self._errors():
            bring_up_to_date(self.engine)

    @contextmanager
    def session(self) -> Iterator[Session]:
        """One transaction, on the disk when the block ends; none of it where the block raises.

        Raises:
            EnvironmentProblem: FS-1830 the database cannot be reached, read or written.
        """
        with self._errors(), Session(self.engine, expire_on_commit=False) as session, session.begin():
            yield session

    def close(self) -> None:
        """Let go of all connections."""
        self.engine.dispose()

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except SQLAlchemyError as error:
            raise self._failed(error) from error

    def _failed(self, error: SQLAlchemyError) -> EnvironmentProblem:
        # The statement and its values stay out of the message.
        said = str(getattr(error, "orig", None) or type(error).__name__).splitlines()[0]
        return EnvironmentProblem(
            "FS-1830",
            f"the aggregator's database {self._where} fails ({said})",
            expected="a database that can be reached and written",
            cure="free space, mend its permissions or its server, and start `fedsecure serve` again: the run goes on",
        )


def open_database(config: FederationConfig) -> Database:
    """The database of an aggregator, as its file or the environment names it; raises as :class:`Database`."""
    return Database(os.environ.get(_URL, config.database), config.state)


def bring_up_to_date(engine: Engine) -> None:
    """Create the tables, or migrate those of an earlier release; raises EnvironmentProblem FS-1831 for a later one."""
    scripts = ScriptDirectory.from_config(migrations())
    newest = scripts.get_current_head()
    with engine.begin() as connection:
        found = MigrationContext.configure(connection).get_current_revision()
        if found == newest:
            return
        if found is not None and found not in {script.revision for script in scripts.walk_revisions()}:
            raise EnvironmentProblem(
                "FS-1831",
                f"the aggregator's database has form {found}",
                expected=f"form {newest} or an earlier one of this release",
                cure="install the newer fedsecure that wrote it, or put the backup from before it back",
            )
        config = migrations()
        config.attributes["connection"] = connection
        command.upgrade(config, "head")


def migrations() -> Config:
    """Alembic's configuration for the scripts of this package."""
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).with_name("migrations")).replace("%", "%%"))
    return config


def _public(url: str) -> str:
    """The place alone: a password may stand before the host, and among the parameters too."""
    try:
        return make_url(url).set(query={}).render_as_string(hide_password=True)
    except SQLAlchemyError:
        return "that `database` names"


def _connect_args(url: URL) -> dict[str, Any]:
    """The driver's waits, all of them bounded, since each stops the aggregator's loop; the URL's own come first."""
    if url.get_backend_name() == "sqlite":
        return {"timeout": _BUSY_SECONDS}
    # libpq's words, which other drivers of PostgreSQL do not know.
    bounded = url.drivername in ("postgresql", "postgresql+psycopg", "postgresql+psycopg2")
    return {name: value for name, value in _BOUNDED.items() if name not in url.query} if bounded else {}


def _durable(connection: Any, _: object) -> None:
    write_ahead(connection, wait_seconds=_BUSY_SECONDS)
    cursor = connection.cursor()
    for pragma in ("synchronous = FULL", "foreign_keys = ON"):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


def _touch(file: Path) -> None:
    try:
        os.close(os.open(file, os.O_RDWR | os.O_CREAT, 0o600))
    except OSError as error:
        raise EnvironmentProblem(
            "FS-1830",
            f"the aggregator's database {file} fails ({error.strerror})",
            expected="a database that can be reached and written",
            cure="mend the permissions of the state folder, or name another one",
        ) from error


__all__ = [
    "AttemptRow",
    "Base",
    "Database",
    "RunRow",
    "TransitionRow",
    "bring_up_to_date",
    "migrations",
    "open_database",
]
