"""Tell transformers about the students without importing transformers.

``import samdistill`` must be quick, yet after it ``Sam3TrackerModel.from_pretrained`` must open a merged folder. So a
finder waits until transformers' own registry is imported, and no module of transformers is half loaded, and registers
the students then.
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
    """Loads as the module does by itself; once nothing else of transformers is being loaded, the students can be."""

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
    """Now if transformers' registry is loaded already, else as soon as it is."""
    if TRIGGER in sys.modules:
        import_module("samdistill.students")
    else:
        sys.meta_path.insert(0, _Finder())
