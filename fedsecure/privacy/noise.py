"""The privacy generator: every random number a guarantee rests on (privacy.md §3.8, secagg.md §4.3).

An AES-256-CTR stream under a key from the operating system, never seeded, saved or copied. On it: uniform
words, Gaussian values, Poisson sampling, and exact discrete Gaussian samples after
Canonne, Kamath and Steinke, "The Discrete Gaussian for Differential Privacy" (2020), algorithm 3, vectorised:
decisions are taken in float64 and re-taken with big numbers and further random bits wherever float64 could be
wrong.
"""

from __future__ import annotations

import decimal
import functools
import hashlib
import math
import os
import threading
from decimal import Decimal
from fractions import Fraction
from typing import ClassVar, NoReturn

import numpy as np
import numpy.typing as npt
from cryptography.hazmat.primitives.ciphers import Cipher, CipherContext, algorithms, modes

from fedsecure.errors import PrivacyError
from fedsecure.messages import FloatArray
from fedsecure.privacy import ziggurat

Words = npt.NDArray[np.uint64]
Integers = npt.NDArray[np.int64]

_CHUNK = 1 << 16
_ZEROS = bytes(8 * _CHUNK)
_MAX_STD = 1 << 40
# Below this top word the unseen bits of U matter in float64: 2^45 of 2^64.
_SMALL_WORD = np.uint64(1 << 45)


