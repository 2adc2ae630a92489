"""The aggregator's core: the calls of the sites, the schedule of questions, attempts, and what follows from each.

No sockets, threads or clock: the gRPC service, the in-memory transport and the tests drive the same object. Calls
must not overlap. Every wait is bounded and knows what it waits for (:meth:`Coordinator.reason`). What it does is on the
disk before anybody is told (:mod:`fedsecure.aggregator.account`), so that a process killed anywhere leaves a run that
the next one takes up.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from hmac import compare_digest
from typing import Any

from fedsecure.aggregator.account import Account, suspects
from fedsecure.aggregator.admission import PROTOCOL, admit
from fedsecure.aggregator.alarm import check_sum
from fedsecure.aggregator.drawing import Drawing
from fedsecure.aggregator.happenings import Listener
from fedsecure.aggregator.openings import Broadcast, Openings
from fedsecure.aggregator.rounds import Attempt, SetUp, decode
from fedsecure.aggregator.schedule import Schedule
from fedsecure.aggregator.sessions import Sessions
from fedsecure.aggregator.states import RunState
from fedsecure.aggregator.step_worker import StepWorker
from fedsecure.aggregator.store import RunStore, Wanted, stopped
from fedsecure.config import FederationConfig
from fedsecure.errors import EnvironmentProblem, FedsecureError, ProtocolError, RunError, TransportError
from fedsecure.identity.provision import Identity
from fedsecure.methods.agenda import asked_at
from fedsecure.methods.base import Cohort
from fedsecure.methods.cohorts import check_roles, cohort_of
from fedsecure.methods.registry import load_method, load_training_method
from fedsecure.secagg.draw import Draw
from fedsecure.secagg.phases import Phase
from fedsecure.wire import federation_pb2 as pb

# Sites named in a reason: every site that waits is told it.
_NAMED = 20
log = logging.getLogger("fedsecure.aggregator")
# Ends that a new process does not take for the run's: sites may come, the disk may be mended.
_NOT_FINAL = ("FS-1701",)
# Attempts shown to whoever looks at the run from outside.
_SHOWN = 20


class Coordinator:
    """Runs one run from the first join to the last goodbye, or from where a process before this one left it.

    Args:
        config: ``federation.toml``.
        identity: the aggregator's.
        store: the run's, new or of a process that ended.
        now: the time.
        listener: is told what happens, once it is on the disk.

    Raises:
        IdentityError: FS-1450, FS-1455 a site's role is not the roster's.
        RunError: FS-1731 the model that the run stands at cannot be read.
        EnvironmentProblem: FS-1830 from the database.
    """

    def __init__(
        self,
        config: FederationConfig,
        identity: Identity,
        *,
        store: RunStore,
        now: float,
        listener: Listener = lambda happening: None,
    ) -> None:
        self.config = config
        self.run = store.run
        self.settings = config.settings()
        check_roles(self.settings, identity.roster)
        self.outcome: dict[str, Any] | None = None
        self.failure: RunError | None = None
        self.sessions = Sessions(silence_seconds=config.rounds.silence_seconds)
        self._identity = identity
        self._store = store
        self._openings = Openings(self.settings, identity, self.run, store)
        self._schedule = Schedule(self.settings, load_training_method(config.method.name), load_method("evaluate"))
        standing = store.take_up()
        self._account = Account.take_up(self.settings, store, listener, standing)
        self._progress = standing.progress or self._schedule.start()
        self._broadcast = Broadcast.of({})
        self._attempt: Attempt | None = None
        self._worker: StepWorker | None = None
        self._set_up: SetUp | None = None
        self._epochs = standing.epochs
        self._drawing = (
            Drawing(
                self.settings,
                run=self.run,
                roster=identity.roster,
                folder=store.folder,
                sessions=self.sessions,
                alarm=self._account.alarm,
            )
            if self.settings.draws
            else None
        )
        self._wanted: Wanted = "run"
        self._waiting_since = now
        self._first_round = True
        self._ended: pb.Finished | None = None
        self._ended_at = now
        if standing.outcome is not None:
            self._say_the_end(standing.outcome, now)

    def chosen(self, site: str, federation: str) -> Coordinator:
        """The run that a site means: the only one here."""
        return self

    # --- calls of the sites -------------------------------------------------------------------------------------------

    def join(self, site: str, request: pb.JoinRequest, now: float) -> pb.JoinReply:
        """Open a session; raises as :func:`~fedsecure.aggregator.admission.admit`, and RunError FS-1703 where the
        identity has a live session already."""
        admit(site, request, settings=self.settings, roster=self._identity.roster)
        if self.sessions.open(site, request.session, now):
            self._account.tell("site-joined", site=site)
            if self._drawing is not None:
                self._drawing.tell_record(site)
            if self._ended is not None:
                self.sessions.tell(site, finished=self._ended)
        return pb.JoinReply(protocol=PROTOCOL, run=self.run, settings_json=self.settings.canonical())

    def poll(
        self, site: str, token: bytes, after: int, now: float, wake: Callable[[], None] | None = None
    ) -> pb.Directive | None:
        """The first directive after number ``after``, or None if there is nothing yet; ``wake`` is called when there
        is."""
        return self.sessions.poll(site, token, after, now, wake)

    def beat(self, site: str, token: bytes, now: float, leaving: str = "") -> None:
        """The site is there, and working; or it is leaving, for the reason with that code."""
        self.sessions.beat(site, token, now, leaving)
        if leaving:
            self._account.tell("site-left", site=site, code=self.sessions.leaving(site))

    def refused(self, site: str, code: str) -> None:
        """A call of a site broke a rule; ``site`` is empty for a stranger."""
        self._account.tell("site-refused", site=site or "a stranger", code=code)

    def gone(self, site: str, token: bytes, now: float) -> None:
        """The session's connection broke: two seconds' grace, then it counts as silent until it is heard again."""
        self.sessions.gone(site, token, now)

    def send(self, site: str, message: pb.PhaseMessage, now: float) -> None:
        """A small protocol message."""
        self.sessions.hear(site, message.session, now)
        if self._tossing is not None and compare_digest(self._tossing.ctx, message.ctx):
            self._tossing.receive(site, message.payload)
        elif self._preparing and self._set_up is not None and compare_digest(self._set_up.ctx, message.ctx):
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

    def accepts_upload(self, ctx: bytes) -> bool:
        """Whether the attempt of that context is in progress and still takes masked vectors."""
        attempt = self._attempt
        return attempt is not None and attempt.phase is Phase.MASKED and compare_digest(attempt.ctx, ctx)

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
            return f"the aggregator computes after round {self._account.round - 1}"
        if self._account.state is RunState.PAUSED:
            return "the operator has paused the run"
        if self._tossing is not None:
            return self._tossing.reason(now)
        cohort, _ = self._cohort()
        running = self._set_up if self._preparing else self._attempt
        missing = list(running.waiting_for() if running else (s for s in cohort if not self.sessions.ready(s, now)))
        seen = [self.sessions.last_seen(site, now) for site in missing[:_NAMED]]
        seen += [f"and {len(missing) - _NAMED} more"] if len(missing) > _NAMED else []
        what = f"{running.phase.name.lower()} of round {self._account.round}" if running else "joining"
        return f"{what}: waiting for {len(missing)} of {len(cohort)} sites" + (": " + ", ".join(seen) if seen else "")

    def status(self, now: float) -> dict[str, Any]:
        """A snapshot for people: stage, round, who is there, what is awaited."""
        return {
            "run": self.run.hex(),
            "stage": "over" if self.outcome else self._progress.stage,
            "state": self._account.state.value,
            "round": self._account.round,
            "attempt": self._account.attempt,
            "step": self._progress.state.step,
            "steps": self.config.method.rounds,
            "phase": self._attempt.phase.name.lower() if self._attempt else "joining",
            "sites": {site: self.sessions.alive(site, now) for site in sorted(self.settings.sites)},
            "presence": {site: self.sessions.presence(site, now) for site in sorted(self.settings.sites)},
            "waiting": self.reason(now),
            "attempts": self._account.attempts[-_SHOWN:],
            "alarms": self._account.alarms[-_SHOWN:],
            "outcome": self.outcome,
        }

    # --- the operator -----------------------------------------------------------------------------------------------

    def wanted(self) -> Wanted:
        """What the operator asks for, as the database has it."""
        return self._store.wanted()

    def obey(self, wanted: Wanted, now: float) -> None:
        """Pause after the attempt in progress, go on, or stop at once: every site is told why."""
        if self.outcome is not None or wanted == self._wanted:
            return
        self._wanted = wanted
        if wanted == "stop":
            self._give_up(stopped(), now)
        self.tick(now)

    # --- inside -----------------------------------------------------------------------------------------------------

    @property
    def _preparing(self) -> bool:
        """Keys for later rounds are being set up."""
        return self._set_up is not None and self._set_up.phase in (Phase.ADVERTISE, Phase.SHARES)

    @property
    def _tossing(self) -> Drawing | None:
        """The draw, while a toss for it goes on."""
        return self._drawing if self._drawing is not None and self._drawing.stage else None

    @property
    def _draw(self) -> Draw | None:
        return self._drawing.draw if self._drawing is not None else None

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
        """Who the next question asks, once the run's draw is there; before, whom it may ask."""
        pool, numbers = cohort_of(self.settings, trainers_only=self._progress.stage == "training")
        drawn = self._drawing is None or self._draw is not None
        return asked_at(self.settings, self._account.round, draw=self._draw) if drawn else pool, numbers

    def _step(self, now: float) -> bool:
        try:
            if self._worker is not None:
                return self._compute(self._worker, now)
            if self._tossing is not None:
                return self._tossing.advance(now)
            if self._preparing and self._set_up is not None:
                return self._prepare(self._set_up, now)
            if self._attempt is not None:
                return self._advance(self._attempt, now)
            if self._schedule.due(self._progress):
                self._begin_computing(now)
                return True
            return not self._hold(now) and self._open(now)
        except FedsecureError as error:
            failure = error if isinstance(error, RunError) else _run_failure(error.code, error.found, error)
        except Exception as error:
            log.exception("the run fails")
            failure = _run_failure("", type(error).__name__, error)
        self._give_up(failure, now)
        return False

    def _hold(self, now: float) -> bool:
        """Whether the operator wants the run to be paused; no wait for sites runs out meanwhile."""
        account = self._account
        if self._wanted == "pause":
            if account.state is not RunState.PAUSED:
                account.move(RunState.PAUSED)
                account.tell("run-paused")
            self._waiting_since = now
            return True
        if account.state is RunState.PAUSED:
            account.move(RunState.WAITING)
            account.tell("run-continued")
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
        if step.result is None:
            self._account.move(RunState(step.phase))
            self.sessions.relay(ctx, step.phase, step.relays)
            return True
        survivors, seconds = step.result.survivors, round(now - attempt.started, 3)
        odd, alarm = suspects(step.result), check_sum(attempt.query, step.result, settings=self.settings)
        if alarm is not None:
            self._account.alarm(alarm.error())
            if self.settings.rounds.on_alarm == "stop":
                raise alarm.error()
            odd["alarm"] = alarm.error().found
        progress = self._schedule.absorb(self._progress, decode(attempt.query, step.result))
        self._account.summed(survivors, progress, seconds=seconds, suspects=odd)
        self._attempt, self._progress, self._waiting_since = None, progress, now
        self.sessions.relay(ctx, step.phase, step.relays)
        self._left_out(cohort, survivors, ctx, reason="the round ended without this site")
        return True

    def _begin_computing(self, now: float) -> None:
        """The method's computation, in a process of its own; the sum it starts from is on disk already."""
        config = self.config
        self._account.move(RunState.COMPUTING)
        self._worker = StepWorker(
            self.settings,
            self._progress.state,
            encoder_file=config.encoder_file,
            target_file=config.target_file,
            deadline=now + config.rounds.training_seconds,
        )

    def _compute(self, worker: StepWorker, now: float) -> bool:
        """Whether the method's computation is done."""
        state = worker.poll(now)
        if state is None:
            return False
        self._worker = None
        progress = replace(self._progress, state=state)
        self._account.computed(progress)
        self._progress, self._waiting_since = progress, now
        return True

    def _open(self, now: float) -> bool:
        ask = self._schedule.ask(self._progress)
        if ask is None:
            self._finish(now)
            return False
        self._require_attempts_left()
        if self._drawing is not None and self._draw is None:
            live = self._gathered(self._drawing.candidates(), self._drawing.required, now)
            if live is not None:
                self._drawing.begin(live, now)
            return False
        sites, cohort = self._cohort()
        live = self._gathered(sites, cohort.min_survivors, now)
        if live is None:
            return False
        self._first_round = False
        present = self.sessions.tokens(live)
        prepared = ask.trainers_only and self.settings.rounds.prepared_rounds > 0
        if prepared and (self._set_up is None or not self._set_up.serves(sites, present)):
            self._begin_set_up(present, now)
            return False
        keys = self._set_up if prepared else None
        self._broadcast = Broadcast.of(ask.inputs)
        account = self._account
        query = self._openings.query(
            ask, round=account.round, attempt=account.attempt, inputs=self._broadcast.hashes, draw=self._draw
        )
        attempt, descriptor = self._openings.attempt(
            query, trainers_only=ask.trainers_only, keys=keys, now=now, draw=self._draw
        )
        account.open(
            RunState(attempt.phase.name.lower()),
            stage=self._progress.stage,
            cohort=query.cohort,
            ctx=descriptor.ctx,
        )
        self._attempt = attempt
        asked = live if keys is None else [site for site in live if site in keys.holders]
        directive = pb.Ask(query_json=query.to_json(), descriptor=descriptor.canonical())
        self.sessions.ask(asked, descriptor.ctx, ask=directive)
        return False

    def _gathered(self, sites: tuple[str, ...], least: int, now: float) -> list[str] | None:
        """Which of these sites are there, once they are enough; RunError FS-1701 where that takes too long."""
        live = [site for site in sites if self.sessions.ready(site, now)]
        patient = now - self._waiting_since < self.config.rounds.start_seconds
        # The first question of a process waits for everybody; later ones for those it cannot do without.
        if len(live) >= (len(sites) if self._first_round and patient else least):
            return live
        if not patient:
            raise RunError(
                "FS-1701",
                self.reason(now),
                expected=f"at least {least} of {len(sites)} sites",
                cure="bring the missing sites back and start `fedsecure serve` again: the run goes on",
            )
        return None

    def _begin_set_up(self, present: Mapping[str, bytes], now: float) -> None:
        if self._set_up is not None:
            self._set_up.abort()
        self._account.begin_keys(self._epochs + 1)
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
        self._account.move(RunState.KEYS if self._preparing else RunState.WAITING)
        self.sessions.relay(keys.ctx, step.phase, step.relays)
        if not self._preparing:
            self._account.tell("keys-prepared", epoch=self._epochs - 1, holders=list(keys.holders))
            self._left_out(keys.cohort, keys.holders, keys.ctx, reason="the keys were set up without this site")
        return True

    # --- endings ----------------------------------------------------------------------------------------------------

    def _left_out(self, cohort: tuple[str, ...], others: tuple[str, ...], ctx: bytes, *, reason: str) -> None:
        self.sessions.tell_asked(set(cohort) - set(others), ctx, code="FS-1707", reason=reason)

    def _failed(self, error: ProtocolError, now: float, *, cohort: tuple[str, ...], ctx: bytes, started: float) -> None:
        """Record an attempt, or a set-up, that ended without a sum; the next one follows or the run ends."""
        reason = "; ".join([f"{error.code}: {error.found}", *self.sessions.departures()])
        log.warning("attempt aborted: %s", reason)
        seconds, stage = round(now - started, 3), self._progress.stage
        self._account.aborted(reason, error.code, stage=stage, cohort=cohort, ctx=ctx, seconds=seconds)
        self.sessions.tell_asked(cohort, ctx, code=error.code, reason=reason)
        self._waiting_since = now

    def _require_attempts_left(self) -> None:
        account = self._account
        if account.attempt < self.config.rounds.max_attempts:
            return
        last = str(account.attempts[-1]["aborted"])
        raise RunError(
            "FS-1702",
            f"round {account.round} failed {account.attempt} times, last: {last}",
            expected="a round that ends within its attempts",
            cure="see the reasons: fedsecure runs show",
        )

    def _finish(self, now: float) -> None:
        outcome = {"complete": True, **self._account.summary(self._progress)}
        self._account.end(outcome)
        self._account.tell("run-ended", complete=True)
        self._say_the_end(outcome, now)

    def _give_up(self, error: RunError, now: float) -> None:
        self.failure = error
        if self._worker is not None:
            self._worker.stop()
            self._worker = None
        attempt, self._attempt = self._attempt, None
        if attempt is not None:
            attempt.abort()
        # What this process cannot do, on this disk or without those sites, the next one may.
        error.final = final = error.code not in _NOT_FINAL and not _of_this_machine(error.__cause__)
        summary = self._account.summary(self._progress)
        outcome = {"complete": False, "code": error.code, "error": str(error), **summary}
        if final:
            try:
                if attempt is not None:
                    cohort, ctx = attempt.query.cohort, attempt.ctx
                    self._account.aborted(
                        str(error),
                        error.code,
                        stage=self._progress.stage,
                        cohort=cohort,
                        ctx=ctx,
                        seconds=round(now - attempt.started, 3),
                    )
                self._account.end(outcome)
            except FedsecureError as worse:
                log.warning("the end of the run is not in the database: %s", worse)
        try:
            self._account.tell("run-ended", complete=False, code=error.code, reason=error.found, final=final)
        except FedsecureError as worse:
            log.warning("the end of the run is not in the audit log: %s", worse)
        self._say_the_end(outcome, now)

    def _say_the_end(self, outcome: dict[str, Any], now: float) -> None:
        if outcome["complete"]:
            self._broadcast = Broadcast.of(self._progress.state.tensors)
        outputs = self._broadcast.hashes if outcome["complete"] else {}
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

    def close(self) -> None:
        """The process ends here: a run that is over for good has been told to its sites."""
        if self._account.state is RunState.OVER:
            self._store.close()


def _of_this_machine(cause: BaseException | None) -> bool:
    """Whether a failure is one of disk, database or permissions (FS-1349: the spool)."""
    return isinstance(cause, EnvironmentProblem) or (isinstance(cause, FedsecureError) and cause.code == "FS-1349")


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


__all__ = ["PROTOCOL", "Coordinator"]
