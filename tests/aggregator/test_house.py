"""Several runs behind one port: each site comes to the run it means, and the runs do not know of each other."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from federation_world import World

from fedsecure.aggregator.database import Database
from fedsecure.aggregator.house import House
from fedsecure.aggregator.program import serve
from fedsecure.aggregator.store import begin, runs_of, unfinished
from fedsecure.config import FederationConfig
from fedsecure.errors import ConfigError, RunError
from fedsecure.transport.memory import MemoryTransport
from fedsecure.wire import federation_pb2 as pb


def second(world: World) -> House:
    """A house of the world's run and another one with the same sites."""
    from fedsecure.aggregator.coordinator import Coordinator

    core = world.coordinator
    method = core.config.method.model_copy(update={"rounds": 2})
    config = core.config.model_copy(update={"name": "other", "method": method})
    store = begin(world.database, config, bytes(range(16)))
    return House([core, Coordinator(config, core._identity, store=store, now=time.monotonic())])


def test_two_runs_at_once_with_the_same_sites(tmp_path: Path) -> None:
    world = World(tmp_path, rounds=3, max_epsilon=20.0)
    world.start()
    house = second(world)
    first, other = house.runs

    def take_part(site: str, name: str) -> None:
        changes = {"federation": name, "state": tmp_path / site / name}
        transport = MemoryTransport(house, site, world.gate)
        with world.client(site, transport=transport, changes=changes) as client:
            client.run()

    pairs = [(site, name) for site in world.names for name in ("world", "other")]
    world.run(*(lambda pair=pair: take_part(*pair) for pair in pairs))
    assert not world.errors, world.errors
    assert first.outcome is not None
    assert other.outcome is not None
    assert (first.outcome["rounds"], other.outcome["rounds"]) == (3, 2)
    assert first.outcome["run"] != other.outcome["run"]
    assert house.finished(1e9)


def test_a_site_says_which_run_it_means(tmp_path: Path) -> None:
    world = World(tmp_path)
    core = world.start()
    house = second(world)

    def join(federation: str, token: bytes) -> bytes:
        request = pb.JoinRequest(
            protocol=1, session=token, roster_hash=core._identity.roster.hash, federation=federation
        )
        return bytes(house.join("site-1", request, 0.0).run)

    assert join("world", b"a" * 16) == core.run
    assert join("other", b"b" * 16) == bytes(range(16))
    for unknown in ("", "third"):
        with pytest.raises(RunError, match="FS-1736"):
            join(unknown, b"c" * 16)
    # Each token speaks to its own run, and one that is nobody's to none.
    house.beat("site-1", b"a" * 16, 0.0, "FS-1720")
    assert house.runs[0].sessions.leaving("site-1")
    assert not house.runs[1].sessions.leaving("site-1")
    with pytest.raises(RunError, match="FS-1705"):
        house.beat("site-1", b"z" * 16, 0.0)


def ended(config: FederationConfig, outcome: dict[str, object]) -> None:
    """Puts it into the database that the file's run is over, as a process before would have."""
    database = Database("", config.state)
    store = unfinished(database, config) or begin(database, config, bytes(range(16)))
    store.end({**outcome, "run": store.run.hex()}, round=1, attempt=0)
    database.close()


def test_a_run_that_is_over_is_not_begun_anew_while_another_goes_on(tmp_path: Path) -> None:
    world = World(tmp_path, waits={"start_seconds": 0.2, "phase_seconds": 0.2})
    waits = world.start().config.model_copy(update={"listen": "127.0.0.1:0"})
    world.database.close()
    over = waits.model_copy(update={"name": "over"})
    ended(over, {"complete": False, "code": "FS-1702", "error": "FS-1702: too many failed. Expected x. Cure: y"})
    runs: list[bytes] = []

    def serve_both() -> RunError:
        with pytest.raises(RunError) as caught:
            serve([over, waits], announce=lambda _, run: runs.append(run), watch=lambda _: None)
        return caught.value

    for _ in range(2):
        failure = serve_both()
        assert (failure.code, failure.final) == ("FS-1701", False), "the same command goes on with the one that waits"
    assert runs[:2] == runs[2:]
    assert runs[0] == bytes(range(16))

    ended(waits, {"complete": True})
    failure = serve_both()
    assert (failure.code, failure.found, failure.final) == ("FS-1702", "too many failed", True)
    assert runs[4:] == runs[:2]
    database = Database("", waits.state)
    assert [row.closed for row in runs_of(database)] == [True, True]
    database.close()


def test_a_run_that_is_over_and_not_closed_asks_for_its_settings(tmp_path: Path) -> None:
    world = World(tmp_path)
    config = world.start().config
    ended(config, {"complete": True})
    method = config.method.model_copy(update={"rounds": 9})
    with pytest.raises(RunError, match="FS-1732.*over but not closed.*start it once"):
        unfinished(world.database, config.model_copy(update={"method": method}))


def test_files_that_cannot_be_served_together(tmp_path: Path) -> None:
    world = World(tmp_path)
    config = world.start().config
    config = config.model_copy(update={"metrics": "127.0.0.1:9464"})
    apart = {"name": "b", "metrics": ""}
    for changes, named in (
        ({"metrics": ""}, "the names"),
        ({**apart, "listen": "127.0.0.1:1"}, "address"),
        ({**apart, "identity": tmp_path}, "identity"),
        ({"name": "b"}, "the metrics addresses"),
    ):
        with pytest.raises(ConfigError, match=f"FS-1022.*{named}"):
            serve([config, config.model_copy(update=changes)], announce=lambda *_: None, watch=lambda _: None)
