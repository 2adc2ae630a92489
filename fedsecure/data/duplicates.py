"""Finds records that lie in a collection more than once: the same content, or almost the same picture.

A copy in two sites breaks what privacy accounting assumes of disjoint sites; a copy of a test image in a training site
makes a test score meaningless. Equal content is found by SHA-256; almost equal pictures by the difference hash of an
image (64 bits: which of two neighbouring cells of a 9 × 8 grey thumbnail is the lighter).

For whoever holds all the folders, a researcher or an aggregator of public data. Hospitals cannot compare records they
do not show each other.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from fedsecure.data.dataset import Dataset
from fedsecure.errors import DataError

if TYPE_CHECKING:
    from PIL.Image import Image

Bits = npt.NDArray[np.uint64]
# Pairs compared at once: their 4 MiB stay in a core's cache.
_PAIRS = 1 << 19


@dataclass(frozen=True, slots=True, order=True)
class Place:
    """Where a record lies.

    Attributes:
        site: name of its data set.
        index: its number there.
        record: its id there.
    """

    site: str
    index: int
    record: str


@dataclass(frozen=True, slots=True)
class Group:
    """Records of one content, two or more, in the order of the sites as given."""

    places: tuple[Place, ...]

    @property
    def sites(self) -> tuple[str, ...]:
        """The sites it lies in, each once."""
        return tuple(dict.fromkeys(place.site for place in self.places))


@dataclass(frozen=True, slots=True)
class Near:
    """Two records of different content that look alike: their hashes differ in ``bits`` of 64."""

    first: Place
    second: Place
    bits: int


@dataclass(frozen=True, slots=True)
class Overlap:
    """What a collection holds twice.

    Attributes:
        records: records a site.
        groups: equal contents.
        near: almost equal pictures between different sites, most alike first; empty where it was not asked for.
    """

    records: Mapping[str, int]
    groups: tuple[Group, ...]
    near: tuple[Near, ...]

    def shared(self) -> tuple[Group, ...]:
        """Groups that lie in more than one site."""
        return tuple(group for group in self.groups if len(group.sites) > 1)

    def kept(self, site: str, *, against: Iterable[str] = ()) -> tuple[int, ...]:
        """Indices of a site's records without repeats, and without what also lies in one of ``against``.

        Of several copies inside the site the first is kept.

        Raises:
            DataError: FS-1135 for a site that is not in the collection.
        """
        others = set(against)
        for name in (site, *others):
            if name not in self.records:
                raise _unknown_site(name, self.records)
        dropped: set[int] = set()
        for group in self.groups:
            own = [place.index for place in group.places if place.site == site]
            leaks = any(place.site in others for place in group.places)
            dropped.update(own if leaks else own[1:])
        return tuple(i for i in range(self.records[site]) if i not in dropped)

    def clean(self, *, test: str | None = None) -> dict[str, tuple[int, ...]]:
        """Site → indices, so that every content is left once: at the first training site that holds it.

        Args:
            test: the site that only evaluates; it loses whatever a training site holds.

        Raises:
            DataError: FS-1135 for a site that is not in the collection.
        """
        if test is not None and test not in self.records:
            raise _unknown_site(test, self.records)
        order = [site for site in self.records if site != test] + ([] if test is None else [test])
        kept = {site: self.kept(site, against=order[:place]) for place, site in enumerate(order)}
        return {site: kept[site] for site in self.records}


def find_duplicates(
    sites: Mapping[str, Dataset], *, near_bits: int | None = None, step: Callable[[int], None] = lambda _: None
) -> Overlap:
    """Compare every record of every site with every other.

    Args:
        sites: name → records. Reads all of them.
        near_bits: also find pairs of images of different sites whose hashes differ in at most so many bits, 0 … 16.
            None compares contents only.
        step: called with the number of records read since the last call.

    Raises:
        DataError: FS-1136 ``near_bits`` is out of range, or the records are no images; the reader's for a record that
            cannot be read.
    """
    if near_bits is not None and not 0 <= near_bits <= 16:
        raise DataError(
            "FS-1136",
            f"{near_bits} differing bits for pictures that look alike",
            expected="0 to 16 of 64",
            cure="choose a small number; 1 finds most copies saved anew, 2 nearly all, and more that are none",
        )
    places: defaultdict[bytes, list[Place]] = defaultdict(list)
    looks: list[tuple[Place, int]] = []
    for site, records in sites.items():
        if near_bits is not None and records.kind != "image":
            raise DataError(
                "FS-1136",
                f"site {site!r} holds precomputed features",
                expected="images, where pictures that look alike are asked for",
                cure="compare contents only",
            )
        for index, record in enumerate(records.record_ids):
            content = records.content_key(index)
            place = Place(site=site, index=index, record=record)
            if near_bits is not None and content not in places:
                looks.append((place, difference_hash(records.image(index))))
            places[content].append(place)
            step(1)
    groups = tuple(Group(places=tuple(found)) for found in places.values() if len(found) > 1)
    near = () if near_bits is None else pairs_alike(looks, near_bits)
    return Overlap(records={site: len(records) for site, records in sites.items()}, groups=groups, near=near)


def difference_hash(image: Image) -> int:
    """64 bits: for each of 8 × 8 cells of a grey 9 × 8 thumbnail, whether the cell to its right is lighter."""
    grey = np.asarray(image.convert("L").resize((9, 8)), np.int16)
    bits = np.packbits(grey[:, 1:] > grey[:, :-1])
    return int.from_bytes(bits.tobytes(), "big")


def pairs_alike(looks: Sequence[tuple[Place, int]], most: int) -> tuple[Near, ...]:
    """Every two pictures of different sites whose hashes differ in at most ``most`` bits, most alike first.

    Args:
        looks: pictures in the order of their sites, each with its :func:`difference_hash`. Those with hash 0, which
            have no edge, resemble one another and are left out.
        most: 0 … 64.
    """
    seen = [(place, look) for place, look in looks if look]
    hashes: Bits = np.array([look for _, look in seen], np.uint64)
    sites = np.array([place.site for place, _ in seen])
    found: list[Near] = []
    at_once = max(1, _PAIRS // max(1, len(seen)))
    for start in range(0, len(seen), at_once):
        rows: Bits = hashes[start : start + at_once]
        distance = np.bitwise_count(rows[:, None] ^ hashes[None, start:])
        pairs = np.argwhere(distance <= most)
        ahead = pairs[:, 1] > pairs[:, 0]
        apart = sites[start + pairs[:, 0]] != sites[start + pairs[:, 1]]
        for row, column in pairs[ahead & apart].tolist():
            first, second = seen[start + row][0], seen[start + column][0]
            found.append(Near(first=first, second=second, bits=int(distance[row, column])))
    return tuple(sorted(found, key=lambda near: (near.bits, near.first, near.second)))


def _unknown_site(name: str, records: Mapping[str, int]) -> DataError:
    return DataError(
        "FS-1135",
        f"no site is called {name!r}",
        expected="one of " + ", ".join(sorted(records)),
        cure="name a folder of the collection",
    )
