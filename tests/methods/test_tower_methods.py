"""Learned prompts and low-rank branches as methods: whole private runs on images, and what becomes of the adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fedsecure.config import DatasetConfig, FederationConfig, PolicyConfig, RunSettings, SiteConfig, load
from fedsecure.data.phantoms import CLASSES, write_federation
from fedsecure.errors import EnvironmentProblem, ModelError
from fedsecure.learning.artefact import load_adapter
from fedsecure.learning.inference import evaluate_dataset, predict_images
from fedsecure.methods.agenda import starting_state
from fedsecure.methods.cohorts import cohort_of
from fedsecure.methods.constants import run_constants
from fedsecure.methods.registry import load_training_method
from fedsecure.simulation.memory import MemoryRun, run_in_memory
from fedsecure.simulation.scaffold import SitePlan, lay_out
from fedsecure.vision.encoder import Encoder, load_encoder

SITES = ("site_a", "site_b", "site_c")
PER_CLASS = 2


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return load_encoder("fedsecure-tiny", "bundled", device="cpu")


@pytest.fixture(scope="module")
def scans(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scans")
    write_federation(folder, sites=3, per_class=PER_CLASS, test_per_class=1, seed=1)
    return folder


def settings_of(frozen: Encoder, name: str, **changes: Any) -> RunSettings:
    many = PER_CLASS * len(CLASSES)
    pinned = {"model": "fedsecure-tiny", "dimension": frozen.dimension, "fingerprint": frozen.fingerprint}
    content: dict[str, Any] = {
        "classes": CLASSES,
        "encoder": {**pinned, **changes.pop("encoder", {})},
        "method": {"name": name, "rounds": 2, **changes.pop("method", {})},
        "privacy": {"unit": "record", "minimum_signal_to_noise": 0.0, **changes.pop("privacy", {})},
        "rounds": {"phase_seconds": 90.0, "silence_seconds": 60.0, "start_seconds": 90.0},
        "sites": {
            name: {"max_units": many, "evaluation_units": len(CLASSES), "evaluation_public": True} for name in SITES
        },
    }
    return RunSettings.model_validate({**content, **changes})


def whole_run(folder: Path, scans: Path, settings: RunSettings) -> tuple[MemoryRun, dict[str, SiteConfig]]:
    plans = {}
    for name in SITES:
        train = DatasetConfig(name=f"{name}-train", path=scans / name / "train")
        test = DatasetConfig(name=f"{name}-test", path=scans / name / "test", public=True)
        plans[name] = SitePlan(train=train, evaluation=test, policy=PolicyConfig(unit="record"))
    made = lay_out(folder, settings, sites=plans, listen="memory:0", hosts=("localhost",))
    sites = {name: load(path, SiteConfig) for name, path in made.sites.items()}
    return run_in_memory(load(made.federation, FederationConfig), sites, seed=None, watch=lambda *_: None), sites


@pytest.mark.parametrize(
    ("name", "noise"),
    [
        ("promptfl", "distributed"),
        pytest.param("promptfl", "local", marks=pytest.mark.slow),
        pytest.param("lora", "distributed", marks=pytest.mark.slow),
    ],
)
def test_a_whole_private_run_on_images(tmp_path: Path, scans: Path, encoder: Encoder, name: str, noise: str) -> None:
    if name == "lora":
        pytest.importorskip("peft")
    settings = settings_of(encoder, name, privacy={"noise": noise})
    ended, sites = whole_run(tmp_path / "federation", scans, settings)
    for report in ended.reports.values():
        assert all(0 <= report["accuracy"][stage]["accuracy"] <= 1 for stage in ("before", "after"))
        # What the ledger holds is what the plan said, to the event.
        _, cohort = cohort_of(settings, trainers_only=True)
        plan = load_training_method(name).plan(settings, cohort)
        assert report["epsilon"] == pytest.approx(plan.epsilon_expected, rel=1e-6)
    kept = [next(site.state.glob("runs/*/adapter.safetensors")) for site in sites.values()]
    adapter, *others = [load_adapter(file) for file in kept]
    for other in others:
        assert all(np.array_equal(other.tensors[key], value) for key, value in adapter.tensors.items())
    begun = starting_state(settings).tensors
    assert all(not np.array_equal(adapter.tensors[key], begun[key]) for key in begun), "every tensor was trained"
    image = next((scans / "site_a" / "test").rglob("*.png"))
    (answer,) = predict_images(kept[0], [image], device="cpu")
    assert answer["class"] in CLASSES
    assert sum(answer["probabilities"].values()) == pytest.approx(1.0)
    measured = [evaluate_dataset(kept[0], scans / site / "test", device="cpu") for site in SITES]
    # The federation counted the same images with the same adapter, before and after.
    for stage, key in (("before", "zero_shot"), ("after", "adapter")):
        counted = next(iter(ended.reports.values()))["accuracy"][stage]["accuracy"]
        assert np.mean([row[key]["accuracy"] for row in measured]) == pytest.approx(counted)
    features = encoder.encode_images([Image.open(image).convert("RGB")])
    if name == "promptfl":
        _, by_features = adapter.predict(features, fingerprint=encoder.fingerprint, device="cpu")
        assert by_features[0] == pytest.approx(list(answer["probabilities"].values()), abs=1e-6)
    else:
        with pytest.raises(ModelError, match="FS-1675"):
            adapter.predict(features, fingerprint=encoder.fingerprint)


def test_features_are_refused_before_anything_is_asked(tmp_path: Path, encoder: Encoder) -> None:
    for name in ("promptfl", "lora"):
        settings = settings_of(encoder, name, encoder={"model": "features", "pretrained": "file"})
        with pytest.raises(ModelError, match="FS-1671"):
            starting_state(settings)


def test_a_template_without_words_to_learn_is_refused_at_the_aggregator(encoder: Encoder) -> None:
    with pytest.raises(ModelError, match="FS-1673"):
        starting_state(settings_of(encoder, "promptfl", encoder={"prompt": "{}, a picture"}))
    short = starting_state(settings_of(encoder, "promptfl", encoder={"prompt": "scan of {}"}))
    assert short.tensors["context"].shape == (2, 64)


def test_a_site_that_cannot_train_it_is_refused_at_joining(encoder: Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ModelError, match="FS-1637"):
        run_constants(settings_of(encoder, "promptfl"), file=None, device="cpu", engine="closed-form")
    # The template's last letters belong to a token of the class name's own word.
    with pytest.raises(ModelError, match="FS-1673"):
        run_constants(settings_of(encoder, "promptfl", encoder={"prompt": "a pre{}"}), file=None, device="cpu")
    monkeypatch.setattr("fedsecure.extras.find_spec", lambda name: None)
    with pytest.raises(EnvironmentProblem, match=r"fedsecure\[lora\]"):
        run_constants(settings_of(encoder, "lora"), file=None, device="cpu")


def test_rates_are_their_own_and_vanish_with_the_signal(encoder: Encoder) -> None:
    for name in ("promptfl", "lora"):
        method: Any = load_training_method(name)
        ways = []
        for epsilon in (0.01, 8.0, 1e6):
            settings = settings_of(encoder, name, privacy={"target_epsilon": epsilon})
            _, cohort = cohort_of(settings, trainers_only=True)
            rate, _ = method.rate(settings, cohort)
            ways.append(rate * settings.privacy.max_grad_norm * settings.method.rounds)
        assert ways[0] < 0.05 * ways[1] < 0.05 * ways[2]
        assert ways[2] == pytest.approx(method.longest)
        chosen = settings_of(encoder, name, method={"learning_rate": 0.5, "temperature": 3.0})
        assert method.rate(chosen, cohort) == (0.5, 3.0)
