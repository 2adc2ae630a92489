"""The students of CLIP2FL inside a private federation: features that distillation shapes, and small images."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch.nn import functional

from fedsecure.config import Clip2flConfig, RunSettings
from fedsecure.data.phantoms import CLASSES as SCANS
from fedsecure.data.phantoms import write_federation
from fedsecure.errors import ConfigError, ModelError
from fedsecure.learning.artefact import load_adapter
from fedsecure.learning.engines import clipped_sum
from fedsecure.learning.evaluation import predict
from fedsecure.learning.features import SiteFeatures, load_site_features
from fedsecure.learning.inference import evaluate_dataset, predict_images
from fedsecure.learning.objective import TEACHER_SCALE, Distillation
from fedsecure.learning.student_module import resnet8_task, student_features
from fedsecure.learning.student_spec import PIXELS, resnet8_spec
from fedsecure.learning.students import StudentSpec, initial
from fedsecure.learning.task import HeadTask
from fedsecure.learning.thumbnails import ThumbnailRows
from fedsecure.learning.units import UnitFeatures
from fedsecure.messages import Aggregate
from fedsecure.methods.agenda import starting_state
from fedsecure.methods.clip2fl import METHOD
from fedsecure.methods.clip2fl_students import STUDENTS
from fedsecure.methods.cohorts import cohort_of
from fedsecure.methods.constants import run_constants
from fedsecure.privacy import accounting
from fedsecure.vision.encoder import Encoder, load_encoder
from tests.federation_world import World
from tests.methods.test_clip2fl import SMALL, features_of, run_whole, some_units, trajectory, world_of
from tests.methods.test_tower_methods import SITES, settings_of, whole_run

D, K = 12, 3
ON_FEATURES = {"student": "features"}


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return load_encoder("fedsecure-tiny", "bundled", device="cpu")


# --- on features ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("noise", "options"),
    [("distributed", {"releases": 2}), ("local", {"local_steps": 2, "budget_share": 0.3})],
)
def test_a_whole_run_shapes_the_features_and_ends_with_the_retrained_classifier(
    tmp_path: Path, noise: str, options: dict[str, Any]
) -> None:
    # At this ε a step's noise is some hundredths of its signal: what is learned does not hang on chance.
    world = world_of(tmp_path, noise=noise, rounds=4, epsilon=300.0, max_epsilon=600.0, **ON_FEATURES, **options)
    outcome = run_whole(world)
    assert outcome["complete"], outcome
    before, after = (outcome["evaluations"][stage]["accuracy"] for stage in ("before", "after"))
    assert after > before
    features = features_of(world)
    for name in world.names:
        report = world.reports[name]
        _, cohort = cohort_of(world.settings, trainers_only=True)
        assert report["epsilon"] == pytest.approx(
            accounting.epsilon(METHOD.plan(world.settings, cohort).events_of(4), delta=1e-5)
        )
        (run,) = (world.folder / name / "state" / "runs").iterdir()
    kept = load_adapter(run / "adapter.safetensors")
    assert {name: value.shape for name, value in kept.tensors.items()} == {"A": (16, 16), "b": (16,), "D": (3, 16)}
    assert all(value.any() for value in kept.tensors.values())
    # Before it is zero-shot CLIP, after it is the file that a site keeps: what was counted is the student itself.
    with np.load(world.features) as held:
        rows, labels = held["test_x"], held["test_y"]
    zero_shot, _ = predict(METHOD.head(world.settings, features), {"D": np.zeros((3, 16))}, rows, device="cpu")
    found, _ = kept.predict(rows, fingerprint=features.fingerprint, device="cpu")
    assert np.mean(zero_shot == labels) == pytest.approx(before)
    assert np.mean(found == labels) == pytest.approx(after)


def branches(folder: Path, student: dict[str, Any], units: UnitFeatures) -> dict[int, Any]:
    """What a run is without the branch, with one release and with a release in every round: same noise, same rate."""
    runs = {}
    for releases in (0, 1, 4):
        (own := folder / str(releases)).mkdir()
        world = world_of(own, rounds=4, releases=releases, privacy={"noise_multiplier": 5.0}, **student)
        method = world.settings.method.model_copy(update={"learning_rate": 0.2, "temperature": 10.0})
        world.settings = world.settings.model_copy(update={"method": method})
        runs[releases] = seen(world, units)
    return runs


def seen(world: World, units: UnitFeatures) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The student that is broadcast in each round, and the tensors at the end."""
    names, broadcast, ask = tuple(METHOD.spec(world.settings).shapes), [], METHOD.ask

    def watched(self: Any, settings: RunSettings, cohort: Any, state: Any) -> Any:
        asked = ask(settings, cohort, state)
        if asked is not None:
            broadcast.append({name: asked.inputs[name] for name in names})
        return asked

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(METHOD), "ask", watched)
        _, final = trajectory(world, units, rounds=4)
    return broadcast, final


