"""docs/errors.md against the source: every code that is raised has its row, and every row is true."""

from __future__ import annotations

import ast
import inspect
import re
from collections import defaultdict
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import pytest
from docs_pages import DOCS, PACKAGE, blocks, literal, page, sections, table

from fedsecure import errors
from fedsecure.transport import status

CODE = re.compile(r"FS-1\d{3}")
CLASSES = {name: value for name, value in vars(errors).items() if inspect.isclass(value)}
# The bounds of the whole range, named in the description of the exception tree.
NOT_CODES = {"FS-1000", "FS-1899"}
# Codes that are no exceptions: words to a site, and what the check of a recorded round finds.
SENT, FOUND = "abort message", "finding"
FINDERS = {"blame", "_blame", "require"}

# Codes with one meaning that more than one module raises, and which. Both sides of secure aggregation check one set of
# rules, so its modules count as one.
SHARED = {
    "FS-1003": {
        "config/reading.py",
        "privacy/plan.py",
        "simulation/demo.py",
        "simulation/material.py",
        "simulation/placing.py",
        "simulation/simulate.py",
    },
    "FS-1009": {"simulation/demo.py", "simulation/simulate.py"},
    "FS-1010": {
        "simulation/alone.py",
        "simulation/clip2fl.py",
        "simulation/longtail.py",
        "simulation/material.py",
        "simulation/placing.py",
        "simulation/pool.py",
    },
    "FS-1100": {"data/features.py", "data/images.py", "data/loading.py", "simulation/material.py"},
    "FS-1109": {"data/arrays.py", "data/dataset.py"},
    "FS-1111": {"data/arrays.py", "data/dataset.py"},
    "FS-1114": {"data/features.py", "data/images.py"},
    "FS-1137": {"learning/targets.py", "simulation/folders.py"},
    "FS-1202": {"privacy/accounting.py", "privacy/noise.py"},
    "FS-1204": {"methods/recommend.py", "privacy/plan.py"},
    "FS-1211": {"privacy/grid.py", "privacy/plan.py"},
    "FS-1238": {"learning/engines.py", "learning/training.py"},
    "FS-1391": {"secagg", "site/draws.py"},
    "FS-1403": {"identity/keys.py", "identity/provision.py", "simulation/scaffold.py"},
    "FS-1452": {"aggregator/admission.py", "site/doctor.py"},
    "FS-1479": {"identity/authority.py", "identity/register.py"},
    "FS-1464": {"aggregator/enrolment.py", "identity/authority.py"},
    "FS-1631": {"learning/adapters.py", "learning/training.py"},
    "FS-1632": {"learning/adapters.py", "learning/modules.py", "learning/reference.py"},
    "FS-1638": {"learning/distillation.py", "learning/engines.py", "learning/evaluation.py", "learning/features.py"},
    "FS-1640": {"aggregator/step_worker.py", "learning/features.py"},
    "FS-1674": {"learning/last_block.py", "learning/lora_module.py"},
    "FS-1694": {"learning/class_draws.py", "learning/clip2fl_reference.py"},
    "FS-1707": {"aggregator/engine.py", "aggregator/drawing.py"},
    "FS-1706": {"aggregator/engine.py", "aggregator/rounds.py"},
    "FS-1709": {"client.py", "simulation/memory.py"},
    "FS-1718": {"aggregator/enrolment.py", "aggregator/service.py"},
    "FS-1801": {"aggregator/enrolment.py", "aggregator/operations.py", "aggregator/service.py"},
}


@dataclass(slots=True)
class Raised:
    """Where one code stands in the source as a whole string, and the classes it is raised as."""

    modules: set[str] = field(default_factory=set)
    classes: set[str] = field(default_factory=set)


def codes_in(node: ast.AST) -> set[str]:
    found = (n.value for n in ast.walk(node) if isinstance(n, ast.Constant) and isinstance(n.value, str))
    return {text for text in found if CODE.fullmatch(text)}


