"""Opening promptable models: checked, complete, in float32 and eval mode."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

import torch
from safetensors import SafetensorError
from transformers import PreTrainedConfig, PreTrainedModel, Sam3Model, Sam3TrackerModel

from ..types import UserError
from .files import locate, read_json
from .loading import quiet_transformers

Model = TypeVar("Model", bound=PreTrainedModel)


def load_promptable(path: str | Path) -> Sam3TrackerModel:
    """A ``Sam3TrackerModel`` in float32 and eval mode, with its own trunk or a distilled one.

    path: a Hugging Face folder, a hub id, or ``sandbox`` (the packaged teacher). Weights are read from safetensors
    alone. Raises UserError for what is missing, of another kind, or incomplete.
    """
    model = load_sam3(path)
    if not isinstance(model, Sam3TrackerModel):
        raise UserError(
            f"{path}: a {type(model).__name__} has no prompt decoder; masks from boxes and points need a Hugging Face "
            "folder of a Sam3TrackerModel (`samdistill merge RUN --into TRACKER_FOLDER` makes one)"
        )
    return model


def load_sam3(path: str | Path, image_size: int | None = None) -> Sam3TrackerModel | Sam3Model:
    """What ``load_promptable`` loads, or a ``Sam3Model`` from a detector's folder.

    image_size: side of the input in pixels, a multiple of the patch size; None keeps the checkpoint's.
    """
    folder = locate(path)
    if not folder.is_dir():
        raise UserError(f"{path}: a single file; give a Hugging Face folder with config.json and safetensors weights")
    kind = read_json(folder / "config.json").get("model_type")
    if kind in ("sam3_tracker", "sam3_video"):  # the published repository is of the second kind and holds the tracker
        return _load(Sam3TrackerModel, folder, image_size)
    if kind == "sam3":
        return _load(Sam3Model, folder, image_size)
    raise UserError(f"{path}: its config.json says model_type {kind!r}; expected sam3_tracker, sam3_video or sam3")


def _sized(kind: type[Model], folder: Path, image_size: int | None) -> PreTrainedConfig:
    """The folder's configuration, with every size that follows from the input set for ``image_size``."""
    config = kind.config_class.from_pretrained(folder)
    config = getattr(config, "tracker_config", None) or config  # a video checkpoint holds the tracker's inside
    trunk = config.vision_config.backbone_config
    if image_size is None or image_size == trunk.image_size:
        return config
    grid, rest = divmod(image_size, trunk.patch_size)
    if rest:
        raise UserError(f"image size {image_size} is not a multiple of the patch size {trunk.patch_size}")
    trunk.image_size = image_size
    config.vision_config.backbone_feature_sizes = [[4 * grid] * 2, [2 * grid] * 2, [grid] * 2]
    if hasattr(config, "prompt_encoder_config"):
        config.prompt_encoder_config.image_size = image_size
    return config


def _load(kind: type[Model], folder: Path, image_size: int | None) -> Model:
    """``kind.from_pretrained`` in float32 and eval mode that refuses a folder without all the weights it needs."""
    from .. import students  # noqa: F401 - registers the student trunk with AutoModel; here because timm imports slowly

    try:
        with quiet_transformers():
            model, report = kind.from_pretrained(
                folder, config=_sized(kind, folder, image_size), dtype=torch.float32, use_safetensors=True,
                local_files_only=True, output_loading_info=True,
            )  # fmt: skip
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        why = " ".join(str(error).split())[:300]
        raise UserError(f"{folder}: cannot be loaded as a {kind.__name__}: {why}") from None
    missing = sorted(report["missing_keys"])
    if missing:
        raise UserError(f"{folder}: {len(missing)} weights of a {kind.__name__} are missing, such as {missing[0]}")
    return model.eval()