def test_training_is_the_same_with_the_branch_on_or_off(tmp_path: Path) -> None:
    runs = branches(tmp_path, ON_FEATURES, some_units(1))
    off, plain = runs[0]
    for releases in (1, 4):
        on, final = runs[releases]
        for ours, theirs in zip(on, off, strict=True):
            assert all(np.array_equal(ours[name], theirs[name]) for name in ("A", "b", "D"))
        assert set(final) == {"A", "b", "D"}
        assert np.array_equal(final["A"], plain["A"])
        assert np.array_equal(final["b"], plain["b"])
        assert not np.allclose(final["D"], plain["D"])
    assert not np.array_equal(off[0]["A"], off[-1]["A"])


def moved(spec: Any, seed: int) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    return {name: value + 0.1 * rng.normal(size=value.shape) for name, value in spec.initial(b"start").items()}


@pytest.mark.parametrize("rows", ["diagonal", "full"])
def test_class_gradients_are_those_of_a_classifier_on_the_students_features(tmp_path: Path, rows: str) -> None:
    world = world_of(tmp_path, class_gradients=rows, clip_norm=1e9, **ON_FEATURES)
    settings, features, units = world.settings, features_of(world), some_units(4)
    tensors = moved(METHOD.spec(settings), 5)
    weight = 0.2 * np.random.default_rng(6).normal(size=(3, 16))
    found = METHOD.class_gradients(settings, features, {**tensors, "classifier": weight}, units)
    x = math.sqrt(16) * functional.normalize(torch.from_numpy(units.features[:, 0]).double(), dim=-1)
    z = x + x @ torch.from_numpy(tensors["A"]).T + torch.from_numpy(tensors["b"])
    labels = torch.from_numpy(units.labels[:, 0])
    for c in range(3):
        held = torch.from_numpy(weight).requires_grad_()
        mine = labels == c
        functional.cross_entropy(z[mine] @ held.T, labels[mine], reduction="sum").backward()
        gradient = cast(Any, held.grad).numpy() / math.sqrt(16)
        expected = gradient if rows == "full" else gradient[c : c + 1]
        assert found.reshape(3, -1, 16)[c] == pytest.approx(expected, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("labels", [[0] * 30 + [1] * 29, [0] * 30 + [1] * 29 + [2]])
@pytest.mark.parametrize("features", [1, 5])
def test_classes_held_by_nobody_or_by_one_record(tmp_path: Path, labels: list[int], features: int) -> None:
    world = world_of(tmp_path, rounds=1, features=features, privacy={"no_privacy": "a test"}, **ON_FEATURES)
    _, final = trajectory(world, some_units(2, labels=np.array(labels)), rounds=1)
    assert all(np.isfinite(value).all() for value in final.values())


def test_the_result_classifies_features_as_the_retrained_classifier_does(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    from fedsecure.learning.classifier import Classifier

    weight = rng.normal(size=(3, 16)).astype(np.float32)
    for name in ("linear", "features"):
        (folder := tmp_path / name).mkdir()
        world = world_of(folder, student=name)
        features, settings = features_of(world), world.settings
        head, student = METHOD.head(settings, features), STUDENTS[name]
        tensors = {**moved(METHOD.spec(settings), 5), "D": student.residual(Classifier(weight), head)}
        units = some_units(7)
        task = METHOD.task(settings, features)
        z = student.rows(task, tensors, units)[:, 0] * student.scale(16)
        expected = torch.softmax(torch.from_numpy(z @ weight.T), dim=-1).numpy()
        _, found = predict(task, tensors, units.features[:, 0], device="cpu")
        assert found == pytest.approx(expected, abs=1e-4)


# --- on images --------------------------------------------------------------------------------------------------------


def small(width: int = 1) -> tuple[Any, HeadTask]:
    from fedsecure.learning.adapters import AdapterSpec

    rng = np.random.default_rng(1)
    head = HeadTask(
        AdapterSpec("linear", D, K), rng.normal(size=(K, D)).astype(np.float32), np.zeros(D, np.float32), 10.0
    )
    return resnet8_spec(classes=K, dimension=D, width=width), head


def images(count: int, records: int = 1) -> UnitFeatures:
    rng = np.random.default_rng(3)
    rows = rng.normal(size=(count, records, PIXELS + D)).astype(np.float32)
    return UnitFeatures(rows, rng.integers(0, K, (count, records)), np.ones((count, records), bool))


@pytest.mark.parametrize("width", [1, 4])
def test_an_aggregator_knows_the_network_without_torch(width: int) -> None:
    spec = resnet8_spec(classes=10, dimension=512, width=width)
    module = initial(StudentSpec("resnet8", 10, width=width, norm="group", projection=512), seed=0)
    below = {name: value.shape for name, value in module.items() if not name.startswith("head.")}
    assert list(spec.shapes.items()) == [*below.items(), ("D", (10, 512))]
    begun, again, other = spec.initial(b"a"), spec.initial(b"a"), spec.initial(b"b")
    assert all(np.array_equal(begun[name], again[name]) for name in begun)
    assert not np.array_equal(begun["conv.weight"], other["conv.weight"])
    # The spread of every tensor is the module's own, whatever the distribution; 6 standard errors of the larger ones.
    for name, value in module.items():
        if not name.startswith(("head.", "projection.bias")):
            assert begun[name].std() == pytest.approx(value.std(), rel=6 / math.sqrt(value.size) + 1e-9), name
            assert begun[name].mean() == pytest.approx(value.mean(), abs=float(6 * value.std() / math.sqrt(value.size)))
    assert not begun["D"].any()


@pytest.mark.slow
@pytest.mark.parametrize("taught", [None, Distillation(0.5, 3.0)])
def test_a_private_step_clips_each_image_by_itself(taught: Distillation | None) -> None:
    spec, head = small()
    tensors, units = moved(spec, 2), images(3)
    text = functional.normalize(torch.from_numpy(head.text).double(), dim=-1)
    expected, lengths = np.zeros(spec.parameters), []
    for row in range(3):
        student: Any = resnet8_task(spec, head=head).build(tensors)
        logits = student(torch.from_numpy(units.features[row]).double())
        labels = torch.from_numpy(units.labels[row])
        loss = functional.cross_entropy(logits, labels)
        if taught is not None:
            feature = functional.normalize(torch.from_numpy(units.features[row][:, PIXELS:]).double(), dim=-1)
            soft = torch.softmax(TEACHER_SCALE * feature @ text.T / 3, -1)
            loss = loss + 0.5 * 9 * functional.kl_div(torch.log_softmax(logits / 3, -1), soft, reduction="batchmean")
        loss.backward()
        gradient = np.concatenate([p.grad.flatten().numpy() for p in student.parameters()])
        lengths.append(np.linalg.norm(gradient))
        expected += gradient * min(1.0, 0.5 * (1 - 1e-5) / lengths[-1])
    assert max(lengths) > 0.5
    task = resnet8_task(spec, head=head, taught=taught)
    found = clipped_sum(replace(task, single=False), tensors, units, max_grad_norm=0.5, device="cpu")
    assert found == pytest.approx(expected, rel=1e-6, abs=1e-9)
    # In float32, gradients held one by one, it is the same vector but for that rounding.
    found = clipped_sum(task, tensors, units, max_grad_norm=0.5, device="cpu")
    assert np.linalg.norm(found - expected) < 1e-4 * np.linalg.norm(expected)


def test_one_image_moves_step_and_class_gradients_by_at_most_their_bound(encoder: Encoder) -> None:
    settings = image_settings(encoder)
    features = run_constants(settings, file=None, device="cpu")
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(5, 1, PIXELS + encoder.dimension)).astype(np.float32)
    rows[1] *= 1e4
    units = UnitFeatures(rows, rng.integers(0, len(SCANS), (5, 1)), np.ones((5, 1), bool))
    tensors: dict[str, Any] = {**starting_state(settings).tensors}
    inputs = {**tensors, "classifier": 0.1 * rng.normal(size=(len(SCANS), encoder.dimension))}
    task = resnet8_task(cast(Any, METHOD.spec(settings)), head=METHOD.head(settings, features), taught=Distillation())
    whole = METHOD.class_gradients(settings, features, inputs, units)
    step = clipped_sum(task, tensors, units, max_grad_norm=0.1, device="cpu")
    for row in range(3):
        others = units.select(np.arange(5) != row)
        assert np.linalg.norm(whole - METHOD.class_gradients(settings, features, inputs, others)) <= 1.0
        assert np.linalg.norm(step - clipped_sum(task, tensors, others, max_grad_norm=0.1, device="cpu")) <= 0.1
    z = student_features(METHOD.task(settings, features), tensors, units)
    assert z.shape == (5, 1, encoder.dimension)


def test_units_of_several_images_are_refused() -> None:
    spec, head = small()
    with pytest.raises(ModelError, match="FS-1693"):
        clipped_sum(resnet8_task(spec, head=head), spec.initial(b""), images(2, 2), max_grad_norm=1.0, device="cpu")


def image_settings(frozen: Encoder, *, noise: str = "distributed", **changes: Any) -> RunSettings:
    options = {"student": "resnet8", "width": 1, **SMALL, **changes.pop("clip2fl", {})}
    method = {"rounds": 1, "clip2fl": Clip2flConfig(**options).model_dump(), **changes.pop("method", {})}
    privacy = {"noise": noise, **changes.pop("privacy", {})}
    return settings_of(frozen, "clip2fl", method=method, privacy=privacy, **changes)


@pytest.mark.slow
@pytest.mark.parametrize("noise", ["distributed", pytest.param("local", marks=pytest.mark.slow)])
def test_a_whole_private_run_on_images(tmp_path: Path, encoder: Encoder, noise: str) -> None:
    write_federation(scans := tmp_path / "scans", sites=3, per_class=2, test_per_class=1, seed=1)
    settings = image_settings(encoder, noise=noise)
    ended, sites = whole_run(tmp_path / "federation", scans, settings)
    _, cohort = cohort_of(settings, trainers_only=True)
    plan = METHOD.plan(settings, cohort)
    for report in ended.reports.values():
        assert report["epsilon"] == pytest.approx(plan.epsilon_expected, rel=1e-6)
        purposes = {row["purpose"] for row in report["budgets"]["train"]["shares"]["purposes"]}
        assert purposes == {"training", "class gradients"}
    kept = [next(site.state.glob("runs/*/adapter.safetensors")) for site in sites.values()]
    adapter, other = load_adapter(kept[0]), load_adapter(kept[1])
    assert all(np.array_equal(other.tensors[name], value) for name, value in adapter.tensors.items())
    begun = starting_state(settings).tensors
    assert all(not np.array_equal(adapter.tensors[name], begun[name]) for name in begun), "every tensor was trained"
    # The federation counted the same images with the student that the file holds.
    measured = [evaluate_dataset(kept[0], scans / site / "test", device="cpu") for site in SITES]
    counted = next(iter(ended.reports.values()))["accuracy"]
    assert np.mean([row["adapter"]["accuracy"] for row in measured]) == pytest.approx(counted["after"]["accuracy"])
    image = next((scans / "site_a" / "test").rglob("*.png"))
    (answer,) = predict_images(kept[0], [image], device="cpu")
    assert sum(answer["probabilities"].values()) == pytest.approx(1.0)
    with pytest.raises(ModelError, match="FS-1675"):
        adapter.predict(np.zeros((1, encoder.dimension)), fingerprint=encoder.fingerprint)


def test_rows_are_small_images_with_clips_feature_behind_them_and_are_kept(encoder: Encoder) -> None:
    from PIL import Image

    rng = np.random.default_rng(0)
    shown = [Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)) for _ in range(2)]
    rows = ThumbnailRows(encoder).encode_images([*shown, shown[0].resize((64, 64)).convert("L")])
    assert rows.shape == (3, PIXELS + encoder.dimension)
    assert rows[:2, PIXELS:] == pytest.approx(encoder.encode_images(shown), abs=1e-5)
    red = (np.asarray(shown[0], np.float64)[:, :, 0] / 255 - 0.4914) / 0.2023
    assert rows[0, : 32 * 32].reshape(32, 32) == pytest.approx(red, abs=1e-5)
    assert ThumbnailRows.cached


