"""The data side of a demo: generated phantoms, folders of images or a feature file, shared out to sites.

Everything here is decided before anything is written: sizes and class names are listed, no image is decoded.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from fedsecure.config import DatasetConfig, EncoderConfig
from fedsecure.errors import ConfigError, DataError

if TYPE_CHECKING:
    from fedsecure.simulation.demo import DemoOptions

Source = Literal["phantoms", "images", "features"]
# Generated scans a class at each site.
_TRAIN, _TEST = 75, 50
_HOLDOUT = 0.2
_SITE = re.compile(r"[a-z0-9][a-z0-9_.-]{0,62}")


@dataclass(slots=True)
class Material:
    """What a demo's federation works on.

    Attributes:
        source: where the records come from.
        classes: in label order.
        encoder: pinned.
        encoder_file: what each site's ``encoder_file`` names, if anything.
        train, evaluation: site → its data set and number of records.
        generate: writes the records, where they are generated.
    """

    source: Source
    classes: tuple[str, ...]
    encoder: EncoderConfig
    encoder_file: Path | None = None
    train: dict[str, tuple[DatasetConfig, int]] = field(default_factory=dict)
    evaluation: dict[str, tuple[DatasetConfig, int]] = field(default_factory=dict)
    generate: Callable[[], object] = lambda: None


def find_material(options: DemoOptions) -> Material:
    """The data side that the options ask for; nothing is written.

    Raises:
        ConfigError: FS-1010, two sources at once, or an option of the other source.
        DataError: FS-1150 to FS-1154 the folder of sites, FS-11xx as the readers of folders and feature files say.
        ModelError: the encoder cannot be loaded.
    """
    if options.data is not None and options.features is not None:
        raise ConfigError(
            "FS-1010",
            "--data and --features together",
            expected="one source of records",
            cure="leave one of them out",
        )
    if options.eval_site is not None and options.data is None:
        raise ConfigError(
            "FS-1010",
            "--eval-site without --data",
            expected="--eval-site to name a folder of --data",
            cure="leave it out, or give --data DIR",
        )
    if options.features is not None:
        return _feature_material(options, options.features)
    if options.data is not None:
        return _image_material(options, options.data)
    return _phantom_material(options)


def _phantom_material(options: DemoOptions) -> Material:
    from fedsecure.data.phantoms import CLASSES, SITES, write_federation

    if options.sites > len(SITES):
        raise ConfigError(
            "FS-1003",
            f"--sites = {options.sites} with generated scans",
            expected=f"at most {len(SITES)}: so many kinds of scanners are simulated",
            cure="ask for fewer sites, or give --data or --features",
        )
    folder = options.out / "phantoms"
    names = tuple(SITES)[: options.sites]
    encoder, file = _encoder(options)
    material = Material("phantoms", tuple(CLASSES), encoder, file)
    material.generate = partial(
        write_federation, folder, sites=names, per_class=_TRAIN, test_per_class=_TEST, seed=options.seed
    )
    public = options.public_evaluation is not False
    for name in names:
        train, test = folder / name / "train", folder / name / "test"
        material.train[name] = (DatasetConfig(name=f"{name}-phantoms", path=train), _TRAIN * len(CLASSES))
        section = DatasetConfig(name=f"{name}-phantoms-test", path=test, public=public)
        material.evaluation[name] = (section, _TEST * len(CLASSES))
    return material


def _image_material(options: DemoOptions, data: Path) -> Material:
    from fedsecure.data.loading import open_dataset

    sites, classes = site_folders(data, eval_site=options.eval_site, trainers=3)
    encoder, file = _encoder(options)
    material = Material("images", classes, encoder, file)
    public = bool(options.public_evaluation)
    for site in sites:
        if site == options.eval_site:
            section = DatasetConfig(name=site, path=data / site, public=public)
            material.evaluation[site] = (section, len(open_dataset(section, classes=classes)))
            continue
        # Without a site that only evaluates, every site keeps a fifth of its own records for that.
        own: tuple[Literal["all", "train"], float] = ("all", 0.0) if options.eval_site else ("train", _HOLDOUT)
        section = DatasetConfig(name=site, path=data / site, part=own[0], holdout=own[1])
        material.train[site] = (section, len(open_dataset(section, classes=classes)))
        if not options.eval_site:
            kept = DatasetConfig(
                name=f"{site}-evaluation", path=data / site, part="evaluation", holdout=_HOLDOUT, public=public
            )
            material.evaluation[site] = (kept, len(open_dataset(kept, classes=classes)))
    return material


def site_folders(data: Path, *, eval_site: str | None = None, trainers: int = 0) -> tuple[list[str], tuple[str, ...]]:
    """The sites of a folder DIR/<site>/<class>/*, and the classes they share; no file is opened.

    Args:
        data: the folder.
        eval_site: a site that only evaluates.
        trainers: how many others there have to be.

    Raises:
        DataError: FS-1150 no such folder, FS-1151 no site ``eval_site``, FS-1152 too few training sites, FS-1153 a
            class that one site alone has, FS-1154 fewer than two classes, FS-1155 a name that cannot be a site's,
            FS-1100 a folder cannot be listed.
    """
    if not data.is_dir():
        raise DataError(
            "FS-1150",
            f"{data} is no folder",
            expected="DIR/<site>/<class>/*.{jpg,png}",
            cure="give the folder that holds one folder a site",
        )
    sites = _folders(data)
    for site in sites:
        if not _SITE.fullmatch(site):
            raise DataError(
                "FS-1155",
                f"site folder {site!r} in {data}",
                expected="a name of small letters, digits and . _ -, beginning with a letter or digit",
                cure="rename the folder; the name goes into certificates",
            )
    if eval_site is not None and eval_site not in sites:
        raise DataError(
            "FS-1151",
            f"--eval-site {eval_site} is not in {data}",
            expected="one of " + ", ".join(sites),
            cure="correct the name",
        )
    others = len(sites) - (eval_site is not None)
    if others < trainers:
        raise DataError(
            "FS-1152",
            f"{others} training sites in {data}",
            expected=f"at least {trainers}: with two, each could read the other's part off the sum",
            cure="add site folders",
        )
    return sites, _shared_classes(data, sites)


def _shared_classes(data: Path, sites: list[str]) -> tuple[str, ...]:
    """All class folders; one that a single site has is taken for a misspelling."""
    found = Counter(name for site in sites for name in _folders(data / site))
    for name, count in sorted(found.items()):
        if count == 1 and len(sites) > 1:
            owner = next(site for site in sites if (data / site / name).is_dir())
            raise DataError(
                "FS-1153",
                f"class folder {name!r} exists at site {owner!r} only",
                expected="class names that at least two sites share: "
                + ", ".join(n for n, c in found.items() if c > 1),
                cure="rename the folder as the other sites do, or remove it",
            )
    if len(found) < 2:
        raise DataError(
            "FS-1154",
            f"{len(found)} class folders under {data}",
            expected="at least two classes: DIR/<site>/<class>/*.{jpg,png}",
            cure="sort each site's images into one folder a class",
        )
    return tuple(sorted(found))


def _folders(folder: Path) -> list[str]:
    try:
        names = [child.name for child in folder.iterdir() if child.is_dir()]
        return sorted(name for name in names if not name.startswith((".", "__")))
    except OSError as error:
        raise DataError(
            "FS-1100",
            f"{folder} cannot be listed ({error.strerror})",
            expected="a readable folder",
            cure="check the path and its permissions",
        ) from error


def _feature_material(options: DemoOptions, file: Path) -> Material:
    from fedsecure.data.loading import read_feature_header

    header = read_feature_header(file)
    encoder = EncoderConfig(
        model="features",
        pretrained="file",
        prompt=options.prompt,
        dimension=header.dimension,
        fingerprint=header.fingerprint,
    )
    material = Material("features", header.classes, encoder, encoder_file=file)
    public = options.public_evaluation is not False
    names = [f"site-{index + 1}" for index in range(options.sites)]
    for index, name in enumerate(names):
        for split, target, declared in (("train", material.train, None), ("test", material.evaluation, public)):
            if split not in header.splits:
                continue
            section = DatasetConfig(
                name=f"{file.stem}-{split}-{name}",
                path=file,
                format="features",
                split=split,
                rows=(index, options.sites),
                public=bool(declared),
            )
            target[name] = (section, math.ceil((header.splits[split] - index) / options.sites))
    return material


def _encoder(options: DemoOptions) -> tuple[EncoderConfig, Path | None]:
    """The encoder, pinned, and the local weights file if one was named: then every site names its own copy."""
    from fedsecure.vision.encoder import load_encoder

    encoder = load_encoder(options.model, options.pretrained, device=options.device)
    local = Path(options.pretrained).expanduser()
    file = local.resolve() if options.pretrained != "bundled" and local.is_file() else None
    config = EncoderConfig(
        model=options.model,
        pretrained="file" if file else options.pretrained,
        prompt=options.prompt,
        dimension=encoder.dimension,
        fingerprint=encoder.fingerprint,
    )
    return config, file
