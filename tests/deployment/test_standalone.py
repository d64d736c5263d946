"""Modules joined to one file."""

from __future__ import annotations

import ast

import pytest

from samdistill.deployment import runtime
from samdistill.deployment.standalone import joined, standalone

FIRST = '''"""First."""
import math

from numpy import array

SIDE = 4
"""Pixels."""


def area():
    return SIDE**2
'''
LAST = '''"""Last.

More."""
from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from numpy import ones

from .first import SIDE, area

if TYPE_CHECKING:
    from .other import Other

SIDE = 4
"""Pixels."""
# a reason
FOUND = area() + SIDE + int(ones(1)[0]) + math.floor(1.5)
'''
OTHER, RENAMED = '"""Last."""\nSIDE = 5\n', '"""Last."""\nfrom .first import area as size\n'


def test_a_joined_file_has_each_definition_once_and_runs_alone() -> None:
    text = joined([FIRST, LAST])
    space: dict[str, object] = {}
    exec(compile(text, "joined", "exec"), space)
    assert space["FOUND"] == 22 and space["__doc__"] == "Last.\n\nMore."
    assert text.count("SIDE = 4") == text.count('"""Pixels."""') == text.count("import math") == 1
    assert "from numpy import array, ones" in text and "# a reason\nFOUND" in text and "Other" not in text


@pytest.mark.parametrize(
    ("second", "problem"),
    [
        ('"""Last."""\nSIDE = 5\n', "SIDE has two definitions"),
        ('"""Last."""\nfrom .first import area as size\n', "rename"),
    ],
)
def test_modules_that_cannot_be_joined_are_refused(second: str, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        joined([FIRST, second])


def test_predict_py_imports_three_libraries_and_has_every_public_name() -> None:
    tree = ast.parse(standalone())
    modules = {
        name.partition(".")[0]
        for node in ast.walk(tree)
        for name in (
            [one.name for one in node.names] if isinstance(node, ast.Import)
            else [str(node.module)] if isinstance(node, ast.ImportFrom) else []
        )
    }  # fmt: skip
    assert {"numpy", "PIL", "onnxruntime"} <= modules and not modules & {"torch", "scipy", "samdistill"}
    assert not any(isinstance(node, ast.ImportFrom) and node.level for node in ast.walk(tree))
    names = {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    assert set(runtime.__all__) - names == {"SINGLE"}
