"""``Result``: the prediction for one image, for detectors and promptable models."""

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
"""Extensions of image files that can be written."""


@dataclass(frozen=True, eq=False)
class Result:
    """The masks predicted for one image: by descending score for a detector, in the order of the prompts otherwise.

    Attributes:
        image: The upright image in RGB.
        name: Path of the image file; empty for an image from memory.
        masks: Masks, bool, (n, height, width), in pixels of the image, on the CPU.
        boxes: Boxes (left, top, right, bottom) in pixels, (n, 4). A detector predicts them; those of a promptable model
            are tight around the masks.
        scores: Scores, (n,): the detection score in 0..1, or the predicted IoU of a promptable model.
        text: The phrase of the prompt, or None.
        prompt_boxes: The boxes of the prompt, (left, top, right, bottom) in pixels.
        points: The points of the prompt, (x, y, label) in pixels.
        presence: Probability in 0..1 that the concept is in the image. None for a promptable model.

    Example:
        >>> import numpy as np
        >>> from samdistill import predict
        >>> result = predict(np.zeros((126, 126, 3), np.uint8), "sandbox-mobile", points=[(60, 60)])
        >>> len(result), result.boxes.shape
        (1, torch.Size([1, 4]))
    """

    image: Image.Image
    name: str
    masks: Bool[Tensor, "n h w"]
    boxes: Float[Tensor, "n 4"]
    scores: Float[Tensor, " n"]
    text: str | None = None
    prompt_boxes: tuple[tuple[float, float, float, float], ...] = ()
    points: tuple[tuple[float, float, int], ...] = ()
    presence: float | None = None

    def __len__(self) -> int:
        return len(self.scores)

    def draw(self) -> Image.Image:
        """Return the image with masks, boxes and scores drawn on it, at its own resolution."""
        labels = [f"{score:.2f}" for score in self.scores.tolist()]
        return Image.fromarray(draw_instances(np.asarray(self.image), self.masks, self.boxes, labels))

    def save(self, path: str | Path) -> Path:
        """Write ``draw()`` to a ``.png``, ``.jpg`` or ``.jpeg`` file.

        Returns:
            The path.

        Raises:
            UserError: The extension is another one, or ``path`` is the image file itself.
        """
        place = picture_file(path, self.name)
        write_bytes(place, encoded(self.draw(), PICTURES[place.suffix.lower()]))
        return place

    def to_dict(self) -> dict[str, Any]:
        """Return values for JSON: boxes as xyxy in pixels, masks as COCO's compressed run-length encoding."""
        found: dict[str, Any] = {"image": self.name}
        found |= {"text": self.text} if self.presence is not None else {"points": [list(p) for p in self.points]}
        found |= {"boxes": [list(box) for box in self.prompt_boxes], "instances": self._instances()}
        return found | ({} if self.presence is None else {"presence": self.presence})

    def _instances(self) -> list[dict[str, Any]]:
        return [
            {"score": score, "box": box, "area": int(mask.sum()), "segmentation": to_rle(mask.numpy())}
            for score, box, mask in zip(self.scores.tolist(), self.boxes.tolist(), self.masks, strict=True)
        ]

    def to_coco(self, image_id: int = 1, category_id: int = 1, first_id: int = 1) -> list[dict[str, Any]]:
        """Return COCO annotations, one per mask. Boxes are xywh in pixels, masks in compressed run-length encoding.

        Args:
            image_id: Id of the image.
            category_id: Category id of every instance.
            first_id: Id of the first annotation. The others are numbered consecutively.
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
        """Convert to ``supervision.Detections`` with boxes, masks and scores. The class is 0 for all instances.

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
    """Check the path of an image to be written.

    Raises:
        UserError: The extension is not in ``PICTURES``, or the path is one of ``others``.
    """
    place, (*endings, last) = as_path(path), PICTURES
    if place.suffix.lower() not in PICTURES:
        raise UserError(f"--out: {place} does not end in {', '.join(endings)} or {last}")
    check_output(place, *(Path(other) for other in others if other))
    return place
