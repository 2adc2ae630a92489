"""What the fuzzers of rounds, epochs and sparse graphs share: secrets from a seed, bent messages, and the ledger."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from random import Random
from unittest.mock import patch

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from hypothesis import strategies as st
from secagg_world import client_message, server_message

from fedsecure.secagg import transcript
from fedsecure.wire import secagg_pb2 as pb

BENDS = ("none", "none", "none", "truncate", "flip", "extend", "repeat", "swap ids", "empty", "oversize")


@contextmanager
def drawn(seed: str) -> Iterator[None]:
    """Keys, seeds, coefficients and nonces from ``seed`` instead of the operating system.

    A ring's order, or what is left of a message cut within random bytes, decides what a site does next; and hypothesis
    takes it for a fault of the test where one choice of rules takes two courses.
    """
    source = Random(seed)
    with (
        patch.object(os, "urandom", source.randbytes),
        patch.object(secrets, "randbelow", source.randrange),
        patch.object(X25519PrivateKey, "generate", lambda: X25519PrivateKey.from_private_bytes(source.randbytes(32))),
    ):
        yield


class Repeatable:
    """Put before a state machine: every example begins with the same secrets."""

    def __init__(self) -> None:
        with ExitStack() as stack:
            stack.enter_context(drawn("machine"))
            super().__init__()
            self._drawn = stack.pop_all()

    def teardown(self) -> None:
        self._drawn.close()
        super().teardown()  # type: ignore[misc]


class Ledger:
    """What the sites of one context, or of one slot, have given away, kept by whoever listens."""

    def __init__(self) -> None:
        self.signed: dict[str, set[bytes]] = {}
        self.released: dict[str, list[pb.Unmask]] = {}
        self.masked: dict[str, int] = {}

    def note(self, site: str, raw: bytes) -> None:
        message = client_message(raw)
        if message.HasField("survivor_signature"):
            self.signed.setdefault(site, set()).add(message.survivor_signature.signature)
        elif message.HasField("unmask"):
            self.released.setdefault(site, []).append(message.unmask)
        elif message.HasField("masked_input"):
            self.masked[site] = self.masked.get(site, 0) + 1

    def check(self) -> None:
        assert all(uploads == 1 for uploads in self.masked.values()), "two vectors under the same pads"
        assert all(len(signatures) == 1 for signatures in self.signed.values()), "a second survivor signature"
        assert all(len(messages) == 1 for messages in self.released.values()), "a second release of shares"
        seeds, mask_keys = set(), set()
        for messages in self.released.values():
            for message in messages:
                seeds |= {share.owner for share in message.seed_shares}
                mask_keys |= {share.owner for share in message.mask_key_shares}
        assert not seeds & mask_keys, f"both kinds of share of {seeds & mask_keys}"


def bend(raw: bytes, how: str, data: st.DataObject, *, sites: int = 4, slots: int = 1) -> bytes:
    """A message as the attacker alters it."""
    if how == "truncate" and raw:
        return raw[: data.draw(st.integers(0, len(raw) - 1))]
    if how == "flip" and raw:
        bit = data.draw(st.integers(0, 8 * len(raw) - 1))
        return raw[: bit // 8] + bytes([raw[bit // 8] ^ 1 << bit % 8]) + raw[bit // 8 + 1 :]
    if how == "extend":
        return raw + data.draw(st.binary(min_size=1, max_size=40))
    if how == "repeat":
        return raw + raw  # protobuf merges: lists get twice as long, fields are overwritten
    if how == "empty":
        return b""
    if how == "oversize":
        return raw + bytes(transcript.size_limit(sites, slots))
    return swap_ids(raw, data, sites) if how == "swap ids" else raw


def swap_ids(raw: bytes, data: st.DataObject, sites: int) -> bytes:
    """i ↔ j in every field that names a site, in a message to a site."""
    i, j = data.draw(st.permutations(range(1, sites + 1)))[:2]
    other = {i: j, j: i}
    try:
        message = server_message(raw)
    except Exception:
        return raw
    for ad in message.advertisements.advertisements:
        ad.index = other.get(ad.index, ad.index)
    for header in message.routed_shares.headers:
        header.index = other.get(header.index, header.index)
    for share in message.routed_shares.shares:
        share.sender, share.recipient = (
            other.get(share.sender, share.sender),
            other.get(share.recipient, share.recipient),
        )
    for item in message.survivor_signatures.signatures:
        item.index = other.get(item.index, item.index)
    kind = message.WhichOneof("kind")
    if kind in ("survivor_list", "result"):
        survivors = getattr(message, kind).survivors
        survivors[:] = [other.get(k, k) for k in survivors]
    return message.SerializeToString()
