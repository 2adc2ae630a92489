"""Adapter sizes, starts and layouts; round 0 equals zero-shot; everything an aggregator needs runs without torch."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsecure.errors import ModelError
from fedsecure.learning.adapters import FORMS, AdapterSpec
from fedsecure.learning.evaluation import predict
from fedsecure.learning.task import HeadTask


@pytest.mark.parametrize(("d", "expected"), [(512, 526_336), (768, 1_182_720), (1024, 2_101_248)])
def test_facmic_has_the_published_number_of_parameters(d: int, expected: int) -> None:
    assert AdapterSpec("facmic", d, 4).parameters == expected


def test_fedclip_and_the_bottleneck_have_the_sizes_of_their_papers() -> None:
    assert AdapterSpec("fedclip", 512, 4).parameters == 525_312
    assert AdapterSpec("bottleneck", 512, 4).parameters == 2 * 64 * 512 + 64 + 512
    assert AdapterSpec("bottleneck", 16, 4).shapes["W1"] == (16, 16), "never wider than the features"


def test_linear_has_one_weight_a_class_and_feature() -> None:
    assert AdapterSpec("linear", 512, 101).parameters == 512 * 101


@given(kind=st.sampled_from(list(FORMS)), d=st.integers(2, 9), k=st.integers(2, 7), seed=st.binary(max_size=40))
@settings(max_examples=30, deadline=None)
def test_flatten_and_unflatten_are_inverse(kind: str, d: int, k: int, seed: bytes) -> None:
    spec = AdapterSpec(kind, d, k)  # type: ignore[arg-type]
    vector = np.random.default_rng(d * k).normal(size=spec.parameters).astype(np.float32)
    tensors = spec.unflatten(vector.astype(np.float64))
    assert list(tensors) == list(spec.shapes)
    assert np.array_equal(spec.flatten(tensors), vector)
    start = spec.initial(seed)
    assert {name: value.shape for name, value in start.items()} == dict(spec.shapes)
    assert all(value.dtype == np.float32 for value in start.values())


def test_initial_follows_the_seed_and_pytorch_bounds() -> None:
    spec = AdapterSpec("facmic", 64, 4)
    one, again, other = spec.initial(b"a"), spec.initial(b"a"), spec.initial(b"b")
    assert np.array_equal(one["W1"], again["W1"])
    assert not np.array_equal(one["W1"], other["W1"])
    assert np.abs(one["W1"]).max() <= 1 / 8
    # uniform on ±1/√d has variance 1/(3d); 4096 draws put the estimate within a few percent
    assert one["W1"].var() == pytest.approx(1 / (3 * 64), rel=0.08)
    assert (one["gamma"] == 1).all()
    assert not one["W2"].any()


@pytest.mark.parametrize(("kind", "d", "k"), [("mlp", 8, 3), ("linear", 1, 3), ("facmic", 8, 1)])
def test_impossible_adapters_are_refused(kind: str, d: int, k: int) -> None:
    with pytest.raises(ModelError, match="FS-1631"):
        AdapterSpec(kind, d, k)  # type: ignore[arg-type]


def test_tensors_that_do_not_fit_are_refused() -> None:
    spec = AdapterSpec("linear", 4, 3)
    with pytest.raises(ModelError, match="FS-1632"):
        spec.unflatten(np.zeros(11))
    with pytest.raises(ModelError, match="FS-1632"):
        spec.flatten({"D": np.zeros((4, 3))})
    with pytest.raises(ModelError, match="FS-1632"):
        spec.flatten({"D": np.zeros((3, 4)), "E": np.zeros(1)})


def test_constants_that_do_not_fit_are_refused() -> None:
    spec = AdapterSpec("linear", 4, 3)
    text, centre = np.ones((3, 4), np.float32), np.zeros(4, np.float32)
    broken = text.copy()
    broken[0, 0] = np.nan
    for wrong in ({"text": text.T}, {"text": broken}, {"centre": np.zeros(3, np.float32)}, {"temperature": 0.0}):
        with pytest.raises(ModelError, match="FS-1633"):
            HeadTask(**{"spec": spec, "text": text, "centre": centre, "temperature": 1.0, **wrong})


@pytest.mark.parametrize("kind", list(FORMS))
@pytest.mark.parametrize("centred", [False, True])
def test_round_zero_is_zero_shot(kind: str, centred: bool) -> None:
    rng = np.random.default_rng(3)
    spec = AdapterSpec(kind, 16, 5)  # type: ignore[arg-type]
    text = rng.normal(size=(5, 16)).astype(np.float32)
    features = rng.normal(size=(200, 16)).astype(np.float32)
    centre = (rng.normal(size=16) * 0.1 * centred).astype(np.float32)
    found, probabilities = predict(HeadTask(spec, text, centre, 10.0), spec.initial(b""), features, device="cpu")
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    rows = text / np.linalg.norm(text, axis=1, keepdims=True)
    scale = 25.0
    if centred:
        unit = unit - centre
        unit /= np.linalg.norm(unit, axis=1, keepdims=True)
        rows = rows - rows.mean(0)
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)
        scale = 10.0
    logits = scale * unit @ rows.T
    expected = np.exp(logits - logits.max(1, keepdims=True))
    assert np.allclose(probabilities, expected / expected.sum(1, keepdims=True), atol=1e-5)
    assert (found == logits.argmax(1)).mean() > 0.99


def test_what_the_aggregator_needs_runs_without_torch() -> None:
    code = """
import sys
sys.modules["torch"] = None
from fedsecure.learning.adapters import FORMS, AdapterSpec
from fedsecure.learning.evaluation import accuracy, balanced_accuracy
from fedsecure.learning.training import suggest
import fedsecure.learning.artefact, fedsecure.learning.engines, fedsecure.learning.features
import fedsecure.learning.task, fedsecure.learning.units
spec = AdapterSpec("facmic", 8, 3)
assert spec.unflatten(spec.flatten(spec.initial(b"x")))["W1"].shape == (8, 8)
assert accuracy([1, 2], [2, 2]) == 0.75
suggest("linear", mu_total=1.0, units=100, classes=4, dimension=8)
print("fine")
"""
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "fine", done.stderr
