"""``facmic.normalisation``: a whole run by the public target's statistics, which nobody sends, and its refusals."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save

from fedsecure.config import AlignmentConfig, MethodConfig, PolicyConfig, RunSettings
from fedsecure.data.loading import read_feature_header
from fedsecure.errors import ConfigError, ModelError
from fedsecure.learning.adapters import AdapterSpec
from fedsecure.learning.artefact import load_adapter
from fedsecure.learning.evaluation import predict
from fedsecure.learning.targets import read_target, write_target
from fedsecure.messages import Answer, SiteState
from fedsecure.methods.cohorts import cohort_of
from fedsecure.methods.constants import run_constants
from fedsecure.methods.facmic import Facmic, normalising
from fedsecure.methods.registry import load_training_method
from tests.federation_world import World

TARGET = "target.safetensors"


def world_of(folder: Path, normalisation: Any, *, noise: str = "distributed", alignment: Any = None) -> World:
    """Without noise to speak of, so that few rounds teach something; the target's images lie in a cone of their own."""
    steps, rounds = (4, 3) if noise == "local" else (1, 12)
    privacy = {"no_privacy": "a test"}
    world = World(folder, rounds=rounds, adapter="facmic", noise=noise, local_steps=steps, privacy=privacy)
    header = read_feature_header(world.features)
    rng = np.random.default_rng(9)
    rows = (rng.normal(size=header.dimension) + rng.normal(size=(20, header.dimension))).astype(np.float32)
    digest = write_target(folder / TARGET, rows, fingerprint=header.fingerprint)
    content = world.settings.model_dump()
    content["method"]["facmic"] = {"normalisation": normalisation}
    if normalisation == "public" or alignment:
        content["method"]["alignment"] = {"target": digest, **(alignment or {})}
    world.settings = RunSettings.model_validate(content)
    return world


def run(world: World) -> dict[str, Any]:
    files = {"target_file": world.folder / TARGET, "encoder_file": world.features}
    policy = PolicyConfig(max_epsilon=1e9, unit="record", no_privacy=True, min_noise_multiplier=1e-4)
    core = world.start()
    core.engine.config = core.config.model_copy(update=files)
    world.run(*(world.take_part(name, changes={**files, "policy": policy}) for name in world.names))
    assert not world.errors, world.errors
    assert core.outcome is not None
    assert core.outcome["complete"]
    return core.outcome


@pytest.mark.parametrize(
    ("normalisation", "noise"),
    [
        ("public", "distributed"),
        pytest.param("public", "local", marks=pytest.mark.slow),
        pytest.param("none", "distributed", marks=pytest.mark.slow),
    ],
)
def test_a_run_trains_and_site_aggregator_and_file_predict_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, normalisation: str, noise: str
) -> None:
    world = world_of(tmp_path, normalisation, noise=noise)
    sent: list[tuple[Answer, SiteState]] = []
    sound = Facmic.answer

    def kept(self: Facmic, *given: Any) -> tuple[Answer, SiteState]:
        sent.append(sound(self, *given))
        return sent[-1]

    monkeypatch.setattr(Facmic, "answer", kept)
    outcome = run(world)
    before, after = (outcome["evaluations"][when]["accuracy"] for when in ("before", "after"))
    assert after > before + 0.05

    # A gradient, or a change of the adapter, and no number beside it.
    width = AdapterSpec("facmic_plain", 16, 3).parameters
    name = "gradient" if noise == "distributed" else "change"
    assert len(sent) == 3 * world.rounds
    for answer, state in sent:
        assert {name: value.shape for name, value in answer.values.items()} == {name: (width,)}
        assert not state.tensors

    with np.load(world.features) as held:
        features, labels = held["test_x"], held["test_y"]
    method = load_training_method("facmic")
    constants = run_constants(world.settings, file=world.features, target=tmp_path / TARGET)
    last = load_file(sorted(tmp_path.glob("aggregator/runs/*/model-*.safetensors"))[-1])
    own = {name: last[name] for name in AdapterSpec("facmic_plain", 16, 3).shapes}
    found, probabilities = predict(method.task(world.settings, constants), own, features, device="cpu")
    assert float((found == labels).mean()) == pytest.approx(after, abs=1e-9)
    files = list(tmp_path.glob("site-*/state/runs/*/adapter.safetensors"))
    assert len(files) == 3
    for file in files:
        told, there = load_adapter(file).predict(features, fingerprint=constants.fingerprint, device="cpu")
        np.testing.assert_array_equal(told, found)
        np.testing.assert_allclose(there, probabilities, atol=1e-5)


