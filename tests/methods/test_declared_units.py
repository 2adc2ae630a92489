"""More units than a run declares are refused, never chosen among: a choice would let one patient bring in another."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from federation_world import CLASSES, World

from fedsecure.config import RunSettings
from fedsecure.data.loading import from_arrays
from fedsecure.errors import DataError
from fedsecure.learning.adapters import AdapterSpec
from fedsecure.learning.engines import clipped_sum
from fedsecure.learning.features import SiteFeatures, load_units
from fedsecure.learning.task import HeadTask
from fedsecure.learning.units import group_units
from fedsecure.privacy.ledger import Ledger


def world_of(folder: Path, *, unit: str = "record", **entry: Any) -> World:
    waits = {"max_attempts": 1, "prepared_rounds": 0}
    world = World(folder, rounds=1, public_evaluation=entry.get("evaluation_public", True), waits=waits)
    raw = world.settings.model_dump()
    raw["sites"]["site-1"] |= entry
    raw["privacy"] |= {"unit": unit}
    world.settings = RunSettings.model_validate(raw)
    world.start()
    return world


@pytest.mark.parametrize("entry", [{"max_units": 29}, {"evaluation_units": 29}], ids=["training", "evaluation"])
@pytest.mark.parametrize("public", [True, False])
def test_a_site_with_more_units_than_declared_stops_uncharged(
    tmp_path: Path, entry: dict[str, int], public: bool
) -> None:
    world = world_of(tmp_path, evaluation_public=public, **entry)
    with world.client("site-1") as client:
        client._sources._affordable = True  # which would ask for the hashes
        sources = client._sources.door(None, None).sources
        over, fine = ("train", "evaluation") if "max_units" in entry else ("evaluation", "train")
        for read in (sources[over].load, sources[over].hashes):  # type: ignore[index]
            assert read is not None
            with pytest.raises(DataError, match="FS-1127") as caught:
                read()
            assert "30 units" in caught.value.found
            assert "declare more" in caught.value.cure
        assert len(sources[fine].load()) == 30  # type: ignore[index]


def test_nothing_is_charged_for_a_data_set_that_is_too_large(tmp_path: Path) -> None:
    world = world_of(tmp_path, max_units=29)
    errors: list[BaseException] = []

    def site() -> None:
        with pytest.raises(DataError, match="FS-1127") as caught, world.client("site-1") as client:
            client.run()
        errors.append(caught.value)

    world.run(site, *(world.take_part(name) for name in world.names[1:]))
    assert len(errors) == 1
    with Ledger(tmp_path / "site-1" / "ledger.db") as ledger:
        assert not ledger.history()


def test_patients_count_and_not_their_records(tmp_path: Path) -> None:
    world = world_of(tmp_path, unit="patient", max_units=2)
    rows = np.eye(6, 16, dtype=np.float32)

    def data(patients: list[str]) -> Any:
        return from_arrays(rows, np.arange(6) % 3, classes=CLASSES, name="site-1-train", patients=patients)

    with world.client("site-1") as client:
        two = client._sources.door(data(["a", "b"] * 3), None).sources["train"]
        assert two.hashes is not None
        assert len(two.load()) == 2
        assert len(two.hashes().units) == 2 + 6, "the patients, and their rows"
        three = client._sources.door(data(["a", "b", "c"] * 2), None).sources["train"]
        assert three.hashes is not None
        with pytest.raises(DataError, match="FS-1127"):
            three.hashes()


def test_one_unit_replaced_by_nothing_moves_the_sum_by_c_and_a_choice_would_move_it_twice() -> None:
    """The positive control is the choice by keyed hash: the first units stay, so one that goes lets another in."""
    rng = np.random.default_rng(0)
    clip, many = 0.1, 12
    text = np.eye(2, 8, dtype=np.float32)
    labels = np.arange(many) % 2
    # Two clusters far on the wrong side: gradients are long, and of either class they point apart.
    values = (text[1 - labels] + 0.05 * rng.normal(size=(many, 8))).astype(np.float32)
    names = [f"u{i}" for i in range(many)]
    task = HeadTask(AdapterSpec("linear", 8, 2), text, np.zeros(8, np.float32), temperature=25.0)
    start = task.spec.initial(b"x")

    def summed(units: Any) -> Any:
        return clipped_sum(task, start, units, max_grad_norm=clip)

    def moves(most: int) -> float:
        def site(kept: list[int]) -> Any:
            units = group_units(values[kept], labels[kept], [names[i] for i in kept], cap=1, key=b"k")
            return summed(units.limit_units(most))

        everyone = list(range(many))
        whole = site(everyone)
        return max(float(np.linalg.norm(whole - site([j for j in everyone if j != i]))) for i in everyone[:6])

    assert moves(many) <= clip
    assert moves(many - 1) > 1.2 * clip
    constants = SiteFeatures(text=text, centre=np.zeros(8, np.float32), dimension=8, fingerprint="")
    data = from_arrays(values, labels, classes=("a", "b"), name="x")
    how: Any = {"cache": None, "unit": "record", "cap": 1, "key": b"k"}
    assert len(load_units(data, constants, max_units=many, **how)) == many
    with pytest.raises(DataError, match="FS-1127"):
        load_units(data, constants, max_units=many - 1, **how)


@pytest.mark.parametrize(
    ("units", "records", "refused"),
    [(500_000, 1, False), (500_000, 16, False), (500_001, 1, True), (500_000, 18, True), (131_072, 256, False)],
)
def test_more_units_than_a_float64_sum_can_hold_are_refused(
    tmp_path: Path, units: int, records: int, refused: bool
) -> None:
    raw = World(tmp_path).settings.model_dump()
    raw["privacy"] |= {"unit": "patient", "max_records_per_unit": records}
    raw["sites"]["site-1"]["max_units"] = units
    if not refused:
        assert RunSettings.model_validate(raw).sites["site-1"].max_units == units
        return
    with pytest.raises(ValueError, match="max_units"):
        RunSettings.model_validate(raw)
