"""Training of the promptable models (tracker, SAM, MobileSAM): the engine on scenes rendered during training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from torch import nn
from torch.utils.data import Dataset
from transformers import Sam3TrackerModel, SamModel

from prompt_objective import prompt_terms, teacher_terms
from sam_models import build_mobile, build_sam
from samdistill.checkpoints.loading import quiet_transformers
from samdistill.checkpoints.processors import write_processor
from samdistill.checkpoints.promptable import load_promptable
from samdistill.config import TrainConfig
from samdistill.dist import default_device
from samdistill.engine import fit
from samdistill.engine.task import Phase, Task
from samdistill.io import replacing
from samdistill.ops.promptable import Promptable, image_size
from samdistill.sandbox.scenes import Scenes, render_scenes
from samdistill.students.promptable import MobileSamModel
from samdistill.types import Terms, UserError
from tracker_model import HELD_OUT_SEED, TRAIN_SEED, build_teacher, score

EPOCH_STEPS = 250
WARM_UP_STEPS = 200
VALIDATION_SCENES, FINAL_SCENES = 64, 512


@dataclass(frozen=True)
class TrainedTeacher:
    """A trained teacher: folder of its float16 weights, and its figures on ``FINAL_SCENES`` held-out scenes by name."""

    folder: Path
    steps: int
    seconds: float
    figures: dict[str, float]


class SceneNumbers(Dataset[int]):
    """Numbers of the scenes of an epoch. No scene is used twice."""

    def __init__(self, count: int, epoch: int) -> None:
        self.count, self.start = count, count * epoch

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> int:
        return self.start + index


@dataclass(frozen=True)
class Recipe:
    """Recipe of a promptable teacher: its class, a function that builds the untrained model, and the arguments of
    ``teacher_terms``."""

    name: str
    kind: type[Promptable]
    build: Callable[[], Promptable]
    prompts_per_image: int
    multimask: bool


def warm_tracker() -> Sam3TrackerModel:
    """Build a tracker and warm up its decoder."""
    model = build_teacher()
    optimizer, generator = torch.optim.AdamW(model.parameters(), lr=1e-3), torch.Generator().manual_seed(1)
    for _ in range(WARM_UP_STEPS):
        prompt_terms(model, generator, 8, 3).total.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return model


TRACKER = Recipe("tracker", Sam3TrackerModel, warm_tracker, prompts_per_image=3, multimask=False)
SAM = Recipe("sam", SamModel, build_sam, prompts_per_image=2, multimask=True)
MOBILE = Recipe("mobile", MobileSamModel, build_mobile, prompts_per_image=2, multimask=True)


class TeacherTask(Task[Scenes]):
    """Training on boxes, points and corrective clicks. It accesses parts of the model, so it needs a single process."""

    def __init__(self, batch_size: int, weights: Path | None = None, recipe: Recipe = TRACKER) -> None:
        self.batch_size, self.weights, self.recipe = batch_size, weights, recipe
        self.generator: torch.Generator | None = None
        self.size = 0

    def build_student(self) -> Promptable:
        recipe = self.recipe
        model = recipe.build() if self.weights is None else load_promptable(self.weights)
        if type(model) is not recipe.kind:
            raise UserError(
                f"{self.weights}: a {type(model).__name__}, but {recipe.name} is a "
                f"{recipe.kind.__name__}; give the weights of one"
            )
        self.size = image_size(model)
        return model.train()

    def dataset(self, epoch: int) -> SceneNumbers:
        return SceneNumbers(EPOCH_STEPS * self.batch_size, epoch)

    def collate(self, items: Sequence[int], phase: Phase = Phase()) -> list[int]:
        return list(items)

    def to(self, batch: Sequence[int], device: torch.device) -> Scenes:
        """Render the scenes on ``device``. The number of the first scene is the seed of their prompts."""
        self.generator = torch.Generator(device).manual_seed(batch[0])
        return render_scenes(batch, self.size, TRAIN_SEED, device=device)

    def terms(self, student: nn.Module, batch: Scenes, phase: Phase = Phase()) -> Terms:
        assert isinstance(student, Promptable) and self.generator is not None
        recipe = self.recipe
        return teacher_terms(student, batch, self.generator, recipe.prompts_per_image, recipe.multimask)

    def validate(self, student: nn.Module, phase: Phase = Phase()) -> dict[str, float]:
        assert isinstance(student, Promptable)
        return held_out_miou(student, VALIDATION_SCENES)


def held_out_miou(model: Promptable, count: int) -> dict[str, float]:
    """Return the mIoU over all annotated objects of ``count`` held-out scenes, by kind of prompt."""
    found: dict[str, list[torch.Tensor]] = {}
    for start in range(0, count, VALIDATION_SCENES):
        numbers = range(start, min(start + VALIDATION_SCENES, count))
        scenes = render_scenes(numbers, image_size(model), HELD_OUT_SEED, device=model.device)
        for kind, ious in score(model, scenes).items():
            found.setdefault(kind, []).append(ious)
    return {kind: torch.cat(ious).mean().item() for kind, ious in found.items()}


def train_promptable(
    recipe: Recipe, out: Path, steps: int, batch_size: int, lr: float, weights: Path | None
) -> TrainedTeacher:
    """Train in ``out`` and write ``out/weights``; ``steps`` is rounded up to whole epochs of 250."""
    epochs = -(-steps // EPOCH_STEPS)
    train = TrainConfig(
        epochs=epochs, batch_size=batch_size, lr=lr, warmup_lr=1e-5, min_lr=lr / 100, lr_batch=None,
        warmup_epochs=min(100 / EPOCH_STEPS, epochs / 10), betas=(0.9, 0.98), clip_norm=1.0, keep=1,
    )  # fmt: skip
    resolved = yaml.safe_dump({"teacher": recipe.name, "weights": str(weights), "train": train.model_dump(mode="json")})
    task = TeacherTask(batch_size, weights, recipe)
    result = fit(task, train, out, workers=0, resolved=resolved)
    assert result.student is not None
    model = load_promptable(result.student).half()
    with replacing(out / "weights") as folder, quiet_transformers():
        model.save_pretrained(folder)
        write_processor(folder)
    miou = held_out_miou(load_promptable(out / "weights").float().to(default_device()), FINAL_SCENES)
    figures = {f"{kind}_miou": value for kind, value in miou.items()}
    return TrainedTeacher(out / "weights", result.steps, result.seconds, figures)
