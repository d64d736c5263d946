"""Evaluate several models on the images of a data set: features, masks, cost and pictures."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from jaxtyping import Bool
from torch import Tensor
from transformers import PreTrainedModel, SamModel

from ..data.prompts import pad_masks
from ..data.skipped import BadInput
from ..data.sources import Source, evenly
from ..data.transforms import Geometry
from ..inference.prompting import KINDS, PROMPTS, PromptKind, Targets, prompted_masks, prompts_at_once
from ..ops.promptable import Embeddings, Promptable, embed, embed_trunk, image_size
from ..types import ImageBatch, UserError
from .agreement import PseudoObjects
from .examples import load_batches, to_batch
from .latency import encoder_latency
from .pictures import MOST, picture
from .result import EvaluationResult, Picture
from .rows import EMBEDDING, TRUNK
from .tally import Tally


def evaluate_models(
    models: Mapping[str, PreTrainedModel],
    source: Source,
    geometry: Geometry,
    *,
    teacher: str | None = None,
    prompts: Sequence[PromptKind] = PROMPTS,
    images: int | None = None,
    batch_size: int = 4,
    device: str | torch.device = "cpu",
    max_objects: int = 64,
    pictures: int = 6,
    repeats: int = 9,
    progress: Callable[[int], object] | None = None,
) -> EvaluationResult:
    """Measure ``models`` on the same images with the same prompts. Return one row per model.

    The models are those that ``load_promptable`` loads, or a ``Sam3Model``, which has no prompt decoder, so only its
    features are compared. They are moved to ``device``. ``teacher`` names the model with which the others are compared.
    The objects, ``max_objects`` per image at most, are the annotated ones, or on images without annotations
    ``PseudoObjects`` of the teacher. ``images`` is the largest number of images, evenly spaced over the keys.
    ``repeats`` is the number of latency rounds, 0 for none. ``progress`` is called after each batch with its number of
    images. Raise ``UserError`` if no image can be read, or as in ``check_models``.
    """
    check_models(models, teacher, source, geometry)
    promptable = {n: m for n, m in models.items() if isinstance(m, Promptable)}
    kinds = tuple(kind for kind in KINDS if kind in prompts)
    tally = Tally(teacher, source.labelled)
    skipped, drawn = list(source.problems), list[Picture]()
    with _evaluating(models, device):
        batches = load_batches(source, geometry, evenly(source.keys, images), batch_size, max_objects, skipped)
        for count, examples in batches:
            if examples:
                batch, masks, valid = (part.to(device) for part in to_batch(examples))
                embedded = {n: embed(m, batch) for n, m in promptable.items()}
                features = {n: _features(m, embedded.get(n), batch) for n, m in models.items()}
                tally.add_features(batch, features, sum(example.left_out for example in examples))
                targets = _targets(promptable, embedded, teacher, source.labelled, batch, masks, valid)
                if targets is not None:
                    _ask(promptable, embedded, batch.keys, targets, kinds, tally)
                    drawn += _draw(promptable, embedded, targets, kinds, batch, tally, pictures, len(drawn))
            if progress is not None:
                progress(count)
        if not tally.images:
            raise UserError(_nothing_read(skipped))
        latency, conditions = encoder_latency(models, geometry.image_size, repeats) if repeats else ({}, None)
    return EvaluationResult(
        rows=tuple(tally.row(name, model, latency.get(name)) for name, model in models.items()),
        teacher=teacher,
        prompts=kinds,
        labelled=source.labelled,
        images=tally.images,
        objects=tally.objects,
        objects_left_out=tally.left_out,
        conditions=conditions,
        skipped=tuple(skipped),
        pictures=tuple(drawn),
        ious={name: tally.objects_by_image(name) for name in models},
    )


def check_models(
    models: Mapping[str, PreTrainedModel], teacher: str | None, source: Source, geometry: Geometry
) -> None:
    """Raise an error if the models cannot be measured together, before any image is read.

    Raises:
        UserError: The image sizes differ, or there is no teacher for images without annotations or for a ``Sam3Model``.
        ValueError: There is no model, or ``teacher`` is not one of them.
    """
    if not models or (teacher is not None and teacher not in models):
        raise ValueError(f"the teacher {teacher!r} has to be one of the models: {', '.join(models) or 'none given'}")
    for name, model in models.items():
        size = image_size(model)
        if size != geometry.image_size:
            raise UserError(
                f"{name}: needs images of {size} px, but this evaluation uses {geometry.image_size} px; "
                "evaluate only models of one image size together"
            )
        if teacher is None and not isinstance(model, Promptable):
            raise UserError(
                f"{name}: a {type(model).__name__} has no prompt decoder, so its masks cannot be measured with box or "
                "point prompts; give its teacher to compare features, or evaluate the Sam3TrackerModel"
            )
    if teacher is None and not source.labelled:
        raise UserError(
            f"these images have no masks, so {', '.join(models)} can only be compared with a teacher; give one"
        )


def _features(model: PreTrainedModel, embedded: Embeddings | None, batch: ImageBatch) -> dict[str, Tensor]:
    """Return the features that can be compared with a teacher's, in order of preference.

    A trunk distilled for SAM 3 reproduces the teacher's trunk. The trunk features of different SAMs are not comparable,
    even if their shapes are equal.
    """
    if embedded is None:
        return {TRUNK: embed_trunk(model, batch)}
    decoded = {EMBEDDING: embedded.image_embedding}
    return decoded if isinstance(model, SamModel) or embedded.trunk is None else {TRUNK: embedded.trunk} | decoded


@torch.no_grad()
def _targets(
    promptable: Mapping[str, Promptable],
    embedded: Mapping[str, Embeddings],
    teacher: str | None,
    labelled: bool,
    batch: ImageBatch,
    masks: Bool[Tensor, "b n s s"],
    valid: Bool[Tensor, "b n"],
) -> Targets | None:
    """Return annotated objects or the teacher's. None without a promptable model or without an object."""
    if not labelled:
        if teacher not in promptable:
            return None
        masks, valid = pad_masks(PseudoObjects().find(promptable[teacher], embedded[teacher], batch))
    if not promptable or not bool(valid.any()):
        return None
    return Targets.of(masks, valid, batch.valid((masks.shape[-2], masks.shape[-1])))


