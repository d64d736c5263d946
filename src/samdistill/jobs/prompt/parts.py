"""Parts of a prompt run: student, teachers or their cache, and prompted objects."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path

import torch

from ...checkpoints.promptable import load_promptable
from ...data import ImageDataset, ObjectDataset, image_loader, prompts_fingerprint, record_key
from ...data.fingerprints import fingerprints
from ...data.sources import evenly
from ...dist import default_device, process_rank
from ...engine.frozen_norm import batch_norms
from ...ops.pca import Projection
from ...ops.promptable import Promptable, embedding_grid, image_size
from ...store import FeatureStore, StoreSpec
from ...store.changes import refuse_changed
from ...store.spec import MANIFEST, Manifest
from ...students.promptable import build_promptable
from ...teachers import Ensemble, PromptTeacher, fit_projection, shares
from ...teachers.stored_signals import DENSE, FEATURE_OF, Shape, StoredSignals, record_shapes
from ...types import ImageBatch, UserError
from ..caching import left_out_of, refuse_missing, wait_for
from ..images import Images
from .config import PromptRunConfig
from .task import PromptTask, PromptTeachers

PATCH_CHANNELS = 256
"""Channels of projected patch features, as published. A teacher with fewer channels keeps its number."""
FEATURES = ("encoder_patch", "prompt_embed", "mask_token", DENSE)


@dataclass(frozen=True)
class PromptStudentInfo:
    """Description of the student.

    Attributes:
        name: Checkpoint that it starts from, or its backbone.
        parts: Parameters by module.
        image_size: Side of the input in pixels.
        grid: Rows and columns of the image embedding.
        batch_norms: Number of batch norm layers.
        outline: The model without values, on the meta device.
    """

    name: str
    parts: dict[str, int]
    image_size: int
    grid: tuple[int, int]
    batch_norms: int
    outline: Promptable

    @classmethod
    def of(cls, name: str, model: Promptable) -> PromptStudentInfo:
        with torch.device("meta"):  # `to` would separate parameters that modules share
            outline = type(model)(model.config)
        return cls(name, _parts(model), image_size(model), embedding_grid(model), batch_norms(model), outline)


class PromptParts(Images[PromptRunConfig]):
    """Parts of a prompt run. Each is built on first access."""

    @cached_property
    def student(self) -> PromptStudentInfo:
        """Description of the student. Weights are read only if it starts from a checkpoint, and are not kept."""
        settings = self.config.student
        if settings.start is not None:
            return PromptStudentInfo.of(str(settings.start), load_promptable(settings.start))
        with torch.device("meta"):
            outline = build_promptable(settings.model_copy(update={"pretrained": False}))
        return PromptStudentInfo.of(settings.backbone, outline)

    @property
    def image_size(self) -> int:
        """Side of the student's canvas, on which prompts are given."""
        return self.student.image_size

    def objects(self, view: int, keys: Sequence[str] | None = None) -> ObjectDataset:
        """Return view ``view`` of all training images, or of ``keys``, with prompted objects."""
        data, source = self.config.data, self.train_source
        wanted = source.keys if keys is None else keys
        return ObjectDataset(source, self.transform, self.config.prompts, wanted, data.seed, view)

    @cached_property
    def cached_keys(self) -> list[str]:
        """Keys of the training images without those that the cache skipped."""
        skipped = left_out_of(self.split_root, self.train_source)
        return [key for key in self.train_source.keys if key not in skipped]

    def held_out(self) -> ObjectDataset | None:
        """Return held-out images with one draw of prompts. None without annotations."""
        source, prompts = self.held_out_source(), self.config.prompts.model_copy(update={"candidates": 1})
        if not source.labelled:
            return None
        return ObjectDataset(source, self.transform, prompts, source.keys, self.config.data.seed)

    def source_fingerprints(self, keys: Sequence[str]) -> dict[str, str]:
        """Return the fingerprint of image and annotation, from which prompts are drawn, of each record of ``keys``."""
        found = fingerprints(partial(self.train_source.fingerprint, labels=True), keys)
        return {record_key(key, view): found[key] for view in range(self.config.data.views) for key in keys}

    def task(self, device: torch.device | str | None = None) -> PromptTask:
        """Return the task on all training images.

        With running teachers, every epoch has another view. With a cache, epochs use its views in turn.

        Args:
            device: Device on which a missing projection is fitted; None for the default device.
        """
        signals = self.signals(device if device is not None else default_device())
        cached = self.config.cached
        views = self.config.data.views if cached else self.config.train.total_epochs
        keys = self.cached_keys if cached else None
        return PromptTask(self.config, signals, lambda epoch: self.objects(epoch % views, keys), self.held_out())

    def signals(self, device: torch.device | str) -> PromptTeachers | None:
        """Return the running teachers or their cache, or None without distillation.

        With a cache, rank 0 loads the teachers once to check that they are those of the config.
        """
        if not self.config.distilled:
            return None
        if not self.config.cached:
            return self.ensemble(device)
        stores = {name: self.open_stores(name) for name in self.weights}
        self._refuse_incomplete(stores)
        if process_rank() == 0:
            refuse_changed(self.split_root, self.source_fingerprints(self.cached_keys))
            for entry in self.config.teachers:
                if entry.name in self.weights:
                    self.prove(PromptTeacher(entry), stores[entry.name])
        data = self.config.data
        return StoredSignals(stores, self.weights, self.config.distilled, data.seed, data.views)

    @cached_property
    def weights(self) -> dict[str, float]:
        """Weights of the teachers that have one, which sum to 1."""
        return shares(self.config.teachers)

    def load_teachers(self, device: torch.device | str) -> Ensemble:
        """Load the teachers that have a weight, without projections."""
        _ = self.weights  # checks the weights before anything is loaded
        return Ensemble.load(self.config.teachers, device)

    def ensemble(self, device: torch.device | str) -> Ensemble:
        """Load the teachers that have a weight, with projections."""
        ensemble = self.load_teachers(device)
        for teacher in ensemble.teachers.values():
            self.set_projection(teacher, process_rank())
        return ensemble

    def set_projection(self, teacher: PromptTeacher, rank: int) -> None:
        """Set the projection of a teacher's patch features. Rank 0 fits and saves it if there is none."""
        path, fingerprint = self.projection_path(teacher.name), self._projection_fingerprint(teacher)
        if rank == 0 and not path.is_file():
            projection = fit_projection(teacher, self._sample(), PATCH_CHANNELS, self._standardise)
            projection.save(path, fingerprint)
        wait_for(lambda: path if path.is_file() else None, path.parent, f"projection for {teacher.name}")
        teacher.projection = Projection.load(path, fingerprint).to(teacher.device)

    def projection_path(self, teacher: str) -> Path:
        """Return the path of a teacher's projection, in the cache or in the run folder."""
        cached = self.config.distillation.use_precomputed_features
        root = self.config.feature_root if cached else self.config.output
        return root / "projections" / f"{teacher}.safetensors"

    @property
    def _standardise(self) -> bool:
        wanted = self.config.distillation.standardise
        return len(self.weights) > 1 if wanted is None else wanted

    def _projection_fingerprint(self, teacher: PromptTeacher) -> str:
        """Return a digest of the teacher and the settings of the projection. It does not depend on the images."""
        about = f"{teacher.fingerprint} {PATCH_CHANNELS} {self._standardise}"
        return hashlib.sha256(about.encode()).hexdigest()

    def _sample(self) -> Iterator[ImageBatch]:
        """Return training images, spread evenly over the data set."""
        data, source = self.config.data, self.train_source
        keys = evenly(source.keys, self.config.distillation.sample)
        images = ImageDataset(source, self.transform, keys, data.seed)
        return (batch for batch, _ in image_loader(images, self.config.cache.batch_size) if batch is not None)

    @property
    def split_root(self) -> Path:
        """Folder of the cache of one split. Its subfolders ``TEACHER/FEATURE`` are feature stores."""
        return self.config.feature_root / self.config.data.split

    def record_shapes(self, teacher: PromptTeacher) -> dict[str, Shape]:
        """Return the shape of one image's record of each feature."""
        objects, dense = self.config.prompts.objects, self.config.cache.dense
        return record_shapes(teacher.projected.channels, teacher.width, teacher.grid, objects, dense)

    def store_spec(self, teacher: PromptTeacher, feature: str, shape: Shape) -> StoreSpec:
        """Return the specification of a store, which identifies the teacher, its projection, views and prompts."""
        return StoreSpec(
            tap=feature, shape=shape, image_size=self.image_size,
            teacher=f"{teacher.fingerprint[:32]}-{projection_digest(teacher.projected)}",
            transform=self._asked, codec=self.config.cache.codec,
        )  # fmt: skip

    @property
    def _asked(self) -> str:
        """Fingerprint of views and prompts."""
        return f"{self.transform.fingerprint}-{prompts_fingerprint(self.config.prompts, self.config.data.seed)}"

    def open_stores(self, teacher: str) -> dict[str, FeatureStore]:
        """Open a teacher's stores, by feature, without reading weights.

        Raises:
            UserError: There are none, or they have other prompts, views, image sizes or another codec.
        """
        root, found = self.split_root / teacher, dict[str, FeatureStore]()
        for feature in FEATURES:
            if (root / feature / MANIFEST).is_file():
                stored = Manifest.load(root / feature).spec
                self.refuse_other_prompts(root / feature)
                wanted = replace(stored, image_size=self.image_size, codec=self.config.cache.codec)
                found[feature] = FeatureStore(root / feature, wanted)
        if "prompt_embed" not in found:
            raise UserError(f"{root}: no cached features here; run `samdistill cache` with this config first")
        return found

    def refuse_other_prompts(self, root: Path) -> None:
        """Raise ``UserError`` if the store at ``root`` has other views or prompts than this config."""
        views, prompts = Manifest.load(root).spec.transform.partition("-")[::2]
        wanted_views, wanted_prompts = self._asked.partition("-")[::2]
        if views != wanted_views:
            what, keys = "views of the images", "data.geometry, data.augment and the student's image_size"
        elif prompts != wanted_prompts:
            what, keys = "prompts", "the block prompts and data.seed"
        else:
            return
        raise UserError(f"{root}: this cache was made with other {what}: set {keys} as they were, {ELSEWHERE}")

    def refuse_other_teacher(self, teacher: PromptTeacher, root: Path) -> None:
        """Raise ``UserError`` if the store at ``root`` was made by another model than ``teacher``."""
        stored = Manifest.load(root).spec.teacher.partition("-")[0]
        if stored != teacher.fingerprint[:32]:
            raise UserError(
                f"{root}: this cache is of another teacher than {teacher.name!r} is now (weights, image size or "
                f"precision): set teachers as they were, {ELSEWHERE}"
            )

    def prove(self, teacher: PromptTeacher, stores: dict[str, FeatureStore]) -> None:
        """Raise ``UserError`` unless the stores were made by this teacher with the saved projection."""
        for store in stores.values():
            self.refuse_other_teacher(teacher, store.root)
        teacher.projection = Projection.load(self.projection_path(teacher.name), self._projection_fingerprint(teacher))
        shapes = self.record_shapes(teacher)
        for feature, store in stores.items():
            if feature in shapes:
                spec = self.store_spec(teacher, feature, shapes[feature])
                Manifest.load(store.root).require(store.root, spec)

    def _refuse_incomplete(self, stores: dict[str, dict[str, FeatureStore]]) -> None:
        """Raise ``UserError`` if a view is neither cached nor listed as skipped, for a teacher and feature in use."""
        names = [record_key(key, view) for view in range(self.config.data.views) for key in self.cached_keys]
        wanted = {FEATURE_OF[term] for term in self.config.distilled}
        for store in (store for features in stores.values() for name, store in features.items() if name in wanted):
            refuse_missing(store.root, [name for name in names if name not in store], len(names))


ELSEWHERE = "give distillation.precomputed_root another folder, or delete this one to cache again"


def projection_digest(projection: Projection) -> str:
    """Return 16 hex digits of a digest of all numbers of a projection."""
    digest = hashlib.sha256(repr(projection.scale).encode())
    for tensor in (projection.mean, projection.basis):
        digest.update(f"{tuple(tensor.shape)}".encode())
        digest.update(tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def _parts(model: torch.nn.Module) -> dict[str, int]:
    """Return the number of parameters by module. Shared parameters count in the first one."""
    found: dict[str, int] = {}
    for name, parameter in model.named_parameters():  # yields shared parameters once
        part = name.partition(".")[0]
        found[part] = found.get(part, 0) + parameter.numel()
    return found
