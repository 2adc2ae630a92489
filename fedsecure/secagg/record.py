"""The transcript of one attempt, or of one set-up of keys: every byte the aggregator took and gave, in its order,
sealed by its signature (secagg.md §3.7, §6.8).

A file is a magic string, a version, and records of kind, site number, size and bytes, all integers big-endian; the last
record is the aggregator's Ed25519 signature over the SHA-256 of everything before. It holds nothing that the aggregator
did not see, so it can be shown to every site of the round; masked vectors are kept only where asked for. A round on
keys that were set up before names the transcript of that set-up by its hash.
"""

from __future__ import annotations

import enum
import hashlib
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedsecure.errors import EnvironmentProblem, IdentityError, ProtocolError
from fedsecure.identity.keys import KEY_BYTES, SIGNATURE_BYTES
from fedsecure.identity.roster import MAX_SITES, PURPOSE, Roster, RosterEntry
from fedsecure.secagg import descriptor as descriptors
from fedsecure.secagg import epoch_descriptor, transcript
from fedsecure.secagg.collection import PublicKeys
from fedsecure.secagg.descriptor import RoundDescriptor
from fedsecure.secagg.epoch_descriptor import EpochDescriptor
from fedsecure.secagg.epoch_server import EpochServer
from fedsecure.secagg.server import Phase, SecAggResult, SecAggServer
from fedsecure.secagg.spool import Spool

MAGIC = b"fedsecure-transcript\0"
VERSION = 1
SEAL = "transcript"  # type of the signature over the file
EVERYONE = 0  # site number of what concerns no single site
MAX_ROSTER_BYTES = 1 << 22
_HEAD = struct.Struct(">BIQ")

Write = Callable[[bytes | memoryview], object]


class Kind(enum.IntEnum):
    """What a record holds."""

    DESCRIPTOR = 1  # canonical bytes of the round descriptor
    ROSTER = 2  # canonical bytes of the roster
    MESSAGE = 3  # a ClientMessage that the aggregator accepted
    UPLOAD = 4  # the ClientMessage with the header of a masked vector
    PAYLOAD = 5  # its ring words, where they are kept
    BROADCAST = 6  # a ServerMessage to one site, or to every member of the phase
    SEAL = 7  # the aggregator's signature
    EPOCH = 8  # canonical bytes of an epoch descriptor: a set-up of keys
    SET_UP = 9  # SHA-256 of the transcript of the set-up that the round's keys come from


@dataclass(frozen=True, slots=True)
class Record:
    """One record: kind, protocol index of the site it came from or went to (0: all), and its bytes."""

    kind: Kind
    site: int
    data: bytes


