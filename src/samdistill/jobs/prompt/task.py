"""Prompt distillation: a promptable student learns masks from data, and four signals from larger SAMs.

The terms and their defaults are those of the published point, box and mixed fine-tuning of MobileSAM, see
``jobs/prompt/losses.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import copy
from dataclasses import replace
from itertools import pairwise
from typing import Protocol

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset

from ...checkpoints.promptable import load_promptable
from ...config import TrainConfig
from ...data.objects import ObjectBatch, ObjectItem, collate_objects
from ...data.skipped import leave_out
from ...engine.held_out import held_out_batches, pooled
from ...engine.task import Phase, Task, stages_at
from ...ops.masks import mask_iou
from ...ops.promptable import Promptable, decoder_width, embedding_grid, to_canvas, trunk_channels
from ...students.promptable import build_promptable
from ...teachers.base import Prompted, Records, Signals
from ...types import GroupSignals, PromptGroup, PromptSignals, Term, Terms
from . import losses
from .config import PromptRunConfig, at_epoch
from .student import PromptStudent, StudentAnswers, best_mask

PerObject = Sequence[Float[Tensor, "g n"]]
"""Values per object, one tensor per group."""


class PromptTeachers(Signals[Prompted, Mapping[str, Records], dict[str, PromptSignals]], Protocol):
    """Signals of several teachers, by name, running or cached.

    Attributes:
        weights: Weights by teacher, which sum to 1.
        patch_channels: Channels of ``encoder_patch`` by teacher.
    """

    weights: Mapping[str, float]
    patch_channels: Mapping[str, int]

    def meets(self, grid: tuple[int, int], width: int, terms: Sequence[str]) -> None:
        """Raise ``UserError`` if a student with this grid and decoder width cannot be compared in ``terms``."""


class PromptTask(Task[ObjectBatch]):
    """Task terms in every round of prompts, and distillation terms in the first or in all rounds."""

    leaves_unused = True  # the mask encoder without corrective rounds, point embeddings with boxes only
    rebuilds_frozen = True

    def __init__(
        self, config: PromptRunConfig, signals: PromptTeachers | None, objects: Callable[[int], Dataset[ObjectItem]],
        held_out: Dataset[ObjectItem] | None = None,
    ) -> None:  # fmt: skip
        """Set up the task.

        Args:
            config: Configuration of the run.
            signals: The teachers; None without distillation.
            objects: Function from an epoch to its training items.
            held_out: Items whose task terms and mIoU are logged after every epoch, or None.
        """
        self.config, self.signals = config, signals
        self.taught_by = "" if signals is None else signals.fingerprint
        self.objects, self.held_out = objects, held_out

    def build_student(self) -> PromptStudent:
        settings = self.config.student
        model = build_promptable(settings) if settings.start is None else load_promptable(settings.start)
        model.config.geometry = self.config.data.geometry  # evaluate and predict read it from there
        channels: list[int] = []
        if self.signals is not None:
            self.signals.meets(embedding_grid(model), decoder_width(model), self.config.distilled)
            if "encoder_patch" in self.config.distilled:
                channels = [self.signals.patch_channels[name] for name in self.signals.weights]
        return PromptStudent(model, trunk_channels(model), channels)

    def export(self, student: nn.Module) -> Promptable:
        assert isinstance(student, PromptStudent)
        return student.model

    def stages(self, train: TrainConfig) -> list[tuple[str, int]]:
        """Add the epochs at which the weight of a term becomes zero or nonzero."""
        counting = [set(term_weights(self.config, epoch)) for epoch in range(train.total_epochs)]
        changes = [epoch for epoch, (before, now) in enumerate(pairwise(counting), 1) if before != now]
        return stages_at(train, [*changes, *(epoch for _, epoch in super().stages(train))])

    def dataset(self, epoch: int) -> Dataset[ObjectItem]:
        return self.objects(epoch)

    def collate(self, items: Sequence[ObjectItem], phase: Phase = Phase()) -> ObjectBatch:
        batch = collate_objects(items)
        if self.signals is None or term_weights(self.config, phase.epoch).keys().isdisjoint(self.config.distilled):
            return batch
        return replace(batch, teacher_features=self.signals.read(Prompted(batch, batch.groups)))

    def to(self, batch: ObjectBatch, device: torch.device) -> ObjectBatch:
        if self.signals is not None:
            self.signals.to(device)
        leave_out(batch.bad)
        return batch.to(device)

    def counts(self, batch: ObjectBatch) -> dict[str, int]:
        """Return the number of images; for terms of objects, of images with objects that count. Rounds have the same
        objects.
        """
        labelled = int((batch.labelled & batch.valid).any(1).sum())
        return {
            **dict.fromkeys(self.config.loss.named, labelled),
            **dict.fromkeys(("decoder_mask_token", "dense_mask_logits"), int(batch.valid.any(1).sum())),
            **dict.fromkeys(("encoder_patch", "prompt_embed"), len(batch.images)),
        }

    def terms(self, student: nn.Module, batch: ObjectBatch, phase: Phase = Phase()) -> Terms:
        weights = term_weights(self.config, phase.epoch)
        answers: StudentAnswers = student(batch, self.config.prompts, phase.epoch)
        found: dict[str, Term] = {}
        with torch.autocast(batch.masks.device.type, enabled=False):  # losses are float32 in any precision
            task = [name for name in self.config.loss.named if name in weights]
            if task:
                values = self._task_values(answers, batch)
                found |= {name: Term(values[name], weights[name]) for name in task}
            distilled = [name for name in losses.DISTILLED_TERMS.weights if name in weights]
            if distilled and self.signals is not None:
                found |= self._distilled(answers, batch, {name: weights[name] for name in distilled})
        return Terms(found)

    def _task_values(self, answers: StudentAnswers, batch: ObjectBatch) -> dict[str, Float[Tensor, ""]]:
        """Return each task term, averaged over rounds."""
        loss, sums = self.config.loss, dict[str, Tensor]()
        counted = batch.labelled & batch.valid
        for asked, signals in zip(answers.asked, answers.rounds, strict=True):
            per_group = [
                losses.task_terms(
                    answer.low_res_masks, answer.iou_scores, low_res_targets(answer, group, batch),
                    loss.focal_gamma, loss.focal_alpha, _inside(answer, group, batch), loss.named,
                )
                for group, answer in zip(asked, signals, strict=True)
            ]  # fmt: skip
            for name in self.config.loss.named:
                value = mean_over_images([terms[name] for terms in per_group], asked, counted)
                sums[name] = sums[name] + value if name in sums else value
        return {name: value / len(answers.rounds) for name, value in sums.items()}

    def _distilled(self, answers: StudentAnswers, batch: ObjectBatch, weights: Mapping[str, float]) -> dict[str, Term]:
        """Return the terms in ``weights`` for every teacher, named ``name/teacher`` if there are several.

        Every round has the same objects, so the mean over all groups is the mean over rounds.
        """
        assert self.signals is not None
        last, found = (None if self.config.distillation.rounds == "all" else 1), dict[str, Term]()
        groups = tuple(group for asked in answers.asked[:last] for group in asked)
        ours = [signals for round_ in answers.rounds[:last] for signals in round_]
        theirs = self.signals.answer(Prompted(batch, groups), batch.teacher_features)
        for number, (teacher, share) in enumerate(self.signals.weights.items()):
            for name, weight in weights.items():
                patch = answers.patches[number] if answers.patches else None
                value = self._value(name, patch, ours, theirs[teacher], groups, batch)
                label = name if len(self.signals.weights) == 1 else f"{name}/{teacher}"
                found[label] = Term(value, weight * share)
        return found

    def _value(
        self, name: str, patch: Tensor | None, ours: Sequence[GroupSignals], theirs: PromptSignals,
        groups: Sequence[PromptGroup], batch: ObjectBatch,
    ) -> Float[Tensor, ""]:  # fmt: skip
        """Return one term for one teacher, averaged over images."""
        block, pairs = self.config.distillation, list(zip(ours, theirs.groups, strict=True))
        if name == "encoder_patch":
            assert patch is not None
            settings = block.encoder_patch
            inside = batch.images.valid((patch.shape[-2], patch.shape[-1]))
            return losses.encoder_patch(patch, theirs.encoder_patch, settings.w_l2, settings.w_cos, inside).mean()
        if name == "prompt_embed":
            embed = block.prompt_embed
            values = [losses.prompt_embed(s.prompt_embed, t.prompt_embed, embed.w_mse, embed.w_cos) for s, t in pairs]
            return torch.cat([value.mean(1) for value in values]).mean()
        if name == "decoder_mask_token":
            token = block.decoder_mask_token
            values = [losses.mask_token(s.mask_tokens, t.mask_tokens, token.w_kl, token.temperature) for s, t in pairs]
        else:
            dense = block.dense_mask_logits
            values = [
                losses.dense_masks(
                    s.low_res_masks, t.low_res_masks, dense.w_kl, dense.w_focal, dense.gamma,
                    inside=_inside(s, group, batch),
                )
                for (s, t), group in zip(pairs, groups, strict=True)
            ]  # fmt: skip
        return mean_over_images(values, groups, batch.valid)

    @torch.no_grad()
    def validate(self, student: nn.Module, phase: Phase = Phase()) -> dict[str, float]:
        """Return task terms and mIoU of the last round on a few batches of held-out objects, without teachers."""
        if self.held_out is None:
            return {}
        task = copy(self)
        task.signals = None
        weights = term_weights(self.config, phase.epoch)
        measured, names = [], [name for name in self.config.loss.named if name in weights]
        for batch in held_out_batches(task, self.held_out, self.config.evaluate.batch_size, student):
            answers: StudentAnswers = student(batch, self.config.prompts)
            counts, values = self.counts(batch), self._task_values(answers, batch)
            figures = {name: (values[name].item(), counts[name]) for name in names}
            measured.append(figures | {"miou": (_miou(answers, batch).item(), counts["iou"])})
        return pooled(measured)


def term_weights(config: PromptRunConfig, epoch: int) -> dict[str, float]:
    """Return the weight of every term in ``epoch``, without terms that are off or have weight 0.

    The weight of a distillation term is multiplied by ``lambda_coef``.
    """
    found = {name: at_epoch(config.loss.weight(name), epoch) for name in config.loss.named}
    coefficient = at_epoch(config.distillation.lambda_coef, epoch)
    for name in config.distilled:
        found[name] = coefficient * at_epoch(getattr(config.distillation, name).weight, epoch)
    return {name: weight for name, weight in found.items() if weight > 0}


def mean_over_images(
    values: PerObject, groups: Sequence[PromptGroup], counted: Bool[Tensor, "b n"]
) -> Float[Tensor, ""]:
    """Average over the counted objects of each image, then over images that have any.

    Without any, the result is 0, attached to the graph.
    """
    parts = [(value, counted[group.rows]) for value, group in zip(values, groups, strict=True)]
    sums = torch.cat([torch.where(kept, value, 0.0).sum(1) for value, kept in parts])
    counts = torch.cat([kept.sum(1) for _, kept in parts])
    return (sums / counts.clamp(min=1)).sum() / (counts > 0).sum().clamp(min=1)


def low_res_targets(answer: GroupSignals, group: PromptGroup, batch: ObjectBatch) -> Float[Tensor, "g n h w"]:
    """Return ground-truth masks at the student's resolution: the fraction of each cell that the object covers."""
    assert answer.low_res_masks is not None
    return F.interpolate(batch.masks[group.rows].float(), answer.low_res_masks.shape[-2:], mode="area")


def _inside(answer: GroupSignals, group: PromptGroup, batch: ObjectBatch) -> Bool[Tensor, "g h w"]:
    """Return the cells of the mask grid that are on the image."""
    assert answer.low_res_masks is not None
    height, width = answer.low_res_masks.shape[-2:]
    return batch.images.valid((height, width))[group.rows]


def _miou(answers: StudentAnswers, batch: ObjectBatch) -> Float[Tensor, ""]:
    size = (batch.masks.shape[-2], batch.masks.shape[-1])
    pairs: Iterable[tuple[PromptGroup, GroupSignals]] = zip(answers.asked[-1], answers.rounds[-1], strict=True)
    values = [mask_iou(to_canvas(best_mask(answer), size), batch.masks[group.rows]) for group, answer in pairs]
    return mean_over_images(values, answers.asked[-1], batch.labelled & batch.valid)
