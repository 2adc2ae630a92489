"""What a message may cost before it is decoded: its size and its number of entries are looked at first."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from fedsecure.errors import ProtocolError
from fedsecure.secagg import transcript
from fedsecure.wire import secagg_pb2 as pb

SITES, SLOTS = 58, 1024  # the largest set-up: messages of 7.6 MB
KINDS = range(1, 6)


class Reached(Exception):
    """The bytes were handed to protobuf."""


class Envelope:
    def ParseFromString(self, raw: bytes) -> None:
        raise Reached


def decode(raw: bytes, *, sites: int = SITES, slots: int = SLOTS) -> None:
    transcript.decode(Envelope, raw, sites=sites, slots=slots)  # type: ignore[type-var]


def field(number: int, body: bytes) -> bytes:
    """A length-delimited field."""
    size, out = len(body), bytes([number << 3 | 2])
    while size > 0x7F:
        out, size = out + bytes([size & 0x7F | 0x80]), size >> 7
    return out + bytes([size]) + body


@pytest.mark.parametrize("entry", [b"\x0a\x00", b"\x12\x00", b"\x1a\x00", b"\x08\x01", b"\x0d\x00\x00\x00\x00"])
@pytest.mark.parametrize("kind", [0, *KINDS])
def test_millions_of_empty_entries_are_refused_undecoded(kind: int, entry: bytes) -> None:
    """Decoded they would take fifty times their size: half a gigabyte for the largest message there is."""
    body = entry * (transcript.size_limit(SITES, SLOTS) // len(entry) - 8)
    with pytest.raises(ProtocolError, match=r"FS-1321.*more than \d+ fields"):
        decode(field(kind, body) if kind else body)
    with pytest.raises(Reached):  # few of them go on to be judged one by one
        decode(field(kind, entry * SITES) if kind else entry * SITES)


def full(kind: str, n: int) -> pb.ServerMessage | pb.ClientMessage:
    """The message of a kind with most entries."""
    down, up = pb.ServerMessage(), pb.ClientMessage()
    for i in range(1, n + 1):
        if kind == "advertisements":
            down.advertisements.advertisements.add(index=i, cipher_key=bytes(32))
        elif kind == "routed_shares":
            down.routed_shares.headers.add(index=i, signature=bytes(64))
            down.routed_shares.shares.add(sender=i, recipient=1, ciphertext=bytes(102))
        elif kind == "survivor_signatures":
            down.survivor_signatures.signatures.add(index=i, signature=bytes(64))
        elif kind == "share_keys":
            up.share_keys.header.index = 1
            up.share_keys.shares.add(sender=1, recipient=i, ciphertext=bytes(102))
        elif kind == "unmask":
            up.unmask.index, up.unmask.signature = 1, bytes(64)
            (up.unmask.seed_shares if i % 2 else up.unmask.mask_key_shares).add(owner=i, share=bytes(33))
        elif kind == "masked_input":
            up.masked_input.invalid_from.append(i)
        else:
            down.survivor_list.survivors.append(i)
    if kind == "masked_input":
        hashes = dict.fromkeys(("advertisements_hash", "headers_hash", "root"), bytes(32))
        beside = pb.MaskedInputHeader(index=1, length=1, ring_bits=32, signature=bytes(64), **hashes)
        up.masked_input.MergeFrom(beside)
    return up if kind in ("share_keys", "unmask", "masked_input") else down


@pytest.mark.parametrize("n", [3, 128, 10_000])
@pytest.mark.parametrize(
    "kind",
    [
        "advertisements",
        "routed_shares",
        "survivor_signatures",
        "share_keys",
        "unmask",
        "masked_input",
        "survivor_list",
    ],
)
def test_the_fullest_message_of_each_kind_is_decoded(kind: str, n: int) -> None:
    message = full(kind, n)
    raw = message.SerializeToString()
    assert transcript.decode(type(message), raw, sites=n) == message


def test_numbers_one_by_one_are_no_more_than_in_a_row() -> None:
    """Protobuf allows both encodings of a list of numbers."""
    n = 128
    raw = field(3, b"".join(b"\x08" + (bytes([i]) if i < 128 else b"\x80\x01") for i in range(1, n + 1)))
    assert transcript.decode(pb.ServerMessage, raw, sites=n) == full("survivor_list", n)


@given(raw=st.binary(max_size=300), kind=st.sampled_from([pb.ServerMessage, pb.ClientMessage]))
@example(raw=b"\x0a\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01", kind=pb.ServerMessage)
@example(raw=b"\xff" * 300, kind=pb.ServerMessage)
@example(raw=b"\x0b\x0c", kind=pb.ServerMessage)
@example(raw=b"\x09", kind=pb.ClientMessage)
def test_any_bytes_are_a_message_or_one_typed_error(raw: bytes, kind: type) -> None:
    refused = ""
    try:
        message = transcript.decode(kind, raw, sites=3)
    except ProtocolError as error:
        refused = error.code
    assert refused == "FS-1321" or kind.FromString(raw) == message


def test_the_count_is_that_of_the_envelope_and_its_content() -> None:
    raw = full("routed_shares", 7).SerializeToString()
    assert len(list(transcript._fields(raw))) == 1 + 14
