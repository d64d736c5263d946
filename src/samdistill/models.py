"""``load``: open any model for prediction, tracking and evaluation."""

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
from .checkpoints.trackers import tracker_class
from .data.layouts import video_kind
from .data.saco import find_concepts
from .data.skipped import leave_out
from .deployment.folder import export
from .deployment.record import Exported
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
from .inference.session import Session
from .inference.sessions import VideoModel, open_video_model, start_session
from .io import as_path
from .ops.promptable import Promptable
from .progress import Progress
from .types import UserError


class Model:
    """A loaded model. ``load`` creates it.

    There are three kinds: ``detector`` (prompts: phrases and example boxes), ``detector with memory`` (a student of the
    video job, which also has a memory of past frames) and ``promptable`` (prompts: points and boxes).

    Attributes:
        source: Path or name from which it was loaded.
        network: The model itself: a ``Sam3Detector`` or ``StudentDetector``, or a transformers model.
        kind: ``detector``, ``detector with memory`` or ``promptable``.

    Example:
        >>> import samdistill as sd
        >>> sd.load("sandbox-student").kind
        'detector'
    """

    def __init__(self, source: str, network: ConceptModel | Promptable) -> None:
        self.source, self.network = source, network
        self._trackers: dict[bool, VideoModel] = {}

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
        """Predict masks on one or several images.

        Args:
            images: One image: a file, a PIL image, or an RGB array (height, width, 3) of dtype uint8. Several images: a
                list of these, a folder, or a glob pattern.
            text: A noun phrase such as ``"red car"``. Only for a detector.
            points: Points (x, y) or (x, y, label) in pixels, on one object. Label 1 (the default) is inside the object,
                0 outside. Only for a promptable model.
            boxes: Boxes (left, top, right, bottom) in pixels. For a promptable model, one object per box; for a
                detector, examples of the concept.
            threshold: Minimum score of an instance, in 0..1. Only for a detector; None means 0.5.
            geometry: ``square`` or ``longest_side``; None uses the geometry saved with the model.
            batch_size: Images in one forward pass. The results do not depend on it.
            progress: Show a progress bar if there are several images.

        Returns:
            A ``Result`` for one image, and a list of them otherwise. Files of a folder or a glob pattern that cannot be
            read are left out with a warning.

        Raises:
            UserError: An image of a list cannot be read, or the prompts do not fit the model or an image.

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
        self, video: str | Path, text: str | None = None, *, boxes: Sequence[Box] = (), points: Sequence[Any] = (),
        threshold: float = 0.5, geometry: str | None = None, frames: int | None = None,
    ) -> Iterator[VideoFrame]:  # fmt: skip
        """Track objects through a video, frame by frame. A student without a memory uses each frame alone.

        A SAM 2 or a SAM 3 for videos tracks with its own memory, which is loaded at the first call.

        Args:
            video: A video file, or a folder of frames in the natural order of their names.
            text: A noun phrase. Without ``boxes`` and ``points``, every instance is tracked, including those that
                appear later. Of the models with a SAM's memory only a ``Sam3VideoModel`` does this.
            boxes: Boxes (left, top, right, bottom) in pixels around objects of the first frame. ``text`` is then the
                name of these objects.
            points: Points (x, y) or (x, y, label) on one object of the first frame, for a SAM's memory.
            threshold: Minimum score of a visible object, in 0..1.
            geometry: ``square`` or ``longest_side``; None uses the geometry saved with the model.
            frames: Maximum number of frames.

        Yields:
            ``VideoFrame`` with ``number``, ``image`` (height, width, 3), ``objects`` (id, score, mask, box) and
            ``draw()``.

        Raises:
            UserError: The video cannot be read, the prompts do not fit, or the model cannot track.

        Example:
            >>> for frame in model.track("clip.mp4", "red circle"):  # doctest: +SKIP
            ...     print(frame.number, [tracked.object_id for tracked in frame.objects if tracked.visible])
        """
        model = self._video_model(worded=not boxes and not points)
        return follow(
            video, model, text, boxes, points=points, threshold=threshold, geometry=geometry, frames=frames
        )  # fmt: skip

    def session(self, *, words: bool = False, threshold: float = 0.5, geometry: str | None = None) -> Session:
        """Start a session that tracks objects through a video, whose frames are pushed one by one.

        Args:
            words: Objects are given by ``add_text`` alone. This takes the whole of a ``Sam3VideoModel``; otherwise its
                tracker is used, which takes masks, boxes and points.
            threshold: Minimum score of a visible object, in 0..1.
            geometry: ``square`` or ``longest_side``; None uses the geometry saved with the model.

        Raises:
            UserError: The model cannot track, or takes no words.

        Example:
            >>> import samdistill as sd
            >>> session = sd.load("sandbox-student").session()
            >>> session.add_mask(np.ones((126, 126), bool))
            1
            >>> session.push(np.zeros((126, 126, 3), np.uint8))[0].visible
            True
        """
        return start_session(self._video_model(worded=words), threshold, geometry)

    def _video_model(self, worded: bool) -> VideoModel:
        """Return the model that tracks. That of a SAM is loaded once for words and once for other prompts."""
        if isinstance(self.network, StudentDetector):
            return self.network
        if worded not in self._trackers:
            device = next(self.module.parameters()).device
            self._trackers[worded] = open_video_model(self.source, worded=worded, device=device)
        return self._trackers[worded]

    def evaluate(self, data: str | Path, **settings: Any) -> Evaluation[Any]:
        """Measure the model on a data set.

        A promptable model is measured on images (mIoU, see ``evaluate``), a detector on (image, phrase) pairs (cgF1,
        see ``evaluate_concepts``), a detector with memory and a SAM with its own memory also on videos (J&F, see
        ``evaluate_videos``).

        Args:
            data: A folder of images or videos, or an annotation file in the SA-Co layout.
            settings: Keyword arguments of the function named above, such as ``teacher`` or ``images``.

        Returns:
            The figures. ``table()`` formats them for a terminal, ``to_dict()`` for JSON.

        Raises:
            UserError: The model cannot be measured on these data.

        Example:
            >>> model.evaluate("data/coco", teacher="sandbox-sam").rows  # doctest: +SKIP
        """
        place = as_path(data)
        images = isinstance(self.network, Promptable) and tracker_class(self.source) is None
        if not images and place.is_dir() and find_concepts(place) is None and video_kind(place) is not None:
            return evaluate_videos(self.source, place, **settings)
        if isinstance(self.network, Promptable):
            return evaluate(self.source, place, **settings)
        return evaluate_concepts(self.source, place, **settings)

    def export(self, out: str | Path, **settings: Any) -> Exported:
        """Export the model to a folder for devices, see ``export``. It is loaded again from ``source``.

        Args:
            out: The folder.
            settings: Keyword arguments of ``export``, such as ``to`` or ``vocabulary``.

        Raises:
            UserError: As ``export``.

        Example:
            >>> model.export("exported", vocabulary="red circle,star").table()  # doctest: +SKIP
        """
        return export(self.source, out, **settings)


def load(model: str | Path, *, device: str | torch.device | None = None) -> Model:
    """Load a model for inference.

    Args:
        model: A run folder or its ``student/`` or ``merged/`` folder, a folder that ``samdistill export`` wrote, a
            Hugging Face folder or hub id, an original checkpoint file (``sam3.pt``, also a merged one of EfficientSAM3,
            ``sam_vit_b_01ec64.pth``, ``mobile_sam.pt``, ``edge_sam.pth``), or a sandbox name (``sandbox``,
            ``sandbox-student``, ``sandbox-sam``, ``sandbox-mobile``).
        device: Device of the model. None uses CUDA or MPS if available, and the CPU otherwise.

    Returns:
        The model with its tokenizer and its geometry.

    Raises:
        UserError: The model does not exist or cannot be read.

    Example:
        >>> import samdistill as sd
        >>> sd.load("sandbox-mobile").kind
        'promptable'
    """
    where = torch.device(device) if device is not None else default_device()
    if str(model) != SANDBOX and answers_prompts(model):  # `sandbox` names two models; the detector is meant
        return Model(str(model), load_promptable(model).to(where))
    return Model(str(model), load_concept_model(model, device=where))


def _pictures(images: Picture | Sequence[Picture]) -> tuple[list[Picture], bool]:
    """Return a list of images, and whether ``images`` is a single one."""
    if isinstance(images, Image.Image | np.ndarray):
        return [images], True
    if isinstance(images, str | Path):
        files: list[Picture] = list(find_images(images))
        return files, as_path(images).is_file()
    return [one for given in images for one in _pictures(given)[0]], False
