"""One loader for every source of records: ``[train]`` and ``[evaluation]`` of ``site.toml`` become a data set here."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from fedsecure.config import DatasetConfig
from fedsecure.data.arrays import from_arrays, from_torch
from fedsecure.data.dataset import Dataset, Subset
from fedsecure.data.dicom import SUFFIXES as DICOM_SUFFIXES
from fedsecure.data.dicom import DicomFolder
from fedsecure.data.features import FeatureFile, read_feature_header
from fedsecure.data.images import ImageFiles, list_class_tree, read_manifest
from fedsecure.errors import DataError

__all__ = ["detect_format", "from_arrays", "from_torch", "in_holdout", "open_dataset", "read_feature_header"]

Format = Literal["folder", "manifest", "features", "dicom"]


def open_dataset(config: DatasetConfig, *, classes: Sequence[str]) -> Dataset:
    """List a site's records; no pixel or feature is read.

    Args:
        config: where and what, from ``site.toml``.
        classes: the federation's class names; their order is the order of labels.

    Returns:
        the records on the chosen side of ``holdout``.

    Raises:
        DataError: FS-1100 … FS-1119, as the format's reader says; FS-1101 the format is unclear or does not fit
            an option; FS-1118 a stride beyond the file; when the part is first used, FS-1119 it is empty.
    """
    order = tuple(classes)
    path = config.path
    form = detect_format(path) if config.format == "auto" else config.format
    if config.rows is not None and form != "features":
        raise DataError(
            "FS-1101",
            f"rows = {list(config.rows)} with a data set in {form} format",
            expected="rows with feature files only",
            cure='remove "rows" or give a feature file',
        )
    base: Dataset
    if form == "features":
        base = FeatureFile(path, split=config.split or "train", name=config.name, classes=order, public=config.public)
        if config.rows is not None:
            base = _stride(base, *config.rows)
    elif form == "manifest":
        entries = read_manifest(path, order, split=config.split)
        base = ImageFiles(entries, name=config.name, classes=order, public=config.public)
    else:
        root = path / config.split if config.split else path
        if form == "dicom":
            base = DicomFolder(root, name=config.name, classes=order, public=config.public)
        else:
            base = ImageFiles(list_class_tree(root, order), name=config.name, classes=order, public=config.public)
    if config.part == "all":
        return base
    return _part(base, config.holdout, evaluation=config.part == "evaluation")


def detect_format(path: Path) -> Format:
    """The format by what is there: ``.csv``, ``.npz``, a folder with DICOM files, any other folder.

    Raises:
        DataError: FS-1100 nothing there, FS-1101 another kind of file.
    """
    if path.is_dir():
        for _, folders, files in os.walk(path):
            folders.sort()
            if any(Path(f).suffix.lower() in DICOM_SUFFIXES for f in files):
                return "dicom"
        return "folder"
    if not path.exists():
        raise DataError(
            "FS-1100",
            f"{path} does not exist",
            expected="a folder, a manifest .csv or a feature file .npz",
            cure="check the path; it is relative to site.toml",
        )
    by_suffix: dict[str, Format] = {".csv": "manifest", ".npz": "features"}
    form = by_suffix.get(path.suffix.lower())
    if form is None:
        raise DataError(
            "FS-1101",
            f"{path} is none of the known formats",
            expected="a folder, a manifest .csv or a feature file .npz",
            cure='set "format" of the data set, or convert it',
        )
    return form


def in_holdout(unit: str, holdout: float) -> bool:
    """Whether a unit (patient, else record) is kept for evaluation: a fixed hash of its id falls below ``holdout``.

    The choice depends on nothing but the id, so new records never move old ones, and all images of a patient stay
    on one side.
    """
    digest = hashlib.sha256(b"fedsecure/holdout/v1\0" + unit.encode()).digest()
    return int.from_bytes(digest[:8], "big") < holdout * 2**64


def _stride(base: Dataset, start: int, step: int) -> Dataset:
    if not 0 <= start < len(base) or step < 1:
        raise DataError(
            "FS-1118",
            f"rows = [{start}, {step}] over {len(base)} rows",
            expected=f"a start from 0 to {len(base) - 1} and a step of at least 1",
            cure="mend rows in site.toml",
        )
    return Subset(base, range(start, len(base), step))


def _part(base: Dataset, holdout: float, *, evaluation: bool) -> Dataset:
    def choose(listed: Dataset) -> list[int]:
        patients = listed.patient_ids
        units = patients if patients is not None else listed.record_ids
        chosen = [i for i, unit in enumerate(units) if in_holdout(unit, holdout) == evaluation]
        if not chosen:
            side = "evaluation" if evaluation else "train"
            raise DataError(
                "FS-1119",
                f"part = {side!r} of {listed.name!r} with holdout = {holdout} holds none of {len(listed)} records",
                expected="at least one record on that side",
                cure="choose another holdout, or a data set with more units",
            )
        return chosen

    return Subset(base, choose)
