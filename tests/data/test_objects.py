"""Prompted objects: items, batches, and what is done about bad input."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from samdistill.config import AugmentConfig, PromptsConfig
from samdistill.data import (
    BadImage,
    FolderSource,
    Geometry,
    Instance,
    MaskFolderSource,
    ObjectDataset,
    ObjectItem,
    Source,
    ViewTransform,
    collate_objects,
    view_seed,
)
from samdistill.data.prompts import Ask, draw_prompts
from samdistill.types import PromptGroup, Prompts, UserError

PLAIN = ViewTransform(Geometry(64, "longest_side"))
VIEWS = ViewTransform(Geometry(64), AugmentConfig(flip=0.5, crop_scale=(0.3, 1.0)))
FLIPS = ViewTransform(Geometry(64), AugmentConfig(flip=0.5))


def config(**fields: object) -> PromptsConfig:
    return PromptsConfig.model_validate(fields)


def rectangles(count: int, size: tuple[int, int] = (60, 80)) -> np.ndarray:
    """An id image with ``count`` rectangles of different sizes, none over another."""
    grid = np.zeros(size, np.uint8)
    for number in range(count):
        row, column = divmod(number, 4)
        grid[15 * row + 1 : 15 * row + 5 + 2 * column, 20 * column + 1 : 20 * column + 9 + 3 * row] = number + 1
    return grid


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> MaskFolderSource:
    """Eight images with 1, 1, 2, 3, 5, 8, 13 and 16 objects."""
    root = tmp_path_factory.mktemp("objects")
    for kind in ("images", "masks"):
        (root / kind).mkdir()
    for number, count in enumerate((1, 1, 2, 3, 5, 8, 13, 16)):
        ids = rectangles(count)
        Image.fromarray(ids).save(root / f"masks/{number}.png")
        Image.fromarray(np.repeat(ids[..., None] * 15, 3, -1)).save(root / f"images/{number}.png")
    return MaskFolderSource(root, None)


class Listed(Source):
    """Images and objects from memory; counts what is read."""

    labelled = True

    def __init__(self, objects: dict[str, list[Instance] | BadImage], size: tuple[int, int] = (60, 80)) -> None:
        self.objects, self.size = objects, size
        self.keys, self.problems = sorted(objects), []
        self.read: Counter[str] = Counter()

    @classmethod
    def splits(cls, root: Path) -> list[str]:
        return []

    def path(self, key: str) -> Path:
        return Path(key)

    def load(self, key: str) -> Image.Image:
        self.read[f"image {key}"] += 1
        return Image.new("RGB", self.size[::-1])

    def check(self, key: str) -> tuple[int, int]:
        return self.size

    def read_instances(self, key: str) -> list[Instance]:
        self.read[f"objects {key}"] += 1
        found = self.objects[key]
        if isinstance(found, BadImage):
            raise found
        return found


def instance(number: int, crowd: bool = False, size: tuple[int, int] = (60, 80)) -> Instance:
    return Instance(rectangles(16, size) == number, None, number, crowd)


def same(first: ObjectItem, second: ObjectItem) -> bool:
    """Whether two items are equal in everything but what was unusable before them."""
    a, b = collate_objects([first]), collate_objects([second])
    return (
        first[2:5] == second[2:5]
        and (first.key, first.ask) == (second.key, second.ask)
        and torch.equal(first.canvas, second.canvas)
        and torch.equal(first.masks, second.masks)
        and torch.equal(first.labelled, second.labelled)
        and all(prompts_equal(x[0].prompts, y[0].prompts) for x, y in zip(a.draws, b.draws, strict=True))
    )


def prompts_equal(first: Prompts, second: Prompts) -> bool:
    pairs = [(getattr(first, n), getattr(second, n)) for n in ("valid", "points", "labels", "boxes")]
    return all((a is None and b is None) or (a is not None and b is not None and torch.equal(a, b)) for a, b in pairs)


def number_of(mask: torch.Tensor, item: ObjectItem) -> int:
    """The id of a mask on the canvas, by what the picture shows under it: masks and image are laid alike."""
    value, count = np.unique(item.canvas[0][mask].numpy(), return_counts=True)
    assert count.max() > 0.5 * count.sum()
    return round(int(value[count.argmax()]) / 15)


def test_slots_hold_different_objects_or_all_of_them_again_and_again(folder: MaskFolderSource) -> None:
    dataset = ObjectDataset(folder, FLIPS, config(mode="box", objects=5, box_jitter=0), folder.keys, 1, 2)
    for number, count in enumerate((1, 1, 2, 3, 5, 8, 13, 16)):
        item = dataset[number]
        assert item.key == str(number) and item.seed == view_seed(1, item.key, 2) and item.bad == ()
        assert item.masks.shape == (5, 64, 64) and item.labelled.all() and item.valid.all()
        assert item.canvas.shape == (3, 64, 64) and item.size == (64, 64) and item.original_size == (60, 80)
        shown = Counter(number_of(mask, item) for mask in item.masks)
        assert set(shown) <= set(range(1, count + 1)) and len(shown) == min(count, 5)
        assert max(shown.values()) - min(shown.values()) <= 1
        expected = FLIPS.masks(np.stack([i.mask for i in folder.instances(item.key)]), (60, 80), item.seed)
        assert {m.numpy().tobytes() for m in item.masks} <= {m.numpy().tobytes() for m in expected}


def test_objects_are_drawn_evenly(folder: MaskFolderSource) -> None:
    drawn: Counter[int] = Counter()
    for view in range(240):
        item = ObjectDataset(folder, FLIPS, config(mode="box", objects=4), ["7"], 0, view)[0]
        drawn.update(number_of(mask, item) for mask in item.masks)
    assert len(drawn) == 16 and min(drawn.values()) > 35 and max(drawn.values()) < 90  # 60 of each


@pytest.mark.parametrize("mode", ["point", "box", "mixed", "everything"])
def test_items_depend_on_seed_key_and_view_alone(folder: MaskFolderSource, mode: str) -> None:
    prompts = config(mode=mode, objects=3, negative_points=(0, 2), candidates=2, grid_points=8)
    base = list(ObjectDataset(folder, VIEWS, prompts, folder.keys, 3, 1))  # type: ignore[call-overload]
    random.seed(9)
    torch.manual_seed(9)
    fewer = ObjectDataset(folder, VIEWS, prompts, folder.keys[5:2:-1], 3, 1)
    own = {item.key: item for item in base if not item.bad}  # the others stand in for an image cropped to nothing
    again = [item for item in fewer if not item.bad]  # type: ignore[attr-defined]
    assert len(again) >= 2 and all(same(item, own[item.key]) for item in again)
    for other in ((4, 1), (3, 2)):
        changed = list(ObjectDataset(folder, VIEWS, prompts, folder.keys, *other))  # type: ignore[call-overload]
        assert not any(same(a, b) for a, b in zip(changed, base, strict=True))


@pytest.mark.parametrize("mode", ["point", "mixed", "everything"])
def test_candidates_are_other_prompts_about_the_same_objects(folder: MaskFolderSource, mode: str) -> None:
    fields = {"mode": mode, "objects": 4, "grid_points": 8}
    one = ObjectDataset(folder, FLIPS, config(**fields), folder.keys)
    four = ObjectDataset(folder, FLIPS, config(**fields, candidates=4), folder.keys)
    for first, item in zip(one, four, strict=True):  # type: ignore[call-overload]
        assert len(first.draws) == 1 and len(item.draws) == 4 and first.ask == item.ask
        assert torch.equal(first.masks, item.masks) and prompts_equal(first.draws[0], item.draws[0])
        assert not any(prompts_equal(item.draws[0], other) for other in item.draws[1:])
        for draw in item.draws:
            assert (draw.boxes is not None) == item.ask.box and (draw.points is None) == (item.ask.positives == 0)
            if draw.points is not None:
                x, y = draw.points[0, :, 0].long().unbind(-1)  # a positive point of each object
                assert torch.equal(item.masks[torch.arange(4), y, x], item.labelled)


def test_everything_asks_where_no_object_is_too(folder: MaskFolderSource) -> None:
    dataset = ObjectDataset(folder, FLIPS, config(mode="everything", objects=12, grid_points=8), folder.keys)
    labelled = 0
    for item in dataset:  # type: ignore[attr-defined]
        assert item.ask == Ask(False, 1, 0) and item.valid.all() and item.labelled.any()
        assert torch.equal(item.masks.flatten(1).any(1), item.labelled)
        for mask in item.masks[item.labelled]:
            assert 1 <= number_of(mask, item) <= len(folder.instances(item.key))
        labelled += int(item.labelled.sum())
    assert 8 < labelled < 96


def test_images_without_labels_can_be_asked_everything_and_nothing_else(folder: MaskFolderSource) -> None:
    plain = FolderSource(folder.images)
    items = list(ObjectDataset(plain, PLAIN, config(mode="everything", objects=3), plain.keys))  # type: ignore[call-overload]
    assert len(items) == 8 and not any(item.labelled.any() or item.masks.any() for item in items)
    for mode in ("point", "box", "mixed"):
        with pytest.raises(UserError, match=rf"prompts.mode: {mode} needs masks.*everything"):
            ObjectDataset(plain, PLAIN, config(mode=mode), plain.keys)


def test_prompts_stay_off_the_padding(folder: MaskFolderSource) -> None:
    for view in range(6):
        dataset = ObjectDataset(
            folder, PLAIN, config(objects=4, negative_points=(1, 3), box_jitter=0.4), ["7"], 0, view
        )
        item = dataset[0]
        assert item.size == (48, 64)
        for draw in item.draws:
            if draw.points is not None:
                assert draw.points[..., 1].max() < 48
            if draw.boxes is not None:
                assert draw.boxes[..., 3].max() <= 48


def test_what_cannot_be_trained_on_is_replaced_and_named() -> None:
    objects = [instance(3), instance(7)]
    small = np.zeros((60, 80), bool)
    small[4, 4:6] = True  # two pixels of the file, fewer of the canvas
    source = Listed({
        "a": BadImage("a", "spoilt"), "b": [], "c": [instance(1)._replace(mask=rectangles(1, (61, 80)) > 0)],
        "d": [Instance(small, None, 1)], "e": [instance(2, crowd=True)],
        "f": [Instance(small & False, None, 5)], "g": objects,
    })  # fmt: skip
    item = ObjectDataset(source, FLIPS, config(mode="box"), source.keys)[0]
    assert item.key == "g" and [tuple(bad) for bad in item.bad] == [
        ("a", "spoilt"),
        ("b", "has no object to prompt"),
        (
            "c",
            "its mask 1 is 80 x 61 pixels, its image 80 x 60: give the image that was annotated, or annotate this one",
        ),
        ("d", "has no object to prompt; none of 1 shows 4 pixels in this view"),
        ("e", "has no object to prompt"),
        ("f, object 5", "its mask is empty"),
        ("f", "has no object to prompt"),
    ]
    assert set(source.read.values()) == {1}  # nothing is decoded twice
    source.objects["g"] = [
        *objects,
        Instance(small & False, None, 9),
        instance(4, crowd=True),
        Instance(small, None, 6),
    ]
    item = ObjectDataset(source, FLIPS, config(mode="box", objects=6), ["g"])[0]
    assert item.bad == (("g, object 9", "its mask is empty"),)
    assert len({mask.numpy().tobytes() for mask in item.masks}) == 2 and item.masks.flatten(1).sum(1).min() >= 4


def test_64_unusable_images_in_a_row_end_the_run() -> None:
    source = Listed({f"{n:03d}": BadImage(f"{n:03d}", "spoilt") for n in range(70)})
    dataset = ObjectDataset(source, FLIPS, config(), source.keys)
    with pytest.raises(UserError, match="64 images in a row cannot be trained on, first 002: spoilt"):
        dataset[2]
    assert len(source.read) == 128
    with pytest.raises(IndexError):
        dataset[70]
    source.objects["065"] = [instance(1)]
    assert ObjectDataset(source, FLIPS, config(), source.keys)[2].key == "065"
    with pytest.raises(UserError, match=r"^2 images in a row"):
        ObjectDataset(source, FLIPS, config(), ["000", "001"])[0]


def test_an_image_whose_objects_are_cropped_away_gives_its_place() -> None:
    corner = np.zeros((60, 80), bool)
    corner[:6, :6] = True
    source = Listed({"a": [Instance(corner, None, 1)], "b": [Instance(~corner, None, 1)]})
    keys = Counter()
    for view in range(60):
        item = ObjectDataset(source, VIEWS, config(), ["a", "b"], 0, view)[0]
        assert (item.key == "a") == (item.bad == ())
        assert item.masks.flatten(1).sum(1).min() >= 4
        keys[item.key] += 1
    assert min(keys["a"], keys["b"]) > 5


def items(folder: MaskFolderSource, **fields: object) -> list[ObjectItem]:
    prompts = config(**{"objects": 3, "negative_points": (0, 1), "points": (1, 2), **fields})
    return [ObjectDataset(folder, FLIPS, prompts, folder.keys, 0, view)[i] for view in range(4) for i in range(8)]


def test_groups_hold_every_image_once_and_nothing_is_padded(folder: MaskFolderSource) -> None:
    made = items(folder, candidates=3)
    batch = collate_objects(made)
    assert len(batch.images) == 32 and batch.images.keys == tuple(item.key for item in made)
    assert torch.equal(batch.images.images[5], made[5].canvas) and batch.images.seeds[5] == made[5].seed
    assert torch.equal(batch.masks, torch.stack([item.masks for item in made])) and batch.masks.shape == (32, 3, 64, 64)
    assert batch.labelled.all() and batch.valid.all() and batch.labelled.shape == (32, 3)
    assert len(batch.draws) == 3 and batch.groups is batch.draws[0] and batch.bad == ()
    for number, groups in enumerate(batch.draws):
        rows = [row for group in groups for row in group.rows.tolist()]
        assert sorted(rows) == list(range(32))
        assert [g.rows.tolist() for g in groups] == [g.rows.tolist() for g in batch.groups]
        assert len({made[group.rows[0]].ask for group in groups}) == len(groups) > 5
        for group in groups:
            ask = made[group.rows[0]].ask
            assert group.rows.tolist() == [row for row, item in enumerate(made) if item.ask == ask]
            assert group.multimask == (ask == Ask(False, 1, 0))
            check_shapes(group, ask)
            for place, row in enumerate(group.rows.tolist()):
                one = collate_objects([made[row]]).draws[number][0]
                assert prompts_equal(one.prompts, picked(group.prompts, place))
    assert any(group.multimask for group in batch.groups)


def picked(prompts: Prompts, place: int) -> Prompts:
    at = slice(place, place + 1)
    values = (prompts.points, prompts.labels, prompts.boxes)
    return Prompts(prompts.valid[at], *(None if value is None else value[at] for value in values))


def check_shapes(group: PromptGroup, ask: Ask) -> None:
    prompts, count = group.prompts, ask.positives + ask.negatives
    assert prompts.masks is None and prompts.valid.shape == (len(group.rows), 3)
    if ask.box:
        assert prompts.boxes is not None and prompts.boxes.shape == (len(group.rows), 3, 4)
    else:
        assert prompts.boxes is None
    if count:
        assert prompts.points is not None and prompts.points.shape == (len(group.rows), 3, count, 2)
        assert prompts.labels is not None and prompts.labels.shape == prompts.points.shape[:-1]
        assert (prompts.labels[..., : ask.positives] == 1).all() and not prompts.labels[..., ask.positives :].any()
    else:
        assert prompts.points is None and prompts.labels is None


def test_a_batch_moves_as_a_whole_and_keeps_what_was_bad() -> None:
    source = Listed({"a": BadImage("a", "spoilt"), "b": [instance(1)]})
    prompts = config(candidates=2, points=(2, 2))
    batch = collate_objects([ObjectDataset(source, FLIPS, prompts, source.keys, 0, view)[0] for view in range(6)])
    assert [bad.reason for bad in batch.bad] == ["spoilt"] * 6
    moved = batch.to("meta")
    tensors = [moved.images.images, moved.images.sizes, moved.masks, moved.labelled, moved.valid]
    for groups in moved.draws:
        for group in groups:
            tensors += [group.rows, *(t for t in (group.prompts.points, group.prompts.boxes) if t is not None)]
    assert len(tensors) > 12 and {tensor.device.type for tensor in tensors} == {"meta"}
    assert moved.bad == batch.bad and moved.bad[0].key == "a"
    assert [g.multimask for g in moved.groups] == [g.multimask for g in batch.groups]


def everything_of(folder: MaskFolderSource, workers: int) -> list[str]:
    dataset = ObjectDataset(folder, VIEWS, config(objects=3, negative_points=(0, 2), candidates=2), folder.keys, 4, 2)
    loader = DataLoader(dataset, 3, num_workers=workers, collate_fn=collate_objects)
    return [
        f"{batch.images.keys} {group.rows.tolist()} {group.prompts.points} {group.prompts.boxes}"
        for batch in loader for groups in batch.draws for group in groups
    ]  # fmt: skip


def test_batches_do_not_depend_on_workers_or_process(folder: MaskFolderSource) -> None:
    reference = everything_of(folder, 0)
    assert everything_of(folder, 2) == reference
    code = (
        "import sys\nfrom pathlib import Path\nsys.path.insert(0, sys.argv[1])\n"
        "from test_objects import MaskFolderSource, everything_of\n"
        "print(everything_of(MaskFolderSource(Path(sys.argv[2]), None), 0))"
    )
    command = [sys.executable, "-c", code, str(Path(__file__).parent), str(folder.images.parent)]
    environment = {**os.environ, "PYTHONPATH": ":".join(sys.path), "PYTHONHASHSEED": "7", "OMP_NUM_THREADS": "2"}
    out = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
    assert out.strip() == str(reference)


def test_the_stored_seed_replays_the_prompts(folder: MaskFolderSource) -> None:
    """What a cache of teachers' answers rests on: the item's seed, its masks and the config give its prompts."""
    prompts = config(objects=3, negative_points=(0, 2))
    for item in ObjectDataset(folder, VIEWS, prompts, folder.keys, 5, 1):  # type: ignore[attr-defined]
        assert prompts_equal(draw_prompts(item.masks, item.size, item.ask, prompts, item.seed), item.draws[0])
