"""The draw of cohorts: balanced whatever the seed, uniform over seeds, the same for everybody."""

from __future__ import annotations

import hashlib
from collections import Counter
from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedsecure.secagg.draw import Draw, _below

SEEDS = [hashlib.sha256(b"draw %d" % index).digest() for index in range(4000)]


def names(count: int) -> tuple[str, ...]:
    return tuple(f"site-{index:03}" for index in range(count))


@st.composite
def draws(draw: st.DrawFn) -> Draw:
    sites = draw(st.integers(1, 24))
    return Draw(names(sites), draw(st.integers(1, sites)), draw(st.binary(min_size=32, max_size=32)))


@given(draws(), st.integers(1, 90))
def test_no_site_is_asked_in_more_than_its_share_of_the_rounds(drawn: Draw, rounds: int) -> None:
    asked: Counter[str] = Counter(dict.fromkeys(drawn.sites, 0))
    for step in range(rounds):
        cohort = drawn.cohort(step)
        assert len(set(cohort)) == drawn.size
        assert list(cohort) == sorted(cohort)
        asked.update(cohort)
        assert max(asked.values()) - min(asked.values()) <= 1
    assert max(asked.values()) <= -(-rounds * drawn.size // len(drawn.sites))


def test_a_draw_that_takes_each_cohort_by_itself_would_break_the_bound() -> None:
    # The positive control: independent cohorts ask some site in more rounds than its share.
    once = [Draw(names(7), 3, seed).cohort(0) for seed in SEEDS[:7]]
    assert max(Counter(site for cohort in once for site in cohort).values()) > 3


def chi_square(counts: Counter[tuple[str, ...]], cells: int) -> float:
    expected = sum(counts.values()) / cells
    return sum((counts[cell] - expected) ** 2 for cell in counts) / expected + expected * (cells - len(counts))


@pytest.mark.parametrize(("sites", "size", "step"), [(6, 3, 0), (6, 3, 1), (5, 3, 1), (5, 3, 3), (6, 2, 2), (7, 5, 4)])
def test_every_cohort_is_equally_likely(sites: int, size: int, step: int) -> None:
    cells = list(combinations(names(sites), size))
    counts = Counter(Draw(names(sites), size, seed).cohort(step) for seed in SEEDS)
    assert set(counts) <= set(cells)
    freedom = len(cells) - 1
    # Six standard deviations of χ²: the seeds are fixed, so this holds or it does not.
    assert abs(chi_square(counts, len(cells)) - freedom) < 6 * (2 * freedom) ** 0.5


def test_the_statistic_would_see_a_draw_by_remainder() -> None:
    # The positive control: a byte modulo 100 favours the first 56 of 100 by a half.
    skewed = Counter((str(seed[0] % 100),) for seed in SEEDS)
    assert abs(chi_square(skewed, 100) - 99) > 6 * (2 * 99) ** 0.5


def test_words_that_would_favour_some_are_rejected() -> None:
    assert _below(3, iter([(1 << 64) - 1, 7])) == 1
    assert _below(4, iter([(1 << 64) - 1])) == 3


def test_the_draw_is_pinned() -> None:
    # Both sides of a run, whatever their releases, draw these.
    pinned = [[0, 2, 3], [0, 1, 4], [1, 2, 3], [1, 3, 4], [0, 2, 4], [1, 3, 4]]
    drawn = Draw(names(5), 3, bytes(range(32)))
    assert [[int(site[-1]) for site in drawn.cohort(step)] for step in range(6)] == pinned
    assert drawn.cohort(99_999) == drawn.cohort(99_999)


def test_another_seed_is_another_context() -> None:
    one, other = (Draw(names(5), 3, bytes([value]) * 32) for value in (1, 2))
    assert one.bind(bytes(32)) != other.bind(bytes(32))
    assert one.bind(bytes(32)) != one.bind(bytes([1]) * 32)