def test_training_on_images_does_not_notice_the_branch(tmp_path: Path, encoder: Encoder) -> None:
    rng = np.random.default_rng(2)
    rows = rng.normal(size=(4, 1, PIXELS + encoder.dimension)).astype(np.float32)
    units = UnitFeatures(rows, rng.integers(0, len(SCANS), (4, 1)), np.ones((4, 1), bool))
    ends = []
    for releases in (0, 1):
        settings = image_settings(
            encoder,
            clip2fl={"releases": releases},
            method={"learning_rate": 1.0},
            privacy={"noise_multiplier": 5.0},
        )
        features = run_constants(settings, file=None, device="cpu")
        ends.append(step_of(settings, features, units))
    assert all(np.array_equal(value, ends[1][name]) for name, value in ends[0].items() if name != "D")
    assert not np.array_equal(ends[0]["D"], ends[1]["D"])


def step_of(settings: RunSettings, features: SiteFeatures, units: UnitFeatures) -> dict[str, Any]:
    """The tensors after the one round of a run."""
    from tests.methods.test_clip2fl import _Train

    _, cohort = cohort_of(settings, trainers_only=True)
    state = METHOD.start(settings, cohort)
    ask = METHOD.ask(settings, cohort, state)
    assert ask is not None
    door = _Train(cast(Any, _Settings(settings)), features, units, SITES[0])
    door.engine = "auto"
    answer, _ = METHOD.answer(ask.inputs, state, door)  # type: ignore[arg-type]
    state = METHOD.absorb(settings, cohort, state, Aggregate(answer.values, 3))
    return dict((METHOD.compute(settings, state, features) if METHOD.due(settings, state) else state).tensors)


