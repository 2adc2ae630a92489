"""The aggregator's core: the calls of the sites, the operator's wishes, and the engine behind them.

No sockets, threads or clock: the gRPC service, the in-memory transport and the tests drive the same object. Calls
must not overlap. Every wait is bounded and knows what it waits for (:meth:`Coordinator.reason`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from hmac import compare_digest
from typing import Any

from fedsecure.aggregator.admission import PROTOCOL, admit
from fedsecure.aggregator.engine import Engine
from fedsecure.aggregator.happenings import Listener
from fedsecure.aggregator.sessions import Sessions
from fedsecure.aggregator.states import RunState
from fedsecure.aggregator.store import RunStore, Wanted
from fedsecure.config import FederationConfig, RunSettings
from fedsecure.errors import FedsecureError, RunError, TransportError
from fedsecure.identity.provision import Identity
from fedsecure.identity.roster import Roster
from fedsecure.secagg.phases import Phase
from fedsecure.wire import federation_pb2 as pb

# Attempts shown to whoever looks at the run from outside.
_SHOWN = 20
# For sites to hear why an attempt ends, where the run does not.
_LAST_WORDS_SECONDS = 1.0


class Coordinator:
    """Runs one run from the first join to the last goodbye, or from where a process before this one left it.

    Args:
        config: ``federation.toml``.
        identity: the aggregator's.
        store: the run's, new or of a process that ended.
        now: the time.
        listener: is told what happens, once it is on the disk.
        gone: sites of the run that cannot come any more; nobody waits for them.

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
        gone: Collection[str] = (),
    ) -> None:
        self.engine = Engine(config, identity, store=store, now=now, listener=listener, gone=gone)
        self._identity = identity
        self._store = store

    @property
    def config(self) -> FederationConfig:
        return self.engine.config

    @property
    def settings(self) -> RunSettings:
        return self.engine.settings

    @property
    def run(self) -> bytes:
        """The run's id, 16 bytes."""
        return self.engine.run

    @property
    def roster(self) -> Roster:
        """The run's: who is in it, and with which keys, from its beginning to its end."""
        return self._identity.roster

    @property
    def sessions(self) -> Sessions:
        return self.engine.sessions

    @property
    def outcome(self) -> dict[str, Any] | None:
        """How the run ended, or this process's part of it; None while it goes on."""
        return self.engine.outcome

    @property
    def failure(self) -> RunError | None:
        """Why it did not complete, if it has ended so."""
        return self.engine.failure

    @property
    def over(self) -> bool:
        """The run is over for good, and the database has it so: no process goes on with it."""
        return self.engine.account.state is RunState.OVER

    @property
    def attempts(self) -> list[dict[str, Any]]:
        """All attempts that are over, as the summary has them."""
        return self.engine.account.attempts

    def chosen(self, site: str, federation: str) -> Coordinator:
        """The run that a site means: the only one here."""
        return self

    # --- calls of the sites -------------------------------------------------------------------------------------------

    def join(self, site: str, request: pb.JoinRequest, now: float, expires: float | None = None) -> pb.JoinReply:
        """Open a session.

        Args:
            expires: Unix time at which the certificate that the site showed ends.

        Raises:
            IdentityError, TransportError: as :func:`~fedsecure.aggregator.admission.admit`.
            RunError: FS-1703 the identity has a live session already.
        """
        admit(site, request, settings=self.settings, roster=self.roster)
        if self.sessions.open(site, request.session, now):
            try:
                ends = {} if expires is None else {"certificate_expires": expires}
                self.engine.account.tell("site-joined", site=site, **ends)
            except FedsecureError:
                # Nobody is in a run unrecorded: the site's next try is a new session again.
                self.sessions.close(site)
                raise
            if self.engine.drawing is not None:
                self.engine.drawing.tell_record(site)
            if self.engine.ended is not None:
                self.sessions.tell(site, finished=self.engine.ended)
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
            self.engine.account.tell("site-left", site=site, code=self.sessions.leaving(site))

    def refused(self, site: str, code: str) -> None:
        """A call of a site broke a rule; ``site`` is empty for a stranger."""
        self.engine.account.tell("site-refused", site=site or "a stranger", code=code)

    def carried(self, token: bytes, *, up: int = 0, down: int = 0) -> None:
        """So many bytes of messages, vectors and tensors came from the session, or went to it."""
        self.engine.account.carried(up=up, down=down)

    def gone(self, site: str, token: bytes, now: float) -> None:
        """The session's connection broke: two seconds' grace, then it counts as silent until it is heard again."""
        self.sessions.gone(site, token, now)

    def send(self, site: str, message: pb.PhaseMessage, now: float) -> None:
        """A small protocol message."""
        self.sessions.hear(site, message.session, now)
        self.engine.receive(site, message)
        self.tick(now)

    def expect_upload(self, site: str, header: pb.UploadHeader, now: float) -> memoryview | None:
        """Check an upload's signed header before a byte of it is stored.

        Returns:
            A buffer of the vector's size to fill and to hand to :meth:`upload`, or ``None`` where this very upload has
            been counted already.
        """
        self.sessions.hear(site, header.session, now)
        attempt = self.engine.current(header.ctx)
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
        attempt = self.engine.attempt
        return attempt is not None and attempt.phase is Phase.MASKED and compare_digest(attempt.ctx, ctx)

    def upload(self, site: str, header: pb.UploadHeader, payload: memoryview | bytes, now: float) -> None:
        """A whole masked vector."""
        self.sessions.hear(site, header.session, now)
        self.engine.current(header.ctx).receive_masked(site, header.header, payload)
        self.tick(now)

    def fetch(self, site: str, token: bytes, digest: bytes, now: float) -> bytes:
        """A broadcast tensor by its hash."""
        self.sessions.hear(site, token, now)
        try:
            return self.engine.broadcast.blobs[digest]
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
        self.engine.tick(now)

    def finished(self, now: float) -> bool:
        """The run is over, and every site that is still there has heard so or has had ``phase_seconds`` to hear it; or
        this process cannot go on with it."""
        if self.outcome is None:
            return False
        if self.engine.ended is None:
            return now > self.engine.ended_at + _LAST_WORDS_SECONDS
        return self.sessions.all_heard_the_end(now) or now > self.engine.ended_at + self.config.rounds.phase_seconds

    def reason(self, now: float) -> str:
        """What is being waited for, in words."""
        return self.engine.reason(now)

    def wait(self, token: bytes, now: float) -> pb.Directive:
        """What a site hears that nothing is asked of: for whom the run waits, and where it is."""
        account = self.engine.account
        position = f"{account.round}.{account.attempt} {account.state}"
        return pb.Directive(wait=pb.Wait(reason=self.reason(now), position=position))

    def status(self, now: float) -> dict[str, Any]:
        """A snapshot for people: stage, round, who is there, what is awaited."""
        return {
            "run": self.run.hex(),
            "stage": "over" if self.outcome else self.engine.progress.stage,
            "state": self.engine.account.state.value,
            "round": self.engine.account.round,
            "attempt": self.engine.account.attempt,
            "step": self.engine.progress.state.step,
            "steps": self.config.method.rounds,
            "phase": self.engine.attempt.phase.name.lower() if self.engine.attempt else "joining",
            "sites": {site: self.sessions.alive(site, now) for site in sorted(self.settings.sites)},
            "presence": {site: self.sessions.presence(site, now) for site in sorted(self.settings.sites)},
            "waiting": self.reason(now),
            "attempts": self.engine.account.attempts[-_SHOWN:],
            "alarms": self.engine.account.alarms[-_SHOWN:],
            "outcome": self.outcome,
        }

    def write_status(self, now: float) -> None:
        """Refresh ``status.json``."""
        self._store.status(self.status(now))

    def close(self) -> None:
        """The process ends here: a run that is over for good has been told to its sites."""
        if self.over:
            self._store.close()

    # --- the operator -----------------------------------------------------------------------------------------------

    def wanted(self) -> Wanted:
        """What the operator asks for, as the database has it."""
        return self._store.wanted()

    def obey(self, wanted: Wanted, now: float) -> None:
        """Pause after the attempt in progress, go on, or stop at once: every site is told why."""
        self.engine.obey(wanted, now)


__all__ = ["PROTOCOL", "Coordinator"]
