"""A federation in a simulated world: the real coordinator, clients, ledgers and latches on a network, a clock and disks
that do what a test says, step by step.

Real are the coordinator and its store, ``Client`` with line, rounds, door, ledger and latch, and all of secure
aggregation. Simulated are the transport, time, threads, and who is killed when; training is replaced by vectors that
name their sender (``basis``). The world starts what has ended again, as a service manager does.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import sqlite3
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
from faults.basis import BasisVectors, Vector
from faults.baton import Killed, Process, Stage
from faults.disk import Disks, Trap, When, watched
from faults.network import Broken, Call, Kind, Network, Packet, SimulatedTransport

from fedsecure.aggregator.answers import Answers
from fedsecure.aggregator.coordinator import Coordinator
from fedsecure.aggregator.database import Database
from fedsecure.aggregator.happenings import Happening
from fedsecure.aggregator.listening import listening
from fedsecure.aggregator.store import RunStore, begin, unfinished
from fedsecure.audit_log import Head
from fedsecure.client import Client, Receipt
from fedsecure.config import (
    DatasetConfig,
    EncoderConfig,
    FederationConfig,
    MethodConfig,
    PolicyConfig,
    PrivacyConfig,
    RoundsConfig,
    RunSettings,
    SiteConfig,
    SiteEntry,
)
from fedsecure.data.loading import read_feature_header
from fedsecure.errors import EnvironmentProblem, FedsecureError, RunError, TransportError
from fedsecure.files import make_folder
from fedsecure.identity import certificates, keys
from fedsecure.identity.provision import Identity, load_identity, provision
from fedsecure.identity.standing import Standing
from fedsecure.messages import Query
from fedsecure.methods import registry
from fedsecure.privacy.ledger import Ledger, Limit
from fedsecure.wire import federation_pb2 as pb

CLASSES = ("a", "b", "c")
DIMENSION = 8
PARAMETERS = DIMENSION * len(CLASSES)
UNITS = 4
POLL_SECONDS = 10.0
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
    "FS-1820": "no room for the audit log",
    "FS-1802": "no room for the site's own files",
}

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


@dataclass(slots=True)
class Ground:
    """What all worlds of one size share: keys, features, settings."""

    folder: Path
    identities: dict[str, Identity]
    features: Path
    settings: RunSettings


@cache
def ground(sites: int, rounds: int, prepared: int) -> Ground:
    """Keys and settings for ``sites`` sites, made once a process."""
    folder = Path(tempfile.mkdtemp(prefix="fedsecure-faults-"))
    names = [f"site-{i + 1}" for i in range(sites)]
    provision(folder / "keys", federation="world", sites=dict.fromkeys(names, "train"), hosts=("localhost",))
    rng = np.random.default_rng(0)
    features = folder / "features.npz"
    arrays: dict[str, Any] = {"classes": np.array(CLASSES), "text": rng.normal(size=(3, DIMENSION)).astype(np.float32)}
    for split in ("train", "test"):
        arrays[f"{split}_x"] = rng.normal(size=(UNITS * sites, DIMENSION)).astype(np.float32)
        arrays[f"{split}_y"] = np.arange(UNITS * sites, dtype=np.int64) % 3
    np.savez(features, **arrays)
    header = read_feature_header(features)
    waits: dict[str, Any] = {"phase_seconds": 20.0, "training_seconds": 30.0, "silence_seconds": 8.0}
    settings = RunSettings(
        name="world",
        classes=CLASSES,
        encoder=EncoderConfig(model="features", pretrained="file", dimension=DIMENSION, fingerprint=header.fingerprint),
        method=MethodConfig(name="basis", rounds=rounds, local_steps=1),
        privacy=PrivacyConfig(
            noise_multiplier=40.0, unit="record", max_records_per_unit=1, noise="local", minimum_signal_to_noise=0.0
        ),
        rounds=RoundsConfig(**waits, start_seconds=120.0, max_attempts=6, prepared_rounds=prepared),
        sites={name: SiteEntry(max_units=UNITS) for name in names},
    )
    homes = {name: folder / "keys" / "sites" / name / "identity" for name in names}
    homes["aggregator"] = folder / "keys" / "aggregator" / "identity"
    return Ground(folder, {name: load_identity(home) for name, home in homes.items()}, features, settings)


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
        for name in ("aggregator", "client", "identity", "privacy.ledger"):
            self._patches.enter_context(patch.object(logging.getLogger(f"fedsecure.{name}"), "disabled", True))
        self.ground = ground(self.sites, self.rounds, self.prepared)
        self.names = list(self.ground.settings.sites)
        self.aggregator = Process("aggregator")
        self.core: Coordinator | None = None
        self.database: Database | None = None
        self.happened: list[Happening] = []
        self.heads: dict[str, Head] = {}  # of the audit logs, when they were last checked
        self.receipts: list[tuple[str, bytes, Receipt]] = []
        self.core_over_at = 0.0
        self.processes: dict[str, SiteProcess] = {}
        self.revoked: set[str] = set()
        self.filled: set[str] = set()  # whose disk was full at some time
        self.stopped: set[str] = set()  # sites that nobody starts again
        self.parked: list[Call] = []
        self.uploading: set[str] = set()
        self.answered_calls = Answers()
        (self.folder / "aggregator").mkdir()
        self._roster = self.folder / "aggregator" / "roster.json"
        self._roster.write_bytes((self.ground.folder / "keys" / "ca" / "roster.json").read_bytes())
        self.standing = self._members()
        self.skews = dict.fromkeys(self.names, 0.0)
        self.answers: dict[int, Answered] = {}
        self.absorbed_sums: list[Absorbed] = []
        self.runs: list[bytes] = []
        self.endings: list[tuple[str, str]] = []
        self.surprises: list[str] = []
        self.log: list[str] = []
        self.steps = 0
        self._calls = 0
        self._starts = 0
        self.healthy = False
        self._patches.enter_context(patch("fedsecure.site.line.time", self.stage.time()))
        self._patches.enter_context(patch("fedsecure.site.line.threading", self.stage.threading()))
        self._patches.enter_context(patch("fedsecure.privacy.ledger_store.utc_now", self._utc_now))
        self._patches.enter_context(named_commits(self.disks))
        self._patches.enter_context(watched(self.disks))
        self.start_aggregator()
        for name in self.names:
            self.start_site(name)

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
            due = [now + TICK_SECONDS, *(call.waits_until for call in self.parked)]
            due += [t for t in (self.stage.next_time(), self.network.next_time(now)) if t is not None]
            seconds = max(0.0, min(due) - now)
        self.stage.now = now + seconds
        for call in self.parked:
            if call.kind == "beat":
                self._at_aggregator(
                    call, lambda core, call=call: core.beat(call.site, call.request.session, self.stage.now)
                )
        self._tick()
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
        self._look()

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
        self._break_line(process)

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
            self._reply(call, Broken())
        elif packet.what == "body":
            self._body(call)
        else:
            self._serve(call)
        self._tick()

    def lose(self, packet: Packet) -> None:
        """The connection that carries a packet breaks, and with it the call."""
        self.steps += 1
        self.log.append(f"lose {packet}")
        self.network.packets.remove(packet)
        if packet.what == "body":
            self.uploading.discard(packet.call.site)
        self._reply(packet.call, Broken())

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

    def _reply(self, call: Call, reply: Any) -> None:
        self.network.packets.append(Packet("reply", call, self.stage.now, reply))

    # --- the aggregator's service -------------------------------------------------------------------------------------

    def _serve(self, call: Call) -> None:
        request, site, now = call.request, call.site, self.stage.now

        def handle(core: Coordinator) -> Any:
            self._caller(site)
            if call.kind == "upload" and self.answered_calls.find(site, request, pb.Ack) is not None:
                return None
            changes = call.kind in ("join", "send") or (call.kind == "beat" and request.leaving)
            return self.answered_calls.once(site, request, lambda: act(core) or pb.Ack()) if changes else act(core)

        def act(core: Coordinator) -> Any:
            if call.kind == "join":
                return core.join(site, request, now)
            if call.kind == "send":
                return core.send(site, request, now)
            if call.kind == "fetch":
                return core.fetch(site, request.session, request.digest, now)
            if call.kind == "beat":
                core.beat(site, request.session, now, request.leaving)
            elif call.kind == "next":
                core.poll(site, request.session, request.after, now)
            elif call.kind == "upload":
                if site in self.uploading:
                    raise TransportError("FS-1511", "a second upload", expected="one", cure="none needed")
                call.buffer = core.expect_upload(site, request, now)
            return None

        ok, reply = self._at_aggregator(call, handle)
        if not ok:
            return
        if call.kind in ("next", "beat") and not getattr(request, "leaving", ""):
            call.waits_until = now + POLL_SECONDS
            self.parked.append(call)
        elif call.kind == "upload" and call.buffer is not None:
            self.uploading.add(site)
            self.network.packets.append(Packet("body", call, now))
        else:
            self._reply(call, reply)

    def _body(self, call: Call) -> None:
        site = call.site
        self.uploading.discard(site)
        buffer, call.buffer = call.buffer, None
        if buffer is None:  # of an aggregator that is gone
            self._reply(call, Broken())
            return
        whole = buffer

        def add(core: Coordinator) -> None:
            self._caller(site)
            whole[:] = call.payload
            core.upload(site, call.request, whole, self.stage.now)
            self.answered_calls.keep(site, call.request, pb.Ack())

        ok, _ = self._at_aggregator(call, add)
        if ok:
            self._reply(call, None)

    def _caller(self, site: str) -> None:
        """The certificate is a member's now (IdentityError FS-1460)."""
        known = self.standing.site_of(certificates.fingerprint(self.ground.identities[site].certificate))
        assert known == site

    def _members(self) -> Standing:
        """Who may call; the run keeps the roster that it has begun with."""
        return Standing(self.ground.identities["aggregator"], self._roster, floor=self._roster.with_name("floor"))

    def _look(self) -> None:
        """Answer the long polls for which there is something now."""
        for call in list(self.parked):
            if call.kind == "beat":
                if self.stage.now >= call.waits_until:
                    self.parked.remove(call)
                    self._reply(call, None)
                continue
            request = call.request
            ok, found = self._at_aggregator(
                call,
                lambda core, call=call, request=request: core.poll(
                    call.site, request.session, request.after, self.stage.now
                ),
            )
            if not ok:
                continue
            if found is None and self.stage.now >= call.waits_until:
                assert self.core is not None
                found = pb.Directive(wait=pb.Wait(reason=self.core.reason(self.stage.now)))
            if found is not None:
                self.parked.remove(call)
                self._reply(call, found)

    def _tick(self) -> None:
        if self.core is not None:
            self._at_aggregator(None, lambda core: core.tick(self.stage.now))
        self._look()

    def _at_aggregator(self, call: Call | None, action: Callable[[Coordinator], Any]) -> tuple[bool, Any]:
        """Let the aggregator do something for a call; whether it did, and what came of it."""
        core = self.core
        if core is None:
            return False, None
        self.stage.owner = self.aggregator
        try:
            return True, action(core)
        except Killed:
            self._aggregator_is_gone()
            if call is not None and not call.over and call not in self.parked:
                self._reply(call, Broken())
            return False, None
        except EnvironmentProblem as error:
            self.log.append(f"the aggregator cannot: {error.code}")
            answer: BaseException = RunError("FS-1718", error.found, expected="an answer", cure="see its log")
        except FedsecureError as error:
            answer = error
        except Exception as error:
            self.surprises.append(f"aggregator: {error!r}")
            answer = RunError("FS-1719", "the aggregator failed", expected="an answer", cure="see its log")
        finally:
            self.stage.owner = None
        assert call is not None, answer
        if call in self.parked:
            self.parked.remove(call)
        self._reply(call, answer)
        return False, None

    # --- processes ----------------------------------------------------------------------------------------------------

    def start_aggregator(self) -> None:
        """Start the aggregator: a new run, or the one it was killed in."""
        if self.core is not None:
            return
        self.log.append("start aggregator")
        self.aggregator = Process("aggregator")
        self._starts += 1
        run = hashlib.sha256(b"run %d" % self._starts).digest()[:16]
        config = FederationConfig(
            **self.ground.settings.model_dump(),
            state=self.folder / "aggregator",
            identity=self.ground.folder / "keys" / "aggregator" / "identity",
            encoder_file=self.ground.features,
        )
        self.stage.owner = self.aggregator

        def clock() -> float:
            return self.stage.now

        def told(happening: Happening) -> None:
            heard(happening)
            self.happened.append(happening)

        try:
            self.database = Database("", make_folder(config.state))
            store = unfinished(self.database, config, clock=clock) or begin(self.database, config, run, clock=clock)
            identity = self.ground.identities["aggregator"]
            heard = listening(config, identity, run=store.run.hex(), metrics=None)
            self.core = Coordinator(
                config,
                identity,
                store=store,
                now=self.stage.now,
                listener=told,
            )
            if self.core.run not in self.runs:
                self.runs.append(self.core.run)
        except Killed:
            self._aggregator_is_gone()
        except FedsecureError as error:
            self._ended("aggregator", error.code)
            self._aggregator_is_gone()
        finally:
            self.stage.owner = None

    def kill_aggregator(self) -> None:
        """kill -9."""
        self.steps += 1
        self.log.append("kill aggregator")
        self._aggregator_is_gone()

    def _aggregator_is_gone(self) -> None:
        self.log.append("the aggregator is gone")
        self.core = None
        if self.database is not None:
            self.database.close()
            self.database = None
        self.core_over_at = self.stage.now
        self.disks.traps.pop("aggregator", None)
        self.uploading.clear()
        self.answered_calls = Answers()
        parked, self.parked = self.parked, []
        for packet in self.network.packets:
            packet.call.buffer = None
        for call in parked:
            self._reply(call, Broken())

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
            self._break_line(process)

    def _break_line(self, process: SiteProcess) -> None:
        """The service notices that nobody waits for a parked call any more."""
        for call in [call for call in self.parked if call.process is process]:
            self.parked.remove(call)
            token = call.request.session
            self._at_aggregator(call, lambda core, token=token: core.gone(process.name, token, self.stage.now))

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
            self._at_aggregator(None, lambda core: core.close())
            self._aggregator_is_gone()
        if self.core is None and now - self.core_over_at >= RESTART_SECONDS and "aggregator" not in self.stopped:
            self.start_aggregator()

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
        """The coordinator signs a roster without that certificate; from now on every call of it is refused."""
        self.steps += 1
        self.log.append(f"revoke {name}")
        self.revoked.add(name)
        before = self.standing.roster
        entries = tuple(entry for entry in before.entries if entry.site != name)
        roster = replace(before, version=before.version + 1, entries=entries)
        draft = self._roster.with_name(f"roster-{roster.version}.json")
        roster.save(draft, keys.load_private_key(self.ground.folder / "keys" / "ca" / "coordinator.key"))
        draft.replace(self._roster)

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
        self.core = None
        self._patches.close()
        shutil.rmtree(self.folder, ignore_errors=True)


# What the aggregator writes down, each a transaction; a transition to a state counts by itself.
WRITES = ("move", "begin_keys", "open_attempt", "abort_attempt", "sum_attempt", "computed", "end", "close", "take_up")


@contextmanager
def named_commits(disks: Disks) -> Iterator[None]:
    """The aggregator's commits are boundaries named by what they record: ``commit move shares``."""

    def naming(name: str, write: Callable[..., Any]) -> Callable[..., Any]:
        def named(*arguments: Any, **keywords: Any) -> Any:
            disks.doing = f"move {arguments[1]}" if name == "move" else name
            try:
                return write(*arguments, **keywords)
            finally:
                disks.doing = ""

        return named

    with ExitStack() as patches:
        for name in WRITES:
            patches.enter_context(patch.object(RunStore, name, naming(name, getattr(RunStore, name))))
        yield


@contextmanager
def simulated(**options: Any) -> Iterator[SimulatedWorld]:
    """A world that is taken down at the end."""
    world = SimulatedWorld(**options)
    try:
        yield world
    finally:
        world.close()


__all__ = ["ENDINGS", "SimulatedWorld", "simulated"]
