"""The seed of a run's draw, which nobody chose: the training sites toss a coin together by commit and reveal.

Each site commits to a fresh nonce, sees everybody's signed commitments in one list, and only then reveals; the seed is
a hash over the list and all nonces (Blum, CRYPTO 1981; of n parties as in Cleve, STOC 1986, whose bound says that who
reveals last can always bias a coin by withholding). A toss in which somebody committed and did not reveal is over, and
the next one goes on without that site, a bounded number of times. So one honest site among those that took part makes
the seed unpredictable, and an adversary that controls the aggregator has the choice among at most so many seeds.

The state machines here are pure: bytes in, bytes out, no sockets and no clock.
"""

from __future__ import annotations

import hashlib
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from hmac import compare_digest
from typing import Literal

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedsecure.errors import ProtocolError, RoundAborted
from fedsecure.identity import keys
from fedsecure.identity.roster import Roster
from fedsecure.secagg.canonical import Reader, pack_bytes
from fedsecure.secagg.thresholds import MAX_SITES

NONCE_BYTES = 32
_HASH = 32
_TOSS, _RECORD = pack_bytes(b"fedsecure/coin/v1/toss"), pack_bytes(b"fedsecure/coin/v1/record")
_COMMIT, _REVEAL = "fedsecure/coin/v1/commit", "fedsecure/coin/v1/reveal"
_LIST, _SEED = b"fedsecure/coin/v1/list\0", b"fedsecure/coin/v1/seed\0"
# Room for a name, a commitment and a nonce with their signatures, of each site.
MAX_BYTES = MAX_SITES * 512
# What a site sends: a commitment or a nonce, and its signature.
MESSAGE_BYTES = _HASH + keys.SIGNATURE_BYTES
Stage = Literal["commit", "reveal", "done"]


@dataclass(frozen=True)
class Toss:
    """One try at a seed.

    Attributes:
        run_id: 16 bytes.
        roster_hash, config_hash: 32 bytes each.
        number: counted from 0; the next one follows one that somebody left in the middle.
        parties: who is asked to take part, in protocol order.
        required: how many have to, at least.
    """

    run_id: bytes
    roster_hash: bytes
    config_hash: bytes
    number: int
    parties: tuple[str, ...]
    required: int

    @cached_property
    def ctx(self) -> bytes:
        """SHA-256 of the canonical bytes, which begin with what they are; 32 bytes."""
        return hashlib.sha256(self.canonical()).digest()

    def canonical(self) -> bytes:
        """The canonical bytes."""
        out = [_TOSS, *(pack_bytes(value) for value in (self.run_id, self.roster_hash, self.config_hash))]
        out += [struct.pack(">III", self.number, self.required, len(self.parties))]
        return b"".join([*out, *(pack_bytes(site.encode()) for site in self.parties)])

    @staticmethod
    def parse(raw: bytes) -> Toss:
        """Inverse of :meth:`canonical`, accepting nothing else; ProtocolError FS-1391."""
        if len(raw) > MAX_BYTES:
            raise _ill_formed(f"{len(raw)} bytes, more than {MAX_BYTES}")
        reader = Reader(raw)
        try:
            toss = _read_toss(reader)
        except (struct.error, ValueError) as error:
            raise _ill_formed("malformed bytes") from error
        if toss.canonical() != raw:
            raise _ill_formed("not in canonical form")
        return toss


def is_toss(raw: bytes) -> bool:
    """Whether the bytes claim to be a :class:`Toss`."""
    return raw.startswith(_TOSS)


def is_record(raw: bytes) -> bool:
    """Whether the bytes claim to be a :class:`Record`."""
    return raw.startswith(_RECORD)


@dataclass(frozen=True, slots=True)
class Signed:
    """A commitment or a nonce of one site (32 bytes), and the site's signature."""

    value: bytes
    signature: bytes


