"""A whole job in one file: a student learns the mean colour of image cells from a cache. See ``test_toy_job.py``."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset
from transformers import PretrainedConfig, PreTrainedModel

from samdistill.checkpoints.report import MergeReport
from samdistill.config.parts import CacheConfig, Run, TrainConfig, loss_block
from samdistill.data import BadInput, ImageDataset, ImageItem, collate_images, image_loader, record_key
from samdistill.engine.task import Task
from samdistill.evaluation.result import Evaluation, Measure
from samdistill.evaluation.result_story import Tile
from samdistill.evaluation.verdict import Score
from samdistill.jobs.base import CHECK_INPUTS, STUDENT, UNTRAINED, Evaluated, Given, Job, Plan, Ready, ReportNames
from samdistill.jobs.caching import CacheCall, CacheReport
from samdistill.jobs.images import Images
from samdistill.jobs.recording import Block, Computed, Record, RecordSource, view_blocks, write_records
from samdistill.registry import TermTable
from samdistill.sandbox.render import render_sandbox
from samdistill.store import FeatureStore, StoreSpec, record_bytes
from samdistill.types import ImageBatch, Term, Terms

SIDE, CELLS = 48, 4
TERMS = TermTable("toy term")


@TERMS.term("squared", 1.0)
def squared(predicted: Tensor, target: Tensor) -> Tensor:
    return (predicted - target).square().mean()


ToyLossConfig = loss_block("ToyLossConfig", "Weights.", (TERMS,))


class ToyConfig(Run):
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
    def trained_on(self) -> str:
        return f"{self.images} images"

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


class ToyImages(Images[ToyConfig]):
    image_size = SIDE

    def view(self, keys: Sequence[str] | None = None) -> ImageDataset:
        return ImageDataset(
            self.train_source, self.transform, list(self.train_source.keys if keys is None else keys), 0
        )


class Colours(RecordSource):
    def __init__(self, config: ToyConfig, call: CacheCall) -> None:
        self.images, self.root = ToyImages(config), config.output / "colours"
        self.keys = self.images.train_source.keys[call.rank :: call.world]
        spec = StoreSpec(
            "colour", (3, CELLS, CELLS), SIDE, "0" * 16, self.images.transform.fingerprint, config.cache.codec
        )
        self.specs = {"": spec}

    @property
    def problems(self) -> Sequence[BadInput]:
        return self.images.train_source.problems

    def blocks(self) -> Sequence[Block]:
        return view_blocks(self.keys, 1, self.images.config.cache.batch_size)

    def compute(self, blocks: Sequence[Block]) -> Iterator[Computed]:
        keys = [key for block in blocks for key in block.about[1]]
        for batch, bad in image_loader(self.images.view(keys), self.images.config.cache.batch_size):
            assert batch is not None
            colours = F.adaptive_avg_pool2d(batch.images.float() / 255, CELLS)
            found = zip(batch.keys, batch.seeds.tolist(), colours, strict=True)
            yield Computed([Record(record_key(key, 0), seed, {"": colour}) for key, seed, colour in found], bad)

    def fingerprints(self) -> Mapping[str, str]:
        return {record_key(key, 0): self.images.train_source.fingerprint(key) for key in self.keys}

    def sample(self, store: str) -> Iterator[Tensor]:
        return (record.tensors[store] for found in self.compute(self.blocks()) for record in found.records)

    def probe(self, done: Collection[str]) -> Iterator[Record]:
        return (record for found in self.compute(self.blocks()) for record in found.records if record.name in done)


class ColourItems(Dataset[tuple[ImageItem, Tensor]]):
    def __init__(self, images: ImageDataset, store: FeatureStore) -> None:
        self.images, self.store, self.identity = images, store, images.keys

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[ImageItem, Tensor]:
        item = self.images[index]
        assert isinstance(item, ImageItem)
        return item, self.store.read(record_key(item.key, 0)).features


class ToyTask(Task[tuple[ImageBatch, Tensor]]):
    def __init__(self, config: ToyConfig, items: ColourItems) -> None:
        self.config, self.items = config, items

    def build_student(self) -> nn.Module:
        return ToyStudent(ToyStudentConfig())

    def dataset(self, epoch: int) -> ColourItems:
        return self.items

    def collate(self, items: Sequence[tuple[ImageItem, Tensor]]) -> tuple[ImageBatch, Tensor]:
        images, _ = collate_images([image for image, _ in items])
        assert images is not None
        return images, torch.stack([colours for _, colours in items])

    def to(self, batch: tuple[ImageBatch, Tensor], device: torch.device) -> tuple[ImageBatch, Tensor]:
        return batch[0].to(device), batch[1].to(device)

    def terms(self, student: nn.Module, batch: tuple[ImageBatch, Tensor], epoch: int = 0) -> Terms:
        predicted, loss = student(batch[0].images), self.config.loss
        return Terms({name: Term(TERMS.get(name)(predicted, batch[1]), loss.weight(name)) for name in loss.named})


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
        return Score("likeness", 1 - self.row(name).error, 100)

    def tiles(self, student: str, start: str | None) -> list[Tile]:
        return []

    def to_dict(self) -> dict[str, Any]:
        return {row.name: row.error for row in self.rows}


class ToyJob(Job[ToyConfig]):
    name = "toy"
    config = ToyConfig

    def plan(self, config: ToyConfig, world: int = 1) -> Plan:
        images, size = len(ToyImages(config).train_source.keys), record_bytes(config.cache.codec, (3, CELLS, CELLS))
        epoch = images // config.train.batch_size
        return ToyPlan(
            images=images, cache_bytes=images * size, batch_norms=0, steps_per_epoch=epoch,
            steps=epoch * config.train.total_epochs,
        )  # fmt: skip

    def prepare(self, config: ToyConfig, device: str) -> Ready:
        images = ToyImages(config).view()
        return Ready(ToyTask(config, ColourItems(images, FeatureStore(config.output / "colours"))))

    def trial(self, config: ToyConfig, folder: Path) -> ToyConfig | None:
        if (config.output / "colours").exists():
            return None
        (folder / "ids.txt").write_text("\n".join(ToyImages(config).train_source.keys[:CHECK_INPUTS]))
        data = config.data.model_copy(update={"ids": folder / "ids.txt"})
        return config.model_copy(update={"data": data, "output": folder / "trial"})

    def reads_cache(self, config: ToyConfig) -> bool:
        return True

    def cache(self, config: ToyConfig, call: CacheCall) -> CacheReport:
        return write_records(Colours(config, call), call)

    def evaluate(self, config: ToyConfig, merged: MergeReport | None) -> Evaluated:
        images, torch_state = ToyImages(config), load_file(config.output / "student" / "model.safetensors")
        torch.manual_seed(config.train.seed)
        start, student = (ToyStudent(ToyStudentConfig()) for _ in range(2))
        student.load_state_dict(torch_state)
        source = images.held_out_source()
        batch, _ = next(iter(image_loader(ImageDataset(source, images.transform, source.keys, 0), len(source.keys))))
        target = F.adaptive_avg_pool2d(batch.images.float() / 255, CELLS)
        with torch.no_grad():
            rows = [
                ToyRow(name, squared(model(batch.images), target).item())
                for name, model in ((UNTRAINED, start), (STUDENT, student))
            ]
        return Evaluated(ToyResult(tuple(rows)), ("a note",))

    def summary(self, evaluated: Evaluated) -> list[str]:
        return [evaluated.result.headline(STUDENT, UNTRAINED)]

    def report_names(self, config: ToyConfig) -> ReportNames:
        return ReportNames("Colours of a toy", cached="colours")

    def demo(self, folder: Path) -> tuple[str, list[str]]:
        render_sandbox(folder, train=8, val=4, size=64, progress=False)
        return str(folder.parent / "toy.yaml"), [f"data.root={folder}"]

    def begin(self, given: Given) -> tuple[str, list[str]]:
        return str(given.data.parent / "toy.yaml"), [f"data.root={given.data}"]

    def train_items(self, config: ToyConfig) -> int:
        return len(ToyImages(config).train_source.keys)
