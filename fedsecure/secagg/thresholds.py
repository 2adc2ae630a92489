"""Cohort size, colluders, Shamir threshold and least survivors of one round (secagg.md §3.5).

c ≥ 1 always: every site knows its own input and reads the published sum, so it is one colluder against the
others even without the server. The active bound t > (n + c) / 2 is that of Bonawitz et al., CCS 2017.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

from fedsecure.errors import ProtocolError
from fedsecure.secagg import graph

MIN_SITES = 3
MAX_SITES = 128  # the complete graph; secagg.md §3.8 above
MAX_GRAPH_SITES = 10_000


class Mode(enum.Enum):
    """What the server may do: follow the protocol and look (``HBC``), or anything (``ACTIVE``)."""

    HBC = 1
    ACTIVE = 2


def default_colluders(sites: int) -> int:
    """c = max(1, ⌊(n−1)/3⌋)."""
    return max(1, (sites - 1) // 3)


def minimum_threshold(sites: int, colluders: int, *, mode: Mode = Mode.ACTIVE) -> int:
    """Least t: ⌊(n+c)/2⌋+1 against an active server, max(c+1, ⌊n/2⌋+1) against an honest-but-curious one."""
    if mode is Mode.ACTIVE:
        return (sites + colluders) // 2 + 1
    return max(colluders + 1, sites // 2 + 1)


def minimum_survivors(threshold: int, colluders: int) -> int:
    """Least u_min: max(t, c+2), so that every released sum holds two honest inputs or more."""
    return max(threshold, colluders + 2)


@dataclass(frozen=True, slots=True)
class Thresholds:
    """The four numbers of a round, checked against each other.

    Attributes:
        sites: n, 3 … 128; with a sparse graph 129 … 10 000.
        colluders: c ≥ 1.
        threshold: t, signatures and shares needed; at least :func:`minimum_threshold` of the mode.
        min_survivors: u_min, vectors needed in the sum; max(t, c+2) … n.
        mode: which adversary t is for.
        neighbours: k of a sparse graph (secagg.md §3.8), 0 for the complete one. t is then of k, and the numbers must
            keep a site's secrets closed with probability 1 − 2^-40.

    Raises:
        ProtocolError: FS-1300 n is out of range, FS-1301 the numbers do not fit together.
    """

    sites: int
    colluders: int
    threshold: int
    min_survivors: int
    mode: Mode = Mode.ACTIVE
    neighbours: int = 0

    def __post_init__(self) -> None:
        if self.neighbours:
            self._check_sparse()
            return
        n, c, t, u = self.sites, self.colluders, self.threshold, self.min_survivors
        if not MIN_SITES <= n <= MAX_SITES:
            raise ProtocolError(
                "FS-1300",
                f"a cohort of {n} site(s)",
                expected=f"{MIN_SITES} to {MAX_SITES} sites: of two, each learns the other from the sum",
                cure="change the number of sites in the round",
            )
        least = minimum_threshold(n, c, mode=self.mode)
        if c < 1 or not least <= t <= n or not minimum_survivors(t, c) <= u <= n:
            raise ProtocolError(
                "FS-1301",
                f"n={n}, c={c}, t={t}, u_min={u} in mode {self.mode.name}",
                expected=f"c >= 1, {least} <= t <= n and max(t, c+2) <= u_min <= n",
                cure="lower colluders or min_survivors, or add sites",
            )

    def _check_sparse(self) -> None:
        n, c, t, u, k = self.sites, self.colluders, self.threshold, self.min_survivors, self.neighbours
        if not MAX_SITES < n <= MAX_GRAPH_SITES:
            raise ProtocolError(
                "FS-1300",
                f"a cohort of {n} sites with a sparse graph",
                expected=f"{MAX_SITES + 1} to {MAX_GRAPH_SITES} sites",
                cure="change the number of sites in the round",
            )
        fit = self.mode is Mode.HBC and k % 2 == 0 and 1 <= t <= k <= min(n - 1, graph.MAX_NEIGHBOURS)
        fit = fit and 1 <= c < n and c + 2 <= u <= n
        if not fit or graph.security_log2(n, k, threshold=t, colluders=c, missing=n - u) > graph.SECURITY_LOG2:
            raise ProtocolError(
                "FS-1301",
                f"n={n}, c={c}, k={k}, t={t}, u_min={u} in mode {self.mode.name}",
                expected=f"mode HBC, even k <= {graph.MAX_NEIGHBOURS}, t <= k, u_min >= c+2, and a site's secrets "
                "open with at most 2^-40",
                cure="raise k and t, or lower colluders",
            )

    @staticmethod
    def choose(
        sites: int,
        *,
        mode: Mode = Mode.ACTIVE,
        colluders: int | None = None,
        min_survivors: int | None = None,
    ) -> Thresholds:
        """Defaults where ``None``: c by :func:`default_colluders`, the least t, the least u_min.

        Above 128 sites: u_min is 90 % of them, k and t the least of :func:`fedsecure.secagg.graph.search`.
        """
        c = default_colluders(sites) if colluders is None else colluders
        if sites > MAX_SITES and mode is Mode.HBC:
            return _choose_sparse(sites, c, sites - sites // 10 if min_survivors is None else min_survivors)
        t = minimum_threshold(sites, c, mode=mode)
        u = minimum_survivors(t, c) if min_survivors is None else min_survivors
        return Thresholds(sites, c, t, u, mode)


def _choose_sparse(sites: int, colluders: int, survivors: int) -> Thresholds:
    try:
        k, t = graph.search(min(sites, MAX_GRAPH_SITES), colluders=colluders, missing=sites - survivors)
    except ValueError as error:
        raise ProtocolError(
            "FS-1301",
            f"n={sites}, c={colluders}, u_min={survivors}",
            expected="so few corrupt and missing sites that a sparse graph bears them",
            cure="lower colluders or raise min_survivors",
        ) from error
    return Thresholds(sites, colluders, t, survivors, Mode.HBC, k)
