"""J&F of objects in single frames, where the memory is built from earlier frames and their true masks.

Each question is independent of the model's earlier answers, unlike in video tracking. The result measures the memory
alone and costs little time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, UInt8
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from transformers.models.sam3_lite_text.modeling_sam3_lite_text import Sam3LiteTextVisionEncoderOutput

from ..data.objects import LEAST_PIXELS
from ..data.skipped import leave_out
from ..data.sources import evenly
from ..data.transforms import Geometry, Size
from ..data.videos import BadVideo, VideoRecord, VideoSource
from ..inference.concepts import StudentDetector
from ..metrics.video import boundary_f, region_similarity
from ..ops.images import to_grid
from ..ops.outputs import take_images
from ..teachers import FrameSignals
from ..types import ConceptPrompts, UserError
from .clip_scores import LOOKALIKES, OCCLUDED, REAPPEARED, UNIQUE, ClipAnswer, ClipScores, Kind
from .videos import evaluating, frames_of, phrase_of, visible_shares

HIDDEN_BELOW = 0.5
"""An object counts as occluded if less than this fraction of it is visible."""
_QUESTIONS = 32  # questions in one call, because the masks of each take about 70 MB at 1008 px


def evaluate_clips(
    model: StudentDetector,
    source: VideoSource,
    keys: Sequence[str],
    *,
    context: int,
    queries_per_video: int = 4,
    memory: Kind = "own",
    levels: FrameSignals | None = None,
    batch_size: int = 4,
    marks: bool | None = None,
    geometry: str = "square",
    seen: Callable[[ClipAnswer, Bool[np.ndarray, "h w"]], object] | None = None,
    progress: Callable[[int], object] | None = None,
) -> ClipScores:
    """Measure J&F on single frames of videos, with up to ``context`` annotated frames before each as memory.

    The query frames are evenly spaced over the annotated frames, except the first one. A question is asked for every
    object that has at least ``LEAST_PIXELS`` pixels on the canvas of the query frame and of a context frame, so the
    questions are the same for every memory. The phrase is the last of the object's names that the student can tokenise.
    The prediction is the mask with the highest score.

    Args:
        context: Largest number of context frames.
        queries_per_video: Largest number of query frames per video.
        memory: "own" for the student's feature maps of the context frames, "teacher" for those in ``levels``, "none"
            for no memory.
        levels: The teacher's feature maps; only with ``memory="teacher"``.
        batch_size: Frames encoded at once. Each frame is encoded once.
        marks: Give the memory the true masks of the objects in the context frames. None does as in training.
        geometry: Placement of frames on the canvas, ``square`` or ``longest_side``.
        seen: Called with each answer and its mask in pixels of the frame.
        progress: Called with 1 after each video.

    Raises:
        UserError: No video has an object to ask about.
        ValueError: A number is below 1, or ``levels`` and ``memory`` do not fit each other.
    """
    if context < 1 or queries_per_video < 1 or batch_size < 1:
        raise ValueError("context, queries_per_video and batch_size must be at least 1")
    if (memory == "teacher") != (levels is not None):
        raise ValueError("levels must be given with memory='teacher', and only then")
    place = Geometry(model.image_size, geometry)  # type: ignore[arg-type]
    marked = memory != "none" and (model.model.config.memory_marks if marks is None else marks)
    run = _Clips(model, source, place, context, queries_per_video, memory, levels, batch_size, marked, seen)
    answers, skipped = list[ClipAnswer](), list(source.problems)
    with evaluating(model.model), torch.no_grad():
        for key in keys:
            try:
                answers += run.video(key)
            except BadVideo as error:
                skipped.append(error.bad)
            if progress is not None:
                progress(1)
    if not answers:
        first = f", first {': '.join(skipped[0])}" if skipped else ""
        raise UserError(f"no object to ask about in {len(keys)} videos, {len(skipped)} skipped{first}")
    leave_out(skipped)
    return ClipScores(memory, tuple(answers), tuple(skipped))


def context_of(query: int, context: int) -> range:
    """Return the rows of the context frames of query row ``query``: up to ``context`` rows before it."""
    return range(max(0, query - context), query)


@dataclass(frozen=True)
class _Clips:
    """Settings that are the same for all videos."""

    model: StudentDetector
    source: VideoSource
    place: Geometry
    context: int
    queries: int
    memory: Kind
    levels: FrameSignals | None
    batch_size: int
    marked: bool
    seen: Callable[[ClipAnswer, Bool[np.ndarray, "h w"]], object] | None = None

    def video(self, key: str) -> list[ClipAnswer]:
        """Ask all questions about one video. Frames are encoded in order, so a query's context is encoded before it."""
        record = self.source.record(key)
        if len(record.annotated) < 2:
            raise BadVideo(key, "one annotated frame; a query needs one before it")
        queries = evenly(range(1, len(record.annotated)), self.queries)
        rows = set(queries)
        if self.memory == "own":
            rows.update(*(context_of(query, self.context) for query in queries))
        order, answers = sorted(rows), list[ClipAnswer]()
        past = _Past(self, record)
        frames = frames_of(self.source, key, [record.annotated[row] for row in order])
        for start in range(0, len(order), self.batch_size):
            batch = order[start : start + self.batch_size]
            vision = self._encoded([next(frames) for _ in batch])
            level = vision.fpn_hidden_states[self.model.model.config.memory_level]
            past.grid = tuple(level.shape[-2:])
            if self.memory == "own":
                past.maps.update(zip(batch, level, strict=True))
            for place, row in enumerate(batch):
                if row in queries:
                    image = take_images(vision, torch.tensor([place], device=level.device))
                    answers += past.ask(row, image)
        return answers

    def _encoded(self, frames: Sequence[UInt8[np.ndarray, "h w 3"]]) -> Sam3LiteTextVisionEncoderOutput:
        canvases = torch.stack([self.place.canvas(Image.fromarray(frame))[0] for frame in frames])
        return self.model.model.get_vision_features(self.model.pixels(canvases))


