"""Folders of images, one a site, as the records of an experiment: encoded once, split, and cleaned of duplicates.

The layout and the splits are those of the released FACMIC program (MICCAI 2024): every training site keeps a tenth of
its records for a test of its own, and one further site is the test of all. What comes out serves the reference training
(:mod:`fedsecure.simulation.reference`) as it is, and becomes a federation on disk for ``simulate``.
"""

from __future__ import annotations

import csv
import hashlib
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fedsecure.config import DatasetConfig, EncoderConfig, PolicyConfig, SiteEntry, parse_settings
from fedsecure.data.dataset import Dataset, Features, Labels, Subset, hash_array
from fedsecure.data.duplicates import Overlap, find_duplicates
from fedsecure.data.features import read_feature_header
from fedsecure.data.images import SUFFIXES, Entry, ImageFiles
from fedsecure.data.loading import open_dataset
from fedsecure.data.partition import released_split
from fedsecure.errors import DataError
from fedsecure.files import make_folder
from fedsecure.learning.targets import write_target
from fedsecure.simulation.material import site_folders
from fedsecure.simulation.pool import Pool, share_out
from fedsecure.simulation.scaffold import SitePlan, lay_out

# Above what a run without privacy is charged; the data of an experiment are whoever's who runs it.
_UNLIMITED = 1e9
_HALF = b"fedsecure/halves/v1\0"
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """Records: (n, d) float32 raw features and (n,) labels."""

    features: Features
    labels: Labels

    def __len__(self) -> int:
        return len(self.labels)

    def rows(self, chosen: Sequence[int] | npt.NDArray[np.int64]) -> Part:
        index = np.asarray(chosen, np.int64)
        return Part(self.features[index], self.labels[index])


@dataclass(frozen=True, slots=True, eq=False)
class Experiment:
    """What is trained on and tested on.

    Attributes:
        classes: in label order.
        text: (K, d) text embeddings.
        mean: (d,) public mean of unit features, or None.
        scale: exp(logit_scale) of the encoder.
        train: training site → its records.
        own: training site → its own test records; empty where sites have none.
        tests: name → records of the common test, the first being the whole of it.
        target: (m, d) unlabelled records to align with, or None.
        overlap: what was found at more than one place.
    """

    classes: tuple[str, ...]
    text: Features
    mean: Features | None
    scale: float
    train: Mapping[str, Part]
    own: Mapping[str, Part]
    tests: Mapping[str, Part]
    target: Features | None
    overlap: Overlap = field(default_factory=lambda: Overlap(records={}, groups=(), near=()))

    @property
    def digest(self) -> str:
        """SHA-256 in hex over all records."""
        sha = hashlib.sha256(b"fedsecure/experiment/v1\0" + "\0".join(self.classes).encode())
        for group in (self.train, self.own, self.tests):
            for name in sorted(group):
                sha.update(name.encode() + hash_array(group[name].features) + hash_array(group[name].labels))
        for array in (self.text, self.mean, self.target):
            sha.update(b"none" if array is None else hash_array(array))
        return sha.hexdigest()


@dataclass(frozen=True, slots=True, eq=False)
class Division:
    """Folders of images as the released program divides them; no image is encoded.

    Attributes:
        sites: every site's images, the test site's among them.
        classes: in label order.
        test_site: whose images are the common test.
        train, own: training site → rows of its images to train on, and to test it on.
        tests: name → rows of the test site's images, the first being all of them.
        overlap: what was found at more than one place.
    """

    sites: Mapping[str, Dataset]
    classes: tuple[str, ...]
    test_site: str
    train: Mapping[str, npt.NDArray[np.int64]]
    own: Mapping[str, npt.NDArray[np.int64]]
    tests: Mapping[str, Sequence[int]]
    overlap: Overlap


