"""The two engines and a plain autograd loop give the same clipped sums, and one unit moves them by at most C."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fedsecure.errors import ModelError, PrivacyError
from fedsecure.learning.adapters import FORMS, AdapterSpec
from fedsecure.learning.engines import choose_engine, clipped_sum, clipped_sums
from fedsecure.learning.modules import build_module, record_loss, resolve_device
from fedsecure.learning.opacus_engine import ModuleTask
from fedsecure.learning.task import HeadTask
from fedsecure.learning.units import UnitFeatures

CPU = torch.device("cpu")
# Every kind, and the one whose hidden layer is normalised by public images, where it has some.
KINDS = (*FORMS, "facmic_public")


def case(
    kind: str, *, units: int, records: int, d: int, k: int, seed: int, centred: bool = True, prior: bool = False
) -> tuple[HeadTask, dict[str, np.ndarray[Any, Any]], UnitFeatures]:
    rng = np.random.default_rng(seed)
    public = kind == "facmic_public"
    spec = AdapterSpec("facmic_plain" if public else kind, d, k)  # type: ignore[arg-type]
    task = HeadTask(
        spec,
        rng.normal(size=(k, d)).astype(np.float32),
        (rng.normal(size=d) * 0.1 * centred).astype(np.float32),
        temperature=float(rng.uniform(1, 30)),
        log_prior=rng.normal(size=k).astype(np.float32) if prior else None,
    )
    start = spec.initial(b"start")
    tensors = {n: (v + rng.normal(size=v.shape) * 0.3).astype(np.float32) for n, v in start.items()}
    mask = rng.random((units, records)) < 0.7
    if records == 1:
        mask[:] = True
    features = (rng.normal(size=(units, records, d)) * 10 ** rng.uniform(-2, 2)).astype(np.float32)
    rows = UnitFeatures(features, rng.integers(0, k, (units, records)), mask)
    if public:
        task = replace(task, public=(rng.normal(size=d) + rng.normal(size=(9, d))).astype(np.float32))
    return task, tensors, rows


def autograd_loop(task: HeadTask, tensors: Mapping[str, Any], units: UnitFeatures, clip: float) -> Any:
    """The definition: one backward pass a unit, over its real records only."""
    module = build_module(task, tensors, device=CPU, dtype=torch.float64)
    loss = record_loss(task, CPU)
    parameters = list(module.parameters())
    total = torch.zeros(task.spec.parameters, dtype=torch.float64)
    for row in range(len(units)):
        kept = units.mask[row]
        features = torch.from_numpy(units.features[row][kept][None]).double()
        if not kept.any() or not torch.isfinite(features).all():
            continue
        mean = loss(module(features), torch.from_numpy(units.labels[row][kept][None])).mean()
        flat = torch.cat([g.flatten() for g in torch.autograd.grad(mean, parameters)])
        total += flat * min(1.0, clip * (1 - 1e-5) / max(float(flat.norm()), 1e-12))
    return total.numpy()


def assert_close(found: Any, expected: Any, *, rel: float = 1e-10) -> None:
    """Equal but for float64 roundoff: the floor is for sums that are tiny only because terms of order 1 cancel."""
    assert found.dtype == np.float64
    assert np.linalg.norm(found - expected) <= rel * float(np.linalg.norm(expected)) + 1e-14


@pytest.mark.slow
@given(
    kind=st.sampled_from(KINDS),
    units=st.integers(0, 9),
    records=st.integers(1, 4),
    d=st.integers(2, 12),
    k=st.integers(2, 6),
    seed=st.integers(0, 2**32),
    centred=st.booleans(),
    prior=st.booleans(),
    broken=st.booleans(),
    clip=st.sampled_from([1e-3, 0.1, 1.0, 100.0]),
)
@settings(max_examples=100, deadline=None)
def test_closed_form_opacus_and_autograd_agree(
    kind: str,
    units: int,
    records: int,
    d: int,
    k: int,
    seed: int,
    centred: bool,
    prior: bool,
    broken: bool,
    clip: float,
) -> None:
    task, tensors, rows = case(kind, units=units, records=records, d=d, k=k, seed=seed, centred=centred, prior=prior)
    if broken and units:
        rows.features[units // 2, 0, 0] = np.nan if seed % 2 else np.inf
    expected = autograd_loop(task, tensors, rows, clip)
    for engine in ("closed-form", "opacus"):
        found = clipped_sum(task, tensors, rows, max_grad_norm=clip, engine=engine, device="cpu", chunk=4)  # type: ignore[arg-type]
        assert_close(found, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_agreement_at_real_width(kind: str) -> None:
    task, tensors, rows = case(kind, units=12, records=3, d=512, k=7, seed=5)
    expected = autograd_loop(task, tensors, rows, 0.1)
    assert np.linalg.norm(expected) > 0.1
    assert_close(clipped_sum(task, tensors, rows, max_grad_norm=0.1, engine="closed-form", device="cpu"), expected)
    assert_close(clipped_sum(task, tensors, rows, max_grad_norm=0.1, engine="opacus", device="cpu"), expected)


@pytest.mark.parametrize("engine", ["closed-form", "opacus"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("records", [1, 4])
def test_one_unit_moves_the_sum_by_at_most_c(kind: str, records: int, engine: str) -> None:
    task, tensors, rows = case(kind, units=60, records=records, d=24, k=5, seed=11)
    rows.mask[:, 0] = True
    rows.features[0] *= 1e4
    rows.features[1] = rows.features[2]
    rows.features[3] = 0
    rows.features[4, 0, 0] = np.nan
    rows.features[5] = 3e38

    def total(units: UnitFeatures) -> Any:
        return clipped_sum(task, tensors, units, max_grad_norm=0.01, engine=engine, device="cpu")  # type: ignore[arg-type]

    whole, moved = total(rows), []
    for row in range(10):
        blank = UnitFeatures(rows.features.copy(), rows.labels, rows.mask.copy())
        blank.features[row], blank.mask[row] = 0, False
        left_out = rows.select(np.arange(60) != row)
        for other in (blank, left_out):
            moved.append(float(np.linalg.norm(whole - total(other))))
    assert max(moved) <= 0.01
    # most gradients are clipped, so the bound is reached: a clip twice as wide would fail above
    assert max(moved) >= 0.01 * (1 - 2e-5)
    # unit 4 holds NaN and counts for nothing
    assert max(moved[8], moved[9]) < 1e-15


@pytest.mark.parametrize("kind", KINDS)
def test_a_units_gradient_does_not_notice_the_others(kind: str) -> None:
    task, tensors, rows = case(kind, units=8, records=2, d=16, k=4, seed=2)
    alone = sum(clipped_sum(task, tensors, rows.select([i]), max_grad_norm=0.1, device="cpu") for i in range(8))  # type: ignore[arg-type]
    assert_close(clipped_sum(task, tensors, rows, max_grad_norm=0.1, device="cpu"), alone, rel=1e-12)


@pytest.mark.parametrize("engine", ["closed-form", "opacus"])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_kept_from_step_to_step_changes_no_bit(kind: str, engine: Any) -> None:
    task, tensors, rows = case(kind, units=9, records=2, d=12, k=4, seed=6)
    rows.mask[4:8] = False  # a whole chunk without records
    usual: dict[str, Any] = {"max_grad_norm": 0.1, "engine": engine, "device": "cpu", "chunk": 4}
    at = clipped_sums(task, rows, keep=True, **usual)
    for scale in (1.0, -0.5, 1.0):
        there = {name: scale * value for name, value in tensors.items()}
        assert np.array_equal(at(there), clipped_sum(task, there, rows, **usual))


def test_opacus_draws_no_noise_and_leaves_the_module_of_the_next_call_alone() -> None:
    task, tensors, rows = case("facmic", units=5, records=2, d=8, k=3, seed=1)
    before = {name: value.copy() for name, value in tensors.items()}
    state = torch.get_rng_state()
    one = clipped_sum(task, tensors, rows, max_grad_norm=0.1, engine="opacus", device="cpu")
    two = clipped_sum(task, tensors, rows, max_grad_norm=0.1, engine="opacus", device="cpu")
    assert np.array_equal(one, two)
    assert torch.equal(state, torch.get_rng_state())
    assert all(np.array_equal(before[name], tensors[name]) for name in tensors)


def plain_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return nn.functional.cross_entropy(logits.movedim(-1, 1), labels, reduction="none")


def module_task(make: Callable[[], nn.Module], loss: Any = plain_loss) -> tuple[ModuleTask, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    template = make().double()
    values = {name: p.detach().clone() for name, p in template.named_parameters()}

    def build(parameters: Mapping[str, Any]) -> nn.Module:
        module = make().double()
        module.load_state_dict(dict(parameters), strict=False)
        return module

    return ModuleTask({name: tuple(p.shape) for name, p in values.items()}, build, loss), values


def test_a_module_of_ones_own_goes_through_opacus() -> None:
    task, values = module_task(lambda: nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)))
    _, _, rows = case("linear", units=9, records=3, d=6, k=3, seed=4)
    assert choose_engine("auto", task) == "opacus"
    with pytest.raises(ModelError, match="FS-1637"):
        clipped_sum(task, values, rows, max_grad_norm=0.1, engine="closed-form", device="cpu")
    found = clipped_sum(task, values, rows, max_grad_norm=0.05, device="cpu")
    module = task.build(values)
    expected = torch.zeros(sum(v.numel() for v in values.values()), dtype=torch.float64)
    for row in range(9):
        kept = rows.mask[row]
        if kept.any():
            features = torch.from_numpy(rows.features[row][kept][None]).double()
            mean = plain_loss(module(features), torch.from_numpy(rows.labels[row][kept][None])).mean()
            flat = torch.cat([g.flatten() for g in torch.autograd.grad(mean, list(module.parameters()))])
            expected += flat * min(1.0, 0.05 * (1 - 1e-5) / float(flat.norm()))
    assert_close(found, expected.numpy())


class Frozen(nn.Module):
    """Batch normalisation without a single trainable parameter: Opacus's validator passes it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(6, affine=False)
        self.head = nn.Linear(6, 3)

    def forward(self, features: torch.Tensor) -> Any:
        return self.head(self.norm(features.movedim(-1, 1)).movedim(1, -1))


