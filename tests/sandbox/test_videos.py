"""The rendered world over time: numbered videos, exact masks and extents, events as often as they are asked for."""

from __future__ import annotations

from dataclasses import fields

import numpy as np
import pytest
import torch

from samdistill.sandbox.scenes import COLOURS, LARGE, SHAPES, SMALL, SceneParameters, render, render_scenes
from samdistill.sandbox.videos import Video, VideoStyle, render_video, video_parameters
from samdistill.types import UserError

STYLE = VideoStyle()
WHOLE = {"count", "light", "background", "coarse", "fine", "stripes"}
"""Of a scene, not of its objects."""
MOTION = {"centre", "rotation"}


def alone(p: SceneParameters, slot: int) -> SceneParameters:
    """The same frames with one object only."""
    parts = {f.name: getattr(p, f.name) for f in fields(SceneParameters)}
    parts = {name: t if name in WHOLE else t[:, slot : slot + 1] for name, t in parts.items()}
    return SceneParameters(**{**parts, "count": torch.ones_like(p.count)})


def absences(gone: np.ndarray, shows: np.ndarray) -> int:
    """How often an object is gone, having shown before and showing again afterwards."""
    starts = [t for t in range(1, len(gone)) if gone[t] and not gone[t - 1]]
    return sum(bool(shows[:t].any() and shows[t:].any()) for t in starts)


def events(video: Video) -> tuple[int, int]:
    """Over all objects: how often one is out of the image, and how often covered whole, and is back later."""
    shows = video.masks.flatten(2).any(-1).numpy()
    extents, count = video.extents.numpy(), shows.shape[1]
    out = sum(absences(extents[:, k] == 0, shows[:, k]) for k in range(count))
    return out, sum(absences((extents[:, k] > 0) & ~shows[:, k], shows[:, k]) for k in range(count))


def test_a_frame_depends_on_its_number_the_video_and_the_seed_alone() -> None:
    whole = render_video(3, (40, 56), seed=7)
    assert whole.images.shape == (72, 3, 40, 56) and whole.images.dtype == torch.uint8
    for chosen in ([0], [71], [30, 2, 30], list(range(5, 60, 9))):
        part = render_video(3, (40, 56), seed=7, frames=chosen)
        assert torch.equal(part.images, whole.images[chosen]) and torch.equal(part.masks, whole.masks[chosen])
        assert torch.equal(part.extents, whole.extents[chosen])
        assert torch.equal(part.visible_share, whole.visible_share[chosen])
        assert part.concepts == whole.concepts and part.lookalikes == whole.lookalikes
    others = [render_video(4, (40, 56), seed=7), render_video(3, (40, 56), seed=8)]
    scene = render_scenes([3], (40, 56), seed=7)
    assert not any(torch.equal(whole.images[0], image) for image in (*(o.images[0] for o in others), scene.images[0]))


def test_frames_rendered_in_several_batches_are_the_same() -> None:
    """Frames this large do not fit into one batch."""
    frames = [0, 40]
    whole = render_video(2, 520, seed=1, frames=frames)
    for row, frame in enumerate(frames):
        assert torch.equal(render_video(2, 520, seed=1, frames=[frame]).images[0], whole.images[row])


def test_motion_is_the_same_at_every_resolution() -> None:
    small, large = (render_video(5, size, seed=2, frames=range(0, 72, 6)) for size in (48, 192))
    share = [v.masks.flatten(2).float().mean(-1) for v in (small, large)]
    assert (share[0] - share[1]).abs().max() < 0.01
    reduced = torch.nn.functional.avg_pool2d(large.images.float(), 4)
    assert (reduced - small.images.float()).abs().mean() < 6


