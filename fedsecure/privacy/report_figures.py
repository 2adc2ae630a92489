"""The figures of a privacy report, as pure functions of events: prices, shares of a whole, and units at several sites.

Both the report and its check (``report_verify``) compute with these. Shares are after privacy.md §7 (every release with
its part of the whole), units at several sites after §3.3.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from fedsecure.messages import Event, Population
from fedsecure.privacy import accounting
from fedsecure.privacy.report_text import ADVERSARIES

_DELTAS = (1e-3, 1e-4, 1e-5, 1e-6, 1e-7, 1e-8, 1e-9)
_FALSE_POSITIVES = tuple(10 ** (k / 8) for k in range(-32, 0))
# How far below δ group privacy looks, in quarters of a power of ten.
_SEARCHED = 160
_MOST_LISTED = 4

SHARE_EXACT = "part of μ²: exact, since full-batch Gaussian releases compose to the sum of their μ²"
SHARE_SAMPLED = (
    "part of Σ steps·q²/z²: to first order the Rényi divergence of small sampling rates, and exact for full batch"
)


def price(events: Sequence[Event], delta: float, *, colluders: int, survivors: int) -> dict[str, Any]:
    """ε, μ, curve and attack power of some events, and ε against each adversary."""
    outside = [
        # Who runs no site faces the noise of all survivors, not only of those that do not collude.
        replace(
            event, noise_multiplier=max(event.noise_multiplier, event.local_noise_multiplier * math.sqrt(survivors))
        )
        if event.local_noise_multiplier < event.noise_multiplier
        else event
        for event in events
    ]
    views: list[tuple[str, Sequence[Event], accounting.Adversary]] = [
        ("outsider", outside, "colluding"),
        ("colluding", events, "colluding"),
        ("beyond", events, "beyond"),
    ]
    return {
        "epsilon": finite(accounting.epsilon(events, delta=delta)),
        "mu": accounting.mu(events),
        "adversaries": [
            {
                "name": name,
                "who": ADVERSARIES[name].format(c=colluders),
                "epsilon": finite(accounting.epsilon(seen, delta=delta, adversary=view)),
                "mu": accounting.mu(seen, adversary=view),
            }
            for name, seen, view in views
        ],
        "curve": [{"delta": d, "epsilon": finite(accounting.epsilon(events, delta=d))} for d in _DELTAS],
        "attack": [{"fpr": fpr, "tpr": accounting.attack_bound(events, fpr)} for fpr in _FALSE_POSITIVES],
    }


def remaining(events: Sequence[Event], *, epsilon: float, delta: float) -> float:
    """What is left of a limit on ε at δ after some events; never below 0."""
    return max(0.0, epsilon - accounting.epsilon(events, delta=delta))


def compact(events: Iterable[Event]) -> list[dict[str, Any]]:
    """All that ε depends on: equal events once, with their steps together."""
    steps: Counter[tuple[float, float, float]] = Counter()
    for event in events:
        steps[event.noise_multiplier, event.local_noise_multiplier, event.sampling_rate] += event.steps
    names = ("noise_multiplier", "local_noise_multiplier", "sampling_rate")
    return [{**dict(zip(names, key, strict=True)), "steps": count} for key, count in sorted(steps.items())]


def shares(charges: Sequence[Iterable[Event]]) -> list[float]:
    """Each charge's part of the whole, Σ steps·q²/z²; all together are 1, or 0 where nothing was charged."""
    weights = [math.fsum(_weight(event) for event in events) for events in charges]
    whole = math.fsum(weights) or 1.0
    return [weight / whole for weight in weights]


def by_purpose(charges: Sequence[Iterable[Event]]) -> dict[str, Any]:
    """What the releases were for: ``definition`` of a share, and ``purposes`` with ``purpose``, ``releases`` and
    ``share``, largest first."""
    events = [event for charge in charges for event in charge]
    counts = Counter(purpose for charge in charges for purpose in {event.purpose for event in charge})
    names = sorted(counts)
    portions = shares([[event for event in events if event.purpose == name] for name in names])
    rows = [
        {"purpose": name, "releases": counts[name], "share": share} for name, share in zip(names, portions, strict=True)
    ]
    sampled = any(event.sampling_rate < 1 for event in events)
    return {
        "definition": SHARE_SAMPLED if sampled else SHARE_EXACT,
        "purposes": sorted(rows, key=lambda row: (-row["share"], row["purpose"])),
    }


