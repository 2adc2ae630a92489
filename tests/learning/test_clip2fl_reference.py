"""The published training and its baselines: averages, branches that leave the trunk alone, each method's own trait."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch

from fedsecure.errors import ModelError
from fedsecure.learning.baselines import FEDAVG, TRUNKS, TauNormalised, VirtualFeatures, ratio_weights
from fedsecure.learning.class_draws import ClassDraws
from fedsecure.learning.class_gradients import ClassGradients
from fedsecure.learning.classifier import Retraining, fresh_classifier
from fedsecure.learning.clip2fl_reference import (
    Branch,
    Records,
    Retrained,
    Schedule,
    Trunk,
    augmented,
    average,
    features_of,
    head_of,
    mean_gradients,
    predict,
    train,
)
from fedsecure.learning.distillation import Distillation, teacher_logits
from fedsecure.learning.federated_features import Matching, PrototypeContrast
from fedsecure.learning.students import Student, StudentSpec, build_student

C, D = 4, 12
TEXT = np.eye(C, D, dtype=np.float32)
SPEC = StudentSpec("features", C, inputs=D)
SCHEDULE = Schedule(rounds=3, online=3, epochs=2, batch=8, rate=0.05)
QUICK = {"each": 10, "matching": Matching(steps=40, rate=2.0), "retraining": Retraining(epochs=40)}


def records(counts: Sequence[int], seed: int, noise: float = 0.12) -> Records:
    generator = np.random.default_rng(seed)
    labels = np.repeat(np.arange(C), counts)
    values = (TEXT[labels] + noise * generator.standard_normal((len(labels), D))).astype(np.float32)
    return Records(torch.from_numpy(values), torch.from_numpy(labels), torch.from_numpy(teacher_logits(values, TEXT)))


def long_tailed() -> list[Records]:
    """Class 3 is at one site, with one record; class 2 at two."""
    return [records([40, 10, 3, 0], 1), records([30, 12, 2, 1], 2), records([35, 0, 0, 0], 3)]


TEST = records([100] * C, 9)


def parameters(student: Student) -> torch.Tensor:
    return torch.cat([value.detach().flatten() for value in student.parameters()])


def recall(found: np.ndarray[tuple[int], np.dtype[np.int64]], label: int) -> float:
    mine = TEST.labels.numpy() == label
    return float((found[mine] == label).mean())


def test_branches_leave_the_trunk_alone() -> None:
    trunk = TRUNKS["fedavg-distilled"]
    alone = train(trunk, SPEC, long_tailed(), schedule=SCHEDULE, seed=1)
    branches: tuple[Branch, ...] = (
        Retrained("creff", **QUICK),  # type: ignore[arg-type]
        Retrained("clip2fl", **QUICK, contrast=PrototypeContrast(), text=TEXT),  # type: ignore[arg-type]
        TauNormalised(),
        VirtualFeatures(),
    )
    watched = train(trunk, SPEC, long_tailed(), schedule=SCHEDULE, seed=1, branches=branches)
    assert torch.equal(parameters(alone), parameters(watched))


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(TRUNKS))
def test_every_trunk_learns_and_repeats_itself(name: str) -> None:
    schedule = replace(SCHEDULE, rounds=2)
    one, two = (
        train(TRUNKS[name], SPEC, long_tailed(), schedule=schedule, seed=0, public=records([5] * C, 7))
        for _ in range(2)
    )
    assert torch.equal(parameters(one), parameters(two))
    assert recall(predict(one, TEST.inputs), 0) > 0.9
    other = train(TRUNKS[name], SPEC, long_tailed(), schedule=schedule, seed=1, public=records([5] * C, 7))
    assert not torch.equal(parameters(one), parameters(other))


def test_a_rare_class_is_found_again_by_the_branches() -> None:
    sites = long_tailed()
    branches: tuple[Branch, ...] = (
        Retrained("creff", **QUICK),  # type: ignore[arg-type]
        Retrained("clip2fl", **QUICK, contrast=PrototypeContrast(0.001, reduction="sum"), text=TEXT),  # type: ignore[arg-type]
        VirtualFeatures(retraining=Retraining(epochs=60)),
    )
    student = train(FEDAVG, SPEC, sites, schedule=SCHEDULE, seed=0, branches=branches)
    plain = predict(student, TEST.inputs)
    for branch in branches:
        found = predict(student, TEST.inputs, classifier=branch.classifier(student, sites))
        assert recall(found, 3) > recall(plain, 3) + 0.2, branch.name
        assert (found == TEST.labels.numpy()).mean() > (plain == TEST.labels.numpy()).mean(), branch.name


@pytest.mark.parametrize("each", [1, 10])
def test_a_class_that_nobody_holds_costs_the_others_little(each: int) -> None:
    sites = [records([30, 20, 10, 0], 1), records([20, 0, 10, 0], 2)]
    student = train(FEDAVG, SPEC, sites, schedule=SCHEDULE, seed=0)
    branches: tuple[Branch, ...] = (
        Retrained("creff", **(QUICK | {"each": each})),  # type: ignore[arg-type]
        Retrained("clip2fl", **(QUICK | {"each": each}), contrast=PrototypeContrast(), text=TEXT),  # type: ignore[arg-type]
        VirtualFeatures(each=each, retraining=Retraining(epochs=40)),
    )
    for branch in branches:
        head = branch.classifier(student, sites)
        assert np.isfinite(head.weight).all(), branch.name
        found = predict(student, TEST.inputs, classifier=head)
        assert np.mean([recall(found, c) for c in range(3)]) > 0.6, branch.name


def test_the_side_branch_may_run_in_the_last_rounds_only() -> None:
    late = Retrained("creff", last=1, **QUICK)  # type: ignore[arg-type]
    train(FEDAVG, SPEC, long_tailed(), schedule=SCHEDULE, seed=0, branches=[late])
    assert len(late.moved) == 1
    # Without contrast nothing else than the matching moves the features.
    assert late.moved[0][0] > 0 == late.moved[0][1]


def test_every_round_is_shown_and_only_rounds_with_a_classifier_have_one() -> None:
    late, post, calibrated = Retrained("creff", last=1, **QUICK), TauNormalised(), VirtualFeatures()  # type: ignore[arg-type]
    shown: list[int] = []

    def look(round: int, student: Student) -> None:
        shown.append(round)
        assert not student.training
        assert (late.after(student) is not None) == (round == 2)
        assert post.after(student) is not None
        assert calibrated.after(student) is None

    branches: tuple[Branch, ...] = (late, post, calibrated)
    train(FEDAVG, SPEC, long_tailed(), schedule=SCHEDULE, seed=0, branches=branches, after=look)
    assert shown == [0, 1, 2]


def test_images_are_drawn_and_features_are_not() -> None:
    draws = ClassDraws(repeats=2, most=3)
    spec = StudentSpec("resnet8", 2, width=1, projection=8)
    generator = torch.Generator().manual_seed(0)
    labels = torch.tensor([0] * 6 + [1])
    site = Records(torch.rand((7, 3, 32, 32), generator=generator), labels, torch.zeros(7, 2))
    student, head = build_student(spec, seed=0).eval(), fresh_classifier(2, 8, seed=0)
    layout = ClassGradients(2, 8, rows="full")
    whole = mean_gradients(student, [site], head, layout)
    one, again, other = (mean_gradients(student, [site], head, layout, draws=draws, seed=seed) for seed in (1, 1, 2))
    np.testing.assert_array_equal(one, again)
    assert np.abs(one - other).max() > 1e-4 < np.abs(one - whole).max()
    # The mean over the draws, whatever their number.
    inputs, drawn = (torch.cat(column) for column in zip(*draws(site.inputs, labels, seed=1000), strict=True))
    assert drawn.tolist() == [0] * 6 + [1] * 2
    shown = Records(inputs, drawn, torch.zeros(len(drawn), 2))
    np.testing.assert_allclose(mean_gradients(student, [shown], head, layout), one)
    rows = records([6, 1, 1, 1], 0)
    small, flat = build_student(SPEC, seed=0), fresh_classifier(C, D, seed=0)
    drawn_rows = mean_gradients(small, [rows], flat, ClassGradients(C, D), draws=draws, seed=1)
    np.testing.assert_array_equal(drawn_rows, mean_gradients(small, [rows], flat, ClassGradients(C, D)))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", sorted(TRUNKS))
def test_training_is_where_the_records_are(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    images = Records(torch.rand((24, 3, 32, 32), generator=generator), torch.arange(24) % 2, torch.zeros(24, 2))
    spec, there = StudentSpec("resnet8", 2, width=1, projection=8), images.to(torch.device("cuda"))
    branches: tuple[Branch, ...] = (
        Retrained("creff", draws=ClassDraws(2, 3), **QUICK),  # type: ignore[arg-type]
        VirtualFeatures(),
    )
    schedule = replace(SCHEDULE, rounds=2, bfloat16=True)
    student = train(
        TRUNKS[name], spec, [there, there], schedule=schedule, seed=0, public=there, branches=branches
    )  # fmt: skip
    assert student.head.weight.is_cuda
    assert all(np.isfinite(branch.classifier(student, [there]).weight).all() for branch in branches)
    assert len(predict(student, there.inputs)) == 24


def test_features_may_begin_at_their_text() -> None:
    student = build_student(SPEC, seed=0)
    # No steps of matching: what the classifier learns is the texts alone.
    still = Retrained("clip2fl", each=10, matching=Matching(steps=0), text=TEXT, text_start=True)
    still.retraining, still.contrast = Retraining(epochs=40), PrototypeContrast(0.0)
    found = predict(student, TEST.inputs, classifier=still.classifier(student, long_tailed()))
    assert (found == TEST.labels.numpy()).mean() > 0.9


def test_averages_are_weighted_and_keep_counters() -> None:
    one, two = ({"w": torch.tensor([x]), "n": torch.tensor(5 + int(x))} for x in (1.0, 4.0))
    found = average([one, two], [2, 1])
    assert found["w"].item() == pytest.approx(2.0)
    assert found["n"].item() == 6


def test_fedprox_stays_near_the_model_it_was_given() -> None:
    def moved(proximal: float) -> float:
        schedule = replace(SCHEDULE, rounds=1)
        trunk = Trunk("fedprox", "", proximal=proximal)
        end = train(trunk, SPEC, long_tailed(), schedule=schedule, seed=0)
        return float((parameters(end) - parameters(build_student(SPEC, seed=0))).norm())

    assert moved(0.0) > moved(1.0) > moved(10.0)
    assert torch.equal(
        parameters(train(Trunk("a", ""), SPEC, long_tailed(), schedule=SCHEDULE, seed=0)),
        parameters(train(FEDAVG, SPEC, long_tailed(), schedule=SCHEDULE, seed=0)),
    )


def test_fedavgm_moves_on_with_its_momentum() -> None:
    one = train(FEDAVG, SPEC, long_tailed(), schedule=replace(SCHEDULE, rounds=1), seed=0)
    # The first step has no momentum yet.
    same = train(TRUNKS["fedavgm"], SPEC, long_tailed(), schedule=replace(SCHEDULE, rounds=1), seed=0)
    assert torch.allclose(parameters(one), parameters(same), atol=1e-6)
    start = parameters(build_student(SPEC, seed=0))
    plain, moved = (
        (parameters(train(TRUNKS[name], SPEC, long_tailed(), schedule=SCHEDULE, seed=0)) - start).norm()
        for name in ("fedavg", "fedavgm")
    )
    assert moved > 1.2 * plain


def test_feddf_brings_the_average_to_its_ensemble() -> None:
    public = records([20] * C, 5)
    finish = TRUNKS["feddf"].finish
    assert finish is not None
    trained = [build_student(SPEC, seed=seed) for seed in (1, 2, 3)]
    for one in trained:
        with torch.no_grad():
            one.head.weight.mul_(4)

    def apart(student: Student) -> float:
        with torch.no_grad():
            aims = torch.softmax(torch.stack([one(public.inputs)[1] for one in trained]).mean(0), -1)
            own = torch.log_softmax(student(public.inputs)[1], -1)
        return float((aims * (aims.log() - own)).sum(-1).mean())

    student = build_student(SPEC, seed=4)
    before = apart(student)
    finish(student, trained, public)
    assert apart(student) < 0.9 * before


def test_ratio_loss_weighs_the_rare_classes_up() -> None:
    student = train(FEDAVG, SPEC, long_tailed(), schedule=SCHEDULE, seed=0)
    weights = ratio_weights(student, records([20] * C, 5))
    assert weights.shape == (C,)
    assert bool((weights >= 1).all())
    assert weights[3] > weights[0]


def test_tau_norm() -> None:
    student = build_student(SPEC, seed=0)
    found = TauNormalised().classifier(student, [])
    assert np.linalg.norm(found.weight, axis=1) == pytest.approx(np.ones(C), rel=1e-5)
    assert TauNormalised(tau=0.0).classifier(student, []).weight == pytest.approx(head_of(student).weight)


def test_gradients_are_means_over_those_who_hold_a_class() -> None:
    student = build_student(SPEC, seed=0)
    sites, head, layout = long_tailed(), fresh_classifier(C, D, seed=0), ClassGradients(C, D, rows="full")
    found = mean_gradients(student, sites, head, layout)
    expected = np.zeros((2, C, D))
    for place, site in enumerate(sites[:2]):
        mine = site.labels.numpy() == 2
        features = features_of(student, site.inputs)[mine]
        errors = head.probabilities(features) - np.eye(C)[2]
        expected[place] = errors.T @ features / mine.sum()
    assert found[2, :, :D] == pytest.approx(expected.mean(0), abs=1e-6)
    # One image of class 3 in the whole federation: row and bias give its feature away, so this is not private.
    (feature,) = features_of(student, sites[1].inputs)[sites[1].labels.numpy() == 3]
    assert found[3, 0, :D] / found[3, 0, D] == pytest.approx(feature, rel=1e-5)
    assert not mean_gradients(student, sites[2:], head, layout)[1:].any()


def test_one_round_at_width_four() -> None:
    generator = np.random.default_rng(0)
    spec = StudentSpec("resnet8", C)
    sites = [
        Records(
            torch.from_numpy(generator.standard_normal((n, 3, 32, 32), dtype=np.float32)),
            torch.from_numpy(generator.integers(0, C, n)),
            torch.from_numpy(generator.standard_normal((n, C), dtype=np.float32)),
        )
        for n in (5, 0, 4)
    ]
    branch = Retrained("clip2fl", last=1, each=2, retraining=Retraining(epochs=2), contrast=PrototypeContrast())
    branch.text = np.eye(C, 512, dtype=np.float32)
    trunk = Trunk("clip2fl", "", distillation=Distillation())
    schedule = Schedule(rounds=1, epochs=1, batch=4, rate=0.01)
    student = train(trunk, spec, sites, schedule=schedule, seed=0, branches=[branch])
    assert int(student.get_buffer("norm.num_batches_tracked")) == 1
    found = predict(student, sites[0].inputs, classifier=branch.classifier(student, sites))
    assert found.shape == (5,)


def test_one_crop_and_one_coin_a_batch() -> None:
    images = torch.arange(2 * 3 * 6 * 6, dtype=torch.float32).reshape(2, 3, 6, 6) + 1
    seen = [augmented(images, torch.Generator().manual_seed(seed)) for seed in range(30)]
    assert all(one.shape == images.shape for one in seen)
    # The same crop for both images: their difference is the same wherever neither is padding.
    assert all(bool(((one[1] - one[0])[one[0] > 0] == 108).all()) for one in seen)
    assert len({one.sum().item() for one in seen}) > 5


def test_bad_input() -> None:
    def refused(act: Callable[[], object]) -> None:
        with pytest.raises(ModelError) as caught:
            act()
        assert caught.value.code == "FS-1694"

    refused(lambda: Schedule(rounds=0))
    refused(lambda: Schedule(rate=0.0))
    refused(lambda: train(FEDAVG, SPEC, [records([0] * C, 0)], schedule=SCHEDULE, seed=0))
    refused(lambda: train(FEDAVG, SPEC, long_tailed(), schedule=replace(SCHEDULE, rate=1e20), seed=0))
    refused(lambda: train(TRUNKS["feddf"], SPEC, long_tailed(), schedule=SCHEDULE, seed=0))


def test_bfloat16_trains_nearly_the_same_model() -> None:
    spec = StudentSpec("resnet8", 2, inputs=4, width=1, projection=4)
    labels = torch.arange(24) % 2
    noise = torch.randn(24, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    images = noise + labels[:, None, None, None]
    site = Records(images, labels, torch.zeros(24, 2))
    schedule = Schedule(rounds=1, online=1, epochs=1, batch=8, rate=0.05)
    first = parameters(build_student(spec, seed=1))
    full = parameters(train(FEDAVG, spec, [site], schedule=schedule, seed=1))
    half = parameters(train(FEDAVG, spec, [site], schedule=replace(schedule, bfloat16=True), seed=1))
    assert not torch.equal(full, half)
    # Rounding to 8 bits costs a few per cent of what three steps move.
    assert (half - full).norm() < 0.3 * (full - first).norm()
