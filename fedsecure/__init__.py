"""Hospitals fine-tune CLIP together through secure, private sums: nothing else leaves a site.

>>> import fedsecure
>>> fedsecure.__version__
'0.1.0'

The names below are the whole public surface; each is imported when it is first used, so that ``import fedsecure``
is quick and an aggregator never loads torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedsecure.client import Client, Moment, Receipt
    from fedsecure.config import FederationConfig, SiteConfig
    from fedsecure.data.arrays import from_arrays, from_torch
    from fedsecure.data.dataset import Dataset
    from fedsecure.data.loading import open_dataset
    from fedsecure.errors import (
        BudgetExceeded,
        ConfigError,
        DataError,
        EnvironmentProblem,
        FedsecureError,
        IdentityError,
        LedgerError,
        ModelError,
        PrivacyError,
        ProtocolError,
        RoundAborted,
        RunError,
        TransportError,
    )
    from fedsecure.learning.artefact import Adapter, load_adapter
    from fedsecure.messages import Aggregate, Contribution, Event, Query, Segment
    from fedsecure.privacy.plan import Privacy, PrivacyPlan

__version__ = "0.1.0"

_HOME = {
    "Adapter": "fedsecure.learning.artefact",
    "Aggregate": "fedsecure.messages",
    "BudgetExceeded": "fedsecure.errors",
    "Client": "fedsecure.client",
    "ConfigError": "fedsecure.errors",
    "Contribution": "fedsecure.messages",
    "DataError": "fedsecure.errors",
    "Dataset": "fedsecure.data.dataset",
    "EnvironmentProblem": "fedsecure.errors",
    "Event": "fedsecure.messages",
    "FederationConfig": "fedsecure.config",
    "FedsecureError": "fedsecure.errors",
    "IdentityError": "fedsecure.errors",
    "LedgerError": "fedsecure.errors",
    "ModelError": "fedsecure.errors",
    "Moment": "fedsecure.client",
    "Privacy": "fedsecure.privacy.plan",
    "PrivacyError": "fedsecure.errors",
    "PrivacyPlan": "fedsecure.privacy.plan",
    "ProtocolError": "fedsecure.errors",
    "Query": "fedsecure.messages",
    "Receipt": "fedsecure.client",
    "RoundAborted": "fedsecure.errors",
    "RunError": "fedsecure.errors",
    "Segment": "fedsecure.messages",
    "SiteConfig": "fedsecure.config",
    "TransportError": "fedsecure.errors",
    "from_arrays": "fedsecure.data.arrays",
    "from_torch": "fedsecure.data.arrays",
    "load_adapter": "fedsecure.learning.artefact",
    "open_dataset": "fedsecure.data.loading",
}

__all__ = [
    "Adapter",
    "Aggregate",
    "BudgetExceeded",
    "Client",
    "ConfigError",
    "Contribution",
    "DataError",
    "Dataset",
    "EnvironmentProblem",
    "Event",
    "FederationConfig",
    "FedsecureError",
    "IdentityError",
    "LedgerError",
    "ModelError",
    "Moment",
    "Privacy",
    "PrivacyError",
    "PrivacyPlan",
    "ProtocolError",
    "Query",
    "Receipt",
    "RoundAborted",
    "RunError",
    "Segment",
    "SiteConfig",
    "TransportError",
    "__version__",
    "from_arrays",
    "from_torch",
    "load_adapter",
    "open_dataset",
]


def __getattr__(name: str) -> Any:
    try:
        home = _HOME[name]
    except KeyError:
        raise AttributeError(f"module 'fedsecure' has no attribute {name!r}") from None
    return getattr(import_module(home), name)


def __dir__() -> list[str]:
    return sorted(__all__)
