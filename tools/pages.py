"""Shared code of the scripts that write pages: Markdown tables, parts of a page between two marks, ``--check``."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def markdown(columns: Sequence[str], rows: Sequence[Sequence[str]], align: str) -> list[str]:
    """Return the lines of a Markdown table. ``align`` has ``l`` or ``r`` for each column."""
    rules = {"l": "---", "r": "---:"}
    lines = [columns, [rules[side] for side in align], *rows]
    return [f"| {' | '.join(cells)} |" for cells in lines]


def between(text: str, begin: str, end: str, lines: Sequence[str]) -> str:
    """Replace the lines of ``text`` between ``begin`` and ``end``. Raises ``SystemExit`` if one is missing."""
    before, _, rest = text.partition(f"{begin}\n")
    _, mark, after = rest.partition(f"{end}\n")
    if not mark:
        raise SystemExit(f"the lines {begin!r} and {end!r} are not there")
    body = "".join(f"{line}\n" for line in lines)
    return f"{before}{begin}\n{body}{end}\n{after}"


def write(wanted: Mapping[Path, str], script: str, doc: str | None, arguments: Sequence[str] | None) -> int:
    """Write the pages that differ from ``wanted``. With ``--check``, report them and return 1 instead."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if a page is out of date")
    check = parser.parse_args(arguments).check
    stale = [path for path, text in wanted.items() if not path.is_file() or path.read_text() != text]
    for path in stale:
        if not check:
            path.write_text(wanted[path])
        print(f"{path.relative_to(ROOT)}: {f'out of date; run python tools/{script}' if check else 'written'}")
    if not stale:
        print("all pages are current")
    return int(check and bool(stale))