def divide_folders(data: Path, *, eval_site: str | None = None, origins: Path | None = None) -> Division:
    """Which images of DIR/<site>/<class>/* train and test; arguments and errors as :func:`read_folders`."""
    names, classes = site_folders(data, eval_site=eval_site)
    test_site = eval_site or names[-1]
    site_folders(data, eval_site=test_site, trainers=3)
    trainers = [name for name in names if name != test_site]
    sites: dict[str, Dataset] = {
        name: open_dataset(DatasetConfig(name=name, path=data / name, format="folder"), classes=classes)
        for name in names
    }
    overlap = find_duplicates(sites)
    kept = {"raw": tuple(range(len(sites[test_site])))}
    by_content = overlap.kept(test_site, against=trainers)
    if origins is None:
        kept["clean"] = by_content
    else:
        known = find_duplicates(_by_origin(sites, origins)).kept(test_site, against=trainers)
        kept |= {"clean": known, "strict": tuple(sorted(set(known) & set(by_content)))}
    parts = {name: released_split(len(sites[name])) for name in trainers}
    return Division(
        sites=sites,
        classes=classes,
        test_site=test_site,
        train={name: rows for name, (rows, _, _) in parts.items()},
        own={name: rows for name, (_, _, rows) in parts.items()},
        tests={name: rows for name, rows in kept.items() if rows},
        overlap=overlap,
    )


def read_folders(
    data: Path,
    *,
    eval_site: str | None,
    model: str,
    pretrained: str,
    cache: Path,
    target: Path | None = None,
    transductive: bool = False,
    halves: bool = False,
    origins: Path | None = None,
    device: str = "auto",
    progress: Progress = lambda *_: None,
) -> Experiment:
    """Encode DIR/<site>/<class>/* and split it as the released program does.

    Args:
        data: the folder of sites.
        eval_site: the site whose records are the common test; the last one by default.
        model, pretrained: the encoder.
        cache: folder of the feature cache.
        target: folder of unlabelled images to align with, searched to any depth.
        transductive: align with the test images themselves where there is no ``target``, or allow it to hold some.
        halves: align with one half of the test images, and name both halves among the tests: ``seen`` and, what is
            tested without having been looked at, ``unseen`` (facmic.md §5.4-6).
        origins: CSV with the columns ``file`` (``<site>/<class>/<name>``) and ``source_blob_sha1``: the image each
            file was made from. Test sets are then ``raw``, ``clean`` by origin, and ``strict`` by origin and content;
            without it ``raw``, and ``clean`` by content.
        device: of the encoder.
        progress: called with (site, done, all) while images are encoded.

    Raises:
        DataError: FS-1150 to FS-1155 the folders, FS-1130 a site of fewer than ten records, FS-1137 a target that
            overlaps the test set, FS-1138 origins that do not name every file, FS-1156 test images too few for two
            halves, and the reader's for an image that cannot be read.
        ModelError: the encoder cannot be loaded.
    """
    from fedsecure.learning.encoding import encode_dataset
    from fedsecure.vision.cache import FeatureCache
    from fedsecure.vision.encoder import load_encoder
    from fedsecure.vision.prompts import class_prompts

    division = divide_folders(data, eval_site=eval_site, origins=origins)
    sites, classes = division.sites, division.classes
    unlabelled = _target(target, sites[division.test_site], transductive=transductive)
    tests = dict(division.tests)
    if halves:
        by_half = halves_of(sites[division.test_site], tests)
        unlabelled, tests = Subset(sites[division.test_site], by_half["seen"]), tests | by_half

    encoder = load_encoder(model, pretrained, device=device)
    store = FeatureCache(cache)

    def encode(name: str, records: Dataset) -> Features:
        return encode_dataset(records, encoder, store, progress=lambda done, count: progress(name, done, count))

    whole = {name: Part(encode(name, records), records.labels) for name, records in sites.items()}
    aligned = None if unlabelled is None else encode("target", unlabelled)
    return Experiment(
        classes=classes,
        text=encoder.encode_text(class_prompts(classes)),
        mean=encoder.public_mean,
        scale=encoder.scale,
        train={name: whole[name].rows(rows) for name, rows in division.train.items()},
        own={name: whole[name].rows(rows) for name, rows in division.own.items()},
        tests={name: whole[division.test_site].rows(rows) for name, rows in tests.items()},
        target=aligned,
        overlap=division.overlap,
    )


