"""Bad input in whole runs: one error with its code, nothing trained, and the ledger as it was.

Three sites have the same trouble and wait for each other before they meet it, so that none sees another leave first.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import threading
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from federation_world import World

from fedsecure.client import Client
from fedsecure.config import DatasetConfig, PolicyConfig
from fedsecure.errors import ConfigError, LedgerError, PrivacyError, RunError
from fedsecure.messages import Event
from fedsecure.privacy import ledger_store
from fedsecure.privacy.accounting import calibrate
from fedsecure.privacy.ledger import Ledger
from fedsecure.site import sources
from fedsecure.transport.memory import MemoryTransport
from fedsecure.wire import federation_pb2 as pb

EVENT = Event("train", "training", 8.0, 8.0)


class Listener(MemoryTransport):
    """Counts uploads, and may pass on other settings than the aggregator's."""

    uploads = 0
    settings = ""

    def join(self, request: pb.JoinRequest) -> pb.JoinReply:
        reply = super().join(request)
        return pb.JoinReply(protocol=reply.protocol, run=reply.run, settings_json=self.settings or reply.settings_json)

    def upload(self, header: pb.UploadHeader, payload: memoryview) -> None:
        self.uploads += 1
        super().upload(header, payload)


@pytest.fixture
def world(tmp_path: Path) -> World:
    """Without evaluation: the first question is to train."""
    made = World(tmp_path, rounds=1)
    entries = {n: e.model_copy(update={"evaluation_units": 0}) for n, e in made.settings.sites.items()}
    made.settings = made.settings.model_copy(update={"sites": entries})
    return made


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the data sets whose records were read."""
    names: list[str] = []
    real = sources.load_units

    def counted(dataset: Any, *arguments: Any, **options: Any) -> Any:
        names.append(dataset.name)
        return real(dataset, *arguments, **options)

    monkeypatch.setattr(sources, "load_units", counted)
    return names


@pytest.fixture
def together(monkeypatch: pytest.MonkeyPatch) -> None:
    """No site comes to its door before the others are there."""
    real, barrier = sources.Sources.door, threading.Barrier(3)

    def door(site: sources.Sources, *arguments: Any, **options: Any) -> Any:
        barrier.wait(60.0)
        return real(site, *arguments, **options)

    monkeypatch.setattr(sources.Sources, "door", door)


def charge(ledger: Ledger, name: str, *, units: Any = None, run: str = "f" * 32, event: Event = EVENT) -> None:
    ledger.reserve(
        dataset=f"{name}-train", population="train", events=(event,), run=run, round=0, attempt=0,
        query_digest=bytes(32), limit_epsilon=100.0, delta=1e-5, units=units,
    )  # fmt: skip


def rows(world: World) -> dict[str, list[str]]:
    """Hashes of every row of every site's ledger, after a check of the chain."""
    found = {}
    for name in world.names:
        with Ledger(world.folder / name / "ledger.db") as ledger:
            ledger.verify()
            found[name] = [entry.hash for entry in ledger.history()]
    return found


def stopped_with(
    code: str,
    world: World,
    *,
    changes: Callable[[str], dict[str, Any]] = lambda name: {},
    joined: Callable[[Client, str], None] = lambda client, name: None,
) -> None:
    """Run all sites: each ends with ``code``, uploads nothing, and leaves its ledger as it was once it had joined."""
    world.start()
    lines = {name: Listener(world.coordinator, name, world.gate) for name in world.names}
    heads: dict[str, Any] = {}

    def part(name: str) -> Callable[[], None]:
        def take() -> None:
            with world.client(name, transport=lines[name], changes=changes(name)) as client:
                joined(client, name)
                heads[name] = client.ledger.head()
                client.run()

        return take

    world.run(*map(part, world.names))
    codes = {getattr(error, "code", repr(error)) for error in world.errors.values()}
    assert (codes, len(world.errors)) == ({code}, 3), world.errors
    assert not any(line.uploads for line in lines.values())
    for name, head in heads.items():
        with Ledger(world.folder / name / "ledger.db") as ledger:
            ledger.verify()
            assert ledger.head() == head


# --- what the settings say --------------------------------------------------------------------------------------------


