"""The privacy report: what a run cost each site's units, against whom, and what it bought (privacy.md §7).

Plain JSON with a published schema (``report.schema.json`` beside this file). Every ε is recomputed from the ledger's
events, and the events are in the report, so that any reader can compute each figure again (``report_verify``).
"""

from __future__ import annotations

import importlib.metadata
import math
import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from fedsecure.config import RunSettings
from fedsecure.errors import PrivacyError
from fedsecure.messages import Event, Population
from fedsecure.privacy import accounting
from fedsecure.privacy.ledger import Entry, Ledger, Limit
from fedsecure.privacy.plan import PrivacyPlan
from fedsecure.privacy.policy import collusion
from fedsecure.privacy.report_figures import (
    attack_at,
    by_purpose,
    compact,
    finite,
    paid_in_training,
    price,
    remaining,
    resting_on_others,
    several_sites,
    shares,
)
from fedsecure.privacy.report_text import SEEDED, assumptions, not_protected, stamp, statement

SCHEMA = "fedsecure/privacy-report"
SCHEMA_VERSION = 2
# Version 1 knew no shares by purpose, no units at several sites and no audit.
READABLE = (1, 2)

_ACCOUNTANTS = {
    "gdp": "Gaussian DP, exact for the continuous Gaussian; noise on the integer grid is worth at least "
    f"1 − {accounting.LATTICE_SLACK:.1e} of it",
    "pld": "privacy-loss distributions, pessimistic, grid 1e-3",
    "rdp": "Rényi divergence of the sum of the sites' discrete noise, with Poisson amplification",
}
# Each further ε of a Poisson run costs a convolution.
_MOST_STEPS = 12


def site_report(
    *,
    site: str,
    role: str,
    run: str,
    settings: RunSettings,
    ledger: Ledger,
    train_dataset: str | None,
    evaluation_dataset: str | None,
    delta: float,
    plan: PrivacyPlan,
    outcome: Mapping[str, Any] | None,
    seeded: bool,
    audit: Mapping[str, Any] | None = None,
    limits: Mapping[Population, Limit] | None = None,
) -> dict[str, Any]:
    """One site's report of one run, as JSON-ready values.

    Args:
        site, role, run: who, as what, and the run's id in hexadecimal.
        settings: the run's public settings.
        ledger: the site's ledger; all figures come from its events.
        train_dataset, evaluation_dataset: names under which the run was charged; ``None`` where nothing was private.
        delta: δ of the figures.
        plan: the run's plan, for the mechanism's numbers.
        outcome: the aggregator's summary (attempts, evaluations), or ``None`` while the run goes on.
        seeded: whether any noise came from a seed.
        audit: what ``fedsecure audit --json`` printed, or ``None`` where none was run.
        limits: the site's policy, by population; an officer's limits are in the ledger.

    Returns:
        An object valid under ``report.schema.json``, ``kind`` "site". A figure that is not finite is ``None``.
    """
    colluders, survivors = collusion(settings, settings.cohort_size())
    charged: list[tuple[Population, str | None]] = [("train", train_dataset), ("evaluation", evaluation_dataset)]
    budgets = {
        population: _budget(
            ledger, dataset, population, run=run, delta=delta, colluders=colluders, survivors=survivors,
            policy=(limits or {}).get(population),
        )
        for population, dataset in charged
        if dataset is not None
    }  # fmt: skip
    privacy = settings.privacy
    no_privacy = privacy.no_privacy or None
    number, digest = ledger.head()
    return {
        **_header("site", settings.name, run, seeded=seeded, no_privacy=no_privacy),
        "site": site,
        "role": role,
        **headline(
            budgets, role=role, site=site, unit=privacy.unit, delta=delta, seeded=seeded, no_privacy=no_privacy,
            colluders=colluders,
        ),
        "delta": delta,
        "unit": privacy.unit,
        "max_records_per_unit": privacy.max_records_per_unit,
        "budgets": budgets,
        "mechanism": _mechanism(settings, plan, seeded=seeded),
        "secagg": {
            "mode": "active",
            "sites": settings.cohort_size(),
            "colluders": colluders,
            "min_survivors": survivors,
        },
        "rounds": _rounds(outcome),
        "accuracy": _accuracy(settings, outcome),
        "assumptions": assumptions(
            unit=privacy.unit,
            cap=privacy.max_records_per_unit,
            noise=privacy.noise,
            rates=plan.sampling_rates,
            sites=privacy.max_sites_per_patient,
        ),
        "not_protected": not_protected(no_privacy),
        "max_sites_per_patient": privacy.max_sites_per_patient,
        "audit": dict(audit) if audit is not None else None,
        "ledger": {"rows": number, "head": digest},
        "outcome": dict(outcome) if outcome is not None else None,
    }  # fmt: skip


