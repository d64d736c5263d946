"""Print version lists for pip, one ``name==version`` per line.

``python tools/versions.py installed``: the packages of this interpreter's environment (``constraints.txt``).
``python tools/versions.py lowest``: the lowest versions that ``pyproject.toml`` allows (``make test-lowest``).
"""

from __future__ import annotations

import re
import sys
import tomllib
from importlib.metadata import distributions
from pathlib import Path

ROOT = Path(__file__).parents[1]
LEFT_OUT = re.compile(r"samdistill|pip|triton|(nvidia|cuda)-.*")
"""Packages that are left out: this package, pip, and those that a CUDA build of torch requires by exact version, which
other builds do not need."""


def declared() -> list[str]:
    """Return the requirements of ``pyproject.toml``, including those of the extras."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return project["dependencies"] + [line for extra in project["optional-dependencies"].values() for line in extra]


def lowest(requirements: list[str]) -> list[str]:
    """Convert ``name>=1.2,<2`` to ``name==1.2``. Raises ``ValueError`` for a requirement of another form."""
    found = []
    for text in requirements:
        parts = re.fullmatch(r"([A-Za-z0-9_.-]+)>=([0-9.]+),<[0-9.]+", text)
        if parts is None:
            raise ValueError(f"pyproject.toml: {text!r} is not of the form name>=LOWEST,<BOUND")
        found.append(f"{parts[1]}=={parts[2]}")
    return found


def installed() -> list[str]:
    """Return the installed packages with public versions, as a local label such as ``+cpu`` is specific to a build."""
    found = {re.sub(r"[-_.]+", "-", d.metadata["Name"]).lower(): d.version.partition("+")[0] for d in distributions()}
    return [f"{name}=={version}" for name, version in sorted(found.items()) if not LEFT_OUT.fullmatch(name)]


if __name__ == "__main__":
    lists = {"installed": installed, "lowest": lambda: lowest(declared())}
    if len(sys.argv) != 2 or sys.argv[1] not in lists:
        sys.exit(f"usage: python tools/versions.py {'|'.join(lists)}")
    print("\n".join(lists[sys.argv[1]]()))
