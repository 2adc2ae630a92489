"""Prepared epochs: R0 and R1 once for R later rounds, whose online part is three messages (secagg.md §3.7).

An epoch has R slots, each with its own mask key, seed and shares; a round names its slot, and its own context
is still the salt of every key, so the model hash stays bound. A slot serves one attempt and is then gone;
slots are used in ascending order, and one that was passed over is gone too. They live in memory only: a site
that restarts says that it has lost them, and a new set-up follows. Two signed survivor sets of one slot would
need more than t signers twice, and an honest site signs for a slot once; so no slot ever opens two sums.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedsecure.errors import ProtocolError
from fedsecure.identity.roster import Roster
from fedsecure.secagg import keysetup, transcript
from fedsecure.secagg.client import SecAggClient, State
from fedsecure.secagg.descriptor import RoundDescriptor
from fedsecure.secagg.epoch_descriptor import PREFIX, EpochDescriptor
from fedsecure.secagg.graph import Graph
from fedsecure.secagg.keysetup import OwnKeys, SharePair, Slot
from fedsecure.secagg.latch import RoundLatch
from fedsecure.secagg.party import Party, broken
from fedsecure.wire import secagg_pb2 as pb


class EpochClient:
    """A site in one epoch: :meth:`advertise`, :meth:`shares`, :meth:`receive_shares`, then :meth:`round` up to R times.

    Args:
        descriptor: checked by :func:`fedsecure.secagg.policy.check_epoch` beforehand.
        site: own id.
        signing_key: own identity key.
        roster: own verified copy.
        latch: what survives a restart; the same one as for rounds.

    Raises:
        ProtocolError: FS-1336 not in the cohort, FS-1337 another roster, FS-1343 the key is not the roster's.
    """

    def __init__(
        self,
        descriptor: EpochDescriptor,
        *,
        site: str,
        signing_key: Ed25519PrivateKey,
        roster: Roster,
        latch: RoundLatch,
    ) -> None:
        self._party = Party(descriptor, site=site, signing_key=signing_key, roster=roster)
        self._index = descriptor.cohort.index(site) + 1
        self._descriptor, self._latch, self._site = descriptor, latch, site
        self._signing_key, self._roster = signing_key, roster
        self._state = State.NEW
        self._own: OwnKeys | None = None
        self._advertisements: dict[int, pb.Advertisement] = {}
        self._header = pb.ShareHeader()
        self._kept: list[SharePair] = []
        self._t1 = b""
        self._slots: dict[int, Slot] = {}
        self._next = 0

    @property
    def state(self) -> State:
        """``RECEIVED`` once the slots are ready."""
        return self._state

    @property
    def descriptor(self) -> EpochDescriptor:
        return self._descriptor

    @property
    def slots_left(self) -> int:
        """How many rounds can still be answered."""
        return len(self._slots)

    def advertise(self) -> bytes:
        """R0 of the set-up: R fresh mask keys and one cipher key, signed.

        Raises:
            ProtocolError: FS-1345 this epoch, or a later one, was begun before; FS-1320 called out of turn.
        """
        self._expect(State.NEW)
        d = self._descriptor
        try:
            self._latch.begin(d.latch_run, d.epoch, 0, d.ctx)
        except BaseException:
            self.abort()
            raise
        self._own = OwnKeys.fresh(self._index, d.slots)
        own = keysetup.advertise(self._party, self._own)
        self._advertisements = {self._index: own}
        self._state = State.ADVERTISED
        return pb.ClientMessage(advertisement=own).SerializeToString()

    def shares(self, message: bytes) -> bytes:
        """R1 of the set-up: 2R shares for every peer in one sealed message each; errors as in a round."""
        self._expect(State.ADVERTISED)
        try:
            out = self._make_shares(message)
        except BaseException:
            self.abort()
            raise
        self._state = State.SHARED
        return out

    def receive_shares(self, message: bytes) -> None:
        """Take the peers' shares: the slots are ready; errors as in a round."""
        self._expect(State.SHARED)
        try:
            self._take_shares(message)
        except BaseException:
            self.abort()
            raise
        self._state = State.RECEIVED

    def round(self, descriptor: RoundDescriptor) -> SecAggClient:
        """One attempt with the slot that the round names: the next call is its :meth:`SecAggClient.mask`.

        The slot is gone afterwards, whatever becomes of the attempt. A refused round leaves the slots as they are.

        Raises:
            ProtocolError: FS-1357 a round of another epoch or cohort, FS-1359 beyond the last slot, FS-1356 a slot
                that was used or passed over, FS-1345 an attempt that was begun before, FS-1358 the set-up is not
                complete or has ended.
        """
        d = self._descriptor
        d.require_fit(descriptor)
        if self._state is not State.RECEIVED:
            raise slots_lost(f"an epoch in state {self._state.value}")
        slot = self._slots.get(descriptor.slot)
        if slot is None:
            raise used(descriptor.slot, self._next)
        client = SecAggClient(
            descriptor, site=self._site, signing_key=self._signing_key, roster=self._roster, latch=self._latch
        )
        client.take_slot(slot)
        mark = hashlib.sha256(PREFIX + b"-slot\0" + descriptor.ctx).digest()
        try:
            # On disk too, so that not even a copied process answers twice with one slot.
            self._latch.begin(d.latch_run, d.epoch, descriptor.slot + 1, mark)
        except BaseException:
            client.abort()
            raise
        finally:
            self._next = descriptor.slot + 1
            for number in [n for n in self._slots if n < self._next]:
                passed = self._slots.pop(number)
                if number != descriptor.slot:
                    passed.seed[:] = bytes(len(passed.seed))
        return client

    def abort(self) -> None:
        """End the epoch for good and drop its secrets; attempts in progress keep their own slot."""
        self._state = State.ABORTED
        unused = [slot.seed for slot in self._slots.values()]
        for seed in [*unused, *(self._own.seeds if self._own else ())]:
            seed[:] = bytes(len(seed))
        self._slots.clear()
        self._own, self._kept = None, []

    def _expect(self, state: State) -> None:
        if self._state is not state:
            raise broken("FS-1320", f"a step out of turn in state {self._state.value}", f"state {state.value}")

    def _make_shares(self, raw: bytes) -> bytes:
        d = self._descriptor
        assert self._own is not None
        received = self._decode(raw, "advertisements").advertisements.advertisements
        own = self._advertisements[self._index]
        self._advertisements = keysetup.accept_advertisements(self._party, received, own=own, slots=d.slots)
        self._require_enough(len(self._advertisements), "advertisements")
        self._t1 = transcript.advertisements_hash(d.ctx, self._advertisements, d.slots)
        message, self._kept = keysetup.share_out(
            self._party,
            self._own,
            seal=self._seal,
            t1=self._t1,
            graph=Graph(tuple(sorted(self._advertisements))),
            threshold=d.threshold,
        )
        self._header = message.header
        return pb.ClientMessage(share_keys=message).SerializeToString()

    def _seal(self, peer: int, shares: Sequence[bytes]) -> bytes:
        assert self._own is not None
        public = self._advertisements[peer].cipher_key
        return keysetup.seal(self._party, self._own, peer=peer, public=public, t1=self._t1, shares=shares)

    def _unseal(self, peer: int, sealed: bytes) -> Sequence[bytes] | None:
        assert self._own is not None
        public = self._advertisements[peer].cipher_key
        return keysetup.unseal(self._party, self._own, peer=peer, public=public, t1=self._t1, sealed=sealed)

    def _take_shares(self, raw: bytes) -> None:
        d, own = self._descriptor, self._own
        assert own is not None
        message = self._decode(raw, "routed_shares").routed_shares
        headers = keysetup.accept_headers(
            self._party,
            message.headers,
            own=self._header,
            t1=self._t1,
            allowed=self._advertisements,
            slots=d.slots,
        )
        self._require_enough(len(headers), "share headers")
        senders = set(headers) - {self._index}
        shares, invalid = keysetup.open_shares(message.shares, index=self._index, senders=senders, unseal=self._unseal)
        shares[self._index] = self._kept
        t2 = transcript.headers_hash(d.ctx, headers, d.slots)
        public = {i: keysetup.split_keys(ad.mask_key) for i, ad in self._advertisements.items()}
        for number in range(d.slots):
            self._slots[number] = Slot(
                mask_key=own.mask_keys[number],
                seed=own.seeds[number],
                peer_keys={i: keys[number] for i, keys in public.items()},
                members=tuple(sorted(headers)),
                shares={owner: held[number] for owner, held in shares.items()},
                invalid=invalid,
                t1=self._t1,
                t2=t2,
            )
        self._own, self._kept = None, []

    def _require_enough(self, count: int, what: str) -> None:
        if count < self._descriptor.min_survivors:
            raise broken("FS-1344", f"{count} {what}", f"at least {self._descriptor.min_survivors}")

    def _decode(self, raw: bytes, kind: str) -> pb.ServerMessage:
        d = self._descriptor
        message = transcript.decode(pb.ServerMessage, raw, sites=len(d.cohort), slots=d.slots)
        if message.WhichOneof("kind") != kind:
            raise transcript.malformed(f"a message of kind {message.WhichOneof('kind')}, not {kind}")
        return message


