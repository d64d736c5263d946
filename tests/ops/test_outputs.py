from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import Sam3Config, Sam3Model

from samdistill.ops.outputs import PADDING, ask, recorded, take_images


def tiny_sam3() -> Sam3Model:
    small = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64}
    vit = {
        "model_type": "sam3_vit_model", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1,
        "num_attention_heads": 4, "image_size": 126, "patch_size": 14, "window_size": 3, "global_attn_indexes": [0],
        "pretrain_image_size": 42,
    }  # fmt: skip
    config = Sam3Config(
        vision_config={"backbone_config": vit, "fpn_hidden_size": 32},
        text_config={**small, "vocab_size": 1000, "num_hidden_layers": 1, "projection_dim": 32},
        geometry_encoder_config={**small, "num_layers": 1, "roi_size": 3},
        detr_encoder_config={**small, "num_layers": 1},
        detr_decoder_config={**small, "num_layers": 1, "num_queries": 10},
        mask_decoder_config={"hidden_size": 32, "num_attention_heads": 4},
    )
    torch.manual_seed(0)
    return Sam3Model(config).eval()


def test_the_last_output_is_kept_with_its_graph_and_the_hook_goes_away() -> None:
    layer = nn.Linear(3, 2)
    x = torch.randn(4, 3, requires_grad=True)
    with recorded(layer) as first:
        assert first.output is None
        layer(torch.zeros(1, 3))
        out = layer(x)
    assert first.output is out
    first.output.sum().backward()
    torch.testing.assert_close(x.grad, layer.weight.sum(0).expand(4, 3))
    layer(torch.zeros(1, 3))
    assert first.output is out and not layer._forward_hooks


def test_the_hook_goes_away_after_an_error() -> None:
    layer = nn.Linear(3, 2)
    with pytest.raises(RuntimeError), recorded(layer):
        layer(torch.zeros(1, 4))
    assert not layer._forward_hooks


def test_images_are_gathered_and_positions_expanded() -> None:
    levels = (torch.randn(2, 4, 6, 6, requires_grad=True), torch.randn(2, 4, 3, 3))
    positions = tuple(torch.randn(1, *level.shape[1:]).expand_as(level) for level in levels)
    vision = SimpleNamespace(fpn_hidden_states=levels, fpn_position_encoding=positions)
    taken = take_images(vision, torch.tensor([0, 0, 1, 0]))
    for level, position, taken_level, taken_position in zip(
        levels, positions, taken.fpn_hidden_states, taken.fpn_position_encoding, strict=True
    ):
        assert torch.equal(taken_level, torch.stack([level[0], level[0], level[1], level[0]]))
        assert torch.equal(taken_position, torch.stack([position[0]] * 4))
        assert taken_position.data_ptr() == position.data_ptr() and taken_position.stride(0) == 0
    taken.fpn_hidden_states[0].sum().backward()
    assert levels[0].grad[:, 0, 0, 0].tolist() == [3, 1]


def test_sam3_answers_several_questions_about_an_image_encoded_once() -> None:
    model = tiny_sam3()
    pixels, words = torch.randn(2, 3, 126, 126), torch.randint(3, 900, (3, 5))
    image = torch.tensor([0, 0, 1])
    with torch.no_grad(), recorded(model.detr_encoder) as encoder:
        vision = model.get_vision_features(pixels)
        taken = take_images(vision, image)
        once = model(vision_embeds=taken, input_ids=words)
        kept = encoder.output.last_hidden_state
        each = model(pixel_values=pixels[image], input_ids=words)
        wanted = encoder.output.last_hidden_state
    assert type(taken) is type(vision)
    assert kept.shape == (3, 81, 32)
    torch.testing.assert_close(kept, wanted, rtol=1e-4, atol=1e-5)
    for name in ("pred_masks", "pred_boxes", "pred_logits", "presence_logits", "semantic_seg"):
        torch.testing.assert_close(getattr(once, name), getattr(each, name), rtol=1e-4, atol=1e-5)


def test_words_beside_boxes_are_answered_as_they_are_alone() -> None:
    """Words alone: however the missing box is given. Up to rounding: attention sums over one more masked token."""
    model, text = tiny_sam3(), torch.randn(3, 5, 32)
    boxes = torch.tensor([[[0.5, 0.5, 0.4, 0.2]], [[0.0] * 4], [[0.0] * 4]])
    labels, image = torch.tensor([[1], [PADDING], [PADDING]]), torch.tensor([0, 0, 1])
    with torch.no_grad():
        vision = model.get_vision_features(torch.randn(2, 3, 126, 126))
        mixed = ask(model, vision, image, text, None, boxes, labels)
        alone = ask(model, vision, image[1:], text[1:], None)
        empty = ask(model, vision, image[1:], text[1:], None, boxes[1:, :0], labels[1:, :0])
        more = ask(model, vision, image[1:], text[1:], None, boxes[1:].repeat(1, 3, 1), labels[1:].repeat(1, 3))
    for name in ("pred_masks", "pred_boxes", "pred_logits", "presence_logits", "semantic_seg", "encoder"):
        for other in (getattr(alone, name), getattr(empty, name), getattr(more, name)):
            torch.testing.assert_close(getattr(mixed, name)[1:], other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
def test_boxes_are_encoded_under_autocast_in_the_precision_of_the_weights(weights: torch.dtype) -> None:
    """transformers alone fails there: it pools boxes in float16, which bfloat16 autocast cannot concatenate."""
    model = tiny_sam3().to(weights)
    seen: list[torch.dtype] = []
    model.geometry_encoder.final_proj.register_forward_hook(lambda _, args, out: seen.append(out.dtype))
    boxes = torch.tensor([[[0.5, 0.5, 0.4, 0.2]]])
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        vision = model.get_vision_features(torch.randn(1, 3, 126, 126))
        found = ask(model, vision, None, torch.randn(1, 5, 32, dtype=weights), None, boxes.to(weights))
        assert torch.is_autocast_enabled("cpu")
    assert seen == [weights] and found.pred_masks.isfinite().all()
    assert not model.geometry_encoder._forward_hooks and not model.geometry_encoder._forward_pre_hooks
