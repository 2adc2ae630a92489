"""Speed, memory and bytes of secure aggregation, and Flower's masking beside it where ``flwr`` is installed.

    python -m benchmarks.secagg [--json] [--quick] [--masks] [--flower PYTHON]

``--quick`` runs the same code on small cases: a test of the benchmark, no measurement. ``--masks`` measures only the
masking of a vector by one worker. Without Flower its figures are
null. ``--flower`` names the interpreter of another environment that has it, for Flower and fedsecure do not always
agree on the version of a common dependency.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks import secagg_masks, secagg_server, secagg_wire


@dataclass(frozen=True)
class Sizes:
    """What is measured; the names of the results are the same in both."""

    masks: dict[str, tuple[int, int, int]]  # length, peers, repeats
    servers: dict[str, tuple[int, int]]  # sites, length
    wire: tuple[int, tuple[int, ...]]
    flower_repeats: int = 3
    server_repeats: int = 2


FULL = Sizes(
    masks={"d1e6_k10": (10**6, 10, 100), "d1e6_k50": (10**6, 50, 30), "d1e7_k10": (10**7, 10, 25)},
    servers={"n100_d1e6": (100, 10**6), "n500_d1e5": (500, 10**5)},
    wire=(100, (526_336, 10**6)),
)
QUICK = Sizes(
    masks={"d1e6_k10": (10**4, 10, 3), "d1e6_k50": (10**4, 50, 3), "d1e7_k10": (10**5, 10, 3)},
    servers={"n100_d1e6": (10, 10**3), "n500_d1e5": (20, 10**3)},
    wire=(100, (1000,)),
    flower_repeats=1,
    server_repeats=1,
)


def masks(sizes: Sizes, *, flower: str, progress: Callable[[str], None]) -> dict[str, Any]:
    """The figures of one worker; ``flower`` is the interpreter that Flower runs under."""
    result = {}
    for name, (length, peers, repeats) in sizes.masks.items():
        progress(f"mask: {length} words, {peers} peers")
        times = {"repeats": repeats, "flower_repeats": sizes.flower_repeats}
        result[name] = secagg_masks.measure(length, peers, python=flower, **times)
    return {"mask": result}


def run(sizes: Sizes, *, flower: str, progress: Callable[[str], None]) -> dict[str, Any]:
    """All figures."""
    result = {**masks(sizes, flower=flower, progress=progress), "mask_two_workers": {}, "server": {}}
    length, peers, repeats = sizes.masks["d1e7_k10"]
    progress("mask: two workers")
    result["mask_two_workers"]["d1e7_k10"] = secagg_masks.measure_two(length, peers, repeats=2 * repeats)
    peaks = []
    for name, (sites, length) in sizes.servers.items():
        seconds, peak = secagg_server.measure(sites, length, repeats=sizes.server_repeats, progress=progress)
        result["server"][name] = dict(sorted(seconds.items()))
        peaks.append(peak)
    result["wire"] = secagg_wire.measure(*sizes.wire, progress=progress)
    result["peak_rss_mb"] = max(peaks)
    return result


def table(result: dict[str, Any]) -> Table:
    """The figures beside their targets."""
    rows = Table("figure", "value", "target", title="Secure aggregation")

    def add(name: str, value: float | None, unit: str, target: str = "") -> None:
        rows.add_row(name, "not measured" if value is None else f"{value:.4g} {unit}".strip(), target)

    for name, mask in result["mask"].items():
        add(f"mask {name}", mask["ms"], "ms")
        add("  AES-256-CTR floor of one core", mask["aes_floor_ms"], "ms")
        add("  share of the floor", 100 * mask["of_floor"], "%", "≥ 80 %")
        add("  Flower SecAgg+", mask["flwr_ms"], "ms")
        add("  times faster than Flower", mask["vs_flwr"], "", "≥ 5")
    if len(result) == 1:
        return rows
    add("two workers d1e7_k10, times one", result["mask_two_workers"]["d1e7_k10"]["speedup"], "", "≥ 1.4")
    targets = {("n500_d1e5", "drop10_s"): "< 4 s", ("n500_d1e5", "drop30_s"): "< 8 s"}
    for name, seconds in result["server"].items():
        for rate, value in seconds.items():
            add(f"server {name} {rate.removesuffix('_s')}", value, "s", targets.get((name, rate), ""))
    for name, ratio in result["wire"].items():
        add(f"bytes up over 4·d, {name}", ratio, "", "≤ 1.02" if name.endswith("b32") else "≤ 0.52")
    add("peak memory of the aggregator", result["peak_rss_mb"], "MB")
    return rows


class Progress:
    """One line on stderr, written over and over; at most ten times a second, and only for a person."""

    def __init__(self) -> None:
        self._shown = 0.0

    def __call__(self, text: str) -> None:
        if not sys.stderr.isatty() or time.monotonic() - self._shown < 0.1:
            return
        self._shown = time.monotonic()
        print(f"\r\x1b[2K{text}", end="", file=sys.stderr, flush=True)

    def end(self) -> None:
        """Clear the line."""
        if self._shown:
            print("\r\x1b[2K", end="", file=sys.stderr, flush=True)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.secagg", description="Speed of secure aggregation.")
    parser.add_argument("--json", action="store_true", help="print one JSON object, nothing else, on stdout")
    parser.add_argument("--quick", action="store_true", help="small cases: tests the benchmark, measures nothing")
    parser.add_argument("--masks", action="store_true", help="only the masking of a vector by one worker")
    parser.add_argument("--flower", metavar="PYTHON", default=sys.executable, help="interpreter that has flwr")
    options = parser.parse_args(arguments)
    if shutil.which(options.flower) is None:
        parser.error(f"--flower: {options.flower!r} is no program; name a Python interpreter")
    progress = Progress()
    measure = masks if options.masks else run
    result = measure(QUICK if options.quick else FULL, flower=options.flower, progress=progress)
    progress.end()
    if options.json:
        print(json.dumps(result, indent=2))
    else:
        Console().print(table(result))


if __name__ == "__main__":
    main()
