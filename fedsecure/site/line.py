"""A site's line to the aggregator: one session, numbered directives in, messages out, and a pulse beside them.

The site dials out only. Every wait is bounded and says what for; what the aggregator says is shown without control
characters.
"""

from __future__ import annotations

import logging
import math
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from fedsecure.errors import FedsecureError, ProtocolError, RoundAborted, RunError
from fedsecure.methods.base import Tensor
from fedsecure.secagg.client import MaskedInput
from fedsecure.transport.base import Transport
from fedsecure.transport.status import printable
from fedsecure.transport.tensors import check_like, unpack_tensor
from fedsecure.wire import federation_pb2 as pb

log = logging.getLogger("fedsecure.client")
_Reply = TypeVar("_Reply")
PROTOCOL = 1
GOODBYE_SECONDS = 2.0
# New sessions that one call may take.
_SESSIONS = 5
# The attempt, or its phase, is over at the aggregator: what becomes of it comes as the next directive.
_OVER = ("FS-1325", "FS-1706")
# Reasons that have nothing to do with any record, so others may hear them.
_PUBLIC_REASONS = ("FS-10", "FS-120", "FS-122", "FS-1270", "FS-1273", "FS-13", "FS-14")
# But for these, which are about values or patients.
_PRIVATE_REASONS = ("FS-1207", "FS-1229")


@dataclass(frozen=True, slots=True)
class Moment:
    """A sign of progress for whoever shows it: what is going on, and how far the run is."""

    what: str
    round: int = 0
    rounds: int = 0


Progress = Callable[[Moment], None]


@dataclass(slots=True)
class _Place:
    """Where a session is: its token, and the number of the last directive taken."""

    session: bytes
    seen: int = 0


