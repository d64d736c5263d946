"""Open an exported folder as a model that predicts, tracks and is measured like any other.

A model has the class and the configuration of the one that was exported, so its parameters and operations can be
counted. Its answers come from the ONNX files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel, Sam2Model, Sam3Model, Sam3TrackerModel, SamModel
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.sam3_lite_text.modeling_sam3_lite_text import Sam3LiteTextVisionEncoderOutput

from ..checkpoints.exported import OPENERS
from ..checkpoints.loading import build_config
from ..checkpoints.words import Phrases, Words
from ..inference.concepts import StudentDetector
from ..ops.images import normalise
from ..ops.promptable import Embeddings, MaskPrediction, decode, encode
from ..reading import foreign
from ..students import EfficientSam3Model, EfficientSam3Output, HostedSamModel, MobileSamModel
from ..types import ConceptPrompts, DetectorOutput, ImageBatch, Prompts, UserError
from . import runtime

Opened = TypeVar("Opened", bound=PreTrainedModel)


@contextmanager
def _one_line() -> Iterator[None]:
    try:
        yield
    except runtime.ModelError as error:
        raise UserError(str(error)) from None


class Files:
    """The ONNX files of an exported folder: tensors in, tensors out.

    Args:
        folder: The folder.
        precision: Which of its files. None takes the most exact ones.

    Raises:
        UserError: A file is missing or damaged, the folder was written by a newer version, or onnxruntime is missing.
    """

    def __init__(self, folder: Path, precision: str | None = None) -> None:
        with _one_line():
            self.model = runtime.Model(folder, precision, threads=torch.get_num_threads())

    @property
    def names(self) -> set[str]:
        return set(self.model.networks)

    def __call__(self, name: str, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Run one file on rows of inputs that do not depend on each other.

        Raises:
            UserError: The folder lacks the file, or it cannot run.
        """
        with _one_line():
            return self._tensors(self.model.network(name).rows(self._arrays(given), {}), given)

    def detected(self, name: str, images: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Run a detector's decoder: ``images`` has the features of b images, ``given`` the other inputs per prompt."""
        with _one_line():
            shared, rows, network = self._arrays(images), self._arrays(given), self.model.network(name)
            if any(isinstance(network.inputs[n].shape[0], int) for n in shared if n in network.inputs):
                index, rows["prompt_images"] = rows["prompt_images"], 0 * rows["prompt_images"]
                shared, rows = {}, rows | {n: value[index] for n, value in shared.items()}
            return self._tensors(network.rows(rows, shared), given)

    def remembered(self, given: Mapping[str, Tensor]) -> Tensor:
        """Return memory tokens; see ``runtime.Model.remember``."""
        with _one_line():
            return torch.from_numpy(self.model.remember(self._arrays(given))).to(given["memory_features"].device)

    def prompted(self, features: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Run the prompt decoder; see ``runtime.Model.decode``."""
        with _one_line():
            return self._tensors(self.model.decode(self._arrays(features), self._arrays(given)), features)

    @staticmethod
    def _arrays(given: Mapping[str, Tensor]) -> dict[str, Any]:
        return {name: value.detach().cpu().numpy() for name, value in given.items()}

    @staticmethod
    def _tensors(found: Mapping[str, Any], given: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the outputs on the device of the inputs."""
        device = next(iter(given.values())).device
        return {name: torch.from_numpy(value).to(device) for name, value in found.items()}


class _Exported:
    """A model whose answers come from ``files``. Its own parameters have shapes but no values."""

    files: Files

    def to(self: Opened, *args: Any, **kwargs: Any) -> Opened:
        """Return the model: onnxruntime runs the files on the CPU."""
        return self


class ExportedTracker(_Exported, Sam3TrackerModel):
    """A SAM 3 tracker in ONNX files."""


class ExportedSam(_Exported, SamModel):
    """A SAM in ONNX files."""


class ExportedMobileSam(_Exported, MobileSamModel):
    """A MobileSAM in ONNX files."""


class ExportedSam2(_Exported, Sam2Model):
    """A SAM 2 in ONNX files."""


class ExportedHostedSam(_Exported, HostedSamModel):
    """A SAM on a distilled trunk in ONNX files."""


_POSITIONS = "image_positional_embeddings"


@encode.register(_Exported)
def _encode(model: Any, pixels: Float[Tensor, "b 3 s s"]) -> Embeddings:
    found = model.files("vision_encoder", {"pixel_values": pixels})
    model.positions = {name: value[:1] for name, value in found.items() if name == _POSITIONS}  # of every image
    return Embeddings(tuple(value for name, value in found.items() if name != _POSITIONS), None)


@decode.register(_Exported)
def _decode(model: Any, embeddings: Embeddings, prompts: Prompts, multimask: bool) -> MaskPrediction:
    (b, n), levels = prompts.valid.shape, embeddings.levels
    names = ["image_embeddings"] if len(levels) == 1 else [f"image_embeddings.{n}" for n in range(len(levels))]
    features = dict(zip(names, levels, strict=True))
    features |= {name: value.expand(b, -1, -1, -1) for name, value in model.positions.items()}
    points, labels, boxes = prompts.points, prompts.labels, prompts.boxes
    given = {
        "input_points": torch.zeros(b, 1, 0, 2) if points is None else points,
        "input_labels": torch.zeros(b, n, 0, dtype=torch.int64) if labels is None else labels,
        "input_boxes": torch.zeros(b, 0, 4) if boxes is None else boxes,
    }
    if prompts.masks is not None:
        given["input_masks"] = prompts.masks
    found = model.files.prompted(features, given)
    scores, masks = ("iou_scores", "pred_masks") if multimask else runtime.SINGLE
    return MaskPrediction(found[masks], found[scores], None, None)


class _Detects(_Exported):
    """A detector. Image features are what ``vision_encoder`` returns.

    A model of a fixed vocabulary without a memory is one file, so its image features are the normalised images
    themselves.
    """

    @property
    def whole(self) -> bool:
        """Whether the model is one file for images and concepts."""
        return "vision_encoder" not in self.files.names

    def get_vision_features(self, pixel_values: Float[Tensor, "b 3 s s"], **kwargs: Any) -> Any:
        """Encode images. Returns the levels in ``fpn_hidden_states``, finest first."""
        if self.whole:
            return Sam3LiteTextVisionEncoderOutput(fpn_hidden_states=(pixel_values,), fpn_position_encoding=())
        found = self.files("vision_encoder", {"pixel_values": pixel_values})
        return Sam3LiteTextVisionEncoderOutput(
            fpn_hidden_states=tuple(found[f"vision_features.{level}"] for level in range(len(found))),
            fpn_position_encoding=(),
        )

    def get_text_features(
        self, input_ids: Int[Tensor, "p t"], attention_mask: Int[Tensor, "p t"] | None = None, **kwargs: Any
    ) -> BaseModelOutputWithPooling:
        """Encode phrases. With a fixed vocabulary, the features are the rows of the concepts, (p, 1)."""
        if self.files.model.vocabulary is not None:
            return BaseModelOutputWithPooling(pooler_output=input_ids)
        assert attention_mask is not None
        found = self.files("text_encoder", {"input_ids": input_ids, "attention_mask": attention_mask})
        return BaseModelOutputWithPooling(pooler_output=found["text_features"])

    def forward(
        self, pixel_values: Tensor | None = None, input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None, input_boxes: Tensor | None = None,
        input_boxes_labels: Tensor | None = None, prompt_images: Tensor | None = None, vision_embeds: Any = None,
        text_embeds: Any = None, memory_tokens: Callable[[Tensor], Tensor] | None = None,
    ) -> EfficientSam3Output:  # fmt: skip
        """Detect the instances of p prompts, as ``EfficientSam3Model.forward`` does.

        ``memory_tokens`` returns the memory tokens of each prompt from the index of its image.
        """
        vision = self.get_vision_features(pixel_values) if vision_embeds is None else vision_embeds
        levels = vision.fpn_hidden_states
        if input_ids is not None:
            text_embeds = self.get_text_features(input_ids, attention_mask)
        if text_embeds is None:
            return EfficientSam3Output(fpn_hidden_states=levels)
        text = text_embeds.pooler_output
        given = {"prompt_images": torch.arange(len(text)) if prompt_images is None else prompt_images}
        names = ["pixel_values"] if self.whole else [f"vision_features.{level}" for level in range(len(levels))]
        if self.files.model.vocabulary is not None:
            given["concepts"] = text[:, 0]
        else:
            given |= {"text_features": text, "attention_mask": attention_mask}
        name = "detector" if self.whole else "decoder"
        if memory_tokens is not None:
            name = "decoder_memory"
            given["memory_tokens"] = memory_tokens(given["prompt_images"])
        elif input_boxes is not None and input_boxes.shape[1]:
            name = "decoder_boxes"
            given |= {"input_boxes": input_boxes, "input_boxes_labels": input_boxes_labels}
        found = self.files.detected(name, dict(zip(names, levels, strict=True)), given)
        parts = ("pred_masks", "pred_boxes", "pred_logits", "presence_logits", "semantic_seg")
        return EfficientSam3Output(*(found[part] for part in parts), fpn_hidden_states=levels)


class ExportedDetector(_Detects, EfficientSam3Model):
    """A detection student in ONNX files, with or without a memory."""

    def forward_video(
        self, pixel_values: Tensor | None = None, input_ids: Tensor | None = None,
        memory_features: Tensor | None = None, memory_ages: Tensor | None = None, memory_valid: Tensor | None = None,
        memory_masks: Tensor | None = None, **prompts: Any,
    ) -> EfficientSam3Output:  # fmt: skip
        """Detect the instances of p prompts, as ``EfficientSam3Model.forward_video`` does."""
        tokens = None
        if memory_features is not None:
            tokens = partial(self._tokens, memory_features, memory_ages, memory_valid, memory_masks)
        return self.forward(pixel_values, input_ids, memory_tokens=tokens, **prompts)

    def _tokens(
        self, features: Tensor, ages: Tensor | None, valid: Tensor | None, masks: Tensor | None, image: Tensor
    ) -> Float[Tensor, "p l c"]:
        """Return the memory tokens of each prompt."""
        b, frames = features.shape[:2]
        given = {
            "memory_features": features,
            "memory_ages": torch.arange(frames, 0, -1).float().expand(b, -1) if ages is None else ages,
            "memory_valid": torch.ones(b, frames, dtype=torch.bool) if valid is None else valid,
        }
        if masks is None:
            return self.files.remembered(given)[image]
        return self.files.remembered({n: x[image] for n, x in given.items()} | {"memory_masks": masks})


class ExportedSam3(_Detects, Sam3Model):
    """A SAM 3 in ONNX files, or one with a student as its trunk."""


@dataclass(frozen=True)
class OpenedSam3:
    """A SAM 3 in ONNX files with its tokenizer."""

    model: ExportedSam3
    words: Phrases

    @property
    def image_size(self) -> int:
        return self.model.files.model.canvas.side

    @torch.no_grad()
    def answer(self, images: ImageBatch, prompts: ConceptPrompts) -> DetectorOutput:
        """Run the detector. Each image is encoded once. Raises ``UserError`` for phrases that ``words`` refuses."""
        canvas = self.model.files.model.canvas
        pixels = normalise(images.images, tuple(canvas.mean.tolist()), tuple(canvas.std.tolist()))
        return self.model(pixels, prompt_images=prompts.image, **self.words.inputs(prompts, "cpu")).answer()


class Concepts(Phrases):
    """The concepts of a model with a fixed vocabulary.

    Args:
        vocabulary: The list.
    """

    def __init__(self, vocabulary: runtime.Vocabulary) -> None:
        self._vocabulary = vocabulary
        self.advice = f"it knows: {', '.join(vocabulary.phrases)}"

    def encode(self, texts: Sequence[str]) -> tuple[Int[Tensor, "p 1"], Int[Tensor, "p 1"]]:
        """Return the row of each concept, and a mask of ones."""
        with _one_line():
            rows = torch.tensor([[self._vocabulary.row(text)] for text in texts], dtype=torch.int64).reshape(-1, 1)
        return rows, torch.ones_like(rows)

    def problem(self, text: str, reader: str = "this model") -> str | None:
        return None if text in self._vocabulary.phrases else f"not in the vocabulary {reader} reads"


_KINDS = (
    ExportedTracker, ExportedSam, ExportedSam2, ExportedMobileSam, ExportedHostedSam, ExportedDetector, ExportedSam3,
)  # fmt: skip
_CLASSES: dict[str, Any] = {kind.config_class.model_type: kind for kind in _KINDS}


def _built(folder: Path, precision: str | None) -> Any:
    """Build the model of a folder, without values in its parameters."""
    files = Files(folder, precision)
    settings, where = files.model.config, folder / "export.json"
    kind = _CLASSES.get(settings.get("model_type", ""))
    if kind is None:
        raise UserError(f"{where}: a model of type {settings.get('model_type')!r} cannot be opened")
    config = build_config(kind.config_class, settings, where)
    config.name_or_path = str(folder)
    with foreign(where, "no model can be built from its configuration"), torch.device("meta"):
        model = kind(config).eval()
    _fill(model)
    model.files = files
    return model


def _fill(model: nn.Module) -> None:
    """Give every parameter and buffer a value that takes no memory, so that the model has a device."""
    found: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, old in module._parameters.items():
            if old is not None:
                new = nn.Parameter(torch.zeros(()).expand(old.shape), requires_grad=False)
                module._parameters[name] = found.setdefault(id(old), new)
        for name, old in module._buffers.items():
            if old is not None:
                module._buffers[name] = torch.zeros((), dtype=old.dtype).expand(old.shape)


@OPENERS.register("promptable")
def open_promptable(folder: Path, precision: str | None = None) -> tuple[PreTrainedModel, int]:
    """Open a promptable model. Returns it and the side of its input in pixels."""
    model = _built(folder, precision)

    def encoder(pixels: Tensor, **_: Any) -> dict[str, Tensor]:
        return model.files("vision_encoder", {"pixel_values": pixels})

    model.vision_encoder.forward = encoder  # for the measurement of its latency
    return model, model.files.model.canvas.side


@OPENERS.register("detector")
@OPENERS.register("detector with memory")
def open_detector(folder: Path, precision: str | None = None) -> tuple[StudentDetector | OpenedSam3, int]:
    """Open a detector. Returns it and the side of its input in pixels."""
    model = _built(folder, precision)
    own = model.files.model
    words = Concepts(own.vocabulary) if own.vocabulary is not None else _words(folder, model)
    kind = StudentDetector if isinstance(model, EfficientSam3Model) else OpenedSam3
    return kind(model, words), own.canvas.side


def _words(folder: Path, model: Any) -> Words:
    return Words.load(folder, model.config.text_config.vocab_size, model.files.model.record["context"])
