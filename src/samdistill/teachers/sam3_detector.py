"""SAM 3's image model as a teacher: images and questions in, all outputs of the detector out.

It reads a Hugging Face folder or hub id of ``Sam3Model`` or ``Sam3VideoModel``, the original ``sam3.pt``, or one of
these with a student merged in as its trunk or its text encoder (``Sam3LiteTextModel``). Answers are not cached, because
the answer to one question is as large as the features of an image.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from transformers import Sam3Config, Sam3LiteTextConfig, Sam3LiteTextModel, Sam3Model
from transformers.models.sam3.modeling_sam3 import Sam3VisionEncoderOutput

from ..checkpoints.files import locate
from ..checkpoints.loading import locate_config, parameter_count, pretrained, quiet_transformers
from ..checkpoints.original import detector_config, load_original
from ..checkpoints.words import Words
from ..config import TeacherConfig
from ..ops.images import SAM3_MEAN, SAM3_STD, Statistics, normalise
from ..ops.outputs import ask, trunk_map
from ..reading import foreign, running
from ..types import ConceptPrompts, DetectorOutput, ImageBatch, UserError
from .base import DTYPES
from .loading import fingerprint, freeze, settings, square
from .sam3 import check_image_size

Host = Sam3Config | Sam3LiteTextConfig
MODELS: dict[type[Host], type[Sam3Model | Sam3LiteTextModel]] = {
    Sam3Config: Sam3Model, Sam3LiteTextConfig: Sam3LiteTextModel,
}  # fmt: skip
"""Models of detectors with SAM 3's own heads, by their configurations. The second one has a small text encoder."""
_SOURCES = "a Hugging Face folder of a Sam3Model, Sam3LiteTextModel or Sam3VideoModel, or an original sam3.pt"


@dataclass(frozen=True)
class DetectorInfo:
    """Description of a detector, read without its weights.

    Attributes:
        path: Path or hub id.
        image_size: Side of the input in pixels.
        queries: Number of object queries.
        hidden_size: Channels of FPN maps and tokens.
        trunk_size: Channels of the ViT's output.
        levels: Sides of the three FPN maps that the heads read, finest first.
        grid: Side of the token grid.
        params: Parameters of the whole model.
        mean: Mean of the normalisation.
        std: Standard deviation of the normalisation.
        vocab_size: Rows of the text encoder's token table.
        context: Rows of the text encoder's position table.
        parts: Parameters by part, as ``detector_parts`` divides the model.
    """

    path: str
    image_size: int
    queries: int
    hidden_size: int
    trunk_size: int
    levels: tuple[int, ...]
    grid: int
    params: int
    mean: Statistics
    std: Statistics
    vocab_size: int
    context: int
    parts: Mapping[str, int]


def detector_parts(model: nn.Module) -> dict[str, nn.Module]:
    """Return the modules of a detector with SAM 3's heads by name. The vision encoder is divided in trunk and neck."""
    vision, *heads = model.named_children()
    return {"trunk": vision[1].backbone, "neck": vision[1].neck} | dict(heads)


def describe_detector(config: TeacherConfig) -> DetectorInfo:
    """Read geometry and size of a detector from its ``config.json``, without weights.

    Raises:
        UserError: The checkpoint is not a concept detector, or cannot read images of the configured size.
    """
    return describe_host(config.path, find_detector(config)[1])


