"""Prototypes and ridge: one release, one event, a linear adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from federation_world import CLASSES, World

from fedsecure.config import EncoderConfig, MethodConfig, PrivacyConfig, RunSettings, SiteEntry
from fedsecure.errors import ConfigError
from fedsecure.learning.artefact import load_adapter
from fedsecure.messages import Aggregate
from fedsecure.methods.cohorts import cohort_of
from fedsecure.methods.registry import load_training_method
from fedsecure.privacy.accounting import calibrate
from fedsecure.privacy.ledger import Ledger

METHODS = ["prototypes", "ridge"]


def settings_for(name: str, *, epsilon: float = 8.0, noise: str = "distributed", **method: Any) -> RunSettings:
    return RunSettings(
        classes=CLASSES,
        encoder=EncoderConfig(model="features", pretrained="file", dimension=16, fingerprint="0" * 64),
        method=MethodConfig(**{"name": name, "rounds": 1, **method}),
        privacy=PrivacyConfig(target_epsilon=epsilon, unit="record", noise=noise, minimum_signal_to_noise=0),
        sites={f"site-{i}": SiteEntry(max_units=200) for i in range(3)},
    )


@pytest.mark.slow
@pytest.mark.parametrize("noise", ["distributed", "local"])
@pytest.mark.parametrize("name", METHODS)
def test_a_federation_learns_in_one_release(tmp_path: Path, name: str, noise: str) -> None:
    """Real clients, masks, ledgers: at a large ε the tilted prior is mended, and the ledger holds one event.

    ε = 50 at δ = 1e-5 is a noise multiplier of 0.15 beside class sums of length 15 or more: the noise moves a logit by
    a hundredth of the classes' distance, so the outcome does not hang on it.
    """
    world = World(tmp_path, rounds=1, adapter=name, noise=noise, epsilon=50.0, max_epsilon=50.0,
                  privacy={"spare_attempts": 0})  # fmt: skip
    world.start()
    world.run(*(world.take_part(site) for site in world.names))
    assert not world.errors
    for site in world.names:
        report = world.reports[site]
        before, after = (report["outcome"]["evaluations"][stage]["accuracy"] for stage in ("before", "after"))
        assert after >= before
        with Ledger(tmp_path / site / "ledger.db") as ledger:
            (charge,) = [entry for entry in ledger.history() if entry.state == "RESERVED"]
            (event,) = charge.events
        assert event.sampling_rate == 1
        assert event.steps == 1
        assert event.noise_multiplier == pytest.approx(calibrate(50.0, 1e-5, steps=1))
    (file,) = (tmp_path / world.names[0] / "state" / "runs").glob("*/adapter.safetensors")
    adapter = load_adapter(file)
    assert adapter.task.spec.kind == "linear"
    assert adapter.tensors["D"].any()


def absorbed(name: str, *, epsilon: float, noise: str, rng: np.random.Generator) -> Any:
    """The head after pure noise of the planned size, as though no site held a record."""
    settings = settings_for(name, epsilon=epsilon, noise=noise)
    _, cohort = cohort_of(settings, trainers_only=True)
    method: Any = load_training_method(name)
    state = method.start(settings, cohort)
    std = method.plan(settings, cohort).sum_noise_multiplier * settings.privacy.max_grad_norm
    values = std * rng.normal(size=method.layout(settings).length)
    aggregate = Aggregate(values={"statistics": values}, survivors=3)
    return method.absorb(settings, cohort, state, aggregate), method.temperature(settings, cohort)


@pytest.mark.parametrize("noise", ["distributed", "local"])
@pytest.mark.parametrize("name", METHODS)
def test_without_signal_the_head_is_nothing_beside_zero_shot(name: str, noise: str) -> None:
    rng = np.random.default_rng(2)
    for epsilon in (1e-4, 1e-3, 1e-2):
        for _ in range(20):
            state, temperature = absorbed(name, epsilon=epsilon, noise=noise, rng=rng)
            rows = np.linalg.norm(state.tensors["D"], axis=1)
            assert rows.max() < 0.02 * temperature, "zero-shot rows have length τ or more"


@pytest.mark.parametrize("name", METHODS)
def test_it_asks_once(name: str) -> None:
    settings = settings_for(name)
    _, cohort = cohort_of(settings, trainers_only=True)
    method: Any = load_training_method(name)
    state = method.start(settings, cohort)
    first = method.ask(settings, cohort, state)
    assert [segment.name for segment in first.segments] == ["statistics"]
    assert len(first.events) == 1
    after, _ = absorbed(name, epsilon=8.0, noise="distributed", rng=np.random.default_rng(0))
    assert method.ask(settings, cohort, after) is None
    assert {key: value.shape for key, value in after.tensors.items()} == {"D": (len(CLASSES), 16)}


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("wrong", [{"rounds": 2}, {"learning_rate": 0.1}])
def test_settings_of_many_steps_are_refused(name: str, wrong: dict[str, Any]) -> None:
    settings = settings_for(name, **wrong)
    _, cohort = cohort_of(settings, trainers_only=True)
    with pytest.raises(ConfigError, match="FS-1014"):
        load_training_method(name).start(settings, cohort)


@pytest.mark.parametrize("name", METHODS)
def test_the_ring_of_16_bits_is_refused_and_not_ignored(name: str) -> None:
    settings = settings_for(name)
    _, cohort = cohort_of(settings, trainers_only=True)
    narrow = settings.model_copy(update={"privacy": settings.privacy.model_copy(update={"ring_bits": 16})})
    with pytest.raises(ConfigError, match="FS-1014") as caught:
        load_training_method(name).start(narrow, cohort)
    assert "leave ring_bits out" in str(caught.value)
    load_training_method(name).start(settings, cohort)
