"""Jobs by name. To add one, write a package with a ``Job``, a row in ``JOBS``, and recipes in ``configs/<name>/``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any

from ..errors import UserError
from ..registry import did_you_mean

if TYPE_CHECKING:
    from .base import Job  # not imported at run time, because it imports torch


class Jobs(Mapping[str, "Job[Any]"]):
    """Mapping from names to job objects. A job's package is imported on first access, so listing names is cheap."""

    def __init__(self, places: Mapping[str, str]) -> None:
        """Set up the mapping.

        Args:
            places: ``package.module:Class`` by job name.
        """
        self._places = dict(places)
        self._jobs: dict[str, Job[Any]] = {}

    def register(self, name: str, place: str) -> None:
        """Add a job.

        Args:
            name: Name in configs.
            place: ``package.module:Class``.

        Raises:
            ValueError: The name is taken.
        """
        if name in self._places:
            raise ValueError(f"job {name!r} is registered twice")
        self._places[name] = place

    def __getitem__(self, name: str) -> Job[Any]:
        if name not in self._places:
            raise UserError(f"no job is called {name!r}{did_you_mean(name, list(self._places))}")
        if name not in self._jobs:
            module, _, attribute = self._places[name].partition(":")
            self._jobs[name] = getattr(import_module(module), attribute)()
        return self._jobs[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, name: object) -> bool:
        return name in self._places


JOBS = Jobs(
    {
        "encoder": f"{__name__}.encoder.job:EncoderJob",
        "detection": f"{__name__}.detection.job:DetectionJob",
        "prompt": f"{__name__}.prompt.job:PromptJob",
        "video": f"{__name__}.video.job:VideoJob",
        "text": f"{__name__}.text.job:TextJob",
    }
)
"""All jobs. No other module names them. A config without ``job`` is one of the first job."""
