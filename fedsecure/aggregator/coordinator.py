"""The aggregator's core: sessions, the schedule of questions, attempts, and what each site is told.

No sockets, threads or clock: the gRPC service, the in-memory transport and the tests drive the same object. Calls
must not overlap. Every wait is bounded and knows what it waits for (:meth:`Coordinator.reason`).
"""

from __future__ import annotations

import json
import logging
import re
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from hmac import compare_digest
from typing import Any

import numpy as np

from fedsecure.aggregator.rounds import Attempt, SetUp, decode
from fedsecure.aggregator.schedule import Progress, Schedule
from fedsecure.aggregator.store import RunStore
from fedsecure.config import FederationConfig
from fedsecure.errors import FedsecureError, IdentityError, ProtocolError, RunError, TransportError
from fedsecure.identity.provision import Identity
from fedsecure.messages import Query, digest_tensor
from fedsecure.methods.base import Ask, Cohort
from fedsecure.methods.cohorts import check_roles, cohort_of
from fedsecure.methods.registry import load_method, load_training_method
from fedsecure.secagg.descriptor import RoundDescriptor
from fedsecure.secagg.epoch_descriptor import EpochDescriptor
from fedsecure.secagg.epoch_server import EpochServer
from fedsecure.secagg.phases import Phase
from fedsecure.secagg.record import RecordingServer
from fedsecure.secagg.server import SecAggServer
from fedsecure.secagg.spool import FileSpool, Spool
from fedsecure.transport.tensors import pack_tensor
from fedsecure.wire import federation_pb2 as pb

PROTOCOL = 1
TOKEN_BYTES = 16
# A site never has so many directives ahead of it unless it does not listen.
OUTBOX = 64
_CODE = re.compile(r"FS-1\d{3}")
log = logging.getLogger("fedsecure.aggregator")


@dataclass(slots=True)
class _Session:
    """One process of one site.

    ``asked`` is the context of the question it got last: a process that joined later has no keys of an attempt in
    progress. ``leaving`` is the code it gave for going.
    """

    token: bytes
    heard: float
    sent: int = 0
    outbox: deque[pb.Directive] = field(default_factory=lambda: deque(maxlen=OUTBOX))
    asked: bytes = b""
    left: bool = False
    leaving: str = ""


