"""Every failure a user can meet, as one exception tree.

    FedsecureError
    ├── ConfigError        FS-10xx  configuration files and command-line values
    ├── DataError          FS-11xx  images, tables, feature files, DICOM
    ├── PrivacyError       FS-12xx  a guarantee would be broken
    │   ├── BudgetExceeded FS-1201
    │   └── LedgerError    FS-125x
    ├── ProtocolError      FS-13xx  a secure-aggregation message broke a rule
    │   └── RoundAborted   FS-135x
    ├── IdentityError      FS-14xx  keys, certificates, roster
    ├── TransportError     FS-15xx  network, TLS, sizes, deadlines
    ├── ModelError         FS-16xx  encoders, adapters, weights
    ├── RunError           FS-17xx  the run as a whole
    └── EnvironmentProblem FS-18xx  this machine: ports, permissions, missing packages

An error names what was found, what was expected and the cure. ``docs/errors.md`` has a row for each code.
"""

from __future__ import annotations

import re
from typing import ClassVar

# Exit status of an aggregator whose run is over for good.
RUN_OVER = 3
_CODE = re.compile(r"FS-1[0-8]\d\d")


class FedsecureError(Exception):
    """Base of all errors raised on purpose.

    Args:
        code: stable code, ``FS-1000`` … ``FS-1899``; its family must match the class.
        found: what was found, with the offending value.
        expected: what would have been accepted.
        cure: what the reader can do about it.
    """

    families: ClassVar[tuple[str, ...]] = ("FS-1",)

    def __init__(self, code: str, found: str, *, expected: str, cure: str) -> None:
        if not _CODE.fullmatch(code) or not code.startswith(self.families):
            raise AssertionError(f"{code} is no code of {type(self).__name__}")
        self.code = code
        self.found = found
        self.expected = expected
        self.cure = cure
        super().__init__(f"{code}: {found}. Expected {expected}. Cure: {cure}")


class ConfigError(FedsecureError):
    """A configuration file or command-line value is wrong."""

    families = ("FS-10",)


class DataError(FedsecureError):
    """Images, tables or features cannot be used as they are."""

    families = ("FS-11",)


class PrivacyError(FedsecureError):
    """Going on would break a privacy guarantee."""

    families = ("FS-12",)


class BudgetExceeded(PrivacyError):
    """The site's own budget does not allow the query."""


class LedgerError(PrivacyError):
    """The budget ledger cannot be read, written or trusted."""


class ProtocolError(FedsecureError):
    """A secure-aggregation message broke a rule of the protocol."""

    families = ("FS-13",)


class RoundAborted(ProtocolError):
    """This attempt of the round is over without a sum; nothing of it may be used."""


class IdentityError(FedsecureError):
    """A key, certificate or roster is missing, foreign, expired or altered."""

    families = ("FS-14",)


class TransportError(FedsecureError):
    """The other side cannot be reached, or sent something outside the limits."""

    families = ("FS-15",)


class ModelError(FedsecureError):
    """An encoder or adapter cannot be loaded or does not fit."""

    families = ("FS-16",)


class RunError(FedsecureError):
    """The run as a whole cannot start or go on.

    Attributes:
        final: the run is over for good: the same command would begin a new one, with charges of its own.
    """

    families = ("FS-17",)
    final = False


class EnvironmentProblem(FedsecureError):
    """Something about this machine: a port, a permission, a missing package."""

    families = ("FS-18",)


def exit_status(error: FedsecureError) -> int:
    """The exit status of a command that ends with this error: 3 where a run is over for good, or else 1."""
    return RUN_OVER if isinstance(error, RunError) and error.final else 1
