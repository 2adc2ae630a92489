"""A federation in a simulated world: the real coordinator, clients, ledgers and latches on a network, a clock and disks
that do what a test says, step by step.

Real are the coordinator and its store, ``Client`` with line, rounds, door, ledger and latch, and all of secure
aggregation. Simulated are the transport, time, threads, and who is killed when; training is replaced by vectors that
name their sender (``basis``). The world starts what has ended again, as a service manager does.
"""

from __future__ import annotations

import logging
import os
import shutil
import sqlite3
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from unittest.mock import patch

from faults.basis import BasisVectors, Vector
from faults.baton import Process, Stage
from faults.disk import Disks, Trap, When, watched
from faults.ground import ground
from faults.network import Broken, Call, Kind, Network, Packet, SimulatedTransport
from faults.service import Host, named_commits

from fedsecure.aggregator.coordinator import Coordinator
from fedsecure.audit_log import Head
from fedsecure.client import Client, Receipt
from fedsecure.config import DatasetConfig, PolicyConfig, SiteConfig
from fedsecure.errors import FedsecureError
from fedsecure.messages import Query
from fedsecure.methods import registry
from fedsecure.privacy.ledger import Ledger, Limit

TICK_SECONDS = 1.0
RESTART_SECONDS = 3.0
_EPOCH = datetime(2026, 11, 29, tzinfo=UTC)
# How a site's process may end while faults last; anything else is a defect.
ENDINGS = {
    "FS-1250": "no room for a first ledger",
    "FS-1255": "the ledger's disk is full",
    "FS-1263": "no room for the copy of the ledger's head",
    "FS-1270": "the clock went back",
    "FS-1349": "no room for the latch",
    "FS-1460": "the certificate is revoked",
    "FS-1501": "no answer for connect_seconds",
    "FS-1703": "an earlier process of the site still counts as there",
    "FS-1709": "the run was given up",
    "FS-1711": "nothing of use for wait_seconds",
    "FS-1718": "the aggregator's disk stayed full",
    "FS-1737": "the run has ended while the site was cut off, and another one has begun",
    "FS-1802": "no room for the site's own files",
    "FS-1820": "no room for the audit log",
}
# Those for which the site's own disk has to have been full.
DISK = ("FS-1250", "FS-1255", "FS-1263", "FS-1349", "FS-1802", "FS-1820")


@dataclass(slots=True)
class SiteProcess(Process):
    """One process of a site, from its start to its end; ``ended`` is "complete" or a code."""

    transport: SimulatedTransport | None = None
    ended: str = ""
    over_at: float = 0.0


@dataclass(frozen=True, slots=True)
class Answered:
    """One answer that a method gave: from then on it has to be paid for."""

    number: int
    site: str
    run: bytes
    round: int
    attempt: int


@dataclass(frozen=True, slots=True)
class Absorbed:
    """One sum that came out at the aggregator."""

    run: bytes
    step: int
    sum: Vector
    survivors: int


