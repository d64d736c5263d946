"""Files of a detector: encoders of images and text, decoders, and the memory of a video student."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Sam3LiteTextModel
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.sam3_lite_text.modeling_sam3_lite_text import Sam3LiteTextVisionEncoderOutput

from ..inference.concepts import ConceptModel
from ..ops.outputs import PADDING, ask
from ..students import EfficientSam3Model
from ..types import VISUAL, DetectorOutput
from .parts import Part, Port, Sizes, pictures, ports
from .workarounds import replaced

_LEVELS = tuple(f"vision_features.{level}" for level in range(3))
_FIXED = {"batch": 1, "prompts": 1, "phrases": 1, "objects": 1, "boxes": 1}


@dataclass(frozen=True)
class Baked:
    """Text features of a fixed list of phrases, as constants of a file.

    Attributes:
        phrases: The phrases. The last ones, which are not shown to people, stand for example boxes without words and
            for an object without a name.
        shown: Number of the others.
        features: Text features of each phrase.
        mask: 1 for tokens, 0 for padding.
    """

    phrases: tuple[str, ...]
    shown: int
    features: Tensor
    mask: Tensor


def bake(detector: ConceptModel, phrases: Sequence[str]) -> Baked:
    """Compute the text features of phrases with the detector's own text encoder, each phrase alone.

    The phrases of prompts without words are added: ``VISUAL`` for example boxes, and a video student's
    ``memory_phrase``.

    Raises:
        UserError: A phrase is empty or too long.
    """
    model: Any = detector.model
    own = [VISUAL, model.config.memory_phrase] if _remembers(model) else [VISUAL]
    features, masks, texts = [], [], tuple(dict.fromkeys([*phrases, *own]))
    with torch.no_grad():
        for text in texts:
            ids, mask = detector.words.encode([text])
            features.append(model.get_text_features(ids, mask, return_dict=True).pooler_output)
            masks.append(mask)
    return Baked(texts, len(phrases), torch.cat(features), torch.cat(masks))


def _remembers(model: Any) -> bool:
    return bool(getattr(model.config, "memory_latents", 0))


class ImageEncoder(nn.Module):
    """Image encoder: the three levels that the heads read, and the fourth if a memory reads it."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.count = 4 if _remembers(model) and model.config.memory_level == 3 else 3

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
        levels = self.model.get_vision_features(pixel_values).fpn_hidden_states
        return tuple(levels[: self.count])


class TextEncoder(nn.Module):
    """Text encoder with its projection."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor]:
        return (self.model.get_text_features(input_ids, attention_mask, return_dict=True).pooler_output,)


class Memory(nn.Module):
    """Past frames to memory tokens."""

    def __init__(self, model: EfficientSam3Model) -> None:
        super().__init__()
        self.model = model

    def forward(self, features: Tensor, ages: Tensor, valid: Tensor, masks: Tensor | None = None) -> tuple[Tensor]:
        assert self.model.memory_resampler is not None
        return (self.model.memory_resampler(features, ages, valid, masks),)


class Decoder(nn.Module):
    """All heads on encoded images, with any of example boxes, memory and baked words.

    The position embeddings of the levels are constants. Without example boxes, the box that stands for none is not
    pooled: attention ignores it.

    Args:
        model: The detector.
        positions: Position embeddings of the levels for one image.
        names: Names of the inputs, in their order.
        baked: Text features of the vocabulary.
    """

    def __init__(self, model: Any, positions: Sequence[Tensor], names: tuple[str, ...], baked: Baked | None) -> None:
        super().__init__()
        self.model, self.names = model, names
        self.encoder = ImageEncoder(model)
        for level, table in enumerate(positions):
            self.register_buffer(f"positions_{level}", table)
        if baked is not None:
            self.register_buffer("text_features", baked.features)
            self.register_buffer("attention_mask", baked.mask)

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Return masks, boxes, logits, presence and the semantic map of each prompt."""
        given = dict(zip(self.names, inputs, strict=True))
        if "pixel_values" in given:
            given |= zip(_LEVELS, self.encoder(given["pixel_values"])[:3], strict=True)
        if "concepts" in given:
            given["text_features"] = self.text_features.index_select(0, given["concepts"])
            given["attention_mask"] = self.attention_mask.index_select(0, given["concepts"])
        if "input_boxes" in given:
            return outputs_of(self._ask(given))
        with replaced(self.model.geometry_encoder, "_encode_boxes", _no_boxes):
            return outputs_of(self._ask(given))

    def _ask(self, given: dict[str, Tensor]) -> DetectorOutput:
        levels = [given[name] for name in _LEVELS]
        positions = [getattr(self, f"positions_{level}") for level in range(len(levels))]
        vision = seen(levels, positions)
        recall = partial(self._recall, given["memory_tokens"]) if "memory_tokens" in given else None
        return ask(
            self.model, vision, given["prompt_images"], given["text_features"], given["attention_mask"],
            given.get("input_boxes"), given.get("input_boxes_labels"), heads_of(self.model), recall,
        )  # fmt: skip

    def _recall(self, memory: Tensor, encoded: Any) -> Tensor:
        return self.model.memory_attention(encoded.last_hidden_state, encoded.pos_embeds_flattened, memory)


