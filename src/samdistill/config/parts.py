"""The blocks that configurations are made of, whatever the job: strict, typed, frozen."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    TypeAdapter,
    create_model,
    field_validator,
    model_validator,
)

from ..names import key_problem
from ..reading import printable
from ..registry import CODECS, HEADS, Registry, TermTable, did_you_mean

Fraction = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[int, Field(gt=0, lt=2**31)]
Count = Annotated[int, Field(ge=0, lt=2**31)]
"""A number of things, or 0."""
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Pixels = Annotated[int, Field(gt=0, le=16384)]
"""Side of a square input."""
Rate = Annotated[float, Field(ge=0)]
Weight = Annotated[float, Field(ge=0)]
Ratio = Annotated[float, Field(gt=0, le=1000)]
Decay = Annotated[float, Field(ge=0, lt=1)]


def _is_name(value: str) -> str:
    """A name that is also a folder's: one part, which stays where it is put."""
    if (problem := key_problem(value)) is not None or "/" in value:
        raise ValueError(f"names a folder, so {problem or 'it cannot hold a slash'}")
    return value


Name = Annotated[str, AfterValidator(_is_name)]


def registered(registry: Registry[Any]) -> Callable[[str], str]:
    """Validator of a name of ``registry``."""

    def check(value: str) -> str:
        if value not in registry:
            raise ValueError(f"no {registry.kind} is called {value!r}{did_you_mean(value, registry.names())}")
        return value

    return check


def _codec(value: str) -> str:
    """A codec's name; ``pca256-int8`` is one of ``pca{K}-int8``."""
    registered(CODECS)(re.sub(r"^pca[1-9]\d*-", "pca{K}-", value))
    return value


class Strict(BaseModel):
    """A block without unknown keys. In every path, and in every text that begins with it, ``~`` is the home folder; no
    text holds what cannot be written as UTF-8."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)

    @field_validator("*", mode="after")
    @classmethod
    def _usable_text(cls, value: Any) -> Any:
        if isinstance(value, Path | str) and (str(value) != printable(str(value)) or "\0" in str(value)):
            raise ValueError("holds characters that no file name and no text can have")
        if isinstance(value, Path | str) and str(value).startswith("~"):
            return type(value)(os.path.expanduser(value))
        return value


class TeacherConfig(Strict):
    """What gives the signal. ``path``: a Hugging Face folder or hub id, an original ``sam3.pt``, or ``sandbox``."""

    kind: str = "sam3"
    path: str
    image_size: Pixels | None = None
    """Side of the square input in pixels; None takes the checkpoint's own."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    tokenizer: Path | None = None
    """Folder or file of the tokenizer, for a job in words; None takes the one beside the checkpoint."""


class StudentConfig(Strict):
    """The trunk that replaces the teacher's ViT. ``backbone`` is a student's name (es_rv_m) or any timm model."""

    backbone: str
    head: Annotated[str, AfterValidator(registered(HEADS))] = "fused"
    pretrained: bool | Path = False
    """True downloads timm's ImageNet weights; a path reads them from a file."""


class AugmentConfig(Strict):
    """Seeded augmentations, drawn per view. All off by default."""

    flip: Fraction = 0.0
    crop_scale: tuple[Fraction, Fraction] | None = None
    """Area range of a resized crop, as in torchvision's RandomResizedCrop."""
    crop_ratio: tuple[Ratio, Ratio] = (3 / 4, 4 / 3)
    brightness: Fraction = 0.0
    contrast: Fraction = 0.0
    saturation: Fraction = 0.0
    hue: Annotated[float, Field(ge=0, le=0.5)] = 0.0


