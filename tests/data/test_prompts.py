"""Prompts from masks."""

from __future__ import annotations

import random
from collections import Counter

import numpy as np
import pytest
import torch

from samdistill.config import PromptsConfig
from samdistill.data import box_prompts, check_prompts, pad_masks, point_prompts, prompts_fingerprint
from samdistill.data.prompts import Ask, draw_ask, draw_grid, draw_prompts, grid_points, jittered
from samdistill.ops.masks import masks_to_boxes
from samdistill.types import Prompts, UserError


def masks() -> tuple[torch.Tensor, torch.Tensor]:
    first = torch.zeros(2, 12, 16, dtype=torch.bool)
    first[0, 2:9, 3:12] = True
    first[1, 5, 7] = True
    second = torch.zeros(1, 12, 16, dtype=torch.bool)
    return pad_masks([first, second])


def test_slots_are_padded_and_empty_masks_are_not_valid() -> None:
    padded, valid = masks()
    assert padded.shape == (2, 2, 12, 16) and valid.tolist() == [[True, True], [False, False]]
    assert padded[0, 0].sum() == 63 and not padded[1].any()


def test_images_without_objects() -> None:
    padded, valid = pad_masks([torch.zeros(0, 5, 6, dtype=torch.bool)] * 3)
    assert padded.shape == (3, 0, 5, 6) and valid.shape == (3, 0)
    assert box_prompts(padded, valid).boxes.shape == (3, 0, 4)  # type: ignore[union-attr]
    assert point_prompts(padded, valid).points.shape == (3, 0, 1, 2)  # type: ignore[union-attr]


def test_boxes_are_tight_and_points_central() -> None:
    padded, valid = masks()
    boxes, points = box_prompts(padded, valid), point_prompts(padded, valid)
    assert boxes.boxes is not None and points.points is not None and points.labels is not None
    assert boxes.boxes[0].tolist() == [[3, 2, 12, 9], [7, 5, 8, 6]] and boxes.points is None
    # a 9 x 7 rectangle: every pixel of its middle row that is 4 from both ends is equally deep
    x, y = points.points[0, 0, 0].tolist()
    assert y == 5 and 6 <= x <= 8
    assert points.points[0, 1, 0].tolist() == [7, 5]
    assert points.labels.shape == (2, 2, 1) and bool((points.labels == 1).all())
    assert torch.equal(points.valid, valid)


SIZE = (48, 64)
"""Of the image on a canvas of 64 pixels: the last 16 rows are padding."""


def config(**fields: object) -> PromptsConfig:
    return PromptsConfig.model_validate(fields)


def blobs(count: int, seed: int = 0) -> torch.Tensor:
    """Discs on the canvas, cut at the image's edge; each has a hole, so that a box is more than its object."""
    rng, (y, x) = np.random.default_rng(seed), np.mgrid[:64, :64]
    masks = []
    for _ in range(count):
        distance = np.hypot(y - rng.uniform(0, 48), x - rng.uniform(0, 64))
        masks.append((distance < rng.uniform(5, 14)) & (distance > 2) & (y < 48))
    return torch.from_numpy(np.stack(masks))


def test_every_mode_asks_in_its_ways() -> None:
    counts = {"points": (1, 3), "negative_points": (0, 2)}
    asked = {mode: Counter(draw_ask(config(mode=mode, **counts), seed) for seed in range(4000))
             for mode in ("point", "box", "mixed", "everything")}  # fmt: skip
    assert set(asked["box"]) == {Ask(True, 0, 0)} and set(asked["everything"]) == {Ask(False, 1, 0)}
    nine = {Ask(False, positives, negatives) for positives in (1, 2, 3) for negatives in (0, 1, 2)}
    assert set(asked["point"]) == nine and min(asked["point"].values()) > 360  # 444 of each
    assert set(asked["mixed"]) == nine | {a._replace(box=True) for a in nine} | {Ask(True, 0, 0)}
    thirds = Counter((ask.box, ask.positives > 0) for ask in asked["mixed"].elements())
    assert min(thirds.values()) > 1200 and len(thirds) == 3
    assert [ask for ask in asked["mixed"] if ask.ambiguous] == [Ask(False, 1, 0)]