class PrivacyRng:
    """Random numbers from an AES-256-CTR stream under 32 bytes from the operating system, unknown to
    everyone.

    Attributes:
        seeded: True if somebody could know the stream; a report must then say "NO PRIVACY (seeded)".
    """

    seeded: ClassVar[bool] = False

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process = os.getpid()
        self._stream = self._open()

    def _key(self) -> bytes:
        return os.urandom(32)

    def _open(self) -> CipherContext:
        return Cipher(algorithms.AES(self._key()), modes.CTR(bytes(16))).encryptor()

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise PrivacyError(
            "FS-1209", f"a {type(self).__name__} was to be copied or pickled",
            expected="a generator that lives and dies in one process: its stream must never repeat",
            cure="create a new PrivacyRng() where the numbers are needed",
        )  # fmt: skip

    def uniform_words(self, n: int) -> Words:
        """``n`` independent uniform 64-bit words, shape (n,)."""
        out = np.empty(n, dtype="<u8")
        self._fill(out)
        return out

    def _fill(self, words: Words) -> None:
        """Overwrite ``words`` with the next of the stream."""
        raw = memoryview(words.view(np.uint8).data) if len(words) else memoryview(b"")
        # A forked child would repeat its parent's stream.
        if self._process != os.getpid():
            PrivacyRng.__init__(self)
        with self._lock:
            for start in range(0, len(raw), len(_ZEROS)):
                piece = raw[start : start + len(_ZEROS)]
                self._stream.update_into(_ZEROS[: len(piece)], piece)

    def uniform(self, n: int) -> FloatArray:
        """``n`` uniform multiples of 2^-53 in (0, 1], float64, shape (n,)."""
        return ziggurat.uniform(n, self._fill)

    def gaussian(self, n: int, std: float = 1.0) -> FloatArray:
        """``n`` normal values of mean 0, float64, shape (n,) (:mod:`fedsecure.privacy.ziggurat`); 0 ≤ ``std``."""
        return ziggurat.normal(n, self._fill, std) if std > 0 else np.zeros(n)

    def poisson_mask(self, n: int, q: float) -> npt.NDArray[np.bool_]:
        """Poisson sampling: each of ``n`` units independently with probability ``q`` in (0, 1]; bool, shape
        (n,).

        The probability is q rounded down to a multiple of 2^-64, so never more than is accounted for.
        """
        if not 0 < q <= 1:
            raise PrivacyError(
                "FS-1202", f"sampling rate = {q!r}", expected="a number in (0, 1]",
                cure="1 is full batch; less is Poisson sampling",
            )  # fmt: skip
        if q == 1:
            return np.ones(n, dtype=np.bool_)
        threshold = np.uint64(math.floor(Fraction(q) * 2**64))
        return np.asarray(self.uniform_words(n) < threshold, dtype=np.bool_)

    def discrete_gaussian(self, n: int, variance: Fraction, *, exact: bool = False) -> Integers:
        """``n`` independent samples of the discrete Gaussian N_Z(0, σ²): P(y) ∝ exp(−y²/2σ²), exactly.

        Args:
            n: number of samples.
            variance: σ², rational, 0 ≤ σ ≤ 2^40; 0 gives zeros.
            exact: take every decision with big numbers (thousands of times slower; for tests).

        Returns:
            int64, shape (n,).

        Raises:
            PrivacyError: FS-1210 the variance is out of range, or this machine's logarithm is not accurate
            enough.
        """
        if not 0 <= variance <= _MAX_STD**2:
            raise PrivacyError(
                "FS-1210", f"noise variance of {float(variance):.3g} grid steps squared",
                expected="a variance between 0 and 2^80", cure="choose a coarser grid",
            )  # fmt: skip
        out = np.zeros(n, dtype=np.int64)
        if variance == 0:
            return out
        _check_arithmetic()
        done = 0
        while done < n:
            # About 76 % of the proposals are accepted when σ is large.
            accepted = self._propose(min(_CHUNK, int(1.36 * (n - done)) + 32), variance, exact)
            taken = min(len(accepted), n - done)
            out[done : done + taken] = accepted[:taken]
            done += taken
        return out

    def _propose(self, count: int, variance: Fraction, exact: bool) -> Integers:
        """Accepted ones among ``count`` discrete Laplace proposals of scale t = ⌊σ⌋ + 1."""
        t = math.isqrt(variance.numerator // variance.denominator) + 1
        words_u, words_v = self.uniform_words(count), self.uniform_words(count)
        bits = np.unpackbits(self.uniform_words((count + 63) // 64).view(np.uint8), count=count)

        # |Y| = ⌊−t ln U⌋ is geometric: P(|Y| ≥ k) = exp(−k/t).
        position = (words_u.astype(np.float64) + 0.5) * 2.0**-64
        position = -t * np.log(position)
        magnitude = np.floor(position)
        distance = position - magnitude
        margin = t * 2.0**-44
        doubtful = (words_u < _SMALL_WORD) | (distance < margin) | (distance > 1.0 - margin)
        if exact:
            doubtful[:] = True
        for k in np.flatnonzero(doubtful):
            magnitude[k] = self._exact_magnitude(int(words_u[k]), t)

        # Accept with probability exp(−(|Y| − σ²/t)² / 2σ²).
        offset = magnitude - float(variance / t)
        chance = np.exp(offset * offset * (-0.5 / float(variance)))
        draw = (words_v.astype(np.float64) + 0.5) * 2.0**-64
        accept = draw < chance
        doubtful = np.abs(draw - chance) < chance * 2.0**-40 + 2.0**-50
        if exact:
            doubtful[:] = True
        for k in np.flatnonzero(doubtful):
            accept[k] = self._exact_accept(int(words_v[k]), int(magnitude[k]), variance, t)

        negative = bits.astype(np.bool_)
        # (−, 0) is dropped, else zero would count twice.
        accept &= ~(negative & (magnitude == 0))
        values = magnitude.astype(np.int64)
        np.negative(values, out=values, where=negative)
        return values[accept]

    def _exact_magnitude(self, word: int, t: int) -> int:
        """⌊−t ln U⌋ for the infinite uniform U that begins with ``word``, drawing further bits as needed."""
        words = 1
        while True:
            if word > 0:
                with decimal.localcontext() as context:
                    context.prec = 40 + 20 * words + len(str(t))
                    shift = 64 * words * Decimal(2).ln()
                    low = t * (shift - Decimal(word + 1).ln())
                    high = t * (shift - Decimal(word).ln())
                    slack = Decimal(t * words).scaleb(10 - context.prec)
                    first, last = math.floor(low - slack), math.floor(high + slack)
                    # U < 1 strictly, so −t ln U > 0 whatever the rounding says.
                    if max(first, 0) == last:
                        return last
            word = (word << 64) | int(self.uniform_words(1)[0])
            words += 1

    def _exact_accept(self, word: int, magnitude: int, variance: Fraction, t: int) -> bool:
        """V < exp(−(magnitude − σ²/t)²/2σ²) for the infinite uniform V that begins with ``word``."""
        exponent = (magnitude - variance / t) ** 2 / (2 * variance)
        if exponent == 0:
            return True
        words = 1
        while True:
            with decimal.localcontext() as context:
                context.prec = 40 + 20 * words + len(str(math.ceil(exponent)))
                scaled = (-Decimal(exponent.numerator) / Decimal(exponent.denominator)).exp() * (1 << 64 * words)
                slack = scaled.scaleb(30 - context.prec) if scaled else Decimal(1)
                if Decimal(word + 1) <= scaled - slack:
                    return True
                if Decimal(word) >= scaled + slack:
                    return False
            word = (word << 64) | int(self.uniform_words(1)[0])
            words += 1


class SeededRng(PrivacyRng):
    """A reproducible stream for simulations. It protects nobody: whoever knows the seed can subtract the
    noise."""

    seeded = True

    def __init__(self, seed: int | bytes) -> None:
        self._seed = seed
        super().__init__()

    def _key(self) -> bytes:
        raw = self._seed if isinstance(self._seed, bytes) else str(self._seed).encode()
        return hashlib.sha256(b"fedsecure/simulation/v1\0" + raw).digest()


@functools.cache
def _check_arithmetic() -> None:
    """The margins of the float64 decisions assume ln and exp within 2^-47 relative; check it here, once."""
    worst = 0.0
    with decimal.localcontext() as context:
        context.prec = 40
        for k in range(1, 33):
            u = (k * 0.030_311 + 1e-3) * 2.0 ** -(k % 20)
            for ours, truth in (
                (float(np.log(np.array([u]))[0]), Decimal(u).ln()),
                (float(np.exp(np.array([-40 * u]))[0]), Decimal(-40 * u).exp()),
            ):
                worst = max(worst, float(abs(Decimal(ours) / truth - 1)))
    if worst > 2.0**-47:
        raise PrivacyError(
            "FS-1210", f"this machine's ln or exp is off by {worst:.1e}", expected="at most 2^-47 relative error",
            cure="use a NumPy build with accurate float64 functions",
        )  # fmt: skip
