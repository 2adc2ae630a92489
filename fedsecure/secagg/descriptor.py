"""The round descriptor: everything a round is about, in one canonical byte string whose hash binds every key,
ciphertext and signature of the round (secagg.md §3.2).

Canonical bytes have a fixed field order, big-endian integers of fixed width and a u32 length before every
byte string; they are never a protobuf encoding. The quantiser and noise fields are the list of the query's
segments.
"""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property

from fedsecure.errors import ProtocolError
from fedsecure.identity.roster import Roster
from fedsecure.messages import Query, Segment
from fedsecure.secagg.canonical import Reader, pack_bytes, pack_number
from fedsecure.secagg.thresholds import MAX_GRAPH_SITES, MAX_SITES, Mode, Thresholds

PROTO = 1
RING_BITS = 32
RINGS = (32, 16)
PRG_AES256_CTR = 1
COMPLETE, HARARY = "complete", "harary"
MAX_LENGTH = 1 << 34  # words under one mask key: 2^36 bytes
MAX_SEGMENTS = 4096
MAX_BYTES = 1 << 21
MAX_VARIANCE_BYTES = 1024  # each of numerator and denominator: to reduce a fraction takes time in their square
_GRAPHS = {COMPLETE: 1, HARARY: 2}


@dataclass(frozen=True)
class RoundDescriptor:
    """One attempt of one round.

    Attributes:
        mode: adversary the thresholds are for.
        run_id: 16 bytes.
        roster_hash: SHA-256 of the roster.
        round, attempt: the pair strictly increases within a run.
        model_hash: hash of the map from every broadcast tensor's name to its hash.
        base_hash: SHA-256 fingerprint of the frozen encoder.
        config_hash: SHA-256 of the federation's public settings.
        segments: layout, quantiser and noise of the ring vector.
        query_hash: SHA-256 of the canonical JSON of the query: method, version, DP events.
        cohort: site ids; position k has protocol index k + 1.
        threshold, min_survivors, colluders: t, u_min, c.
        ring_bits: b, 32 or 16.
        prg_id: 1 is AES-256-CTR.
        graph: ``"complete"``, or ``"harary"`` for more than 128 sites in mode HBC (secagg.md §3.8).
        neighbours: k of the Harary graph, 0 for the complete graph; t is then of k, not of n.
        epoch: context of the epoch whose slot gives the keys (§3.7), empty for a round that sets up its own.
        slot: which one, from 0.

    Raises:
        ProtocolError: FS-1300, FS-1301 thresholds; FS-1310 unsupported ring, PRG or graph; FS-1312 an
            ill-formed field; FS-1313 a sparse graph where it is not safe.
    """

    mode: Mode
    run_id: bytes
    roster_hash: bytes
    round: int
    attempt: int
    model_hash: bytes
    base_hash: bytes
    config_hash: bytes
    segments: tuple[Segment, ...]
    query_hash: bytes
    cohort: tuple[str, ...]
    threshold: int
    min_survivors: int
    colluders: int
    ring_bits: int = RING_BITS
    prg_id: int = PRG_AES256_CTR
    graph: str = COMPLETE
    neighbours: int = 0
    epoch: bytes = b""
    slot: int = 0

    def __post_init__(self) -> None:
        if self.ring_bits not in RINGS or self.prg_id != PRG_AES256_CTR or self.graph not in _GRAPHS:
            raise ProtocolError(
                "FS-1310",
                f"ring of {self.ring_bits} bits, PRG {self.prg_id}, graph {self.graph!r}",
                expected=f"32 or 16 bits, PRG {PRG_AES256_CTR} (AES-256-CTR), graph {COMPLETE!r} or {HARARY!r}",
                cure="use the same release of fedsecure at the aggregator and at the sites",
            )
        problem = self._problem()
        if problem:
            raise ProtocolError(
                "FS-1312",
                f"round descriptor: {problem}",
                expected="fields as secure aggregation v1 defines them",
                cure="use the same release of fedsecure at the aggregator and at the sites",
            )
        if self.graph == HARARY:
            require_sparse_is_safe(self.mode, len(self.cohort))
        _ = self.thresholds

    def _problem(self) -> str | None:
        if len(self.run_id) != 16:
            return f"run id of {len(self.run_id)} bytes"
        for name in ("roster_hash", "model_hash", "base_hash", "config_hash", "query_hash"):
            if len(getattr(self, name)) != 32:
                return f"{name} of {len(getattr(self, name))} bytes"
        if not (0 <= self.round < 1 << 64 and 0 <= self.attempt < 1 << 32):
            return f"round {self.round}, attempt {self.attempt}"
        if len(set(self.cohort)) != len(self.cohort):
            return "a site appears twice in the cohort"
        if not 1 <= len(self.segments) <= MAX_SEGMENTS or not 1 <= self.length <= MAX_LENGTH:
            return f"{len(self.segments)} segments of {self.length} words"
        if len({s.name for s in self.segments}) != len(self.segments):
            return "two segments have the same name"
        if any("\ud800" <= letter <= "\udfff" for s in self.segments for letter in s.name):
            return "a segment name that UTF-8 cannot hold"
        if any(s.bound >= 1 << 64 or s.clamp >= 1 << 64 for s in self.segments):
            return "a bound or clamp beyond 64 bits"
        variances = [number for s in self.segments for number in s.noise_variance.as_integer_ratio()]
        if any(number.bit_length() > 8 * MAX_VARIANCE_BYTES for number in variances):
            return f"a noise variance beyond {MAX_VARIANCE_BYTES} bytes"
        if (self.graph == HARARY) != (self.neighbours > 0):
            return f"graph {self.graph!r} with {self.neighbours} neighbours"
        if len(self.epoch) not in (0, 32) or not 0 <= self.slot < 1 << 32 or (self.slot and not self.epoch):
            return f"slot {self.slot} of an epoch of {len(self.epoch)} bytes"
        if self.epoch and self.neighbours:
            return "an epoch with a sparse graph"
        return None

    @staticmethod
    def from_query(
        query: Query,
        *,
        roster: Roster,
        config_hash: bytes,
        base_hash: bytes,
        colluders: int | None = None,
        min_survivors: int | None = None,
        mode: Mode = Mode.ACTIVE,
        epoch: bytes = b"",
        slot: int = 0,
    ) -> RoundDescriptor:
        """The descriptor of ``query``; c and u_min as :meth:`Thresholds.choose` where ``None``, t the least.

        More than 128 sites get a Harary graph. ``epoch`` and ``slot`` name prepared keys, if there are any.
        """
        sparse = len(query.cohort) > MAX_SITES
        if sparse:
            require_sparse_is_safe(mode, len(query.cohort))
        chosen = Thresholds.choose(len(query.cohort), mode=mode, colluders=colluders, min_survivors=min_survivors)
        return RoundDescriptor(
            mode=mode,
            run_id=query.run,
            roster_hash=roster.hash,
            round=query.round,
            attempt=query.attempt,
            model_hash=query.model_hash,
            base_hash=base_hash,
            config_hash=config_hash,
            segments=query.segments,
            query_hash=hash_query(query),
            cohort=query.cohort,
            threshold=chosen.threshold,
            min_survivors=chosen.min_survivors,
            colluders=chosen.colluders,
            ring_bits=query.ring_bits,
            graph=HARARY if sparse else COMPLETE,
            neighbours=chosen.neighbours,
            epoch=epoch,
            slot=slot,
        )

    @property
    def thresholds(self) -> Thresholds:
        """n, c, t, u_min, k; checked."""
        return Thresholds(
            len(self.cohort), self.colluders, self.threshold, self.min_survivors, self.mode, self.neighbours
        )

    @property
    def slots(self) -> int:
        """A round sets up keys for itself alone."""
        return 1

    @property
    def word_bytes(self) -> int:
        """Bytes of a ring word, b/8."""
        return self.ring_bits // 8

    @property
    def length(self) -> int:
        """d, ring words of the whole vector."""
        return sum(segment.length for segment in self.segments)

    @cached_property
    def ctx(self) -> bytes:
        """SHA-256("fedsecure/secagg/v1/ctx" ‖ 0x00 ‖ canonical), 32 bytes."""
        return hashlib.sha256(b"fedsecure/secagg/v1/ctx\0" + self.canonical()).digest()

    def index(self, site: str) -> int:
        """Protocol index of a site, from 1; ``ValueError`` where it is not in the cohort."""
        return self.cohort.index(site) + 1

    def canonical(self) -> bytes:
        """The canonical bytes."""
        out = [
            struct.pack(">II", PROTO, self.mode.value),
            pack_bytes(self.run_id),
            pack_bytes(self.roster_hash),
            struct.pack(">QI", self.round, self.attempt),
            *(pack_bytes(value) for value in (self.model_hash, self.base_hash, self.config_hash)),
            struct.pack(">QBBI", self.length, self.ring_bits, self.prg_id, len(self.segments)),
        ]
        for s in self.segments:
            out += [
                pack_bytes(s.name.encode()),
                struct.pack(">QdQQ", s.length, s.grid, s.bound, s.clamp),
                pack_bytes(s.rotation_seed or b""),
                pack_number(s.noise_variance.numerator),
                pack_number(s.noise_variance.denominator),
            ]
        out += [pack_bytes(self.query_hash), struct.pack(">I", len(self.cohort))]
        out += [pack_bytes(site.encode()) for site in self.cohort]
        numbers = (self.threshold, self.min_survivors, self.colluders, _GRAPHS[self.graph])
        out.append(struct.pack(">IIIB", *numbers))
        if self.graph == HARARY:
            out.append(struct.pack(">I", self.neighbours))
        if self.epoch:
            out += [pack_bytes(self.epoch), struct.pack(">I", self.slot)]
        return b"".join(out)

    @staticmethod
    def parse(raw: bytes) -> RoundDescriptor:
        """Inverse of :meth:`canonical`, accepting nothing but canonical bytes.

        Raises:
            ProtocolError: FS-1311 malformed, truncated or too large; and what the constructor raises.
        """
        reader = Reader(raw)
        if len(raw) > MAX_BYTES:
            raise _malformed(f"{len(raw)} bytes, more than {MAX_BYTES}")
        try:
            descriptor = _read(reader)
        except (struct.error, ValueError, AssertionError) as error:
            raise _malformed(f"malformed near byte {reader.position}") from error
        if descriptor.canonical() != raw:
            raise _malformed("not in canonical form")
        return descriptor


