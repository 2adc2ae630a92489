"""Simulations: every cell a whole run, finished cells kept, half-finished ones not, and no privacy only by consent."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from federation_world import write_features

from fedsecure.config import EncoderConfig, PolicyConfig, PrivacyConfig, SiteEntry, parse_settings
from fedsecure.data.features import read_feature_header
from fedsecure.errors import ConfigError, DataError, FedsecureError, PrivacyError
from fedsecure.learning.targets import write_target
from fedsecure.simulation import simulate as module
from fedsecure.simulation.pool import read_pool, share_out, write_site
from fedsecure.simulation.scaffold import SitePlan, lay_out
from fedsecure.simulation.simulate import SimulationOptions, Step, simulate
from fedsecure.simulation.tables import plot, summarise, to_csv, to_markdown


@pytest.fixture
def features(tmp_path: Path) -> Path:
    file = tmp_path / "features.npz"
    write_features(file)
    return file


@pytest.fixture
def options(tmp_path: Path, features: Path) -> SimulationOptions:
    return SimulationOptions(out=tmp_path / "out", features=features, sites=3, seeds=1, rounds=2, epsilons=(8.0,))


def quietly(options: SimulationOptions) -> dict[str, Any]:
    return simulate(options, watch=lambda step: None)


def lasting(row: dict[str, Any]) -> dict[str, Any]:
    """A row without what differs from run to run."""
    return {key: value for key, value in row.items() if key not in ("wall_seconds", "bytes_up")}


def forbid(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(*arguments: object, **named: object) -> None:
        raise AssertionError("a finished cell was run again")

    monkeypatch.setattr(module, "run_in_memory", run)


@pytest.mark.slow
def test_two_methods_and_two_targets_then_nothing_left_to_do(
    options: SimulationOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = replace(options, methods=("linear", "facmic"), epsilons=(4.0, math.inf))
    seen: list[module.Step] = []
    first = simulate(options, watch=seen.append)
    assert (first["computed"], first["reused"]) == (4, 0)
    assert {(row["method"], row["epsilon"]) for row in first["rows"]} == {
        (method, epsilon) for method in ("linear", "facmic") for epsilon in (4.0, math.inf)
    }
    assert all(row["balanced_accuracy"] is not None and row["bytes_up"] > 0 for row in first["rows"])
    # Both methods start at zero-shot, and so at the same accuracy.
    assert len({row["zero_shot"] for row in first["rows"]}) == 1
    spent = {row["epsilon"]: row["epsilon_spent"] for row in first["rows"]}
    assert spent[4.0] <= 4.0 * (1 + 1e-9)
    assert spent[math.inf] > 1e5
    assert [step.done for step in seen] == sorted(step.done for step in seen)
    assert seen[-1].done == seen[-1].cells == 4
    assert Path(first["csv"]).read_text().count("\n") == 5
    assert "| linear | iid | distributed | 3 | ∞ | 1 |" in Path(first["markdown"]).read_text()
    assert first["plot"] is None or Path(first["plot"]).read_bytes().startswith(b"\x89PNG")
    for row in first["rows"]:
        report = json.loads((options.out / "reports" / f"{row['cell']}.json").read_text())
        assert report["stamp"] == "NO PRIVACY (seeded)"

    forbid(monkeypatch)
    second = quietly(options)
    assert (second["computed"], second["reused"]) == (0, 4)
    assert second["rows"] == first["rows"]


@pytest.mark.slow
def test_what_is_stopped_half_way_goes_on_with_what_is_missing(
    options: SimulationOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = replace(options, epsilons=(4.0, 8.0))
    real = module.run_in_memory
    runs = 0

    def stopped(*arguments: Any, **named: Any) -> Any:
        nonlocal runs
        runs += 1
        if runs == 2:
            assert list(options.out.glob("work-*")), "the cell at work has a folder of its own"
            raise KeyboardInterrupt
        return real(*arguments, **named)

    monkeypatch.setattr(module, "run_in_memory", stopped)
    with pytest.raises(KeyboardInterrupt):
        quietly(options)
    kept = list((options.out / "cells").iterdir())
    assert [json.loads(file.read_text())["epsilon"] for file in kept] == ["4.0"]
    assert not list(options.out.glob("work-*"))
    assert [row["epsilon"] for row in module.finished_rows(options)] == [4.0]
    after = quietly(options)
    assert (after["computed"], after["reused"]) == (1, 1)


@pytest.mark.slow
def test_a_torn_result_is_no_result(options: SimulationOptions) -> None:
    first = quietly(options)
    (cell,) = (options.out / "cells").iterdir()
    cell.write_bytes(cell.read_bytes()[:40])
    # What a killed process leaves beside it.
    (options.out / f"work-{cell.stem}").mkdir()
    again = quietly(options)
    assert again["computed"] == 1
    assert [lasting(row) for row in again["rows"]] == [lasting(row) for row in first["rows"]]
    assert not list(options.out.glob("work-*"))


def test_other_settings_or_records_are_other_cells(options: SimulationOptions, features: Path) -> None:
    def key(changed: SimulationOptions) -> str:
        (cell,) = module._grid(changed, module.Shared.read(changed))
        return cell.key

    first = key(options)
    assert key(options) == first
    others = {
        key(replace(options, rounds=3)),
        key(replace(options, epsilons=(4.0,))),
        key(replace(options, partitions=("quantity:1",))),
        key(replace(options, noises=("local",))),
        key(replace(options, sampling_rate=0.5)),
        key(replace(options, centre=f"{features}:text")),
    }
    write_features(features, seed=1)
    assert len({first, *others, key(options)}) == 8


@pytest.mark.slow
def test_a_seed_repeats_a_run_and_another_seed_does_not(options: SimulationOptions, tmp_path: Path) -> None:
    options = replace(options, epsilons=(1.0,), seeds=2)
    first, again = quietly(options), quietly(replace(options, out=tmp_path / "again"))
    assert [lasting(row) for row in first["rows"]] == [lasting(row) for row in again["rows"]]
    assert first["rows"][0]["class_counts"] != first["rows"][1]["class_counts"]


def test_class_counts_are_those_of_the_partition(options: SimulationOptions) -> None:
    result = quietly(replace(options, partitions=("dirichlet:0.5",)))
    ((name, counts),) = result["counts"].items()
    assert name == "dirichlet:0.5, seed 0"
    assert np.sum(list(counts.values()), axis=0).tolist() == [30, 30, 30]


def test_settings_are_read_from_the_same_file_as_a_real_run(options: SimulationOptions, tmp_path: Path) -> None:
    file = tmp_path / "settings.toml"
    file.write_text(
        'name = "ours"\n[privacy]\nmax_grad_norm = 0.2\n[rounds]\nprepared_rounds = 0\n'
        "[sites.north]\nmax_units = 1\n[sites.south]\nmax_units = 1\n[sites.west]\nmax_units = 1\n"
        '[sites.watcher]\nrole = "evaluate"\nevaluation_units = 1\n'
    )
    chosen = replace(options, federation=file)
    (cell,) = module._grid(chosen, module.Shared.read(chosen))
    assert cell.settings.declared_units() == {"north": 30, "south": 30, "west": 30}
    assert cell.settings.privacy.max_grad_norm == 0.2
    assert cell.settings.rounds.prepared_rounds == 0


@pytest.mark.slow
def test_a_settings_file_that_aligns_brings_its_target(
    options: SimulationOptions, features: Path, tmp_path: Path
) -> None:
    header = read_feature_header(features)
    rows = np.random.default_rng(9).normal(size=(20, header.dimension)).astype(np.float32)
    digest = write_target(tmp_path / "target.safetensors", rows, fingerprint=header.fingerprint)
    adapters = []
    for name, weight in (("plain", ""), ("aligned", f'[method.alignment]\nweight = 1.0\ntarget = "{digest}"\n')):
        file = tmp_path / f"{name}.toml"
        file.write_text('target_file = "target.safetensors"\n[method]\nname = "facmic"\nrounds = 2\n' + weight)
        given = replace(options, federation=file, methods=("facmic",), rounds=None, out=tmp_path / name)
        (row,) = quietly(given)["rows"]
        assert row["rounds"] == 2
        adapters.append((given.out / "adapters" / f"{row['cell']}.safetensors").read_bytes())
    assert adapters[0] != adapters[1]
    (tmp_path / "target.safetensors").unlink()
    with pytest.raises(FedsecureError):
        quietly(replace(given, out=tmp_path / "again"))


def test_steps_of_some_runs_are_steps_of_all() -> None:
    told: list[Step] = []
    here = module.among(told.append, 4, 10)
    here(Step(1, 3, "linear", round=2, rounds=5))
    assert told == [Step(5, 10, "linear", round=2, rounds=5)]


# --- no privacy, only by consent ------------------------------------------------------------------------------------


@pytest.fixture
def laid_out(tmp_path: Path, features: Path) -> Callable[[PolicyConfig], Path]:
    """A federation on disk, as ``fedsecure init`` makes it, whose sites have a policy."""

    def make(policy: PolicyConfig) -> Path:
        header = read_feature_header(features)
        names = ("north", "south", "west")
        encoder = EncoderConfig(
            model="features", pretrained="file", dimension=header.dimension, fingerprint=header.fingerprint
        )
        settings = parse_settings(
            {
                "classes": header.classes,
                "encoder": encoder.model_dump(),
                "method": {"rounds": 2},
                "privacy": {"unit": "record", "max_records_per_unit": 1},
                "sites": {name: SiteEntry(max_units=90).model_dump() for name in names},
            },
            tmp_path,
        )
        pool = read_pool(features, train=("train",), test="test", centre="none")
        rows = share_out(pool, names, partition="iid", seed=0)
        plans = {}
        for index, name in enumerate(names):
            train = write_site(pool, tmp_path / "data", name, rows=rows[name], turn=(index, 3))
            plans[name] = SitePlan(train=train, evaluation=None, policy=policy, encoder_file=train.path)
        return lay_out(tmp_path / "federation", settings, sites=plans, listen="x:1", hosts=("x",)).federation

    return make


OPEN = PolicyConfig(unit="record", max_epsilon=1e9, min_noise_multiplier=0.0)


@pytest.mark.slow
def test_a_laid_out_federation_runs_with_its_own_files(
    options: SimulationOptions, laid_out: Callable[[PolicyConfig], Path]
) -> None:
    file = laid_out(PolicyConfig(unit="record"))
    chosen = replace(options, features=None, federation=file)
    before = {path for path in file.parent.parent.rglob("*") if path.is_file()}
    result = quietly(chosen)
    assert result["rows"][0]["accuracy"] is None, "no site has an evaluation set"
    assert result["rows"][0]["epsilon_spent"] > 0
    # Ledgers and states of the real federation are not touched.
    assert {path for path in file.parent.parent.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    ("policy", "code"),
    [(PolicyConfig(unit="record"), "FS-1201"), (OPEN, "FS-1216")],
    ids=["the default policy", "all limits loosened but no consent"],
)
def test_without_privacy_is_refused(
    options: SimulationOptions, laid_out: Callable[[PolicyConfig], Path], policy: PolicyConfig, code: str
) -> None:
    chosen = replace(options, features=None, federation=laid_out(policy), epsilons=(math.inf,))
    with pytest.raises(PrivacyError, match=code):
        quietly(chosen)
    assert not list((options.out / "cells").iterdir())


def test_without_privacy_by_consent(options: SimulationOptions, laid_out: Callable[[PolicyConfig], Path]) -> None:
    policy = OPEN.model_copy(update={"no_privacy": True})
    chosen = replace(options, features=None, federation=laid_out(policy), epsilons=(math.inf,))
    (row,) = quietly(chosen)["rows"]
    assert row["epsilon_spent"] > 1e5
    assert "without privacy" in row["no_privacy"]


def test_a_token_of_noise_is_never_sampled() -> None:
    with pytest.raises(ValueError, match="no_privacy goes with"):
        PrivacyConfig(no_privacy="public data", sampling_rate=0.5)


def test_a_sampling_rate_is_that_of_the_private_runs(options: SimulationOptions, tmp_path: Path) -> None:
    """Over a settings file's own; where the grid goes on to ε = ∞, that run is not sampled."""
    file = tmp_path / "settings.toml"
    file.write_text("[privacy]\nsampling_rate = 0.2\n[sites.a]\n[sites.b]\n[sites.c]\n")
    options = replace(options, federation=file, epsilons=(8.0, float("inf")))
    for asked, rates in ((None, [0.2, 1.0]), (0.5, [0.5, 1.0])):
        chosen = replace(options, sampling_rate=asked)
        cells = module._grid(chosen, module.Shared.read(chosen))
        assert [cell.settings.privacy.sampling_rate for cell in cells] == rates