class Line:
    """One process's session; another one of the same run where an aggregator that was restarted knows none any more.

    Args:
        transport: how to reach the aggregator.
        wait_seconds: longest time in which neither a directive of use comes nor the run moves.
        progress: called with a :class:`Moment` while waiting.
        federation: which run is meant, where the aggregator serves several; empty for the only one.
    """

    def __init__(self, transport: Transport, *, wait_seconds: float, progress: Progress, federation: str = "") -> None:
        self.transport = transport
        self._wait_seconds = wait_seconds
        self._progress = progress
        self._federation = federation
        self._place = _Place(os.urandom(16))
        self._welcome: pb.JoinReply | None = None
        self._roster_hash = b""
        self._held: pb.Directive | None = None
        self._position = ""
        self._moved = -math.inf
        self._left = False
        self._pulse = threading.Event()
        self._joining = threading.Lock()
        self._elsewhere: RunError | None = None

    # --- the session ------------------------------------------------------------------------------------------------

    def join(self, roster_hash: bytes) -> pb.JoinReply:
        """Open the session; raises what the aggregator answers."""
        self._roster_hash = roster_hash
        self._welcome = self._ask_to_join(self._place.session)
        return self._welcome

    def start_pulse(self) -> None:
        """Beat from a thread of its own until the session ends."""
        stop = self._pulse

        def beat() -> None:
            while not stop.is_set():
                try:
                    self._again(lambda place: self.transport.beat(pb.BeatRequest(session=place.session)))
                except (FedsecureError, ValueError):
                    stop.wait(1.0)

        threading.Thread(target=beat, name="fedsecure-pulse", daemon=True).start()

    def say_why(self, error: BaseException) -> None:
        """Tells the aggregator, and so the other sites, that this site leaves; a code, and only a public one."""
        public = isinstance(error, FedsecureError) and error.code.startswith(_PUBLIC_REASONS)
        if isinstance(error, FedsecureError) and public and error.code not in _PRIVATE_REASONS:
            self.leave(error.code)

    def leave(self, code: str) -> None:
        """Frees the session for this site's next process, and lets the others go on without it; once."""
        if self._welcome is None or self._left:
            return
        self._left = True
        self._pulse.set()

        def goodbye() -> None:
            try:
                self.transport.beat(pb.BeatRequest(session=self._place.session, leaving=code))
            except (FedsecureError, ValueError):
                log.info("the aggregator was not told")

        # An aggregator that is gone must not keep a site that wants to leave.
        told = threading.Thread(target=goodbye, name="fedsecure-goodbye", daemon=True)
        told.start()
        told.join(GOODBYE_SECONDS)

    def farewell(self) -> None:
        """Tells the aggregator that the end was heard."""
        self._pulse.set()
        try:
            place = self._place
            self.transport.next(pb.NextRequest(session=place.session, after=place.seen))
        except FedsecureError:
            log.info("the aggregator left first")

    def close(self) -> None:
        """Stop the pulse and close the transport."""
        self._pulse.set()
        self.transport.close()

    def _ask_to_join(self, session: bytes) -> pb.JoinReply:
        return self.transport.join(
            pb.JoinRequest(
                protocol=PROTOCOL,
                session=session,
                roster_hash=self._roster_hash,
                software="fedsecure",
                federation=self._federation,
            )
        )

    def _again(self, call: Callable[[_Place], _Reply]) -> _Reply:
        """A call of this session; where an aggregator that was restarted knows none, of a new one in the same run.

        An aggregator can be restarted again while the second call is on its way, so one new session may not be enough.
        """
        for _ in range(_SESSIONS):
            place = self._place
            try:
                return call(place)
            except RunError as error:
                if error.code != "FS-1705" or self._welcome is None or self._left:
                    raise
                self._join_again(place, self._welcome)
        return call(self._place)

    def _join_again(self, lost: _Place, welcome: pb.JoinReply) -> None:
        """A new session in the same run, once for all threads.

        Raises:
            RunError: FS-1737 the aggregator serves another run now, or other settings.
        """
        with self._joining:
            if self._elsewhere is not None:
                raise self._elsewhere
            if self._place is lost:
                session = os.urandom(16)
                reply = self._ask_to_join(session)
                if (reply.run, reply.settings_json) != (welcome.run, welcome.settings_json):
                    self._elsewhere = RunError(
                        "FS-1737",
                        "the aggregator was restarted and serves another run now",
                        expected=f"run {welcome.run.hex()[:8]}, which this site has joined",
                        cure="join again; what was charged stays charged",
                    )
                    # That run must not wait for a session nobody has.
                    self.transport.beat(pb.BeatRequest(session=session, leaving=self._elsewhere.code))
                    raise self._elsewhere
                log.info("joined again: the aggregator was restarted")
                self._place = _Place(session)

    def _ask_next(self, place: _Place) -> tuple[_Place, pb.Directive]:
        return place, self.transport.next(pb.NextRequest(session=place.session, after=place.seen))

    # --- what comes -------------------------------------------------------------------------------------------------

    def deadline(self) -> float:
        """Until when to wait, from now on."""
        return time.monotonic() + self._wait_seconds

    def next(self, give_up: float) -> pb.Directive:
        """The next directive; waits say what for, and end at ``give_up``, or later where the run moves meanwhile.

        Raises:
            ProtocolError: FS-1375 a directive out of order, or of no kind.
            RunError: FS-1711 nothing of use came, and nothing moved.
        """
        if self._held is not None:
            held, self._held = self._held, None
            return held
        reason = "the aggregator sends nothing of use"
        while time.monotonic() <= max(give_up, self._moved + self._wait_seconds):
            place, directive = self._again(self._ask_next)
            kind = directive.WhichOneof("kind")
            if kind == "wait":
                reason = printable(directive.wait.reason)
                if directive.wait.position != self._position:
                    self._position, self._moved = directive.wait.position, time.monotonic()
                self._progress(Moment(reason))
                continue
            if kind is None or directive.sequence <= place.seen:
                raise ProtocolError(
                    "FS-1375",
                    f"directive {directive.sequence} of kind {kind} after directive {place.seen}",
                    expected="a directive of this release with the next number",
                    cure="install the same fedsecure release on both sides",
                )
            place.seen = directive.sequence
            return directive
        raise RunError(
            "FS-1711",
            f"nothing to do, and the run has not moved for {self._wait_seconds:g} s: {reason}",
            expected="a question, or a run that moves, within wait_seconds",
            cure="see the named sites, or raise wait_seconds",
        )

    def relay(self, ctx: bytes, phase: str) -> bytes:
        """The aggregator's broadcast of a phase of this attempt.

        Raises:
            RoundAborted: FS-1360 the aggregator aborts the attempt, FS-1361 it goes on without it.
        """
        give_up = self.deadline()
        while True:
            directive = self.next(give_up)
            kind = directive.WhichOneof("kind")
            if kind == "relay" and directive.relay.ctx == ctx and directive.relay.phase == phase:
                return bytes(directive.relay.payload)
            if kind == "abort" and directive.abort.ctx == ctx:
                raise RoundAborted(
                    "FS-1360",
                    printable(directive.abort.reason),
                    expected="a round that ends with a sum",
                    cure="none needed; the next attempt uses new keys and is charged anew",
                )
            if kind in ("ask", "prepare", "finished"):
                self._held = directive
                raise RoundAborted(
                    "FS-1361",
                    "the aggregator went on without finishing this attempt",
                    expected="the messages of one attempt in order",
                    cure="none needed",
                )

    def fetch(self, hashes: Mapping[str, bytes], like: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Broadcast tensors by hash, of the types and shapes of ``like``; the names are equal already.

        Raises:
            ProtocolError: FS-1374 other bytes than the hash says, another type or shape, or values not finite.
        """
        tensors = {}
        for name, digest in hashes.items():
            blob = self._again(partial(self._fetch, digest))
            tensors[name] = unpack_tensor(name, digest, blob)
            check_like(name, tensors[name], like[name])
        return tensors

    def _fetch(self, digest: bytes, place: _Place) -> bytes:
        return self.transport.fetch(pb.FetchRequest(session=place.session, digest=digest))

    # --- what goes --------------------------------------------------------------------------------------------------

    def send(self, ctx: bytes, payload: bytes) -> None:
        """A small protocol message."""
        with over_at_the_aggregator(*_OVER):
            self._again(
                lambda place: self.transport.send(pb.PhaseMessage(session=place.session, ctx=ctx, payload=payload))
            )

    def upload(self, ctx: bytes, sealed: MaskedInput) -> None:
        """The masked vector, with its signed header."""
        payload = memoryview(sealed.payload).cast("B")

        def upload(place: _Place) -> None:
            header = pb.UploadHeader(session=place.session, ctx=ctx, header=sealed.header, size=len(payload))
            self.transport.upload(header, payload)

        with over_at_the_aggregator(*_OVER):
            self._again(upload)


@contextmanager
def over_at_the_aggregator(*codes: str, aborts: bool = False) -> Iterator[None]:
    """Some refusals only say that the aggregator is further on.

    A message may have been counted although its reply was lost, or have come too late: the next directive tells which.
    Where there is nothing to go on with (``aborts``), the attempt ends here.
    """
    try:
        yield
    except (RunError, ProtocolError) as error:
        if error.code not in codes:
            raise
        if aborts:
            raise lost(error) from error
        log.info("the aggregator is further on: %s", error.found)


def lost(error: FedsecureError) -> RoundAborted:
    """The attempt goes on without this site, for the reason given: no failure, the next one follows (FS-1362)."""
    return RoundAborted("FS-1362", error.found, expected=error.expected, cure=error.cure)
