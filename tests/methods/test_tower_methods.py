"""Methods inside the towers: whole private runs on images, and what becomes of the adapter."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fedsecure.config import DatasetConfig, FederationConfig, PolicyConfig, RunSettings, SiteConfig, load
from fedsecure.data.loading import open_dataset
from fedsecure.data.phantoms import CLASSES, write_federation
from fedsecure.errors import ConfigError, EnvironmentProblem, ModelError
from fedsecure.learning.artefact import load_adapter
from fedsecure.learning.encoding import Encoded, encode_dataset
from fedsecure.learning.inference import evaluate_dataset, predict_images
from fedsecure.learning.units import UnitFeatures
from fedsecure.messages import SiteState
from fedsecure.methods.agenda import starting_state
from fedsecure.methods.cohorts import cohort_of
from fedsecure.methods.constants import run_constants
from fedsecure.methods.registry import load_training_method
from fedsecure.simulation.memory import MemoryRun, run_in_memory
from fedsecure.simulation.scaffold import SitePlan, lay_out
from fedsecure.vision.encoder import Encoder, load_encoder
from fedsecure.vision.tokens import TokenRows

SITES = ("site_a", "site_b", "site_c")
PER_CLASS = 2
BLOCKS = ("fedavg_block", "fedprox_block", "moon_block")


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


def whole_run(
    folder: Path, scans: Path, settings: RunSettings, **policy: Any
) -> tuple[MemoryRun, dict[str, SiteConfig]]:
    plans = {}
    for name in SITES:
        train = DatasetConfig(name=f"{name}-train", path=scans / name / "train")
        test = DatasetConfig(name=f"{name}-test", path=scans / name / "test", public=True)
        plans[name] = SitePlan(train=train, evaluation=test, policy=PolicyConfig(unit="record", **policy))
    made = lay_out(folder, settings, sites=plans, listen="memory:0", hosts=("localhost",))
    sites = {name: load(path, SiteConfig) for name, path in made.sites.items()}
    encoded: list[Encoded] = []
    ended = run_in_memory(
        load(made.federation, FederationConfig), sites, seed=None, watch=lambda *_: None, encoding=encoded.append
    )
    assert any(far.name == f"{min(SITES)}-train" and far.done == far.count for far in encoded)
    return ended, sites


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "noise"),
    [
        ("promptfl", "distributed"),
        pytest.param("promptfl", "local", marks=pytest.mark.slow),
        pytest.param("lora", "distributed", marks=pytest.mark.slow),
        pytest.param("fedavg_block", "local", marks=pytest.mark.slow),
        pytest.param("fedprox_block", "local", marks=pytest.mark.slow),
        ("moon_block", "local"),
    ],
)
def test_a_whole_private_run_on_images(tmp_path: Path, scans: Path, encoder: Encoder, name: str, noise: str) -> None:
    if name == "lora":
        pytest.importorskip("peft")
    steps = 2 if name in BLOCKS else 1
    settings = settings_of(encoder, name, method={"local_steps": steps}, privacy={"noise": noise})
    ended, sites = whole_run(tmp_path / "federation", scans, settings)
    for report in ended.reports.values():
        assert all(0 <= report["accuracy"][stage]["accuracy"] <= 1 for stage in ("before", "after"))
        # What the ledger holds is what the plan said, to the event.
        _, cohort = cohort_of(settings, trainers_only=True)
        plan = load_training_method(name).plan(settings, cohort)
        assert report["epsilon"] == pytest.approx(plan.epsilon_expected, rel=1e-6)
    kept = [next(site.state.glob("runs/*/adapter.safetensors")) for site in sites.values()]
    adapter, *others = [load_adapter(file) for file in kept]
    left = [list(site.state.glob(f"runs/*/{name}.safetensors")) for site in sites.values()]
    assert all(bool(files) == (name == "moon_block") for files in left), "only MOON keeps its last block, at the site"
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
    for name in ("promptfl", "lora", *BLOCKS):
        noise = {"noise": "local"} if name in BLOCKS else {}
        pinned = {"model": "features", "pretrained": "file"}
        settings = settings_of(encoder, name, encoder=pinned, privacy=noise)
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
    for name in ("promptfl", "lora", *BLOCKS):
        method: Any = load_training_method(name)
        how = {"noise": "local" if name in BLOCKS else "distributed"}
        ways = []
        for epsilon in (0.01, 8.0, 1e6):
            settings = settings_of(encoder, name, privacy={"target_epsilon": epsilon, **how})
            _, cohort = cohort_of(settings, trainers_only=True)
            rate, _ = method.rate(settings, cohort)
            ways.append(rate * settings.privacy.max_grad_norm * settings.method.rounds)
        assert ways[0] < 0.05 * ways[1] < 0.05 * ways[2]
        assert ways[2] == pytest.approx(method.longest)
        chosen = settings_of(encoder, name, method={"learning_rate": 0.5, "temperature": 3.0}, privacy=how)
        assert method.rate(chosen, cohort) == (0.5, 3.0)


def test_blocks_are_made_of_local_steps(encoder: Encoder) -> None:
    for name in BLOCKS:
        with pytest.raises(ConfigError, match="FS-1016"):
            starting_state(settings_of(encoder, name))


def test_more_tokens_than_a_site_holds_are_refused_before_anything_is_asked(encoder: Encoder) -> None:
    """ViT-B/32 has 153,600 bytes of tokens an image; 4 GiB hold 27,962 of them."""
    pinned = {"model": "ViT-B-32", "dimension": 512}

    def begun(train: int, evaluation: int, views: int, cap: int) -> None:
        entry = {"max_units": train, "evaluation_units": evaluation, "evaluation_public": True}
        settings = settings_of(
            encoder,
            "fedavg_block",
            encoder=pinned,
            method={"views": views},
            privacy={"noise": "local", "unit": "patient" if cap > 1 else "record", "max_records_per_unit": cap},
            sites={name: entry for name in SITES},
        )
        starting_state(settings)

    begun(27_000, 962, views=1, cap=1)
    begun(1_000, 990, views=6, cap=4)
    for train, evaluation, views, cap in ((27_000, 963, 1, 1), (14_000, 0, 2, 1), (1_000, 991, 6, 4)):
        with pytest.raises(ModelError, match="FS-1678"):
            begun(train, evaluation, views, cap)


def test_tokens_of_a_tower_in_training_mode_are_refused(scans: Path) -> None:
    other = load_encoder("fedsecure-tiny", "bundled", device="cpu")
    other.network.visual.transformer.resblocks[0].train()
    records = open_dataset(DatasetConfig(name="scans", path=scans / "site_a" / "train"), classes=CLASSES)
    with pytest.raises(ModelError, match="FS-1645"):
        encode_dataset(records, TokenRows(other), None)


class Bench:
    """The capability of a door without noise, over records that a test has made."""

    def __init__(self, settings: RunSettings, units: UnitFeatures) -> None:
        self.settings, self.site, self.device, self.engine = settings, SITES[0], "cpu", "auto"
        self.features, self._units = run_constants(settings, file=None, device="cpu"), units
        self.query = SimpleNamespace(cohort=tuple(settings.declared_units()))

    def units(self, population: str) -> UnitFeatures:
        return self._units

    def sample(self, count: int) -> Any:
        return np.ones(count, np.bool_)

    def privatise(self, total: Any, clip: float) -> Any:
        return total.copy()


def test_moon_goes_on_from_the_block_it_kept(encoder: Encoder) -> None:
    """Round by round, as a site that was stopped and started again with what it had kept: the same answer, and
    another one than from nothing."""
    rng = np.random.default_rng(0)
    answers = {}
    for name in ("fedavg_block", "moon_block"):
        settings = settings_of(encoder, name, method={"local_steps": 2}, privacy={"noise": "local"})
        method: Any = load_training_method(name)
        spec = method.spec(settings)
        rows = np.random.default_rng(1).normal(size=(4, 1, spec.dimension)).astype(np.float32)
        units = UnitFeatures(rows, np.arange(4)[:, None], np.ones((4, 1), np.bool_))
        start = starting_state(settings).tensors
        first, kept = method.answer(start, SiteState(), Bench(settings, units))
        if name == "fedavg_block":
            assert not kept.tensors
        else:
            own = spec.unflatten(len(SITES) * first.values["change"])
            # Its share of the sum is a third, and what it keeps is the whole way it went.
            assert all(np.allclose(kept.tensors[key], own[key], atol=1e-6) for key in own)
            # A previous block that is farther away, so that the contrast has something to say.
            far = SiteState({key: (0.1 * rng.normal(size=v.shape)).astype(np.float32) for key, v in own.items()})
            after, _ = method.answer(start, far, Bench(settings, units))
            again, _ = method.answer(start, SiteState(dict(far.tensors)), Bench(settings, units))
            assert np.array_equal(after.values["change"], again.values["change"])
            fresh = first.values["change"]
            assert np.linalg.norm(after.values["change"] - fresh) > 1e-3 * np.linalg.norm(fresh)
        answers[name] = first.values["change"]
    # Before it has a block of its own, MOON is FedAvg.
    assert np.array_equal(answers["fedavg_block"], answers["moon_block"])


@pytest.mark.slow
@pytest.mark.parametrize("name", BLOCKS)
def test_a_run_learns_from_shifted_scans_without_noise(tmp_path: Path, encoder: Encoder, name: str) -> None:
    """Three scanners that the encoder never saw; ε so large that the noise is a token."""
    folder = tmp_path / "shifted"
    write_federation(folder, sites=SITES, per_class=8, test_per_class=16, seed=3)
    entry = {"max_units": 32, "evaluation_units": 64, "evaluation_public": True}
    settings = settings_of(
        encoder,
        name,
        method={"rounds": 3, "local_steps": 3},
        privacy={"noise": "local", "target_epsilon": 1e5},
        sites={site: entry for site in SITES},
    )
    ended, _ = whole_run(tmp_path / "federation", folder, settings, max_epsilon=2e5, min_noise_multiplier=0.0)
    accuracy = next(iter(ended.reports.values()))["accuracy"]
    assert accuracy["after"]["accuracy"] > accuracy["before"]["accuracy"] + 0.05
