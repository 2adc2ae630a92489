"""Which method, how large a module and where to put the noise, from public numbers, before any record is read.

Every candidate is planned exactly as a run would be (privacy.md §2.3 and §7); what decides is the predicted
signal-to-noise of one class. The rule is :func:`recommend`'s, and was chosen on validation rows of CLIP ViT-B/32
features (UCF101 and Caltech101, 3 and 10 sites, ε from 0.5 to 8); ``python -m benchmarks.recommendation`` measures it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from fedsecure.config import (
    AGGREGATOR_KEYS,
    PrivacyConfig,
    RunSettings,
    default_delta,
    default_rounds,
    parse_settings,
    read_toml,
)
from fedsecure.errors import ConfigError, PrivacyError
from fedsecure.learning.adapters import AdapterSpec
from fedsecure.learning.moments import Moments
from fedsecure.methods.base import Cohort
from fedsecure.methods.cohorts import cohort_of
from fedsecure.methods.ridge import GRAM_SHARE
from fedsecure.privacy.plan import Privacy
from fedsecure.secagg.thresholds import Thresholds

Noise = Literal["distributed", "local"]
CLIP_NORM = 0.1
# Class signals: below the first a head that takes many steps gains under 1.5 points on one that is computed from one
# release; above the second the head's own steps are what holds it back.
LEAST_SIGNAL, AMPLE_SIGNAL = 3.0, 150.0
# Next to nothing can be learnt about a class.
_NO_SIGNAL = 0.5
# The methods that are weighed.
WEIGHED = ("linear", "facmic", "prototypes", "ridge")


@dataclass(frozen=True, slots=True)
class Numbers:
    """All that a recommendation depends on; every number is public.

    Attributes:
        units: declared training units by site.
        classes, dimension: K and d.
        cohort: sites, c and u_min of the secure sum.
        privacy: ε, δ and the rest; ``noise`` is what is to be chosen.
    """

    units: Mapping[str, int]
    classes: int
    dimension: int
    cohort: Cohort
    privacy: PrivacyConfig

    @staticmethod
    def even(
        *, sites: int, units: int, classes: int, dimension: int, epsilon: float, delta: float = 1e-5,
        colluders: int | None = None,
    ) -> Numbers:  # fmt: skip
        """Sites of one size.

        Raises:
            ConfigError: FS-1003 ε or δ is out of range.
            ModelError: FS-1631 fewer than two classes or dimensions.
            ProtocolError: FS-1300, FS-1301 the sites and c do not fit together.
        """
        AdapterSpec("linear", dimension, classes)
        chosen = Thresholds.choose(sites, colluders=colluders)
        return Numbers(
            units={f"site-{index + 1}": units for index in range(sites)},
            classes=classes,
            dimension=dimension,
            cohort=Cohort(sites=sites, colluders=chosen.colluders, min_survivors=chosen.min_survivors),
            privacy=Privacy(target_epsilon=epsilon, delta=delta, max_grad_norm=CLIP_NORM),
        )

    @staticmethod
    def given(
        *, sites: int | None, units: int | None, classes: int | None, dimension: int | None, epsilon: float | None,
        delta: float | None, colluders: int | None,
    ) -> Numbers:  # fmt: skip
        """:meth:`even` from command-line options, of which the first three are needed: ConfigError FS-1015."""
        needed = {"--sites": sites, "--units": units, "--classes": classes}
        missing = [name for name, value in needed.items() if value is None]
        if sites is None or units is None or classes is None:
            raise ConfigError(
                "FS-1015",
                f"no file, and no {', '.join(missing)}",
                expected="a settings or federation file, or --sites, --units and --classes",
                cure="see fedsecure plan --help",
            )
        return Numbers.even(
            sites=sites,
            units=units,
            classes=classes,
            dimension=512 if dimension is None else dimension,
            epsilon=8.0 if epsilon is None else epsilon,
            delta=default_delta(units) if delta is None else delta,
            colluders=colluders,
        )

    @staticmethod
    def check_alone(file: Path, **numbers: int | None) -> None:
        """Refuse numbers beside a file that has its own: ConfigError FS-1015."""
        found = [f"--{name}" for name, value in numbers.items() if value is not None]
        if found:
            raise ConfigError(
                "FS-1015",
                f"{file} together with {', '.join(found)}",
                expected="the file's own sites, units and classes, or all three as options",
                cure="leave the options out, or the file",
            )

    @staticmethod
    def read(file: Path | str, *, dimension: int | None = None, epsilon: float | None = None) -> Numbers:
        """Those of ``settings.toml`` or ``federation.toml``.

        Args:
            file: the file.
            dimension: d where the file does not pin its encoder; 512 by default.
            epsilon: in place of the file's ``target_epsilon``.

        Raises:
            ConfigError: FS-1001 to FS-1003, as the file deserves.
        """
        raw = read_toml(Path(file))
        raw = {key: value for key, value in raw.items() if key not in AGGREGATOR_KEYS}
        if isinstance(raw.setdefault("encoder", {}), dict):
            # Neither loads nor measures an encoder: only its width counts here.
            raw["encoder"] = {"dimension": dimension or 512, "fingerprint": "0" * 64, **raw["encoder"]}
        if epsilon is not None and isinstance(raw.setdefault("privacy", {}), dict):
            raw["privacy"]["target_epsilon"] = epsilon
        return Numbers.of(parse_settings(raw, Path(file)))

    @staticmethod
    def of(settings: RunSettings) -> Numbers:
        """Those of a federation's settings."""
        _, cohort = cohort_of(settings, trainers_only=True)
        return Numbers(
            units=settings.declared_units(),
            classes=len(settings.classes),
            dimension=settings.encoder.dimension,
            cohort=cohort,
            privacy=settings.privacy,
        )


