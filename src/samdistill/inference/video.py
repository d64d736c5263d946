"""Tracking in a video, frame by frame: objects given by a phrase, a box or a mask keep one id."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import box_convert, box_iou
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.sam3_lite_text.modeling_sam3_lite_text import Sam3LiteTextVisionEncoderOutput

from ..data.transforms import Geometry, Size
from ..ops.sights import LEAST_SCORE, MOST_OBJECTS, SAME, Sight, Track, Tracked, apart, overlap
from ..types import VISUAL, DetectorOutput, UserError
from .concepts import Box, StudentDetector, check_phrase, detections
from .geometry import check_geometry, own_geometry
from .session import Session, Shown
from .tracks import Memory, Ring, assign


@dataclass(frozen=True, eq=False)
class _Frame:
    """An encoded frame and its results: visible instances and scores by object id, instances without memory by phrase.

    ``placed`` is the height and width of the part of the canvas that is not padding.
    """

    vision: Sam3LiteTextVisionEncoderOutput
    placed: Size
    sights: dict[int, Sight] = field(default_factory=dict)
    scores: dict[int, float] = field(default_factory=dict)
    plain: dict[str, list[Sight]] = field(default_factory=dict)


class VideoSession(Session):
    """Tracks objects through one video, whose frames are given in order. Memory use does not grow with its length.

    Every frame is encoded once. The first frame and every ``stride``-th frame after it enter the memory, and also every
    frame in which an object is added. The memory holds ``context`` frames.

    A student whose memory was trained with marks gets one query per object, with the object's marks in the frames of
    the memory. The object is visible if the presence probability is at least ``threshold``. A pixel that several masks
    cover belongs to the one with the largest logit. An object that no frame of the memory shows is no longer queried;
    only ``add_text`` can find it again.

    Any other student gets one query per phrase, with the memory or, without one, as for a still image. Instances are
    assigned to objects by their IoU with each object's last visible mask, regardless of their score.

    A session has at most ``MOST_OBJECTS`` objects. ``crowded`` is True if instances of a phrase were left out.

    Example:
        >>> import numpy as np
        >>> import samdistill as sd
        >>> session = sd.VideoSession(sd.load("sandbox-student").network)
        >>> session.add_box((20, 20, 60, 60))
        1
        >>> session.push(np.zeros((126, 126, 3), np.uint8))[0].mask.shape
        (126, 126)
    """

    def __init__(
        self, student: StudentDetector, *, context: int | None = None, stride: int | None = None,
        threshold: float = 0.5, geometry: str | None = None,
    ) -> None:  # fmt: skip
        """Start a session.

        Args:
            student: The student.
            context: Frames that the memory holds; 0 for no memory. None uses the value of training. A student without a
                memory always has 0.
            stride: Frames between two frames of the memory; None uses the value of training.
            threshold: Minimum score of a new object, and minimum presence probability of a remembered one, in 0..1.
            geometry: ``square`` or ``longest_side``; None uses the geometry saved with the student.

        Raises:
            UserError: A value is out of range.
        """
        config = student.model.config
        self.context = config.memory_context if context is None else context
        self.stride = config.memory_stride if stride is None else stride
        if self.context < 0 or self.stride < 1:
            raise UserError(
                f"`context` must be at least 0 and `stride` at least 1, got {self.context} and {self.stride}"
            )
        if not config.memory_latents:
            self.context = 0
        place = Geometry(
            student.image_size, own_geometry(student.model) if geometry is None else check_geometry(geometry)
        )
        super().__init__(place, student.words, threshold)
        self._student, self._model, self._unnamed = student, student.model, config.memory_phrase
        self._marks = bool(self.context and config.memory_marks)
        self._ring, self._tracks = Ring(self.context), dict[int, Track]()
        self._phrases: dict[str, bool] = {}  # whether it has been asked for yet
        self._words: dict[str, tuple[Tensor, Tensor]] = {}

    def add_text(self, phrase: str) -> None:
        """Track every instance of ``phrase``.

        Instances are detected in the next frame and then in every ``stride``-th frame of the video. An instance that
        overlaps no visible object of the phrase is matched to the nearest object of the phrase that is not visible. If
        there is none, it is a new object.

        Raises:
            UserError: The phrase is empty or too long.
        """
        check_phrase(self._student.words, phrase)
        self._phrases.setdefault(phrase, False)

    def add_box(self, box: Box, text: str | None = None) -> int:
        """Track the object in ``box``, see ``Session.add_box``.

        The object is the instance whose box has the greatest IoU with ``box``. If that IoU is below ``SAME``, the mask
        is the box itself.
        """
        return super().add_box(box, text)

    @torch.no_grad()
    def push(
        self, frame: UInt8[np.ndarray, "h w 3"], remembered: Float[Tensor, "c h w"] | None = None
    ) -> tuple[Tracked, ...]:
        """Process the next frame.

        Args:
            frame: RGB frame, uint8.
            remembered: Feature map that enters the memory instead of the student's own, on any grid.

        Returns:
            All objects of the session in the order in which they were added, including those that are not visible.

        Raises:
            UserError: ``frame`` is not an RGB frame of the first frame's size, or an added box or mask does not fit it.
                The session has not advanced. In the second case, all boxes and masks added since the last frame are
                discarded.
            ValueError: ``remembered`` has the wrong number of channels.
        """
        self._check_map(remembered)
        shown = self._next(frame)
        now, before = self._encode(frame), len(self._tracks)
        if self._marks:
            self._recall(now)
        else:
            self._follow(now)
        self._start(now, shown)
        self._discover(now)
        for object_id, sight in now.sights.items():
            self._tracks[object_id].last = sight
        if self.context and (self._number % self.stride == 0 or len(self._tracks) > before):
            self._remember(now, remembered)
        self._number += 1
        return tuple(t.tracked(now.sights.get(i), now.scores.get(i, 0.0)) for i, t in self._tracks.items())

    def _taken(self) -> set[int]:
        return set(self._tracks)

    def _check_map(self, remembered: Float[Tensor, "c h w"] | None) -> None:
        width = self._model.config.vision_config.fpn_hidden_size
        if remembered is not None and (remembered.ndim != 3 or len(remembered) != width):
            raise ValueError(f"`remembered` must have shape ({width}, h, w), got {tuple(remembered.shape)}")

    def _encode(self, frame: UInt8[np.ndarray, "h w 3"]) -> _Frame:
        canvas, placed = self._place.canvas(Image.fromarray(frame))
        return _Frame(self._model.get_vision_features(self._student.pixels(canvas[None])), placed)

    def _text(self, phrases: Sequence[str]) -> tuple[Float[Tensor, "p t c"], Tensor]:
        """Return text features and attention masks. A phrase is encoded alone, so others do not affect its features."""
        for phrase in phrases:
            if phrase not in self._words:
                ids, mask = (part.to(self._model.device) for part in self._student.words.encode([phrase]))
                code = self._model.get_text_features(ids, mask, return_dict=True).pooler_output
                self._words[phrase] = code, mask
        codes, masks = zip(*(self._words[phrase] for phrase in phrases), strict=True)
        return torch.cat(codes), torch.cat(masks)

    def _ask(
        self, now: _Frame, phrases: Sequence[str], boxes: Float[Tensor, "p k 4"] | None = None,
        memory: Memory = Memory(),
    ) -> DetectorOutput:  # fmt: skip
        """Run the detector on one frame. ``boxes`` are exemplars of each phrase, normalised cxcywh on the canvas."""
        code, mask = self._text(phrases)
        alike = None if boxes is None else torch.ones(boxes.shape[:2], dtype=torch.int64, device=code.device)
        found = self._model.forward_video(
            memory_features=memory.features, memory_ages=memory.ages, memory_valid=memory.valid,
            memory_masks=memory.masks, attention_mask=mask, input_boxes=boxes, input_boxes_labels=alike,
            prompt_images=torch.zeros(len(phrases), dtype=torch.int64, device=code.device),
            vision_embeds=now.vision, text_embeds=BaseModelOutputWithPooling(pooler_output=code),
        )  # fmt: skip
        return found.answer()

    def _instances(self, now: _Frame, answer: DetectorOutput, row: int) -> list[Sight]:
        """Return the instances of query ``row`` with at least ``LEAST_SCORE``, by descending score; ``MOST_OBJECTS``
        at most."""
        side = (self._place.image_size, self._place.image_size)
        found = detections(answer, row, LEAST_SCORE, now.placed, side, self._size, MOST_OBJECTS)
        sights = map(Sight.of, found.scores.tolist(), found.masks.cpu().numpy())
        return [sight for sight in sights if sight is not None]

    def _plain(self, now: _Frame, phrases: Sequence[str]) -> dict[str, list[Sight]]:
        """Return the instances of each phrase in this frame, detected without memory. Each phrase is run once."""
        if missing := [phrase for phrase in phrases if phrase not in now.plain]:
            answer = self._ask(now, missing)
            now.plain.update({phrase: self._instances(now, answer, row) for row, phrase in enumerate(missing)})
        return {phrase: now.plain[phrase] for phrase in phrases}

    def _recall(self, now: _Frame) -> None:
        """Find every object that the memory shows, in one forward pass. The query with the highest logit is taken."""
        marked = self._ring.marked
        tracks = [track for track in self._tracks.values() if track.object_id in marked]
        if not tracks:
            return
        memory = self._ring.recall(self._number, self.stride, [track.object_id for track in tracks])
        answer = self._ask(now, [track.asked for track in tracks], memory=memory)
        queries = answer.pred_logits.argmax(1, keepdim=True)
        # a query is about one object, so its presence alone is the score; the quality of the mask is not part of it
        scores = answer.presence_logits[:, 0].float().sigmoid().tolist()
        # one object at a time: full-resolution logits of twenty objects need too much memory
        best = torch.zeros(self._size, device=queries.device)
        owner = torch.full(self._size, -1, dtype=torch.int64, device=queries.device)
        for row, (query, score) in enumerate(zip(queries[:, 0].tolist(), scores, strict=True)):
            if score >= self.threshold:
                logits = self._on_frame(answer.pred_masks[row, query])
                owner, best = torch.where(logits > best, row, owner), torch.maximum(logits, best)
        for row, (track, score) in enumerate(zip(tracks, scores, strict=True)):
            now.scores[track.object_id] = score
            sight = Sight.of(score, (owner == row).cpu().numpy()) if score >= self.threshold else None
            if sight is not None:
                now.sights[track.object_id] = sight

    def _on_frame(self, logits: Float[Tensor, "a b"]) -> Float[Tensor, "h w"]:
        """Resize mask logits to the frame as ``detections`` does, without the threshold."""
        side = (self._place.image_size, self._place.image_size)
        canvas = F.interpolate(logits[None, None].float(), side, mode="bilinear", align_corners=False)
        return self._place.masks_back(canvas[0, 0], self._size)

    def _follow(self, now: _Frame) -> None:
        """Run the detector once per phrase, and assign the instances to objects."""
        phrases = list(dict.fromkeys(track.asked for track in self._tracks.values()))
        if not phrases:
            return
        if len(self._ring):
            answer = self._ask(now, phrases, memory=self._ring.recall(self._number, self.stride))
            found = {phrase: self._instances(now, answer, row) for row, phrase in enumerate(phrases)}
        else:
            found = self._plain(now, phrases)
        for phrase, sights in found.items():
            now.sights.update(assign([t for t in self._tracks.values() if t.asked == phrase], sights))

    def _start(self, now: _Frame, shown: Sequence[Shown]) -> None:
        """Add the objects of ``shown`` at this frame."""
        boxed = [one for one in shown if one.box is not None]
        found = dict(zip((one.object_id for one in boxed), self._boxed(now, boxed), strict=True)) if boxed else {}
        for one in shown:
            sight = found[one.object_id] if one.mask is None else Sight.of(1.0, one.mask)
            assert sight is not None
            self._begin(now, one.object_id, one.phrase, sight)

    def _begin(self, now: _Frame, object_id: int, phrase: str | None, sight: Sight) -> None:
        asked = self._unnamed if phrase is None else phrase
        self._tracks[object_id] = Track(object_id, phrase, asked, sight)
        now.sights[object_id] = sight

    def _boxed(self, now: _Frame, shown: Sequence[Shown]) -> list[Sight]:
        """Return the instance in each box, or the box itself if no instance fits."""
        drawn = torch.tensor([one.box for one in shown], dtype=torch.float32)
        corners = self._place.points(drawn.view(-1, 2, 2), self._size).view(-1, 1, 4) / self._place.image_size
        phrases = [VISUAL if one.phrase is None else one.phrase for one in shown]
        answer = self._ask(now, phrases, box_convert(corners, "xyxy", "cxcywh").to(self._model.device))
        side = (self._place.image_size, self._place.image_size)
        sights = []
        for row, box in enumerate(drawn):
            found = detections(answer, row, LEAST_SCORE, now.placed, side, self._size).to("cpu")
            shares = box_iou(box[None], found.boxes)[0] if len(found) else torch.zeros(1)
            best, sight = int(shares.argmax()), None
            if shares[best] >= SAME:
                sight = Sight.of(float(found.scores[best]), found.masks[best].numpy())
            sights.append(Sight.filled(box.tolist(), self._size) if sight is None else sight)
        return sights

    def _discover(self, now: _Frame) -> None:
        """Detect new instances of the phrases. Each is matched to an object that is not visible, or is a new object."""
        due = [phrase for phrase, asked in self._phrases.items() if not asked or self._number % self.stride == 0]
        if not due:
            return
        for phrase, sights in self._plain(now, due).items():
            self._phrases[phrase] = True
            for sight in (sight for sight in sights if sight.score >= self.threshold):
                own = [track for track in self._tracks.values() if track.asked == phrase]
                seen = (now.sights[t.object_id] for t in own if t.object_id in now.sights)
                if any(overlap(sight, other) >= SAME for other in seen):
                    continue
                hidden = [track for track in own if track.object_id not in now.sights]
                if hidden:
                    nearest = min(hidden, key=lambda track: apart(track.last, sight))
                    now.sights[nearest.object_id] = sight
                elif len(self._tracks) < MOST_OBJECTS:
                    self._begin(now, self._new_id(None), phrase, sight)
                else:
                    self.crowded = True

    def _remember(self, now: _Frame, remembered: Float[Tensor, "c h w"] | None) -> None:
        own = now.vision.fpn_hidden_states[self._model.config.memory_level][0]
        level = own if remembered is None else remembered.to(own)
        if level.shape[-2:] != own.shape[-2:]:  # a teacher's maps can be on another grid; resized as in training
            level = F.interpolate(level[None], own.shape[-2:], mode="bilinear", align_corners=False, antialias=True)[0]
        marks = {i: self._mark(sight, level) for i, sight in now.sights.items()} if self._marks else {}
        self._ring.add(self._number, level, marks)

    def _mark(self, sight: Sight, level: Float[Tensor, "c h w"]) -> Float[Tensor, "h w"]:
        """Return the fraction of each grid cell of the canvas that an object covers."""
        canvas = self._place.mask(sight.mask)[None].float()
        return F.adaptive_avg_pool2d(canvas, level.shape[-2:])[0].to(level)