class Counter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(6, 3)
        self.register_buffer("seen", torch.zeros(6, dtype=torch.float64))

    def forward(self, features: torch.Tensor) -> Any:
        self.seen += features.detach().sum((0, 1))
        return self.head(features)


class Centring(nn.Module):
    """Couples the batch without any layer of a known name."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(6, 3)

    def forward(self, features: torch.Tensor) -> Any:
        return self.head(features - features.mean(0))


def contrastive(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    flat = logits.flatten(0, 1)
    return -torch.log_softmax(flat @ flat.T, dim=-1).diagonal().reshape(labels.shape)


@pytest.mark.parametrize(
    ("make", "loss", "code"),
    [
        (Frozen, plain_loss, "FS-1234"),
        (lambda: Frozen().eval(), plain_loss, "FS-1234"),
        (Counter, plain_loss, "FS-1235"),
        (Centring, plain_loss, "FS-1236"),
        (lambda: nn.Linear(6, 3), contrastive, "FS-1236"),
        (lambda: nn.Linear(6, 3), lambda logits, labels: plain_loss(logits, labels).mean(), "FS-1236"),
    ],
)
def test_modules_and_losses_that_mix_units_are_refused(make: Any, loss: Any, code: str) -> None:
    task, values = module_task(make, loss)
    _, _, rows = case("linear", units=4, records=2, d=6, k=3, seed=0)
    with pytest.raises(PrivacyError, match=code):
        clipped_sum(task, values, rows, max_grad_norm=0.1, device="cpu")


def test_wrapping_twice_is_refused() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from opacus.grad_sample import GradSampleModule
    bare = nn.Linear(6, 3).double()
    wrapped = GradSampleModule(bare)
    _, _, rows = case("linear", units=4, records=2, d=6, k=3, seed=0)
    for module in (wrapped, bare):
        task = ModuleTask({}, lambda _, module=module: module, plain_loss)  # type: ignore[misc]
        with pytest.raises(PrivacyError, match="FS-1237"):
            clipped_sum(task, {}, rows, max_grad_norm=0.1, device="cpu")


def test_what_does_not_fit_is_refused() -> None:
    task, tensors, rows = case("linear", units=3, records=1, d=6, k=3, seed=0)
    for clip in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(PrivacyError, match="FS-1238"):
            clipped_sum(task, tensors, rows, max_grad_norm=clip, device="cpu")
    with pytest.raises(ModelError, match="FS-1632"):
        clipped_sum(task, {"D": tensors["D"].T}, rows, max_grad_norm=1.0, device="cpu")
    narrow = UnitFeatures(rows.features[..., :4], rows.labels, rows.mask)
    beyond = UnitFeatures(rows.features, rows.labels + 3, rows.mask)
    for units in (narrow, beyond):
        with pytest.raises(ModelError, match="FS-1638"):
            clipped_sum(task, tensors, units, max_grad_norm=1.0, device="cpu")
    with pytest.raises(ModelError, match="FS-1637"):
        clipped_sum(task, tensors, rows, max_grad_norm=1.0, engine="fast", device="cpu")  # type: ignore[arg-type]
    with pytest.raises(ModelError, match="FS-1639"):
        resolve_device("abacus")