@pytest.mark.parametrize("size", [(63, 63), (40, 70)])
def test_masks_extents_and_shares_are_those_of_objects_drawn_alone(size: tuple[int, int]) -> None:
    covered = 0
    for index in range(6):
        frames = range(index, 72, 7)
        p, video = video_parameters(index, seed=4, frames=frames), render_video(index, size, seed=4, frames=frames)
        count = video.masks.shape[1]
        extents = [render(alone(p, k), *size)[1][:, 0] for k in range(count)]
        nearer = torch.zeros_like(extents[0])
        for k in reversed(range(count)):
            mask = extents[k] & ~nearer
            pixels, whole = mask.flatten(1).sum(1), extents[k].flatten(1).sum(1)
            assert torch.equal(video.masks[:, k], mask) and torch.equal(video.extents[:, k], whole)
            share = [int(a) / int(b) if int(b) else 0.0 for a, b in zip(pixels, whole, strict=True)]
            assert video.visible_share[:, k].tolist() == pytest.approx(share)
            covered += int(((pixels < whole / 2) & (whole > 0)).sum())
            nearer |= extents[k]
        assert int(video.masks.sum(1).max()) == 1
    assert covered > 10


def test_look_alikes_share_all_but_place_and_rotation() -> None:
    groups = []
    for index in range(40):
        video, p = render_video(index, 8, seed=1, frames=[0]), video_parameters(index, seed=1)
        groups.append(len(video.lookalikes))
        for name in {f.name for f in fields(SceneParameters)} - WHOLE - MOTION:
            own = [getattr(p, name)[:, k] for k in video.lookalikes]
            assert all(torch.equal(own[0], other) for other in own[1:]), name
        for name in MOTION:
            own = [getattr(p, name)[:, k] for k in video.lookalikes]
            assert not any(torch.equal(own[0], other) for other in own[1:]), name
        rest = [k for k in range(p.radius.shape[1]) if k not in video.lookalikes]
        looks = [tuple(p.tint[0, k].tolist()) for k in (*rest, *video.lookalikes[:1])]
        assert len(set(looks)) == len(looks)
    assert set(groups) == {0, 2, 3} and 0.45 < np.mean([size > 0 for size in groups]) < 0.85


def test_one_frame_does_not_tell_look_alikes_apart() -> None:
    """Exchanged, they give the same picture wherever no outline or shadow reaches another object's."""
    style = VideoStyle(min_objects=2, max_objects=3, min_radius=0.08, max_radius=0.11, lookalikes=1, hides=0)
    compared = 0
    for index in range(8):
        frames = range(0, 72, 4)
        pair = list(render_video(index, 8, seed=1, style=style, frames=[0]).lookalikes[:2])
        p = video_parameters(index, 1, style, frames)
        order = list(range(p.radius.shape[1]))
        order[pair[0]], order[pair[1]] = pair[1], pair[0]
        moved = {name: getattr(p, name)[:, order] for name in MOTION}
        swapped = SceneParameters(**{f.name: moved.get(f.name, getattr(p, f.name)) for f in fields(SceneParameters)})
        reach = 1.35 * (p.radius[:, :, None] + p.radius[:, None])  # a shadow ends at 0.29 radii
        distance = torch.cdist(p.centre, p.centre) + 9 * torch.eye(len(order))
        clear = (distance > reach).flatten(1).all(1)
        assert torch.equal(render(p, 48, 48)[0][clear], render(swapped, 48, 48)[0][clear])
        assert not torch.equal(p.centre[clear], swapped.centre[clear]) or not clear.any()
        compared += int(clear.sum())
    assert compared > 20


def test_objects_move_smoothly_turn_and_keep_their_size_nearly() -> None:
    steps, bends, turned = [], [], []
    for index in range(16):
        p = video_parameters(index, seed=3)
        step = p.centre.diff(dim=0)
        steps.append(step.norm(dim=-1).flatten())
        bends.append(step.diff(dim=0).norm(dim=-1).flatten())
        turned.append((p.rotation[-1] - p.rotation[0]).abs())
        assert (p.rotation.diff(dim=0).abs() < 0.25).all()
        middle = (p.radius.amax(0) + p.radius.amin(0)) / 2
        assert ((p.radius - middle).abs() <= STYLE.swell * 1.1 * middle).all()
        assert (p.radius[:, :-1] <= STYLE.max_radius * (1 + STYLE.swell) + 1e-6).all()
    speed = torch.cat(steps)
    assert speed.max() < 0.12 and torch.cat(bends).max() < 0.06
    assert float(speed.quantile(0.9) / speed.quantile(0.1)) > 4 and float(torch.cat(turned).median()) > 0.5


