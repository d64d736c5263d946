"""The protocol of training signals, and the base class and registry of image encoders."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple, Protocol, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..checkpoints.sam import sam_kind
from ..config import TeacherConfig
from ..data import ObjectBatch
from ..ops.images import Statistics, normalise
from ..reading import running
from ..registry import Registry, did_you_mean
from ..types import Features, ImageBatch, PromptGroup, UserError

IMAGE_EMBEDDING = "image_embedding"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


Maps = tuple[Float[Tensor, "b _ _ _"], ...]
"""Feature maps of a batch: one for an encoder, one per FPN level for a detector."""
Records = Mapping[str, Float[Tensor, "b _ _ _"]]
"""Cached features of a batch by name."""
Frame = tuple[str, int]
"""Key of a video and number of a frame."""
Asked = TypeVar("Asked", contravariant=True)
Read = TypeVar("Read")
Answer = TypeVar("Answer", covariant=True)


class Signals(Protocol[Asked, Read, Answer]):
    """Source of training signals: a running teacher, a cache, or several teachers.

    A task uses this protocol and does not depend on which of them it has. It calls ``read`` in a loader worker, when a
    batch is made, and passes the result to ``answer`` on the device. Work that needs no device, such as reading records
    and decoding frames, is thus done in parallel with the training step.

    Attributes:
        fingerprint: Hex digest of the teacher. Checkpoints store it, and a run can be resumed with this teacher only.
    """

    fingerprint: str

    def read(self, asked: Asked) -> Read:
        """Return the part of the signal that needs no device, on the CPU.

        Raises:
            UserError: A record is missing or wrong.
        """

    def answer(self, asked: Asked, read: Read) -> Answer:
        """Return the signal: float32 on the device, without gradient, not an inference tensor, so a loss can use it.

        Args:
            asked: The request, as passed to ``read``.
            read: What ``read`` returned for it.
        """

    def to(self, device: torch.device | str) -> None:
        """Move a running teacher to ``device``. Does nothing if it is there."""


class Prompted(NamedTuple):
    """Request to promptable teachers: a batch, and its own ``groups`` of prompts or those of a later round."""

    batch: ObjectBatch
    groups: tuple[PromptGroup, ...]


MapSignals = Signals[ImageBatch, Maps, Maps]
FrameSignals = Signals[Sequence[Frame], Maps, Maps]
TextSignals = Signals[Sequence[str], Maps, Maps]
"""Signals of phrases: one map (p, c, 1, t) of the tokens of p phrases."""


@dataclass(frozen=True)
class TeacherInfo:
    """Description of an image encoder, read without its weights.

    Attributes:
        kind: Name in the registry.
        path: Path or hub id.
        image_size: Side of the input in pixels.
        embedding_shape: Channels, rows and columns of ``image_embedding``.
        params: Parameters of the image encoder.
        mean: Mean of the normalisation.
        std: Standard deviation of the normalisation.
        zero_padding: Whether padding is zero after normalisation, for the teacher and for a model with its heads.
        fine_shapes: Shapes of the taps that a student learns beside the embedding, finest first, by name.
    """

    kind: str
    path: str
    image_size: int
    embedding_shape: tuple[int, int, int]
    params: int
    mean: Statistics
    std: Statistics
    zero_padding: bool = False
    fine_shapes: Mapping[str, tuple[int, int, int]] = field(default_factory=dict)

    @property
    def shapes(self) -> dict[str, tuple[int, int, int]]:
        """Shapes of all taps that a student learns, in the order of ``OnlineTeacher.maps``."""
        return {**self.fine_shapes, IMAGE_EMBEDDING: self.embedding_shape}

    def pixels(self, batch: ImageBatch) -> Float[Tensor, "b 3 s s"]:
        """Return the normalised images of a batch as the teacher and its student read them."""
        return normalised(batch, self.mean, self.std, self.zero_padding)


def normalised(batch: ImageBatch, mean: Statistics, std: Statistics, zero_padding: bool) -> Float[Tensor, "b 3 s s"]:
    """Return the images of a batch normalised, with padding set to zero after that if ``zero_padding``."""
    pixels = normalise(batch.images, mean, std)
    return pixels * batch.valid((pixels.shape[-2], pixels.shape[-1]))[:, None] if zero_padding else pixels


class OnlineTeacher(ABC):
    """Base class of frozen image encoders. Images are uint8; the encoder normalises them itself.

    A kind of encoder is a registered subclass with a constructor ``(config, device)``, ``describe`` and ``_forward``.

    Attributes:
        taps: Names of the outputs that a student learns, with a description of the layout. ``image_embedding``
            (b, c, gh, gw) is the last one, after finer levels if there are any.
        image_size: Side of the input in pixels.
        embedding_shape: Channels, rows and columns of ``image_embedding``.
        fingerprint: Hex digest of the weights in their precision, the image size and the preprocessing. Teachers with
            the same fingerprint give the same features.
        device: Device of the network.
        mean: Mean of the normalisation.
        std: Standard deviation of the normalisation.
        model_types: Model types of the checkpoints that the class opens, as in ``config.json``. Those can host a trunk;
            empty for a teacher that cannot.
    """

    model_types: ClassVar[tuple[str, ...]] = ()
    taps: dict[str, str]
    image_size: int
    embedding_shape: tuple[int, int, int]
    fingerprint: str
    device: torch.device
    mean: Statistics
    std: Statistics

    @classmethod
    @abstractmethod
    def describe(cls, config: TeacherConfig) -> TeacherInfo:
        """Read geometry and size from the configuration file, without weights."""

    @abstractmethod
    def _forward(self, batch: ImageBatch) -> dict[str, Tensor]:
        """Return every tap for a batch on the device, in any dtype."""

    def extract(self, batch: ImageBatch, taps: Sequence[str] = (IMAGE_EMBEDDING,)) -> Features:
        """Return taps as float32 tensors without gradient that a loss can use.

        Args:
            batch: Images with a square canvas of side ``image_size``.
            taps: Names of taps.

        Raises:
            UserError: A tap does not exist, or the images have another size.
        """
        check_taps(taps, self.taps)
        if batch.images.shape[-2:] != (self.image_size, self.image_size):
            height, width = batch.images.shape[-2:]
            raise UserError(
                f"the teacher reads {self.image_size} x {self.image_size} pixels, but the images are "
                f"{height} x {width}; set teacher.image_size, or resize the images to its canvas"
            )
        with running(self), torch.inference_mode(), torch.autocast(self.device.type, enabled=False):
            found = self._forward(batch.to(self.device))
        # copied outside inference mode, because autograd cannot save an inference tensor for a backward pass
        return {tap: found[tap].to(torch.float32, copy=True).contiguous() for tap in taps}

    def maps(self, batch: ImageBatch) -> Maps:
        """Return every tap, the finest first and ``image_embedding`` last, in the form that ``RunningMaps`` expects."""
        found = self.extract(batch, tuple(self.taps))
        return tuple(found[tap] for tap in self.taps)

    def to(self, device: torch.device | str) -> OnlineTeacher:
        """Move the network to ``device``. Does nothing if it is there."""
        if torch.device(device) != self.device:
            self.device = torch.device(device)
            for part in vars(self).values():
                if isinstance(part, nn.Module):
                    part.to(self.device)
        return self


TEACHERS: Registry[type[OnlineTeacher]] = Registry("teacher")


def teacher_kind(path: str) -> str:
    """Return the kind of the teacher at a path or hub id, by its ``config.json`` or its tensor names.

    ``sam3`` for all that is no SAM or SAM 2; that kind reports what is wrong with other checkpoints.
    """
    found = sam_kind(path)
    return next((name for name in TEACHERS if found in TEACHERS.get(name).model_types), "sam3")


def check_taps(asked: Sequence[str], known: Sequence[str] | dict[str, str]) -> None:
    """Raise ``UserError`` for a tap that does not exist."""
    for tap in asked:
        if tap not in known:
            raise UserError(f"no tap is called {tap!r}{did_you_mean(tap, list(known))}")


def build_teacher(config: TeacherConfig, device: torch.device | str = "cpu") -> OnlineTeacher:
    """Load the teacher of ``config`` on ``device``, frozen and in eval mode."""
    return TEACHERS.get(config.kind)(config, torch.device(device))  # type: ignore[call-arg]


def describe_teacher(config: TeacherConfig) -> TeacherInfo:
    """Read image size, embedding shape and parameter count of a teacher from its ``config.json``, without weights."""
    return TEACHERS.get(config.kind).describe(config)
