"""Training of the sandbox's detector: the engine on scenes and prompts that are drawn during training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from jaxtyping import Bool, Float
from torch import Tensor, nn
from transformers import Sam3Model

from detector_answers import ask_scenes
from detector_calibration import calibrate
from detector_model import build_detector_teacher, detector_config
from detector_objective import ConceptLearner, Lesson, detector_terms
from detector_questions import Questions, draw_questions
from prompt_training import EPOCH_STEPS, FINAL_SCENES, VALIDATION_SCENES, SceneNumbers, TrainedTeacher
from samdistill.checkpoints.loading import quiet_transformers
from samdistill.checkpoints.processors import write_processor
from samdistill.config import TeacherConfig, TrainConfig
from samdistill.config.parts import FreezeConfig
from samdistill.dist import default_device
from samdistill.engine import fit
from samdistill.engine.state import Checkpoint
from samdistill.engine.task import Phase, Task
from samdistill.inference.concepts import detections
from samdistill.io import replacing
from samdistill.metrics.concepts import SCORE_THRESHOLD, ConceptScores
from samdistill.sandbox.concepts import sandbox_words
from samdistill.sandbox.scenes import Scenes, render_scenes
from samdistill.teachers import Sam3Detector
from samdistill.types import Terms, UserError
from tracker_model import HELD_OUT_SEED, IMAGE_SIZE, TRAIN_SEED

PER_SCENE = 5
NAMING_EPOCHS = 4
"""Epochs at the beginning that train the classification of cells only."""
BOXED = 0.15
"""Fraction of the steps whose prompts are exemplar boxes."""
MASKED = 0.4
"""Fraction of the steps that train masks. Masks are learned much faster than words."""
FIRST_SCENE = 10_000_000
"""Number of the first scene. It is higher than those that the tracker, which provides the trunk, was trained on."""


class DetectorTask(Task[Any]):
    """Training of the detector with phrases and boxes. A batch of scene numbers becomes a ``Lesson`` on the device."""

    def __init__(self, batch_size: int, weights: Path | None = None) -> None:
        self.batch_size, self.weights = batch_size, weights

    def build_student(self) -> ConceptLearner:
        model = build_detector_teacher() if self.weights is None else load_detector(self.weights)
        return ConceptLearner(model.train(), sandbox_words())

    def dataset(self, epoch: int) -> SceneNumbers:
        return SceneNumbers(EPOCH_STEPS * self.batch_size, epoch)

    def collate(self, items: Sequence[int], phase: Phase = Phase()) -> list[int]:
        return list(items)

    def to(self, batch: Sequence[int], device: torch.device) -> Lesson:
        """Render the scenes on ``device`` and draw their prompts, with the number of the first scene as seed."""
        rng = np.random.default_rng(batch[0])
        boxes, masks = bool(rng.random() < BOXED), bool(rng.random() < MASKED)
        scenes = render_scenes([FIRST_SCENE + number for number in batch], IMAGE_SIZE, TRAIN_SEED, device=device)
        # a trained detector has learned the words, so only a new one starts with the classification of cells
        naming = self.weights is None and batch[0] < NAMING_EPOCHS * EPOCH_STEPS * self.batch_size
        return Lesson(scenes, None if naming else draw_questions(scenes, PER_SCENE, rng, boxes), masks)

    def terms(self, student: nn.Module, batch: Lesson, phase: Phase = Phase()) -> Terms:
        return detector_terms(student, batch)

    def validate(self, student: nn.Module, phase: Phase = Phase()) -> dict[str, float]:
        assert isinstance(student, ConceptLearner)
        return held_out_concepts(student.model, VALIDATION_SCENES)


def load_detector(weights: str | Path) -> Sam3Model:
    """Load a trained sandbox detector from its folder or ``sandbox``. Raises ``UserError`` for any other model."""
    found = Sam3Detector(TeacherConfig(kind="sam3", path=str(weights)))
    model = Sam3Model(detector_config())
    try:
        model.load_state_dict(found.model.state_dict())
    except RuntimeError:
        known = False
    else:
        known = found.words.digest == sandbox_words().digest
    if not known:
        raise UserError(f"{weights}: no detector of the sandbox; give 'sandbox', or a folder that this command wrote")
    return model


@torch.no_grad()
def held_out_concepts(model: Sam3Model, count: int) -> dict[str, float]:
    """Measure a detector (in eval mode) on ``count`` held-out scenes.

    ``cgf1``, ``pmf1``, ``il_mcc`` and ``f1_50`` are for ``PER_SCENE`` text prompts per scene. ``box_pmf1`` is for one
    exemplar box per scene.
    """
    scores = {boxes: ConceptScores() for boxes in (False, True)}
    streams = {boxes: np.random.default_rng((HELD_OUT_SEED, boxes)) for boxes in (False, True)}
    for start in range(0, count, VALIDATION_SCENES):
        numbers = range(start, min(start + VALIDATION_SCENES, count))
        scenes = render_scenes(numbers, IMAGE_SIZE, HELD_OUT_SEED, device=model.device)
        for boxes, rng in streams.items():
            questions = draw_questions(scenes, 1 if boxes else PER_SCENE, rng, boxes)
            scores[boxes] = ConceptScores.merge([scores[boxes], score_answers(model, scenes, questions)])
    words, shown = scores[False].summary(), scores[True].summary()
    return {name: words[name] for name in ("cgf1", "pmf1", "il_mcc", "f1_50")} | {"box_pmf1": shown["pmf1"]}


def score_answers(model: Sam3Model, scenes: Scenes, questions: Questions) -> ConceptScores:
    """Compare the model's detections with the visible masks of the objects that each prompt applies to."""
    found, side = ask_scenes(model, scenes, questions), (IMAGE_SIZE, IMAGE_SIZE)
    scores = ConceptScores()
    for row, image in enumerate(questions.prompts.image.tolist()):
        masks = detections(found, row, SCORE_THRESHOLD, side, side, side).masks
        scores = scores.update(mask_ious(masks, scenes.masks[image][questions.slots[row].to(masks.device)]))
    return scores


