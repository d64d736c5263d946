"""Tracking in a video with the memory of a SAM 2 or a SAM 3, in transformers' own models, frame by frame."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from transformers import Sam2VideoModel
from transformers.models.sam2_video.modeling_sam2_video import Sam2VideoInferenceSession
from transformers.models.sam3_tracker_video.modeling_sam3_tracker_video import Sam3TrackerVideoInferenceSession
from transformers.models.sam3_video import modeling_sam3_video
from transformers.models.sam3_video.modeling_sam3_video import Sam3VideoInferenceSession

from ..checkpoints.processors import inputs_of
from ..checkpoints.trackers import Tracker, Worded
from ..checkpoints.words import Words
from ..data.transforms import Geometry
from ..ops.images import normalise
from ..ops.sights import Sight, Tracked
from ..reading import running
from ..types import UserError
from .geometry import check_geometry
from .points import Point, labelled
from .session import Session, Shown

_HELD = ("pred_masks", "high_res_masks")
"""Masks that transformers stores with every frame and does not read again."""


class _Streamed(Session):
    """A session of transformers that gets one frame at a time, and forgets what no later frame reads."""

    def __init__(
        self, model: Any, tracker: Any, session: Any, words: Words | None, threshold: float, geometry: str | None
    ) -> None:
        self._about = inputs_of(model.config)
        kind = self._about.geometry if geometry is None else geometry
        super().__init__(Geometry(self._about.side, check_geometry(kind)), words, threshold)
        self._model, self._session = model, session
        self.context = int(tracker.config.num_maskmem)
        self._reach = max(self.context, int(tracker.config.max_object_pointers_in_encoder)) - 1

    def _advance(self, frame: UInt8[np.ndarray, "h w 3"]) -> Any:
        """Run the model on the next frame, and return its output."""
        canvas = self._place.canvas(Image.fromarray(frame))[0][None].to(self._model.device)
        pixels = normalise(canvas, self._about.mean, self._about.std)
        with running(self._model):
            found = self._model(inference_session=self._session, frame=pixels, frame_idx=self._number)
        self._session.processed_frames[self._number] = None  # the number of frames counts, not their pixels
        for outputs in self._session.output_dict_per_obj.values():
            past = outputs["non_cond_frame_outputs"]
            past.pop(self._number - self._reach, None)
            for stored in (past.get(self._number), outputs["cond_frame_outputs"].get(self._number)):
                for name in _HELD if stored is not None else ():
                    stored.pop(name, None)
        return found

    def _on_frame(self, logits: Float[Tensor, "a b"]) -> Float[Tensor, "h w"]:
        side = (self._place.image_size, self._place.image_size)
        canvas = F.interpolate(logits[None, None].float(), side, mode="bilinear", align_corners=False)
        return self._place.masks_back(canvas[0, 0], self._size)

    def _tracked(self, object_id: int, phrase: str | None, score: float, mask: np.ndarray) -> Tracked:
        sight = Sight.of(score, mask) if score >= self.threshold else None
        if sight is None:
            return Tracked(object_id, phrase, score, False, np.zeros(self._size, bool), (0.0,) * 4)
        left, top, right, bottom = map(float, sight.box)
        return Tracked(object_id, phrase, score, True, sight.mask, (left, top, right, bottom))

    @property
    def memory_bytes(self) -> int:
        """Bytes of all tensors that the session keeps for later frames, of all objects."""
        stored = [
            tensor for outputs in self._session.output_dict_per_obj.values() for frames in outputs.values()
            for frame in frames.values() for tensor in frame.values() if isinstance(tensor, Tensor)
        ]  # fmt: skip
        # tensors of objects that were encoded together share a storage, of which each is a part
        return sum(tensor.numel() * tensor.element_size() for tensor in stored)


class TrackerSession(_Streamed):
    """Tracks objects through one video with the memory of a SAM 2 or a SAM 3. Memory use does not grow with its length.

    The answers are those of transformers' session that is given one frame at a time. Masks of two objects may overlap.
    A name is not read by the model.

    Example:
        >>> from samdistill.checkpoints.trackers import load_tracker  # doctest: +SKIP
        >>> session = TrackerSession(load_tracker("small_sam3"))  # doctest: +SKIP
        >>> session.add_points([(60, 50)])  # doctest: +SKIP
        1
    """

    def __init__(self, model: Tracker, *, threshold: float = 0.5, geometry: str | None = None) -> None:
        """Start a session.

        Args:
            model: The model, as of ``load_tracker``.
            threshold: Minimum probability of a visible object to be in the frame.
            geometry: ``square`` or ``longest_side``; None uses the geometry saved with the model.

        Raises:
            UserError: A value is out of range.
        """
        kind = Sam2VideoInferenceSession if isinstance(model, Sam2VideoModel) else Sam3TrackerVideoInferenceSession
        session = kind(
            inference_device=model.device, inference_state_device=model.device, video_storage_device=model.device,
            dtype=model.dtype,
        )  # fmt: skip
        super().__init__(model, model, session, None, threshold, geometry)
        self._phrases: dict[int, str | None] = {}

    def add_points(self, points: Sequence[Point | tuple[float, float]], text: str | None = None) -> int:
        """Track the object with ``points`` in the next frame, and return its id.

        Args:
            points: Points (x, y) or (x, y, label) in pixels. Label 1 (the default) is inside the object, 0 outside.
            text: A name of the object.

        Raises:
            UserError: There is no point inside, a point is outside the frame (raised by ``push`` before the first
                frame), or there are too many objects.
        """
        found = labelled(points)
        if any(label not in (0, 1) for *_, label in found) or all(label == 0 for *_, label in found):
            raise UserError("--point: give at least one point inside the object, with label 1; others have label 0")
        return self._show(Shown(self._new_id(None), text, points=found))

    def add_text(self, phrase: str) -> None:
        """Raise ``UserError``: the model takes no words."""
        raise UserError(
            f"a {type(self._model).__name__} takes no words in a video; give --box or --point, or a folder of a "
            "Sam3VideoModel"
        )

    def push(self, frame: UInt8[np.ndarray, "h w 3"]) -> tuple[Tracked, ...]:
        """Process the next frame.

        Args:
            frame: RGB frame, uint8.

        Returns:
            All objects of the session in the order in which they were added, including those that are not visible.

        Raises:
            UserError: ``frame`` is not an RGB frame of the first frame's size, or a prompt does not fit it; see
                ``VideoSession.push``. Or the model cannot run.
        """
        for one in self._next(frame):
            self._prompt(one)
        found = []
        if self._phrases:
            answer = self._advance(frame)
            scores = answer.object_score_logits.float().sigmoid().flatten().tolist()
            for object_id, logits, score in zip(answer.object_ids, answer.pred_masks[:, 0], scores, strict=True):
                mask = (self._on_frame(logits) > 0).cpu().numpy()
                found.append(self._tracked(object_id, self._phrases[object_id], score, mask))
        self._number += 1
        return tuple(found)

    def _taken(self) -> set[int]:
        return set(self._phrases)

    def _prompt(self, shown: Shown) -> None:
        """Give an object of the next frame to transformers' session."""
        session = self._session
        self._phrases[shown.object_id] = shown.phrase
        index = session.obj_id_to_idx(shown.object_id)
        session.obj_with_new_inputs.append(shown.object_id)
        if shown.mask is not None:
            session.add_mask_inputs(index, self._number, self._place.mask(shown.mask)[None, None].float())
            return
        xy, labels = (_corners(shown.box), [2, 3]) if shown.box is not None else _inside(shown.points)
        # points are pixel indices, corners continuous coordinates; the model adds half a pixel to both
        shift = 0.0 if shown.box is not None else 0.5
        coordinates = self._place.points(xy + shift, self._size) - shift
        session.add_point_inputs(index, self._number, {
            "point_coords": coordinates.view(1, 1, -1, 2).to(self._model.dtype),
            "point_labels": torch.tensor(labels, dtype=torch.int32).view(1, 1, -1),
        })  # fmt: skip


