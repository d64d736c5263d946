"""Typed, strict run configurations: YAML with ``extends``, ``key=value`` overrides, packaged recipes by name."""

from __future__ import annotations

import re
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from .errors import UserError
from .registry import did_you_mean

Fraction = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[int, Field(gt=0)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


class TeacherConfig(_Strict):
    """What gives the signal. ``path``: a Hugging Face folder or hub id, an original ``sam3.pt``, or ``sandbox``."""

    kind: str = "sam3"
    path: str
    image_size: Positive | None = None
    """Side of the square input in pixels; None takes the checkpoint's own."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"


class StudentConfig(_Strict):
    """The trunk that replaces the teacher's ViT. ``backbone`` is a student's name (es_rv_m) or any timm model."""

    backbone: str
    head: Literal["published", "fused"] = "fused"
    pretrained: bool | Path = False
    """True downloads timm's ImageNet weights; a path reads them from a file."""


class AugmentConfig(_Strict):
    """Seeded augmentations, drawn per view. All off by default."""

    flip: Fraction = 0.0
    crop_scale: tuple[Fraction, Fraction] | None = None
    """Area range of a resized crop, as in torchvision's RandomResizedCrop."""
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    brightness: Fraction = 0.0
    contrast: Fraction = 0.0
    saturation: Fraction = 0.0
    hue: Annotated[float, Field(ge=0, le=0.5)] = 0.0


class DataConfig(_Strict):
    """Where images come from and how they are laid on the model's canvas."""

    kind: str = "sa1b"
    root: Path
    split: str = "train"
    held_out: str | None = "val"
    """Split for evaluation. A plain folder has none: ``held_out_fraction`` of its images are set aside by key."""
    held_out_fraction: Fraction = 0.1
    fraction: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Reproducible share of the images, chosen by a hash of the key: 1 % lies inside 5 % lies inside 10 %."""
    ids: Path | None = None
    """A text file with one image key a line, in place of ``fraction``."""
    geometry: Literal["square", "longest_side"] = "square"
    augment: AugmentConfig = AugmentConfig()
    views: Positive = 1
    """Augmented views cached per image; epoch e trains on view e mod views."""
    seed: int = 0
    workers: Annotated[int, Field(ge=0)] = 2

    @model_validator(mode="after")
    def _one_subset(self) -> DataConfig:
        if self.ids is not None and self.fraction != 1.0:
            raise ValueError("give 'ids' or 'fraction', not both")
        return self


class CacheConfig(_Strict):
    """The feature store. ``root`` None puts it into the run folder under ``embeddings/``."""

    root: Path | None = None
    codec: Annotated[str, Field(pattern=r"^(fp16|int8|pca[1-9]\d*-int8)$")] = "fp16"
    batch_size: Positive = 4
    verify_records: Positive = 8


class TrainConfig(_Strict):
    """The engine's settings. ``batch_size`` is global: ranks and accumulation divide it."""

    epochs: Positive = 50
    batch_size: Positive = 64
    accumulate: Positive = 1
    lr: float = 1e-3
    warmup_lr: float = 1e-6
    min_lr: float = 1e-5
    lr_batch: Positive | None = 512
    """Rates are scaled by batch_size / lr_batch; None leaves them."""
    warmup_epochs: Annotated[float, Field(ge=0)] = 5.0
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    clip_norm: Annotated[float, Field(gt=0)] | None = 5.0
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    ema: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Decay of the weight average; 0 turns it off."""
    sync_bn: bool = True
    compile: bool = False
    seed: int = 0
    keep: Positive = 3
    """Epoch checkpoints kept; the last one always is."""
    log_every: Positive = 10


class EncoderLossConfig(_Strict):
    """Weights of the two terms of encoder distillation."""

    mse: Annotated[float, Field(ge=0)] = 1.0
    cosine: Annotated[float, Field(ge=0)] = 1.0


class EvaluateConfig(_Strict):
    prompts: tuple[Literal["box", "point", "refine"], ...] = ("box", "point", "refine")
    images: Positive | None = None
    """At most this many held-out images; None takes all."""
    batch_size: Positive = 4


class RunConfig(_Strict):
    """One run: everything needed to repeat it. Written resolved into the run folder."""

    job: Literal["encoder"] = "encoder"
    output: Path = Path("runs/encoder")
    teacher: TeacherConfig
    student: StudentConfig
    data: DataConfig
    cache: CacheConfig = CacheConfig()
    loss: EncoderLossConfig = EncoderLossConfig()
    train: TrainConfig = TrainConfig()
    evaluate: EvaluateConfig = EvaluateConfig()

    @property
    def store_root(self) -> Path:
        return self.cache.root if self.cache.root is not None else self.output / "embeddings"

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


class _Loader(yaml.SafeLoader):
    """YAML 1.2 floats: PyYAML reads ``1e-4`` as a string (it wants ``1.0e-4``)."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)([eE][-+]?\d+)?$|^[-+]?\.(inf|Inf|INF)$|^\.(nan|NaN|NAN)$"),
    list("-+0123456789."),
)


