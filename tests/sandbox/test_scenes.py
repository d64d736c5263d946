"""The rendered world: numbered scenes, exact masks, names that fit the pixels."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from matplotlib.path import Path as Polygon
from scipy.ndimage import binary_opening
from torch.utils._python_dispatch import TorchDispatchMode

from samdistill.sandbox.scenes import (
    ANGLES,
    COLOURS,
    LARGE,
    SHAPES,
    SMALL,
    TEXTURES,
    SceneParameters,
    SceneStyle,
    render,
    render_scenes,
    sample_parameters,
)

STYLE = SceneStyle()


def corners(count: int, radii: tuple[float, ...] = (1.0,)) -> np.ndarray:
    angle = np.arange(count) * 2 * math.pi / count
    return np.stack([np.cos(angle), np.sin(angle)], -1) * np.resize(radii, count)[:, None]


def outline(p: SceneParameters, b: int, k: int) -> np.ndarray:
    """Vertices in object units; from the shape's own definition where it has a simple one."""
    angle = np.arange(ANGLES) * 2 * math.pi / ANGLES
    table = np.stack([np.cos(angle), np.sin(angle)], -1) * p.outline[b, k].double().numpy()[:, None]
    simple = {"square": corners(4), "triangle": corners(3), "hexagon": corners(6), "star": corners(10, (1, 0.45)),
              "circle": corners(2000), "ring": corners(2000)}  # fmt: skip
    return simple.get(SHAPES[int(p.shape[b, k])], table)


def drawn(p: SceneParameters, b: int, k: int, height: int, width: int) -> np.ndarray:
    """One object's pixels by asking for every pixel centre whether it lies in the polygon."""
    if k >= int(p.count[b]):
        return np.zeros((height, width), bool)
    side = min(height, width)
    y, x = np.mgrid[:height, :width] + 0.5
    pixels = np.stack([x, y], -1).reshape(-1, 2)

    def inside(local: np.ndarray) -> np.ndarray:
        radius, turn = float(p.radius[b, k]) * side, float(p.rotation[b, k])
        u, v = local[:, 0] * radius, local[:, 1] * radius * float(p.aspect[b, k])
        cx, cy = float(p.centre[b, k, 0]) * width, float(p.centre[b, k, 1]) * height
        vertices = np.stack([cx + u * math.cos(turn) - v * math.sin(turn), cy + u * math.sin(turn) + v * math.cos(turn)], -1)  # fmt: skip  # noqa: E501
        return Polygon(vertices).contains_points(pixels).reshape(height, width)

    local, hole = outline(p, b, k), float(p.hole[b, k])
    return inside(local) & ~inside(local * hole) if hole > 0 else inside(local)


@pytest.mark.parametrize("size", [(96, 96), (80, 130)])
def test_masks_are_the_pixels_inside_the_outline_that_nothing_nearer_covers(size: tuple[int, int]) -> None:
    p = sample_parameters(range(24), seed=5, style=STYLE)
    masks = render(p, *size)[1].numpy()
    shapes = set()
    for b in range(24):
        objects = [drawn(p, b, k, *size) for k in range(STYLE.max_objects)]
        for k, mask in enumerate(masks[b]):
            expected = objects[k] & ~np.any([*objects[k + 1 :], np.zeros(size, bool)], axis=0)
            wrong = mask ^ expected
            # the outline is a table of 256 radii: it may differ from the polygon along a line, never over an area
            assert not binary_opening(wrong, np.ones((3, 3))).any()
            assert wrong.sum() <= 2 + 0.02 * objects[k].sum()
            shapes.add(SHAPES[int(p.shape[b, k])])
    assert shapes == set(SHAPES)


def test_circles_are_exact_ellipses() -> None:
    style = SceneStyle(max_objects=1)
    p = sample_parameters(range(150), seed=3, style=style)
    masks, found = render(p, 64, 64)[1], 0
    y, x = np.mgrid[:64, :64] + 0.5
    for b in (p.shape[:, 0] == SHAPES.index("circle")).nonzero()[:, 0].tolist():
        dx, dy = x - 64 * float(p.centre[b, 0, 0]), y - 64 * float(p.centre[b, 0, 1])
        turn, radius = float(p.rotation[b, 0]), 64 * float(p.radius[b, 0])
        u = (dx * math.cos(turn) + dy * math.sin(turn)) / radius
        v = (dy * math.cos(turn) - dx * math.sin(turn)) / radius / float(p.aspect[b, 0])
        reach = u**2 + v**2
        clear = np.abs(reach - 1) > 1e-4
        assert np.array_equal(masks[b, 0].numpy()[clear], (reach < 1)[clear])
        found += 1
    assert found >= 5


