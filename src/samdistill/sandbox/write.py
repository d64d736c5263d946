"""Writers of rendered images in the layouts of SA-1B, COCO and SA-Co, which other tools can read.

The image of scene ``index`` of world ``seed`` has the id ``seed * 1,000,000 + index``, so keys of worlds are distinct.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, UInt8
from PIL import Image
from torchvision.ops import box_convert

from ..data.saco import ConceptPair, to_rle, write_concepts
from ..io import make_folder, sweep, write_bytes, write_json
from ..ops.images import encoded
from ..ops.masks import centre_points, masks_to_boxes
from ..reading import Table, read_json
from ..types import UserError
from .concepts import GENERIC, absent_phrase, phrases_of
from .scenes import COLOURS, SHAPES, SceneStyle, render_scenes

QUALITY = 92
WORLD = 1_000_000
"""Maximum number of scenes of a seed, so that image ids are distinct."""
CATEGORIES = [f"{colour} {shape}" for colour in COLOURS for shape in SHAPES]
POSITIVES, NEGATIVES = 2, 2
"""Phrases for each scene of a concept set that apply, and that do not."""
GENERIC_SHARE = 0.1
"""Probability that a positive phrase is ``GENERIC``, which applies to all objects."""
_PIXELS = 1 << 19  # pixels rendered at once; larger batches do not fit the CPU cache and are slower

Progress = Callable[[int, int], None]


class _Drawn(NamedTuple):
    """A rendered scene with its annotated objects. ``hidden`` has the names of objects too small to be annotated."""

    index: int
    image: UInt8[np.ndarray, "h w 3"]
    masks: Bool[torch.Tensor, "n h w"]
    concepts: list[tuple[str, ...]]
    hidden: list[tuple[str, ...]]


def _draw(indices: list[int], size: tuple[int, int], seed: int, style: SceneStyle) -> Iterator[_Drawn]:
    """Render scenes ``indices`` in order."""
    step = max(1, _PIXELS // (size[0] * size[1]))
    for first in range(0, len(indices), step):
        chunk = indices[first : first + step]
        scenes = render_scenes(chunk, size, seed, style)
        for row, index in enumerate(chunk):
            shows = scenes.masks[row].flatten(1).any(1)
            slots, hidden = (s.nonzero()[:, 0].tolist() for s in (scenes.valid[row], shows & ~scenes.valid[row]))
            names = scenes.concepts[row]
            image = scenes.images[row].permute(1, 2, 0).contiguous().numpy()
            yield _Drawn(index, image, scenes.masks[row, slots], [names[s] for s in slots], [names[s] for s in hidden])


def _jpeg(image: UInt8[np.ndarray, "h w 3"]) -> bytes:
    # no chroma subsampling, because it would blur the edges of objects
    return encoded(Image.fromarray(image), "JPEG", quality=QUALITY, subsampling=0)


def _claim(
    root: Path, split: str, count: int, size: int | tuple[int, int], seed: int, style: SceneStyle
) -> tuple[int, int]:
    """Check the arguments and record the settings of the split (see ``claim``)."""
    height, width = (size, size) if isinstance(size, int) else size
    if not 0 < count <= WORLD or height < 1 or width < 1:
        raise UserError(f"sandbox: count {count} (1 to {WORLD}) or size {height} x {width} is out of range")
    settings = {"size": [height, width], "seed": seed, "style": asdict(style), "quality": QUALITY}
    claim(root / f"sandbox-{split}.json", settings)
    return height, width


def claim(path: Path, settings: dict[str, Any]) -> None:
    """Record the settings of a split, so that a later call with other settings cannot mix its files in.

    Raises:
        UserError: The split was rendered with other settings.
    """
    again = f"delete {path.parent} or give another folder"
    if path.is_file() and read_json(path, Table, f"not the settings of a rendered split; {again}") != json.loads(
        json.dumps(settings)
    ):
        raise UserError(f"{path}: this split was rendered with other settings; {again}")
    make_folder(path.parent)
    write_json(path, settings)


def _objects(drawn: _Drawn) -> Iterator[tuple[dict[str, Any], int, list[float]]]:
    """Yield the run-length encoded mask, the area and the xywh box of each object."""
    boxes = box_convert(masks_to_boxes(drawn.masks), "xyxy", "xywh").tolist()
    for mask, box in zip(drawn.masks.numpy(), boxes, strict=True):
        yield to_rle(mask), int(mask.sum()), box


def _centre(mask: Bool[torch.Tensor, "h w"], box: list[float]) -> list[float]:
    """Return the centre point. It is computed within the box, which gives the same point much faster."""
    x, y, width, height = (int(v) for v in box)
    inside = centre_points(mask[None, y : y + height, x : x + width])[0].tolist()
    return [float(inside[0] + x), float(inside[1] + y)]


def _sa1b_record(drawn: _Drawn, image_id: int) -> dict[str, Any]:
    height, width = drawn.image.shape[:2]
    annotations = [
        {
            # a box of SA-1B ends at the last pixel and not after it, so width and height are 1 less than in COCO
            "bbox": [box[0], box[1], box[2] - 1, box[3] - 1],
            "area": area,
            "segmentation": runs,
            "predicted_iou": 1.0,
            "point_coords": [_centre(drawn.masks[slot], box)],
            "crop_box": [0.0, 0.0, float(width), float(height)],
            "id": image_id * 100 + slot,
            "stability_score": 1.0,
        }
        for slot, (runs, area, box) in enumerate(_objects(drawn))
    ]
    image = {"image_id": image_id, "width": width, "height": height, "file_name": f"sa_{image_id}.jpg"}
    return {"image": image, "annotations": annotations}


def write_sa1b(
    root: Path,
    count: int,
    size: int | tuple[int, int],
    seed: int,
    split: str = "train",
    style: SceneStyle = SceneStyle(),
    progress: Progress | None = None,
) -> list[str]:
    """Render scenes 0 to ``count - 1`` into ``root/images/<split>`` and ``root/annotations/<split>``.

    Existing files are kept, so an interrupted call can be repeated and a larger ``count`` adds scenes. The bytes of the
    files depend on the arguments only.

    Args:
        root: Output folder.
        count: Number of scenes.
        size: Side, or height and width, in pixels.
        seed: Number of the world.
        split: Name of the split.
        style: Distribution of the objects.
        progress: Called with the number of finished scenes and ``count`` after each scene.

    Returns:
        The keys of the images.

    Raises:
        UserError: ``count`` or ``size`` is out of range, or the split was rendered with other settings.
    """
    height_width = _claim(Path(root), split, count, size, seed, style)
    images, annotations = Path(root) / "images" / split, Path(root) / "annotations" / split
    for folder in (images, annotations):
        make_folder(folder)
        sweep(folder)
    keys = [f"sa_{seed * WORLD + index}" for index in range(count)]
    there = {p.stem for p in images.glob("sa_*.jpg")} & {p.stem for p in annotations.glob("sa_*.json")}
    missing = [index for index, key in enumerate(keys) if key not in there]
    for done, drawn in enumerate(_draw(missing, height_width, seed, style), count - len(missing) + 1):
        record = _sa1b_record(drawn, seed * WORLD + drawn.index)
        write_json(annotations / f"{keys[drawn.index]}.json", record)
        write_bytes(images / f"{keys[drawn.index]}.jpg", _jpeg(drawn.image))
        if progress is not None:
            progress(done, count)
    return keys


def write_coco(
    root: Path,
    count: int,
    size: int | tuple[int, int],
    seed: int,
    split: str = "train",
    style: SceneStyle = SceneStyle(),
    progress: Progress | None = None,
) -> list[str]:
    """Render scenes into ``root/images/<split>`` and ``root/annotations/instances_<split>.json`` (COCO).

    Categories are the 120 pairs of colour and shape ("red circle"), with ids 1 to 120. Each annotation has an
    additional list ``concepts`` with the phrases that apply ("circle", "red", "red circle"; see ``concepts.PHRASES``).
    The JSON file is written last. A repeated call renders all scenes again and keeps existing images.

    Scenes, arguments, return value and errors are those of ``write_sa1b``.
    """
    height, width = _claim(Path(root), split, count, size, seed, style)
    images, target = Path(root) / "images" / split, Path(root) / "annotations" / f"instances_{split}.json"
    for folder in (images, target.parent):
        make_folder(folder)
        sweep(folder)
    ids = [seed * WORLD + index for index in range(count)]
    keys = [f"{image_id:012d}" for image_id in ids]
    numbers = {name: number for number, name in enumerate(CATEGORIES, 1)}
    annotations: list[dict[str, Any]] = []
    for done, drawn in enumerate(_draw(list(range(count)), (height, width), seed, style), 1):
        for slot, (runs, area, box) in enumerate(_objects(drawn)):
            names = drawn.concepts[slot]
            annotations.append({
                "id": ids[drawn.index] * 100 + slot, "image_id": ids[drawn.index], "iscrowd": 0, "area": area,
                "category_id": next(numbers[n] for n in names if n in numbers), "bbox": box, "segmentation": runs,
                "concepts": list(phrases_of(names)),
            })  # fmt: skip
        path = images / f"{keys[drawn.index]}.jpg"
        if not path.is_file():
            write_bytes(path, _jpeg(drawn.image))
        if progress is not None:
            progress(done, count)
    record = {
        "info": {"description": "samdistill sandbox", "seed": seed, "count": count},
        "licenses": [],
        "images": [{"id": i, "file_name": f"{k}.jpg", "height": height, "width": width}
                   for i, k in zip(ids, keys, strict=True)],
        "annotations": annotations,
        "categories": [{"id": n, "name": name, "supercategory": name.split()[1]} for name, n in numbers.items()],
    }  # fmt: skip
    write_json(target, record)
    return keys


def _questions(drawn: _Drawn, rng: np.random.Generator) -> dict[str, list[int]]:
    """Draw phrases for a scene. Returns the annotated objects that each applies to, none for negative phrases."""
    names, hidden = ([phrases_of(concepts) for concepts in group] for group in (drawn.concepts, drawn.hidden))
    asked: dict[str, list[int]] = {}
    while names and len(asked) < POSITIVES:
        phrase = GENERIC if rng.random() < GENERIC_SHARE else str(rng.choice(names[rng.integers(len(names))]))
        asked[phrase] = [slot for slot, own in enumerate(names) if phrase == GENERIC or phrase in own]
    positives = len(asked)
    while len(asked) < positives + NEGATIVES:
        asked[absent_phrase([*names, *hidden], rng)] = []
    return asked


def write_concept_set(
    root: Path,
    count: int,
    size: int | tuple[int, int],
    seed: int,
    split: str = "val",
    style: SceneStyle = SceneStyle(),
    progress: Progress | None = None,
) -> Path:
    """Write phrases for the scenes of ``write_coco`` with ground truth to ``root/concepts_<split>.json`` (SA-Co).

    Each scene has ``POSITIVES`` phrases that apply (none if no object is annotated) and ``NEGATIVES`` that do not (see
    ``absent_phrase``). They depend on the seed and the number of the scene only. Ground truth is the visible mask of
    every annotated object that the phrase applies to.

    Arguments and errors are those of ``write_coco``. Returns the path of the file.
    """
    height, width = _claim(Path(root), split, count, size, seed, style)
    pairs: list[ConceptPair] = []
    for done, drawn in enumerate(_draw(list(range(count)), (height, width), seed, style), 1):
        image_id, rles = seed * WORLD + drawn.index, [runs for runs, _, _ in _objects(drawn)]
        questions = _questions(drawn, np.random.default_rng((seed, drawn.index, 1)))
        for number, (phrase, slots) in enumerate(questions.items()):
            pair_id, name = image_id * 100 + number, f"{split}/{image_id:012d}.jpg"
            pairs.append(ConceptPair(pair_id, name, phrase, height, width, tuple(rles[slot] for slot in slots)))
        if progress is not None:
            progress(done, count)
    target = Path(root) / f"concepts_{split}.json"
    write_concepts(target, pairs)
    return target