@dataclass(frozen=True, slots=True)
class Candidate:
    """One method with one place of noise, as a run would plan it.

    Attributes:
        parameters: of the adapter.
        released: numbers in a sum, which the noise is spread over; the adapter's gradient, or the statistics.
        noise_multiplier: z of a step; ``sum_noise_multiplier``: of all sites' noise together.
        mu: strength of one unit's whole signal in the sums.
        class_signal: μ · units / classes: one class's signal over the noise in each of its numbers.
        signal_to_noise: of a whole step, as :class:`fedsecure.privacy.plan.PrivacyPlan` has it.
        refused: below the settings' ``minimum_signal_to_noise``: such a run would not start.
        verdict: in words.
    """

    method: str
    noise: Noise
    rounds: int
    parameters: int
    released: int
    noise_multiplier: float
    sum_noise_multiplier: float
    mu: float
    class_signal: float
    signal_to_noise: float
    refused: bool
    verdict: str

    @property
    def label(self) -> str:
        return f"{self.method}, {self.noise}"


@dataclass(frozen=True, slots=True)
class Recommendation:
    """The candidates, the one to take, and why, in a sentence."""

    numbers: Numbers
    candidates: tuple[Candidate, ...]
    best: Candidate
    reason: str

    def toml(self) -> str:
        """The lines to put into the run's settings."""
        spare = 0 if self.best.rounds == 1 else self.numbers.privacy.spare_attempts
        return (
            f'[method]\nname = "{self.best.method}"\nrounds = {self.best.rounds}\n\n'
            f"[privacy]\ntarget_epsilon = {self.numbers.privacy.target_epsilon:g}\n"
            f'delta = {self.numbers.privacy.delta:g}\nnoise = "{self.best.noise}"\nspare_attempts = {spare}\n'
        )

    def to_dict(self) -> dict[str, Any]:
        """For ``--json``."""
        return {
            "sites": dict(self.numbers.units),
            "classes": self.numbers.classes,
            "dimension": self.numbers.dimension,
            "epsilon": self.numbers.privacy.target_epsilon,
            "delta": self.numbers.privacy.delta,
            "colluders": self.numbers.cohort.colluders,
            "candidates": [asdict(candidate) for candidate in self.candidates],
            "recommended": {"method": self.best.method, "noise": self.best.noise, "reason": self.reason},
            "toml": self.toml(),
        }


def recommend(numbers: Numbers) -> Recommendation:
    """Plan every candidate and take one: noise inside the secure sum, since it is never more than each site's own; and

    * prototypes below a class signal of 3: one sum in place of twenty, and a head that tends to zero-shot;
    * the linear head up to 150;
    * ridge above, where the statistics are all but exact and more than a few gradient steps would pay.

    FACMIC's attention is planned and shown; nowhere on the features the rule was chosen on was it the best at ε ≤ 8.

    Raises:
        PrivacyError: FS-1203 δ is not below 1 over a site's units, FS-1211 a site without units; FS-1204, FS-1206 if
            every candidate is refused.
    """
    planned: list[Candidate] = []
    wraps: PrivacyError | None = None
    for method in WEIGHED:
        for noise in ("distributed", "local"):
            try:
                planned.append(_candidate(numbers, method, noise))
            except PrivacyError as error:
                if error.code != "FS-1206":
                    raise
                wraps = error
    feasible = {(one.method, one.noise): one for one in planned if not one.refused}
    if not feasible:
        raise wraps if wraps is not None else _drowned(planned)
    signal = max(one.class_signal for one in feasible.values())
    best = next(feasible[choice] for choice in _preference(signal) if choice in feasible)
    return Recommendation(numbers, tuple(planned), best, _reason(best))


