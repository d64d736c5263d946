"""Video distillation: a memory for the frozen student of images, against the masks of annotated videos.

A teacher gives its maps of past frames, which are replaced step by step by the student's own.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
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
from ...engine.task import Task, stages_at
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
"""Side of a cell of a mark in pixels of the canvas: half of a patch, so that canvases, multiples of 14, divide."""


@dataclass(frozen=True)
class VideoBatch:
    """Query frames, what is asked about them and what is true, and the past.

    frames: of the past, of which the teacher's maps are remembered; theirs: where they are in it. told: on the CPU what
    a worker read of the teacher; on the device ``past.teacher`` is its answer. bad: what other clips stand in for.
    """

    images: ImageBatch
    prompts: ConceptPrompts
    truth: ObjectTruth
    past: Past
    frames: tuple[Frame, ...]
    theirs: Bool[Tensor, "b t"]
    told: Maps
    bad: tuple[BadInput, ...] = ()


class VideoTask(Task[VideoBatch]):
    """Terms between a student's answers about a frame, its past remembered, and what is annotated there.

    words: the student's tokenizer. transform: frames to the student's canvas. keys: of the training videos. levels: the
    teacher's maps, None where nothing is learnt from it. held_out: videos whose terms are logged after every epoch,
    with the student's own memory, as in use.
    """

    leaves_unused = True  # each phase leaves out what the other trains

    def __init__(
        self, config: VideoRunConfig, start: Path, words: Words, transform: ViewTransform, source: VideoSource,
        keys: Sequence[str], levels: FrameSignals | None, held_out: VideoSource | None = None,
    ) -> None:  # fmt: skip
        self.config, self.start, self.words, self.transform = config, start, words, transform
        self.source, self.keys, self.levels, self.held_out = source, list(keys), levels, held_out
        self.taught_by = "" if levels is None else levels.fingerprint
        self.reads_all = False  # of the epoch's data: the teacher's map of every frame, not of those alone that are its

    def build_student(self) -> VideoStudent:
        memory, clips = self.config.student.memory, self.config.clips
        with quiet_transformers():
            model = load_with_memory(self.start, memory.latents, memory.layers, memory.windows)
        model.config.memory_level, model.config.memory_marks = memory.level, memory.marks
        model.config.memory_context, model.config.memory_phrase = clips.context, clips.phrase
        model.config.memory_stride, model.config.geometry = self._stride(), self.config.data.geometry
        return VideoStudent(model, str(self.start))

    def _stride(self) -> int:
        """Frames of a video from one annotated frame to the next, of the first video that can be used."""
        for key in self.keys:
            try:
                first, second, *_ = self.source.record(key).annotated
            except (BadVideo, ValueError):
                continue
            return second - first
        raise UserError(f"none of {len(self.keys)} videos has two annotated frames that can be read")

    def export(self, student: nn.Module) -> nn.Module:
        """The whole model: an image student with its memory, to be used without anything else."""
        assert isinstance(student, VideoStudent)
        return student.model

    def dataset(self, epoch: int) -> Dataset[ClipItem]:
        self.reads_all = ALIGN in self.wanted(epoch)
        share = 1.0 if self.reads_all else self.own_share(epoch)
        rules = self.rules(share, cached=self.levels is not None)
        read = None if self.levels is None else self._read
        return ClipDataset(self.source, self.transform, self.keys, rules, self.config.data.seed, epoch, read)

    def wanted(self, epoch: int) -> frozenset[str]:
        """Names of the terms of the epoch's phase."""
        phase = self.config.train.phase_at(epoch)
        return frozenset(self._memory_terms if phase is None or phase.terms is None else phase.terms)

    def rules(self, own: float, cached: bool) -> ClipRules:
        clips = self.config.clips
        side = self.transform.geometry.image_size // MARK_PIXELS if self.config.student.memory.marks else 0
        return ClipRules(
            clips.context, clips.shortest, clips.objects, clips.per_video, images=own > 0, cached=cached,
            marks=side, lost=clips.lost, own=own,
        )  # fmt: skip

    @property
    def _memory_terms(self) -> list[str]:
        """Those of the run that train the memory."""
        return [name for name in self.config.loss.named if name in MEMORY_TERMS]

    def memory_epochs(self) -> list[int]:
        """The epochs that train the memory."""
        train = self.config.train
        phases = [(epoch, train.phase_at(epoch)) for epoch in range(train.total_epochs)]
        return [epoch for epoch, phase in phases if phase is None or phase.terms is None or ALIGN not in phase.terms]

    def own_share(self, epoch: int) -> float:
        """Of the context frames in ``epoch``; linear over the epochs that train the memory, the end in the last."""
        (first, last), epochs = self.config.clips.own, self.memory_epochs()
        if len(epochs) < 2:
            return last
        return first + (last - first) * epochs.index(epoch) / (len(epochs) - 1)

    def stages(self, train) -> list[tuple[str, int]]:
        """Also the last epoch, in which the memory is the student's own."""
        found, last = super().stages(train), train.total_epochs - 1
        return found if last in [epoch for _, epoch in found] else stages_at(train, [*(e for _, e in found), last])

    def collate(self, items: Sequence[ClipItem]) -> VideoBatch:
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
        frames = tuple(frame for item in items if item.told for frame in self._frames(item))
        told = tuple(torch.cat(parts) for parts in zip(*(item.told for item in items if item.told), strict=True))
        theirs = clips.context_valid if self.reads_all else clips.context_valid & ~clips.own
        return VideoBatch(clips.images, prompts, _truth(clips, which), past, frames, theirs, told, clips.bad)

    def _frames(self, item: ClipItem) -> list[Frame]:
        """The context frames that the teacher is asked about: in alignment all, else those that are its own."""
        numbers = item.context_frames if self.reads_all else item.context_frames[~item.own]
        return [(item.key, number) for number in numbers.tolist()]

    def _read(self, item: ClipItem) -> Maps:
        assert self.levels is not None
        frames = self._frames(item)
        return self.levels.read(frames) if frames else ()

    def to(self, batch: VideoBatch, device: torch.device) -> VideoBatch:
        leave_out(batch.bad)
        moved = {name: v.to(device) for name, v in vars(batch.past).items() if isinstance(v, Tensor)}
        if self.levels is not None and batch.frames:
            self.levels.to(device)
            (maps,) = self.levels.answer(batch.frames, batch.told)
            theirs = batch.theirs.to(device)
            moved["teacher"] = maps.new_zeros(*theirs.shape, *maps.shape[1:])
            moved["teacher"][theirs] = maps
        return VideoBatch(
            batch.images.to(device), batch.prompts.to(device), batch.truth.to(device), replace(batch.past, **moved),
            (), batch.theirs, (),
        )  # fmt: skip

    def counts(self, batch: VideoBatch) -> dict[str, int]:
        """Questions, of which clips have one per object; of ``align`` context frames."""
        remembered = dict.fromkeys(ALIGN_TERMS.names(), int(batch.past.valid.sum()))
        return dict.fromkeys(self._memory_terms, len(batch.prompts)) | remembered

    def terms(self, student: nn.Module, batch: VideoBatch, epoch: int = 0) -> Terms:
        loss, device = self.config.loss, batch.images.images.device
        asked = self.words.inputs(batch.prompts, device)
        if ALIGN in self.wanted(epoch):
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
    def validate(self, student: nn.Module, epoch: int = 0) -> dict[str, float]:
        """The trained terms and their weighted total on held-out clips, a few batches of them."""
        if self.held_out is None or ALIGN in self.wanted(epoch):
            return {}
        rules = replace(self.rules(1.0, cached=False), lost=0.0)
        clips = ClipDataset(self.held_out, self.transform, self.held_out.keys, rules, self.config.data.seed)
        return held_out_terms(self, clips, self.config.cache.batch_size, student, self.wanted(epoch), epoch)


def _questions(item: ClipItem, marked: bool, phrase: str) -> list[tuple[str, list[int]]]:
    """What is asked about a clip: a phrase, and the slots of the objects that answer to it.

    Marked objects are asked about one by one, by one of their names. Else one phrase of each object is asked, once, and
    all objects of that name answer. A clip without an object is asked for ``phrase``, of which it shows none.
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
    """Masks and boxes of each question's objects; one that the frame does not show is no object of it."""
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
