"""The aggregator under load: many sites at once over real gRPC and mutual TLS, and its memory over many rounds.

    python -m benchmarks.aggregator [--json] [--quick] [--only NAME,…]

``--quick`` runs the same code with few sites and short vectors: a test of the benchmark, no measurement. Aggregator,
sites and the third process that watches share this machine's processors; every figure depends on how many are free.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.aggregator_case import Case, measure
from benchmarks.secagg import Progress

FULL = {
    "sites1000_d1e5": Case(1000, classes=100, dimension=1000, rounds=4, warm_up=1),
    "sites100_d1e6": Case(100, classes=100, dimension=10_000, rounds=9, warm_up=1),
    "soak200": Case(20, classes=10, dimension=1000, rounds=210, warm_up=10, released=True),
}
QUICK = {
    "sites1000_d1e5": Case(130, classes=10, dimension=20, rounds=2, warm_up=1),
    "sites100_d1e6": Case(6, classes=100, dimension=1000, rounds=3, warm_up=1),
    "soak200": Case(4, classes=10, dimension=100, rounds=6, warm_up=2, released=True),
}
FIGURES = ("rounds_per_minute", "p50_ms", "p99_ms", "rss_mb", "cpu_s", "rss_first_mb", "rss_last_mb")


def table(result: dict[str, Any]) -> Table:
    """The figures, a column a case."""
    names = [name for name in result if name != "about"]
    rows = Table("figure", *names, title="The aggregator under load")
    for figure in FIGURES:
        rows.add_row(figure, *(f"{result[name][figure]:.4g}" for name in names))
    rows.add_row("greet p50 / p99 ms", *("{p50_ms:.3g} / {p99_ms:.3g}".format(**result[n]["greet_ms"]) for n in names))
    return rows


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.aggregator", description="The aggregator under load.")
    parser.add_argument("--json", action="store_true", help="print one JSON object, nothing else, on stdout")
    parser.add_argument("--quick", action="store_true", help="few sites: tests the benchmark, measures nothing")
    parser.add_argument("--only", metavar="NAME,…", default="", help="some of " + ", ".join(FULL))
    options = parser.parse_args(arguments)
    names = options.only.split(",") if options.only else list(FULL)
    if unknown := set(names) - set(FULL):
        parser.error(f"--only: no {', '.join(sorted(unknown))}; there are {', '.join(FULL)}")
    progress, start = Progress(), time.monotonic()
    cases = QUICK if options.quick else FULL
    result: dict[str, Any] = {name: measure(cases[name], progress=progress) for name in names}
    result["about"] = {"seconds": time.monotonic() - start, "cores": os.cpu_count(), "load": os.getloadavg()}
    progress.end()
    if options.json:
        print(json.dumps(result, indent=2))
    else:
        Console().print(table(result))


if __name__ == "__main__":
    main()
