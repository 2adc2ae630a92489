"""A whole patient, however many images, moves the sum by at most the clip norm (privacy.md §3.4)."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsecure.learning.adapters import AdapterSpec
from fedsecure.learning.engines import clipped_sum
from fedsecure.learning.task import HeadTask
from fedsecure.learning.units import group_units
from fedsecure.privacy.grid import distributed_segment, round_to_grid

KEY, D, K, CLIP = b"k" * 32, 16, 4, 0.05


def task_of(kind: Any, seed: int = 0) -> tuple[HeadTask, dict[str, Any]]:
    rng = np.random.default_rng(seed)
    text, centre = rng.normal(size=(K, D)).astype(np.float32), (rng.normal(size=D) * 0.1).astype(np.float32)
    task = HeadTask(AdapterSpec(kind, D, K), text, centre, 20.0)
    start = {n: v + 0.3 * rng.normal(size=v.shape).astype(np.float32) for n, v in task.spec.initial(b"x").items()}
    return task, start


def hospital(seed: int) -> tuple[Any, Any, list[str]]:
    """Forty patients of one to nine images; the first few are made to break a clip."""
    rng = np.random.default_rng(seed)
    owners = [f"p{i}" for i in range(40) for _ in range(rng.integers(5 if i < 4 else 1, 10))]
    features = rng.normal(size=(len(owners), D)).astype(np.float32)
    labels = rng.integers(0, K, len(owners))
    rows = {name: [i for i, owner in enumerate(owners) if owner == name] for name in ("p0", "p1", "p2", "p3")}
    features[rows["p0"]] *= 1e4
    features[rows["p1"]], labels[rows["p1"]] = features[rows["p1"][0]], 1
    features[rows["p2"]] = 0
    features[rows["p3"]] = 3e38 * np.sign(features[rows["p3"]])
    return features, labels, owners


def total(task: HeadTask, start: Any, data: tuple[Any, Any, list[str]], keep: Any, *, engine: Any, cap: int = 4) -> Any:
    features, labels, owners = data
    kept = np.array([keep(name) for name in owners], np.bool_)
    units = group_units(
        features[kept], labels[kept], [n for n, k in zip(owners, kept, strict=True) if k], cap=cap, key=KEY, classes=K
    )
    return clipped_sum(task, start, units, max_grad_norm=CLIP, engine=engine, device="cpu")


@pytest.mark.parametrize("engine", ["closed-form", "opacus"])
@pytest.mark.parametrize("kind", ["linear", "facmic"])
def test_adding_or_removing_a_patient_moves_the_sum_by_at_most_the_clip(kind: str, engine: str) -> None:
    task, start = task_of(kind)
    data = hospital(3)
    whole = total(task, start, data, lambda name: True, engine=engine)
    empty = total(task, start, data, lambda name: False, engine=engine)
    assert not empty.any()
    moved = []
    for patient in (f"p{i}" for i in range(12)):
        without = total(task, start, data, lambda name, p=patient: name != p, engine=engine)
        alone = total(task, start, data, lambda name, p=patient: name == p, engine=engine)
        moved += [float(np.linalg.norm(whole - without)), float(np.linalg.norm(alone))]
    assert max(moved) <= CLIP
    # the bound is reached, so a clip by record or a wider one would show
    assert max(moved) >= CLIP * (1 - 2e-5)


@pytest.mark.parametrize("kind", ["linear", "facmic"])
def test_clipping_by_record_would_break_the_bound(kind: str) -> None:
    """The naive way: clip each image, then a patient counts as often as he has images."""
    task, start = task_of(kind)
    features, labels, owners = hospital(3)
    mine = [i for i, owner in enumerate(owners) if owner == "p1"]
    by_record = group_units(features[mine], labels[mine], [str(i) for i in mine], cap=1, key=KEY)
    assert len(mine) > 1
    naive = clipped_sum(task, start, by_record, max_grad_norm=CLIP, device="cpu")
    assert np.linalg.norm(naive) > CLIP * (len(mine) - 0.5)


@pytest.mark.parametrize("engine", ["closed-form", "opacus"])
@pytest.mark.parametrize("kind", ["linear", "facmic"])
def test_one_patient_who_holds_everything_is_still_one(kind: str, engine: str) -> None:
    task, start = task_of(kind)
    features, labels, owners = hospital(5)
    data = (features, labels, ["only"] * len(owners))
    for cap in (1, 4, 64):
        found = total(task, start, data, lambda name: True, engine=engine, cap=cap)
        assert 0 < np.linalg.norm(found) <= CLIP


@pytest.mark.parametrize("kind", ["linear", "facmic"])
def test_images_past_the_cap_and_copies_change_nothing_beyond_one_unit(kind: str) -> None:
    """Adding images to a patient moves the sum by no more than replacing him: 2C; copies within him by nothing."""
    task, start = task_of(kind)
    features, labels, owners = hospital(7)
    base = total(task, start, (features, labels, owners), lambda name: True, engine="auto")
    more = (
        np.concatenate([features, 1e4 * np.ones((50, D), np.float32)]),
        np.concatenate([labels, np.zeros(50, np.int64)]),
        [*owners, *["p9"] * 50],
    )
    grown = total(task, start, more, lambda name: True, engine="auto")
    assert np.linalg.norm(grown - base) <= 2 * CLIP
    twins = [features[:1].repeat(n, axis=0) for n in (1, 4)]
    one, four = (
        total(task, start, (rows, np.ones(len(rows), np.int64), ["t"] * len(rows)), lambda name: True, engine="auto")
        for rows in twins
    )
    assert np.allclose(one, four, rtol=1e-9, atol=1e-15)


@given(
    kind=st.sampled_from(["linear", "facmic"]),
    engine=st.sampled_from(["closed-form", "opacus"]),
    images=st.lists(st.integers(1, 12), min_size=1, max_size=6),
    cap=st.integers(1, 6),
    scale=st.sampled_from([1e-6, 1.0, 1e4, 1e30]),
    clip=st.sampled_from([1e-3, 0.1, 10.0]),
    seed=st.integers(0, 2**20),
)
@settings(max_examples=20, deadline=None)
def test_the_bound_holds_for_any_patients(
    kind: str, engine: Any, images: list[int], cap: int, scale: float, clip: float, seed: int
) -> None:
    task, start = task_of(kind, seed)
    rng = np.random.default_rng(seed)
    owners = [f"p{i}" for i, count in enumerate(images) for _ in range(count)]
    features = (scale * rng.normal(size=(len(owners), D))).astype(np.float32)
    labels = rng.integers(0, K, len(owners))

    def of(keep: list[bool]) -> Any:
        units = group_units(
            features[keep], labels[keep], [n for n, k in zip(owners, keep, strict=True) if k], cap=cap, key=KEY
        )
        return clipped_sum(task, start, units, max_grad_norm=clip, engine=engine, device="cpu")

    whole, without = of([True] * len(owners)), of([name != "p0" for name in owners])
    assert np.linalg.norm(whole - without) <= clip
    segment = distributed_segment(
        "g", len(whole), clip_norm=clip, noise_multiplier=1.0, honest=2, sites=3, units=len(images)
    )
    assert np.linalg.norm(round_to_grid(whole, segment) - round_to_grid(without, segment)) <= segment.bound