def halves_of(test: Dataset, tests: Mapping[str, Sequence[int]]) -> dict[str, Sequence[int]]:
    """Each of ``tests`` in two halves, to align with and not to: ``seen``, ``unseen``, then ``seen, clean`` and so on.

    An image's half follows from its content alone, so that its copies are in the same one.

    Raises:
        DataError: FS-1156 a half has no image.
    """
    seen = {row for row in range(len(test)) if hashlib.sha256(_HALF + test.content_key(row)).digest()[0] & 1}
    found: dict[str, Sequence[int]] = {}
    for name, rows in tests.items():
        for half, wanted in (("seen", True), ("unseen", False)):
            # The first of the tests is all of it.
            label = half if not found or name == next(iter(tests)) else f"{half}, {name}"
            found[label] = tuple(row for row in rows if (row in seen) == wanted)
    empty = next((name for name, rows in found.items() if not rows), None)
    if empty is not None:
        raise DataError(
            "FS-1156",
            f"none of the {len(test)} test images is {empty}",
            expected="test images enough for two halves, which their content decides",
            cure="add test images, or leave --halves out",
        )
    return found


def from_pool(pool: Pool, names: Sequence[str], *, partition: str, seed: int, transductive: bool = False) -> Experiment:
    """The records of a feature file, shared out as ``simulate`` does. Raises as :func:`share_out`."""
    rows = share_out(pool, names, partition=partition, seed=seed)
    test = Part(np.asarray(pool.test_features, np.float32), pool.test_labels)
    return Experiment(
        classes=pool.classes,
        text=np.asarray(pool.public["text"], np.float32),
        mean=pool.public.get("mean"),
        scale=100.0,
        train={
            name: Part(np.asarray(pool.features[chosen], np.float32), pool.labels[chosen])
            for name, chosen in rows.items()
        },
        own={},
        tests={"raw": test},
        target=test.features if transductive else None,
    )


def lay_out_experiment(
    experiment: Experiment,
    folder: Path,
    *,
    method: str,
    delta: float,
    settings: Mapping[str, Any] | None = None,
    alignment: Mapping[str, Any] | None = None,
) -> Path:
    """The same records as a federation on disk for ``simulate``; an earlier layout in ``folder`` is replaced.

    Training sites hold their training records and evaluate nothing; the site ``test`` holds the whole common test,
    declared public. Their policies allow ``method``, with and without privacy.

    Args:
        experiment: the records.
        folder: of the layout.
        method: what the sites allow; the simulation chooses it, and its rounds.
        delta: δ.
        settings: further keys of ``[method]``.
        alignment: keys of ``[method.alignment]``, to align with the experiment's target; its hash is filled in.

    Returns:
        the path of ``federation.toml``.

    Raises:
        ConfigError, IdentityError, EnvironmentProblem: as ``parse_settings`` and ``lay_out``.
    """
    shutil.rmtree(folder, ignore_errors=True)
    records = make_folder(folder / "records")
    public: dict[str, Any] = {"classes": np.array(experiment.classes), "text": experiment.text}
    if experiment.mean is not None:
        public["mean"] = experiment.mean
    test = next(iter(experiment.tests.values()))
    digest = experiment.digest[:16]
    sections: dict[str, tuple[DatasetConfig, int]] = {}
    for name, part, split in (*((site, p, "train") for site, p in experiment.train.items()), ("test", test, "test")):
        file = records / f"{name}.npz"
        arrays: dict[str, Any] = {**public, f"{split}_x": part.features, f"{split}_y": part.labels}
        np.savez(file, **arrays)
        training = split == "train"
        # The name carries the records' hash, so that other records are other cells.
        section = DatasetConfig(name=f"{name}-{digest}", path=file, format="features", split=split, public=not training)
        sections[name] = (section, len(part))
    header = read_feature_header(records / "test.npz")
    encoder = EncoderConfig(
        model="features", pretrained="file", dimension=header.dimension, fingerprint=header.fingerprint
    )
    files = {name: section.path for name, (section, _) in sections.items()}
    chosen, target = dict(settings or {}), None
    if alignment is not None:
        assert experiment.target is not None, "there is something to align with"
        target = records / "target.safetensors"
        hashed = write_target(target, experiment.target, fingerprint=header.fingerprint)
        chosen["alignment"] = {**alignment, "target": hashed}
    return lay_out_sections(
        sections, folder, classes=experiment.classes, encoder=encoder, files=files, method=method, delta=delta,
        settings=chosen, target=target,
    )  # fmt: skip


