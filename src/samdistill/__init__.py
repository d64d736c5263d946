"""samdistill: distil the Segment Anything family (SAM, SAM 2, SAM 3) into small students.

The functions correspond to the commands of ``samdistill``. Importing the package registers the students with
transformers, so that ``Sam3TrackerModel.from_pretrained`` opens merged models. torch and transformers are imported when
something is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ._registration import register

if TYPE_CHECKING:
    from .checkpoints.inspect import inspect_path as inspect
    from .checkpoints.merge import merge
    from .data import prepare_sa1b
    from .deployment.folder import export
    from .errors import UserError
    from .evaluation.evaluate import evaluate, evaluate_concepts
    from .evaluation.evaluate_masks import evaluate_masks
    from .evaluation.evaluate_videos import evaluate_videos
    from .inference.label import label_images
    from .inference.predict import predict
    from .inference.predict_video import predict_video
    from .inference.result import Result
    from .inference.video import VideoSession
    from .jobs.loading import load_config
    from .models import Model, load
    from .pipeline import cache, check, demo, distill, plan, run, train
    from .sandbox.render import render_sandbox
    from .students import (
        EfficientSam3Config,
        EfficientSam3Model,
        MobileSamConfig,
        MobileSamModel,
        StudentTrunk,
        StudentTrunkConfig,
    )
    from .students.catalogue import list_models

__version__ = "0.1.0"

__all__ = [
    "EfficientSam3Config",
    "EfficientSam3Model",
    "MobileSamConfig",
    "MobileSamModel",
    "Model",
    "Result",
    "StudentTrunk",
    "StudentTrunkConfig",
    "UserError",
    "VideoSession",
    "__version__",
    "cache",
    "check",
    "demo",
    "distill",
    "evaluate",
    "evaluate_concepts",
    "evaluate_masks",
    "evaluate_videos",
    "export",
    "inspect",
    "label_images",
    "list_models",
    "load",
    "load_config",
    "merge",
    "plan",
    "predict",
    "predict_video",
    "prepare_sa1b",
    "render_sandbox",
    "run",
    "train",
]

_HOMES = {
    "EfficientSam3Config": "students",
    "EfficientSam3Model": "students",
    "MobileSamConfig": "students",
    "MobileSamModel": "students",
    "Model": "models",
    "Result": "inference.result",
    "StudentTrunk": "students",
    "StudentTrunkConfig": "students",
    "UserError": "errors",
    "VideoSession": "inference.video",
    "cache": "pipeline",
    "check": "pipeline",
    "demo": "pipeline",
    "distill": "pipeline",
    "evaluate": "evaluation.evaluate",
    "evaluate_concepts": "evaluation.evaluate",
    "evaluate_masks": "evaluation.evaluate_masks",
    "evaluate_videos": "evaluation.evaluate_videos",
    "export": "deployment.folder",
    "inspect": "checkpoints.inspect",
    "label_images": "inference.label",
    "list_models": "students.catalogue",
    "load": "models",
    "load_config": "jobs.loading",
    "merge": "checkpoints.merge",
    "plan": "pipeline",
    "predict": "inference.predict",
    "predict_video": "inference.predict_video",
    "prepare_sa1b": "data",
    "render_sandbox": "sandbox.render",
    "run": "pipeline",
    "train": "pipeline",
}
"""Module of each public name. It is imported when the name is first used."""

register()


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    attribute = (
        "inspect_path" if name == "inspect" else name
    )  # called `inspect_path` there, as `inspect` is a module of Python
    return getattr(import_module(f".{_HOMES[name]}", __name__), attribute)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
