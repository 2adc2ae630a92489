"""Configuration files as frozen pydantic models: ``federation.toml`` for the aggregator, ``site.toml`` for a site.

Unknown keys, wrong types and impossible values are refused with the file and the key. Paths are relative to the file.
"""

from __future__ import annotations

from fedsecure.config.federation import (
    AGGREGATOR_KEYS,
    MAX_PREPARED,
    EncoderChoice,
    EncoderConfig,
    EvaluationConfig,
    FederationConfig,
    PrivacyConfig,
    RoundsConfig,
    RunSettings,
    SiteEntry,
    TelemetryConfig,
    default_delta,
)
from fedsecure.config.method import AlignmentConfig, Clip2flConfig, FacmicConfig, MethodConfig, default_rounds
from fedsecure.config.reading import load, parse_settings, read_toml
from fedsecure.config.section import Label, Positive, SiteId
from fedsecure.config.site import DatasetConfig, PolicyConfig, SiteConfig

__all__ = [
    "AGGREGATOR_KEYS",
    "MAX_PREPARED",
    "AlignmentConfig",
    "Clip2flConfig",
    "DatasetConfig",
    "EncoderChoice",
    "EncoderConfig",
    "EvaluationConfig",
    "FacmicConfig",
    "FederationConfig",
    "Label",
    "MethodConfig",
    "PolicyConfig",
    "Positive",
    "PrivacyConfig",
    "RoundsConfig",
    "RunSettings",
    "SiteConfig",
    "SiteEntry",
    "SiteId",
    "TelemetryConfig",
    "default_delta",
    "default_rounds",
    "load",
    "parse_settings",
    "read_toml",
]
