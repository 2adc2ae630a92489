"""A site's half of R0 and R1, for one round or for all rounds of an epoch at once (secagg.md §3.3, §3.7).

Functions without state: the site's own secrets come in as :class:`OwnKeys`, with one mask key and one seed for
each slot. A round has one slot.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from fedsecure.identity import keys as identity_keys
from fedsecure.secagg import keys, sealing, shamir, transcript
from fedsecure.secagg.graph import Graph
from fedsecure.secagg.party import Party, broken
from fedsecure.wire import secagg_pb2 as pb

SharePair = tuple[bytes, bytes]  # of s, of b


@dataclass(frozen=True, slots=True)
class OwnKeys:
    """A site's own secrets of a set-up.

    Attributes:
        index: protocol index.
        cipher_key: c, seals shares.
        mask_keys: s of every slot.
        seeds: b of every slot, 32 bytes.
    """

    index: int
    cipher_key: X25519PrivateKey = field(repr=False)
    mask_keys: tuple[X25519PrivateKey, ...] = field(repr=False)
    seeds: tuple[bytearray, ...] = field(repr=False)

    @staticmethod
    def fresh(index: int, slots: int = 1) -> OwnKeys:
        """New secrets from the operating system."""
        return OwnKeys(
            index,
            X25519PrivateKey.generate(),
            tuple(X25519PrivateKey.generate() for _ in range(slots)),
            tuple(bytearray(os.urandom(shamir.SECRET_BYTES)) for _ in range(slots)),
        )


@dataclass(frozen=True, slots=True)
class Slot:
    """What R0 and R1 left at a site for one round.

    Attributes:
        mask_key, seed: own s and b.
        peer_keys: site → s_pub.
        members: U2.
        shares: owner → its shares of s and b that this site holds.
        invalid: members whose sealed shares did not open.
        t1, t2: hashes of the set-up's advertisements and headers.
    """

    mask_key: X25519PrivateKey = field(repr=False)
    seed: bytearray = field(repr=False)
    peer_keys: Mapping[int, bytes]
    members: tuple[int, ...]
    shares: Mapping[int, SharePair] = field(repr=False)
    invalid: tuple[int, ...]
    t1: bytes
    t2: bytes


def split_keys(joined: bytes) -> list[bytes]:
    """Public keys, or commitments, of every slot: 32 bytes each."""
    return [joined[start : start + 32] for start in range(0, len(joined), 32)]


def advertise(party: Party, own: OwnKeys) -> pb.Advertisement:
    """R0: the signed public keys."""
    message = pb.Advertisement(
        index=own.index,
        cipher_key=own.cipher_key.public_key().public_bytes_raw(),
        mask_key=b"".join(key.public_key().public_bytes_raw() for key in own.mask_keys),
        signature=bytes(identity_keys.SIGNATURE_BYTES),
    )
    body = transcript.advertisement_body(message, len(own.mask_keys))
    message.signature = party.sign("advertise", body)
    return message


def accept_advertisements(
    party: Party, received: Iterable[pb.Advertisement], *, own: pb.Advertisement, slots: int = 1
) -> dict[int, pb.Advertisement]:
    """Everybody's advertisements by index.

    Raises:
        ProtocolError: FS-1321 malformed, FS-1323 a signature, FS-1326 the own one is altered or missing, FS-1327 a
            key appears twice.
    """
    ads = transcript.by_index(received, party.keys)
    for index, ad in ads.items():
        body = transcript.advertisement_body(ad, slots)
        party.verify(index, "advertise", body=body, signature=ad.signature)
    if ads.get(own.index) != own:
        raise broken("FS-1326", "an own advertisement that is missing or altered", "it as it was sent")
    public = [key for ad in ads.values() for key in (ad.cipher_key, *split_keys(ad.mask_key))]
    if len(set(public)) != len(public):
        raise broken("FS-1327", "a public key that appears twice", "fresh keys of every site")
    return ads


def share_out(
    party: Party,
    own: OwnKeys,
    *,
    seal: Callable[[int, Sequence[bytes]], bytes],
    t1: bytes,
    graph: Graph,
    threshold: int,
) -> tuple[pb.ShareKeys, list[SharePair]]:
    """R1: the own secrets, split among the holders and sealed for each with ``seal(peer, shares)``.

    Returns:
        The signed message, and the own share pair of every slot (none where a site holds no share of its own).

    Raises:
        ProtocolError: FS-1327 a peer's key is of low order.
    """
    points = graph.holders(own.index)
    parts: dict[int, list[bytes]] = {point: [] for point in points}
    for mask_key, seed in zip(own.mask_keys, own.seeds, strict=True):
        of_key = shamir.share(mask_key.private_bytes_raw(), threshold, points=points)
        of_seed = shamir.share(bytes(seed), threshold, points=points)
        for point in points:
            parts[point] += [of_key[point], of_seed[point]]
    kept = pairs(parts.pop(own.index, []))
    sealed = {peer: seal(peer, shares) for peer, shares in parts.items()}
    slots = len(own.seeds)
    commitments = [keys.commit(bytes(seed), ctx=party.ctx, index=own.index) for seed in own.seeds]
    header = pb.ShareHeader(
        index=own.index,
        advertisements_hash=t1,
        seed_commitment=b"".join(commitments),
        ciphertexts_hash=transcript.ciphertexts_hash(sealed, slots),
        signature=bytes(identity_keys.SIGNATURE_BYTES),
    )
    header.signature = party.sign("shares", transcript.header_body(header, slots))
    routed = [pb.SealedShare(sender=own.index, recipient=j, ciphertext=c) for j, c in sealed.items()]
    return pb.ShareKeys(header=header, shares=routed), kept


def accept_headers(
    party: Party,
    received: Iterable[pb.ShareHeader],
    *,
    own: pb.ShareHeader,
    t1: bytes,
    allowed: Collection[int],
    slots: int = 1,
) -> dict[int, pb.ShareHeader]:
    """The share headers by index.

    Raises:
        ProtocolError: FS-1321 malformed, FS-1323 a signature, FS-1326 a peer saw other advertisements, or the own
            header is altered or missing.
    """
    headers = transcript.by_index(received, allowed)
    for index, header in headers.items():
        party.verify(index, "shares", body=transcript.header_body(header, slots), signature=header.signature)
        if header.advertisements_hash != t1:
            raise broken("FS-1326", "a peer that saw other advertisements", "one view for all sites")
    if headers.get(own.index) != own:
        raise broken("FS-1326", "an own share header that is missing or altered", "it as it was sent")
    return headers


def open_shares(
    received: Iterable[pb.SealedShare],
    *,
    index: int,
    senders: Collection[int],
    unseal: Callable[[int, bytes], Sequence[bytes] | None],
) -> tuple[dict[int, list[SharePair]], tuple[int, ...]]:
    """The shares sealed for this site.

    Args:
        received: as routed.
        index: this site.
        senders: peers that have sent shares.
        unseal: opens what a peer sent: two shares a slot end to end, or ``None``.

    Returns:
        Owner → one share pair a slot, and the peers whose message is missing or does not open.

    Raises:
        ProtocolError: FS-1321 a share that is repeated or in the wrong place.
    """
    sealed: dict[int, bytes] = {}
    for share in received:
        if share.sender not in senders or share.recipient != index or share.sender in sealed:
            raise transcript.malformed("a sealed share that is repeated or in the wrong place")
        sealed[share.sender] = share.ciphertext
    shares, invalid = dict[int, list[SharePair]](), list[int]()
    for peer in sorted(senders):
        opened = unseal(peer, sealed.get(peer, b""))
        if opened is None:
            invalid.append(peer)
        else:
            shares[peer] = pairs(opened)
    return shares, tuple(invalid)


def seal(party: Party, own: OwnKeys, *, peer: int, public: bytes, t1: bytes, shares: Sequence[bytes]) -> bytes:
    """Seal shares for ``peer``, whose c_pub is ``public``; FS-1327 where that is of low order."""
    key = keys.share_key(own.cipher_key, public, ctx=party.ctx, sender=own.index, recipient=peer, sending=True)
    return sealing.seal(key, shares, ctx=party.ctx, t1=t1, sender=own.index, recipient=peer)


def unseal(
    party: Party, own: OwnKeys, *, peer: int, public: bytes, t1: bytes, sealed: bytes
) -> tuple[bytes, ...] | None:
    """Open what ``peer`` sealed for this site; ``None`` where it does not open."""
    key = keys.share_key(own.cipher_key, public, ctx=party.ctx, sender=peer, recipient=own.index, sending=False)
    slots = len(own.seeds)
    return sealing.unseal_all(key, sealed, ctx=party.ctx, t1=t1, sender=peer, recipient=own.index, slots=slots)


def pairs(shares: Collection[bytes]) -> list[SharePair]:
    """Shares of s and b in turn, as one pair a slot."""
    items = iter(shares)
    return list(zip(items, items, strict=True))
