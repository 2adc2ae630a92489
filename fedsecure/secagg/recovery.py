"""Secrets from shares of which some may be wrong: find the secret that fits, and say which shares do not
(secagg.md §3.3, server finish).

What fits is known without trust: a seed matches its commitment, a private key its public key.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import combinations, islice

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from fedsecure.secagg import keys, parallel, shamir

Shares = dict[int, dict[int, bytes]]
MAX_TRIES = 20_000
_PEERS = 64  # key agreements a job
_COST = 1 << 18  # keystream bytes that take as long as one key agreement
_WHO = struct.Struct("<32s32sI")
_PEER = struct.Struct("<I32s")


def recover(
    shares: Mapping[int, bytes],
    threshold: int,
    *,
    fits: Callable[[bytes], bool],
    suspects: Collection[int] = (),
    tries: int | None = None,
) -> tuple[bytes, set[int]] | None:
    """The secret behind ``shares`` (holder → share) and the holders whose share is wrong.

    Args:
        shares: protocol index of the holder → 33 bytes.
        threshold: t.
        fits: whether a 32-byte secret is the right one.
        suspects: holders whose shares were wrong before; tried last.
        tries: choices of t holders to try; ``None`` for 20 000.

    Returns:
        ``None`` where no secret fits: always found with up to (m − t) / 2 of m shares wrong, and with up to m − t
        where there are at most ``tries`` choices of t among m.
    """
    order = sorted(shares, key=lambda holder: (holder in suspects, holder))
    choices = islice(combinations(order, threshold), MAX_TRIES if tries is None else tries)
    for number, chosen in enumerate(choices):
        subset = {holder: shares[holder] for holder in chosen}
        secret = shamir.reconstruct(subset)
        if secret is not None and fits(secret):
            return secret, _wrong(subset, shares, threshold, suspects)
        if number == 0 and (decoded := shamir.decode(shares, threshold)) is not None and fits(decoded[0]):
            return decoded
    return None


def _wrong(
    subset: Mapping[int, bytes], shares: Mapping[int, bytes], threshold: int, suspects: Collection[int]
) -> set[int]:
    """Holders whose share is not on the polynomial through ``subset``."""
    rest = set(shares) - set(subset)
    if shamir.agree({h: shares[h] for h in shares if h in subset or h not in suspects}, threshold):
        rest &= set(suspects)
    return {holder for holder in rest if not _on_line(subset, holder, shares[holder])}


def _on_line(subset: Mapping[int, bytes], holder: int, share: bytes) -> bool:
    try:
        return shamir.interpolate(subset, holder) == shamir.element(share)
    except ValueError:
        return False


def suspects(
    owner: int, wrong: Collection[int], given: Collection[int], *, threshold: int, colluders: int
) -> list[tuple[int, ...]]:
    """Who may have lied about the shares of ``owner``: of the sites in each tuple at least one did.

    A share off the polynomial was dealt wrongly by its owner, or given away wrongly by its holder; nobody else can make
    one that opens. Which polynomial is the right one is certain only where more holders are on it than an honest
    polynomial and all colluders together could bring there: two polynomials with one secret share t − 2 points at most,
    so t + c − 1 holders on one are enough. With fewer, colluders can bend the polynomial around honest holders.

    Args:
        owner: whose secret it is.
        wrong: holders off the polynomial that gave the secret.
        given: all holders that gave a share.
        threshold: t.
        colluders: c.
    """
    if not wrong:
        return []
    if len(given) - len(wrong) >= threshold + colluders - 1:
        return [tuple(dict.fromkeys((holder, owner))) for holder in sorted(wrong)]
    return [tuple(dict.fromkeys((owner, *sorted(given))))]


@dataclass(slots=True)
class Masks:
    """Keys of the mask streams to add and to subtract from the accumulator.

    ``wrong`` maps the owner of a secret to the holders whose share is not on the polynomial that gave it.
    """

    plus: list[bytes] = field(default_factory=list, repr=False)
    minus: list[bytes] = field(default_factory=list, repr=False)
    wrong: dict[int, set[int]] = field(default_factory=dict)


class Unrecoverable(Exception):
    """No t shares give back the secret of ``owner``."""

    def __init__(self, owner: int) -> None:
        super().__init__(f"the secret of site number {owner}")
        self.owner = owner


def open_masks(
    *,
    ctx: bytes,
    threshold: int,
    survivors: Iterable[int],
    seed_shares: Shares,
    key_shares: Shares,
    commitments: Mapping[int, bytes],
    mask_keys: Mapping[int, bytes],
    commitment_ctx: bytes | None = None,
    peers: Callable[[int], Collection[int]] | None = None,
    workers: int | None = None,
) -> Masks:
    """What still hides the sum: the survivors' self masks, and their pair masks with the sites that dropped out.

    Args:
        ctx: round context.
        threshold: t.
        survivors: U3.
        seed_shares: owner → holder → share of b, for U3.
        key_shares: owner → holder → share of s, for U2 \\ U3.
        commitments: owner → commit_b.
        mask_keys: owner → s_pub.
        commitment_ctx: context of the commitments where the keys were set up for an epoch, not for this round.
        peers: site → its neighbours; ``None`` where everybody masks with everybody.
        workers: processes for the key agreements, as in :func:`fedsecure.secagg.prg.add_masks`.

    Raises:
        Unrecoverable: a secret does not come back.
    """
    masks, present, last = Masks(), sorted(survivors), set[int]()

    def find(shares: Shares, owner: int, fits: Callable[[bytes], bool]) -> bytes:
        found = recover(shares.get(owner, {}), threshold, fits=fits, suspects=last)
        if found is None:
            raise Unrecoverable(owner)
        if found[1]:
            masks.wrong[owner] = found[1]
            last.update(found[1])
        return found[0]

    for owner in present:
        seed = find(seed_shares, owner, partial(_is_seed, commitments[owner], commitment_ctx or ctx, owner))
        masks.minus.append(keys.self_mask_key(seed, ctx=ctx, index=owner))
    jobs = []
    for owner in sorted(set(commitments) - set(present)):
        near = present if peers is None else sorted(set(present).intersection(peers(owner)))
        if not near:
            continue
        secret = find(key_shares, owner, partial(_is_private_key, mask_keys[owner]))
        for start in range(0, len(near), _PEERS):
            batch = [(peer, mask_keys[peer]) for peer in near[start : start + _PEERS]]
            jobs.append(_Agreement(ctx, secret, owner, batch))
    for job in _agree(jobs, len(jobs) * min(_PEERS, len(present)), workers):
        for (peer, _), key in zip(job.peers, job.keys, strict=True):
            # The peer added the stream where the absent site comes after it, and subtracted it otherwise.
            (masks.minus if job.owner > peer else masks.plus).append(key)
    return masks


@dataclass(slots=True)
class _Agreement:
    """Mask keys of one site that dropped out with some of its peers (protocol index, s_pub)."""

    ctx: bytes
    secret: bytes = field(repr=False)
    owner: int
    peers: Sequence[tuple[int, bytes]]
    keys: list[bytes] = field(default_factory=list, repr=False)

    kind = parallel.AGREEMENT

    def here(self) -> None:
        private = X25519PrivateKey.from_private_bytes(self.secret)
        self.keys = [
            keys.pair_mask_key(private, public, ctx=self.ctx, own=self.owner, peer=peer) for peer, public in self.peers
        ]

    def request(self) -> bytes:
        return _WHO.pack(self.ctx, self.secret, self.owner) + b"".join(_PEER.pack(*peer) for peer in self.peers)

    def take(self, answer: bytes, slot: memoryview) -> None:
        self.keys = [answer[at : at + keys.KEY_BYTES] for at in range(0, len(answer), keys.KEY_BYTES)]


def answer(request: memoryview, slot: memoryview) -> bytes:
    """A worker's side of an agreement: the mask keys of all peers, in order."""
    ctx, secret, owner = _WHO.unpack_from(request)
    job = _Agreement(ctx, secret, owner, list(_PEER.iter_unpack(request[_WHO.size :])))
    job.here()
    return b"".join(job.keys)


def _agree(jobs: list[_Agreement], exchanges: int, workers: int | None) -> Iterator[_Agreement]:
    with parallel.crew(exchanges * _COST, workers=workers) as crew:
        if crew is not None:
            crew.run(jobs)
        else:
            for job in jobs:
                job.here()
    yield from jobs


def _is_seed(commitment: bytes, ctx: bytes, owner: int, secret: bytes) -> bool:
    return keys.commit(secret, ctx=ctx, index=owner) == commitment


def _is_private_key(public: bytes, secret: bytes) -> bool:
    return X25519PrivateKey.from_private_bytes(secret).public_key().public_bytes_raw() == public