@dataclass(frozen=True)
class Record:
    """A toss that came to its end: all that anybody needs to check the seed.

    Attributes:
        toss: which one.
        commitments, reveals: by site, in protocol order; of the same sites.
    """

    toss: Toss
    commitments: Mapping[str, Signed]
    reveals: Mapping[str, Signed]

    @cached_property
    def seed(self) -> bytes:
        """SHA-256 over the toss, the list of commitments, and all nonces; 32 bytes."""
        nonces = b"".join(reveal.value for reveal in self.reveals.values())
        return hashlib.sha256(_SEED + self.list_hash + nonces).digest()

    @cached_property
    def list_hash(self) -> bytes:
        """What each site's reveal was signed for."""
        return hash_list(self.toss, self.commitments)

    def pack(self) -> bytes:
        """The bytes that every site gets."""
        parts = [pack_list(self.commitments), *(r.value + r.signature for r in self.reveals.values())]
        return b"".join([_RECORD, pack_bytes(self.toss.canonical()), *parts])

    @staticmethod
    def parse(raw: bytes, *, roster: Roster) -> Record:
        """Inverse of :meth:`pack`, every signature and commitment checked; that it is of this run, the caller checks.

        Raises:
            ProtocolError: FS-1391 malformed, FS-1392 a signature is not that site's, or a nonce not what its site
                committed to; FS-1394 too few took part.
            IdentityError: FS-1423 a site is not in the roster.
        """
        if len(raw) > 2 * MAX_BYTES or not is_record(raw):
            raise _ill_formed(f"a record of {len(raw)} bytes")
        reader = Reader(raw)
        reader.position = len(_RECORD)
        try:
            toss = Toss.parse(reader.bytes())
            commitments = read_list(reader)
            reveals = {site: _signed(reader) for site in commitments}
            if reader.left:
                raise ValueError("bytes after the end")
        except (struct.error, ValueError) as error:
            raise _ill_formed("a malformed record") from error
        check_list(toss, commitments, roster=roster)
        record = Record(toss, commitments, reveals)
        for site, reveal in reveals.items():
            check_reveal(record.toss, site, reveal, commitments=commitments, roster=roster)
        return record


class CoinSite:
    """One site in one toss.

    Args:
        toss: as checked by the caller.
        site, signing_key: own id and identity key.
        roster: own verified copy.
    """

    def __init__(self, toss: Toss, *, site: str, signing_key: Ed25519PrivateKey, roster: Roster) -> None:
        self.toss = toss
        self._site, self._key, self._roster = site, signing_key, roster
        self._nonce = os.urandom(NONCE_BYTES)
        self._commitment = commitment(toss, site, self._nonce)
        self._list: bytes | None = None

    def commit(self) -> bytes:
        """The commitment, signed."""
        return self._commitment + keys.sign(self._key, _COMMIT, self.toss.ctx + self._commitment)

    def reveal(self, shown: bytes) -> bytes:
        """The nonce, signed for one list of commitments; once.

        Raises:
            ProtocolError: FS-1391 malformed, FS-1392 a signature is not that site's, FS-1393 the list lacks this site's
                commitment, FS-1394 too few are in it, FS-1395 another list was answered already.
        """
        reader = Reader(shown)
        try:
            commitments = read_list(reader)
            if reader.left:
                raise ValueError("bytes after the end")
        except (struct.error, ValueError) as error:
            raise _ill_formed("a malformed list") from error
        check_list(self.toss, commitments, roster=self._roster)
        own = commitments.get(self._site)
        if own is None or not compare_digest(own.value, self._commitment):
            raise _dropped("a list of commitments without this site's own")
        listed = hash_list(self.toss, commitments)
        if self._list is not None and not compare_digest(self._list, listed):
            raise ProtocolError(
                "FS-1395",
                "a second list of commitments in one toss",
                expected="one list, which everybody is shown",
                cure="do not go on with this aggregator; report it",
            )
        self._list = listed
        return self._nonce + keys.sign(self._key, _REVEAL, self.toss.ctx + listed + self._nonce)

    def check(self, record: Record) -> None:
        """FS-1393 unless the record of this toss holds what this site gave, for the list it was shown.

        A site that was left out before it revealed anything has nothing to find there.
        """
        if self._list is None:
            return
        own = record.reveals.get(self._site)
        if record.list_hash != self._list or own is None or not compare_digest(own.value, self._nonce):
            raise _dropped("a record without what this site revealed, or of another list of commitments")


