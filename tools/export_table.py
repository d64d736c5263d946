"""Write the table of ``docs/export_targets.md`` from ``benchmarks/results/export.json``.

``python tools/export_table.py`` writes it. ``--check`` exits with 1 if it is out of date.
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pages import ROOT, between, markdown, write

PAGE, FIGURES = ROOT / "docs" / "export_targets.md", ROOT / "benchmarks" / "results" / "export.json"
BEGIN, END = "<!-- table: written by tools/export_table.py -->", "<!-- end of table -->"


def cell(row: Mapping[str, Any]) -> str:
    """Return what is known of one file: the largest difference or the agreement, the size, and the time."""
    if "bytes" not in row:
        return "no"
    size = f"{row['bytes'] / 1e6:.2f} MB"
    if not row["ran"]:
        if row["reason"]:
            return f"**failed**: does not run, {size}" if "not run" in row["reason"] else f"**failed**: {size}"
        return f"converted, not run; {size}"
    near = f"{row['difference']:.0e}" if row["precision"] == "fp32" else f"agrees {row['agreement']:.3f}"
    if row["reason"]:
        return f"**failed**: {near}, {size}"
    return f"{near}, {size}, x {row['milliseconds']['ratio']:.2f}"


def lines(kept: Mapping[str, Any]) -> list[str]:
    """Return the table, the reasons of all cells that do not work, and the quality of the ONNX files."""
    rows = [row for row in kept["figures"]["rows"] if "quality" not in row]
    targets = list(dict.fromkeys(row["target"] for row in rows))
    keys = sorted({(row["model"], row["part"], row["precision"]) for row in rows}, key=_order(rows))
    found = {(row["model"], row["part"], row["precision"], row["target"]): row for row in rows}
    cells = [
        [model, f"`{part}`", precision,
         *(cell(found[key]) if (key := (model, part, precision, name)) in found else "-" for name in targets)]
        for model, part, precision in keys
    ]  # fmt: skip
    reasons = defaultdict(list)
    for row in rows:
        if row["reason"]:
            reasons[row["target"], row["reason"]].append(f"{row['model']} `{row['part']}` {row['precision']}")
    told = [f"- {target}: {reason} ({', '.join(which)})" for (target, reason), which in reasons.items()]
    machine = f"{kept['machine']['processor']}, one thread, {kept['date']}. `{kept['command']}`"
    table = markdown(["model", "file", "precision", *targets], cells, "l" * (3 + len(targets)))
    quality = _quality([row for row in kept["figures"]["rows"] if "quality" in row])
    return [machine, "", *table, "", *(["What does not work, and why:", "", *told, ""] if told else []), *quality]


def _order(rows: Sequence[Mapping[str, Any]]) -> Callable[[tuple[str, str, str]], tuple[int, int]]:
    """Return the place of a file and precision in the table: files as they come, fp32 before the others."""
    places = {key: place for place, key in enumerate(dict.fromkeys((row["model"], row["part"]) for row in rows))}
    return lambda key: (places[key[:2]], ("fp32", "fp16", "int8").index(key[2]) if key[2] != "-" else 3)


def _quality(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    precisions = ("eager", "fp32", "fp16", "int8")
    cells = [
        [row["model"], metric, *(f"{found[p][metric]:.4f}" if p in found else "-" for p in precisions)]
        for row in rows for found in (row["quality"],) for metric in found["eager"]
    ]  # fmt: skip
    table = markdown(["model", "metric", *precisions], cells, "ll" + "r" * len(precisions))
    return ["Quality of the ONNX files on held-out scenes of the sandbox:", "", *table, ""]


def main(arguments: list[str] | None = None) -> int:
    text = between(PAGE.read_text(), BEGIN, END, lines(json.loads(FIGURES.read_text())))
    return write({PAGE: text}, "export_table.py", __doc__, arguments)


if __name__ == "__main__":
    sys.exit(main())
