"""The prompt job's parts: student, several teachers or their cache, and the prompted objects of every epoch."""

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
"""Channels that a teacher's patch features are brought to, as published; fewer where the teacher has fewer."""
FEATURES = ("encoder_patch", "prompt_embed", "mask_token", DENSE)


@dataclass(frozen=True)
class PromptStudentInfo:
    """name: where it starts, or its backbone. parts: parameters by module. grid: of its image embedding. batch_norms:
    layers of batch norm."""

    name: str
    parts: dict[str, int]
    image_size: int
    grid: tuple[int, int]
    batch_norms: int

    @classmethod
    def of(cls, name: str, model: Promptable) -> PromptStudentInfo:
        return cls(name, _parts(model), image_size(model), embedding_grid(model), batch_norms(model))


class PromptParts(Images[PromptRunConfig]):
    """Lazily built parts of one prompt run; cheap until a part that reads data or weights is asked for."""

    @cached_property
    def student(self) -> PromptStudentInfo:
        """Sizes of the student. Without a start no weights are read; with one, they are let go of."""
        settings = self.config.student
        if settings.start is not None:
            return PromptStudentInfo.of(str(settings.start), load_promptable(settings.start))
        with torch.device("meta"):
            outline = build_promptable(settings.model_copy(update={"pretrained": False}))
        return PromptStudentInfo.of(settings.backbone, outline)

    @property
    def image_size(self) -> int:
        """Of the student: its canvas is the one that prompts are counted on."""
        return self.student.image_size

    def objects(self, view: int, keys: Sequence[str] | None = None) -> ObjectDataset:
        """View ``view`` of the training images (all of them, or ``keys``) and what is asked about them."""
        data, source = self.config.data, self.train_source
        wanted = source.keys if keys is None else keys
        return ObjectDataset(source, self.transform, self.config.prompts, wanted, data.seed, view)

    @cached_property
    def cached_keys(self) -> list[str]:
        """The training images of a run that reads the cache: those that the cache did not leave out."""
        skipped = left_out_of(self.split_root, self.train_source)
        return [key for key in self.train_source.keys if key not in skipped]

    def held_out(self) -> ObjectDataset | None:
        """One draw of prompts about the held-out images; None without annotations."""
        source, prompts = self.held_out_source(), self.config.prompts.model_copy(update={"candidates": 1})
        if not source.labelled:
            return None
        return ObjectDataset(source, self.transform, prompts, source.keys, self.config.data.seed)

    def source_fingerprints(self, keys: Sequence[str]) -> dict[str, str]:
        """Of the image and its annotation, which prompts are drawn from, that each record about ``keys`` is of."""
        found = fingerprints(partial(self.train_source.fingerprint, labels=True), keys)
        return {record_key(key, view): found[key] for view in range(self.config.data.views) for key in keys}

    def task(self, device: torch.device | str | None = None) -> PromptTask:
        """The job on all its images. device: where a projection is fitted if there is none yet.

        An online run sees another view in every epoch, a cached one those of the cache in turn.
        """
        signals = self.signals(device if device is not None else default_device())
        cached = self.config.cached
        views = self.config.data.views if cached else self.config.train.total_epochs
        keys = self.cached_keys if cached else None
        return PromptTask(self.config, signals, lambda epoch: self.objects(epoch % views, keys), self.held_out())

    def signals(self, device: torch.device | str) -> PromptTeachers | None:
        """Running teachers or the cache, whose teachers rank 0 opens once to prove that they are those of the config;
        None where nothing is distilled."""
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
        """Of each teacher that counts, summing to one."""
        return shares(self.config.teachers)

    def load_teachers(self, device: torch.device | str) -> Ensemble:
        """The teachers that count, running, without projections."""
        _ = self.weights  # are checked before anything is loaded
        return Ensemble.load(self.config.teachers, device)

    def ensemble(self, device: torch.device | str) -> Ensemble:
        """The teachers that count, running, their projections set."""
        ensemble = self.load_teachers(device)
        for teacher in ensemble.teachers.values():
            self.set_projection(teacher, process_rank())
        return ensemble

    def set_projection(self, teacher: PromptTeacher, rank: int) -> None:
        """The projection of a teacher's patch features: read, or fitted once by rank 0 and kept."""
        path, fingerprint = self.projection_path(teacher.name), self._projection_fingerprint(teacher)
        if rank == 0 and not path.is_file():
            projection = fit_projection(teacher, self._sample(), PATCH_CHANNELS, self._standardise)
            projection.save(path, fingerprint)
        wait_for(lambda: path if path.is_file() else None, path.parent, f"projection for {teacher.name}")
        teacher.projection = Projection.load(path, fingerprint).to(teacher.device)

    def projection_path(self, teacher: str) -> Path:
        """In the cache, or of an online run in its own folder."""
        cached = self.config.distillation.use_precomputed_features
        root = self.config.feature_root if cached else self.config.output
        return root / "projections" / f"{teacher}.safetensors"

    @property
    def _standardise(self) -> bool:
        wanted = self.config.distillation.standardise
        return len(self.weights) > 1 if wanted is None else wanted

    def _projection_fingerprint(self, teacher: PromptTeacher) -> str:
        """Of what has to be the same for a projection to fit; the images it was fitted on may be others."""
        about = f"{teacher.fingerprint} {PATCH_CHANNELS} {self._standardise}"
        return hashlib.sha256(about.encode()).hexdigest()

    def _sample(self) -> Iterator[ImageBatch]:
        """Training images spread evenly over the data set."""
        data, source = self.config.data, self.train_source
        keys = evenly(source.keys, self.config.distillation.sample)
        images = ImageDataset(source, self.transform, keys, data.seed)
        return (batch for batch, _ in image_loader(images, self.config.cache.batch_size) if batch is not None)

    @property
    def split_root(self) -> Path:
        """Folder of the cache of one split: ``TEACHER/FEATURE`` below it are feature stores."""
        return self.config.feature_root / self.config.data.split

    def record_shapes(self, teacher: PromptTeacher) -> dict[str, Shape]:
        objects, dense = self.config.prompts.objects, self.config.cache.dense
        return record_shapes(teacher.projected.channels, teacher.width, teacher.grid, objects, dense)

    def store_spec(self, teacher: PromptTeacher, feature: str, shape: Shape) -> StoreSpec:
        """A cache is of one teacher and its projection, and of one way to draw views and prompts."""
        return StoreSpec(
            tap=feature, shape=shape, image_size=self.image_size,
            teacher=f"{teacher.fingerprint[:32]}-{projection_digest(teacher.projected)}",
            transform=self._asked, codec=self.config.cache.codec,
        )  # fmt: skip

    @property
    def _asked(self) -> str:
        return f"{self.transform.fingerprint}-{prompts_fingerprint(self.config.prompts, self.config.data.seed)}"

    def open_stores(self, teacher: str) -> dict[str, FeatureStore]:
        """A teacher's stores by feature, held against the config: no weights are read.

        Raises ``UserError`` where there are none, or they are of other prompts, views, sizes or another codec.
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
        """``UserError`` where the store at ``root`` shows other views or asks otherwise than this config."""
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
        """``UserError`` where the store at ``root`` is of another model than ``teacher``."""
        stored = Manifest.load(root).spec.teacher.partition("-")[0]
        if stored != teacher.fingerprint[:32]:
            raise UserError(
                f"{root}: this cache is of another teacher than {teacher.name!r} is now (weights, image size or "
                f"precision): set teachers as they were, {ELSEWHERE}"
            )

    def prove(self, teacher: PromptTeacher, stores: dict[str, FeatureStore]) -> None:
        """``UserError`` unless the stores are of this very teacher and of the projection beside them."""
        for store in stores.values():
            self.refuse_other_teacher(teacher, store.root)
        teacher.projection = Projection.load(self.projection_path(teacher.name), self._projection_fingerprint(teacher))
        shapes = self.record_shapes(teacher)
        for feature, store in stores.items():
            if feature in shapes:
                spec = self.store_spec(teacher, feature, shapes[feature])
                Manifest.load(store.root).require(store.root, spec)

    def _refuse_incomplete(self, stores: dict[str, dict[str, FeatureStore]]) -> None:
        """Every view is cached or listed as skipped, for every teacher and feature that is read."""
        names = [record_key(key, view) for view in range(self.config.data.views) for key in self.cached_keys]
        wanted = {FEATURE_OF[term] for term in self.config.distilled}
        for store in (store for features in stores.values() for name, store in features.items() if name in wanted):
            refuse_missing(store.root, [name for name in names if name not in store], len(names))


ELSEWHERE = "give distillation.precomputed_root another folder, or delete this one to cache again"


def projection_digest(projection: Projection) -> str:
    """16 hex digits over every number of a projection."""
    digest = hashlib.sha256(repr(projection.scale).encode())
    for tensor in (projection.mean, projection.basis):
        digest.update(f"{tuple(tensor.shape)}".encode())
        digest.update(tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def _parts(model: torch.nn.Module) -> dict[str, int]:
    """Parameters by module; what two of them share counts in the first."""
    found: dict[str, int] = {}
    for name, parameter in model.named_parameters():  # gives a shared one once
        part = name.partition(".")[0]
        found[part] = found.get(part, 0) + parameter.numel()
    return found
