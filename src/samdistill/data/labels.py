"""Labels of questions: the annotated objects that a phrase names, placed on the canvas as the image is."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from ..types import QuestionLabels, UserError
from .loader import ImageItem
from .phrases import normalised
from .sources import Instance, Source
from .transforms import ViewTransform

_ID = re.compile(r"(id|cat|category|class|cls|label|lbl|type|group|item|obj|object|instance|segment|region)s? ?\d+")
_NOTHING = {
    "none", "null", "nan", "nil", "unknown", "unlabeled", "unlabelled", "undefined", "unnamed", "void", "ignore",
    "ignored", "background", "other", "others", "misc", "placeholder",
}  # fmt: skip
"""Names in place of a name."""


class Labels(NamedTuple):
    """What the annotations say about one question. See ``QuestionLabels`` for the fields."""

    masks: UInt8[Tensor, "n s s"]
    boxes: Float[Tensor, "n 4"]
    present: bool
    complete: bool


class ImageLabels:
    """Labels of the questions about one view of an image.

    An object counts if the view shows at least one pixel of the canvas of it, in both directions. If it shows less, a
    query that finds the object is not wrong: the question is not complete, and without another object it is unknown.

    Args:
        source: Images with masks and names.
        transform: Augmentation and geometry.
        item: The view.
        side: Cells of the masks in each direction.

    Raises:
        BadImage: The annotation is damaged.
    """

    def __init__(self, source: Source, transform: ViewTransform, item: ImageItem, side: int) -> None:
        self.source, self.transform, self.item, self.side = source, transform, item, side
        self.instances = source.instances(item.key)

    def of_phrase(self, phrase: str) -> Labels | None:
        """Return the labels of a phrase, or None if it is not known whether the view shows an object of it.

        A group of objects (``crowd``) is no object, but its phrase is present. The phrase is then not complete.
        """
        own = [one for one in self.instances if phrase in one.names]
        masks, boxes = self._placed([one for one in own if not one.crowd])
        _, groups = self._placed([one for one in own if one.crowd])
        sides = boxes[:, 2:] - boxes[:, :2]
        shown, hardly = (sides >= 1).all(-1), ((sides > 0) & (sides < 1)).any(-1)
        whole = not bool(hardly.any()) and all(one.mask.any() for one in own)  # an outline can be thinner than a pixel
        complete = whole and self.source.complete(self.item.key, phrase)
        present = bool(shown.any()) or bool((groups[:, 2:] > groups[:, :2]).any())
        if not present and not complete:
            return None
        return Labels(masks[shown], boxes[shown] / self.item.image.shape[-1], present, complete)

    def of_box(self, number: int) -> Labels | None:
        """Return the labels of the question with the box of an object: all objects of its name.

        None for an object with several names, such as "circle" and "red circle", since the box does not tell which one
        is meant.

        Args:
            number: Number of the object among those that are not crowds, as in ``Source.boxes``.
        """
        names = [one for one in self.instances if not one.crowd][number].names
        return self.of_phrase(names[0]) if len(names) == 1 else None

    def _placed(self, own: Sequence[Instance]) -> tuple[UInt8[Tensor, "n s s"], Float[Tensor, "n 4"]]:
        """Return masks, and boxes in canvas pixels, of what the view shows of objects."""
        size = self.item.original_size
        masks = np.stack([one.mask for one in own]) if own else np.zeros((0, *size), bool)
        return self.transform.objects(masks, size, self.item.seed, self.side)


def collate_labels(labels: Sequence[Labels | None], side: int) -> QuestionLabels:
    """Collate the labels of questions. None stands for a question whose labels are unknown.

    Args:
        labels: Labels of each question.
        side: Cells of the masks in each direction.
    """
    counts = [0 if one is None else len(one.boxes) for one in labels]
    valid = torch.arange(max([1, *counts])) < torch.tensor(counts)[:, None]
    boxes = torch.zeros(*valid.shape, 4)
    found = [one for one in labels if one is not None]
    boxes[valid] = torch.cat([torch.zeros(0, 4), *(one.boxes for one in found)])
    masks = torch.cat([torch.zeros(0, side, side, dtype=torch.uint8), *(one.masks for one in found)])
    known, present, complete = torch.tensor(
        [(False,) * 3 if one is None else (True, one.present, one.complete) for one in labels]
    ).view(-1, 3).unbind(1)  # fmt: skip
    return QuestionLabels(masks, boxes, valid, known, present, complete)


def is_phrase(name: str) -> bool:
    """Return whether a name can be a noun phrase, and not an id, a number or a placeholder.

    It needs a word of letters alone: two letters or more, or one of a script without upper and lower case. It is none
    if it is a word such as "category" with a number, or stands for a missing name, such as "unknown".

    Example:
        >>> [is_phrase(name) for name in ("traffic_light", "boeing 747", "cat_17", "0", "N/A", "n02084071", "")]
        [True, True, False, False, False, False, False]
    """
    plain = normalised(name)
    words = [word for word in plain.split() if word.isalpha()]
    named = any(len(word) > 1 or word.upper() == word.lower() for word in words)
    return named and plain not in _NOTHING and _ID.fullmatch(plain) is None


def require_labels(source: Source, term: str) -> None:
    """Refuse data whose phrases have no labels.

    Args:
        source: The images.
        term: Name of a loss term that needs labels.

    Raises:
        UserError: The data have no masks or no names, a name is no phrase, or the objects of a name have no masks.
    """
    names = source.vocabulary
    if not source.labelled or not names:
        lack = "masks, but no names" if source.labelled else "no masks and no names"
        raise UserError(f"loss.{term}: the data set has {lack}, so its phrases have no labels; set data.kind=coco or "
                        "saco, or leave out the label terms")  # fmt: skip
    if bad := [name for name in names if not is_phrase(name)]:
        raise UserError(f"loss.{term}: {len(bad)} of {len(names)} categories are no phrases: {_some(bad)}; give them "
                        "names in words, or leave out the label terms")  # fmt: skip
    masked = {phrase for key in source.keys for phrase in source.phrases(key)}
    if lost := sorted({phrase for key in source.keys for phrase in source.unmasked(key)} - masked):
        raise UserError(f"loss.{term}: no object of {_some(lost)} has a mask; give segmentations, or leave out the "
                        "label terms")  # fmt: skip


def _some(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names[:4])) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
