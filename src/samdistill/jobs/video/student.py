"""Student of video distillation: a trained memory in a frozen model."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor, nn

from ...checkpoints.processors import inputs_of
from ...ops.digest import hash_tensors
from ...ops.images import normalise, to_grid
from ...students import MEMORY, VideoDetector
from ...teachers.loading import settings
from ...types import DetectorOutput, UserError

COARSEST = 3
"""FPN level that only the memory reads, so that aligning it does not change the answers about images."""


@dataclass(frozen=True)
class Past:
    """Memory of b clips with t context frames, for p questions.

    Attributes:
        ages: Age of each frame, in annotated frames.
        valid: False for padded slots.
        own: Whether a frame enters the memory with the student's features.
        context: Canvases of the context frames, or None if the student's features are not used.
        teacher: The teacher's maps, zeros for other frames, or None.
        marks: Fraction of each grid cell that the object of a question covers, or None.
    """

    ages: Float[Tensor, "b t"]
    valid: Bool[Tensor, "b t"]
    own: Bool[Tensor, "b t"]
    context: UInt8[Tensor, "b t 3 s s"] | None
    teacher: Float[Tensor, "b t c h w"] | None
    marks: Float[Tensor, "p t g g"] | None


def image_fingerprint(model: VideoDetector) -> str:
    """Return a hex digest of the image model in a video student: its configuration and all tensors outside the memory.

    The convolution of the coarsest level is left out, because alignment trains it. ``geometry`` is left out, because it
    does not affect the model, and earlier versions did not save it.
    """
    kept = settings(model.config.to_dict())
    about = {name: kept[name] for name in kept if not name.startswith("memory_") and name != "geometry"}
    digest = hashlib.sha256(json.dumps(about, sort_keys=True, default=str).encode())
    skipped = (*MEMORY, f"{model.coarsest}.")
    hash_tensors(digest, (item for item in sorted(model.state_dict().items()) if not item[0].startswith(skipped)))
    return digest.hexdigest()


class VideoStudent(nn.Module):
    """The trained modules of a video student, as parameters and in checkpoints.

    The modules are ``memory_resampler``, ``memory_attention`` and, if the memory uses the coarsest level,
    ``memory_level``, the last convolution of this level, which only an alignment phase trains. The rest of the model is
    frozen and in eval mode. It moves to the device with this module and is not part of the state. The state contains
    the fingerprint of the image model. Loading a state with another fingerprint raises ``UserError``.
    """

    def __init__(self, model: VideoDetector, origin: str) -> None:
        """Set up the student.

        Args:
            model: The model with a memory.
            origin: Path of the image student, for error messages.
        """
        super().__init__()
        assert model.memory_resampler is not None and model.memory_attention is not None
        model.requires_grad_(False).eval()
        self._whole = (model,)  # in a tuple, so that it is not in ``parameters`` and ``state_dict``
        self.memory_resampler, self.memory_attention = model.memory_resampler, model.memory_attention
        self.memory_level = None
        if model.config.memory_level == COARSEST:
            self.memory_level = model.get_submodule(model.coarsest)
        self.requires_grad_(True)
        self.origin, self.fingerprint = origin, image_fingerprint(model)

    @property
    def model(self) -> VideoDetector:
        """The whole model."""
        return self._whole[0]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> VideoStudent:
        """Apply ``fn`` to the whole model, which includes the trained modules."""
        self.model._apply(fn, recurse)
        return self

    def get_extra_state(self) -> Tensor:
        """Return the fingerprint of the image model, as bytes."""
        return torch.tensor(list(bytes.fromhex(self.fingerprint)), dtype=torch.uint8)

    def set_extra_state(self, state: Tensor) -> None:
        """Compare the fingerprint of a state with that of the image model.

        Raises:
            UserError: The memory was trained with another image model.
        """
        found = bytes(state.tolist()).hex()
        if found != self.fingerprint:
            raise UserError(
                f"{self.origin}: this memory belongs to the image checkpoint {found[:12]}, and this is "
                f"{self.fingerprint[:12]}; give student.start the one that it was trained with"
            )

    def forward(
        self, images: UInt8[Tensor, "b 3 s s"] | None, past: Past, asked: dict[str, Tensor],
        prompt_images: Int[Tensor, " p"],
    ) -> tuple[DetectorOutput | None, Float[Tensor, "n c h w"] | None]:  # fmt: skip
        """Answer questions about ``images``, or return the student's maps of the context frames.

        Args:
            images: Query frames on the student's canvas. None for the maps of valid context frames, for alignment.
            past: The memory.
            asked: Tokens of the questions, see ``Words.inputs``.
            prompt_images: Index of the image of each question.

        Returns:
            The answers and None, or None and the maps.
        """
        if images is None:
            return None, self.own_level(past)
        model = self.model
        with torch.no_grad(), self._as_in_use():
            vision = model.get_vision_features(self._pixels(images))
            text = model.get_text_features(asked["input_ids"], asked["attention_mask"], return_dict=True)
            memory = self.remembered(past)
        found = model.forward_video(
            memory_features=memory, memory_ages=past.ages, memory_valid=past.valid, memory_masks=past.marks,
            attention_mask=asked["attention_mask"], prompt_images=prompt_images, vision_embeds=vision,
            text_embeds=text,
        )  # fmt: skip
        return found.answer(), None

    def own_level(self, past: Past) -> Float[Tensor, "n c h w"]:
        """Return the student's FPN level of valid context frames, in order.

        Only the last convolution gets a gradient. The engine sets the mode of its batch norm.
        """
        assert past.context is not None
        return self._level(past.context[past.valid])

    def remembered(self, past: Past) -> Float[Tensor, "b t c h w"]:
        """Return one map per context frame on the student's grid: the student's, the teacher's, or zeros.

        It has no gradient, and modules are in eval mode as in inference.
        """
        with torch.no_grad(), self._as_in_use():
            return self._remembered(past)

    def _remembered(self, past: Past) -> Float[Tensor, "b t c h w"]:
        model, level = self.model, self.model.config.memory_level
        (b, t), own = past.own.shape, past.own & past.valid
        side = model.config.level_side(level)
        width = model.config.vision_config.fpn_hidden_size
        found = torch.zeros(b, t, width, side, side, device=model.device, dtype=model.dtype)
        if past.teacher is not None:
            found[~own] = to_grid(past.teacher[~own].to(found.dtype), (side, side))
        if bool(own.any()):
            assert past.context is not None
            found[own] = self._level(past.context[own]).to(found.dtype)
        return found

    @contextmanager
    def _as_in_use(self) -> Iterator[None]:
        """Set the aligned convolution to eval mode inside the context."""
        level = self.memory_level
        training = [module for module in level.modules() if module.training] if level is not None else []
        for module in training:
            module.training = False
        try:
            yield
        finally:
            for module in training:
                module.training = True

    def _level(self, images: UInt8[Tensor, "n 3 s s"]) -> Float[Tensor, "n c h w"]:
        vision = self.model.get_vision_features(self._pixels(images))
        return vision.fpn_hidden_states[self.model.config.memory_level]

    def _pixels(self, images: UInt8[Tensor, "n 3 s s"]) -> Float[Tensor, "n 3 s s"]:
        about = inputs_of(self.model.config)
        return normalise(images, about.mean, about.std)
