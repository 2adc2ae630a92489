"""The one door. Everything that leaves a site passes it, in this order (architecture.md §1):

    policy → reserve (ledger, fsynced) → answer (method) → bound → noise → encode → mask (secagg) → sign → commit → send

No record is read before ``reserve`` has returned. What fails after it stays charged: the ledger cannot know what
leaked.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import numpy.typing as npt

from fedsecure.config import RunSettings, SiteConfig
from fedsecure.errors import FedsecureError, PrivacyError, RunError
from fedsecure.learning.features import SiteFeatures
from fedsecure.learning.units import UnitFeatures
from fedsecure.messages import Answer, Contribution, Event, FloatArray, Population, Query, RingArray, SiteState
from fedsecure.methods.base import Method, Tensor
from fedsecure.privacy import policy
from fedsecure.privacy.grid import privatise_on_grid, round_to_grid
from fedsecure.privacy.ledger import Ledger, Reservation
from fedsecure.privacy.noise import PrivacyRng
from fedsecure.privacy.payers import Payers
from fedsecure.privacy.plan import paid_by
from fedsecure.privacy.ring16 import RING_BITS, sum_records
from fedsecure.secagg.client import MaskedInput
from fedsecure.secagg.ring import to_ring

_ROUNDING = 1e-9


@dataclass(frozen=True, slots=True)
class Source:
    """Where one population's units come from.

    Attributes:
        dataset: name under which the ledger charges.
        public: declared public by this site *and* by the federation.
        load: reads the units; called only after the charge is on disk.
        hashes: who pays, from identifiers alone; called for the charge.
    """

    dataset: str
    public: bool
    load: Callable[[], UnitFeatures]
    hashes: Callable[[], Payers] | None = None


@dataclass(slots=True)
class Capability:
    """What a site half may do while it answers one query; implements ``methods.base.Release``.

    It keeps count of what was read, sampled and noised, for the door's checks, and is dead once the answer is given.
    """

    query: Query
    site: str
    settings: RunSettings
    features: SiteFeatures
    device: str
    engine: Literal["auto", "opacus", "closed-form"]
    _charged: tuple[Event, ...]
    _sources: Mapping[Population, Source]
    _rng: PrivacyRng
    steps_taken: int = 0
    samples_drawn: int = 0
    units_read: int = 0
    read_private: set[str] = field(default_factory=set)
    rounded: dict[str, FloatArray] = field(default_factory=dict)
    answered: bool = False

    def units(self, population: Population) -> UnitFeatures | None:
        self._require_open()
        source = self._sources.get(population)
        if source is None:
            return None
        if not source.public:
            if not any(event.population == population for event in self._charged):
                raise PrivacyError(
                    "FS-1240",
                    f"method {self.query.method!r} reads {population} units that the query does not pay for",
                    expected="an event for every private population that is read",
                    cure="report it to the method's author",
                )
            self.read_private.add(population)
        units = source.load()
        self.units_read = max(self.units_read, len(units))
        return units

    def sample(self, count: int) -> npt.NDArray[np.bool_]:
        self._require_open()
        self.samples_drawn += 1
        return self._rng.poisson_mask(count, self._training_event().sampling_rate)

    def privatise(self, clipped_sum: npt.NDArray[np.float64], clip_norm: float) -> npt.NDArray[np.float64]:
        self._require_open()
        event = self._training_event()
        self.steps_taken += 1
        if self.steps_taken > event.steps:
            raise PrivacyError(
                "FS-1241",
                f"local step {self.steps_taken} of a query that pays for {event.steps}",
                expected="at most the declared number of noisy steps",
                cure="report it to the method's author",
            )
        norm = self.settings.privacy.max_grad_norm
        length = float(np.linalg.norm(clipped_sum))
        if not (clip_norm >= norm * (1 - _ROUNDING) and length <= self.units_read * clip_norm * (1 + _ROUNDING)):
            raise PrivacyError(
                "FS-1249",
                f"a local step whose sum is not bounded as its noise assumes (clip norm {clip_norm:.6g})",
                expected=f"units clipped to {norm:.6g} each, and noise for that norm",
                cure="report it to the method's author",
            )
        return privatise_on_grid(
            clipped_sum, clip_norm=clip_norm, noise_multiplier=event.noise_multiplier, rng=self._rng
        )

    def sum_units(self, segment: str, vectors: Iterable[FloatArray]) -> FloatArray:
        self._require_open()
        layout = next((s for s in self.query.segments if s.name == segment), None)
        noised = layout is not None and layout.noise_variance > 0
        if layout is None or not noised or self.query.ring_bits != RING_BITS or segment in self.rounded:
            raise PrivacyError(
                "FS-1215",
                f"method {self.query.method!r} has units rounded for {segment!r}",
                expected="a noised segment of a query in the ring of 16 bits, once",
                cure="report it to the method's author",
            )
        total = sum_records(vectors, layout, rng=self._rng)
        # The answer must hold this very sum: what was changed since is no sum of rounded units.
        total.flags.writeable = False
        self.rounded[segment] = total
        return total

    def _require_open(self) -> None:
        if self.answered:
            raise PrivacyError(
                "FS-1247",
                f"method {self.query.method!r} goes on after its answer",
                expected="reading, sampling and noise only while a charged query is being answered",
                cure="report it to the method's author",
            )

    def _training_event(self) -> Event:
        for event in self._charged:
            if event.population == "train":
                return event
        raise PrivacyError(
            "FS-1242",
            "a noisy step was asked for in a query without a training event",
            expected="a charged training event",
            cure="report it to the method's author",
        )


@dataclass(slots=True)
class Door:
    """A site's only way out; holds the ledger, the privacy RNG and the sources of units.

    ``told`` hears of every charge once it is on disk, before a record is read.
    """

    config: SiteConfig
    settings: RunSettings
    features: SiteFeatures
    ledger: Ledger
    sources: Mapping[Population, Source]
    rng: PrivacyRng
    device: str
    run: bytes
    told: Callable[[Sequence[Reservation]], None] = lambda made: None

    def check(self, query: Query) -> None:
        """Refuse what the site's policy does not allow; also the first step of :meth:`release`.

        Raises:
            PrivacyError: the policy's; nothing was charged or read.
        """
        policy.check_query(query, self.settings, self.config.policy)

    def charges(self, query: Query) -> tuple[Event, ...]:
        """What this site pays: the events about a population it holds privately, at its own sampling rate."""
        events = paid_by(self.config.site, query.events, self.settings)
        return tuple(e for e in events if e.population in self.sources and not self.sources[e.population].public)

    def release(
        self,
        query: Query,
        method: Method,
        *,
        inputs: Mapping[str, Tensor],
        state: SiteState,
        seal: Callable[[RingArray], MaskedInput],
        send: Callable[[MaskedInput], None],
    ) -> tuple[Contribution, SiteState]:
        """Answer one query and send the answer.

        Args:
            query: already compared with the signed context by the caller.
            method: installed method of the query's name and version.
            inputs: broadcast tensors, hashes checked.
            state: what the method kept from earlier rounds.
            seal: masks and signs a ring vector (secagg client).
            send: carries it away; the charge is committed first.

        Raises:
            PrivacyError: the site's policy or a bound refuses (FS-1201 budget, FS-124x door, others from the policy).
            RunError: FS-1719 the method failed. The charge stands.
        """
        self.check(query)
        charged = self.charges(query)
        reservations = self._reserve(query, charged)
        self.told(reservations)
        capability = Capability(
            query=query,
            site=self.config.site,
            settings=self.settings,
            features=self.features,
            device=self.device,
            engine=self.config.engine,
            _charged=charged,
            _sources=self.sources,
            _rng=self.rng,
        )
        try:
            answer, kept = method.answer(inputs, state, capability)
        except FedsecureError:
            raise
        except Exception as error:
            raise RunError(
                "FS-1719",
                f"method {query.method!r} failed ({type(error).__name__})",
                expected="an answer, or an error of fedsecure",
                cure="report it to the method's author, with the site's log; what was charged stays charged",
            ) from error
        finally:
            capability.answered = True
        self._check(query, answer, charged, capability)
        vector = self._encode(query, answer, noisy=bool(charged))
        sealed = seal(vector)
        digest = hashlib.sha256(sealed.header).digest()
        for reservation in reservations:
            self.ledger.commit(reservation, digest)
        send(sealed)
        names = ",".join(reservation.id for reservation in reservations)
        return Contribution(vector=vector, reservation=names, charged=charged), kept

    def _reserve(self, query: Query, charged: tuple[Event, ...]) -> list[Reservation]:
        digest = hashlib.sha256(query.to_json().encode()).digest()
        limits = self.config.policy
        reservations: list[Reservation] = []
        for population, source in self.sources.items():
            events = tuple(event for event in charged if event.population == population)
            if events:
                limit = limits.max_epsilon if population == "train" else limits.max_evaluation_epsilon
                try:
                    reservation = self.ledger.reserve(
                        dataset=source.dataset,
                        population=population,
                        events=events,
                        run=self.run.hex(),
                        round=query.round,
                        attempt=query.attempt,
                        query_digest=digest,
                        limit_epsilon=limit,
                        delta=limits.delta,
                        units=source.hashes() if source.hashes is not None else None,
                        seeded=self.rng.seeded,
                    )
                except PrivacyError:
                    for earlier in reservations:
                        self.ledger.void(earlier, f"{population} units could not be charged; nothing was read")
                    raise
                reservations.append(reservation)
        return reservations

    def _check(self, query: Query, answer: Answer, charged: tuple[Event, ...], used: Capability) -> None:
        """Bound: shapes, finite numbers, norms; and that sampling and noise were those that are paid for."""
        for segment in query.segments:
            values = answer.values.get(segment.name)
            if (
                not isinstance(values, np.ndarray)
                or values.dtype != np.float64
                or values.shape != (segment.length,)
                or not np.isfinite(values).all()
            ):
                raise PrivacyError(
                    "FS-1243",
                    f"segment {segment.name!r} of the answer is missing, misshapen or not finite",
                    expected=f"{segment.length} finite numbers, float64",
                    cure="look at the site's training data and log",
                )
            if segment.noise_variance > 0:
                if query.ring_bits == RING_BITS and values is not used.rounded.get(segment.name):
                    raise PrivacyError(
                        "FS-1217",
                        f"segment {segment.name!r} was not rounded unit by unit",
                        expected="the sum that the door made of single units: the bound has room for no other rounding",
                        cure="use ring_bits = 32, or a method that answers in the ring of 16 bits",
                    )
                units = min(answer.units.get(segment.name, 0), used.units_read)
                most = units * segment.bound * segment.grid
                if float(np.linalg.norm(values)) > most * (1 + _ROUNDING):
                    raise PrivacyError(
                        "FS-1244",
                        f"segment {segment.name!r} is longer than its units allow",
                        expected="norm at most units times the clip norm",
                        cure="report it to the method's author",
                    )
            elif used.read_private:
                declared = sum(event.steps for event in charged if policy.by_steps(event, self.settings))
                # The noise of local steps is on what was trained, and on nothing that was read beside it.
                trained = used.read_private == {"train"} and declared > 0
                if not trained or self.settings.privacy.noise != "local" or used.steps_taken != declared:
                    raise PrivacyError(
                        "FS-1245",
                        f"segment {segment.name!r} would leave without noise after {used.steps_taken} noisy steps",
                        expected="noise from the door; or training units alone and all declared local steps "
                        f"({declared})",
                        cure="report it to the method's author",
                    )
        for event in charged:
            # Without the draw, or with a choice among several, the charge for a sample would be too small.
            sampled = event.population == "train" and event.sampling_rate < 1 and "train" in used.read_private
            if sampled and used.samples_drawn != event.steps:
                raise PrivacyError(
                    "FS-1231",
                    f"{used.samples_drawn} samples drawn for {event.steps} step(s) charged at rate "
                    f"{event.sampling_rate:g}",
                    expected="one Poisson sample for each step",
                    cure="report it to the method's author",
                )

    def _encode(self, query: Query, answer: Answer, *, noisy: bool) -> RingArray:
        parts = []
        for segment in query.segments:
            words = round_to_grid(answer.values[segment.name], segment)
            if noisy and segment.noise_variance > 0:
                words = words + self.rng.discrete_gaussian(segment.length, segment.noise_variance)
            parts.append(to_ring(words, query.ring_bits))
        return np.concatenate(parts)
