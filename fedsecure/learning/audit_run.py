"""The empirical audit of privacy.md §4 on the real kernels: both engines, both units, the door's grid and its noise.

What the aggregator decodes is rebuilt from the same pieces the door uses: clipped sum, rounding, exact discrete
Gaussian shares of the honest sites that a sum is sure to contain, and the ring's addition; with ``noise="local"``
the fine grid and Gaussian noise of one site. Masks cancel, so they are left out.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch

from fedsecure.errors import ModelError
from fedsecure.learning.adapters import AdapterKind, AdapterSpec, Vector
from fedsecure.learning.audit_attack import attack_heads
from fedsecure.learning.audit_material import CLIP, Material, adversarial_units, load_material
from fedsecure.learning.audit_narrow import replay_narrow
from fedsecure.learning.canaries import Canaries, audited_sum, make_canaries
from fedsecure.learning.engines import EngineName, choose_engine, clipped_sum
from fedsecure.learning.task import HeadTask
from fedsecure.learning.training import suggest, train_locally
from fedsecure.learning.units import UnitFeatures
from fedsecure.messages import Segment
from fedsecure.privacy import accounting
from fedsecure.privacy.audit import (
    AuditResult,
    Bound,
    CanaryClaim,
    Check,
    Membership,
    audit_canaries,
    check_agreement,
    check_noise,
    check_sampler,
    check_sensitivity,
    check_unchanged,
)
from fedsecure.privacy.grid import distributed_segment, from_grid, privatise_on_grid, round_to_grid
from fedsecure.privacy.noise import PrivacyRng
from fedsecure.secagg.ring import lift, to_ring
from fedsecure.secagg.thresholds import Thresholds

Noise = Literal["distributed", "local"]
Unit = Literal["patient", "record"]
Engine = Literal["closed-form", "opacus"]

SITES = 3
_ENGINES: tuple[Engine, ...] = ("closed-form", "opacus")
_MOST_STEPS = 60


@dataclass(slots=True)
class Mechanism:
    """From a clipped sum to what an adversary sees of one step.

    Attributes:
        noise: the place.
        length: p, coordinates.
        noise_multiplier: z the accountant is told.
        units: largest number of units, for the grid.
        rngs: one generator for each honest site; fresh ones from the operating system.
    """

    noise: Noise
    length: int
    noise_multiplier: float
    units: int
    rngs: tuple[PrivacyRng, ...] = field(init=False)
    segment: Segment = field(init=False)

    def __post_init__(self) -> None:
        thresholds = Thresholds.choose(SITES)
        honest = thresholds.min_survivors - thresholds.colluders
        self.segment = distributed_segment(
            "gradient",
            self.length,
            clip_norm=CLIP,
            noise_multiplier=self.noise_multiplier,
            honest=honest,
            sites=SITES,
            units=self.units,
        )
        self.rngs = tuple(PrivacyRng() for _ in range(honest if self.noise == "distributed" else 1))

    @property
    def std(self) -> float:
        """Standard deviation of a step's noise over C, as the accountant has it."""
        if self.noise == "local":
            return self.noise_multiplier
        return self.noise_multiplier * self.segment.bound * self.segment.grid / CLIP

    def release(self, total: Vector) -> Vector:
        """A step's sum with its noise; the first honest site holds all units, the others none."""
        if self.noise == "local":
            return privatise_on_grid(total, clip_norm=CLIP, noise_multiplier=self.noise_multiplier, rng=self.rngs[0])
        words = np.zeros(self.length, np.uint32)
        for site, rng in enumerate(self.rngs):
            steps = round_to_grid(total if site == 0 else np.zeros_like(total), self.segment)
            steps = steps + rng.discrete_gaussian(self.length, self.segment.noise_variance)
            words = words + to_ring(steps)
        return from_grid(lift(words), self.segment)

    def sample(self, count: int, rate: float) -> npt.NDArray[np.bool_]:
        """Who takes part in a step."""
        return self.rngs[0].poisson_mask(count, rate)


