"""Procedural videos with exact masks: objects move, rotate, are occluded, and leave and re-enter the image.

A video is a scene (objects, light, background) over time. The path of an object interpolates *stations*: positions at
times that are common to all objects of the video. The interpolation is monotone between stations, so that it does not
overshoot. The positions of events (occlusion, leaving, crossing) are set first; in each *act* of a video, each kind of
event happens once. The other positions are drawn at random.

Videos are numbered. Video ``index`` of world ``seed`` has the same motion at every resolution, and any frame can be
drawn alone. Videos and images of the same seed and number have different scenes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from itertools import pairwise

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, UInt8
from scipy.interpolate import PchipInterpolator
from torch import Tensor

from ..types import UserError
from .scenes import OUTLINES, SHAPES, SceneParameters, SceneStyle, draw, names_of, sample_parameters, visible

SCREENS = ("circle", "square", "hexagon")
"""Shapes of the screen, the large object in front that occludes others. They have no deep concavities."""
FIT = 0.9
"""Maximum radius of other objects as a fraction of the screen's inner radius. It ensures complete occlusion at any
rotation."""
_APART = 1 << 32  # added to the seed, so that images and videos of a world have different scenes
_PIXELS = 1 << 19  # pixels drawn at once; larger batches do not fit the CPU cache and are slower
_SLOTS = (
    "shape", "colour", "texture", "centre", "radius", "rotation", "aspect", "outline", "hole", "tint", "frequency",
    "phase",
)  # fmt: skip
_WINDOW = 5  # stations from one event to the next; an event takes the first four
_HIDE, _LEAVE, _CROSS = range(3)
_BRISK = 0.035  # mean speed per frame above which a step gets more time, at the cost of the other steps
_HOLD = 1.6  # factor of the duration of an event's middle step

Places = Float[np.ndarray, "s 2"]
"""Position x, y at each station as fractions of width and height; NaN if not set yet."""


@dataclass(frozen=True)
class VideoStyle:
    """Distribution of the objects and events. Lengths are fractions of the shorter side of the image, times in frames.

    Raises:
        UserError: A minimum is greater than its maximum, or a fraction is outside 0..1.
    """

    frames: int = 72
    """With the default, 18 frames are annotated (every 4th), enough for a memory of 16 frames and a query frame."""
    min_objects: int = 3
    max_objects: int = 5
    min_radius: float = 0.10
    max_radius: float = 0.17
    """Radius of all objects except the screen. In a video with a screen, objects are shrunk to fit behind it."""
    min_screen: float = 0.22
    max_screen: float = 0.28
    """Radius of the screen, the nearest object of a video with occlusion."""
    lookalikes: float = 0.65
    """Probability that two or three objects of a video differ in position and rotation only."""
    hides: float = 0.65
    """Probability that an object passes behind a screen. Look-alikes are preferred for this and the other events."""
    leaves: float = 0.65
    """Probability that an object leaves the image and re-enters it."""
    crosses: float = 0.5
    """Probability that two objects pass each other so closely that they overlap."""
    min_speed: float = 0.003
    max_speed: float = 0.015
    """Speed of free motion per frame. The speed in an event follows from its distance."""
    turn: float = 0.06
    """Maximum mean rotation in radians per frame, in either direction. A periodic rotation is added."""
    swell: float = 0.06
    """Maximum relative change of an object's radius, in either direction."""
    act: int = 72
    """Frames in which each kind of event happens once. Longer videos have several acts."""

    def __post_init__(self) -> None:
        shares = ("lookalikes", "hides", "leaves", "crosses", "swell")
        if wrong := [name for name in shares if not 0 <= getattr(self, name) <= 1]:
            raise UserError(f"video style: {wrong[0]} = {getattr(self, wrong[0])} is not in 0..1")
        for name in ("objects", "radius", "screen", "speed"):
            low, high = getattr(self, f"min_{name}"), getattr(self, f"max_{name}")
            if not 0 < low <= high:
                raise UserError(f"video style: 0 < min_{name} = {low} <= max_{name} = {high} does not hold")
        if self.frames < 2 or self.act < 2:
            raise UserError(f"video style: frames = {self.frames} and act = {self.act} must be at least 2")


@dataclass(frozen=True)
class Video:
    """A rendered video, or some of its frames. Objects are ordered by depth, back to front.

    Attributes:
        images: RGB, uint8, (t, 3, h, w).
        masks: Visible pixels of each object, (t, n, h, w). Masks of a frame do not overlap.
        extents: Pixels of each object inside the image, including occluded ones, (t, n). 0 if it is outside.
        visible_share: Visible pixels divided by ``extents``, in 0..1, (t, n). 0 if ``extents`` is 0. An object is
            mostly occluded if ``extents > 0`` and ``visible_share < 0.5``.
        concepts: Names of each object, as in ``Scenes``.
        lookalikes: Indices of the objects that differ in position and rotation only: none, or at least two.
    """

    images: UInt8[Tensor, "t 3 h w"]
    masks: Bool[Tensor, "t n h w"]
    extents: Int[Tensor, "t n"]
    visible_share: Float[Tensor, "t n"]
    concepts: list[tuple[str, ...]]
    lookalikes: tuple[int, ...]