def at_sites(
    charges: Mapping[tuple[int, int], Sequence[Event]], delta: float, *, count: int
) -> tuple[float, float | None]:
    """ε and μ for a unit whose records are at ``count`` sites, an upper bound.

    Where the sites share a release's noise, all of the unit's records meet the same noise: it moves the sum by
    ``count`` clip norms, so the multiplier is divided by ``count``. Where each site adds the whole noise, its releases
    compose. A Poisson-sampled release with shared noise falls under group privacy: (ε, δ') for one site is
    (count·ε, δ'·(e^{count·ε} − 1)/(e^ε − 1)) for ``count`` (Dwork and Roth 2014, theorem 2.2).

    Args:
        charges: (round, attempt) → the dearest events of any one site in it.
        delta: δ in (0, 1).
        count: at least 1.
    """
    events = [event for charge in charges.values() for event in charge]
    if count == 1:
        return accounting.epsilon(events, delta=delta), accounting.mu(events)
    if any(accounting.shares_sampled_noise(event) for event in events):
        return _group(events, delta, count=count), None
    moved = [
        replace(event, noise_multiplier=event.noise_multiplier / count)
        if event.local_noise_multiplier < event.noise_multiplier
        else replace(event, steps=event.steps * count)
        for event in events
    ]
    # The accountant looks at the first multiplier only; the second has to stay below it, or above.
    moved = [replace(event, local_noise_multiplier=event.noise_multiplier) for event in moved]
    return accounting.epsilon(moved, delta=delta), accounting.mu(moved)


def _group(events: Sequence[Event], delta: float, *, count: int) -> float:
    for quarter in range(_SEARCHED):
        single = delta * 10 ** (-quarter / 4)
        eps = accounting.epsilon(events, delta=single)
        growth = (count - 1) * eps + math.log(math.fsum(math.exp(-k * eps) for k in range(count)))
        if math.log(single) + growth <= math.log(delta):
            return count * eps
    return math.inf


def several_sites(reports: Sequence[Mapping[str, Any]], delta: float, *, declared: int) -> dict[str, Any]:
    """What a unit pays whose records are at several sites of one run: ``declared`` and ``figures``.

    Args:
        reports: of the run's sites.
        delta: δ in (0, 1).
        declared: at how many sites a unit may be, by the run's settings.

    Returns:
        ``figures`` has, for each population, rows of ``population``, ``sites``, ``epsilon`` and ``mu``, for one site
        and more, up to 4, the declared number, and all that hold such units.
    """
    figures: list[dict[str, Any]] = []
    populations: tuple[Population, ...] = ("train", "evaluation")
    for population in populations:
        budgets = [r["budgets"][population] for r in reports if r["budgets"].get(population, {}).get("releases")]
        single: list[dict[tuple[int, int], list[Event]]] = []
        charges: dict[tuple[int, int], list[Event]] = {}
        for budget in budgets:
            single.append({})
            for row in budget["releases"]:
                if row["state"] != "VOID":
                    found = events_of(row["events"], population)
                    key = row["round"], row["attempt"]
                    single[-1][key] = found
                    charges[key] = max(charges.get(key, []), found, key=lambda e: math.fsum(map(_weight, e)))
        most = len(budgets)
        for count in sorted({*range(1, min(most, _MOST_LISTED) + 1), min(most, declared), most} - {0}):
            if count == 1:
                # The site that pays most: with drawn cohorts no site pays for every round.
                eps, mu = max((at_sites(one, delta, count=1) for one in single), key=lambda found: found[0])
            else:
                eps, mu = at_sites(charges, delta, count=count)
            figures.append({"population": population, "sites": count, "epsilon": finite(eps), "mu": mu})
    return {"declared": declared, "figures": figures}


def events_of(rows: Iterable[Mapping[str, Any]], population: Population) -> list[Event]:
    """The events that a report lists."""
    return [
        Event(
            population,
            str(row.get("purpose", "")),
            float(row["noise_multiplier"]),
            float(row["local_noise_multiplier"]),
            float(row["sampling_rate"]),
            int(row["steps"]),
        )
        for row in rows
    ]


def _weight(event: Event) -> float:
    return event.steps * event.sampling_rate**2 / event.noise_multiplier**2


def paid_in_training(report: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """What a site's training units paid in this run, if they paid anything."""
    budget = report["budgets"].get("train")
    return None if budget is None or not budget["releases"] else budget["this_run"]


def attack_at(report: Mapping[str, Any], fpr: float) -> Mapping[str, Any] | None:
    """The figure of a site's ``attack`` that is nearest to a false-positive rate."""
    paid = paid_in_training(report)
    return None if paid is None else min(paid["attack"], key=lambda a: abs(float(a["fpr"]) - fpr))


def resting_on_others(paid: Mapping[str, Any] | None, colluders: int) -> dict[str, Any]:
    """``colluders`` and ``beyond`` of the statement: both ``None`` where a site's own noise gives the whole ε."""
    beyond = {each["name"]: each["epsilon"] for each in paid["adversaries"]}["beyond"] if paid else None
    if paid is None or paid["epsilon"] is None or beyond == paid["epsilon"]:
        return {"colluders": None, "beyond": None}
    return {"colluders": colluders, "beyond": beyond}


def finite(value: float) -> float | None:
    """The value, or ``None`` where it has no bound."""
    return value if math.isfinite(value) else None
