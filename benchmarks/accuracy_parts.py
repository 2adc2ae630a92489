"""Runs that make up a table of examples/results/facmic.md: of ``fedsecure simulate``, of sites alone, of an example."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, Protocol

from benchmarks.accuracy_recorded import recorded_rows, take_cells
from fedsecure.simulation import alone
from fedsecure.simulation.folders import from_pool
from fedsecure.simulation.pool import read_pool
from fedsecure.simulation.simulate import (
    SimulationOptions,
    Step,
    finished_rows,
    listed,
    open_results,
    read_row,
    simulate,
)

Row = dict[str, Any]
Watch = Callable[[Step], None]


class Part(Protocol):
    """Some of a table's runs."""

    @property
    def cells(self) -> int: ...

    def run(self, watch: Watch) -> list[Row]:
        """Their rows; what is finished is read."""

    def finished(self) -> list[Row]:
        """Rows of what is finished; nothing is run."""

    def take(self, rows: Sequence[Row]) -> list[Row] | None:
        """Take recorded runs as finished; returns the rows where all are recorded, so that none has to be run."""


@dataclass(frozen=True, slots=True)
class Federated:
    """Runs of ``fedsecure simulate``."""

    options: SimulationOptions

    @property
    def cells(self) -> int:
        o = self.options
        return len(o.methods) * len(o.partitions) * len(o.noises) * len(o.epsilons) * o.seeds

    def run(self, watch: Watch) -> list[Row]:
        rows: list[Row] = simulate(self.options, watch=watch)["rows"]
        return rows

    def finished(self) -> list[Row]:
        return finished_rows(self.options)

    def take(self, rows: Sequence[Row]) -> None:
        take_cells(self.options, rows)


@dataclass(frozen=True, slots=True)
class Alone:
    """Every site by itself."""

    name: str
    options: SimulationOptions

    @property
    def cells(self) -> int:
        return len(self.options.epsilons) * self.options.seeds

    def run(self, watch: Watch) -> list[Row]:
        o = self.options
        assert o.features is not None
        (partition,), kept = o.partitions, open_results(o.out)
        pool = read_pool(o.features, train=o.train, test=o.test, centre=o.centre)
        names = [f"site-{index + 1}" for index in range(o.sites)]
        rows = []
        for done, (epsilon, seed) in enumerate(product(o.epsilons, range(o.seeds))):
            watch(Step(done, self.cells, f"{self.name}, {partition}, ε = {epsilon:g}, seed {seed}"))
            experiment = from_pool(pool, names, partition=partition, seed=seed)
            rows.append(
                alone.run_alone(
                    experiment, self.name, out=kept, epsilon=epsilon, seed=seed, delta=o.delta, partition=partition
                )
            )
        return rows

    def finished(self) -> list[Row]:
        o = self.options
        kept = (read_row(o.out, file.stem) for file in sorted((o.out / "cells").glob("*.json")))
        return [row for row in kept if row and row["method"] == self.name and row["partition"] in o.partitions]

    def take(self, rows: Sequence[Row]) -> list[Row] | None:
        own = [row for row in rows if row["method"] == self.name and row["partition"] in self.options.partitions]
        return own if len(own) == self.cells else None


@dataclass(frozen=True, slots=True)
class Example:
    """A run of ``examples/facmic.py``, in a process of its own; its rows are those of its CSV file."""

    given: Mapping[str, str]
    out: Path

    @property
    def command(self) -> list[str]:
        # An empty value is a flag.
        return ["examples/facmic.py", *(part for item in self.given.items() for part in item if part)]

    @property
    def cells(self) -> int:
        return len(listed(self.given["--method"])) * len(listed(self.given["--epsilon"])) * int(self.given["--seeds"])

    def run(self, watch: Watch) -> list[Row]:
        watch(Step(0, self.cells, " ".join(self.command)))
        subprocess.run([sys.executable, *self.command, "--out", str(self.out)], check=True, stdout=sys.stderr)
        return self.finished()

    def finished(self) -> list[Row]:
        return recorded_rows(self.out, "results")

    def take(self, rows: Sequence[Row]) -> list[Row] | None:
        own = [row for row in rows if row["method"] in listed(self.given["--method"])]
        return own if len(own) == self.cells else None


@dataclass(frozen=True, slots=True)
class Recorded:
    """Runs that are all recorded."""

    rows: Sequence[Row]

    @property
    def cells(self) -> int:
        return len(self.rows)

    def run(self, watch: Watch) -> list[Row]:
        return self.finished()

    def finished(self) -> list[Row]:
        return list(self.rows)

    def take(self, rows: Sequence[Row]) -> None:
        return None
