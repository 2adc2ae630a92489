"""Gradients that Opacus gives one by one, in float32: right, bounded, each its own unit's, or not used at all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fedsecure.errors import PrivacyError
from fedsecure.learning import opacus_engine
from fedsecure.learning.adapters import AdapterSpec
from fedsecure.learning.engines import clipped_sum
from fedsecure.learning.opacus_engine import ModuleTask
from fedsecure.learning.student_module import resnet8_task
from fedsecure.learning.student_spec import PIXELS, resnet8_spec
from fedsecure.learning.task import HeadTask
from fedsecure.learning.units import UnitFeatures

D, K = 8, 4


class Convolutions(nn.Module):
    """(U, m, d) features read as signals of length d."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv1d(1, 4, 3, padding=1), nn.GroupNorm(2, 4)
        self.head = nn.Linear(4 * D, K)

    def forward(self, rows: torch.Tensor) -> Any:
        units, records, _ = rows.shape
        if records != 1:
            raise AssertionError
        hidden = torch.relu(self.norm(self.first(rows.reshape(units, 1, D))))
        return self.head(hidden.flatten(1)).reshape(units, 1, K)


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(D, D), nn.Linear(D, K)

    def forward(self, rows: torch.Tensor) -> Any:
        return self.head(torch.tanh(self.first(rows)))


class Tied(Layers):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(D, D), nn.Linear(D, D)
        self.second.weight = self.first.weight
        self.head = nn.Linear(D, K)

    def forward(self, rows: torch.Tensor) -> Any:
        return self.head(self.second(torch.tanh(self.first(rows))))


class Twice(Layers):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(D, D), nn.Linear(D, K)

    def forward(self, rows: torch.Tensor) -> Any:
        return self.head(self.first(torch.tanh(self.first(rows))))


class Functional(Layers):
    def forward(self, rows: torch.Tensor) -> Any:
        return super().forward(rows) + 9 * nn.functional.linear(torch.tanh(self.first(rows)), self.head.weight)


class Company(Layers):
    """In float32 alone, a trace of the batch is in every record."""

    def forward(self, rows: torch.Tensor) -> Any:
        own = super().forward(rows)
        return own if rows.dtype == torch.float64 else own + 1e-6 * own.sum((0, 1))


class Places(Layers):
    """In float32 alone, a record's place is in its outputs."""

    def forward(self, rows: torch.Tensor) -> Any:
        own = super().forward(rows)
        places = torch.arange(len(rows), dtype=rows.dtype)[:, None, None]
        return own if rows.dtype == torch.float64 else own * (1 + 1e-4 * places)


class Leaking(nn.Module):
    """While ``up`` is zero no leak shows. Later the gradient of ``first`` through the text is the whole batch's."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.up, self.head = nn.Linear(D, D), nn.Linear(D, D, bias=False), nn.Linear(D, K)
        self.register_buffer("text", torch.ones(1, 1, D))

    def forward(self, rows: torch.Tensor) -> Any:
        shared = self.up(torch.tanh(self.first(self.text)).expand(len(rows), -1, -1))
        return self.head(torch.tanh(self.first(rows))) + 9 * shared[..., :K]


class WithConstant(Layers):
    """One layer's input is a public constant, which has no gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.third = nn.Linear(D, K)
        self.register_buffer("constant", torch.ones(1, 1, D))

    def forward(self, rows: torch.Tensor) -> Any:
        return super().forward(rows) + self.third(self.constant.expand(len(rows), rows.shape[1], -1))


class Wide(Layers):
    """Any number of rows of D numbers a record; where there are several, a trace of the batch in float32."""

    def forward(self, rows: torch.Tensor) -> Any:
        own = super().forward(rows.unflatten(-1, (-1, D)).mean(-2))
        return own if rows.shape[-1] == D or rows.dtype == torch.float64 else own + 1e-6 * own.sum((0, 1))


class Dropped(Layers):
    def forward(self, rows: torch.Tensor) -> Any:
        return nn.functional.dropout(super().forward(rows), 0.5, self.training)


class Rooted(Layers):
    """Its gradient is infinite where a record's first number is 0."""

    def forward(self, rows: torch.Tensor) -> Any:
        return super().forward(rows) * self.first(rows * 0).sum(-1, keepdim=True).mul(rows[..., :1]).abs().sqrt()


