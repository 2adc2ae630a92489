"""TOML files into models: paths relative to the file, one error that names the file and the key."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from fedsecure.config.federation import FederationConfig, RunSettings
from fedsecure.config.section import first_problem
from fedsecure.config.site import SiteConfig
from fedsecure.errors import ConfigError

_Model = TypeVar("_Model", FederationConfig, SiteConfig, RunSettings)


_PATHS = ("state", "identity", "ledger", "encoder_file", "target_file")


def read_toml(file: Path) -> dict[str, Any]:
    """A TOML file as nested dictionaries.

    Raises:
        ConfigError: FS-1001 unreadable, FS-1002 not TOML.
    """
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(
            "FS-1001",
            f"{file} cannot be read ({error.strerror})",
            expected="a readable TOML file",
            cure="check the path and its permissions",
        ) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(
            "FS-1002", f"{file} is not TOML ({error})", expected="TOML 1.0 in UTF-8", cure="mend the named line"
        ) from error


def parse_settings(raw: dict[str, Any], file: Path) -> RunSettings:
    """Public settings from a file's content; raises ConfigError FS-1003."""
    return _validated(raw, RunSettings, file)


def load(path: Path | str, kind: type[_Model]) -> _Model:
    """Read a TOML file into ``FederationConfig`` or ``SiteConfig``.

    Raises:
        ConfigError: FS-1001 unreadable, FS-1002 not TOML, FS-1003 a key or value is refused.
    """
    file = Path(path)
    raw = read_toml(file)
    base = file.resolve().parent
    for key in _PATHS:
        if isinstance(raw.get(key), str):
            raw[key] = str(base / raw[key])
    for key in ("train", "evaluation"):
        section = raw.get(key)
        if isinstance(section, dict) and isinstance(section.get("path"), str):
            section["path"] = str(base / section["path"])
    return _validated(raw, kind, file)


def _validated(raw: dict[str, Any], kind: type[_Model], file: Path) -> _Model:
    try:
        return kind.model_validate(raw)
    except ValidationError as error:
        raise ConfigError(
            "FS-1003",
            f"{file}: {first_problem(error)}",
            expected="known keys with values in their ranges",
            cure="see docs/configuration.md for every key",
        ) from error
