"""``samdistill predict``: everything in one image that a phrase names or a box shows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..data.saco import to_rle
from ..engine import default_device
from ..evaluation.detections import draw_instances
from ..inference.concepts import Box, ConceptModel, Detected, ask_image, load_concept_model, open_image
from ..types import UserError

PICTURES = (".png", ".jpg", ".jpeg")


@dataclass(frozen=True)
class Prediction:
    """What was asked of an image and what was found in it, best first. name: of its file, or empty."""

    name: str
    image: Image.Image
    text: str | None
    boxes: tuple[Box, ...]
    detected: Detected

    def to_dict(self) -> dict[str, Any]:
        """Plain values: boxes as xyxy in pixels, masks as COCO's compressed run lengths."""
        found = self.detected
        instances = [
            {"score": score, "box": box, "area": int(mask.sum()), "segmentation": to_rle(mask.numpy())}
            for score, box, mask in zip(found.scores.tolist(), found.boxes.tolist(), found.masks, strict=True)
        ]
        return {
            "image": self.name, "text": self.text, "boxes": [list(box) for box in self.boxes], "instances": instances,
            "presence": found.presence,
        }  # fmt: skip

    def draw(self) -> Image.Image:
        """The image with masks, boxes and scores, at its own resolution."""
        found = self.detected
        labels = [f"{score:.2f}" for score in found.scores.tolist()]
        return Image.fromarray(draw_instances(np.asarray(self.image), found.masks, found.boxes, labels))


def parse_box(text: str) -> Box:
    """``left,top,right,bottom``. Raises ``UserError`` for anything but four numbers."""
    try:
        left, top, right, bottom = (float(part) for part in text.split(","))
    except ValueError:
        raise UserError(f"--box: {text!r} is not left,top,right,bottom in pixels, such as 10,20,110,90") from None
    return left, top, right, bottom


def predict(
    image: str | Path | Image.Image, model: str | Path | ConceptModel, text: str | None = None,
    boxes: Sequence[Box] = (), threshold: float = 0.5, geometry: str = "square", out: Path | None = None,
) -> Prediction:  # fmt: skip
    """Ask ``model`` for every instance of what ``text`` names, of what ``boxes`` show, or of both together.

    image: a file, or an opened one. model: what ``load_concept_model`` takes, or what it returned. boxes: xyxy in
    pixels of the image, a file's turned upright. threshold: least score, 0..1. geometry: square or longest_side. out: a
    PNG or JPEG to draw into. Raises ``UserError`` for what cannot be asked, read or written.
    """
    if not 0 <= threshold <= 1:
        raise UserError(f"--threshold: {threshold:g} is not between 0 and 1")
    if geometry not in ("square", "longest_side"):
        raise UserError(f"no geometry is called {geometry!r}; there is: longest_side, square")
    if out is not None and out.suffix.lower() not in PICTURES:
        raise UserError(f"--out: {out} does not end in {', '.join(PICTURES[:-1])} or {PICTURES[-1]}")
    if out is not None and not out.parent.is_dir():
        raise UserError(f"--out: there is no folder {out.parent}")
    picture = open_image(image)
    asked = load_concept_model(model, device=default_device()) if isinstance(model, str | Path) else model
    found = ask_image(asked, picture, text, boxes, threshold, geometry).to("cpu")
    name = "" if isinstance(image, Image.Image) else str(image)
    prediction = Prediction(name, picture, text, tuple(boxes), found)
    if out is not None:
        prediction.draw().save(out)
    return prediction