class _Settings:
    def __init__(self, settings: RunSettings) -> None:
        self.settings = settings


def test_the_networks_step_has_a_longest_and_vanishes_with_the_signal(encoder: Encoder) -> None:
    steps = []
    for epsilon in (0.01, 8.0, 1e6):
        settings = image_settings(encoder, privacy={"target_epsilon": epsilon}, method={"rounds": 3})
        _, cohort = cohort_of(settings, trainers_only=True)
        rate, _ = METHOD.rate(settings, cohort)
        steps.append(rate * settings.privacy.max_grad_norm)
    assert steps[0] < 0.05 * steps[1] < 0.05 * steps[2]
    assert steps[2] == pytest.approx(0.4)


def test_one_record_moves_class_gradients_by_at_most_their_bound(tmp_path: Path) -> None:
    world = world_of(tmp_path, clip_norm=0.5, **ON_FEATURES)
    settings, features, units = world.settings, features_of(world), some_units(8)
    inputs = {**moved(METHOD.spec(settings), 5), "classifier": np.random.default_rng(6).normal(size=(3, 16))}
    whole, apart = METHOD.class_gradients(settings, features, inputs, units), []
    for row in range(10):
        others = units.select(np.arange(len(units)) != row)
        apart.append(np.linalg.norm(whole - METHOD.class_gradients(settings, features, inputs, others)))
    assert max(apart) <= 0.5
    # Most are clipped, so that a clip twice as wide would fail above.
    assert max(apart) >= 0.5 * (1 - 1e-6)