class TranscriptRecorder:
    """Turns what passes in a round into the bytes of a transcript. No I/O: ``write`` takes the bytes as they come.

    Each call raises what ``write`` does. What it did not take is offered again, first, with the next call.

    Args:
        write: takes bytes in order, all or none: a file's ``write``, or ``bytearray().extend``.
        descriptor: the round, or the epoch that keys are set up for.
        roster: the roster it names.
        payloads: keep the masked vectors, 4d bytes a site; without them the sum itself cannot be recomputed.
        set_up: of a round on prepared keys, the SHA-256 of the transcript of their set-up.
    """

    def __init__(
        self,
        write: Write,
        *,
        descriptor: RoundDescriptor | EpochDescriptor,
        roster: Roster,
        payloads: bool = False,
        set_up: bytes = b"",
    ) -> None:
        self._write, self._payloads = write, payloads
        self._hash = hashlib.sha256()
        self._sealed = False
        self._left = bytearray()
        self._put(MAGIC + struct.pack(">I", VERSION))
        kind = Kind.EPOCH if isinstance(descriptor, EpochDescriptor) else Kind.DESCRIPTOR
        self._add(kind, EVERYONE, descriptor.canonical())
        self._add(Kind.ROSTER, EVERYONE, roster.canonical())
        if set_up:
            self._add(Kind.SET_UP, EVERYONE, set_up)
        self.flush()

    @property
    def digest(self) -> bytes:
        """SHA-256 of the file; after the seal it is what rounds refer to."""
        return self._hash.digest()

    def message(self, index: int, raw: bytes) -> None:
        """A small message that site number ``index`` sent and the aggregator accepted."""
        self._add(Kind.MESSAGE, index, raw)
        self.flush()

    def upload(self, index: int, header: bytes, payload: memoryview | bytes) -> None:
        """A masked vector that the aggregator added to the sum."""
        self._add(Kind.UPLOAD, index, header)
        if self._payloads:
            self._add(Kind.PAYLOAD, index, memoryview(payload).cast("B"))
        self.flush()

    def broadcast(self, messages: Mapping[int, bytes]) -> None:
        """What the aggregator sent, site number → bytes; written once where all got the same."""
        same = set(messages.values())
        if len(same) == 1:
            self._add(Kind.BROADCAST, EVERYONE, same.pop())
        else:
            for index in sorted(messages):
                self._add(Kind.BROADCAST, index, messages[index])
        self.flush()

    def seal(self, sign: Callable[[str, bytes], bytes]) -> None:
        """Close the transcript, once; ``sign(type, body)`` makes the aggregator's signature in this round."""
        if not self._sealed:
            self._add(Kind.SEAL, EVERYONE, sign(SEAL, self._hash.digest()))
            self._sealed = True
        self.flush()

    def flush(self) -> None:
        """Write what is not written yet."""
        if self._left:
            self._write(bytes(self._left))
            self._left.clear()

    def written(self) -> bool:
        """Whether all of it is written; tries where it is not."""
        try:
            self.flush()
        except EnvironmentProblem:
            return False
        return True

    def _add(self, kind: Kind, site: int, data: bytes | memoryview) -> None:
        assert not self._sealed, "a record after the seal"
        self._put(_HEAD.pack(kind, site, len(data)))
        self._put(data)

    def _put(self, data: bytes | memoryview) -> None:
        self._hash.update(data)
        self._left += data


class RecordingServer(SecAggServer):
    """A :class:`SecAggServer` that writes the transcript of its attempt; sealed when the attempt ends, either way.

    A call whose message cannot be written raises what ``write`` does, and may be repeated; until the message is written
    no repeat of it succeeds and no phase ends.

    Args:
        write: takes the transcript's bytes in order.
        payloads: keep the masked vectors too.
        set_up: where ``keys`` are given, the SHA-256 of the transcript of their set-up.

    The rest as :class:`SecAggServer`.
    """

    def __init__(
        self,
        descriptor: RoundDescriptor,
        *,
        roster: Roster,
        signing_key: Ed25519PrivateKey,
        spool: Spool,
        write: Write,
        payloads: bool = False,
        keys: PublicKeys | None = None,
        set_up: bytes = b"",
    ) -> None:
        super().__init__(descriptor, roster=roster, signing_key=signing_key, spool=spool, keys=keys)
        self._recorder = TranscriptRecorder(
            write, descriptor=descriptor, roster=roster, payloads=payloads, set_up=set_up
        )

    def receive(self, site: str, message: bytes) -> bool:
        new = super().receive(site, message)
        if new:
            self._recorder.message(self._descriptor.index(site), message)
        self._recorder.flush()
        return new

    def buffer(self, site: str, header: bytes) -> memoryview | None:
        room = super().buffer(site, header)
        if room is None:
            self._recorder.flush()
        return room

    def receive_masked(self, site: str, header: bytes, payload: memoryview | bytes) -> bool:
        new = super().receive_masked(site, header, payload)
        if new:
            self._recorder.upload(self._descriptor.index(site), header, payload)
        self._recorder.flush()
        return new

    def waits(self, alive: Callable[[str], bool]) -> bool:
        return not self._recorder.written() or super().waits(alive)

    def close(self) -> Mapping[str, bytes]:
        self._recorder.flush()
        messages = super().close()
        self._recorder.broadcast({self._descriptor.index(site): raw for site, raw in messages.items()})
        return messages

    def finish(self) -> SecAggResult:
        self._recorder.flush()
        result = super().finish()
        self._recorder.broadcast({EVERYONE: result.result_message})
        self._recorder.seal(self._party.sign)
        return result

    def abort(self) -> None:
        done = self.phase is Phase.DONE
        super().abort()
        if not done:
            self._recorder.seal(self._party.sign)