def test_a_delta_of_one_over_the_units_starts_no_run(tmp_path: Path) -> None:
    with pytest.raises(PrivacyError, match="FS-1203"):
        World(tmp_path, privacy={"delta": 1 / 30}).start()


@pytest.mark.parametrize("change", [{"delta": 1 / 30}, {"target_epsilon": 0.0}, {"target_epsilon": -1.0}], ids=str)
def test_a_site_believes_no_aggregator_that_says_so(world: World, read: list[str], change: dict[str, float]) -> None:
    world.start()
    line = Listener(world.coordinator, "site-1", world.gate)
    privacy = world.settings.privacy.model_copy(update=change)
    line.settings = world.settings.model_copy(update={"privacy": privacy}).canonical()
    with pytest.raises((PrivacyError, ConfigError)) as caught, world.client("site-1", transport=line):
        pass
    assert caught.value.code == ("FS-1203" if "delta" in change else "FS-1008")
    assert rows(world)["site-1"] == read == []


# --- what the data are ------------------------------------------------------------------------------------------------


def manifest(world: World, *lines: str) -> Callable[[str], dict[str, Any]]:
    """Each site's training set is a table of images, and patients pay."""
    privacy = world.settings.privacy.model_copy(update={"unit": "patient", "max_records_per_unit": 4})
    world.settings = world.settings.model_copy(update={"privacy": privacy})
    (world.folder / "1.png").touch()
    (world.folder / "2.png").touch()
    (world.folder / "scans.csv").write_text("\n".join(lines))
    return lambda name: {"train": DatasetConfig(name=f"{name}-train", path=world.folder / "scans.csv")}


def test_an_unknown_unit_column(world: World, read: list[str], together: None) -> None:
    stopped_with("FS-1246", world, changes=manifest(world, "file,label,subject", "1.png,a,P1", "2.png,b,P2"))
    assert read == []


def test_a_patient_without_images(world: World, read: list[str], together: None) -> None:
    stopped_with("FS-1113", world, changes=manifest(world, "file,label,patient", "1.png,a,P1", ",b,P2"))
    assert read == []


def test_a_changed_data_set_under_the_same_name(world: World, read: list[str], together: None) -> None:
    """None of the units that were charged under the name is in it any more."""

    def joined(client: Client, name: str) -> None:
        charge(client.ledger, name, units=client.ledger.hash_units(["patient/of another study"]))

    stopped_with("FS-1265", world, joined=joined)
    assert read == []


def nearly_spent(client: Client, *, units: Any) -> None:
    """A charge under another name that leaves no room for the run."""
    z = calibrate(0.999 * client.config.policy.max_epsilon, client.config.policy.delta, steps=1)
    charge(client.ledger, "another", units=units, event=Event("train", "training", z, z))


@pytest.mark.parametrize("evaluated", [False, True])
def test_records_that_have_paid_under_another_name(
    tmp_path: Path, world: World, read: list[str], together: None, evaluated: bool
) -> None:
    """What is left is too little for the whole run, which is seen before its first charge, of an evaluation too."""
    if evaluated:
        folder = tmp_path / "evaluated"
        folder.mkdir()
        world = World(folder, rounds=1, public_evaluation=False)

    def joined(client: Client, name: str) -> None:
        assert client.config.train is not None
        nearly_spent(client, units=client._sources._hasher("train", client.config.train, None)())

    stopped_with("FS-1201", world, joined=joined)
    assert read == []


def test_evaluations_that_do_not_fit_are_seen_when_joining(tmp_path: Path, read: list[str]) -> None:
    world = World(tmp_path, rounds=1, public_evaluation=False)
    world.start()
    policy = PolicyConfig(max_epsilon=8.0, unit="record", max_evaluation_epsilon=0.5)
    with pytest.raises(PrivacyError, match="FS-1201"), world.client("site-1", changes={"policy": policy}):
        pass
    assert rows(world)["site-1"] == read == []


