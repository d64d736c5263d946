"""Configuration of the detection job."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from ...config.losses import loss_block
from ...config.parts import (
    CacheConfig,
    CachedRun,
    Fraction,
    Positive,
    Strict,
    TeacherConfig,
    TrainConfig,
    Weight,
    registered,
)
from ...config.questions import QuestionsConfig
from ...ops.matching import INDEX, MatchCost
from ...registry import HEADS, MATCHERS
from .label_terms import LABEL_TERMS
from .losses import FEATURE_TERMS, OUTPUT_TERMS


class TextConfig(Strict):
    """The student's text encoder. It is MobileCLIP's; the default size is that of MobileCLIP-S1."""

    hidden: Positive = 512
    layers: Positive = 12
    heads: Positive = 8
    ffn: Positive = 2048
    context: Positive = 32
    """Largest number of tokens of a phrase, with start and end tokens."""


HOST_PARTS = (
    "vision_encoder.neck.*", "text_encoder.*", "text_projection.*", "geometry_encoder.*", "detr_encoder.*",
    "detr_decoder.*", "mask_decoder.*", "dot_product_scoring.*",
)  # fmt: skip
"""Globs of the parameters that a hosted student has from its teacher: all but those of its trunk."""
KIND_KEYS: dict[str, tuple[str, ...]] = {
    "described": ("inherit", "queries", "encoder_layers", "decoder_layers", "heads", "ffn", "text"),
    "hosted": ("head", "host", "text_encoder", "text_recipe", "text_phrases"),
}
"""Keys of ``student`` that only one kind has."""
_KIND_DEFAULTS: dict[str, dict[str, dict[str, Any]]] = {
    "described": {},
    "hosted": {"match": {"method": INDEX}, "train": {"freeze": [{"match": list(HOST_PARTS)}]}},
}
"""Values of keys that a config of a kind does not give."""


class DetectorConfig(Strict):
    """The student, of one of two kinds. Its width is that of the teacher, because features are compared by channel."""

    kind: Literal["described", "hosted"] = "described"
    """``described``: EfficientSam3, with its own heads and text encoder. ``hosted``: the teacher with a small trunk in
    the place of its ViT.
    """
    backbone: str = "es_rv_l"
    """Name of a student (``es_rv_m``), or of a timm model. ``described`` needs feature maps of strides 4, 8, 16 and 32.
    """
    head: Annotated[str, AfterValidator(registered(HEADS))] = "fused"
    """Head of the hosted trunk."""
    host: str | None = None
    """SAM 3 whose neck, text encoder and heads a hosted student has. None for the teacher."""
    text_encoder: Path | None = None
    """Finished run of the text job, its ``student/``, or a file of EfficientSAM3. It takes the place of the host's text
    encoder.
    """
    text_recipe: str | None = None
    """Without ``text_encoder``: recipe of the text run that ``run`` and ``demo`` make before, in ``text/`` of the run
    folder. Without both, a hosted student has the host's text encoder.
    """
    text_phrases: tuple[str, ...] | None = None
    """Phrases of that run, as in its ``data.phrases``. None for those of the questions; with ``source: generic`` those
    of the recipe.
    """
    pretrained: bool | Path = False
    """True downloads timm's ImageNet weights. A path reads weights from a file."""
    trunk: Path | None = None
    """Finished run of the encoder job, its ``student/``, or a file of EfficientSAM3. The backbone, and the head of a
    hosted one, start from it.
    """
    start: Path | None = None
    """Finished run of this job with the same student, or its ``student/``. All weights start from it."""
    inherit: bool = False
    """Initialise heads from the teacher where name and shape match, with layers and queries selected at even intervals.
    """
    queries: Positive = 100
    encoder_layers: Positive = 3
    decoder_layers: Positive = 3
    heads: Positive = 8
    ffn: Positive = 1024
    checkpointing: bool = False
    """Recompute the stages of the backbone in the backward pass instead of storing their activations."""
    text: TextConfig = TextConfig()

    @model_validator(mode="after")
    def _keys_of_its_kind(self) -> DetectorConfig:
        """Refuse keys of the other kind. Defaults are allowed, since a resolved config contains every key."""
        for kind, names in KIND_KEYS.items():
            given = [name for name in names if getattr(self, name) != type(self).model_fields[name].default]
            if given and kind != self.kind:
                keys = ", ".join(f"student.{name}" for name in given)
                raise ValueError(f"a {self.kind} student has no {keys}; leave that out, or set student.kind={kind}")
        return self

    @model_validator(mode="after")
    def _one_start(self) -> DetectorConfig:
        if sum((self.trunk is not None, self.pretrained is not False, self.start is not None)) > 1:
            raise ValueError("give one of 'trunk', 'pretrained' and 'start'")
        if self.start is not None and self.inherit:
            raise ValueError("'inherit' would replace heads that 'start' brings; give one of them")
        return self


class MatchConfig(Strict):
    """Matching of student queries with teacher queries."""

    method: Annotated[str, AfterValidator(registered(MATCHERS, INDEX))] = "hungarian"
    """``index`` pairs queries of the same index, for a student with the queries of its teacher. It needs no cost."""
    mask: Weight = 2.0
    box: Weight = 5.0
    logit: Weight = 2.0
    resolution: Positive = 72
    """Side in pixels of the masks in the matching cost."""
    floor: Fraction = 0.0
    """Teacher queries with a lower score are not matched. Student queries without a match learn "no object"."""

    @property
    def cost(self) -> MatchCost:
        """Weights of the matching cost."""
        return MatchCost(self.mask, self.box, self.logit, self.resolution, self.floor)


