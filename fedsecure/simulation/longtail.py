"""Long-tailed experiments: a feature file or images, made long-tailed and shared out to sites.

The sets of CReFF (IJCAI 2022) and CLIP2FL (AAAI 2024), with a part of the records declared public: settings are chosen
on these and never on the test set. What comes out serves the published training (:mod:`fedsecure.simulation.clip2fl`)
and becomes a federation on disk through :func:`fedsecure.simulation.folders.lay_out_experiment`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from fedsecure.config import EncoderConfig
from fedsecure.data.cifar import is_cifar, read_cifar, read_image_list, read_pixels
from fedsecure.data.dataset import Dataset, Subset
from fedsecure.data.images import ImageFiles, list_class_tree
from fedsecure.data.longtail import FEW, MANY, Indices, class_groups, class_thirds, group_accuracy, long_tail
from fedsecure.data.partition import dirichlet, equal_dirichlet, iid
from fedsecure.errors import ConfigError, DataError
from fedsecure.simulation.folders import Experiment, Part
from fedsecure.simulation.pool import read_pool

# ImageNet-LT's lists are called ImageNet_LT_train.txt and so on.
_LISTS = "ImageNet_LT_"
#: The prompt of the papers' teacher.
PROMPT = "a photo of a {}"
#: Where the weights of a stand-in teacher name the classes that it was trained on.
CLASSES = "classes"
Watch = Callable[[int, int], None]
Pixels = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True, eq=False)
class Source:
    """Records before they are made long-tailed.

    Attributes:
        classes, text, mean, scale: of the encoder, which is the teacher.
        train, test: features and labels.
        public: labelled records declared public: for choosing settings, for FedDF and for the Ratio Loss. It may be
            empty: then nothing is taken from training, and the sets have the sizes of the papers.
        pixels: ``train``, ``test`` and ``public`` as uint8 (n, 3, 32, 32), or None where only features are there.
        encoder: that made the features, where there are pixels.
    """

    classes: tuple[str, ...]
    text: npt.NDArray[np.float32]
    mean: npt.NDArray[np.float32] | None
    scale: float
    train: Part
    test: Part
    public: Part
    pixels: Mapping[str, Pixels] | None = None
    encoder: EncoderConfig | None = None


@dataclass(frozen=True, slots=True, eq=False)
class LongTail:
    """A long-tailed federation.

    Attributes:
        experiment: the sites' records and the common test, as of every other example.
        source: what it was made of.
        rows: site → rows of ``source.train``.
        counts: (C,) training records of each class.
        groups: ``many``, ``medium``, ``few``.
    """

    experiment: Experiment
    source: Source
    rows: Mapping[str, Indices]
    counts: Indices
    groups: Mapping[str, Indices]

    def scores(self, predicted: npt.NDArray[np.int64], *, on: str = "test") -> dict[str, float | None]:
        """``all``, ``many``, ``medium`` and ``few`` on the test set or on the public records; None each without any."""
        part = self.source.test if on == "test" else self.source.public
        if on == "public" and not len(part):
            return dict.fromkeys(("all", *self.groups))
        return group_accuracy(predicted, part.labels, classes=len(self.counts), groups=self.groups)


def from_features(
    file: Path, *, train: Sequence[str], test: str, public: str, each: int, centre: str = "none"
) -> Source:
    """A feature file as a source.

    Args:
        file: of docs/datasets.md.
        train: splits to train on; ``public`` may be one of them, and what is public is then left out.
        test: split to test on.
        public: split of which some records of each class are declared public.
        each: how many of each class; 0 for no public records.
        centre: as for :func:`fedsecure.simulation.pool.read_pool`.

    Raises:
        ConfigError, DataError: as ``read_pool``; DataError FS-1168 a class has too few records for ``public``.
    """
    pools = {split: read_pool(file, train=(split,), test=test, centre=centre) for split in {*train, public}}
    held = pools[public]
    rows = rows_of_each(held.labels, classes=len(held.classes), each=each)
    parts = []
    for split in train:
        part = Part(np.asarray(pools[split].features, np.float32), pools[split].labels)
        parts.append(part.rows(np.setdiff1d(np.arange(len(part)), rows)) if split == public else part)
    return Source(
        classes=held.classes,
        text=np.asarray(held.public["text"], np.float32),
        mean=held.public.get("mean"),
        scale=100.0,
        train=Part(np.concatenate([p.features for p in parts]), np.concatenate([p.labels for p in parts])),
        test=Part(np.asarray(held.test_features, np.float32), held.test_labels),
        public=Part(np.asarray(held.features, np.float32), held.labels).rows(rows),
    )


def from_images(
    data: Path,
    *,
    model: str,
    pretrained: str,
    cache: Path,
    each: int = 20,
    held_out: int = 0,
    progress: Watch = lambda *_: None,
) -> Source:
    """CIFAR's binary archive, ``DIR/{train,test}/<class>/*`` with ``public/`` beside them or cut from training, or
    ImageNet-LT's lists, whose validation list is then public.

    Args:
        data: archive or folder.
        model, pretrained: the teacher, an open_clip model.
        cache: folder of the feature cache: an image is encoded once.
        each: records of each class declared public where there is no ``public`` folder; with 0 there are none, and
            training keeps all it has.
        held_out: take so many records of each class of ``public`` and leave the others, which a teacher was trained on
            (:func:`fedsecure.simulation.teacher.public_images`); all of them where 0.
        progress: called with (done, all) while images are encoded.

    Raises:
        DataError: FS-1164, FS-1165 the archive, FS-1100 to FS-1105, FS-1167 the folders, FS-1168 too few records for
            ``each`` or ``held_out``.
        ModelError: the teacher cannot be loaded; FS-1691 a stand-in was trained on other classes.
    """
    from fedsecure.learning.distillation import check_classes
    from fedsecure.learning.encoding import encode_dataset
    from fedsecure.vision.cache import FeatureCache
    from fedsecure.vision.encoder import load_encoder
    from fedsecure.vision.prompts import class_prompts

    splits: dict[str, Dataset] = {}
    if is_cifar(data):
        cifar = read_cifar(data)
        classes = cifar.classes
        splits = {"train": cifar.train, "test": cifar.test}
    elif (data / f"{_LISTS}train.txt").is_file():
        classes, splits = _listed(data)
    else:
        if not (data / "train").is_dir() or not (data / "test").is_dir():
            raise DataError(
                "FS-1167",
                f"{data} has no folders train and test",
                expected="DIR/train/<class>/* and DIR/test/<class>/*, or a binary archive of CIFAR",
                cure="see docs/datasets.md, long-tailed sets",
            )
        classes = class_names(data / "train")
        for split in ("train", "test", "public"):
            if (data / split).is_dir():
                entries = list_class_tree(data / split, classes)
                splits[split] = ImageFiles(entries, name=f"{data.name}/{split}", classes=classes, public=True)
    if "public" not in splits and each:
        whole = splits["train"]
        rows = rows_of_each(whole.labels, classes=len(classes), each=each)
        splits["public"] = Subset(whole, rows.tolist())
        splits["train"] = Subset(whole, np.setdiff1d(np.arange(len(whole)), rows).tolist())
    elif "public" in splits and held_out:
        shown = splits["public"]
        rows = rows_of_each(shown.labels, classes=len(classes), each=held_out)
        splits["public"] = Subset(shown, rows.tolist())
    trained_on = classes_of_teacher(Path(pretrained))
    if trained_on is not None:
        check_classes(trained_on, classes)
    encoder, store = load_encoder(model, pretrained), FeatureCache(cache)
    parts = {
        split: Part(encode_dataset(records, encoder, store, progress=progress), records.labels)
        for split, records in splits.items()
    }
    pixels = {split: read_pixels(records) for split, records in splits.items()}
    if "public" not in splits:
        none = np.zeros(0, np.int64)
        parts["public"], pixels["public"] = parts["test"].rows(none), pixels["test"][none]
    return Source(
        classes=classes,
        text=encoder.encode_text(class_prompts(classes, template=PROMPT)),
        mean=encoder.public_mean,
        scale=encoder.scale,
        train=parts["train"],
        test=parts["test"],
        public=parts["public"],
        pixels=pixels,
        encoder=EncoderConfig(
            model=model,
            pretrained="file" if Path(pretrained).is_file() else pretrained,
            prompt=PROMPT,
            dimension=encoder.dimension,
            fingerprint=encoder.fingerprint,
        ),
    )


def classes_of_teacher(file: Path) -> tuple[str, ...] | None:
    """The classes that a stand-in teacher's weights name; None for any other file, whose prompts are the classes."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="np") as held:
            names = (held.metadata() or {}).get(CLASSES)
        return None if names is None else tuple(map(str, json.loads(names)))
    except (OSError, SafetensorError, ValueError, TypeError):
        return None


