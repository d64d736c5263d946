"""Register the students with transformers without importing transformers.

``import samdistill`` has to be fast, and ``Sam3TrackerModel.from_pretrained`` has to open a merged folder afterwards.
Therefore an import hook registers the students as soon as the module with transformers' model registry has been
imported and no module of transformers is in the middle of its import.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

TRIGGER = "transformers.models.auto.modeling_auto"


class _Counted(Loader):
    """Loader that delegates to the original one. It registers the students when the last active import has ended."""

    loading = 0

    def __init__(self, loader: Loader, finder: _Finder) -> None:
        self.loader, self.finder = loader, finder

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = module.__spec__.loader = self.loader
        _Counted.loading += 1
        try:
            self.loader.exec_module(module)
        finally:
            _Counted.loading -= 1
        if not _Counted.loading and TRIGGER in sys.modules and self.finder in sys.meta_path:
            sys.meta_path.remove(self.finder)
            import_module("samdistill.students")


class _Finder(MetaPathFinder):
    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name.partition(".")[0] != "transformers":
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _Counted(spec.loader, self)
        return spec


def register() -> None:
    """Register the students now if transformers' registry is already imported, and otherwise once it is."""
    if TRIGGER in sys.modules:
        import_module("samdistill.students")
    else:
        sys.meta_path.insert(0, _Finder())
