"""What a job is: everything the pipeline and the verbs know about it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

from ..checkpoints.report import MergeReport
from ..checkpoints.words import Words
from ..config import Run, TeacherConfig, TrainConfig
from ..data import BadInput
from ..engine.task import Task
from ..evaluation.result import Evaluation
from ..types import UserError
from .caching import CacheCall, CacheReport

Config = TypeVar("Config", bound=Run)
TEACHER, UNTRAINED, DISTILLED = "teacher", "untrained", "distilled"
"""Names of the three models in the tables of a run."""
CHECK_INPUTS = 4
"""Most inputs of the batch that ``check`` looks at."""


def optimiser_bytes(trained: int, train: TrainConfig) -> int:
    """Weights, gradients and two Adam moments of ``trained`` parameters, and their average where one is kept."""
    return 4 * trained * (5 if train.ema else 4)


def teacher_bytes(teacher: TeacherConfig, params: int) -> int:
    """Weights of a running teacher of ``params`` parameters."""
    return (4 if teacher.precision == "fp32" else 2) * params


@dataclass(frozen=True, kw_only=True)
class Plan(ABC):
    """What a run will need. Sizes are in bytes. batch_norms: layers of batch norm that train.

    steps: optimiser steps of the whole run. skipped: inputs that the run will leave out.
    """

    batch_norms: int
    steps_per_epoch: int
    steps: int
    skipped: tuple[BadInput, ...] = ()

    @property
    @abstractmethod
    def trained_on(self) -> str:
        """What an epoch consists of, with its number: ``2000 images``."""

    @property
    @abstractmethod
    def inputs(self) -> int:
        """Images or videos to train on."""

    @property
    @abstractmethod
    def headline(self) -> str:
        """One line: student, teacher, data and steps."""

    @abstractmethod
    def facts(self) -> dict[str, str]:
        """Name and text of each line that ``samdistill plan`` prints."""

    @property
    def raw_record_bytes(self) -> int | None:
        """Bytes of one uncompressed fp16 record of the cache; None where no record is described."""
        return None

    def to_dict(self) -> dict[str, object]:
        return asdict(self) | {"skipped": [bad._asdict() for bad in self.skipped]}


@dataclass(frozen=True)
class Ready:
    """A run that can be trained. words: the tokenizer that is saved beside a student that reads words."""

    task: Task[Any]
    words: Words | None = None


@dataclass(frozen=True)
class Given:
    """What a caller of ``distill`` has. teachers: weights by path or hub id. student: None takes the recipe's."""

    data: Path
    teachers: Mapping[str, float]
    student: str | None

    @property
    def teacher(self) -> str:
        """The only one. Raises ``UserError`` where there is another number of them."""
        if len(self.teachers) != 1:
            raise UserError(f"this job learns from one teacher, not {len(self.teachers)}: give teacher")
        return next(iter(self.teachers))


@dataclass(frozen=True)
class Evaluated:
    """What was measured on held-out data, and lines about files that were written beside it."""

    result: Evaluation[Any]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class ReportNames:
    """What a job calls things on its report: the page's title, the rows of the table that are compared, what a cache
    holds and what one record of it describes."""

    title: str
    student: str = DISTILLED
    start: str = UNTRAINED
    cached: str = "embeddings"
    record: str = "image"


class Job(ABC, Generic[Config]):
    """One kind of distillation. ``pipeline`` runs any job through this interface.

    name: as in ``job:`` of a config. config: class of its configurations. layouts: names that ``cache --layout`` takes.
    context: inputs that share one item of a batch, of which batch norms see every one. unmeasured: why ``evaluate``
    gives None.
    """

    name: ClassVar[str]
    config: ClassVar[type[Run]]
    layouts: ClassVar[tuple[str, ...]] = ("store",)
    unmeasured: ClassVar[str] = "the merged model cannot be run here"

    def resolve(self, config: Config) -> Config:
        """The config with everything that is found on disk written into it."""
        return config

    def frames(self, config: Config) -> int:
        """Images that one item of a batch gives a trained batch norm."""
        return 1

    @abstractmethod
    def plan(self, config: Config, world: int = 1) -> Plan:
        """What the run will need; loads no weights and decodes no image, except to learn sizes."""

    @abstractmethod
    def prepare(self, config: Config, device: str) -> Ready:
        """The task on all its data. Rank 0 proves that a cache belongs to the teacher and the data of ``config``."""

    def probe(self, config: Config, device: str) -> tuple[Task[Any], int]:
        """The task that ``check`` differentiates, and the size of its batch. Where nothing is cached yet, the teacher
        of a job that can do without a cache runs."""
        micro = config.train.batch_size // config.train.accumulate
        return self.prepare(config, device).task, max(1, min(CHECK_INPUTS, micro))

    def reads_cache(self, config: Config) -> bool:
        """Whether training reads what ``cache`` writes."""
        return False

    def cache(self, config: Config, call: CacheCall) -> CacheReport:
        """Write what is missing from the run's cache."""
        raise UserError(f"the {self.name} job has nothing to cache")

    def merge(self, config: Config) -> MergeReport | None:
        """Put the finished student into its teacher; None where the job, or this teacher, has no such step."""
        return None

    @abstractmethod
    def evaluate(self, config: Config, merged: MergeReport | None) -> Evaluated | None:
        """The finished run on its held-out data, beside its teacher and its start; None where nothing can be run."""

    @abstractmethod
    def summary(self, evaluated: Evaluated) -> list[str]:
        """The few lines that a person wants to read at the end."""

    @abstractmethod
    def report_names(self, config: Config) -> ReportNames:
        """What the report calls things."""

    @abstractmethod
    def demo(self, folder: Path) -> tuple[str, list[str]]:
        """Render the demo's data into ``folder``: name of the packaged recipe, and its further settings."""

    @abstractmethod
    def begin(self, given: Given) -> tuple[str, list[str]]:
        """Name of the packaged recipe for what a caller of ``distill`` has, and the settings that say it."""

    @abstractmethod
    def train_items(self, config: Config) -> int:
        """Images or videos to train on, from whose number a batch for a small data set is chosen."""