class Coordinator:
    """Runs one run from the first join to the last goodbye."""

    def __init__(self, config: FederationConfig, identity: Identity, *, run: bytes, now: float) -> None:
        self.config = config
        self.run = run
        self.settings = config.settings()
        check_roles(self.settings, identity.roster)
        self.outcome: dict[str, Any] | None = None
        self.failure: RunError | None = None
        self._identity = identity
        self._store = RunStore(config.state, run)
        self._store.settings(self.settings)
        self._schedule = Schedule(self.settings, load_training_method(config.method.name), load_method("evaluate"))
        self._progress = self._schedule.start()
        self._sessions: dict[str, _Session] = {}
        self._tensors: dict[bytes, bytes] = {}
        self._round = 0
        self._number = 0
        self._attempt: Attempt | None = None
        self._set_up: SetUp | None = None
        self._epochs = 0
        self._waiting_since = now
        self._attempts: list[dict[str, Any]] = []
        self._first_round = True
        self._ended: pb.Finished | None = None
        self._ended_at = now

    # --- calls of the sites -------------------------------------------------------------------------------------------

    def join(self, site: str, request: pb.JoinRequest, now: float) -> pb.JoinReply:
        """Open a session.

        Raises:
            IdentityError: FS-1451 not in this run, FS-1452 another roster.
            TransportError: FS-1503 another protocol version, FS-1509 a session of another size.
            RunError: FS-1703 the identity already has a live session.
        """
        if site not in self.settings.sites:
            raise IdentityError(
                "FS-1451",
                f"site {site!r} is not part of this run",
                expected="one of " + ", ".join(sorted(self.settings.sites)),
                cure="ask the coordinator to add it",
            )
        if request.protocol != PROTOCOL:
            raise TransportError(
                "FS-1503",
                f"site speaks protocol {request.protocol}",
                expected=f"protocol {PROTOCOL}",
                cure="install the same fedsecure release on both sides",
            )
        if len(request.session) != TOKEN_BYTES:
            raise TransportError(
                "FS-1509",
                f"a session of {len(request.session)} bytes",
                expected=f"{TOKEN_BYTES} random bytes",
                cure="install the same fedsecure release on both sides",
            )
        if not compare_digest(request.roster_hash, self._identity.roster.hash):
            raise IdentityError(
                "FS-1452",
                "the site's roster is not the aggregator's",
                expected="the same signed roster everywhere",
                cure="fetch the current roster from the coordinator",
            )
        old = self._sessions.get(site)
        if old is not None and not compare_digest(old.token, request.session) and self._alive(site, now):
            raise RunError(
                "FS-1703",
                f"site {site!r} has already joined from another process",
                expected="one process per identity",
                cure=f"stop the other process, or wait {self.config.rounds.silence_seconds:g} s after it died",
            )
        if old is None or not compare_digest(old.token, request.session):
            self._sessions[site] = _Session(token=bytes(request.session), heard=now)
            log.info("joined", extra={"site": site})
            if self._ended is not None:
                self._tell(site, finished=self._ended)
        self._sessions[site].heard = now
        return pb.JoinReply(
            protocol=PROTOCOL,
            run=self.run,
            settings_json=self.settings.canonical(),
        )

    def poll(self, site: str, token: bytes, after: int, now: float) -> pb.Directive | None:
        """The first directive after number ``after``, or None if there is nothing yet."""
        session = self._session(site, token, now)
        while session.outbox and session.outbox[0].sequence <= after:
            done = session.outbox.popleft()
            session.left = session.left or done.WhichOneof("kind") == "finished"
        if session.left:
            return pb.Directive(wait=pb.Wait(reason="the run is over"))
        return session.outbox[0] if session.outbox else None

    def beat(self, site: str, token: bytes, now: float, leaving: str = "") -> None:
        """The site is there, and working; or it is leaving, for the reason with that code."""
        session = self._session(site, token, now)
        if _CODE.fullmatch(leaving):
            session.leaving = leaving
            log.warning("%s leaves: %s", site, leaving)

    def gone(self, site: str, token: bytes, now: float) -> None:
        """The session's connection broke: two seconds' grace, then it counts as silent until it is heard again."""
        session = self._sessions.get(site)
        if session is not None and compare_digest(session.token, token):
            session.heard = min(session.heard, now - self.config.rounds.silence_seconds + 2.0)

    def send(self, site: str, message: pb.PhaseMessage, now: float) -> None:
        """A small protocol message."""
        self._session(site, message.session, now)
        if self._preparing and self._set_up is not None and compare_digest(self._set_up.ctx, message.ctx):
            self._set_up.receive(site, message.payload)
        else:
            self._current(message.ctx).receive(site, message.payload)
        self.tick(now)

    def expect_upload(self, site: str, header: pb.UploadHeader, now: float) -> memoryview | None:
        """Check an upload's signed header before a byte of it is stored.

        Returns:
            A buffer of the vector's size to fill and to hand to :meth:`upload`, or ``None`` where this very upload has
            been counted already.
        """
        self._session(site, header.session, now)
        attempt = self._current(header.ctx)
        size = attempt.query.ring_bits // 8 * attempt.query.length
        if header.size != size:
            raise TransportError(
                "FS-1504",
                f"an upload of {header.size} bytes",
                expected=f"{size} bytes, four per coordinate",
                cure="install the same fedsecure release on both sides",
            )
        return attempt.buffer(site, header.header)

    def upload(self, site: str, header: pb.UploadHeader, payload: memoryview | bytes, now: float) -> None:
        """A whole masked vector."""
        self._session(site, header.session, now)
        self._current(header.ctx).receive_masked(site, header.header, payload)
        self.tick(now)

    def fetch(self, site: str, token: bytes, digest: bytes, now: float) -> bytes:
        """A broadcast tensor by its hash."""
        self._session(site, token, now)
        try:
            return self._tensors[digest]
        except KeyError:
            raise RunError(
                "FS-1704",
                "a tensor was asked for that is not being broadcast",
                expected="a hash named in the query",
                cure="none needed; the site asks again with the current query",
            ) from None

    # --- time -------------------------------------------------------------------------------------------------------

    def tick(self, now: float) -> None:
        """Do whatever is due: end phases, start attempts, give up."""
        while self.outcome is None and self._step(now):
            pass

    def finished(self, now: float) -> bool:
        """The run is over, and every site that is still there has heard so or has had ``phase_seconds`` to hear it."""
        if self.outcome is None:
            return False
        heard = all(s.left or not self._alive(n, now) for n, s in self._sessions.items())
        return heard or now > self._ended_at + self.config.rounds.phase_seconds

    def reason(self, now: float) -> str:
        """What is being waited for, in words."""
        if self.outcome is not None:
            return "the run is over"
        cohort, _ = self._cohort()
        running = self._set_up if self._preparing else self._attempt
        missing = running.waiting_for() if running else [s for s in cohort if not self._alive(s, now)]
        seen = []
        for site in missing:
            session = self._sessions.get(site)
            if session is not None and session.leaving:
                seen.append(f"{site} left with {session.leaving}")
            else:
                seen.append(f"{site} " + (f"last heard {now - session.heard:.0f} s ago" if session else "not seen yet"))
        what = f"{running.phase.name.lower()} of round {self._round}" if running else "joining"
        return f"{what}: waiting for {len(missing)} of {len(cohort)} sites" + (": " + ", ".join(seen) if seen else "")

    def status(self, now: float) -> dict[str, Any]:
        """A snapshot for people: stage, round, who is there, what is awaited."""
        return {
            "run": self.run.hex(),
            "stage": "over" if self.outcome else self._progress.stage,
            "round": self._round,
            "attempt": self._number,
            "step": self._progress.state.step,
            "steps": self.config.method.rounds,
            "phase": self._attempt.phase.name.lower() if self._attempt else "joining",
            "sites": {site: self._alive(site, now) for site in sorted(self.settings.sites)},
            "waiting": self.reason(now),
            "outcome": self.outcome,
        }

    # --- inside -----------------------------------------------------------------------------------------------------

    def _session(self, site: str, token: bytes, now: float) -> _Session:
        session = self._sessions.get(site)
        if session is None or not compare_digest(session.token, token):
            raise RunError(
                "FS-1705",
                f"site {site!r} has no session of that token",
                expected="a call after a successful join",
                cure="join again",
            )
        session.heard = now
        return session

    def _alive(self, site: str, now: float) -> bool:
        session = self._sessions.get(site)
        if session is None or session.leaving:
            return False
        return now - session.heard <= self.config.rounds.silence_seconds

    @property
    def _preparing(self) -> bool:
        """Keys for later rounds are being set up."""
        return self._set_up is not None and self._set_up.phase in (Phase.ADVERTISE, Phase.SHARES)

    def _takes_part(self, site: str, attempt: Attempt | SetUp, now: float) -> bool:
        """Whether the site is there with the keys of this attempt: not one that came, or came back, after its start."""
        return self._alive(site, now) and self._sessions[site].asked == attempt.ctx

    def _current(self, ctx: bytes) -> Attempt:
        if self._attempt is None or not compare_digest(self._attempt.ctx, ctx):
            raise RunError(
                "FS-1706",
                "a message for an attempt that is over",
                expected="the context of the attempt in progress",
                cure="none needed; the next attempt brings new keys",
            )
        return self._attempt

    def _cohort(self) -> tuple[tuple[str, ...], Cohort]:
        return cohort_of(self.settings, trainers_only=self._progress.stage == "training")

    def _step(self, now: float) -> bool:
        try:
            if self._preparing:
                return self._prepare(now)
            return self._open(now) if self._attempt is None else self._advance(self._attempt, now)
        except FedsecureError as error:
            failure = error if isinstance(error, RunError) else _run_failure(error.code, error.found, error)
        except Exception as error:
            log.exception("the run fails")
            failure = _run_failure("", type(error).__name__, error)
        self._give_up(failure, now)
        return False

    def _advance(self, attempt: Attempt, now: float) -> bool:
        try:
            step = attempt.advance(now, lambda site: self._takes_part(site, attempt, now))
        except ProtocolError as error:
            self._fail(error, now)
            return True
        if step is None:
            return False
        for site, payload in step.relays.items():
            self._tell(site, relay=pb.Relay(ctx=attempt.ctx, phase=step.phase, payload=payload))
        if step.result is None:
            return True
        self._log_attempt(
            attempt.query.cohort, attempt.ctx, attempt.started, now, survivors=list(step.result.survivors)
        )
        left_out = set(attempt.query.cohort) - set(step.result.survivors)
        self._tell_asked(left_out, attempt.ctx, code="FS-1707", reason="the round ended without this site")
        self._attempt = None
        self._progress = self._schedule.absorb(self._progress, decode(attempt.query, step.result))
        self._require_finite()
        self._save()
        self._round, self._number, self._waiting_since = self._round + 1, 0, now
        return True

    def _open(self, now: float) -> bool:
        ask = self._schedule.ask(self._progress)
        if ask is None:
            self._finish(now)
            return False
        sites, cohort = self._cohort()
        live = [site for site in sites if self._alive(site, now)]
        patient = now - self._waiting_since < self.config.rounds.start_seconds
        # The first question of a run waits for everybody; later ones for those it cannot do without.
        wanted = len(sites) if self._first_round and patient else cohort.min_survivors
        if len(live) < wanted:
            if not patient:
                self._give_up(
                    RunError(
                        "FS-1701",
                        self.reason(now),
                        expected=f"at least {cohort.min_survivors} of {len(sites)} sites",
                        cure="bring the missing sites back and start the run again",
                    ),
                    now,
                )
            return False
        self._first_round = False
        present = {site: self._sessions[site].token for site in live}
        prepared = ask.trainers_only and self.settings.rounds.prepared_rounds > 0
        if prepared and (self._set_up is None or not self._set_up.serves(sites, present)):
            self._begin_set_up(sites, cohort, present, now)
            return False
        keys = self._set_up if prepared else None
        query = self._query(ask, sites)
        descriptor = RoundDescriptor.from_query(
            query,
            roster=self._identity.roster,
            config_hash=self.settings.digest(),
            base_hash=bytes.fromhex(self.settings.encoder.fingerprint),
            colluders=cohort.colluders,
            min_survivors=cohort.min_survivors,
            epoch=keys.ctx if keys else b"",
            slot=keys.slot() if keys else 0,
        )
        spool = FileSpool(self._store.folder / "spool")
        server = keys.round(descriptor, spool=spool) if keys else self._server(descriptor, spool)
        self._attempt = Attempt(query, descriptor, server=server, waits=self.config.rounds, now=now)
        text = query.to_json()
        for site in live if keys is None else [site for site in live if site in keys.holders]:
            self._sessions[site].asked = descriptor.ctx
            self._tell(site, ask=pb.Ask(query_json=text, descriptor=descriptor.canonical()))
        return False

    def _server(self, descriptor: RoundDescriptor, spool: Spool) -> SecAggServer:
        """A round that sets up its own keys, recorded where the settings say so."""
        roster, key = self._identity.roster, self._identity.signing_key
        if not self.settings.rounds.transcripts:
            return SecAggServer(descriptor, roster=roster, signing_key=key, spool=spool)
        write = self._store.transcript(self._round, self._number)
        return RecordingServer(descriptor, roster=roster, signing_key=key, spool=spool, write=write)

    def _begin_set_up(self, sites: tuple[str, ...], cohort: Cohort, present: Mapping[str, bytes], now: float) -> None:
        descriptor = EpochDescriptor.choose(
            sites,
            run_id=self.run,
            epoch=self._epochs,
            slots=self.settings.rounds.prepared_rounds,
            roster=self._identity.roster,
            config_hash=self.settings.digest(),
            colluders=cohort.colluders,
            min_survivors=cohort.min_survivors,
        )
        self._epochs += 1
        if self._set_up is not None:
            self._set_up.abort()
        server = EpochServer(descriptor, roster=self._identity.roster, signing_key=self._identity.signing_key)
        self._set_up = SetUp(server, tokens=present, waits=self.config.rounds, now=now)
        for site in present:
            self._sessions[site].asked = descriptor.ctx
            self._tell(site, prepare=pb.Prepare(descriptor=descriptor.canonical()))

    def _prepare(self, now: float) -> bool:
        """Advance the set-up of keys; one that fails counts as a failed attempt of the round it was for."""
        keys = self._set_up
        assert keys is not None
        try:
            step = keys.advance(now, lambda site: self._takes_part(site, keys, now))
        except ProtocolError as error:
            keys.abort()
            self._set_up = None
            self._failed(error, now, cohort=keys.cohort, ctx=keys.ctx, started=keys.started)
            return True
        if step is None:
            return False
        for site, payload in step.relays.items():
            self._tell(site, relay=pb.Relay(ctx=keys.ctx, phase=step.phase, payload=payload))
        if not self._preparing:
            left_out = set(keys.cohort) - set(keys.holders)
            self._tell_asked(left_out, keys.ctx, code="FS-1707", reason="the keys were set up without this site")
        return True

    def _query(self, ask: Ask, sites: tuple[str, ...]) -> Query:
        hashes = {name: digest_tensor(name, value) for name, value in ask.inputs.items()}
        self._tensors = {hashes[name]: pack_tensor(name, value) for name, value in ask.inputs.items()}
        return Query(
            run=self.run,
            round=self._round,
            attempt=self._number,
            method=ask.method,
            version=ask.version,
            cohort=sites,
            inputs=hashes,
            segments=ask.segments,
            events=ask.events,
        )

    def _fail(self, error: ProtocolError, now: float) -> None:
        attempt = self._attempt
        assert attempt is not None
        attempt.abort()
        self._attempt = None
        self._failed(error, now, cohort=attempt.query.cohort, ctx=attempt.ctx, started=attempt.started)

    def _failed(self, error: ProtocolError, now: float, *, cohort: tuple[str, ...], ctx: bytes, started: float) -> None:
        """Record an attempt, or a set-up, that ended without a sum; the next one follows or the run ends."""
        left = [f"{n} left with {s.leaving}" for n, s in sorted(self._sessions.items()) if s.leaving]
        reason = "; ".join([f"{error.code}: {error.found}", *left])
        log.warning("attempt aborted: %s", reason)
        self._log_attempt(cohort, ctx, started, now, aborted=reason, code=error.code)
        self._tell_asked(cohort, ctx, code=error.code, reason=reason)
        self._number += 1
        self._waiting_since = now
        if self._number >= self.config.rounds.max_attempts:
            self._give_up(
                RunError(
                    "FS-1702",
                    f"round {self._round} failed {self._number} times, last: " + "; ".join([error.found, *left]),
                    expected="a round that ends within its attempts",
                    cure="see the reasons in rounds.jsonl",
                ),
                now,
            )

    def _require_finite(self) -> None:
        """A sum that ruins the model ends the run here, instead of at every site."""
        broken = [name for name, value in self._progress.state.tensors.items() if not np.isfinite(value).all()]
        if broken:
            raise RunError(
                "FS-1717",
                f"round {self._round} left values in {', '.join(broken)} that are not finite",
                expected="finite tensors after every step",
                cure="lower the learning rate; if it is modest, a site has sent extreme values",
            )

    def _log_attempt(self, cohort: tuple[str, ...], ctx: bytes, started: float, now: float, **outcome: Any) -> None:
        record = {
            "round": self._round,
            "attempt": self._number,
            "stage": self._progress.stage,
            "method": "evaluate" if self._progress.stage != "training" else self.settings.method.name,
            "cohort": list(cohort),
            "context": ctx.hex(),
            "seconds": round(now - started, 3),
            **outcome,
        }
        self._attempts.append(record)
        self._store.attempt(record)

    def _tell(self, site: str, **kind: Any) -> None:
        session = self._sessions.get(site)
        if session is not None:
            session.sent += 1
            session.outbox.append(pb.Directive(sequence=session.sent, **kind))

    def _tell_asked(self, sites: Iterable[str], ctx: bytes, *, code: str, reason: str) -> None:
        """What became of an attempt, to the processes that were asked to take part in it."""
        for site in sorted(sites):
            session = self._sessions.get(site)
            if session is not None and session.asked == ctx:
                self._tell(site, abort=pb.Abort(ctx=ctx, code=code, reason=reason))

    def _save(self) -> None:
        state = self._progress.state
        facts = {**state.facts, "evaluations": self._progress.evaluations}
        self._store.progress(
            round=self._round, stage=self._progress.stage, step=state.step, tensors=state.tensors, facts=facts
        )

    def _summary(self) -> dict[str, Any]:
        evaluations: Mapping[str, Mapping[str, Any]] = self._progress.evaluations
        return {
            "run": self.run.hex(),
            "federation": self.config.name,
            "method": self.config.method.name,
            "rounds": self._progress.state.step,
            "attempts": self._attempts,
            "evaluations": {stage: dict(facts) for stage, facts in evaluations.items()},
        }

    def _finish(self, now: float) -> None:
        tensors = self._progress.state.tensors
        hashes = {name: digest_tensor(name, value) for name, value in tensors.items()}
        self._tensors = {hashes[name]: pack_tensor(name, value) for name, value in tensors.items()}
        self._end({"complete": True, **self._summary()}, hashes, now)

    def _give_up(self, error: RunError, now: float) -> None:
        self.failure = error
        if self._attempt is not None:
            self._attempt.abort()
            self._attempt = None
        self._end({"complete": False, "code": error.code, "error": str(error), **self._summary()}, {}, now)

    def _end(self, outcome: dict[str, Any], outputs: Mapping[str, bytes], now: float) -> None:
        self.outcome, self._ended_at = outcome, now
        text = json.dumps(outcome, sort_keys=True)
        self._ended = pb.Finished(complete=outcome["complete"], summary_json=text, outputs=outputs)
        for site in self._sessions:
            self._tell(site, finished=self._ended)

    def write_status(self, now: float) -> None:
        """Refresh ``status.json``."""
        self._store.status(self.status(now))


def _run_failure(code: str, found: str, error: Exception) -> RunError:
    """What ends the run where nothing else could: the aggregator's own disk, or a method that fails."""
    failure = RunError(
        "FS-1716",
        f"the aggregator cannot go on ({code + ': ' if code else ''}{found})",
        expected="a step without errors",
        cure="see the aggregator's log; the sites' charges stand",
    )
    failure.__cause__ = error
    return failure


__all__ = ["PROTOCOL", "Coordinator", "Progress"]
