"""What an officer asks of a ledger: show, set, history, verify (privacy.md §3.9 and §7). Rows out, nothing printed.

Each function opens the file itself, so that the chain and the copy of its head are checked before anything is said.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from fedsecure.messages import Event, Population
from fedsecure.privacy import accounting
from fedsecure.privacy.ledger import MARGIN, POPULATIONS, Ledger
from fedsecure.privacy.ledger_file import Limit
from fedsecure.privacy.ledger_head import parse_head
from fedsecure.privacy.report_figures import remaining
from fedsecure.privacy.report_text import SEEDED

_MOST_LEFT = 1 << 20


def show(ledger: Path | str, *, delta: float = 1e-5, max_epsilon: float | None = None) -> list[dict[str, Any]]:
    """Spent and allowed ε of each data set and population, and for how many releases the rest will do.

    Args:
        ledger: the site's ledger file; never created.
        delta: δ of ``epsilon``; a limit is told, and what remains of it computed, at its own δ.
        max_epsilon: a limit at ``delta`` for what has none in the ledger, such as the site's policy.

    Returns:
        Rows of ``dataset``, ``population``, ``epsilon`` (of the unit that has paid most, under any name),
        ``releases`` charged under this name, ``limit_epsilon``, ``limit_delta``, ``remaining`` and ``releases_left``:
        how many more releases like the last one fit the limit. The last four are ``None`` where there is no limit; a
        site's policy may be stricter. ``seeded``: how many of the releases had noise from a seed, which hides nothing.

    Raises:
        LedgerError: FS-1261 there is no file; others as for :class:`Ledger`.
        PrivacyError: FS-1202 δ or ``max_epsilon`` is out of range.
    """
    assumed = None
    if max_epsilon is not None:
        accounting.mu_for_epsilon(max_epsilon, delta)
        assumed = Limit(max_epsilon, delta)
    rows: list[dict[str, Any]] = []
    with Ledger.open_existing(ledger) as opened:
        limits = opened.limits()
        history = opened.history()
        for dataset in opened.datasets():
            for population in POPULATIONS:
                mine = [e for e in history if (e.dataset, e.population) == (dataset, population)]
                paid = [e for e in mine if e.state == "RESERVED" and e.final != "VOID"]
                limit = limits.get((dataset, population), assumed if paid else None)
                if not paid and limit is None:
                    continue
                spent = opened.spent(dataset, population, delta=delta if limit is None else limit.delta)
                last = paid[-1].events if paid else ()
                rows.append(
                    {
                        "dataset": dataset,
                        "population": population,
                        "epsilon": opened.epsilon(dataset, population, delta),
                        "releases": len(paid),
                        "seeded": sum(entry.reason == SEEDED for entry in paid),
                        "limit_epsilon": limit.epsilon if limit else None,
                        "limit_delta": limit.delta if limit else None,
                        "remaining": remaining(spent, epsilon=limit.epsilon, delta=limit.delta) if limit else None,
                        "releases_left": _releases_left(spent, last, limit) if limit and last else None,
                    }
                )
    return rows


def _releases_left(spent: Sequence[Event], release: Sequence[Event], limit: Limit) -> int:
    """How many more releases of some events keep within a limit; at most a million."""

    def fits(count: int) -> bool:
        further = [replace(event, steps=event.steps * count) for event in release] if count else []
        return accounting.epsilon([*spent, *further], delta=limit.delta) <= limit.epsilon * MARGIN

    if not fits(1):
        return 0
    low, high = 1, 2
    while high < _MOST_LEFT and fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def set_limit(
    ledger: Path | str,
    dataset: str,
    *,
    population: Population = "train",
    epsilon: float,
    delta: float = 1e-5,
    reason: str,
) -> dict[str, Any]:
    """Record an officer's limit; the smaller of it and the site's policy decides from now on.

    Args:
        ledger: the site's ledger file; never created.
        dataset: name as in the site's configuration.
        population: ``"train"`` or ``"evaluation"``.
        epsilon: finite, above 0; may be above or below the limit before.
        delta: above 0, at most 1e-3.
        reason: a sentence for the record.

    Returns:
        The row of :func:`show`, and ``before``: the limit's ε until now, or ``None``.

    Raises:
        LedgerError: FS-1267 ε or δ is out of range, FS-1259 no name or reason, FS-1261 no file; as for :class:`Ledger`.
    """
    with Ledger.open_existing(ledger) as opened:
        before = opened.limits().get((dataset, population))
        opened.set_limit(dataset, population, Limit(epsilon, delta), reason=reason)
    (row,) = [row for row in show(ledger, delta=delta) if (row["dataset"], row["population"]) == (dataset, population)]
    return row | {"before": before.epsilon if before else None}


def history(ledger: Path | str, *, dataset: str | None = None, delta: float = 1e-5) -> list[dict[str, Any]]:
    """Every entry in order: charges, their ends, limits, and the ledger's own notes.

    Returns:
        Rows of ``seq``, ``utc``, ``state``, ``final``, ``dataset``, ``population``, ``run``, ``round``, ``attempt``,
        ``epsilon`` (of this entry's events alone, ``None`` unless it is a charge), ``units`` (digest of the set, empty
        where the name pays), ``limit_epsilon``, ``limit_delta``, ``reason``, ``note``, ``reservation``, ``hash``.

    Raises:
        LedgerError: FS-1261 there is no file; others as for :class:`Ledger`.
    """
    same = ("seq", "utc", "state", "final", "dataset", "population", "run", "round", "attempt", "units", "reason")
    with Ledger.open_existing(ledger) as opened:
        entries = opened.history(dataset)
    return [
        {
            **{name: getattr(entry, name) for name in (*same, "note", "reservation", "hash")},
            "epsilon": accounting.epsilon(entry.events, delta=delta) if entry.state == "RESERVED" else None,
            "limit_epsilon": entry.limit.epsilon if entry.limit else None,
            "limit_delta": entry.limit.delta if entry.limit else None,
        }
        for entry in entries
    ]


def verify(ledger: Path | str, *, head: str | None = None, renew: bool = False) -> dict[str, Any]:
    """Check the chain, the unit sets and the copy of the head, and against a head that was noted earlier.

    Args:
        ledger: the site's ledger file; never created.
        head: ``rows:hash`` from an earlier report or call; the ledger must still hold that row.
        renew: write a lost or unreadable ``.head`` anew; needs ``head``, so that somebody has looked at another record.

    Returns:
        ``rows``, ``head`` as ``rows:hash``, and ``checked_against`` (the given head or ``None``).

    Raises:
        LedgerError: FS-1256 altered, FS-1262 older than a head, FS-1264 the copy is lost, FS-1266 ``head`` is no head,
            or is missing for ``renew``; FS-1261 no file; others as for :class:`Ledger`.
    """
    known = None if head is None and not renew else parse_head(head or "")
    with Ledger.open_existing(ledger, renew_head=known if renew else None) as opened:
        rows = opened.verify(head=known)
        number, digest = opened.head()
    return {"rows": rows, "head": f"{number}:{digest}", "checked_against": head}
