"""The one thing the engine knows about a job."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, Generic, TypeVar

import torch
from torch import nn
from torch.utils.data import Dataset

from ..types import Terms

Batch = TypeVar("Batch")


class Task(ABC, Generic[Batch]):
    """A student, its data, and the objective that ties it to a teacher. ``engine.fit`` does the rest.

    How the jobs fit: *encoder* returns images with cached embeddings from ``dataset`` and compares feature maps in
    ``terms``; *detection* keeps its teacher as an attribute, runs it online in ``terms`` (inference mode) and matches
    queries there; *prompt* does the same with several weighted teachers and draws prompts in ``dataset``; *video* makes
    a clip the item. A job in phases (features and outputs, then outputs alone) is one task and one ``fit``:
    ``TrainConfig.phases`` gives each its schedule and its terms, and a resume lands in the right one.

    Rules that exact resume and equal losses on any number of ranks rest on:

    - ``dataset(epoch)[i]`` depends on ``epoch`` and ``i`` alone (draw from a seed kept with the item, not from a global
      generator), and every epoch has the same length.
    - Term values are means over the images of the batch: the engine averages them over ranks and micro-batches.
    - The names of the terms are the same for every batch of a phase; a term without anything to measure is a zero.

    ``leaves_unused``: a batch may leave parameters of the student out (a box encoder when nobody shows a box), which
    ranks have to be told.
    """

    leaves_unused: ClassVar[bool] = False

    @abstractmethod
    def build_student(self) -> nn.Module:
        """The student on the CPU. What has ``requires_grad`` is trained; the engine seeds torch before the call."""

    @abstractmethod
    def dataset(self, epoch: int) -> Dataset[Any]:
        """A map-style data set with ``len``; ``epoch`` counts from 0, may select an augmented view, and begins here."""

    @abstractmethod
    def collate(self, items: Sequence[Any]) -> Batch:
        """Items of the data set to one batch; runs in loader workers."""

    @abstractmethod
    def to(self, batch: Batch, device: torch.device) -> Batch:
        """The batch on ``device``. A task with an online teacher moves that along at the first call."""

    @abstractmethod
    def terms(self, student: nn.Module, batch: Batch) -> Terms:
        """Loss terms of one batch, attached to the graph.

        ``student`` may be wrapped (DDP, mixed precision): reach it by calling it, never through its attributes.
        """

    def validate(self, student: nn.Module) -> dict[str, float]:
        """Figures to log after every epoch. ``student`` is unwrapped, in eval mode, averaged if EMA is on.

        Every rank calls it; the random streams of training are put back afterwards.
        """
        return {}
