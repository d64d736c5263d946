"""Concept detectors (SAM 3 or a student): an image and a noun phrase or example boxes to all instances."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from jaxtyping import Bool, Float, UInt8
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import box_convert

from ..checkpoints.exported import exported_kind, open_exported
from ..checkpoints.files import SANDBOX, TORCH_SUFFIXES, locate
from ..checkpoints.loading import model_kinds, open_config, pretrained
from ..checkpoints.processors import inputs_of
from ..checkpoints.words import Phrases, Words
from ..config import TeacherConfig
from ..data.transforms import Size
from ..ops.images import normalise
from ..reading import foreign, running
from ..students import TEXT_STUDENT, VIDEO_DETECTORS, VideoDetector
from ..teachers import Sam3Detector
from ..types import VISUAL, ConceptPrompts, DetectorOutput, ImageBatch, UserError
from .geometry import canvas_of
from .pictures import Laid, image_batch, lay

Box = tuple[float, float, float, float]
AT_ONCE = 32
"""Maximum number of prompts in one forward pass. The masks of one prompt take about 70 MB at 1008 px."""
logger = logging.getLogger("samdistill")
_TEACHERS = ("sam3", "sam3_lite_text", "sam3_video")


class ConceptModel(Protocol):
    """Interface of a detector: images and concept prompts to instances.

    ``answer`` runs without gradients on the model's device. It takes uint8 canvases and text, and normalises and
    tokenizes them. ``image_size`` is the side of the square canvas in pixels.
    """

    @property
    def image_size(self) -> int: ...

    @property
    def words(self) -> Phrases: ...

    @property
    def model(self) -> nn.Module: ...

    def answer(self, images: ImageBatch, prompts: ConceptPrompts) -> DetectorOutput: ...


class StudentDetector:
    """A described student, or a hosted one with a memory, with its tokenizer. It runs on the model's device."""

    def __init__(self, model: VideoDetector, words: Phrases) -> None:
        self.model, self.words = model, words

    @property
    def image_size(self) -> int:
        return inputs_of(self.model.config).side

    def pixels(self, canvases: UInt8[Tensor, "b 3 s s"]) -> Float[Tensor, "b 3 s s"]:
        """Return canvases on the model's device, normalised for it."""
        about = inputs_of(self.model.config)
        return normalise(canvases.to(self.model.device), about.mean, about.std)

    @torch.no_grad()
    def answer(self, images: ImageBatch, prompts: ConceptPrompts) -> DetectorOutput:
        """Run the detector. Each image is encoded once. Raises ``UserError`` for phrases that ``words`` refuses."""
        device = self.model.device
        with running(self.model):
            return self.model(
                pixel_values=self.pixels(images.images),
                prompt_images=prompts.image.to(device),
                **self.words.inputs(prompts, device),
            ).answer()


def load_concept_model(
    path: str | Path, image_size: int | None = None, device: torch.device | str = "cpu"
) -> ConceptModel:
    """Load a detector in float32 and eval mode.

    Args:
        path: One of: the folder of an ``EfficientSam3Model`` or of a hosted student with a memory; a run folder with a
            student in ``student/`` or a detector
            in ``merged/``; a folder that ``samdistill export`` wrote; a folder or hub id of a ``Sam3Model``,
            ``Sam3LiteTextModel`` or ``Sam3VideoModel``; an original ``sam3.pt``; ``sandbox``, the packaged detector.
        image_size: Side of the input in pixels. None keeps the checkpoint's.
        device: Device of the model.

    Raises:
        UserError: The model does not exist, is incomplete, or is not a detector.
    """
    with foreign(path, "no path of a model"):
        teacher = TeacherConfig(kind="sam3", path=str(path), image_size=image_size)
    if str(path) == SANDBOX:
        return Sam3Detector(teacher, device)
    place = locate(path)
    if place.is_file():
        if place.suffix not in TORCH_SUFFIXES:
            raise UserError(f"{path}: give a model's folder, or an original sam3.pt")
        return Sam3Detector(teacher, device)
    if exported_kind(place) is not None:
        return open_exported(place, "detector", image_size)
    kinds = model_kinds(place)
    for folder, kind in kinds.items():
        if kind in VIDEO_DETECTORS:
            return _load_student(folder, VIDEO_DETECTORS[kind], image_size, torch.device(device))
        if kind in _TEACHERS:
            return Sam3Detector(teacher.model_copy(update={"path": str(folder)}), device)
    if TEXT_STUDENT in kinds.values():
        raise UserError(
            f"{path}: a text encoder without a vision encoder: `samdistill merge {path} --into TEACHER --out FOLDER` "
            "makes a model that answers questions"
        )
    found = f"holds {', '.join(repr(kind) for kind in kinds.values())}" if kinds else "has no config.json"
    raise UserError(
        f"{path}: {found}, no detector of concepts; give a folder of an EfficientSam3Model or a Sam3Model, or a run of "
        "the detection job"
    )


