"""Switches that turn one check off, and what counts as a win: with them each attack is shown to work."""

from __future__ import annotations

import numpy as np
import pytest

from fedsecure.identity import keys as identity_keys
from fedsecure.secagg.latch import MemoryLatch


def stolen(won: tuple[np.ndarray, np.ndarray]) -> bool:
    """Whether the attacker holds exactly what it was after."""
    return bool(np.array_equal(won[0], won[1]))


def trusting(patch: pytest.MonkeyPatch) -> None:
    """Switch every signature check off."""
    patch.setattr(identity_keys, "verify", lambda *_: True)


def forgetful(patch: pytest.MonkeyPatch) -> None:
    """Switch the latch off."""
    for mark in ("begin", "mark_signed", "mark_consumed"):
        patch.setattr(MemoryLatch, mark, lambda *_: None)