def headline(
    budgets: Mapping[Any, Mapping[str, Any]],
    *,
    role: str,
    site: str,
    unit: str,
    delta: float,
    seeded: bool,
    no_privacy: str | None,
    colluders: int,
) -> dict[str, Any]:
    """``statement``, ``epsilon``, ``epsilon_evaluation`` and ``mu`` of one site, from its budgets and c."""
    paid = {population: budget["this_run"] for population, budget in budgets.items() if budget["releases"]}
    trained = paid.get("train")
    none = 0.0 if role == "train" else None
    evaluation = paid["evaluation"]["epsilon"] if "evaluation" in paid else None
    attack = min(trained["attack"], key=lambda a: abs(float(a["fpr"]) - 0.01)) if trained else None
    return {
        "statement": statement(
            role=role, site=site, unit=unit, delta=delta, epsilon=trained["epsilon"] if trained else None,
            evaluation=evaluation, attack=attack, seeded=seeded, no_privacy=no_privacy,
            **resting_on_others(trained, colluders),
        ),
        "epsilon": trained["epsilon"] if trained else none,
        "epsilon_evaluation": evaluation,
        "mu": trained["mu"] if trained else none,
    }  # fmt: skip


def network_report(sites: Sequence[Mapping[str, Any]], *, audit: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The reports of a run's sites as one.

    Its ε is that of a unit at the declared number of sites: the largest of all where units are at one site each
    (parallel composition), and priced by :func:`several_sites` otherwise.

    Args:
        sites: reports of single sites.
        audit: what ``fedsecure audit --json`` printed, or ``None`` where none was run.

    Returns:
        An object valid under ``report.schema.json``, ``kind`` "network".

    Raises:
        PrivacyError: FS-1230 there is none, or they are of different runs.
    """
    if len({(report["run"], report["delta"], report["unit"]) for report in sites}) != 1:
        raise PrivacyError(
            "FS-1230", f"{len(sites)} site reports that are not of one run", expected="at least one, all of one run",
            cure="collect the reports of the same run folder",
        )  # fmt: skip
    # In one order, whoever joins them: where two say the same, the first by name is taken.
    sites = sorted((dict(report) for report in sites), key=lambda report: str(report["site"]))
    first = sites[0]
    trained = [report for report in sites if report["role"] == "train"]
    worst = max(trained or sites, key=lambda r: math.inf if r["epsilon"] is None else r["epsilon"])
    ended = max(sites, key=lambda report: len(report["rounds"]))
    evaluated = [r["epsilon_evaluation"] for r in sites if r["epsilon_evaluation"] is not None]
    seeded = any(report["seeded"] for report in sites)
    no_privacy = next(filter(None, (report.get("no_privacy") for report in sites)), None)
    declared = max(report.get("max_sites_per_patient", 1) for report in sites)
    several = several_sites(sites, first["delta"], declared=declared)
    others = resting_on_others(paid_in_training(worst), first["secagg"]["colluders"])
    if declared > 1:
        others["beyond"] = None  # it is one site's, and the unit is at several
    epsilon, mu, evaluation, attack = worst["epsilon"], worst["mu"], max(evaluated, default=None), None
    if declared == 1:
        attack = attack_at(worst, 0.01)
    else:
        for row in several["figures"]:
            if row["sites"] <= declared and row["population"] == "train":
                epsilon, mu = row["epsilon"], row["mu"]
                attack = None if mu is None else {"fpr": 0.01, "tpr": accounting.attack_power(mu, 0.01)}
            elif row["sites"] <= declared:
                evaluation = row["epsilon"]
    return {
        **{key: first[key] for key in ("schema", "federation", "run", "versions")},
        "schema_version": SCHEMA_VERSION,
        "kind": "network",
        "seeded": seeded,
        "no_privacy": no_privacy,
        "stamp": stamp(seeded=seeded, no_privacy=no_privacy),
        "statement": statement(
            role="train", site="a hospital of the network", unit=first["unit"], delta=first["delta"],
            epsilon=epsilon, evaluation=evaluation, seeded=seeded, no_privacy=no_privacy, attack=attack, sites=declared,
            **others,
        ),
        "epsilon": epsilon,
        "epsilon_evaluation": evaluation,
        "mu": mu,
        **{
            key: first[key]
            for key in ("delta", "unit", "max_records_per_unit", "mechanism", "secagg", "assumptions", "not_protected")
        },
        "max_sites_per_patient": declared,
        "several_sites": several,
        "audit": dict(audit) if audit is not None else None,
        "rounds": ended["rounds"],
        "accuracy": ended["accuracy"],
        "sites": list(sites),
    }  # fmt: skip


def _header(kind: str, federation: str, run: str, *, seeded: bool, no_privacy: str | None) -> dict[str, Any]:
    return {
        "schema": SCHEMA,
        "schema_version": SCHEMA_VERSION,
        "kind": kind,
        "federation": federation,
        "run": run,
        "seeded": seeded,
        "no_privacy": no_privacy,
        "stamp": stamp(seeded=seeded, no_privacy=no_privacy),
        "versions": {
            **{name: _version(name) for name in ("fedsecure", "numpy", "cryptography", "dp-accounting")},
            "python": platform.python_version(),
        },
    }


def _budget(
    ledger: Ledger,
    dataset: str,
    population: Population,
    *,
    run: str,
    delta: float,
    colluders: int,
    survivors: int,
    policy: Limit | None,
) -> dict[str, Any]:
    history = [entry for entry in ledger.history(dataset, population) if entry.state == "RESERVED"]
    mine = [entry for entry in history if entry.run == run]
    # What the unit has paid that has paid most, under any name; never less than this run.
    run_events = _events(mine)
    whole = max(
        (list(ledger.spent(dataset, population, delta=delta)), run_events),
        key=lambda events: accounting.epsilon(events, delta=delta),
    )
    limits = {"policy": policy, "officer": ledger.limits().get((dataset, population))}
    return {
        "dataset": dataset,
        "this_run": price(run_events, delta, colluders=colluders, survivors=survivors),
        "all_runs": price(whole, delta, colluders=colluders, survivors=survivors),
        "all_runs_events": compact(whole),
        "limits": [
            {"by": by, **asdict(limit), "remaining": remaining(whole, **asdict(limit))}
            for by, limit in limits.items()
            if limit is not None
        ],
        "runs": len({entry.run for entry in history if entry.final != "VOID"}),
        "shares": by_purpose([entry.events for entry in mine if entry.final != "VOID"]),
        "releases": _releases(mine, delta),
    }


def _releases(entries: Sequence[Entry], delta: float) -> list[dict[str, Any]]:
    """Every charge with its events, its share of the whole, and ε after it."""
    portions = shares([entry.events if entry.final != "VOID" else () for entry in entries])
    poisson = any(event.sampling_rate < 1 for entry in entries for event in entry.events)
    stride = max(1, -(-len(entries) // _MOST_STEPS)) if poisson else 1
    rows: list[dict[str, Any]] = []
    spent: list[Event] = []
    for number, (entry, share) in enumerate(zip(entries, portions, strict=True), start=1):
        spent += entry.events if entry.final != "VOID" else ()
        known = number % stride == 0 or number == len(entries)
        rows.append(
            {
                "round": entry.round,
                "attempt": entry.attempt,
                "utc": entry.utc,
                "state": entry.final,
                "reservation": entry.reservation,
                "query_sha256": entry.query_sha256,
                "events": [
                    {
                        "purpose": event.purpose,
                        "noise_multiplier": event.noise_multiplier,
                        "local_noise_multiplier": event.local_noise_multiplier,
                        "sampling_rate": event.sampling_rate,
                        "steps": event.steps,
                    }
                    for event in entry.events
                ],
                "share": share,
                "epsilon_after": finite(accounting.epsilon(spent, delta=delta)) if known else None,
            }
        )
    return rows


def _events(entries: Iterable[Entry]) -> list[Event]:
    return [event for entry in entries if entry.final != "VOID" for event in entry.events]


def _mechanism(settings: RunSettings, plan: PrivacyPlan, *, seeded: bool) -> dict[str, Any]:
    privacy = settings.privacy
    (event,) = plan.round_events
    rates = plan.sampling_rates
    return {
        "method": settings.method.name,
        "parameters": plan.parameters,
        "noise": privacy.noise,
        "noise_multiplier": plan.noise_multiplier,
        "local_noise_multiplier": event.local_noise_multiplier,
        "clip_norm": privacy.max_grad_norm,
        "sampling": "full batch" if set(rates.values()) == {1.0} else "Poisson",
        "sampling_rate": event.sampling_rate,
        "sampling_rates": dict(rates),
        "rounds_planned": plan.rounds,
        "local_steps": plan.local_steps,
        "spare_attempts": privacy.spare_attempts,
        "target_epsilon": privacy.target_epsilon,
        "signal_to_noise": plan.signal_to_noise,
        "relation": "a unit's records against nothing in their place (zero-out, REPLACE_SPECIAL); "
        "the declared maximum of units is public",
        "accountant": _ACCOUNTANTS[accounting.accountant(replace(event, sampling_rate=q) for q in rates.values())],
        "generator": f"a seed: {SEEDED}" if seeded else "AES-256-CTR keyed by the operating system",
        "declared_units": dict(plan.units),
    }


def _rounds(outcome: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """Attempts in order: who was asked and how many are in the sum."""
    return [
        {
            "round": record["round"],
            "attempt": record["attempt"],
            "stage": record["stage"],
            "cohort": len(record["cohort"]),
            "survivors": len(record["survivors"]) if "survivors" in record else None,
            "aborted": record.get("aborted"),
        }
        for record in (outcome or {}).get("attempts", ())
    ]


def _accuracy(settings: RunSettings, outcome: Mapping[str, Any] | None) -> dict[str, Any] | None:
    evaluations: Mapping[str, Mapping[str, Any]] = (outcome or {}).get("evaluations", {})
    if not evaluations:
        return None
    evaluated = [entry for entry in settings.sites.values() if entry.evaluation_units > 0]
    stages = {
        stage: {key: facts.get(key) for key in ("accuracy", "balanced_accuracy")}
        for stage, facts in evaluations.items()
    }
    per_class = [
        {"class": name, **{stage: _ratio(facts, index) for stage, facts in evaluations.items()}}
        for index, name in enumerate(settings.classes)
    ]
    return {
        "exact": all(entry.evaluation_public for entry in evaluated),
        "before": stages.get("before"),
        "after": stages.get("after"),
        "per_class": per_class,
    }


def _ratio(facts: Mapping[str, Any], index: int) -> float | None:
    """Hits over units of one class, both possibly noisy; ``None`` below one unit."""
    hits, totals = facts.get("hits", ()), facts.get("totals", ())
    if index >= len(totals) or totals[index] < 1:
        return None
    return min(1.0, max(0.0, float(hits[index]) / float(totals[index])))


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
