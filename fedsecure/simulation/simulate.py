"""``fedsecure simulate``: any installed method over a grid of settings, each cell a whole run in memory.

A cell's name is a hash of all that decides its result: settings, records, partition, seed and release. Its result file
is written last and whole, so a cell is finished or it is not, and a simulation that is started again goes on with what
is missing.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from fedsecure.config import RunSettings
from fedsecure.errors import ConfigError
from fedsecure.extras import require
from fedsecure.files import make_folder, write_whole
from fedsecure.learning.encoding import Encoded, pace
from fedsecure.simulation.memory import run_in_memory
from fedsecure.simulation.placing import LaidOut, Placed, Shared, Variant
from fedsecure.simulation.tables import plot, summarise, to_csv, to_markdown

if TYPE_CHECKING:
    from fedsecure.vision.encoder import Progress

MARKER = ".fedsecure-simulation"


@dataclass(frozen=True, slots=True)
class SimulationOptions:
    """What the command line may choose; see ``fedsecure simulate --help``."""

    out: Path
    methods: tuple[str, ...] = ("linear",)
    federation: Path | None = None
    features: Path | None = None
    sites: int = 5
    partitions: tuple[str, ...] = ("iid",)
    epsilons: tuple[float, ...] = (0.5, 1.0, 2.0, 4.0, 8.0, math.inf)
    noises: tuple[str, ...] = ("distributed",)
    seeds: int = 3
    delta: float = 1e-5
    rounds: int | None = None
    local_steps: int = 1
    sampling_rate: float | None = None
    colluders: int | None = None
    min_survivors: int | None = None
    train: tuple[str, ...] = ("train",)
    test: str = "test"
    centre: str = "file"


@dataclass(frozen=True, slots=True)
class Cell:
    """One run of the grid.

    Attributes:
        variant: what distinguishes it from its neighbours.
        settings: of the run, public.
        records: hash of the records and of how they are shared out.
    """

    variant: Variant
    settings: RunSettings
    records: str

    @property
    def key(self) -> str:
        """32 hexadecimal digits."""
        from fedsecure import __version__

        facts = [__version__, self.settings.canonical(), self.records, self.variant.partition, self.variant.seed]
        return hashlib.sha256(b"fedsecure/cell/v1\0" + json.dumps(facts).encode()).hexdigest()[:32]


@dataclass(frozen=True, slots=True)
class Step:
    """A sign of progress: cells finished and to do, and where the cell at work is, with what else is to be said."""

    done: int
    cells: int
    what: str
    round: int = 0
    rounds: int = 0
    note: str = ""


Watch = Callable[[Step], None]


class Source(Protocol):
    """Where a simulation's federation comes from."""

    def cell(self, variant: Variant) -> tuple[RunSettings, str]:
        """The run's settings, and a hash of its records."""

    def place(self, folder: Path, variant: Variant, settings: RunSettings) -> Placed:
        """Lay the federation out in an empty folder."""


def simulate(options: SimulationOptions, *, watch: Watch) -> dict[str, Any]:
    """Run what is missing, and write tables and plot of all cells.

    Args:
        options: see :class:`SimulationOptions`.
        watch: called as cells and rounds pass.

    Returns:
        ``rows`` one a cell, ``summary`` over seeds, ``counts`` of each site's classes by partition and seed (known to
        whoever simulates, and to nobody in a real federation), ``computed`` and ``reused`` numbers of cells, and the
        paths ``csv``, ``markdown`` and ``plot`` (``None`` without matplotlib).

    Raises:
        ConfigError: FS-1003, FS-1004, FS-1009, FS-1010 as for a demo.
        FedsecureError: of the first run that fails; finished cells stay.
    """
    require("torch")
    source = _source(options)
    cells = _grid(options, source)
    out = open_results(options.out)
    rows, reused = [], 0
    for done, cell in enumerate(cells):
        what = str(cell.variant)
        row = read_row(out, cell.key)
        if row is None:
            row = _run(out, source, cell, at=Step(done, len(cells), what), watch=watch)
        else:
            reused += 1
        rows.append(row)
        watch(Step(done + 1, len(cells), what))
    summary = summarise(rows)
    image = out / "accuracy.png"
    paths = {"csv": out / "results.csv", "markdown": out / "results.md", "plot": image}
    write_whole(paths["csv"], to_csv(rows).encode())
    write_whole(paths["markdown"], to_markdown(summary).encode())
    drawn = plot(summary, image)
    counts = {f"{row['partition']}, seed {row['seed']}": row["class_counts"] for row in rows if row["class_counts"]}
    return {
        "rows": rows,
        "summary": summary,
        "counts": counts,
        "computed": len(cells) - reused,
        "reused": reused,
        **{name: str(path) if name != "plot" or drawn else None for name, path in paths.items()},
    }


