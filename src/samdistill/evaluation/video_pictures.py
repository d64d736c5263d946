"""Pictures of videos for a report: single frames with each memory side by side, and frames of a tracked video."""

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

PAST = "previous frame"
Frame = UInt8[np.ndarray, "h w 3"]
Question = tuple[str, int, int]
"""Key of a video, number of a frame, and id of an object."""


class Answers:
    """Callback for ``evaluate_clips`` that stores every predicted mask as run-length encoding.

    Attributes:
        rles: Encoded masks by question.
    """

    def __init__(self) -> None:
        self.rles: dict[Question, Rle] = {}

    def __call__(self, answer: ClipAnswer, mask: Bool[np.ndarray, "h w"]) -> None:
        self.rles[answer.key, answer.frame, answer.object_id] = to_rle(mask)

    def masks(self, answers: Sequence[ClipAnswer]) -> Bool[np.ndarray, "n h w"]:
        """Return the masks of ``answers``, of shape (n, h, w)."""
        rles = [self.rles[a.key, a.frame, a.object_id] for a in answers]
        return coco_mask.decode(rles).transpose(2, 0, 1).astype(bool)


def shown_frames(scores: ClipScores, wanted: int) -> list[list[ClipAnswer]]:
    """Select frames to draw, one per video.

    Videos with look-alikes come first, with only their questions about look-alikes. Other videos follow. In each video
    the last frame with such questions is used.

    Args:
        scores: Scores of all questions.
        wanted: Largest number of frames.

    Returns:
        For each frame its questions, ``MOST`` at most.
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
    """Draw single frames: the frame before, the ground truth, and the predictions with each memory.

    Args:
        source: The videos.
        scores: Scores by row, of the same questions.
        found: Masks by row.
        wanted: Largest number of pictures.
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
    """Show evenly spaced frames of a video file with drawn masks.

    Args:
        film: The video file.
        key: Key of the video.
        phrase: The phrase that was tracked.
        wanted: Largest number of frames.
    """
    video = scan_video(film)
    numbers = evenly(range(len(video)), wanted)
    panels = [Panel(f"frame {number}", enlarged(frame)) for number, frame in read_frames(video, numbers)]
    return Picture(f"{key}, tracked", phrase, GROUND_TRUTH, tuple(panels))


def enlarged(frame: Frame) -> Frame:
    """Resize a frame so that its longer side has ``SIDE`` pixels."""
    scale = SIDE / max(frame.shape[:2])
    across, down = (max(1, round(side * scale)) for side in (frame.shape[1], frame.shape[0]))
    return np.asarray(Image.fromarray(frame).resize((across, down), Image.Resampling.BICUBIC))


def _drawn(frame: Frame, masks: Bool[np.ndarray, "n h w"]) -> Frame:
    return overlay(frame, torch.from_numpy(np.ascontiguousarray(masks)))
