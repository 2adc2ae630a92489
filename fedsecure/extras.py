"""What a plain installation leaves out, and how to get it."""

from __future__ import annotations

from importlib.util import find_spec

from fedsecure.errors import EnvironmentProblem

_EXTRA = {
    "torch": "site",
    "open_clip": "site",
    "opacus": "site",
    "PIL": "site",
    "jinja2": "report",
    "matplotlib": "report",
    "peft": "lora",
    "prometheus_client": "metrics",
    "opentelemetry": "otel",
    "tensorboard": "tensorboard",
    "mlflow": "mlflow",
}


def require(*modules: str) -> None:
    """Make sure that packages are there before any work begins; none is imported.

    Raises:
        EnvironmentProblem: FS-1816, one is missing; names the extra that brings it.
    """
    missing = [module for module in modules if find_spec(module) is None]
    if missing:
        extras = ",".join(sorted({_EXTRA[module] for module in missing}))
        raise EnvironmentProblem(
            "FS-1816",
            f"{', '.join(missing)} not installed",
            expected="the packages that a site needs; an aggregator does without",
            cure=f"pip install 'fedsecure[{extras}]'",
        )
