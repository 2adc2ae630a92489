"""How long the aggregator takes to open a sum, from the last share in to the signed sum's hash, and its memory.

The sites' part is done once for all drop-out rates, with the protocol's own functions and the complete graph whatever
n is (in a released round it ends at 128 sites). The rates are nested: the last sites of the cohort are those that drop
out, after they have shared their keys and before their vector comes. Each finish runs in a new process that holds what
an aggregator holds, with everything cold, worker start included; the sum is compared with the plain one.
"""

from __future__ import annotations

import contextlib
import hashlib
import multiprocessing
import os
import secrets
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from fedsecure.secagg import keys, prg, recovery, ring, shamir
from fedsecure.secagg.thresholds import default_colluders, minimum_threshold

RATES = (0, 10, 30)  # per cent


@dataclass(frozen=True)
class Finish:
    """What an aggregator holds when the last share is in."""

    arguments: dict[str, Any]  # of recovery.open_masks
    accumulator: np.ndarray[Any, np.dtype[np.uint32]]


def measure(
    sites: int, length: int, *, repeats: int, progress: Callable[[str], None]
) -> tuple[dict[str, float], float]:
    """Seconds at each drop-out rate (best of ``repeats``), and the peak memory of the process in MB."""
    seconds: dict[str, float] = {}
    peak = 0.0
    for rate, finish, expected in client_phase(sites, length, progress=progress):
        best = float("inf")
        for _ in range(repeats):
            progress(f"server: {sites} sites, {length} words, {rate} % drop-out")
            took, digest, used = _in_new_process(finish)
            assert digest == expected, "the opened sum is not the sum of the survivors"
            best, peak = min(best, took), max(peak, used)
        seconds[f"drop{rate}_s"] = best
    return seconds, peak


def client_phase(sites: int, length: int, *, progress: Callable[[str], None]) -> Iterator[tuple[int, Finish, bytes]]:
    """(rate, what the aggregator holds, SHA-256 of the survivors' plain sum) for every rate, the highest first."""
    ctx, indices = secrets.token_bytes(32), range(1, sites + 1)
    threshold = minimum_threshold(sites, default_colluders(sites))
    private = {i: X25519PrivateKey.generate() for i in indices}
    public = {i: key.public_key().public_bytes_raw() for i, key in private.items()}
    seeds = {i: secrets.token_bytes(32) for i in indices}
    seed_shares, key_shares = {}, {}
    for i in indices:
        progress(f"sites' part: {sites} sites, shares of number {i}")
        seed_shares[i] = shamir.share(seeds[i], threshold, points=indices)
        key_shares[i] = shamir.share(private[i].private_bytes_raw(), threshold, points=indices)
    commitments = {i: keys.commit(seeds[i], ctx=ctx, index=i) for i in indices}
    masked, plain = np.zeros(length, dtype="<u4"), np.zeros(length, dtype="<u4")
    pairs = _PairKeys(ctx, private, public)
    rates = {sites - sites * rate // 100: rate for rate in RATES}
    for i in indices:
        progress(f"sites' part: {sites} sites, vector of number {i}")
        vector = np.full(length, 2**31 + i, dtype="<u4")
        plain += vector
        own = keys.self_mask_key(seeds[i], ctx=ctx, index=i)
        after = [pairs.take(i, j) for j in indices if j > i]
        prg.add_masks(vector, [own, *after], [pairs.take(j, i) for j in indices if j < i])
        masked += vector
        if i in rates:
            live = range(1, i + 1)
            arguments = {
                "ctx": ctx,
                "threshold": threshold,
                "survivors": list(live),
                "seed_shares": {owner: {h: seed_shares[owner][h] for h in live} for owner in live},
                "key_shares": {owner: {h: key_shares[owner][h] for h in live} for owner in range(i + 1, sites + 1)},
                "commitments": commitments,
                "mask_keys": public,
            }
            yield rates[i], Finish(arguments, masked.copy()), hashlib.sha256(plain.data).digest()


class _PairKeys:
    """Pair keys, each agreed on once and handed out twice."""

    def __init__(self, ctx: bytes, private: dict[int, X25519PrivateKey], public: dict[int, bytes]) -> None:
        self._ctx, self._private, self._public = ctx, private, public
        self._known: dict[tuple[int, int], bytes] = {}

    def take(self, low: int, high: int) -> bytes:
        known = self._known.pop((low, high), None)
        if known is None:
            private, peer = self._private[low], self._public[high]
            known = keys.pair_mask_key(private, peer, ctx=self._ctx, own=low, peer=high)
            self._known[low, high] = known
        return known


def _in_new_process(finish: Finish) -> tuple[float, bytes, float]:
    context = multiprocessing.get_context("spawn")
    mine, theirs = context.Pipe()
    process = context.Process(target=_aggregator, args=(theirs,))
    process.start()
    theirs.close()
    mine.send(finish)
    seconds, digest, peak = mine.recv()
    process.join()
    mine.close()
    process.close()
    return seconds, digest, peak


def _aggregator(channel: Connection) -> None:
    finish: Finish = channel.recv()
    _reset_peak()
    start = time.perf_counter()
    masks = recovery.open_masks(**finish.arguments)
    prg.add_masks(finish.accumulator, masks.plus, masks.minus)
    digest = hashlib.sha256(finish.accumulator.data).digest()
    total = ring.lift(finish.accumulator)
    seconds = time.perf_counter() - start
    assert not masks.wrong
    assert len(total) == len(finish.accumulator)
    channel.send((seconds, digest, peak_mb()))


def _reset_peak() -> None:
    with contextlib.suppress(OSError):  # the peak then holds the arrival of the inputs too
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def peak_mb() -> float:
    """Highest resident memory of this process since it was last reset, in MB of 10^6 bytes."""
    for line in Path(f"/proc/{os.getpid()}/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024 / 1e6
    raise OSError("no VmHWM in /proc/self/status")
