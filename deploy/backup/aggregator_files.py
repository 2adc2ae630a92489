"""What ``backup.sh`` and ``restore.sh`` copy: the aggregator's database, the models that its rows name, its records.

    aggregator_files.py copy FEDERATION_TOML FOLDER [--with-identity]
    aggregator_files.py put FOLDER FEDERATION_TOML [--with-identity]

Needs Python 3.11 and nothing else; for PostgreSQL ``pg_dump``, ``pg_restore`` and ``psql``. Passwords go to them in the
environment, where other users of the machine do not see them.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import sqlite3
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from urllib.parse import parse_qsl, unquote, urlsplit

ROWS = "SELECT id, model, model_hash FROM runs WHERE model <> '' ORDER BY id"
# The database is copied by its own means, the models by the rows; the rest is of the process that ran.
NOT_COPIED = {"lock", "address", "aggregator.db", "aggregator.db-journal", "aggregator.db-wal", "aggregator.db-shm"}
DUMP = "aggregator.pgdump"
TRIES = 20
Rows = list[tuple[str, str, str]]


class Refused(Exception):
    """What stands in the way, and what to do."""


class Places:
    """Where an aggregator keeps things, as its file and the environment say."""

    def __init__(self, config: Path) -> None:
        try:
            raw = tomllib.loads(config.read_text(encoding="utf-8"))
            self.state, self.identity = (config.parent / str(raw[key]) for key in ("state", "identity"))
        except (OSError, ValueError, KeyError) as error:
            raise Refused(f"{config} is no federation.toml that can be read: {error!r}") from error
        self.url = os.environ.get("FEDSECURE_DATABASE", str(raw.get("database", "")))
        if self.url and not self.url.startswith(("postgresql:", "postgresql+")):
            raise Refused("only SQLite in the state folder and PostgreSQL are known here: copy this database yourself")

    def postgres(self, *command: str) -> str:
        """Run a program of PostgreSQL on this database; its output."""
        parts = urlsplit(self.url)
        given = {
            "PGHOST": parts.hostname,
            "PGPORT": str(parts.port or ""),
            "PGUSER": unquote(parts.username or ""),
            "PGPASSWORD": unquote(parts.password or ""),
            "PGDATABASE": unquote(parts.path.lstrip("/")),
            **{f"PG{key.upper()}": value for key, value in parse_qsl(parts.query)},
        }
        environment = {**os.environ, **{key: value for key, value in given.items() if value}}
        try:
            done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True)
        except OSError as error:
            raise Refused(f"{command[0]} cannot be run ({error.strerror}): install PostgreSQL's client") from error
        if done.returncode:
            raise Refused(f"{command[0]} failed, see above")
        return done.stdout

    def rows(self) -> Rows:
        """The live PostgreSQL's runs with a model."""
        lines = self.postgres("psql", "--no-psqlrc", "--tuples-only", "--no-align", "--field-separator= ", "-c", ROWS)
        return [(run, model, digest) for run, model, digest in (line.split() for line in lines.splitlines() if line)]


def copy(places: Places, folder: Path, *, with_identity: bool) -> None:
    """Copy an aggregator that may be running, so that database and models belong to one moment."""
    for _ in range(TRIES):
        rows = _copy_postgres(places, folder) if places.url else _copy_sqlite(places, folder)
        if rows is not None and _copy_models(places.state, folder / "state", rows):
            break
    else:
        raise Refused(f"the run's model changed faster than it could be copied, {TRIES} times: pause the run meanwhile")
    for file in _others(places.state):
        _copy_file(file, folder / "state" / file.relative_to(places.state))
    if with_identity:
        for file in sorted(places.identity.iterdir()):
            _copy_file(file, folder / "identity" / file.name)


