"""Images in a folder and its sub-folders, without annotations."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from .images import IMAGE_SUFFIXES, unread
from .skipped import BadInput
from .sources import SOURCES, Source, key_problem


@SOURCES.register("folder")
class FolderSource(Source):
    """Every image below ``root``.

    A key is the path relative to ``root``, with forward slashes. Hidden files and folders are skipped. Symbolic links
    to folders are followed, but a folder is listed once: under its own path if it is below ``root``, else under that of
    the first link to it. A cycle of links therefore ends. A folder that cannot be listed and an image in a format that
    is not read are reported in ``problems``.
    """

    labelled = False

    @classmethod
    def splits(cls, root: Path) -> list[str]:
        return []

    def __init__(self, root: Path, split: str | None = None) -> None:
        self.root = root
        keys, self.problems = [], []
        for folder, names in self._folders():
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

    def _folders(self) -> Iterator[tuple[str, list[str]]]:
        """Every folder once, with the names of its files. Links wait until the folders below ``root`` are listed."""
        seen, starts = set[str](), [str(self.root)]
        for start in starts:  # grows by the links that are found
            for folder, below, names in os.walk(start, onerror=self._unreadable):
                if (real := os.path.realpath(folder)) in seen:
                    below.clear()
                    continue
                seen.add(real)
                below[:] = sorted(name for name in below if name[0] != ".")
                starts += [path for name in below if os.path.islink(path := os.path.join(folder, name))]
                yield folder, names

    def _unreadable(self, error: OSError) -> None:
        self.problems.append(BadInput(str(error.filename), f"folder cannot be listed: {error.strerror}"))

    def path(self, key: str) -> Path:
        return self.root / key
