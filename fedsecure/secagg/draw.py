"""Which sites a training round asks, where it asks fewer than all: a public draw (architecture.md §2).

A pure function of a seed and the round's number. Who was asked least often comes first; among equals chance decides.
So after any number of rounds no two sites have been asked more than once apart, whatever the seed: R rounds of K out
of n sites ask each in at most ⌈R·K/n⌉. That bound is what a run's noise is sized for; the draw is public, and nothing
is claimed for it beyond that.

Chance is SHA-256 in counter mode, and a choice among m rejects the words that would favour some (Fisher and Yates; as
Durstenfeld, CACM 1964). Every round of K sites is equally likely to be any K of them.
"""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass

SEED_BYTES = 32
_ROUND = b"fedsecure/draw/v1/round\0"
_CONFIG = b"fedsecure/draw/v1/config\0"
_WORDS = 1 << 64


@dataclass(frozen=True, slots=True)
class Draw:
    """The cohorts of one run.

    Attributes:
        sites: who may be asked, in protocol order, all different.
        size: K, 1 … number of sites.
        seed: 32 public bytes.
    """

    sites: tuple[str, ...]
    size: int
    seed: bytes

    def __post_init__(self) -> None:
        assert len(self.seed) == SEED_BYTES
        assert 1 <= self.size <= len(self.sites) == len(set(self.sites))

    def cohort(self, step: int) -> tuple[str, ...]:
        """Who training round ``step`` asks, counted from 0, in protocol order."""
        everybody = range(len(self.sites))
        # After so many rounds all have been asked equally often, so nothing before counts.
        period = len(everybody) // math.gcd(len(everybody), self.size)
        behind = list(everybody)
        asked: list[int] = []
        for round in range(step - step % period, step + 1):
            words = _words(self.seed, round)
            if len(behind) > self.size:
                asked = _choose(behind, self.size, words)
                behind = [site for site in behind if site not in asked]
            else:
                others = [site for site in everybody if site not in behind]
                again = _choose(others, self.size - len(behind), words)
                asked = behind + again
                behind = [site for site in everybody if site not in again]
        return tuple(self.sites[index] for index in sorted(asked))

    def bind(self, config_hash: bytes) -> bytes:
        """What stands for the settings in the contexts of a run with this draw: sites of another seed cannot be in one
        sum."""
        return hashlib.sha256(_CONFIG + config_hash + self.seed).digest()


def _words(seed: bytes, round: int) -> Iterator[int]:
    """64-bit words without end."""
    counter = 0
    while True:
        block = hashlib.sha256(_ROUND + seed + struct.pack(">QQ", round, counter)).digest()
        yield from struct.unpack(">4Q", block)
        counter += 1


def _choose(among: list[int], count: int, words: Iterator[int]) -> list[int]:
    """``count`` different entries, each choice of so many equally likely."""
    left, chosen = list(among), []
    for _ in range(count):
        chosen.append(left.pop(_below(len(left), words)))
    return chosen


def _below(limit: int, words: Iterator[int]) -> int:
    """A number in [0, limit), each equally likely."""
    fair = _WORDS - _WORDS % limit
    return next(word for word in words if word < fair) % limit


__all__ = ["SEED_BYTES", "Draw"]
