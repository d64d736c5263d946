"""Geometry and replayable views."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import functional as TF

from samdistill.config import AugmentConfig
from samdistill.data import Geometry, ViewTransform, view_seed
from samdistill.data.transforms import PAD, draw_view
from samdistill.ops.masks import masks_to_boxes
from samdistill.types import UserError

KINDS = ("square", "longest_side")
EVERYTHING = AugmentConfig(
    flip=0.5, crop_scale=(0.3, 1.0), brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1
)  # fmt: skip


def picture(height: int = 60, width: int = 90, seed: int = 0) -> Image.Image:
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (height // 6, width // 6, 3), dtype=np.uint8)).resize((width, height))


@pytest.mark.parametrize(
    ("size", "expected"), [((60, 90), (75, 112)), ((90, 60), (112, 75)), ((50, 50), (112, 112)), ((1, 500), (1, 112)),
                           ((1500, 2250), (75, 112))]
)  # fmt: skip
def test_longest_side_rounds_as_sam_does(size: tuple[int, int], expected: tuple[int, int]) -> None:
    assert Geometry(112, "longest_side").placed(size) == expected
    assert Geometry(112, "square").placed(size) == (112, 112)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [(60, 90), (90, 60), (300, 200), (112, 112), (1, 1), (1, 40), (37, 1)])
def test_canvas_is_torchvisions_resize_with_padding(kind: str, size: tuple[int, int]) -> None:
    geometry, image = Geometry(112, kind), picture(max(size[0], 6), max(size[1], 6)).crop((0, 0, size[1], size[0]))
    canvas, (height, width) = geometry.canvas(image)
    assert canvas.shape == (3, 112, 112) and canvas.dtype == torch.uint8 and canvas.is_contiguous()
    reference = TF.pil_to_tensor(TF.resize(image, [height, width], antialias=True)).int()
    difference = (canvas[:, :height, :width].int() - reference).abs()
    assert difference.max() <= 2 and difference.float().mean() < 0.2
    padding = torch.ones(112, 112, dtype=torch.bool)
    padding[:height, :width] = False
    assert bool((canvas[:, padding] == PAD).all())


def test_padding_is_zero_for_sam3_within_a_grey_level() -> None:
    assert abs((PAD / 255 - 0.5) / 0.5) < 1 / 127


@pytest.mark.parametrize("kind", KINDS)
def test_masks_lie_where_the_image_lies(kind: str) -> None:
    """A black and white picture of a mask and the mask itself agree except where bilinear blurs its edge."""
    y, x = np.mgrid[:70, :100]
    mask = np.hypot(x - 30, y - 40) < 22
    image = Image.fromarray(np.repeat((mask * 255).astype(np.uint8)[..., None], 3, -1))
    for side in (56, 112, 350):
        geometry = Geometry(side, kind)
        canvas, (height, width) = geometry.canvas(image)
        placed = geometry.mask(mask)
        assert placed.dtype == torch.bool and placed.shape == (side, side)
        assert not placed[height:].any() and not placed[:, width:].any()
        inside = canvas[0, :height, :width]
        sharp = (inside < 60) | (inside > 195)
        assert sharp.float().mean() > 0.85
        assert torch.equal((inside > 127)[sharp], placed[:height, :width][sharp])
    assert torch.equal(Geometry(56, kind).mask(torch.from_numpy(mask)[None, None])[0, 0], Geometry(56, kind).mask(mask))


def test_mask_takes_the_pixel_under_the_centre() -> None:
    mask = np.array([[1, 0], [0, 0], [0, 0], [0, 1]], bool)
    assert Geometry(4, "longest_side").mask(mask).int().tolist() == [[1, 0, 0, 0], [0] * 4, [0] * 4, [0, 1, 0, 0]]
    assert Geometry(4).mask(mask).int().tolist() == [[1, 1, 0, 0], [0] * 4, [0] * 4, [0, 0, 1, 1]]


@pytest.mark.parametrize("kind", KINDS)
def test_points_follow_a_marked_pixel(kind: str) -> None:
    geometry = Geometry(120, kind)
    for height, width, x, y in ((30, 40, 11, 7), (40, 30, 29, 39), (24, 24, 0, 0)):
        mask = np.zeros((height, width), bool)
        mask[y, x] = True
        rows, columns = geometry.mask(mask).nonzero().T
        centre = torch.stack([columns.float().mean() + 0.5, rows.float().mean() + 0.5])
        moved = geometry.points(torch.tensor([[x + 0.5, y + 0.5]]), (height, width))[0]
        assert torch.allclose(moved, centre, atol=0.01)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [(60, 90), (90, 61), (224, 224)])
def test_masks_come_back(kind: str, size: tuple[int, int]) -> None:
    geometry = Geometry(112, kind)
    y, x = np.mgrid[: size[0], : size[1]]
    mask = torch.from_numpy(np.hypot(x - size[1] * 0.4, y - size[0] * 0.6) < 0.3 * min(size))
    logits = geometry.mask(mask).float() * 2 - 1
    back = geometry.masks_back(logits[None], size)
    assert back.shape == (1, *size)
    found = back[0] > 0
    assert (found & mask).sum() / (found | mask).sum() > 0.94
    with pytest.raises(ValueError, match="canvas"):
        geometry.masks_back(logits[:50], size)


def test_seed_replays_bit_for_bit_and_views_differ() -> None:
    transform, image = ViewTransform(Geometry(56), EVERYTHING), picture()
    views = [transform(image, seed)[0] for seed in range(40)]
    assert all(torch.equal(view, transform(picture(), seed)[0]) for seed, view in enumerate(views))
    assert len({view.numpy().tobytes() for view in views}) == 40


def test_replay_in_another_process_with_another_hash_seed_and_threads() -> None:
    code = (
        "import torch, hashlib\n"
        "from samdistill.config import AugmentConfig\n"
        "from samdistill.data import Geometry, ViewTransform, view_seed\n"
        "from PIL import Image\n"
        "a = AugmentConfig(flip=0.5, crop_scale=(0.3, 1.0), brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1)\n"
        "t = ViewTransform(Geometry(120), a)\n"
        "image = Image.linear_gradient('L').convert('RGB').resize((200, 170))\n"
        "h = hashlib.sha256(b''.join(t(image, view_seed(3, 'k', v))[0].numpy().tobytes() for v in range(8)))\n"
        "print(h.hexdigest(), t.fingerprint)"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True,
            env={"PYTHONPATH": ":".join(sys.path), "PYTHONHASHSEED": seed, "OMP_NUM_THREADS": threads},
        ).stdout
        for seed, threads in (("1", "1"), ("2", "2"))
    }  # fmt: skip
    assert len(outputs) == 1


def test_flip_is_the_mirror_image_and_precedes_padding() -> None:
    image = picture(40, 90)
    plain, size = ViewTransform(Geometry(56, "longest_side"))(image, 5)
    flipped, flipped_size = ViewTransform(Geometry(56, "longest_side"), AugmentConfig(flip=1.0))(image, 5)
    assert size == flipped_size == (25, 56)
    assert (flipped[:, :25].int() - plain[:, :25].flip(-1).int()).abs().max() <= 1
    assert torch.equal(flipped[:, 25:], plain[:, 25:])
    tall, (height, width) = ViewTransform(Geometry(56, "longest_side"), AugmentConfig(flip=1.0))(picture(90, 40), 5)
    assert (height, width) == (56, 25) and bool((tall[:, :, 25:] == PAD).all()) and bool((tall[:, :, 0] != PAD).any())


def test_turning_one_augmentation_on_leaves_the_others() -> None:
    alone = [draw_view(AugmentConfig(crop_scale=(0.3, 1.0)), (60, 90), s) for s in range(50)]
    both = [draw_view(EVERYTHING, (60, 90), s) for s in range(50)]
    assert [v.box for v in alone] == [v.box for v in both]
    assert {v.flip for v in alone} == {False} and {v.flip for v in both} == {True, False}


def test_crops_have_the_asked_area_and_ratio_and_stay_inside() -> None:
    augment = AugmentConfig(crop_scale=(0.2, 0.8), crop_ratio=(0.5, 2.0))
    shares, ratios, centres = [], [], []
    for seed in range(2000):
        left, top, right, bottom = draw_view(augment, (400, 600), seed).box
        assert 0 <= left < right <= 600 and 0 <= top < bottom <= 400
        shares.append((right - left) * (bottom - top) / 240000)
        ratios.append((right - left) / (bottom - top))
        centres.append(((left + right) / 1200, (top + bottom) / 800))
    assert 0.19 < min(shares) < 0.22 and 0.75 < max(shares) < 0.81
    assert 0.49 < min(ratios) < 0.52 and 1.9 < max(ratios) < 2.02
    assert np.abs(np.mean(centres, 0) - 0.5).max() < 0.02


def test_a_crop_that_cannot_fit_falls_back_to_the_centre() -> None:
    box = draw_view(AugmentConfig(crop_scale=(1.0, 1.0), crop_ratio=(0.9, 1.1)), (10, 100), 0).box
    assert box == (44, 0, 55, 10)
    assert draw_view(AugmentConfig(crop_scale=(0.5, 1.0)), (1, 1), 0).box == (0, 0, 1, 1)


def flat_colours(count: int = 64) -> np.ndarray:
    return np.random.default_rng(0).integers(90, 165, (8, count // 8, 3)).astype(np.uint8)


@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation"])
def test_colour_changes_match_torchvision(name: str) -> None:
    """Mid-tones, so that nothing clips: the only difference is torchvision's rounding between steps."""
    pixels = flat_colours()
    adjust = {"brightness": TF.adjust_brightness, "contrast": TF.adjust_contrast, "saturation": TF.adjust_saturation}
    augment = AugmentConfig.model_validate({name: 0.4})
    factors = set()
    for seed in range(8):
        brightness, contrast, saturation, _ = draw_view(augment, (8, 8), seed).colour
        factor = {"brightness": brightness, "contrast": contrast, "saturation": saturation}[name]
        factors.add(factor)
        assert 0.6 <= factor <= 1.4
        canvas, _ = ViewTransform(Geometry(8), augment)(Image.fromarray(pixels), seed)
        expected = TF.pil_to_tensor(adjust[name](Image.fromarray(pixels), factor))
        assert (canvas.int() - expected.int()).abs().max() <= 2
    assert len(factors) == 8


