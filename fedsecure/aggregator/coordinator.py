"""The aggregator's core: the calls of the sites, the schedule of questions, attempts, and what follows from each.

No sockets, threads or clock: the gRPC service, the in-memory transport and the tests drive the same object. Calls
must not overlap. Every wait is bounded and knows what it waits for (:meth:`Coordinator.reason`).
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import replace
from hmac import compare_digest
from typing import Any

from fedsecure.aggregator.account import Account, suspects
from fedsecure.aggregator.admission import PROTOCOL, admit
from fedsecure.aggregator.openings import Broadcast, Openings
from fedsecure.aggregator.rounds import Attempt, SetUp, decode
from fedsecure.aggregator.schedule import Progress, Schedule
from fedsecure.aggregator.sessions import Sessions
from fedsecure.aggregator.step_worker import StepWorker
from fedsecure.aggregator.store import RunStore
from fedsecure.config import FederationConfig
from fedsecure.errors import FedsecureError, ProtocolError, RunError, TransportError
from fedsecure.identity.provision import Identity
from fedsecure.methods.base import Cohort
from fedsecure.methods.cohorts import check_roles, cohort_of
from fedsecure.methods.registry import load_method, load_training_method
from fedsecure.secagg.phases import Phase
from fedsecure.wire import federation_pb2 as pb

log = logging.getLogger("fedsecure.aggregator")


class Coordinator:
    """Runs one run from the first join to the last goodbye."""

    def __init__(self, config: FederationConfig, identity: Identity, *, run: bytes, now: float) -> None:
        self.config = config
        self.run = run
        self.settings = config.settings()
        check_roles(self.settings, identity.roster)
        self.outcome: dict[str, Any] | None = None
        self.failure: RunError | None = None
        self.sessions = Sessions(silence_seconds=config.rounds.silence_seconds)
        self._identity = identity
        self._store = RunStore(config.state, run)
        self._store.settings(self.settings)
        self._account = Account(self.settings, run, self._store)
        self._openings = Openings(self.settings, identity, run, self._store)
        self._schedule = Schedule(self.settings, load_training_method(config.method.name), load_method("evaluate"))
        self._progress = self._schedule.start()
        self._broadcast = Broadcast.of({})
        self._round = 0
        self._number = 0
        self._attempt: Attempt | None = None
        self._worker: StepWorker | None = None
        self._set_up: SetUp | None = None
        self._epochs = 0
        self._waiting_since = now
        self._first_round = True
        self._ended: pb.Finished | None = None
        self._ended_at = now

    # --- calls of the sites -------------------------------------------------------------------------------------------

    def join(self, site: str, request: pb.JoinRequest, now: float) -> pb.JoinReply:
        """Open a session; raises as :func:`~fedsecure.aggregator.admission.admit`, and RunError FS-1703 where the
        identity has a live session already."""
        admit(site, request, settings=self.settings, roster=self._identity.roster)
        if self.sessions.open(site, request.session, now) and self._ended is not None:
            self.sessions.tell(site, finished=self._ended)
        return pb.JoinReply(protocol=PROTOCOL, run=self.run, settings_json=self.settings.canonical())

    def poll(self, site: str, token: bytes, after: int, now: float) -> pb.Directive | None:
        """The first directive after number ``after``, or None if there is nothing yet."""
        return self.sessions.poll(site, token, after, now)

    def beat(self, site: str, token: bytes, now: float, leaving: str = "") -> None:
        """The site is there, and working; or it is leaving, for the reason with that code."""
        self.sessions.beat(site, token, now, leaving)

    def gone(self, site: str, token: bytes, now: float) -> None:
        """The session's connection broke: two seconds' grace, then it counts as silent until it is heard again."""
        self.sessions.gone(site, token, now)

    def send(self, site: str, message: pb.PhaseMessage, now: float) -> None:
        """A small protocol message."""
        self.sessions.hear(site, message.session, now)
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
        self.sessions.hear(site, header.session, now)
        attempt = self._current(header.ctx)
        size = attempt.query.ring_bits // 8 * attempt.query.length
        if header.size != size:
            raise TransportError(
                "FS-1504",
                f"an upload of {header.size} bytes",
                expected=f"{size} bytes, {attempt.query.ring_bits // 8} per coordinate",
                cure="install the same fedsecure release on both sides",
            )
        return attempt.buffer(site, header.header)

    def upload(self, site: str, header: pb.UploadHeader, payload: memoryview | bytes, now: float) -> None:
        """A whole masked vector."""
        self.sessions.hear(site, header.session, now)
        self._current(header.ctx).receive_masked(site, header.header, payload)
        self.tick(now)

    def fetch(self, site: str, token: bytes, digest: bytes, now: float) -> bytes:
        """A broadcast tensor by its hash."""
        self.sessions.hear(site, token, now)
        try:
            return self._broadcast.blobs[digest]
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
        return self.sessions.all_heard_the_end(now) or now > self._ended_at + self.config.rounds.phase_seconds

    def reason(self, now: float) -> str:
        """What is being waited for, in words."""
        if self.outcome is not None:
            return "the run is over"
        if self._worker is not None:
            return f"the aggregator computes after round {self._round - 1}"
        cohort, _ = self._cohort()
        running = self._set_up if self._preparing else self._attempt
        missing = running.waiting_for() if running else [s for s in cohort if not self.sessions.alive(s, now)]
        seen = [self.sessions.last_seen(site, now) for site in missing]
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
            "sites": {site: self.sessions.alive(site, now) for site in sorted(self.settings.sites)},
            "presence": {site: self.sessions.presence(site, now) for site in sorted(self.settings.sites)},
            "waiting": self.reason(now),
            "outcome": self.outcome,
        }

    # --- inside -----------------------------------------------------------------------------------------------------

    @property
    def _preparing(self) -> bool:
        """Keys for later rounds are being set up."""
        return self._set_up is not None and self._set_up.phase in (Phase.ADVERTISE, Phase.SHARES)

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
            if self._worker is not None:
                return self._compute(self._worker, now)
            if self._preparing and self._set_up is not None:
                return self._prepare(self._set_up, now)
            return self._open(now) if self._attempt is None else self._advance(self._attempt, now)
        except FedsecureError as error:
            failure = error if isinstance(error, RunError) else _run_failure(error.code, error.found, error)
        except Exception as error:
            log.exception("the run fails")
            failure = _run_failure("", type(error).__name__, error)
        self._give_up(failure, now)
        return False

    def _advance(self, attempt: Attempt, now: float) -> bool:
        ctx, cohort = attempt.ctx, attempt.query.cohort
        try:
            step = attempt.advance(now, lambda site: self.sessions.takes_part(site, ctx, now))
        except ProtocolError as error:
            attempt.abort()
            self._attempt = None
            self._failed(error, now, cohort=cohort, ctx=ctx, started=attempt.started)
            return True
        if step is None:
            return False
        self.sessions.relay(ctx, step.phase, step.relays)
        if step.result is None:
            return True
        survivors = step.result.survivors
        lied = suspects(step.result)
        self._record(cohort, ctx, attempt.started, now, suspects=lied, survivors=list(survivors))
        self._left_out(cohort, survivors, ctx, reason="the round ended without this site")
        self._attempt = None
        self._progress = self._schedule.absorb(self._progress, decode(attempt.query, step.result))
        self._account.save(self._round, self._progress)
        self._round, self._number, self._waiting_since = self._round + 1, 0, now
        if self._schedule.due(self._progress):
            config = self.config
            self._worker = StepWorker(
                self.settings,
                self._progress.state,
                encoder_file=config.encoder_file,
                target_file=config.target_file,
                deadline=now + config.rounds.training_seconds,
            )
        return True

    def _compute(self, worker: StepWorker, now: float) -> bool:
        """Whether the method's computation is done; the sum it starts from is on disk already."""
        state = worker.poll(now)
        if state is None:
            return False
        self._worker = None
        self._progress = replace(self._progress, state=state)
        self._account.save(self._round - 1, self._progress)
        self._waiting_since = now
        return True

    def _open(self, now: float) -> bool:
        ask = self._schedule.ask(self._progress)
        if ask is None:
            self._finish(now)
            return False
        sites, cohort = self._cohort()
        live = [site for site in sites if self.sessions.alive(site, now)]
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
        present = self.sessions.tokens(live)
        prepared = ask.trainers_only and self.settings.rounds.prepared_rounds > 0
        if prepared and (self._set_up is None or not self._set_up.serves(sites, present)):
            self._begin_set_up(present, now)
            return False
        keys = self._set_up if prepared else None
        self._broadcast = Broadcast.of(ask.inputs)
        query = self._openings.query(ask, round=self._round, attempt=self._number, inputs=self._broadcast.hashes)
        self._attempt, descriptor = self._openings.attempt(query, trainers_only=ask.trainers_only, keys=keys, now=now)
        asked = live if keys is None else [site for site in live if site in keys.holders]
        directive = pb.Ask(query_json=query.to_json(), descriptor=descriptor.canonical())
        self.sessions.ask(asked, descriptor.ctx, ask=directive)
        return False

    def _begin_set_up(self, present: Mapping[str, bytes], now: float) -> None:
        if self._set_up is not None:
            self._set_up.abort()
        self._set_up, descriptor = self._openings.set_up(self._epochs, tokens=present, now=now)
        self._epochs += 1
        self.sessions.ask(present, self._set_up.ctx, prepare=pb.Prepare(descriptor=descriptor))

    def _prepare(self, keys: SetUp, now: float) -> bool:
        """Advance the set-up of keys; one that fails counts as a failed attempt of the round it was for."""
        try:
            step = keys.advance(now, lambda site: self.sessions.takes_part(site, keys.ctx, now))
        except ProtocolError as error:
            keys.abort()
            self._set_up = None
            self._failed(error, now, cohort=keys.cohort, ctx=keys.ctx, started=keys.started)
            return True
        if step is None:
            return False
        self.sessions.relay(keys.ctx, step.phase, step.relays)
        if not self._preparing:
            self._left_out(keys.cohort, keys.holders, keys.ctx, reason="the keys were set up without this site")
        return True

    # --- endings ----------------------------------------------------------------------------------------------------

    def _left_out(self, cohort: tuple[str, ...], others: tuple[str, ...], ctx: bytes, *, reason: str) -> None:
        self.sessions.tell_asked(set(cohort) - set(others), ctx, code="FS-1707", reason=reason)

    def _failed(self, error: ProtocolError, now: float, *, cohort: tuple[str, ...], ctx: bytes, started: float) -> None:
        """Record an attempt, or a set-up, that ended without a sum; the next one follows or the run ends."""
        left = self.sessions.departures()
        reason = "; ".join([f"{error.code}: {error.found}", *left])
        log.warning("attempt aborted: %s", reason)
        self._record(cohort, ctx, started, now, aborted=reason, code=error.code)
        self.sessions.tell_asked(cohort, ctx, code=error.code, reason=reason)
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

    def _record(self, cohort: tuple[str, ...], ctx: bytes, started: float, now: float, **outcome: Any) -> None:
        self._account.attempt(
            round=self._round,
            attempt=self._number,
            stage=self._progress.stage,
            cohort=cohort,
            ctx=ctx,
            seconds=round(now - started, 3),
            **outcome,
        )

    def _finish(self, now: float) -> None:
        self._broadcast = Broadcast.of(self._progress.state.tensors)
        outcome = {"complete": True, **self._account.summary(self._progress)}
        self._end(outcome, self._broadcast.hashes, now)

    def _give_up(self, error: RunError, now: float) -> None:
        self.failure = error
        if self._worker is not None:
            self._worker.stop()
            self._worker = None
        if self._attempt is not None:
            self._attempt.abort()
            self._attempt = None
        summary = self._account.summary(self._progress)
        self._end({"complete": False, "code": error.code, "error": str(error), **summary}, {}, now)

    def _end(self, outcome: dict[str, Any], outputs: Mapping[str, bytes], now: float) -> None:
        self.outcome, self._ended_at = outcome, now
        text = json.dumps(outcome, sort_keys=True)
        self._ended = pb.Finished(complete=outcome["complete"], summary_json=text, outputs=outputs)
        self.sessions.tell_all(finished=self._ended)

    @property
    def attempts(self) -> list[dict[str, Any]]:
        """All attempts that are over, as the summary has them."""
        return self._account.attempts

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