def _load_student(
    folder: Path, kind: type[VideoDetector], image_size: int | None, device: torch.device
) -> StudentDetector:
    config = open_config(folder, kind.config_class)
    if image_size is not None:
        config.resize(image_size)
    model = pretrained(kind, config, folder, folder)
    return StudentDetector(model.to(device), Words.load(folder, config.text_config.vocab_size))


@dataclass(frozen=True)
class Detected:
    """Instances of one concept in one image, by descending score, in pixels of the image file.

    Attributes:
        masks: Masks, (n, h, w).
        boxes: Boxes, (n, 4), xyxy in pixels, clamped to the image.
        scores: Scores in 0..1, (n,).
        presence: Probability in 0..1 that the concept is in the image. It is a factor of every score.
    """

    masks: Bool[Tensor, "n h w"]
    boxes: Float[Tensor, "n 4"]
    scores: Float[Tensor, " n"]
    presence: float

    def __len__(self) -> int:
        return len(self.scores)

    def to(self, device: torch.device | str) -> Detected:
        """Return a copy with every tensor on ``device``."""
        return Detected(self.masks.to(device), self.boxes.to(device), self.scores.to(device), self.presence)


def detections(
    output: DetectorOutput, row: int, threshold: float, size: Size, canvas: Size, original_size: Size,
    most: int | None = None,
) -> Detected:  # fmt: skip
    """Post-process the output of one prompt into instances at the size of the image file.

    Mask logits are upsampled to the canvas, cropped to ``size``, resized to ``original_size`` (bilinear both times) and
    thresholded at 0. On a square canvas this equals transformers' post-processing, except that transformers
    interpolates probabilities and this function logits.

    Args:
        output: The detector's output.
        row: Row of the prompt.
        threshold: Minimum score.
        size: Height and width of the part of the canvas that is not padding.
        canvas: Height and width of the canvas.
        original_size: Height and width of the image file.
        most: Maximum number of instances; those with the highest scores are kept. None keeps all.
    """
    scores = output.scores[row]
    order = scores.argsort(descending=True, stable=True)[:most]
    order = order[scores[order] >= threshold]
    (height, width), (rows, columns) = size, original_size
    masks = torch.zeros(len(order), rows, columns, dtype=torch.bool, device=scores.device)
    for number, query in enumerate(order.tolist()):  # one at a time: float maps of all instances need too much memory
        logits = F.interpolate(output.pred_masks[row, query][None, None].float(), canvas, mode="bilinear")
        masks[number] = F.interpolate(logits[..., :height, :width], original_size, mode="bilinear")[0, 0] > 0
    # from fractions of the canvas to pixels of the file
    scale = scores.new_tensor([canvas[1] * columns / width, canvas[0] * rows / height] * 2)
    edge = scores.new_tensor([columns, rows] * 2)
    boxes = torch.minimum((output.pred_boxes[row, order].float() * scale).clamp(min=0), edge)
    return Detected(masks, boxes, scores[order], float(output.presence_logits[row].float().sigmoid()))


def ask_image(
    model: ConceptModel, image: str | Path | Image.Image, text: str | None = None, boxes: Sequence[Box] = (),
    threshold: float = 0.5, geometry: str | None = None,
) -> Detected:  # fmt: skip
    """Detect every instance of a concept in an image.

    Args:
        model: The detector.
        image: An image file or a PIL image.
        text: A noun phrase that names the concept. It can be combined with ``boxes``.
        boxes: Boxes (xyxy, pixels of the upright image), each around one example of the concept.
        threshold: Minimum score, in 0..1.
        geometry: ``square`` or ``longest_side``; None uses the model's own.

    Raises:
        UserError: The image cannot be read, or ``check_prompts`` refuses the prompts.
    """
    return ask_images(model, [lay(image, canvas_of(model, geometry))], [text], boxes, threshold)[0][0]