def test_points_lie_inside_or_in_the_band_around() -> None:
    beside = far = 0
    for seed in range(40):
        masks = blobs(5, seed)
        prompts = draw_prompts(masks, SIZE, Ask(False, 3, 2), config(), seed)
        assert prompts.points is not None and prompts.labels is not None and prompts.boxes is None
        assert prompts.points.shape == (1, 5, 5, 2) and prompts.points.dtype == torch.float32
        assert prompts.labels.tolist() == [[[1, 1, 1, 0, 0]] * 5] and prompts.valid.tolist() == [[True] * 5]
        check_prompts(prompts, torch.tensor([SIZE]))
        for mask, points, box in zip(masks, prompts.points[0].long().tolist(), masks_to_boxes(masks), strict=True):
            assert [bool(mask[y, x]) for x, y in points] == [True] * 3 + [False] * 2
            assert len({tuple(point) for point in points}) == 5
            left, top, right, bottom = box.tolist()
            for x, y in points[3:]:
                assert left - max(1, (right - left) / 4) <= x < right + max(1, (right - left) / 4)
                assert top - max(1, (bottom - top) / 4) <= y < bottom + max(1, (bottom - top) / 4)
                far += not (left <= x < right and top <= y < bottom)
                beside += 1
    assert 0.2 * beside < far < 0.9 * beside  # in the band, and between the box and the object


def test_points_are_drawn_evenly() -> None:
    mask = blobs(1, 3)
    points = torch.cat([draw_prompts(mask, SIZE, Ask(False, 1, 0), config(), s).points for s in range(6000)])  # type: ignore[misc]
    x, y = points[:, 0, 0].long().unbind(-1)
    counts = torch.zeros(64, 64).index_put_((y, x), torch.ones(6000), accumulate=True)
    area = int(mask.sum())
    assert counts[mask[0]].sum() == 6000
    assert ((counts[mask[0]] - 6000 / area) ** 2 / (6000 / area)).sum() < 1.3 * area  # chi-squared, about 1 per pixel


def test_objects_that_leave_no_room_for_negative_points() -> None:
    full = torch.zeros(2, 64, 64, dtype=torch.bool)
    full[:, :48] = True
    full[1, 0, 0] = False
    prompts = draw_prompts(full, SIZE, Ask(True, 1, 3), config(), 0)
    assert prompts.points is not None and prompts.labels is not None
    assert prompts.labels[0].tolist() == [[1, 1, 1, 1], [1, 0, 0, 0]]  # as many points, and none wrong
    assert prompts.points[0, 1, 1:].tolist() == [[0, 0]] * 3
    solid = torch.zeros(1, 64, 64, dtype=torch.bool)
    solid[0, :, :60] = True  # nothing but padding is outside, on the right, of an image 60 wide
    prompts = draw_prompts(solid, (64, 60), Ask(False, 1, 1), config(), 0)
    assert prompts.labels is not None and prompts.labels.tolist() == [[[1, 1]]]
    check_prompts(prompts, torch.tensor([[64, 60]]))


def test_more_points_than_pixels() -> None:
    tiny = torch.zeros(1, 64, 64, dtype=torch.bool)
    tiny[0, 4, 5:7] = True
    for seed in range(10):
        points = draw_prompts(tiny, SIZE, Ask(False, 5, 0), config(), seed).points
        assert points is not None
        pixels = Counter(tuple(point) for point in points[0, 0].tolist())
        assert set(pixels) == {(5, 4), (6, 4)} and max(pixels.values()) == 3


def test_boxes_are_off_by_two_deviations_at_most() -> None:
    off = []
    for seed in range(400):
        masks = blobs(2, seed % 20)
        exact = draw_prompts(masks, SIZE, Ask(True, 0, 0), config(box_jitter=0), seed)
        assert exact.boxes is not None and torch.equal(exact.boxes[0], masks_to_boxes(masks)) and exact.points is None
        drawn = draw_prompts(masks, SIZE, Ask(True, 0, 0), config(box_jitter=0.1), seed)
        check_prompts(drawn, torch.tensor([SIZE]))
        assert drawn.boxes is not None
        sides = (exact.boxes[..., 2:] - exact.boxes[..., :2]).repeat(1, 1, 2)
        free = (exact.boxes > 3) & (exact.boxes < torch.tensor([61, 45, 61, 45]))  # not near an edge that clamps
        assert ((drawn.boxes - exact.boxes).abs() <= 0.2 * sides + 1e-4).all()
        off.append(((drawn.boxes - exact.boxes) / sides)[free])
    shares = torch.cat(off)
    assert shares.std() == pytest.approx(0.1 * 0.959, rel=0.05) and abs(shares.mean()) < 0.005  # a normal cut at 2
    assert 0.03 < (shares.abs() > 0.1999).float().mean() < 0.06


