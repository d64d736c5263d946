"""What a model found in one image, whatever the model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool, Float
from PIL import Image
from torch import Tensor

from ..data.saco import to_rle
from ..io import as_path, check_output, write_bytes
from ..ops.images import encoded
from ..types import UserError
from .drawing import draw_instances

PICTURES: dict[str, Literal["PNG", "JPEG"]] = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG"}
"""Endings of pictures that can be written."""


@dataclass(frozen=True, eq=False)
class Result:
    """The masks that a model gave for one image, best first where they were found by words.

    Attributes:
        image: The image, upright, in RGB.
        name: Path of its file, empty for an image from memory.
        masks: Boolean, (n, height, width), in pixels of the image, on the CPU.
        boxes: (n, 4), left, top, right, bottom around each mask, in pixels.
        scores: (n,), in 0..1: of a detection, or the predicted IoU of a prompted mask.
        text: The phrase that was asked for, None without one.
        shown: The boxes that were given as prompts, (left, top, right, bottom).
        points: The points that were given as prompts, (x, y, label).
        presence: Of a detector, the probability that the concept is in the image at all; None of a promptable model.
    """

    image: Image.Image
    name: str
    masks: Bool[Tensor, "n h w"]
    boxes: Float[Tensor, "n 4"]
    scores: Float[Tensor, " n"]
    text: str | None = None
    shown: tuple[tuple[float, float, float, float], ...] = ()
    points: tuple[tuple[float, float, int], ...] = ()
    presence: float | None = None

    def __len__(self) -> int:
        return len(self.scores)

    def draw(self) -> Image.Image:
        """The image with masks, boxes and scores, at its own resolution."""
        labels = [f"{score:.2f}" for score in self.scores.tolist()]
        return Image.fromarray(draw_instances(np.asarray(self.image), self.masks, self.boxes, labels))

    def save(self, path: str | Path) -> Path:
        """Write ``draw()`` to a ``.png`` or ``.jpg``.

        Raises:
            UserError: Another ending, or the file of the image itself.
        """
        place = picture_file(path, self.name)
        write_bytes(place, encoded(self.draw(), PICTURES[place.suffix.lower()]))
        return place

    def to_dict(self) -> dict[str, Any]:
        """Plain values: boxes in pixels, masks as COCO's compressed run lengths."""
        found: dict[str, Any] = {"image": self.name}
        found |= {"text": self.text} if self.presence is not None else {"points": [list(p) for p in self.points]}
        found |= {"boxes": [list(box) for box in self.shown], "instances": self._instances()}
        return found | ({} if self.presence is None else {"presence": self.presence})

    def _instances(self) -> list[dict[str, Any]]:
        return [
            {"score": score, "box": box, "area": int(mask.sum()), "segmentation": to_rle(mask.numpy())}
            for score, box, mask in zip(self.scores.tolist(), self.boxes.tolist(), self.masks, strict=True)
        ]

    def to_coco(self, image_id: int = 1, category_id: int = 1, first_id: int = 1) -> list[dict[str, Any]]:
        """Annotations of COCO, one per mask: box as left, top, width, height; mask as compressed run lengths.

        Args:
            image_id: Of the image.
            category_id: Of every instance.
            first_id: Of the first annotation; the others follow.
        """
        return [
            {
                "id": first_id + n, "image_id": image_id, "category_id": category_id, "score": one["score"],
                "bbox": [one["box"][0], one["box"][1], one["box"][2] - one["box"][0], one["box"][3] - one["box"][1]],
                "area": one["area"], "segmentation": one["segmentation"], "iscrowd": 0,
            }
            for n, one in enumerate(self._instances())
        ]  # fmt: skip

    def to_supervision(self) -> Any:
        """``supervision.Detections`` with boxes, masks and scores; class 0 for all.

        Raises:
            UserError: The package ``supervision`` is not installed.
        """
        try:
            import supervision
        except ImportError:
            raise UserError(
                "to_supervision: the package supervision is not installed; pip install 'samdistill[supervision]'"
            ) from None
        return supervision.Detections(
            xyxy=self.boxes.numpy().astype(np.float32).reshape(-1, 4), mask=self.masks.numpy(),
            confidence=self.scores.numpy(), class_id=np.zeros(len(self), dtype=int),
        )  # fmt: skip


def picture_file(path: str | Path, *others: str) -> Path:
    """Where a picture is written. Raises ``UserError`` for another ending, and for one of ``others``."""
    place, (*endings, last) = as_path(path), PICTURES
    if place.suffix.lower() not in PICTURES:
        raise UserError(f"--out: {place} does not end in {', '.join(endings)} or {last}")
    check_output(place, *(Path(other) for other in others if other))
    return place
