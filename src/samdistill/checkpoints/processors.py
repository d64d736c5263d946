"""Processors of model folders, so that transformers prepares images and phrases as this package does.

``write_processor`` derives a folder's processor from its ``config.json`` and its tokenizer. Everything that writes a
model folder calls it. A processor is never copied, because another trunk changes size, geometry and normalisation.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from transformers import (
    PreTrainedConfig,
    ProcessorMixin,
    Sam2ImageProcessor,
    Sam2Processor,
    Sam2VideoProcessor,
    Sam2VideoVideoProcessor,
    Sam3ImageProcessor,
    Sam3Processor,
    Sam3TrackerProcessor,
    Sam3TrackerVideoProcessor,
    Sam3VideoProcessor,
    SamConfig,
    SamImageProcessor,
    SamProcessor,
)

from ..io import write_json
from ..ops.images import IMAGENET_MEAN, IMAGENET_STD, SAM3_MEAN, SAM3_STD, Statistics
from ..students import (
    ConceptProcessor,
    EfficientSam3Config,
    HostedSamConfig,
    HostedVideoConfig,
    HostedVideoLiteConfig,
    MobileSamConfig,
)
from ..students.processor import SAM3_CONTEXT
from ..types import UserError
from .layout import STUDENT_TRUNK
from .loading import open_config, read_settings
from .words import read_tokenizer

_PROMPTED: dict[str, type[ProcessorMixin]] = {
    "sam": Sam2Processor, MobileSamConfig.model_type: Sam2Processor, HostedSamConfig.model_type: Sam2Processor,
    "sam2": Sam2Processor, "sam2_video": Sam2VideoProcessor, "sam3_tracker": Sam3TrackerProcessor,
    "sam3_tracker_video": Sam3TrackerVideoProcessor,
}  # fmt: skip
_CONCEPTS: dict[str, type[ProcessorMixin]] = {
    "sam3": Sam3Processor, "sam3_lite_text": Sam3Processor, EfficientSam3Config.model_type: Sam3Processor,
    "sam3_video": Sam3VideoProcessor, HostedVideoConfig.model_type: Sam3Processor,
    HostedVideoLiteConfig.model_type: Sam3Processor,
}  # fmt: skip
PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json")


class Inputs(NamedTuple):
    """How a model's images are prepared.

    Attributes:
        side: Side of the square canvas in pixels.
        cell: Pixels per cell of the image embedding. Low-resolution masks have 4 x 4 pixels per cell.
        geometry: ``square`` or ``longest_side``.
        mean, std: Normalisation, in the range 0..1.
    """

    side: int
    cell: int
    geometry: str
    mean: Statistics
    std: Statistics


def inputs_of(config: PreTrainedConfig) -> Inputs:
    """Read from a model's configuration how its images are prepared."""
    parts = _parts(config)[::-1]  # the innermost part describes the trunk that reads the images
    sam3 = "sam3" in config.model_type
    side = _first(parts, ("image_size",), 1024)
    mean = _first(parts, ("host_mean", "image_mean"), SAM3_MEAN if sam3 else IMAGENET_MEAN)
    std = _first(parts, ("host_std", "image_std"), SAM3_STD if sam3 else IMAGENET_STD)
    return Inputs(
        side[0] if isinstance(side, list | tuple) else side, _first(parts, ("patch_size",), 16), geometry_of(config),
        tuple(mean), tuple(std),
    )  # fmt: skip


def geometry_of(config: Any) -> str:
    """Return the geometry that a configuration or that of its trunk names.

    Without an entry, it is ``longest_side`` (aspect kept) for a SAM and ``square`` (stretched) for all other models.
    """
    named = _first(_parts(config), ("geometry",), None)
    return named or ("longest_side" if isinstance(config, SamConfig) else "square")


def _parts(config: Any) -> list[Any]:
    """Return a configuration and those of its detector, its vision encoder and its trunk, from outside to inside."""
    parts = [config]
    for step in ("detector_config", "vision_config", "backbone_config"):
        if (inner := getattr(parts[-1], step, None)) is not None:
            parts.append(inner)
    return parts