@pytest.mark.parametrize("private", [False, True], ids=["training", "evaluation"])
def test_a_site_whose_own_delta_gives_units_away(tmp_path: Path, read: list[str], private: bool) -> None:
    world = World(tmp_path, rounds=1, public_evaluation=not private)
    if private:
        entries = {n: e.model_copy(update={"evaluation_units": 500}) for n, e in world.settings.sites.items()}
        world.settings = world.settings.model_copy(update={"sites": entries})
    world.start()
    policy = PolicyConfig(
        max_epsilon=8.0, unit="record", max_evaluation_epsilon=8.0, delta=1 / (500 if private else 30)
    )
    with pytest.raises(PrivacyError, match="FS-1273"), world.client("site-1", changes={"policy": policy}):
        pass
    assert rows(world)["site-1"] == read == []


# --- where the ledger lies --------------------------------------------------------------------------------------------


def test_a_full_disk_in_the_middle_of_a_run(
    world: World, read: list[str], together: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The units' set is written, and then no row goes in any more; tests of the ledger fill a real one."""

    def full(*arguments: Any, **values: Any) -> None:
        error = sqlite3.OperationalError("database or disk is full")
        error.sqlite_errorname = "SQLITE_FULL"
        raise error

    monkeypatch.setattr(Ledger, "_append", full)
    stopped_with("FS-1255", world)
    assert read == []


def unopened(world: World, read: list[str], code: str) -> None:
    """Site 1 does not even join; what its ledger holds stays, byte by byte."""
    world.start()
    file = world.folder / "site-1" / "ledger.db"
    before = file.read_bytes()
    with pytest.raises(LedgerError, match=code), world.client("site-1"):
        pass
    assert file.read_bytes() == before
    assert read == []
    assert "site-1" in world.coordinator.reason(0.0), "the aggregator still waits for it"


@pytest.fixture
def charged(world: World) -> Path:
    """Site 1's ledger, closed, with one charge."""
    file = world.folder / "site-1" / "ledger.db"
    world.site_config("site-1")
    with Ledger(file) as ledger:
        charge(ledger, "site-1")
    return file


def test_a_ledger_of_a_newer_release(world: World, read: list[str], charged: Path) -> None:
    with contextlib.closing(sqlite3.connect(charged)) as db:
        db.execute("PRAGMA user_version = 99")
    unopened(world, read, r"FS-1253.*format 99")


def test_a_read_only_ledger(world: World, read: list[str], charged: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.open

    def refuse(name: Any, *rest: int) -> int:
        if name == charged:
            raise PermissionError(30, "Read-only file system")
        return real(name, *rest)

    monkeypatch.setattr(os, "open", refuse)
    unopened(world, read, r"FS-1251.*Read-only")


def test_a_ledger_that_somebody_edited(world: World, read: list[str], charged: Path) -> None:
    raw = charged.read_bytes()
    charged.write_bytes(raw.replace(b"site-1-train", b"site-9-train"))
    unopened(world, read, "FS-1256")


def test_a_clock_that_went_back(world: World, read: list[str], charged: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger_store, "utc_now", lambda: datetime(1970, 1, 1, tzinfo=UTC))
    world.start()
    before = rows(world)
    with pytest.raises(LedgerError, match=r"FS-1270.*1970"), world.client("site-1"):
        pass
    assert (rows(world), read) == (before, [])


# --- two processes at once --------------------------------------------------------------------------------------------


def test_a_second_process_of_a_site(world: World, read: list[str]) -> None:
    world.start()
    with world.client("site-1"), pytest.raises(RunError, match="FS-1703"), world.client("site-1"):
        pass
    assert rows(world)["site-1"] == read == []


def test_a_budget_that_another_run_spends_meanwhile(world: World, read: list[str], together: None) -> None:
    """It was enough when the site joined: the charge, and not the look before, decides."""

    def joined(client: Client, name: str) -> None:
        with Ledger(client.config.ledger) as elsewhere:
            charge(elsewhere, name, event=Event("train", "training", 0.7, 0.7))

    stopped_with("FS-1201", world, joined=joined)
    assert read == []


def test_the_same_runs_go_through_without_the_trouble(world: World, read: list[str], together: None) -> None:
    """The positive control."""
    world.start()
    world.run(*(world.take_part(name) for name in world.names))
    assert not world.errors
    assert sorted(read) == [f"{name}-train" for name in world.names]
    assert all(len(found) == 2 for found in rows(world).values())