def class_names(folder: Path) -> tuple[str, ...]:
    """The names of a folder's class folders, sorted."""
    return tuple(sorted(p.name for p in folder.iterdir() if p.is_dir() and p.name[0] not in "._"))


def _listed(data: Path) -> tuple[tuple[str, ...], dict[str, Dataset]]:
    """ImageNet-LT: ``classes.txt`` with a name a line, the lists, and the images below the same folder."""
    try:
        classes = tuple(filter(None, (data / "classes.txt").read_text(encoding="utf-8").splitlines()))
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            "FS-1167",
            f"{data / 'classes.txt'} cannot be read ({error!s:.80})",
            expected="the name of each class, a line each, in the order of the labels",
            cure="see docs/datasets.md, long-tailed sets",
        ) from error
    splits: dict[str, Dataset] = {}
    for split, name in (("train", "train"), ("public", "val"), ("test", "test")):
        entries = read_image_list(data / f"{_LISTS}{name}.txt", root=data, classes=len(classes))
        splits[split] = ImageFiles(entries, name=f"{data.name}/{name}", classes=classes, public=split != "train")
    return classes, splits


def rows_of_each(labels: npt.NDArray[np.int64], *, classes: int, each: int) -> Indices:
    """``each`` rows of every class, chosen by a fixed seed; DataError FS-1168 where a class has fewer."""
    if each == 0:
        return np.zeros(0, np.int64)
    generator = np.random.default_rng(0)
    chosen = [generator.permutation(np.flatnonzero(labels == c))[:each] for c in range(classes)]
    short = next((c for c, rows in enumerate(chosen) if len(rows) < each), None)
    if short is not None or each < 0:
        raise DataError(
            "FS-1168",
            f"{each} public records of each class, of which class {short or 0} has {len(chosen[short or 0])}",
            expected="as many in every class, or none",
            cure="ask for fewer, or bring a split of public records",
        )
    return np.sort(np.concatenate(chosen))


