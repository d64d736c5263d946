"""Run a model that samdistill exported to ONNX: masks from points, boxes or words, and objects tracked in a video.

This file needs NumPy, Pillow and onnxruntime, and no other file than those of its own folder. Results are those of the
PyTorch model: images are resized with the same fixed-point arithmetic, and a video gives the same object ids.

Example:
    python predict.py photo.jpg --point 320,240 --out seen.png
    python predict.py photo.jpg --text "red car" --out seen.png
    python predict.py --frames video/ --text "red car" --out seen/

    >>> from predict import Model
    >>> model = Model("exported")
    >>> model("photo.jpg", boxes=[(10, 20, 110, 90)]).masks.shape
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from .files import PRECISIONS, ModelError, one_line
from .images import Box, draw, list_frames, open_image, runs
from .model import Model


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command. Returns the exit code: 0, or 2 for a fault of the input, which is printed in one line."""
    parser = argparse.ArgumentParser(description="Run an exported model on an image or on the frames of a video.")
    for names, settings in _OPTIONS:
        parser.add_argument(*names.split(), **settings)
    given = parser.parse_args(arguments)
    try:
        if (given.image is None) == (given.frames is None):
            raise ModelError("give an image, or --frames with a folder")
        if given.frames is not None and given.point:
            raise ModelError("--point: objects of a video are given by --text or --box")
        model = Model(given.model, given.precision, threads=given.threads)
        (_image if given.frames is None else _frames)(
            model, given, [_numbers("--box", one, 4, 4) for one in given.box],
            [_numbers("--point", one, 2, 3) for one in given.point],
        )  # fmt: skip
    except ModelError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


_OPTIONS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("image", {"nargs": "?", "help": "an image file"}),
    ("--frames", {"metavar": "DIR", "help": "a folder of video frames, instead of an image"}),
    ("--text", {"metavar": "PHRASE", "help": "a noun phrase, for a detector"}),
    ("--box", {"action": "append", "default": [], "metavar": "X0,Y0,X1,Y1", "help": "a box in pixels"}),
    ("--point", {"action": "append", "default": [], "metavar": "X,Y[,LABEL]",
                 "help": "a point in pixels, label 0 if it is outside the object"}),
    ("--threshold", {"type": float, "default": 0.5, "metavar": "P", "help": "minimum score (default: 0.5)"}),
    ("--out", {"metavar": "PNG", "help": "draw the masks; with --frames, a folder"}),
    ("--json", {"action": "store_true", "help": "print JSON, with the masks run-length encoded"}),
    ("--model", {"default": str(Path(__file__).parent), "metavar": "DIR",
                 "help": "the exported folder (default: the one of this file)"}),
    ("--precision", {"choices": PRECISIONS, "help": "which files (default: the best)"}),
    ("--threads", {"type": int, "default": 0, "metavar": "N"}),
)  # fmt: skip


def _numbers(option: str, text: str, least: int, most: int) -> tuple[float, ...]:
    try:
        found = tuple(map(float, text.split(",")))
    except ValueError:
        found = ()
    if not least <= len(found) <= most:
        raise ModelError(f"{option}: {text!r} is not {least} numbers with commas between them")
    return found


def _image(model: Model, given: argparse.Namespace, boxes: Sequence[Box], points: Sequence[Box]) -> None:
    found = model(given.image, given.text, points=points, boxes=boxes, threshold=given.threshold)
    rows = list(zip(found.scores.tolist(), found.boxes.tolist(), found.masks, strict=True))
    if given.json:
        instances = [{"score": score, "box": box, "mask": runs(mask)} for score, box, mask in rows]
        print(json.dumps({"presence": found.presence, "instances": instances}))
    else:
        for score, box, _ in rows:
            print(f"score {score:.3f}  box {', '.join(f'{value:.1f}' for value in box)}")
        print(f"{len(rows)} instances")
    if given.out:
        _save(found.draw(), Path(given.out))


def _frames(model: Model, given: argparse.Namespace, boxes: Sequence[Box], points: Sequence[Box]) -> None:
    paths = list_frames(Path(given.frames))
    followed = model.track(paths, given.text, boxes=boxes, threshold=given.threshold)
    for path, objects in zip(paths, followed, strict=True):
        shown = {n: one for n, one in enumerate(objects) if one.visible}
        if given.json:
            rows = [{"id": o.object_id, "score": o.score, "box": o.box, "mask": runs(o.mask)} for o in shown.values()]
            print(json.dumps({"frame": path.name, "objects": rows}))
        else:
            print(f"{path.name}  {', '.join(f'{o.object_id}: {o.score:.2f}' for o in shown.values()) or '-'}")
        if given.out:
            masks, labels = {n: o.mask for n, o in shown.items()}, [str(o.object_id) for o in shown.values()]
            _save(draw(open_image(path), masks, labels), Path(given.out) / f"{path.stem}.png")


def _save(image: Image.Image, path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path)
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: cannot be written: {one_line(error)}") from None


if __name__ == "__main__":
    sys.exit(main())