@dataclass(frozen=True)
class _Plan:
    """Appearance of a video (one scene), its stations, and the rotation and scaling of its objects."""

    looks: SceneParameters
    lookalikes: tuple[int, ...]
    times: Float[np.ndarray, " s"]
    places: Float[np.ndarray, "n s 2"]
    turning: Float[np.ndarray, "n 5"]  # rotation at time 0, rate, swing, period and phase of the swing
    swelling: Float[np.ndarray, "n 3"]  # relative change, period, phase


def _looks(
    index: int, seed: int, style: VideoStyle, rng: np.random.Generator
) -> tuple[SceneParameters, bool, tuple[int, ...]]:
    """Return the scene, whether its last object is a screen, and the indices of look-alikes."""
    scene = SceneStyle(style.max_objects, style.min_objects, style.min_radius, style.max_radius)
    p = sample_parameters([index], seed + _APART, scene)
    count = int(p.count[0])
    own = {name: getattr(p, name)[:, :count].clone() for name in _SLOTS}
    screen = bool(rng.random() < style.hides) and count > 1
    others, alike = count - screen, range(0)
    if rng.random() < style.lookalikes and others > 1:
        size = min(int(rng.integers(2, 4)), others)
        first = int(rng.integers(others - size + 1))
        alike = range(first, first + size)  # adjacent in depth, or an object between them would tell them apart
        for values in own.values():
            values[:, first + 1 : first + size] = values[:, first : first + 1]
    if screen:
        shape, radius = SHAPES.index(str(rng.choice(SCREENS))), rng.uniform(style.min_screen, style.max_screen)
        look = {"shape": shape, "radius": radius, "aspect": rng.uniform(0.85, 1), "hole": 0}
        for name, value in look.items():
            own[name][0, -1] = value
        own["outline"][0, -1] = torch.from_numpy(OUTLINES[shape])
        inner = radius * look["aspect"] * float(OUTLINES[shape].min())
        own["radius"][0, :-1].clamp_(max=FIT * inner / (1 + style.swell))
    return replace(p, **own), screen, tuple(alike)


def _direction(angle: float) -> Float[np.ndarray, " 2"]:
    return np.array([math.cos(angle), math.sin(angle)])


def _walk(
    start: Float[np.ndarray, " 2"], durations: Sequence[float], rng: np.random.Generator, style: VideoStyle,
    inside: tuple[float, float],
) -> list[Float[np.ndarray, " 2"]]:  # fmt: skip
    """Return positions after each of ``durations`` on a random walk that turns back at the limits ``inside``."""
    here, heading, way = start, rng.uniform(0, 2 * math.pi), []
    for frames in durations:
        heading += rng.normal(0, 0.6)
        step = rng.uniform(style.min_speed, style.max_speed) * frames
        there = here + step * _direction(heading)
        if there.min() < inside[0] or there.max() > inside[1]:
            heading = math.atan2(0.5 - here[1], 0.5 - here[0])
            there = here + step * _direction(heading)
        here = there.clip(*inside)
        way.append(here)
    return way


def _fill(
    places: Places, times: Float[np.ndarray, " s"], rng: np.random.Generator, style: VideoStyle,
    inside: tuple[float, float] = (0.1, 0.9),
) -> None:  # fmt: skip
    """Set the positions that no event has set, in place."""
    if np.isnan(places).all():
        places[0] = rng.uniform(*inside, 2)
    known = np.flatnonzero(~np.isnan(places[:, 0]))
    steps = np.diff(times)
    for before, after in pairwise(known.tolist()):
        for s in range(before + 1, after):
            share = (times[s] - times[before]) / (times[after] - times[before])
            aside = rng.uniform(0, style.max_speed) * steps[s] * _direction(rng.uniform(0, 2 * math.pi))
            places[s] = (places[before] + share * (places[after] - places[before]) + aside).clip(*inside)
    first, last = known[0], known[-1]
    places[:first] = np.reshape(_walk(places[first], steps[:first][::-1], rng, style, inside), (-1, 2))[::-1]
    places[last + 1 :] = np.reshape(_walk(places[last], steps[last:], rng, style, inside), (-1, 2))


def _far(place: Float[np.ndarray, " 2"], places: Places) -> float:
    """Return the distance from the last position that is set, or 0 without one.

    Events start close to that position, as the object would have to move too fast otherwise.
    """
    known = np.flatnonzero(~np.isnan(places[:, 0]))
    return float(np.hypot(*(place - places[known[-1]]))) if len(known) else 0.0


