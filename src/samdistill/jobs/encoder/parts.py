"""Parts of an encoder run: images, views, teacher, and store."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property, partial

from ...data import ReadableImages
from ...store import StoreSpec
from ...teachers import MapSignals, RunningMaps, TeacherInfo, build_teacher, describe_teacher
from ..caching import Specs
from ..views import ViewParts
from .config import EncoderRunConfig
from .task import EncoderTask


class EncoderParts(ViewParts[EncoderRunConfig]):
    """Parts of an encoder run. Each is built on first access."""

    what = "embeddings"

    @cached_property
    def teacher_info(self) -> TeacherInfo:
        return describe_teacher(self.config.teacher)

    @property
    def image_size(self) -> int:
        return self.teacher_info.image_size

    @property
    def keys(self) -> Sequence[str]:
        return self.train_source.keys

    def running(self) -> RunningMaps:
        teacher = build_teacher(self.config.teacher)
        return RunningMaps(teacher, teacher.maps)

    def specs(self, fingerprint: str) -> Specs:
        info, shapes = self.teacher_info, self.teacher_info.shapes
        return {
            tap if len(shapes) > 1 else "": StoreSpec(
                tap=tap, shape=shape, image_size=info.image_size, teacher=fingerprint,
                transform=self.transform.fingerprint, codec=self.config.cache.codec,
            )
            for tap, shape in shapes.items()
        }  # fmt: skip

    def task(self, signals: MapSignals, keys: Sequence[str] | None = None) -> EncoderTask:
        """Return the task on all training images, or on ``keys``.

        With a cache, epochs use its views in turn. With a running teacher, every epoch has another view.
        """
        wanted = self.trained_keys if keys is None else keys
        return EncoderTask(self.config, self.teacher_info, signals, partial(self._images, wanted))

    def _images(self, keys: Sequence[str], epoch: int) -> ReadableImages:
        views = self.config.train.total_epochs if self.config.online else self.config.data.views
        return ReadableImages(self.view(epoch % views, keys), cached=not self.config.online)