class RecordingEpochServer(EpochServer):
    """An :class:`EpochServer` that writes the transcript of its set-up, and one of each of its rounds.

    Args:
        write: takes the bytes of the set-up's transcript in order.
        rounds: gives for each round what takes the bytes of its transcript.
        payloads: keep the rounds' masked vectors too.

    The rest as :class:`EpochServer`.
    """

    def __init__(
        self,
        descriptor: EpochDescriptor,
        *,
        roster: Roster,
        signing_key: Ed25519PrivateKey,
        write: Write,
        rounds: Callable[[RoundDescriptor], Write],
        payloads: bool = False,
    ) -> None:
        super().__init__(descriptor, roster=roster, signing_key=signing_key)
        self._rounds, self._payloads = rounds, payloads
        self._recorder = TranscriptRecorder(write, descriptor=descriptor, roster=roster)

    def receive(self, site: str, message: bytes) -> bool:
        new = super().receive(site, message)
        if new:
            self._recorder.message(self._descriptor.cohort.index(site) + 1, message)
        self._recorder.flush()
        return new

    def waits(self, alive: Callable[[str], bool]) -> bool:
        return not self._recorder.written() or super().waits(alive)

    def close(self) -> Mapping[str, bytes]:
        self._recorder.flush()
        messages = super().close()
        self._recorder.broadcast({self._descriptor.cohort.index(site) + 1: raw for site, raw in messages.items()})
        if self.phase is Phase.DONE:
            self._recorder.seal(self._party.sign)
        return messages

    def abort(self) -> None:
        super().abort()
        self._recorder.seal(self._party.sign)

    def _serve(self, descriptor: RoundDescriptor, spool: Spool, keys: PublicKeys) -> SecAggServer:
        return RecordingServer(
            descriptor,
            roster=self._roster,
            signing_key=self._signing_key,
            spool=spool,
            write=self._rounds(descriptor),
            payloads=self._payloads,
            keys=keys,
            set_up=self._recorder.digest,
        )


def file_name(descriptor: RoundDescriptor | EpochDescriptor) -> str:
    """What the transcript of a round or of a set-up is called; a round's verifier looks for the set-up beside it."""
    if isinstance(descriptor, EpochDescriptor):
        return set_up_name(descriptor.ctx)
    return f"round-{descriptor.round:05d}-attempt-{descriptor.attempt}.transcript"


def set_up_name(epoch: bytes) -> str:
    """The same for the set-up with context ``epoch``."""
    return f"set-up-{epoch[:16].hex()}.transcript"


def read_records(path: Path) -> Iterator[tuple[Record, bytes]]:
    """The records of a transcript, each with the SHA-256 of everything before it, one in memory at a time.

    Raises:
        ProtocolError: FS-1380 unreadable, truncated, oversize or no transcript; FS-1381 another version; FS-1314,
            FS-1311 a descriptor that is malformed, and what its constructor raises.
    """
    try:
        with path.open("rb") as file:
            size = path.stat().st_size
            yield from _read(file, size)
    except OSError as error:
        raise unreadable(f"{path} cannot be read ({error.strerror})") from error


