"""Interface of a job to the pipeline and the commands."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

from torch import nn

from ..checkpoints.report import MergeReport
from ..checkpoints.words import Words
from ..config import Run, TeacherConfig, TrainConfig
from ..data import BadInput
from ..engine.groups import Freezing
from ..engine.task import Task
from ..evaluation.result import Evaluation
from ..types import UserError
from .caching import CacheCall, CacheReport

Config = TypeVar("Config", bound=Run)
TEACHER, UNTRAINED, DISTILLED = "teacher", "untrained", "distilled"
"""Names of the three models in the tables of a run."""
CHECK_INPUTS = 4
"""Largest number of inputs in the batch of ``check``."""


def optimiser_bytes(student: nn.Module, train: TrainConfig) -> int:
    """Return the bytes of weights, gradients, two Adam moments and, with EMA, the weight average, all in float32.

    Parameters that ``train.freeze`` freezes for the whole run have weights only.

    Args:
        student: The student, which may be on the meta device. Its ``requires_grad`` flags are set as in training.
        train: Settings of the training.

    Raises:
        UserError: A pattern of ``train.freeze`` matches no parameter, or nothing is left to train.

    Example:
        >>> optimiser_bytes(torch.nn.Linear(9, 1), TrainConfig())
        160
    """
    Freezing(student, train.freeze, train.total_epochs)
    counts = {trains: sum(p.numel() for p in student.parameters() if p.requires_grad == trains) for trains in (0, 1)}
    return 4 * (counts[0] + counts[1] * (5 if train.ema else 4))


def teacher_bytes(teacher: TeacherConfig, params: int) -> int:
    """Return the bytes of the weights of a running teacher with ``params`` parameters."""
    return (4 if teacher.precision == "fp32" else 2) * params


@dataclass(frozen=True, kw_only=True)
class Plan(ABC):
    """Requirements of a run. Sizes are in bytes.

    Attributes:
        batch_norms: Number of batch norm layers that train.
        steps_per_epoch: Optimiser steps per epoch.
        steps: Optimiser steps of the run.
        skipped: Inputs that the run leaves out.
    """

    batch_norms: int
    steps_per_epoch: int
    steps: int
    skipped: tuple[BadInput, ...] = ()

    @property
    @abstractmethod
    def inputs(self) -> int:
        """Number of training images or videos."""

    @property
    def trained_on(self) -> str:
        """Number and kind of the items of an epoch, such as ``2000 images``."""
        return f"{self.inputs} images"

    @property
    @abstractmethod
    def headline(self) -> str:
        """One line about student, teacher, data and steps."""

    @abstractmethod
    def facts(self) -> dict[str, str]:
        """Return name and text of each line that ``samdistill plan`` prints."""

    @property
    def raw_record_bytes(self) -> int | None:
        """Bytes of one uncompressed fp16 record of the cache; None if the plan describes no record."""
        return None

    def to_dict(self) -> dict[str, object]:
        """Return the plan as plain values for JSON."""
        return asdict(self) | {"skipped": [bad._asdict() for bad in self.skipped]}


@dataclass(frozen=True)
class Ready:
    """A run that is ready to train.

    Attributes:
        task: The task.
        words: Tokenizer that is saved with the student, or None.
    """

    task: Task[Any]
    words: Words | None = None


@dataclass(frozen=True)
class Given:
    """Arguments of ``distill``.

    Attributes:
        data: Folder of the data.
        teachers: Weights by path or hub id of the teacher.
        student: Name or path of the student; None for that of the recipe.
    """

    data: Path
    teachers: Mapping[str, float]
    student: str | None

    @property
    def teacher(self) -> str:
        """The only teacher.

        Raises:
            UserError: There is none, or more than one.
        """
        if len(self.teachers) != 1:
            raise UserError(f"this job learns from one teacher, not {len(self.teachers)}: give teacher")
        return next(iter(self.teachers))


@dataclass(frozen=True)
class Evaluated:
    """Result of an evaluation on held-out data, and lines about files that were written with it."""

    result: Evaluation[Any]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class ReportNames:
    """Names on the report of a job.

    Attributes:
        title: Title of the page.
        student: Row of the trained student in the table of results.
        start: Row of the student before training.
        cached: What the cache contains.
        record: What one record of the cache describes.
    """

    title: str
    student: str = DISTILLED
    start: str = UNTRAINED
    cached: str = "embeddings"
    record: str = "image"


class Job(ABC, Generic[Config]):
    """Base class of jobs. ``pipeline`` runs any job through this interface.

    Attributes:
        name: Value of ``job`` in a config.
        config: Class of the configuration.
        layouts: Values of ``cache --layout``.
        unmeasured: Reason that is printed if ``evaluate`` returns None.
        phrases: Phrases of the demo's data, for a job whose model finds phrases.
    """

    name: ClassVar[str]
    config: ClassVar[type[Run]]
    layouts: ClassVar[tuple[str, ...]] = ("store",)
    unmeasured: ClassVar[str] = "the merged model cannot be run here"
    phrases: ClassVar[tuple[str, ...]] = ()

    def resolve(self, config: Config) -> Config:
        """Return the config with all values that are found on disk."""
        return config

    def frames(self, config: Config) -> int:
        """Return the number of images that one item of a batch contributes to a trained batch norm."""
        return 1

    @abstractmethod
    def plan(self, config: Config, world: int = 1) -> Plan:
        """Return the requirements of a run.

        No weights are loaded and no images are decoded, except to read sizes.

        Args:
            config: The configuration.
            world: Number of ranks.
        """

    def words(self, config: Config) -> Words | None:
        """Return the tokenizer of the finished model, without loading weights. None for a model without phrases."""
        return None

    @abstractmethod
    def prepare(self, config: Config, device: str) -> Ready:
        """Return the task with all its data. Rank 0 checks that a cache fits the teacher and the data of ``config``."""

    def probe(self, config: Config, device: str) -> tuple[Task[Any], int]:
        """Return the task for ``check`` and the size of its batch.

        If nothing is cached yet, jobs that can train without a cache use the running teacher.
        """
        micro = config.train.batch_size // config.train.accumulate
        return self.prepare(config, device).task, max(1, min(CHECK_INPUTS, micro))

    def before(self, config: Config) -> tuple[Run, ...]:
        """Return the runs that have to be finished before this one. ``distill``, ``run`` and ``demo`` make them.

        Each has an output folder of its own inside that of this run.
        """
        return ()

    def reads_cache(self, config: Config) -> bool:
        """Whether training reads the cache."""
        return False

    def cache(self, config: Config, call: CacheCall) -> CacheReport:
        """Write the missing records of the cache.

        Raises:
            UserError: The job has no cache.
        """
        raise UserError(f"the {self.name} job has nothing to cache")

    def merge(self, config: Config) -> MergeReport | None:
        """Merge the trained student into its teacher. None if the job or this teacher does not support it."""
        return None

    @abstractmethod
    def evaluate(self, config: Config, merged: MergeReport | None) -> Evaluated | None:
        """Evaluate a finished run on held-out data, with its teacher and the untrained student.

        Returns:
            The result, or None if no model can be run.
        """

    @abstractmethod
    def summary(self, evaluated: Evaluated) -> list[str]:
        """Return the last lines of a run, with the main results."""

    @abstractmethod
    def report_names(self, config: Config) -> ReportNames:
        """Return the names on the report."""

    @abstractmethod
    def demo(self, folder: Path) -> tuple[str, list[str]]:
        """Render the data of the demo.

        Args:
            folder: Folder of the data.

        Returns:
            Name of the packaged recipe, and ``key=value`` settings.
        """

    @abstractmethod
    def begin(self, given: Given) -> tuple[str, list[str]]:
        """Select a recipe for the arguments of ``distill``.

        Args:
            given: The arguments.

        Returns:
            Name of the packaged recipe, and ``key=value`` settings.
        """

    @abstractmethod
    def train_items(self, config: Config) -> int:
        """Return the number of training items, from which the batch size for a small data set is chosen."""