def _no_boxes(boxes: Tensor, mask: Tensor, labels: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
    return features.new_zeros(*boxes.shape[:2], features.shape[1]), mask


def seen(levels: Sequence[Tensor], positions: Sequence[Tensor]) -> Sam3LiteTextVisionEncoderOutput:
    """Return levels as the output of a vision encoder. The heads leave out a fourth one, so the last is repeated."""
    return Sam3LiteTextVisionEncoderOutput(
        fpn_hidden_states=(*levels, levels[-1]), fpn_position_encoding=(*positions, positions[-1])
    )


def heads_of(model: Any) -> Callable[..., Any] | None:
    """Return the function that ``ask`` calls in place of a student. None for a ``Sam3Model``."""
    return partial(Sam3LiteTextModel.forward, model) if isinstance(model, EfficientSam3Model) else None


def outputs_of(found: Any) -> tuple[Tensor, ...]:
    """Return the outputs of a detector in the order of its files."""
    return found.pred_masks, found.pred_boxes, found.pred_logits, found.presence_logits, found.semantic_seg


class _Detector:
    """Builds the parts of one detector."""

    def __init__(self, detector: ConceptModel, baked: Baked | None, static: bool) -> None:
        self.model: Any = detector.model
        self.words, self.side, self.baked, self.static = detector.words, detector.image_size, baked, static
        self.encoder = ImageEncoder(self.model).eval()
        with torch.no_grad():
            found = self.model.get_vision_features(pictures(1, self.side, 0))
            self.levels = self.encoder(pictures(1, self.side, 0))
        self.positions = [table[:1].clone() for table in found.fpn_position_encoding[:3]]
        self.width = self.levels[2].shape[1]

    @cached_property
    def features(self) -> tuple[Port, ...]:
        return tuple(
            Port(name, torch.float32, ("batch", *level.shape[1:]))
            for name, level in zip(_LEVELS, self.levels, strict=False)
        )

    @cached_property
    def words_in(self) -> tuple[Port, ...]:
        """The inputs that say what is looked for."""
        images = ports(["prompt_images"], "prompts", dtype=torch.int64)
        if self.baked is not None:
            return (*ports(["concepts"], "prompts", dtype=torch.int64), *images)
        tokens = self.words.context
        return (
            *images, *ports(["text_features"], "prompts", tokens, self.width),
            *ports(["attention_mask"], "prompts", tokens, dtype=torch.int64),
        )  # fmt: skip

    def parts(self) -> list[Part]:
        exemplars = (
            *ports(["input_boxes"], "prompts", "boxes", 4),
            *ports(["input_boxes_labels"], "prompts", "boxes", dtype=torch.int64),
        )
        if not _remembers(self.model):
            if self.baked is not None:
                pixels = ports(["pixel_values"], "batch", 3, self.side, self.side)
                return [self.decoder("detector", (*pixels, *self.words_in))]
            more: list[Part] = []
        else:
            latents = ports(["memory_tokens"], "prompts", self.model.config.memory_latents, self.width)
            more = [
                self.memory(), self.decoder("decoder_memory", (*self.features, *self.words_in, *latents)),
            ]  # fmt: skip
        text = [] if self.baked is not None else [self.text()]
        return [
            self.vision(), *text, self.decoder("decoder", (*self.features, *self.words_in)),
            self.decoder("decoder_boxes", (*self.features, *self.words_in, *exemplars)), *more,
        ]  # fmt: skip

    def part(
        self, name: str, module: nn.Module, inputs: Sequence[Port], outputs: Sequence[Port], traced: Sizes,
        cases: Sequence[Sizes], reference: Callable[..., tuple[Tensor, ...]], masks: tuple[str, ...] = (),
        probe: Callable[..., Tensor] | None = None,
    ) -> Part:  # fmt: skip
        names = tuple(port.name for port in inputs)
        fixed = {**_FIXED, "frames": getattr(self.model.config, "memory_context", 1)}
        return Part(
            name, module.eval(), tuple(inputs), tuple(outputs), partial(self.example, names),
            traced=fixed if self.static else traced, cases=(fixed,) if self.static else tuple(cases),
            reference=reference, masks=masks, probe=probe,
        )  # fmt: skip

    def vision(self) -> Part:
        outputs = list(self.features)
        if len(self.levels) > 3:
            outputs += ports(["vision_features.3"], "batch", *self.levels[3].shape[1:])
        return self.part(
            "vision_encoder", self.encoder, ports(["pixel_values"], "batch", 3, self.side, self.side), outputs,
            {"batch": 2}, ({"batch": 1}, {"batch": 2}, {"batch": 3}), self.encoder, probe=self.probe,
        )  # fmt: skip

    def probe(self, *levels: Tensor) -> Tensor:
        """Return the semantic map of each image for example boxes in its corners."""
        batch = levels[0].shape[0]
        ids, mask = self.words.encode([VISUAL])
        text = self.model.get_text_features(ids, mask, return_dict=True).pooler_output
        boxes = torch.tensor([[0.3, 0.3, 0.4, 0.4], [0.7, 0.7, 0.4, 0.4]]).expand(batch, -1, -1)
        positions = [table.expand(batch, -1, -1, -1) for table in self.positions]
        found = ask(
            self.model, seen(levels[:3], positions), None, text.expand(batch, -1, -1), mask.expand(batch, -1), boxes,
            torch.ones(batch, 2).long(), heads_of(self.model),
        )  # fmt: skip
        return found.semantic_seg

    def text(self) -> Part:
        module, tokens = TextEncoder(self.model).eval(), self.words.context
        return self.part(
            "text_encoder", module, ports(["input_ids", "attention_mask"], "phrases", tokens, dtype=torch.int64),
            ports(["text_features"], "phrases", tokens, self.width), {"phrases": 2},
            ({"phrases": 1}, {"phrases": 2}, {"phrases": 5}), module,
        )  # fmt: skip

    def decoder(self, name: str, inputs: tuple[Port, ...]) -> Part:
        names = tuple(port.name for port in inputs)
        module = Decoder(self.model, self.positions, names, self.baked).eval()
        with torch.no_grad():
            found = module(*self.example(names, {**_FIXED, "frames": 1}, 0))
        kinds = ("pred_masks", "pred_boxes", "pred_logits", "presence_logits", "semantic_seg")
        outputs = [
            Port(kind, torch.float32, ("prompts", *one.shape[1:])) for kind, one in zip(kinds, found, strict=True)
        ]
        cases = [
            {"batch": batch, "prompts": prompts, "boxes": boxes}
            for batch, prompts, boxes in ((2, 2, 1), (1, 1, 2), (1, 3, 1), (3, 5, 3))
        ]
        return self.part(
            name, module, inputs, outputs, {"batch": 2, "prompts": 3, "boxes": 4}, cases,
            partial(self.expected, names), masks=("pred_masks", "semantic_seg"),
        )  # fmt: skip

    def memory(self) -> Part:
        config, module = self.model.config, Memory(self.model)
        grid = self.levels[config.memory_level].shape[1:]
        pair = ("objects", "frames")
        inputs = [
            *ports(["memory_features"], *pair, *grid), *ports(["memory_ages"], *pair),
            *ports(["memory_valid"], *pair, dtype=torch.bool),
        ]  # fmt: skip
        if config.memory_marks:
            inputs += ports(["memory_masks"], *pair, *grid[1:])
        cases = [
            {"objects": objects, "frames": frames} for objects, frames in ((1, 1), (2, 2), (3, config.memory_context))
        ]
        return self.part(
            "memory", module, inputs, ports(["memory_tokens"], "objects", config.memory_latents, self.width),
            {"objects": 2, "frames": 3}, cases, lambda *given: (self.model.remember(*given),),
        )  # fmt: skip

    def example(self, names: tuple[str, ...], sizes: Sizes, seed: int) -> tuple[Tensor, ...]:
        """Return random inputs. Features and tokens are what the model computes from random images and phrases."""
        draw = torch.Generator().manual_seed(seed)
        batch, prompts, boxes, phrases = (sizes.get(n, 1) for n in ("batch", "prompts", "boxes", "phrases"))
        pixels = pictures(batch, self.side, seed)
        given = {"pixel_values": pixels, "prompt_images": torch.randint(batch, (prompts,), generator=draw)}
        count = phrases if names[0] == "input_ids" else prompts
        given["input_ids"], given["attention_mask"] = self._phrases(count, draw)
        sides = 0.1 + 0.4 * torch.rand(prompts, boxes, 2, generator=draw)
        centres = sides / 2 + torch.rand(prompts, boxes, 2, generator=draw) * (1 - sides)
        given["input_boxes"] = torch.cat([centres, sides], 2)
        given["input_boxes_labels"] = torch.randint(2, (prompts, boxes), generator=draw)
        if boxes > 1:
            given["input_boxes_labels"][0, -1] = PADDING
        if self.baked is not None:
            given["concepts"] = torch.randint(len(self.baked.phrases), (prompts,), generator=draw)
        with torch.no_grad():
            if "text_features" in names:
                text = self.model.get_text_features(given["input_ids"], given["attention_mask"], return_dict=True)
                given["text_features"] = text.pooler_output
            if _LEVELS[0] in names:
                given |= zip(_LEVELS, self.encoder(pixels)[:3], strict=True)
            if "memory_features" in names or "memory_tokens" in names:
                past = self._past(sizes.get("objects", prompts), sizes.get("frames", 2), draw, seed)
                given |= past
                given["memory_tokens"] = self.model.remember(*past.values())
        return tuple(given[name] for name in names)

    def _phrases(self, count: int, draw: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return token ids of random lengths, padded as the tokenizer pads."""
        context, vocabulary = self.words.context, len(self.words.tokenizer)
        ids = torch.randint(vocabulary, (count, context), generator=draw)
        mask = (torch.arange(context) < torch.randint(3, context + 1, (count, 1), generator=draw)).long()
        return torch.where(mask > 0, ids, int(self.words.tokenizer.pad_token_id)), mask

    def _past(self, objects: int, frames: int, draw: torch.Generator, seed: int) -> dict[str, Tensor]:
        """Return random frames of a memory, oldest first. The last one is always valid."""
        with torch.no_grad():
            maps = self.encoder(pictures(objects * frames, self.side, seed))[self.model.config.memory_level]
        valid = torch.rand(objects, frames, generator=draw) < 0.8
        valid[:, -1] = True
        past = {
            "memory_features": maps.unflatten(0, (objects, frames)),
            "memory_ages": torch.arange(frames, 0, -1).expand(objects, -1).float(), "memory_valid": valid,
        }  # fmt: skip
        if self.model.config.memory_marks:
            share = torch.rand(objects, frames, *maps.shape[-2:], generator=draw)
            past["memory_masks"] = (2 * share - 1).clamp(min=0)
        return past

    def expected(self, names: tuple[str, ...], *inputs: Tensor) -> tuple[Tensor, ...]:
        """Compute the outputs of a decoder with the model's own forward pass."""
        given = dict(zip(names, inputs, strict=True))
        if "pixel_values" in given:
            given |= zip(_LEVELS, self.encoder(given["pixel_values"])[:3], strict=True)
        if self.baked is not None:
            text, mask = self.baked.features[given["concepts"]], self.baked.mask[given["concepts"]]
        else:
            text, mask = given["text_features"], given["attention_mask"]
        levels = [given[name] for name in _LEVELS]
        vision = seen(levels, [table.expand(levels[0].shape[0], -1, -1, -1) for table in self.positions])
        boxes, labels, images = given.get("input_boxes"), given.get("input_boxes_labels"), given["prompt_images"]
        if "memory_tokens" in given:
            recall = partial(self.model._recall, given["memory_tokens"])
            return outputs_of(
                ask(self.model, vision, images, text, mask, forward=heads_of(self.model), enrich=recall)
            )  # fmt: skip
        if not isinstance(self.model, EfficientSam3Model):
            return outputs_of(ask(self.model, vision, images, text, mask, boxes, labels))
        return outputs_of(
            self.model(
                vision_embeds=vision, text_embeds=BaseModelOutputWithPooling(pooler_output=text), attention_mask=mask,
                input_boxes=boxes, input_boxes_labels=labels, prompt_images=images,
            )
        )  # fmt: skip


def detector_parts(detector: ConceptModel, baked: Baked | None, static: bool) -> list[Part]:
    """Return the files of a detector.

    Args:
        detector: The detector, in float32 on the CPU.
        baked: Text features of a vocabulary, instead of a text encoder.
        static: Whether all axes are fixed: one image, prompt, phrase and box, and a full memory.
    """
    return _Detector(detector, baked, static).parts()
