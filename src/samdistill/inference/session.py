"""What every video session shares: the prompts of the next frame, and checks of prompts and frames."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, UInt8

from ..checkpoints.words import Phrases
from ..data.transforms import Geometry, Size
from ..ops.sights import MOST_OBJECTS, Tracked
from ..types import UserError
from .concepts import Box, check_boxes, check_phrase
from .points import Point


@dataclass(frozen=True, eq=False)
class Shown:
    """An object to be added at the next frame, given by a box, a mask or points."""

    object_id: int
    phrase: str | None
    box: Box | None = None
    mask: Bool[np.ndarray, "h w"] | None = None
    points: tuple[Point, ...] = ()


class Session(ABC):
    """Objects that are tracked through one video, whose frames are given in order.

    Attributes:
        context: Number of past frames in the memory.
        threshold: Minimum score of a visible object, in 0..1.
        crowded: Whether instances were left out because a session has at most ``MOST_OBJECTS`` objects.
    """

    context: int

    def __init__(self, place: Geometry, words: Phrases | None, threshold: float) -> None:
        """Start a session.

        Args:
            place: Canvas of the model.
            words: What reads the phrases that name objects; None for a model without words, which takes any name.
            threshold: Minimum score of a visible object.

        Raises:
            UserError: The threshold is out of range.
        """
        if not 0 <= threshold <= 1:
            raise UserError(f"threshold {threshold:g} is not between 0 and 1")
        self.threshold, self.crowded = threshold, False
        self._place, self._readable, self._number, self._size = place, words, 0, (0, 0)
        self._shown: dict[int, Shown] = {}

    @abstractmethod
    def push(self, frame: UInt8[np.ndarray, "h w 3"]) -> tuple[Tracked, ...]:
        """Process the next frame. Return all objects of the session, including those that are not visible."""

    @abstractmethod
    def add_text(self, phrase: str) -> None:
        """Track every instance of ``phrase``."""

    @abstractmethod
    def _taken(self) -> set[int]:
        """Return the ids of the objects that are tracked already."""

    def add_box(self, box: Box, text: str | None = None) -> int:
        """Track the object in ``box`` (xyxy, pixels) of the next frame, and return its id.

        ``text`` is a phrase that names the object.

        Raises:
            UserError: The box is empty or outside the frame (raised by ``push`` before the first frame), the phrase is
                empty or too long, or there are too many objects.
        """
        self._check_name(text)
        return self._show(Shown(self._new_id(None), text, tuple(map(float, box))))  # type: ignore[arg-type]

    def add_mask(self, mask: Bool[np.ndarray, "h w"], text: str | None = None, object_id: int | None = None) -> int:
        """Track the object with ``mask`` in the next frame, and return its id.

        Args:
            mask: The mask, bool, at the size of the frame.
            text: A phrase that names the object.
            object_id: Id of the object; None for the smallest free one.

        Raises:
            UserError: The mask is empty or of another size than the frames (raised by ``push`` before the first frame),
                the id is in use, the phrase is empty or too long, or there are too many objects.
        """
        self._check_name(text)
        if not isinstance(mask, np.ndarray) or mask.dtype != np.bool_ or mask.ndim != 2:
            raise UserError("a mask must be a bool array (height, width)")
        if not mask.any():
            raise UserError("the mask is empty: it shows no object")
        return self._show(Shown(self._new_id(object_id), text, mask=mask.copy()))

    def add_points(self, points: Sequence[Point | tuple[float, float]], text: str | None = None) -> int:
        """Raise ``UserError``: only the memory of a SAM takes points, see ``TrackerSession.add_points``."""
        raise UserError("--point: only a SAM with a memory follows an object from points; give --text or --box")

    def _check_name(self, text: str | None) -> None:
        if text is not None and self._readable is not None:
            check_phrase(self._readable, text)

    def _new_id(self, wanted: int | None) -> int:
        taken = self._taken() | self._shown.keys()
        if len(taken) >= MOST_OBJECTS:
            raise UserError(f"a session has at most {MOST_OBJECTS} objects; use another session for the others")
        if wanted is None:
            return next(number for number in range(1, len(taken) + 2) if number not in taken)
        if wanted in taken:
            raise UserError(f"object id {wanted} is in use; give another one, or leave out object_id")
        return wanted

    def _show(self, shown: Shown) -> int:
        if self._number:
            self._check_fits(shown, self._size)
        self._shown[shown.object_id] = shown
        return shown.object_id

    def _next(self, frame: UInt8[np.ndarray, "h w 3"]) -> list[Shown]:
        """Check the next frame, and return the objects that are added at it.

        Raises:
            UserError: The frame is no RGB frame of the first frame's size, or a prompt does not fit it. In the second
                case, all prompts added since the last frame are discarded.
        """
        self._check_frame(frame)
        shown, self._shown = list(self._shown.values()), {}
        for one in shown:
            self._check_fits(one, frame.shape[:2])
        self._size = frame.shape[:2]
        return shown

    def _check_fits(self, shown: Shown, size: Size) -> None:
        if shown.box is not None:
            check_boxes([shown.box], size)
        if shown.mask is not None and shown.mask.shape != size:
            (height, width), (h, w) = shown.mask.shape, size
            raise UserError(f"the mask of object {shown.object_id} is {width} x {height} pixels, the frame {w} x {h}")
        for x, y, _ in shown.points:
            if not (0 <= x < size[1] and 0 <= y < size[0]):
                raise UserError(f"--point: {x:g},{y:g} is outside the image, which is {size[1]} x {size[0]} pixels")

    def _check_frame(self, frame: UInt8[np.ndarray, "h w 3"]) -> None:
        if not isinstance(frame, np.ndarray) or frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[2] != 3:
            found = f"{frame.dtype} of {frame.shape}" if isinstance(frame, np.ndarray) else type(frame).__name__
            raise UserError(f"frame {self._number} must be a uint8 array (height, width, 3), got {found}")
        if not frame.size:
            raise UserError(f"frame {self._number} has no pixels")
        if self._number and frame.shape[:2] != self._size:
            (height, width), (h, w) = frame.shape[:2], self._size
            raise UserError(f"frame {self._number} is {width} x {height} pixels, the first one {w} x {h}")