# --- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"sites": 2}, "FS-1003"),
        ({"seeds": 0}, "FS-1003"),
        ({"epsilons": (0.0,)}, "FS-1003"),
        ({"epsilons": (float("nan"),)}, "FS-1003"),
        ({"epsilons": (1.0, 1.0)}, "FS-1003"),
        ({"sampling_rate": 0.0}, "FS-1003"),
        ({"sampling_rate": 1.5}, "FS-1003"),
        ({"methods": ()}, "FS-1003"),
        ({"methods": ("nothing",)}, "FS-1004"),
        ({"partitions": ("stripes",)}, "FS-1010"),
        ({"partitions": ("dirichlet:much",)}, "FS-1010"),
        ({"partitions": ("dirichlet:-1",)}, "FS-1130"),
        ({"train": ("train", "test")}, "FS-1010"),
        ({"test": "exam"}, "FS-1114"),
        ({"centre": "nothing"}, "FS-1010"),
        ({"features": None}, "FS-1010"),
    ],
)
def test_bad_requests_are_refused_before_anything_is_written(
    options: SimulationOptions, changes: dict[str, Any], code: str
) -> None:
    with pytest.raises((ConfigError, DataError), match=code):
        quietly(replace(options, **changes))
    assert not options.out.exists()


def test_a_folder_of_somebody_else_is_left_alone(options: SimulationOptions) -> None:
    options.out.mkdir()
    (options.out / "thesis.txt").write_text("years of work")
    with pytest.raises(ConfigError, match="FS-1009"):
        quietly(options)
    assert [path.name for path in options.out.iterdir()] == ["thesis.txt"]