def _beside(
    centre: Float[np.ndarray, " 2"], distance: float, rng: np.random.Generator
) -> list[Float[np.ndarray, " 2"]]:
    """Return positions at ``distance`` from a centre, inside the image if possible."""
    angles = rng.uniform(0, 2 * math.pi, 32)
    places = [centre + distance * _direction(angle) for angle in angles]
    within = [place for place in places if place.min() > 0.05 and place.max() < 0.95]
    return within or [place.clip(0.05, 0.95) for place in places]


def _hide(places: Places, s: int, screen: Places, distance: float, rng: np.random.Generator) -> None:
    """Set an occlusion: behind the screen at stations s + 1 and s + 2, beside it before and after."""
    places[s] = min(_beside(screen[s], distance, rng), key=lambda place: _far(place, places))
    places[s + 1 : s + 3] = screen[s + 1 : s + 3]
    places[s + 3] = _beside(screen[s + 3], distance, rng)[0]


def _leave(places: Places, s: int, radius: float, rng: np.random.Generator) -> None:
    """Set an exit: outside the image at stations s + 1 and s + 2. The object re-enters elsewhere on the same border."""
    depths = np.array([rng.uniform(0.05, 0.15), -radius - 0.02, -radius - 0.02, rng.uniform(0.08, 0.2)])
    along = rng.uniform(0.15, 0.85, 2)
    borders = []
    for side in rng.permutation(4):
        border = np.empty((4, 2))
        border[:, side % 2] = 1 - depths if side // 2 else depths
        border[:, 1 - side % 2] = along[[0, 0, 1, 1]]
        borders.append(border)
    places[s : s + 4] = min(borders, key=lambda border: _far(border[0], places))


def _cross(first: Places, second: Places, s: int, radius: float, rng: np.random.Generator) -> None:
    """Set a crossing: two objects pass each other between stations s + 1 and s + 2 on parallel, close lines."""
    ways = []
    for _ in range(8):
        meeting, angle = rng.uniform(0.35, 0.65, 2), rng.uniform(0, 2 * math.pi)
        along = _direction(angle) * np.array([-0.28, -0.12, 0.12, 0.28])[:, None]
        aside = _direction(angle + math.pi / 2) * (0.35 * radius)
        ways.append((meeting + along + aside, meeting - along - aside))
    one, other = min(ways, key=lambda pair: max(_far(pair[0][0], first), _far(pair[1][0], second)))
    first[s : s + 4], second[s : s + 4] = one, other


def _slowed(times: Float[np.ndarray, " s"], places: Float[np.ndarray, "n s 2"]) -> Float[np.ndarray, " s"]:
    """Return the times of the stations, with more time for steps in which an object moves far between its events."""
    steps = np.diff(times)
    for own in places:
        for before, after in pairwise(np.flatnonzero(~np.isnan(own[:, 0])).tolist()):
            needed = float(np.hypot(*(own[after] - own[before]))) / (after - before) / _BRISK
            steps[before:after] = steps[before:after].clip(min=needed)
    return np.concatenate([[0], steps.cumsum()]) / steps.sum() * times[-1]


def _stage(
    looks: SceneParameters, screen: bool, lookalikes: tuple[int, ...], style: VideoStyle, rng: np.random.Generator
) -> tuple[Float[np.ndarray, " s"], Float[np.ndarray, "n s 2"]]:
    """Return the times of the stations and the position of each object at them."""
    happens = [screen, rng.random() < style.leaves, rng.random() < style.crosses]
    kinds = [kind for kind in (_HIDE, _LEAVE, _CROSS) if happens[kind]]
    acts, count = max(1, round(style.frames / style.act)), looks.shape.shape[1]
    total = max(1, len(kinds)) * acts * _WINDOW
    lengths = rng.uniform(0.75, 1.25, total - 1)
    lengths[1::_WINDOW] *= _HOLD
    times = np.concatenate([[0], lengths.cumsum()]) / lengths.sum() * (style.frames - 1)
    places = np.full((count, total, 2), np.nan)
    radii = (looks.radius[0].double().numpy() * (1 + style.swell)).tolist()
    if screen:
        _fill(places[-1], times, rng, style, (0.35, 0.65))
    others = list(range(count - screen))
    for act in range(acts):
        chosen = rng.permutation(lookalikes or others).tolist()
        cast = chosen + rng.permutation([o for o in others if o not in chosen]).tolist()
        one, two = cast[0], cast[min(1, len(cast) - 1)]
        for turn, kind in enumerate(rng.permutation(kinds)):
            s = (len(kinds) * act + turn) * _WINDOW
            if kind == _HIDE:
                _hide(places[one], s, places[-1], radii[-1] + 0.6 * radii[one], rng)
            elif kind == _LEAVE:
                _leave(places[two], s, radii[two], rng)
            elif one != two:
                _cross(places[one], places[two], s, min(radii[one], radii[two]), rng)
    times = _slowed(times, places)
    for o in others:
        _fill(places[o], times, rng, style)
    return times, places