class CoinServer:
    """The aggregator in one toss: gathers, shows all commitments at once, and all nonces at the end."""

    def __init__(self, toss: Toss, *, roster: Roster) -> None:
        self.toss = toss
        self.stage: Stage = "commit"
        self._roster = roster
        self._commitments: dict[str, Signed] = {}
        self._reveals: dict[str, Signed] = {}

    def waiting_for(self) -> tuple[str, ...]:
        """Who has not answered in this stage."""
        if self.stage == "commit":
            return tuple(site for site in self.toss.parties if site not in self._commitments)
        return tuple(site for site in self._listed if site not in self._reveals) if self.stage == "reveal" else ()

    def receive(self, site: str, message: bytes) -> None:
        """A commitment or a nonce of an authenticated sender; the same again, or one too late, changes nothing.

        Raises:
            ProtocolError: FS-1391 of another size, FS-1392 not signed by that site, or not what it committed to.
        """
        if len(message) != MESSAGE_BYTES:
            raise _ill_formed(f"a message of {len(message)} bytes")
        if site not in self.waiting_for():
            return
        signed = Signed(message[:_HASH], message[_HASH:])
        if self.stage == "commit":
            _check_commitment(self.toss, site, signed, roster=self._roster)
            self._commitments[site] = signed
        else:
            check_reveal(self.toss, site, signed, commitments=self._listed, roster=self._roster)
            self._reveals[site] = signed

    def close(self) -> Mapping[str, bytes]:
        """End the stage; the list for those that are in it, nothing after the last stage.

        Raises:
            RoundAborted: FS-1396 too few committed, or somebody did not reveal.
        """
        left, missing = self._listed, self.waiting_for()
        if self.stage == "commit":
            if len(left) < self.toss.required:
                raise given_up(f"{len(left)} of {self.toss.required} needed committed; missing: {', '.join(missing)}")
            self.stage = "reveal"
            return dict.fromkeys(left, pack_list(left))
        if missing:
            raise given_up(f"committed and not revealed: {', '.join(missing)}")
        self.stage = "done"
        return {}

    def record(self) -> Record:
        """What everybody gets, once it is done."""
        assert self.stage == "done"
        return Record(self.toss, self._listed, {site: self._reveals[site] for site in self._listed})

    def withheld(self) -> tuple[str, ...]:
        """Who committed and has not revealed: the next toss goes on without them."""
        return self.waiting_for() if self.stage == "reveal" else ()

    @property
    def _listed(self) -> dict[str, Signed]:
        return {site: self._commitments[site] for site in self.toss.parties if site in self._commitments}


# --- what both sides compute --------------------------------------------------------------------------------------


def commitment(toss: Toss, site: str, nonce: bytes) -> bytes:
    """SHA-256 over toss, site and nonce: hiding, since the nonce is 32 random bytes, and binding."""
    return hashlib.sha256(_COMMIT.encode() + b"\0" + toss.ctx + pack_bytes(site.encode()) + nonce).digest()


def hash_list(toss: Toss, commitments: Mapping[str, Signed]) -> bytes:
    """SHA-256 over toss, sites and commitments, 32 bytes."""
    items = [pack_bytes(site.encode()) + signed.value for site, signed in commitments.items()]
    return hashlib.sha256(_LIST + toss.ctx + struct.pack(">I", len(items)) + b"".join(items)).digest()


def pack_list(commitments: Mapping[str, Signed]) -> bytes:
    """The list as it is shown."""
    items = [pack_bytes(site.encode()) + signed.value + signed.signature for site, signed in commitments.items()]
    return struct.pack(">I", len(items)) + b"".join(items)


