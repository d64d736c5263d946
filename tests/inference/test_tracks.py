"""Overlaps, pairs and the ring, by brute force."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from samdistill.inference.tracks import Memory, Ring, assign
from samdistill.ops.sights import Sight, Track, overlap


def test_objects_and_instances_are_paired_for_the_greatest_sum() -> None:
    rng = np.random.default_rng(1)
    for count in (1, 3, 4):

        def drawn() -> Sight:
            left, top = rng.random(2) * 12
            return Sight.filled((left, top, left + 6, top + 6), (24, 24))

        tracks = [Track(number, None, "thing", drawn()) for number in range(count)]
        found = [drawn() for _ in range(4)]
        pairs = assign(tracks, found)
        total = sum(overlap(tracks[number].last, sight) for number, sight in pairs.items())
        orders = itertools.permutations(found, count)
        assert total == pytest.approx(
            max(sum(overlap(t.last, s) for t, s in zip(tracks, order, strict=True)) for order in orders)
        )
        assert len(set(map(id, pairs.values()))) == len(pairs)
        assert all(overlap(tracks[number].last, sight) > 0 for number, sight in pairs.items())
    assert assign([], found) == {} == assign(tracks, [])


def test_the_ring_keeps_the_latest_frames() -> None:
    ring, mark = Ring(2), torch.rand(4, 4)
    assert ring.recall(5, 4) == Memory(None, None, None, None) and ring.marked == set()
    maps = torch.rand(3, 8, 4, 4)
    for number, marks in ((0, {1: mark}), (4, {2: mark / 2}), (8, {1: mark / 3, 2: mark / 4})):
        ring.add(number, maps[number // 4], marks)
    features, ages, valid, masks = ring.recall(10, 4, [2, 1])
    assert len(ring) == 2 and torch.equal(features, maps[None, 1:]) and ring.marked == {1, 2}
    assert ages.tolist() == [[1.5, 0.5]] and valid.tolist() == [[True, True]]
    assert torch.equal(masks, torch.stack([mark / 2, mark / 4, torch.zeros(4, 4), mark / 3]).view(2, 2, 4, 4))
    assert ring.recall(10, 4).masks is None
    ring.add(12, maps[0], {})  # frame 8 shows both last, and is the one that may wait
    ring.add(16, maps[0], {})
    assert ring.marked == {1, 2} and ring.recall(20, 4).ages.tolist() == [[2.0, 1.0]]  # not 3: as old as they get
    ring.add(20, maps[0], {1: mark})
    assert ring.marked == {1, 2}
    ring.add(24, maps[0], {2: mark})  # now nobody needs frame 8
    assert ring.recall(28, 4).ages.tolist() == [[2.0, 1.0]] and ring.marked == {1, 2}