DetectionLossConfig = loss_block(
    "DetectionLossConfig",
    'Weights of the terms, as described. ``unmatched``: student queries without a match learn "no object". '
    "``standardise``: features are compared in units of the standard deviation of the teacher's channels.",
    (OUTPUT_TERMS, FEATURE_TERMS, LABEL_TERMS),
    unmatched=(bool, True),
    standardise=(bool, False),
)


FPN, TRUNK = "fpn", "trunk"
"""Terms that need only the teacher's maps of an image, which can be cached. Its answers are larger and cannot be."""


class PyramidCacheConfig(CacheConfig):
    """Cache of the teacher's maps of images, for phases with the term ``fpn`` or ``trunk`` only."""

    mode: Literal["stored", "online"] = "online"


class CalibrationConfig(Strict):
    """Calibration of the finished student's scores."""

    images: Annotated[int, Field(ge=0)] = 0
    """Largest number of held-out images whose questions give the factors of the logits. 0 leaves the scores as they
    are.
    """


class ConceptEvaluateConfig(Strict):
    """Evaluation on held-out questions."""

    concepts: Path | None = None
    """Held-out questions with masks, a file in the SA-Co format. None looks for one in ``data.root``."""
    threshold: Fraction = 0.5
    images: Positive | None = None
    """Largest number of held-out images. None for all."""
    batch_size: Positive = 4


class DetectionRunConfig(CachedRun):
    """Configuration of a detection run. The resolved configuration is saved in the run folder."""

    job: Literal["detection"] = "detection"
    output: Path = Path("runs/detection")
    teacher: TeacherConfig
    student: DetectorConfig = DetectorConfig()
    questions: QuestionsConfig = QuestionsConfig()
    match: MatchConfig = MatchConfig()
    cache: PyramidCacheConfig = PyramidCacheConfig()
    loss: DetectionLossConfig = DetectionLossConfig()
    train: TrainConfig = TrainConfig()
    calibration: CalibrationConfig = CalibrationConfig()
    evaluate: ConceptEvaluateConfig = ConceptEvaluateConfig()

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_the_kind(cls, given: Any) -> Any:
        """Add the values of ``match`` and ``train`` that the kind of student has by default."""
        student = given.get("student") if isinstance(given, dict) else None
        kind = student.get("kind") if isinstance(student, dict) else getattr(student, "kind", None)
        for block, values in _KIND_DEFAULTS.get(str(kind), {}).items():
            own = given.get(block, {})
            if isinstance(own, dict):
                given = {**given, block: {**values, **own}}
        return given

    @model_validator(mode="after")
    def _pairs_that_exist(self) -> DetectionRunConfig:
        if self.match.method == INDEX and self.student.kind != "hosted":
            raise ValueError("match.method=index: only a hosted student has the queries of its teacher")
        return self

    @model_validator(mode="after")
    def _trunks_that_correspond(self) -> DetectionRunConfig:
        if TRUNK in self.loss.named and self.student.kind != "hosted":
            raise ValueError("loss.trunk: only a hosted student has a trunk in the place of its teacher's")
        return self

    @model_validator(mode="after")
    def _questions_with_labels(self) -> DetectionRunConfig:
        for phase in self.train.phases or ():
            for term in phase.terms or ():
                if term in LABEL_TERMS and term not in self.label_names:
                    raise ValueError(f"train.phases: phase {phase.name!r}: {term} has no weight; set loss.{term}")
        if self.label_names and self.questions.source != "names":
            raise ValueError(
                f"loss.{self.label_names[0]}: phrases of questions.source={self.questions.source} have no labels; set "
                "questions.source=names, or leave out the label terms"
            )
        return self

    @model_validator(mode="after")
    def _maps_that_are_read(self) -> DetectionRunConfig:
        found = {term for epoch in range(self.train.total_epochs) if (term := self.map_term(epoch)) is not None}
        if len(found) > 1:
            raise ValueError("train.phases: phases of fpn alone and of trunk alone need different maps; give one kind")
        if not self.online and not found:
            raise ValueError(
                "cache.mode=stored: only a phase of fpn or of trunk alone learns from a cache, and train.phases has "
                "none; set cache.mode=online"
            )
        return self

    @property
    def trains_text(self) -> bool:
        """Whether a text run comes before this one."""
        return self.student.text_encoder is None and self.student.text_recipe is not None

    @property
    def text_encoder(self) -> Path | None:
        """Where the small text encoder of a hosted student is, or will be. None for the host's."""
        return self.output / "text" if self.trains_text else self.student.text_encoder

    def wanted(self, epoch: int) -> frozenset[str]:
        """Return the names of the terms in the phase of ``epoch``."""
        phase = self.train.phase_at(epoch)
        return frozenset(self.loss.named if phase is None or phase.terms is None else phase.terms)

    @property
    def label_names(self) -> tuple[str, ...]:
        """The terms of labels that this run uses: those with a weight above 0."""
        return tuple(name for name in self.loss.named if name in LABEL_TERMS and self.loss.weight(name))

    def map_term(self, epoch: int) -> str | None:
        """Return the only term of ``epoch`` if it compares maps of images, ``FPN`` or ``TRUNK``, else None."""
        return only_map(self.wanted(epoch))

    @property
    def maps(self) -> str:
        """Which maps of the teacher the phases of maps alone read: those of ``FPN`` or of ``TRUNK``."""
        found = (self.map_term(epoch) for epoch in range(self.train.total_epochs))
        return next((term for term in found if term is not None), FPN)


def only_map(terms: frozenset[str]) -> str | None:
    """Return the only one of ``terms`` if it compares maps of images, else None."""
    return next(iter(terms)) if terms in ({FPN}, {TRUNK}) else None
