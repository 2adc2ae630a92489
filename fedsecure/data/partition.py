"""Seeded federated partitions of one data set, for experiments and simulation: index lists, one a site.

``dirichlet`` is the label skew of Hsu, Qi & Brown 2019 (arXiv 1909.06335), drawn class by class over sites as in
Li et al. 2022 (arXiv 2102.02079), whose ``quantity`` skew this also follows. ``equal_dirichlet`` is what the released
CReFF (IJCAI 2022) and CLIP2FL (AAAI 2024) programs do. Real federations are not partitioned.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from fedsecure.errors import DataError

Indices = npt.NDArray[np.int64]
_TRIES = 1000
_AUXILIARY = 10


def iid(records: int, sites: int, *, seed: int) -> tuple[Indices, ...]:
    """``records`` shuffled and dealt out; sizes differ by at most one. Raises DataError FS-1130."""
    _check(records, sites, 1)
    order = np.random.default_rng(seed).permutation(records)
    return tuple(np.sort(part) for part in np.array_split(order, sites))


def dirichlet(
    labels: npt.NDArray[np.int64], sites: int, *, alpha: float, seed: int, minimum: int = 1
) -> tuple[Indices, ...]:
    """Label skew: each class is shared out in proportions drawn from Dirichlet(α).

    Args:
        labels: int64 (n,).
        sites: number of sites ≥ 1.
        alpha: α > 0; small is more skewed.
        seed: ≥ 0.
        minimum: least records at a site; the draw is repeated until it holds.

    Raises:
        DataError: FS-1130 too few records or α ≤ 0, FS-1131 no draw met the minimum.
    """
    _check(len(labels), sites, minimum)
    _check_alpha(alpha)
    rng = np.random.default_rng(seed)
    for _ in range(_TRIES):
        shares: list[list[Indices]] = [[] for _ in range(sites)]
        for label in np.unique(labels):
            rows = rng.permutation(np.flatnonzero(labels == label))
            cuts = (np.cumsum(rng.dirichlet(np.full(sites, alpha)))[:-1] * len(rows)).astype(np.int64)
            for site, part in enumerate(np.split(rows, cuts)):
                shares[site].append(part)
        parts = tuple(np.sort(np.concatenate(share)) for share in shares)
        if min(len(part) for part in parts) >= minimum:
            return parts
    raise _no_draw(alpha, minimum)


def quantity(records: int, sites: int, *, alpha: float, seed: int, minimum: int = 1) -> tuple[Indices, ...]:
    """Quantity skew: sizes drawn from Dirichlet(α), records at random. Arguments and errors as :func:`dirichlet`."""
    _check(records, sites, minimum)
    _check_alpha(alpha)
    rng = np.random.default_rng(seed)
    for _ in range(_TRIES):
        cuts = (np.cumsum(rng.dirichlet(np.full(sites, alpha)))[:-1] * records).astype(np.int64)
        parts = tuple(np.sort(part) for part in np.split(rng.permutation(records), cuts))
        if min(len(part) for part in parts) >= minimum:
            return parts
    raise _no_draw(alpha, minimum)


def equal_dirichlet(labels: npt.NDArray[np.int64], sites: int, *, alpha: float, seed: int) -> tuple[Indices, ...]:
    """Label skew at sites of one size, as the released CReFF and CLIP2FL programs share records out.

    Shuffled records are cut into ⌈sites/10⌉ chunks, each for up to ten auxiliary sites. In a chunk each class is shared
    out by Dirichlet(α), with nothing for a site that has its part already, until the smallest site has half of the
    mean. All are then put end to end and cut again into sites of equal size (±1), which mixes neighbours: this is
    comparable with the papers' figures, and not an exact Dirichlet draw.

    Args:
        labels: int64 (n,).
        sites: number of sites ≥ 1.
        alpha: α > 0; small is more skewed.
        seed: ≥ 0.

    Raises:
        DataError: FS-1130 too few records or α ≤ 0, FS-1131 no draw gave every auxiliary site half of the mean.
    """
    _check(len(labels), sites, 1)
    _check_alpha(alpha)
    rng = np.random.default_rng(seed)
    chunks = -(-sites // _AUXILIARY)
    order: list[Indices] = []
    for index, chunk in enumerate(np.array_split(rng.permutation(len(labels)), chunks)):
        workers = min(_AUXILIARY, sites - _AUXILIARY * index)
        order += _auxiliary(labels, chunk, workers, alpha=alpha, rng=rng)
    return tuple(np.sort(part).astype(np.int64) for part in np.array_split(np.concatenate(order), sites))


def _auxiliary(
    labels: npt.NDArray[np.int64], rows: Indices, workers: int, *, alpha: float, rng: np.random.Generator
) -> list[Indices]:
    target = len(rows) / workers
    for _ in range(_TRIES):
        shares: list[list[Indices]] = [[] for _ in range(workers)]
        sizes = np.zeros(workers)
        for label in np.unique(labels[rows]):
            members = rng.permutation(rows[labels[rows] == label])
            shown = rng.dirichlet(np.full(workers, alpha)) * (sizes < target)
            # With a small alpha all of a class may fall to sites that are full.
            wanted = shown / shown.sum() if shown.sum() > 0 else (sizes < target) / max((sizes < target).sum(), 1)
            cuts = (np.cumsum(wanted)[:-1] * len(members)).astype(np.int64)
            for worker, part in enumerate(np.split(members, cuts)):
                shares[worker].append(part)
                sizes[worker] += len(part)
        if sizes.min() >= int(target / 2):
            return [np.concatenate(share) for share in shares]
    raise _no_draw(alpha, int(target / 2))


def released_split(records: int) -> tuple[Indices, Indices, Indices]:
    """Training, validation and test rows of a site as the FACMIC program (MICCAI 2024) cuts them.

    Shuffled by seed 0; 80, 10 and 10 %, each rounded down, so that up to two records are in none.

    Raises:
        DataError: FS-1130 for fewer than ten records.
    """
    _check(records, 10, 1)
    order = np.random.RandomState(0).permutation(records).astype(np.int64)
    first, second = int(0.8 * records), int(0.1 * records)
    return order[:first], order[first : first + second], order[first + second : first + 2 * second]


def _check(records: int, sites: int, minimum: int) -> None:
    if sites < 1 or minimum < 0 or records < sites * max(minimum, 1):
        raise DataError(
            "FS-1130",
            f"{records} records for {sites} sites with at least {minimum} each",
            expected="at least one site, and enough records for all",
            cure="ask for fewer sites or a smaller minimum",
        )


def _check_alpha(alpha: float) -> None:
    if not (np.isfinite(alpha) and alpha > 0):
        raise DataError(
            "FS-1130",
            f"alpha = {alpha}",
            expected="a finite number above 0",
            cure="0.1 is very skewed, 1 moderate, 100 nearly even",
        )


def _no_draw(alpha: float, minimum: int) -> DataError:
    return DataError(
        "FS-1131",
        f"none of {_TRIES} draws with alpha = {alpha} gave every site {minimum} records",
        expected="a partition in which every site has enough",
        cure="raise alpha, lower the minimum or the number of sites",
    )
