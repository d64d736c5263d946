"""One door for every model: ``load`` opens whatever it is, and what it gives predicts, tracks and evaluates."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from .checkpoints.files import SANDBOX
from .checkpoints.promptable import load_promptable
from .data.layouts import video_kind
from .data.saco import find_concepts
from .data.skipped import leave_out
from .dist import default_device
from .evaluation.evaluate import evaluate, evaluate_concepts
from .evaluation.evaluate_videos import evaluate_videos
from .evaluation.result import Evaluation
from .inference.concepts import Box, ConceptModel, StudentDetector, load_concept_model
from .inference.label import find_images
from .inference.pictures import Picture
from .inference.predict import BATCH, Asked, answers_prompts, predict_images
from .inference.predict_video import VideoFrame, follow
from .inference.result import Result
from .io import as_path
from .ops.promptable import Promptable
from .progress import Progress
from .types import UserError


class Model:
    """An opened model: a detector (reads words and example boxes), one with a memory (also follows objects through a
    video), or a promptable model (reads points and boxes).

    Attributes:
        source: What it was opened from.
        network: The opened model: a ``Sam3Detector`` or ``StudentDetector``, or a transformers model.
        kind: ``detector``, ``detector with memory`` or ``promptable``.
    """

    def __init__(self, source: str, network: ConceptModel | Promptable) -> None:
        self.source, self.network = source, network

    @property
    def kind(self) -> str:
        if isinstance(self.network, Promptable):
            return "promptable"
        remembers = isinstance(self.network, StudentDetector) and bool(self.network.model.config.memory_latents)
        return "detector with memory" if remembers else "detector"

    @property
    def module(self) -> nn.Module:
        """The ``torch.nn.Module`` with the weights."""
        return self.network if isinstance(self.network, nn.Module) else self.network.model

    def __repr__(self) -> str:
        count = sum(p.numel() for p in self.module.parameters())
        return f"Model({self.source!r}: {self.kind}, {count / 1e6:.2f}M parameters)"

    def __call__(
        self, images: Picture | Sequence[Picture], text: str | None = None, *, points: Sequence[Any] = (),
        boxes: Sequence[Box] = (), threshold: float | None = None, geometry: str | None = None, batch_size: int = BATCH,
        progress: bool = False,
    ) -> Any:  # fmt: skip
        """Ask about one image or many, a batch at a time.

        Args:
            images: A file, a PIL image, an array (height, width, 3) of uint8; or a list, a folder or a glob of files.
            text: A noun phrase such as ``"red car"``, for a detector.
            points: (x, y) or (x, y, label) in pixels, for a promptable model; label 1 is on the object, 0 off it.
            boxes: (left, top, right, bottom) in pixels: one object each, or examples for a detector.
            threshold: Least score of an instance, for a detector (0.5).
            geometry: ``square`` or ``longest_side``; None takes the model's own.
            batch_size: Images in one call of the model. Answers do not depend on it.
            progress: Show a progress bar over many images.

        Returns:
            A ``Result`` for one image, a list of them for a list, a folder or a glob. Files of a folder or a glob that
            cannot be read are left out and named in the log.

        Raises:
            UserError: An image that was given cannot be read, or the model cannot be asked so.

        Example:
            >>> import samdistill as sd
            >>> model = sd.load("sandbox-student")
            >>> image = np.zeros((126, 126, 3), np.uint8)
            >>> model(image, text="red circle", threshold=0.0).masks.shape[1:]
            torch.Size([126, 126])
        """
        wanted, one = _pictures(images)
        asked, found = Asked.of((text,), boxes, points, threshold), list[Result]()
        model = asked.open(self.network)
        with Progress("predicting", len(wanted), "images", progress and not one) as bar:
            for answers, unreadable in predict_images(
                wanted, model, asked, geometry=geometry, batch_size=batch_size, bar=bar
            ):
                if unreadable and (one or not isinstance(images, str | Path)):
                    raise UserError(unreadable[0].reason)
                leave_out(unreadable)
                found += [result for own in answers for result in own]
        return found[0] if one else found

    def track(
        self, video: str | Path, text: str | None = None, *, boxes: Sequence[Box] = (), threshold: float = 0.5,
        geometry: str | None = None, frames: int | None = None,
    ) -> Iterator[VideoFrame]:  # fmt: skip
        """Follow objects through a video, frame by frame.

        Args:
            video: A file, or a folder of frames in the natural order of their names.
            text: What to follow: every instance, also those that appear later.
            boxes: (left, top, right, bottom) around objects of the first frame; ``text`` then is their name.
            threshold: Least score of what is visible.
            geometry: ``square`` or ``longest_side``; None takes the model's own.
            frames: Stop after so many.

        Yields:
            ``VideoFrame`` with ``number``, ``image`` (height, width, 3), ``objects`` (id, score, mask, box of each) and
            ``draw()``.

        Raises:
            UserError: The video cannot be read, or the model is no student of words.
        """
        if not isinstance(self.network, StudentDetector):
            raise UserError(f"{self.source}: cannot follow objects; give a run of the video job or a detection student")
        return follow(video, self.network, text, boxes, threshold=threshold, geometry=geometry, frames=frames)

    def evaluate(self, data: str | Path, **settings: Any) -> Evaluation[Any]:
        """Measure the model on a data set: mIoU of a promptable model on images with masks, cgF1 of a detector on an
        SA-Co file, J&F of a detector with a memory on videos.

        Args:
            data: A folder of images or videos, or a file of concepts.
            settings: As of ``evaluate``, ``evaluate_concepts`` or ``evaluate_videos``, such as ``teacher`` or
                ``images``.

        Returns:
            Rows and figures; ``table()`` and ``to_dict()`` show them.

        Raises:
            UserError: The model cannot be measured on these data.
        """
        place = as_path(data)
        if isinstance(self.network, Promptable):
            return evaluate(self.source, place, **settings)
        if place.is_dir() and find_concepts(place) is None and video_kind(place) is not None:
            return evaluate_videos(self.source, place, **settings)
        return evaluate_concepts(self.source, place, **settings)


def load(model: str | Path, *, device: str | torch.device | None = None) -> Model:
    """Open a model, whatever it is.

    Args:
        model: A run folder or what it holds (``student/``, ``merged/``), a Hugging Face folder or hub id, an original
            file (``sam3.pt``, ``sam_vit_b_01ec64.pth``, ``mobile_sam.pt``), or a sandbox name (``sandbox``,
            ``sandbox-student``, ``sandbox-sam``, ``sandbox-mobile``).
        device: None takes CUDA or MPS where there is one, else the CPU.

    Returns:
        A ``Model``, with its tokenizer and its geometry.

    Raises:
        UserError: There is no model, or it cannot be read.

    Example:
        >>> import samdistill as sd
        >>> sd.load("sandbox-mobile").kind
        'promptable'
    """
    where = torch.device(device) if device is not None else default_device()
    if str(model) != SANDBOX and answers_prompts(model):  # that name is of two models, of which words ask the detector
        return Model(str(model), load_promptable(model).to(where))
    return Model(str(model), load_concept_model(model, device=where))


def _pictures(images: Picture | Sequence[Picture]) -> tuple[list[Picture], bool]:
    """The images one by one, and whether it is a single one."""
    if isinstance(images, Image.Image | np.ndarray):
        return [images], True
    if isinstance(images, str | Path):
        files: list[Picture] = list(find_images(images))
        return files, as_path(images).is_file()
    return [one for given in images for one in _pictures(given)[0]], False