@pytest.mark.slow
def test_an_aligned_run_is_normalised_wherever_it_aligns(tmp_path: Path) -> None:
    """The aggregator's own steps take the target's statistics too."""
    for at in ("sites", "aggregator"):
        (tmp_path / at).mkdir()
        outcome = run(world_of(tmp_path / at, "public", alignment={"weight": 1.0, "prototypes": True, "at": at}))
        scores = {when: outcome["evaluations"][when]["accuracy"] for when in ("before", "after")}
        assert scores["after"] > scores["before"]


def test_the_price_and_the_size_are_those_of_layer_norm(tmp_path: Path) -> None:
    plans, segments = [], []
    for normalisation in ("layer", "public", "none"):
        (tmp_path / normalisation).mkdir()
        settings = world_of(tmp_path / normalisation, normalisation).settings
        _, cohort = cohort_of(settings, trainers_only=True)
        method: Any = load_training_method("facmic")
        plans.append(method.plan(settings, cohort))
        ask = method.ask(settings, cohort, method.start(settings, cohort))
        segments.append((ask.segments, ask.events, {n: v.tobytes() for n, v in ask.inputs.items()}))
    assert plans[0] == plans[1] == plans[2]
    assert segments[0] == segments[1] == segments[2]


def test_other_settings_keep_their_hash(tmp_path: Path) -> None:
    """What is not chosen is not written out, so a release without this setting agrees on the settings."""
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    plain, public = world_of(tmp_path / "a", "layer").settings, world_of(tmp_path / "b", "public").settings
    assert "facmic" not in json.loads(plain.canonical())["method"]
    assert json.loads(public.canonical())["method"]["facmic"] == {"normalisation": "public"}
    for settings in (plain, public):
        assert RunSettings.parse(settings.canonical()) == settings
        assert RunSettings.parse(settings.canonical()).digest() == settings.digest()


# --- bad input --------------------------------------------------------------------------------------------------------


def test_public_statistics_need_a_target(tmp_path: Path) -> None:
    settings = world_of(tmp_path, "public").settings
    _, cohort = cohort_of(settings, trainers_only=True)
    bare = settings.method.model_copy(update={"alignment": AlignmentConfig()})
    with pytest.raises(ConfigError, match="FS-1023"):
        load_training_method("facmic").plan(settings.model_copy(update={"method": bare}), cohort)
    with pytest.raises(ValueError, match="normalisation"):
        MethodConfig.model_validate({"name": "facmic", "facmic": {"normalisation": "batch"}})


@pytest.mark.parametrize("at", ["sites", "aggregator"])
def test_a_site_without_the_target_cannot_take_part(tmp_path: Path, at: str) -> None:
    """Also where only the aggregator aligns: training and prediction need the statistics."""
    world = world_of(tmp_path, "public", alignment={"weight": 1.0, "prototypes": True, "at": at})
    with pytest.raises(ModelError, match="FS-1676"):
        run_constants(world.settings, file=world.features, target=None)


def test_one_image_has_no_variance(tmp_path: Path) -> None:
    rows, file = np.ones((1, 5), np.float32), tmp_path / TARGET
    with pytest.raises(ModelError, match="FS-1676"):
        write_target(file, rows, fingerprint="ab" * 32)
    raw = save({"features": rows}, metadata={"format": "fedsecure-target/1", "encoder": "ab" * 32})
    file.write_bytes(raw)
    with pytest.raises(ModelError, match=r"FS-1676.*two rows or more"):
        read_target(file, digest=hashlib.sha256(raw).hexdigest(), fingerprint="ab" * 32, dimension=5)


def test_of_a_large_target_a_fixed_part_normalises() -> None:
    rows = np.arange(3 * 1000, dtype=np.float32).reshape(1000, 3)
    chosen = normalising(rows)
    assert chosen.shape == (256, 3)
    assert chosen[[0, -1], 0].tolist() == [0, 2997]
    assert set(np.diff(chosen[:, 0]) / 3) <= {3, 4}
    assert np.array_equal(normalising(rows[:256]), rows[:256])