class DataConfig(Strict):
    """Where images come from and how they are laid on the model's canvas."""

    kind: str = "sa1b"
    root: Path
    split: Name = "train"
    held_out: Name | None = "val"
    """Split for evaluation. A plain folder has none: ``held_out_fraction`` of its images are set aside by key."""
    held_out_fraction: Fraction = 0.1
    held_out_last: Positive | None = None
    """Sets aside the last so many keys in place of a split or a fraction."""
    fraction: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Reproducible share of the images, chosen by a hash of the key: 1 % lies inside 5 % lies inside 10 %."""
    ids: Path | None = None
    """A text file with one image key a line, in place of ``fraction``."""
    geometry: Literal["square", "longest_side"] = "square"
    augment: AugmentConfig = AugmentConfig()
    views: Positive = 1
    """Augmented views cached per image; epoch e trains on view e mod views."""
    seed: Seed = 0
    workers: Annotated[int, Field(ge=0, le=1024)] = 2

    @model_validator(mode="after")
    def _one_subset(self) -> DataConfig:
        if self.ids is not None and self.fraction != 1.0:
            raise ValueError("give 'ids' or 'fraction', not both")
        return self


class CacheConfig(Strict):
    """The feature store. ``root`` None puts it into the run folder (``embeddings/``; ``features/`` of videos)."""

    root: Path | None = None
    codec: Annotated[str, AfterValidator(_codec)] = "fp16"
    batch_size: Positive = 4
    verify_records: Positive = 8


class UnknownTerm(ValueError):
    """A key of a ``loss`` block that names no term. known: those that there are."""

    def __init__(self, name: str, known: list[str]) -> None:
        super().__init__(f"unknown key {name!r}")
        self.name, self.known = name, known


class LossConfig(Strict):
    """Weights of loss terms by name; ``loss_block`` makes the class of a job.

    A term that was registered in one of ``TABLES`` without a weight can be named too, and counts with the weight that
    is given.
    """

    model_config = ConfigDict(extra="allow")
    TABLES: ClassVar[tuple[TermTable, ...]] = ()
    KIND: ClassVar[Any] = Weight

    @model_validator(mode="before")
    @classmethod
    def _known_terms(cls, given: Any) -> Any:
        for name, value in given.items() if isinstance(given, dict) else ():
            if name in cls.model_fields:
                continue
            if name not in cls.term_names():
                known = list(dict.fromkeys([*cls.model_fields, *cls.term_names()]))
                raise UnknownTerm(str(name), known)
            TypeAdapter(cls.KIND).validate_python(value)
        return given

    @classmethod
    def term_names(cls) -> tuple[str, ...]:
        """Every term that can be named, those of every run first."""
        declared = [name for table in cls.TABLES for name in table.weights]
        return tuple(dict.fromkeys([*declared, *(name for table in cls.TABLES for name in table.names())]))

    def weight(self, name: str) -> Any:
        """Of a term; 0 for one that the config does not name."""
        return getattr(self, name, 0.0)

    @property
    def named(self) -> tuple[str, ...]:
        """The terms that this run has."""
        return tuple(name for name in self.term_names() if hasattr(self, name))


def loss_block(
    name: str, text: str, tables: tuple[TermTable, ...], kind: Any = Weight, **settings: Any
) -> type[LossConfig]:
    """The ``loss`` block of a job: a weight per declared term of ``tables``, then further ``settings``.

    text: its docstring. kind: type of the weights. settings: (type, default) by name.
    """
    weights: dict[str, Any] = {term: (kind, weight) for table in tables for term, weight in table.weights.items()}
    made = create_model(name, __base__=LossConfig, __doc__=text, **weights, **settings)
    made.TABLES, made.KIND = tables, kind
    return made


class PhaseConfig(Strict):
    """A part of a training with a schedule of its own: linear warm-up, then cosine to ``min_lr``."""

    name: str
    epochs: Positive
    lr: Annotated[float, Field(gt=0)]
    warmup_steps: Count = 0
    warmup_lr: Rate = 0.0
    min_lr: Rate = 0.0
    terms: Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    """Loss terms that train in this phase; None takes all."""


class FreezeConfig(Strict):
    """Parameters that do not train, or not yet. ``match``: globs of their names, such as ``vision_encoder.*``."""

    match: Annotated[tuple[str, ...], Field(min_length=1)]
    until: Positive | None = None
    """The epoch (from 0) at whose start they begin to train; None: never."""


class RateConfig(Strict):
    """Parameters with a learning rate of their own: ``scale`` times the schedule's. The first match counts."""

    match: Annotated[tuple[str, ...], Field(min_length=1)]
    scale: Annotated[float, Field(gt=0)]


ONE_SCHEDULE = ("epochs", "lr", "warmup_lr", "min_lr", "warmup_epochs")
"""Keys of ``train`` that phases take the place of."""


