"""A public target to align with: unlabelled features that everybody holds, in one file bound by its hash.

FACMIC (MICCAI 2024) aligns each site with the images of a target; those have to be public, or consented (facmic.md
§5.4-6). All must hold the same numbers, and encoders on different machines differ in the last bits: so the features are
encoded once, and their file is what travels. No torch.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fedsecure.errors import DataError, ModelError
from fedsecure.files import write_whole
from fedsecure.learning.adapters import Float32
from fedsecure.learning.task import unit_rows
from fedsecure.learning.units import UnitFeatures

MAX_BYTES = 1 << 30
_FORMAT = "fedsecure-target/1"
# Cosine above which two features are of one image: half precision moves it by less, another photograph by far more.
_SAME = 1 - 1e-6
_ROWS = 1024


def write_target(path: Path | str, features: npt.NDArray[Any], *, fingerprint: str) -> str:
    """Write (m, d) unlabelled features of the encoder ``fingerprint``.

    Returns:
        What ``method.alignment.target`` has to be.

    Raises:
        ModelError: FS-1676 fewer than two rows, or values that are not finite float32.
        EnvironmentProblem: FS-1802 the file cannot be written.
    """
    from safetensors.numpy import save

    rows = np.ascontiguousarray(features, np.float32)
    _check_rows(rows, str(path))
    raw = save({"features": rows}, metadata={"format": _FORMAT, "encoder": fingerprint})
    write_whole(Path(path), raw)
    return hashlib.sha256(raw).hexdigest()


def read_target(path: Path | None, *, digest: str, fingerprint: str, dimension: int) -> Float32:
    """The target's (m, d) features, if the file is the run's.

    Args:
        path: this machine's copy; None where none is named.
        digest: SHA-256 in hex of the file, as in ``method.alignment.target``.
        fingerprint, dimension: of the run's encoder.

    Raises:
        ModelError: FS-1676 no file, another file, another encoder's features, or no features at all.
    """
    if path is None:
        raise _refused("no target_file", f"a file of SHA-256 {digest[:16]}…, as method.alignment.target says")
    try:
        size = path.stat().st_size
        raw = path.read_bytes() if size <= MAX_BYTES else b""
    except OSError as error:
        raise _refused(f"{path}, which cannot be read ({error.strerror})", "a readable target file") from error
    found = hashlib.sha256(raw).hexdigest()
    if found != digest:
        raise _refused(f"{path} of SHA-256 {found[:16]}…", f"{digest[:16]}…, as method.alignment.target says")
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            about = file.metadata() or {}
            rows = np.asarray(file.get_tensor("features")) if set(file.keys()) == {"features"} else None
    except SafetensorError as error:
        raise _refused(f"{path}, which is no safetensors file", "a file of write_target") from error
    if about.get("format") != _FORMAT or rows is None or rows.dtype != np.float32:
        raise _refused(f"{path}, which holds no target", "a file of write_target")
    if about.get("encoder") != fingerprint or rows.ndim != 2 or rows.shape[1] != dimension:
        raise _refused(f"{path} with features of another encoder", f"the run's, {fingerprint[:16]}…")
    _check_rows(rows, str(path))
    return rows


def check_apart(target: Float32, units: UnitFeatures) -> None:
    """Refuse a target that holds images of an evaluation set: DataError FS-1137.

    Args:
        target: (m, d) features.
        units: of the evaluation set, with features of the same encoder.
    """
    known = unit_rows(np.asarray(target, np.float64))
    tested = unit_rows(np.asarray(units.features[units.mask], np.float64))
    shared = 0
    for start in range(0, len(tested), _ROWS):
        shared += int(((tested[start : start + _ROWS] @ known.T).max(axis=1) >= _SAME).sum())
    if shared:
        raise DataError(
            "FS-1137",
            f"{shared} images of the evaluation set are also in the target that training aligns with",
            expected="a target that shares no image with the test set",
            cure="take them out, or set method.alignment.transductive = true and call the result transductive",
        )


def _check_rows(rows: Float32, where: str) -> None:
    if rows.ndim != 2 or len(rows) < 2 or rows.shape[1] < 2 or not np.isfinite(rows).all():
        raise _refused(f"{where} with features of shape {rows.shape}", "two rows or more of finite float32 numbers")


def _refused(found: str, expected: str) -> ModelError:
    return ModelError(
        "FS-1676",
        f"the target to align with: {found}",
        expected=expected,
        cure="name this machine's copy of the federation's target as target_file",
    )
