"""Configuration blocks that jobs share: strict, typed and frozen."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    field_validator,
    model_validator,
)

from ..names import key_problem
from ..reading import printable
from ..registry import CODECS, HEADS, Registry, did_you_mean

Fraction = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[int, Field(gt=0, lt=2**31)]
Count = Annotated[int, Field(ge=0, lt=2**31)]
"""A number of things; 0 is allowed."""
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Pixels = Annotated[int, Field(gt=0, le=16384)]
"""Side of a square input in pixels."""
Rate = Annotated[float, Field(ge=0)]
Weight = Annotated[float, Field(ge=0)]
Ratio = Annotated[float, Field(gt=0, le=1000)]
Decay = Annotated[float, Field(ge=0, lt=1)]


def _is_name(value: str) -> str:
    """Check that a name is also the name of a folder: one path component that stays in its parent folder."""
    if (problem := key_problem(value)) is not None or "/" in value:
        raise ValueError(f"names a folder, so {problem or 'it cannot hold a slash'}")
    return value


Name = Annotated[str, AfterValidator(_is_name)]


def registered(registry: Registry[Any], *others: str) -> Callable[[str], str]:
    """Return a validator that accepts the names in ``registry``, and ``others``."""

    def check(value: str) -> str:
        if value not in (names := [*registry.names(), *others]):
            raise ValueError(f"no {registry.kind} is called {value!r}{did_you_mean(value, names)}")
        return value

    return check


def _codec(value: str) -> str:
    """Check the name of a codec. ``pca256-int8`` is an instance of ``pca{K}-int8``."""
    registered(CODECS)(re.sub(r"^pca[1-9]\d*-", "pca{K}-", value))
    return value


class Strict(BaseModel):
    """Base class of blocks. Unknown keys are errors.

    In paths, and in text that starts with it, ``~`` is the home folder. Text must be encodable as UTF-8, and not empty.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _some_text(cls, value: Any) -> Any:
        if isinstance(value, str) and not value.strip():  # as a path, "" would be the current folder
            raise ValueError("is empty; give a value, or leave the key out")
        return value

    @field_validator("*", mode="after")
    @classmethod
    def _usable_text(cls, value: Any) -> Any:
        if isinstance(value, Path | str) and (str(value) != printable(str(value)) or "\0" in str(value)):
            raise ValueError("contains characters that are not allowed in file names and text")
        if isinstance(value, Path | str) and str(value).startswith("~"):
            return type(value)(os.path.expanduser(value))
        return value


class TeacherConfig(Strict):
    """The teacher. ``path`` is a Hugging Face folder or hub id, an original ``sam3.pt``, or ``sandbox``."""

    kind: str = "sam3"
    path: str
    image_size: Pixels | None = None
    """Side of the square input in pixels. None uses the checkpoint's."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    tokenizer: Path | None = None
    """Folder or file of the tokenizer, for jobs with text prompts. None uses the one beside the checkpoint."""


class StudentConfig(Strict):
    """The trunk that replaces the teacher's ViT. ``backbone`` is a student's name (``es_rv_m``) or any timm model."""

    backbone: str
    head: Annotated[str, AfterValidator(registered(HEADS))] = "fused"
    pretrained: bool | Path = False  # True downloads timm's ImageNet weights; a path reads them from a file
    host_statistics: bool = False  # images are normalised as for the teacher, not with timm's statistics


class AugmentConfig(Strict):
    """Random augmentations, drawn per view from a seed. All are off by default."""

    flip: Fraction = 0.0
    crop_scale: tuple[Fraction, Fraction] | None = None
    """Range of the crop's area as a share of the image, as in torchvision's RandomResizedCrop."""
    crop_ratio: tuple[Ratio, Ratio] = (3 / 4, 4 / 3)
    brightness: Fraction = 0.0
    contrast: Fraction = 0.0
    saturation: Fraction = 0.0
    hue: Annotated[float, Field(ge=0, le=0.5)] = 0.0


class DataConfig(Strict):
    """The data set, its split into training and held-out images, and the placement of images on the model's canvas."""

    kind: str = "sa1b"
    root: Path
    split: Name = "train"
    held_out: Name | None = "val"
    """Split for evaluation. If None, or without splits, ``held_out_fraction`` of the images is held out by key."""
    held_out_fraction: Fraction = 0.1
    held_out_last: Positive | None = None
    """Holds out this number of the last keys, instead of a split or a fraction."""
    fraction: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of the images, chosen by a hash of the key. Smaller shares are subsets of larger ones."""
    ids: Path | None = None
    """Text file with one image key per line, instead of ``fraction``."""
    shards: Path | None = None
    """List of links, such as ``sa-1b-10p.txt``, that names the tar shards of SA-1B to use. None uses all."""
    index: Path | None = None
    """Folder for the index of SA-1B's tar shards. None is ``.samdistill-index`` beside the shards."""
    geometry: Literal["square", "longest_side"] = "square"
    augment: AugmentConfig = AugmentConfig()
    views: Positive = 1
    """Augmented views cached per image. Epoch e trains on view e mod views."""
    seed: Seed = 0
    workers: Annotated[int, Field(ge=0, le=1024)] = 2

    @model_validator(mode="after")
    def _one_subset(self) -> DataConfig:
        if self.ids is not None and self.fraction != 1.0:
            raise ValueError("give 'ids' or 'fraction', not both")
        return self

    @model_validator(mode="after")
    def _shards_of_sa1b(self) -> DataConfig:
        for name in ("shards", "index"):
            if self.kind != "sa1b" and getattr(self, name) is not None:
                raise ValueError(f"'{name}' is for the tar shards of kind 'sa1b'; leave it out for {self.kind!r}")
        return self


