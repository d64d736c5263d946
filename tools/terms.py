"""Write the tables of loss terms (names and default weights) into the pages of ``docs``.

``python tools/terms.py`` writes them. ``python tools/terms.py --check`` exits with 1 if one is out of date. The
docstring of a term begins with a line of the form ``what is compared: formula.``, which gives two columns of its row.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence

from pages import ROOT, between, markdown, write
from samdistill.jobs.detection.label_terms import LABEL_TERMS
from samdistill.jobs.detection.losses import FEATURE_TERMS, OUTPUT_TERMS
from samdistill.jobs.encoder.losses import FEATURE_LOSSES
from samdistill.jobs.prompt.losses import DISTILLED_TERMS, TASK_TERMS
from samdistill.jobs.text.losses import TEXT_TERMS
from samdistill.jobs.video.losses import ALIGN_TERMS, MEMORY_TERMS
from samdistill.registry import TermTable

TABLES: dict[str, tuple[TermTable, ...]] = {
    "encoder": (FEATURE_LOSSES,),
    "detection": (OUTPUT_TERMS, FEATURE_TERMS),
    "detection, labels": (LABEL_TERMS,),
    "prompt, task": (TASK_TERMS,),
    "prompt, distillation": (DISTILLED_TERMS,),
    "video": (MEMORY_TERMS, ALIGN_TERMS),
    "text": (TEXT_TERMS,),
}
BEGIN = re.compile(r"^<!-- terms of (.+): written by tools/terms.py -->$", re.M)
END = "<!-- end of terms -->"


def row(table: TermTable, name: str) -> list[str]:
    """Return a row of the table: term, what it compares, formula and default or published weight."""
    first = (table.get(name).__doc__ or "").partition("\n\n")[0]
    compared, mark, formula = " ".join(first.split()).replace("``", "`").rstrip(".").partition(": ")
    if not mark or "|" in first:
        raise SystemExit(f"{name}: its docstring has to begin with 'what is compared: formula.', without a bar")
    return [f"`{name}`", compared, formula, f"{listed(table)[name]:g}"]


def listed(table: TermTable) -> dict[str, float]:
    """Return the terms of a table that have a default or a published weight, with that weight."""
    return table.weights | table.published


def page(text: str) -> str:
    """Return the page with all of its tables replaced."""
    for found in BEGIN.finditer(text):
        rows = [row(table, name) for table in TABLES[found[1]] for name in listed(table)]
        text = between(text, found[0], END, markdown(["term", "compares", "formula", "weight"], rows, "lllr"))
    return text


def main(arguments: Sequence[str] | None = None) -> int:
    pages = {path: path.read_text() for path in sorted((ROOT / "docs").glob("*.md"))}
    return write({path: page(text) for path, text in pages.items()}, "terms.py", __doc__, arguments)


if __name__ == "__main__":
    sys.exit(main())