def test_events_happen_as_often_as_the_style_asks() -> None:
    """Counted in what is rendered. Accidents add a little to what is planned."""
    found = np.array([events(render_video(i, 32, seed=10, frames=range(0, 72, 2))) for i in range(48)]) > 0
    out, covered = found.mean(0)
    assert 0.45 < out < 0.85 and 0.45 < covered < 0.9


@pytest.mark.parametrize(("share", "size"), [(0.0, (32, 32)), (1.0, (32, 32)), (1.0, (28, 50))])
def test_events_happen_never_or_always(share: float, size: tuple[int, int]) -> None:
    style = VideoStyle(lookalikes=share, hides=share, leaves=share, crosses=share)
    videos = [render_video(i, size, seed=10, style=style, frames=range(0, 72, 2)) for i in range(12)]
    assert {len(video.lookalikes) > 0 for video in videos} == {bool(share)}
    out, covered = (np.array([events(video) for video in videos]) > 0).mean(0)
    if share:
        assert out == 1 and covered >= 0.9
    else:
        assert out == 0 and covered < 0.35


def test_crossing_look_alikes_overlap() -> None:
    style = VideoStyle(lookalikes=1, hides=0, leaves=0, crosses=1)
    for index in range(8):
        pair = list(render_video(index, 8, seed=2, style=style, frames=[0]).lookalikes)
        p = video_parameters(index, 2, style)
        distance = torch.cdist(p.centre[:, pair], p.centre[:, pair]) + torch.eye(len(pair)) * 9
        assert distance.min() < p.radius[:, pair].max()


def test_longer_videos_have_more_events_not_slower_ones() -> None:
    style = VideoStyle(frames=216, leaves=1)
    for index in range(4):
        assert events(render_video(index, 24, seed=1, style=style, frames=range(0, 216, 2)))[0] >= 3


def test_style_bounds_hold_and_short_videos_work() -> None:
    style = VideoStyle(frames=9, min_objects=1, max_objects=2, min_radius=0.12, max_radius=0.13, hides=0)
    counts = set()
    for index in range(30):
        p = video_parameters(index, 0, style)
        counts.add(p.radius.shape[1])
        assert p.radius.shape[0] == 9 and (p.count == p.radius.shape[1]).all()
        assert float(p.radius.min()) >= 0.12 * 0.94 - 1e-6 and float(p.radius.max()) <= 0.13 * 1.06 + 1e-6
    assert counts == {1, 2}
    alone_with_everything = VideoStyle(frames=2, min_objects=1, max_objects=1, hides=1, lookalikes=1, crosses=1)
    assert render_video(0, 16, style=alone_with_everything).masks.shape == (2, 1, 16, 16)


def test_concepts_are_the_objects_own_words() -> None:
    for index in range(10):
        p, video = video_parameters(index, seed=4), render_video(index, 16, seed=4, frames=[0])
        for k, names in enumerate(video.concepts):
            shape, colour = SHAPES[int(p.shape[0, k])], list(COLOURS)[int(p.colour[0, k])]
            assert {shape, colour, f"{colour} {shape}"} <= set(names)
            size = names[2]  # of the radius that the object swells around
            low, high = (float(v) for v in (p.radius[:, k].min(), p.radius[:, k].max()))
            within = {"small": low < SMALL, "large": high > LARGE, "medium": high >= SMALL and low <= LARGE}
            assert within[size]


@pytest.mark.parametrize("frames", [[], [-1], [72], [0, 100]])
def test_frames_that_are_not_there_are_refused(frames: list[int]) -> None:
    with pytest.raises(ValueError, match="not some of the 72"):
        render_video(0, 16, frames=frames)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hides": 1.2}, r"hides = 1\.2 is not in 0\.\.1"),
        ({"min_radius": 0.2}, r"min_radius = 0\.2 <= max_radius = 0\.17 does not hold"),
        ({"min_objects": 0}, "min_objects = 0"),
        ({"min_speed": 1.0}, "min_speed"),
        ({"frames": 1}, "frames = 1"),
    ],
)
def test_impossible_styles_are_refused(change: dict[str, float], message: str) -> None:
    with pytest.raises(UserError, match=message):
        VideoStyle(**change)  # type: ignore[arg-type]
