"""A concept detector (SAM 3 or a distilled one): an image, a noun phrase or example boxes in; every instance out."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from jaxtyping import Bool, Float
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import box_convert

from ..checkpoints.files import SANDBOX, TORCH_SUFFIXES, locate
from ..checkpoints.loading import model_kinds, open_config, pretrained
from ..checkpoints.words import Words
from ..config import TeacherConfig
from ..data.transforms import Size
from ..ops.images import normalise
from ..reading import foreign, running
from ..students import EfficientSam3Config, EfficientSam3Model
from ..teachers import Sam3Detector
from ..types import VISUAL, ConceptPrompts, DetectorOutput, ImageBatch, UserError
from .geometry import canvas_of
from .pictures import Laid, image_batch, lay

Box = tuple[float, float, float, float]
AT_ONCE = 32
"""Questions in one call: a question's masks are some 70 MB at 1008 px."""
logger = logging.getLogger("samdistill")
_STUDENT, _TEACHERS = "efficient_sam3", ("sam3", "sam3_video")


class ConceptModel(Protocol):
    """Answers questions about images, without gradient, on the device it is on; it prepares uint8 and text itself.

    image_size: side in pixels of the square canvas it reads.
    """

    @property
    def image_size(self) -> int: ...

    @property
    def words(self) -> Words: ...

    @property
    def model(self) -> nn.Module: ...

    def answer(self, images: ImageBatch, prompts: ConceptPrompts) -> DetectorOutput: ...


class StudentDetector:
    """An ``EfficientSam3Model`` with its tokenizer, on whatever device the model is."""

    def __init__(self, model: EfficientSam3Model, words: Words) -> None:
        self.model, self.words = model, words

    @property
    def image_size(self) -> int:
        return self.model.config.vision_config.image_size

    @torch.no_grad()
    def answer(self, images: ImageBatch, prompts: ConceptPrompts) -> DetectorOutput:
        """Each image is encoded once. Raises ``UserError`` for phrases that ``words`` refuses."""
        device, vision = self.model.device, self.model.config.vision_config
        with running(self.model):
            return self.model(
                pixel_values=normalise(images.images.to(device), tuple(vision.image_mean), tuple(vision.image_std)),
                prompt_images=prompts.image.to(device),
                **self.words.inputs(prompts, device),
            ).answer()


