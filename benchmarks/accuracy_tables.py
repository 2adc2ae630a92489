"""Which runs make up each table of examples/results/facmic.md: data, methods, partitions, noises, ε and seeds."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.accuracy_ablation import Ablation, lines
from benchmarks.accuracy_images import Alignment, ImageAblation, Views
from benchmarks.accuracy_parts import Alone, Example, Federated, Part, Recorded, Row
from benchmarks.accuracy_recorded import as_recorded
from benchmarks.accuracy_towers import Towers
from fedsecure.methods.registry import load_training_method
from fedsecure.simulation.simulate import SimulationOptions

INF = math.inf
EPSILONS = (0.5, 1.0, 2.0, 4.0, 8.0, INF)
FEW = (1.0, 8.0, INF)
SEEDS = 5
SKEWS = ("dirichlet:0.1", "dirichlet:0.5", "quantity:0.5")


@dataclass(frozen=True, slots=True)
class Table:
    """One table of the page.

    Attributes:
        slug: its place on the page, and the name of its files.
        title: what it shows.
        parts: its runs.
        label: the columns of a row that tell its lines apart.
        pairs: pairs of lines whose difference is shown, seed by seed.
        drawn: whether a plot is made.
        columns: scores shown, a line an ε; without it there is a column an ε.
        compared: those of ``columns`` in which pairs are compared; all of them where empty.
        lines: what makes lines of rows where neither fits.
        recorded: runs that keep their figures; see :meth:`growing`.
    """

    slug: str
    title: str
    parts: tuple[Part, ...]
    label: tuple[str, ...] = ("method",)
    pairs: tuple[tuple[str, str], ...] = ()
    drawn: bool = False
    columns: Mapping[str, str] | None = None
    compared: tuple[str, ...] = ()
    lines: Callable[[Sequence[Row]], Iterable[str]] | None = None
    recorded: Sequence[Row] = ()

    @property
    def cells(self) -> int:
        return sum(part.cells for part in self.parts)

    def finished(self) -> list[Row]:
        """Rows of what is finished; nothing is run."""
        return as_recorded([row for part in self.parts for row in part.finished()], self.recorded)

    def growing(self, rows: Sequence[Row]) -> Table:
        """The table with its recorded runs taken as finished."""
        taken = ((part, part.take(rows)) for part in self.parts)
        parts = tuple(part if whole is None else Recorded(whole) for part, whole in taken)
        return replace(self, parts=parts, recorded=rows)


def settings(data: Path, out: Path, name: str, **changes: Any) -> SimulationOptions:
    """Five sites, IID, distributed noise, every site needed, one colluding; ``train`` and ``val`` records."""
    ucf = name == "ucf101"
    file = data / ("ucf101_clip_vitb32.npz" if ucf else "caltech_clip_vitb32.npz")
    standing: dict[str, Any] = {
        "features": file,
        "sites": 5,
        "min_survivors": 5,
        "colluders": 1,
        "train": ("train", "val"),
        # UCF101's prior is one public image a class, so that its mean is a public mean of image features.
        "centre": f"{file}:text" if ucf else "none",
        "epsilons": EPSILONS,
        "seeds": SEEDS,
    }
    return SimulationOptions(out=out, **{**standing, **changes})


def noises_of(method: str) -> tuple[str, ...]:
    """Local noise for a method that knows no other."""
    return ("local",) if getattr(load_training_method(method), "local_only", "") else ("distributed",)


def of_methods(data: Path, out: Path, *, methods: Sequence[str], epsilons: Sequence[float], seeds: int) -> list[Table]:
    """A table of any installed methods on both sets of features. Raises ConfigError FS-1004."""

    def part(name: str, method: str) -> Federated:
        return Federated(
            settings(
                data, out / f"{name}-iid-{method}", name, methods=(method,), noises=noises_of(method),
                epsilons=tuple(epsilons), seeds=seeds,
            )
        )  # fmt: skip

    return [
        Table(f"{name}-methods", f"{name}, IID", tuple(part(name, method) for method in methods))
        for name in ("ucf101", "caltech101")
    ]


def tables(data: Path, out: Path) -> list[Table]:
    """All tables of the page, the shortest runs first."""

    def on(name: str, folder: str, **changes: Any) -> Federated:
        return Federated(settings(data, out / f"{name}-{folder}", name, **changes))

    def ucf(folder: str, method: str, **changes: Any) -> Federated:
        return on("ucf101", f"{folder}-{method}", methods=(method,), **changes)

    def caltech(folder: str, **changes: Any) -> Federated:
        return on("caltech101", f"{folder}-linear", methods=("linear",), **changes)

    def by_itself(*partition: str) -> Alone:
        options = settings(data, out / "ucf101-alone", "ucf101", epsilons=FEW, seeds=SEEDS, partitions=partition)
        return Alone("local-only-linear", options)

    three = {"sites": 3, "min_survivors": 3}
    averaged = {"noises": ("local",), "rounds": 10, "local_steps": 5, "partitions": ("iid", SKEWS[0])}
    ucf_file, slices = data / "ucf101_clip_vitb32.npz", data / "brain-tumor"
    scans = out / "scans"
    folders = {
        "--data": str(data / "brain-tumor"),
        "--origins": str(data / "brain-tumor" / "manifest.csv"),
        "--epsilon": "0.5,1,2,4,8,inf",
        "--seeds": "5",
    }
    released = {**folders, "--epsilon": "inf", "--seeds": "1", "--transductive": ""}
    others = ("probe", "fedfocal", "fedavg", "fedprox", "moon")
    private = ("linear", "facmic", "fedclip", "bottleneck", "prototypes", "ridge", "local-only-linear")
    scores = {
        "raw-394": "accuracy raw",
        "balanced": "balanced accuracy raw",
        "clean-250": "accuracy clean",
        "balanced, clean": "balanced accuracy clean",
        **{f"own, {site}": f"accuracy {site}" for site in ("client_0", "client_1", "client_2")},
    }
    best = {"best round, raw": "best-round accuracy raw", "best round, clean": "best-round accuracy clean"}
    return [
        Table(
            "caltech101-iid",
            "Caltech101 features, five sites, IID, distributed noise",
            (
                on("caltech101", "iid-linear", methods=("linear",)),
                on("caltech101", "iid-facmic", methods=("facmic",)),
            ),
            pairs=(("facmic", "linear"),),
            drawn=True,
        ),
        Table(
            "caltech101-skew",
            "Caltech101 features: skew of labels and sizes, local noise, three sites, linear head",
            (
                caltech("iid"),
                caltech("skew", partitions=SKEWS),
                caltech("local", noises=("local",), partitions=("iid", *SKEWS)),
                caltech("three", **three),
                caltech("three-skew", partitions=SKEWS, **three),
                caltech("three-local", noises=("local",), partitions=("iid", *SKEWS), **three),
            ),
            label=("sites", "noise", "partition"),
        ),
        Table(
            "brain-tumor-released",
            "BT slices, tiny CLIP, the released training, not private",
            (
                Example(
                    {**released, "--method": "reference,reference-adapted,reference-adapted-with-gradient"},
                    out / "brain-tumor",
                ),
                Example({**released, "--method": "reference-fedclip,reference-local"}, out / "brain-tumor-beside"),
            ),
            columns={**scores, **best},
        ),
        Table(
            "brain-tumor-private",
            "BT slices, tiny CLIP, private methods",
            (
                Example({**folders, "--method": ",".join(private)}, out / "brain-tumor-private"),
                Example({**folders, "--method": "facmic-aligned", "--transductive": ""}, out / "brain-tumor-aligned"),
                Example({**folders, "--method": ",".join(others)}, out / "brain-tumor-others"),
            ),
            pairs=(("facmic", "linear"), ("facmic-aligned", "facmic")),
            columns=scores,
            compared=tuple(name for name in scores if not name.startswith("balanced")),
        ),
        Table(
            "brain-tumor-halves",
            "BT slices, tiny CLIP: aligned with half of the test images, tested on both halves",
            (
                Example(
                    {**folders, "--method": "facmic,facmic-aligned", "--halves": "", "--epsilon": "0.5,1,8,inf"},
                    out / "brain-tumor-halves",
                ),
            ),
            columns={
                f"{half}{clean}": f"accuracy {half}{clean}" for half in ("seen", "unseen") for clean in ("", ", clean")
            },
            pairs=(("facmic-aligned", "facmic"),),
        ),
        Table(
            "ucf101-baselines",
            "UCF101 features, five sites, IID: what else there is",
            (
                ucf("iid", "linear", epsilons=FEW),
                ucf("iid", "facmic", epsilons=FEW),
                *(
                    ucf("iid", method, epsilons=FEW)
                    for method in ("prototypes", "ridge", "probe", "fedfocal", "bottleneck")
                ),
                ucf("iid", "fedclip", epsilons=FEW, rounds=60),
                by_itself("iid"),
            ),
        ),
        Table(
            "ucf101-skew",
            "UCF101 features, five sites: skew of labels and sizes, distributed and local noise",
            (
                ucf("iid", "linear"),
                ucf("skew", "linear", partitions=SKEWS),
                ucf("local", "linear", noises=("local",), partitions=("iid", *SKEWS)),
                ucf("iid", "facmic"),
                ucf("skew", "facmic", partitions=SKEWS),
                ucf("local", "facmic", noises=("local",)),
                by_itself("iid"),
                by_itself(SKEWS[0]),
            ),
            label=("method", "noise", "partition"),
        ),
        Table(
            "ucf101-local",
            "UCF101 features, five sites: ten rounds of five local steps, local noise",
            tuple(ucf("averaging", method, epsilons=FEW, **averaged) for method in ("fedavg", "fedprox", "moon")),
            label=("method", "partition"),
            pairs=(
                ("fedavg, dirichlet:0.1", "fedavg, iid"),
                ("fedprox, dirichlet:0.1", "fedavg, dirichlet:0.1"),
                ("moon, dirichlet:0.1", "fedavg, dirichlet:0.1"),
            ),
        ),
        Table(
            "ucf101-three-sites",
            "UCF101 features, three sites",
            (
                ucf("three", "linear", **three),
                ucf("three-skew", "linear", partitions=SKEWS, **three),
                ucf("three-local", "linear", noises=("local",), partitions=("iid", *SKEWS), **three),
                ucf("three", "facmic", **three),
            ),
            label=("method", "noise", "partition"),
        ),
        Table(
            "ucf101-iid",
            "UCF101 features, five sites, IID, distributed noise",
            (ucf("iid", "linear"), ucf("iid", "facmic")),
            pairs=(("facmic", "linear"),),
            drawn=True,
        ),
        *(
            Table(
                f"ablation-{kind}",
                f"what each measure is worth, validation records, {kind}",
                (Ablation(ucf_file, f"{ucf_file}:text", kind, count, out / f"ablation-{kind}"),),
                lines=lines,
            )
            for kind, count in (("linear", 5), ("facmic", 3))
        ),
        Table(
            "ablation-prior",
            "what shares of the classes are worth on a long tail, validation records, linear head",
            (Ablation(ucf_file, f"{ucf_file}:text", "linear", 5, out / "ablation-prior", (1.0, 8.0, 64.0), tail=10.0),),
            lines=lines,
        ),
        *(
            Table(
                f"ablation-views-{kind}",
                f"what several views of a slice are worth, held-out training slices, {kind}",
                (ImageAblation(Views(slices, kind), out / f"ablation-views-{kind}"),),
                lines=lines,
            )
            for kind in ("linear", "facmic")
        ),
        Table(
            "ablation-alignment",
            "what the alignment with a public target is worth, generated scans of another site",
            (ImageAblation(Alignment(), out / "ablation-alignment"),),
            lines=lines,
        ),
        Table(
            "scans-towers",
            "generated scans, tiny CLIP, methods inside the towers and beside them",
            (
                *(
                    Towers(scans, None, method, out / f"scans-{method}", (8.0, INF), 3, rounds=10)
                    for method in ("promptfl", "lora")
                ),
                Example(
                    {"--data": str(scans), "--method": "linear,facmic", "--epsilon": "8,inf", "--seeds": "3"},
                    out / "scans-beside",
                ),
            ),
            columns={"test": "accuracy raw"},
        ),
        Table(
            "brain-tumor-towers",
            "BT slices, tiny CLIP, methods inside the towers",
            tuple(
                Towers(slices, slices / "manifest.csv", method, out / f"brain-tumor-{method}", (8.0, INF), 3)
                for method in ("promptfl", "lora")
            ),
            columns=scores,
        ),
    ]