class CacheConfig(Strict):
    """The feature store. ``root`` None is a folder in the run: ``embeddings/``, or ``features/`` of the other jobs."""

    mode: Literal["stored", "online"] = "stored"
    """stored: training reads what ``samdistill cache`` wrote. online: the teacher runs while the student trains."""
    root: Path | None = None
    codec: Annotated[str, AfterValidator(_codec)] = "fp16"
    batch_size: Positive = 4
    verify_records: Positive = 8


class PhaseConfig(Strict):
    """A training phase with its own schedule: linear warm-up, then cosine decay to ``min_lr``."""

    name: str
    epochs: Positive
    lr: Annotated[float, Field(gt=0)]
    warmup_steps: Count = 0
    warmup_lr: Rate = 0.0
    min_lr: Rate = 0.0
    terms: Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    """Loss terms that are trained in this phase. None uses all."""


class FreezeConfig(Strict):
    """Frozen parameters. ``match`` has globs of their names, such as ``vision_encoder.*``."""

    match: Annotated[tuple[str, ...], Field(min_length=1)]
    until: Positive | None = None
    """Epoch, from 0, at whose start they are unfrozen. None keeps them frozen."""


class RateConfig(Strict):
    """Parameters with another learning rate, ``scale`` times the schedule's. The first matching entry applies."""

    match: Annotated[tuple[str, ...], Field(min_length=1)]
    scale: Annotated[float, Field(gt=0)]


ONE_SCHEDULE = ("epochs", "lr", "warmup_lr", "min_lr", "warmup_epochs")
"""Keys of ``train`` that ``phases`` replaces."""


def _step(given: Any) -> Any:
    """Return the step that ``true`` and ``false`` stand for: the first one and none."""
    return (0 if given else None) if isinstance(given, bool) else given


