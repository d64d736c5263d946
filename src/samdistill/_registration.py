"""Tell transformers about the student trunk without importing transformers.

``import samdistill`` must be quick, yet after it ``Sam3TrackerModel.from_pretrained`` must open a merged folder. So a
finder waits until transformers' own registry is imported and registers the student right after it.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

TRIGGER = "transformers.models.auto.modeling_auto"


class _ThenRegister(Loader):
    def __init__(self, loader: Loader) -> None:
        self.loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        import_module("samdistill.students")


class _Finder(MetaPathFinder):
    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != TRIGGER:
            return None
        sys.meta_path.remove(self)
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _ThenRegister(spec.loader)
        return spec


def register() -> None:
    """Now if transformers' registry is loaded already, else as soon as it is."""
    if TRIGGER in sys.modules:
        import_module("samdistill.students")
    else:
        sys.meta_path.insert(0, _Finder())
