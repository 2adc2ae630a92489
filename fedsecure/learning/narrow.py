"""Sums of records in float32 that still move by at most C when one record changes.

Where every unit is one record, float32 adds up to K = 256 of them, and float64 adds the blocks. Computed in any order,
with or without fused operations, each coordinate of a block's sum errs by at most γ = (K+1)u/(1 − (K+1)u) of the sum
of absolute values (Higham, Accuracy and Stability of Numerical Algorithms, 2002, §3.1; u = 2^-24), so the whole vector
errs by at most γ·K·C′, where C′ bounds each record's. Zeroing one record (``REPLACE_SPECIAL``: its place stays, so that
other blocks keep their bits) moves the sum by at most C′(1 + 2Kγ). C′ is C over that, 0.8 % less; and it depends on
public numbers alone, never on what a machine can do or how many records there are. No torch.
"""

from __future__ import annotations

from typing import Literal

Precision = Literal["float64", "float32"]

# Records of a block, K.
BLOCK = 256
_GAMMA = (BLOCK + 1) * 2.0**-24 / (1 - (BLOCK + 1) * 2.0**-24)
# C′/C. A norm over so many entries, and the scaling of a factor, err by less than 2^-12 in float32.
NARROW = (1 - 2.0**-12) / (1 + 2 * BLOCK * _GAMMA)
WIDEST = 2048
# A smaller square is lost in float32 and counts as this much; a length above 2^64 overflows, and its record adds
# nothing. So no product of two lengths is taken for less than it is, and what scaling a factor loses is below 2^-56.
LEAST_SQUARE = 2.0**-100
_NORMS = 2.0**-30, 2.0**30


def sums_narrowly(precision: Precision, *, records: int, max_grad_norm: float) -> bool:
    """Whether records are clipped to C′, so that sums of 256 of them may be float32.

    Args:
        precision: asked for.
        records: public cap m on a unit's records.
        max_grad_norm: C.
    """
    return precision == "float32" and records == 1 and _NORMS[0] <= max_grad_norm <= _NORMS[1]


__all__ = ["BLOCK", "LEAST_SQUARE", "NARROW", "WIDEST", "Precision", "sums_narrowly"]