class TrainConfig(Strict):
    """Settings of the training. ``batch_size`` is global: processes and accumulation divide it."""

    epochs: Positive = 50
    batch_size: Positive = 64
    accumulate: Positive = 1
    lr: Annotated[float, Field(gt=0)] = 1e-3
    warmup_lr: Rate = 1e-6
    min_lr: Rate = 1e-5
    lr_batch: Positive | None = 512
    """The rates are scaled by batch_size / lr_batch. None does not scale them."""
    warmup_epochs: Annotated[float, Field(ge=0, lt=2**31)] = 5.0
    weight_decay: Rate = 0.01
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    eps: Annotated[float, Field(gt=0)] = 1e-8
    clip_norm: Annotated[float, Field(gt=0)] | None = 5.0
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    ema: Decay = 0.0
    """Decay of the exponential moving average of the weights. 0 disables it."""
    batch_norm: Literal["batch", "frozen"] = "batch"
    """Statistics of batch norms in training. ``batch``: those of the micro-batch, which are too noisy below about 8
    images. ``frozen``: the student's initial ones. Layers without any are measured once.
    """
    sync_bn: bool = True
    """With ``batch_norm: batch``, compute the statistics over the micro-batches of all processes."""
    compile: bool = False
    qat: Annotated[Count | None, BeforeValidator(_step)] = None
    """Step, from 0, from which the student computes with the roundings of an int8 export. True is 0."""
    seed: Seed = 0
    keep: Positive = 3
    """Number of epoch checkpoints to keep. The last one is always kept."""
    log_every: Positive = 10
    freeze: tuple[FreezeConfig, ...] = ()
    rates: tuple[RateConfig, ...] = ()
    phases: Annotated[tuple[PhaseConfig, ...], Field(min_length=1)] | None = None
    """Consecutive phases, instead of ``epochs`` and the rates. None trains one phase with those."""

    @model_validator(mode="after")
    def _consistent(self) -> TrainConfig:
        if self.qat is not None and self.compile:
            raise ValueError("train.qat and train.compile exclude each other; leave one out")
        names = [phase.name for phase in self.phases or ()]
        if len(set(names)) < len(names):
            raise ValueError(f"two phases have the same name: {', '.join(names)}")
        return self

    @model_validator(mode="after")
    def _phases_or_one_schedule(self) -> TrainConfig:
        """Refuse phases together with a schedule. Defaults are allowed, since a resolved config contains every key."""
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
        """Number of epochs, summed over the phases if there are any."""
        return self.epochs if self.phases is None else sum(phase.epochs for phase in self.phases)

    def phase_at(self, epoch: int) -> PhaseConfig | None:
        """Return the phase of an epoch (from 0), or None without phases."""
        for phase in self.phases or ():
            if epoch < phase.epochs:
                return phase
            epoch -= phase.epochs
        return self.phases[-1] if self.phases else None

    def phase_starts(self) -> list[tuple[str, int]]:
        """Return name and first epoch of each phase. Without phases there is one with an empty name."""
        found, start = [], 0
        for phase in self.phases or ():
            found.append((phase.name, start))
            start += phase.epochs
        return found or [("", 0)]


class Run(Strict):
    """Base of every job's configuration. Jobs add ``job``, a literal, and ``loss``, the weights of their terms."""

    if TYPE_CHECKING:  # each job's class declares it, because pydantic keeps the order of declaration
        job: str
    output: Path
    data: DataConfig
    train: TrainConfig

    @model_validator(mode="after")
    def _phases_name_terms(self) -> Run:
        for phase in self.train.phases or ():
            known, where, own = self.term_names(), f"train.phases: phase {phase.name!r}", self.loss.term_names()
            for term in phase.terms or ():
                if term not in known:
                    raise ValueError(f"{where} has the unknown term {term!r}{did_you_mean(term, list(known))}")
            if phase.terms and not any(term not in own or self.loss.weight(term) for term in phase.terms):
                raise ValueError(f"{where} has no term with a weight; set loss.{phase.terms[0]} above 0")
        return self

    @classmethod
    def term_names(cls) -> tuple[str, ...]:
        """Return the names of the job's loss terms."""
        return cls.model_fields["loss"].annotation.term_names()  # type: ignore[union-attr]

    def to_yaml(self) -> str:
        """Return the config as YAML with every key."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


class CachedRun(Run):
    """The configuration of a job whose teacher's maps can be cached, or computed while the student trains."""

    if TYPE_CHECKING:
        cache: CacheConfig
    FOLDER: ClassVar[str] = "features"
    """Of the cache, in the run folder."""

    @property
    def store_root(self) -> Path:
        return self.cache.root if self.cache.root is not None else self.output / self.FOLDER

    @property
    def online(self) -> bool:
        """Whether the teacher runs while the student trains."""
        return self.cache.mode == "online"

    def run_online(self) -> Self:
        """The same run without a cache: what ``check`` looks at where nothing is cached yet."""
        return self.model_copy(update={"cache": self.cache.model_copy(update={"mode": "online"})})


class EvaluateConfig(Strict):
    """Evaluation on held-out images after training."""

    prompts: tuple[Literal["box", "point", "refine", "refine2"], ...] = ("box", "point", "refine")
    images: Positive | None = None
    """Largest number of held-out images. None uses all."""
    batch_size: Positive = 4
