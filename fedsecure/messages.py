"""The types every floor shares: what is asked of a site, what it gives, and what comes out.

A ``Query`` goes to every site of a cohort; each answers with one ``Contribution``, a flat vector of ring words;
the aggregator learns one ``Aggregate``, the sum over the survivors. All are frozen and hold no I/O.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]
RingArray = npt.NDArray[np.unsignedinteger[Any]]  # uint32, or uint16 in the ring of 16 bits
Population = Literal["train", "evaluation"]


def digest_tensor(name: str, tensor: npt.NDArray[Any]) -> bytes:
    """SHA-256 of a broadcast tensor: name, dtype, shape and little-endian C-ordered bytes."""
    array = np.ascontiguousarray(tensor)
    little = array.astype(array.dtype.newbyteorder("<"), copy=False)
    head = json.dumps([name, little.dtype.str, list(little.shape)], separators=(",", ":")).encode()
    return hashlib.sha256(struct.pack(">I", len(head)) + head + little.tobytes()).digest()


def digest_inputs(inputs: Mapping[str, bytes]) -> bytes:
    """The descriptor's ``model_hash``: SHA-256 over the sorted map from tensor name to tensor hash."""
    sha = hashlib.sha256(b"fedsecure/inputs/v1\0" + struct.pack(">I", len(inputs)))
    for name in sorted(inputs):
        raw = name.encode()
        sha.update(struct.pack(">I", len(raw)) + raw + inputs[name])
    return sha.digest()


@dataclass(frozen=True, slots=True)
class Segment:
    """One stretch of the ring vector, with everything that turns real numbers into ring words and back.

    Attributes:
        name: unique within the query.
        length: number of coordinates.
        grid: γ > 0, the real value of one ring step.
        bound: Δ, in grid steps: the most one privacy unit can move the rounded sum in L2 norm; 0 where
            ``noise_variance`` is 0 (the values are already private, or public).
        clamp: K ≥ 1, in grid steps: a site's sum is clamped to [−K, K] coordinate by coordinate.
        noise_variance: σ_i², in grid steps squared: the variance of the exact discrete Gaussian that *each* site's door
            adds. 0 where the door adds none.
        rotation_seed: 32 public bytes of the randomised Hadamard rotation, or ``None``.
    """

    name: str
    length: int
    grid: float
    bound: int
    clamp: int
    noise_variance: Fraction = Fraction(0)
    rotation_seed: bytes | None = None

    def __post_init__(self) -> None:
        assert self.length >= 1 and self.clamp >= 1 and self.bound >= 0
        assert math.isfinite(self.grid) and self.grid > 0
        assert self.noise_variance >= 0
        assert self.rotation_seed is None or len(self.rotation_seed) == 32

    @property
    def noise_std(self) -> float:
        """σ_i in grid steps."""
        return math.sqrt(self.noise_variance)


@dataclass(frozen=True, slots=True)
class Event:
    """One Gaussian release about the units of one population at one site: what the ledger reserves.

    Frozen for good: the meaning of a stored event never changes; ε is always recomputed from events.

    Attributes:
        population: whose units pay, ``"train"`` or ``"evaluation"``.
        purpose: word for the report, such as ``"training"`` or ``"evaluation counts"``.
        noise_multiplier: standard deviation over L2 sensitivity of the noise in what is released, as seen by an
            adversary who controls the aggregator and at most c sites.
        local_noise_multiplier: the same for this site's own noise alone: what still holds when more than c collude.
        sampling_rate: q in (0, 1]; 1 means full batch, less means Poisson sampling of units.
        steps: how many times the mechanism runs, ≥ 1.
    """

    population: Population
    purpose: str
    noise_multiplier: float
    local_noise_multiplier: float
    sampling_rate: float = 1.0
    steps: int = 1

    def __post_init__(self) -> None:
        assert self.noise_multiplier > 0 and self.local_noise_multiplier > 0
        assert 0 < self.sampling_rate <= 1 and self.steps >= 1


