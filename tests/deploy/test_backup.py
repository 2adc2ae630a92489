"""Backup and restore of an aggregator: of a running one, whole or not at all, and never over anything."""

from __future__ import annotations

import os
import re
import shutil
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from federation_world import World

from fedsecure.aggregator.coordinator import Coordinator
from fedsecure.aggregator.database import Database
from fedsecure.aggregator.program import only_one
from fedsecure.aggregator.states import RunState
from fedsecure.aggregator.store import unfinished
from fedsecure.identity.provision import load_identity
from fedsecure.privacy.ledger import Ledger
from fedsecure.transport.memory import MemoryTransport

SCRIPTS = Path(__file__).resolve().parents[2] / "deploy" / "backup"


def script(name: str, *arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = ["sh", str(SCRIPTS / name), *map(str, arguments)]
    outside = {key: value for key, value in os.environ.items() if key != "FEDSECURE_DATABASE"}
    return subprocess.run(
        command, capture_output=True, text=True, timeout=240, env={**outside, "PYTHON": sys.executable, **environment}
    )


def federation_toml(file: Path, state: Path, identity: Path) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(f'state = "{state}"\nidentity = "{identity}"\n')
    return file


class Following(MemoryTransport):
    """A site's line to whatever coordinator the world has at the moment."""

    def __init__(self, world: World, site: str) -> None:
        self._world = world
        super().__init__(world.coordinator, site, world.gate)

    @property
    def _core(self) -> Coordinator:
        return self._world.coordinator

    @_core.setter
    def _core(self, _: Coordinator) -> None: ...


def take_up(world: World, state: Path) -> Coordinator:
    """Another process' coordinator on a state folder, with the same settings."""
    config = world.coordinator.config.model_copy(update={"state": state})
    database = Database("", state)
    store = unfinished(database, config)
    assert store is not None
    core = Coordinator(config, load_identity(config.identity), store=store, now=time.monotonic())
    world.restored = database  # type: ignore[attr-defined]
    return core


@pytest.fixture
def files(tmp_path: Path) -> Callable[[Path], tuple[Path, Path]]:
    """``federation.toml`` of the running aggregator, and of the one to be restored."""

    def make(state: Path) -> tuple[Path, Path]:
        identity = tmp_path / "keys" / "aggregator" / "identity"
        here = federation_toml(tmp_path / "here" / "federation.toml", state, identity)
        return here, federation_toml(
            tmp_path / "there" / "federation.toml", tmp_path / "there" / "state", tmp_path / "there" / "identity"
        )

    return make


def test_a_running_aggregator_is_backed_up_and_its_run_goes_on_elsewhere(tmp_path: Path, files: Any) -> None:
    world = World(tmp_path, rounds=4)
    run = world.start().run
    here, there = files(world.coordinator.config.state)

    def move() -> None:
        while world.coordinator.engine.account.round < 3:
            time.sleep(0.01)
        with world.gate:
            with only_one(world.coordinator.config.state):
                made = script("backup.sh", here, tmp_path / "backup")
                assert made.returncode == 0, made.stderr
            world.database.close()
            done = script("restore.sh", tmp_path / "backup", there)
            assert done.returncode == 0, done.stderr
            world.coordinator = take_up(world, tmp_path / "there" / "state")
            world.gate.notify_all()

    world.run(move, *(world.take_part(name, transport=Following(world, name)) for name in world.names))
    assert not world.errors, world.errors
    assert world.coordinator.run == run
    outcome = world.coordinator.outcome
    assert outcome is not None
    assert outcome["complete"]
    summed = [(a["round"], a["stage"]) for a in outcome["attempts"] if "survivors" in a]
    assert summed == [(0, "before"), *((n, "training") for n in range(1, 5)), (5, "after")], "each round once"
    world.restored.close()  # type: ignore[attr-defined]


@pytest.mark.slow
def test_what_was_asked_after_a_backup_is_not_answered_again(tmp_path: Path, files: Any) -> None:
    """An older backup is an aggregator set back: it asks what its sites have answered already."""
    world = World(tmp_path, rounds=30)
    world.start()
    here, there = files(world.coordinator.config.state)

    charged: dict[str, int] = {}

    def reached(round: int) -> None:
        while world.coordinator.engine.account.round < round:
            time.sleep(0.01)

    def set_back() -> None:
        reached(2)
        assert script("backup.sh", here, tmp_path / "backup").returncode == 0
        reached(12)
        with world.gate:
            world.coordinator.obey("pause", time.monotonic())
        while world.coordinator.engine.account.state is not RunState.PAUSED:  # no answer is under way any more
            time.sleep(0.01)
        with world.gate:
            world.database.close()
            assert script("restore.sh", tmp_path / "backup", there).returncode == 0
            world.coordinator = take_up(world, tmp_path / "there" / "state")
            assert world.coordinator.engine.account.round < 12
            for name in world.names:
                with Ledger(tmp_path / name / "ledger.db") as ledger:
                    charged[name] = len(ledger.spent(f"{name}-train", "train"))
            world.gate.notify_all()

    world.run(set_back, *(world.take_part(name, transport=Following(world, name)) for name in world.names))
    assert [getattr(error, "code", error) for error in world.errors.values()] == ["FS-1345"] * len(world.names)
    assert world.coordinator.engine.account.round < 12, "no sum came of it"
    for name in world.names:
        with Ledger(tmp_path / name / "ledger.db") as ledger:
            ledger.verify()
            assert len(ledger.spent(f"{name}-train", "train")) == charged[name], "a refusal costs nothing"
    world.restored.close()  # type: ignore[attr-defined]


@pytest.mark.slow
def test_backups_while_sums_are_saved_are_of_one_moment_each(tmp_path: Path, files: Any) -> None:
    world = World(tmp_path, rounds=30)
    world.start()
    here, _ = files(world.coordinator.config.state)
    made: list[Path] = []

    def back_up() -> None:
        while world.coordinator.engine.account.round < 2:
            time.sleep(0.01)
        while world.coordinator.outcome is None and len(made) < 8:
            folder = tmp_path / f"backup-{len(made)}"
            done = script("backup.sh", here, folder)
            assert done.returncode == 0, done.stderr
            made.append(folder)

    world.run(back_up, *(world.take_part(name) for name in world.names))
    assert not world.errors, world.errors
    assert made
    rounds = []
    for number, folder in enumerate(made):
        elsewhere = tmp_path / f"there-{number}"
        toml = federation_toml(elsewhere / "federation.toml", elsewhere / "state", elsewhere / "identity")
        assert script("restore.sh", folder, toml).returncode == 0
        rounds.append(take_up(world, elsewhere / "state").engine.account.round)
        world.restored.close()  # type: ignore[attr-defined]
    assert rounds == sorted(rounds)
    assert rounds[0] >= 2


@pytest.fixture
def backup(tmp_path: Path, files: Any) -> tuple[Path, Path, Path]:
    """A backup of a run that has been begun; both ``federation.toml``."""
    world = World(tmp_path, rounds=1)
    world.start()
    here, there = files(world.coordinator.config.state)
    state = world.coordinator.config.state
    (state / "audit.log").write_text("a line\n")
    (state / "lock").touch()
    spool = next((state / "runs").iterdir()) / "spool"
    spool.mkdir(exist_ok=True)
    (spool / "masked").write_bytes(b"masked")
    made = script("backup.sh", here, tmp_path / "backup")
    assert made.returncode == 0, made.stderr
    world.database.close()
    return tmp_path / "backup", here, there


def test_a_backup_has_no_key_and_nobody_else_can_read_it(backup: tuple[Path, Path, Path]) -> None:
    folder, _, _ = backup
    names = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert {"aggregator.db", "federation.toml", "SHA256SUMS", "state/audit.log"} <= names
    assert not [name for name in names if re.search(r"\.(key|pem)$|spool|lock|address", name)]
    for path in (folder, *folder.rglob("*")):
        assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0, path


def test_the_identity_comes_along_where_it_is_asked_for(tmp_path: Path, backup: tuple[Path, Path, Path]) -> None:
    _, here, there = backup
    folder = tmp_path / "with-keys"
    assert script("backup.sh", "--with-identity", here, folder).returncode == 0
    assert script("restore.sh", "--with-identity", folder, there).returncode == 0
    restored = load_identity(tmp_path / "there" / "identity")
    assert restored.roster == load_identity(tmp_path / "keys" / "aggregator" / "identity").roster


def test_nothing_is_overwritten(tmp_path: Path, backup: tuple[Path, Path, Path]) -> None:
    folder, here, there = backup
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    again = script("backup.sh", here, folder)
    assert again.returncode == 1
    assert "nothing is overwritten" in again.stderr
    assert script("restore.sh", folder, there).returncode == 0
    twice = script("restore.sh", folder, there)
    assert twice.returncode == 1
    assert "nothing is overwritten" in twice.stderr
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    assert not list(tmp_path.glob("*.part.*"))


def test_a_folder_that_an_aggregator_uses_is_left_alone(tmp_path: Path, backup: tuple[Path, Path, Path]) -> None:
    folder, _, there = backup
    state = tmp_path / "there" / "state"
    state.mkdir(parents=True)
    with only_one(state):
        refused = script("restore.sh", folder, there)
        assert refused.returncode == 1
        assert "an aggregator uses" in refused.stderr
        assert [path.name for path in state.iterdir()] == ["lock"]
    assert script("restore.sh", folder, there).returncode == 0


@pytest.mark.parametrize("harm", ["altered", "gone", "added", "unfinished"])
def test_a_damaged_backup_is_not_restored(tmp_path: Path, backup: tuple[Path, Path, Path], harm: str) -> None:
    folder, _, there = backup
    if harm == "altered":
        data = bytearray((folder / "aggregator.db").read_bytes())
        data[100] ^= 1
        (folder / "aggregator.db").write_bytes(data)
    elif harm == "gone":
        (folder / "state" / "audit.log").unlink()
    elif harm == "added":
        (folder / "state" / "more").touch()
    else:
        (folder / "SHA256SUMS").unlink()
    refused = script("restore.sh", folder, there)
    assert refused.returncode == 1
    assert "restore.sh" in refused.stderr
    assert not (tmp_path / "there" / "state").exists()


def test_a_model_that_cannot_be_taken_up_is_no_backup(tmp_path: Path, files: Any) -> None:
    world = World(tmp_path, rounds=1)
    world.start()
    world.run(*(world.take_part(name) for name in world.names))
    here, _ = files(world.coordinator.config.state)
    (model,) = (world.coordinator.config.state / "runs").rglob("model-*.safetensors")
    model.write_bytes(model.read_bytes()[:-1])
    refused = script("backup.sh", here, tmp_path / "backup")
    assert refused.returncode == 1
    assert "FS-1731" in refused.stderr
    model.unlink()
    refused = script("backup.sh", here, tmp_path / "backup")
    assert refused.returncode == 1
    assert "pause the run" in refused.stderr
    assert not (tmp_path / "backup").exists()


def test_the_kind_of_database_must_be_the_same(tmp_path: Path, backup: tuple[Path, Path, Path]) -> None:
    folder, here, there = backup
    refused = script("restore.sh", folder, there, FEDSECURE_DATABASE="postgresql+psycopg://u:geheim@127.0.0.1:1/x")
    assert refused.returncode == 1
    assert "PostgreSQL" in refused.stderr
    refused = script("backup.sh", here, tmp_path / "other", FEDSECURE_DATABASE="mysql://u:geheim@127.0.0.1/x")
    assert refused.returncode == 1
    refused = script("backup.sh", here, tmp_path / "other", FEDSECURE_DATABASE="postgresql://u:geheim@127.0.0.1:1/x")
    assert refused.returncode == 1
    assert "geheim" not in refused.stderr
    assert not (tmp_path / "other").exists()


def test_a_password_is_in_no_process_list(tmp_path: Path, backup: tuple[Path, Path, Path]) -> None:
    """What others of the machine can see of a program is its command line."""
    _, here, _ = backup
    program = tmp_path / "bin" / "psql"
    program.parent.mkdir()
    program.write_text(
        f'#!/bin/sh\necho "$@" >{tmp_path}/shown\necho "$PGPASSWORD $PGHOST $PGSSLMODE" >{tmp_path}/hidden\nexit 1\n'
    )
    program.chmod(0o755)
    url = "postgresql+psycopg://u:ge%2Fheim@db.example.org/x?sslmode=verify-full"
    path = f"{program.parent}:{os.environ['PATH']}"
    assert script("backup.sh", here, tmp_path / "other", FEDSECURE_DATABASE=url, PATH=path).returncode == 1
    assert "heim" not in (tmp_path / "shown").read_text()
    assert (tmp_path / "hidden").read_text() == "ge/heim db.example.org verify-full\n"


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_shellcheck_has_no_complaint() -> None:
    done = subprocess.run(["shellcheck", *SCRIPTS.glob("*.sh")], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "")
