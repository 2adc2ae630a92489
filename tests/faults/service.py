"""The aggregator's machine in the simulated world: its process, and the service before the coordinator.

Like the gRPC service it goes by the newest signed roster, keeps the answers of repeated requests, lets long polls and
beats wait, and takes one upload of a site at a time.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

from faults.baton import Killed, Process, Stage
from faults.disk import Disks
from faults.ground import Ground
from faults.network import Broken, Call, Network, Packet

from fedsecure.aggregator.answers import Answers
from fedsecure.aggregator.coordinator import Coordinator
from fedsecure.aggregator.database import Database
from fedsecure.aggregator.happenings import Happening
from fedsecure.aggregator.listening import listening
from fedsecure.aggregator.store import RunStore, begin, unfinished
from fedsecure.config import FederationConfig
from fedsecure.errors import EnvironmentProblem, FedsecureError, RunError, TransportError
from fedsecure.files import make_folder
from fedsecure.identity import certificates, keys
from fedsecure.identity.standing import Standing
from fedsecure.wire import federation_pb2 as pb

POLL_SECONDS = 10.0


@dataclass(slots=True)
class Host:
    """One machine, and at most one process on it.

    Attributes:
        core: the running process's coordinator.
        over_at: when the last process ended.
        parked: long polls and beats that wait for an answer.
        uploading: sites whose upload is between header and body.
        runs: ids of all runs that were begun.
        happened: what the coordinators told.
        endings, surprises, log: the world's.
    """

    folder: Path
    ground: Ground
    stage: Stage
    network: Network
    disks: Disks
    endings: list[tuple[str, str]]
    surprises: list[str]
    log: list[str]
    process: Process = field(default_factory=lambda: Process("aggregator"))
    core: Coordinator | None = None
    database: Database | None = None
    over_at: float = 0.0
    parked: list[Call] = field(default_factory=list)
    uploading: set[str] = field(default_factory=set)
    answered_calls: Answers = field(default_factory=Answers)
    runs: list[bytes] = field(default_factory=list)
    happened: list[Happening] = field(default_factory=list)
    standing: Standing = field(init=False)
    _starts: int = 0
    _roster: Path = field(init=False)

    def __post_init__(self) -> None:
        self._roster = make_folder(self.folder) / "roster.json"
        self._roster.write_bytes((self.ground.folder / "keys" / "ca" / "roster.json").read_bytes())
        # Who may call; a run keeps the roster that it has begun with.
        floor = self._roster.with_name("roster-version")
        self.standing = Standing(self.ground.identities["aggregator"], self._roster, floor=floor)

    # --- calls --------------------------------------------------------------------------------------------------------

    def serve(self, call: Call) -> None:
        """A request has arrived."""
        request, site, now = call.request, call.site, self.stage.now

        def handle(core: Coordinator) -> Any:
            self._caller(site)
            if call.kind == "upload" and self.answered_calls.find(site, request, pb.Ack) is not None:
                return None
            changes = call.kind in ("join", "send") or (call.kind == "beat" and request.leaving)
            return (
                self.answered_calls.once(site, request, lambda: perform(core) or pb.Ack()) if changes else perform(core)
            )

        def perform(core: Coordinator) -> Any:
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

        ok, reply = self.act(call, handle)
        if not ok:
            return
        if call.kind in ("next", "beat") and not getattr(request, "leaving", ""):
            call.waits_until = now + POLL_SECONDS
            self.parked.append(call)
        elif call.kind == "upload" and call.buffer is not None:
            self.uploading.add(site)
            self.network.packets.append(Packet("body", call, now))
        else:
            self.network.reply(call, self.stage.now, reply)

    def body(self, call: Call) -> None:
        """The vector of an upload has arrived, after its header."""
        site = call.site
        self.uploading.discard(site)
        buffer, call.buffer = call.buffer, None
        if buffer is None:  # of an aggregator that is gone
            self.network.reply(call, self.stage.now, Broken())
            return
        whole = buffer

        def add(core: Coordinator) -> None:
            self._caller(site)
            whole[:] = call.payload
            core.upload(site, call.request, whole, self.stage.now)
            self.answered_calls.keep(site, call.request, pb.Ack())

        ok, _ = self.act(call, add)
        if ok:
            self.network.reply(call, self.stage.now, None)

    def _caller(self, site: str) -> None:
        """The certificate is a member's now (IdentityError FS-1460)."""
        known = self.standing.site_of(certificates.fingerprint(self.ground.identities[site].certificate))
        assert known == site

    def look(self) -> None:
        """Answer the long polls for which there is something now."""
        for call in list(self.parked):
            if call.kind == "beat":
                if self.stage.now >= call.waits_until:
                    self.parked.remove(call)
                    self.network.reply(call, self.stage.now, None)
                continue
            request = call.request
            ok, found = self.act(
                call,
                lambda core, call=call, request=request: core.poll(
                    call.site, request.session, request.after, self.stage.now
                ),
            )
            if not ok:
                continue
            if found is None and self.stage.now >= call.waits_until:
                assert self.core is not None
                found = self.core.wait(request.session, self.stage.now)
            if found is not None:
                self.parked.remove(call)
                self.network.reply(call, self.stage.now, found)

    def tick(self) -> None:
        """Do what is due."""
        if self.core is not None:
            self.act(None, lambda core: core.tick(self.stage.now))
        self.look()

    def act(self, call: Call | None, action: Callable[[Coordinator], Any]) -> tuple[bool, Any]:
        """Let the aggregator do something for a call; whether it did, and what came of it."""
        core = self.core
        if core is None:
            return False, None
        self.stage.owner = self.process
        try:
            return True, action(core)
        except Killed:
            self.end()
            if call is not None and not call.over and call not in self.parked:
                self.network.reply(call, self.stage.now, Broken())
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
        if call is None:  # of the program itself, which ends with it
            self.endings.append(("aggregator", getattr(answer, "code", "")))
            self.end()
            return False, None
        if call in self.parked:
            self.parked.remove(call)
        self.network.reply(call, self.stage.now, answer)
        return False, None

    # --- the process --------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Start the aggregator: a new run, or the one it was killed in."""
        if self.core is not None:
            return
        self.log.append("start aggregator")
        self.process = Process("aggregator")
        self._starts += 1
        run = hashlib.sha256(b"run %d" % self._starts).digest()[:16]
        config = FederationConfig(
            **self.ground.settings.model_dump(),
            state=self.folder,
            identity=self.ground.folder / "keys" / "aggregator" / "identity",
            encoder_file=self.ground.features,
        )
        self.stage.owner = self.process

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
            self.end()
        except FedsecureError as error:
            self.endings.append(("aggregator", error.code))
            self.log.append(f"aggregator ends: {error.code}")
            self.end()
        finally:
            self.stage.owner = None

    def end(self) -> None:
        """The process is gone, with everything that was only in its memory."""
        self.log.append("the aggregator is gone")
        self.core = None
        if self.database is not None:
            self.database.close()
            self.database = None
        self.over_at = self.stage.now
        self.disks.traps.pop("aggregator", None)
        self.uploading.clear()
        self.answered_calls = Answers()
        parked, self.parked = self.parked, []
        for packet in self.network.packets:
            packet.call.buffer = None
        for call in parked:
            self.network.reply(call, self.stage.now, Broken())

    def pass_time(self) -> None:
        """Beats that wait are signs of life; then do what is due."""
        for call in list(self.parked):
            if call.kind == "beat":
                self.act(call, lambda core, call=call: core.beat(call.site, call.request.session, self.stage.now))
        self.tick()

    def break_line(self, process: Process) -> None:
        """The service notices that nobody waits for a parked call any more."""
        for call in [call for call in self.parked if call.process is process]:
            self.parked.remove(call)
            token = call.request.session
            self.act(call, lambda core, token=token: core.gone(process.name, token, self.stage.now))

    def revoke(self, name: str) -> None:
        """The coordinator signs a roster without that certificate; from now on every call of it is refused."""
        before = self.standing.roster
        entries = tuple(entry for entry in before.entries if entry.site != name)
        roster = replace(before, version=before.version + 1, entries=entries)
        draft = self._roster.with_name(f"roster-{roster.version}.json")
        roster.save(draft, keys.load_private_key(self.ground.folder / "keys" / "ca" / "coordinator.key"))
        draft.replace(self._roster)


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
