"""``samdistill models``: the students beside the teacher they replace."""

from __future__ import annotations

from ..students.catalogue import Breakdown, StudentInfo, breakdown, list_students


def models(name: str | None = None) -> list[StudentInfo] | Breakdown:
    """All nine students, or one (or any timm backbone) by module. Counted on the meta device, nothing is allocated."""
    return list_students() if name is None else breakdown(name)