def run_audit(
    *,
    features: Path | str | None = None,
    adapter: AdapterKind = "linear",
    noise: Noise = "distributed",
    unit: Unit = "record",
    engine: EngineName = "auto",
    epsilon: float = 2.0,
    delta: float = 1e-5,
    sampling_rate: float = 1.0,
    seconds: float = 45.0,
    canaries: int = 5000,
    membership: bool = True,
) -> AuditResult:
    """Audit the mechanism that training uses, on generated features or on a feature file's training rows.

    The canaries audit the mechanism, not the records, but layer C says something about the records it attacks: use
    public ones, or keep its figures at the site.

    Args:
        features: an ``.npz`` feature file (docs/datasets.md); None generates 512-d features in 10 classes.
        adapter: ``"linear"`` or ``"facmic"``.
        noise: ``"distributed"`` or ``"local"``.
        unit: ``"record"`` or ``"patient"``; what layers B and C group records by. Layer A tries both.
        engine: of layer B; layer A tries both.
        epsilon, delta: the claim that noise is calibrated to and the audit tries to refute.
        sampling_rate: 1 for full batch, less for Poisson sampling.
        seconds: aim for the whole; steps of layer B and models of layer C follow from it.
        canaries: most to plant, at least 20.
        membership: False leaves layer C out.

    Raises:
        PrivacyError: FS-1202 when ε, δ or the sampling rate are out of range; FS-1246 patients without patient ids.
        DataError, ModelError: as the readers of feature files say; FS-1644 for too few canaries or no time.
    """
    if canaries < 20 or not seconds > 0:
        raise ModelError(
            "FS-1644",
            f"an audit of {canaries} canaries in {seconds:g} seconds",
            expected="at least 20 canaries, and some time",
            cure="leave both at their defaults: 5000 canaries, 45 seconds",
        )
    started = time.monotonic()
    claimed = accounting.calibrate(epsilon, delta, steps=1, sampling_rate=sampling_rate)
    material = load_material(features, unit=unit)
    task = HeadTask(
        AdapterSpec(adapter, material.text.shape[1], material.text.shape[0]),
        material.text,
        material.centre,
        temperature=25.0 if adapter == "linear" else 30.0,
    )
    chosen = choose_engine(engine, task)
    checks = list(_replay(task, material, claimed))
    planted = make_canaries(task, canaries, records=material.units.mask.shape[1])
    real = material.units.limit_units(1000 if adapter == "linear" else 200)
    trial = _Trial(task, real, planted, noise, chosen, sampling_rate, epsilon, delta)
    steps = trial.affordable(0.4 * seconds)
    claim, mechanism, found, bounds = trial.run(steps)
    checks += _noise_checks(mechanism)
    checks += check_sampler(lambda count: mechanism.sample(count, sampling_rate), rate=sampling_rate)
    checks += found
    attacks: tuple[Membership, ...] = ()
    if membership:
        left = max(0.9 * seconds - (time.monotonic() - started), 0.0)
        attacks = attack_heads(material, epsilon=epsilon, delta=delta, seconds=left)
    facts = {
        "features": material.origin,
        "adapter": f"{adapter}, {task.spec.parameters:,} parameters",
        "engine": chosen,
        "noise": noise,
        "unit": unit,
        "steps": str(steps),
        "sampling rate": f"{sampling_rate:g}",
        "noise multiplier": f"{mechanism.noise_multiplier:.4g}",
        "canaries": str(len(planted)),
        "other units": str(len(real)),
        "seconds": f"{time.monotonic() - started:.1f}",
    }
    return AuditResult(claim.epsilon, delta, tuple(checks), bounds, attacks, facts)


def _replay(task: HeadTask, material: Material, noise_multiplier: float) -> Iterator[Check]:
    """Layer A over both engines and both units, on rows chosen to break a clip."""
    start = _perturbed(task)
    for unit in ("record", "patient"):
        units = adversarial_units(material.units, classes=task.spec.classes, patients=unit == "patient")
        sums = {}
        for engine in _ENGINES:

            def total(present: npt.NDArray[np.bool_], units: UnitFeatures = units, engine: Engine = engine) -> Vector:
                return clipped_sum(task, start, units.select(present), max_grad_norm=CLIP, engine=engine, device="cpu")

            yield check_sensitivity(
                total,
                len(units),
                bound=CLIP,
                name=f"sensitivity: {unit}, {engine}",
                probes=range(10),
            )
            sums[engine] = total(np.ones(len(units), np.bool_))

        def trained(present: npt.NDArray[np.bool_], units: UnitFeatures = units) -> Vector:
            """As local steps sum, where a unit that is gone leaves its place empty."""
            held = UnitFeatures(units.features, units.labels, units.mask & present[:, None])
            return clipped_sum(task, start, held, max_grad_norm=CLIP, device="cpu", precision="float32")

        yield check_sensitivity(trained, len(units), bound=CLIP, name=f"sensitivity: {unit}, float32", probes=range(10))
        yield check_agreement(sums["closed-form"], sums["opacus"], floor=CLIP, name=f"engines agree: {unit}")
        segment = Mechanism("distributed", task.spec.parameters, noise_multiplier, len(units)).segment

        def rounded(present: npt.NDArray[np.bool_], units: UnitFeatures = units, segment: Segment = segment) -> Vector:
            exact = clipped_sum(task, start, units.select(present), max_grad_norm=CLIP, device="cpu")
            return round_to_grid(exact, segment).astype(np.float64)

        yield check_sensitivity(
            rounded,
            len(units),
            bound=segment.bound,
            name=f"sensitivity on the grid: {unit}",
            probes=range(10),
        )
        yield from replay_narrow(task, start, units, sites=SITES, unit=unit)
        without = units.select(np.arange(len(units)) > 0)
        yield check_unchanged(
            _frozen_steps(task, units), _frozen_steps(task, without), name=f"rate and normaliser: {unit}"
        )


