"""A video frame by frame: what a phrase names and what a box or a mask shows once, followed under one id."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Bool, Float, UInt8
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import box_convert, box_iou
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.sam3_lite_text.modeling_sam3_lite_text import Sam3LiteTextVisionEncoderOutput

from ..data.transforms import Geometry, Size
from ..ops.images import normalise
from ..types import VISUAL, DetectorOutput, UserError
from .concepts import Box, StudentDetector, check_prompts, detections
from .geometry import check_geometry, own_geometry
from .tracks import Memory, Ring, Sight, Track, Tracked, apart, assign, overlap

MOST_OBJECTS = 20
"""Objects of a session at most: the most that a clip has in training."""
SAME = 0.5
"""Overlap (IoU) from which on two instances, or an instance and a box that was drawn, are one object."""
LEAST_SCORE = 0.05
"""Below this an instance is not even taken for what a drawn box shows, or for an object that was seen in its place."""


@dataclass(frozen=True, eq=False)
class _Shown:
    """An object that the next frame is to be started with: in a box, or by its mask."""

    object_id: int
    phrase: str | None
    box: Box | None = None
    mask: Bool[np.ndarray, "h w"] | None = None


@dataclass(frozen=True, eq=False)
class _Frame:
    """An encoded frame, and what is known of it so far.

    placed: height and width of its part of the canvas. sights: by id, where objects are. scores: by id, of the objects
    that were asked about. plain: by phrase, the instances found without memory, best first.
    """

    vision: Sam3LiteTextVisionEncoderOutput
    placed: Size
    sights: dict[int, Sight] = field(default_factory=dict)
    scores: dict[int, float] = field(default_factory=dict)
    plain: dict[str, list[Sight]] = field(default_factory=dict)


class VideoSession:
    """Follows objects through one video, whose frames are pushed in their order. Nothing grows with its length.

    Every frame is encoded once. Of each ``stride`` frames one is remembered, the first of the video first; so is every
    other frame in which an object appears, which would else be unknown until the next one. ``context`` frames are kept.

    With a memory that was trained with marks every object is asked about on its own, by where it was in those frames;
    it is visible where the presence of what is asked for is likely, and where two objects claim a pixel, the surer one
    has it. An object that none of those frames shows is not asked about any more: only ``add_text`` can find it again.
    Otherwise one question is asked per phrase, with the memory or, of a student without one, as about a still image,
    and an object is the instance that overlaps it where it was last seen, however low its score.

    At most ``MOST_OBJECTS`` objects; ``crowded`` tells whether instances of a phrase had to be left out for that.
    """

    def __init__(
        self, student: StudentDetector, *, context: int | None = None, stride: int | None = None,
        threshold: float = 0.5, geometry: str | None = None,
    ) -> None:  # fmt: skip
        """context: remembered frames, None for as many as in training, 0 to go without memory, as a student of images
        does anyway. stride: None for the training's. threshold: least score of what is new,
        and least presence of what is remembered. geometry: as in the
        student's config. Raises ``UserError`` for values out of range."""
        config = student.model.config
        self.context = config.memory_context if context is None else context
        self.stride = config.memory_stride if stride is None else stride
        if self.context < 0 or self.stride < 1:
            raise UserError(f"context {self.context} and stride {self.stride}: give 0 or more, and 1 or more")
        if not 0 <= threshold <= 1:
            raise UserError(f"threshold {threshold:g} is not between 0 and 1")
        if not config.memory_latents:
            self.context = 0
        self.threshold, self.crowded = threshold, False
        self._student, self._model, self._unnamed = student, student.model, config.memory_phrase
        self._place = Geometry(
            student.image_size, own_geometry(student.model) if geometry is None else check_geometry(geometry)
        )
        self._marks = bool(self.context and config.memory_marks)
        self._ring, self._number, self._size = Ring(self.context), 0, (0, 0)
        self._tracks: dict[int, Track] = {}
        self._shown: dict[int, _Shown] = {}
        self._phrases: dict[str, bool] = {}  # whether it has been asked for yet
        self._words: dict[str, tuple[Tensor, Tensor]] = {}

    def add_text(self, phrase: str) -> None:
        """Every instance of ``phrase``: in the next frame, and whenever a frame is remembered after it.

        An instance that overlaps no visible object of the phrase is the nearest one that is not visible just now, or
        else a new object. Raises ``UserError`` for a phrase that is empty or too long.
        """
        check_prompts(self._student.words, phrase, (), self._size)
        self._phrases.setdefault(phrase, False)

    def add_box(self, box: Box, text: str | None = None) -> int:
        """The object in ``box`` (xyxy in pixels) of the next frame; its id. text: what it is called.

        It is the instance whose box overlaps ``box`` most; where none does by ``SAME`` the box itself is its mask.
        Raises ``UserError`` for a box or a phrase that cannot be asked for; before the first frame, whose size decides,
        a box is refused by ``push`` instead, and forgotten.
        """
        if text is not None:
            check_prompts(self._student.words, text, (), self._size)
        return self._show(_Shown(self._new_id(None), text, tuple(map(float, box))))  # type: ignore[arg-type]

    def add_mask(self, mask: Bool[np.ndarray, "h w"], text: str | None = None, object_id: int | None = None) -> int:
        """The object that ``mask`` shows in the next frame; its id, ``object_id`` unless that is None.

        Raises ``UserError`` for an empty mask, one of another size than the frames (by ``push``, before the first), an
        id that is taken and a phrase that cannot be asked for.
        """
        if text is not None:
            check_prompts(self._student.words, text, (), self._size)
        if not isinstance(mask, np.ndarray) or mask.dtype != np.bool_ or mask.ndim != 2:
            raise UserError("a mask is an array of bool, height by width")
        if not mask.any():
            raise UserError("the mask is empty: it shows no object")
        return self._show(_Shown(self._new_id(object_id), text, mask=mask.copy()))

    @torch.no_grad()
    def push(
        self, frame: UInt8[np.ndarray, "h w 3"], remembered: Float[Tensor, "c h w"] | None = None
    ) -> tuple[Tracked, ...]:
        """All objects in the next frame (RGB), those that are not visible too, in the order they came.

        remembered: a map to remember in place of the student's own level, on any grid. Raises ``UserError`` for what is
        no frame, a frame of another size than the first, and what was added that does not fit it. A call that raises
        has not used the frame.
        """
        self._check_frame(frame)
        self._check_map(remembered)
        shown, self._shown = list(self._shown.values()), {}
        for one in shown:
            self._check_fits(one, frame.shape[:2])
        self._size = frame.shape[:2]
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

    def _new_id(self, wanted: int | None) -> int:
        taken = self._tracks.keys() | self._shown.keys()
        if len(taken) >= MOST_OBJECTS:
            raise UserError(f"a session follows {MOST_OBJECTS} objects at most; follow the others in another session")
        if wanted is None:
            return next(number for number in range(1, len(taken) + 2) if number not in taken)
        if wanted in taken:
            raise UserError(f"object {wanted} is there already; leave object_id out for an id of its own")
        return wanted

    def _show(self, shown: _Shown) -> int:
        if self._number:
            self._check_fits(shown, self._size)
        self._shown[shown.object_id] = shown
        return shown.object_id

    def _check_fits(self, shown: _Shown, size: Size) -> None:
        if shown.box is not None:
            check_prompts(self._student.words, None, [shown.box], size)
        if shown.mask is not None and shown.mask.shape != size:
            (height, width), (h, w) = shown.mask.shape, size
            raise UserError(f"the mask of object {shown.object_id} is {width} x {height} pixels, the frame {w} x {h}")

    def _check_frame(self, frame: UInt8[np.ndarray, "h w 3"]) -> None:
        if not isinstance(frame, np.ndarray) or frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[2] != 3:
            found = f"{frame.dtype} of {frame.shape}" if isinstance(frame, np.ndarray) else type(frame).__name__
            raise UserError(f"frame {self._number}: an array of uint8, height by width by 3, is needed, not {found}")
        if not frame.size:
            raise UserError(f"frame {self._number}: it has no pixel")
        if self._number and frame.shape[:2] != self._size:
            (height, width), (h, w) = frame.shape[:2], self._size
            raise UserError(f"frame {self._number} is {width} x {height} pixels, the first one {w} x {h}")

    def _check_map(self, remembered: Float[Tensor, "c h w"] | None) -> None:
        width = self._model.config.vision_config.fpn_hidden_size
        if remembered is not None and (remembered.ndim != 3 or len(remembered) != width):
            raise ValueError(f"a map of {tuple(remembered.shape)} for a student that remembers {width} channels")

    def _encode(self, frame: UInt8[np.ndarray, "h w 3"]) -> _Frame:
        canvas, placed = self._place.canvas(Image.fromarray(frame))
        vision = self._model.config.vision_config
        pixels = normalise(canvas[None].to(self._model.device), tuple(vision.image_mean), tuple(vision.image_std))
        return _Frame(self._model.get_vision_features(pixels), placed)

    def _text(self, phrases: Sequence[str]) -> tuple[Float[Tensor, "p t c"], Tensor]:
        """Each phrase is encoded once in a session, alone, so that its code does not depend on what else is asked."""
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
        """boxes: exemplars of each phrase, normalised cxcywh of the canvas."""
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
        """What question ``row`` found from ``LEAST_SCORE`` on, best first, at most what a session can follow."""
        side = (self._place.image_size, self._place.image_size)
        found = detections(answer, row, LEAST_SCORE, now.placed, side, self._size, MOST_OBJECTS)
        sights = map(Sight.of, found.scores.tolist(), found.masks.cpu().numpy())
        return [sight for sight in sights if sight is not None]

    def _plain(self, now: _Frame, phrases: Sequence[str]) -> dict[str, list[Sight]]:
        """What each phrase names in this frame, as in a still image; asked once."""
        if missing := [phrase for phrase in phrases if phrase not in now.plain]:
            answer = self._ask(now, missing)
            now.plain.update({phrase: self._instances(now, answer, row) for row, phrase in enumerate(missing)})
        return {phrase: now.plain[phrase] for phrase in phrases}

    def _recall(self, now: _Frame) -> None:
        """Ask about every object that is remembered, all at once; of each the best query is the answer."""
        marked = self._ring.marked
        tracks = [track for track in self._tracks.values() if track.object_id in marked]
        if not tracks:
            return
        memory = self._ring.recall(self._number, self.stride, [track.object_id for track in tracks])
        answer = self._ask(now, [track.asked for track in tracks], memory=memory)
        queries = answer.pred_logits.argmax(1, keepdim=True)
        # the question is about one object: which query is it, and is it there; how good its mask is decides neither
        scores = answer.presence_logits[:, 0].float().sigmoid().tolist()
        # object by object: the logits of twenty at the size of a film would not fit
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
        """As ``detections`` brings a mask to the image, but still logits."""
        side = (self._place.image_size, self._place.image_size)
        canvas = F.interpolate(logits[None, None].float(), side, mode="bilinear", align_corners=False)
        return self._place.masks_back(canvas[0, 0], self._size)

    def _follow(self, now: _Frame) -> None:
        """Ask for each phrase once, and say which instance is which object."""
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

    def _start(self, now: _Frame, shown: Sequence[_Shown]) -> None:
        """Objects that the user shows in this frame."""
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

    def _boxed(self, now: _Frame, shown: Sequence[_Shown]) -> list[Sight]:
        """The instance in each box, or the box itself."""
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
        """An instance that is no visible object of its phrase is an invisible one that came back, or a new one."""
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
        if level.shape[-2:] != own.shape[-2:]:  # as in training, where a teacher's maps are on another grid
            level = F.interpolate(level[None], own.shape[-2:], mode="bilinear", align_corners=False, antialias=True)[0]
        marks = {i: self._mark(sight, level) for i, sight in now.sights.items()} if self._marks else {}
        self._ring.add(self._number, level, marks)

    def _mark(self, sight: Sight, level: Float[Tensor, "c h w"]) -> Float[Tensor, "h w"]:
        """The share of each cell of the canvas that an object covers."""
        canvas = self._place.mask(sight.mask)[None].float()
        return F.adaptive_avg_pool2d(canvas, level.shape[-2:])[0].to(level)