def _read(file: BinaryIO, size: int) -> Iterator[tuple[Record, bytes]]:
    head = file.read(len(MAGIC) + 4)
    if head[: len(MAGIC)] != MAGIC or len(head) != len(MAGIC) + 4:
        raise unreadable("a file that does not begin as a transcript")
    (version,) = struct.unpack(">I", head[len(MAGIC) :])
    if version != VERSION:
        raise unsupported(f"a transcript of version {version}")
    sha, position, last = hashlib.sha256(head), len(head), None
    message_bytes, payload_bytes = transcript.size_limit(MAX_SITES), 0
    while position < size:
        raw = file.read(_HEAD.size)
        if len(raw) != _HEAD.size:
            raise unreadable("a transcript that ends within a record")
        number, site, length = _HEAD.unpack(raw)
        position += _HEAD.size + length
        # The size is checked against kind and file before a single byte is read.
        known = number in _KINDS and last is not Kind.SEAL and position <= size
        if not known or length > _limit(Kind(number), message_bytes, payload_bytes):
            raise unreadable(f"a record of kind {number} and {length} bytes where none can be")
        before = sha.digest()
        data = file.read(length)
        if len(data) != length:
            raise unreadable("a transcript that ends within a record")
        sha.update(raw)
        sha.update(data)
        last = Kind(number)
        if last is Kind.EPOCH:
            epoch = EpochDescriptor.parse(data)
            message_bytes = max(message_bytes, transcript.size_limit(len(epoch.cohort), epoch.slots))
        elif last is Kind.DESCRIPTOR:
            descriptor = RoundDescriptor.parse(data)
            payload_bytes = descriptor.length * descriptor.word_bytes
        yield Record(last, site, data), before


_KINDS = frozenset(Kind)


def _limit(kind: Kind, message_bytes: int, payload_bytes: int) -> int:
    others = {
        Kind.DESCRIPTOR: descriptors.MAX_BYTES,
        Kind.EPOCH: epoch_descriptor.MAX_BYTES,
        Kind.ROSTER: MAX_ROSTER_BYTES,
        Kind.PAYLOAD: payload_bytes,
        Kind.SET_UP: transcript.HASH_BYTES,
        Kind.SEAL: SIGNATURE_BYTES,
    }
    return others.get(kind, message_bytes)


def parse_roster(raw: bytes) -> Roster:
    """The roster in canonical bytes; its signature is the coordinator's file, so compare the hash with a verified copy.

    Raises:
        ProtocolError: FS-1380 no canonical roster.
    """
    position = 0

    def take(length: int) -> bytes:
        nonlocal position
        if length > len(raw) - position:
            raise ValueError("truncated")
        position += length
        return raw[position - length : position]

    def number() -> int:
        return int.from_bytes(take(4), "big")

    try:
        if take(number()) != PURPOSE.encode():
            raise ValueError("no roster")
        federation, version = take(number()).decode(), number()
        aggregator_key, aggregator_fingerprint = take(KEY_BYTES), take(KEY_BYTES)
        count = number()
        if count > MAX_SITES:
            raise ValueError("too many sites")
        entries = []
        for _ in range(count):
            site, role = take(number()).decode(), take(number()).decode()
            if role not in ("train", "evaluate", "observe"):
                raise ValueError("unknown role")
            entries.append(RosterEntry(site, role, take(KEY_BYTES), take(KEY_BYTES)))  # type: ignore[arg-type]
        roster = Roster(federation, version, tuple(entries), aggregator_key, aggregator_fingerprint)
    except (ValueError, IdentityError) as error:
        raise unreadable("a roster that is malformed") from error
    if roster.canonical() != raw:
        raise unreadable("a roster that is not in canonical form")
    return roster


def unreadable(found: str) -> ProtocolError:
    """FS-1380: the file is no transcript, or damaged beyond reading."""
    return ProtocolError(
        "FS-1380",
        found,
        expected=f"a whole transcript, version {VERSION}, as the aggregator wrote it",
        cure="fetch the file from the aggregator again",
    )


def unsupported(found: str) -> ProtocolError:
    """FS-1381: a transcript of a kind that this release cannot verify."""
    return ProtocolError(
        "FS-1381",
        found,
        expected=f"version {VERSION}",
        cure="use the release of fedsecure that recorded it",
    )
