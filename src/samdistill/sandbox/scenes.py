"""Procedural images with exact masks and concept names.

A scene has a background (gradient, smooth noise, sometimes stripes) and shaded, textured objects that are drawn back to
front. A shape is a radius function rho(angle), stored as a look-up table, so that a batch of different shapes is drawn
by one expression. The mask of an object is exact: the pixels whose centre is inside its outline and not covered by a
nearer object.

Scenes are numbered. Scene ``index`` of world ``seed`` has the same layout in every batch and at every resolution.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

ANGLES = 256
TEXTURES = ("plain", "striped", "checkered", "dotted", "rippled")
COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (0.85, 0.15, 0.12),
    "orange": (0.95, 0.55, 0.10),
    "yellow": (0.95, 0.88, 0.20),
    "green": (0.20, 0.65, 0.22),
    "cyan": (0.25, 0.80, 0.85),
    "blue": (0.15, 0.30, 0.85),
    "purple": (0.52, 0.22, 0.70),
    "pink": (0.95, 0.55, 0.75),
    "brown": (0.45, 0.28, 0.14),
    "white": (0.93, 0.93, 0.91),
    "gray": (0.50, 0.50, 0.52),
    "black": (0.10, 0.10, 0.11),
}
SMALL, LARGE = 0.14, 0.20  # radius as a fraction of the shorter side: below is "small", above is "large"


def _outline(vertices: np.ndarray) -> np.ndarray:
    """Return the radius of a star-shaped polygon around the origin at ``ANGLES`` equidistant angles.

    ``vertices`` has shape (n, 2), counter-clockwise. Each ray is intersected with every edge, and the farthest
    intersection is taken. The result is scaled to a maximum of 1.
    """
    theta = np.arange(ANGLES) * (2 * math.pi / ANGLES)
    ray = np.stack([np.cos(theta), np.sin(theta)], -1)[:, None]
    start, edge = vertices[None], (np.roll(vertices, -1, 0) - vertices)[None]

    def cross(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return a[..., 0] * b[..., 1] - a[..., 1] * b[..., 0]

    denominator = cross(ray, edge)
    safe = np.where(np.abs(denominator) < 1e-12, 1e-12, denominator)
    along, position = cross(start, edge) / safe, cross(start, ray) / safe
    hit = (along > 0) & (position >= -1e-9) & (position <= 1 + 1e-9)
    radius = np.where(hit, along, 0).max(1)
    return radius / radius.max()


def _regular(sides: int) -> np.ndarray:
    angle = np.arange(sides) * (2 * math.pi / sides)
    return np.stack([np.cos(angle), np.sin(angle)], -1)


def _star() -> np.ndarray:
    angle = np.arange(10) * (math.pi / 5)
    radius = np.where(np.arange(10) % 2 == 0, 1.0, 0.45)[:, None]
    return np.stack([np.cos(angle), np.sin(angle)], -1) * radius


def _cross() -> np.ndarray:
    quarter = np.array([[1, -0.35], [1, 0.35], [0.35, 0.35]])
    turn = np.array([[0, 1], [-1, 0]])
    return np.concatenate([quarter @ np.linalg.matrix_power(turn, k) for k in range(4)])


def _heart() -> np.ndarray:
    t = np.linspace(0, 2 * math.pi, 96, endpoint=False)
    x = 16 * np.sin(t) ** 3
    y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
    return np.stack([-x, y], -1)


def _pill() -> np.ndarray:
    t = np.linspace(-math.pi / 2, math.pi / 2, 24)
    right = np.stack([0.55 + 0.45 * np.cos(t), 0.45 * np.sin(t)], -1)
    return np.concatenate([right, -right])


SHAPES = ("circle", "square", "triangle", "hexagon", "star", "cross", "heart", "pill", "ring", "blob")
_POLYGONS = {
    "square": _regular(4), "triangle": _regular(3), "hexagon": _regular(6), "star": _star(),
    "cross": _cross(), "heart": _heart(), "pill": _pill(),
}  # fmt: skip
OUTLINES = np.stack([_outline(_POLYGONS[s]) if s in _POLYGONS else np.ones(ANGLES) for s in SHAPES]).astype(np.float32)


@dataclass(frozen=True)
class SceneStyle:
    """Distribution of the objects. Lengths are fractions of the shorter side of the image."""

    max_objects: int = 5
    min_objects: int = 1
    min_radius: float = 0.10
    max_radius: float = 0.28
    min_visible: float = 0.004
    """Objects whose visible part is a smaller fraction of the image are drawn but not annotated."""


@dataclass(frozen=True)
class SceneParameters:
    """Layouts of B scenes with K object slots, back to front: the complete input of the renderer.

    Tensors are float32 unless noted.
    """

    count: Tensor  # (B,) int64: slots in use
    shape: Tensor  # (B, K) int64 into SHAPES
    colour: Tensor  # (B, K) int64 into COLOURS
    texture: Tensor  # (B, K) int64 into TEXTURES
    centre: Tensor  # (B, K, 2) x, y in 0..1
    radius: Tensor  # (B, K) fraction of the shorter side
    rotation: Tensor  # (B, K) radians
    aspect: Tensor  # (B, K) in 0.6..1
    outline: Tensor  # (B, K, ANGLES)
    hole: Tensor  # (B, K) inner radius as a fraction of the outer one, 0 for none
    tint: Tensor  # (B, K, 3) added to the named colour
    frequency: Tensor  # (B, K) texture periods over an object's diameter
    phase: Tensor  # (B, K, 2)
    light: Tensor  # (B, 2) direction towards the light, in the image plane
    background: Tensor  # (B, 2, 3) two colours
    coarse: Tensor  # (B, 3, 5, 5) smooth noise
    fine: Tensor  # (B, 1, 17, 17)
    stripes: Tensor  # (B, 3) frequency, angle, strength

    def to(self, device: torch.device | str) -> SceneParameters:
        return SceneParameters(*(getattr(self, f.name).to(device) for f in fields(self)))


@dataclass(frozen=True)
class Scenes:
    """Rendered scenes.

    Attributes:
        images: RGB, uint8, (B, 3, H, W).
        masks: Visible pixels of each object, bool, (B, K, H, W).
        valid: Whether a slot has an annotated object, bool, (B, K). See ``SceneStyle.min_visible``.
        concepts: For each scene and slot, the names that apply, short ones first.
    """

    images: Tensor
    masks: Tensor
    valid: Tensor
    concepts: list[list[tuple[str, ...]]]


def _sample(seed: int, index: int, style: SceneStyle) -> dict[str, np.ndarray]:
    rng = np.random.default_rng((seed, index))
    k = style.max_objects
    shape = rng.integers(len(SHAPES), size=k)
    outline = OUTLINES[shape].copy()
    theta = np.arange(ANGLES) * (2 * math.pi / ANGLES)
    for slot in np.flatnonzero(shape == SHAPES.index("blob")):
        order, wave = np.arange(2, 6), rng.uniform(0, 2 * math.pi, 4)
        size = rng.uniform(0.05, 0.30, 4) / order**0.5
        radius = 1 + (size[:, None] * np.sin(order[:, None] * theta + wave[:, None])).sum(0)
        outline[slot] = radius / radius.max()
    two = rng.uniform(0, 1, (2, 3))
    if rng.random() < 0.5:  # half of the backgrounds have low saturation, like most photographs
        two = two.mean(-1, keepdims=True) + 0.25 * (two - two.mean(-1, keepdims=True))
    angle = rng.uniform(0, 2 * math.pi)
    return {
        "count": rng.integers(style.min_objects, k + 1),
        "shape": shape,
        "colour": rng.integers(len(COLOURS), size=k),
        "texture": np.where(rng.random(k) < 0.4, 0, rng.integers(len(TEXTURES), size=k)),
        "centre": rng.uniform(0.08, 0.92, (k, 2)),
        "radius": rng.uniform(style.min_radius, style.max_radius, k),
        "rotation": rng.uniform(0, 2 * math.pi, k),
        "aspect": rng.uniform(0.6, 1.0, k),
        "outline": outline,
        "hole": np.where(shape == SHAPES.index("ring"), rng.uniform(0.4, 0.6, k), 0),
        "tint": rng.normal(0, 0.04, (k, 3)),
        "frequency": rng.uniform(2.0, 4.0, k),
        "phase": rng.uniform(0, 2 * math.pi, (k, 2)),
        "light": np.array([math.cos(angle), math.sin(angle)]),
        "background": two,
        "coarse": rng.normal(0, 0.09, (3, 5, 5)),
        "fine": rng.normal(0, 0.04, (1, 17, 17)),
        "stripes": np.array(
            [rng.uniform(4, 14), rng.uniform(0, math.pi), rng.uniform(0.05, 0.15) * (rng.random() < 0.35)]
        ),
    }


def sample_parameters(indices: Sequence[int], seed: int = 0, style: SceneStyle = SceneStyle()) -> SceneParameters:
    """Return the layouts of scenes ``indices``. A layout depends on ``seed``, its number and ``style`` only."""
    rows = [_sample(seed, int(index), style) for index in indices]
    stacked = (torch.from_numpy(np.stack([row[f.name] for row in rows])) for f in fields(SceneParameters))
    return SceneParameters(*(t.float() if t.is_floating_point() else t for t in stacked))


def _background(p: SceneParameters, x: Tensor, y: Tensor) -> Tensor:
    """Return the backgrounds, (B, 3, H, W) in about 0..1.

    ``x`` and ``y`` of shape (H, W) are the coordinates of the pixel centres in units of the shorter side.
    """
    size = x.shape
    direction = p.light[:, :, None, None]
    ramp = ((direction[:, 0] * (x - 0.5) + direction[:, 1] * (y - 0.5)) * 0.7 + 0.5).clamp(0, 1)[:, None]
    first, second = p.background[:, 0, :, None, None], p.background[:, 1, :, None, None]
    image = first + (second - first) * ramp
    image = image + F.interpolate(p.coarse, size, mode="bicubic", align_corners=False)
    image = image + F.interpolate(p.fine, size, mode="bilinear", align_corners=False)
    frequency, angle, strength = (p.stripes[:, i, None, None] for i in range(3))
    wave = torch.sin(2 * math.pi * frequency * (x * angle.cos() + y * angle.sin())) * strength
    return image + wave[:, None]


def _pattern(p: SceneParameters, k: int, u: Tensor, v: Tensor, reach: Tensor) -> Tensor:
    """Return the brightness factor (B, H, W) of the texture of slot k at object coordinates u, v.

    The outline has radius 1 in these coordinates.
    """
    frequency = (math.pi * p.frequency[:, k])[:, None, None]
    a = torch.sin(u * frequency + p.phase[:, k, 0, None, None])
    b = torch.sin(v * frequency + p.phase[:, k, 1, None, None])
    choices = torch.stack([
        torch.zeros_like(a), (a > 0).float(), (a * b > 0).float(), ((a > 0.2) & (b > 0.2)).float(),
        0.5 + 0.5 * torch.sin(reach * frequency * 2),
    ])  # fmt: skip
    index = p.texture[:, k].view(1, -1, 1, 1).expand(1, -1, *a.shape[1:])
    return 1 - 0.38 * choices.gather(0, index)[0]


def draw(p: SceneParameters, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Draw scenes.

    Returns:
        Images, uint8 of shape (B, 3, H, W), and extents, bool of shape (B, K, H, W): the pixels of each object,
        including those that nearer objects cover.
    """
    device, side = p.centre.device, min(height, width)
    y = ((torch.arange(height, device=device) + 0.5) / side)[:, None].expand(height, width)
    x = ((torch.arange(width, device=device) + 0.5) / side)[None].expand(height, width)
    palette = torch.tensor(list(COLOURS.values()), device=device)
    image = _background(p, x, y)
    inside_all: list[Tensor] = []
    for k in range(p.shape.shape[1]):
        dx = x - p.centre[:, k, 0, None, None] * (width / side)
        dy = y - p.centre[:, k, 1, None, None] * (height / side)
        cos, sin = p.rotation[:, k].cos()[:, None, None], p.rotation[:, k].sin()[:, None, None]
        radius = p.radius[:, k, None, None]
        u = (dx * cos + dy * sin) / radius
        v = (dy * cos - dx * sin) / (radius * p.aspect[:, k, None, None])
        reach = torch.hypot(u, v)
        turn = (torch.atan2(v, u) / (2 * math.pi) * ANGLES) % ANGLES
        low = turn.long() % ANGLES
        table = p.outline[:, k]
        rho_low, rho_high = (table.gather(1, i.flatten(1)).view_as(reach) for i in (low, (low + 1) % ANGLES))
        rho = rho_low + (rho_high - rho_low) * (turn - low)
        used = (k < p.count)[:, None, None]
        depth = torch.minimum(rho - reach, reach - rho * p.hole[:, k, None, None])  # > 0 inside, in object radii
        depth = torch.where(p.hole[:, k, None, None] > 0, depth, rho - reach)
        inside = (depth >= 0) & used
        inside_all.append(inside)
        cover = ((depth * radius * side + 0.5).clamp(0, 1) * used)[:, None]
        lit = (u * cos - v * sin) * p.light[:, 0, None, None] + (u * sin + v * cos) * p.light[:, 1, None, None]
        shade = _pattern(p, k, u, v, reach) * (0.92 + 0.28 * lit.clamp(-1, 1))
        colour = (palette[p.colour[:, k]] + p.tint[:, k])[:, :, None, None] * shade[:, None]
        shadow = ((0.5 + (depth + 0.12) * 3).clamp(0, 1) * used * 0.3)[:, None]
        image = image * (1 - shadow * (1 - cover)) * (1 - cover) + colour * cover
    return (image.clamp(0, 1) * 255).round().to(torch.uint8), torch.stack(inside_all, 1)


