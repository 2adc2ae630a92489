"""What a run will cost and whether it can work, computed before any record is read (privacy.md §2.3 and §7).

``Privacy`` is the public parameter set; its ``plan`` is a pure function of public numbers: noise multiplier,
events, ε against each adversary, and the predicted signal-to-noise ratio, below which the run is refused
instead of wasting the budget.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, Protocol

from pydantic import ValidationError

from fedsecure.config import PrivacyConfig, RunSettings
from fedsecure.errors import ConfigError, PrivacyError
from fedsecure.messages import Event
from fedsecure.privacy import accounting

TRAINING = "training"
# Noise multiplier of a run without privacy: nothing next to any gradient, and still a number to charge and to add up.
TOKEN_NOISE = 1e-3


class CohortNumbers(Protocol):
    """The public numbers of secure aggregation a plan depends on; ``methods.base.Cohort`` has them."""

    @property
    def sites(self) -> int: ...

    @property
    def colluders(self) -> int: ...

    @property
    def min_survivors(self) -> int: ...

    @property
    def honest(self) -> int: ...


@dataclass(frozen=True, slots=True)
class LastReleases:
    """Releases about the training units beside the training steps, one in each of the last rounds.

    Always of all units, with noise that the sites share: nothing is amplified.

    Attributes:
        purpose: for the ledger and the report.
        rounds: how many of the last rounds have one, ≥ 1.
        share: of the whole, in (0, 1): of 1/z² summed over everything, which is what μ² is at full batch.
    """

    purpose: str
    rounds: int
    share: float


@dataclass(frozen=True, slots=True)
class PrivacyPlan:
    """The price and the promise of a run; all numbers are public.

    Attributes:
        round_events: what one attempt of one round charges the site that is sampled most (:func:`paid_by`).
        rounds: communication rounds.
        asked: in how many of them one site is asked at most; all, unless cohorts are drawn.
        attempts: that plus spare attempts: how often ``round_events`` may be charged within
        ``target_epsilon``.
        epsilon: ε(δ) when every attempt is used, of the site that pays most, against whoever sees the sums or
            models, and the aggregator with at most c sites.
        epsilon_expected: the same when no attempt fails.
        epsilon_beyond: ε(δ) against the aggregator with more than c sites, all attempts used.
        mu: μ of all attempts; ``None`` under Poisson sampling.
        sum_noise_multiplier: noise of the sum of a round's sites, standard deviation over the clip norm.
        sum_mu: √steps · q / sum_noise_multiplier over the expected rounds, times the share of the sites that a round
            asks: the strength of the whole signal of one unit, which the learning rate follows.
        signal_to_noise: greatest norm of a step's summed signal over the expected norm of its noise.
        parameters: p, trained parameters; units: declared training units by site; sampling_rates: q by site.
        last_events: what each of the last ``last_rounds`` rounds charges beside.
    """

    round_events: tuple[Event, ...]
    target_epsilon: float
    delta: float
    unit: Literal["patient", "record"]
    noise: Literal["distributed", "local"]
    noise_multiplier: float
    rounds: int
    asked: int
    local_steps: int
    attempts: int
    epsilon: float
    epsilon_expected: float
    epsilon_beyond: float
    mu: float | None
    sum_noise_multiplier: float
    sum_mu: float
    signal_to_noise: float
    parameters: int
    units: Mapping[str, int]
    sampling_rates: Mapping[str, float]
    colluders: int
    last_events: tuple[Event, ...] = ()
    last_rounds: int = 0

    def events_at(self, step: int) -> tuple[Event, ...]:
        """What one attempt of round ``step`` charges, counted from 0."""
        return self.round_events + (self.last_events if step >= self.rounds - self.last_rounds else ())

    def events_of(self, rounds: int) -> tuple[Event, ...]:
        """What the last ``rounds`` rounds of a site charge, or that many attempts, of which any may be one of the last
        rounds."""
        return self.round_events * rounds + self.last_events * min(
            rounds, self.last_rounds + max(0, rounds - self.asked)
        )

    def epsilon_after(self, rounds: int) -> float | None:
        """ε(δ) of the run's first ``rounds`` rounds with no attempt that fails, of a site that is asked whenever it can
        be, against the aggregator with at most c sites; ``None`` where the steps are sampled.

        Composing sampled steps takes seconds, and whoever follows a run asks in every round.
        """
        if accounting.accountant(self.round_events) != "gdp":
            return None
        done = range(max(0, rounds - self.asked), rounds)
        return accounting.epsilon((event for step in done for event in self.events_at(step)), delta=self.delta)

    def table(self) -> list[tuple[str, str]]:
        """Rows of label and value for printing."""
        places = {"distributed": "shared by the sites, inside the secure sum", "local": "whole at each site"}
        (event,) = self.round_events
        sampling = "full batch" if event.sampling_rate == 1 else f"Poisson, rate {event.sampling_rate:g}"
        if len(set(self.sampling_rates.values())) > 1:
            sampling = "Poisson, " + ", ".join(f"{site} {rate:g}" for site, rate in self.sampling_rates.items())
        return [
            ("privacy unit", self.unit),
            ("target", f"ε = {self.target_epsilon:g} at δ = {self.delta:g}"),
            ("noise", places[self.noise]),
            ("noise multiplier a step", f"{self.noise_multiplier:.4g}"),
            ("sampling", sampling),
            ("rounds × local steps", f"{self.rounds} × {self.local_steps}"),
            *([("rounds that ask one site, at most", f"{self.asked}")] if self.asked < self.rounds else []),
            ("spare attempts", f"{self.attempts - self.asked}"),
            *[
                (f"{e.purpose}, last {self.last_rounds} round(s)", f"noise multiplier {e.noise_multiplier:.4g}")
                for e in self.last_events
            ],
            ("ε if no attempt fails", f"{self.epsilon_expected:.3f}"),
            ("ε at most", f"{self.epsilon:.3f}"),
            (f"ε if more than {self.colluders} sites collude", f"{self.epsilon_beyond:.3f}"),
            ("μ", "–" if self.mu is None else f"{self.mu:.4f}"),
            ("trained parameters", f"{self.parameters:,}"),
            ("declared units", ", ".join(f"{site} {count:,}" for site, count in self.units.items())),
            ("predicted signal-to-noise", f"{self.signal_to_noise:.3g}"),
        ]

    def summary(self) -> str:
        """The table as plain text."""
        rows = self.table()
        width = max(len(label) for label, _ in rows)
        return "\n".join(f"{label:<{width}}  {value}" for label, value in rows)


class Privacy(PrivacyConfig):
    """What a run may learn about one privacy unit; see ``PrivacyConfig`` for the parameters.

    Raises:
        ConfigError: FS-1003 a parameter is unknown or out of range.
    """

    # A typed signature for callers, one clear error at run time.
    if not TYPE_CHECKING:

        def __init__(self, **values: Any) -> None:
            try:
                super().__init__(**values)
            except ValidationError as error:
                first = error.errors(include_url=False)[0]
                key = ".".join(str(part) for part in first["loc"])
                raise ConfigError(
                    "FS-1003", f"Privacy: {key} = {first.get('input')!r:.80}", expected=str(first["msg"]),
                    cure="see docs/configuration.md for every key",
                ) from error  # fmt: skip

    def plan(
        self,
        *,
        parameters: int,
        units: Mapping[str, int],
        rounds: int,
        cohort: CohortNumbers,
        local_steps: int = 1,
        sampling_rates: Mapping[str, float] | None = None,
        asked: int | None = None,
        last: LastReleases | None = None,
    ) -> PrivacyPlan:
        """Noise, price and predicted signal of a run; reads no data.

        Args:
            parameters: p, number of trained parameters.
            units: declared maximum number of units of every training site.
            rounds: communication rounds.
            cohort: number of sites a round asks, c and u_min.
            local_steps: steps a site takes per round; 1 with distributed noise.
            sampling_rates: q of every training site; by default ``sampling_rate`` at each. All have the same noise
                multiplier, enough for the site that is sampled most, and each pays for its own rate.
            asked: in how many rounds a site is asked at most, where each round asks ``cohort.sites`` of them by public
                draw; all by default. A site pays for those and no more, and for each of them in full.
            last: further releases in the last rounds, within the same target; all sites are asked there.

        Raises:
            PrivacyError: FS-1203 δ is not below 1 over a site's units; FS-1204 the signal would drown in the
                noise; FS-1205 several local steps with distributed noise; FS-1211 a number is out of range.
        """
        _check_numbers(parameters, units, rounds, local_steps, cohort)
        if self.noise == "distributed" and local_steps != 1:
            raise PrivacyError(
                "FS-1205", f"{local_steps} local steps with distributed noise",
                expected="one step a round: each step's sum needs its own shared noise",
                cure='set local_steps = 1, or noise = "local"',
            )  # fmt: skip
        largest = max(units, key=lambda site: units[site])
        if self.delta * units[largest] >= 1:
            raise PrivacyError(
                "FS-1203", f"δ = {self.delta:g} with {units[largest]} units at {largest!r}",
                expected=f"δ below 1/{units[largest]}, better below 1/{10 * units[largest]}",
                cure="choose a smaller delta",
            )  # fmt: skip
        paid = rounds if asked is None else asked
        attempts = paid + self.spare_attempts
        distributed = self.noise == "distributed"
        rates = dict.fromkeys(units, self.sampling_rate) if sampling_rates is None else dict(sampling_rates)
        further = (last.rounds if last else 0, (last.rounds + self.spare_attempts) if last else 0)
        z, beside = self._multipliers(rates.values(), steps=attempts * local_steps, last=last, cohort=cohort)
        one = Event(
            population="train",
            purpose=TRAINING,
            noise_multiplier=z,
            local_noise_multiplier=z / math.sqrt(cohort.honest) if distributed else z,
            sampling_rate=max(rates.values()),
            steps=local_steps,
        )
        each = [replace(one, sampling_rate=rate) for rate in sorted(set(rates.values()))]
        sum_noise = z * math.sqrt(cohort.sites / cohort.honest if distributed else cohort.sites)
        # Of the sites of a round, which one by one are as likely as any others.
        share = 1.0 if asked is None else cohort.sites / len(units)
        sampled = share * math.fsum(rates[site] * count for site, count in units.items())
        signal = sampled / (sum_noise * math.sqrt(parameters))
        plan = PrivacyPlan(
            round_events=(one,),
            target_epsilon=self.target_epsilon,
            delta=self.delta,
            unit=self.unit,
            noise=self.noise,
            noise_multiplier=z,
            rounds=rounds,
            asked=paid,
            local_steps=local_steps,
            attempts=attempts,
            epsilon=max(accounting.epsilon((e,) * attempts + beside * further[1], delta=self.delta) for e in each),
            epsilon_expected=max(accounting.epsilon((e,) * paid + beside * further[0], delta=self.delta) for e in each),
            epsilon_beyond=max(
                accounting.epsilon((e,) * attempts + beside * further[1], delta=self.delta, adversary="beyond")
                for e in each
            ),
            mu=accounting.mu([*each * attempts, *beside * further[1]]) if len(each) == 1 else None,
            sum_noise_multiplier=sum_noise,
            sum_mu=sampled / sum(units.values()) * math.sqrt(rounds * local_steps) / sum_noise,
            signal_to_noise=signal,
            parameters=parameters,
            units=dict(units),
            sampling_rates=rates,
            colluders=cohort.colluders,
            last_events=beside,
            last_rounds=further[0],
        )
        if signal < self.minimum_signal_to_noise:
            smallest = min(units, key=lambda site: units[site])
            raise PrivacyError(
                "FS-1204",
                f"predicted signal-to-noise {signal:.2g}: {sum(units.values())} units over {len(units)} sites "
                f"(the smallest, {smallest!r}, has {units[smallest]}), "
                f"{parameters:,} parameters, ε = {plan.epsilon:.3g}",
                expected=f"at least {self.minimum_signal_to_noise:g}",
                cure="a larger ε, "
                + ("" if distributed else 'noise = "distributed", ')
                + "a smaller adapter, fewer rounds, or more records",
            )
        return plan

    def _multiplier(self, rates: Iterable[float], *, steps: int) -> float:
        """z, enough for each of several sampling rates: two accountants are in play, so the largest need not do."""
        if self.no_privacy:
            return TOKEN_NOISE
        if self.noise_multiplier != "auto":
            return float(self.noise_multiplier)
        shared = self.noise == "distributed"
        return max(
            accounting.calibrate(self.target_epsilon, self.delta, steps=steps, sampling_rate=rate, shared=shared)
            for rate in rates
        )

    def _multipliers(
        self, rates: Iterable[float], *, steps: int, last: LastReleases | None, cohort: CohortNumbers
    ) -> tuple[float, tuple[Event, ...]]:
        """z of the training steps, and the event of a further release, so that all keep to the target."""
        if last is None:
            return self._multiplier(rates, steps=steps), ()
        every = last.rounds + self.spare_attempts

        def release(multiplier: float) -> tuple[Event, ...]:
            own = multiplier / math.sqrt(cohort.honest)
            return (Event("train", last.purpose, multiplier, own),)

        if self.no_privacy:
            return TOKEN_NOISE, release(TOKEN_NOISE)
        if self.noise_multiplier != "auto":
            z = float(self.noise_multiplier)
            return z, release(z * math.sqrt(every / steps * (1 - last.share) / last.share))
        mu = accounting.mu_for_epsilon(self.target_epsilon, self.delta)
        beside = release(math.sqrt(every / last.share) / mu)
        shared = self.noise == "distributed"
        found = []
        for rate in set(rates):

            def holds(z: float, rate: float = rate) -> bool:
                own = z / math.sqrt(cohort.honest) if shared else z
                step = Event("train", TRAINING, z, own, rate, steps)
                return accounting.epsilon((step, *beside * every), delta=self.delta) <= self.target_epsilon

            found.append(accounting.least_multiplier(holds, math.sqrt(steps / (1 - last.share)) / mu, exact=rate == 1))
        return max(found), beside


def paid_by(site: str, events: Iterable[Event], settings: RunSettings) -> tuple[Event, ...]:
    """What some of a run's events cost one site: a training event at the run's largest rate, at this site's own.

    Any other event stands as it is, so that a method which samples otherwise never pays less than it says.
    """
    rates = settings.sampling_rates()
    largest = max(rates.values())
    return tuple(
        replace(event, sampling_rate=rates.get(site, event.sampling_rate))
        if event.population == "train" and event.purpose == TRAINING and event.sampling_rate == largest
        else event
        for event in events
    )


def _check_numbers(
    parameters: int, units: Mapping[str, int], rounds: int, local_steps: int, cohort: CohortNumbers
) -> None:
    numbers = {
        "parameters": parameters,
        "rounds": rounds,
        "local_steps": local_steps,
        "training sites": len(units),
    }
    numbers |= {f"units of {site}": count for site, count in units.items()}
    numbers["honest sites (u_min − c)"] = cohort.honest
    for name, value in numbers.items():
        if value < 1:
            raise PrivacyError(
                "FS-1211",
                f"{name} = {value}",
                expected="at least 1",
                cure="mend the federation's configuration",
            )


def evaluation_noise_multiplier(target_epsilon: float, delta: float, *, releases: int) -> float:
    """Noise multiplier of each of ``releases`` noised count vectors so that all together cost
    ``target_epsilon`` at δ.

    Raises:
        PrivacyError: FS-1202 an argument is out of range.
    """
    return accounting.calibrate(target_epsilon, delta, steps=releases)
