"""The records of a simulation: a feature file's splits pooled, shared out to sites by a public seed, and laid out.

Each site gets a feature file of its own, as a hospital that brings features would, so that from there on nothing knows
it is a simulation. The test split is dealt out in turns and declared public.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fedsecure.config import DatasetConfig
from fedsecure.data import partition as partitions
from fedsecure.data.features import FeatureFile, read_feature_header
from fedsecure.errors import ConfigError
from fedsecure.files import make_folder

Array = npt.NDArray[Any]


@dataclass(frozen=True, slots=True, eq=False)
class Pool:
    """Pooled training records, test records and the public arrays.

    Attributes:
        features, labels: (n, d) and (n,) to be shared out.
        test_features, test_labels: to be evaluated on.
        public: ``classes``, ``text`` and, where there is one, ``mean``.
        dimension, fingerprint: what the sites' feature files will say.
        digest: SHA-256 in hex over everything above.
    """

    features: Array
    labels: Array
    test_features: Array
    test_labels: Array
    public: Mapping[str, Array]
    dimension: int
    fingerprint: str
    digest: str

    @property
    def classes(self) -> tuple[str, ...]:
        return tuple(str(name) for name in self.public["classes"])


def read_pool(file: Path, *, train: Sequence[str], test: str, centre: str) -> Pool:
    """Read a feature file (docs/datasets.md) and choose the public mean.

    Args:
        file: ``.npz``.
        train: splits whose records are pooled and shared out.
        test: split to evaluate on; none of ``train``.
        centre: ``"file"`` takes the file's own ``mean``, if it has one; ``"none"`` none; ``"FILE.npz:ARRAY"`` the mean
            of that array's unit rows, which whoever says so declares public.

    Raises:
        ConfigError: FS-1010 the test split is trained on, or ``centre`` names no array.
        DataError: as the reader of feature files says; FS-1114 no such split.
    """
    if test in train or len(set(train)) != len(train):
        raise ConfigError(
            "FS-1010",
            f"--train {','.join(train)} with --test {test}",
            expected="distinct splits to train on, and another one to test on",
            cure="leave the test split out of --train",
        )
    header = read_feature_header(file)
    held = {split: FeatureFile(file, split=split, name=split, classes=header.classes) for split in (*train, test)}
    features = np.concatenate([held[split].features() for split in train])
    labels = np.concatenate([held[split].labels for split in train])
    test_features, test_labels = held[test].features(), held[test].labels
    public: dict[str, Array] = {"classes": np.array(header.classes), "text": header.text}
    mean = header.mean if centre == "file" else None if centre == "none" else _mean_of(centre)
    if mean is not None:
        public["mean"] = mean
    sha = hashlib.sha256(b"fedsecure/pool/v1\0")
    for array in (features, labels, test_features, test_labels, *public.values()):
        sha.update(f"{array.dtype.str}{array.shape}".encode() + np.ascontiguousarray(array).tobytes())
    return Pool(
        features=features,
        labels=labels,
        test_features=test_features,
        test_labels=test_labels,
        public=public,
        dimension=header.dimension,
        fingerprint=_fingerprint(public, test_features[:1], test_labels[:1]),
        digest=sha.hexdigest(),
    )


def _mean_of(centre: str) -> Array:
    file, colon, name = centre.rpartition(":")
    try:
        with np.load(file, allow_pickle=False) as held:
            rows = np.asarray(held[name], np.float64)
        lengths = np.linalg.norm(rows, axis=1, keepdims=True)
        if rows.ndim != 2 or not np.isfinite(lengths).all() or lengths.min() == 0:
            raise ValueError("not rows of finite features")
    except (OSError, KeyError, ValueError) as error:
        raise ConfigError(
            "FS-1010",
            f"--centre {centre}" if colon else f"--centre {centre!r}",
            expected='"file", "none", or FILE.npz:ARRAY with an array of public image features of the same encoder',
            cure="see docs/simulation.md, what may be a public mean",
        ) from error
    return np.asarray((rows / lengths).mean(axis=0), np.float32)


def _fingerprint(public: Mapping[str, Array], features: Array, labels: Array) -> str:
    """As every site's own file will have it; it depends on the public arrays alone."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "public.npz"
        arrays: dict[str, Any] = {**public, "test_x": features, "test_y": labels}
        np.savez(file, **arrays)
        return read_feature_header(file).fingerprint


def share_out(pool: Pool, names: Sequence[str], *, partition: str, seed: int) -> dict[str, npt.NDArray[np.int64]]:
    """Rows of the pool for each site.

    Args:
        pool: the records.
        names: of the sites.
        partition: ``"iid"``, ``"dirichlet:ALPHA"`` (label skew) or ``"quantity:ALPHA"`` (sizes).
        seed: public.

    Raises:
        ConfigError: FS-1010 no such partition.
        DataError: FS-1130, FS-1131 the records cannot be shared out so.
    """
    kind, _, text = partition.partition(":")
    try:
        alpha = float(text) if text else 1.0
    except ValueError:
        kind = ""
    count = len(names)
    if kind == "iid" and not text:
        parts = partitions.iid(len(pool.labels), count, seed=seed)
    elif kind == "dirichlet":
        parts = partitions.dirichlet(pool.labels, count, alpha=alpha, seed=seed)
    elif kind == "quantity":
        parts = partitions.quantity(len(pool.labels), count, alpha=alpha, seed=seed)
    else:
        raise ConfigError(
            "FS-1010",
            f"--partition {partition!r}",
            expected="iid, dirichlet:ALPHA or quantity:ALPHA",
            cure="write for instance dirichlet:0.5",
        )
    return dict(zip(names, parts, strict=True))


def write_site(pool: Pool, folder: Path, site: str, *, rows: Array, turn: tuple[int, int]) -> DatasetConfig:
    """A site's own feature file under ``folder``; returns its training section, whose twin is the test split.

    Args:
        rows: of the pool that the site holds.
        turn: (start, step): its share of the test records.
    """
    file = make_folder(folder) / f"{site}.npz"
    start, step = turn
    arrays: dict[str, Any] = {
        **pool.public,
        "train_x": pool.features[rows],
        "train_y": pool.labels[rows],
        "test_x": pool.test_features[start::step],
        "test_y": pool.test_labels[start::step],
    }
    np.savez(file, **arrays)
    return DatasetConfig(name=f"{site}-train", path=file, format="features", split="train")
