"""Finds installed methods by entry point (group ``fedsecure.methods``): no code ever travels."""

from __future__ import annotations

from functools import cache
from importlib.metadata import entry_points
from typing import Any, cast

from fedsecure.errors import ConfigError
from fedsecure.methods.base import Method, TrainingMethod


def load_method(name: str) -> Method:
    """The installed method of that name.

    Raises:
        ConfigError: FS-1004, no such method; names those there are.
    """
    return cast(Method, _load(name))


def load_training_method(name: str) -> TrainingMethod:
    """The installed method of that name, if it trains an adapter.

    Raises:
        ConfigError: FS-1004, no such method, or one that does not train.
    """
    method = _load(name)
    if not hasattr(method, "plan"):
        raise _unknown(name)
    return cast(TrainingMethod, method)


@cache
def _load(name: str) -> Any:
    for point in entry_points(group="fedsecure.methods"):
        if point.name == name:
            return point.load()
    raise _unknown(name)


def _unknown(name: str) -> ConfigError:
    names = sorted({point.name for point in entry_points(group="fedsecure.methods")} - {"evaluate"})
    return ConfigError(
        "FS-1004",
        f"no training method is called {name!r}",
        expected="one of " + ", ".join(names),
        cure="correct [method] name, or install the package that brings the method",
    )
