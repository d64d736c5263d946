"""Running scores of an evaluation, from which the rows are computed."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from jaxtyping import Bool, Float
from torch import Tensor
from transformers import PreTrainedModel

from ..inference.prompting import PromptKind, Targets
from ..metrics.features import FeatureScores
from ..metrics.masks import MaskScores
from ..types import ImageBatch
from .latency import parameters, trunk_gflops, trunk_parameters
from .rows import ModelRow


@dataclass
class Tally:
    """Running scores over a data set.

    Attributes:
        teacher: Name of the model with which the others are compared, or None.
        labelled: Whether the objects are annotated ones.
        images: Number of images so far.
        objects: Number of objects so far.
        left_out: Number of omitted objects so far.
        features: Scores of features by model.
        compared: Kind of the compared features by model.
        truth: Scores against the ground truth, by model and prompt kind.
        agreed: Scores against the teacher's masks, by model and prompt kind.
        owners: Key of the image of every object, in the order of the IoU of ``truth`` and ``agreed``.
    """

    teacher: str | None
    labelled: bool
    images: int = 0
    objects: int = 0
    left_out: int = 0
    features: dict[str, FeatureScores] = field(default_factory=lambda: defaultdict(FeatureScores))
    compared: dict[str, str] = field(default_factory=dict)
    truth: dict[str, dict[str, MaskScores]] = field(default_factory=lambda: defaultdict(_no_scores))
    agreed: dict[str, dict[str, MaskScores]] = field(default_factory=lambda: defaultdict(_no_scores))
    owners: list[str] = field(default_factory=list)

    def add_features(
        self, batch: ImageBatch, features: Mapping[str, Mapping[str, Float[Tensor, "b _ gh gw"]]], left_out: int
    ) -> None:
        """Add a batch of images.

        The first kind of features that model and teacher have in the same shape is compared. Without such a kind
        nothing is compared.

        Args:
            batch: The images.
            features: Feature maps of every model by kind, in order of preference.
            left_out: Number of omitted objects in the batch.
        """
        self.images += len(batch)
        self.left_out += left_out
        if self.teacher is None:
            return
        targets = features[self.teacher]
        for name in features.keys() - {self.teacher}:
            for kind, found in features[name].items():
                if kind in targets and found.shape == targets[kind].shape:
                    valid = batch.valid((found.shape[-2], found.shape[-1])).cpu()
                    self.features[name] = self.features[name].update(found.cpu(), targets[kind].cpu(), valid)
                    self.compared[name] = kind
                    break

    def add_masks(
        self,
        keys: Sequence[str],
        targets: Targets,
        found: Mapping[str, Mapping[PromptKind, Bool[Tensor, "b n s s"]]],
    ) -> None:
        """Add predicted masks of objects.

        Args:
            keys: Keys of the images.
            targets: The objects.
            found: Masks on the canvas, by model and prompt kind.
        """
        self.objects += int(targets.valid.sum())
        self.owners += [keys[image] for image in targets.valid.nonzero()[:, 0].tolist()]
        reference = found.get(self.teacher) if self.teacher is not None else None
        for name, by_kind in found.items():
            for kind, masks in by_kind.items():
                if self.labelled:
                    self.truth[name][kind] = self.truth[name][kind].update(masks, targets.masks, targets.valid)
                if reference is not None and name != self.teacher:
                    self.agreed[name][kind] = self.agreed[name][kind].update(masks, reference[kind], targets.valid)

    def objects_by_image(self, name: str) -> dict[str, tuple[float, ...]]:
        """Return the IoU of each object of one model, averaged over the prompt kinds, by key of the image.

        The IoU is that with the ground truth, or with the teacher's masks if the objects are not annotated ones.
        """
        kinds = [score.ious for score in (self.truth if self.labelled else self.agreed)[name].values() if score.ious]
        found = dict[str, tuple[float, ...]]()
        for key, *ious in zip(self.owners, *kinds, strict=True) if kinds else ():
            found[key] = (*found.get(key, ()), sum(ious) / len(ious))
        return found

    def row(self, name: str, model: PreTrainedModel, latency_ms: float | None) -> ModelRow:
        """Compute the row of one model."""
        features, miou = self.features[name].summary(), _miou(self.truth[name])
        best = _miou(self.truth[self.teacher]) if self.teacher is not None and name != self.teacher else {}
        return ModelRow(
            name=name,
            trunk_parameters=trunk_parameters(model),
            parameters=parameters(model),
            trunk_gflops=trunk_gflops(model),
            latency_ms=latency_ms,
            compared=self.compared.get(name),
            cosine=features.get("cosine"),
            mse=features.get("mse"),
            miou=miou,
            agreement=_miou(self.agreed[name]),
            kept={kind: miou[kind] / best[kind] for kind in miou if best.get(kind)},
        )


def _no_scores() -> dict[str, MaskScores]:
    return defaultdict(MaskScores)


def _miou(scores: Mapping[str, MaskScores]) -> dict[str, float]:
    return {kind: score.summary()["miou"] for kind, score in scores.items() if score.ious}
