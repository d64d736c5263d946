"""The student of video distillation as the engine trains it: the memory alone, around a model that stays as it is."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor, nn

from ...ops.images import normalise, to_grid
from ...students import EfficientSam3Model
from ...students.sam3 import MEMORY
from ...teachers.loading import settings
from ...types import DetectorOutput, UserError

COARSEST = 3
"""The pyramid level that nothing but the memory reads, so that it can be aligned without changing an answer."""


@dataclass(frozen=True)
class Past:
    """What b clips remember of t context frames, for p questions.

    ages: annotated frames ago. valid: False for slots that only fill the batch. own: whether a frame is remembered by
    the student's own features. context: canvases, where a frame is. teacher: maps of the teacher, where a frame is not.
    marks: shares of cells that the object of each question covers, or None.
    """

    ages: Float[Tensor, "b t"]
    valid: Bool[Tensor, "b t"]
    own: Bool[Tensor, "b t"]
    context: UInt8[Tensor, "b t 3 s s"] | None
    teacher: Float[Tensor, "b t c h w"] | None
    marks: Float[Tensor, "p t g g"] | None


def image_fingerprint(model: EfficientSam3Model) -> str:
    """Hex digest of the image model inside a student of videos: its configuration, and every tensor but the memory's.

    Also without the convolution of the coarsest level, which belongs to the memory once that is aligned, and without
    ``geometry``: it says how images are laid, not what the model computes, and earlier versions did not write it.
    """
    kept = settings(model.config.to_dict())
    about = {name: kept[name] for name in kept if not name.startswith("memory_") and name != "geometry"}
    digest = hashlib.sha256(json.dumps(about, sort_keys=True, default=str).encode())
    skipped = (*MEMORY, f"vision_encoder.adapters.{COARSEST}.smooth.")
    for name, tensor in sorted(model.state_dict().items()):
        if not name.startswith(skipped):
            digest.update(f"\0{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


class VideoStudent(nn.Module):
    """What trains of a student of videos, by name and in its checkpoints; ``model`` is all of it.

    ``memory_resampler`` and ``memory_attention`` are the model's own; where the remembered level is the coarsest, so is
    ``memory_level``, its last convolution, which only an alignment phase trains. Everything else of the model is frozen
    and in eval mode, is moved along and is not part of the state. A state carries the image model's fingerprint, and
    one of another image model is refused with ``UserError``.
    """

    def __init__(self, model: EfficientSam3Model, origin: str) -> None:
        """origin: where the image model comes from, for errors."""
        super().__init__()
        assert model.memory_resampler is not None and model.memory_attention is not None
        model.requires_grad_(False).eval()
        self._whole = (model,)  # a tuple hides it from ``parameters`` and ``state_dict``
        self.memory_resampler, self.memory_attention = model.memory_resampler, model.memory_attention
        self.memory_level = None
        if model.config.memory_level == COARSEST:
            self.memory_level = model.vision_encoder.adapters[COARSEST].smooth
        self.requires_grad_(True)
        self.origin, self.fingerprint = origin, image_fingerprint(model)

    @property
    def model(self) -> EfficientSam3Model:
        return self._whole[0]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> VideoStudent:
        """Moves all of the model; what trains is among it."""
        self.model._apply(fn, recurse)
        return self

    def get_extra_state(self) -> Tensor:
        return torch.tensor(list(bytes.fromhex(self.fingerprint)), dtype=torch.uint8)

    def set_extra_state(self, state: Tensor) -> None:
        """Raises ``UserError`` for the state of a memory that was trained around another image model."""
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
        """Answers about ``images``; without them, the student's own maps of the valid context frames, to align.

        asked: tokens as ``Words.inputs`` gives them.
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
        """The student's remembered level of the valid context frames, in their order; only its last convolution has a
        gradient, and its batch norm is in the mode that the engine wants."""
        assert past.context is not None
        return self._level(past.context[past.valid])

    def remembered(self, past: Past) -> Float[Tensor, "b t c h w"]:
        """One map per context frame, the student's or the teacher's, on the student's grid; zeros where none is.

        Without gradient, and as inference computes it, whatever mode this is in.
        """
        with torch.no_grad(), self._as_in_use():
            return self._remembered(past)

    def _remembered(self, past: Past) -> Float[Tensor, "b t c h w"]:
        model, level = self.model, self.model.config.memory_level
        (b, t), own = past.own.shape, past.own & past.valid
        side = -(-model.config.vision_config.image_size // model.vision_encoder.levels[level].stride)
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
        """The aligned convolution with the statistics that it has; the mode that the engine set is put back."""
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
        vision = self.model.config.vision_config
        return normalise(images, tuple(vision.image_mean), tuple(vision.image_std))
