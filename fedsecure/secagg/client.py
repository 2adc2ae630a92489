"""A site's side of one attempt of one round, phases R0 to R4, as a state machine without I/O (secagg.md
§3.3).

One state, one legal next message. A message of the right kind with wrong content ends the attempt for good
and wipes its secrets; a call out of turn is refused and changes nothing. Which kind of share of a peer to
give away is computed here from the signed survivor set, never read from the server. Secrets live in memory
only.
"""

from __future__ import annotations

import enum
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from fedsecure.identity import keys as identity_keys
from fedsecure.identity.roster import Roster
from fedsecure.messages import RingArray
from fedsecure.secagg import keys, keysetup, prg, ring, shamir, transcript
from fedsecure.secagg.descriptor import RoundDescriptor
from fedsecure.secagg.graph import Graph, ring_seed
from fedsecure.secagg.keysetup import Slot
from fedsecure.secagg.latch import RoundLatch
from fedsecure.secagg.party import Party, broken
from fedsecure.secagg.thresholds import Mode
from fedsecure.wire import secagg_pb2 as pb

_Result = TypeVar("_Result")


class State(enum.Enum):
    """What the site has done last."""

    NEW = "new"
    ADVERTISED = "advertised"
    SHARED = "shared"
    RECEIVED = "received"
    MASKED = "masked"
    SIGNED = "signed"
    UNMASKED = "unmasked"
    DONE = "done"
    ABORTED = "aborted"


@dataclass(frozen=True, slots=True)
class MaskedInput:
    """R2: the signed header, the masked vector as little-endian ring words (b/8·d bytes), and its hash."""

    header: bytes
    payload: memoryview
    root: bytes