def test_no_jitter_empties_a_box() -> None:
    for seed in range(500):
        for tight in ((10, 10, 11, 14), (0, 0, 2, 2), (63, 0, 64, 48)):
            left, top, right, bottom = jittered(tight, SIZE, 0.49, random.Random(seed))
            assert 0 <= left <= right - 1 <= 63 and 0 <= top <= bottom - 1 <= 47


def test_draws_follow_from_the_seed_and_differ() -> None:
    same = blobs(1, 3).expand(3, -1, -1)

    def values(seed: int, draw: int = 0) -> list[list[float]]:
        prompts = draw_prompts(same, SIZE, Ask(True, 2, 1), config(), seed, draw)
        assert prompts.boxes is not None and prompts.points is not None
        return torch.cat([prompts.boxes[0], prompts.points[0].flatten(1)], -1).tolist()

    assert values(5) == values(5)
    everything = [slot for seed in range(10) for draw in range(3) for slot in values(seed, draw)]
    for part in (slice(4), slice(4, None)):  # boxes, points
        assert len({tuple(slot[part]) for slot in everything}) == 90  # seeds, candidates and slots about one object
    first = draw_prompts(same[:1], SIZE, Ask(True, 2, 1), config(), 5)
    assert first.boxes is not None and first.boxes[0, 0].tolist() == values(5)[0][:4]


