"""What is signed and hashed in a round, as canonical bytes, and the decoding of messages within bounds
(secagg.md
§3.2, §3.3).

A signature covers ``"fedsecure/secagg/v1/" + type ‖ 0x00 ‖ ctx ‖ body``: a message of another round, attempt,
model or configuration fails here. Bodies have a fixed field order and big-endian u32 counts, so no two
messages share a body.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from typing import TypeVar

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from google.protobuf.message import DecodeError

from fedsecure.errors import ProtocolError
from fedsecure.identity import keys as identity_keys
from fedsecure.identity.keys import SIGNATURE_BYTES
from fedsecure.secagg.sealing import sealed_size
from fedsecure.secagg.shamir import SHARE_BYTES
from fedsecure.wire import secagg_pb2 as pb

PURPOSE = "fedsecure/secagg/v1/"
CHUNK_BYTES = 1 << 20  # leaves of the payload's hash
HASH_BYTES = 32

_NUMBER, _BYTES, _FIXED = 0, 2, {1: 8, 5: 4}  # wire types of protobuf, and bytes of those of one size

_Envelope = TypeVar("_Envelope", pb.ClientMessage, pb.ServerMessage)
_Signed = TypeVar("_Signed", pb.Advertisement, pb.ShareHeader)


def size_limit(sites: int, slots: int = 1) -> int:
    """Most bytes of any small message in a cohort of ``sites``; checked before decoding.

    ``slots`` is 1 for a round, and the number of prepared rounds for the set-up of an epoch (secagg.md §3.7).
    """
    return 1024 + (512 + 128 * (slots - 1)) * sites


def field_limit(sites: int) -> int:
    """Most fields of an envelope and of its content in a cohort of ``sites``: two lists, and what is beside them."""
    return 2 * sites + 16


def decode(kind: type[_Envelope], raw: bytes, *, sites: int, slots: int = 1) -> _Envelope:
    """Decode an envelope; FS-1321 where it is too large, has too many entries, is damaged or empty.

    Entries are counted first: an empty one has two bytes here and about a hundred in memory.
    """
    if len(raw) > size_limit(sites, slots):
        raise malformed(f"a message of {len(raw)} bytes")
    if next(islice(_fields(raw), field_limit(sites), None), None) is not None:
        raise malformed(f"a message of more than {field_limit(sites)} fields")
    message = kind()
    try:
        message.ParseFromString(bytes(raw))
    except DecodeError as error:
        raise malformed("a message that cannot be decoded") from error
    if message.WhichOneof("kind") is None:
        raise malformed("a message of no known kind")
    return message


def _fields(raw: bytes) -> Iterator[int]:
    """The fields of an envelope and of its content, each by where it begins; nothing is copied."""
    for start, value, end in _walk(raw, 0, len(raw)):
        yield start
        yield from (inner for inner, _, _ in _walk(raw, value, end))


def _walk(raw: bytes, at: int, end: int) -> Iterator[tuple[int, int, int]]:
    """Where each field of an encoded message begins, and from where to where it holds bytes, if it does."""
    while at < end:
        start = at
        tag, at = _varint(raw, at)
        kind, inner = tag & 7, 0
        if kind == _BYTES:
            inner, at = _varint(raw, at)
        elif kind == _NUMBER:
            _, at = _varint(raw, at)
        elif kind not in _FIXED:
            raise malformed("a message with a group, which none has")
        size = inner + _FIXED.get(kind, 0)
        if at + size > end:
            raise malformed("a message that ends within a field")
        yield start, at, at + inner
        at += size


def _varint(raw: bytes, at: int) -> tuple[int, int]:
    """A number in groups of seven bits, the least first, and where it ends."""
    value = 0
    for place, byte in enumerate(raw[at : at + 10]):
        value |= (byte & 0x7F) << 7 * place
        if byte < 0x80:
            return value, at + place + 1
    raise malformed("a message with a number of no end")


def malformed(found: str) -> ProtocolError:
    """FS-1321: a message is damaged, too large, or has fields of wrong size or count."""
    return ProtocolError(
        "FS-1321",
        found,
        expected="a message as secagg.proto defines it, within its bounds",
        cure="use the same release of fedsecure everywhere; if so, something altered the message on its way",
    )


def require_sizes(fields: Iterable[tuple[bytes, int]], what: str) -> None:
    """FS-1321 unless every byte string has its size."""
    if any(len(value) != size for value, size in fields):
        raise malformed(f"{what} with a field of wrong size")


def u32(*values: int) -> bytes:
    """Big-endian, four bytes each."""
    return struct.pack(f">{len(values)}I", *values)


def sign(key: Ed25519PrivateKey, kind: str, ctx: bytes, body: bytes) -> bytes:
    """Ed25519 signature of a message of this type in this round."""
    return identity_keys.sign(key, PURPOSE + kind, ctx + body)


def verify(public_key: bytes, kind: str, *, ctx: bytes, body: bytes, signature: bytes, who: str) -> None:
    """FS-1323 unless ``signature`` is that of ``who`` under ``public_key``."""
    if not identity_keys.verify(public_key, PURPOSE + kind, ctx + body, signature):
        raise ProtocolError(
            "FS-1323",
            f"the {kind} message of {who!r} is not signed by its roster key for this round",
            expected="a signature over this round's context",
            cure="if it happens again, someone alters messages, or the sites were asked different things",
        )


def advertisement_body(message: pb.Advertisement, slots: int = 1) -> bytes:
    """u32 i ‖ c_pub ‖ s_pub of every slot."""
    fields = ((message.cipher_key, 32), (message.mask_key, 32 * slots), (message.signature, SIGNATURE_BYTES))
    require_sizes(fields, "an advertisement")
    return u32(message.index) + message.cipher_key + message.mask_key


def header_body(message: pb.ShareHeader, slots: int = 1) -> bytes:
    """u32 i ‖ T1 ‖ commit_b of every slot ‖ H(ciphertexts)."""
    hashes = (message.advertisements_hash, message.seed_commitment, message.ciphertexts_hash)
    sizes = (HASH_BYTES, HASH_BYTES * slots, HASH_BYTES, SIGNATURE_BYTES)
    require_sizes(zip((*hashes, message.signature), sizes, strict=True), "a header")
    return u32(message.index) + b"".join(hashes)


def ciphertexts_hash(shares: Mapping[int, bytes], slots: int = 1) -> bytes:
    """Hash of one site's sealed shares by recipient."""
    require_sizes(((sealed, sealed_size(slots)) for sealed in shares.values()), "a sealed share")
    return _hash("ciphertexts", u32(len(shares)), *(u32(j) + shares[j] for j in sorted(shares)))