def mask_ious(pred: Bool[Tensor, "n h w"], target: Bool[Tensor, "m h w"]) -> Float[Tensor, "n m"]:
    """Return the IoU of every prediction with every target. It is 0 if both are empty, as in pycocotools.

    Computed in double precision on the CPU, because an IoU of 0.7 in single precision is below 0.7.
    """
    flat = target.flatten(1)
    rows = []
    for mask in pred.flatten(1):  # one at a time: 200 queries times 50 objects at 1008 px would take 10 GB
        rows.append(torch.stack([(flat & mask).sum(-1), (flat | mask).sum(-1)]))
    if not rows:
        return torch.zeros(0, len(target), dtype=torch.float64)
    overlap, union = torch.stack(rows, 1).cpu().double()
    return overlap / union.clamp(min=1)


def train_detector(out: Path, steps: int, batch_size: int, lr: float, weights: Path | None) -> TrainedTeacher:
    """Train in ``out`` and write the model and its tokenizer to ``out/weights``.

    ``steps`` is rounded up to whole epochs of 250. With ``weights`` the vision encoder is frozen, so that students that
    were aligned to its features stay aligned.

    The recipe changed while the packaged weights were trained (see docs/sandbox.md). This is its final state, and it
    gives other weights.
    """
    epochs = -(-steps // EPOCH_STEPS)
    train = TrainConfig(
        epochs=epochs, batch_size=batch_size, lr=lr, warmup_lr=min(1e-5, lr), min_lr=lr / 250, lr_batch=None,
        warmup_epochs=min(0.6, epochs / 10), betas=(0.9, 0.98), clip_norm=1.0, ema=0.998, keep=1,
        freeze=() if weights is None else (FreezeConfig(match=("model.vision_encoder.*", "naming.*")),),
    )  # fmt: skip
    resolved = yaml.safe_dump({"teacher": "detector", "weights": str(weights), "train": train.model_dump(mode="json")})
    result = fit(DetectorTask(batch_size, weights), train, out, workers=0, resolved=resolved)
    export_detector(result.checkpoint, out / "weights")
    model = Sam3Detector(TeacherConfig(kind="sam3", path=str(out / "weights")), default_device()).model
    figures = held_out_concepts(model, FINAL_SCENES)
    return TrainedTeacher(out / "weights", result.steps, result.seconds, figures)


def export_detector(checkpoint: Path, folder: Path) -> None:
    """Calibrate the averaged weights of a checkpoint, and save them in float16 as a ``Sam3Model`` with tokenizer."""
    saved = Checkpoint.load(checkpoint)
    assert saved.ema is not None
    state = saved.model | saved.ema  # frozen parameters have no average
    model = Sam3Model(detector_config())
    model.load_state_dict({n.removeprefix("model."): t for n, t in state.items() if n.startswith("model.")})
    calibrate(model.eval())
    with replacing(folder) as new:
        with quiet_transformers():
            model.half().save_pretrained(new)
        sandbox_words().save(new)
        write_processor(new)
