"""samdistill: distil the Segment Anything family into small students.

Every verb of the command line is a function here, with the same name. Importing the package also tells transformers
about the student trunk, so that ``Sam3TrackerModel.from_pretrained`` opens merged models; the heavy libraries are
imported when something is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ._registration import register

if TYPE_CHECKING:
    from .checkpoints.inspect import inspect_path as inspect
    from .checkpoints.merge import merge
    from .data import prepare_sa1b
    from .errors import UserError
    from .evaluation.evaluate import evaluate, evaluate_concepts
    from .evaluation.evaluate_masks import evaluate_masks
    from .evaluation.evaluate_videos import evaluate_videos
    from .inference.predict import predict
    from .inference.predict_video import predict_video
    from .inference.video import VideoSession
    from .jobs.loading import load_config
    from .pipeline import cache, check, demo, plan, run, train
    from .sandbox.render import render_sandbox
    from .sandbox.teachers import train_teacher
    from .students import StudentTrunk, StudentTrunkConfig
    from .students.catalogue import list_models

__version__ = "0.1.0"

__all__ = [
    "StudentTrunk",
    "StudentTrunkConfig",
    "UserError",
    "VideoSession",
    "__version__",
    "cache",
    "check",
    "demo",
    "evaluate",
    "evaluate_concepts",
    "evaluate_masks",
    "evaluate_videos",
    "inspect",
    "list_models",
    "load_config",
    "merge",
    "plan",
    "predict",
    "predict_video",
    "prepare_sa1b",
    "render_sandbox",
    "run",
    "train",
    "train_teacher",
]  # fmt: skip

_HOMES = {
    "UserError": "errors", "StudentTrunk": "students", "StudentTrunkConfig": "students",
    "VideoSession": "inference.video", "prepare_sa1b": "data", "load_config": "jobs.loading",
    "merge": "checkpoints.merge", "inspect": "checkpoints.inspect", "list_models": "students.catalogue",
    "plan": "pipeline", "check": "pipeline", "cache": "pipeline", "train": "pipeline", "run": "pipeline",
    "demo": "pipeline",
    "evaluate": "evaluation.evaluate", "evaluate_concepts": "evaluation.evaluate",
    "evaluate_videos": "evaluation.evaluate_videos", "evaluate_masks": "evaluation.evaluate_masks",
    "predict": "inference.predict", "predict_video": "inference.predict_video",
    "render_sandbox": "sandbox.render", "train_teacher": "sandbox.teachers",
}  # fmt: skip

register()


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    attribute = "inspect_path" if name == "inspect" else name  # `inspect` is taken by the standard library there
    return getattr(import_module(f".{_HOMES[name]}", __name__), attribute)