def advertisements_hash(ctx: bytes, messages: Mapping[int, pb.Advertisement], slots: int = 1) -> bytes:
    """T1 over all advertisements of U1, signatures included, in order of index."""
    return _hash("t1", ctx, u32(len(messages)), *_ordered(messages, lambda ad: advertisement_body(ad, slots)))


def headers_hash(ctx: bytes, messages: Mapping[int, pb.ShareHeader], slots: int = 1) -> bytes:
    """T2 over all share headers of U2, or of one site's neighbourhood in it (secagg.md §3.8)."""
    return _hash("t2", ctx, u32(len(messages)), *_ordered(messages, lambda header: header_body(header, slots)))


def masked_body(message: pb.MaskedInputHeader) -> bytes:
    """u32 i ‖ T1 ‖ T2 ‖ u64 d ‖ u32 b ‖ root ‖ u32 count ‖ u32 senders of invalid shares."""
    hashes = (message.advertisements_hash, message.headers_hash, message.root)
    require_sizes([*((h, HASH_BYTES) for h in hashes), (message.signature, SIGNATURE_BYTES)], "a header")
    size = struct.pack(">QI", message.length, message.ring_bits)
    head = u32(message.index) + hashes[0] + hashes[1] + size
    return head + hashes[2] + u32(len(message.invalid_from), *message.invalid_from)


def payload_root(payload: memoryview | bytes) -> bytes:
    """Hash of the hashes of the payload's chunks of 1 MiB, and of its size."""
    view = memoryview(payload).cast("B")
    leaves = (hashlib.sha256(view[start : start + CHUNK_BYTES]).digest() for start in range(0, len(view), CHUNK_BYTES))
    return _hash("root", struct.pack(">Q", len(view)), *leaves)


def survivors_body(t1: bytes, t2: bytes, survivors: Iterable[int]) -> bytes:
    """T1 ‖ T2 ‖ H(U3)."""
    ordered = sorted(survivors)
    return t1 + t2 + _hash("survivor-list", u32(len(ordered), *ordered))


def unmask_body(message: pb.Unmask) -> bytes:
    """u32 i, then both lists: u32 count and (u32 owner ‖ share) in the order sent."""
    out = u32(message.index)
    for shares in (message.seed_shares, message.mask_key_shares):
        require_sizes(((s.share, SHARE_BYTES) for s in shares), "an unmasking share")
        out += u32(len(shares)) + b"".join(u32(s.owner) + s.share for s in shares)
    require_sizes([(message.signature, SIGNATURE_BYTES)], "an unmasking message")
    return out


def result_body(survivors: Iterable[int], sum_hash: bytes) -> bytes:
    """u32 count ‖ u32 survivors ‖ SHA-256 of the sum's ring words."""
    ordered = sorted(survivors)
    return u32(len(ordered), *ordered) + sum_hash


def by_index(messages: Iterable[_Signed], allowed: Iterable[int]) -> dict[int, _Signed]:
    """Messages by sender; FS-1321 where a sender is repeated or not allowed."""
    admitted, out = set(allowed), dict[int, _Signed]()
    for message in messages:
        if message.index not in admitted or message.index in out:
            raise malformed(f"a list that names site number {message.index} twice or out of place")
        out[message.index] = message
    return out


def _ordered(messages: Mapping[int, _Signed], body: Callable[[_Signed], bytes]) -> Iterable[bytes]:
    return (body(messages[index]) + messages[index].signature for index in sorted(messages))


def _hash(tag: str, *parts: bytes) -> bytes:
    sha = hashlib.sha256((PURPOSE + tag).encode() + b"\0")
    for part in parts:
        sha.update(part)
    return sha.digest()