def _perturbed(task: HeadTask) -> dict[str, npt.NDArray[np.float32]]:
    """Tensors off the start, where no gradient vanishes."""
    rng = np.random.default_rng(0)
    start = task.spec.initial(b"audit")
    return {name: (value + 0.05 * rng.normal(size=value.shape)).astype(np.float32) for name, value in start.items()}


def _frozen_steps(task: HeadTask, units: UnitFeatures) -> Vector:
    """Two steps of the real driver whose noisy sums are replaced by constants: what is left must not know the data."""
    change = train_locally(
        task,
        task.spec.initial(b"audit"),
        units,
        steps=2,
        learning_rate=1.0,
        max_grad_norm=CLIP,
        normaliser=50.0,
        privatise=lambda total, clip: np.ones_like(total) * clip,
        sample=lambda count: np.ones(count, np.bool_),
        device="cpu",
    )
    return task.spec.flatten(change)


@dataclass(frozen=True, slots=True, eq=False)
class _Trial:
    """Layer B: real training with canaries among the units."""

    task: HeadTask
    real: UnitFeatures
    canaries: Canaries
    noise: Noise
    engine: Engine
    rate: float
    epsilon: float
    delta: float

    def affordable(self, seconds: float) -> int:
        """Steps that fit into ``seconds``, from the time that one takes."""
        began = time.monotonic()
        mechanism = self._mechanism(1)
        everyone = np.ones(len(self.canaries), np.bool_)
        self._step(mechanism, self.task.spec.initial(b"audit"), everyone)
        return int(min(max(seconds / (time.monotonic() - began), 4), _MOST_STEPS))

    def run(self, steps: int) -> tuple[CanaryClaim, Mechanism, tuple[Check, ...], tuple[Bound, ...]]:
        mechanism = self._mechanism(steps)
        claim = CanaryClaim(
            epsilon=self.epsilon,
            delta=self.delta,
            noise=mechanism.std,
            sampling_rate=self.rate,
            steps=steps,
            amplitude=self.canaries.amplitude,
        )
        declared = (len(self.real) + len(self.canaries)) * self.rate
        signal = self.rate * math.sqrt(steps) / mechanism.noise_multiplier
        rate, _ = suggest(
            self.task.spec.kind,
            mu_total=signal,
            units=declared,
            classes=self.task.spec.classes,
            dimension=self.task.spec.dimension,
            steps=steps,
            max_grad_norm=CLIP,
        )

        def observe(included: npt.NDArray[np.bool_]) -> Vector:
            spec = self.task.spec
            current = spec.flatten(spec.initial(b"audit"))
            seen = np.empty((steps, len(included)))
            for step in range(steps):
                released, rest = self._step(mechanism, spec.unflatten(current), included)
                seen[step] = (released - rest)[self.canaries.coordinates] / CLIP
                current = current - rate / declared * released
            return seen

        checks, bounds = audit_canaries(observe, count=len(self.canaries), claim=claim)
        return claim, mechanism, checks, bounds

    def _mechanism(self, steps: int) -> Mechanism:
        multiplier = accounting.calibrate(self.epsilon, self.delta, steps=steps, sampling_rate=self.rate)
        return Mechanism(self.noise, self.task.spec.parameters, multiplier, len(self.real) + len(self.canaries))

    def _step(
        self, mechanism: Mechanism, tensors: dict[str, npt.NDArray[np.float32]], included: npt.NDArray[np.bool_]
    ) -> tuple[Vector, Vector]:
        """What leaves, and the share of the units that the adversary knows."""
        planted = self.canaries.units.select(included)
        present = np.arange(len(self.real) + len(planted)) < len(self.real)
        units = UnitFeatures(
            *(
                np.concatenate([getattr(self.real, name), getattr(planted, name)])
                for name in ("features", "labels", "mask")
            )
        )
        taken = mechanism.sample(len(units), self.rate)
        rest = self._sum(tensors, units.select(taken & present))
        total = self._sum(tensors, units.select(taken))
        return mechanism.release(total), rest

    def _sum(self, tensors: dict[str, npt.NDArray[np.float32]], units: UnitFeatures) -> Vector:
        return audited_sum(self.task, tensors, units, max_grad_norm=CLIP, engine=self.engine)


def _noise_checks(mechanism: Mechanism) -> tuple[Check, ...]:
    """Noise of zeros; every site's generator is made anew under the same user seeds, which must not matter."""
    made: dict[int, Mechanism] = {}

    def draw(client: int, step: int) -> Vector:
        if client not in made:
            with _user_seeds():
                made[client] = Mechanism(mechanism.noise, mechanism.length, mechanism.noise_multiplier, mechanism.units)
        return made[client].release(np.zeros(mechanism.length)) / CLIP

    return check_noise(draw, std=mechanism.std)


@contextmanager
def _user_seeds() -> Iterator[None]:
    kept = np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        np.random.seed(0)
        yield
    np.random.set_state(kept)