def planned_cells(options: SimulationOptions) -> list[Cell]:
    """Every cell of the grid; nothing is run or written. Raises as :func:`simulate`."""
    return _grid(options, _source(options))


def finished_rows(options: SimulationOptions) -> list[dict[str, Any]]:
    """The rows of those cells that are finished; nothing is run or written. Raises as :func:`simulate`."""
    rows = (read_row(options.out, cell.key) for cell in planned_cells(options))
    return [row for row in rows if row is not None]


def _source(options: SimulationOptions) -> Source:
    return LaidOut.read(options) if options.features is None else Shared.read(options)


def listed(text: str) -> tuple[str, ...]:
    """``a,b`` as two names."""
    return tuple(name.strip() for name in text.split(",") if name.strip())


def numbers(option: str, text: str) -> tuple[float, ...]:
    """``0.5,inf`` as two numbers above 0. Raises ConfigError FS-1003."""
    try:
        found = tuple(float(part) for part in listed(text))
    except ValueError as error:
        raise _refused(option, text, "numbers with commas between them, or inf") from error
    if not all(number > 0 for number in found):
        raise _refused(option, text, "numbers above 0, or inf for a run without privacy")
    return found


def _grid(options: SimulationOptions, source: Source) -> list[Cell]:
    """Every cell, its privacy plan found possible, before anything is written."""
    from fedsecure.methods.cohorts import cohort_of
    from fedsecure.methods.registry import load_training_method

    for name, values in (("--method", options.methods), ("--epsilon", options.epsilons), ("--noise", options.noises)):
        if not values or len(set(values)) != len(values):
            raise _refused(name, values, "one value or more, each once")
    if options.seeds < 1:
        raise _refused("--seeds", options.seeds, "1 or more")
    if any(not epsilon > 0 for epsilon in options.epsilons):
        raise _refused("--epsilon", options.epsilons, "numbers above 0, or inf for a run without privacy")
    cells = []
    grid = product(options.methods, options.partitions, options.noises, options.epsilons, range(options.seeds))
    for method, partition, noise, epsilon, seed in grid:
        variant = Variant(method=method, partition=partition, noise=noise, epsilon=epsilon, seed=seed)
        settings, records = source.cell(variant)
        _, cohort = cohort_of(settings, trainers_only=True)
        load_training_method(method).plan(settings, cohort)
        cells.append(Cell(variant, settings, records))
    return cells


def _refused(option: str, value: object, expected: str) -> ConfigError:
    return ConfigError("FS-1003", f"{option} = {value}", expected=expected, cure="see fedsecure simulate --help")


def open_results(out: Path) -> Path:
    """A new folder of results, or one that is continued. Raises ConfigError FS-1009."""
    if out.exists() and not (out / MARKER).exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(
            "FS-1009",
            f"{out} is not empty and no simulation made it",
            expected="a new folder, or one of an earlier simulation, which is then continued",
            cure="name another folder with --out",
        )
    for folder in (out, out / "cells", out / "reports", out / "adapters"):
        make_folder(folder)
    write_whole(out / MARKER, b"made by `fedsecure simulate`; continued by the next one\n")
    return out