class Sam3Detector:
    """A frozen ``Sam3Model`` or ``Sam3LiteTextModel`` that answers questions. It normalises images itself.

    Attributes:
        info: Geometry and size.
        words: Tokenizer of the text encoder.
        fingerprint: Hex digest of weights, settings, image size, precision and tokenizer. Detectors with the same
            fingerprint give the same answers.

    Raises:
        UserError: See ``describe_detector`` and ``Words.load``; or the weights are incomplete or do not fit the
            configuration.
    """

    mean, std = SAM3_MEAN, SAM3_STD

    def __init__(self, config: TeacherConfig, device: torch.device | str = "cpu") -> None:
        place, host = find_detector(config)
        self.info = describe_host(config.path, host)
        place = locate(config.path, packaged="detector")  # for a hub id, this downloads the weights
        beside = place.parent if place.is_file() else place
        self.words = Words.load(config.tokenizer or beside, self.info.vocab_size, self.info.context)
        self.device = torch.device(device)
        self.model = _load(place, host)
        freeze(self.model, DTYPES[config.precision])
        for module in self.model.modules():
            if isinstance(module, _BatchNorm):  # of a merged student; on the CPU, torch requires one dtype
                module.float()
        behaviour = {"model": settings(host.to_dict()), "words": self.words.digest}
        self.fingerprint = fingerprint(self.model, behaviour, self.info.image_size, self.mean, self.std)
        self.model.to(self.device)

    @classmethod
    def around(cls, model: Sam3Model | Sam3LiteTextModel, info: DetectorInfo, words: Words) -> Sam3Detector:
        """Return a detector with a model that is loaded already, in eval mode. It has no fingerprint."""
        found = cls.__new__(cls)
        found.model, found.info, found.words, found.device, found.fingerprint = model, info, words, model.device, ""
        return found

    @property
    def image_size(self) -> int:
        return self.info.image_size

    def text(self, prompts: ConceptPrompts) -> Float[Tensor, "p t c"]:
        """Return the projected text features of the prompts, as a float32 tensor without gradient.

        Raises:
            UserError: ``words`` refuses a phrase.
        """
        with running(self.model), torch.inference_mode(), torch.autocast(self.device.type, enabled=False):
            asked = self.words.inputs(prompts, self.device)
            text = self.model.get_text_features(asked["input_ids"], asked["attention_mask"], return_dict=True)
        return _free(text.pooler_output)

    def answer(
        self, images: ImageBatch, prompts: ConceptPrompts, text: Float[Tensor, "p t c"] | None = None
    ) -> DetectorOutput:
        """Return all outputs as float32 tensors without gradient, for use in a loss. Each image is encoded once.

        Args:
            images: The images.
            prompts: The prompts.
            text: ``text(prompts)``, if it is known.

        Raises:
            UserError: The images have another size, or ``words`` refuses a phrase.
        """
        text = self.text(prompts) if text is None else text
        with running(self.model), torch.inference_mode(), torch.autocast(self.device.type, enabled=False):
            vision = self._vision(images)
            asked = self.words.inputs(prompts, self.device)
            found = ask(
                self.model,
                vision,
                prompts.image.to(self.device),
                text.to(self.model.dtype),
                asked["attention_mask"],
                asked["input_boxes"].to(self.model.dtype),
                asked["input_boxes_labels"],
            )
        return DetectorOutput(
            _free(found.pred_masks), _free(found.pred_boxes), _free(found.pred_logits), _free(found.presence_logits),
            _free(found.semantic_seg), tuple(map(_free, found.fpn)), _free(found.encoder), _free(trunk_map(vision)),
        )  # fmt: skip

    def features(self, images: ImageBatch) -> tuple[Float[Tensor, "b c _ _"], ...]:
        """Return the three FPN levels that the heads read, finest first, without answering questions."""
        return tuple(map(_free, self._levels(images)[:-1]))

    def trunk(self, images: ImageBatch) -> tuple[Float[Tensor, "b d gh gw"]]:
        """Return the output of the ViT alone. The neck does not run."""
        with running(self.model), torch.inference_mode(), torch.autocast(self.device.type, enabled=False):
            tokens = self.model.vision_encoder.backbone(self._pixels(images)).last_hidden_state
        return (_free(tokens.transpose(1, 2).unflatten(2, (self.info.grid, self.info.grid))),)

    def pyramid(self, images: ImageBatch) -> tuple[Float[Tensor, "b c _ _"], ...]:
        """Return all four FPN levels, finest first. No head reads the last one."""
        return tuple(map(_free, self._levels(images)))

    def to(self, device: torch.device | str) -> Sam3Detector:
        """Move the model to ``device``. Does nothing if it is there."""
        if torch.device(device) != self.device:
            self.device = torch.device(device)
            self.model.to(self.device)
        return self

    def _levels(self, images: ImageBatch) -> Sequence[Tensor]:
        """Return the FPN levels in the model's dtype, as inference tensors."""
        with running(self.model), torch.inference_mode(), torch.autocast(self.device.type, enabled=False):
            return self._vision(images).fpn_hidden_states

    def _vision(self, images: ImageBatch) -> Sam3VisionEncoderOutput:
        return self.model.get_vision_features(self._pixels(images))

    def _pixels(self, images: ImageBatch) -> Float[Tensor, "b 3 h w"]:
        side = self.info.image_size
        if images.images.shape[-2:] != (side, side):
            height, width = images.images.shape[-2:]
            raise UserError(
                f"the teacher reads {side} x {side} pixels, but the images are {height} x {width}; "
                "set teacher.image_size, or resize the images to its canvas"
            )
        return normalise(images.images.to(self.device), self.mean, self.std).to(self.model.dtype)