class TrainConfig(Strict):
    """The engine's settings. ``batch_size`` is global: ranks and accumulation divide it."""

    epochs: Positive = 50
    batch_size: Positive = 64
    accumulate: Positive = 1
    lr: Annotated[float, Field(gt=0)] = 1e-3
    warmup_lr: Rate = 1e-6
    min_lr: Rate = 1e-5
    lr_batch: Positive | None = 512
    """Rates are scaled by batch_size / lr_batch; None leaves them."""
    warmup_epochs: Annotated[float, Field(ge=0, lt=2**31)] = 5.0
    weight_decay: Rate = 0.01
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    eps: Annotated[float, Field(gt=0)] = 1e-8
    clip_norm: Annotated[float, Field(gt=0)] | None = 5.0
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    ema: Decay = 0.0
    """Decay of the weight average; 0 turns it off."""
    batch_norm: Literal["batch", "frozen"] = "batch"
    """Statistics that batch norms normalise with while training. batch: those of the micro-batch, which is too small a
    sample below about 8 images. frozen: the ones that the student starts with; layers without any are measured once."""
    sync_bn: bool = True
    """With ``batch_norm: batch``, one micro-batch is what all processes compute together."""
    compile: bool = False
    seed: Seed = 0
    keep: Positive = 3
    """Epoch checkpoints kept; the last one always is."""
    log_every: Positive = 10
    freeze: tuple[FreezeConfig, ...] = ()
    rates: tuple[RateConfig, ...] = ()
    phases: Annotated[tuple[PhaseConfig, ...], Field(min_length=1)] | None = None
    """Phases one after the other, in place of ``epochs`` and the rates; None makes one phase of those."""

    @model_validator(mode="after")
    def _phases_differ(self) -> TrainConfig:
        names = [phase.name for phase in self.phases or ()]
        if len(set(names)) < len(names):
            raise ValueError(f"two phases have the same name: {', '.join(names)}")
        return self

    @model_validator(mode="after")
    def _phases_or_one_schedule(self) -> TrainConfig:
        """A resolved config names every key, so a default beside phases says nothing and is no contradiction."""
        defaults = {name: TrainConfig.model_fields[name].default for name in ONE_SCHEDULE}
        given = [name for name in ONE_SCHEDULE if getattr(self, name) != defaults[name]]
        if self.phases is not None and given:
            keys = ", ".join(f"train.{name}" for name in given)
            raise ValueError(
                f"train.phases and {keys} contradict: each phase has epochs and rates of its own; "
                "set them there, or train.phases: null"
            )
        return self

    @property
    def total_epochs(self) -> int:
        return self.epochs if self.phases is None else sum(phase.epochs for phase in self.phases)

    def phase_at(self, epoch: int) -> PhaseConfig | None:
        """The phase that epoch ``epoch`` (from 0) belongs to; None where there are none."""
        for phase in self.phases or ():
            if epoch < phase.epochs:
                return phase
            epoch -= phase.epochs
        return self.phases[-1] if self.phases else None

    def phase_starts(self) -> list[tuple[str, int]]:
        """Name and first epoch of each phase; one without a name where there are none."""
        found, start = [], 0
        for phase in self.phases or ():
            found.append((phase.name, start))
            start += phase.epochs
        return found or [("", 0)]


class Run(Strict):
    """What the configuration of every job has: also ``job``, a literal, and ``loss``, its terms' weights."""

    if TYPE_CHECKING:  # declared in each job's class, for pydantic keeps the order of the keys
        job: str
    output: Path
    data: DataConfig
    train: TrainConfig

    @model_validator(mode="after")
    def _phases_name_terms(self) -> Run:
        for phase in self.train.phases or ():
            for term in phase.terms or ():
                if term not in self.term_names():
                    known = did_you_mean(term, list(self.term_names()))
                    raise ValueError(f"train.phases: phase {phase.name!r} asks for an unknown term {term!r}{known}")
        return self

    @classmethod
    def term_names(cls) -> tuple[str, ...]:
        """Names of the job's loss terms."""
        loss: type[LossConfig] = cls.model_fields["loss"].annotation  # type: ignore[assignment]
        return loss.term_names()

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


class EvaluateConfig(Strict):
    prompts: tuple[Literal["box", "point", "refine", "refine2"], ...] = ("box", "point", "refine")
    images: Positive | None = None
    """At most this many held-out images; None takes all."""
    batch_size: Positive = 4
