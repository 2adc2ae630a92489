"""The floors of the house: imports point down only, and heavy packages stay where they belong."""

from __future__ import annotations

import ast
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "fedsecure"
FLOOR = {
    "cli": 5,
    "__main__": 5,
    "__init__": 5,
    "client": 4,
    "site": 4,
    "release": 4,
    "aggregator": 4,
    "simulation": 4,
    "methods": 3,
    "learning": 2,
    "vision": 2,
    "data": 2,
    "transport": 2,
    "secagg": 1,
    "privacy": 1,
    "identity": 1,
    "messages": 0,
    "errors": 0,
    "config": 0,
    "files": 0,
    "audit_log": 0,
    "logs": 0,
    "extras": 0,
    "write_ahead": 0,
    "wire": 0,
}
SIDEWAYS = {("secagg", "identity"), ("learning", "vision"), ("learning", "data")}
# Programs of floor 4 wire each other: the client opens the door, the simulation lays out programs.
SIDEWAYS |= {("client", "site"), ("site", "release"), ("simulation", "client"), ("simulation", "aggregator")}
SIDEWAYS |= {("messages", "errors"), ("config", "errors"), ("files", "errors"), ("extras", "errors")}
SIDEWAYS |= {("audit_log", "errors"), ("logs", "errors")}
FORBIDDEN = {
    "methods": {"grpc"},
    "learning": {"grpc"},
    "vision": {"grpc"},
    "data": {"grpc"},
    "transport": {"torch"},
    "secagg": {"grpc", "torch", "sqlalchemy"},
    "privacy": {"grpc", "torch"},
    "identity": {"torch"},
    "aggregator": {"torch"},
}
NO_PSEUDO_RANDOMNESS = ("secagg", "privacy")


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@cache
def modules(path: Path, *, top_only: bool = False) -> set[str]:
    """All modules a file imports, those for type checkers left out."""
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            return
        if top_only and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            return
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.add(node.module or "")
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(path.read_text(encoding="utf-8")))
    return found


SOURCES = sorted(p for p in PACKAGE.rglob("*.py") if room_of(p) != "wire")


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_down(path: Path) -> None:
    room = room_of(path)
    assert room in FLOOR, f"{room} has no floor"
    for module in modules(path):
        parts = module.split(".")
        if parts[0] != "fedsecure" or len(parts) < 2 or parts[1] not in FLOOR:
            continue
        target = parts[1]
        if target != room and room not in ("__main__", "__init__"):
            down = FLOOR[target] < FLOOR[room] or (room, target) in SIDEWAYS
            assert down, f"{path.relative_to(PACKAGE)} imports {module}: floor {FLOOR[room]} to {FLOOR[target]}"


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_rooms_do_not_know_what_they_must_not(path: Path) -> None:
    packages = {module.split(".")[0] for module in modules(path)}
    assert not packages & FORBIDDEN.get(room_of(path), set())


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_secrets_come_from_the_operating_system(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert not {"pickle", "cPickle", "dill", "joblib"} & {m.split(".")[0] for m in modules(path)}
    if room_of(path) in NO_PSEUDO_RANDOMNESS:
        assert "random" not in {module.split(".")[0] for module in modules(path)}
        assert "np.random" not in text
        assert "numpy.random" not in text


def test_the_check_can_fail(tmp_path: Path) -> None:
    upward = tmp_path / "x.py"
    upward.write_text("def f():\n    from fedsecure.cli.app import main\n")
    assert "fedsecure.cli.app" in modules(upward)
    assert FLOOR["cli"] > FLOOR["secagg"]


BLOCKED = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {blocked!r}:
            raise ImportError("blocked: " + name)
sys.meta_path.insert(0, Block())
{body}
"""


def run_blocked(blocked: set[str], body: str) -> subprocess.CompletedProcess[str]:
    code = BLOCKED.format(blocked=blocked, body=body)
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240)


def test_methods_import_without_torch() -> None:
    body = (
        "from importlib.metadata import entry_points\n"
        "names = [p.load().name for p in entry_points(group='fedsecure.methods')]\n"
        "assert {'linear', 'facmic', 'evaluate'} <= set(names), names"
    )
    done = run_blocked({"torch", "open_clip", "opacus", "grpc"}, body)
    assert done.returncode == 0, done.stderr


def test_aggregator_imports_without_torch() -> None:
    done = run_blocked({"torch", "open_clip", "opacus", "PIL"}, "import fedsecure.aggregator.program")
    assert done.returncode == 0, done.stderr
    control = run_blocked({"grpc"}, "import fedsecure.aggregator.program")
    assert control.returncode != 0


def test_import_stays_light() -> None:
    body = (
        "import fedsecure, fedsecure.cli.app\n"
        "heavy = {'torch', 'grpc', 'numpy', 'pydantic', 'dp_accounting', 'sqlalchemy', 'matplotlib'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )
    done = run_blocked(set(), body)
    assert done.returncode == 0, done.stderr