@pytest.mark.parametrize(
    "changes",
    [
        {"encoder": {"model": "features", "pretrained": "file"}},
        {"privacy": {"unit": "patient", "max_records_per_unit": 2}},
        {"method": {"views": 2}},
    ],
)
def test_what_convolutions_cannot_train_on_is_refused_before_anything_is_asked(
    encoder: Encoder, changes: dict[str, Any]
) -> None:
    with pytest.raises(ConfigError, match="FS-1020"):
        starting_state(image_settings(encoder, **changes))


def test_the_closed_form_is_refused_for_a_network_at_joining(encoder: Encoder) -> None:
    with pytest.raises(ModelError, match="FS-1637"):
        run_constants(image_settings(encoder), file=None, device="cpu", engine="closed-form")


def test_a_student_of_another_width_is_refused(tmp_path: Path, encoder: Encoder) -> None:
    spec, head = small()
    with pytest.raises(ModelError, match="FS-1672"):
        resnet8_task(spec, head=head).build(small(2)[0].initial(b""))
    with pytest.raises(ModelError, match="FS-1638"):
        predict(resnet8_task(spec, head=head), spec.initial(b""), np.zeros((2, PIXELS)), device="cpu")
    world = world_of(tmp_path, **ON_FEATURES)
    with pytest.raises(ModelError, match="FS-1638"):
        load_site_features(
            world.settings.encoder.model_copy(update={"dimension": 8}), world.settings.classes, file=world.features
        )