def packaged() -> list[str]:
    """Names of the recipes that ship with the package, such as ``encoder/es_rv_m``."""
    root = files("samdistill") / "configs"
    return sorted(f"{job.name}/{f.name[:-5]}" for job in root.iterdir() if job.is_dir()
                  for f in job.iterdir() if f.name.endswith(".yaml") and not f.name.startswith("_"))  # fmt: skip


def _find(name: str, beside: Path | None = None) -> Path:
    candidates = [Path(name)] if beside is None else [beside / name, beside / f"{name}.yaml"]
    candidates.append(Path(str(files("samdistill") / "configs")) / f"{name}.yaml")
    for path in candidates:
        if path.is_file():
            return path
    raise UserError(f"no config {name!r}, neither a file nor a packaged recipe{did_you_mean(name, packaged())}")


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        old = merged.get(key)
        merged[key] = _merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged


def _read(path: Path, seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    if path.resolve() in seen:
        raise UserError(f"{path}: 'extends' goes round in a circle")
    try:
        raw = yaml.load(path.read_text(), _Loader) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not readable as YAML: {' '.join(str(error).split())}") from None
    if not isinstance(raw, dict):
        raise UserError(f"{path}: a config is a mapping of keys to values")
    parent = raw.pop("extends", None)
    if parent is None:
        return raw
    return _merge(_read(_find(str(parent), path.parent), (*seen, path.resolve())), raw)


def _override(raw: dict[str, Any], text: str) -> dict[str, Any]:
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise UserError(f"override {text!r}: write key=value, such as train.lr=3e-4")
    try:
        nested: Any = yaml.load(value, _Loader)
    except yaml.YAMLError as error:
        raise UserError(f"override {text!r}: not readable as YAML: {' '.join(str(error).split())}") from None
    for part in reversed(key.split(".")):
        nested = {part: nested}
    return _merge(raw, nested)


def _field_names(path: Sequence[int | str]) -> list[str]:
    """The keys that exist where an unknown one was given."""
    model: type[BaseModel] = RunConfig
    for part in path:
        annotation = model.model_fields[str(part)].annotation
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            return []
        model = annotation
    return list(model.model_fields)


def validate(raw: dict[str, Any], origin: str) -> RunConfig:
    """A checked config, or a ``UserError`` with origin, key, problem and suggestion, one line per problem."""
    try:
        return RunConfig.model_validate(raw)
    except ValidationError as error:
        lines = []
        for problem in error.errors():
            where = ".".join(str(p) for p in problem["loc"])
            if problem["type"] == "extra_forbidden":
                *parents, last = problem["loc"]
                lines.append(f"{origin}: unknown key {where!r}{did_you_mean(str(last), _field_names(parents))}")
            else:
                given = f" (given: {problem['input']!r})" if problem["type"] != "missing" else ""
                lines.append(f"{origin}: {where or 'config'}: {problem['msg']}{given}")
        raise UserError("\n".join(lines)) from None


def load_config(name: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read ``name`` (a path, or a packaged recipe), follow ``extends``, apply ``key=value`` overrides, validate."""
    path = _find(str(name))
    raw = _read(path)
    for text in overrides:
        raw = _override(raw, text)
    return validate(raw, str(name))
