"""Parts of a video run: videos, teacher, and image student."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch

from ...checkpoints.files import STUDENT_FOLDER, locate
from ...checkpoints.loading import CONFIG
from ...checkpoints.processors import inputs_of
from ...checkpoints.student import video_config
from ...checkpoints.words import Words
from ...config import AugmentConfig
from ...data import Geometry, ViewTransform
from ...data.videos import VideoSource, open_videos
from ...store import StoreSpec
from ...teachers import DetectorInfo, RunningFrames, Sam3Detector, describe_detector
from ...types import ImageBatch, UserError
from ..caching import Specs
from .config import VideoRunConfig
from .student import COARSEST
from .task import ALIGN

logger = logging.getLogger("samdistill")


@dataclass(frozen=True)
class VideoParts:
    """Parts of a video run. Each is built on first access.

    Attributes:
        config: Configuration of the run.
    """

    config: VideoRunConfig

    @cached_property
    def teacher_info(self) -> DetectorInfo:
        return describe_detector(self.config.teacher)

    def teacher(self, device: torch.device | str = "cpu") -> Sam3Detector:
        """Load the teacher."""
        return Sam3Detector(self.config.teacher, torch.device(device))

    @cached_property
    def cached_view(self) -> ViewTransform:
        """Transform of frames to the teacher's canvas, without augmentation."""
        return ViewTransform(Geometry(self.teacher_info.image_size, self.config.data.geometry), AugmentConfig())

    @cached_property
    def train_source(self) -> VideoSource:
        return self._open("train")

    @cached_property
    def held_out_source(self) -> VideoSource:
        return self._open("held_out")

    def _open(self, part: Literal["train", "held_out"]) -> VideoSource:
        """Open the training or held-out videos.

        A root with the folders ``data.split`` and ``data.held_out`` is divided by them, and ``data.ids`` select among
        its training videos. Otherwise videos are divided by a hash of the key.
        """
        data = self.config.data
        folders = [None if name is None else data.root / name for name in (data.split, data.held_out)]
        if not all(folder is not None and folder.is_dir() for folder in folders):
            return open_videos(data.root, data.kind, part, data.held_out_fraction, data.fraction, data.ids)
        if data.split == data.held_out:
            raise UserError(f"data.held_out: {data.held_out!r} is also the training split; name another, or null")
        if part == "train":
            return open_videos(data.root / data.split, data.kind, part, 0.0, data.fraction, data.ids)
        return open_videos(data.root / str(data.held_out), data.kind, part, 1.0)

    @property
    def level(self) -> int:
        """FPN level in the memory."""
        return self.config.student.memory.level

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape of one record: channels, height and width of the FPN level of one frame."""
        info = self.teacher_info
        side = info.levels[2] // (2 if self.level == 3 else 1)
        return info.hidden_size, side, side

    def running(self, device: torch.device | str = "cpu") -> RunningFrames:
        """Load the teacher, which computes the FPN level of any frame.

        Raises:
            UserError: Its maps have another shape than its configuration implies.
        """
        teacher = self.teacher(device)
        refuse_other_shape(self, teacher)
        place, size = self.cached_view.geometry, self.config.cache.batch_size
        return RunningFrames(teacher, self.train_source, place, self.level, size)

    def specs(self, fingerprint: str) -> Specs:
        """Return the specification of the store, for the teacher with this fingerprint."""
        spec = StoreSpec(
            tap=f"fpn_level_{self.level}", shape=self.shape, image_size=self.teacher_info.image_size,
            teacher=fingerprint, transform=self.cached_view.fingerprint, codec=self.config.cache.codec,
        )  # fmt: skip
        return {"": spec}

    @cached_property
    def start(self) -> Path:
        """Folder of the image student. Without one in the config, the newest below ``student.runs``."""
        wanted, runs = self.config.student.start, self.config.student.runs
        if wanted is not None:
            return _image_student(wanted)
        found = [path.parent for path in runs.glob("**/student/config.json") if _is_image_student(path.parent)]
        if not found:
            raise UserError(
                f"student.start: no student of the detection job below {runs}; give the run that trained one, or train "
                "one first"
            )
        newest = max(found, key=lambda folder: (folder / "config.json").stat().st_mtime)
        logger.warning("no student.start is given: taking %s, the newest below %s", newest, runs)
        return newest

    @cached_property
    def resolved(self) -> VideoRunConfig:
        """The config with the image student that was found. It is saved in the run folder."""
        if self.config.student.start is not None:
            return self.config
        return self.config.model_copy(update={"student": self.config.student.model_copy(update={"start": self.start})})

    @cached_property
    def image_student_config(self) -> Any:
        """Configuration of the image student.

        Raises:
            UserError: The student does not fit the teacher's maps or the settings of the memory.
        """
        found = video_config(self.start)
        width, theirs = found.vision_config.fpn_hidden_size, self.teacher_info.hidden_size
        if width != theirs:
            raise UserError(
                f"{self.start}: a student of {width} channels cannot remember maps of {theirs}, which "
                f"{self.teacher_info.path} has; give the student that this teacher distilled"
            )
        side = found.level_side(self.level)
        windows = self.config.student.memory.windows
        if windows > side:
            raise UserError(
                f"student.memory.windows={windows}: level {self.level} of {self.start} has {side} x {side} cells; give "
                f"{side} at most"
            )
        if self.aligns and self.level != COARSEST:
            raise UserError(
                f"train.phases: level {self.level} feeds the heads and stays as the detection job left it, so there is "
                f"nothing to align; leave that phase out, or set student.memory.level={COARSEST}"
            )
        return found

    @cached_property
    def words(self) -> Words:
        """The student's tokenizer."""
        text = self.image_student_config.text_config
        return Words.load(self.start, text.vocab_size)

    @cached_property
    def view(self) -> ViewTransform:
        """Transform of frames to the student's canvas."""
        size = inputs_of(self.image_student_config).side
        return ViewTransform(Geometry(size, self.config.data.geometry), self.config.data.augment)

    @property
    def reads_teacher(self) -> bool:
        """Whether a phase uses the teacher's maps."""
        return self.aligns or min(self.config.clips.own) < 1

    @property
    def aligns(self) -> bool:
        """Whether a phase aligns the student's FPN level with the teacher's."""
        return any(phase.terms is not None and ALIGN in phase.terms for phase in self.config.train.phases or ())


