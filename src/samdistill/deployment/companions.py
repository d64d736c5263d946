"""What stands beside the files of a model: its configuration, its preprocessing, tokenizer and vocabulary."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from transformers import SamModel

from ..checkpoints.loading import parameter_count
from ..checkpoints.processors import processor_file, processor_of
from ..checkpoints.words import read_tokenizer
from ..inference.concepts import ConceptModel
from ..inference.geometry import own_geometry
from ..io import as_path, write_json
from ..ops.images import Statistics
from ..ops.promptable import Promptable, Pyramidal, image_size, statistics
from ..reading import Table, foreign, read_json
from .parts_detector import Baked

PLAIN = {"samdistill_mobile_sam": ("sam", "SamModel"), "samdistill_sam": ("sam", "SamModel")}
"""Model types that other readers know under another name, because their files have the same inputs and outputs."""
_PLAIN_PROCESSORS = {
    "SamProcessor": "SamProcessor",
    "Sam2Processor": "Sam2Processor",
    "Sam3TrackerProcessor": "Sam2Processor",
}
"""Classes of processors in transformers.js, by those in transformers. It has none for words."""


def kind_of(model: ConceptModel | Promptable) -> str:
    """Return ``promptable``, ``detector`` or ``detector with memory``."""
    if isinstance(model, Promptable):
        return "promptable"
    return "detector with memory" if getattr(model.model.config, "memory_latents", 0) else "detector"  # type: ignore[union-attr]


def network_of(model: ConceptModel | Promptable) -> Any:
    """Return the transformers model."""
    return model if isinstance(model, Promptable) else model.model


def canvas(model: ConceptModel | Promptable) -> dict[str, Any]:
    """Return how images are fitted to the canvas and normalised.

    ``zero_padding`` says that padding is zero after the normalisation, as in a SAM.
    """
    mean, std = _statistics(model)
    return {
        "image_size": image_size(model) if isinstance(model, Promptable) else model.image_size,
        "geometry": own_geometry(network_of(model)), "mean": list(mean), "std": list(std),
        "zero_padding": isinstance(model, SamModel),
    }  # fmt: skip


def _statistics(model: Any) -> tuple[Statistics, Statistics]:
    if isinstance(model, Promptable):
        return statistics(model)
    if hasattr(model, "mean"):  # a SAM 3
        return model.mean, model.std
    vision = model.model.config.vision_config
    return tuple(vision.image_mean), tuple(vision.image_std)


def about_model(model: ConceptModel | Promptable, baked: Baked | None, source: str) -> dict[str, Any]:
    """Return what ``export.json`` says about the model: its own configuration, sizes, words and run."""
    network = network_of(model)
    return {
        "architecture": type(network).__name__, "parameters": parameter_count(network), "canvas": canvas(model),
        "config": network.config.to_dict(),
        "context": None if isinstance(model, Promptable) else model.words.context,
        "vocabulary": None if baked is None else _vocabulary(baked), "run": _run(as_path(source)),
    }  # fmt: skip


def _vocabulary(baked: Baked) -> dict[str, list[str]]:
    return {"phrases": list(baked.phrases[: baked.shown]), "hidden": list(baked.phrases[baked.shown :])}


def _run(place: Path) -> dict[str, Any] | None:
    """Return job, teachers and held-out figures of the run that ``place`` is, or is in."""
    for folder in (place, place.parent):
        path = folder / "config.yaml"
        if path.is_file():
            with foreign(path, "not a readable configuration of a run"):
                settings = yaml.safe_load(path.read_text(encoding="utf-8"))
                teachers = [settings["teacher"]] if "teacher" in settings else settings.get("teachers", [])
                found = {"job": settings["job"], "teachers": [str(one.get("path")) for one in teachers]}
            measured = folder / "evaluation.json"
            return {**found, "evaluation": read_json(measured, Table, "unreadable") if measured.is_file() else None}
    return None


def write_companions(folder: Path, model: ConceptModel | Promptable, baked: Baked | None) -> None:
    """Write the files in the layout that transformers.js reads wherever it has the architecture.

    Args:
        folder: The folder.
        model: The model.
        baked: The vocabulary, if it replaces the tokenizer.
    """
    network = network_of(model)
    write_json(folder / "config.json", _config(network), indent=1)
    tokenizer = None
    if baked is not None:
        write_json(folder / "vocabulary.json", _vocabulary(baked), indent=1)
    elif not isinstance(model, Promptable):
        model.words.save(folder)
        tokenizer = read_tokenizer(folder)
    _write_processors(folder, processor_of(network.config, tokenizer))


def _config(network: Any) -> dict[str, Any]:
    settings = network.config.to_dict()
    kind, name = PLAIN.get(settings["model_type"], (settings["model_type"], type(network).__name__))
    settings |= {"model_type": kind, "architectures": [name]}
    if isinstance(network, Pyramidal):
        settings["vision_config"]["num_feature_levels"] = len(network.backbone_feature_sizes)
    if kind == "sam":  # a MobileSAM's own configuration derives these and does not save them
        for part in ("vision_config", "prompt_encoder_config", "mask_decoder_config"):
            settings.setdefault(part, getattr(network.config, part).to_dict())
    return settings


def _write_processors(folder: Path, processor: Any) -> None:
    """Write the processor for transformers, and its image processor in the file that transformers.js reads."""
    name, settings = processor_file(processor)
    write_json(folder / name, settings, indent=1)
    if "image_processor" in settings:
        plain = {**settings["image_processor"], "processor_class": _PLAIN_PROCESSORS.get(settings["processor_class"])}
        write_json(folder / "preprocessor_config.json", plain, indent=1)
