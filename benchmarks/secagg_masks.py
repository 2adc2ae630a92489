"""Masking one vector: against the AES-256-CTR floor of one core, against two processes, and against Flower's SecAgg+.

What takes part in one ratio is measured in turns in one loop, and the best of each counts, so that all saw the same
machine. One worker's time is processor time, which is the time on the wall of an idle machine; that of two is on the
wall. Keys are given in all cases: neither key agreement nor quantisation is in any figure.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from fedsecure.secagg import parallel, prg

FLOOR_BUFFERS = (1 << 16, 1 << 17, 1 << 18, 1 << 20)


def measure(
    length: int, peers: int, *, repeats: int, flower_repeats: int, python: str = sys.executable
) -> dict[str, float | None]:
    """One vector of ``length`` 32-bit words, ``peers`` pair masks and the self mask, with one worker.

    Flower runs under the interpreter ``python``; its figures are ``None`` where that has no ``flwr``.
    """
    vector, plus, minus = _case(length, peers)
    flower = Flower(python, length, peers)
    floor, ours = _Floor(vector.nbytes * (peers + 1)), _Best()
    for turn in range(repeats):
        floor.measure()
        ours.measure(lambda: prg.add_masks(vector, plus, minus, workers=1))
        if flower.present and turn < flower_repeats:
            flower.measure()
    flower.stop()
    floor_ms = 1e3 * floor.seconds
    flower_ms = 1e3 * flower.seconds if flower.present else None
    return {
        "ms": 1e3 * ours.seconds,
        "aes_floor_ms": floor_ms,
        "of_floor": floor_ms / (1e3 * ours.seconds),
        "flwr_ms": flower_ms,
        "vs_flwr": flower_ms / (1e3 * ours.seconds) if flower_ms else None,
    }


def measure_two(length: int, peers: int, *, repeats: int) -> dict[str, float]:
    """How many times faster two processes are than one; started beforehand."""
    vector, plus, minus = _case(length, peers)
    parallel.warm_up(2)
    one, two = _Best(time.perf_counter), _Best(time.perf_counter)
    for _ in range(repeats):
        one.measure(lambda: prg.add_masks(vector, plus, minus, workers=1))
        two.measure(lambda: prg.add_masks(vector, plus, minus, workers=2))
    return {"speedup": one.seconds / two.seconds}


class Flower:
    """Flower's masking in a process of its own, one vector at a call; see ``flower_masks.py``."""

    def __init__(self, python: str, length: int, peers: int) -> None:
        command = [python, str(Path(__file__).with_name("flower_masks.py")), str(length), str(peers)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        self._process = subprocess.Popen(command, text=True, bufsize=1, **pipes)
        self.present = self._read() == "ready"
        self.seconds = float("inf")

    def measure(self) -> None:
        assert self._process.stdin
        self._process.stdin.write("mask\n")
        self.seconds = min(self.seconds, float(self._read()))

    def stop(self) -> None:
        self._process.communicate()

    def _read(self) -> str:
        assert self._process.stdout
        return self._process.stdout.readline().strip()


def _case(length: int, peers: int) -> tuple[Any, list[bytes], list[bytes]]:
    keys = [os.urandom(32) for _ in range(peers + 1)]
    half = 1 + peers // 2
    return np.zeros(length, dtype="<u4"), keys[:half], keys[half:]


class _Best:
    def __init__(self, clock: Callable[[], float] = time.process_time) -> None:
        self.seconds = float("inf")
        self._clock = clock

    def measure(self, work: Callable[[], Any]) -> None:
        start = self._clock()
        work()
        self.seconds = min(self.seconds, self._clock() - start)


class _Floor:
    """AES-256-CTR on zeros into a buffer that is there already, nothing else; the best of several buffer sizes."""

    def __init__(self, size: int) -> None:
        self.seconds = float("inf")
        self._fill = Cipher(algorithms.AES(os.urandom(32)), modes.CTR(bytes(16))).encryptor().update_into
        self._size = size
        self._buffers = [(memoryview(bytes(length)), bytearray(length)) for length in FLOOR_BUFFERS]

    def measure(self) -> None:
        fill, size = self._fill, self._size
        for zeros, out in self._buffers:
            start = time.process_time()
            for _ in range(size // len(out)):
                fill(zeros, out)
            rest = size % len(out)
            fill(zeros[:rest], memoryview(out)[:rest])
            self.seconds = min(self.seconds, time.process_time() - start)