def ask_images(
    model: ConceptModel, pictures: Sequence[Laid], texts: Sequence[str | None], boxes: Sequence[Box] = (),
    threshold: float = 0.5,
) -> list[list[Detected]]:  # fmt: skip
    """Detect the instances of several concepts in several images.

    Images are encoded in batches, and each image once per ``AT_ONCE`` texts. ``boxes`` are given with every text, in
    pixels of each image.

    Returns:
        For each picture, one ``Detected`` per text, in the order of ``texts``.

    Raises:
        UserError: ``check_prompts`` refuses the prompts.
    """
    for picture in pictures:
        for text in texts:
            check_prompts(model.words, text, boxes, picture.original)
    found = [list[Detected]() for _ in pictures]
    for start in range(0, len(texts), AT_ONCE):
        some = texts[start : start + AT_ONCE]
        step = AT_ONCE // len(some)
        for first in range(0, len(pictures), step):
            part = slice(first, first + step)
            for own, answers in zip(found[part], _ask(model, pictures[part], some, boxes, threshold), strict=True):
                own += answers
    return found


def _ask(
    model: ConceptModel, pictures: Sequence[Laid], texts: Sequence[str | None], boxes: Sequence[Box], threshold: float
) -> Iterator[list[Detected]]:
    """Run one forward pass for all pictures and texts. Yields the instances of one picture at a time."""
    count, side = len(texts), model.image_size
    given = torch.tensor(boxes, dtype=torch.float32).reshape(1, -1, 2, 2)
    corners = torch.cat([picture.place.points(given, picture.original) for picture in pictures])
    exemplars = box_convert(corners.reshape(len(pictures), len(boxes), 4) / side, "xyxy", "cxcywh").repeat_interleave(
        count, 0
    )
    prompts = ConceptPrompts(
        tuple(VISUAL if text is None else text for text in texts) * len(pictures),
        torch.arange(len(pictures)).repeat_interleave(count), exemplars,
        torch.ones(len(exemplars), len(boxes), dtype=torch.int64),
    )  # fmt: skip
    output = model.answer(image_batch(pictures), prompts)
    for number, picture in enumerate(pictures):
        rows = range(number * count, (number + 1) * count)
        yield [detections(output, row, threshold, picture.size, (side, side), picture.original) for row in rows]


def warn_unknown(words: Phrases, text: str) -> None:
    """Log a warning if ``text`` has words that the model's vocabulary does not contain."""
    if unknown := words.unknown(text):
        logger.warning(
            "the model's tokenizer does not know the word(s) %s; the result is not reliable", ", ".join(unknown)
        )


def check_prompts(words: Phrases, text: str | None, boxes: Sequence[Box], size: Size) -> None:
    """Check a phrase and boxes against what a model reads and an image of ``size`` (height, width).

    Raises:
        UserError: There is neither a phrase nor a box, the model cannot read the phrase, or a box is empty or extends
            beyond the image.
    """
    if text is None and not boxes:
        raise UserError("no prompt given: give --text, --box or both")
    if text is not None:
        check_phrase(words, text)
    check_boxes(boxes, size)


def check_phrase(words: Phrases, text: str) -> None:
    """Raise ``UserError`` if a phrase is empty or the model cannot read it."""
    if not text.strip():
        raise UserError("--text: empty; give a noun phrase such as 'red car'")
    if (why := words.problem(text)) is not None:
        raise UserError(f"--text: {text!r} is {why}; {words.advice}")


def check_boxes(boxes: Sequence[Box], size: Size) -> None:
    """Raise ``UserError`` if a box is empty or extends beyond an image of ``size`` (height, width)."""
    height, width = size
    for box in boxes:
        shown = ",".join(f"{value:g}" for value in box)
        left, top, right, bottom = box
        if not (left < right and top < bottom):
            raise UserError(f"--box: {shown} is empty; give left,top,right,bottom in pixels")
        if left < 0 or top < 0 or right > width or bottom > height:
            raise UserError(f"--box: {shown} reaches beyond the image, which is {width} x {height} pixels")