def test_colour_changes_compose_in_order() -> None:
    pixels, augment = flat_colours(), AugmentConfig(brightness=0.2, contrast=0.3, saturation=0.3)
    for seed in range(5):
        brightness, contrast, saturation, _ = draw_view(augment, (8, 8), seed).colour
        image = TF.adjust_brightness(Image.fromarray(pixels), brightness)
        expected = TF.pil_to_tensor(TF.adjust_saturation(TF.adjust_contrast(image, contrast), saturation)).int()
        canvas, _ = ViewTransform(Geometry(8), augment)(Image.fromarray(pixels), seed)
        assert (canvas.int() - expected).abs().max() <= 3


def test_hue_turns_colours_but_neither_grey_nor_luma() -> None:
    pixels = np.array([[[120, 120, 120], [170, 100, 100], [100, 100, 170]]], np.uint8)
    luma = np.array([0.299, 0.587, 0.114])
    transform = ViewTransform(Geometry(3, "longest_side"), AugmentConfig(hue=0.5))
    seen = set()
    for seed in range(20):
        canvas, _ = transform(Image.fromarray(pixels), seed)
        row = canvas[:, 0].T.double().numpy()
        assert np.abs(row[0] - 120).max() <= 1
        assert np.abs(row @ luma - pixels[0] @ luma).max() < 1.5
        seen.add(int(row[1].argmax()))
    assert seen == {0, 1, 2}


