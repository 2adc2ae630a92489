"""Which message of which phase has come from whom: repeats change nothing, contradictions and messages out of their
phase are refused (secagg.md §3.3)."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from fedsecure.secagg import transcript
from fedsecure.secagg.party import Party, broken
from fedsecure.secagg.phases import ORDER, Phase
from fedsecure.wire import secagg_pb2 as pb


@dataclass(slots=True)
class Inbox:
    """The aggregator's record of accepted messages.

    Attributes:
        party: the aggregator in this context.
        slots: of the set-up; bounds a message's size.
        phase: what is being collected.
        expected: who may still speak in this phase.
    """

    party: Party
    slots: int = 1
    phase: Phase = Phase.ADVERTISE
    expected: tuple[int, ...] = ()
    _seen: dict[tuple[Phase, int], bytes] = field(default_factory=dict)  # digests
    _index: dict[str, int] = field(default_factory=dict)
    _missing: dict[int, None] = field(default_factory=dict)  # of this phase, in order

    def __post_init__(self) -> None:
        self._index = {site: index for index, site in enumerate(self.party.cohort, start=1)}
        self.open(self.phase, self.party.keys)

    def sender(self, site: str) -> int:
        """Protocol index of an authenticated sender; FS-1322 where it is not in the cohort."""
        index = self._index.get(site)
        if index is None:
            raise broken("FS-1322", f"a message from {site!r}", "a site of the cohort")
        return index

    def decode(self, message: bytes) -> pb.ClientMessage:
        """FS-1321 where it is malformed."""
        return transcript.decode(pb.ClientMessage, message, sites=len(self.party.keys), slots=self.slots)

    def is_repeat(self, phase: Phase, index: int, message: bytes) -> bool:
        """Whether these bytes were accepted before; refuses what contradicts them or is out of its phase."""
        earlier = self._seen.get((phase, index))
        if earlier == hashlib.sha256(message).digest():
            return True
        site = self.party.cohort[index - 1]
        if earlier is not None:
            raise broken("FS-1324", f"a second, different message from {site!r}", "one message a phase")
        if phase is not self.phase:
            late = ORDER.index(phase) < ORDER.index(self.phase)
            code, word = ("FS-1325", "after") if late else ("FS-1320", "before")
            raise broken(code, f"a {phase.value} message {word} its phase", f"phase {self.phase.value}")
        if index not in self.expected:
            raise broken("FS-1325", f"{site!r}, which has dropped out", "sites still in the round")
        return False

    def remember(self, index: int, message: bytes) -> None:
        """Note that a message of this phase is accepted."""
        self._seen[self.phase, index] = hashlib.sha256(message).digest()
        self._missing.pop(index, None)

    @property
    def count(self) -> int:
        """Messages of this phase so far."""
        return len(self.expected) - len(self._missing)

    def missing(self) -> Iterator[str]:
        """Sites whose message of this phase has not come, in protocol order, one by one."""
        return (self.party.cohort[index - 1] for index in self._missing)

    def waiting_for(self) -> tuple[str, ...]:
        """The same, all of them."""
        return tuple(self.missing())

    def open(self, phase: Phase, members: Iterable[int]) -> None:
        """Begin a phase in which ``members`` may speak."""
        self.phase, self.expected = phase, tuple(sorted(members))
        self._missing = dict.fromkeys(self.expected)

    def to_all(self, message: pb.ServerMessage) -> Mapping[str, bytes]:
        """The same bytes for everybody who may speak next."""
        return dict.fromkeys(self.party.names(self.expected), message.SerializeToString())
