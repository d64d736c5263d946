"""Asking each kind of promptable model, against transformers' own path through it and against what its modules see."""

from __future__ import annotations

import copy

import pytest
import torch
from small_sams import sam2_settings
from transformers import Sam2Config, Sam2Model, Sam3TrackerModel, SamConfig, SamModel

from samdistill.ops import promptable
from samdistill.ops.images import IMAGENET_MEAN, IMAGENET_STD
from samdistill.ops.promptable import (
    answer_group,
    decoder_width,
    embed,
    embed_trunk,
    embedding_grid,
    image_size,
    predict,
    trunk_channels,
)
from samdistill.students import HostedSamModel, MobileSamConfig, MobileSamModel, StudentTrunk, StudentTrunkConfig
from samdistill.types import ImageBatch, PromptGroup, Prompts, UserError
from tracker_model import build_teacher

KINDS = ("tracker", "sam", "sam2", "hosted", "mobile")
PYRAMIDAL = ("tracker", "sam2")
SIZES = {"tracker": 126, "sam": 64, "sam2": 64, "hosted": 64, "mobile": 64}
TOKENS = {"tracker": (9, 9), "sam": (4, 4), "sam2": (4, 4), "hosted": (4, 4), "mobile": (4, 4)}


def tiny_sam() -> SamModel:
    sizes = {"image_size": 64, "patch_size": 16}
    vision = {
        **sizes, "hidden_size": 24, "output_channels": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
        "window_size": 2, "global_attn_indexes": [1], "mlp_dim": 48, "num_pos_feats": 8, "initializer_range": 0.2,
    }  # fmt: skip
    decoder = {"hidden_size": 16, "mlp_dim": 32, "num_attention_heads": 2, "iou_head_hidden_dim": 16}
    prompts = {**sizes, "hidden_size": 16}
    return SamModel(SamConfig(vision_config=vision, prompt_encoder_config=prompts, mask_decoder_config=decoder))


def tiny_sam2() -> Sam2Model:
    model = Sam2Model(Sam2Config(**sam2_settings(16, initializer_range=0.2)))
    torch.nn.init.normal_(model.no_memory_embedding)
    return model


def hosted_sam() -> HostedSamModel:
    trunk = StudentTrunkConfig(backbone="es_ev_s", hidden_size=16, patch_size=16, image_size=64,
                               host_mean=IMAGENET_MEAN, host_std=IMAGENET_STD)  # fmt: skip
    return HostedSamModel.of(tiny_sam(), StudentTrunk(trunk))


def build(kind: str):
    torch.manual_seed(0)
    if kind == "tracker":
        return build_teacher(1).eval()
    if kind == "sam":
        return tiny_sam().eval()
    if kind in ("sam2", "hosted"):
        return (tiny_sam2() if kind == "sam2" else hosted_sam()).eval()
    settings = {"backbone": "es_ev_s", "image_size": 64, "patch_size": 16, "width": 16, "heads": 2}
    return MobileSamModel(MobileSamConfig(**settings, image_mean=[0.1, 0.2, 0.3], image_std=[0.5, 0.6, 0.7])).eval()


