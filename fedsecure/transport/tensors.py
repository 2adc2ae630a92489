"""Broadcast tensors on the wire: one safetensors blob each, checked against the hash that the query names."""

from __future__ import annotations

from hmac import compare_digest
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load, save

from fedsecure.errors import ProtocolError
from fedsecure.messages import digest_tensor

MAX_TENSOR_BYTES = 1 << 30


def pack_tensor(name: str, tensor: npt.NDArray[Any]) -> bytes:
    """One named tensor as a safetensors blob."""
    return save({name: np.ascontiguousarray(tensor)})


def unpack_tensor(name: str, digest: bytes, blob: bytes) -> npt.NDArray[Any]:
    """The tensor of that name, if its hash is ``digest``.

    Raises:
        ProtocolError: FS-1370, the bytes are not the tensor that the query names (model inconsistency).
    """
    try:
        tensor: npt.NDArray[Any] = load(blob)[name]
    except (SafetensorError, KeyError, ValueError, TypeError, OverflowError) as error:
        raise _mismatch(name) from error
    if not compare_digest(digest_tensor(name, tensor), digest):
        raise _mismatch(name)
    return tensor


def check_like(name: str, tensor: npt.NDArray[Any], like: npt.NDArray[Any]) -> None:
    """Refuse a broadcast tensor that is not finite, or not of the type and shape of ``like``.

    Raises:
        ProtocolError: FS-1374.
    """
    if tensor.dtype == like.dtype and tensor.shape == like.shape and bool(np.isfinite(tensor).all()):
        return
    same = tensor.dtype == like.dtype and tensor.shape == like.shape
    found = "values that are not finite" if same else f"{tensor.dtype} of shape {tensor.shape}"
    raise ProtocolError(
        "FS-1374",
        f"the tensor {name!r} holds {found}",
        expected=f"finite {like.dtype} of shape {like.shape}, as the run's settings say",
        cure="do not go on with this aggregator; report it to the consortium",
    )


def _mismatch(name: str) -> ProtocolError:
    return ProtocolError(
        "FS-1370",
        f"the bytes sent for {name!r} do not hash to what the query names",
        expected="the tensor every other site trains on",
        cure="do not go on with this aggregator; report it to the consortium",
    )
