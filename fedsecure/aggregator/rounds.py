"""One attempt of one round: drives the secure-aggregation server through its phases.

No clock and no sockets: time comes in as an argument, directives go out as return values. A phase ends when every site
still there has answered, or when its time is up; below the protocol's bound the attempt is aborted with the reason.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from fedsecure.config import RoundsConfig
from fedsecure.errors import ProtocolError, RoundAborted, RunError
from fedsecure.messages import Aggregate, Query
from fedsecure.privacy.grid import from_grid
from fedsecure.secagg.descriptor import RoundDescriptor
from fedsecure.secagg.epoch_server import EpochServer
from fedsecure.secagg.server import Phase, SecAggResult, SecAggServer
from fedsecure.secagg.spool import Spool


@dataclass(frozen=True, slots=True)
class Step:
    """What an attempt wants done next: relays to sites, and the result once there is one."""

    phase: str
    relays: Mapping[str, bytes]
    result: SecAggResult | None = None


class Attempt:
    """One attempt; thrown away when it ends, with all its keys."""

    def __init__(
        self,
        query: Query,
        descriptor: RoundDescriptor,
        *,
        server: SecAggServer,
        waits: RoundsConfig,
        now: float,
    ) -> None:
        self.query = query
        self.ctx = descriptor.ctx
        self.started = now
        self._server = server
        self._waits = waits
        self._no_room: ProtocolError | None = None
        prepared = server.phase is Phase.MASKED
        self._deadline = now + (waits.training_seconds if prepared else waits.phase_seconds)

    @property
    def phase(self) -> Phase:
        return self._server.phase

    def waiting_for(self) -> tuple[str, ...]:
        return self._server.waiting_for()

    def receive(self, site: str, message: bytes) -> None:
        """A small message of the current phase; raises ``ProtocolError``."""
        self._server.receive(site, message)

    def buffer(self, site: str, header: bytes) -> memoryview | None:
        """Room for the vector of a signed header; None where it is counted already; raises ``ProtocolError``.

        Raises:
            RunError: FS-1706 the aggregator's own disk has no room. That is no fault of the site's, and it does not
                leave over it: the attempt ends, and the site hears why as all others do.
        """
        try:
            return self._server.buffer(site, header)
        except ProtocolError as error:
            if error.code != "FS-1349":
                raise
            self._no_room = error
            raise RunError(
                "FS-1706",
                "the attempt is over: the aggregator has no room for uploads",
                expected="room for a vector of each site",
                cure="none needed; the next attempt brings new keys",
            ) from error

    def receive_masked(self, site: str, header: bytes, payload: memoryview | bytes) -> None:
        """A whole masked vector; raises ``ProtocolError``."""
        self._server.receive_masked(site, header, payload)

    def advance(self, now: float, alive: Callable[[str], bool]) -> Step | None:
        """End the phase if it is ripe.

        Args:
            now: the time.
            alive: whether a site is still there, and still in this attempt.

        Raises:
            RoundAborted: too few sites are left; names who is missing.
            ProtocolError: FS-1349 there was no room for an upload.
        """
        if self._no_room is not None:
            raise self._no_room
        if now < self._deadline and self._server.waits(alive):
            return None
        if self._server.phase is Phase.UNMASK:
            result = self._server.finish()
            relays = dict.fromkeys(result.survivors, result.result_message)
            return Step("result", relays, result)
        relays = dict(self._server.close())
        masked = self._server.phase is Phase.MASKED
        self._deadline = now + (self._waits.training_seconds if masked else self._waits.phase_seconds)
        return Step(self._server.phase.name.lower(), relays)

    def abort(self) -> None:
        self._server.abort()


class SetUp:
    """The set-up of an epoch: keys for the next rounds of one cohort, in the two phases that those rounds then save."""

    def __init__(self, server: EpochServer, *, tokens: Mapping[str, bytes], waits: RoundsConfig, now: float) -> None:
        self.ctx = server.ctx
        self.started = now
        self._server = server
        self._tokens = tokens
        self._waits = waits
        self._deadline = now + waits.phase_seconds

    @property
    def phase(self) -> Phase:
        return self._server.phase

    @property
    def cohort(self) -> tuple[str, ...]:
        return self._server.descriptor.cohort

    def waiting_for(self) -> tuple[str, ...]:
        return self._server.waiting_for()

    def receive(self, site: str, message: bytes) -> None:
        """A message of the set-up; raises ``ProtocolError``."""
        self._server.receive(site, message)

    def advance(self, now: float, alive: Callable[[str], bool]) -> Step | None:
        """End the phase if it is ripe; the last step has phase ``"done"``. As :meth:`Attempt.advance` otherwise.

        Raises:
            RoundAborted: too few sites are left; or FS-1363, too few of those that shared keys: a set-up that can serve
                nobody counts as a failed attempt, so the run does not set up keys for ever.
        """
        if now < self._deadline and self._server.waits(alive):
            return None
        relays = dict(self._server.close())
        if self.phase is Phase.DONE:
            self._require_holders(alive)
        self._deadline = now + self._waits.phase_seconds
        return Step(self._server.phase.name.lower(), relays)

    def serves(self, cohort: tuple[str, ...], present: Mapping[str, bytes]) -> bool:
        """Whether the next attempt can use these keys.

        Args:
            cohort: of the attempt.
            present: site → session of those that are there. One that came, or came back, since the set-up has no keys,
                and gets them by a new one, but not before these keys have served once: a site that comes back again and
                again cannot keep the run at setting up keys. One that was there and did not answer waits for the next.
        """
        newcomers = [site for site, token in present.items() if self._tokens.get(site) != token]
        holders = [site for site in self._server.members if present.get(site) == self._tokens[site]]
        return (self._server.next_slot == 0 or not newcomers) and self._server.serves(cohort, holders)

    def _require_holders(self, alive: Callable[[str], bool]) -> None:
        gone = [site for site in self.holders if not alive(site)]
        left, needed = len(self.holders) - len(gone), self._server.descriptor.min_survivors
        if left < needed:
            raise RoundAborted(
                "FS-1363",
                f"{left} of {needed} needed still hold the keys just set up; gone: {', '.join(gone)}",
                expected=f"keys at {needed} sites at least",
                cure="bring the missing sites back; the next set-up uses new keys",
            )

    @property
    def holders(self) -> tuple[str, ...]:
        """Sites that hold keys, once the set-up is done."""
        return self._server.members

    def slot(self) -> int:
        """The slot of the next attempt."""
        slot = self._server.next_slot
        assert slot is not None
        return slot

    def round(self, descriptor: RoundDescriptor, *, spool: Spool) -> SecAggServer:
        """The next attempt, ready for masked vectors."""
        return self._server.round(descriptor, spool=spool)

    def abort(self) -> None:
        self._server.abort()


def decode(query: Query, result: SecAggResult) -> Aggregate:
    """The lifted integer sum as real numbers, segment by segment."""
    values = {}
    offset = 0
    for segment in query.segments:
        values[segment.name] = from_grid(result.total[offset : offset + segment.length], segment)
        offset += segment.length
    return Aggregate(values=values, survivors=len(result.survivors), asked=query.cohort)


__all__ = ["Attempt", "RoundAborted", "SetUp", "Step", "decode"]
