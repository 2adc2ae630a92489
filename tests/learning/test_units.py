"""Units do not depend on the order of records, respect the cap, and refuse what cannot be used."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsecure.errors import DataError
from fedsecure.learning.units import UnitFeatures, group_units

KEY = b"k" * 32


def same(one: UnitFeatures, two: UnitFeatures) -> bool:
    return (
        np.array_equal(one.features, two.features)
        and np.array_equal(one.labels, two.labels)
        and np.array_equal(one.mask, two.mask)
    )


@given(
    owners=st.lists(st.sampled_from("abcdef"), min_size=0, max_size=25),
    cap=st.integers(1, 4),
    shuffle=st.randoms(use_true_random=False),
    named=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_grouping_ignores_the_order_and_keeps_at_most_cap(owners, cap, shuffle, named) -> None:  # type: ignore[no-untyped-def]
    n = len(owners)
    rng = np.random.default_rng(n)
    features, labels = rng.normal(size=(n, 3)).astype(np.float32), rng.integers(0, 4, n)
    ids = [f"r{i}" for i in range(n)]
    order = list(range(n))
    shuffle.shuffle(order)
    first = group_units(features, labels, owners, cap=cap, key=KEY, record_ids=ids if named else None)
    second = group_units(
        features[order],
        labels[order],
        [owners[i] for i in order],
        cap=cap,
        key=KEY,
        record_ids=[ids[i] for i in order] if named else None,
    )
    assert same(first, second)
    assert first.features.shape == (len(set(owners)), cap, 3)
    assert sorted(first.mask.sum(1)) == sorted(min(cap, owners.count(name)) for name in set(owners))
    assert not first.features[~first.mask].any()
    assert np.allclose(first.weights.sum(1), 1)
    for row in range(len(first)):
        for record, label in zip(first.features[row][first.mask[row]], first.labels[row], strict=False):
            match = np.flatnonzero((features == record).all(1))
            assert label in labels[match]


def test_the_key_decides_what_is_left_out() -> None:
    features, labels = np.arange(40, dtype=np.float32).reshape(20, 2), np.zeros(20, np.int64)
    ids = [str(i) for i in range(20)]
    one = group_units(features, labels, ids, cap=1, key=KEY).limit_units(5)
    two = group_units(features, labels, ids, cap=1, key=b"j" * 32).limit_units(5)
    assert len(one) == len(two) == 5
    assert not np.array_equal(one.features, two.features)
    # fewer units of the same data leave the order of the others alone
    fewer = group_units(features[:-1], labels[:-1], ids[:-1], cap=1, key=KEY)
    rows = [tuple(r) for r in group_units(features, labels, ids, cap=1, key=KEY).features[:, 0]]
    rows.remove(tuple(features[-1]))
    assert rows == [tuple(r) for r in fewer.features[:, 0]]


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e300])
def test_features_that_are_not_finite_are_refused_at_ingest(bad: float) -> None:
    features = np.zeros((3, 2))
    features[1, 1] = bad
    with pytest.raises(DataError, match=r"FS-1143.*first: record 1"):
        group_units(features, np.zeros(3, np.int64), ["a", "b", "c"], cap=1, key=KEY)


def test_what_does_not_fit_is_refused() -> None:
    features, labels = np.zeros((3, 2), np.float16), np.array([0, 1, 2])
    with pytest.raises(DataError, match="FS-1144"):
        group_units(features, labels[:2], ["a", "b", "c"], cap=1, key=KEY)
    with pytest.raises(DataError, match="FS-1144"):
        group_units(features, labels, ["a", "b", "c"], cap=0, key=KEY)
    with pytest.raises(DataError, match=r"FS-1144.*0 to 2"):
        group_units(features, labels, ["a", "b", "c"], cap=1, key=KEY, classes=2)
    with pytest.raises(DataError, match="FS-1144"):
        UnitFeatures(np.zeros((2, 1, 3), np.float32), np.zeros((2, 2), np.int64), np.ones((2, 2), np.bool_))