def refuse_other_shape(parts: VideoParts, teacher: Sam3Detector) -> None:
    """Raise ``UserError`` if the teacher's maps of a grey image have another shape than its configuration implies."""
    side = teacher.image_size
    levels = teacher.pyramid(ImageBatch.full(torch.full((1, 3, side, side), 128, dtype=torch.uint8)))
    found = [tuple(level.shape[1:]) for level in levels]
    if parts.level >= len(found) or found[parts.level] != parts.shape:
        shapes = ", ".join("x".join(map(str, shape)) for shape in found)
        raise UserError(
            f"{parts.config.teacher.path}: its pyramid is {shapes}, but level {parts.level} should be "
            f"{'x'.join(map(str, parts.shape))} as its config.json says; give another teacher.path"
        )


def _image_student(place: Path) -> Path:
    """Return the folder of the image student in ``place``.

    Raises:
        UserError: There is none, or it is of another kind or has a memory.
    """
    place = locate(place)
    folders = [folder for folder in (place, place / STUDENT_FOLDER) if (folder / CONFIG).is_file()]
    if not folders:
        raise UserError(f"student.start: {place} holds no student; give a run of the detection job")
    try:
        video_config(folders[0])
    except UserError as error:
        raise UserError(f"student.start: {error}") from None
    return folders[0]


def _is_image_student(folder: Path) -> bool:
    try:
        video_config(folder)
    except UserError:
        return False
    return True
