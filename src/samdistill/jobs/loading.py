"""Loading of configurations. The YAML names the job, and the job's class validates it."""

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
    """Validate a configuration with the class of its job.

    Args:
        raw: The parsed YAML.
        origin: Name of the file, for error messages.

    Raises:
        UserError: A key or a value is wrong. One line per problem, with a suggestion.
    """
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
        The job's configuration: ``EncoderRunConfig``, ``DetectionRunConfig``, ``PromptRunConfig``, ``VideoRunConfig``
        or ``TextRunConfig``.

    Raises:
        UserError: The file cannot be read, or a key or a value is wrong; one line per problem.

    Example:
        >>> load_config("encoder/es_rv_m", ["train.epochs=5"]).train.epochs
        5
    """
    return validate(read_config(name, overrides), str(name))