def visible(extents: Tensor) -> Tensor:
    """Return the visible pixels of extents (B, K, H, W), which are ordered back to front."""
    nearer = extents.flip(1).cumsum(1).flip(1) - extents.long()
    return extents & (nearer == 0)


def render(p: SceneParameters, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Draw scenes.

    Returns:
        Images, uint8 of shape (B, 3, H, W), and masks of the visible pixels, bool of shape (B, K, H, W).
    """
    images, extents = draw(p, height, width)
    return images, visible(extents)


def names_of(shape: int, colour: int, radius: float) -> tuple[str, ...]:
    """Return the names of an object, short ones first.

    ``shape`` and ``colour`` are indices into ``SHAPES`` and ``COLOURS``. ``radius`` is a fraction of the shorter side.
    """
    form, hue = SHAPES[shape], list(COLOURS)[colour]
    size = "small" if radius < SMALL else "large" if radius > LARGE else "medium"
    return form, hue, size, f"{hue} {form}", f"{size} {form}", f"{size} {hue} {form}"


def render_scenes(
    indices: Sequence[int],
    size: int | tuple[int, int],
    seed: int = 0,
    style: SceneStyle = SceneStyle(),
    device: torch.device | str = "cpu",
) -> Scenes:
    """Render scenes.

    Args:
        indices: Numbers of the scenes.
        size: Side, or height and width, in pixels.
        seed: Number of the world.
        style: Distribution of the objects.
        device: Device on which the scenes are drawn.
    """
    height, width = (size, size) if isinstance(size, int) else size
    p = sample_parameters(indices, seed, style).to(device)
    images, masks = render(p, height, width)
    valid = masks.flatten(2).float().mean(-1) >= style.min_visible
    layout = zip(p.shape.tolist(), p.colour.tolist(), p.radius.tolist(), strict=True)
    return Scenes(images, masks, valid, [[names_of(*slot) for slot in zip(*scene, strict=True)] for scene in layout])
