"""The rules of the house: imports point down only, and nothing grows too long."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "samdistill"
LEVELS = (
    {
        "errors",
        "io",
        "dist",
        "locks",
        "output",
        "processes",
        "progress",
        "types",
        "registry",
        "config",
        "names",
        "reading",
    },
    {"losses", "metrics", "ops"},
    {"teachers", "students", "data", "store", "checkpoints"},
    {"inference"},
    {"engine", "evaluation", "deployment", "sandbox", "report", "report_figures"},
    {"jobs"},
    {"pipeline", "run_result", "delivery", "models"},
    {"__init__", "_registration", "display"},
    {"cli", "__main__"},
)
LEVEL = {room: level for level, rooms in enumerate(LEVELS) for room in rooms}
APART = ({"teachers", "students"},)
"""Rooms that never import each other, although their level would let them."""
MOST_LINES, MOST_FUNCTION_LINES = 400, 60


def room_of(path: Path, package: Path) -> str:
    return path.relative_to(package).parts[0].removesuffix(".py")


def modules_named(tree: ast.AST, path: Path, package: Path) -> Iterator[str]:
    """Absolute names of everything inside the package that a file imports, at any depth and in any form."""
    here = (package.name, *path.relative_to(package).parent.parts)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(here[: len(here) - node.level + 1]) if node.level else ""
            module = ".".join(part for part in (base, node.module) if part)
            yield from (f"{module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            first = node.args[0]
            if isinstance(first, ast.Constant) and str(first.value).startswith(package.name):
                yield str(first.value)


def imports(package: Path) -> set[tuple[str, str, str]]:
    """(file, its room, room it imports)."""
    found = set()
    for path in sorted(package.rglob("*.py")):
        for name in modules_named(ast.parse(path.read_text()), path, package):
            parts = name.split(".")
            if parts[0] == package.name:
                inside = len(parts) > 1 and any((package / f"{parts[1]}{end}").exists() for end in ("", ".py"))
                found.add((str(path.relative_to(package)), room_of(path, package), parts[1] if inside else "__init__"))
    return {(file, room, target) for file, room, target in found if room != target}


def imports_of_other_jobs(package: Path) -> list[str]:
    """A job is a folder of ``jobs``; what two of them need lies beside the folders, or on a lower level."""
    found = []
    for path in sorted((package / "jobs").glob("*/*.py")):
        for name in modules_named(ast.parse(path.read_text()), path, package):
            other = name.split(".")[2:3] if name.startswith(f"{package.name}.jobs.") else []
            if other and other != [path.parent.name] and (package / "jobs" / other[0]).is_dir():
                found.append(f"{path.relative_to(package)}: a job imports the job {other[0]}")
    return found


def violations(package: Path) -> list[str]:
    edges = imports(package)
    unknown = {room for _, room, target in edges for room in (room, target)} - set(LEVEL)
    found = [*imports_of_other_jobs(package), *(f"{room}: on no level" for room in sorted(unknown))]
    graph: dict[str, set[str]] = {}
    for file, room, target in sorted(edges):
        if unknown & {room, target}:
            continue
        graph.setdefault(room, set()).add(target)
        if LEVEL[target] > LEVEL[room]:
            found.append(f"{file}: imports {target}, which is above {room}")
        if {room, target} in APART:
            found.append(f"{file}: {room} and {target} never import each other")
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        found.append(f"rooms import each other in a circle: {' > '.join(error.args[1])}")
    return found


def lengths(folder: Path) -> list[str]:
    found = []
    for path in sorted(folder.rglob("*.py")):
        text = path.read_text()
        count = len(text.splitlines())
        if count >= MOST_LINES:
            found.append(f"{path.name}: {count} lines")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno is not None:
                length = node.end_lineno - node.lineno + 1
                if length >= MOST_FUNCTION_LINES:
                    found.append(f"{path.name}: {node.name} has {length} lines")
    return found


def test_imports_point_down() -> None:
    assert violations(PACKAGE) == []


def test_every_room_has_a_level_and_edges_are_seen() -> None:
    rooms = {path.name.removesuffix(".py") for path in PACKAGE.iterdir() if path.suffix == ".py" or path.is_dir()}
    assert rooms - {"configs", "__pycache__"} <= set(LEVEL)
    edges = {(room, target) for _, room, target in imports(PACKAGE)}
    assert {("jobs", "engine"), ("jobs", "students"), ("inference", "students"), ("cli", "display")} <= edges
    assert ("_registration", "students") in edges  # imported by name


@pytest.mark.parametrize("folder", ["src", "tests", "benchmarks", "tools"])
def test_nothing_is_too_long(folder: str) -> None:
    assert lengths(ROOT / folder) == []


@pytest.mark.parametrize(
    ("file", "text", "complaint"),
    [
        ("losses/mask.py", "from ..students import STUDENTS", "imports students, which is above losses"),
        ("metrics/deep/a.py", "from ...inference import x", "imports inference, which is above metrics"),
        ("ops/masks.py", "from samdistill.engine.loop import fit", "imports engine, which is above ops"),
        ("inference/a.py", "def f():\n    from .. import engine", "imports engine, which is above inference"),
        ("inference/a.py", "import samdistill.engine as e", "imports engine, which is above inference"),
        ("jobs/video/a.py", "from ...cli import main", "imports cli, which is above jobs"),
        ("jobs/video/a.py", "from ..prompt.losses import task_terms", "a job imports the job prompt"),
        ("data/a.py", "import importlib\nimportlib.import_module('samdistill.engine')", "imports engine"),
        ("store/a.py", "from .. import load_config", "imports __init__, which is above store"),
        ("teachers/sam.py", "from ..students import trunk", "teachers and students never import each other"),
        ("students/trunk.py", "from ..teachers import x", "students and teachers never import each other"),
        ("helpers.py", "from .config import x", "helpers: on no level"),
    ],
)
def test_a_violation_is_found(file: str, text: str, complaint: str, tmp_path: Path) -> None:
    package = tmp_path / "samdistill"
    for room in ("students", "teachers", "inference", "engine", "jobs/prompt"):
        (package / room).mkdir(parents=True)
    (package / "cli.py").touch()
    (package / "config.py").touch()
    (package / file).parent.mkdir(parents=True, exist_ok=True)
    (package / file).write_text(text)
    assert len(found := violations(package)) == 1 and complaint in found[0]
    (package / file).write_text("from .types import UserError" if "/" not in file else "import torch")
    assert [text for text in violations(package) if "on no level" not in text] == []


def test_a_circle_on_one_level_is_found(tmp_path: Path) -> None:
    package = tmp_path / "samdistill"
    for room, other in (("data", "store"), ("store", "data")):
        (package / room).mkdir(parents=True)
        (package / room / "a.py").write_text(f"from ..{other}.a import x")
    assert len(found := violations(package)) == 1 and "in a circle" in found[0]


def test_length_is_measured(tmp_path: Path) -> None:
    (tmp_path / "long.py").write_text("x = 1\n" * MOST_LINES)
    (tmp_path / "deep.py").write_text("class A:\n    def f(self):\n" + "        x = 1\n" * (MOST_FUNCTION_LINES - 1))
    (tmp_path / "fine.py").write_text("def f():\n" + "    x = 1\n" * (MOST_FUNCTION_LINES - 2))
    assert lengths(tmp_path) == ["deep.py: f has 60 lines", "long.py: 400 lines"]