# --- tables ---------------------------------------------------------------------------------------------------------


def test_means_over_seeds(tmp_path: Path) -> None:
    common = {"method": "m", "partition": "iid", "noise": "local", "sites": 3, "bytes_up": 2_000_000, "rounds": 1}
    rows = [
        {**common, "epsilon": epsilon, "seed": seed, "zero_shot": 0.5, "accuracy": 0.6 + 0.1 * seed}
        | {"balanced_accuracy": None, "epsilon_spent": 1.0, "wall_seconds": 2.0, "cell": "c"}
        for epsilon in (1.0, math.inf)
        for seed in (0, 1)
    ]
    one, without = summarise(rows)
    assert (one["seeds"], one["epsilon"], without["epsilon"]) == (2, 1.0, math.inf)
    assert one["accuracy"] == pytest.approx(0.65)
    assert one["accuracy_std"] == pytest.approx(0.1 / math.sqrt(2))
    assert "| m | iid | local | 3 | ∞ | 2 | 50.0 ± 0.0 | 65.0 ± 7.1 | – | 2.00 | 2.0 |" in to_markdown([one, without])
    assert to_csv(rows).splitlines()[-1] == "m,iid,local,3,inf,1,0.5,0.7,,1.0,1,2000000,2.0,c"
    pytest.importorskip("matplotlib")
    assert plot([one, without], tmp_path / "plot.png")
