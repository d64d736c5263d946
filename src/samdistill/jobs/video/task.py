"""Video distillation: a frozen image student gets a memory, trained with the masks of annotated videos.

The memory contains the teacher's maps of past frames, which are gradually replaced by the student's own.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from jaxtyping import Bool
from torch import Tensor, nn
from torch.utils.data import Dataset

from ...checkpoints.loading import quiet_transformers
from ...checkpoints.student import load_with_memory
from ...checkpoints.words import Words
from ...data import BadInput, leave_out
from ...data.clips import ClipBatch, ClipDataset, ClipItem, ClipRules, collate_clips
from ...data.transforms import ViewTransform
from ...data.videos import BadVideo, VideoSource
from ...engine.held_out import held_out_terms
from ...engine.task import Phase, Task, stages_at
from ...ops.images import to_grid
from ...ops.masks import masks_to_boxes
from ...ops.matching import MatchCost, match_truth
from ...teachers import Frame, FrameSignals, Maps
from ...types import ConceptPrompts, ImageBatch, ObjectTruth, Term, Terms, UserError
from .config import VideoRunConfig
from .losses import ALIGN_TERMS, MEMORY_TERMS, video_terms
from .student import Past, VideoStudent

ALIGN = "align"
MARK_PIXELS = 7
"""Side of a cell of the mark grid in pixels of the canvas. It is half of a patch, so it divides canvases, which are
multiples of 14.
"""


@dataclass(frozen=True)
class VideoBatch:
    """Query frames, questions with their ground truth, and past frames.

    Attributes:
        images: The query frames.
        prompts: The questions.
        truth: Ground truth of each question.
        past: The memory. On the device, ``past.teacher`` has the teacher's maps.
        frames: Frames of which the teacher's maps are used, before ``to``.
        theirs: Slots of these frames in ``past``.
        teacher_features: What a loader worker read from the signals, before ``to``.
        bad: Inputs that were unusable.
    """

    images: ImageBatch
    prompts: ConceptPrompts
    truth: ObjectTruth
    past: Past
    frames: tuple[Frame, ...]
    theirs: Bool[Tensor, "b t"]
    teacher_features: Maps
    bad: tuple[BadInput, ...] = ()


class VideoTask(Task[VideoBatch]):
    """Terms between the answers of a student with memory and the ground truth of a frame."""

    leaves_unused = True  # alignment and memory phases train different modules

    def __init__(
        self, config: VideoRunConfig, start: Path, words: Words, transform: ViewTransform, source: VideoSource,
        keys: Sequence[str], levels: FrameSignals | None, held_out: VideoSource | None = None,
    ) -> None:  # fmt: skip
        """Set up the task.

        Args:
            config: Configuration of the run.
            start: Folder of the image student.
            words: The student's tokenizer.
            transform: Transform of frames to the student's canvas.
            source: The training videos.
            keys: Keys of the training videos that are used.
            levels: The teacher's maps, running or cached; None if no phase uses them.
            held_out: Videos whose terms are logged after every epoch, with the student's own memory; or None.
        """
        self.config, self.start, self.words, self.transform = config, start, words, transform
        self.source, self.keys, self.levels, self.held_out = source, list(keys), levels, held_out
        self.taught_by = "" if levels is None else levels.fingerprint

    def build_student(self) -> VideoStudent:
        memory, clips = self.config.student.memory, self.config.clips
        with quiet_transformers():
            model = load_with_memory(self.start, memory.latents, memory.layers, memory.windows)
        model.config.memory_level, model.config.memory_marks = memory.level, memory.marks
        model.config.memory_context, model.config.memory_phrase = clips.context, clips.phrase
        model.config.memory_stride, model.config.geometry = self._stride(), self.config.data.geometry
        return VideoStudent(model, str(self.start))

    def _stride(self) -> int:
        """Return the number of frames from the first to the second annotated frame of the first usable video."""
        for key in self.keys:
            try:
                first, second, *_ = self.source.record(key).annotated
            except (BadVideo, ValueError):
                continue
            return second - first
        raise UserError(f"none of {len(self.keys)} videos has two annotated frames that can be read")

    def export(self, student: nn.Module) -> nn.Module:
        """Return the whole model, the image student with its memory."""
        assert isinstance(student, VideoStudent)
        return student.model

    def dataset(self, epoch: int) -> Dataset[ClipItem]:
        phase = Phase.of(self.config.train, epoch)
        share = 1.0 if self._aligns(phase) else self.own_share(epoch)
        rules = self.rules(share, cached=self.levels is not None)
        read = None if self.levels is None else partial(self._read, phase=phase)
        return ClipDataset(self.source, self.transform, self.keys, rules, self.config.data.seed, epoch, read)

    def _aligns(self, phase: Phase) -> bool:
        """Whether the phase aligns the student's maps with the teacher's, for all context frames."""
        return ALIGN in phase.wanted(self._memory_terms)

    def rules(self, own: float, cached: bool) -> ClipRules:
        """Return the rules of clips.

        Args:
            own: Probability that a context frame enters the memory with the student's features.
            cached: The memory gets features of a teacher.
        """
        clips = self.config.clips
        side = self.transform.geometry.image_size // MARK_PIXELS if self.config.student.memory.marks else 0
        return ClipRules(
            clips.context, clips.shortest, clips.objects, clips.per_video, images=own > 0, cached=cached,
            marks=side, lost=clips.lost, own=own,
        )  # fmt: skip

    @property
    def _memory_terms(self) -> list[str]:
        """Names of the run's terms that train the memory."""
        return [name for name in self.config.loss.named if name in MEMORY_TERMS]

    def memory_epochs(self) -> list[int]:
        """Return the epochs that train the memory."""
        train = self.config.train
        phases = [(epoch, train.phase_at(epoch)) for epoch in range(train.total_epochs)]
        return [epoch for epoch, phase in phases if phase is None or phase.terms is None or ALIGN not in phase.terms]

    def own_share(self, epoch: int) -> float:
        """Return the probability that a context frame enters the memory with the student's features.

        It is linear over the epochs that train the memory, and reaches its end in the last one.
        """
        (first, last), epochs = self.config.clips.own, self.memory_epochs()
        if len(epochs) < 2:
            return last
        return first + (last - first) * epochs.index(epoch) / (len(epochs) - 1)

    def stages(self, train) -> list[tuple[str, int]]:
        """Add the last epoch, in which the memory has the student's own features."""
        found, last = super().stages(train), train.total_epochs - 1
        return found if last in [epoch for _, epoch in found] else stages_at(train, [*(e for _, e in found), last])

    def collate(self, items: Sequence[ClipItem], phase: Phase = Phase()) -> VideoBatch:
        clips = collate_clips(items)
        asked = [_questions(item, self.config.student.memory.marks, self.config.clips.phrase) for item in items]
        prompts = ConceptPrompts.words(
            [text for own in asked for text, _ in own], [row for row, own in enumerate(asked) for _ in own]
        )
        which = [(row, slots) for row, own in enumerate(asked) for _, slots in own]
        marks = None
        if clips.marks is not None:
            empty = torch.zeros(clips.marks.shape[2:])
            marks = torch.stack([clips.marks[row, slots[0]] if slots else empty for row, slots in which])
        past = Past(
            (clips.query_rows[:, None] - clips.context_rows).float() * clips.context_valid, clips.context_valid,
            clips.own, clips.context, None, marks,
        )  # fmt: skip
        read = [item for item in items if item.teacher_features]
        frames = tuple(frame for item in read for frame in self._frames(item, phase))
        features = tuple(torch.cat(parts) for parts in zip(*(item.teacher_features for item in read), strict=True))
        theirs = clips.context_valid if self._aligns(phase) else clips.context_valid & ~clips.own
        return VideoBatch(clips.images, prompts, _truth(clips, which), past, frames, theirs, features, clips.bad)

    def _frames(self, item: ClipItem, phase: Phase) -> list[Frame]:
        """Return the context frames of which the teacher's maps are used: all in alignment, else those not ``own``."""
        numbers = item.context_frames if self._aligns(phase) else item.context_frames[~item.own]
        return [(item.key, number) for number in numbers.tolist()]

    def _read(self, item: ClipItem, phase: Phase) -> Maps:
        assert self.levels is not None
        frames = self._frames(item, phase)
        return self.levels.read(frames) if frames else ()

    def to(self, batch: VideoBatch, device: torch.device) -> VideoBatch:
        leave_out(batch.bad)
        moved = {name: v.to(device) for name, v in vars(batch.past).items() if isinstance(v, Tensor)}
        if self.levels is not None and batch.frames:
            self.levels.to(device)
            (maps,) = self.levels.answer(batch.frames, batch.teacher_features)
            theirs = batch.theirs.to(device)
            moved["teacher"] = maps.new_zeros(*theirs.shape, *maps.shape[1:])
            moved["teacher"][theirs] = maps
        return VideoBatch(
            batch.images.to(device), batch.prompts.to(device), batch.truth.to(device), replace(batch.past, **moved),
            (), batch.theirs, (),
        )  # fmt: skip

    def counts(self, batch: VideoBatch) -> dict[str, int]:
        """Return the number of questions, and for ``align`` of context frames."""
        remembered = dict.fromkeys(ALIGN_TERMS.names(), int(batch.past.valid.sum()))
        return dict.fromkeys(self._memory_terms, len(batch.prompts)) | remembered

    def terms(self, student: nn.Module, batch: VideoBatch, phase: Phase = Phase()) -> Terms:
        loss, device = self.config.loss, batch.images.images.device
        asked = self.words.inputs(batch.prompts, device)
        if self._aligns(phase):
            _, own = student(None, batch.past, asked, batch.prompts.image)
            assert batch.past.teacher is not None
            theirs = to_grid(batch.past.teacher[batch.past.valid], tuple(own.shape[-2:]))
            with torch.autocast(device.type, enabled=False):
                values = {name: ALIGN_TERMS.get(name)(own, theirs) for name in loss.named if name in ALIGN_TERMS}
                return Terms({name: Term(value, loss.weight(name)) for name, value in values.items()})
        answer, _ = student(batch.images.images, batch.past, asked, batch.prompts.image)
        with torch.autocast(device.type, enabled=False):  # losses are float32 in any precision
            matches = match_truth(answer, batch.truth, MatchCost())
            values = video_terms(answer, batch.truth, matches, self._memory_terms)
        return Terms({name: Term(value, loss.weight(name)) for name, value in values.items()})

    @torch.no_grad()
    def validate(self, student: nn.Module, phase: Phase = Phase()) -> dict[str, float]:
        """Return the trained terms and their weighted total on a few batches of held-out clips."""
        if self.held_out is None or self._aligns(phase):
            return {}
        rules = replace(self.rules(1.0, cached=False), lost=0.0)
        clips = ClipDataset(self.held_out, self.transform, self.held_out.keys, rules, self.config.data.seed)
        wanted = phase.wanted(self._memory_terms)
        return held_out_terms(self, clips, self.config.cache.batch_size, student, wanted, phase)