class Epochs:
    """A site's epochs in this process: one for each run, as the latch counts them; a later one replaces it.

    Args:
        site, signing_key, roster, latch: as for :class:`EpochClient`.
    """

    def __init__(self, *, site: str, signing_key: Ed25519PrivateKey, roster: Roster, latch: RoundLatch) -> None:
        self._site, self._signing_key, self._roster, self._latch = site, signing_key, roster, latch
        self._epochs: dict[bytes, EpochClient] = {}

    def set_up(self, descriptor: EpochDescriptor) -> EpochClient:
        """Begin an epoch; the earlier one of the same run ends here.

        Raises:
            ProtocolError: FS-1345 not a later epoch than the one there is, which stays as it was; else as
                :class:`EpochClient`.
        """
        earlier = self._epochs.get(descriptor.run_id)
        if earlier is not None and descriptor.epoch <= earlier.descriptor.epoch:
            found = f"epoch {descriptor.epoch} after epoch {earlier.descriptor.epoch}"
            raise broken("FS-1345", found, "a later epoch: one that has begun is never begun again")
        client = EpochClient(
            descriptor, site=self._site, signing_key=self._signing_key, roster=self._roster, latch=self._latch
        )
        if earlier is not None:
            earlier.abort()
        self._epochs[descriptor.run_id] = client
        return client

    def round(self, descriptor: RoundDescriptor) -> SecAggClient:
        """A round's state machine, ready to mask; FS-1358 where this process has no slots of its epoch."""
        epoch = self._epochs.get(descriptor.run_id)
        if epoch is None or epoch.descriptor.ctx != descriptor.epoch:
            raise slots_lost("a round of an epoch that this process has not set up")
        return epoch.round(descriptor)

    def abort(self) -> None:
        """End all epochs and drop their secrets."""
        for epoch in self._epochs.values():
            epoch.abort()
        self._epochs.clear()


def slots_lost(found: str) -> ProtocolError:
    """FS-1358: prepared keys are not there, as after a restart."""
    return ProtocolError(
        "FS-1358",
        found,
        expected="key slots in memory; a restart loses them",
        cure="none needed: the aggregator sets up a new epoch",
    )


def used(slot: int, following: int) -> ProtocolError:
    """FS-1356: a slot serves one attempt, ever."""
    return ProtocolError(
        "FS-1356",
        f"slot {slot}, which was used or passed over",
        expected=f"slot {following} or a later one",
        cure="go on with the next slot; asking twice for one is an attack or a fault at the aggregator",
    )
