"""The methods that train adapters: installed, each of its own rate, from zero-shot, and whole runs in memory."""

from __future__ import annotations

import math
import re
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest

from fedsecure.config import MethodConfig, PolicyConfig
from fedsecure.errors import ConfigError
from fedsecure.learning.adapters import FORMS, AdapterKind, AdapterSpec
from fedsecure.learning.artefact import load_adapter
from fedsecure.learning.gradients import BACKWARD
from fedsecure.learning.modules import MODULES
from fedsecure.learning.task import HeadTask
from fedsecure.learning.training import RULES, train_locally
from fedsecure.learning.units import UnitFeatures
from fedsecure.methods.base import ServerState
from fedsecure.methods.cohorts import cohort_of
from fedsecure.methods.descent import averaged
from fedsecure.methods.registry import load_training_method
from tests.federation_world import World

PAGE = Path(__file__).parents[2] / "docs" / "methods.md"
LOCAL = ("fedavg", "fedprox", "moon")


def test_every_kind_is_in_every_table() -> None:
    for table in (FORMS, MODULES, BACKWARD, RULES):
        assert tuple(table) == get_args(AdapterKind)


def test_what_a_site_answers_by_default_is_installed_and_on_the_page() -> None:
    allowed = set(PolicyConfig().methods)
    assert allowed <= {point.name for point in entry_points(group="fedsecure.methods")}
    assert allowed <= set(re.findall(r"^\| `(\w+)` \|", PAGE.read_text(encoding="utf-8"), flags=re.M))


def moves(task: HeadTask, units: UnitFeatures, *, steps: int, proximal: float) -> float:
    delta = train_locally(
        task,
        task.spec.initial(b""),
        units,
        steps=steps,
        learning_rate=1.0,
        max_grad_norm=0.1,
        normaliser=len(units),
        privatise=lambda total, clip: total,
        sample=lambda count: np.ones(count, np.bool_),
        proximal=proximal,
        device="cpu",
    )
    return float(np.linalg.norm(task.spec.flatten(delta)))


def test_the_proximal_term_holds_back_and_touches_no_gradient() -> None:
    rng = np.random.default_rng(0)
    spec = AdapterSpec("linear", 6, 3)
    task = HeadTask(spec, rng.normal(size=(3, 6)).astype(np.float32), np.zeros(6, np.float32), 5.0)
    units = UnitFeatures(
        rng.normal(size=(40, 1, 6)).astype(np.float32), rng.integers(0, 3, (40, 1)), np.ones((40, 1), np.bool_)
    )
    free, held = (moves(task, units, steps=8, proximal=rho) for rho in (0.0, 0.5))
    assert 0 < held < 0.7 * free
    # One step: w_start + (−η g)/(1 + ρ), exactly the proximal operator.
    one, pulled = (moves(task, units, steps=1, proximal=rho) for rho in (0.0, 0.25))
    assert pulled == pytest.approx(one / 1.25, rel=1e-12)
    # However large ρ is, it stays stable.
    assert 0 < moves(task, units, steps=50, proximal=1e6) < 1e-5


@pytest.mark.parametrize("name", LOCAL)
def test_methods_of_local_steps_refuse_distributed_noise(tmp_path: Path, name: str) -> None:
    world = World(tmp_path, adapter=name, noise="local", local_steps=2)
    _, cohort = cohort_of(world.settings, trainers_only=True)
    method = load_training_method(name)
    assert method.plan(world.settings, cohort).noise_multiplier > 0
    shared = world.settings.privacy.model_copy(update={"noise": "distributed"})
    other = world.settings.model_copy(
        update={"privacy": shared, "method": world.settings.method.model_copy(update={"local_steps": 1})}
    )
    with pytest.raises(ConfigError, match="FS-1016"):
        method.plan(other, cohort)


def whole_run(folder: Path, **options: Any) -> tuple[float, float]:
    method = options.pop("method", None)
    world = World(folder, **options)
    if method is not None:
        world.settings = world.settings.model_copy(update={"method": method})
    core = world.start()
    world.run(*(world.take_part(name) for name in world.names))
    assert not world.errors, world.errors
    assert core.outcome is not None
    assert core.outcome["complete"]
    accuracy = world.reports["site-1"]["accuracy"]
    return accuracy["before"]["accuracy"], accuracy["after"]["accuracy"]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "noise"), [("fedclip", "distributed"), ("bottleneck", "local"), ("moon", "local")])
def test_a_whole_run_in_memory(tmp_path: Path, name: str, noise: str) -> None:
    steps = 3 if noise == "local" else 1
    before, after = whole_run(tmp_path, adapter=name, noise=noise, local_steps=steps, rounds=2)
    assert all(math.isfinite(value) and 0 <= value <= 1 for value in (before, after))
    kept = list((tmp_path / "site-1" / "state" / "runs").glob(f"*/{name}.safetensors"))
    assert bool(kept) == (name == "moon"), "only MOON keeps its last adapter, and it stays at the site"


def test_averaging_keeps_the_mean_of_the_second_half() -> None:
    rng = np.random.default_rng(0)
    steps = [{"D": rng.normal(size=(3, 4)).astype(np.float32)} for _ in range(7)]
    state = ServerState(tensors={"D": np.zeros((3, 4), np.float32)})
    for index, following in enumerate(steps):
        tensors = averaged(state, following, rounds=7)
        if index < 6:
            assert np.array_equal(tensors["D"], following["D"]), "training goes on from the last adapter"
        state = ServerState(step=index + 1, tensors=tensors)
    assert set(state.tensors) == {"D"}
    assert state.tensors["D"].dtype == np.float32
    assert np.allclose(state.tensors["D"], np.mean([step["D"] for step in steps[3:]], axis=0), atol=1e-6)
    assert np.array_equal(averaged(ServerState(), steps[0], rounds=1)["D"], steps[0]["D"])


def test_a_run_with_averaging_broadcasts_and_ends_with_adapters_alone(tmp_path: Path) -> None:
    changed = MethodConfig(name="linear", rounds=3, average=True)
    before, after = whole_run(tmp_path, method=changed, rounds=3)
    assert after > before - 0.1
    (kept,) = (tmp_path / "site-2" / "state" / "runs").glob("*/adapter.safetensors")
    assert load_adapter(kept).task.spec.kind == "linear"
