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
    from .config import RunConfig, load_config
    from .data import prepare_sa1b
    from .errors import UserError
    from .inference.video import VideoSession
    from .students import StudentTrunk, StudentTrunkConfig
    from .verbs.cache import cache
    from .verbs.evaluate import evaluate, evaluate_concepts
    from .verbs.evaluate_masks import evaluate_masks
    from .verbs.evaluate_videos import evaluate_videos
    from .verbs.models import models
    from .verbs.plan import plan
    from .verbs.predict import predict
    from .verbs.predict_video import predict_video
    from .verbs.road import demo, run
    from .verbs.sandbox import render_sandbox, train_teacher
    from .verbs.train import check, train

__version__ = "0.1.0"

__all__ = [
    "RunConfig", "StudentTrunk", "StudentTrunkConfig", "UserError", "VideoSession", "__version__", "cache", "check",
    "demo", "evaluate", "evaluate_concepts", "evaluate_masks", "evaluate_videos", "inspect", "load_config", "merge",
    "models", "plan", "predict", "predict_video", "prepare_sa1b", "render_sandbox", "run", "train", "train_teacher",
]  # fmt: skip

_HOMES = {
    "UserError": "errors", "RunConfig": "config", "load_config": "config",
    "StudentTrunk": "students", "StudentTrunkConfig": "students", "prepare_sa1b": "data",
    "VideoSession": "inference.video",
    "merge": "checkpoints.merge", "inspect": "checkpoints.inspect",
    "plan": "verbs.plan", "check": "verbs.train", "cache": "verbs.cache", "train": "verbs.train",
    "evaluate": "verbs.evaluate", "evaluate_concepts": "verbs.evaluate", "evaluate_videos": "verbs.evaluate_videos",
    "evaluate_masks": "verbs.evaluate_masks",
    "predict": "verbs.predict", "predict_video": "verbs.predict_video",
    "models": "verbs.models", "run": "verbs.road", "demo": "verbs.road",
    "render_sandbox": "verbs.sandbox", "train_teacher": "verbs.sandbox",
}  # fmt: skip

register()


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    attribute = "inspect_path" if name == "inspect" else name  # `inspect` is taken by the standard library there
    return getattr(import_module(f".{_HOMES[name]}", __name__), attribute)
