"""Transport and secure aggregation add nothing: a run's sums are, bit for bit, the integers added up centrally."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from federation_world import CLASSES, World

from fedsecure.aggregator.schedule import Schedule
from fedsecure.data.loading import open_dataset
from fedsecure.learning.engines import clipped_sum
from fedsecure.learning.features import load_site_features, load_units
from fedsecure.messages import Aggregate
from fedsecure.methods.cohorts import cohort_of
from fedsecure.methods.registry import load_training_method
from fedsecure.privacy.grid import from_grid, round_to_grid
from fedsecure.privacy.ledger import Ledger
from fedsecure.privacy.noise import SeededRng

SEED = 11


@pytest.mark.parametrize("adapter", ["linear", "facmic"])
def test_the_sum_of_a_run_is_the_central_sum(tmp_path: Path, adapter: str, monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(tmp_path, sites=4, rounds=3, adapter=adapter)
    world.start()
    seen: list[tuple[dict[str, Any], Aggregate]] = []
    absorb = Schedule.absorb

    def spying(self: Schedule, progress: Any, aggregate: Aggregate) -> Any:
        if progress.stage == "training":
            seen.append((dict(progress.state.tensors), aggregate))
        return absorb(self, progress, aggregate)

    monkeypatch.setattr(Schedule, "absorb", spying)
    world.run(*(world.take_part(name, simulation_seed=SEED) for name in world.names))
    assert not world.errors
    assert len(seen) == world.rounds

    settings = world.settings
    _, cohort = cohort_of(settings, trainers_only=True)
    method: Any = load_training_method(adapter)
    segment = method.segment(settings, cohort, method.plan(settings, cohort))
    assert segment.noise_variance > 0
    features = load_site_features(settings.encoder, CLASSES, file=world.features)
    task = method.task(settings, features)
    generators = {name: SeededRng(f"{SEED}/{name}".encode()) for name in world.names}
    units = {}
    for name in world.names:
        section = world.site_config(name).train
        assert section is not None
        with Ledger(tmp_path / name / "ledger.db") as ledger:
            assert {entry.reason for entry in ledger.history(section.name, "train")} == {"NO PRIVACY (seeded)", ""}
            units[name] = load_units(
                open_dataset(section, classes=CLASSES),
                features,
                cache=None,
                unit="record",
                cap=1,
                max_units=settings.sites[name].max_units,
                key=ledger.key,
            )
    for tensors, aggregate in seen:
        total = np.zeros(segment.length, np.int64)
        for name in world.names:
            values = clipped_sum(
                task, tensors, units[name], max_grad_norm=settings.privacy.max_grad_norm, engine="closed-form"
            )
            noise = generators[name].discrete_gaussian(segment.length, segment.noise_variance)
            total += round_to_grid(values, segment) + noise
        np.testing.assert_array_equal(aggregate.values["gradient"], from_grid(total, segment))
        assert aggregate.survivors == len(world.names)
