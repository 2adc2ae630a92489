"""``fedsecure duplicates``: what sites hold twice, and a manifest without it."""

from __future__ import annotations

import csv
import io
import os
from collections import Counter
from collections.abc import Mapping
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedsecure.cli.options import Json

if TYPE_CHECKING:
    from fedsecure.data.dataset import Dataset
    from fedsecure.data.duplicates import Overlap


# Most copies saved anew are within one bit, and few other pictures are (docs/datasets.md).
_NEAR = "1"


def _near(text: str) -> str:
    try:
        return text if text == "off" else str(int(text))
    except ValueError:
        raise typer.BadParameter(f"{text!r} is neither a number of bits nor off") from None


def duplicates(
    data: Annotated[Path, typer.Argument(help="DIR/<site>/<class>/*.{jpg,png}")],
    eval_site: Annotated[str | None, typer.Option(help="Site that only evaluates: it loses what others hold.")] = None,
    near: Annotated[
        str,
        typer.Option(
            parser=_near,
            metavar="BITS|off",
            help="Bits of 64 by which the hashes of pictures of two sites may differ to look alike; off decodes none "
            "and compares files only.",
        ),
    ] = _NEAR,
    write: Annotated[Path | None, typer.Option(help="Manifest (.csv) to write, in which every image is once.")] = None,
    as_json: Json = False,
) -> None:
    """Find images that several sites hold. For whoever has all the folders; nothing is removed."""
    from rich.progress import Progress

    from fedsecure.cli.display import err, print_json
    from fedsecure.config import DatasetConfig
    from fedsecure.data.duplicates import find_duplicates
    from fedsecure.data.loading import open_dataset
    from fedsecure.files import write_whole
    from fedsecure.simulation.material import site_folders

    names, classes = site_folders(data, eval_site=eval_site)
    sites: dict[str, Dataset] = {
        name: open_dataset(DatasetConfig(name=name, path=data / name, format="folder"), classes=classes)
        for name in names
    }
    bits = None if near == "off" else int(near)
    with Progress(console=err, transient=True, disable=as_json or not err.is_terminal) as progress:
        task = progress.add_task("reading images", total=sum(map(len, sites.values())))
        overlap = find_duplicates(sites, near_bits=bits, step=lambda count: progress.advance(task, count))
    kept = overlap.clean(test=eval_site)
    if write is not None:
        write_whole(write, _manifest(data, sites, kept, beside=write.parent).encode(), mode=0o644)
    if as_json:
        print_json({**_facts(overlap, kept), "near_bits": bits})
    else:
        _show(overlap, kept, bits=bits, written=write)


def _manifest(data: Path, sites: Mapping[str, Dataset], kept: Mapping[str, tuple[int, ...]], *, beside: Path) -> str:
    """A manifest as docs/datasets.md lays it out, a split a site."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("file", "label", "split"))
    for site, rows in kept.items():
        records = sites[site]
        for row in rows:
            file = os.path.relpath(data / site / records.record_ids[row], beside)
            writer.writerow((file, records.classes[records.labels[row]], site))
    return text.getvalue()


def _pairs(overlap: Overlap) -> dict[tuple[str, str], int]:
    """Groups of equal content by pair of sites; a pair of one site with itself counts repeats inside it."""
    counted: Counter[tuple[str, str]] = Counter()
    for group in overlap.groups:
        inside = Counter(place.site for place in group.places)
        counted.update((site, site) for site, copies in inside.items() if copies > 1)
        counted.update(combinations(group.sites, 2))
    order = list(overlap.records)
    return {
        (first, second): counted[first, second]
        for start, first in enumerate(order)
        for second in order[start:]
        if counted[first, second]
    }


def _facts(overlap: Overlap, kept: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    near = Counter((pair.first.site, pair.second.site) for pair in overlap.near)
    return {
        "sites": {
            site: {"records": count, "without_duplicates": len(kept[site])} for site, count in overlap.records.items()
        },
        "equal": [{"sites": list(pair), "groups": count} for pair, count in _pairs(overlap).items()],
        "alike": [{"sites": list(pair), "pairs": count} for pair, count in near.items()],
        "groups": [[f"{place.site}/{place.record}" for place in group.places] for group in overlap.groups],
        "near": [
            {"images": [f"{p.site}/{p.record}" for p in (pair.first, pair.second)], "bits": pair.bits}
            for pair in overlap.near
        ],
    }


def _show(overlap: Overlap, kept: Mapping[str, tuple[int, ...]], *, bits: int | None, written: Path | None) -> None:
    from rich import box
    from rich.table import Table

    from fedsecure.cli.display import out

    facts = _facts(overlap, kept)
    table = Table("site", "images", "each once", box=box.SIMPLE_HEAD, pad_edge=False)
    for site, counts in facts["sites"].items():
        table.add_row(site, str(counts["records"]), str(counts["without_duplicates"]))
    out.print(table)
    pairs = Table("sites", "equal images", *(["look alike"] if bits is not None else []), box=box.SIMPLE_HEAD)
    alike = {tuple(entry["sites"]): entry["pairs"] for entry in facts["alike"]}
    equal = {tuple(entry["sites"]): entry["groups"] for entry in facts["equal"]}
    for pair in dict.fromkeys((*equal, *alike)):
        first, second = pair
        name = f"inside {first}" if first == second else f"{first}, {second}"
        looks = "–" if first == second else str(alike.get(pair, 0))
        pairs.add_row(name, str(equal.get(pair, 0)), *([looks] if bits is not None else []))
    if pairs.row_count:
        out.print(pairs)
    else:
        out.print("every image is there once")
    if across := len(overlap.shared()):
        out.print(f"{across} images lie at more than one site: there the promise to a person adds up over sites.")
    if overlap.near:
        out.print(
            f"pairs of images of different sites that look alike: {len(overlap.near)}, copies saved anew, slices of "
            "one scan, or merely similar. --json names them; --write keeps them."
        )
    if written is not None:
        out.print(f"written {written}", soft_wrap=True, highlight=False)
