"""Who is asked: the cohort of a question and the public numbers of its secure sum.

The aggregator and every site compute both from the same settings; where a training round asks some of the training
sites only, which ones is the run's draw's to say (:func:`fedsecure.methods.agenda.asked_at`), and the numbers do not
depend on it.
"""

from __future__ import annotations

from fedsecure.config import RunSettings
from fedsecure.errors import ConfigError, IdentityError
from fedsecure.identity.roster import Roster
from fedsecure.methods.base import Cohort
from fedsecure.secagg.thresholds import Thresholds


def cohort_of(settings: RunSettings, *, trainers_only: bool) -> tuple[tuple[str, ...], Cohort]:
    """Who may be asked, in protocol order, and n, c and u_min of those that are asked (secagg.md §3.5)."""
    sites = tuple(sorted(s for s, e in settings.sites.items() if e.role == "train" or not trainers_only))
    rounds = settings.rounds
    # A floor meant for the training cohort may not fit the larger one that evaluates.
    floor = None if rounds.min_survivors == "auto" or not trainers_only else rounds.min_survivors
    size = settings.cohort_size() if trainers_only else len(sites)
    chosen = Thresholds.choose(size, colluders=_colluders(settings), min_survivors=floor)
    return sites, Cohort(sites=size, colluders=chosen.colluders, min_survivors=chosen.min_survivors)


def tossers(settings: RunSettings) -> tuple[tuple[str, ...], int]:
    """The training sites in protocol order, and how many of them have to take part in the toss for the run's draw: as
    many as a sum of them all would need, of which at most c collude."""
    sites, _ = cohort_of(settings, trainers_only=True)
    return sites, Thresholds.choose(len(sites), colluders=_colluders(settings)).min_survivors


def _colluders(settings: RunSettings) -> int | None:
    return None if settings.rounds.colluders == "auto" else settings.rounds.colluders


def check_roles(settings: RunSettings, roster: Roster) -> None:
    """Refuse settings that give a site more to do than the signed roster does.

    An observer counted as a trainer would be counted among those who add noise.

    Raises:
        IdentityError: FS-1450 a site is not in the roster, FS-1455 its role there does not allow the one here.
    """
    enrolled = {entry.site: entry.role for entry in roster.entries}
    unknown = set(settings.sites) - set(enrolled)
    if unknown:
        raise IdentityError(
            "FS-1450",
            f"sites {sorted(unknown)} are in the configuration and not in the roster",
            expected="every [sites] entry enrolled in the signed roster",
            cure="enrol them, or remove them",
        )
    for site, entry in settings.sites.items():
        if enrolled[site] not in ("train", entry.role):
            raise IdentityError(
                "FS-1455",
                f"{site!r} is to {entry.role} and is enrolled to {enrolled[site]}",
                expected="no more than the role in the signed roster",
                cure="enrol the site with that role, or correct its entry under [sites]",
            )


def refuse_draw(settings: RunSettings) -> None:
    """Refuse a drawn cohort, for methods that need every training site in one round: ConfigError FS-1050."""
    if settings.draws:
        raise ConfigError(
            "FS-1050",
            f"method {settings.method.name!r} with rounds.cohort = {settings.rounds.cohort}: a release that it makes "
            "once would hold the sites of one round only",
            expected='rounds.cohort = "all", or a method of descent',
            cure="leave cohort out under [rounds], or what is released once: class_prior, prototypes, the method",
        )


def refuse_prior(settings: RunSettings) -> None:
    """Refuse shares of the classes, for methods that would ignore them: ConfigError FS-1018."""
    if settings.method.class_prior:
        raise ConfigError(
            "FS-1018",
            f"method {settings.method.name!r} with class_prior",
            expected="a method that trains an adapter by gradient steps, such as linear or facmic",
            cure="leave class_prior out under [method], or name such a method",
        )


def refuse_target(settings: RunSettings) -> None:
    """Refuse a target to align with, for methods that would ignore it: ConfigError FS-1018."""
    if settings.method.alignment.target:
        raise ConfigError(
            "FS-1018",
            f"method {settings.method.name!r} with [method.alignment]",
            expected="the method facmic: it alone aligns with a target",
            cure='leave [method.alignment] out, or set name = "facmic" under [method]',
        )
