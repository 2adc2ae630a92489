"""The sites' half of secure aggregation under load: the released client, or one that spares the driver's processor.

The aggregator is under test, and it shares its machine with all of its sites; what costs them more than it costs the
aggregator is left out of :class:`SparingClient`, in such a way that the aggregator receives, checks, adds and opens as
many bytes as from :class:`fedsecure.secagg.client.SecAggClient`:

* real: fresh X25519 keys and seeds for every round, every message and its size, every signature, the hashes of the
  advertisements, headers and vectors, the self mask, and the published sum, which each site compares;
* left out: pair masks, which cancel in a sum that nobody drops out of; the check of the peers' signatures; key
  agreements, since sealed shares are random bytes of their size, which only a peer could tell; and the random
  coefficients of Shamir's polynomials: a constant one gives each holder the secret itself, of the same 33 bytes.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from fedsecure.identity.keys import SIGNATURE_BYTES
from fedsecure.messages import RingArray
from fedsecure.secagg import keys, prg, shamir, transcript
from fedsecure.secagg.client import MaskedInput
from fedsecure.secagg.descriptor import RoundDescriptor
from fedsecure.secagg.graph import Graph, ring_seed
from fedsecure.secagg.sealing import sealed_size
from fedsecure.wire import secagg_pb2 as pb

_UNSIGNED = bytes(SIGNATURE_BYTES)


@dataclass
class Rehearsal:
    """What all sparing sites of one attempt share.

    Attributes:
        descriptor: of the attempt.
        aggregator_key: checks the result.
        seeds: site → seed of its self mask; its shares are this very secret.
    """

    descriptor: RoundDescriptor
    aggregator_key: bytes
    seeds: dict[int, bytes] = field(default_factory=dict)
    t1: bytes = b""
    graph: Graph = field(default_factory=lambda: Graph(()))
    _advertisements: bytes = b""

    def take(self, raw: bytes) -> None:
        """The advertisements, which must be the same bytes for all; decoded once."""
        if self._advertisements:
            assert raw == self._advertisements, "two sites got different advertisements"
            return
        self._advertisements = raw
        message = pb.ServerMessage.FromString(raw).advertisements
        ads = {ad.index: ad for ad in message.advertisements}
        ctx = self.descriptor.ctx
        self.t1 = transcript.advertisements_hash(ctx, ads)
        self.graph = Graph(tuple(sorted(ads)), self.descriptor.neighbours, ring_seed(ctx, self.t1))


class SparingClient:
    """One site in one attempt; the calls and their order are those of the released client."""

    def __init__(self, rehearsal: Rehearsal, *, site: str, signing_key: Ed25519PrivateKey) -> None:
        self._all, self._key = rehearsal, signing_key
        self._index = rehearsal.descriptor.index(site)
        self._ctx = rehearsal.descriptor.ctx
        self._members: tuple[int, ...] = ()
        self._t2 = b""
        self._survivors: tuple[int, ...] = ()

    def advertise(self) -> bytes:
        """R0."""
        self._all.seeds[self._index] = os.urandom(shamir.SECRET_BYTES)
        public = [X25519PrivateKey.generate().public_key().public_bytes_raw() for _ in range(2)]
        message = pb.Advertisement(index=self._index, cipher_key=public[0], mask_key=public[1], signature=_UNSIGNED)
        message.signature = self._sign("advertise", transcript.advertisement_body(message))
        return pb.ClientMessage(advertisement=message).SerializeToString()

    def shares(self, message: bytes) -> bytes:
        """R1."""
        self._all.take(message)
        sealed = {peer: os.urandom(sealed_size()) for peer in self._all.graph.peers(self._index)}
        header = pb.ShareHeader(
            index=self._index,
            advertisements_hash=self._all.t1,
            seed_commitment=keys.commit(self._all.seeds[self._index], ctx=self._ctx, index=self._index),
            ciphertexts_hash=transcript.ciphertexts_hash(sealed),
            signature=_UNSIGNED,
        )
        header.signature = self._sign("shares", transcript.header_body(header))
        routed = [pb.SealedShare(sender=self._index, recipient=j, ciphertext=c) for j, c in sealed.items()]
        return pb.ClientMessage(share_keys=pb.ShareKeys(header=header, shares=routed)).SerializeToString()

    def receive_shares(self, message: bytes) -> None:
        """R2, first half."""
        routed = pb.ServerMessage.FromString(message).routed_shares
        headers = {header.index: header for header in routed.headers}
        assert len(routed.shares) == len(headers) - 1, "a share of each peer"
        self._members = tuple(sorted(headers))
        self._t2 = transcript.headers_hash(self._ctx, headers)

    def mask(self, vector: RingArray) -> MaskedInput:
        """R2, second half: the self mask alone."""
        own = keys.self_mask_key(self._all.seeds[self._index], ctx=self._ctx, index=self._index)
        masked = vector.astype("<u4", copy=True)
        prg.add_masks(masked, [own], [], workers=1)
        payload = memoryview(masked.data).cast("B")
        header = pb.MaskedInputHeader(
            index=self._index,
            advertisements_hash=self._all.t1,
            headers_hash=self._t2,
            length=len(vector),
            ring_bits=self._all.descriptor.ring_bits,
            root=transcript.payload_root(payload),
            signature=_UNSIGNED,
        )
        header.signature = self._sign("masked-input", transcript.masked_body(header))
        return MaskedInput(pb.ClientMessage(masked_input=header).SerializeToString(), payload, bytes(header.root))

    def sign_survivors(self, message: bytes) -> bytes:
        """R3."""
        self._survivors = tuple(pb.ServerMessage.FromString(message).survivor_list.survivors)
        body = transcript.survivors_body(self._all.t1, self._t2, self._survivors)
        signature = pb.SurvivorSignature(index=self._index, signature=self._sign("survivors", body))
        return pb.ClientMessage(survivor_signature=signature).SerializeToString()

    def unmask(self, message: bytes) -> bytes:
        """R4, without drop-outs: a share of the seed of everybody whose shares this site holds."""
        if not self._survivors:
            self._survivors = tuple(pb.ServerMessage.FromString(message).survivor_list.survivors)
        assert len(self._survivors) == len(self._all.descriptor.cohort), "nobody drops out of this benchmark"
        held = self._all.graph.holders(self._index)  # in either graph, who holds whose shares is mutual
        shares = [
            pb.RevealedShare(owner=owner, share=self._all.seeds[owner].rjust(shamir.SHARE_BYTES, b"\0"))
            for owner in held
        ]
        answer = pb.Unmask(index=self._index, seed_shares=shares, signature=_UNSIGNED)
        answer.signature = self._sign("unmask", transcript.unmask_body(answer))
        return pb.ClientMessage(unmask=answer).SerializeToString()

    def finished(self, message: bytes) -> bytes:
        """The hash of the published sum, signed by the aggregator."""
        result = pb.ServerMessage.FromString(message).result
        body = transcript.result_body(result.survivors, result.sum_hash)
        key, signature = self._all.aggregator_key, result.signature
        transcript.verify(key, "result", ctx=self._ctx, body=body, signature=signature, who="aggregator")
        return bytes(result.sum_hash)

    def _sign(self, kind: str, body: bytes) -> bytes:
        return transcript.sign(self._key, kind, self._ctx, body)


def basis(index: int, length: int) -> RingArray:
    """A site's input: 1 at its own coordinate, so that the sum tells who is in it."""
    vector = np.zeros(length, dtype="<u4")
    vector[index - 1] = 1
    return vector


__all__ = ["Rehearsal", "SparingClient", "basis"]
