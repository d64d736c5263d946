"""A promptable SAM 3 (teacher or distilled): images once, prompts many times, masks out.

Works on any ``Sam3TrackerModel``, whatever trunk it hosts. Gradients flow unless the caller turns them off, so the
same functions serve training and inference.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from jaxtyping import Bool, Float
from safetensors import SafetensorError
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedConfig, PreTrainedModel, Sam3Model, Sam3TrackerModel

from ..checkpoints.files import locate, read_json
from ..checkpoints.loading import quiet_transformers
from ..ops.images import normalise
from ..types import ImageBatch, Prompts, UserError

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


@dataclass(frozen=True)
class Embeddings:
    """What the mask decoder reads: two high-resolution maps (strides 3.5 and 7) and the stride-14 image embedding.

    trunk: the raw output of the trunk, before the neck; what encoder distillation matches.
    """

    levels: tuple[Tensor, ...]
    trunk: Float[Tensor, "b d gh gw"]

    @property
    def image_embedding(self) -> Float[Tensor, "b c gh gw"]:
        return self.levels[-1]

    def one_image(self, index: int) -> Embeddings:
        """Image ``index`` as a batch of one."""
        at = slice(index, index + 1)
        return Embeddings(tuple(level[at] for level in self.levels), self.trunk[at])


@dataclass(frozen=True)
class MaskPrediction:
    """low_res_masks: logits at a quarter of the patch size; iou_scores in 0..1; m is 1, or 3 with multimask."""

    low_res_masks: Float[Tensor, "b n m h w"]
    iou_scores: Float[Tensor, "b n m"]

    def best(self) -> tuple[Float[Tensor, "b n h w"], Float[Tensor, "b n"]]:
        """The mask with the highest predicted IoU of each prompt, and that IoU."""
        scores, index = self.iou_scores.max(-1)
        picked = self.low_res_masks.gather(
            2, index[..., None, None, None].expand(-1, -1, 1, *self.low_res_masks.shape[-2:])
        )
        return picked[:, :, 0], scores


def embed(model: Sam3TrackerModel, batch: ImageBatch) -> Embeddings:
    """Run the vision encoder and shape its levels as the decoder wants them."""
    features = model.get_image_features(normalise(batch.images), return_dict=True)
    maps = list(features.fpn_hidden_states)
    maps[-1] = maps[-1] + model.no_memory_embedding
    sizes = model.backbone_feature_sizes
    return Embeddings(
        tuple(m.permute(1, 2, 0).reshape(len(batch), -1, *s) for m, s in zip(maps, sizes, strict=False)),
        as_grid(features.last_hidden_state, model, batch),
    )


def as_grid(tokens: Float[Tensor, "b n d"], model: PreTrainedModel, batch: ImageBatch) -> Float[Tensor, "b d gh gw"]:
    """Trunk tokens laid over the canvas, one per patch."""
    patch = model.config.vision_config.backbone_config.patch_size
    height, width = batch.images.shape[-2] // patch, batch.images.shape[-1] // patch
    return tokens.transpose(1, 2).reshape(len(batch), -1, height, width)


def embed_trunk(model: PreTrainedModel, batch: ImageBatch) -> Float[Tensor, "b d gh gw"]:
    """The trunk's raw output alone, of any SAM 3 model (``Sam3TrackerModel`` or ``Sam3Model``)."""
    tokens = model.vision_encoder.backbone(normalise(batch.images)).last_hidden_state
    return as_grid(tokens, model, batch)


def predict(
    model: Sam3TrackerModel, embeddings: Embeddings, prompts: Prompts, multimask: bool = False
) -> MaskPrediction:
    """Masks for n prompts in each of b images.

    A mask prompt belongs to one object, but the decoder adds it to the whole image's embedding; prompts with masks
    are therefore run as n images of one object each.
    """
    b, n = prompts.valid.shape
    levels, points, labels, boxes, masks = embeddings.levels, prompts.points, prompts.labels, prompts.boxes, None
    if prompts.masks is not None:
        levels = tuple(level.repeat_interleave(n, 0) for level in levels)
        masks = prompts.masks.flatten(0, 1)[:, None]
        points, labels, boxes = (t if t is None else t.flatten(0, 1)[:, None] for t in (points, labels, boxes))
    out = model(
        image_embeddings=list(levels), input_points=points, input_labels=labels, input_boxes=boxes, input_masks=masks,
        multimask_output=multimask,
    )  # fmt: skip
    low_res, scores = out.pred_masks, out.iou_scores
    return MaskPrediction(low_res.reshape(b, n, *low_res.shape[2:]), scores.reshape(b, n, *scores.shape[2:]))


def to_canvas(low_res_masks: Float[Tensor, "b n h w"], size: tuple[int, int]) -> Bool[Tensor, "b n H W"]:
    """Upsample logits to the canvas and threshold at 0, as SAM's post-processing does."""
    return F.interpolate(low_res_masks, size, mode="bilinear", align_corners=False) > 0
