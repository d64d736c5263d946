"""Loading of SAMs that track with their own memory: SAM 2, and SAM 3's tracker, with their own or a distilled trunk."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedModel, Sam2VideoModel, Sam3TrackerVideoConfig, Sam3TrackerVideoModel, Sam3VideoModel

from ..types import UserError
from .exported import exported_kind
from .files import TORCH_SUFFIXES, locate, open_weights
from .loading import model_kinds, open_config, pretrained
from .original import load_original, merged_config, original_config, original_parts, set_image_size
from .rename_sam2 import SAM2
from .sam import open_sam, original_kind
from .words import Words

Tracker = Sam2VideoModel | Sam3TrackerVideoModel
"""Models that track objects from points, boxes or masks."""


@dataclass(frozen=True)
class Worded:
    """A ``Sam3VideoModel``, which tracks what a phrase names, with its tokenizer."""

    model: Sam3VideoModel
    words: Words


WORDED = "sam3_video"
_KINDS: dict[str, type[Tracker]] = {
    SAM2: Sam2VideoModel, "sam3_tracker_video": Sam3TrackerVideoModel, WORDED: Sam3TrackerVideoModel,
}  # fmt: skip
_ORIGINAL_MEMORY = "tracker.maskmem_backbone."


def tracker_class(path: str | Path) -> type[Tracker] | None:
    """Return the class that tracks with the memory of a checkpoint, or None if the checkpoint has none.

    Raises:
        UserError: The path does not exist, or its ``config.json`` cannot be read.
    """
    place = locate(path)
    if place.is_dir():
        folders = {} if exported_kind(place) is not None else model_kinds(place)
        return next((_KINDS[kind] for kind in folders.values() if kind in _KINDS), None)
    if place.suffix not in TORCH_SUFFIXES:
        return None
    weights = open_weights(place)
    if original_parts(place):
        return Sam3TrackerVideoModel if any(name.startswith(_ORIGINAL_MEMORY) for name in weights) else None
    return Sam2VideoModel if original_kind(weights) == SAM2 else None


def load_tracker(path: str | Path) -> Tracker:
    """Load a model that tracks objects from points, boxes or masks, in float32 and eval mode on the CPU.

    Args:
        path: A Hugging Face folder or hub id of a ``Sam2VideoModel``, ``Sam3TrackerVideoModel`` or ``Sam3VideoModel``
            (whose tracker is loaded), each with its own or a distilled trunk; a run with one in ``merged/``; or an
            original ``sam3.pt`` or ``sam2*_hiera_*.pt``.

    Raises:
        UserError: The checkpoint is missing or incomplete, or has no memory of this kind.

    Example:
        >>> model = load_tracker("small_sam3")  # doctest: +SKIP
    """
    place, kind = locate(path), tracker_class(path)
    if kind is None:
        raise UserError(f"{path}: no memory of a SAM 2 or a SAM 3 in it, so it cannot track")
    if place.is_file():
        return _original(place, kind)
    folder = _folder(place, tuple(_KINDS))
    config = open_config(folder)
    return pretrained(kind, getattr(config, "tracker_config", config), folder, folder, spare=True)


def load_worded(path: str | Path) -> Worded:
    """Load a SAM 3 that tracks what a phrase names, with its tokenizer, in float32 and eval mode on the CPU.

    Args:
        path: A Hugging Face folder or hub id of a ``Sam3VideoModel``, with its own or a distilled trunk, or a run with
            one in ``merged/``.

    Raises:
        UserError: The checkpoint is missing or incomplete, or is no ``Sam3VideoModel``.
    """
    place, kind = locate(path), tracker_class(path)
    folders = model_kinds(place) if place.is_dir() else {}
    if WORDED not in folders.values():
        found = place.name if kind is None else f"a {kind.__name__}"
        raise UserError(
            f"{path}: {found} takes no words in a video; give --box or --point, or a folder of a Sam3VideoModel"
        )
    folder = _folder(place, (WORDED,))
    config = open_config(folder)
    text = config.detector_config.text_config
    words = Words.load(folder, text.vocab_size, text.max_position_embeddings)
    return Worded(pretrained(Sam3VideoModel, config, folder, folder), words)


def _folder(place: Path, kinds: tuple[str, ...]) -> Path:
    return next(folder for folder, kind in model_kinds(place).items() if kind in kinds)


def _original(path: Path, kind: type[PreTrainedModel]) -> Tracker:
    if kind is Sam2VideoModel:
        opened = open_sam(path)
        return pretrained(Sam2VideoModel, opened.config, {n: t.clone() for n, t in opened.weights.items()}, path)
    config, trunk = original_config(path, Sam3TrackerVideoConfig), merged_config(path)
    if trunk is not None:
        set_image_size(config, trunk.image_size)
    return load_original(path, Sam3TrackerVideoModel, config)