class SecAggClient:
    """One site in one attempt. Call the methods in the order they stand here.

    Args:
        descriptor: checked by :func:`fedsecure.secagg.policy.check` beforehand.
        site: own id.
        signing_key: own identity key.
        roster: own verified copy.
        latch: what survives a restart.

    Raises:
        ProtocolError: FS-1336 not in the cohort, FS-1337 another roster, FS-1343 the key is not the roster's.
    """

    def __init__(
        self,
        descriptor: RoundDescriptor,
        *,
        site: str,
        signing_key: Ed25519PrivateKey,
        roster: Roster,
        latch: RoundLatch,
    ) -> None:
        self._party = Party(descriptor, site=site, signing_key=signing_key, roster=roster)
        self._index = descriptor.index(site)
        self._descriptor, self._ctx, self._latch = descriptor, descriptor.ctx, latch
        self._state = State.NEW
        self._cipher_key: X25519PrivateKey | None = None
        self._mask_key: X25519PrivateKey | None = None
        self._seed: bytearray | None = None
        self._advertisements: dict[int, pb.Advertisement] = {}
        self._own_header = pb.ShareHeader()
        self._peer_keys: dict[int, bytes] = {}  # s_pub
        self._graph = Graph(())
        self._members: tuple[int, ...] = ()  # U2, or the neighbourhood in it
        self._strangers: frozenset[int] = frozenset()  # U1 beyond the neighbourhood
        self._survivors: tuple[int, ...] = ()  # U3
        self._shares: dict[int, tuple[bytes, bytes]] = {}  # owner → (of s, of b)
        self._invalid: tuple[int, ...] = ()
        self._t1 = self._t2 = b""

    @property
    def state(self) -> State:
        return self._state

    @property
    def ctx(self) -> bytes:
        return self._ctx

    def take_slot(self, slot: Slot) -> None:
        """Instead of R0 and R1: begin the attempt with a slot of an epoch (secagg.md §3.7); mask next.

        Only :class:`fedsecure.secagg.epoch.EpochClient` calls this: it never gives out a slot twice.

        Raises:
            ProtocolError: FS-1345 the attempt, or a later one, has begun before; FS-1320 called out of turn.
        """
        self._step(State.NEW, State.RECEIVED, lambda: self._take_slot(slot))

    def advertise(self) -> bytes:
        """R0: begin the attempt with two fresh keys; returns the signed advertisement.

        Raises:
            ProtocolError: FS-1345 the attempt, or a later one, has begun before; FS-1320 called out of turn.
        """
        return self._step(State.NEW, State.ADVERTISED, self._advertise)

    def shares(self, message: bytes) -> bytes:
        """R1: check everybody's advertisements; returns sealed shares of the own two secrets for every peer.

        Raises:
            ProtocolError: FS-1321 malformed, FS-1323 signature, FS-1326 own advertisement altered, FS-1327
                repeated or weak keys, FS-1344 too few sites.
        """
        return self._step(State.ADVERTISED, State.SHARED, lambda: self._make_shares(message))

    def receive_shares(self, message: bytes) -> None:
        """R2, first half: take the peers' shares. One that does not open is reported, and is not fatal.

        Raises:
            ProtocolError: FS-1321, FS-1323, FS-1326 a peer saw other advertisements, FS-1344.
        """
        self._step(State.SHARED, State.RECEIVED, lambda: self._take_shares(message))

    def mask(self, vector: RingArray) -> MaskedInput:
        """R2, second half: mask ``vector`` (d words of uint32 or uint16, as the ring says; not changed).

        Raises:
            ProtocolError: FS-1303 the vector is not of the ring's words, or not of length d.
        """
        return self._step(State.RECEIVED, State.MASKED, lambda: self._mask(vector))

    def sign_survivors(self, message: bytes) -> bytes:
        """R3 (ACTIVE): sign the survivor set, once per context, ever.

        Raises:
            ProtocolError: FS-1328 the set is too small, holds strangers or lacks this site; FS-1346 signed
            before.
        """
        if self._descriptor.mode is not Mode.ACTIVE:
            raise broken("FS-1320", "survivors to sign in mode HBC", "unmasking next")
        return self._step(State.MASKED, State.SIGNED, lambda: self._sign_survivors(message))

    def unmask(self, message: bytes) -> bytes:
        """R4: give away, for each peer, the one kind of share that the signed survivor set calls for.

        ``message`` holds the survivors' signatures (ACTIVE) or the survivor list itself (HBC).

        Raises:
            ProtocolError: FS-1323 a signature is not over this site's own tuple, FS-1328 fewer than t
                signatures, FS-1346 given away before.
        """
        before = State.SIGNED if self._descriptor.mode is Mode.ACTIVE else State.MASKED
        return self._step(before, State.UNMASKED, lambda: self._unmask(message))

    def finished(self, message: bytes) -> bytes:
        """Check the published result; returns the SHA-256 of the sum's ring words.

        Raises:
            ProtocolError: FS-1321, FS-1323 not signed by the roster's aggregator, FS-1328 other survivors.
        """
        return self._step(State.UNMASKED, State.DONE, lambda: self._check_result(message))

    def abort(self) -> None:
        """End the attempt for good and drop its secrets."""
        self._state = State.ABORTED
        self._wipe()

    def _step(self, before: State, after: State, work: Callable[[], _Result]) -> _Result:
        if self._state is not before:
            found = f"a step out of turn in state {self._state.value}"
            raise broken("FS-1320", found, f"state {before.value}")
        try:
            result = work()
        except BaseException:
            self.abort()
            raise
        self._state = after
        if after is State.UNMASKED:
            self._wipe()
        return result

    def _advertise(self) -> bytes:
        d = self._descriptor
        if d.epoch:
            raise broken("FS-1357", "new keys for a round of an epoch", "the epoch's slot")
        self._latch.begin(d.run_id, d.round, d.attempt, self._ctx)
        self._cipher_key, self._mask_key = X25519PrivateKey.generate(), X25519PrivateKey.generate()
        self._seed = bytearray(os.urandom(shamir.SECRET_BYTES))
        own = keysetup.advertise(self._party, self._own_keys())
        self._advertisements = {self._index: own}
        return pb.ClientMessage(advertisement=own).SerializeToString()

    def _make_shares(self, raw: bytes) -> bytes:
        received = self._decode(raw, "advertisements").advertisements.advertisements
        ads = keysetup.accept_advertisements(self._party, received, own=self._advertisements[self._index])
        self._require_enough(len(ads), "advertisements")
        self._advertisements = ads
        self._t1 = transcript.advertisements_hash(self._ctx, ads)
        self._peer_keys = {index: ad.mask_key for index, ad in ads.items()}
        self._graph = Graph(tuple(sorted(ads)), self._descriptor.neighbours, ring_seed(self._ctx, self._t1))
        message, kept = keysetup.share_out(
            self._party,
            self._own_keys(),
            seal=self._seal,
            t1=self._t1,
            graph=self._graph,
            threshold=self._descriptor.threshold,
        )
        if kept:
            self._shares[self._index] = kept[0]
        self._own_header = message.header
        return pb.ClientMessage(share_keys=message).SerializeToString()

    def _own_keys(self) -> keysetup.OwnKeys:
        assert self._cipher_key and self._mask_key and self._seed
        return keysetup.OwnKeys(self._index, self._cipher_key, (self._mask_key,), (self._seed,))

    def _seal(self, peer: int, shares: Sequence[bytes]) -> bytes:
        public = self._advertisements[peer].cipher_key
        return keysetup.seal(self._party, self._own_keys(), peer=peer, public=public, t1=self._t1, shares=shares)

    def _unseal(self, peer: int, sealed: bytes) -> Sequence[bytes] | None:
        public = self._advertisements[peer].cipher_key
        return keysetup.unseal(self._party, self._own_keys(), peer=peer, public=public, t1=self._t1, sealed=sealed)

    def _take_shares(self, raw: bytes) -> None:
        message = self._decode(raw, "routed_shares").routed_shares
        near = {self._index, *self._graph.peers(self._index)}
        headers = keysetup.accept_headers(self._party, message.headers, own=self._own_header, t1=self._t1, allowed=near)
        if self._descriptor.neighbours:
            if len(headers) <= self._descriptor.threshold:
                found = f"share headers of {len(headers) - 1} neighbours"
                raise broken("FS-1344", found, f"at least {self._descriptor.threshold}")
        else:
            self._require_enough(len(headers), "share headers")
        senders = set(headers) - {self._index}
        opened, self._invalid = keysetup.open_shares(
            message.shares, index=self._index, senders=senders, unseal=self._unseal
        )
        self._shares.update((owner, shares[0]) for owner, shares in opened.items())
        self._members = tuple(sorted(headers))
        self._strangers = frozenset(self._advertisements) - near
        self._t2 = transcript.headers_hash(self._ctx, headers)
        self._cipher_key = None

    def _take_slot(self, slot: Slot) -> None:
        """Begin the attempt with keys and shares of an epoch's set-up instead of R0 and R1."""
        d = self._descriptor
        self._latch.begin(d.run_id, d.round, d.attempt, self._ctx)
        self._mask_key, self._seed = slot.mask_key, slot.seed
        self._peer_keys, self._shares = dict(slot.peer_keys), dict(slot.shares)
        self._members, self._invalid = slot.members, slot.invalid
        self._t1, self._t2 = slot.t1, slot.t2

    def _mask(self, vector: RingArray) -> MaskedInput:
        d = self._descriptor.length
        word = ring.word(self._descriptor.ring_bits)
        if vector.dtype != word or vector.shape != (d,):
            found = f"a {vector.dtype} vector of shape {vector.shape}"
            raise broken("FS-1303", found, f"{d} words of {word.name}")
        assert self._mask_key and self._seed
        pair = {
            j: keys.pair_mask_key(self._mask_key, self._peer_keys[j], ctx=self._ctx, own=self._index, peer=j)
            for j in self._members
            if j != self._index
        }
        own = keys.self_mask_key(bytes(self._seed), ctx=self._ctx, index=self._index)
        masked = vector.astype(word.newbyteorder("<"), copy=True)
        plus = [own, *(key for j, key in pair.items() if j > self._index)]
        prg.add_masks(masked, plus, [key for j, key in pair.items() if j < self._index])
        masked.flags.writeable = False
        payload = memoryview(masked.data).cast("B")
        header = pb.MaskedInputHeader(
            index=self._index,
            advertisements_hash=self._t1,
            headers_hash=self._t2,
            length=d,
            ring_bits=self._descriptor.ring_bits,
            root=transcript.payload_root(payload),
            invalid_from=self._invalid,
            signature=bytes(identity_keys.SIGNATURE_BYTES),
        )
        header.signature = self._party.sign("masked-input", transcript.masked_body(header))
        self._drop_own_secrets()
        return MaskedInput(pb.ClientMessage(masked_input=header).SerializeToString(), payload, bytes(header.root))

    def _sign_survivors(self, raw: bytes) -> bytes:
        self._accept_survivors(self._decode(raw, "survivor_list").survivor_list)
        self._latch.mark_signed(self._ctx)
        body = transcript.survivors_body(self._t1, self._t2, self._survivors)
        signature = pb.SurvivorSignature(index=self._index, signature=self._party.sign("survivors", body))
        return pb.ClientMessage(survivor_signature=signature).SerializeToString()

    def _accept_survivors(self, message: pb.SurvivorList) -> None:
        survivors = tuple(message.survivors)
        if (
            list(survivors) != sorted(set(survivors))
            or self._index not in survivors
            or not set(survivors) <= {*self._members, *self._strangers}
            or len(survivors) < self._descriptor.min_survivors
        ):
            raise broken(
                "FS-1328",
                f"a survivor list of {len(survivors)} sites",
                f"at least {self._descriptor.min_survivors} of those that shared keys, this site among them",
            )
        self._survivors = survivors

    def _unmask(self, raw: bytes) -> bytes:
        if self._descriptor.mode is Mode.ACTIVE:
            self._check_signatures(self._decode(raw, "survivor_signatures").survivor_signatures)
        else:
            self._accept_survivors(self._decode(raw, "survivor_list").survivor_list)
        self._latch.mark_consumed(self._ctx)
        message = pb.Unmask(index=self._index, signature=bytes(identity_keys.SIGNATURE_BYTES))
        for owner in self._members:
            if owner not in self._shares:
                continue
            of_key, of_seed = self._shares[owner]
            if owner in self._survivors:
                message.seed_shares.add(owner=owner, share=of_seed)
            else:
                message.mask_key_shares.add(owner=owner, share=of_key)
        message.signature = self._party.sign("unmask", transcript.unmask_body(message))
        return pb.ClientMessage(unmask=message).SerializeToString()

    def _check_signatures(self, message: pb.SurvivorSignatures) -> None:
        body = transcript.survivors_body(self._t1, self._t2, self._survivors)
        signers = set()
        for item in message.signatures:
            if item.index not in self._survivors or item.index in signers:
                raise transcript.malformed(f"a survivor signature of site number {item.index}, out of place")
            self._party.verify(item.index, "survivors", body=body, signature=item.signature)
            signers.add(item.index)
        t = self._descriptor.threshold
        if len(signers) < t:
            raise broken("FS-1328", f"{len(signers)} survivor signatures", f"at least t={t}")

    def _check_result(self, raw: bytes) -> bytes:
        message = self._decode(raw, "result").result
        transcript.require_sizes([(message.context, 32), (message.sum_hash, 32)], "a result")
        body = transcript.result_body(message.survivors, message.sum_hash)
        if message.context != self._ctx or tuple(message.survivors) != self._survivors:
            raise broken("FS-1328", "a result of another round or other survivors", "those it signed")
        transcript.verify(
            self._party.aggregator_key,
            "result",
            ctx=self._ctx,
            body=body,
            signature=message.signature,
            who="aggregator",
        )
        return bytes(message.sum_hash)

    def _require_enough(self, count: int, what: str) -> None:
        least = max(self._descriptor.threshold, self._descriptor.min_survivors)
        if count < least:
            raise broken("FS-1344", f"{count} {what}", f"at least {least}")

    def _decode(self, raw: bytes, kind: str) -> pb.ServerMessage:
        message = transcript.decode(pb.ServerMessage, raw, sites=len(self._descriptor.cohort))
        if message.WhichOneof("kind") != kind:
            raise transcript.malformed(f"a message of kind {message.WhichOneof('kind')}, not {kind}")
        return message

    def _drop_own_secrets(self) -> None:
        self._cipher_key = self._mask_key = None
        if self._seed is not None:
            self._seed[:] = bytes(len(self._seed))
        self._seed = None

    def _wipe(self) -> None:
        self._drop_own_secrets()
        self._shares.clear()