class _Past:
    """State of one video: visible objects, marks and feature maps, each by row of the annotated frames.

    Attributes:
        maps: Feature maps for the memory.
        grid: Height and width of the student's feature level that is used as memory.
    """

    def __init__(self, run: _Clips, record: VideoRecord) -> None:
        self.run, self.record = run, record
        self.maps: dict[int, Float[Tensor, "c h w"]] = {}
        self.grid: tuple[int, int] = (0, 0)
        self._seen: dict[int, Bool[np.ndarray, " n"]] = {}
        self._marks: dict[int, Float[Tensor, "n h w"]] = {}
        self._shares = visible_shares(run.source, record)

    def ask(self, query: int, image: Sam3LiteTextVisionEncoderOutput) -> list[ClipAnswer]:
        """Ask all questions about the frame of row ``query``. ``image`` has the frame's features."""
        rows = context_of(query, self.run.context)
        for row in (*rows, query):
            self._look(row)
        before = np.stack([self._seen[row] for row in rows])
        asked = np.flatnonzero(self._seen[query] & before.any(0)).tolist()
        if not asked:
            return []
        truth = self.run.source.masks(self.record.key, self.record.annotated[query])
        answers = []
        for start in range(0, len(asked), _QUESTIONS):
            columns = asked[start : start + _QUESTIONS]
            phrases = [self._phrase(column) for column in columns]
            found = self._answers(image, columns, phrases, query, rows)
            for column, phrase, mask in zip(columns, phrases, found, strict=True):
                scores = [float(figure(mask, truth[column])) for figure in (region_similarity, boundary_f)]
                answer = ClipAnswer(
                    self.record.key, self.record.annotated[query], self.record.objects[column], phrase, *scores,
                    self._groups(column, query, before[:, column]),
                )  # fmt: skip
                answers.append(answer)
                if self.run.seen is not None:
                    self.run.seen(answer, mask)
        return answers

    def _look(self, row: int) -> None:
        """Read the masks of a row, if not done before: which objects are visible, and their marks."""
        if row in self._seen:
            return
        masks = self.run.source.masks(self.record.key, self.record.annotated[row])
        placed = self.run.place.mask(masks)
        self._seen[row] = placed.flatten(1).sum(1).numpy() >= LEAST_PIXELS
        if self.run.marked:  # one by one, because the float canvases of many objects would need too much memory
            cells = [F.adaptive_avg_pool2d(one[None].float(), self.grid) for one in placed]
            self._marks[row] = torch.cat(cells) if cells else torch.zeros(0, *self.grid)

    def _phrase(self, column: int) -> str:
        named = phrase_of(self.record, column, self.run.model.words)
        return self.run.model.model.config.memory_phrase if named is None else named

    def _groups(self, column: int, query: int, before: Bool[np.ndarray, " t"]) -> tuple[str, ...]:
        record, groups = self.record, []
        names = record.concepts[column] if record.concepts else ()
        if names:
            others = [other for other in np.flatnonzero(self._seen[query]).tolist() if other != column]
            alike = any(set(record.concepts[other]) == set(names) for other in others)
            groups.append(LOOKALIKES if alike else UNIQUE)
        share = self._shares.get(record.objects[column])
        if share is not None and share[query] < HIDDEN_BELOW:
            groups.append(OCCLUDED)
        if record.labelled[query - 1, column] and not before[-1]:  # seen earlier, or it would not be asked
            groups.append(REAPPEARED)
        return tuple(groups)

    @torch.no_grad()
    def _answers(
        self,
        image: Sam3LiteTextVisionEncoderOutput,
        columns: Sequence[int],
        phrases: Sequence[str],
        query: int,
        rows: range,
    ) -> list[Bool[np.ndarray, "h w"]]:
        """Predict the mask of each question, in pixels of the frame."""
        model, device = self.run.model.model, self.run.model.model.device
        asked = self.run.model.words.inputs(ConceptPrompts.words(phrases, [0] * len(phrases)), device)
        memory: dict[str, Tensor] = {}
        if self.run.memory != "none":
            memory["memory_features"] = self._remembered(rows).to(device)[None]
            memory["memory_ages"] = torch.tensor([[float(query - row) for row in rows]], device=device)
        if self.run.marked:
            memory["memory_masks"] = torch.stack([self._marks[row][columns] for row in rows], 1).to(device)
        about = torch.zeros(len(phrases), dtype=torch.int64, device=device)
        answer = model.forward_video(vision_embeds=image, prompt_images=about, **asked, **memory).answer()
        best = answer.pred_logits.argmax(1)
        masks = answer.pred_masks[torch.arange(len(best), device=device), best]
        return [_on_frame(mask, self.run.place, self.record.size) for mask in masks]

    def _remembered(self, rows: range) -> Float[Tensor, "t c h w"]:
        """Return one feature map per context frame, resampled to the student's grid as in training."""
        if self.run.levels is not None and (missing := [row for row in rows if row not in self.maps]):
            frames = [(self.record.key, self.record.annotated[row]) for row in missing]
            (theirs,) = self.run.levels.answer(frames, self.run.levels.read(frames))
            self.maps.update(zip(missing, to_grid(theirs.cpu(), self.grid), strict=True))
        return torch.stack([self.maps[row] for row in rows])


def _on_frame(logits: Float[Tensor, "a b"], place: Geometry, size: Size) -> Bool[np.ndarray, "h w"]:
    """Resize mask logits to the frame and threshold them, as ``detections`` does."""
    side = (place.image_size, place.image_size)
    canvas = F.interpolate(logits[None, None].float(), side, mode="bilinear", align_corners=False)
    return (place.masks_back(canvas[0, 0], size) > 0).cpu().numpy()