def load_detector(path: str, host: Host) -> Sam3Model | Sam3LiteTextModel:
    """Load the complete model of a checkpoint in float32 and eval mode on the CPU.

    Args:
        path: Path or hub id.
        host: Its configuration, from ``find_detector``.

    Raises:
        UserError: The weights are incomplete or do not fit the configuration.
    """
    return _load(locate(path, packaged="detector"), host)  # for a hub id, this downloads the weights


def _free(tensor: Tensor) -> Tensor:
    """Copy outside inference mode, because autograd cannot save an inference tensor for a backward pass."""
    return tensor.to(torch.float32, copy=True).contiguous()


def find_detector(config: TeacherConfig) -> tuple[Path, Host]:
    """Return the folder or file of a checkpoint, and the configuration of its detector at the configured image size.

    Raises:
        UserError: See ``describe_detector``.
    """
    if config.kind != "sam3":
        raise UserError(f"teacher.kind={config.kind}: only SAM 3 answers questions in words; set teacher.kind=sam3")
    place = locate(config.path, ("config.json",), packaged="detector")
    if place.is_file():
        host: Host = detector_config(place)
    else:
        _, whole = locate_config(str(place), "SAM 3")
        host = getattr(whole, "detector_config", None) or whole
        if type(host) not in MODELS:
            raise UserError(f"{place}: a {whole.model_type!r} model answers no questions in words; give {_SOURCES}")
    trunk = host.vision_config.backbone_config
    size = config.image_size if config.image_size is not None else square(trunk.image_size, config.path)
    check_image_size(size, trunk.patch_size)
    trunk.image_size = size  # the model computes its rotary positions from it when it is built
    return place, host


def describe_host(path: str, host: Host) -> DetectorInfo:
    """Return the description of a detector by its configuration.

    Raises:
        UserError: No model can be built from it. The message names ``path``.
    """
    with foreign(path, "no model can be built from its configuration"):
        vision, text = host.vision_config, host.text_config
        size = vision.backbone_config.image_size
        grid = size // vision.backbone_config.patch_size
        with torch.device("meta"), quiet_transformers():
            parts = {name: parameter_count(one) for name, one in detector_parts(MODELS[type(host)](host)).items()}
        return DetectorInfo(
            path, size, host.detr_decoder_config.num_queries, vision.fpn_hidden_size,
            vision.backbone_config.hidden_size,
            tuple(int(grid * scale) for scale in vision.scale_factors[:-1]), grid,
            sum(parts.values()), Sam3Detector.mean, Sam3Detector.std, text.vocab_size, text.max_position_embeddings,
            parts,
        )  # fmt: skip


def _load(place: Path, host: Host) -> Sam3Model | Sam3LiteTextModel:
    """Load the complete model of ``host`` in float32 on the CPU."""
    if place.is_file():
        return load_original(place, MODELS[type(host)], host)
    return pretrained(MODELS[type(host)], host, place, place)