def test_masks_never_overlap_and_unused_slots_are_empty() -> None:
    p = sample_parameters(range(64), seed=1)
    masks = render(p, 64, 64)[1]
    assert int(masks.sum(1).max()) == 1
    unused = torch.arange(masks.shape[1]) >= p.count[:, None]
    assert not masks[unused].any() and bool(unused.any()) and bool((~unused).all(1).any())


def test_scene_depends_on_its_number_and_the_seed_alone() -> None:
    whole = render_scenes(range(12), 48, seed=7)
    for chosen in ([4], [11, 0, 4], list(range(3, 9))):
        part = render_scenes(chosen, 48, seed=7)
        assert torch.equal(part.images, whole.images[chosen]) and torch.equal(part.masks, whole.masks[chosen])
        assert part.concepts == [whole.concepts[i] for i in chosen]
    other = render_scenes(range(12), 48, seed=8)
    assert not any(torch.equal(a, b) for a, b in zip(whole.images, other.images, strict=True))
    assert len({image.numpy().tobytes() for image in whole.images}) == 12


def test_layout_is_the_same_at_every_resolution() -> None:
    small, large = render_scenes(range(16), 64, seed=2), render_scenes(range(16), 256, seed=2)
    share = [s.masks.flatten(2).float().mean(-1) for s in (small, large)]
    assert (share[0] - share[1]).abs().max() < 0.01
    reduced = torch.nn.functional.avg_pool2d(large.images.float(), 4)
    assert (reduced - small.images.float()).abs().mean() < 6  # anti-aliased edges and fine texture differ


def test_valid_marks_objects_large_enough() -> None:
    scenes = render_scenes(range(64), 64, seed=1, style=SceneStyle(min_visible=0.02))
    area = scenes.masks.flatten(2).float().mean(-1)
    assert torch.equal(scenes.valid, area >= 0.02)
    assert bool(((area > 0) & ~scenes.valid).any()) and bool(scenes.valid.any())


def test_style_bounds_hold() -> None:
    p = sample_parameters(range(200), style=SceneStyle(max_objects=3, min_objects=2, min_radius=0.2, max_radius=0.25))
    assert p.radius.shape == (200, 3) and set(p.count.tolist()) == {2, 3}
    assert 0.2 <= float(p.radius.min()) < 0.21 and 0.24 < float(p.radius.max()) <= 0.25


def test_every_shape_colour_and_texture_occurs_and_outlines_are_normalised() -> None:
    p = sample_parameters(range(400))
    for values, names in ((p.shape, SHAPES), (p.colour, COLOURS), (p.texture, TEXTURES)):
        assert set(values.flatten().tolist()) == set(range(len(names)))
    assert torch.allclose(p.outline.amax(-1), torch.ones(()))
    assert bool((p.outline > 0).all())


def test_concepts_are_composed_of_the_objects_own_words() -> None:
    p, scenes = sample_parameters(range(30), seed=4), render_scenes(range(30), 32, seed=4)
    for b, scene in enumerate(scenes.concepts):
        for k, names in enumerate(scene):
            shape, colour = SHAPES[int(p.shape[b, k])], list(COLOURS)[int(p.colour[b, k])]
            radius = float(p.radius[b, k])
            size = "small" if radius < SMALL else "large" if radius > LARGE else "medium"
            assert set(names) == {shape, colour, size, f"{colour} {shape}", f"{size} {shape}", f"{size} {colour} {shape}"}  # fmt: skip  # noqa: E501


def test_named_colours_are_seen() -> None:
    """Within plain objects called red, green or blue that channel leads."""
    p, scenes = sample_parameters(range(120), seed=6), render_scenes(range(120), 64, seed=6)
    channel, checked = {"red": 0, "green": 1, "blue": 2}, 0
    for b, k in scenes.valid.nonzero().tolist():
        name = list(COLOURS)[int(p.colour[b, k])]
        if name in channel and TEXTURES[int(p.texture[b, k])] == "plain":
            mean = scenes.images[b, :, scenes.masks[b, k]].float().mean(1)
            assert int(mean.argmax()) == channel[name], (b, k, name, mean)
            checked += 1
    assert checked > 15


class _Count(TorchDispatchMode):
    calls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls += 1
        return func(*args, **(kwargs or {}))


def test_drawing_is_vectorised_over_scenes() -> None:
    def operations(count: int) -> int:
        p = sample_parameters(range(count))
        with _Count() as mode:
            render(p, 16, 16)
        return mode.calls

    assert operations(1) == operations(16)
