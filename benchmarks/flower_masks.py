"""Flower's SecAgg+ masking, timed in a process of its own: ``python flower_masks.py LENGTH PEERS``.

For every line on standard input, masks one vector and prints the seconds it took. It needs ``flwr`` and numpy, nothing
of fedsecure, so that it runs in whatever environment Flower is installed in. Flower's own functions are called in the
order its client calls them, on a vector that is quantised already and with the keys given.
"""

from __future__ import annotations

import os
import sys
import time

import numpy as np

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
from flwr.common.secure_aggregation.ndarrays_arithmetic import (
    parameters_addition,
    parameters_mod,
    parameters_subtraction,
)
from flwr.common.secure_aggregation.secaggplus_utils import pseudo_rand_gen

MODULUS, TARGET = 1 << 32, 1 << 22  # the defaults of its workflow


def main(length: int, peers: int) -> None:
    """Serve until standard input ends."""
    quantised = [np.random.default_rng(1).integers(0, TARGET, length, dtype=np.int32)]
    shapes = [array.shape for array in quantised]
    own, *shared = [os.urandom(32) for _ in range(peers + 1)]
    print("ready", flush=True)
    for _ in sys.stdin:
        start = time.process_time()
        masked = parameters_addition(quantised, pseudo_rand_gen(own, MODULUS, shapes))
        for number, seed in enumerate(shared):
            combine = parameters_subtraction if number % 2 else parameters_addition
            masked = combine(masked, pseudo_rand_gen(seed, MODULUS, shapes))
        masked = parameters_mod(masked, MODULUS)
        print(time.process_time() - start, flush=True)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
