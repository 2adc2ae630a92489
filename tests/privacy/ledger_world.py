"""What the ledger's tests share: one event, one reservation, and a copy of all its files."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

from fedsecure.messages import Event
from fedsecure.privacy.ledger import Ledger, Reservation

DELTA = 1e-5


DIGEST = hashlib.sha256(b"query").digest()


PAYLOAD = hashlib.sha256(b"payload").digest()


RUN = "ab" * 16


def event(z: float = 5.0, population: str = "train") -> Event:
    return Event(population, "training", z, z / 2)  # type: ignore[arg-type]


def reserve(ledger: Ledger, number: int = 0, z: float = 5.0, **changes: object) -> Reservation:
    arguments: dict[str, object] = {
        "dataset": "xrays",
        "population": "train",
        "events": (event(z),),
        "run": RUN,
        "round": number,
        "attempt": 0,
        "query_digest": DIGEST,
        "limit_epsilon": 8.0,
        "delta": DELTA,
    }
    return ledger.reserve(**(arguments | changes))  # type: ignore[arg-type]


def copy_to(path: Path, folder: Path) -> Path:
    """All files of a ledger as they lie on the disk now, open or not: what a crash or a backup would leave."""
    folder.mkdir()
    for file in path.parent.glob("ledger.db*"):
        shutil.copy(file, folder / file.name)
    return folder / path.name