def cross_entropy(outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return nn.functional.cross_entropy(outputs.movedim(-1, 1), labels, reduction="none")


def task_of(make: Callable[[], nn.Module], **options: Any) -> tuple[ModuleTask, dict[str, Any]]:
    torch.manual_seed(5)
    values = {name: value.detach().clone() for name, value in make().named_parameters()}

    def build(parameters: Any) -> nn.Module:
        module = make()
        with torch.no_grad():
            for name, parameter in module.named_parameters():
                parameter.copy_(torch.as_tensor(parameters[name]))
        return module

    shapes = {name: tuple(value.shape) for name, value in values.items()}
    return ModuleTask(shapes, build, cross_entropy, **{"single": True, **options}), values


def rows(units: int, *, records: int = 1, scale: float = 1.0, seed: int = 0) -> UnitFeatures:
    rng = np.random.default_rng(seed)
    mask = np.ones((units, records), np.bool_)
    if records > 1:
        mask[::2, -1] = False
    features = scale * rng.normal(size=(units, records, D)).astype(np.float32)
    return UnitFeatures(features, rng.integers(0, K, (units, records)), mask)


def summed(task: Any, values: Any, units: UnitFeatures, clip: float = 0.1) -> Any:
    return clipped_sum(task, values, units, max_grad_norm=clip, device="cpu")


def held(task: Any) -> bool:
    """Whether gradients of this task were held one by one."""
    assert len(task.seen) == 1
    return bool(*task.seen.values())


def held_here(task: Any) -> None:
    """Skip the rest where units do not stand alone for this machine's kernels: it was the long way that was tested."""
    if not held(task):
        pytest.skip("units do not stand alone in float32 on this machine")


@pytest.fixture
def trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients are held, whatever this machine's kernels make of places."""
    monkeypatch.setattr(opacus_engine, "_stand_alone", lambda *arguments, **options: True)


@pytest.mark.usefixtures("trusted")
@pytest.mark.parametrize(("make", "records"), [(Convolutions, 1), (Layers, 1), (Layers, 3), (Tied, 2), (Twice, 1)])
@pytest.mark.parametrize("clip", [0.1, 1e6])
def test_sums_are_those_of_a_loop_over_the_units(make: Any, records: int, clip: float) -> None:
    """At any number of units, over a whole number of blocks or not."""
    task, values = task_of(make)
    for count in (1, 16, 37):
        units, expected = rows(count, records=records), 0.0
        for i in range(count):
            module = task.build(values).double()
            outputs = module(torch.from_numpy(units.features[[i]]).double())
            loss = (
                cross_entropy(outputs, torch.from_numpy(units.labels[[i]])) * torch.from_numpy(units.weights[[i]])
            ).sum()
            flat = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(module.parameters()))])
            expected = expected + flat.numpy() * min(1.0, clip * (1 - 1e-5) / float(flat.norm()))
        found = summed(task, values, units, clip)
        assert found.dtype == np.float64
        assert np.linalg.norm(found - expected) < 1e-4 * np.linalg.norm(expected)
    assert not summed(task, values, rows(0)).any()


def test_the_network_of_clip2fl_is_held() -> None:
    rng = np.random.default_rng(1)
    head = HeadTask(AdapterSpec("linear", 8, K), np.eye(K, 8, dtype=np.float32), np.zeros(8, np.float32), 1.0)
    task = resnet8_task(resnet8_spec(classes=K, dimension=8, width=1), head=head)
    values = {n: 0.2 * rng.normal(size=s).astype(np.float32) for n, s in task.shapes.items()}
    pixels = rng.normal(size=(5, 1, PIXELS)).astype(np.float32)
    units = UnitFeatures(pixels, rng.integers(0, K, (5, 1)), np.ones((5, 1), np.bool_))
    found, ghost = summed(task, values, units), summed(replace(task, single=False), values, units)
    held_here(task)
    assert np.linalg.norm(found - ghost) < 1e-4 * np.linalg.norm(ghost)
    # Tasks of one network share what was seen, those of another do not.
    spec = resnet8_spec(classes=K, dimension=8, width=2)
    assert resnet8_task(task.spec, head=head).seen is task.seen is not resnet8_task(spec, head=head).seen


@pytest.mark.usefixtures("trusted")
@pytest.mark.parametrize(("make", "records"), [(Convolutions, 1), (Layers, 3)])
def test_no_unit_moves_the_sum_by_more_than_the_clip(make: Any, records: int) -> None:
    """Left in its place without records, or taken out so that all others move up; of any size, finite or not."""
    task, values = task_of(make)
    units, clip = rows(21, records=records, scale=1e3), 0.05
    units.features[3] = 1e38
    units.features[7] = np.nan
    units.features[9] = 0.0
    units.features[11] = units.features[12]
    whole, moved = summed(task, values, units, clip), []
    for i in range(21):
        emptied = UnitFeatures(units.features, units.labels, units.mask & (np.arange(21) != i)[:, None])
        moved.append(np.linalg.norm(whole - summed(task, values, emptied, clip)))
        without = summed(task, values, units.select(np.arange(21) != i), clip)
        assert np.linalg.norm(whole - without) <= clip
    assert max(moved) <= clip
    assert moved[7] == 0
    assert sorted(moved)[5] > 0.999 * clip, "the clip is what holds them"


@pytest.mark.usefixtures("trusted")
def test_a_gradient_that_is_not_finite_counts_for_nothing_and_harms_no_other() -> None:
    task, values = task_of(Rooted)
    units = rows(9)
    units.features[4, 0, 0] = 0.0
    emptied = UnitFeatures(units.features, units.labels, units.mask & (np.arange(9) != 4)[:, None])
    others = summed(task, values, emptied)
    assert np.isfinite(others).all()
    assert others.any()
    assert np.array_equal(summed(task, values, units), others)