class WordSession(_Streamed):
    """Tracks every instance of a phrase with a ``Sam3VideoModel``: its detector, and its tracker's memory.

    The answers are those of transformers' session that is given one frame at a time, without the code that
    transformers can download for removing duplicates and holes. Ids of objects begin at 1.
    """

    def __init__(self, worded: Worded, *, threshold: float = 0.5, geometry: str | None = None) -> None:
        """Start a session.

        Args:
            worded: The model, as of ``load_worded``.
            threshold: Minimum score of a visible object. The scores at which a detection counts and begins an object
                are the model's (``score_threshold_detection``, ``new_det_thresh``).
            geometry: ``square`` or ``longest_side``; None uses the geometry saved with the model.

        Raises:
            UserError: A value is out of range.
        """
        modeling_sam3_video.cv_utils_kernel = False  # None would let transformers fetch and run code
        model = worded.model
        session = Sam3VideoInferenceSession(
            inference_device=model.device, inference_state_device=model.device, video_storage_device=model.device,
            dtype=model.dtype,
        )  # fmt: skip
        super().__init__(model, model.tracker_model, session, worded.words, threshold, geometry)
        self._words = worded.words

    def add_text(self, phrase: str) -> None:
        """Track every instance of ``phrase`` from the next frame on.

        Raises:
            UserError: The phrase is empty or too long.
        """
        self._check_name(phrase)
        number = self._session.add_prompt(phrase)
        ids, mask = (part.to(self._model.device) for part in self._words.encode([phrase]))
        self._session.prompt_input_ids[number], self._session.prompt_attention_masks[number] = ids, mask

    def push(self, frame: UInt8[np.ndarray, "h w 3"]) -> tuple[Tracked, ...]:
        """Process the next frame.

        Args:
            frame: RGB frame, uint8.

        Returns:
            The objects that transformers shows in this frame, by id. A pixel of several masks belongs to the object of
            the same phrase with the highest score.

        Raises:
            UserError: ``frame`` is not an RGB frame of the first frame's size; objects were given by a box or a mask,
                which only ``TrackerSession`` tracks; there is no phrase; or the model cannot run.
        """
        if self._next(frame):
            raise UserError("a session in words takes no boxes and masks; use a TrackerSession for these")
        if not self._session.prompts:
            raise UserError("no prompt given: give --text")
        answer = self._advance(frame)
        masks = {number: self._on_frame(logits[0]) > 0 for number, logits in sorted(answer.obj_id_to_mask.items())}
        hidden = set(answer.suppressed_obj_ids or ())
        shown = [number for number, mask in masks.items() if number not in hidden and bool(mask.any())]
        scores = {number: float(answer.obj_id_to_tracker_score.get(number, 0.0)) for number in shown}
        found, phrase_of = list[Tracked](), self._session.obj_id_to_prompt_id
        for number in shown:
            mask = masks[number]
            for other in shown:
                # of equal scores the first object keeps the pixel, as in transformers
                ahead = (-scores[other], other) < (-scores[number], number)
                if phrase_of[other] == phrase_of[number] and ahead:
                    mask = mask & ~masks[other]
            phrase = self._session.prompts[phrase_of[number]]
            found.append(self._tracked(number + 1, phrase, scores[number], mask.cpu().numpy()))
        self._number += 1
        return tuple(found)

    def _taken(self) -> set[int]:
        return set()


def _corners(box: Any) -> Float[Tensor, "2 2"]:
    return torch.tensor(box, dtype=torch.float32).view(2, 2)


def _inside(points: tuple[Point, ...]) -> tuple[Float[Tensor, "k 2"], list[int]]:
    return torch.tensor([point[:2] for point in points], dtype=torch.float32), [point[2] for point in points]
