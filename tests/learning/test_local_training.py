"""Local training: exact steps, noise in every step, and default rates that neither diverge nor fall below zero-shot."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedsecure.errors import ModelError, PrivacyError
from fedsecure.learning.adapters import FORMS, AdapterKind, AdapterSpec
from fedsecure.learning.engines import clipped_sum
from fedsecure.learning.evaluation import accuracy, counts
from fedsecure.learning.task import HeadTask
from fedsecure.learning.training import suggest, train_locally
from fedsecure.learning.units import UnitFeatures

SHARED = Path(os.environ.get("FEDSECURE_SHARED", Path(__file__).resolve().parents[3] / "shared")) / "data"


def everyone(count: int) -> Any:
    return np.ones(count, np.bool_)


def silent(total: Any, clip: float) -> Any:
    return total


def clusters(units: int, *, d: int = 16, k: int = 4, seed: int = 0) -> tuple[HeadTask, UnitFeatures]:
    """Records around class directions; the text points half astray, so zero-shot is mediocre."""
    rng = np.random.default_rng(seed)
    truth = np.linalg.qr(np.random.default_rng(99).normal(size=(d, d)))[0][:k]
    labels = rng.integers(0, k, (units, 1))
    features = (truth[labels] + rng.normal(size=(units, 1, d)) * 0.25).astype(np.float32)
    text = (truth + 0.9 * np.roll(truth, 1, axis=0)).astype(np.float32)
    task = HeadTask(AdapterSpec("linear", d, k), text, np.zeros(d, np.float32), 4.0)
    return task, UnitFeatures(features, labels.astype(np.int64), np.ones((units, 1), np.bool_))


def test_steps_are_what_the_docstring_says() -> None:
    task, units = clusters(30)
    start = task.spec.initial(b"")
    calls: list[float] = []

    def noisy(total: Any, clip: float) -> Any:
        calls.append(clip)
        return total + len(calls)

    delta = train_locally(
        task,
        start,
        units,
        steps=3,
        learning_rate=2.0,
        max_grad_norm=0.1,
        normaliser=25.0,
        privatise=noisy,
        sample=everyone,
        device="cpu",
    )
    expected = np.zeros((4, 16))
    for step in range(3):
        how: dict[str, Any] = {"max_grad_norm": 0.1, "device": "cpu", "precision": "float32"}
        total = clipped_sum(task, {"D": expected}, units, **how).reshape(4, 16)
        expected = expected - 2.0 / 25.0 * (total + step + 1)
    assert calls == [0.1] * 3
    assert np.allclose(delta["D"], expected, rtol=1e-12, atol=1e-15)


def test_empty_batches_still_get_noise_and_the_batch_size_is_never_used() -> None:
    task, units = clusters(30)
    for rows in (units, units.select(slice(0, 0))):
        delta = train_locally(
            task,
            task.spec.initial(b""),
            rows,
            steps=2,
            learning_rate=1.0,
            max_grad_norm=0.1,
            normaliser=10.0,
            privatise=lambda total, clip: total + clip,
            sample=lambda count: np.zeros(count, np.bool_),
            device="cpu",
        )
        assert np.allclose(delta["D"], -2 * 0.1 / 10.0)


def test_both_engines_train_alike() -> None:
    task, units = clusters(40)
    ends = [
        train_locally(
            task,
            task.spec.initial(b""),
            units,
            steps=4,
            learning_rate=5.0,
            max_grad_norm=0.1,
            normaliser=40.0,
            privatise=silent,
            sample=lambda count: np.arange(count) % 2 == 0,
            engine=engine,
            device="cpu",
        )["D"]
        for engine in ("closed-form", "opacus")
    ]
    # Activations and sums are float32 in one of them.
    assert np.allclose(ends[0], ends[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "wrong",
    [
        {"steps": 0},
        {"learning_rate": 0.0},
        {"learning_rate": math.nan},
        {"normaliser": 0.0},
        {"normaliser": math.inf},
        {"max_grad_norm": 0.0},
    ],
)
def test_settings_that_break_the_noise_are_refused(wrong: dict[str, float]) -> None:
    task, units = clusters(5)
    usual: dict[str, Any] = {"steps": 1, "learning_rate": 1.0, "max_grad_norm": 0.1, "normaliser": 5.0}
    with pytest.raises(PrivacyError, match="FS-1238"):
        train_locally(
            task,
            task.spec.initial(b""),
            units,
            privatise=silent,
            sample=everyone,
            device="cpu",
            **{**usual, **wrong},
        )


def test_foreign_samplers_and_noise_are_refused() -> None:
    task, units = clusters(5)
    usual: dict[str, Any] = {"steps": 1, "learning_rate": 1.0, "max_grad_norm": 0.1, "normaliser": 5.0}
    for sample in (lambda count: np.arange(count), lambda count: np.ones(count + 1, np.bool_)):
        with pytest.raises(PrivacyError, match="FS-1239"):
            train_locally(task, task.spec.initial(b""), units, privatise=silent, sample=sample, **usual)
    with pytest.raises(PrivacyError, match="FS-1239"):
        train_locally(
            task, task.spec.initial(b""), units, privatise=lambda total, clip: total[:1], sample=everyone, **usual
        )


@given(
    kind=st.sampled_from(list(FORMS)),
    mu=st.floats(1e-6, 1e3),
    units=st.floats(1, 1e6),
    classes=st.integers(2, 1000),
    steps=st.integers(1, 200),
    clip=st.floats(1e-3, 10),
)
def test_rates_are_positive_rise_with_the_signal_and_keep_the_way(
    kind: AdapterKind, mu: float, units: float, classes: int, steps: int, clip: float
) -> None:
    def ask(mu: float, steps: int = steps, clip: float = clip) -> tuple[float, float]:
        return suggest(kind, mu_total=mu, units=units, classes=classes, dimension=512, steps=steps, max_grad_norm=clip)

    rate, temperature = ask(mu)
    assert 0 < rate < math.inf
    assert 1 <= temperature <= 100
    assert ask(mu * 2)[0] >= rate
    assert ask(mu * 2)[1] <= temperature
    assert ask(1e-12)[0] / classes < 1e-6
    assert ask(mu, steps=2 * steps)[0] <= rate
    assert ask(mu, clip=clip / 2)[0] >= rate


def test_no_rate_for_an_unknown_adapter() -> None:
    with pytest.raises(ModelError, match="FS-1631"):
        suggest("mlp", mu_total=1.0, units=10, classes=2, dimension=4)  # type: ignore[arg-type]


def train_centrally(task: HeadTask, units: UnitFeatures, *, mu: float, steps: int, rate: float, seed: int) -> float:
    """Noisy full-batch descent as the distributed mode runs it; accuracy is judged by the caller."""
    rng = np.random.default_rng(seed)
    clip = 0.1

    def noise(total: Any, bound: float) -> Any:
        return total + rng.normal(0, bound * math.sqrt(steps) / mu, total.shape)

    return train_locally(  # type: ignore[return-value]
        task,
        task.spec.initial(b"public"),
        units,
        steps=steps,
        learning_rate=rate,
        max_grad_norm=clip,
        normaliser=len(units),
        privatise=noise,
        sample=everyone,
        device="cpu",
    )


def scored(task: HeadTask, start: dict[str, Any], delta: dict[str, Any], test: UnitFeatures) -> float:
    tensors = {name: start[name] + delta[name] for name in start}
    return accuracy(*counts(task, tensors, test, device="cpu"))


@pytest.mark.parametrize("kind", list(FORMS))
def test_default_rates_learn_with_signal_and_stay_at_zero_shot_without(kind: AdapterKind) -> None:
    base, units = clusters(400, seed=1)
    _, test = clusters(1000, seed=2)
    gains = {}
    for mu in (1e-3, 5.0):
        rate, temperature = suggest(kind, mu_total=mu, units=400, classes=4, dimension=16, steps=20)
        task = HeadTask(AdapterSpec(kind, 16, 4), base.text, base.centre, temperature)
        start = task.spec.initial(b"public")
        before = accuracy(*counts(task, start, test, device="cpu"))
        delta: Any = train_centrally(task, units, mu=mu, steps=20, rate=rate, seed=3)
        gains[mu] = scored(task, start, delta, test) - before
    assert abs(gains[1e-3]) <= 0.01
    assert gains[5.0] >= 0.03


@pytest.mark.slow
@pytest.mark.shared_data
@pytest.mark.parametrize(
    ("name", "kind", "mu", "least_gain"),
    [
        # μ of ε = 0.5, 4 and 8 at δ = 1e-5 over the whole run
        ("ucf101", "linear", 0.1422, -0.01),
        ("ucf101", "linear", 0.9249, 0.10),
        ("ucf101", "linear", 1.6660, 0.18),
        ("caltech", "linear", 0.1422, -0.0048),
        ("caltech", "linear", 1.6660, -0.0048),
    ],
)
def test_default_rates_on_real_features(name: str, kind: Any, mu: float, least_gain: float) -> None:
    file = SHARED / f"{name}_clip_vitb32.npz"
    if not file.exists():
        pytest.skip(f"research data {file.name} is not beside the repository")
    with np.load(file, allow_pickle=False) as held:
        rows = {key: held[key] for key in held.files}

    def units(*splits: str) -> UnitFeatures:
        features = np.concatenate([rows[f"{s}_x"] for s in splits]).astype(np.float32)[:, None]
        labels = np.concatenate([rows[f"{s}_y"] for s in splits]).astype(np.int64)[:, None]
        return UnitFeatures(features, labels, np.ones(labels.shape, np.bool_))

    train, test = units("train", "val"), units("test")
    k, d = rows["text"].shape
    rate, temperature = suggest(kind, mu_total=mu, units=len(train), classes=k, dimension=d, steps=20)
    task = HeadTask(AdapterSpec(kind, d, k), rows["text"], np.zeros(d, np.float32), temperature)
    start = task.spec.initial(b"public")
    before = accuracy(*counts(task, start, test, device="cpu"))
    delta: Any = train_centrally(task, train, mu=mu, steps=20, rate=rate, seed=0)
    assert before == pytest.approx({"ucf101": 0.4956, "caltech": 0.9598}[name], abs=5e-4)
    assert scored(task, start, delta, test) - before >= least_gain


@pytest.mark.parametrize("kind", ["facmic", "fedclip", "bottleneck"])
def test_the_longest_steps_shrink_with_narrow_features(kind: str) -> None:
    """Without noise a run goes its longest steps: at 64 features an eighth of those found at 512, and no more above."""
    rates = {
        d: suggest(kind, mu_total=1e9, units=1000, classes=4, dimension=d, steps=60, max_grad_norm=0.1)[0]
        for d in (64, 512, 768)
    }
    assert rates[64] == pytest.approx(rates[512] / 8)
    assert rates[768] == rates[512]
