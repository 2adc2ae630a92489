"""The released FACMIC training: shapes, losses, steps and averages as its specification counts them."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy, normalize

from fedsecure.errors import ModelError
from fedsecure.learning import reference
from fedsecure.learning.reference import FACMIC, FEDCLIP, ReferenceAttention, ReferenceRecipe, ReferenceSite

D, K = 16, 3


def site(count: int = 100, *, recipe: ReferenceRecipe, seed: int = 0, target: bool = True) -> ReferenceSite:
    generator = np.random.default_rng(seed)
    text = generator.standard_normal((K, D)).astype(np.float32)
    labels = generator.integers(0, K, count)
    features = (0.7 * text[labels] + generator.standard_normal((count, D))).astype(np.float32)
    return ReferenceSite(
        features=features,
        labels=labels.astype(np.int64),
        text=text,
        target=features[:64] if target else None,
        recipe=recipe,
        seed=seed,
    )


@pytest.mark.parametrize(("dimension", "count"), [(512, 526_336), (768, 1_182_720), (1024, 2_101_248)])
def test_trainable_parameters(dimension: int, count: int) -> None:
    module = ReferenceAttention(dimension, "batchnorm")
    assert sum(p.numel() for p in module.parameters()) == count
    tanh = ReferenceAttention(dimension, "tanh")
    assert sum(p.numel() for p in tanh.parameters()) == count - 2 * dimension


def test_what_travels_is_the_weights_and_the_running_statistics() -> None:
    values = reference.start(D, gate="batchnorm", seed=1)
    assert sum(value.size for value in values.values()) == 2 * D * D + 4 * D + 2 * D
    assert set(values) == {
        "hidden.weight", "hidden.bias", "norm.weight", "norm.bias", "norm.running_mean", "norm.running_var",
        "output.weight", "output.bias",
    }  # fmt: skip
    again = reference.tensors(reference.restored(values, gate="batchnorm"))
    assert all(np.array_equal(values[name], again[name]) for name in values)


def test_the_start_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    reference.start(D, gate="tanh", seed=1)
    assert torch.equal(torch.rand(1), expected)


def test_image_to_text_half_is_prior_adjusted_cross_entropy() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, K, (32,), generator=generator)
    text = normalize(torch.randn(K, D, generator=generator, dtype=torch.float64), dim=-1)
    adapted = normalize(torch.randn(32, D, generator=generator, dtype=torch.float64), dim=-1)
    counts = torch.bincount(labels, minlength=K).double()
    own = torch.arange(32)
    half = cross_entropy(20 * adapted @ text[labels].T, own, reduction="none")
    adjusted = cross_entropy(20 * adapted @ text.T + counts.log(), labels, reduction="none")
    assert torch.allclose(half, adjusted + counts[labels].log(), atol=1e-12)


def test_the_floor_of_the_loss_on_batches_like_the_brain_tumour_set() -> None:
    """Perfect features reach the mean of log n_y: about 2.17 nats at B = 32 with the data's class shares."""
    generator = np.random.default_rng(0)
    shares = np.array([1221, 1230, 596, 1195]) / 4242
    floors = [reference.contrastive_floor(list(generator.multinomial(32, shares))) for _ in range(2000)]
    assert np.mean(floors) == pytest.approx(2.17, abs=0.02)
    labels = torch.tensor([0] * 10 + [1] * 9 + [2] * 4 + [3] * 9)
    perfect = torch.eye(4, dtype=torch.float64)[labels]
    loss = reference.contrastive_loss(perfect, perfect, scale=100.0)
    assert float(loss) == pytest.approx(reference.contrastive_floor([10, 9, 4, 9]), abs=1e-9)


@pytest.mark.slow
def test_a_round_takes_its_steps_and_learns() -> None:
    trainer = site(recipe=ReferenceRecipe(rate=1e-3, scale=10.0))
    values = reference.start(D, gate="batchnorm", seed=0)
    first, before = trainer.train(values)
    for _ in range(3):
        first, after = trainer.train(first)
    assert after.contrastive < before.contrastive
    assert 0 < after.alignment < 5
    steps = trainer._moments["state"][0]["step"]
    assert float(steps) == 4 * 199, "Adam's state outlives the round"


def test_one_pass_where_steps_are_zero_and_fresh_moments_where_they_are_not_kept() -> None:
    trainer = site(recipe=ReferenceRecipe(steps=0, keeps_moments=False))
    values = reference.start(D, gate="batchnorm", seed=0)
    for _ in range(2):
        values, _ = trainer.train(values)
        assert float(trainer._moments["state"][0]["step"]) == 100 // 32


@pytest.mark.parametrize("target", ["raw", "adapted", "adapted-with-gradient"])
def test_target_features(target: reference.TargetFeature) -> None:
    """All three variants train; only the last lets the target's own features move the module."""
    moved = {}
    for variant in ("raw", target):
        trainer = site(recipe=ReferenceRecipe(steps=5, rate=1e-3, target=variant))
        moved[variant], _ = trainer.train(reference.start(D, gate="batchnorm", seed=0))
    same = np.array_equal(moved["raw"]["hidden.weight"], moved[target]["hidden.weight"])
    assert same == (target == "raw")


def test_fedclip_aligns_nothing() -> None:
    with_target, without = (
        site(recipe=FEDCLIP, target=given).train(reference.start(D, gate="tanh", seed=0)) for given in (True, False)
    )
    assert with_target[1].alignment == without[1].alignment == 0
    assert all(np.array_equal(with_target[0][name], without[0][name]) for name in without[0])


@pytest.mark.slow
def test_same_seed_same_round() -> None:
    values = reference.start(D, gate="batchnorm", seed=0)
    one, two = (site(recipe=FACMIC).train(values)[0] for _ in range(2))
    assert all(np.array_equal(one[name], two[name]) for name in one)


def test_the_average_weighs_by_full_batches() -> None:
    weights = [reference.batches_a_pass(count, 32) for count in (1179, 338, 759)]
    assert weights == [36, 10, 23]
    values = [{"w": np.full(2, number, np.float32)} for number in (1.0, 2.0, 4.0)]
    mean = reference.average(values, weights, previous=values[0])
    assert mean["w"] == pytest.approx((36 + 20 + 92) / 69)


@pytest.mark.slow
def test_prediction_uses_running_statistics() -> None:
    trainer = site(recipe=ReferenceRecipe(rate=2e-3, scale=10.0))
    values = reference.start(D, gate="batchnorm", seed=0)
    for _ in range(4):
        values, _ = trainer.train(values)
    labels = reference.predict(values, trainer.features, trainer.text, gate="batchnorm")
    one_by_one = [
        int(reference.predict(values, trainer.features[i : i + 1], trainer.text, gate="batchnorm")[0])
        for i in range(20)
    ]
    assert list(labels[:20]) == one_by_one
    assert np.mean(labels == trainer.labels) > 1 / K


def test_sites_that_cannot_fill_a_batch_are_refused() -> None:
    with pytest.raises(ModelError, match="FS-1663"):
        site(20, recipe=FACMIC).train(reference.start(D, gate="batchnorm", seed=0))
    with pytest.raises(ModelError, match="FS-1663"):
        reference.average([], [], previous={})


def test_foreign_tensors_and_recipes_are_refused() -> None:
    with pytest.raises(ModelError, match="FS-1632"):
        reference.restored(reference.start(D, gate="tanh", seed=0), gate="batchnorm")
    with pytest.raises(ModelError, match="FS-1632"):
        reference.restored({}, gate="tanh")
    with pytest.raises(ModelError, match="FS-1662"):
        ReferenceRecipe(rate=math.nan)
