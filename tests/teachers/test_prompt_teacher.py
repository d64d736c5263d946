"""A promptable teacher against transformers' own models, asked directly on their own canvas."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torchvision.transforms.v2.functional import resize
from transformers import SamConfig, SamModel

from samdistill.checkpoints.merge import merge
from samdistill.config import TeacherEntry
from samdistill.ops.pca import Projection
from samdistill.students import MobileSamConfig, MobileSamModel, StudentTrunk, StudentTrunkConfig
from samdistill.teachers import PromptTeacher, check_match, fit_projection
from samdistill.teachers.promptable import moved, on_canvas
from samdistill.types import ImageBatch, PromptGroup, Prompts, UserError

IMAGENET = [torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))]
CLOSE = {"atol": 1e-5, "rtol": 1e-4}
KINDS = ("sam", "tracker", "mobile", "merged")


def scramble(model: torch.nn.Module) -> torch.nn.Module:
    """Random wherever transformers and timm start with constants."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data += torch.randn(parameter.shape, generator=generator) * 0.2
    return model.eval()


@pytest.fixture(scope="module")
def deep_sam(tmp_path_factory):
    """(model, folder) of a SAM with five layers, so that the tap is neither the first nor the last."""
    sizes = {"image_size": 64, "patch_size": 16}
    vision = {"hidden_size": 32, "output_channels": 16, "num_hidden_layers": 5, "num_attention_heads": 4,
              "window_size": 2, "global_attn_indexes": [1, 4], "mlp_dim": 48, "num_pos_feats": 8}  # fmt: skip
    decoder = {"hidden_size": 16, "mlp_dim": 32, "num_attention_heads": 2, "iou_head_hidden_dim": 16}
    config = SamConfig(
        vision_config=vision | sizes, prompt_encoder_config={"hidden_size": 16, **sizes}, mask_decoder_config=decoder
    )
    torch.manual_seed(0)
    model, folder = scramble(SamModel(config)), tmp_path_factory.mktemp("deep_sam")
    model.save_pretrained(folder)
    return model, folder


@pytest.fixture(scope="module")
def mobile(tmp_path_factory):
    torch.manual_seed(0)
    config = MobileSamConfig(image_size=64, width=16, heads=2, neck="last", patch_size=16)
    model, folder = scramble(MobileSamModel(config)), tmp_path_factory.mktemp("mobile")
    model.save_pretrained(folder)
    return model, folder


@pytest.fixture(scope="module")
def places(deep_sam, tracker, mobile, tmp_path_factory):
    """Kind to (folder, side of the canvas)."""
    torch.manual_seed(1)
    trunk = StudentTrunk(StudentTrunkConfig(backbone="es_ev_s", hidden_size=64, image_size=126)).eval()
    run, merged = tmp_path_factory.mktemp("run"), tmp_path_factory.mktemp("merged") / "out"
    trunk.save_pretrained(run / "student")
    merge(run, tracker[1], merged)
    return {"sam": (deep_sam[1], 64), "tracker": (tracker[1], 126), "mobile": (mobile[1], 64), "merged": (merged, 126)}


def teacher_of(folder, name: str = "large", projected: bool = True, **settings) -> PromptTeacher:
    teacher = PromptTeacher(TeacherEntry(name=name, checkpoint=str(folder), **settings))
    if projected:
        d = teacher.patch_channels
        teacher.projection = Projection(torch.zeros(d), torch.eye(d)[:8])
    return teacher


