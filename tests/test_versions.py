"""What is installed: every requirement has two bounds, constraints.txt keeps to them, and nothing else is imported."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
NEEDED = [Requirement(text) for text in PROJECT["dependencies"]]
DEVELOPMENT = [Requirement(text) for text in PROJECT["optional-dependencies"]["dev"]]
EXTRAS = {Requirement(text).name for extra, lines in PROJECT["optional-dependencies"].items() if extra != "dev"
          for text in lines}  # fmt: skip
"""Imported by the code that needs the extra, when it runs."""
OPTIONAL = EXTRAS - {requirement.name for requirement in DEVELOPMENT}
"""Not in the environment of the tests."""
CONSTRAINTS = (ROOT / "constraints.txt").read_text().splitlines()


def versions(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "tools" / "versions.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=600)


def pinned(lines: list[str]) -> dict[str, Version]:
    return {canonicalize_name(name): Version(version) for name, version in (line.split("==") for line in lines)}


@pytest.mark.parametrize("requirement", NEEDED + DEVELOPMENT, ids=lambda requirement: requirement.name)
def test_a_requirement_has_two_bounds_and_a_pinned_version_between_them(requirement: Requirement) -> None:
    assert {clause.operator for clause in requirement.specifier} == {">=", "<"}
    assert pinned(CONSTRAINTS)[canonicalize_name(requirement.name)] in requirement.specifier


def test_constraints_are_names_and_public_versions_alone() -> None:
    """A local label (+cpu) or an address names a build that other machines do not have."""
    assert CONSTRAINTS and all(re.fullmatch(r"[a-z0-9-]+==[0-9][a-z0-9.]*", line) for line in CONSTRAINTS)
    assert not [line for line in CONSTRAINTS if line.startswith(("nvidia", "cuda", "triton", "samdistill"))]


def test_the_installed_list_is_that_of_the_environment() -> None:
    done = versions("installed")
    found = pinned(done.stdout.splitlines())
    assert done.returncode == 0 and {canonicalize_name(r.name) for r in NEEDED + DEVELOPMENT} <= set(found)
    assert "samdistill" not in found and all(found[canonicalize_name(r.name)] in r.specifier for r in NEEDED)


def test_the_lowest_list_is_the_lower_bounds() -> None:
    done = versions("lowest")
    found = pinned(done.stdout.splitlines())
    lower = {canonicalize_name(r.name): Version(c.version) for r in NEEDED + DEVELOPMENT for c in r.specifier
             if c.operator == ">="}  # fmt: skip
    assert done.returncode == 0 and lower.items() <= found.items()
    assert set(found) - set(lower) == OPTIONAL
    assert versions("highest").returncode != 0


def imported(path: Path) -> set[str]:
    """Top-level names of the absolute imports in a file, at any depth."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
            found.add(node.module.partition(".")[0])
    return found


def test_every_imported_package_is_declared() -> None:
    names = set().union(*(imported(path) for path in (ROOT / "src").rglob("*.py"))) - sys.stdlib_module_names
    owners, needed = packages_distributions(), {canonicalize_name(requirement.name) for requirement in NEEDED}
    undeclared = {name for name in names if not needed & {canonicalize_name(owner) for owner in owners.get(name, ())}}
    apart = {
        "litert_torch",
        "ai_edge_litert",
        "ai_edge_quantizer",
    }  # they need an environment of their own, so no extra has them
    assert names and undeclared <= {"samdistill", *apart, *(name.replace("-", "_") for name in EXTRAS)}
