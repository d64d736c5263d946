"""Objects followed through a video, with the rules of ``samdistill.VideoSession``."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ...ops.sights import LEAST_SCORE, MOST_OBJECTS, SAME, Sight, Size, Track, Tracked, apart, overlap, to_drop
from .files import Array, ModelError
from .images import Box, check_prompts, open_image, sigmoid

if TYPE_CHECKING:
    from .model import Model

VISUAL = "visual"  # text of a prompt that has only example boxes


class _Shown(NamedTuple):  # an object to be added at the next frame, given by a box or a mask
    object_id: int
    phrase: str | None
    box: tuple[float, ...] | None
    mask: Array | None


class _Past(NamedTuple):
    number: int
    features: Array
    marks: dict[int, Array]  # of each object, see `Canvas.cells`


class _Frame(NamedTuple):
    features: dict[str, Array]
    sights: dict[int, Sight]
    scores: dict[int, float]
    plain: dict[str, list[Sight]]  # instances of a phrase, detected without memory


class Video:
    """Follows objects through one video, whose frames are given in order. Memory use does not grow with its length.

    The rules and ids are those of ``samdistill.VideoSession``: with marks, a query per object; otherwise a query per
    phrase, whose instances are assigned to objects by the IoU with their last mask. ``crowded`` says whether instances
    were left out because there are ``MOST_OBJECTS`` objects.

    Example:
        >>> video = Model("exported").video()
        >>> video.add_box((20, 20, 60, 60))
        1
        >>> video.push(frame)[0].mask.shape
    """

    def __init__(self, model: Model, threshold: float, context: int | None, stride: int | None) -> None:
        config, remembers = model.config, model.kind == "detector with memory"
        self.context = 0 if not remembers else config["memory_context"] if context is None else context
        self.stride = int(config.get("memory_stride", 4)) if stride is None else stride
        if self.context < 0 or self.stride < 1 or not 0 <= threshold <= 1:
            raise ModelError("`context` must be at least 0, `stride` at least 1 and `threshold` in 0..1")
        self.threshold, self.crowded = threshold, False
        self._model, self._unnamed = model, config.get("memory_phrase", "object")
        self._level = f"vision_features.{config.get('memory_level', 3)}"
        self._marks = bool(self.context and config.get("memory_marks", True))
        self._past, self._number, self._size = list[_Past](), 0, (0, 0)
        self._tracks: dict[int, Track] = {}
        self._shown: dict[int, _Shown] = {}
        self._phrases: dict[str, bool] = {}

    def add_text(self, phrase: str) -> None:
        """Track every instance of ``phrase``, including those that appear later."""
        self._model.concept(phrase)
        self._phrases.setdefault(phrase, False)

    def add_box(self, box: Box, text: str | None = None) -> int:
        """Track the object in ``box`` (xyxy, pixels) of the next frame, and return its id."""
        self._model.network("decoder_boxes")
        return self._show(_Shown(self._new_id(None), text, tuple(map(float, box)), None))

    def add_mask(self, mask: Array, text: str | None = None, object_id: int | None = None) -> int:
        """Track the object with ``mask`` (bool, the size of the frame) in the next frame, and return its id."""
        if not isinstance(mask, np.ndarray) or mask.dtype != np.bool_ or mask.ndim != 2 or not mask.any():
            raise ModelError("a mask must be a bool array (height, width) that is not empty")
        return self._show(_Shown(self._new_id(object_id), text, None, mask.copy()))

    def push(self, frame: Any) -> tuple[Tracked, ...]:
        """Return all objects in the next frame, in the order in which they were added, also those not visible.

        ``frame`` is an image file, a PIL image, or an RGB array (h, w, 3), of the first frame's size.
        """
        image = open_image(frame)
        size = (image.shape[0], image.shape[1])
        if self._number and size != self._size:
            (height, width), (h, w) = size, self._size
            raise ModelError(f"frame {self._number} is {width} x {height} pixels, the first one {w} x {h}")
        shown, self._shown = list(self._shown.values()), {}
        for one in shown:
            self._check_fits(one, size)
        self._size = size
        now, before = _Frame(self._model.encode(image).features, {}, {}, {}), len(self._tracks)
        (self._recall if self._marks else self._follow)(now)
        self._start(now, shown)
        self._discover(now)
        for object_id, sight in now.sights.items():
            self._tracks[object_id].last = sight
        if self.context and (self._number % self.stride == 0 or len(self._tracks) > before):
            self._remember(now)
        self._number += 1
        return tuple(
            track.tracked(now.sights.get(number), now.scores.get(number, 0.0)) for number, track in self._tracks.items()
        )

    def _remember(self, now: _Frame) -> None:
        """Add a frame to the memory. The last frame that shows an object is kept while later frames are dropped."""
        features, seen = now.features[self._level][0], now.sights if self._marks else {}
        marks = {i: self._model.canvas.cells(sight.mask, features.shape[-2:]) for i, sight in seen.items()}
        self._past.append(_Past(self._number, features, marks))
        if len(self._past) > self.context:
            del self._past[to_drop([one.marks.keys() for one in self._past], self.context)]

    def _new_id(self, wanted: int | None) -> int:
        taken = self._tracks.keys() | self._shown.keys()
        if len(taken) >= MOST_OBJECTS:
            raise ModelError(f"a video has at most {MOST_OBJECTS} objects")
        if wanted in taken:
            raise ModelError(f"object id {wanted} is in use")
        return next(n for n in range(1, len(taken) + 2) if n not in taken) if wanted is None else wanted

    def _show(self, shown: _Shown) -> int:
        if shown.phrase is not None:
            self._model.concept(shown.phrase)
        if self._number:
            self._check_fits(shown, self._size)
        self._shown[shown.object_id] = shown
        return shown.object_id

    def _check_fits(self, shown: _Shown, size: Size) -> None:
        check_prompts(size, (), () if shown.box is None else (shown.box,))
        if shown.mask is not None and shown.mask.shape != size:
            (height, width), (h, w) = shown.mask.shape, size
            raise ModelError(f"the mask of object {shown.object_id} is {width} x {height} pixels, the frame {w} x {h}")

    def _tokens(self, count: int, objects: Sequence[int] = ()) -> Array:
        """Return the memory tokens of ``count`` prompts, or of the objects whose marks are read."""
        features = np.stack([one.features for one in self._past])[None]
        ages = [min((self._number - one.number) / self.stride, self.context) for one in self._past]
        given = {
            "memory_features": features, "memory_ages": np.array([ages], np.float32),
            "memory_valid": np.ones((1, len(ages)), bool),
        }  # fmt: skip
        if not objects:
            return np.repeat(self._model.remember(given), count, 0)
        nowhere = np.zeros(features.shape[-2:], np.float32)
        marks = [np.stack([one.marks.get(number, nowhere) for one in self._past])[None] for number in objects]
        return np.concatenate([self._model.remember({**given, "memory_masks": one}) for one in marks])

    def _sights(self, answer: Mapping[str, Array], row: int) -> list[Sight]:
        masks, _, scores = self._model.instances(answer, row, LEAST_SCORE, self._size, MOST_OBJECTS)
        return [sight for sight in map(Sight.of, scores.tolist(), masks) if sight is not None]

    def _plain(self, now: _Frame, phrases: Sequence[str]) -> dict[str, list[Sight]]:
        """Return the instances of each phrase in this frame, detected without memory."""
        if missing := [phrase for phrase in phrases if phrase not in now.plain]:
            answer = self._model.ask(now.features, missing)
            now.plain.update({phrase: self._sights(answer, row) for row, phrase in enumerate(missing)})
        return {phrase: now.plain[phrase] for phrase in phrases}

    def _recall(self, now: _Frame) -> None:
        """Find every object that the memory shows. A pixel belongs to the object with the largest logit."""
        marked = set().union(*(one.marks for one in self._past))
        tracks = [track for track in self._tracks.values() if track.object_id in marked]
        if not tracks:
            return
        memory = self._tokens(len(tracks), [track.object_id for track in tracks])
        answer = self._model.ask(now.features, [track.asked for track in tracks], memory=memory)
        scores = sigmoid(answer["presence_logits"][:, 0]).tolist()
        best, owner = np.zeros(self._size, np.float32), np.full(self._size, -1)
        for row, query in enumerate(answer["pred_logits"].argmax(1)):
            if scores[row] >= self.threshold:
                logits = self._model.canvas.back(answer["pred_masks"][row, query], self._size)
                owner[logits > best] = row
                np.maximum(logits, best, out=best)
        for row, track in enumerate(tracks):
            now.scores[track.object_id] = scores[row]
            if (sight := Sight.of(scores[row], owner == row)) is not None:
                now.sights[track.object_id] = sight

    def _follow(self, now: _Frame) -> None:
        """Run the detector once per phrase, and assign the instances to objects."""
        phrases = list(dict.fromkeys(track.asked for track in self._tracks.values()))
        if phrases and self._past:
            answer = self._model.ask(now.features, phrases, memory=self._tokens(len(phrases)))
            found = {phrase: self._sights(answer, row) for row, phrase in enumerate(phrases)}
        else:
            found = self._plain(now, phrases)
        for phrase, sights in found.items():
            tracks = [track for track in self._tracks.values() if track.asked == phrase]
            shares = np.array([[overlap(track.last, sight) for sight in sights] for track in tracks])
            for row, column in assign(shares) if shares.size else ():
                if shares[row, column] > 0:
                    now.sights[tracks[row].object_id] = sights[column]

    def _start(self, now: _Frame, shown: Sequence[_Shown]) -> None:
        """Add the objects of ``shown`` at this frame."""
        boxed = [one for one in shown if one.box is not None]
        found = self._boxed(now, boxed) if boxed else {}
        for one in shown:
            sight = found[one.object_id] if one.mask is None else Sight.of(1.0, one.mask)
            self._begin(now, one.object_id, one.phrase, sight)

    def _begin(self, now: _Frame, object_id: int, phrase: str | None, sight: Any) -> None:
        asked = self._unnamed if phrase is None else phrase
        self._tracks[object_id] = Track(object_id, phrase, asked, sight)
        now.sights[object_id] = sight

    def _boxed(self, now: _Frame, shown: Sequence[_Shown]) -> dict[int, Sight | None]:
        """Return the instance in each box, or the box itself if no instance fits."""
        exemplars = self._model.exemplars([one.box for one in shown], self._size)[:, None]
        phrases = [VISUAL if one.phrase is None else one.phrase for one in shown]
        answer = self._model.ask(now.features, phrases, exemplars)
        sights = {}
        for row, one in enumerate(shown):
            masks, boxes, scores = self._model.instances(answer, row, LEAST_SCORE, self._size)
            shares = box_iou(np.array(one.box, np.float32), boxes)
            best = int(shares.argmax()) if shares.max(initial=0) >= SAME else None
            found = None if best is None else Sight.of(float(scores[best]), masks[best])
            sights[one.object_id] = found or Sight.filled(one.box, self._size)
        return sights

    def _discover(self, now: _Frame) -> None:
        """Detect new instances of the phrases. Each is matched to an object that is not visible, or is a new object."""
        due = [phrase for phrase, asked in self._phrases.items() if not asked or self._number % self.stride == 0]
        for phrase, sights in self._plain(now, due).items():
            self._phrases[phrase] = True
            for sight in (sight for sight in sights if sight.score >= self.threshold):
                own = [track for track in self._tracks.values() if track.asked == phrase]
                seen = (now.sights[t.object_id] for t in own if t.object_id in now.sights)
                if any(overlap(sight, other) >= SAME for other in seen):
                    continue
                hidden = [track for track in own if track.object_id not in now.sights]
                if hidden:
                    now.sights[min(hidden, key=lambda track: apart(track.last, sight)).object_id] = sight
                elif len(self._tracks) < MOST_OBJECTS:
                    self._begin(now, self._new_id(None), phrase, sight)
                else:
                    self.crowded = True


def box_iou(box: Array, others: Array) -> Array:
    low, high = np.maximum(box[:2], others[:, :2]), np.minimum(box[2:], others[:, 2:])
    common = np.clip(high - low, 0, None).prod(1)
    return common / ((box[2:] - box[:2]).prod() + (others[:, 2:] - others[:, :2]).prod(1) - common)


def assign(gains: Array) -> list[tuple[int, int]]:
    """Assign rows to columns so that the sum of gains is greatest.

    The algorithm, also in its choice between equal sums, is that of scipy's ``linear_sum_assignment`` (Crouse, On
    implementing 2D rectangular assignment algorithms, 2016).
    """
    turned = gains.shape[0] > gains.shape[1]
    costs = (-(gains.T if turned else gains).astype(float)).tolist()
    u, v = [0.0] * len(costs), [0.0] * len(costs[0])
    path, owner, chosen = [-1] * len(v), [-1] * len(v), [-1] * len(u)
    for current in range(len(u)):
        row, least, sink = current, 0.0, -1
        remaining, costs_to = list(range(len(v)))[::-1], [math.inf] * len(v)
        rows, columns = list[int](), list[int]()
        while sink < 0:
            index, lowest = -1, math.inf
            for place, column in enumerate(remaining):
                cost = least + costs[row][column] - u[row] - v[column]
                if cost < costs_to[column]:
                    path[column], costs_to[column] = row, cost
                if costs_to[column] < lowest or (costs_to[column] == lowest and owner[column] < 0):
                    index, lowest = place, costs_to[column]
            least, column = lowest, remaining[index]
            columns.append(column)
            remaining[index] = remaining[-1]
            remaining.pop()
            if owner[column] < 0:
                sink = column
            else:
                row = owner[column]
                rows.append(row)
        u[current] += least
        for row in rows:
            u[row] += least - costs_to[chosen[row]]
        for column in columns:
            v[column] -= least - costs_to[column]
        column, row = sink, -1
        while row != current:
            row = owner[column] = path[column]
            chosen[row], column = column, chosen[row]
    return [(column, row) if turned else (row, column) for row, column in enumerate(chosen)]
