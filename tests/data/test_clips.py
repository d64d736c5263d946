"""Clips: which frames and objects they hold, that they can be repeated, and what is done about bad videos."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from samdistill.config import AugmentConfig
from samdistill.data.clips import ClipDataset, ClipItem, ClipRules, collate_clips, draw_clip, read_clip
from samdistill.data.sav import SavSource
from samdistill.data.skipped import BadInput
from samdistill.data.transforms import PAD, Geometry, ViewTransform
from samdistill.data.videos import BadVideo, VideoRecord, VideoSource
from samdistill.types import UserError

PLAIN = ViewTransform(Geometry(48))
FLIPS = ViewTransform(Geometry(48), AugmentConfig(flip=0.5, crop_scale=(0.5, 1.0)))
SIZE = (32, 64)
RULES = ClipRules()


def record_of(key: str, annotated: int, objects: int = 3, stride: int = 4) -> VideoRecord:
    visible = np.ones((annotated, objects), bool)
    frames = tuple(range(0, annotated * stride, stride))
    return VideoRecord(key, *SIZE, annotated * stride, 24.0, frames, tuple(range(10, 10 + objects)), visible, visible)


class Listed(VideoSource):
    """Videos from memory: frame i is grey level i on the left and dark on the right; counts what is read."""

    def __init__(self, records: dict[str, VideoRecord | BadVideo]) -> None:
        self.records, self.problems, self.keys = records, [], sorted(records)
        self.read: list[tuple[str, tuple[int, ...]]] = []
        self.bad_frames: set[tuple[str, int]] = set()

    def path(self, key: str) -> Path:
        return Path(key)

    def record(self, key: str) -> VideoRecord:
        found = self.records[key]
        if isinstance(found, BadVideo):
            raise found
        return found

    def frames(self, key: str, indices: Sequence[int]) -> np.ndarray:
        self.read.append((key, tuple(indices)))
        for index in indices:
            if (key, index) in self.bad_frames:
                raise BadVideo(key, f"frame {index} is damaged")
        found = np.zeros((len(indices), *SIZE, 3), np.uint8)
        found[:, :, :32] = np.array(indices)[:, None, None, None] + 50
        return found

    def masks(self, key: str, index: int) -> np.ndarray:
        """Object k is a stripe of its own, where it is visible."""
        record = self.record(key)
        found = np.zeros((len(record.objects), *SIZE), bool)
        for k, seen in enumerate(record.visible[record.row(index)]):
            found[k, k % 32, : 60 * seen] = True
        return found


def rows(item: ClipItem) -> list[int]:
    return item.context_rows.tolist()


def level(canvas: torch.Tensor) -> int:
    """The number of the frame that a canvas shows."""
    return int(canvas.max()) - 50


def same(first: ClipItem, second: ClipItem) -> bool:
    for field in fields(ClipItem):
        a, b = getattr(first, field.name), getattr(second, field.name)
        if not (torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b):
            return False
    return True


@pytest.mark.parametrize("context", [1, 3, 8])
def test_the_annotated_frames_before_the_query(context: int) -> None:
    source = Listed({"v": record_of("v", 20)})
    dataset = ClipDataset(source, PLAIN, ["v"], ClipRules(context, per_video=200, images=True, cached=False))
    assert len(dataset) == 200
    queries = Counter()
    for item in dataset:  # type: ignore[attr-defined]
        assert rows(item) == list(range(item.query_row - context, item.query_row))
        assert item.context_frames.tolist() == [4 * row for row in rows(item)]
        assert item.query_frame == 4 * item.query_row == level(item.canvas)
        assert torch.allclose(item.context_times, torch.arange(-context, 0) * 4 / 24)
        assert item.context is not None and item.context.shape == (context, 3, 48, 48)
        assert [level(c) for c in item.context] == item.context_frames.tolist()
        assert item.canvas.dtype == torch.uint8 and item.size == (48, 48) and item.original_size == SIZE
        queries[item.query_row] += 1
    assert set(queries) == set(range(context, 20)) and max(queries.values()) < 4 * 200 / (20 - context)


def test_a_shorter_context_where_it_is_asked_for() -> None:
    dataset = ClipDataset(Listed({"v": record_of("v", 6)}), PLAIN, ["v"], ClipRules(3, shortest=1, per_video=60))
    lengths = {(item.query_row, len(item.context_rows)) for item in dataset}  # type: ignore[attr-defined]
    assert lengths == {(1, 1), (2, 2), (3, 3), (4, 3), (5, 3)}


@pytest.mark.parametrize("annotated", [2, 5, 8, 9])
def test_a_video_shorter_than_the_context_gives_what_it_has(annotated: int) -> None:
    rules = ClipRules(8, images=True, cached=False)
    (item,) = ClipDataset(Listed({"v": record_of("v", annotated)}), PLAIN, ["v"], rules)  # type: ignore[misc]
    assert item.query_row == annotated - 1 and rows(item) == list(range(annotated - 1)) and item.bad == ()
    assert item.context is not None and [level(c) for c in item.context] == item.context_frames.tolist()


def test_nothing_is_read_that_is_not_asked_for() -> None:
    source = Listed({"v": record_of("v", 20)})
    item = ClipDataset(source, PLAIN, ["v"], RULES)[0]
    assert item.context is None and source.read == [("v", (item.query_frame,))]
    assert len(item.context_rows) == 8
    source.read.clear()
    full = ClipDataset(source, PLAIN, ["v"], ClipRules(images=True))[0]
    assert source.read == [("v", (*full.context_frames.tolist(), full.query_frame))]  # one pass
    assert (full.query_row, rows(full), full.seed) == (item.query_row, rows(item), item.seed)


def test_clips_depend_on_seed_epoch_and_index_alone() -> None:
    source = Listed({key: record_of(key, 40, 30) for key in "abcde"})
    rules = ClipRules(per_video=3, images=True, cached=False)

    def items(seed: int, epoch: int) -> list[ClipItem]:
        return list(ClipDataset(source, FLIPS, source.keys, rules, seed, epoch))  # type: ignore[call-overload]

    base = items(3, 1)
    assert [item.key for item in base] == list("abcde") * 3
    np.random.seed(5)
    torch.manual_seed(5)
    again = ClipDataset(source, FLIPS, source.keys, rules, 3, 1)
    assert all(same(again[index], base[index]) for index in (14, 0, 7, 7))
    loaded = DataLoader(again, batch_size=None, num_workers=1, multiprocessing_context="fork")
    assert all(same(a, b) for a, b in zip(loaded, base, strict=True))
    for other in (items(4, 1), items(3, 2)):
        assert sum(a.query_row == b.query_row and a.seed == b.seed for a, b in zip(other, base, strict=True)) == 0
    assert len({(item.query_row, item.seed) for item in base}) == 15


def test_objects_are_those_that_the_query_shows() -> None:
    record = record_of("v", 12, 4)
    record.visible[:, 1] = False
    record.visible[5:] = False
    source = Listed({"v": record})
    for query in (4, 8):
        item = read_clip(source, record, query, range(query), PLAIN, RULES, np.random.default_rng(0))
        assert item.objects.tolist() == ([10, 12, 13] if query == 4 else [])
        assert item.masks.shape == (len(item.objects), 48, 48) and item.masks.dtype == torch.bool
        expected = PLAIN.geometry.mask(source.masks("v", 4 * query)[[0, 2, 3]])
        assert torch.equal(item.masks, expected[: len(item.objects)])
        assert item.concepts == ()
    assert collate_clips([item]).masks.shape == (1, 0, 48, 48)


def test_many_objects_are_drawn_evenly_and_stay_in_order() -> None:
    record = VideoRecord(**{**record_of("v", 12, 30).__dict__, "concepts": tuple((f"thing {k}",) for k in range(30))})
    dataset = ClipDataset(Listed({"v": record}), PLAIN, ["v"], ClipRules(per_video=120))
    drawn: Counter[int] = Counter()
    for item in dataset:  # type: ignore[attr-defined]
        numbers = item.objects.tolist()
        assert len(numbers) == len(item.masks) == 20 and numbers == sorted(set(numbers))
        assert item.concepts == tuple((f"thing {number - 10}",) for number in numbers)
        drawn.update(numbers)
    assert len(drawn) == 30 and min(drawn.values()) > 60  # 80 of each


def test_an_object_too_small_for_the_canvas_is_left_out() -> None:
    tiny = ViewTransform(Geometry(8))  # a row of the canvas is four of the file: most stripes fall between
    item = ClipDataset(Listed({"v": record_of("v", 12, 16)}), tiny, ["v"], RULES)[0]
    assert 0 < len(item.objects) < 16 and item.masks.flatten(1).sum(1).min() >= 4


def test_all_frames_of_a_clip_are_laid_alike() -> None:
    source = Listed({"v": record_of("v", 20)})
    rules = ClipRules(3, per_video=40, images=True, cached=False)
    sides = Counter()
    for item in ClipDataset(source, ViewTransform(Geometry(48), AugmentConfig(flip=0.5)), ["v"], rules):  # type: ignore[attr-defined]
        assert item.context is not None
        bright = [bool(canvas[0, 0, :8].any()) for canvas in (*item.context, item.canvas)]
        assert len(set(bright)) == 1
        plain = PLAIN.geometry.mask(source.masks("v", item.query_frame))
        assert torch.equal(item.masks, plain if bright[0] else plain.flip(-1))
        sides[bright[0]] += 1
    assert min(sides[True], sides[False]) > 8
    for item in ClipDataset(source, FLIPS, ["v"], rules):  # type: ignore[attr-defined]
        assert item.context is not None
        lit = torch.stack([canvas[0] > 25 for canvas in (*item.context, item.canvas)])
        assert bool((lit == lit[0]).all())  # crops too


def test_cached_features_forbid_augmentation() -> None:
    source = Listed({"v": record_of("v", 20)})
    for rules in (RULES, ClipRules(images=True)):
        with pytest.raises(UserError, match=r"data.augment: a teacher's features are those of unaugmented frames"):
            ClipDataset(source, FLIPS, ["v"], rules)


@pytest.mark.parametrize("fields", [{"context": 0}, {"objects": 0}, {"per_video": 0}, {"shortest": 0}, {"shortest": 9}])
def test_rules_that_make_no_clip(fields: dict[str, int]) -> None:
    with pytest.raises(UserError, match=r"at least 1|`shortest` must be 1 to 8 context frames"):
        ClipRules(**fields)


def test_what_cannot_be_trained_on_is_replaced_and_named() -> None:
    source = Listed({
        "a": BadVideo("a", "spoilt"), "b": record_of("b", 1), "c": record_of("c", 3),
        "d": VideoRecord(**{**record_of("d", 3).__dict__, "problems": (BadInput("d, object 7", "nowhere"),)}),
    })  # fmt: skip
    source.bad_frames.add(("c", 8))
    dataset = ClipDataset(source, PLAIN, source.keys, RULES)
    item = dataset[0]
    assert item.key == "d" and item.bad == (
        ("a", "spoilt"),
        ("b", "1 annotated frame; a clip needs a query and one before it"),
        ("c", "frame 8 is damaged"),
        ("d, object 7", "nowhere"),
    )
    assert same(ClipDataset(source, PLAIN, source.keys, RULES)[3], dataset[3]) and dataset[3].bad == item.bad[3:]
    assert (item.query_row, item.seed) == (dataset[3].query_row, dataset[3].seed)
    with pytest.raises(IndexError):
        dataset[4]
    with pytest.raises(UserError, match=r"^2 videos in a row cannot be trained on, first b: 1 annotated frame"):
        ClipDataset(source, PLAIN, ["a", "b"], ClipRules(per_video=5))[1]


def test_64_unusable_videos_in_a_row_end_the_run() -> None:
    source = Listed({f"{n:03d}": BadVideo(f"{n:03d}", "spoilt") for n in range(70)})
    with pytest.raises(UserError, match="64 videos in a row cannot be trained on, first 002: spoilt"):
        ClipDataset(source, PLAIN, source.keys, RULES)[2]
    source.records["065"] = record_of("065", 9)
    item = ClipDataset(source, PLAIN, source.keys, RULES)[2]
    assert item.key == "065" and len(item.bad) == 63


def test_too_few_annotated_frames() -> None:
    with pytest.raises(BadVideo, match="v: 1 annotated frame; a clip needs a query and one before it"):
        draw_clip(record_of("v", 1), RULES, np.random.default_rng(0))


def test_a_batch_is_filled_up_and_says_where() -> None:
    source = Listed({"a": record_of("a", 3, 2), "b": record_of("b", 12, 5), "c": record_of("c", 2, 0)})
    source.records["d"] = BadVideo("d", "spoilt")
    rules = ClipRules(6, images=True, cached=False)
    made = list(ClipDataset(source, PLAIN, ["a", "b", "d", "c"], rules))  # type: ignore[call-overload]
    batch = collate_clips(made)
    assert batch.images.keys == ("a", "b", "c", "c") and len(batch) == 4 and batch.bad == (("d", "spoilt"),)
    assert torch.equal(batch.images.images, torch.stack([item.canvas for item in made]))
    assert batch.images.seeds.tolist() == [item.seed for item in made]
    assert batch.query_rows.tolist() == [item.query_row for item in made]
    assert batch.valid.sum(1).tolist() == [2, 5, 0, 0] and batch.context_valid.sum(1).tolist() == [2, 6, 1, 1]
    assert batch.masks.shape == (4, 5, 48, 48) and batch.context is not None
    for number, item in enumerate(made):
        n, t = len(item.objects), len(item.context_rows)
        assert batch.valid[number, :n].all() and batch.context_valid[number, :t].all()
        assert torch.equal(batch.masks[number, :n], item.masks) and not batch.masks[number, n:].any()
        assert batch.objects[number].tolist() == [*item.objects.tolist(), *[-1] * (5 - n)]
        assert batch.context_frames[number].tolist() == [*item.context_frames.tolist(), *[-1] * (6 - t)]
        assert batch.context_rows[number].tolist() == [*rows(item), *[-1] * (6 - t)]
        assert torch.equal(batch.context_times[number, :t], item.context_times)
        assert item.context is not None and torch.equal(batch.context[number, :t], item.context)
        assert bool((batch.context[number, t:] == PAD).all())
    assert collate_clips([ClipDataset(source, PLAIN, ["a"], RULES)[0]]).context is None


def test_a_batch_moves_whole() -> None:
    source = Listed({"a": BadVideo("a", "spoilt"), "b": record_of("b", 12, 5)})
    batch = collate_clips([ClipDataset(source, PLAIN, source.keys, ClipRules(images=True))[0]])
    moved = batch.to("meta")
    for field in fields(batch):
        before, after = getattr(batch, field.name), getattr(moved, field.name)
        if isinstance(before, torch.Tensor):
            assert after.device.type == "meta" and after.shape == before.shape and after.dtype == before.dtype
    assert moved.images.images.device.type == "meta" and moved.concepts == batch.concepts
    assert moved.bad == batch.bad and isinstance(moved.bad[0], BadInput)


def test_one_bad_video_of_many_is_skipped_and_never_shown(
    tmp_path: Path, write_sav: Callable, number_of: Callable
) -> None:
    for key in ("sav_1", "sav_2", "sav_3", "sav_4", "sav_5"):
        write_sav(tmp_path, key, 40, objects=3, concepts=[["a box"], ["a box"], ["a lid", "a cover"]])
    truncated, foreign = tmp_path / "sav_1.mp4", tmp_path / "sav_2_manual.json"
    truncated.write_bytes(truncated.read_bytes()[:-900])
    foreign.write_bytes((tmp_path / "sav_3_manual.json").read_bytes())
    (tmp_path / "sav_3.mp4").unlink()
    short = json.loads((tmp_path / "sav_4_manual.json").read_text())
    (tmp_path / "sav_4_manual.json").write_text(json.dumps(short | {"masklet": short["masklet"][:1]}))
    source = SavSource(tmp_path)
    assert source.keys == ["sav_1", "sav_2", "sav_4", "sav_5"] and [p.key for p in source.problems] == ["sav_3_manual"]
    transform = ViewTransform(Geometry(96))
    item = ClipDataset(source, transform, source.keys, ClipRules(images=True), seed=1)[0]
    assert item.key == "sav_5" and [bad.key for bad in item.bad] == ["sav_1", "sav_2", "sav_4"]
    reasons = ("sav_1.mp4 is not a readable video: its data ends early",
               "sav_2_manual.json belongs to another video, sav_3", "1 annotated frame; ")  # fmt: skip
    assert all(reason in bad.reason for bad, reason in zip(item.bad, reasons, strict=True))
    assert item.objects.tolist() == [0, 1, 2] and item.concepts == (("a box",), ("a box",), ("a lid", "a cover"))
    assert torch.equal(item.masks, transform.geometry.mask(source.masks("sav_5", item.query_frame)))
    assert item.context is not None
    shown = [*item.context, item.canvas]  # stretched from 64 to 96 rows
    found = [number_of(canvas.permute(1, 2, 0).numpy()[:24]) for canvas in shown]
    assert found == [*item.context_frames.tolist(), item.query_frame] == list(range(found[0], found[0] + 36, 4))


class Placed(Listed):
    """Objects of 8 x 8 pixels: 0 is there in rows 0 to 2, 1 in all, 2 from row 3 on, 3 is a dot but in row 1."""

    def masks(self, key: str, index: int) -> np.ndarray:
        record = self.record(key)
        row, found = record.row(index), np.zeros((4, *SIZE), bool)
        for number, there in enumerate((row < 3, True, row >= 3, row == 1)):
            if there:
                found[number, 8:16, 8 + 8 * number : 16 + 8 * number] = True
        if row != 1:
            found[3, 8, 40] = True
        return found


MARKED = ClipRules(context=4, marks=12)
STRETCHED = ViewTransform(Geometry(64))  # frames of 32 x 64: one pixel of the file is two rows of the canvas


def placed(annotated: int = 6) -> tuple[Placed, VideoRecord]:
    record = record_of("a", annotated, 4)
    return Placed({"a": record}), record


def test_marked_objects_are_those_that_the_past_shows_whether_or_not_the_query_does() -> None:
    source, record = placed()
    rng = np.random.default_rng(0)
    item = read_clip(source, record, 4, range(0, 4), STRETCHED, MARKED, rng)
    # 3 shows a dot of two pixels in the query: neither there nor gone
    assert item.objects.tolist() == [10, 11, 12]
    assert item.masks.flatten(1).any(1).tolist() == [False, True, True]
    early = read_clip(source, record, 1, range(0, 1), STRETCHED, MARKED, rng)
    assert early.objects.tolist() == [10, 11]  # 2 was never seen; of 3 a dot was
    unlabelled = record.labelled.copy()
    unlabelled[4, 0] = False  # whether object 0 is there is unknown
    asked = read_clip(source, replace(record, labelled=unlabelled), 4, range(0, 4), STRETCHED, MARKED, rng)
    assert asked.objects.tolist() == [11, 12]
    plain = read_clip(source, record, 4, range(0, 4), STRETCHED, replace(MARKED, marks=0), rng)
    assert plain.marks is None and plain.objects.tolist() == [11, 12]


def test_a_mark_is_the_share_of_each_cell_that_the_object_covers() -> None:
    source, record = placed()
    rules = replace(MARKED, marks=16)  # cells of 4 x 4 on the canvas, 2 x 4 in the file
    item = read_clip(source, record, 4, range(0, 4), STRETCHED, rules, np.random.default_rng(0))
    wanted = np.stack([source.masks("a", 4 * row)[:3] for row in range(4)], 1)
    wanted = wanted.reshape(3, 4, 16, 2, 16, 4).mean((3, 5))
    np.testing.assert_allclose(item.marks.numpy(), wanted, atol=1e-6)
    assert item.marks.max() == 1 and item.marks[2, :3].sum() == 0 and item.marks[0, 3].sum() == 0


def test_lost_marks_are_left_out_but_never_all() -> None:
    source, record = placed(12)
    rules = ClipRules(context=8, marks=12, lost=0.5)
    kept = []
    for seed in range(40):
        item = read_clip(source, record, 9, range(1, 9), STRETCHED, rules, np.random.default_rng(seed))
        there = item.marks.flatten(2).any(-1)
        assert there.any(1).all()
        kept.append(there[item.objects.tolist().index(11)])
    assert 0.4 < torch.stack(kept).float().mean() < 0.6
    gone = read_clip(source, record, 9, range(1, 9), STRETCHED, replace(rules, lost=1.0), np.random.default_rng(0))
    assert gone.marks.flatten(2).any(-1)[1].tolist() == [False] * 7 + [True]  # the latest is what is left


def test_own_frames_are_a_share_and_need_pixels() -> None:
    source, record = placed(12)
    rules = ClipRules(context=8, images=True, own=0.3)
    flags = [
        read_clip(source, record, 9, range(1, 9), PLAIN, rules, np.random.default_rng(seed)).own for seed in range(60)
    ]
    assert 0.22 < torch.stack(flags).float().mean() < 0.38
    with pytest.raises(ValueError, match="images=True"):
        ClipRules(own=0.5)


def test_marks_of_a_batch_are_padded_with_nothing() -> None:
    source, record = placed()
    rng = np.random.default_rng(0)
    items = [read_clip(source, record, q, range(0, q), STRETCHED, MARKED, rng) for q in (1, 4)]
    batch = collate_clips(items)
    assert batch.marks.shape == (2, 3, 4, 12, 12)
    assert torch.equal(batch.marks[0, :2, :1], items[0].marks) and batch.marks[0, 2].sum() == 0
    assert batch.marks[0, :, 1:].sum() == 0 and torch.equal(batch.marks[1], items[1].marks)
    assert batch.own.tolist() == [[False] * 4] * 2