def arrange(
    source: Source, *, sites: int, imbalance: float, partition: str, seed: int, commonest_first: bool = False
) -> LongTail:
    """Make a source long-tailed and share it out.

    Args:
        source: the records.
        sites: number of sites.
        imbalance: count of the commonest class over that of the rarest; 0 takes the records as they are.
        partition: ``equal-dirichlet:ALPHA`` as in the papers, ``dirichlet:ALPHA`` or ``iid``.
        seed: of the subset, of the order among equally large classes, and of the partition.
        commonest_first: the tail goes by how many records a class has, equal ones in an order drawn by ``seed``; by
            label otherwise, as in the papers.

    Raises:
        ConfigError: FS-1010 no such partition.
        DataError: FS-1130, FS-1131 the partition, FS-1160, FS-1161 the tail, FS-1163 a class without a test record.
    """
    classes, labels = len(source.classes), source.train.labels
    order = None
    if commonest_first:
        held = np.bincount(labels, minlength=classes)
        order = np.lexsort((np.random.default_rng(seed).random(classes), -held)).tolist()
    if imbalance:
        kept = long_tail(labels, classes=classes, imbalance=imbalance, seed=seed, order=order)
    else:
        kept = np.arange(len(labels))
    counts = np.bincount(labels[kept], minlength=classes)
    kind, _, alpha = partition.partition(":")
    try:
        if kind == "iid" and not alpha:
            parts = iid(len(kept), sites, seed=seed)
        elif kind in ("dirichlet", "equal-dirichlet"):
            share = equal_dirichlet if kind == "equal-dirichlet" else dirichlet
            parts = share(labels[kept], sites, alpha=float(alpha), seed=seed)
        else:
            raise ValueError
    except ValueError as error:
        raise ConfigError(
            "FS-1010",
            f"partition {partition!r}",
            expected="iid, dirichlet:ALPHA or equal-dirichlet:ALPHA",
            cure="write for instance equal-dirichlet:0.5",
        ) from error
    rows = {f"site-{index + 1}": kept[part] for index, part in enumerate(parts)}
    groups = class_groups(counts)
    if not all(len(members) for members in groups.values()):
        groups = class_thirds(counts)
    experiment = Experiment(
        classes=source.classes,
        text=source.text,
        mean=source.mean,
        scale=source.scale,
        train={name: source.train.rows(chosen) for name, chosen in rows.items()},
        own={},
        tests={"test": source.test},
        target=source.public.features if len(source.public) else None,
    )
    made = LongTail(experiment, source, rows, counts, groups)
    # Whoever can never be scored is told before anything is trained.
    made.scores(source.test.labels)
    made.scores(source.public.labels, on="public")
    return made


def group_bounds(tail: LongTail) -> str:
    """What many, medium and few mean here, for people."""
    usual = class_groups(tail.counts)
    if all(np.array_equal(usual[name], tail.groups[name]) for name in usual):
        return f"many: more than {MANY} training records, few: fewer than {FEW}"
    shown = (f"{n} {tail.counts[m].min()} to {tail.counts[m].max()}" for n, m in tail.groups.items() if len(m))
    return "thirds of the classes by training records: " + ", ".join(shown)
