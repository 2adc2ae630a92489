"""Canonical bytes of what is signed and hashed: big-endian integers of fixed width, and a u32 length before every byte
string (secagg.md §3.2)."""

from __future__ import annotations

import struct


class Reader:
    """Reads canonical bytes from the front; ``struct.error`` or ``ValueError`` where they end too early."""

    def __init__(self, raw: bytes) -> None:
        self.raw, self.position = raw, 0

    @property
    def left(self) -> int:
        """Bytes not read yet."""
        return len(self.raw) - self.position

    def numbers(self, layout: str) -> tuple[int, ...]:
        """Numbers in a ``struct`` layout."""
        values = struct.unpack_from(layout, self.raw, self.position)
        self.position += struct.calcsize(layout)
        return values

    def bytes(self) -> bytes:
        """A byte string with its length before it."""
        (length,) = self.numbers(">I")
        if length > self.left:
            raise ValueError("truncated")
        self.position += length
        return self.raw[self.position - length : self.position]

    def number(self, most: int) -> int:
        """A non-negative integer of at most ``most`` bytes."""
        raw = self.bytes()
        if len(raw) > most:
            raise ValueError("too large a number")
        return int.from_bytes(raw, "big")

    def count(self, most: int) -> int:
        """A u32 of at most ``most``."""
        (value,) = self.numbers(">I")
        if value > most:
            raise ValueError("too many items")
        return value


def pack_bytes(raw: bytes) -> bytes:
    """u32 length ‖ bytes."""
    return struct.pack(">I", len(raw)) + raw


def pack_number(value: int) -> bytes:
    """A non-negative integer of any size as a byte string without leading zeros."""
    return pack_bytes(value.to_bytes((value.bit_length() + 7) // 8, "big"))
