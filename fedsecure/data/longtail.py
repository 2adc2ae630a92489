"""Long-tailed data for experiments: exponential class counts, nested subsets, and accuracy by how common a class is.

The profile n_c = n_max · f^(c/(C−1)), f = 1/imbalance, is Cui et al.'s (CVPR 2019, arXiv 1901.05555), which the
long-tailed CIFAR sets of CReFF (IJCAI 2022) and CLIP2FL (AAAI 2024) follow; the groups many, medium and few are Liu et
al.'s for ImageNet-LT (CVPR 2019, arXiv 1904.05160). Federated partitions are in :mod:`fedsecure.data.partition`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from fedsecure.data.dataset import check_labels
from fedsecure.errors import DataError

Indices = npt.NDArray[np.int64]
# ImageNet-LT's bounds: more than 100 training records are many, fewer than 20 few.
MANY, FEW = 100, 20


def long_tail_counts(largest: int, classes: int, *, imbalance: float) -> Indices:
    """n_c = ⌊n_max · imbalance^(−c/(C−1))⌋ for c = 0 … C−1.

    Args:
        largest: n_max ≥ 1, records of the most common class.
        classes: C ≥ 2.
        imbalance: n_max over the count of the rarest class, ≥ 1 and finite; 1 is balanced.

    Returns:
        (C,) int64, not increasing, each at least 1.

    Raises:
        DataError: FS-1160 a number out of range, or one with which the rarest class would have no record.
    """
    if classes < 2 or largest < 1 or not (math.isfinite(imbalance) and imbalance >= 1):
        raise DataError(
            "FS-1160",
            f"a long tail of {classes} classes, {largest} records in the largest and imbalance {imbalance:g}",
            expected="two classes or more, at least one record, and a finite imbalance of 1 or more",
            cure="imbalance is the count of the most common class over that of the rarest: 10, 50 and 100 are usual",
        )
    factor = 1 / imbalance
    counts = np.array([int(largest * factor ** (c / (classes - 1))) for c in range(classes)], np.int64)
    if counts[-1] < 1:
        raise DataError(
            "FS-1160",
            f"imbalance {imbalance:g} with {largest} records in the largest class leaves the rarest class none",
            expected=f"an imbalance of at most {largest}",
            cure="lower the imbalance, or bring more records",
        )
    return counts


def largest_count(available: Sequence[int] | Indices, *, imbalance: float) -> int:
    """The greatest n_max whose counts fit.

    Args:
        available: (C,) records of each class, in the order of the tail.
        imbalance: as in :func:`long_tail_counts`.

    Raises:
        DataError: FS-1160 as :func:`long_tail_counts`.
    """
    held = np.asarray(available, np.int64)
    top = int(held[0]) if len(held) else 0
    while top > 1 and (long_tail_counts(top, len(held), imbalance=imbalance) > held).any():
        top -= 1
    return top


def long_tail(
    labels: npt.NDArray[np.int64],
    *,
    classes: int,
    imbalance: float,
    seed: int,
    order: Sequence[int] | None = None,
    largest: int | None = None,
) -> Indices:
    """Rows of a long-tailed subset, chosen at random within each class.

    Subsets are nested: with one seed and one ``largest``, a larger imbalance keeps a part of what a smaller one keeps.

    Args:
        labels: int64 (n,) in [0, C).
        classes: C ≥ 2.
        imbalance: as in :func:`long_tail_counts`.
        seed: ≥ 0.
        order: the classes from most common to rarest; by label where None, as in the papers.
        largest: n_max; the greatest that every class can follow where None.

    Returns:
        rows in ascending order.

    Raises:
        DataError: FS-1108 labels out of range, FS-1160 as :func:`long_tail_counts`, FS-1161 a class has fewer records
            than the tail asks of it, FS-1162 ``order`` is no order of the classes.
    """
    values = check_labels(labels, records=len(labels), classes=classes, where="long tail")
    chosen = np.arange(classes) if order is None else np.asarray(order, np.int64)
    if sorted(chosen.tolist()) != list(range(classes)):
        raise DataError(
            "FS-1162",
            f"{len(chosen)} classes in the order of the tail: {chosen[:8].tolist()} …",
            expected=f"every class from 0 to {classes - 1} once",
            cure="leave the order out, or mend it",
        )
    held = np.bincount(values, minlength=classes)[chosen]
    top = largest_count(held, imbalance=imbalance) if largest is None else largest
    counts = long_tail_counts(top, classes, imbalance=imbalance)
    short = np.flatnonzero(counts > held)
    if len(short):
        first = int(short[0])
        raise DataError(
            "FS-1161",
            f"class {int(chosen[first])} has {int(held[first])} records and the tail takes {int(counts[first])} of it",
            expected="in each class at least as many records as the tail takes",
            cure="lower the largest count, or let commoner classes come first in the order",
        )
    generator = np.random.default_rng(seed)
    # A permutation of every class, drawn whole, so that the choice of one class moves no other's.
    shuffled = [generator.permutation(np.flatnonzero(values == c)) for c in range(classes)]
    kept = [shuffled[c][:count] for c, count in zip(chosen.tolist(), counts.tolist(), strict=True)]
    return np.sort(np.concatenate(kept)).astype(np.int64)


def class_groups(counts: Sequence[int] | Indices, *, many: int = MANY, few: int = FEW) -> dict[str, Indices]:
    """``many``, ``medium`` and ``few``: classes with more than ``many`` training records, between, and fewer than
    ``few``. A group may be empty."""
    held = np.asarray(counts, np.int64)
    return {
        "many": np.flatnonzero(held > many),
        "medium": np.flatnonzero((held <= many) & (held >= few)),
        "few": np.flatnonzero(held < few),
    }


def class_thirds(counts: Sequence[int] | Indices) -> dict[str, Indices]:
    """``many``, ``medium`` and ``few``: the classes in three parts of equal number by how common they are, where the
    usual bounds would put all of them in one group. Ties go by label; the first parts take what does not divide."""
    common_first = np.argsort(-np.asarray(counts, np.int64), kind="stable")
    parts = np.array_split(common_first, 3)
    return {name: np.sort(part) for name, part in zip(("many", "medium", "few"), parts, strict=True)}


def group_accuracy(
    predicted: npt.NDArray[np.int64],
    labels: npt.NDArray[np.int64],
    *,
    classes: int,
    groups: Mapping[str, Indices],
) -> dict[str, float | None]:
    """Mean recall of all classes and of each group's.

    On a balanced test set this is the share of records that are right; on any other each class still counts alike, so
    a common class cannot hide a rare one.

    Args:
        predicted, labels: int64 (n,), labels in [0, C).
        classes: C.
        groups: name → classes; an empty group gets None.

    Raises:
        DataError: FS-1108, FS-1109 labels out of range or predictions of another number, FS-1163 a class without a
            test record.
    """
    values = check_labels(labels, records=len(predicted), classes=classes, where="test set")
    totals = np.bincount(values, minlength=classes)
    empty = np.flatnonzero(totals == 0)
    if len(empty):
        raise DataError(
            "FS-1163",
            f"the test set has no record of {len(empty)} classes, the first being {int(empty[0])}",
            expected="at least one test record of each class, best the same number of all",
            cure="bring a test set of all classes, or leave these classes out of the experiment",
        )
    recall = np.bincount(values[predicted == values], minlength=classes) / totals
    whole = {"all": np.arange(classes), **groups}
    return {name: float(recall[members].mean()) if len(members) else None for name, members in whole.items()}