@dataclass(frozen=True, slots=True)
class Query:
    """A question to every site of a cohort.

    Attributes:
        run: 16 random bytes that name the run.
        round, attempt: counted from 0; the pair strictly increases within a run.
        method, version: which installed method answers; no code travels.
        cohort: site ids in protocol order; position k has protocol index k + 1.
        inputs: name → SHA-256 of every tensor broadcast with the query.
        segments: layout of the ring vector.
        events: what the answer costs the site that is sampled most; each site works out its own price from the run's
            settings (:func:`fedsecure.privacy.plan.paid_by`).
        ring_bits: b, 32 or 16: the sum is taken modulo 2^b (secagg.md §4.2).
    """

    run: bytes
    round: int
    attempt: int
    method: str
    version: str
    cohort: tuple[str, ...]
    inputs: Mapping[str, bytes]
    segments: tuple[Segment, ...]
    events: tuple[Event, ...]
    ring_bits: int = 32

    def __post_init__(self) -> None:
        assert self.ring_bits in (16, 32)

    @property
    def length(self) -> int:
        """Total number of ring words."""
        return sum(segment.length for segment in self.segments)

    @property
    def model_hash(self) -> bytes:
        return digest_inputs(self.inputs)

    def to_json(self) -> str:
        """Canonical JSON; the wire form. Exact: floats as hexadecimal strings, variances as ratios."""
        return json.dumps(
            {
                "run": self.run.hex(),
                "round": self.round,
                "attempt": self.attempt,
                "method": self.method,
                "version": self.version,
                "cohort": list(self.cohort),
                "inputs": {name: value.hex() for name, value in self.inputs.items()},
                "segments": [
                    {
                        "name": s.name,
                        "length": s.length,
                        "grid": s.grid.hex(),
                        "bound": s.bound,
                        "clamp": s.clamp,
                        "noise_variance": [
                            str(s.noise_variance.numerator),
                            str(s.noise_variance.denominator),
                        ],
                        "rotation_seed": s.rotation_seed.hex() if s.rotation_seed else None,
                    }
                    for s in self.segments
                ],
                "events": [event_to_dict(e) for e in self.events],
                # Left out where it is 32, so that the hash of an earlier query stays what it was.
                **({} if self.ring_bits == 32 else {"ring_bits": self.ring_bits}),
            },
            sort_keys=True,
            separators=(",", ":"),
        )

    @staticmethod
    def from_json(text: str) -> Query:
        """Inverse of :meth:`to_json`; raises ``ValueError``, ``KeyError``, ``TypeError`` or ``AssertionError``."""
        raw = json.loads(text)
        return Query(
            run=bytes.fromhex(raw["run"]),
            round=int(raw["round"]),
            attempt=int(raw["attempt"]),
            method=str(raw["method"]),
            version=str(raw["version"]),
            cohort=tuple(str(x) for x in raw["cohort"]),
            inputs={str(k): bytes.fromhex(v) for k, v in raw["inputs"].items()},
            segments=tuple(
                Segment(
                    name=str(s["name"]),
                    length=int(s["length"]),
                    grid=float.fromhex(s["grid"]),
                    bound=int(s["bound"]),
                    clamp=int(s["clamp"]),
                    noise_variance=Fraction(int(s["noise_variance"][0]), int(s["noise_variance"][1])),
                    rotation_seed=bytes.fromhex(s["rotation_seed"]) if s["rotation_seed"] else None,
                )
                for s in raw["segments"]
            ),
            events=tuple(event_from_dict(e) for e in raw["events"]),
            ring_bits=int(raw.get("ring_bits", 32)),
        )


def event_to_dict(event: Event) -> dict[str, Any]:
    """Canonical JSON form of an event, floats as hexadecimal strings (exact)."""
    return {
        "population": event.population,
        "purpose": event.purpose,
        "noise_multiplier": float(event.noise_multiplier).hex(),
        "local_noise_multiplier": float(event.local_noise_multiplier).hex(),
        "sampling_rate": float(event.sampling_rate).hex(),
        "steps": event.steps,
    }


def event_from_dict(raw: Mapping[str, Any]) -> Event:
    """Inverse of :func:`event_to_dict`."""
    if raw["population"] not in ("train", "evaluation"):
        raise ValueError(f"unknown population {raw['population']!r}")
    return Event(
        population=raw["population"],
        purpose=str(raw["purpose"]),
        noise_multiplier=float.fromhex(raw["noise_multiplier"]),
        local_noise_multiplier=float.fromhex(raw["local_noise_multiplier"]),
        sampling_rate=float.fromhex(raw["sampling_rate"]),
        steps=int(raw["steps"]),
    )


@dataclass(frozen=True, slots=True)
class Answer:
    """What a method's site half returns to the door: real values per segment, not yet private.

    Attributes:
        values: segment name → float64 vector of the segment's length.
        units: segment name → number of privacy units summed in it; never leaves the site. The door checks that a
            segment's norm does not exceed ``units × bound``; 0 means no record was read for it.
    """

    values: Mapping[str, FloatArray]
    units: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Contribution:
    """The bounded, noised, encoded ring vector, and what the door attests about it.

    Attributes:
        vector: ring words (uint32 or uint16), the segments end to end.
        reservation: the ledger entry that paid for it.
        charged: the events charged, empty where no private record was read.
    """

    vector: RingArray
    reservation: str
    charged: tuple[Event, ...]


@dataclass(frozen=True, slots=True)
class Aggregate:
    """The decoded sum: per segment, float64; and how many sites are in it. Nothing per site.

    Attributes:
        values: segment name → float64 vector.
        survivors: number of sites in the sum.
        asked: the query's cohort, of whom the survivors are some; empty where it is all that may be asked.
    """

    values: Mapping[str, FloatArray]
    survivors: int
    asked: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class SiteState:
    """What a method keeps at a site between rounds; persisted per run, never sent."""

    tensors: Mapping[str, npt.NDArray[Any]] = field(default_factory=dict)
