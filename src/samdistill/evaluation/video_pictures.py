"""Videos in a report: single frames answered with every memory side by side, and some frames of a film."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, UInt8
from PIL import Image
from pycocotools import mask as coco_mask

from ..data.saco import Rle, to_rle
from ..data.sources import evenly
from ..data.videos import VideoSource, read_frames, scan_video
from ..inference.drawing import overlay
from .clip_scores import LOOKALIKES, ClipAnswer, ClipScores
from .pictures import GROUND_TRUTH, MOST, SIDE
from .result import Panel, Picture
from .video_result import STUDENT

PAST = "the frame before"
Frame = UInt8[np.ndarray, "h w 3"]
Question = tuple[str, int, int]
"""A video, a frame of it and an object."""


class Answers:
    """The masks of single frames as ``evaluate_clips`` shows them, kept as run lengths."""

    def __init__(self) -> None:
        self.rles: dict[Question, Rle] = {}

    def __call__(self, answer: ClipAnswer, mask: Bool[np.ndarray, "h w"]) -> None:
        self.rles[answer.key, answer.frame, answer.object_id] = to_rle(mask)

    def masks(self, answers: Sequence[ClipAnswer]) -> Bool[np.ndarray, "n h w"]:
        rles = [self.rles[a.key, a.frame, a.object_id] for a in answers]
        return coco_mask.decode(rles).transpose(2, 0, 1).astype(bool)


def shown_frames(scores: ClipScores, wanted: int) -> list[list[ClipAnswer]]:
    """The questions about one frame of each of ``wanted`` videos at most, the last frame of the video that will do.

    Of videos in which something looks alike those questions alone; where there are fewer of them, others follow.
    """
    alike, others = dict[str, list[ClipAnswer]](), dict[str, list[ClipAnswer]]()
    for answer in scores.answers:
        for found, fits in ((alike, LOOKALIKES in answer.groups), (others, True)):
            if not fits:
                continue
            if answer.key not in found or found[answer.key][0].frame != answer.frame:
                found[answer.key] = []
            found[answer.key].append(answer)
    rest = [questions for key, questions in others.items() if key not in alike]
    return [questions[:MOST] for questions in (*alike.values(), *rest)[:wanted]]


def frame_pictures(
    source: VideoSource, scores: Mapping[str, ClipScores], found: Mapping[str, Answers], wanted: int = 4
) -> list[Picture]:
    """Frames with the past that is remembered, the truth, and the answers with each memory.

    scores, found: by row, of the same questions.
    """
    return [_picture(source, questions, scores, found) for questions in shown_frames(scores[STUDENT], wanted)]


def _picture(
    source: VideoSource, questions: Sequence[ClipAnswer], scores: Mapping[str, ClipScores],
    found: Mapping[str, Answers],
) -> Picture:  # fmt: skip
    key, number = questions[0].key, questions[0].frame
    record = source.record(key)
    columns = [record.objects.index(answer.object_id) for answer in questions]
    before = record.annotated[record.row(number) - 1]
    past, now = (enlarged(frame) for frame in source.frames(key, [before, number]))
    panels = [
        Panel(PAST, _drawn(past, source.masks(key, before)[columns])),
        Panel(GROUND_TRUTH, _drawn(now, source.masks(key, number)[columns])),
    ]
    asked = {answer.object_id for answer in questions}
    for name, answers in found.items():
        own = [a.j for a in scores[name].answers if (a.key, a.frame) == (key, number) and a.object_id in asked]
        panels.append(Panel(name, _drawn(now, answers.masks(questions)), float(np.mean(own))))
    phrases = ", ".join(dict.fromkeys(answer.phrase for answer in questions))
    return Picture(f"{key}, frame {number}", phrases, GROUND_TRUTH, tuple(panels))


def film_picture(film: Path, key: str, phrase: str, wanted: int = 6) -> Picture:
    """Frames of a film that was drawn, spread over it."""
    video = scan_video(film)
    numbers = evenly(range(len(video)), wanted)
    panels = [Panel(f"frame {number}", enlarged(frame)) for number, frame in read_frames(video, numbers)]
    return Picture(f"{key}, followed", phrase, GROUND_TRUTH, tuple(panels))


def enlarged(frame: Frame) -> Frame:
    """With ``SIDE`` as its longer side."""
    scale = SIDE / max(frame.shape[:2])
    across, down = (max(1, round(side * scale)) for side in (frame.shape[1], frame.shape[0]))
    return np.asarray(Image.fromarray(frame).resize((across, down), Image.Resampling.BICUBIC))


def _drawn(frame: Frame, masks: Bool[np.ndarray, "n h w"]) -> Frame:
    return overlay(frame, torch.from_numpy(np.ascontiguousarray(masks)))