def lay_out_sections(
    sections: Mapping[str, tuple[DatasetConfig, int]],
    folder: Path,
    *,
    classes: Sequence[str],
    encoder: EncoderConfig,
    files: Mapping[str, Path | None],
    method: str,
    delta: float,
    settings: Mapping[str, Any] | None = None,
    target: Path | None = None,
    name: str = "experiment",
) -> Path:
    """Data sets that are on disk as a federation: public ones are evaluated on, by sites of their own.

    Args:
        sections: site → its data set, and the number of its records.
        folder: of the layout.
        classes: in label order.
        encoder: of the run.
        files: site → its ``encoder_file``; the aggregator gets that of ``test``.
        method, delta, settings: as for :func:`lay_out_experiment`.
        target: everybody's ``target_file``.
        name: of the federation, which is the public seed of an adapter's first weights.

    Returns, raises: as :func:`lay_out_experiment`.
    """
    policy = PolicyConfig(
        max_epsilon=_UNLIMITED,
        delta=delta,
        unit="record",
        methods=(method, "evaluate"),
        min_noise_multiplier=0.0,
        no_privacy=True,
    )
    entries: dict[str, SiteEntry] = {}
    plans: dict[str, SitePlan] = {}
    for site, (section, count) in sections.items():
        entries[site] = SiteEntry(
            role="evaluate" if section.public else "train",
            max_units=0 if section.public else count,
            evaluation_units=count if section.public else 0,
            evaluation_public=section.public,
        )
        plans[site] = SitePlan(
            train=None if section.public else section,
            evaluation=section if section.public else None,
            policy=policy,
            encoder_file=files[site],
            target_file=target,
        )
    content = {
        "name": name,
        "classes": tuple(classes),
        "encoder": encoder.model_dump(),
        "privacy": {
            "unit": "record",
            "max_records_per_unit": 1,
            "delta": delta,
            "spare_attempts": 0,
            "minimum_signal_to_noise": 0.0,
        },
        "method": dict(settings or {}),
        "rounds": {"phase_seconds": 300.0, "silence_seconds": 300.0, "start_seconds": 300.0},
        "sites": {site: entry.model_dump() for site, entry in entries.items()},
    }
    return lay_out(
        folder / "federation",
        parse_settings(content, folder),
        sites=plans,
        listen="memory:0",
        hosts=("localhost",),
        encoder_file=files["test"],
        target_file=target,
    ).federation


class _Known(Subset):
    """Records whose origin is known, so that copies made from one image are one content."""

    def __init__(self, base: Dataset, keys: Sequence[bytes]) -> None:
        super().__init__(base, range(len(base)))
        self._keys = keys

    def content_key(self, i: int) -> bytes:
        return self._keys[i]


def _by_origin(sites: Mapping[str, Dataset], file: Path) -> dict[str, Dataset]:
    try:
        with file.open(newline="", encoding="utf-8") as stream:
            origins = {row["file"]: row["source_blob_sha1"] for row in csv.DictReader(stream)}
    except (OSError, UnicodeDecodeError, KeyError, csv.Error) as error:
        raise _bad_origins(file, f"cannot be read ({error!s:.80})") from error
    known: dict[str, Dataset] = {}
    for name, records in sites.items():
        paths = [f"{name}/{record}" for record in records.record_ids]
        missing = next((path for path in paths if not origins.get(path)), None)
        if missing is not None:
            raise _bad_origins(file, f"does not say where {missing} comes from")
        known[name] = _Known(records, [origins[path].encode() for path in paths])
    return known


def _bad_origins(file: Path, found: str) -> DataError:
    return DataError(
        "FS-1138",
        f"{file} {found}",
        expected="a CSV file in UTF-8 with the columns file and source_blob_sha1, a row for each image",
        cure="mend the file, or go by the files' own content and leave it out",
    )


def _target(folder: Path | None, test: Dataset, *, transductive: bool) -> Dataset | None:
    if folder is None:
        return test if transductive else None
    files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
    entries = [Entry(path=path, record_id=str(path.relative_to(folder)), label=0) for path in files]
    records = ImageFiles(entries, name="target", classes=test.classes, public=True)
    shared = find_duplicates({"target": records, "test": test}).shared()
    if shared and not transductive:
        raise DataError(
            "FS-1137",
            f"{len(shared)} images of the target {folder} are also in the test set",
            expected="a target that shares no image with the test set",
            cure="take them out, or say --transductive and report the result as transductive",
        )
    return records