def _first(parts: list[Any], names: tuple[str, ...], default: Any) -> Any:
    found = (getattr(part, name, None) for part in parts for name in names)
    return next((value for value in found if value is not None), default)


def processor_of(config: PreTrainedConfig, tokenizer: Any = None) -> Any:
    """Return the processor of a model.

    Args:
        config: Configuration of the model.
        tokenizer: Its tokenizer, or None.

    Returns:
        transformers' class for the model and the geometry. ``SamProcessor`` keeps the aspect ratio for any model with
        points and boxes. For a trunk, and for a detector without a tokenizer or with ``longest_side``, it is an image
        processor, because transformers has no other class for them.
    """
    about, kind = inputs_of(config), config.model_type
    padded = about.geometry == "longest_side"
    image = _image_processor(about, "sam3" in kind)
    if padded:
        return SamProcessor(image) if kind in _PROMPTED or kind == "sam3_video" else image
    name = {**_PROMPTED, **_CONCEPTS}.get(kind)
    if name is None or (kind in _CONCEPTS and tokenizer is None):
        return image
    if name is Sam3Processor and (context := _context(config, tokenizer)) < SAM3_CONTEXT:
        return ConceptProcessor(image, tokenizer, context)
    square = {"height": about.side, "width": about.side}
    video = Sam2VideoVideoProcessor(size=square, image_mean=list(about.mean), image_std=list(about.std))
    parts = {"image_processor": image, "video_processor": video, "tokenizer": tokenizer}
    return name(**{part: parts[part] for part in name.get_attributes()})


def _image_processor(about: Inputs, sam3: bool) -> Any:
    masks = 4 * -(-about.side // about.cell)
    shared = {"image_mean": list(about.mean), "image_std": list(about.std)}
    if about.geometry == "longest_side":
        sizes = {"size": {"longest_edge": about.side}, "mask_size": {"longest_edge": masks}}
        pads = {
            "pad_size": {"height": about.side, "width": about.side},
            "mask_pad_size": {"height": masks, "width": masks},
        }
        return SamImageProcessor(**shared, **sizes, **pads)
    sizes = {"size": {"height": about.side, "width": about.side}, "mask_size": {"height": masks, "width": masks}}
    return (Sam3ImageProcessor if sam3 else Sam2ImageProcessor)(**shared, **sizes)


def _context(config: Any, tokenizer: Any) -> int:
    positions = getattr(config.text_config, "max_position_embeddings", SAM3_CONTEXT)
    return min(SAM3_CONTEXT, positions, tokenizer.model_max_length)


def write_processor(folder: Path) -> None:
    """Write the processor of the model in ``folder``, whose ``config.json`` and tokenizer are already there.

    ``AutoProcessor.from_pretrained(folder)`` opens it. Nothing is written for a text encoder, of which it opens the
    tokenizer, nor for a model of another package.

    Raises:
        UserError: ``config.json`` cannot be read.
    """
    if read_settings(folder).get("model_type") not in (*_PROMPTED, *_CONCEPTS, STUDENT_TRUNK):
        return
    try:
        tokenizer = read_tokenizer(folder)
    except UserError:  # a model without words, or one whose tokenizer transformers cannot read either
        tokenizer = None
    name, settings = processor_file(processor_of(open_config(folder), tokenizer))
    write_json(folder / name, settings, indent=2)


def processor_file(processor: Any) -> tuple[str, dict[str, Any]]:
    """Return the name and the content of a processor's file."""
    settings = json.loads(processor.to_json_string())
    if isinstance(processor, ProcessorMixin):
        return PROCESSOR_FILES[0], settings
    # named as the processor, or AutoProcessor would take a tokenizer that it invents for a SAM 3 without one
    return PROCESSOR_FILES[1], settings | {"processor_class": type(processor).__name__}