@pytest.fixture(scope="module", params=KINDS)
def kind(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def model(kind):
    return build(kind)


@pytest.fixture
def batch(kind) -> ImageBatch:
    """Two images, the second one 20 rows and 7 columns short of the canvas, with colours in its padding."""
    size = SIZES[kind]
    images = torch.randint(0, 256, (2, 3, size, size), generator=torch.Generator().manual_seed(3), dtype=torch.uint8)
    sizes = torch.tensor([[size, size], [size - 20, size - 7]])
    return ImageBatch(images, sizes, sizes, ("a", "b"), torch.zeros(2, dtype=torch.int64))


def points(count: int = 3, many: int = 2) -> Prompts:
    where = torch.rand(2, count, many, 2, generator=torch.Generator().manual_seed(4)) * 60
    labels = torch.tensor([1, 0, 1][:many]).expand(2, count, many)
    return Prompts(torch.ones(2, count, dtype=torch.bool), points=where, labels=labels)


def boxes() -> Prompts:
    corners = torch.tensor([[[10.0, 12.0, 40.0, 50.0], [3.0, 30.0, 60.0, 61.5]]] * 2)
    return Prompts(torch.ones(2, 2, dtype=torch.bool), boxes=corners)


def pixels(kind: str, batch: ImageBatch) -> torch.Tensor:
    """What each kind of model wants, by hand."""
    shown = batch.images.double() / 255
    if kind == "tracker":
        return ((shown - 0.5) / 0.5).float()
    mean, std = (IMAGENET_MEAN, IMAGENET_STD) if kind != "mobile" else ((0.1, 0.2, 0.3), (0.5, 0.6, 0.7))
    normal = (shown - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    if kind == "sam2":
        return normal.float()
    height, width = batch.sizes[1].tolist()
    normal[1, :, height:] = 0
    normal[1, :, :, width:] = 0
    return normal.float()


@torch.no_grad()
@pytest.mark.parametrize("multimask", [False, True])
def test_embeds_and_predicts_as_transformers_does(kind, model, batch, multimask):
    embeddings = embed(model, batch)
    for asked in (points(), boxes()):
        expected = model(
            pixel_values=pixels(kind, batch), input_points=asked.points, input_labels=asked.labels,
            input_boxes=asked.boxes, multimask_output=multimask,
        )  # fmt: skip
        found = predict(model, embeddings, asked, multimask)
        torch.testing.assert_close(found.low_res_masks, expected.pred_masks, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(found.iou_scores, expected.iou_scores, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_trunk_is_what_encoder_distillation_compares(kind, model, batch):
    found, wanted = embed(model, batch), pixels(kind, batch)
    if kind == "tracker":
        tokens = model.vision_encoder.backbone(wanted).last_hidden_state
        expected = tokens.view(2, 9, 9, -1).permute(0, 3, 1, 2)
    elif kind == "sam":
        hidden = model.vision_encoder.patch_embed(wanted) + model.vision_encoder.pos_embed
        for layer in model.vision_encoder.layers:
            hidden = layer(hidden)
        expected = hidden.permute(0, 3, 1, 2)
    elif kind == "sam2":
        expected = model.vision_encoder(wanted).fpn_hidden_states[-1]
    elif kind == "hosted":
        expected = model.vision_encoder.backbone.image_embedding(wanted)
    else:
        expected = model.vision_encoder.trunk.image_embedding(wanted)
    torch.testing.assert_close(found.trunk, expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(embed_trunk(model, batch), expected, atol=1e-5, rtol=1e-4)
    assert found.trunk.shape == (2, trunk_channels(model), *TOKENS[kind])


@torch.no_grad()
def test_padding_is_blank_to_a_sam_and_seen_by_a_tracker(kind, model, batch):
    painted = ImageBatch(batch.images.clone(), batch.sizes, batch.original_sizes, batch.keys, batch.seeds)
    painted.images[1, :, -20:] = 255
    same = torch.equal(embed(model, painted).image_embedding, embed(model, batch).image_embedding)
    assert same == (kind not in PYRAMIDAL)


def test_sizes_are_those_of_the_model(kind, model, batch):
    found = embed(model, batch)
    assert image_size(model) == SIZES[kind] and embedding_grid(model) == TOKENS[kind]
    assert found.image_embedding.shape == (2, decoder_width(model), *TOKENS[kind])
    assert len(found.levels) == (3 if kind in PYRAMIDAL else 1)


@torch.no_grad()
def test_mask_tokens_are_those_the_mask_heads_read(model, batch):
    read = []
    heads = model.mask_decoder.output_hypernetworks_mlps
    hooks = [head.register_forward_pre_hook(lambda _, args: read.append(args[0])) for head in heads]
    for asked in (points(), boxes()):
        read.clear()
        found = predict(model, embed(model, batch), asked, multimask=True)
        assert found.mask_tokens.shape == (*asked.valid.shape, 4, decoder_width(model))
        assert all(torch.equal(found.mask_tokens[:, :, number], tokens) for number, tokens in enumerate(read))
    for hook in hooks:
        hook.remove()


@torch.no_grad()
def test_prompt_embed_is_the_embedding_with_the_dense_prompt_added(kind, model, batch):
    found, asked = embed(model, batch), points()
    plain = predict(model, found, asked)
    blank = model.prompt_encoder.no_mask_embed.weight.view(1, -1, 1, 1)
    torch.testing.assert_close(plain.prompt_embed, (found.image_embedding + blank)[:, None])
    masks = plain.low_res_masks[:, :, 0]
    again = predict(model, found, Prompts(asked.valid, asked.points, asked.labels, masks=masks))
    dense = torch.stack([model.prompt_encoder.mask_embed(masks[:, number, None]) for number in range(3)], 1)
    assert dense.std(1).max() > 0  # each object has its own
    torch.testing.assert_close(again.prompt_embed, found.image_embedding[:, None] + dense, atol=1e-5, rtol=1e-4)
    assert again.low_res_masks.shape == plain.low_res_masks.shape and again.mask_tokens.shape[:2] == (2, 3)


@torch.no_grad()
def test_mask_prompts_are_answered_object_by_object(model, batch):
    """Each object alone, with its own mask, gets the answer it gets beside the others."""
    found, asked = embed(model, batch), points()
    masks = predict(model, found, asked).low_res_masks[:, :, 0]
    together = predict(model, found, Prompts(asked.valid, asked.points, asked.labels, masks=masks))
    for number in range(3):
        at = slice(number, number + 1)
        one = Prompts(asked.valid[:, at], asked.points[:, at], asked.labels[:, at], masks=masks[:, at])
        alone = predict(model, found, one)
        torch.testing.assert_close(alone.low_res_masks, together.low_res_masks[:, at], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(alone.mask_tokens, together.mask_tokens[:, at], atol=1e-4, rtol=1e-4)


def test_every_signal_reaches_the_first_layer(model, batch):
    first = next(model.vision_encoder.parameters())
    found = embed(model, batch)
    said = predict(model, found, points(), multimask=True)
    for name, value in {**vars(said), "trunk": found.trunk, "embedding": found.image_embedding}.items():
        (gradient,) = torch.autograd.grad(value.square().sum(), first, retain_graph=True)
        assert gradient.abs().sum() > 0, name


def test_nothing_is_left_on_the_model(model, batch):
    with torch.inference_mode():
        said = predict(model, embed(model, batch), boxes())
    assert said.mask_tokens.is_inference() and not said.prompt_embed.requires_grad
    hooked = [m for m in model.modules() if m._forward_hooks or m._forward_pre_hooks]
    assert hooked == []
    with pytest.raises(UserError, match="cannot run"), torch.no_grad():
        predict(model, embed(model, batch), Prompts(torch.ones(2, 1, dtype=torch.bool), boxes=torch.rand(2, 1, 3)))
    assert not model.mask_decoder.transformer._forward_hooks


def test_rows_pick_images_and_keep_their_gradient(model, batch):
    found = embed(model, batch)
    picked = found.rows(torch.tensor([1, 0, 1]))
    assert all(torch.equal(a[[1, 0, 1]], b) for a, b in zip(found.levels, picked.levels, strict=True))
    assert torch.equal(picked.trunk[0], found.trunk[1]) and torch.equal(picked.trunk[1], found.trunk[0])
    (gradient,) = torch.autograd.grad(picked.image_embedding.sum(), found.image_embedding)
    assert gradient[0].unique().tolist() == [1.0] and gradient[1].unique().tolist() == [2.0]
    assert torch.equal(found.one_image(1).image_embedding, found.image_embedding[1:])


@torch.no_grad()
def test_a_group_is_asked_about_its_own_images(model, batch):
    found, asked = embed(model, batch), points()
    whole = predict(model, found, asked, multimask=True)
    second = Prompts(asked.valid[1:], asked.points[1:], asked.labels[1:])
    said = answer_group(model, found, PromptGroup(torch.tensor([1]), second, multimask=True))
    for name in ("prompt_embed", "mask_tokens", "low_res_masks", "iou_scores"):
        torch.testing.assert_close(getattr(said, name), getattr(whole, name)[1:], atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_half_precision_answers_like_full(kind, model, batch):
    half = build(kind).to(torch.bfloat16)
    asked = points()
    full, rough = (predict(m, embed(m, batch), asked) for m in (model, half))
    assert {value.dtype for value in vars(rough).values()} == {torch.bfloat16}
    assert torch.corrcoef(torch.stack([full.prompt_embed.flatten(), rough.prompt_embed.float().flatten()]))[0, 1] > 0.9
    with_mask = Prompts(asked.valid, asked.points, asked.labels, masks=full.low_res_masks[:, :, 0])
    assert predict(half, embed(half, batch), with_mask).low_res_masks.isfinite().all()


def test_another_canvas_is_refused(kind, model):
    if kind != "tracker":  # whose trunk takes any
        with pytest.raises(UserError, match=r"needs images of 64 x 64 px, got 80 x 80 px"):
            embed(model, ImageBatch.full(torch.zeros(1, 3, 80, 80, dtype=torch.uint8)))


def test_the_best_mask_is_the_one_with_the_highest_predicted_iou():
    logits = torch.arange(3.0).view(1, 1, 3, 1, 1).expand(1, 2, 3, 2, 2)
    scores = torch.tensor([[[0.1, 0.9, 0.2], [0.5, 0.3, 0.8]]])
    best, score = promptable.MaskPrediction(logits, scores, torch.zeros(0), torch.zeros(0)).best()
    assert best[0, :, 0, 0].tolist() == [1.0, 2.0] and score[0].tolist() == pytest.approx([0.9, 0.8])


@torch.no_grad()
def test_no_memory_is_added_to_the_level_that_is_read_whatever_the_neck_has_besides():
    """SAM 3's own neck has a fourth, coarser level, to which transformers' image tracker would add it."""
    three = build("tracker")
    torch.nn.init.normal_(three.no_memory_embedding)
    config = copy.deepcopy(three.config)
    config.vision_config.scale_factors = [4.0, 2.0, 1.0, 0.5]
    four = Sam3TrackerModel(config).eval()
    missing, unexpected = four.load_state_dict(three.state_dict(), strict=False)
    assert unexpected == [] and {name.split(".")[3] for name in missing} == {"3"}
    batch = ImageBatch.full(torch.randint(0, 256, (2, 3, 126, 126), dtype=torch.uint8))
    first, second = embed(three, batch), embed(four, batch)
    assert len(second.levels) == 3 and all(torch.equal(*pair) for pair in zip(first.levels, second.levels, strict=True))
    inputs = {"input_boxes": torch.tensor([[[10.0, 12.0, 90.0, 80.0]]]).repeat(2, 1, 1), "multimask_output": False}
    direct = three((batch.images / 255 - 0.5) / 0.5, **inputs).pred_masks
    prompts = Prompts(torch.ones(2, 1, dtype=torch.bool), boxes=inputs["input_boxes"])
    torch.testing.assert_close(predict(four, second, prompts).low_res_masks, direct, atol=1e-4, rtol=1e-4)
