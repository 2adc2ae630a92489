"""Who shares and masks with whom: everybody, or a k-regular graph for more than 128 sites (secagg.md §3.8).

The graph is Harary's circulant H(k, n) on a random ring, as in Bell, Bonawitz, Gascón, Lepoint and Raykova,
"Secure Single-Server Aggregation with (Poly)Logarithmic Overhead" (CCS 2020), section 3 and theorem 3.10
(honest-but-curious server). Three things must not happen, over the choice of the ring: an honest site with t
or more corrupt neighbours (its secrets would open), honest survivors that fall apart into two sets (each set
would have a sum of its own), and a site with fewer than t surviving neighbours (the sum would not open). The
first two are bounded by 2^-40, the last by 2^-20. The server could try rings by leaving sites out, hence the
claim against an honest-but-curious server only.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from functools import cached_property, lru_cache

from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

SECURITY_LOG2 = -40.0
CORRECTNESS_LOG2 = -20.0
MAX_NEIGHBOURS = 1024  # of 10 000 sites, a third of them corrupt, 126 are enough; the bounds take time in their number
_PREFIX = b"fedsecure/secagg/v1/graph\0"


@dataclass(frozen=True)
class Graph:
    """The sites of U1 and who is next to whom.

    Attributes:
        members: protocol indices of U1, ascending.
        neighbours: k of the Harary graph; 0 for the complete graph.
        seed: 32 public bytes of the ring; not used by the complete graph.
    """

    members: tuple[int, ...]
    neighbours: int = 0
    seed: bytes = b""

    @cached_property
    def _ring(self) -> tuple[int, ...]:
        """``members`` in the order of one AES-256-CTR word each under the seed: a random permutation."""
        stream = Cipher(algorithms.AES(self.seed), modes.CTR(bytes(16))).encryptor().update(bytes(16 * self._n))
        return tuple(sorted(self.members, key=lambda m: (stream[16 * self._at[m] : 16 * self._at[m] + 16], m)))

    @cached_property
    def _at(self) -> dict[int, int]:
        return {member: position for position, member in enumerate(self.members)}

    @cached_property
    def _position(self) -> dict[int, int]:
        return {member: position for position, member in enumerate(self._ring)}

    @property
    def _n(self) -> int:
        return len(self.members)

    def peers(self, index: int) -> tuple[int, ...]:
        """Whom ``index`` masks with, ascending: k/2 sites on either side of it in the ring, or all others."""
        if not self.neighbours or self.neighbours >= self._n - 1:
            return tuple(member for member in self.members if member != index)
        at, half = self._position[index], self.neighbours // 2
        steps = (*range(-half, 0), *range(1, half + 1))
        return tuple(sorted(self._ring[(at + step) % self._n] for step in steps))

    def holders(self, index: int) -> tuple[int, ...]:
        """Who gets a share of the secrets of ``index``: in the complete graph itself too."""
        return self.members if not self.neighbours else self.peers(index)


def ring_seed(ctx: bytes, t1: bytes) -> bytes:
    """Seed of the ring, from the round and all its advertisements."""
    return hashlib.sha256(_PREFIX + ctx + t1).digest()


@lru_cache(maxsize=4096)
def tail_log2(population: int, marked: int, draws: int, least: int) -> float:
    """log2 of P[X ≥ least], X hypergeometric: ``draws`` of ``population`` of which ``marked`` count; exact sums."""
    top = min(marked, draws)
    if least <= 0:
        return 0.0
    ways = sum(math.comb(marked, x) * math.comb(population - marked, draws - x) for x in range(least, top + 1))
    return _log2(ways) - _log2(math.comb(population, draws))


def security_log2(sites: int, neighbours: int, *, threshold: int, colluders: int, missing: int) -> float:
    """log2 of the chance that the graph gives an honest input away.

    Args:
        sites: n.
        neighbours: k, even.
        threshold: t.
        colluders: corrupt sites.
        missing: sites that may drop out.

    Returns:
        log2 of the union bound: n·P[t or more of k neighbours corrupt], plus the n²/2 pairs of places where
        k/2 sites in a row are all corrupt or gone (without two such gaps the ring holds together).
    """
    n, k = sites, neighbours
    opened = math.log2(n) + tail_log2(n - 1, colluders, k, threshold)
    lost = min(n, colluders + missing)
    apart = 2 * math.log2(n) - 1 + (_log2(math.comb(lost, k)) - _log2(math.comb(n, k)) if lost >= k else -math.inf)
    return _add(opened, apart)


def correctness_log2(sites: int, neighbours: int, *, threshold: int, missing: int) -> float:
    """log2 of the chance that some site keeps fewer than t of its k neighbours when ``missing`` drop out."""
    return math.log2(sites) + tail_log2(sites - 1, missing, neighbours, neighbours - threshold + 1)


@lru_cache(maxsize=256)
def search(sites: int, *, colluders: int, missing: int) -> tuple[int, int]:
    """Least even k ≤ 1024, and for it the least t, that keep both bounds (Bell et al., CCS 2020, theorem 3.10).

    Args:
        sites: n.
        colluders: corrupt sites, below n.
        missing: sites that may drop out.

    Raises:
        ValueError: no graph keeps them; too many sites are corrupt or missing.
    """
    for k in range(2, min(sites, MAX_NEIGHBOURS + 1), 2):
        # Both bounds are monotone in t: the first t that is secure is the best one for correctness.
        if correctness_log2(sites, k, threshold=1, missing=missing) > CORRECTNESS_LOG2:
            continue
        low, high = 1, k + 1
        while low < high:
            t = (low + high) // 2
            secure = security_log2(sites, k, threshold=t, colluders=colluders, missing=missing) <= SECURITY_LOG2
            low, high = (low, t) if secure else (t + 1, high)
        if low <= k and correctness_log2(sites, k, threshold=low, missing=missing) <= CORRECTNESS_LOG2:
            return k, low
    raise ValueError(f"no graph on {sites} sites bears {colluders} corrupt and {missing} missing ones")


def _log2(value: int) -> float:
    """log2 of an integer of any size; −∞ of 0."""
    if value <= 0:
        return -math.inf
    shift = max(0, value.bit_length() - 64)
    return math.log2(value >> shift) + shift


def _add(*logs: float) -> float:
    top = max(logs)
    return top if math.isinf(top) else top + math.log2(math.fsum(2.0 ** (x - top) for x in logs))
