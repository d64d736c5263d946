"""Student of prompt distillation. One call encodes the images and answers all rounds of prompts."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from ...config import PromptsConfig
from ...data.objects import ObjectBatch
from ...ops.masks import error_points, mask_iou
from ...ops.promptable import Embeddings, Promptable, answer_group, embed, to_canvas
from ...types import GroupSignals, PromptGroup, Prompts


@dataclass(frozen=True)
class StudentAnswers:
    """Outputs of the student.

    Attributes:
        patches: Patch features for each teacher, in the order of teachers, with the channels of the teacher.
        asked: Prompts of every round.
        rounds: Signals of every round.
    """

    patches: tuple[Float[Tensor, "b _ gh gw"], ...]
    asked: tuple[tuple[PromptGroup, ...], ...]
    rounds: tuple[tuple[GroupSignals, ...], ...]


class PromptStudent(nn.Module):
    """A promptable model, and a 1x1 convolution from its patch features to those of each teacher, for training only.

    Patch features of each teacher have their own basis (principal components), so each teacher needs a convolution,
    also if channels are equal.

    Attributes:
        model: The promptable model that is exported.
        adapters: The convolutions.
    """

    def __init__(self, model: Promptable, patch_channels: int, teacher_channels: Sequence[int]) -> None:
        super().__init__()
        self.model = model
        # images and prompts share this table, which SAM does not train; in transformers it is a parameter
        model.shared_image_embedding.positional_embedding.requires_grad_(False)
        self.adapters = nn.ModuleList(nn.Conv2d(patch_channels, channels, 1) for channels in teacher_channels)

    def forward(self, batch: ObjectBatch, prompts: PromptsConfig, epoch: int = 0) -> StudentAnswers:
        """Run a whole step in one call, as data-parallel training requires. Clicks and mask prompts have no gradient.

        Args:
            batch: Images and objects.
            prompts: Settings of the prompts.
            epoch: Number of the epoch, from which random clicks are drawn, see ``click_draws``.
        """
        embeddings = embed(self.model, batch.images)
        groups = batch.groups if len(batch.draws) == 1 else self.hardest(embeddings, batch)
        asked, rounds = [groups], [tuple(answer_group(self.model, embeddings, group) for group in groups)]
        for number in range(prompts.rounds):
            draws = click_draws(batch, epoch, number) if prompts.click == "random" else None
            groups = tuple(
                clicked(group, answer, batch, draws) for group, answer in zip(groups, rounds[-1], strict=True)
            )
            asked.append(groups)
            rounds.append(tuple(answer_group(self.model, embeddings, group) for group in groups))
        patches = tuple(adapter(embeddings.trunk) for adapter in self.adapters)
        return StudentAnswers(patches, tuple(asked), tuple(rounds))

    @torch.no_grad()
    def hardest(self, embeddings: Embeddings, batch: ObjectBatch) -> tuple[PromptGroup, ...]:
        """Return for each image the draw of prompts with the lowest mean IoU of the student.

        TinySAM's hard prompts (Shu et al., 2023) are instead chosen in the error region of one answer.
        """
        scores = torch.stack([self._mean_iou(embeddings, groups, batch) for groups in batch.draws])
        chosen = scores.argmin(0)
        return tuple(
            kept
            for number, groups in enumerate(batch.draws)
            for group in groups
            if (kept := _keep(group, (chosen == number)[group.rows])) is not None
        )

    def _mean_iou(
        self, embeddings: Embeddings, groups: Sequence[PromptGroup], batch: ObjectBatch
    ) -> Float[Tensor, " b"]:
        means = torch.ones(len(batch.images), device=batch.masks.device)
        for group in groups:
            logits = best_mask(answer_group(self.model, embeddings, group))
            ious = mask_iou(to_canvas(logits, _size(batch)), batch.masks[group.rows])
            counted = batch.labelled[group.rows] & batch.valid[group.rows]
            means[group.rows] = torch.where(counted, ious, 0.0).sum(1) / counted.sum(1).clamp(min=1)
        return means


def best_mask(answer: GroupSignals) -> Float[Tensor, "g n h w"]:
    """Return the logits of the mask with the highest predicted IoU, detached."""
    assert answer.low_res_masks is not None and answer.iou_scores is not None
    index = answer.iou_scores.detach().argmax(-1)[..., None, None, None]
    return answer.low_res_masks.detach().take_along_dim(index, 2)[:, :, 0].float()


def click_draws(batch: ObjectBatch, epoch: int, number: int) -> Float[Tensor, "b n"]:
    """Return a uniform number in [0, 1) for each object's random click in round ``number``.

    It depends on the seed of the view, the epoch, the round and the slot only. Clicks are therefore the same after a
    resume, for any number of ranks and micro-batches, and on any device.
    """
    slots = range(batch.masks.shape[1])
    draws = [[random.Random(f"click/{seed}/{epoch}/{number}/{slot}").random() for slot in slots]
             for seed in batch.images.seeds.tolist()]  # fmt: skip
    return torch.tensor(draws, dtype=torch.float32, device=batch.masks.device)


@torch.no_grad()
def clicked(
    group: PromptGroup, answer: GroupSignals, batch: ObjectBatch, draws: Float[Tensor, "b n"] | None
) -> PromptGroup:
    """Return the group with one additional corrective click in the error region of the last answer.

    The last answer becomes the mask prompt.

    Args:
        group: Prompts of the last round.
        answer: The student's answer to them.
        batch: Images and objects.
        draws: Numbers of ``click_draws``, which select any pixel of the error region; None for its centre.
    """
    masks, logits, prompts = batch.masks[group.rows], best_mask(answer), group.prompts
    own = None if draws is None else draws[group.rows].flatten()
    inside = batch.images.valid(_size(batch))[group.rows, None]
    predicted = to_canvas(logits, _size(batch)) & inside  # padding is not visible to a user
    points, labels = error_points(predicted.flatten(0, 1), masks.flatten(0, 1), own)
    shape = (*masks.shape[:2], 1)
    click, label = points.view(*shape, 2).float(), labels.view(shape)
    if prompts.points is not None and prompts.labels is not None:
        click, label = torch.cat([prompts.points, click], 2), torch.cat([prompts.labels, label], 2)
    return PromptGroup(group.rows, replace(prompts, points=click, labels=label, masks=logits), multimask=False)


def _size(batch: ObjectBatch) -> tuple[int, int]:
    return batch.masks.shape[-2], batch.masks.shape[-1]


def _keep(group: PromptGroup, kept: Bool[Tensor, " g"]) -> PromptGroup | None:
    """Return the images of the group that ``kept`` marks; None without any."""
    index: Int[Tensor, " k"] = kept.nonzero()[:, 0]
    if not len(index):
        return None
    values = (getattr(group.prompts, f.name) for f in fields(Prompts))
    return PromptGroup(group.rows[index], Prompts(*(v if v is None else v[index] for v in values)), group.multimask)