def test_fingerprint_changes_exactly_with_pixels() -> None:
    base = ViewTransform(Geometry(112), AugmentConfig())
    same = ViewTransform(Geometry(112), AugmentConfig(crop_ratio=(0.9, 1.1)))  # no crop, so its ratio is idle
    assert base.fingerprint == same.fingerprint and len(base.fingerprint) == 16
    int(base.fingerprint, 16)
    others = [
        ViewTransform(Geometry(126)), ViewTransform(Geometry(112, "longest_side")),
        *(ViewTransform(Geometry(112), AugmentConfig.model_validate(a)) for a in (
            {"flip": 0.5}, {"crop_scale": (0.5, 1.0)}, {"crop_scale": (0.5, 1.0), "crop_ratio": (0.9, 1.1)},
            {"brightness": 0.1}, {"contrast": 0.1}, {"saturation": 0.1}, {"hue": 0.1})),
    ]  # fmt: skip
    assert len({base.fingerprint, *(t.fingerprint for t in others)}) == len(others) + 1


def test_view_seeds_are_31_bit_distinct_and_pinned() -> None:
    seeds = {view_seed(s, k, v) for s in range(3) for k in ("a", "b", "sa_1") for v in range(50)}
    assert len(seeds) == 450 and all(0 <= s < 2**31 for s in seeds)
    assert view_seed(0, "sa_1", 0) == 0x82F15611 >> 1  # printf 0/0/sa_1 | sha256sum


def test_settings_that_cannot_work_are_refused() -> None:
    for augment in (AugmentConfig(crop_scale=(0.9, 0.2)), AugmentConfig(crop_scale=(0.0, 1.0)),
                    AugmentConfig(crop_ratio=(2.0, 1.0))):  # fmt: skip
        with pytest.raises(UserError, match=r"augment\.crop"):
            ViewTransform(Geometry(56), augment)
    with pytest.raises(UserError, match="longest_side"):
        Geometry(56, "stretch")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="image_size"):
        Geometry(0)