def called(node: ast.Call) -> str:
    """The last name of what is called."""
    return getattr(node.func, "id", getattr(node.func, "attr", ""))


def assigned(nodes: list[ast.AST]) -> dict[str, set[str]]:
    """Variable → the codes ever assigned to it, alone, in a tuple or in a dictionary."""
    found: dict[str, set[str]] = defaultdict(set)
    for node in nodes:
        if isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
            for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                for name in ast.walk(target):
                    if isinstance(name, ast.Name):
                        found[name.id] |= codes_in(node.value)
    return found


def makers(nodes: list[ast.AST]) -> dict[str, str]:
    """Function that makes an error → the class it says it returns."""
    return {
        node.name: node.returns.id
        for node in nodes
        if isinstance(node, ast.FunctionDef) and isinstance(node.returns, ast.Name) and node.returns.id in CLASSES
    }


def scan(sources: dict[str, str]) -> dict[str, Raised]:
    """Every code of some modules, by path."""
    trees = {path: list(ast.walk(ast.parse(text))) for path, text in sources.items()}
    made = {path: makers(nodes) for path, nodes in trees.items()}
    values = {path: assigned(nodes) for path, nodes in trees.items()}
    everywhere = {name: kind for kinds in made.values() for name, kind in kinds.items()}
    constants = {k: v for named in values.values() for k, v in named.items() if k.isupper() and k[0] != "_"}
    found: dict[str, Raised] = defaultdict(Raised)
    for path, nodes in trees.items():
        mine, variables = {**everywhere, **made[path]}, {**constants, **values[path]}
        compared = {code for n in nodes if isinstance(n, ast.Compare) for code in codes_in(n)}
        for node in nodes:
            if not isinstance(node, ast.Call):
                continue
            kind = called(node) if called(node) in CLASSES else mine.get(called(node), "")
            where = [k.value for k in node.keywords if k.arg == "code"] + node.args[:1]
            if called(node) in FINDERS:
                kind, where = FOUND, node.args[:2]
            elif kind == "" and any(k.arg == "code" for k in node.keywords):
                kind, where = SENT, where[:1]
            if kind == "":
                continue
            for code in {code for part in where for code in codes_of(part, variables)}:
                found[code].classes.add(kind)
                if kind != FOUND:
                    found[code].modules.add(path)
        for code in codes_in(nodes[0]) - compared:
            found[code]
    for what in found.values():
        # A finding speaks of the rule that a live round would have raised.
        what.classes -= {FOUND} if len(what.classes) > 1 else set()
    return found


def codes_of(node: ast.AST, variables: dict[str, set[str]]) -> set[str]:
    """Codes that an argument may be: written there, or assigned to the variable that stands there."""
    name = node.value if isinstance(node, ast.Subscript) else node
    return codes_in(node) or (variables.get(name.id, set()) if isinstance(name, ast.Name) else set())


@cache
def raised() -> dict[str, Raised]:
    files = [path for path in sorted(PACKAGE.rglob("*.py")) if "wire" not in path.parts]
    return scan({path.relative_to(PACKAGE).as_posix(): path.read_text(encoding="utf-8") for path in files})


@cache
def documented() -> dict[str, dict[str, str]]:
    rows: dict[str, dict[str, str]] = {}
    for heading, body in sections(page("errors.md")).items():
        for row in table(body):
            match = re.fullmatch(r'<a id="(fs-1\d{3})"></a>(FS-1\d{3})', row["code"])
            assert match, row["code"]
            assert match[1] == match[2].lower(), "the anchor is the code"
            assert match[2] not in rows, f"{match[2]} stands twice"
            rows[match[2]] = {**row, "heading": heading}
    return rows


def test_every_raised_code_is_documented() -> None:
    missing = {code: sorted(raised()[code].modules) for code in sorted(set(raised()) - set(documented()))}
    assert not missing, "add rows to docs/errors.md"