@pytest.mark.parametrize("make", [Company, Places])
def test_units_that_do_not_stand_alone_go_the_long_way(make: Any) -> None:
    """In float64, where these modules are as they should be."""
    task, values = task_of(make)
    found = summed(task, values, rows(20))
    assert not held(task)
    assert np.array_equal(found, summed(replace(task, single=False), values, rows(20)))


def test_a_leak_that_zeros_hide_is_found_before_it_leaks() -> None:
    """At the first step ``up`` is zero, as LoRA's second half is; later it is not."""
    task, values = task_of(Leaking)
    values["up.weight"] = torch.zeros(D, D)
    with pytest.raises(PrivacyError, match="FS-1248"):
        summed(task, values, rows(5))


def test_every_call_looks_at_its_own_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    """Were the first look fooled, the second step would still be refused."""
    task, values = task_of(Leaking)
    monkeypatch.setattr(opacus_engine, "_stand_alone", lambda *arguments, **options: True)
    assert summed(task, values | {"up.weight": torch.zeros(D, D)}, rows(5)).any()
    with pytest.raises(PrivacyError, match="FS-1248"):
        summed(task, values, rows(5))


def test_another_width_or_another_module_is_looked_at_anew() -> None:
    task, values = task_of(Wide)
    units = rows(20)
    summed(task, values, units)
    held_here(task)
    wider = UnitFeatures(np.tile(units.features, 2), units.labels, units.mask)
    assert np.array_equal(summed(task, values, wider), summed(replace(task, single=False), values, wider))
    assert sorted(task.seen.values()) == [False, True]
    alike, _ = task_of(Layers)
    summed(alike, values, units)
    other = replace(alike, build=task_of(Company)[0].build)
    summed(other, values, units)
    assert (held(alike), held(other)) == (True, False)


@pytest.mark.filterwarnings("error")
def test_a_layer_whose_inputs_have_no_gradient() -> None:
    task, values = task_of(WithConstant)
    found, ghost = summed(task, values, rows(20)), summed(replace(task, single=False), values, rows(20))
    held_here(task)
    assert np.linalg.norm(found - ghost) < 1e-4 * np.linalg.norm(ghost)


def test_one_module_handed_out_again_and_again_is_trained_at_its_own_parameters() -> None:
    """The first look puts noise into it and makes it float32."""
    task, values = task_of(Layers)
    only = Layers()

    def build(parameters: Any) -> nn.Module:
        with torch.no_grad():
            for name, parameter in only.named_parameters():
                parameter.copy_(torch.as_tensor(parameters[name]))
        return only

    same, usual = replace(task, build=build), summed(task, values, rows(20))
    for _ in range(2):
        assert np.linalg.norm(summed(same, values, rows(20)) - usual) < 1e-4 * np.linalg.norm(usual)


def test_memory_is_bounded_by_numbers_held(monkeypatch: pytest.MonkeyPatch) -> None:
    task, values = task_of(Layers)
    monkeypatch.setattr(opacus_engine, "_HELD_NUMBERS", 3 * (D * D + D + D * K + K))
    few = summed(task, values, rows(7))
    assert [key[2] for key in task.seen] == [3]
    monkeypatch.undo()
    assert np.linalg.norm(few - summed(task, values, rows(7))) < 1e-4 * np.linalg.norm(few)


def test_dropout_goes_the_long_way() -> None:
    """Its masks are no unit's own: they follow the place."""
    task, values = task_of(Dropped)
    assert summed(task, values, rows(20)).any()
    assert not held(task)


def test_gradients_that_opacus_misjudges_are_refused() -> None:
    """A weight that is used outside its layer; one that is used twice in it is right where gradients are held."""
    task, values = task_of(Functional)
    with pytest.raises(PrivacyError, match="FS-1248"):
        summed(task, values, rows(5))
    task, values = task_of(Twice, single=False)
    with pytest.raises(PrivacyError, match="FS-1248"):
        summed(task, values, rows(5))


def test_long_gradients_are_not_held(monkeypatch: pytest.MonkeyPatch) -> None:
    task, values = task_of(Layers)
    monkeypatch.setattr(opacus_engine, "_HELD_PARAMETERS", 10)
    assert np.array_equal(summed(task, values, rows(20)), summed(replace(task, single=False), values, rows(20)))
    assert not task.seen


def test_how_units_stand_is_looked_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """For each number of records a unit; Opacus's gradients are compared with the true ones in every call."""
    task, values = task_of(Layers)
    looked, compared = list[Any](), list[int]()
    alone, check = opacus_engine._Held.alone, opacus_engine.check_gradients

    def looking(self: Any, features: Any, labels: Any) -> bool:
        looked.append(features.shape[1])
        alone(self, features, labels)
        return True

    def comparing(*arguments: Any, records: int, **options: Any) -> None:
        compared.append(records)
        check(*arguments, records=records, **options)

    monkeypatch.setattr(opacus_engine._Held, "alone", looking)
    monkeypatch.setattr(opacus_engine, "check_gradients", comparing)
    for records in (1, 1, 2, 1):
        summed(task, values, rows(4, records=records))
    assert looked == [1, 2]
    assert compared == [1, 1, 1, 2, 2, 1]