@pytest.mark.parametrize("per_side", [1, 3, 16])
def test_a_grid_has_one_point_in_each_cell(per_side: int) -> None:
    cells = {(int(y * per_side // 48), int(x * per_side // 64)) for x, y in grid_points(SIZE, per_side).tolist()}
    assert len(grid_points(SIZE, per_side)) == len(cells) == per_side**2
    assert grid_points((2, 64), 2).tolist() == [[16, 0], [48, 0], [16, 1], [48, 1]]


def test_grid_points_stand_for_the_smallest_mask_under_them() -> None:
    labelled = 0
    for seed in range(30):
        masks = blobs(6, seed)
        owners, (prompts,) = draw_grid(list(masks), SIZE, config(objects=12, grid_points=8), seed)
        assert prompts.points is not None and prompts.points.shape == (1, 12, 1, 2) and prompts.boxes is None
        assert prompts.labels is not None and prompts.labels.eq(1).all() and prompts.valid.all()
        points = [tuple(point) for point in prompts.points[0, :, 0].long().tolist()]
        assert set(points) <= {tuple(point) for point in grid_points(SIZE, 8).tolist()} and len(set(points)) == 12
        for owner, (x, y) in zip(owners, points, strict=True):
            under = [i for i in range(6) if masks[i, y, x]]
            assert owner == min(under, key=lambda i: int(masks[i].sum()), default=-1)
            labelled += owner >= 0
    assert 60 < labelled < 300


def test_a_grid_is_covered_before_a_point_comes_again_and_labels_are_sought() -> None:
    owners, (prompts,) = draw_grid([], SIZE, config(objects=20, grid_points=4), 0)
    assert owners == [-1] * 20 and prompts.points is not None
    times = Counter(tuple(point) for point in prompts.points.view(-1, 2).tolist())
    assert len(times) == 16 and sorted(times.values()) == [1] * 12 + [2] * 4
    small = torch.zeros(64, 64, dtype=torch.bool)
    small[7:12, 10:15] = True  # one grid point of 8 x 8 lies in it
    for seed in range(50):
        owners, (prompts,) = draw_grid([small], SIZE, config(objects=2, grid_points=8), seed)
        assert owners.count(0) == 1 and prompts.points is not None
        x, y = prompts.points[0, owners.index(0), 0].long().tolist()
        assert small[y, x]
    small[:] = False
    small[0, 0] = True  # between the points
    assert draw_grid([small], SIZE, config(objects=2, grid_points=8), 0)[0] == [-1, -1]


def test_candidates_of_a_grid_point_lie_on_the_same_mask() -> None:
    masks = list(blobs(4, 2))
    one, (only,) = draw_grid(masks, SIZE, config(objects=6, grid_points=8), 9)
    owners, draws = draw_grid(masks, SIZE, config(objects=6, grid_points=8, candidates=5), 9)
    assert owners == one and len(draws) == 5 and torch.equal(draws[0].points, only.points)  # type: ignore[arg-type]
    places = grid_points(SIZE, 8)
    under = {(x, y): min((i for i in range(4) if masks[i][y, x]), key=lambda i: int(masks[i].sum()), default=-1)
             for x, y in places.tolist()}  # fmt: skip
    for draw in draws:
        assert draw.points is not None
        assert [under[x, y] for x, y in draw.points[0, :, 0].long().tolist()] == owners
    assert len({draw.points.numpy().tobytes() for draw in draws}) == 5  # type: ignore[union-attr]


def test_fingerprint_changes_exactly_with_what_is_drawn() -> None:
    base = prompts_fingerprint(config(), 0)
    assert len(base) == 16 and int(base, 16) >= 0 and base == prompts_fingerprint(config(rounds=3, click="random"), 0)
    assert base == prompts_fingerprint(config(grid_points=9), 0)  # idle without a grid
    others = [{"mode": "box"}, {"mode": "point"}, {"mode": "everything"}, {"objects": 5}, {"points": (1, 2)},
              {"negative_points": (0, 1)}, {"box_jitter": 0.1}, {"candidates": 2},
              {"mode": "everything", "grid_points": 9}]  # fmt: skip
    fingerprints = {prompts_fingerprint(config(**fields), 0) for fields in others}
    assert len({base, prompts_fingerprint(config(), 1)} | fingerprints) == len(others) + 2
    for mode, idle in (("box", {"points": (2, 2)}), ("point", {"box_jitter": 0.2}), ("everything", {"points": (2, 2)})):
        assert prompts_fingerprint(config(mode=mode), 0) == prompts_fingerprint(config(mode=mode, **idle), 0)


def asked(*points: tuple[float, float], label: int = 1, valid: bool = True) -> Prompts:
    """Two images with one object each; the points are about the second."""
    both = torch.tensor([[[list(p)] for p in points], [[list(p)] for p in points]]).reshape(2, 1, len(points), 2)
    both[0] = 0.0
    return Prompts(torch.tensor([[True], [valid]]), both.float(), torch.full((2, 1, len(points)), label))


def boxed(*box: float) -> Prompts:
    return Prompts(torch.ones(1, 1, dtype=torch.bool), boxes=torch.tensor([[list(box)]]))


SIZES = torch.tensor([[10, 20], [30, 40]])  # heights and widths


@pytest.mark.parametrize("point", [(40, 5), (5, 30), (-0.1, 5), (5, -1), (float("nan"), 5), (float("inf"), 5)])
def test_points_outside_the_image_are_refused(point: tuple[float, float]) -> None:
    message = rf"image 1, object 0: point \({point[0]:g}, {point[1]:g}\) is outside the image of 40 x 30 pixels"
    with pytest.raises(UserError, match=message):
        check_prompts(asked((1, 1), point), SIZES)
    check_prompts(asked((1, 1), point, label=-10), SIZES)
    check_prompts(asked((1, 1), point, valid=False), SIZES)


def test_boxes_outside_the_image_or_without_area_are_refused() -> None:
    check_prompts(asked((0, 0), (39.9, 29.9)), SIZES)
    check_prompts(boxed(0, 0, 20, 10), SIZES[:1])
    for box in ((-1, 0, 5, 5), (0, 0, 20.1, 10), (0, 2, 5, 11), (0, 0, float("nan"), 5)):
        with pytest.raises(
            UserError, match=r"image 0, object 0: box \(.+\) reaches outside the image of 20 x 10 pixels"
        ):
            check_prompts(boxed(*box), SIZES[:1])
    for box in ((5, 5, 5, 9), (9, 2, 5, 5)):
        with pytest.raises(UserError, match=r"has no area \(give left, top, right, bottom\) in the image of 20 x 10"):
            check_prompts(boxed(*box), SIZES[:1])
