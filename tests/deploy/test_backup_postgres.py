"""Backup and restore with a real PostgreSQL, started for the test, where one is installed."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from federation_world import World
from test_backup import federation_toml, script

from fedsecure.aggregator.database import Database
from fedsecure.aggregator.schedule import Progress
from fedsecure.aggregator.store import begin, unfinished
from fedsecure.methods.base import ServerState

_PLACES = [*map(str, sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)), os.environ.get("PATH", "")]
INITDB = shutil.which("initdb", path=os.pathsep.join(_PLACES))
# PostgreSQL does not run as root.
AS = ["runuser", "-u", "postgres", "--"] if os.geteuid() == 0 else []
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(INITDB is None or shutil.which("pg_dump") is None, reason="PostgreSQL is not installed"),
]


@pytest.fixture
def server() -> Iterator[str]:
    """The folder of the socket of an empty PostgreSQL with the databases ``one`` and ``two``."""
    assert INITDB is not None
    home = Path(tempfile.mkdtemp(prefix="fedsecure-postgres-"))
    if AS:
        shutil.chown(home, "postgres")
    programs = Path(INITDB).parent

    def run(program: str, *arguments: str) -> None:
        command = [*AS, str(programs / program), *arguments]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stdin=subprocess.DEVNULL, timeout=240, cwd="/")

    run("initdb", "-D", f"{home}/data", "-A", "trust", "-U", "postgres", "--no-sync")
    try:
        run(
            "pg_ctl",
            "-D",
            f"{home}/data",
            "-w",
            "-l",
            f"{home}/log",
            "-o",
            f"-k {home} -c listen_addresses=''",
            "start",
        )
        for name in ("one", "two"):
            run("createdb", "-h", str(home), "-U", "postgres", name)
        yield str(home)
    finally:
        run("pg_ctl", "-D", f"{home}/data", "-m", "immediate", "stop")
        shutil.rmtree(home)


def test_a_run_in_postgresql_is_taken_up_from_its_backup(tmp_path: Path, server: str) -> None:
    world = World(tmp_path)
    config = world.start().config
    world.database.close()
    (config.state / "aggregator.db").unlink()
    url, other = (f"postgresql+psycopg://postgres@/{name}?host={server}" for name in ("one", "two"))
    database = Database(url, config.state)
    store = begin(database, config, bytes(range(16)))
    tensors = {"w": np.arange(3.0)}
    store.computed(Progress("training", ServerState(1, tensors, {}), {}), round=2)
    here = federation_toml(tmp_path / "here.toml", config.state, config.identity)
    there = federation_toml(tmp_path / "there.toml", tmp_path / "there", config.identity)

    made = script("backup.sh", here, tmp_path / "backup", FEDSECURE_DATABASE=url)
    assert made.returncode == 0, made.stderr
    assert (tmp_path / "backup" / "aggregator.pgdump").exists()
    done = script("restore.sh", tmp_path / "backup", there, FEDSECURE_DATABASE=other)
    assert done.returncode == 0, done.stderr
    restored = Database(other, tmp_path / "there")
    found = unfinished(restored, config.model_copy(update={"state": tmp_path / "there"}))
    assert found is not None
    assert found.run == bytes(range(16))
    standing = found.take_up()
    assert standing.round == 2
    assert standing.progress is not None
    np.testing.assert_array_equal(standing.progress.state.tensors["w"], tensors["w"])
    restored.close()
    database.close()

    empty = federation_toml(tmp_path / "empty.toml", tmp_path / "empty", config.identity)
    refused = script("restore.sh", tmp_path / "backup", empty, FEDSECURE_DATABASE=other)
    assert refused.returncode == 1
    assert "nothing is overwritten" in refused.stderr