def put(folder: Path, places: Places, *, with_identity: bool) -> None:
    """Put a backup where there is nothing yet; the database comes last, as in ``RunStore``."""
    if (folder / DUMP).exists() != bool(places.url):
        raise Refused("the backup is of SQLite and federation.toml names PostgreSQL, or the other way round")
    places.state.mkdir(mode=0o700, parents=True, exist_ok=True)
    with _lock(places.state):
        held = [name for name in ("aggregator.db", "runs") if (places.state / name).exists()]
        if held:
            raise Refused(
                f"{places.state} has {' and '.join(held)} already: move the folder away, nothing is overwritten"
            )
        if places.url and places.postgres("psql", "-XAtc", "SELECT to_regclass('runs')").strip():
            raise Refused("the database has tables already: name an empty one, nothing is overwritten")
        if with_identity:
            if places.identity.exists():
                raise Refused(f"{places.identity} is there already: nothing is overwritten")
            for file in sorted((folder / "identity").iterdir()):
                _copy_file(file, places.identity / file.name)
        draft = places.state / ".restoring"
        shutil.rmtree(draft, ignore_errors=True)
        for file in sorted(path for path in (folder / "state").rglob("*") if path.is_file()):
            _copy_file(file, draft / file.relative_to(folder / "state"))
        if not places.url:
            _copy_file(folder / "aggregator.db", draft / "aggregator.db")
        draft.mkdir(mode=0o700, exist_ok=True)
        for path in sorted(draft.iterdir(), key=lambda path: path.name == "aggregator.db"):
            path.replace(places.state / path.name)
        draft.rmdir()
        if places.url:
            options = ("--exit-on-error", "--single-transaction", "--no-owner", "--no-privileges")
            database = unquote(urlsplit(places.url).path.lstrip("/"))
            places.postgres("pg_restore", *options, f"--dbname={database}", str(folder / DUMP))


def _copy_sqlite(places: Places, folder: Path) -> Rows:
    source = places.state / "aggregator.db"
    if not source.is_file():
        raise Refused(f"{source} is not there: nothing has been run")
    target = folder / "aggregator.db"
    target.unlink(missing_ok=True)
    target.touch(mode=0o600)
    with closing(sqlite3.connect(source, timeout=60)) as live, closing(sqlite3.connect(target)) as copied:
        live.backup(copied)
        (said,) = copied.execute("PRAGMA integrity_check").fetchone()
        if said != "ok":
            raise Refused(f"the copy of {source} is damaged ({said}): so is the original, or this disk")
        return list(copied.execute(ROWS))


def _copy_postgres(places: Places, folder: Path) -> Rows | None:
    """The rows of the dump; None where they changed meanwhile."""
    before = places.rows()
    target = folder / DUMP
    target.unlink(missing_ok=True)
    places.postgres("pg_dump", "--format=custom", f"--file={target}")
    return before if places.rows() == before else None


def _copy_models(state: Path, target: Path, rows: Rows) -> bool:
    """Whether every model that the rows name was there, with the bytes that they name."""
    for run, name, digest in rows:
        file, copied = state / "runs" / run / name, target / "runs" / run / name
        try:
            _copy_file(file, copied)
        except FileNotFoundError:
            return False  # the next sum has replaced it
        with copied.open("rb") as read:
            if hashlib.file_digest(read, "sha256").hexdigest() != digest:
                raise Refused(f"{file} is not what the database says was written: it cannot be taken up (FS-1731)")
    named = {target / "runs" / run / name for run, name, _ in rows}
    for left in set(target.rglob("model-*.safetensors")) - named:
        left.unlink()  # of an earlier try
    return True


def _others(state: Path) -> Iterator[Path]:
    for file in sorted(state.rglob("*")):
        parts = file.relative_to(state).parts
        temporary = "spool" in parts or file.name.startswith(".") or file.name.endswith(".part")
        model = parts[0] == "runs" and file.match("model-*.safetensors")
        if file.is_file() and not file.is_symlink() and not temporary and not model and parts[0] not in NOT_COPIED:
            yield file


def _copy_file(source: Path, target: Path) -> None:
    target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with (
        source.open("rb") as read,
        os.fdopen(os.open(target, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as out,
    ):
        shutil.copyfileobj(read, out)
        out.flush()
        os.fsync(out.fileno())


@contextmanager
def _lock(state: Path) -> Iterator[None]:
    descriptor = os.open(state / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError as error:
        raise Refused(f"an aggregator uses {state}: stop it first") from error
    finally:
        os.close(descriptor)


def main(arguments: list[str]) -> None:
    with_identity = "--with-identity" in arguments
    what, one, other = (word for word in arguments if word != "--with-identity")
    if what == "copy":
        copy(Places(Path(one)), Path(other), with_identity=with_identity)
    else:
        put(Path(one), Places(Path(other)), with_identity=with_identity)


if __name__ == "__main__":
    os.umask(0o077)
    try:
        main(sys.argv[1:])
    except (Refused, OSError, sqlite3.Error) as refused:
        sys.exit(f"{Path(sys.argv[0]).name}: {refused}")