def load_concept_model(
    path: str | Path, image_size: int | None = None, device: torch.device | str = "cpu"
) -> ConceptModel:
    """A detector in float32 and eval mode.

    path: the folder of an ``EfficientSam3Model``; a run that has one in ``student/`` or a detector in ``merged/``; a
    folder or hub id of a ``Sam3Model`` or ``Sam3VideoModel``; an original ``sam3.pt``; or ``sandbox``, the packaged
    detector. image_size: side of the input in pixels; None keeps the checkpoint's. Raises ``UserError`` for what is
    missing, incomplete or of another kind.
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
    kinds = model_kinds(place)
    for folder, kind in kinds.items():
        if kind == _STUDENT:
            return _load_student(folder, image_size, torch.device(device))
        if kind in _TEACHERS:
            return Sam3Detector(teacher.model_copy(update={"path": str(folder)}), device)
    found = f"holds {', '.join(repr(kind) for kind in kinds.values())}" if kinds else "has no config.json"
    raise UserError(
        f"{path}: {found}, no detector of concepts; give a folder of an EfficientSam3Model or a Sam3Model, or a run of "
        "the detection job"
    )


def _load_student(folder: Path, image_size: int | None, device: torch.device) -> StudentDetector:
    config = open_config(folder, EfficientSam3Config)
    if image_size is not None:
        config.vision_config.image_size = image_size
    model = pretrained(EfficientSam3Model, config, folder, folder)
    return StudentDetector(model.to(device), Words.load(folder, config.text_config.vocab_size))


@dataclass(frozen=True)
class Detected:
    """The instances found for one question in one image, best first, in the pixels of the image file.

    boxes: xyxy, clamped to the image. scores: 0..1. presence: 0..1, of the concept being in the image at all; it is a
    factor of every score.
    """

    masks: Bool[Tensor, "n h w"]
    boxes: Float[Tensor, "n 4"]
    scores: Float[Tensor, " n"]
    presence: float

    def __len__(self) -> int:
        return len(self.scores)

    def to(self, device: torch.device | str) -> Detected:
        """A copy with every tensor on ``device``."""
        return Detected(self.masks.to(device), self.boxes.to(device), self.scores.to(device), self.presence)


def detections(
    output: DetectorOutput, row: int, threshold: float, size: Size, canvas: Size, original_size: Size,
    most: int | None = None,
) -> Detected:  # fmt: skip
    """What question ``row`` found with a score of at least ``threshold``, the best ``most`` at most.

    size: height and width of the canvas' unpadded part; original_size: those of the image file. Mask logits are
    upsampled to the canvas, cut to ``size``, resized to the file (bilinear both times) and thresholded at 0. On a
    square canvas that is transformers' post-processing, but for interpolating logits where that interpolates
    probabilities.
    """
    scores = output.scores[row]
    order = scores.argsort(descending=True, stable=True)[:most]
    order = order[scores[order] >= threshold]
    (height, width), (rows, columns) = size, original_size
    masks = torch.zeros(len(order), rows, columns, dtype=torch.bool, device=scores.device)
    for number, query in enumerate(order.tolist()):  # one at a time: a hundred photographs of floats would not fit
        logits = F.interpolate(output.pred_masks[row, query][None, None].float(), canvas, mode="bilinear")
        masks[number] = F.interpolate(logits[..., :height, :width], original_size, mode="bilinear")[0, 0] > 0
    # share of the canvas -> canvas pixels -> pixels of the file
    scale = scores.new_tensor([canvas[1] * columns / width, canvas[0] * rows / height] * 2)
    edge = scores.new_tensor([columns, rows] * 2)
    boxes = torch.minimum((output.pred_boxes[row, order].float() * scale).clamp(min=0), edge)
    return Detected(masks, boxes, scores[order], float(output.presence_logits[row].float().sigmoid()))


def ask_image(
    model: ConceptModel, image: str | Path | Image.Image, text: str | None = None, boxes: Sequence[Box] = (),
    threshold: float = 0.5, geometry: str | None = None,
) -> Detected:  # fmt: skip
    """Every instance in ``image`` of what ``text`` names, of what ``boxes`` show, or of both together.

    boxes: xyxy in pixels of the (upright) image, each around one instance. threshold: of the score, 0..1. geometry:
    ``square`` or ``longest_side``; None takes the model's own. Raises ``UserError`` for
    an image that cannot be read and for prompts that ``check_prompts`` refuses.
    """
    return ask_images(model, [lay(image, canvas_of(model, geometry))], [text], boxes, threshold)[0][0]


def ask_images(
    model: ConceptModel, pictures: Sequence[Laid], texts: Sequence[str | None], boxes: Sequence[Box] = (),
    threshold: float = 0.5,
) -> list[list[Detected]]:  # fmt: skip
    """``ask_image`` for every picture with every one of ``texts``: a list per picture, in the order of ``texts``.

    Pictures are encoded together, each once for up to ``AT_ONCE`` texts. boxes: shown with every text, in the pixels of
    every picture. Raises ``UserError`` for prompts that ``check_prompts`` refuses.
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
    """In one call of the model; the answers of one picture at a time."""
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


def warn_unknown(words: Words, text: str) -> None:
    """Say that a model does not know words of ``text``, where that is so."""
    if unknown := words.unknown(text):
        logger.warning("the model does not know the word(s) %s; its answer means little", ", ".join(unknown))


def check_prompts(words: Words, text: str | None, boxes: Sequence[Box], size: Size) -> None:
    """Raise ``UserError`` unless there is a phrase the model can read, a box inside an image of ``size``, or both."""
    if text is None and not boxes:
        raise UserError("nothing is asked: give --text, --box or both")
    if text is not None and not text.strip():
        raise UserError("--text: empty; give a noun phrase such as 'red car'")
    if text is not None and not words.fits(text):
        raise UserError(f"--text: {text!r} is longer than the {words.context} tokens this model reads; shorten it")
    height, width = size
    for box in boxes:
        shown = ",".join(f"{value:g}" for value in box)
        left, top, right, bottom = box
        if not (left < right and top < bottom):
            raise UserError(f"--box: {shown} encloses nothing; give left,top,right,bottom in pixels")
        if left < 0 or top < 0 or right > width or bottom > height:
            raise UserError(f"--box: {shown} reaches beyond the image, which is {width} x {height} pixels")
