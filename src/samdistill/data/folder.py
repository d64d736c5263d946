"""Images in a folder and its sub-folders, without annotations."""

from __future__ import annotations

import os
from pathlib import Path

from .images import IMAGE_SUFFIXES, unread
from .skipped import BadInput
from .sources import SOURCES, Source, key_problem


@SOURCES.register("folder")
class FolderSource(Source):
    """Every image below ``root``.

    A key is the path relative to ``root``, with forward slashes. Hidden files and folders are skipped. Symbolic links
    to folders are followed; a folder that was already visited when its parent is listed is not visited again, so a
    cycle of links ends. A folder that cannot be listed and an image in a format that is not read are reported in
    ``problems``.
    """

    labelled = False

    @classmethod
    def splits(cls, root: Path) -> list[str]:
        return []

    def __init__(self, root: Path, split: str | None = None) -> None:
        self.root = root
        seen: set[str] = set()
        keys, self.problems = [], []
        for folder, below, names in os.walk(root, followlinks=True, onerror=self._unreadable):
            seen.add(os.path.realpath(folder))
            below[:] = [b for b in below if b[0] != "." and os.path.realpath(os.path.join(folder, b)) not in seen]
            for name in (name for name in names if name[0] != "."):
                key = Path(folder, name).relative_to(root).as_posix()
                if name.lower().endswith(IMAGE_SUFFIXES):
                    keys.append(key)
                elif reason := unread(name):
                    self.problems.append(BadInput(key, reason))
        for key in keys:
            if reason := key_problem(key):
                self.problems.append(BadInput(repr(key), reason))
        self.keys = sorted(key for key in keys if key_problem(key) is None)

    def _unreadable(self, error: OSError) -> None:
        self.problems.append(BadInput(str(error.filename), f"folder cannot be listed: {error.strerror}"))

    def path(self, key: str) -> Path:
        return self.root / key