def read_list(reader: Reader) -> dict[str, Signed]:
    """Inverse of :func:`pack_list`; raises ``struct.error`` or ``ValueError``."""
    found: dict[str, Signed] = {}
    for _ in range(reader.count(MAX_SITES)):
        site = reader.bytes().decode()
        if site in found:
            raise ValueError("a site twice")
        found[site] = _signed(reader)
    return found


def check_list(toss: Toss, commitments: Mapping[str, Signed], *, roster: Roster) -> None:
    """FS-1391 not parties in their order, FS-1394 too few, FS-1392 a signature is not that site's."""
    if list(commitments) != [site for site in toss.parties if site in commitments]:
        raise _ill_formed("commitments of others than the parties, or out of order")
    if len(commitments) < toss.required:
        raise ProtocolError(
            "FS-1394",
            f"a toss of {len(commitments)} sites",
            expected=f"at least {toss.required}, so that an honest one is among them",
            cure="bring the missing sites back; do not accept fewer",
        )
    for site, signed in commitments.items():
        _check_commitment(toss, site, signed, roster=roster)


def check_reveal(toss: Toss, site: str, reveal: Signed, *, commitments: Mapping[str, Signed], roster: Roster) -> None:
    """FS-1392 unless the site signed this nonce for this list, and had committed to it."""
    body = toss.ctx + hash_list(toss, commitments) + reveal.value
    if not keys.verify(roster.find(site).identity_key, _REVEAL, body, reveal.signature):
        raise _forged(f"a nonce of {site!r} that it did not sign for this list")
    if not compare_digest(commitment(toss, site, reveal.value), commitments[site].value):
        raise _forged(f"a nonce of {site!r} that is not the one it committed to")


def _check_commitment(toss: Toss, site: str, signed: Signed, *, roster: Roster) -> None:
    if not keys.verify(roster.find(site).identity_key, _COMMIT, toss.ctx + signed.value, signed.signature):
        raise _forged(f"a commitment of {site!r} that it did not sign")


def _signed(reader: Reader) -> Signed:
    if reader.left < MESSAGE_BYTES:
        raise ValueError("truncated")
    raw = reader.raw[reader.position : reader.position + MESSAGE_BYTES]
    reader.position += MESSAGE_BYTES
    return Signed(raw[:_HASH], raw[_HASH:])


def _read_toss(reader: Reader) -> Toss:
    if not reader.raw.startswith(_TOSS):
        raise ValueError("no toss")
    reader.position = len(_TOSS)
    run_id, roster_hash, config_hash = reader.bytes(), reader.bytes(), reader.bytes()
    number, required = reader.numbers(">II")
    parties = tuple(reader.bytes().decode() for _ in range(reader.count(MAX_SITES)))
    if len(set(parties)) != len(parties) or reader.left:
        raise ValueError("a site twice, or bytes after the end")
    return Toss(run_id, roster_hash, config_hash, number, parties, required)


def _ill_formed(reason: str) -> ProtocolError:
    return ProtocolError(
        "FS-1391",
        f"the toss for the run's draw: {reason}",
        expected="the canonical bytes of a toss, its messages and its record, version 1",
        cure="use the same release of fedsecure at the aggregator and at the sites",
    )


def _forged(found: str) -> ProtocolError:
    return ProtocolError(
        "FS-1392",
        found,
        expected="commitments and nonces signed by the sites of the roster, each nonce as committed to",
        cure="do not go on with who sent it; report it",
    )


def _dropped(found: str) -> ProtocolError:
    return ProtocolError(
        "FS-1393",
        found,
        expected="this site's own commitment and nonce in what everybody is shown",
        cure="do not go on with this aggregator; report it",
    )


def given_up(found: str) -> RoundAborted:
    """FS-1396: a toss that ends without a seed."""
    return RoundAborted(
        "FS-1396",
        f"a toss for the run's draw is given up: {found}",
        expected="every site that commits to reveal",
        cure="none needed: the next toss goes on without who did not; if it repeats, look at the named sites",
    )


__all__ = ["CoinServer", "CoinSite", "Record", "Signed", "Toss", "given_up", "is_record", "is_toss"]
