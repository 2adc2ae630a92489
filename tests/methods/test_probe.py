"""The linear probe: the linear head without its texts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from federation_world import World

from fedsecure import load_adapter
from fedsecure.learning.features import load_site_features
from fedsecure.methods.cohorts import cohort_of
from fedsecure.methods.linear import METHOD as LINEAR
from fedsecure.methods.probe import METHOD


@pytest.mark.slow
@pytest.mark.parametrize("noise", ["distributed", "local"])
def test_a_run_begins_at_chance_and_learns_without_texts(tmp_path: Path, noise: str) -> None:
    # At this ε a step's noise is some hundredths of its signal: what is learned does not hang on chance.
    world = World(tmp_path, adapter="probe", noise=noise, rounds=6, epsilon=300.0, max_epsilon=600.0)
    world.start()
    world.run(*(world.take_part(name) for name in world.names))
    assert not world.errors, world.errors
    outcome = world.coordinator.outcome
    assert outcome is not None
    evaluations = outcome["evaluations"]
    assert evaluations["before"]["balanced_accuracy"] == pytest.approx(1 / 3), "one class for everything"
    assert evaluations["after"]["accuracy"] > 0.8

    (run,) = (tmp_path / "site-1" / "state" / "runs").iterdir()
    kept = load_adapter(run / "adapter.safetensors")
    assert not kept.task.text.any()
    with np.load(world.features) as file:
        labels, _ = kept.predict(file["test_x"], fingerprint=kept.metadata.fingerprint)
        assert float(np.mean(labels == file["test_y"])) == pytest.approx(evaluations["after"]["accuracy"])


def test_price_and_layout_are_the_linear_heads(tmp_path: Path) -> None:
    world = World(tmp_path, adapter="probe")
    settings = world.settings
    _, cohort = cohort_of(settings, trainers_only=True)
    plans = [method.plan(settings, cohort) for method in (METHOD, LINEAR)]
    assert plans[0].round_events == plans[1].round_events
    assert METHOD.segment(settings, cohort, plans[0]) == LINEAR.segment(settings, cohort, plans[1])
    features = load_site_features(settings.encoder, settings.classes, file=world.features)
    assert features.text.any()
    assert not METHOD.task(settings, features).prior.any()
