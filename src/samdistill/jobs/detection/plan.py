"""Plan of a detection run."""

from __future__ import annotations

from dataclasses import dataclass

from ...checkpoints.loading import parameter_count
from ...data.questions import PhraseBook
from ...data.sources import survey
from ...engine.frozen_norm import batch_norms
from ...report import human_bytes
from ...store import record_bytes
from ...students.catalogue import PUBLISHED, TEACHER_PARAMS
from ...types import UserError
from ..base import Plan, optimiser_bytes, teacher_bytes
from ..caching import planned
from .config import DetectionRunConfig
from .parts import DetectionParts
from .task import UNASKED
from .words import text_line


@dataclass(frozen=True, kw_only=True)
class DetectionPlan(Plan):
    """Plan of a detection run. Sizes are in bytes.

    Attributes:
        teacher_levels: Sides of the FPN maps that the teacher's heads read.
        teacher_parts: Parameters of the teacher by module.
        text_run: Line about the text run that comes first, or empty.
        parts: Parameters of the student by module.
        trained_params: Parameters of the student that train in some epoch.
        calibration_images: Held-out images whose questions calibrate the scores.
        labels: Terms of labels.
        trained_parts: The same by module.
        online: The teacher runs during training, without a cache.
        bytes_per_view: Bytes of the cached pyramid of one view.
        raw_bytes_per_view: The same in uncompressed fp16.
    """

    teacher: str
    teacher_params: int
    image_size: int
    teacher_parts: dict[str, int]
    teacher_queries: int
    teacher_levels: tuple[int, ...]
    student: str
    student_params: int
    text_run: str
    parts: dict[str, int]
    trained_params: int
    labels: tuple[str, ...]
    trained_parts: dict[str, int]
    student_fp16_bytes: int
    queries: int
    images: int
    held_out_images: int
    calibration_images: int
    questions_per_image: int
    phases: tuple[tuple[str, int], ...]
    online: bool
    codec: str
    bytes_per_view: int
    raw_bytes_per_view: int
    cache_bytes: int
    weights_and_optimiser_bytes: int
    teacher_bytes: int

    @property
    def inputs(self) -> int:
        return self.images

    @property
    def headline(self) -> str:
        return (
            f"{self.student}: {self.student_params / 1e6:.2f}M parameters and {self.queries} queries for "
            f"{self.teacher_params / 1e6:.2f}M and {self.teacher_queries}; {self.images} images, {self.steps} steps"
        )

    @property
    def raw_record_bytes(self) -> int:
        return self.raw_bytes_per_view

    def facts(self) -> dict[str, str]:
        levels = ", ".join(map(str, self.teacher_levels))
        trained = {name: size for name, size in self.trained_parts.items() if size}
        frozen = ", ".join(name for name in self.parts if name not in trained)
        phases = "; ".join(f"{name} {steps}" for name, steps in self.phases)
        return {
            "teacher": f"{self.teacher} ({self.teacher_params / 1e6:.2f}M, {self.teacher_queries} queries), "
            f"{self.image_size} px, maps of {levels}: {_listed(self.teacher_parts)}",
            **({"sam3.pt": PUBLISHED} if self.teacher_params == TEACHER_PARAMS else {}),
            "student": f"{self.student} ({self.student_params / 1e6:.2f}M, {self.queries} queries): "
            + _listed(self.parts),
            **({"text run": self.text_run} if self.text_run else {}),
            "trained": f"{self.trained_params / 1e6:.2f}M parameters: {_listed(trained)}"
            + (f"; frozen: {frozen}" if frozen else ""),
            "images": f"{self.images} to train on, {self.held_out_images} held out, "
            f"{self.questions_per_image} question(s) each",
            "labels": ", ".join(self.labels) or "not used",
            "cache": planned(self.online, self.cache_bytes, f"{self.codec}, {human_bytes(self.bytes_per_view)} a view"),
            **({"calibration": f"{self.calibration_images} held-out images"} if self.calibration_images else {}),
            "memory": f"{human_bytes(self.weights_and_optimiser_bytes)} weights and optimiser, "
            f"{human_bytes(self.teacher_bytes)} teacher; activations are not counted",
            "student's file": f"{human_bytes(self.student_fp16_bytes)} in fp16",
            "steps": f"{self.steps} ({self.steps_per_epoch} an epoch)" + (f": {phases}" if phases else ""),
        }


def _listed(parts: dict[str, int]) -> str:
    return ", ".join(f"{name} {size / 1e6:.2f}M" for name, size in parts.items())


def plan_detection(config: DetectionRunConfig) -> DetectionPlan:
    """Return the plan of a detection run.

    It reads configs and lists files, without loading weights or decoding images. Images without questions are not
    counted. Phrases that are too long for a text encoder are counted.
    """
    parts = DetectionParts(config)
    info, train = parts.teacher_info, config.train
    student = parts.kind.outline()
    modules = parts.kind.parts(student)
    sizes = {name: parameter_count(module) for name, module in modules.items()}
    optimised = optimiser_bytes(student, train)  # sets which parameters train
    parts.require_labels(parts.train_source)
    trained = {name: sum(p.numel() for p in one.parameters() if p.requires_grad) for name, one in modules.items()}
    params, images = sum(sizes.values()), len(PhraseBook(config.questions, survey(parts.train_source)).keys)
    per_epoch = images // train.batch_size
    shapes = [spec.shape for spec in parts.specs("").values()]
    per_view = sum(record_bytes(config.cache.codec, shape) for shape in shapes)
    return DetectionPlan(
        teacher=config.teacher.path, teacher_params=info.params, image_size=info.image_size,
        teacher_queries=info.queries, teacher_levels=tuple(info.levels), student=config.student.backbone,
        student_params=params, text_run=text_line(config), parts=sizes,
        student_fp16_bytes=2 * params, queries=parts.kind.queries,
        teacher_parts=dict(info.parts), trained_params=sum(trained.values()), trained_parts=trained,
        labels=config.label_names, images=images, held_out_images=len(survey(parts.held_out_source()).keys),
        calibration_images=_calibrated(parts), questions_per_image=config.questions.per_image,
        phases=tuple((phase.name, phase.epochs * per_epoch) for phase in train.phases or ()),
        online=config.online, codec=config.cache.codec, bytes_per_view=per_view,
        raw_bytes_per_view=sum(record_bytes("fp16", shape) for shape in shapes),
        cache_bytes=0 if config.online else per_view * images * config.data.views,
        weights_and_optimiser_bytes=optimised,
        teacher_bytes=teacher_bytes(config.teacher, info.params),
        batch_norms=batch_norms(student), steps_per_epoch=per_epoch, steps=per_epoch * train.total_epochs,
    )  # fmt: skip


def _calibrated(parts: DetectionParts) -> int:
    """Return the number of held-out images that calibrate the scores: those that can be asked about, or fewer.

    Raises:
        UserError: Calibration is wanted, and there is no such image.
    """
    wanted, questions = parts.config.calibration.images, parts.config.questions
    if not wanted:
        return 0
    try:
        return min(wanted, len(PhraseBook(questions, survey(parts.held_out_source())).keys))
    except UserError:
        if questions.source == "jsonl":
            raise UserError(UNASKED) from None
        raise
