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
"""The package itself, and what a CUDA build of torch requires by exact version: other builds do not need it."""


def declared() -> list[str]:
    """The requirements of ``pyproject.toml``, those of the extras included."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return project["dependencies"] + [line for extra in project["optional-dependencies"].values() for line in extra]


def lowest(requirements: list[str]) -> list[str]:
    """``name>=1.2,<2`` gives ``name==1.2``. Raises ``ValueError`` for a requirement of another form."""
    found = []
    for text in requirements:
        parts = re.fullmatch(r"([A-Za-z0-9_.-]+)>=([0-9.]+),<[0-9.]+", text)
        if parts is None:
            raise ValueError(f"pyproject.toml: {text!r} is not of the form name>=LOWEST,<BOUND")
        found.append(f"{parts[1]}=={parts[2]}")
    return found


def installed() -> list[str]:
    """Public versions alone: a local label such as ``+cpu`` names a build that other machines do not have."""
    found = {re.sub(r"[-_.]+", "-", d.metadata["Name"]).lower(): d.version.partition("+")[0] for d in distributions()}
    return [f"{name}=={version}" for name, version in sorted(found.items()) if not LEFT_OUT.fullmatch(name)]


if __name__ == "__main__":
    lists = {"installed": installed, "lowest": lambda: lowest(declared())}
    if len(sys.argv) != 2 or sys.argv[1] not in lists:
        sys.exit(f"usage: python tools/versions.py {'|'.join(lists)}")
    print("\n".join(lists[sys.argv[1]]()))