def in_cell(watch: Watch, done: int, cells: int, what: str) -> Callable[[int, int], None]:
    """What a cell calls with (round, rounds): a :class:`Step` of it."""
    return lambda round, rounds: watch(Step(done, cells, what, round=round, rounds=rounds))


def encoding_steps(watch: Watch) -> Callable[[str, int, int], None]:
    """What is called with (name, images done, all) while images are encoded: a :class:`Step` with images a second."""

    def tell(far: Encoded) -> None:
        watch(Step(0, 1, f"encoding {far.name}", round=far.done, rounds=far.count, note=far.counted))

    paces: dict[str, Progress] = {}

    def show(name: str, done: int, count: int) -> None:
        paces.setdefault(name, pace(tell, name, every=0))(done, count)

    return show


def among(watch: Watch, before: int, cells: int) -> Watch:
    """Steps of some cells as steps of all ``cells``, of which ``before`` are done already."""
    return lambda step: watch(replace(step, done=before + step.done, cells=cells))


def read_row(out: Path, key: str) -> dict[str, Any] | None:
    """The result of a finished cell; None for one that is not finished, or torn."""
    try:
        row: dict[str, Any] = json.loads((out / "cells" / f"{key}.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return {**row, "epsilon": float(row["epsilon"])}


def write_row(out: Path, key: str, row: Mapping[str, Any]) -> None:
    """Keep the result of a cell: the last thing that is written of it, and whole."""
    # JSON has no infinity.
    kept = {**row, "epsilon": str(row["epsilon"])}
    write_whole(out / "cells" / f"{key}.json", json.dumps(kept, indent=1).encode())


def _run(out: Path, source: Source, cell: Cell, *, at: Step, watch: Watch) -> dict[str, Any]:
    """One cell; its report first, its result last."""
    from fedsecure.privacy.report import network_report

    work = out / f"work-{cell.key}"
    shutil.rmtree(work, ignore_errors=True)
    try:
        placed = source.place(make_folder(work), cell.variant, cell.settings)
        ended = run_in_memory(
            placed.federation,
            placed.sites,
            seed=cell.variant.seed,
            watch=lambda round, rounds: watch(replace(at, round=round, rounds=rounds)),
            encoding=lambda far: watch(replace(at, note=f"encoding {far.counted}")),
        )
        report = network_report(list(ended.reports.values()))
        row = {**_row(cell, report, placed.class_counts), "bytes_up": max(ended.bytes_up.values())}
        row["wall_seconds"] = round(ended.wall_seconds, 2)
        write_whole(out / "reports" / f"{cell.key}.json", json.dumps(report, indent=1, sort_keys=True).encode())
        (adapter, *_) = placed.sites[min(placed.sites)].state.glob("runs/*/adapter.safetensors")
        shutil.copyfile(adapter, out / "adapters" / f"{cell.key}.safetensors")
        write_row(out, cell.key, row)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return row


def _row(cell: Cell, report: Mapping[str, Any], counts: Mapping[str, Any]) -> dict[str, Any]:
    accuracy = report["accuracy"] or {}
    before, after = (accuracy.get(stage) or {} for stage in ("before", "after"))
    settings = cell.settings
    return {
        "method": cell.variant.method,
        "partition": cell.variant.partition,
        "noise": cell.variant.noise,
        "sites": len(settings.declared_units()),
        "epsilon": cell.variant.epsilon,
        "seed": cell.variant.seed,
        "zero_shot": before.get("accuracy"),
        "accuracy": after.get("accuracy"),
        "balanced_accuracy": after.get("balanced_accuracy"),
        "epsilon_spent": report["epsilon"],
        "rounds": settings.method.rounds,
        "no_privacy": settings.privacy.no_privacy,
        "class_counts": counts,
        "cell": cell.key,
    }
