"""Write the table of ``docs/export_targets.md`` from ``benchmarks/results/export.json``.

``python tools/export_table.py`` writes it. ``--check`` exits with 1 if it is out of date.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from typing import Any

from pages import ROOT, between, markdown, write

PAGE, FIGURES = ROOT / "docs" / "export_targets.md", ROOT / "benchmarks" / "results" / "export.json"
BEGIN, END = "<!-- table: written by tools/export_table.py -->", "<!-- end of table -->"


def cell(row: Mapping[str, Any]) -> str:
    """Return what is known of one file in one format: a figure, or a footnote's number for what does not work."""
    if "bytes" not in row:
        return "no"
    size = f"{row['bytes'] / 1e6:.2f} MB"
    if not row["ran"]:
        return f"converted, not run; {size}"
    told = f"{row['difference']:.0e}, {size}"
    return f"**failed**: {told}" if row["reason"] else f"{told}, x {row['ratio']:.2f}"


def lines(kept: Mapping[str, Any]) -> list[str]:
    """Return the table, and the reasons of all cells that do not work."""
    rows = kept["figures"]["rows"]
    targets = list(dict.fromkeys(row["target"] for row in rows))
    files = dict.fromkeys((row["model"], row["part"]) for row in rows)
    found = {(row["model"], row["part"], row["target"]): row for row in rows}
    cells = [
        [model, f"`{part}`", *(cell(found[key]) if (key := (model, part, name)) in found else "-" for name in targets)]
        for model, part in files
    ]
    bad = [row for row in rows if row["reason"]]
    reasons = [f"- {row['model']}, `{row['part']}`, {row['target']}: {row['reason']}" for row in bad]
    machine = f"{kept['machine']['processor']}, one thread, fp32, {kept['date']}. `{kept['command']}`"
    table = markdown(["model", "file", *targets], cells, "l" * (2 + len(targets)))
    return [machine, "", *table, "", *(["What does not work, and why:", "", *reasons, ""] if reasons else [])]


def main(arguments: list[str] | None = None) -> int:
    text = between(PAGE.read_text(), BEGIN, END, lines(json.loads(FIGURES.read_text())))
    return write({PAGE: text}, "export_table.py", __doc__, arguments)


if __name__ == "__main__":
    sys.exit(main())