def test_every_documented_code_is_raised() -> None:
    assert not set(documented()) - set(raised())


def test_the_documented_class_is_the_one_that_is_raised() -> None:
    wrong = {
        code: (row["class"], sorted(raised()[code].classes))
        for code, row in documented().items()
        if raised()[code].classes != {literal(row["class"])}
    }
    assert not wrong


def test_each_code_stands_in_its_familys_section_and_in_order() -> None:
    assert list(documented()) == sorted(documented())
    for code, row in documented().items():
        family, _, base = row["heading"].partition(": ")
        assert family == f"{code[:5]}xx"
        assert status._FAMILIES[code[:5]] is CLASSES[base]
        if row["class"] not in (SENT, FOUND):
            assert issubclass(CLASSES[literal(row["class"])], CLASSES[base])


def test_every_cell_says_something() -> None:
    for code, row in documented().items():
        assert all(row[column] for column in ("meaning", "expected", "cure")), code


def one_room(module: str) -> str:
    return "secagg" if module.startswith("secagg/") else module


def test_no_two_modules_give_one_code_two_meanings() -> None:
    where = {code: {one_room(module) for module in found.modules} for code, found in raised().items()}
    several = {code: modules for code, modules in where.items() if len(modules) > 1}
    assert several == SHARED, "give the new use a code of its own, or list it here if the meaning is the same"


@pytest.mark.parametrize("path", [*sorted(PACKAGE.rglob("*.py")), *sorted(DOCS.glob("*.md"))], ids=lambda p: p.name)
def test_no_text_names_a_code_that_nothing_raises(path: Path) -> None:
    assert not set(CODE.findall(path.read_text(encoding="utf-8"))) - set(raised()) - NOT_CODES


def test_an_error_leads_to_its_row(capsys: pytest.CaptureFixture[str]) -> None:
    from fedsecure.cli.display import show_error

    show_error(errors.EnvironmentProblem("FS-1801", "found", expected="expected", cure="cure"))
    assert "docs/errors.md#fs-1801" in capsys.readouterr().err
    assert '<a id="fs-1801"></a>' in page("errors.md")


def test_the_scan_sees_every_way_to_raise() -> None:
    source = """
_BY_PHASE = {1: "FS-1350", 2: "FS-1351"}
def refuse(code, found) -> PrivacyError: ...
def f(late):
    code, word = ("FS-1325", "a") if late else ("FS-1320", "b")
    raise ProtocolError(code, word)
    raise RoundAborted(_BY_PHASE[1], "x")
    raise RoundAborted(ABORTS[3], "x")
    raise refuse("FS-1220", "x")
    raise errors.DataError("FS-1100", "x")
    send(pb.Abort(code="FS-1707"))
    self.require(good, "FS-1388", "x")
    self.require(good, "FS-1100", "x")
    unknown_way = ["FS-1199"]
"""
    other = 'ABORTS = {3: "FS-1352"}\nraise DataError("FS-1100", "another thing")'
    found = scan({"a.py": source, "b.py": other})
    assert {code: what.classes for code, what in found.items()} == {
        "FS-1325": {"ProtocolError"},
        "FS-1320": {"ProtocolError"},
        "FS-1350": {"RoundAborted"},
        "FS-1351": {"RoundAborted"},
        "FS-1352": {"RoundAborted"},
        "FS-1220": {"PrivacyError"},
        "FS-1100": {"DataError"},
        "FS-1707": {SENT},
        "FS-1388": {FOUND},
        "FS-1199": set(),
    }
    assert found["FS-1100"].modules == {"a.py", "b.py"}


def test_the_pages_snippet_runs(capsys: pytest.CaptureFixture[str]) -> None:
    (block,) = blocks(page("errors.md"), "python")
    exec(compile(block.text, "docs/errors.md", "exec"), {})
    assert capsys.readouterr().out.startswith("FS-1003 ")
