"""The aggregator's half of R0 and R1: collects advertisements and sealed shares, and routes them (secagg.md §3.3, §3.7,
§3.8).

The same for a round, with one slot, and for the set-up of an epoch, with one slot for each of its rounds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from fedsecure.secagg import keys, transcript
from fedsecure.secagg.graph import Graph, ring_seed
from fedsecure.secagg.keysetup import split_keys
from fedsecure.secagg.party import Party, Setting, broken
from fedsecure.wire import secagg_pb2 as pb


@dataclass(frozen=True, slots=True)
class PublicKeys:
    """What R0 and R1 leave at the aggregator for one round.

    Attributes:
        ctx: context of the set-up: what the commitments are bound to.
        mask_keys: site → s_pub, of U1.
        commitments: site → commit_b, of U2.
        graph: who masks with whom.
        t1: hash of the advertisements.
        t2: site → hash of the headers it saw.
    """

    ctx: bytes
    mask_keys: Mapping[int, bytes]
    commitments: Mapping[int, bytes]
    graph: Graph
    t1: bytes
    t2: Callable[[int], bytes]


class KeyCollection:
    """Advertisements, headers and sealed shares of one set-up."""

    def __init__(self, setting: Setting, party: Party) -> None:
        self._setting, self._party = setting, party
        self.advertisements: dict[int, pb.Advertisement] = {}
        self.headers: dict[int, pb.ShareHeader] = {}
        self._public: set[bytes] = set()
        self._sealed: dict[int, dict[int, bytes]] = {}  # sender → recipient → ciphertext
        self._graph = Graph(())
        self._t1 = b""
        self._t2: dict[int, bytes] = {}

    def take_advertisement(self, index: int, message: pb.Advertisement) -> None:
        """R0; FS-1321, FS-1323, FS-1327 as :meth:`SecAggServer.receive`."""
        body = transcript.advertisement_body(message, self._setting.slots)
        self._party.verify(index, "advertise", body=body, signature=message.signature)
        fresh = [message.cipher_key, *split_keys(message.mask_key)]
        if len(set(fresh)) != len(fresh) or self._public.intersection(fresh):
            raise broken("FS-1327", "a public key that appears twice", "fresh keys of every site")
        probe = X25519PrivateKey.generate()
        for key in fresh:  # a key of low order would end the round at every site
            keys.exchange(probe, key)
        self._public.update(fresh)
        self.advertisements[index] = message

    def take_shares(self, index: int, message: pb.ShareKeys) -> None:
        """R1; FS-1321, FS-1323, FS-1326 as :meth:`SecAggServer.receive`."""
        header, slots = message.header, self._setting.slots
        body = transcript.header_body(header, slots)
        self._party.verify(index, "shares", body=body, signature=header.signature)
        if header.advertisements_hash != self._t1:
            raise broken("FS-1326", "shares for other advertisements", "those that were sent to all")
        sealed = {share.recipient: share.ciphertext for share in message.shares}
        senders = {share.sender for share in message.shares}
        peers = set(self._graph.peers(index))
        if set(sealed) != peers or senders != {index} or len(message.shares) != len(peers):
            raise transcript.malformed("sealed shares that are not one for each peer")
        if transcript.ciphertexts_hash(sealed, slots) != header.ciphertexts_hash:
            raise transcript.malformed("sealed shares other than the header says")
        self.headers[index], self._sealed[index] = header, sealed

    def close_advertise(self) -> pb.ServerMessage:
        """Fix U1; the advertisements for everybody in it."""
        slots = self._setting.slots
        self._t1 = transcript.advertisements_hash(self._party.ctx, self.advertisements, slots)
        members = tuple(sorted(self.advertisements))
        self._graph = Graph(members, self._setting.neighbours, ring_seed(self._party.ctx, self._t1))
        ads = [self.advertisements[i] for i in members]
        return pb.ServerMessage(advertisements=pb.Advertisements(advertisements=ads))

    def close_shares(self) -> Mapping[str, bytes]:
        """Fix U2; for each site in it the headers it may know and the shares sealed for it."""
        out, names = {}, self._party.cohort
        shared = None
        for index in sorted(self.headers):
            peers = [j for j in self._graph.peers(index) if j in self.headers]
            if self._setting.neighbours or shared is None:
                near = sorted([index, *peers])
                shared = [self.headers[j] for j in near], self._headers_hash(near)
            self._t2[index] = shared[1]
            routed = pb.RoutedShares(headers=shared[0])
            for sender in peers:
                routed.shares.add(sender=sender, recipient=index, ciphertext=self._sealed[sender].pop(index))
            out[names[index - 1]] = pb.ServerMessage(routed_shares=routed).SerializeToString()
        self._sealed = {}
        return out

    def public_keys(self, slot: int = 0) -> PublicKeys:
        """What the round of ``slot`` needs, once both phases are closed."""
        at = slice(32 * slot, 32 * slot + 32)
        return PublicKeys(
            ctx=self._party.ctx,
            mask_keys={i: ad.mask_key[at] for i, ad in self.advertisements.items()},
            commitments={i: header.seed_commitment[at] for i, header in self.headers.items()},
            graph=self._graph,
            t1=self._t1,
            t2=self._t2.__getitem__,
        )

    def clear(self) -> None:
        """Drop the sealed shares."""
        self._sealed = {}

    def _headers_hash(self, indices: list[int]) -> bytes:
        headers = {index: self.headers[index] for index in indices}
        return transcript.headers_hash(self._party.ctx, headers, self._setting.slots)
