"""The sandbox's tracker, a tiny SAM 3; the initialisation of the promptable teachers, and their score."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import Sam3TrackerConfig, Sam3TrackerModel, SamModel
from transformers.models.sam.modeling_sam import SamAttention
from transformers.models.sam3_tracker.modeling_sam3_tracker import Sam3TrackerAttention

from samdistill.inference.prompting import PROMPTS, Targets, prompted_masks
from samdistill.ops.masks import mask_iou
from samdistill.ops.promptable import Promptable, embed, predict, to_canvas
from samdistill.sandbox.scenes import Scenes
from samdistill.types import ImageBatch

IMAGE_SIZE, PATCH = 126, 14
HIDDEN = 128
TRAIN_SEED, HELD_OUT_SEED = 1, 2
MULTIMASK = "multimask"


def teacher_config() -> Sam3TrackerConfig:
    """Return the configuration: 126 px, a ViT of 6 layers, 192 wide, with global attention; 4.2M parameters in all."""
    grid = IMAGE_SIZE // PATCH
    return Sam3TrackerConfig(
        vision_config={
            "model_type": "sam3_vision_model",
            "backbone_config": {
                "model_type": "sam3_vit_model", "hidden_size": 192, "intermediate_size": 768, "num_hidden_layers": 6,
                "num_attention_heads": 6, "image_size": IMAGE_SIZE, "patch_size": PATCH, "window_size": grid,
                "global_attn_indexes": list(range(6)), "pretrain_image_size": IMAGE_SIZE,
            },
            "fpn_hidden_size": HIDDEN,
            "scale_factors": [4.0, 2.0, 1.0],
            "backbone_feature_sizes": [[4 * grid] * 2, [2 * grid] * 2, [grid] * 2],
        },
        prompt_encoder_config={"hidden_size": HIDDEN, "image_size": IMAGE_SIZE, "patch_size": PATCH},
        mask_decoder_config={
            "hidden_size": HIDDEN, "mlp_dim": 512, "num_attention_heads": 4, "iou_head_hidden_dim": HIDDEN,
            "dynamic_multimask_via_stability": False,  # only the single-mask token is trained
        },
    )  # fmt: skip


def build_teacher(seed: int = 0) -> Sam3TrackerModel:
    """Build an untrained tracker. See ``initialise`` and ``attend_in_place``."""
    torch.manual_seed(seed)
    model = Sam3TrackerModel(teacher_config())
    initialise(model)
    attend_in_place(model)
    return model


def initialise(part: nn.Module) -> None:
    """Initialise weights for training from scratch. transformers' initialisation is for fine-tuning.

    The variance of linear layers depends on their width, convolutions have torch's default, and embeddings a standard
    deviation of 0.2.
    """
    for module in part.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
        elif isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
            nn.init.kaiming_uniform_(module.weight, a=5**0.5)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.2)


def attend_in_place(model: Promptable) -> None:
    """Give a prompt and the image cell at its position the same position features in the decoder.

    A new model draws separate random Fourier features for prompts and image, although every checkpoint shares them. The
    decoder then cannot relate a point to its position, so they are made equal here. Query and key projections of the
    attention between tokens and image start equal too, so that each token attends to its own position.
    """
    for name, module in model.mask_decoder.transformer.named_modules():
        if isinstance(module, Sam3TrackerAttention | SamAttention) and "self_attn" not in name:
            nn.init.orthogonal_(module.q_proj.weight, gain=1.5)
            module.k_proj.weight.data.copy_(module.q_proj.weight.data)
    places = model.prompt_encoder.shared_embedding.positional_embedding
    model.shared_image_embedding.positional_embedding.data.copy_(places.data)


@torch.inference_mode()
def score(model: Promptable, scenes: Scenes) -> dict[str, Float[Tensor, " objects"]]:
    """Return the IoU of each annotated object by kind of prompt.

    A SAM also has ``multimask``: a point answered with three masks, of which the one with the highest predicted IoU is
    taken. Its ``point`` uses the single-mask token, as in the other models.
    """
    model.eval()
    targets = Targets.of(scenes.masks, scenes.valid)
    embeddings = embed(model, ImageBatch.full(scenes.images))
    found: dict[str, Tensor] = dict(prompted_masks(model, embeddings, targets, PROMPTS))
    if isinstance(model, SamModel):
        best = predict(model, embeddings, targets.point, multimask=True).best()[0]
        found[MULTIMASK] = to_canvas(best, scenes.masks.shape[-2:])
    return {kind: mask_iou(masks, scenes.masks)[scenes.valid] for kind, masks in found.items()}