@dataclass
class SimulatedWorld:
    """One federation from the first start; everything that happens is one of its methods.

    Args:
        sites, rounds, prepared: of the run: number of sites, its rounds, and rounds whose keys are set up at once.
    """

    sites: int = 4
    rounds: int = 6
    prepared: int = 0

    def __post_init__(self) -> None:
        shm = Path("/dev/shm")
        self.folder = Path(tempfile.mkdtemp(prefix="fedsecure-world-", dir=shm if os.access(shm, os.W_OK) else None))
        self.stage = Stage()
        self.network = Network()
        self.disks = Disks(self.stage, self.folder)
        # Made here: they live in the shared ground.
        registered = BasisVectors("basis", "1", "linear", local_only="it draws its own", book=self)
        registry_load = registry._load

        def load(name: str) -> Any:
            return registered if name == "basis" else registry_load(name)

        self._patches = ExitStack()
        self._patches.enter_context(patch.object(registry, "_load", load))
        # Tens of thousands of warnings about what this world does on purpose.
        self._patches.enter_context(patch.object(logging.getLogger("fedsecure"), "disabled", True))
        for name in ("aggregator", "client", "identity", "privacy.ledger", "run"):
            self._patches.enter_context(patch.object(logging.getLogger(f"fedsecure.{name}"), "disabled", True))
        self.ground = ground(self.sites, self.rounds, self.prepared)
        self.names = list(self.ground.settings.sites)
        self.heads: dict[str, Head] = {}  # of the audit logs, when they were last checked
        self.receipts: list[tuple[str, bytes, Receipt]] = []
        self.processes: dict[str, SiteProcess] = {}
        self.revoked: set[str] = set()
        self.filled: set[str] = set()  # whose disk was full at some time
        self.stopped: set[str] = set()  # sites that nobody starts again
        self.skews = dict.fromkeys(self.names, 0.0)
        self.answers: dict[int, Answered] = {}
        self.absorbed_sums: list[Absorbed] = []
        self.endings: list[tuple[str, str]] = []
        self.surprises: list[str] = []
        self.log: list[str] = []
        self.host = Host(
            self.folder / "aggregator",
            self.ground,
            self.stage,
            self.network,
            self.disks,
            self.endings,
            self.surprises,
            self.log,
        )
        self.steps = 0
        self._calls = 0
        self.healthy = False
        self._patches.enter_context(patch("fedsecure.site.line.time", self.stage.time()))
        self._patches.enter_context(patch("fedsecure.site.line.threading", self.stage.threading()))
        self._patches.enter_context(patch("fedsecure.privacy.ledger_store.utc_now", self._utc_now))
        self._patches.enter_context(named_commits(self.disks))
        self._patches.enter_context(watched(self.disks))
        self.host.start()
        for name in self.names:
            self.start_site(name)

    @property
    def core(self) -> Coordinator | None:
        """The coordinator, while its process runs."""
        return self.host.core

    @property
    def runs(self) -> list[bytes]:
        """Ids of all runs, in order."""
        return self.host.runs

    # --- time and steps -----------------------------------------------------------------------------------------------

    def step(self) -> None:
        """The next thing that would happen without faults: a thread goes on, a packet arrives, or time passes."""
        ready = self.stage.ready()
        if ready:
            self._resume(ready[0])
            return
        packets = self.network.deliverable(self.stage.now)
        if packets:
            self.deliver(packets[0])
            return
        self.pass_time()

    def pass_time(self, seconds: float | None = None) -> None:
        """Time goes by: so many seconds, or until something is due, one second at most."""
        self.steps += 1
        now = self.stage.now
        if seconds is None:
            due = [now + TICK_SECONDS, *(call.waits_until for call in self.host.parked)]
            due += [t for t in (self.stage.next_time(), self.network.next_time(now)) if t is not None]
            seconds = max(0.0, min(due) - now)
        self.stage.now = now + seconds
        self.host.pass_time()
        self._supervise()

    def _resume(self, actor: Any) -> None:
        self.steps += 1
        self.log.append(f"run {actor.process.name} {actor.name}")
        self._go(actor, None)

    def _go(self, actor: Any, outcome: Any) -> None:
        process = actor.process
        self.stage.resume(actor, outcome)
        if process.dead and not process.ended:
            self._bury(process)
        self.host.look()

    # --- the network --------------------------------------------------------------------------------------------------

    def call(self, process: SiteProcess, kind: Kind, request: Any, payload: bytes) -> Any:
        """From a site's thread: send a request and wait for what comes of it."""
        actor = self.stage.current
        assert actor is not None
        call = Call(self.next_call(), kind, process, actor, request, payload)
        self.network.packets.append(Packet("request", call, self.stage.now))
        return actor.block()

    def next_call(self) -> int:
        """A number never given out before."""
        self._calls += 1
        return self._calls

    def hung_up(self, process: SiteProcess) -> None:
        """A site closes its connection: what it waits for breaks off."""
        self.host.break_line(process)

    def deliver(self, packet: Packet) -> None:
        """A packet arrives."""
        self.steps += 1
        self.log.append(f"deliver {packet}")
        self.network.packets.remove(packet)
        call = packet.call
        if packet.what == "reply":
            if not call.over and not call.actor.done:
                call.over = True
                self._go(call.actor, packet.reply)
            return
        if self.core is None:
            self.network.reply(call, self.stage.now, Broken())
        elif packet.what == "body":
            self.host.body(call)
        else:
            self.host.serve(call)
        self.host.tick()

    def lose(self, packet: Packet) -> None:
        """The connection that carries a packet breaks, and with it the call."""
        self.steps += 1
        self.log.append(f"lose {packet}")
        self.network.packets.remove(packet)
        if packet.what == "body":
            self.host.uploading.discard(packet.call.site)
        self.network.reply(packet.call, self.stage.now, Broken())

    def copy(self, packet: Packet, *, delay: float) -> None:
        """A request arrives twice, the second time later."""
        self.steps += 1
        self.log.append(f"copy {packet} {delay}")
        call = packet.call
        twin = Call(call.number, call.kind, call.process, call.actor, call.request, call.payload, over=True)
        self.network.packets.append(Packet("request", twin, self.stage.now + delay))

    def hold(self, packet: Packet, *, delay: float) -> None:
        """A packet takes longer."""
        self.steps += 1
        self.log.append(f"hold {packet} {delay}")
        packet.earliest = max(packet.earliest, self.stage.now + delay)

    # --- processes ----------------------------------------------------------------------------------------------------

    def kill_aggregator(self) -> None:
        """kill -9."""
        self.steps += 1
        self.log.append("kill aggregator")
        self.host.end()

    def start_site(self, name: str) -> None:
        """Start a site's process, unless one is running."""
        if name in self.processes and not self.processes[name].dead:
            return
        self.log.append(f"start {name}")
        process = SiteProcess(name)
        self.processes[name] = process
        process.transport = SimulatedTransport(self, process, connect_seconds=60.0)
        self.stage.spawn(process, "main", lambda: self._take_part(process))

    def kill_site(self, name: str, *, noticed: bool = True) -> None:
        """kill -9 of a site's process; ``noticed``: its connections break, as they do unless the machine goes down."""
        self.steps += 1
        self.log.append(f"kill {name} {noticed}")
        process = self.processes[name]
        if not process.dead:
            process.dead = True
            self._bury(process, noticed=noticed)

    def _take_part(self, process: SiteProcess) -> None:
        try:
            config = self.site_config(process.name)
            identity = self.ground.identities[process.name]
            with Client(config, identity=identity, transport=process.transport) as client:
                for query in client.queries():
                    receipt = client.answer(query)
                    self.receipts.append((process.name, client.run_id, receipt))
            process.ended = "complete"
        except FedsecureError as error:
            process.ended = error.code
            full = process.name in self.filled
            if error.code not in ENDINGS or (error.code in DISK and not full):
                self.surprises.append(f"{process.name}: {error!r}")
        self._ended(process.name, process.ended)
        # Its other threads end with it.
        process.dead = True

    def _bury(self, process: SiteProcess, *, noticed: bool = True) -> None:
        process.ended = process.ended or "killed"
        process.over_at = self.stage.now
        self.disks.traps.pop(process.name, None)
        self.stage.kill(process)
        if noticed:
            self.host.break_line(process)

    def _ended(self, name: str, how: str) -> None:
        self.endings.append((name, how))
        self.log.append(f"{name} ends: {how}")

    def _supervise(self) -> None:
        """Whatever has ended is started again after a while."""
        now = self.stage.now
        for name in self.names:
            process = self.processes[name]
            if process.dead and not process.over_at:
                self._bury(process)
            if process.dead and now - process.over_at >= RESTART_SECONDS and name not in self.stopped | self.revoked:
                if process.ended == "FS-1270" and not self.skews[name]:
                    self._officer(name)
                self.start_site(name)
        core = self.core
        if core is not None and core.finished(now):
            self._ended("aggregator", "complete" if core.outcome and core.outcome["complete"] else "given up")
            self.host.act(None, lambda core: core.close())
            self.host.end()
        if self.core is None and now - self.host.over_at >= RESTART_SECONDS and "aggregator" not in self.stopped:
            self.host.start()

    # --- faults beside the network's ----------------------------------------------------------------------------------

    def trap(self, name: str, *, point: str, when: When, skip: int) -> None:
        """Kill a process, a site's or the aggregator's, at a write to come."""
        self.steps += 1
        self.log.append(f"trap {name} {when} {point!r} {skip}")
        self.disks.traps[name] = Trap(point, when, skip)

    def fill_disk(self, name: str) -> None:
        self.steps += 1
        self.log.append(f"fill {name}")
        self.disks.full.add(name)
        self.filled.add(name)

    def free_disk(self, name: str) -> None:
        self.steps += 1
        self.log.append(f"free {name}")
        self.disks.full.discard(name)

    def skew_clock(self, name: str, hours: float) -> None:
        """Set a site's wall clock wrong by so many hours."""
        self.steps += 1
        self.log.append(f"skew {name} {hours}")
        self.skews[name] = 3600.0 * hours

    def revoke(self, name: str) -> None:
        """From now on every call of that certificate is refused."""
        self.steps += 1
        self.log.append(f"revoke {name}")
        self.revoked.add(name)
        self.host.revoke(name)

    def _utc_now(self) -> datetime:
        process = self.stage.process
        skew = self.skews.get(process.name, 0.0) if process is not None else 0.0
        return _EPOCH + timedelta(seconds=self.stage.now + skew)

    # --- what the method tells (basis.Book) ---------------------------------------------------------------------------

    def answered(self, site: str, query: Query) -> int:
        """A new answer; its charge must be on disk already."""
        number = len(self.answers) + 1
        self.answers[number] = Answered(number, site, query.run, query.round, query.attempt)
        if not self.charges(site, query.run, query.round, query.attempt):
            self.surprises.append(f"{site} answers round {query.round}, attempt {query.attempt}, without a charge")
        return number

    def absorbed(self, step: int, sum: Vector, survivors: int) -> None:
        assert self.core is not None
        self.absorbed_sums.append(Absorbed(self.core.run, step, sum.copy(), survivors))

    # --- faults stop --------------------------------------------------------------------------------------------------

    def heal(self) -> None:
        """From now on nothing goes wrong: lines, disks and clocks work, and whoever is needed is started again."""
        self.log.append("heal")
        self.disks.full.clear()
        self.disks.traps.clear()
        self.stopped.clear()
        self.skews = dict.fromkeys(self.names, 0.0)
        for packet in self.network.packets:
            packet.earliest = min(packet.earliest, self.stage.now)
        self.healthy = True

    def _officer(self, name: str) -> None:
        """A clock that was ahead when something was charged takes an officer's word (FS-1270)."""
        with Ledger(self.ledger(name)) as ledger:
            ledger.set_limit(f"{name}-train", "train", Limit(1000.0, 1e-5), reason="the clock was ahead")

    def waiting(self) -> str:
        """What the world waits for, for people."""
        core = self.core
        what = "no aggregator" if core is None else core.reason(self.stage.now)
        sites = ", ".join(f"{name} {process.ended or 'runs'}" for name, process in self.processes.items())
        return f"{what}; {sites}; last: {self.endings[-8:]}"

    # --- looking ------------------------------------------------------------------------------------------------------

    def ledger(self, name: str) -> Path:
        return self.folder / name / "ledger.db"

    def charges(self, site: str, run: bytes, round: int, attempt: int) -> int:
        """How many charges that are not void stand in a site's ledger for an attempt; read past the ledger's code."""
        connection = sqlite3.connect(f"file:{self.ledger(site)}?mode=ro", uri=True)
        try:
            (count,) = connection.execute(
                "SELECT count(*) FROM entries WHERE state = 'RESERVED' AND run = ? AND round = ? AND attempt = ?"
                " AND reservation NOT IN (SELECT reservation FROM entries WHERE state = 'VOID')",
                (run.hex(), round, attempt),
            ).fetchone()
            return int(count)
        finally:
            connection.close()

    def audit_log(self, name: str) -> Path:
        """Of a site, or of the aggregator."""
        return self.folder / name / "audit.log" if name == "aggregator" else self.folder / name / "state" / "audit.log"

    def site_config(self, name: str) -> SiteConfig:
        home = self.folder / name
        index = self.names.index(name)
        train = DatasetConfig(name=f"{name}-train", path=self.ground.features, split="train", rows=(index, self.sites))
        home.mkdir(exist_ok=True)
        return SiteConfig(
            site=name,
            aggregator="simulated",
            identity=self.ground.folder / "keys" / "sites" / name / "identity",
            state=home / "state",
            ledger=self.ledger(name),
            encoder_file=self.ground.features,
            train=train,
            policy=PolicyConfig(max_epsilon=1000.0, unit="record", methods=("basis",)),
            connect_seconds=60.0,
            wait_seconds=300.0,
        )

    # --- the end ------------------------------------------------------------------------------------------------------

    def close(self) -> None:
        for process in self.processes.values():
            process.dead = True
            self.stage.kill(process)
        self.host.core = None
        self._patches.close()
        shutil.rmtree(self.folder, ignore_errors=True)


@contextmanager
def simulated(**options: Any) -> Iterator[SimulatedWorld]:
    """A world that is taken down at the end."""
    world = SimulatedWorld(**options)
    try:
        yield world
    finally:
        world.close()


__all__ = ["ENDINGS", "SimulatedWorld", "simulated"]