def _questions(item: ClipItem, marked: bool, phrase: str) -> list[tuple[str, list[int]]]:
    """Return the questions about a clip: a phrase, and the slots of its objects.

    With marks, each object has its own question with one of its names. Without marks, one phrase is drawn per object,
    each phrase is asked once, and all objects with this name belong to it. A clip without objects is asked for
    ``phrase``.
    """
    rng, count = random.Random(item.seed), len(item.objects)
    names = item.concepts or ((phrase,),) * count
    texts = [rng.choice(own) for own in names]
    if not count:
        return [(phrase, [])]
    if marked:
        return [(text, [slot]) for slot, text in enumerate(texts)]
    return [(text, [slot for slot in range(count) if text in names[slot]]) for text in dict.fromkeys(texts)]


def _truth(clips: ClipBatch, which: Sequence[tuple[int, list[int]]]) -> ObjectTruth:
    """Return masks and boxes of each question's objects that are visible in the query frame."""
    side = clips.masks.shape[-1]
    shown: Bool[Tensor, "b n"] = clips.valid & clips.masks.flatten(2).any(-1)
    slots = [[slot for slot in own if shown[row, slot]] for row, own in which]
    most = max(1, *(len(own) for own in slots))
    masks = torch.zeros(len(which), most, side, side)
    valid = torch.zeros(len(which), most, dtype=torch.bool)
    for question, ((row, _), own) in enumerate(zip(which, slots, strict=True)):
        masks[question, : len(own)] = clips.masks[row, own].float()
        valid[question, : len(own)] = True
    boxes = torch.zeros(len(which), most, 4)
    boxes[valid] = masks_to_boxes(masks[valid].bool()).float() / side
    return ObjectTruth(masks, boxes, valid)