def _drowned(planned: list[Candidate]) -> PrivacyError:
    clearest = max(planned, key=lambda one: one.signal_to_noise)
    return PrivacyError(
        "FS-1204",
        f"the clearest candidate, {clearest.label}, has a predicted signal-to-noise of {clearest.signal_to_noise:.2g}",
        expected="at least privacy.minimum_signal_to_noise",
        cure="a larger ε, more sites or more records",
    )


def _preference(signal: float) -> list[tuple[str, Noise]]:
    """Methods from the most to the least wanted, each with noise inside the sum first."""
    if signal < LEAST_SIGNAL:
        order = ["prototypes", "linear", "ridge", "facmic"]
    elif signal < AMPLE_SIGNAL:
        order = ["linear", "prototypes", "ridge", "facmic"]
    else:
        order = ["ridge", "linear", "prototypes", "facmic"]
    places: tuple[Noise, Noise] = ("distributed", "local")
    return [(method, noise) for noise in places for method in order]


def _candidate(numbers: Numbers, method: str, noise: Noise) -> Candidate:
    once = default_rounds(method) == 1
    adapter = AdapterSpec("facmic" if method == "facmic" else "linear", numbers.dimension, numbers.classes)
    share = GRAM_SHARE if method == "ridge" else 0.0
    released = Moments(numbers.classes, numbers.dimension, share).length if once else adapter.parameters
    values: dict[str, Any] = {**numbers.privacy.model_dump(), "noise": noise, "minimum_signal_to_noise": 0.0}
    if once:
        values |= {"sampling_rate": 1.0, "spare_attempts": 0}
    if once or noise == "local":
        values.pop("ring_bits", None)
    asked = -(-default_rounds(method) * numbers.cohort.sites // len(numbers.units))
    plan = Privacy(**values).plan(
        parameters=released, units=numbers.units, rounds=default_rounds(method), cohort=numbers.cohort, asked=asked
    )
    signal = plan.sum_mu * sum(numbers.units.values()) / numbers.classes
    least = numbers.privacy.minimum_signal_to_noise
    refused = f"S/N below {least:g}" if plan.signal_to_noise < least else ""
    if once and numbers.cohort.sites < len(numbers.units):
        refused = "asks once, and each round asks some of the sites"
    return Candidate(
        method=method,
        noise=noise,
        rounds=default_rounds(method),
        parameters=adapter.parameters,
        released=released,
        noise_multiplier=plan.noise_multiplier,
        sum_noise_multiplier=plan.sum_noise_multiplier,
        mu=plan.sum_mu,
        class_signal=signal,
        signal_to_noise=plan.signal_to_noise,
        refused=bool(refused),
        verdict=f"refused: {refused}" if refused else _verdict(method, noise, signal, plan.rounds),
    )


def _verdict(method: str, noise: Noise, signal: float, rounds: int) -> str:
    if noise == "local":
        return "more noise in the sum; for sites that trust no sum"
    if signal < _NO_SIGNAL:
        return "next to nothing to learn"
    if method == "facmic":
        return "many parameters: slow to move under noise"
    if method == "linear":
        if signal < LEAST_SIGNAL:
            return f"little more than one release gives, for {rounds} sums"
        return "gains most" if signal < AMPLE_SIGNAL else "held back by its few steps"
    if signal < LEAST_SIGNAL:
        return "safe: tends to zero-shot"
    if method == "ridge" and signal >= AMPLE_SIGNAL:
        return "gains most"
    return "safe, and one round"


def _reason(best: Candidate) -> str:
    signal = f"one class's signal is {best.class_signal:.2g} times its noise"
    if best.class_signal < _NO_SIGNAL:
        return f"{signal}: next to nothing can be learnt, and one release that tends to zero-shot risks least."
    if best.method == "prototypes":
        return f"{signal}: too little for many steps, so one release, shrunk to zero-shot by the noise it carries."
    if best.method == "ridge":
        return f"{signal}: enough for the least-squares head from one release, which many noisy steps do not reach."
    return f"{signal}: enough for gradient steps on the smallest module, with the noise shared inside the secure sum."
