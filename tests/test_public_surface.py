"""What others may rely on: the names of the package, its version, and that it is typed."""

from __future__ import annotations

import importlib
import subprocess
import sys
import tomllib
from importlib.metadata import entry_points, version
from pathlib import Path

import pytest

import fedsecure

ROOT = Path(__file__).resolve().parents[1]
# A name leaves this list, or changes its meaning, only with an entry in CHANGELOG.md.
PUBLIC = [
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


def test_the_names_are_pinned() -> None:
    assert sorted(fedsecure.__all__) == sorted(PUBLIC)
    assert dir(fedsecure) == sorted(fedsecure.__all__)


@pytest.mark.parametrize("name", [name for name in PUBLIC if name != "__version__"])
def test_each_name_resolves_and_is_documented(name: str) -> None:
    value = getattr(fedsecure, name)
    assert value.__name__ == name
    assert value.__module__.startswith("fedsecure.")
    assert value.__doc__
    assert getattr(importlib.import_module(value.__module__), name) is value


def test_other_names_do_not_resolve() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Manager'"):
        _ = fedsecure.Manager  # type: ignore[attr-defined]


def test_type_checkers_see_every_name() -> None:
    """The lazy names are declared for type checkers too, from the same modules."""
    source = Path(fedsecure.__file__).read_text(encoding="utf-8")
    declared = source.split("if TYPE_CHECKING:", 1)[1].split("\n\n", 1)[0]
    for name in set(PUBLIC) - {"__version__"}:
        home = fedsecure._HOME[name]
        block = declared.split(f"from {home} import", 1)[1].split("from fedsecure", 1)[0]
        assert name in block.replace(",", " ").replace("(", " ").replace(")", " ").split(), f"{name} of {home}"


def test_import_loads_no_module_of_its_own() -> None:
    code = "import sys, fedsecure; print(*[m for m in sys.modules if m.startswith('fedsecure.')])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0
    assert done.stdout.split() == []


def test_the_version_is_one() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert fedsecure.__version__ == project["version"] == version("fedsecure")


def test_the_package_is_typed() -> None:
    assert (Path(fedsecure.__file__).parent / "py.typed").exists()


def test_the_program_and_the_methods_are_found() -> None:
    (program,) = entry_points(group="console_scripts", name="fedsecure")
    from fedsecure.cli.app import main

    assert program.load() is main
    assert {point.name for point in entry_points(group="fedsecure.methods")} >= {"linear", "facmic", "evaluate"}
