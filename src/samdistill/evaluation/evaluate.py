"""Command ``samdistill evaluate`` for images: measure a model on a data set, optionally next to its teacher."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import yaml

from ..checkpoints.promptable import load_model
from ..config import DataConfig
from ..data import Geometry, reporting
from ..data.layouts import held_out_images
from ..data.saco import ConceptSet, find_concepts
from ..data.saco_predictions import IouKind, load_predictions, write_predictions
from ..data.sources import Source, open_source
from ..dist import default_device
from ..inference.concepts import load_concept_model
from ..inference.geometry import check_geometry, own_geometry
from ..inference.prompting import KINDS, PROMPTS, PromptKind
from ..io import as_path, check_output
from ..ops.promptable import image_size
from ..progress import Progress
from ..reading import foreign
from ..registry import did_you_mean
from ..types import UserError
from . import EvaluationResult, evaluate_models
from . import concepts as detectors

logger = logging.getLogger("samdistill")


def prompt_kinds(names: Sequence[str]) -> tuple[PromptKind, ...]:
    """Check names of prompt kinds.

    Args:
        names: Names, such as ``("box", "point")``.

    Returns:
        The kinds in the order of ``KINDS``, without duplicates.

    Raises:
        UserError: There is no kind of that name.
    """
    for name in names:
        if name not in KINDS:
            raise UserError(f"no prompt kind is called {name!r}{did_you_mean(name, list(KINDS))}")
    return tuple(kind for kind in KINDS if kind in names)


@reporting("evaluate")
def evaluate(
    model: str | Path, data: str | Path, *, teacher: str | Path | None = None, prompts: Sequence[str] = PROMPTS,
    images: int | None = None, batch_size: int = 4, geometry: str | None = None, progress: bool = True,
) -> EvaluationResult:  # fmt: skip
    """Measure a model on images: mIoU, agreement with a teacher, features, parameters, FLOPs and latency.

    Args:
        model: A model that ``load_promptable`` loads, or a ``Sam3Model``, which needs a teacher.
        data: An SA-1B folder, a COCO folder or a folder of images. Without masks a teacher is needed. If the model was
            trained on this folder, only the held-out images of that run are used.
        teacher: The teacher, as for ``model``. It is loaded at the model's image size.
        prompts: Prompt kinds to measure.
        images: Largest number of images, evenly spaced over the data. None uses all.
        batch_size: Largest number of images per batch.
        geometry: Placement of images on the canvas, ``square`` or ``longest_side``. None uses the model's own.
        progress: Show a progress bar.

    Returns:
        One row per model.

    Raises:
        UserError: A model or the data cannot be loaded, or cannot be measured.

    Example:
        >>> found = samdistill.evaluate("sandbox-mobile", "data/coco", teacher="sandbox-sam", progress=False)
        >>> sorted(found.row("student").miou)
        ['box', 'point', 'refine']
    """
    kinds = prompt_kinds(prompts)
    if images is not None and images < 1:
        raise UserError(f"--images must be at least 1, got {images}")
    loaded = {"student": load_model(model)}
    size = image_size(loaded["student"])
    if teacher is not None:
        loaded = {"teacher": load_model(teacher, size)} | loaded
    place = Geometry(size, own_geometry(loaded["student"]) if geometry is None else check_geometry(geometry))
    source = _images(model, as_path(data))
    total = len(source.keys) if images is None else min(images, len(source.keys))
    with Progress("evaluating", total, "images", progress) as bar:
        return evaluate_models(
            loaded, source, place, teacher="teacher" if teacher is not None else None,
            prompts=kinds, images=images, batch_size=batch_size, device=default_device(), progress=bar.advance,
        )  # fmt: skip


def _images(model: str | Path, root: Path) -> Source:
    """Open the images to measure on. If the model was trained on this folder, use the run's held-out images.

    If that run held out no images, a warning is logged, because the images measured are then training images.
    """
    data = _trained_on(as_path(model))
    if data is None or data.root.resolve() != root.resolve():
        return held_out_images(root)
    try:
        source = open_source(data, "held_out")
    except UserError as error:
        logger.warning("%s: these are images that the model was trained on: %s", root, error)
        return held_out_images(root)
    logger.info("%s: the model was trained on this folder; its %d held-out images are measured", root, len(source.keys))
    return source


def _trained_on(model: Path) -> DataConfig | None:
    """Return the data configuration of the run that ``model`` belongs to, or None."""
    for folder in (model, model.parent):
        if (folder / "config.yaml").is_file():
            with foreign(folder / "config.yaml", "not the configuration of a run"):
                settings = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))["data"]
                return DataConfig.model_validate(settings)
    return None


@reporting("evaluate")
def evaluate_concepts(
    model: str | Path, data: str | Path | Sequence[str | Path], *, teacher: str | Path | None = None,
    threshold: float = 0.5, images: int | None = None, batch_size: int = 4, geometry: str | None = None,
    out: str | Path | None = None, iou: IouKind = "masks", progress: bool = True,
) -> detectors.ConceptResult:  # fmt: skip
    """Measure a detector on (image, noun phrase) pairs: cgF1 and its factors, mask AP, parameters and latency.

    Args:
        model: A model that ``load_concept_model`` loads, or a ``.json`` file of predictions.
        data: An annotation file in the SA-Co layout, or a folder that has one. Several files are annotations of the
            same pairs by several annotators, of which the best one counts.
        teacher: The teacher. It must be a ``.json`` file exactly if ``model`` is one.
        threshold: Lowest score of a prediction that counts, 0..1.
        images: Largest number of images. None uses all.
        batch_size: Largest number of images per batch.
        geometry: Placement of images on the canvas, ``square`` or ``longest_side``. None uses the model's own.
        out: File (``.json``) for the model's predictions.
        iou: Compare ``masks``, or ``boxes`` if ``model`` is a file.
        progress: Show a progress bar.

    Returns:
        One row per model.

    Raises:
        UserError: A model, a file or the data cannot be loaded, or cannot be measured.

    Example:
        >>> samdistill.evaluate_concepts("sandbox-student", "data/coco", progress=False).questions
        8
    """
    names = {"student": str(model)} if teacher is None else {"teacher": str(teacher), "student": str(model)}
    files = {name: path for name, path in names.items() if path.endswith(".json")}
    _check_scoring(threshold, iou, images, files, len(names), out)
    places, target = _listings([data] if isinstance(data, str | Path) else data), None if out is None else as_path(out)
    if target is not None and target.suffix != ".json":
        raise UserError(f"--out: {out} does not end in .json")
    if target is not None:
        check_output(target, *places)
    truth = detectors.some_images(ConceptSet.load_annotators(places, check_images=not files), images)
    by = "teacher" if teacher is not None else None
    if files:
        found = {name: load_predictions(Path(path)) for name, path in files.items()}
        return detectors.score_files(found, truth, teacher=by, threshold=threshold, iou=iou)
    if geometry is not None:
        check_geometry(geometry)
    loaded = {name: load_concept_model(path, device=default_device()) for name, path in names.items()}
    with Progress("evaluating", len(truth.pairs), "questions", progress) as bar:
        result = detectors.evaluate_concepts(
            loaded, truth, teacher=by, geometry=geometry, threshold=threshold, batch_size=batch_size, pictures=0,
            progress=bar.advance,
        )  # fmt: skip
    if target is not None:
        write_predictions(target, result.predictions["student"])
    return result


def _check_scoring(
    threshold: float, iou: str, images: int | None, files: dict[str, str], models: int, out: str | Path | None
) -> None:
    """Raise ``UserError`` for values of ``evaluate_concepts`` that do not fit together; files: of predictions."""
    if not 0 <= threshold <= 1:
        raise UserError(f"--threshold: {threshold:g} is not between 0 and 1")
    if images is not None and images < 1:
        raise UserError(f"--images must be at least 1, got {images}")
    if iou not in ("masks", "boxes"):
        raise UserError(f"--iou must be masks or boxes, got {iou!r}")
    if files and (len(files) < models or out is not None):
        raise UserError("with a file of predictions, --teacher must be a file too, and --out must be left out, because "
                        "there are no new predictions")  # fmt: skip
    if iou == "boxes" and not files:
        raise UserError(
            "--iou boxes needs a file of predictions, because a model predicts masks; give one, or leave --iou out"
        )


def _listings(data: Sequence[str | Path]) -> list[Path]:
    """Return the annotation file of each annotator."""
    places = list[Path]()
    for path in map(as_path, data):
        place = find_concepts(path)
        if place is None:
            raise UserError(
                f"{path}: no concept annotations; give an SA-Co .json file, or a folder with concepts_val.json"
            )
        if place in places:
            raise UserError(f"{place}: given twice; give one file per annotator")
        places.append(place)
    return places