def batch(side: int, count: int = 3) -> ImageBatch:
    """The second image is padded at the bottom, the third at the right."""
    generator = torch.Generator().manual_seed(3)
    images = torch.randint(0, 256, (count, 3, 8, 8), dtype=torch.uint8, generator=generator)
    images = resize(images, [side, side])
    sizes = torch.tensor([[side, side], [side // 2, side], [side, side // 2 + 1]])[:count]
    for image, (height, width) in zip(images, sizes.tolist(), strict=True):
        image[:, height:], image[:, :, width:] = 0, 0
    return replace(ImageBatch.full(images), sizes=sizes)


def points(side: int, images: int) -> Prompts:
    xy = torch.tensor([[0.2, 0.3], [0.45, 0.25]]).mul(side).round().view(1, 2, 1, 2).expand(images, -1, -1, -1)
    return Prompts(torch.ones(images, 2, dtype=torch.bool), xy, torch.ones(images, 2, 1, dtype=torch.int64))


def boxes(side: int, images: int) -> Prompts:
    edges = torch.tensor([[0.1, 0.2, 0.4, 0.5], [0.0, 0.0, 0.5, 0.45]]) * side
    return Prompts(torch.ones(images, 2, dtype=torch.bool), boxes=edges.expand(images, 2, 4))


def groups(side: int) -> tuple[PromptGroup, ...]:
    return (
        PromptGroup(torch.tensor([0, 2]), points(side, 2), multimask=True),
        PromptGroup(torch.tensor([1]), boxes(side, 1), multimask=False),
    )


def pixels(images: ImageBatch) -> torch.Tensor:
    """As SAM wants them: ImageNet's statistics, zeros where there is no image."""
    inside = torch.zeros_like(images.images[:, :1], dtype=torch.bool)
    for cells, (height, width) in zip(inside, images.sizes.tolist(), strict=True):
        cells[:, :height, :width] = True
    return (images.images / 255 - IMAGENET[0]) / IMAGENET[1] * inside


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_keeps_the_promises(kind, places) -> None:
    folder, side = places[kind]
    teacher = teacher_of(folder, weight=2.5)
    assert (teacher.name, teacher.weight, teacher.image_size) == ("large", 2.5, side)
    images, asked = batch(side), groups(side)
    patches, found = teacher.patches(images), teacher.answer(images, asked)
    (gh, gw), width = teacher.grid, teacher.width
    assert patches.shape == (3, teacher.patch_channels, gh, gw)
    assert torch.equal(found.encoder_patch, patches[:, :8])
    first, second = found.groups
    assert first.prompt_embed.shape == (2, 1, width, gh, gw) and second.prompt_embed.shape == (1, 1, width, gh, gw)
    assert first.mask_tokens.shape == (2, 2, 4, width) and second.mask_tokens.shape == (1, 2, 4, width)
    assert first.low_res_masks.shape == (2, 2, 3, 4 * gh, 4 * gw) and first.iou_scores.shape == (2, 2, 3)
    assert second.low_res_masks.shape == (1, 2, 1, 4 * gh, 4 * gw)
    for signals in found.groups:
        for name in ("prompt_embed", "mask_tokens", "low_res_masks", "iou_scores"):
            tensor = getattr(signals, name)
            assert tensor.dtype == torch.float32 and tensor.isfinite().all() and tensor.std() > 0
            assert not tensor.requires_grad and not tensor.is_inference()
    weight = torch.ones(8, requires_grad=True)
    (found.encoder_patch * weight.view(8, 1, 1)).sum().backward()  # an inference tensor could not be saved for this
    assert weight.grad.any()
    assert not teacher.model.training and not any(p.requires_grad for p in teacher.model.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_the_students_autocast_and_neighbours_do_not_matter(kind, places) -> None:
    folder, side = places[kind]
    teacher, images, asked = teacher_of(folder), batch(side), groups(side)
    plain = teacher.answer(images, asked)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = teacher.answer(images, asked)
    assert torch.equal(plain.encoder_patch, mixed.encoder_patch)
    assert torch.equal(plain.groups[0].low_res_masks, mixed.groups[0].low_res_masks)
    alone = replace(asked[1], rows=torch.tensor([0]))
    cut = ImageBatch(*(getattr(images, name)[1:2] for name in ("images", "sizes", "original_sizes", "keys", "seeds")))
    torch.testing.assert_close(
        teacher.answer(cut, (alone,)).groups[0].low_res_masks, plain.groups[1].low_res_masks, atol=1e-3, rtol=1e-3
    )


@torch.no_grad()
def test_sam_says_what_transformers_says(deep_sam) -> None:
    model, folder = deep_sam
    teacher, images, (pointed, boxed) = teacher_of(folder), batch(64), groups(64)
    found = teacher.answer(images, (pointed, boxed))
    hidden = model.vision_encoder(pixels(images), output_hidden_states=True).hidden_states
    tapped = hidden[len(hidden) - 5 + 3]  # what layer 3 of 0 to 4 gives: 30 * 4 // 31
    torch.testing.assert_close(found.encoder_patch, tapped.permute(0, 3, 1, 2)[:, :8], **CLOSE)
    assert not torch.allclose(hidden[-1], tapped)
    asked = pointed.prompts
    said = model(pixels(images)[[0, 2]], input_points=asked.points, input_labels=asked.labels, multimask_output=True)
    torch.testing.assert_close(found.groups[0].low_res_masks, said.pred_masks, **CLOSE)
    torch.testing.assert_close(found.groups[0].iou_scores, said.iou_scores, **CLOSE)
    said = model(pixels(images)[[1]], input_boxes=boxed.prompts.boxes, multimask_output=False)
    torch.testing.assert_close(found.groups[1].low_res_masks, said.pred_masks, **CLOSE)
    embedding = model.get_image_embeddings(pixels(images)) + model.prompt_encoder.no_mask_embed.weight.view(16, 1, 1)
    torch.testing.assert_close(found.groups[1].prompt_embed[:, 0], embedding[[1]], **CLOSE)


@torch.no_grad()
def test_a_tracker_is_tapped_in_its_vit(tracker, places) -> None:
    model, images = tracker[0], batch(126)
    hidden = model.vision_encoder.backbone(images.images / 127.5 - 1, output_hidden_states=True).hidden_states
    first = hidden[len(hidden) - 2].reshape(3, 9, 9, 64)  # of two layers: 30 * 1 // 31 = 0
    found = teacher_of(places["tracker"][0]).patches(images)
    torch.testing.assert_close(found, first.permute(0, 3, 1, 2), **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["mobile", "merged"])
def test_another_trunk_is_tapped_at_its_end(kind, places) -> None:
    folder, side = places[kind]
    teacher, images = teacher_of(folder), batch(side)
    if kind == "mobile":
        wanted = teacher.model.vision_encoder.trunk.image_embedding(pixels(images))
    else:
        wanted = teacher.model.vision_encoder.backbone.image_embedding(images.images / 127.5 - 1)
    torch.testing.assert_close(teacher.patches(images), wanted, **CLOSE)


def off(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return ((found - wanted).norm() / wanted.norm()).item()


@pytest.mark.parametrize("student_side", [128, 96, 32])
def test_a_teacher_of_another_size_sees_the_same_scene(student_side, deep_sam) -> None:
    ratio = 64 / student_side
    teacher, images = teacher_of(deep_sam[1]), batch(student_side)
    asked = groups(student_side)
    found = teacher.answer(images, asked)
    own = resize(images.images, [64, 64], antialias=True)
    sizes = torch.tensor([[64, 64], [32, 64], [64, round((student_side // 2 + 1) * ratio)]])
    centres = (asked[0].prompts.points + 0.5) * ratio - 0.5
    prompts = replace(asked[0].prompts, points=centres), replace(asked[1].prompts, boxes=asked[1].prompts.boxes * ratio)
    there = tuple(replace(group, prompts=own_prompts) for group, own_prompts in zip(asked, prompts, strict=True))
    wanted = teacher.answer(replace(ImageBatch.full(own), sizes=sizes), there)
    unmoved = teacher.answer(replace(ImageBatch.full(own), sizes=sizes), asked)
    # torchvision rounds its own way: the value of a pixel may be off by one
    assert off(found.encoder_patch, wanted.encoder_patch) < 0.01
    for ours, theirs, elsewhere in zip(found.groups, wanted.groups, unmoved.groups, strict=True):
        assert off(ours.low_res_masks, theirs.low_res_masks) < 0.02 < off(ours.low_res_masks, elsewhere.low_res_masks)


def test_resizing_keeps_flat_images_and_where_the_padding_begins() -> None:
    images = torch.zeros(1, 3, 40, 40, dtype=torch.uint8)
    images[:, :, :20] = 200
    given = ImageBatch(images, torch.tensor([[20, 40]]), torch.tensor([[33, 66]]), ("a",), torch.tensor([7]))
    found = on_canvas(given, 100)
    assert found.images.shape == (1, 3, 100, 100) and found.images.dtype == torch.uint8
    assert found.sizes.tolist() == [[50, 100]] and found.original_sizes.tolist() == [[33, 66]]
    assert (found.images[:, :, :48] == 200).all() and not found.images[:, :, 52:].any()
    assert on_canvas(given, 40) is given
    with pytest.raises(ValueError, match="square"):
        on_canvas(ImageBatch.full(torch.zeros(1, 3, 4, 8, dtype=torch.uint8)), 8)


def test_prompts_move_with_the_pixels_they_name() -> None:
    masks = torch.arange(16.0).view(1, 1, 4, 4)
    prompts = Prompts(
        torch.ones(1, 1, dtype=torch.bool), torch.tensor([[[[0.0, 9.0]]]]), torch.ones(1, 1, 1, dtype=torch.int64),
        torch.tensor([[[0.0, 2.0, 10.0, 5.0]]]), masks,
    )  # fmt: skip
    found = moved(prompts, 2.0, (2, 2))
    assert found.points.tolist() == [[[[0.5, 18.5]]]]  # pixel 9 spans 9..10, then 18..20, the middle of 18 and 19
    assert found.boxes.tolist() == [[[0.0, 4.0, 20.0, 10.0]]]
    assert found.masks.tolist() == [[[[2.5, 4.5], [10.5, 12.5]]]]
    same = moved(prompts, 1.0, (4, 4))
    assert same.points is prompts.points and same.boxes is prompts.boxes and same.masks is prompts.masks


def test_mask_prompts_reach_a_teacher_of_any_resolution(deep_sam) -> None:
    teacher, images = teacher_of(deep_sam[1]), batch(64, 1)
    fine = torch.randn(1, 2, 8, 8, generator=torch.Generator().manual_seed(0)).repeat_interleave(4, -1)
    coarse = fine.repeat_interleave(4, -2)  # 32 x 32, where the teacher reads 16 x 16
    asked = PromptGroup(torch.tensor([0]), replace(boxes(64, 1), masks=coarse * 5), multimask=False)
    own = replace(asked, prompts=replace(asked.prompts, masks=coarse[..., ::2, ::2] * 5))
    found, wanted = teacher.answer(images, (asked,)).groups[0], teacher.answer(images, (own,)).groups[0]
    assert found.prompt_embed.shape[1] == 2
    torch.testing.assert_close(found.low_res_masks, wanted.low_res_masks)
    torch.testing.assert_close(found.prompt_embed, wanted.prompt_embed)


def test_images_are_encoded_once_for_all_groups(deep_sam) -> None:
    teacher, calls = teacher_of(deep_sam[1]), []
    teacher.model.vision_encoder.register_forward_hook(lambda *_: calls.append(1))
    teacher.answer(batch(64), groups(64))
    assert len(calls) == 1
    assert not teacher._tap._forward_hooks  # ours is gone


def test_dense_answers_can_be_left_out(deep_sam) -> None:
    teacher = teacher_of(deep_sam[1])
    full, lean = (teacher.answer(batch(64), groups(64), dense=dense) for dense in (True, False))
    assert all(said.low_res_masks is None and said.iou_scores is None for said in lean.groups)
    assert torch.equal(lean.groups[0].mask_tokens, full.groups[0].mask_tokens)
    assert torch.equal(lean.groups[1].prompt_embed, full.groups[1].prompt_embed)


@pytest.mark.parametrize(
    ("kind", "precision", "most"),
    [("sam", "bf16", 0.02), ("sam", "fp16", 0.002), ("tracker", "bf16", 0.02), ("mobile", "bf16", 0.2),
     ("merged", "bf16", 0.2)],
)  # fmt: skip
def test_half_precision_is_for_the_encoder_alone(kind, precision, most, places) -> None:
    folder, side = places[kind]
    full, half = teacher_of(folder), teacher_of(folder, precision=precision)
    assert {p.dtype for p in half.model.parameters()} == {torch.float32}
    exact, rough = (teacher.answer(batch(side), groups(side)) for teacher in (full, half))
    assert rough.encoder_patch.dtype == torch.float32
    assert 0 < off(rough.encoder_patch, exact.encoder_patch) < most
    # the decoder itself, on the rough embeddings, is float32: points one hundredth of a pixel apart are not the same
    near = replace(groups(side)[0], prompts=replace(points(side, 2), points=points(side, 2).points + 0.01))
    moved_masks = half.answer(batch(side), (near,)).groups[0].low_res_masks
    assert (moved_masks != rough.groups[0].low_res_masks).any()


def test_the_fingerprint_tells_what_decides_the_answers(deep_sam, tmp_path) -> None:
    model, folder = deep_sam
    first = teacher_of(folder).fingerprint
    assert teacher_of(folder, name="other", weight=3).fingerprint == first
    assert teacher_of(folder, precision="bf16").fingerprint != first
    model.save_pretrained(tmp_path / "copy")
    assert teacher_of(tmp_path / "copy").fingerprint == first
    bias = model.mask_decoder.iou_prediction_head.proj_in.bias
    bias.data[0] += 1
    model.save_pretrained(tmp_path / "changed")
    bias.data[0] -= 1
    assert teacher_of(tmp_path / "changed").fingerprint != first
    model.config.mask_decoder_config.num_attention_heads = 4  # no weight shows it
    model.save_pretrained(tmp_path / "heads")
    model.config.mask_decoder_config.num_attention_heads = 2
    assert teacher_of(tmp_path / "heads").fingerprint != first


def test_the_projection_is_fitted_on_cells_that_show_images(deep_sam) -> None:
    teacher = teacher_of(deep_sam[1], projected=False)
    images = batch(64)
    with pytest.raises(ValueError, match="fit_projection"):
        teacher.answer(images, groups(64))
    found = fit_projection(teacher, [images, batch(64, 1)], 6, standardise=True)
    cells = teacher.patches(images).permute(0, 2, 3, 1)
    # of 4 x 4 cells: all, the upper two rows, the left two columns; then the first image again
    data = torch.cat([cells[0].flatten(0, 1), cells[1, :2].flatten(0, 1), cells[2, :, :2].flatten(0, 1),
                      teacher.patches(batch(64, 1))[0].permute(1, 2, 0).flatten(0, 1)])  # fmt: skip
    wanted = Projection.fit([data], 6, standardise=True)
    torch.testing.assert_close(found.mean, wanted.mean, **CLOSE)
    torch.testing.assert_close(found.basis, wanted.basis, atol=1e-3, rtol=1e-3)
    teacher.projection = found
    assert teacher.answer(images, groups(64)).encoder_patch.shape == (3, 6, 4, 4)


class Shape:
    name, grid, width = "sam-h", (64, 64), 256


def test_students_that_cannot_meet_a_teacher_are_told_what_to_do() -> None:
    every = ("encoder_patch", "prompt_embed", "decoder_mask_token", "dense_mask_logits")
    check_match((64, 64), 256, every, Shape)
    check_match((32, 128), 256, every, Shape)
    check_match((64, 64), 96, ("encoder_patch", "dense_mask_logits"), Shape)
    check_match((8, 8), 96, (), Shape)
    with pytest.raises(UserError, match=r"'sam-h'.* 256 .* 96.*student.width: 256.*prompt_embed.enable: false"):
        check_match((64, 64), 96, every, Shape)
    with pytest.raises(UserError, match=r"decoder_mask_token\.enable: false") as raised:
        check_match((64, 64), 96, ("decoder_mask_token",), Shape)
    assert "prompt_embed" not in str(raised.value)
    for grid in ((31, 64), (64, 129)):
        with pytest.raises(UserError, match=r"64 x 64 cells .* factor of 2"):
            check_match(grid, 256, ("dense_mask_logits",), Shape)
