"""Export of models to files for devices. The package is also the function: ``samdistill.export(...)``.

Example:
    >>> import samdistill as sd
    >>> sd.export("sandbox-mobile", "exported").passed  # doctest: +SKIP
    True
"""

import sys
from types import ModuleType
from typing import Any


class _Room(ModuleType):
    """Module that can be called: importing anything in here binds ``samdistill.export`` to it, not to the function."""

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        """Call ``folder.export``."""
        from .folder import export

        return export(*arguments, **options)


sys.modules[__name__].__class__ = _Room
