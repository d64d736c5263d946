"""Reading a run's configuration: the YAML names its job, the job's class checks it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..config import Run
from ..config.loading import check_against, read_config
from ..errors import UserError
from ..reading import shown
from ..registry import did_you_mean
from . import JOBS


def validate(raw: dict[str, Any], origin: str) -> Run:
    """A checked config, or a ``UserError`` with origin, key, problem and suggestion, one line per problem."""
    name = raw.get("job", next(iter(JOBS)))
    if not isinstance(name, str) or name not in JOBS:
        raise UserError(f"{origin}: no job is called {shown(name)}{did_you_mean(str(name), list(JOBS))}")
    return check_against(JOBS[name].config, raw, origin)


def load_config(name: str | Path, overrides: Sequence[str] = ()) -> Run:
    """Read ``name`` (a path, or a packaged recipe), follow ``extends``, apply ``key=value`` overrides, validate.

    Args:
        name: Path of a YAML file, or name of a packaged recipe such as ``encoder/es_rv_m``.
        overrides: ``key=value`` settings that replace those of the file.

    Returns:
        The job's configuration: ``EncoderRunConfig``, ``DetectionRunConfig``, ``PromptRunConfig`` or
        ``VideoRunConfig``.

    Raises:
        UserError: The file cannot be read, or a key or a value is wrong; one line per problem.
    """
    return validate(read_config(name, overrides), str(name))