@pytest.mark.parametrize("kind", KINDS)
def test_boxes_follow_the_image_through_crop_flip_and_placing(kind: str) -> None:
    """A white rectangle drawn on black is transformed as the image, and its box read off the canvas."""
    rng = np.random.default_rng(0)
    transform = ViewTransform(Geometry(112, kind), AugmentConfig(flip=0.5, crop_scale=(0.2, 1.0)))  # type: ignore[arg-type]
    gone = cut = 0
    for seed in range(150):
        height, width = (int(v) for v in rng.integers(60, 200, 2))
        left, top = int(rng.integers(width - 20)), int(rng.integers(height - 20))
        right, bottom = int(rng.integers(left + 12, width)), int(rng.integers(top + 12, height))
        pixels = np.zeros((height, width, 3), np.uint8)
        pixels[top:bottom, left:right] = 255
        canvas, (h, w) = transform(Image.fromarray(pixels), seed)
        box = transform.boxes(torch.tensor([[left, top, right, bottom]]), (height, width), seed)
        assert box.shape == (1, 4)
        x0, y0, x1, y1 = box[0].tolist()
        assert 0 <= x0 <= x1 <= w + 1e-3 and 0 <= y0 <= y1 <= h + 1e-3
        seen = masks_to_boxes((canvas[0, :h, :w] > 127)[None])[0]
        if min(x1 - x0, y1 - y0) < 1:
            gone += 1
            assert (seen[2:] - seen[:2]).min() <= 1
        else:
            cut += seen[:2].min() == 0 or seen[2] == w or seen[3] == h
            assert (box[0] - seen).abs().max() <= 1.01
    assert gone > 5 and cut > 20
    assert transform.boxes(torch.zeros(0, 4), (60, 90), 0).shape == (0, 4)


@pytest.mark.parametrize("kind", KINDS)
def test_masks_follow_the_image_through_crop_flip_and_placing(kind: str) -> None:
    """Masks are painted white on black; the transformed picture shows them, but for edges that bilinear blurs."""
    rng = np.random.default_rng(0)
    transform = ViewTransform(Geometry(112, kind), AugmentConfig(flip=0.5, crop_scale=(0.2, 1.0)))  # type: ignore[arg-type]
    gone = 0
    for seed in range(60):
        height, width = (int(v) for v in rng.integers(60, 200, 2))
        y, x = np.mgrid[:height, :width]
        centres, radii = rng.random((2, 2)) * (height, width), rng.uniform(12, 40, 2)
        masks = np.stack([np.hypot(y - c[0], x - c[1]) < r for c, r in zip(centres, radii, strict=True)])
        placed = transform.masks(masks, (height, width), seed)
        assert placed.shape == (2, 112, 112) and placed.dtype == torch.bool
        for mask, own in zip(masks, placed, strict=True):
            pixels = np.repeat((mask * 255).astype(np.uint8)[..., None], 3, -1)
            canvas, (h, w) = transform(Image.fromarray(pixels), seed)
            assert not own[h:].any() and not own[:, w:].any()
            seen, laid = canvas[0, :h, :w], own[:h, :w]
            sharp = (seen < 60) | (seen > 195)
            assert sharp.float().mean() > 0.9 and torch.equal((seen > 127)[sharp], laid[sharp])
            assert torch.equal(transform.masks(torch.from_numpy(mask), (height, width), seed), own)
            gone += not own.any()
    assert 3 < gone < 60


def test_masks_are_pixel_exact_where_nothing_is_resized() -> None:
    rng = np.random.default_rng(1)
    transform = ViewTransform(Geometry(50, "longest_side"), AugmentConfig(flip=0.5))
    flips = set()
    for seed in range(12):
        mask = rng.random((30, 50)) < 0.5
        pixels = np.repeat((mask * 255).astype(np.uint8)[..., None], 3, -1)
        canvas, _ = transform(Image.fromarray(pixels), seed)
        placed = transform.masks(mask, (30, 50), seed)
        assert torch.equal(placed[:30], canvas[0, :30] == 255)
        flips.add(torch.equal(placed[:30], torch.from_numpy(mask)))
    assert flips == {True, False}
    with pytest.raises(ValueError, match=r"masks of \(30, 50\) for an image of \(50, 30\)"):
        transform.masks(np.zeros((30, 50), bool), (50, 30), 0)
