"""A whole job in one file: a student learns the mean colour of image cells, cached or not. See ``test_toy_job.py``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PretrainedConfig, PreTrainedModel

from samdistill.checkpoints.report import MergeReport
from samdistill.config.losses import loss_block
from samdistill.config.parts import CacheConfig, CachedRun, TrainConfig
from samdistill.data import BadInput, ImageDataset, ImageItem, ReadableImages, collate_images, image_loader
from samdistill.engine.task import Phase, Task
from samdistill.evaluation.result import Evaluation, Measure
from samdistill.evaluation.result_story import Tile
from samdistill.evaluation.verdict import Score
from samdistill.jobs.base import DISTILLED, UNTRAINED, Evaluated, Given, Job, Plan, Ready, ReportNames
from samdistill.jobs.caching import CacheCall, CacheReport
from samdistill.jobs.recording import write_records
from samdistill.jobs.views import ViewMaps, ViewParts
from samdistill.registry import TermTable
from samdistill.sandbox.render import render_sandbox
from samdistill.store import StoreSpec, record_bytes
from samdistill.teachers import Maps, MapSignals, RunningMaps
from samdistill.types import ImageBatch, Term, Terms

SIDE, CELLS = 48, 4
TERMS = TermTable("toy term")


@TERMS.term("squared", 1.0)
def squared(predicted: Tensor, target: Tensor) -> Tensor:
    return (predicted - target).square().mean()


ToyLossConfig = loss_block("ToyLossConfig", "Weights.", (TERMS,))


class ToyConfig(CachedRun):
    FOLDER: ClassVar[str] = "colours"
    job: Literal["toy"] = "toy"
    output: Path = Path("runs/toy")
    cache: CacheConfig = CacheConfig()
    loss: ToyLossConfig = ToyLossConfig()
    train: TrainConfig = TrainConfig()


class ToyStudentConfig(PretrainedConfig):
    model_type = "toy_student"


class ToyStudent(PreTrainedModel):
    config_class = ToyStudentConfig

    def __init__(self, config: ToyStudentConfig) -> None:
        super().__init__(config)
        self.colour = nn.Conv2d(3, 3, 1)
        self.post_init()

    def forward(self, images: Tensor) -> Tensor:
        return self.colour(F.adaptive_avg_pool2d(images.float() / 255, CELLS))


@dataclass(frozen=True, kw_only=True)
class ToyPlan(Plan):
    images: int
    cache_bytes: int

    @property
    def inputs(self) -> int:
        return self.images

    @property
    def headline(self) -> str:
        return f"{self.images} images, {self.steps} steps"

    @property
    def raw_record_bytes(self) -> int:
        return record_bytes("fp16", (3, CELLS, CELLS))

    def facts(self) -> dict[str, str]:
        return {"images": str(self.images), "cache": str(self.cache_bytes)}


class Colours:
    """The teacher, if it were one."""

    fingerprint = "0" * 16

    def ask(self, batch: ImageBatch) -> Maps:
        return (F.adaptive_avg_pool2d(batch.images.float() / 255, CELLS),)

    def to(self, device: torch.device | str) -> None:
        """Nothing to move."""


class ToyParts(ViewParts[ToyConfig]):
    image_size, what = SIDE, "colours"

    @property
    def keys(self) -> Sequence[str]:
        return self.train_source.keys

    def specs(self, fingerprint: str) -> dict[str, StoreSpec]:
        about = fingerprint, self.transform.fingerprint, self.config.cache.codec
        return {"": StoreSpec("colour", (3, CELLS, CELLS), SIDE, *about)}

    def running(self) -> RunningMaps:
        return RunningMaps(Colours(), Colours().ask)


@dataclass(frozen=True)
class ToyBatch:
    images: ImageBatch
    teacher_features: Maps


class ToyTask(Task[ToyBatch]):
    def __init__(self, config: ToyConfig, items: ReadableImages, signals: MapSignals) -> None:
        self.config, self.items, self.signals, self.taught_by = config, items, signals, signals.fingerprint

    def build_student(self) -> nn.Module:
        return ToyStudent(ToyStudentConfig())

    def dataset(self, epoch: int) -> ReadableImages:
        return self.items

    def collate(self, items: Sequence[tuple[ImageItem, tuple[BadInput, ...]]], phase: Phase = Phase()) -> ToyBatch:
        images, _ = collate_images([image for image, _ in items])
        assert images is not None
        return ToyBatch(images, self.signals.read(images))

    def to(self, batch: ToyBatch, device: torch.device) -> ToyBatch:
        self.signals.to(device)
        images = batch.images.to(device)
        return ToyBatch(images, self.signals.answer(images, batch.teacher_features))

    def terms(self, student: nn.Module, batch: ToyBatch, phase: Phase = Phase()) -> Terms:
        predicted, loss = student(batch.images.images), self.config.loss
        return Terms(
            {
                name: Term(TERMS.get(name)(predicted, batch.teacher_features[0]), loss.weight(name))
                for name in loss.named
            }
        )


@dataclass(frozen=True)
class ToyRow:
    name: str
    error: float


@dataclass(frozen=True)
class ToyResult(Evaluation[ToyRow]):
    rows: tuple[ToyRow, ...]
    teacher: str | None = None
    skipped: tuple[BadInput, ...] = ()
    pictures: tuple[Any, ...] = ()
    pictures_note = ""
    note = ""

    def measures(self) -> list[Measure]:
        return [Measure("colour", "squared error", [f"{row.error:.4f}" for row in self.rows])]

    def caption(self) -> str:
        return "Colours of image cells."

    def headline(self, student: str, start: str | None) -> str:
        return f"squared error {self.row(student).error:.4f}"

    def score(self, name: str) -> Score:
        return Score("likeness", 1 - self.row(name).error, "100 cells")

    def tiles(self, student: str, start: str | None) -> list[Tile]:
        return []

    def to_dict(self) -> dict[str, Any]:
        return {row.name: row.error for row in self.rows}


class ToyJob(Job[ToyConfig]):
    name = "toy"
    config = ToyConfig

    def plan(self, config: ToyConfig, world: int = 1) -> Plan:
        images, size = len(ToyParts(config).train_source.keys), record_bytes(config.cache.codec, (3, CELLS, CELLS))
        epoch = images // config.train.batch_size
        return ToyPlan(
            images=images, cache_bytes=images * size, batch_norms=0, steps_per_epoch=epoch,
            steps=epoch * config.train.total_epochs,
        )  # fmt: skip

    def prepare(self, config: ToyConfig, device: str) -> Ready:
        parts = ToyParts(config)
        items = ReadableImages(parts.view(0, parts.trained_keys), cached=not config.online)
        return Ready(ToyTask(config, items, parts.signals()))

    def probe(self, config: ToyConfig, device: str) -> tuple[Task[Any], int]:
        return super().probe(ToyParts(config).checkable().config, device)

    def reads_cache(self, config: ToyConfig) -> bool:
        return not config.online

    def cache(self, config: ToyConfig, call: CacheCall) -> CacheReport:
        return write_records(ViewMaps(ToyParts(config), call), call)

    def evaluate(self, config: ToyConfig, merged: MergeReport | None) -> Evaluated:
        images, torch_state = ToyParts(config), load_file(config.output / "student" / "model.safetensors")
        torch.manual_seed(config.train.seed)
        start, student = (ToyStudent(ToyStudentConfig()) for _ in range(2))
        student.load_state_dict(torch_state)
        source = images.held_out_source()
        batch, _ = next(iter(image_loader(ImageDataset(source, images.transform, source.keys, 0), len(source.keys))))
        target = F.adaptive_avg_pool2d(batch.images.float() / 255, CELLS)
        with torch.no_grad():
            rows = [
                ToyRow(name, squared(model(batch.images), target).item())
                for name, model in ((UNTRAINED, start), (DISTILLED, student))
            ]
        return Evaluated(ToyResult(tuple(rows)), ("a note",))

    def summary(self, evaluated: Evaluated) -> list[str]:
        return [evaluated.result.headline(DISTILLED, UNTRAINED)]

    def report_names(self, config: ToyConfig) -> ReportNames:
        return ReportNames("Colours of a toy", cached="colours")

    def demo(self, folder: Path) -> tuple[str, list[str]]:
        render_sandbox(folder, train=8, val=4, size=64, progress=False)
        return str(folder.parent / "toy.yaml"), [f"data.root={folder}"]

    def begin(self, given: Given) -> tuple[str, list[str]]:
        return str(given.data.parent / "toy.yaml"), [f"data.root={given.data}"]

    def train_items(self, config: ToyConfig) -> int:
        return len(ToyParts(config).train_source.keys)