def _ask(
    promptable: Mapping[str, Promptable],
    embedded: Mapping[str, Embeddings],
    keys: Sequence[str],
    targets: Targets,
    kinds: tuple[PromptKind, ...],
    tally: Tally,
) -> None:
    """Measure all models on a few objects at a time, because the masks of all would not fit into memory."""
    batch, _, height, width = targets.masks.shape
    step = prompts_at_once(batch, (height, width))
    for start in range(0, len(targets), step):
        part = targets.part(start, start + step)
        tally.add_masks(keys, part, {n: prompted_masks(m, embedded[n], part, kinds) for n, m in promptable.items()})


def _draw(
    promptable: Mapping[str, Promptable],
    embedded: Mapping[str, Embeddings],
    targets: Targets,
    kinds: tuple[PromptKind, ...],
    batch: ImageBatch,
    tally: Tally,
    wanted: int,
    done: int,
) -> Iterator[Picture]:
    """Draw the first images that have objects, with the prompt kinds in turn."""
    for index in range(len(batch)):
        if done >= wanted or not kinds:
            return
        if not bool(targets.valid[index].any()):
            continue
        kind, one = kinds[done % len(kinds)], targets.one_image(index, MOST)
        found = {n: prompted_masks(m, embedded[n].one_image(index), one, (kind,))[kind] for n, m in promptable.items()}
        height, width = batch.sizes[index].tolist()
        against = None if tally.labelled else tally.teacher
        yield picture(batch.keys[index], batch.images[index], (height, width), kind, one, found, against)
        done += 1


def _nothing_read(skipped: Sequence[BadInput]) -> str:
    first = f"; the first: {skipped[0].key}: {skipped[0].reason}" if skipped else ""
    return f"no image could be read, {len(skipped)} inputs skipped{first}"


@contextmanager
def _evaluating(models: Mapping[str, PreTrainedModel], device: str | torch.device) -> Iterator[None]:
    """Run models on ``device`` in eval mode without gradients. Their training modes are restored afterwards."""
    training = {name: model.training for name, model in models.items()}
    for model in models.values():
        model.to(device).eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for name, model in models.items():
            model.train(training[name])
