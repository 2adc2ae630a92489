"""What the keys of a prepared epoch are set up for, in canonical bytes whose hash binds them (secagg.md §3.7)."""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass
from functools import cached_property

from fedsecure.config import MAX_PREPARED
from fedsecure.errors import ProtocolError
from fedsecure.identity.roster import Roster
from fedsecure.secagg.canonical import Reader, pack_bytes
from fedsecure.secagg.descriptor import PROTO, RoundDescriptor
from fedsecure.secagg.party import broken
from fedsecure.secagg.thresholds import MAX_SITES, Mode, Thresholds

MAX_SLOTS = 1024
MAX_BYTES = 1 << 16
PREFIX = b"fedsecure/secagg/v1/epoch"


@dataclass(frozen=True)
class EpochDescriptor:
    """What the keys of an epoch are set up for.

    Attributes:
        mode, threshold, min_survivors, colluders: as every round of the epoch has them.
        run_id: 16 bytes.
        roster_hash: SHA-256 of the roster.
        config_hash: SHA-256 of the federation's public settings.
        epoch: its number, strictly increasing within a run.
        slots: R, 1 … 1024, and times the sites at most 60 000: a message of the set-up stays below 8 MiB.
        cohort: site ids in protocol order.

    Raises:
        ProtocolError: FS-1300, FS-1301 thresholds; FS-1314 an ill-formed field.
    """

    mode: Mode
    run_id: bytes
    roster_hash: bytes
    config_hash: bytes
    epoch: int
    slots: int
    cohort: tuple[str, ...]
    threshold: int
    min_survivors: int
    colluders: int

    def __post_init__(self) -> None:
        if (len(self.run_id), len(self.roster_hash), len(self.config_hash)) != (16, 32, 32):
            raise _ill_formed("a run id or a hash of wrong size")
        if not (0 <= self.epoch < 1 << 64 and 1 <= self.slots <= MAX_SLOTS):
            raise _ill_formed(f"epoch {self.epoch} of {self.slots} slots")
        if self.slots * len(self.cohort) > MAX_PREPARED:
            raise _ill_formed(f"{self.slots} slots for {len(self.cohort)} sites, more than {MAX_PREPARED} in all")
        if len(set(self.cohort)) != len(self.cohort):
            raise _ill_formed("a site appears twice in the cohort")
        Thresholds(len(self.cohort), self.colluders, self.threshold, self.min_survivors, self.mode)

    @staticmethod
    def choose(
        cohort: tuple[str, ...],
        *,
        run_id: bytes,
        epoch: int,
        slots: int,
        roster: Roster,
        config_hash: bytes,
        colluders: int | None = None,
        min_survivors: int | None = None,
        mode: Mode = Mode.ACTIVE,
    ) -> EpochDescriptor:
        """An epoch with thresholds as :meth:`Thresholds.choose`: give it what the rounds will be given."""
        chosen = Thresholds.choose(len(cohort), mode=mode, colluders=colluders, min_survivors=min_survivors)
        return EpochDescriptor(
            mode=mode,
            run_id=run_id,
            roster_hash=roster.hash,
            config_hash=config_hash,
            epoch=epoch,
            slots=slots,
            cohort=cohort,
            threshold=chosen.threshold,
            min_survivors=chosen.min_survivors,
            colluders=chosen.colluders,
        )

    @property
    def neighbours(self) -> int:
        """An epoch has the complete graph."""
        return 0

    @cached_property
    def ctx(self) -> bytes:
        """SHA-256("fedsecure/secagg/v1/epoch" ‖ 0x00 ‖ canonical), 32 bytes."""
        return hashlib.sha256(PREFIX + b"\0" + self.canonical()).digest()

    @property
    def latch_run(self) -> bytes:
        """Under which name the latch counts the epochs and slots of this run, 16 bytes."""
        return hashlib.sha256(PREFIX + b"-run\0" + self.run_id).digest()[:16]

    def canonical(self) -> bytes:
        """The canonical bytes."""
        out = [struct.pack(">II", PROTO, self.mode.value)]
        out += [pack_bytes(value) for value in (self.run_id, self.roster_hash, self.config_hash)]
        out += [struct.pack(">QII", self.epoch, self.slots, len(self.cohort))]
        out += [pack_bytes(site.encode()) for site in self.cohort]
        return b"".join([*out, struct.pack(">III", self.threshold, self.min_survivors, self.colluders)])

    @staticmethod
    def parse(raw: bytes) -> EpochDescriptor:
        """Inverse of :meth:`canonical`, accepting nothing else; FS-1314 malformed, truncated or too large."""
        if len(raw) > MAX_BYTES:
            raise _ill_formed(f"{len(raw)} bytes, more than {MAX_BYTES}")
        try:
            descriptor = _read(Reader(raw))
        except (struct.error, ValueError) as error:
            raise _ill_formed("malformed bytes") from error
        if descriptor.canonical() != raw:
            raise _ill_formed("not in canonical form")
        return descriptor

    def require_fit(self, descriptor: RoundDescriptor) -> None:
        """FS-1357 unless the round is one of this epoch, with the same sites and thresholds; FS-1359 beyond it."""
        mine = (self.run_id, self.roster_hash, self.config_hash, self.cohort, self.mode)
        theirs = (
            descriptor.run_id,
            descriptor.roster_hash,
            descriptor.config_hash,
            descriptor.cohort,
            descriptor.mode,
        )
        numbers = (self.threshold, self.min_survivors, self.colluders)
        if (
            descriptor.epoch != self.ctx
            or mine != theirs
            or numbers != (descriptor.threshold, descriptor.min_survivors, descriptor.colluders)
        ):
            raise broken("FS-1357", "a round of another epoch, or for other sites or thresholds", "those set up")
        if descriptor.slot >= self.slots:
            raise broken(
                "FS-1359", f"slot {descriptor.slot}", f"one of the {self.slots} of this epoch: set up a new one"
            )


def _read(reader: Reader) -> EpochDescriptor:
    proto, mode = reader.numbers(">II")
    if proto != PROTO:
        raise ValueError("unknown protocol version")
    run_id, roster_hash, config_hash = reader.bytes(), reader.bytes(), reader.bytes()
    epoch, slots = reader.numbers(">QI")
    cohort = tuple(reader.bytes().decode() for _ in range(reader.count(MAX_SITES)))
    threshold, min_survivors, colluders = reader.numbers(">III")
    return EpochDescriptor(
        mode=Mode(mode),
        run_id=run_id,
        roster_hash=roster_hash,
        config_hash=config_hash,
        epoch=epoch,
        slots=slots,
        cohort=cohort,
        threshold=threshold,
        min_survivors=min_survivors,
        colluders=colluders,
    )


def _ill_formed(reason: str) -> ProtocolError:
    return ProtocolError(
        "FS-1314",
        f"epoch descriptor: {reason}",
        expected="the canonical bytes and fields of an epoch descriptor, version 1",
        cure="use the same release of fedsecure at the aggregator and at the sites",
    )