def _plan(index: int, seed: int, style: VideoStyle) -> _Plan:
    rng = np.random.default_rng((seed + _APART, index, 1))
    looks, screen, lookalikes = _looks(index, seed, style, rng)
    times, places = _stage(looks, screen, lookalikes, style, rng)
    count = len(places)
    turning = np.stack([
        rng.uniform(0, 2 * math.pi, count), rng.uniform(-style.turn, style.turn, count), rng.uniform(0, 0.6, count),
        rng.uniform(24, 72, count), rng.uniform(0, 2 * math.pi, count),
    ], -1)  # fmt: skip
    swelling = np.stack([
        rng.uniform(0, style.swell, count), rng.uniform(24, 72, count), rng.uniform(0, 2 * math.pi, count)
    ], -1)  # fmt: skip
    swelling[list(lookalikes)] = swelling[list(lookalikes)[:1]]  # a different size would tell them apart
    return _Plan(looks, lookalikes, times, places, turning, swelling)


def _at(plan: _Plan, frames: Sequence[int]) -> SceneParameters:
    """Return the layouts of some frames as a batch of scenes."""
    when = np.array(frames, np.float64)
    centre = PchipInterpolator(plan.times, plan.places, axis=1)(when).transpose(1, 0, 2)
    now = when[:, None]
    start, rate, swing, period, phase = plan.turning.T
    rotation = start + rate * now + swing * np.sin(2 * math.pi * now / period + phase)
    share, beat, offset = plan.swelling.T
    factor = 1 + share * np.sin(2 * math.pi * now / beat + offset)
    still = {f.name: getattr(plan.looks, f.name) for f in fields(SceneParameters)}
    batch = {name: t.expand(len(frames), *t.shape[1:]) for name, t in still.items()}
    batch["centre"], batch["rotation"] = torch.from_numpy(centre).float(), torch.from_numpy(rotation).float()
    batch["radius"] = (plan.looks.radius.double() * torch.from_numpy(factor)).float()
    return SceneParameters(**batch)


def _chosen(frames: Sequence[int] | None, style: VideoStyle) -> list[int]:
    chosen = list(range(style.frames)) if frames is None else [int(frame) for frame in frames]
    if not chosen or min(chosen) < 0 or max(chosen) >= style.frames:
        raise ValueError(f"frames {chosen} are not some of the {style.frames} of the video")
    return chosen


def video_parameters(
    index: int, seed: int = 0, style: VideoStyle = VideoStyle(), frames: Sequence[int] | None = None
) -> SceneParameters:
    """Return the layouts of video ``index`` for ``scenes.draw``: one row per frame, one slot per object.

    A row depends on ``seed``, ``index``, its frame and ``style`` only.

    Args:
        index: Number of the video.
        seed: Number of the world.
        style: Distribution of objects and events.
        frames: Numbers of the frames, in any order. None for all.

    Raises:
        ValueError: The video does not have such a frame.
    """
    return _at(_plan(index, seed, style), _chosen(frames, style))


def render_video(
    index: int,
    size: int | tuple[int, int],
    seed: int = 0,
    style: VideoStyle = VideoStyle(),
    frames: Sequence[int] | None = None,
    device: torch.device | str = "cpu",
) -> Video:
    """Render a video or some of its frames. A frame does not depend on which others are drawn with it.

    Args:
        index: Number of the video.
        size: Side, or height and width, in pixels.
        seed: Number of the world.
        style: Distribution of objects and events.
        frames: Numbers of the frames, in any order. None for all.
        device: Device on which the frames are drawn.

    Raises:
        ValueError: The video does not have such a frame.
    """
    height, width = (size, size) if isinstance(size, int) else size
    chosen, plan = _chosen(frames, style), _plan(index, seed, style)
    images, extents, masks = [], [], []
    step = max(1, _PIXELS // (height * width))
    for first in range(0, len(chosen), step):
        picture, extent = draw(_at(plan, chosen[first : first + step]).to(device), height, width)
        images.append(picture)
        masks.append(visible(extent))
        extents.append(extent.flatten(2).sum(-1))
    whole, mask = torch.cat(extents), torch.cat(masks)
    share = mask.flatten(2).sum(-1) / whole.clamp(min=1)
    layout = zip(*(getattr(plan.looks, name)[0].tolist() for name in ("shape", "colour", "radius")), strict=True)
    return Video(torch.cat(images), mask, whole, share, [names_of(*slot) for slot in layout], plan.lookalikes)
