"""The aggregator's side of a prepared epoch: sets the keys up once and opens a round for each slot (secagg.md §3.7)."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedsecure.errors import RoundAborted
from fedsecure.identity.roster import Roster
from fedsecure.secagg import transcript
from fedsecure.secagg.collection import KeyCollection, PublicKeys
from fedsecure.secagg.descriptor import RoundDescriptor
from fedsecure.secagg.epoch import slots_lost, used
from fedsecure.secagg.epoch_descriptor import EpochDescriptor
from fedsecure.secagg.inbox import Inbox
from fedsecure.secagg.party import Party, broken
from fedsecure.secagg.phases import ABORTS, Phase
from fedsecure.secagg.server import SecAggServer
from fedsecure.secagg.spool import Spool


class EpochServer:
    """One epoch: phases ``ADVERTISE`` and ``SHARES`` as in a round, then ``DONE``: :meth:`round` up to R times.

    Args:
        descriptor: the epoch.
        roster: verified.
        signing_key: the aggregator's identity key.

    Raises:
        ProtocolError: FS-1337 another roster, FS-1343 the key is not the roster's.
    """

    def __init__(self, descriptor: EpochDescriptor, *, roster: Roster, signing_key: Ed25519PrivateKey) -> None:
        self._party = Party(descriptor, site=None, signing_key=signing_key, roster=roster)
        self._descriptor, self._roster, self._signing_key = descriptor, roster, signing_key
        self._inbox = Inbox(self._party, descriptor.slots)
        self._collection = KeyCollection(descriptor, self._party)
        self._next = 0

    @property
    def phase(self) -> Phase:
        return self._inbox.phase

    @property
    def ctx(self) -> bytes:
        return self._descriptor.ctx

    @property
    def descriptor(self) -> EpochDescriptor:
        return self._descriptor

    @property
    def next_slot(self) -> int | None:
        """The slot for the next attempt; ``None`` where none is left or the set-up is not complete."""
        ready = self.phase is Phase.DONE and self._next < self._descriptor.slots
        return self._next if ready else None

    @property
    def members(self) -> tuple[str, ...]:
        """U2: the sites that hold slots, in protocol order."""
        return self._party.names(sorted(self._collection.headers)) if self.phase is Phase.DONE else ()

    def serves(self, cohort: tuple[str, ...], alive: Collection[str]) -> bool:
        """Whether the next attempt of ``cohort`` can use this epoch: a slot is left, and enough members are there.

        ``alive`` holds the sites that are there and have not restarted since the set-up.
        """
        enough = len(set(self.members) & set(alive)) >= self._descriptor.min_survivors
        return cohort == self._descriptor.cohort and self.next_slot is not None and enough

    def receive(self, site: str, message: bytes) -> bool:
        """Take a message of the set-up; returns and errors as :meth:`SecAggServer.receive`."""
        index = self._inbox.sender(site)
        envelope = self._inbox.decode(message)
        kind = envelope.WhichOneof("kind")
        phase = {"advertisement": Phase.ADVERTISE, "share_keys": Phase.SHARES}.get(kind or "")
        if phase is None:
            raise transcript.malformed(f"a message of kind {kind} in the set-up of an epoch")
        if self._inbox.is_repeat(phase, index, message):
            return False
        first = phase is Phase.ADVERTISE
        said = envelope.advertisement.index if first else envelope.share_keys.header.index
        if said != index:
            raise broken("FS-1322", f"site number {said} from {site!r}", f"number {index}")
        if first:
            self._collection.take_advertisement(index, envelope.advertisement)
        else:
            self._collection.take_shares(index, envelope.share_keys)
        self._inbox.remember(index, message)
        return True

    def waiting_for(self) -> tuple[str, ...]:
        """Sites whose message of this phase has not come, in protocol order."""
        return () if self.phase in (Phase.DONE, Phase.ABORTED) else self._inbox.waiting_for()

    def waits(self, alive: Callable[[str], bool]) -> bool:
        """Whether one of them is ``alive``; asked after every message, so mostly of the first of them only."""
        return self.phase not in (Phase.DONE, Phase.ABORTED) and any(map(alive, self._inbox.missing()))

    def can_close(self) -> bool:
        """Whether enough messages have come for the set-up to go on without the rest."""
        return self.phase in ABORTS and self._inbox.count >= self._descriptor.min_survivors

    def close(self) -> Mapping[str, bytes]:
        """Close this phase; returns site → message. After ``SHARES`` the epoch is ready.

        Raises:
            RoundAborted: FS-1350, FS-1351 too few messages; the epoch is over.
            ProtocolError: FS-1320 there is no phase to close.
        """
        phase = self.phase
        if phase not in ABORTS:
            raise broken("FS-1320", f"closing phase {phase.value} of an epoch", "phase advertise or shares")
        if not self.can_close():
            count, missing = self._inbox.count, ", ".join(self.waiting_for())
            self.abort()
            raise RoundAborted(
                ABORTS[phase],
                f"{count} of {self._descriptor.min_survivors} needed in phase {phase.value}; missing: {missing}",
                expected=f"messages of at least {self._descriptor.min_survivors} sites",
                cure="bring the missing sites back; the next set-up uses new keys",
            )
        if phase is Phase.ADVERTISE:
            message = self._collection.close_advertise()
            self._inbox.open(Phase.SHARES, self._collection.advertisements)
            return self._inbox.to_all(message)
        routed = self._collection.close_shares()
        self._inbox.open(Phase.DONE, ())
        return routed

    def round(self, descriptor: RoundDescriptor, *, spool: Spool) -> SecAggServer:
        """One attempt with the slot that the round names; it begins in phase ``MASKED``.

        Raises:
            ProtocolError: FS-1357 a round of another epoch or cohort, FS-1359 beyond the last slot, FS-1356 a slot
                that was used or passed over, FS-1358 the set-up is not complete or has ended.
        """
        self._descriptor.require_fit(descriptor)
        if self.phase is not Phase.DONE:
            raise slots_lost(f"an epoch in phase {self.phase.value}")
        if descriptor.slot < self._next:
            raise used(descriptor.slot, self._next)
        self._next = descriptor.slot + 1
        return self._serve(descriptor, spool, self._collection.public_keys(descriptor.slot))

    def _serve(self, descriptor: RoundDescriptor, spool: Spool, keys: PublicKeys) -> SecAggServer:
        return SecAggServer(descriptor, roster=self._roster, signing_key=self._signing_key, spool=spool, keys=keys)

    def abort(self) -> None:
        """End the epoch; rounds in progress go on."""
        self._inbox.phase = Phase.ABORTED
        self._collection.clear()
