"""Long tails, the papers' partition, and accuracy by group: counts as published, nesting, and what is refused."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedsecure.data.longtail import (
    class_groups,
    class_thirds,
    group_accuracy,
    largest_count,
    long_tail,
    long_tail_counts,
)
from fedsecure.data.partition import equal_dirichlet
from fedsecure.errors import DataError


def refused(code: str, act: Callable[[], object]) -> DataError:
    with pytest.raises(DataError) as caught:
        act()
    assert caught.value.code == code
    return caught.value


@pytest.mark.parametrize(
    ("largest", "classes", "imbalance", "total", "rarest"),
    [
        (5000, 10, 10, 20431, 500),
        (5000, 10, 50, 13996, 100),
        (5000, 10, 100, 12406, 50),
        (500, 100, 10, 19573, 50),
        (500, 100, 50, 12608, 10),
        (500, 100, 100, 10847, 5),
    ],
)
def test_cifar_totals(largest: int, classes: int, imbalance: int, total: int, rarest: int) -> None:
    counts = long_tail_counts(largest, classes, imbalance=imbalance)
    assert (counts.sum(), counts[0], counts[-1]) == (total, largest, rarest)


def test_cifar10_at_100() -> None:
    counts = [5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50]
    assert long_tail_counts(5000, 10, imbalance=100).tolist() == counts


@given(st.integers(2, 12), st.integers(20, 60), st.floats(1, 20), st.floats(1, 20), st.integers(0, 5))
def test_subsets_are_nested_and_have_their_counts(c: int, each: int, one: float, two: float, seed: int) -> None:
    labels = np.repeat(np.arange(c), each)
    low, high = sorted((one, two))
    order = list(reversed(range(c)))
    wide = long_tail(labels, classes=c, imbalance=low, seed=seed, order=order)
    narrow = long_tail(labels, classes=c, imbalance=high, seed=seed, order=order)
    assert set(narrow.tolist()) <= set(wide.tolist())
    assert np.bincount(labels[narrow])[order].tolist() == long_tail_counts(each, c, imbalance=high).tolist()


def test_the_greatest_tail_that_fits() -> None:
    held = [40, 30, 30, 2]
    top = largest_count(held, imbalance=10)
    assert (long_tail_counts(top, 4, imbalance=10) <= held).all()
    assert (long_tail_counts(top + 1, 4, imbalance=10) > held).any()


def test_bad_tails() -> None:
    refused("FS-1160", lambda: long_tail_counts(100, 1, imbalance=10))
    refused("FS-1160", lambda: long_tail_counts(100, 10, imbalance=0.5))
    refused("FS-1160", lambda: long_tail_counts(100, 10, imbalance=float("nan")))
    assert "at most 20" in refused("FS-1160", lambda: long_tail_counts(20, 10, imbalance=100)).expected
    labels = np.repeat(np.arange(3), 10)
    refused("FS-1161", lambda: long_tail(labels, classes=3, imbalance=2, seed=0, largest=11))
    refused("FS-1162", lambda: long_tail(labels, classes=3, imbalance=2, seed=0, order=[0, 1, 1]))
    refused("FS-1108", lambda: long_tail(labels, classes=2, imbalance=2, seed=0))
    # One class only: the others have nothing to take.
    refused("FS-1160", lambda: long_tail(np.zeros(10, np.int64), classes=1, imbalance=2, seed=0))


@pytest.mark.parametrize(("sites", "alpha"), [(4, 0.5), (20, 0.5), (13, 0.2), (7, 100.0)])
def test_the_papers_partition(sites: int, alpha: float) -> None:
    labels = np.repeat(np.arange(10), long_tail_counts(500, 10, imbalance=50))
    parts = equal_dirichlet(labels, sites, alpha=alpha, seed=3)
    assert sorted(np.concatenate(parts).tolist()) == list(range(len(labels)))
    sizes = [len(part) for part in parts]
    assert max(sizes) - min(sizes) <= 1
    again = equal_dirichlet(labels, sites, alpha=alpha, seed=3)
    assert all(np.array_equal(one, two) for one, two in zip(parts, again, strict=True))


def test_alpha_skews_the_papers_partition() -> None:
    labels = np.repeat(np.arange(10), 200)

    def commonest(alpha: float) -> float:
        parts = equal_dirichlet(labels, 10, alpha=alpha, seed=0)
        return float(np.mean([np.bincount(labels[part]).max() / len(part) for part in parts]))

    assert commonest(0.05) > 0.5 > 0.2 > commonest(1000.0)


def test_bad_partitions() -> None:
    labels = np.repeat(np.arange(3), 10)
    refused("FS-1130", lambda: equal_dirichlet(labels, 31, alpha=0.5, seed=0))
    refused("FS-1130", lambda: equal_dirichlet(labels, 3, alpha=0.0, seed=0))


def test_groups() -> None:
    groups = class_groups([500, 101, 100, 20, 19, 1])
    assert {name: members.tolist() for name, members in groups.items()} == {
        "many": [0, 1],
        "medium": [2, 3],
        "few": [4, 5],
    }
    thirds = class_thirds([1, 9, 5, 7])
    assert {name: members.tolist() for name, members in thirds.items()} == {"many": [1, 3], "medium": [2], "few": [0]}


def test_accuracy_by_group_counts_classes_alike() -> None:
    labels = np.array([0] * 90 + [1] * 10)
    found = group_accuracy(
        np.zeros(100, np.int64),
        labels,
        classes=2,
        groups={"many": np.array([0]), "few": np.array([1]), "medium": np.array([], np.int64)},
    )
    # The test set is not balanced; the common class does not hide the rare one.
    assert found == {"all": 0.5, "many": 1.0, "few": 0.0, "medium": None}


def test_a_test_set_without_a_class() -> None:
    labels = np.array([0, 0, 2])
    error = refused("FS-1163", lambda: group_accuracy(labels, labels, classes=3, groups={}))
    assert "first being 1" in error.found
    refused("FS-1109", lambda: group_accuracy(labels[:2], labels, classes=3, groups={}))
    refused("FS-1108", lambda: group_accuracy(labels, labels, classes=2, groups={}))