def require_sparse_is_safe(mode: Mode, sites: int) -> None:
    """FS-1313 where a k-regular graph would not keep the promise of the mode."""
    if mode is Mode.ACTIVE:
        raise ProtocolError(
            "FS-1313",
            f"a sparse graph for {sites} sites in mode ACTIVE",
            expected=f"mode HBC, or at most {MAX_SITES} sites: an active server could try out graphs",
            cure="split the sites into cohorts of at most 128, or agree on mode HBC and its weaker claim",
        )
    if sites <= MAX_SITES:
        raise ProtocolError(
            "FS-1313",
            f"a sparse graph for {sites} sites",
            expected=f"the complete graph up to {MAX_SITES} sites: it is affordable and leaves nothing to chance",
            cure="use the complete graph",
        )


def hash_query(query: Query) -> bytes:
    """SHA-256 over the canonical JSON of a query."""
    return hashlib.sha256(b"fedsecure/query/v1\0" + query.to_json().encode()).digest()


def _read(reader: Reader) -> RoundDescriptor:
    proto, mode = reader.numbers(">II")
    if proto != PROTO:
        raise ValueError("unknown protocol version")
    run_id, roster_hash = reader.bytes(), reader.bytes()
    round_, attempt = reader.numbers(">QI")
    model_hash, base_hash, config_hash = reader.bytes(), reader.bytes(), reader.bytes()
    _, ring_bits, prg_id = reader.numbers(">QBB")
    segments = tuple(_read_segment(reader) for _ in range(reader.count(MAX_SEGMENTS)))
    query_hash = reader.bytes()
    cohort = tuple(reader.bytes().decode() for _ in range(reader.count(MAX_GRAPH_SITES)))
    threshold, min_survivors, colluders, graph = reader.numbers(">IIIB")
    names = {number: name for name, number in _GRAPHS.items()}
    (neighbours,) = reader.numbers(">I") if graph == _GRAPHS[HARARY] else (0,)
    epoch = reader.bytes() if reader.left else b""
    (slot,) = reader.numbers(">I") if epoch else (0,)
    return RoundDescriptor(
        mode=Mode(mode),
        run_id=run_id,
        roster_hash=roster_hash,
        round=round_,
        attempt=attempt,
        model_hash=model_hash,
        base_hash=base_hash,
        config_hash=config_hash,
        segments=segments,
        query_hash=query_hash,
        cohort=cohort,
        threshold=threshold,
        min_survivors=min_survivors,
        colluders=colluders,
        ring_bits=ring_bits,
        prg_id=prg_id,
        graph=names.get(graph, f"number {graph}"),
        neighbours=neighbours,
        epoch=epoch,
        slot=slot,
    )


def _read_segment(reader: Reader) -> Segment:
    name = reader.bytes().decode()
    length, grid, bound, clamp = reader.numbers(">QdQQ")
    seed = reader.bytes()
    numerator, denominator = (reader.number(MAX_VARIANCE_BYTES) for _ in range(2))
    if denominator == 0:
        raise ValueError("variance with denominator 0")
    variance = Fraction(numerator, denominator)
    return Segment(name, length, float(grid), bound, clamp, variance, seed or None)


def _malformed(reason: str) -> ProtocolError:
    return ProtocolError(
        "FS-1311",
        f"round descriptor: {reason}",
        expected="the canonical bytes of a round descriptor, version 1",
        cure="use the same release of fedsecure at the aggregator and at the sites",
    )
